"""Settings of every test: no network, no display, one thread, and the data sets that may be next to the project."""

import json
import os
import subprocess
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE='1', HF_DATASETS_OFFLINE='1', TOKENIZERS_PARALLELISM='false', MPLBACKEND='Agg')
os.environ.setdefault('OMP_NUM_THREADS', '1')

import pytest

ROOT = Path(__file__).resolve().parents[1]


# Tests that took too long in the last run of `pytest --all --write-slow SECONDS`: plain `pytest` leaves them out
SLOW_TESTS = Path(__file__).with_name('slow_tests.txt')
SECONDS = {}


def pytest_addoption(parser):
    parser.addoption('--all', action='store_true', help='run every test, the slow ones included')
    parser.addoption(
        '--write-slow',
        type=float,
        metavar='SECONDS',
        help=f'write {SLOW_TESTS.name}: the tests of this run that took longer',
    )


def pytest_runtest_logreport(report):
    "Keep how long a test took, without the fixtures that it may share with others"
    if report.when == 'call':
        SECONDS[report.nodeid] = report.duration


def pytest_sessionfinish(session):
    "Write the list of slow tests, in the process that has the reports of all others"
    limit = session.config.getoption('--write-slow')
    if limit is not None and not hasattr(session.config, 'workerinput'):
        slow = sorted(test for test, seconds in SECONDS.items() if seconds > limit)
        SLOW_TESTS.write_text(''.join(f'{test}\n' for test in slow), encoding='utf-8')


def is_slow(item, listed):
    "Whether a test is marked `slow` or was found to be"
    return 'slow' in item.keywords or item.nodeid in listed


# These take longest, so they start first: the last files are short, and all processes end at about the same time
LONGEST = ('test_notebooks', 'test_tutorials', 'test_deploy', 'test_readme', 'test_killed')


def place(item):
    "Where a test's file stands in `LONGEST`"
    name = item.path.stem
    return LONGEST.index(name) if name in LONGEST else len(LONGEST)


def pytest_collection_modifyitems(config, items):
    """Put the longest files first. Leave out the slow tests, unless `--all` is given or the test is named on the
    command line."""
    items.sort(key=place)
    named = any('::' in arg for arg in config.args)
    if config.getoption('--all') or named:
        return
    listed = set(SLOW_TESTS.read_text(encoding='utf-8').splitlines()) if SLOW_TESTS.exists() else set()
    slow = [item for item in items if is_slow(item, listed)]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not is_slow(item, listed)]


def pytest_runtest_teardown():
    "Figures and reports are in English again after a test that has set another language"
    plot = sys.modules.get('fastai_tl.plot')
    if plot is not None:
        plot.set_language('en')


@pytest.fixture(scope='session', autouse=True)
def torch_threads():
    "As many threads as the offline defaults are measured with, whatever the machine has"
    torch = pytest.importorskip('torch')
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='session')
def small_tokenizers():
    "A tokenizer with 400 tokens for each kind of model, for `small_learners.MAKERS`"
    from small_learners import sentences

    from fastai_tl.all import train_tokenizer

    return {kind: train_tokenizer(sentences(200), 400, kind) for kind in ('encoder', 'decoder', 'seq2seq')}


@pytest.fixture(scope='session')
def shared_data():
    "The folder of data sets next to the project, which the package works without; `FASTAI_TL_DATA` names another one"
    folder = Path(os.environ.get('FASTAI_TL_DATA') or ROOT.parent / 'shared' / 'data')
    if not folder.is_dir():
        pytest.skip(f'no data sets at {folder} (set FASTAI_TL_DATA to their folder)')
    return folder


class NotebookRunner:
    "Runs notebooks of a copy of the project, each in a fork of a process that has imported fastai and transformers"

    def __init__(self, root):
        from repo import clean_env

        self.root = root
        program = [sys.executable, '-W', 'ignore', str(Path(__file__).with_name('notebook_run.py')), str(root)]
        self.process = subprocess.Popen(
            program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=clean_env(PYTHONPATH=str(root))
        )
        assert self.process.stdout.readline() == 'ready\n'

    def __call__(self, path):
        "Run a notebook of the project; `finished` and `output`"
        self.process.stdin.write(f'{self.root / Path(path).relative_to(ROOT)}\n')
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def of_code(self, code):
        "Run a notebook of one cell"
        cell = dict(cell_type='code', id='made-up', metadata={}, source=code, outputs=[], execution_count=None)
        path = self.root / 'nbs' / 'made_up.ipynb'
        path.write_text(json.dumps(dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=5)), encoding='utf-8')
        self.process.stdin.write(f'{path}\n')
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        "End the process"
        self.process.stdin.close()
        self.process.wait(30)


@pytest.fixture(scope='session')
def notebook_runner(tmp_path_factory):
    "A function that runs a notebook in a copy of the project, so that this one stays as it is"
    if not hasattr(os, 'fork'):
        pytest.skip('needs a system that can fork')
    from repo import copy_project

    runner = NotebookRunner(copy_project(tmp_path_factory.mktemp('project') / 'fastai_tl'))
    yield runner
    runner.close()
