"""Files as they come: encodings, separators, words for missing values, rows that are too long, several labels."""

import csv
import json
import sys
import warnings

import numpy as np
import pandas as pd
import pytest

from fastai_tl.all import *
from fastai_tl.cli import main
from fastai_tl.commands.settings import read_settings
from fastai_tl.data.readers import pop_reader_options
from fastai_tl.data.tables import column, valid_text
from fastai_tl.datasets.quickstart import own_data
from fastai_tl.learners.ulmfit_stages import TableOptions

TEXTS = [f'Das Café Nummer {i} war {word}' for i in range(12) for word in ('schön', 'öde')]
LABELS = ['gut', 'schlecht']*12
TOKENIZER = train_tokenizer(TEXTS, 300)
QUIET = dict(verbose=False, bs=4)


def write_table(path, encoding, sep):
    "Write the texts and labels with the csv module of Python, which knows nothing of pandas"
    with open(path, 'w', encoding=encoding, newline='') as file:
        writer = csv.writer(file, delimiter=sep)
        writer.writerow(['text', 'label', 'source', 'target', 'split'])
        for i, (text, label) in enumerate(zip(TEXTS, LABELS)):
            writer.writerow([text, label, text, label, 'valid' if i > 19 else 'train'])
    return path


def write_folder(folder, encoding):
    for i, (text, label) in enumerate(zip(TEXTS, LABELS)):
        file = folder/label/f'{i:02}.txt'
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.encode(encoding))
    return folder


def all_texts(dls):
    "Return all texts of DataLoaders, sorted"
    items = [*dls.train_ds.items, *dls.valid_ds.items]
    return sorted(item[0] for item in items)


# how a file is written, and the options that read it
ENCODINGS = [('utf-8', {}), ('utf-8-sig', {}), ('utf-8-sig', dict(encoding='utf-8')),
             ('cp1252', dict(encoding='cp1252')), ('utf-16', dict(encoding='utf-16'))]


@pytest.mark.parametrize('encoding, options', ENCODINGS)
@pytest.mark.parametrize('sep', [',', ';', '\t', '|'])
def test_tables_of_any_encoding_and_separator(tmp_path, encoding, options, sep):
    path = write_table(tmp_path/'a.csv', encoding, sep)
    options = options if sep == ',' else dict(options, sep=sep)
    dls = HFTextDataLoaders.from_csv(path, TOKENIZER, valid_col='split', **QUIET, **options)
    assert all_texts(dls) == sorted(TEXTS)
    assert list(dls.spec.classes) == ['gut', 'schlecht']
    assert read_texts(path, **options) == TEXTS
    rows = TableOptions().read(path, 42, **options)
    assert (rows.texts, rows.labels) == (TEXTS, LABELS)
    assert sorted(own_data(path, **options).labelled.text) == sorted(TEXTS)


def test_every_factory_hands_the_options_on(tmp_path):
    path = write_table(tmp_path/'a.csv', 'cp1252', ';')
    options = dict(encoding='cp1252', sep=';')
    pairs = HFSeq2SeqDataLoaders.from_csv(path, TOKENIZER, verbose=False, **options)
    assert all_texts(pairs) == sorted(TEXTS)
    lm = HFMaskedLMDataLoaders.from_csv(path, TOKENIZER, valid_col='split', **options)
    same = HFMaskedLMDataLoaders.from_texts(TEXTS, TOKENIZER, valid=['train']*20 + ['valid']*4)
    assert [o.tolist() for o in lm.valid_ds.blocks] == [o.tolist() for o in same.valid_ds.blocks]
    causal = HFCausalLMDataLoaders.from_csv(path, TOKENIZER, valid_col='split', **options)
    assert np.array_equal(causal.valid_ds.stream, HFCausalLMDataLoaders.from_texts(
        TEXTS, TOKENIZER, valid=['train']*20 + ['valid']*4).valid_ds.stream)


@pytest.mark.parametrize('encoding, options', ENCODINGS)
def test_folders_of_any_encoding(tmp_path, encoding, options):
    folder = write_folder(tmp_path, encoding)
    assert all_texts(HFTextDataLoaders.from_folder(folder, TOKENIZER, **QUIET, **options)) == sorted(TEXTS)
    assert sorted(read_texts(folder, **options)) == sorted(TEXTS)
    assert sorted(TableOptions().read(folder, 42, **options).texts) == sorted(TEXTS)
    assert sorted(own_data(folder, **options).labelled.text) == sorted(TEXTS)
    blocks = HFMaskedLMDataLoaders.from_folder(folder, TOKENIZER, **options)
    assert len(blocks.train_ds.blocks) + len(blocks.valid_ds.blocks) == len(TEXTS)


