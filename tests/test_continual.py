"New classes, new words, updates with a gate, and drift"

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.optimizer import Adam
from small_learners import LABELS, N_ROWS, SEVERAL, TEXTS, VALID, bert, classifier, causal_lm, masked_lm, tagger
from small_learners import ulmfit_classifier, ulmfit_lm
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from fastai_tl.all import *
from fastai_tl.deploy.drift import drift_table, text_facts
from fastai_tl.models.class_extension import add_outputs, output_layer

SIZES = dict(vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
TINY_DISTILBERT = DistilBertConfig(vocab_size=60, dim=16, n_layers=1, n_heads=2, hidden_dim=32, num_labels=3)
TINY_GPT2 = GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2, num_labels=3, pad_token_id=0, eos_token_id=1)
MODELS = dict(
    distilbert=(DistilBertForSequenceClassification, TINY_DISTILBERT),
    electra=(ElectraForSequenceClassification, ElectraConfig(**SIZES, embedding_size=8, num_labels=3)),
    gpt2=(GPT2ForSequenceClassification, TINY_GPT2),
    roberta=(RobertaForSequenceClassification, RobertaConfig(**SIZES, num_labels=3)),
)


def quiet_fit(learn, n=1, lr=1e-3, **kwargs):
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(n, lr, **kwargs)
    return learn


def logits(learn, dl=None):
    with learn.no_bar():
        return learn.get_preds(dl=dl, act=lambda o: o)[0]


# --- new classes ---


@pytest.mark.parametrize('name', MODELS)
def test_logits_of_old_classes_are_equal_to_the_bit(name):
    cls, config = MODELS[name]
    seed_everything(1)
    model = HFModel(cls(config).eval())
    batches = [torch.randint(5, 60, (n, 1, 6)) for n in (1, 2, 7, 33)]
    with torch.no_grad():
        before = [model(x) for x in batches]
        for n_new in (2, 1):
            add_outputs(output_layer(model), n_new)
        after = [model(x) for x in batches]
    for old, new in zip(before, after):
        assert new.shape[1] == 6
        assert (new[:, :3] - old).abs().max().item() == 0.0
        assert not torch.allclose(new[:, 3], new[:, 4])


@pytest.mark.parametrize('opt_func', [None, Adam])
def test_moments_of_old_classes_are_kept_and_training_goes_on(small_tokenizers, opt_func):
    seed_everything(0)
    learn = classifier(small_tokenizers, **({} if opt_func is None else dict(opt_func=opt_func)))
    quiet_fit(learn)
    head = learn.model.hf.classifier
    state_of = lambda: (learn.opt.state if opt_func else learn.opt.opt.state)[head.weight]
    before = {k: v.clone() for k, v in state_of().items() if isinstance(v, torch.Tensor) and v.ndim == 2}
    weight = head.weight.detach().clone()
    old = logits(learn)
    learn.add_classes(['d', 'e'], verbose=False)
    assert (logits(learn)[:, :3] - old).abs().max().item() == 0.0
    assert torch.equal(head.weight[:3], weight)
    assert len(before) == 2
    for name, moment in before.items():
        assert torch.equal(state_of()[name][:3], moment)
        assert not state_of()[name][3:].any()
    params = [id(p) for group in learn.opt.param_lists for p in group]
    assert sorted(params) == sorted(map(id, learn.model.parameters()))
    quiet_fit(learn)
    assert not torch.equal(head.weight[:3], weight)


def test_everything_that_knows_the_classes_gets_the_new_ones(small_tokenizers):
    from sklearn.metrics import f1_score

    toks = small_tokenizers
    dls = HFTextDataLoaders.from_lists(TEXTS, LABELS, toks['encoder'], valid=VALID, bs=4, verbose=False)
    learn = hf_classifier_learner(dls, bert(toks['encoder']), class_weights=[1.0, 2.0, 6.0])
    learn.add_classes(['d'], verbose=False)
    assert learn.loss_func.func.weight.tolist() == [1.0, 2.0, 6.0, 3.0]
    assert list(learn.dls.vocab) == ['a', 'b', 'c', 'd'] and learn.dls.c == 4
    df = pd.DataFrame(dict(text=TEXTS[:12], label=list('dabd') * 3))
    dl = learn.dls.test_dl(df, with_labels=True)
    with learn.no_bar():
        macro_f1 = learn.validate(dl=dl)[2]
    preds = learn.predict_batch(df.text).labels
    assert macro_f1 == pytest.approx(f1_score(df.label, preds, labels=list('abcd'), average='macro', zero_division=0))
    assert learn.evaluate(df).classes == ['a', 'b', 'c', 'd']
    assert learn.stale_calibration == 'new classes: d'
    with pytest.raises(DataError, match='one for each class'):
        learn.predictor(thresholds=[0.5, 0.5, 0.5])


