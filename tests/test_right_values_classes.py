"""Values that belong to classes: outputs of trained heads, labels as indicators, names in a schema, values with names.

Each test compares with the model of transformers, with a loop over the rows, or with the names themselves."""

import copy
import random

import numpy as np
import pandas as pd
import pytest
import torch
import transformers as T
from fastcore.all import noop

from fastai_tl.all import *

WORDS = 'the film was very good bad dull fine plot actor scene slow bright ending music long short story'.split()
NAMES = ['entailment', 'neutral', 'contradiction']
TAGS = ['O', 'B-PER', 'I-PER', 'B-LOC', 'I-LOC']
SMALL = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
ENCODER = dict(SMALL, max_position_embeddings=64, pad_token_id=0)
IDS = dict(pad_token_id=0, bos_token_id=2, eos_token_id=3)
S2S = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
           encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=64, **IDS)
HEADS = {
    'Bert': (T.BertConfig, ENCODER), 'DistilBert': (T.DistilBertConfig, dict(dim=16, n_layers=1, n_heads=2,
                                                                            hidden_dim=16, pad_token_id=0)),
    'Electra': (T.ElectraConfig, dict(ENCODER, embedding_size=16)), 'Albert': (T.AlbertConfig, dict(
        ENCODER, embedding_size=16)),
    'DebertaV2': (T.DebertaV2Config, ENCODER), 'MPNet': (T.MPNetConfig, dict(ENCODER, pad_token_id=0)),
    'GPT2': (T.GPT2Config, dict(n_embd=16, n_layer=1, n_head=2, n_positions=64, **IDS)),
    'XLNet': (T.XLNetConfig, dict(d_model=16, n_layer=1, n_head=2, d_inner=16, pad_token_id=0))}


def texts(n, seed=0):
    rng = random.Random(seed)
    return [' '.join(rng.choice(WORDS) for _ in range(rng.randint(3, 9))) + f' {i}' for i in range(n)]


@pytest.fixture(scope='module')
def tok():
    return train_tokenizer(texts(200), 400, max_length=48)


def config(tok, name='Bert', classes=None, n=None, **kwargs):
    kind, sizes = HEADS[name]
    names = {} if classes is None else dict(id2label=dict(enumerate(classes)),
                                            label2id={c: i for i, c in enumerate(classes)})
    return kind(vocab_size=len(tok), num_labels=n or len(classes), **{**sizes, **names, **kwargs})


def trained(tok, task='SequenceClassification', name='Bert', seed=0, **kwargs):
    "A model whose outputs differ clearly from class to class"
    torch.manual_seed(seed)
    model = getattr(T, f'AutoModelFor{task}').from_config(config(tok, name, **kwargs)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight)*.3)
    return model


def saved(model, tok, folder):
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return str(folder)


def logits_of(model, tok, rows):
    "Logits of transformers itself, one text at a time"
    with torch.no_grad():
        return torch.cat([model(**tok([row], return_tensors='pt')).logits for row in rows])


def text_dls(tok, labels=None, **kwargs):
    rows = texts(24)
    labels = [sorted(NAMES)[i % 3] for i in range(24)] if labels is None else labels
    kwargs = dict(valid=[i >= 12 for i in range(24)], bs=6, verbose=False) | kwargs
    return HFTextDataLoaders.from_lists(rows, labels, tok, **kwargs)


# the class order of a model that already has one

@pytest.mark.parametrize('name', HEADS)
@pytest.mark.parametrize('source', ['folder', 'object'])
def test_outputs_of_a_classifier_are_matched_by_name(tok, tmp_path, name, source):
    hf = trained(tok, name=name, classes=NAMES)
    dls = text_dls(tok, val_bs=1)
    rows = [o[0] for o in dls.valid_ds.items]
    right = logits_of(hf, tok, rows)[:, [NAMES.index(c) for c in dls.vocab]]
    learn = hf_classifier_learner(dls, saved(hf, tok, tmp_path) if source == 'folder' else hf)
    with learn.no_bar():
        got = learn.get_preds(act=noop)[0]
    assert torch.allclose(got, right, atol=1e-4)
    assert [learn.model.hf.config.id2label[i] for i in range(3)] == list(dls.vocab)
    said = [learn.predictor().predict([row]).labels[0] for row in rows]
    assert said == [dls.vocab[i] for i in right.argmax(1)]
    saved(learn.model.hf, tok, tmp_path/'again')
    again = T.AutoModelForSequenceClassification.from_pretrained(tmp_path/'again').eval()
    assert torch.allclose(logits_of(again, tok, rows), right, atol=1e-4)


