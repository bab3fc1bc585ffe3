"Attributions: right values against captum and hand-written integrals, faithful words, an untouched model, every task"

import copy
import re
import threading
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from small_learners import MAKERS, TEXTS, bert, with_one_output
from transformers import BartConfig, BertConfig, GPT2Config, LlamaConfig, XLNetConfig

from fastai_tl.all import *
from fastai_tl.interpretation.attribution_methods import Score, deletion_curve
from fastai_tl.interpretation.embedding_path import PathModel, embedding_modules
from fastai_tl.interpretation.reading import find_words, read_texts, tokens_by_word
from fastai_tl.locks import exclusive

TEXT = 'The film was very good, but the ending was dull!'
NEUTRAL = 'the film was very fine plot actor scene slow ending music long short story'.split()


@pytest.fixture(scope='module')
def learners(small_tokenizers):
    "Learners by name, made once"
    made = {}

    def _learner(name):
        if name not in made:
            seed_everything(1)
            made[name] = MAKERS[name](small_tokenizers)
        return made[name]

    return _learner


def cue_data(n, cues, words=NEUTRAL, sep=' ', seed=0):
    "Return texts, labels and cue words; each cue is needed, because texts of the class `none` have no cue"
    rng = np.random.default_rng(seed)
    labels = [*sorted(cues), 'none']
    rows = []
    for i in range(n):
        label = labels[i % len(labels)]
        text = list(rng.choice(words, rng.integers(5, 12)))
        text.insert(rng.integers(len(text) + 1), cues.get(label, words[0]))
        rows.append((sep.join(text), label, cues.get(label)))
    return map(list, zip(*rows))


def share_first(found, cues):
    "Return the share of the texts with a cue whose cue has the largest absolute value"
    return np.mean([cue in o.top(1).word.item() for o, cue in zip(found, cues) if cue is not None])


def fitted(learn, epochs=20, lr=2e-3):
    with learn.no_bar(), learn.no_logging():
        learn.fit(epochs, lr)
    return learn


def small_bert(tok, **kwargs):
    return BertConfig(
        vocab_size=len(tok), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=128, pad_token_id=tok.pad_token_id, **kwargs
    )


@pytest.fixture(scope='module')
def cued():
    "A classifier in which one word decides, with its texts and their cue words"
    seed_everything(1)
    texts, labels, cues = cue_data(210, dict(bad='awful', good='superb'))
    tok = train_tokenizer(texts, 400)
    dls = HFTextDataLoaders.from_lists(texts, labels, tok, bs=10, verbose=False)
    return fitted(hf_classifier_learner(dls, small_bert(tok), metrics=[])), texts, labels, cues


# words and tokens


@pytest.mark.parametrize('text', ["It's 3.5 stars — naïve!", '服務很好，OK 啦', 'a\n\nb\tc', '👍🏽 fine'])
def test_every_character_of_a_word_is_in_one_word(text):
    spans = find_words(text)
    covered = [i for start, end in spans for i in range(start, end)]
    assert covered == [i for i, char in enumerate(text) if not char.isspace()]


def test_each_token_belongs_to_one_word(learners):
    read = read_texts(learners('classifier'), [TEXT])[0]
    assert sorted(i for tokens in read.tokens for i in tokens) == read.own_tokens
    assert len(set(read.own_tokens)) == len(read.own_tokens)
    assert ''.join(lead + word for lead, word in zip(read.leads, read.words)) == TEXT
    assert tokens_by_word('天氣很好', [(0, 2), (2, 3), (3, 4)]) == [[0, 2, [0]], [2, 3, [1]], [3, 4, [2]]]


@pytest.mark.parametrize('name', ['classifier', 'tagger', 'ulmfit_classifier'])
def test_ids_are_those_of_a_batch(learners, name):
    learn = learners(name)
    read = read_texts(learn, [TEXT.split()] if name == 'tagger' else [TEXT])[0]
    x, *_ = learn.dls.test_dl([TEXT.split()] if name == 'tagger' else [TEXT]).one_batch()
    ids = x[0].tolist() if x.ndim == 2 else x[0, 0].tolist()
    pad = 1 if x.ndim == 2 else -1
    assert read.ids == [i for i in ids if i != pad]


# right values


TASKS = ['classifier', 'multilabel', 'regression', 'tagger', 'answerer', 'causal_lm', 'chunked_causal_lm', 'ulmfit_lm',
         'ulmfit_classifier']


def item_of(name):
    return ('when was it', 'The film was dull at noon') if name == 'answerer' else TEXT


