"The search of the site: which pages come first, the words that people use for a page, and words of Chinese"

import json
import re
from pathlib import Path, PurePosixPath

import yaml

WORDS = Path(__file__).with_name('search.yml')
RANKS = ('howto/', 'tutorials/')  # then the pages of Start, the reference, and the rest


def keywords():
    "{page without its ending: words that people search for and that the page does not use}"
    return {name: str(words) for name, words in yaml.safe_load(WORDS.read_text(encoding='utf-8')).items()}


def rank(page, is_module):
    "The place of a page among those that match a query equally well"
    for i, folder in enumerate(RANKS):
        if page.startswith(folder):
            return i
    if is_module(page):
        return 3
    return 4 if page.startswith(('benchmarks', 'changelog', 'contributing')) else 2


def improve(search, modules):
    "The index of the built site with how-to pages and tutorials first, keyword lines, and Chinese cut into words"
    words = keywords()
    pages = {page_of(item) for item in search['items']}
    lost = sorted(set(words) - pages)
    if lost:
        raise ValueError(f'tools/search.yml names pages that do not exist: {lost}')
    items = [with_words(item, words, modules) for item in search['items']]
    items.sort(key=lambda item: rank(page_of(item), modules.__contains__))
    return dict(with_chinese(search), items=items)


def with_chinese(search):
    "The index with Chinese cut into words"
    config = search['config']
    return dict(search, config=dict(config, lang=list(dict.fromkeys([*config.get('lang', ['en']), 'zh']))))


def page_of(item):
    "`howto/csv` for howto/csv.html#use-it"
    return str(PurePosixPath(item['location'].split('#')[0] or 'index.html').with_suffix(''))


def with_words(item, words, modules):
    """An item of the index; the first of a page has the page's keyword line in its path, which weighs more than text.
    Early words weigh more than late ones, so the line comes first. Words before `|` are shown after the title, which
    weighs most."""
    page = page_of(item)
    if '#' in item['location'] or page not in words:
        return item
    shown, _, others = words[page].rpartition('|')
    title = f'{item["title"]} · {shown.strip()}' if shown else item['title']
    return dict(item, title=title, path=[*re.split(r',\s*', others.strip()), *item.get('path', [])])


def rewrite(site, modules):
    "Improve the index in the folder of the built site"
    path = site / 'search.json'
    search = improve(json.loads(path.read_text(encoding='utf-8')), modules)
    path.write_text(json.dumps(search, ensure_ascii=False), encoding='utf-8')


def rewrite_chinese(site):
    "Improve the index of the Chinese pages"
    path = site / 'search.json'
    search = with_chinese(json.loads(path.read_text(encoding='utf-8')))
    path.write_text(json.dumps(search, ensure_ascii=False), encoding='utf-8')
