"Zero-shot classifiers: the likelihood of words by hand for several architectures, permutations, text rules, AWD_LSTM"

import numpy as np
import pytest
import torch
from small_learners import TEXTS, causal_lm, ulmfit_lm
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
)

from fastai_tl.all import *

WORDS = dict(yes='good', no='very bad', mixed='slow')
TEMPLATE = 'film: {text} story {label}'
SMALL = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)


def gpt2(tok):
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(tok), n_embd=16, n_layer=2, n_head=2, n_positions=256))


def llama(tok):
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tok), **SMALL))


def by_hand(model, tok, prompt, word):
    "The mean over the tokens from the one with the first letter of the word"
    bos = text_model(model, tok).adapter.bos_id
    enc = tok(prompt + word, add_special_tokens=False)
    ids = [*([] if bos is None else [bos]), *enc['input_ids']]
    first = len(ids) - len(enc['input_ids']) + enc.char_to_token(len(prompt))
    with torch.no_grad():
        log_probs = model.eval()(torch.tensor([ids])).logits[0].log_softmax(-1)
    return np.mean([log_probs[i - 1, ids[i]].item() for i in range(first, len(ids))])


@pytest.mark.parametrize('make', [gpt2, llama])
def test_causal_models(make, small_tokenizers):
    torch.manual_seed(0)
    tok = small_tokenizers['decoder']
    model = make(tok)
    z = LabelWordClassifier(model, WORDS, TEMPLATE, tok).scores(TEXTS, bs=4)
    for i in (0, 3, 7):
        expected = [by_hand(model, tok, f'film: {TEXTS[i]} story ', word) for word in WORDS.values()]
        np.testing.assert_allclose(z[i], expected, atol=1e-4)


def test_learners_of_language_models(small_tokenizers):
    "A Learner brings its tokenizer; an AWD_LSTM scores the tokens of fastai"
    learn = causal_lm(small_tokenizers)
    theirs = LabelWordClassifier(learn.model.hf, WORDS, TEMPLATE, small_tokenizers['decoder'])
    np.testing.assert_allclose(
        LabelWordClassifier(learn, WORDS, TEMPLATE).scores(TEXTS[:3]), theirs.scores(TEXTS[:3]), atol=1e-6
    )
    learn = ulmfit_lm(small_tokenizers)
    tm = text_model(learn)
    z = LabelWordClassifier(learn, WORDS, TEMPLATE).scores(TEXTS[:2])
    learn.model.eval()
    for row, text in zip(z, TEXTS):
        for value, word in zip(row, WORDS.values()):
            prompt, ids = (tm.adapter.encode(f'film: {text} story{o}') for o in ('', f' {word}'))
            learn.model.reset()
            with torch.no_grad():
                log_probs = learn.model(torch.tensor([ids]))[0][0].log_softmax(-1)
            expected = np.mean([log_probs[i - 1, ids[i]].item() for i in range(len(prompt), len(ids))])
            assert value == pytest.approx(expected, abs=1e-4)


def test_masked_models_read_both_sides(small_tokenizers):
    tok = small_tokenizers['encoder']
    torch.manual_seed(0)
    model = RobertaForMaskedLM(
        RobertaConfig(vocab_size=len(tok), max_position_embeddings=90, pad_token_id=tok.pad_token_id, **SMALL)
    )
    z = LabelWordClassifier(model, WORDS, 'it was {label} because {text}', tok).scores(TEXTS[:4])
    for i, word in enumerate(WORDS.values()):
        enc = tok(f'it was {word} because {TEXTS[2]}', return_tensors='pt')
        begin = len('it was ')
        places = list(range(enc.char_to_token(begin), enc.char_to_token(begin + len(word) - 1) + 1))
        targets = enc['input_ids'][0, places].clone()
        enc['input_ids'][0, places] = tok.mask_token_id
        with torch.no_grad():
            log_probs = model.eval()(input_ids=enc['input_ids']).logits[0].log_softmax(-1)
        expected = log_probs[places, targets].mean().item()
        assert z[2, i] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize('calibration', [None, 'contextual', 'pmi'])
def test_order_of_classes_and_examples(calibration, small_tokenizers):
    tok = small_tokenizers['decoder']
    torch.manual_seed(0)
    model = gpt2(tok)
    few = [('good plot', 'yes'), ('bad actor', 'no'), ('slow scene', 'mixed'), ('dull music', 'no')]

    def scores(words, examples):
        options = dict(examples=examples, n_examples=2, calibration=calibration, content_free=['', 'the'])
        made = LabelWordClassifier(model, words, TEMPLATE, tok, **options)
        return dict(zip(made.classes, made.predict_proba(TEXTS[:3]).T))

    one = scores(WORDS, few)
    other = scores({name: WORDS[name] for name in ('mixed', 'no', 'yes')}, few[::-1])
    for name in WORDS:
        np.testing.assert_allclose(one[name], other[name], atol=1e-6)
    assert not np.allclose(one['yes'], scores(WORDS, few[:1] * 2)['yes'], atol=1e-6)


def test_entailment_with_outputs_in_any_order(small_tokenizers):
    "transformers takes the first or last output for the contradiction; here the names decide"
    tok = small_tokenizers['encoder']
    config = RobertaConfig(vocab_size=len(tok), max_position_embeddings=90, pad_token_id=tok.pad_token_id, **SMALL)
    config.id2label = {0: 'NEUTRAL', 1: 'ENTAILMENT', 2: 'CONTRADICTION'}
    config.label2id = {name: i for i, name in config.id2label.items()}
    torch.manual_seed(0)
    model = RobertaForSequenceClassification(config).eval()
    p = EntailmentClassifier(model, WORDS, 'it is {label}', tok, several=True).predict_proba(TEXTS[:3])
    for i, text in enumerate(TEXTS[:3]):
        for j, word in enumerate(WORDS.values()):
            with torch.no_grad():
                z = model(input_ids=tok(text, f'it is {word}', return_tensors='pt')['input_ids']).logits[0]
            assert p[i, j] == pytest.approx(z[[1, 2]].softmax(0)[0].item(), abs=1e-5)


def test_errors(small_tokenizers):
    tok = small_tokenizers['decoder']
    model = gpt2(tok)
    for template, match in (
        ('{text}', 'once each'),
        ('{label} {text}', 'at the end'),
        ('{text}{label}{text}', 'once each'),
    ):
        with pytest.raises(FastaiTLError, match=match):
            LabelWordClassifier(model, WORDS, template, tok)
    with pytest.raises(FastaiTLError, match='different words'):
        LabelWordClassifier(model, ['good'], TEMPLATE, tok)
    with pytest.raises(FastaiTLError, match='calibration'):
        LabelWordClassifier(model, WORDS, TEMPLATE, tok, calibration='none')
    with pytest.raises(FastaiTLError, match='“entail”'):
        EntailmentClassifier(
            RobertaForSequenceClassification(RobertaConfig(vocab_size=9, **SMALL)), WORDS, tokenizer=tok
        )
