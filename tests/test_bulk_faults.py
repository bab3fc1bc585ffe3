"""Rows of large files keep their values, their order and their names; interrupted runs never show old rows."""

import json
import math
import os
import warnings
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_learners import classifier, sentences, tagger

from fastai_tl.all import *
from fastai_tl.commands.predict import predict
from fastai_tl.core import FastaiTLError, RunError
from fastai_tl.data.tables import text_column
from fastai_tl.deploy import bulk_prediction

TEXTS = ['the film was good', 'a dull plot', 'fine', 'bad actor'] * 3
BIG = 2**60 + 1


@pytest.fixture(scope='module')
def tokenizers():
    return dict(encoder=train_tokenizer(sentences(200), 400, 'encoder'))


@pytest.fixture(scope='module')
def bundle(tokenizers, tmp_path_factory):
    folder = tmp_path_factory.mktemp('bundle') / 'b'
    classifier(tokenizers).save_bundle(folder)
    return folder


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_jsonl(name, rows):
    Path(name).write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return name


def read_jsonl(name):
    return [json.loads(line) for line in Path(name).read_text(encoding='utf-8').splitlines()]


def write_csv(name, texts=TEXTS, **columns):
    pd.DataFrame(dict(text=texts, **columns)).to_csv(name, index=False)
    return name


def bundle_predictions(bundle, texts):
    return load_bundle(bundle, verbose=False).predict(texts)


def test_json_lines_keep_the_values_of_the_rows(bundle):
    own = dict(x=1.23456789012345e-11, y=.1234567890123, id=BIG, big=2**70, none=None, flag=True, nested=[dict(a=.1)])
    rows = [dict(text=text, **own) for text in TEXTS]
    predict_files(bundle, write_jsonl('in.jsonl', rows), 'out.jsonl', size=5)
    found = read_jsonl('out.jsonl')
    assert [{name: row[name] for name in rows[0]} for row in found] == rows
    expected = bundle_predictions(bundle, TEXTS)
    assert np.array_equal(np.float32([row['p(a)'] for row in found]), expected.probs[:, 0].astype('float32'))


def test_times_and_not_finite_numbers_in_json_lines(bundle):
    when = pd.Timestamp('2024-01-02 03:04:05.123456')
    df = pd.DataFrame(dict(text=TEXTS, when=when, zone=when.tz_localize('UTC'), day=when.date(), x=[math.nan] * 12))
    df.loc[3, 'when'] = pd.NaT
    df.to_parquet('in.parquet')
    predict_files(bundle, 'in.parquet', 'out.jsonl', size=5)
    found = read_jsonl('out.jsonl')
    assert [row['when'] for row in found[2:4]] == ['2024-01-02T03:04:05.123456', None]
    assert found[0]['zone'] == '2024-01-02T03:04:05.123456+00:00'
    assert found[0]['day'] == '2024-01-02' and found[0]['x'] is None


@pytest.mark.parametrize('gap', [0, 7, 11])
def test_whole_numbers_of_parquet_files_stay_whole(bundle, gap):
    ids = [BIG + i for i in range(12)]
    ids[gap] = None
    lists = [[BIG, None], [1]] * 6
    pq.write_table(pa.table(dict(text=TEXTS, id=pa.array(ids, pa.int64()), lists=lists)), 'in.parquet')
    for kind in ('parquet', 'csv', 'jsonl'):
        predict_files(bundle, 'in.parquet', f'out.{kind}', size=5)
    table = pq.read_table('out.parquet')
    assert table.schema.field('id').type == pa.int64() and table['id'].to_pylist() == ids
    assert table['lists'].to_pylist() == lists
    assert [row['id'] for row in read_jsonl('out.jsonl')] == ids
    assert [row['lists'] for row in read_jsonl('out.jsonl')] == lists
    assert pd.read_csv('out.csv', dtype=str).id.fillna('').tolist() == ['' if i is None else str(i) for i in ids]


def test_columns_of_parquet_files_keep_their_types(bundle):
    n = range(12)
    fields = dict(
        empty_at_first=pa.array([None] * 8 + list(n)[8:], pa.int16()),
        kind=pa.array(['u'] * 6 + ['v'] * 6).dictionary_encode(),
        flag=pa.array([True, None] * 6), map=pa.array([[('a', 1)], []] * 6, pa.map_(pa.string(), pa.int32())),
        price=pa.array([None] * 11 + [Decimal('1.50')], pa.decimal128(12, 2)),
        at=pa.array(n, pa.timestamp('ns', 'UTC')),
        half=pa.array([.5] * 12, pa.float32()), words=pa.array([['a'], []] * 6), record=[dict(a=1, b=None)] * 12)
    source = pa.table(dict(text=TEXTS, **fields))
    pq.write_table(source, 'in.parquet')
    predict_files(bundle, 'in.parquet', 'out.parquet', size=5, text_col='text')
    found = pq.read_table('out.parquet')
    for field in source.schema:
        assert found.schema.field(field.name).type == field.type, field
        assert found[field.name].to_pylist() == source[field.name].to_pylist(), field


