"""A text gets the same numbers alone and in any batch, padded on either side, from every architecture

The reference is transformers' own model with one text at a time and no padding.
"""

import inspect
import logging
import warnings
from copy import deepcopy

import pytest
import torch
import transformers as T
from transformers.models.auto import modeling_auto

from fastai.text.all import AWD_LSTM, awd_lstm_clas_config, get_text_classifier
from fastai_tl.all import *
from fastai_tl.data.hf_tokenizer import pad_rows
from fastai_tl.models.awd_lstm import pool_real_tokens
from fastai_tl.models.hf import HFModel
from repo import benchmark
from test_architectures import IDS, MODELS, build

pytestmark = pytest.mark.filterwarnings('ignore')
TOLERANCE = 1e-5
TASKS = dict(classification='SEQUENCE_CLASSIFICATION', tagging='TOKEN_CLASSIFICATION', qa='QUESTION_ANSWERING',
             causal_lm='CAUSAL_LM', masked_lm='MASKED_LM', seq2seq='SEQ_TO_SEQ_CAUSAL_LM')
SIDES = dict(right=False, left=True)


def texts_of(hf, lens, n_words):
    "Random texts without special tokens; the end-of-text token last, which some heads look for"
    special = {v for k, v in hf.config.to_dict().items() if k.endswith('_token_id') and isinstance(v, int)}
    words = torch.tensor([i for i in range(n_words) if i not in special])
    g = torch.Generator().manual_seed(0)
    rows = [words[torch.randint(len(words), (n,), generator=g)] for n in lens]
    eos = getattr(hf.config, 'eos_token_id', None)
    if isinstance(eos, int) and 0 <= eos < n_words:
        for row in rows:
            row[-1] = eos
    return rows


def output(hf, ids, target=None):
    "What transformers gives for one text, computed without a cache: FSMT has no causal mask with one"
    kw = dict(attention_mask=torch.ones_like(ids[None]))
    if 'use_cache' in inspect.signature(hf.forward).parameters:
        kw['use_cache'] = False
    if target is not None:
        kw['decoder_input_ids'] = target[None]
    out = hf(input_ids=ids[None], return_dict=True, **kw)
    return torch.stack([out.start_logits, out.end_logits], -1)[0] if 'start_logits' in out else out.logits[0]


