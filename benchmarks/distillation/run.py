"""Distillation: small students that learn from a fine-tuned MiniLM on a few labels and many texts without labels,
against the same students with the labels alone.

    pip install "fastai_tl[minilm]"
    python benchmarks/distillation/run.py --data FOLDER --out FOLDER [--set trec6] [--labels 300] [--seeds 3]
                                          [--students layers3 layers2 shrunk2 awd bag] [--json FILE]

`--data` holds en/trec6.csv or en/imdb.parquet (text, label, split). A seed draws `--labels` labelled texts, the same
number of each class as in the data; the other training texts (`--unlabelled` of them) have no labels. The teacher is
MiniLM with `fit_transfer` on the labelled texts. No decision uses the test texts: settings are fixed, and the weights
are those after the last epoch.

- layers3, layers2: the first layers of MiniLM, `fit_transfer`
- shrunk3, shrunk2: layers of the fine-tuned teacher (`shrink`: 0, 3 and 5, or 0 and 5, chosen beforehand)
- awd: an AWD_LSTM without pre-training (100/200/1), `fit_one_cycle`; its vocabulary is from all training texts
- bag: words and pairs of words (TF-IDF) with logistic regression

Each student is trained on the labels alone with the usual number of epochs and, with `--longer N`, also with N times
as many (the better of both is the baseline), and distilled. Rates are from processor time of a `Predictor` on the test
texts, in turn. Finished runs are kept in --out; the same command goes on. Prints a Markdown table."""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common

common.offline()
import numpy as np
import pandas as pd

WAYS = ('labels', 'labels, longer', 'distilled')
STUDENTS = dict(
    layers3='MiniLM, 3 layers',
    layers2='MiniLM, 2 layers',
    shrunk3='3 layers of the teacher',
    shrunk2='2 layers of the teacher',
    awd='AWD_LSTM 100/200/1',
    bag='bag of words',
)
SHRUNK = dict(shrunk3=[0, 3, 5], shrunk2=[0, 5])


def parse():
    ap = common.parser(__doc__, 'data', 'seeds', 'threads', 'rounds', 'json', threads=1)
    ap.add_argument('--out', default='distillation')
    ap.add_argument('--set', default='trec6', choices=['trec6', 'imdb'])
    ap.add_argument('--labels', type=int, default=300)
    ap.add_argument('--unlabelled', type=int, help='number of texts without labels; default: all')
    ap.add_argument('--test', type=int, help='number of test texts; default: all')
    ap.add_argument('--max-length', type=int, default=128)
    ap.add_argument('--students', nargs='+', default=['layers3', 'layers2', 'awd', 'bag'], choices=list(STUDENTS))
    ap.add_argument('--epochs', type=int, default=6, help='epochs of a distilled Transformer')
    ap.add_argument('--awd-epochs', type=int, default=12, help='epochs of a distilled AWD_LSTM')
    ap.add_argument('--longer', type=int, help='also train on the labels alone for so many times the usual epochs')
    ap.add_argument('--temperature', type=float, default=2.0)
    ap.add_argument('--alpha', type=float, default=0.9)
    return ap.parse_args()


def minilm():
    from fastai_tl.all import minilm_folder

    return str(minilm_folder())


def load(a):
    "Training and test rows"
    if a.set == 'trec6':
        df = pd.read_csv(Path(a.data) / 'en' / 'trec6.csv')
    else:
        df = pd.read_parquet(Path(a.data) / 'en' / 'imdb.parquet')
        df = df.assign(text=df.text.str.replace('<br />', ' '))
    df = df.sample(frac=1, random_state=0)
    return df[df.split == 'train'], df[df.split == 'test'][: a.test]


class Data:
    "The rows of one seed"

    def __init__(self, train, test, seed, a):
        from sklearn.model_selection import train_test_split

        labelled, rest = train_test_split(train, train_size=a.labels, stratify=train.label, random_state=seed)
        self.labelled = labelled
        self.test = test
        self.unlabelled = rest.text.tolist()[: a.unlabelled]
        self.texts = [*labelled.text, *self.unlabelled]
        self.table = pd.concat([labelled.assign(valid=False), test.assign(valid=True)], ignore_index=True)
        self.classes = sorted(train.label.unique())


