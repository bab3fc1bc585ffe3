"""`fit_transfer` does what its table says for every family of model; plans change nothing.

Options that steady a fit do what they say; augmentation changes the training texts and nothing else."""

import math
import random
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import *
from fastai.callback.training import GradientClip
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import trainable_params
from torch import nn
from transformers import BertConfig, GPT2Config

from fastai_tl.all import *

TEXTS = [
    f'{a} {b} {c}'
    for a in ('the cat', 'a dog', 'my bird')
    for b in ('saw', 'met', 'heard')
    for c in ('a house', 'the hill', 'an old tree', 'us')
]
LABELS = [t.split()[1] for t in TEXTS]
FRAME = pd.DataFrame(dict(text=TEXTS, label=LABELS, valid=[i % 4 == 0 for i in range(len(TEXTS))]))
BERT = dict(
    hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, max_position_embeddings=64
)


@pytest.fixture(scope='module')
def tok():
    return train_tokenizer(TEXTS, 300, max_length=32)


@pytest.fixture(scope='module')
def gpt_tok():
    return train_tokenizer(TEXTS, 300, 'decoder', max_length=32)


def classifier(tok, **kw):
    seed_everything(0)
    return hf_classifier_learner(
        HFTextDataLoaders.from_df(FRAME, tok, valid_col='valid', bs=8, verbose=False, **kw),
        BertConfig(vocab_size=len(tok), **BERT),
        metrics=[],
    )


def tagger(tok):
    seed_everything(0)
    words = [t.split() for t in TEXTS]
    tags = [['B-X' if w in ('cat', 'dog', 'bird') else 'O' for w in ws] for ws in words]
    return hf_tagger_learner(
        HFTagDataLoaders.from_lists(words, tags, tok, valid=list(FRAME.valid), bs=8, verbose=False),
        BertConfig(vocab_size=len(tok), **BERT),
        metrics=[],
    )


def causal(gpt_tok):
    seed_everything(0)
    dls = HFCausalLMDataLoaders.from_texts(TEXTS * 4, gpt_tok, max_length=16, bs=4)
    return hf_causal_lm_learner(
        dls,
        GPT2Config(
            vocab_size=len(gpt_tok), n_embd=16, n_layer=3, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0
        ),
        metrics=[],
    )


def awd():
    seed_everything(0)
    texts = tokenize_texts_once(TEXTS, progress=False)
    labels, task = check_labels(FRAME.label, FRAME.index)
    dls = classifier_dls(
        texts,
        labels,
        task,
        [i for i, v in enumerate(FRAME.valid) if not v],
        [i for i, v in enumerate(FRAME.valid) if v],
        texts_vocab(texts, 1),
        bs=8,
    )
    return awd_classifier_learner(dls, task, 3, dict(emb_sz=16, n_hid=24, n_layers=2), metrics=[])


def plain():
    seed_everything(0)
    x, y = torch.randn(40, 5), torch.randint(0, 2, (40,))
    data = list(zip(x, y))
    return Learner(
        DataLoaders.from_dsets(data[:32], data[32:], bs=8, device='cpu'),
        nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)),
        loss_func=CrossEntropyLossFlat(),
        metrics=[],
        lr=1e-2,
    )


@pytest.fixture
def make(request, tok, gpt_tok):
    return dict(
        classifier=lambda: classifier(tok),
        tagger=lambda: tagger(tok),
        causal=lambda: causal(gpt_tok),
        awd=awd,
        plain=plain,
    )[request.param]


FAMILIES = ['classifier', 'tagger', 'causal', 'awd', 'plain']
each_family = pytest.mark.parametrize('make', FAMILIES, indirect=True)