@pytest.mark.parametrize('name', TASKS)
def test_values_add_up_to_the_change_of_the_score(learners, name):
    found = learners(name).attribute(item_of(name))
    change = found.score - found.base_score
    assert found.values.sum() == pytest.approx(change, rel=1e-3, abs=1e-5)
    assert found.error == pytest.approx(abs(found.values.sum() / change - 1), abs=1e-9)


@pytest.mark.parametrize('name', ['classifier', 'multilabel', 'regression', 'ulmfit_classifier'])
def test_score_is_the_logit_of_the_model(learners, name):
    learn = learners(name)
    found = learn.attribute(TEXT)
    with learn.no_bar():
        logits = learn.get_preds(dl=learn.dls.test_dl([TEXT]), act=lambda o: o)[0][0]
    k = 0 if name == 'regression' else list(learn.dls.spec.classes).index(found.target)
    assert found.score == pytest.approx(logits[k].item(), rel=1e-4, abs=1e-6)


def manual_gradients(forward, embedded, base, n=1000):
    "Return the path integral with the midpoint rule, in float64 sums, one point after another"
    total = torch.zeros_like(embedded, dtype=torch.float64)
    for alpha in (np.arange(n) + 0.5) / n:
        point = (base + alpha * (embedded - base)).detach().requires_grad_()
        total += torch.autograd.grad(forward(point), point)[0].double() / n
    return (total * (embedded - base).double()).sum(-1)[0].numpy()


def backwards_classifier():
    from small_learners import LABELS, N_ROWS, TEXTS

    tokenized = tokenize_texts_once(TEXTS)
    rows = list(range(N_ROWS))
    dls = classifier_dls(tokenized, LABELS, 'classification', rows[:20], rows[20:], texts_vocab(tokenized), bs=4,
                         backwards=True)
    return awd_classifier_learner(dls, 'classification', 3, dict(emb_sz=16, n_hid=16, n_layers=1), metrics=[])


@pytest.mark.parametrize('backwards', [False, True])
def test_lstm_equals_a_hand_written_path_integral(learners, backwards):
    seed_everything(1)
    learn = backwards_classifier() if backwards else learners('ulmfit_classifier')
    text = 'the film was very unknownish but dull'
    found = learn.attribute(text, 'b', baseline='unk', bound=1e-5)
    encoder = learn.model[0].module
    vocab = learn.dls.vocab[0]
    tokens = ['xxbos', *text.split()]
    ids = [vocab.index(token) if token in vocab else 0 for token in tokens]
    own = torch.ones(1, len(ids), 1)
    own[0, 0] = 0
    if backwards:
        ids, own = ids[::-1], own.flip(1)
    embedded = encoder.encoder.weight.detach()[ids][None]
    base = torch.where(own > 0, encoder.encoder.weight.detach()[0], embedded)

    def logit(x):
        encoder.reset()
        states = encoder(x, from_embeds=True)
        mask = torch.zeros(1, len(ids), dtype=torch.bool)
        return learn.model[1]((states, mask))[0][0, 1]

    learn.model.eval()
    values = manual_gradients(logit, embedded, base, 400)
    by_word = values[::-1][1:] if backwards else values[1:]
    assert found.words == text.split()
    assert np.allclose(found.values, by_word, atol=5e-3 * np.abs(by_word).max())
    assert found.values[4] == 0 # an unknown word is the baseline


def words_of(encoded, texts):
    "Return the tokens of each word of texts without punctuation, from the output of a tokenizer"
    words = [[] for text in texts for _ in text.split()]
    for i, (part, (start, end)) in enumerate(zip(encoded.sequence_ids(0), encoded['offset_mapping'])):
        if part is not None and end > start:
            words[sum(len(text.split()) for text in texts[:part]) + texts[part][:end].count(' ')].append(i)
    return words


PLAIN = 'the film was dull at noon'
# arguments of `attribute`; the score, from the outputs of the model of transformers and the output of its tokenizer
BY_HAND = dict(
    classifier=(dict(texts=PLAIN, target='b'), lambda out, enc: out.logits[0, 1]),
    multilabel=(dict(texts=PLAIN, target='c'), lambda out, enc: out.logits[0, 2]),
    regression=(dict(texts=PLAIN), lambda out, enc: out.logits[0, 0]),
    tagger=(dict(texts=[PLAIN.split()], target='B-X', word=3),
            lambda out, enc: out.logits[0, enc.char_to_token(PLAIN.index('dull')), 1]),
    answerer=(dict(texts=('when was it', PLAIN), target='at noon'),
              # not the token of the space before it
              lambda out, enc: out.start_logits[0, words_of(enc, ['when was it', PLAIN])[7][1]]
              + out.end_logits[0, words_of(enc, ['when was it', PLAIN])[8][-1]]),
    causal_lm=(dict(texts=PLAIN, target='film'), lambda out, enc: out.logits[0, -1, enc['input_ids'][1]]),
    pairs=(dict(texts=['a dull plot', PLAIN], target='b'), lambda out, enc: out.logits[0, 1]),
)


