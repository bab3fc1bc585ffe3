"""Summaries of benchmarks/recipes: means with intervals over seeds and rows, and the Trainer with its tuned rate."""

import functools

import more
import numpy as np
import pandas as pd
from common import table
from recipes import CANDIDATES, FIRST, TRAINER_RATES
from task import HERE

TUNED = 'Trainer, tuned'
DEFAULT = 'Trainer, default'
THREE = 'Trainer, tuned, no rate above 2e-4'
SUMMARY = (
    'set size split recipe seeds n_test error low high nll ece seconds against_tuned against_default '
    'difference difference_low difference_high nll_difference nll_difference_low nll_difference_high'
).split()


def choices(file, few=False):
    """Mean over the sets to choose by (or, with `few`, that with the fewest steps) of the logarithms of error and NLL,
    and seconds relative to `full 1e-4`"""
    df = pd.read_csv(file)
    if few:
        df = df[(df.set == 'TREC-6') & (df['size'] == 500)]
    df = df[(df.split == 'valid') & df.recipe.isin(CANDIDATES) & (df.task == 'classification')]
    m = df.groupby(['set', 'size', 'seed', 'recipe'])[['error', 'nll', 'seconds']].mean()
    m['score'] = np.log(m.error.clip(lower=0.05)) + np.log(m.nll)
    t = m.unstack('recipe')
    t = t[t.notna().all(axis=1)]  # only where all recipes are there
    res = pd.DataFrame({k: t[k].mean() for k in ('error', 'nll', 'score')})
    relative = t.seconds.div(t.seconds['full 1e-4'], axis=0).median()
    return res.assign(seconds=relative, runs=len(t)).sort_values('score')


def chosen(file):
    "The winner, and the best of those that need at most 0.7 times its seconds"
    t = choices(file)
    fast = t[t.seconds <= 0.7 * t.seconds.iloc[0]]
    return [t.index[0], *fast.index[:1]]


def chosen_for_tags(file):
    "The tagging recipe with the lowest log(100 - F1) + log(NLL) on held-out sentences, among those with most seeds"
    df = pd.read_csv(file)
    df = df[(df.split == 'valid') & (df.task == 'tagging') & ~df.recipe.str.startswith('Trainer')]
    df = df[df.groupby('recipe').seed.transform('size') == df.groupby('recipe').seed.size().max()]
    return df.assign(score=np.log(100 - df.f1) + np.log(df.nll)).groupby('recipe').score.mean().idxmin()


def lowest_loss(trainers):
    "For each seed the Trainer's run with the lowest loss on the rows to tune on"
    return trainers.loc[trainers.groupby('seed').dev_nll.idxmin()].set_index('seed').recipe


def picked(df):
    "Dict from way to its run of each seed; the Trainer's default rate is 5e-5, its tuned rate has the lowest loss"
    is_trainer = df.recipe.str.startswith('Trainer')
    trainers = df[is_trainer]
    res = {r: g.set_index('seed').recipe for r, g in df[~is_trainer].groupby('recipe', sort=False)}
    if len(trainers):
        res[DEFAULT] = trainers[trainers.rate == 5e-5].set_index('seed').recipe
        res[TUNED] = lowest_loss(trainers)
        three = lowest_loss(trainers[trainers.rate.isin(TRAINER_RATES)])
        if not three.equals(res[TUNED]):
            res[THREE] = three
    return {k: v for k, v in res.items() if len(v)}


@functools.cache
def samples(n_rows, n):
    "How often each row is in each of `n` bootstrap samples"
    drawn = np.random.default_rng(0).integers(n_rows, size=(n, n_rows))
    return np.stack([np.bincount(i, minlength=n_rows) for i in drawn]).astype(np.float32)


def draws(name, size, runs, seeds, folder, n=2000):
    "Error (100 - F1 for tagging) and NLL of `n` bootstrap samples, (n, seeds) each; all ways get the same samples"
    z = [np.load(folder / f'{name} {size} {runs[s]} {s}.npz') for s in seeds]
    w = samples(len(z[0]['n']), n)
    total = lambda v: np.stack([w @ o.astype(np.float32) for o in v], 1)
    words = total([o['n'] for o in z])
    nll = total([o['nll'] for o in z]) / words
    if 'spans' not in z[0]:
        return 100 * total([o['wrong'] for o in z]) / words, nll
    right, pred, true = (total([o['spans'][:, k] for o in z]) for k in range(3))
    return 100 - 200 * right / (pred + true), nll


