"""Files under bad conditions: full disks, folders that can only be read, kills, damage, names that lead elsewhere."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from small_learners import MAKERS

import fastai_tl.atomic as atomic
import fastai_tl.datasets.corpora as corpora
from fastai_tl.all import *
from fastai_tl.atomic import atomic_folder, check_name, temporary_sibling, write_error
from fastai_tl.cli import main
from fastai_tl.commands.settings import read_settings
from fastai_tl.datasets.corpora import general_corpus
from fastai_tl.files import write_csv
from fastai_tl.quickstart.base import Quickstart, read_summary
from fastai_tl.quickstart.general import general_folder, general_run
from fastai_tl.quickstart.presets import QUICK
from fastai_tl.terminal import printable, safe_terminal

posix = pytest.mark.skipif(os.name != 'posix', reason='needs the limits of POSIX')
TEXTS = [f'the {w} film number {i} was {v}' for i in range(8) for w, v in (('good', 'fine'), ('bad', 'dull'))]
SIZES = dict(emb_sz=8, n_hid=12, n_layers=1)


@contextmanager
def full_disk(n_bytes=600):
    "No file can become larger than `n_bytes`, as with a quota: each writer gets an error of the operating system"
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*'))


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


@contextmanager
def quiet(learn):
    with learn.no_bar(), learn.no_logging():
        yield


# --- a full disk ---

def evaluation():
    rng = np.random.default_rng(0)
    probs = torch.tensor(rng.random((40, 2))).softmax(1).numpy()
    return Evaluation.from_preds(probs, rng.integers(0, 2, 40), ['a', 'b'])


def encoder():
    from fastai.text.models.core import get_language_model
    from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_lm_config
    vocab = [f'w{i}' for i in range(40)]
    return Encoder.from_model(get_language_model(AWD_LSTM, 40, {**awd_lstm_lm_config, **SIZES}), vocab)


WRITERS = dict(
    json=lambda path: write_json(path/'a.json', ['word']*500),
    tree=lambda path: save_tree(path/'a.safetensors', dict(a=torch.ones(2000))),
    csv=lambda path: write_csv(pd.DataFrame(dict(a=range(2000))), path/'a.csv'),
    encoder=lambda path: encoder().save(path/'encoder.safetensors'),
    report=lambda path: evaluation().save(path/'report', figures=[], dpi=30),
    figure=lambda path: save_png(evaluation().plot_confusion(), path/'a.png', dpi=30),
    states=lambda path: StateStore([50]*10, 16, where='disk', folder=path).open(),
)


@posix
@pytest.mark.parametrize('name', WRITERS)
def test_a_full_disk_names_the_file_and_keeps_the_older_one(tmp_path, name):
    write = WRITERS[name]
    for kind in ('new', 'again'):
        before = contents(tmp_path)
        with full_disk(), pytest.raises(RunError) as error:
            write(tmp_path)
        assert str(tmp_path) in error.value.message and 'free in' in error.value.message
        assert 'unchanged' in error.value.message or kind == 'new'
        assert contents(tmp_path) == before, 'the older version is whole, and nothing half-written is left'
        if name == 'states':
            return
        write(tmp_path)


@posix
def test_tokenizers_report_a_full_disk_in_their_own_way(tmp_path, small_tokenizers):
    learn = MAKERS['classifier'](small_tokenizers)
    for _ in range(2):
        before = contents(tmp_path)
        with full_disk(4000), pytest.raises(RunError, match='bundle must be written'):
            learn.save_bundle(tmp_path/'bundle')
        assert contents(tmp_path) == before
        learn.save_bundle(tmp_path/'bundle')
    assert load_bundle(tmp_path/'bundle', verbose=False).predict(['good'])


@posix
def test_a_full_disk_in_a_fit_keeps_the_last_checkpoint(tmp_path, small_tokenizers):
    class Fill(Callback):
        order = ResumableFit.order-1

        def after_epoch(self):
            if self.epoch == 1:
                self.limit = full_disk(2000)
                self.limit.__enter__()

        def after_fit(self): pass

    def learner():
        seed_everything(0)
        return MAKERS['classifier'](small_tokenizers)

    fill, learn = Fill(), learner()
    with quiet(learn), pytest.raises(RunError, match='epoch before is unchanged: run the same code again'):
        try:
            learn.fit(3, 1e-2, cbs=[ResumableFit(tmp_path/'ck.safetensors'), fill])
        finally:
            fill.limit.__exit__(None, None, None)
    assert load_tree(tmp_path/'ck.safetensors')['epoch'] == 1
    assert [name for name in names(tmp_path) if not name.endswith('.lock')] == ['ck.safetensors']
    results = []
    for file in ('ck.safetensors', 'whole.safetensors'):
        learn = learner()
        with quiet(learn):
            learn.fit(3, 1e-2, cbs=ResumableFit(tmp_path/file))
        results.append(list(learn.model.state_dict().values()))
    assert all(torch.equal(a, b) for a, b in zip(*results))


@posix
def test_a_report_that_cannot_be_written_does_not_end_the_training(tmp_path, small_tokenizers):
    (tmp_path/'file').touch()
    learn = MAKERS['classifier'](small_tokenizers)
    callback = EvaluationCallback(tmp_path/'file'/'report', every='epoch', figures=[])
    with quiet(learn), pytest.warns(UserWarning, match='report is not written.*last.save'):
        learn.fit(2, cbs=callback)
    assert len(learn.recorder.values) == 2
    callback.last.save(tmp_path/'report', figures=[])


@posix
def test_sparse_files_take_their_space(tmp_path):
    store = StateStore([100]*10, 64, where='disk', folder=tmp_path).open()
    assert os.stat(store.file).st_blocks*512 >= store.nbytes
    store.close()
    assert not names(tmp_path)


# --- a folder that can only be read ---

@pytest.mark.skipif(not hasattr(os, 'getuid') or os.getuid() != 0, reason='needs to become a user without rights')
def test_a_folder_without_permission(tmp_path):
    write_json(tmp_path/'a.json', 'old')
    pid = os.fork()
    if not pid:
        status = 1
        try:
            os.setuid(65534)
            for write in (lambda: write_json(tmp_path/'a.json', 1), lambda: write_json(tmp_path/'sub'/'a.json', 1),
                          lambda: save_tree(tmp_path/'x', dict(a=torch.ones(3)))):
                with pytest.raises(RunError, match='Permission denied.*in which you may write'):
                    write()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert read_json(tmp_path/'a.json') == 'old' and names(tmp_path) == ['a.json']


def test_a_file_where_a_folder_is_needed(tmp_path):
    (tmp_path/'file').write_text('mine')
    for name in ('json', 'tree', 'report'):
        with pytest.raises(RunError, match='must be written. Got a file instead of a folder'):
            WRITERS[name](tmp_path/'file')
    assert (tmp_path/'file').read_text() == 'mine'


# --- kills ---

def killed_writer(write, *where):
    "Call `write` in a process that is killed before an event of the file system; return whether it was killed"
    pid = os.fork()
    if not pid:
        seen = [0]

        def hook(event, args):
            if event in ('os.rename', 'open', 'os.mkdir', 'os.remove', 'os.rmdir', 'ctypes.dlsym', 'shutil.rmtree'):
                seen[0] += 1
                if seen[0] == where[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        try:
            write()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


needs_fork = pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs a system that can fork')


@needs_fork
@pytest.mark.parametrize('one_step', [True, False])
def test_a_folder_killed_at_any_moment_is_old_or_new(tmp_path, monkeypatch, one_step):
    "And what is not our own is never lost, whatever the moment"
    if not one_step:
        monkeypatch.setattr(atomic, '_exchange', lambda a, b: False)

    def own(folder):
        return {'a', 'b'}

    def write(text):
        with atomic_folder(tmp_path/'folder', own) as folder:
            (folder/'a').write_text(text)
            (folder/'b').write_text(text)

    write('0')
    (tmp_path/'folder'/'thesis').write_text('mine')
    moment, killed = 0, True
    while killed:
        moment += 1
        killed = killed_writer(lambda: write(str(moment)), moment)
        if one_step and sys.platform == 'linux':
            assert (tmp_path/'folder').exists(), 'there is a folder at every moment'
        if (tmp_path/'folder').exists():
            texts = [(tmp_path/'folder'/name).read_text() for name in 'ab']
            assert texts[0] == texts[1]
        write(f'after {moment}')
        assert names(tmp_path) == ['folder', 'folder/a', 'folder/b', 'folder/thesis']
        assert (tmp_path/'folder'/'thesis').read_text() == 'mine'
    assert moment > 8


@needs_fork
def test_what_killed_processes_left_is_removed(tmp_path):
    "A file, a folder and the states of a prefix cache, by any later write into the same folder"
    def leave():
        temporary_sibling(tmp_path/'other.json').touch()
        temporary_sibling(tmp_path/'model').mkdir()
        states = StateStore([5], 4, where='disk', folder=tmp_path).open()
        assert states.file
        os.kill(os.getpid(), signal.SIGKILL)

    killed_writer(leave, -1)
    assert len(names(tmp_path)) == 3
    mine = temporary_sibling(tmp_path/'other.json')
    mine.touch()
    (tmp_path/'.mine.part').touch()
    write_json(tmp_path/'a.json', 1)
    assert names(tmp_path) == sorted([mine.name, '.mine.part', 'a.json'])
    mine.unlink()
    killed_writer(leave, -1)
    store = StateStore([5], 4, where='disk', folder=tmp_path).open()
    assert len(list(tmp_path.glob('.prefix.states.*'))) == 1
    store.close()


def test_many_writers_of_one_file(tmp_path):
    "In threads: no error, and the file is always that of one writer"
    errors, path = [], tmp_path/'a.json'

    def write(n):
        try:
            for _ in range(40):
                write_json(path, [n]*200)
                assert len(set(read_json(path))) == 1
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and names(tmp_path) == ['a.json']


@needs_fork
def test_processes_that_write_one_folder(tmp_path):
    def write(n):
        for _ in range(15):
            with atomic_folder(tmp_path/'folder', lambda folder: {'a', 'b'}) as folder:
                for name in 'ab':
                    (folder/name).write_text(str(n))

    pids = []
    for n in range(3):
        pid = os.fork()
        if not pid:
            try:
                write(n)
                os._exit(0)
            except BaseException:
                os._exit(1)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0]*3
    assert names(tmp_path) == ['folder', 'folder/a', 'folder/b']
    assert (tmp_path/'folder'/'a').read_text() == (tmp_path/'folder'/'b').read_text()


# --- damage ---

def damages(data):
    "Ways in which a file can be damaged"
    return dict(empty=b'', short=data[:len(data)//2], flipped=data[:40] + bytes([data[40] ^ 1]) + data[41:],
                middle=data[:len(data)//2] + b'\xff'*8 + data[len(data)//2+8:], text=b'hello', json=b'{}')


def test_a_damaged_token_cache_is_made_again(tmp_path):
    whole = tokenize_texts_once(TEXTS, cache_dir=tmp_path)
    file, = tmp_path.iterdir()
    for data in damages(file.read_bytes()).values():
        file.write_bytes(data)
        with pytest.warns(UserWarning, match='damaged, so the texts are tokenized again') as said:
            again = tokenize_texts_once(TEXTS, cache_dir=tmp_path)
        assert len(said) == 1 and list(map(list, again)) == list(map(list, whole))
        assert list(map(list, tokenize_texts_once(TEXTS, cache_dir=tmp_path))) == list(map(list, whole))
    save_tree(file, dict(words=['a'])) # whole, and of something else
    with pytest.warns(UserWarning, match='damaged'):
        assert len(tokenize_texts_once(TEXTS, cache_dir=tmp_path)) == len(TEXTS)


def test_a_token_cache_that_cannot_be_written(tmp_path):
    (tmp_path/'file').touch()
    with pytest.warns(UserWarning, match='not cached and will be made again'):
        assert len(tokenize_texts_once(TEXTS, cache_dir=tmp_path/'file')) == len(TEXTS)


def test_a_damaged_corpus_is_made_again(tmp_path, monkeypatch):
    made = pd.DataFrame(dict(text=['a', 'b'], source=['x', 'y']))
    monkeypatch.setattr(corpora, 'make_general_corpus', lambda: made)
    assert general_corpus(tmp_path, installed=True).equals(made)
    file, = tmp_path.iterdir()
    for data in damages(file.read_bytes()).values():
        file.write_bytes(data)
        with pytest.warns(UserWarning, match='damaged, so the corpus is made again'):
            assert general_corpus(tmp_path, installed=True).equals(made)
        assert general_corpus(tmp_path, installed=True).equals(made)
    with pytest.warns(UserWarning, match='not cached'):
        assert general_corpus(file, installed=True).equals(made)


def test_a_damaged_fold_is_trained_again(tmp_path):
    df = pd.DataFrame(dict(text=TEXTS, label=['a', 'b']*8))
    trained = []

    def make(train, valid, seed):
        trained.append(seed)
        return Evaluation.from_preds(np.full((len(valid), 2), .5), (valid.label == 'b').astype(int), ['a', 'b'])

    for _ in range(2):
        cross_validate(make, df, n_folds=2, out=tmp_path, progress=False)
    assert len(trained) == 2
    sorted(tmp_path.glob('fold_*'))[0].write_bytes(b'x')
    with pytest.warns(UserWarning, match='this fold is trained again'):
        cross_validate(make, df, n_folds=2, out=tmp_path, progress=False)
    assert len(trained) == 3


@pytest.mark.parametrize('content', [b'', b'{', b'[]', b'3', b'{}', b'{"done": false}', b'\xff\xfe', b'{"done": true}'])
def test_a_damaged_stage_is_an_error_that_names_the_file(tmp_path, content):
    stage = tmp_path/'forward'/'general'
    stage.mkdir(parents=True)
    (stage/'stage.json').write_bytes(content)
    run = ULMFiT(tmp_path, SIZES, progress=False)
    for call in (run.status, lambda: run.history('general'), lambda: run.pretrain(TEXTS, epochs=1)):
        with pytest.raises(FastaiTLError, match='stage.json must'):
            call()


SUMMARY = dict(accuracy=.8, baseline_accuracy=.7, stages=[], size=dict(config=SIZES), model='runs/a/model', best='a',
               chosen=dict(a=dict(lr=.1, valid_accuracy=.8, valid_loss=.5, name='classifier')), bidirectional=False)


@pytest.mark.parametrize('change', [
    b'', b'{', b'[]', b'{}', b'\xff\xfe{', dict(chosen=None), dict(chosen={}), dict(best='b'), dict(accuracy='x'),
    dict(model='../../x'), dict(model='/etc'), dict(run='..'), dict(model=3),
    dict(chosen=dict(a=dict(lr=.1, valid_accuracy=.8, valid_loss=.5, name='../../x')))])
def test_a_damaged_summary(tmp_path, capsys, change):
    whole = json.dumps(SUMMARY).encode()
    (tmp_path/'summary.json').write_bytes(whole)
    assert read_summary(tmp_path) == SUMMARY
    (tmp_path/'summary.json').write_bytes(json.dumps(SUMMARY | change).encode() if isinstance(change, dict) else change)
    for command in (['status', str(tmp_path)], ['predict', str(tmp_path), 'a text']):
        assert main(command) == 1
        assert 'summary.json must' in capsys.readouterr().err


def test_a_damaged_record_of_seconds(tmp_path):
    from fastai_tl.datasets.quickstart import QuickData
    data = QuickData(pd.DataFrame(dict(text=['a'], label=['b'], split=['test'])), [])
    for content in (b'{', b'[]', b'{"a": 1}', b'\xff'):
        (tmp_path/'progress.json').write_bytes(content)
        with pytest.warns(UserWarning, match='progress.json is damaged'):
            assert Quickstart(tmp_path, data, {}).steps.done == {}


# --- names ---

@pytest.mark.parametrize('name', ['..', '.', '', '../x', '/tmp/x', 'a/b', 'a\\b', '.git', 'a\0', 'a\n', 'x'*300,
                                  None, 3])
def test_names_of_stages_stay_in_their_folder(tmp_path, name):
    run = ULMFiT(tmp_path/'run', SIZES, progress=False)
    for call in (lambda: run.classifier(pd.DataFrame(dict(text=TEXTS, label=['a', 'b']*8)), name=name),
                 lambda: run.load_classifier(name), lambda: run.history(name), lambda: run.encoder(name)):
        with pytest.raises(FastaiTLError, match='must be (the name of a file or folder|a string)'):
            call()
    assert not names(tmp_path)


def test_names_that_are_allowed():
    for name in ('classifier', 'classifier-0.01', 'my classifier', '分類', 'é', 'v1+2', '_x'):
        assert check_name(name) == name


def test_a_classifier_is_not_called_like_a_language_model(tmp_path):
    for name in ('general', 'domain'):
        with pytest.raises(RunError, match='Choose another name'):
            ULMFiT(tmp_path, SIZES, progress=False).classifier(TEXTS, name=name)


# --- settings ---

@pytest.mark.parametrize('encoding', ['utf-16', 'cp1252'])
def test_settings_in_another_encoding(tmp_path, monkeypatch, capsys, encoding):
    (tmp_path/'settings.ini').write_bytes('[fastai_tl]\nout = schön\n'.encode(encoding))
    monkeypatch.chdir(tmp_path)
    for file in (None, 'settings.ini'):
        with pytest.raises(FastaiTLError, match='settings.ini must be a settings file.*encoding utf-8'):
            read_settings(file)
    assert main(['quickstart', '--cfg', 'settings.ini']) == 1
    assert 'encoding utf-8' in capsys.readouterr().err
    (tmp_path/'settings.ini').write_bytes('[other]\nout = schön\n'.encode(encoding))
    assert read_settings() == {}


# --- the command line ---

def test_control_characters_are_printed_as_escapes(tmp_path, capsys, monkeypatch):
    nasty = 'a\x1b[2J\x9b31m\u202eb\x07\x7f\ud800'
    assert printable(nasty) == r'a\x1b[2J\x9b31m\u202eb\x07\x7f\ud800'
    with safe_terminal():
        print(nasty)
        print(nasty, file=sys.stderr)
    out = capsys.readouterr()
    assert not set(out.out + out.err) & set('\x1b\x9b\u202e\x07\x7f\ud800')
    assert main(['predict', f'no{nasty}', 'text']) == 1
    assert r'no' in (err := capsys.readouterr().err) and '\x1b' not in err


def test_an_ascii_terminal():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, 'ascii', newline='')
    with redirect_stdout(stream), safe_terminal():
        print('好', flush=True)
    assert raw.getvalue() == b'\\u597d\n'


def test_errors_of_the_system_have_no_traceback(tmp_path, capsys, monkeypatch):
    import fastai_tl.cli as cli

    def fails(error):
        def command(args): raise error
        monkeypatch.setattr(cli, '_command', lambda name: command)
        return main(['status', 'x']), capsys.readouterr().err

    assert fails(PermissionError(13, 'Permission denied', '/x/a')) == (1, 'fastai-tl: /x/a: Permission denied\n')
    assert fails(OSError(28, 'No space left on device')) == (1, 'fastai-tl: No space left on device\n')
    assert fails(Exception('Disk: Permission denied (os error 13)')) == (1, 'fastai-tl: Permission denied\n')
    with pytest.raises(ZeroDivisionError):
        fails(ZeroDivisionError())


@pytest.mark.slow
@pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs /dev/full')
@pytest.mark.parametrize('target', ['/dev/full', '| head -c 0'])
def test_output_that_cannot_be_written(tmp_path, target):
    (tmp_path/'forward').mkdir()
    where = target if target.startswith('|') else f'> {target}'
    command = f'{sys.executable} -W ignore -c "import sys; from fastai_tl.cli import main; sys.exit(main())" '
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    done = subprocess.run(f'{command} status {tmp_path} {where}', shell=True, capture_output=True, text=True, env=env)
    assert 'Traceback' not in done.stderr and 'Exception ignored' not in done.stderr


# ------------------------------------------------------------------ stage 1 of quickstarts, kept per user

@pytest.mark.parametrize('kind', ['in use', 'full disk'])
def test_stage_1_is_deleted_only_if_it_is_damaged(tmp_path, monkeypatch, kind):
    "Another quickstart that trains it, or a full disk, must not cost what has been trained so far"
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    texts = ['a good film', 'a bad film']
    stage = ULMFiT(general_folder(texts, QUICK), config=QUICK['config']).stages('general')[0]
    stage.folder.mkdir(parents=True)
    stage.checkpoint.write_bytes(b'of the other quickstart')

    def pretrain(ulm, *args, **kwargs):
        if kind == 'full disk':
            raise write_error(stage.checkpoint, OSError(errno.ENOSPC, 'full'))
        with stage.lock():
            raise AssertionError('two trainings in one folder')

    monkeypatch.setattr(ULMFiT, 'pretrain', pretrain)
    with ThreadPoolExecutor(1) as others:
        lock = others.submit(stage.lock().acquire).result() if kind == 'in use' else None
        try:
            with pytest.raises(RunError, match='another thread' if kind == 'in use' else 'full'):
                general_run(texts, QUICK, tmp_path/'out')
        finally:
            if lock is not None:
                lock.release()
    assert stage.checkpoint.read_bytes() == b'of the other quickstart'
