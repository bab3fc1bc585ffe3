"""Write the bundles in this folder with the last release that wrote bundle format 1 (commit c1a828e)

They are test data: `tests/test_deploy.py` loads them and compares the predictions with `predictions.json`. Check out
that commit, put it on `PYTHONPATH` and run `python make.py FOLDER`. This script does not run with later versions."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, GPT2Config

from fastai_tl.all import *
from fastai_tl.core import seed_everything

WORDS = 'alpha beta gamma delta good bad nice awful the of and is'.split()
NEW = ['Good alpha and beta.', 'The awful gamma is bad', 'nice', 'Delta of the good and the bad is nice. ' * 4]
CHINESE = ['這部電影很好看', '價錢太貴,不推薦!', '還可以']
AWD = dict(emb_sz=8, n_hid=12, n_layers=2)


def make_texts(n, seed=0):
    rng = np.random.default_rng(seed)
    return [' '.join(rng.choice(WORDS, rng.integers(2, 12))).capitalize() + '.' for _ in range(n)]


TEXTS = make_texts(40)
VALID = [i >= 28 for i in range(40)]
LABELS = dict(single=['neg' if len(t) % 2 else 'pos' for t in TEXTS],
              multi=[[c for c in 'abc' if (len(t) + ord(c)) % 3] for t in TEXTS],
              regression=[len(t) / 50 for t in TEXTS])


def bert(tok, **kwargs):
    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12)
    vocab = dict(vocab_size=len(tok), pad_token_id=tok.pad_token_id)
    return BertConfig(**sizes, **vocab, max_position_embeddings=64, **kwargs)


def train(learn, sharpen=1):
    "A few steps, and a last layer with larger weights, so that the predictions differ from text to text"
    for part in getattr(learn, 'learners', [learn]):
        with part.no_bar(), part.no_logging():
            part.fit(4, 3e-2)
        last = [m for m in part.model.modules() if isinstance(m, torch.nn.Linear)][-1]
        last.weight.data *= sharpen
    return learn


def hf_classifier(target, tok, texts=TEXTS, labels=None, **kwargs):
    seed_everything(1)
    options = dict(valid=VALID, target=target, bs=8, verbose=False, **kwargs)
    dls = HFTextDataLoaders.from_lists(texts, labels or LABELS[target], tok, **options)
    return train(hf_classifier_learner(dls, bert(tok)), sharpen=1 if target == 'regression' else 100)


def awd_parts():
    tokens = tokenize_texts_once(TEXTS, progress=False)
    return tokens, texts_vocab(tokens, min_freq=1)


def awd_classifier(target, backwards=False, y_range=None):
    seed_everything(2)
    tokens, vocab = awd_parts()
    train, valid = list(range(28)), list(range(28, 40))
    dls = classifier_dls(tokens, LABELS[target], target, train, valid, vocab, bs=8, backwards=backwards)
    n_out = 1 if target == 'regression' else len(dls.vocab[1])
    return awd_classifier_learner(dls, target, n_out, AWD, y_range=y_range)


def predictions(predictor, texts):
    p = predictor.predict(texts)
    probs, scores = p.probs.tolist(), p.scores.tolist()
    return dict(texts=texts, labels=p.labels, probs=probs, scores=scores, classes=predictor.classes)


def main(folder):
    tok = train_tokenizer(TEXTS, 280)
    zh_tok = train_tokenizer(CHINESE * 4, 290)
    res = {}

    def save(name, learn, texts=NEW, **kwargs):
        learn.save_bundle(folder/name, **kwargs)
        res[name] = predictions(load_bundle(folder/name, precision='fp32'), texts)

    save('hf_classification', hf_classifier('single', tok, max_length=32), temperature=1.5, precision='int8')
    save('hf_multilabel', hf_classifier('multi', tok, max_length=32), thresholds=[.4, .5, .6])
    save('hf_regression', hf_classifier('regression', tok, max_length=32))
    save('hf_windows', hf_classifier('single', tok, max_length=16, windows=4))
    zh = [CHINESE[i % 3] for i in range(40)]
    save('hf_chinese', hf_classifier('single', zh_tok, zh, [t[:2] for t in zh], max_length=32, lang='zh-tw'), CHINESE)
    pairs = list(zip(TEXTS, make_texts(40, 5)))
    save('hf_pairs', hf_classifier('single', tok, pairs, LABELS['single'], max_length=32), [(t, NEW[0]) for t in NEW])
    save('awd_classification', train(awd_classifier('single'), 10), temperature=.8)
    save('awd_regression', train(awd_classifier('regression', y_range=(0, 2))))
    both = BidirectionalLearner(awd_classifier('multi'), awd_classifier('multi', backwards=True))
    save('awd_both_directions', train(both, 10))

    words = [t.lower().rstrip('.').split() for t in TEXTS]
    tags = [['B-X' if w in ('good', 'bad') else 'O' for w in s] for s in words]
    seed_everything(3)
    dls = HFTagDataLoaders.from_lists(words, tags, tok, max_length=32, bs=8, verbose=False)
    train(hf_tagger_learner(dls, bert(tok))).save_bundle(folder/'hf_tagging')
    tagger = load_bundle(folder/'hf_tagging')
    with tagger.no_bar():
        probs = [p.tolist() for p in tagger.word_probs(words[:3])]
    tags = [o.tags for o in tagger.tag(TEXTS[:3])]
    res['hf_tagging'] = dict(texts=TEXTS[:3], words=words[:3], probs=probs, tags=tags)

    questions = ['who is it'] * 28
    passages = [t for t in TEXTS if len(t.split()) > 3][:28]
    answers = [t.split()[1] for t in passages]
    starts = [len(t.split()[0]) + 1 for t in passages]
    seed_everything(3)
    options = dict(starts=starts, max_length=40, stride=8, bs=8, verbose=False)
    dls = HFQADataLoaders.from_lists(questions, passages, answers, tok, **options)
    train(hf_qa_learner(dls, bert(tok))).save_bundle(folder/'hf_qa')
    reader = load_bundle(folder/'hf_qa')
    with reader.no_bar():
        found = reader.answers(list(zip(questions, passages))[:3])
    res['hf_qa'] = dict(questions=questions[:3], passages=passages[:3], answers=[o.text for o in found],
                        starts=[o.start for o in found], scores=[float(o.score) for o in found])

    tokens, vocab = awd_parts()
    for backwards in (False, True):
        seed_everything(4)
        name = 'awd_lm_backwards' if backwards else 'awd_lm'
        dls = language_model_dls(tokens, vocab, bs=4, seq_len=10, backwards=backwards)
        train(awd_lm_learner(dls, AWD)).save_bundle(folder/name)
        lm = load_bundle(folder/name)
        ppl = lm.perplexity(NEW).corpus['perplexity']
        generated = lm.generate('alpha', max_new_tokens=6, do_sample=False)[0].text
        res[name] = dict(texts=NEW, perplexity=float(ppl), generated=generated)

    seed_everything(5)
    gpt = GPT2Config(vocab_size=len(tok), n_embd=8, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    dls = HFCausalLMDataLoaders.from_texts(TEXTS, tok, max_length=16)
    train(hf_causal_lm_learner(dls, gpt)).save_bundle(folder/'hf_causal_lm')
    lm = load_bundle(folder/'hf_causal_lm')
    res['hf_causal_lm'] = dict(texts=NEW, perplexity=float(lm.perplexity(NEW).corpus['perplexity']),
                               generated=lm.generate('alpha beta', max_new_tokens=5, do_sample=False)[0].text)
    (folder/'predictions.json').write_text(json.dumps(res, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main(Path(sys.argv[1]))
