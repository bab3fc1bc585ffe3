"""The ways that benchmarks/fit_transfer compares, apart from the Trainer: `fit_transfer` and what was tried for it.

A way is a function of the data, the seed and the options; it gives the models to test with a suffix of the name, the
clock of the fit, and what else is to be recorded. Ways that share a training are tested from one run of it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'recipes'))
from common import load_benchmark
from task import Clock


def learner(d, seed, a):
    "A Learner that validates nothing and shows nothing"
    learn = load_benchmark('recipes').our_learner(d, seed, a)
    learn.remove_cb(learn.progress)
    learn.logger = lambda *o: None
    learn._do_epoch_validate = lambda *o, **k: None
    return learn


def label_smoothing(share):
    "A Callback that trains with smoothed labels"
    from fastai.callback.core import Callback
    from torch.nn import functional as F

    class LabelSmoothing(Callback):
        def after_loss(self):
            loss = F.cross_entropy(self.pred.float(), self.yb[0].long(), label_smoothing=share)
            self.learn.loss_grad, self.learn.loss = loss, loss.detach()

    return LabelSmoothing()


def mean_of_last(start):
    "A Callback that keeps the mean of the weights from a share of the fit on, and leaves those of the last step"
    from fastai_tl.all import SWA

    class Mean(SWA):
        def after_fit(self):
            self.final = {name: v.clone() for name, v in self.averages.items()}

    return Mean(start)


def fit(d, seed, a, smooth=0, mean=None, **kwargs):
    "The models of one call of `fit_transfer`: calibrated or not, and the mean of the weights of the last steps"
    from fastai.callback.schedule import fit_one_cycle  # noqa: F401
    from fastai_tl.tune.held_out_temperature import scale_scores

    learn = learner(d, seed, a)
    cbs = [label_smoothing(smooth)] if smooth else []
    if mean is not None:
        cbs.append(mean_of_last(mean))
    with learn.no_bar(), learn.no_logging(), Clock() as clock:
        plan = learn.fit_transfer(d.epochs, cbs=cbs, **kwargs)
    temperature = plan.temperature
    yield '', learn.model.hf, clock, dict(temperature=temperature)
    if temperature is not None:
        scale_scores(learn.model, 1 / temperature, len(d.classes))
        yield ', not calibrated', learn.model.hf, clock, {}
    if mean is not None:
        for name, p in learn.model.named_parameters():
            p.data.copy_(cbs[-1].final.get(name, p.data))
        yield ', mean of the last third', learn.model.hf, clock, {}


WAYS = {
    'fit_transfer': (fit, dict()),
    'no temperature': (fit, dict(calibrate=False)),
    'mean of the last third': (fit, dict(calibrate=False, mean=2 / 3)),
    'smooth .1': (fit, dict(calibrate=False, smooth=0.1, mean=2 / 3)),
    'rate 1e-4': (fit, dict(calibrate=False, lr=1e-4)),
    **{f'rate {lr:g}': (fit, dict(calibrate=False, lr=lr)) for lr in (3e-4, 6e-4, 1.2e-3)},
    'discriminative': (fit, dict(calibrate=False, recipe='discriminative')),
    'full': (fit, dict(calibrate=False, recipe='full')),
    'head_then_full': (fit, dict(calibrate=False, recipe='head_then_full')),
}