@pytest.mark.parametrize('name', ['Bert', 'DistilBert', 'GPT2'])
@pytest.mark.parametrize('source', ['folder', 'object'])
def test_outputs_of_a_tagger_are_matched_by_name(tok, tmp_path, name, source):
    order = [3, 0, 4, 2, 1]
    given = [TAGS[i] for i in order]
    hf = trained(tok, 'TokenClassification', name, classes=given)
    words = [o.split() for o in texts(24)]
    tags = [[TAGS[(i+j) % 5] for j in range(len(o))] for i, o in enumerate(words)]
    dls = HFTagDataLoaders.from_lists(words, tags, tok, valid=[i >= 12 for i in range(24)], bs=6, verbose=False)
    x = dls.one_batch()[0].as_subclass(torch.Tensor)
    ids, mask = x[:, 0].clamp(min=0), (x[:, 0] >= 0).long()
    with torch.no_grad():
        types = dict(token_type_ids=x[:, 1].clamp(min=0)) if name != 'DistilBert' else {}
        logits = hf(input_ids=ids, attention_mask=mask, **types).logits
    right = logits[..., [given.index(c) for c in dls.vocab]]
    learn = hf_learner(dls, saved(hf, tok, tmp_path) if source == 'folder' else hf)
    learn.model.eval()
    with torch.no_grad():
        got = learn.model(x)
    assert torch.allclose(got[mask > 0], right[mask > 0], atol=1e-4)
    assert [learn.model.hf.config.id2label[i] for i in range(5)] == list(dls.vocab)


def test_outputs_of_several_labels_are_matched_by_name(tok):
    hf = trained(tok, classes=NAMES, problem_type='multi_label_classification')
    dls = text_dls(tok, [[NAMES[i % 3], NAMES[(i+1) % 3]] for i in range(24)])
    rows = [o[0] for o in dls.valid_ds.items]
    right = logits_of(hf, tok, rows).sigmoid()[:, [NAMES.index(c) for c in dls.vocab]]
    learn = hf_classifier_learner(dls, hf)
    assert np.allclose(learn.predict_batch(rows).probs, right, atol=1e-5)


@pytest.mark.parametrize('where', ['head is trained whole', 'head is adapted'])
def test_outputs_of_a_peft_model_are_matched_by_name(tok, where):
    peft = pytest.importorskip('peft')
    torch.manual_seed(0)
    targets = ['query', 'value'] + ['classifier']*(where == 'head is adapted')
    options = peft.LoraConfig(target_modules=targets, r=2, task_type=None if len(targets) == 3 else 'SEQ_CLS')
    hf = peft.get_peft_model(trained(tok, classes=NAMES), options).eval()
    with torch.no_grad():
        for weight in hf.parameters():
            weight.add_(torch.randn_like(weight)*.1)
    dls = text_dls(tok)
    rows = [o[0] for o in dls.valid_ds.items]
    order = [NAMES.index(c) for c in dls.vocab]
    right = logits_of(hf, tok, rows)[:, order]
    with hf.disable_adapter():
        right_base = logits_of(hf, tok, rows)[:, order]
    learn = hf_classifier_learner(dls, hf)
    learn.model.eval()
    assert torch.allclose(logits_of(hf, tok, rows), right, atol=1e-4)
    with hf.disable_adapter():
        assert torch.allclose(logits_of(hf, tok, rows), right_base, atol=1e-4)
    assert torch.allclose(logits_of(copy.deepcopy(hf).merge_and_unload(), tok, rows), right, atol=1e-4)


@pytest.mark.parametrize('classes,labels,order', [
    (['NEGATIVE', 'POSITIVE'], ['positive', 'negative'], [0, 1]),
    (['positive', 'negative'], ['positive', 'negative'], [1, 0]),
    (['b', 'a'], [1, 0], [0, 1]),
    (['1', '0'], [1, 0], [1, 0]),
    (['True', 'False'], [True, False], [1, 0]),
    ([f'LABEL_{i}' for i in range(12)], [str(i) for i in range(12)], [0, 1, 10, 11, *range(2, 10)]),
    ([f'topic {i}' for i in range(12)], [str(i) for i in range(12)], [0, 1, 10, 11, *range(2, 10)])])
def test_names_are_matched_whatever_their_type(tok, classes, labels, order):
    hf = trained(tok, classes=classes)
    dls = text_dls(tok, [labels[i % len(labels)] for i in range(24)])
    rows = texts(5, seed=3)
    right = logits_of(hf, tok, rows)[:, order]
    learn = hf_classifier_learner(dls, hf)
    assert np.allclose(learn.predict_batch(rows).scores, right, atol=1e-4)


