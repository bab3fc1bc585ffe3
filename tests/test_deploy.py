"""Fast prediction gives the Learner's results; bundles can be loaded in another process, damaged ones raise an error"""

import gc
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from fastcore.all import merge
from fastcore.test import expect_fail
from fastai.text.core import Tokenizer
from fastai.text.data import TextDataLoaders
from fastai.text.learner import text_classifier_learner
from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_clas_config
from fastai_tl.all import *
from fastai_tl.core import DataError, FastaiTLError, RunError, seed_everything
from fastai_tl.files import digest
from repo import ROOT
from small_learners import with_one_output
from transformers import BertConfig, GPT2Config, T5Config

WORDS = ('alpha beta gamma delta epsilon zeta eta theta iota kappa good bad nice awful the of and is was it').split()
EXACT = 1e-5
SIZES = dict(emb_sz=16, n_hid=24, n_layers=2)
FORMAT_1 = Path(__file__).parent/'data'/'bundles_v1'


def make_texts(n, seed=0, longest=40):
    rng = np.random.default_rng(seed)
    return [' '.join(rng.choice(WORDS, rng.integers(1, longest))).capitalize() + '.' for _ in range(n)]


TEXTS = make_texts(60)
PAIRS = list(zip(TEXTS, make_texts(60, 5)))
LABELS = dict(
    classification=['ab'[len(t)%2] for t in TEXTS],
    multilabel=[[c for c in 'abc' if (len(t)+ord(c))%3] or ['a'] for t in TEXTS],
    regression=[len(t)/100 for t in TEXTS])
VALID = [i >= 40 for i in range(60)]


@pytest.fixture(scope='module')
def tok():
    return train_tokenizer(TEXTS, 400)


def bert(tok, **kwargs):
    return BertConfig(vocab_size=len(tok), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                      intermediate_size=48, pad_token_id=tok.pad_token_id, **kwargs)


def small_gpt2(tok, **kwargs):
    return GPT2Config(vocab_size=len(tok), n_embd=16, n_layer=1, n_head=2, n_positions=64, **kwargs)


def classifier_data(tok, texts=TEXTS, labels=LABELS['classification'], **kwargs):
    options = dict(valid=VALID, max_length=32, bs=8, verbose=False)
    return HFTextDataLoaders.from_lists(texts, labels, tok, **{**options, **kwargs})


def hf_learner_for(task, tok, **kwargs):
    seed_everything(1)
    return hf_classifier_learner(classifier_data(tok, labels=LABELS[task], task=task, **kwargs), bert(tok))


def awd_tokens():
    tokens = tokenize_texts_once(TEXTS, progress=False)
    return tokens, texts_vocab(tokens, min_freq=1)


def awd_learner_for(task, backwards=False, y_range=None):
    seed_everything(2)
    tokens, vocab = awd_tokens()
    train, valid = list(range(40)), list(range(40, 60))
    dls = classifier_dls(tokens, LABELS[task], task, train, valid, vocab, bs=8, backwards=backwards)
    n_out = 1 if task == 'regression' else len(dls.vocab[1])
    return awd_classifier_learner(dls, task, n_out, SIZES, y_range=y_range)


def awd_language_model(**kwargs):
    tokens, vocab = awd_tokens()
    return awd_lm_learner(language_model_dls(tokens, vocab, bs=4, seq_len=10, **kwargs), SIZES)


def plain_fastai():
    seed_everything(3)
    df = pd.DataFrame(dict(text=TEXTS, label=LABELS['classification'], valid=VALID))
    columns = dict(text_col='text', label_col='label', valid_col='valid')
    dls = TextDataLoaders.from_df(df, **columns, bs=8, seq_len=20, n_workers=0)
    config = merge(awd_lstm_clas_config, SIZES)
    learn = text_classifier_learner(dls, AWD_LSTM, pretrained=False, seq_len=20, config=config)
    learn.alone_ = True
    return learn


def both_directions():
    return BidirectionalLearner(awd_learner_for('multilabel'), awd_learner_for('multilabel', True))


def pair_learner(tok):
    seed_everything(4)
    return hf_classifier_learner(classifier_data(tok, PAIRS), bert(tok))


LEARNERS_OF = {
    **{f'hf {t}': (lambda tok, t=t: hf_learner_for(t, tok)) for t in LABELS},
    **{f'awd {t}': (lambda tok, t=t: awd_learner_for(t)) for t in LABELS},
    'awd backwards': lambda tok: awd_learner_for('classification', True),
    'awd y_range': lambda tok: awd_learner_for('regression', y_range=(0, 2)),
    'plain fastai': lambda tok: plain_fastai(),
    'both directions': lambda tok: both_directions(),
    'hf pairs': pair_learner}


@pytest.fixture(scope='module', params=list(LEARNERS_OF))
def learn(request, tok):
    res = LEARNERS_OF[request.param](tok)
    for part in getattr(res, 'learners', [res]):
        part.model.train() # as after a fit
    res.texts_ = PAIRS if request.param == 'hf pairs' else make_texts(30, 7, 60)
    return res


def as_item(text):
    "A text as fastai's `test_dl` takes it"
    return list(text) if isinstance(text, tuple) else text


def quiet_preds(learn, items):
    with learn.no_bar():
        return learn.get_preds(dl=learn.dls.test_dl(items))[0]


def reference(learn, texts):
    "Probabilities by `get_preds`"
    if isinstance(learn, BidirectionalLearner):
        probs = learn.get_preds(items=texts)[0]
    elif hasattr(learn, 'alone_'):
        # fastai's own pooling gives other scores for some texts in a batch: up to 3e-3 for the 30 texts of this seed
        probs = torch.cat([quiet_preds(learn, [t]) for t in texts])
    else:
        probs = quiet_preds(learn, [as_item(t) for t in texts])
    return probs.as_subclass(torch.Tensor).numpy().reshape(len(texts), -1)


