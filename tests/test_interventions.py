"""Patching, ablation and counterfactuals: equal to changes made by hand, planted rules are found"""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from small_learners import LABELS, MAKERS, TEXTS, VALID, bert, sentences, with_one_output
from test_attention import ATTENTIVE, unchanged
from transformers import AlbertConfig

from fastai_tl.all import *
from fastai_tl.interpretation.interventions import all_replaced
from fastai_tl.interpretation.model_inputs import hf_of, text_inputs, undisturbed
from fastai_tl.interpretation.sites import find_taps, read_states

TEXT, OTHER = 'the film was dull', 'the film was good'


def gpt2(toks):
    from transformers import GPT2Config

    tok = toks['decoder']
    tok.pad_token = tok.eos_token
    dls = HFTextDataLoaders.from_lists(TEXTS, LABELS, tok, valid=VALID, bs=4, verbose=False)
    sizes = dict(n_embd=16, n_layer=2, n_head=2, n_positions=128, vocab_size=len(tok))
    return hf_classifier_learner(dls, GPT2Config(**sizes, pad_token_id=tok.pad_token_id), metrics=[])


FAMILIES = dict(
    bert=ATTENTIVE['classifier'],
    gpt2=gpt2,
    llama=ATTENTIVE['llama'],
    t5=ATTENTIVE['t5_classifier'],
    lora=ATTENTIVE['lora'],
    causal_lm=MAKERS['causal_lm'],
    tagger=MAKERS['tagger'],
    masked_lm=MAKERS['masked_lm'],
    t5_seq2seq=MAKERS['t5'],
    bart_seq2seq=MAKERS['smoothed_bart'],
)


def make(name, toks):
    "A random model whose outputs differ clearly between texts"
    seed_everything(1)
    return with_larger_weights(FAMILIES[name](toks))


def with_larger_weights(learn):
    with torch.no_grad():
        for p in learn.model.parameters():
            if p.dim() > 1:
                p.mul_(6 if p.std() < 0.05 else 1)
    return learn


def both(learn, name):
    "The inputs of both texts"
    from fastai_tl.interpretation.interventions import _ready

    hf = hf_of(learn, '')
    texts = [o.split() if name == 'tagger' else o for o in (TEXT, OTHER)]
    return [_ready(learn, text, hf) for text in texts]


@pytest.mark.parametrize('name', FAMILIES)
def test_patching_everything_gives_the_other_logits(small_tokenizers, name):
    learn = make(name, small_tokenizers)
    a, b = both(learn, name)
    taps = [tap for stack in find_taps(a.hf, 'states').values() for tap in stack]
    with unchanged(learn):
        with undisturbed(learn.model):
            out, states = read_states(taps, b.run)
            patched = all_replaced(a, taps, states).logits
            before = a.run().logits
    assert (patched - out.logits).abs().max() < 1e-5
    assert (patched - before).abs().max() > 1e-4


