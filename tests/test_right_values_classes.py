"""Values that belong to classes: outputs of trained heads, labels as indicators, names in a schema, values with names.

Each test compares with the model of transformers, with a loop over the rows, or with the names themselves."""

import copy
import json
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


# values that have names

NUMBERS = dict(neutral=3., entailment=1., contradiction=2.)
FORMS = dict(dictionary=dict, series=pd.Series, json=lambda o: json.loads(json.dumps(o)),
             sorted_series=lambda o: pd.Series(o).sort_values(), categories=lambda o: pd.Series(
                 list(o.values()), index=pd.CategoricalIndex(list(o))))


@pytest.fixture(scope='module')
def learn(tok):
    return hf_classifier_learner(text_dls(tok), config(tok, n=3))


@pytest.fixture(scope='module')
def several(tok):
    dls = text_dls(tok, [[NAMES[i % 3], NAMES[(i+1) % 3]] for i in range(24)])
    return hf_classifier_learner(dls, config(tok, n=3))


@pytest.mark.parametrize('form', FORMS)
def test_class_weights_are_matched_by_name(tok, learn, several, form):
    given = FORMS[form](NUMBERS)
    one = hf_classifier_learner(learn.dls, config(tok, n=3), class_weights=given).loss_func.func.weight
    assert one.tolist() == [NUMBERS[c] for c in learn.dls.vocab]
    many = hf_classifier_learner(several.dls, config(tok, n=3), class_weights=given).loss_func.func.pos_weight
    assert many.tolist() == [NUMBERS[c] for c in several.dls.vocab]


@pytest.mark.parametrize('classes,given,right', [
    ([0, 1, 2], {'2': 5., '0': 3., '1': 4.}, [3, 4, 5]),
    ([0, 1, 2], pd.Series([5., 3., 4.], index=[2, 0, 1]), [3, 4, 5]),
    ([False, True], {'true': 2., 'false': 1.}, [1, 2]),
    (['a', 'b'], pd.Series([1., 2.]), [1, 2]),
    (['a', 'b'], np.array([1., 2.]), [1, 2]), (['a', 'b'], torch.tensor([1., 2.]), [1, 2])])
def test_weights_of_classes_of_any_type(tok, classes, given, right):
    dls = text_dls(tok, [classes[i % len(classes)] for i in range(24)])
    learn = hf_classifier_learner(dls, config(tok, n=len(classes)), class_weights=given)
    assert learn.loss_func.func.weight.tolist() == right


@pytest.mark.parametrize('given,said', [
    (dict(NUMBERS, other=1.), 'other'), (dict(neutral=1., entailment=1.), 'contradiction'),
    (dict(neutral=1., entailment=1., contradict=1.), "Did you mean 'contradiction'"),
    (pd.Series([1., 2., 3.], index=['neutral', 'neutral', 'entailment']), 'neutral several times'),
    ([1., 2.], '3 classes'), ([1., 2., -1.], 'neutral'), ([1., float('nan'), 1.], 'missing'),
    ([[1., 2., 3.]], 'shape')])
def test_values_that_do_not_fit_name_the_class(tok, learn, given, said):
    with pytest.raises(FastaiTLError, match=said):
        hf_classifier_learner(learn.dls, config(tok, n=3), class_weights=given)


@pytest.mark.parametrize('form', [*FORMS, 'table'])
def test_thresholds_are_matched_by_name(learn, several, tmp_path, form):
    given = {name: value/8 for name, value in NUMBERS.items()}
    right = [given[c] for c in learn.dls.vocab]
    table = pd.DataFrame(dict(threshold=given, f1=0.))
    thresholds = table if form == 'table' else FORMS[form](given)
    rows = texts(6, seed=9)
    for model in (learn, several):
        assert Predictor(model, thresholds=thresholds).thresholds.tolist() == right
        model.save_bundle(tmp_path/'b', thresholds=thresholds)
        assert load_bundle(tmp_path/'b').thresholds.tolist() == right
        with model.no_bar():
            ev = model.evaluate()
        expected = ev.with_thresholds(right).preds
        assert np.array_equal(ev.with_thresholds(thresholds).preds, expected)
        assert np.array_equal(model.predict_batch(rows, thresholds=thresholds).preds,
                              model.predict_batch(rows, thresholds=right).preds)
    with pytest.raises(DataError, match='none for neutral'):
        Predictor(learn, thresholds=dict(entailment=.5, contradiction=.5))


