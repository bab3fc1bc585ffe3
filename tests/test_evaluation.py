"Every score of an evaluation equals scikit-learn's, or its definition computed directly, on random data and at edges."

import json
import re
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics as skm
import torch
from hypothesis import given as hypothesis_given, settings, strategies as st
from scipy.stats import spearmanr
from torch import nn

from fastai_tl.all import *
from fastai_tl.evaluation.scores import calibration_error, resample_counts
from repo import python


def given(*args):
    return lambda f: settings(deadline=None, max_examples=60)(hypothesis_given(*args)(f))


# --- data: random, with ties, with absent classes, of one row ---

@st.composite
def single(draw, max_rows=60):
    "Probabilities (some tied, some exactly 0 or 1) and targets, with classes without rows or never predicted"
    n, c = draw(st.integers(1, max_rows)), draw(st.integers(2, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32-1)))
    p = rng.dirichlet(np.full(c, draw(st.sampled_from([.05, .5, 3.]))), n)
    kinds = {'raw': p, 'hard': np.eye(c)[p.argmax(1)], 'tied': (p*4).round()+1e-9}
    p = kinds[draw(st.sampled_from(['raw', 'hard', 'tied']))]
    p = p/p.sum(1, keepdims=True)
    have = draw(st.lists(st.integers(0, c-1), min_size=1, max_size=c, unique=True))
    return p, rng.choice(have, n)


@st.composite
def multi(draw, max_rows=50):
    "Probabilities of several labels, with rows that have none"
    n, c = draw(st.integers(1, max_rows)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32-1)))
    y = (rng.random((n, c)) < draw(st.sampled_from([0., .1, .5, 1.]))).astype(int)
    y[rng.random(n) < .3] = 0
    p = rng.random((n, c))
    return (p.round(1) if draw(st.booleans()) else p), y


def names(c): return [f'class {i}' for i in range(c)]


@given(single())
def test_report_is_sklearns(data):
    p, y = data
    c = p.shape[1]
    r = Evaluation(p, y, names(c)).report(n_boot=20)
    ref = skm.precision_recall_fscore_support(y, p.argmax(1), labels=range(c), zero_division=0)
    assert r.iloc[:c][['precision', 'recall', 'f1', 'support']].to_numpy() == pytest.approx(np.array(ref).T)
    for avg in ('macro', 'weighted'):
        ref = skm.precision_recall_fscore_support(y, p.argmax(1), labels=range(c), average=avg, zero_division=0)[:3]
        got = r.loc[f'{avg} avg', ['precision', 'recall', 'f1']].to_numpy(dtype=float)
        assert got == pytest.approx(np.array(ref, dtype=float))
    has = r.low.notna()
    assert (r.low[has] <= r.high[has]).all() and r.low[:c].ge(0).all() and r.high[:c].le(1).all()


@given(single())
def test_scores_are_sklearns(data):
    p, y = data
    c, g = p.shape[1], p.argmax(1)
    s = Evaluation(p, y, names(c)).scores()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')   # of classes that do not occur
        want = dict(accuracy=skm.accuracy_score(y, g), balanced_accuracy=skm.balanced_accuracy_score(y, g),
                    mcc=skm.matthews_corrcoef(y, g), kappa=skm.cohen_kappa_score(y, g),
                    log_loss=skm.log_loss(y, p, labels=range(c)))
        auc = [skm.roc_auc_score(y == k, p[:, k]) for k in range(c) if 0 < (y == k).sum() < len(y)]
        ap = [skm.average_precision_score(y == k, p[:, k]) for k in range(c) if (y == k).any()]
    want.update(roc_auc=np.mean(auc) if auc else np.nan, average_precision=np.mean(ap))
    assert {k: s[k] for k in want} == pytest.approx(want, abs=1e-9, nan_ok=True)


