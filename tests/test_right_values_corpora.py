"""The offline corpora are the same on every machine: they come with the package, whatever libraries are installed."""

import gzip
import hashlib
import json
import re

import pandas as pd
import pytest

import fastai_tl.datasets.corpora as corpora
from fastai_tl.all import *
from repo import *

RESOURCES = PACKAGE / 'resources'
FACTS = json.loads((RESOURCES / 'corpora.json').read_text(encoding='utf-8'))
COLUMNS = dict(docstrings=['text', 'role', 'library', 'source', 'split'], general=['text', 'source'])


@pytest.fixture
def no_libraries(monkeypatch):
    "A machine on which no library has a source file, and which has another version of each"

    def nothing(*args, **kwargs):
        raise AssertionError('the installed libraries were read')

    monkeypatch.setattr(corpora, '_library_folder', nothing)
    monkeypatch.setattr(corpora, 'library_version', lambda library: '0.0')
    monkeypatch.setattr(corpora, 'make_docstring_corpus', nothing)
    monkeypatch.setattr(corpora, 'make_general_corpus', nothing)


def table(name):
    "A corpus, read without the package"
    text = gzip.decompress((RESOURCES / f'{name}.csv.gz').read_bytes())
    return text, pd.read_csv(RESOURCES / f'{name}.csv.gz', keep_default_na=False)


@pytest.mark.parametrize('name', COLUMNS)
def test_files(name):
    "Small enough for a package; the checksum is the one of the table that the quoted figures were made with"
    text, df = table(name)
    assert sum(path.stat().st_size for path in RESOURCES.glob('*.csv.gz')) <= 4e6
    assert hashlib.sha256(text).hexdigest() == FACTS['sha256'][name]
    assert list(df) == COLUMNS[name] and df.notna().all(None) and (df.text.str.len() > 0).all()


@pytest.mark.parametrize('label', ['role', 'library'])
def test_docstrings_do_not_depend_on_the_machine(no_libraries, tmp_path, monkeypatch, label):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    _, right = table('docstrings')
    df = docstring_corpus(label)
    assert list(df) == ['text', 'label', 'split', 'role', 'library', 'source'] and list(df.label) == list(right[label])
    assert all(list(df[column]) == list(right[column]) for column in right)
    some = docstring_corpus(label, libraries=['torch', 'pandas'])
    assert list(some.text) == list(right[right.library.isin(['torch', 'pandas'])].text)
    assert list(general_corpus().text) == list(table('general')[1].text)
    assert not any(tmp_path.iterdir()), 'the cache belongs to the installed libraries'


def test_quickstart_data_do_not_depend_on_the_machine(no_libraries, tmp_path):
    "The texts, labels and parts, by their checksum"
    data = offline_data()
    rows = data.labelled.to_csv(index=False, lineterminator='\n') + '\n'.join([*data.domain, *data.general])
    assert data.labelled.groupby('split').label.value_counts().unstack().to_dict('index') == {
        'train': dict.fromkeys(['notes', 'parameter', 'returns', 'summary'], 100),
        'valid': dict.fromkeys(['notes', 'parameter', 'returns', 'summary'], 100),
        'test': dict.fromkeys(['notes', 'parameter', 'returns', 'summary'], 300),
    }
    assert hashlib.sha256(rows.encode()).hexdigest()[:16] == '7a0e1bccd51211ff'
    pd.DataFrame(dict(text=['good', 'bad'] * 20, label=['yes', 'no'] * 20)).to_csv(tmp_path / 'mine.csv', index=False)
    assert own_data(tmp_path / 'mine.csv').general == data.general


def test_splits_follow_from_the_sources():
    "No source is in two parts, and the part depends on the name of the source only"
    _, df = table('docstrings')
    tenth = df.source.map(lambda source: int(hashlib.sha256(source.encode()).hexdigest()[:8], 16) % 10)
    assert list(df.split) == list(tenth.map({8: 'valid', 9: 'test'}).fillna('train'))
    assert df.source.str.split('/').str[0].tolist() == df.library.tolist()


def test_installed_libraries_on_request(tmp_path):
    "`installed=True`, `refresh=True` and other libraries read what is installed"
    installed = docstring_corpus(libraries=['matplotlib'], installed=True)
    assert list(installed) == list(docstring_corpus()) and installed.library.unique().tolist() == ['matplotlib']
    assert docstring_corpus(libraries=['matplotlib'], refresh=True, cache_dir=tmp_path).equals(installed)
    assert len(list(tmp_path.iterdir())) == 1
    other = docstring_corpus(libraries=['fastcore'], cache_dir=tmp_path)
    assert other.library.unique().tolist() == ['fastcore'] and len(other) > 20
    with pytest.raises(DataError, match='pip install no_such_lib'):
        docstring_corpus(libraries=['numpy', 'no_such_lib'])


def test_licenses():
    "Each source is named with its version and its licence; all licences allow copies and changes"
    text = (RESOURCES / 'LICENSES').read_text(encoding='utf-8')
    sections = re.split(r'={78}\n(.*)\n={78}\n', text)
    titles = sections[1::2]
    python = [f'Python {FACTS["general"]["python"]}']
    assert titles == [f'{name} {version}' for name, version in FACTS['docstrings'].items()] + python
    assert set(FACTS['docstrings']) == set(corpora.LIBRARIES.values())
    for title, licence in zip(titles, sections[2::2]):
        assert re.search(r'(?i)copyright \(c\)', licence), title
        assert re.search(r'Redistributions? of source code|prepare\s+derivative works', licence), title
        notices = licence.partition('Notice in ')[2]
        assert not re.search(r'GNU|General Public', notices), title
    assert 'names of libraries are replaced' in sections[0], 'the licences of Python and Matplotlib ask for the changes'
