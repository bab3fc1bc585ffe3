#!/usr/bin/env python
"""Screenshots of the built site at desktop and phone width, light and dark, and what is wrong in them.

    pip install playwright && python tools/shots.py site shots --chromium /usr/bin/chromium

Opens each page in both widths and both colours, then runs a search. Prints console errors, pages wider than the window,
and images without pixels; exits 1 if there are any."""

import argparse, functools, http.server, sys, threading
from pathlib import Path

PAGES = ['index.html', 'tutorials/language_models.html', 'tune.unfreezing.html']
WIDTHS = dict(desktop=(1280, 900), phone=(390, 844))


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def serve(folder):
    "The folder behind a port of its own"
    srv = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=srv.serve_forever, daemon=True).start()
    return f'http://127.0.0.1:{srv.server_port}'


def faults(page):
    "What is wrong with the open page"
    wide = page.evaluate('document.documentElement.scrollWidth - document.documentElement.clientWidth')
    broken = page.evaluate(
        '[...document.images].filter(o => o.complete && !o.naturalWidth && o.loading !== "lazy").map(o => o.src)'
    )
    return ([f'{wide} pixels wider than the window'] if wide > 0 else []) + [f'no pixels in {o}' for o in broken]


def shoot(browser, base, out, pages, query):
    "Screenshots of every page in every width and colour; what is wrong, as lines"
    wrong = []
    for size, (w, h) in WIDTHS.items():
        for scheme in ('light', 'dark'):
            page = browser.new_context(viewport=dict(width=w, height=h), color_scheme=scheme).new_page()
            where = ['']
            page.on('console', lambda m: wrong.append(f'{where[0]}: {m.text}') if m.type == 'error' else None)
            page.on('pageerror', lambda e: wrong.append(f'{where[0]}: {e}'))
            page.on(
                'request',
                lambda r: (
                    None if r.url.startswith((base, 'data:', 'blob:')) else wrong.append(f'{where[0]} asks for {r.url}')
                ),
            )
            for name in pages:
                where[0] = f'{name} ({size}, {scheme})'
                page.goto(f'{base}/{name}', wait_until='networkidle')
                wrong += [f'{where[0]}: {o}' for o in faults(page)]
                page.screenshot(path=out / f'{name.replace("/", "_").removesuffix(".html")}-{size}-{scheme}.png')
            where[0] = f'search ({size}, {scheme})'
            page.keyboard.press('/')
            page.wait_for_timeout(500)
            page.keyboard.type(query, delay=20)
            page.wait_for_timeout(1200)
            page.screenshot(path=out / f'search-{size}-{scheme}.png')
            page.context.close()
    return wrong


def main(argv=None):
    from playwright.sync_api import sync_playwright

    p = argparse.ArgumentParser(description='Screenshots of the built site, and what is wrong in them.')
    p.add_argument('site', type=Path, help='the folder of the site')
    p.add_argument('out', type=Path, help='the folder of the screenshots')
    p.add_argument('--chromium', help='a Chromium that is installed; else playwright’s own')
    p.add_argument('--pages', nargs='*', default=PAGES, help='pages, as paths inside the site')
    p.add_argument('--query', default='gradual unfreezing', help='what to search for')
    args = p.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=args.chromium, args=['--no-sandbox'])
        wrong = shoot(browser, serve(args.site), args.out, args.pages, args.query)
        browser.close()
    if wrong:
        sys.exit('\n'.join(wrong))


if __name__ == '__main__':
    main()