def test_columns_of_predictions_are_matched_by_name():
    probs = pd.DataFrame(dict(b=[.7, .2], c=[.2, .1], a=[.1, .7]))
    ev = Evaluation.from_preds(probs, ['b', 'a'], ['a', 'b', 'c'])
    assert ev.accuracy == 1 and ev.probs.tolist() == [[.1, .7, .2], [.7, .2, .1]]
    truth = pd.DataFrame(dict(c=[0, 1], a=[0, 1], b=[1, 0]))
    assert Evaluation.from_preds(probs, truth, ['a', 'b', 'c']).targets.tolist() == [[0, 1, 0], [1, 0, 1]]
    with pytest.raises(DataError, match='b, c, d'):
        Evaluation.from_preds(probs.rename(columns=dict(a='d')), ['b', 'a'], ['a', 'b', 'c'])


@pytest.mark.parametrize('names', [{1: 'pos', 0: 'neg'}, {'1': 'pos', '0': 'neg'}, {'pos': 1, 'neg': 0}])
def test_dictionaries_of_class_names(names):
    probs = [[.9, .1], [.2, .8]]
    assert Evaluation.from_preds(probs, ['neg', 'pos'], names).accuracy == 1
    assert Evaluation.from_preds(probs, [0, 1], names).classes == ['neg', 'pos']
    assert ModelEvaluator(None, None, names).class_names == ['neg', 'pos']
    with pytest.raises(DataError, match='order of the outputs'):
        TextSpec('classification', classes=names)


def test_tags_in_the_order_of_label2id(tok):
    words = [['a', 'b']]*8
    dls = HFTagDataLoaders.from_lists(words, [['O', 'B-X']]*8, tok, vocab={'B-X': 1, 'O': 0}, valid=[0, 1]*4)
    assert list(dls.vocab) == ['O', 'B-X']


# labels as indicators

Y = np.random.default_rng(0).integers(0, 2, (24, 3))
Y[-1] = 1
SPLIT = [i < 12 for i in range(24)]
SHAPES = dict(lists=lambda y: y.tolist(), floats=lambda y: y.astype(float).tolist(), bools=lambda y: (y > 0).tolist(),
              tuples=lambda y: list(map(tuple, y.tolist())), arrays=list, array=lambda y: y, tensor=torch.tensor,
              tensors=lambda y: list(torch.tensor(y)),
              sparse=lambda y: pytest.importorskip('scipy.sparse').csr_matrix(y),
              series=lambda y: pd.Series(y.tolist()), table=lambda y: pd.DataFrame(y, columns=['x', 'a', 'm']))


def targets(ds):
    return np.array([np.asarray(ds[i][1]) for i in range(len(ds))])


@pytest.mark.parametrize('shape', SHAPES)
def test_rows_of_0_and_1_are_a_place_for_each_class(tok, shape):
    labels = SHAPES[shape](Y)
    dls = HFTextDataLoaders.from_lists(texts(24), labels, tok, valid=SPLIT, bs=6, verbose=False)
    assert np.array_equal(targets(dls.valid_ds), Y[:12]) and np.array_equal(targets(dls.train_ds), Y[12:])
    assert list(dls.vocab) == (['x', 'a', 'm'] if shape == 'table' else [0, 1, 2])
    learn = hf_classifier_learner(dls, config(tok, n=3))
    assert learn.model.hf.config.num_labels == 3
    with learn.no_bar():
        assert np.array_equal(learn.evaluate().targets, Y[:12])
        assert np.array_equal(learn.evaluate(texts(24)[:5], labels[:5]).targets, Y[:5])


