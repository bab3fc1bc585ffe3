"""Perplexity compared with the plainest loops: each token once, alone, with its context."""

import math
import random

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.schedule import *
from fastai.text.all import (AWD_LSTM, CrossEntropyLossFlat, DataLoaders, Learner, LMLearner, Perplexity,
                             awd_lstm_lm_config, language_model_learner)
from test_generation import Wrapper, make_bpe, train_gpt2

from fastai_tl.all import *


@pytest.fixture(scope='module')
def texts():
    df = docstring_corpus()
    return [*df[(df.split == 'train')].text[:900], *general_corpus().text[::12]]


@pytest.fixture(scope='module')
def gpt(texts):
    "Trained with 64 of its 128 positions; it reads long texts 64 tokens at a time"
    model, tok = train_gpt2(texts, vocab=400, steps=250)
    return model.double().eval(), tok


@pytest.fixture(scope='module')
def awd(texts):
    words = tokenize_texts_once(texts[:900], progress=False)
    dls = language_model_dls(words, texts_vocab(words, min_freq=2), bs=16, seq_len=40)
    seed_everything(0)
    config = {**awd_lstm_lm_config, 'emb_sz': 32, 'n_hid': 48, 'n_layers': 2}
    learn = language_model_learner(dls, AWD_LSTM, pretrained=False, drop_mult=.1, config=config)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1, 2e-2)
    learn.model.double()
    return learn


SENTENCE = 'The number of elements to return, or None for all of them. If True, the input is sorted first.'
MIXED = ['a', 'The array.', SENTENCE, '', 'x']


def mixed(texts):
    return MIXED + [' '.join(texts[:6]), texts[3], ' '.join(texts[10:14])]


def one_token(model, ids, t, begin):
    "Negative log-likelihood of token `t`, from a forward pass of its own over the tokens from `begin`"
    with torch.no_grad():
        logits = model(torch.tensor([ids[begin:t]])).logits[0, -1]
    return -logits.log_softmax(-1)[ids[t]].item()


# --- causal models ---

@pytest.mark.parametrize('stride', [1, 64, 128])
def test_double_loop(gpt, texts, stride):
    "Windows of 128: each token with all 128 before it (stride 1), at least 65 (64), or what its window has (128)"
    model, tok = gpt
    for text in mixed(texts):
        ids = [0, *tok(text)['input_ids']]
        if stride == 1 and len(ids) > 200:
            text = tok.decode(ids[1:200])
            ids = [0, *tok(text)['input_ids']]
        res = text_perplexity(model, text, tok, stride=stride)
        nll = []
        for t in range(1, len(ids)):
            window = 0 if t <= 128 else (t-128-1)//stride+1  # the one that scores the token
            end = min(128+window*stride, len(ids)-1)
            nll.append(one_token(model, ids, t, max(0, end-128)))
        assert res.corpus.tokens == len(nll)
        if nll:
            assert float(res) == pytest.approx(math.exp(np.mean(nll)), rel=1e-9)
        else:
            assert math.isnan(float(res))


def test_stride_one_is_the_longest_context(gpt, texts):
    model, tok = gpt
    ids = [0, *tok(' '.join(texts[:3]))['input_ids']][:90]
    text = tok.decode(ids[1:])
    assert [0, *tok(text)['input_ids']] == ids
    got = text_perplexity(model, text, tok, stride=1, max_length=20).scores[0].nll
    want = [one_token(model, ids, t, max(0, t-20)) for t in range(1, len(ids))]
    assert got == pytest.approx(want, rel=1e-9)


def test_stride_does_not_matter_for_short_texts(gpt):
    short, long = (text_perplexity(gpt[0], MIXED, gpt[1], stride=s).texts.nll for s in (1, 128))
    assert short.tolist() == pytest.approx(long.tolist(), rel=1e-9)


