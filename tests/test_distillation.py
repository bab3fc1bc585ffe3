"""Distillation: the loss is that of the formula, the teacher reads each text once, classes are matched by name, texts
of the validation set are left out, and fits are those that the definition says."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from fastai.losses import CrossEntropyLossFlat, LabelSmoothingCrossEntropyFlat
from fastai.text.all import AWD_LSTM, TextDataLoaders, awd_lstm_clas_config, text_classifier_learner
from fastcore.all import merge
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import MultinomialNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from small_learners import LABELS, MAKERS, N_ROWS, SEVERAL, TEXTS, VALID, bert, classifier, sentences, ulmfit_classifier

from fastai_tl.all import *
from fastai_tl.deploy import engines
from fastai_tl.tune.distillation import NO_LABEL, soft_losses

NEW = sentences(12, seed=7)  # texts without labels


@pytest.fixture
def folder(tmp_path):
    return tmp_path / 'scores'


@pytest.fixture
def n_read(monkeypatch):
    "Counts the rows that any engine reads"
    counts = []
    for cls in (engines.HFEngine, engines.AWDEngine):

        def call(self, rows, before=cls.__call__):
            counts.append(len(rows))
            return before(self, rows)

        monkeypatch.setattr(cls, '__call__', call)
    return counts


def seeded(make, *args, seed=0, **kwargs):
    seed_everything(seed)
    return make(*args, **kwargs)


def trained(learn, n_epoch=2, lr=1e-2, **kwargs):
    "All weights after a fit with fixed random numbers"
    seed_everything(1)
    with learn.no_bar(), learn.no_logging():
        learn.fit(n_epoch, lr, **kwargs)
    return torch.cat([p.detach().flatten() for p in learn.model.parameters()])


def distill(teacher, student, texts=NEW, **kwargs):
    teacher.distill_into(student, texts, verbose=False, **kwargs)
    return student


# --- the loss ---


@pytest.mark.parametrize('temperature', [0.5, 1.0, 4.0])
def test_loss_is_that_of_the_formula(temperature):
    rng = np.random.default_rng(0)
    z, t = rng.normal(size=(2, 6, 3)) * 3
    y = np.array([0, NO_LABEL, 2, 1, NO_LABEL, NO_LABEL])
    softmax = lambda o: np.exp(o) / np.exp(o).sum(1, keepdims=True)
    p, q = softmax(t / temperature), softmax(z / temperature)
    soft = temperature**2 * (p * np.log(p / q)).sum(1).mean()
    hard = -np.log(softmax(z)[[0, 2, 3], [0, 2, 1]]).sum() / 6
    loss = DistillationLoss(CrossEntropyLossFlat(), 'classification', temperature, alpha=0.3)
    found = loss(torch.tensor(z), torch.tensor(y), torch.tensor(t))
    assert abs(float(found) - (0.3 * soft + 0.7 * hard)) < 1e-5


@pytest.mark.parametrize('task', ['classification', 'multilabel', 'regression'])
def test_gradient_is_that_of_differences(task):
    torch.manual_seed(0)
    z, t = torch.randn(2, 4, 3, dtype=torch.double)
    f = lambda z: soft_losses(z.double(), t, task, 2.0).sum()
    z.requires_grad_()
    (grad,) = torch.autograd.grad(f(z), z)
    h = 1e-2
    for i, j in ((0, 0), (3, 2)):
        step = torch.zeros_like(z)
        step[i, j] = h
        assert abs((f(z + step) - f(z - step)) / (2 * h) - grad[i, j]) < 1e-3


# --- fits ---


@pytest.mark.parametrize('name', ['classifier', 'class_weights', 'multilabel', 'regression', 'ulmfit_classifier'])
def test_alpha_0_is_ordinary_training_bit_by_bit(name, small_tokenizers, folder):
    make = MAKERS[name]
    teacher = seeded(make, small_tokenizers, seed=5)
    ordinary = trained(seeded(make, small_tokenizers))
    texts = NEW + TEXTS if name == 'ulmfit_classifier' else NEW
    student = distill(teacher, seeded(make, small_tokenizers), texts, alpha=0.0, folder=folder)
    assert torch.equal(trained(student), ordinary)
    assert not torch.equal(
        trained(distill(teacher, seeded(make, small_tokenizers), texts, alpha=0.5, folder=folder)), ordinary
    )


def test_label_smoothing_acts_on_labels_only(small_tokenizers, folder):
    teacher = seeded(classifier, small_tokenizers, seed=5)
    student = distill(
        teacher, classifier(small_tokenizers, loss_func=LabelSmoothingCrossEntropyFlat()), alpha=0.5, folder=folder
    )
    pred, scores = torch.randn(2, 3, 3)
    y = torch.tensor([1, NO_LABEL, NO_LABEL])
    expected = 0.5 * soft_losses(pred, scores, 'classification', 2.0).mean()
    expected += 0.5 * LabelSmoothingCrossEntropyFlat()(pred[:1], y[:1]) / 3
    torch.testing.assert_close(student.loss_func(pred, y, scores), expected)


@pytest.mark.parametrize('loss', [torch.nn.CrossEntropyLoss(), partial(F.cross_entropy, label_smoothing=0.1)])
def test_loss_functions_of_pytorch(loss, small_tokenizers, folder):
    teacher = seeded(classifier, small_tokenizers, seed=5)
    student = distill(teacher, classifier(small_tokenizers, loss_func=loss), alpha=0.5, folder=folder)
    assert spec_of(student).task == 'classification' and trained(student, 1).isfinite().all()
    with student.no_bar():
        losses = student.get_preds(with_loss=True)[-1]
        logits, targets = student.get_preds(act=lambda o: o)[:2]
    torch.testing.assert_close(losses, each_loss(loss, logits, targets))


def each_loss(loss, logits, targets):
    return torch.stack([loss(logit[None], target[None]) for logit, target in zip(logits, targets)])


class Losses(Callback):
    "Record each training batch's targets, predictions and loss"

    order = 100

    def before_fit(self):
        self.found = []

    def after_loss(self):
        if self.training:
            self.found.append((self.pred.detach(), *self.yb, self.loss.detach()))


def test_training_batches_have_all_texts_with_the_scores_of_the_teacher(small_tokenizers, folder):
    teacher = seeded(classifier, small_tokenizers, seed=5)
    student = distill(teacher, seeded(classifier, small_tokenizers), alpha=0.4, temperature=3.0, folder=folder)
    losses = Losses()
    trained(student, 1, cbs=losses)
    pred, y, scores = (torch.cat([batch[i] for batch in losses.found]) for i in range(3))
    expected = teacher.predict_batch(TEXTS[:20] + NEW).scores
    same = np.abs(scores.numpy()[:, None] - expected[None]).max(-1) < 1e-4
    assert same.any(0).all() and len(scores) == 32
    assert int((y != NO_LABEL).sum()) == 20
    for pred, y, scores, loss in losses.found:
        soft = torch.nn.functional.kl_div((pred / 3).log_softmax(-1), (scores / 3).softmax(-1), reduction='batchmean')
        known = y != NO_LABEL
        hard = torch.nn.functional.cross_entropy(pred[known], y[known], reduction='sum') / len(y)
        torch.testing.assert_close(loss, 0.4 * 9 * soft + 0.6 * hard)


def test_accumulated_gradients_are_those_of_one_batch(small_tokenizers, folder):
    config = bert(small_tokenizers['encoder'], hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)

    def student(bs):
        seed_everything(0)
        dls = HFTextDataLoaders.from_lists(
            TEXTS, LABELS, small_tokenizers['encoder'], valid=VALID, bs=bs, verbose=False
        )
        return distill(teacher, hf_classifier_learner(dls, config, metrics=[]), alpha=0.5, folder=folder, bs=bs)

    teacher = seeded(classifier, small_tokenizers, seed=5)
    whole, parts = student(32), student(4)
    whole_weights = trained(whole, 1, 1e-2)
    parts_weights = trained(parts, 1, 1e-2, cbs=GradientAccumulation(32))
    # Adam's first step only depends on the gradient's sign where it is large, so the gradients are compared by a sum
    torch.testing.assert_close(parts_weights, whole_weights, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('task', ['classification', 'multilabel'])
def test_frozen_layers_computed_once_give_the_same_fit(task, small_tokenizers, folder):
    config = bert(small_tokenizers['encoder'], hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    labels = LABELS if task == 'classification' else SEVERAL

    def make(seed):
        tok = small_tokenizers['encoder']
        dls = HFTextDataLoaders.from_lists(TEXTS, labels, tok, valid=VALID, bs=4, task=task, verbose=False)
        return seeded(hf_classifier_learner, dls, config, metrics=[], seed=seed)

    def losses(cache):
        learn = distill(teacher, make(0), NEW + TEXTS, alpha=0.5, folder=folder)
        seed_everything(1)
        with learn.no_bar(), learn.no_logging():
            learn.fit_gradual(cache=cache)
        return torch.stack(learn.recorder.losses), torch.tensor(learn.recorder.values)

    teacher = make(5)
    for cached, whole in zip(losses(True), losses(False)):
        torch.testing.assert_close(cached, whole, rtol=1e-3, atol=1e-4)


def test_rdrop_and_mixed_precision_train(small_tokenizers, folder):
    teacher = seeded(classifier, small_tokenizers, seed=5)
    student = distill(teacher, seeded(classifier, small_tokenizers).to_bf16(), folder=folder, alpha=0.5)
    losses = Losses()
    assert trained(student, 1, cbs=[RDrop(), losses]).isfinite().all()
    assert all(loss.isfinite() for *_, loss in losses.found)


class Crash(Callback):
    def before_epoch(self):
        if self.epoch == 2:
            raise KeyboardInterrupt


def test_resumed_distillation_is_the_same(small_tokenizers, folder, tmp_path):
    def fit(name, more=(), **kwargs):
        learn = distill(teacher, seeded(classifier, small_tokenizers), folder=folder, **kwargs)
        return trained(learn, 4, cbs=[ResumableFit(tmp_path / name), *more])

    teacher = seeded(classifier, small_tokenizers, seed=5)
    whole = fit('a')
    with pytest.raises(KeyboardInterrupt):
        fit('b', [Crash()])
    with pytest.raises(RunError, match='alpha: 0.9 → 0.5'):
        fit('b', alpha=0.5)
    assert torch.equal(fit('b'), whole)


# --- scores of the teacher ---


def test_one_pass_of_the_teacher(small_tokenizers, folder, n_read):
    teacher = seeded(classifier, small_tokenizers, seed=5)
    distill(teacher, classifier(small_tokenizers), folder=folder)
    assert sum(n_read) == len(set(TEXTS[:20] + NEW))
    n_read.clear()
    again = seeded(classifier, small_tokenizers, seed=5)  # the same weights in another object
    found = again.distill_into(classifier(small_tokenizers), NEW, folder=folder, temperature=5.0, verbose=False)
    bag = make_pipeline(CountVectorizer(), LogisticRegression())
    again.distill_into(bag, NEW, folder=folder, verbose=False)
    assert sum(n_read) == 0 and found.n_computed == 0
    distill(again, classifier(small_tokenizers), [*NEW, 'one more text'], folder=folder)
    assert sum(n_read) == 1
    with torch.no_grad():
        next(again.model.parameters())[0, 0] += 1e-3  # another teacher
    distill(again, classifier(small_tokenizers), folder=folder)
    assert sum(n_read) == 1 + len(set(TEXTS[:20] + NEW))


@pytest.mark.parametrize('damage', ['cut', 'changed', 'foreign'])
def test_damaged_scores_are_computed_again(damage, small_tokenizers, folder, n_read):
    teacher = seeded(classifier, small_tokenizers, seed=5)
    student = distill(teacher, classifier(small_tokenizers), folder=folder)
    expected = student.dls.train_ds.scores.clone()
    (file,) = folder.iterdir()
    content = bytearray(file.read_bytes())
    content[len(content) - 9] ^= 4
    file.write_bytes(dict(cut=bytes(content[:100]), changed=bytes(content), foreign=b'{}')[damage])
    n_read.clear()
    with pytest.warns(UserWarning, match='computed again'):
        distill(teacher, classifier(small_tokenizers), folder=folder)
    assert sum(n_read) == len(set(TEXTS[:20] + NEW))
    n_read.clear()
    student = distill(teacher, classifier(small_tokenizers), folder=folder)  # the file is good again
    assert sum(n_read) == 0 and torch.equal(student.dls.train_ds.scores, expected)


def test_scores_of_windows(small_tokenizers, folder):
    long = [' '.join(sentences(6, seed=i)) for i in range(8)]
    dls = HFTextDataLoaders.from_lists(
        TEXTS, LABELS, small_tokenizers['encoder'], valid=VALID, bs=4, windows=4, max_length=24, verbose=False
    )
    teacher = seeded(hf_classifier_learner, dls, bert(small_tokenizers['encoder']))
    student = distill(teacher, classifier(small_tokenizers), long, folder=folder)
    expected = teacher.predict_batch(long).scores
    np.testing.assert_allclose(student.dls.train_ds.scores[20:], expected, atol=1e-4)
    with pytest.raises(DataError, match='`windows`'):
        teacher.distill_into(teacher, long, folder=folder)


def test_student_cuts_texts_differently(small_tokenizers, folder):
    "The teacher reads whole texts, and the student the first tokens of another tokenizer"
    long = [' '.join(sentences(3, seed=i)) for i in range(8)]
    teacher = seeded(classifier, small_tokenizers, seed=5)
    tok = small_tokenizers['decoder']
    dls = HFTextDataLoaders.from_lists(TEXTS, LABELS, tok, valid=VALID, bs=4, max_length=6, verbose=False)
    student = distill(teacher, hf_classifier_learner(dls, bert(tok), metrics=[]), long, folder=folder)
    rows = student.dls.train_ds
    assert max(rows[i][0].shape[-1] for i in range(len(rows))) == 6
    np.testing.assert_allclose(rows.scores[20:], teacher.predict_batch(long).scores, atol=1e-4)


# --- students ---


@pytest.mark.parametrize('order', [['c', 'a', 'b'], ['b', 'c', 'a']])
def test_classes_by_name(order, small_tokenizers, folder):
    teacher = seeded(classifier, small_tokenizers, seed=5)
    tok = small_tokenizers['encoder']
    dls = HFTextDataLoaders.from_lists(TEXTS, LABELS, tok, valid=VALID, bs=4, vocab=order, verbose=False)
    student = distill(teacher, hf_classifier_learner(dls, bert(tok)), folder=folder)
    expected = teacher.predict_batch(NEW).scores[:, ['abc'.index(c) for c in order]]
    np.testing.assert_allclose(student.dls.train_ds.scores[20:], expected, atol=1e-4)


def test_awd_lstm_as_student_of_a_transformer(small_tokenizers, folder):
    teacher = seeded(classifier, small_tokenizers, seed=5)
    student = seeded(ulmfit_classifier, small_tokenizers)
    with pytest.raises(DataError, match='stored as tokens'):
        teacher.distill_into(student, NEW, folder=folder)
    teacher.distill_into(student, TEXTS[::-1] + NEW, folder=folder, verbose=False)
    rows = student.dls.train_ds
    np.testing.assert_allclose(rows.scores[:20], teacher.predict_batch(TEXTS[:20]).scores, atol=1e-4)
    given = distill(teacher, seeded(ulmfit_classifier, small_tokenizers), NEW, train_texts=TEXTS[:20], folder=folder)
    assert torch.equal(given.dls.train_ds.scores[:20], rows.scores[:20])
    assert trained(student, 1).isfinite().all()


def test_transformer_as_student_of_an_awd_lstm(small_tokenizers, folder):
    teacher = seeded(ulmfit_classifier, small_tokenizers, seed=5)
    student = distill(teacher, classifier(small_tokenizers), folder=folder)
    np.testing.assert_allclose(student.dls.train_ds.scores[20:], teacher.predict_batch(NEW).scores, atol=1e-4)


def test_student_of_plain_fastai(small_tokenizers, folder):
    df = pd.DataFrame(dict(text=TEXTS, label=LABELS, is_valid=VALID))
    dls = TextDataLoaders.from_df(df, text_col='text', label_col='label', valid_col='is_valid', bs=4, seq_len=20)
    config = merge(awd_lstm_clas_config, dict(emb_sz=16, n_hid=16, n_layers=1))
    student = text_classifier_learner(dls, AWD_LSTM, pretrained=False, config=config)
    teacher = seeded(classifier, small_tokenizers, seed=5)
    found = teacher.distill_into(student, TEXTS + NEW, folder=folder, verbose=False)
    assert len(found.left_out) == 2 and len(student.dls.train_ds) == 20 + len(NEW)
    assert trained(student, 1).isfinite().all()


@pytest.mark.parametrize('name', ['classifier', 'multilabel', 'regression', 'ulmfit_classifier'])
def test_student_is_an_ordinary_learner(name, small_tokenizers, folder, tmp_path):
    teacher = seeded(MAKERS[name], small_tokenizers, seed=5)
    student = distill(teacher, seeded(MAKERS[name], small_tokenizers), TEXTS + NEW, folder=folder)
    trained(student, 1)
    with student.no_bar():
        assert len(student.evaluate(ds_idx=0).targets) == 20 and len(student.evaluate().targets) == 2
        if name != 'ulmfit_classifier':
            assert len(student.get_preds(0)[1]) == 20
        expected = student.predict_batch(NEW).scores
    student.save_bundle(tmp_path / 'bundle')
    np.testing.assert_allclose(load_bundle(tmp_path / 'bundle').predict(NEW).scores, expected, atol=1e-5)
    student.export(tmp_path / 'learner.pkl')
    assert (tmp_path / 'learner.pkl').stat().st_size < 3_000_000
    own = student.distillation.end()
    assert own is student and len(student.dls.train_ds) == 20 and not hasattr(student.loss_func, 'hard')
    np.testing.assert_allclose(student.predict_batch(NEW).scores, expected, atol=1e-6)


def test_second_distillation_replaces_the_first(small_tokenizers, folder):
    teacher = seeded(classifier, small_tokenizers, seed=5)
    student = classifier(small_tokenizers)
    first = teacher.distill_into(student, NEW, folder=folder, verbose=False)
    second = teacher.distill_into(student, NEW[:5], folder=folder, verbose=False)
    assert len(student.dls.train_ds) == 25 and type(student.loss_func.hard) is CrossEntropyLossFlat
    assert [cb for cb in student.cbs if isinstance(cb, Distillation)] == [second]
    with pytest.raises(FastaiTLError, match='must not have ended'):
        first.end()


def test_pairs(small_tokenizers, folder):
    pairs = [[a, b] for a, b in zip(TEXTS, TEXTS[::-1])]
    tok = small_tokenizers['encoder']

    def make(seed):
        seed_everything(seed)
        dls = HFTextDataLoaders.from_lists(pairs, LABELS, tok, valid=VALID, bs=4, verbose=False)
        return hf_classifier_learner(dls, bert(tok), metrics=[])

    teacher, student = make(5), make(0)
    new = [[a, b] for a, b in zip(NEW, NEW[::-1])]
    found = teacher.distill_into(student, new + pairs, folder=folder, verbose=False)
    assert len(found.left_out) == 2
    np.testing.assert_allclose(student.dls.train_ds.scores[20:], teacher.predict_batch(new).scores, atol=1e-4)
    with pytest.raises(FastaiTLError, match='both read pairs'):
        teacher.distill_into(classifier(small_tokenizers), NEW, folder=folder)


# --- texts of the validation set ---


def test_texts_of_the_validation_set_are_left_out(small_tokenizers, folder):
    teacher = seeded(classifier, small_tokenizers, seed=5)
    long = 'the long story of a slow film that was shown in the small theatre of a quiet town on a dark evening'
    texts, labels = [*TEXTS[:20], TEXTS[20], long], LABELS
    tok = small_tokenizers['encoder']
    dls = HFTextDataLoaders.from_lists(texts, labels, tok, valid=VALID, bs=4, vocab=list('abc'), verbose=False)
    student = hf_classifier_learner(dls, bert(tok), metrics=[])
    copies = [TEXTS[20], TEXTS[20].upper() + ' !', f'  {TEXTS[20]}.', long.replace('quiet town', 'quiet city')]
    found = teacher.distill_into(student, [*NEW, *copies], folder=folder, max_similarity=0.8, verbose=False)
    assert sorted(found.left_out.row) == [12, 13, 14, 15]
    assert len(student.dls.train_ds) == 20 + len(NEW)
    found = teacher.distill_into(student, [*NEW, *copies], folder=folder, max_similarity=1, verbose=False)
    assert sorted(found.left_out.row) == [12, 13, 14]


def test_teacher_that_knows_the_validation_set(small_tokenizers, folder):
    tok = small_tokenizers['encoder']
    other = [i < 10 for i in range(N_ROWS)]
    dls = HFTextDataLoaders.from_lists(TEXTS, LABELS, tok, valid=other, bs=4, verbose=False)
    teacher = hf_classifier_learner(dls, bert(tok), metrics=[])
    with pytest.warns(UserWarning, match='2 of the 2 validation texts'):
        distill(teacher, classifier(small_tokenizers), folder=folder)


# --- scikit-learn ---


def test_soft_labels_of_scikit_learn(small_tokenizers, folder):
    teacher = seeded(classifier, small_tokenizers, seed=5)
    probs = teacher.predict_batch(NEW).probs
    labels = ['a', 'c', *[None] * 10]
    bag = lambda: make_pipeline(CountVectorizer(), LogisticRegression(tol=1e-8, max_iter=1000))
    student = teacher.distill_into(bag(), NEW, alpha=0.6, labels=labels, folder=folder, verbose=False)
    weights = 0.6 * probs
    weights[0, 0] += 0.4
    weights[1, 2] += 0.4
    x = student[0].transform(NEW).toarray()
    q = student.predict_proba(NEW)
    found = student[-1].coef_ - student[-1].coef_.mean(0)
    gradient = (q * weights.sum(1, keepdims=True) - weights).T @ x + found  # of the soft cross-entropy and the penalty
    assert np.abs(gradient - gradient.mean(0)).max() < 1e-3
    only_soft = teacher.distill_into(bag(), NEW, folder=folder, verbose=False)
    assert np.abs(only_soft.predict_proba(NEW) - probs).mean() < np.abs(q - probs).mean() + 0.05
    counts = teacher.distill_into(make_pipeline(CountVectorizer(), MultinomialNB()), NEW, folder=folder, verbose=False)
    assert list(counts.classes_) == ['a', 'b', 'c']


# --- hidden states of the teacher ---


def states_of(learn, layer, texts):
    "Mean states, by transformers alone"
    hf, x = learn.model.hf.eval(), learn.dls.tokenizer(texts, padding=True, return_tensors='pt')
    with torch.no_grad():
        states = hf(**x, output_hidden_states=True).hidden_states[layer]
    return (states * x['attention_mask'][..., None]).sum(1) / x['attention_mask'].sum(1, keepdim=True)


def distance(teacher, student, texts=TEXTS):
    "Mean squared distance of the directions of the states after the first layer"
    a, b = (F.normalize(states_of(learn, 1, texts)) for learn in (teacher, student))
    return (a - b).square().sum(1).mean().item()


@pytest.mark.parametrize('name', ['classifier', 'class_weights', 'multilabel', 'regression'])
def test_states_come_nearer_to_those_of_the_teacher(name, small_tokenizers, folder):
    "For each task, more with them than without; the student is an ordinary Learner afterwards"
    make = MAKERS[name]
    teacher = seeded(make, small_tokenizers, seed=5)
    found = {}
    for weight in (0.0, 30.0):
        student = seeded(make, small_tokenizers)
        own, before = student.dls, distance(teacher, student)
        distill(teacher, student, folder=folder, states=weight)
        trained(student, 4)
        found[weight] = distance(teacher, student)
        inner = student.model.inner[0]
        assert not inner._forward_hooks and not inner._forward_pre_hooks
        next(cb for cb in student.cbs if isinstance(cb, Distillation)).end()
        assert student.dls is own and not [cb for cb in student.cbs if isinstance(cb, PatientDistillation)]
        student.evaluate()
    assert found[30.0] < 0.7 * min(before, found[0.0])


def test_states_of_a_shrunk_student_begin_at_its_own_layers(small_tokenizers, folder):
    "The first layer of the student is that of the teacher, so its states are equal before training"
    teacher = seeded(classifier, small_tokenizers, seed=5)
    student = teacher.shrink(layers=[0, 1], verbose=False)
    assert distance(teacher, student) < 1e-10
    distill(teacher, student, folder=folder, states=1.0)
    n_scores = student.dls.train_ds.n_shown
    rows = torch.stack([row[2] for row in student.dls.train_ds])[:20, n_scores:]
    torch.testing.assert_close(rows, states_of(teacher, 1, [TEXTS[i] for i in range(20)]), rtol=1e-4, atol=1e-5)
    student.dls.show_batch(max_n=2)


def test_states_are_computed_once(small_tokenizers, folder, monkeypatch):
    from fastai_tl.deploy import teacher_scores

    teacher = seeded(classifier, small_tokenizers, seed=5)
    distill(teacher, classifier(small_tokenizers), folder=folder, states=1.0)
    compute, n_read = teacher_scores.TeacherStates._compute, []
    monkeypatch.setattr(
        teacher_scores.TeacherStates, '_compute', lambda self, texts: n_read.append(len(texts)) or compute(self, texts)
    )
    distill(teacher, classifier(small_tokenizers), folder=folder, states=5.0)
    assert not n_read
    distill(teacher, classifier(small_tokenizers), [*NEW, 'one more text'], folder=folder, states=5.0)
    assert n_read == [1]


def without_dropout(learn):
    for m in learn.model.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
    return learn


def test_states_in_every_way_of_training(small_tokenizers, folder, tmp_path):
    "Stages of frozen layers, two passes, bfloat16, accumulated gradients, one position in the top layer, resuming"
    teacher = seeded(classifier, small_tokenizers, seed=5)
    student = lambda **kw: distill(teacher, seeded(classifier, small_tokenizers), folder=folder, states=10.0, **kw)
    learn = student()
    with learn.no_bar(), learn.no_logging():
        plan = learn.fit_transfer(3, recipe='gradual')
    assert not plan.cache
    with pytest.raises(FastaiTLError, match='cache=False'), learn.no_bar():
        learn.freeze()
        learn.fit(1, cbs=CachedPrefix(verbose=False))
    assert trained(student().to_bf16(), 1, cbs=[RDrop(), GradientAccumulation(8)]).isfinite().all()
    weights = {}
    for one_position in (False, True):
        learn = without_dropout(student())
        with learn.no_bar(), learn.no_logging():
            learn.fit_transfer(2, recipe='full', one_position=one_position, mixed_precision=False)
        weights[one_position] = torch.cat([p.detach().flatten() for p in learn.model.parameters()])
    torch.testing.assert_close(weights[True], weights[False], rtol=1e-3, atol=1e-4)
    fit = lambda name, *cbs: trained(student(), 4, cbs=[ResumableFit(tmp_path / name), *cbs])
    whole = fit('a')
    with pytest.raises(KeyboardInterrupt):
        fit('b', Crash())
    assert torch.equal(fit('b'), whole)


@pytest.mark.parametrize('cb', [FGM, RDrop, None])
def test_states_are_those_of_the_first_pass(cb, small_tokenizers, folder, monkeypatch):
    "The layers of a shrunk student are those of its teacher, so nothing is left to learn before the first step"
    from fastai_tl.tune import patient_distillation

    found, compute = [], patient_distillation.state_losses
    monkeypatch.setattr(patient_distillation, 'state_losses', lambda *o: found.append(compute(*o)) or found[-1])
    teacher = without_dropout(seeded(classifier, small_tokenizers, seed=5))
    small = without_dropout(teacher.shrink(layers=[0, 1], verbose=False))
    student = distill(teacher, small, folder=folder, states=10.0)
    with student.no_bar(), student.no_logging():
        student.fit(1, 0.0, cbs=[cb()] if cb else [])
    assert len(found) == len(student.dls.train) and max(o.max().item() for o in found) < 1e-6


def test_states_and_everything_else_that_reads_batches(small_tokenizers, folder, tmp_path):
    teacher = seeded(classifier, small_tokenizers, seed=5)
    student = distill(teacher, seeded(classifier, small_tokenizers), folder=folder, states=10.0)
    with student.no_bar(), student.no_logging():
        student.validate()
        student.get_preds()
        student.lr_find(show_plot=False)
        student.fit(1, 1e-3)
        student.lr_find(show_plot=False)

    class Boom(Callback):
        def after_backward(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), student.no_bar():
        student.fit(1, 1e-3, cbs=Boom())
    inner = student.model.inner[0]
    assert not inner._forward_hooks and not inner._forward_pre_hooks
    with pytest.raises(FastaiTLError, match='a distillation has ended'):
        student.add_classes(['d'])
    next(cb for cb in student.cbs if isinstance(cb, Distillation)).end()
    student.export(tmp_path / 'student.pkl')
    trained(student, 1)


def test_states_of_a_student_that_was_shrunk_twice(small_tokenizers, folder):
    "Its layers are found among those of the first model and of the second"
    config = bert(small_tokenizers['encoder'])
    config.update(dict(num_hidden_layers=5))
    teacher = hf_classifier_learner(classifier(small_tokenizers).dls, config, metrics=[])
    middle = teacher.shrink(layers=[0, 2, 3, 4], verbose=False)
    small = middle.shrink(layers=[0, 1, 3], verbose=False)
    assert small.kept_layers == {5: [0, 2, 4], 4: [0, 1, 3]}
    distill(teacher, small, folder=folder, states=1.0)
    n_scores = small.dls.train_ds.n_shown
    rows = torch.stack([row[2] for row in small.dls.train_ds])[:20, n_scores:]
    by_hand = torch.cat([states_of(teacher, layer, TEXTS[:20]) for layer in (1, 3)], 1)
    torch.testing.assert_close(rows, by_hand, rtol=1e-4, atol=1e-5)
    distill(teacher, small, folder=folder, states=1.0, layers=np.array([0, 3, 4]))


def test_states_that_cannot_be_compared(small_tokenizers, folder):
    teacher = classifier(small_tokenizers)
    wide = bert(small_tokenizers['encoder'])
    wide.update(dict(hidden_size=48))
    for student, options, message in (
        (ulmfit_classifier(small_tokenizers), dict(states=1.0), 'two Hugging Face models'),
        (hf_classifier_learner(classifier(small_tokenizers).dls, wide), dict(states=1.0), 'number of dimensions'),
        (classifier(small_tokenizers), dict(states=1.0, layers=[0]), 'for each of the 2 layers'),
        (classifier(small_tokenizers), dict(layers=[0, 1]), '`states=0`'),
        (classifier(small_tokenizers), dict(states=-1), '`states` must be'),
        (make_pipeline(CountVectorizer(), LogisticRegression()), dict(states=1.0), 'for a Learner'),
    ):
        texts = TEXTS + NEW
        with pytest.raises(FastaiTLError, match=message):
            teacher.distill_into(student, texts, folder=folder, verbose=False, **options)


# --- bad input ---


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(alpha=1.5), 'at most 1'),
        (dict(alpha=float('nan')), '`alpha` must be'),
        (dict(temperature=0), 'above 0'),
        (dict(temperature=float('inf')), '`temperature` must be'),
        (dict(max_similarity=0), '`max_similarity` must be'),
        (dict(bs=0), '`bs` must be'),
        (dict(precision='fp7'), '`precision` must be'),
        (dict(train_texts=TEXTS[:3]), 'each of the 20 training rows'),
        (dict(labels=['a'] * 12), '`labels` are for'),
    ],
)
def test_bad_settings(kwargs, message, small_tokenizers, folder):
    teacher, student = classifier(small_tokenizers), classifier(small_tokenizers)
    with pytest.raises(FastaiTLError, match=message):
        teacher.distill_into(student, NEW, folder=folder, **kwargs)
    assert type(student.loss_func) is CrossEntropyLossFlat and len(student.dls.train_ds) == 20


@pytest.mark.parametrize('texts', ['a text', [None], [''], [['a', 'b']], [3], dict(a=1)])
def test_bad_texts(texts, small_tokenizers, folder):
    with pytest.raises(FastaiTLError):
        classifier(small_tokenizers).distill_into(classifier(small_tokenizers), texts, folder=folder)


def test_bad_students(small_tokenizers, folder):
    teacher = classifier(small_tokenizers)
    for student, message in (
        ('student', 'a Learner or an estimator'),
        (MAKERS['multilabel'](small_tokenizers), 'the same task'),
        (MAKERS['tagger'](small_tokenizers), 'the same task'),
        (classifier(small_tokenizers, [o.upper() for o in LABELS]), 'the same classes'),
        (make_pipeline(CountVectorizer(), KNeighborsClassifier()), '`sample_weight`'),
    ):
        with pytest.raises(FastaiTLError, match=message):
            teacher.distill_into(student, NEW, folder=folder, verbose=False)
    with pytest.raises(FastaiTLError, match='classifier or a regression'):
        MAKERS['tagger'](small_tokenizers).distill_into(classifier(small_tokenizers), NEW, folder=folder)
    dls = HFTextDataLoaders.from_lists(
        TEXTS, LABELS, small_tokenizers['encoder'], valid=VALID, bs=4, weighted=True, verbose=False
    )
    with pytest.raises(DataError, match='`weighted=True`'):
        teacher.distill_into(hf_classifier_learner(dls, bert(small_tokenizers['encoder'])), NEW, folder=folder)
    bag = make_pipeline(CountVectorizer(), LogisticRegression())
    for kwargs, message in (
        (dict(temperature=2), 'temperature 1'),
        (dict(bs=4), 'for a Learner'),
        (dict(labels=['a']), 'for each text'),
        (dict(labels=['x'] * 12), "'x'"),
        (dict(alpha=0), 'no `labels`'),
    ):
        with pytest.raises(FastaiTLError, match=message):
            teacher.distill_into(bag, NEW, folder=folder, verbose=False, **kwargs)
    with pytest.raises(FastaiTLError, match='one class a text'):
        MAKERS['multilabel'](small_tokenizers).distill_into(bag, NEW, folder=folder)
