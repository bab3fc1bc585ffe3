"Reports, figures, pages, CSV: users' strings as they are, honest intervals, no value that the rows do not give"

import re
import warnings

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import binom
from sklearn.metrics import f1_score, roc_auc_score

import fastai_tl.plot
from fastai_tl.all import *
from fastai_tl.commands.settings import read_settings
from fastai_tl.data.display import NO_FORMULAS
from fastai_tl.data.tags import tags_html
from fastai_tl.evaluation.intervals import f1_interval, ranking_intervals, share_interval
from fastai_tl.evaluation.report import row_kinds, whole_intervals, whole_scores
from fastai_tl.evaluation.scores import ScoredRows
from fastai_tl.files import safe_cell, write_csv
from fastai_tl.generation.surprisal import Surprisal

ODD = ['$0_to_$50', '_own', '100 % {x} $a$', '<b>&amp;</b>', r'\alpha_{1}$^2$', '=1+1', '@sum', '{0}', '#', '~^']


def rows(classes=ODD, n=90, texts=True, seed=0):
    "Return an `Evaluation` with texts that look like markup"
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.ones(len(classes)), n)
    given = [f'{classes[i%len(classes)]} text $x_1$ {i}' for i in range(n)] if texts else None
    return Evaluation.from_preds(probs, rng.integers(0, len(classes), n), classes, texts=given)


def texts_of(fig):
    "Return all strings that a figure draws, and draw it"
    fig.canvas.draw()
    return [t.get_text() for t in fig.findobj(matplotlib.text.Text) if t.get_text()]


# --- strings of the user are no markup ---

@pytest.mark.parametrize('style', [{}, {'axes.formatter.use_mathtext': True, 'text.usetex': True}])
def test_class_names_are_drawn_as_they_are(style):
    ev = rows()
    with plt.rc_context(style):
        figures = {**ev.figures(None if style else ['confusion_matrix']),
                   'shares': ev.plot_confusion(title='$F_1', xlabel='a_b', ylabel='{', normalize='all'),
                   'slices': ev.plot_error_slices('class', min_rows=1), 'of class': ev.plot_reliability(label='_own')}
        curves = plot_curves({name: [1, 2, 3] for name in ODD}, '$a_b', '100 %', '{y}', log=True)
        panels = plot_panels({'$p_1': {'_train': [1, 2]}, '_q': {'$x$': [2, 1]}}, '$s', ['_y', '{}'])
        stages = plot_stages([[1e-2, np.nan]]*4, [.5]*4, [(3, .4)], [(0, 'head'), (2, '$layer_1$ – head')])
    for name, fig in {**figures, 'curves': curves, 'panels': panels, 'stages': stages}.items():
        drawn = texts_of(fig)
        assert not any(t.get_parse_math() or t.get_usetex() for t in fig.findobj(matplotlib.text.Text)
                       if t.get_text() in ODD), name
        assert not any(r'\mathdefault' in text for text in drawn), name
    assert set(ODD) <= set(texts_of(figures['confusion_matrix']))
    assert {'$F_1', 'a_b', '{'} <= set(texts_of(figures['shares']))
    assert [f'class: {c}' in texts_of(figures['slices']) for c in ODD] == [True]*len(ODD)
    assert '_own' in [t.get_text() for t in figures['of class'].axes[0].get_legend().get_texts()]
    assert {t.get_text() for t in curves.axes[0].get_legend().get_texts()} == set(ODD)
    assert {'$p_1', '_q', '_train', '$x$', '$s', '_y', '{}'} <= set(texts_of(panels))
    plt.close('all')


def test_axes_of_the_user_keep_their_own_texts():
    fig, (ax, other) = plt.subplots(1, 2)
    other.set_title('$x^2$')
    ax.plot([1, 2], label='$own$')
    plot_curves({'_a$b$': [1, 2]}, '$1_to_$2', ax=ax)
    names = [t.get_text() for t in ax.get_legend().get_texts()]
    assert names == ['$own$', '_a$b$'] and not ax.title.get_parse_math() and other.title.get_parse_math()
    fig.canvas.draw()
    plt.close(fig)