def test_a_class_that_no_text_has_keeps_its_output(tok):
    y = Y.copy()
    y[:, 1] = 0
    with pytest.warns(UserWarning, match='label 1'):
        dls = HFTextDataLoaders.from_lists(texts(24), y.tolist(), tok, valid=SPLIT, bs=6, verbose=False)
    assert np.array_equal(targets(dls.train_ds), y[12:])


def test_lists_of_numbers_that_are_names_stay_names(tok):
    labels = [[3, 1], [2, 0], [1, 0], [3, 2]]*6
    dls = HFTextDataLoaders.from_lists(texts(24), labels, tok, valid=SPLIT, bs=6, verbose=False)
    assert [dls.vocab[i] for i in np.flatnonzero(targets(dls.valid_ds)[0])] == [1, 3]
    ids = [[0], [1], [0, 1], [1, 0]]*6 # some texts have both, and rows of two are no indicators
    dls = HFTextDataLoaders.from_lists(texts(24), ids, tok, valid=SPLIT, bs=6, verbose=False)
    learn = hf_classifier_learner(dls, config(tok, n=2))
    with learn.no_bar():
        assert learn.evaluate(texts(2), [[0, 1], [1, 0]]).targets.tolist() == [[1, 1], [1, 1]]
    arrays = [np.array(o) for o in ids]
    assert list(HFTextDataLoaders.from_lists(texts(24), arrays, tok, valid=SPLIT, verbose=False).vocab) == [0, 1]


def table(**columns):
    return pd.DataFrame(dict(text=texts(24), valid=SPLIT, **columns))


@pytest.mark.parametrize('dtype', [int, float, bool, 'Int64', 'boolean'])
@pytest.mark.parametrize('windows', [None, 4])
def test_several_label_columns(tok, tmp_path, dtype, windows):
    names = ['toxic', 'obscene', 'insult']
    df = table(**{name: pd.Series(Y[:, i] > 0).astype(dtype) for i, name in enumerate(names)})
    options = {} if windows is None else dict(windows=windows, max_length=16)
    dls = HFTextDataLoaders.from_df(df, tok, label_col=names, valid_col='valid', bs=6, verbose=False, **options)
    assert list(dls.spec.classes) == list(dls.vocab) == names and dls.spec.task == 'multilabel'
    assert dls.spec.columns['label'] == names
    learn = hf_classifier_learner(dls, config(tok, n=3), class_weights=dict(insult=3., toxic=1., obscene=2.))
    assert learn.loss_func.func.pos_weight.tolist() == [1, 2, 3]
    with learn.no_bar():
        assert np.array_equal(learn.evaluate(df.iloc[5:9]).targets, Y[5:9])
        assert np.array_equal(learn.evaluate().targets, Y[:12])
    if windows is None:
        assert np.array_equal(targets(dls.valid_ds), Y[:12])
        items = dls.test_dl(df.iloc[:4], with_labels=True)
        assert np.array_equal(targets(items.dataset), Y[:4])
        items = dls.test_dl([[t, y] for t, y in zip(df.text[:4], Y[:4].tolist())], with_labels=True)
        assert np.array_equal(targets(items.dataset), Y[:4])
        learn.save_bundle(tmp_path/'b')
        again = load_bundle(tmp_path/'b').learner()
        with again.no_bar():
            assert np.array_equal(again.evaluate(df.iloc[5:9]).targets, Y[5:9])