@pytest.mark.parametrize('encoding', ['cp1252', 'utf-16'])
def test_a_wrong_encoding_names_the_file_and_what_to_do(tmp_path, encoding):
    table = write_table(tmp_path/'a.csv', encoding, ',')
    lines = tmp_path/'a.jsonl'
    lines.write_bytes('\n'.join(json.dumps(dict(text=o), ensure_ascii=False) for o in TEXTS).encode(encoding))
    folder = write_folder(tmp_path/'folder', encoding)
    calls = [lambda: read_table(table), lambda: read_table(lines), lambda: read_texts(folder),
             lambda: HFTextDataLoaders.from_csv(table, TOKENIZER), lambda: own_data(folder),
             lambda: HFTextDataLoaders.from_folder(folder, TOKENIZER), lambda: TableOptions().read(table, 42)]
    for call in calls:
        with pytest.raises(DataError, match=r'encoding utf-8. Got .* in line \d.*encoding=') as error:
            call()
        assert any(name in str(error.value) for name in ('a.csv', 'a.jsonl', '.txt'))
    with pytest.raises(DataError, match="known encoding. Got 'klingon'"):
        read_table(table, encoding='klingon')


def test_another_separator_is_named(tmp_path):
    path = write_table(tmp_path/'a.csv', 'utf-8', ';')
    for call in (lambda: HFTextDataLoaders.from_csv(path, TOKENIZER), lambda: own_data(path), lambda: read_texts(path)):
        with pytest.raises(DataError, match="sep=';'.*--sep"):
            call()


@pytest.mark.parametrize('word', ['None', 'null', 'NA', 'nan', 'N/A', 'NULL'])
def test_words_for_missing_values_are_kept_and_named(tmp_path, word):
    path = tmp_path/'a.csv'
    rows = [[word, 'other', 3]]
    for i in range(10):
        stars = i if i%5 else word
        rows.append([f'{word} {i}', word, stars] if i%2 else [f'text {i}', 'other', stars])
    path.write_text('\n'.join(','.join(map(str, row)) for row in [['text', 'label', 'stars'], *rows]))
    with pytest.warns(UserWarning, match=f"text \\('{word}'\\), label"):
        df = read_table(path)
    assert df.text[0] == word and df.text[2] == f'{word} 1'
    assert set(df.label) == {word, 'other'}
    assert df.stars.isna().sum() == 2 and df.stars.dtype == float
    assert read_table(path, keep_default_na=True).text.isna()[0]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        dls = HFTextDataLoaders.from_csv(path, TOKENIZER, **QUIET)
    assert set(dls.spec.classes) == {word, 'other'}


def test_words_among_numbers_are_named(tmp_path):
    path = tmp_path/'a.csv'
    path.write_text('text,label\n' + '\n'.join(f'text {i},{[1, 2, "None"][i%3]}' for i in range(30)))
    with pytest.warns(UserWarning, match=r"label \('None'\); to keep them pass `dtype=\{'label': 'str'\}`"):
        assert read_table(path).label.isna().sum() == 10
    dls = HFTextDataLoaders.from_csv(path, TOKENIZER, dtype=dict(label='str'), **QUIET)
    assert list(dls.spec.classes) == ['1', '2', 'None']


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('values', ['-', ['-'], dict(text='-'), dict(text=['-'])], ids=repr)
def test_own_words_for_missing_values_leave_the_others(tmp_path, values):
    path = tmp_path/'a.csv'
    path.write_text('text,label,stars\nNone,null,1\n-,NA,NA\ngood,,3\n')
    df = read_table(path, na_values=values)
    assert df.text.tolist()[::2] == ['None', 'good'] and pd.isna(df.text[1])
    assert df.label.tolist()[:2] == ['null', 'NA'] and pd.isna(df.label[2])
    assert df.stars.isna().tolist() == [False, True, False]
    of_pandas = read_table(path, na_values=values, keep_default_na=True)
    assert of_pandas.text.isna().tolist() == [True, True, False] and of_pandas.label.isna().all()


@pytest.mark.parametrize('words, said', [(['01', '1', '2'], True), (['01', '1', 'None'], True), (['007', '7'], True),
                                         (['01', '02', '10'], True), (['0', '1', '10'], False)])