def test_batch_order_and_neighbours_do_not_matter(gpt, awd, texts):
    many = mixed(texts)
    shuffled = random.Random(0).sample(many, len(many))
    for model, tok in ((gpt[0], gpt[1]), (awd, None)):
        def nll_by_text(ts, **kwargs):
            return dict(zip(ts, text_perplexity(model, ts, tok, **kwargs).texts.nll))
        alone = {t: nll_by_text([t])[t] for t in many}
        for ts, bs in ((many, 1), (many, 3), (many, 16), (shuffled, 4)):
            assert nll_by_text(ts, bs=bs) == pytest.approx(alone, rel=1e-9)


def test_small_budget_gives_the_same(gpt, texts, monkeypatch):
    import fastai_tl.generation.scoring as scoring
    usual = text_perplexity(gpt[0], mixed(texts), gpt[1]).texts.nll
    monkeypatch.setattr(scoring, 'LOGITS_BUDGET', {'cpu': 10, 'other': 10})
    small = text_perplexity(gpt[0], mixed(texts), gpt[1]).texts.nll
    assert small.tolist() == pytest.approx(usual.tolist(), rel=1e-9)


def test_corpus_is_weighted_by_tokens(gpt, texts):
    res = text_perplexity(gpt[0], mixed(texts), gpt[1])
    nll = sum(s.nll.sum() for s in res.scores)
    assert float(res) == pytest.approx(math.exp(nll/sum(len(s.ids) for s in res.scores)))
    assert res.corpus.bits_per_char == pytest.approx(nll/math.log(2)/sum(len(t) for t in mixed(texts)))
    n_tokens = sum(len(gpt[1](t)['input_ids']) for t in mixed(texts))
    assert res.corpus.tokens == n_tokens, 'each token of each text once'
    assert abs(float(res)-res.texts.perplexity.mean()) > 1, 'the mean over texts is something else'


def test_transformers_own_loss(gpt):
    "Without a token for the beginning the value of tutorials; the characters of the first token are not counted"
    model, tok = gpt
    x = torch.tensor([tok(SENTENCE)['input_ids']])
    with torch.no_grad():
        loss = model(x, labels=x).loss.item()
    res = text_perplexity(model, SENTENCE, tok, bos=False)
    assert float(res) == pytest.approx(math.exp(loss), rel=1e-6)
    assert res.scores[0].chars == len(SENTENCE)-len(tok.decode(x[0, :1])) and res.corpus.tokens == x.shape[1]-1


def test_empty_and_one_token_texts(gpt, awd):
    model, tok = gpt
    res = text_perplexity(model, ['', 'a', '   '], tok)
    assert res.texts.tokens.tolist()[:2] == [0, 1]
    assert math.isnan(res.texts.perplexity[0]) and res.texts.perplexity[1] > 1
    assert text_perplexity(model, ['a'], tok, bos=False).texts.tokens[0] == 0
    res = awd.perplexity(['', 'the', ' '])
    assert res.texts.tokens.tolist() == [0, 1, 0]
    assert math.isnan(res.texts.perplexity[0]) and not math.isnan(float(res))


def test_token_that_a_template_puts_in_front(gpt, texts):
    "A tokenizer that writes the token for the beginning itself gets no second one"
    from tokenizers import processors
    model, tok = gpt
    own = make_bpe(texts, 400)
    own.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single='<|endoftext|> $A', special_tokens=[('<|endoftext|>', 0)])
    assert own('a')['input_ids'][0] == 0
    want = text_perplexity(model, MIXED, tok).texts.nll.tolist()
    for bos in (None, True, False):
        assert text_perplexity(model, MIXED, own, bos=bos).texts.nll.tolist() == pytest.approx(want, rel=1e-9)


# --- tables ---

