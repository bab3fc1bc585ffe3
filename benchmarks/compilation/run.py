#!/usr/bin/env python
"""Where `torch.compile` pays: a training step as it is and compiled, in seconds, and how long compiling takes.

    python benchmarks/compilation/run.py [--models minilm] [--rounds 5] [--threads N] [--device cpu] [--cpu-time] [--json FILE]

A BERT of MiniLM's size (6 layers, 384 wide, random weights) with batches of 16 x 128 random tokens, forwards, backwards and optimizer, in float32 and, where the device has it, bfloat16; `base` is BERT base. Each is compared with itself as it is, and with `fast_dropout()` on a CPU. Rounds are interleaved. A last
column says after how many steps compiling has paid for itself."""

import argparse, json, statistics as st, time, warnings
from pathlib import Path

warnings.filterwarnings('ignore')
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
    x, y = torch.randint(0, 30_000, (16, 128), device=a.device), torch.randint(0, 2, (16,), device=a.device)
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


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--models', nargs='+', default=['minilm'], choices=list(SIZES))
    p.add_argument('--rounds', type=int, default=5)
    p.add_argument('--threads', type=int)
    p.add_argument('--device', default='cpu')
    p.add_argument('--cpu-time', action='store_true', help='seconds of the processor instead of the clock')
    p.add_argument('--json', type=Path)
    a = p.parse_args()
    import torch
    from fastai_tl.all import has_bf16

    if a.threads:
        torch.set_num_threads(a.threads)
    clock, rows = time.process_time if a.cpu_time else time.perf_counter, []
    for size in a.models:
        for half in (False, True)[: 1 + has_bf16(a.device)]:
            fs = {
                'as it is': stepper(a, size, half),
                **({'fast_dropout': stepper(a, size, half, fast=True)} if a.device == 'cpu' else {}),
                'compiled': stepper(a, size, half, True),
            }
            secs, first = {k: [] for k in fs}, {}
            for k, f in fs.items():
                t = time.perf_counter()
                f()
                first[k] = time.perf_counter() - t
            for r in range(a.rounds):
                for k in list(fs)[r % len(fs) :] + list(fs)[: r % len(fs)]:
                    t = clock()
                    fs[k]()
                    secs[k].append(clock() - t)
            for k, v in secs.items():
                gain = st.median(secs['as it is']) - st.median(v)
                rows.append(
                    dict(
                        model=size,
                        dtype='bfloat16' if half else 'float32',
                        variant=k,
                        seconds=st.median(v),
                        ratio=st.median(b / o for b, o in zip(secs['as it is'], v)),
                        best=min(secs['as it is']) / min(v),
                        first_step=first[k],
                        pays_after=first[k] / gain if k == 'compiled' and gain > 0 else None,
                    )
                )
                print(rows[-1], flush=True)
            if a.json:
                a.json.write_text(json.dumps(rows, indent=1) + '\n', encoding='utf-8')
    print(
        '\n| model | dtype | variant | seconds a step | times as fast as it is (best) | first step, s | pays after steps |\n|---|---|---|---:|---:|---:|---:|'
    )
    for r in rows:
        print(
            f"| {r['model']} | {r['dtype']} | {r['variant']} | {r['seconds']:.3f} | {r['ratio']:.2f} ({r['best']:.2f}) | {r['first_step']:.1f} | {'' if r['pays_after'] is None else round(r['pays_after'])} |"
        )


if __name__ == '__main__':
    main()
