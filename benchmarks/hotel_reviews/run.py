"""Traditional Chinese hotel reviews (ChnSentiCorp): stage 2 of ULMFiT on other reviews, both directions, and the blend
with word counts.

    python benchmarks/hotel_reviews/run.py --data FOLDER --out FOLDER

`--data` holds zh_tw/hotel_reviews.csv (text, label, split; 6,212 to train and 1,553 to test, its own split) and
zh_tw/shopping_reviews.parquet (text, category; its labels are not used). The ways:

- TF-IDF of character 1- to 3-grams with logistic regression, fitted to the training rows without the validation rows,
  as in the blends, and with them;
- from scratch: ULMFiT with `lang='zh-tw'` and characters, all layers at one rate from the start;
- stages 2 and 3: its language model has read `--reviews` shopping reviews (those of hotels first, then a random draw,
  without reviews that are also test reviews);
- both directions: the mean of the probabilities of a forward and a backward classifier;
- blend: `learn.blend()` of the classifier with TF-IDF; the validation rows decide the weights.

A tenth of the training rows validate. With several `--rates` they choose the rate with the first seed, and they choose
the regularisation of TF-IDF. No decision uses the test rows. One language model for each direction serves all seeds; it
trains in bfloat16 if the machine has it. Results that are in --out are kept, and training goes on from the last epoch:
run the same command again to continue. Prints a Markdown table and writes results.json."""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import offline, parser, set_threads, table

offline(silent=False)
import numpy as np
import pandas as pd

BLENDS = {'blend, one direction': 'stages 2 and 3', 'blend, both directions': 'both directions'}
ULMFIT = ('from scratch', *(way for pair in zip(BLENDS.values(), BLENDS) for way in pair))
WAYS = ('TF-IDF', 'TF-IDF, validation rows too', *ULMFIT)


def parse():
    ap = parser(__doc__, 'data', 'seeds', 'threads')
    ap.add_argument('--out', default='hotel_reviews')
    size = 'width of the embedding, of the layers, number of layers'
    ap.add_argument('--size', type=int, nargs=3, default=(160, 256, 1), help=size)
    ap.add_argument('--reviews', type=int, default=20_000, help='shopping reviews that the language model reads')
    ap.add_argument('--lm-epochs', type=int, default=4)
    ap.add_argument('--rates', type=float, nargs='+', default=[1e-2], help='rates of the classifiers to choose from')
    ap.add_argument('--ways', nargs='+', default=['TF-IDF', 'one direction', 'from scratch', 'both'])
    epochs = 'epochs of each stage of unfreezing; the classifier from scratch has their sum'
    ap.add_argument('--epochs', type=int, nargs='+', default=[1, 1, 4], help=epochs)
    ap.add_argument('--chars', type=int, default=240, help='characters of a review that classifiers train on')
    ap.add_argument('--rows', type=int, help='use only so many reviews of each kind, to try the script')
    return ap.parse_args()


