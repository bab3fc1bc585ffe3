#!/usr/bin/env python
"""What it is worth to compute frozen layers once: cached stages and the single-position top layer against naive
frozen epochs.

    python benchmarks/feature_cache/run.py [--data PATH] [--texts 96] [--rounds 5] [--threads 1] [--device cpu]
                                           [--json FILE] [--only NAME ...]

MiniLM (6 layers, 384 wide, the extra `minilm`; or `--model NAME`) and fastai's AWD_LSTM classifier (400/1152/3) on
movie reviews (`--data`: a folder with `train/pos` and `train/neg`, as IMDb has, or a parquet table) or, without
it, on the offline corpus; at most 128 tokens. Each line is compared with the same Learner with the same batches
and rates, frozen to the same depth, in float32, with fastai's loop and without a cache. A line is an epoch of
training (cached epochs find their states computed), or a whole stage of several epochs that includes the time of
computing the states, for the training texts (neither side has validation batches). Before that, the script
compares the logits of the whole model and of the cached one. A round runs each line once, in an order that
changes; the first round only warms up. Ratios are taken within a round."""

import platform
import random
import statistics as st
import sys
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import chosen_clock, offline, parser, quiet, ranged, ratio, seconds, set_threads, table, write_json

DATA_HELP = 'folder with train/pos/*.txt and train/neg/*.txt, or a parquet table with text, label and split'


def parse():
    ap = parser(__doc__, 'rounds', 'threads', 'device', 'cpu-time', 'json')
    ap.add_argument('--data', type=Path, help=DATA_HELP)
    ap.add_argument('--model', help='a name or folder instead of MiniLM')
    ap.add_argument('--texts', type=int, default=96, help='training texts')
    ap.add_argument('--bs', type=int, default=16)
    parts = ['epochs', 'stage', 'stages', 'awd']
    default = ['epochs', 'stages', 'awd']
    ap.add_argument('--only', nargs='+', default=default, choices=parts, help='`stage`: only the stages of 3 epochs')
    a = ap.parse_args()
    if a.rounds < 1 or a.texts < 32:
        ap.error('--rounds must be at least 1 and --texts 32')
    return a


def texts(a):
    "Texts and labels, the same for each run"
    import pandas as pd

    if a.data is None:
        from fastai_tl.all import docstring_corpus

        df = docstring_corpus(label='library')
        df = df[df.text.str.len() > 300]
    elif a.data.is_file():
        df = pd.read_parquet(a.data)
        df = df[df.split == 'train']
    else:
        files = [(p, label) for label in ('neg', 'pos') for p in sorted((a.data / 'train' / label).iterdir())]
        random.Random(0).shuffle(files)
        read = lambda p: p.read_text(encoding='utf8').replace('<br />', ' ')
        return pd.DataFrame([dict(text=read(p), label=label) for p, label in files[: a.texts + 32]])
    return df.sample(a.texts + 32, random_state=0)[['text', 'label']].reset_index(drop=True)


def minilm(a, df):
    from fastai_tl.all import HFTextDataLoaders, hf_classifier_learner, minilm_folder, seed_everything

    name = a.model or minilm_folder()
    seed_everything(0)
    df = df.assign(held=[False] * a.texts + [True] * 32)
    dls = HFTextDataLoaders.from_df(df, name, valid_col='held', max_length=128, bs=a.bs, verbose=False)
    return quiet(hf_classifier_learner(dls.to(a.device), name))


def awd(a, df):
    from fastai_tl.all import awd_classifier_learner, classifier_dls, seed_everything, texts_vocab, tokenize_texts_once

    seed_everything(0)
    toks = tokenize_texts_once([' '.join(t.split()[:110]) for t in df.text])  # about 128 tokens
    train, valid = list(range(a.texts)), list(range(a.texts, a.texts + 32))
    labels = df.label.tolist()
    dls = classifier_dls(toks, labels, 'classification', train, valid, texts_vocab(toks), bs=a.bs)
    sizes = dict(emb_sz=400, n_hid=1152, n_layers=3)
    return quiet(awd_classifier_learner(dls, 'classification', df.label.nunique(), sizes, path='.'))


class Line:
    "A Learner that trains for some epochs with the top `top` groups; it keeps the computed states if `keep`"

    def __init__(self, learn, top, bf16=False, cache=None, epochs=1, keep=True, fast=False):
        self.learn = learn
        self.epochs = epochs
        self.keep = keep
        learn.create_opt()
        learn.opt.freeze_to(-top)
        if bf16:
            learn.to_mixed_precision('bf16')
        if fast:
            learn.fast_dropout()
        self.cache = cache and cache()
        if self.cache:
            learn.add_cb(self.cache)

    def __call__(self):
        if self.cache and not self.keep:
            self.cache.forget()
        self.learn.fit(self.epochs, 1e-5)


