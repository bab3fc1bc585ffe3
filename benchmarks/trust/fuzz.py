"""Calls with wrong arguments, to every public entry point.

Each call takes a valid call of calls.txt and replaces one or two of its arguments, or arguments that it leaves at
their default, by a value of POOL. Groups of calls share a fork, which is then thrown away; a call that is bad there is
made again in a fork of its own. Allowed are a result and an error of fastai_tl.
"Silently wrong" is a result with a number that is not finite, one that misses the condition of its line in calls.txt,
and a setting that `REFUSED` says must be refused."""

import ast
import datetime
import gc
import inspect
import json
import math
import os
import random
import re
import resource
import select
import shutil
import signal
import tempfile
import time
import traceback
import types
import typing
import warnings
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from numbers import Integral, Real
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from fastai.callback.core import Callback
from fastai.data.load import DataLoader
from fastai.losses import BaseLoss
from fastai.text.core import Tokenizer

SECONDS, GIB, GROUP = 30, 3, 40
HERE = Path(__file__).parent


# --- values ---


def len_of(*args, **kwargs):
    "A function of a user, which takes one argument; an error that it raises is the user's"
    return len(*args, **kwargs)


# what to pass instead of a good value; each is made when it is needed
POOL = {
    'None': lambda: None,
    'nan': lambda: math.nan,
    'inf': lambda: math.inf,
    '-inf': lambda: -math.inf,
    '-1': lambda: -1,
    '0': lambda: 0,
    '1': lambda: 1,
    '-0.5': lambda: -0.5,
    '0.5': lambda: 0.5,
    '2.5': lambda: 2.5,
    '7': lambda: 7,
    '1e-320': lambda: 1e-320,
    '1e308': lambda: 1e308,
    '10**20': lambda: 10**20,
    '-10**20': lambda: -(10**20),
    '10**400': lambda: 10**400,
    '1j': lambda: 1j,
    'True': lambda: True,
    'False': lambda: False,
    'empty text': lambda: '',
    'spaces': lambda: '  \n',
    "'x'": lambda: 'x',
    "'3'": lambda: '3',
    'surrogate': lambda: 'a \ud83d b',
    'null character': lambda: 'a\0b',
    '20 kB of text': lambda: 'word, ' * 3_400,
    'bytes': lambda: b'abc',
    'empty bytes': lambda: b'',
    '[]': lambda: [],
    '[[]]': lambda: [[]],
    '[[[1]]]': lambda: [[[1]]],
    '[None]': lambda: [None],
    '[nan]': lambda: [math.nan],
    '[1, 2]': lambda: [1, 2],
    '[-1]': lambda: [-1],
    "['a']": lambda: ['a'],
    "['a', 1]": lambda: ['a', 1],
    "['a'] * 30": lambda: ['a'] * 30,
    "[['a']]": lambda: [['a']],
    "['']": lambda: [''],
    "['\\ud83d']": lambda: ['\ud83d'],
    '()': lambda: (),
    "('a', 'b')": lambda: ('a', 'b'),
    '{}': lambda: {},
    "{'a': 1}": lambda: {'a': 1},
    '{1: None}': lambda: {1: None},
    'set': lambda: {'a'},
    'object': object,
    'class': lambda: int,
    'function': lambda: len_of,
    'lambda': lambda: lambda *args, **kwargs: None,
    'module': lambda: json,
    'path': lambda: Path('nowhere/x'),
    'dots': lambda: '../..',
    'table without rows': lambda: pd.DataFrame(dict(text=[], label=[])),
    'empty table': pd.DataFrame,
    'table': lambda: pd.DataFrame(dict(text=['a', None], label=['b', 'c'])),
    'Series': lambda: pd.Series(['a', 'b'], index=[7, 9]),
    'Series of numbers': lambda: pd.Series([0.5, math.nan]),
    'empty array': lambda: np.array([]),
    'array': lambda: np.array([1.0, 2.0]),
    'array (2, 2)': lambda: np.zeros((2, 2)),
    'array of objects': lambda: np.array([None, 'a'], dtype=object),
    'float32': lambda: np.float32(0.3),
    'NumPy nan': lambda: np.float64('nan'),
    'int64': lambda: np.int64(-2),
    'bool_': lambda: np.True_,
    'tensor': lambda: torch.tensor([1.0, 2.0]),
    'empty tensor': lambda: torch.tensor([]),
    'tensor of one': lambda: torch.tensor(3),
    'tensor nan': lambda: torch.tensor(math.nan),
    'range': lambda: range(3),
    'slice': lambda: slice(None),
    'iterator': lambda: iter(['a', 'b']),
    'generator': lambda: (o for o in ()),
    'Ellipsis': lambda: ...,
    'date': lambda: datetime.date(2026, 1, 1),
    'Decimal': lambda: Decimal('NaN'),
    'Fraction': lambda: Fraction(1, 3),
    'dtype': lambda: torch.float16,
}


