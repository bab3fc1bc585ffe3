"What is known about the data of any Learner: `spec_of`, `text_parts` and `row_texts`"
import pandas as pd
import pytest
import torch
from fastcore.test import expect_fail
from fastai.text.all import (AWD_LSTM, BCEWithLogitsLossFlat, CategoryBlock, ColReader, CrossEntropyLossFlat, DataBlock,
                             DataLoaders, Learner, MSELossFlat, MultiCategoryBlock, RegressionBlock, TextBlock,
                             TextDataLoaders, language_model_learner, text_classifier_learner)
from transformers import BertConfig
from fastai_tl.all import (CHINESE_RULES, BidirectionalLearner, FastaiTLError, HFCausalLMDataLoaders,
                           HFMaskedLMDataLoaders, HFQADataLoaders, HFSeq2SeqDataLoaders, HFTagDataLoaders,
                           HFTargetTextBlock, HFTextBlock, HFTextDataLoaders, TextSpec, classifier_dls,
                           hf_classifier_learner, language_model_dls, tokenize_texts_once, texts_vocab, train_tokenizer)
from fastai_tl.core import DataError
from fastai_tl.models.third_party import row_texts, spec_of, text_parts

TEXTS = ['a good film', 'a bad film', 'fine music here', 'poor music here']*6
LABELS = dict(classification=['pos', 'neg']*12, multilabel=[['film'], ['film', 'bad'], ['music'], ['bad', 'music']]*6,
              regression=[1.5, .5, 2.5, 3.]*6)
CLASSES = dict(classification=('neg', 'pos'), multilabel=('bad', 'film', 'music'), regression=None)
TASKS = list(CLASSES)
VALID = [False]*16 + [True]*8


@pytest.fixture(scope='module')
def tok():
    return train_tokenizer(TEXTS, 300, max_length=32)


def table():
    return pd.DataFrame(dict(review=TEXTS, stars=LABELS['classification'], score=LABELS['regression'],
                             tags=[';'.join(o) for o in LABELS['multilabel']], held=VALID))


def fastai_dls(task, **kwargs):
    label_col = dict(classification='stars', multilabel='tags', regression='score')[task]
    block = dict(classification=CategoryBlock, multilabel=MultiCategoryBlock, regression=RegressionBlock)[task]
    delim = ';' if task == 'multilabel' else None
    return TextDataLoaders.from_df(table(), text_col='review', label_col=label_col, y_block=block, label_delim=delim,
                                   valid_col='held', bs=4, seq_len=8, **kwargs)


# --- plain fastai ---

@pytest.mark.parametrize('task', TASKS)
def test_text_data_loaders(task):
    dls = fastai_dls(task)
    spec = spec_of(dls)
    assert (spec.task, spec.classes, spec.family) == (task, CLASSES[task], 'fastai')
    label = dict(classification='stars', multilabel='tags', regression='score')[task]
    assert spec.columns == dict(text='review', label=label)
    assert spec.label_delim == (';' if task == 'multilabel' else None)
    assert (spec.seq_len, spec.lang, spec.backwards) == (8, 'en', False)
    assert spec.tokenizer == dict(tokenizer='word', lang='en')
    n_out = dict(classification=2, multilabel=3, regression=1)[task]
    learn = text_classifier_learner(dls, AWD_LSTM, pretrained=False, n_out=n_out)
    assert spec_of(learn) == spec
    parts = text_parts(learn)
    assert parts.vocab == list(dls.vocab[0] if task != 'regression' else dls.vocab)
    rules = [rule.__name__ for rule in parts.rules]
    assert tuple(rules) == spec.rules and 'lowercase' in rules
    assert list(parts.tokenizer(['a film'])) == [['a', 'film']]


def test_text_data_loaders_that_read_backwards():
    assert spec_of(fastai_dls('classification', backwards=True)).backwards


def test_language_model_data_loaders():
    dls = TextDataLoaders.from_df(table(), text_col='review', is_lm=True, valid_col='held', bs=2, seq_len=5)
    learn = language_model_learner(dls, AWD_LSTM, pretrained=False)
    spec = spec_of(learn)
    assert (spec.task, spec.classes, spec.seq_len, spec.columns) == ('causal_lm', None, 5, dict(text='review'))
    assert text_parts(learn).vocab == list(dls.vocab)


def test_a_data_block_with_a_text_block():
    block = DataBlock((TextBlock.from_df('review', seq_len=8), CategoryBlock), get_x=ColReader('text'),
                      get_y=ColReader('stars'))
    spec = spec_of(block.dataloaders(table(), bs=4))
    assert (spec.task, spec.classes) == ('classification', ('neg', 'pos'))
    assert spec.columns == dict(text='review', label='stars')