@given(multi())
def test_several_labels(data):
    p, y = data
    ev = Evaluation(p, y, names(p.shape[1]))
    r, g = ev.report(n_boot=10), (p > .5).astype(int)
    c = p.shape[1]
    if c > 1:
        ref = skm.precision_recall_fscore_support(y, g, labels=range(c), zero_division=0)
    else:
        scores = [f(y, g, zero_division=0) for f in (skm.precision_score, skm.recall_score, skm.f1_score)]
        ref = [np.atleast_1d(o) for o in (*scores, y.sum())]
    assert r.iloc[:c][['precision', 'recall', 'f1', 'support']].to_numpy() == pytest.approx(np.array(ref).T)
    if c > 1:
        for avg in ('micro', 'macro', 'weighted', 'samples'):
            ref = skm.precision_recall_fscore_support(y, g, labels=range(c), average=avg, zero_division=0)[:3]
            got = r.loc[f'{avg} avg', ['precision', 'recall', 'f1']].to_numpy(dtype=float)
            assert got == pytest.approx(np.array(ref, dtype=float)), avg
        assert r.score['exact match'] == pytest.approx(skm.accuracy_score(y, g))
    eps = np.finfo(float).eps
    q = np.clip(p, eps, 1-eps)
    assert r.score['log loss'] == pytest.approx(-np.where(y > 0, np.log(q), np.log1p(-q)).mean())
    assert r.score['accuracy'] == pytest.approx((g == y).mean())


@given(st.integers(1, 60), st.integers(0, 2**32-1), st.booleans())
def test_regression(n, seed, ties):
    rng = np.random.default_rng(seed)
    y, p = rng.normal(size=n), rng.normal(size=n)
    if ties:
        y, p = y.round(), p.round()
    s = Evaluation(p, y).scores()
    assert s['rmse'] == pytest.approx(skm.root_mean_squared_error(y, p))
    assert s['mae'] == pytest.approx(skm.mean_absolute_error(y, p))
    if n > 1 and np.ptp(y) > 0:
        assert s['r2'] == pytest.approx(skm.r2_score(y, p))
        if np.ptp(p) > 0:
            assert s['spearman'] == pytest.approx(spearmanr(y, p).statistic)
    else:
        assert np.isnan(s['r2']) and np.isnan(s['spearman'])


@given(single())
def test_confusion(data):
    p, y = data
    c = p.shape[1]
    ev = Evaluation(p, y, names(c))
    m = skm.confusion_matrix(y, p.argmax(1), labels=range(c))
    assert (ev.confusion().to_numpy() == m).all()
    pairs = ev.most_confused(99)
    assert pairs['count'].sum() == (p.argmax(1) != y).sum() and pairs['count'].is_monotonic_decreasing
    for t in pairs.itertuples():
        i, j = ev.classes.index(t.true), ev.classes.index(t.predicted)
        assert t.count == m[i, j] and t.share == pytest.approx(m[i, j]/m[i].sum())


# --- how sure ---

def test_intervals_are_those_of_drawing_rows():
    "The multinomial over the cells of the confusion matrix has the distribution of the bootstrap over rows"
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 250)
    g = np.where(rng.random(250) < .7, y, rng.integers(0, 3, 250))
    r = Evaluation(np.eye(3)[g], y, names(3)).report(n_boot=4000)
    draws = []
    for _ in range(2000):
        i = rng.integers(0, 250, 250)
        by_class = skm.f1_score(y[i], g[i], average=None, labels=range(3))
        draws.append([*by_class, skm.f1_score(y[i], g[i], average='macro'), skm.matthews_corrcoef(y[i], g[i])])
    lo, hi = np.quantile(draws, [.025, .975], axis=0)
    rows = [*names(3), 'macro avg', 'MCC']
    assert r.low[rows].to_numpy() == pytest.approx(lo, abs=.02)
    assert r.high[rows].to_numpy() == pytest.approx(hi, abs=.02)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(1, 30))
