"Accumulated gradients, and gradients of several processes, are those of one large batch, for every task."

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from fastai.callback.all import GradientAccumulation
from fastai.callback.core import Callback
from fastai.losses import LabelSmoothingCrossEntropyFlat
from repo import clean_env
from small_learners import MAKERS, bert, sentences, tagger

from fastai_tl.all import *


def n_in_mean(loss_func, y):
    "Count by hand what the mean of a batch divides by"
    y = y.as_subclass(torch.Tensor)
    if y.is_floating_point():
        return y.numel()
    weight = getattr(getattr(loss_func, 'func', None), 'weight', None)
    total = 0.
    for target in (y if isinstance(loss_func, AnswerLoss) else y.flatten()):
        if target.numel() > 1:
            total += 1 # a row with the first and the last token of an answer
        elif target != -100:
            total += 1 if weight is None else float(weight[target])
    return total


class Expected(Callback):
    "Compute the gradient of the large batch from the gradients of the small ones, and compare it at each step"
    order = GradientAccumulation.order - 1 # after the regularization of an AWD_LSTM, before the loss is weighted
    run_valid = False

    def before_fit(self):
        self.small = []
        self.errors = []
        self.rows = []

    def after_loss(self):
        params = [p for p in self.model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(self.learn.loss_grad, params, retain_graph=True, allow_unused=True)
        flat = [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads)]
        y = self.yb[0]
        self.small.append((n_in_mean(self.loss_func, y), torch.cat([g.flatten() for g in flat]).double(), len(y)))

    def compare(self):
        counts, grads, rows = zip(*self.small)
        expected = sum(n * g for n, g in zip(counts, grads)) / sum(counts)
        params = [p for p in self.model.parameters() if p.requires_grad]
        flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        got = torch.cat([g.flatten() for g in flat]).double()
        self.errors.append(((got - expected).norm() / expected.norm()).item())
        self.rows.append(sum(rows))
        self.small = []


class Compare(Callback):
    order = 100 # after all that changes the gradients

    def before_step(self):
        self.learn.expected.compare()


def errors_of(learn, n_acc, epochs=1):
    "Return the relative error of the gradient of each step, and the number of rows that it is of"
    seed_everything(0)
    expected = Expected()
    with learn.no_bar(), learn.no_logging():
        learn.fit(epochs, 1e-3, cbs=[expected, Compare(), GradientAccumulation(n_acc)])
    assert expected.errors
    return expected.errors, expected.rows


@pytest.mark.parametrize('name', MAKERS)
def test_accumulated_gradient_is_that_of_the_large_batch(small_tokenizers, name):
    "In each step, the mean over the targets of all its small batches; 10 is not a multiple of the batch size"
    learn = MAKERS[name](small_tokenizers)
    for n_acc in (8, 10):
        errors, rows = errors_of(learn, n_acc, epochs=2)
        assert max(errors) <= 1e-5, (name, n_acc, errors)
        assert min(rows) >= n_acc


def test_a_fit_leaves_no_gradients_to_the_next(small_tokenizers):
    "20 rows in batches of 4 and 16 rows a step: one batch is left over"
    learn = tagger(small_tokenizers)
    for _ in range(2):
        errors, rows = errors_of(learn, 16)
        assert max(errors) <= 1e-5
        assert rows == [16]
        assert all(p.grad is None for p in learn.model.parameters())


def test_without_accumulation_nothing_changes(small_tokenizers):
    "The Callback of the factories leaves plain fits bitwise as they are"
    weights = []
    for keep in (True, False):
        seed_everything(0)
        learn = tagger(small_tokenizers)
        if not keep:
            learn.remove_cbs(LargeBatchGradient)
        seed_everything(0)
        with learn.no_bar(), learn.no_logging():
            learn.fit(1, 1e-3)
        weights.append([p.clone() for p in learn.model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*weights))


# --- several processes ---

