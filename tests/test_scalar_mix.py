"A mix of layers: AllenNLP's definition, the states of each layer computed apart, freezing, stored states, and bundles"

import inspect
import json
import pickle

import numpy as np
import pytest
import torch
from fastai.text.all import load_learner
from torch import nn
from transformers import (AlbertConfig, DebertaV2Config, DistilBertConfig, ElectraConfig, FNetConfig, GPT2Config,
                          ModernBertConfig, RobertaConfig, XLNetConfig)

from fastai_tl.all import *
from fastai_tl.deploy.bundle_files import digest, file_facts
from fastai_tl.models.scalar_mix import find_mix
from small_learners import LABELS, MAKERS, N_ROWS, SEVERAL, TEXTS, VALID, VALUES, bart, bert, classifier

SIZES = dict(emb_sz=12, n_hid=20, n_layers=3)
SCORES = [.3, -1., 2., .5]


class AllenMix(nn.Module):
    "`ScalarMix` of AllenNLP 2.10, written from its description: one parameter for each layer, `gamma`, and masks"

    def __init__(self, n, do_layer_norm=False):
        super().__init__()
        self.scalar_parameters = nn.ParameterList([nn.Parameter(torch.zeros(1)) for _ in range(n)])
        self.gamma = nn.Parameter(torch.ones(1))
        self.do_layer_norm = do_layer_norm

    def normalized(self, tensor, mask):
        n = mask.sum()*tensor.shape[-1]
        mean = (tensor*mask[..., None]).sum()/n
        variance = (((tensor - mean)*mask[..., None])**2).sum()/n
        return (tensor - mean)/torch.sqrt(variance + 1e-13)

    def forward(self, tensors, mask=None):
        weights = torch.cat(list(self.scalar_parameters)).softmax(0)
        if self.do_layer_norm:
            tensors = [self.normalized(tensor, mask) for tensor in tensors]
        return self.gamma*sum(w*tensor for w, tensor in zip(weights, tensors))


def filled(mix, scores, scale):
    with torch.no_grad():
        mix.scores.copy_(torch.tensor(scores))
        mix.scale.fill_(scale)
    return mix


def allen(scores, scale, **kwargs):
    made = AllenMix(len(scores), **kwargs)
    with torch.no_grad():
        made.gamma.fill_(scale)
        for parameter, score in zip(made.scalar_parameters, scores):
            parameter.fill_(score)
    return made


def test_the_mix_and_its_gradients_are_those_of_allennlp():
    torch.manual_seed(0)
    states = [torch.randn(3, 5, 7) for _ in SCORES]
    ours, theirs = filled(ScalarMix(4), SCORES, 1.7), allen(SCORES, 1.7)
    ours(states).square().sum().backward()
    theirs(states).square().sum().backward()
    torch.testing.assert_close(ours(states), theirs(states))
    torch.testing.assert_close(ours.scale.grad, theirs.gamma.grad)
    torch.testing.assert_close(ours.scores.grad, torch.cat([p.grad for p in theirs.scalar_parameters]))


@pytest.mark.parametrize('dtypes', [['int64', 'int64'], ['float32', 'bfloat16']])
def test_states_of_other_dtypes_are_refused(dtypes):
    with pytest.raises(FastaiTLError, match='same floating-point dtype'):
        ScalarMix(2)([torch.ones(3, 4, dtype=getattr(torch, o)) for o in dtypes])


def test_the_layer_norm_of_one_token_is_that_of_allennlp():
    torch.manual_seed(0)
    states = [10**i*torch.randn(1, 1, 64) + i for i in range(4)]
    ours, theirs = filled(ScalarMix(4, layer_norm=True), SCORES, .6), allen(SCORES, .6, do_layer_norm=True)
    torch.testing.assert_close(ours(states), theirs(states, torch.ones(1, 1)), rtol=1e-4, atol=1e-4)


def test_a_layer_norm_does_not_depend_on_the_other_texts():
    torch.manual_seed(0)
    mix = ScalarMix(2, layer_norm=True)
    states = [torch.randn(4, 8), 50*torch.randn(4, 8)]
    torch.testing.assert_close(mix(states)[:1], mix([h[:1] for h in states]))


