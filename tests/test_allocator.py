"Freed memory stays in the process within `reuse_memory`: fewer page faults, the same values, and all restored after"

import json
import os
import subprocess
import sys
import threading

import pytest
import torch
from fastai_tl.core import seed_everything
from fastai_tl.efficiency import allocator
from fastai_tl.efficiency.allocator import MemoryReuse, reuse_memory
from small_learners import classifier

with reuse_memory() as here:
    pass
glibc = pytest.mark.skipif(not here.is_on, reason=repr(here))

TOUCH = """
import json, threading
from fastai_tl.efficiency.allocator import reuse_memory
def touch(): return sum(len(bytearray(b'x')*2**26) for _ in range(8))
def faults(on):
    with reuse_memory(on) as reuse: touch()
    return reuse.page_faults
"""


def printed(code, **env):
    "Run code in a new process whose environment has no settings of the allocator but `env`"
    rest = {k: v for k, v in os.environ.items() if not k.startswith(('MALLOC_', 'GLIBC_TUNABLES'))}
    res = subprocess.run([sys.executable, '-c', TOUCH + code], env=rest | env, capture_output=True, text=True)
    assert res.returncode == 0, res.stderr
    return json.loads(res.stdout)


@glibc
def test_page_faults_fall_and_come_back():
    before, within, again, after = printed('print(json.dumps([faults(o) for o in (False, True, True, False)]))')
    assert before > 100_000 and max(within, again) < .2 * before
    assert after > .75 * before


@glibc
def test_nested_contexts():
    "The inner context ends and changes nothing; the outer one restores"
    code = '''
with reuse_memory():
    with reuse_memory(): touch()
    inside = faults(False)
print(json.dumps([inside, faults(False)]))'''
    inside, after = printed(code)
    assert inside < 1000 and after > 100_000


@glibc
def test_contexts_of_threads():
    "A context that another thread opened first and closes first leaves the settings on for this one"
    code = '''
ends = threading.Event()
def other():
    with reuse_memory(): ends.wait()
thread = threading.Thread(target=other)
thread.start()
with reuse_memory():
    touch()
    ends.set()
    thread.join()
    inside = faults(False)
print(json.dumps([inside, faults(False)]))'''
    inside, after = printed(code)
    assert inside < 1000 and after > 100_000


@glibc
def test_many_threads_end_with_nothing_open():
    def work():
        for _ in range(200):
            with reuse_memory(), reuse_memory():
                pass

    threads = [threading.Thread(target=work) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert allocator._Contexts.n_open == 0


@glibc
def test_memory_is_given_back():
    "After the context the process is about as large as before, although it kept 512 MB within"
    code = '''
def size(): return int(open('/proc/self/statm').read().split()[1])*4096/2**20
begin = size()
with reuse_memory():
    blocks = [bytearray(b'x')*2**26 for _ in range(8)]
    del blocks
    inside = size()
print(json.dumps([begin, inside, size()]))'''
    begin, inside, end = printed(code)
    assert inside > begin + 500 and end < begin + 10


@glibc
def test_errors_restore():
    with pytest.raises(ZeroDivisionError), reuse_memory():
        1 / 0
    assert allocator._Contexts.n_open == 0


@pytest.mark.parametrize('name, value', [
    ('MALLOC_TRIM_THRESHOLD_', '131072'), ('GLIBC_TUNABLES', 'glibc.malloc.trim_threshold=131072')])
def test_settings_of_the_user_stay(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    with reuse_memory() as reuse:
        assert not reuse.is_on and name in reuse.reason


@pytest.mark.parametrize('error', [AttributeError, OSError, TypeError])
def test_without_glibc(error, monkeypatch):
    "As on musl, macOS and Windows: nothing happens, and the context says why"

    def no_library(name):
        raise error

    monkeypatch.setattr(allocator.ctypes, 'CDLL', no_library)
    for name in allocator._OWN_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    with reuse_memory() as reuse:
        pass
    assert repr(reuse) == 'MemoryReuse(off: the C library is not glibc)'


def test_not_asked_for():
    with reuse_memory(False) as reuse:
        torch.zeros(1000)
    assert reuse == MemoryReuse(False, 'not asked for', reuse.page_faults, reuse.kernel_seconds, reuse.peak_mib)


def trained(small_tokenizers, on):
    seed_everything(0)
    learn = classifier(small_tokenizers)
    with reuse_memory(on), learn.no_bar(), learn.no_logging():
        learn.fit(2, 1e-3)
    return [p.detach().clone() for p in learn.model.parameters()]


def test_training_gives_the_same_weights(small_tokenizers):
    pairs = zip(trained(small_tokenizers, False), trained(small_tokenizers, True))
    assert all(torch.equal(a, b) for a, b in pairs)


@glibc
def test_fit_transfer_uses_it(small_tokenizers):
    "The settings are on during the fit, and restored after it"
    from fastai.callback.core import Callback

    class Look(Callback):
        def before_fit(self):
            self.n_open = allocator._Contexts.n_open

    learn, look = classifier(small_tokenizers), Look()
    with learn.no_bar(), learn.no_logging():
        learn.fit_transfer(1, min_steps=0, cbs=look)
    assert look.n_open == 1 and allocator._Contexts.n_open == 0
