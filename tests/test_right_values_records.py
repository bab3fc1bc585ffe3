"Passes that are no training leave the record of the training; the layer table shows the rates of the next fit."

import pytest
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.schedule import *
from fastai.optimizer import Adam
from fastai.text.all import even_mults
from small_learners import LABELS, MAKERS, TEXTS

from fastai_tl.all import *


def record(learn):
    "Return what the Recorder and the Learner have recorded"
    recorder = learn.recorder
    losses = list(map(float, recorder.losses))
    lists = [losses, list(recorder.lrs), list(recorder.iters), list(map(list, recorder.values))]
    smooth = recorder.smooth_loss.count, float(recorder.smooth_loss.val)
    return lists, smooth, list(recorder.metric_names), list(recorder.log), list(learn.final_record)


def trained(learn):
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(2, 1e-3)
    return learn


def unchanged_by(learn, *calls):
    before = record(learn)
    with learn.no_bar(), learn.no_logging():
        for call in calls:
            call()
            assert record(learn) == before, call


def test_passes_of_a_classifier(small_tokenizers, tmp_path):
    learn = trained(MAKERS['classifier'](small_tokenizers))
    texts = list(TEXTS[:4])
    unchanged_by(
        learn, learn.evaluate, lambda: learn.evaluate(texts, LABELS[:4]), lambda: learn.evaluate(ds_idx=0),
        lambda: learn.evaluate(dl=learn.dls.valid), lambda: learn.calibrate(ds_idx=0),
        learn.get_preds, lambda: learn.predict(texts[0]),
        lambda: learn.predict_batch(texts), lambda: learn.predictor().predict(texts), learn.layer_table,
        lambda: learn.save_bundle(tmp_path/'bundle'), lambda: learn.show_results(max_n=2),
        lambda: learn.get_preds(1, None, True), lambda: learn.get_preds(with_loss=True))


@pytest.mark.parametrize('name', ['ulmfit_classifier', 'multilabel', 'regression', 'tagger', 'answerer'])
def test_evaluate_for_other_tasks(small_tokenizers, name):
    learn = trained(MAKERS[name](small_tokenizers))
    unchanged_by(learn, learn.evaluate)
    if name == 'tagger':
        unchanged_by(learn, lambda: learn.predict('the film'), lambda: learn.tag(['the film', 'was good']))
    if name in ('ulmfit_classifier', 'multilabel'):
        unchanged_by(learn, lambda: learn.calibrate(ds_idx=0), lambda: learn.predict_batch(list(TEXTS[:4])))


@pytest.mark.parametrize('name', ['causal_lm', 'ulmfit_lm', 'masked_lm'])
def test_passes_of_language_models(small_tokenizers, name):
    learn = trained(MAKERS[name](small_tokenizers))
    if name == 'masked_lm':
        unchanged_by(learn, lambda: learn.predict(f'the {small_tokenizers["encoder"].mask_token} was'))
    else:
        texts = list(TEXTS[:3])
        unchanged_by(learn, lambda: learn.perplexity(texts), lambda: learn.generate(['the film'], max_new_tokens=3))


@pytest.mark.parametrize('name', ['classifier', 'multilabel', 'regression', 'tagger', 'answerer', 'masked_lm'])
def test_validate_keeps_the_record(small_tokenizers, name):
    learn = trained(MAKERS[name](small_tokenizers))
    last = record(learn)[0][-1][-1]
    unchanged_by(learn, learn.validate, lambda: learn.validate(0), lambda: learn.validate(dl=learn.dls.train))
    with learn.no_bar():
        n_values = 1 + len(learn.metrics)
        assert len(learn.validate()) == n_values
        if name != 'masked_lm': # the masks of each validation are drawn
            assert list(learn.validate()) == pytest.approx(last[-n_values:])


def test_a_pair_of_learners(small_tokenizers):
    "The forward and the backward Learner keep their records"
    pair = BidirectionalLearner(*[trained(MAKERS['ulmfit_classifier'](small_tokenizers)) for _ in range(2)])
    before = [record(learn) for learn in pair.learners]
    pair.validate()
    pair.evaluate()
    pair.predict('the film was good')
    assert [record(learn) for learn in pair.learners] == before


def test_an_evaluation_within_a_fit(small_tokenizers):
    "A Callback that evaluates after each epoch does not change the record of the fit"
    class EachEpoch(Callback):
        order = 70

        def after_epoch(self):
            if not hasattr(self.learn, 'gather_preds'): # the evaluation calls this method, too
                self.learn.evaluate()

    records = []
    for cbs in (None, EachEpoch()):
        seed_everything(0)
        learn = MAKERS['classifier'](small_tokenizers)
        seed_everything(0)
        with learn.no_bar(), learn.no_logging():
            learn.fit(2, 1e-3, cbs=cbs)
        records.append((len(learn.recorder.losses), len(learn.recorder.values), learn.recorder.iters))
    assert records[0] == records[1]


def test_a_learner_that_has_not_been_trained(small_tokenizers):
    learn = MAKERS['classifier'](small_tokenizers)
    with learn.no_bar(), learn.no_logging():
        learn.evaluate()
    assert not hasattr(learn.recorder, 'losses') and not hasattr(learn, 'final_record')


# --- the layer table ---

def first_rates(learn):
    "Return the rates that a fit without a rate begins with, read in its first step"
    class Grab(Callback):
        def before_step(self):
            self.learn.rates = [float(hyper['lr']) for hyper in self.opt.hypers]
            raise CancelFitException

    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=Grab())
    return learn.rates


@pytest.mark.parametrize('opt_func', [None, pytest.param(Adam, marks=pytest.mark.slow)])
@pytest.mark.parametrize('lr', [None, 3e-4, slice(1e-5, 1e-3), slice(1e-3)])
@pytest.mark.parametrize('name', ['classifier', 'ulmfit_classifier'])
def test_layer_table_shows_the_rates_of_the_next_fit(small_tokenizers, name, lr, opt_func):
    learn = MAKERS[name](small_tokenizers)
    if opt_func is not None:
        learn.opt_func = opt_func
    if lr is not None:
        learn.lr = lr
    new = learn.layer_table().lr.tolist()
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1, 1e-2)
    last = [float(hyper['lr']) for hyper in learn.opt.hypers]
    table = learn.layer_table()
    assert [float(hyper['lr']) for hyper in learn.opt.hypers] == last, 'the table changes the optimizer'
    n_groups = len(table)
    expected = [learn.lr if lr is None else lr]*n_groups
    if isinstance(lr, slice):
        expected = even_mults(1e-5, 1e-3, n_groups) if lr.start else [1e-4]*(n_groups - 1) + [1e-3]
    assert last != pytest.approx(list(expected))
    assert table.lr.tolist() == pytest.approx(list(expected))
    assert new == pytest.approx(list(expected))
    assert first_rates(learn) == pytest.approx(table.lr.tolist())
