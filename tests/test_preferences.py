"""Control codes, DPO and REINFORCE, against computations from the definitions."""

import copy
import itertools
import math
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.text.all import SGD, CrossEntropyLossFlat, LMLearner, awd_lstm_lm_config
from fastai.text.models.awdlstm import AWD_LSTM
from fastai.text.models.core import get_language_model

from fastai_tl.all import *
from fastai_tl.generation.completions import CompletionLogprobs, pad_completions

WORDS = ['xxunk', 'xxpad', 'xxbos', 'xxeos', 'a', 'b', 'c']


def small_awd(words=WORDS, seed=0, dtype=torch.float64):
    "A Learner with a random AWD_LSTM for a vocabulary of a few words, with strong dropout"
    seed_everything(seed)
    texts = tokenize_texts_once(['a b c a', 'b c', 'c a b'] * 8, progress=False)
    dls = language_model_dls(texts, words, bs=2, seq_len=5)
    sizes = dict(awd_lstm_lm_config, emb_sz=6, n_hid=7, n_layers=2)
    model = get_language_model(AWD_LSTM, len(words), sizes).to(dtype)
    return LMLearner(dls, model, loss_func=CrossEntropyLossFlat(), opt_func=SGD, splitter=layer_splitter())


def small_gpt(seed=0, dtype=torch.float64):
    "A random GPT-2 with dropout and its tokenizer for a few words"
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    seed_everything(seed)
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token='xxunk'))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = dict(unk_token='xxunk', pad_token='xxpad', bos_token='xxbos', eos_token='xxeos')
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **tokens)
    ids = dict(bos_token_id=2, eos_token_id=3, pad_token_id=1)
    config = GPT2Config(vocab_size=len(WORDS), n_positions=16, n_embd=8, n_layer=2, n_head=2, **ids)
    return GPT2LMHeadModel(config).to(dtype), tokenizer


def both(dtype=torch.float64):
    "Each kind of model, as `(what is passed, its tokenizer)`"
    return dict(awd=(small_awd(dtype=dtype), None), gpt=small_gpt(dtype=dtype))


def next_logprobs(tm, ids):
    "Log-probabilities of the next token after `ids`, from the model's own output"
    tm.model.eval()
    x = torch.tensor([ids])
    if not tm.is_awd_lstm:
        return tm.model(x).logits[0, -1].log_softmax(-1)
    tm.model.reset()
    return tm.model(x)[0][0, -1].log_softmax(-1)


def logprob(tm, context, ids):
    "The log-probability of a completion, token by token"
    return sum(next_logprobs(tm, [*context, *ids[:i]])[token] for i, token in enumerate(ids))


# --- DPO ---


@pytest.mark.parametrize('smoothing', [0.0, 0.1, 0.4])
@pytest.mark.parametrize('normalized', [False, True])
def test_dpo_loss(smoothing, normalized):
    "Eq. 7 of the paper, its smoothed and its length-normalized variant, by hand in float64, for large ratios too"
    draw = np.random.default_rng(0)
    for scale, beta in ((1, 0.1), (30, 0.5), (300, 1.0)):
        model, reference = -scale * draw.random((2, 20, 2))
        lens = draw.integers(1, 40, (20, 2))
        ratios = (model - reference) / (lens if normalized else 1)
        m = beta * (ratios[:, 0] - ratios[:, 1])

        def log_sigmoid(x):
            return min(x, 0) - math.log1p(math.exp(-abs(x)))

        by_hand = [-(1 - smoothing) * log_sigmoid(x) - smoothing * log_sigmoid(-x) for x in m]
        loss = DPOLoss(beta, smoothing, normalized)
        args = torch.tensor(model), torch.tensor(reference), torch.tensor(lens)
        assert float(loss(*args)) == pytest.approx(np.mean(by_hand), abs=1e-12)
        loss.reduction = 'none'
        np.testing.assert_allclose(loss(*args), by_hand, atol=1e-12)
        single = loss(*(o.float() for o in args[:2]), args[2])
        np.testing.assert_allclose(single, by_hand, rtol=1e-4, atol=1e-4)


PAIRS = [('a', ' b c', ' c'), ('a b', ' c', ' a b c a'), ('', 'b', 'c c c'), ('c', ' a', ' b b'), ('b', ' c', ' a')]


