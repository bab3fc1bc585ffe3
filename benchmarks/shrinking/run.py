"""Shrinking: a fine-tuned MiniLM, and smaller ones that `learn.shrink` makes of it and that learn its scores.

    pip install "fastai_tl[minilm]"
    python benchmarks/shrinking/run.py --data FOLDER --out FOLDER [--set trec6] [--labels 1000] [--seeds 3]
                                       [--cuts layers3 layers4_ffn50] [--json FILE]

`--data` holds en/trec6.csv or en/imdb.parquet (text, label, split). A seed draws `--labels` texts with labels to train
on, `--valid` with labels for validation, and `--unlabelled` more texts without labels. The large model is MiniLM (6
layers) with `fit_transfer`. Each cut is `learn.shrink(...)`, which chooses layers by the loss of the validation rows
and units by the training rows, then `learn.distill_into` with all texts and `fit_transfer`. No decision uses the test
texts: settings are fixed, and the weights are those after the last epoch.

- layers3, layers2: half of the layers, a third of them
- ffn50: half of the feed-forward units of each layer
- layers4_ffn50: four layers with half of their feed-forward units

Ways: `cut` is the accuracy before the smaller model is trained, `labels` after training with the labels alone, for as
many steps, `distilled` after training with the scores. Rates are from processor time of a `Predictor` on the test
texts, in turn. Finished runs are kept in --out, a file for each seed; the same command goes on, and `--seed N` runs one
seed, so that seeds can run at the same time. `--int8` also compares the decisions of ONNX Runtime in int8 and in
float32. Prints a Markdown table."""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common

common.offline()
import numpy as np
import pandas as pd

CUTS = dict(
    layers3=('3 of 6 layers', dict(layers=3)),
    layers2=('2 of 6 layers', dict(layers=2)),
    ffn50=('half of the feed-forward units', dict(ffn=0.5)),
    layers4_ffn50=('4 of 6 layers, half of their feed-forward units', dict(layers=4, ffn=0.5)),
)
WAYS = ('cut', 'labels', 'distilled', 'states')


def parse():
    ap = common.parser(__doc__, 'data', 'seeds', 'threads', 'rounds', 'json', threads=1)
    ap.add_argument('--out', default='shrinking')
    ap.add_argument('--set', default='trec6', choices=['trec6', 'imdb'])
    ap.add_argument('--labels', type=int, default=1000, help='texts with labels to train on')
    ap.add_argument('--valid', type=int, default=300, help='texts with labels that choose the layers')
    ap.add_argument('--unlabelled', type=int, help='number of texts without labels; default: all others')
    ap.add_argument('--test', type=int, help='number of test texts; default: all')
    ap.add_argument('--max-length', type=int, default=128)
    ap.add_argument('--cuts', nargs='+', default=['layers3', 'layers4_ffn50'], choices=list(CUTS))
    ap.add_argument('--ways', nargs='+', default=['cut', 'distilled'], choices=WAYS)
    ap.add_argument('--epochs', type=int, default=4, help='epochs of a distillation')
    ap.add_argument('--recipe', default='auto', help='recipe of `fit_transfer` for the smaller models')
    ap.add_argument('--states', type=float, default=100.0, help='weight of the distance of the states')
    ap.add_argument('--int8', action='store_true', help='also the large model with ONNX Runtime, int8 and float32')
    ap.add_argument('--seed', type=int, help='only this seed, without rates')
    ap.add_argument('--summary', action='store_true', help='only the table of the runs in --out')
    return ap.parse_args()


def load(a):
    "Training and test rows"
    if a.set == 'trec6':
        df = pd.read_csv(Path(a.data) / 'en' / 'trec6.csv')
    else:
        df = pd.read_parquet(Path(a.data) / 'en' / 'imdb.parquet').query('split != "unsup"')
        df = df.assign(text=df.text.str.replace('<br />', ' '))
    df = df.sample(frac=1, random_state=0)
    test = df[df.split == 'test'][: a.test]
    train = df[(df.split == 'train') & ~df.text.isin(set(test.text))].drop_duplicates('text')
    return train, test


class Data:
    "The rows of one seed"

    def __init__(self, train, test, seed, a):
        from sklearn.model_selection import train_test_split

        known, rest = train_test_split(train, train_size=a.labels + a.valid, stratify=train.label, random_state=seed)
        rows, valid = train_test_split(known, test_size=a.valid, stratify=known.label, random_state=seed)
        self.test = test
        self.unlabelled = rest.text.tolist()[: a.unlabelled]
        self.table = pd.concat([rows.assign(valid=False), valid.assign(valid=True)], ignore_index=True)
        self.classes = sorted(train.label.unique())


