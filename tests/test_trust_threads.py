"""Threads and processes that share a Learner, a Predictor, a tokenizer or a run's folder get equal results."""

import multiprocessing
import os
import random
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from small_learners import LABELS, MAKERS, TEXTS, WORDS, causal_lm, classifier, ulmfit_classifier
from fastai.callback.core import Callback

from fastai_tl.all import *
from fastai_tl.core import RunError
from fastai_tl.files import load_tree
from fastai_tl.locks import exclusive

THREADS = 8
fork = multiprocessing.get_context('fork')


def in_threads(*uses, repeats=2):
    "Return what each of `uses` gives, several times and all of them at once, in the order of the calls"
    calls = [use for _ in range(repeats) for use in uses]
    start = threading.Barrier(min(THREADS, len(calls)))

    def run(call):
        if start is not None and not start.broken:
            try:
                start.wait(2)
            except threading.BrokenBarrierError:
                pass
        return call()

    with ThreadPoolExecutor(min(THREADS, len(calls))) as pool:
        return list(pool.map(run, calls))


def silent(learn, fit):
    with learn.no_bar(), learn.no_logging():
        return fit()


def modes(learn):
    return [m.training for m in learn.model.modules()]


@pytest.fixture(autouse=True)
def one_thread():
    "So that the sums of PyTorch do not depend on how busy the machine is"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def uses_of(name, learn):
    "Return what a server could do with a Learner, as functions that return arrays or strings"
    if name in ('classifier', 'multilabel', 'regression', 'ulmfit_classifier'):
        return [
            lambda: learn.predict_batch(TEXTS).probs,
            lambda: learn.evaluate().probs,
            lambda: learn.predictor().predict_proba(TEXTS[:5]),
            lambda: learn.evaluate(ds_idx=0).losses,
        ]
    if name == 'tagger':
        return [
            lambda: [sentence.tags for sentence in learn.tag(TEXTS[:6])],
            lambda: learn.evaluate().accuracy,
            lambda: learn.predict(TEXTS[3]).tags,
        ]
    if name == 't5':
        return [
            lambda: learn.generate_texts(TEXTS[:4], max_new_tokens=4),
            lambda: learn.generate(TEXTS[4], max_new_tokens=4, do_sample=True, seed=3).texts,
        ]
    return [
        lambda: learn.perplexity(TEXTS).texts.nll.to_numpy(),
        lambda: learn.token_surprisal(TEXTS[1]).bits,
        lambda: learn.generate(TEXTS[:3], max_new_tokens=5, do_sample=True, seed=3).texts,
        lambda: learn.generate(TEXTS[1], max_new_tokens=5, do_sample=True, seed=4).texts,
        lambda: [''.join(learn.generate(TEXTS[2], max_new_tokens=5, stream=True))],
    ]


@pytest.mark.parametrize(
    'name', ['classifier', 'multilabel', 'regression', 'tagger', 't5', 'causal_lm', 'ulmfit_lm', 'ulmfit_classifier']
)
def test_one_learner(small_tokenizers, name):
    "Also while it is in training mode, which stays as it was; fastai's own `get_preds` ends it"
    learn = MAKERS[name](small_tokenizers)
    learn.remove_cbs([cb for cb in learn.cbs if cb.name == 'progress'])
    learn.model.train()
    uses = uses_of(name, learn)
    expected = [use() for use in uses]
    learn.model.train()
    before = modes(learn)
    for found, alone in zip(in_threads(*uses, repeats=4), expected * 4):
        assert np.array_equal(found, alone) if isinstance(alone, np.ndarray) else found == alone
    own = [use for use in uses if not {'evaluate', 'tag', 'predict'} & set(use.__code__.co_names)]
    learn.model.train()
    if own:
        in_threads(*own, repeats=4)
    assert modes(learn) == before and all(before)


@pytest.mark.parametrize('make', [classifier, ulmfit_classifier])
def test_one_predictor(small_tokenizers, make):
    predictor = make(small_tokenizers).predictor(cache=7)
    expected = predictor.predict_proba(TEXTS)
    parts = [slice(k, None, 3) for k in range(3)]
    found = in_threads(*[lambda part=part: predictor.predict_proba(TEXTS[part]) for part in parts], repeats=8)
    for part, probs in zip(parts * 8, found):
        np.testing.assert_allclose(probs, expected[part], atol=1e-6)


