"""Where the time of a training step goes, and how near the step is to the processor's rate of matrix products.

    python benchmarks/training/profile_step.py [--data FOLDER] [--json FILE]

MiniLM with a head for two classes, 16 IMDb reviews of 128 tokens (random token ids if `--data` has none), float32, one
thread, processor time. Variants: a plain PyTorch loop as Trainer has it (AdamW for all parameters), ours, and ours with
`single_position()` and `fast_dropout()`. For each:

- seconds a step, best of the rounds, in which the variants take turns (four steps each, in an epoch of ours);
- shares of the operators by PyTorch's profiler (self time);
- operations of the matrix products of the step, forward and backward, counted by `torch.utils.flop_counter`;
- the roof: the same operations at the best rate that this processor reaches for a matrix product of the model's shapes,
  measured in the same run."""

import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common

common.offline()

STEPS = 4  # in each round
KINDS = {
    'matrix products': ('mm', 'addmm', 'bmm', 'baddbmm', 'mkldnn', 'linear'),
    'attention': ('attention', 'softmax', 'threshold_backward', 'copysign', 'masked_fill'),
    'dropout and its random numbers': ('dropout', 'bernoulli', 'random', 'native_dropout', 'bitwise', 'Masked'),
    'GELU': ('gelu', 'tanh'),
    'LayerNorm': ('layer_norm',),
    'optimizer and norm of the gradient': ('adam', 'foreach', 'norm', 'lerp', 'addcmul', 'addcdiv', 'sqrt', 'zero_'),
    'embeddings': ('embedding', 'index'),
    'sums, copies and the rest': ('',),
}


def kind_of(name):
    "The kind of an operator"
    name = name.removeprefix('aten::')
    if 'layer_norm' in name or 'attention' in name or 'softmax' in name:
        return 'LayerNorm' if 'layer_norm' in name else 'attention'
    return next(kind for kind, parts in KINDS.items() if any(part in name for part in parts))


def batch(a, n=16, length=128):
    "Token ids of reviews, and classes"
    import numpy as np
    import pandas as pd
    import torch
    from fastai_tl.all import minilm_folder
    from transformers import AutoTokenizer

    file = Path(a.data) / 'en' / 'imdb.parquet'
    if not file.exists():
        return torch.randint(1000, 30000, (n, length)), torch.arange(n) % 2
    df = pd.read_parquet(file)
    long = df.text[df.text.str.split().str.len() > 2 * length].head(n)
    tok = AutoTokenizer.from_pretrained(minilm_folder())
    ids = tok(list(long), truncation=True, max_length=length)['input_ids']
    return torch.tensor(np.array(ids)), torch.arange(n) % 2


def plain_steps(ids, labels):
    "Steps of a plain loop: what Trainer does on one CPU"
    import torch
    from fastai_tl.all import minilm_folder
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(minilm_folder(), num_labels=2).train()
    opt = torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True)
    mask = torch.ones_like(ids)

    def steps():
        for _ in range(STEPS):
            model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            opt.zero_grad()

    return steps


def our_steps(ids, labels, all_on):
    "An epoch of our Learner, with its Callbacks"
    import pandas as pd
    from fastai_tl.all import HFTextDataLoaders, TensorTokens, hf_classifier_learner, minilm_folder
    from fastai.torch_core import TensorCategory

    df = pd.DataFrame(dict(text=['a good film', 'a bad film'] * 20, label=['pos', 'neg'] * 20))
    dls = HFTextDataLoaders.from_df(df, minilm_folder(), bs=16, verbose=False)
    learn = common.quiet(hf_classifier_learner(dls, minilm_folder(), metrics=[]))
    if all_on:
        learn.single_position().fast_dropout()
    one = (TensorTokens(ids[:, None]), TensorCategory(labels))
    learn.dls = common.load_benchmark('training').fixed(dls, [one] * STEPS)

    def steps():
        with learn.no_bar(), learn.no_logging():
            learn.fit(1, slice(1e-5, 5e-5))

    return steps


def best_rate(rows=2048):
    "Best rate of matrix products of the model's shapes, in operations a second"
    import torch

    best = {}
    for n_in, n_out in ((384, 384), (384, 1536), (1536, 384)):
        x, w = torch.randn(rows, n_in), torch.randn(n_out, n_in)
        f = lambda: torch.nn.functional.linear(x, w)
        f()
        seconds = []
        for _ in range(20):
            start = time.process_time()
            f()
            seconds.append(time.process_time() - start)
        best[f'{n_in} to {n_out}'] = 2 * rows * n_in * n_out / min(seconds)
    return best


def operations(steps):
    "Operations of the matrix products of a step"
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        steps()
    return counter.get_total_flops() / STEPS


def shares(steps):
    "Share of each kind of operator in the self time of some steps"
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as p:
        steps()
    seconds = Counter()
    for event in p.key_averages():
        seconds[kind_of(event.key)] += event.self_cpu_time_total
    return {kind: seconds[kind] / sum(seconds.values()) for kind in KINDS}


def main(a):
    common.set_threads(1)
    ids, labels = batch(a)
    made = {
        'plain loop': plain_steps(ids, labels),
        'ours': our_steps(ids, labels, False),
        'ours, single_position() and fast_dropout()': our_steps(ids, labels, True),
    }
    secs = common.interleave(made, a.rounds, clock=time.process_time)
    rates = best_rate()
    roof = max(rates.values())
    found = {}
    for name, step in made.items():
        n, own = operations(step), [v / STEPS for v in secs[name]]
        of_roof = n / roof / min(own)
        found[name] = dict(seconds=own, gflop=n / 1e9, roof_seconds=n / roof, of_roof=of_roof, shares=shares(step))
        print(f'{name}: {min(own):.3f} s a step, {n / roof:.3f} s at the roof, {of_roof:.0%}', flush=True)
    rows = [[kind, *(f'{100 * found[name]["shares"][kind]:.0f} %' for name in made)] for kind in KINDS]
    print(common.table(['', *(f'{name}:' for name in made)], rows))
    common.write_json(a.json, dict(steps=found, gflop_a_second={k: v / 1e9 for k, v in rates.items()}))


if __name__ == '__main__':
    main(common.parser(__doc__, 'data', 'rounds', 'json').parse_args())
