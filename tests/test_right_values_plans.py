"""What `fit_transfer` says before a fit is what the fit does: families of models × epochs × groups."""

import re

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.text.learner import awd_lstm_clas_split
from torch import nn
from transformers import BertConfig, GPT2Config, T5Config

from fastai_tl.all import *
from fastai_tl.models.layer_groups import group_names
from fastai_tl.tune.recipes import is_trained

TEXTS = [f'{a} {b} {c}' for a in ('the cat', 'a dog', 'my bird') for b in ('saw', 'met') for c in ('us', 'them')] * 2
LABELS = [text.split()[1] for text in TEXTS]
VALID = [i % 4 == 0 for i in range(len(TEXTS))]
FRAME = pd.DataFrame(dict(text=TEXTS, label=LABELS, valid=VALID))
BERT = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=32)


@pytest.fixture(scope='module')
def tok():
    return train_tokenizer(TEXTS, 200, max_length=16)


@pytest.fixture(scope='module')
def gpt_tok():
    return train_tokenizer(TEXTS, 200, 'decoder', max_length=16)


def classifier(tok, **kwargs):
    dls = HFTextDataLoaders.from_df(FRAME, tok, valid_col='valid', bs=8, verbose=False)
    return hf_classifier_learner(dls, BertConfig(vocab_size=len(tok), **BERT), metrics=[], **kwargs)


def coarse_names(tok):
    "A Learner whose splitter merges layers"
    return classifier(tok, splitter=layer_splitter(3))


def by_hand(tok):
    "A Learner whose splitter returns lists without names"

    def split(model):
        bert = model.hf.bert
        body = [bert.embeddings, bert.encoder.layer[0], bert.encoder.layer[1:]]
        head = [*bert.pooler.parameters(), *model.hf.classifier.parameters()]
        return [*(list(part.parameters()) for part in body), head]

    return classifier(tok, splitter=split)


def tagger(tok):
    words = [text.split() for text in TEXTS]
    tags = [['B-X' if word in ('cat', 'dog') else 'O' for word in ws] for ws in words]
    dls = HFTagDataLoaders.from_lists(words, tags, tok, valid=VALID, bs=8, verbose=False)
    return hf_tagger_learner(dls, BertConfig(vocab_size=len(tok), **BERT), metrics=[])


def causal(gpt_tok):
    dls = HFCausalLMDataLoaders.from_texts(TEXTS * 2, gpt_tok, max_length=16, bs=4)
    config = GPT2Config(vocab_size=len(gpt_tok), n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0,
                        eos_token_id=0)
    return hf_causal_lm_learner(dls, config, metrics=[])


def awd(splitter=None):
    texts = tokenize_texts_once(TEXTS, progress=False)
    labels, task = check_labels(FRAME.label, FRAME.index)
    train, valid = [[i for i, is_valid in enumerate(VALID) if is_valid == part] for part in (False, True)]
    dls = classifier_dls(texts, labels, task, train, valid, texts_vocab(texts, 1), bs=8)
    learn = awd_classifier_learner(dls, task, 3, dict(emb_sz=8, n_hid=12, n_layers=2), metrics=[])
    if splitter is not None:
        learn.splitter = splitter
        learn.opt = None
    return learn


def plain():
    x, y = torch.randn(20, 5), torch.randint(0, 2, (20,))
    data = list(zip(x, y))
    layers = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    dls = DataLoaders.from_dsets(data[:16], data[16:], bs=8, device='cpu')
    return Learner(dls, layers, loss_func=CrossEntropyLossFlat(), metrics=[], lr=1e-2)


FAMILIES = dict(
    classifier=lambda tok, gpt_tok: classifier(tok),
    merged=lambda tok, gpt_tok: coarse_names(tok),
    by_hand=lambda tok, gpt_tok: by_hand(tok),
    tagger=lambda tok, gpt_tok: tagger(tok),
    causal=lambda tok, gpt_tok: causal(gpt_tok),
    awd=lambda tok, gpt_tok: awd(),
    awd_fastai=lambda tok, gpt_tok: awd(awd_lstm_clas_split),
    plain=lambda tok, gpt_tok: plain(),
)


@pytest.fixture
def make(request, tok, gpt_tok):
    def new():
        seed_everything(0)
        return FAMILIES[request.param](tok, gpt_tok)

    return new


each_family = pytest.mark.parametrize('make', FAMILIES, indirect=True)


