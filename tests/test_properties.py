"""Properties that hold for any model, schedule and rate."""

import math
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from fastai.callback.all import Callback
from fastai.callback.schedule import *
from fastai.optimizer import Adam
from fastai.test_utils import synth_learner
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastai_tl.all import *


# --- schedules and rates ---

def eq3(t, T, lr_max, cut_frac, ratio):
    "ULMFiT, equation 3, to the letter"
    cut = math.floor(T*cut_frac)
    p = t/cut if t < cut else 1 - (t-cut)/(cut*(1/cut_frac-1))
    return lr_max*(1+p*(ratio-1))/ratio


def test_stlr_equals_the_paper_where_it_is_whole():
    for k in range(1, 51):
        for cut_frac, T in ((.1, 10*k), (.2, 5*k), (.25, 4*k), (.5, 2*k)):
            if math.floor(T*cut_frac) != k:
                continue  # 3*.1 is not .3 in binary
            schedule = SchedSTLR(.02, cut_frac, 32)
            wanted = [eq3(t, T, .02, cut_frac, 32) for t in range(T)]
            assert [schedule(t/T) for t in range(T)] == pytest.approx(wanted, rel=1e-9)


@settings(max_examples=300, deadline=None)
@given(T=st.integers(1, 500), cut_frac=st.floats(.01, .99), ratio=st.floats(1, 1000), lr=st.floats(1e-8, 10))
def test_stlr_is_positive_and_bounded(T, cut_frac, ratio, lr):
    lrs = np.array([SchedSTLR(lr, cut_frac, ratio)(t/T) for t in range(T+1)])
    assert (lrs >= lr/ratio*(1-1e-9)).all() and (lrs <= lr*(1+1e-9)).all()
    top = lrs.argmax()
    assert (np.diff(lrs[:top+1]) >= -1e-12*lr).all(), 'first up'
    assert (np.diff(lrs[top:]) <= 1e-12*lr).all(), 'then down'


def test_stlr_in_a_fit_is_the_equation():
    learn = synth_learner()
    with learn.no_bar(), learn.no_logging():
        learn.fit_stlr(7, 3e-3, cut_frac=.1)
    T = len(learn.recorder.lrs)
    assert T % 10 == 0
    assert learn.recorder.lrs == pytest.approx([eq3(t, T, 3e-3, .1, 32) for t in range(T)], rel=1e-6)


@given(lr=st.floats(1e-6, 1), n=st.integers(1, 60), decay=st.floats(1, 5))
def test_discriminative_rates_are_the_formula(lr, n, decay):
    wanted = [lr/decay**(n-1-i) for i in range(n)]
    assert discriminative_lrs(lr, n, decay=decay).tolist() == pytest.approx(wanted, rel=1e-9)


@given(lr=st.floats(1e-6, 1), n=st.integers(2, 60), spread=st.floats(1, 1e4))
def test_spread_is_the_ratio_of_top_to_bottom(lr, n, spread):
    lrs = discriminative_lrs(lr, n, spread=spread)
    assert lrs[-1] == pytest.approx(lr) and lrs[-1]/lrs[0] == pytest.approx(spread) and len(lrs) == n


# --- a small Transformer ---

class SmallTransformer(nn.Module):
    "Embeddings, two Transformer layers with LayerNorms and biases, and a head"
    def __init__(self):
        super().__init__()
        self.emb = nn.Linear(1, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=.1, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 1)

    def forward(self, x): return self.head(self.body(self.emb(x)[:, None])[:, 0])


def learner(opt_func, **kwargs):
    seed_everything(0)
    learn = synth_learner(**kwargs)
    learn.model = SmallTransformer()
    learn.splitter = layer_splitter()
    learn.opt_func = opt_func
    return learn


# --- frozen means frozen ---

OPTIMIZERS = {
    'AdamW': LayerwiseOptimizer,
    'SGD with momentum': partial(LayerwiseOptimizer, opt=torch.optim.SGD),
    'RMSprop': partial(LayerwiseOptimizer, opt=torch.optim.RMSprop, momentum=.9),
    'fastai Adam': Adam}


class WatchMoves(Callback):
    "Notes the names of the parameters that change in each epoch"
    def __init__(self): self.moved = []

    def before_train(self): self.before = deepcopy(dict(self.model.named_parameters()))

    def after_train(self):
        self.moved.append({n for n, p in self.model.named_parameters() if not torch.equal(p, self.before[n])})


