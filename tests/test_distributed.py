"""`learn.distributed()`: what several processes train, predict, decide and write, against one process.

One process imports everything and forks the processes of each job (distributed_run.py)."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from textwrap import indent

import numpy as np
import pytest

from repo import ROOT, clean_env

if not hasattr(os, 'fork'):
    pytest.skip('needs a system that can fork', allow_module_level=True)


class Jobs:
    "Runs jobs in the process that forks; results are kept, so that several tests read those of one job"

    def __init__(self, folder):
        program = [sys.executable, '-W', 'ignore', str(Path(__file__).with_name('distributed_run.py'))]
        env = clean_env(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', GLOO_SOCKET_IFNAME='lo', HF_HUB_OFFLINE='1')
        self.process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        assert self.process.stdout.readline() == 'ready\n'
        self.folder = folder
        self.known = {}

    def run(self, check, n, folder=None, **options):
        "Codes, results and seconds of a job; `n` is 0 for a process that works alone"
        folder = folder or self.folder
        job = dict(check=check, n=n, folder=str(folder), **options)
        self.process.stdin.write(json.dumps(job) + '\n')
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def results(self, check, n, **options):
        "What each process of a job returned"
        key = (check, n, json.dumps(options))
        if key not in self.known:
            answer = self.run(check, n, **options)
            print(check, n, f'{answer["cpu"]:.1f} s of processor time')
            assert answer['codes'] == [0]*max(n, 1), answer['results']
            self.known[key] = answer['results']
        return self.known[key]

    def both(self, check, n=2):
        "The result of one process whose batches are `n` times as large, and those of `n` processes"
        return self.results(check, 0, scale=n)[0], self.results(check, n)


@pytest.fixture(scope='module')
def jobs(tmp_path_factory):
    jobs = Jobs(tmp_path_factory.mktemp('jobs'))
    yield jobs
    jobs.process.stdin.close()
    jobs.process.wait(120)


def difference(a, b):
    "The largest difference of two nested lists of numbers of the same shape"
    if isinstance(a, list):
        assert len(a) == len(b)
        return max((difference(x, y) for x, y in zip(a, b)), default=0.)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return max(difference(a[k], b[k]) for k in a)
    if isinstance(a, str) or a is None:
        assert a == b
        return 0.
    return 0. if a == b or math.isnan(a) and math.isnan(b) else abs(a-b)


# --- training ---

KINDS = ('classifier', 'class_weights', 'multilabel', 'tagger', 'causal_lm', 't5', 'answerer', 'ulmfit_lm',
         'ulmfit_classifier', 'streamed_causal_lm', 'streamed_lm')


@pytest.mark.parametrize('kind', KINDS)
def test_gradients_are_those_of_one_large_batch(jobs, kind):
    "Each step of an epoch: the same rows, the same gradient and the same loss, in all processes"
    alone, together = jobs.both('gradients')
    whole = np.load(alone[kind]['steps'])
    for of_process in together:
        steps = np.load(of_process[kind]['steps'])
        assert steps.shape == whole.shape
        errors = np.linalg.norm(steps-whole, axis=1)/np.linalg.norm(whole, axis=1)
        assert errors.max() < 1e-6, errors # most are below 1e-15, in float64
        assert difference(of_process[kind]['losses'], alone[kind]['losses']) < 1e-5


def test_stages_and_weights_are_the_same(jobs):
    "Gradual unfreezing by epoch and on a plateau: stages and metrics of one process, equal weights in all processes"
    alone, together = jobs.both('stages')
    assert together[0] == together[1]
    for name, one in alone.items():
        assert together[0][name]['groups'] == one['groups'], name
        assert together[0][name]['epochs'] == one['epochs'], name
        assert difference(together[0][name]['values'], one['values']) < 1e-6, name # the losses are of float32


FLOAT32 = ('transfer', 'pooled cache', 'tagger cache', 'chunked') # Adam enlarges rounding where a gradient is near 0


def test_other_fits(jobs):
    "Recipes, stored states, accumulation, averages, two passes a batch, bfloat16: as in one process"
    alone, together = jobs.both('fits')
    assert together[0] == together[1]
    for name, one in alone.items():
        tolerance = dict(bf16=1e-2).get(name, 1e-3 if name in FLOAT32 else 1e-6)
        assert difference(together[0][name]['values'], one['values']) < tolerance, name


@pytest.mark.parametrize('n', [2, 3, 8])
def test_padding_is_balanced(monkeypatch, n):
    "The processes read each text at most once, and nearly the same number of tokens, padding included"
    import torch
    from fastai_tl.all import TensorTokens, TokensDL, seed_everything
    from fastai_tl.tune import data_parallel

    lengths = np.random.default_rng(0).lognormal(4, 1, 2001).astype(int).clip(1, 512)
    texts = [(TensorTokens(torch.zeros(1, k, dtype=torch.long)), 0) for k in lengths]
    dl = TokensDL(texts, bs=16, shuffle=True, num_workers=0)
    monkeypatch.setattr(data_parallel, 'n_processes', lambda: n)
    orders = []
    for number in range(n):
        monkeypatch.setattr(data_parallel, 'process_number', lambda number=number: number)
        seed_everything(0)
        orders.append(data_parallel.own_order(dl))
    rows = [i for order in orders for i in order]
    assert len(set(rows)) == len(rows) == 2001//n*n
    batches = [[lengths[order[i:i+16]] for i in range(0, len(order), 16)] for order in orders]
    padded = [sum(len(b)*b.max() for b in of_process) for of_process in batches]
    assert max(padded)/min(padded) < 1.05, padded
    steps = [sum(max(len(b)*b.max() for b in step) for step in zip(*batches)), sum(padded)/n]
    assert steps[0]/steps[1] < 1.05, steps # and in each step no process waits long for another one


# --- predictions ---

def test_predictions_are_in_order_and_without_repetitions(jobs):
    "Predictions, evaluations, losses and perplexities of 5, 7 and 20 rows are those of one process"
    alone, together = jobs.both('outputs')
    assert together[0] == together[1]
    for kind, one in alone.items():
        assert difference(together[0][kind], one) < 2e-5, kind


@pytest.mark.slow
def test_stages_of_ulmfit(jobs):
    "The losses are those of one process, files are written once and read by all, and a second call trains nothing"
    alone, together = jobs.both('ulmfit')
    assert together[0] == together[1]
    assert together[0]['files'] == alone['files']
    assert together[0]['weights'] == together[0]['first']
    for k, tolerance in ((0, 1e-5), (1, 1e-5), (2, .03)): # the head of the classifier has dropout of its own
        losses = [[row[0] for row in o['history'][k]] for o in (together[0], alone)]
        assert difference(*losses) < tolerance, losses


# --- weights that are divided among the processes ---

def largest_difference(a, b):
    "The largest difference of the weights of two processes"
    return np.abs(np.load(a['file'])-np.load(b['file'])).max()


@pytest.mark.slow
def test_divided_weights_train_like_whole_ones(jobs):
    "`fsdp` against `ddp`: weights, predictions, stages and the bundle; each process has about half of the weights"
    whole = jobs.results('divided', 2, options=dict(strategy='ddp'))
    parts = jobs.results('divided', 2, options=dict(strategy='fsdp'))
    assert parts[0].pop('bundle') == whole[0].pop('bundle') # byte by byte
    for kind, one in whole[0].items():
        for of_process in parts:
            assert largest_difference(of_process[kind], one) < 1e-9, kind # float64
            assert of_process[kind]['stages'] == one['stages'], kind
            assert difference(of_process[kind]['preds'], one['preds']) < 1e-6, kind
            assert difference(of_process[kind]['values'], one['values']) < 1e-6, kind
        assert .45 < parts[0][kind]['share'] < .6 and .45 < parts[1][kind]['share'] < .6
        assert parts[0][kind]['share_after'] == 1


@pytest.mark.slow
def test_other_fits_with_divided_weights(jobs):
    "Averages, the best epoch, clipping, accumulation, bfloat16, saved and loaded weights and moments"
    whole = jobs.results('divided_fits', 2, options=dict(strategy='ddp'))
    parts = jobs.results('divided_fits', 2, options=dict(strategy='fsdp'))
    for of_process in parts:
        assert of_process.pop('frozen_idx') == 2
    whole[0].pop('frozen_idx')
    for name, one in whole[0].items():
        for of_process in parts:
            assert largest_difference(of_process[name], one) < (1e-3 if name == 'bf16' else 1e-5), name
            assert difference(of_process[name]['values'], one['values']) < 1e-3, name


@pytest.mark.slow
def test_divided_weights_resume(jobs, tmp_path):
    "A fit with divided weights continues from the checkpoint of one with whole weights, and the other way round"
    quiet = tmp_path/'quiet'
    quiet.mkdir()
    expected = jobs.run('divided_resumed', 2, folder=quiet, options=dict(strategy='ddp'))['results'][0]
    for first, then in (('fsdp', 'ddp'), ('ddp', 'fsdp')):
        folder = tmp_path/first
        folder.mkdir()
        answer = jobs.run('divided_resumed', 2, folder=folder, options=dict(strategy=first, stop=True))
        assert answer['codes'] == [3, 3]
        answer = jobs.run('divided_resumed', 2, folder=folder, options=dict(strategy=then))
        assert answer['codes'] == [0, 0], answer['results']
        for result in answer['results']:
            assert largest_difference(result, expected) < 1e-6, (first, then)


@pytest.mark.slow
def test_what_needs_whole_weights_says_so(jobs):
    for of_process in jobs.results('divided_errors', 2):
        assert 'cache=True' in of_process['cache']
        assert 'after the `with' in of_process['save_bundle']
        assert 'Only the weights of a Transformer' in of_process['awd_lstm']


# --- files and errors ---

def test_files_are_written_once(jobs, tmp_path):
    "Log, report, checkpoint and best model: the files of one process, and the second fit finds the first one's"
    alone, together = (tmp_path/name for name in ('alone', 'together'))
    alone.mkdir()
    together.mkdir()
    one = jobs.run('files', 0, folder=alone, scale=2)['results'][0]
    answer = jobs.run('files', 2, folder=together)
    assert answer['codes'] == [0, 0], answer['results']
    two, other = answer['results']
    assert two['files'] == one['files']
    assert two['weights'] == other['weights']
    assert two['weights'] == two['first'] # all epochs were done already
    lines = [[line.count(',') for line in o['log'].splitlines()] for o in (one, two)]
    assert lines[0] == lines[1]
    assert difference(two['report'], one['report']) < 1e-3


def test_what_is_not_supported_says_so(jobs):
    for of_process in jobs.results('errors', 2):
        assert 'one process' in of_process['lr_find']


def test_an_error_in_one_process_ends_the_others(jobs):
    "The others stop at once, with an error that says what to do"
    answer = jobs.run('stopped', 2)
    assert answer['codes'] == [1, 1]
    assert answer['seconds'] < 60
    assert 'DataError: An error in one process' in answer['results'][1]
    assert 'RunError: All processes must run until the end' in answer['results'][0]


@pytest.mark.slow
@pytest.mark.parametrize('n,kills', [(2, [(0, 7), (1, 12)]), (3, [(1, 7)])])
def test_killed_processes(jobs, tmp_path, n, kills):
    "Whichever process is killed, the others stop, and the same call goes on to the same weights"
    quiet = tmp_path/'quiet'
    quiet.mkdir()
    expected = jobs.run('killed', n, folder=quiet)['results'][0]
    for number, at in kills:
        folder = tmp_path/f'{number}'
        folder.mkdir()
        answer = jobs.run('killed', n, folder=folder, options=dict(number=number, at=at))
        assert answer['codes'] == [-9 if i == number else 1 for i in range(n)]
        assert answer['seconds'] < 60
        others = [result for i, result in enumerate(answer['results']) if i != number]
        assert all('RunError: All processes must run until the end' in result for result in others)
        assert (folder/'fit.safetensors').exists()
        again = jobs.run('killed', n, folder=folder)
        assert again['codes'] == [0]*n, again['results']
        assert again['results'] == [expected]*n


@pytest.mark.slow
def test_gradients_of_three_processes(jobs):
    "20 rows in batches of 12 are 18 for three processes: the first step is that of one process"
    alone, together = jobs.both('gradients', 3)
    for kind in ('classifier', 'tagger', 'ulmfit_lm', 'ulmfit_classifier'):
        whole = np.load(alone[kind]['steps'])[0]
        for of_process in together:
            step = np.load(of_process[kind]['steps'])[0]
            assert np.linalg.norm(step-whole)/np.linalg.norm(whole) < 1e-6, kind
    assert len(np.load(together[0]['classifier']['steps'])) == 2


@pytest.mark.slow
def test_predictions_and_stages_of_three_processes(jobs):
    "The predictions are those of all rows, and the weights are the same in all processes"
    for check in ('outputs', 'stages'):
        together = jobs.results(check, 3)
        assert together[0] == together[1] == together[2]
    for kind, one in jobs.results('outputs', 0, scale=2)[0].items():
        assert difference(jobs.results('outputs', 3)[0][kind], one) < 2e-5, kind


SCRIPT = """
import json, os, sys
from small_learners import *
from fastai_tl.files import digest
learn = classifier(dict(encoder=train_tokenizer(sentences(200), 400, 'encoder')))
with learn.distributed(), learn.no_bar(), learn.no_logging():
    learn.fit(1, 1e-3)
    rows = len(learn.get_preds()[0])
