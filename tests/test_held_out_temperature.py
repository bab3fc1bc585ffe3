"""The temperature of `fit_transfer`: the weights of the fit without one, scores that are divided by a temperature from
training rows that a first training leaves out, resumed fits, and when there is none."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
import test_recipes
import torch
from fastai.callback.core import Callback, CancelValidException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.tracker import EarlyStoppingCallback
from fastai.callback.training import ShortEpochCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from test_recipes import BERT, FRAME, TEXTS, awd, classifier, tagger, tok  # noqa: F401
from transformers import BertConfig, BertModel

from fastai_tl.all import *
from fastai_tl.tune.held_out_temperature import held_out_learner, held_out_temperature, scores_layer

OPTIONS = dict(epochs=12, recipe='full', lr=1e-2, one_position=False)


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


def test_the_copy_is_left_alone_by_other_callbacks(tok):  # noqa: F811
    "It has a copy of a regularizer, but not of a Callback that may write files, and it does not validate"
    epochs, other = [], []

    class Seen(Callback):
        def before_epoch(self):
            other.append(self.epoch)

    class SeenL2SP(L2SP):
        def before_epoch(self):
            epochs.append(len(self.dls.train.dataset))

        def before_validate(self):
            epochs.append('validation')

    fitted(classifier(tok), calibrate=True, cbs=[Seen(), SeenL2SP()], epochs=2, recipe='full')
    assert epochs == [22, 22, 27, 'validation', 27, 'validation'] and other == [0, 1]


class NoValidation(Callback):
    def before_validate(self):
        raise CancelValidException


def nll(scores, targets):
    "Mean negative log-likelihood, by numpy"
    scores = scores - scores.max(1, keepdims=True)
    return (np.log(np.exp(scores).sum(1)) - scores[np.arange(len(scores)), targets]).mean()


def test_temperature_of_the_rows_that_were_held_out(tok, wrong_labels):  # noqa: F811
    "The first training by hand, the temperature by a grid; what is served is the scaled probability"
    learn, _, _ = fitted(classifier(tok), **OPTIONS)
    before = learn.get_preds()[0]
    learn, plan, _ = fitted(classifier(tok), calibrate=True, **OPTIONS)
    first = classifier(tok)
    seed_everything(3)
    first = held_out_learner(first)
    train, held_out = (len(dl.dataset) for dl in first.dls.loaders)
    assert (train, held_out) == (22, 5)
    with first.no_bar(), first.no_logging():
        first.transfer_plan(12, 'full', lr=1e-2).fit(first, cbs=NoValidation())
        scores, targets = first.get_preds(act=lambda o: o)
    grid = np.exp(np.linspace(0, np.log(30), 20001))
    scores, targets = scores.double().numpy(), targets.numpy()
    losses = [held_out * nll(scores / t, targets) + np.log(t) ** 2 / 2 for t in grid]
    assert np.isclose(plan.temperature, grid[np.argmin(losses)], rtol=2e-3) and plan.temperature > 1.01
    after = learn.get_preds()[0]
    assert torch.allclose(after, (before.log() / plan.temperature).softmax(1), atol=1e-5)
    texts = [text for text, is_valid in zip(TEXTS, FRAME.valid) if is_valid]
    assert np.allclose(learn.predictor(verbose=False).predict_proba(texts), after, atol=1e-5)


class Killed(Exception):
    pass


class KillAfter(Callback):
    order = 200

    def __init__(self, epoch):
        self.at = epoch

    def after_epoch(self):
        if self.epoch == self.at:
            raise Killed('now')


@pytest.mark.parametrize('epoch', [0, 5, 11])
def test_a_resumed_fit_is_the_same(epoch, tok, wrong_labels, tmp_path):  # noqa: F811
    "The first training runs again, and gives the same temperature"

    def run(file, *cbs):
        _, plan, weights = fitted(classifier(tok), calibrate=True, cbs=[ResumableFit(file), *cbs], **OPTIONS)
        return plan.temperature, weights

    temperature, whole = run(tmp_path / 'whole.safetensors')
    with pytest.raises(Killed):
        run(tmp_path / 'fit.safetensors', KillAfter(epoch))
    again, weights = run(tmp_path / 'fit.safetensors')
    assert again == temperature > 1
    assert all(torch.equal(value, whole[name]) for name, value in weights.items())
    finished, weights = run(tmp_path / 'fit.safetensors')
    assert finished == temperature and all(torch.equal(value, whole[name]) for name, value in weights.items())


def test_the_same_cell_again_after_an_interrupt(tok, tmp_path):  # noqa: F811
    "The same Learner: its temperature is that of the checkpoint, and no copy of the half-trained model is made"
    _, plan, expected = fitted(trained_classifier(tok), epochs=3, cbs=ResumableFit(tmp_path / 'whole.safetensors'))
    learn = trained_classifier(tok)
    file = tmp_path / 'again.safetensors'
    with pytest.raises(Killed):
        fitted(learn, epochs=3, cbs=[ResumableFit(file), KillAfter(0)])
    _, again, weights = fitted(learn, epochs=3, cbs=ResumableFit(file))
    assert again.calibrated and again.temperature == plan.temperature
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())
    fresh = trained_classifier(tok)
    fitted(fresh, epochs=3, calibrate=False, cbs=ResumableFit(tmp_path / 'without.safetensors'))
    _, without, _ = fitted(trained_classifier(tok), epochs=3, cbs=ResumableFit(tmp_path / 'without.safetensors'))
    assert not without.calibrated, 'as it was begun'


def test_explained(tok, capsys, wrong_labels):  # noqa: F811
    plan = classifier(tok).transfer_plan(3)
    assert not plan.calibrated and 'temperature' not in plan.explain()
    seed_everything(3)
    learn = classifier(tok)
    with learn.no_bar():
        plan = learn.fit_transfer(calibrate=True, **OPTIONS)
    out = capsys.readouterr().out
    assert 'a copy of the model and a part of the training rows' in out and 'calibrate=False' in out
    assert plan.temperature > 1 and f'divided by a temperature of {plan.temperature:.2f}' in out
    assert len(learn.recorder.losses) == plan.table().steps.sum()
    fitted(classifier(tok), calibrate=True, **OPTIONS)
    assert capsys.readouterr().out == '', '`no_logging` silences it'


def trained_classifier(tok, n=60, pairs=False, **kw):  # noqa: F811
    "A new head on layers that look trained, with `n` training texts"
    seed_everything(0)
    rows = pd.concat([FRAME[~FRAME.valid]] * 5)[:n]
    frame = pd.concat([rows, FRAME[FRAME.valid]], ignore_index=True).assign(other='and so on')
    columns = ['text', 'other'] if pairs else 'text'
    dls = HFTextDataLoaders.from_df(frame, tok, columns, valid_col='valid', bs=8, verbose=False, **kw)
    learn = hf_classifier_learner(dls, BertConfig(vocab_size=len(tok), **BERT), metrics=[])
    with torch.no_grad():
        for module in learn.model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.weight += 0.01 * torch.randn_like(module.weight)
    return learn


def test_when_there_is_one(tok):  # noqa: F811
    def is_calibrated(learn, **kwargs):
        return fitted(learn, **dict(dict(epochs=1), **kwargs))[1].calibrated

    learn = trained_classifier(tok)
    assert learn.transfer_plan(1).calibrated and 'temperature' in learn.transfer_plan(1).explain()
    assert is_calibrated(learn) and not learn.transfer_plan(1).calibrated
    assert not is_calibrated(learn), 'the model has read the rows'
    assert is_calibrated(trained_classifier(tok), epochs=[1, 1], recipe='head_then_full')
    learn = trained_classifier(tok)
    learn.lr_find(num_it=3, show_plot=False)
    assert is_calibrated(learn), '`lr_find` leaves the model as it was'
    assert not is_calibrated(trained_classifier(tok), calibrate=False)
    assert not is_calibrated(trained_classifier(tok, n=49))
    assert is_calibrated(trained_classifier(tok, n=49), calibrate=True)
    assert not is_calibrated(classifier(tok)), 'random weights'
    pairs = trained_classifier(tok, pairs=True)
    assert not is_calibrated(pairs) and pairs.transfer_plan(1).recipe == 'full'
    assert not is_calibrated(awd())
    assert not is_calibrated(tagger(tok))
    assert not is_calibrated(trained_classifier(tok), best=True)
    assert not is_calibrated(trained_classifier(tok), cbs=EarlyStoppingCallback())


def test_held_out_rows_are_not_augmented(tok):  # noqa: F811
    changed = []
    learn = classifier(tok)
    augment_texts(learn.dls, lambda text, rng: changed.append(text) or text, share=1.0)
    first = held_out_learner(learn)
    changed.clear()
    assert held_out_temperature(first) >= 1 and not changed
    next(iter(first.dls.valid))
    assert changed, 'the rows are augmented again'


def test_class_weights_have_none(tok):  # noqa: F811
    learn = trained_classifier(tok)
    weighted = hf_classifier_learner(learn.dls, learn.model.hf, class_weights='balanced')
    assert not fitted(weighted, epochs=1)[1].calibrated
    weighted = trained_classifier(tok)
    weighted.loss_func = torch.nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2, 3]))
    assert not fitted(weighted, epochs=1)[1].calibrated


def test_a_trained_head_is_not_new(tok, tmp_path):  # noqa: F811
    "It may have read the rows"
    learn, _, _ = fitted(trained_classifier(tok), epochs=1)
    learn.model.hf.save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    assert not fitted(hf_classifier_learner(learn.dls, tmp_path), epochs=1)[1].calibrated


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


class Net(torch.nn.Module):
    "A trained encoder of transformers in a module of one's own, with any head"

    def __init__(self, head):
        super().__init__()
        config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
                            intermediate_size=48)
        self.encoder = BertModel(config)
        self.encoder.encoder.layer[0].output.LayerNorm.weight.data[3] += 0.01
        self.head = head
        for m in head.modules():
            if isinstance(m, torch.nn.Linear):
                torch.nn.init.zeros_(m.bias)

    def forward(self, x):
        return self.head(self.encoder(input_ids=x).last_hidden_state[:, 0])


def own_learner(make_head, cls=Learner, make_model=Net, **kwargs):
    seed_everything(0)
    rows = [(torch.randint(0, 50, (8,)), torch.randint(0, 3, ())) for _ in range(160)]
    dls = DataLoaders.from_dsets(rows[:100], rows[100:], bs=16, device='cpu')
    dls.c = 3
    return cls(dls, make_model(make_head()), **{**dict(loss_func=CrossEntropyLossFlat(), metrics=[]), **kwargs})


class Sum(torch.nn.Module):
    "Two heads; the scores may be those of both or of the first"

    def __init__(self, both=True):
        super().__init__()
        self.a, self.b, self.both = torch.nn.Linear(32, 3), torch.nn.Linear(32, 3), both

    def forward(self, h):
        return self.a(h) + self.b(h.relu()) if self.both else self.a(h)


class Cosine(torch.nn.Linear):
    def forward(self, h):
        return 10 * torch.nn.functional.linear(*(torch.nn.functional.normalize(o) for o in (h, self.weight)), self.bias)


def linear():
    return torch.nn.Linear(32, 3)


HEADS = dict(
    batch_norm=lambda: torch.nn.Sequential(linear(), torch.nn.BatchNorm1d(3)),
    layer_norm=lambda: torch.nn.Sequential(linear(), torch.nn.LayerNorm(3)),
    tanh=lambda: torch.nn.Sequential(linear(), torch.nn.Tanh()),
    sum_of_two=Sum,
    unused=lambda: Sum(both=False),
    cosine=lambda: torch.nn.Sequential(Cosine(32, 3)),
    weight_norm=lambda: torch.nn.Sequential(torch.nn.utils.parametrizations.weight_norm(linear())),
    old_weight_norm=lambda: torch.nn.Sequential(torch.nn.utils.weight_norm(linear())),
)


@pytest.mark.parametrize('head', HEADS)
def test_heads_whose_scores_are_not_divided(head, capsys):
    "The model is that of a fit without a temperature, and it is said"
    learn = own_learner(HEADS[head])
    with learn.no_bar():
        plan = learn.fit_transfer(6, lr=3e-3)
    assert plan.temperature is None and 'gets no temperature' in capsys.readouterr().out
    _, _, expected = fitted(own_learner(HEADS[head]), epochs=6, lr=3e-3, calibrate=False)
    plain = own_learner(HEADS[head])
    fitted(plain, epochs=6, lr=3e-3)
    assert all(torch.equal(p, expected[name]) for name, p in plain.model.named_parameters())
    with pytest.raises(FastaiTLError, match='last linear layer|can be copied'):
        own_learner(HEADS[head]).fit_transfer(1, lr=3e-3, calibrate=True)


def test_a_linear_head_of_ones_own():
    learn, plan, _ = fitted(own_learner(linear), epochs=6, lr=3e-3)
    plain, _, _ = fitted(own_learner(linear), epochs=6, lr=3e-3, calibrate=False)
    x = torch.randint(0, 50, (20, 8))
    with torch.no_grad():
        scores, expected = (o.model.eval()(x) for o in (learn, plain))
    assert plan.temperature > 1 and torch.allclose(scores, expected / plan.temperature, atol=1e-6)


class Logits(Callback):
    def after_pred(self):
        self.learn.pred = self.pred['logits']


class Named(Learner):
    def __init__(self, dls, model, name='', *, needed, **kwargs):
        super().__init__(dls, model, **kwargs)


class Dict(Net):
    def forward(self, x):
        return dict(logits=super().forward(x))


def test_fits_that_the_copy_cannot_do():
    "What trains without a temperature trains by default"
    weights = torch.tensor([5.0, 1, 1])
    weighted = partial(torch.nn.functional.cross_entropy, weight=weights)
    assert fitted(own_learner(linear), epochs=1)[1].calibrated
    assert not fitted(own_learner(linear, make_model=Dict, cbs=Logits()), epochs=1)[1].calibrated
    assert not fitted(own_learner(linear, loss_func=weighted), epochs=1)[1].calibrated
    own_loss = lambda pred, y: torch.nn.functional.cross_entropy(pred, y, weight=weights)  # noqa: E731
    assert not fitted(own_learner(linear, loss_func=own_loss), epochs=1)[1].calibrated
    assert not fitted(own_learner(linear), epochs=1, cbs=ShortEpochCallback())[1].calibrated
    assert fitted(own_learner(linear, Named, needed=1), epochs=1)[1].temperature is None
    with pytest.raises(FastaiTLError, match='can be copied'):
        own_learner(linear, Named, needed=1).fit_transfer(1, calibrate=True)
    learn = own_learner(linear)
    learn.dls.loaders[0] = learn.dls.train.new(get_idxs=lambda: list(range(64)))
    assert not fitted(learn, epochs=1)[1].calibrated


def test_mixed_precision_of_the_fit():
    with own_learner(linear).no_bar() as learn, learn.no_logging():
        learn.fit_transfer(1, cbs=MixedPrecision(), calibrate=False)


def test_a_plan_needs_rows(tok, tmp_path):  # noqa: F811
    learn = classifier(tok)
    learn.export(tmp_path / 'learn.pkl')
    with pytest.raises(FastaiTLError, match='training rows'):
        load_learner(tmp_path / 'learn.pkl').transfer_plan()


def test_without_a_number_of_classes(tok):  # noqa: F811
    "DataLoaders of plain fastai may not know it: no temperature by default, and an error where one is asked for"
    learn = test_recipes.plain()
    assert not hasattr(learn.dls, 'c') and fitted(learn, epochs=1)[1].temperature is None
    with pytest.raises(FastaiTLError, match='learn.dls.c'):
        learn.fit_transfer(1, calibrate=True)
    learn.dls.c = 2
    assert fitted(learn, epochs=1, calibrate=True)[1].temperature > 0


def test_a_layer_that_lora_changes_is_refused():
    "Its last linear layer is not that of the scores, but what is added to them"
    model = torch.nn.ModuleDict(dict(base_layer=torch.nn.Linear(4, 3), lora_B=torch.nn.Linear(2, 3)))
    with pytest.raises(FastaiTLError, match='lora_B'):
        scores_layer(model, 3)
