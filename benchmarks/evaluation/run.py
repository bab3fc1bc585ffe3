#!/usr/bin/env python
"""What a confusion matrix, the worst rows and a report cost: fastai's ClassificationInterpretation beside `learn.evaluate()`.

One Learner, one validation set, the two in turn; the first round warms up and is not counted. A pass is one reading of all validation
rows by the model, counted in rows, so that the few rows that are read again to be shown count as what they are.

    python benchmarks/evaluation/run.py [--rows 3000] [--rounds 5] [--json FILE]"""

import argparse, contextlib, io, json, statistics as st, time
from importlib.metadata import version
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from fastai.text.all import *
from fastai.interpret import ClassificationInterpretation
from fastai_tl.all import *


class CountRows(Callback):
    "How many rows the model has read"

    rows = 0

    def before_batch(self):
        self.rows += len(self.xb[0])


def make_learner(rows):
    "An AWD_LSTM classifier of docstrings; it need not be trained to be timed"
    df = docstring_corpus()
    df = df.sample(rows + 500, random_state=0)
    tt = tokenize_texts_once([t[:600] for t in df.text], progress=False)
    labels = list(df.label)
    seed_everything(0)
    dls = classifier_dls(
        tt, labels, 'classification', list(range(500)), list(range(500, len(df))), texts_vocab(tt), bs=32
    )
    return awd_classifier_learner(dls, 'classification', len(dls.vocab[1]), dict(emb_sz=128, n_hid=256, n_layers=2))


def theirs(learn):
    interp = ClassificationInterpretation.from_learner(learn)
    interp.plot_confusion_matrix()
    plt.close('all')
    interp.top_losses(10)
    interp.print_classification_report()


def ours(learn):
    ev = learn.evaluate()
    ev.plot_confusion()
    ev.top_losses(10)
    print(ev.report())


def measure(learn, rounds):
    "Seconds and rows of each way, round by round"
    res, n = {'fastai': [], 'fastai_tl': []}, len(learn.dls.valid_ds)
    ways = {'fastai': theirs, 'fastai_tl': ours}
    for r in range(rounds + 1):
        for name in list(ways)[:: 1 if r % 2 else -1]:
            cb = CountRows()
            learn.add_cb(cb)
            with learn.no_bar(), contextlib.redirect_stdout(io.StringIO()):
                t0 = time.perf_counter()
                ways[name](learn)
                seconds = time.perf_counter() - t0
            learn.remove_cb(cb)
            if r:
                res[name].append(dict(seconds=seconds, passes=cb.rows / n))
    return res


def main():
    p = argparse.ArgumentParser(description='Compare evaluations of one Learner.')
    p.add_argument('--rows', type=int, default=3000, help='validation rows')
    p.add_argument('--rounds', type=int, default=5, help='counted rounds')
    p.add_argument('--json', type=Path, help='also write the figures to this file')
    args = p.parse_args()
    res = measure(make_learner(args.rows), args.rounds)
    ratios = [a['seconds'] / b['seconds'] for a, b in zip(res['fastai'], res['fastai_tl'])]
    for k, v in res.items():
        print(f"{k}: {v[0]['passes']:.2f} passes, {st.median(o['seconds'] for o in v):.2f} s (median of {args.rounds})")
    print(f'fastai takes {st.median(ratios):.2f} times as long (range {min(ratios):.2f} to {max(ratios):.2f})')
    if args.json:
        args.json.write_text(
            json.dumps(dict(res, ratios=ratios, versions={o: version(o) for o in ('fastai', 'torch')}), indent=2)
            + '\n',
            encoding='utf-8',
        )


if __name__ == '__main__':
    main()
