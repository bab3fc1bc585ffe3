"""Runs that are killed with SIGKILL and started again, and files that are killed while they are written.

Each run is a fork of a process that has imported everything. It is killed at a random moment, once or more, and then
left to finish; its losses and weights must be those of a run that was left alone."""

import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

WORDS = 'the film was very good bad dull fine plot actor scene slow bright ending music long short story'.split()
KILLS = 50


def texts(n=40, seed=0):
    rng = random.Random(seed)
    return [' '.join(rng.choice(WORDS) for _ in range(rng.choice([3, 5, 14]))) for _ in range(n)]


@contextmanager
def quiet(learn):
    with learn.no_bar(), learn.no_logging():
        yield


def figures(learn):
    "Everything that must be the same: recorded values, rates, and a digest of the weights"
    from fastai_tl.files import digest

    weights = [p.detach().contiguous().numpy().tobytes() for p in learn.model.state_dict().values()]
    return dict(
        values=[[float(o) for o in row] for row in learn.recorder.values],
        rates=[float(o) for o in learn.recorder.lrs],
        weights=digest(*weights),
    )


# --- runs: each takes a folder and returns its figures ---


def hf_gradual(folder):
    "A Transformer with gradual unfreezing and the states of its frozen layers on disk"
    from fastai_tl.all import (
        CachedPrefix,
        GradualUnfreezing,
        HFTextDataLoaders,
        ResumableFit,
        hf_classifier_learner,
        seed_everything,
    )
    from transformers import BertConfig

    seed_everything(0)
    rows = texts()
    labels = ['pos' if row.count('good') >= row.count('bad') else 'neg' for row in rows]
    valid = [i % 4 == 0 for i in range(len(rows))]
    dls = HFTextDataLoaders.from_lists(rows, labels, TOKENIZER['encoder'], valid=valid, bs=8, verbose=False)
    config = BertConfig(
        vocab_size=len(TOKENIZER['encoder']),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        pad_token_id=TOKENIZER['encoder'].pad_token_id,
    )
    learn = hf_classifier_learner(dls, config, metrics=[], path=folder)
    cache = CachedPrefix(where='disk', folder=folder / 'cache', optional=True, verbose=False)
    cbs = [ResumableFit(folder / 'checkpoint.safetensors'), GradualUnfreezing(every=1), cache]
    with quiet(learn):
        learn.fit_one_cycle(6, 1e-2, cbs=cbs)
    return figures(learn)


def ulmfit_both(folder):
    "The three stages of ULMFiT in both directions"
    import pandas as pd
    from fastai_tl.all import ULMFiT
    from fastai_tl.files import digest

    rows = texts(60)
    df = pd.DataFrame(dict(text=rows, label=['pos' if ' good ' in f' {row} ' else 'neg' for row in rows]))
    sizes = dict(emb_sz=16, n_hid=24, n_layers=2)
    run = ULMFiT(folder, config=sizes, bidirectional=True, progress=False, min_freq=1, seq_len=20)
    run.pretrain(rows[::2], epochs=2, lr=1e-2, bs=8)
    run.finetune_lm(df, epochs=2, lr=1e-2, bs=8)
    both = run.classifier(df, epochs=[1, 1, 1, 1], lr=5e-2, bs=16)
    weights = [
        p.detach().numpy().tobytes()
        for learn in (both.forward, both.backward)
        for p in learn.model.state_dict().values()
    ]
    history = [
        run.history(stage, direction).to_dict('list')
        for stage in ('general', 'domain', 'classifier')
        for direction in ('forward', 'backward')
    ]
    return dict(weights=digest(*weights), history=history)


def seq2seq(folder):
    "An encoder-decoder"
    from fastai_tl.all import HFSeq2SeqDataLoaders, ResumableFit, hf_seq2seq_learner, seed_everything
    from transformers import T5Config

    seed_everything(0)
    tok = TOKENIZER['seq2seq']
    rows = texts(32)
    dls = HFSeq2SeqDataLoaders.from_lists(rows, rows[::-1], tok, valid=[i > 25 for i in range(32)], bs=4, verbose=False)
    config = T5Config(
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_decoder_layers=1,
        num_heads=2,
        vocab_size=len(tok),
        pad_token_id=tok.pad_token_id,
        eos_token_id=tok.eos_token_id,
        decoder_start_token_id=tok.pad_token_id,
    )
    learn = hf_seq2seq_learner(dls, config, metrics=[], path=folder)
    with quiet(learn):
        learn.fit_one_cycle(5, 1e-2, cbs=ResumableFit(folder / 'checkpoint.safetensors'))
    return figures(learn)


