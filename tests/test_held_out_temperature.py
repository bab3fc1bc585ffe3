"""The temperature of `fit_transfer`: rows that are left out until the last epoch, the same fit by hand, resumed fits,
and when there is none."""

import copy

import numpy as np
import pandas as pd
import pytest
import test_recipes
import torch
from fastai.callback.core import Callback
from fastai.callback.tracker import EarlyStoppingCallback
from test_recipes import BERT, FRAME, TEXTS, awd, classifier, tagger, tok  # noqa: F401
from transformers import BertConfig

from fastai_tl.all import *
from fastai_tl.tune.held_out_temperature import HeldOutTemperature, held_out_loaders, scores_layer

OPTIONS = dict(epochs=6, recipe='full', lr=1e-2, one_position=False)


@pytest.fixture
def wrong_labels(monkeypatch):
    "Labels that have nothing to do with the texts: a model that learns them by heart is too sure on other rows"
    labels = FRAME.label.sample(frac=1, random_state=0).to_numpy()
    monkeypatch.setattr(test_recipes, 'FRAME', FRAME.assign(label=labels))


def fitted(learn, **kwargs):
    "The Learner, its plan, and its weights by name"
    seed_everything(3)
    with learn.no_bar(), learn.no_logging():
        plan = learn.fit_transfer(mixed_precision=False, **kwargs)
    return learn, plan, {name: p.detach().clone() for name, p in learn.model.named_parameters()}


class Rows(Callback):
    "Keep the texts of each epoch, and the model after each"

    def before_fit(self):
        self.seen, self.models = [], []

    def before_train(self):
        self.seen.append(set())

    def before_batch(self):
        if self.training:
            self.seen[-1] |= {tuple(o for o in row.flatten().tolist() if o > 1) for row in self.xb[0]}

    def after_epoch(self):
        self.model.eval()
        if hasattr(self.model, 'reset'):
            with torch.no_grad():
                self.model.reset()
        self.models.append(copy.deepcopy(self.model))


class SwapRows(Callback):
    "The same fit by hand: another DataLoader for all epochs but the last"

    order = -20

    def __init__(self, kept):
        self.kept = kept

    def before_train(self):
        if self.epoch < self.n_epoch - 1:
            self.kept.rng.seed(self.dls.train.rng.getrandbits(64))
            self.learn.dl = self.kept


@pytest.mark.parametrize('make', ['classifier', 'awd'])
def test_rows_are_left_out_until_the_last_epoch(make, tok):  # noqa: F811
    learn = awd() if make == 'awd' else classifier(tok)
    rows = Rows()
    fitted(learn, calibrate=True, cbs=rows, epochs=3, recipe='full')
    *first, last = rows.seen
    assert len(first) == 3 and all(o == first[0] for o in first)
    assert (len(first[0]), len(last)) == (22, 27) and first[0] < last


@pytest.mark.parametrize('make', ['classifier', 'awd'])
@pytest.mark.parametrize('recipe', ['full', 'head_then_full', 'gradual'])
def test_a_fit_by_hand(make, recipe, tok, wrong_labels):  # noqa: F811
    "Stages and rates of the plan with other rows, then the last layer divided by the temperature"
    make = awd if make == 'awd' else lambda: classifier(tok)
    learn, plan, weights = fitted(make(), epochs=8, recipe=recipe, lr=1e-2, calibrate=True, cache=False)
    other = make()
    same = other.transfer_plan(8, recipe, lr=1e-2, calibrate=True, cache=False)
    assert (same.groups, same.epochs) == (plan.groups, plan.epochs)
    assert same.epochs[-1] == 1 and sum(same.epochs) == 9 and same.lrs[-1] == same.lrs[-2] / 2
    kept, _ = held_out_loaders(other.dls)
    seed_everything(3)
    same.calibrated = False
    with other.no_bar(), other.no_logging():
        same.fit(other, cbs=[SwapRows(kept), *fast_training_cbs(other, True, False)])
    last = {id(p) for p in scores_layer(learn.model, 3).parameters()}
    divided = [name for name, p in learn.model.named_parameters() if id(p) in last]
    assert plan.temperature > 1 and divided
    by_hand = dict(other.model.named_parameters())
    for name, value in weights.items():
        expected = by_hand[name] / plan.temperature if name in divided else by_hand[name]
        assert torch.allclose(value, expected, atol=1e-6), name


