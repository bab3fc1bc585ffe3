"Every Callback of fastai runs on our Learners; TensorBoard gets the texts and predictions of every task."

import importlib
import inspect
import pkgutil

import fastai.callback
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback, FetchPredsCallback
from fastai.callback.data import CollectDataCallback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.hook import ActivationStats, HookCallback
from fastai.callback.preds import MCDropoutCallback
from fastai.callback.progress import CSVLogger, ShowGraphCallback
from fastai.callback.rnn import ModelResetter, RNNRegularizer
from fastai.callback.schedule import *
from fastai.callback.tracker import *
from fastai.callback.training import BnFreeze, GradientAccumulation, GradientClip, ShortEpochCallback
from small_learners import MAKERS

from fastai_tl.all import *

LEARNERS = ('classifier', 'ulmfit_classifier')

# Callback -> how it is made, for a Learner. The Callbacks that fastai adds by itself are added in every fit
RUN = dict(
    TerminateOnNaNCallback=lambda learn: TerminateOnNaNCallback(),
    TrackerCallback=lambda learn: TrackerCallback(),
    EarlyStoppingCallback=lambda learn: EarlyStoppingCallback(patience=9),
    SaveModelCallback=lambda learn: SaveModelCallback(),
    ReduceLROnPlateau=lambda learn: ReduceLROnPlateau(),
    ShortEpochCallback=lambda learn: ShortEpochCallback(pct=.5, short_valid=False),
    GradientAccumulation=lambda learn: GradientAccumulation(8),
    GradientClip=lambda learn: GradientClip(.1),
    BnFreeze=lambda learn: BnFreeze(),
    CSVLogger=lambda learn: CSVLogger(),
    ShowGraphCallback=lambda learn: ShowGraphCallback(),
    ProgressCallback=lambda learn: None,
    ActivationStats=lambda learn: ActivationStats(modules=linear_layers(learn)),
    HookCallback=lambda learn: Means(modules=linear_layers(learn)),
    ParamScheduler=lambda learn: ParamScheduler({'lr': SchedLin(1e-3, 1e-4)}),
    CollectDataCallback=lambda learn: CollectDataCallback(),
    ModelResetter=lambda learn: ModelResetter() if hasattr(learn.model, 'reset') else None,
    RNNRegularizer=lambda learn: RNNRegularizer(alpha=.1, beta=.1) if has_rnn(learn) else None,
    RNNCallback=lambda learn: None, # fastai adds it to the Learner of an AWD_LSTM
    MCDropoutCallback=lambda learn: MCDropoutCallback(),
    ChannelsLast=lambda learn: ChannelsLast(),
    TensorBoardCallback=lambda learn: tensorboard_callback(learn, trace_model=not has_rnn(learn)),
)
BY_OTHER_MEANS = dict(
    TrainEvalCallback='in every fit', Recorder='in every fit', CastToTensor='in every fit',
    GatherPredsCallback='in `get_preds`', FetchPredsCallback='in its own test', LRFinder='in its own test',
    SkipToEpoch='in its own test', MixedPrecision='in its own test', ModelToHalf='part of NonNativeMixedPrecision',
    NonNativeMixedPrecision='float16 without autocast needs a GPU', FP16TestCallback='needs a GPU',
)
NOT_FOR_TEXTS = dict(
    MixHandler='mixes inputs; token ids cannot be mixed', MixUp='as MixHandler', CutMix='as MixHandler',
    TensorBoardBaseCallback='a base class', TensorBoardProjectorCallback='for images, as fastai says',
)
OTHER_MODULES = ('azureml', 'comet', 'neptune', 'wandb', 'captum') # need an account, or are no Callbacks


class Means(HookCallback):
    def hook(self, module, inputs, output):
        return output.mean()


def has_rnn(learn):
    return hasattr(learn, 'rnn') or any(isinstance(m, torch.nn.LSTM) for m in learn.model.modules())


def linear_layers(learn):
    return [m for m in learn.model.modules() if isinstance(m, torch.nn.Linear)][-2:]


def tensorboard_callback(learn, **kwargs):
    pytest.importorskip('tensorboard')
    from fastai.callback.tensorboard import TensorBoardCallback
    return TensorBoardCallback(log_dir=learn.path/'log', **kwargs)


def make(name, toks, tmp_path):
    seed_everything(0)
    learn = MAKERS[name](toks)
    learn.path = tmp_path
    return learn


def callbacks_of_fastai():
    "Return the names of all Callbacks in fastai's `callback` package and in its `learner` module"
    found = {'Recorder', 'CastToTensor', 'SkipToEpoch'}
    for module in pkgutil.iter_modules(fastai.callback.__path__):
        if module.name in OTHER_MODULES:
            continue
        try:
            members = vars(importlib.import_module(f'fastai.callback.{module.name}'))
        except ImportError: # a dependency that is not installed
            continue
        for name, cls in members.items():
            is_own = inspect.isclass(cls) and cls.__module__.startswith('fastai.callback')
            if is_own and issubclass(cls, Callback) and cls is not Callback:
                found.add(name)
    return found


