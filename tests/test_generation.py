"""Generation: the same call for Hugging Face models and AWD_LSTM, equal to the slow and plain ways of doing it."""

import copy
import re

import pytest
import torch
from fastai.callback.schedule import *
from fastai.text.all import AWD_LSTM, CrossEntropyLossFlat, L, Learner, awd_lstm_lm_config, language_model_learner
from fastai_tl.all import *
from torch import nn


class Wrapper(nn.Module):
    "A Hugging Face model inside a module of somebody's own"
    def __init__(self, hf): super().__init__(); self.hf = hf
    def forward(self, x): return self.hf(input_ids=x).logits


def make_bpe(texts, vocab):
    from tokenizers import Tokenizer as Tok, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    bpe = Tok(models.BPE()); bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False); bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab, special_tokens=['<|endoftext|>'], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token='<|endoftext|>', eos_token='<|endoftext|>')


def train_gpt2(texts, vocab=400, steps=200, seed=0, n_positions=128):
    "A small GPT-2 and its tokenizer, trained for a moment"
    from transformers import GPT2Config, GPT2LMHeadModel
    tok = make_bpe(texts, vocab)
    seed_everything(seed)
    m = GPT2LMHeadModel(GPT2Config(vocab_size=len(tok), n_positions=n_positions, n_embd=48, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)).train()
    stream = torch.tensor([i for ids in tok(texts)['input_ids'] for i in [0, *ids]])
    opt = torch.optim.AdamW(m.parameters(), 4e-3)
    for _ in range(steps):
        x = torch.stack([stream[i:i+64] for i in torch.randint(0, len(stream)-64, (10,))])
        m(input_ids=x, labels=x).loss.backward(); opt.step(); opt.zero_grad()
    return m, tok


@pytest.fixture(scope='module')
def texts():
    df = docstring_corpus()
    return list(df[(df.split == 'train') & (df.label == 'parameter')].text[:600])


@pytest.fixture(scope='module')
def gpt(texts):
    m, tok = train_gpt2(texts)
    return m.double(), tok


@pytest.fixture(scope='module')
def awd(texts):
    words = tokenize_texts_once(texts, progress=False)
    dls = language_model_dls(words, texts_vocab(words, min_freq=2), bs=16, seq_len=40)
    seed_everything(0)
    learn = language_model_learner(dls, AWD_LSTM, pretrained=False, drop_mult=.1, config={**awd_lstm_lm_config, 'emb_sz': 48, 'n_hid': 64, 'n_layers': 3})
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 2e-2)
    learn.model.double()
    return learn


@pytest.fixture(scope='module')
def hf_learner(gpt, awd):
    learn = Learner(awd.dls, Wrapper(gpt[0]), loss_func=CrossEntropyLossFlat())
    learn.tokenizer = gpt[1]
    return learn


PROMPTS = ['The number of', 'If', 'Whether to return the array of shape (n_samples, n_features) that', '', 'axis']


# --- Hugging Face: token for token what `model.generate` gives for each prompt alone ---

def by_hand(gpt, prompt, **kw):
    model, tok = gpt
    x = torch.tensor([tok(prompt)['input_ids'] or [tok.bos_token_id]])
    rows = model.eval().generate(x, attention_mask=torch.ones_like(x), pad_token_id=0, **kw)[:, x.shape[1]:].tolist()
    return [r[:r.index(0)] if 0 in r else r for r in rows]


@pytest.mark.parametrize('bs', [1, 2, 16])
@pytest.mark.parametrize('kw', [dict(max_new_tokens=25), dict(max_new_tokens=20, num_beams=4, num_return_sequences=3), dict(max_new_tokens=20, num_beams=3, early_stopping=True, length_penalty=.5),
                                dict(max_new_tokens=25, repetition_penalty=1.4), dict(max_new_tokens=25, no_repeat_ngram_size=1), dict(max_new_tokens=20, num_beams=2, no_repeat_ngram_size=2),
                                dict(max_length=60), dict(max_new_tokens=20, min_new_tokens=15), dict(max_length=60, min_length=50)], ids=str)
