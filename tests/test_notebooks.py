"""The notebooks are the source: the package is what they export, they are clean and executed, and they run."""

import json

import pytest

from repo import *

each_file = pytest.mark.parametrize('path', notebook_files(), ids=ids)


def modules(package):
    return {p.relative_to(package).as_posix(): p for p in package.rglob('*.py')}


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    "The package as nbdev-export makes it from nothing but the notebooks and the files written by hand"
    root = copy_project(tmp_path_factory.mktemp('exported') / 'fastai_tl')
    for name, p in modules(root / PKG).items():
        if name not in HAND_WRITTEN:
            p.unlink()
    res = run(script('nbdev-export'), cwd=root, env=dict(PYTHONPATH=''))
    assert res.returncode == 0, res.stdout
    return modules(root / PKG)


def test_same_modules(exported):
    here = {o for o in modules(PACKAGE)}
    assert here - set(exported) == set(), 'no notebook exports these any more'
    assert set(exported) - here == set(), 'not exported yet: run nbdev-export'


def test_same_text(exported):
    "Byte by byte, the index `_modidx.py` included"
    both = [name for name in modules(PACKAGE) if name in exported]
    differ = [name for name in both if (PACKAGE / name).read_bytes() != exported[name].read_bytes()]
    assert not differ, f'run nbdev-export (and never edit these by hand): {differ}'


@pytest.fixture(scope='module')
def cleaned(tmp_path_factory):
    root = copy_project(tmp_path_factory.mktemp('cleaned') / 'fastai_tl')
    res = run(script('nbdev-clean'), cwd=root, env=dict(PYTHONPATH=''))
    assert res.returncode == 0, res.stdout
    return root


@each_file
def test_is_clean(path, cleaned):
    assert path.read_bytes() == (cleaned / path.relative_to(ROOT)).read_bytes(), f'run nbdev-clean on {path.name}'


def code_cells(path):
    return [c for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']


@each_file
def test_is_executed(path):
    "It shows its results, as they come out when it runs without errors"
    cells = code_cells(path)
    if not cells:
        pytest.skip('no code')
    outputs = [o for c in cells for o in c['outputs']]
    assert outputs, f'{path.name} is committed without outputs'
    errors = [o['ename'] for o in outputs if o['output_type'] == 'error']
    assert not errors, f'{path.name} is committed with errors: {errors}'


def strings(o):
    "Every string inside lists and dicts"
    if isinstance(o, str):
        return [o]
    parts = o.values() if isinstance(o, dict) else o
    return [s for v in parts for s in strings(v)] if isinstance(o, (dict, list)) else []


@each_file
def test_shows_no_place(path):
    "No output names a folder of the machine on which it ran"
    places = (str(ROOT), 'site-packages', f'{Path.home()}/')
    told = [line.strip() for c in code_cells(path) for line in strings(c['outputs']) if any(p in line for p in places)]
    assert not told, (
        f'{path.name} shows paths (if in a warning, run it with PYTHONWARNINGS=ignore::FutureWarning): {told}'
    )


def runs(path, notebook_runner):
    "From top to bottom in a process of its own, without the cells flagged `slow`"
    res = notebook_runner(path)
    assert res['finished'], f'{path.name}\n{res["output"]}'


@pytest.mark.parametrize('path', [p for p in notebook_files() if p.parent == NBS], ids=ids)
def test_runs(path, notebook_runner):
    runs(path, notebook_runner)


def test_a_notebook_that_fails_is_found(notebook_runner, tmp_path_factory):
    "An error in a cell, and an import that only another notebook made"
    for code in ('assert 1 == 2', 'FastaiTLError'):
        assert not notebook_runner.of_code(code)['finished']
    assert notebook_runner.of_code('from fastai_tl.core import FastaiTLError')['finished']
