"Causal and masked language models: shifts, masks and losses against independent computations."

import math
from collections import Counter

import numpy as np
import pytest
import torch
from fastai.callback.all import EarlyStoppingCallback, GradientAccumulation, SaveModelCallback
from fastai.callback.schedule import *
from fastai.learner import load_learner
from fastcore.all import L
from transformers import BertConfig, GPT2Config, LlamaConfig, RobertaConfig

from fastai_tl.all import *
from fastai_tl.callbacks import evaluating

SIZES = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    vocab_size=600,
    max_position_embeddings=80,
)


@pytest.fixture(scope='module')
def df():
    return docstring_corpus(label='role').groupby('label').head(60).reset_index(drop=True)


@pytest.fixture(scope='module')
def tokenizers(df):
    return {
        k: train_tokenizer(df.text, 600, k, lowercase=True, max_length=64) for k in ('encoder', 'decoder', 'seq2seq')
    }


@pytest.fixture
def causal(df, tokenizers):
    seed_everything(0)
    dls = HFCausalLMDataLoaders.from_df(df, tokenizers['decoder'], max_length=32, bs=8)
    return hf_causal_lm_learner(
        dls, GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=600, n_positions=64, initializer_range=0.1)
    )


@pytest.fixture
def masked(df, tokenizers):
    seed_everything(0)
    dls = HFMaskedLMDataLoaders.from_df(df, tokenizers['encoder'], max_length=48, bs=8)
    return hf_masked_lm_learner(dls, BertConfig(**SIZES, initializer_range=0.1))


@pytest.fixture(params=['causal', 'masked'])
def learn(request):
    return request.getfixturevalue(request.param)


def quiet(learn, f, *args, **kwargs):
    with learn.no_bar(), learn.no_logging():
        return getattr(learn, f)(*args, **kwargs)


# --- causal: what is predicted ---


@pytest.mark.parametrize('max_length', [5, 32, 64])
def test_every_token_is_predicted_once_an_epoch(df, tokenizers, max_length):
    "Read off the batches, as a model sees them, and compared with the tokenizer's own numbers"
    tok = tokenizers['decoder']
    dls = HFCausalLMDataLoaders.from_df(df, tok, max_length=max_length, bs=7)
    for dl in dls.loaders:
        orders = []
        for _ in range(2):
            seen, first = Counter(), []
            for x, y in dl:
                assert ((y == -100) == (x.ids < 0)).all()  # -100 is padding of the last block and nothing else
                assert (y[:, :-1] == x.ids[:, 1:])[x.ids[:, 1:] >= 0].all()  # the target is the next token
                seen += Counter(y[y != -100].tolist())
                first += x.ids[:, 0].tolist()
            orders.append(first)
            ends = Counter({tok.eos_token_id: len(dl.dataset.docs)})
            ids = [t for d in dl.dataset.docs for t in d.tolist()]
            assert seen + Counter(dl.dataset.stream[:1].tolist()) == Counter(ids)
            assert Counter(ids) - ends == Counter(t for d in dl.dataset.docs for t in d[:-1].tolist())
        assert (orders[0] != orders[1]) == (dl is dls.train)  # cut at other places every epoch, for training
    texts = {tuple(tok(t)['input_ids']) for t in df.text}
    assert {tuple(d[:-1].tolist()) for l in dls.loaders for d in l.dataset.docs} == texts


def test_document_boundaries_keep_the_tokenizers_own_tokens(df):
    "A tokenizer that begins texts with one token, and ends them with another, as Llama's"
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    t = train_tokenizer(df.text, 400, 'seq2seq').backend_tokenizer
    t.post_processor = processors.TemplateProcessing(single='<pad> $A', special_tokens=[('<pad>', 0)])
    tok = PreTrainedTokenizerFast(tokenizer_object=t, bos_token='<pad>', eos_token='</s>')
    dls = HFCausalLMDataLoaders.from_df(df, tok, max_length=16)
    for d in dls.valid_ds.docs:
        assert d[0] == 0 and d[-1] == 2 and not {0, 2} & set(d[1:-1].tolist())


