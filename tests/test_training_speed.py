"""What saves time and memory in training: the same values and gradients, and nothing computed for frozen layers

No test measures time.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from fastai.text.all import CrossEntropyLossFlat, LMLearner
from fastai_tl.all import *
from repo import benchmark
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

bench = benchmark('training')

bf16_cpu = pytest.mark.skipif(not has_bf16('cpu'), reason='this CPU has no bfloat16 instructions')


def apart(a, b):
    return max(((p-q).norm()/q.norm().clamp(min=1e-12)).item() for p, q in zip(a, b))


# --- the loss in pieces ---

def test_memory_of_the_loss():
    "Vocabulary 60,000, 32 texts of 72 tokens: at most a quarter of what full logits take, and the same gradients"
    res = bench.memory(None)
    for k, v in res.items():
        assert v['share'] <= .25, (k, v)
        assert v['largest_relative_difference'] < (1e-5 if k == 'float32' else 2e-2), (k, v)
    assert res['float32']['full_mb'] > 32*72*60_000*4*2/1e6, 'the profiler must have seen the logits and their gradient'


@pytest.mark.parametrize('smoothing', [0., .1])
@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
def test_linear_cross_entropy(smoothing, reduction, monkeypatch):
    import fastai_tl.efficiency.linear_cross_entropy as chunked
    monkeypatch.setattr(chunked, 'PIECE', 64*8*7)
    monkeypatch.setattr(chunked, 'BLOCK', 64*3)
    torch.manual_seed(0)
    x, w, b = (torch.randn(*s, dtype=torch.double, requires_grad=True) for s in ((4, 11, 8), (64, 8), (64,)))
    y = torch.randint(0, 64, (4, 11))
    y[1:3, 4:] = -100
    g = torch.randn((4, 11) if reduction == 'none' else (), dtype=torch.double)
    def run(f):
        for o in (x, w, b):
            o.grad = None
        loss = f()
        (loss*g).sum().backward()
        return [loss.detach(), *[o.grad for o in (x, w, b)]]
    ours = run(lambda: linear_cross_entropy(x, w, b, y, reduction=reduction, label_smoothing=smoothing))
    kw = dict(reduction=reduction, label_smoothing=smoothing)
    want = run(lambda: F.cross_entropy(F.linear(x, w, b).transpose(1, 2), y, **kw))
    assert apart(ours, want) < 1e-13
    assert ours[1][1, 4:].abs().max() == 0, 'no gradient where there is no target'


def test_gradcheck():
    torch.manual_seed(0)
    x, w, b = (torch.randn(*s, dtype=torch.double, requires_grad=True) for s in ((5, 3), (7, 3), (7,)))
    y = torch.tensor([0, 3, -100, 6, 2])
    for r in ('mean', 'none'):
        loss = lambda *o: linear_cross_entropy(*o, y, reduction=r, label_smoothing=.2)
        assert torch.autograd.gradcheck(loss, (x, w, b))


def one_step(learn, batch):
    "Loss, metrics and gradients of one batch, as the Learner computes them, in training"
    from fastai.callback.core import Callback, CancelStepException
    grads = {}
    class Take(Callback):
        def before_step(self):
            grads.update({n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None})
            raise CancelStepException()
    learn.dls = type(learn.dls)([batch], [batch])
    with learn.no_bar(), learn.no_logging(), learn.added_cbs(Take()):
        seed_everything(7)
        learn.fit(1, 1e-3)
    return learn.recorder.values[-1], grads


def word_tokenizer():
    "A tokenizer of 90 words and four special tokens"
    from transformers import PreTrainedTokenizerFast
    from tokenizers import Tokenizer as Tok, models, pre_tokenizers
    vocab = ['[PAD]', '[UNK]', '[MASK]', '[EOS]', *[f'w{i}' for i in range(90)]]
    tok = Tok(models.WordLevel({w: i for i, w in enumerate(vocab)}, unk_token='[UNK]'))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tok, unk_token='[UNK]', pad_token='[PAD]', mask_token='[MASK]',
                                   eos_token='[EOS]', bos_token='[EOS]')


def hf_lm(kind):
    tok = word_tokenizer()
    g = torch.Generator().manual_seed(0)
    lens = torch.randint(5, 30, (40,), generator=g)
    texts = [' '.join(f'w{int(i)}' for i in torch.randint(0, 90, (int(n),), generator=g)) for n in lens]
    seed_everything(0)
    if kind == 'causal':
        dls = HFCausalLMDataLoaders.from_texts(texts, tok, max_length=32, bs=8)
        config = GPT2Config(vocab_size=94, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=3,
                            eos_token_id=3, pad_token_id=0)
        return hf_causal_lm_learner(dls, GPT2LMHeadModel(config))
    dls = HFMaskedLMDataLoaders.from_texts(texts, tok, max_length=32, bs=8)
    config = BertConfig(vocab_size=94, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
                        max_position_embeddings=32)
    return hf_masked_lm_learner(dls, BertForMaskedLM(config))


@pytest.mark.parametrize('kind', ['causal', 'masked'])
def test_hugging_face_models(kind):
    "Causal (tied embedding) and masked: loss, accuracy, perplexity and every gradient, dropout on"
    full = hf_lm(kind)
    batch = full.dls.train.one_batch()
    v1, g1 = one_step(full, batch)
    lean = hf_lm(kind).chunked_loss()
    v2, g2 = one_step(lean, batch)
    assert list(v1) == pytest.approx(list(v2), rel=1e-5) and len(v1) == 4
    assert g1.keys() == g2.keys() and len(g1) > 20
    names = [n for n in g1 if 'key.bias' not in n] # a key's bias has the gradient zero
    assert apart([g2[n] for n in names], [g1[n] for n in names]) < 1e-4
    assert not any('forward' in vars(m) for m in lean.model.modules())


def test_logits_are_never_made(monkeypatch):
    "Training and validation with metrics: no tensor as large as the logits is asked for"
    import fastai_tl.efficiency.chunked_loss as chunked
    monkeypatch.setattr(chunked.LazyLogits, 'full', lambda self: pytest.fail('full logits'))
    for kind in ('causal', 'masked'):
        learn = hf_lm(kind).chunked_loss()
        with learn.no_bar(), learn.no_logging():
            learn.fit(1, 1e-3)
        assert len(learn.recorder.values[-1]) == 4


def awd(chunked=False, half=False, **config):
    animals = 'cat dog bird cow fox'.split()
    things = 'tree house river stone'.split()
    texts = [f'the {animal} saw a {thing} and ran' for animal in animals for thing in things]*8
    tok = tokenize_texts_once(texts, progress=False)
    dls = language_model_dls(tok, texts_vocab(tok, min_freq=1), bs=4, seq_len=12)
    seed_everything(0)
    learn = awd_lm_learner(dls, config=dict(emb_sz=16, n_hid=24, n_layers=2) | config)
    if half:
        learn.to_mixed_precision()
    return learn.chunked_loss() if chunked else learn


def test_awd_lstm_gradients():
    "The tied embedding gets its gradient from both sides; the callbacks of fastai (AR, TAR) are in"
    full = awd()
    batch = full.dls.train.one_batch()
    v1, g1 = one_step(full, batch)
    v2, g2 = one_step(awd(True), batch)
    assert list(v1) == pytest.approx(list(v2), rel=1e-5)
    assert apart(g2.values(), g1.values()) < 1e-5


def test_models_that_compute_with_their_logits():
    "They get what they ask for, and a message"
    from transformers import Gemma2Config, Gemma2ForCausalLM
    learn = hf_lm('causal')
    seed_everything(0)
    gemma = Gemma2ForCausalLM(Gemma2Config(
        vocab_size=94, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=32, pad_token_id=0))
    learn = hf_causal_lm_learner(learn.dls, gemma)
    batch = learn.dls.train.one_batch()
    v1, g1 = one_step(learn, batch)
    with pytest.warns(UserWarning, match='computes with its logits'):
        v2, g2 = one_step(learn.chunked_loss(), batch)
    assert list(v1) == pytest.approx(list(v2), rel=1e-5) and apart(g2.values(), g1.values()) < 1e-5


def test_refused():
    with pytest.raises(FastaiTLError, match='linear output layer'):
        LMLearner(awd().dls, nn.Sequential(nn.Linear(2, 2)), loss_func=CrossEntropyLossFlat()).chunked_loss()


# --- the LSTM layer ---

@bf16_cpu
def test_wide_lstm_in_mixed_precision():
    """AWD_LSTM at its usual width: gradients in bfloat16 are those of float32 within bfloat16's precision

    PyTorch's own layer is wrong there on some processors.
    """
    full = awd(n_hid=1152, emb_sz=400, n_layers=3)
    batch = full.dls.train.one_batch()
    _, g1 = one_step(full, batch)
    learn = awd(half=True, n_hid=1152, emb_sz=400, n_layers=3)
    _, g2 = one_step(learn, batch)
    for n in g1:
        assert ((g2[n]-g1[n]).norm()/g1[n].norm()).item() < .05, n
    assert not any(isinstance(m, AutocastLSTM) for m in learn.model.modules()), 'afterwards it is a plain LSTM'


def test_lstm_function_is_lstm():
    "In float32 and both directions of the maths: values and gradients, a state that goes in and one that comes out"
    torch.manual_seed(0)
    lstm, x = nn.LSTM(20, 24), torch.randn(9, 5, 20)
    s, gs = [torch.randn(5, 24) for _ in range(2)], [torch.randn(9, 5, 24), torch.randn(5, 24), torch.randn(5, 24)]
    def run(f):
        lstm.zero_grad()
        ts = [o.clone().requires_grad_() for o in (x, *s)]
        outs = f(*ts)
        sum((o*g).sum() for o, g in zip(outs, gs)).backward()
        return [o.detach() for o in outs]+[o.grad for o in ts]+[p.grad for p in lstm.parameters()]
    from fastai_tl.efficiency.lstm_bf16 import LSTMFunction
    def theirs(x, h, c):
        o, (h, c) = lstm(x, (h[None], c[None]))
        return o, h[0], c[0]
    def ours(x, h, c):
        bias = lstm.bias_ih_l0+lstm.bias_hh_l0
        return LSTMFunction.apply(x, h, c, lstm.weight_ih_l0, lstm.weight_hh_l0, bias, torch.float32)
    assert apart(run(ours), run(theirs)) < 1e-5


# --- dropout ---

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize('p', [.02, .1, .5, .85])
def test_dropout_distribution(dtype, p):
    "Share, mean, variance: within four standard errors of what they should be; neighbours and rows are independent"
    seed_everything(1)
    n, m = 1000, 1001 # rows do not begin with a word
    keep = fast_mask_dropout(torch.ones(n, m, dtype=dtype), p).double() != 0
    var, total = p*(1-p), n*m
    assert abs((~keep).double().mean()-p) < 4*(var/total)**.5 + 2**-15
    z = (keep.double()-(1-p))/var**.5
    for lag in (1, 2, 3, 4, 5, 8):
        assert abs((z.view(-1)[lag:]*z.view(-1)[:-lag]).mean()) < 4.5/total**.5, f'{lag} apart'
    assert abs((z[1:]*z[:-1]).mean()) < 4.5/total**.5, 'one row below'
    assert abs(z.mean(0)*n**.5).max() < 5 and abs(z.mean(1)*m**.5).max() < 5
    words = keep.view(-1)[:total//4*4].view(-1, 4).long()@torch.tensor([1, 2, 4, 8]) # the four of a word
    want = torch.tensor([(1-p)**b.bit_count()*p**(4-b.bit_count()) for b in range(16)])*len(words)
    want = want.double()
    assert (((words.bincount(minlength=16)-want)**2/want)[want > 5]).sum() < 45, 'chi square with 15 degrees of freedom'


def test_dropout_mean_of_values():
    seed_everything(2)
    x = torch.randn(50)
    y = torch.stack([fast_mask_dropout(x, .3) for _ in range(4000)])
    assert ((y.mean(0)-x).abs()/(x.abs()*(.3/.7/4000)**.5)).max() < 4.5
    assert (y.var(0)/(x**2*.3/.7)-1).abs().max() < .15
    big = torch.tensor([3e38, -3e38, 1e-30, 0.])
    big = big[torch.arange(1000) % 4]
    z = fast_mask_dropout(big/2, .5)
    assert ((z == 0) | (z == big)).all(), 'kept numbers are multiplied by 2 and no more'


def test_dropout_repeats_and_goes_on():
    "By the seed, and from a saved state of the generator"
    x = torch.ones(1003)
    torch.manual_seed(5)
    a = fast_mask_dropout(x, .4)
    state = torch.get_rng_state()
    b = fast_mask_dropout(x, .4)
    torch.manual_seed(5)
    assert torch.equal(fast_mask_dropout(x, .4), a)
    assert torch.equal(fast_mask_dropout(x, .4), b) and not torch.equal(a, b)
    torch.set_rng_state(state)
    assert torch.equal(fast_mask_dropout(x, .4), b)


def test_dropout_gradients():
    "The mask of the forward pass, twice differentiable; not contiguous inputs too"
    x = torch.randn(6, 5, dtype=torch.double).t().requires_grad_()
    def f(x):
        torch.manual_seed(0)
        return fast_mask_dropout(x, .4)
    assert torch.autograd.gradcheck(f, x) and torch.autograd.gradgradcheck(f, x)


@pytest.mark.parametrize('block', [1, 60, 400, 2**18])
def test_attention_in_blocks(block, monkeypatch):
    "Gradients by finite differences, whatever the blocks; masks of both kinds and heads with their own"
    import fastai_tl.efficiency.fast_dropout as d
    monkeypatch.setattr(d, 'BLOCK', block)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 2, dtype=torch.double, requires_grad=True) for n in (4, 5, 5))
    bools, floats = torch.rand(2, 3, 4, 5) > .4, torch.randn(3, 1, 5).double()
    for mask in (None, bools, floats):
        def f(q, k, v):
            torch.manual_seed(0)
            return fast_attention(q, k, v, mask, .3, scale=.7)
        assert torch.autograd.gradcheck(f, (q, k, v))
        assert apart([fast_attention(q, k, v, mask)], [F.scaled_dot_product_attention(q, k, v, mask)]) < 1e-12


def test_attention_distribution():
    "Each key of each query is dropped as often as it should be, and the mean over masks is attention without dropout"
    seed_everything(3)
    q = torch.randn(1, 2, 5, 4)
    k = torch.randn(1, 2, 6, 4)
    v = torch.eye(6).expand(1, 2, 6, 6)
    n = 4000
    full = F.scaled_dot_product_attention(q, k, v)
    hundred = [o.expand(100, *o.shape[1:]) for o in (q, k, v)]
    outs = torch.cat([fast_attention(*hundred, dropout_p=.2) for _ in range(n//100)])
    dropped = (outs == 0).double().mean(0)
    assert ((dropped-.2).abs() < 4.5*(.16/n)**.5).all()
    assert ((outs.mean(0)-full[0]).abs()/(full[0]*(.25/n)**.5)).max() < 4.5


@bf16_cpu
def test_attention_in_bfloat16():
    "As near to float32 as bfloat16's rounding allows, values and gradients"
    torch.manual_seed(0)
    q, k, v, g = (torch.randn(4, 12, 128, 32) for _ in range(4))
    def run(f, dtype):
        ts = [t.to(dtype).detach().clone().requires_grad_() for t in (q, k, v)]
        out = f(*ts)
        out.backward(g.to(dtype))
        return [o.detach().float() for o in (out, *[t.grad for t in ts])]
    want = run(F.scaled_dot_product_attention, torch.float32)
    assert apart(run(fast_attention, torch.bfloat16), want) < 1.5e-2


def fast_bert():
    seed_everything(0)
    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32)
    model = BertForSequenceClassification(config).train()
    mask = (torch.arange(12) < torch.tensor([12, 12, 7, 3])[:, None]).long()
    ids = torch.randint(0, 50, (4, 12))
    return model, dict(input_ids=ids, attention_mask=mask, labels=torch.tensor([0, 1, 0, 1]))


def test_fast_dropout_finds_the_calls(monkeypatch):
    "Modules, functions, attention of transformers, weights of an AWD_LSTM; other calls go to PyTorch as before"
    import fastai_tl.efficiency.fast_dropout as d
    seen = []
    for n in ('fast_mask_dropout', 'fast_attention'):
        original = getattr(d, n)
        monkeypatch.setattr(d, n, lambda *a, f=original, n=n: [seen.append(n), f(*a)][1])
    model, batch = fast_bert()
    with FastDropout():
        model(**batch)
    assert seen.count('fast_attention') == 3 and seen.count('fast_mask_dropout') == 1+2*3+1
    seen.clear()
    with FastDropout():
        model.eval()(**batch)
    assert not seen
    lm = awd().model.train()
    lm.reset()
    with FastDropout():
        lm(torch.ones(4, 12, dtype=torch.long))
    assert seen.count('fast_mask_dropout') == 2, 'recurrent weights of two layers'
    seen.clear()
    x, kv = torch.ones(2, 4, 3, 8), torch.ones(2, 2, 3, 8)
    with FastDropout():
        F.dropout(x, 0.)
        F.dropout(x, .5, False)
        F.dropout(x, 1.)
        F.dropout(x.clone(), .5, inplace=True)
        F.dropout(torch.ones(3, device='meta'), .5)
        F.dropout(x[:0], .5)
        F.scaled_dot_product_attention(x, kv, kv, dropout_p=.1, enable_gqa=True)
        F.scaled_dot_product_attention(x, x, x)
        F.scaled_dot_product_attention(x, x, x, torch.zeros(3, 3, requires_grad=True), dropout_p=.1)
    assert not seen


@bf16_cpu
def test_fast_dropout_together_with_the_rest(tmp_path):
    """Mixed precision, one position and accumulation in one fit: it learns and repeats

    Learner and model are as before afterwards.
    """
    from fastai.callback.training import GradientAccumulation
    df = docstring_corpus(libraries=('numpy', 'scipy')).iloc[:160:2]
    dls = HFTextDataLoaders.from_df(df, minilm_folder(), max_length=32, bs=8, verbose=False)
    def run():
        seed_everything(0)
        config = BertConfig(vocab_size=30522, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                            intermediate_size=64)
        learn = hf_classifier_learner(dls, config, metrics=[]).to_mixed_precision().single_position().fast_dropout()
        with learn.no_bar(), learn.no_logging():
            learn.fit(6, 5e-3, cbs=GradientAccumulation(16))
        return learn
    a, b = run(), run()
    assert all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters()))
    losses = [v[0] for v in a.recorder.values]
    assert losses[-1] < .95*losses[0], losses
    assert '_do_one_batch' not in vars(a) and not any('forward' in vars(m) for m in a.model.modules())
    a.export(tmp_path/'model.pkl')
    a.save_bundle(tmp_path/'bundle')
    x = ['an array of numbers', 'the roots of a function']
    assert abs(load_bundle(tmp_path/'bundle').predict(x).probs-b.predict_batch(x).probs).max() < 1e-5


# --- frozen groups ---

def leaves(loss):
    "Parameters that the backward pass reaches"
    seen = set()
    res = set()
    todo = [loss.grad_fn]
    while todo:
        f = todo.pop()
        if f is None or f in seen:
            continue
        seen.add(f)
        if hasattr(f, 'variable'):
            res.add(id(f.variable))
        todo += [g for g, _ in f.next_functions]
    return res


def test_frozen_groups_cost_nothing():
    "After freeze_to(-3): no gradient, state or step below, and the graph begins above; after unfreezing, all is there"
    df = docstring_corpus(libraries=('numpy', 'scipy')).iloc[:48]
    dls = HFTextDataLoaders.from_df(df, minilm_folder(), max_length=32, bs=8, verbose=False)
    seed_everything(0)
    config = BertConfig(vocab_size=30522, hidden_size=32, num_hidden_layers=4, num_attention_heads=2,
                        intermediate_size=32)
    learn = hf_classifier_learner(dls, config, metrics=[])
    learn.freeze_to(-3)
    groups = layer_groups(learn.model)
    frozen = [p for g in groups[:-3] for p in g.params]
    free = [p for g in groups[-3:] for p in g.params]
    before = [p.clone() for p in frozen]
    needs = {}
    def note(k):
        def hook(module, inputs, out):
            needs[k] = (out[0] if isinstance(out, tuple) else out).requires_grad
        return hook
    hooks = [layer.register_forward_hook(note(k)) for k, layer in enumerate(learn.model.hf.bert.encoder.layer)]
    x, y = dls.train.one_batch()
    learn.model.train()
    assert leaves(learn.loss_func(learn.model(x), y)) == {id(p) for p in free}
    for h in hooks:
        h.remove()
    assert [needs[k] for k in range(4)] == [False]*(4-2)+[True]*2, 'layers below the lowest that trains make no graph'
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3)
    assert all(p.grad is None for p in frozen) and all(torch.equal(p, b) for p, b in zip(frozen, before))
    assert {id(p) for p in learn.opt.opt.state} == {id(p) for p in free}
    learn.unfreeze()
    assert leaves(learn.loss_func(learn.model(x), y)) == {id(p) for p in frozen+free}


# --- batches ---

def test_padding_factor_and_fused_steps():
    df = docstring_corpus().iloc[::6]
    dls = HFTextDataLoaders.from_df(df, minilm_folder(), max_length=128, bs=16, verbose=False)
    got = [(x.shape[0]*x.shape[-1], int((x[:, 0] >= 0).sum())) for x, _ in dls.train]
    lens = list(dls.train.res)
    order = torch.randperm(len(lens), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = sum(len(k)*max(lens[j] for j in k) for k in (order[i:i+16] for i in range(0, len(order), 16)))/sum(lens)
    factor = sum(a for a, _ in got)/sum(b for _, b in got)
    assert factor < 1.06 and shuffled > 1.3
    config = BertConfig(vocab_size=30522, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=16)
    learn = hf_classifier_learner(dls, config)
    learn.create_opt()
    assert learn.opt.opt.defaults.get('fused') is True


# --- the benchmark for GPUs ---

def test_gpu_script(tmp_path):
    "`--tiny` runs all four parts on a CPU; operations follow from the sizes, and no variant is much above its ceiling"
    gpu = benchmark('gpu')
    res = gpu.main(['--tiny', '--rounds', '1', '--json', str(tmp_path/'r.json'), '--md', str(tmp_path/'r.md')])
    assert json.loads((tmp_path/'r.json').read_text())['results'] == res['results']
    assert 'figures mean nothing' in (tmp_path/'r.md').read_text()
    rows = {(e, r['variant']): r for e, rs in res['results'].items() for r in rs}
    assert {e for e, _ in rows} == {'finetune', 'cache', 'lm', 'predict'}
    for r in rows.values():
        compute = r['operations']/res['ceilings'][r['computed_in']]
        memory = r['bytes']/res['ceilings']['bytes']
        assert r['least_seconds'] == pytest.approx(max(compute, memory))
        assert 0 < r['share'] < 1 and r['low'] <= r['ratio'] <= r['high'] and r['rate'] > 0
    full = rows['finetune', 'ours, float32']['operations']
    one = rows['finetune', 'ours, bfloat16, single position']['operations']
    assert .6*full < one < .95*full, 'three layers, of which the top one computes one position'
    forward = rows['predict', 'Predictor, float32']['operations']
    _, df = gpu.texts_of(type('a', (), dict(size=gpu.TINY)))
    lens = [min(len(t.split())+2, 128) for t in df.text]
    weights = 4*32*32+2*32*64
    # two whole layers, and keys and values of the third, without padding and attention
    least = 2*sum(lens)*(2*weights + 2*32*32)
    assert least < forward < 3*least


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_gpu_script_without_a_gpu(capsys):
    with pytest.raises(SystemExit):
        benchmark('gpu').main([])
    assert 'There is no GPU here: nothing is run' in capsys.readouterr().err


# --- perplexity ---

@bf16_cpu
def test_perplexity_in_bfloat16():
    "Products in bfloat16 change the figure by less than one part in a thousand, and leave the model as it was"
    learn = hf_lm('causal')
    texts = [' '.join(f'w{(i*k) % 90}' for i in range(k)) for k in range(3, 28)]
    a, b = (text_perplexity(learn, texts, dtype=d).corpus.nll for d in (None, 'bf16'))
    assert a != b and b == pytest.approx(a, rel=1e-3)
    assert not any('forward' in vars(m) for m in learn.model.modules())