def test_a_table_is_read_by_the_columns_of_the_data(awd, gpt):
    "The spec of a Learner's data says where the texts are; other models read the column `text`"
    want = awd.perplexity(MIXED[:3]).texts.nll.tolist()
    assert awd.perplexity(pd.DataFrame(dict(text=MIXED[:3]))).texts.nll.tolist() == want
    spec = awd.dls.spec
    try:
        awd.dls.spec = spec.replace(columns=dict(text='review'))
        assert awd.perplexity(pd.DataFrame(dict(review=MIXED[:3], text='x'))).texts.nll.tolist() == want
        with pytest.raises(DataError, match='review'):
            awd.perplexity(pd.DataFrame(dict(text=MIXED[:3])))
    finally:
        awd.dls.spec = spec
    table = pd.DataFrame(dict(text=MIXED[:3]))
    assert text_perplexity(gpt[0], table, gpt[1]).texts.text.tolist() == MIXED[:3]


# --- AWD_LSTM ---

def awd_nll(learn, ids):
    "Sum of the negative log-likelihoods of all tokens but the first, from fastai's own forward pass"
    model = learn.model.eval()
    model[0].bs = 1
    model.reset()
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0][0, :-1]
    return F.cross_entropy(logits, torch.tensor(ids[1:]), reduction='sum').item() if len(ids) > 1 else 0.


def test_awd_equals_its_own_forward_pass(awd, texts):
    adapter = text_model(awd).adapter
    for text in mixed(texts):
        assert awd.perplexity(text).corpus.nll == pytest.approx(awd_nll(awd, adapter.encode(text)), rel=1e-9)


def test_backward_awd(awd, texts):
    "A model that reads from right to left starts at the end of the text"
    words = tokenize_texts_once(texts[:50], progress=False)
    dls = language_model_dls(words, awd.dls.vocab, bs=8, seq_len=20, backwards=True)
    back = LMLearner(dls, awd.model, loss_func=CrossEntropyLossFlat())
    adapter = text_model(back).adapter
    ids = [adapter.bos_id, *adapter.encode(SENTENCE)]
    assert back.perplexity(SENTENCE).corpus.nll == pytest.approx(awd_nll(back, ids), rel=1e-9)
    assert ''.join(back.token_surprisal(SENTENCE).pieces).replace(' ', '')[-6:] == 'first.'


def test_unknown_words_are_counted(awd):
    res = awd.perplexity(['asdf jkl qwer tyui', 'the number of'])
    assert res.texts.unk_share.tolist() == [1., 0.]


# --- masked models ---

@pytest.fixture(scope='module')
def bert():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast
    words = 'the cat sat on mat and saw dog that log nothing at all'.split()
    vocab = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *words]
    wp = Tokenizer(models.WordPiece({w: i for i, w in enumerate(vocab)}, unk_token='[UNK]'))
    wp.pre_tokenizer = pre_tokenizers.Whitespace()
    wp.post_processor = processors.TemplateProcessing(
        single='[CLS] $A [SEP]', special_tokens=[('[CLS]', 2), ('[SEP]', 3)])
    tok = PreTrainedTokenizerFast(tokenizer_object=wp, unk_token='[UNK]', pad_token='[PAD]', cls_token='[CLS]',
                                  sep_token='[SEP]', mask_token='[MASK]')
    seed_everything(0)
    model = BertForMaskedLM(BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                       intermediate_size=16, max_position_embeddings=12)).double().eval()
    for p in model.parameters():
        p.data.add_(torch.randn_like(p)*.3)
    return model, tok, words


def masked_token(model, ids, i):
    "Negative log-likelihood of token `i` when it is masked, in the window in which it is closest to the middle"
    begin = 0
    if len(ids) > 10:
        begins = [*range(0, len(ids)-10, 3), len(ids)-10]
        begin = max(begins, key=lambda b: min(i-b, b+9-i) if b <= i < b+10 else -1)
    row = [2, *ids[begin:begin+10], 3]
    place = 1+i-begin
    row[place] = 4
    with torch.no_grad():
        logits = model(torch.tensor([row])).logits[0, place]
    return -logits.log_softmax(-1)[ids[i]].item()