def sizes(tok):
    return dict(vocab_size=len(tok), pad_token_id=tok.pad_token_id, num_hidden_layers=2, hidden_size=16,
                num_attention_heads=2, intermediate_size=32, max_position_embeddings=130)


def encoders(tok):
    same = sizes(tok)
    ends = dict(bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
    return dict(
        bert=bert(tok), albert=AlbertConfig(**same, embedding_size=8), electra=ElectraConfig(**same, embedding_size=8),
        roberta=RobertaConfig(**same), deberta=DebertaV2Config(**same), modernbert=ModernBertConfig(**same, **ends),
        distilbert=DistilBertConfig(vocab_size=len(tok), dim=16, n_layers=2, n_heads=2, hidden_dim=32),
        fnet=FNetConfig(**same, type_vocab_size=2), # texts of each length are computed on their own
        xlnet=XLNetConfig(vocab_size=len(tok), d_model=16, n_layer=2, n_head=2, d_inner=32,
                          pad_token_id=tok.pad_token_id), # padded on the left
        gpt2=GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=len(tok), pad_token_id=tok.pad_token_id))


def hf_dls(toks, labels=LABELS, **kwargs):
    return HFTextDataLoaders.from_lists(TEXTS, labels, toks['encoder'], valid=VALID, bs=4, verbose=False, **kwargs)


def hf_mixed(toks, config=None, labels=LABELS, data=None, **kwargs):
    torch.manual_seed(0)
    learn = hf_classifier_learner(hf_dls(toks, labels, **data or {}), config or bert(toks['encoder']), metrics=[])
    return learn.mix_layers(**kwargs)


def awd_mixed(toks, task='classification', labels=LABELS, n_out=3, seq_len=5, **kwargs):
    torch.manual_seed(0)
    tokenized = tokenize_texts_once(TEXTS)
    rows = list(range(N_ROWS))
    dls = classifier_dls(tokenized, labels, task, rows[:20], rows[20:], texts_vocab(tokenized), bs=4)
    learn = awd_classifier_learner(dls, task, n_out, SIZES, seq_len=seq_len, metrics=[])
    return learn.mix_layers(**kwargs)


MIXED = dict(hf=hf_mixed, awd=awd_mixed)


def set_scores(learn):
    "Give the layers different weights"
    mix = find_mix(learn.model)
    filled(mix, SCORES[: mix.n_layers], 1.5)
    return torch.tensor(SCORES[: mix.n_layers]).softmax(0)


@pytest.mark.parametrize('layer_norm', [False, True])
@pytest.mark.parametrize('name', ['bert', 'albert', 'electra', 'roberta', 'deberta', 'modernbert', 'distilbert', 'gpt2',
                                  'fnet', 'xlnet'])
def test_the_logits_of_an_encoder_are_those_of_the_states_of_its_layers(small_tokenizers, name, layer_norm):
    tok = small_tokenizers['encoder']
    learn = hf_mixed(small_tokenizers, encoders(tok)[name], layer_norm=layer_norm)
    weights = set_scores(learn)
    hf = learn.model.hf.eval()
    found = torch.from_numpy(learn.predict_batch(TEXTS).probs)
    for text, probs in zip(TEXTS, found):
        accepts = inspect.signature(hf.base_model.forward).parameters
        inputs = {k: v for k, v in tok(text, return_tensors='pt').items() if k in accepts}
        with torch.no_grad():
            layers = [h[0].mean(0) for h in hf.base_model(**inputs, output_hidden_states=True).hidden_states]
            if layer_norm:
                layers = [(h - h.mean())/(h.var(correction=0) + 1e-5).sqrt() for h in layers]
            features = 1.5*(weights[:, None]*torch.stack(layers)).sum(0)
            expected = (hf.classifier.weight @ features + hf.classifier.bias).softmax(0)
        torch.testing.assert_close(probs.float(), expected, rtol=1e-4, atol=1e-5)


