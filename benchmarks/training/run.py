"""What training costs, as ratios to other libraries.

    python benchmarks/training/run.py [--only lm classifier memory finetune accuracy overhead padding] [--rounds 5]
                                      [--threads N] [--single] [--cpu-time] [--data FOLDER] [--json FILE]

- lm: tokens a second of an AWD_LSTM language model with all its dropouts (400/1152/3, vocabulary 30,000, batches
  of 32 x 72) in fastai's own Learner, and in `awd_lm_learner` with `chunked_loss()` and `to_mixed_precision()`.
  Wanted: at least 1.5 times.
- classifier: tokens a second of an AWD_LSTM classifier (400/1152/3, texts of up to 400 words, batches of 16), all
  layers trained, in fastai's `text_classifier_learner` and in `awd_classifier_learner`. Wanted: 1.5 times.
- memory: peak memory of the loss of such a batch at a vocabulary of 60,000, full logits against
  `linear_cross_entropy`. Wanted: at most a quarter.
- finetune: samples a second of MiniLM (`max_length` 128, batches of 16), all layers trained, against transformers'
  `Trainer` with its defaults, and with length grouping and bfloat16 (if the processor has it); ours also with
  `fast_dropout()` and, with `--single`, with the single-position top layer. Wanted: at least 2.2 and 1.3 times.
  Prints the accuracy of each after the same epochs.
- accuracy (only if named in `--only`): the same training of `Trainer` and of ours with bfloat16, single-position
  top layer and fast dropout together, on TREC-6 if `--data` has trec6.csv: accuracy of each seed, and samples a
  second.
- overhead: a Learner of our factory against a bare PyTorch loop with the same batches. Wanted: at most 3 % more
  time.
- padding: tokens computed for each real token, with shuffled and with bucketed batches.

IMDb is read from `--data FOLDER` (`imdb.parquet` with the columns text and label, or a folder train/pos,
train/neg, ...); without it, texts of the offline corpus. The variants run in turn, in an order that changes from
round to round; the ratio is the median of the rounds' ratios, with their range, and that of the best rounds."""

import json
import random
import statistics as st
import sys
import time
from itertools import accumulate
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import chosen_clock, interleave, offline, parser, ratio, set_threads, show, write_json

offline()
CLOCK = time.perf_counter  # `--cpu-time` replaces it


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
    from fastai.text.all import AWD_LSTM, CrossEntropyLossFlat, LMLearner, awd_lstm_lm_config, get_language_model, Adam
    from fastai_tl.all import LayerwiseOptimizer, has_bf16, layer_splitter, seed_everything

    dls, batches = lm_data()
    n = sum(x.numel() for x, _ in batches)
    data = fixed(dls, batches)
    config = dict(awd_lstm_lm_config)

    def make(ours=True):
        seed_everything(0)
        model = get_language_model(AWD_LSTM, len(dls.vocab), config=config)
        kw = dict(opt_func=Adam)
        if ours:
            kw = dict(opt_func=LayerwiseOptimizer, splitter=layer_splitter(), train_bn=False)
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
    secs = interleave({k: timed_fit(l, 1e-3) for k, l in learners.items()}, a.rounds, clock=CLOCK)
    after = {k: round(float(l.recorder.values[-1][0]), 2) for k, l in learners.items()}
    print('training loss after these epochs:', after, flush=True)
    return dict(
        {k: ratio(secs['fastai'], v) for k, v in secs.items() if k != 'fastai'},
        tokens_a_second={k: n / min(v) for k, v in secs.items()},
        loss=parity,
        loss_after=after,
    )


