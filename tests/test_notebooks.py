"The notebooks are the source: the package is what they export, they are clean and executed, and they run."

import json

import pytest

from repo import *

each_file = pytest.mark.parametrize('path', notebook_files(), ids=ids)


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "A copy of the project, in which notebooks can be exported, cleaned and run without touching this one"
    return copy_project(tmp_path_factory.mktemp('project')/'fastai_tl')


def modules(package): return {p.relative_to(package).as_posix(): p for p in package.rglob('*.py')}


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    "The package as nbdev-export makes it from nothing but the notebooks and the files written by hand"
    root = copy_project(tmp_path_factory.mktemp('exported')/'fastai_tl')
    for name,p in modules(root/PKG).items():
        if name not in HAND_WRITTEN: p.unlink()
    res = run(script('nbdev-export'), cwd=root, env=dict(PYTHONPATH=''))
    assert res.returncode == 0, res.stdout
    return modules(root/PKG)


def test_same_modules(exported):
    here = {o for o in modules(PACKAGE)}
    assert here - set(exported) == set(), 'no notebook exports these any more'
    assert set(exported) - here == set(), 'not exported yet: run nbdev-export'


def test_same_text(exported):
    "Byte by byte, the index `_modidx.py` included"
    differ = [name for name,p in modules(PACKAGE).items() if name in exported and p.read_bytes() != exported[name].read_bytes()]
    assert not differ, f'run nbdev-export (and never edit these by hand): {differ}'


@pytest.fixture(scope='module')
def cleaned(tmp_path_factory):
    root = copy_project(tmp_path_factory.mktemp('cleaned')/'fastai_tl')
    res = run(script('nbdev-clean'), cwd=root, env=dict(PYTHONPATH=''))
    assert res.returncode == 0, res.stdout
    return root


@each_file
def test_is_clean(path, cleaned):
    assert path.read_bytes() == (cleaned/path.relative_to(ROOT)).read_bytes(), f'run nbdev-clean on {path.name}'


def code_cells(path): return [c for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']


@each_file
def test_is_executed(path):
    "It shows its results, as they come out when it runs without errors"
    cells = code_cells(path)
    if not cells: pytest.skip('no code')
    outputs = [o for c in cells for o in c['outputs']]
    assert outputs, f'{path.name} is committed without outputs'
    errors = [o['ename'] for o in outputs if o['output_type'] == 'error']
    assert not errors, f'{path.name} is committed with errors: {errors}'


def strings(o):
    "Every string inside lists and dicts"
    if isinstance(o, str): return [o]
    return [s for v in (o.values() if isinstance(o, dict) else o if isinstance(o, list) else ()) for s in strings(v)]


@each_file
def test_shows_no_place(path):
    "No output names a folder of the machine on which it ran"
    places = (str(ROOT), 'site-packages', f'{Path.home()}/')
    told = [line.strip() for c in code_cells(path) for line in strings(c['outputs']) if any(p in line for p in places)]
    assert not told, f'{path.name} shows paths (if in a warning, run it with PYTHONWARNINGS=ignore::FutureWarning): {told}'


def runs(path, copy):
    "From top to bottom in a process of its own, without the cells that are flagged `slow`"
    fn = copy/path.relative_to(ROOT)
    res = run(script('nbdev-test'), fn, '--n-workers', '0', cwd=copy, timeout=600, env=dict(PYTHONPATH=str(copy)))
    assert res.returncode == 0 and 'Success.' in res.stdout, f'{path.name}\n{res.stdout}'


@pytest.mark.parametrize('path', [p for p in notebook_files() if p.parent == NBS], ids=ids)
def test_runs(path, copy): runs(path, copy)