def learner(data, a):
    from fastai_tl.all import HFTextDataLoaders, hf_classifier_learner, minilm_folder

    folder = minilm_folder()
    dls = HFTextDataLoaders.from_df(
        data.table, folder, valid_col='valid', vocab=data.classes, max_length=a.max_length, bs=32, verbose=False
    )
    return common.quiet(hf_classifier_learner(dls, folder))


def right(learn, test):
    "For each test text, 1 if the label is right"
    labels = learn.predict_batch(test.text.tolist()).labels
    return ''.join(str(int(a == b)) for a, b in zip(labels, test.label))


class Runs:
    "Finished runs, kept in a file for each seed"

    def __init__(self, folder):
        self.folder = folder
        self.rows = [r for file in sorted(folder.glob('runs-*.json')) for r in json.loads(file.read_text())]

    def find(self, model, way, seed):
        found = [r for r in self.rows if (r['model'], r['way'], r['seed']) == (model, way, seed)]
        return found[0] if found else None

    def add(self, **row):
        self.rows.append(row)
        seed = row['seed']
        common.write_json(self.folder / f'runs-{seed}.json', [r for r in self.rows if r['seed'] == seed])
        shown = {k: v for k, v in row.items() if k != 'right'}
        print(shown | dict(accuracy=accuracy(row)), flush=True)


def accuracy(row):
    return row['right'].count('1') / len(row['right'])


def large_model(data, seed, runs, a, out):
    "The fine-tuned model; its weights are kept"
    from fastai_tl.all import seed_everything

    seed_everything(seed)
    learn = learner(data, a)

    def fine_tune():
        took = common.seconds(lambda: learn.fit_transfer(3, min_steps=150, calibrate=False), time.process_time)
        runs.add(model='large', way='labels', seed=seed, right=right(learn, data.test), seconds=took)

    common.trained_once(learn, out / f'large-{seed}.pt', fine_tune)
    return learn


def kept_layers(learn, options, model, seed, runs):
    "The options with the layers that an earlier run of this seed has chosen"
    from fastai_tl.deploy.pruning import chosen_layers

    earlier = [r for r in runs.rows if (r['model'], r['seed']) == (model, seed)]
    if 'layers' not in options:
        return options
    return options | dict(layers=earlier[0]['layers'] if earlier else chosen_layers(learn, options['layers']))


