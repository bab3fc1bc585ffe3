"""Attention maps: the model's own eager weights, everything restored afterwards, figures and HTML"""

import pickle
import random
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from small_learners import LABELS, MAKERS, TEXTS, VALID
from transformers import FNetConfig, LlamaConfig, XLNetConfig

from fastai_tl.all import *
from fastai_tl.interpretation.model_inputs import hf_of
from fastai_tl.models.execution_order import base_model

TEXT = 'the film was very good'


def llama(toks):
    tok = toks['decoder']
    tok.pad_token = tok.eos_token
    dls = HFTextDataLoaders.from_lists(TEXTS, LABELS, tok, valid=VALID, bs=4, verbose=False)
    config = LlamaConfig(
        vocab_size=len(tok),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=tok.pad_token_id,
    )
    return hf_classifier_learner(dls, config, metrics=[])


def lora(toks):
    from peft import LoraConfig

    return MAKERS['classifier'](toks, peft_config=LoraConfig(target_modules=['query', 'value'], r=2))


def t5_classifier(toks):
    from transformers import T5Config

    tok = toks['seq2seq']
    dls = HFTextDataLoaders.from_lists(TEXTS, LABELS, tok, valid=VALID, bs=4, verbose=False)
    sizes = dict(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=2, num_heads=2, vocab_size=len(tok))
    ids = dict(pad_token_id=tok.pad_token_id, eos_token_id=tok.eos_token_id, decoder_start_token_id=tok.pad_token_id)
    return hf_classifier_learner(dls, T5Config(**sizes, **ids), metrics=[])


NAMES = ('classifier', 'multilabel', 'regression', 'tagger', 'masked_lm', 'causal_lm')
ATTENTIVE = {name: MAKERS[name] for name in NAMES} | dict(llama=llama, lora=lora, t5_classifier=t5_classifier)


def settings(learn):
    "What must be as before: attention, modes, hooks and random numbers"
    configs = [m.config for m in learn.model.modules() if hasattr(m, 'config')]
    modes = [m.training for m in learn.model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in learn.model.modules()]
    states = (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate())
    return [c._attn_implementation for c in configs], modes, hooks, states


@contextmanager
def unchanged(learn):
    learn.model.train()
    learn.model.hf.get_input_embeddings().eval()  # modes can differ between modules
    before = settings(learn)
    yield
    assert settings(learn) == before


def own_eager(learn, inputs, name='attentions'):
    "The weights of the model itself, with its implementation set by hand"
    base = base_model(learn.model.hf)
    before = base.config._attn_implementation
    base.set_attn_implementation('eager')
    learn.model.eval()
    with torch.no_grad():
        out = learn.model.hf(**inputs, output_attentions=True, return_dict=True)
    base.set_attn_implementation(before)
    return torch.stack([o[0] for o in out[name]])


@pytest.mark.parametrize('name', ATTENTIVE)
def test_weights_are_the_models_own(small_tokenizers, name):
    learn = ATTENTIVE[name](small_tokenizers)
    maps = learn.attention(TEXT.split() if name == 'tagger' else TEXT)
    tok = learn.dls.tokenizer
    words = dict(is_split_into_words=True) if name == 'tagger' else {}
    inputs = tok(TEXT.split() if words else TEXT, return_tensors='pt', **words)
    kind = maps.kinds[0]
    want = own_eager(learn, dict(inputs), 'encoder_attentions' if kind == 'encoder' else 'attentions')
    assert torch.equal(torch.from_numpy(maps.weights[kind]), want)
    assert np.allclose(maps.of_words().sum(-1), 1, atol=1e-5)
    assert [w for w, _ in maps.words[kind][0] if w.isalpha()] == TEXT.split()


@pytest.mark.parametrize('name', ['t5', 'smoothed_bart'])
def test_three_kinds_of_a_sequence_to_sequence_model(small_tokenizers, name):
    learn = MAKERS[name](small_tokenizers)
    with unchanged(learn):
        maps = learn.attention(TEXT, 'a dull story')
        written = learn.attention(TEXT)
    assert maps.kinds == written.kinds == ['encoder', 'decoder', 'cross']
    n_text, n_target = len(maps.tokens['cross'][1]), len(maps.tokens['cross'][0])
    assert maps.weights['cross'].shape[2:] == (n_target, n_text)
    labels = learn.dls.tokenizer(text_target='a dull story', return_tensors='pt')['input_ids']
    ids = learn.model.hf.prepare_decoder_input_ids_from_labels(labels=labels)
    inputs = dict(learn.dls.tokenizer(TEXT, return_tensors='pt'), decoder_input_ids=ids)
    for kind in maps.kinds:
        assert torch.equal(torch.from_numpy(maps.weights[kind]), own_eager(learn, inputs, f'{kind}_attentions'))
    assert not np.triu(maps.weights['decoder'], 1).any()


@pytest.mark.parametrize('name', ['classifier', 'causal_lm', 'lora', 't5_classifier'])
def test_everything_is_restored(small_tokenizers, name):
    learn = ATTENTIVE[name](small_tokenizers)
    with unchanged(learn):
        learn.attention(TEXT)
    pickle.dumps(learn.model)  # hooks of transformers cannot be pickled