def load(a):
    "Hotel reviews with a validation split, and shopping reviews without those that are among the test reviews"
    from fastai_tl.all import normalize_chinese

    hotel = pd.read_csv(Path(a.data) / 'zh_tw' / 'hotel_reviews.csv')
    shop = pd.read_parquet(Path(a.data) / 'zh_tw' / 'shopping_reviews.parquet')
    key = lambda t: ''.join(c for c in normalize_chinese(t) if c.isalnum())[:40]
    tested = set(hotel[hotel.split == 'test'].text.map(key))
    same = shop.text.map(key).isin(tested)
    train = hotel.index[hotel.split == 'train']
    hotel.loc[np.random.default_rng(0).permutation(train)[: len(train) // 10], 'split'] = 'valid'
    shop = shop[~same].sample(frac=1, random_state=0)
    shop = pd.concat([shop[shop.category == '酒店'], shop[shop.category != '酒店']])
    shop = shop.text.str[: a.chars][: a.rows or a.reviews]
    if a.rows:
        hotel = hotel.groupby('split').head(a.rows)
    return hotel.reset_index(drop=True), list(shop), int(same.sum())


def rows(hotel, *splits):
    return hotel[hotel.split.isin(splits)]


def tfidf(a, hotel, *splits, C=(1, 3, 10, 30, 100)):
    "A bag of characters, kept in a file; the validation rows choose the regularisation"
    from fastai_tl.all import BagOfWords
    from fastai_tl.files import load_tree, save_tree
    from fastai_tl.learners.bag_of_words import bag_of_words_of_tree, bag_of_words_tree

    file = Path(a.out) / f'tfidf {" ".join(splits)}.safetensors'
    if not file.exists():
        train, valid = rows(hotel, *splits), rows(hotel, 'valid')
        fitted = [BagOfWords('char', C=c).fit(train.text, train.label) for c in C]
        best = max(fitted, key=lambda bag: np.mean(predicted(bag, valid) == valid.label))
        save_tree(file, bag_of_words_tree(best))
    return bag_of_words_of_tree(load_tree(file))


def predicted(bag, df):
    return np.array(bag.classes)[bag.predict_proba(df.text).argmax(1)]


def language_models(a, shop, both):
    "The language model of stage 2, or one for each direction, trained once"
    from fastai_tl.all import AutocastPrecision, LazyLogitsCallback, ULMFiT

    lm = ULMFiT(Path(a.out) / 'runs' / 'lm', bidirectional=both, **options(a))
    settings = dict(lr=1e-2, drop_mult=0.1, wd=0.01, bs=32, valid_pct=0.02)
    lm.finetune_lm(shop, encoder=None, epochs=a.lm_epochs, cbs=[AutocastPrecision(), LazyLogitsCallback()], **settings)
    return lm


def options(a):
    cfg = dict(zip(('emb_sz', 'n_hid', 'n_layers'), a.size))
    return dict(config=cfg, lang='zh-tw', max_vocab=5000, progress=False)


def classifier(a, hotel, name, seed, lr, start):
    "A trained classifier, or a pair for two encoders in `start`"
    from fastai_tl.all import ULMFiT

    both = start is not None and len(start) == 2
    if start is None:
        fit = dict(encoder=None, epochs=[sum(a.epochs)], groups=[a.size[2] + 2], spread=1)
    else:
        fit = dict(epochs=a.epochs, spread=10)
    ulm = ULMFiT(Path(a.out) / 'runs' / f'{name} {seed}', bidirectional=both, seed=seed, **options(a))
    if start is not None:
        ulm.pretrain(weights=start if both else start[0])
    short = rows(hotel, 'train', 'valid').assign(text=hotel.text.str[: a.chars])
    return ulm.classifier(short, valid_col='split', lr=lr, drop_mult=0.3, bs=32, name=f'lr {lr:g}', **fit)


def chosen_classifier(a, hotel, name, seed, chosen, start=None):
    "The classifier with the highest validation accuracy, and its rate"
    made = {lr: classifier(a, hotel, name, seed, lr, start) for lr in (a.rates if chosen is None else [chosen])}
    lr = max(made, key=lambda rate: float(made[rate].validate()[1]))
    return made[lr], lr


def run(a, hotel, shop, way, seed, chosen):
    "Labels of the test rows by each way, what was chosen, and what the blends say of themselves"
    test = rows(hotel, 'test')
    if way == 'TF-IDF':
        bag = tfidf(a, hotel, 'train')
        whole = tfidf(a, hotel, 'train', 'valid', C=[bag.fitted['C']])
        return {way: predicted(bag, test), WAYS[1]: predicted(whole, test)}, bag.fitted['C'], {}
    if way == 'from scratch':
        learn, lr = chosen_classifier(a, hotel, way, seed, chosen)
        return {way: labels_of(learn, test)}, lr, {}
    directions = ('forward', 'backward')[: 2 if way == 'both' else 1]
    lm = language_models(a, shop, way == 'both')
    start = [lm.encoder('domain', direction) for direction in directions]
    learn, lr = chosen_classifier(a, hotel, 'pretrained', seed, chosen, start)
    blend = learn.blend(tfidf(a, hotel, 'train'), data=rows(hotel, 'valid'), verbose=False)
    alone, mixed = list(BLENDS.items())[way == 'both'][::-1]
    tables = {kind: getattr(blend, kind).to_dict('index') for kind in ('table', 'gains')}
    made = {alone: labels_of(learn, test), mixed: labels_of(blend, test)}
    said = {mixed: dict(weights=list(blend.weights), **tables)}
    return made, lr, said


def labels_of(learn, test):
    return np.array(learn.predict_batch(test.text).labels)


def scores(pred, true):
    "Accuracy and macro F1 in percent; rows along the last axis, two classes as booleans"
    tp, tn = (pred & true).sum(-1), (~pred & ~true).sum(-1)
    wrong = (pred != true).sum(-1)
    f1 = [2 * right / np.maximum(2 * right + wrong, 1) for right in (tp, tn)]
    return 100 * (pred == true).mean(-1), 50 * sum(f1)


def paired(preds, true, a, b, n=2000):
    "Points of accuracy and of macro F1 of `a` over `b`, with 95 % bootstrap intervals over seeds and rows"
    rng = np.random.default_rng(0)
    k = len(preds[a])

    def gain(rows, seeds):
        both = [scores(preds[w][seeds][:, rows], true[rows]) for w in (a, b)]
        return [float((x - y).mean()) for x, y in zip(*both)]

    draws = [gain(rng.integers(0, len(true), len(true)), rng.integers(0, k, k)) for _ in range(n)]
    means = gain(np.arange(len(true)), np.arange(k))
    return [(m, *np.percentile(d, (2.5, 97.5))) for m, d in zip(means, np.array(draws).T)]


def report(done, true):
    preds = {}
    for w in WAYS:
        found = [r['positive'] for r in done if r['way'] == w]
        if found:
            preds[w] = np.array(found, bool)
    k = min(map(len, preds.values()))
    preds = {w: p[:k] for w, p in preds.items()}
    as_text = lambda d: '{:+.1f} ({:+.1f} to {:+.1f})'.format(*d)
    lines = []
    for w, p in preds.items():
        means = [f'{v.mean():.1f} ± {v.std(ddof=1) if k > 1 else 0:.1f}' for v in scores(p, true)]
        against = ('', '') if w == 'TF-IDF' else map(as_text, paired(preds, true, w, 'TF-IDF'))
        lines.append([w, *means, *against])
    title = f'hotel reviews, {len(true):,} test rows, {k} seed(s)'
    against = ['accuracy against TF-IDF, points (95 % interval):', 'macro F1 against TF-IDF:']
    print('\n' + table([title, 'accuracy %, mean ± sd:', 'macro F1 %, mean ± sd:', *against], lines))
    for name, other in {'stages 2 and 3': 'from scratch', **BLENDS}.items():
        if {name, other} <= set(preds):
            accuracy, f1 = map(as_text, paired(preds, true, name, other))
            print(f'\n{name} against {other}: {accuracy} points of accuracy, {f1} of macro F1')


def main():
    a = parse()
    set_threads(a.threads)
    hotel, shop, same = load(a)
    file = Path(a.out) / 'results.json'
    file.parent.mkdir(parents=True, exist_ok=True)
    done = json.loads(file.read_text(encoding='utf-8'))['runs'] if file.exists() else []
    true = (rows(hotel, 'test').label == '正面').to_numpy()
    counts = f'{len(hotel):,} hotel reviews; {len(shop):,} shopping reviews'
    print(f'{counts}; {same:,} more were left out: they are test reviews too', flush=True)
    for seed in range(1, a.seeds + 1):
        for way in a.ways:
            if any(r['of'] == way and r['seed'] == seed for r in done):
                continue
            same_rate = ('one direction', 'both') if way == 'both' else (way,)
            chosen = next((r['chosen'] for r in done if r['of'] in same_rate), None)
            begin = time.perf_counter()
            preds, chosen, said = run(a, hotel, shop, way, seed, chosen)
            for name, labels in preds.items():
                positive = labels == '正面'
                accuracy, f1 = map(float, scores(positive, true))
                row = dict(way=name, of=way, seed=seed, chosen=chosen, accuracy=accuracy, macro_f1=f1)
                row |= dict(seconds=time.perf_counter() - begin, blend=said.get(name))
                print(row, flush=True)
                done.append(dict(row, positive=positive.astype(int).tolist()))
            settings = dict(settings=vars(a), left_out=same, runs=done)
            file.write_text(json.dumps(settings, ensure_ascii=False), encoding='utf-8')
    report(done, true)


if __name__ == '__main__':
    main()
