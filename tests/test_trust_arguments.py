"""Wrong arguments: a test for each kind that the fuzzer of `benchmarks/trust` found; errors must be the package's."""

import numpy as np
import pandas as pd
import pytest
import torch
from small_learners import classifier

from fastai_tl.all import *
from fastai_tl.learners.base import check_batches
from fastai_tl.models.awd_lstm import check_awd_config, check_drop_mult
from fastai_tl.quickstart.presets import changed_preset, check_preset

DF = pd.DataFrame(dict(text=['a b', 'c d', 'e f', 'g h'] * 3, label=['x', 'y'] * 6, lists=[['a']] * 12))
SIZES = dict(emb_sz=12, n_hid=16, n_layers=1)


def refused(match, function, *args, **kwargs):
    with pytest.raises(FastaiTLError, match=match):
        function(*args, **kwargs)


@pytest.fixture(scope='module')
def tokens(): return tokenize_texts_once(DF.text, progress=False)


def awd_dls(tokens, **kwargs):
    vocab = texts_vocab(tokens, min_freq=1)
    args = tokens, list(DF.label), 'classification', range(8), range(8, 12), vocab
    return classifier_dls(*args, bs=4, seq_len=8, **kwargs)


# --- numbers ---

def test_numbers_of_other_libraries():
    wanted = overused_words(DF.text, [True, False] * 6, min_texts=2, alpha=1)
    for number in (np.int64(2), torch.tensor(2), np.array(2)):
        pd.testing.assert_frame_equal(overused_words(DF.text, [True, False] * 6, min_texts=number, alpha=1), wanted)


@pytest.mark.parametrize('bad', [True, np.True_, 10**20, torch.tensor(float('nan')), 1.5, '1', None])
def test_seeds(bad): refused('`seed` must be a whole number', derive_seed, bad)


def test_equal_seeds():
    assert derive_seed(3, 'a') == derive_seed(np.int64(3), 'a') == derive_seed(torch.tensor(3), 'a')
    assert 0 <= derive_seed(3, '\ud83d') < 2**31


def test_learning_rates():
    groups = [[torch.nn.Parameter(torch.ones(1))] for _ in range(3)]
    opt = LayerwiseOptimizer(groups, lr=np.float32(.5))
    assert [h['lr'] for h in opt.hypers] == [.5] * 3
    opt.set_hyper('lr', [1., 2., 3.])
    assert [h['lr'] for h in opt.hypers] == [1., 2., 3.]
    refused('one for each of the 3 layer groups. Got 2 numbers', opt.set_hyper, 'lr', [1., 2.])
    refused('`params` must be', LayerwiseOptimizer, [''])


# --- rows, columns, classes ---

@pytest.mark.parametrize('rows', ["ab", [None], [1.5], [12], [-1], {'a': 1}, np.zeros((2, 2))])
def test_rows_of_a_split(tokens, rows):
    args = tokens, list(DF.label), 'classification'
    refused('`valid', classifier_dls, *args, range(8), rows, ['a'])


def test_iterators_and_ranges_of_rows(tokens):
    assert len(awd_dls(tokens).train_ds) == 8 # ranges
    vocab = texts_vocab(tokens, min_freq=1)
    rows = iter(range(8)), (i for i in range(8, 12))
    dls = classifier_dls(tokens, list(DF.label), 'classification', *rows, vocab, bs=4)
    assert [len(dls.train_ds), len(dls.valid_ds)] == [8, 4]


@pytest.mark.parametrize('name', [True, False, np.True_])
def test_a_switch_is_no_column(name): refused('must have a column', label_column, DF, name)


def test_groups_are_names():
    refused('A group must be a name or a number', cross_folds, DF, n_folds=2, group_col='lists')


@pytest.mark.parametrize('classes', [[float('nan'), 'a'], pd.Series(['a', None]), {0: None, 1: 'a'}])
def test_classes_have_names(classes): refused('Each class needs a name', class_list, classes)


@pytest.mark.parametrize('values', [['a'], range(3), [True]])
def test_split_values_for_each_row(small_tokenizers, values):
    refused('The split must have 12 rows', HFTextDataLoaders.from_lists, list(DF.text), list(DF.label),
            small_tokenizers['encoder'], valid=values)


# --- batches and samples ---

