"Few-shot classifiers: the same gradient in parts, scikit-learn's probabilities, seeds, bundles, and bad data"

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.text.all import TextDataLoaders
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from transformers import BertConfig, DistilBertConfig, GPT2Config, ModernBertConfig, RobertaConfig

from fastai_tl.all import *
from fastai_tl.models.pooled_classifier import keep_layers, pooled_class, pooled_mean
from small_learners import LABELS, TEXTS, VALID, bert

N_TRAIN = 20


def few_dls(toks, texts=TEXTS, labels=LABELS, **kwargs):
    return HFTextDataLoaders.from_lists(texts, labels, toks['encoder'], valid=VALID, verbose=False, **kwargs)


def made(toks, dls=None, encoder=None, **kwargs):
    "A Learner whose encoder has random weights, the same in each call"
    torch.manual_seed(0)
    encoder = encoder or bert(toks['encoder'])
    return few_shot_learner(dls or few_dls(toks), encoder, verbose=False, metrics=[], **dict(n_steps=2) | kwargs)


def weights(learn):
    return torch.cat([p.detach().flatten() for p in learn.model.parameters()])


def probabilities(learn, texts=TEXTS):
    return learn.predict_batch(texts).probs


def test_a_batch_in_parts_gives_the_same_classifier(small_tokenizers):
    config = bert(small_tokenizers['encoder'], hidden_dropout_prob=0., attention_probs_dropout_prob=0.)
    options = dict(encoder=config, n_views=1, n_steps=3, lr=1e-3)
    whole = made(small_tokenizers, part_tokens=10**6, **options)
    parts = made(small_tokenizers, part_tokens=1, **options)
    assert whole.few_shot.losses == pytest.approx(parts.few_shot.losses, rel=1e-4)
    assert whole.few_shot.losses[-1] < whole.few_shot.losses[0]
    np.testing.assert_allclose(probabilities(whole), probabilities(parts), atol=1e-3)


@pytest.mark.parametrize('labels', [LABELS, ['a', 'b'] * 11])
def test_the_head_gives_the_probabilities_of_scikit_learn(small_tokenizers, labels):
    learn = made(small_tokenizers, few_dls(small_tokenizers, labels=labels), C=.7)
    features = learn.layer_features(TEXTS)['layer.1'].astype(float)
    scaler = StandardScaler().fit(features[:N_TRAIN])
    logistic = LogisticRegression(C=.7, max_iter=1000).fit(scaler.transform(features[:N_TRAIN]), labels[:N_TRAIN])
    assert list(logistic.classes_) == list(learn.dls.vocab)
    np.testing.assert_allclose(probabilities(learn), logistic.predict_proba(scaler.transform(features)), atol=1e-5)


def test_unlabelled_texts_standardize_the_features(small_tokenizers):
    others = ['the plot was slow', 'music', 'very bad ending scene music film']
    learn = made(small_tokenizers, C=.7, unlabelled=others)
    features = learn.layer_features(TEXTS[:N_TRAIN] + others)['layer.1'].astype(float)
    scaler = StandardScaler().fit(features)
    logistic = LogisticRegression(C=.7, max_iter=1000).fit(scaler.transform(features[:N_TRAIN]), LABELS[:N_TRAIN])
    expected = logistic.predict_proba(scaler.transform(features[N_TRAIN:]))
    np.testing.assert_allclose(probabilities(learn, others), expected, atol=1e-5)


def test_a_seed_gives_the_same_classifier_and_leaves_random_numbers_alone(small_tokenizers):
    hf = made(small_tokenizers, n_steps=0).model.hf
    dls = few_dls(small_tokenizers)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = made(small_tokenizers, dls, hf, seed=1)
    torch.manual_seed(5)
    few_shot_learner(dls, hf, seed=1, n_steps=1, verbose=False)
    assert torch.equal(torch.get_rng_state(), before)
    again = made(small_tokenizers, dls, hf, seed=1)
    other = made(small_tokenizers, dls, hf, seed=2)
    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(other))


