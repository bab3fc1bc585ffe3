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
from hypothesis import given, settings, strategies as st
from torch import nn

from fastai_tl.all import *


def eq3(t, T, lr_max, cut_frac, ratio):
    "ULMFiT, equation 3, to the letter"
    cut = math.floor(T*cut_frac)
    p = t/cut if t < cut else 1 - (t-cut)/(cut*(1/cut_frac-1))
    return lr_max*(1+p*(ratio-1))/ratio


def test_stlr_equals_the_paper_where_it_is_whole():
    for k in range(1, 51):
        for cut_frac, T in ((.1, 10*k), (.2, 5*k), (.25, 4*k), (.5, 2*k)):
            if math.floor(T*cut_frac) != k: continue   # 3*.1 is not .3 in binary
            sched = SchedSTLR(.02, cut_frac, 32)
            assert [sched(t/T) for t in range(T)] == pytest.approx([eq3(t, T, .02, cut_frac, 32) for t in range(T)], rel=1e-9)


@settings(max_examples=300, deadline=None)
@given(T=st.integers(1, 500), cut_frac=st.floats(.01, .99), ratio=st.floats(1, 1000), lr=st.floats(1e-8, 10))
def test_stlr_is_positive_and_bounded(T, cut_frac, ratio, lr):
    lrs = np.array([SchedSTLR(lr, cut_frac, ratio)(t/T) for t in range(T+1)])
    assert (lrs >= lr/ratio*(1-1e-9)).all() and (lrs <= lr*(1+1e-9)).all()
    top = lrs.argmax()
    assert (np.diff(lrs[:top+1]) >= -1e-12*lr).all() and (np.diff(lrs[top:]) <= 1e-12*lr).all(), 'up, then down'


def test_stlr_in_a_fit_is_the_equation():
    learn = synth_learner()
    with learn.no_bar(), learn.no_logging(): learn.fit_stlr(7, 3e-3, cut_frac=.1)
    T = len(learn.recorder.lrs)
    assert T % 10 == 0 and learn.recorder.lrs == pytest.approx([eq3(t, T, 3e-3, .1, 32) for t in range(T)], rel=1e-6)


@given(lr=st.floats(1e-6, 1), n=st.integers(1, 60), decay=st.floats(1, 5))
def test_discriminative_rates_are_the_formula(lr, n, decay):
    assert discriminative_lrs(lr, n, decay=decay).tolist() == pytest.approx([lr/decay**(n-1-i) for i in range(n)], rel=1e-9)


@given(lr=st.floats(1e-6, 1), n=st.integers(2, 60), spread=st.floats(1, 1e4))
def test_spread_is_the_ratio_of_top_to_bottom(lr, n, spread):
    r = discriminative_lrs(lr, n, spread=spread)
    assert r[-1] == pytest.approx(lr) and r[-1]/r[0] == pytest.approx(spread) and len(r) == n


def transformer():
    "Embeddings, two Transformer layers with LayerNorms and biases, and a head"
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb = nn.Linear(1, 8)
            self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=.1, batch_first=True), 2, enable_nested_tensor=False)
            self.head = nn.Linear(8, 1)
        def forward(self, x): return self.head(self.body(self.emb(x)[:, None])[:, 0])
    return Net()


def learner(opt_func, **kw):
    seed_everything(0)
    l = synth_learner(**kw)
    l.model, l.splitter, l.opt_func = transformer(), layer_splitter(), opt_func
    return l


OPTS = {'AdamW': LayerwiseOptimizer, 'SGD with momentum': partial(LayerwiseOptimizer, opt=torch.optim.SGD), 'RMSprop': partial(LayerwiseOptimizer, opt=torch.optim.RMSprop, momentum=.9), 'fastai Adam': Adam}


