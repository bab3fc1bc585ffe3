"Folds that leak nothing, out-of-fold predictions in the table's order, and tests of differences computed directly."

import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

from fastai_tl.core import DataError, RunError, TrainingError, derive_seed
from fastai_tl.data.splits import Fold, cross_folds, time_folds
from fastai_tl.evaluation.evaluation import Evaluation
from fastai_tl.evaluation.intervals import corrected_ttest
from fastai_tl.evaluation.cross_validation import FoldError, cross_validate, run_folds, time_series_validate

from repo import clean_env


# --- leakage ---

@settings(max_examples=80, deadline=None)
@given(groups=st.lists(st.integers(0, 12), min_size=30, max_size=120), n_folds=st.integers(2, 4),
       repeats=st.integers(1, 3), seed=st.integers(0, 999), classes=st.integers(1, 3), stratify=st.booleans())
def test_a_group_is_never_on_both_sides(groups, n_folds, repeats, seed, classes, stratify):
    df = pd.DataFrame(dict(g=groups, label=[f'c{(i*7+g)%classes}' for i, g in enumerate(groups)]))
    try:
        folds = cross_folds(df, n_folds=n_folds, repeats=repeats, group_col='g', seed=seed, stratify=stratify)
    except DataError:
        return     # too few groups, or rows of a class
    assert len(folds) == n_folds*repeats
    for f in folds:
        assert len(f.train) and len(f.valid) and not set(df.g[f.train]) & set(df.g[f.valid])
        assert sorted([*f.train, *f.valid]) == list(range(len(df)))
    for r in range(1, repeats+1):
        validated = np.concatenate([f.valid for f in folds if f.repeat == r])
        assert sorted(validated) == list(range(len(df))), 'each row validates once a repeat'


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(6, 60), min_size=2, max_size=5), n_folds=st.integers(2, 6), seed=st.integers(0, 999))
def test_shares_of_the_classes_are_kept(counts, n_folds, seed):
    df = pd.DataFrame(dict(label=[c for c, n in enumerate(counts) for _ in range(n)])).sample(frac=1, random_state=seed)
    for f in cross_folds(df, n_folds=n_folds, seed=seed):
        got = df.label.iloc[f.valid].value_counts()
        assert all(n//n_folds <= got.get(c, 0) <= -(-n//n_folds) for c, n in enumerate(counts))


def dates(days):
    return [pd.Timestamp('2024-01-01')+pd.Timedelta(days=i) for i in days]


times = st.one_of(
    st.lists(st.integers(0, 60), min_size=30, max_size=150),
    st.lists(st.floats(0, 1e6), min_size=30, max_size=100),
    st.lists(st.integers(0, 90), min_size=30, max_size=150).map(dates))


@settings(max_examples=120, deadline=None)
@given(times=times, n_folds=st.integers(1, 5), gap=st.integers(0, 4),
       train_size=st.one_of(st.none(), st.integers(1, 20)), valid_size=st.one_of(st.none(), st.integers(1, 6)))
def test_time_never_goes_backwards(times, n_folds, gap, train_size, valid_size):
    t = pd.Series(times)
    try:
        folds = time_folds(t, n_folds+1, valid_size, gap, train_size)
    except DataError:
        return     # too few distinct times
    u = np.sort(t.unique())
    for f in folds:
        tr, va = t[f.train], t[f.valid]
        assert tr.max() < va.min()
        between = np.searchsorted(u, va.min()) - np.searchsorted(u, tr.max()) - 1
        assert between == gap, 'distinct times between training and validation'
        assert train_size is None and tr.min() == u[0] or train_size is not None and tr.nunique() <= train_size
        assert valid_size is None or va.nunique() == valid_size
        assert not set(t.drop(f.valid)) & set(va), 'rows of one time stay together'
    for a, b in zip(folds, folds[1:]):
        assert t[a.valid].max() < t[b.valid].min()
    assert t[folds[-1].valid].max() == u[-1], 'the last window is the latest'


@settings(max_examples=60, deadline=None)
@given(days=st.lists(st.integers(0, 200), min_size=60, max_size=150), gap=st.integers(0, 20),
       train=st.one_of(st.none(), st.integers(5, 60)))
def test_durations(days, gap, train):
    t = pd.Series(pd.Timestamp('2024-01-01')+pd.to_timedelta(days, 'D'))
    try:
        folds = time_folds(t, 4, gap=f'{gap}D', train_size=None if train is None else pd.Timedelta(days=train))
    except DataError:
        return
    for f in folds:
        first, past = t[f.valid].min(), t[t <= t[f.valid].min()-pd.Timedelta(days=gap)]
        past = past[past < first]
        want = past if train is None else past[past > past.max()-pd.Timedelta(days=train)]
        assert f.train.tolist() == want.index.tolist()


def test_times_with_a_zone_and_as_text():
    t = pd.Series(pd.date_range('2024-01-01', periods=40, tz='Asia/Taipei'))
    assert [f.valid.tolist() for f in time_folds(t, 3)] == [f.valid.tolist() for f in time_folds(range(40), 3)]
    with pytest.raises(DataError, match='to_datetime'):
        time_folds(t.astype(str))


# --- predictions in the table's order ---

def table(n=60, seed=0):
    rng = np.random.default_rng(seed)
    columns = dict(text=[f'text {i}' for i in range(n)], label=rng.choice(['neg', 'neutral', 'pos'], n),
                   g=np.arange(n)//3, day=np.arange(n)//2)
    return pd.DataFrame(columns, index=[f'r{i}' for i in range(n)])


CLASSES = ['neg', 'neutral', 'pos']


def by_name(train_df, valid_df, seed):
    "Probabilities that say which row they are of"
    p = np.array([[int(t.split()[1])/1000, .3, .7-int(t.split()[1])/1000] for t in valid_df.text])
    y = valid_df.label.map(CLASSES.index).to_numpy()
    return Evaluation(p, y, CLASSES, losses=-np.log(p[range(len(y)), y]), texts=valid_df.text.tolist())


def noisy(train_df, valid_df, seed):
    rng = np.random.default_rng(seed)
    y = valid_df.label.map(CLASSES.index).to_numpy()
    p = .3*np.eye(3)[y]+.7*rng.dirichlet([1, 1, 1], len(y))
    return Evaluation(p, y, CLASSES, losses=-np.log(p[range(len(y)), y]), texts=valid_df.text.tolist())


@pytest.mark.parametrize('kw', [
    {}, dict(repeats=3), dict(group_col='g'), dict(group_col='g', repeats=2, stratify=False)], ids=str)
def test_rows_are_in_the_order_of_the_table(kw):
    df = table().sample(frac=1, random_state=1)
    cv = cross_validate(by_name, df, n_folds=4, progress=False, **kw)
    ev = cv.evaluation()
    assert ev.texts == df.text.tolist() and [ev.classes[t] for t in ev.targets] == df.label.tolist()
    assert cv.rows.tolist() == list(range(60))
    np.testing.assert_allclose(ev.probs[:, 0], [int(t.split()[1])/1000 for t in df.text])
    np.testing.assert_allclose(ev.losses, -np.log(ev.probs[range(60), ev.targets]))


def test_rows_of_time_windows():
    df = table().sample(frac=1, random_state=1)
    cv = time_series_validate(by_name, df, 'day', n_folds=4, gap=1, progress=False)
    assert cv.evaluation().texts == df.text.iloc[cv.rows].tolist() and len(cv.rows) == 48
    assert set(df.day.iloc[cv.rows]) == set(range(6, 30)), 'what no window validates is left out'


def test_seeds_differ_by_fold_and_repeat_and_factories_see_them():
    seen = []
    def factory(train_df, valid_df, seed):
        seen.append((seed, np.random.rand()))
        return noisy(train_df, valid_df, seed)
    for _ in range(2):
        cross_validate(factory, table(), n_folds=3, repeats=2, seed=7, progress=False)
    assert seen[:6] == seen[6:] and len({s for s, _ in seen}) == 6 and len({r for _, r in seen}) == 6
    assert seen[0][0] == derive_seed(7, 'fold', 1, 1)


def test_a_factory_cannot_change_the_table():
    def factory(train_df, valid_df, seed):
        train_df['label'], valid_df['text'] = 'x', 'y'
        return Evaluation(np.full((len(valid_df), 3), 1/3), valid_df.label.map(CLASSES.index), CLASSES)
    df = table()
    cross_validate(factory, df, n_folds=3, progress=False)
    pd.testing.assert_frame_equal(df, table())


# --- figures ---

def test_summary_and_comparison_are_the_direct_computation():
    df = table(90)
    a, b = (cross_validate(f, df, n_folds=5, repeats=4, progress=False) for f in (noisy, by_name))
    x, y = a.scores().accuracy.to_numpy(), b.scores().accuracy.to_numpy()
    ratio, tq = 18/72, stats.t.ppf(.975, 19)
    s = a.summary().loc['accuracy']
    half = tq*np.sqrt((1/20+ratio)*x.var(ddof=1))
    np.testing.assert_allclose(s.to_numpy(dtype=float), [x.mean(), x.std(ddof=1), x.mean()-half, x.mean()+half])
    c, d = a.compare(b).loc['accuracy'], x-y
    t = d.mean()/np.sqrt((1/20+ratio)*d.var(ddof=1))
    want = [x.mean(), y.mean(), d.mean(), t, 2*stats.t.sf(abs(t), 19)]
    np.testing.assert_allclose([c.this, c.other, c.difference, c.t, c.p], want)
    for f, e in zip(a.folds, a.evaluations.values()):
        assert (e.preds == e.targets).mean() == a.scores().accuracy[a.folds.index(f)]
    np.testing.assert_allclose(b.compare(a).difference, -a.compare(b).difference)


@settings(max_examples=100, deadline=None)
@given(d=st.lists(st.floats(-1, 1), min_size=2, max_size=30), ratio=st.floats(0, 1))
def test_corrected_ttest(d, ratio):
    r, d = corrected_ttest(d, ratio), np.array(d)
    if d.std() < 1e-9:
        return
    t, p = stats.ttest_1samp(d, 0)
    assert r['t'] == pytest.approx(t*np.sqrt((1/len(d))/(1/len(d)+ratio)), rel=1e-6) and r['p'] >= p-1e-9
    assert (r['p'] < .05) == (not r['low'] <= 0 <= r['high']) or abs(r['p']-.05) < 1e-6


def test_corrected_ttest_without_spread():
    assert corrected_ttest([0, 0, 0], .25)['p'] == 1 and corrected_ttest([.1, .1, .1], .25)['p'] < 1e-6
    assert np.isnan(corrected_ttest([.1], .25)['p'])


# --- failures ---

@pytest.mark.parametrize('fails', [1, 2, 4])
def test_a_failing_fold_names_itself_and_keeps_the_others(fails, tmp_path):
    calls = []
    def factory(train_df, valid_df, seed):
        calls.append(seed)
        if len(calls) == fails:
            raise RuntimeError('CUDA out of memory')
        return noisy(train_df, valid_df, seed)
    with pytest.raises(FoldError, match=f'Fold {fails} of repeat 1 must train.*RuntimeError: CUDA out of memory') as e:
        cross_validate(factory, table(), n_folds=4, out=tmp_path/'cv', progress=False)
    assert isinstance(e.value, TrainingError) and isinstance(e.value.__cause__, RuntimeError)
    assert len(e.value.results.done) == fails-1
    if fails > 1:
        part = e.value.results.evaluation()
        assert len(part) == 15*(fails-1) and len(e.value.results.scores()) == fails-1
    cv = cross_validate(factory, table(), n_folds=4, out=tmp_path/'cv', progress=False)
    whole = cross_validate(noisy, table(), n_folds=4, progress=False)
    assert len(calls) == 5 and calls[fails-1] == calls[fails]
    np.testing.assert_array_equal(cv.evaluation().probs, whole.evaluation().probs)
    np.testing.assert_array_equal(cv.evaluation().losses, whole.evaluation().losses)
    assert cv.evaluation().texts == whole.evaluation().texts
    assert cv.scores().drop(columns='seconds').equals(whole.scores().drop(columns='seconds'))


def test_a_killed_run_continues(tmp_path):
    "Killed hard in the third fold; the next call trains the two that are missing"
    code = textwrap.dedent('''
        import os, signal, sys
        sys.path.insert(0, sys.argv[1])
        from test_validate import noisy as base, table
        from fastai_tl.evaluation.cross_validation import cross_validate
        n = 0
        def noisy(*args):
            global n
            n += 1
            if n == int(sys.argv[3]): os.kill(os.getpid(), signal.SIGKILL)
            return base(*args)
        cv = cross_validate(noisy, table(), n_folds=4, out=sys.argv[2], progress=False)
        print('trained', n, repr(cv))''')
    def go(kill):
        args = [sys.executable, '-W', 'ignore', '-c', code, os.path.dirname(__file__), str(tmp_path/'cv'), str(kill)]
        return subprocess.run(args, env=clean_env(), text=True, capture_output=True, timeout=200)
    assert go(3).returncode == -signal.SIGKILL
    res = go(99)
    assert 'trained 2 FoldResults(4 of 4 folds done)' in res.stdout, res.stdout+res.stderr
    assert not list((tmp_path/'cv').glob('*.part')) and len(list((tmp_path/'cv').glob('*.safetensors'))) == 4


def test_a_folder_of_another_run_raises_an_error(tmp_path):
    cross_validate(noisy, table(), n_folds=3, out=tmp_path, progress=False)
    for kw, df in ((dict(seed=1), table()), (dict(n_folds=4), table()), ({}, table(seed=1))):
        with pytest.raises(RunError, match='other settings'):
            cross_validate(noisy, df, **{'n_folds': 3, **kw}, out=tmp_path, progress=False)
    with pytest.raises(RunError, match='by_name'):
        cross_validate(by_name, table(), n_folds=3, out=tmp_path, progress=False)


@pytest.mark.parametrize('wrong, says', [
    (lambda a, b, s: noisy(a, b.iloc[1:], s), '14 rows'),
    (lambda a, b, s: noisy(a, b[::-1], s), 'rows differ'),
    (lambda a, b, s: noisy(b, a.head(15), s), 'rows differ'),
    (lambda a, b, s: None, 'a NoneType'),
    (lambda a, b, s: 1/0, 'ZeroDivisionError')])
def test_factories_that_break_the_contract(wrong, says):
    with pytest.raises(FoldError, match=says):
        cross_validate(wrong, table(), n_folds=4, progress=False)


def test_labels_that_are_changed_on_purpose():
    binary = lambda a, b, s: Evaluation(np.full((len(b), 2), .5), (b.label == 'pos').astype(int), ['rest', 'pos'])
    with pytest.raises(FoldError, match='label_col=None'):
        cross_validate(binary, table(), n_folds=3, progress=False)
    assert len(cross_validate(binary, table(), label_col=None, n_folds=3, progress=False).evaluation()) == 60


def test_folds_by_hand_may_overlap():
    df, rng = table(), np.random.default_rng(0)
    folds = [Fold(1, i+1, o[12:], o[:12]) for i in range(5) for o in [rng.permutation(60)]]
    cv = run_folds(by_name, df, folds, progress=False)
    ev = cv.evaluation()
    assert ev.texts == df.text.iloc[cv.rows].tolist() and len(cv.rows) < 60
    np.testing.assert_allclose(ev.probs[:, 0], cv.rows/1000)


# --- with Learners ---

def test_learners_train_afresh_and_repeatably():
    "No two folds start with the same weights, two runs give the same predictions, and none knows its validation labels"
    from fastai.callback.schedule import fit_one_cycle  # noqa: F401 (a Learner method)
    from fastai_tl.data.awd_lstm import classifier_dls, texts_vocab
    from fastai_tl.data.tokenizers import tokenize_texts_once
    from fastai_tl.learners.classification import awd_classifier_learner
    rng = np.random.default_rng(0)
    words = zip(rng.choice(['One', 'This', 'That'], 60), rng.choice(['here', 'there', 'now'], 60), ['good', 'bad']*30)
    df = pd.DataFrame(dict(text=[f'{a} film {b} was {w}' for a, b, w in words], label=['pos', 'neg']*30))
    tokens = tokenize_texts_once(df.text)
    starts = []
    def lstm(train_df, valid_df, seed):
        train = train_df.index.tolist()
        vocab = texts_vocab(tokens, min_freq=1, idxs=train)
        rows = train, valid_df.index.tolist()
        dls = classifier_dls(tokens, df.label.tolist(), 'classification', *rows, vocab, bs=8)
        config = dict(emb_sz=12, n_hid=16, n_layers=1)
        learn = awd_classifier_learner(dls, 'classification', 2, config, drop_mult=.1)
        starts.append(next(learn.model.parameters()).sum().item())
        with learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(8, 4e-2)
        return learn
    a, b = (cross_validate(lstm, df, n_folds=3, progress=False) for _ in range(2))
    np.testing.assert_array_equal(a.evaluation().probs, b.evaluation().probs)
    assert starts[:3] == starts[3:] and len(set(starts)) == 3
    assert a.evaluation().accuracy > .9, 'words that tell the classes apart are learnt'
    noise = df.assign(label=rng.permutation(df.label.to_numpy()))
    df['label'] = noise.label
    of_noise = cross_validate(lstm, noise, n_folds=3, progress=False).evaluation()
    assert of_noise.accuracy < .75, 'random labels cannot be predicted'
