#!/usr/bin/env python
"""What bfloat16 is worth in training: float32, fastai's `to_bf16` and `to_mixed_precision('bf16')` in turn, in one process.

    python benchmarks/mixed_precision/run.py [--rounds 5] [--steps 3] [--threads N] [--device cpu] [--json FILE] [--force]

Two models, made from their sizes with random weights, on random tokens, so that nothing has to be downloaded: AWD_LSTM as a language model (fastai's
sizes, all its dropouts, AR and TAR) and a BERT of MiniLM's size (6 layers, 384 wide) as a classifier of 128 tokens. A round trains each variant for
`--steps` steps, forward, backward and optimizer, in an order that changes; the first round only warms up. Before the clock starts, the losses of all variants
on the same batch without dropout are printed. Ratios are taken within a round, so that a busy machine slows both sides alike."""

import argparse, json, platform, statistics as st, time, warnings
from importlib.metadata import version
from pathlib import Path

VARIANTS = ('float32', 'fastai to_bf16', 'to_mixed_precision')


def parse():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--rounds', type=int, default=5, help='counted rounds')
    ap.add_argument('--steps', type=int, default=3, help='training steps of a variant in a round')
    ap.add_argument('--models', nargs='+', default=['lm', 'bert'], choices=['lm', 'bert'])
    ap.add_argument('--vocab', type=int, default=30_000)
    ap.add_argument('--threads', type=int, help="PyTorch's threads")
    ap.add_argument('--device', default='cpu')
    ap.add_argument('--force', action='store_true', help='bfloat16 even where it is emulated')
    ap.add_argument('--json', type=Path, help='also write the figures to this file')
    a = ap.parse_args()
    if a.rounds < 1 or a.steps < 1:
        ap.error('--rounds and --steps must be at least 1')
    return a


def lm(a):
    "AWD_LSTM of fastai's sizes, its callbacks, batches of 32 x 72 tokens"
    import torch
    from fastai.text.all import AWD_LSTM, ModelResetter, RNNCallback, RNNRegularizer, get_language_model

    x = torch.randint(0, a.vocab, (a.steps, 32, 73))
    return (
        get_language_model(AWD_LSTM, a.vocab),
        [(o[:, :-1].contiguous(), o[:, 1:].contiguous()) for o in x],
        [ModelResetter, RNNCallback, RNNRegularizer(2.0, 1.0)],
    )


def bert(a):
    "A BERT of MiniLM's size that gives its logits, batches of 16 x 128 tokens"
    import torch
    from torch import nn
    from transformers import BertConfig, BertForSequenceClassification

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = BertForSequenceClassification(
                BertConfig(
                    vocab_size=a.vocab,
                    hidden_size=384,
                    num_hidden_layers=6,
                    num_attention_heads=12,
                    intermediate_size=1536,
                    num_labels=6,
                )
            )

        def forward(self, ids):
            return self.bert(input_ids=ids).logits

    return Logits(), [(torch.randint(0, a.vocab, (16, 128)), torch.randint(0, 6, (16,))) for _ in range(a.steps)], []


MODELS = dict(
    lm=(lm, 'AWD_LSTM language model 400/1152/3', 'tokens', 32 * 72),
    bert=(bert, 'BERT 6 layers, 384 wide, 128 tokens', 'samples', 16),
)


def learner(make, variant, a):
    "A Learner of one variant; all variants start from the same weights and see the same batches"
    import torch
    from fastai.text.all import CrossEntropyLossFlat, DataLoader, DataLoaders, Learner
    from fastai_tl.all import LayerwiseOptimizer, layer_splitter, seed_everything

    seed_everything(0)
    model, batches, cbs = make(a)
    dls = DataLoaders(
        DataLoader(batches, bs=None, num_workers=0),
        DataLoader(batches[:1], bs=None, num_workers=0),
        device=torch.device(a.device),
    )
    learn = Learner(
        dls,
        model.to(a.device),
        loss_func=CrossEntropyLossFlat(),
        opt_func=LayerwiseOptimizer,
        splitter=layer_splitter(),
        cbs=cbs,
    )
    learn.remove_cb(learn.progress)
    learn.logger = lambda *o: None
    return {
        'float32': lambda: learn,
        'fastai to_bf16': learn.to_bf16,
        'to_mixed_precision': lambda: learn.to_mixed_precision('bf16', force=a.force),
    }[variant]()


def seconds(learn, a):
    "The time of the training steps of one epoch; the validation after them is not in it"
    import torch
    from fastai.text.all import Callback

    class Clock(Callback):
        order = -99

        def before_fit(self):
            self.times = []

        def now(self):
            if a.device != 'cpu':
                torch.accelerator.synchronize()
            self.times.append(time.perf_counter())

        def before_train(self):
            self.now()

        def after_train(self):
            self.now()

    clock = Clock()
    learn.fit(1, 1e-4, cbs=clock)
    return clock.times[1] - clock.times[0]


def measure(name, a):
    "Parity, then the rounds: units a second of each variant"
    make, title, unit, per_step = MODELS[name]
    learners = {v: learner(make, v, a) for v in VARIANTS}
    losses = {v: float(learn.validate()[0]) for v, learn in learners.items()}
    print(f"{title}: loss on one batch " + ', '.join(f'{v} {o:.5f}' for v, o in losses.items()), flush=True)
    rows = []
    for i in range(a.rounds + 1):
        order = [VARIANTS[(i + j) % len(VARIANTS)] for j in range(len(VARIANTS))]
        row = {v: per_step * a.steps / seconds(learners[v], a) for v in order}
        if i:
            rows.append(row)
    used = str(learners['to_mixed_precision'].autocast_precision.compute_dtype).removeprefix('torch.')
    return dict(
        title=title, unit=unit, computed_in=used, loss=losses, rounds=rows, **{v: summary(rows, v) for v in VARIANTS}
    )


def summary(rows, v):
    ratios = [r[v] / r['float32'] for r in rows]
    best = lambda o: max(r[o] for r in rows)
    return dict(
        median=st.median(r[v] for r in rows),
        best=best(v),
        ratio=st.median(ratios),
        ratio_min=min(ratios),
        ratio_max=max(ratios),
        ratio_of_best=best(v) / best('float32'),
    )


def main(a):
    import torch

    warnings.filterwarnings(
        'ignore', 'CUDA is not available|.*GradScaler is enabled'
    )  # what fastai's own gives on a CPU
    if a.threads:
        torch.set_num_threads(a.threads)
    res = {name: measure(name, a) for name in a.models}
    print(
        '\n| model | variant | a second (median) | ratio to float32 (range) | best to best |\n|---|---|---:|---|---:|'
    )
    for r in res.values():
        for v in VARIANTS:
            s = r[v]
            print(
                f"| {r['title']} | {v}{'' if v != VARIANTS[-1] else ' (' + r['computed_in'] + ')'} | {s['median']:,.1f} {r['unit']} | {s['ratio']:.2f} ({s['ratio_min']:.2f} to {s['ratio_max']:.2f}) | {s['ratio_of_best']:.2f} |"
            )
    about = dict(
        device=a.device,
        threads=torch.get_num_threads(),
        rounds=a.rounds,
        steps=a.steps,
        python=platform.python_version(),
        machine=platform.machine(),
        versions={o: version(o) for o in ('fastai', 'torch', 'transformers')},
    )
    if a.json:
        a.json.write_text(json.dumps(dict(about=about, results=res), indent=1) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main(parse())
