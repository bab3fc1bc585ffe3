"""Traditional Chinese hotel reviews (ChnSentiCorp): what stage 2 of ULMFiT on other reviews is worth.

    python benchmarks/hotel_reviews/run.py --data FOLDER --out FOLDER

`--data` holds zh_tw/hotel_reviews.csv (text, label, split; 6,212 to train and 1,553 to test, its own split) and
zh_tw/shopping_reviews.parquet (text, category; its labels are not used). There are three ways:

- ULMFiT with `lang='zh-tw'` and characters, whose language model has read `--reviews` shopping reviews (those of
  hotels first, then a random draw, without reviews that are also test reviews);
- the same classifier from scratch, all layers at one rate from the start;
- TF-IDF of character 1- to 3-grams with logistic regression.

A tenth of the training rows validate; with the first seed they choose each way's rate (ULMFiT) or regularisation
(TF-IDF). No decision uses the test rows. One language model serves all seeds; it trains in bfloat16 if the machine
has it. Results that are in --out are kept; an interrupted epoch starts again. Prints a Markdown table and writes
results.json."""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import offline, parser, set_threads, table

offline(silent=False)
import numpy as np
import pandas as pd

WAYS = ('TF-IDF', 'from scratch', 'stages 2 and 3')
RATES = {'from scratch': (3e-3, 1e-2), 'stages 2 and 3': (1e-2, 3e-2)}


def parse():
    ap = parser(__doc__, 'data', 'seeds', 'threads')
    ap.add_argument('--out', default='hotel_reviews')
    size = 'width of the embedding, of the layers, number of layers'
    ap.add_argument('--size', type=int, nargs=3, default=(160, 256, 1), help=size)
    ap.add_argument('--reviews', type=int, default=20_000, help='shopping reviews that the language model reads')
    ap.add_argument('--lm-epochs', type=int, default=4)
    epochs = 'epochs of each stage of unfreezing; the classifier from scratch has their sum'
    ap.add_argument('--epochs', type=int, nargs='+', default=[1, 1, 4], help=epochs)
    ap.add_argument('--chars', type=int, default=240, help='characters of a review that the ULMFiT classifiers read')
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


def tfidf(hotel, chosen):
    "Predictions on the test rows; the validation rows choose the regularisation"
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    train, valid, test = (hotel[hotel.split == s] for s in ('train', 'valid', 'test'))
    vec = TfidfVectorizer(analyzer='char', ngram_range=(1, 3), sublinear_tf=True, min_df=2)
    x = vec.fit_transform(train.text)
    fit = lambda c: LogisticRegression(C=c, max_iter=2000).fit(x, train.label)
    if chosen is None:
        chosen = max((1, 3, 10, 30, 100), key=lambda c: fit(c).score(vec.transform(valid.text), valid.label))
    return list(fit(chosen).predict(vec.transform(test.text))), chosen


def ulmfit(a, hotel, shop, way, seed, lr):
    "Validation accuracy, and predictions on the test rows"
    from fastai_tl.all import AutocastPrecision, LazyLogitsCallback, ULMFiT

    cfg = dict(zip(('emb_sz', 'n_hid', 'n_layers'), a.size))
    options = dict(config=cfg, lang='zh-tw', max_vocab=5000, progress=False)
    runs = Path(a.out) / 'runs'
    if way == 'stages 2 and 3':
        lm = ULMFiT(runs / 'lm', **options)
        settings = dict(lr=1e-2, drop_mult=0.1, wd=0.01, bs=32, valid_pct=0.02)
        cbs = [AutocastPrecision(), LazyLogitsCallback()]
        lm.finetune_lm(shop, encoder=None, epochs=a.lm_epochs, cbs=cbs, **settings)
        fit = dict(encoder=lm.encoder('domain'), epochs=a.epochs, spread=10)
    else:
        fit = dict(encoder=None, epochs=[sum(a.epochs)], groups=[a.size[2] + 2], spread=1)
    short = hotel.assign(text=hotel.text.str[: a.chars])
    ulm = ULMFiT(runs / f'{way} {seed}', seed=seed, **options)
    learn = ulm.classifier(short, valid_col='split', lr=lr, drop_mult=0.3, bs=32, name=f'lr {lr:g}', **fit)
    with learn.no_bar():
        acc = float(learn.validate()[1])
        p = learn.get_preds(dl=learn.dls.test_dl(list(short[short.split == 'test'].text)))[0]
    return acc, [learn.dls.vocab[1][i] for i in p.argmax(1)]


def run(a, hotel, shop, way, seed, chosen):
    if way == 'TF-IDF':
        return tfidf(hotel, chosen)
    res = {lr: ulmfit(a, hotel, shop, way, seed, lr) for lr in (RATES[way] if chosen is None else [chosen])}
    print(way, 'validation accuracy by rate:', {k: round(v[0], 4) for k, v in res.items()}, flush=True)
    lr = max(res, key=lambda k: res[k][0])
    return res[lr][1], lr


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


def report(rows, true):
    preds = {}
    for w in WAYS:
        found = [r['positive'] for r in rows if r['way'] == w]
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
    if {*WAYS[1:]} <= set(preds):
        accuracy, f1 = map(as_text, paired(preds, true, *WAYS[:0:-1]))
        print(f'\nStage 2 against none: {accuracy} points of accuracy, {f1} of macro F1')


def main():
    a = parse()
    set_threads(a.threads)
    hotel, shop, same = load(a)
    file = Path(a.out) / 'results.json'
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = json.loads(file.read_text(encoding='utf-8'))['runs'] if file.exists() else []
    true = (hotel[hotel.split == 'test'].label == '正面').to_numpy()
    counts = f'{len(hotel):,} hotel reviews; {len(shop):,} shopping reviews'
    print(f'{counts}; {same:,} more were left out: they are test reviews too', flush=True)
    for seed in range(a.seeds):
        for way in WAYS:
            if any(r['way'] == way and r['seed'] == seed for r in rows):
                continue
            chosen = next((r['chosen'] for r in rows if r['way'] == way), None)
            begin = time.perf_counter()
            pred, chosen = run(a, hotel, shop, way, seed, chosen)
            positive = np.array(pred) == '正面'
            accuracy, f1 = map(float, scores(positive, true))
            row = dict(way=way, seed=seed, chosen=chosen, accuracy=accuracy, macro_f1=f1)
            row['seconds'] = time.perf_counter() - begin
            print(row, flush=True)
            rows.append(dict(row, positive=positive.astype(int).tolist()))
            settings = dict(settings=vars(a), left_out=same, runs=rows)
            file.write_text(json.dumps(settings, ensure_ascii=False), encoding='utf-8')
    report(rows, true)


if __name__ == '__main__':
    main()
