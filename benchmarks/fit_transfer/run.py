"""`fit_transfer` against the tuned Trainer on sets of short texts: error, NLL, calibration and processor time.

    pip install "fastai_tl[minilm]" accelerate
    python benchmarks/fit_transfer/run.py --data FOLDER --sets choose    # the ways that were tried, on the sets to choose by
    python benchmarks/fit_transfer/run.py --data FOLDER --sets judge     # what was chosen, on the other sets
    python benchmarks/fit_transfer/run.py --summary

sets.py holds the sets; they were fixed before the first run. MiniLM, batches of 16, the same rows, tokens and epochs for
all ways. The seed draws the training rows, the head and the order. For each seed the Trainer's rate is tuned by the
NLL of 200 further rows, which ours do not see.

Each run is a line of results/runs.jsonl as soon as it ends; runs that are there are skipped. --out keeps the
log-probabilities of each test row, for the intervals. Seconds are processor seconds of the training with all that
`fit_transfer` does for its choice, on one thread."""

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import load_benchmark, machine, parser, set_threads

HERE = Path(__file__).resolve().parent
from sets import CHOOSE, JUDGE, SetData
from ways import WAYS

import numpy as np
from task import predict, scores

RATES = (5e-5, 1e-4, 2e-4)


def with_trainer(d, rate, seed, a):
    "The model that the Trainer of benchmarks/recipes makes, and its clock"
    a.epochs = d.epochs
    model, clock, _ = load_benchmark('recipes').with_trainer(d, rate, seed, a)
    return model, clock, {}


def one_run(name, way, seed, a):
    "Train and test one way; append its line"
    d = SetData(name, seed, a)
    if way.startswith('Trainer'):
        model, clock, more = with_trainer(d, float(way.split()[1]), seed, a)
    else:
        model, clock, more = WAYS[way](d, seed, a)
    row = {'set': name, 'way': way, 'seed': seed, 'split': d.split}
    logp = [np.stack(predict(model, d.rows[i], d.tok, d.task)) for i in (1, 2)]
    for part, rows, p in zip(('dev_', ''), d.rows[1:], logp):
        found, _ = scores(list(p), rows, d.classes, d.task)
        row |= {part + k: float(f'{found[k]:.5g}') for k in ('error', 'nll', 'ece')}
    row |= dict(cpu_seconds=round(clock.cpu, 2), seconds=round(clock.seconds, 2), loadavg=os.getloadavg()[0], **more)
    a.out.mkdir(parents=True, exist_ok=True)
    truth = np.array([r['labels'] for r in d.rows[2]])
    np.savez_compressed(a.out / f'{name} {way} {seed}.npz', logp=logp[1].astype(np.float32), truth=truth)
    with a.jsonl.open('a') as f:
        f.write(json.dumps(row) + '\n')
    shown = ('set', 'way', 'seed', 'error', 'nll', 'ece', 'dev_nll', 'cpu_seconds', 'seconds')
    print(time.strftime('%H:%M:%S'), *(row[k] for k in shown), more, flush=True)


def finished(file):
    "The runs that have a line"
    if not file.exists():
        return set()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return {(r['set'], r['way'], r['seed']) for r in lines}


def main(a):
    set_threads(1)
    a.bs = 16
    ways = [w.strip() for w in a.ways.split(';')]
    ways = [f'Trainer {r:g}' for w in ways if w == 'Trainer' for r in RATES] + [w for w in ways if w != 'Trainer']
    chosen = {'choose': CHOOSE, 'judge': JUDGE}.get(a.sets) or [s.strip() for s in a.sets.split(';')]
    for seed in a.seed:
        for name in chosen:
            for way in ways:
                if (name, way, seed) in finished(a.jsonl):
                    continue
                if a.until and time.strftime('%H:%M') >= a.until:
                    return print('time is up', flush=True)
                one_run(name, way, seed, a)


def parse():
    ap = parser(__doc__, 'data')
    ap.add_argument('--sets', default='choose', help='`choose`, `judge`, or names, separated by `;`')
    ap.add_argument('--ways', default='Trainer; now', help='separated by `;`')
    ap.add_argument('--seed', type=int, nargs='*', default=[1, 2, 3])
    ap.add_argument('--jsonl', type=Path, default=HERE / 'results' / 'runs.jsonl')
    ap.add_argument('--out', type=Path, default=Path('fit_transfer_rows'))
    ap.add_argument('--until', help='HH:MM after which no run begins')
    ap.add_argument('--summary', action='store_true')
    return ap.parse_args()


if __name__ == '__main__':
    main(parse())