def test_codes_with_leading_zeros_stay_as_they_are(tmp_path, words, said):
    path = tmp_path/'a.csv'
    rows = dict(text=[f'text {i}' for i in range(30)], label=(words*15)[:30], n=range(30))
    pd.DataFrame(rows).to_csv(path, index=False)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        df = read_table(path)
        dls = HFTextDataLoaders.from_csv(path, TOKENIZER, **QUIET)
    assert df.n.tolist() == list(range(30)) and df.label.astype(str).tolist() == (words*15)[:30]
    assert [str(c) for c in dls.spec.classes] == sorted(set(words))
    assert any('kept as' in str(w.message) and 'label' in str(w.message) for w in found) is said
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        df = read_table(path, dtype=dict(label='str'))
    assert df.label.tolist() == (words*15)[:30]
    assert not any('leading zeros' in str(w.message) for w in found)


def test_an_empty_cell_is_missing(tmp_path):
    (tmp_path/'a.csv').write_text('text,label\ngood,a\n,b\n')
    with pytest.raises(DataError, match='missing one in row 1'):
        read_texts(tmp_path/'a.csv')


def test_strings_of_json_lines_stay_strings(tmp_path):
    rows = [dict(text=str(i), label=f'{i%2:02}', value=i/2, date='2020-01-01') for i in range(8)]
    (tmp_path/'a.jsonl').write_text('\n'.join(map(json.dumps, rows)), encoding='utf-8-sig')
    df = read_table(tmp_path/'a.jsonl')
    assert df.drop(columns='date').to_dict('records') == [{k: v for k, v in row.items() if k != 'date'} for row in rows]


# ------------------------------------------------------------------ rows with too many fields, columns with one name

@pytest.mark.parametrize('suffix, sep', [('.csv', ','), ('.csv', ';'), ('.tsv', '\t')])
@pytest.mark.parametrize('bad, where', [(0, 'row 0'), (1, 'line 3'), (5, 'line 7')])
def test_a_row_with_one_field_too_many(tmp_path, capsys, suffix, sep, bad, where):
    path = tmp_path/f'a{suffix}'
    rows = [[text, label] for text, label in zip(TEXTS[:8], LABELS)]
    rows[bad].insert(1, 'and more')
    path.write_text('\n'.join(sep.join(row) for row in [['text', 'label'], *rows]))
    options = dict(sep=sep) if sep == ';' else {}
    calls = [lambda: read_table(path, **options), lambda: HFTextDataLoaders.from_csv(path, TOKENIZER, **options),
             lambda: read_table(path, usecols=['text', 'label'], **options),
             lambda: own_data(path, **options), lambda: TableOptions().read(path, 42, **options)]
    for call in calls:
        with pytest.raises(DataError, match=f'a{suffix} must have .* 3 fields instead of 2 in {where}'):
            call()
    assert main(['perplexity', 'no model', '--file', str(path), *(['--sep', ';'] if options else [])]) == 1
    assert f'3 fields instead of 2 in {where}' in capsys.readouterr().err


def test_rows_that_are_all_too_long(tmp_path):
    (tmp_path/'a.csv').write_text('text,label\na,b,c\nd,e,f\n')
    with pytest.raises(DataError, match='3 fields instead of 2 in row 0'):
        read_table(tmp_path/'a.csv')
    assert read_table(tmp_path/'a.csv', index_col=0).text.tolist() == ['b', 'e']


def test_a_column_name_twice_in_a_file(tmp_path):
    (tmp_path/'a.csv').write_text('text,label,text,note,note\na,x,b,1,2\nc,y,d,3,4\n')
    df = read_table(tmp_path/'a.csv')
    with pytest.raises(DataError, match="one column 'text'"):
        column(df, 'text')
    assert column(df, 'label').tolist() == ['x', 'y']
    (tmp_path/'b.csv').write_text('text,label,text.1\na,x,b\n')
    assert column(read_table(tmp_path/'b.csv'), 'text').tolist() == ['a']


def test_options_of_the_reader_are_none_of_ours():
    import inspect
    ours = [HFTextDataLoaders.from_df, HFSeq2SeqDataLoaders.from_df, HFMaskedLMDataLoaders.from_texts,
            HFCausalLMDataLoaders.from_texts, ULMFiT.pretrain, ULMFiT.finetune_lm, ULMFiT.classifier]
    for function in ours:
        assert not pop_reader_options(dict(inspect.signature(function).parameters)), function


def test_options_of_the_reader_without_a_file(tmp_path):
    df = pd.DataFrame(dict(text=TEXTS, label=LABELS))
    run = ULMFiT(tmp_path, progress=False)
    for call in (lambda: read_texts(df, encoding='cp1252'), lambda: run.finetune_lm(df, sep=';'),
                 lambda: run.classifier(df, sep=';')):
        with pytest.raises(DataError, match='need the path of a file'):
            call()


