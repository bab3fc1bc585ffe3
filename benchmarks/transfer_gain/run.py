"""What each stage of ULMFiT is worth, on TREC-6 (question classification, its own test split).

    python benchmarks/transfer_gain/run.py --data FOLDER --out FOLDER

`--data` holds en/trec6.csv (text, label, split) and en/general_corpus.parquet (text). Stage 1 is trained once for
each direction; stages 2 and 3 for each seed. Run the command again after an interruption: it continues where it
stopped. Prints a Markdown table and writes results.json.

All ways have the same model, the same epochs of stage 3 and the same four candidates: two rates, with and without
gradual unfreezing. Each takes the candidate with the lowest validation loss with the first seed (on a tenth of the
training questions); no decision uses the test questions."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common

CONFIG = dict(emb_sz=128, n_hid=256, n_layers=2)
WAYS = ('scratch', 'stage 2', 'stages 1+2')


def parse():
    ap = common.parser(__doc__, 'data', 'seeds', 'threads')
    ap.add_argument('--out', default='transfer_gain')
    ap.add_argument('--config', type=json.loads, default=CONFIG, help='sizes of the model as JSON')
    ap.add_argument('--max-vocab', type=int, default=10_000)
    ap.add_argument('--general-epochs', type=int, default=2)
    ap.add_argument('--domain-epochs', type=int, default=4)
    epochs = 'epochs of the four stages of unfreezing as JSON'
    ap.add_argument('--epochs', type=json.loads, default=[1, 1, 1, 3], help=epochs)
    rates = 'candidate rates of the last stage as JSON; those before it are 3, 2 and 1.5 times as high'
    ap.add_argument('--rates', type=json.loads, default=[3e-3, 1e-2], help=rates)
    return ap.parse_args()


class Runs:
    "The training runs of ULMFiT below --out: each is trained once"

    def __init__(self, a):
        from fastai_tl.all import ULMFiT

        self.a, self.out = a, Path(a.out)
        self.size = dict(config=a.config, max_vocab=a.max_vocab, progress=False)
        df = pd.read_csv(Path(a.data) / 'en' / 'trec6.csv')
        self.train, self.test = (df[df.split == s].reset_index(drop=True) for s in ('train', 'test'))
        held = np.random.default_rng(0).permutation(len(self.train))[: len(self.train) // 10]
        self.train['split'] = np.where(np.isin(np.arange(len(self.train)), held), 'valid', 'train')
        self.general = ULMFiT(self.out / 'general', bidirectional=True, **self.size)
        corpus = pd.read_parquet(Path(a.data) / 'en' / 'general_corpus.parquet')
        self.general.pretrain(corpus, epochs=a.general_epochs, lr=5e-3, drop_mult=0.3)

    def adapted(self, seed, way, direction='forward'):
        "A run whose language model has been adapted to the questions, unless `way` is from scratch"
        from fastai_tl.all import ULMFiT

        u = ULMFiT(self.out / f'seed{seed}' / way, seed=seed, min_freq=1, **self.size)
        if direction == 'backward':
            u.directions = ('backward',)
        if way != 'scratch':
            start = self.general.encoder('general', direction) if way == 'stages 1+2' else None
            lr = 4e-3 if start else 1e-2
            u.finetune_lm(self.train, encoder=start, epochs=self.a.domain_epochs, lr=lr, drop_mult=0.5, bs=32)
        return u

    def classifier(self, u, way, lr, gradual):
        "Stage 3 of a run, with or without gradual unfreezing"
        if gradual:
            plan = dict(epochs=self.a.epochs, lrs=[3 * lr, 2 * lr, 1.5 * lr, lr])
        else:
            plan = dict(epochs=[sum(self.a.epochs)], groups=[4], lr=lr)
        encoder = None if way == 'scratch' else 'domain'
        name = f'classifier-{lr:g}-{"gradual" if gradual else "all"}'
        options = dict(spread=4.0, drop_mult=0.4, bs=32, name=name)
        return u.classifier(self.train, valid_col='split', encoder=encoder, **options, **plan)

    def choose(self, way):
        "The rate and the kind of unfreezing with the lowest validation loss with the first seed"
        u = self.adapted(0, way)
        loss = {}
        for candidate in [(lr, gradual) for lr in self.a.rates for gradual in (True, False)]:
            learn = self.classifier(u, way, *candidate)
            with learn.no_bar():
                loss[candidate] = learn.validate()[0]
        chosen = min(loss, key=loss.get)
        print(f'{way}: validation loss by (rate, gradual) {loss} -> {chosen}', flush=True)
        return chosen

    def predict(self, seed, way, chosen, direction='forward'):
        "Probabilities of the test questions, and the classes"
        from fastai_tl.all import text_items

        u = self.adapted(seed, way, direction)
        learn = self.classifier(u, way, *chosen)
        with learn.no_bar():
            p, _ = learn.get_preds(dl=learn.dls.test_dl(text_items(u.tokenize(list(self.test.text)))))
        return p.numpy(), list(learn.dls.vocab[1])


def main(a):
    common.set_threads(a.threads)
    begin = time.time()
    runs = Runs(a)
    chosen = {way: runs.choose(way) for way in WAYS}
    rows, wrong = [], {}
    for seed in range(a.seeds):
        probs = {}
        for way in WAYS:
            probs[way], vocab = runs.predict(seed, way, chosen[way])
        back, _ = runs.predict(seed, 'stages 1+2', chosen['stages 1+2'], 'backward')
        probs['backward, stages 1+2'] = back
        probs['both directions'] = (back + probs['stages 1+2']) / 2
        y = np.array([vocab.index(label) for label in runs.test.label])
        for way, p in probs.items():
            wrong.setdefault(way, []).append(p.argmax(1) != y)
            nll = float(-np.log(p[range(len(y)), y] + 1e-12).mean())
            rows.append(dict(seed=seed, way=way, error=float(wrong[way][-1].mean()), nll=nll))
        print(pd.DataFrame(rows).query('seed==@seed').to_string(), flush=True)
    nll = pd.DataFrame(rows).groupby('way').nll.mean()
    wrong = {w: np.stack(v) for w, v in wrong.items()}
    none = 0, 0, 0
    gains = {w: none if w == 'scratch' else gain(wrong['scratch'], o) for w, o in wrong.items()}
    table = [(w, *summary(o), nll[w], *gains[w]) for w, o in wrong.items()]
    lines = []
    for w, mean, sd, loss, points, low, high in table:
        against = '' if w == 'scratch' else f'{points:.1f} ({low:.1f} to {high:.1f})'
        lines.append([w, f'{mean:.1f} ± {sd:.1f}', f'{loss:.3f}', against])
    title = f'TREC-6, {a.seeds} seeds, {len(runs.test)} questions'
    columns = [title, 'error % (mean ± sd)', 'NLL', 'points below scratch (95 % interval)']
    print('\n' + common.table(columns, lines))
    chosen = {k: list(v) for k, v in chosen.items()}
    figures = dict(args=vars(a), chosen=chosen, rows=rows, table=table, seconds=time.time() - begin)
    common.write_json(runs.out / 'results.json', figures)


def summary(wrong):
    "Mean error and its standard deviation over the seeds, in percent"
    return 100 * wrong.mean(), 100 * wrong.mean(1).std(ddof=1)


def gain(base, other, n=10_000):
    "Difference of errors in points with a 95 % interval, paired: seeds and questions are drawn together for both"
    rng, d = np.random.default_rng(0), base.astype(float) - other
    s, q = d.shape
    draws = [d[rng.integers(0, s, s)][:, rng.integers(0, q, q)].mean() for _ in range(n)]
    return 100 * d.mean(), *(100 * np.percentile(draws, [2.5, 97.5]))


if __name__ == '__main__':
    main(parse())
