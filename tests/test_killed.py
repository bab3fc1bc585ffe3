"""A run killed with SIGKILL, at any moment and as often as you like, ends in the same figures as one left alone."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs a system that can fork')
KILLS = 10


class Runs:
    "Runs of tests/killed_run.py, one at a time"
    def __init__(self):
        env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore', PYTHONPATH=os.pathsep.join([str(Path(__file__).resolve().parents[1]), os.environ.get('PYTHONPATH', '')]))
        self.p = subprocess.Popen([sys.executable, '-u', str(Path(__file__).with_name('killed_run.py'))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        assert self.p.stdout.readline() == 'ready\n'

    def run(self, folder, kill_after=None, kill_at=None):
        "Start a run and wait for its end; True if it was killed"
        self.p.stdin.write('\t'.join(map(str, [folder] + ([kill_at] if kill_at else []))) + '\n'); self.p.stdin.flush()
        pid = int(self.p.stdout.readline())
        if kill_after is not None:
            time.sleep(kill_after)
            try: os.kill(pid, signal.SIGKILL)
            except ProcessLookupError: pass   # it had ended by itself
        status = int(self.p.stdout.readline())
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL or os.WEXITSTATUS(status) == 0, 'the run failed by itself'
        return os.WIFSIGNALED(status)


@pytest.fixture(scope='module')
def runs():
    r = Runs()
    yield r
    r.p.stdin.close(); r.p.wait(30)


@pytest.fixture(scope='module')
def whole(runs, tmp_path_factory):
    "A run that was left alone: its figures and its seconds"
    folder, t0 = tmp_path_factory.mktemp('whole'), time.perf_counter()
    assert not runs.run(folder)
    return json.loads((folder/'result.json').read_text()), time.perf_counter()-t0


def test_killed_ten_times(runs, whole, tmp_path):
    result, seconds = whole
    moments = sorted(random.Random(0).uniform(0, seconds) for _ in range(KILLS))
    killed = sum(runs.run(tmp_path, kill_after=b-a) for a,b in zip([0]+moments, moments))
    assert killed >= KILLS//2, 'the machine changed its speed: too few kills came before the end'
    assert not runs.run(tmp_path)
    assert json.loads((tmp_path/'result.json').read_text()) == result


@pytest.mark.parametrize('n', [2, 7, 13])
def test_killed_between_write_and_rename(runs, whole, tmp_path, n):
    assert runs.run(tmp_path, kill_at=n)
    assert list(tmp_path.rglob('.checkpoint.safetensors.*.part')), 'the checkpoint was written and not renamed'
    assert not runs.run(tmp_path)
    assert json.loads((tmp_path/'result.json').read_text()) == whole[0]
    assert not list(tmp_path.rglob('*.part')), 'nothing half-written is left'


def test_the_figures_mean_something(whole):
    result, _ = whole
    assert result['accuracy'] > .7 and len(result['history'][2]['valid_loss']) == 6