def test_several_labels(small_tokenizers, tmp_path):
    learn = classifier(small_tokenizers, SEVERAL, data='multi')
    old = logits(learn)
    learn.add_classes(['d'], verbose=False)
    assert (logits(learn)[:, :3] - old).abs().max().item() == 0.0
    df = pd.DataFrame(dict(text=TEXTS[:2], label=[['d', 'a'], []]))
    assert [y.tolist() for _, y in learn.dls.test_dl(df, with_labels=True).dataset] == [[1, 0, 0, 1], [0, 0, 0, 0]]
    quiet_fit(learn)


@pytest.mark.parametrize('make', [classifier, ulmfit_classifier], ids=['hf', 'awd'])
def test_bundles_have_the_new_classes(small_tokenizers, tmp_path, make):
    learn = quiet_fit(make(small_tokenizers)).add_classes(['d'], verbose=False)
    quiet_fit(learn)
    folder = learn.save_bundle(tmp_path / 'model')
    pred = load_bundle(folder)
    assert pred.classes == ['a', 'b', 'c', 'd']
    scores = learn.predict_batch(TEXTS).scores
    np.testing.assert_allclose(pred.predict(TEXTS).scores, scores, atol=1e-5)
    again = pred.learner().add_classes(['e'], verbose=False)
    np.testing.assert_allclose(again.predict_batch(TEXTS).scores[:, :4], scores, atol=1e-5)


def test_what_cannot_get_classes_says_why(small_tokenizers):
    from peft import LoraConfig
    from small_learners import VALUES, with_one_output

    toks = small_tokenizers
    with pytest.raises(FastaiTLError, match='added to a classifier'):
        tagger(toks).add_classes(['B-Y'])
    with pytest.raises(FastaiTLError, match='added to a classifier'):
        classifier(toks, VALUES, data='value').add_classes(['a'])
    with pytest.raises(FastaiTLError, match='PEFT'):
        classifier(toks, peft_config=LoraConfig(target_modules=['query'])).add_classes(['d'])
    learn = classifier(toks)
    with pytest.raises(DataError, match='names of their own'):
        learn.add_classes(['d', 'd'])
    assert list(learn.dls.vocab) == ['a', 'b', 'c']
    two = classifier(toks, ['a', 'b'] * 11)
    with pytest.raises(FastaiTLError, match='an output for each'):
        with_one_output(two).add_classes(['c'])


# --- new words ---

WORDS = ['gamer', 'chipset']


@pytest.mark.parametrize('make', [classifier, masked_lm, causal_lm])
def test_new_words_begin_as_the_mean_of_their_pieces(small_tokenizers, make):
    import copy

    toks = {kind: copy.deepcopy(tok) for kind, tok in small_tokenizers.items()}
    learn = quiet_fit(make(toks))
    hf, tok = learn.model.hf, learn.dls.tokenizer
    table = hf.get_input_embeddings().weight
    rows, moments = table.detach().clone(), learn.opt.opt.state[table]['exp_avg'].clone()
    pieces = tok(WORDS, add_special_tokens=False).input_ids
    old = logits(learn)
    assert learn.extend_vocab(words=[*WORDS, *WORDS], verbose=False) == WORDS
    table = hf.get_input_embeddings().weight
    assert torch.equal(table[: len(rows)], rows)
    for word, ids in zip(WORDS, pieces):
        torch.testing.assert_close(table[tok.convert_tokens_to_ids(word)], rows[ids].mean(0))
    assert torch.equal(learn.opt.opt.state[table]['exp_avg'][: len(rows)], moments)
    assert (logits(learn)[..., : old.shape[-1]] - old).abs().max() < 1e-6
    if make is not classifier:
        assert hf.get_output_embeddings().weight is table
    assert set(WORDS) <= set(tok.tokenize('a gamer with a chipset'))
    quiet_fit(learn)
    assert sorted(id(p) for group in learn.opt.param_lists for p in group) == sorted(map(id, learn.model.parameters()))


