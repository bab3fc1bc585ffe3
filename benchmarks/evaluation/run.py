#!/usr/bin/env python
"""Time of a confusion matrix, the worst rows and a report: fastai's ClassificationInterpretation against
`learn.evaluate()`.

One Learner, one validation set, the two in turn; the first round warms up and is not counted. A pass is one
reading of all validation rows by the model. Passes are counted in rows, so that rows that are read again to be
shown count as well.

    python benchmarks/evaluation/run.py [--rows 3000] [--rounds 5] [--json FILE]"""

import contextlib
import io
import statistics as st
import sys
from importlib.metadata import version
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from fastai.text.all import *
from fastai.interpret import ClassificationInterpretation
from fastai_tl.all import *

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common


class CountRows(Callback):
    "How many rows the model has read"

    rows = 0

    def before_batch(self):
        self.rows += len(self.xb[0])


def make_learner(rows):
    "An AWD_LSTM classifier of docstrings; it need not be trained to be timed"
    df = docstring_corpus().sample(rows + 500, random_state=0)
    tt = tokenize_texts_once([t[:600] for t in df.text], progress=False)
    labels = list(df.label)
    seed_everything(0)
    train, valid = list(range(500)), list(range(500, len(df)))
    dls = classifier_dls(tt, labels, 'classification', train, valid, texts_vocab(tt), bs=32)
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
    n = len(learn.dls.valid_ds)
    passes = {}

    def counted(name, way):
        "A function that runs one way and notes how often it read the validation set"

        def run():
            cb = CountRows()
            learn.add_cb(cb)
            with learn.no_bar(), contextlib.redirect_stdout(io.StringIO()):
                took = common.seconds(lambda: way(learn))
            learn.remove_cb(cb)
            passes[name] = cb.rows / n
            return took

        return run

    ways = {name: counted(name, way) for name, way in dict(fastai=theirs, fastai_tl=ours).items()}
    times = common.interleave(ways, rounds)
    return {name: [dict(seconds=t, passes=passes[name]) for t in v] for name, v in times.items()}


def main():
    a = common.parser(__doc__, 'rounds', 'json')
    a.add_argument('--rows', type=int, default=3000, help='validation rows')
    a = a.parse_args()
    res = measure(make_learner(a.rows), a.rounds)
    times = {k: [o['seconds'] for o in v] for k, v in res.items()}
    for k, v in res.items():
        print(f"{k}: {v[0]['passes']:.2f} passes, {st.median(times[k]):.2f} s (median of {a.rounds})")
    r = common.ratio(times['fastai'], times['fastai_tl'])
    print(f"fastai takes {r['ratio']:.2f} times as long (range {r['low']:.2f} to {r['high']:.2f})")
    ratios = [x / y for x, y in zip(times['fastai'], times['fastai_tl'])]
    versions = {o: version(o) for o in ('fastai', 'torch')}
    common.write_json(a.json, dict(res, ratios=ratios, versions=versions), indent=2)


if __name__ == '__main__':
    main()
