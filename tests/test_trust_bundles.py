"""Bundles from strangers: no code runs, nothing outside is read, every error says what is wrong; saving deletes nothing
that is not its own

The kinds are some of `benchmarks/trust/kinds.py`, where there are more than 1,000.
"""

import json
import os
import shutil
import threading
import time

import numpy as np
import pytest
import torch

from fastai_tl.all import *
from fastai_tl.core import FastaiTLError, RunError, TrainingError
from fastai_tl.atomic import atomic_folder, current_umask, leftovers, temporary_sibling
from repo import benchmark

kinds = benchmark('trust', 'kinds')
KINDS, reseal = kinds.KINDS, kinds.reseal
hostile = benchmark('trust')
TEXTS = hostile.TEXTS
make_bases, use = hostile.make_bases, hostile.use


@pytest.fixture(scope='module')
def bases(tmp_path_factory):
    "Good bundles: a Transformer, an AWD_LSTM, a language model, a tagger"
    folder = tmp_path_factory.mktemp('bases')
    make_bases(folder)
    return folder


@pytest.fixture
def places(bases, tmp_path):
    "A function that copies a good bundle, and returns the copy and a folder outside"
    def copy(base='hf'):
        folder, outside = tmp_path/'bundle', tmp_path/'outside'
        shutil.copytree(bases/base, folder)
        outside.mkdir()
        for file in ('secret.json', 'vocab.txt', 'weights.safetensors', 'w.bin'):
            (outside/file).write_text('{}')
        return folder, outside
    return copy


@pytest.mark.parametrize('base', ['hf', 'awd', 'lm', 'tags'])
def test_good_bundles_load(bases, base):
    assert use(bases/base) == use(bases/base)


# the kind, and what the error says
REFUSED = {
    'config.json num_hidden_layers = 50000': 'num_hidden_layers',
    'config.json num_labels = 10000000000': 'num_labels',
    'config.json vocab_size = 10000000000': 'vocab_size',
    'config.json hidden_size = 50000': 'config.json',
    'config.json hidden_act = "nope"': 'config.json',
    'config.json attn_implementation = "evil/kernel"': 'attn_implementation',
    'config.json quantization_config = {"quant_method": "gptq", "bits": 4}': 'quantization_config',
    'config.json text_config = {"auto_map": {"AutoConfig": "evil.Config"}}': 'auto_map',
    'config.json transformers_weights = "../weights.safetensors"': 'transformers_weights',
    'config.json is deep': 'config.json',
    'tokenizer.json is twice a key': 'twice',
    'tokenizer_config.json is a list': 'tokenizer',
    'model.safetensors is overlapping tensors': 'model.safetensors',
    'model.safetensors is a long header': 'model.safetensors',
    'without layer 1': 'layer.1',
    'without classifier.weight': 'classifier.weight',
    'classifier.weight is nan': 'classifier.weight',
    'word_embeddings.weight one row more': 'word_embeddings',
    'spec.json classes = ["a"]': 'spec.json',
    'spec.json max_length = "x"': 'max_length',
    'spec.json windows = -1': 'windows'}


@pytest.mark.parametrize('name', [*REFUSED])
def test_hostile_bundles_are_refused(name, places):
    folder, outside = places()
    KINDS[f'hf {name}'][1](folder, outside)
    start = time.process_time()
    with pytest.raises(FastaiTLError) as error:
        use(folder)
    assert REFUSED[name] in error.value.message
    assert str(folder) in error.value.message or 'json' in error.value.message
    assert time.process_time() - start < 20
    assert not (outside/'pwned').exists()


OTHERS = ['index names \'../weights.safetensors\' for all weights', 'index names \'.w.bin\' for all weights',
          'index names \'config.json\' for one weight', 'bundle.json lists \'a\\x00b.json\'',
          'bundle.json temperature = NaN', 'bundle.json precision = {}', 'bundle.json files = {"config.json": null}',
          'model.safetensors is sparse, 1 TB', 'awd model.json config.n_layers = 50000',
          'awd model.json config.emb_sz = 10000000000', 'awd model.json vocab = [5]', 'awd weight_hh is NaN',
          'lm without wte', 'tags without classifier']


