"""The quickstart uses the model that validated best, and says which and why; quoted figures belong to the corpus."""

import io
import json
import re
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import pandas as pd
import pytest

from fastai_tl.cli import main
from fastai_tl.datasets.quickstart import QuickData, bag_of_words_accuracy, majority_accuracy, offline_data
from fastai_tl.learners.ulmfit import ULMFiT
from fastai_tl.models.encoder import Encoder
from fastai_tl.quickstart.base import best_validated, explain_choice
from fastai_tl.quickstart.presets import QUICK, TRANSFORMER
from fastai_tl.quickstart.ulmfit import ULMFiTQuickstart
from repo import *

TINY = {**QUICK, 'config': dict(emb_sz=8, n_hid=8, n_layers=1), 'lm': dict(epochs=1, bs=8, drop_mult=.1, wd=.01),
        'epochs': [1, 1, 1], 'rates': (5e-2,), 'scratch_rates': (5e-2,), 'max_vocab': 300, 'domain_tokens': None,
        'classifiers': ['from scratch', 'stage 2', 'stages 1 and 2']}
NAMES = TINY['classifiers']
RUNS = dict(zip(NAMES, ['runs/scratch', 'runs/stage 2', 'runs/stages 1+2']))


def toy():
    words = dict(pos=['good', 'great', 'fine', 'lovely'], neg=['bad', 'dull', 'poor', 'awful'])
    rows = [dict(text=f'the film was {words[label][i % 4]} in room {i % 7}', label=label)
            for i in range(40) for label in words]
    split = ['train'] * 48 + ['valid'] * 16 + ['test'] * 16
    df = pd.DataFrame(rows).assign(split=split)
    return QuickData(df, list(df[df.split != 'test'].text), ['a cat sat on the mat in the room'] * 60, 'toy')


def ask(*args):
    "Status, standard output and standard error of a command"
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main([str(arg) for arg in args])
    return status, out.getvalue(), err.getvalue()


class Fixed(ULMFiTQuickstart):
    "A quickstart whose classifiers have given validation scores"

    def classifier(self, name, encoder):
        trained = super().classifier(name, encoder)
        accuracy, loss = self.scores[name]
        return trained._replace(chosen={**trained.chosen, 'valid_accuracy': accuracy, 'valid_loss': loss})


@pytest.fixture(scope='module')
def out(tmp_path_factory):
    return tmp_path_factory.mktemp('quick') / 'out'


@pytest.fixture
def finished(out, monkeypatch):
    "The folder of a finished quickstart"
    monkeypatch.setenv('XDG_CACHE_HOME', str(out.parent / 'cache'))
    if not (out / 'runs' / 'stages 1+2').exists():
        with redirect_stdout(io.StringIO()):
            ULMFiTQuickstart(out, toy(), TINY, progress=False).run()
    return out


@pytest.mark.parametrize('best', NAMES)
def test_any_classifier_can_be_the_best(out, best, monkeypatch):
    "All that a quickstart writes and `predict` does belong to the classifier that validated best, first or last"
    monkeypatch.setenv('XDG_CACHE_HOME', str(out.parent / 'cache'))
    run = Fixed(out, toy(), TINY, progress=False)
    run.scores = {path.removeprefix('runs/'): (.9 if name == best else .8, .5) for name, path in RUNS.items()}
    summary = run.run()
    accuracy = {row['model']: row['accuracy'] for row in summary['table']}
    assert (summary['best'], summary['run']) == (best, RUNS[best])
    assert np.isclose(summary['accuracy'], accuracy[best], atol=1e-4)
    name = summary['chosen'][best]['name']
    assert (out / summary['model']).exists() and summary['model'] == f'{RUNS[best]}/forward/{name}/model.safetensors'
    texts = ['the film was good', 'the film was awful in room 3']
    status, printed, said = ask('predict', out, *texts)
    learn = ULMFiT(out / RUNS[best], config=TINY['config'], progress=False).load_classifier(name)
    with learn.no_bar():
        right = [learn.predict(text) for text in texts]
    assert status == 0 and printed.splitlines() == [f'{r[0]}\t{r[2].max():.3f}\t{t}' for r, t in zip(right, texts)]
    assert said.startswith(f'Model: {best}, learning rate 0.05. It has the highest accuracy on the validation set: ')
    assert f'{best} 90.0%' in said and said.count('80.0%') >= 2 and explain_choice(summary) == said.strip()
    assert said.strip() in ask('status', out)[1]


