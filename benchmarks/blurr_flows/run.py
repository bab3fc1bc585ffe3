"""The main flows of blurr 1.0.5's documentation, cell by cell, with `enable_blurr()` on small local models.

    pip install -e ".[dev,blurr]" && pip install --no-deps ohmeow-blurr==1.0.5
    python benchmarks/blurr_flows/run.py

The files in `flows/` rewrite the cells of blurr's notebooks, in the same order and with the same calls. A table of
60 made-up sentences and models of a few thousand weights replace the data sets and models from the hub. Writes
results/flows.json and results/flows.md."""

import argparse
import contextlib
import io
import re
import sys
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import offline, table, write_json

offline()
HERE = Path(__file__).resolve().parent
FLOWS = ('classification', 'tagging', 'language_modeling')


def read_flow(name):
    "Title of a flow, and its cells as pairs of name and code; a cell begins with `# %% name`"
    title, *cells = re.split('^# %% ', (HERE / 'flows' / f'{name}.py').read_text(encoding='utf-8'), flags=re.M)
    return title.split('\n')[0].removeprefix('# '), [tuple(c.split('\n', 1)) for c in cells]


def run(cells):
    "Run each cell in turn in one namespace; a failure does not stop the rest"
    namespace = {'__name__': 'flow'}
    res = []
    exec((HERE / 'flows' / 'setup.py').read_text(encoding='utf-8'), namespace)
    for name, code in cells:
        out = io.StringIO()
        error = None
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                exec(code, namespace)
        except Exception as e:
            first_line = str(e).strip().split('\n')[0]
            error = f'{type(e).__name__}: {first_line}'[:160]
        res.append(dict(cell=name, passes=error is None, error=error))
        print('  ', 'ok  ' if error is None else 'FAIL', name, error or '', flush=True)
    return res


def markdown(flows, versions):
    "The results as a page: a table for each flow"
    others = ', '.join(f'{k} {v}' for k, v in versions.items() if k != 'ohmeow-blurr')
    parts = [f'blurr {versions["ohmeow-blurr"]} with `enable_blurr()` on {others}.']
    for name, cells in flows.items():
        parts.append(f'**{name}**: {sum(c["passes"] for c in cells)} of {len(cells)} cells pass')
        rows = []
        for c in cells:
            rows.append([c['cell'], 'yes' if c['passes'] else 'no: ' + c['error'].replace('|', '/')])
        parts.append(table(['cell', 'passes'], rows))
    return '\n\n'.join(parts) + '\n'


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    from fastai_tl.interop.blurr import enable_blurr

    enable_blurr()
    flows = {}
    for title, cells in map(read_flow, FLOWS):
        print(title)
        flows[title] = run(cells)
    versions = {k: version(k) for k in ('ohmeow-blurr', 'fastai', 'transformers', 'datasets', 'torch', 'pandas')}
    write_json(HERE / 'results' / 'flows.json', dict(versions=versions, flows=flows))
    (HERE / 'results' / 'flows.md').write_text(markdown(flows, versions))


if __name__ == '__main__':
    main()