def pair_classifier(tok):
    pairs = [['the film', 'was good'], ['a dull', 'story']] * 6
    dls = HFTextDataLoaders.from_lists(pairs, ['a', 'b'] * 6, tok, bs=4, verbose=False)
    return hf_classifier_learner(dls, bert(tok), metrics=[])


@pytest.mark.parametrize('name', BY_HAND)
def test_every_task_equals_a_hand_written_path_integral(learners, small_tokenizers, name):
    seed_everything(2)
    learn = pair_classifier(small_tokenizers['encoder']) if name == 'pairs' else learners(name)
    arguments, score = BY_HAND[name]
    given = PLAIN if name == 'tagger' else arguments['texts']
    texts = [given] if isinstance(given, str) else list(given)
    hf = learn.model.hf.eval()
    encoded = learn.dls.tokenizer(*texts, return_offsets_mapping=True)
    words = words_of(encoded, texts)
    matrix = hf.get_input_embeddings().weight.detach()
    embedded = matrix[encoded['input_ids']][None]
    base = embedded.clone()
    base[0, sum(words, [])] = matrix.mean(0) if name == 'causal_lm' else matrix[learn.dls.tokenizer.mask_token_id]
    types = {k: torch.tensor([v]) for k, v in encoded.items() if k == 'token_type_ids'}
    values = manual_gradients(lambda x: score(hf(inputs_embeds=x, **types), encoded), embedded, base, 200)
    by_word = [values[tokens].sum() for tokens in words]
    found = learn.attribute(**arguments, bound=1e-5)
    found = found[0] if name == 'tagger' else found
    assert found.words == ' '.join(texts).split()
    assert np.allclose(found.values, by_word, atol=5e-3 * np.abs(by_word).max())


def test_equals_captum(cued):
    captum = pytest.importorskip('captum.attr')
    learn, texts, *_ = cued
    hf = learn.model.hf.eval()
    tok = learn.dls.tokenizer
    method = captum.LayerIntegratedGradients(
        lambda ids: hf(input_ids=ids).logits[:, 1], hf.get_input_embeddings())
    for text in texts[:3]:
        read = read_texts(learn, [text])[0]
        ids = torch.tensor([read.ids])
        base = ids.clone()
        base[0, read.own_tokens] = tok.mask_token_id
        theirs, delta = method.attribute(ids, base, n_steps=50, return_convergence_delta=True)
        tokens = theirs.sum(-1)[0].detach().numpy()
        by_word = np.array([tokens[i].sum() for i in read.tokens])
        ours = learn.attribute(text, 'good', bound=float('inf'))
        assert ours.n_nodes == 50
        assert np.allclose(ours.values, by_word, atol=1e-3 * np.abs(by_word).max())
        assert ours.values.sum() - (ours.score - ours.base_score) == pytest.approx(delta.item(), abs=1e-3)


def test_nodes_are_added_where_the_model_is_steep(cued):
    learn, texts, *_ = cued
    few = learn.attribute(texts[:10], bound=float('inf'))
    more = learn.attribute(texts[:10])
    assert max(o.error for o in few) > 0.01
    assert all(o.error < 1e-3 and o.n_nodes >= 50 for o in more)


def test_occlusion_is_the_score_without_the_word(learners):
    learn = learners('classifier')
    tok = learn.dls.tokenizer
    found = learn.attribute(TEXT, 'a', 'occlusion')
    read = read_texts(learn, [TEXT])[0]
    k = list(learn.dls.vocab).index('a')
    ids = torch.tensor([read.ids, read.ids])
    ids[1, read.tokens[4]] = tok.mask_token_id
    learn.model.eval()
    with torch.no_grad():
        logits = learn.model.hf(input_ids=ids).logits[:, k]
    assert found.values[4] == pytest.approx((logits[0] - logits[1]).item(), abs=1e-6)


def test_gradient_x_input(learners):
    learn = learners('classifier')
    found = learn.attribute(TEXT, 'a', 'gradient_x_input')
    read = read_texts(learn, [TEXT])[0]
    hf = learn.model.hf.eval()
    x = hf.get_input_embeddings()(torch.tensor([read.ids])).detach().requires_grad_()
    grad = torch.autograd.grad(hf(inputs_embeds=x).logits[0, 0], x)[0]
    tokens = (grad * x).sum(-1)[0].detach().numpy()
    assert np.allclose(found.values, [tokens[i].sum() for i in read.tokens], atol=1e-6)


