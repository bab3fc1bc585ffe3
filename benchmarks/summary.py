"""Write benchmarks/README.md: a table of all benchmarks, from the title and the one-line result at the top of each
one's README.

    python benchmarks/summary.py            # write it
    python benchmarks/summary.py --check    # fail if it is not up to date
"""

import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
GROUPS = {
    'Accuracy': (
        'transfer_gain trec6_minilm recipes fit_transfer layer_rates regularizers few_shot multilingual distillation '
        'shrinking hotel_reviews chinese_ner probing preferences continual new_words'
    ).split(),
    'Speed and memory': (
        'training allocator mixed_precision feature_cache compilation prediction onnx serving generation evaluation '
        'scaling long_documents streaming bulk_prediction chinese_tokenizers chinese_million static_vectors '
        'import_time gpu'
    ).split(),
    'Coverage': 'architectures blurr_flows'.split(),
    'Trust': ['attributions', 'distributed', 'trust'],
}
INTRO = '''# Benchmarks

Each benchmark runs what it compares in turn in one process and reports ratios or paired differences, with their range.
None is a test, since machines are noisy. All figures are from two processor cores without a GPU. The page of each
benchmark names the processor's instructions (bfloat16 and AMX make a large difference), the conditions, and what it
does not show.

A benchmark is a folder: `run.py` (its docstring says what it measures and how to call it), `README.md`, and `results/`.
Timing, ratios and tables are in `common.py`.

`fastai-tl benchmark` measures training and prediction on your machine in about five minutes, compared with
transformers' Trainer and pipeline and with fastai, and writes the figures with `--json FILE`.
'''
QUICKSTART = '''
`fastai-tl quickstart` is a benchmark of its own: it prints what a majority vote, word counts and training from scratch
reach on the same rows. Its table is in the [README](../README.md).
'''


def about(name):
    "Title and result of a benchmark"
    text = (HERE / name / 'README.md').read_text(encoding='utf-8')
    found = re.match(r'# (.+)\n\n> (.+)\n', text)
    if not found:
        sys.exit(f'benchmarks/{name}/README.md must begin with a title and a line `> result`')
    return found[1], found[2]


def page():
    "The text of benchmarks/README.md"
    grouped = {name for names in GROUPS.values() for name in names}
    folders = {p.parent.name for p in HERE.glob('*/run.py')}
    if grouped != folders:
        sys.exit(f'GROUPS and the folders differ: {sorted(grouped ^ folders)}')
    parts = [INTRO]
    for group, names in GROUPS.items():
        rows = [f'| [{title}]({name}/README.md) | {result} |' for name in names for title, result in [about(name)]]
        parts.append('\n'.join([f'\n## {group}\n', '| benchmark | result |', '|---|---|', *rows, '']))
    return ''.join([*parts, QUICKSTART])


if __name__ == '__main__':
    path = HERE / 'README.md'
    if '--check' not in sys.argv:
        path.write_text(page(), encoding='utf-8')
    elif path.read_text(encoding='utf-8') != page():
        sys.exit('benchmarks/README.md is not up to date: python benchmarks/summary.py')