def killed(*args):
    raise KeyboardInterrupt


@pytest.mark.parametrize('left', [['joined'], ['000000.csv', 'joined'], ['000000.csv', '000001.csv'], ['plan.json']])
def test_what_a_kill_leaves_is_not_used_by_another_run(bundle, left):
    folder = Path('.out.csv.shards')
    predict_files(bundle, write_csv('old.csv', ['old text'] * 12), 'out.csv', size=5)
    folder.mkdir()
    for name in left:
        (folder / name).write_text('text,predicted\nold text,a\n')
    predict_files(bundle, write_csv('in.csv'), 'out.csv', size=5)
    assert pd.read_csv('out.csv').text.tolist() == TEXTS
    assert not list(Path().glob('.*'))


def test_a_kill_while_shards_are_removed_leaves_no_run(bundle, monkeypatch):
    write_csv('in.csv', TEXTS * 3)
    with monkeypatch.context() as patch:
        patch.setattr(bulk_prediction.shutil, 'rmtree', killed)
        with pytest.raises(KeyboardInterrupt):
            predict_files(bundle, 'in.csv', 'out.csv', size=5)
    assert not Path('.out.csv.shards').exists()
    write_csv('in.csv', ['another text'] * 12)
    predict_files(bundle, 'in.csv', 'out.csv', size=5)
    assert pd.read_csv('out.csv').text.tolist() == ['another text'] * 12


def test_an_output_that_was_deleted_is_written_again(bundle, monkeypatch):
    write_csv('in.csv')
    with monkeypatch.context() as patch:
        patch.setattr(bulk_prediction, '_remove_shards', killed)
        with pytest.raises(KeyboardInterrupt):
            predict_files(bundle, 'in.csv', 'out.csv', size=5)
    os.remove('out.csv')
    predict_files(bundle, 'in.csv', 'out.csv', size=5)
    assert pd.read_csv('out.csv').text.tolist() == TEXTS


def test_blank_lines_of_a_single_column_are_rows(bundle):
    Path('in.csv').write_text('text\ngood\n\n \nbad\n')
    assert len(read_table('in.csv')) == len(pd.concat(table_parts('in.csv'))) == 4
    with pytest.raises(DataError, match='a missing one in row 1'):
        predict_files(bundle, 'in.csv', 'out.csv')
    with pytest.raises(DataError, match='a missing one in row 1'):
        text_column(read_table('in.csv'), 'text')


@pytest.mark.parametrize('options', [{}, dict(encoding='utf-16'), dict(engine='python'), dict(dtype=str)])
@pytest.mark.parametrize('size', [1, 3, 100])
def test_blank_lines_at_the_end_are_no_rows(options, size):
    cells = ['"a\n\nb"', '', '"c"', '""']
    text = '\r\n'.join(['text', *cells, '', ' ', ''])
    Path('in.csv').write_bytes(text.encode(options.get('encoding', 'utf-8')))
    for df in (read_table('in.csv', **options), pd.concat(table_parts('in.csv', size, **options))):
        assert df.text.fillna('-').tolist() == ['a\n\nb', '-', 'c', '-']
    Path('two.csv').write_text('text,id\n\na,1\n\nb,2\n\n')
    assert pd.concat(table_parts('two.csv', size)).text.tolist() == read_table('two.csv').text.tolist() == ['a', 'b']


def test_row_names_are_kept(bundle):
    df = pd.DataFrame(dict(text=TEXTS), index=pd.Index([f'r{i}' for i in range(12)], name='id'))
    df.to_parquet('in.parquet')
    df.to_csv('in.csv')
    for source, options in (('in.parquet', {}), ('in.csv', dict(index_col=0))):
        for kind in ('csv', 'parquet', 'jsonl'):
            out, = predict_files(bundle, source, f'{Path(source).suffix[1:]}.{kind}', size=5, **options)
            found = pd.concat(table_parts(out))
            assert found.id.tolist() == df.index.tolist() and found.text.tolist() == TEXTS
    df.rename(columns=dict(text='review')).to_csv('names.csv')
    predict_files(bundle, 'names.csv', 'names_out.csv', index_col=0)
    assert list(pd.read_csv('names_out.csv').columns[:2]) == ['id', 'review']


