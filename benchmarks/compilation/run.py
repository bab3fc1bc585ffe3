#!/usr/bin/env python
"""Where `torch.compile` pays: seconds of a training step as it is and compiled, and how long compiling takes.

    python benchmarks/compilation/run.py [--models minilm] [--rounds 5] [--threads N] [--device cpu] [--cpu-time]
                                         [--json FILE]

A BERT of MiniLM's size (6 layers, 384 wide, random weights) with batches of 16 x 128 random tokens: forward,
backward and optimizer, in float32 and, if the device has it, bfloat16; `base` is BERT base. Each is compared with
the uncompiled model and, on a CPU, with `fast_dropout()`. Rounds are interleaved. The last column is the number of
steps after which compiling has paid for itself."""

import statistics as st
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import chosen_clock, interleave, offline, parser, ratio, seconds, set_threads, table, write_json

offline()
SIZES = dict(
    minilm=dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536),
    base={},
    tiny=dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16),
)


def stepper(a, size, half, compiled=False, fast=False):
    "A function that trains one step"
    import torch
    from contextlib import nullcontext
    from transformers import BertConfig, BertForSequenceClassification
    from fastai_tl.all import FastDropout, seed_everything

    seed_everything(0)
    model = BertForSequenceClassification(BertConfig(**SIZES[size])).to(a.device).train()
    x = torch.randint(0, 30_000, (16, 128), device=a.device)
    y = torch.randint(0, 2, (16,), device=a.device)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    if compiled:
        model.compile(dynamic=False)

    def step():
        with torch.autocast(a.device, torch.bfloat16, enabled=half), FastDropout() if fast else nullcontext():
            loss = torch.nn.functional.cross_entropy(model(input_ids=x).logits.float(), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        if a.device != 'cpu':
            torch.accelerator.synchronize()

    return step


def measure(a, size, half, clock):
    "One row for each way of training a step"
    ways = {'as it is': stepper(a, size, half)}
    if a.device == 'cpu':
        ways['fast_dropout'] = stepper(a, size, half, fast=True)
    ways['compiled'] = stepper(a, size, half, True)
    first = {k: seconds(step) for k, step in ways.items()}
    times = interleave(ways, a.rounds, warm_up=0, clock=clock)
    for k, v in times.items():
        gain = st.median(times['as it is']) - st.median(v)
        r = ratio(times['as it is'], v)
        yield dict(
            model=size,
            dtype='bfloat16' if half else 'float32',
            variant=k,
            seconds=st.median(v),
            ratio=r['ratio'],
            best=r['best'],
            first_step=first[k],
            pays_after=first[k] / gain if k == 'compiled' and gain > 0 else None,
        )


def cells(r):
    "A row of the printed table"
    pays = '' if r['pays_after'] is None else round(r['pays_after'])
    faster = f"{r['ratio']:.2f} ({r['best']:.2f})"
    return [r['model'], r['dtype'], r['variant'], f"{r['seconds']:.3f}", faster, f"{r['first_step']:.1f}", pays]


def main():
    p = parser(__doc__, 'rounds', 'threads', 'device', 'cpu-time', 'json')
    p.add_argument('--models', nargs='+', default=['minilm'], choices=list(SIZES))
    a = p.parse_args()
    from fastai_tl.all import has_bf16

    set_threads(a.threads)
    clock = chosen_clock(a.cpu_time)
    rows = []
    for size in a.models:
        for half in (False, True)[: 1 + has_bf16(a.device)]:
            for row in measure(a, size, half, clock):
                rows.append(row)
                print(row, flush=True)
            write_json(a.json, rows)
    columns = ['model', 'dtype', 'variant', 'seconds a step:', 'times as fast as it is (best):']
    print('\n' + table([*columns, 'first step, s:', 'pays after steps:'], map(cells, rows)))


if __name__ == '__main__':
    main()
