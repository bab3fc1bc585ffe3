"""Generation: one call for Hugging Face models and AWD_LSTM, with the results of the slow and plain ways."""

import copy
import inspect
import re

import pytest
import torch
from fastai.callback.schedule import *
from fastai.text.all import AWD_LSTM, CrossEntropyLossFlat, L, Learner, awd_lstm_lm_config, language_model_learner
from torch import nn

from fastai_tl.all import *


class Wrapper(nn.Module):
    "A Hugging Face model inside another module"
    def __init__(self, hf):
        super().__init__()
        self.hf = hf

    def forward(self, x):
        return self.hf(input_ids=x).logits


def make_bpe(texts, vocab):
    "A byte-level tokenizer like GPT-2's, trained on `texts`"
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=['<|endoftext|>'], initial_alphabet=alphabet, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token='<|endoftext|>', eos_token='<|endoftext|>')


def train_gpt2(texts, vocab=400, steps=200, seed=0, n_positions=128):
    "A small GPT-2 and its tokenizer, trained for seconds"
    from transformers import GPT2Config, GPT2LMHeadModel
    tok = make_bpe(texts, vocab)
    seed_everything(seed)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tok), n_positions=n_positions, n_embd=48, n_layer=2, n_head=4,
                                       bos_token_id=0, eos_token_id=0)).train()
    stream = torch.tensor([i for ids in tok(texts)['input_ids'] for i in [0, *ids]])
    opt = torch.optim.AdamW(model.parameters(), 4e-3)
    for _ in range(steps):
        x = torch.stack([stream[i:i+64] for i in torch.randint(0, len(stream)-64, (10,))])
        model(input_ids=x, labels=x).loss.backward()
        opt.step()
        opt.zero_grad()
    return model, tok


@pytest.fixture(scope='module')
def texts():
    df = docstring_corpus()
    return list(df[(df.split == 'train') & (df.label == 'parameter')].text[:600])


@pytest.fixture(scope='module')
def gpt(texts):
    model, tok = train_gpt2(texts)
    return model.double(), tok


@pytest.fixture(scope='module')
def awd(texts):
    words = tokenize_texts_once(texts, progress=False)
    dls = language_model_dls(words, texts_vocab(words, min_freq=2), bs=16, seq_len=40)
    seed_everything(0)
    config = {**awd_lstm_lm_config, 'emb_sz': 48, 'n_hid': 64, 'n_layers': 3}
    learn = language_model_learner(dls, AWD_LSTM, pretrained=False, drop_mult=.1, config=config)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(2, 2e-2)
    learn.model.double()
    return learn


@pytest.fixture(scope='module')
def hf_learner(gpt, awd):
    learn = Learner(awd.dls, Wrapper(gpt[0]), loss_func=CrossEntropyLossFlat())
    learn.tokenizer = gpt[1]
    return learn


PROMPTS = ['The number of', 'If', 'Whether to return the array of shape (n_samples, n_features) that', '', 'axis']


# --- Hugging Face: token for token what `model.generate` gives for each prompt alone ---

def by_hand(gpt, prompt, **options):
    model, tok = gpt
    x = torch.tensor([tok(prompt)['input_ids'] or [tok.bos_token_id]])
    out = model.eval().generate(x, attention_mask=torch.ones_like(x), pad_token_id=0, **options)
    rows = out[:, x.shape[1]:].tolist()
    return [row[:row.index(0)] if 0 in row else row for row in rows]


SEARCHES = [
    dict(max_new_tokens=25),
    dict(max_new_tokens=20, num_beams=4, num_return_sequences=3),
    dict(max_new_tokens=20, num_beams=3, early_stopping=True, length_penalty=.5),
    dict(max_new_tokens=25, repetition_penalty=1.4),
    dict(max_new_tokens=25, no_repeat_ngram_size=1),
    dict(max_new_tokens=20, num_beams=2, no_repeat_ngram_size=2),
    dict(max_length=60),
    dict(max_new_tokens=20, min_new_tokens=15),
    dict(max_length=60, min_length=50),
]


@pytest.mark.parametrize('bs', [1, 2, 16])
@pytest.mark.parametrize('options', SEARCHES, ids=str)
def test_equals_generate_alone(gpt, hf_learner, options, bs):
    got = hf_learner.generate(PROMPTS, do_sample=False, bs=bs, **options)
    want = [ids for prompt in PROMPTS for ids in by_hand(gpt, prompt, do_sample=False, **options)]
    assert [o.ids for o in got] == want