def test_one_tokenizer_in_several_learners(small_tokenizers):
    "The truncation of a fast tokenizer is a setting of it, which `perplexity` and `predict_batch` change"
    learn, lm = classifier(small_tokenizers), MAKERS['masked_lm'](small_tokenizers)
    assert learn.tokenizer is lm.tokenizer
    uses = [
        lambda: learn.predict_batch(TEXTS).probs,
        lambda: lm.perplexity(TEXTS[:4]).texts.nll.to_numpy(),
        lambda: (
            HFTextDataLoaders.from_lists(TEXTS, LABELS, learn.tokenizer, max_length=8, verbose=False)
            .train_ds[0][0]
            .numpy()
        ),
    ]
    random.seed(0)
    expected = [use() for use in uses]
    for found, alone in zip(in_threads(*uses[:2], repeats=6), expected[:2] * 6):
        np.testing.assert_array_equal(found, alone)


def test_seeds_neither_change_nor_need_the_global_state(small_tokenizers):
    "Other threads draw from PyTorch's own generator all the time"
    learn = causal_lm(small_tokenizers)
    stop = threading.Event()

    def draw():
        while not stop.is_set():
            torch.rand(3)

    options = dict(max_new_tokens=6, do_sample=True, seed=5)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    expected = learn.generate(TEXTS[:3], **options).texts
    assert torch.equal(torch.get_rng_state(), before)
    assert expected != learn.generate(TEXTS[:3], **{**options, 'seed': 6}).texts
    thread = threading.Thread(target=draw)
    thread.start()
    try:
        assert all(learn.generate(TEXTS[:3], **options).texts == expected for _ in range(4))
    finally:
        stop.set()
        thread.join()


def test_a_fit_and_predictions_take_turns(small_tokenizers):
    "The training gives the same weights, and the predictions are those from before or after it"
    alone, shared = classifier(small_tokenizers), classifier(small_tokenizers)
    shared.model.load_state_dict(alone.model.state_dict())
    for learn in (alone, shared):
        learn.remove_cbs([cb for cb in learn.cbs if cb.name == 'progress'])

    def fit(learn):
        with learn.no_logging():
            learn.fit(2, 1e-2, cbs=ResumableFitSeeds())

    before = alone.predict_batch(TEXTS).probs
    fit(alone)
    after = alone.predict_batch(TEXTS).probs
    with ThreadPoolExecutor(4) as pool:
        training = pool.submit(fit, shared)
        found = [pool.submit(lambda: shared.predict_batch(TEXTS).probs) for _ in range(6)]
        training.result()
        for probs in [o.result() for o in found]:
            assert np.allclose(probs, before, atol=1e-6) or np.allclose(probs, after, atol=1e-6)
    for a, b in zip(alone.model.parameters(), shared.model.parameters()):
        assert torch.equal(a, b)


class ResumableFitSeeds(Callback):
    "The seeds of each epoch, without a file"

    def before_epoch(self):
        start_epoch_from_seed(self.dls, 1, self.epoch)


def test_a_callback_may_use_the_model_during_a_fit(small_tokenizers):
    "Also with a text that is generated in a thread"
    learn, made = causal_lm(small_tokenizers), []

    class Show(Callback):
        def after_epoch(self):
            made.append(''.join(self.learn.generate('the film', max_new_tokens=3, stream=True)))
            made.append(float(self.learn.perplexity(TEXTS[:2])))

    silent(learn, lambda: learn.fit(2, 1e-3, cbs=Show()))
    assert len(made) == 4


def test_a_stream_that_waits_for_its_reader_blocks_nobody(small_tokenizers):
    learn = causal_lm(small_tokenizers)
    learn.model.train()
    expected = ''.join(learn.generate(TEXTS[0], max_new_tokens=6, stream=True))
    stream = learn.generate(TEXTS[0], max_new_tokens=6, stream=True)
    pieces = [next(stream)]
    learn.perplexity(TEXTS[:2])
    time.sleep(0.2)
    assert all(modes(learn)), 'while it waits, the model is as it was'
    other = learn.generate(TEXTS[0], max_new_tokens=6, stream=True)
    pieces += [piece for pair in zip(stream, other) for piece in pair[:1]]
    assert (''.join(pieces) + ''.join(stream)) == expected


def test_figures_and_warnings(small_tokenizers):
    "The style of Matplotlib and the filters of warnings are global"
    import matplotlib.pyplot as plt

    ev = classifier(small_tokenizers).evaluate(ds_idx=0)
    config = bert_config(small_tokenizers)
    style, filters = dict(plt.rcParams), list(warnings.filters)
    figures = in_threads(lambda: ev.plot_confusion(), lambda: layer_groups(transformers_model(config)), repeats=4)
    assert len({figure.get_size_inches().tobytes() for figure in figures[::2]}) == 1
    assert dict(plt.rcParams) == style and list(warnings.filters) == filters


