"""Tables, strings and dictionaries where lists are meant; missing values of any type; any type of column."""

import decimal
import warnings

import numpy as np
import pandas as pd
import pytest
from transformers import BertConfig, GPT2Config

from fastai_tl.all import *
from fastai_tl.data.chinese import char_shares, train_chinese_tokenizer, train_subwords
from fastai_tl.core import FastaiTLError
from fastai_tl.datasets.quickstart import majority_accuracy
from fastai_tl.data.tables import check_items, check_texts, column, is_missing, question_pairs

WORDS = 'the film was very good bad dull fine plot actor scene slow bright ending'.split()
TEXTS = [f'{WORDS[i%14]} {WORDS[(i*5+3)%14]} text {i}' for i in range(40)]
LABELS = ['a', 'b']*20
TOKENIZER = train_tokenizer(TEXTS, 300)
QUIET = dict(verbose=False, bs=8)
DF = pd.DataFrame(dict(text=TEXTS, label=LABELS))


def bert(**kwargs):
    return BertConfig(vocab_size=len(TOKENIZER), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                      intermediate_size=16, max_position_embeddings=64, pad_token_id=TOKENIZER.pad_token_id, **kwargs)


@pytest.fixture(scope='module')
def learn():
    seed_everything(0)
    return hf_classifier_learner(HFTextDataLoaders.from_df(DF, TOKENIZER, **QUIET), bert())


@pytest.fixture(scope='module')
def ulm_learn(tmp_path_factory):
    run = ULMFiT(tmp_path_factory.mktemp('run'), config=dict(emb_sz=8, n_hid=8, n_layers=1), progress=False, min_freq=1)
    return run.classifier(DF, encoder=None, epochs=[1], groups=[1], bs=8)


# what is not a list of texts, and what the message calls it
NO_LISTS = [('one string', 'one str'), (b'bytes', 'one bytes'), (dict(text=TEXTS), 'a dict with the keys text'),
            (3, 'a int'), (None, 'a NoneType')]


# ------------------------------------------------------------------ predictions

@pytest.mark.parametrize('which', ['learn', 'ulm_learn'])
def test_a_table_is_read_by_the_columns_of_the_data(which, request):
    learn = request.getfixturevalue(which)
    want = learn.predict_batch(TEXTS[:6]).probs
    table = pd.DataFrame(dict(other='x', label=LABELS[:6], text=TEXTS[:6]), index=range(10, 16))
    np.testing.assert_allclose(learn.predict_batch(table).probs, want)
    predictor = Predictor(learn)
    np.testing.assert_allclose(predictor.predict_proba(table), want, atol=1e-6)
    streamed = [list(o.probs.values()) for o in predictor.predict_iter(table, size=4)]
    np.testing.assert_allclose(streamed, want, atol=1e-6)
    probs, _ = learn.get_preds(dl=learn.dls.test_dl(table))
    np.testing.assert_allclose(probs, want, atol=1e-5)
    assert len(learn.predict_batch(table[:0])) == 0 and len(learn.predict_batch([])) == 0
    with pytest.raises(DataError, match="must have a column 'text'"):
        learn.predict_batch(table.drop(columns='text'))
    with pytest.raises(DataError, match="one column 'text'"):
        learn.predict_batch(pd.concat([table, table[['text']]], axis=1))


@pytest.mark.parametrize('which', ['learn', 'ulm_learn'])
@pytest.mark.parametrize('given, message', NO_LISTS)
def test_what_is_no_list_is_refused(which, given, message, request):
    learn = request.getfixturevalue(which)
    predictor = Predictor(learn)
    calls = [learn.predict_batch, learn.dls.test_dl, predictor.predict, predictor.scores,
             lambda o: list(predictor.predict_iter(o)), lambda o: learn.evaluate(o, LABELS)]
    for call in calls[:-1] if given in (None, 3) else calls: # those are no data of `evaluate`
        with pytest.raises(DataError, match=f'list of texts is needed. Got {message}'):
            call(given)


@pytest.mark.parametrize('which', ['learn', 'ulm_learn'])
def test_one_text_is_one_string(which, request):
    learn = request.getfixturevalue(which)
    for item in (DF, DF.text, dict(text='a'), 3, None, pd.NA, b'a'):
        with pytest.raises(DataError), learn.no_bar():
            learn.predict(item)
    with pytest.raises(DataError, match='At least one'):
        learn.dls.test_dl([])


