"""Hostile bundles: what `load_bundle` does with hundreds of them.

    python benchmarks/trust/run.py hostile --json benchmarks/trust/results/hostile.json
    python benchmarks/trust/run.py hostile --only 'num_hidden_layers' --verbose

Each bundle of `kinds.py` is loaded and used in a process of its own, which may take 20 seconds and 3 GiB. Counted are
processes in which code of the bundle ran, files outside the bundle that were read or written, errors of other
libraries than fastai_tl, and processes that took too long or too much memory.
"""

import ctypes
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
from common import offline, parser, write_json

SECONDS, GIB = 20, 3
TEXTS = ['alpha good nice.', 'beta bad awful awful of the.', 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!']


# --- good bundles ---


def make_bases(folder):
    "Write the good bundles that the kinds change"
    import numpy as np
    from fastai.text.all import L
    from fastai_tl.all import (
        HFCausalLMDataLoaders,
        HFTagDataLoaders,
        HFTextDataLoaders,
        awd_classifier_learner,
        classifier_dls,
        hf_causal_lm_learner,
        hf_classifier_learner,
        hf_tagger_learner,
        texts_vocab,
        tokenize_texts_once,
        train_tokenizer,
    )
    from kinds import WORDS
    from transformers import BertConfig, GPT2Config

    rng = np.random.default_rng(0)
    texts = [' '.join(rng.choice(WORDS, rng.integers(1, 30))).capitalize() + '.' for _ in range(60)]
    labels, valid = ['ab'[len(t) % 2] for t in texts], [i >= 40 for i in range(60)]
    tok = train_tokenizer(texts, 400)
    config = BertConfig(
        vocab_size=len(tok),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        pad_token_id=tok.pad_token_id,
    )
    dls = HFTextDataLoaders.from_lists(texts, labels, tok, valid=valid, max_length=32, bs=8, verbose=False)
    hf_classifier_learner(dls, config).save_bundle(folder / 'hf')
    tokens = tokenize_texts_once(texts, progress=False)
    rows = list(range(60))
    dls = classifier_dls(tokens, labels, 'classification', rows[:40], rows[40:], texts_vocab(tokens, min_freq=1), bs=8)
    awd_classifier_learner(dls, 'classification', 2, dict(emb_sz=16, n_hid=24, n_layers=2)).save_bundle(folder / 'awd')
    gpt2 = GPT2Config(
        vocab_size=len(tok), n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    hf_causal_lm_learner(HFCausalLMDataLoaders.from_texts(texts, tok, max_length=16), gpt2).save_bundle(folder / 'lm')
    words = L(t.split() for t in texts)
    tags = [['B-A' if w.startswith('a') else 'O' for w in ws] for ws in words]
    dls = HFTagDataLoaders.from_lists(words, tags, tok, valid=valid, bs=8)
    hf_tagger_learner(dls, config).save_bundle(folder / 'tags')


def use(folder):
    "Load a bundle and use it once"
    from fastai_tl.deploy.bundle import load_bundle

    loaded = load_bundle(folder, verbose=False)
    if hasattr(loaded, 'predict_iter'):
        return repr(loaded.predict(TEXTS).probs.tolist())
    if loaded.dls.spec.task == 'tagging':
        return repr(loaded.tag(TEXTS))
    generated = loaded.generate(TEXTS[0], max_new_tokens=4, seed=0)
    return repr((float(loaded.perplexity(TEXTS[:2])), generated[0].text))


# --- one bundle in a process of its own ---

WRITES = (
    'os.remove',
    'os.rename',
    'os.mkdir',
    'os.rmdir',
    'os.link',
    'os.symlink',
    'os.truncate',
    'os.chmod',
    'shutil.move',
)
RUNS = (
    'subprocess.Popen',
    'os.system',
    'os.exec',
    'os.posix_spawn',
    'os.spawn',
    'os.fork',
    'pickle.find_class',
    'socket.connect',
    'socket.getaddrinfo',
)


def watch(folder, report):
    "Note what this process opens, writes and runs outside of a bundle"
    readable = [
        str(folder),
        sys.prefix,
        sys.base_prefix,
        str(Path(__file__).parents[2]),
        '/proc',
        '/sys',
        '/dev',
        '/usr',
        '/lib',
        '/etc/ld.so',
        '/etc/localtime',
        '/etc/mime.types',
    ]

    def hook(event, args):
        if event in RUNS:
            report['ran'].append(f'{event} {args!r}'[:200])
        elif event in WRITES:
            report['written'].append(f'{event} {args!r}'[:200])
        elif event == 'open' and isinstance(args[0], (str, bytes)):
            path = os.path.abspath(os.fsdecode(args[0]))
            is_read = not (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            if not is_read and path != '/dev/null':
                report['written'].append(path)
            elif is_read and not path.startswith(tuple(readable)):
                report['read'].append(path)

    sys.addaudithook(hook)


def try_in_child(folder, pipe):
    "Use a bundle, and write what happened into a pipe"
    from fastai_tl.core import FastaiTLError

    report = dict(read=[], written=[], ran=[])
    null = os.open('/dev/null', os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    limit = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize() + (GIB << 30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    start = time.perf_counter()
    watch(folder, report)
    try:
        report['result'] = use(folder)
        report['outcome'] = 'loaded'
    except FastaiTLError as e:
        report['outcome'] = 'refused'
        report['error'] = f'{type(e).__name__}: {e.message}'
    except BaseException as e:
        report['outcome'] = 'foreign'
        where = traceback.extract_tb(e.__traceback__)[-1]
        own = [
            f'{Path(f.filename).name}:{f.lineno}'
            for f in traceback.extract_tb(e.__traceback__)
            if 'fastai_tl' in f.filename
        ]
        report['error'] = f'{type(e).__name__}: {e}'[:300] + f' at {where.filename}:{where.lineno}, from {own[-3:]}'
    report['seconds'] = round(time.perf_counter() - start, 2)
    report['mib'] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    report['more_mib'] = report['mib'] - (before >> 10)
    os.write(pipe, json.dumps(report, ensure_ascii=True).encode())


class Watched:
    "Notes of the kernel about each access to the files of a folder, by any library"

    def __init__(self, folder):
        libc = ctypes.CDLL('libc.so.6', use_errno=True)
        self.fd = libc.inotify_init1(os.O_NONBLOCK)
        accessed, modified, opened, created = 0x1, 0x2, 0x20, 0x100
        libc.inotify_add_watch(self.fd, str(folder).encode(), accessed | modified | opened | created)

    def names(self):
        "Return the names of files that were opened, read, written or made, and close"
        try:
            data = os.read(self.fd, 1 << 16)
        except BlockingIOError:
            data = b''
        os.close(self.fd)
        return sorted(set(re.findall(rb'[\w.-]+\.\w+|pwned', data)))


def wait_for(pid, pipe):
    "Read what a child reports, within the time limit; the report, or why there is none"
    data, end = b'', time.time() + SECONDS
    os.set_blocking(pipe, False)
    while time.time() < end:
        try:
            part = os.read(pipe, 1 << 16)
            data += part
            if not part:
                break
        except BlockingIOError:
            time.sleep(0.02)
    else:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    os.close(pipe)
    if data:
        return json.loads(data)
    is_late = time.time() >= end
    outcome = 'too slow' if is_late else 'died'
    return dict(
        outcome=outcome, error=f'status {status}', read=[], written=[], ran=[], seconds=SECONDS, mib=0, more_mib=0
    )


def try_kind(name, bases, base, change):
    "Make a hostile bundle, and use it in a child process"
    with tempfile.TemporaryDirectory() as d:
        folder, outside = Path(d) / 'bundle', Path(d) / 'outside'
        shutil.copytree(bases / base, folder)
        outside.mkdir()
        for file in ('secret.json', 'vocab.txt', 'weights.safetensors', 'w.bin'):
            (outside / file).write_text('{}')
        change(folder, outside)
        watched = Watched(outside)
        read, write = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(read)
            try:
                try_in_child(folder, write)
            finally:
                os._exit(0)
        os.close(write)
        report = wait_for(pid, read)
        report['read'] += [f'outside/{os.fsdecode(n)}' for n in watched.names()]
        report['ran'] += ['payload'] if (outside / 'pwned').exists() else []
        names = [str(folder), *(p.name for p in folder.rglob('*'))]
        report['names_a_file'] = any(n in report.get('error', '') for n in names)
    return dict(kind=name, **report)


# --- all bundles ---


def summary(reports):
    "Count what happened"
    outcomes = Counter(r['outcome'] for r in reports)
    return dict(
        kinds=len(reports),
        refused=outcomes['refused'],
        loaded=outcomes['loaded'],
        code_run=sum(bool(r['ran']) for r in reports),
        read_outside=sum(bool(r['read']) for r in reports),
        written=sum(bool(r['written']) for r in reports),
        foreign_errors=outcomes['foreign'],
        died=outcomes['died'],
        too_slow=outcomes['too slow'],
        too_much_memory=sum(r['mib'] > GIB << 10 for r in reports),
        refused_without_a_file_name=sum(r['outcome'] == 'refused' and not r['names_a_file'] for r in reports),
        most_seconds=max(r['seconds'] for r in reports),
        most_mib=max(r['mib'] for r in reports),
        most_mib_added=max(r['more_mib'] for r in reports),
    )


def is_bad(r):
    return (
        r['outcome'] in ('foreign', 'died', 'too slow') or r['ran'] or r['read'] or r['written'] or r['mib'] > GIB << 10
    )


def hostile(args):
    "Try all kinds of hostile bundle"
    import torch
    from kinds import KINDS

    torch.set_num_threads(1)
    chosen = {name: o for name, o in [*KINDS.items()][:: args.every] if re.search(args.only, name)}
    reports = []
    end = time.time() + 60 * args.minutes
    with tempfile.TemporaryDirectory() as d:
        make_bases(Path(d))
        for base in ('hf', 'awd', 'lm', 'tags'):
            use(Path(d) / base)  # imports what loading needs, once for all children
        for i, (name, (base, change)) in enumerate(chosen.items()):
            if time.time() > end:
                break
            report = try_kind(name, Path(d), base, change)
            reports.append(report)
            if args.verbose or is_bad(report):
                found = [report['outcome'], report.get('error', ''), report['read'], report['written'], report['ran']]
                print(f'{name}: ', *found, f"{report['seconds']} s, {report['mib']} MiB", flush=True)
            elif i % 50 == 0:
                print(f'{i} of {len(chosen)}', flush=True)
    total = summary(reports)
    print(json.dumps(total, indent=1))
    versions = {name: __import__(name).__version__ for name in ('torch', 'transformers', 'tokenizers', 'safetensors')}
    write_json(
        args.json,
        dict(
            summary=total,
            every=args.every,
            versions=versions,
            limits=dict(seconds=SECONDS, gib=GIB),
            outcomes={r['kind']: r['outcome'] for r in reports},
            bad=[r for r in reports if is_bad(r)],
        ),
    )


def in_threads(args):
    "Share Learners between threads, and the folder of a run between processes"
    from threads import threads

    threads(args)


def saved_trial(module, args):
    "Run a trial that is a module of its own, and write its figures"
    import importlib

    found = importlib.import_module(module).trial(args)
    print(json.dumps(found['summary'], indent=1))
    if args.json:
        write_json(args.json, found)


TRIALS = dict(
    hostile=hostile,
    threads=in_threads,
    kill=lambda args: saved_trial('kill', args),
    disk=lambda args: saved_trial('disk', args),
    fuzz=lambda args: saved_trial('fuzz', args),
    time=lambda args: saved_trial('times', args),
)

if __name__ == '__main__':
    offline()
    ap = parser(__doc__, 'json')
    ap.add_argument('trial', choices=TRIALS)
    ap.add_argument('--only', default='', help='regular expression that the names of kinds must match')
    ap.add_argument('--every', type=int, default=1, help='try each n-th kind only')
    ap.add_argument('--minutes', type=float, default=60, help='stop after so many minutes')
    ap.add_argument('--repeats', type=int, default=25, help='how often each call is made in threads')
    ap.add_argument('--kills', type=int, default=50, help='runs that are killed')
    ap.add_argument('--quickstarts', type=int, default=3, help='quickstarts that are killed')
    ap.add_argument('--calls', type=int, default=20_000, help='calls with wrong arguments')
    ap.add_argument('--jobs', type=int, default=2, help='processes that make calls')
    ap.add_argument('--seed', type=int, default=0, help='seed of the wrong arguments')
    ap.add_argument('--valid', action='store_true', help='only make the valid calls')
    ap.add_argument('--resume', type=Path, help='folder of outcomes; only the calls that it lacks are made')
    ap.add_argument('--verbose', action='store_true', help='print the outcome of each kind')
    args = ap.parse_args()
    TRIALS[args.trial](args)
