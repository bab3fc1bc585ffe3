"Sequence to sequence: decoder inputs, losses, generated texts and scores against independent computations."

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.all import GradientAccumulation
from fastai.callback.schedule import *
from fastai.data.all import ColReader, DataBlock, RandomSplitter
from fastai.learner import load_learner
from transformers import (
    BartConfig,
    DataCollatorForSeq2Seq,
    MarianConfig,
    MBartConfig,
    MT5Config,
    PegasusConfig,
    T5Config,
)

from fastai_tl.all import *
from fastai_tl.callbacks import evaluating

T5 = dict(
    d_model=32,
    d_kv=16,
    d_ff=64,
    num_layers=1,
    num_decoder_layers=1,
    num_heads=2,
    vocab_size=300,
    dropout_rate=0.0,
    pad_token_id=0,
    eos_token_id=2,
    decoder_start_token_id=0,
)
BART = dict(
    d_model=32,
    vocab_size=300,
    max_position_embeddings=64,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=64,
    decoder_ffn_dim=64,
    dropout=0.0,
    pad_token_id=0,
    eos_token_id=2,
    bos_token_id=1,
    init_std=0.2,
)
CONFIGS = dict(
    t5=T5Config(**T5),
    mt5=MT5Config(**T5),
    bart=BartConfig(**BART, decoder_start_token_id=2),
    mbart=MBartConfig(**BART),
    pegasus=PegasusConfig(**BART, decoder_start_token_id=0),
    marian=MarianConfig(**BART, decoder_start_token_id=0),
)


@pytest.fixture(scope='module')
def df():
    days = pd.date_range('1950-01-01', '2029-12-31').to_series().sample(1200, random_state=0)
    forms = np.random.default_rng(0).choice(['%d %B %Y', '%B %d, %Y', '%A, %d %b %Y'], len(days))
    return pd.DataFrame(
        dict(source=[d.strftime(f) for d, f in zip(days, forms)], target=days.dt.strftime('%Y-%m-%d').tolist())
    )


@pytest.fixture(scope='module')
def tok(df):
    return train_tokenizer([*df.source, *df.target], 300, 'seq2seq', max_length=24)


@pytest.fixture(scope='module')
def dls(df, tok):
    return HFSeq2SeqDataLoaders.from_df(df.head(200), tok, bs=16)


def quiet(learn, f, *args, **kwargs):
    with learn.no_bar(), learn.no_logging():
        return getattr(learn, f)(*args, **kwargs)


@pytest.fixture
def learn(dls):
    seed_everything(0)
    return hf_seq2seq_learner(dls, CONFIGS['t5'], metrics=[])


@pytest.mark.parametrize('name', CONFIGS)
def test_shift_and_loss_are_transformers_own(dls, df, tok, name):
    "Decoder inputs are those of transformers' collator, the loss is the model's with `labels=`"
    seed_everything(0)
    learn = hf_seq2seq_learner(dls, CONFIGS[name])
    hf, collate = learn.model.hf, DataCollatorForSeq2Seq(tok, learn.model.hf)
    idxs, at = list(dls.valid.get_idxs()), 0
    for x, y in dls.valid:
        rows = [dls.valid_ds.items[i] for i in idxs[at : at + len(y)]]
        at += len(y)
        theirs = collate([dict(input_ids=tok(s)['input_ids'], labels=tok(text_target=t)['input_ids']) for s, t in rows])
        dec = decoder_inputs(learn.model, y)
        assert torch.equal(y.as_subclass(torch.Tensor), theirs['labels']) and torch.equal(
            x.ids.where(x.ids >= 0, 0), theirs['input_ids']
        )
        read = torch.cat([torch.ones(len(y), 1), y[:, :-1].as_subclass(torch.Tensor) != -100], 1).bool()
        assert torch.equal(dec.mask.bool(), read) and torch.equal(dec.ids[read], theirs['decoder_input_ids'][read])
        with evaluating(learn.model):
            loss = hf(
                input_ids=theirs['input_ids'], attention_mask=theirs['attention_mask'], labels=theirs['labels']
            ).loss
            assert abs(learn.loss_func(learn.model(x, dec), y) - loss) < 1e-5
    quiet(learn, 'validate')  # and through the Callback, by tokens
    with evaluating(learn.model):
        nll = torch.cat(
            [
                F.cross_entropy(
                    learn.model(x, decoder_inputs(learn.model, y)).flatten(0, 1),
                    y.as_subclass(torch.Tensor).flatten(),
                    reduction='none',
                )[y.as_subclass(torch.Tensor).flatten() != -100]
                for x, y in dls.valid
            ]
        )
    assert quiet(learn, 'validate')[2] == pytest.approx(nll.mean().exp().item(), rel=1e-4)


