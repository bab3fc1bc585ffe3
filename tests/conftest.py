"""Settings of every test: no network, no display, one thread, and the data sets that may be next to the project."""

import os
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE='1', HF_DATASETS_OFFLINE='1', TOKENIZERS_PARALLELISM='false', MPLBACKEND='Agg')
os.environ.setdefault('OMP_NUM_THREADS', '1')

import pytest

ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser):
    parser.addoption('--all', action='store_true', help='run every test, those marked `slow` included')


def pytest_collection_modifyitems(config, items):
    "Without `--all`, tests marked `slow` are left out; a test that is named on the command line always runs"
    named = any('::' in arg for arg in config.args)
    if config.getoption('--all') or named:
        return
    slow = [item for item in items if 'slow' in item.keywords]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if 'slow' not in item.keywords]


@pytest.fixture(scope='session', autouse=True)
def torch_threads():
    "As many threads as the offline defaults are measured with, whatever the machine has"
    torch = pytest.importorskip('torch')
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='session')
def shared_data():
    "The folder of data sets next to the project, which the package works without; `FASTAI_TL_DATA` names another one"
    folder = Path(os.environ.get('FASTAI_TL_DATA') or ROOT.parent/'shared'/'data')
    if not folder.is_dir():
        pytest.skip(f'no data sets at {folder} (set FASTAI_TL_DATA to their folder)')
    return folder
