"""Reading a text file of word vectors: the same numbers as gensim, bit by bit, and the time.

    pip install gensim
    python benchmarks/static_vectors/run.py --threads 1 --json FILE
    python benchmarks/static_vectors/run.py --part gain --data FOLDER --threads 1 --json FILE

Writes a file of random vectors (`--tokens` × `--size`) in the format of word2vec (with a first line), and a tenth of
them in that of GloVe, with some tokens that are there twice and some with spaces; reads it with `StaticVectors.read`
and with gensim, and compares tokens and vectors. gensim has no way to read tokens with spaces. Without gensim only the
time is measured. `--vocab` also reads only the vectors of so many tokens. Seconds are those of the processor.

`--part gain` is what the vectors are worth: an AWD_LSTM classifier from scratch on TREC-6 (en/trec6.csv), without
vectors and with those of word2vec (gensim; skip-grams), which are trained on the general corpus
(en/general_corpus.parquet) or on unlabelled reviews of IMDb (en/imdb.parquet). Ways with vectors: trained from the
start; kept fixed in the first half of the epochs; and fixed in it with the most frequent tokens of the vectors in the
vocabulary, so that words that only test questions have are known."""

import re
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common

common.offline()
import numpy as np
import pandas as pd


def parse():
    ap = common.parser(__doc__, 'data', 'threads', 'seeds', 'json')
    ap.add_argument('--part', choices=('reading', 'gain'), default='reading')
    ap.add_argument('--tokens', type=int, default=400_000)
    ap.add_argument('--size', type=int, default=300)
    ap.add_argument('--vocab', type=int, default=30_000)
    ap.add_argument('--labels', type=int, nargs='+', default=[300, 1000, 5452], help='gain: training questions')
    ap.add_argument('--epochs', type=int, nargs='+', default=[20, 12, 6], help='gain: epochs for each number of labels')
    ap.add_argument('--dims', type=int, default=100, help='gain: size of the vectors, and units of the LSTM')
    ap.add_argument('--reviews', type=int, default=20_000, help='gain: unlabelled reviews')
    ap.add_argument('--extra', type=int, default=10_000, help='gain: tokens of the vectors in the vocabulary')
    return ap.parse_args()


def tokens_of(n, spaces):
    "Tokens of words, numbers and Chinese characters; every thousandth is there twice"
    tokens = [('w', '字', '')[i % 3] + str(i) for i in range(n)]
    tokens[1000::1000] = tokens[999::1000][: len(tokens[1000::1000])]
    if spaces:
        tokens[500::1000] = [f'{token} .' for token in tokens[500::1000]]
    return tokens


def write(path, tokens, size, header):
    "Write random vectors of six digits, as word2vec and GloVe do; 2,000 different ones, to save time"
    rows = np.random.default_rng(0).normal(scale=0.3, size=(2000, size))
    lines = [' '.join(f'{v:.6g}' for v in row) for row in rows]
    with open(path, 'w', encoding='utf-8', newline='\n') as file:
        if header:
            file.write(f'{len(tokens)} {size}\n')
        file.writelines(f'{token} {lines[i % len(lines)]}\n' for i, token in enumerate(tokens))


def timed(read):
    begin = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        made = read()
    return made, time.process_time() - begin


def with_gensim(path, header):
    "Tokens, vectors and seconds; `None` if gensim is not installed"
    try:
        from gensim.models import KeyedVectors
    except ImportError:
        return None
    made, seconds = timed(lambda: KeyedVectors.load_word2vec_format(str(path), binary=False, no_header=not header))
    n = len(made.key_to_index)  # for each token that is there twice, gensim has an empty row at the end
    return made.index_to_key[:n], made.vectors[:n], seconds