def test_surprisal_draws_dollars():
    surprisal = Surprisal([('costs', 1.), (r' $5_\$', 2.), (' to', 3.), (' $9', 4.)], r'costs $5_\$ to $9')
    drawn = texts_of(surprisal.plot('$5_to_$9'))
    assert {r'$5_\$', '$9', '$5_to_$9'} <= set(drawn)


def test_html_has_no_formulas_and_no_tags(tmp_path):
    ev = rows(texts=True)
    multi = Evaluation(np.full((4, 2), .6), [[1, 0]]*4, ODD[:2], texts=ODD[:4])
    tagged = TagEvaluation([['B-$a$', 'O']], [['O', 'B-$b$']], [['$1', '$2']])
    answers = AnswerEvaluation(['$1$'], ['$2$'], ['<b>?'])
    tables = [ev.report(), ev.confusion(), ev.most_confused(), ev.top_losses(), ev.to_frame(), ev.error_slices('class'),
              ev.label_errors(), ev.label_noise(), ev.to_frame(errors=True), multi.to_frame(), multi.report(),
              multi.label_errors(), tagged.errors(), tagged.report(), answers.worst(), answers.report(),
              Calibrated(ev), ev.error_words(min_texts=1, alpha=1), ev.leaked_rows(ev.texts)]
    for table in tables:
        page = table._repr_html_()
        assert NO_FORMULAS in page and '<b>&amp;amp;' not in page and '<b>?' not in page
    assert NO_FORMULAS in ev.to_html(figures={}) and NO_FORMULAS in tags_html(['$1'], ['B-$a$'])
    assert NO_FORMULAS in Surprisal([('$1$', 1.)], '$1$')._repr_html_()
    page = ev.save(tmp_path, title='$t$ {css} ${body} %s', figures=[]).read_text(encoding='utf-8')
    assert '$t$ {css} ${body} %s' in page and page.count('<h1>') == 1


def test_a_percent_sign_in_the_settings(tmp_path):
    (tmp_path/'settings.ini').write_text('[fastai_tl]\ntext_col = 100 %\nout = %(x)s_{y}$\n', encoding='utf-8')
    assert read_settings(tmp_path/'settings.ini') == dict(text_col='100 %', out='%(x)s_{y}$')


# --- spreadsheets run no cell ---

FORMULAS = ['=1+1', '+1+1', '-1+1', '@SUM(A1)', '\t=1', '\r=1', '\n=1', '  =1', '＝1', '＋1', '－1', '＠a',
            '\ufeff=1', '-', '=cmd|" /C calc"!A0', "-2+3+cmd|' /C calc'!A0"]
PLAIN = ['a=1', 'good', '5', '-5', '+5', '-1.5e-3', '', ' a', "'=1", '負面', '(=1)', '1=1']


def test_cells_that_spreadsheets_run_get_an_apostrophe(tmp_path):
    assert [safe_cell(c) for c in FORMULAS] == ["'" + c for c in FORMULAS]
    assert [safe_cell(c) for c in PLAIN] == PLAIN
    assert [safe_cell(v) for v in (None, -1, -1.5, True)] == [None, -1, -1.5, True]
    for kind in (object, 'str', 'category'):
        df = pd.DataFrame({'-name': pd.Series(FORMULAS, FORMULAS, kind), 'x': -1.5})
        write_csv(df, tmp_path/'t.csv')
        back = pd.read_csv(tmp_path/'t.csv', index_col=0, keep_default_na=False)
        assert list(back.columns) == ["'-name", 'x'] and (back.x == -1.5).all()
        assert all(c.startswith("'") for c in [*back["'-name"], *back.index])