class Seen(Callback):
    "For each epoch the groups that get gradients and step, and for each step the rates that are used"

    order = 90

    def before_fit(self):
        self.moved = []
        self.rates = []
        self.steps = 0

    def before_train(self):
        self.before = [[p.detach().clone() for p in g] for g in self.opt.param_lists]

    def before_step(self):
        self.rates.append([h['lr'] for h in self.opt.hypers])
        self.steps += 1

    def after_train(self):
        self.moved.append(
            [any(not torch.equal(p, q) for p, q in zip(g, b)) for g, b in zip(self.opt.param_lists, self.before)]
        )


def quietly(learn, **kw):
    "fit_transfer without output; what was seen, and the plan"
    seen = Seen()
    with learn.no_bar(), learn.no_logging():
        plan = learn.fit_transfer(cbs=seen, **kw)
    return seen, plan


@each_family
@pytest.mark.parametrize(
    'recipe', ['auto', 'full', 'discriminative', 'head_then_full', 'top_layers', 'gradual', 'ulmfit']
)
def test_table_is_what_is_trained(make, recipe):
    learn = make()
    announced = learn.transfer_plan(4, recipe).table()
    seen, plan = quietly(learn, epochs=4, recipe=recipe)
    assert announced.equals(plan.table())
    n, stage = len(learn.opt.param_lists), np.repeat(range(len(announced)), announced.epochs)
    assert len(seen.moved) == 4 and seen.steps == announced.steps.sum()
    for s, moved in zip(stage, seen.moved):  # all groups that are announced, and no other
        g = announced.groups.iloc[s]
        assert moved == [False] * (n - g) + [True] * g
    per_step = np.repeat(stage, announced.steps.sum() // 4)
    for s, row in enumerate(announced.itertuples()):
        rates = np.array(seen.rates)[per_step == s]
        assert rates[:, -1].max() <= row.lr * 1.001 and rates[:, -1].max() > 0.5 * row.lr
        assert np.allclose(rates[:, -1] / rates[:, n - row.groups], row.lr / row.lowest_lr)


@each_family
def test_family(make, request):
    plan = make().transfer_plan()
    kind = request.node.callspec.params['make']
    assert (
        plan.family
        == dict(classifier='encoder', tagger='encoder', causal='decoder', awd='AWD_LSTM', plain='other')[kind]
    )
    assert (
        plan.recipe
        == dict(
            classifier='head_then_full',
            tagger='head_then_full',
            causal='discriminative',
            awd='head_then_full',
            plain='full',
        )[kind]
    )


@each_family
def test_few_steps_leave_none_for_the_head(make, request):
    kind = request.node.callspec.params['make']
    plan = lambda *args, **kw: make().transfer_plan(*args, **kw)
    n = len(make().dls.train)
    assert (plan(3).recipe == 'full') == (kind in ('classifier', 'plain')) and (
        plan(math.ceil(128 / n)).recipe == 'full'
    ) == (kind == 'plain')
    if kind == 'classifier':
        assert (
            f'{3 * n} steps are too few' in plan(3).why
            and plan(min_steps=3 * n).recipe == 'full'
            and plan(math.ceil(128 / n) - 1).recipe == 'full'
        )
        assert (
            plan([1, 2]).recipe == plan(3, groups=[1, 6]).recipe == plan(3, 'head_then_full').recipe == 'head_then_full'
        )  # stages that are given


def state_of(learn):
    "All that a plan could change: objects, weights, modes, hooks, and the state of the random generators"
    model = learn.model
    weights = [w.clone() for w in model.state_dict().values()]
    flags = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    forwards = [m.__dict__.get('forward') for m in model.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    random_states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    return vars(learn).copy(), weights, (flags, forwards, hooks, list(learn.cbs), random_states)


@each_family
@pytest.mark.parametrize('with_opt', [False, True])
def test_plans_change_nothing(make, with_opt):
    "Planning, showing and describing leave the Learner, its model, its data and the random generators as they are"
    learn = make()
    learn.splitter = trainable_params  # fastai's default, for which the fit will put in layer groups
    if with_opt:
        learn.create_opt()
    attributes, weights, rest = state_of(learn)
    for kwargs in (dict(), dict(recipe='gradual', cache='auto'), dict(epochs=3, recipe='top_layers')):
        plan = learn.transfer_plan(**kwargs)
        plan.show()
        plan.table()
        plan.explain()
    attributes_after, weights_after, rest_after = state_of(learn)
    assert attributes.keys() == attributes_after.keys()
    assert all(attributes[name] is attributes_after[name] for name in attributes)
    assert all(torch.equal(a, b) for a, b in zip(weights, weights_after))
    assert rest == rest_after
    assert learn.splitter is trainable_params


def test_tags_have_a_rate_of_their_own(tok):
    assert np.isclose(tagger(tok).transfer_plan().lrs[-1], 4 * classifier(tok).transfer_plan().lrs[-1])


def test_cached_recipe_trains_as_the_uncached(tok):
    "The cache changes the time only: without dropout the weights come out the same"
    states = []
    for cache in (True, False):
        learn = classifier(tok)
        for m in learn.model.modules():
            if isinstance(m, nn.Dropout):
                m.p = 0.0
        _, plan = quietly(learn, epochs=3, recipe='head_then_full', cache=cache, mixed_precision=False)
        assert plan.cache is cache
        states.append({k: v.clone() for k, v in learn.model.state_dict().items()})
    assert max((states[0][k] - states[1][k]).abs().max().item() for k in states[0]) < 1e-4


def test_choices_by_hand(tok):
    learn = classifier(tok)
    plan = learn.transfer_plan([2, 1, 3], 'gradual', lr=3e-3, spread=9.0, groups=[1, 2, 6], cache=False)
    t = plan.table()
    assert t.groups.tolist() == [1, 2, 6] and t.epochs.tolist() == [2, 1, 3] and not plan.cache
    assert np.allclose(t.lr, [3e-2, 6e-3, 3e-3]) and np.isclose(t.lowest_lr.iloc[-1], 3e-3 / 9)
    seen, _ = quietly(learn, epochs=2, recipe='full', lr=5e-3, warmup=0.5)
    top = np.array(seen.rates)[:, -1]
    assert np.isclose(top.max(), 5e-3, rtol=1e-2) and abs(top.argmax() / len(top) - 0.5) <= 1 / len(top)


@each_family
def test_schedule(make, request):
    "A slanted triangle for Transformers, one cycle for the rest; either by hand, compared with its own formula"
    kind = request.node.callspec.params['make']
    plan = make().transfer_plan(recipe='full')
    expected = dict(awd=('one_cycle', 0.25, None), plain=('one_cycle', 0.25, None), tagger=('stlr', 0.1, 1.0))
    assert (plan.schedule, plan.warmup, plan.clip) == expected.get(kind, ('stlr', 0.1, None))
    for schedule, rises in (('stlr', 0.3), ('one_cycle', 0.6)):
        seen, plan = quietly(make(), epochs=2, recipe='full', lr=4e-3, schedule=schedule, warmup=rises)
        t = np.arange(seen.steps) / seen.steps
        if schedule == 'stlr':  # ULMFiT, equation 3, with its ratio of 32
            p = np.where(t < rises, t / rises, 1 - (t - rises) / (1 - rises))
            want = 4e-3 * (1 + p * 31) / 32
        else:
            want = np.where(
                t < rises,
                4e-3 / 25 + (4e-3 - 4e-3 / 25) * (1 - np.cos(np.pi * t / rises)) / 2,
                4e-8 + (4e-3 - 4e-8) * (1 + np.cos(np.pi * (t - rises) / (1 - rises))) / 2,
            )
        assert plan.warmup == rises and np.allclose(np.array(seen.rates)[:, -1], want, rtol=1e-4)


class Norms(Callback):
    "The norm of all gradients, as the optimizer gets them"

    order = 90

    def before_fit(self):
        self.norms = []

    def before_step(self):
        self.norms.append(
            torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None]).norm().item()
        )