def interval(x):
    "2.5 and 97.5 % of the mean over seeds that are drawn again, too"
    rng = np.random.default_rng(1)
    k = rng.integers(x.shape[1], size=x.shape)
    return np.percentile(np.take_along_axis(x, k, 1).mean(1), [2.5, 97.5])


def differences(name, size, runs, ways, at, folder):
    "Paired differences of a way to the tuned Trainer, with intervals, and ratios of its processor time"
    tuned, default = ways.get(TUNED), ways.get(DEFAULT)
    both = [s for s in sorted(runs.index) if tuned is not None and s in tuned.index]
    if not both:
        return {}
    rows_of = lambda r: at.loc[[(name, size, r[s], s) for s in both]]
    mine, theirs = rows_of(runs), rows_of(tuned)
    error, nll = draws(name, size, runs, both, folder)
    their_error, their_nll = draws(name, size, tuned, both, folder)
    low, high = interval(error - their_error)
    nll_low, nll_high = interval(nll - their_nll)
    return dict(
        against_tuned=np.median(mine.cpu_seconds.values / theirs.cpu_seconds.values),
        against_default=np.median(mine.cpu_seconds.values / rows_of(default).cpu_seconds.values),
        difference=(mine.score.values - theirs.score.values).mean(),
        difference_low=low,
        difference_high=high,
        nll_difference=(mine.nll.values - theirs.nll.values).mean(),
        nll_difference_low=nll_low,
        nll_difference_high=nll_high,
    )


def summarise(file, folder):
    "One row for each set, size and way; differences to the tuned Trainer are paired by seed and row"
    df = pd.read_csv(file)
    df['score'] = np.where(df.task == 'tagging', 100 - df.f1, df.error)
    # choosing needs all recipes with the same seed
    complete = df.groupby(['set', 'size', 'seed']).recipe.transform('nunique') >= len(FIRST)
    whole = df[(df.split == 'test') | (df.task == 'tagging') | complete]
    at = df.set_index(['set', 'size', 'recipe', 'seed']).sort_index()
    out = []
    for (name, size), g in whole.groupby(['set', 'size'], sort=False):
        ways = picked(g)
        for way, runs in ways.items():
            seeds = sorted(runs.index)
            rows = at.loc[[(name, size, runs[s], s) for s in seeds]]
            low, high = interval(draws(name, size, runs, seeds, folder)[0])
            row = dict(set=name, size=size, split=g.split.iloc[0], recipe=way, seeds=len(seeds), low=low, high=high)
            row.update(n_test=g.n_test.iloc[0], error=rows.score.mean(), nll=rows.nll.mean(), ece=rows.ece.mean())
            row.update(seconds=rows.cpu_seconds.mean(), **differences(name, size, runs, ways, at, folder))
            out.append(row)
    return pd.DataFrame(out, columns=SUMMARY)


def against_trainer(r):
    "Differences of error and loss to the tuned Trainer, and the ratio of the processor times, as text"
    if r.recipe == TUNED or np.isnan(r.difference):
        error = nll = '–'
    else:
        error = f'{r.difference:+.1f} ({r.difference_low:+.1f} to {r.difference_high:+.1f})'
        nll = f'{r.nll_difference:+.3f} ({r.nll_difference_low:+.3f} to {r.nll_difference_high:+.3f})'
    if r.recipe == TUNED:
        share = '1'
    else:
        share = '–' if np.isnan(r.against_tuned) else f'{r.against_tuned:.2f}'
    return error, nll, share