@pytest.mark.parametrize('task', ['classification', 'multilabel', 'regression'])
def test_no_csv_of_a_report_has_a_formula(task, tmp_path):
    rng = np.random.default_rng(0)
    n = len(FORMULAS)
    classes = FORMULAS[:4]
    made = dict(classification=lambda: Evaluation.from_preds(rng.dirichlet(np.ones(4), n), rng.integers(0, 4, n),
                                                             classes, texts=FORMULAS),
                multilabel=lambda: Evaluation.from_preds(rng.random((n, 4)), rng.integers(0, 2, (n, 4)), classes,
                                                         texts=FORMULAS),
                regression=lambda: Evaluation.from_preds(rng.normal(size=n), rng.normal(size=n), texts=FORMULAS))
    ev = made[task]()
    ev.save(tmp_path, figures=[])
    for file in tmp_path.glob('*.csv'):
        cells = pd.read_csv(file, header=None, dtype=str, keep_default_na=False).to_numpy().ravel()
        risky = [c for c in cells if re.match(r'\s*[=+\-@＝＋－＠]', c)]
        risky = [c for c in risky if not re.fullmatch(r'-\d+\.?\d*(e-?\d+)?', c)]
        assert not risky, file.name
    back = pd.read_csv(tmp_path/'predictions.csv', keep_default_na=False)
    assert [t.replace('\r', '\n') for t in back.text] == ["'" + t.replace('\r', '\n') for t in FORMULAS]


# --- a missing font ---

@pytest.fixture
def no_font(monkeypatch):
    monkeypatch.setattr(fastai_tl.plot, 'find_cjk_font', lambda: None)
    monkeypatch.setitem(fastai_tl.plot._settings, 'said_missing', False)


def test_a_missing_font_costs_nothing(no_font, tmp_path):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        ev = rows(['負面', '中性', '正面'])
        page = ev.save(tmp_path, lang='zh', dpi=40).read_text(encoding='utf-8')
        assert '負面' in page and page.count('<img ') == 4
        assert len(list(tmp_path.glob('*.png'))) == 4 and len(list(tmp_path.glob('*.csv'))) == 4
        texts_of(ev.plot_error_slices('class'))
        texts_of(Calibrated(ev).plot(lang='zh'))
        texts_of(plot_curves({'損失': [1, 2]}))
        texts_of(Surprisal([('不', 1.), ('好', 2.)], '不好').plot('標題'))
    about_fonts = [str(w.message) for w in said if 'font' in str(w.message).lower() or 'Glyph' in str(w.message)]
    assert len(about_fonts) == 1 and 'apt-get install' in about_fonts[0]