@pytest.mark.parametrize('train_bn', [False, True])
@pytest.mark.parametrize('opt', OPTIMIZERS)
def test_frozen_is_frozen_to_the_bit(opt, train_bn):
    "Train all layers, then unfreeze gradually, with momentum and a weight decay of .1: only what is not frozen moves"
    learn = learner(OPTIMIZERS[opt])
    watch = WatchMoves()
    learn.train_bn = train_bn
    names = [set(g.names) for g in layer_groups(learn.model)]
    assert [len(n) for n in names] == [2, 12, 12, 2]
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3, wd=.1)
        learn.fit_one_cycle(4, 1e-3, wd=.1, cbs=[GradualUnfreezing(), watch])
    for moved, k in zip(watch.moved, (1, 2, 3, 4)):
        frozen = set().union(*names[:4-k])
        trained = set().union(*names[4-k:])
        assert not moved & frozen
        # the gradient of the bias of attention's keys is zero but for rounding, so it may not move
        assert trained - moved <= {n for n in trained if 'in_proj_bias' in n}


def test_moments_survive_freezing_unfreezing_and_stages():
    class Watch(Callback):
        def __init__(self): self.seen = []

        def after_epoch(self): self.seen.append(state()['exp_avg_sq'].clone())

    learn = learner(LayerwiseOptimizer)
    param = learn.model.emb.weight
    def state(): return learn.opt.opt.state[param]
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3)
        before = state()['exp_avg_sq'].clone()
        steps = int(state()['step'])
        watch = Watch()
        learn.fit(5, 1e-3, cbs=[GradualUnfreezing(), watch])
    assert all(torch.equal(o, before) for o in watch.seen[:3]), 'frozen for three stages'
    assert not torch.equal(watch.seen[3], before), 'and then it continued from there'
    assert int(state()['step']) == steps + 2*len(learn.dls.train)


@pytest.mark.parametrize('fit', ['fit', 'fit_one_cycle', 'fit_flat_cos', 'fit_stlr'])
def test_multipliers_survive_every_fit(fit):
    learn = learner(partial(LayerwiseOptimizer, lr_mults={'norm': .5, 'attention': 2.},
                            wd_mults={'norm': 0, 'bias': 0, 'ffn': .1}, group_wd_mults=[1, 2, 3, 4]))
    seen = []
    class Watch(Callback):
        def after_step(self):
            groups = zip(self.opt.opt.param_groups, self.opt.where)
            seen.append({where: (g['lr'], g['weight_decay']) for g, where in groups})

    with learn.no_bar(), learn.no_logging():
        getattr(learn, fit)(2, 1e-2, wd=.2, cbs=Watch())
    assert len(seen) == 2*len(learn.dls.train)
    decays = {(1, 'attention'): .4, (2, 'attention'): .6, (1, 'ffn'): .04, (3, 'head'): .8,
              (2, 'norm'): 0, (3, 'bias'): 0}
    for step in seen:
        lr = step[3, 'head'][0]
        assert step[1, 'norm'][0] == pytest.approx(lr/2)
        assert step[1, 'attention'][0] == pytest.approx(2*lr)
        assert step[2, 'ffn'][0] == pytest.approx(lr)
        assert [step[where][1] for where in decays] == pytest.approx(list(decays.values()))


# --- stages ---

def plateau_stages(losses, patience, last=3):
    "The stage of each epoch: after `patience` epochs in a row that do not beat the best, the next epoch is a stage on"
    stages = []
    stage = wait = 0
    best = math.inf
    for loss in losses:
        if wait >= patience and stage < last:
            stage += 1
            wait = 0
        stages.append(stage)
        wait = 0 if loss < best else wait+1
        best = min(loss, best)
    return stages


@settings(max_examples=60, deadline=None)
@given(losses=st.lists(st.floats(.1, 10), min_size=4, max_size=14), patience=st.integers(1, 4))
def test_plateau_follows_its_definition(losses, patience):
    unfreezing = GradualUnfreezing(when='plateau', patience=patience)
    got = []
    class Curve(Callback):
        order = 55

        def after_epoch(self):
            self.recorder.log[2] = losses[self.epoch]
            got.append(unfreezing.stage)

    learn = learner(LayerwiseOptimizer, n_trn=1, n_val=1)
    with learn.no_bar(), learn.no_logging():
        learn.fit(len(losses), 1e-4, cbs=[unfreezing, Curve()])
    assert got == plateau_stages(losses, patience)