def markdown(t, split):
    "The table of the sets of one split"
    rows = []
    for r in t[t.split == split].itertuples(index=False):
        way = [f'{r.set} {r.size:,}', r.recipe, f'{r.error:.1f} ({r.low:.1f} to {r.high:.1f})']
        error, nll, share = against_trainer(r)
        nll_ece = [f'{r.nll:.3f}', f'{r.ece:.3f}', f'{r.seconds:.0f}']
        if split == 'test':
            rows.append([*way, error, nll_ece[0], nll, *nll_ece[1:], share, r.seeds])
        else:
            rows.append([*way, *nll_ece, r.seeds])
    if split == 'valid':
        return table(['set', 'way', 'error % (95 %):', 'NLL:', 'ECE:', 'processor seconds:', 'seeds:'], rows)
    columns = ['set', 'way', 'error % (95 %):', 'minus tuned Trainer (95 %):', 'NLL:']
    columns += ['NLL minus tuned Trainer (95 %):', 'ECE:', 'processor seconds:', 'of one run of the tuned Trainer:']
    return table([*columns, 'seeds:'], rows)


def filled(text, name, content):
    "The page with a new table between its marks `<!-- recipes: NAME -->` and `<!-- end -->`"
    mark = f'<!-- recipes: {name} -->'
    before, _, rest = text.partition(mark)
    if not rest:
        return text
    return f'{before}{mark}\n{content}\n<!-- end -->' + rest.split('<!-- end -->', 1)[1]


def summary(file, folder):
    "Write results/summary.csv, fill the tables of README.md, write the figures that the package ships, and print them"
    t = summarise(file, folder)
    t.to_csv(file.with_name('summary.csv'), index=False, float_format='%.5g')
    readme = HERE / 'README.md'
    text = readme.read_text(encoding='utf-8')
    for split in ('test', 'valid'):
        print(f'\n{markdown(t, split)}')
        text = filled(text, split, markdown(t, split))
    studies = file.with_name('more.csv')
    if studies.exists():
        text = filled(text, 'more', more.summary(studies))
    readme.write_text(text, encoding='utf-8')
    for few in (False, True):
        print('\n', choices(file, few).round(3).to_markdown())
    ship(t)


# What the recipes of the package are called here: those with the rates and the schedule that `fit_transfer` takes
OWN = {
    'full 2e-4 stlr': 'full',
    'discriminative 2e-4 stlr': 'discriminative',
    'head_then_full stlr': 'head_then_full',
    'top_layers 4 stlr': 'top_layers',
    'gradual stlr': 'gradual',
}
OWN_TAGS = {'discriminative 8e-4 stlr clip': 'discriminative', 'head_then_full 8e-4 stlr clip': 'head_then_full'}


def own(r):
    return (OWN_TAGS if r.set.startswith('CoNLL') else OWN).get(r.recipe)


def set_name(r):
    return f'{r.set} {r.size:,}' + (' (validation)' if r.split == 'valid' else '')


def awd_figures(file):
    "The figures of the recipes for an AWD_LSTM with a trained encoder, at the rate that `fit_transfer` takes"
    df = pd.read_csv(file)
    ways = [f'language model, {n}, 0.01' for n in ('full', 'discriminative', 'head_then_full', 'ulmfit')]
    df = df[(df.study == 'awd') & df.way.isin(ways)]
    for (name, size, way), g in df.groupby(['set', 'size', 'way'], sort=False):
        yield dict(
            recipe=way.split(', ')[1],
            set=f'AWD_LSTM: {name} {size:,} (validation)',
            error=round(g.error.mean(), 1),
            sd=round(g.error.std(), 1),
        )


def ship(t, file=HERE.parents[1] / 'fastai_tl' / 'resources' / 'recipes.csv'):
    "Write the figures that the package shows in `recipes()`"
    rows = []
    for r in t.itertuples(index=False):
        name = TUNED if r.recipe == TUNED else own(r)
        if name is None:
            continue
        time_share = None if name == TUNED else round(r.against_tuned, 2)
        rows.append(
            dict(
                recipe=name,
                set=set_name(r),
                error=round(r.error, 1),
                low=round(r.low, 1),
                high=round(r.high, 1),
                time=time_share,
            )
        )
    rows += awd_figures(HERE / 'results' / 'more.csv')
    order = list(dict.fromkeys(r['recipe'] for r in rows))
    table = pd.DataFrame(rows, columns=['recipe', 'set', 'error', 'low', 'high', 'sd', 'time'])
    table.sort_values('recipe', key=lambda c: c.map(order.index), kind='stable').to_csv(file, index=False)