@pytest.mark.parametrize('make', ['classifier', 'tagger'], indirect=True)
def test_clipping(make, request):
    kind = request.node.callspec.params['make']

    def norms(clip=(), cbs=(), own=()):
        learn, norms = make(), Norms()
        learn.add_cbs(own)
        with learn.no_bar(), learn.no_logging():
            plan = learn.fit_transfer(2, 'full', lr=1e-4, mixed_precision=False, cbs=[norms, *cbs], **dict(clip))
        return plan.clip, max(norms.norms)

    free = norms(dict(clip=None))
    assert free[0] is None and free[1] > 0.4
    clip, most = norms(dict(clip=0.1))
    assert clip == 0.1 and math.isclose(most, 0.1, rel_tol=1e-4)
    assert norms()[0] == (1.0 if kind == 'tagger' else None)
    for where in ('cbs', 'own'):  # a Learner's own is left alone, longer or shorter
        clip, most = norms(**{where: [GradientClip(0.2)]})
        assert clip is None and math.isclose(most, 0.2, rel_tol=1e-4)


@pytest.mark.parametrize(
    'kw, match',
    [
        (dict(schedule='stl'), 'stlr'),
        (dict(warmup=1.0), 'above 0 and below 1'),
        (dict(warmup=0), 'above 0 and below 1'),
        (dict(clip=0), 'above 0'),
        (dict(clip='yes'), 'above 0'),
    ],
)
def test_unusable_schedules(tok, kw, match):
    learn = classifier(tok)
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    with pytest.raises(FastaiTLError, match=match):
        learn.fit_transfer(1, **kw)
    assert all(torch.equal(before[k], v) for k, v in learn.model.state_dict().items())