def test_an_output_layer_that_is_not_tied_gets_the_mean(small_tokenizers):
    import copy

    tok = copy.deepcopy(small_tokenizers['decoder'])
    dls = HFCausalLMDataLoaders.from_texts(TEXTS, tok, max_length=24, bs=4)
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=len(tok), n_positions=64, tie_word_embeddings=False)
    learn = hf_causal_lm_learner(dls, config, metrics=[])
    out = learn.model.hf.get_output_embeddings().weight.detach().clone()
    ids = tok('gamer', add_special_tokens=False).input_ids
    learn.extend_vocab(words=['gamer'], verbose=False)
    new = learn.model.hf.get_output_embeddings().weight
    assert new is not learn.model.hf.get_input_embeddings().weight
    assert torch.equal(new[: len(out)], out)
    torch.testing.assert_close(new[tok.convert_tokens_to_ids('gamer')], out[ids].mean(0))


def test_only_frequent_words_of_several_pieces_are_new(small_tokenizers, tmp_path):
    import copy

    from tokenizers.normalizers import Lowercase

    toks = {kind: copy.deepcopy(tok) for kind, tok in small_tokenizers.items()}
    toks['encoder'].backend_tokenizer.normalizer = Lowercase()
    learn = classifier(toks)
    stream = ['a Gamer was a chipset'] * 5 + ['a laptop is good'] * 4
    assert learn.extend_vocab(stream, min_freq=5, verbose=False) == ['chipset', 'gamer']
    n_tokens = learn.dls.test_dl(['Gamer good']).dataset[0][0].shape[-1]
    assert n_tokens == 4  # two words and two special tokens
    pred = load_bundle(learn.save_bundle(tmp_path / 'model'))
    np.testing.assert_allclose(pred.predict(stream).scores, learn.predict_batch(stream).scores, atol=1e-5)
    with pytest.raises(FastaiTLError, match='`texts` or `words`'):
        learn.extend_vocab()
    with pytest.raises(FastaiTLError, match='classifiers and language models'):
        tagger(toks).extend_vocab(words=['gamer'])


@pytest.mark.parametrize('make', [ulmfit_classifier, ulmfit_lm])
def test_awd_lstm_reads_new_words(small_tokenizers, tmp_path, make):
    learn = quiet_fit(make(small_tokenizers))
    encoder = learn.model[0].module.encoder if make is ulmfit_classifier else learn.model[0].encoder
    rows = encoder.weight.detach().clone()
    old = logits(learn)
    assert learn.extend_vocab(['a chipset for films'] * 3, min_freq=3, verbose=False)
    vocab = learn.dls.vocab[0] if make is ulmfit_classifier else learn.dls.vocab
    assert len(vocab) == encoder.weight.shape[0] == encoder.num_embeddings and 'chipset' in vocab
    assert torch.equal(encoder.weight[: len(rows)], rows)
    assert (logits(learn)[..., : old.shape[-1]] - old).abs().max() < 1e-6
    quiet_fit(learn)
    learn.save_bundle(tmp_path / 'model')
    loaded = load_bundle(tmp_path / 'model')
    if make is ulmfit_classifier:
        scores = learn.predict_batch(['a chipset was good']).scores
        np.testing.assert_allclose(loaded.predict(['a chipset was good']).scores, scores, atol=1e-5)


# --- updates ---


def rows(labels, seed=0):
    rng = np.random.default_rng(seed)
    chosen = rng.choice(TEXTS, len(labels))
    return pd.DataFrame(dict(text=chosen, label=labels))


@pytest.mark.parametrize('make', [classifier, ulmfit_classifier], ids=['hf', 'awd'])
@pytest.mark.parametrize('anchor', ['l2sp', 'lwf', None])
def test_a_refused_update_loses_nothing(small_tokenizers, make, anchor):
    seed_everything(0)
    learn = quiet_fit(make(small_tokenizers), 2)
    before = {name: w.clone() for name, w in learn.model.state_dict().items()}
    own = learn.dls, learn.opt
    table = rows(['a', 'b', 'c', 'b'] * 5)
    update = learn.update(table, replay=0.5, anchor=anchor, max_drop=0, lr=0.3, epochs=2, verbose=False)
    after = learn.model.state_dict()
    same = all(torch.equal(w, after[name]) for name, w in before.items())
    assert same == (not update.accepted)
    assert ((learn.dls, learn.opt) == own) == (not update.accepted)
    assert set(update.table.index[:2]) == {'old rows', 'new rows'}


def test_an_update_that_stops_with_an_error_loses_nothing(small_tokenizers):
    learn = quiet_fit(classifier(small_tokenizers))
    before = {name: w.clone() for name, w in learn.model.state_dict().items()}
    own = learn.dls, learn.opt

    class Fail(Callback):
        def after_step(self):
            raise RuntimeError('no electricity')

    with learn.added_cbs([Fail()]), pytest.raises(RuntimeError, match='no electricity'):
        learn.update(rows(['a', 'b'] * 8), verbose=False)
    assert all(torch.equal(w, before[name]) for name, w in learn.model.state_dict().items())
    assert (learn.dls, learn.opt) == own


