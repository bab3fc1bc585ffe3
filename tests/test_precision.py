"Mixed precision works on the available device, changes results by rounding only, and works with the rest of a fit."

import warnings

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.all import GradientAccumulation, GradientClip, MixedPrecision, SaveModelCallback
from fastai.callback.core import Callback, CancelBatchException
from fastai.callback.schedule import *
from fastai.data.all import DataLoader, DataLoaders
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from torch import nn

from fastai_tl.all import *
from fastai_tl.efficiency import mixed_precision as precision

BF16 = dict(dtype='bf16', force=True)  # emulated where the processor has no bfloat16: slow, and the same figures


def quiet(learn, f, *args, **kwargs):
    with learn.no_bar(), learn.no_logging():
        return getattr(learn, f)(*args, **kwargs)


def dtypes(learn, kinds, f, *args, **kwargs):
    "The dtypes of the outputs of modules of these kinds during `learn.f(…)`, in training and in evaluation"
    seen, first = set(), lambda o: o[0] if isinstance(o, tuple) else o
    hooks = [
        m.register_forward_hook(lambda m, i, o: seen.add(first(o).dtype))
        for m in learn.model.modules()
        if isinstance(m, kinds)
    ]
    assert hooks
    try:
        quiet(learn, f, *args, **kwargs)
    finally:
        [h.remove() for h in hooks]
    return seen


def state(learn):
    return {k: v.detach().clone() for k, v in learn.model.state_dict().items()}


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


class BertLogits(nn.Module):
    "A BERT that returns logits only"

    def __init__(self, **kwargs):
        super().__init__()
        from transformers import BertConfig, BertForSequenceClassification

        cfg = dict(
            vocab_size=100,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=32,
            num_labels=2,
        )
        self.bert = BertForSequenceClassification(BertConfig(**{**cfg, **kwargs}))

    def forward(self, ids):
        return self.bert(input_ids=ids).logits