@pytest.mark.parametrize('steps', [1, 13, 40])
def test_min_steps(tok, steps):
    learn = classifier(tok)
    per_epoch = len(learn.dls.train)
    seen, _ = quietly(learn, min_steps=steps)
    assert seen.steps == per_epoch * max(3, math.ceil(steps / per_epoch))


def test_few_texts_get_more_epochs_by_default(tok):
    learn = classifier(tok)
    per_epoch = len(learn.dls.train)
    assert (
        sum(learn.transfer_plan().epochs) == math.ceil(150 / per_epoch) > 3
        and f'one has {per_epoch} steps' in learn.transfer_plan().why
    )
    assert (
        sum(learn.transfer_plan(3).epochs) == 3
        and sum(learn.transfer_plan(min_steps=0).epochs) == 3
        and sum(awd().transfer_plan().epochs) == 6
    )


def test_best_epoch_is_restored(tok):
    "The last epochs are spoilt; what is restored has the lowest validation loss, by a loop of its own"

    class Spoil(Callback):
        def after_train(self):
            if self.epoch == 6:
                self.model.hf.classifier.weight.data.neg_()

    learn = classifier(tok)
    with learn.no_bar(), learn.no_logging():
        plan = learn.fit_transfer(8, 'full', lr=5e-3, best=True, mixed_precision=False, cbs=Spoil())
    losses = [v[1] for v in learn.recorder.values]
    assert plan.best.best_at == int(np.argmin(losses)) < 6
    total, n = 0.0, 0
    learn.model.eval()
    with torch.no_grad():
        for x, y in learn.dls.valid:
            total += nn.functional.cross_entropy(
                learn.model(x).as_subclass(torch.Tensor), y.as_subclass(torch.Tensor), reduction='sum'
            ).item()
            n += len(y)
    assert math.isclose(total / n, min(losses), rel_tol=1e-4) and losses[-1] > 1.3 * min(losses)