weights = digest(*[p.detach().numpy().tobytes() for p in learn.model.parameters()])
with open(f"{sys.argv[1]}/{os.environ['RANK']}.json", 'w') as file:
    json.dump(dict(rows=rows, weights=weights, world=os.environ['WORLD_SIZE']), file)
"""


def launched(folder, command):
    "Run a script in two processes on a CPU; what each process wrote"
    env = clean_env(PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT/'tests')]), OMP_NUM_THREADS='1',
                    HF_HUB_OFFLINE='1', GLOO_SOCKET_IFNAME='lo')
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder/f'{rank}.json').read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize('launcher', ['accelerate launch', 'notebook_launcher'])
def test_launchers_of_accelerate(tmp_path, launcher):
    "As the how-to page names them: one model, each process with all predictions"
    from fastai_tl.processes import free_port

    script, port = tmp_path/'train.py', str(free_port())
    if launcher == 'accelerate launch':
        script.write_text(SCRIPT)
        options = ['--multi_gpu', '--num_machines', '1', '--num_processes', '2', '--main_process_port', port,
                   '--mixed_precision', 'no', '--dynamo_backend', 'no']
        command = [sys.executable, '-m', 'accelerate.commands.launch', *options, str(script), str(tmp_path)]
    else: # the imports in the notebook, the Learner in the function
        imports, work = SCRIPT.split('learn = ', 1)
        lines = ['def train():', *indent(f'learn = {work}', '    ').splitlines(),
                 'from accelerate import notebook_launcher',
                 f"notebook_launcher(train, num_processes=2, use_port={port!r})"]
        script.write_text(imports + '\n'.join(lines))
        command = [sys.executable, str(script), str(tmp_path)]
    first, second = launched(tmp_path, command)
    assert first == second
    assert first['rows'] == 2 and first['world'] == '2'