@pytest.mark.parametrize('dl', [[float('nan')], [-1], [[]], [['a']], ['']])
def test_batches(dl): refused('`dl` must have batches', check_batches, dl)


def test_good_batches():
    x = torch.ones(2, 3)
    for batch in ((x,), [x, x], ((x, x), x), ({'a': x}, x)):
        check_batches([batch])
    check_batches([])


@pytest.mark.parametrize('dataset', [{'a': 1}, 'abc', pd.Series(['a'], index=[7]), [[1]], torch.tensor(3), [['a']]])
def test_samples(dataset): refused('`dataset` must have samples', TokensDL, dataset)


# --- models ---

def test_settings_of_an_awd_lstm(tokens):
    for name in (1, 'a', 'n_hidden'):
        refused('must have settings of an AWD_LSTM', check_awd_config, {name: 1})
    assert check_drop_mult(2, dict(output_p=.5)) == 2
    refused('`drop_mult` must be at most 2', check_drop_mult, 2.5, dict(output_p=.5))
    dls = awd_dls(tokens)
    refused('`n_out` must be 2', awd_classifier_learner, dls, 'classification', 1, SIZES)
    refused('so that no dropout is above 1', awd_classifier_learner, dls, 'classification', 2, SIZES, drop_mult=1e308)


def test_a_class_is_no_function(tokens):
    refused('Pass an object: `WordLevelTokenizer', tokenize_texts_once, DF.text, WordLevelTokenizer)
    refused('`what `tok` returns` must be a list', tokenize_texts_once, DF.text, lambda texts: None)


def test_recipes():
    for stages in (range(3), ['ab'], [(1, 2, 3)], [('some', 1.)], [(1, -1.)]):
        refused('stage', Recipe, 'a', stages=stages)
    refused('`spread` must be a number above 0', Recipe, 'a', stages=(), spread=0)


def test_settings_of_a_quickstart():
    lm = changed_preset(QUICK, dict(lm=dict(epochs=1)))['lm']
    assert lm == {**QUICK['lm'], 'epochs': 1}
    refused('Sizes of a quickstart are', changed_preset, QUICK, dict(lm=dict(a=1)))
    refused('must have all settings of a preset', check_preset, {}, QUICK)
    assert check_preset(QUICK, QUICK) is QUICK


# --- predictions ---

SCORES = np.array([[.3, -.2], [1., 2.]], dtype=np.float32)


@pytest.mark.parametrize('name, bad', [('classes', ['a']), ('classes', None), ('thresholds', [None]),
                                       ('thresholds', [.5]), ('texts', ['a']), ('texts', [1, 2]), ('texts', 'ab')])
def test_predictions_fit_together(name, bad):
    good = dict(classes=['a', 'b'], thresholds=[.5, .5], texts=['a', 'b'])
    assert len(Predictions(SCORES, 'classification', **good).table()) == 2
    refused('', Predictions, SCORES, 'classification', **{**good, name: bad})


def test_classes_of_an_evaluation(small_tokenizers):
    learn = classifier(small_tokenizers)
    for bad in (float('nan'), len, True):
        refused('`classes` must be a list', Evaluation.from_learner, learn, classes=bad)
    refused('`ds_idx`', Evaluation.from_learner, learn, ds_idx=2)


def test_text_of_a_figure_or_report(tmp_path):
    refused('`ax` must be Axes of Matplotlib', plot_curves, dict(a=[1., 2.]), ax=[1])
    ev = Evaluation.from_preds([[.9, .1], [.2, .8]], [0, 1], ['a', 'b'])
    page = ev.save(tmp_path/'report', title='a \ud83d b', figures=[])
    assert 'a \ufffd b' in page.read_text(encoding='utf-8')


def test_a_path_has_a_name(tmp_path):
    refused('`path` must have the name of a file', write_json, '', {})
    for bad in ('a' * 256, 'a/' * 3000):
        refused('`path` must be a path', read_table, bad)


def test_options_of_generation():
    config = make_generation_config(temperature=3, repetition_penalty=2)
    assert isinstance(config.temperature, float) and isinstance(config.repetition_penalty, float)
    for bad in ([], pd.DataFrame(), 'always'):
        refused('`early_stopping` must be True or False', make_generation_config, early_stopping=bad, num_beams=2)