def transformer(data, n_layers, a):
    from transformers import AutoModelForSequenceClassification

    from fastai_tl.all import HFTextDataLoaders, hf_classifier_learner

    dls = HFTextDataLoaders.from_df(
        data.table, minilm(), valid_col='valid', vocab=data.classes, max_length=a.max_length, bs=32, verbose=False
    )
    hf = AutoModelForSequenceClassification.from_pretrained(
        minilm(), num_hidden_layers=n_layers, num_labels=len(data.classes)
    )
    return common.quiet(hf_classifier_learner(dls, hf))


def awd(data, seed, a):
    from fastai_tl.all import awd_classifier_learner, classifier_dls, texts_vocab, tokenize_texts_once

    vocab = texts_vocab(tokenize_texts_once(data.texts), 2)
    rows = tokenize_texts_once(data.table.text.tolist())
    labels, is_valid = data.table.label.tolist(), data.table.valid.to_numpy()
    train, valid = (np.flatnonzero(o).tolist() for o in (~is_valid, is_valid))
    dls = classifier_dls(rows, labels, 'classification', train, valid, vocab, classes=data.classes, bs=32)
    config = dict(emb_sz=100, n_hid=200, n_layers=1)
    return common.quiet(awd_classifier_learner(dls, 'classification', len(data.classes), config))


def bag():
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    return make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10, max_iter=500))


def accuracy(learn, data):
    labels = learn.predict_batch(data.test.text.tolist()).labels
    return float(np.mean([a == b for a, b in zip(labels, data.test.label)]))


def make_student(teacher, name, data, seed, a):
    if name in SHRUNK:
        return common.quiet(teacher.shrink(layers=SHRUNK[name], verbose=False))
    return awd(data, seed, a) if name == 'awd' else transformer(data, int(name[-1]), a)


