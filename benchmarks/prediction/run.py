"""Prediction with a `Predictor`, beside fastai's `learn.predict` and transformers' `pipeline`, in texts a second.

    python benchmarks/prediction/run.py [--only awd minilm] [--texts 1000] [--one 16] [--rounds 5] [--threads N] [--data FILE] [--json FILE]

- awd: an AWD_LSTM classifier (400/1152/3, vocabulary 30,000). One text at a time against `learn.predict` (wanted: 4 times), all texts at once against its rate (wanted: 8 times).
- minilm: MiniLM (the extra `minilm`) with a head for two classes, `max_length` 128. All texts at once against `learn.predict` (wanted: 3.5 times) and against `pipeline` with the best of five batch sizes (wanted: 2.5 times).

`learn.predict` and what reads one text at a time run on `--one` texts whose lengths are spread over those of all; their rates count. Texts come from a table with a column `text`, or are documentation texts that are always there.
What is compared runs in turn, in changing order; the ratio is the median of the rounds' ratios. Parity is printed before: the largest difference of a probability to `get_preds`. Heads have random weights; for what int8 does to accuracy on a tuned model see `--only accuracy`.

- accuracy: MiniLM tuned for `--epochs` epochs on `--texts` rows of a table with `text` and `label`, and `learn.compare_precisions` on as many others."""

import argparse, copy, json, os, statistics as st, time, warnings
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false')
warnings.filterwarnings('ignore')


def interleave(variants, rounds):
    "Seconds of each variant in each round; a first round of those that say so is not counted"
    names, res = list(variants), {n: [] for n in variants}
    for r in range(rounds):
        for n in names[r % len(names) :] + names[: r % len(names)]:
            t = time.perf_counter()
            variants[n]()
            res[n].append(time.perf_counter() - t)
    return res


def table(secs, n, base):
    "Rates, and ratios to `base` round by round"
    rows = {}
    for k, v in secs.items():
        rs = [(b / n[base]) / (t / n[k]) for t, b in zip(v, secs[base])]
        rows[k] = dict(
            rate=st.median(n[k] / t for t in v),
            ratio=st.median(rs),
            low=min(rs),
            high=max(rs),
            best=(min(secs[base]) / n[base]) / (min(v) / n[k]),
        )
    return rows


def show(name, rows, base):
    print(f'\n## {name}\n| | texts a second | times {base}, median (range) | best to best |\n|---|---:|---|---:|')
    for k, r in rows.items():
        print(
            f"| {k} | {r['rate']:.1f} | {r['ratio']:.2f} ({r['low']:.2f} to {r['high']:.2f}) | {r['best']:.2f} |",
            flush=True,
        )


def load_texts(a, n):
    import pandas as pd
    from fastai_tl.all import docstring_corpus, read_table

    df = read_table(a.data) if a.data else docstring_corpus()
    df = df[df.text.str.len() > 0].sample(n, random_state=0).reset_index(drop=True)
    return df.assign(text=df.text.str.replace('<br />', ' '))