def test_pad_token_of_its_own(gpt):
    "A model whose padding is a token like any other, and a penalty that would see it"
    model = copy.deepcopy(gpt[0])
    tok = gpt[1]
    model.generation_config.pad_token_id = 7
    options = dict(max_new_tokens=20, repetition_penalty=1.5, do_sample=False)
    got = generate(model, PROMPTS, tok, **options)
    assert [o.ids for o in got] == [ids for prompt in PROMPTS for ids in by_hand(gpt, prompt, **options)]


def test_a_penalty_never_sees_padding(gpt):
    "Prompts of different length are not padded for it, whatever the configuration of the model says"
    from transformers import GenerationConfig
    penalty = make_generation_config(repetition_penalty=1.5)
    assert needs_equal_lengths(penalty, GenerationConfig()) and needs_equal_lengths(penalty, gpt[0].generation_config)
    assert not needs_equal_lengths(make_generation_config(repetition_penalty=1.), GenerationConfig())


def test_sampling_repeats_with_a_seed(gpt, hf_learner):
    options = dict(max_new_tokens=20, temperature=.9, top_p=.9, num_return_sequences=2)
    before = torch.get_rng_state()
    first, again, other = (hf_learner.generate(PROMPTS, seed=seed, **options).texts for seed in (1, 1, 2))
    assert first == again != other and len(first) == 2*len(PROMPTS)
    assert torch.equal(before, torch.get_rng_state()), 'the random numbers of the program are not touched'
    torch.manual_seed(1)
    want = by_hand(gpt, 'The', do_sample=True, **options)[0]
    assert hf_learner.generate('The', seed=1, **options)[0].ids == want, "the seed is PyTorch's"


def test_sampling_follows_the_distribution(gpt):
    "First tokens drawn 2,000 times, compared with the probabilities that temperature and top_k leave"
    model, tok = gpt
    out = generate(model, 'The', tok, max_new_tokens=1, num_return_sequences=2000, temperature=.8, top_k=5, seed=0)
    draws = [o.ids[0] if o.ids else 0 for o in out]
    x = torch.tensor([tok('The')['input_ids']])
    with torch.no_grad():
        logits = model.eval()(x).logits[0, -1]/.8
    top, ids = logits.topk(5)
    freq = torch.tensor([draws.count(i)/2000 for i in ids.tolist()])
    assert set(draws) <= set(ids.tolist())
    assert (freq - top.softmax(-1)).abs().max() < 4*.5/2000**.5


def fails(ids, scores):
    raise ZeroDivisionError


def test_modes_and_gradients_are_left_alone(hf_learner, awd):
    for learn in (hf_learner, awd):
        learn.model.train()
        embedding = next(m for m in learn.model.modules() if isinstance(m, nn.Embedding))
        embedding.eval()
        modes = [m.training for m in learn.model.modules()]
        hidden = copy.deepcopy(getattr(learn.model[0], 'hidden', None)) if learn is awd else None
        learn.generate('The', max_new_tokens=3)
        with pytest.raises(ZeroDivisionError):
            learn.generate('The', max_new_tokens=3, logits_processor=[fails])
        assert [m.training for m in learn.model.modules()] == modes
        assert all(p.grad is None or not p.grad.any() for p in learn.model.parameters()) and torch.is_grad_enabled()
        if hidden is not None:
            assert all(torch.equal(a, b) for x, y in zip(hidden, learn.model[0].hidden) for a, b in zip(x, y))


def test_base_config(gpt):
    "A `GenerationConfig` of the user is the starting point, and does not change"
    from transformers import GenerationConfig
    config = GenerationConfig(max_new_tokens=5, num_beams=3, stop_strings=['zzz'])
    got = generate(gpt[0], PROMPTS, gpt[1], generation_config=config, max_new_tokens=7)
    want = [ids for prompt in PROMPTS for ids in by_hand(gpt, prompt, max_new_tokens=7, num_beams=3)]
    assert [o.ids for o in got] == want
    assert config.max_new_tokens == 5 and config.stop_strings == ['zzz'] and config.pad_token_id is None


