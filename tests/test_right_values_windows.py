"Texts in windows: every number is one of whole texts, pooled as the Predictor does, and equal to a computation by hand"

import copy
import random

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.learner import load_learner
from fastai.metrics import accuracy, accuracy_multi, mse
from transformers import BertConfig, GPT2Config

from fastai_tl.all import EvaluationCallback, HFTextDataLoaders, hf_classifier_learner, load_bundle, pool_windows
from fastai_tl.all import seed_everything, text_windows, train_tokenizer

WORDS = 'the film was very good bad dull fine plot actor scene slow bright ending music long short story'.split()
SIZE, OVERLAP = 16, 4


def texts_of(n=40, seed=0):
    rng = random.Random(seed)
    return [' '.join(rng.choice(WORDS) for _ in range(rng.choice([4, 11, 30, 70]))) + f' {i}' for i in range(n)]


TEXTS = texts_of()
LABELS = dict(
    classification=['good' if text.count('good') > text.count('bad') else 'bad' for text in TEXTS],
    multilabel=[[w for w in ('film', 'music', 'plot') if w in text] for text in TEXTS],
    regression=[len(text)/100 + 0.001 for text in TEXTS],
)
LABELS['multilabel'][0] = ['film', 'music', 'plot']
METRICS = dict(classification=accuracy, multilabel=accuracy_multi, regression=mse)


@pytest.fixture(scope='module')
def tok():
    return train_tokenizer(TEXTS, 400)


def config(tok, family='bert'):
    if family == 'gpt2':
        return GPT2Config(vocab_size=len(tok), n_embd=32, n_layer=2, n_head=2, n_positions=32, pad_token_id=0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    return BertConfig(vocab_size=len(tok), max_position_embeddings=32, **sizes)


def learner(tok, task, family='bert', **kwargs):
    seed_everything(0)
    df = pd.DataFrame(dict(text=TEXTS, label=LABELS[task], valid=[i >= 24 for i in range(40)]))
    options = dict(windows=OVERLAP, max_length=SIZE, bs=8, verbose=False) | kwargs
    dls = HFTextDataLoaders.from_df(df, tok, valid_col='valid', task=task, **options)
    learn = hf_classifier_learner(dls, config(tok, family), metrics=METRICS[task])
    head = learn.model.hf.score if family == 'gpt2' else learn.model.hf.classifier
    head.weight.data *= 30 # far from indifferent, so that means of probabilities and of scores differ
    return learn


@torch.no_grad()
def by_hand(learn, task, texts):
    "Mean probabilities over the windows of each text; each window is read alone, by the model of transformers"
    hf = learn.model.hf.eval()
    rows = []
    for text in texts:
        windows, _ = text_windows([text], learn.dls.tokenizer, SIZE, OVERLAP)
        inputs = [learn.dls.tokenizer(w, return_tensors='pt', truncation=True, max_length=SIZE) for w in windows]
        scores = torch.cat([hf(**{k: v for k, v in x.items()}).logits for x in inputs])
        probs = dict(classification=scores.softmax(-1), multilabel=scores.sigmoid(), regression=scores)[task]
        rows.append(probs.mean(0))
    return torch.stack(rows).numpy()


def losses_by_hand(probs, targets, task):
    if task == 'classification':
        return -np.log(probs[np.arange(len(probs)), targets])
    if task == 'regression':
        return (probs[:, 0] - targets)**2
    return -(targets*np.log(probs) + (1 - targets)*np.log(1 - probs)).mean(1)


def targets_of(learn, task, rows):
    labels = [LABELS[task][i] for i in rows]
    if task == 'regression':
        return np.array(labels)
    vocab = list(learn.dls.vocab)
    if task == 'classification':
        return np.array([vocab.index(label) for label in labels])
    return np.array([[float(c in label) for c in vocab] for label in labels])


def metric_by_hand(probs, targets, task):
    if task == 'classification':
        return (probs.argmax(1) == targets).mean()
    if task == 'regression':
        return ((probs[:, 0] - targets)**2).mean()
    return ((probs > 0.5) == targets).mean()


@pytest.mark.parametrize('task,family', [(task, 'bert') for task in LABELS] + [('classification', 'gpt2')])
def test_all_say_the_same_of_whole_texts(tok, task, family):
    tok = copy.deepcopy(tok)
    tok.padding_side = 'left' if family == 'gpt2' else 'right'
    learn = learner(tok, task, family)
    valid, train = range(24, 40), range(24)
    for rows, ds_idx in ((valid, 1), (train, 0)):
        texts = [TEXTS[i] for i in rows]
        want = by_hand(learn, task, texts)
        targets = targets_of(learn, task, rows)
        losses = losses_by_hand(want, targets, task)
        with learn.no_bar(), learn.no_logging():
            probs, y, of_rows = learn.get_preds(ds_idx=ds_idx, with_loss=True)
            loss, metric = learn.validate(ds_idx=ds_idx)
            ev = learn.evaluate(ds_idx=ds_idx)
            new = learn.get_preds(dl=learn.dls.test_dl(texts))[0]
            one = learn.predict(texts[3])
        close = dict(atol=1e-5, rtol=1e-4)
        assert np.allclose(probs, want, **close) and np.allclose(new, want, **close)
        assert np.allclose(np.asarray(y).reshape(targets.shape), targets)
        assert np.allclose(of_rows, losses, atol=1e-4, rtol=1e-3)
        assert loss == pytest.approx(losses.mean(), rel=1e-3)
        assert metric == pytest.approx(metric_by_hand(want, targets, task), rel=1e-4)
        assert np.allclose(ev.probs.reshape(want.shape), want, **close) and ev.texts == texts
        assert np.allclose(learn.predictor().predict_proba(texts), want, **close)
        assert np.allclose(learn.predict_batch(texts).probs, want, **close)
        assert np.allclose(one[-1], want[3], **close)
        if task == 'classification':
            labels = [LABELS[task][i] for i in rows]
            assert np.allclose(learn.evaluate(texts, labels).probs, want, **close)
            assert ev.accuracy == pytest.approx(metric)


def test_the_table_of_a_fit(tok):
    "Metrics, loss and EvaluationCallback in a fit are those of whole texts"
    learn = learner(tok, 'classification')
    watch = EvaluationCallback(scores=['macro_f1'])
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 1e-3, cbs=watch)
    _, loss, acc, _ = learn.recorder.values[-1]
    want = by_hand(learn, 'classification', TEXTS[24:])
    targets = targets_of(learn, 'classification', range(24, 40))
    assert acc == pytest.approx((want.argmax(1) == targets).mean())
    assert loss == pytest.approx(losses_by_hand(want, targets, 'classification').mean(), rel=1e-3)
    assert len(watch.last) == 16 and np.allclose(watch.last.probs, want, atol=1e-5)
    assert len(learn.dls.train_ds) == len(learn.dls.window_rows[0]) > 24 # training reads windows