def assert_close(a, b, atol=EXACT, **kwargs):
    np.testing.assert_allclose(a, b, atol=atol, rtol=0, **kwargs)


# --- prediction ---

def test_equals_get_preds(learn):
    texts = learn.texts_
    want = reference(learn, texts)
    pred = learn.predictor()
    assert_close(pred.predict_proba(texts), want)
    for budget in (1, 64, 10**6):
        assert_close(Predictor(learn, max_tokens=budget).predict_proba(texts), want)
    assert_close(learn.predict_batch(texts).probs, want)
    order = np.random.default_rng(0).permutation(len(texts))
    assert_close(pred.predict_proba([texts[i] for i in order]), want[order])
    assert_close(np.concatenate([pred.predict_proba([t]) for t in texts[:5]]), want[:5])


def test_labels_are_those_of_predict(learn):
    texts = learn.texts_[:4]
    for text, label in zip(texts, learn.predictor().predict(texts).labels):
        with learn.no_bar():
            want = learn.predict(as_item(text))[0]
        if isinstance(label, float):
            assert abs(float(np.ravel(want)[0])-label) < EXACT
        elif isinstance(label, list):
            assert sorted(want) == sorted(label)
        else:
            assert str(want) == str(label)


def test_duplicates_empty_and_streams(learn):
    texts = learn.texts_
    pred = learn.predictor()
    want = pred.predict(texts)
    n_rows, run = [], pred.run
    pred.run = lambda rows: n_rows.append(len(rows)) or run(rows)
    twice = pred.predict_proba([texts[0], texts[1], texts[0]])
    assert np.array_equal(twice, pred.predict_proba([texts[0], texts[1]])[[0, 1, 0]])
    assert n_rows[0] == 2
    assert len(pred.predict([])) == 0
    assert pred.predict([]).labels == []
    assert pred.predict_proba([]).shape == (0, want.probs.shape[1])
    streamed = list(pred.predict_iter(iter(texts), size=7))
    assert_close(np.stack([o.scores for o in streamed]), want.scores)
    assert list(pred.predict_iter([])) == []


def test_threads(learn):
    texts = learn.texts_
    pred = Predictor(learn, cache=5)
    want = pred.predict_proba(texts)
    torch.set_num_threads(1)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda k: (k, pred.predict_proba(texts[k:]+texts[:k])), range(16)))
    for k, probs in results:
        assert_close(probs, np.roll(want, -k, 0))
    assert len(pred.known) == 5


def test_the_first_batches_may_come_in_threads(tok, tmp_path):
    "An engine prepares its model at the first batch, once"
    hf_learner_for('classification', tok).save_bundle(tmp_path/'m')
    want = load_bundle(tmp_path/'m').predict_proba(TEXTS)
    torch.set_num_threads(1)
    for _ in range(5):
        pred = load_bundle(tmp_path/'m')
        with ThreadPoolExecutor(8) as pool:
            parts = list(pool.map(pred.predict_proba, [TEXTS[i::8] for i in range(8)]))
        for i, probs in enumerate(parts):
            assert_close(probs, want[i::8])


BAD_TEXTS = [(['fine', ''], 'row 1'), (['fine', ' \n'], 'row 1'), ([None], 'row 0'), (['a', 3], 'row 1'),
             ('one text', 'Put it into a list'), ([float('nan')], 'row 0')]


@pytest.mark.parametrize('bad,where', BAD_TEXTS)
def test_bad_texts_are_named(tok, bad, where):
    with expect_fail(DataError, where):
        hf_learner_for('classification', tok).predict_batch(bad)


def test_pairs_and_texts_do_not_mix(tok):
    with expect_fail(DataError, 'row 1'):
        hf_learner_for('classification', tok).predict_batch([('a', 'b'), 'c'])
    with expect_fail(DataError, 'row 0'):
        awd_learner_for('classification').predict_batch([('a', 'b')])


def test_a_predictor_stays_as_it_was(tok):
    for learn in (hf_learner_for('classification', tok), awd_learner_for('classification')):
        pred = learn.predictor()
        before = pred.predict_proba(TEXTS[:5])
        with learn.no_bar(), learn.no_logging():
            learn.fit(1, 1e-2)
        assert np.array_equal(pred.predict_proba(TEXTS[:5]), before)
        assert not np.allclose(learn.predict_batch(TEXTS[:5]).probs, before)
        assert learn.model.training is not None
        assert all(p.requires_grad for p in learn.model.parameters())


def test_the_mode_of_the_model_is_left_alone(tok):
    for learn in (hf_learner_for('classification', tok), awd_learner_for('classification')):
        learn.model.train()
        learn.predict_batch(TEXTS[:3])
        learn.predictor().predict(TEXTS[:3])
        assert all(m.training for m in learn.model.modules())


def test_windows_as_the_dataloaders_make_them(tok):
    long = [' '.join(TEXTS[i:i+6]) for i in range(0, 60, 2)]
    labels = ['ab'[i%2] for i in range(30)]
    dls = classifier_data(tok, long, labels, valid=[i >= 20 for i in range(30)], windows=4, max_length=24)
    learn = hf_classifier_learner(dls, bert(tok))
    learn.model.hf.classifier.weight.data *= 100 # far from indifferent
    with learn.no_bar():
        window_probs = learn.get_preds()[0].as_subclass(torch.Tensor)
    want = pool_windows(window_probs, dls.window_rows[1]).numpy()
    assert_close(learn.predictor().predict_proba(long[20:]), want)
    assert_close(reference(learn, long[20:]), want) # new texts are read in windows too
    learn.dls = classifier_data(tok, long, labels, valid=[i >= 20 for i in range(30)], max_length=24)
    assert not np.allclose(want, reference(learn, long[20:]), atol=1e-4) # truncated texts give something else