@pytest.mark.parametrize('seed', range(20))
def test_best_validated(seed):
    "Highest accuracy, then lowest loss, then the first: a loop over all pairs"
    rng = np.random.default_rng(seed)
    models = {f'm{i}': dict(valid_accuracy=rng.integers(3) / 2, valid_loss=rng.integers(3) / 2) for i in range(6)}
    best = best_validated(models)
    for name, model in models.items():
        worse = model['valid_accuracy'] < models[best]['valid_accuracy']
        same = model['valid_accuracy'] == models[best]['valid_accuracy']
        assert worse or (same and model['valid_loss'] >= models[best]['valid_loss'])
        is_equal = same and model['valid_loss'] == models[best]['valid_loss']
        assert not is_equal or list(models).index(best) <= list(models).index(name)


def test_explanations():
    "Ties, a single model, a run of an older version, a bag of words that is better, several rates of a Transformer"

    def model(accuracy, loss=.5, lr=.01):
        return dict(lr=lr, valid_accuracy=accuracy, valid_loss=loss)

    tie = dict(chosen=dict(a=model(.8, .4), b=model(.8)), best='a', accuracy=.7, baseline_accuracy=.6)
    assert explain_choice(tie) == ('Model: a, learning rate 0.01. Of the models with the highest accuracy on the '
                                   'validation set, it has the lowest loss: a 80.0%, b 80.0%.')
    older = dict(chosen=dict(a=dict(lr=.01, valid_accuracy=.9), b=dict(lr=.02, valid_accuracy=.8)), best='b')
    older = {**older, 'accuracy': .7, 'baseline_accuracy': .75}
    said = explain_choice(older)
    assert 'It was not chosen by its accuracy on the validation set: a 90.0%, b 80.0%' in said
    assert said.endswith('On the test set, a bag of words is more accurate: 75.0%, this model 70.0%.')
    hf = dict(kind='transformer', chosen=model(.9, lr=1e-4), accuracy=.7, baseline_accuracy=.6)
    assert 'It is the only one' in explain_choice(hf)
    hf['tried'] = [model(.9, lr=1e-4), model(.7, lr=3e-4)]
    assert explain_choice(hf) == ('Model: learning rate 0.0001. It has the highest accuracy on the validation set: '
                                  'learning rate 0.0001 90.0%, learning rate 0.0003 70.0%.')


def test_language_model_that_validated_best(finished, monkeypatch):
    "`generate` and `perplexity` load the encoder with the lowest validation loss, whatever its folder is called"
    loaded = []
    monkeypatch.setattr(Encoder, 'load', loaded.append)
    from fastai_tl.commands.language_models import language_model_of

    files = [finished / 'runs' / run / 'forward' / 'domain' for run in ('stage 2', 'stages 1+2')]
    for low, high in (files, files[::-1]):
        for folder, loss in ((low, 1.), (high, 2.)):
            stage = json.loads((folder / 'stage.json').read_text())
            stage['history'][-1]['valid_loss'] = loss
            (folder / 'stage.json').write_text(json.dumps(stage))
        language_model_of(finished)
        assert loaded[-1] == low / 'encoder.safetensors'


FIGURES = NBS / 'figures' / 'quickstart.json'


def test_quoted_figures_belong_to_the_corpus():
    "The baselines, computed again on the corpus of the package, are those that the README quotes"
    facts = json.loads(FIGURES.read_text(encoding='utf-8'))
    quoted = {row['model']: row for row in facts['table']}
    rows = offline_data(seed=facts['seed']).labelled
    assert facts['rows'] == rows.split.value_counts().to_dict()
    assert facts['size'] == QUICK and facts['transformer'] == TRANSFORMER
    assert np.isclose(quoted['majority class']['accuracy'], majority_accuracy(rows), atol=1e-4)
    bag = quoted['bag of words']
    assert bag['low'] <= bag_of_words_accuracy(rows) <= bag['high']
    assert list(quoted) == ['majority class', 'bag of words', *QUICK['classifiers'], 'MiniLM, fine-tuned']
    assert facts['best'] == best_validated(facts['chosen'])


@pytest.mark.parametrize('name', ['README.md'])
def test_readme_quotes_the_figures(name):
    "Each row of the table of the README is a row of the JSON file, to a tenth of a per cent"
    facts = json.loads(FIGURES.read_text(encoding='utf-8'))
    text = (ROOT / name).read_text(encoding='utf-8')
    found = re.findall(r'^\| ([A-Za-z0-9 ,-]+?) \| ([\d.]+) % \| ([\d.]+) to ([\d.]+) % \|$', text, re.M)
    keys = ('accuracy', 'low', 'high')
    right = [(row['model'], *(f'{100 * row[key]:.1f}' for key in keys)) for row in facts['table']]
    assert found == right