def by_the_paper(tm, dataset, beta):
    "The loss of the paper for all pairs of a dataset, from each text alone"
    losses = []
    for (chosen, rejected), (ref_w, ref_l) in zip(dataset.groups, dataset.reference.tolist()):
        m = beta * ((logprob(tm, *chosen) - ref_w) - (logprob(tm, *rejected) - ref_l))
        losses.append(-torch.log(1 / (1 + torch.exp(-m))))
    return sum(losses) / len(losses)


def move_weights(model):
    "Move a model away from its reference"
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)


@pytest.mark.parametrize('kind', ['awd', 'gpt'])
def test_dpo_gradient(kind):
    "Loss and gradient of a padded batch in training mode are those of the paper, from each text alone"
    source, tokenizer = both()[kind]
    learn = dpo_learner(source, PAIRS, tokenizer, DPOLoss(0.5), valid_pct=0.2, bs=4, seed=1)
    tm = text_model(source, tokenizer)
    assert len(learn.dls.train_ds) == 4
    move_weights(tm.model)
    params = [p for p in tm.model.parameters() if p.requires_grad]
    want = by_the_paper(tm, learn.dls.train_ds, 0.5)
    learn.model.train()
    *xb, reference, lens = learn.dls.train.one_batch()
    loss = learn.loss_func(learn.model(*xb), reference, lens)
    assert float(loss.detach()) == pytest.approx(float(want.detach()), abs=1e-10)
    for one, other in zip(torch.autograd.grad(loss, params), torch.autograd.grad(want, params)):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize('kind', ['awd', 'gpt'])
def test_dpo_step(kind):
    "A fit of one batch with SGD is one step along that gradient, and the reference stays"
    source, tokenizer = both(torch.float32)[kind]
    learn = dpo_learner(source, PAIRS, tokenizer, DPOLoss(0.5), valid_pct=0.2, bs=4, seed=1, wd=0.0)
    learn.opt_func = partial(SGD, mom=0.0)
    tm = text_model(source, tokenizer)
    move_weights(tm.model)
    reference = learn.dls.train_ds.reference.clone()
    params = [p for p in tm.model.parameters() if p.requires_grad]
    loss = by_the_paper(tm, learn.dls.train_ds, 0.5)
    want = [p.detach() - 0.1 * g for p, g in zip(params, torch.autograd.grad(loss, params))]
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 0.1)
    assert float(learn.recorder.losses[0]) == pytest.approx(float(loss.detach()), abs=1e-5)
    for p, other in zip(params, want):
        torch.testing.assert_close(p.detach(), other, atol=1e-6, rtol=1e-5)
    assert torch.equal(learn.dls.train_ds.reference, reference)


def test_dpo_reference():
    "The reference is the model before the training, or the one that is passed; a batch of any size gives the same"
    model, tokenizer = small_gpt(dtype=torch.float32)
    before = copy.deepcopy(model)
    first = dpo_learner(model, PAIRS, tokenizer, bs=2)
    with first.no_bar(), first.no_logging():
        first.fit(2, 1e-2)
    moved = dpo_learner(model, PAIRS, tokenizer)
    kept = dpo_learner(model, PAIRS, tokenizer, reference=before, bs=5)
    for part in ('train_ds', 'valid_ds'):
        reference = getattr(first.dls, part).reference
        torch.testing.assert_close(getattr(kept.dls, part).reference, reference, atol=1e-5, rtol=0)
        assert (getattr(moved.dls, part).reference - reference).abs().max() > 1e-3


def test_dpo_end():
    "`end` adds the token that ends a text to both completions"
    model, tokenizer = small_gpt()
    for end in (True, False):
        learn = dpo_learner(model, PAIRS, tokenizer, end=end)
        ids = [ids for ds in (learn.dls.train_ds, learn.dls.valid_ds) for group in ds.groups for _, ids in group]
        assert all((row[-1] == 3) == end for row in ids)
    table = pd.DataFrame(PAIRS, columns=['prompt', 'chosen', 'rejected'])
    by_table = dpo_learner(model, table.assign(more=1), tokenizer, end=False)
    assert by_table.dls.train_ds.groups == learn.dls.train_ds.groups


