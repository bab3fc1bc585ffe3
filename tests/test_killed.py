"""A run killed with SIGKILL, at any moment and as often as you like, ends in the same figures as one left alone."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.schedule import *
from transformers import BertConfig

from fastai_tl.all import *

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs a system that can fork')]
KILLS = 10


class Runs:
    "Runs of tests/killed_run.py, one at a time"

    def __init__(self):
        env = dict(
            os.environ,
            OMP_NUM_THREADS='1',
            PYTHONWARNINGS='ignore',
            PYTHONPATH=os.pathsep.join([str(Path(__file__).resolve().parents[1]), os.environ.get('PYTHONPATH', '')]),
        )
        self.p = subprocess.Popen(
            [sys.executable, '-u', str(Path(__file__).with_name('killed_run.py'))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        assert self.p.stdout.readline() == 'ready\n'

    def run(self, folder, kill_after=None, kill_at=None):
        "Start a run and wait for its end; True if it was killed"
        self.p.stdin.write('\t'.join(map(str, [folder] + ([kill_at] if kill_at else []))) + '\n')
        self.p.stdin.flush()
        pid = int(self.p.stdout.readline())
        if kill_after is not None:
            time.sleep(kill_after)
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass  # it had ended by itself
        status = int(self.p.stdout.readline())
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL or os.WEXITSTATUS(status) == 0, (
            'the run failed by itself'
        )
        return os.WIFSIGNALED(status)


@pytest.fixture(scope='module')
def runs():
    r = Runs()
    yield r
    r.p.stdin.close()
    r.p.wait(30)


@pytest.fixture(scope='module')
def whole(runs, tmp_path_factory):
    "A run that was left alone: its figures and its seconds"
    folder, t0 = tmp_path_factory.mktemp('whole'), time.perf_counter()
    assert not runs.run(folder)
    return json.loads((folder / 'result.json').read_text()), time.perf_counter() - t0


def test_killed_ten_times(runs, whole, tmp_path):
    result, seconds = whole
    moments = sorted(random.Random(0).uniform(0, seconds) for _ in range(KILLS))
    killed = sum(runs.run(tmp_path, kill_after=b - a) for a, b in zip([0] + moments, moments))
    assert killed >= KILLS // 2, 'the machine changed its speed: too few kills came before the end'
    assert not runs.run(tmp_path)
    assert json.loads((tmp_path / 'result.json').read_text()) == result


@pytest.mark.parametrize('n', [2, 7, 13])
def test_killed_between_write_and_rename(runs, whole, tmp_path, n):
    assert runs.run(tmp_path, kill_at=n)
    assert list(tmp_path.rglob('.checkpoint.safetensors.*.part')), 'the checkpoint was written and not renamed'
    assert not runs.run(tmp_path)
    assert json.loads((tmp_path / 'result.json').read_text()) == whole[0]
    assert not list(tmp_path.rglob('*.part')), 'nothing half-written is left'


def test_the_figures_mean_something(whole):
    result, _ = whole
    assert result['accuracy'] > 0.7 and len(result['history'][2]['valid_loss']) == 6


# --- other callbacks of a fit that is killed after an epoch, or in its middle; in one process ---

TEXTS = [
    f'{a} {b} {c}'
    for a in ('the cat', 'a dog', 'my bird')
    for b in ('saw', 'met', 'heard')
    for c in ('a house', 'the hill', 'an old tree', 'us')
]


class Kill(Callback):
    "After an epoch, or at a batch of one; never if `None`"

    order = ResumableFit.order + 100

    def __init__(self, at):
        self.at = at

    def after_epoch(self):
        if self.epoch == self.at:
            raise KeyboardInterrupt

    def after_batch(self):
        if self.training and self.at == (self.epoch, self.iter):
            raise KeyboardInterrupt


@pytest.fixture(scope='module')
def tok():
    return train_tokenizer(TEXTS, 300, max_length=32)


def classifier(tok, path='.'):
    "A third of the labels are by chance, so that the validation loss falls first and rises then"
    rng = random.Random(1)
    labels = [t.split()[1] if rng.random() > 0.35 else rng.choice(['cat', 'dog', 'bird']) for t in TEXTS]
    df = pd.DataFrame(dict(text=TEXTS, label=labels, valid=[i % 2 == 0 for i in range(len(TEXTS))]))
    seed_everything(0)
    learn = hf_classifier_learner(
        HFTextDataLoaders.from_df(df, tok, valid_col='valid', bs=8, verbose=False),
        BertConfig(
            vocab_size=len(tok),
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=64,
        ),
        metrics=[],
    )
    learn.path = path
    return learn


def outcome(learn):
    "Weights, and what was recorded"
    return dict(
        weights=[v.clone() for v in learn.model.state_dict().values()],
        values=[[float(o) for o in v] for v in learn.recorder.values],
        lrs=[float(o) for o in learn.recorder.lrs],
    )


def assert_same(a, b):
    for k in set(a) - {'weights'}:
        assert a[k] == b[k], k
    assert len(a['weights']) == len(b['weights']) and all(torch.equal(v, w) for v, w in zip(a['weights'], b['weights']))


def killed_and_left_alone(fit, path, *kills):
    "What `fit(folder, cb)` gives if left alone, and after each of `kills`"
    whole = fit(path / 'whole', Kill(None))
    for at in kills:
        with pytest.raises(KeyboardInterrupt):
            fit(path / 'killed', Kill(at))
    return whole, fit(path / 'killed', Kill(None))


@pytest.mark.parametrize('kills', [[0], [7], [(0, 0), (1, 1), 3, (6, 0), (7, 0)]])
def test_best_epoch(tok, tmp_path, kills):
    def fit(folder, cb):
        learn = classifier(tok, folder)
        with learn.no_bar(), learn.no_logging():
            plan = learn.fit_transfer(
                8, 'full', lr=8e-3, best=True, mixed_precision=False, cbs=[ResumableFit(folder / 'ck'), cb]
            )
        return dict(outcome(learn), best=(plan.best.best_at, plan.best.best_loss))

    whole, resumed = killed_and_left_alone(fit, tmp_path, *kills)
    losses = [v[1] for v in whole['values']]
    assert whole['best'][0] == losses.index(min(losses)) and 0 < whole['best'][0] < 7
    assert_same(whole, resumed)
    assert_same(whole, fit(tmp_path / 'whole', Kill(None)))  # finished, and started again


def test_best_epoch_takes_room_only_when_it_is_past(tok, tmp_path):
    "While the best weights are those of the model, the checkpoint holds them once"

    class Size(Callback):
        order, sizes = ResumableFit.order + 1, []

        def after_epoch(self):
            self.sizes.append((tmp_path / 'ck').stat().st_size)

    learn, best = classifier(tok), BestEpoch()
    with learn.no_bar(), learn.no_logging():
        learn.fit_transfer(8, 'full', lr=8e-3, mixed_precision=False, cbs=[ResumableFit(tmp_path / 'ck'), best, Size()])
    weights = sum(v.numel() * v.element_size() for v in learn.model.state_dict().values())
    at = best.best_at
    assert (
        0 < at < 7
        and Size.sizes[at + 1] - Size.sizes[at] > 0.9 * weights
        and abs(Size.sizes[at] - Size.sizes[0]) < 0.1 * weights
    )


KILLS_OF_TRACKERS = [[0], [4], [7], [(0, 0), 1, (5, 1), (7, 0)]]
TRACKERS = dict(
    stop=lambda: [EarlyStoppingCallback(patience=3)],
    stop_by_two=lambda: [
        EarlyStoppingCallback(patience=5),
        EarlyStoppingCallback('train_loss', min_delta=0.02, patience=2),
    ],
    reduce=lambda: [ReduceLROnPlateau(patience=1, factor=3.0)],
    save=lambda: [SaveModelCallback()],
    every=lambda: [SaveModelCallback(every_epoch=1)],
    plateau=lambda: [GradualUnfreezing(when='plateau', patience=1, min_delta=0.002, factor=0.7)],
)


def stage_starts(cb):
    "The first step of each stage, if `cb` is a `GradualUnfreezing`"
    return [row['start'] for row in cb.stage_log.rows] if isinstance(cb, GradualUnfreezing) else []


@pytest.mark.parametrize('name', TRACKERS)
def test_trackers(tok, tmp_path, name):
    "They decide as in a fit left alone, wherever it was killed, and what they save is the same"

    def fit(folder, cb):
        learn, cbs = classifier(tok, folder), TRACKERS[name]()
        with learn.no_bar(), learn.no_logging():
            learn.fit(8, 2e-2 if name != 'plateau' else 5e-3, cbs=[ResumableFit(folder / 'ck'), *cbs, cb])
        files = {
            p.name: [v.clone() for v in torch.load(p, weights_only=False).values()]
            for p in sorted(folder.glob('models/*.pth'))
        }
        return dict(
            outcome(learn),
            rate=[float(h['lr']) for h in learn.opt.hypers],
            stages=stage_starts(cbs[0]),
        ), files

    whole, files = fit(tmp_path / 'whole', Kill(None))
    n = len(whole['values'])
    acted = dict(
        stop=4 <= n < 8,
        stop_by_two=n < 8,
        reduce=len(set(whole['lrs'])) > 2,
        save=list(files) == ['model.pth'],
        every=len(files) == 8,
        plateau=len(whole['stages']) > 2,
    )
    assert acted[name], 'the tracker has something to do'
    for i, kills in enumerate(
        [[k for k in ks if (k if isinstance(k, int) else k[0]) < n - (n < 8)] for ks in KILLS_OF_TRACKERS] + [None]
    ):
        folder = tmp_path / (
            f'killed{i}' if kills is not None else 'whole'
        )  # the last: it was finished, and is started again
        for at in kills or []:
            with pytest.raises(KeyboardInterrupt):
                fit(folder, Kill(at))
        again, files_again = fit(folder, Kill(None))
        assert_same(whole, again)
        assert files.keys() == files_again.keys() and all(
            torch.equal(a, b) for k in files for a, b in zip(files[k], files_again[k])
        )


@pytest.mark.parametrize('seed', [None, 3])
@pytest.mark.parametrize('kills', [[0], [(1, 1)], [0, 2, (3, 0)]])
def test_augmented_texts(tok, tmp_path, seed, kills):
    "What an epoch draws depends on the seed and the epoch alone"

    def fit(folder, cb):
        learn = classifier(tok, folder)
        augment_texts(learn.dls, DropWords(0.3), SwapWords(0.3), share=1.0, seed=seed)
        with learn.no_bar(), learn.no_logging():
            learn.fit(4, 8e-3, cbs=[ResumableFit(folder / 'ck'), cb])
        return outcome(learn)

    assert_same(*killed_and_left_alone(fit, tmp_path, *kills))
