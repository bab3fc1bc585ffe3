"A spec of texts and labels goes through JSON unchanged; a wrong one raises an error that says what is wrong."

import json
import re
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastai_tl.core import FastaiTLError
from fastai_tl.data.spec import CLASSIFICATION_TASKS, FAMILIES, TASKS, TextSpec, activate

words = st.text(max_size=12)
numbers = st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False))
names = st.one_of(words, numbers, st.booleans())
counts = st.none() | st.integers(0, 10**6)
lengths = st.none() | st.integers(1, 10**6)
values = st.recursive(
    st.none() | names, max_leaves=8,
    extend=lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3))
specs = st.builds(
    TextSpec,
    task=st.sampled_from(TASKS),
    family=st.sampled_from(FAMILIES),
    classes=st.none() | st.lists(names, max_size=5),
    threshold=st.floats(0, 1),
    lang=st.sampled_from(['en', 'english', 'zh', 'zh_TW', 'zh-hant']),
    rules=st.lists(words, max_size=4),
    tokenizer=st.dictionaries(words, values, max_size=4),
    max_length=lengths,
    truncation=st.booleans(),
    windows=counts,
    backwards=st.booleans(),
    pairs=st.booleans(),
    columns=st.dictionaries(words, words | st.integers(0, 20), max_size=3),
    label_delim=st.none() | words,
    seq_len=lengths,
    word_sep=st.none() | words,
    may_be_none=st.booleans(),
    max_target_length=lengths,
    indicators=st.booleans(),
    n_values=st.integers(1, 20))


@given(spec=specs)
def test_goes_through_json_unchanged(spec):
    "Values and types are the same; a second pass writes the same JSON"
    written = json.dumps(spec.to_json())
    back = TextSpec.from_json(json.loads(written))
    assert back == spec
    assert repr(back) == repr(spec)   # 1, 1. and True are equal, and written differently
    assert json.dumps(back.to_json()) == written


@given(spec=specs)
def test_goes_through_a_file_unchanged(tmp_path_factory, spec):
    path = tmp_path_factory.mktemp('spec')/'spec.json'
    spec.save(path)
    assert TextSpec.load(path) == spec


@given(spec=specs, length=lengths)
def test_replace_changes_one_field(spec, length):
    other = spec.replace(max_length=length)
    assert other.max_length == length
    assert other.replace(max_length=spec.max_length) == spec
    with pytest.raises(AttributeError):
        spec.max_length = length


@pytest.mark.parametrize('classes', [np.array(['a', 'b']), np.array([0, 1]), np.array([True, False]),
                                     torch.tensor([.5, 1.5]), iter('ab')])
def test_class_names_become_values_of_python(classes):
    spec = TextSpec('classification', classes=classes)
    assert {type(name) for name in spec.classes} <= {str, int, float, bool} and len(spec.classes) == 2
    assert TextSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_lists_in_settings_are_lists():
    settings = dict(special=('[CLS]', '[SEP]'))
    spec = TextSpec('qa', tokenizer=settings, max_length=np.int64(9), may_be_none=np.bool_(True))
    assert spec.tokenizer == dict(special=['[CLS]', '[SEP]'])
    assert type(spec.max_length) is int and spec.may_be_none is True


good = TextSpec('multilabel', classes=['a', 'b']).to_json()


@pytest.mark.parametrize('content, message', [
    (dict(good, version=2), 'must have version 1. Got version 2'),
    ({k: v for k, v in good.items() if k != 'version'}, 'Got version None'),
    (dict(good, version='1'), "Got version '1'"),
    (dict(good, max_len=3), "Got max_len. Did you mean 'max_length'"),
    (dict(good, activation='sigmoid', loss='bce'), 'Got activation, loss'),
    (dict(good, task='multi-label'), "Did you mean 'multilabel'"),
    (dict(good, family='spacy'), '`family` must be one of huggingface, fastai'),
    (dict(good, lang='zh-cn'), 'ToTraditional'),
    (dict(good, classes=['a', None]), 'Class names must be strings, numbers or booleans. Got a NoneType'),
    (dict(good, classes=[['a'], 'b']), 'Class names must be strings, numbers or booleans. Got a list'),
    (dict(good, threshold=float('inf')), '`threshold` of a spec must hold strings, finite numbers or booleans'),
    ({'version': 1}, 'a dictionary with a `task`. Got version'),
    (['multilabel'], "a dictionary. Got ['multilabel']"), ('multilabel', "a dictionary. Got 'multilabel'"),
    (None, 'a dictionary. Got None')])
def test_wrong_specs_raise_errors(content, message):
    with pytest.raises(FastaiTLError) as error:
        TextSpec.from_json(content)
    assert message in str(error.value)


@pytest.mark.parametrize('field, value', [
    ('tokenizer', {'a': {1, 2}}), ('tokenizer', {1: 'a'}), ('columns', {'text': object()}), ('rules', [str.lower]),
    ('max_length', float('nan')), ('classes', [b'a'])])
def test_values_that_json_does_not_have_raise_errors(field, value):
    with pytest.raises(FastaiTLError, match=field):
        TextSpec('classification', **{field: value})


row = st.lists(st.floats(-20, 20), min_size=3, max_size=3)


@given(logits=st.lists(row, min_size=1, max_size=4), task=st.sampled_from(TASKS), temperature=st.floats(.1, 10))
def test_activations_are_those_of_the_formulas(logits, task, temperature):
    "Softmax or sigmoid of the divided logits, the values themselves for a regression; arrays and tensors agree"
    z = np.array(logits, dtype=np.float64)
    if task == 'regression':
        want = z
    elif task == 'multilabel':
        want = 1/(1+np.exp(-z/temperature))
    else:
        e = np.exp(z/temperature - (z/temperature).max(-1, keepdims=True))
        want = e/e.sum(-1, keepdims=True)
    of_tensor = TextSpec(task).activate(torch.tensor(z), temperature)
    np.testing.assert_allclose(activate(z, task, temperature), want, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(of_tensor.numpy(), want, rtol=1e-9, atol=1e-12)


def test_the_strategy_covers_every_field():
    "A new field of the spec must be added to `specs`"
    assert {f.name for f in fields(TextSpec)} <= set(re.findall(r'(\w+)=', repr(specs)))


def test_words_for_tasks():
    "Three tasks classify or predict a value; two are language models"
    assert {t for t in TASKS if TextSpec(t).is_classification} == set(CLASSIFICATION_TASKS)
    assert {t for t in TASKS if TextSpec(t).is_language_model} == {'causal_lm', 'masked_lm'}
