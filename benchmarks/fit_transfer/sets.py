"""The sets of benchmarks/fit_transfer: which choose and which judge. Written before the first run on each.

Each is made from texts that differ in length, number, classes, balance and noise. Those to choose by have rows, and
where possible sources, that those to judge by have not: first words of reviews against last words and single
sentences, roles of docstrings against libraries, TREC-6's training questions against its test questions."""

import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'recipes'))
from task import Data

# source, training rows, epochs, share of wrong training labels, share of the last class among all rows
CHOOSE = {
    'first words 500': ('first words', 500, 3, 0, None),
    'TREC-6 300': ('TREC-6 training', 300, 5, 0, None),
    'roles 500': ('roles', 500, 3, 0, None),
    'first words 500, 10 % wrong': ('first words', 500, 3, 0.1, None),
    'first words 100': ('first words', 100, 10, 0, None),
    'halves 1,000': ('halves', 1000, 3, 0, None),
    'sentiment 500': ('sentiment', 500, 3, 0, None),
}
JUDGE = {
    'last words 500': ('last words', 500, 3, 0, None),
    'libraries 500': ('libraries', 500, 3, 0, None),
    'TREC-6 1,000': ('TREC-6', 1000, 3, 0, None),
    'sentences 500, 10 % wrong': ('sentences', 500, 3, 0.1, None),
    'last words 500, 20 % positive': ('last words', 500, 3, 0, 0.2),
    'sentences 1,000': ('sentences', 1000, 3, 0, None),
    'last words 100': ('last words', 100, 10, 0, None),
    'TREC-50 1,000': ('TREC-50', 1000, 5, 0, None),
    'reviews 500': ('reviews', 500, 3, 0, None),
    'hotel 500': ('hotel', 500, 3, 0, None),
    'shopping 1,000': ('shopping', 1000, 3, 0, None),
    'pairs 1,000': ('pairs', 1000, 3, 0, None),
}
PAIRS = ('halves', 'pairs')
CHINESE = ('hotel', 'shopping', 'sentiment')  # with the multilingual encoder of the package, not MiniLM
SETS = CHOOSE | JUDGE
N_DEV, N_TEST = 200, 1000


def reviews(data, cut):
    "IMDb with each review cut by a function; reviews that it cuts to nothing are left out"
    df = pd.read_parquet(Path(data) / 'en' / 'imdb.parquet')
    df = df[df.split != 'unsup'].sample(frac=1, random_state=0).groupby('split').head(8000)
    df = df.assign(text=df.text.map(cut))[['text', 'label', 'split']]
    return df[df.text != '']


def some_sentence(text):
    "One sentence of 8 to 30 words, at a place that depends on the length of the text alone"
    found = [s for s in re.split(r'(?<=[.!?])\s+', text.replace('<br />', ' ')) if 8 <= len(s.split()) <= 30]
    return found[len(text) % len(found)] if found else ''


def docstrings(label):
    from fastai_tl.datasets.corpora import docstring_corpus

    df = docstring_corpus().sample(frac=1, random_state=0)
    return df.assign(label=df[label])[['text', 'label', 'split']]


def chinese(name, data):
    "Hotel reviews, positive or negative; shopping reviews with ten categories, or others, positive or negative"
    folder = Path(data) / 'zh_tw'
    if name == 'hotel':
        df = pd.read_csv(folder / 'hotel_reviews.csv').sample(frac=1, random_state=0)
        return df[df.split == 'train'], df[df.split == 'test']
    df = pd.read_parquet(folder / 'shopping_reviews.parquet').sample(frac=1, random_state=0)
    df = df.drop_duplicates('text')
    if name == 'sentiment':
        return df[40000:], df[38000:40000]
    df = df.assign(label=df.category)
    return df[2000:], df[:2000]


def same_or_other(df, by):
    "Pairs with the text `other` of the same row and, in every second row, of another row with the same values of `by`"
    is_same = np.arange(len(df)) % 2 == 0
    moved = df.groupby(by).other.transform(lambda o: np.roll(o, 1))
    return df.assign(other=np.where(is_same, df.other, moved), label=np.where(is_same, 'same', 'other'))


def pairs():
    "The first sentence of a function's documentation beside another part of it, or of another function's"
    from fastai_tl.datasets.corpora import docstring_corpus

    df = docstring_corpus()
    first = df[df.role == 'summary'].drop_duplicates('source')[['source', 'text', 'split', 'library']]
    other = df[df.role != 'summary'].sample(frac=1, random_state=0).drop_duplicates('source')[['source', 'text']]
    df = first.merge(other.rename(columns=dict(text='other')), on='source').sample(frac=1, random_state=0)
    df = same_or_other(df, ['split', 'library'])
    return df[df.split == 'train'], df[df.split == 'test']


