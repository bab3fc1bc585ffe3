#!/usr/bin/env python
"""What `from fastai_tl.all import *` costs next to `from fastai.text.all import *`.

Each import runs in a process of its own, the two in turn, so that a busy machine slows both alike; the first round only warms the
disk cache and is not counted.

    python benchmarks/import_time/run.py [--rounds 5] [--json FILE]"""

import argparse, json, platform, statistics as st, subprocess, sys
from importlib.metadata import version
from pathlib import Path

STATEMENTS = {
    'fastai': 'from fastai.text.all import *',
    'fastai_tl': 'from fastai.text.all import *; from fastai_tl.all import *',
}
TIMED = 'import time; t=time.perf_counter(); exec({!r}); print("seconds", time.perf_counter()-t)'


def seconds(statement):
    "The time of `statement` in a fresh process, measured inside it, so without the start of Python"
    out = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', TIMED.format(statement)], check=True, capture_output=True, text=True
    )
    return float(out.stdout.split()[-1])


def measure(rounds):
    "One dict a round with the seconds of each import; the order changes from round to round"
    res = []
    for i in range(rounds + 1):
        names = list(STATEMENTS)[:: 1 if i % 2 else -1]
        row = {n: seconds(STATEMENTS[n]) for n in names}
        if i:
            res.append(row)
    return res


def summary(rows):
    "Medians, and the ratio with its range over the rounds"
    ratios = [r['fastai_tl'] / r['fastai'] for r in rows]
    return dict(
        rounds=len(rows),
        fastai=st.median(r['fastai'] for r in rows),
        fastai_tl=st.median(r['fastai_tl'] for r in rows),
        ratio=st.median(ratios),
        ratio_min=min(ratios),
        ratio_max=max(ratios),
        python=platform.python_version(),
        versions={o: version(o) for o in ('fastai', 'torch')},
        seconds=rows,
    )


def main():
    p = argparse.ArgumentParser(description='Compare the import times of fastai and fastai_tl.')
    p.add_argument('--rounds', type=int, default=5, help='counted rounds')
    p.add_argument('--json', type=Path, help='also write the figures to this file')
    args = p.parse_args()
    if args.rounds < 1:
        p.error('--rounds must be at least 1')
    s = summary(measure(args.rounds))
    print(
        f"fastai.text.all {s['fastai']:.2f} s, with fastai_tl.all {s['fastai_tl']:.2f} s (medians of {s['rounds']} rounds)"
    )
    print(f"ratio {s['ratio']:.2f} (range {s['ratio_min']:.2f} to {s['ratio_max']:.2f}; at most 1.30 is wanted)")
    if args.json:
        args.json.write_text(json.dumps(s, indent=2) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
