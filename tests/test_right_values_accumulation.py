"Accumulated gradients, and gradients of several processes, are those of one large batch, for every task."

import os
import random
import subprocess
import sys
import textwrap

import pandas as pd
import pytest
import torch
from fastai.callback.all import GradientAccumulation
from fastai.callback.core import Callback
from fastai.losses import CrossEntropyLossFlat
from repo import clean_env
from transformers import BartConfig, BertConfig, GPT2Config, T5Config

from fastai_tl.all import *

WORDS = 'the film was very good bad dull fine plot actor scene slow bright ending music long short story'.split()
N_ROWS = 22


def sentences(n=N_ROWS, seed=0):
    "Return sentences of very different lengths"
    rng = random.Random(seed)
    return [' '.join(rng.choice(WORDS) for _ in range(rng.choice([2, 4, 30]))) for _ in range(n)]


TEXTS = sentences()
VALID = [i >= 20 for i in range(N_ROWS)]
LABELS = ['a', 'b', 'b', 'c', 'b'] * 4 + ['a', 'b']


@pytest.fixture(scope='module')
def tokenizers():
    return {kind: train_tokenizer(sentences(200), 400, kind) for kind in ('encoder', 'decoder', 'seq2seq')}


def bert(tok, **kwargs):
    return BertConfig(**kwargs, vocab_size=len(tok), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                      intermediate_size=32, max_position_embeddings=128, pad_token_id=tok.pad_token_id)


def classifier(toks, labels=LABELS, **kwargs):
    data = dict(multi=dict(task='multilabel'), value=dict(task='regression')).get(kwargs.pop('data', None), {})
    dls = HFTextDataLoaders.from_lists(TEXTS, labels, toks['encoder'], valid=VALID, bs=4, verbose=False, **data)
    return hf_classifier_learner(dls, bert(toks['encoder']), metrics=[], **kwargs)


def tagger(toks, **kwargs):
    words = [text.split() for text in TEXTS]
    tags = [['B-X' if word == 'film' else 'O' for word in sentence] for sentence in words]
    dls = HFTagDataLoaders.from_lists(words, tags, toks['encoder'], valid=VALID, bs=4)
    return hf_tagger_learner(dls, bert(toks['encoder']), metrics=[], **kwargs)


def answerer(toks):
    contexts = [f'{text} at noon' for text in TEXTS]
    df = pd.DataFrame(dict(question=['when'] * N_ROWS, context=contexts, answer=['noon'] * N_ROWS, valid=VALID))
    dls = HFQADataLoaders.from_df(df, toks['encoder'], valid_col='valid', bs=4, max_length=48, stride=8)
    return hf_qa_learner(dls, bert(toks['encoder']), metrics=[])


def masked_lm(toks):
    dls = HFMaskedLMDataLoaders.from_texts(TEXTS, toks['encoder'], max_length=40, bs=4)
    return hf_masked_lm_learner(dls, bert(toks['encoder']), metrics=[])


def causal_lm(toks):
    tok = toks['decoder']
    dls = HFCausalLMDataLoaders.from_texts(TEXTS, tok, max_length=24, bs=4)
    return hf_causal_lm_learner(dls, GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=len(tok), n_positions=64),
                                metrics=[])


def seq2seq(toks, config, **kwargs):
    tok = toks['seq2seq']
    dls = HFSeq2SeqDataLoaders.from_lists(TEXTS, TEXTS[::-1], tok, valid=VALID, bs=4)
    sizes = dict(d_model=16, vocab_size=len(tok), pad_token_id=tok.pad_token_id, eos_token_id=tok.eos_token_id,
                 decoder_start_token_id=tok.pad_token_id)
    return hf_seq2seq_learner(dls, config(**sizes), metrics=[], **kwargs)


def t5(**kwargs):
    return T5Config(d_kv=8, d_ff=32, num_layers=1, num_decoder_layers=1, num_heads=2, **kwargs)


def bart(**kwargs):
    return BartConfig(encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
                      encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=128, **kwargs)


def ulmfit_lm(toks):
    tokenized = tokenize_texts_once(sentences(60))
    dls = language_model_dls(tokenized, texts_vocab(tokenized), bs=4, seq_len=20)
    return awd_lm_learner(dls, dict(emb_sz=16, n_hid=16, n_layers=1), metrics=[])


