"""Reading a text file of word vectors: the same numbers as gensim, bit by bit, and the time.

    pip install gensim
    python benchmarks/static_vectors/run.py --threads 1 --json FILE

Writes a file of random vectors (`--tokens` × `--size`) in the format of word2vec (with a first line), and a tenth of
them in that of GloVe, with some tokens that are there twice and some with spaces; reads it with `StaticVectors.read`
and with gensim, and compares tokens and vectors. gensim has no way to read tokens with spaces. Without gensim only the
time is measured. `--vocab` also reads only the vectors of so many tokens. Seconds are those of the processor."""

import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common

common.offline()
import numpy as np


def parse():
    ap = common.parser(__doc__, 'threads', 'json')
    ap.add_argument('--tokens', type=int, default=400_000)
    ap.add_argument('--size', type=int, default=300)
    ap.add_argument('--vocab', type=int, default=30_000)
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


def main(a):
    common.set_threads(a.threads)
    with tempfile.TemporaryDirectory() as folder:
        files = (('word2vec', True, False), ('GloVe', False, False), ('GloVe, tokens with spaces', False, True))
        rows = [measure(a, folder, *file) for file in files]
    common.write_json(a.json, dict(tokens=a.tokens, size=a.size, vocab=a.vocab, files=rows))


if __name__ == '__main__':
    main(parse())
