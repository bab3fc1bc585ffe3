"""`fit_transfer` against the tuned Trainer on sets of short texts: error, NLL, calibration and processor time.

    pip install "fastai_tl[minilm]" accelerate
    python benchmarks/fit_transfer/run.py --data FOLDER --sets choose    # ways, on the sets to choose by
    python benchmarks/fit_transfer/run.py --data FOLDER --sets judge     # what was chosen, on the other sets
    python benchmarks/fit_transfer/run.py --summary

sets.py has the sets, fixed before the first run on each, and ways.py the ways. MiniLM, for Chinese the multilingual
encoder (extra `multilingual`), batches of 16, the same rows, tokens and epochs for all ways. The Trainer trains in
bfloat16, as ours where the processor has it, unless `--fp32`. The seed draws the training rows, the head and the order.
The lines of the Trainer have the loss of 200 further rows, by which its rate is tuned; ours do not see them.

Each run is a line of results/runs.jsonl as soon as it ends; runs that are there are skipped. --out keeps the
log-probabilities of each test row, for the intervals. Seconds are processor seconds of the training with all that
`fit_transfer` does for its choice, on one thread."""

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import load_benchmark, parser, set_threads, table

HERE = Path(__file__).resolve().parent
from sets import CHOOSE, JUDGE, SetData, model_of
from ways import WAYS

import numpy as np
import task
from task import predict, scores

RATES = (5e-5, 1e-4, 2e-4)


def trained(d, way, seed, a):
    "The models that a way gives, with the suffix of the way, the clock, and what else is recorded"
    if not way.startswith('Trainer'):
        make, options = WAYS[way]
        return make(d, seed, a, **options)
    a.epochs = d.epochs
    model, clock, _ = load_benchmark('recipes').with_trainer(d, float(way.split()[1]), seed, a)
    return [('', model, clock, {})]


def one_run(name, way, seed, a):
    "Train and test one way; append its lines"
    task.MODEL = a.model or model_of(name)
    d = SetData(name, seed, a)
    load = os.getloadavg()[0]
    for suffix, model, clock, more in trained(d, way, seed, a):
        row = {'set': name, 'way': way + suffix, 'seed': seed, 'split': d.split, 'fp32': a.fp32}
        parts = dict(test=d.rows[2][: a.n_test])
        if way.startswith('Trainer'):
            parts = dict(dev=d.rows[1], **parts)
        for part, rows in parts.items():
            logp = predict(model, rows, d.tok, d.task)
            found, _ = scores(logp, rows, d.classes, d.task)
            row |= {f'{part}_{k}': float(f'{found[k]:.5g}') for k in ('error', 'nll', 'ece')}
        row |= dict(n_test=len(rows), cpu_seconds=round(clock.cpu, 2), seconds=round(clock.seconds, 2), loadavg=load)
        row |= more
        a.out.mkdir(parents=True, exist_ok=True)
        truth = np.array([r['labels'] for r in rows])
        np.savez_compressed(a.out / f'{name} {way}{suffix} {seed}.npz', logp=np.stack(logp), truth=truth)
        with a.jsonl.open('a') as f:
            f.write(json.dumps(row) + '\n')
        shown = ('set', 'way', 'seed', 'test_error', 'test_nll', 'test_ece', 'dev_nll', 'cpu_seconds', 'seconds')
        print(time.strftime('%H:%M:%S'), *(row.get(k, '-') for k in shown), more, flush=True)


def finished(file):
    "The runs that have a line"
    if not file.exists():
        return set()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return {(r['set'], r['way'], r['seed']) for r in lines}


def summary(file):
    "Print the mean over the seeds of each way on each set, as a Markdown table"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    found = {}
    for r in lines:
        found.setdefault((r['set'], r['way']), []).append(r)
    mean = lambda rs, key: np.mean([r[key] for r in rs])
    rows = []
    for (name, way), rs in found.items():
        figures = [f'{mean(rs, "test_error"):.1f}', *(f'{mean(rs, k):.3f}' for k in ('test_nll', 'test_ece'))]
        temperature = [f'{r["temperature"]:.2f}' for r in rs if r.get('temperature')]
        seeds = ', '.join(str(r['seed']) for r in rs)
        rows.append([name, way, *figures, ' '.join(temperature) or '–', f'{mean(rs, "cpu_seconds"):.0f}', seeds])
    columns = ['set', 'way', 'error %:', 'NLL:', 'ECE:', 'temperature:', 'processor seconds:', 'seeds:']
    print(table(columns, rows))


def main(a):
    set_threads(1)
    if a.summary:
        return summary(a.jsonl)
    a.bs, a.bf16 = 16, not a.fp32
    ways = [w.strip() for w in a.ways.split(';')]
    ways = [o for w in ways for o in ([f'Trainer {r:g}' for r in RATES] if w == 'Trainer' else [w])]
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
    ap.add_argument('--ways', default='Trainer; fit_transfer; no temperature', help='separated by `;`')
    ap.add_argument('--seed', type=int, nargs='*', default=[1, 2, 3])
    ap.add_argument('--jsonl', type=Path, default=HERE / 'results' / 'runs.jsonl')
    ap.add_argument('--out', type=Path, default=Path('fit_transfer_rows'))
    ap.add_argument('--model', help='a folder instead of MiniLM, such as that of small_model.py')
    ap.add_argument('--n-test', type=int, help='fewer rows to test')
    ap.add_argument('--until', help='HH:MM after which no run begins')
    ap.add_argument('--fp32', action='store_true', help='the Trainer in float32, for its time')
    ap.add_argument('--summary', action='store_true')
    return ap.parse_args()


if __name__ == '__main__':
    main(parse())
