"Small Learners for every task, each made from the tokenizers of the fixture `small_tokenizers`"

import random

import pandas as pd
import torch
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from transformers import BartConfig, BertConfig, GPT2Config, T5Config

from fastai_tl.all import *

WORDS = 'the film was very good bad dull fine plot actor scene slow bright ending music long short story'.split()
N_ROWS = 22


def sentences(n=N_ROWS, seed=0):
    "Return sentences of very different lengths"
    rng = random.Random(seed)
    return [' '.join(rng.choice(WORDS) for _ in range(rng.choice([2, 4, 30]))) for _ in range(n)]


TEXTS = sentences()
VALID = [i >= 20 for i in range(N_ROWS)]
LABELS = ['a', 'b', 'b', 'c', 'b'] * 4 + ['a', 'b']


def bert(tok, **kwargs):
    return BertConfig(**kwargs, vocab_size=len(tok), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                      intermediate_size=32, max_position_embeddings=128, pad_token_id=tok.pad_token_id)


def classifier(toks, labels=LABELS, **kwargs):
    data = dict(multi=dict(task='multilabel'), value=dict(task='regression')).get(kwargs.pop('data', None), {})
    dls = HFTextDataLoaders.from_lists(TEXTS, labels, toks['encoder'], valid=VALID, bs=4, verbose=False, **data)
    return hf_classifier_learner(dls, bert(toks['encoder']), metrics=[], **kwargs)


def with_one_output(learn):
    "The Learner of a classifier of two classes with a single output, for the second class"
    hf = learn.model.hf
    hf.config.num_labels = 1
    hf.num_labels = 1
    hf.classifier = torch.nn.Linear(hf.classifier.in_features, 1)
    return HFLearner(learn.dls, HFModel(hf), loss_func=BCEWithLogitsLossFlat())


def tagger(toks, **kwargs):
    words = [text.split() for text in TEXTS]
    tags = [['B-X' if word == 'film' else 'O' for word in sentence] for sentence in words]
    dls = HFTagDataLoaders.from_lists(words, tags, toks['encoder'], valid=VALID, bs=4)
    return hf_tagger_learner(dls, bert(toks['encoder']), metrics=[], **kwargs)


def answerer(toks):
    contexts = [f'{text} at noon' for text in TEXTS]
    df = pd.DataFrame(dict(question=['when'] * N_ROWS, context=contexts, answer=['noon'] * N_ROWS, valid=VALID))
    dls = HFQADataLoaders.from_df(df, toks['encoder'], valid_col='valid', bs=4, max_length=48, stride=8)
    return hf_qa_learner(dls, bert(toks['encoder']), metrics=[])


def masked_lm(toks):
    dls = HFMaskedLMDataLoaders.from_texts(TEXTS, toks['encoder'], max_length=40, bs=4)
    return hf_masked_lm_learner(dls, bert(toks['encoder']), metrics=[])


def causal_lm(toks):
    tok = toks['decoder']
    dls = HFCausalLMDataLoaders.from_texts(TEXTS, tok, max_length=24, bs=4)
    return hf_causal_lm_learner(dls, GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=len(tok), n_positions=64),
                                metrics=[])


def seq2seq(toks, config, **kwargs):
    tok = toks['seq2seq']
    dls = HFSeq2SeqDataLoaders.from_lists(TEXTS, TEXTS[::-1], tok, valid=VALID, bs=4)
    sizes = dict(d_model=16, vocab_size=len(tok), pad_token_id=tok.pad_token_id, eos_token_id=tok.eos_token_id,
                 decoder_start_token_id=tok.pad_token_id)
    return hf_seq2seq_learner(dls, config(**sizes), metrics=[], **kwargs)


def t5(**kwargs):
    return T5Config(d_kv=8, d_ff=32, num_layers=1, num_decoder_layers=1, num_heads=2, **kwargs)


def bart(**kwargs):
    return BartConfig(encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
                      encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=128, **kwargs)


def ulmfit_lm(toks):
    tokenized = tokenize_texts_once(sentences(60))
    dls = language_model_dls(tokenized, texts_vocab(tokenized), bs=4, seq_len=20)
    return awd_lm_learner(dls, dict(emb_sz=16, n_hid=16, n_layers=1), metrics=[])


def ulmfit_classifier(toks):
    tokenized = tokenize_texts_once(TEXTS)
    rows = list(range(N_ROWS))
    dls = classifier_dls(tokenized, LABELS, 'classification', rows[:20], rows[20:], texts_vocab(tokenized), bs=4)
    return awd_classifier_learner(dls, 'classification', 3, dict(emb_sz=16, n_hid=16, n_layers=1), metrics=[])


WEIGHTS = torch.tensor([1., 5., .5])
SEVERAL = [['a'], ['a', 'b'], ['b'], [], ['c']] * 4 + [['a'], ['b', 'c']]
VALUES = [float(len(text)) for text in TEXTS]
MAKERS = dict(
    classifier=classifier,
    class_weights=lambda toks: classifier(toks, class_weights=WEIGHTS.tolist()),
    balanced=lambda toks: classifier(toks, class_weights='balanced'),
    own_weighted_loss=lambda toks: classifier(toks, loss_func=CrossEntropyLossFlat(weight=WEIGHTS)),
    multilabel=lambda toks: classifier(toks, SEVERAL, data='multi'),
    regression=lambda toks: classifier(toks, VALUES, data='value'),
    tagger=tagger,
    weighted_tagger=lambda toks: tagger(toks, loss_func=TaggingLoss(weight=WEIGHTS[:2])),
    answerer=answerer,
    masked_lm=masked_lm,
    causal_lm=causal_lm,
    chunked_causal_lm=lambda toks: causal_lm(toks).chunked_loss(),
    t5=lambda toks: seq2seq(toks, t5),
    smoothed_bart=lambda toks: seq2seq(toks, bart, label_smoothing=.1),
    ulmfit_lm=ulmfit_lm,
    ulmfit_classifier=ulmfit_classifier,
)