def classifier(a, bs=16):
    "An AWD_LSTM classifier on texts of up to 400 words, all layers trained"
    from fastai.text.all import AWD_LSTM, Adam, awd_lstm_clas_config, text_classifier_learner
    from fastai_tl.all import awd_classifier_learner, classifier_dls, has_bf16, seed_everything
    from fastai_tl.all import texts_vocab, tokenize_texts_once

    train, valid, labels = texts_and_labels(a, a.samples, bs)
    texts = [' '.join(text.split()[:400]) for text in [*train.text, *valid.text]]
    tok = tokenize_texts_once(texts, progress=False)
    classes = [str(label) for label in [*train.label, *valid.label]]
    vocab = texts_vocab(tok, min_freq=1)
    rows = list(range(len(texts)))
    dls = classifier_dls(tok, classes, 'classification', rows[: len(train)], rows[len(train) :], vocab, bs=bs)
    sizes = dict(emb_sz=400, n_hid=1152, n_layers=3)

    def theirs():
        seed_everything(0)
        config = dict(awd_lstm_clas_config, **sizes)
        options = dict(opt_func=Adam, pretrained=False, config=config, metrics=[], seq_len=72)
        return text_classifier_learner(dls, AWD_LSTM, n_out=len(labels), **options)

    def ours():
        seed_everything(0)
        return awd_classifier_learner(dls, 'classification', len(labels), sizes, metrics=[])

    learners = {'fastai': theirs(), 'ours, float32': ours()}
    if has_bf16():
        learners |= {'fastai, to_mixed_precision': theirs().to_mixed_precision()}
        learners |= {'ours, bfloat16': ours().to_mixed_precision()}
    for learn in learners.values():
        learn._do_epoch_validate = lambda *o, **k: None  # training alone is timed
    secs = interleave({k: timed_fit(l, 1e-3) for k, l in learners.items()}, a.rounds, clock=CLOCK)
    res = {k: ratio(secs['fastai'], v) for k, v in secs.items() if k != 'fastai'}
    n_words = sum(tok.lens[: len(train)].tolist())
    return dict(res, tokens_a_second={k: n_words / min(v) for k, v in secs.items()})


def peak_memory(f):
    "Peak of the bytes that `f` allocates, from the allocations and releases that PyTorch's profiler sees"
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
    x = torch.randn(rows, units)
    w = torch.randn(vocab, units) * 0.05
    b = torch.zeros(vocab)
    y = torch.randint(0, vocab, (rows,))
    for o in (x, w, b):
        o.requires_grad_()
    loss = CrossEntropyLossFlat()
    res, grads = {}, {}

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
        col = next((c for c in ('split', 'set', 'is_valid') if c in df), None)
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
    name = 'IMDb' if a.data else 'offline corpus'
    print(f'{name}: {len(train)} texts to train on, {len(valid)} to test, {len(labels)} classes', flush=True)
    return train, valid, labels


def frame(train, valid):
    import pandas as pd

    parts = [p[['text', 'label']].assign(valid=v) for p, v in ((train, False), (valid, True))]
    df = pd.concat(parts, ignore_index=True)
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
            truth = [labels.index(str(valid.label.iloc[j])) for j in k]
            right += sum(int(p) == t for p, t in zip(model(**b).logits.argmax(-1), truth))
    return right / len(valid)


TRAINERS = {'Trainer': {}, 'Trainer, grouped, bf16': dict(train_sampling_strategy='group_by_length', bf16=True)}
FLOAT32_TRAINERS = {'Trainer': {}, 'Trainer, grouped': dict(train_sampling_strategy='group_by_length')}


def finetune(a, bs=16):
    import tempfile
    import transformers
    from fastai_tl.all import HFTextDataLoaders, has_bf16, hf_classifier_learner, minilm_folder, seed_everything

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    train, valid, labels = texts_and_labels(a, a.samples, a.test)
    tok = transformers.AutoTokenizer.from_pretrained(minilm_folder())
    df = frame(train, valid)
    made, models = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        auto = transformers.AutoModelForSequenceClassification
        half = has_bf16()
        trainers = TRAINERS if half else FLOAT32_TRAINERS
        for name, kw in trainers.items():
            seed_everything(0)
            models[name] = auto.from_pretrained(minilm_folder(), num_labels=len(labels))
            made[name] = trainer(models[name], tok, train, labels, bs, folder, **kw).train

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

        wanted = {'ours, float32': (False,), 'ours, float32, fast dropout': (False, False, True)}
        if half:
            wanted |= {'ours, bfloat16': (True,), 'ours, bfloat16, fast dropout': (True, False, True)}
        if a.single and not half:
            wanted |= {
                'ours, float32, single position': (False, True),
                'ours, float32, single position, fast dropout': (False, True, True),
            }
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
        secs = interleave(made, a.rounds, clock=CLOCK)
        acc = {k: accuracy_of(m, tok, valid, labels) for k, m in models.items()}
    print(f'accuracy after {a.rounds + 1} epochs:', {k: round(v, 3) for k, v in acc.items()}, flush=True)
    res = {
        f'{k}, against {base}': ratio(secs[base], v)
        for base in trainers
        for k, v in secs.items()
        if k.startswith('ours')
    }
    return dict(res, samples_a_second={k: len(train) / min(v) for k, v in secs.items()}, accuracy=acc)


# --- accuracy ---