def test_several_texts_equal_single_ones(learners):
    learn = learners('classifier')
    texts = [TEXT, 'dull', 'a good film', 'a dull plot', TEXT.lower()]
    for many, text in zip(learn.attribute(texts, 'b'), texts):
        assert np.allclose(many.values, learn.attribute(text, 'b').values, atol=1e-6)
    small = learn.attribute(texts, 'b', bs=3)
    assert all(np.allclose(a.values, b.values, atol=1e-6) for a, b in zip(small, learn.attribute(texts, 'b')))


def test_versus_is_the_difference_of_two_logits(learners):
    learn = learners('classifier')
    both = [learn.attribute(TEXT, target, bound=1e-5) for target in 'ab']
    found = learn.attribute(TEXT, 'a', versus='b', bound=1e-5)
    assert np.allclose(found.values, both[0].values - both[1].values, atol=1e-5)
    assert found.target == 'a rather than b'


# what a model has learned


@pytest.mark.parametrize('method', ['integrated_gradients', 'occlusion'])
def test_planted_cue_is_first(cued, method):
    learn, texts, _, cues = cued
    found = learn.attribute(texts[:60], method=method)
    assert share_first(found, cues) >= 0.98
    assert found.words('good').word[0] == 'superb'


def test_planted_cue_is_first_in_chinese():
    seed_everything(2)
    texts, labels, cues = cue_data(210, dict(差='爛', 好='讚'), list('這家店的菜和服務我們昨天來過了'), '', 1)
    tok = train_tokenizer(texts, 300) # no token covers two characters
    dls = HFTextDataLoaders.from_lists(texts, labels, tok, bs=10, verbose=False, lang='zh-tw')
    learn = fitted(hf_classifier_learner(dls, small_bert(tok), metrics=[]))
    found = learn.attribute(texts[:50])
    assert share_first(found, cues) >= 0.98


def test_planted_cue_of_a_tagger_is_first():
    "The tag of the first word depends on the last one"
    rng = np.random.default_rng(0)
    seed_everything(3)
    rows = [[*rng.choice(NEUTRAL, 4), cue] for cue in ['north', 'south'] * 80]
    tags = [['B-N' if words[-1] == 'north' else 'B-S', 'O', 'O', 'O', 'O'] for words in rows]
    tok = train_tokenizer([' '.join(words) for words in rows], 400)
    dls = HFTagDataLoaders.from_lists(rows, tags, tok, bs=10, verbose=False)
    learn = fitted(hf_tagger_learner(dls, small_bert(tok), metrics=[]))
    found = learn.attribute(rows[:50], word=0)
    assert [o.predicted for o in found] == [f'{tag[0]} of {words[0]}' for tag, words in zip(tags, rows[:50])]
    first = [o.to_frame().iloc[1:].value.abs().idxmax() for o in found]
    assert np.mean([i == 4 for i in first]) >= 0.98


def test_random_weights_change_the_attributions(cued):
    from scipy.stats import spearmanr

    learn, texts, *_ = cued
    trained = [o.values for o in learn.attribute(texts[:40], 'good')]
    correlations = []
    for seed in range(3):
        seed_everything(seed)
        other = copy.copy(learn)
        other.model = HFModel(type(learn.model.hf)(learn.model.hf.config))
        random = [o.values for o in other.attribute(texts[:40], 'good')]
        correlations += [spearmanr(*pair)[0] for pair in zip(trained, random)]
    assert abs(np.mean(correlations)) < 0.2


def test_score_falls_faster_than_in_random_order(cued):
    learn, texts, labels, _ = cued
    pm = PathModel(learn)
    rng = np.random.default_rng(0)
    better = []
    for text, label in zip(texts[:20], labels):
        if label == 'none':
            continue
        o = learn.attribute(text, label)
        read = read_texts(learn, [text])[0]
        score = Score(label, [((list(learn.dls.vocab).index(label),), 1.0)])
        ours = deletion_curve(pm, read, score, np.argsort(-o.values)).mean()
        others = [deletion_curve(pm, read, score, rng.permutation(len(o))).mean() for _ in range(5)]
        better.append(ours <= np.mean(others))
    assert np.mean(better) >= 0.95


# the model is left as it was


def state_of(learn):
    modes = [m.training for m in learn.model.modules()]
    flags = [p.requires_grad for p in learn.model.parameters()]
    grads = [p.grad for p in learn.model.parameters()]
    hooks = sum(len(m._forward_hooks) for m in learn.model.modules())
    return modes, flags, grads, hooks, torch.get_rng_state().tolist()