def test_temperature_and_thresholds(tok):
    learn = hf_learner_for('multilabel', tok)
    probs = reference(learn, TEXTS)
    with learn.no_bar():
        cal = learn.calibrate()
    np.testing.assert_allclose(Predictor(learn, temperature=cal).predict_proba(TEXTS), cal.scaling(probs), atol=EXACT)
    thresholds = [.4, .5, .6]
    assert np.array_equal(Predictor(learn, thresholds=thresholds).predict(TEXTS).preds, probs >= thresholds)
    learn.loss_func.thresh = .45
    with learn.no_bar():
        want = [learn.predict(t)[0] for t in TEXTS[:8]]
    assert [sorted(o) for o in learn.predict_batch(TEXTS[:8]).labels] == [sorted(o) for o in want]
    with expect_fail(FastaiTLError, 'for probabilities'):
        hf_learner_for('regression', tok).predictor(temperature=2.)


def test_one_output_for_two_classes(tok):
    learn = with_one_output(hf_learner_for('classification', tok))
    p = reference(learn, TEXTS)[:,0]
    preds = learn.predict_batch(TEXTS)
    np.testing.assert_allclose(preds.probs, np.c_[1-p, p], atol=EXACT)
    assert preds.labels == [learn.dls.vocab[int(o > .5)] for o in p]


def test_one_output_for_two_classes_in_a_bundle(tok, tmp_path):
    learn = with_one_output(hf_learner_for('classification', tok))
    learn.loss_func.thresh = .4
    learn.save_bundle(tmp_path/'m')
    loaded = load_bundle(tmp_path/'m').predict(TEXTS)
    want = learn.predict_batch(TEXTS)
    assert_close(loaded.probs, want.probs)
    assert loaded.labels == want.labels


def mean_classifier(tok):
    "A BERT whose head reads the mean of all positions"
    from transformers import BertForSequenceClassification
    from transformers.modeling_outputs import SequenceClassifierOutput

    class MeanForSequenceClassification(BertForSequenceClassification):
        def forward(self, input_ids, attention_mask, **kwargs):
            hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            total = (hidden*attention_mask[..., None]).sum(1)
            return SequenceClassifierOutput(logits=self.classifier(total/attention_mask.sum(1, keepdim=True)))

    return MeanForSequenceClassification(bert(tok))


def classifier_configs(tok):
    from transformers import AlbertConfig, DistilBertConfig, RobertaConfig
    small = dict(vocab_size=len(tok), pad_token_id=tok.pad_token_id, num_labels=2)
    layers = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    return dict(
        bert=bert(tok), roberta=RobertaConfig(**small, **layers, max_position_embeddings=66),
        distilbert=DistilBertConfig(**small, dim=32, n_layers=2, n_heads=2, hidden_dim=48),
        gpt2=GPT2Config(**small, n_embd=32, n_layer=2, n_head=2, n_positions=64),
        albert=AlbertConfig(**small, **layers, embedding_size=16), mean=mean_classifier(tok))


def test_the_top_layer_computes_one_position(tok, tmp_path):
    """Where the head reads one position, in each precision and after a bundle

    All positions are computed if the head reads all of them, or if the layers share their weights."""
    dls = classifier_data(tok)
    for name, config in classifier_configs(tok).items():
        seed_everything(1)
        learn = hf_classifier_learner(dls, config)
        pred = learn.predictor()
        assert (pred.engine.one is None) == (name in ('albert', 'mean')), name
        assert_close(pred.predict_proba(TEXTS), reference(learn, TEXTS), err_msg=name)
        assert not any('forward' in vars(m) for m in learn.model.modules()), "the Learner's own model is as it was"
        if name == 'bert':
            check_single_position(learn, pred, tmp_path/'b')


def check_single_position(learn, pred, folder):
    top = pred.engine.model.hf.bert.encoder.layer[-1].output.dense
    n_positions = []
    hook = top.register_forward_hook(lambda m, i, o: n_positions.append(o.shape[1]))
    pred.predict(TEXTS)
    hook.remove()
    assert set(n_positions) == {1}
    for precision in ('bf16', 'int8'):
        assert pred.engine.to_precision(precision).one is not None
        assert pred.engine.one is not None
    learn.save_bundle(folder)
    loaded = load_bundle(folder)
    assert loaded.engine.one is not None
    assert_close(loaded.predict_proba(TEXTS), pred.predict_proba(TEXTS))


@pytest.mark.parametrize('kind', ['hf classification', 'awd classification'])
def test_other_precisions_are_near_and_say_how_near(kind, tok, capsys):
    learn = LEARNERS_OF[kind](tok)
    table = learn.compare_precisions()
    with learn.no_bar():
        loss, accuracy, *_ = learn.validate()
    assert abs(table.accuracy['fp32']-accuracy) < 1e-6
    assert abs(table.loss['fp32']-loss) < 1e-4
    assert (table.texts == 20).all()
    want = learn.predictor().predict_proba(TEXTS)
    for precision in ('bf16', 'int8'):
        pred = learn.predictor(precision)
        is_emulated = pred.precision == 'fp32'
        assert precision in capsys.readouterr().out or is_emulated
        if not is_emulated:
            assert 0 < np.abs(pred.predict_proba(TEXTS)-want).max() < .15
        with expect_fail(FastaiTLError, 'made from float32'):
            pred.engine.to_precision('int8').to_precision('fp32') if is_emulated else Predictor(pred.engine, 'fp32')


def test_other_tasks_are_refused(tok):
    learn = hf_causal_lm_learner(HFCausalLMDataLoaders.from_texts(TEXTS, tok, max_length=16), small_gpt2(tok))
    with expect_fail(FastaiTLError, 'causal_lm'):
        learn.predict_batch(TEXTS)


# --- bundles ---

