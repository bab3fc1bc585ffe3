"What is around the text of a page: description, buttons for its source, and what other sites show of a link to it"

import html
import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
COLAB = 'https://colab.research.google.com/github'
MAX_DESCRIPTION = 160
BUTTONS = dict(
    edit='Edit',
    edit_title='Edit this page on GitHub',
    notebook='Notebook',
    notebook_title='Download this page as a notebook',
)


def version():
    "The version of the package"
    text = (ROOT / 'fastai_tl' / '__init__.py').read_text(encoding='utf-8')
    return re.search(r'__version__ = ["\']([^"\']+)', text)[1]


def description(page):
    "The lead of a page as plain text, cut at a word"
    text = re.sub(r'\[([^\]]+)\]\([^)]*\)', r'\1', page.lead).replace('`', '').replace('*', '')
    return text if len(text) <= MAX_DESCRIPTION else text[:MAX_DESCRIPTION].rsplit(' ', 1)[0] + ' …'


def front_matter(page):
    "The description of a page, for search engines"
    text = description(page)
    return f'---\n{yaml.safe_dump(dict(description=text), allow_unicode=True, width=1000)}---\n\n' if text else ''


def installs_package(page):
    "Whether a notebook installs the package from the repository, so that it runs on Colab"
    code = ''.join(''.join(c['source']) for c in page.nb['cells'] if c['cell_type'] == 'code')
    return 'pip install' in code and 'fastai_tl' in code


def with_buttons(page, text, words=BUTTONS):
    "The text of a page with links to its source below the title"
    if page.src.split('/')[0] not in ('nbs', 'benchmarks') and not page.src.endswith('.md'):
        return text
    git = page.site.git_url
    links = [f'[{words["edit"]}]({git}/edit/main/{page.edit}){{ title="{words["edit_title"]}" }}']
    if page.src.endswith('.ipynb'):
        title = words['notebook_title']
        links.append(f'[{words["notebook"]}]({git}/raw/main/{page.src}){{ title="{title}" download }}')
        if installs_package(page):
            links.append(f'[Colab]({COLAB}/{git.split("/", 3)[3]}/blob/main/{page.src})')
    title, rest = text.split('\n', 1)
    return f'{title}\n\n<div class="page-links" markdown data-search-exclude>\n{" ".join(links)}\n</div>\n{rest}'


def image_of(page):
    "The first figure of a page, or the one of the home page"
    return next(iter(page.figures), None)


def add_social_tags(site, pages, url):
    "Write Open Graph tags into the head of each built page: title, description, address and the first figure"
    pages = list(pages)
    home = next((image_of(p) for p in pages if p.out == 'index.md'), None)
    for page in pages:
        path = site / Path(page.out).with_suffix('.html')
        address = f'{url}/{path.relative_to(site).as_posix()}'
        tags = dict(title=page.title, description=description(page), type='article', url=address)
        if image := image_of(page) or home:
            tags['image'] = f'{url}/{image}'
        head = ''.join(f'<meta property="og:{k}" content="{html.escape(v)}">' for k, v in tags.items() if v)
        text = path.read_text(encoding='utf-8')
        path.write_text(text.replace('</head>', head + '</head>', 1), encoding='utf-8')


def stop_requests(site):
    "Take the mark off the link to the repository that lets the theme ask GitHub for its stars"
    for path in site.rglob('*.html'):
        text = path.read_text(encoding='utf-8')
        path.write_text(text.replace(' data-md-component="source"', ''), encoding='utf-8')