@pytest.mark.parametrize(
    'config',
    [
        GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=600, n_positions=64, initializer_range=0.2),
        LlamaConfig(**SIZES, num_key_value_heads=1, initializer_range=0.2),
    ],
    ids=['gpt2', 'llama'],
)
def test_causal_loss_is_the_models_own(df, tokenizers, config):
    learn = hf_causal_lm_learner(HFCausalLMDataLoaders.from_df(df, tokenizers['decoder'], max_length=32, bs=8), config)
    for x, y in learn.dls.valid:  # the last batch has a short block
        whole = torch.cat([x.ids, y[:, -1:].as_subclass(torch.Tensor)], 1)
        for i, n in enumerate((y != -100).sum(1).tolist()):
            whole[i, n] = y[i, n - 1]
        labels = whole.where(whole >= 0, -100)
        with evaluating(learn.model):
            theirs = learn.model.hf(
                input_ids=whole.clamp(min=0), attention_mask=(whole >= 0).long(), labels=labels
            ).loss
            ours = learn.loss_func(learn.model(x), y)
        assert abs(ours - theirs) < 1e-5


# --- masked: what is hidden ---


@pytest.mark.parametrize('pack', [False, True])
@pytest.mark.parametrize('whole_words', [False, True])
def test_masks_against_the_tokenizer(df, tokenizers, pack, whole_words):
    "From the batches: targets are original tokens, never special ones; BERT's shares; whole words"
    tok, seen = tokenizers['encoder'], Counter()
    dls = HFMaskedLMDataLoaders.from_df(df, tok, max_length=48, bs=16, pack=pack, whole_words=whole_words)
    blocks = {tuple(b.tolist()): s for b, s in zip(dls.train_ds.blocks, dls.train_ds.starts)}
    seed_everything(1)
    for _ in range(8):
        for x, y in dls.train:
            y = y.as_subclass(torch.Tensor)
            original = x.ids.where(y == -100, y)
            for o, i, t in zip(original.tolist(), x.ids.tolist(), y.tolist()):
                n = len([k for k in o if k >= 0])
                starts = blocks[tuple(o[:n])]  # what is not hidden is the text's
                ordinary = [k not in tok.all_special_ids for k in o[:n]]
                assert not any(t[k] != -100 for k in range(n) if not ordinary[k]) and set(t[n:]) <= {-100}
                hit = [k for k in range(n) if t[k] != -100]
                seen.update(
                    tokens=sum(ordinary),
                    chosen=len(hit),
                    mask=sum(i[k] == tok.mask_token_id for k in hit),
                    kept=sum(i[k] == t[k] for k in hit),
                )
                assert not any(i[k] in tok.all_special_ids and i[k] != tok.mask_token_id for k in hit)
                if whole_words:
                    for k in range(1, n):
                        if ordinary[k] and ordinary[k - 1] and not starts[k]:
                            assert (t[k] == -100) == (t[k - 1] == -100)
    n = seen['chosen']
    assert seen['chosen'] / seen['tokens'] == pytest.approx(
        0.15, abs=0.012
    )  # at least one a text, which lifts short ones
    assert seen['mask'] / n == pytest.approx(0.8, abs=4 * (0.16 / n) ** 0.5) and seen['kept'] / n == pytest.approx(
        0.1, abs=4 * (0.09 / n) ** 0.5 + 1 / 600
    )


def test_word_starts_by_offsets(df, tokenizers):
    "A word begins where, in the text, the token before has not ended in the same run of letters"
    tok = tokenizers['encoder']
    ds = HFMaskedLMDataLoaders.from_texts(
        df.text, tok, valid=[False] * len(df.text[:-1]) + [True], max_length=60
    ).train_ds
    for t in df.text[:30]:
        enc = tok(t.lower(), add_special_tokens=False, return_offsets_mapping=True)
        k = next(k for k, b in enumerate(ds.blocks) if b[1:-1].tolist() == enc['input_ids'][:58])
        for s, b, a in zip(ds.starts[k][2:-1], enc['offset_mapping'][1:], enc['offset_mapping']):
            if (
                t.lower()[b[0] : b[1]].isalpha()
                and t.lower()[a[1] - 1 : a[1]].isalpha()
                and t.lower()[b[0] : b[0] + 1] != ' '
                and b[0] == a[1]
            ):
                assert not s
            if t.lower()[b[0] : b[1]].startswith(' ') and t.lower()[b[0] : b[1]].strip().isalpha():
                assert s