def test_a_repeated_column_is_an_error_in_every_part(bundle):
    Path('in.csv').write_text('text,text\n' + 'a good film,b\n' * 6)
    with pytest.raises(DataError, match='several columns with this name'):
        predict_files(bundle, 'in.csv', 'out.csv', size=5)


@pytest.mark.parametrize('kind', ['jsonl', 'csv', 'parquet'])
def test_lone_surrogates_are_replaced_with_a_warning(bundle, kind):
    rows = [dict(text=text, note=None) for text in TEXTS]
    rows[7] = dict(text='fine \ud800', note=['\udfff'])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        predict_files(bundle, write_jsonl('in.jsonl', rows), f'out.{kind}', size=5)
    assert any('Lone surrogates' in str(one.message) and 'row 7;' in str(one.message) for one in said)
    found = pd.concat(table_parts(f'out.{kind}'))
    assert found.text.tolist() == [*TEXTS[:7], 'fine \ufffd', *TEXTS[8:]]


@pytest.mark.parametrize('size', [5, 100])
def test_columns_of_several_types_need_json_lines(bundle, size):
    rows = [dict(text=text, note=i if i < 5 else 'word') for i, text in enumerate(TEXTS)]
    write_jsonl('in.jsonl', rows)
    with pytest.raises(DataError, match='Write to a .jsonl file'):
        predict_files(bundle, 'in.jsonl', 'out.parquet', size=size)
    predict_files(bundle, 'in.jsonl', 'out.jsonl', size=size)
    assert [row['note'] for row in read_jsonl('out.jsonl')] == [row['note'] for row in rows]


def test_keys_in_another_order(bundle):
    rows = [dict(text=text, id=i) if i < 5 else dict(id=i, text=text) for i, text in enumerate(TEXTS)]
    write_jsonl('in.jsonl', rows)
    predict_files(bundle, 'in.jsonl', 'out.csv', size=5)
    assert pd.read_csv('out.csv')[['text', 'id']].to_dict('records') == rows
    write_jsonl('in.jsonl', [*rows, dict(text='one more', id=12, other=1)])
    with pytest.raises(DataError, match='must have the columns of the first, text, id'):
        predict_files(bundle, 'in.jsonl', 'more.csv', size=6)


def test_a_tuple_among_the_options_of_the_reader_continues(bundle):
    write_csv('in.csv', [*TEXTS[:-1], ' '], id=1)
    for _ in range(2):
        with pytest.raises(DataError, match='a blank one in row 11'):
            predict_files(bundle, 'in.csv', 'out.csv', size=5, usecols=('text', 'id'))
    with pytest.raises(RunError, match='others: reader'):
        predict_files(bundle, 'in.csv', 'out.csv', size=5, usecols=('id', 'text'))


@pytest.mark.parametrize('processes', [1, pytest.param(2, marks=pytest.mark.slow)])
def test_errors_name_the_file(bundle, processes):
    Path('in').mkdir()
    write_csv('in/a.csv', id=1)
    write_csv('in/b.csv', [*TEXTS[:7], ' ', *TEXTS[8:]], id=1)
    with pytest.raises(DataError, match=r'b\.csv: Each text .* in row 7'):
        predict_files(bundle, 'in', 'out', size=5, processes=processes)


def test_errors_of_tags_name_the_row_of_the_file(tokenizers):
    tagger(tokenizers).save_bundle('tagger')
    write_jsonl('in.jsonl', [dict(tokens=words) for words in [['good', 'film']] * 7 + [[]]])
    with pytest.raises(DataError, match=r'in\.jsonl: .* none in row 7'):
        predict_files('tagger', 'in.jsonl', 'out.jsonl', size=5)


def test_the_output_is_never_the_input(bundle):
    write_csv('in.csv')
    os.symlink('in.csv', 'link.csv')
    Path('linked').mkdir()
    os.symlink('../in.csv', 'linked/in.csv')
    before = Path('in.csv').read_bytes()
    for inputs, output in (('in.csv', 'in.csv'), ('in.csv', 'link.csv'), (['in.csv'], 'linked')):
        with pytest.raises(FastaiTLError, match='another file than the input'):
            predict_files(bundle, inputs, output)
    assert Path('in.csv').read_bytes() == before


def test_the_command_never_writes_over_its_input(bundle, tmp_path):
    file = tmp_path / 'in.csv'
    file.write_text('text\ngood film\n')
    before = file.read_text()
    with pytest.raises(FastaiTLError, match='another file'):
        predict(SimpleNamespace(model=bundle, texts=[str(file)], out=str(file), processes=None))
    assert file.read_text() == before