def test_mbart_begins_with_the_language_of_the_target(dls):
    learn = hf_seq2seq_learner(dls, CONFIGS['mbart'])
    y = torch.tensor([[9, 8, 2, 250], [6, 2, 251, -100]])  # real mBART targets: the text, its end, the language
    assert decoder_inputs(learn.model, y).ids.tolist() == [
        [250, 9, 8, 2],
        [251, 6, 2, 251],
    ]  # the last place has no target


def test_a_model_without_a_start(dls):
    from fastai_tl.models.hf import HFModel, load_hf

    hf = load_hf(CONFIGS['t5'], 'seq2seq')
    hf.config.decoder_start_token_id = None
    with pytest.raises(FastaiTLError, match='decoder_start_token_id'):
        decoder_inputs(HFModel(hf), torch.tensor([[5, 2]]))


def test_label_smoothing(dls):
    learn = hf_seq2seq_learner(dls, CONFIGS['t5'], label_smoothing=0.1)
    x, y = dls.valid.one_batch()
    with evaluating(learn.model):
        out = learn.model(x, decoder_inputs(learn.model, y))
    lp, keep = out.log_softmax(-1), y.as_subclass(torch.Tensor) != -100
    want = -(
        0.9 * lp[keep].gather(1, y.as_subclass(torch.Tensor)[keep][:, None])[:, 0] + 0.1 * lp[keep].mean(-1)
    ).mean()
    assert learn.loss_func(out, y).item() == pytest.approx(want.item(), rel=1e-5)