def test_equals_generate_alone(gpt, hf_learner, kw, bs):
    got = hf_learner.generate(PROMPTS, do_sample=False, bs=bs, **kw)
    want = [ids for p in PROMPTS for ids in by_hand(gpt, p, do_sample=False, **kw)]
    assert [o.ids for o in got] == want


def test_pad_token_of_its_own(gpt):
    "A model whose padding is a token like any other, and a penalty that would see it"
    model, tok = copy.deepcopy(gpt[0]), gpt[1]
    model.generation_config.pad_token_id = 7
    got = generate(model, PROMPTS, tok, max_new_tokens=20, repetition_penalty=1.5, do_sample=False)
    assert [o.ids for o in got] == [ids for p in PROMPTS for ids in by_hand(gpt, p, max_new_tokens=20, repetition_penalty=1.5, do_sample=False)]


def test_sampling_repeats_with_a_seed(gpt, hf_learner):
    kw = dict(max_new_tokens=20, temperature=.9, top_p=.9, num_return_sequences=2)
    before = torch.get_rng_state()
    a, b, c = (hf_learner.generate(PROMPTS, seed=s, **kw).texts for s in (1, 1, 2))
    assert a == b != c and len(a) == 2*len(PROMPTS)
    assert torch.equal(before, torch.get_rng_state()), 'the random numbers of the program go on as if nothing had been drawn'
    torch.manual_seed(1)
    assert hf_learner.generate('The', seed=1, **kw)[0].ids == by_hand(gpt, 'The', do_sample=True, **kw)[0], 'the seed is the one of PyTorch'


def test_sampling_follows_the_distribution(gpt):
    "First tokens drawn 2,000 times, beside the probabilities that temperature and top_k leave"
    model, tok = gpt
    draws = [o.ids[0] if o.ids else 0 for o in generate(model, 'The', tok, max_new_tokens=1, num_return_sequences=2000, temperature=.8, top_k=5, seed=0)]
    x = torch.tensor([tok('The')['input_ids']])
    with torch.no_grad(): lg = model.eval()(x).logits[0, -1]/.8
    top, ids = lg.topk(5)
    freq = torch.tensor([draws.count(i)/2000 for i in ids.tolist()])
    assert set(draws) <= set(ids.tolist())
    assert (freq - top.softmax(-1)).abs().max() < 4*.5/2000**.5


def test_modes_and_gradients_are_left_alone(hf_learner, awd):
    for learn in (hf_learner, awd):
        learn.model.train(); part = next(m for m in learn.model.modules() if isinstance(m, nn.Embedding)); part.eval()
        modes = [m.training for m in learn.model.modules()]
        hidden = copy.deepcopy(getattr(learn.model[0], 'hidden', None)) if learn is awd else None
        learn.generate('The', max_new_tokens=3)
        with pytest.raises(ZeroDivisionError): learn.generate('The', max_new_tokens=3, logits_processor=[lambda i, s: 1/0])
        assert [m.training for m in learn.model.modules()] == modes
        assert all(p.grad is None or not p.grad.any() for p in learn.model.parameters()) and torch.is_grad_enabled()
        if hidden is not None: assert all(torch.equal(a, b) for x, y in zip(hidden, learn.model[0].hidden) for a, b in zip(x, y))


def test_base_config(gpt):
    "A GenerationConfig of the user's is started from, and not changed"
    from transformers import GenerationConfig
    cfg = GenerationConfig(max_new_tokens=5, num_beams=3, stop_strings=['zzz'])
    got = generate(*gpt[:1], PROMPTS, gpt[1], generation_config=cfg, max_new_tokens=7)
    assert [o.ids for o in got] == [ids for p in PROMPTS for ids in by_hand(gpt, p, max_new_tokens=7, num_beams=3)]
    assert cfg.max_new_tokens == 5 and cfg.stop_strings == ['zzz'] and cfg.pad_token_id is None


# --- AWD_LSTM ---

