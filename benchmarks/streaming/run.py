"""Language model text on the disk (`tokenize_to_file`, `hf_streamed_lm_dls`, `streamed_lm_dls`): time, memory, kills.

    python benchmarks/streaming/run.py [--only kills sizes loader format] [--mb 10 40 160] [--kills 30] [--json FILE]

The texts are sentences of the package's offline English corpora in random order, about 150 characters each, in one file
of JSON lines.

- kills: a process that tokenizes is killed with SIGKILL after a random time, again and again, and the rest is done by
  one that is left alone; a process that reads the batches of two epochs and writes each one down is killed and
  continued in the same way. What they end with is compared with a quiet run, token by token.
- sizes: for each size one process tokenizes with a byte-level BPE of 8,000 tokens in two processes, and another reads
  all training batches of one epoch. Seconds, and the peak of the resident memory (VmHWM) above that after the imports;
  for the tokenizing process also that of its largest child.
- loader: tokens a second of `StreamedLMDataLoader` and of fastai's `LMDataLoader` with the same tokens as tensors in
  memory, in turn, with the same batch size; epochs with shuffling.
- format: microseconds to read one shuffle block (262,144 tokens) and one block of 512 tokens at random places, from a
  plain file (mapped, and with `pread`) and from an Arrow file (mapped), as a NumPy array of its own."""

import json
import os
import random
import resource
import signal
import statistics as st
import subprocess
import sys
import tempfile
import time
from hashlib import blake2b
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import interleave, memory_mb, offline, parser, ratio, write_json

HERE = Path(__file__).resolve()


def write_corpus(file, mb, seed=0):
    "Write sentences of the offline corpora in random order as JSON lines, about `mb` megabytes of text"
    from fastai_tl.all import docstring_corpus, general_corpus

    every = [*docstring_corpus().text, *general_corpus().text]
    sentences = [s for text in every for s in text.split('. ') if s.strip()]
    rng, n = random.Random(seed), 0
    with open(file, 'w', encoding='utf-8') as out:
        while n < mb * 1_000_000:
            text = '. '.join(rng.choices(sentences, k=2))
            n += len(text)
            out.write(json.dumps(dict(text=text)) + '\n')


def tokenizer_of(folder):
    "A small BPE, saved once"
    from fastai_tl.all import docstring_corpus, train_tokenizer

    if not (folder / 'tokenizer').exists():
        tokenizer = train_tokenizer(docstring_corpus().text[:3000], 8000, 'decoder')
        tokenizer.save_pretrained(folder / 'tokenizer')
    return folder / 'tokenizer'


def digest_of(folder):
    "Digest of the tokens and of their ends"
    return blake2b((folder / 'tokens.bin').read_bytes() + (folder / 'ends.bin').read_bytes()).hexdigest()


# --- kills ---


def killed(work, seconds):
    "Run `work` in a forked process; kill it after some seconds, if there are any; True if it was killed"
    pid = os.fork()
    if not pid:
        work()
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
        raise SystemExit('a run failed by itself')
    return os.WIFSIGNALED(status)