@pytest.mark.parametrize('name', FAMILIES)
@pytest.mark.parametrize('what', ['states', 'heads'])
def test_effects_against_one_change_by_hand(small_tokenizers, name, what):
    "Each effect is that of a forward pass in which a hook of PyTorch exchanges one state"
    learn = make(name, small_tokenizers)
    a, b = both(learn, name)
    task = spec_of(learn).task
    targets = dict(causal_lm=('good', 'dull'), seq2seq=('good', 'dull'), tagging=('B-X', 'O')).get(task, ('a', 'b'))
    text, other = (o.split() if name == 'tagger' else o for o in (TEXT, OTHER))
    if name == 'masked_lm':
        text, other = 'the [MASK] was dull', 'the [MASK] was good'
        targets = ('film', 'story')
        a, b = (text_inputs(learn, o, a.hf) for o in (text, other))
    found = learn.patch(text, other, what, targets, word=1 if name == 'tagger' else None, bs=3)
    tok = learn.dls.tokenizer
    place = {'causal_lm': -1, 'seq2seq': -1, 'tagging': 2}.get(task)
    if task == 'masked_lm':
        place = tok(text)['input_ids'].index(tok.mask_token_id)
    if place is None or task == 'tagging':
        ids = [list(spec_of(learn).classes).index(t) for t in targets]
    else:
        pieces = [[tok(o, add_special_tokens=False)['input_ids'] for o in (f' {t}', t)] for t in targets]
        ids = [next(o[0] for o in of_word if len(o) == 1) for of_word in pieces]

    def score(logits):
        logits = logits[0] if place is None else logits[0, place]
        return float(logits[ids[0]] - logits[ids[1]])

    with undisturbed(learn.model):
        low, high = score(a.run().logits), score(b.run().logits)
        for part, taps in zip(found.parts, find_taps(a.hf, what).values(), strict=True):
            states = read_states(taps, b.run)[1]
            for k, i in [(0, 0), (len(taps) - 1, len(part.columns) - 1)]:

                def exchange(o, k=k, i=i, taps=taps, states=states):
                    o = o.clone()
                    if what == 'states':
                        o[0, i] = states[k][i, 0]
                    else:
                        size = o.shape[-1] // taps[k].groups
                        o[0, :, i * size : (i + 1) * size] = states[k][:, i]
                    return o

                handle = taps[k].attach(exchange)
                want = (score(a.run().logits) - low) / (high - low)
                handle.remove()
                assert part.effects[k, i] == pytest.approx(want, abs=1e-3)