def test_several_values(tok, tmp_path):
    values = np.random.default_rng(1).normal(size=(24, 2)).round(2)
    df = table(food=values[:, 0], room=values[:, 1], both=values.tolist())
    for label_col in (['food', 'room'], 'both'):
        dls = HFTextDataLoaders.from_df(df, tok, label_col=label_col, valid_col='valid', bs=6, verbose=False)
        assert dls.spec.task == 'regression' and dls.spec.n_values == 2
        assert np.allclose(targets(dls.valid_ds), values[:12])
        learn = hf_classifier_learner(dls, config(tok, n=2))
        with learn.no_bar():
            loss = learn.validate()[0]
            preds = learn.get_preds()[0].numpy()
        assert preds.shape == (12, 2) and np.isclose(loss, ((preds - values[:12])**2).mean(), atol=1e-5)
        learn.save_bundle(tmp_path/'b')
        assert np.allclose(load_bundle(tmp_path/'b').predict(list(df.text[:12])).labels, preds, atol=1e-5)
        again = load_bundle(tmp_path/'b').learner()
        assert again.dls.spec.n_values == 2
        assert np.allclose(again.predict_batch(list(df.text[:12])).scores, preds, atol=1e-5)
    whole = table(food=[i % 5 for i in range(24)], room=[(i+2) % 5 for i in range(24)])
    dls = HFTextDataLoaders.from_df(whole, tok, label_col=['food', 'room'], valid_col='valid', bs=6, verbose=False)
    assert dls.spec.task == 'regression' and targets(dls.valid_ds)[1].tolist() == [1, 3]


MIXED = dict(
    one_int=lambda i: [.5*i, 2 if i == 3 else .1*i],
    few_floats=lambda i: [1, .5] if i % 2 else [.25, 1],
    one_float=lambda i: [i, 1.5 if i == 7 else i + 1],
    soft=lambda i: [.3, .7, 1],
)


@pytest.mark.parametrize('name', MIXED)
@pytest.mark.parametrize('form', [list, tuple, lambda row: np.array(row, dtype=object)])
def test_values_of_which_some_are_ints_are_a_regression(tok, name, form):
    values = [MIXED[name](i) for i in range(24)]
    dls = HFTextDataLoaders.from_lists(texts(24), [form(o) for o in values], tok, valid=SPLIT, bs=6, verbose=False)
    assert dls.spec.task == 'regression' and dls.spec.n_values == len(values[0])
    assert np.allclose(targets(dls.valid_ds), values[:12])


STRINGS = dict(digits=str, floats=lambda o: str(float(o)), bools=lambda o: str(bool(o)), spaces=lambda o: f' {o}')


@pytest.mark.parametrize('form', STRINGS)
def test_indicators_that_are_strings(tok, form):
    labels = [[STRINGS[form](o) for o in row] for row in Y.tolist()]
    dls = HFTextDataLoaders.from_lists(texts(24), labels, tok, valid=SPLIT, bs=6, verbose=False)
    assert np.array_equal(targets(dls.valid_ds), Y[:12]) and list(dls.vocab) == [0, 1, 2]
    learn = hf_classifier_learner(dls, config(tok, n=3))
    with learn.no_bar():
        assert np.array_equal(learn.evaluate(texts(24)[:5], labels[:5]).targets, Y[:5])
    names = [['0', '1'], ['1', '0'], ['1'], ['0']]*6 # no row repeats one: they are names
    assert list(HFTextDataLoaders.from_lists(texts(24), names, tok, valid=SPLIT, verbose=False).vocab) == ['0', '1']


BAD_ROWS = dict(short=(lambda row: row[:2], 'Got 2 in row 5'), long=(lambda row: row + [1], 'Got 4 in row 5'),
                empty=(lambda row: [], 'Got 0 in row 5'), minus=(lambda row: [row[0], -1, 0], '-1 in place 1, row 5'),
                two=(lambda row: [2, *row[1:]], '2 in place 0, row 5'))


@pytest.mark.parametrize('name', BAD_ROWS)
@pytest.mark.parametrize('task', [None, 'multilabel'])
def test_one_row_that_does_not_fit_among_indicators_is_an_error(tok, name, task):
    change, said = BAD_ROWS[name]
    labels = Y.tolist()
    labels[5] = change(labels[5])
    with pytest.raises(DataError, match=said):
        HFTextDataLoaders.from_lists(texts(24), labels, tok, task=task, verbose=False)


def test_a_row_of_values_that_is_too_short_is_an_error(tok):
    labels = [[.5, i] for i in range(24)]
    labels[5] = [.5]
    with pytest.raises(DataError, match='Got 1 in row 5'):
        HFTextDataLoaders.from_lists(texts(24), labels, tok, verbose=False)