class Seen(Callback):
    "For each epoch: the layers that change, whether states were stored, and the rates of its steps"

    order = 90

    def before_fit(self):
        self.epochs = []

    def before_train(self):
        self.before = [p.detach().clone() for p in self.model.parameters()]
        cached = getattr(self.learn, 'cached_prefix', None)
        self.epochs.append(dict(stored=bool(cached is not None and cached._active), rates=[]))

    def before_step(self):
        self.epochs[-1]['rates'].append([hyper['lr'] for hyper in self.opt.hypers])

    def after_train(self):
        params = list(self.model.parameters())
        moved = {id(p) for p, old in zip(params, self.before) if not torch.equal(p, old)}
        groups = [any(id(p) in moved for p in group) for group in self.opt.param_lists]
        self.epochs[-1]['groups'] = groups
        trained = [p for group, moves in zip(self.opt.param_lists, groups) if moves for p in group]
        self.epochs[-1]['layers'] = group_names(self.model, [trained], self.splitter)[0]
        self.epochs[-1]['names'] = group_names(self.model, self.opt.param_lists, self.splitter)


def said(explanation, names):
    "What an explanation announces: for each epoch the layers, whether they are computed once, and the rates"
    first = explanation.splitlines()[0].split(': ', 1)[1]
    stages, _, rest = first.partition('. ')
    epochs = []
    for stage in stages.rstrip('.').split('; then '):
        what, n_epochs = re.match(r'(.*?) for (\d+) epochs?(?:,|$)', stage).groups()
        layers = what.removeprefix('the ').removesuffix(' alone')
        layers = f'{names[0].split(" – ")[0]} – {names[-1].split(" – ")[-1]}' if what == 'all layers' else layers
        layers = ' – '.join(dict.fromkeys(layers.split(' – ')))
        rates = next((word for word in ('one rate', 'lower rates') if word in stage), None)
        epochs += int(n_epochs) * [dict(layers=layers, stored='computed once' in stage, rates=rates,
                                        frozen='frozen layers' in stage)]
    never = re.search(r'Never trained: (.*?)\.( |$)', rest)
    return epochs, never[1] if never else None, re.findall(r'Left out, .*?: (.*?)\.(?: |$)', rest)


def check(learn, seen, plan):
    explanation = plan.explain()
    names = seen.epochs[0]['names']
    announced, never, _ = said(explanation, names)
    assert len(announced) == len(seen.epochs), explanation
    for told, did in zip(announced, seen.epochs):
        assert told['layers'] == did['layers'], explanation
        assert told['stored'] == did['stored'], explanation
        assert told['frozen'] == (not all(did['groups'])), explanation
        rates = np.array(did['rates'])[:, did['groups']]
        spread = rates[:, -1] / rates[:, 0]
        assert (told['rates'] == 'lower rates') == bool((spread > 1.001).all()), explanation
        assert sum(did['groups']) == 1 or told['rates'] is not None, explanation
    ever = np.any([epoch['groups'] for epoch in seen.epochs], axis=0)
    frozen = [name for name, moves in zip(names, ever) if not moves]
    assert (never is None) == (not frozen), explanation
    assert never is None or (never.split(' – ')[0], never.split(' – ')[-1]) == (
        frozen[0].split(' – ')[0], frozen[-1].split(' – ')[-1])
    if plan.unfreezing is not None:  # the two tables name the same layers, sizes and epochs
        table, done = plan.table(), plan.unfreezing.table()
        assert table.layers.tolist() == done.layers.tolist() and table.params.tolist() == done.params.tolist()
        assert table.epochs.tolist() == done.epochs.tolist() and table.groups.tolist() == done.groups.tolist()
        stored = {i: e['stored'] for i, e in zip(np.repeat(table.index, table.epochs), seen.epochs)}
        assert [row == 'computed once' for row in table.frozen] == [stored[i] for i in table.index]
    assert learn.layer_table().layers.tolist() == names


def fit(learn, *args, **kwargs):
    seen = Seen()
    with learn.no_bar(), learn.no_logging():
        plan = learn.fit_transfer(*args, cbs=seen, **kwargs)
    return seen, plan


def slow(*values):
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@each_family
@pytest.mark.parametrize('recipe', ['auto', 'ulmfit', *slow('head_then_full', 'gradual', 'top_layers', 'full')])
@pytest.mark.parametrize('epochs', [1, 2, *slow(5)])
def test_explanation_is_what_the_fit_does(make, recipe, epochs):
    learn = make()
    seen, plan = fit(learn, epochs, recipe)
    check(learn, seen, plan)
    assert len(seen.epochs) == epochs
    n_stages = len(make().transfer_plan(9, plan.recipe).groups)
    assert len(said(plan.explain(), seen.epochs[0]['names'])[2]) == (n_stages > epochs)


