"""A million short Chinese texts, tokenised once: speed, memory, the cache, and a process that dies.

    python benchmarks/chinese_million/run.py --data FOLDER [--workers 2] [--out results.json]

The texts are made of the sentences of FOLDER/zh_tw/shopping_reviews.parquet, two to a text and drawn at random, 4 to 60 characters each. `tokenize_texts_once` tokenises them by characters (or `--cut`), with its rules, in
`--workers` processes; then once more, which reads the cache. Memory is the largest that the process has held beyond the texts themselves, and the largest of its processes. Last, a process is killed in the middle of the work:
what is said, and after how long. Speed is counted in seconds of the processor, those of the processes
included, so that other programs on the machine do not count."""

import argparse, json, os, re, resource, signal, sys, tempfile, threading, time
from pathlib import Path
import numpy as np


def make_texts(data, n):
    import pandas as pd

    found = [
        s
        for t in pd.read_parquet(Path(data) / 'zh_tw' / 'shopping_reviews.parquet').text
        for s in re.findall('[^。！？!?\n]{2,29}[。！？!?]', t)
    ]
    a, b = np.random.default_rng(0).integers(0, len(found), (2, n))
    return [found[i] + found[j] for i, j in zip(a, b)]


def memory(what):
    "Bytes of this process: `VmRSS` now, `VmHWM` at most"
    return int(re.search(what + r':\s+(\d+)', Path('/proc/self/status').read_text())[1]) * 1024


def busy():
    "Seconds of the processor, those of the processes that have ended included"
    return sum(os.times()[:4])


def children():
    return [int(p) for f in Path('/proc/self/task').glob('*/children') for p in f.read_text().split()]


def killed(texts, tok, rules):
    "Kill a process in the middle of the work; seconds from then to the error, and the error"
    from fastai_tl.core import FastaiTLError
    from fastai_tl.data.tokenizers import tokenize_texts_once

    at = []

    def kill():
        while not children():
            time.sleep(0.01)
        time.sleep(1)
        at.append(time.perf_counter())
        os.kill(children()[0], signal.SIGKILL)

    t = threading.Thread(target=kill)
    t.start()
    try:
        tokenize_texts_once(texts, tok, rules, progress=False, n_workers=2)
    except FastaiTLError as e:
        return time.perf_counter() - at[0], str(e)
    finally:
        t.join()
    raise SystemExit('nothing was said')


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--data', default=os.environ.get('FASTAI_TL_DATA', '../shared/data'))
    ap.add_argument('--texts', type=int, default=1_000_000)
    ap.add_argument('--cut', default='chars')
    ap.add_argument('--workers', type=int, default=1)
    ap.add_argument('--out')
    a = ap.parse_args()
    from fastai_tl.data.chinese import CHINESE_RULES, ChineseTokenizer
    from fastai_tl.data.tokenizers import tokenize_texts_once

    texts, tok, res = make_texts(a.data, a.texts), ChineseTokenizer(a.cut), {}
    tok.tokenize(texts[:20])
    with tempfile.TemporaryDirectory() as folder:
        before = memory('VmRSS')
        for what in ('first', 'again'):
            t = busy()
            tt = tokenize_texts_once(
                texts,
                tok,
                CHINESE_RULES,
                cache_dir=folder,
                n_workers=a.workers,
                progress=what == 'first' and sys.stderr.isatty(),
            )
            res[what] = busy() - t
            if what == 'first':
                res.update(
                    texts=len(tt),
                    tokens=len(tt.ids),
                    words=len(tt.words),
                    beyond=memory('VmHWM') - before,
                    kept=tt.ids.nbytes + tt.lens.nbytes + tt.offsets.nbytes,
                    processes=resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
                )
        res['file'] = sum(f.stat().st_size for f in Path(folder).iterdir())
    del tt
    res['seconds to the error'], res['error'] = killed(texts, tok, CHINESE_RULES)
    mb = lambda n: f'{n / 2**20:,.0f} MiB'
    print(
        f"{res['texts']:,} texts, {res['tokens']:,} tokens, {res['words']:,} distinct, {a.workers} process(es)\n\n| | |\n|---|---:|\n| texts a second of one core | {res['texts'] / res['first']:,.0f} |\n| from the cache, seconds of one core | {res['again']:.1f} |"
        f"\n| memory beyond the texts, at most | {mb(res['beyond'])} |\n| of which is kept | {mb(res['kept'])} |\n| the largest process, at most | {mb(res['processes'])} |\n| the cache's file | {mb(res['file'])} |"
        f"\n| seconds from the death of a process to the error | {res['seconds to the error']:.1f} |\n\n{res['error']}"
    )
    if a.out:
        Path(a.out).write_text(json.dumps(res, ensure_ascii=False))


if __name__ == '__main__':
    main()
