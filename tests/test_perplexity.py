"""Perplexity beside loops that could not be plainer: each token once, alone, with its context."""

import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.schedule import *
from fastai.text.all import AWD_LSTM, CrossEntropyLossFlat, DataLoaders, Learner, LMLearner, Perplexity, awd_lstm_lm_config, language_model_learner
from fastai_tl.all import *
from test_generation import Wrapper, make_bpe, train_gpt2


@pytest.fixture(scope='module')
def texts():
    df = docstring_corpus()
    return [*df[(df.split == 'train')].text[:900], *general_corpus().text[::12]]


@pytest.fixture(scope='module')
def gpt(texts):
    "Trained with 64 of its 128 positions; long texts are read 64 tokens at a time"
    m, tok = train_gpt2(texts, vocab=400, steps=250)
    return m.double().eval(), tok


@pytest.fixture(scope='module')
def awd(texts):
    words = tokenize_texts_once(texts[:900], progress=False)
    dls = language_model_dls(words, texts_vocab(words, min_freq=2), bs=16, seq_len=40)
    seed_everything(0)
    learn = language_model_learner(dls, AWD_LSTM, pretrained=False, drop_mult=.1, config={**awd_lstm_lm_config, 'emb_sz': 32, 'n_hid': 48, 'n_layers': 2})
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 2e-2)
    learn.model.double()
    return learn


MIXED = ['a', 'The array.', 'The number of elements to return, or None for all of them. If True, the input is sorted first.', '', 'x']


def mixed(texts): return MIXED + [' '.join(texts[:6]), texts[3], ' '.join(texts[10:14])]


def one_token(model, ids, t, begin):
    "Surprise at token `t`, from a forward pass of its own over the tokens from `begin`"
    with torch.no_grad(): return -model(torch.tensor([ids[begin:t]])).logits[0, -1].log_softmax(-1)[ids[t]].item()


# --- causal models ---

@pytest.mark.parametrize('stride', [1, 64, 128])
def test_double_loop(gpt, texts, stride):
    "Windows of 128: each token with the whole 128 before it (stride 1), at least 65 (64), or what its window has (128)"
    model, tok = gpt
    for text in mixed(texts):
        ids = [0, *tok(text)['input_ids']]
        if stride == 1 and len(ids) > 200: text = tok.decode(ids[1:200]); ids = [0, *tok(text)['input_ids']]
        res = text_perplexity(model, text, tok, stride=stride)
        nll = []
        for t in range(1, len(ids)):
            k = 0 if t <= 128 else (t-128-1)//stride+1          # the window that scores it
            end = min(128+k*stride, len(ids)-1)
            nll.append(one_token(model, ids, t, max(0, end-128)))
        assert res.corpus.tokens == len(nll)
        if nll: assert float(res) == pytest.approx(math.exp(np.mean(nll)), rel=1e-9)
        else: assert math.isnan(float(res))


def test_stride_one_is_the_longest_context(gpt, texts):
    model, tok = gpt
    ids = [0, *tok(' '.join(texts[:3]))['input_ids']][:90]
    text = tok.decode(ids[1:]); assert [0, *tok(text)['input_ids']] == ids
    got = text_perplexity(model, text, tok, stride=1, max_length=20).scores[0].nll
    assert got == pytest.approx([one_token(model, ids, t, max(0, t-20)) for t in range(1, len(ids))], rel=1e-9)


def test_stride_does_not_matter_for_short_texts(gpt, texts):
    a, b = (text_perplexity(gpt[0], MIXED, gpt[1], stride=s).texts.nll for s in (1, 128))
    assert a.tolist() == pytest.approx(b.tolist(), rel=1e-9)


def test_batch_order_and_neighbours_do_not_matter(gpt, awd, texts):
    many = mixed(texts)
    for args in ((gpt[0], gpt[1]), (awd, None)):
        run = lambda ts, **kw: dict(zip(ts, text_perplexity(args[0], ts, args[1], **kw).texts.nll))
        alone = {t: run([t])[t] for t in many}
        shuffled = random.Random(0).sample(many, len(many))
        for ts, bs in ((many, 1), (many, 3), (many, 16), (shuffled, 4)): assert run(ts, bs=bs) == pytest.approx(alone, rel=1e-9)


def test_small_budget_gives_the_same(gpt, texts, monkeypatch):
    import fastai_tl.generation.scoring as score
    a = text_perplexity(gpt[0], mixed(texts), gpt[1]).texts.nll
    monkeypatch.setattr(score, 'LOGITS_BUDGET', {'cpu': 10, 'other': 10})
    assert text_perplexity(gpt[0], mixed(texts), gpt[1]).texts.nll.tolist() == pytest.approx(a.tolist(), rel=1e-9)


