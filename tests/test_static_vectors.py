"Static vectors: files of other programs, the embedding that a classifier starts with, and what the report says"

import gzip
import random
import warnings

import numpy as np
import pytest
import torch
from small_learners import TEXTS, ulmfit_classifier, ulmfit_lm

from fastai_tl.all import *


def write(path, tokens, vectors, header=False, end='\n'):
    lines = [f'{token} ' + ' '.join(f'{v:.6f}' for v in row) + end for token, row in zip(tokens, vectors)]
    head = f'{len(tokens)} {len(vectors[0])}\n' if header else ''
    path.write_bytes((head + ''.join(lines)).encode())
    return path


TOKENS = ['the', 'Film', 'STORY', '. . .', 'new york', '的', '1871', '\u3000', 'a\x1cb', 'é']


@pytest.mark.parametrize('header', [False, True])
@pytest.mark.parametrize('end', ['\n', ' \n', '\r\n'])
def test_files_of_word2vec_and_glove(header, end, tmp_path):
    rows = np.random.default_rng(0).normal(size=(len(TOKENS), 7)).astype(np.float32)
    vectors = StaticVectors.read(write(tmp_path / 'v.txt', TOKENS, rows, header, end))
    assert vectors.tokens == TOKENS
    expected = np.array([[np.float32(f'{v:.6f}') for v in row] for row in rows])
    assert np.array_equal(vectors.vectors, expected) and vectors.vectors.dtype == np.float32


def test_many_lines_with_bad_ones_in_between(tmp_path):
    rng = random.Random(0)
    tokens = [f'w{i}' for i in range(2500)]
    path = write(tmp_path / 'v.txt', tokens, [[rng.random() for _ in range(5)] for _ in tokens])
    lines = path.read_text().split('\n')
    lines[7] = 'w7 1 2'
    lines[1200] = 'w1200 1 2 3 4 x'
    lines[2400] = 'w2400 1 2 3 4 inf'
    path.write_text('\n'.join(lines))
    with pytest.raises(FastaiTLError, match='line 8, 1201, 2401'):
        StaticVectors.read(path)
    with pytest.warns(UserWarning, match='left out'):
        vectors = StaticVectors.read(path, skip_bad=True)
    assert vectors.tokens == [t for t in tokens if t not in ('w7', 'w1200', 'w2400')]
    for token in ('w0', 'w1199', 'w1201', 'w2499'):
        expected = [np.float32(v) for v in lines[int(token[1:])].split()[1:]]
        assert np.array_equal(vectors[token], expected)


def test_duplicates_and_compressed_files(tmp_path):
    path = tmp_path / 'v.vec.gz'
    with gzip.open(path, 'wb') as file:
        file.write(b'3 2\na 1 2\nb 3 4\na 5 6\n')
    with pytest.warns(UserWarning, match='1 lines'):
        vectors = StaticVectors.read(path)
    assert vectors.tokens == ['a', 'b'] and vectors['a'].tolist() == [1, 2]


@pytest.mark.parametrize('make', [ulmfit_classifier, ulmfit_lm])
def test_the_embedding_of_a_model(make, small_tokenizers, tmp_path):
    learn = make(small_tokenizers)
    vocab = text_vocab(learn.dls)
    rows = np.random.default_rng(0).normal(size=(len(TOKENS), 16)).astype(np.float32)
    path = write(tmp_path / 'v.txt', TOKENS, rows)
    weight = find_encoder(learn.model).encoder.weight
    before = weight.detach().clone()
    vectors = StaticVectors.read(path, vocab=vocab)
    assert vectors.tokens == ['the', 'Film', 'STORY']  # only those that can be looked up are kept
    match = vectors.into(learn.model, vocab)
    found = {'the': 'the', 'film': 'Film', 'story': 'STORY'}
    for i, token in enumerate(vocab):
        expected = torch.from_numpy(vectors[found[token]]) if token in found else before[i]
        assert torch.equal(weight[i].detach(), expected)
    ordinary = [token for token in vocab if not token.startswith('xx')]
    assert (match.found, match.types) == (3, len(ordinary))
    learn.model.eval()
    embedded = find_encoder(learn.model).encoder_dp(torch.tensor([[vocab.index('film')]]))[0, 0]
    assert torch.equal(embedded.detach(), torch.from_numpy(vectors['Film']))
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3)


def test_errors(small_tokenizers, tmp_path):
    learn = ulmfit_classifier(small_tokenizers)
    vocab = text_vocab(learn.dls)
    with pytest.raises(FastaiTLError, match='emb_sz=3'):
        StaticVectors(['the'], [[1, 2, 3]]).into(learn.model, vocab)
    (tmp_path / 'binary').write_bytes(bytes(range(256)) * 30)
    (tmp_path / 'empty').write_bytes(b'')
    (tmp_path / 'text').write_text('\n'.join(TEXTS))
    for name in ('binary', 'empty', 'text', 'missing'):
        with warnings.catch_warnings(), pytest.raises(FastaiTLError):
            warnings.simplefilter('error')
            StaticVectors.read(tmp_path / name)
    (tmp_path / 'cut').write_text('9 2\na 1 2\n')
    with pytest.raises(FastaiTLError, match='cut off'):
        StaticVectors.read(tmp_path / 'cut')