@pytest.mark.parametrize('name', ['classifier', 'ulmfit_classifier', 'ulmfit_lm'])
def test_state_is_kept(learners, name):
    learn = learners(name)
    learn.model.train()
    first = next(learn.model.parameters())
    first.requires_grad_(False)
    before = state_of(learn)
    hidden = learn.model[0].hidden if name == 'ulmfit_lm' else None
    learn.attribute(TEXT)
    assert state_of(learn) == before
    assert hidden is None or learn.model[0].hidden is hidden
    first.requires_grad_(True)


def test_state_is_kept_after_an_error(learners, monkeypatch):
    learn = learners('classifier')
    learn.model.train()
    before = state_of(learn)
    monkeypatch.setattr(learn.model.hf.classifier, 'forward', lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        learn.attribute(TEXT)
    assert state_of(learn) == before


def test_training_goes_on_as_without_attributions(small_tokenizers):
    losses = []
    for explain in (False, True):
        seed_everything(5)
        learn = MAKERS['ulmfit_classifier'](small_tokenizers)
        with learn.no_bar(), learn.no_logging():
            learn.fit(1, 1e-2)
            if explain:
                learn.attribute(TEXT)
            seed_everything(6)
            learn.fit(1, 1e-2)
        losses.append(learn.recorder.final_record[0])
    assert losses[0] == losses[1]


def test_without_gradients_frozen_and_in_autocast(learners):
    learn = learners('classifier')
    plain = learn.attribute(TEXT, 'a').values
    learn.freeze()
    with torch.no_grad(), torch.autocast('cpu', dtype=torch.bfloat16):
        assert np.allclose(learn.attribute(TEXT, 'a').values, plain, atol=1e-7)
    with torch.inference_mode():
        assert np.allclose(learn.attribute(TEXT, 'a').values, plain, atol=1e-7)
    learn.unfreeze()


def test_half_precision_is_computed_in_float32(learners):
    learn = copy.copy(learners('classifier'))
    learn.model = copy.deepcopy(learn.model).bfloat16()
    found = learn.attribute(TEXT, 'a')
    assert found.error < 1e-3
    assert next(learn.model.parameters()).dtype == torch.bfloat16


# models


def with_model(learn, config, tok):
    return hf_classifier_learner(learn.dls, config, metrics=[])


CONFIGS = dict(
    gpt2=lambda n: GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=n, n_positions=128),
    llama=lambda n: LlamaConfig(vocab_size=n, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                intermediate_size=32, max_position_embeddings=128),
    bart=lambda n: BartConfig(vocab_size=n, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                              decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, pad_token_id=1,
                              eos_token_id=0, bos_token_id=0, decoder_start_token_id=0, max_position_embeddings=128),
    xlnet=lambda n: XLNetConfig(vocab_size=n, d_model=16, n_layer=1, n_head=2, d_inner=32),
)


@pytest.mark.parametrize('kind', CONFIGS)
def test_other_architectures(small_tokenizers, kind):
    tok = small_tokenizers[dict(xlnet='encoder', bart='seq2seq').get(kind, 'decoder')]
    tok = copy.deepcopy(tok)
    if tok.pad_token is None:
        tok.pad_token = tok.eos_token
    dls = HFTextDataLoaders.from_lists(['a fine film', 'a dull plot'] * 6, ['a', 'b'] * 6, tok, bs=4, verbose=False)
    config = CONFIGS[kind](len(tok))
    config.pad_token_id = tok.pad_token_id
    if kind == 'bart':
        config.eos_token_id = tok.eos_token_id
    learn = hf_classifier_learner(dls, config, metrics=[])
    found = learn.attribute('the film was good', baseline='mean')
    assert found.error < 1e-3
    assert found.words == ['the', 'film', 'was', 'good']


def test_lora_on_the_embedding(small_tokenizers):
    peft = pytest.importorskip('peft')
    lora = peft.LoraConfig(r=2, target_modules=['query', 'word_embeddings'], init_lora_weights=False)
    learn = MAKERS['classifier'](small_tokenizers, peft_config=lora)
    found = learn.attribute(TEXT, 'a', bound=1e-4)
    merged = copy.copy(learn)
    merged.model = copy.deepcopy(learn.model)
    merged.model.hf = merged.model.hf.merge_and_unload()
    merged.model.inner = (merged.model.hf,)
    assert len(embedding_modules(learn.model)) == 1
    assert np.allclose(found.values, merged.attribute(TEXT, 'a', bound=1e-4).values, atol=1e-4)


@pytest.mark.parametrize('implementation', ['eager', 'sdpa'])
def test_attention_implementations_agree(learners, implementation):
    learn = learners('classifier')
    before = learn.model.hf.config._attn_implementation
    plain = learn.attribute(TEXT, 'a').values
    learn.model.hf.set_attn_implementation(implementation)
    assert np.allclose(learn.attribute(TEXT, 'a').values, plain, atol=1e-5)
    learn.model.hf.set_attn_implementation(before)