def test_resampled_counts_keep_the_number_of_rows(counts, n_boot):
    s, = resample_counts(counts, [np.ones((len(counts), 1))], n_boot)
    assert s.shape == (n_boot, 1) and (s == sum(counts)).all()


def test_same_seed_same_interval():
    rng = np.random.default_rng(0)
    ev = Evaluation(rng.dirichlet([1, 1, 1], 80), rng.integers(0, 3, 80), names(3))
    assert ev.report(seed=3).equals(ev.report(seed=3)) and not ev.report(seed=3).equals(ev.report(seed=4))


# --- calibration ---

def ece_by_hand(conf, right, edges):
    gaps = []
    for i, (a, b) in enumerate(zip(edges, edges[1:])):
        m = (conf >= a) & ((conf < b) | (i == len(edges)-2))
        if m.any():
            gaps.append((m.mean(), abs(conf[m].mean()-right[m].mean())))
    return sum(w*g for w, g in gaps), max(g for _, g in gaps)


@given(single(), st.integers(1, 20))
def test_calibration_error_is_its_definition(data, bins):
    p, y = data
    conf, right = p.max(1), p.argmax(1) == y
    assert calibration_error(conf, right, bins) == pytest.approx(ece_by_hand(conf, right, np.linspace(0, 1, bins+1)))
    edges = np.unique(np.quantile(conf, np.linspace(0, 1, bins+1)))
    if len(edges) > 1:
        assert calibration_error(conf, right, bins, True) == pytest.approx(ece_by_hand(conf, right, edges))
    else:
        assert calibration_error(conf, right, bins, True)[0] == pytest.approx(abs(conf.mean()-right.mean()))


@given(single())
def test_brier_and_nll_are_sklearns(data):
    p, y = data
    c = Evaluation(p, y, names(p.shape[1])).calibration()
    for_sklearn = p if p.shape[1] > 2 else p[:, 1]
    assert c['brier'] == pytest.approx(skm.brier_score_loss(y, for_sklearn, labels=range(p.shape[1])))
    assert c['nll'] == pytest.approx(skm.log_loss(y, p, labels=range(p.shape[1])))


@given(single())
def test_reliability_counts_each_row_once(data):
    p, y = data
    ev = Evaluation(p, y, names(p.shape[1]))
    for mass in (False, True):
        t = ev.reliability(7, mass)
        assert t['count'].sum() == len(y) and (t.accuracy*t['count']).sum() == pytest.approx((p.argmax(1) == y).sum())
        assert ((t.confidence >= t['from']-1e-12) & (t.confidence <= t['to']+1e-12)).all()
        assert ((t.low <= t.accuracy+1e-12) & (t.accuracy <= t.high+1e-12)).all()


@given(single())
def test_temperature_keeps_decisions_and_lowers_nll(data):
    p, y = data
    ev = Evaluation(p, y, names(p.shape[1]))
    ts = TemperatureScaling().fit(ev)
    after = ts.apply(ev)
    assert (after.preds == ev.preds).all() and after.accuracy == ev.accuracy
    q = after.probs
    assert (q[np.arange(len(q)), ev.preds] >= q.max(1)-1e-12).all(), 'what was on top stays there'
    if not ts.identified:
        assert ts.temperature == 1 and (q == ev.probs).all()
        return
    z = np.log(np.maximum(p, np.finfo(np.float32).tiny))   # the limit that scores have
    nll = lambda t: -(z/t-np.logaddexp.reduce(z/t, axis=1, keepdims=True))[np.arange(len(y)), y].mean()
    assert nll(ts.temperature) <= nll(1)+1e-9
    for t in np.geomspace(.03, 40, 25):
        assert nll(ts.temperature) <= nll(t)+1e-6, 'no other temperature is better'