def test_restored_after_an_error(small_tokenizers, monkeypatch):
    learn = MAKERS['classifier'](small_tokenizers)

    def broken(*args, **kwargs):
        assert learn.model.hf.config._attn_implementation == 'eager'
        raise RuntimeError('out of memory')

    monkeypatch.setattr(learn.model.hf.bert.encoder.layer[1], 'forward', broken)
    with unchanged(learn), pytest.raises(RuntimeError, match='out of memory'):
        learn.attention(TEXT)


def test_rollout_against_a_path_sum():
    "The share of a word is the sum over all paths through the layers"
    weights = np.random.default_rng(0).dirichlet([1.0] * 3, (3, 2, 3))
    mixed = (weights.mean(1) + np.eye(3)) / 2
    want = np.zeros((3, 3))
    for a in range(3):
        for b in range(3):
            for c in range(3):
                for d in range(3):
                    want[a, d] += mixed[2, a, b] * mixed[1, b, c] * mixed[0, c, d]
    assert np.allclose(attention_rollout(weights), want)


def test_the_row_that_the_head_reads(small_tokenizers):
    maps = ATTENTIVE['classifier'](small_tokenizers).attention(TEXT)
    assert np.allclose(maps.word_shares(), maps.rollout()[0])  # [CLS]
    maps = ATTENTIVE['llama'](small_tokenizers).attention(TEXT)
    assert np.allclose(maps.word_shares(), maps.rollout()[-1])  # the last word
    for name in ('tagger', 't5_classifier'): # the head of the latter reads the decoder
        maps = ATTENTIVE[name](small_tokenizers).attention(TEXT)
        assert np.allclose(maps.word_shares(), maps.rollout().mean(0))
    maps = ATTENTIVE['t5_classifier'](small_tokenizers).attention(TEXT)
    assert np.allclose(maps.word_shares('decoder'), maps.rollout('decoder')[-1])
    tok = small_tokenizers['encoder']
    dls = HFTextDataLoaders.from_lists(TEXTS, LABELS, tok, valid=VALID, bs=4, verbose=False)
    sizes = dict(vocab_size=len(tok), d_model=16, n_layer=1, n_head=2, d_inner=32)
    config = XLNetConfig(**sizes, pad_token_id=tok.pad_token_id)
    maps = hf_classifier_learner(dls, config, metrics=[]).attention(TEXT)
    assert np.allclose(maps.word_shares(), maps.rollout()[-1])


def test_virtual_tokens_have_names(small_tokenizers):
    from peft import PromptTuningConfig

    config = PromptTuningConfig(task_type='SEQ_CLS', num_virtual_tokens=3)
    learn = MAKERS['classifier'](small_tokenizers, peft_config=config)
    maps = learn.attention(TEXT)
    assert maps.tokens['self'][1][:3] == ['[prompt 0]', '[prompt 1]', '[prompt 2]']
    assert len(maps.names()[1]) == maps.of_words().shape[-1]


@pytest.mark.parametrize('name', ['ulmfit_classifier', 'ulmfit_lm'])
def test_awd_lstm_is_pointed_to_attributions(small_tokenizers, name):
    with pytest.raises(FastaiTLError, match='AWD_LSTM.*attribut'):
        MAKERS[name](small_tokenizers).attention(TEXT)


def test_models_without_attention_are_refused(small_tokenizers):
    tok = small_tokenizers['encoder']
    dls = HFTextDataLoaders.from_lists(TEXTS, LABELS, tok, valid=VALID, bs=4, verbose=False)
    sizes = dict(hidden_size=16, num_hidden_layers=2, intermediate_size=32, max_position_embeddings=128)
    config = FNetConfig(vocab_size=len(tok), pad_token_id=tok.pad_token_id, **sizes)
    learn = hf_classifier_learner(dls, config, metrics=[])
    with pytest.raises(FastaiTLError, match='attribut'):
        learn.attention(TEXT)


def test_wrong_arguments(small_tokenizers):
    learn = MAKERS['classifier'](small_tokenizers)
    with pytest.raises(DataError, match='One text'):
        learn.attention([TEXT, TEXT])
    with pytest.raises(FastaiTLError, match='sequence-to-sequence'):
        learn.attention(TEXT, 'target')
    maps = learn.attention(TEXT)
    for wrong in (dict(layer=2), dict(head=-3), dict(kind='cross')):
        with pytest.raises(FastaiTLError):
            maps.plot(**wrong)


def test_html_has_no_scripts_and_escapes(small_tokenizers):
    maps = MAKERS['classifier'](small_tokenizers).attention('<script>alert(1)</script> & film')
    page = maps._repr_html_()
    links = page.replace('http://www.w3.org/2000/svg', '')
    assert '<script' not in page and 'onload' not in page and 'http' not in links
    assert '&lt;' in page and 'Jain' in page


def test_figures_in_chinese(small_tokenizers):
    maps = MAKERS['classifier'](small_tokenizers).attention('電影很好看 film')
    assert [w for w, _ in maps.words['self'][0]] == ['[CLS]', *'電影很好看', 'film', '[SEP]']
    with warnings.catch_warnings():
        warnings.filterwarnings('error', 'Glyph')
        for fig in (maps.plot(), maps.plot_head(), maps.plot_heads(), maps.plot_rollout()):
            fig.canvas.draw()
    assert hf_of(MAKERS['classifier'](small_tokenizers), '').config.num_attention_heads == maps.weights['self'].shape[1]