def test_a_figure_that_fails_costs_only_itself(tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError('damaged font')
    monkeypatch.setitem(fastai_tl.evaluation.html_report.DRAW, 'reliability', fails)
    with pytest.warns(UserWarning, match="'reliability' could not be made .damaged font"):
        rows(['a', 'b']).save(tmp_path, figures=['confusion_matrix', 'reliability'], dpi=40)
    made = {p.name for p in tmp_path.iterdir()}
    assert {'confusion_matrix.png', 'index.html', 'report.csv', 'scores.json'} <= made
    assert 'reliability.png' not in made
    with pytest.raises(FastaiTLError, match='Figures are'):
        rows(['a', 'b']).figures(['no such'])


def test_damaged_fonts_are_passed_over(monkeypatch, tmp_path):
    (tmp_path/'NotoSansCJK.ttc').write_bytes(b'no font')
    monkeypatch.setattr('matplotlib.font_manager.findSystemFonts', lambda: [str(tmp_path/'NotoSansCJK.ttc')])
    monkeypatch.setattr(fastai_tl.plot, 'CJK_FONTS', ('none of this name',))
    assert fastai_tl.plot.find_cjk_font() is None


# --- intervals ---

def exact_coverage(interval, n, shares):
    "Return the probability that the interval of `n` rows contains each true share"
    k = np.arange(n+1)
    low, high = interval(k, n)
    p = shares[:, None]
    return (binom.pmf(k, n, p)*((low <= p+1e-12) & (p <= high+1e-12))).sum(1)


def test_shares_are_covered_for_every_number_of_rows():
    shares = np.r_[np.linspace(.02, 1, 99), .99, .995, .999]
    assert min(exact_coverage(share_interval, n, shares).min() for n in range(5, 501)) >= .93


def wilson_by_hand(k, n, z=1.959963984540054):
    p = k/n
    half = z/(1+z*z/n)*(p*(1-p)/n + z*z/(4*n*n))**.5
    return (p+z*z/(2*n))/(1+z*z/n)-half, (p+z*z/(2*n))/(1+z*z/n)+half


def test_the_report_has_wilsons_intervals():
    few = Evaluation(np.eye(2)[[0]*8], [0]*8, ['a', 'b']).report()
    assert (few.low['accuracy'], few.high['accuracy']) == pytest.approx(wilson_by_hand(8, 8))
    assert (few.low['a'], few.high['a']) != (1, 1) and (few.low['b'], few.high['b']) == (0, 1)
    y = np.array([0]*60 + [1]*50)
    g = np.array([0]*45 + [1]*15 + [1]*30 + [0]*20)
    r = Evaluation(np.eye(2)[g], y, ['a', 'b']).report(wide=True)
    assert (r.low['accuracy'], r.high['accuracy']) == pytest.approx(wilson_by_hand(75, 110))
    assert tuple(r.loc['a', ['recall low', 'recall high']]) == pytest.approx(wilson_by_hand(45, 60))
    assert tuple(r.loc['a', ['precision low', 'precision high']]) == pytest.approx(wilson_by_hand(45, 65))
    of_f1 = [2*s/(1+s) for s in wilson_by_hand(45, 80)]
    assert (r.low['a'], r.high['a']) == pytest.approx(of_f1)
    assert set(r['interval of']) == {'f1', 'score', ''}
    assert r['interval of'][r.low.notna()].ne('').all() and r['interval of'][r.low.isna()].eq('').all()
    assert r['interval of']['macro avg'] == 'f1' and r['interval of']['MCC'] == 'score'
    missed = Evaluation(np.eye(3)[[0]*5 + [1]*5], [0]*5 + [2]*5, list('abc')).report()
    assert missed.f1['c'] == 0 and missed.low['c'] == 0 and .3 < missed.high['c'] < 1
    assert missed.low['macro avg'] < missed.f1['macro avg'] < missed.high['macro avg']
    multi = Evaluation(np.eye(2)[[0]*8], np.eye(2, dtype=int)[[0]*8], ['a', 'b']).report()
    assert (multi.low['exact match'], multi.high['exact match']) == pytest.approx(wilson_by_hand(8, 8))
    for name in ('accuracy', 'micro avg', 'macro avg', 'samples avg'):
        assert multi.low[name] < .97 and multi.high[name] == pytest.approx(1)


def cell_shares(n_classes, p, skewed):
    "Return the true shares of the cells of a confusion matrix with accuracy `p`"
    share = .5**np.arange(n_classes) if skewed else np.ones(n_classes)
    cells = np.full((n_classes, n_classes), (1-p)/(n_classes-1))
    np.fill_diagonal(cells, p)
    return cells*(share/share.sum())[:, None]


def intervals_of(table, n_boot):
    "Return the intervals of a report from a confusion matrix, by name"
    i, j = np.nonzero(table)
    ev = ScoredRows(np.eye(len(table))[np.repeat(j, table[i, j])], np.repeat(i, table[i, j]), range(len(table)))
    counts, parts = row_kinds(ev)
    averaged, whole = whole_scores([counts@part for part in parts], len(ev), True)
    of_averages, of_whole = whole_intervals(ev, counts, parts, averaged, whole, .95, n_boot, 0)
    found = {name: of_whole[name] for name in ('accuracy', 'balanced_accuracy', 'mcc')}
    found |= {name: of_averages[name]['f1'] for name in ('macro avg', 'weighted avg')}
    tp, true, pred = (counts@part for part in parts)
    found['f1'] = tuple(ends[0] for ends in f1_interval(tp, true, pred))
    return found


def true_values(cells):
    averaged, whole = whole_scores([np.diag(cells), cells.sum(1), cells.sum(0)], 1, True)
    f1 = 2*cells[0, 0]/(cells[0].sum()+cells[:, 0].sum())
    return dict(accuracy=whole['accuracy'], balanced_accuracy=whole['balanced_accuracy'], mcc=whole['mcc'],
                f1=f1, **{name: averaged[name]['f1'] for name in ('macro avg', 'weighted avg')})


def simulated_coverage(n_classes, n, p, skewed, n_samples, n_boot=200):
    "Return the share of simulated reports whose intervals contain the true values, by name"
    cells = cell_shares(n_classes, p, skewed)
    truth = true_values(cells)
    rng = np.random.default_rng(n)
    hits = dict.fromkeys(truth, 0)
    for _ in range(n_samples):
        table = rng.multinomial(n, cells.ravel()).reshape(n_classes, n_classes)
        for name, (low, high) in intervals_of(table, n_boot).items():
            hits[name] += low-1e-9 <= truth[name] <= high+1e-9
    return {name: hit/n_samples for name, hit in hits.items()}


@pytest.mark.parametrize('n_classes, n, p, skewed', [
    (2, 5, .98, False), (2, 8, 1., True), (3, 5, .5, True), (3, 12, .02, False), (6, 8, .8, False), (3, 60, .95, True)])
def test_intervals_of_a_report_cover_the_true_values(n_classes, n, p, skewed):
    for name, share in simulated_coverage(n_classes, n, p, skewed, 150).items():
        assert share >= .93-.036, name # two standard errors of the simulation


@pytest.mark.slow
def test_intervals_of_a_report_cover_the_true_values_everywhere():
    for n_classes in (2, 6):
        for n in (5, 15, 60, 500):
            covered = []
            for p in (.02, .1, .5, .95, 1.):
                covered += [simulated_coverage(n_classes, n, p, skewed, 100) for skewed in (False, True)]
            for name in covered[0]:
                shares = [c[name] for c in covered]
                assert np.mean(shares) >= .94 and min(shares) >= .93-.066, (name, n_classes, n)


def test_intervals_of_entities_answers_and_rankings_do_not_collapse():
    tags = [['B-PER', 'O'], ['B-LOC', 'O'], ['O', 'O']]*3
    right = TagEvaluation(tags, tags).report()
    assert (right.f1 == 1).all() and (right.low < .95).all() and right.high.to_numpy() == pytest.approx(1)
    missed = TagEvaluation([['O', 'O']]*9, tags).report()
    assert (missed.high > .2).all() and (missed.low == 0).all() and set(missed['interval of']) == {'f1'}
    answers = AnswerEvaluation(['x']*8, ['x']*8).report()
    assert .5 < answers.low['all'] < .75 and answers.high['all'] == pytest.approx(1)
    assert set(answers['interval of']) == {'f1'}
    sure = np.eye(3)[[0, 1, 2]*4]
    low, high = ranking_intervals(sure, sure)['roc_auc']
    assert low < .95 and high == pytest.approx(1)
    report = Evaluation(sure, sure.argmax(1), 'abc').report(ranking=True)
    assert report.low['ROC-AUC'] < .95 and report['interval of']['ROC-AUC'] == 'score'


def test_ranking_intervals_are_those_of_drawing_rows():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 400)
    p = np.clip(.5+.2*(y-.5)+rng.normal(0, .2, 400), .01, .99)
    draws = []
    for _ in range(400):
        i = rng.integers(0, 400, 400)
        draws.append(roc_auc_score(y[i], p[i]))
    found = ranking_intervals(np.eye(2)[y], np.c_[1-p, p], n_boot=400)['roc_auc']
    assert found == pytest.approx(np.quantile(draws, [.025, .975]), abs=.015)