@pytest.mark.parametrize('train_bn', [False, True])
@pytest.mark.parametrize('opt', OPTS)
def test_frozen_is_frozen_to_the_bit(opt, train_bn):
    "Train everything, then unfreeze gradually, with momentum and a weight decay of .1: what is frozen rests, what is thawed moves"
    class Watch(Callback):
        def __init__(self): self.moved = []
        def before_train(self): self.was = deepcopy(dict(self.model.named_parameters()))
        def after_train(self): self.moved.append({n for n, p in self.model.named_parameters() if not torch.equal(p, self.was[n])})
    learn, watch = learner(OPTS[opt]), Watch()
    learn.train_bn = train_bn
    names = [set(g.names) for g in layer_groups(learn.model)]
    assert [len(n) for n in names] == [2, 12, 12, 2]
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3, wd=.1)
        learn.fit_one_cycle(4, 1e-3, wd=.1, cbs=[GradualUnfreezing(), watch])
    # the bias of attention's keys has a gradient of zero but for rounding, so it may rest although it is thawed
    for moved, k in zip(watch.moved, (1, 2, 3, 4)):
        frozen, thawed = set().union(*names[:4-k]), set().union(*names[4-k:])
        assert not moved & frozen and thawed - moved <= {n for n in thawed if 'in_proj_bias' in n}


def test_moments_survive_freezing_thawing_and_stages():
    learn = learner(LayerwiseOptimizer)
    class Watch(Callback):
        def __init__(self, p): self.p, self.seen = p, []
        def after_epoch(self): self.seen.append(self.opt.opt.state[self.p]['exp_avg_sq'].clone())
    p = learn.model.emb.weight
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3)
        before, steps = learn.opt.opt.state[p]['exp_avg_sq'].clone(), int(learn.opt.opt.state[p]['step'])
        watch = Watch(p)
        learn.fit(5, 1e-3, cbs=[GradualUnfreezing(), watch])
    assert all(torch.equal(o, before) for o in watch.seen[:3]), 'frozen for three stages'
    assert not torch.equal(watch.seen[3], before) and int(learn.opt.opt.state[p]['step']) == steps + 2*len(learn.dls.train), 'and then went on from there'


@pytest.mark.parametrize('fit', ['fit', 'fit_one_cycle', 'fit_flat_cos', 'fit_stlr'])
def test_multipliers_survive_every_fit(fit):
    learn = learner(partial(LayerwiseOptimizer, lr_mults={'norm': .5, 'attention': 2.}, wd_mults={'norm': 0, 'bias': 0, 'ffn': .1}, group_wd_mults=[1, 2, 3, 4]))
    seen = []
    class Watch(Callback):
        def after_step(self): seen.append({w: (g['lr'], g['weight_decay']) for g, w in zip(self.opt.opt.param_groups, self.opt.where)})
    with learn.no_bar(), learn.no_logging(): getattr(learn, fit)(2, 1e-2, wd=.2, cbs=Watch())
    assert len(seen) == 2*len(learn.dls.train)
    for s in seen:
        lr = s[3, 'head'][0]
        assert s[1, 'norm'][0] == pytest.approx(lr/2) and s[1, 'attention'][0] == pytest.approx(2*lr) and s[2, 'ffn'][0] == pytest.approx(lr)
        assert [s[i, k][1] for i, k in ((1, 'attention'), (2, 'attention'), (1, 'ffn'), (3, 'head'), (2, 'norm'), (3, 'bias'))] == pytest.approx([.4, .6, .04, .8, 0, 0])


@settings(max_examples=60, deadline=None)
@given(losses=st.lists(st.floats(.1, 10), min_size=4, max_size=14), patience=st.integers(1, 4))
def test_plateau_follows_its_definition(losses, patience):
    "Against a direct reading: after `patience` epochs in a row that do not beat the best, the next epoch is a stage on"
    stages, stage, best, wait = [], 0, math.inf, 0
    for l in losses:
        if wait >= patience and stage < 3: stage, wait = stage+1, 0
        stages.append(stage)
        best, wait = (l, 0) if l < best else (best, wait+1)
    gu, got = GradualUnfreezing(when='plateau', patience=patience), []
    class Curve(Callback):
        order = 55
        def after_epoch(self): self.recorder.log[2] = losses[self.epoch]; got.append(gu.stage)
    learn = learner(LayerwiseOptimizer, n_trn=1, n_val=1)
    with learn.no_bar(), learn.no_logging(): learn.fit(len(losses), 1e-4, cbs=[gu, Curve()])
    assert got == stages