def bert_learner(bs=8, n=64, dropout=0.1, opt_func=LayerwiseOptimizer, **kwargs):
    "Is the first token among the lower half of the vocabulary?"
    seed_everything(0)
    x = torch.randint(5, 100, (n, 12), generator=torch.Generator().manual_seed(0))
    data = list(zip(x, (x[:, 0] < 50).long()))
    dls = DataLoaders(
        DataLoader(data, bs=bs, num_workers=0), DataLoader(data, bs=bs, num_workers=0), device=torch.device('cpu')
    )
    model = BertLogits(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    return Learner(
        dls, model, loss_func=CrossEntropyLossFlat(), opt_func=opt_func, splitter=layer_splitter(), lr=2e-3, **kwargs
    )


@pytest.fixture(scope='module')
def rows():
    return pd.DataFrame(
        [
            dict(text=f'row {i} of the table is {w}' + ' indeed' * (i % 4), label=w)
            for i in range(30)
            for w in ('good', 'bad')
        ]
    )


def awd_learners(rows, folder):
    "A language model and a classifier, each made with the same seed"
    config, tt = dict(emb_sz=16, n_hid=24, n_layers=2), tokenize_texts_once(rows.text.tolist(), progress=False)
    vocab = texts_vocab(tt, min_freq=1)
    seed_everything(0)
    lm = awd_lm_learner(language_model_dls(tt, vocab, bs=4, seq_len=12), config, drop_mult=0.5, metrics=[])
    seed_everything(0)
    dls = classifier_dls(
        tt, rows.label.tolist(), 'classification', list(range(48)), list(range(48, 60)), vocab, bs=8, path=folder
    )
    cls = awd_classifier_learner(dls, 'classification', 2, config)
    return lm, cls


# --- what is computed in bfloat16, and what stays float32 ---


def test_bert_in_bf16():
    learn = bert_learner().to_mixed_precision(**BF16)
    for f, args in (('fit', [1]), ('validate', []), ('get_preds', [])):
        assert dtypes(learn, nn.Linear, f, *args) == {torch.bfloat16}, f
    preds, _, losses = quiet(learn, 'get_preds', with_loss=True)
    assert {p.dtype for p in learn.model.parameters()} | {preds.dtype, losses.dtype} == {torch.float32}
    assert {v.dtype for s in learn.opt.opt.state.values() for k, v in s.items() if k != 'step'} == {torch.float32}
    assert not torch.is_autocast_enabled('cpu')


@pytest.mark.parametrize('which', [0, 1], ids=['language model', 'classifier'])
def test_awd_lstm_in_bf16(rows, tmp_path, which):
    "With weight dropout and with AR and TAR, whose terms are sums of squares in float32"
    learn = awd_learners(rows, tmp_path)[which].to_mixed_precision(**BF16)
    of_predictions = {torch.bfloat16} if has_bf16_lstm() else {torch.bfloat16, torch.float32}
    assert dtypes(learn, (nn.LSTM, nn.Linear), 'fit_one_cycle', 1, 1e-2) == of_predictions  # validation included
    no_order = dict(reorder=False)  # fastai cannot reorder the predictions of a language model, in whatever precision
    assert dtypes(learn, (nn.LSTM, nn.Linear), 'get_preds', **no_order) == of_predictions
    assert quiet(learn, 'get_preds', **no_order)[0].dtype == torch.float32


def test_predict_in_bf16(rows, tmp_path):
    learn = awd_learners(rows, tmp_path)[1]
    quiet(learn, 'fit', 2, 1e-2)
    exact = quiet(learn, 'predict', rows.text[3])
    learn.to_mixed_precision(**BF16)
    assert dtypes(learn, nn.LSTM, 'predict', rows.text[3]) == {torch.bfloat16 if has_bf16_lstm() else torch.float32}
    rounded = quiet(learn, 'predict', rows.text[3])
    assert rounded[2].dtype == torch.float32 and rounded[0] == exact[0] and 0 < relative(rounded[2], exact[2]) < 2**-7


# --- the figures are those of float32, but for rounding ---


def test_loss_is_close_to_that_of_float32(rows, tmp_path):
    """The seeds are the same, so the masks of dropout are the same. The relative error of a bfloat16 number is at most
    2**-9 (8 bits of fraction with the implied one). A loss is an average in float32 of many such errors of either sign,
    so its error must be smaller than that (measured: 3e-5 to 3e-4). Another seed changes it more than bfloat16 does."""
    for make in (
        lambda: bert_learner(),
        lambda: awd_learners(rows, tmp_path)[0],
        lambda: awd_learners(rows, tmp_path)[1],
    ):
        valid = []
        for seed, mixed in ((3, False), (3, True), (4, False)):
            learn = make()
            if mixed:
                learn.to_mixed_precision(**BF16)
            seed_everything(seed)
            quiet(learn, 'fit_one_cycle', 3, 2e-3)
            valid.append(learn.recorder.values[-1][1])
        exact, rounded, other = valid
        assert 0 < abs(rounded - exact) / exact < 2**-9 and abs(rounded - exact) < abs(other - exact), valid


def test_learns_in_bf16():
    learn = bert_learner(dropout=0).to_mixed_precision(**BF16)
    quiet(learn, 'fit_one_cycle', 15, 3e-3)
    preds, targs = quiet(learn, 'get_preds')
    assert (preds.argmax(1) == targs).float().mean() > 0.95


# --- with the rest of a fit ---


def test_frozen_stays_frozen_to_the_bit():
    learn = bert_learner().to_mixed_precision(**BF16)
    quiet(learn, 'fit', 1)  # the moments of all groups are alive
    groups = [list(ps) for ps in learn.opt.param_lists]
    before = [[p.detach().clone() for p in ps] for ps in groups]
    quiet(learn, 'fit_one_cycle', 2, 1e-3, cbs=GradualUnfreezing(groups=[1, 2], every=1))
    same = [all(torch.equal(p, q) for p, q in zip(ps, qs)) for ps, qs in zip(groups, before)]
    assert same == [True] * (len(groups) - 2) + [False] * 2


def test_stlr_and_gradual():
    learn = bert_learner().to_mixed_precision(**BF16)
    quiet(learn, 'fit_stlr', 2, 1e-3)
    assert len(learn.recorder.values) == 2
    quiet(learn, 'fit_gradual', [1, 1, 1, 1])
    assert dtypes(learn, nn.Linear, 'fit_gradual', [1, 1, 1, 1]) == {torch.bfloat16}


@pytest.mark.parametrize(
    'kwargs', [BF16, dict(dtype='fp16', force=True, init_scale=2.0**10, growth_interval=3)], ids=['bf16', 'fp16']
)
def test_resumed_run_ends_in_the_same_weights(tmp_path, kwargs):
    "The scale of float16 is restored too: it doubles every three steps here, and a resumed run continues with it"

    class Stop(Callback):
        order = ResumableFit.order + 1

        def after_epoch(self):
            if self.epoch == 1:
                raise KeyboardInterrupt

    def make():
        return bert_learner().to_mixed_precision(**kwargs)

    whole = make()
    quiet(whole, 'fit_one_cycle', 4, 1e-3, cbs=ResumableFit(tmp_path / 'whole'))
    with pytest.raises(KeyboardInterrupt):
        quiet(make(), 'fit_one_cycle', 4, 1e-3, cbs=[ResumableFit(tmp_path / 'cut'), Stop()])
    again = make()
    quiet(again, 'fit_one_cycle', 4, 1e-3, cbs=ResumableFit(tmp_path / 'cut'))
    assert all(torch.equal(v, whole.model.state_dict()[k]) for k, v in again.model.state_dict().items())
    if kwargs['dtype'] == 'fp16':
        assert list(again.autocast_precision.scales) == list(whole.autocast_precision.scales)[16:]


def test_lr_find_leaves_the_model_alone():
    learn = bert_learner().to_mixed_precision(**BF16)
    before = state(learn)
    rate = quiet(learn, 'lr_find', show_plot=False, num_it=30).valley
    assert 1e-7 < rate < 10 and all(torch.equal(v, before[k]) for k, v in state(learn).items())
    assert dtypes(learn, nn.Linear, 'lr_find', show_plot=False, num_it=5) == {torch.bfloat16}


@pytest.mark.parametrize('kwargs', [BF16, dict(dtype='fp16', force=True)], ids=['bf16', 'fp16'])
def test_accumulated_gradients_are_those_of_the_big_batch(kwargs):
    """One step with 32 rows and one with four times 8 rows, from the same weights and without dropout, give the same
    update except for rounding. The optimizer is SGD, whose update is the gradient. The gradient has a relative error of
    about 2**-8 in either run; the test allows 2**-6, far less than an update of the wrong size (by a factor of 4)."""
    from functools import partial

    sgd, steps = partial(LayerwiseOptimizer, opt=torch.optim.SGD), []
    for bs, cbs in ((32, []), (8, [GradientAccumulation(32)])):
        learn = bert_learner(bs=bs, n=32, dropout=0, opt_func=sgd).to_mixed_precision(**kwargs)
        before = state(learn)
        quiet(learn, 'fit', 1, 1e-1, wd=0.0, cbs=cbs)
        steps.append(torch.cat([(v - before[k]).flatten() for k, v in state(learn).items()]))
    assert steps[0].norm() > 1e-3 and relative(steps[1], steps[0]) < 2**-6


@pytest.mark.parametrize('kwargs', [BF16, dict(dtype='fp16', force=True)], ids=['bf16', 'fp16'])
def test_gradient_clip(kwargs):
    "The norm is that of the gradients without their scale"
    norms = []

    class Norm(Callback):
        order = GradientClip.order + 1

        def before_step(self):
            norms.append(
                torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None]).norm().item()
            )

    for cbs in ([Norm()], [GradientClip(0.05), Norm()]):
        quiet(bert_learner(dropout=0).to_mixed_precision(**kwargs), 'fit', 1, 1e-4, cbs=cbs)
    free, clipped = norms[:8], norms[8:]
    assert min(free) > 0.05 and clipped == pytest.approx([0.05] * 8, rel=1e-3)
    exact, norms[:] = norms[0], []
    quiet(bert_learner(dropout=0), 'fit', 1, 1e-4, cbs=Norm())
    assert exact == pytest.approx(norms[0], rel=2**-5)


