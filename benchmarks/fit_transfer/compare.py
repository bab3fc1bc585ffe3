"""Our ways against the tuned Trainer, from the runs of run.py and the rows that it keeps: results/summary.csv.

    python benchmarks/fit_transfer/compare.py --out FOLDER

The Trainer is tuned for each seed: the rate with the lowest loss on 200 further labelled rows. Differences are paired
by seed and by test row; intervals (95 %) are of 2,000 samples in which seeds and rows are drawn again. That of the
calibration error has 300."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import parser, table

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / 'recipes'))

import numpy as np
import pandas as pd
from sets import JUDGE
from tables import interval, samples

# the ways of run.py -> what they are
OURS = {'fit_transfer, not calibrated': 'fit_transfer(calibrate=False)', 'fit_transfer': 'fit_transfer()'}


def rows_of(folder, run):
    "Whether each test row is wrong, its loss, and the log-probabilities"
    stored = np.load(folder / f'{run["set"]} {run["way"]} {run["seed"]}.npz')
    logp, truth = stored['logp'].astype(float), stored['truth']
    return logp.argmax(1) != truth, -logp[np.arange(len(truth)), truth], logp, truth


def ece_of_samples(logp, truth, weights):
    "Expected calibration error of each sample of the rows, 15 bins of equal width"
    confidence, right = np.exp(logp.max(1)), logp.argmax(1) == truth
    bins = np.clip(np.ceil(confidence * 15).astype(int) - 1, 0, 14)
    gaps = [np.abs(weights[:, bins == b] @ (right - confidence)[bins == b]) for b in range(15)]
    return np.sum(gaps, 0) / weights.sum(1)


def drawn(folder, runs, n=2000, n_ece=300):
    "Error in %, loss and calibration error of bootstrap samples, (samples, seeds) each"
    parts = [rows_of(folder, run) for run in runs]
    w = samples(len(parts[0][0]), n)
    mean = lambda v: np.stack([w @ o.astype(np.float32) for o in v], 1) / len(parts[0][0])
    wrong, losses, *_ = zip(*parts)
    ece = np.stack([ece_of_samples(logp, truth, w[:n_ece]) for *_, logp, truth in parts], 1)
    return 100 * mean(wrong), mean(losses), ece


def tuned(runs):
    "For each seed the Trainer's run with the lowest loss on the rows to tune on"
    best = {}
    for run in runs:
        if run['way'].startswith('Trainer'):
            best[run['seed']] = min(best.get(run['seed'], run), run, key=lambda r: r['dev_nll'])
    return best


def compared(name, runs, folder):
    "The lines of a set"
    theirs = tuned(runs)
    lines = []
    for way, label in OURS.items():
        ours = {r['seed']: r for r in runs if r['way'] == way}
        seeds = sorted(set(ours) & set(theirs))
        if not seeds:
            continue
        mine, other = [ours[s] for s in seeds], [theirs[s] for s in seeds]
        mean = lambda rs, key: float(np.mean([r[key] for r in rs]))
        row = dict(set=name, way=label, seeds=len(seeds), n_test=mine[0]['n_test'])
        for key, a, b in zip(('error', 'nll', 'ece'), drawn(folder, mine), drawn(folder, other)):
            low, high = interval(a - b)
            of = f'test_{key}'
            row |= {key: mean(mine, of), f'trainer_{key}': mean(other, of)}
            row |= {f'{key}_difference': mean(mine, of) - mean(other, of), f'{key}_low': low, f'{key}_high': high}
        row['trainer_rates'] = ' '.join(r['way'].split()[1] for r in other)
        row['temperatures'] = ' '.join(f'{r["temperature"]:.2f}' for r in mine if r.get('temperature'))
        lines.append(row)
    return lines


def shown(r, key, digits):
    return f'{r[key + "_difference"]:+.{digits}f} ({r[key + "_low"]:+.{digits}f} to {r[key + "_high"]:+.{digits}f})'


def main():
    ap = parser(__doc__)
    ap.add_argument('--jsonl', type=Path, default=HERE / 'results' / 'judged.jsonl')
    ap.add_argument('--out', type=Path, default=Path('fit_transfer_rows'), help='folder of the rows that run.py keeps')
    a = ap.parse_args()
    runs = [json.loads(line) for line in a.jsonl.read_text().splitlines()]
    lines = [row for name in JUDGE for row in compared(name, [r for r in runs if r['set'] == name], a.out)]
    df = pd.DataFrame(lines)
    df.to_csv(HERE / 'results' / 'summary.csv', index=False, float_format='%.5g')
    columns = ['set', 'way', 'error %:', 'minus tuned Trainer (95 %):', 'NLL:', 'minus tuned Trainer (95 %):', 'ECE:',
               'minus tuned Trainer (95 %):', 'seeds:']
    print(table(columns, [[r['set'], f'`{r["way"]}`', f'{r["error"]:.1f}', shown(r, 'error', 1), f'{r["nll"]:.3f}',
                           shown(r, 'nll', 3), f'{r["ece"]:.3f}', shown(r, 'ece', 3), r['seeds']] for r in lines]))


if __name__ == '__main__':
    main()
