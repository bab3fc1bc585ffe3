"""Pushes small models to the hub that HF_ENDPOINT names and loads them again; prints what it found as JSON. A process
of its own, because huggingface_hub reads its environment once."""

import contextlib
import io
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
from small_learners import LABELS, MAKERS, TEXTS, sentences

from fastai_tl.all import *
from fastai_tl.cli import main
from fastai_tl.commands.predict import load_model

found = {}
toks = {kind: train_tokenizer(sentences(200), 400, kind) for kind in ('encoder', 'decoder', 'seq2seq')}


def bits(array):
    return np.ascontiguousarray(array).tobytes()


def one_direction(backwards):
    "A classifier that reads in one direction"
    tokens, rows = tokenize_texts_once(TEXTS), list(range(len(TEXTS)))
    dls = classifier_dls(tokens, LABELS, 'classification', rows[:20], rows[20:], texts_vocab(tokens), bs=4,
                         backwards=backwards)
    return awd_classifier_learner(dls, 'classification', 3, dict(emb_sz=16, n_hid=16, n_layers=1), metrics=[])


def code_of(card):
    "The lines of Python in a model card"
    return re.search('```python\n(.*?)```', str(card), re.S)[1]


for name in ('classifier', 'multilabel', 'regression', 'ulmfit_classifier'):
    learn = MAKERS[name](toks)
    commit = learn.push_bundle(f'me/{name}', private=name == 'multilabel')
    loaded = load_bundle(f'hf://me/{name}', revision=commit)
    found[f'{name} same'] = bits(loaded.scores(TEXTS)) == bits(learn.predictor(verbose=False).scores(TEXTS))
    found[f'{name} commit'] = commit

learn = MAKERS['tagger'](toks)
learn.push_bundle('me/tagger')
words = [text.split() for text in TEXTS]
again = load_bundle('hf://me/tagger').tag(words)
found['tagger same'] = [o.tags for o in again] == [o.tags for o in learn.tag(words)]

# every other task: the lines of its model card run
for name in ('answerer', 'masked_lm', 'causal_lm', 't5', 'ulmfit_lm'):
    MAKERS[name](toks).push_bundle(f'me/{name}')
CODE = 'classifier regression ulmfit_classifier tagger answerer masked_lm causal_lm t5 ulmfit_lm'.split()
for name in CODE:
    learn = load_bundle(f'hf://me/{name}')
    code = code_of(model_card(learn, repo=f'me/{name}'))
    with contextlib.redirect_stdout(io.StringIO()):
        exec(code, {})
    found[f'{name} code'] = code

# a second push, with int8 and thresholds, replaces the first; the commit of the first still gives the first
learn = MAKERS['classifier'](toks)
learn.model.hf.classifier.bias.data += 1
second = learn.push_bundle('me/classifier', precision='int8', temperature=2., branch='int8')
found['branch precision'] = load_bundle('hf://me/classifier@int8', verbose=False).precision
found['branch temperature'] = load_bundle('hf://me/classifier', revision=second, verbose=False).temperature
found['main precision'] = load_bundle('hf://me/classifier').precision

# a bundle of other files replaces one: forward.* and backward.* take the place of model.*
pair = BidirectionalLearner(one_direction(False), one_direction(True))
pair.push_bundle('me/ulmfit_classifier', card='# Both directions')
both = load_bundle('hf://me/ulmfit_classifier')
found['pair same'] = bits(both.scores(TEXTS)) == bits(Predictor(pair).scores(TEXTS))
found['pair files'] = sorted(p.name for p in both.bundle.iterdir() if not p.name.startswith('.'))

# the command line
out = io.StringIO()
with contextlib.redirect_stdout(out):
    main(['predict', 'hf://me/classifier', TEXTS[0]])
found['cli'] = out.getvalue().split('\t')[0]
found['cli expected'] = str(load_bundle('hf://me/classifier').predict(TEXTS[:1]).labels[0])
table = Path(sys.argv[1])/'rows.csv'
pd.DataFrame(dict(text=TEXTS, label=LABELS)).to_csv(table, index=False)
with contextlib.redirect_stdout(io.StringIO()):
    main(['evaluate', 'hf://me/classifier', str(table), '--out', str(Path(sys.argv[1])/'report')])
found['cli report'] = (Path(sys.argv[1])/'report'/'index.html').exists()
from fastai_tl.commands.serve import _model_to_serve

args = SimpleNamespace(model='hf://me/classifier', precision=None, engine='torch')
found['served'] = repr(_model_to_serve(args)) == repr(load_model('hf://me/classifier'))

print(json.dumps(found))