def halves(data):
    "20 words of a review beside the next 20 of the same, or of another with the same label"
    df = reviews(data, lambda t: ' '.join(t.replace('<br />', ' ').split()[:40]))
    df = df[df.text.str.split().str.len() == 40].sample(frac=1, random_state=1)
    first, other = (df.text.map(lambda t, part=part: ' '.join(t.split()[part])) for part in (slice(20), slice(20, 40)))
    df = same_or_other(df.assign(text=first, other=other), ['split', 'label'])
    df = df[df.split == 'train']
    return df[:-1000], df[-1000:]


def source(name, data):
    "Training pool and test rows of a source"
    if name in CHINESE:
        return chinese(name, data)
    if name in PAIRS:
        return pairs() if name == 'pairs' else halves(data)
    if name.startswith('TREC'):
        df = pd.read_csv(Path(data) / 'en' / 'trec6.csv').sample(frac=1, random_state=0)
        df = df.assign(label=df.fine_label) if name == 'TREC-50' else df
        if name in ('TREC-6', 'TREC-50'):
            return df[df.split == 'train'][1000:], df[df.split == 'test']
        return df[df.split == 'train'][1000:], df[df.split == 'train'][:1000]
    if name in ('roles', 'libraries'):
        df = docstrings(dict(roles='role', libraries='library')[name])
        return df[df.split == 'train'], df[df.split == ('valid' if name == 'roles' else 'test')]
    cuts = {
        'first words': lambda t: ' '.join(t.split()[:20]),
        'last words': lambda t: ' '.join(t.split()[-20:]),
        'sentences': some_sentence,
        'reviews': lambda t: t.replace('<br />', ' '),
    }
    df = reviews(data, cuts[name])
    pool, test = df[df.split == 'train'], df[df.split == 'test']
    # the reviews of a row of another source of the same task differ as well
    half = 0 if name == 'first words' else 1
    return pool, test[half::2]


def model_of(name):
    "The folder of the model for a set; `None`: MiniLM"
    if SETS[name][0] not in CHINESE:
        return None
    from fastai_tl.all import multilingual_encoder

    return str(multilingual_encoder())


def with_share(df, share):
    "Rows of the last of two classes left out until it has this share"
    if share is None:
        return df
    first, last = sorted(set(df.label))
    rare, other = df[df.label == last], df[df.label == first]
    rare = rare[: round(share / (1 - share) * len(other))]
    return pd.concat([rare, other]).sample(frac=1, random_state=0)


def with_wrong_labels(df, share, seed):
    "A share of the labels replaced by other classes"
    rng = np.random.default_rng(seed)
    classes = sorted(set(df.label))
    labels = list(df.label)
    for i in rng.permutation(len(labels))[: round(share * len(labels))]:
        labels[i] = rng.choice([c for c in classes if c != labels[i]])
    return df.assign(label=labels)


class SetData(Data):
    "One set and one seed, with the interface of `Data` of benchmarks/recipes; further rows have wrong labels as well"

    task, sources = 'classification', {}

    def __init__(self, name, seed, a):
        self.name, self.split = name, 'valid' if name in CHOOSE else 'test'
        kind, size, self.epochs, wrong, share = SETS[name]
        self.text_col = ['text', 'other'] if kind in PAIRS else 'text'
        if kind not in self.sources:
            self.sources[kind] = source(kind, a.data)
        pool, test = (with_share(df, share) for df in self.sources[kind])
        pool = pool.sample(frac=1, random_state=seed)
        self.train, self.dev = (with_wrong_labels(df, wrong, seed) for df in (pool[:size], pool[size : size + N_DEV]))
        self.test = test[:N_TEST]
        self.classes = sorted(set(pool.label))
        self.prepare()

    def prepare(self):
        from task import minilm
        from transformers import AutoTokenizer

        self.tok = AutoTokenizer.from_pretrained(minilm())
        encode = self.encode if self.text_col == 'text' else self.encode_pairs
        self.rows = [encode(p) for p in (self.train, self.dev, self.test)]

    def encode_pairs(self, df):
        "Tokens, types and labels of each row"
        enc = self.tok(list(df.text), list(df.other), truncation=True, max_length=128)
        names = ('input_ids', 'attention_mask', 'token_type_ids')
        labels = [self.classes.index(label) for label in df.label]
        return [dict({k: enc[k][i] for k in names}, labels=label) for i, label in enumerate(labels)]
