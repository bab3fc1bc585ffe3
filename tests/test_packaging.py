"What `pip install` gets: the package's files, and metadata that agree with it."

import configparser, email, zipfile
from importlib.metadata import PackageNotFoundError, version

import pytest

from repo import *

EXTRAS = {'dev', 'docs', 'zh', 'minilm', 'multilingual', 'peft', 'seq2seq', 'onnx', 'blurr'}


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "A wheel built from a copy of the project"
    for name, least in dict(build=1, setuptools=77).items():
        try:
            found = int(version(name).split('.')[0])
        except PackageNotFoundError:
            found = 0
        if found < least:
            pytest.skip(f'needs {name}>={least}: pip install -e ".[dev]"')
    root = copy_project(tmp_path_factory.mktemp('wheel') / 'fastai_tl')
    res = run(
        sys.executable,
        '-m',
        'build',
        '--wheel',
        '--no-isolation',
        '--outdir',
        root / 'dist',
        root,
        cwd=root,
        env=dict(PYTHONPATH=''),
    )
    assert res.returncode == 0, res.stdout
    with zipfile.ZipFile(next((root / 'dist').glob('*.whl'))) as z:
        return {n: z.read(n) for n in z.namelist()}


def dist_info(wheel, name):
    return next(v.decode() for k, v in wheel.items() if k.endswith(f'.dist-info/{name}'))


@pytest.fixture(scope='module')
def metadata(wheel):
    return email.message_from_string(dist_info(wheel, 'METADATA'))


def test_holds_the_package_alone(wheel):
    "Every module, the resources and `py.typed`; no notebooks, no tests, no settings.ini"
    inside = {n for n in wheel if '.dist-info/' not in n}
    files = [*PACKAGE.rglob('*.py'), PACKAGE/'py.typed', *(PACKAGE/'resources').iterdir()]
    assert inside == {p.relative_to(ROOT).as_posix() for p in files}
    assert any(n.endswith('/LICENSE') for n in wheel)


def test_every_folder_is_a_package():
    "A folder without `__init__.py` would be left out of the wheel"
    assert {p.parent for p in PACKAGE.rglob('*.py')} == {p.parent for p in PACKAGE.rglob('__init__.py')}


def test_version(metadata):
    res = python('import fastai_tl; print(fastai_tl.__version__)')
    assert metadata['Version'] == res.stdout.strip()


def test_metadata(metadata):
    assert (
        metadata['Name'] == PKG
        and metadata['License-Expression'] == 'Apache-2.0'
        and metadata['Requires-Python'] == '>=3.11'
    )
    assert metadata['Description-Content-Type'] == 'text/markdown'
    readme = ROOT / 'README.md'
    assert metadata.get_payload().strip() == (readme.read_text(encoding='utf-8').strip() if readme.exists() else '')


def test_extras(metadata):
    assert set(metadata.get_all('Provides-Extra')) >= EXTRAS
    needs = metadata.get_all('Requires-Dist')
    assert any(r.startswith('pytest') and 'extra == "dev"' in r for r in needs)
    core = [r for r in needs if 'extra ==' not in r]
    assert len(core) <= 8 and any(r.startswith('fastai') for r in core), core


def test_entry_points(wheel):
    "The command, and the index through which nbdev links to the documentation, under the package's own name"
    points = configparser.ConfigParser()
    points.read_string(dist_info(wheel, 'entry_points.txt'))
    assert dict(points['console_scripts']) == {'fastai-tl': 'fastai_tl.cli:main'}
    assert dict(points['nbdev']) == {PKG: 'fastai_tl._modidx:d'}


def test_changelog_knows_the_version(metadata):
    assert f"## [{metadata['Version']}]" in (ROOT / 'CHANGELOG.md').read_text(encoding='utf-8')


def test_settings_are_no_nbdev_config():
    "nbdev takes its configuration from pyproject.toml, although there is a settings.ini in the same folder"
    res = python(
        'from nbdev.config import get_config\n'
        'c = get_config()\n'
        'print(c.config_file.name, c.lib_path.name, c.git_url, c.doc_host, c.doc_baseurl)'
    )
    assert res.stdout.split() == [
        'pyproject.toml',
        PKG,
        'https://github.com/fastai-tl/fastai_tl',
        'https://fastai-tl.github.io',
        '/fastai_tl',
    ]


def test_settings_are_read():
    "The command reads the file's only section, which has a run's main settings and keeps the built-in defaults"
    from fastai_tl.commands.settings import SETTINGS, read_settings

    cfg = configparser.ConfigParser()
    cfg.read(ROOT / 'settings.ini', encoding='utf-8')
    assert cfg.sections() == ['fastai_tl'] and not cfg.defaults() and set(cfg['fastai_tl']) == set(SETTINGS)
    assert {'bs', 'text_col', 'label_col', 'seed', 'epochs', 'font'} <= set(SETTINGS)
    assert read_settings(ROOT / 'settings.ini') == dict(
        text_col='text', label_col='label', seed=42, bidirectional=False, full=False
    )
