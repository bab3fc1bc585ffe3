"""What training costs, side by side, in ratios.

    python benchmarks/training/run.py [--only lm memory finetune accuracy overhead padding] [--rounds 5] [--threads N] [--single] [--cpu-time] [--data FOLDER] [--json FILE]

- lm: tokens a second of an AWD_LSTM language model with all its dropouts (400/1152/3, vocabulary 30,000, batches of 32 x 72) in fastai's own Learner, and in `awd_lm_learner`
  with `chunked_loss()` and `to_mixed_precision()`. Wanted: at least 1.5 times.
- memory: the most that the loss of such a batch takes at a vocabulary of 60,000, full logits beside `linear_cross_entropy`. Wanted: at most a quarter.
- finetune: samples a second of MiniLM (`max_length` 128, batches of 16), all layers trained, against transformers' `Trainer` with its defaults, and with length grouping and bfloat16; ours also with `fast_dropout()` and, with `--single`, with the single-position top layer. Wanted: at least 2.2 and
  1.3 times. The accuracy of each after the same epochs is printed.
- accuracy (only when asked for): the same training of `Trainer` and of ours with bfloat16, single-position top layer and fast dropout together, on TREC-6 where `--data` has trec6.csv: accuracy of each seed, and samples a second.
- overhead: a Learner of our factory against a bare PyTorch loop with the same batches. Wanted: at most 3 %.
- padding: tokens that are computed for each that is there, shuffled and bucketed.

IMDb is read from `--data FOLDER` (`imdb.parquet` with the columns text and label, or a folder train/pos, train/neg, ...); without it, texts of the offline corpus. What is compared runs in turn, in changing order; the ratio is the median
of the rounds' ratios, with their range, and that of the best rounds."""

import argparse, json, os, random, statistics as st, time, warnings
from itertools import accumulate
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false')
warnings.filterwarnings('ignore')


CLOCK = time.perf_counter


def interleave(variants, rounds):
    "Seconds of each variant in each round, as the variant says or by the clock; a first round is not counted"
    names, res = list(variants), {n: [] for n in variants}
    for r in range(rounds + 1):
        for n in names[r % len(names) :] + names[: r % len(names)]:
            t = CLOCK()
            said = variants[n]()
            t = said or CLOCK() - t
            if r:
                res[n].append(t)
    return res


def ratio(base, other):
    "Median, lowest and highest ratio of the rounds, and of the best rounds"
    rs = [b / o for b, o in zip(base, other)]
    return dict(ratio=st.median(rs), low=min(rs), high=max(rs), best=min(base) / min(other))


def timed_fit(learn, lr):
    "A function that trains an epoch and returns the seconds of its training part"
    from fastai.callback.core import Callback

    class Clock(Callback):
        order = -100

        def before_train(self):
            self.begin = CLOCK()

        def after_train(self):
            self.seconds = CLOCK() - self.begin

    learn.add_cb(Clock())

    def run():
        with learn.no_bar(), learn.no_logging():
            learn.fit(1, lr)
        return learn.clock.seconds

    return run


# --- language model ---


def lm_data(vocab=30_000, bs=32, seq_len=72, batches=2):
    from fastai_tl.all import docstring_corpus, language_model_dls, texts_vocab, tokenize_texts_once

    tok = tokenize_texts_once(docstring_corpus().text.tolist()[:1500], progress=False)
    words = texts_vocab(tok, min_freq=1)
    words = words + [f'word{i}' for i in range(vocab - len(words))]
    dls = language_model_dls(tok, words, bs=bs, seq_len=seq_len)
    xs = [b for b, _ in zip(dls.train, range(batches))]
    assert all(x.shape == (bs, seq_len) for x, _ in xs)
    return dls, xs


def fixed(dls, batches):
    "DataLoaders that give the same batches in each epoch and validate on the first"
    from fastai.data.core import DataLoaders

    res = DataLoaders(batches, batches[:1])
    res.vocab = dls.vocab
    return res


