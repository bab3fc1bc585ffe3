#!/usr/bin/env python
"""Training, frozen-layer cache, language model and prediction on a GPU, against their peers and against the GPU's
limits.

    python benchmarks/gpu/run.py [--device cuda] [--only finetune cache lm predict] [--rounds 5] [--tiny]
                                 [--json FILE] [--md FILE]

Models have the sizes of BERT base (12 layers, 768 wide) and of fastai's AWD_LSTM (400/1152/3, vocabulary 30,000)
and random weights; texts are made of random words, 4 to 128 tokens long, so that nothing has to be downloaded. The
variants run in turn, in an order that changes from round to round; the ratio is the median of the rounds' ratios,
with their range.

- finetune: samples a second of `Trainer` (its defaults; length grouping and bfloat16) and of ours in float32,
  bfloat16, and with the single-position top layer.
- cache: an epoch with all layers but the top one frozen: naive in float32, and with `CachedPrefix` in float32 and
  in bfloat16 (single position).
- lm: tokens a second of fastai's Learner, and of ours with `to_mixed_precision().chunked_loss()`.
- predict: texts a second of `learn.predict` (on a few), transformers' `pipeline` with the best of some batch
  sizes, and `Predictor` in float32 and bfloat16.

Roofline: the least time of a variant is the larger of two: its operations over the best rate of matrix products,
and the bytes that it must move over the best rate of copying. Both rates are measured here first, products in the
dtype of the variant. Operations are those of the matrix products: PyTorch counts them on one batch (those of an
LSTM follow from its sizes). Bytes are a lower bound: in training each weight is read in the forward and backward
pass, its gradient written, and the optimizer reads four numbers and writes three. Activations are left out, since
how often they move depends on the kernels. `share` is the least time divided by the measured time: 100 % is the
limit of the machine.

`--tiny` makes everything small, to try the script on a CPU in about a minute: its figures mean nothing."""

import platform
import statistics as st
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
from common import interleave, offline, parser, quiet, ranged, ratio, table, write_json

offline()

FULL = dict(
    bert=dict(),
    vocab=30_000,
    texts=2048,
    bs=64,
    lm=dict(emb_sz=400, n_hid=1152, n_layers=3),
    lm_bs=64,
    lm_batches=20,
    seq_len=72,
    gemm=8192,
    copy=2**30,
    few=16,
    pipe=(8, 32, 128),
)
TINY = dict(
    bert=dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64),
    vocab=200,
    texts=32,
    bs=8,
    lm=dict(emb_sz=16, n_hid=24, n_layers=2),
    lm_bs=4,
    lm_batches=2,
    seq_len=12,
    gemm=128,
    copy=2**20,
    few=2,
    pipe=(4, 8),
)


def ceilings(a):
    "Operations a second of a large matrix product in float32 and bfloat16, bytes a second of a copy; the best of ten"
    import torch

    def best(f):
        return min(common.seconds(f, device=a.device) for _ in range(10))

    n = a.size['gemm']
    res = {}
    for name, dtype in (('float32', torch.float32), ('bfloat16', torch.bfloat16)):
        x, y = (torch.randn(n, n, device=a.device).to(dtype) for _ in range(2))
        x @ y
        res[name] = 2 * n**3 / best(lambda: x @ y)
    src = torch.zeros(a.size['copy'], dtype=torch.uint8, device=a.device)
    dst = torch.empty_like(src)
    dst.copy_(src)
    res['bytes'] = 2 * len(src) / best(lambda: dst.copy_(src))  # read and written
    rates = ' and '.join(f'{res[d] / 1e12:.2f} ({d})' for d in ('float32', 'bfloat16'))
    print(f"products: {rates} TFLOP/s; copying: {res['bytes'] / 1e9:.0f} GB/s", flush=True)
    return res


def counted(f):
    "Operations of the matrix products while `f` runs"
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as c:
        f()
    return c.get_total_flops()


def numbers(params):
    return sum(p.numel() for p in params)


def training_bytes(model):
    return 4 * sum((2 + (1 + 7 if p.requires_grad else 0)) * p.numel() for p in model.parameters())