def test_dpo_of_lora():
    "Only the adapters of a LoRA model are trained"
    peft = pytest.importorskip('peft')
    model, tokenizer = small_gpt(dtype=torch.float32)
    lora = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=['c_attn'], task_type='CAUSAL_LM'))
    before = {name: p.clone() for name, p in lora.named_parameters()}
    learn = dpo_learner(lora, PAIRS * 3, tokenizer)
    assert float(learn.validate()[0]) == pytest.approx(math.log(2), abs=1e-6)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-2)
    changed = {name for name, p in lora.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all('lora' in name for name in changed)


# --- REINFORCE ---


@pytest.mark.parametrize('kind', ['awd', 'gpt'])
def test_reinforce_gradient(kind):
    "The expected gradient over all pairs of samples is the gradient of E[r] - beta KL, from the definitions"
    source, tokenizer = both()[kind]
    beta, context = 0.3, [2, 4]
    learn = reinforce_learner(source, ['a'], lambda texts: [0.0] * len(texts), tokenizer, beta=beta, max_new_tokens=2)
    sampler = next(cb for cb in learn.cbs if cb.name == 'sampled_completions')
    tm = text_model(source, tokenizer)
    never, ends = sampler.never, sampler.ends
    assert ends == ([2, 3] if kind == 'awd' else [3])
    assert never == ([0, 1] if kind == 'awd' else [1])
    words = [i for i in range(len(WORDS)) if i not in [*never, *ends]]
    # all texts of at most two tokens: an end counts as one event
    samples = [[ends[0]], *([w, o] for w in words for o in [*words, ends[0]])]
    values = torch.randn(len(samples)).double()
    with torch.no_grad():
        for p in tm.model.parameters():
            p.add_(torch.randn_like(p) * 0.1)

    def log_event(model, before, token):
        "Log-probability of a token among those that can be sampled"
        allowed = [*words, *ends]
        log_probs = next_logprobs(model, [*context, *before])[allowed].log_softmax(-1)
        of_token = [allowed.index(i) for i in (ends if token == ends[0] else [token])]
        return log_probs[of_token].logsumexp(0)

    reference = copy.copy(tm)
    reference.model = sampler.reference.model
    exact, exact_reference = (
        torch.stack([sum(log_event(m, ids[:i], t) for i, t in enumerate(ids)) for ids in samples])
        for m in (tm, reference)
    )
    assert float(exact.exp().sum()) == pytest.approx(1, abs=1e-9)
    objective = (exact.exp() * values).sum() - beta * (exact.exp() * (exact - exact_reference.detach())).sum()
    params = [p for p in tm.model.parameters() if p.requires_grad]
    want = torch.autograd.grad(-objective, params, retain_graph=True)
    batch = pad_completions([[(context, ids) for ids in samples]])
    logprobs, fixed = learn.model.train()(*batch)[0], sampler.reference(*batch)[0].detach()
    torch.testing.assert_close(logprobs, exact, atol=1e-9, rtol=0)
    torch.testing.assert_close(fixed, exact_reference.detach(), atol=1e-9, rtol=0)
    pairs = torch.tensor(list(itertools.product(range(len(samples)), repeat=2)))
    weights = exact.detach().exp()[pairs].prod(1)
    advantages = learn.loss_func.advantages(logprobs[pairs], values[pairs], fixed[pairs])
    loss = -(weights * (advantages * logprobs[pairs]).mean(1)).sum()
    for one, other in zip(torch.autograd.grad(loss, params), want):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize('kind', ['awd', 'gpt'])
def test_reinforce_samples(kind):
    "Samples come from the process whose log-probabilities are used: frequencies of all texts, by a chi-squared test"
    from scipy.stats import chisquare

    source, tokenizer = both()[kind]
    n = 4000
    learn = reinforce_learner(source, ['a'], len, tokenizer, n_samples=n, max_new_tokens=2)
    sampler = next(cb for cb in learn.cbs if cb.name == 'sampled_completions')
    _, (rows,) = sampler.sample(['a'], 3)
    with torch.no_grad():
        probs = learn.model.eval()(*pad_completions([rows]))[0].exp().tolist()
    counts, prob_of = {}, {}
    for (_, ids), prob in zip(rows, probs):
        counts[tuple(ids)] = counts.get(tuple(ids), 0) + 1
        prob_of[tuple(ids)] = prob
    common = [ids for ids in counts if prob_of[ids] * n > 5]
    rest = 1 - sum(prob_of[ids] for ids in common)
    seen = [*(counts[ids] for ids in common), n - sum(counts[ids] for ids in common)]
    expected = [*(prob_of[ids] * n for ids in common), rest * n]
    if expected[-1] < 1:
        seen, expected = seen[:-1], np.array(expected[:-1]) * sum(seen[:-1]) / sum(expected[:-1])
    assert chisquare(seen, expected).pvalue > 1e-3


def count_c(texts):
    return [text.count('c') for text in texts]


def test_reinforce_reference_stays():
    "Training changes the model and not its reference, and the same seed gives the same training"
    weights = []
    for _ in range(2):
        learn = small_awd(dtype=torch.float32)
        rl = reinforce_learner(learn, ['a', 'b', ''], count_c, bs=2, max_new_tokens=4)
        reference = [p.clone() for p in rl.cbs.filter(lambda cb: hasattr(cb, 'reference'))[0].reference.parameters()]
        seed_everything(1)
        with rl.no_bar(), rl.no_logging():
            rl.fit(2, 0.5)
        sampler = rl.cbs.filter(lambda cb: hasattr(cb, 'reference'))[0]
        assert all(torch.equal(p, o) for p, o in zip(sampler.reference.parameters(), reference))
        assert not all(torch.equal(p, o) for p, o in zip(learn.model.parameters(), reference))
        weights.append([p.clone() for p in learn.model.parameters()])
    assert all(torch.equal(p, o) for p, o in zip(*weights))


# --- Control codes ---


def test_codes_in_chinese(tmp_path):
    "Codes in Chinese are one token of an AWD_LSTM whose tokenizer splits all else, and of its saved encoder"
    codes = ControlCodes(['正面', '負面'])
    texts, kinds = ['房間很乾淨', '房間很髒'] * 10, ['正面', '負面'] * 10
    tok = ChineseTokenizer()
    words = codes.mark(tokenize_texts_once(texts, tok, CHINESE_RULES, progress=False), kinds)
    dls = language_model_dls(words, texts_vocab(words), tok, CHINESE_RULES, bs=4, seq_len=6)
    learn = awd_lm_learner(dls, dict(emb_sz=8, n_hid=8, n_layers=1))
    codes.check(learn)
    adapter = text_model(learn).adapter
    assert adapter.to_tokens(adapter.encode('<正面>房間')) == ['xxbos', '<正面>', '房', '間']
    stream = adapter.to_tokens(learn.dls.train_ds[0][0].tolist())
    assert stream[:2] in (['xxbos', '<正面>'], ['xxbos', '<負面>'])
    learn.path = tmp_path
    out = [o.text for o in learn.generate('房間', prefix='<正面>', max_new_tokens=5)]
    assert all('正面' not in text for text in out)


def test_codes_of_a_saved_tokenizer(tmp_path):
    "A tokenizer that has codes is saved with them"
    from transformers import AutoTokenizer

    model, tokenizer = small_gpt()
    codes = ControlCodes(['good', 'bad'])
    assert codes.add_to(tokenizer, model) == 2
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    codes.check(str(tmp_path))
    again = AutoTokenizer.from_pretrained(tmp_path)
    ids = again('<good>a b')['input_ids']
    assert again.convert_ids_to_tokens(ids) == ['<good>', 'a', 'b']
    assert again.decode(ids, skip_special_tokens=True) == 'a b'


def test_other_texts_in_angle_brackets():
    "A text that begins with what looks like a code and is none is read as before"
    learn = small_awd()
    adapter = text_model(learn).adapter
    for text in ('<b> a b', '< a', '<a', 'a <b> c', '<>'):
        assert adapter.encode(text) == adapter.numericalize(adapter.tokenize(text))


def test_completion_logprobs_of_one_row():
    "A batch of one completion, which ends at once"
    for source, tokenizer in both().values():
        tm = text_model(source, tokenizer)
        got = CompletionLogprobs(tm)(*pad_completions([[([2, 4], [3])]]))
        assert float(got.detach()) == pytest.approx(float(logprob(tm, [2, 4], [3]).detach()), abs=1e-10)


def test_ranked_pairs_leave_out_empty_completions():
    "A completion that ends at once is in no pair, whatever its reward"
    learn = small_awd()
    with torch.no_grad():  # a text ends at once more often than not
        learn.model[1].decoder.bias[2] += 1.5
    pairs = ranked_pairs(learn, ['a'] * 40, lambda texts: [-len(text) for text in texts], seed=0, max_new_tokens=4)
    assert len(pairs) > 3
    assert all(text.strip() for name in ('chosen', 'rejected') for text in pairs[name])
    assert (pairs.chosen_reward > pairs.rejected_reward).all()
    dpo_learner(learn, pairs, end=False)