# ------------------------------------------------------------------ the command line

@pytest.fixture
def seen(monkeypatch):
    "The texts that the command `perplexity` would score"
    import fastai_tl.commands.language_models as module

    class Stop(Exception):
        pass

    def score(model, texts, **kwargs):
        found.append(list(texts))
        raise Stop
    found = []
    monkeypatch.setattr(module, 'text_perplexity', score)

    def run(*args):
        with pytest.raises(Stop):
            main(['perplexity', 'model', *args])
        return found[-1]
    return run


class Stdin:
    "Standard input with the bytes of a file"
    def __init__(self, data):
        import io
        self.buffer = io.BytesIO(data)


@pytest.mark.parametrize('encoding, options', ENCODINGS)
def test_command_line(tmp_path, seen, monkeypatch, encoding, options):
    args = [o for name, value in options.items() for o in (f'--{name}', value)]
    table = write_table(tmp_path/'a.CSV', encoding, ';')
    assert seen('--file', str(table), '--sep', ';', *args) == TEXTS
    lines = tmp_path/'a.txt'
    odd = ['ein\u2028Text', *TEXTS]
    content = '\r\n'.join(odd) if encoding != 'cp1252' else '\r\n'.join(TEXTS)
    lines.write_bytes(content.encode(encoding))
    assert seen('--file', str(lines), *args) == content.split('\r\n')
    monkeypatch.setattr(sys, 'stdin', Stdin(lines.read_bytes()))
    assert seen(*args) == content.split('\r\n')


def test_command_line_says_what_to_do(tmp_path, monkeypatch, capsys):
    lines = tmp_path/'a.txt'
    lines.write_bytes('schön'.encode('cp1252'))
    for args, name in ((['--file', str(lines)], 'a.txt'), ([], 'Standard input')):
        monkeypatch.setattr(sys, 'stdin', Stdin(lines.read_bytes()))
        assert main(['perplexity', 'model', *args]) == 1
        assert f'{name} must be in the encoding utf-8' in capsys.readouterr().err


def test_settings_file_with_byte_order_mark(tmp_path):
    (tmp_path/'s.ini').write_text('[fastai_tl]\nlabel_delim = ;\nsep = \\t\nencoding = cp1252\n', encoding='utf-8-sig')
    assert read_settings(tmp_path/'s.ini') == dict(label_delim=';', sep='\t', encoding='cp1252')


# ------------------------------------------------------------------ several labels in one cell

def test_several_labels_are_detected_and_said(tmp_path):
    names = ['a', 'b', 'c', 'd']
    sets = [[n for k, n in enumerate(names) if i >> k & 1] for i in range(1, 15)] # 14 combinations
    for delim in (';', '|', ',', '; ', '、'):
        labels = [delim.join(o) for o in sets*3]
        pd.DataFrame(dict(text=[f'text {i}' for i in range(42)], label=labels)).to_csv(tmp_path/'a.csv', index=False)
        for call in (lambda: HFTextDataLoaders.from_csv(tmp_path/'a.csv', TOKENIZER, **QUIET),
                     lambda: TableOptions().read(tmp_path/'a.csv', 42), lambda: own_data(tmp_path/'a.csv')):
            with pytest.warns(UserWarning, match=f'separator {delim.strip()!r}.*14 combinations.*label_delim'):
                call()
        dls = HFTextDataLoaders.from_csv(tmp_path/'a.csv', TOKENIZER, label_delim=delim.strip(), **QUIET)
        assert (dls.spec.task, list(dls.spec.classes)) == ('multilabel', names)


@pytest.mark.parametrize('labels', [['a', 'b'], ['Trade, retail', 'Trade, other', 'Mining'], ['n/a', 'yes', 'no'],
                                    ['2020-01-01', '2020-01-02'], [1, 2],
                                    ['New York', 'New Jersey', 'York'], ['good', 'very good', 'bad', 'very bad'],
                                    ['C/C++', 'Java', 'C#']])
def test_one_label_is_not_taken_for_several(labels):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert check_labels(labels*3)[1] == 'classification'


def test_labels_apart_by_a_space_are_detected():
    labels = ['food', 'room', 'staff', 'bar', 'food room', 'food staff', 'food bar', 'room staff', 'room bar']
    labels.append('bar staff')
    with pytest.warns(UserWarning, match="separator ' '; now each of the 10 combinations is a class"):
        check_labels(labels*3)
    assert check_labels(labels[4:6], label_delim=' ')[0] == [['food', 'room'], ['food', 'staff']]


