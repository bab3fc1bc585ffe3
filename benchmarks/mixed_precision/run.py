#!/usr/bin/env python
"""What bfloat16 is worth in training: float32, fastai's `to_bf16` and `to_mixed_precision('bf16')` in turn, in one
process.

    python benchmarks/mixed_precision/run.py [--rounds 5] [--steps 3] [--threads N] [--device cpu] [--json FILE]
                                             [--force]

Two models with random weights, on random tokens, so that nothing has to be downloaded: AWD_LSTM as a language
model (fastai's sizes, all its dropouts, AR and TAR) and a BERT of MiniLM's size (6 layers, 384 wide) as a
classifier of 128 tokens. A round trains each variant for `--steps` steps (forward, backward and optimizer), in an
order that changes; the first round only warms up. Before that, the script prints the loss of each variant on the
same batch without dropout. Ratios are taken within a round, so that a busy machine slows both sides alike."""

import platform
import statistics as st
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import parser, quiet, ranged, ratio, rotated, set_threads, synchronize, table, write_json

VARIANTS = ('float32', 'fastai to_bf16', 'to_mixed_precision')


def parse():
    ap = parser(__doc__, 'rounds', 'threads', 'device', 'json')
    ap.add_argument('--steps', type=int, default=3, help='training steps of a variant in a round')
    ap.add_argument('--models', nargs='+', default=['lm', 'bert'], choices=['lm', 'bert'])
    ap.add_argument('--vocab', type=int, default=30_000)
    ap.add_argument('--force', action='store_true', help='bfloat16 even where it is emulated')
    a = ap.parse_args()
    if a.rounds < 1 or a.steps < 1:
        ap.error('--rounds and --steps must be at least 1')
    return a


def lm(a):
    "AWD_LSTM of fastai's sizes, its callbacks, batches of 32 x 72 tokens"
    import torch
    from fastai.text.all import AWD_LSTM, ModelResetter, RNNCallback, RNNRegularizer, get_language_model

    x = torch.randint(0, a.vocab, (a.steps, 32, 73))
    batches = [(o[:, :-1].contiguous(), o[:, 1:].contiguous()) for o in x]
    return get_language_model(AWD_LSTM, a.vocab), batches, [ModelResetter, RNNCallback, RNNRegularizer(2.0, 1.0)]


def bert(a):
    "A BERT of MiniLM's size that gives its logits, batches of 16 x 128 tokens"
    import torch
    from torch import nn
    from transformers import BertConfig, BertForSequenceClassification

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            layers = dict(num_hidden_layers=6, num_attention_heads=12, hidden_size=384, intermediate_size=1536)
            self.bert = BertForSequenceClassification(BertConfig(vocab_size=a.vocab, num_labels=6, **layers))

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
    train, valid = (DataLoader(b, bs=None, num_workers=0) for b in (batches, batches[:1]))
    dls = DataLoaders(train, valid, device=torch.device(a.device))
    options = dict(loss_func=CrossEntropyLossFlat(), opt_func=LayerwiseOptimizer, splitter=layer_splitter())
    learn = Learner(dls, model.to(a.device), cbs=cbs, **options)
    quiet(learn, validate=True)
    return {
        'float32': lambda: learn,
        'fastai to_bf16': learn.to_bf16,
        'to_mixed_precision': lambda: learn.to_mixed_precision('bf16', force=a.force),
    }[variant]()


def seconds(learn, a):
    "The time of the training steps of one epoch, without its validation"
    from fastai.text.all import Callback

    class Clock(Callback):
        order = -99

        def before_fit(self):
            self.times = []

        def now(self):
            synchronize(a.device)
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
    print(f'{title}: loss on one batch ' + ', '.join(f'{v} {o:.5f}' for v, o in losses.items()), flush=True)
    rows = []
    for i in range(a.rounds + 1):
        row = {v: per_step * a.steps / seconds(learners[v], a) for v in rotated(VARIANTS, i)}
        if i:
            rows.append(row)
    used = str(learners['to_mixed_precision'].autocast_precision.compute_dtype).removeprefix('torch.')
    figures = {v: summary(rows, v) for v in VARIANTS}
    return dict(title=title, unit=unit, computed_in=used, loss=losses, rounds=rows, **figures)


def summary(rows, variant):
    "Median rate of a variant, and its ratio to float32"
    rates = [r[variant] for r in rows]
    base = [r['float32'] for r in rows]
    r = ratio([1 / o for o in base], [1 / o for o in rates])
    return dict(
        median=st.median(rates),
        best=max(rates),
        ratio=r['ratio'],
        ratio_min=r['low'],
        ratio_max=r['high'],
        ratio_of_best=max(rates) / max(base),
    )


def cells(result, variant):
    "A row of the printed table"
    s = result[variant]
    name = f"{variant} ({result['computed_in']})" if variant == VARIANTS[-1] else variant
    spread = ranged(dict(ratio=s['ratio'], low=s['ratio_min'], high=s['ratio_max']))
    return [result['title'], name, f"{s['median']:,.1f} {result['unit']}", spread, f"{s['ratio_of_best']:.2f}"]


def main(a):
    import torch

    # what fastai's own mixed precision warns of on a CPU
    warnings.filterwarnings('ignore', 'CUDA is not available|.*GradScaler is enabled')
    set_threads(a.threads)
    results = {name: measure(name, a) for name in a.models}
    rows = [cells(r, v) for r in results.values() for v in VARIANTS]
    print('\n' + table(['model', 'variant', 'a second (median):', 'ratio to float32 (range)', 'best to best:'], rows))
    about = dict(
        device=a.device,
        threads=torch.get_num_threads(),
        rounds=a.rounds,
        steps=a.steps,
        python=platform.python_version(),
        machine=platform.machine(),
        versions={o: version(o) for o in ('fastai', 'torch', 'transformers')},
    )
    write_json(a.json, dict(about=about, results=results))


if __name__ == '__main__':
    main(parse())
