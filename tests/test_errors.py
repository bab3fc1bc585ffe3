"Errors by slice, word and label, and near-duplicates, against definitions and other libraries."

import json
import random
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings, strategies as st
from scipy import stats

from fastai_tl.core import DataError, FastaiTLError, seed_everything
from fastai_tl.data.near_duplicates import char_ngrams, comparable_text, near_duplicates
from fastai_tl.evaluation.error_analysis import overused_words, text_words
from fastai_tl.evaluation.evaluation import Evaluation


# --- slices ---

@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 120), k=st.integers(2, 5), values=st.integers(1, 40), min_rows=st.integers(1, 20),
       seed=st.integers(0, 10**6))
def test_slices_count_each_row_once(n, k, values, min_rows, seed):
    rng = np.random.default_rng(seed)
    ev = Evaluation(rng.dirichlet(np.ones(k), n), rng.integers(0, k, n), [f'c{i}' for i in range(k)])
    wrong = ev.preds != ev.targets
    t = ev.error_slices({'v': [f'v{i}' for i in rng.integers(0, values, n)]}, min_rows=min_rows)
    assert t.rows.sum() == n and t.errors.sum() == wrong.sum()
    assert ((t.low <= t.error+1e-12) & (t.error <= t.high+1e-12) & t.p.between(0, 1)).all()
    assert t.worse.is_monotonic_decreasing
    np.testing.assert_allclose((t.worse*t.rows).sum(), 0, atol=1e-9)
    assert (t.rows < min_rows).sum() <= 1, 'rare values are pooled'


def test_what_can_be_sliced_by():
    rng = np.random.default_rng(0)
    texts = ['x'*(1+i%30) for i in range(90)]
    ev = Evaluation(rng.dirichlet([1, 1], 90), rng.integers(0, 2, 90), ['a', 'b'], texts=texts)
    days = pd.Series(pd.date_range('2024-01-01', periods=90))
    some = pd.Series([None if i%9 == 0 else float(i) for i in range(90)])
    tags = [['p', 'q'] if i%2 else ['p'] for i in range(90)]
    number = pd.array([1]*45+[None]*45, dtype='Int64')
    by = dict(day=days, missing=some, tags=tags, flag=np.arange(90) > 20, number=number)
    t = ev.error_slices(by, bins=3)
    t = t.set_index(['slice', 'value']).rows
    assert t['day'].sum() == 90 and len(t['day']) == 3 and '2024-01-01 – 2024-01-30' in t['day'].index
    assert t['missing', 'missing'] == 10 and t['missing'].sum() == 90 and len(t['missing']) == 4
    assert t['tags', 'p'] == 90 and t['tags', 'q'] == 45 and t['flag', 'True'] == 69
    assert t['number', '1'] == 45 and t['number', 'missing'] == 45
    assert set(ev.error_slices(['length', 'class', 'predicted', len]).slice) == {'length', 'class', 'predicted', 'len'}
    assert set(ev.error_slices(pd.DataFrame(dict(u=days, v=some))).slice) == {'u', 'v'}
    with pytest.raises(DataError, match='nothing to slice by'):
        ev.error_slices({})


def test_intervals_hold_what_they_promise():
    "Of 95 % intervals of random slices at most a few miss the rate from which the errors were drawn"
    rng = np.random.default_rng(1)
    held = []
    for _ in range(60):
        y = rng.random(400) < .2
        ev = Evaluation(np.stack([~y, y], 1).astype(float), np.zeros(400, int), ['right', 'wrong'])
        t = ev.error_slices({'v': rng.integers(0, 8, 400).astype(str)})
        held += ((t.low <= .2) & (.2 <= t.high)).tolist()
    assert .92 < np.mean(held) < .98


# --- words ---

def test_a_planted_word_is_found_and_chance_is_not():
    rng = np.random.default_rng(2)
    vocab = [f'w{chr(97+i//26)}{chr(97+i%26)}' for i in range(400)]
    false_alarms = 0
    for trial in range(20):
        texts = [' '.join(rng.choice(vocab, 25)) for _ in range(300)]
        marked = rng.random(300) < .25
        false_alarms += len(overused_words(texts, marked)) > 0
        planted = [t+' refund' if (m and rng.random() < .3) or rng.random() < .02 else t for t, m in zip(texts, marked)]
        assert overused_words(planted, marked).word.tolist()[:1] == ['refund']
    assert false_alarms <= 3


