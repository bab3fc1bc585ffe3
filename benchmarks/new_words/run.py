"""New words in a stream of reviews: from one week on, words that carry the label are written in another way.

    python benchmarks/new_words/run.py --data FOLDER --seed 1 2 3 --json FILE

A classifier of IMDb reviews (their first words) is in use. After weeks of ordinary reviews, the 200 words of the
training rows with the largest z-values of the log-odds, half for each class, are replaced by invented words that no
vocabulary has. The reviews of one such week are labelled, and the model is updated on them (`learn.update`), with and
without `learn.extend_vocab` before; all ways read the reviews of the weeks after that. `learn.drift` compares each week
with the validation rows. The AWD_LSTM starts from a language model of unlabelled reviews, which is kept in --out for
all seeds, as the classifiers are. Reviews come from the test half of IMDb; with `--choose`, which served to choose what
the README names, from its other half. The figures of all seeds are joined in FILE."""

import json
import random
import re
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common

common.offline()
import numpy as np
import pandas as pd

SIZES = dict(words=40, rows=2000, valid=400, before=14, week=600, after=2, replay=0.1)
WAYS = ['ordinary words', 'no update', 'update', 'extend_vocab, update']


def parse():
    ap = common.parser(__doc__, 'data', 'threads', 'json')
    ap.add_argument('--seed', type=int, nargs='+', default=[1])
    ap.add_argument('--out', default='new_words', help='folder of the language model and the classifiers')
    ap.add_argument('--n-words', type=int, default=200, help='words that are written in another way')
    ap.add_argument('--sizes', type=json.loads, default={}, help='other sizes than SIZES, as JSON')
    ap.add_argument('--options', type=json.loads, default={}, help='options of `update`, as JSON')
    ap.add_argument('--choose', action='store_true', help='rows of the training half of IMDb')
    ap.add_argument('--no-drift', action='store_true', help='leave out the weekly question for drift')
    ap.add_argument('--summary', action='store_true', help='only print the table of FILE')
    a = ap.parse_args()
    a.size = SIZES | a.sizes
    return a


# --- the stream ---


def reviews(a, split):
    "Different reviews of a split, cut to their first words, in a random order"
    df = pd.read_parquet(Path(a.data) / 'en/imdb.parquet')
    df = df[df.split == split].drop_duplicates('text').sample(frac=1, random_state=a.seed)
    text = df.text.str.replace('<br />', ' ', regex=False).str.split()
    return df.assign(text=text.str[: a.size['words']].str.join(' ')).reset_index(drop=True)[['text', 'label']]


WORD = re.compile(r"[A-Za-z]+(?:'[A-Za-z]+)*")


def words_of(text):
    return [word.lower() for word in WORD.findall(text)]