def slow_steps(learn, ids, n, processors=()):
    "The whole history through fastai's model at every step; the tokens, and the processed scores of each step"
    from transformers import LogitsProcessorList
    m, codec, scores = learn.model.eval(), text_model(learn).codec, []
    ids = list(ids)
    for _ in range(n):
        m[0].bs = 1; m.reset()
        with torch.no_grad(): lg = m(torch.tensor([ids]))[0][:, -1].float()
        lg[:, codec.never] = -float('inf')
        s = LogitsProcessorList(processors)(torch.tensor([ids]), lg)
        scores.append(s[0]); ids.append(int(s.argmax()))
    return ids[-n:], torch.stack(scores)


def test_awd_greedy_equals_the_slow_way(awd):
    "A hundred tokens, for prompts of different length in one batch; the end of a text is not allowed to come"
    codec = text_model(awd).codec
    got = awd.generate(PROMPTS, max_new_tokens=100, min_new_tokens=100)
    for p, o in zip(PROMPTS, got):
        ban = lambda i, s: s.index_fill(1, torch.tensor(codec.eos_ids), -float('inf'))
        assert o.ids == slow_steps(awd, codec.encode(p), 100, [ban])[0]


def controls():
    from transformers import generation as g
    return [dict(repetition_penalty=1.3), dict(no_repeat_ngram_size=2), dict(no_repeat_ngram_size=1), dict(temperature=.7, top_k=0), dict(top_k=7), dict(top_k=0, top_p=.6), dict(top_k=0, min_p=.2), dict(top_k=0, typical_p=.5),
            dict(top_k=0, repetition_penalty=1.2, temperature=.5, top_p=.8)]


def processors_of(kw):
    "transformers' own, in its order"
    from transformers import (MinPLogitsWarper, NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, TypicalLogitsWarper)
    make = dict(repetition_penalty=RepetitionPenaltyLogitsProcessor, no_repeat_ngram_size=NoRepeatNGramLogitsProcessor, temperature=TemperatureLogitsWarper, top_k=TopKLogitsWarper, top_p=TopPLogitsWarper, min_p=MinPLogitsWarper, typical_p=TypicalLogitsWarper)
    return [make[k](kw[k]) for k in make if kw.get(k)]


@pytest.mark.parametrize('kw', controls(), ids=str)
def test_awd_controls_equal_transformers_processors(awd, kw):
    "The scores from which each token is chosen, step by step, beside the same processors on the slow model's logits"
    sampling = any(k in SAMPLING for k in kw)
    tm = text_model(awd); codec = tm.codec
    model = stateful_model(tm.model, [], codec.pad_id, codec.never)
    x = torch.tensor([codec.encode('The number of')])
    torch.manual_seed(0)
    with torch.no_grad(): out = model.generate(x, max_new_tokens=12, do_sample=sampling, return_dict_in_generate=True, output_scores=True, **kw)
    ids = out.sequences[0].tolist()
    from transformers import LogitsProcessorList
    m = awd.model.eval()
    for t, got in enumerate(out.scores):
        hist = ids[:x.shape[1]+t]
        m[0].bs = 1; m.reset()
        with torch.no_grad(): lg = m(torch.tensor([hist]))[0][:, -1].float()
        ps = processors_of(kw)
        cut = next((i for i, p in enumerate(ps) if 'Warper' in type(p).__name__), len(ps))
        s = LogitsProcessorList(ps[:cut])(torch.tensor([hist]), lg)
        s[:, codec.never] = -float('inf')
        s = LogitsProcessorList(ps[cut:])(torch.tensor([hist]), s)
        assert torch.equal(torch.isinf(s[0]), torch.isinf(got[0])), t
        assert torch.allclose(s[0][~torch.isinf(s[0])], got[0][~torch.isinf(got[0])], atol=1e-4)


@pytest.mark.parametrize('n', [1, 2, 3])
def test_no_ngram_twice(awd, hf_learner, n):
    for learn in (awd, hf_learner):
        for o in learn.generate(['The number of', 'If True'], max_new_tokens=60 if n > 1 else 30, no_repeat_ngram_size=n):
            ids = [*o.context, *o.ids]
            grams = [tuple(ids[i:i+n]) for i in range(len(ids)-n+1)]
            assert all(g not in grams[:i] for i, g in enumerate(grams) if i+n > len(o.context)), 'a prompt may repeat itself, what is written may not'