def test_all_options_are_shown(hf_learner):
    "`help` and Tab show the options that the signature itself does not have"
    options = {'max_length', 'temperature', 'top_k', 'top_p', 'min_p', 'typical_p', 'repetition_penalty', 'prefix',
               'no_repeat_ngram_size', 'num_beams', 'early_stopping', 'bad_words', 'required_words', 'stop_strings',
               'logits_processor', 'stopping_criteria', 'generation_config', 'max_new_tokens', 'seed', 'stream', 'bs'}
    for f in (generate, hf_learner.generate):
        assert options <= set(inspect.signature(f).parameters)


# --- AWD_LSTM ---

def awd_logits(learn, ids):
    "Logits of the next token, from the whole history through fastai's own model"
    model = learn.model.eval()
    model[0].bs = len(ids)
    model.reset()
    with torch.no_grad():
        return model(torch.tensor(ids))[0][:, -1]


def slow_steps(learn, ids, n, processors=()):
    "The whole history through fastai's model at every step; the tokens, and the processed scores of each step"
    from transformers import LogitsProcessorList
    adapter = text_model(learn).adapter
    ids = list(ids)
    steps = []
    for _ in range(n):
        logits = awd_logits(learn, [ids]).float()
        logits[:, adapter.never] = -float('inf')
        scores = LogitsProcessorList(processors)(torch.tensor([ids]), logits)
        steps.append(scores[0])
        ids.append(int(scores.argmax()))
    return ids[-n:], torch.stack(steps)


def test_awd_greedy_equals_the_slow_way(awd):
    "A hundred tokens, for prompts of different length in one batch; texts cannot end before"
    adapter = text_model(awd).adapter
    got = awd.generate(PROMPTS, max_new_tokens=100, min_new_tokens=100)
    def forbid_end(ids, scores): return scores.index_fill(1, torch.tensor(adapter.eos_ids), -float('inf'))
    for prompt, o in zip(PROMPTS, got):
        assert o.ids == slow_steps(awd, adapter.encode(prompt), 100, [forbid_end])[0]


CONTROLS = [
    dict(repetition_penalty=1.3),
    dict(no_repeat_ngram_size=2),
    dict(no_repeat_ngram_size=1),
    dict(temperature=.7, top_k=0),
    dict(top_k=7),
    dict(top_k=0, top_p=.6),
    dict(top_k=0, min_p=.2),
    dict(top_k=0, typical_p=.5),
    dict(top_k=0, repetition_penalty=1.2, temperature=.5, top_p=.8),
]


def processors_of(options):
    "transformers' own processors, in its order"
    from transformers import generation as g
    make = dict(repetition_penalty=g.RepetitionPenaltyLogitsProcessor,
                no_repeat_ngram_size=g.NoRepeatNGramLogitsProcessor, temperature=g.TemperatureLogitsWarper,
                top_k=g.TopKLogitsWarper, top_p=g.TopPLogitsWarper, min_p=g.MinPLogitsWarper,
                typical_p=g.TypicalLogitsWarper)
    return [make[name](options[name]) for name in make if options.get(name)]


@pytest.mark.parametrize('options', CONTROLS, ids=str)
def test_awd_controls_equal_transformers_processors(awd, options):
    "The scores from which each token is chosen, step by step: the same processors on the slow model's logits"
    from transformers import LogitsProcessorList
    sampling = any(name in SAMPLING for name in options)
    tm = text_model(awd)
    never = tm.adapter.never
    model = stateful_model(tm.model, [], tm.adapter.pad_id, never)
    x = torch.tensor([tm.adapter.encode('The number of')])
    torch.manual_seed(0)
    with torch.no_grad():
        out = model.generate(x, max_new_tokens=12, do_sample=sampling, return_dict_in_generate=True, output_scores=True,
                             **options)
    ids = out.sequences[0].tolist()
    processors = processors_of(options)
    warpers = [i for i, p in enumerate(processors) if 'Warper' in type(p).__name__]
    cut = warpers[0] if warpers else len(processors)
    for t, got in enumerate(out.scores):
        history = ids[:x.shape[1]+t]
        scores = LogitsProcessorList(processors[:cut])(torch.tensor([history]), awd_logits(awd, [history]).float())
        scores[:, never] = -float('inf')
        scores = LogitsProcessorList(processors[cut:])(torch.tensor([history]), scores)
        possible = ~torch.isinf(scores[0])
        assert torch.equal(~possible, torch.isinf(got[0])), t
        assert torch.allclose(scores[0][possible], got[0][possible], atol=1e-4)