def kills(folder, n):
    from fastai_tl.all import hf_streamed_lm_dls, tokenize_to_file
    from fastai_tl.data import token_files
    from fastai_tl.data.token_files import TokenFile

    token_files._SECONDS = 0.1
    source, tok = folder / 'kills.jsonl', tokenizer_of(folder)
    write_corpus(source, 8)

    def tokenize(name):
        tokenize_to_file(source, folder / name, tok, n_workers=2)

    start = time.perf_counter()
    killed(lambda: tokenize('quiet'), None)
    quiet = time.perf_counter() - start
    rng, n_killed = random.Random(0), 0
    runs, wrong = 0, 0
    while n_killed < n // 2:
        runs += 1
        name = f'killed{runs}'
        for _ in range(5):
            if (folder / name / 'header.json').exists():
                break
            n_killed += killed(lambda name=name: tokenize(name), rng.uniform(0.05, quiet / 2))
        killed(lambda name=name: tokenize(name), None)
        wrong += digest_of(folder / name) != digest_of(folder / 'quiet')
    res = dict(tokenizing=dict(kills=n_killed, corpora=runs, other_than_quiet=wrong,
                               tokens=TokenFile(folder / 'quiet').n_tokens))

    def read(log):
        "Read two epochs and write down each batch, and then where the loader is"
        dls = hf_streamed_lm_dls(TokenFile(folder / 'quiet'), tok, max_length=128, bs=16)
        lines = log.read_text().split('\n')[:-1] if log.exists() else []
        if lines:
            dls.train.load_state_dict(json.loads(lines[-1])['state'])
        with open(log, 'r+' if log.exists() else 'w') as out:
            out.truncate(sum(len(line) + 1 for line in lines)) # a line that was cut by the kill
            out.seek(0, 2)
            while dls.train.epoch < 2:
                for x, y in dls.train:
                    batch = blake2b(x.numpy().tobytes() + y.numpy().tobytes()).hexdigest()[:16]
                    out.write(json.dumps(dict(batch=batch, n=y.numel(), state=dls.train.state_dict())) + '\n')
                    out.flush()

    start = time.perf_counter()
    killed(lambda: read(folder / 'quiet.log'), None)
    seconds = time.perf_counter() - start
    n_killed = 0
    while n_killed < n - n // 2:
        n_killed += killed(lambda: read(folder / 'killed.log'), rng.uniform(0.05, seconds / 8))
        lines = (folder / 'killed.log').read_text().split('\n') if (folder / 'killed.log').exists() else []
        if len(lines) > 1 and json.loads(lines[-2])['state']['epoch'] >= 1 and n_killed < n - n // 2:
            seconds /= 1.5 # so that the kills come before the end
    killed(lambda: read(folder / 'killed.log'), None)
    logs = [[json.loads(line) for line in (folder / f'{name}.log').read_text().splitlines()]
            for name in ('quiet', 'killed')]
    batches = [[line['batch'] for line in log] for log in logs]
    res['reading'] = dict(kills=n_killed, batches=len(batches[0]), tokens=sum(line['n'] for line in logs[0]),
                          lost=len(set(batches[0]) - set(batches[1])),
                          doubled=len(batches[1]) - len(set(batches[1])), same_order=batches[0] == batches[1])
    return res


# --- sizes ---


def child(name, folder, *args):
    "Run a function of this file in a process of its own and return what it prints"
    out = subprocess.run([sys.executable, str(HERE), '--child', name, str(folder), *map(str, args)], text=True,
                         stdout=subprocess.PIPE, check=True).stdout
    return json.loads(out.splitlines()[-1])


def child_tokenize(folder, mb):
    from fastai_tl.all import load_tokenizer, tokenize_to_file

    tok = load_tokenizer(folder / 'tokenizer')
    before, start = memory_mb('VmHWM'), time.perf_counter()
    file = tokenize_to_file(folder / f'{mb}.jsonl', folder / f'tokens{mb}', tok, n_workers=2)
    seconds = time.perf_counter() - start
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return dict(tokens=file.n_tokens, seconds=round(seconds, 1), imports_mb=round(before),
                more_mb=round(memory_mb('VmHWM') - before), child_mb=round(largest),
                file_mb=round(file.tokens.nbytes / 1e6, 1))


def child_read(folder, mb):
    from fastai_tl.all import TokenFile, hf_streamed_lm_dls, load_tokenizer

    tok = load_tokenizer(folder / 'tokenizer')
    before = memory_mb('VmHWM')
    dls = hf_streamed_lm_dls(TokenFile(folder / f'tokens{mb}'), tok, max_length=512, bs=16)
    start = time.perf_counter()
    n = sum(y.numel() for _, y in dls.train)
    seconds = time.perf_counter() - start
    return dict(tokens=n, seconds=round(seconds, 2), million_tokens_a_second=round(n / seconds / 1e6, 1),
                more_mb=round(memory_mb('VmHWM') - before))


def sizes(folder, mbs):
    tokenizer_of(folder)
    res = {}
    for mb in mbs:
        write_corpus(folder / f'{mb}.jsonl', mb)
        res[f'{mb} MB'] = dict(tokenize=child('tokenize', folder, mb), read=child('read', folder, mb))
        print(mb, res[f'{mb} MB'], flush=True)
    return res


def draw(measured, file):
    "Draw seconds and memory of `sizes`"
    from fastai_tl.all import plot_panels, save_png

    x = [int(name.split()[0]) for name in measured]
    values = {name: [[row[name][key] for row in measured.values()] for key in ('seconds', 'more_mb')]
              for name in ('tokenize', 'read')}
    labels = dict(tokenize='tokenizing, two processes', read='reading one epoch')
    panels = {title: {labels[name]: (x, both[i]) for name, both in values.items()}
              for i, title in enumerate(('Time', 'Memory above that of the imports'))}
    save_png(plot_panels(panels, 'Size of the text, MB', ('seconds', 'MB')), file, dpi=120)