def test_label2id_alone_names_the_outputs(tok):
    hf = trained(tok, n=3)
    hf.config.label2id = {name: i for i, name in enumerate(NAMES)}
    rows = texts(5, seed=3)
    right = logits_of(hf, tok, rows)[:, [NAMES.index(c) for c in sorted(NAMES)]]
    assert np.allclose(hf_classifier_learner(text_dls(tok), hf).predict_batch(rows).scores, right, atol=1e-4)
    hf.config.id2label = dict(enumerate(NAMES))
    hf.config.label2id = {name: 2-i for i, name in enumerate(NAMES)}
    with pytest.raises(DataError, match='must agree'):
        hf_classifier_learner(text_dls(tok), hf)


@pytest.mark.parametrize('labels', [['entailment', 'neutral', 'contradict'], ['entailment', 'neutral'],
                                    ['entailment', 'neutral', 'contradiction', 'other']])
@pytest.mark.parametrize('source', ['folder', 'object'])
def test_names_that_fit_in_part_are_an_error(tok, tmp_path, labels, source):
    hf = trained(tok, classes=NAMES)
    model = saved(hf, tok, tmp_path) if source == 'folder' else hf
    dls = text_dls(tok, [labels[i % len(labels)] for i in range(24)])
    with pytest.raises(DataError) as e:
        hf_classifier_learner(dls, model)
    if source == 'folder' or len(labels) == 3:
        assert all(name in str(e.value) for name in (*NAMES, *labels))
    before = hf.classifier.weight.clone()
    if source == 'folder' or len(labels) == 3:
        learn = hf_classifier_learner(dls, model, new_head=True)
        assert not torch.allclose(learn.model.hf.classifier.weight[:2], before[:2])
        assert learn.model.hf.config.num_labels == len(labels)


def test_other_names_give_a_new_head_or_an_error(tok, tmp_path, capsys):
    hf = trained(tok, classes=NAMES)
    dls = text_dls(tok, ['a', 'b', 'c']*8)
    with pytest.raises(DataError, match='entailment, neutral, contradiction. Got a, b, c'):
        hf_classifier_learner(dls, hf)
    learn = hf_classifier_learner(dls, saved(hf, tok, tmp_path))
    assert 'is for other classes (entailment, neutral, contradiction)' in capsys.readouterr().out
    new = learn.model.hf
    assert torch.equal(new.bert.embeddings.word_embeddings.weight, hf.bert.embeddings.word_embeddings.weight)
    assert new.classifier.weight.std() < .05 < hf.classifier.weight.std()
    kept = hf_classifier_learner(dls, str(tmp_path), new_head=False)
    assert torch.equal(kept.model.hf.classifier.weight, hf.classifier.weight)


def test_the_head_of_another_task_is_not_used(tok, tmp_path):
    hf = trained(tok, 'TokenClassification', classes=NAMES)
    learn = hf_classifier_learner(text_dls(tok), saved(hf, tok, tmp_path))
    assert learn.model.hf.classifier.weight.std() < .05 < hf.classifier.weight.std()
    wide = hf_classifier_learner(text_dls(tok, ['a', 'b']*12), str(tmp_path))
    assert wide.model.hf.classifier.weight.shape[0] == 2


def test_bundles_keep_the_order_of_training(tok, tmp_path):
    hf = trained(tok, classes=NAMES)
    learn = hf_classifier_learner(text_dls(tok), hf)
    rows = texts(6, seed=5)
    right = learn.predict_batch(rows)
    learn.save_bundle(tmp_path/'a')
    config = T.AutoConfig.from_pretrained(tmp_path/'a')
    assert [config.id2label[i] for i in range(3)] == sorted(NAMES)
    assert np.allclose(load_bundle(tmp_path/'a').predict_proba(rows), right.probs, atol=1e-5)
    assert np.allclose(load_bundle(tmp_path/'a').learner().predict_batch(rows).probs, right.probs, atol=1e-5)
    hf.config.id2label = dict(enumerate(NAMES)) # as older versions left the config of a model object
    hf.config.label2id = {name: i for i, name in enumerate(NAMES)}
    learn.save_bundle(tmp_path/'b')
    assert np.allclose(load_bundle(tmp_path/'b').learner().predict_batch(rows).probs, right.probs, atol=1e-5)


def test_the_learner_of_a_bundle_takes_the_order_of_new_data(tok, tmp_path):
    learn = hf_classifier_learner(text_dls(tok), trained(tok, classes=NAMES))
    rows = texts(6, seed=5)
    right = learn.predict_batch(rows).probs
    learn.save_bundle(tmp_path/'a')
    dls = text_dls(tok)
    empty = HFTextDataLoaders.from_spec(dls.spec.replace(classes=('neutral', 'entailment', 'contradiction')), tok)
    got = load_bundle(tmp_path/'a').learner(empty)
    order = [sorted(NAMES).index(c) for c in empty.spec.classes]
    assert np.allclose(got.predict_batch(rows).probs, right[:, order], atol=1e-5)
