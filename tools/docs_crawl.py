"Every link, anchor and image of a built site, followed without a browser"

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Reader(HTMLParser):
    "The ids of a page, what it links to, and what it loads"

    def __init__(self):
        super().__init__()
        self.ids = set()
        self.links, self.loads = [], []

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {a[k] for k in ('id', 'name') if a.get(k) and (k == 'id' or tag == 'a')}
        if tag == 'a' and a.get('href'):
            self.links.append(a['href'])
        if tag == 'link' and a.get('href'):
            (self.loads if 'stylesheet' in a.get('rel', '') or 'icon' in a.get('rel', '') else self.links).append(
                a['href']
            )
        if tag in ('img', 'script', 'source', 'iframe') and a.get('src'):
            self.loads.append(a['src'])


def read(path):
    r = Reader()
    r.feed(path.read_text(encoding='utf-8'))
    return r


def crawl(site, url):
    "What is broken in the folder `site`, which will stand at the address `url`: one line each, none if all is well"
    site = Path(site).resolve()
    pages = {p: read(p) for p in sorted(site.rglob('*.html'))}
    base, wrong = urlsplit(url).path.rstrip('/'), []
    for p, r in pages.items():
        where = p.relative_to(site).as_posix()
        for link in r.links + r.loads:
            full = link
            if link.startswith(url):
                link = base + link[len(url) :]
            o = urlsplit(link)
            if o.scheme or o.netloc:
                if full in r.loads:
                    wrong.append(f'{where} loads {full} from elsewhere')
                continue
            path, anchor = unquote(o.path), unquote(o.fragment)
            target = (
                p
                if not path
                else site / path[len(base) :].lstrip('/')
                if path.startswith('/')
                else (p.parent / path).resolve()
            )
            if target.is_dir():
                target = target / 'index.html'
            if not target.exists():
                wrong.append(f'{where}: {link} leads nowhere')
            elif anchor and target in pages and anchor not in pages[target].ids and not anchor.startswith('__'):
                wrong.append(f'{where}: {link} names no anchor')
    for line in sorted(site.glob('llms.txt')):
        for link in re.findall(r'\]\(([^)]+)\)', line.read_text(encoding='utf-8')):
            if link.startswith(url) and not (site / link[len(url) :].lstrip('/')).exists():
                wrong.append(f'llms.txt: {link} leads nowhere')
    return wrong