def quickstart(folder):
    "A quickstart with a table, as the command line runs it"
    import pandas as pd
    from fastai_tl.quickstart.run import run_quickstart

    data = folder.parent / 'data.csv'
    rows = texts(60, seed=3)
    if not data.exists():
        labels = ['pos' if row.count('good') >= row.count('bad') else 'neg' for row in rows]
        pd.DataFrame(dict(text=rows, label=labels)).to_csv(data, index=False)
    sizes = dict(
        config=dict(emb_sz=16, n_hid=16, n_layers=1),
        lm=dict(epochs=1, bs=8),
        epochs=[1, 1, 1],
        rates=[0.05],
        scratch_rates=[0.05],
        domain_tokens=300,
    )
    summary = run_quickstart(folder, data, lang='zh-tw', progress=False, **sizes)
    return {name: summary[name] for name in ('accuracy', 'table', 'chosen', 'best')}


RUNS = dict(hf_gradual=hf_gradual, ulmfit_both=ulmfit_both, seq2seq=seq2seq)
TOKENIZER = {}


# --- a run in a fork, with kills ---


def start(run, folder, kill_at=None):
    "Run in a fork; `kill_at`: die before this event of the file system. Returns its process id"
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        if kill_at is not None:
            die_before(kill_at, folder)
        result = run(folder)
        (folder.parent / f'{folder.name}.result').write_text(json.dumps(result))
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


EVENTS = ('open', 'os.rename', 'os.mkdir', 'os.remove', 'os.rmdir', 'shutil.rmtree', 'ctypes.dlsym')


def die_before(n, folder):
    "Kill this process before the n-th event of the file system that concerns the folder"
    seen = [0]
    name = str(folder.parent)

    def hook(event, args):
        if event in EVENTS and (event == 'ctypes.dlsym' or name in str(args[0])):
            seen[0] += 1
            if seen[0] == n:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def wait(pid, seconds=None):
    "Wait for a run, or kill it after some seconds; return whether it was killed"
    if seconds is not None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                break
            time.sleep(0.003)
        else:
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
    else:
        _, status = os.waitpid(pid, 0)
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
        raise SystemExit('a run failed by itself')
    return os.WIFSIGNALED(status)


def result_of(folder):
    return json.loads((folder.parent / f'{folder.name}.result').read_text())


def stale(folder):
    "Temporary files that are left"
    return [p.name for p in folder.rglob('.*') if p.name.endswith(('.part', '.old'))]


def try_run(name, run, kills, root, rng):
    "Kill a run `kills` times, each time a new one, and let it finish"
    whole = root / f'{name}-whole'
    whole.mkdir()
    begin = time.perf_counter()
    wait(start(run, whole))
    seconds = time.perf_counter() - begin
    expected = result_of(whole)
    same = killed = left = 0
    for i in range(kills):
        folder = root / f'{name}-{i}'
        folder.mkdir()
        while not wait(start(run, folder), rng.uniform(0.02, 0.95) * seconds):
            shutil.rmtree(folder)  # it had ended before the kill
            folder.mkdir()
        killed += 1
        if i % 3 == 0:  # a second kill, in the resumed run
            killed += wait(start(run, folder), rng.uniform(0.02, 0.8) * seconds)
        wait(start(run, folder))
        same += result_of(folder) == expected
        left += bool(stale(folder))
        shutil.rmtree(folder)
        print(f'{name}: {same} of {i + 1} the same', flush=True)
    return dict(killed_runs=kills, kills=killed, same=same, with_stale_files=left, seconds=round(seconds, 2))


# --- files that are killed while they are written ---


