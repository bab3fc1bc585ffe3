"""`fit_transfer(calibrate=True)`: the same weights, and scores that are divided by a temperature from training rows."""

import numpy as np
import pytest
import test_recipes
import torch
from test_recipes import FRAME, TEXTS, awd, classifier, tagger, tok  # noqa: F401

from fastai_tl.all import *
from fastai_tl.tune.held_out_temperature import held_out_learner, scores_layer


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


@pytest.mark.parametrize('make', ['classifier', 'awd'])
@pytest.mark.parametrize('recipe', ['full', 'head_then_full'])
def test_only_the_scores_change(make, recipe, tok, wrong_labels):  # noqa: F811
    "The second training is the one that would have been; its last layer is divided by the temperature"
    make = awd if make == 'awd' else lambda: classifier(tok)
    _, _, plain = fitted(make(), epochs=8, recipe=recipe, lr=1e-2)
    learn, plan, weights = fitted(make(), epochs=8, recipe=recipe, lr=1e-2, calibrate=True)
    last = {id(p) for p in scores_layer(learn.model, 3).parameters()}
    divided = [name for name, p in learn.model.named_parameters() if id(p) in last]
    assert plan.temperature > 1 and divided
    for name, value in weights.items():
        expected = plain[name] / plan.temperature if name in divided else plain[name]
        assert torch.allclose(value, expected, atol=1e-7), name


def nll(scores, targets):
    "Mean negative log-likelihood, by numpy"
    scores = scores - scores.max(1, keepdims=True)
    return (np.log(np.exp(scores).sum(1)) - scores[np.arange(len(scores)), targets]).mean()


def test_temperature_of_the_rows_that_were_held_out(tok, wrong_labels):  # noqa: F811
    "The first training by hand, the temperature by a grid; what is served is the scaled probability"
    options = dict(epochs=12, recipe='full', lr=1e-2, one_position=False)
    learn, _, _ = fitted(classifier(tok), **options)
    before = learn.get_preds()[0]
    learn, plan, _ = fitted(classifier(tok), calibrate=True, **options)
    first = classifier(tok)
    seed_everything(3)
    first = held_out_learner(first)
    train, held_out = (len(dl.dataset) for dl in first.dls.loaders)
    assert (train, held_out) == (22, 5)
    with first.no_bar(), first.no_logging():
        first.transfer_plan(12, 'full', lr=1e-2).fit(first)
        scores, targets = first.get_preds(act=lambda o: o)
    grid = np.exp(np.linspace(0, np.log(30), 20001))
    scores, targets = scores.double().numpy(), targets.numpy()
    losses = [held_out * nll(scores / t, targets) + np.log(t) ** 2 / 2 for t in grid]
    assert np.isclose(plan.temperature, grid[np.argmin(losses)], rtol=2e-3) and plan.temperature > 1.01
    after = learn.get_preds()[0]
    assert torch.allclose(after, (before.log() / plan.temperature).softmax(1), atol=1e-5)
    texts = [text for text, is_valid in zip(TEXTS, FRAME.valid) if is_valid]
    assert np.allclose(learn.predictor(verbose=False).predict_proba(texts), after, atol=1e-5)


def test_explained(tok):  # noqa: F811
    learn = classifier(tok)
    assert not learn.transfer_plan(3).calibrated and 'temperature' not in learn.transfer_plan(3).explain()
    _, plan, _ = fitted(learn, epochs=1, calibrate=True)
    assert plan.calibrated and 'temperature that suits the last fifth' in plan.explain()


def test_needs_rows_of_classes(tok):  # noqa: F811
    learn = tagger(tok)
    before = {name: p.clone() for name, p in learn.model.named_parameters()}
    with pytest.raises(FastaiTLError, match='classification'):
        learn.fit_transfer(1, calibrate=True)
    assert all(torch.equal(p, before[name]) for name, p in learn.model.named_parameters())
    with pytest.raises(FastaiTLError, match='best=True'):
        classifier(tok).fit_transfer(1, calibrate=True, best=True)
    with pytest.raises(FastaiTLError, match='read once'):
        classifier(tok, weighted=True).fit_transfer(1, calibrate=True)


def test_a_layer_that_lora_changes_is_refused():
    "Its last linear layer is not that of the scores, but what is added to them"
    model = torch.nn.ModuleDict(dict(base_layer=torch.nn.Linear(4, 3), lora_B=torch.nn.Linear(2, 3)))
    with pytest.raises(FastaiTLError, match='lora_B'):
        scores_layer(model, 3)
