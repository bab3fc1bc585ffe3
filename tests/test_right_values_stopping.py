"Early stopping, saving the best epoch and reducing the rate, in fits with gradual unfreezing."

import warnings

import pytest
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.schedule import *
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from transformers import BertConfig

from fastai_tl.all import *

TEXTS = [f'{word} film number {i}' for i in range(15) for word in ('good', 'bad')]


@pytest.fixture(scope='module')
def tok():
    return train_tokenizer(TEXTS, 300)


@pytest.fixture
def learn(tok, tmp_path):
    "A classifier with six groups: embeddings, four layers and head"
    seed_everything(0)
    dls = HFTextDataLoaders.from_lists(TEXTS, ['a', 'b'] * 15, tok, bs=8, verbose=False)
    config = BertConfig(vocab_size=len(tok), hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
                        intermediate_size=32, pad_token_id=tok.pad_token_id)
    return hf_classifier_learner(dls, config, path=tmp_path, metrics=[])


class Losses(Callback):
    "Replace the recorded validation losses, for all Callbacks that read them"
    order = 55 # after the Recorder (50), before GradualUnfreezing (59) and the trackers (60)

    def __init__(self, loss_of):
        self.loss_of = loss_of

    def after_epoch(self):
        loss = float(self.loss_of(self.epoch))
        self.recorder.log[2] = loss
        self.recorder.values[-1][1] = loss


def never_better(epoch):
    return 1


def fit(learn, method, *args, **kwargs):
    "Fit without output; the messages of all warnings about stages and rates"
    with warnings.catch_warnings(record=True) as caught, learn.no_bar(), learn.no_logging():
        warnings.simplefilter('always')
        result = getattr(learn, method)(*args, **kwargs)
    about = ('did not train', 'stay frozen', 'no effect')
    return result, [str(w.message) for w in caught if any(words in str(w.message) for words in about)]


def all_train(learn):
    return all(p.requires_grad for p in learn.model.parameters())


def epochs_by_patience(losses, lengths, patience):
    "An independent count: the number of epochs until early stopping that counts epochs of the last stage only"
    best = float('inf')
    wait = 0
    last_stage = sum(lengths[:-1])
    for epoch, loss in enumerate(losses[:sum(lengths)]):
        is_better = loss < best
        best = min(best, loss)
        if is_better or epoch < last_stage:
            wait = 0
        else:
            wait += 1
        if wait >= patience:
            return epoch + 1
    return sum(lengths)


SLOW = pytest.mark.slow


@pytest.mark.parametrize('patience', [1, pytest.param(2, marks=SLOW), 3])
@pytest.mark.parametrize('lengths', [[3, 3, 3], [1, 4, 6], pytest.param([2, 1, 9], marks=SLOW)])
def test_early_stopping_counts_epochs_of_the_last_stage(learn, lengths, patience):
    series = [5, 4, 6, 7, 6, 3, 4, 2, 4, 4, 1, 3]
    for losses in (series, series[::-1], [1] * 12):
        cbs = [Losses(lambda epoch: losses[epoch]), EarlyStoppingCallback(patience=patience)]
        unfreezing, messages = fit(learn, 'fit_gradual', epochs=lengths, groups=[1, 3, 6], lr=1e-3, cbs=cbs)
        expected = epochs_by_patience(losses, lengths, patience)
        assert len(learn.recorder.values) == expected
        assert unfreezing.table().epochs.tolist() == [*lengths[:2], expected - sum(lengths[:2])]
        assert all_train(learn) and not messages


def test_early_stopping_and_a_plateau(learn):
    "Each stage ends after two epochs without improvement, and the fit four epochs after the last unfreezing"
    unfreezing = GradualUnfreezing(when='plateau', patience=2)
    cbs = [unfreezing, Losses(never_better), EarlyStoppingCallback(patience=4)]
    _, messages = fit(learn, 'fit', 40, 1e-3, cbs=cbs)
    assert unfreezing.table().epochs.tolist() == [3, 2, 2, 2, 2, 4]
    assert all_train(learn) and not messages


