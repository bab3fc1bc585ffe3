"""Texts on the way into a `TokenFile`: other texts in the same folder, odd files in a corpus, formats of datasets."""

import json
import os
import warnings

import numpy as np
import pandas as pd
import pytest
from small_learners import sentences

from fastai_tl.all import *
from fastai_tl.core import DataError, FastaiTLError, RunError
from fastai_tl.data import token_files
from fastai_tl.data.text_parts import TextSource

TEXTS = sentences(12, 3)


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / 'corpus'
    folder.mkdir()
    pd.DataFrame(dict(text=TEXTS)).to_csv(folder / 'a.csv', index=False)
    return folder


@pytest.fixture
def tok(small_tokenizers):
    return small_tokenizers['decoder']


def ids_of(texts, tok):
    return [i for text in texts for i in tok(text)['input_ids'] + [tok.eos_token_id]]


def stream(texts):
    from datasets import Dataset

    return Dataset.from_dict(dict(text=texts)).to_iterable_dataset()


# --- Other texts in the same folder ---

@pytest.mark.parametrize('others', [['something else'] * 50, TEXTS[:-1], [*TEXTS, 'more'], TEXTS[::-1]])
def test_another_stream_is_not_the_first_one(others, tok, tmp_path):
    first = tokenize_to_file(stream(TEXTS), tmp_path / 't', tok)
    again = tokenize_to_file(stream(TEXTS), tmp_path / 't', tok)
    assert again.read(0, again.n_tokens).tolist() == first.read(0, first.n_tokens).tolist() == ids_of(TEXTS, tok)
    with pytest.raises(RunError, match='must be continued with the same texts'):
        tokenize_to_file(stream(others), tmp_path / 't', tok)


def test_texts_are_not_mixed_up_when_they_are_compared(tok, tmp_path):
    tokenize_to_file(stream(['good film', 'bad']), tmp_path / 't', tok)
    with pytest.raises(RunError, match='the same texts'):
        tokenize_to_file(stream(['good film\0bad']), tmp_path / 't', tok)


def test_a_stream_that_cannot_be_compared_is_refused(tok, tmp_path):
    tokens = tokenize_to_file(stream(TEXTS), tmp_path / 't', tok)
    header = dict(tokens.header)
    del header['texts_digest']
    (tmp_path / 't' / 'header.json').write_text(json.dumps(header))
    with pytest.raises(RunError, match='the same texts'):
        tokenize_to_file(stream(TEXTS), tmp_path / 't', tok)


def test_an_unfinished_stream_is_continued_with_the_same_texts_only(tok, tmp_path, monkeypatch):
    texts = sentences(2500, 4)
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        patched.setattr(token_files, '_SECONDS', 0)
        patched.setattr(token_files.TokenWriter, 'finish', lambda *args: 1 / 0)
        tokenize_to_file(stream(texts), tmp_path / 't', tok, n_workers=1)
    for others in (texts[:500], ['other', *texts[1:]]):
        with pytest.raises(RunError, match='the same texts'):
            tokenize_to_file(stream(others), tmp_path / 't', tok)
    tokens = tokenize_to_file(stream(texts), tmp_path / 't', tok)
    assert tokens.read(0, tokens.n_tokens).tolist() == ids_of(texts, tok)


def test_another_encoding_is_another_setting(tmp_path):
    (tmp_path / 'a.txt').write_bytes('café good'.encode('latin-1'))
    file, out = tmp_path / 'a.txt', tmp_path / 't'
    tokenize_to_file(file, out, encoding='latin-1')
    with pytest.raises(RunError, match='others: encoding'):
        tokenize_to_file(file, out, encoding='cp437')
    assert 'café' in tokenize_to_file(file, out, encoding='iso-8859-1').words # the same under another name


def test_names_of_utf_8_are_one_encoding(corpus, tmp_path, tok):
    for encoding in (None, 'utf-8', 'UTF8', 'utf_8'):
        tokenize_to_file(corpus, tmp_path / 't', tok, encoding=encoding)
    with pytest.raises(DataError, match='known encoding'):
        tokenize_to_file(corpus, tmp_path / 'u', tok, encoding='utf-99')


# --- Files of a corpus ---

