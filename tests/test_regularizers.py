"L2-SP, R-Drop and averaged weights in the fits that people run: gradual unfreezing, a cache, AWD_LSTM, tags, resuming."

import pytest
import torch
from fastai.callback.core import Callback
from small_learners import answerer, classifier, tagger, ulmfit_classifier

from fastai_tl.all import *


class Steps(Callback):
    "Record the weights after each step, and what trained"

    order = 40

    def before_fit(self):
        self.weights = []

    def after_step(self):
        self.weights.append({name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad})


class Crash(Callback):
    def before_epoch(self):
        if self.epoch == 2:
            raise KeyboardInterrupt


def quiet(learn, method, *args, **kwargs):
    with learn.no_bar(), learn.no_logging():
        getattr(learn, method)(*args, **kwargs)
    return learn


def weights(learn):
    return {name: p.detach().clone() for name, p in learn.model.named_parameters()}


@pytest.mark.parametrize('make', [classifier, tagger, ulmfit_classifier])
@pytest.mark.parametrize('cache', [False, True])
def test_mean_of_all_steps_under_gradual_unfreezing(make, cache, small_tokenizers):
    if cache and make is tagger:
        pytest.skip('the pass is the same as that of the classifier')
    learn = make(small_tokenizers)
    steps = Steps()
    quiet(learn, 'fit_gradual', cbs=[steps, SWA(start=0.0)], cache=cache)
    for name, p in learn.model.named_parameters():
        path = [step[name] for step in steps.weights if name in step]
        if path:
            torch.testing.assert_close(p.detach(), torch.stack(path).mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('cbs', [lambda: [L2SP(0.1), SWA(start=0.3)], lambda: [EMA(0.9), RDrop(), BestEpoch()]])
def test_resumed_fit_is_the_same(cbs, small_tokenizers, tmp_path):
    def fit(folder, more=()):
        seed_everything(3)
        learn = classifier(small_tokenizers)
        return quiet(learn, 'fit', 4, 1e-2, cbs=[*cbs(), ResumableFit(folder / 'fit.safetensors'), *more])

    whole = weights(fit(tmp_path / 'a'))
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / 'b', [Crash()])
    resumed = weights(fit(tmp_path / 'b'))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize('make', [classifier, tagger, ulmfit_classifier])
def test_l2sp_keeps_weights_near_their_start(make, small_tokenizers):
    def distance(cbs):
        seed_everything(3)
        learn = make(small_tokenizers)
        start = weights(learn)
        quiet(learn, 'fit', 3, 3e-2, cbs=cbs)
        moved = weights(learn)
        return sum((moved[name] - start[name]).square().sum() for name in start if 'encoder' in name).sqrt().item()

    assert distance([L2SP(alpha=3.0)]) < 0.8 * distance([])


def test_l2sp_leaves_frozen_weights_alone(small_tokenizers):
    learn = classifier(small_tokenizers)
    start = weights(learn)
    learn.freeze_to(-1)
    quiet(learn, 'fit', 1, 1e-2, cbs=L2SP(1.0))
    moved = [name for name, p in weights(learn).items() if not torch.equal(p, start[name])]
    trained = [name for name, p in learn.model.named_parameters() if p.requires_grad]
    assert moved and set(moved) <= set(trained)


class TwoPasses(Callback):
    "Compute the loss of R-Drop from two passes with the dropout masks that the model will have"

    order = -10

    def before_batch(self):
        if not self.training:
            return
        state = torch.get_rng_state()
        first, second = (self.model(*self.xb) for _ in range(2))
        torch.set_rng_state(state)
        first, second = (out[0] if isinstance(out, tuple) else out for out in (first, second))
        first, second = (out.as_subclass(torch.Tensor) for out in (first, second))
        y = self.yb[0].as_subclass(torch.Tensor)
        losses = self.loss_func(first, y) + self.loss_func(second, y)
        p, q = first.log_softmax(-1), second.log_softmax(-1)
        divergence = (p.exp() * (p - q) + q.exp() * (q - p)).sum(-1)
        self.expected = losses / 2 + 2 / 4 * divergence[y != -100].mean()

    def after_batch(self):
        if self.training:
            torch.testing.assert_close(self.loss.as_subclass(torch.Tensor), self.expected.detach())


@pytest.mark.parametrize('make', [classifier, tagger, ulmfit_classifier])
def test_rdrop_is_the_loss_of_two_passes(make, small_tokenizers):
    learn = quiet(make(small_tokenizers), 'fit', 2, 1e-3, cbs=[RDrop(2.0), TwoPasses()])
    assert learn.recorder.losses


def test_rdrop_refuses_other_tasks_before_the_fit(small_tokenizers):
    learn = answerer(small_tokenizers)
    start = weights(learn)
    with pytest.raises(FastaiTLError, match='tasks classification, multilabel, tagging'):
        quiet(learn, 'fit', 1, cbs=RDrop())
    assert all(torch.equal(p, start[name]) for name, p in weights(learn).items())