def ulmfit_classifier(toks):
    tokenized = tokenize_texts_once(TEXTS)
    rows = list(range(N_ROWS))
    dls = classifier_dls(tokenized, LABELS, 'classification', rows[:20], rows[20:], texts_vocab(tokenized), bs=4)
    return awd_classifier_learner(dls, 'classification', 3, dict(emb_sz=16, n_hid=16, n_layers=1), metrics=[])


WEIGHTS = torch.tensor([1., 5., .5])
SEVERAL = [['a'], ['a', 'b'], ['b'], [], ['c']] * 4 + [['a'], ['b', 'c']]
VALUES = [float(len(text)) for text in TEXTS]
MAKERS = dict(
    classifier=classifier,
    class_weights=lambda toks: classifier(toks, class_weights=WEIGHTS.tolist()),
    balanced=lambda toks: classifier(toks, class_weights='balanced'),
    own_weighted_loss=lambda toks: classifier(toks, loss_func=CrossEntropyLossFlat(weight=WEIGHTS)),
    multilabel=lambda toks: classifier(toks, SEVERAL, data='multi'),
    regression=lambda toks: classifier(toks, VALUES, data='value'),
    tagger=tagger,
    weighted_tagger=lambda toks: tagger(toks, loss_func=TaggingLoss(weight=WEIGHTS[:2])),
    answerer=answerer,
    masked_lm=masked_lm,
    causal_lm=causal_lm,
    chunked_causal_lm=lambda toks: causal_lm(toks).chunked_loss(),
    t5=lambda toks: seq2seq(toks, t5),
    smoothed_bart=lambda toks: seq2seq(toks, bart, label_smoothing=.1),
    ulmfit_lm=ulmfit_lm,
    ulmfit_classifier=ulmfit_classifier,
)


def n_in_mean(loss_func, y):
    "Count by hand what the mean of a batch divides by"
    y = y.as_subclass(torch.Tensor)
    if y.is_floating_point():
        return y.numel()
    weight = getattr(getattr(loss_func, 'func', None), 'weight', None)
    total = 0.
    for target in (y if isinstance(loss_func, AnswerLoss) else y.flatten()):
        if target.numel() > 1:
            total += 1 # a row with the first and the last token of an answer
        elif target != -100:
            total += 1 if weight is None else float(weight[target])
    return total


class Expected(Callback):
    "Compute the gradient of the large batch from the gradients of the small ones, and compare it at each step"
    order = GradientAccumulation.order - 1 # after the regularization of an AWD_LSTM, before the loss is weighted
    run_valid = False

    def before_fit(self):
        self.small = []
        self.errors = []
        self.rows = []

    def after_loss(self):
        params = [p for p in self.model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(self.learn.loss_grad, params, retain_graph=True, allow_unused=True)
        flat = [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads)]
        y = self.yb[0]
        self.small.append((n_in_mean(self.loss_func, y), torch.cat([g.flatten() for g in flat]).double(), len(y)))

    def compare(self):
        counts, grads, rows = zip(*self.small)
        expected = sum(n * g for n, g in zip(counts, grads)) / sum(counts)
        params = [p for p in self.model.parameters() if p.requires_grad]
        flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        got = torch.cat([g.flatten() for g in flat]).double()
        self.errors.append(((got - expected).norm() / expected.norm()).item())
        self.rows.append(sum(rows))
        self.small = []


class Compare(Callback):
    order = 100 # after all that changes the gradients

    def before_step(self):
        self.learn.expected.compare()


def errors_of(learn, n_acc, epochs=1):
    "Return the relative error of the gradient of each step, and the number of rows that it is of"
    seed_everything(0)
    expected = Expected()
    with learn.no_bar(), learn.no_logging():
        learn.fit(epochs, 1e-3, cbs=[expected, Compare(), GradientAccumulation(n_acc)])
    assert expected.errors
    return expected.errors, expected.rows