def test_a_list_of_two_texts_is_no_pair(learn):
    with pytest.raises(DataError, match='For a list of texts use `learn.predict_batch'), learn.no_bar():
        learn.predict(['good', 'bad'])
    with pytest.raises(DataError, match='single texts'):
        learn.dls.test_dl([['good', 'bad']])
    with pytest.raises(DataError, match='row 1'):
        learn.dls.test_dl(['good', pd.NA])


# ------------------------------------------------------------------ making DataLoaders

FACTORIES = dict(
    classification=lambda t: HFTextDataLoaders.from_lists(t, LABELS, TOKENIZER, **QUIET),
    masked_lm=lambda t: HFMaskedLMDataLoaders.from_texts(t, TOKENIZER),
    causal_lm=lambda t: HFCausalLMDataLoaders.from_texts(t, TOKENIZER),
    sources=lambda t: HFSeq2SeqDataLoaders.from_lists(t, TEXTS, TOKENIZER, verbose=False),
    targets=lambda t: HFSeq2SeqDataLoaders.from_lists(TEXTS, t, TOKENIZER, verbose=False),
    words=lambda t: HFTagDataLoaders.from_lists(t, [['O', 'B-X']]*40, TOKENIZER, verbose=False),
    tags=lambda t: HFTagDataLoaders.from_lists([['a', 'b']]*40, t, TOKENIZER, verbose=False),
    questions=lambda t: HFQADataLoaders.from_lists(t, TEXTS, TEXTS, TOKENIZER, verbose=False),
    contexts=lambda t: HFQADataLoaders.from_lists(TEXTS, t, TEXTS, TOKENIZER, verbose=False),
    answers=lambda t: HFQADataLoaders.from_lists(TEXTS, TEXTS, t, TOKENIZER, verbose=False),
    labels=lambda t: HFTextDataLoaders.from_lists(TEXTS, t, TOKENIZER, **QUIET),
    split=lambda t: HFTextDataLoaders.from_lists(TEXTS, LABELS, TOKENIZER, valid=t, **QUIET))


@pytest.mark.parametrize('name', FACTORIES)
@pytest.mark.parametrize('given', ['one string', dict(text=TEXTS), DF], ids=['string', 'dict', 'table'])
def test_factories_refuse_what_is_no_list(name, given):
    with pytest.raises(DataError, match=r'A list of .* is needed. Got (one str|a dict with|a DataFrame with)'):
        FACTORIES[name](given)


@pytest.mark.parametrize('given', [TEXTS, {'text': TEXTS}, 'a.csv', DF.text], ids=['list', 'dict', 'path', 'series'])
def test_from_df_needs_a_table(given):
    for cls in (HFTextDataLoaders, HFMaskedLMDataLoaders, HFCausalLMDataLoaders, HFSeq2SeqDataLoaders, HFTagDataLoaders,
                HFQADataLoaders):
        with pytest.raises(DataError, match='A DataFrame is needed'):
            cls.from_df(given, TOKENIZER)


def test_columns_with_one_name(tmp_path):
    run = ULMFiT(tmp_path, progress=False)
    for name in ('text', 'label'):
        twice = pd.concat([DF, DF[[name]]], axis=1)
        for call in (lambda: HFTextDataLoaders.from_df(twice, TOKENIZER), lambda: run.classifier(twice)):
            with pytest.raises(DataError, match=f"one column '{name}'"):
                call()
    twice = pd.concat([DF, DF[['text']]], axis=1)
    for call in (lambda: read_texts(twice), lambda: run.finetune_lm(twice), lambda: run.pretrain(twice),
                 lambda: HFMaskedLMDataLoaders.from_df(twice, TOKENIZER)):
        with pytest.raises(DataError, match="one column 'text'"):
            call()


# ------------------------------------------------------------------ questions, sentences, prompts

def test_questions():
    table = pd.DataFrame(dict(context=['the plot', 'a scene'], question=['what?', 'which?'], more=[1, 2]))
    want = [('what?', 'the plot'), ('which?', 'a scene')]
    assert question_pairs(table) == question_pairs(want) == question_pairs(table.to_dict('records')) == want
    for wrong in (['ab'], [{'a': 'x', 'b': 'y'}], [('a', 'b', 'c')], [('a', None)], [{'a', 'b'}], [3]):
        with pytest.raises(DataError, match='in item 0'):
            question_pairs(wrong)
    df = pd.DataFrame(dict(question=['what is it?']*8, context=['it is the plot of the film']*8, answer=['the plot']*8))
    learn = hf_qa_learner(HFQADataLoaders.from_df(df, TOKENIZER, max_length=40, stride=8, **QUIET), bert())
    pair = dict(question='what is it?', context='it is the plot')
    assert learn.predict(pair).text == learn.predict(tuple(pair.values())).text == learn.answers([pair])[0].text
    assert len(learn.answers(df)) == 8
    for wrong in ('ab', ['what is it?', 'the plot'], pair):
        with pytest.raises(DataError):
            learn.answers(wrong)
        with pytest.raises(DataError):
            learn.dls.test_dl(wrong)


