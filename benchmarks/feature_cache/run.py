#!/usr/bin/env python
"""What it is worth to compute frozen layers once: cached stages and the single-position top layer beside the naive frozen epoch, in turn, in one process.

    python benchmarks/feature_cache/run.py [--data PATH] [--texts 96] [--rounds 5] [--threads 1] [--device cpu] [--json FILE] [--only NAME ...]

MiniLM (6 layers, 384 wide, the extra `minilm`; or `--model NAME`) and fastai's AWD_LSTM classifier (400/1152/3) on movie reviews (`--data`: a folder with `train/pos` and `train/neg`, as IMDb has, or a
parquet table) or, without it, on the offline corpus; at most 128 tokens. The peer of every line is the same Learner with the same batches and rates, frozen to the same depth, in float32, with
fastai's loop and nothing kept. A line is an epoch of training (cached epochs find their states computed), or a whole stage of several epochs whose states are computed within the
time, for the training texts (there are no validation batches in either side). Before the clock starts, the logits of the whole model and of the cached one are compared. A round runs
each line once, in an order that changes; the first round only warms up. Ratios are taken within a round."""

import argparse, json, platform, random, statistics as st, time, warnings
from importlib.metadata import version
from pathlib import Path


def parse():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument(
        '--data',
        type=Path,
        help='folder with train/pos/*.txt and train/neg/*.txt, or a parquet table with text, label and split',
    )
    ap.add_argument('--model', help='a name or folder instead of MiniLM')
    ap.add_argument('--texts', type=int, default=96, help='training texts')
    ap.add_argument('--bs', type=int, default=16)
    ap.add_argument('--rounds', type=int, default=5, help='counted rounds')
    ap.add_argument('--threads', type=int, help="PyTorch's threads")
    ap.add_argument('--device', default='cpu')
    ap.add_argument('--json', type=Path, help='also write the figures to this file')
    ap.add_argument(
        '--only',
        nargs='+',
        default=['epochs', 'stages', 'awd'],
        choices=['epochs', 'stage', 'stages', 'awd'],
        help='`stage`: those of 3 epochs alone',
    )
    ap.add_argument(
        '--cpu-time', action='store_true', help='seconds of the processor instead of the clock; needs one thread'
    )
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
        return (
            df[df.text.str.len() > 300].sample(a.texts + 32, random_state=0)[['text', 'label']].reset_index(drop=True)
        )
    if a.data.is_file():
        df = pd.read_parquet(a.data)
        return df[df.split == 'train'].sample(a.texts + 32, random_state=0)[['text', 'label']].reset_index(drop=True)
    rows = [(p, l) for l in ('neg', 'pos') for p in sorted((a.data / 'train' / l).iterdir())]
    random.Random(0).shuffle(rows)
    return pd.DataFrame(
        [dict(text=p.read_text(encoding='utf8').replace('<br />', ' '), label=l) for p, l in rows[: a.texts + 32]]
    )


def quiet(learn):
    learn.remove_cb(learn.progress)
    learn.logger = lambda *o: None
    learn._do_epoch_validate = lambda *o, **k: None  # training alone is timed, on both sides
    return learn


def minilm(a, df):
    from fastai_tl.all import HFTextDataLoaders, hf_classifier_learner, minilm_folder, seed_everything

    name = a.model or minilm_folder()
    seed_everything(0)
    dls = HFTextDataLoaders.from_df(
        df.assign(held=[False] * a.texts + [True] * 32), name, valid_col='held', max_length=128, bs=a.bs, verbose=False
    )
    return quiet(hf_classifier_learner(dls.to(a.device), name))


def awd(a, df):
    import torch
    from fastai_tl.all import awd_classifier_learner, classifier_dls, seed_everything, texts_vocab, tokenize_texts_once

    seed_everything(0)
    toks = tokenize_texts_once([' '.join(t.split()[:110]) for t in df.text])  # about 128 tokens
    dls = classifier_dls(
        toks,
        df.label.tolist(),
        'classification',
        list(range(a.texts)),
        list(range(a.texts, a.texts + 32)),
        texts_vocab(toks),
        bs=a.bs,
    )
    return quiet(
        awd_classifier_learner(
            dls, 'classification', df.label.nunique(), dict(emb_sz=400, n_hid=1152, n_layers=3), path='.'
        )
    )


