"Tables of errors name the rows as the user's table does: by its index, or by their number in a file"

import re

import numpy as np
import pandas as pd
import pytest
from fastcore.test import test_eq as eq
from transformers import BertConfig

from fastai_tl.all import (
    Evaluation,
    HFQADataLoaders,
    HFTagDataLoaders,
    HFTextDataLoaders,
    cross_validate,
    docstring_corpus,
    hf_classifier_learner,
    hf_qa_learner,
    hf_tagger_learner,
    own_data,
    seed_everything,
    time_series_validate,
    train_tokenizer,
)
from fastai_tl.core import DataError


@pytest.fixture(scope='module')
def table():
    "60 rows of two classes, whose index is made of words in a random order, and their split"
    df = docstring_corpus()
    df = df[df.label.isin(['notes', 'parameter'])].groupby('label').head(30).sample(frac=1, random_state=1)
    df.index = [f'id{i}' for i in np.random.default_rng(0).permutation(60)]
    return df.assign(split=['train', 'valid', 'test'] * 20)[['text', 'label', 'split']]


@pytest.fixture(scope='module')
def learn(table):
    tokenizer = train_tokenizer(table.text, 400, max_length=24)
    config = BertConfig(
        vocab_size=400, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    dls = HFTextDataLoaders.from_df(table, tokenizer, valid_col='split', max_length=24, bs=8, verbose=False)
    seed_everything(42)
    return hf_classifier_learner(dls, config)


def check(rows, table):
    "The texts and labels of a table of errors are those of the rows that it names"
    assert len(rows) and len(set(rows.row)) == len(rows)
    eq(list(rows.text), list(table.loc[list(rows.row)].text))
    if 'true' in rows:
        eq(list(rows.true), list(table.loc[list(rows.row)].label))


@pytest.mark.parametrize('ds_idx, part', [(0, 'train'), (1, 'valid')])
def test_rows_of_the_learner(learn, table, ds_idx, part):
    "The Learner's own rows have the index of the table that its DataLoaders were made from"
    ev = learn.evaluate(ds_idx)
    eq(ev.row_labels, list(table.index[table.split == part]))
    for rows in (ev.to_frame(), ev.to_frame(errors=True), ev.top_losses(5)):
        check(rows, table)


def test_rows_of_a_table(learn, table, tmp_path):
    "A table that is evaluated gives its index to every table of errors, the page and the files"
    test = table[table.split == 'test']
    ev = learn.evaluate(test)
    for rows in (ev.to_frame(), ev.to_frame(errors=True), ev.top_losses(5), ev.leaked_rows(list(test.text))):
        check(rows, test)
    probs = np.eye(2)[[0, 1] * 10] * 0.8 + 0.1
    swapped = Evaluation.from_preds(probs, [1, 0] + [0, 1] * 9, ['a', 'b'], texts=list(test.text))
    suspects = swapped.with_row_labels(test.index).label_errors()
    check(suspects, test)
    eq(set(suspects.row), set(test.index[:2]))
    page = ev.save(tmp_path / 'report', figures=[]).read_text(encoding='utf-8')
    worst = ev.to_frame(errors=True).row.iloc[0]
    assert f'>{worst}<' in page and 'df.loc[row]' in page
    saved = pd.read_csv(tmp_path / 'report' / 'predictions.csv', index_col='row')
    eq(list(saved.index), list(test.index))


def test_explained_errors_belong_to_their_rows(learn, table):
    "An explanation is that of the row which the page names"

    class Shown:
        def __init__(self, text):
            self.text = text

        def _repr_html_(self):
            return f'<i>{self.text[:20]}</i>'

    test = table[table.split == 'test'].assign(text=[f'{i} text' for i in range(20)])
    page = learn.evaluate(test).to_html(figures={}, attributions=[Shown(text) for text in test.text])
    shown = re.findall(r'row (id\d+): .*?<i>(.*?)</i>', page)
    assert shown
    eq([text for _, text in shown], list(test.loc[[row for row, _ in shown]].text))


def test_other_probabilities_keep_the_labels(learn, table):
    "Calibration and thresholds change predictions, not rows"
    ev = learn.evaluate(table[table.split == 'test'])
    eq(ev.with_probs(ev.probs).row_labels, ev.row_labels)
    eq(ev.with_thresholds(ev.thresholds()).row_labels, ev.row_labels)


def test_lists_have_positions(learn, table):
    "Rows without a table are numbered from 0"
    test = table[table.split == 'test']
    eq(learn.evaluate(list(test.text), list(test.label)).row_labels, list(range(20)))


def test_wrong_number_of_labels():
    ev = Evaluation.from_preds(np.eye(2), [0, 1], ['a', 'b'])
    with pytest.raises(DataError, match='3 labels for 2 rows'):
        ev.with_row_labels([1, 2, 3])


def test_quickstart_keeps_the_labels(table, tmp_path):
    "Rows of a table keep its index, those of a file are numbered from 0, whatever their split is"
    eq(list(own_data(table).labelled.index), list(table.index))
    table.to_csv(tmp_path / 'mine.csv', index=False)
    labelled = own_data(tmp_path / 'mine.csv').labelled
    eq(list(labelled.index), list(range(60)))
    eq(list(labelled[labelled.split == 'test'].text), list(table[table.split == 'test'].text))


def test_tagged_sentences(small_tokenizers):
    "Wrong entities name the sentence by the index of its table: the Learner's own rows, and a new table"
    from small_learners import TEXTS, bert

    words = [text.split() for text in TEXTS]
    df = pd.DataFrame(dict(tokens=words, tags=[['B-X' if w == 'film' else 'O' for w in sent] for sent in words]))
    df.index = [f's{i}' for i in np.random.default_rng(0).permutation(len(df))]
    df['valid'] = [i % 2 == 0 for i in range(len(df))]
    dls = HFTagDataLoaders.from_df(df, small_tokenizers['encoder'], valid_col='valid', bs=4, verbose=False)
    seed_everything(42)
    learn = hf_tagger_learner(dls, bert(small_tokenizers['encoder']), metrics=[])
    for ds_idx, part in enumerate((df[~df.valid], df[df.valid])):
        eq(learn.evaluate(ds_idx).row_labels, list(part.index))
    ev = learn.evaluate(df[df.valid])
    errors = ev.errors()
    assert len(errors)
    for row in errors.itertuples():
        eq(' '.join(df.tokens[row.row][row.first : row.last + 1]), row.text)
    eq(learn.evaluate(words, list(df.tags)).row_labels, list(range(len(df))))


def test_answers(small_tokenizers):
    "The worst answers name the question by the index of its table"
    from small_learners import TEXTS, bert

    contexts = [f'{text} at noon' for text in TEXTS]
    df = pd.DataFrame(dict(question=[f'when {i}' for i in range(len(TEXTS))], context=contexts, answer='noon'))
    df.index = [f'q{i}' for i in np.random.default_rng(0).permutation(len(df))]
    df['valid'] = [i % 2 == 0 for i in range(len(df))]
    dls = HFQADataLoaders.from_df(
        df, small_tokenizers['encoder'], valid_col='valid', bs=4, max_length=48, stride=8, verbose=False
    )
    learn = hf_qa_learner(dls, bert(small_tokenizers['encoder']), metrics=[])
    for ev in (learn.evaluate(1), learn.evaluate(df[df.valid])):
        worst = ev.worst()
        eq(list(worst.question), list(df.loc[list(worst.row)].question))
        eq(ev.row_labels, list(df[df.valid].index))


def test_cross_validation(table):
    "Out-of-fold predictions have the index of the table, also where only later rows are validated"
    df = table.assign(time=range(len(table)))

    def majority(train, valid, seed):
        names = sorted(df.label.unique())
        probs = np.tile([0.9, 0.1], (len(valid), 1))
        return Evaluation.from_preds(probs, list(valid.label), names, texts=list(valid.text))

    for results in (
        cross_validate(majority, df, n_folds=3, progress=False),
        time_series_validate(majority, df, 'time', n_folds=3, progress=False),
    ):
        ev = results.evaluation()
        eq(ev.row_labels, list(df.index[results.rows]))
        check(ev.to_frame(errors=True), df)