def test_pairs(small_tokenizers):
    learn = pair_classifier(small_tokenizers['encoder'])
    pairs = [['the film', 'was good'], ['a dull', 'story']]
    one = learn.attribute(['the film', 'was good'])
    assert one.words == ['the', 'film', 'was', 'good']
    assert len(learn.attribute(pairs)) == 2


def test_both_directions(small_tokenizers):
    from small_learners import LABELS, N_ROWS, TEXTS

    tokenized = tokenize_texts_once(TEXTS)
    rows = list(range(N_ROWS))
    pair = []
    for backwards in (False, True):
        dls = classifier_dls(tokenized, LABELS, 'classification', rows[:20], rows[20:], texts_vocab(tokenized), bs=4,
                             backwards=backwards)
        sizes = dict(emb_sz=16, n_hid=16, n_layers=1)
        pair.append(awd_classifier_learner(dls, 'classification', 3, sizes, metrics=[]))
    found = BidirectionalLearner(*pair).attribute(TEXT, 'a')
    each = [learn.attribute(TEXT, 'a') for learn in pair]
    assert each[0].words == each[1].words
    assert np.allclose(found.values, (each[0].values + each[1].values) / 2)
    assert found.values.sum() == pytest.approx(found.score - found.base_score, rel=2e-3, abs=1e-5)


# long texts in windows

LONG = ('the film was very good but the ending was extraordinarily dull and the plot a short story of a long fine '
        'scene at noon')


def windowed(tok, labels, stride=4, **kwargs):
    dls = HFTextDataLoaders.from_lists([LONG, 'a dull story'] * 6, labels * 6, tok, bs=4, verbose=False,
                                       windows=stride, max_length=16, **kwargs)
    return hf_classifier_learner(dls, bert(tok), metrics=[])


WINDOWED = dict(
    classification=(['a', 'b'], lambda logits: logits.softmax(-1).mean(0)[1].log()),
    multilabel=([['a'], ['a', 'b']], lambda logits: torch.logit(logits.sigmoid().mean(0)[1])),
    regression=([1.5, 2.5], lambda logits: logits.mean(0)[0]),
)


@pytest.mark.parametrize('task', WINDOWED)
def test_windows_equal_a_hand_written_path_integral(small_tokenizers, task):
    seed_everything(3)
    tok = small_tokenizers['encoder']
    labels, pool = WINDOWED[task]
    learn = windowed(tok, labels, task=task)
    found = learn.attribute(LONG, None if task == 'regression' else 'b', bound=1e-5)
    with learn.no_bar():
        logits = learn.get_preds(dl=learn.dls.test_dl([LONG]), act=lambda o: o)[0][0]
    assert found.score == pytest.approx(logits[0 if task == 'regression' else 1].item(), abs=1e-5)
    rows, _ = text_windows([LONG], tok, 16, 4)
    spans = [m.span() for m in re.finditer(r'\S+', LONG)]
    begins = [LONG.index(rows[0])]
    for row in rows[1:]:
        begins.append(LONG.index(row, begins[-1] + 1))
    hf = learn.model.hf.eval()
    matrix = hf.get_input_embeddings().weight.detach()
    windows = []
    for row, begin in zip(rows, begins):
        enc = tok(row, return_offsets_mapping=True)
        of_word = [next((k for k, (_, e) in enumerate(spans) if part is not None and begin + end <= e), None)
                   for part, (_, end) in zip(enc.sequence_ids(0), enc['offset_mapping'])]
        embedded = matrix[enc['input_ids']]
        own = torch.tensor([k is not None for k in of_word])[:, None]
        windows.append((embedded, torch.where(own, matrix[tok.mask_token_id], embedded), of_word))
    values = np.zeros(len(spans))
    for alpha in (np.arange(100) + 0.5) / 100:
        points = [(base + alpha * (embedded - base)).requires_grad_() for embedded, base, _ in windows]
        score = pool(torch.cat([hf(inputs_embeds=point[None]).logits for point in points]))
        for grad, (embedded, base, of_word) in zip(torch.autograd.grad(score, points), windows):
            for value, k in zip((grad * (embedded - base)).sum(-1).tolist(), of_word):
                if k is not None:
                    values[k] += value / 100
    assert len(rows) > 2 and len({len(embedded) for embedded, *_ in windows}) > 1
    assert found.words == LONG.split()
    assert np.allclose(found.values, values, atol=5e-3 * np.abs(values).max())
    assert found.values.sum() == pytest.approx(found.score - found.base_score, rel=1e-3, abs=1e-6)


