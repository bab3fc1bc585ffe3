"""The programs of common tutorials, under their names, on offline data.

ULMFiT, discriminative rates, gradual unfreezing and evaluation."""

import re

import numpy as np
import pytest
import torch
from fastai.callback.schedule import *
from fastai_tl.all import *


SIZE = dict(emb_sz=64, n_hid=96, n_layers=3)


@pytest.fixture(scope='module')
def passages(tmp_path_factory):
    "Two hundred labelled passages from docstrings, and as many to validate, of two clearly different roles"
    df = docstring_corpus()
    df = df[df.label.isin(['summary', 'parameter'])]
    few = label_budget(df, 150, n_eval=150)
    few = few[few.label.notna() & (few.split != 'test')]
    return few.reset_index(drop=True), list(df[df.split == 'train'].text[::6])


@pytest.fixture(scope='module')
def bert_and_loaders(passages):
    "A small BERT on word numbers, with batches as dicts"
    from transformers import BertConfig, BertForSequenceClassification

    df, _ = passages
    tok = tokenize_texts_once(list(df.text), progress=False)
    vocab = texts_vocab(tok, min_freq=2)
    ids, y = tok.numericalize(vocab), (df.label == 'summary').astype(int).tolist()

    def batch(rows):
        x = torch.nn.utils.rnn.pad_sequence([ids[i][:40] for i in rows], batch_first=True, padding_value=1)
        return dict(input_ids=x, attention_mask=(x != 1).long(), labels=torch.tensor([y[i] for i in rows]))

    def loader(split):
        rows = seed_rows([i for i, s in enumerate(df.split) if s == split])
        return [batch(rows[i : i + 16]) for i in range(0, len(rows), 16)]

    seed_everything(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(vocab),
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=64,
        )
    )
    return model, loader('train'), loader('valid')


def seed_rows(rows):
    return [rows[i] for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]


def test_ulmfit(passages, tmp_path, capsys):
    "A domain language model, its encoder, a classifier unfrozen in four steps, an accuracy and a prediction"
    df, domain = passages
    ulm = ULMFiT(tmp_path, config=SIZE, max_vocab=4000, progress=False)
    learn_lm = ulm.finetune_lm(domain, epochs=3, lr=1e-2, drop_mult=0.1, bs=32)
    assert learn_lm.recorder.values[-1][1] < 6 < torch.tensor(float(len(learn_lm.dls.vocab))).log()
    learn_clas = ulm.classifier(df, valid_col='split', epochs=[2, 2, 2, 6], lr=5e-2, drop_mult=0.1, bs=16)

    fresh = awd_classifier_learner(learn_clas.dls, 'classification', 2, SIZE, drop_mult=0.1)
    ulm.encoder('domain').into(fresh.model, text_vocab(fresh.dls))
    with fresh.no_bar(), fresh.no_logging():  # the four calls, as fastai people write them
        fresh.freeze()
        fresh.fit_one_cycle(1, 2e-2)
        fresh.freeze_to(-2)
        fresh.fit_one_cycle(1, slice(1e-2 / (2.6**4), 1e-2))
        assert [p.requires_grad for p in fresh.model[0].parameters()].count(True) == len(
            list(fresh.model[0].module.rnns[2].parameters())
        )
        fresh.freeze_to(-3)
        fresh.fit_one_cycle(1, slice(5e-3 / (2.6**4), 5e-3))
        fresh.unfreeze()
        fresh.fit_one_cycle(6, slice(1e-3 / (2.6**4), 1e-3))
        assert all(p.requires_grad for p in fresh.model.parameters())
        train_loss = fresh.recorder.values[-1][0]
    for learn in (learn_clas, fresh):
        with learn.no_bar():
            print(f'accuracy: {learn.validate()[1]:.4f}')
            label, _, probs = learn.predict('Number of samples to draw, or None for all of them.')
            print(f'prediction: {label}, confidence: {probs.max():.4f}')
    said = capsys.readouterr().out
    ours, by_hand = map(float, re.findall(r'accuracy: ([\d.]+)', said))
    assert ours > 0.6 and train_loss < 0.69, (
        'nine epochs on 300 texts with the small rates of the four calls do little, but the loss falls'
    )
    assert len(re.findall(r'prediction: (?:parameter|summary), confidence: 0\.\d+', said)) == 2


def test_discriminative_optimizer(bert_and_loaders, capsys):
    "One line a layer, the rate of each the rate above it divided by 2.6, and no rate that is zero in all but name"
    model, _, _ = bert_and_loaders
    opt = create_discriminative_optimizer(model, base_lr=1e-3, decay_factor=2.6, weight_decay=0.01)
    assert isinstance(opt, torch.optim.AdamW)
    lines = capsys.readouterr().out.splitlines()
    assert [l.split()[0] for l in lines] == ['embeddings', 'layer.0', 'layer.1', 'layer.2', 'layer.3', 'head']
    by_name = {g['name']: g['lr'] for g in opt.param_groups}
    assert list(by_name.values()) == pytest.approx([1e-3 / 2.6 ** (5 - i) for i in range(6)])
    assert min(by_name.values()) > 8e-6
    assert {id(p) for g in opt.param_groups for p in g['params']} == {id(p) for p in model.parameters()}