def train_and_test(a):
    "Training texts, test texts and labels: TREC-6 with its own split if the folder has it, else as for fine-tuning"
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
    import tempfile
    import transformers
    from fastai.callback.schedule import ParamScheduler, SchedLin
    from fastai_tl.all import HFTextDataLoaders, has_bf16, hf_classifier_learner, minilm_folder, seed_everything

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    train, valid, labels = train_and_test(a)
    tok = transformers.AutoTokenizer.from_pretrained(minilm_folder())
    df = frame(train, valid)
    half = has_bf16()

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

    runs = {'Trainer': theirs}
    if half:
        runs['Trainer, grouped, bf16'] = lambda s: theirs(s, **TRAINERS['Trainer, grouped, bf16'])
    runs |= {'ours, plain': lambda s: ours(s, False), 'ours, everything': lambda s: ours(s, True)}
    rows = {k: [] for k in runs if not a.runs or k in a.runs}
    for seed in range(1, a.seeds + 1):
        for k in rows:
            model, secs = runs[k](seed)
            rate = epochs * len(train) / secs
            rows[k].append(dict(accuracy=accuracy_of(model, tok, valid, labels), samples_a_second=rate))
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
    import torch
    import torch.nn.functional as F
    from fastai.data.core import DataLoaders
    from fastai_tl.all import HFTextDataLoaders, hf_classifier_learner, minilm_folder, seed_everything

    train, valid, labels = texts_and_labels(a, bs * batches, 64)
    df = frame(train, valid)
    dls = HFTextDataLoaders.from_df(df, minilm_folder(), valid_col='valid', max_length=128, bs=bs, verbose=False)

    def make():
        seed_everything(0)
        return hf_classifier_learner(dls, minilm_folder())

    learn, model = make(), make().model
    same = list(dls.train)
    learn.dls = DataLoaders(same, same[:1])
    xs = [(x.as_subclass(torch.Tensor), y.as_subclass(torch.Tensor)) for x, y in same]
    opt = torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True)

    def bare():
        model.train()
        for x, y in xs:
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            opt.step()
            opt.zero_grad(set_to_none=True)
            loss.item()

    secs = interleave({'bare': bare, 'Learner': timed_fit(learn, 5e-5)}, max(a.rounds, 7), clock=CLOCK)
    r = ratio(secs['Learner'], secs['bare'])
    return {'Learner, time in that of a bare loop': r}


def padding(a, bs=16):
    from fastai_tl.all import HFTextDataLoaders, minilm_folder

    train, valid, _ = texts_and_labels(a, 2000, 64)
    df = frame(train, valid)
    dls = HFTextDataLoaders.from_df(df, minilm_folder(), valid_col='valid', max_length=128, bs=bs, verbose=False)
    lens = list(dls.train.res)
    rng = random.Random(0)
    order = rng.sample(range(len(lens)), len(lens))
    batches = [order[i : i + bs] for i in range(0, len(order), bs)]
    shuffled = sum(len(batch) * max(lens[j] for j in batch) for batch in batches)
    got = [(x.shape[0] * x.shape[-1], int((x[:, 0] >= 0).sum())) for x, _ in dls.train]
    factors = dict(
        shuffled=shuffled / sum(lens),
        ours=sum(computed for computed, _ in got) / sum(real for _, real in got),
        to_max_length=128 * len(lens) / sum(lens),
    )
    return dict(factor=factors)


EXPERIMENTS = dict(
    lm=lm,
    classifier=classifier,
    memory=memory,
    finetune=finetune,
    accuracy=accuracy,
    overhead=overhead,
    padding=padding,
)


def main():
    p = parser(__doc__, 'rounds', 'threads', 'cpu-time', 'json', seeds=2)
    p.add_argument('--only', nargs='*', default=[e for e in EXPERIMENTS if e != 'accuracy'], choices=list(EXPERIMENTS))
    p.add_argument('--samples', type=int, default=128, help='texts of an epoch of fine-tuning')
    p.add_argument('--test', type=int, default=200)
    p.add_argument('--single', action='store_true', help='also with the single-position top layer')
    p.add_argument('--seeds', type=int, help='seeds of accuracy')
    p.add_argument('--runs', nargs='*', help='only these runs of ours in finetune, and of all in accuracy')
    p.add_argument('--data', type=Path)
    a = p.parse_args()
    import torch

    set_threads(a.threads)
    globals()['CLOCK'] = chosen_clock(a.cpu_time)
    results = {}
    for name in a.only:
        results[name] = EXPERIMENTS[name](a)
        show(name, results[name], width=40, digits=5)
    if a.json:
        before = json.loads(a.json.read_text(encoding='utf-8')) if a.json.exists() else {}
        about = dict(
            torch=torch.__version__,
            threads=torch.get_num_threads(),
            seconds='of the processor' if a.cpu_time else 'of the clock',
        )
        write_json(a.json, {**before, **about, **results}, indent=2)


if __name__ == '__main__':
    main()