def test_windows_have_the_ids_of_a_batch(small_tokenizers):
    learn = windowed(small_tokenizers['encoder'], ['a', 'b'], lang='zh-tw')
    for text in (LONG, 'Ｆｉｌｍ\u200b  很好看，ｆｉｎｅ ' * 4, 'a dull story'):
        read = read_texts(learn, [text], in_windows=True)[0]
        x = learn.dls.test_dl([text]).one_batch()[0][0]
        assert read.ids == x[0].tolist()
        assert read.windows == x[4].bincount().tolist()
        assert sorted(i for tokens in read.tokens for i in tokens) == read.own_tokens
        parts = [text[start:end] for start, end in find_words(text.replace('\u200b', ' '))]
        assert read.words == parts


def test_windows_with_other_methods(small_tokenizers):
    tok = small_tokenizers['encoder']
    learn = windowed(tok, ['a', 'b'])
    read = read_texts(learn, [LONG], in_windows=True)[0]
    k = read.words.index('plot')
    assert len({sum(np.cumsum(read.windows) <= i) for i in read.tokens[k]}) == 2 # in two windows
    pm = PathModel(learn)
    ids = torch.tensor(read.ids)
    ids[read.tokens[k]] = tok.mask_token_id
    logits = [learn.model.eval().hf(input_ids=part[None]).logits[0] for part in ids.split(read.windows)]
    without = torch.stack(logits).softmax(-1).mean(0)[1].log().item()
    found = learn.attribute([LONG, 'a dull story', LONG], 'b', 'occlusion')
    assert found[0].values[k] == pytest.approx(found[0].score - without, abs=1e-5)
    curve = deletion_curve(pm, read, Score('b', [((1,), 1.)]), [k])
    assert curve[1] == pytest.approx(without, abs=1e-5)
    each = [learn.attribute(text, 'b', 'occlusion') for text in (LONG, 'a dull story')]
    assert np.allclose(found[0].values, found[2].values) and np.allclose(found[1].values, each[1].values, atol=1e-6)


# errors


@pytest.mark.parametrize('options, words', [
    (dict(target='d'), 'target'), (dict(method='lime'), 'method'), (dict(baseline='nothing'), 'baseline'),
    (dict(target='a', versus='a'), 'another class'), (dict(target=['a', 'b']), 'One `target`'),
    (dict(method='gradient_x_input', baseline='mask'), 'zero')])
def test_wrong_options(learners, options, words):
    with pytest.raises(FastaiTLError, match=words):
        learners('classifier').attribute([TEXT], **options)


def test_options_for_other_tasks(learners):
    with pytest.raises(FastaiTLError, match='versus'):
        learners('tagger').attribute([PLAIN.split()], versus='O')
    with pytest.raises(FastaiTLError, match='word'):
        learners('classifier').attribute(PLAIN, word=1)


def test_words_of_a_tagger_are_those_of_the_sentence():
    "Words without a token, as of an invisible character, keep their index; an ambiguous word is an error"
    tok = load_tokenizer(minilm_folder())
    dls = HFTagDataLoaders.from_lists([['the', 'film'], ['a', 'plot']] * 6, [['O', 'B-X'], ['O', 'O']] * 6, tok, bs=4)
    learn = hf_tagger_learner(dls, bert(tok), metrics=[])
    sentence = ['\u200b', 'the', '☃', 'film', 'the']
    assert learn.attribute([sentence], 'B-X', word=3)[0].target == 'B-X of film'
    assert learn.attribute([sentence], 'B-X', word=-2)[0].target == 'B-X of film'
    assert learn.attribute([sentence], 'B-X', word='☃')[0].words == ['the', '☃', 'film', 'the']
    with pytest.raises(FastaiTLError, match='no token'):
        learn.attribute([sentence], word=0)
    with pytest.raises(FastaiTLError, match='1, 4'):
        learn.attribute([sentence], word='the')


def test_next_token_of_a_word_with_several(learners):
    learn = learners('causal_lm')
    with pytest.warns(UserWarning, match='tokens in this model'):
        learn.attribute(PLAIN, 'extraordinary')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert learn.attribute(PLAIN, 'film').target == 'film'


def test_too_long_for_the_model(learners):
    with pytest.raises(FastaiTLError, match='64 tokens at most'):
        learners('causal_lm').attribute([PLAIN, PLAIN * 20])


def test_predicted_labels(learners):
    learn = learners('multilabel')
    with learn.no_bar():
        probs = learn.get_preds(dl=learn.dls.test_dl([TEXT]))[0][0]
    names = [name for name, p in zip('abc', probs) if p > learn.dls.spec.threshold]
    assert learn.attribute(TEXT).predicted == (', '.join(names) or 'no label')