# --- loader ---


def loader(folder, rounds=3, bs=64, seq_len=72):
    import torch
    from fastai.text.data import LMDataLoader
    from fastai_tl.all import streamed_lm_dls, tokenize_to_file

    write_corpus(folder / 'loader.jsonl', 5)
    file = tokenize_to_file(folder / 'loader.jsonl', folder / 'words')
    dls = streamed_lm_dls(file, bs=bs, seq_len=seq_len)
    ours = dls.train
    ids = torch.from_numpy(ours.stream.numbers[file.read(0, file.n_tokens)].astype('int64'))
    texts = [(text,) for text in ids.tensor_split(torch.from_numpy(file.ends[:-1].copy()))]
    texts = [texts[i] for i in sorted(ours.stream.text_order())]
    theirs = LMDataLoader(texts, lens=[len(text) for text, in texts], bs=bs, seq_len=seq_len, shuffle=True)
    n = [sum(y.numel() for _, y in dl) for dl in (ours, theirs)]
    assert n[0] == n[1], n
    times = interleave(dict(ours=lambda: sum(1 for _ in ours), theirs=lambda: sum(1 for _ in theirs)), rounds)
    return dict(tokens=n[0], streamed_million_a_second=round(n[0] / st.median(times['ours']) / 1e6, 2),
                in_memory_million_a_second=round(n[0] / st.median(times['theirs']) / 1e6, 2),
                speed=ratio(times['theirs'], times['ours']))


# --- format ---


def format_of_files(folder, n_tokens=20_000_000, n=400):
    import mmap

    import numpy as np
    import pyarrow as pa

    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 8000, n_tokens).astype('<u2')
    tokens.tofile(folder / 'plain.bin')
    with pa.OSFile(str(folder / 'tokens.arrow'), 'wb') as sink, pa.ipc.new_file(
        sink, pa.schema([('ids', pa.uint16())])
    ) as writer:
        for start in range(0, n_tokens, 1 << 20):
            writer.write_batch(pa.record_batch([pa.array(tokens[start:start + (1 << 20)])], ['ids']))
    with open(folder / 'plain.bin', 'rb') as file:
        mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), '<u2')
    handle = os.open(folder / 'plain.bin', os.O_RDONLY)
    column = pa.ipc.open_file(pa.memory_map(str(folder / 'tokens.arrow'))).read_all()['ids']
    readers = dict(
        mapped=lambda a, k: mapped[a:a + k].copy(),
        pread=lambda a, k: np.frombuffer(os.pread(handle, 2 * k, 2 * a), '<u2'),
        arrow=lambda a, k: column.slice(a, k).to_numpy().copy(),
    )
    res = {}
    for k in (512, 1 << 18):
        starts = rng.integers(0, n_tokens - k, n)
        for read in readers.values():
            assert (read(int(starts[0]), k) == tokens[starts[0]:starts[0] + k]).all()
        work = {name: lambda read=read: [read(int(a), k) for a in starts] and None for name, read in readers.items()}
        times = interleave(work, 5)
        res[f'{k} tokens'] = {name: round(st.median(t) / n * 1e6, 2) for name, t in times.items()}
    return res


def main():
    if '--child' in sys.argv:
        name, folder, mb = sys.argv[2:5]
        print(json.dumps(dict(tokenize=child_tokenize, read=child_read)[name](Path(folder), mb)))
        return
    ap = parser(__doc__, 'json', 'threads')
    ap.add_argument('--only', nargs='*', default=['kills', 'format', 'loader', 'sizes'])
    ap.add_argument('--mb', nargs='*', type=int, default=[10, 40, 160])
    ap.add_argument('--kills', type=int, default=30)
    args = ap.parse_args()
    res = {}
    work = dict(kills=lambda f: kills(f, args.kills), sizes=lambda f: sizes(f, args.mb), loader=loader,
                format=format_of_files)
    with tempfile.TemporaryDirectory() as folder:
        for name in args.only:
            res[name] = work[name](Path(folder))
            if name == 'sizes' and args.json:
                draw(res[name], args.json.with_suffix('.png'))
            print(name, json.dumps(res[name]), flush=True)
            write_json(args.json, res)


if __name__ == '__main__':
    offline()
    main()
