"""What each stage of ULMFiT is worth, on TREC-6 (question classification, its own test split).

    python benchmarks/transfer_gain/run.py --data FOLDER --out FOLDER

`--data` holds en/trec6.csv (text, label, split) and en/general_corpus.parquet (text). Stage 1 is trained once for each direction; stages 2 and 3 for
each seed. Everything is resumable: run the command again after an interruption. It prints a Markdown table and writes results.json.

Each way of training has the same model, the same epochs of stage 3 and the same four candidates: two rates, with and without gradual unfreezing. It gets
the one with the lowest validation loss with the first seed (a tenth of the training questions); the test questions decide nothing."""

import argparse, json, os, time
from pathlib import Path

import numpy as np
import pandas as pd

CONFIG = dict(emb_sz=128, n_hid=256, n_layers=2)


def parse():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--data', default=os.environ.get('FASTAI_TL_DATA', '../shared/data'))
    ap.add_argument('--out', default='transfer_gain')
    ap.add_argument('--seeds', type=int, default=3)
    ap.add_argument('--config', type=json.loads, default=CONFIG, help='sizes of the model as JSON')
    ap.add_argument('--max-vocab', type=int, default=10_000)
    ap.add_argument('--general-epochs', type=int, default=2)
    ap.add_argument('--domain-epochs', type=int, default=4)
    ap.add_argument(
        '--epochs', type=json.loads, default=[1, 1, 1, 3], help='epochs of the four stages of unfreezing as JSON'
    )
    ap.add_argument(
        '--rates',
        type=json.loads,
        default=[3e-3, 1e-2],
        help='candidate rates of the last stage as JSON; those before it are 3, 2 and 1.5 times as high',
    )
    ap.add_argument('--threads', type=int, default=None)
    return ap.parse_args()


def main(a):
    import torch
    from fastai_tl.all import ULMFiT, text_items

    if a.threads:
        torch.set_num_threads(a.threads)
    out, data = Path(a.out), Path(a.data)
    df = pd.read_csv(data / 'en' / 'trec6.csv')
    train, test = df[df.split == 'train'].reset_index(drop=True), df[df.split == 'test'].reset_index(drop=True)
    held = np.random.default_rng(0).permutation(len(train))[: len(train) // 10]
    train['split'] = np.where(np.isin(np.arange(len(train)), held), 'valid', 'train')
    general = pd.read_parquet(data / 'en' / 'general_corpus.parquet')
    size = dict(config=a.config, max_vocab=a.max_vocab, progress=False)

    one = ULMFiT(out / 'general', bidirectional=True, **size)
    one.pretrain(general, epochs=a.general_epochs, lr=5e-3, drop_mult=0.3)

    def run(seed, way, direction='forward'):
        u = ULMFiT(out / f'seed{seed}' / way, seed=seed, min_freq=1, **size)
        if direction == 'backward':
            u.directions = ('backward',)
        if way != 'scratch':
            start = one.encoder('general', direction) if way == 'stages 1+2' else None
            u.finetune_lm(
                train, encoder=start, epochs=a.domain_epochs, lr=4e-3 if start else 1e-2, drop_mult=0.5, bs=32
            )
        return u

    def fit(u, way, lr, gradual):
        kw = (
            dict(epochs=a.epochs, lrs=[3 * lr, 2 * lr, 1.5 * lr, lr])
            if gradual
            else dict(epochs=[sum(a.epochs)], groups=[4], lr=lr)
        )
        return u.classifier(
            train,
            valid_col='split',
            encoder=None if way == 'scratch' else 'domain',
            spread=4.0,
            drop_mult=0.4,
            bs=32,
            name=f'classifier-{lr:g}-{"gradual" if gradual else "all"}',
            **kw,
        )

    def predict(learn, u):
        with learn.no_bar():
            p, _ = learn.get_preds(dl=learn.dls.test_dl(text_items(u.tokenize(list(test.text)))))
        return p.numpy(), list(learn.dls.vocab[1])

    ways, chosen, rows, probs, t0 = ['scratch', 'stage 2', 'stages 1+2'], {}, [], {}, time.time()
    for way in ways:  # rates, by validation loss with the first seed
        u, cand = run(0, way), [(lr, gradual) for lr in a.rates for gradual in (True, False)]
        loss = {}
        for c in cand:
            learn = fit(u, way, *c)
            with learn.no_bar():
                loss[c] = learn.validate()[0]
        chosen[way] = min(loss, key=loss.get)
        print(f'{way}: validation loss by (rate, gradual) {loss} -> {chosen[way]}', flush=True)
    for seed in range(a.seeds):
        for way in ways:
            u = run(seed, way)
            probs[seed, way], vocab = predict(fit(u, way, *chosen[way]), u)
        u = run(seed, 'stages 1+2', 'backward')
        b, _ = predict(fit(u, 'stages 1+2', *chosen['stages 1+2']), u)
        probs[seed, 'backward, stages 1+2'] = b
        probs[seed, 'both directions'] = (b + probs[seed, 'stages 1+2']) / 2
        y = np.array([vocab.index(l) for l in test.label])
        for way in [*ways, 'backward, stages 1+2', 'both directions']:
            rows.append(
                dict(
                    seed=seed,
                    way=way,
                    error=float((probs[seed, way].argmax(1) != y).mean()),
                    nll=float(-np.log(probs[seed, way][range(len(y)), y] + 1e-12).mean()),
                )
            )
        print(pd.DataFrame(rows).query('seed==@seed').to_string(), flush=True)
    res = pd.DataFrame(rows)
    wrong = {w: np.stack([probs[s, w].argmax(1) != y for s in range(a.seeds)]) for w in res.way.unique()}
    table = [
        (
            w,
            *summary(wrong[w]),
            res[res.way == w].nll.mean(),
            *(gain(wrong['scratch'], wrong[w]) if w != 'scratch' else (0, 0, 0)),
        )
        for w in wrong
    ]
    print(
        f'\n| TREC-6, {a.seeds} seeds, {len(test)} questions | error % (mean ± sd) | NLL | points below scratch (95 % interval) |\n|---|---|---|---|'
    )
    for w, m, s, nll, g, lo, hi in table:
        print(
            f'| {w} | {m:.1f} ± {s:.1f} | {nll:.3f} | '
            + ('|' if w == 'scratch' else f'{g:.1f} ({lo:.1f} to {hi:.1f}) |')
        )
    out.joinpath('results.json').write_text(
        json.dumps(
            dict(
                args=vars(a),
                chosen={k: list(v) for k, v in chosen.items()},
                rows=rows,
                table=table,
                seconds=time.time() - t0,
            ),
            indent=1,
        )
    )


def summary(wrong):
    return 100 * wrong.mean(), 100 * wrong.mean(1).std(ddof=1)


def gain(base, other, n=10_000):
    "Difference of errors in points with a 95 % interval, paired: seeds and questions are drawn together for both"
    rng, d = np.random.default_rng(0), base.astype(float) - other
    s, q = d.shape
    draws = [d[rng.integers(0, s, s)][:, rng.integers(0, q, q)].mean() for _ in range(n)]
    return 100 * d.mean(), *(100 * np.percentile(draws, [2.5, 97.5]))


if __name__ == '__main__':
    main(parse())