@pytest.mark.parametrize('task', [None, 'multilabel'])
@pytest.mark.parametrize('write', [str, lambda row: str(np.array(row)), lambda row: str([f'c{o}' for o in row])])
def test_lists_written_as_strings_are_an_error(tok, tmp_path, task, write):
    df = table(label=list(map(write, Y.tolist())))
    df.to_csv(tmp_path/'d.csv', index=False)
    for frame in (df, pd.read_csv(tmp_path/'d.csv')):
        with pytest.raises(DataError, match='literal_eval'):
            HFTextDataLoaders.from_df(frame, tok, task=task, verbose=False)
    dls = HFTextDataLoaders.from_df(table(label=['[UNK]', '[a, b]']*12), tok, verbose=False) # names of classes
    assert list(dls.vocab) == ['[UNK]', '[a, b]']


@pytest.mark.parametrize('value', [-1, 2])
@pytest.mark.parametrize('dtype', [int, float, 'Int64'])
@pytest.mark.parametrize('task', [None, 'multilabel'])
def test_another_number_in_a_column_of_0_and_1_is_an_error(tok, tmp_path, value, dtype, task):
    names = ['toxic', 'obscene', 'insult']
    y = Y.copy()
    y[3, 1] = value
    df = table(**{name: pd.Series(y[:, i]).astype(dtype) for i, name in enumerate(names)})
    said = f"{dtype(value) if dtype is float else value} in 'obscene', row 3"
    for rows in (df, df.set_index(df.index + 100)):
        with pytest.raises(DataError, match=said if rows is df else "'obscene', row 103"):
            HFTextDataLoaders.from_df(rows, tok, label_col=names, task=task, verbose=False)
    with pytest.raises(DataError, match=said):
        HFTextDataLoaders.from_lists(texts(24), df[names], tok, task=task, verbose=False)
    ulm = ULMFiT(tmp_path, config=dict(emb_sz=8, n_hid=8, n_layers=1), progress=False, min_freq=1)
    with pytest.raises(DataError, match=said):
        ulm.classifier(df, label_col=names, task=task, encoder=None)
    dls = HFTextDataLoaders.from_df(df, tok, label_col=names, task='regression', valid_col='valid', verbose=False)
    assert dls.spec.task == 'regression' and np.array_equal(targets(dls.valid_ds), y[:12])


@pytest.mark.parametrize('form', [list, tuple, pd.Index, np.array])
def test_label_columns_in_any_list(tok, tmp_path, form):
    names = ['toxic', 'obscene', 'insult']
    df = table(**dict(zip(names, Y.T)))
    dls = HFTextDataLoaders.from_df(df, tok, label_col=form(names), valid_col='valid', bs=6, verbose=False)
    assert dls.spec.columns['label'] == names and list(dls.vocab) == names
    assert all(type(o) is str for o in [*dls.spec.columns['label'], *dls.spec.classes])
    assert np.array_equal(targets(dls.valid_ds), Y[:12])
    pairs = HFTextDataLoaders.from_df(df.assign(b=df.text), tok, form(['text', 'b']), form(names), verbose=False)
    assert pairs.spec.pairs and pairs.spec.columns['text'] == ['text', 'b']


def test_dictionaries_of_indicators(tok):
    names = ['toxic', 'obscene', 'insult']
    rows = [dict(zip(names, row)) for row in Y.tolist()]
    dls = HFTextDataLoaders.from_lists(texts(24), rows, tok, valid=SPLIT, bs=6, verbose=False)
    assert list(dls.vocab) == names and np.array_equal(targets(dls.valid_ds), Y[:12])
    learn = hf_classifier_learner(dls, config(tok, n=3))
    turned = [dict(reversed(row.items())) for row in rows[:5]]
    with learn.no_bar():
        assert np.array_equal(learn.evaluate(texts(24)[:5], turned).targets, Y[:5])
    with pytest.raises(DataError, match='a dictionary in row 0'):
        HFTextDataLoaders.from_df(table(label=rows), tok, verbose=False)
    with pytest.raises(DataError, match="none in 'toxic', row 2"):
        HFTextDataLoaders.from_lists(texts(24), [*rows[:2], dict(obscene=1, insult=1), *rows[3:]], tok, verbose=False)