@pytest.mark.parametrize('name', ['b.csv', 'b.tsv', 'b.jsonl', 'b.txt', 'b.parquet'])
def test_a_part_without_texts_is_left_out(name, corpus, tok, tmp_path):
    empty = pd.DataFrame(dict(text=[]))
    if name.endswith('parquet'):
        empty.to_parquet(corpus / name)
    else:
        (corpus / name).write_text('text\n' if name[1:] in ('.csv', '.tsv') else '')
    tokens = tokenize_to_file(corpus, tmp_path / 't', tok)
    assert tokens.read(0, tokens.n_tokens).tolist() == ids_of(TEXTS, tok)


def test_only_a_header_is_no_corpus(tok, tmp_path):
    (tmp_path / 'a.csv').write_text('text\n')
    with pytest.raises(DataError, match='At least one text is needed'):
        tokenize_to_file(tmp_path / 'a.csv', tmp_path / 't', tok)
    with pytest.raises(DataError, match="column 'body'"):
        tokenize_to_file(tmp_path / 'a.csv', tmp_path / 't', tok, text_col='body')


def test_tokens_inside_the_folder_of_the_texts(corpus):
    first = tokenize_to_file(corpus, corpus / 'tokens')
    other = tokenize_to_file(corpus, corpus / 'more' / 'tokens', max_words=5)
    again = tokenize_to_file(corpus, corpus / 'tokens')
    assert len(first) == len(other) == len(again) == len(TEXTS)
    (corpus / 'words.txt').write_text('a text of the user')
    assert len(TextSource(corpus).files) == 2


def test_a_file_of_the_user_is_not_overwritten(corpus):
    (corpus / 'words.txt').write_text('a text of the user')
    with pytest.raises(RunError, match='words.txt'):
        tokenize_to_file(corpus, corpus)
    assert (corpus / 'words.txt').read_text() == 'a text of the user'


def test_a_folder_with_the_name_of_a_file(corpus, tok, tmp_path):
    for name in ('x.txt', 'y.csv', 'z.jsonl', 'z.parquet'):
        (corpus / name).mkdir()
    (corpus / 'x.txt' / 'y.txt').write_text('good')
    tokens = tokenize_to_file(corpus, tmp_path / 't', tok)
    assert tokens.read(0, tokens.n_tokens).tolist() == ids_of([*TEXTS, 'good'], tok)


def test_a_file_that_cannot_be_read_is_named(corpus, tok, tmp_path, monkeypatch):
    (corpus / 'lost.txt').symlink_to(tmp_path / 'nothing.txt')
    with pytest.raises(DataError, match='lost.txt'):
        tokenize_to_file(corpus, tmp_path / 't', tok)
    (tmp_path / 'nothing.txt').write_text('good')
    source = TextSource(corpus)
    (tmp_path / 'nothing.txt').unlink() # after the files were listed
    with pytest.raises(DataError, match='lost.txt must be readable. Got No such file'):
        list(source.parts())


def test_a_damaged_parquet_file_is_named(corpus, tok, tmp_path):
    (corpus / 'b.parquet').write_bytes(b'no table')
    with pytest.raises(DataError, match='b.parquet'):
        tokenize_to_file(corpus, tmp_path / 't', tok)


def test_a_file_that_is_listed_twice_is_read_once(corpus, tok, tmp_path):
    (corpus / 'link.csv').symlink_to(corpus / 'a.csv')
    (tmp_path / 'z.txt').write_text('good')
    source = [corpus / 'a.csv', tmp_path / 'z.txt', str(corpus), os.path.relpath(corpus / 'a.csv')]
    with pytest.warns(UserWarning, match='read once'):
        tokens = tokenize_to_file(source, tmp_path / 't', tok)
    assert tokens.read(0, tokens.n_tokens).tolist() == ids_of([*TEXTS, 'good'], tok)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert len(TextSource([corpus / 'a.csv', tmp_path / 'z.txt']).files) == 2