def test_bundles_on_the_command_line(learn, tmp_path, capsys):
    "`fastai-tl predict BUNDLE texts` prints the Predictor's labels, their probabilities, and the texts"
    from fastai_tl.cli import main
    learn.save_bundle(tmp_path/'b')
    capsys.readouterr()
    texts = make_texts(5, 11)
    if learn.texts_ is PAIRS:
        return
    assert main(['predict', str(tmp_path/'b'), *texts]) == 0
    rows = [line.split('\t') for line in capsys.readouterr().out.splitlines()]
    assert [row[2] for row in rows] == texts
    for (label, share, _), o in zip(rows, learn.predictor().predict(texts)):
        if o.probs is None:
            assert abs(float(label)-o.label) < EXACT
            assert share == ''
            continue
        labels, shares = (o.label, o.confidence) if isinstance(o.label, list) else ([o.label], [o.confidence])
        assert label == ','.join(labels)
        assert share == ','.join(f'{c:.3f}' for c in shares)


def test_bundles_of_other_tasks_on_the_command_line(tok, tmp_path, capsys):
    from fastai_tl.cli import main
    dls = HFCausalLMDataLoaders.from_texts(TEXTS, tok, max_length=16)
    hf_causal_lm_learner(dls, small_gpt2(tok)).save_bundle(tmp_path/'lm')
    assert main(['predict', str(tmp_path/'lm'), 'alpha']) == 1
    assert 'a language model (causal_lm)' in capsys.readouterr().err
    assert main(['predict', str(tmp_path/'none'), 'alpha']) == 1
    assert 'or a bundle' in capsys.readouterr().err


ELSEWHERE = '''
import os, sys, json, warnings, pickle, traceback, torch
warnings.filterwarnings("ignore")
from fastai_tl.deploy.bundle import load_bundle
def _no(*args, **kwargs): raise AssertionError("unpickled")
pickle.load = pickle.loads = torch.load = _no
for line in sys.stdin:
    code, args, out = json.loads(line)
    pid = os.fork()
    if not pid:
        with open(out, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            sys.argv = ["-c", *args]
            try:
                exec(code, dict(sys=sys, json=json))
                sys.stdout.flush()
                os._exit(0)
            except BaseException:
                traceback.print_exc(file=file)
                file.flush()
            finally:
                os._exit(1)
    print(os.waitpid(pid, 0)[1], file=sys.__stderr__, flush=True)
'''


@pytest.fixture(scope='module')
def elsewhere(tmp_path_factory):
    """A function that runs code in another process and returns the JSON that it prints. The process has neither the
    data nor the training code, and refuses to unpickle; it forks for each call, since importing takes seconds"""
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1'}
    folder = tmp_path_factory.mktemp('elsewhere')
    process = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', ELSEWHERE], env=env, text=True, cwd=folder,
                               stdin=subprocess.PIPE, stderr=subprocess.PIPE)

    def run(code, *args):
        process.stdin.write(json.dumps([code, list(map(str, args)), str(folder/'out')])+'\n')
        process.stdin.flush()
        status = process.stderr.readline().strip()
        output = (folder/'out').read_text()
        assert status == '0', (status, output)
        return json.loads(output.strip().splitlines()[-1])

    yield run
    process.stdin.close()
    process.wait(30)


PREDICT = '''
from fastai_tl.deploy.bundle import load_bundle
pred = load_bundle(sys.argv[1])
texts = json.load(open(sys.argv[2]))
preds = pred.predict([tuple(t) if isinstance(t, list) else t for t in texts])
print(json.dumps(dict(probs=preds.probs.tolist(), labels=preds.labels, classes=pred.classes)))
'''


def test_round_trip_in_another_process(learn, elsewhere, tmp_path):
    texts = learn.texts_
    has_classes = learn.predictor().task != 'regression'
    temperature = 1.3 if has_classes else None
    learn.save_bundle(tmp_path/'model', temperature=temperature)
    want = learn.predictor(temperature=temperature).predict(texts)
    (tmp_path/'texts.json').write_text(json.dumps(texts))
    got = elsewhere(PREDICT, tmp_path/'model', tmp_path/'texts.json')
    assert_close(got['probs'], want.probs, 1e-6)
    if has_classes:
        assert got['labels'] == want.labels
    else:
        assert np.allclose(got['labels'], want.labels, atol=1e-6)
    assert {p.suffix for p in (tmp_path/'model').rglob('*')} <= {'.json', '.safetensors', '.txt', '.jinja'}


def dropouts(learn):
    "Names and rates of all dropouts"
    drops = [m for m in learn.model.modules() if 'Drop' in type(m).__name__]
    return [(type(m).__name__, getattr(m, 'p', getattr(m, 'weight_p', getattr(m, 'embed_p', None)))) for m in drops]


def test_a_learner_comes_back_and_trains_on(learn, tmp_path):
    texts = learn.texts_
    learn.save_bundle(tmp_path/'model')
    pred = load_bundle(tmp_path/'model')
    assert_close(reference(pred.learner(), texts), reference(learn, texts))
    if isinstance(learn, BidirectionalLearner):
        return
    again = pred.learner(learn.dls)
    with again.no_bar(), again.no_logging():
        assert abs(again.validate()[0]-learn.validate()[0]) < 1e-5
        before = again.validate()[0]
        again.fit(2, 1e-3)
        assert again.validate()[0] != before
    assert dropouts(again) == dropouts(learn)


def test_wrong_data_are_refused(tok, tmp_path):
    hf_learner_for('classification', tok).save_bundle(tmp_path/'m')
    pred = load_bundle(tmp_path/'m')
    other_tokenizer = train_tokenizer(TEXTS, 300)
    with expect_fail(DataError, 'vocabulary'):
        pred.learner(HFTextDataLoaders.from_lists(TEXTS, LABELS['classification'], other_tokenizer, verbose=False))
    with expect_fail(DataError, 'classes'):
        pred.learner(HFTextDataLoaders.from_lists(TEXTS, ['xy'[i%2] for i in range(60)], tok, verbose=False))


