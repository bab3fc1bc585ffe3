"A random split keeps every label and tag in training, says which rows are never validated, and changes nothing else"

import warnings

import numpy as np
import pandas as pd
import pytest

from fastai_tl.core import DataError, FastaiTLError
from fastai_tl.all import HFQADataLoaders, HFTagDataLoaders, HFTextDataLoaders, cross_folds, split_rows
from fastai_tl.all import train_tokenizer
from fastai_tl.datasets.quickstart import own_data
from fastai_tl.data.splits import derive_seed

WORDS = 'the film was very good bad dull fine plot actor scene slow bright'.split()
TEXTS = [' '.join(np.random.default_rng(i).choice(WORDS, 5)) + f' {i}' for i in range(100)]
RARE = ['pool', 'spa', 'wifi', 'gym']


@pytest.fixture(scope='module')
def tok():
    return train_tokenizer(TEXTS, 400)


def label_lists(n=100):
    "Several labels a text; four labels occur once"
    rng = np.random.default_rng(3)
    lists = [sorted(rng.choice(['food', 'room', 'staff'], rng.integers(1, 3), replace=False)) for _ in range(n)]
    for i, label in enumerate(RARE):
        lists[i*20 + 2] = [*lists[i*20 + 2], label]
    return lists


def plain_draw(n, seed, share=0.2):
    "The split of before: a permutation, of which the first rows are for validation"
    return np.random.default_rng(derive_seed(seed, 'rows')).permutation(n)[: round(n*share)].tolist()


def labels_of(lists, rows):
    return {label for i in rows for label in lists[i]}


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('task', ['multilabel', 'tagging'])
@pytest.mark.parametrize('share', [0.1, 0.2, 0.5, 0.9])
def test_each_label_is_in_training(task, share):
    lists = label_lists()
    everything = labels_of(lists, range(100))
    for seed in range(50):
        train, valid = split_rows(lists, task, valid_pct=share, seed=seed)
        assert sorted(train + valid) == list(range(100))
        assert labels_of(lists, train) == everything
        assert not labels_of(lists, valid) & set(RARE)
        if share < 0.6:
            assert len(valid) == round(100*share)


def test_a_split_that_was_right_is_the_same():
    lists = [['a', 'b'][i % 2 :] for i in range(50)]
    for seed in range(20):
        assert split_rows(lists, 'multilabel', seed=seed)[1] == sorted(plain_draw(50, seed))
        assert split_rows(lists, 'regression', seed=seed)[1] == sorted(plain_draw(50, seed))


@pytest.mark.parametrize('task,said', [('multilabel', 'Labels with a single text'), ('tagging', 'Tags with a single')])
def test_rare_labels_are_named(task, said):
    with pytest.warns(UserWarning, match=said) as found:
        split_rows(label_lists(), task)
    assert all(label in str(found[0].message) for label in RARE)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        split_rows([['a'], ['b'], ['a', 'b'], ['a'], ['b']], task)


@pytest.mark.filterwarnings('ignore')
def test_single_labels_for_any_share():
    labels = ['a']*40 + ['b']*3 + ['c']*2 + ['d']
    for seed in range(20):
        for share in (0.1, 0.5, 0.95):
            train, valid = split_rows(labels, 'classification', valid_pct=share, seed=seed)
            assert {labels[i] for i in train} == set('abcd') and valid
    for share in (1, 1.0, 20):
        with pytest.raises(FastaiTLError, match='below 1'):
            split_rows(labels, 'classification', valid_pct=share)