def train(learn, name, way, a):
    "Train a student in one of the ways"
    n_texts = len(learn.dls.train_ds)
    if name == 'awd':
        epochs = a.awd_epochs if way == 'distilled' else 15 * (a.longer if 'longer' in way else 1)
        return learn.fit_one_cycle(epochs, 1e-2)
    if way == 'distilled':
        return learn.fit_transfer(a.epochs)
    steps = 150 * (a.longer if 'longer' in way else 1)
    return learn.fit_transfer(3, calibrate=False, min_steps=max(steps, 3 * n_texts // 32))


def run_bag(teacher, data, way, folder, a):
    if way == 'distilled':
        fitted = teacher.distill_into(
            bag(),
            data.texts,
            alpha=a.alpha,
            labels=[*data.labelled.label, *[None] * len(data.unlabelled)],
            folder=folder,
            verbose=False,
        )
    else:
        fitted = bag().fit(data.labelled.text, data.labelled.label)
    return fitted, float(np.mean(fitted.predict(data.test.text) == data.test.label.to_numpy())), None


def run_student(teacher, name, data, seed, way, folder, a):
    "A trained student, its accuracy on the test texts, and the number of texts that the teacher has read for it"
    from fastai_tl.all import seed_everything

    if name == 'bag':
        return run_bag(teacher, data, way, folder, a)
    seed_everything(seed)
    learn = make_student(teacher, name, data, seed, a)
    n_computed = None
    if way == 'distilled':
        found = teacher.distill_into(
            learn, data.texts, temperature=a.temperature, alpha=a.alpha, folder=folder, verbose=False
        )
        n_computed = found.n_computed
    seed_everything(seed)
    train(learn, name, way, a)
    return learn, accuracy(learn, data), n_computed


def make_teacher(data, seed, a, out):
    "MiniLM fine-tuned on the labelled texts; its weights are kept"
    from fastai_tl.all import seed_everything

    seed_everything(seed)
    teacher = transformer(data, 6, a)

    def fine_tune():
        return common.seconds(lambda: teacher.fit_transfer(3, min_steps=150, calibrate=False), time.process_time)

    seconds = common.trained_once(teacher, out / f'teacher-{seed}.pt', fine_tune) or 0.0
    return teacher, seconds


def rates(models, texts, rounds):
    "Seconds of processor time that each model needs for the texts, in each round"
    from fastai_tl.all import Predictor

    predict = {k: model.predict if k == 'bag' else Predictor(model).scores for k, model in models.items()}
    variants = {k: lambda f=f: len(f(texts)) for k, f in predict.items()}
    return common.interleave(variants, rounds, clock=time.process_time)


def tables(runs, speed, a):
    df = pd.DataFrame(runs)
    teacher = df[df.student == 'teacher'].set_index('seed').accuracy
    columns = ['labels alone:', 'distilled:', 'gain, points (range):', 'of the teacher:', 'times as fast (range):']
    lines = [['teacher: MiniLM, 6 layers', f'{100 * teacher.mean():.1f} ± {100 * teacher.std():.1f}', '', '', '', '1']]
    figures = {}
    for name in [o for o in STUDENTS if o in set(df[df.way == 'distilled'].student)]:
        of = df[df.student == name].pivot(index='seed', columns='way', values='accuracy')
        best = max([way for way in WAYS[:2] if way in of], key=lambda way: of[way].mean())
        gain = 100 * (of.distilled - of[best])
        ratio = common.ratio(speed['teacher'], speed[name]) if name in speed else None
        show = lambda o: f'{100 * o.mean():.1f} ± {100 * o.std():.1f}'
        lines.append(
            [
                STUDENTS[name],
                show(of[best]),
                show(of.distilled),
                f'{gain.mean():.1f} ({gain.min():.1f} to {gain.max():.1f})',
                f'{100 * (of.distilled / teacher).mean():.1f} %',
                common.ranged(ratio, 1) if ratio else '',
            ]
        )
        figures[name] = dict(best=best, gain=gain.tolist(), of_teacher=(of.distilled / teacher).tolist(), speed=ratio)
    head = f'{a.set}, {a.labels} labels, test accuracy in %'
    return common.table([head, *columns], lines), figures


def main(a):
    common.set_threads(a.threads)
    out = Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    train_rows, test = load(a)
    file = out / 'runs.json'
    runs = json.loads(file.read_text()) if file.exists() else []
    done = {(r['student'], r['way'], r['seed']) for r in runs}

    def keep(**run):
        runs.append(run)
        common.write_json(file, runs)
        print(run, flush=True)

    speed = {}
    for seed in range(a.seeds):
        data = Data(train_rows, test, seed, a)
        teacher, seconds = make_teacher(data, seed, a, out)
        if ('teacher', 'labels', seed) not in done:
            keep(
                student='teacher',
                way='labels',
                seed=seed,
                accuracy=accuracy(teacher, data),
                seconds=seconds,
                unlabelled=len(data.unlabelled),
            )
        models = dict(teacher=teacher)
        for name in a.students:
            for way in WAYS if a.longer and name != 'bag' else WAYS[::2]:
                if (name, way, seed) in done:
                    continue
                start = time.process_time()
                models[name], score, n_computed = run_student(teacher, name, data, seed, way, out / 'scores', a)
                keep(
                    student=name,
                    way=way,
                    seed=seed,
                    accuracy=score,
                    seconds=time.process_time() - start,
                    teacher_texts=n_computed,
                )
        missing = [name for name in a.students if name not in models]
        if seed == a.seeds - 1:
            models |= {name: make_student(teacher, name, data, seed, a) for name in missing if name != 'bag'}
            speed = rates(models, test.text.tolist()[:500], a.rounds)
    table, figures = tables(runs, speed, a)
    print(table)
    options = {k: str(v) if isinstance(v, Path) else v for k, v in vars(a).items() if k not in ('json', 'data', 'out')}
    common.write_json(a.json, dict(options=options, runs=runs, figures=figures, seconds=speed))


if __name__ == '__main__':
    main(parse())