def parity(name, line):
    "Difference of the logits of the whole model and from the kept states, on the training texts, in float32"
    import torch
    from fastai_tl.efficiency.feature_cache import draw_items

    line()
    cache = line.cache.caches['training']
    model = line.learn.model
    single = line.cache.one
    (x, *_), states = cache.batch(cache.order[:32])
    full = draw_items(line.learn.dls.train, cache.order[:32])[0].as_subclass(torch.Tensor)
    model.eval()
    first = lambda o: o[0] if isinstance(o, tuple) else o
    with torch.no_grad():
        ref = first(model(full))
        top = single if single is not None and not cache.has_vectors else torch.no_grad()
        with top, cache.prefix.replay(states.float()):
            got = first(model(x.as_subclass(torch.Tensor)))
    apart, largest = (got - ref).abs().max().item(), ref.abs().max().item()
    print(f'{name}: logits differ by {apart:.1e} (largest {largest:.2f}); kept: {cache.store}', flush=True)
    return dict(logits_differ=apart, largest_logit=largest, states=str(cache.store))


class Bench:
    "The lines to compare and the naive epochs that they are compared with"

    def __init__(self, a, df):
        self.a, self.df = a, df
        self.naive, self.lines = {}, {}
        self.peers, self.notes = {}, {}

    def add(self, name, make, top, epochs=1, **kwargs):
        "Add a cached line; its peer is a naive stage: one naive epoch, timed once and multiplied"
        key = f'{make.__name__}, {top} group{"s" if top > 1 else ""} train'
        line = Line(make(self.a, self.df), top, epochs=epochs, **kwargs)
        if key not in self.naive:
            self.naive[key] = Line(make(self.a, self.df), top)
        self.lines[name], self.peers[name] = line, (key, epochs)
        self.notes[name] = parity(name, line)

    def run(self, clock):
        "Seconds of each line and of its peer, round by round; the first round only warms up"
        units = self.naive | self.lines
        rounds = []
        for r in range(self.a.rounds + 1):
            names = list(units)
            random.Random(r).shuffle(names)
            took = {n: seconds(units[n], clock, self.a.device) for n in names}
            if r:
                rounds.append(took)
            print(f'round {r}: {sum(took.values()):.0f} s', flush=True)
        return {n: [t[n] for t in rounds] for n in units}

    def rows(self, times):
        "One dict for each line: ratios to its peer, seconds of both, and the parity"
        for name, (key, epochs) in self.peers.items():
            base = [t * epochs for t in times[key]]
            peer = f'{key}, {epochs} naive epoch{"s" if epochs > 1 else ""}'
            r = ratio(base, times[name])
            ratios = dict(median=r['ratio'], low=r['low'], high=r['high'], best=r['best'])
            yield dict(line=name, peer=peer, **ratios, seconds=times[name], peer_seconds=base, **self.notes[name])


def add_lines(bench, only):
    "The lines of the parts in `only`"
    from fastai_tl.all import CachedPrefix

    off = dict(cache=lambda: CachedPrefix(one_position=False, verbose=False))
    on = dict(cache=lambda: CachedPrefix(verbose=False))
    half = dict(on, bf16=True)
    if 'epochs' in only:
        bench.add('k=5, float32', minilm, 2, **off)
        bench.add('k=5, float32, single position', minilm, 2, **on)
        bench.add('k=5, bfloat16, single position', minilm, 2, **half)
        bench.add('k=3, float32', minilm, 4, **off)
        bench.add('k=3, bfloat16, single position', minilm, 4, **half)
    if 'stages' in only or 'stage' in only:
        stage = dict(epochs=3, keep=False)
        bench.add('k=5, float32, stage of 3 epochs', minilm, 2, **off, **stage)
        bench.add('k=5, float32, fast dropout, stage of 3 epochs', minilm, 2, **off, **stage, fast=True)
        bench.add('k=5, float32, single position, stage of 3 epochs', minilm, 2, **on, **stage)
    stage = dict(epochs=10, keep=False)
    if 'stages' in only:
        bench.add('head, float32, stage of 10 epochs', minilm, 1, **on, **stage)
        bench.add('head, bfloat16, stage of 10 epochs', minilm, 1, **half, **stage)
    if 'awd' in only:
        bench.add('AWD_LSTM head, float32, stage of 10 epochs', awd, 1, **on, **stage)
        bench.add('AWD_LSTM head, bfloat16, stage of 10 epochs', awd, 1, **half, **stage)


def cells(r):
    "A row of the printed table"
    times = f"{st.median(r['peer_seconds']):.2f}", f"{st.median(r['seconds']):.3f}"
    spread = ranged(dict(r, ratio=r['median']), digits=1)
    return [r['line'], *times, spread, f"{r['best']:.1f}", f"{r['logits_differ']:.0e}"]


def main():
    a = parse()
    offline()
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    set_threads(a.threads)
    clock = chosen_clock(a.cpu_time)
    bench = Bench(a, texts(a))
    add_lines(bench, a.only)
    rows = list(bench.rows(bench.run(clock)))
    title = f'{a.device}, {torch.get_num_threads()} thread(s), {a.texts} texts'
    columns = [title, 'naive, s:', 's:', 'median ratio (range)', 'best round to best round:', 'logits differ by:']
    print('\n' + table(columns, map(cells, rows)))
    info = dict(
        device=a.device,
        machine=platform.machine(),
        torch=version('torch'),
        threads=torch.get_num_threads(),
        texts=a.texts,
        bs=a.bs,
        rounds=a.rounds,
        data='folder' if a.data else 'offline corpus',
    )
    write_json(a.json, dict(info=info, rows=rows))


if __name__ == '__main__':
    main()