@each_family
@pytest.mark.parametrize('groups, epochs', [([1], None), ([1, 2], [1, 1]), ([2], 1), ([1, 2], 1), ([1, 2], [0, 2])])
@pytest.mark.parametrize('cache', ['auto', *slow(False, True)])
def test_stages_by_hand(make, groups, epochs, cache):
    learn = make()
    kind = type(learn.model).__name__
    if cache is True and kind == 'Sequential' and not hasattr(learn.dls, 'spec'):
        pytest.skip('a plain model has no layers whose output can be stored')
    if max(groups) > len(learn.transfer_plan().layers):
        pytest.skip('too few groups')
    seen, plan = fit(learn, epochs, groups=groups, cache=cache, min_steps=0)
    check(learn, seen, plan)
    assert '`groups` as asked' in plan.why and 'Evidence' not in plan.explain()


@pytest.mark.parametrize('spread', [1., 4.])
def test_spread_is_said(tok, spread):
    learn = classifier(tok)
    check(learn, *fit(learn, 2, spread=spread))


def test_an_epoch_for_the_head_is_not_announced_if_there_is_none():
    "One epoch of AWD_LSTM with random weights: no epoch for the head, no encoder that had been trained"
    plan = awd().transfer_plan(1)
    text = plan.explain()
    first = text.splitlines()[0]
    assert first == ('head_then_full: all layers for 1 epoch, lower layers at lower rates. '
                     'Left out, since 1 epoch is too few for it: the head alone.')
    assert 'not measured for random weights' in plan.why and 'Evidence' not in text


def test_reasons_are_those_of_this_model(tok, gpt_tok):
    "Random weights are named as such, trained ones are not; language models with random weights have no trained head"
    for kind, make in FAMILIES.items():
        learn = make(tok, gpt_tok)
        before = learn.transfer_plan()
        assert 'did best' not in before.why and not before.measured, kind
        if kind == 'causal':
            assert 'random weights' in before.why and 'trained already' not in before.why
        with torch.no_grad():
            for p in learn.model.parameters():
                p += .3 * torch.randn_like(p)
        after = learn.transfer_plan(min_steps=4000)
        assert 'random weights' not in after.why, kind
        measured = kind not in ('causal', 'plain')
        assert after.measured == measured == ('did best' in after.why) == ('Evidence' in after.explain()), kind
    assert 'not measured for encoder-decoders' in choose_recipe('encoder-decoder', 6)[1]


def test_is_trained(tok, gpt_tok):
    for kind, make in FAMILIES.items():
        learn = make(tok, gpt_tok)
        assert is_trained(learn.model) is (None if kind == 'plain' else False)
        with learn.no_bar(), learn.no_logging():
            learn.fit(1, 1e-2)
        assert is_trained(learn.model) is (None if kind == 'plain' else True), kind
    config = T5Config(vocab_size=30, d_model=16, d_ff=16, d_kv=8, num_layers=2, num_heads=2)
    from transformers import T5ForConditionalGeneration

    model = T5ForConditionalGeneration(config)
    assert is_trained(model) is False
    nn.init.normal_(model.encoder.block[0].layer[0].layer_norm.weight)
    assert is_trained(model) is True


def test_steps_that_add_epochs(tok):
    "More epochs than asked for are said with the reason; whole, positive numbers only"
    learn = classifier(tok)
    n = len(learn.dls.train)
    plan = learn.transfer_plan(2, min_steps=4 * n)
    assert sum(plan.epochs) == 4 and f'4 epochs, not 2, to reach {4 * n} steps' in plan.why
    assert 'epochs' not in learn.transfer_plan(2).why
    for epochs in (0, -1, 1.5, [0, 0], [1, -1], [.5, 1]):
        with pytest.raises(FastaiTLError, match='`epochs'):
            classifier(tok).transfer_plan(epochs, 'head_then_full')


def test_what_else_happens(tok):
    "Layers that start again and the best epoch are said too"
    learn = classifier(tok)
    with learn.no_bar(), learn.no_logging():
        plan = learn.fit_transfer(2, reinit=1, best=True)
    assert 'The top layer starts from random weights.' in plan.explain()
    assert 'the epoch with the lowest validation loss are restored' in plan.explain()
    assert 'restored' not in learn.transfer_plan(2).explain()


@pytest.mark.parametrize('tied', ['head', 'embeddings'])
@pytest.mark.parametrize('n_groups', [None, 2, 3])
def test_a_layer_has_one_name_in_all_tables(gpt_tok, tied, n_groups):
    learn = causal(gpt_tok)
    learn.splitter = layer_splitter(n_groups, tied=tied)
    learn.opt = None
    seen, plan = fit(learn, 2, groups=[1, 2], min_steps=0)
    check(learn, seen, plan)
