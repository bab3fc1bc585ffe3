"""Traditional Chinese hotel reviews (ChnSentiCorp, its own split, 6,212 to train and 1,553 to test): what stage 2 of ULMFiT on other people's reviews is worth.

    python benchmarks/hotel_reviews.py --data FOLDER --out FOLDER

`--data` holds zh_tw/hotel_reviews.csv (text, label, split) and zh_tw/shopping_reviews.parquet (text; its labels are not used). Three ways: ULMFiT with `lang='zh-tw'`, characters, whose language
model has read the shopping reviews (those that are also test reviews left out); the same classifier from nothing; TF-IDF of character 1- to 3-grams with logistic regression. A tenth of the training rows validate; with the
first seed they choose each way's rate (ULMFiT) and strength (TF-IDF), and no test row decides anything. One language model serves all seeds. Whatever is finished in --out is not done again. Prints a Markdown table and writes
results.json."""
import argparse, json, os, time
from pathlib import Path

os.environ.setdefault('HF_HUB_OFFLINE', '1')
import numpy as np, pandas as pd

RATES = (1e-2, 3e-2)


def parse():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--data', default=os.environ.get('FASTAI_TL_DATA', '../shared/data'))
    ap.add_argument('--out', default='hotel_reviews')
    ap.add_argument('--seeds', type=int, default=3)
    ap.add_argument('--size', type=int, nargs=3, default=(128, 256, 1), help='width of the embedding, of the layers, number of layers')
    ap.add_argument('--lm-epochs', type=int, default=2)
    ap.add_argument('--epochs', type=int, nargs='+', default=[1, 1, 3], help='epochs of each stage of unfreezing')
    ap.add_argument('--chars', type=int, default=160, help='characters of a review that the ULMFiT classifiers read')
    ap.add_argument('--rows', type=int, help='only so many reviews of each kind, to try the script')
    ap.add_argument('--threads', type=int)
    return ap.parse_args()