def test_no_callback_is_left_out():
    known = {*RUN, *BY_OTHER_MEANS, *NOT_FOR_TEXTS}
    assert callbacks_of_fastai() <= known


@pytest.mark.parametrize('cb', RUN)
@pytest.mark.parametrize('name', LEARNERS)
def test_callback(small_tokenizers, tmp_path, capfd, name, cb):
    "A fit with the Callback trains, validates, predicts, and can go on without the Callback"
    learn = make(name, small_tokenizers, tmp_path)
    before = [p.detach().clone() for p in learn.model.parameters()]
    callback = RUN[cb](learn)
    learn.fit(2, 1e-3, cbs=callback)
    assert np.isfinite([row[:2] for row in learn.recorder.values]).all()
    assert len(learn.recorder.values) == 2
    assert any(not torch.equal(p, q) for p, q in zip(before, learn.model.parameters()))
    if callback is not None:
        assert callback not in learn.cbs
    with learn.no_bar(), learn.no_logging():
        probs = learn.get_preds()[0]
        learn.fit(1, 1e-3)
    assert torch.isfinite(probs).all()


@pytest.mark.parametrize('name', LEARNERS)
def test_what_the_callbacks_found(small_tokenizers, tmp_path, capfd, name):
    "The logs, hooks and collected data agree with the Recorder and with the data"
    learn = make(name, small_tokenizers, tmp_path)
    stats = ActivationStats(modules=linear_layers(learn))
    collected = CollectDataCallback()
    learn.fit(2, 1e-3, cbs=[CSVLogger(), stats, collected])
    table = pd.read_csv(tmp_path/'history.csv')
    assert table.valid_loss.tolist() == pytest.approx([row[1] for row in learn.recorder.values], abs=1e-4)
    n_steps = len(learn.recorder.losses)
    assert len(stats.stats) == n_steps and all(len(step) == 2 for step in stats.stats)
    n_rows = sum(len(targets[0]) for _, targets, *_ in collected.data)
    assert n_rows == 2*(20 + 2) # two epochs of 20 training and 2 validation rows


@pytest.mark.parametrize('name', LEARNERS)
def test_other_means(small_tokenizers, tmp_path, capfd, name):
    "lr_find, start_epoch, fetched predictions, Monte Carlo dropout and both mixed precisions"
    learn = make(name, small_tokenizers, tmp_path)
    with learn.no_bar(), learn.no_logging():
        assert 1e-7 < learn.lr_find(num_it=20, show_plot=False).valley < 10
        learn.fit(3, 1e-3, start_epoch=2)
        fetch = FetchPredsCallback()
        learn.fit(1, 1e-3, cbs=fetch)
        assert torch.isfinite(fetch.preds[0]).all()
        sure, unsure = [learn.get_preds(cbs=cbs)[0] for cbs in (None, MCDropoutCallback())]
        assert torch.equal(sure, learn.get_preds()[0])
        assert not torch.equal(sure, unsure)
        learn.to_bf16()
        assert any(isinstance(cb, MixedPrecision) for cb in learn.cbs)
        learn.fit(1, 1e-3)
        learn.to_fp32()
        values = learn.recorder.values
        assert np.isfinite(values[0][:2]).all()


# --- TensorBoard ---

# for TensorBoard as `classifier`, `tagger` and `causal_lm`
NOT_AGAIN = ('class_weights', 'balanced', 'own_weighted_loss', 'weighted_tagger', 'chunked_causal_lm')

# PyTorch's tracer cannot follow an AWD_LSTM, which keeps states between batches; fastai traces with the source alone,
# but the decoder of a T5 needs an input
NOT_TRACED = ('ulmfit_lm', 'ulmfit_classifier', 't5')


def logged(folder):
    "Return the scalars and texts that a folder of TensorBoard has, by tag"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder))
    events.Reload()
    scalars = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()['scalars']}
    texts = {}
    for tag in events.Tags()['tensors']:
        texts[tag] = [event.tensor_proto.string_val[0].decode() for event in events.Tensors(tag)]
    return scalars, texts


@pytest.mark.parametrize('name', [n for n in MAKERS if n not in NOT_AGAIN])
def test_tensorboard(small_tokenizers, tmp_path, name):
    "TensorBoardCallback as it comes, for every task: the losses of the Recorder and a table of predictions"
    learn = make(name, small_tokenizers, tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 1e-3, cbs=tensorboard_callback(learn, trace_model=name not in NOT_TRACED))
    scalars, texts = logged(tmp_path/'log')
    assert len(scalars['train_loss']) >= len(learn.recorder.losses)
    assert scalars['valid_loss'] == pytest.approx([row[1] for row in learn.recorder.values], rel=1e-5)
    tables = next(value for tag, value in texts.items() if tag.startswith('Sample results'))
    rows = tables[-1].split('\n')
    assert len(tables) == 2 and rows[0] == '| text | target | predicted |'
    assert len(rows) > 2 and all(row.count('|') == 4 for row in rows[2:])