@pytest.mark.filterwarnings('ignore')
def test_all_dataloaders(tok):
    lists = label_lists()
    df = pd.DataFrame(dict(text=TEXTS, label=[';'.join(labels) for labels in lists]))
    for seed in range(8):
        dls = HFTextDataLoaders.from_df(df, tok, label_delim=';', seed=seed, bs=8, verbose=False)
        assert set(dls.vocab) == labels_of(lists, range(100)) and len(dls.valid_ds) == 20
        windows = HFTextDataLoaders.from_df(
            df, tok, label_delim=';', seed=seed, bs=8, verbose=False, windows=1, max_length=6
        )
        assert set(windows.vocab) == set(dls.vocab)
        words = [text.split() for text in TEXTS]
        tags = [['O']*len(sentence) for sentence in words]
        for i, kind in enumerate(RARE):
            tags[i*20 + 3][1] = f'B-{kind}'
        tagged = HFTagDataLoaders.from_lists(words, tags, tok, seed=seed, bs=8, verbose=False)
        assert set(tagged.vocab) == {'O', *(f'B-{kind}' for kind in RARE)} and len(tagged.valid_ds) == 20
    asked = HFQADataLoaders.from_lists(['What?']*20, TEXTS[:20], [t.split()[0] for t in TEXTS[:20]], tok, verbose=False)
    assert len(asked.valid_ds) == 4


@pytest.mark.filterwarnings('ignore')
def test_ulmfit(tmp_path):
    from fastai_tl.learners.ulmfit_stages import TableOptions

    df = pd.DataFrame(dict(text=TEXTS, label=[';'.join(labels) for labels in label_lists()]))
    for seed in range(8):
        rows = TableOptions(label_delim=';').read(df, seed)
        assert labels_of(rows.labels, rows.train) == labels_of(rows.labels, range(100))


def test_folds_of_several_labels():
    lists = label_lists()
    df = pd.DataFrame(dict(text=TEXTS, label=lists))
    with pytest.warns(UserWarning, match='not validated: gym, pool, spa, wifi'):
        folds = cross_folds(df, n_folds=5, repeats=2)
    rare = {i for i in range(100) if set(lists[i]) & set(RARE)}
    for fold in folds:
        assert labels_of(lists, fold.train) == labels_of(lists, range(100))
        assert sorted([*fold.train, *fold.valid]) == list(range(100))
    for repeat in (1, 2):
        validated = [i for fold in folds if fold.repeat == repeat for i in fold.valid]
        assert sorted(validated) == sorted(set(range(100)) - rare)
    single = df.assign(label=['a', 'b']*49 + ['a', 'rare'])
    with pytest.warns(UserWarning, match='rare'):
        folds = cross_folds(single, stratify=False)
    assert all(99 in fold.train for fold in folds)


def test_quickstart_table(tmp_path):
    "A class with one row is in training, not in the test rows"
    df = pd.DataFrame(dict(text=TEXTS, label=['a', 'b']*49 + ['a', 'rare']))
    df.to_csv(tmp_path/'one.csv', index=False)
    df.assign(split=['train']*60 + ['test']*39 + ['train']).to_csv(tmp_path/'two.csv', index=False)
    for name in ('one', 'two'):
        rows = own_data(tmp_path/f'{name}.csv').labelled
        assert rows[rows.label == 'rare'].split.tolist() == ['train']


def test_every_class_twice(tok):
    texts, labels = TEXTS[:40], [f'c{i//2}' for i in range(40)]
    for seed in range(5):
        dls = HFTextDataLoaders.from_lists(texts, labels, tok, seed=seed, bs=4, verbose=False)
        train, valid = ({label for _, label in ds.items} for ds in (dls.train_ds, dls.valid_ds))
        assert len(dls.valid_ds) == 8 and train == set(labels) and valid < train


def test_every_class_once_says_why(tok):
    labels = [f'c{i}' for i in range(20)]
    calls = (lambda: HFTextDataLoaders.from_lists(TEXTS[:20], labels, tok, verbose=False),
             lambda: HFTextDataLoaders.from_lists(TEXTS[:20], [[label] for label in labels], tok, verbose=False),
             lambda: HFTagDataLoaders.from_lists([['a', 'b']]*20, [['O', tag] for tag in labels], tok, verbose=False))
    for call in calls:
        with pytest.warns(UserWarning, match='never validated'), pytest.raises(DataError, match='no other row has'):
            call()