@pytest.mark.parametrize('columns,said', [(dict(a=[0, 1]*12, b=['x', 'y']*12), "'x' in 'b'"),
                                          (dict(a=[0, 1]*12, b=[0, None]*12), "none in 'b', row 1"),
                                          (dict(a=[0, 1]*12), "column 'b'")])
def test_label_columns_that_do_not_fit(tok, columns, said):
    with pytest.raises(DataError, match=said):
        HFTextDataLoaders.from_df(table(**columns), tok, label_col=['a', 'b'], verbose=False)


@pytest.mark.parametrize('task', ['multilabel', 'regression'])
def test_several_columns_of_an_awd_lstm(tmp_path, task):
    y = Y if task == 'multilabel' else np.random.default_rng(1).normal(size=(24, 3))
    names = ['toxic', 'obscene', 'insult']
    df = table(**{name: y[:, i] for i, name in enumerate(names)})
    ulm = ULMFiT(tmp_path, config=dict(emb_sz=8, n_hid=8, n_layers=1), progress=False, min_freq=1)
    learn = ulm.classifier(df, label_col=names, valid_col='valid', epochs=[1], groups=[1], encoder=None, bs=6)
    assert np.allclose(targets(learn.dls.valid_ds), y[:12]) and learn.dls.spec.n_out == 3
    rows = list(df.text[:4])
    right = learn.predict_batch(rows).scores
    learn.save_bundle(tmp_path/'b')
    assert np.allclose(load_bundle(tmp_path/'b').predict(rows).scores, right, atol=1e-5)
    again = ulm.load_classifier()
    assert np.allclose(again.predict_batch(rows).scores, right, atol=1e-5)
    if task == 'multilabel':
        with again.no_bar():
            assert list(again.dls.spec.classes) == names
            assert np.array_equal(again.evaluate(df.iloc[3:9]).targets, Y[3:9])


def test_all_classes_of_a_model_as_vocab(tok):
    hf = trained(tok, classes=NAMES)
    dls = text_dls(tok, ['entailment', 'neutral']*12, vocab=NAMES)
    assert list(dls.vocab) == NAMES
    learn = hf_classifier_learner(dls, hf)
    rows = texts(4, seed=2)
    assert np.allclose(learn.predict_batch(rows).scores, logits_of(hf, tok, rows), atol=1e-4)
    with pytest.raises(DataError, match='Did you mean'):
        text_dls(tok, ['entailment', 'neutral']*12, vocab=['entailments', 'neutral'])


# the schema of a dataset

def dataset(rows, **features):
    datasets = pytest.importorskip('datasets')
    made = {name: kind(datasets) for name, kind in features.items()}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(made))


@pytest.mark.parametrize('kind', ['Sequence', 'List', 'LargeList', 'fixed'])
def test_names_of_several_labels_survive(tok, kind):
    names = ['zest', 'anger', 'joy'] + [f'e{i}' for i in range(9)]
    numbers = [[i % 12, (i+5) % 12] for i in range(48)]
    inside = dict(Sequence=lambda d, c: d.Sequence(c), List=lambda d, c: d.List(c),
                  LargeList=lambda d, c: d.LargeList(c), fixed=lambda d, c: d.List(c, length=2))[kind]
    ds = dataset(dict(text=texts(48), labels=numbers), text=lambda d: d.Value('string'),
                 labels=lambda d: inside(d, d.ClassLabel(names=names)))
    datasets = pytest.importorskip('datasets')
    parts = datasets.DatasetDict(train=ds, test=ds.select(range(12)))
    for source in (ds, parts):
        dls = HFTextDataLoaders.from_dataset(source, tok, label_col='labels', bs=6, verbose=False)
        assert set(dls.vocab) == set(names)
    got = [{dls.vocab[i] for i in np.flatnonzero(row)} for row in targets(dls.valid_ds)]
    assert got == [{names[i] for i in row} for row in numbers[:12]]