def test_frozen_layers_that_are_computed_once(tok, wrong_labels):  # noqa: F811
    "The last epoch has other rows, so it needs their states"

    def fit(cache):
        seed_everything(0)
        dls = HFTextDataLoaders.from_df(test_recipes.FRAME, tok, valid_col='valid', bs=8, verbose=False)
        still = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        learn = hf_classifier_learner(dls, BertConfig(vocab_size=len(tok), **BERT, **still), metrics=[])
        options = OPTIONS | dict(recipe='top_layers', cache=cache)
        return fitted(learn, calibrate=True, **options)[1:]

    (once, weights), (each_time, expected) = fit(True), fit(False)
    assert once.is_cached == [True] * len(once.groups)
    assert np.isclose(once.temperature, each_time.temperature, rtol=1e-3) and once.temperature > 1
    assert all(torch.allclose(value, expected[name], atol=1e-4) for name, value in weights.items())


def nll(scores, targets):
    "Mean negative log-likelihood, by numpy"
    scores = scores - scores.max(1, keepdims=True)
    return (np.log(np.exp(scores).sum(1)) - scores[np.arange(len(scores)), targets]).mean()


def test_temperature_of_the_rows_that_were_held_out(tok, wrong_labels):  # noqa: F811
    "Their scores before the last epoch, the temperature by a grid; what is served is the scaled probability"
    rows = Rows()
    learn, plan, _ = fitted(classifier(tok), calibrate=True, cbs=rows, **OPTIONS)
    first = classifier(tok)
    first.model = rows.models[-2]
    held_out = held_out_loaders(first.dls)[1]
    with first.no_bar(), first.no_logging():
        scores, targets = first.get_preds(dl=held_out, act=lambda o: o)
    grid = np.exp(np.linspace(0, np.log(30), 20001))
    scores, targets = scores.double().numpy(), targets.numpy()
    assert len(targets) == 5
    losses = [5 * nll(scores / t, targets) + np.log(t) ** 2 / 2 for t in grid]
    assert np.isclose(plan.temperature, grid[np.argmin(losses)], rtol=2e-3) and plan.temperature > 1.01
    after = learn.get_preds()[0]
    learn.model = rows.models[-1]
    before = learn.get_preds()[0]
    assert torch.allclose(after, (before.log() / plan.temperature).softmax(1), atol=1e-5)


def test_what_is_served_has_the_temperature(tok, wrong_labels):  # noqa: F811
    learn, plan, _ = fitted(classifier(tok), calibrate=True, **OPTIONS)
    texts = [text for text, is_valid in zip(TEXTS, FRAME.valid) if is_valid]
    assert plan.temperature > 1
    assert np.allclose(learn.predictor(verbose=False).predict_proba(texts), learn.get_preds()[0], atol=1e-5)


class Killed(Exception):
    pass


class KillAfter(Callback):
    order = 200

    def __init__(self, epoch):
        self.at = epoch

    def after_epoch(self):
        if self.epoch == self.at:
            raise Killed('now')


@pytest.mark.parametrize('epoch', [0, 4, 5, 6])
def test_a_resumed_fit_is_the_same(epoch, tok, wrong_labels, tmp_path):  # noqa: F811
    "Killed before, right before and after the temperature is known"

    def run(file, *cbs):
        learn, plan, weights = fitted(classifier(tok), calibrate=True, cbs=[ResumableFit(file), *cbs], **OPTIONS)
        return plan.temperature, weights

    temperature, whole = run(tmp_path / 'whole.safetensors')
    with pytest.raises(Killed):
        run(tmp_path / 'fit.safetensors', KillAfter(epoch))
    again, weights = run(tmp_path / 'fit.safetensors')
    assert again == temperature > 1
    assert all(torch.equal(value, whole[name]) for name, value in weights.items())
    finished, weights = run(tmp_path / 'fit.safetensors')
    assert finished == temperature and all(torch.equal(value, whole[name]) for name, value in weights.items())


def test_explained(tok, capsys, wrong_labels):  # noqa: F811
    learn = classifier(tok)
    plain = learn.transfer_plan(3)
    assert not plain.calibrated and 'temperature' not in plain.explain() and plain.epochs[-1] != 1
    plan = learn.transfer_plan(3, calibrate=True)
    text = plan.explain()
    assert '20 % of the training rows are left out until the last stage' in text and 'calibrate=False' in text
    assert plan.table().steps.tolist()[-2:] == [plan.epochs[-2] * 3, 4]
    learn, plan, _ = fitted(classifier(tok), calibrate=True, **OPTIONS)
    assert len(learn.recorder.losses) == plan.table().steps.sum()
    with learn.no_bar():
        again = classifier(tok)
        seed_everything(3)
        plan = again.fit_transfer(calibrate=True, **OPTIONS)
    assert f'divided by a temperature of {plan.temperature:.2f}' in capsys.readouterr().out


