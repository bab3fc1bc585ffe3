"""The ways that benchmarks/fit_transfer compares, apart from the Trainer: `fit_transfer` and what was tried for it."""

import sys
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'recipes'))
from common import load_benchmark
from task import Clock


def learner(d, seed, a):
    learn = load_benchmark('recipes').our_learner(d, seed, a)
    learn.remove_cb(learn.progress)
    learn.logger = lambda *o: None
    learn._do_epoch_validate = lambda *o, **k: None
    return learn


class Smooth:
    "Cross-entropy with smoothed labels, for training alone"

    def __new__(cls, share):
        from fastai.callback.core import Callback
        from torch.nn import functional as F

        class LabelSmoothing(Callback):
            def after_loss(self):
                if self.training:
                    loss = F.cross_entropy(self.pred.float(), self.yb[0].long(), label_smoothing=share)
                    self.learn.loss_grad = loss
                    self.learn.loss = loss.detach()

        return LabelSmoothing()


def fit(d, seed, a, smooth=0, swa=None, **kwargs):
    "`fit_transfer` with options, and training aids that it does not have"
    from fastai.callback.schedule import fit_one_cycle  # noqa: F401
    from fastai_tl.all import SWA

    learn = learner(d, seed, a)
    cbs = []
    if smooth:
        cbs.append(Smooth(smooth))
    if swa is not None:
        cbs.append(SWA(swa))
    with learn.no_bar(), learn.no_logging(), Clock() as clock:
        learn.fit_transfer(d.epochs, cbs=cbs, **kwargs)
    return learn.model.hf, clock, {}


WAYS = {
    'now': fit,
    'rate 5e-5': partial(fit, lr=5e-5),
    'rate 1e-4': partial(fit, lr=1e-4),
    'discriminative': partial(fit, recipe='discriminative'),
    'discriminative 1e-4': partial(fit, recipe='discriminative', lr=1e-4),
    'head_then_full': partial(fit, recipe='head_then_full'),
    'head_then_full 1e-4': partial(fit, recipe='head_then_full', lr=1e-4),
    'top_layers': partial(fit, recipe='top_layers'),
    'smooth .05': partial(fit, smooth=0.05),
    'smooth .1': partial(fit, smooth=0.1),
    'mean of the last third': partial(fit, swa=2 / 3),
    'mean of the last half': partial(fit, swa=1 / 2),
}