def test_validation_masks_are_fixed(masked):
    a, b = (quiet(masked, 'validate') for _ in range(2))
    assert list(a) == list(b)
    first = [y.tolist() for _, y in masked.dls.valid]
    quiet(masked, 'fit_one_cycle', 1, 1e-3)
    assert first == [y.tolist() for _, y in masked.dls.valid]


@pytest.mark.parametrize(
    'config',
    [
        BertConfig(**SIZES, initializer_range=0.2),
        RobertaConfig(**{**SIZES, 'max_position_embeddings': 90}, initializer_range=0.2),
    ],
    ids=['bert', 'roberta'],
)
def test_masked_loss_is_the_models_own(df, tokenizers, config):
    learn = hf_masked_lm_learner(HFMaskedLMDataLoaders.from_df(df, tokenizers['encoder'], max_length=48, bs=8), config)
    for x, y in learn.dls.valid:
        with evaluating(learn.model):
            assert (
                abs(
                    learn.loss_func(learn.model(x), y)
                    - learn.model.hf(
                        input_ids=x.ids.clamp(min=0), attention_mask=x.mask, labels=y.as_subclass(torch.Tensor)
                    ).loss
                )
                < 1e-5
            )


# --- all of fastai ---


def by_hand(learn):
    "Accuracy and perplexity by tokens, from the log-probabilities of each"
    lp, right = [], []
    with evaluating(learn.model):
        for x, y in learn.dls.valid:
            out = learn.model(x).log_softmax(-1)
            for o, t in zip(out, y.tolist()):
                lp += [o[k, j].item() for k, j in enumerate(t) if j != -100]
                right += [int(o[k].argmax()) == j for k, j in enumerate(t) if j != -100]
    return np.mean(right), math.exp(-np.mean(lp))


def test_metrics_count_tokens(learn):
    quiet(learn, 'fit_one_cycle', 1, 5e-3)
    acc, ppl = by_hand(learn)
    assert learn.recorder.values[-1][2] == pytest.approx(acc, abs=1e-6) and learn.recorder.values[-1][
        3
    ] == pytest.approx(ppl, rel=1e-4)


def test_get_preds(learn):
    inp, p, y, dec, loss = quiet(learn, 'get_preds', with_input=True, with_decoded=True, with_loss=True)
    ds = learn.dls.valid_ds
    assert len(p) == len(y) == len(dec) == len(loss) == len(ds)
    for i in range(0, len(ds), 5):  # in the dataset's order, although batches are sorted
        x, t = ds[i]
        n = len(t)
        assert (
            inp[i].ids[:n].tolist() == x.ids.tolist() and y[i][:n].tolist() == t.tolist() and (y[i][n:] == -100).all()
        )
        assert (dec[i] == p[i].argmax(-1)).all() and torch.allclose(p[i].sum(-1), torch.ones(len(p[i])), atol=1e-4)
        k = (t != -100).nonzero().flatten()
        assert loss[i].item() == pytest.approx(-p[i][k, t.as_subclass(torch.Tensor)[k]].log().mean().item(), rel=1e-3)


def test_texts_of_different_lengths_come_as_a_list(masked):
    assert isinstance(quiet(masked, 'get_preds')[0], L)


def test_accumulated_gradients_are_those_of_a_larger_batch(df, tokenizers):
    "Blocks of equal length have equally many targets, so the batch mean is the mean of its parts' means"
    states = []
    for bs, cbs in ((8, []), (4, [GradientAccumulation(8)])):
        seed_everything(0)
        dls = HFCausalLMDataLoaders.from_texts(df.text[:40], tokenizers['decoder'], max_length=16, bs=bs, anew=False)
        dls.train.shuffle, n = False, len(dls.train_ds) // 8 * 8
        dls.train.n = n  # whole batches only
        learn = hf_causal_lm_learner(
            dls,
            GPT2Config(
                n_embd=32,
                n_layer=1,
                n_head=2,
                vocab_size=600,
                n_positions=64,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
            ),
            lr=1e-3,
        )
        quiet(learn, 'fit', 1, cbs=cbs)
        states.append(torch.cat([q.detach().flatten() for q in learn.model.parameters()]))
    assert (states[0] - states[1]).abs().max() < 2e-4


