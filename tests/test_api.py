"Every public name has a docstring, and none replaces a name of fastai."

import ast, importlib, inspect, types

import pytest
from fasttransform import Transform

from repo import *
from test_law import all_patches, patched

sys.path.append(str(ROOT / 'tools'))
from docs_api import parameter_docs

exported = [nb for nb in notebooks() if nb.py.exists()]  # that none is missing is for test_notebooks.py to say
each_notebook = pytest.mark.parametrize('nb', exported, ids=ids)


def module(nb):
    return importlib.import_module(f'{PKG}.{nb.module}')


def ours(o):
    return (getattr(o, '__module__', None) or '').split('.')[0] == PKG


def function(o):
    return inspect.unwrap(
        getattr(o, 'func', None)
        or getattr(o, 'fget', None)
        or getattr(o, '__func__', None)
        or (o.f if type(o).__name__ == '_clsmethod' else o)
    )


def inherited(cls, name):
    "Is `name` a method that `cls` overrides, documented where it comes from?"
    return any(name in vars(b) for b in cls.__mro__[1:]) or (
        issubclass(cls, Transform) and name in ('encodes', 'decodes', 'setups')
    )


def public_methods(cls):
    for name, o in vars(cls).items():
        if name.startswith('_') or inherited(cls, name):
            continue
        if isinstance(function(o), types.FunctionType):
            yield f'{cls.__name__}.{name}', o


def public_objects(nb):
    "(name, function or class) of what `nb` exports: `__all__`, the methods of its classes, and what it patches"
    mod = module(nb)
    for name in mod.__all__:
        o = getattr(mod, name)
        if not (isinstance(o, type) or callable(o)) or not ours(o):
            continue  # a constant, or something passed on
        yield name, o
        if isinstance(o, type):
            yield from public_methods(o)
    names = {**vars(importlib.import_module('fastai.text.all')), **vars(mod)}
    for cls, method in {p for c in nb.exported for p in patched(c.tree)}:
        if not method.startswith('_'):
            yield f'{cls}.{method}', inspect.getattr_static(names[cls], method)


def wrappers(f):
    "A function, and what decorators have put around it"
    while f is not None:
        yield f
        f = getattr(f, '__wrapped__', None)


def undocumented(o):
    "The parameters of `o` without a comment; `self`, names with `_`, and what `@delegates` brings are not asked for"
    if isinstance(o, type):
        if '__init__' not in vars(o):
            return []
        f = inspect.unwrap(o.__init__)
    else:
        f = function(o)
    if not isinstance(f, types.FunctionType):
        return []
    own = list(f.__code__.co_varnames[: f.__code__.co_argcount + f.__code__.co_kwonlyargcount])
    if not any(hasattr(g, '__delwrap__') for g in wrappers(o.__init__ if isinstance(o, type) else o)):
        own += [p.name for p in inspect.signature(f).parameters.values() if p.kind is p.VAR_KEYWORD]
    docs = parameter_docs(o if isinstance(o, type) else f)
    shown = [n for n in own if n not in ('self', 'cls') and not n.startswith('_')]
    return [n for n in shown if not (docs.get(n) or {}).get('docment')]


@each_notebook
def test_docstrings(nb):
    lacking = [name for name, o in public_objects(nb) if not (inspect.getdoc(function(o)) or '').strip()]
    assert not lacking, f'{nb.path.name}: no docstring: {lacking}'


@each_notebook
def test_docments(nb):
    lacking = {name: ps for name, o in public_objects(nb) if (ps := undocumented(o))}
    assert not lacking, f'{nb.path.name}: parameters without a comment: {lacking}'


def test_shadows_nothing():
    "After fastai's star import, ours changes the meaning of no name, and of no builtin"
    res = python(
        'import builtins\n'
        'before = {}; exec("from fastai.text.all import *", before)\n'
        'after = {}; exec("from fastai_tl.all import *", after); after.pop("__builtins__")\n'
        'wrong = [k for k, v in after.items() if k in before and v is not before[k]]\n'
        'new = {k: v for k, v in after.items() if k not in before}\n'
        'wrong += [k for k, v in new.items() if hasattr(builtins, k) and v is not getattr(builtins, k)]\n'
        'print("shadowed:", sorted(wrong))'
    )
    assert res.returncode == 0, res.stdout
    assert 'shadowed: []' in res.stdout, res.stdout


# --- Callbacks, which fastai registers as attributes of the Learner ---


@pytest.fixture(scope='module')
def learner_attributes():
    "What a Learner has: its methods, patched ones among them, and all that is set on it until the end of a fit"
    from fastai.text.all import Learner, TextLearner, LMLearner
    from fastai.test_utils import synth_learner

    for nb in exported:
        module(nb)
    learn = synth_learner()
    callbacks = {cb.name for cb in learn.cbs}
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    return (set(vars(learn)) | set(dir(Learner)) | set(dir(TextLearner)) | set(dir(LMLearner))) - callbacks


def our_callbacks():
    from fastai.text.all import Callback

    for nb in exported:
        for o in vars(module(nb)).values():
            if isinstance(o, type) and issubclass(o, Callback) and o.__module__ == module(nb).__name__:
                yield o


def registered(cls):
    return cls.name.fget(object.__new__(cls)) if isinstance(cls.name, property) else cls.name


def test_callbacks_register_as_nothing_else(learner_attributes):
    "Neither as an attribute of the Learner nor as one of fastai's own callbacks"
    from fastai.callback.core import Callback
    import fastai.text.all as ft

    theirs = {registered(o) for o in vars(ft).values() if isinstance(o, type) and issubclass(o, Callback)}
    wrong = {o.__name__: registered(o) for o in our_callbacks() if registered(o) in learner_attributes | theirs}
    assert not wrong, f'callbacks that register under a name in use: {wrong}'


def own_attributes(cls):
    "What a callback sets on itself, read from its source"
    tree = ast.parse(inspect.cleandoc('\n' + inspect.getsource(cls)))
    for n in ast.walk(tree):
        if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store) and getattr(n.value, 'id', '') == 'self':
            yield n.attr
        if isinstance(n, ast.Call) and getattr(n.func, 'id', '') == 'store_attr':
            if n.args and isinstance(n.args[0], ast.Constant):
                yield from (o.strip() for o in n.args[0].value.split(','))
            else:
                yield from list(inspect.signature(cls.__init__).parameters)[1:]


def test_callback_attributes_shadow_nothing(learner_attributes):
    "An attribute of a callback hides the Learner's of the same name from the callback's own code"
    from fastai.callback.core import Callback

    wrong = {
        o.__name__: both
        for o in our_callbacks()
        if (both := (set(own_attributes(o)) & learner_attributes) - set(dir(Callback)))
    }
    assert not wrong, f'attributes of callbacks that a Learner has too: {wrong}'


def test_patches_find_their_classes():
    "Every class that is patched is one of fastai's, PyTorch's or ours, so that the other tests look at it"
    import fastai.text.all as ft

    unknown = {c for _, c, _ in all_patches() if not isinstance(getattr(ft, c, None), type)}
    assert not unknown, unknown