def test_pseudo_perplexity(bert):
    model, tok, words = bert
    rng = random.Random(0)
    texts = [' '.join(rng.choices(words, k=k)) for k in (1, 3, 10, 11, 25)] + ['the zebra sat']
    for bs in (1, 7):
        res = text_perplexity(model, texts, tok, bs=bs, stride=3)
        assert res.name == 'pseudo_perplexity' and 'perplexity' not in res.texts.columns
        for text, scored in zip(texts, res.scores):
            ids = tok(text, add_special_tokens=False)['input_ids']
            want = [masked_token(model, ids, i) for i in range(len(ids))]
            assert scored.nll == pytest.approx(want, rel=1e-9)
    assert res.texts.unk_share.tolist()[-1] == pytest.approx(1/3)


def test_seq2seq_has_none(gpt):
    from transformers import T5Config, T5ForConditionalGeneration
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=400, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(FastaiTLError, match='a causal or a masked language model'):
        text_perplexity(t5, 'a', gpt[1])


# --- three sentences, and the program of the reference walk-through ---

THREE = ['The quick brown fox jumps over the lazy dog.', 'Quantum entanglement defies classical intuition.',
         'asdf jkl qwer tyui']


def test_walkthrough_perplexity(gpt, capsys):
    "The sentence without sense is the strangest to a model of subwords"
    for text in THREE:
        print(f'text: {text}\nperplexity: {calculate_perplexity(text, *gpt):.2f}\n')
    lines = capsys.readouterr().out.splitlines()
    found = [float(line.split()[1]) for line in lines if line.startswith('perplexity')]
    assert len(found) == 3 and max(found) == found[2]
    res = text_perplexity(gpt[0], THREE, gpt[1])
    assert res.texts.perplexity.argmax() == res.texts.bits_per_char.argmax() == 2 and res.corpus.unk_share == 0


def test_words_see_only_unknown_ones(awd):
    res = awd.perplexity(THREE)
    assert res.texts.unk_share[2] == 1 and res.texts.perplexity.argmin() == 2, 'this is why the share is reported'


# --- surprisal ---

def test_surprisal_adds_up(gpt, awd, texts):
    for model, tok in ((gpt[0], gpt[1]), (awd, None)):
        for text in (SENTENCE, texts[5], '貓 sat on the 墊子。'):
            res = token_surprisal(model, text, tok)
            assert res.bits.sum() == pytest.approx(text_perplexity(model, text, tok).corpus.nll/math.log(2))
            if tok is not None:
                assert ''.join(res.pieces) == text
            assert 'bits' in res._repr_html_() and res.plot() is not None


# --- the metric ---

def padded_batch(rows):
    "Token ids and the next tokens as targets, which are -100 where there is none"
    n = max(map(len, rows))
    x = [row + [0]*(n-len(row)) for row in rows]
    y = [row[1:] + [-100]*(n-len(row)+1) for row in rows]
    return torch.tensor(x), torch.tensor(y)


def test_corpus_perplexity_of_padded_batches(gpt):
    "Batches of different length with ignored targets: the value over all tokens, whatever the batches"
    model, tok = gpt
    texts = ('The array.', SENTENCE, 'If True', 'The number of samples to draw', 'x', 'None')
    rows = [[0, *tok(text)['input_ids']][:128] for text in texts]
    nll = sum(one_token(model, row, t, 0) for row in rows for t in range(1, len(row)))
    want = math.exp(nll/sum(len(row)-1 for row in rows))
    def loss(pred, y): return F.cross_entropy(pred.flatten(0, 1), y.flatten(), ignore_index=-100)
    for sizes in ((1, 5), (2, 2, 2), (6,), (3, 3)):
        it = iter(rows)
        dl = [padded_batch([next(it) for _ in range(n)]) for n in sizes]
        learn = Learner(DataLoaders(dl, dl), Wrapper(model), loss_func=loss, metrics=[Perplexity(), CorpusPerplexity()])
        with learn.no_bar(), learn.no_logging():
            _, theirs, ours = learn.validate(dl=dl)
        assert ours == pytest.approx(want, rel=1e-5)
    assert abs(theirs-want) > .5, "fastai's value is another one"