def test_a_word_counts_once_a_text():
    texts = ['boring '*50]*2 + ['fine film']*30 + ['boring film']*2
    t = overused_words(texts, [True]*2+[False]*32, alpha=1, min_texts=1).set_index('word')
    assert t.loc['boring', ['texts', 'marked']].tolist() == [4, 2]
    assert t.loc['boring', 'p'] >= stats.fisher_exact([[2, 2], [0, 30]], 'greater').pvalue


def test_words_of_chinese_texts():
    assert text_words('服務很差') == ['服', '務', '很', '差', '服務', '務很', '很差']
    assert text_words('xxbos 服 務 很 差 xxunk') == text_words('服務很差'), 'tokenized into characters'
    words = text_words('服務 很 差')
    assert set(words) >= {'服務', '很', '差'} and '務很' not in words, 'tokenized into words'


# --- labels ---

CLEANLAB = json.loads((Path(__file__).parent/'cleanlab.json').read_text())


@pytest.mark.parametrize('case', CLEANLAB, ids=lambda case: case['name'].replace(' ', '-'))
def test_label_errors_are_those_of_cleanlab(case):
    "What cleanlab 2.9.0 gives with `filter_by='confident_learning'`, and its uncalibrated confident joint"
    probs, y = np.array(case['probs']), np.array(case['labels'])
    ev = Evaluation(probs, y, [f'c{i}' for i in range(probs.shape[1])])
    t = ev.label_errors()
    if y.ndim == 2:
        for i, want in enumerate(case['suspects']):
            assert sorted(t.row[t.label.isin([f'c{i}', f'not c{i}'])]) == want
        return
    assert sorted(t.row) == case['suspects']
    joint, n = np.array(case['joint'], dtype=float), np.bincount(y, minlength=probs.shape[1])
    np.testing.assert_allclose(ev.label_noise(), joint*(n/joint.sum(1))[:, None])
    margin = probs[t.row, y[t.row]]-probs[t.row, [int(s[1:]) for s in t.suggested]]
    assert (np.diff(margin) >= 0).all(), 'the clearest first'


def test_changed_labels_are_found():
    rng = np.random.default_rng(3)
    true = rng.integers(0, 4, 1000)
    probs = np.array([rng.dirichlet(r) for r in .3+6*np.eye(4)[true]])
    flipped = rng.permutation(1000)[:80]
    y = true.copy()
    y[flipped] = (y[flipped]+rng.integers(1, 4, 80))%4
    ev = Evaluation(probs, y, list('abcd'))
    t = ev.label_errors()
    # a suspect is at least as confident as the average row of its class, which by far not every row is
    assert np.isin(flipped, t.row).mean() > .7 and np.isin(t.row, flipped).mean() > .95
    assert 60 <= 1000-np.trace(ev.label_noise().to_numpy()) <= 100, 'the estimated number of wrong labels'


# --- near-duplicates ---

WORDS = ('the room was clean and staff helpful but breakfast cold we would come back again view over harbour noisy '
         'street small bath old lift price fair walk to station ten minutes').split()


def sentence(rng, n): return ' '.join(rng.choice(WORDS) for _ in range(n))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), threshold=st.sampled_from([.5, .7, .9]))
@example(seed=629886, threshold=.9) # no pair at all
def test_near_duplicates_follow_their_definition(seed, threshold):
    "No pair below the threshold, true similarities, and every text that has a match well above it"
    rng = random.Random(seed)
    b = [sentence(rng, rng.randint(4, 30)) for _ in range(30)]
    a = [sentence(rng, rng.randint(4, 30)) for _ in range(10)]
    for t in b[:15]:
        w = t.split()
        for _ in range(rng.randint(0, 3)):
            w[rng.randrange(len(w))] = rng.choice(WORDS)
        a.append(rng.choice([str.upper, str.title, lambda s: s.replace(' ', ', ', 1)+'!'])(' '.join(w)))
    grams = [[set(char_ngrams(comparable_text(t), 5).tolist()) for t in o] for o in (a, b)]
    true = np.array([[len(x & y)/len(x | y) for y in grams[1]] for x in grams[0]])
    got = near_duplicates(a, b, threshold)
    np.testing.assert_allclose(got.similarity, true[got.row, got.other])
    assert (got.similarity >= threshold).all() and not got.row.duplicated().any()
    assert set(np.flatnonzero(true.max(1) >= threshold+.1)) <= set(got.row), 'missed'