@given(multi())
def test_temperature_of_several_labels_keeps_decisions(data):
    p, y = data
    ev = Evaluation(p, y, names(p.shape[1]))
    after = TemperatureScaling().fit(ev).apply(ev)
    assert ((after.probs > .5) == (p > .5)).all() and (after.preds == ev.preds).all()


@pytest.mark.parametrize('sharp', [2., 4.])
def test_overconfident_model_is_mended_on_rows_it_has_not_seen(sharp):
    def made(seed, n=4000):
        rng = np.random.default_rng(seed)
        z = rng.normal(size=(n, 4))*1.2
        p = np.exp(z)/np.exp(z).sum(1, keepdims=True)
        return Evaluation.from_preds(sharp*z, (p.cumsum(1) > rng.random((n, 1))).argmax(1), names(4), logits=True)
    fit, held = made(0), made(1)
    cal = Calibrated(fit)
    before, after = held.calibration(), cal.apply(held).calibration()
    assert cal.temperature == pytest.approx(sharp, rel=.1)
    assert after['ece'] < .25*before['ece'] and after['ece_mass'] < .25*before['ece_mass']
    assert after['nll'] < before['nll'] and after['brier'] < before['brier']
    assert after['accuracy'] == before['accuracy']
    assert cal.folds.calibration()['ece'] < .25*fit.calibration()['ece']


# --- decisions ---

@given(single())
def test_risk_and_coverage(data):
    p, y = data
    ev = Evaluation(p, y, names(p.shape[1]))
    conf, right = p.max(1), p.argmax(1) == y
    t = ev.risk_coverage()
    assert sorted(set(conf), reverse=True) == t.threshold.tolist()
    for r in t.itertuples():
        decided = conf >= r.threshold
        want = decided.mean(), 1-right[decided].mean(), decided.sum()
        assert (r.coverage, r.risk, r.count) == pytest.approx(want)


@given(single(), st.floats(.3, 1))
def test_abstention_decides_as_many_rows_as_it_can(data, wanted):
    p, y = data
    ev = Evaluation(p, y, names(p.shape[1]))
    conf, right = p.max(1), p.argmax(1) == y
    good = [t for t in set(conf) if right[conf >= t].mean() >= wanted-1e-12]
    if not good:
        with pytest.raises(FastaiTLError, match='at best'):
            ev.abstention(wanted)
    else:
        assert ev.abstention(wanted)['threshold'] == (0 if right.all() else min(good))


def scores_at(threshold, y, p):
    "Precision, recall, F1 and cost (1 for a false alarm, 3 for a miss) of a threshold"
    on = p >= threshold
    cost = (on & (y == 0)).sum() + 3*(~on & (y == 1)).sum()
    f1 = skm.f1_score(y, on, zero_division=0)
    return skm.precision_score(y, on, zero_division=0), skm.recall_score(y, on), f1, cost


@given(multi(), st.floats(.05, 1))
def test_thresholds_are_the_best_there_are(data, wanted):
    p, y = data
    ev = Evaluation(p, y, names(p.shape[1]))
    kinds = dict(f1=ev.thresholds(), recall=ev.thresholds(recall=wanted), precision=ev.thresholds(precision=wanted),
                 cost=ev.thresholds(cost=(1, 3)))
    for k in range(p.shape[1]):
        t, s = y[:, k], p[:, k]
        if not t.any():
            continue
        cands = [*set(s), np.inf]
        sc = {c: scores_at(c, t, s) for c in cands}
        row = {n: d.iloc[k] for n, d in kinds.items()}
        if ((s >= .5) == t).all():
            assert all(r.threshold == .5 and r.f1 == 1 and not r.identified for r in row.values())
            continue
        assert all(r.identified for r in row.values())
        for n, r in row.items():
            assert (r.precision, r.recall, r.f1) == pytest.approx(sc[r.threshold][:3])
        assert row['f1'].f1 == pytest.approx(max(v[2] for v in sc.values()))
        assert sc[row['cost'].threshold][3] == min(v[3] for v in sc.values())
        assert row['recall'].threshold == max(c for c, v in sc.items() if v[1] >= wanted-1e-12)
        ok = [v[1] for c, v in sc.items() if v[0] >= wanted-1e-12 and c < np.inf]
        if ok:
            assert row['precision'].recall == pytest.approx(max(ok)) and row['precision'].precision >= wanted-1e-12
        else:
            assert row['precision'].threshold == np.inf


