"Blends: the formula for every kind of classifier, weights that no text has a part in, bundles, and errors"

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import minimize
from small_learners import LABELS, TEXTS, classifier, sentences, ulmfit_classifier

from fastai_tl.all import *
from fastai_tl.deploy.blending import blended, fit_weights, out_of_fold

NEW = sentences(40, seed=5)
SEVERAL = [['x', 'y'], ['y'], [], ['x'], ['z', 'x']] * 8
FEW = dict(n_folds=2, verbose=False)


def table(labels):
    return pd.DataFrame(dict(text=NEW, label=labels))


def bag(labels=LABELS, texts=TEXTS):
    return BagOfWords(min_df=1, C=1).fit(texts, labels)


def softmax(z):
    return np.exp(z) / np.exp(z).sum(1, keepdims=True)


def pair(toks):
    "A forward and a backward classifier"
    forward = ulmfit_classifier(toks)
    tokenized = tokenize_texts_once(TEXTS)
    rows = list(range(22))
    options = dict(bs=4, backwards=True)
    dls = classifier_dls(tokenized, LABELS, 'classification', rows[:20], rows[20:], texts_vocab(tokenized), **options)
    config = dict(emb_sz=16, n_hid=16, n_layers=1)
    return BidirectionalLearner(forward, awd_classifier_learner(dls, 'classification', 3, config, metrics=[]))


@pytest.mark.parametrize('make', [classifier, ulmfit_classifier, pair])
def test_probabilities_are_those_of_the_formula(make, small_tokenizers):
    learn, words = make(small_tokenizers), bag()
    made = learn.blend(words, table((['a', 'b', 'c', 'b'] * 10)), **FEW)
    model = np.log(learn.predict_batch(TEXTS).probs)
    z = made.weights[0] * model + made.weights[1] * np.log(words.predict_proba(TEXTS)) + made.bias
    preds = made.predict_batch(TEXTS)
    np.testing.assert_allclose(preds.probs, softmax(z), atol=1e-5)
    ev = made.evaluate(table((['a', 'b', 'c', 'b'] * 10)))
    assert ev.accuracy == np.mean(np.array(made.predict_batch(NEW).labels) == ['a', 'b', 'c', 'b'] * 10)


def test_several_labels(small_tokenizers, tmp_path):
    data = dict(data='multi', labels=SEVERAL[:20] + [['x'], ['y']])
    learn, words = classifier(small_tokenizers, **data), bag(SEVERAL[:22])
    made = learn.blend(words, NEW, SEVERAL, **FEW)
    logit = lambda p: np.log(p / (1 - p))
    parts = logit(learn.predict_batch(TEXTS).probs), logit(words.predict_proba(TEXTS))
    z = made.weights[0] * parts[0] + made.weights[1] * parts[1] + made.bias
    np.testing.assert_allclose(made.predict_batch(TEXTS).probs, 1 / (1 + np.exp(-z)), atol=1e-5)
    again = load_blend(made.save(tmp_path / 'blend'))
    np.testing.assert_allclose(again.predict_batch(TEXTS).probs, made.predict_batch(TEXTS).probs, atol=1e-6)


@pytest.mark.parametrize('task', ['classification', 'multilabel'])
def test_weights_are_those_of_another_optimizer(task):
    rng = np.random.default_rng(3)
    parts, y = rng.normal(size=(2, 50, 3)), np.eye(3)[rng.integers(0, 3, 50)]

    def loss(theta):
        z = theta[0] * parts[0] + theta[1] * parts[1] + theta[2:]
        if task == 'classification':
            nll = -np.log(softmax(z)[y > 0]).sum()
        else:
            nll = -np.log(np.where(y > 0, 1 / (1 + np.exp(-z)), 1 / (1 + np.exp(z)))).sum()
        return nll + ((theta - [1, 0, 0, 0, 0]) ** 2).sum() / (2 * 0.7)

    found = minimize(loss, np.zeros(5), method='Nelder-Mead', options=dict(maxiter=20000, xatol=1e-7, fatol=1e-12))
    np.testing.assert_allclose(np.concatenate(fit_weights(parts, y, task, 0.7)), found.x, atol=1e-4)