def test_the_table_counts_what_a_loop_counts(small_tokenizers):
    seed_everything(0)
    learn = quiet_fit(classifier(small_tokenizers))
    update = learn.update(rows(['a', 'b', 'c', 'b'] * 5), max_drop=None, verbose=False)
    assert update.accepted
    for part in ('old', 'new'):
        for when in ('before', 'after'):
            ev = update.evaluations[when][part]
            share = sum(p == t for p, t in zip(ev.preds.tolist(), ev.targets.tolist())) / len(ev)
            assert update.table.loc[f'{part} rows', when] == pytest.approx(share)
    assert update.forgetting == pytest.approx(-update.table.change['old rows'])
    assert len(learn.dls.valid_ds) == sum(len(update.evaluations['after'][part]) for part in ('old', 'new'))
    again = learn.evaluate()  # the Learner validates on old and new rows from now on
    assert len(again) == len(learn.dls.valid_ds)


def test_anchors_hold_the_model_back(small_tokenizers):
    distances = {}
    for name, options in dict(none=dict(anchor=None), l2sp=dict(anchor='l2sp', alpha=10.0)).items():
        seed_everything(0)
        learn = classifier(small_tokenizers)
        old = {n: p.detach().clone() for n, p in learn.model.named_parameters()}
        learn.update(rows(['a', 'b', 'c', 'b'] * 5), max_drop=None, verbose=False, lr=1e-2, **options)
        distances[name] = sum((p - old[n]).square().sum().item() for n, p in learn.model.named_parameters())
    assert distances['l2sp'] < 0.5 * distances['none']
    change = {}
    for alpha in (0.0, 50.0):
        seed_everything(0)
        learn = classifier(small_tokenizers)
        old = logits(learn, learn.dls.test_dl(TEXTS)).softmax(1)
        learn.update(rows(['a', 'b', 'c', 'b'] * 5), anchor='lwf', alpha=alpha, max_drop=None, verbose=False, lr=1e-2)
        change[alpha] = (logits(learn, learn.dls.test_dl(TEXTS)).softmax(1) - old).abs().mean().item()
    assert change[50.0] < 0.5 * change[0.0]


class Adjustments(Callback):
    "Keeps the offsets of the last training"

    def before_train(self):
        self.offsets = [cb.offsets.tolist() for cb in self.learn.cbs if isinstance(cb, LogitAdjustment)]


@pytest.mark.parametrize('make', [classifier, ulmfit_classifier], ids=['hf', 'awd'])
def test_old_rows_that_are_not_replayed_are_made_up_for(small_tokenizers, make):
    "The offsets are the logarithms of the shares that were replayed, counted by hand"
    learn = make(small_tokenizers).add_classes(['d'], verbose=False)
    old = pd.Series([item[1] for item in learn.dls.train_ds.items]).value_counts()
    grab = Adjustments()
    with learn.added_cbs(grab):
        update = learn.update(rows(['d'] * 20), replay=0.5, epochs=1, max_drop=None, verbose=False)
        n_replayed = int(update.description.split(' and ')[1].split()[0])
        assert 'anchor: l2sp, lwf' in update.description and n_replayed == round(old.sum() / 2)
        (offsets,) = grab.offsets
        assert offsets[3] == max(offsets)
        kept = np.exp(np.array(offsets[:3]) - offsets[3]) * (old[['a', 'b', 'c']] + 0.5) - 0.5
        assert np.allclose(kept, kept.round(), atol=1e-3) and kept.sum() == pytest.approx(n_replayed, abs=1e-3)
        learn.update(rows(['d'] * 20), adjust=False, epochs=1, max_drop=None, verbose=False)
        assert grab.offsets == []


def test_adjusted_scores_of_one_output_and_of_two_passes(small_tokenizers):
    "One score is that of the second class against the first; losses of further passes are refused"
    one = LogitAdjustment([0.5, 2.0])
    one.learn = type('Learner', (), dict(pred=torch.zeros(3, 1), training=True))()
    one.after_pred()
    assert one.learn.pred.flatten().tolist() == [1.5] * 3
    learn = classifier(small_tokenizers)
    before = {name: w.clone() for name, w in learn.model.state_dict().items()}
    learn.add_cb(FGM())
    with pytest.raises(FastaiTLError, match='in one pass'):
        learn.update(rows(['a', 'b'] * 8), replay=0.5, verbose=False)
    assert all(torch.equal(w, before[name]) for name, w in learn.model.state_dict().items())
    learn.update(rows(['a', 'b'] * 8), replay=0.5, adjust=False, max_drop=None, verbose=False)