def texts_of(a):
    "A tokenizer of words, and random texts of 4 to 128 tokens whose class depends on their first word"
    import numpy as np
    import pandas as pd
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', *[f'w{i}' for i in range(a.size['vocab'] - 4)]]
    t = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token='[UNK]'))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [('[CLS]', 2), ('[SEP]', 3)]
    templates = dict(single='[CLS] $A [SEP]', pair='[CLS] $A [SEP] $B [SEP]')
    t.post_processor = processors.TemplateProcessing(**templates, special_tokens=special)
    names = dict(pad_token='[PAD]', unk_token='[UNK]', cls_token='[CLS]', sep_token='[SEP]')
    tok = PreTrainedTokenizerFast(tokenizer_object=t, model_max_length=128, **names)
    rng = np.random.default_rng(0)
    n = a.size['texts']
    lens = np.clip(rng.lognormal(4, 0.8, n + n // 8).astype(int), 2, 126)
    ids = [rng.integers(4, a.size['vocab'], k) for k in lens]
    texts = [' '.join(words[i] for i in o) for o in ids]
    labels = ['even' if o[0] % 2 else 'odd' for o in ids]
    return tok, pd.DataFrame(dict(text=texts, label=labels, valid=[i >= n for i in range(len(ids))]))


def classifier(a, tok, df, half=False, single=False):
    from fastai_tl.all import HFTextDataLoaders, hf_classifier_learner, seed_everything
    from transformers import BertConfig

    seed_everything(0)
    dls = HFTextDataLoaders.from_df(df, tok, valid_col='valid', max_length=128, bs=a.size['bs'], verbose=False)
    dls = dls.to(a.device)
    learn = hf_classifier_learner(dls, BertConfig(vocab_size=len(tok), pad_token_id=0, **a.size['bert']), metrics=[])
    learn.model.to(a.device)
    if half:
        learn.to_mixed_precision('bf16', force=True)
    if single:
        learn.single_position()
    return quiet(learn)


def batch_operations(learn):
    "Operations of a training step on each batch, as PyTorch counts them"
    from fastai_tl.efficiency.pooled_top_layer import SinglePosition, SinglePositionTop
    from contextlib import nullcontext

    single = any(isinstance(c, SinglePositionTop) for c in learn.cbs)

    def run():
        learn.model.train()
        with SinglePosition(learn.model) if single else nullcontext():
            for x, y in learn.dls.train:
                learn.loss_func(learn.model(x), y).backward()
                learn.model.zero_grad()

    return counted(run)


def row(name, secs, base, unit, per_round, computed_in, operations, moved, ceil):
    "One line of a table: the rate of a variant, its ratio to `base`, and its share of the ceiling"
    products = operations / ceil[computed_in]
    copying = moved / ceil['bytes']
    return dict(
        variant=name,
        rate=per_round / st.median(secs[name]),
        unit=unit,
        against=base,
        **ratio(secs[base], secs[name]),
        operations=operations,
        bytes=moved,
        computed_in=computed_in,
        bound='products' if products > copying else 'copying',
        least_seconds=max(products, copying),
        share=max(products, copying) / min(secs[name]),
    )


TRAINERS = {'Trainer': {}, 'Trainer, grouped, bf16': dict(train_sampling_strategy='group_by_length', bf16=True)}


def finetune(a, ceil):
    from transformers import BertConfig, BertForSequenceClassification
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments
    from fastai_tl.all import seed_everything

    tok, df = texts_of(a)
    train = df[~df.valid]
    ids = tok(list(train.text), truncation=True, max_length=128)['input_ids']
    ds = [dict(input_ids=i, attention_mask=[1] * len(i), label=int(l == 'odd')) for i, l in zip(ids, train.label)]
    made = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, kw in TRAINERS.items():
            seed_everything(0)
            model = BertForSequenceClassification(BertConfig(vocab_size=len(tok), pad_token_id=0, **a.size['bert']))
            args = TrainingArguments(
                output_dir=folder,
                use_cpu=a.device == 'cpu',
                per_device_train_batch_size=a.size['bs'],
                num_train_epochs=1,
                report_to='none',
                save_strategy='no',
                logging_strategy='no',
                disable_tqdm=True,
                **kw,
            )
            collate = DataCollatorWithPadding(tok)
            made[name] = Trainer(model=model, args=args, train_dataset=ds, data_collator=collate).train
        learners = {
            'ours, float32': classifier(a, tok, df),
            'ours, bfloat16': classifier(a, tok, df, True),
            'ours, bfloat16, single position': classifier(a, tok, df, True, True),
        }
        made |= {k: (lambda l=l: l.fit(1, 5e-5)) for k, l in learners.items()}
        secs = interleave(made, a.rounds, device=a.device)
    rows = []
    for k, l in learners.items():
        dtype = 'bfloat16' if 'bf' in k else 'float32'
        costs = dtype, batch_operations(l), training_bytes(l.model) * len(l.dls.train)
        rows += [row(k, secs, base, 'samples', len(train), *costs, ceil) for base in TRAINERS]
    return rows


def cache(a, ceil):
    from fastai_tl.all import CachedPrefix

    tok, df = texts_of(a)

    def make(half=False, one=None):
        learn = classifier(a, tok, df, half)
        learn.create_opt()
        learn.opt.freeze_to(-2)
        if one is not None:
            learn.add_cb(CachedPrefix(one_position=one, verbose=False))
        return learn

    learners = {
        'naive, float32': make(),
        'cached, float32': make(one=False),
        'cached, bfloat16, single position': make(True, True),
    }
    secs = interleave({k: (lambda l=l: l.fit(1, 1e-5)) for k, l in learners.items()}, a.rounds, device=a.device)
    base = learners['naive, float32']
    whole = counted(lambda: [base.model(x) for x, _ in base.dls.train])
    layers = base.model.hf.config.num_hidden_layers
    top = batch_operations(base) - whole * (layers - 1) / layers  # a step without the frozen layers' forward pass
    moved = training_bytes(base.model.hf.bert.encoder.layer[-1]) * len(base.dls.train)
    # with a single position hardly any operations are left but keys and values: the weights count
    costs = {'cached, float32': ('float32', top), 'cached, bfloat16, single position': ('bfloat16', 0)}
    n = a.size['texts']
    return [row(k, secs, 'naive, float32', 'samples', n, *c, moved, ceil) for k, c in costs.items()]


def lm(a, ceil):
    import torch
    from fastai.data.core import DataLoaders
    from fastai.text.all import AWD_LSTM, Adam, CrossEntropyLossFlat, LMLearner, awd_lstm_lm_config, get_language_model
    from fastai_tl.all import LayerwiseOptimizer, layer_splitter, seed_everything

    s = a.size
    g = torch.Generator().manual_seed(0)
    shape = s['lm_bs'], s['seq_len'] + 1
    xs = [torch.randint(0, s['vocab'], shape, generator=g).to(a.device) for _ in range(s['lm_batches'])]
    batches = [(x[:, :-1].contiguous(), x[:, 1:].contiguous()) for x in xs]

    def make(ours):
        seed_everything(0)
        data = DataLoaders(batches, batches[:1])
        data.vocab = list(range(s['vocab']))
        model = get_language_model(AWD_LSTM, s['vocab'], config={**awd_lstm_lm_config, **s['lm']}).to(a.device)
        kw = dict(opt_func=Adam)
        if ours:
            kw = dict(opt_func=LayerwiseOptimizer, splitter=layer_splitter(), train_bn=False)
        return quiet(LMLearner(data, model, loss_func=CrossEntropyLossFlat(), metrics=[], **kw))

    base, ours = "fastai's Learner", 'ours, bfloat16, chunked loss'
    learners = {
        base: make(False),
        ours: make(True).to_mixed_precision('bf16', force=True).chunked_loss(),
    }
    secs = interleave({k: (lambda l=l: l.fit(1, 1e-3)) for k, l in learners.items()}, a.rounds, device=a.device)
    sizes = [s['lm']['emb_sz'], *[s['lm']['n_hid']] * (s['lm']['n_layers'] - 1), s['lm']['emb_sz']]
    weights = sum(4 * o * (i + o) for i, o in zip(sizes, sizes[1:])) + s['vocab'] * s['lm']['emb_sz']
    tokens = s['lm_bs'] * s['seq_len'] * s['lm_batches']
    moved = training_bytes(learners[base].model) * s['lm_batches']
    return [row(ours, secs, base, 'tokens', tokens, 'bfloat16', 6 * weights * tokens, moved, ceil)]


def predict(a, ceil):
    import copy
    from transformers import pipeline
    from transformers.utils import logging
    from fastai_tl.all import Predictor

    logging.set_verbosity_error()
    tok, df = texts_of(a)
    learn = classifier(a, tok, df)
    del learn._do_epoch_validate
    ts = df.text.tolist()
    few = sorted(ts, key=len)[:: len(ts) // a.size['few']][: a.size['few']]
    ps = {f'Predictor, {n}': Predictor(learn, p) for n, p in (('float32', 'fp32'), ('bfloat16', 'bf16'))}
    model = copy.deepcopy(learn.model.hf).eval()
    pipe = pipeline('text-classification', model=model, tokenizer=tok, device=a.device, top_k=None)
    through = lambda bs: lambda: pipe(ts, batch_size=bs, truncation=True, max_length=128)
    timed = {bs: min(common.seconds(through(bs), device=a.device) for _ in range(2)) for bs in a.size['pipe']}
    best = min(timed, key=timed.get)
    variants = {
        'learn.predict': lambda: [learn.predict(t) for t in few],
        f'pipeline, batches of {best}': through(best),
        **{k: (lambda p=p: p.predict(ts)) for k, p in ps.items()},
    }
    secs = interleave(variants, a.rounds, device=a.device)
    secs['learn.predict'] = [t * len(ts) / len(few) for t in secs['learn.predict']]
    rows = []
    for k, p in ps.items():
        dtype, width = ('float32', 4) if p.precision == 'fp32' else ('bfloat16', 2)
        costs = dtype, counted(lambda: p.predict(ts)), width * numbers(p.engine.model.parameters())
        rows += [row(k, secs, base, 'texts', len(ts), *costs, ceil) for base in list(secs)[:2]]
    return rows


EXPERIMENTS = dict(finetune=finetune, cache=cache, lm=lm, predict=predict)


COLUMNS = [
    'experiment', 'variant', 'a second:', 'against', 'median ratio (range)', 'best to best', 'operations',
    'least bytes', 'bound by', 'share of the ceiling:',
]


def cells(experiment, r):
    "A row of the printed table"
    costs = [f"{r['operations'] / 1e9:,.3g} G", f"{r['bytes'] / 1e9:,.3g} GB", r['bound'], f"{r['share']:.1%}"]
    rate = f"{r['rate']:,.1f} {r['unit']}"
    return [experiment, r['variant'], rate, r['against'], ranged(r), f"{r['best']:.2f}", *costs]


def page(res):
    "The results as Markdown"
    about, ceil = res['about'], res['ceilings']
    warning = ', sizes of a try: these figures mean nothing' if about['tiny'] else ''
    rates = ' and '.join(f'{ceil[d] / 1e12:.3g} ({d})' for d in ('float32', 'bfloat16'))
    rows = [cells(e, r) for e, rows in res['results'].items() for r in rows]
    torch_version = about['versions']['torch']
    return '\n'.join([
        f"{about['device_name']}, PyTorch {torch_version}, {about['rounds']} rounds{warning}. Measured ceilings:",
        f"products {rates} TFLOP/s, copying {ceil['bytes'] / 1e9:.3g} GB/s.",
        '',
        table(COLUMNS, rows),
        '',
    ])


def main(args=None):
    p = parser(__doc__, 'rounds', 'device', 'json', device='cuda')
    p.add_argument('--only', nargs='+', default=list(EXPERIMENTS), choices=list(EXPERIMENTS))
    p.add_argument('--tiny', action='store_true', help='small sizes, to try the script on a CPU')
    p.add_argument('--md', type=Path, help='also write the table to this file')
    a = p.parse_args(args)
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if a.tiny:
        a.device = 'cpu'
    if a.device == 'cuda' and not torch.cuda.is_available():
        p.error('There is no GPU here: nothing is run. `--tiny` tries the script on a CPU.')
    a.size = TINY if a.tiny else FULL
    about = dict(
        device=a.device,
        device_name=torch.cuda.get_device_name() if a.device == 'cuda' else a.device,
        rounds=a.rounds,
        tiny=a.tiny,
        python=platform.python_version(),
        versions={o: version(o) for o in ('torch', 'fastai', 'transformers')},
    )
    res = dict(about=about, ceilings=ceilings(a), results={})
    for e in a.only:
        res['results'][e] = EXPERIMENTS[e](a, res['ceilings'])
        write_json(a.json, res)
        if a.md:
            a.md.write_text(page(res), encoding='utf-8')
    print(page(res))
    return res


if __name__ == '__main__':
    main()
