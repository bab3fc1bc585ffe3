"""Eight threads on one Learner and on one Predictor, and four processes on one folder of a run."""

import json
import multiprocessing
import os
import random
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

N_THREADS, N_PROCESSES = 8, 4
WORDS = 'the film was very good bad dull fine plot actor scene slow bright ending music long short story'.split()
fork = multiprocessing.get_context('fork')


def sentences(n, seed=0):
    rng = random.Random(seed)
    return [' '.join(rng.choice(WORDS) for _ in range(rng.choice([2, 4, 30]))) for _ in range(n)]


def learners():
    "Make a Learner for each kind of model, with the calls of a server"
    from fastai_tl.all import (
        HFCausalLMDataLoaders,
        HFTextDataLoaders,
        awd_classifier_learner,
        classifier_dls,
        hf_causal_lm_learner,
        hf_classifier_learner,
        texts_vocab,
        tokenize_texts_once,
        train_tokenizer,
    )
    from transformers import BertConfig, GPT2Config

    texts = sentences(40)
    labels = ['ab'[len(t) % 2] for t in texts]
    valid = [i >= 30 for i in range(40)]
    tok = train_tokenizer(sentences(200), 400)
    config = BertConfig(
        vocab_size=len(tok),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        pad_token_id=tok.pad_token_id,
    )
    hf = hf_classifier_learner(
        HFTextDataLoaders.from_lists(texts, labels, tok, valid=valid, bs=8, verbose=False), config
    )
    tokens = tokenize_texts_once(texts, progress=False)
    vocab = texts_vocab(tokens, min_freq=1)
    dls = classifier_dls(tokens, labels, 'classification', list(range(30)), list(range(30, 40)), vocab, bs=8)
    awd = awd_classifier_learner(dls, 'classification', 2, dict(emb_sz=16, n_hid=24, n_layers=2))
    decoder = train_tokenizer(sentences(200), 400, 'decoder')
    gpt2 = GPT2Config(vocab_size=len(decoder), n_embd=16, n_layer=1, n_head=2, n_positions=64)
    lm = hf_causal_lm_learner(HFCausalLMDataLoaders.from_texts(texts, decoder, max_length=24, bs=4), gpt2)
    sampling = dict(max_new_tokens=5, do_sample=True)
    calls = {}
    for name, learn in dict(transformer=hf, awd_lstm=awd).items():
        predictor = learn.predictor(cache=9)
        calls |= {
            f'{name}: predict_batch': lambda learn=learn: learn.predict_batch(texts).probs,
            f'{name}: evaluate': lambda learn=learn: learn.evaluate().probs,
            f'{name}: losses of the training rows': lambda learn=learn: learn.evaluate(ds_idx=0).losses,
            f'{name}: one Predictor, all texts': lambda predictor=predictor: predictor.predict_proba(texts),
            f'{name}: one Predictor, some texts': lambda predictor=predictor: predictor.predict_proba(texts[3:7]),
        }
    calls |= {
        'language model: perplexity': lambda: lm.perplexity(texts[:8]).texts.nll.to_numpy(),
        'language model: surprisal': lambda: lm.token_surprisal(texts[2]).bits,
        'language model: generate, seed 1': lambda: lm.generate(texts[:3], seed=1, **sampling).texts,
        'language model: generate, seed 2': lambda: lm.generate(texts[:3], seed=2, **sampling).texts,
        'language model: stream': lambda: ''.join(lm.generate(texts[1], max_new_tokens=5, stream=True)),
    }
    return (hf, awd, lm), calls


def difference(found, expected):
    "Return the largest difference; infinity for other texts"
    import numpy as np

    if isinstance(expected, np.ndarray):
        return float(np.abs(found - expected).max()) if found.shape == expected.shape else float('inf')
    return 0.0 if found == expected else float('inf')


def try_threads(repeats):
    "Make all calls at once and in random order, while the models are in training mode"
    models, calls = learners()
    for learn in models:
        learn.remove_cbs([cb for cb in learn.cbs if cb.name == 'progress'])
    expected = {name: call() for name, call in calls.items()}
    for learn in models:
        learn.model.train()
    names = [name for name in calls for _ in range(repeats)]
    random.Random(1).shuffle(names)
    errors, worst = Counter(), dict.fromkeys(calls, 0.0)

    def run(name):
        try:
            return name, difference(calls[name](), expected[name])
        except Exception as error:
            errors[f'{name}: {type(error).__name__}'] += 1
            return name, float('inf')

    start = time.perf_counter()
    with ThreadPoolExecutor(N_THREADS) as pool:
        for name, found in pool.map(run, names):
            worst[name] = max(worst[name], found)
    return dict(
        threads=N_THREADS,
        calls=len(names),
        kinds=len(calls),
        wrong=sum(o > 1e-5 for o in worst.values()),
        errors=dict(errors),
        largest_difference=max(worst.values()),
        seconds=round(time.perf_counter() - start, 1),
    )


def train(folder, pipe):
    "Train a language model and a classifier of a run in this process; wait while another one trains"
    import pandas as pd
    from fastai_tl.all import ULMFiT
    from fastai_tl.core import RunError

    texts = sentences(60)
    df = pd.DataFrame(dict(text=texts, label=['ab'[len(t) % 2] for t in texts]))
    config, refused = dict(emb_sz=16, n_hid=24, n_layers=2), 0
    while True:
        try:
            ulm = ULMFiT(folder, config=config, progress=False, min_freq=1, seq_len=10, bidirectional=True)
            ulm.pretrain(texts, epochs=2, bs=4)
            learn = ulm.classifier(df, epochs=[1, 1, 1, 2], bs=8)
            break
        except RunError:
            refused += 1
            time.sleep(0.2)
        except Exception as error:
            pipe.send(dict(error=f'{type(error).__name__}: {error}'[:200]))
            return
    pipe.send(dict(probs=learn.predict_batch(texts).probs.tolist(), refused=refused))


def in_processes(folder, n):
    "Start `n` processes that train in one folder, and return what they send"
    pipes = [fork.Pipe(False) for _ in range(n)]
    for _, there in pipes:
        fork.Process(target=train, args=(folder, there), daemon=True).start()
    return [here.recv() if here.poll(600) else dict(error='too slow') for here, _ in pipes]


def try_processes(repeats):
    "Train in one folder with four processes, several times"
    with tempfile.TemporaryDirectory() as d:
        (alone,) = in_processes(Path(d) / 'alone', 1)
        runs = [in_processes(Path(d) / str(i), N_PROCESSES) for i in range(repeats)]
    found = [o for run in runs for o in run]
    return dict(
        processes=N_PROCESSES,
        runs=repeats,
        results=len(found),
        equal=sum(o.get('probs') == alone['probs'] for o in found),
        errors=[o['error'] for o in found if 'error' in o],
        refused=sum(o.get('refused', 0) for o in found),
    )


def threads(args):
    "Try threads and processes"
    import torch
    from common import write_json

    torch.set_num_threads(1)
    result = dict(threads=try_threads(args.repeats), processes=try_processes(max(args.repeats // 5, 1)))
    result['machine'] = dict(cores=os.cpu_count(), torch=torch.__version__)
    print(json.dumps(result, indent=1))
    write_json(args.json, result)