def measure(a, folder, name, header, spaces):
    from fastai_tl.all import StaticVectors

    path = Path(folder) / f'{name}.txt'
    tokens = tokens_of(a.tokens if header else a.tokens // 10, spaces)
    write(path, tokens, a.size, header)
    made, seconds = timed(lambda: StaticVectors.read(path))
    some, of_some = timed(lambda: StaticVectors.read(path, vocab=tokens[: a.vocab]))
    row = dict(
        file=name, tokens=len(made), seconds=seconds, seconds_of_vocab=of_some, megabytes=path.stat().st_size / 1e6
    )
    assert len(made) == len(set(tokens)) and np.array_equal(some.vectors, made.vectors[: len(some)])
    theirs = None if spaces else with_gensim(path, header)
    if theirs is not None:
        keys, vectors, row['seconds_of_gensim'] = theirs
        row['equal'] = bool(keys == made.tokens and np.array_equal(vectors, made.vectors))
    path.unlink()
    print(row, flush=True)
    return row


# --- the gain ---


def word_vectors(texts, a):
    "Vectors of the words and marks of texts in lower case: word2vec with skip-grams, most frequent tokens first"
    from gensim.models import Word2Vec

    from fastai_tl.all import StaticVectors

    sentences = [re.findall(r"'?\w+|[^\w\s]", part.lower()) for text in texts for part in re.split(r'[.!?]\s', text)]
    made = Word2Vec(sentences, vector_size=a.dims, window=5, min_count=5, sg=1, negative=5, epochs=3, workers=1, seed=0)
    print(f'{sum(map(len, sentences)):,} tokens, {len(made.wv.index_to_key):,} vectors', flush=True)
    return StaticVectors(list(made.wv.index_to_key), made.wv.vectors), sum(map(len, sentences))


def corpora(a):
    "The vectors of each corpus, and the number of its tokens"
    folder = Path(a.data) / 'en'
    general = pd.read_parquet(folder / 'general_corpus.parquet').text
    imdb = pd.read_parquet(folder / 'imdb.parquet')
    unlabelled = imdb[~imdb.split.isin(['train', 'test'])].text.sample(a.reviews, random_state=0)
    texts = {'general corpus': general, 'IMDb': unlabelled.str.replace(r'<[^>]+>', ' ', regex=True)}
    return {name: word_vectors(of, a) for name, of in texts.items()}


def gain_run(data, rows, epochs, seed, a, vectors=None, fixed=False, extra=False):
    "Test accuracy of a classifier from scratch"
    import torch

    from fastai_tl.all import awd_classifier_learner, classifier_dls, seed_everything, texts_vocab

    texts, labels, test = data
    vocab = texts_vocab(texts, min_freq=1, idxs=rows)
    if extra:
        known = set(vocab)
        vocab = vocab + [token for token in vectors.tokens[: a.extra] if token not in known]
    seed_everything(seed)
    dls = classifier_dls(texts, labels, 'classification', rows, test, vocab, bs=32 if len(rows) < 2000 else 64)
    config = dict(emb_sz=a.dims, n_hid=a.dims, n_layers=1)
    learn = common.quiet(awd_classifier_learner(dls, 'classification', 6, config, drop_mult=0.4))
    if vectors is not None:
        vectors.into(learn.model, vocab)
    with learn.no_bar():
        if fixed:
            learn.freeze_to(1)  # all but the embedding
            learn.fit_one_cycle(epochs // 2, 1e-2)
            learn.unfreeze()
        learn.fit_one_cycle(epochs - epochs // 2 if fixed else epochs, 1e-2)
    learn.model.eval()
    with torch.no_grad():
        right = torch.cat([learn.model(x)[0].argmax(1) == y for x, y in dls.valid])
    return float(right.float().mean())


def ways_of(made):
    "The ways to begin, by name"
    ways = {'no vectors': {}, 'no vectors: fixed first': dict(fixed=True)}
    for corpus, (vectors, _) in made.items():
        ways[f'{corpus}: trained'] = dict(vectors=vectors)
        ways[f'{corpus}: fixed first'] = dict(vectors=vectors, fixed=True)
        ways[f'{corpus}: fixed first, its vocabulary'] = dict(vectors=vectors, fixed=True, extra=True)
    return ways


def gain_table(rows):
    "Accuracy of each way, and its difference to no vectors, paired by seed"
    df = pd.DataFrame(rows).pivot_table(index=['labels', 'seed'], columns='way', values='accuracy', sort=False)
    lines = []
    for n, of in df.groupby(level='labels'):
        gain = 100 * of.sub(of['no vectors'], axis=0)
        for way in of:
            points = '' if way == 'no vectors' else f'{gain[way].mean():+.1f} ± {gain[way].std():.1f}'
            lines.append([n, way, f'{100 * of[way].mean():.1f} ± {100 * of[way].std():.1f}', points])
    return common.table(['labels:', 'vectors', 'accuracy, %:', 'points above none:'], lines)


def measure_gain(a):
    from fastai_tl.all import tokenize_texts_once

    df = pd.read_csv(Path(a.data) / 'en' / 'trec6.csv')
    data = tokenize_texts_once(df.text.tolist()), df.label.tolist(), np.flatnonzero(df.split == 'test').tolist()
    train = np.flatnonzero(df.split == 'train')
    made = corpora(a)
    rows, begin = [], time.process_time()
    for n, epochs in zip(a.labels, a.epochs):
        for seed in range(a.seeds):
            chosen = np.random.default_rng(seed).permutation(train)[:n].tolist()
            for way, options in ways_of(made).items():
                accuracy = gain_run(data, chosen, epochs, seed, a, **options)
                rows.append(dict(labels=len(chosen), seed=seed, way=way, accuracy=accuracy))
            print(n, seed, f'{time.process_time() - begin:.0f} s', rows[-len(ways_of(made)) :], flush=True)
        print(gain_table(rows), flush=True)
        tokens = {name: dict(tokens=n_tokens, vectors=len(vectors)) for name, (vectors, n_tokens) in made.items()}
        options = {name: getattr(a, name) for name in ('labels', 'epochs', 'dims', 'reviews', 'extra')}
        common.write_json(a.json, dict(options, corpora=tokens, rows=rows))


def main(a):
    common.set_threads(a.threads)
    if a.part == 'gain':
        return measure_gain(a)
    with tempfile.TemporaryDirectory() as folder:
        files = (('word2vec', True, False), ('GloVe', False, False), ('GloVe, tokens with spaces', False, True))
        rows = [measure(a, folder, *file) for file in files]
    common.write_json(a.json, dict(tokens=a.tokens, size=a.size, vocab=a.vocab, files=rows))


if __name__ == '__main__':
    main(parse())