@pytest.mark.parametrize('k', [0, 1, 3])
def test_reinit_changes_those_layers(tok, k):
    learn = classifier(tok)
    before = {n: p.detach().clone() for n, p in learn.model.named_parameters()}
    reinit_top_layers(learn.model, k, pooler=False)
    changed = {n for n, p in learn.model.named_parameters() if not torch.equal(p, before[n])}
    assert {n.split('.layer.')[1].split('.')[0] for n in changed} == {str(i) for i in range(4 - k, 4)}
    weights = {
        n
        for n in before
        if '.layer.' in n and int(n.split('.layer.')[1].split('.')[0]) >= 4 - k and before[n].ndim == 2
    }
    assert weights <= changed  # norms and biases may be as they were: they start at one and nought


def test_aids_are_for_this_fit_only(tok):
    learn = classifier(tok)
    with learn.no_bar(): # fastai puts the progress bar back at the end of the list
        pass
    names = [type(o).__name__ for o in learn.cbs]
    own = learn.model.hf.bert.encoder.layer[-1].forward
    quietly(learn, epochs=1)
    assert [type(o).__name__ for o in learn.cbs] == names and learn.model.hf.bert.encoder.layer[-1].forward == own


def test_errors(tok):
    learn = classifier(tok)
    with pytest.raises(FastaiTLError, match='(?s)recipe.*gradual'):
        learn.fit_transfer(recipe='gradul')
    with pytest.raises(FastaiTLError, match='for each of the 2 stages'):
        learn.fit_transfer([1, 1, 1], 'head_then_full')
    with pytest.raises(FastaiTLError, match='must rise'):
        learn.fit_transfer(groups=[3, 2])
    with pytest.raises(FastaiTLError, match='at least 1'):
        learn.fit_transfer(-1)


def test_recipes_table():
    "What the package ships are the figures of the benchmark"
    t = recipes()
    assert (
        set(t.index) - {'Trainer, tuned'}
        == {'full', 'discriminative', 'head_then_full', 'top_layers', 'gradual', 'ulmfit'}
        and t.what.str.len().min() > 10
    )
    assert t.notna().all(axis=None) and {
        c.startswith('AWD_LSTM') for c in t.columns[1:] if t.loc['ulmfit', c] != 'not measured'
    } == {True}
    measured = pd.read_csv(Path(__file__).parents[1] / 'benchmarks' / 'recipes' / 'results' / 'summary.csv').set_index(
        ['set', 'size', 'recipe']
    )
    for name, size in (('IMDb', 250), ('TREC-6', 1500)):
        col = next(c for c in t.columns if c.startswith(f'{name} {size:,}'))
        row = measured.loc[name, size, 'head_then_full stlr']
        assert t.loc['head_then_full', col].startswith(f'{row.error:.1f} % ({row.low:.1f} to {row.high:.1f})')
    runs = pd.read_csv(Path(__file__).parents[1] / 'benchmarks' / 'recipes' / 'results' / 'more.csv')
    error = runs[(runs.study == 'awd') & (runs.set == 'TREC-6') & (runs.way == 'language model, ulmfit, 0.01')].error
    assert t.loc['ulmfit', 'AWD_LSTM: TREC-6 1,500 (validation)'] == f'{error.mean():.1f} % ± {error.std():.1f}'


# --- augmentation ---


def rows(ds):
    return [(x.tolist(), int(y)) for x, y in (ds[i] for i in range(len(ds)))]


def test_augmentation_is_for_training_texts(tok):
    learn = classifier(tok)
    dls = learn.dls
    train, valid = rows(dls.train_ds), rows(dls.valid_ds)
    with learn.no_bar():
        before = learn.get_preds()[0]
    augment_texts(dls, DropWords(0.4), SwapWords(0.4), MaskSpans(tok.mask_token, 0.3), share=1.0, seed=0)
    changed = rows(dls.train_ds)
    assert [y for _, y in changed] == [y for _, y in train] and rows(dls.valid_ds) == valid
    assert np.mean([a != b for (a, _), (b, _) in zip(changed, train)]) > 0.5
    with learn.no_bar():
        assert torch.equal(before, learn.get_preds()[0])
    assert learn.transfer_plan().cache is False, 'texts that change are not computed once'
    with pytest.raises(FastaiTLError, match='same every epoch'), learn.no_bar(), learn.no_logging():
        learn.fit_transfer(cache=True)
    augment_texts(dls)
    assert rows(dls.train_ds) == train and learn.transfer_plan().cache is True