def test_recall_at_the_threshold():
    "Pairs just above the threshold are found in 98 of 100 cases"
    rng, pairs = random.Random(4), []
    while len(pairs) < 300:
        t = sentence(rng, 40).split()
        u = t.copy()
        for i in rng.sample(range(40), 4):
            u[i] = rng.choice(WORDS)
        x, y = (set(char_ngrams(comparable_text(' '.join(o)), 5).tolist()) for o in (t, u))
        if .7 <= len(x & y)/len(x | y) < .74:
            pairs.append((' '.join(t), ' '.join(u)))
    found = near_duplicates([a for a, _ in pairs], [b for _, b in pairs], .7)
    assert (found.row == found.other).sum() >= 294


def test_exact_copies_are_always_found():
    rng = random.Random(5)
    b = [sentence(rng, rng.randint(1, 60)) for _ in range(2000)]
    rows = rng.sample(range(2000), 300)
    for threshold in (.5, .7, 1):
        t = near_duplicates([b[i] for i in rows], b, threshold)
        assert len(t) == 300 and (t.similarity == 1).all()
        assert [comparable_text(b[i]) for i in t.other] == [comparable_text(b[rows[i]]) for i in t.row]


def test_chinese_near_duplicates():
    a = ['房間非常乾淨，服務人員也很親切，下次一定再來。', '早餐種類太少，咖啡也是冷的，不會推薦給朋友。']
    b = ['早餐種類太少,咖啡也是冷的,不會推薦給家人', '離捷運站走路五分鐘，非常方便。']
    b.append('房間非常乾淨，服務人員也很親切，下次一定再來！')
    t = near_duplicates(a, b).sort_values('row')
    assert t.other.tolist() == [2, 0] and t.similarity[t.row == 0].tolist() == [1.]


def test_time_and_memory_grow_with_the_texts_not_the_pairs():
    rng = random.Random(6)
    texts = [sentence(rng, 40) for _ in range(6000)]
    def cost(n):
        tracemalloc.start()
        t = time.process_time()
        near_duplicates(texts[:n], texts[n:2*n])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak, time.process_time()-t
    cost(100)
    small = cost(750)
    large = cost(3000)
    assert large[0] < 4.5*small[0]+2e7 and large[0] < 6e7 and large[1] < 10*small[1], (small, large)


def test_many_copies_are_no_problem():
    t = time.process_time()
    thanks = 'Thank you for your review, we hope to see you again'
    found = near_duplicates([f'{thanks}.']*20_000 + [f'{thanks}, guest {i}.' for i in range(1000)])
    assert len(found) == 20_999 and time.process_time()-t < 30


# --- a Learner's own Evaluation, and what does not make sense ---

def test_on_a_learner():
    from fastai_tl.data.awd_lstm import classifier_dls, texts_vocab
    from fastai_tl.data.tokenizers import tokenize_texts_once
    from fastai_tl.learners.classification import awd_classifier_learner
    seed_everything(0)
    texts = [f'The film number {i} was {w} .' for i in range(20) for w in ('good', 'bad')]
    tokens = tokenize_texts_once(texts)
    rows = list(range(24)), list(range(24, 40))
    dls = classifier_dls(tokens, ['pos', 'neg']*20, 'classification', *rows, texts_vocab(tokens), bs=8)
    learn = awd_classifier_learner(dls, 'classification', 2, dict(emb_sz=4, n_hid=6, n_layers=1))
    with learn.no_bar():
        ev = learn.evaluate()
    assert ev.error_slices('class').rows.sum() == 16
    assert not set(w for t in ev.texts for w in text_words(t)) & {'xxbos', 'xxmaj'}
    leaked = ev.leaked_rows([texts[30], 'Nothing like any other text'], 1)
    assert leaked[['row', 'other']].values.tolist() == [[6, 0]], 'a raw text among tokenized ones'
    assert leaked.right[0] == (ev.preds[6] == ev.targets[6])


@pytest.mark.parametrize('call, says', [
    (lambda ev: ev.error_words(), 'Right and wrong'),
    (lambda ev: ev.label_errors(), 'needs classes'),
    (lambda ev: ev.label_noise(), 'one class'),
    (lambda ev: ev.error_slices('class'), 'must be one of length')])
def test_what_a_regression_has_not_raises_an_error(call, says):
    x = np.arange(20.)
    ev = Evaluation(x, x, texts=[f'text {i}' for i in range(20)])
    with pytest.raises(FastaiTLError, match=says):
        call(ev)
    assert ev.error_slices({'v': ['a', 'b']*10}).error.tolist() == [0, 0]
    assert ev.error_slices().rows.tolist() == [10, 10]