def test_the_label_of_a_text_does_not_change_its_own_score():
    rng = np.random.default_rng(0)
    parts, y = rng.normal(size=(2, 30, 2)), np.eye(2)[rng.integers(0, 2, 30)]
    folds = [(np.arange(10, 30), np.arange(10)), (np.arange(10), np.arange(10, 30))]
    before = out_of_fold(parts, y, 'classification', 1.0, folds)
    y[3] = y[3][::-1]
    after = out_of_fold(parts, y, 'classification', 1.0, folds)
    assert np.array_equal(before[:10], after[:10]) and not np.array_equal(before[10:], after[10:])
    np.testing.assert_allclose(
        after[:10], blended(parts[:, :10], *fit_weights(parts[:, 10:], y[10:], 'classification'))
    )


def test_own_texts_of_a_learner(small_tokenizers):
    "The bag of words learns the training texts, and the validation texts decide; more of them, to have enough"
    texts, labels = TEXTS[:20] + NEW, LABELS[:20] + ['a', 'b', 'c', 'b'] * 10
    dls = HFTextDataLoaders.from_lists(
        texts, labels, small_tokenizers['encoder'], valid=[i >= 20 for i in range(60)], verbose=False
    )
    learn = hf_classifier_learner(dls, classifier(small_tokenizers).model.hf)
    own = learn.blend(BagOfWords(min_df=1, C=1), **FEW)
    given = learn.blend(bag(LABELS[:20], TEXTS[:20]), table(labels[20:]), **FEW)
    np.testing.assert_array_equal(own.weights, given.weights)
    assert own.table.equals(given.table) and own.n == 40


def test_the_order_of_the_classes_of_the_bag_does_not_matter(small_tokenizers):
    learn, data = classifier(small_tokenizers), table(['a', 'b', 'c', 'b'] * 10)
    turned = BagOfWords(min_df=1, C=1).fit(TEXTS, LABELS, classes=['c', 'a', 'b'])
    a, b = (learn.blend(words, data, **FEW).predict_batch(NEW).probs for words in (bag(), turned))
    np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize('make', [ulmfit_classifier, pair])
def test_saved_blends_of_an_awd_lstm(make, small_tokenizers, tmp_path):
    made = make(small_tokenizers).blend(bag(), table(['a', 'b', 'c', 'b'] * 10), **FEW)
    again = load_blend(made.save(tmp_path / 'blend'))
    np.testing.assert_allclose(again.predict_batch(NEW).probs, made.predict_batch(NEW).probs, atol=1e-6)
    assert not [p for p in (tmp_path / 'blend').rglob('*') if p.suffix in ('.pkl', '.pth', '.pt')]


def test_a_blend_keeps_the_weights_that_it_was_made_with(small_tokenizers, tmp_path):
    learn = classifier(small_tokenizers)
    made = learn.blend(bag(), table(['a', 'b', 'c', 'b'] * 10), **FEW)
    before = made.predict_batch(NEW).probs
    with torch.no_grad():
        learn.model.hf.classifier.weight.add_(1)
    np.testing.assert_array_equal(made.predict_batch(NEW).probs, before)
    with pytest.raises(FastaiTLError, match='trained since then'):
        made.save(tmp_path / 'blend')


def test_another_bundle_in_the_folder_is_an_error(small_tokenizers, tmp_path):
    learn = classifier(small_tokenizers)
    learn.blend(bag(), table(['a', 'b', 'c', 'b'] * 10), **FEW).save(tmp_path / 'blend')
    classifier(small_tokenizers).save_bundle(tmp_path / 'blend' / 'model')
    with pytest.raises(FastaiTLError, match='another bundle'):
        load_blend(tmp_path / 'blend')


def test_errors(small_tokenizers):
    value = classifier(small_tokenizers, [0.5] * 22, data='value')
    with pytest.raises(FastaiTLError, match='a regression'):
        value.blend()
    with pytest.raises(FastaiTLError, match='Pass `train=`'):
        ulmfit_classifier(small_tokenizers).blend(data=table(['a', 'b', 'c', 'b'] * 10))
    with pytest.raises(FastaiTLError, match='Pass `data=`'):
        ulmfit_classifier(small_tokenizers).blend(bag())
    with pytest.raises(FastaiTLError, match='must have the classes'):
        classifier(small_tokenizers).blend(bag(['x', 'y'] * 11), table(['a', 'b'] * 20))
    with pytest.warns(UserWarning, match='also training texts'):
        classifier(small_tokenizers).blend(
            BagOfWords(min_df=1, C=1), TEXTS, LABELS, train=pd.DataFrame(dict(text=TEXTS, label=LABELS)), **FEW
        )