@pytest.mark.parametrize('end', ['', '\n\n', '\n' * 3000, ' \n\t\n'])
@pytest.mark.parametrize('size', [1 << 21, (1 << 21) + 9, (1 << 20) + 1])
def test_blank_lines_at_the_end_of_a_large_text(end, size, tok, tmp_path):
    line = 'the film was good \n'
    text = (line * (size // len(line) + 1))[:size - 1] + '\n' + end
    (tmp_path / 'a.txt').write_text(text)
    pieces = sum(TextSource(tmp_path / 'a.txt').parts(), [])
    assert ''.join(pieces) == text and all(piece.strip() for piece in pieces)


def test_options_of_the_reader(tok, tmp_path):
    pd.DataFrame(dict(id=range(12), text=TEXTS)).to_csv(tmp_path / 'semi.csv', index=False, sep=';')
    pd.DataFrame(dict(text=TEXTS)).to_json(tmp_path / 'rows.jsonl', orient='records', lines=True)
    with pytest.raises(DataError, match="pass `sep=';'`"):
        tokenize_to_file(tmp_path / 'semi.csv', tmp_path / 't', tok)
    tokens = tokenize_to_file(tmp_path / 'semi.csv', tmp_path / 't', tok, sep=';')
    assert tokens.read(0, tokens.n_tokens).tolist() == ids_of(TEXTS, tok)
    with pytest.raises(RunError, match='others: reader'):
        tokenize_to_file(tmp_path / 'semi.csv', tmp_path / 't', tok, sep=';', nrows=3)
    assert len(tokenize_to_file(tmp_path / 'semi.csv', tmp_path / 'n', tok, sep=';', nrows=3)) == 3
    both = tokenize_to_file([tmp_path / 'semi.csv', tmp_path / 'rows.jsonl'], tmp_path / 'both', tok, sep=';')
    assert len(both) == 24


@pytest.mark.parametrize('options', [dict(separate=';'), dict(converters=dict(text=str.lower)), dict(chunksize=3),
                                     dict(columns=['text'])])
def test_wrong_options_of_the_reader(options, corpus, tok, tmp_path):
    with pytest.raises(FastaiTLError, match='option'):
        tokenize_to_file(corpus, tmp_path / 't', tok, **options)


def test_options_without_a_table(tok, tmp_path):
    (tmp_path / 'a.txt').write_text('good')
    for source in (tmp_path / 'a.txt', stream(TEXTS)):
        with pytest.raises(FastaiTLError, match='no .csv or .tsv file'):
            tokenize_to_file(source, tmp_path / 't', tok, sep=';')


# --- Datasets ---

@pytest.mark.parametrize('kind', [None, 'numpy', 'pandas', 'torch', 'arrow'])
@pytest.mark.parametrize('is_stream', [False, True])
def test_formats_of_a_dataset(kind, is_stream, tok, tmp_path):
    from datasets import Dataset

    dataset = Dataset.from_dict(dict(text=TEXTS, id=np.arange(12)))
    dataset = (dataset.to_iterable_dataset() if is_stream else dataset).with_format(kind)
    for t in (tok, None):
        tokens = tokenize_to_file(dataset, tmp_path / f't{t is None}', t)
        assert len(tokens) == len(TEXTS)
    tokens = TokenFile(tmp_path / 'tFalse')
    assert tokens.read(0, tokens.n_tokens).tolist() == ids_of(TEXTS, tok)
    with pytest.raises(DataError, match="column 'body'"):
        list(TextSource(dataset, 'body').parts())


@pytest.mark.parametrize('kind', ['numpy', 'pandas', 'arrow'])
def test_a_missing_text_of_a_formatted_dataset(kind):
    from datasets import Dataset

    with pytest.raises(DataError, match='a missing one in row 1 of dataset'):
        list(TextSource(Dataset.from_dict(dict(text=['good', None, 'bad'])).with_format(kind)).parts())


def test_empty_lines_of_a_table_are_skipped_with_skip_blank(tmp_path):
    (tmp_path / 'one.csv').write_text('text\ngood film\n\n \nbad film\n')
    (tmp_path / 'two.csv').write_text('id,text\n1,good film\n2,\n')
    file = tokenize_to_file(tmp_path / 'one.csv', tmp_path / 'a', n_workers=1, skip_blank=True)
    assert len(file) == 2 and file.header['n_skipped'] == 2
    assert len(tokenize_to_file(tmp_path / 'two.csv', tmp_path / 'b', n_workers=1, skip_blank=True)) == 1
    with pytest.raises(DataError):
        tokenize_to_file(tmp_path / 'one.csv', tmp_path / 'c', n_workers=1)