def plain_lstms(lstm):
    "The layers of an AWD_LSTM as PyTorch's own"
    for rnn in lstm.rnns:
        w_ih, b_ih, b_hh = (getattr(rnn.module, f'{name}_l0') for name in ('weight_ih', 'bias_ih', 'bias_hh'))
        made = nn.LSTM(w_ih.shape[1], len(w_ih)//4, batch_first=True)
        made.load_state_dict(dict(weight_ih_l0=w_ih, weight_hh_l0=rnn.weight_hh_l0_raw, bias_ih_l0=b_ih,
                                  bias_hh_l0=b_hh))
        yield made


def test_the_logits_of_an_awd_lstm_are_those_of_the_states_of_its_layers(small_tokenizers):
    learn = awd_mixed(small_tokenizers)
    weights = set_scores(learn)
    encoder, head = learn.model.eval()
    vocab = learn.dls.vocab[0]
    found = learn.predict_batch(TEXTS).probs
    by_fastai, _ = learn.get_preds(dl=learn.dls.test_dl(text_items(tokenize_texts_once(TEXTS))))
    for tokens, *both in zip(tokenize_texts_once(TEXTS), torch.from_numpy(found), by_fastai):
        ids = torch.tensor([[vocab.index(token) if token in vocab else 0 for token in tokens]])
        with torch.no_grad():
            layers = [encoder.module.encoder(ids)]
            for lstm in plain_lstms(encoder.module):
                layers.append(lstm(layers[-1])[0])
            mixed = torch.zeros(3, 20)
            for w, h in zip(weights, layers):
                pooled = torch.stack([h[0, -1], h[0].amax(0), h[0].mean(0)])
                mixed[:, : pooled.shape[1]] += 1.5*w*pooled
            expected = head.layers[1:](mixed.view(1, -1)).softmax(1)[0]
        for probs in both:
            torch.testing.assert_close(probs.float(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('kind', MIXED)
def test_mixing_keeps_the_encoder_and_begins_with_equal_weights(small_tokenizers, kind):
    learn = MIXED[kind](small_tokenizers)
    table = learn.mix_weights()
    n = len(table)
    assert table.layer[0] == 'embeddings' and table.attrs['scale'] == 1
    np.testing.assert_allclose(table.weight, np.full(n, 1/n), rtol=1e-6)
    groups = layer_groups(learn.model)
    assert [g.name for g in groups[:-1]] == table.layer.tolist()
    names = {name.rpartition('.')[2] for name in groups[-1].names}
    assert {'scores', 'scale'} <= names
    assert not any('mix' in name for g in groups[:-1] for name in g.names)


@pytest.mark.parametrize('kind', MIXED)
def test_a_frozen_encoder_stays_and_the_weights_are_learned(small_tokenizers, kind):
    learn = MIXED[kind](small_tokenizers)
    before = {name: p.detach().clone() for name, p in learn.model.named_parameters()}
    head = set(layer_groups(learn.model)[-1].names)
    learn.freeze()
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 1e-2)
    changed = {name for name, p in learn.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == head
    assert learn.mix_weights().weight.std() > 1e-4
    learn.unfreeze()
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-2)
    changed = {name for name, p in learn.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed - head and any('embed' in name or 'encoder.weight' in name for name in changed - head)


@pytest.mark.parametrize('kind', MIXED)
def test_mixing_again_unfreezes_and_begins_anew(small_tokenizers, kind):
    learn = MIXED[kind](small_tokenizers)
    set_scores(learn)
    learn.freeze()
    learn.mix_layers(layer_norm=True)
    assert learn.mix_weights().weight.nunique() == 1 and find_mix(learn.model).layer_norm
    assert all(p.requires_grad for group in layer_groups(learn.model) for p in group.params)


@pytest.mark.parametrize('kind', MIXED)
def test_fixed_weights_stay_equal(small_tokenizers, kind):
    learn = MIXED[kind](small_tokenizers, trainable=False)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-2)
    assert learn.mix_weights().weight.nunique() == 1 and learn.mix_weights().attrs['scale'] == 1


@pytest.mark.parametrize('kind', MIXED)
def test_stored_states_give_the_same_training(small_tokenizers, kind):
    results = []
    for cached in (False, True):
        seed_everything(0)
        learn = MIXED[kind](small_tokenizers)
        learn.freeze()
        for m in learn.model.modules(): # what a frozen encoder computes is stored without dropout
            for name in {'p', 'embed_p', 'weight_p'} & vars(m).keys():
                setattr(m, name, 1e-9 if name == 'weight_p' else 0.)
        seed_everything(1)
        with learn.no_bar(), learn.no_logging():
            learn.fit(3, 1e-2, cbs=CachedPrefix(verbose=False) if cached else None)
        results.append((learn.recorder.losses, learn.mix_weights().weight, learn.recorder.values))
    for plain, stored in zip(*results):
        np.testing.assert_allclose(stored, plain, rtol=1e-3, atol=1e-4)
    assert results[0][1].nunique() > 1


@pytest.mark.parametrize('kind', MIXED)
def test_stored_states_need_the_whole_encoder_frozen(small_tokenizers, kind):
    learn = MIXED[kind](small_tokenizers)
    learn.freeze_to(-2)
    with learn.no_bar(), learn.no_logging(), pytest.raises(FastaiTLError, match='mix of its layers'):
        learn.fit(1, 1e-2, cbs=CachedPrefix(verbose=False))


@pytest.mark.parametrize('layer_norm', [False, True])
@pytest.mark.parametrize('kind', MIXED)
def test_a_bundle_has_the_same_mix(small_tokenizers, tmp_path, kind, layer_norm):
    learn = MIXED[kind](small_tokenizers, layer_norm=layer_norm)
    set_scores(learn)
    expected = learn.predict_batch(TEXTS).probs
    loaded = load_bundle(learn.save_bundle(tmp_path/'bundle'))
    np.testing.assert_array_equal(loaded.predict(TEXTS).probs, expected)
    again = loaded.make_learner()
    assert again.mix_weights().equals(learn.mix_weights())
    assert find_mix(again.model).settings == dict(layer_norm=layer_norm, trainable=True)
    np.testing.assert_allclose(again.predict_batch(TEXTS).probs, expected, atol=1e-6)
    int8 = learn.predictor('int8', verbose=False).predict(TEXTS).probs
    np.testing.assert_allclose(int8, expected, atol=.05)


@pytest.mark.parametrize('kind', MIXED)
def test_an_onnx_file_has_the_same_mix(small_tokenizers, tmp_path, kind):
    pytest.importorskip('onnxscript')
    learn = MIXED[kind](small_tokenizers)
    set_scores(learn)
    folder = learn.save_bundle(tmp_path/'bundle', onnx=True)
    found = load_bundle(folder, engine='onnx').predict(TEXTS).probs
    np.testing.assert_allclose(found, learn.predict_batch(TEXTS).probs, atol=1e-5)


@pytest.mark.parametrize('kind', MIXED)
def test_a_learner_is_saved_exported_and_pickled(small_tokenizers, tmp_path, kind):
    learn = MIXED[kind](small_tokenizers)
    set_scores(learn)
    expected = learn.predict_batch(TEXTS).probs
    learn.path = tmp_path
    learn.save('mixed')
    learn.export('learn.pkl')
    assert pickle.loads(pickle.dumps(learn.model)) is not None
    np.testing.assert_allclose(load_learner(tmp_path/'learn.pkl').predict_batch(TEXTS).probs, expected, atol=1e-6)
    other = MIXED[kind](small_tokenizers)
    other.path = tmp_path
    other.load('mixed')
    np.testing.assert_allclose(other.predict_batch(TEXTS).probs, expected, atol=1e-6)


@pytest.mark.parametrize('kind', MIXED)
@pytest.mark.parametrize('saved', [False, True])
def test_weights_fit_no_other_mix(small_tokenizers, tmp_path, kind, saved):
    "With a layer norm, the same weights would mean something else"
    first, other = (MIXED[kind](small_tokenizers, layer_norm=o) for o in (saved, not saved))
    for learn in (first, other):
        learn.path = tmp_path
    first.save('mixed')
    with pytest.raises(RuntimeError, match='has_layer_norm'):
        other.load('mixed')


@pytest.mark.parametrize('kind', MIXED)
def test_values_and_several_labels(small_tokenizers, kind):
    for task, labels, n_out in (('regression', VALUES, 1), ('multilabel', SEVERAL, 3)):
        if kind == 'hf':
            learn = hf_mixed(small_tokenizers, labels=labels, data=dict(task=task))
        else:
            learn = awd_mixed(small_tokenizers, task, labels, n_out)
        with learn.no_bar(), learn.no_logging():
            learn.fit(4, 1e-2)
        assert learn.recorder.losses[-1] < learn.recorder.losses[0]
        assert learn.predict_batch(TEXTS[:3]) is not None


def test_gradient_checkpointing_stays(small_tokenizers):
    tok = small_tokenizers['encoder']
    learn = hf_classifier_learner(hf_dls(small_tokenizers), bert(tok), gradient_checkpointing=True)
    assert learn.mix_layers().model.hf.is_gradient_checkpointing


def test_a_mixed_encoder_can_become_a_few_shot_classifier(small_tokenizers):
    learn = hf_mixed(small_tokenizers)
    other = few_shot_learner(hf_dls(small_tokenizers), learn.model.hf, n_steps=0, verbose=False)
    assert find_mix(other.model) is None


@pytest.mark.parametrize('kind', MIXED)
def test_attributions_and_layer_features_of_a_mixed_model(small_tokenizers, kind):
    learn = MIXED[kind](small_tokenizers)
    set_scores(learn)
    assert list(learn.layer_features(TEXTS)) == learn.mix_weights().layer.tolist()
    learn.attribute(TEXTS[:1], method='gradient_x_input')


@pytest.mark.parametrize('name, match', [('tagger', 'classifier or a regression'), ('causal_lm', 'classifier or a'),
                                         ('ulmfit_lm', 'classifier or a regression')])
def test_other_tasks_are_refused(small_tokenizers, name, match):
    with pytest.raises(FastaiTLError, match=match):
        MAKERS[name](small_tokenizers).mix_layers()


def test_models_without_one_stack_of_layers_are_refused(small_tokenizers):
    config = bart(d_model=16, vocab_size=400, pad_token_id=0, eos_token_id=2)
    learn = hf_classifier_learner(hf_dls(small_tokenizers), config)
    with pytest.raises(FastaiTLError, match='one stack of layers'):
        learn.mix_layers()


def test_adapters_are_refused(small_tokenizers):
    peft = pytest.importorskip('peft')
    learn = classifier(small_tokenizers, peft_config=peft.LoraConfig(target_modules=['query']))
    with pytest.raises(FastaiTLError, match='without adapters'):
        learn.mix_layers()


def test_fewer_layers_are_refused(small_tokenizers):
    learn = hf_mixed(small_tokenizers)
    with pytest.raises(FastaiTLError, match='mix of all layers'):
        learn.shrink(layers=1)


def test_weights_need_a_mix(small_tokenizers):
    with pytest.raises(FastaiTLError, match='mix_layers'):
        classifier(small_tokenizers).mix_weights()


@pytest.mark.parametrize('settings', [dict(layer_norm=3), dict(trainable='no')])
def test_wrong_settings_are_refused(small_tokenizers, settings):
    with pytest.raises(FastaiTLError):
        classifier(small_tokenizers).mix_layers(**settings)


@pytest.mark.parametrize('value', [5, ['layer_norm'], dict(layer_norm=True, other=1), dict(layer_norm='x'), None])
def test_a_bundle_with_a_bad_mix_is_refused(small_tokenizers, tmp_path, value):
    folder = awd_mixed(small_tokenizers).save_bundle(tmp_path/'bundle')
    settings = json.loads((folder/'model.json').read_text())
    settings['head']['scalar_mix'] = value
    (folder/'model.json').write_text(json.dumps(settings))
    manifest = json.loads((folder/'bundle.json').read_text())
    manifest['files']['model.json'] = file_facts(folder/'model.json')
    manifest.pop('checksum')
    (folder/'bundle.json').write_text(json.dumps(dict(manifest, checksum=digest(manifest))))
    with pytest.raises(FastaiTLError):
        load_bundle(folder)
