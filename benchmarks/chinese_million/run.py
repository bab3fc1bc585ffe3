"""A million short Chinese texts, tokenised once: speed, memory, the cache, and a process that dies.

    python benchmarks/chinese_million/run.py --data FOLDER [--workers 2] [--out results.json]

Each text is two sentences drawn at random from FOLDER/zh_tw/shopping_reviews.parquet, 4 to 60 characters long.
`tokenize_texts_once` tokenises the texts by characters (or `--cut`), with the rules for Chinese, in `--workers`
processes; a second call reads the cache. Memory is the peak of the process beyond the texts themselves, and the
peak of its largest child process. Last, the script kills a worker process and prints the error and how long it
took. Speed is counted in processor time, including child processes, so that other programs on the machine do not
matter."""

import json
import os
import re
import resource
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import parser, table


def make_texts(data, n):
    import pandas as pd

    reviews = pd.read_parquet(Path(data) / 'zh_tw' / 'shopping_reviews.parquet').text
    found = [s for t in reviews for s in re.findall('[^。！？!?\n]{2,29}[。！？!?]', t)]
    a, b = np.random.default_rng(0).integers(0, len(found), (2, n))
    return [found[i] + found[j] for i, j in zip(a, b)]


def memory(what):
    "Bytes of this process: `VmRSS` now, `VmHWM` at its peak"
    return int(re.search(what + r':\s+(\d+)', Path('/proc/self/status').read_text())[1]) * 1024


def busy():
    "Processor time in seconds, including processes that have ended"
    return sum(os.times()[:4])


def children():
    return [int(p) for f in Path('/proc/self/task').glob('*/children') for p in f.read_text().split()]


def killed(texts, tok, rules):
    "Kill a worker process; return the seconds from then to the error, and the error"
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
    raise SystemExit('no error was raised')


def measure(a, texts, tok, rules):
    "Tokenise the texts twice, the second time from the cache: seconds, counts and memory"
    from fastai_tl.data.tokenizers import tokenize_texts_once

    before = memory('VmRSS')
    res = {}
    with tempfile.TemporaryDirectory() as folder:
        options = dict(cache_dir=folder, n_workers=a.workers)
        t = busy()
        tokenized = tokenize_texts_once(texts, tok, rules, progress=sys.stderr.isatty(), **options)
        res['first'] = busy() - t
        res.update(
            texts=len(tokenized),
            tokens=len(tokenized.ids),
            words=len(tokenized.words),
            beyond=memory('VmHWM') - before,
            kept=tokenized.ids.nbytes + tokenized.lens.nbytes + tokenized.offsets.nbytes,
            processes=resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        )
        t = busy()
        tokenize_texts_once(texts, tok, rules, progress=False, **options)
        res['again'] = busy() - t
        res['file'] = sum(f.stat().st_size for f in Path(folder).iterdir())
    return res


def mib(n):
    return f'{n / 2**20:,.0f} MiB'


def main():
    ap = parser(__doc__, 'data')
    ap.add_argument('--texts', type=int, default=1_000_000)
    ap.add_argument('--cut', default='chars')
    ap.add_argument('--workers', type=int, default=1)
    ap.add_argument('--out')
    a = ap.parse_args()
    from fastai_tl.data.chinese import CHINESE_RULES, ChineseTokenizer

    texts = make_texts(a.data, a.texts)
    tok = ChineseTokenizer(a.cut)
    tok.tokenize(texts[:20])
    res = measure(a, texts, tok, CHINESE_RULES)
    res['seconds to the error'], res['error'] = killed(texts, tok, CHINESE_RULES)
    rows = [
        ('texts a second of one core', f"{res['texts'] / res['first']:,.0f}"),
        ('from the cache, seconds of one core', f"{res['again']:.1f}"),
        ('peak memory beyond the texts', mib(res['beyond'])),
        ('of which is kept', mib(res['kept'])),
        ('peak memory of the largest process', mib(res['processes'])),
        ("the cache's file", mib(res['file'])),
        ('seconds from the death of a process to the error', f"{res['seconds to the error']:.1f}"),
    ]
    print(f"{res['texts']:,} texts, {res['tokens']:,} tokens, {res['words']:,} distinct, {a.workers} process(es)\n")
    print(table(['', ':'], rows))
    print(f"\n{res['error']}")
    if a.out:
        Path(a.out).write_text(json.dumps(res, ensure_ascii=False))


if __name__ == '__main__':
    main()