def test_save_model_and_to_fp32(tmp_path):
    learn = bert_learner(path=tmp_path).to_mixed_precision(**BF16)
    quiet(learn, 'fit_one_cycle', 2, 1e-3, cbs=SaveModelCallback(fname='best'))
    assert {
        v.dtype
        for v in torch.load(tmp_path / 'models' / 'best.pth', weights_only=True).values()
        if v.is_floating_point()
    } == {torch.float32}
    learn.to_fp32()
    assert not hasattr(learn, 'autocast_precision') and not [cb for cb in learn.cbs if isinstance(cb, MixedPrecision)]
    assert dtypes(learn, nn.Linear, 'fit', 1) == {torch.float32}
    exact = quiet(learn, 'get_preds')[0]
    other = bert_learner()
    other.model.load_state_dict(learn.model.state_dict())
    assert torch.equal(exact, quiet(other, 'get_preds')[0])


def test_export_and_load(rows, tmp_path):
    learn = awd_learners(rows, tmp_path)[1].to_mixed_precision(**BF16)
    quiet(learn, 'fit_one_cycle', 2, 1e-2)
    before = quiet(learn, 'predict', rows.text[0])
    learn.export(tmp_path / 'x.pkl')
    again = load_learner(tmp_path / 'x.pkl')
    assert dtypes(again, nn.LSTM, 'predict', rows.text[0]) == {torch.bfloat16 if has_bf16_lstm() else torch.float32}
    after = quiet(again, 'predict', rows.text[0])
    assert after[0] == before[0] and torch.equal(after[2], before[2])
    assert dtypes(again.to_fp32(), nn.LSTM, 'predict', rows.text[0]) == {torch.float32}
    assert dtypes(learn, nn.Linear, 'fit', 1) == {torch.bfloat16}  # and the first goes on