def test_layer_freezer(bert_and_loaders, capsys):
    model, _, _ = bert_and_loaders
    freezer = LayerFreezer(model)
    freezer.freeze_all()
    assert not any(p.requires_grad for p in model.parameters())
    freezer.freeze_to(-1)
    assert {n.split('.')[0] for n, p in model.named_parameters() if p.requires_grad} == {'bert', 'classifier'}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        'bert.pooler.dense.weight',
        'bert.pooler.dense.bias',
        'classifier.weight',
        'classifier.bias',
    }
    freezer.print_trainable_params()
    total, train = (sum(p.numel() for p in ps) for ps in (model.parameters(), freezer.trainable_params()))
    said = capsys.readouterr().out
    assert f'{total:,}' in said and f'{train:,}' in said and f'{100 * train / total:.2f}%' in said
    freezer.unfreeze_all()
    assert all(p.requires_grad for p in model.parameters())


def test_gradual_unfreezing(bert_and_loaders, capsys, monkeypatch):
    "Four stages and a final one; one optimizer from start to end; the training loss falls"
    import fastai_tl.tune.pytorch_loop as loop

    model, train_loader, val_loader = bert_and_loaders
    made = []
    make = loop.create_discriminative_optimizer
    monkeypatch.setattr(loop, 'create_discriminative_optimizer', lambda *a, **k: made.append(make(*a, **k)) or made[-1])
    df = gradual_unfreezing_training(
        model, train_loader, val_loader, num_stages=4, epochs_per_stage=2, base_lr=5e-3, final_lr=2e-3
    )
    assert df.layers.tolist() == ['head', 'layer.3 – head', 'layer.2 – head', 'layer.1 – head', 'embeddings – head']
    assert df.epochs.tolist() == [2, 2, 2, 2, 4] and df.trainable.is_monotonic_increasing
    assert df.lr.tolist() == [5e-3, 2.5e-3, 1.25e-3, 6.25e-4, 2e-3]
    assert df.train_loss.iloc[-1] < df.train_loss.iloc[0] - 0.02
    said = capsys.readouterr().out
    assert said.count('stage ') == 5 and said.count('trainable share') == 5 and said.count('validation loss') == 12
    (opt,), steps = made, len(train_loader)
    seen = {n: int(opt.state[p]['step']) for n, p in model.named_parameters()}
    assert seen['classifier.weight'] == 12 * steps, 'the head was stepped in all stages, by one optimizer'
    assert seen['bert.embeddings.word_embeddings.weight'] == 4 * steps, 'the embeddings in the last one alone'


def test_evaluation(tmp_path, monkeypatch, capsys):
    "A report with four digits, figures at 300 dots an inch, confidence of right and wrong predictions, frequent errors"
    from PIL import Image
    from sklearn.metrics import classification_report
    from transformers import BertConfig, BertForSequenceClassification

    if find_cjk_font() is None:
        pytest.skip('no font with Chinese characters')
    seed_everything(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=60,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
            num_labels=3,
        )
    )
    X, y = torch.randint(3, 60, (360, 12)), torch.randint(0, 3, (360,))
    some = torch.rand(360) < 0.8
    X[some, 4] = y[some]  # a word that tells, in four texts of five
    batch = lambda i: dict(input_ids=X[i], attention_mask=torch.ones_like(X[i]), labels=y[i])
    opt = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(4):
        for i in torch.randperm(240).split(16):
            train_epoch(model, [batch(i)], opt)
    test_loader = [batch(i) for i in torch.arange(240, 360).split(32)]

    monkeypatch.chdir(tmp_path)
    evaluator = ModelEvaluator(model, test_loader, class_names=['負面', '中性', '正面'])
    preds, labels, probs = evaluator.evaluate()

    said = capsys.readouterr().out
    preds, labels, probs = map(np.array, (preds, labels, probs))
    assert (labels == y[240:].numpy()).all() and (preds == probs.argmax(1)).all() and probs.shape == (120, 3)
    model.eval()
    with torch.no_grad():
        assert np.allclose(probs, model(X[240:], torch.ones_like(X[240:])).logits.softmax(-1).numpy(), atol=1e-5)
    assert 0.5 < (preds == labels).mean() < 1, 'the test needs right and wrong ones'
    ref = classification_report(labels, preds, target_names=evaluator.class_names, digits=4, output_dict=True)
    for c in evaluator.class_names:
        line = next(l.split() for l in said.splitlines() if l.startswith(c))
        assert line[1:4] == [f"{ref[c][k]:.4f}" for k in ('precision', 'recall', 'f1-score')] and line[-1] == str(
            int(ref[c]['support'])
        )
    assert f"{ref['accuracy']:.4f}" in next(l for l in said.splitlines() if l.startswith('accuracy'))
    conf, right = probs.max(1), preds == labels
    assert (
        f'正確預測的平均信心度: {conf[right].mean():.4f}' in said
        and f'錯誤預測的平均信心度: {conf[~right].mean():.4f}' in said
    )
    assert f'總錯誤數: {(~right).sum()}' in said and f'錯誤率: {100 * (~right).mean():.2f}%' in said
    pairs = re.findall(r'^(\S+) → (\S+): (\d+) 次$', said, re.M)
    assert sum(int(n) for *_, n in pairs) == (~right).sum() and [int(n) for *_, n in pairs] == sorted(
        (int(n) for *_, n in pairs), reverse=True
    )
    for name in ('confusion_matrix.png', 'confidence_analysis.png'):
        im = Image.open(tmp_path / name)
        assert (
            name in said
            and im.info['dpi'] == pytest.approx((300, 300), abs=0.1)
            and np.asarray(im.convert('L')).std() > 10
        )