@pytest.mark.parametrize('make', [classifier, ulmfit_classifier], ids=['hf', 'awd'])
def test_the_weights_go_a_part_of_the_way(small_tokenizers, make):
    found = {}
    for mix in (1.0, 0.25):
        seed_everything(0)
        learn = make(small_tokenizers).add_classes(['d'], verbose=False)
        old = {name: w.detach().clone() for name, w in learn.model.state_dict().items()}
        learn.update(rows(['d', 'a'] * 10), mix=mix, max_drop=None, verbose=False)
        found[mix] = {name: w.detach().clone() for name, w in learn.model.state_dict().items()}
    moved = 0
    for name, w in old.items():
        if w.is_floating_point():
            assert torch.allclose(found[0.25][name], 0.75 * w + 0.25 * found[1.0][name], atol=1e-6), name
            moved += not torch.equal(w, found[1.0][name])
    assert moved > 5


def test_several_labels_are_updated(small_tokenizers):
    learn = classifier(small_tokenizers, SEVERAL, data='multi').add_classes(['d'], verbose=False)
    table = pd.DataFrame(dict(text=TEXTS, label=[['d'], ['a', 'd']] * (N_ROWS // 2)))
    for anchor in ('lwf', 'l2sp'):
        update = learn.update(table, anchor=anchor, max_drop=None, verbose=False)
    assert update.accepted and 'old a' in update.table.index
    assert len(learn.dls.train_ds) > 20


# --- drift ---


def test_drift_is_what_scipy_says(small_tokenizers):
    from scipy.stats import ks_2samp

    learn = classifier(small_tokenizers)
    new = [text + ' gamer chipset' for text in TEXTS]
    drift = learn.drift(new, reference=TEXTS)
    probs = [learn.predict_batch(texts).probs.max(1) for texts in (TEXTS, new)]
    assert drift.table.p['confidence'] == pytest.approx(ks_2samp(*probs).pvalue, rel=0.2)
    tok = learn.dls.tokenizer
    pieces = [[len(tok.tokenize(text)) / len(text.split()) for text in texts] for texts in (TEXTS, new)]
    assert drift.table.p['pieces a word'] == pytest.approx(ks_2samp(*pieces).pvalue)
    assert drift.found and drift.table.drift['pieces a word']
    assert not learn.drift(TEXTS, reference=TEXTS).found
    p = drift.table.p.sort_values().to_numpy()
    by_hand = np.minimum(np.maximum.accumulate(p * np.arange(len(p), 0, -1)), 1)
    np.testing.assert_allclose(drift.table.p_adjusted.sort_values(), by_hand)


def test_drift_of_an_awd_lstm_counts_unknown_tokens(small_tokenizers):
    learn = ulmfit_classifier(small_tokenizers)
    dl = learn.dls.test_dl(['the film was zyx', 'the film was good'])
    facts = text_facts(learn, dl, None)
    assert facts.unknown.tolist() == [0.25, 0.0]
    drift = learn.drift([text + ' zyx qwv' for text in TEXTS], reference=TEXTS)
    assert drift.found and 'zyx' in drift.words
    assert 'pieces a word' not in drift.table.index


def test_drift_of_values_and_of_several_labels(small_tokenizers):
    from small_learners import VALUES

    values = classifier(small_tokenizers, VALUES, data='value').drift(TEXTS, reference=TEXTS)
    assert list(values.table.index) == ['unknown words', 'pieces a word', 'value'] and not values.found
    several = classifier(small_tokenizers, SEVERAL, data='multi').drift(TEXTS, reference=TEXTS)
    assert len(several.table) == 4 and not several.found
    with pytest.raises(FastaiTLError, match='classifiers and regressions'):
        masked_lm(small_tokenizers).drift(TEXTS)


def test_false_alarms_with_few_texts_and_rare_classes():
    rng = np.random.default_rng(1)

    def draw(n):
        kinds = rng.choice(4, n, p=[0.7, 0.2, 0.08, 0.02])
        table = pd.DataFrame(dict(unknown=rng.binomial(8, 0.03, n) / 8, confidence=rng.beta(6, 1, n)))
        return table.assign(**{f'class {k}': (kinds == k) * 1 for k in range(4)})

    alarms = sum(drift_table(draw(60), draw(25), seed=i).drift.any() for i in range(300))
    assert alarms / 300 <= 0.05