def test_callbacks_rates_and_groups(learn, tmp_path):
    learn.path = tmp_path
    assert learn.layer_table().layers.tolist()[-1] == 'head' and len(learn.layer_table()) >= 4 - (
        'causal' in learn.dls.task
    )
    with learn.no_bar():
        lrs = learn.lr_find(show_plot=False, num_it=20)
    assert 1e-7 < lrs.valley < 10
    quiet(learn, 'fit_one_cycle', 3, 1e-2, cbs=[SaveModelCallback(), EarlyStoppingCallback(patience=3)])
    v = [r[1] for r in learn.recorder.values]
    assert v[-1] < v[0] and quiet(learn, 'validate')[0] == pytest.approx(min(v), rel=1e-4)  # the best is back
    learn.freeze()
    before = [q.detach().clone() for q in learn.model.parameters()]
    quiet(learn, 'fit', 1, 1e-2)
    moved = [not torch.equal(a, b) for a, b in zip(before, learn.model.parameters())]
    assert 0 < sum(moved) < len(moved) / 2


@pytest.mark.filterwarnings('ignore:load_learner')
def test_export(learn, tmp_path, df):
    quiet(learn, 'fit_one_cycle', 1, 5e-3)
    learn.path = tmp_path
    learn.export()
    two = load_learner(tmp_path / 'export.pkl')
    item = 'returns the' if learn.dls.task == 'causal_lm' else 'the [MASK] of an array'
    a, b = learn.predict(item), two.predict(item)
    first, second = [str(o if isinstance(o, str) else o[0]) for o in (a, b)]
    assert first == second
    new = df.text.tolist()[:5]
    assert quiet(learn, 'validate', dl=learn.dls.test_dl(new, with_labels=True))[0] == pytest.approx(
        quiet(two, 'validate', dl=two.dls.test_dl(new, with_labels=True))[0], rel=1e-5
    )


def test_predict_fills_masks(masked, tokenizers):
    tok, text = tokenizers['encoder'], 'the [MASK] of an [MASK]'
    filled, ids, p = masked.predict(text)
    enc = tok(text, return_tensors='pt')
    with evaluating(masked.model):
        want = masked.model.hf(**enc).logits[0].softmax(-1)[enc['input_ids'][0] == tok.mask_token_id]
    assert torch.allclose(p, want, atol=1e-6) and ids.tolist() == want.argmax(-1).tolist() and '[MASK]' not in filled