@torch.no_grad()
def largest_difference(hf, lens, seq2seq=False):
    "Between a text alone and in a batch, relative to the largest output above 1, for each side of the padding"
    model = HFModel(hf).eval()
    rows = texts_of(hf, lens, min(model.vocab_sz, 10_000))
    targets = [row[:max(2, len(row)//2)] for row in rows] if seq2seq else [None]*len(rows)
    alone = [output(hf, row, target) for row, target in zip(rows, targets)]
    res = {}
    for side, left in SIDES.items():
        parts = [part for part in (rows, targets) if part[0] is not None]
        batch = [pad_rows([row[None] for row in part], -1, left=left) for part in parts]
        out = model(*[TensorTokens(x) for x in batch])
        out = torch.stack(out, -1) if isinstance(out, tuple) else out
        is_token = batch[-1][:, 0] >= 0
        worst = 0.
        for own, ref, keep in zip(out, alone, is_token):
            own = own[keep] if ref.dim() > 1 else own
            worst = max(worst, ((own - ref).abs().max()/ref.abs().max().clamp(min=1)).item())
        res[side] = worst
    return res


def noisy(hf):
    "Larger weights, so that positions and padding count; position tables most of all"
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in hf.named_parameters():
            if p.is_floating_point():
                p.add_(torch.randn(p.shape, generator=g)*(.5 if 'position' in name else .05))
    return hf.eval()


@pytest.mark.parametrize('name', MODELS)
def test_every_family_alone_and_in_a_batch(name):
    hf = noisy(build(name))
    seq2seq = hf.config.is_encoder_decoder and 'Classification' not in type(hf).__name__
    # a text of CANINE can have no more characters than the model has hash buckets
    lens = (18, 12, 9, 5) if name == 'canine' else (34, 21, 9, 5)
    differences = largest_difference(hf, lens, seq2seq)
    assert max(differences.values()) <= TOLERANCE, differences


CONFIGS = [name for name in ('bert', 'roberta', 'mpnet', 'electra', 'xlnet', 'deberta-v3', 'big_bird', 'funnel',
                             'llama-classifier', 'gpt2', 't5', 'bart')]
@pytest.mark.parametrize('task', ['TokenClassification', 'QuestionAnswering'])
@pytest.mark.parametrize('name', CONFIGS)
def test_heads_for_tokens_alone_and_in_a_batch(name, task):
    family = getattr(T, MODELS[name][0]).config_class
    auto = getattr(T, f'AutoModelFor{task}')
    if family not in auto._model_mapping:
        pytest.skip('transformers has no such head')
    torch.manual_seed(0)
    hf = noisy(auto.from_config(family(**{**IDS, **MODELS[name][1]})))
    differences = largest_difference(hf, (34, 21, 9, 5))
    assert max(differences.values()) <= TOLERANCE, differences


def all_classes():
    "`(task, class of the configuration, class of the model)` of all six tasks, each class once"
    seen = set()
    for task, name in TASKS.items():
        mapping = getattr(modeling_auto, f'MODEL_FOR_{name}_MAPPING')
        for config in mapping.keys():
            found = mapping[config]
            for cls in found if isinstance(found, tuple) else (found,):
                if cls not in seen:
                    seen.add(cls)
                    yield task, config, cls


def difference_in_child(run, config, cls, task):
    "Build a class as the benchmark does, and compare; `why` says what transformers itself cannot do"
    try:
        torch.manual_seed(0)
        hf = noisy(run.build(config, cls))
        rows = texts_of(hf, (16,), 100)
        with torch.no_grad():
            output(hf, rows[0], rows[0] if task == 'seq2seq' else None)
        if task == 'seq2seq' and not hf.config.is_encoder_decoder:
            return dict(built=False, why='an audio or image model without an encoder for texts')
    except BaseException as e:
        return dict(built=False, why=f'{type(e).__name__}: {e}'[:200])
    try:
        # lengths that Reformer can cut into its chunks, and Funnel into its blocks
        return dict(built=True, **largest_difference(hf, (56, 40, 12, 8), task == 'seq2seq'))
    except Exception as e:
        return dict(built=True, why=f'{type(e).__name__}: {e}'[:200])


# they need more than texts: code books, images, or one length only
OTHER_INPUTS = {'musicgen', 'musicgen_melody', 'perceiver', 'led', 'longformer', 'qwen3_asr', 'cwm'}


@pytest.mark.slow
@pytest.mark.parametrize('task', TASKS)
def test_all_architectures_of_transformers(task):
    run = benchmark('architectures')
    logging.disable(logging.WARNING)
    warnings.simplefilter('ignore')
    wrong, n_right = {}, 0
    try:
        for of_task, config, cls in all_classes():
            if of_task != task:
                continue
            res = run.in_child(difference_in_child, run, config, cls, task)
            values = [res.get(side, 1.) for side in SIDES]
            if res['built'] and max(values) > TOLERANCE and config.model_type not in OTHER_INPUTS:
                wrong[cls.__name__] = res
            n_right += res['built'] and max(values) <= TOLERANCE
    finally:
        logging.disable(logging.NOTSET)
    assert not wrong, wrong
    assert n_right >= 8


def test_blocks_of_big_bird_do_not_depend_on_the_other_texts():
    "A text that is long enough for blocks has them in any batch, also after a short text; a short one never has them"
    config = T.BigBirdConfig(**IDS, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                             max_position_embeddings=160, block_size=4, num_random_blocks=2)
    torch.manual_seed(0)
    hf = noisy(T.BigBirdForTokenClassification(config))
    long, short = texts_of(hf, (120, 30), 60)
    with torch.no_grad():
        want = [output(deepcopy(hf), row) for row in (long, short)]
        model = HFModel(hf).eval()
        for rows in ([long, short], [short, long], [long]):
            out = model(TensorTokens(pad_rows([row[None] for row in rows], -1)))
            for row, got in zip(rows, out):
                ref = want[0] if row is long else want[1]
                assert (got[:len(row)] - ref).abs().max() <= TOLERANCE


WORDS = 'the film was very good bad dull fine plot actor scene slow bright ending music long short story'.split()
TEXTS = [' '.join(WORDS[(i*7 + j*j) % len(WORDS)] for j in range(3 + i % 9)) for i in range(40)]
SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
             max_position_embeddings=80, hidden_dropout_prob=0., attention_probs_dropout_prob=0.)
ENCODERS = dict(bert=T.BertConfig, roberta=T.RobertaConfig, mpnet=T.MPNetConfig, electra=T.ElectraConfig)


def tokenizer(side):
    tok = train_tokenizer(TEXTS, 400)
    tok.padding_side = side
    return tok


def config(name, tok):
    return ENCODERS[name](vocab_size=len(tok), pad_token_id=tok.pad_token_id, **SMALL)


@pytest.mark.parametrize('side', SIDES)
@pytest.mark.parametrize('name', ENCODERS)
def test_classifier_and_predictor(name, side):
    "`get_preds`, `predict` and the Predictor agree with one text at a time, whatever the tokenizer's side"
    tok = tokenizer(side)
    dls = HFTextDataLoaders.from_lists(TEXTS, ['a', 'b']*20, tok, bs=16, verbose=False, seed=0)
    learn = hf_classifier_learner(dls, config(name, tok))
    noisy(learn.model.hf)
    hf = learn.model.hf
    texts = [dls.valid_ds.items[i][0] for i in range(len(dls.valid_ds))]
    with torch.no_grad():
        want = torch.cat([hf(**tok(text, return_tensors='pt')).logits.softmax(-1) for text in texts])
    with learn.no_bar(), learn.no_logging():
        got = learn.get_preds()[0]
        one = learn.predict(texts[0])[2]
    assert (got - want).abs().max() <= TOLERANCE
    assert (one - want[0]).abs().max() <= TOLERANCE
    probs = torch.as_tensor(learn.predictor().predict(texts).probs)
    assert (probs - want).abs().max() <= TOLERANCE


@pytest.mark.parametrize('name', ENCODERS)
def test_training_on_either_side_is_the_same(name):
    "The same steps from the same weights; with stored states of the frozen layers too"
    ends = []
    for side in SIDES:
        for cached in (False, True):
            tok = tokenizer(side)
            seed_everything(0)
            dls = HFTextDataLoaders.from_lists(TEXTS, ['a', 'b']*20, tok, bs=8, verbose=False, seed=0)
            learn = hf_classifier_learner(dls, config(name, tok))
            noisy(learn.model.hf).train()
            learn.freeze_to(-2)
            seed_everything(1)
            with learn.no_bar(), learn.no_logging():
                learn.fit(1, 1e-2, cbs=CachedPrefix() if cached else None)
                ends.append(learn.get_preds()[0])
    for end in ends[2:]:
        assert (end - ends[0]).abs().max() <= 1e-4
    assert (ends[1] - ends[0]).abs().max() <= 1e-4


@pytest.mark.parametrize('side', SIDES)
@pytest.mark.parametrize('name', ENCODERS)
def test_tagger(name, side):
    tok = tokenizer(side)
    words = [text.split() for text in TEXTS]
    tags = [['B-X' if j % 3 == 0 else 'O' for j in range(len(row))] for row in words]
    dls = HFTagDataLoaders.from_lists(words, tags, tok, bs=16, verbose=False, seed=0)
    learn = hf_tagger_learner(dls, config(name, tok))
    noisy(learn.model.hf)
    with learn.no_bar(), learn.no_logging():
        together = learn.word_probs(words)
        alone = [learn.word_probs([row])[0] for row in words]
    for row, got, want in zip(words, together, alone):
        assert abs(got - want).max() <= TOLERANCE
        enc = dls.tokenizer(row, is_split_into_words=True, return_tensors='pt')
        with torch.no_grad():
            logits = learn.model.hf(**enc).logits[0].softmax(-1)
        first = [enc.word_ids(0).index(i) for i in range(len(row))]
        assert abs(got - logits[first].numpy()).max() <= TOLERANCE


@pytest.mark.parametrize('side', SIDES)
def test_targets_of_a_sequence_to_sequence_model(side):
    tok = train_tokenizer(TEXTS, 400, kind='seq2seq')
    tok.padding_side = side
    dls = HFSeq2SeqDataLoaders.from_lists(TEXTS, TEXTS[::-1], tok, bs=16, seed=0)
    config = T.BartConfig(vocab_size=len(tok), pad_token_id=tok.pad_token_id, eos_token_id=tok.eos_token_id,
                          bos_token_id=tok.bos_token_id, decoder_start_token_id=tok.eos_token_id, dropout=0.,
                          **{k: v for k, v in MODELS['bart'][1].items() if k != 'decoder_start_token_id'})
    learn = hf_seq2seq_learner(dls, config)
    noisy(learn.model.hf)
    x, y = dls.valid.one_batch()
    y = y.as_subclass(torch.Tensor)
    assert (x[:, 0] < 0).any()
    if side == 'left': # the targets too
        y = pad_rows([row[row != -100] for row in y], -100, left=True)
    decoder_x = decoder_inputs(learn.model, y)
    start = learn.model.hf.config.decoder_start_token_id
    with torch.no_grad():
        out = learn.model(x, decoder_x)
        for i in range(len(x)):
            ids, target = x[i, 0][x[i, 0] >= 0], y[i][y[i] != -100]
            want = output(learn.model.hf, ids, torch.cat([torch.tensor([start]), target[:-1]]))
            assert (out[i][y[i] != -100] - want).abs().max() <= TOLERANCE
    texts = [learn.predict(text, max_new_tokens=8) for text in TEXTS[:4]]
    with learn.no_bar():
        assert list(learn.generate_texts(TEXTS[:4], max_new_tokens=8)) == texts


@pytest.mark.parametrize('side', SIDES)
@pytest.mark.parametrize('max_len', [None, 40])
def test_awd_lstm_classifier(side, max_len):
    "fastai's model with our pooling: texts shorter and longer than a chunk, and than `max_len`"
    torch.manual_seed(0)
    model = get_text_classifier(AWD_LSTM, 60, 2, seq_len=16, config={**awd_lstm_clas_config, 'emb_sz': 8, 'n_hid': 12},
                                max_len=max_len, pad_idx=1)
    pool_real_tokens(model).eval()
    g = torch.Generator().manual_seed(0)
    rows = [torch.randint(2, 60, (n,), generator=g) for n in (70, 50, 33, 16, 3)]
    with torch.no_grad():
        alone = torch.cat([model(row[None])[0] for row in rows])
        batch = model(pad_rows(rows, 1, left=side == 'left'))[0]
    assert (alone - batch).abs().max() <= TOLERANCE