def test_one_direction_is_not_enough_data_for_two(tmp_path):
    both_directions().save_bundle(tmp_path/'m')
    with expect_fail(FastaiTLError, 'its own data'):
        load_bundle(tmp_path/'m').learner(awd_learner_for('multilabel').dls)


def test_the_threshold_of_the_loss_is_kept(tok, tmp_path):
    learn = hf_learner_for('multilabel', tok)
    learn.loss_func.thresh = .45
    learn.save_bundle(tmp_path/'m')
    pred = load_bundle(tmp_path/'m')
    assert pred.predict(TEXTS).labels == learn.predict_batch(TEXTS).labels
    assert pred.learner().loss_func.thresh == .45


@pytest.fixture
def bundle(tok, tmp_path):
    hf_learner_for('classification', tok).save_bundle(tmp_path/'model')
    return tmp_path/'model'


def forge(folder, **changes):
    "Change what a bundle says about itself, and correct its checksum, as an attacker can"
    manifest = json.loads((folder/'bundle.json').read_text())
    manifest.pop('checksum')
    for key, value in changes.items():
        is_part = isinstance(value, dict) and isinstance(manifest.get(key), dict)
        manifest[key] = {**manifest[key], **value} if is_part else value
    (folder/'bundle.json').write_text(json.dumps({**manifest, 'checksum': digest(manifest)}))


def facts(path):
    data = path.read_bytes()
    return dict(size=len(data), checksum=hashlib.blake2b(data, digest_size=16).hexdigest())


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path('pwned'),))


def test_damage_is_found(bundle):
    weights = bundle/'model.safetensors'
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    with expect_fail(RunError, 'model.safetensors: its checksum'):
        load_bundle(bundle)
    weights.write_bytes(data[:-100])
    with expect_fail(RunError, 'bytes instead of'):
        load_bundle(bundle)
    weights.unlink()
    with expect_fail(RunError, 'missing'):
        load_bundle(bundle)


def test_a_changed_setting_is_found(bundle):
    text = (bundle/'bundle.json').read_text()
    (bundle/'bundle.json').write_text(text.replace('"temperature": 1.0', '"temperature": 9.0'))
    with expect_fail(RunError, 'bundle.json: its checksum'):
        load_bundle(bundle)
    (bundle/'bundle.json').write_text('{')
    with expect_fail(FastaiTLError, 'JSON'):
        load_bundle(bundle)
    with expect_fail(RunError, 'no folder'):
        load_bundle(bundle.parent/'nothing')


def test_a_changed_spec_is_found(bundle):
    spec = bundle/'spec.json'
    text = spec.read_text()
    spec.write_text(text.replace('"max_length": 32', '"max_length": 16'))
    with expect_fail(RunError, 'spec.json: its checksum'):
        load_bundle(bundle)
    spec.write_text(text.replace('"version": 1', '"version": 99'))
    forge(bundle, files={'spec.json': facts(spec)})
    with expect_fail(DataError, 'Upgrade fastai_tl'):
        load_bundle(bundle)


@pytest.mark.parametrize('name', ['../secret.json', '/etc/hostname', 'a/../../secret.json', '..\\secret.json'])
def test_no_path_leaves_the_folder(bundle, name):
    (bundle.parent/'secret.json').write_text('{}')
    forge(bundle, files={name: facts(bundle.parent/'secret.json')})
    with expect_fail(RunError, 'inside its folder'):
        load_bundle(bundle)


def test_no_link_leaves_the_folder(bundle):
    config = bundle/'config.json'
    shutil.copy(config, bundle.parent/'config.json')
    config.unlink()
    config.symlink_to(bundle.parent/'config.json')
    with expect_fail(RunError, 'a link'):
        load_bundle(bundle)


UNSAFE_FILES = ['pytorch_model.bin', 'model.pkl', 'training_args.pt', 'modeling.py', 'adapter_config.json']


@pytest.mark.parametrize('name', UNSAFE_FILES)
def test_no_pickle_and_no_code(bundle, name):
    (bundle/name).write_bytes(pickle.dumps(Evil()))
    with expect_fail(RunError, 'nothing else'):
        load_bundle(bundle)
    forge(bundle, files={name: facts(bundle/name)})
    with expect_fail(RunError, 'can hold code'):
        load_bundle(bundle)
    assert not Path('pwned').exists()


def test_a_pickle_under_another_name(bundle):
    (bundle/'model.safetensors').write_bytes(pickle.dumps(Evil()))
    forge(bundle, files={'model.safetensors': facts(bundle/'model.safetensors')})
    with expect_fail(Exception):
        load_bundle(bundle)
    assert not Path('pwned').exists()


def test_remote_code_is_refused(bundle):
    config = json.loads((bundle/'config.json').read_text())
    config['auto_map'] = {'AutoModelForSequenceClassification': 'modeling.Evil'}
    (bundle/'config.json').write_text(json.dumps(config))
    forge(bundle, files={'config.json': facts(bundle/'config.json')})
    with expect_fail(RunError, 'auto_map'):
        load_bundle(bundle)


def test_other_versions(bundle):
    forge(bundle, version=99)
    with expect_fail(RunError, 'Upgrade'):
        load_bundle(bundle)
    forge(bundle, version='1; import os')
    with expect_fail(RunError):
        load_bundle(bundle)


def test_weights_of_another_awd_model(tmp_path):
    awd_learner_for('classification').save_bundle(tmp_path/'a')
    awd_learner_for('multilabel').save_bundle(tmp_path/'b')
    shutil.copy(tmp_path/'b'/'model.safetensors', tmp_path/'a'/'model.safetensors')
    forge(tmp_path/'a', files={'model.safetensors': facts(tmp_path/'a'/'model.safetensors')})
    with expect_fail(RunError, 'weights'):
        load_bundle(tmp_path/'a')