# --- temperature and thresholds that the rows do not give ---

def by_class(probs, targets, **kwargs):
    return Evaluation(np.asarray(probs, dtype=float), targets, list('abc')[:len(probs[0])], **kwargs)


NOT_IDENTIFIED = {
    'no error': by_class([[.9, .1], [.8, .2], [.3, .7]], [0, 0, 1]),
    'no error, tiny': by_class([[.999999, 1e-6]]*8, [0]*8),
    'no error, three classes': by_class([[.4, .3, .3], [.2, .5, .3]], [0, 1]),
    'tie': by_class([[.5, .5], [.5, .5]], [0, 1]),
    'worse than chance': by_class([[.9, .1], [.8, .2]], [1, 1]),
    'only 0 and 1': by_class([[1, 0], [1, 0], [0, 1]], [0, 1, 1]),
    'labels': by_class([[.9, .1], [.8, .2]], [[1, 0], [1, 0]]),
    'labels worse than chance': by_class([[.9, .1], [.8, .2]], [[0, 1], [0, 1]])}


@pytest.mark.parametrize('name', NOT_IDENTIFIED)
def test_a_temperature_that_is_not_identified_stays_1(name):
    ev = NOT_IDENTIFIED[name]
    with pytest.warns(UserWarning, match='temperature is not identified'):
        cal = Calibrated(ev)
    assert cal.temperature == 1 and not cal.identified and 'not identified' in repr(cal)
    assert 'not identified' in cal._repr_html_()
    assert np.array_equal(cal.apply(ev).probs, ev.probs) and np.array_equal(cal.after.probs, ev.probs)
    assert np.array_equal(cal.folds.probs, ev.probs)


