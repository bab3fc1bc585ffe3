#!/usr/bin/env python
"""Time of `from fastai_tl.all import *` against `from fastai.text.all import *`.

Each import runs in a process of its own, the two in turn, so that a busy machine slows both alike; the first round
only warms the disk cache and is not counted.

    python benchmarks/import_time/run.py [--rounds 5] [--json FILE]"""

import platform
import statistics as st
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import interleave, parser, ratio, write_json

STATEMENTS = {
    'fastai': 'from fastai.text.all import *',
    'fastai_tl': 'from fastai.text.all import *; from fastai_tl.all import *',
}
TIMED = 'import time; t=time.perf_counter(); exec({!r}); print("seconds", time.perf_counter()-t)'


def fresh(statement):
    "The time of `statement` in a fresh process, measured inside it, so without the start of Python"
    command = [sys.executable, '-W', 'ignore', '-c', TIMED.format(statement)]
    out = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(out.stdout.split()[-1])


def summary(times):
    "Medians, and the ratio with its range over the rounds"
    r = ratio(times['fastai_tl'], times['fastai'])
    return dict(
        rounds=len(times['fastai']),
        fastai=st.median(times['fastai']),
        fastai_tl=st.median(times['fastai_tl']),
        ratio=r['ratio'],
        ratio_min=r['low'],
        ratio_max=r['high'],
        python=platform.python_version(),
        versions={o: version(o) for o in ('fastai', 'torch')},
        seconds=[dict(zip(times, o)) for o in zip(*times.values())],
    )


def main():
    p = parser(__doc__, 'rounds', 'json')
    a = p.parse_args()
    if a.rounds < 1:
        p.error('--rounds must be at least 1')
    s = summary(interleave({k: (lambda v=v: fresh(v)) for k, v in STATEMENTS.items()}, a.rounds))
    print(f"fastai.text.all {s['fastai']:.2f} s, with fastai_tl.all {s['fastai_tl']:.2f} s", end=' ')
    print(f"(medians of {s['rounds']} rounds)")
    print(f"ratio {s['ratio']:.2f} (range {s['ratio_min']:.2f} to {s['ratio_max']:.2f}; at most 1.30 is wanted)")
    write_json(a.json, s, indent=2)


if __name__ == '__main__':
    main()