def test_tasks_without_attributions(learners):
    for name in ('masked_lm', 't5'):
        with pytest.raises(FastaiTLError, match='classification'):
            learners(name).attribute(TEXT)


# results


def test_html_is_escaped_and_without_scripts(cued):
    learn = cued[0]
    html = learn.attribute('<script>alert("x")</script> & <b>awful</b>')._repr_html_()
    assert '<script' not in html and '<b>awful' not in html and '&lt;' in html
    assert 'http' not in html and 'style=' in html


def test_set_of_texts(cued):
    learn, texts, labels, _ = cued
    found = learn.attribute(pd.DataFrame(dict(text=texts[:12])), labels[:12])
    table = found.to_frame()
    assert list(table.target) == labels[:12] and (table.error < 1e-3).all()
    words = found.words(min_texts=1)
    total = sum(o.values.sum() for o in found)
    assert found.words(n=None, min_texts=1).total.sum() == pytest.approx(total, rel=1e-6)
    assert set(words['class']) == {'bad', 'good', 'none'}


def test_report_explains_the_worst_errors(cued, tmp_path):
    learn, texts, *_ = cued
    with learn.no_bar():
        ev = learn.evaluate(texts[:12], ['bad', 'good', 'none'] * 3 + ['good', 'none', 'bad'])
    n_wrong = int((ev.preds != ev.targets).sum())
    page = ev.save(tmp_path / 'report', figures=[], attributions=learn.attribute).read_text(encoding='utf-8')
    assert page.count('completeness error') == n_wrong >= 3
    assert '<script' not in page
    plain = ev.save(tmp_path / 'plain', figures=[]).read_text(encoding='utf-8')
    assert 'completeness error' not in plain


def test_callback_explains_the_worst_errors(small_tokenizers, tmp_path):
    learn = MAKERS['classifier'](small_tokenizers)
    cb = EvaluationCallback(tmp_path / 'report', figures=[], attributions=learn.attribute)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3, cbs=cb)
    page = (tmp_path / 'report' / 'index.html').read_text(encoding='utf-8')
    n_wrong = int((cb.last.preds != cb.last.targets).sum())
    assert page.count('completeness error') == n_wrong


def test_waits_for_other_threads(learners):
    learn = learners('classifier')
    done = threading.Event()

    def work():
        learn.attribute(TEXT)
        done.set()

    other = threading.Thread(target=work)
    with exclusive(learn):
        other.start()
        assert not done.wait(1)
    other.join(60)
    assert done.is_set()


def test_an_answer_at_its_best_place(small_tokenizers):
    "An answer that the passage has several times is explained where its score is highest"
    learn = MAKERS['answerer'](small_tokenizers)
    context = 'film was very film at film noon'
    inputs = learn.dls.tokenizer('when', context, return_tensors='pt', return_offsets_mapping=True)
    spans = inputs.pop('offset_mapping')[0].tolist()
    with torch.no_grad():
        out = learn.model.hf.eval()(**inputs)
    places = [i for i, k in enumerate(inputs.sequence_ids()) if k == 1 and context[slice(*spans[i])].strip() == 'film']
    assert len(places) == 3
    want = max(float(out.start_logits[0, i] + out.end_logits[0, i]) for i in places)
    assert learn.attribute([['when', context]], 'film')[0].score == pytest.approx(want, abs=1e-5)
    predicted = learn.predict(('when', context))
    assert learn.attribute([['when', context]])[0].score == pytest.approx(predicted.score, abs=1e-5)


def test_one_output_against_the_other_class(small_tokenizers):
    learn = with_one_output(MAKERS['classifier'](small_tokenizers, [*'ab'] * 11))
    alone = learn.attribute(TEXTS[0], 'a')
    both = learn.attribute(TEXTS[0], 'a', versus='b')
    assert (both.target, both.score) == ('a rather than b', alone.score)
    np.testing.assert_array_equal(both.values, alone.values)
    with pytest.raises(FastaiTLError, match='another class than the target'):
        learn.attribute(TEXTS[0], 'a', versus='a')


@pytest.mark.parametrize('wrong', [dict(n_nodes=0), dict(n_nodes=2.5), dict(bs=0), dict(bound=0), dict(bound=np.nan)])
def test_wrong_numbers_are_refused(small_tokenizers, wrong):
    learn = MAKERS['classifier'](small_tokenizers)
    with pytest.raises(FastaiTLError, match=f'`{next(iter(wrong))}` must be'):
        learn.attribute(TEXTS[0], **wrong)


@pytest.mark.parametrize('wrong', [3, True])
def test_what_explains_a_report_is_checked_before_the_fit(wrong):
    with pytest.raises(FastaiTLError, match='`attributions` must be a function'):
        EvaluationCallback(attributions=wrong)
