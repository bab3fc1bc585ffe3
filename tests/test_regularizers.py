"L2-SP, R-Drop, FGM, averaged weights in the fits that people run: gradual unfreezing, a cache, AWD_LSTM, resuming."

import pytest
import torch
from fastai.callback.core import Callback
from small_learners import answerer, classifier, tagger, ulmfit_classifier

from fastai_tl.all import *
from fastai_tl.tune.regularizers import token_embeddings


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


class Gain(Callback):
    "Compare the loss at the moved embeddings with the gradients of the embeddings"

    order = FGM.order + 0.1

    def after_loss(self):
        if not self.training:
            return
        layer, chunks = token_embeddings(self.model)
        kept = []
        hook = layer.register_forward_hook(lambda module, args, out: kept.append(out))
        pred = self.model(*self.xb)
        hook.remove()
        loss = self.loss_func(pred[0] if isinstance(pred, tuple) else pred, *self.yb)
        squares = torch.zeros(len(self.yb[0]))
        for g in torch.autograd.grad(loss, kept):
            squares[: len(g)] += g.flatten(1).square().sum(1)
        moved = (self.loss - loss).item()
        self.gain = (moved - loss.item()) / self.fgm.epsilon
        self.expected = squares.sqrt().sum().item()


@pytest.mark.parametrize('make', [classifier, tagger, ulmfit_classifier])
def test_fgm_moves_along_the_gradient(make, small_tokenizers):
    "To first order the loss grows by epsilon times the norm of the gradient of each text"
    learn = make(small_tokenizers)
    if make is ulmfit_classifier:
        learn.model[0].bptt = 8  # texts of several chunks
    for m in learn.model.modules():
        for name in ('p', 'embed_p', 'dropout_prob', 'attention_dropout'):
            if isinstance(getattr(m, name, None), float):
                setattr(m, name, 0.0)
        if hasattr(m, 'weight_p'):
            m.weight_p = 1e-9
        if isinstance(m, torch.nn.BatchNorm1d):
            m.momentum = 0.0
    gain = Gain()
    quiet(learn, 'fit', 1, 1e-3, cbs=[FGM(epsilon=1e-4), gain])
    assert gain.gain == pytest.approx(gain.expected, rel=0.05)


def test_fgm_resumes_and_leaves_frozen_weights_and_predictions_alone(small_tokenizers, tmp_path):
    def fit(folder, more=()):
        seed_everything(3)
        learn = classifier(small_tokenizers)
        learn.freeze_to(-1)
        start = weights(learn)
        quiet(learn, 'fit', 4, 1e-2, cbs=[FGM(), ResumableFit(folder / 'fit.safetensors'), *more])
        return learn, start

    learn, start = fit(tmp_path / 'a')
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / 'b', [Crash()])
    resumed = weights(fit(tmp_path / 'b')[0])
    trained = {name for name, p in learn.model.named_parameters() if p.requires_grad}
    for name, p in weights(learn).items():
        assert torch.equal(p, resumed[name])
        assert torch.equal(p, start[name]) != (name in trained)
    assert not learn.model.hf.get_input_embeddings()._forward_hooks


def test_fgm_refuses_other_tasks_and_caches(small_tokenizers):
    with pytest.raises(FastaiTLError, match='tasks classification'):
        quiet(answerer(small_tokenizers), 'fit', 1, cbs=FGM())
    with pytest.raises(FastaiTLError, match='Train without a cache'):
        quiet(classifier(small_tokenizers), 'fit_gradual', cbs=FGM(), cache=True)