def load(a):
    "Hotel reviews with a validation split, and shopping reviews without those that are among the test reviews"
    from fastai_tl.all import normalize_chinese
    hotel = pd.read_csv(Path(a.data)/'zh_tw'/'hotel_reviews.csv')
    shop = pd.read_parquet(Path(a.data)/'zh_tw'/'shopping_reviews.parquet')
    key = lambda t: ''.join(c for c in normalize_chinese(t) if c.isalnum())[:40]
    tested = set(hotel[hotel.split=='test'].text.map(key))
    same = shop.text.map(key).isin(tested)
    train = hotel.index[hotel.split=='train']
    hotel.loc[np.random.default_rng(0).permutation(train)[:len(train)//10], 'split'] = 'valid'
    if a.rows: hotel,shop,same = hotel.groupby('split').head(a.rows),shop.head(a.rows),same.head(a.rows)
    return hotel.reset_index(drop=True),list(shop.text[~same]),int(same.sum())


def tfidf(hotel, chosen):
    "Predictions on the test rows; the strength of the prior is chosen on the validation rows"
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    train,valid,test = (hotel[hotel.split==s] for s in ('train','valid','test'))
    vec = TfidfVectorizer(analyzer='char', ngram_range=(1,3), sublinear_tf=True, min_df=2)
    x = vec.fit_transform(train.text)
    fit = lambda c: LogisticRegression(C=c, max_iter=2000).fit(x, train.label)
    if chosen is None: chosen = max((1, 3, 10, 30, 100), key=lambda c: fit(c).score(vec.transform(valid.text), valid.label))
    return list(fit(chosen).predict(vec.transform(test.text))),chosen


def ulmfit(a, hotel, shop, way, seed, lr):
    "Validation accuracy, and predictions on the test rows"
    from fastai_tl.all import ULMFiT
    cfg = dict(zip(('emb_sz','n_hid','n_layers'), a.size))
    enc = None
    if way=='stages 2 and 3':
        lm = ULMFiT(Path(a.out)/'runs'/'lm', config=cfg, lang='zh-tw', max_vocab=5000, progress=False)
        lm.finetune_lm(shop, encoder=None, epochs=a.lm_epochs, lr=1e-2, drop_mult=.1, wd=.01)
        enc = lm.encoder('domain')
    short = hotel.assign(text=hotel.text.str[:a.chars])
    ulm = ULMFiT(Path(a.out)/'runs'/f'{way} {seed}', config=cfg, lang='zh-tw', max_vocab=5000, seed=seed, progress=False)
    learn = ulm.classifier(short, valid_col='split', encoder=enc, epochs=a.epochs, lr=lr, drop_mult=.3, bs=32, name=f'lr {lr:g}')
    with learn.no_bar():
        acc = float(learn.validate()[1])
        p = learn.get_preds(dl=learn.dls.test_dl(list(short[short.split=='test'].text)))[0]
    return acc,[learn.dls.vocab[1][i] for i in p.argmax(1)]


def run(a, hotel, shop, way, seed, chosen):
    if way=='TF-IDF': return tfidf(hotel, chosen)
    res = {lr: ulmfit(a, hotel, shop, way, seed, lr) for lr in (RATES if chosen is None else [chosen])}
    lr = max(res, key=lambda k: res[k][0])
    return res[lr][1],lr


def paired(right, a, b, n=10_000):
    "Points of accuracy of `a` over `b`, and the 95 % interval of drawing seeds and rows anew"
    d,rng = 100*(np.array(right[a], float)-np.array(right[b], float)),np.random.default_rng(0)
    draws = [d[rng.integers(0, len(d), len(d))][:,rng.integers(0, d.shape[1], d.shape[1])].mean() for _ in range(n)]
    return d.mean(),*np.percentile(draws, (2.5, 97.5))


def main():
    a = parse()
    import torch
    if a.threads: torch.set_num_threads(a.threads)
    from sklearn.metrics import f1_score
    hotel,shop,same = load(a)
    file = Path(a.out)/'results.json'
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = json.loads(file.read_text(encoding='utf-8'))['runs'] if file.exists() else []
    true = list(hotel[hotel.split=='test'].label)
    print(f'{len(hotel):,} hotel reviews; {len(shop):,} shopping reviews, {same:,} left out that are among the test reviews', flush=True)
    for seed in range(a.seeds):
        for way in ('TF-IDF','from scratch','stages 2 and 3'):
            if any(r['way']==way and r['seed']==seed for r in rows): continue
            chosen,t = next((r['chosen'] for r in rows if r['way']==way), None),time.perf_counter()
            pred,chosen = run(a, hotel, shop, way, seed, chosen)
            rows.append(dict(way=way, seed=seed, chosen=chosen, accuracy=float(np.mean([p==y for p,y in zip(pred, true)])), macro_f1=float(f1_score(true, pred, average='macro')),
                             seconds=time.perf_counter()-t, right=[int(p==y) for p,y in zip(pred, true)]))
            print({k: v for k,v in rows[-1].items() if k!='right'}, flush=True)
            file.write_text(json.dumps(dict(settings=vars(a), left_out=same, runs=rows), ensure_ascii=False), encoding='utf-8')
    df,right = pd.DataFrame(rows),{w: [r['right'] for r in rows if r['way']==w] for w in ('TF-IDF','from scratch','stages 2 and 3')}
    print('\n| hotel reviews, test rows | accuracy %, mean ± sd | macro F1 %, mean ± sd | points of accuracy above TF-IDF (95 % interval) |\n|---|---|---|---|')
    for w,g in df.groupby('way', sort=False):
        diff = '' if w=='TF-IDF' else '{:+.1f} ({:+.1f} to {:+.1f})'.format(*paired(right, w, 'TF-IDF'))
        print(f'| {w} | {100*g.accuracy.mean():.1f} ± {100*g.accuracy.std():.1f} | {100*g.macro_f1.mean():.1f} ± {100*g.macro_f1.std():.1f} | {diff} |')
    print('\nStage 2 against none: {:+.1f} points ({:+.1f} to {:+.1f})'.format(*paired(right, 'stages 2 and 3', 'from scratch')))


if __name__ == '__main__': main()