@given(multi())
def test_tuned_thresholds_do_not_lower_f1(data):
    p, y = data
    ev = Evaluation(p, y, names(p.shape[1]))
    tuned = ev.with_thresholds(ev.thresholds())
    assert tuned.scores(probs=False)['macro_f1'] >= ev.scores(probs=False)['macro_f1']-1e-12


# --- sizes ---

@pytest.mark.parametrize('n, c', [(1, 2), (100_000, 2), (3_000, 200)])
def test_sizes(n, c, tmp_path):
    rng = np.random.default_rng(0)
    y = rng.integers(0, c, n)
    z = rng.normal(size=(n, c)).astype(np.float32)
    z[np.arange(n), y] += 2
    ev = Evaluation.from_preds(z, y, names(c), logits=True)
    r = ev.report()
    assert r.score['accuracy'] == pytest.approx(skm.accuracy_score(y, z.argmax(1)))
    macro = skm.f1_score(y, z.argmax(1), labels=range(c), average='macro', zero_division=0)
    assert r.f1['macro avg'] == pytest.approx(macro)
    assert ev.calibration()['accuracy'] == pytest.approx(ev.accuracy) and len(ev.risk_coverage()) <= n
    assert set(ev.figures()) == {'confusion_matrix', 'confidence_analysis', 'reliability', 'risk_coverage'}
    assert Calibrated(ev).after.accuracy == ev.accuracy
    if n == 1:
        assert np.isnan(r.score['ROC-AUC']) and ev.save(tmp_path, dpi=50).exists()


MEMORY = '''
import resource, threading, time, torch
from fastai.text.all import *
from fastai_tl.all import *
rss = lambda: int(open('/proc/self/statm').read().split()[1])*resource.getpagesize()
n = 100_000
{make}
torch.set_num_threads(1)
seen,done = [],threading.Event()
def watch(): # the process's own peak also counts what its imports have needed
    while not done.wait(.002): seen.append(rss())
with learn.no_bar() if hasattr(learn, 'no_bar') else nullcontext():
    before = rss()
    watcher = threading.Thread(target=watch); watcher.start()
    ev = run()
    done.set(); watcher.join()
assert len(ev) == n and abs(ev.probs.sum(1)-1).max() < 1e-4
assert len(seen) > 20, len(seen)
print('MiB', round((max(seen)-before)/2**20))
'''
FASTAI = '''
texts = [f'text {i} is about the number {i%97} and it was {"good" if i%2 else "bad"}' for i in range(n)]
tt = tokenize_texts_once(texts, progress=False)
y = [i%2 for i in range(n)]
rows = list(range(100)), list(range(100, n))
dls = classifier_dls(tt, y, 'classification', *rows, texts_vocab(tt), bs=64)
learn = awd_classifier_learner(dls, 'classification', 2, dict(emb_sz=8, n_hid=8, n_layers=1))
dl = dls.test_dl([[tt[i], y[i]] for i in range(n)], with_labels=True, bs=128)
run = lambda: learn.evaluate(dl=dl)
'''
PLAIN = '''
from contextlib import nullcontext
learn = torch.nn.Sequential(torch.nn.EmbeddingBag(1000, 64), torch.nn.Linear(64, 20))
def loader():
    for a in range(0, n, 100): yield torch.randint(0, 1000, (100, 30)), torch.randint(0, 20, (100,))
run = lambda: Evaluation.from_model(learn, loader())
'''


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
@pytest.mark.parametrize('make', [
    pytest.param(FASTAI, id='fastai', marks=pytest.mark.slow), pytest.param(PLAIN, id='plain')])