def _number(low=None, high=None, above=None, below=None):
    def is_good(value):
        if isinstance(value, (torch.Tensor, np.ndarray)) and value.ndim == 0:
            value = value.item()
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, (Real, Decimal)):
            return False
        try:
            value = float(value)
        except OverflowError:
            return False
        limits = (low is None or value >= low, high is None or value <= high)
        return (
            math.isfinite(value)
            and all(limits)
            and (above is None or value > above)
            and (below is None or value < below)
        )

    return is_good


def _whole(low=1):
    def is_good(value):
        if isinstance(value, (torch.Tensor, np.ndarray)) and value.ndim == 0:
            value = value.item()
        is_whole = isinstance(value, Integral) and not isinstance(value, bool)
        return is_whole and (low is None or value >= low) and abs(value) < 2**40

    return is_good


def _flag(value):
    return isinstance(value, (bool, np.bool_)) or isinstance(value, (int, np.integer)) and value in (0, 1)


_COUNTS = 'bs val_bs seq_len max_length max_target_length n_folds repeats block every patience vocab_size max_vocab'
_COUNTS += ' n_boot n_bins n_nodes bins beam k max_words variants top_k buf_sz n_groups n_stages num_stages'
_COUNTS += ' epochs_per_stage head_epochs n_per_class max_new_tokens num_return_sequences num_beams valid_size'
_COUNTS += ' max_tokens n_best n_acc max_rows size min_words max_words dpi valid_size n_trainable'
_RATES = 'spread ratio temperature base_lr final_lr length tolerance head_lr'
REFUSED = {
    **dict.fromkeys(_COUNTS.split(), _whole()),
    **dict.fromkeys('min_freq min_texts reinit gap first stride n_epoch start_epoch min_steps'.split(), _whole(0)),
    **dict.fromkeys('seed'.split(), _whole(None)),
    **dict.fromkeys(_RATES.split(), _number(above=0)),
    **dict.fromkeys('wd weight_decay drop_mult min_delta'.split(), _number(low=0)),
    **dict.fromkeys('valid_pct start'.split(), _number(low=0, below=1)),
    **dict.fromkeys('share p prob p_mask p_random dropout_p noise label_smoothing'.split(), _number(low=0, high=1)),
    **dict.fromkeys('top_p typical_p'.split(), _number(above=0, high=1)),
    **dict.fromkeys('cut_frac level warmup'.split(), _number(above=0, below=1)),
    **dict.fromkeys('truncation weighted whole_words pack backwards stratify label_all do_sample'.split(), _flag),
}
# the same name with another meaning: how the entry point begins, the name, and what is good there
OTHER_MEANING = {
    ('plot_', 'temperature'): None,
    ('generate', 'top_k'): _whole(0),  # 0: all tokens, as in transformers
    ('awd.generate', 'top_k'): _whole(0),
    ('lm.generate', 'top_k'): _whole(0),
    ('wilson_interval', 'k'): None,  # numbers of successes, which may be an array
    ('Answer', 'start'): None,  # a position in a text; -1 for no answer
    ('Entity', 'start'): None,
    ('param_kind', 'p'): None,  # a parameter of a model
    ('param_kind', 'block'): _flag,
    ('HFEngine', 'share'): _flag,  # whether the weights are shared
    ('AWDEngine', 'share'): _flag,
    ('engine_of', 'share'): _flag,
    ('Calibrated', 'n_folds'): _whole(0),  # below 2: no estimate across folds
    ('learn.calibrate', 'n_folds'): _whole(0),
    ('bidi.calibrate', 'n_folds'): _whole(0),
    ('SinglePosition', 'tolerance'): lambda value: value == math.inf or _number(above=0)(value),  # no comparison
    **{(f'{name}Quickstart', 'size'): None for name in ('', 'ULMFiT', 'Transformer', 'Combined')},  # settings
}
# passed on by `**kwargs` to a function whose own default, written in its documentation, is `None`
NONE_BY_DEFAULT = {'max_length', 'max_new_tokens'}
# functions that fastai or transformers call: what they return is read there
CALLED_ELSEWHERE = {'metrics', 'loss_func', 'logits_processor', 'stopping_criteria'}