def lm(a):
    import torch
    from fastai.text.all import AWD_LSTM, CrossEntropyLossFlat, LMLearner, awd_lstm_lm_config, get_language_model, Adam
    from fastai_tl.all import LayerwiseOptimizer, has_bf16, layer_splitter, seed_everything

    dls, batches = lm_data()
    n, data = sum(x.numel() for x, _ in batches), fixed(dls, batches)
    config = dict(awd_lstm_lm_config)

    def make(ours=True, **kw):
        seed_everything(0)
        model = get_language_model(AWD_LSTM, len(dls.vocab), config=config)
        kw = (
            dict(opt_func=LayerwiseOptimizer, splitter=layer_splitter(), train_bn=False, **kw)
            if ours
            else dict(opt_func=Adam)
        )
        return LMLearner(data, model, loss_func=CrossEntropyLossFlat(), metrics=[], **kw)

    learners = {'fastai': make(False), 'ours, float32': make(), 'ours, float32, chunked': make().chunked_loss()}
    if has_bf16():
        learners |= {
            'fastai, to_mixed_precision': make(False).to_mixed_precision(),
            'ours, bfloat16, chunked': make().to_mixed_precision().chunked_loss(),
        }
    parity = {}
    for k, l in learners.items():
        with l.no_bar(), l.no_logging():
            parity[k] = float(l.validate()[0])
    print('loss of the same batch, no dropout:', {k: round(v, 5) for k, v in parity.items()}, flush=True)
    secs = interleave({k: timed_fit(l, 1e-3) for k, l in learners.items()}, a.rounds)
    after = {k: round(float(l.recorder.values[-1][0]), 2) for k, l in learners.items()}
    print('training loss after these epochs:', after, flush=True)
    return dict(
        {k: ratio(secs['fastai'], v) for k, v in secs.items() if k != 'fastai'},
        tokens_a_second={k: n / min(v) for k, v in secs.items()},
        loss=parity,
        loss_after=after,
    )


def peak_memory(f):
    "Bytes that `f` has at one time at most, over what there was before: each allocation and release that PyTorch's profiler sees"
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        f()
    events = sorted(
        (e for e in p.profiler.kineto_results.events() if e.name() == '[memory]'), key=lambda e: e.start_ns()
    )
    return max(accumulate(e.nbytes() for e in events), default=0)


def memory(a, vocab=60_000, rows=32 * 72, units=400):
    import torch
    from fastai.losses import CrossEntropyLossFlat
    from fastai_tl.all import LazyLogits, has_bf16

    torch.manual_seed(0)
    x, w, b, y = (
        torch.randn(rows, units),
        torch.randn(vocab, units) * 0.05,
        torch.zeros(vocab),
        torch.randint(0, vocab, (rows,)),
    )
    for o in (x, w, b):
        o.requires_grad_()
    loss, res, grads = CrossEntropyLossFlat(), {}, {}

    def run(lazily, half):
        for o in (x, w, b):
            o.grad = None
        with torch.autocast('cpu', torch.bfloat16, enabled=half):
            z = LazyLogits(x, w, b) if lazily else torch.nn.functional.linear(x, w, b)
            l = loss(z.float(), y)
        del z
        l.backward()
        grads[lazily, half] = [l.detach(), *[o.grad for o in (x, w, b)]]

    for half in (False, True)[: 1 + has_bf16()]:
        full, lean = (peak_memory(lambda: run(k, half)) for k in (False, True))
        apart = max(((p - q).norm() / q.norm()).item() for p, q in zip(grads[True, half], grads[False, half]))
        res['bfloat16' if half else 'float32'] = dict(
            full_mb=full / 1e6, chunked_mb=lean / 1e6, share=lean / full, largest_relative_difference=apart
        )
    return res


# --- fine-tuning ---