def greedy(learn, s, n=24):
    "Token by token with the model's own forward"
    cfg, hf = learn.model.hf.config, learn.model.hf
    enc, ids = learn.tokenizer(s, return_tensors='pt'), [learn.model.hf.config.decoder_start_token_id]
    with evaluating(learn.model):
        while len(ids) <= n and ids[-1] != cfg.eos_token_id:
            ids.append(
                int(hf(input_ids=enc['input_ids'], decoder_input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            )
    return learn.tokenizer.decode(ids, skip_special_tokens=True)


def test_trains_generates_and_scores(df, tok, tmp_path):
    "Dates as people write them to dates as computers do; every figure again by hand"
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    seed_everything(0)
    dls = HFSeq2SeqDataLoaders.from_df(df, tok, bs=16)
    learn = hf_seq2seq_learner(
        dls,
        T5Config(**{**T5, 'd_model': 48, 'd_ff': 96, 'num_heads': 3, 'num_layers': 2, 'num_decoder_layers': 2}),
        metrics=[TokenAccuracy(), *generation_metrics('bleu', 'chrf', 'rougeL', n=30)],
    )
    quiet(learn, 'fit_one_cycle', 5, 5e-3)
    v = np.array([r[1:] for r in learn.recorder.values], dtype=float)
    assert v[-1, 0] < 0.4 * v[0, 0] and v[-1, 1] > v[0, 1] + 0.2 and (v[-1, 2:] > v[0, 2:] + 20).all()
    held = [o.data for o in dls.valid_ds.items]
    texts = learn.generate_texts([s for s, _ in held])
    assert texts[:6] == [greedy(learn, s) for s, _ in held[:6]] and texts[3] == learn.predict(held[3][0])
    refs = [t for _, t in held]
    learn.metrics = generation_metrics('bleu', 'chrf', 'rougeL', n=len(held))
    bleu, chrf, rouge = quiet(learn, 'validate')[1:]
    assert bleu == pytest.approx(sacrebleu.corpus_bleu(texts, [refs]).score, abs=1e-6) and chrf == pytest.approx(
        sacrebleu.corpus_chrf(texts, [refs]).score, abs=1e-6
    )
    assert rouge == pytest.approx(
        100 * np.mean([RougeScorer(['rougeL']).score(r, t)['rougeL'].fmeasure for r, t in zip(refs, texts)]), abs=1e-6
    )
    learn.metrics = some = generation_metrics('bleu', n=7)
    quiet(learn, 'validate')
    assert len(some[0].made.preds) == 7 and set(some[0].made.preds) <= set(texts)
    first = list(some[0].made.refs)
    quiet(learn, 'validate')
    assert first == some[0].made.refs  # the same pairs every epoch


def test_metrics_share_one_generation(learn, monkeypatch):
    calls, made = [], learn.model.hf.generate
    monkeypatch.setattr(learn.model.hf, 'generate', lambda **kw: calls.append(len(kw['input_ids'])) or made(**kw))
    learn.metrics = generation_metrics('bleu', 'chrf', 'rouge1', 'rouge2', 'rougeL', n=9, num_beams=2)
    quiet(learn, 'validate')
    assert sum(calls) == 9


def test_generating_leaves_the_learner_as_it_was(learn):
    learn.model.train()
    learn.model.hf.encoder.eval()
    learn.predict('1 May 2020')
    assert (
        learn.model.training
        and not learn.model.hf.encoder.training
        and all(p.requires_grad for p in learn.model.parameters())
    )


def test_get_preds_and_losses(learn, dls):
    inp, p, y, dec, loss = quiet(learn, 'get_preds', with_input=True, with_decoded=True, with_loss=True)
    for i in range(0, len(dls.valid_ds), 4):
        x, t = dls.valid_ds[i]
        n = len(t)
        assert inp[i].ids[: x.shape[-1]].tolist() == x.ids.tolist() and y[i][:n].tolist() == t.tolist()
        with evaluating(learn.model):
            want = learn.model(TensorTokens(x)[None], decoder_inputs(learn.model, t[None]))[0].softmax(-1)
        assert torch.allclose(p[i][:n], want, atol=1e-5) and loss[i].item() == pytest.approx(
            -want[range(n), t.tolist()].log().mean().item(), rel=1e-4
        )
    with pytest.raises(FastaiTLError, match='generate_texts'):
        quiet(learn, 'get_preds', dl=dls.test_dl(['a date']))
    pairs = dls.test_dl([('1 May 2020', '2020-05-01')], with_labels=True)
    assert quiet(learn, 'validate', dl=pairs)[0] > 0


@pytest.mark.filterwarnings('ignore:load_learner')
def test_fastai_on_it(learn, tmp_path, monkeypatch):
    learn.path = tmp_path
    with learn.no_bar():
        assert 1e-7 < learn.lr_find(show_plot=False, num_it=15).valley < 10
    a = quiet(learn, 'validate')[0]
    quiet(learn, 'fit_one_cycle', 2, 5e-3, cbs=GradientAccumulation(32))
    assert quiet(learn, 'validate')[0] < a
    assert (
        learn.layer_table().layers.tolist()[-1] == 'head' and len(learn.layer_table()) == 3
    )  # a block of each stack; the embedding is tied to the head
    shown = []
    monkeypatch.setattr('fastai_tl.data.display.display_df', shown.append)
    with learn.no_bar():
        learn.show_results(max_n=2, shuffle=False)
    assert shown[0].generated.tolist() == learn.generate_texts(shown[0].source) and shown[0].shape == (2, 3)
    learn.export()
    two = load_learner(tmp_path / 'export.pkl')
    assert two.generate_texts(['1 May 2020', 'June 7, 1999']) == learn.generate_texts(['1 May 2020', 'June 7, 1999'])


def test_with_a_datablock(df, tok):
    block = DataBlock(
        blocks=(HFTextBlock(tok), HFTargetTextBlock(tok)),
        get_x=ColReader('source'),
        get_y=ColReader('target'),
        splitter=RandomSplitter(seed=1),
    )
    learn = hf_seq2seq_learner(block.dataloaders(df.head(60), bs=8), CONFIGS['bart'])
    a = quiet(learn, 'validate')[0]
    quiet(learn, 'fit_one_cycle', 2, 5e-3)
    assert quiet(learn, 'validate')[0] < a and isinstance(learn.predict('1 May 2020'), str)


def test_without_the_extra(monkeypatch):
    import importlib

    monkeypatch.setattr(importlib, 'import_module', lambda n, *a: (_ for _ in ()).throw(ImportError(n)))
    with pytest.raises(ImportError, match=r'fastai_tl\[seq2seq\]'):
        generation_metrics('bleu')


def test_wrong_data(dls, df, tok):
    with pytest.raises(DataError, match='made for seq2seq'):
        hf_seq2seq_learner(HFCausalLMDataLoaders.from_texts(df.source, tok), CONFIGS['t5'])
    with pytest.raises(DataError, match='reads 8 tokens at most'):
        quiet(
            hf_seq2seq_learner(
                HFSeq2SeqDataLoaders.from_df(df.head(50), tok, max_length=8, max_target_length=20, verbose=False),
                BartConfig(**{**BART, 'max_position_embeddings': 8}, decoder_start_token_id=2),
            ),
            'validate',
        )