def test_memory_is_flat(make):
    "100,000 short texts need less than 300 MiB above the model and its data"
    res = python('from contextlib import nullcontext\n' + MEMORY.format(make=make), timeout=900)
    assert res.returncode == 0, res.stdout
    used = int(re.search(r'MiB (\d+)', res.stdout)[1])
    print(f'{used} MiB')
    assert used < 300, f'{used} MiB'


def test_logits_are_freed():
    "Of each batch only probabilities, targets and losses outlive it"
    import weakref
    refs = []
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(4, 3)
        def forward(self, x):
            z = self.f(x)
            refs.append(weakref.ref(z))
            assert sum(r() is not None for r in refs) <= 2, 'an earlier batch of logits is still there'
            return z
    X, Y = torch.randn(64, 4), torch.randint(0, 3, (64,))
    model = Model()
    ds = list(zip(X, Y))
    from fastai.text.all import CrossEntropyLossFlat, DataLoader, DataLoaders, Learner
    learn = Learner(DataLoaders(DataLoader(ds, bs=8), DataLoader(ds, bs=8)), model, loss_func=CrossEntropyLossFlat())
    with learn.no_bar():
        ev = learn.evaluate()
    assert len(refs) == 8 and np.allclose(ev.probs, model.f(X).softmax(1).detach().numpy(), atol=1e-6)
    refs.clear()
    Evaluation.from_model(model, [(X[i:i+8], Y[i:i+8]) for i in range(0, 64, 8)])
    assert len(refs) == 8


# --- Hugging Face models ---

def test_transformers_model_with_dict_batches():
    from transformers import BertConfig, BertForSequenceClassification, BatchEncoding
    seed_everything(0)
    kw = dict(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
              max_position_embeddings=20)
    X = torch.randint(0, 50, (30, 9))
    cases = [(torch.randint(0, 3, (30,)), 3, 'classification', {}),
             (torch.randint(0, 2, (30, 4)).float(), 4, 'multilabel', dict(problem_type='multi_label_classification')),
             (torch.randn(30), 1, 'regression', {})]
    for labels, n, task, extra in cases:
        model = BertForSequenceClassification(BertConfig(num_labels=n, **kw, **extra)).train()
        starts = range(0, 30, 7)
        mask = torch.ones_like(X)
        batches = [dict(input_ids=X[i:i+7], attention_mask=mask[i:i+7], labels=labels[i:i+7]) for i in starts]
        ev = Evaluation.from_model(model, map(BatchEncoding, batches))
        assert model.training and ev.task == task
        with torch.no_grad():
            out = model.eval()(input_ids=X, labels=labels)
        assert ev.losses.mean() == pytest.approx(out.loss.item(), rel=1e-4)
        activations = dict(classification=lambda z: z.softmax(1), multilabel=torch.sigmoid, regression=lambda z: z)
        want = activations[task](out.logits)
        assert np.allclose(ev.probs, want.numpy(), atol=1e-5)


# --- pages ---

def test_page_is_self_contained_and_escaped(tmp_path):
    rng = np.random.default_rng(0)
    classes = ['<img src=x onerror=alert(1)>', '中性', 'low']
    texts = ['<script>alert(1)</script> "quoted" & 正面']*40
    ev = Evaluation.from_preds(rng.dirichlet([1, 1, 1], 40), rng.integers(0, 3, 40), classes, texts=texts)
    page = ev.save(tmp_path, title='<b>mine</b>', lang='zh', dpi=50).read_text(encoding='utf-8')
    assert '<script' not in page and '<img src=x' not in page and '<b>mine' not in page and '&lt;script&gt;' in page
    assert not re.findall(r'(?:src|href|url)\s*=\s*["\']?(?!data:image/png;base64,)["\']?http', page)
    assert page.count('<img ') == page.count('src="data:image/png;base64,') == 4
    assert '<th>low</th>' in page, 'the name of a class is not translated'
    back = pd.read_csv(tmp_path/'predictions.csv', encoding='utf-8-sig')
    assert back.true.tolist() == [classes[i] for i in ev.targets] and back.text.iloc[0].startswith('<script>')
    assert json.loads((tmp_path/'scores.json').read_text())['accuracy'] == pytest.approx(ev.accuracy)
    assert not list(tmp_path.glob('.*.part'))


