"""What the benchmarks share: command line options, interleaved rounds, ratios with their range, quiet Learners,
tables and JSON."""

import argparse
import json
import os
import time
import warnings
from functools import partial
from pathlib import Path

from fastai_tl.timing import interleaved_seconds, machine_info, ranged, rotated, seconds_of  # noqa: F401
from fastai_tl.timing import speed_ratio as ratio  # noqa: F401 (the benchmarks take these from here)

DATA = os.environ.get('FASTAI_TL_DATA', '../shared/data')
OPTIONS = {
    'rounds': dict(type=int, default=5, help='counted rounds'),
    'threads': dict(type=int, help="PyTorch's threads"),
    'device': dict(default='cpu'),
    'cpu-time': dict(action='store_true', help='processor time instead of wall-clock time; needs one thread'),
    'data': dict(default=DATA, help='folder with the data sets'),
    'seeds': dict(type=int, default=3),
    'json': dict(type=Path, help='also write the figures to this file'),
}


def offline(silent=True):
    "Keep transformers off the network and its tokenizers in one process; call before importing it"
    os.environ.setdefault('HF_HUB_OFFLINE', '1')
    os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
    if silent:
        warnings.filterwarnings('ignore')


def parser(doc, *options, **defaults):
    "A command line parser that shows `doc`, with some of OPTIONS and their defaults"
    ap = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in options:
        ap.add_argument(f'--{name}', **OPTIONS[name])
    ap.set_defaults(**defaults)
    return ap


def set_threads(threads):
    "Set PyTorch's number of threads, if one is given"
    import torch

    if threads:
        torch.set_num_threads(threads)


def chosen_clock(cpu_time):
    "The clock of `--cpu-time` or of the wall"
    import torch

    if not cpu_time:
        return time.perf_counter
    if torch.get_num_threads() != 1:
        raise SystemExit('--cpu-time needs --threads 1: it adds up the seconds of all threads')
    return time.process_time


def load_benchmark(name):
    "The module of another benchmark, imported under a name of its own"
    from importlib import util

    spec = util.spec_from_file_location(f'{name}_benchmark', Path(__file__).parent / name / 'run.py')
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- time ---


def synchronize(device):
    "Wait until the device has finished its work"
    import torch

    if device != 'cpu':
        torch.accelerator.synchronize()


def seconds(f, clock=time.perf_counter, device='cpu'):
    "Seconds that `f` takes on a device; where `f` returns a float, it has timed itself and that counts"

    def run():
        own = f()
        synchronize(device)
        return own

    synchronize(device)
    return seconds_of(run, clock)


def interleave(variants, rounds, warm_up=1, **kwargs):
    "Seconds of each variant in each round; the first `warm_up` rounds are not counted"
    timed = {name: partial(seconds, f, **kwargs) for name, f in variants.items()}
    return interleaved_seconds(timed, rounds, warm_up=warm_up)


# --- results ---


def show(name, results, width=16, digits=2):
    "Print each result of an experiment: a ratio with its range, or the rounded figures"
    for k, v in results.items():
        figures = {i: round(o, digits) for i, o in v.items()}
        if 'ratio' in v:
            figures = f"{v['ratio']:.2f} ({v['low']:.2f} to {v['high']:.2f}; best against best {v['best']:.2f})"
        print(f'{name:10} {k:{width}}', figures, flush=True)


def table(columns, rows):
    "A Markdown table; a column whose name ends in `:` is aligned to the right"
    heads = [c.removesuffix(':') for c in columns]
    rules = ['---:' if c.endswith(':') else '---' for c in columns]
    lines = [f"| {' | '.join(heads)} |", f"|{'|'.join(rules)}|"]
    return '\n'.join([*lines, *(f"| {' | '.join(map(str, r))} |" for r in rows)])


def write_json(file, figures, indent=1):
    "Write the figures to a file, if there is one; named figures get the `machine_info()` that they come from"
    if file:
        if isinstance(figures, dict):
            figures = dict(figures, machine=machine_info())
        file.write_text(json.dumps(figures, indent=indent) + '\n', encoding='utf-8')


def quiet(learn, validate=False):
    "The Learner without progress bar and log, and without validation unless `validate`: training alone is timed"
    learn.remove_cb(learn.progress)
    learn.logger = lambda *o: None
    if not validate:
        learn._do_epoch_validate = lambda *o, **k: None
    return learn


def trained_once(learn, file, train):
    "Train the Learner, keep its weights in a file, and return what `train()` returns; `None` if the file was there"
    import torch

    if file.exists():
        learn.model.load_state_dict(torch.load(file, weights_only=True))
        return None
    result = train()
    torch.save(learn.model.state_dict(), file)
    return result


def memory_mb(name):
    "A line of /proc/self/status in MB: `VmRSS` now, `VmHWM` at its peak"
    lines = Path('/proc/self/status').read_text().split('\n')
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


# --- seeds ---


def mean_and_interval(values):
    "Mean and 95 % interval of Student's t over the seeds, in %"
    import numpy as np
    from scipy.stats import t

    v = 100 * np.array(values)
    half = t.ppf(0.975, len(v) - 1) * v.std(ddof=1) / len(v) ** 0.5 if len(v) > 1 else float('nan')
    return f'{v.mean():.1f} ± {half:.1f}'


def runs_of_seeds(a, one_seed):
    "The runs in the file `a.json`, with those of `a.seed` made anew by `one_seed`, unless only `a.summary` is wanted"
    runs = json.loads(a.json.read_text())['runs'] if a.json and a.json.exists() else []
    for seed in [] if a.summary else a.seed:
        run = one_seed(argparse.Namespace(**vars(a) | dict(seed=seed)))
        runs = sorted([old for old in runs if old['seed'] != seed] + [run], key=lambda run: run['seed'])
        write_json(a.json, dict(runs=runs))
    return runs