@pytest.mark.parametrize('name', OTHERS)
def test_more_hostile_bundles_are_refused(name, places):
    base, change = KINDS[name]
    folder, outside = places(base)
    change(folder, outside)
    with pytest.raises(FastaiTLError):
        use(folder)
    assert not (outside/'pwned').exists()


def test_a_panic_of_the_tokenizer_is_an_error_with_a_reason(places):
    "A regular expression that takes too long for some texts only"
    folder, outside = places()
    name = next(n for n in KINDS if n.startswith('hf tokenizer.json normalizer') and '(a+)+$' in n)
    KINDS[name][1](folder, outside)
    predictor = load_bundle(folder, verbose=False)
    with pytest.raises(RunError, match='tokenizer'):
        predictor.predict(TEXTS)


# --- NaN ---

def test_weights_that_are_no_numbers_are_not_saved(bases, tmp_path):
    for base in ('hf', 'awd', 'lm'):
        learn = load_bundle(bases/base, verbose=False)
        learn = learn.learner() if hasattr(learn, 'learner') else learn
        next(learn.model.parameters()).data.view(-1)[0] = float('nan')
        with pytest.raises(TrainingError, match='NaN or infinity in'):
            learn.save_bundle(tmp_path/base)
    assert list(tmp_path.iterdir()) == []


# --- saving ---

def learner_of(folder):
    return load_bundle(folder, verbose=False)


def test_saving_keeps_what_it_did_not_write(places):
    folder, _ = places('lm')
    learn = learner_of(folder)
    (folder/'.git').mkdir()
    (folder/'.git'/'HEAD').write_text('ref')
    (folder/'README.md').write_text('mine')
    (folder/'thesis.pdf').write_text('mine')
    (folder/'notes').mkdir()
    (folder/'notes'/'a.md').write_text('mine')
    before = sorted(p.relative_to(folder) for p in folder.rglob('*'))
    learn.save_bundle(folder)
    assert sorted(p.relative_to(folder) for p in folder.rglob('*')) == before
    assert (folder/'.git'/'HEAD').read_text() == 'ref'
    use(folder) # and it still loads
    (folder/'thesis.txt').write_text('mine')
    with pytest.warns(UserWarning, match='thesis.txt'):
        learn.save_bundle(folder)
    assert (folder/'thesis.txt').read_text() == 'mine'


def test_a_folder_of_something_else_is_refused(places, tmp_path):
    folder, _ = places('lm')
    learn = learner_of(folder)
    for name, text in {'bundle.json': '{"name": "of another program"}', 'thesis.txt': 'mine'}.items():
        other = tmp_path/f'with {name}'
        other.mkdir()
        (other/name).write_text(text)
        with pytest.raises(RunError, match='something else'):
            learn.save_bundle(other)
        assert [p.name for p in other.iterdir()] == [name] and (other/name).read_text() == text


def test_a_new_file_never_replaces_one_of_the_user(places):
    "`config.json` is not in the list of the old bundle, so it is the user's"
    folder, _ = places('lm')
    learn = learner_of(folder)
    reseal(folder, [p.name for p in folder.iterdir() if p.name != 'config.json'])
    (folder/'config.json').write_text('mine')
    with pytest.raises(FastaiTLError, match='config.json'):
        learn.save_bundle(folder)
    assert (folder/'config.json').read_text() == 'mine'


def test_a_link_stays_a_link(places, tmp_path):
    folder, _ = places('lm')
    learn = learner_of(folder)
    (tmp_path/'link').symlink_to(folder)
    (tmp_path/'new').symlink_to(tmp_path/'target')
    for name in ('link', 'new'):
        learn.save_bundle(tmp_path/name)
        assert (tmp_path/name).is_symlink()
        use(tmp_path/name)
    assert (tmp_path/'target'/'bundle.json').is_file()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith('.')]