PROCESS = '''
    import os, sys, torch, torch.distributed as dist, warnings
    warnings.filterwarnings('ignore')
    sys.path.insert(0, {tests!r})
    from fastai.callback.all import Callback, GradientAccumulation
    from small_learners import *
    from torch.nn.parallel import DistributedDataParallel
    rank = int(os.environ['RANK'])
    n_acc = {n_acc}
    dist.init_process_group('gloo', init_method={store!r}, rank=rank, world_size=2)
    tok = train_tokenizer(sentences(200), 400)
    words = [text.split() for text in TEXTS]
    tags = [['B-X' if word == 'film' else 'O' for word in sentence] for sentence in words]

    def learner(rows, bs):
        seed_everything(0)
        dls = HFTagDataLoaders.from_lists([words[i] for i in rows]*2, [tags[i] for i in rows]*2, tok, bs=bs,
                                          valid=[False]*len(rows) + [True]*len(rows))
        config = bert(tok, hidden_dropout_prob=0., attention_probs_dropout_prob=0.)
        return hf_tagger_learner(dls, config, metrics=[])

    class Wrap(Callback):
        order = -1000
        def before_fit(self):
            self.learn.model = DistributedDataParallel(self.learn.model)
        def after_fit(self):
            self.learn.model = self.learn.model.module

    class Grab(Callback):
        order = 100
        def before_step(self):
            self.learn.got = torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])
            self.learn.got = self.learn.got.clone()

    def gradient(rows, bs, cbs):
        learn = learner(rows, bs)
        with learn.no_bar(), learn.no_logging():
            learn.fit(1, 0., wd=0., cbs=[Grab(), *cbs])
        return learn.got

    os.environ.pop('RANK') # fastai would split the work itself
    by_length = sorted(range(16), key=lambda i: len(words[i]))
    mine = by_length[:8] if rank == 0 else by_length[8:] # short sentences in one process, long ones in the other
    accumulation = [GradientAccumulation(n_acc)] if n_acc else []
    ours = gradient(mine, 4 if n_acc else 8, [Wrap(), *accumulation])
    whole = gradient(range(16), 16, [])
    error = ((ours - whole).norm()/whole.norm()).item()
    assert error <= 1e-5, error
    print('error', error)
'''


@pytest.mark.slow
@pytest.mark.parametrize('n_acc', [None, 8], ids=['one batch', 'accumulated'])
def test_several_processes(tmp_path, n_acc):
    "Two processes with sentences of different lengths have the gradient of all the sentences together"
    store = f'file://{tmp_path}/store'
    code = textwrap.dedent(PROCESS).format(n_acc=n_acc, store=store, tests=os.path.dirname(__file__))
    env = [clean_env(RANK=str(rank), OMP_NUM_THREADS='1', GLOO_SOCKET_IFNAME='lo') for rank in range(2)]
    runs = [subprocess.Popen([sys.executable, '-c', code], env=e, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                             text=True) for e in env]
    outputs = [run.communicate(timeout=200)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], '\n'.join(outputs)


# --- loss functions whose type says nothing ---

def over_tokens(pred, y):
    return torch.nn.functional.cross_entropy(pred.reshape(-1, pred.shape[-1]), y.reshape(-1))


def over_rows(pred, y):
    each = torch.nn.functional.cross_entropy(pred.transpose(1, 2), y, reduction='none')
    return (each.sum(1)/(y != -100).sum(1).clamp(min=1)).mean()


def summed(pred, y):
    return torch.nn.functional.cross_entropy(pred.transpose(1, 2), y, reduction='sum')


def step_gradient(toks, loss_func, bs, cbs=()):
    words = [text.split() for text in (sentences(16, seed=3) + sentences(4))]
    tags = [['B-X' if word == 'film' else 'O' for word in sentence] for sentence in words]
    dls = HFTagDataLoaders.from_lists(words, tags, toks['encoder'], valid=[i >= 16 for i in range(20)], bs=bs)
    seed_everything(0)
    config = bert(toks['encoder'], hidden_dropout_prob=0., attention_probs_dropout_prob=0.)
    learn = hf_tagger_learner(dls, config, loss_func=loss_func, metrics=[])
    got = []

    class Grab(Callback):
        order = 100

        def before_step(self):
            got.append(torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None]).clone())

    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 0., wd=0., cbs=[Grab(), *cbs])
    assert len(got) == 1
    return got[0]


@pytest.mark.parametrize('loss_func', [over_tokens, over_rows, summed])
def test_own_loss_function_of_a_tagger(small_tokenizers, loss_func):
    whole = step_gradient(small_tokenizers, loss_func, 16)
    ours = step_gradient(small_tokenizers, loss_func, 4, [GradientAccumulation(16)])
    assert (ours - whole).norm() <= 1e-5*whole.norm()


@pytest.mark.parametrize('name', ['smoothing', 'weights'])
def test_loss_without_a_divisor_warns(small_tokenizers, name):
    def weighted(pred, y):
        return torch.nn.functional.cross_entropy(pred.transpose(1, 2), y, weight=torch.tensor([1., 9.]))
    loss_func = weighted if name == 'weights' else LabelSmoothingCrossEntropyFlat(eps=.1)
    with pytest.warns(UserWarning, match='divides by is not known'):
        step_gradient(small_tokenizers, loss_func, 4, [GradientAccumulation(16)])


def test_weighted_function_of_a_classifier_warns(small_tokenizers):
    def weighted(pred, y):
        return torch.nn.functional.cross_entropy(pred, y, weight=torch.tensor([1., 9., 1.]))
    learn = MAKERS['classifier'](small_tokenizers)
    learn.loss_func = weighted
    with pytest.warns(UserWarning, match='divides by is not known'), learn.no_bar(), learn.no_logging():
        learn.fit(1, 0., cbs=[GradientAccumulation(8)])