# ------------------------------------------------------------------ lone surrogates

def test_lone_surrogates_are_replaced_once_and_said_once():
    bad, good = 'half \ud83d of one', 'half \ufffd of one'
    texts = [bad, 'plain', 'pair \ud83d\ude00'] + TEXTS
    with pytest.warns(UserWarning, match='row 0;') as said:
        assert check_texts(texts) == [good, 'plain', 'pair 😀', *TEXTS]
    assert len(said) == 1
    labels = (LABELS + ['gut', 'schlecht', 'gut'])[:len(texts)]
    with pytest.warns(UserWarning, match='surrogates'):
        dls = HFTextDataLoaders.from_lists(texts, labels, TOKENIZER, **QUIET)
    assert good in all_texts(dls)
    with pytest.warns(UserWarning, match='surrogates'):
        dl = dls.test_dl([bad])
    assert dl.dataset[0][0].ids.tolist() == TOKENIZER(good)['input_ids']
    for text in ('', 'a', 'ä', '😀', '\ufeffa'):
        assert valid_text(text) is text
    for text in ('\udc00', 'a\ud800', '\ud800\ud800\udc00'):
        assert valid_text(text) == text.encode('utf-16-le', 'surrogatepass').decode('utf-16-le', 'replace')


def test_lone_surrogates_in_words_answers_and_pairs():
    with pytest.warns(UserWarning, match='surrogates'):
        dls = HFTagDataLoaders.from_lists([['a\ud800', 'b']]*8, [['B-X', 'O']]*8, TOKENIZER, verbose=False)
    assert dls.train_ds.items[0][0] == ['a\ufffd', 'b']
    context = 'x \ud83d\ude00 y \ud800 the answer \udfff'
    with pytest.warns(UserWarning, match='surrogates'):
        example, = check_answers(['q?'], [context], ['the answer'], [context.index('the answer')])
    start, = example.starts
    assert example.context[start:start+10] == 'the answer'
    with pytest.warns(UserWarning, match='surrogates'):
        pairs = HFSeq2SeqDataLoaders.from_lists(['a\ud800']*4, ['b']*4, TOKENIZER, verbose=False)
    assert all_texts(pairs) == ['a\ufffd']*4


@pytest.mark.parametrize('kind', ['transformer', 'ulmfit'])
def test_quickstart_with_several_labels(tmp_path, kind, capsys):
    from transformers import BertConfig, BertForSequenceClassification

    from fastai_tl.quickstart.run import run_quickstart
    names = dict(good='好吃', cheap='便宜', loud='很吵')
    rows = []
    for i in range(56):
        chosen = [name for k, name in enumerate(names) if (i%7 + 1) >> k & 1]
        text = '，'.join(names[name] for name in chosen) + f'，第{i}次'
        rows.append(dict(text=text, label=';'.join(chosen)))
    pd.DataFrame(rows).to_csv(tmp_path/'a.csv', index=False, sep='|', encoding='big5')
    options = dict(data=tmp_path/'a.csv', sep='|', encoding='big5', label_delim=';', progress=False)
    if kind == 'ulmfit':
        options |= dict(lang='zh-tw', config=dict(emb_sz=8, n_hid=8, n_layers=1), epochs=[1, 1, 1], rates=[.01],
                        scratch_rates=[.01], lm=dict(epochs=1, bs=8))
    else:
        tokenizer = train_tokenizer([row['text'] for row in rows], 400)
        model = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1,
                                                         num_attention_heads=2, intermediate_size=16))
        model.save_pretrained(tmp_path/'m')
        tokenizer.save_pretrained(tmp_path/'m')
        options |= dict(model=tmp_path/'m', epochs=[1], rates=[1e-3], bs=8, max_length=40)
    summary = run_quickstart(tmp_path/'out', **options)
    assert summary['classes'] == sorted(names) and summary['label_delim'] == ';'
    assert summary['baseline_accuracy'] > .9 # the words name the labels
    capsys.readouterr()
    main(['predict', str(tmp_path/'out'), '好吃，很吵', '便宜'])
    for line in capsys.readouterr().out.splitlines():
        labels, probs, text = line.split('\t')
        found = [label for label in labels.split(',') if label]
        assert set(found) <= set(names) and len(found) == len([p for p in probs.split(',') if p])
        assert all(float(p) >= .5 for p in probs.split(',') if p)