def test_an_identified_temperature_is_the_maximum(recwarn):
    rng = np.random.default_rng(0)
    for n_errors in (1, 5):
        z = np.abs(rng.normal(2, 1, 60))
        z[:n_errors] *= -1
        p = 1/(1+np.exp(-3*z))
        cal = Calibrated(by_class(np.c_[1-p, p], [1]*60))
        direct = minimize_scalar(lambda t: np.log1p(np.exp(-3*z/t)).mean(), bounds=(.02, 50), method='bounded')
        assert cal.identified and cal.temperature == pytest.approx(direct.x, rel=1e-3)
    assert not [w for w in recwarn if 'not identified' in str(w.message)]


@pytest.mark.parametrize('wanted', [{}, dict(recall=.8), dict(precision=.8), dict(cost=(1, 5))])
@pytest.mark.parametrize('name', ['no error', 'no error, tiny', 'no error, three classes', 'labels'])
def test_thresholds_without_errors_change_nothing(name, wanted):
    ev = NOT_IDENTIFIED[name]
    with pytest.warns(UserWarning, match='do not determine a threshold'):
        table = ev.thresholds(**wanted)
    assert (table.threshold == .5).all() and not table.identified.any()
    assert np.array_equal(ev.with_thresholds(table).preds, ev.preds)


def test_only_classes_with_errors_get_new_thresholds():
    p = np.array([[.9, .2], [.8, .45], [.2, .4], [.1, .1]])
    y = np.array([[1, 0], [1, 1], [0, 1], [0, 0]])
    table = by_class(p, y).thresholds()
    assert table.threshold.tolist() == [.5, .4] and table.identified.tolist() == [False, True]
    assert f1_score(y[:, 1], p[:, 1] >= .4) == table.f1['b'] == 1


def test_abstention_without_errors_decides_all_rows():
    with pytest.warns(UserWarning, match='abstention threshold is not identified'):
        chosen = NOT_IDENTIFIED['no error, tiny'].abstention(.9)
    assert chosen['threshold'] == 0 and chosen['coverage'] == 1 and not chosen['identified']


# --- predictions that cannot be ---

P = [[.6, .4], [.3, .7], [.9, .1]]
Y = [0, 1, 0]
MULTI = [[1, 0], [0, 1], [1, 1]]