def test_several_columns_of_class_numbers_are_indicators(tok):
    labels = dict(zip('xyz', Y.T.tolist()))
    kind = lambda d: d.ClassLabel(names=['no', 'yes'])
    ds = dataset(dict(text=texts(24), **labels), text=lambda d: d.Value('string'), x=kind, y=kind, z=kind)
    datasets = pytest.importorskip('datasets')
    both = datasets.DatasetDict(train=ds, test=ds.select(range(12)))
    for source in (ds, both):
        dls = HFTextDataLoaders.from_dataset(source, tok, label_col=['x', 'y', 'z'], bs=6, verbose=False)
        assert list(dls.vocab) == ['x', 'y', 'z'] and dls.spec.task == 'multilabel'
    assert np.array_equal(targets(dls.valid_ds), Y[:12]) and np.array_equal(targets(dls.train_ds), Y)


def test_numbers_of_two_splits_with_other_names(tok):
    datasets = pytest.importorskip('datasets')
    make = lambda names: dataset(
        dict(tokens=[o.split()[:3] for o in texts(8)], tags=[[0, 1, 2]]*8), tokens=lambda d: d.List(d.Value('string')),
        tags=lambda d: d.List(d.ClassLabel(names=names)))
    both = datasets.DatasetDict(train=make(['O', 'B-A', 'B-B']), validation=make(['B-B', 'O', 'B-A']))
    dls = HFTagDataLoaders.from_dataset(both, tok, bs=4, verbose=False)
    assert [o[1] for o in dls.train_ds.items[:1]] == [['O', 'B-A', 'B-B']]
    assert [o[1] for o in dls.valid_ds.items[:1]] == [['B-B', 'O', 'B-A']]


def test_a_tag_without_a_name_is_an_error(tok):
    ds = dataset(dict(tokens=[['a', 'b']]*8, tags=[[0, 1]]*7 + [[0, -1]]), tokens=lambda d: d.List(d.Value('string')),
                 tags=lambda d: d.List(d.ClassLabel(names=['O', 'B-A'])))
    with pytest.raises(DataError, match='row 7'):
        HFTagDataLoaders.from_dataset(ds, tok, verbose=False)


@pytest.mark.parametrize('source', ['folder', 'object'])
@pytest.mark.parametrize('order', [list(range(12)), [2, 0, 1]], ids=['more than ten', 'another order'])
@pytest.mark.parametrize('form', ['LABEL_{}', 'label_{}'])
def test_default_names_are_matched_by_name(tok, tmp_path, source, order, form):
    "LABEL_10 comes before LABEL_2 in the data, and is the output with this name"
    n = len(order)
    hf = trained(tok, n=n)
    hf.config.id2label = {i: f'LABEL_{number}' for i, number in enumerate(order)}
    hf.config.label2id = {f'LABEL_{number}': i for i, number in enumerate(order)}
    labels = [form.format(order[i % n]) for i in range(24)]
    dls = text_dls(tok, labels, vocab=sorted(set(labels)), val_bs=1)
    rows = [o[0] for o in dls.valid_ds.items]
    outputs = [order.index(int(str(c)[6:])) for c in dls.vocab]
    right = logits_of(hf, tok, rows)[:, outputs]
    learn = hf_classifier_learner(dls, saved(hf, tok, tmp_path) if source == 'folder' else hf)
    with learn.no_bar():
        got = learn.get_preds(act=noop)[0]
    assert torch.allclose(got, right, atol=1e-4)
    assert [learn.model.hf.config.id2label[i] for i in range(n)] == list(dls.vocab)


