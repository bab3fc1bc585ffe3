"""What `reuse_memory()` saves on a CPU, and what it costs in memory.

    python benchmarks/allocator/run.py [--only lm minilm evaluate predict] [--rounds 5] [--threads 1] [--json FILE]

Each round starts a process without and a process with `reuse_memory()` for each job, in an order that changes from
round to round. A process reports wall-clock, user and system seconds and page faults of the job alone (after one step
to warm up), the highest memory of the process, and losses or scores, which must be the same bit for bit.

- lm: 5 steps of a small AWD_LSTM language model (160/320/2, vocabulary 8,000, batches of 32 x 60).
- minilm: 5 training steps of MiniLM, 16 texts of up to 128 tokens.
- mixed: the same with texts of mixed length up to 256 tokens, in buckets.
- evaluate: `learn.get_preds` of MiniLM on 160 texts.
- predict: `Predictor.predict` of MiniLM, 100 texts at once and then 20 calls with one text."""

import multiprocessing
import platform
import statistics as st
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import offline, parser, ratio, rotated, set_threads, table, write_json

offline()
MODES = ('off', 'on')


def lm_learner():
    "A small language model, and the steps of a run"
    from fastai_tl.all import awd_lm_learner, docstring_corpus, language_model_dls, texts_vocab, tokenize_texts_once

    tokens = tokenize_texts_once(docstring_corpus().text.tolist()[:800], progress=False)
    dls = language_model_dls(tokens, texts_vocab(tokens, min_freq=1, max_vocab=8000), bs=32, seq_len=60)
    return awd_lm_learner(dls, config=dict(emb_sz=160, n_hid=320, n_layers=2), metrics=[]), 5


def texts_and_labels(mixed):
    "Texts of 128 tokens or more, or of mixed length"
    from fastai_tl.all import docstring_corpus

    df = docstring_corpus()
    df = df[df.label.notna()][:200].reset_index(drop=True)
    repeats = [1 + i % 8 if mixed else 16 for i in df.index]
    return df.assign(text=[' '.join([t] * n) for t, n in zip(df.text, repeats)])


def minilm_learner(mixed=False):
    "MiniLM, and the steps of a run"
    from fastai_tl.all import HFTextDataLoaders, hf_classifier_learner, minilm_folder

    folder = minilm_folder()
    kw = dict(bs=16, max_length=256 if mixed else 128, verbose=False)
    dls = HFTextDataLoaders.from_df(texts_and_labels(mixed), folder, **kw)
    return hf_classifier_learner(dls, folder, metrics=[]), 5


def fit(learn, n):
    "Train for `n` steps, and return the losses"
    from fastai.callback.core import Callback, CancelFitException

    class Steps(Callback):
        losses = []

        def after_batch(self):
            self.losses.append(float(self.learn.loss))
            if len(self.losses) == n:
                raise CancelFitException

    steps = Steps()
    steps.losses = []
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-4, cbs=steps)
    return steps.losses


def training(make):
    "A function that trains, after one step to warm up"

    def prepare():
        learn, n = make()
        fit(learn, 1)
        return lambda: fit(learn, n)

    return prepare


def evaluation():
    "A function that evaluates 160 texts"
    learn, _ = minilm_learner()

    def evaluate():
        with learn.no_bar():
            return learn.get_preds(ds_idx=0)[0].flatten().tolist()

    return evaluate


def prediction():
    "A function that predicts 100 texts at once, and then 20 texts one by one"
    from fastai_tl.all import Predictor

    learn, _ = minilm_learner()
    predictor, texts = Predictor(learn), texts_and_labels(True).text.tolist()[:100]
    predictor.scores(texts[:1])

    def predict():
        scores = predictor.scores(texts).flatten().tolist()
        return scores + [o for t in texts[:20] for o in predictor.scores([t]).flatten().tolist()]

    return predict


JOBS = {
    'lm': training(lm_learner),
    'minilm': training(minilm_learner),
    'mixed': training(lambda: minilm_learner(True)),
    'evaluate': evaluation,
    'predict': prediction,
}


def child(job, mode, threads):
    "Run a job in this process; return what it took and gave"
    import resource

    from fastai_tl.all import reuse_memory, seed_everything

    set_threads(threads)
    seed_everything(0)
    work = JOBS[job]()
    before, begin = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    with reuse_memory(mode == 'on') as reuse:
        values = work()
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF)
    figures = dict(
        wall=wall,
        user=after.ru_utime - before.ru_utime,
        system=after.ru_stime - before.ru_stime,
        faults=after.ru_minflt - before.ru_minflt,
        peak_mib=after.ru_maxrss / 1024,
    )
    return dict(figures, on=reuse.is_on, values=values)


def run(job, mode, threads):
    "Run a job in a fork of this process, which has imported everything and computed nothing"
    with multiprocessing.get_context('fork').Pool(1) as pool:
        return pool.apply(child, (job, mode, threads))


def measure(job, rounds, threads):
    "Figures of a job in each round, by mode; fails if the values differ"
    runs = {mode: [] for mode in MODES}
    for i in range(rounds):
        for mode in rotated(MODES, i):
            runs[mode].append(run(job, mode, threads))
    if any(o['values'] != runs['off'][0]['values'] for mode in MODES for o in runs[mode]):
        raise SystemExit(f'{job}: the values differ')
    if not all(o['on'] for o in runs['on']):
        raise SystemExit('`reuse_memory()` does nothing here')
    figures = {m: {k: [o[k] for o in runs[m]] for k in ('wall', 'user', 'system', 'faults', 'peak_mib')} for m in MODES}
    cpu = {m: [u + s for u, s in zip(figures[m]['user'], figures[m]['system'])] for m in MODES}
    return dict(figures, cpu=ratio(cpu['off'], cpu['on']), wall=ratio(figures['off']['wall'], figures['on']['wall']))


def row(job, res):
    "A row of the table in the README"
    def figures(what, form):
        return ' → '.join(form.format(st.median(res[m][what])) for m in MODES)

    ratios = f"{res['cpu']['ratio']:.2f} ({res['cpu']['low']:.2f} to {res['cpu']['high']:.2f})"
    return [job, ratios, figures('user', '{:.1f}'), figures('system', '{:.2f}'), figures('faults', '{:,.0f}'),
            figures('peak_mib', '{:,.0f}')]


def main():
    ap = parser(__doc__, 'rounds', 'threads', 'json', threads=1)
    ap.add_argument('--only', nargs='+', choices=JOBS, default=list(JOBS))
    a = ap.parse_args()
    import fastai_tl.all  # noqa: F401

    about = dict(threads=a.threads, rounds=a.rounds, libc=' '.join(platform.libc_ver()))
    results = {}
    for job in a.only:
        results[job] = measure(job, a.rounds, a.threads)
        write_json(a.json, about | results)
    heads = ['job', 'processor time, ratio (range)', 'user s', 'system s', 'page faults', 'peak MiB']
    print(table(heads, [row(job, res) for job, res in results.items()]))


if __name__ == '__main__':
    main()