def test_cached_layers(tok):
    learn = learner(tok, 'classification')
    learn.freeze()
    with learn.no_bar(), learn.no_logging():
        from fastai_tl.all import CachedPrefix

        learn.fit(1, 1e-3, cbs=CachedPrefix())
    want = by_hand(learn, 'classification', TEXTS[24:])
    targets = targets_of(learn, 'classification', range(24, 40))
    assert learn.recorder.values[-1][-1] == pytest.approx((want.argmax(1) == targets).mean())


def test_after_saving(tok, tmp_path):
    learn = learner(tok, 'classification')
    want = by_hand(learn, 'classification', TEXTS[24:])
    learn.path = tmp_path
    learn.export()
    learn.save_bundle(tmp_path/'bundle')
    again = load_learner(tmp_path/'export.pkl')
    of_bundle = load_bundle(tmp_path/'bundle')
    empty = of_bundle.learner()
    assert np.allclose(of_bundle.predict_proba(TEXTS[24:]), want, atol=1e-5)
    for other in (again, empty):
        with other.no_bar(), other.no_logging():
            assert np.allclose(other.get_preds(dl=other.dls.test_dl(TEXTS[24:]))[0], want, atol=1e-5)
            assert np.allclose(other.predict(TEXTS[30])[-1], want[6], atol=1e-5)
            assert np.allclose(other.evaluate(TEXTS[24:], LABELS['classification'][24:]).probs, want, atol=1e-5)


def test_calibration_and_precisions(tok):
    learn = learner(tok, 'classification')
    want = by_hand(learn, 'classification', TEXTS[24:])
    targets = targets_of(learn, 'classification', range(24, 40))
    with learn.no_bar(), learn.no_logging():
        table = learn.compare_precisions(('fp32',))
        of_training = learn.compare_precisions(('fp32',), ds_idx=0)
        calibrated = learn.calibrate()
    assert table.texts['fp32'] == 16 and of_training.texts['fp32'] == 24
    assert table.accuracy['fp32'] == pytest.approx((want.argmax(1) == targets).mean())
    assert np.allclose(calibrated.ev.probs if hasattr(calibrated, 'ev') else want, want, atol=1e-5)


def test_results_are_shown(tok, capsys):
    learn = learner(tok, 'classification')
    with learn.no_bar():
        learn.show_results(max_n=2)
        learn.dls.valid.show_batch(max_n=2)
    x = learn.dls.valid_ds[0][0]
    assert learn.dls.valid.decode_batch(learn.dls.valid.one_batch(), max_n=1)
    assert x.windows.max() + 1 == learn.dls.window_rows[1].count(0)


def test_pooled_by_the_user_as_before(tok):
    "Code that pools the predictions itself still gives one row per text"
    learn = learner(tok, 'classification')
    with learn.no_bar():
        probs = learn.get_preds()[0]
    want = by_hand(learn, 'classification', TEXTS[24:])
    assert np.allclose(pool_windows(probs, learn.dls.window_rows[1]), want, atol=1e-5)
    assert pool_windows(torch.tensor([[1.0], [3.0], [5.0]]), [0, 0, 1]).tolist() == [[2.0], [5.0]]


@pytest.mark.parametrize('windows', [None, OVERLAP])
def test_macro_f1_is_that_of_the_report(tok, windows):
    "Also where the validation rows lack a class"
    seed_everything(0)
    labels = ['rare' if i == 0 else label for i, label in enumerate(LABELS['classification'])]
    df = pd.DataFrame(dict(text=TEXTS, label=labels, valid=[i >= 24 for i in range(40)]))
    dls = HFTextDataLoaders.from_df(df, tok, valid_col='valid', windows=windows, max_length=SIZE, bs=8, verbose=False)
    learn = hf_classifier_learner(dls, config(tok))
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 5e-3)
        _, acc, f1 = learn.validate()
        ev = learn.evaluate()
    f1s = []
    for k in range(3):
        right = ((ev.preds == k) & (ev.targets == k)).sum()
        f1s.append(2*right/max((ev.preds == k).sum() + (ev.targets == k).sum(), 1))
    assert f1 == pytest.approx(np.mean(f1s)) and f1 == pytest.approx(ev.report(level=None).loc['macro avg', 'f1'])
    assert acc == pytest.approx(ev.accuracy)