def spread(texts, k):
    by = sorted(texts, key=len)
    return by[len(by) // (2 * k) :: len(by) // k][:k]


def quiet(learn, f):
    def g():
        with learn.no_bar(), learn.no_logging():
            return f()

    return g


def parity(learn, texts, preds, precisions):
    import numpy as np

    ref = quiet(learn, lambda: learn.get_preds(dl=learn.dls.test_dl(texts))[0])().numpy()
    res = {p: float(np.abs(preds[p].predict_proba(texts) - ref).max()) for p in precisions}
    print('largest difference of a probability to get_preds:', {k: f'{v:.1e}' for k, v in res.items()}, flush=True)
    assert res['fp32'] < 1e-5
    return res


def predictors(learn, precisions):
    from fastai_tl.all import Predictor

    return {p: Predictor(learn, p) for p in precisions}


def whole_top(learn, precision):
    "A Predictor whose top layer computes all positions, though the head reads one"
    from fastai_tl.all import Predictor

    res = Predictor(learn, precision)
    res.engine.one.__exit__()
    return res


def awd(a):
    from fastai_tl.all import awd_classifier_learner, classifier_dls, texts_vocab, tokenize_texts_once

    ts = load_texts(a, a.texts).text.tolist()
    tok = tokenize_texts_once(ts, progress=False)
    vocab = texts_vocab(tok, min_freq=1)[:30_000]
    n = list(range(40))
    dls = classifier_dls(
        tok,
        ['a', 'b'] * (len(ts) // 2),
        'classification',
        n[:20],
        n[20:],
        vocab + [f'word{i}' for i in range(30_000 - len(vocab))],
    )
    learn = awd_classifier_learner(dls, 'classification', 2, dict(emb_sz=400, n_hid=1152, n_layers=3))
    few, ps = spread(ts, a.one), ('fp32', 'bf16', 'int8')
    preds = predictors(learn, ps)
    print(f'awd: tokens a text {tok.lens.mean():.0f} on average')
    res = dict(parity=parity(learn, few * 2, preds, ps))
    one = {'learn.predict': quiet(learn, lambda: [learn.predict(t) for t in few])} | {
        f'one at a time, {p}': (lambda p=p: [preds[p].predict([t]) for t in few]) for p in ps
    }
    many = {f'all at once, {p}': (lambda p=p: preds[p].predict(ts)) for p in ps}
    one['learn.predict']()
    rows = table(
        interleave(one | many, a.rounds), {k: len(few) for k in one} | {k: len(ts) for k in many}, 'learn.predict'
    )
    show('AWD_LSTM', rows, 'learn.predict')
    return res | dict(rows=rows)


def minilm_learner(df, valid=None, **kw):
    from fastai_tl.all import HFTextDataLoaders, hf_classifier_learner, minilm_folder

    dls = HFTextDataLoaders.from_lists(
        df.text.tolist(), df.label.tolist(), minilm_folder(), valid=valid, max_length=128, bs=16, verbose=False
    )
    return hf_classifier_learner(dls, minilm_folder(), **kw)


def minilm(a):
    import numpy as np, torch
    from transformers import pipeline
    from transformers.utils import logging

    logging.set_verbosity_error()
    df = load_texts(a, a.texts)
    ts = df.text.tolist()
    learn = minilm_learner(df[:100].assign(label=['a', 'b'] * 50))
    few, some, ps = spread(ts, a.one), spread(ts, min(len(ts), 256)), ('fp32', 'bf16', 'int8')
    preds = predictors(learn, ps)
    lens = [r.shape[1] for r in preds['fp32'].engine.encode(ts)]
    print(f'minilm: tokens a text {np.mean(lens):.0f} on average')
    res = dict(parity=parity(learn, some[:64], preds, ps))
    pipe = pipeline(
        'text-classification',
        model=copy.deepcopy(learn.model.hf).eval(),
        tokenizer=learn.tokenizer,
        device='cpu',
        top_k=None,
    )

    def through(bs, texts):
        return lambda: pipe(texts, batch_size=bs, truncation=True, max_length=128)

    np.testing.assert_allclose(
        [{o['label']: o['score'] for o in r}['a'] for r in through(8, few)()],
        preds['fp32'].predict_proba(few)[:, 0],
        atol=1e-5,
    )
    tries = table(
        interleave({str(b): through(b, some[::2]) for b in (1, 4, 8, 16, 32)}, 2),
        {str(b): 1 for b in (1, 4, 8, 16, 32)},
        '1',
    )
    best = int(max(tries, key=lambda b: tries[b]['best']))
    print('best batch size of pipeline:', best)
    v = {'learn.predict': quiet(learn, lambda: [learn.predict(t) for t in few]), 'pipeline': through(best, some)}
    for p in ps[:2]:
        preds[f'{p}, whole top layer'] = whole_top(learn, p)
    many = {f'all at once, {p}': (lambda p=p: preds[p].predict(ts)) for p in preds}
    v['learn.predict']()
    secs, n = (
        interleave(v | many, a.rounds),
        {'learn.predict': len(few), 'pipeline': len(some)} | {k: len(ts) for k in many},
    )
    rows = {b: table(secs, n, b) for b in v}
    for b, r in rows.items():
        show('MiniLM', r, b)
    return res | dict(pipeline_batch=best, rows=rows)


def accuracy(a):
    df = load_texts(a, 2 * a.texts)
    learn = minilm_learner(df, valid=[i >= a.texts for i in range(len(df))])
    learn.to_mixed_precision().single_position().fast_dropout()  # for the time that it spares; what comes out are float32 weights
    quiet(learn, lambda: learn.fit_one_cycle(a.epochs, 1e-4))()
    t = learn.compare_precisions(n=a.texts)
    print(t.round(4).to_string())
    return t.reset_index().to_dict('records')


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--only', nargs='*', default=['awd', 'minilm'])
    p.add_argument('--texts', type=int, default=1000)
    p.add_argument('--one', type=int, default=16)
    p.add_argument('--rounds', type=int, default=5)
    p.add_argument('--threads', type=int)
    p.add_argument('--data')
    p.add_argument('--json', type=Path)
    p.add_argument('--epochs', type=int, default=1, help='of accuracy')
    a = p.parse_args()
    import torch

    if a.threads:
        torch.set_num_threads(a.threads)
    res = {n: dict(awd=awd, minilm=minilm, accuracy=accuracy)[n](a) for n in a.only}
    if a.json:
        a.json.write_text(
            json.dumps(
                dict(
                    threads=torch.get_num_threads(),
                    texts=a.texts,
                    data=Path(a.data).name if a.data else 'docstrings',
                    **res,
                ),
                indent=1,
            )
            + '\n',
            encoding='utf-8',
        )


if __name__ == '__main__':
    main()