def test_the_current_folder(places, tmp_path, monkeypatch):
    "It works where the folder is empty; else it is refused, and nothing is lost"
    folder, _ = places('lm')
    learn = learner_of(folder)
    (tmp_path/'empty').mkdir()
    monkeypatch.chdir(tmp_path/'empty')
    learn.save_bundle('.')
    assert os.getcwd() == str(tmp_path/'empty')
    before = use(tmp_path/'empty')
    with pytest.raises(RunError, match='current folder'):
        learn.save_bundle('.')
    assert use(tmp_path/'empty') == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ['bundle', 'empty', 'outside']


def test_what_dead_processes_left_is_tidied_up(places, tmp_path):
    "A kill between the two renamings leaves the old bundle, which comes back; parts of running processes stay"
    folder, _ = places('lm')
    learn = learner_of(folder)
    (folder/'README.md').write_text('mine')
    dead = temporary_sibling(folder).name.replace(f'-{os.getpid()}-', f'-{2**22+1}-')
    shutil.copytree(folder, tmp_path/dead)
    shutil.copytree(folder, tmp_path/dead.replace('.part', '.old'))
    running = temporary_sibling(folder)
    running.mkdir()
    shutil.rmtree(folder)
    assert len(leftovers(folder)) == 1
    learn.save_bundle(folder)
    assert (folder/'README.md').read_text() == 'mine'
    hidden = [p for p in tmp_path.iterdir() if p.name.startswith('.')]
    assert hidden == [running]
    use(folder)


def test_the_umask_is_not_changed_for_a_moment(tmp_path):
    "Another thread that makes files all the time never makes one that others may write"
    old = os.umask(0o077)
    stop = threading.Event()
    modes = set()

    def make_files():
        while not stop.is_set():
            path = tmp_path/'other'
            path.touch()
            modes.add(path.stat().st_mode & 0o777)
            path.unlink()

    thread = threading.Thread(target=make_files)
    try:
        thread.start()
        for i in range(200):
            current_umask()
            with atomic_folder(tmp_path/'folder', lambda folder: {'a'}) as folder:
                (folder/'a').write_text(str(i))
        assert (tmp_path/'folder').stat().st_mode & 0o777 == 0o700
    finally:
        stop.set()
        thread.join()
        os.umask(old)
    assert modes == {0o600}


def test_writers_in_threads_never_mix(tmp_path):
    "Each file of a folder is of the same writer"
    errors = []

    def write(n):
        try:
            for _ in range(20):
                with atomic_folder(tmp_path/'folder', lambda folder: {'a', 'b'}) as folder:
                    (folder/'a').write_text(str(n))
                    (folder/'b').write_text(str(n))
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and os.listdir(tmp_path) == ['folder']
    assert (tmp_path/'folder'/'a').read_text() == (tmp_path/'folder'/'b').read_text()


# --- reports ---

def test_a_report_replaces_an_older_one_as_a_whole(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    numbers = Evaluation.from_preds(rng.random(50), rng.random(50))
    probs = torch.tensor(rng.random((50, 2))).softmax(1).numpy()
    labels = Evaluation.from_preds(probs, rng.integers(0, 2, 50), ['a', 'b'])
    labels.save(tmp_path/'report', dpi=50)
    (tmp_path/'report'/'notes.md').write_text('mine')
    before = {p.name: p.read_bytes() for p in (tmp_path/'report').iterdir()}
    monkeypatch.setattr('fastai_tl.evaluation.html_report.write_json', lambda *args: 1/0)
    with pytest.raises(ZeroDivisionError):
        numbers.save(tmp_path/'report', dpi=50)
    assert {p.name: p.read_bytes() for p in (tmp_path/'report').iterdir()} == before
    monkeypatch.undo()
    numbers.save(tmp_path/'report', dpi=50)
    names = {p.name for p in (tmp_path/'report').iterdir()}
    assert 'residuals.png' in names and 'notes.md' in names
    assert not names & {'confusion_matrix.png', 'confusion_matrix.csv', 'reliability.png'}
    assert 'rmse' in json.loads((tmp_path/'report'/'scores.json').read_text())
    monkeypatch.chdir(tmp_path/'report')
    labels.save('.', dpi=50) # one file after the other, because the current folder cannot be renamed
    assert {p.name for p in (tmp_path/'report').iterdir()} == set(before)