def bert_config(toks):
    from small_learners import bert

    return bert(toks['encoder'])


def transformers_model(config):
    from transformers import BertModel

    return BertModel(config)


def test_locks_after_a_fork(small_tokenizers):
    "A lock that another thread holds in this moment is free in the child"
    learn = classifier(small_tokenizers)
    held, done = threading.Event(), threading.Event()

    def hold():
        with exclusive(learn):
            held.set()
            done.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(5)
    pid = os.fork()
    if not pid:
        with exclusive(learn):
            os._exit(7)
    for _ in range(100):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            break
        time.sleep(0.05)
    else:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        status = -1
    done.set()
    thread.join()
    assert status >= 0 and os.waitstatus_to_exitcode(status) == 7


# --- one folder of a run ---


class Slow(Callback):
    def __init__(self, seconds):
        self.seconds = seconds

    def after_epoch(self):
        time.sleep(self.seconds)


def train(folder, slow, pipe):
    "Train the language model of a run in this process, and send what came of it"
    rng = random.Random(0)
    texts = [' '.join(rng.choice(WORDS) for _ in range(12)) for _ in range(60)]
    try:
        ulm = ULMFiT(folder, config=dict(emb_sz=16, n_hid=24, n_layers=2), progress=False, min_freq=1, seq_len=10)
        ulm.pretrain(texts, epochs=2, bs=4, cbs=Slow(slow))
        pipe.send('done')
    except RunError as error:
        pipe.send(f'refused {error.message}')


def start(folder, slow):
    "Start a process that trains in a folder, and return the end of its pipe"
    here, there = fork.Pipe(False)
    fork.Process(target=train, args=(folder, slow, there), daemon=True).start()
    return here


def end(pipe):
    assert pipe.poll(100), 'the process takes too long'
    return pipe.recv()


def test_one_process_trains_in_a_folder(tmp_path):
    both = [start(tmp_path / 'shared', 3) for _ in range(2)]
    said = [end(pipe) for pipe in (start(tmp_path / 'alone', 0), *both)]
    assert said[0] == 'done'
    assert sorted(line.split()[0] for line in said[1:]) == ['done', 'refused']
    refused = next(line for line in said[1:] if line.startswith('refused'))
    assert 'another process' in refused and str(tmp_path / 'shared') in refused
    files = [load_tree(tmp_path / name / 'forward/general/encoder.safetensors') for name in ('alone', 'shared')]
    assert all(torch.equal(files[0]['weights'][key], files[1]['weights'][key]) for key in files[0]['weights'])
    assert [end(start(tmp_path / 'shared', 0)) for _ in range(2)] == ['done'] * 2, 'what is finished is only read'


def test_a_checkpoint_has_one_writer(small_tokenizers, tmp_path):
    "A second thread is refused; after an error the file can be used again"
    file = tmp_path / 'checkpoint.safetensors'
    inside, go_on = threading.Event(), threading.Event()

    class Wait(Callback):
        def after_epoch(self):
            inside.set()
            go_on.wait(20)

    class Fail(Callback):
        order = ResumableFit.order + 1

        def after_epoch(self):
            raise KeyError('of the user')

    learns = [classifier(small_tokenizers) for _ in range(3)]
    thread = threading.Thread(
        target=silent, args=(learns[0], lambda: learns[0].fit(2, 1e-3, cbs=[ResumableFit(file), Wait()]))
    )
    thread.start()
    inside.wait(20)
    with pytest.raises(RunError, match='another thread'):
        silent(learns[1], lambda: learns[1].fit(2, 1e-3, cbs=ResumableFit(file)))
    go_on.set()
    thread.join()
    assert load_tree(file)['epoch'] == 2
    with pytest.raises(KeyError):
        silent(learns[1], lambda: learns[1].fit(2, 1e-3, cbs=[ResumableFit(tmp_path / 'other'), Fail()]))
    with ThreadPoolExecutor(1) as pool:
        use = lambda: silent(learns[2], lambda: learns[2].fit(2, 1e-3, cbs=ResumableFit(tmp_path / 'other')))
        pool.submit(use).result()
    assert load_tree(tmp_path / 'other')['epoch'] == 2