def texts_and_labels(a, n_train, n_valid):
    "IMDb, or two classes of the offline corpus"
    import pandas as pd

    if a.data and (f := a.data / 'imdb.parquet').exists():
        df = pd.read_parquet(f)
        col = (
            next(c for c in ('split', 'set', 'is_valid') if c in df)
            if any(c in df for c in ('split', 'set', 'is_valid'))
            else None
        )
        held = None if col is None else (df[col].astype(str).str.lower().isin(('test', 'valid', 'true')))
        df = df.rename(columns={c: 'label' for c in ('sentiment', 'y') if c in df and 'label' not in df})
        parts = (df, df) if held is None else (df[~held], df[held])
    elif a.data:
        from fastai_tl.data.tables import read_folder

        df = read_folder(a.data, label_from_parent=True)
        top = df.file.map(lambda f: Path(f).parts[0])
        parts = df[top == 'train'], df[top == 'test']
    else:
        from fastai_tl.all import docstring_corpus

        df = docstring_corpus()
        parts = df[df.split == 'train'], df[df.split != 'train']
    parts = [p.dropna(subset='label') for p in parts]
    train = parts[0].sample(n_train, random_state=0)
    valid = parts[1].drop(train.index, errors='ignore').sample(n_valid, random_state=0)
    labels = sorted(set(train.label.astype(str)))
    print(
        f"{'IMDb' if a.data else 'offline corpus'}: {len(train)} texts to train on, {len(valid)} to test, {len(labels)} classes",
        flush=True,
    )
    return train, valid, labels


def frame(train, valid):
    import pandas as pd

    df = pd.concat(
        [train[['text', 'label']].assign(valid=False), valid[['text', 'label']].assign(valid=True)], ignore_index=True
    )
    df['label'] = df.label.astype(str)
    return df


def trainer(model, tok, train, labels, bs, folder, epochs=1, lr=5e-5, **kw):
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    ids = tok(list(train.text), truncation=True, max_length=128)['input_ids']
    ds = [dict(input_ids=i, attention_mask=[1] * len(i), label=labels.index(str(l))) for i, l in zip(ids, train.label)]
    args = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        per_device_train_batch_size=bs,
        num_train_epochs=epochs,
        learning_rate=lr,
        report_to='none',
        save_strategy='no',
        logging_strategy='no',
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **kw,
    )
    return Trainer(model=model, args=args, train_dataset=ds, data_collator=DataCollatorWithPadding(tok))


def accuracy_of(model, tok, valid, labels):
    import torch

    right = 0
    model.eval()
    with torch.no_grad():
        order = sorted(range(len(valid)), key=lambda i: len(valid.text.iloc[i]))
        for i in range(0, len(order), 32):
            k = order[i : i + 32]
            b = tok([valid.text.iloc[j] for j in k], truncation=True, max_length=128, padding=True, return_tensors='pt')
            right += sum(
                int(p) == labels.index(str(valid.label.iloc[j])) for p, j in zip(model(**b).logits.argmax(-1), k)
            )
    return right / len(valid)