# --- calls ---


def own_names(f):
    "Return the names of the arguments in the code of a function"
    code = inspect.unwrap(f).__code__
    return set(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])


def is_own(f):
    return getattr(f, '__module__', '').startswith('fastai_tl.') and hasattr(inspect.unwrap(f), '__code__')


def passed_on(f):
    "Return the arguments that a function of fastai_tl passes on to one of another library, by `@delegates`"
    names = set(inspect.signature(f).parameters)
    while is_own(f):
        names -= own_names(f)
        f = getattr(f, '__delwrap__', None)
        f = f.__init__ if isinstance(f, type) else f
    return names if f is not None else set()


def read_elsewhere(f):
    "Return the arguments that fastai, PyTorch or transformers read, not fastai_tl"
    try:
        inspect.signature(f)
    except ValueError:  # a subclass of `str`, for example
        return set()
    if not isinstance(f, type):
        f = getattr(f, '__func__', f)
        return passed_on(f) if is_own(f) else set()
    owner = next((c for c in f.__mro__ if '__init__' in vars(c)), object)
    if not owner.__module__.startswith('fastai_tl.'):
        return set(inspect.signature(f).parameters)
    if issubclass(f, (Callback, DataLoader, Tokenizer, BaseLoss)):
        return set(inspect.signature(f).parameters) - own_names(owner.__init__)
    return passed_on(owner.__init__) if is_own(owner.__init__) else set()


class Entry:
    "A valid call of calls.txt"

    def __init__(self, line):
        self.allows_nan = line.endswith(' ? nan')
        line = line.removesuffix(' ? nan')
        line, _, self.condition = line.partition(' ! ')
        line, _, self.use = line.partition(' ; ')
        self.source = line.strip()
        call = ast.parse(self.source, mode='eval').body
        self.function = ast.unparse(call.func)
        self.name = self.function.removeprefix('w.')
        self.positional = [ast.unparse(o) for o in call.args]
        self.keywords = {o.arg: ast.unparse(o.value) for o in call.keywords}

    def bind(self, space):
        "Find the function, and the names of its arguments"
        self.f = eval(self.function, space)
        try:
            parameters = inspect.signature(self.f).parameters
        except (TypeError, ValueError):
            parameters = {}
        kinds = inspect.Parameter
        named = [p for p in parameters.values() if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)]
        places = [p.name for p in parameters.values() if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.POSITIONAL_ONLY)]
        n = len(self.positional)
        self.places = places[:n] + [f'argument {i}' for i in range(len(places), n)]
        self.parameters = {p.name: p for p in named}
        elsewhere = {'self', 'cls', *read_elsewhere(self.f)}
        optional = [p.name for p in named if p.default is not kinds.empty]
        is_foreign = bool(parameters) and elsewhere >= set(parameters)  # a class whose `__init__` is another library's
        names = [] if is_foreign else [*self.places, *self.keywords, *optional]
        self.names = [name for name in dict.fromkeys(names) if name not in elsewhere]

    def may_be_none(self, name):
        "Return whether `None` is documented: as the default, in the annotation, or in the function that gets it"
        p = self.parameters.get(name)
        if p is None:
            return name in NONE_BY_DEFAULT
        return p.default is None or self.keywords.get(name) == 'None' or type(None) in typing.get_args(p.annotation)

    def arguments(self, space, replaced):
        "Return the positional and the keyword arguments, with some of them replaced"
        args = [replaced[n] if n in replaced else eval(o, space) for n, o in zip(self.places, self.positional)]
        kwargs = {n: eval(o, space) for n, o in self.keywords.items() if n not in replaced}
        kwargs |= {n: value for n, value in replaced.items() if n not in self.places}
        return args, kwargs