@pytest.mark.parametrize('form', ['dict', 'Series', 'tensor', 'list', 'table'])
def test_thresholds_of_an_evaluation_are_matched_by_name(form):
    classes = ['toxic', 'obscene', 'insult']
    rng = np.random.default_rng(0)
    probs = rng.random((40, 3))
    targets = rng.integers(0, 2, (40, 3))
    values = [.2, .5, .9]
    by_name = pd.Series(values, classes)[::-1]
    given = dict(dict=by_name.to_dict(), Series=by_name, tensor=torch.tensor(values, dtype=torch.float64),
                 list=values, table=pd.DataFrame(dict(threshold=by_name, f1=0.)))[form]
    ev = Evaluation(probs, targets, classes=classes, threshold=given)
    expected = [[int(p > t) for p, t in zip(row, values)] for row in probs]
    assert ev.preds.tolist() == expected
    assert len(ev.thresholds()) == 3
    targets[:, 1] = 0 # without rows, so the class keeps its threshold
    with pytest.warns(UserWarning, match='It stays 0.5'):
        table = Evaluation(probs, targets, classes=classes, threshold=given).thresholds()
    assert table.threshold['obscene'] == .5
    with pytest.raises(DataError, match='none for insult'):
        Evaluation(probs, targets, classes=classes, threshold=dict(toxic=.2, obscene=.5))


def test_one_threshold_for_all_classes(several):
    rows = texts(8, seed=9)
    for value in (0., .3, np.float32(.5), torch.tensor(.5)):
        same = [float(value)]*len(several.dls.vocab)
        assert Predictor(several, thresholds=value).thresholds.tolist() == same
        assert np.array_equal(several.predict_batch(rows, thresholds=value).preds,
                              several.predict_batch(rows, thresholds=same).preds)
    with pytest.raises(DataError, match='must be numbers'):
        Predictor(several, thresholds=True)


@pytest.mark.parametrize('form', ['dict', 'Series', 'list'])
def test_weights_of_tags_are_matched_by_name(tok, form):
    words = [o.split() for o in texts(24)]
    tags = [[TAGS[(i+j) % 5] for j in range(len(o))] for i, o in enumerate(words)]
    dls = HFTagDataLoaders.from_lists(words, tags, tok, valid=[i >= 12 for i in range(24)], bs=6, verbose=False)
    weights = dict(zip(TAGS, [.1, 3., 1., 2., 5.]))
    right = [weights[tag] for tag in dls.vocab]
    given = dict(dict=weights, Series=pd.Series(weights), list=right)[form]
    learn = hf_tagger_learner(dls, config(tok, classes=TAGS), class_weights=given)
    x, y = dls.one_batch()
    logits = torch.randn(*y.shape, 5)
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), torch.tensor(y.tolist()),
                                                 weight=torch.tensor(right))
    assert torch.allclose(torch.tensor(float(learn.loss_func(logits, y))), expected, atol=1e-6)
    with pytest.raises(DataError, match='none for O'):
        hf_tagger_learner(dls, config(tok, classes=TAGS), class_weights={t: 1. for t in TAGS[1:]})
    with pytest.raises(FastaiTLError, match='Got both'):
        hf_tagger_learner(dls, config(tok, classes=TAGS), class_weights=given, loss_func=TaggingLoss())


def test_several_regression_values_are_refused_before_the_fit(tok):
    df = pd.DataFrame(dict(text=texts(24), v=np.arange(24)/10, u=np.arange(24)/7, valid=[i >= 12 for i in range(24)]))
    dls = HFTextDataLoaders.from_df(df, tok, label_col=['v', 'u'], valid_col='valid', bs=6, verbose=False)
    learn = hf_classifier_learner(dls, config(tok, n=2))
    before = [p.clone() for p in learn.model.parameters()]
    with learn.no_bar(), learn.no_logging():
        with pytest.raises(DataError, match='2 values a row'):
            learn.fit(1, 1e-3, cbs=EvaluationCallback())
        with pytest.raises(DataError, match='each value by itself'):
            learn.evaluate()
        assert all(torch.equal(p, q) for p, q in zip(before, learn.model.parameters()))
        preds, targets = learn.get_preds()
    assert len(Evaluation.from_preds(preds[:, 0], targets[:, 0])) == 12
