#!/usr/bin/env python
"""Make README.md from nbs/index.ipynb, and README.zh-TW.md from nbs/index.zh-TW.ipynb: their Markdown, code and output.

    python tools/readme.py            write both
    python tools/readme.py --check    write nothing; exit 1 if one is not what would be written

A cell with `#| hide` is left out, one with `#| echo: false` shows only its output, one with `#| output: false` only its
code."""

import argparse
import base64
import difflib
import json
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
READMES = [
    (ROOT / 'nbs' / 'index.ipynb', ROOT / 'README.md'),
    (ROOT / 'nbs' / 'index.zh-TW.ipynb', ROOT / 'README.zh-TW.md'),
]
_directive = re.compile(r'^\s*#\s*\|\s*([\w-]+)[ \t]*:?[ \t]*(.*)$')
_link = re.compile(r'(\]\()(?![a-z][a-z+.-]*:|#|/)([^)\s]+)')
_ansi = re.compile(r'\x1b\[[0-9;?]*[A-Za-z]')
_fence = re.compile(r'^\s*(```|~~~)')
_bar = re.compile(r'(Epoch \d+/\d+ : )?\|[█-]*\| +[\d.]+% \[[^\]]*\]( [\d.]+)?')


def text_of(src):
    return src if isinstance(src, str) else ''.join(src or [])


def split_cell(cell):
    "The directives of a code cell as a dict, and its code without them"
    dirs, lines = {}, text_of(cell['source']).splitlines()
    while lines and (not lines[0].strip() or _directive.match(lines[0])):
        if m := _directive.match(lines.pop(0)):
            dirs[m[1]] = m[2].strip().lower()
    for k, v in (cell.get('metadata', {}).get('nbdev') or {}).items():
        dirs.setdefault(k, str(v or '').lower())
    return dirs, '\n'.join(lines).rstrip()


def is_off(dirs, name):
    return dirs.get(name) in ('false', 'no')


def plain(txt):
    "`txt` as a terminal leaves it: no colours, no progress bars, and of an overwritten line its last state"
    lines = [l.rstrip('\r').rsplit('\r', 1)[-1] for l in _ansi.sub('', txt).split('\n')]
    lines = [_bar.sub('', l).rstrip() for l in lines if l.strip() == '' or _bar.sub('', l).strip()]
    return '\n'.join(lines).strip('\n')


def output_md(out, figures=None):
    """One output of a cell as Markdown; empty for what has no text (progress bars) and for stderr.
    A figure goes into `figures`, a dict from file name to bytes; without `figures` it is left out."""
    if out['output_type'] == 'stream':
        return block(plain(text_of(out['text'])), 'text') if out.get('name') != 'stderr' else ''
    data = out.get('data', {})
    if 'image/png' in data and figures is not None:
        name = f'{figures["stem"]}_{len(figures) - 1}.png'
        figures[name] = base64.b64decode(text_of(data['image/png']))
        return f'![{figures["alt"]}](nbs/figures/{name})'
    if 'text/markdown' in data:
        return text_of(data['text/markdown']).strip()
    txt = plain(text_of(data.get('text/plain', '')))
    return '' if re.match(r'<(IPython|Figure|matplotlib)', txt) else block(txt, 'text')


def block(txt, lang):
    "`txt` in a fence longer than any fence inside it"
    if not txt.strip():
        return ''
    fence = '`' * max([3, *(len(o) + 1 for o in re.findall(r'`{3,}', txt))])
    return f'{fence}{lang}\n{txt}\n{fence}'


def markdown(src, folder='nbs'):
    "A Markdown cell with its relative links leading from the project's root"
    res, fenced = [], False
    for line in src.strip().split('\n'):
        if _fence.match(line):
            fenced = not fenced
        if not fenced:
            line = _link.sub(lambda m: m[1] + os.path.normpath(f'{folder}/{m[2]}').replace(os.sep, '/'), line)
        res.append(line)
    return '\n'.join(res)


def code_blocks(nb, fast=True):
    "The code of every cell that the README shows; with `fast`, without `#| slow`, `#| notest` and `#| eval: false`"
    res = []
    for c in nb['cells']:
        if c['cell_type'] != 'code':
            continue
        dirs, code = split_cell(c)
        if not code or 'hide' in dirs or is_off(dirs, 'echo'):
            continue
        if fast and ({'slow', 'notest'} & set(dirs) or is_off(dirs, 'eval')):
            continue
        res.append(code)
    return res


def cell_md(cell, figures=None):
    "One cell as a list of Markdown paragraphs"
    if cell['cell_type'] == 'markdown':
        return [markdown(text_of(cell['source']))]
    if cell['cell_type'] != 'code':
        return []
    dirs, code = split_cell(cell)
    if 'hide' in dirs:
        return []
    res = [] if is_off(dirs, 'echo') or 'hide_input' in dirs else [block(code, 'python')]
    if not is_off(dirs, 'output'):
        if figures is not None:
            figures['alt'] = dirs.get('alt', '')
        res += [output_md(o, figures) for o in cell.get('outputs', [])]
    return res


def readme(nb, name='index.ipynb', figures=None):
    "The text of the README for the notebook `nb`, a dict, which is called `name`"
    parts = [p for c in nb['cells'] for p in cell_md(c, figures) if p.strip()]
    return f'<!-- Made from nbs/{name} by tools/readme.py: edit the notebook. -->\n\n' + '\n\n'.join(parts) + '\n'


def load(path):
    return json.loads(Path(path).read_text(encoding='utf-8'))


def main(argv=None):
    p = argparse.ArgumentParser(description='Make README.md from nbs/index.ipynb.')
    p.add_argument('--check', action='store_true', help='write nothing; exit 1 on a difference')
    p.add_argument('--nb', type=Path, help='the notebook; all of them if left out')
    p.add_argument('--out', type=Path, default=ROOT / 'README.md', help='the file to write for --nb')
    args = p.parse_args(argv)
    for nb, out in [(args.nb, args.out)] if args.nb else READMES:
        one(nb, out, args.check)


def one(nb, out, check):
    "Write one README, or say how it differs"
    if not nb.exists():
        sys.exit(f'{nb} does not exist: the README is made from it.')
    figures = dict(stem=nb.stem, alt='')
    new = readme(load(nb), nb.name, figures)
    images = {nb.parent / 'figures' / k: v for k, v in figures.items() if isinstance(v, bytes)}
    old = out.read_text(encoding='utf-8') if out.exists() else ''
    same = all(path.exists() and path.read_bytes() == data for path, data in images.items())
    if new == old and same:
        return
    if not check:
        out.write_text(new, encoding='utf-8')
        for path, data in images.items():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
        return
    sys.stderr.writelines(
        difflib.unified_diff(old.splitlines(True), new.splitlines(True), out.name, 'made from the notebook')
    )
    sys.exit(f'{out.name} differs from {nb.name}: run `python tools/readme.py`.')


if __name__ == '__main__':
    main()