@settings(max_examples=40, deadline=None)
@given(depth=st.integers(1, 6), width=st.integers(1, 4), n=st.integers(1, 8), tied=st.booleans())
def test_every_parameter_is_in_one_group(depth, width, n, tied):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb = nn.Embedding(7, width)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width)) for _ in range(depth))
            self.out = nn.Linear(width, 7)
            if tied: self.out.weight = self.emb.weight
    net = Net()
    groups = layer_groups(net)
    assert len(groups) == depth + (1 if tied else 2) and groups[-1].name == 'head'
    assert any(p is net.out.weight for p in groups[-1].params)
    for gs in (groups, merge_groups(groups, min(n, len(groups)))):
        ids = [id(p) for g in gs for p in g.params]
        assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in net.parameters()}


def test_tied_weight_is_stepped_once():
    "SGD with rate 1 and gradient 1 moves each parameter by exactly 1"
    from fastai.text.all import AWD_LSTM, get_language_model
    m = get_language_model(AWD_LSTM, 30, config=dict(emb_sz=8, n_hid=12, n_layers=2, pad_token=1, input_p=0., hidden_p=0., embed_p=0., weight_p=0., output_p=0., tie_weights=True, out_bias=True))
    opt = LayerwiseOptimizer(layer_splitter()(m), opt=torch.optim.SGD, lr=1., mom=0., wd=0.)
    was = {n: p.detach().clone() for n, p in m.named_parameters()}
    for p in m.parameters(): p.grad = torch.ones_like(p)
    opt.step()
    for n, p in m.named_parameters(): torch.testing.assert_close(p, was[n]-1)


def test_fixed_parameters_never_enter_the_optimizer():
    net = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 1))
    net[0].weight.requires_grad_(False)
    learn = learner(LayerwiseOptimizer); learn.model = mark_fixed(net)
    was = net[0].weight.clone()
    with learn.no_bar(), learn.no_logging():
        learn.freeze(); learn.fit(1, 1e-2); learn.unfreeze(); learn.fit(1, 1e-2, wd=.1, reset_opt=True)
    assert torch.equal(net[0].weight, was) and not net[0].weight.requires_grad
    assert net[0].weight not in {p for o in learn.opt.param_lists for p in o}


def test_the_recipe_of_awd_lstm_is_the_common_one():
    "Head at 2e-2; one group more at 1e-2 and at 5e-3; all at 1e-3; each spread over 2.6**4; one, one, one and two epochs"
    import pandas as pd
    texts = pd.Series([f'text {i} is {w}' for i in range(40) for w in ('good', 'bad')])
    tok, labels = tokenize_texts_once(texts), ['good' if t.endswith('good') else 'bad' for t in texts]
    dls = classifier_dls(tok, labels, 'classification', *split_rows(labels, 'classification'), texts_vocab(tok), bs=2)
    learn = awd_classifier_learner(dls, 'classification', 2, dict(emb_sz=4, n_hid=6, n_layers=3))
    with learn.no_bar(), learn.no_logging(): gu = learn.fit_gradual()
    t, rates, n = gu.table(), np.array(gu.rates), len(dls.train)
    assert t.groups.tolist() == [1, 2, 3, 5] and t.epochs.tolist() == [1, 1, 1, 2] and len(rates) == 5*n
    assert t.lr.tolist() == pytest.approx([2e-2, 1e-2, 5e-3, 1e-3], rel=1e-2)
    assert (np.isnan(rates) == [[j < 5-k for j in range(5)] for k in (1, 2, 3, 5, 5) for _ in range(n)]).all(), 'frozen groups have no rate'
    assert (rates[-1, 1:]/rates[-1, :-1]) == pytest.approx([2.6]*4)
    assert learn.opt.opt.state[learn.model[0].module.encoder.weight]['step'] == 2*n


def test_progress_bar_names_the_stage(capsys):
    learn = learner(LayerwiseOptimizer)
    learn.fit(4, 1e-3, cbs=GradualUnfreezing())
    said = capsys.readouterr().out
    bars = [said.find(f'Epoch {i}/4, stage {i}/4 ({layers})') for i, layers in enumerate(('head', 'layers.1 – head', 'layers.0 – head', 'embeddings – head'), 1)]
    assert -1 not in bars and bars == sorted(bars), said
    assert 'valid_loss' in said and said.rstrip().splitlines()[-1].startswith('4 '), 'the table of stages comes at the end'