def read_entries():
    lines = (HERE / 'calls.txt').read_text().splitlines()
    return [Entry(line) for line in lines if line.strip() and not line.startswith('#')]


def public_names():
    "Return the functions and classes that `fastai_tl.all` exports, and the methods that it adds to a Learner"
    import importlib

    from fastai.learner import Learner

    names = set()
    for line in (HERE.parents[1] / 'fastai_tl' / 'all.py').read_text().splitlines():
        if line.startswith('from .'):
            module = importlib.import_module('fastai_tl.' + line.split()[1][1:])
            names |= {n for n in module.__all__ if callable(getattr(module, n)) or inspect.isclass(getattr(module, n))}
    added = (n for n, f in vars(Learner).items() if getattr(f, '__module__', '').startswith('fastai_tl.'))
    return names | {f'learn.{name}' for name in added if not name.startswith('_')}


# --- one call ---


def numbers_in(result, depth=0):
    "Yield the floating point numbers of a result, as arrays"
    if depth > 4:
        return
    if isinstance(result, (float, np.floating)):
        yield np.asarray(result)
    elif isinstance(result, torch.Tensor):
        if result.is_floating_point():
            yield result.detach().double().numpy()
    elif isinstance(result, np.ndarray):
        if result.dtype.kind == 'f':
            yield result
    elif isinstance(result, (pd.DataFrame, pd.Series)):
        columns = [result] if isinstance(result, pd.Series) else [result.iloc[:, i] for i in range(result.shape[1])]
        yield from (o.to_numpy() for o in columns if o.dtype.kind == 'f')
    elif isinstance(result, dict):
        for value in result.values():
            yield from numbers_in(value, depth + 1)
    elif isinstance(result, (list, tuple)):
        for value in result:
            yield from numbers_in(value, depth + 1)


def wrong(entry, space, result, used, args, kwargs, replaced, named):
    "Say what is silently wrong with a result; an empty text if nothing is"
    for name, value in replaced.items():
        is_good = next((good for (e, n), good in OTHER_MEANING.items() if entry.name.startswith(e) and name == n),
                       REFUSED.get(name))
        if is_good and not (value is None and entry.may_be_none(name)) and not is_good(value):
            return f'`{name}` accepted'
    if not entry.allows_nan:
        for part in (result, used):
            if any(not np.isfinite(o).all() for o in numbers_in(part)):
                return 'a number that is not finite'
    is_spent = any(isinstance(o, Iterator) for o in replaced.values())  # then the condition cannot read it again
    if entry.condition and not is_spent:
        here = {**space, 'r': result, 'a': named}
        if not eval(entry.condition, here):
            return f'not {entry.condition}'
    return ''


def drained(result):
    "Return what a generator yields, at most a thousand items"
    if isinstance(result, types.GeneratorType):
        return [o for o, _ in zip(result, range(1000))]
    return result


def call(entry, space, replaced):
    "Make a call; return its outcome and what is wrong"
    from fastai_tl.core import FastaiTLError

    stage = 'call'
    try:
        args, kwargs = entry.arguments(space, replaced)
        named = {**dict(zip(entry.places, args)), **kwargs}
        result = drained(entry.f(*args, **kwargs))
        used = None
        if entry.use:
            stage = 'use'
            used = drained(eval(entry.use, {**space, 'r': result}))
        stage = 'check'
        if bad := wrong(entry, space, result, used, args, kwargs, replaced, named):
            return 'wrong', bad
        return 'ok', ''
    except FastaiTLError as error:
        return 'refused', f'{type(error).__name__}: {error.message}'[:300]
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        if isinstance(error, ImportError) and 'pip install' in str(error):
            return 'refused', 'an optional package is missing'
        if isinstance(error, TypeError) and len(frames) == 1:
            return 'refused', f'by Python: {error}'[:300]
        functions = {name for name, value in replaced.items() if callable(value)}
        is_read_elsewhere = functions & CALLED_ELSEWHERE and 'fastai_tl/' not in frames[-1].filename
        if functions and frames[-1].name == 'len_of' or is_read_elsewhere:
            return 'refused', f'by the function that was passed: {error}'[:300]
        frames = [f for f in frames if 'fastai_tl/' in f.filename and f.name != 'check_and_call']
        own = [f'{Path(f.filename).stem}:{f.name}' for f in frames]
        return 'foreign', f'{stage}: {type(error).__name__}: {str(error)[:160]!r} from {own[-2:]}'