def test_sentences():
    df = pd.DataFrame(dict(tokens=[['the', 'plot'], ['a', 'film']]*8, tags=[['O', 'B-X']]*16))
    learn = hf_tagger_learner(HFTagDataLoaders.from_df(df, TOKENIZER, **QUIET), bert())
    want = [o.tags for o in learn.tag(list(df.tokens[:3]))]
    assert [o.tags for o in learn.tag(df[:3])] == want
    wrong = ['the plot', dict(tokens=['a']), 3]
    for given in wrong:
        for call in (learn.tag, learn.dls.test_dl):
            with pytest.raises(FastaiTLError):
                call(given)
    for given in ([dict(tokens='a')], [['a', None]], [['a', pd.NA]], [df], [3]):
        for call in (learn.tag, learn.dls.test_dl):
            with pytest.raises(DataError):
                call(given)


@pytest.fixture(scope='module')
def causal():
    tokenizer = train_tokenizer(TEXTS, 300, kind='decoder')
    dls = HFCausalLMDataLoaders.from_texts(TEXTS, tokenizer, max_length=16, bs=4)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=16, n_layer=1, n_head=2)
    return hf_causal_lm_learner(dls, config)


def test_prompts_and_perplexity(causal):
    for given in (DF[['label', 'text']], dict(text='a'), 3):
        with pytest.raises(DataError):
            causal.generate(given, max_new_tokens=2)
        with pytest.raises(DataError, match='One text is needed'):
            causal.predict(given)
    for given in (dict(text=TEXTS), 3):
        with pytest.raises(DataError, match='list of texts'):
            causal.perplexity(given)
    assert causal.perplexity(DF).corpus.equals(causal.perplexity(TEXTS).corpus)


# ------------------------------------------------------------------ missing values and types of columns

MISSING = [None, float('nan'), np.float32('nan'), pd.NA, pd.NaT, decimal.Decimal('nan')]


@pytest.mark.parametrize('missing', MISSING, ids=repr)
def test_a_missing_value_in_any_column(missing):
    assert is_missing(missing)
    values = pd.Series([*LABELS[:-1], missing], dtype=object)
    for name, what in (('text', 'missing one in row 39'), ('label', 'none in row 39')):
        with pytest.raises(DataError, match=what):
            HFTextDataLoaders.from_df(DF.assign(**{name: values}), TOKENIZER)
    split = pd.Series(['train']*30 + ['valid']*9 + [missing], dtype=object)
    with pytest.raises(DataError, match='in row 39'):
        HFTextDataLoaders.from_df(DF.assign(split=split), TOKENIZER, valid_col='split')
    with pytest.raises(DataError, match='in row 0'):
        check_labels([['a', missing], ['b']])
    with pytest.raises(DataError):
        check_items(['a', missing])


@pytest.mark.parametrize('dtype', ['object', 'string', 'string[pyarrow]', 'category'])
def test_missing_cells_of_several_labels_are_named(dtype):
    labels = pd.array([None if i < 2 else ['x;y', 'y', ''][i%3] for i in range(40)], dtype='object')
    df = pd.DataFrame(dict(text=TEXTS, label=pd.Series(labels).astype(dtype)))
    with pytest.warns(UserWarning, match='Missing labels .* in row 0, 1;'):
        dls = HFTextDataLoaders.from_df(df, TOKENIZER, label_delim=';', **QUIET)
    assert list(dls.spec.classes) == ['x', 'y']
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert check_labels(df.label[2:], label_delim=';')[0][:3] == [[], ['x', 'y'], ['y']]
    for options in (dict(task='classification', label_delim=';'), dict(task='regression', label_delim=';'), {}):
        with pytest.raises(DataError, match='none in row 1'):
            check_labels(['1', None], **options)


SPLIT = [i%5 == 0 for i in range(40)]
STRINGS = ['object', 'string', 'string[python]', 'string[pyarrow]', 'category', 'large_string[pyarrow]']


