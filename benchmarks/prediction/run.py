"""Texts a second of a `Predictor`, fastai's `learn.predict` and transformers' `pipeline`.

    python benchmarks/prediction/run.py [--only awd minilm] [--texts 1000] [--one 16] [--rounds 5] [--threads N]
                                        [--cpu-time] [--data FILE] [--json FILE]

- awd: an AWD_LSTM classifier (400/1152/3, vocabulary 30,000). One text at a time against `learn.predict` (wanted:
  4 times), all texts at once against its rate (wanted: 8 times).
- minilm: MiniLM (the extra `minilm`) with a head for two classes, `max_length` 128. All texts at once against
  `learn.predict` (wanted: 3.5 times) and against `pipeline` with the best of five batch sizes (wanted: 2.5 times).
- accuracy: MiniLM fine-tuned for `--epochs` epochs on `--texts` rows of a table with `text` and `label`, and
  `learn.compare_precisions` on as many others.

`learn.predict` and the variants that read one text at a time run on `--one` texts, whose lengths are spread over
those of all texts; their rates are compared. Texts come from a table with a column `text`; without `--data`, from
the offline corpus. The variants run in turn, in an order that changes from round to round; the ratio is the median
of the rounds' ratios. Before that, the script prints the largest difference of a probability to `get_preds`. Heads
have random weights; `--only accuracy` shows what int8 does to the accuracy of a fine-tuned model."""

import copy
import statistics as st
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
from common import chosen_clock, interleave, offline, parser, set_threads, write_json

offline()
PRECISIONS = ('fp32', 'bf16', 'int8')
CLOCK = time.perf_counter  # `--cpu-time` replaces it


def rates(secs, n_texts, base):
    "Texts a second of each variant, and ratios to `base` round by round"
    rows = {}
    per_text = {k: [t / n_texts[k] for t in v] for k, v in secs.items()}
    for k, v in per_text.items():
        rows[k] = dict(rate=st.median(1 / t for t in v), **common.ratio(per_text[base], v))
    return rows


def show(name, rows, base):
    cells = [[k, f"{r['rate']:.1f}", common.ranged(r), f"{r['best']:.2f}"] for k, r in rows.items()]
    print(f'\n## {name}')
    print(common.table(['', 'texts a second:', f'times {base}, median (range)', 'best to best:'], cells), flush=True)