def trained_classifier(tok, n=60, **kw):  # noqa: F811
    "A new head on layers that look trained, with `n` training texts"
    seed_everything(0)
    rows = pd.concat([FRAME[~FRAME.valid]] * 5)[:n]
    frame = pd.concat([rows, FRAME[FRAME.valid]], ignore_index=True)
    dls = HFTextDataLoaders.from_df(frame, tok, valid_col='valid', bs=8, verbose=False, **kw)
    learn = hf_classifier_learner(dls, BertConfig(vocab_size=len(tok), **BERT), metrics=[])
    with torch.no_grad():
        for module in learn.model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.weight += 0.01 * torch.randn_like(module.weight)
    return learn


def test_when_there_is_one(tok):  # noqa: F811
    learn = trained_classifier(tok)
    plan = learn.transfer_plan(2)
    assert plan.calibrated and plan.epochs == [2, 1]
    assert not learn.transfer_plan(2, calibrate=False).calibrated
    assert not learn.transfer_plan([1, 2], 'head_then_full').calibrated
    assert not learn.transfer_plan(2, groups=[1, 3]).calibrated
    assert not trained_classifier(tok, n=49).transfer_plan(2).calibrated
    assert trained_classifier(tok, n=49).transfer_plan(2, calibrate=True).calibrated
    assert not classifier(tok).transfer_plan(2).calibrated
    assert not awd().transfer_plan(2).calibrated
    assert not tagger(tok).transfer_plan(2).calibrated
    _, plan, _ = fitted(learn, epochs=1)
    assert plan.temperature >= 1
    assert not learn.transfer_plan(2).calibrated, 'the model has read the rows'
    for options in dict(best=True), dict(cbs=EarlyStoppingCallback()):
        _, plan, _ = fitted(trained_classifier(tok), epochs=1, **options)
        assert not plan.calibrated and plan.temperature is None


def test_held_out_rows_are_not_augmented(tok):  # noqa: F811
    changed = []
    learn = classifier(tok)
    augment_texts(learn.dls, lambda text, rng: changed.append(text) or text, share=1.0)
    cb = HeldOutTemperature()
    cb.kept, cb.held_out = held_out_loaders(learn.dls)
    cb.learn = learn
    changed.clear()
    cb.after_fit()
    assert cb.temperature >= 1 and not changed
    next(iter(cb.held_out))
    assert changed, 'the rows are augmented again'


def test_class_weights_have_none(tok):  # noqa: F811
    learn = trained_classifier(tok)
    assert learn.transfer_plan(2).calibrated
    weighted = hf_classifier_learner(learn.dls, learn.model.hf, class_weights='balanced')
    assert not weighted.transfer_plan(2).calibrated


def test_needs_rows_of_classes(tok):  # noqa: F811
    learn = tagger(tok)
    before = {name: p.clone() for name, p in learn.model.named_parameters()}
    with pytest.raises(FastaiTLError, match='classification'):
        learn.fit_transfer(1, calibrate=True)
    assert all(torch.equal(p, before[name]) for name, p in learn.model.named_parameters())
    with pytest.raises(FastaiTLError, match='best_epoch'):
        classifier(tok).fit_transfer(1, calibrate=True, best=True)
    with pytest.raises(FastaiTLError, match='early_stopping'):
        classifier(tok).fit_transfer(1, calibrate=True, cbs=EarlyStoppingCallback())
    with pytest.raises(FastaiTLError, match='read once'):
        classifier(tok, weighted=True).fit_transfer(1, calibrate=True)
    with pytest.raises(FastaiTLError, match='`calibrate`'):
        classifier(tok).fit_transfer(1, calibrate='yes')


def test_a_layer_that_lora_changes_is_refused():
    "Its last linear layer is not that of the scores, but what is added to them"
    model = torch.nn.ModuleDict(dict(base_layer=torch.nn.Linear(4, 3), lora_B=torch.nn.Linear(2, 3)))
    with pytest.raises(FastaiTLError, match='lora_B'):
        scores_layer(model, 3)