# --- DataBlocks with a tokenizer of transformers ---

@pytest.mark.parametrize('task', TASKS)
def test_a_data_block_with_an_hf_text_block(tok, task):
    y = dict(classification=CategoryBlock, multilabel=MultiCategoryBlock, regression=RegressionBlock)[task]
    label = dict(classification=ColReader('stars'), multilabel=ColReader('tags', label_delim=';'),
                 regression=ColReader('score'))[task]
    block = DataBlock((HFTextBlock(tok, max_length=12, truncation=False), y), get_x=ColReader('review'), get_y=label)
    dls = block.dataloaders(table(), bs=4)
    config = BertConfig(vocab_size=len(tok), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=16, max_position_embeddings=32)
    learn = hf_classifier_learner(dls, config)
    spec = spec_of(learn)
    assert (spec.task, spec.classes, spec.family) == (task, CLASSES[task], 'huggingface')
    assert (spec.max_length, spec.truncation) == (12, False)
    assert spec.columns['text'] == 'review'
    parts = text_parts(learn)
    assert parts.tokenizer is tok and parts.rules == [] and parts.vocab is None


def test_a_data_block_of_pairs_of_texts(tok):
    s2s = train_tokenizer(TEXTS, 300, 'seq2seq', max_length=32)
    block = DataBlock((HFTextBlock(s2s), HFTargetTextBlock(s2s, max_length=9)), get_x=ColReader('review'),
                      get_y=ColReader('stars'))
    spec = spec_of(block.dataloaders(table(), bs=4))
    assert (spec.task, spec.max_length, spec.max_target_length) == ('seq2seq', 32, 9)


# --- our own factories ---

def factory_dls(tok):
    "One DataLoaders of each factory, with the task and classes that its spec must have"
    lists = dict(valid=VALID, bs=4)
    for task in TASKS:
        dls = HFTextDataLoaders.from_lists(TEXTS, LABELS[task], tok, task=task, verbose=False, **lists)
        yield dls, task, CLASSES[task]
    words = [text.split() for text in TEXTS]
    tags = [['B-X' if w == 'film' else 'O' for w in sentence] for sentence in words]
    yield HFTagDataLoaders.from_lists(words, tags, tok, verbose=False, **lists), 'tagging', ('O', 'B-X')
    answers = [text.split()[-1] for text in TEXTS]
    yield HFQADataLoaders.from_lists(['what?']*24, TEXTS, answers, tok, stride=4, verbose=False, **lists), 'qa', None
    yield HFCausalLMDataLoaders.from_texts(TEXTS, tok, max_length=16, **lists), 'causal_lm', None
    yield HFMaskedLMDataLoaders.from_texts(TEXTS, tok, max_length=16, **lists), 'masked_lm', None
    s2s = train_tokenizer(TEXTS, 300, 'seq2seq', max_length=32)
    yield HFSeq2SeqDataLoaders.from_lists(TEXTS, TEXTS, s2s, verbose=False, **lists), 'seq2seq', None


@pytest.mark.parametrize('i', range(8))
def test_factories_of_transformers(tok, i):
    dls, task, classes = next(o for k, o in enumerate(factory_dls(tok)) if k == i)
    spec = spec_of(dls)
    assert (spec.task, spec.family, spec.lang) == (task, 'huggingface', 'en')
    assert sorted(spec.classes or ()) == sorted(classes or ())
    parts = text_parts(dls)
    assert parts.rules == [] and parts.spec == spec
    assert parts.vocab is None and callable(parts.tokenizer.convert_ids_to_tokens)
    assert dls.train_ds[0][0].ids.max() < len(parts.tokenizer)


@pytest.mark.parametrize('task', [*TASKS, 'causal_lm'])
def test_factories_of_awd_lstm(task):
    texts = tokenize_texts_once(TEXTS, progress=False)
    vocab = texts_vocab(texts, min_freq=1)
    if task == 'causal_lm':
        dls = language_model_dls(texts, vocab, bs=2, seq_len=6, backwards=True)
    else:
        dls = classifier_dls(texts, LABELS[task], task, list(range(16)), list(range(16, 24)), vocab, bs=4, seq_len=6,
                             backwards=True)
    spec = spec_of(dls)
    assert (spec.task, spec.family, spec.backwards, spec.seq_len) == (task, 'fastai', True, 6)
    assert sorted(spec.classes or ()) == sorted(CLASSES.get(task) or ())
    parts = text_parts(dls)
    assert parts.vocab == list(vocab)
    assert list(parts.tokenizer(['a film'])) == [['a', 'film']]