def kill_each_event(write, check, folder, most=400, every=1):
    "Kill `write` before each event of the file system; `check` what is there, and again after a whole `write`"
    lost = []
    left = 0
    n = 1

    def run(folder):
        write(folder)

    while n < most:
        killed = wait(start(run, folder, kill_at=n))
        try:
            check(folder)
            write(folder)
            check(folder)
        except Exception as error:
            lost.append(f'event {n}: {type(error).__name__}: {error}'[:200])
        left += bool(stale(folder.parent))
        if not killed:
            break
        n += every
    return dict(kills=n - 1 if every == 1 else n // every, lost=lost, with_stale_files=left)


def bundles(root):
    "`save_bundle` over an older bundle, with a file of somebody else in it"
    import torch
    from fastai_tl.all import HFTextDataLoaders, hf_classifier_learner, load_bundle, seed_everything
    from transformers import BertConfig

    seed_everything(0)
    tok = TOKENIZER['encoder']
    dls = HFTextDataLoaders.from_lists(texts(), ['a', 'b'] * 20, tok, bs=8, verbose=False)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    learn = hf_classifier_learner(dls, BertConfig(vocab_size=len(tok), pad_token_id=tok.pad_token_id, **sizes))
    folder = root / 'bundle'
    learn.save_bundle(folder)
    (folder / 'README.md').write_text('mine')
    (folder / '.git').mkdir()
    (folder / '.git' / 'config').write_text('mine')
    expected = torch.tensor(load_bundle(folder, verbose=False).predict_proba(texts(3)))

    def check(folder):
        got = torch.tensor(load_bundle(folder, verbose=False).predict_proba(texts(3)))
        assert torch.equal(got, expected), 'another model'
        mine = [folder, *folder.parent.glob('.bundle.*.old')]
        assert any((o / 'README.md').exists() for o in mine), 'README.md is lost'
        assert any((o / '.git' / 'config').exists() for o in mine), '.git is lost'

    return kill_each_event(lambda f: learn.save_bundle(f), check, folder)


def token_cache(root):
    "The cache of tokens"
    from fastai_tl.all import tokenize_texts_once

    rows = texts(30)
    expected = list(map(list, tokenize_texts_once(rows)))
    folder = root / 'tokens' / 'cache'

    def write(folder):
        shutil.rmtree(folder, ignore_errors=True)
        tokenize_texts_once(rows, cache_dir=folder)

    def check(folder):
        assert list(map(list, tokenize_texts_once(rows, cache_dir=folder))) == expected

    folder.parent.mkdir()
    return kill_each_event(write, check, folder)


def encoders(root):
    "An encoder over an older one"
    from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_lm_config
    from fastai.text.models.core import get_language_model
    from fastai_tl.all import Encoder

    sizes = dict(emb_sz=8, n_hid=12, n_layers=1)
    model = get_language_model(AWD_LSTM, 30, {**awd_lstm_lm_config, **sizes})
    encoder = Encoder.from_model(model, [f'w{i}' for i in range(30)])
    file = root / 'encoders' / 'encoder.safetensors'
    encoder.save(file)

    def check(file):
        assert Encoder.load(file).digest == encoder.digest

    return kill_each_event(lambda f: encoder.save(f) and None, check, file)


def reports(root):
    "A report over an older one"
    import numpy as np
    from fastai_tl.all import Evaluation

    rng = np.random.default_rng(0)
    probs = rng.random(40)
    ev = Evaluation.from_preds(np.stack([probs, 1 - probs], 1), rng.integers(0, 2, 40), ['a', 'b'])
    folder = root / 'reports' / 'report'
    ev.save(folder, figures=['confusion_matrix'], dpi=30)
    files = {p.name for p in folder.iterdir()}

    def write(folder):
        ev.save(folder, figures=['confusion_matrix'], dpi=30)

    def check(folder):
        assert {p.name for p in folder.iterdir()} == files
        json.loads((folder / 'scores.json').read_text())

    return kill_each_event(write, check, folder)


WRITES = dict(save_bundle=bundles, token_cache=token_cache, encoder=encoders, report=reports)


def prepare():
    "Import what the runs need, and train the tokenizers, once for all forks"
    import warnings

    import torch
    import fastai.text.all  # noqa: F401
    import fastai_tl.all
    import fastai_tl.quickstart.run  # noqa: F401

    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    for kind in ('encoder', 'seq2seq'):
        TOKENIZER[kind] = fastai_tl.all.train_tokenizer(texts(200, seed=1), 300, kind)


def trial(args):
    "Kill runs and writes; returns the figures"
    prepare()
    rng = random.Random(0)
    n_of_run = dict(zip(RUNS, (args.kills - 2 * (args.kills // 3), args.kills // 3, args.kills // 3)))
    found = dict(runs={}, writes={})
    with tempfile.TemporaryDirectory() as d:
        root = Path(d)
        for name, make in WRITES.items():
            if not re.search(args.only, name):
                continue
            found['writes'][name] = make(root)
            print(name, found['writes'][name], flush=True)
        for name, run in RUNS.items():
            if not re.search(args.only, name):
                continue
            found['runs'][name] = try_run(name, run, n_of_run[name], root, rng)
        if args.quickstarts and re.search(args.only, 'quickstart'):
            found['runs']['quickstart'] = try_run('quickstart', quickstart, args.quickstarts, root, rng)
    runs = [o for name, o in found['runs'].items() if name in RUNS]
    found['summary'] = dict(
        killed_runs=sum(o['killed_runs'] for o in runs),
        same_bit_for_bit=sum(o['same'] for o in runs),
        kills_of_writes=sum(o['kills'] for o in found['writes'].values()),
        lost=sum(len(o['lost']) for o in found['writes'].values()),
        with_stale_files=sum(o['with_stale_files'] for o in [*runs, *found['writes'].values()]),
    )
    return found