def finetune(a, bs=16):
    import tempfile, torch, transformers
    from fastai_tl.all import HFTextDataLoaders, has_bf16, hf_classifier_learner, minilm_folder, seed_everything

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    train, valid, labels = texts_and_labels(a, a.samples, a.test)
    tok = transformers.AutoTokenizer.from_pretrained(minilm_folder())
    df, made, models = frame(train, valid), {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, kw in {
            'Trainer': {},
            'Trainer, grouped, bf16': dict(train_sampling_strategy='group_by_length', bf16=True),
        }.items():
            seed_everything(0)
            models[name] = transformers.AutoModelForSequenceClassification.from_pretrained(
                minilm_folder(), num_labels=len(labels)
            )
            made[name] = lambda t=trainer(models[name], tok, train, labels, bs, folder, **kw): [t.train(), None][1]

        def ours(half, single=False, fast=False):
            seed_everything(0)
            dls = HFTextDataLoaders.from_df(df, tok, valid_col='valid', max_length=128, bs=bs, verbose=False)
            learn = hf_classifier_learner(dls, minilm_folder(), metrics=[])
            if half:
                learn.to_mixed_precision()
            if single:
                learn.single_position()
            if fast:
                learn.fast_dropout()
            return learn

        half = has_bf16()
        wanted = {'ours, float32': (False,), 'ours, float32, fast dropout': (False, False, True)}
        if half:
            wanted |= {'ours, bfloat16': (True,), 'ours, bfloat16, fast dropout': (True, False, True)}
        if half and a.single:
            wanted |= {
                'ours, bfloat16, single position': (True, True),
                'ours, bfloat16, single position, fast dropout': (True, True, True),
            }
        for name, args in wanted.items():
            if a.runs and name not in a.runs:
                continue
            learn = ours(*args)
            models[name], made[name] = learn.model.hf, timed_fit(learn, slice(1e-5, 5e-5))
        secs = interleave(made, a.rounds)
        acc = {k: accuracy_of(m, tok, valid, labels) for k, m in models.items()}
    print(f'accuracy after {a.rounds + 1} epochs:', {k: round(v, 3) for k, v in acc.items()}, flush=True)
    res = {
        f'{k}, against {base}': ratio(secs[base], v)
        for base in ('Trainer', 'Trainer, grouped, bf16')
        for k, v in secs.items()
        if k.startswith('ours')
    }
    return dict(res, samples_a_second={k: len(train) / min(v) for k, v in secs.items()}, accuracy=acc)


# --- accuracy ---


def train_and_test(a):
    "Texts to train on, texts to test on, and the labels: TREC-6 (its own split) where the folder has it, else as for fine-tuning"
    import pandas as pd

    if not (a.data and (f := a.data / 'trec6.csv').exists()):
        return texts_and_labels(a, a.samples, a.test)
    df = pd.read_csv(f)
    parts = [df[df.split == s] for s in ('train', 'test')]
    parts = [p.sample(min(n, len(p)), random_state=0) for p, n in zip(parts, (a.samples, a.test))]
    print(f'TREC-6: {len(parts[0])} questions to train on, {len(parts[1])} to test', flush=True)
    return *parts, sorted(set(df.label))


def accuracy(a, bs=16, lr=1e-4, epochs=3):
    "The same texts, epochs, batch size, rate and schedule (linear to 0), seed after seed"
    import tempfile, torch, transformers
    from fastai.callback.schedule import ParamScheduler, SchedLin
    from fastai_tl.all import HFTextDataLoaders, has_bf16, hf_classifier_learner, minilm_folder, seed_everything

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    train, valid, labels = train_and_test(a)
    tok, df, half = transformers.AutoTokenizer.from_pretrained(minilm_folder()), frame(train, valid), has_bf16()

    def theirs(seed, **kw):
        seed_everything(seed)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(minilm_folder(), num_labels=len(labels))
        with tempfile.TemporaryDirectory() as folder:
            t = trainer(model, tok, train, labels, bs, folder, epochs=epochs, lr=lr, seed=seed, **kw)
            begin = CLOCK()
            t.train()
        return model, CLOCK() - begin

    def ours(seed, fast):
        seed_everything(seed)
        dls = HFTextDataLoaders.from_df(df, tok, valid_col='valid', max_length=128, bs=bs, verbose=False)
        learn = hf_classifier_learner(dls, minilm_folder(), metrics=[])
        learn._do_epoch_validate = lambda *o, **k: None  # training alone is timed, on both sides
        if fast:
            (learn.to_mixed_precision() if half else learn).single_position().fast_dropout()
        begin = CLOCK()
        with learn.no_bar(), learn.no_logging():
            learn.fit(epochs, lr, cbs=ParamScheduler({'lr': SchedLin(lr, 0)}))
        return learn.model.hf, CLOCK() - begin

    runs = {
        'Trainer': theirs,
        **(
            {'Trainer, grouped, bf16': lambda s: theirs(s, train_sampling_strategy='group_by_length', bf16=True)}
            if half
            else {}
        ),
        'ours, plain': lambda s: ours(s, False),
        'ours, everything': lambda s: ours(s, True),
    }
    rows = {k: [] for k in runs if not a.runs or k in a.runs}
    for seed in range(1, a.seeds + 1):
        for k in rows:
            model, secs = runs[k](seed)
            rows[k].append(
                dict(accuracy=accuracy_of(model, tok, valid, labels), samples_a_second=epochs * len(train) / secs)
            )
            print(f'seed {seed}: {k:24}', {i: round(o, 4) for i, o in rows[k][-1].items()}, flush=True)
    return {
        k: dict(
            accuracy=st.mean(o['accuracy'] for o in v),
            samples_a_second=st.median(o['samples_a_second'] for o in v),
            **{f'accuracy of seed {i + 1}': o['accuracy'] for i, o in enumerate(v)},
        )
        for k, v in rows.items()
    }


# --- the loop ---


def overhead(a, bs=16, batches=12):
    import torch, torch.nn.functional as F
    from fastai.data.core import DataLoaders
    from fastai_tl.all import (
        HFTextDataLoaders,
        LayerwiseOptimizer,
        hf_classifier_learner,
        minilm_folder,
        seed_everything,
    )

    train, valid, labels = texts_and_labels(a, bs * batches, 64)
    dls = HFTextDataLoaders.from_df(
        frame(train, valid), minilm_folder(), valid_col='valid', max_length=128, bs=bs, verbose=False
    )

    def make():
        seed_everything(0)
        return hf_classifier_learner(dls, minilm_folder())

    learn, other, same = make(), make(), list(dls.train)
    learn.dls = DataLoaders(same, same[:1])
    model, xs = other.model, [(x.as_subclass(torch.Tensor), y.as_subclass(torch.Tensor)) for x, y in same]
    opt = torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True)

    def bare():
        model.train()
        for x, y in xs:
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            opt.step()
            opt.zero_grad(set_to_none=True)
            loss.item()

    secs = interleave({'bare': bare, 'Learner': timed_fit(learn, 5e-5)}, max(a.rounds, 7))
    r = ratio(secs['Learner'], secs['bare'])
    return {'Learner, time in that of a bare loop': r}