def test_without_tuning_the_encoder_stays_and_a_probe_chooses_the_layer(small_tokenizers):
    config = BertConfig(vocab_size=len(small_tokenizers['encoder']), hidden_size=16, num_hidden_layers=4,
                        num_attention_heads=2, intermediate_size=32, max_position_embeddings=128)
    encoder = hf_classifier_learner(few_dls(small_tokenizers), config).model.hf
    learn = made(small_tokenizers, encoder=encoder, n_steps=0)
    table = learn.few_shot.layers
    assert table.log_loss.is_monotonic_increasing
    assert sorted(set(table.layer)) == [1, 2, 3, 4]
    assert len(learn.model.hf.bert.encoder.layer) == table.layer[0] == learn.few_shot.layer
    before = encoder.bert.state_dict()
    assert all(torch.equal(before[name], w) for name, w in learn.model.hf.bert.state_dict().items())


@pytest.mark.parametrize('config', [
    BertConfig, DistilBertConfig, RobertaConfig, GPT2Config, ModernBertConfig], ids=lambda o: o.__name__)
def test_a_lower_layer_is_pooled_in_each_architecture(config):
    sizes = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32)
    names = getattr(config, 'attribute_map', {})
    config = config(**{names.get(k, k): v for k, v in sizes.items()}, vocab_size=60, num_labels=3, pad_token_id=0,
                    bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    model = pooled_class()(config).eval()
    ids, mask = torch.tensor([[5, 6, 7, 8], [8, 9, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    with torch.no_grad():
        states = model.base_model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[2]
        kept = keep_layers(model, 2).eval()
        found = kept(ids, mask).logits
        torch.testing.assert_close(found, kept.classifier(pooled_mean(states, mask)), atol=1e-5, rtol=1e-5)


def test_a_bundle_predicts_the_same_and_its_classes_are_matched_by_name(small_tokenizers, tmp_path):
    learn = made(small_tokenizers, C=100.)
    learn.save_bundle(tmp_path/'model')
    expected = probabilities(learn)
    np.testing.assert_array_equal(load_bundle(tmp_path/'model').predict(TEXTS).probs, expected)
    reversed_dls = few_dls(small_tokenizers, vocab=['c', 'b', 'a'])
    again = hf_classifier_learner(reversed_dls, tmp_path/'model', metrics=[])
    np.testing.assert_allclose(probabilities(again), expected[:, ::-1], atol=1e-6)
    assert made(small_tokenizers, reversed_dls, tmp_path/'model').model.hf.config.id2label[0] == 'c'


def test_onnx_computes_the_same(small_tokenizers, tmp_path):
    pytest.importorskip('onnxscript')
    pytest.importorskip('onnxruntime')
    learn = made(small_tokenizers)
    learn.save_bundle(tmp_path/'model', onnx=True)
    found = load_bundle(tmp_path/'model', engine='onnx').predict(TEXTS).probs
    np.testing.assert_allclose(found, probabilities(learn), atol=1e-5)


def test_the_learner_is_an_ordinary_one(small_tokenizers, tmp_path):
    learn = made(small_tokenizers)
    df = pd.DataFrame(dict(text=TEXTS, label=LABELS))
    assert learn.evaluate(df).probs.shape == (22, 3)
    assert learn.layer_table().layers.tolist() == ['embeddings', 'layer.0', 'layer.1', 'head']
    learn.export(tmp_path/'learn.pkl')
    before = weights(learn)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3)
    assert not torch.equal(before, weights(learn))


def test_all_rows_of_a_table_are_trained_on(small_tokenizers):
    df = pd.DataFrame(dict(question=TEXTS, kind=LABELS))
    encoder = made(small_tokenizers, n_steps=0, layer=2).model.hf
    maker = FewShotClassifier(encoder, small_tokenizers['encoder'], n_steps=1, C=.7, verbose=False)
    learn = maker.fit(df, text_col='question', label_col='kind')
    features = learn.layer_features(TEXTS)['layer.1'].astype(float)
    scaler = StandardScaler().fit(features)
    logistic = LogisticRegression(C=.7, max_iter=1000).fit(scaler.transform(features), LABELS)
    np.testing.assert_allclose(probabilities(learn), logistic.predict_proba(scaler.transform(features)), atol=1e-5)
    with_valid = maker.fit(df, df.head(6), text_col='question', label_col='kind')
    assert (len(with_valid.dls.train_ds), len(with_valid.dls.valid_ds)) == (22, 6)
    np.testing.assert_allclose(probabilities(with_valid), probabilities(learn), atol=1e-6)


def test_pairs_and_a_class_with_one_text(small_tokenizers):
    pairs = [[text, other] for text, other in zip(TEXTS, TEXTS[::-1])]
    labels = ['once', *LABELS[1:]]
    learn = made(small_tokenizers, few_dls(small_tokenizers, pairs, labels), C=100.)
    assert probabilities(learn, pairs).shape == (22, 4)
    single = made(small_tokenizers, few_dls(small_tokenizers, ['a good film', 'a bad plot'] + TEXTS[:20],
                                            ['x', 'y'] + ['x', 'y']*10, ), n_steps=0)
    assert single.few_shot.layers is not None


@pytest.mark.parametrize('options, message', [
    (dict(layer=3), 'from 1 to 2'), (dict(lr=0), 'lr'), (dict(n_steps=-1), 'n_steps'), (dict(C=-1), '`C`'),
    (dict(temperature=0), 'temperature'), (dict(encoder=torch.nn.Linear(2, 2)), 'An encoder'),
    (dict(peft_config=1), 'peft_config')])
def test_options_that_cannot_be(small_tokenizers, options, message):
    with pytest.raises(FastaiTLError, match=message):
        made(small_tokenizers, **options)


def test_data_that_cannot_be(small_tokenizers):
    def refused(message, dls):
        with pytest.raises(DataError, match=message):
            made(small_tokenizers, dls)
    several = [[o] for o in LABELS]
    refused('multilabel', few_dls(small_tokenizers, labels=several, task='multilabel'))
    refused('regression', few_dls(small_tokenizers, labels=[i/3 for i in range(22)], task='regression'))
    refused('windows', few_dls(small_tokenizers, windows=2, max_length=16))
    refused("none for 'z'|none for z", few_dls(small_tokenizers, vocab=['a', 'b', 'c', 'z']))
    df = pd.DataFrame(dict(text=TEXTS, label=LABELS))
    with pytest.raises(DataError, match='tokenizer'):
        few_shot_learner(TextDataLoaders.from_df(df, valid_pct=.2, bs=4), bert(small_tokenizers['encoder']))
    with pytest.raises(DataError, match='two classes'):
        maker = FewShotClassifier(bert(small_tokenizers['encoder']), small_tokenizers['encoder'])
        maker.fit(df.assign(label='a'))
    with pytest.raises(FastaiTLError, match='tokenizer'):
        FewShotClassifier(bert(small_tokenizers['encoder']))


@pytest.mark.parametrize('n', [8, 16, 17])
def test_a_plan_for_very_few_texts_names_few_shot_learner(n):
    labels = ['a', 'b'] * (n + 1)
    texts = [f'{label} text {i}' for i, label in enumerate(labels)]
    dls = HFTextDataLoaders.from_lists(texts, labels, minilm_folder(), valid=[i >= 2 * n for i in range(len(texts))],
                                       bs=16, max_length=16, verbose=False)
    plan = hf_classifier_learner(dls, minilm_folder()).transfer_plan()
    assert ('few_shot_learner' in plan.explain()) == (n <= 16)
    assert plan.few == (n if n <= 16 else None)