def train_on(learn, texts, labels, steps=200, lr=2e-3):
    "Train a classifier on a few texts at once"
    seed_everything(0)
    dl = learn.dls.test_dl(texts, bs=len(texts))
    y = torch.tensor(labels)[list(dl.get_idxs())]
    x = dl.one_batch()[0]
    opt = torch.optim.Adam(learn.model.parameters(), lr)
    learn.model.eval()
    for _ in range(steps):
        loss = F.cross_entropy(learn.model(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
    return float(loss)


@pytest.fixture(scope='module')
def ruled(small_tokenizers):
    "A BERT that has learned a rule: class b if the word `good` occurs, else class a"
    seed_everything(0)
    learn = MAKERS['classifier'](small_tokenizers, labels=[*'ab'] * 11)
    rng = np.random.default_rng(0)
    texts = [text.split() for text in sentences(600, 1) if len(text.split()) == 4][:160]
    texts = [['dull' if w == 'good' else w for w in words] for words in texts]
    for words in texts[1::2]:
        words[rng.integers(4)] = 'good'
    loss = train_on(learn, [' '.join(words) for words in texts], [0, 1] * 80)
    assert loss < 0.05
    return learn


def test_the_site_of_a_planted_rule_is_found(ruled):
    for text, place in [('the film was {}', 4), ('the {} was slow', 2), ('{} plot and scene', 1)]:
        found = ruled.patch(text.format('dull'), text.format('good'))
        assert found.effects[0].argmax() == place and found.effects[0, place] == pytest.approx(1, abs=1e-3)
        assert np.abs(np.delete(found.effects[0], place)).max() < 1e-3
        top = found.effects[-1]  # the head reads the first token
        assert top.argmax() == 0 and top[0] == pytest.approx(1, abs=1e-3)
        assert found.table(1).effect[0] > 0.99


def test_patching_backwards_has_the_same_site(ruled):
    there = ruled.patch('the film was dull', 'the film was good')
    back = ruled.patch('the film was good', 'the film was dull')
    assert there.effects[0].argmax() == back.effects[0].argmax() == 4


@pytest.mark.parametrize('name', ['bert', 'gpt2', 'llama', 't5'])
def test_ablation_by_zero_equals_weights_of_zero(small_tokenizers, name):
    "A head or neuron replaced by zero is one whose columns of the next matrix are zero"
    learn = FAMILIES[name](small_tokenizers)
    for what in ('heads', 'neurons'):
        found = learn.ablate(TEXT, what, by='zero', targets='a')
        for part, path in zip(found.parts, find_taps(learn.model.hf, what), strict=True):
            changed = copy.deepcopy(learn)
            tap = find_taps(changed.model.hf, what)[path][-1]
            n = tap.module.weight.shape[0] if name == 'gpt2' else tap.module.weight.shape[1]
            size = n // tap.groups
            weights = tap.module.weight.data
            if name == 'gpt2':
                weights[-size:] = 0
            else:
                weights[:, -size:] = 0
            odds = [log_odds(o) for o in (learn, changed)]
            assert part.effects[-1, tap.groups - 1] == pytest.approx(odds[0] - odds[1], abs=1e-4)


def log_odds(learn):
    "The log-odds of class a for the text"
    with learn.no_bar():
        p = learn.get_preds(dl=learn.dls.test_dl([TEXT]))[0][0, 0]
    return float(torch.logit(p.double()))


def test_two_classes_with_one_output(small_tokenizers):
    "The effects are those of a model with two outputs, the first of which is always 0"
    labels = ['a' if label == 'c' else label for label in LABELS]
    seed_everything(1)
    one = with_larger_weights(with_one_output(MAKERS['classifier'](small_tokenizers, labels=labels)))
    two = MAKERS['classifier'](small_tokenizers, labels=labels)
    heads = {name: torch.cat([0 * o, o]) for name, o in one.model.state_dict().items() if 'classifier' in name}
    two.model.load_state_dict(one.model.state_dict() | heads)
    for compute in (
        lambda learn: learn.patch(TEXT, OTHER, targets=('a', 'b')),
        lambda learn: learn.patch(TEXT, OTHER, targets='b'),
        lambda learn: learn.ablate(TEXT),
    ):
        found, want = compute(one), compute(two)
        np.testing.assert_allclose(found.parts[0].effects, want.parts[0].effects, atol=1e-4)
        assert found.title == want.title
    found, want = (learn.counterfactuals(TEXT, k=5) for learn in (one, two))
    assert found.after.tolist() == want.after.tolist()


def test_mean_ablation_of_one_constant_does_nothing(small_tokenizers):
    "With texts of one repeated token and no positions, a neuron of the first layer is its own mean"
    learn = FAMILIES['llama'](small_tokenizers)
    found = learn.ablate(['film'], 'neurons', layers=[0])
    assert len(learn.dls.tokenizer('film')['input_ids']) == 1
    assert np.abs(found.effects[0]).max() < 1e-4 and np.isnan(found.effects[1]).all()


def test_restored_after_errors(small_tokenizers, monkeypatch):
    learn = MAKERS['classifier'](small_tokenizers)
    calls = []

    def broken(*args, **kwargs):
        calls.append(1)
        if len(calls) > 6:
            raise RuntimeError('out of memory')
        return torch.nn.Linear.forward(learn.model.hf.classifier, *args, **kwargs)

    monkeypatch.setattr(learn.model.hf.classifier, 'forward', broken)
    with unchanged(learn), pytest.raises(RuntimeError, match='out of memory'):
        learn.patch(TEXT, OTHER, targets=('a', 'b'), bs=1)
    with unchanged(learn), pytest.raises(RuntimeError, match='out of memory'):
        learn.ablate([TEXT, OTHER], bs=1)


def test_batches_do_not_change_effects(small_tokenizers):
    learn = MAKERS['classifier'](small_tokenizers)
    one, many = (learn.patch(TEXT, OTHER, targets=('a', 'b'), bs=bs).effects for bs in (1, 64))
    assert np.allclose(one, many, atol=1e-3)


def test_errors_say_what_to_do(small_tokenizers, ruled):
    with pytest.raises(DataError, match="dull.*unbelievable|unbelievable.*dull"):
        ruled.patch(TEXT, 'the film was unbelievable')
    with pytest.raises(DataError, match='different predictions'):
        ruled.patch(TEXT, 'the film was slow')
    with pytest.raises(FastaiTLError, match='must be a class'):
        ruled.patch(TEXT, OTHER, targets=('a', 'z'))
    with pytest.raises(FastaiTLError, match='`what`'):
        ruled.patch(TEXT, OTHER, 'neurons')
    with pytest.raises(FastaiTLError, match='`by`'):
        ruled.ablate(TEXT, by='noise')
    for name in ('ulmfit_classifier', 'ulmfit_lm'):
        with pytest.raises(FastaiTLError, match='AWD_LSTM.*attribut'):
            MAKERS[name](small_tokenizers).patch(TEXT, OTHER)
    with pytest.raises(FastaiTLError, match='one place'):
        MAKERS['answerer'](small_tokenizers).patch(['when', 'at noon'], ['when', 'so noon'])
    with pytest.raises(FastaiTLError, match='needs a target'):
        MAKERS['multilabel'](small_tokenizers).patch(TEXT, OTHER)


def test_words_of_a_tagger_are_those_of_the_sentence():
    "An unknown word and a word without a token do not move the index of the others"
    tok = load_tokenizer(minilm_folder())
    dls = HFTagDataLoaders.from_lists([['the', 'film'], ['a', 'plot']] * 6, [['O', 'B-X'], ['O', 'O']] * 6, tok, bs=4)
    learn = hf_tagger_learner(dls, bert(tok), metrics=[])
    hf = hf_of(learn, '')
    inputs = text_inputs(learn, ['☃', '\u200b', 'the', 'film'], hf)
    ids = tok.convert_ids_to_tokens(inputs.ids)
    assert {k: ids[i] for k, i in inputs.places.items()} == {0: '[UNK]', 2: 'the', 3: 'film'}
    with pytest.raises(FastaiTLError, match='0, 2, 3'):
        learn.ablate([['☃', '\u200b', 'the', 'film']], word=1)
    found = learn.ablate([['☃', '\u200b', 'the', 'film']], 'heads', 'zero', 'B-X', word=3)
    weight = hf.bert.encoder.layer[-1].attention.output.dense.weight
    x = {name: o.clone() for name, o in inputs.inputs.items()}
    with undisturbed(learn.model):
        before = hf(**x).logits[0, ids.index('film')]
        with torch.no_grad():
            weight[:, :8] = 0
        after = hf(**x).logits[0, ids.index('film')]
    assert found.effects[-1, 0] == pytest.approx(((before[1] - before[0]) - (after[1] - after[0])).item(), abs=1e-5)


def test_several_values(small_tokenizers):
    df = pd.DataFrame(dict(text=TEXTS, u=[0.5, 1.5] * 11, v=[2.5, 1.0] * 11))
    tok = small_tokenizers['encoder']
    dls = HFTextDataLoaders.from_df(df, tok, label_col=['u', 'v'], bs=4, verbose=False)
    learn = with_larger_weights(hf_classifier_learner(dls, bert(tok), metrics=[]))
    seen = [learn.ablate(TEXT, targets=k).effects for k in (0, 1)]
    assert np.abs(seen[0] - seen[1]).max() > 1e-3
    for wrong in (dict(), dict(targets=2)):
        with pytest.raises(FastaiTLError, match='target'):
            learn.ablate(TEXT, **wrong)
        with pytest.raises(FastaiTLError, match='target'):
            learn.patch(TEXT, OTHER, **wrong)


def test_shared_blocks_are_refused(small_tokenizers):
    "ALBERT runs one block several times, so a layer has no states of its own"
    tok = small_tokenizers['encoder']
    dls = HFTextDataLoaders.from_lists(TEXTS, LABELS, tok, valid=VALID, bs=4, verbose=False)
    config = AlbertConfig(
        vocab_size=len(tok),
        embedding_size=8,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=128,
        pad_token_id=tok.pad_token_id,
    )
    learn = hf_classifier_learner(dls, config, metrics=[])
    with pytest.raises(FastaiTLError, match='attribut'):
        learn.patch(TEXT, OTHER, targets=('a', 'b'))


def test_figures(ruled):
    for found in (ruled.patch(TEXT, OTHER), ruled.patch(TEXT, OTHER, 'heads'), ruled.ablate([TEXT, OTHER])):
        ax = found.plot().axes[0]
        assert [t.get_text() for t in ax.get_yticklabels()] == found.parts[0].layers
        image = ax.images[0].get_array()
        assert np.allclose(image, found.effects) and ax.images[0].origin == 'lower'


def test_counterfactuals_are_minimal(ruled):
    "The same changes as those of all texts with one word exchanged"
    words = ['good', 'dull', 'plot', 'slow']
    found = ruled.counterfactuals(TEXT, words=words, n=100)
    old = TEXT.split()
    texts = [' '.join([*old[:i], w, *old[i + 1 :]]) for i in range(4) for w in words if w != old[i]]
    with ruled.no_bar():
        probs = ruled.get_preds(dl=ruled.dls.test_dl(texts))[0].numpy()
    want = {text: p[1] for text, p in zip(texts, probs) if p.argmax() == 1}
    assert set(found.text) == set(want) and all('good' in text for text in want)
    assert np.allclose(found.probability, [want[text] for text in found.text], atol=1e-5)
    assert found.probability.is_monotonic_decreasing


def test_two_words_only_if_one_is_not_enough(ruled):
    found = ruled.counterfactuals('good good was slow', words=['dull', 'plot'])
    assert len(found) and (found.changes.str.count('→') == 2).all() and (found.after == 'a').all()
    assert ruled.counterfactuals('good good was slow', words=['dull', 'plot'], max_words=1).empty


def test_counterfactuals_of_an_awd_lstm_and_a_masked_model(small_tokenizers, ruled):
    masked = MAKERS['masked_lm'](small_tokenizers)
    with unchanged(ruled), unchanged(masked):
        found = ruled.counterfactuals('The film was good', masked_lm=masked, k=30)
    assert len(found) and not found.text.str.contains('good').any() and not found.text.str.contains(r'\[').any()
    lstm = MAKERS['ulmfit_classifier'](small_tokenizers)
    assert set(lstm.counterfactuals(TEXT).columns) == {'text', 'changes', 'before', 'after', 'probability'}
    with pytest.raises(FastaiTLError, match='masked language model'):
        ruled.counterfactuals(TEXT, masked_lm=MAKERS['causal_lm'](small_tokenizers))


def test_texts_of_an_ablation_are_read_as_elsewhere(small_tokenizers):
    "A table has its text column; sentences of a tagger are strings or lists of words, and single words are refused"
    learn = make('bert', small_tokenizers)
    table = pd.DataFrame(dict(text=[TEXT, OTHER], label=['a', 'b']))
    np.testing.assert_array_equal(learn.ablate(table).effects, learn.ablate([TEXT, OTHER]).effects)
    tagger = make('tagger', small_tokenizers)
    want = tagger.ablate([TEXT.split(), OTHER.split()], word=0).effects
    np.testing.assert_array_equal(tagger.ablate([TEXT, OTHER], word=0).effects, want)
    for call in (tagger.ablate, tagger.attribute):
        with pytest.raises(DataError, match='list of single words'):
            call(TEXT.split())


def test_one_token_of_a_decoder_is_its_own_mean(small_tokenizers):
    learn = make('bart_seq2seq', small_tokenizers)
    with pytest.warns(UserWarning, match="The decoder has read one token.*by='zero'"):
        assert np.abs(learn.ablate(TEXTS[:2]).parts[-1].effects[0]).max() < 1e-4