def padding(a, bs=16):
    from fastai_tl.all import HFTextDataLoaders, minilm_folder

    train, valid, labels = texts_and_labels(a, 2000, 64)
    dls = HFTextDataLoaders.from_df(
        frame(train, valid), minilm_folder(), valid_col='valid', max_length=128, bs=bs, verbose=False
    )
    lens = list(dls.train.res)
    rng = random.Random(0)
    order = rng.sample(range(len(lens)), len(lens))
    shuffled = sum(
        len(k) * max(lens[j] for j in k) for k in (order[i : i + bs] for i in range(0, len(order), bs))
    ) / sum(lens)
    got = [(x.shape[0] * x.shape[-1], int((x[:, 0] >= 0).sum())) for x, _ in dls.train]
    return dict(
        factor=dict(
            shuffled=shuffled,
            ours=sum(a for a, _ in got) / sum(b for _, b in got),
            to_max_length=128 * len(lens) / sum(lens),
        )
    )


EXPERIMENTS = dict(lm=lm, memory=memory, finetune=finetune, accuracy=accuracy, overhead=overhead, padding=padding)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--only', nargs='*', default=[e for e in EXPERIMENTS if e != 'accuracy'], choices=list(EXPERIMENTS))
    p.add_argument('--rounds', type=int, default=5)
    p.add_argument('--threads', type=int)
    p.add_argument('--samples', type=int, default=128, help='texts of an epoch of fine-tuning')
    p.add_argument('--test', type=int, default=200)
    p.add_argument('--single', action='store_true', help='also with the single-position top layer')
    p.add_argument(
        '--cpu-time',
        action='store_true',
        help='count the seconds of the processor instead of those of the clock: with one thread, what a machine with other work beside it does not disturb',
    )
    p.add_argument('--seeds', type=int, default=2, help='of accuracy')
    p.add_argument('--runs', nargs='*', help='only these runs of ours in finetune, and of all in accuracy')
    p.add_argument('--data', type=Path)
    p.add_argument('--json', type=Path)
    a = p.parse_args()
    import torch

    if a.threads:
        torch.set_num_threads(a.threads)
    if a.cpu_time:
        if torch.get_num_threads() != 1:
            p.error('--cpu-time needs --threads 1: it adds up the seconds of all threads')
        globals()['CLOCK'] = time.process_time
    res = {}
    for name in a.only:
        res[name] = EXPERIMENTS[name](a)
        for k, v in res[name].items():
            print(
                f'{name:10} {k:40}',
                f"{v['ratio']:.2f} ({v['low']:.2f} to {v['high']:.2f}; best against best {v['best']:.2f})"
                if 'ratio' in v
                else {i: round(o, 5) for i, o in v.items()},
                flush=True,
            )
    if a.json:
        old = json.loads(a.json.read_text(encoding='utf-8')) if a.json.exists() else {}
        a.json.write_text(
            json.dumps(
                {
                    **old,
                    'torch': torch.__version__,
                    'threads': torch.get_num_threads(),
                    'seconds': 'of the processor' if a.cpu_time else 'of the clock',
                    **res,
                },
                indent=2,
            )
            + '\n',
            encoding='utf-8',
        )


if __name__ == '__main__':
    main()