def test_chinese_rules(tok):
    dls = HFTextDataLoaders.from_lists(TEXTS, LABELS['classification'], tok, valid=VALID, bs=4, lang='zh-tw',
                                       verbose=False)
    assert spec_of(dls).lang == 'zh-tw'
    assert text_parts(dls).rules == CHINESE_RULES


# --- the spec that travels with the data ---

def test_a_spec_that_is_there_is_returned_as_it_is(tok):
    dls = HFTextDataLoaders.from_lists(TEXTS, LABELS['multilabel'], tok, valid=VALID, bs=4, verbose=False)
    dls.spec = TextSpec('multilabel', classes=('x', 'y', 'z'), threshold=.3, max_length=7)
    assert spec_of(dls) is dls.spec
    learn = Learner(dls, torch.nn.Linear(2, 3), loss_func=BCEWithLogitsLossFlat(thresh=.3))
    assert spec_of(learn) is dls.spec
    learn.loss_func.thresh = .6
    assert spec_of(learn) == dls.spec.replace(threshold=.6)


def test_a_loss_for_another_task_is_an_error():
    probabilities = torch.nn.functional.binary_cross_entropy
    wrong = dict(classification=(MSELossFlat(), torch.nn.BCELoss()),
                 multilabel=(CrossEntropyLossFlat(), MSELossFlat(), probabilities),
                 regression=(CrossEntropyLossFlat(), BCEWithLogitsLossFlat()))
    for task, losses in wrong.items():
        dls = fastai_dls(task)
        for loss in losses:
            learn = Learner(dls, torch.nn.Linear(2, 3), loss_func=loss)
            with expect_fail(FastaiTLError, f'must fit the labels, which are for {task}'):
                spec_of(learn)
            assert spec_of(dls).task == task


def test_two_classes_with_one_output_are_made_by_a_sigmoid():
    learn = Learner(fastai_dls('classification'), torch.nn.Linear(2, 1), loss_func=BCEWithLogitsLossFlat())
    assert (spec_of(learn).task, spec_of(learn).classes) == ('multilabel', ('neg', 'pos'))


def test_a_loss_without_an_activation_is_known_by_its_name():
    dls = DataLoaders.from_dsets([(torch.zeros(2), 0)]*4, [(torch.zeros(2), 1)]*4, bs=2)
    names = {torch.nn.functional.cross_entropy: 'classification', torch.nn.NLLLoss(): 'classification',
             torch.nn.functional.binary_cross_entropy_with_logits: 'multilabel', torch.nn.HuberLoss(): 'regression'}
    for loss, task in names.items():
        spec = spec_of(Learner(dls, torch.nn.Linear(2, 3), loss_func=loss))
        assert (spec.task, spec.classes) == (task, None)


def test_what_is_missing_is_named():
    dls = DataLoaders.from_dsets([(torch.zeros(2), 0)]*4, [(torch.zeros(2), 1)]*4, bs=2)
    with expect_fail(DataError, 'must tell the task'):
        spec_of(dls)
    learn = Learner(dls, torch.nn.Linear(2, 3), loss_func=CrossEntropyLossFlat())
    with expect_fail(FastaiTLError, 'tokenizer of the model is needed'):
        text_parts(learn)


def test_a_pair_of_learners_has_the_spec_of_its_forward_learner():
    a, b = (text_classifier_learner(fastai_dls('classification', backwards=back), AWD_LSTM, pretrained=False)
            for back in (False, True))
    assert spec_of(BidirectionalLearner(a, b)) == spec_of(a)


# --- texts of the rows ---

def test_row_texts(tok):
    block = DataBlock((HFTextBlock(tok), CategoryBlock), get_x=ColReader('review'), get_y=ColReader('stars'),
                      splitter=lambda df: (list(range(16)), list(range(16, 24))))
    assert row_texts(block.dataloaders(table(), bs=4).valid) == TEXTS[16:]
    ours = HFTextDataLoaders.from_lists(TEXTS, LABELS['classification'], tok, valid=VALID, bs=4, verbose=False)
    assert row_texts(ours.valid) == TEXTS[16:]
    tokens = row_texts(fastai_dls('classification').valid)
    assert tokens[0].startswith('xxbos') and tokens[0].endswith('good film')
    assert row_texts(DataLoaders.from_dsets([(torch.zeros(2), 0)]*4, bs=2).train) is None