def of_type(values, dtype):
    import pyarrow
    return pd.Series(values, dtype=pd.ArrowDtype(pyarrow.large_string()) if dtype.startswith('large') else dtype)


@pytest.mark.parametrize('dtype', STRINGS)
def test_string_columns_of_any_type(dtype):
    words = ['valid' if o else 'train' for o in SPLIT]
    df = pd.DataFrame({name: of_type(o, dtype) for name, o in dict(text=TEXTS, label=LABELS, split=words).items()})
    dls = HFTextDataLoaders.from_df(df, TOKENIZER, valid_col='split', **QUIET)
    plain = HFTextDataLoaders.from_lists(TEXTS, LABELS, TOKENIZER, valid=SPLIT, **QUIET)
    assert list(map(list, dls.valid_ds.items)) == list(map(list, plain.valid_ds.items))
    assert dls.spec.classes == plain.spec.classes == ('a', 'b')
    for name in df:
        column_with_gap = df[name].astype(object).where(df.index != 7, None)
        gap = of_type(column_with_gap, dtype)
        with pytest.raises(DataError, match='row 7'):
            HFTextDataLoaders.from_df(df.assign(**{name: gap}), TOKENIZER, valid_col='split', **QUIET)


@pytest.mark.parametrize('dtype', ['bool', 'boolean', 'bool[pyarrow]', 'Int64', 'int64[pyarrow]', 'Float64', 'object'])
def test_split_columns_of_any_type(dtype):
    df = DF.assign(split=pd.Series(SPLIT).astype(dtype))
    dls = HFTextDataLoaders.from_df(df, TOKENIZER, valid_col='split', **QUIET)
    assert [item[0] for item in dls.valid_ds.items] == TEXTS[::5]
    if dtype != 'bool':
        gap = df.assign(split=df.split.where(df.index != 7, None))
        with pytest.raises(DataError, match='row 7'):
            HFTextDataLoaders.from_df(gap, TOKENIZER, valid_col='split', **QUIET)


@pytest.mark.parametrize('dtype', ['int64', 'Int64', 'int64[pyarrow]', 'category'])
def test_number_labels_of_any_type(dtype):
    labels, task = check_labels(pd.Series([1, 2]*5).astype(dtype))
    assert (labels, task) == ([1, 2]*5, 'classification') and {type(o) for o in labels} == {int}


@pytest.mark.parametrize('dtype', ['float64', 'Float64', 'double[pyarrow]', 'object', 'decimal'])
def test_values_of_any_type(dtype):
    import pyarrow
    values = pd.Series([.5, 1.25, 2.]*4)
    if dtype == 'decimal':
        column_ = pd.Series([decimal.Decimal(str(o)) for o in values], dtype=pd.ArrowDtype(pyarrow.decimal128(8, 4)))
    else:
        column_ = values.astype(dtype)
    assert check_labels(column_) == (values.tolist(), 'regression')
    for bad in ('nan', 'inf', float('inf')):
        with pytest.raises(DataError, match='row 1'):
            check_labels([.5, bad], task='regression')


def test_labels_that_are_intervals_or_dates():
    bins = pd.cut(pd.Series(range(40)), [-1, 19, 40])
    dls = HFTextDataLoaders.from_df(DF.assign(label=bins), TOKENIZER, **QUIET)
    assert list(dls.spec.classes) == ['(-1, 19]', '(19, 40]']
    learn = hf_classifier_learner(dls, bert())
    assert len(learn.evaluate(DF.assign(label=bins))) == 40
    days = pd.Series(pd.to_datetime(['2020-01-01', '2020-01-02']*2))
    assert check_labels(days)[0] == [str(o) for o in days]
    with pytest.raises(DataError, match='none in row 1'):
        check_labels(pd.cut(pd.Series([1, 99]), [0, 5]))


def test_lists_in_columns_of_arrow():
    import pyarrow
    lists = pd.ArrowDtype(pyarrow.list_(pyarrow.string()))
    df = pd.DataFrame(dict(tokens=[['the', 'plot']]*8, tags=[['O', 'B-X']]*8)).astype(lists)
    dls = HFTagDataLoaders.from_df(df, TOKENIZER, verbose=False)
    assert list(dls.train_ds.items[0]) == [['the', 'plot'], ['O', 'B-X']]
    gap = df.assign(tokens=pd.Series([['the', 'plot']]*7 + [None], dtype=lists))
    with pytest.raises(DataError, match='row 7'):
        HFTagDataLoaders.from_df(gap, TOKENIZER, verbose=False)