@pytest.mark.parametrize('lang, classes', [
    ('en', ['negative', 'neutral', 'positive']),
    ('zh', ['負面', '中性', '正面']),
    ('zh', ['客房服務與清潔程度的整體評價以及其他', '早餐', '停車'])])
def test_no_glyph_is_missing(lang, classes, recwarn):
    if lang == 'zh' and find_cjk_font() is None:
        pytest.skip('no font with Chinese characters')
    rng = np.random.default_rng(0)
    ev = Evaluation.from_preds(rng.dirichlet([1, 1, 1], 200), rng.integers(0, 3, 200), classes)
    values = Evaluation.from_preds(rng.normal(size=9), rng.normal(size=9))
    for fig in [*ev.figures(lang=lang).values(), Calibrated(ev).plot(lang=lang), values.plot_residuals(lang)]:
        fig.canvas.draw()
    assert not [w for w in recwarn if 'Glyph' in str(w.message)]


# --- agreement with fastai, and what can go wrong ---

def test_wrong_input_is_named():
    p = np.full((3, 2), .5)
    nothing = np.empty((0, 2))
    cases = [
        (lambda: Evaluation(p, [0, 1], 'ab'), 'same number of rows'),
        (lambda: Evaluation(p, [0, 1, 2], 'ab'), 'row 2'),
        (lambda: Evaluation(p*3, [0, 1, 1], 'ab'), 'logits=True'),
        (lambda: Evaluation(p, [0, 1, 1], 'abc'), 'a column for each of 3'),
        (lambda: Evaluation(p, [0, .5, 1], 'ab'), 'row 1'),
        (lambda: Evaluation(p, ['a', 'b', 'b'], 'ab'), 'from_preds'),
        (lambda: Evaluation(np.array([[1, np.nan]]), [0], 'ab'), 'row 0'),
        (lambda: Evaluation(p, [[0, 1, 1]]*3, 'ab'), 'shape'),
        (lambda: Evaluation(nothing, [], 'ab').report(), 'at least one row'),
        (lambda: Evaluation([.1, .2], [1., 2.]).plot_confidence(), 'Residuals'.lower())]
    for f, say in cases:
        with pytest.raises(FastaiTLError) as e:
            f()
        assert say in str(e.value).lower() or say in str(e.value), str(e.value)


# --- new rows for a Learner ---

@pytest.fixture(scope='module')
def reviews():
    "A table whose columns have names of their own, and a classifier of its first 40 rows"
    seed_everything(0)
    words = [(a, b) for a in ('film', 'book', 'song', 'play', 'meal') for b in ('good', 'bad')]*6
    df = pd.DataFrame(dict(review=[f'The {a} number {i} was {b} .' for i, (a, b) in enumerate(words)],
                           stars=['pos' if b == 'good' else 'neg' for _, b in words]))
    return df


def hf_learner(df, **kw):
    from transformers import BertConfig
    tok = train_tokenizer(list(df.review), 300, max_length=32)
    config = BertConfig(vocab_size=len(tok), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=16, max_position_embeddings=64)
    rows = df.assign(valid=np.arange(len(df)) >= 40)
    dls = HFTextDataLoaders.from_df(rows, tok, text_col='review', label_col='stars', valid_col='valid', bs=8, **kw)
    return hf_classifier_learner(dls, config)


