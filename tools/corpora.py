#!/usr/bin/env python
"""Freeze the offline corpora: write `docstrings.csv.gz`, `general.csv.gz`, `corpora.json` and `LICENSES` to
`fastai_tl/resources/`, made from the installed libraries and the running Python.

    python tools/corpora.py

All results that are quoted on these corpora change with them: run the quickstart and the notebooks again afterwards."""

import gzip
import hashlib
import json
import platform
import re
import sysconfig
from importlib import metadata
from pathlib import Path

from fastai_tl.datasets.corpora import LIBRARIES, library_version, make_docstring_corpus, make_general_corpus

RESOURCES = Path(__file__).resolve().parents[1] / 'fastai_tl' / 'resources'
STDLIB = Path(sysconfig.get_path('stdlib'))
_notice = re.compile(r'(?i)copyright|\(c\) |licen[cs]ed? |permission is hereby|redistribut')
HEADER = """
The corpora `docstrings.csv.gz` and `general.csv.gz` in this folder are excerpts from the software listed here, and are
distributed under its licences, which follow. The excerpts are paragraphs of docstrings, comments and documentation.
They were changed: markup, formulas and links are removed, white space is normalised, names of libraries are replaced
with the word "thelibrary", near-duplicates are left out, and the paragraphs of docstrings have labels.
The text of the Apache License 2.0, which some notices name, is the licence of fastai_tl itself.
`tools/corpora.py` in the source repository makes the corpora and this file.
"""


def license_file(package):
    "The main licence of an installed package: the one that is not in a subfolder of a bundled project"
    files = [f for f in metadata.files(package) if re.fullmatch(r'(?i)licen[cs]e.*|copying.*', f.name)]
    files = [f for f in files if '.dist-info' in f.parts[0]]
    return min(files, key=lambda f: len(f.parts)).locate()


def own_part(text):
    "A licence without those of the programs that only the binary distribution bundles"
    return re.split(r'\n-{4,}\n', text)[0].strip()


def notices(root, files):
    "The distinct comments about copyright and licence in some source files"
    found = {}
    for file in files:
        for block in re.findall(r'(?:^[ \t]*#.*\n)+', (root / file).read_text(encoding='utf-8', errors='ignore'), re.M):
            lines = [line.strip().lstrip('#').strip() for line in block.splitlines()]
            if _notice.search(' '.join(lines)):
                found.setdefault('\n'.join(lines).strip(), []).append(file)
    return found


def section(title, text, root, files):
    "One library: its licence, and the notices in its files"
    parts = [f'{"=" * 78}\n{title}\n{"=" * 78}', text]
    for notice, where in notices(root, files).items():
        if re.search(r'(?i)copyright|permission is hereby|licensed under', notice):
            shown = ', '.join(where[:3]) + (f' and {len(where) - 3} more files' if len(where) > 3 else '')
            parts.append(f'{"-" * 78}\nNotice in {shown}:\n\n{notice}')
    return '\n\n'.join(parts)


def source_files(sources):
    "The source files of a corpus, in order"
    found = (re.match(r'[^:#]*?\.py(?=[.:#]|$)', source) for source in sources.unique())
    return list(dict.fromkeys(match[0] for match in found if match))


def licenses(docstrings, general):
    "The text of LICENSES"
    parts = [HEADER.strip()]
    for library, package in LIBRARIES.items():
        text = own_part(license_file(package).read_text(encoding='utf-8'))
        files = source_files(docstrings[docstrings.library == library].source)
        parts.append(section(f'{package} {library_version(library)}', text, site(package), files))
    text = (STDLIB / 'LICENSE.txt').read_text(encoding='utf-8').strip()
    parts.append(section(f'Python {platform.python_version()}', text, STDLIB, source_files(general.source)))
    return '\n\n'.join(parts) + '\n'


def site(package):
    "The folder in which a package is installed"
    return Path(metadata.distribution(package).locate_file(''))


def write(name, df):
    "Write a corpus; its checksum is that of the table, not of the compressed file"
    table = df.to_csv(index=False, lineterminator='\n').encode()
    (RESOURCES / f'{name}.csv.gz').write_bytes(gzip.compress(table, 9, mtime=0))
    return hashlib.sha256(table).hexdigest()


def main():
    docstrings = make_docstring_corpus(tuple(LIBRARIES))
    general = make_general_corpus()
    sources = {package: library_version(library) for library, package in LIBRARIES.items()}
    hashes = dict(docstrings=write('docstrings', docstrings), general=write('general', general))
    facts = dict(docstrings=sources, general=dict(python=platform.python_version()), sha256=hashes)
    (RESOURCES / 'corpora.json').write_text(json.dumps(facts, indent=2) + '\n', encoding='utf-8')
    (RESOURCES / 'LICENSES').write_text(licenses(docstrings, general), encoding='utf-8')
    print(f'{len(docstrings):,} and {len(general):,} passages written to {RESOURCES}')


if __name__ == '__main__':
    main()
