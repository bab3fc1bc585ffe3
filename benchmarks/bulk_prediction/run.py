"""`predict_files`: many short texts in one and in two processes, with SIGKILLs, against a quiet run.

    python benchmarks/bulk_prediction/run.py [--rows 100000] [--kills 3] [--size 5000] [--json FILE]

The model is a BERT of two layers of 64 with random weights, the texts are sentences of the offline corpora, cut at 12
words, all different (each has its number). One process predicts the file without a stop, then two processes do, and
then two processes are started again and again, and all are killed with SIGKILL after a random time (a few seconds, and
about one part of `kills` + 1 of the time of an undisturbed run), until the last call ends by itself. The three files
are compared byte by byte. Memory is the peak of the resident memory (VmHWM) of one process for a tenth of the rows (of
20,000 or more) and for all rows."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import offline, parser, write_json

CALL = (
    'import sys, json; from pathlib import Path; from fastai_tl.all import predict_files; '
    'folder, source, out, n, size = sys.argv[1:]; '
    'predict_files(folder, source, out, int(n), int(size)); '
    'lines = Path("/proc/self/status").read_text().split("\\n"); '
    'print(next(l.split()[1] for l in lines if l.startswith("VmHWM")))'
)


def make(folder, n_rows):
    "Write a bundle and two files of texts"
    import pandas as pd
    from transformers import BertConfig
    from fastai_tl.all import HFTextDataLoaders, general_corpus, hf_classifier_learner, seed_everything, train_tokenizer

    seed_everything(0)
    words = ' '.join(general_corpus().text).split()
    rng = random.Random(0)
    starts = [rng.randrange(len(words) - 12) for _ in range(n_rows)]
    texts = [f'{i} {" ".join(words[start:start + rng.randint(4, 12)])}' for i, start in enumerate(starts)]
    tok = train_tokenizer(texts[:5000], 4000, lowercase=True, max_length=64)
    config = BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256,
                        vocab_size=len(tok), max_position_embeddings=64)
    dls = HFTextDataLoaders.from_lists(texts[:200], ['a', 'b', 'c', 'd'] * 50, tok, bs=8, verbose=False)
    hf_classifier_learner(dls, config).save_bundle(folder / 'bundle')
    df = pd.DataFrame(dict(id=range(n_rows), text=texts))
    df.to_csv(folder / 'all.csv', index=False)
    df[: n_rows // 10].to_csv(folder / 'tenth.csv', index=False)


def start(folder, name, out, n, size):
    args = [folder / 'bundle', folder / name, folder / out, n, size]
    return subprocess.Popen([sys.executable, '-c', CALL, *map(str, args)], stdout=subprocess.PIPE, text=True,
                            start_new_session=True)


def whole(*args):
    "Seconds and peak memory of a run that is left alone"
    begin = time.perf_counter()
    process = start(*args)
    out, _ = process.communicate()
    if process.returncode:
        raise SystemExit('a run failed by itself')
    return dict(seconds=round(time.perf_counter() - begin, 1), peak_mb=round(int(out.split()[-1]) / 1024))


def main():
    ap = parser(__doc__, 'json')
    ap.add_argument('--rows', type=int, default=100_000)
    ap.add_argument('--kills', type=int, default=3)
    ap.add_argument('--size', type=int, default=5000)
    args = ap.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, args.rows)
        res = dict(rows=args.rows, size=args.size, load_average_before=os.getloadavg()[0])
        if args.rows >= 20_000:
            res['one process, a tenth'] = whole(folder, 'tenth.csv', 'tenth.out.csv', 1, args.size)
        res['one process'] = whole(folder, 'all.csv', 'one.csv', 1, args.size)
        res['two processes'] = whole(folder, 'all.csv', 'two.csv', 2, args.size)
        res['ratio'] = round(res['one process']['seconds'] / res['two processes']['seconds'], 2)
        write_json(args.json, res)
        rng, kept = random.Random(0), []
        for _ in range(args.kills):
            process = start(folder, 'all.csv', 'killed.csv', 2, args.size)
            time.sleep(4 + rng.uniform(0.5, 1.5) * res['two processes']['seconds'] / (args.kills + 1))
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kept.append(len(list((folder / '.killed.csv.shards').glob('0*'))))
        res['shards kept after each kill'] = kept
        res['the last call'] = whole(folder, 'all.csv', 'killed.csv', 2, args.size)
        files = [(folder / f'{out}.csv').read_bytes() for out in ('one', 'two', 'killed')]
        res['equal'] = dict(two=files[0] == files[1], killed=files[0] == files[2])
        res['load_average_after'] = os.getloadavg()[0]
        print(json.dumps(res, indent=1))
        write_json(args.json, res)


if __name__ == '__main__':
    offline()
    main()