def test_a_table_is_read_by_the_columns_of_the_training_data(reviews):
    learn = hf_learner(reviews)
    valid = reviews[40:]
    with learn.no_bar():
        own = learn.evaluate()
        new = learn.evaluate(valid)
        lists = learn.evaluate(list(valid.review), list(valid.stars))
    for ev in (new, lists):
        assert np.allclose(ev.probs, own.probs, atol=1e-5) and (ev.targets == own.targets).all()
        assert np.allclose(ev.losses, own.losses, atol=1e-4) and ev.texts == list(valid.review)
    with learn.no_bar(), pytest.raises(DataError, match='stars'):
        learn.evaluate(valid.rename(columns=dict(stars='label')))
    with learn.no_bar(), pytest.raises(DataError, match='others in row 41'):
        learn.evaluate(valid.assign(stars=['pos', 'none'] + ['neg']*18))


def test_windows_of_a_new_text_count_once(reviews):
    "The probabilities of a text are the mean over its windows, as the Predictor computes them"
    learn = hf_learner(reviews, windows=2, max_length=8)
    valid = reviews[40:]
    with learn.no_bar():
        ev = learn.evaluate(valid)
        want = pool_windows(learn.get_preds()[0].as_subclass(torch.Tensor), learn.dls.window_rows[1]).numpy()
    assert len(ev) == 20 and ev.texts == list(valid.review)
    assert np.allclose(ev.probs, want, atol=1e-5)
    assert np.allclose(ev.losses, -np.log(want[np.arange(20), ev.targets]), atol=1e-4)


def test_plain_fastai_learner_reads_a_table(reviews):
    from fastai.text.all import AWD_LSTM, TextDataLoaders, awd_lstm_clas_config, text_classifier_learner
    rows = reviews.assign(valid=np.arange(len(reviews)) >= 40)
    dls = TextDataLoaders.from_df(rows, text_col='review', label_col='stars', valid_col='valid', bs=8, seq_len=16)
    config = dict(emb_sz=8, n_hid=8, n_layers=1, pad_token=1, bidir=False)
    config = {**awd_lstm_clas_config, **config}
    learn = text_classifier_learner(dls, AWD_LSTM, pretrained=False, config=config)
    with learn.no_bar():
        own = learn.evaluate()
        new = learn.evaluate(reviews[40:])
    assert np.allclose(new.probs, own.probs, atol=1e-5) and (new.targets == own.targets).all()


def test_taggers_and_answers_of_new_rows(reviews):
    from transformers import BertConfig
    tok = train_tokenizer(list(reviews.review), 300, max_length=48)
    config = BertConfig(vocab_size=len(tok), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=16, max_position_embeddings=64)
    words = [text.split() for text in reviews.review]
    tags = [['O', 'B-THING'] + ['O']*(len(w)-2) for w in words]
    table = pd.DataFrame(dict(w=words, t=tags, valid=np.arange(len(words)) >= 40))
    dls = HFTagDataLoaders.from_df(table, tok, words_col='w', tags_col='t', valid_col='valid', bs=8, verbose=False)
    tagger = hf_tagger_learner(dls, config)
    own = tagger.evaluate()
    assert tagger.evaluate(table[40:]).preds == own.preds and tagger.evaluate(words[40:], tags[40:]).preds == own.preds
    asked = pd.DataFrame(dict(question='Which number?', context=reviews.review, answer=[w[3] for w in words],
                              valid=table.valid))
    dls = HFQADataLoaders.from_df(asked, tok, valid_col='valid', max_length=48, stride=8, bs=8, verbose=False)
    answerer = hf_qa_learner(dls, config)
    own = answerer.evaluate()
    assert answerer.evaluate(asked[40:]).preds == own.preds and len(own) == 20
    pairs = list(zip(asked.question[40:], asked.context[40:]))
    assert answerer.evaluate(pairs, list(asked.answer[40:])).targets == own.targets