@pytest.mark.parametrize('place', ['fit', 'learner'])
def test_early_stopping_in_other_fits(learn, place):
    "A Callback of the Learner, a plan of `fit_transfer`, and a fit without stages, which stops as before"
    stop = EarlyStoppingCallback(patience=1)
    if place == 'learner':
        learn.add_cbs([stop, Losses(never_better)])
    cbs = [stop, Losses(never_better)] if place == 'fit' else None
    _, messages = fit(learn, 'fit_transfer', epochs=[2, 2], groups=[1, 6], cbs=cbs)
    assert len(learn.recorder.values) == 3 and all_train(learn) and not messages
    fit(learn, 'fit', 5, 1e-3, cbs=cbs)
    assert len(learn.recorder.values) == 2


def test_a_fit_that_ends_early_names_the_layers_that_did_not_train(learn):
    class Stop(Callback):
        def after_epoch(self):
            if self.epoch == 2:
                raise CancelFitException

    _, messages = fit(learn, 'fit_gradual', epochs=[2, 2, 2], groups=[1, 3, 6], lr=1e-3, cbs=Stop())
    assert messages == ['The fit ended in stage 2 of 3: these layers did not train: embeddings – layer.1.']
    assert sum(not p.requires_grad for p in learn.model.parameters()) > 0
    _, messages = fit(learn, 'fit', 3, 1e-3, cbs=GradualUnfreezing(when='plateau', patience=2))
    assert messages[0].endswith('these layers did not train: embeddings – layer.3.')


@pytest.mark.parametrize('cb', [SaveModelCallback, BestEpoch])
def test_weights_of_an_early_stage_are_named(learn, cb):
    "The best epoch is the second, of the first stage: the restored body is that from before the fit"
    body = [p.clone() for p in learn.model.parameters()][:5]
    losses = [3, 1, 2, 2, 2, 2]
    cbs = [Losses(lambda epoch: losses[epoch]), cb()]
    _, messages = fit(learn, 'fit_gradual', epochs=[2, 2, 2], groups=[1, 3, 6], lr=1e-2, cbs=cbs)
    expected = 'The weights are those of epoch 1, in stage 1 of 3: these layers did not train: embeddings – layer.3.'
    assert messages == [expected]
    assert all(torch.equal(p, q) for p, q in zip(body, learn.model.parameters()))
    losses[5] = 0
    _, messages = fit(learn, 'fit_gradual', epochs=[2, 2, 2], groups=[1, 3, 6], lr=1e-2, cbs=cbs)
    assert not messages


def rates_by_hand(lengths, factors, patience):
    "The rate of each epoch, if no epoch is better than the first"
    rates = []
    base = 1.
    for stage, length in enumerate(lengths):
        wait = 0
        for epoch in range(length):
            rates.append(base * factors[stage])
            is_first = stage == 0 and epoch == 0
            is_end = epoch == length - 1 and stage < len(lengths) - 1
            wait = 0 if is_first or is_end else wait + 1
            if wait == patience:
                base /= 10
                wait = 0
    return rates


@pytest.mark.parametrize('patience', [1, 2])
@pytest.mark.parametrize('factors', [[1., 1., 1.], [1., .5, .1]])
def test_reduced_rates(learn, patience, factors):
    "The patience begins at each stage, and the factor of a stage is applied once"
    lengths = [3, 4, 4]
    cbs = [GradualUnfreezing(epochs=lengths, groups=[1, 3, 6], factor=factors), Losses(never_better),
           ReduceLROnPlateau(patience=patience)]
    _, messages = fit(learn, 'fit', sum(lengths), 1., wd=0., cbs=cbs)
    n_batches = len(learn.dls.train)
    assert learn.recorder.lrs[::n_batches] == pytest.approx(rates_by_hand(lengths, factors, patience))
    assert not messages


def test_a_reduced_rate_under_a_schedule_is_refused_with_a_warning(learn):
    _, messages = fit(learn, 'fit_gradual', epochs=[1, 1], groups=[1, 6], cbs=ReduceLROnPlateau())
    assert len(messages) == 1 and messages[0].startswith('ReduceLROnPlateau has no effect')