def test_what_a_bundle_cannot_hold(tmp_path):
    learn = awd_learner_for('classification')
    tokenizer = next(f for f in learn.dls.train_ds.tls[0].tfms.fs if isinstance(f, Tokenizer))
    tokenizer.rules = [*tokenizer.rules, lambda s: s.replace('a', 'b')]
    with expect_fail(FastaiTLError, 'Text rules must be those'):
        learn.save_bundle(tmp_path/'m')
    assert list(tmp_path.iterdir()) == [] # nothing is left behind
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'thesis.txt').write_text('x')
    with expect_fail(RunError, 'something else'):
        awd_learner_for('classification').save_bundle(tmp_path/'mine')
    assert (tmp_path/'mine'/'thesis.txt').read_text() == 'x'


def fail(*args):
    raise OSError('disk full')


def test_replacing_a_bundle_is_whole(bundle, tok, monkeypatch):
    before = load_bundle(bundle).predict_proba(TEXTS)
    other = hf_learner_for('classification', tok)
    other.model.hf.classifier.bias.data[0] += 1.
    monkeypatch.setattr('fastai_tl.deploy.manifest._seal', fail)
    with pytest.raises(RunError, match='disk full.*earlier model is unchanged'):
        other.save_bundle(bundle)
    assert np.array_equal(load_bundle(bundle).predict_proba(TEXTS), before)
    assert [p.name for p in bundle.parent.iterdir()] == ['model']
    monkeypatch.undo()
    other.save_bundle(bundle)
    assert not np.allclose(load_bundle(bundle).predict_proba(TEXTS), before)
    assert [p.name for p in bundle.parent.iterdir()] == ['model']


def test_files_have_the_usual_permissions(bundle):
    old = os.umask(0o022)
    os.umask(old)
    assert {oct(p.stat().st_mode & 0o777) for p in bundle.iterdir()} == {oct(0o666 & ~old)}


def test_int8_travels_with_what_it_changes(tok, tmp_path, capsys):
    learn = hf_learner_for('classification', tok)
    learn.save_bundle(tmp_path/'m', precision='int8')
    pred = load_bundle(tmp_path/'m')
    assert pred.precision == 'int8'
    assert 'validation rows' in capsys.readouterr().out
    exact = load_bundle(tmp_path/'m', 'fp32')
    np.testing.assert_allclose(exact.predict_proba(TEXTS), reference(learn, TEXTS), atol=EXACT)
    learn.save_bundle(tmp_path/'m')
    with expect_fail(RunError, 'a look'):
        load_bundle(tmp_path/'m', 'int8')


def test_transformers_reads_it_too(bundle):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    model = AutoModelForSequenceClassification.from_pretrained(bundle).eval()
    tokenizer = AutoTokenizer.from_pretrained(bundle)
    pred = load_bundle(bundle)
    inputs = tokenizer(TEXTS, truncation=True, max_length=32, padding=True, return_tensors='pt')
    with torch.no_grad():
        logits = model(**inputs).logits.numpy()
    np.testing.assert_allclose(pred.scores(TEXTS), logits, atol=EXACT)
    assert list(model.config.id2label.values()) == pred.classes


# --- loading is: read the spec, make the model, read the weights ---

PACKAGE = str(ROOT/'fastai_tl')
PROTOCOL = ('__len__', 'setup') # methods of data sets and transforms that DataLoaders of fastai call


def module_numbers():
    "The number of each module's notebook"
    from repo import notebooks
    return {nb.module: nb.number for nb in notebooks() if nb.module}


def calls(f):
    "Calls within the package while `f` runs: (module that calls or `None`, module that is called)"
    steps = []

    def module(frame):
        path = frame.f_code.co_filename
        return path[len(PACKAGE)+1:-3].replace(os.sep, '.') if path.startswith(PACKAGE) else None

    def record(frame, event, arg):
        if event != 'call' or module(frame) is None or frame.f_code.co_name in PROTOCOL:
            return
        caller = frame.f_back
        while caller is not None and module(caller) is None:
            caller = caller.f_back
        steps.append((None if caller is None else module(caller), module(frame)))

    gc.collect()
    gc.disable() # no finalizer of an object of another test
    sys.setprofile(record)
    try:
        f()
    finally:
        sys.setprofile(None)
        gc.enable()
    return steps


def test_loading_enters_few_modules_and_never_goes_back_up(learn, tmp_path):
    learn.save_bundle(tmp_path/'m')
    load_bundle(tmp_path/'m') # imports all libraries
    steps = calls(lambda: load_bundle(tmp_path/'m'))
    entered = {module for _, module in steps}
    assert 'deploy.bundle' in entered
    assert len(entered - {'arguments'}) <= 12, sorted(entered) # that one checks the values of arguments everywhere
    numbers = module_numbers()
    assert not [(a, b) for a, b in steps if a not in (None, 'arguments') and numbers[a] < numbers[b]]


@pytest.mark.parametrize('name', ['awd_lm', 'hf_causal_lm', 'hf_tagging', 'hf_qa'])
def test_loading_a_learner_never_goes_back_up(name):
    load_bundle(FORMAT_1/name)
    steps = calls(lambda: load_bundle(FORMAT_1/name))
    numbers = module_numbers()
    ups = [(a, b) for a, b in steps if a not in (None, 'arguments') and numbers[a] < numbers[b]]
    assert steps and not ups


# --- bundles of format 1 ---

WANTED = json.loads((FORMAT_1/'predictions.json').read_text(encoding='utf-8'))
CLASSIFIERS = [name for name, o in WANTED.items() if 'labels' in o]
LANGUAGE_MODELS = [name for name, o in WANTED.items() if 'perplexity' in o]