def test_corpus_is_weighted_by_tokens(gpt, texts):
    r = text_perplexity(gpt[0], mixed(texts), gpt[1])
    assert float(r) == pytest.approx(math.exp(sum(s.nll.sum() for s in r.scores)/sum(len(s.ids) for s in r.scores)))
    assert r.corpus.bits_per_char == pytest.approx(sum(s.nll.sum() for s in r.scores)/math.log(2)/sum(len(t) for t in mixed(texts)))
    assert r.corpus.tokens == sum(len(gpt[1](t)['input_ids']) for t in mixed(texts)), 'each token of each text once'
    assert abs(float(r)-r.texts.perplexity.mean()) > 1, 'which the mean over texts is not'


def test_transformers_own_loss(gpt, texts):
    "Without a token for the beginning: the figure of the tutorials; and the first token's characters are not counted"
    model, tok = gpt
    t = MIXED[2]; x = torch.tensor([tok(t)['input_ids']])
    with torch.no_grad(): loss = model(x, labels=x).loss.item()
    r = text_perplexity(model, t, tok, bos=False)
    assert float(r) == pytest.approx(math.exp(loss), rel=1e-6)
    assert r.scores[0].chars == len(t)-len(tok.decode(x[0, :1])) and r.corpus.tokens == x.shape[1]-1


def test_empty_and_one_token_texts(gpt, awd):
    model, tok = gpt
    r = text_perplexity(model, ['', 'a', '   '], tok)
    assert r.texts.tokens.tolist()[:2] == [0, 1] and math.isnan(r.texts.perplexity[0]) and r.texts.perplexity[1] > 1
    assert text_perplexity(model, ['a'], tok, bos=False).texts.tokens[0] == 0
    r = awd.perplexity(['', 'the', ' '])
    assert r.texts.tokens.tolist() == [0, 1, 0] and math.isnan(r.texts.perplexity[0]) and not math.isnan(float(r))


def test_token_that_a_template_puts_in_front(gpt, texts):
    "A tokenizer that writes the beginning itself is not given a second one"
    from tokenizers import processors
    model, tok = gpt
    own = make_bpe(texts, 400)
    own.backend_tokenizer.post_processor = processors.TemplateProcessing(single='<|endoftext|> $A', special_tokens=[('<|endoftext|>', 0)])
    assert own('a')['input_ids'][0] == 0
    for bos in (None, True, False): assert text_perplexity(model, MIXED, own, bos=bos).texts.nll.tolist() == pytest.approx(text_perplexity(model, MIXED, tok).texts.nll.tolist(), rel=1e-9)


# --- AWD_LSTM ---

def test_awd_equals_its_own_forward_pass(awd, texts):
    codec = text_model(awd).codec
    for text in mixed(texts):
        ids = codec.encode(text)
        m = awd.model.eval(); m[0].bs = 1; m.reset()
        with torch.no_grad(): want = F.cross_entropy(m(torch.tensor([ids]))[0][0, :-1], torch.tensor(ids[1:]), reduction='sum').item() if len(ids) > 1 else 0.
        assert awd.perplexity(text).corpus.nll == pytest.approx(want, rel=1e-9)


def test_backward_awd(awd, texts):
    "A model that reads from right to left starts at what follows the end"
    words = tokenize_texts_once(texts[:50], progress=False)
    bdls = language_model_dls(words, awd.dls.vocab, bs=8, seq_len=20, backwards=True)
    back = LMLearner(bdls, awd.model, loss_func=CrossEntropyLossFlat())
    codec = text_model(back).codec
    r = back.perplexity(MIXED[2])
    ids = [codec.bos_id, *codec.encode(MIXED[2])]
    m = back.model.eval(); m[0].bs = 1; m.reset()
    with torch.no_grad(): want = F.cross_entropy(m(torch.tensor([ids]))[0][0, :-1], torch.tensor(ids[1:]), reduction='sum').item()
    assert r.corpus.nll == pytest.approx(want, rel=1e-9)
    assert ''.join(back.token_surprisal(MIXED[2]).pieces).replace(' ', '')[-6:] == 'first.'


def test_unknown_words_are_counted(awd):
    r = awd.perplexity(['asdf jkl qwer tyui', 'the number of'])
    assert r.texts.unk_share.tolist() == [1., 0.]


# --- masked models ---