def run_cut(large, data, model, seed, runs, a, out):
    "Train a smaller model in each of the ways"
    from fastai_tl.all import seed_everything

    missing = [way for way in a.ways if not runs.find(model, way, seed)]
    if not missing:
        return
    options = kept_layers(large, CUTS[model][1], model, seed, runs)
    for way in missing:
        seed_everything(seed)
        small = common.quiet(large.shrink(**options, verbose=False))
        start = time.process_time()
        computed = None
        if way in ('distilled', 'states'):
            more = dict(states=a.states) if way == 'states' else {}
            found = large.distill_into(small, data.unlabelled, folder=out / 'scores', verbose=False, **more)
            computed = found.n_computed
        if way != 'cut':
            n_texts = len(data.table) - a.valid + len(data.unlabelled)
            small.fit_transfer(a.epochs, a.recipe, min_steps=a.epochs * n_texts // 32)
        runs.add(
            model=model, way=way, seed=seed, right=right(small, data.test), layers=options.get('layers'),
            seconds=time.process_time() - start, large_texts=computed, parameters=n_parameters(small),
        )


def run_int8(large, data, seed, runs):
    "The decisions of ONNX Runtime in int8 against those in float32"
    from fastai_tl.deploy.onnx import onnx_engine
    from fastai_tl.deploy.predictor import Predictor

    if runs.find('large', 'int8', seed):
        return
    engine, texts = onnx_engine(large), data.test.text.tolist()
    both = {p: Predictor(engine, p) for p in ('fp32', 'int8')}
    found = {p: f.predict(texts) for p, f in both.items()}
    sizes = {p: f.engine.n_bytes for p, f in both.items()}
    same = float(np.mean([a == b for a, b in zip(found['fp32'].labels, found['int8'].labels)]))
    bits = ''.join(str(int(a == b)) for a, b in zip(found['int8'].labels, data.test.label))
    runs.add(model='large', way='int8', seed=seed, right=bits, same_decisions=same, size=sizes['int8'] / sizes['fp32'])


def n_parameters(learn):
    return sum(p.numel() for p in learn.model.parameters())


def rates(large, texts, runs, a):
    "Seconds of processor time that each model needs for the texts, in each round"
    from fastai_tl.all import Predictor

    models = dict(large=large)
    for name in a.cuts:
        options = CUTS[name][1]
        kept = options | (dict(layers=list(range(options['layers']))) if 'layers' in options else {})
        models[name] = large.shrink(**kept, verbose=False)  # rates do not depend on which layers
    predict = {name: Predictor(model).scores for name, model in models.items()}
    variants = {name: lambda f=f: len(f(texts)) for name, f in predict.items()}
    return common.interleave(variants, a.rounds, clock=time.process_time)


def difference(runs, model, way, n_boot=2000):
    "Points of accuracy below the large model: mean, 95 % interval from resampled seeds and texts, and of each seed"
    pairs = [(r, runs.find('large', 'labels', r['seed'])) for r in runs.rows if (r['model'], r['way']) == (model, way)]
    bits = lambda row: np.array([int(o) for o in row['right']])
    lost = np.array([bits(large) - bits(small) for small, large in pairs])
    rng = np.random.default_rng(0)
    n_seeds, n_texts = lost.shape
    means = []
    for _ in range(n_boot):
        seeds = rng.integers(0, n_seeds, n_seeds)
        means.append(lost[seeds][:, rng.integers(0, n_texts, n_texts)].mean())
    low, high = np.quantile(means, [0.025, 0.975])
    return dict(points=100 * lost.mean(), low=100 * low, high=100 * high, seeds=(100 * lost.mean(1)).round(2).tolist())


def show_accuracies(rows):
    "Mean and range of the accuracies of the seeds, in %"
    of = [100 * accuracy(r) for r in rows]
    return f'{np.mean(of):.1f} ({min(of):.1f} to {max(of):.1f})' if of else ''


def tables(runs, speed, a):
    of = lambda model, way: [r for r in runs.rows if (r['model'], r['way']) == (model, way)]
    large = of('large', 'labels')
    lines = [['MiniLM, 6 layers', len(large), '', show_accuracies(large), '', '', '', '', '1']]
    figures = {}
    points_of = lambda lost: f"{lost['points']:.1f} ({lost['low']:.1f} to {lost['high']:.1f})" if lost else ''
    for name in [o for o in CUTS if of(o, 'distilled') or of(o, 'states')]:
        lost = {way: difference(runs, name, way) if of(name, way) else None for way in ('distilled', 'states')}
        ratio = common.ratio(speed['large'], speed[name]) if name in speed else None
        figures[name] = dict(lost=lost, speed=ratio)
        shown = [show_accuracies(of(name, way)) for way in WAYS]
        rate = common.ranged(ratio, 2) if ratio else ''
        n_seeds = max(len(of(name, way)) for way in ('distilled', 'states'))
        lines.append([CUTS[name][0], n_seeds, *shown, *map(points_of, lost.values()), rate])
    columns = ['seeds:', 'as cut:', 'labels alone:', 'distilled:', 'and states:', 'points lost (95 %):',
               'with states:', 'times as fast (range):']
    return common.table([f'{a.set}, test accuracy in % (range)', *columns], lines), figures


def main(a):
    common.set_threads(a.threads)
    out = Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    runs = Runs(out)
    file = out / 'seconds.json'
    if not a.summary:
        train, test = load(a)
        for seed in range(a.seeds) if a.seed is None else [a.seed]:
            data = Data(train, test, seed, a)
            large = large_model(data, seed, runs, a, out)
            if a.int8:
                run_int8(large, data, seed, runs)
            for model in a.cuts:
                run_cut(large, data, model, seed, runs, a, out)
        if a.seed is not None:
            return
        common.write_json(file, [rates(large, test.text.tolist()[:500], runs, a)])
    speed = json.loads(file.read_text())[0] if file.exists() else {}
    table, figures = tables(runs, speed, a)
    print(table)
    options = {k: str(v) if isinstance(v, Path) else v for k, v in vars(a).items() if k not in ('json', 'data', 'out')}
    common.write_json(a.json, dict(options=options, runs=runs.rows, figures=figures, seconds=speed))


if __name__ == '__main__':
    main(parse())