def main():
    a = parse()
    warnings.filterwarnings('ignore')
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if a.threads:
        torch.set_num_threads(a.threads)
    if a.cpu_time and torch.get_num_threads() != 1:
        raise SystemExit('--cpu-time needs --threads 1: it adds up the seconds of all threads')
    from fastai_tl.all import CachedPrefix
    from fastai_tl.efficiency.feature_cache import draw_items

    df, lines, notes = texts(a), {}, {}

    def line(make, top, bf16=False, cache=None, epochs=1, keep=True, fast=False):
        "A function that trains for some epochs with the top `top` groups, and leaves the states computed if `keep`"
        learn = make(a, df)
        learn.create_opt()
        learn.opt.freeze_to(-top)
        if bf16:
            learn.to_mixed_precision('bf16')
        if fast:
            learn.fast_dropout()
        cb = cache and cache()
        if cb:
            learn.add_cb(cb)

        def run():
            if cb and not keep:
                cb.forget()
            learn.fit(epochs, 1e-5)

        run.learn, run.cb = learn, cb
        return run

    def parity(name, run):
        "Logits of the whole model and from the states that were kept, on the training texts, in float32 with states in their own dtype"
        run()
        c, model = run.cb.caches['training'], run.learn.model
        (x, *_), states = c.batch(c.order[:32])
        full = draw_items(run.learn.dls.train, c.order[:32])[0].as_subclass(torch.Tensor)
        model.eval()
        first = lambda o: o[0] if isinstance(o, tuple) else o
        with torch.no_grad():
            ref = first(model(full))
            with (
                run.cb.one if run.cb.one is not None and not c.has_vectors else torch.no_grad(),
                c.prefix.replay(states.float()),
            ):
                got = first(model(x.as_subclass(torch.Tensor)))
        notes[name] = dict(
            logits_differ=(got - ref).abs().max().item(), largest_logit=ref.abs().max().item(), states=str(c.store)
        )
        print(
            f'{name}: logits differ by {notes[name]["logits_differ"]:.1e} (largest {notes[name]["largest_logit"]:.2f}); kept: {c.store}',
            flush=True,
        )

    groups, peers = {}, {}

    def add(name, run, base):
        groups[name], peers[name] = run, base
        if run.cb:
            parity(name, run)

    off, on = (lambda: CachedPrefix(one_position=False, verbose=False)), (lambda: CachedPrefix(verbose=False))
    naive = {}

    def base(make, top, epochs):
        "A naive stage is so many equal epochs: one is timed and multiplied"
        key = f'{make.__name__}, {top} group{"s" if top > 1 else ""} train'
        if key not in naive:
            naive[key] = line(make, top)
        name = f'{key}, {epochs} naive epoch{"s" if epochs > 1 else ""}'
        groups[name], peers[name] = (key, epochs), None
        return name

    if 'epochs' in a.only:
        add('k=5, float32', line(minilm, 2, cache=off), base(minilm, 2, 1))
        add('k=5, float32, single position', line(minilm, 2, cache=on), base(minilm, 2, 1))
        add('k=5, bfloat16, single position', line(minilm, 2, True, on), base(minilm, 2, 1))
        add('k=3, float32', line(minilm, 4, cache=off), base(minilm, 4, 1))
        add('k=3, bfloat16, single position', line(minilm, 4, True, on), base(minilm, 4, 1))
    if 'stages' in a.only or 'stage' in a.only:
        add('k=5, float32, stage of 3 epochs', line(minilm, 2, cache=off, epochs=3, keep=False), base(minilm, 2, 3))
        add(
            'k=5, float32, fast dropout, stage of 3 epochs',
            line(minilm, 2, cache=off, epochs=3, keep=False, fast=True),
            base(minilm, 2, 3),
        )
        add(
            'k=5, float32, single position, stage of 3 epochs',
            line(minilm, 2, cache=on, epochs=3, keep=False),
            base(minilm, 2, 3),
        )
    if 'stages' in a.only:
        add('head, float32, stage of 10 epochs', line(minilm, 1, cache=on, epochs=10, keep=False), base(minilm, 1, 10))
        add('head, bfloat16, stage of 10 epochs', line(minilm, 1, True, on, epochs=10, keep=False), base(minilm, 1, 10))
    if 'awd' in a.only:
        add(
            'AWD_LSTM head, float32, stage of 10 epochs',
            line(awd, 1, cache=on, epochs=10, keep=False),
            base(awd, 1, 10),
        )
        add(
            'AWD_LSTM head, bfloat16, stage of 10 epochs',
            line(awd, 1, True, on, epochs=10, keep=False),
            base(awd, 1, 10),
        )
    times, clock = {n: [] for n in groups}, time.process_time if a.cpu_time else time.perf_counter
    units = {**naive, **{n: f for n, f in groups.items() if peers[n]}}
    for r in range(a.rounds + 1):
        names, took = list(units), {}
        random.Random(r).shuffle(names)
        for n in names:
            t = clock()
            units[n]()
            if a.device != 'cpu':
                torch.accelerator.synchronize()
            took[n] = clock() - t
        if r:
            for n in groups:
                times[n].append(took[n] if peers[n] else took[groups[n][0]] * groups[n][1])
        print(f'round {r}: {sum(took.values()):.0f} s', flush=True)
    rows = []
    for n in groups:
        if peers[n] is None:
            continue
        b, c = times[peers[n]], times[n]
        ratios = [x / y for x, y in zip(b, c)]
        rows.append(
            dict(
                line=n,
                peer=peers[n],
                median=st.median(ratios),
                low=min(ratios),
                high=max(ratios),
                best=min(b) / min(c),
                seconds=c,
                peer_seconds=b,
                **notes[n],
            )
        )
    print(
        f'\n| {a.device}, {torch.get_num_threads()} thread(s), {a.texts} texts | naive, s | s | median ratio (range) | best round to best round | logits differ by |\n|---|---:|---:|---|---:|---:|'
    )
    for r in rows:
        print(
            f"| {r['line']} | {st.median(r['peer_seconds']):.2f} | {st.median(r['seconds']):.3f} | {r['median']:.1f} ({r['low']:.1f} to {r['high']:.1f}) | {r['best']:.1f} | {r['logits_differ']:.0e} |"
        )
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
    if a.json:
        a.json.write_text(json.dumps(dict(info=info, rows=rows), indent=1))


if __name__ == '__main__':
    main()