def test_validate_within_a_fit(tmp_path):
    "A Callback's own `validate()` ends with `after_fit`; the fit around it stays in mixed precision"

    class ValidateAgain(Callback):
        order = ResumableFit.order - 1
        losses = []
        inside = False

        def after_epoch(self):
            if self.inside:
                return
            self.inside = True
            self.losses.append(self.learn.validate()[0])
            self.inside = False

    learn = bert_learner().to_mixed_precision(**BF16)
    assert (
        dtypes(learn, nn.Linear, 'fit', 2, cbs=[ValidateAgain(), ResumableFit(tmp_path / 'fit')]) == {torch.bfloat16}
        and len(ValidateAgain.losses) == 2
    )


# --- when something goes wrong ---

ENDS = [(w, e) for w in ('forward', 'loss') for e in (KeyboardInterrupt, RuntimeError, CancelBatchException)] + [
    ('before_batch', CancelBatchException)
]


@pytest.mark.parametrize('where,error', ENDS, ids=[f'{w}-{e.__name__}' for w, e in ENDS])
def test_autocast_is_left_however_a_batch_ends(where, error):
    def fail(*args, **kwargs):
        raise error('here')

    learn = bert_learner().to_mixed_precision(**BF16)
    if where == 'forward':
        learn.model.bert.classifier.register_forward_pre_hook(fail)
    if where == 'loss':
        learn.loss_func = fail
    cbs = type('Last', (Callback,), dict(order=99, before_batch=fail))() if where == 'before_batch' else None
    if error is CancelBatchException:
        quiet(learn, 'fit', 1, cbs=cbs)
    else:
        with pytest.raises(error):
            quiet(learn, 'fit', 1)
    assert not torch.is_autocast_enabled('cpu') and (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    learn.model.bert.classifier._forward_pre_hooks.clear()
    learn.loss_func = CrossEntropyLossFlat()
    quiet(learn.to_fp32(), 'fit', 1)  # what an interrupt leaves behind is in nobody's way


def no_bf16(monkeypatch, flags=None):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: flags or {}, raising=False)


def test_falls_back_to_float32_and_says_so_once(monkeypatch):
    no_bf16(monkeypatch, dict(avx2=True, avx512_f=True, amx_int8=True))
    learn = bert_learner().to_mixed_precision('bf16')
    with pytest.warns(UserWarning, match='no bfloat16 instructions.*computing in float32.*force=True') as ws:
        assert dtypes(learn, nn.Linear, 'fit', 1) | dtypes(learn, nn.Linear, 'validate') == {torch.float32}
    assert (
        len([w for w in ws if 'float32' in str(w.message)]) == 1
        and learn.autocast_precision.compute_dtype == torch.float32
    )
    exact = bert_learner()
    quiet(exact, 'fit', 1)
    quiet(exact, 'validate')
    assert all(torch.equal(v, learn.model.state_dict()[k]) for k, v in exact.model.state_dict().items())


def test_float16_on_a_cpu_falls_back():
    learn = bert_learner().to_mixed_precision('fp16')
    with pytest.warns(UserWarning, match='float16 does not pay on a CPU'):
        assert dtypes(learn, nn.Linear, 'fit', 1) == {torch.float32}


