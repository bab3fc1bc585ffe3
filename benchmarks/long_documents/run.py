"""Memory and processor time of long documents: an AWD_LSTM classifier, and a Transformer that reads windows.

    python benchmarks/long_documents/run.py [--words 1000 4000 16000] [--json FILE]

Each figure is from a process of its own: the peak of its resident memory (VmHWM) above that before the first batch,
and processor seconds. Documents are sentences of the offline corpora, all of the same length in words.

- awd: AWD_LSTM of fastai's size (400, 1152, three layers), batches of 4 documents, from the start.
- windows: MiniLM with windows of 128 tokens that share 32, batches of 16 windows in training, of 4 documents otherwise.

`fit` is one epoch of four documents, `validate` and `predict` (the Predictor) read four."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import memory_mb, offline, parser, write_json

KINDS, STEPS, N = ('awd', 'windows'), ('fit', 'validate', 'predict'), 4


def documents(n, n_words):
    "Documents of `n_words` words"
    from fastai_tl.all import general_corpus

    words = ' '.join(general_corpus().text).split()
    rng = random.Random(0)
    starts = [rng.randrange(len(words)) for _ in range(n)]
    return [' '.join(words[(start + i) % len(words)] for i in range(n_words)) for start in starts]


def learner(kind, train, valid):
    "A classifier with training and validation texts"
    from fastai_tl.all import HFTextDataLoaders, hf_classifier_learner, minilm_folder
    from fastai_tl.all import awd_classifier_learner, classifier_dls, texts_vocab, tokenize_texts_once

    texts, n = train + valid, len(train)
    labels = ['a', 'b'] * (len(texts) // 2)
    if kind == 'windows':
        dls = HFTextDataLoaders.from_lists(texts, labels, minilm_folder(), valid=[i >= n for i in range(len(texts))],
                                           bs=16, val_bs=N, max_length=128, windows=32, verbose=False)
        return hf_classifier_learner(dls, minilm_folder())
    tokenized = tokenize_texts_once(texts)
    rows = [list(range(n)), list(range(n, len(texts)))]
    dls = classifier_dls(tokenized, labels, 'classification', *rows, texts_vocab(tokenized), bs=N)
    return awd_classifier_learner(dls, 'classification', 2, dict(emb_sz=400, n_hid=1152, n_layers=3))


def child(kind, step, n_words):
    "Print the processor seconds and the memory of one step"
    from fastai_tl.all import seed_everything

    seed_everything(0)
    long, short = documents(N, n_words), documents(2, 20)
    learn = learner(kind, long, short) if step == 'fit' else learner(kind, short, long)
    work = dict(fit=lambda: learn.fit(1, 1e-4), validate=learn.validate)
    if step == 'predict':
        model = learn.predictor()
        work['predict'] = lambda: model.predict(long)
    with learn.no_bar(), learn.no_logging():
        Path('/proc/self/clear_refs').write_text('5') # the peak begins here
        before, start = memory_mb('VmRSS'), time.process_time()
        work[step]()
    print(json.dumps(dict(seconds=round(time.process_time() - start, 1), more_mb=round(memory_mb('VmHWM') - before))))


def main():
    if '--child' in sys.argv:
        child(*sys.argv[2:4], int(sys.argv[4]))
        return
    ap = parser(__doc__, 'json')
    ap.add_argument('--words', nargs='*', type=int, default=[1000, 4000, 16000])
    args = ap.parse_args()
    res = {}
    for n in args.words:
        for kind in KINDS:
            for step in STEPS:
                call = [sys.executable, __file__, '--child', kind, step, str(n)]
                out = subprocess.run(call, text=True, stdout=subprocess.PIPE, check=True).stdout
                res[f'{kind} {step} {n}'] = json.loads(out.splitlines()[-1])
                print(f'{kind} {step} {n}', res[f'{kind} {step} {n}'], flush=True)
                write_json(args.json, dict(words=res))


if __name__ == '__main__':
    offline()
    main()