# calls that take seconds; they get every tenth turn only, and other entry points the rest
SLOW = {'onnx_engine', 'exported_transformer', 'learn.export_onnx', 'run_quickstart'}


def choose(entries, number, seed):
    "Choose the entry and the replaced arguments of a call by its number; without a seed, none are replaced"
    entry = entries[number % len(entries)]
    if seed is not None and entry.name in SLOW and number // len(entries) % 10:
        others = [e for e in entries if e.name not in SLOW]
        entry = others[number % len(others)]
    if seed is None:
        return entry, {}
    rng = random.Random(f'{seed} {number}')
    n = min(len(entry.names), 2 if rng.random() < 0.25 else 1)
    names = rng.sample(entry.names, n)
    return entry, {name: rng.choice(list(POOL)) for name in names}


def limit_memory():
    "Limit the memory of this process to `GIB` more than it has now"
    limit = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize() + (GIB << 30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def in_fork(f, seconds=SECONDS):
    "Return the result of `f` in a fork; `hang` or `died` if there is none after so many seconds of a processor"
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.setpgid(0, 0)
            limit_memory()
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
            os.write(write, json.dumps(f()).encode())
        finally:
            os._exit(0)
    os.close(write)
    ready, _, _ = select.select([read], [], [], 4 * seconds)  # other programs may use the processor
    data = os.read(read, 1 << 16) if ready else b''
    os.close(read)
    if not ready:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if data:
        return json.loads(data)
    is_late = not ready or os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
    return ['hang', f'more than {seconds} seconds'] if is_late else ['died', f'status {status}']


def in_one_fork(calls, space):
    "Make calls one after another in a fork; return their outcomes, up to the one that ended it"
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.setpgid(0, 0)
            limit_memory()
            for entry, chosen in calls:
                used = int(time.process_time()) + 1
                resource.setrlimit(resource.RLIMIT_CPU, (used + SECONDS, resource.RLIM_INFINITY))
                start = time.time()
                outcome = call(entry, space, values_of(chosen))
                os.write(write, (json.dumps([*outcome, round(time.time() - start, 2)]) + '\n').encode())
        finally:
            os._exit(0)
    os.close(write)
    data = b''
    while select.select([read], [], [], 4 * SECONDS)[0] and (part := os.read(read, 1 << 16)):
        data += part
    os.close(read)
    os.kill(pid, signal.SIGKILL)  # it waits to be waited for, or hangs
    os.waitpid(pid, 0)
    return [json.loads(line) for line in data.decode().split('\n')[:-1]]


def alone(entry, chosen, space):
    "Make a call in a fork of its own"
    start = time.time()
    outcome = in_fork(lambda: call(entry, space, values_of(chosen)))
    return [*outcome, round(time.time() - start, 2)]


def values_of(chosen):
    return {name: POOL[value]() for name, value in chosen.items()}


def run_calls(entries, space, numbers, seed, out, deadline):
    "Make calls in groups that share a fork, those that are bad once more in a fork of their own; write the outcomes"
    null = os.open('/dev/null', os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    folder = Path(tempfile.mkdtemp())
    os.chdir(folder)
    gc.collect()
    gc.freeze()
    with open(out, 'w') as f:
        while numbers and time.time() < deadline:
            group = [choose(entries, number, seed) for number in numbers[:GROUP]]
            outcomes = in_one_fork(group, space)
            empty(folder)
            for i in range(min(len(outcomes) + 1, len(group))):
                if i == len(outcomes) or outcomes[i][0] not in ('ok', 'refused'):
                    outcomes[i:i + 1] = [alone(*group[i], space)]
                    empty(folder)
            for number, (entry, chosen), outcome in zip(numbers, group, outcomes):
                f.write(json.dumps([number, entry.name, chosen, *outcome]) + '\n')
            f.flush()
            numbers = numbers[len(outcomes):]
    shutil.rmtree(folder, ignore_errors=True)


def empty(folder):
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def make_calls(entries, space, numbers, seed, jobs, deadline, folder):
    "Share calls between processes, which write the outcomes into files of a folder"
    pids = []
    for j in range(jobs):
        pid = os.fork()
        if not pid:
            try:
                run_calls(entries, space, numbers[j::jobs], seed, folder / f'{time.time_ns()}.jsonl', deadline)
            except BaseException:
                (folder / f'{j}.error').write_text(traceback.format_exc())
            finally:
                os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    for error in folder.glob('*.error'):
        print(error.read_text())


def read_outcomes(folder):
    "Return the outcomes in the files of a folder, sorted by the number of the call"
    lines = [line for file in folder.glob('*.jsonl') for line in file.read_text().splitlines()]
    return sorted((json.loads(line) for line in lines), key=lambda o: o[0])


# --- all calls ---


def make_space(folder):
    "Return the names that calls.txt uses"
    import fastai_tl.all
    from world import World

    space = {n: getattr(fastai_tl.all, n) for n in dir(fastai_tl.all) if not n.startswith('__')}
    world = World(folder)
    world.write_files()
    return {**space, 'w': world, 'np': np, 'pd': pd, 'torch': torch, 'Path': Path}


def warm_up(entries, space):
    "Make everything that the calls use; return the lines that cannot be evaluated"
    broken = []
    for entry in entries:
        try:
            entry.bind(space)
            entry.arguments(space, {})
        except Exception as error:
            broken.append(f'{entry.source}: {type(error).__name__}: {error}'[:300])
    return broken


# what functions of the package return, and what only fastai, PyTorch or transformers make
NOT_CALLED = set(
    'Fold QAExample Use LayerGroup EncoderMatch MemoryReuse TransferPlan TaggedSentence Surprisal Attributions '
    'LayerProbe InterventionEffects Prediction GenerationOptions '
    'TensorTokens TensorTargets TensorTags TensorSpan EncodeSpan n_tokens LSTMFunction'.split()
)


def summary(outcomes, entries):
    counts = Counter(o[3] for o in outcomes)
    covered = {e.name.split('.')[0] for e in entries} | {f"learn.{e.name.split('.')[-1]}" for e in entries}
    return dict(
        calls=len(outcomes),
        entry_points=len({o[1] for o in outcomes}),
        results=counts['ok'],
        refused=counts['refused'],
        foreign_errors=counts['foreign'],
        silently_wrong=counts['wrong'],
        longer_than_30_seconds=counts['hang'],
        died=counts['died'],
        names_without_a_call=sorted(n for n in public_names() if n not in covered | NOT_CALLED),
    )


def trial(args):
    "Make `args.calls` calls, those whose outcomes the folder `args.resume` does not have yet"
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    start = time.time()
    entries = [e for e in read_entries() if re.search(args.only, e.source)]
    with tempfile.TemporaryDirectory() as d:
        folder = Path(d)
        (folder / 'world').mkdir()
        space = make_space(folder / 'world')
        for line in warm_up(entries, space):
            print('cannot be evaluated:', line)
        entries = [e for e in entries if hasattr(e, 'names')]
        print(f'{len(entries)} entry points, ready after {time.time() - start:.0f} s', flush=True)
        kept = args.resume or folder / 'out'
        kept.mkdir(exist_ok=True)
        done = {o[0] for o in read_outcomes(kept)}
        numbers = [i for i in range(len(entries) if args.valid else args.calls) if i not in done]
        seed = None if args.valid else args.seed
        make_calls(entries, space, numbers, seed, args.jobs, start + 60 * args.minutes, kept)
        outcomes = read_outcomes(kept)
    bad = [o for o in outcomes if o[3] not in (('ok',) if args.valid else ('ok', 'refused'))]
    for o in bad:
        print(*o[1:], sep=' | ')
    print('slowest:', *(o[1:] for o in sorted(outcomes, key=lambda o: -o[5])[:12]), sep='\n  ')
    by_name = Counter(o[1] for o in bad)
    print(by_name.most_common(40))
    return dict(
        summary=summary(outcomes, entries),
        bad=bad,
        seconds=round(time.time() - start),
        seconds_of_calls=round(sum(o[5] for o in outcomes)),
    )