@pytest.mark.parametrize(
    'flag,has',
    [
        ('avx512_bf16', True),
        ('amx_bf16', True),
        ('bf16', True),
        ('sve_bf16', True),
        ('avx512_f', False),
        ('amx_tile', False),
    ],
)
def test_flags_of_a_cpu(monkeypatch, flag, has):
    no_bf16(monkeypatch, {flag: True})
    assert has_bf16() is has and has_bf16('cpu') is has


def test_no_device_no_bf16():
    "Devices that are not there have no bfloat16"
    kinds = dict(
        cuda=torch.cuda.is_available(), xpu=torch.xpu.is_available(), mps=torch.backends.mps.is_available(), meta=False
    )
    assert not any(has_bf16(k) for k, there in kinds.items() if not there)


def test_older_pytorch_cannot_tell(monkeypatch):
    monkeypatch.delattr(torch.cpu, 'get_capabilities', raising=False)
    assert has_bf16() is False
    with pytest.warns(UserWarning, match='Only PyTorch 2.11'):
        quiet(bert_learner().to_mixed_precision(), 'validate')


@pytest.mark.parametrize(
    'have,want', [((), None), (('bf16',), 'bfloat16'), (('fp16',), 'float16'), (('bf16', 'fp16'), 'bfloat16')]
)
def test_best_of_the_device_if_no_dtype_is_given(monkeypatch, have, want):
    "A CUDA card without bfloat16 computes in float16, with a scale"
    names = {torch.bfloat16: 'bf16', torch.float16: 'fp16'}
    monkeypatch.setattr(
        precision, 'why_no_autocast', lambda kind, dtype: '' if names[dtype] in have else f'no {names[dtype]}'
    )
    learn = bert_learner().to_mixed_precision()
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        seen = dtypes(learn, nn.Linear, 'validate')
    assert seen == {getattr(torch, want or 'float32')} and len(ws) == (want is None)


def test_the_same_as_by_hand():
    "One step of SGD equals that of a plain loop with PyTorch's own autocast"
    from functools import partial

    learn = bert_learner(
        bs=64, dropout=0, opt_func=partial(LayerwiseOptimizer, opt=torch.optim.SGD)
    ).to_mixed_precision(**BF16)
    seed_everything(0)
    model = bert_learner(dropout=0).model
    model.load_state_dict(learn.model.state_dict())
    x, y = learn.dls.train.one_batch()
    quiet(learn, 'fit', 1, 0.1, wd=0.0)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        logits = model(x)
    F.cross_entropy(logits.float(), y).backward()
    with torch.no_grad():
        [p.sub_(0.1 * p.grad) for p in model.parameters() if p.grad is not None]
    assert all(torch.allclose(v, learn.model.state_dict()[k], atol=1e-6) for k, v in model.state_dict().items())


def test_changes_nothing_of_fastais():
    from fastai.callback import fp16

    assert Learner.to_bf16.__module__ == Learner.to_fp32.__module__ == fp16.__name__
    learn = bert_learner().to_bf16()
    assert [type(cb) for cb in learn.cbs if isinstance(cb, MixedPrecision)] == [MixedPrecision]
    learn.to_mixed_precision(**BF16)  # takes fastai's away
    assert [type(cb) for cb in learn.cbs if isinstance(cb, MixedPrecision)] == [AutocastPrecision]
    learn.to_fp16()
    with pytest.raises(FastaiTLError, match='one mixed precision'):
        quiet(learn, 'fit', 1)


# --- on a GPU ---


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason='no CUDA device here: float16 and bfloat16 on a GPU are not tried'
)
@pytest.mark.parametrize('dtype', ['fp16', 'bf16'])
def test_on_a_gpu(dtype):
    if dtype == 'bf16' and not has_bf16('cuda'):
        pytest.skip('this GPU has no bfloat16')
    learn = bert_learner(dropout=0)
    learn.dls.to('cuda')
    learn.model.cuda()
    learn.to_mixed_precision(dtype)
    assert dtypes(learn, nn.Linear, 'fit_one_cycle', 15, 3e-3) == {torch.float16 if dtype == 'fp16' else torch.bfloat16}
    preds, targs = quiet(learn, 'get_preds')
    assert preds.dtype == torch.float32 and (preds.argmax(1) == targs).float().mean() > 0.95
    assert {p.dtype for p in learn.model.parameters()} == {torch.float32}
    if dtype == 'fp16':
        assert learn.autocast_precision.scales[0] > 1