def check_predictions(pred, want):
    texts = [tuple(t) if isinstance(t, list) else t for t in want['texts']]
    preds = pred.predict(texts)
    assert pred.classes == want['classes']
    if want['classes'] is not None:
        assert preds.labels == want['labels']
    assert_close(preds.probs, want['probs'])
    np.testing.assert_allclose(preds.scores, want['scores'], rtol=1e-5, atol=EXACT)


@pytest.mark.parametrize('name', CLASSIFIERS)
def test_format_1_predicts_the_same(name, tmp_path):
    "As it is, after it is written again in the present format, and as a Learner"
    pred = load_bundle(FORMAT_1/name, precision='fp32')
    check_predictions(pred, WANTED[name])
    learn = pred.learner()
    temperature, thresholds = pred.temperature, pred.thresholds
    learn.save_bundle(tmp_path/'m', temperature=temperature, thresholds=thresholds)
    assert json.loads((tmp_path/'m'/'bundle.json').read_text())['version'] == 2
    check_predictions(load_bundle(tmp_path/'m'), WANTED[name])
    if temperature == 1:
        assert_close(reference(learn, WANTED[name]['texts'][:1]), WANTED[name]['probs'][:1])


def test_format_1_keeps_its_precision_and_what_it_changes(capsys):
    pred = load_bundle(FORMAT_1/'hf_classification')
    assert pred.precision == 'int8'
    assert 'validation rows' in capsys.readouterr().out
    assert list(pred.change.index) == ['fp32', 'int8']


def test_format_1_taggers():
    want = WANTED['hf_tagging']
    learn = load_bundle(FORMAT_1/'hf_tagging')
    with learn.no_bar():
        probs = learn.word_probs(want['words'])
    for ours, theirs in zip(probs, want['probs']):
        assert_close(ours, theirs)
    assert [o.tags for o in learn.tag(want['texts'])] == want['tags']


def test_format_1_question_answering():
    want = WANTED['hf_qa']
    learn = load_bundle(FORMAT_1/'hf_qa')
    with learn.no_bar():
        answers = learn.answers(list(zip(want['questions'], want['passages'])))
    assert [o.text for o in answers] == want['answers']
    assert [o.start for o in answers] == want['starts']
    assert_close([o.score for o in answers], want['scores'])


@pytest.mark.parametrize('name', LANGUAGE_MODELS)
def test_format_1_language_models(name):
    want = WANTED[name]
    learn = load_bundle(FORMAT_1/name)
    assert abs(learn.perplexity(want['texts']).corpus['perplexity']/want['perplexity']-1) < 1e-5
    prompt, n = ('alpha beta', 5) if name == 'hf_causal_lm' else ('alpha', 6)
    assert learn.generate(prompt, max_new_tokens=n, do_sample=False)[0].text == want['generated']


# --- bundles of other tasks ---

LANGUAGE_MODEL = '''
from fastai_tl.all import *
learn = load_bundle(sys.argv[1])
perplexity = learn.perplexity(json.loads(sys.argv[2])).corpus["perplexity"]
print(json.dumps(dict(perplexity=perplexity, text=learn.generate("alpha", max_new_tokens=6)[0].text)))
'''


def test_awd_language_models(elsewhere, tmp_path):
    for backwards in (False, True):
        learn = awd_language_model(backwards=backwards)
        learn.save_bundle(tmp_path/'lm')
        perplexity = learn.perplexity(TEXTS[:5]).corpus['perplexity']
        got = elsewhere(LANGUAGE_MODEL, tmp_path/'lm', json.dumps(TEXTS[:5]))
        assert got['text'] == learn.generate('alpha', max_new_tokens=6)[0].text
        assert abs(got['perplexity']/perplexity-1) < 1e-5


def test_tied_weights_are_written_once(tmp_path):
    from safetensors import safe_open
    learn = awd_language_model()
    learn.save_bundle(tmp_path/'lm')
    with safe_open(str(tmp_path/'lm'/'model.safetensors'), 'pt') as f:
        n = sum(f.get_tensor(key).numel() for key in f.keys())
    assert n == sum(p.numel() for p in learn.model.parameters())
    again = load_bundle(tmp_path/'lm').model
    assert again[1].decoder.weight is again[0].encoder.weight


def test_tagger(tok, tmp_path):
    words = [t.lower().rstrip('.').split() for t in TEXTS]
    tags = [['B-X' if w in ('good', 'bad') else 'O' for w in sentence] for sentence in words]
    dls = HFTagDataLoaders.from_lists(words, tags, tok, max_length=32, bs=8, verbose=False)
    learn = hf_tagger_learner(dls, bert(tok))
    learn.save_bundle(tmp_path/'m')
    again = load_bundle(tmp_path/'m')
    with learn.no_bar(), again.no_bar():
        a, b = learn.word_probs(words[:5]), again.word_probs(words[:5])
    for x, y in zip(a, b):
        np.testing.assert_allclose(x, y, atol=EXACT)
    assert [o.tags for o in learn.tag(TEXTS[:3])] == [o.tags for o in again.tag(TEXTS[:3])]


def test_question_answering(tok, tmp_path):
    passages = [t for t in TEXTS if len(t.split()) > 3][:40]
    questions = ['who is it']*40
    answers = [t.split()[1] for t in passages]
    starts = [len(t.split()[0])+1 for t in passages]
    dls = HFQADataLoaders.from_lists(questions, passages, answers, tok, starts=starts, max_length=40, stride=8, bs=8,
                                     verbose=False)
    learn = hf_qa_learner(dls, bert(tok))
    learn.save_bundle(tmp_path/'m')
    again = load_bundle(tmp_path/'m')
    asked = list(zip(questions, passages))[:6]
    with learn.no_bar(), again.no_bar():
        a, b = learn.answers(asked), again.answers(asked)
    assert [(o.text, o.start) for o in a] == [(o.text, o.start) for o in b]
    np.testing.assert_allclose([o.score for o in a], [o.score for o in b], atol=EXACT)