def test_augmented_training_repeats_with_the_seed(tok):
    states = []
    for seed in (1, 1, 2):
        learn = classifier(tok)
        augment_texts(learn.dls, DropWords(0.3), SwapWords(0.3), seed=seed)
        quietly(learn, epochs=2, mixed_precision=False)
        states.append(torch.cat([p.detach().flatten() for p in learn.model.parameters()]))
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_augmentation_of_word_level_texts():
    learn = awd()
    train = rows(learn.dls.train_ds)
    augment_texts(learn.dls, DropWords(0.5), share=1.0, seed=0)
    got = rows(learn.dls.train_ds)
    assert [y for _, y in got] == [y for _, y in train]
    for (a, _), (b, _) in zip(got, train):  # what is left keeps its order
        it = iter(b)
        assert len(a) >= 1 and all(t in it for t in a)
    assert np.mean([len(a) / len(b) for (a, _), (b, _) in zip(got, train)]) < 0.75


def test_pairs_train_all_layers_from_the_start(tok):
    "The head alone cannot compare two texts, whatever the number of steps"
    dls = HFTextDataLoaders.from_lists(
        [[t, 'and so on'] for t in TEXTS], LABELS, tok, valid=list(FRAME.valid), bs=8, verbose=False
    )
    learn = hf_classifier_learner(dls, BertConfig(vocab_size=len(tok), **BERT), metrics=[])
    plan = learn.transfer_plan(100)
    assert plan.recipe == 'full' and 'two texts' in plan.why
    assert classifier(tok).transfer_plan(100).recipe == 'head_then_full'
    assert learn.transfer_plan(100, 'head_then_full').recipe == 'head_then_full'


def test_augmentation_of_pairs(tok):
    dls = HFTextDataLoaders.from_lists(
        [[t, 'and so on'] for t in TEXTS], LABELS, tok, valid=list(FRAME.valid), bs=8, verbose=False
    )
    whole = rows(dls.train_ds)
    augment_texts(dls, SwapWords(0.9), share=1.0, seed=0)
    got, bag = (
        rows(dls.train_ds),
        lambda x: sorted(tok.decode([i for i, t in zip(*x) if t == 0], skip_special_tokens=True).split()),
    )
    assert got != whole and all(
        bag(a) == bag(b) for (a, _), (b, _) in zip(got, whole)
    )  # words move within the first text, and none to the second


def test_tags_refuse_augmentation(tok):
    with pytest.raises(FastaiTLError, match='tagger'):
        augment_texts(tagger(tok).dls, DropWords())


@pytest.mark.parametrize('text', ['房間很乾淨，服務也很好。', 'We 住了 three 晚 at the hotel。'])
def test_chinese_words_are_characters(text):
    rng = np.random.default_rng(0)
    for _ in range(50):
        assert sorted(SwapWords(0.5)(text, rng).replace(' ', '')) == sorted(text.replace(' ', ''))
        left = DropWords(0.3)(text, rng)
        it = iter(text)
        assert left and all(c in it for c in left)
    words = (
        '房 間 很 乾 淨 ， 服 務 也 很 好 。'.split()
        if text[0] == '房'
        else 'We 住 了 three 晚 at the hotel 。'.split()
    )
    hidden = [MaskSpans('#', 0.4)(text, rng).count('#') for _ in range(200)]
    assert abs(np.mean(hidden) - 0.4 * len(words)) < 0.3 and max(hidden) <= math.ceil(0.4 * len(words))