def test_awd_beams_equal_each_prompt_alone(awd):
    kw = dict(max_new_tokens=15, num_beams=4, num_return_sequences=2)
    assert [o.ids for o in awd.generate(PROMPTS, **kw)] == [o.ids for p in PROMPTS for o in awd.generate(p, **kw)]


def test_awd_beam_finds_the_best_of_all(awd):
    "With as many beams as tokens, two steps of beam search are an exhaustive search"
    tm = text_model(awd); codec, V = tm.codec, len(tm.codec.vocab)
    model = stateful_model(tm.model, [], codec.pad_id, codec.never)
    ids = codec.encode('The number of')
    with torch.no_grad(): out = model.generate(torch.tensor([ids]), max_new_tokens=2, num_beams=V, do_sample=False)[0, -2:].tolist()
    awd.model.eval(); awd.model[0].bs = 1; awd.model.reset()
    with torch.no_grad():
        lp = awd.model(torch.tensor([ids]))[0][0, -1].log_softmax(-1); lp[codec.never] = -float('inf')
        x = torch.tensor([[*ids, i] for i in range(V)]); awd.model[0].bs = V; awd.model.reset()
        second = awd.model(x)[0][:, -1].log_softmax(-1); second[:, codec.never] = -float('inf')
    best = (lp[:, None]+second).argmax().item()
    assert out == [best//V, best % V]


def test_awd_never_writes_what_is_no_word(awd):
    out = awd.generate(PROMPTS, max_new_tokens=60, num_return_sequences=4, temperature=1.5, top_k=0, seed=0)
    assert not {t for o in out for t in o.ids} & set(text_model(awd).codec.never)
    assert not any(t in o.completion for o in out for t in ('xxunk', 'xxpad', 'xxbos', 'xxmaj', 'xxup', 'xxrep', 'xxwrep'))


# --- text ---

def test_rules_are_undone():
    words = 'The CAT sat!!!! It was very very very good. (well-known, isn\'t it?)'
    tok = tokenize_texts_once([words]*4, progress=False)
    codec = FastaiCodec.from_dls(language_model_dls(tok, texts_vocab(tok, min_freq=1), bs=2, seq_len=8))
    assert codec.decode(codec.encode(words)) == words


def test_chinese_comes_out_without_spaces():
    "A character-level AWD_LSTM that has learnt a poem writes it as it stands"
    poem = '床前明月光,疑是地上霜。舉頭望明月,低頭思故鄉。'
    class Characters:
        def __call__(self, items): return (L([t for t in re.findall(r'xx\w+|\S', o)]) for o in items)
    tok = tokenize_texts_once([poem]*60, tok=Characters(), progress=False)
    dls = language_model_dls(tok, texts_vocab(tok, min_freq=1), tok=Characters(), bs=8, seq_len=26)
    seed_everything(0)
    learn = language_model_learner(dls, AWD_LSTM, pretrained=False, drop_mult=.01, config={**awd_lstm_lm_config, 'emb_sz': 32, 'n_hid': 64, 'n_layers': 1})
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(25, 3e-2)
    out = learn.generate('床前', max_new_tokens=40)[0]
    assert out.text == poem and out.finish == 'end'
    assert ''.join(learn.generate('床前', max_new_tokens=40, stream=True)) == poem[2:]
    assert learn.generate('床前', max_new_tokens=40, stop_strings='地上')[0].text == poem[:poem.index('上')+1]


def test_partial_characters_are_not_streamed():
    "A tokenizer of bytes: no piece ends within a character"
    poem = '疑是地上霜。舉頭望明月'
    m, tok = train_gpt2([poem]*40, vocab=257, steps=60)
    pieces = list(generate(m, '疑是', tok, max_new_tokens=24, stream=True))
    assert '�' not in ''.join(pieces[:-1]) and ''.join(pieces) == generate(m, '疑是', tok, max_new_tokens=24)[0].completion
    assert any(len(p) == 1 and p in poem for p in pieces)


def test_shown_text_is_escaped(gpt):
    out = generate(gpt[0], '<script>alert(1)</script>', gpt[1], max_new_tokens=3)
    assert '<script>' not in out._repr_html_() and out[0].prompt in str(out)


# --- control ---

def test_required_words_whatever_is_drawn(awd, hf_learner):
    for learn in (awd, hf_learner):
        out = learn.generate(['The', 'If True,'], max_new_tokens=20, required_words=['default', 'shape of'], num_return_sequences=10, temperature=1.2, seed=0)
        assert all(w in o.completion.lower() for o in out for w in ('default', 'shape of')) and len(out) == 20
        beams = learn.generate(['The', 'If True,'], max_new_tokens=12, required_words='default', num_beams=3)
        assert all('default' in o.completion.lower() for o in beams)


def test_bad_words_whatever_is_drawn(awd, hf_learner):
    for learn in (awd, hf_learner):
        kw = dict(max_new_tokens=30, num_return_sequences=10, temperature=.7, seed=0)
        free = learn.generate('The', **kw)
        assert any(' the' in o.completion for o in free)
        assert not any(re.search(r'\bthe\b', o.completion) for o in learn.generate('The', bad_words=['the'], **kw))


def test_prefix_is_read_and_not_shown(hf_learner):
    a, = hf_learner.generate('number', prefix='The ', max_new_tokens=8)
    b, = hf_learner.generate('The number', max_new_tokens=8)
    assert a.prompt == 'number' and a.completion == b.completion and a.text == 'number'+b.completion


def test_bad_input(hf_learner, awd):
    for kw, msg in [(dict(prompts=[]), 'At least one prompt'), (dict(prompts=[None]), 'Prompts must be strings'), (dict(prompts='a', top_pp=1.), "Did you mean 'top_p'"), (dict(prompts='a', temperature=-1.), '`temperature` must be above 0'),
                    (dict(prompts='the '*200), 'must fit into the 128 positions'), (dict(prompts='a', do_sample=False, temperature=.5), 'do_sample=True'), (dict(prompts='a', num_beams=2, num_return_sequences=3), 'than beams'),
                    (dict(prompts='a', max_length=9, max_new_tokens=9), 'not by both'), (dict(prompts='a', top_p=0.), '`top_p` must be'), (dict(prompts='a', generation_config={}), 'GenerationConfig'), (dict(prompts='a', stop_strings=''), None)]:
        for learn in (hf_learner, awd):
            if msg is None: learn.generate(max_new_tokens=2, **kw); continue
            if 'positions' in msg and learn is awd: continue
            with pytest.raises(FastaiTLError, match=re.escape(msg)): learn.generate(**kw)
    assert hf_learner.generate('The', top_k=0, max_new_tokens=3, seed=0)[0].ids
    with pytest.warns(UserWarning, match='does nothing without beams'): hf_learner.generate('The', max_new_tokens=2, early_stopping=True, do_sample=True)


def test_empty_prompt_begins_a_text(hf_learner, awd):
    for learn in (hf_learner, awd):
        o, = learn.generate('', max_new_tokens=5)
        assert o.prompt == '' and o.text == o.completion and not o.text.startswith(' xxbos')
        assert o.context == [text_model(learn).codec.bos_id]


# --- the walk-through's program ---

def test_walkthrough_gpt2(gpt, capsys):
    "Three candidates for one prompt, then one text for each of three scenarios, under the old name"
    model, tokenizer = gpt
    outputs = generate(model, 'Artificial intelligence is transforming', tokenizer, max_length=60, num_return_sequences=3, temperature=.8, top_k=50, top_p=.95, do_sample=True, no_repeat_ngram_size=2, seed=0)
    for i, o in enumerate(outputs): print(f'candidate {i+1}:\n{o}\n' + '-'*80)
    scenarios = ['In the future of technology,', 'The most important lesson I learned is', 'To solve climate change, we need to']
    for s in scenarios:
        generated = generate_with_prompt(s, model, tokenizer)
        assert generated.startswith(s) and len(tokenizer(generated)['input_ids']) <= 100+5
        print(f'prompt: {s}\ngenerated: {generated}\n')
    said = capsys.readouterr().out
    assert said.count('candidate ') == 3 and said.count('generated: ') == 3 and len(set(outputs.texts)) == 3
    for o in outputs:
        grams = list(zip([*o.context, *o.ids], [*o.context, *o.ids][1:]))
        assert len(grams) == len(set(grams))