@pytest.mark.parametrize('n', [1, 2, 3])
def test_no_ngram_twice(awd, hf_learner, n):
    "A prompt may repeat itself, a completion may not"
    for learn in (awd, hf_learner):
        prompts = ['The number of', 'If True']
        for o in learn.generate(prompts, max_new_tokens=60 if n > 1 else 30, no_repeat_ngram_size=n):
            ids = [*o.context, *o.ids]
            grams = [tuple(ids[i:i+n]) for i in range(len(ids)-n+1)]
            assert all(gram not in grams[:i] for i, gram in enumerate(grams) if i+n > len(o.context))


def test_awd_beams_equal_each_prompt_alone(awd):
    options = dict(max_new_tokens=15, num_beams=4, num_return_sequences=2)
    together = awd.generate(PROMPTS, **options)
    assert [o.ids for o in together] == [o.ids for prompt in PROMPTS for o in awd.generate(prompt, **options)]


def test_awd_beam_finds_the_best_of_all(awd):
    "With as many beams as tokens, two steps of beam search are an exhaustive search"
    tm = text_model(awd)
    never = tm.adapter.never
    n = len(tm.adapter.vocab)
    model = stateful_model(tm.model, [], tm.adapter.pad_id, never)
    ids = tm.adapter.encode('The number of')
    with torch.no_grad():
        out = model.generate(torch.tensor([ids]), max_new_tokens=2, num_beams=n, do_sample=False)[0, -2:].tolist()
    first = awd_logits(awd, [ids])[0].log_softmax(-1)
    second = awd_logits(awd, [[*ids, i] for i in range(n)]).log_softmax(-1)
    first[never] = -float('inf')
    second[:, never] = -float('inf')
    best = (first[:, None]+second).argmax().item()
    assert out == [best//n, best % n]


def test_awd_never_writes_what_is_no_word(awd):
    out = awd.generate(PROMPTS, max_new_tokens=60, num_return_sequences=4, temperature=1.5, top_k=0, seed=0)
    assert not {token for o in out for token in o.ids} & set(text_model(awd).adapter.never)
    special = ('xxunk', 'xxpad', 'xxbos', 'xxmaj', 'xxup', 'xxrep', 'xxwrep')
    assert not any(token in o.completion for o in out for token in special)


# --- text ---

def test_rules_are_undone():
    words = 'The CAT sat!!!! It was very very very good. (well-known, isn\'t it?)'
    tok = tokenize_texts_once([words]*4, progress=False)
    dls = language_model_dls(tok, texts_vocab(tok, min_freq=1), bs=2, seq_len=8)
    adapter = FastaiTokenizerAdapter.from_dls(dls)
    assert adapter.decode(adapter.encode(words)) == words


class Characters:
    "A tokenizer of single characters"
    def __call__(self, items):
        return (L([t for t in re.findall(r'xx\w+|\S', o)]) for o in items)


def test_chinese_comes_out_without_spaces():
    "A character-level AWD_LSTM that has learned a poem writes it without spaces"
    poem = '床前明月光,疑是地上霜。舉頭望明月,低頭思故鄉。'
    tok = tokenize_texts_once([poem]*60, tok=Characters(), progress=False)
    dls = language_model_dls(tok, texts_vocab(tok, min_freq=1), tok=Characters(), bs=8, seq_len=26)
    seed_everything(0)
    config = {**awd_lstm_lm_config, 'emb_sz': 32, 'n_hid': 64, 'n_layers': 1}
    learn = language_model_learner(dls, AWD_LSTM, pretrained=False, drop_mult=.01, config=config)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(25, 3e-2)
    out = learn.generate('床前', max_new_tokens=40)[0]
    assert out.text == poem and out.finish == 'end'
    assert ''.join(learn.generate('床前', max_new_tokens=40, stream=True)) == poem[2:]
    stopped = learn.generate('床前', max_new_tokens=40, stop_strings='地上')[0]
    assert stopped.text == poem[:poem.index('上')+1]


def test_partial_characters_are_not_streamed():
    "A tokenizer of bytes: no piece ends within a character"
    poem = '疑是地上霜。舉頭望明月'
    model, tok = train_gpt2([poem]*40, vocab=257, steps=60)
    pieces = list(generate(model, '疑是', tok, max_new_tokens=24, stream=True))
    assert '�' not in ''.join(pieces[:-1])
    assert ''.join(pieces) == generate(model, '疑是', tok, max_new_tokens=24)[0].completion
    assert any(len(piece) == 1 and piece in poem for piece in pieces)


def test_shown_text_is_escaped(gpt):
    out = generate(gpt[0], '<script>alert(1)</script>', gpt[1], max_new_tokens=3)
    assert '<script>' not in out._repr_html_() and out[0].prompt in str(out)


# --- control ---

def test_required_words_whatever_is_drawn(awd, hf_learner):
    prompts = ['The', 'If True,']
    for learn in (awd, hf_learner):
        out = learn.generate(prompts, max_new_tokens=20, required_words=['default', 'shape of'],
                             num_return_sequences=10, temperature=1.2, seed=0)
        assert all(w in o.completion.lower() for o in out for w in ('default', 'shape of')) and len(out) == 20
        beams = learn.generate(prompts, max_new_tokens=12, required_words='default', num_beams=3)
        assert all('default' in o.completion.lower() for o in beams)


def test_bad_words_whatever_is_drawn(awd, hf_learner):
    for learn in (awd, hf_learner):
        options = dict(max_new_tokens=30, num_return_sequences=10, temperature=.7, seed=0)
        free = learn.generate('The', **options)
        assert any(' the' in o.completion for o in free)
        without = learn.generate('The', bad_words=['the'], **options)
        assert not any(re.search(r'\bthe\b', o.completion) for o in without)


def test_prefix_is_read_and_not_shown(hf_learner):
    prefixed, = hf_learner.generate('number', prefix='The ', max_new_tokens=8)
    whole, = hf_learner.generate('The number', max_new_tokens=8)
    assert prefixed.prompt == 'number' and prefixed.completion == whole.completion
    assert prefixed.text == 'number' + whole.completion


BAD_OPTIONS = [
    (dict(prompts=[]), 'At least one prompt'),
    (dict(prompts=[None]), 'Prompts must be strings'),
    (dict(prompts='a', top_pp=1.), "Did you mean 'top_p'"),
    (dict(prompts='a', temperature=-1.), '`temperature` must be a number'),
    (dict(prompts='a', do_sample=False, temperature=.5), 'do_sample=True'),
    (dict(prompts='a', num_beams=2, num_return_sequences=3), 'than beams'),
    (dict(prompts='a', max_length=9, max_new_tokens=9), 'not by both'),
    (dict(prompts='a', top_p=0.), '`top_p` must be'),
    (dict(prompts='a', generation_config={}), 'GenerationConfig'),
]


def test_bad_input(hf_learner, awd):
    for options, message in BAD_OPTIONS:
        for learn in (hf_learner, awd):
            with pytest.raises(FastaiTLError, match=re.escape(message)):
                learn.generate(**options)
    with pytest.raises(FastaiTLError, match='must fit into the 128 positions'):
        hf_learner.generate('the '*200)


def test_options_without_effect(hf_learner, awd):
    for learn in (hf_learner, awd):
        learn.generate('a', stop_strings='', max_new_tokens=2)
    assert hf_learner.generate('The', top_k=0, max_new_tokens=3, seed=0)[0].ids
    with pytest.warns(UserWarning, match='does nothing without beams'):
        hf_learner.generate('The', max_new_tokens=2, early_stopping=True, do_sample=True)


def test_empty_prompt_begins_a_text(hf_learner, awd):
    for learn in (hf_learner, awd):
        o, = learn.generate('', max_new_tokens=5)
        assert o.prompt == '' and o.text == o.completion and not o.text.startswith(' xxbos')
        assert o.context == [text_model(learn).adapter.bos_id]


# --- the program of the reference walk-through ---

def test_walkthrough_gpt2(gpt, capsys):
    "Three candidates for one prompt, then one text for each of three scenarios, under the old name"
    model, tokenizer = gpt
    outputs = generate(model, 'Artificial intelligence is transforming', tokenizer, max_length=60,
                       num_return_sequences=3, temperature=.8, top_k=50, top_p=.95, do_sample=True,
                       no_repeat_ngram_size=2, seed=0)
    for i, output in enumerate(outputs):
        print(f'candidate {i+1}:\n{output}\n' + '-'*80)
    for scenario in ['In the future of technology,', 'The most important lesson I learned is',
                     'To solve climate change, we need to']:
        generated = generate_with_prompt(scenario, model, tokenizer)
        assert generated.startswith(scenario) and len(tokenizer(generated)['input_ids']) <= 100+5
        print(f'prompt: {scenario}\ngenerated: {generated}\n')
    said = capsys.readouterr().out
    assert said.count('candidate ') == 3 and said.count('generated: ') == 3 and len(set(outputs.texts)) == 3
    for output in outputs:
        ids = [*output.context, *output.ids]
        grams = list(zip(ids, ids[1:]))
        assert len(grams) == len(set(grams))


# --- away_from ---


def moved(learn, wanted, other, scale, n):
    "Greedy text whose scores move from one prefix to another, by hand: both texts are read anew in each step"
    tm, new = text_model(learn), []

    def log_probs(prefix):
        ids = [*tm.adapter.encode(prefix), *new]
        scores = awd_logits(learn, [ids])[0] if tm.is_awd_lstm else tm.model(torch.tensor([ids])).logits[0, -1]
        return scores.float().log_softmax(-1)

    for _ in range(n):
        with torch.no_grad():
            a, b = log_probs(wanted), log_probs(other)
        scores = b + scale*(a-b)
        scores[list(tm.adapter.never)] = -torch.inf
        new.append(int(scores.argmax()))
    return new


@pytest.mark.parametrize('scale', [0., 1., 2.5])
def test_scores_move_away_from_another_prefix(awd, hf_learner, scale):
    for learn in (awd, hf_learner):
        learn.model.eval()
        options = dict(prefix='the number', away_from='If True', guidance_scale=scale, max_new_tokens=8)
        out = learn.generate('of', do_sample=False, **options)[0]
        sep = ' ' if learn is awd else ''
        expected = moved(learn, f'the number{sep}of', f'If True{sep}of', scale, 8)
        assert out.ids == expected[:len(out.ids)] and (len(out.ids) == 8 or out.finish == 'end')
        assert ''.join(learn.generate('of', do_sample=False, stream=True, **options)) == out.completion


def test_away_from_in_batches(awd, hf_learner):
    "Several texts for several prompts of different lengths, each as alone"
    prompts = ['of', 'of the', 'is', 'of']
    for learn in (awd, hf_learner):
        options = dict(prefix='the number', away_from='a', max_new_tokens=6)
        together = learn.generate(prompts, bs=3, do_sample=False, **options)
        alone = [learn.generate(prompt, do_sample=False, **options)[0].ids for prompt in prompts]
        assert [o.ids for o in together] == alone
        several = learn.generate(prompts, num_return_sequences=3, temperature=1e-3, seed=0, **options)
        assert [o.ids for o in several] == [ids for ids in alone for _ in range(3)]
        default = learn.generate('of', do_sample=False, **options)[0].ids
        assert default == learn.generate('of', do_sample=False, guidance_scale=2, **options)[0].ids


def test_no_away_from_with_beams_or_an_encoder(awd):
    with pytest.raises(FastaiTLError, match='without beams'):
        awd.generate('of', away_from='a', num_beams=2)
    with pytest.raises(FastaiTLError, match='`away_from`'):
        awd.generate('of', away_from=['a'])
    with pytest.raises(FastaiTLError, match='guidance_scale'):
        awd.generate('of', away_from='a', guidance_scale=-1)


def test_away_from_has_its_own_length(hf_learner):
    "`max_length` counts the prompt, and the other text must fit as well"
    with pytest.raises(FastaiTLError, match='must fit into the 128 positions'):
        hf_learner.generate('the', away_from='the number of '*20, max_length=120)


def test_away_from_the_text_without_a_prefix(awd, hf_learner):
    for learn in (awd, hf_learner):
        options = dict(prefix='If True', guidance_scale=3., max_new_tokens=6)
        sep = ' ' if learn is awd else ''
        out = learn.generate('of', away_from='', do_sample=False, **options)[0]
        assert out.ids == moved(learn, f'If True{sep}of', 'of', 3., 6)[:len(out.ids)]