def test_progress_bar_names_the_stage(capsys):
    learn = learner(LayerwiseOptimizer)
    learn.fit(4, 1e-3, cbs=GradualUnfreezing())
    said = capsys.readouterr().out
    layers = ('head', 'layers.1 – head', 'layers.0 – head', 'embeddings – head')
    bars = [said.find(f'Epoch {i}/4, stage {i}/4 ({name})') for i, name in enumerate(layers, 1)]
    assert -1 not in bars and bars == sorted(bars), said
    assert 'valid_loss' in said
    assert said.rstrip().splitlines()[-1].startswith('4 '), 'the table of stages comes at the end'


# --- layer groups and the optimizer ---

@settings(max_examples=40, deadline=None)
@given(depth=st.integers(1, 6), width=st.integers(1, 4), n=st.integers(1, 8), tied=st.booleans())
def test_every_parameter_is_in_one_group(depth, width, n, tied):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb = nn.Embedding(7, width)
            blocks = (nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width)) for _ in range(depth))
            self.blocks = nn.ModuleList(blocks)
            self.out = nn.Linear(width, 7)
            if tied:
                self.out.weight = self.emb.weight

    net = Net()
    groups = layer_groups(net)
    assert len(groups) == depth + (1 if tied else 2) and groups[-1].name == 'head'
    assert any(p is net.out.weight for p in groups[-1].params)
    for some_groups in (groups, merge_groups(groups, min(n, len(groups)))):
        ids = [id(p) for g in some_groups for p in g.params]
        assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in net.parameters()}


def test_tied_weight_is_stepped_once():
    "SGD with rate 1 and gradient 1 moves each parameter by exactly 1"
    from fastai.text.all import AWD_LSTM, get_language_model
    no_dropout = dict(input_p=0., hidden_p=0., embed_p=0., weight_p=0., output_p=0.)
    config = dict(emb_sz=8, n_hid=12, n_layers=2, pad_token=1, tie_weights=True, out_bias=True, **no_dropout)
    model = get_language_model(AWD_LSTM, 30, config=config)
    opt = LayerwiseOptimizer(layer_splitter()(model), opt=torch.optim.SGD, lr=1., mom=0., wd=0.)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p, before[n]-1)


def test_fixed_parameters_never_enter_the_optimizer():
    net = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 1))
    net[0].weight.requires_grad_(False)
    learn = learner(LayerwiseOptimizer)
    learn.model = mark_fixed(net)
    before = net[0].weight.clone()
    with learn.no_bar(), learn.no_logging():
        learn.freeze()
        learn.fit(1, 1e-2)
        learn.unfreeze()
        learn.fit(1, 1e-2, wd=.1, reset_opt=True)
    assert torch.equal(net[0].weight, before) and not net[0].weight.requires_grad
    assert net[0].weight not in {p for group in learn.opt.param_lists for p in group}


def test_the_recipe_of_awd_lstm_is_the_common_one():
    "Head at 2e-2; one group more at 1e-2 and at 5e-3; all at 1e-3; each spread over 2.6**4; 1, 1, 1 and 2 epochs"
    import pandas as pd
    texts = pd.Series([f'text {i} is {word}' for i in range(40) for word in ('good', 'bad')])
    tokens = tokenize_texts_once(texts)
    labels = ['good' if text.endswith('good') else 'bad' for text in texts]
    train, valid = split_rows(labels, 'classification')
    dls = classifier_dls(tokens, labels, 'classification', train, valid, texts_vocab(tokens), bs=2)
    learn = awd_classifier_learner(dls, 'classification', 2, dict(emb_sz=4, n_hid=6, n_layers=3))
    with learn.no_bar(), learn.no_logging():
        unfreezing = learn.fit_gradual()
    table = unfreezing.table()
    rates = np.array(unfreezing.rates)
    n_steps = len(dls.train)
    assert table.groups.tolist() == [1, 2, 3, 5] and table.epochs.tolist() == [1, 1, 1, 2] and len(rates) == 5*n_steps
    assert table.lr.tolist() == pytest.approx([2e-2, 1e-2, 5e-3, 1e-3], rel=1e-2)
    frozen = [[j < 5-k for j in range(5)] for k in (1, 2, 3, 5, 5) for _ in range(n_steps)]
    assert (np.isnan(rates) == frozen).all(), 'frozen groups have no rate'
    assert (rates[-1, 1:]/rates[-1, :-1]) == pytest.approx([2.6]*4)
    assert learn.opt.opt.state[learn.model[0].module.encoder.weight]['step'] == 2*n_steps