def label_words(df, n):
    "The words with the largest z-values of the log-odds between the classes, half for each class"
    counts = {label: Counter(w for text in part.text for w in words_of(text)) for label, part in df.groupby('label')}
    (a, n_a), (b, n_b) = [(counter, counter.total()) for counter in counts.values()]
    rare_enough = 0.003 * (n_a + n_b)  # without `the`, `movie` and `this`
    known = [w for w in a.keys() | b.keys() if 10 <= a[w] + b[w] <= rare_enough and len(w) > 2]

    def z(word):
        x, y = a[word] + 0.5, b[word] + 0.5
        return (np.log(x / (n_a - x)) - np.log(y / (n_b - y))) / np.sqrt(1 / x + 1 / y)

    order = sorted(known, key=lambda word: (z(word), word))
    return order[: n // 2] + order[len(order) - n // 2 :]


def invented(words, texts, seed):
    "A pronounceable new word for each word, which occurs in no text"
    rng, taken = random.Random(seed), {w for text in texts for w in words_of(text)}
    made = {}
    for word in words:
        new = word
        while new in taken:
            new = ''.join(rng.choice('bdfgklmnprstvz') + rng.choice('aeiou') for _ in range(3)) + rng.choice('klnrstx')
        taken.add(new)
        made[word] = new
    return made


def rewritten(text, new_of):
    "A text in which some words are replaced; capitals stay capitals"

    def other(match):
        word = match[0]
        new = new_of.get(word.lower(), word)
        return new.capitalize() if word[0].isupper() and new != word else new

    return WORD.sub(other, text)


def stream(a):
    "Training and validation rows, weeks before and after the shift, and the weeks after it in ordinary words"
    df, size = reviews(a, 'train' if a.choose else 'test'), a.size
    ends = np.cumsum([size['rows'], size['valid'], *[size['week']] * (size['before'] + 1 + size['after'])])
    if ends[-1] > len(df):
        raise SystemExit(f'{ends[-1]} reviews are needed, there are {len(df)}')
    train, valid, *weeks = [df.iloc[end - n : end] for end, n in zip(ends, np.diff([0, *ends]))]
    new_of = invented(label_words(train, a.n_words), df.text, a.seed)
    plain = weeks[size['before'] :]
    shifted = [week.assign(text=[rewritten(text, new_of) for text in week.text]) for week in plain]
    return train, valid, weeks[: size['before']], shifted, plain, new_of


# --- the model ---


class Model:
    "An AWD_LSTM on a language model of unlabelled reviews; each call of `learner` gives the same trained classifier"

    CONFIG = dict(emb_sz=160, n_hid=256, n_layers=1)
    UPDATE = dict(lr=5e-3)

    def __init__(self, a, train, valid):
        from fastai_tl.all import AutocastPrecision, LazyLogitsCallback, ULMFiT

        options = dict(config=self.CONFIG, max_vocab=6000, progress=False)
        lm = ULMFiT(Path(a.out) / 'lm', **options)
        cbs = [AutocastPrecision(), LazyLogitsCallback()]
        fit = dict(epochs=3, lr=1e-2, drop_mult=0.1, wd=0.01, bs=32, valid_pct=0.02)
        unlabelled = reviews(common.argparse.Namespace(**vars(a) | dict(seed=0)), 'unsup').text.iloc[:4000]
        lm.finetune_lm(list(unlabelled), encoder=None, cbs=cbs, **fit)
        self.start = lm.encoder('domain')
        self.run = ULMFiT(Path(a.out) / f'{"choose" if a.choose else "seed"} {a.seed}', seed=a.seed, **options)
        self.rows = pd.concat([train.assign(split='train'), valid.assign(split='valid')])

    def learner(self):
        fit = dict(epochs=[1, 1, 6], lr=2e-2, spread=4, drop_mult=0.3, bs=32)
        learn = self.run.classifier(self.rows, valid_col='split', encoder=self.start, **fit)
        return common.quiet(learn, validate=True)


# --- the measurement ---


def right(learn, *weeks):
    "Whether each review is classified rightly"
    df = pd.concat(weeks)
    return np.array(learn.predict_batch(list(df.text)).labels) == df.label.to_numpy()


def updated(learn, week, words_too, a, options):
    "Update a Learner on a labelled week; return what `extend_vocab` added"
    added = learn.extend_vocab(week, verbose=False) if words_too else []
    learn.update(week, replay=a.size['replay'], max_drop=None, seed=a.seed, verbose=False, **options)
    return added


def alarms(learn, weeks):
    "The names of the tests that find drift in each week"
    tables = [learn.drift(list(week.text)).table for week in weeks]
    return [list(table.index[table.drift]) for table in tables]


def one_seed(a):
    train, valid, before, shifted, plain, new_of = stream(a)
    begin = time.process_time()
    model = Model(a, train, valid)
    learn = model.learner()
    seconds = dict(base=time.process_time() - begin)
    found = {'ordinary words': right(learn, *plain[1:]), 'no update': right(learn, *shifted[1:])}
    old = {'no update': right(learn, valid).mean()}
    print(a.seed, {name: float(rows.mean()) for name, rows in found.items()}, round(seconds['base']), flush=True)
    begin, drift = time.process_time(), None
    if not a.no_drift:
        drift = dict(before=alarms(learn, before), after=alarms(learn, shifted))
        seconds['drift'] = time.process_time() - begin
        print(drift, round(seconds['drift']), flush=True)
    added = []
    for way in WAYS[2:]:
        begin, learn = time.process_time(), model.learner()
        words = updated(learn, shifted[0], way.startswith('extend'), a, model.UPDATE | a.options)
        seconds[way] = time.process_time() - begin
        added = added or words
        found[way], old[way] = right(learn, *shifted[1:]), right(learn, valid).mean()
        print(a.seed, way, float(found[way].mean()), 'old:', float(old[way]), round(seconds[way]), flush=True)
    last = found[WAYS[-1]]
    return dict(
        seed=a.seed,
        accuracy={way: float(found[way].mean()) for way in WAYS},
        old={way: float(o) for way, o in old.items()},
        won=int((last & ~found['update']).sum()),
        lost=int((~last & found['update']).sum()),
        words=counted(shifted[0], added, new_of),
        drift=drift,
        seconds=seconds,
    )


def counted(week, added, new_of):
    "How many words are new, how many of them `extend_vocab` has added, and how often they occur"
    tokens = [w for text in week.text for w in words_of(text)]
    new = set(new_of.values())
    share = np.mean([w in new for w in tokens])
    return dict(
        added=len(added),
        added_of_new=len(new & set(added)),
        share_of_words=float(share),
        share_of_new_covered=float(np.mean([w in set(added) for w in tokens if w in new])),
    )


def summary(runs):
    mean = common.mean_and_interval
    accuracy = {way: np.array([run['accuracy'][way] for run in runs]) for way in WAYS}
    rows = []
    for way in WAYS:
        old = [run['old'][way] for run in runs] if way in runs[0]['old'] else None
        gain = mean(accuracy[way] - accuracy['no update']) if way in WAYS[2:] else ''
        rows.append([way, mean(accuracy[way]), gain, '' if old is None else mean(old)])
    print(common.table(['way', 'weeks after:', 'against no update:', 'validation rows:'], rows))
    last = WAYS[-1]
    print('extend_vocab against update alone, paired:', mean(accuracy[last] - accuracy['update']))
    for part in ('before', 'after'):
        weeks = [week for run in runs if run['drift'] for week in run['drift'][part]]
        print(
            f'drift alarms {part} the shift: {sum(map(bool, weeks))} of {len(weeks)} weeks,',
            dict(Counter(name for week in weeks for name in week)),
        )


if __name__ == '__main__':
    a = parse()
    common.set_threads(a.threads)
    summary(common.runs_of_seeds(a, one_seed))