def load_texts(a, n):
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
    vocab += [f'word{i}' for i in range(30_000 - len(vocab))]
    labels = ['a', 'b'] * (len(ts) // 2)
    dls = classifier_dls(tok, labels, 'classification', list(range(20)), list(range(20, 40)), vocab)
    learn = awd_classifier_learner(dls, 'classification', 2, dict(emb_sz=400, n_hid=1152, n_layers=3))
    few = spread(ts, a.one)
    preds = predictors(learn, PRECISIONS)
    print(f'awd: tokens a text {tok.lens.mean():.0f} on average')
    res = dict(parity=parity(learn, few * 2, preds, PRECISIONS))
    one = {'learn.predict': quiet(learn, lambda: [learn.predict(t) for t in few])}
    one |= {f'one at a time, {p}': (lambda p=p: [preds[p].predict([t]) for t in few]) for p in PRECISIONS}
    many = {f'all at once, {p}': (lambda p=p: preds[p].predict(ts)) for p in PRECISIONS}
    one['learn.predict']()
    n_texts = {k: len(few) for k in one} | {k: len(ts) for k in many}
    rows = rates(interleave(one | many, a.rounds, warm_up=0, clock=CLOCK), n_texts, 'learn.predict')
    show('AWD_LSTM', rows, 'learn.predict')
    return res | dict(rows=rows)


def minilm_learner(df, valid=None, **kw):
    from fastai_tl.all import HFTextDataLoaders, hf_classifier_learner, minilm_folder

    texts, labels = df.text.tolist(), df.label.tolist()
    options = dict(valid=valid, max_length=128, bs=16, verbose=False)
    dls = HFTextDataLoaders.from_lists(texts, labels, minilm_folder(), **options)
    return hf_classifier_learner(dls, minilm_folder(), **kw)


def minilm(a):
    import numpy as np
    from transformers import pipeline
    from transformers.utils import logging

    logging.set_verbosity_error()
    df = load_texts(a, a.texts)
    ts = df.text.tolist()
    learn = minilm_learner(df[:100].assign(label=['a', 'b'] * 50))
    few = spread(ts, a.one)
    some = spread(ts, min(len(ts), 256))
    preds = predictors(learn, PRECISIONS)
    lens = [r.shape[1] for r in preds['fp32'].engine.encode(ts)]
    print(f'minilm: tokens a text {np.mean(lens):.0f} on average')
    res = dict(parity=parity(learn, some[:64], preds, PRECISIONS))
    model = copy.deepcopy(learn.model.hf).eval()
    pipe = pipeline('text-classification', model=model, tokenizer=learn.tokenizer, device='cpu', top_k=None)

    def through(bs, texts):
        return lambda: pipe(texts, batch_size=bs, truncation=True, max_length=128)

    theirs = [{o['label']: o['score'] for o in r}['a'] for r in through(8, few)()]
    np.testing.assert_allclose(theirs, preds['fp32'].predict_proba(few)[:, 0], atol=1e-5)
    sizes = ('1', '4', '8', '16', '32')
    tries = interleave({b: through(int(b), some[::2]) for b in sizes}, 2, warm_up=0, clock=CLOCK)
    tries = rates(tries, dict.fromkeys(sizes, 1), '1')
    best = int(max(tries, key=lambda b: tries[b]['best']))
    print('best batch size of pipeline:', best)
    peers = {'learn.predict': quiet(learn, lambda: [learn.predict(t) for t in few]), 'pipeline': through(best, some)}
    for p in ('fp32', 'bf16'):
        preds[f'{p}, whole top layer'] = whole_top(learn, p)
    many = {f'all at once, {p}': (lambda p=p: preds[p].predict(ts)) for p in preds}
    peers['learn.predict']()
    secs = interleave(peers | many, a.rounds, warm_up=0, clock=CLOCK)
    n_texts = {'learn.predict': len(few), 'pipeline': len(some)} | {k: len(ts) for k in many}
    rows = {base: rates(secs, n_texts, base) for base in peers}
    for b, r in rows.items():
        show('MiniLM', r, b)
    return res | dict(pipeline_batch=best, rows=rows)


def accuracy(a):
    df = load_texts(a, 2 * a.texts)
    learn = minilm_learner(df, valid=[i >= a.texts for i in range(len(df))])
    learn.to_mixed_precision().single_position().fast_dropout()  # saves time; the trained weights are float32
    quiet(learn, lambda: learn.fit_one_cycle(a.epochs, 1e-4))()
    t = learn.compare_precisions(n=a.texts)
    print(t.round(4).to_string())
    return t.reset_index().to_dict('records')


EXPERIMENTS = dict(awd=awd, minilm=minilm, accuracy=accuracy)


def main():
    p = parser(__doc__, 'rounds', 'threads', 'cpu-time', 'json')
    p.add_argument('--only', nargs='*', default=['awd', 'minilm'], choices=list(EXPERIMENTS))
    p.add_argument('--texts', type=int, default=1000)
    p.add_argument('--one', type=int, default=16)
    p.add_argument('--data', help='a table with a column `text`')
    p.add_argument('--epochs', type=int, default=1, help='epochs of accuracy')
    a = p.parse_args()
    import torch

    global CLOCK
    set_threads(a.threads)
    CLOCK = chosen_clock(a.cpu_time)
    results = {n: EXPERIMENTS[n](a) for n in a.only}
    data = Path(a.data).name if a.data else 'docstrings'
    write_json(a.json, dict(threads=torch.get_num_threads(), texts=a.texts, data=data, **results))


if __name__ == '__main__':
    main()