def test_missing_values_of_slices(learn):
    ev = learn.evaluate(DF)
    for values in (pd.array([1, 2, None, 4]*10, dtype='Int64'), pd.array([True, None]*20, dtype='boolean'),
                   pd.array(['x', None]*20, dtype='string'), pd.cut(pd.Series([1, 9, None, 4]*10), [0, 5, 10])):
        table = ev.error_slices(pd.Series(values, name='column'), min_rows=1)
        assert table.rows.sum() == 40
        assert table.set_index('value').rows['missing'] == pd.Series(values).isna().sum()


def test_rows_are_named_where_the_index_is_not_unique():
    df = pd.concat([DF, DF.iloc[:2].assign(text=[5, 'x'])])
    with pytest.raises(DataError, match=r'a int in row 0 \(position 40\)'):
        HFTextDataLoaders.from_df(df, TOKENIZER)
    with pytest.raises(DataError, match=r'none in row 1 \(position 41\)'):
        check_labels([*LABELS, 'a', None], df.index)
    assert column(df, 'text').iloc[41] == 'x'


# ------------------------------------------------------------------ functions that take lists of texts or of tags

LIST_FUNCTIONS = dict(
    train_tokenizer=lambda x: train_tokenizer(x, 300),
    drop_near_duplicates=drop_near_duplicates,
    near_duplicates=near_duplicates,
    text_windows=lambda x: text_windows(x, TOKENIZER, 8, 2),
    char_shares=char_shares,
    split_rows=lambda x: split_rows(x, 'classification'),
    tag_scheme=tag_scheme,
    tag_spans=tag_spans,
    entity_scores=lambda x: entity_scores(x, [['B-X', 'O']]),
    entity_scores_of_truth=lambda x: entity_scores([['B-X', 'O']], x),
    one_sentence=lambda x: entity_scores([x], [x]),
    tag_evaluation=lambda x: TagEvaluation(x, x),
    one_sentence_of_an_evaluation=lambda x: TagEvaluation([x], [x]),
    words_of_an_evaluation=lambda x: TagEvaluation([['O']], [['O']], x))


@pytest.mark.parametrize('name', LIST_FUNCTIONS)
@pytest.mark.parametrize('given', ['B-X O', {'B-X': 1, 'O': 2}, DF], ids=['string', 'dict', 'table'])
def test_functions_of_lists_refuse_what_is_no_list(name, given):
    with pytest.raises(DataError, match=r'A list of .* is needed. Got (one str|a dict with|a DataFrame with)'):
        LIST_FUNCTIONS[name](given)


@pytest.mark.parametrize('train', [lambda x: train_chinese_tokenizer(x, 300), lambda x: train_subwords(x, 300)])
def test_chinese_tokenizers_refuse_what_is_no_list(train):
    for given in ('中文字', {'中文字': 1}, pd.DataFrame({'中文字': ['中文字']})):
        with pytest.raises(DataError, match='list'):
            train(given)


def test_lists_of_any_type_are_read():
    tags = ['B-X', 'I-X', 'O']
    for given in (tags, tuple(tags), np.array(tags), pd.Series(tags), iter(tags)):
        assert tag_spans(given) == [('X', 0, 2)]
    for given in (TEXTS, tuple(TEXTS), np.array(TEXTS), DF.text, (text for text in TEXTS)):
        assert train_tokenizer(given, 300).get_vocab() == TOKENIZER.get_vocab()
    assert drop_near_duplicates(DF.text) == drop_near_duplicates(TEXTS)


# ------------------------------------------------------------------ messages that name what was given

def test_messages_name_what_was_given(learn, tmp_path):
    with learn.no_bar(), learn.no_logging():
        with pytest.raises(DataError, match='takes one text. Got a list'):
            learn.predict([])
        with pytest.raises(DataError, match="one string: 'label'"):
            learn.evaluate(DF, 'label')
    with pytest.raises(DataError, match='A list of texts is needed. Got a ndarray'):
        check_texts(np.array('x'))
    DF.to_csv(tmp_path/'a.csv', index=False)
    with pytest.raises(DataError, match='Did you mean `sep`'):
        HFTextDataLoaders.from_csv(tmp_path/'a.csv', TOKENIZER, separator=';')
    with pytest.raises(FastaiTLError, match="installed. Got 'NoSuchFont'"):
        set_font('NoSuchFont')
    set_font('DejaVu Sans')
    set_font(None)
    for function in (label_budget, majority_accuracy):
        with pytest.raises(DataError, match="must have a column 'split'"):
            function(DF)