@pytest.mark.parametrize('name', MAKERS)
def test_accumulated_gradient_is_that_of_the_large_batch(tokenizers, name):
    "In each step, the mean over the targets of all its small batches; 10 is not a multiple of the batch size"
    learn = MAKERS[name](tokenizers)
    for n_acc in (8, 10):
        errors, rows = errors_of(learn, n_acc, epochs=2)
        assert max(errors) <= 1e-5, (name, n_acc, errors)
        assert min(rows) >= n_acc


def test_a_fit_leaves_no_gradients_to_the_next(tokenizers):
    "20 rows in batches of 4 and 16 rows a step: one batch is left over"
    learn = tagger(tokenizers)
    for _ in range(2):
        errors, rows = errors_of(learn, 16)
        assert max(errors) <= 1e-5
        assert rows == [16]
        assert all(p.grad is None for p in learn.model.parameters())


def test_without_accumulation_nothing_changes(tokenizers):
    "The Callback of the factories leaves plain fits bitwise as they are"
    weights = []
    for keep in (True, False):
        seed_everything(0)
        learn = tagger(tokenizers)
        if not keep:
            learn.remove_cbs(LargeBatchGradient)
        seed_everything(0)
        with learn.no_bar(), learn.no_logging():
            learn.fit(1, 1e-3)
        weights.append([p.clone() for p in learn.model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*weights))


# --- several processes ---

PROCESS = '''
    import os, sys, torch, torch.distributed as dist, warnings
    warnings.filterwarnings('ignore')
    sys.path.insert(0, {tests!r})
    from test_right_values_accumulation import *
    from torch.nn.parallel import DistributedDataParallel
    rank = int(os.environ['RANK'])
    n_acc = {n_acc}
    dist.init_process_group('gloo', init_method={store!r}, rank=rank, world_size=2)
    tok = train_tokenizer(sentences(200), 400)
    words = [text.split() for text in TEXTS]
    tags = [['B-X' if word == 'film' else 'O' for word in sentence] for sentence in words]

    def learner(rows, bs):
        seed_everything(0)
        dls = HFTagDataLoaders.from_lists([words[i] for i in rows]*2, [tags[i] for i in rows]*2, tok, bs=bs,
                                          valid=[False]*len(rows) + [True]*len(rows))
        config = bert(tok, hidden_dropout_prob=0., attention_probs_dropout_prob=0.)
        return hf_tagger_learner(dls, config, metrics=[])

    class Wrap(Callback):
        order = -1000
        def before_fit(self):
            self.learn.model = DistributedDataParallel(self.learn.model)
        def after_fit(self):
            self.learn.model = self.learn.model.module

    class Grab(Callback):
        order = 100
        def before_step(self):
            self.learn.got = torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])
            self.learn.got = self.learn.got.clone()

    def gradient(rows, bs, cbs):
        learn = learner(rows, bs)
        with learn.no_bar(), learn.no_logging():
            learn.fit(1, 0., wd=0., cbs=[Grab(), *cbs])
        return learn.got

    os.environ.pop('RANK') # fastai would split the work itself
    by_length = sorted(range(16), key=lambda i: len(words[i]))
    mine = by_length[:8] if rank == 0 else by_length[8:] # short sentences in one process, long ones in the other
    accumulation = [GradientAccumulation(n_acc)] if n_acc else []
    ours = gradient(mine, 4 if n_acc else 8, [Wrap(), *accumulation])
    whole = gradient(range(16), 16, [])
    error = ((ours - whole).norm()/whole.norm()).item()
    assert error <= 1e-5, error
    print('error', error)
'''


@pytest.mark.slow
@pytest.mark.parametrize('n_acc', [None, 8], ids=['one batch', 'accumulated'])
def test_several_processes(tmp_path, n_acc):
    "Two processes with sentences of different lengths have the gradient of all the sentences together"
    store = f'file://{tmp_path}/store'
    code = textwrap.dedent(PROCESS).format(n_acc=n_acc, store=store, tests=os.path.dirname(__file__))
    env = [clean_env(RANK=str(rank), OMP_NUM_THREADS='1', GLOO_SOCKET_IFNAME='lo') for rank in range(2)]
    runs = [subprocess.Popen([sys.executable, '-c', code], env=e, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                             text=True) for e in env]
    outputs = [run.communicate(timeout=200)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], '\n'.join(outputs)
