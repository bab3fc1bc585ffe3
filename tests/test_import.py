"Importing the package changes only what importing fastai changes, opens no connection and writes no file."

import json

import pytest

from repo import *

# Runs in a fresh process with an empty home and current folder; calls `state()` after fastai's import and after ours
PROBE = '''
import hashlib, json, logging, os, pathlib, pickle, random, socket, sys, warnings
from fastai.text.all import *
import fastai.text.all, matplotlib, numpy, torch

def is_fastai_class(v):
    return isinstance(v, type) and v.__module__.split('.')[0] in ('fastai', 'fastcore')

CLASSES = {k: v for k, v in vars(fastai.text.all).items() if is_fastai_class(v)}
ATTRIBUTES = {k: dict(vars(v)) for k, v in CLASSES.items()}
NAMES = dict(vars(fastai.text.all))
LOGGERS = ('', 'transformers', 'fastai', 'matplotlib', 'torch')

def digest(o):
    return hashlib.sha256(pickle.dumps(o)).hexdigest()

def files(folder):
    found = [p for p in pathlib.Path(folder).rglob('*') if p.is_file()]
    return sorted((str(p.relative_to(folder)), p.stat().st_mtime_ns) for p in found)

def logger_state(name):
    logger = logging.getLogger(name)
    return logger.level, repr(logger.handlers)

def state():
    return dict(
        environ=dict(os.environ),
        filters=repr(warnings.filters),
        showwarning=repr(warnings.showwarning),
        logging={n or 'root': logger_state(n) for n in LOGGERS},
        logging_disabled=logging.root.manager.disable,
        rcparams=repr(dict(matplotlib.rcParams)),
        backend=os.environ.get('MPLBACKEND'),
        random=digest(random.getstate()),
        numpy=digest(numpy.random.get_state()),
        torch=digest(torch.get_rng_state().numpy()),
        threads=(torch.get_num_threads(), torch.get_num_interop_threads()),
        dtype=repr(torch.get_default_dtype()),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        printoptions=repr(numpy.get_printoptions()),
        cwd=os.getcwd(),
        path=list(sys.path),
        hooks=repr((sys.excepthook, sys.displayhook, sys.meta_path, sys.path_hooks)),
        recursion=sys.getrecursionlimit(),
        home=files(os.environ['HOME']),
        here=files('.'))

def refuse(*args, **kwargs):
    raise AssertionError(f'a connection at import: {args}')

before = state()
loaded = set(sys.modules)
for name in ('connect', 'connect_ex'):
    setattr(socket.socket, name, refuse)
socket.getaddrinfo = socket.create_connection = refuse
from fastai_tl.all import *
after = state()
replaced = []
for k, v in CLASSES.items():
    changed = [a for a, o in ATTRIBUTES[k].items() if not a.startswith('__') and vars(v).get(a) is not o]
    replaced += [f'{k}.{a}' for a in changed]
print(json.dumps(dict(
    changed={k: [before[k], after[k]] for k in before if before[k] != after[k]},
    loaded=sorted(set(sys.modules) - loaded),
    replaced=sorted(replaced),
    names=sorted(k for k, v in NAMES.items() if vars(fastai.text.all).get(k) is not v))))
'''


@pytest.fixture(scope='module')
def probe(tmp_path_factory):
    home, here = tmp_path_factory.mktemp('home'), tmp_path_factory.mktemp('here')
    env = dict(HOME=str(home), XDG_CACHE_HOME=str(home / '.cache'), XDG_CONFIG_HOME=str(home / '.config'))
    for _ in range(2):  # the first import writes fastai's and Matplotlib's own caches
        res = python(PROBE, cwd=here, env=env)
        assert res.returncode == 0, res.stdout
    return json.loads(res.stdout.strip().splitlines()[-1])


def test_changes_no_state(probe):
    "Environment, warnings, logging, Matplotlib, random states, threads, paths, hooks and files stay the same"
    assert probe['changed'] == {}


def test_replaces_nothing_of_fastai(probe):
    "Methods are added to fastai's classes, and none of theirs is replaced"
    assert probe['replaced'] == [] and probe['names'] == []


@pytest.mark.parametrize(
    'name', ['transformers', 'tokenizers', 'seaborn', 'sklearn', 'spacy', 'datasets', 'peft', 'nbdev', 'IPython']
)
def test_does_not_load(probe, name):
    "Heavy libraries that fastai has not loaded are imported where they are used"
    assert [m for m in probe['loaded'] if m == name or m.startswith(name + '.')] == []


def test_version_needs_no_import():
    "`fastai_tl.__version__` is there without fastai and torch"
    res = python(
        'import sys, fastai_tl\n'
        'loaded = [m for m in ("torch", "fastai", "fastai_tl.all") if m in sys.modules]\n'
        'print(fastai_tl.__version__, loaded)'
    )
    assert res.returncode == 0 and res.stdout.strip().endswith('[]'), res.stdout