def test_predict_goes_on_greedily(causal, tokenizers):
    quiet(causal, 'fit_one_cycle', 1, 5e-3)
    tok = tokenizers['decoder']
    ids = tok('returns the')['input_ids']
    with evaluating(causal.model):
        for _ in range(6):
            ids.append(int(causal.model.hf(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tok.eos_token_id:
                break
    assert causal.predict('returns the', max_new_tokens=6, do_sample=False) == tok.decode(ids, skip_special_tokens=True)
    assert (
        len(causal.predict('an array ' * 200, max_new_tokens=4)) > 200
    )  # longer than the model's positions: the end of it is read


def test_shown(learn, monkeypatch):
    "The text with its masks (or its ends of text), the targets and what is predicted in their places"
    shown, tok = [], learn.tokenizer
    monkeypatch.setattr('fastai_tl.data.display.display_df', shown.append)
    x, y = learn.dls.valid.one_batch()
    with evaluating(learn.model):
        best = learn.model(x).argmax(-1)
    learn.dls.valid.show_batch((x, y), max_n=2)
    with learn.no_bar():
        learn.show_results(max_n=2, shuffle=False)
    at, words = y[0].as_subclass(torch.Tensor) != -100, lambda s: ''.join(s.replace('·', '').split())
    for df in shown:
        assert '[CLS]' not in df.text[0] and '[SEP]' not in df.text[0]
        assert df.text[0].count('[MASK]') == (x.ids[0] == (tok.mask_token_id or -5)).sum()
        assert words(df.target[0]) == words(''.join(tok.decode(t) for t in y[0][at].tolist()))
    assert words(shown[1].predicted[0]) == words(''.join(tok.decode(t) for t in best[0][at].tolist()))


# --- the domain step ---


@pytest.mark.parametrize('kind', ['masked', 'causal'])
def test_domain_step(request, df, tmp_path, kind):
    "Each weight of the body arrives, and the classifier then computes what a model assembled by hand computes"
    lm = request.getfixturevalue(kind)
    quiet(lm, 'fit_one_cycle', 2, 5e-3)
    dls = HFTextDataLoaders.from_df(df, lm.tokenizer, max_length=48, bs=8, verbose=False)
    clas = hf_classifier_learner(dls, lm.model.hf.config)
    x = dls.valid.one_batch()[0]
    with evaluating(clas.model):
        before = clas.model(x)
    lm.save_encoder(tmp_path / 'body')
    clas.load_encoder(tmp_path / 'body', verbose=False)
    body = lm.model.hf.base_model.state_dict()
    mine = clas.model.hf.base_model.state_dict()
    assert len(body) > 20 and all(torch.equal(w, mine[n]) for n, w in body.items())
    with evaluating(clas.model):
        after = clas.model(x)
    theirs = type(clas.model.hf)(clas.model.hf.config)
    theirs.load_state_dict(
        {**clas.model.hf.state_dict(), **{f'{clas.model.hf.base_model_prefix}.{n}': w for n, w in body.items()}}
    )
    theirs.config.pad_token_id = clas.model.pad_id
    with evaluating(theirs):
        want = theirs(input_ids=x.ids.where(x.ids >= 0, clas.model.pad_id), attention_mask=x.mask).logits
    assert torch.allclose(after, want, atol=1e-5) and (before - after).abs().max() > 1e-3


# --- for real ---


def unigram_perplexity(train, held, n):
    c = np.bincount(train, minlength=n) + 1
    return math.exp(-np.log(c / c.sum())[held].mean())


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['causal', 'masked'])
def test_learns_the_general_corpus(shared_data, kind):
    "Well below the unigrams, on texts that were held out"
    texts = read_texts(shared_data / 'en' / 'general_corpus.parquet')[:40]
    seed_everything(0)
    cls, k = (HFCausalLMDataLoaders, 'decoder') if kind == 'causal' else (HFMaskedLMDataLoaders, 'encoder')
    tok = train_tokenizer(texts, 2000, k, lowercase=True, max_length=64)
    dls = cls.from_texts(texts, tok, max_length=64, bs=16, **({} if kind == 'causal' else {'pack': True}))
    sizes = dict(
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=192,
        vocab_size=2000,
        max_position_embeddings=64,
    )
    if kind == 'causal':
        learn = hf_causal_lm_learner(
            dls,
            GPT2Config(
                n_embd=96,
                n_layer=2,
                n_head=4,
                vocab_size=2000,
                n_positions=64,
                initializer_range=0.06,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
            ),
        )
    else:
        learn = hf_masked_lm_learner(
            dls, BertConfig(**sizes, initializer_range=0.06, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        )
    quiet(learn, 'fit_one_cycle', 3 if kind == 'causal' else 6, 5e-3)
    train = np.concatenate(dls.train_ds.docs if kind == 'causal' else dls.train_ds.blocks)
    held = np.concatenate([y[y != -100].numpy() for _, y in dls.valid])
    base, got = unigram_perplexity(train, held, 2000), learn.recorder.values[-1][3]
    print(
        f'{kind}: perplexity {got:.0f}, of the unigrams {base:.0f}; '
        f'epochs {[round(r[3]) for r in learn.recorder.values]}'
    )
    assert got < (0.4 if kind == 'causal' else 0.6) * base