@pytest.fixture(scope='module')
def bert():
    from tokenizers import Tokenizer as Tok, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast
    words = 'the cat sat on mat and saw dog that log nothing at all'.split()
    wp = Tok(models.WordPiece({w: i for i, w in enumerate(['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *words])}, unk_token='[UNK]'))
    wp.pre_tokenizer = pre_tokenizers.Whitespace(); wp.post_processor = processors.TemplateProcessing(single='[CLS] $A [SEP]', special_tokens=[('[CLS]', 2), ('[SEP]', 3)])
    tok = PreTrainedTokenizerFast(tokenizer_object=wp, unk_token='[UNK]', pad_token='[PAD]', cls_token='[CLS]', sep_token='[SEP]', mask_token='[MASK]')
    seed_everything(0)
    model = BertForMaskedLM(BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, max_position_embeddings=12)).double().eval()
    for p in model.parameters(): p.data.add_(torch.randn_like(p)*.3)
    return model, tok, words


def test_pseudo_perplexity(bert):
    "Each token masked in turn, in the window whose middle it is nearest to"
    model, tok, words = bert
    rng = random.Random(0)
    texts = [' '.join(rng.choices(words, k=k)) for k in (1, 3, 10, 11, 25)] + ['the zebra sat']
    for bs in (1, 7):
        r = text_perplexity(model, texts, tok, bs=bs, stride=3)
        assert r.name == 'pseudo_perplexity' and 'perplexity' not in r.texts.columns
        for text, s in zip(texts, r.scores):
            ids, want = tok(text, add_special_tokens=False)['input_ids'], []
            begins = [0] if len(ids) <= 10 else [*range(0, len(ids)-10, 3), len(ids)-10]
            for i in range(len(ids)):
                b = max(begins, key=lambda b: min(i-b, b+9-i) if b <= i < b+10 else -1) if len(ids) > 10 else 0
                row = [2, *ids[b:b+10], 3]; row[1+i-b] = 4
                with torch.no_grad(): want.append(-model(torch.tensor([row])).logits[0, 1+i-b].log_softmax(-1)[ids[i]].item())
            assert s.nll == pytest.approx(want, rel=1e-9)
    assert r.texts.unk_share.tolist()[-1] == pytest.approx(1/3)


def test_seq2seq_has_none(gpt):
    from transformers import T5Config, T5ForConditionalGeneration
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=400, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(FastaiTLError, match='one text given another'): text_perplexity(t5, 'a', gpt[1])


# --- three sentences, and the walk-through's program ---

THREE = ['The quick brown fox jumps over the lazy dog.', 'Quantum entanglement defies classical intuition.', 'asdf jkl qwer tyui']


def test_walkthrough_perplexity(gpt, capsys):
    "The sentence without sense is the strangest to a model of subwords"
    for text in THREE: print(f'text: {text}\nperplexity: {calculate_perplexity(text, *gpt):.2f}\n')
    found = [float(l.split()[1]) for l in capsys.readouterr().out.splitlines() if l.startswith('perplexity')]
    assert len(found) == 3 and max(found) == found[2]
    r = text_perplexity(gpt[0], THREE, gpt[1])
    assert r.texts.perplexity.argmax() == r.texts.bits_per_char.argmax() == 2 and r.corpus.unk_share == 0


def test_words_see_only_unknown_ones(awd):
    r = awd.perplexity(THREE)
    assert r.texts.unk_share[2] == 1 and r.texts.perplexity.argmin() == 2, 'which is why the share is reported'


# --- surprisal ---

def test_surprisal_adds_up(gpt, awd, texts):
    for args in ((gpt[0], gpt[1]), (awd, None)):
        for text in (MIXED[2], texts[5], '貓 sat on the 墊子。'):
            s = token_surprisal(args[0], text, args[1])
            assert s.bits.sum() == pytest.approx(text_perplexity(args[0], text, args[1]).corpus.nll/math.log(2))
            if args[1] is not None: assert ''.join(s.pieces) == text
            assert 'bits' in s._repr_html_() and s.plot() is not None


# --- the metric ---

def test_corpus_perplexity_of_padded_batches(gpt):
    "Batches of different length with ignored targets: the figure over all tokens, whatever the batches"
    model, tok = gpt
    rows = [[0, *tok(t)['input_ids']][:128] for t in ('The array.', MIXED[2], 'If True', 'The number of samples to draw', 'x', 'None')]
    def batch(rs):
        n = max(map(len, rs))
        return torch.tensor([r+[0]*(n-len(r)) for r in rs]), torch.tensor([r[1:]+[-100]*(n-len(r)+1) for r in rs])
    with torch.no_grad(): nll = [F.cross_entropy(model(torch.tensor([r])).logits[0, :-1], torch.tensor(r[1:]), reduction='sum').item() for r in rows]
    want = math.exp(sum(nll)/sum(len(r)-1 for r in rows))
    loss = lambda p, y: F.cross_entropy(p.flatten(0, 1), y.flatten(), ignore_index=-100)
    for cut in ((1, 5), (2, 2, 2), (6,), (3, 3)):
        it = iter(rows); dl = [batch([next(it) for _ in range(k)]) for k in cut]
        learn = Learner(DataLoaders(dl, dl), Wrapper(model), loss_func=loss, metrics=[Perplexity(), CorpusPerplexity()])
        with learn.no_bar(), learn.no_logging(): _, theirs, ours = learn.validate(dl=dl)
        assert ours == pytest.approx(want, rel=1e-5)
    assert abs(theirs-want) > .5, "which fastai's is not"