def test_language_models_of_transformers(tok, tmp_path):
    config = small_gpt2(tok, bos_token_id=0, eos_token_id=0)
    gpt = hf_causal_lm_learner(HFCausalLMDataLoaders.from_texts(TEXTS, tok, max_length=16), config)
    gpt.save_bundle(tmp_path/'gpt')
    again = load_bundle(tmp_path/'gpt')
    a, b = (learn.generate('alpha beta', max_new_tokens=5)[0].text for learn in (again, gpt))
    assert a == b
    a, b = (learn.perplexity(TEXTS[:4]).corpus['perplexity'] for learn in (again, gpt))
    assert abs(a/b-1) < 1e-5
    mlm = hf_masked_lm_learner(HFMaskedLMDataLoaders.from_texts(TEXTS, tok, max_length=16), bert(tok))
    mlm.save_bundle(tmp_path/'mlm')
    again = load_bundle(tmp_path/'mlm')
    np.testing.assert_allclose(again.predict('alpha [MASK]')[2], mlm.predict('alpha [MASK]')[2], atol=EXACT)


def test_seq2seq(tmp_path):
    tok = train_tokenizer(TEXTS, 400, kind='seq2seq')
    lengths = dict(max_length=24, max_target_length=12)
    dls = HFSeq2SeqDataLoaders.from_lists(TEXTS, TEXTS[::-1], tok, **lengths, bs=8, verbose=False)
    config = T5Config(vocab_size=len(tok), d_model=16, d_ff=32, num_layers=1, num_heads=2, d_kv=8)
    learn = hf_seq2seq_learner(dls, config)
    learn.save_bundle(tmp_path/'m')
    again = load_bundle(tmp_path/'m')
    assert again.generate_texts(TEXTS[:3]) == learn.generate_texts(TEXTS[:3])
    assert again.dls.max_target_length == 12


def test_peft_is_merged(tok, tmp_path):
    peft = pytest.importorskip('peft')
    config = peft.LoraConfig(r=2, target_modules=['query', 'value'], init_lora_weights=False)
    learn = hf_classifier_learner(classifier_data(tok), bert(tok), peft_config=config)
    learn.save_bundle(tmp_path/'m')
    assert not list((tmp_path/'m').glob('adapter*'))
    np.testing.assert_allclose(load_bundle(tmp_path/'m').predict_proba(TEXTS), reference(learn, TEXTS), atol=1e-4)


@pytest.mark.parametrize('slow', ['fp32', 'int8'])
def test_auto_takes_int8_only_where_it_is_faster(slow, tok, tmp_path, monkeypatch):
    "The seconds are set here: one precision takes ten times as long"
    learn = hf_learner_for('classification', tok)
    learn.save_bundle(tmp_path/'m', precision='int8')
    learn.save_bundle(tmp_path/'exact')
    monkeypatch.setattr('fastai_tl.deploy.predictor._timed_run',
                        lambda predictor, rows: (predictor.run(rows), 10. if predictor.precision == slow else 1.))
    fast = dict(fp32='int8', int8='fp32')[slow]
    engine = engine_of(learn)
    chosen, table = fastest_precision(engine, engine.encode(TEXTS), ['int8'], seconds=0)
    assert chosen == fast
    assert table.ratio.to_dict() == dict(fp32=1, int8=dict(fp32=10, int8=.1)[slow])
    pred = load_bundle(tmp_path/'m', 'auto', verbose=False)
    assert pred.precision == fast
    assert (pred.change is None) == (fast == 'fp32')
    assert load_bundle(tmp_path/'exact', 'auto').precision == 'fp32'


def test_auto_needs_a_comparison_for_int8_and_pytorch(tok, tmp_path):
    learn = hf_learner_for('classification', tok)
    assert learn.predictor('auto', check=0).precision != 'int8'
    assert learn.predictor('auto', engine='onnx', verbose=False).precision in ('fp32', 'int8')
    learn.save_bundle(tmp_path/'m')
    with expect_fail(FastaiTLError, 'auto'):
        load_bundle(tmp_path/'m', 'auto', engine='onnx')
    with expect_fail(DataError, 'Rows'):
        fastest_precision(engine_of(learn), [])


@pytest.mark.parametrize('make', ['fastai', 'ours'])
def test_new_texts_have_the_tokens_of_training_texts(make):
    "spaCy makes one token of a control character and the space after it; in training, the space becomes ▁"
    texts = ['a film \x85 that is good', 'a bad one\x85 yes', 'the plot \x96 it is fine \x85 oh'] * 4
    labels = ['a', 'b', 'a'] * 4
    if make == 'ours':
        tokens = tokenize_texts_once(texts)
        vocab = texts_vocab(tokens, 1)
        dls = classifier_dls(tokens, labels, 'classification', [*range(8)], [*range(8, 12)], vocab, bs=4)
        learn = awd_classifier_learner(dls, 'classification', 2, SIZES)
        rows = learn.dls.test_dl(texts[:3]).dataset
        assert [x[0].tolist() for x in rows] == [x[0].tolist() for x in dls.train_ds][:3]
    else:
        df = pd.DataFrame(dict(text=texts, label=labels, valid=[False] * 8 + [True] * 4))
        columns = dict(text_col='text', label_col='label', valid_col='valid')
        dls = TextDataLoaders.from_df(df, **columns, bs=4, text_vocab=None, n_workers=0)
        learn = text_classifier_learner(dls, AWD_LSTM, pretrained=False, config=merge(awd_lstm_clas_config, SIZES))
    encoded = engine_of(learn).encode(texts[:3])
    assert [row.tolist() for row in encoded] == [x[0].tolist() for x in dls.train_ds][:3]