@pytest.mark.parametrize('args, kwargs, says', [
    (([[.9, .9], [.2, .1], [.5, .5]], Y, 'ab'), {}, 'sum to 1. Got 1.8 in row 0, 1'),
    (([[.5, .4], [.3, .7], [.9, .1]], Y, 'ab'), {}, 'Got 0.9 in row 0'),
    (([[2., 1.], [3., 7.], [0., 1.]], Y, 'ab'), {}, 'logits=True'),
    (([[.6, np.nan], [.3, .7], [.9, .1]], Y, 'ab'), {}, 'finite numbers'),
    (([[.6, np.inf], [.3, .7], [.9, .1]], Y, 'ab'), dict(logits=True), 'finite numbers'),
    (([[.6, np.nan], [.3, .7], [.9, .1]], MULTI, 'ab'), {}, 'finite numbers'),
    ((P, [0, np.nan, 1], 'ab'), {}, 'row 1'),
    ((P, [[1, 0], [0, np.nan], [1, 1]], 'ab'), {}, 'row 1'),
    (([.1, .2, .3], [1., np.nan, 2.]), {}, 'row 1'),
    (([.1, np.nan, .3], [1., 2., 2.]), {}, 'row 1'),
    ((P, Y, ['a', 'a']), {}, "'a' more than once"),
    ((P, Y, [1, '1']), {}, "'1' more than once"),
    ((P, MULTI, ['a', 'a']), {}, "'a' more than once"),
    ((P, Y, ['a', 'b', 'c']), {}, 'a column for each of 3'),
    ((P, [0, 1], 'ab'), {}, '3 and 2'),
    ((P, Y, 'ab'), dict(texts=['x', 'y']), '2 values'),
    ((P, Y, 'ab'), dict(texts='xyz'), 'one string'),
    ((P, Y, 'ab'), dict(losses=[1., 2.]), '2 values'),
    ((P, Y, 'ab'), dict(losses=[1., np.nan, 2.]), 'NaN in row 1'),
    (([.1, .2, .3], [1., 2., 3.]), dict(texts=['x']), '1 values'),
    ((pd.DataFrame(P, columns=['a', 'c']), Y, 'ab'), {}, 'names of the classes')])
def test_predictions_that_cannot_be_are_refused(args, kwargs, says):
    with pytest.raises(DataError) as e:
        Evaluation.from_preds(*args, **kwargs)
    assert says in str(e.value)


def test_predictions_that_can_be_are_taken():
    for p in ([[.33, .33, .33], [.17, .5, .34]], np.float16([[.1, .2, .7], [.3, .3, .4]]), np.eye(3)[:2]):
        assert len(Evaluation.from_preds(p, [0, 1], 'abc')) == 2
    by_name = pd.DataFrame(P, columns=['b', 'a'])
    assert Evaluation.from_preds(by_name, ['b', 'a', 'b'], ['a', 'b']).accuracy == 1
    assert Evaluation.from_preds(pd.DataFrame(P), Y, 'ab').accuracy == 1
    texts = pd.Series(['x', 'y', 'z'], index=[7, 8, 9])
    assert Evaluation.from_preds(P, Y, 'ab', texts=texts).top_losses(1).text[0] in 'xyz'
    assert len(Evaluation.from_preds(np.empty((0, 2)), [], 'ab')) == 0


def test_tags_and_answers_of_other_lengths_are_refused():
    with pytest.raises(DataError, match='same number of sentences'):
        TagEvaluation([['O']], [['O']], [['a'], ['b']])
    with pytest.raises(DataError, match='as many words as tags'):
        TagEvaluation([['O']], [['O']], [['a', 'b']])
    with pytest.raises(DataError, match='Questions and predictions'):
        AnswerEvaluation(['a'], ['a'], ['x', 'y'])
    for missing in (None, np.nan, pd.NA):
        with pytest.raises(DataError, match='missing values in row 1'):
            AnswerEvaluation(['a', missing], ['a', 'b'])
