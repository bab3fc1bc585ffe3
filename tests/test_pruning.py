"""Smaller models compute what is left of the large ones, and open in plain transformers"""

import copy
import logging

import pytest
import torch
from transformers import AutoConfig, AutoModel
from transformers.pytorch_utils import Conv1D

from fastai_tl.all import *
from fastai_tl.core import FastaiTLError, seed_everything
from fastai_tl.deploy.pruning import cut_units, ffn_cuts, head_cuts, layer_path, with_layers
from small_learners import LABELS, TEXTS, VALID, tagger, with_one_output
from test_architectures import MODELS, build

pytestmark = pytest.mark.filterwarnings('ignore')
IDS = torch.tensor([[7, 8, 9, 10, 11, 12, 13, 2]])


def logits(hf):
    hf.config.use_cache = False # a cache has a place for each layer
    with torch.no_grad():
        out = hf.eval()(IDS)
    return out.logits if 'logits' in out else out[0]


def has_layers(hf):
    try:
        return bool(layer_path(hf))
    except FastaiTLError:
        return False


def by_surgery(hf, keep):
    "The model whose list of layers has lost some, without a new config for its parts"
    hf = copy.deepcopy(hf)
    path, _, leaf = layer_path(hf).rpartition('.')
    owner = hf.get_submodule(path)
    layers = getattr(owner, leaf)
    setattr(owner, leaf, torch.nn.ModuleList(layers[i] for i in keep))
    hf.config.num_hidden_layers = len(keep)
    return hf


@pytest.mark.parametrize('name', MODELS)
def test_layers(name):
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    hf = build(name)
    if not has_layers(hf):
        pytest.skip('no single list of layers: refused')
    n = hf.config.num_hidden_layers
    assert torch.equal(logits(with_layers(hf, range(n))), logits(hf))
    if len(set(getattr(hf.config, 'layer_types', None) or [0])) == 1: # else surgery gives layers the wrong type
        small = with_layers(hf, [n-1])
        assert torch.equal(logits(small), logits(by_surgery(hf, [n-1])))
        assert small.config.num_hidden_layers == 1


@pytest.mark.parametrize('name', MODELS)
def test_units(name):
    torch.manual_seed(0)
    hf = build(name)
    if not has_layers(hf):
        pytest.skip('no single list of layers: refused')
    try:
        size_name, size, cuts = ffn_cuts(hf)
    except FastaiTLError as error:
        assert 'ffn' in str(error)
        pytest.skip('no plain feed-forward network: refused')
    kept = torch.stack([torch.randperm(size)[:size//2].sort().values for _ in cuts])
    small = cut_units(hf, cuts, kept, **{size_name: size//2})
    assert getattr(small.config, size_name) == size//2
    zeroed = copy.deepcopy(hf)
    with torch.no_grad():
        for cut, indices in zip(cuts, kept):
            gone = sorted({*range(size)} - {*indices.tolist()})
            module = zeroed.get_submodule(cut.columns)
            weight = module.weight.T if isinstance(module, Conv1D) else module.weight
            weight[:, gone] = 0
    assert (logits(small) - logits(zeroed)).abs().max() < 1e-5


def test_the_sweep_covers_many_families():
    able = [name for name in MODELS if has_layers(build(name))]
    assert len(able) > len(MODELS)//2 and {'bert', 'roberta', 'distilbert', 'electra', 'mpnet'} <= {*able}


@pytest.mark.parametrize('n_keys', [1, 2, 4])
def test_heads(n_keys, small_tokenizers):
    "A head whose output is not read is a head that is missing"
    tok = small_tokenizers['encoder']
    config = AutoConfig.for_model('llama', vocab_size=len(tok), hidden_size=16, intermediate_size=24, head_dim=8,
                                  num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=n_keys)
    torch.manual_seed(0)
    hf = AutoModel.from_config(config)
    n_heads, found_keys, cuts = head_cuts(hf)
    assert (n_heads, found_keys) == (4, n_keys)
    if n_keys == 1:
        return
    kept = torch.tensor([[0], [n_keys-1]])
    small = cut_units(hf, cuts, kept, num_attention_heads=4//n_keys, num_key_value_heads=1)
    zeroed = copy.deepcopy(hf)
    with torch.no_grad():
        for cut, (k,) in zip(cuts, kept.tolist()):
            is_kept = torch.arange(32)//cut.width == k
            zeroed.get_submodule(cut.columns).weight[:, ~is_kept] = 0
    assert (logits(small) - logits(zeroed)).abs().max() < 1e-6


@pytest.fixture
def learn(small_tokenizers):
    tok = small_tokenizers['encoder']
    seed_everything(1)
    dls = HFTextDataLoaders.from_lists(TEXTS, LABELS, tok, valid=VALID, max_length=40, bs=4, verbose=False)
    config = AutoConfig.for_model('bert', vocab_size=len(tok), hidden_size=16, num_hidden_layers=3,
                                  num_attention_heads=2, intermediate_size=32, pad_token_id=tok.pad_token_id)
    learn = hf_classifier_learner(dls, config)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3)
    return learn


def test_the_large_learner_stays_as_it_is(learn):
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    scores, log = learn.get_preds()[0], list(learn.recorder.values)
    small = learn.shrink(layers=2, ffn=.5, verbose=False)
    with small.no_bar(), small.no_logging():
        small.fit(1, 1e-2)
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())
    assert torch.equal(learn.get_preds()[0], scores) and list(learn.recorder.values) == log
    assert learn.model.hf.config.num_hidden_layers == 3 and small.model.hf.config.num_hidden_layers == 2


def test_the_small_learner_is_an_ordinary_one(learn, tmp_path):
    small = learn.shrink(layers=[0, 2], ffn=10, verbose=False)
    names = [group.name for group in layer_groups(small.model)]
    assert sum('layer' in name for name in names) == 2
    with small.no_bar(), small.no_logging():
        small.fit_gradual([1, 1, 1, 1])
    expected = small.predictor().predict_proba(TEXTS)
    small.save_bundle(tmp_path/'small')
    assert (load_bundle(tmp_path/'small', verbose=False).predict_proba(TEXTS) == expected).all()
    assert small.evaluate(TEXTS, LABELS).accuracy is not None


def test_frozen_layers_train_again(learn):
    learn.freeze()
    small = learn.shrink(layers=1, verbose=False)
    assert all(p.requires_grad for p in small.model.parameters())


def test_other_tasks(small_tokenizers):
    learn = tagger(small_tokenizers)
    small = learn.shrink(layers=1, ffn=.25, verbose=False)
    assert type(small) is type(learn) and small.model.hf.config.intermediate_size == 8
    assert len(small.tag(['the film was good'])) == 1
    one = with_one_output(learn).shrink(layers=1, verbose=False)
    assert one.model.hf.config.num_hidden_layers == 1


@pytest.mark.parametrize('options, message', [
    (dict(layers=0), '`layers`'), (dict(layers=4), '`layers`'), (dict(layers=[]), 'different layers'),
    (dict(layers=[0, 7]), 'at most 2'), (dict(layers='two'), '`layers`'), (dict(layers=True), '`layers`'),
    (dict(ffn=0.), '`ffn`'), (dict(ffn=1.5), '`ffn`'), (dict(ffn=99), '`ffn`'), (dict(ffn='half'), '`ffn`'),
    (dict(heads=1), 'divides the hidden size'), ({}, 'needs `layers`'), (dict(ffn=.5, n_batches=0), '`n_batches`')])
def test_bad_arguments(learn, options, message):
    with pytest.raises(FastaiTLError, match=message):
        learn.shrink(**options)
