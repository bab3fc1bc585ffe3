"Fast prediction gives what the Learner gives; bundles come back whole in another process, and not at all when something is wrong with them."

import hashlib,json,os,pickle,shutil,subprocess,sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from fastcore.all import merge
from fastcore.test import expect_fail
from fastai.losses import BCEWithLogitsLossFlat
from fastai.text.core import Tokenizer
from fastai.text.data import TextDataLoaders
from fastai.text.learner import text_classifier_learner
from fastai.text.models.awdlstm import AWD_LSTM,awd_lstm_clas_config
from fastai_tl.all import *
from fastai_tl.core import DataError, FastaiTLError, RunError, seed_everything
from fastai_tl.files import digest
from repo import ROOT
from transformers import BertConfig,GPT2Config,T5Config

WORDS = 'alpha beta gamma delta epsilon zeta eta theta iota kappa good bad nice awful the of and is was it'.split()
EXACT = 1e-5


def make_texts(n, seed=0, longest=40):
    rng = np.random.default_rng(seed)
    return [' '.join(rng.choice(WORDS, rng.integers(1, longest))).capitalize()+'.' for _ in range(n)]


TEXTS = make_texts(60)
LABELS = {'classification': ['ab'[len(t)%2] for t in TEXTS], 'multilabel': [[c for c in 'abc' if (len(t)+ord(c))%3] or ['a'] for t in TEXTS], 'regression': [len(t)/100 for t in TEXTS]}
VALID = [i>=40 for i in range(60)]


@pytest.fixture(scope='module')
def tok(): return train_tokenizer(TEXTS, 400)


def bert(tok, **kw): return BertConfig(vocab_size=len(tok), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, pad_token_id=tok.pad_token_id, **kw)


def hf_learner_for(task, tok, **kw):
    seed_everything(1)
    dls = HFTextDataLoaders.from_lists(TEXTS, LABELS[task], tok, valid=VALID, task=task, max_length=32, bs=8, verbose=False, **kw)
    return hf_classifier_learner(dls, bert(tok))


def awd_learner_for(task, backwards=False, y_range=None):
    seed_everything(2)
    tokens = tokenize_texts_once(TEXTS, progress=False); vocab = texts_vocab(tokens, min_freq=1)
    dls = classifier_dls(tokens, LABELS[task], task, list(range(40)), list(range(40, 60)), vocab, bs=8, backwards=backwards)
    return awd_classifier_learner(dls, task, 1 if task=='regression' else len(dls.vocab[1]), dict(emb_sz=16, n_hid=24, n_layers=2), y_range=y_range)


def plain_fastai():
    seed_everything(3)
    df = pd.DataFrame(dict(text=TEXTS, label=LABELS['classification'], valid=VALID))
    dls = TextDataLoaders.from_df(df, text_col='text', label_col='label', valid_col='valid', bs=8, seq_len=20, n_workers=0)
    learn = text_classifier_learner(dls, AWD_LSTM, pretrained=False, seq_len=20, config=merge(awd_lstm_clas_config, dict(emb_sz=16, n_hid=24, n_layers=2)))
    learn.alone_ = True
    return learn


def pair_learner(tok):
    seed_everything(4)
    dls = HFTextDataLoaders.from_lists(PAIRS, LABELS['classification'], tok, valid=VALID, max_length=32, bs=8, verbose=False)
    return hf_classifier_learner(dls, bert(tok))


PAIRS = list(zip(TEXTS, make_texts(60, 5)))
LEARNERS_OF = {**{f'hf {t}': (lambda tok, t=t: hf_learner_for(t, tok)) for t in LABELS}, **{f'awd {t}': (lambda tok, t=t: awd_learner_for(t)) for t in LABELS},
               'awd backwards': lambda tok: awd_learner_for('classification', True), 'awd y_range': lambda tok: awd_learner_for('regression', y_range=(0, 2)), 'plain fastai': lambda tok: plain_fastai(),
               'both directions': lambda tok: BidirectionalLearner(awd_learner_for('multilabel'), awd_learner_for('multilabel', True)), 'hf pairs': pair_learner}


@pytest.fixture(scope='module', params=list(LEARNERS_OF))
def learn(request, tok):
    res = LEARNERS_OF[request.param](tok)
    for l in getattr(res, 'learners', [res]): l.model.train()   # as after a fit
    res.texts_ = PAIRS if request.param == 'hf pairs' else make_texts(30, 7, 60)
    return res


def reference(learn, texts):
    if isinstance(learn, BidirectionalLearner): p = learn.get_preds(items=texts)[0]
    elif hasattr(learn, 'alone_'):                         # of the seed's 30 texts, fastai's own answer for one in a batch differs by 3e-3 from its answer for that text alone, which is ours
        with learn.no_bar(): p = torch.cat([learn.get_preds(dl=learn.dls.test_dl([t]))[0] for t in texts])
    else:
        with learn.no_bar(): p = learn.get_preds(dl=learn.dls.test_dl([list(t) if isinstance(t, tuple) else t for t in texts]))[0]
    return p.as_subclass(torch.Tensor).numpy().reshape(len(texts), -1)


# --- prediction ---

def test_equals_get_preds(learn):
    ts = learn.texts_; ref = reference(learn, ts)
    pred = learn.predictor()
    for budget in (None, 1, 64, 10**6):
        p = pred if budget is None else Predictor(learn, max_tokens=budget)
        np.testing.assert_allclose(p.predict_proba(ts), ref, atol=EXACT, rtol=0)
    np.testing.assert_allclose(learn.predict_batch(ts).probs, ref, atol=EXACT, rtol=0)
    order = np.random.default_rng(0).permutation(len(ts))
    np.testing.assert_allclose(pred.predict_proba([ts[i] for i in order]), ref[order], atol=EXACT, rtol=0)
    np.testing.assert_allclose(np.concatenate([pred.predict_proba([t]) for t in ts[:5]]), ref[:5], atol=EXACT, rtol=0)


def test_labels_are_those_of_predict(learn):
    ts = learn.texts_[:4]
    for t,label in zip(ts, learn.predictor().predict(ts).labels):
        with learn.no_bar(): want = learn.predict(list(t) if isinstance(t, tuple) else t)[0]
        if isinstance(label, float): assert abs(float(np.ravel(want)[0])-label) < EXACT
        else: assert (sorted(want) if isinstance(label, list) else str(want)) == (sorted(label) if isinstance(label, list) else str(label))


def test_duplicates_empty_and_streams(learn):
    ts = learn.texts_; pred = learn.predictor(); p = pred.predict(ts)
    rows = []; run = pred.run; pred.run = lambda r: rows.append(len(r)) or run(r)
    assert np.array_equal(pred.predict_proba([ts[0], ts[1], ts[0]]), pred.predict_proba([ts[0], ts[1]])[[0, 1, 0]]) and rows[0] == 2
    assert len(pred.predict([])) == 0 and pred.predict([]).labels == [] and pred.predict_proba([]).shape == (0, p.probs.shape[1])
    got = list(pred.predict_iter(iter(ts), size=7))
    np.testing.assert_allclose(np.stack([g.scores for g in got]), p.scores, atol=EXACT, rtol=0)
    assert list(pred.predict_iter([])) == []


def test_threads(learn):
    ts = learn.texts_; pred = Predictor(learn, cache=5); ref = pred.predict_proba(ts)
    torch.set_num_threads(1)
    with ThreadPoolExecutor(4) as ex: res = list(ex.map(lambda k: (k, pred.predict_proba(ts[k:]+ts[:k])), range(16)))
    for k,p in res: np.testing.assert_allclose(p, np.roll(ref, -k, 0), atol=EXACT, rtol=0)
    assert len(pred.known) == 5


@pytest.mark.parametrize('bad,where', [(['fine', ''], 'row 1'), (['fine', ' \n'], 'row 1'), ([None], 'row 0'), (['a', 3], 'row 1'), ('one text', 'Put it into a list'), ([float('nan')], 'row 0')])
def test_bad_texts_are_named(tok, bad, where):
    with expect_fail(DataError, where): hf_learner_for('classification', tok).predict_batch(bad)


def test_pairs_and_texts_do_not_mix(tok):
    with expect_fail(DataError, 'row 1'): hf_learner_for('classification', tok).predict_batch([('a', 'b'), 'c'])
    with expect_fail(DataError, 'row 0'): awd_learner_for('classification').predict_batch([('a', 'b')])


def test_a_predictor_stays_as_it_was(tok):
    for learn in (hf_learner_for('classification', tok), awd_learner_for('classification')):
        pred = learn.predictor(); before = pred.predict_proba(TEXTS[:5])
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
        assert np.array_equal(pred.predict_proba(TEXTS[:5]), before) and not np.allclose(learn.predict_batch(TEXTS[:5]).probs, before)
        assert learn.model.training is not None and all(p.requires_grad for p in learn.model.parameters())


def test_the_mode_of_the_model_is_left_alone(tok):
    for learn in (hf_learner_for('classification', tok), awd_learner_for('classification')):
        learn.model.train(); learn.predict_batch(TEXTS[:3]); learn.predictor().predict(TEXTS[:3])
        assert all(m.training for m in learn.model.modules())


def test_windows_as_the_dataloaders_make_them(tok):
    long = [' '.join(TEXTS[i:i+6]) for i in range(0, 60, 2)]; labels = ['ab'[i%2] for i in range(30)]
    dls = HFTextDataLoaders.from_lists(long, labels, tok, valid=[i>=20 for i in range(30)], windows=4, max_length=24, bs=8, verbose=False)
    learn = hf_classifier_learner(dls, bert(tok)); learn.model.hf.classifier.weight.data *= 100   # far from indifferent
    with learn.no_bar(): want = pool_windows(learn.get_preds()[0].as_subclass(torch.Tensor), dls.window_rows[1]).numpy()
    np.testing.assert_allclose(learn.predictor().predict_proba(long[20:]), want, atol=EXACT, rtol=0)
    assert not np.allclose(want, reference(learn, long[20:]), atol=1e-4)    # windows see what cutting short does not


def test_temperature_and_thresholds(tok):
    learn = hf_learner_for('multilabel', tok); ref = reference(learn, TEXTS)
    with learn.no_bar(): cal = learn.calibrate()
    p = Predictor(learn, temperature=cal)
    np.testing.assert_allclose(p.predict_proba(TEXTS), cal.scaling(ref), atol=EXACT)
    th = [.4, .5, .6]
    assert np.array_equal(Predictor(learn, thresholds=th).predict(TEXTS).preds, ref >= th)
    learn.loss_func.thresh = .45
    with learn.no_bar(): want = [learn.predict(t)[0] for t in TEXTS[:8]]
    assert [sorted(o) for o in learn.predict_batch(TEXTS[:8]).labels] == [sorted(o) for o in want]
    with expect_fail(FastaiTLError, 'for probabilities'): hf_learner_for('regression', tok).predictor(temperature=2.)


def test_one_output_for_two_classes(tok):
    learn = hf_learner_for('classification', tok)
    dls = learn.dls; hf = hf_classifier_learner(dls, bert(tok)).model.hf
    hf.config.num_labels = 1; hf.num_labels = 1; hf.classifier = torch.nn.Linear(32, 1)
    one = HFLearner(dls, HFModel(hf), loss_func=BCEWithLogitsLossFlat())
    p = reference(one, TEXTS)[:,0]; got = one.predict_batch(TEXTS)
    np.testing.assert_allclose(got.probs, np.c_[1-p, p], atol=EXACT); assert got.labels == [dls.vocab[int(o > .5)] for o in p]


def test_the_top_layer_computes_one_position(tok, tmp_path):
    "Where the head reads one, in each precision and after a bundle; a model whose head reads all, and one whose layers cannot be told apart, compute in full"
    from transformers import AlbertConfig, BertForSequenceClassification, DistilBertConfig, RobertaConfig
    class MeanForSequenceClassification(BertForSequenceClassification):
        def forward(self, input_ids, attention_mask, **kw):
            h = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state*attention_mask[..., None]
            return SequenceClassifierOutput(logits=self.classifier(h.sum(1)/attention_mask.sum(1, keepdim=True)))
    from transformers.modeling_outputs import SequenceClassifierOutput
    small = dict(vocab_size=len(tok), pad_token_id=tok.pad_token_id, num_labels=2)
    layers = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    dls = HFTextDataLoaders.from_lists(TEXTS, LABELS['classification'], tok, valid=VALID, max_length=32, bs=8, verbose=False)
    configs = dict(bert=bert(tok), roberta=RobertaConfig(**small, **layers, max_position_embeddings=66), distilbert=DistilBertConfig(**small, dim=32, n_layers=2, n_heads=2, hidden_dim=48),
                   gpt2=GPT2Config(**small, n_embd=32, n_layer=2, n_head=2, n_positions=64), albert=AlbertConfig(**small, **layers, embedding_size=16), mean=MeanForSequenceClassification(bert(tok)))
    for name,config in configs.items():
        seed_everything(1)
        learn = hf_classifier_learner(dls, config); pred = learn.predictor()
        assert (pred.engine.one is None) == (name in ('albert', 'mean')), name
        np.testing.assert_allclose(pred.predict_proba(TEXTS), reference(learn, TEXTS), atol=EXACT, rtol=0, err_msg=name)
        assert not any('forward' in vars(m) for m in learn.model.modules()), "the Learner's own model is as it was"
        if name != 'bert': continue
        top, rows = pred.engine.model.hf.bert.encoder.layer[-1].output.dense, []
        hook = top.register_forward_hook(lambda m, i, o: rows.append(o.shape[1])); pred.predict(TEXTS); hook.remove()
        assert set(rows) == {1}
        for p in ('bf16', 'int8'): assert pred.engine.to_precision(p).one is not None and pred.engine.one is not None
        learn.save_bundle(tmp_path/'b'); loaded = load_bundle(tmp_path/'b')
        assert loaded.engine.one is not None
        np.testing.assert_allclose(loaded.predict_proba(TEXTS), pred.predict_proba(TEXTS), atol=EXACT, rtol=0)


@pytest.mark.parametrize('kind', ['hf classification', 'awd classification'])
def test_other_precisions_are_near_and_say_how_near(kind, tok, capsys):
    learn = LEARNERS_OF[kind](tok)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2)
    t = learn.compare_precisions()
    with learn.no_bar(): loss,acc,*_ = learn.validate()
    assert abs(t.accuracy['fp32']-acc) < 1e-6 and abs(t.loss['fp32']-loss) < 1e-4 and (t.texts == 20).all()
    ref = learn.predictor().predict_proba(TEXTS)
    for p in ('bf16', 'int8'):
        q = learn.predictor(p)
        assert p in capsys.readouterr().out or q.precision == 'fp32'
        if q.precision == p: assert 0 < np.abs(q.predict_proba(TEXTS)-ref).max() < .15
        with expect_fail(FastaiTLError, 'made from float32'): Predictor(q.engine, 'fp32') if q.precision == p else q.engine.to_precision('int8').to_precision('fp32')


def test_other_tasks_are_refused(tok):
    dls = HFCausalLMDataLoaders.from_texts(TEXTS, tok, max_length=16)
    learn = hf_causal_lm_learner(dls, GPT2Config(vocab_size=len(tok), n_embd=16, n_layer=1, n_head=2, n_positions=64))
    with expect_fail(FastaiTLError, 'causal_lm'): learn.predict_batch(TEXTS)


# --- bundles ---

def test_bundles_on_the_command_line(learn, tmp_path, capsys):
    "`fastai-tl predict BUNDLE texts` prints what the Predictor says: labels, their probabilities, the text"
    from fastai_tl.cli import main
    learn.save_bundle(tmp_path/'b'); capsys.readouterr()
    ts = make_texts(5, 11)
    if learn.texts_ is not PAIRS:
        assert main(['predict', str(tmp_path/'b'), *ts]) == 0
        rows = [l.split('\t') for l in capsys.readouterr().out.splitlines()]
        want = learn.predictor().predict(ts)
        assert [r[2] for r in rows] == ts
        for (label, share, _), o in zip(rows, want):
            if o.probs is None: assert abs(float(label)-o.label) < EXACT and share == ''; continue
            labels, shares = (o.label, o.confidence) if isinstance(o.label, list) else ([o.label], [o.confidence])
            assert label == ','.join(labels) and share == ','.join(f'{c:.3f}' for c in shares)


def test_bundles_of_other_tasks_on_the_command_line(tok, tmp_path, capsys):
    from fastai_tl.cli import main
    dls = HFCausalLMDataLoaders.from_texts(TEXTS, tok, max_length=16)
    hf_causal_lm_learner(dls, GPT2Config(vocab_size=len(tok), n_embd=16, n_layer=1, n_head=2, n_positions=64)).save_bundle(tmp_path/'lm')
    assert main(['predict', str(tmp_path/'lm'), 'alpha']) == 1 and 'must hold a classifier or a regression' in capsys.readouterr().err
    assert main(['predict', str(tmp_path/'none'), 'alpha']) == 1 and 'or a bundle' in capsys.readouterr().err


def elsewhere(code, *args):
    "What a fresh process prints, as JSON; it has neither the data nor the training code, and refuses to unpickle"
    pre = 'import sys,json,warnings; warnings.filterwarnings("ignore")\nimport pickle; import torch\n' \
          'def _no(*a, **k): raise AssertionError("unpickled")\npickle.load = pickle.loads = torch.load = _no\n'
    res = subprocess.run([sys.executable, '-c', pre+code, *map(str, args)], capture_output=True, text=True, cwd=Path(args[0]).parent, env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1'})
    assert res.returncode == 0, res.stderr
    return json.loads(res.stdout.strip().splitlines()[-1])


def test_round_trip_in_another_process(learn, tmp_path):
    ts = learn.texts_; multi = learn.predictor().task != 'regression'
    learn.save_bundle(tmp_path/'model', temperature=1.3 if multi else None)
    want = learn.predictor(temperature=1.3 if multi else None).predict(ts)
    (tmp_path/'texts.json').write_text(json.dumps(ts))
    got = elsewhere('from fastai_tl.deploy.bundle import load_bundle\np = load_bundle(sys.argv[1])\nts = json.load(open(sys.argv[2]))\n'
                    'r = p.predict([tuple(t) if isinstance(t, list) else t for t in ts]); print(json.dumps(dict(probs=r.probs.tolist(), labels=r.labels, classes=p.classes)))', tmp_path/'model', tmp_path/'texts.json')
    np.testing.assert_allclose(got['probs'], want.probs, atol=1e-6, rtol=0)
    assert got['labels'] == want.labels if multi else np.allclose(got['labels'], want.labels, atol=1e-6)
    assert not [p for p in (tmp_path/'model').rglob('*') if p.suffix not in ('.json', '.safetensors', '.txt', '.jinja')]


def test_a_learner_comes_back_and_trains_on(learn, tmp_path):
    ts = learn.texts_
    learn.save_bundle(tmp_path/'model'); clf = load_bundle(tmp_path/'model'); again = clf.learner()
    np.testing.assert_allclose(reference(again, ts), reference(learn, ts), atol=EXACT, rtol=0)
    if isinstance(learn, BidirectionalLearner): return
    again = clf.learner(learn.dls)
    with again.no_bar(), again.no_logging():
        assert abs(again.validate()[0]-learn.validate()[0]) < 1e-5
        before = again.validate()[0]; again.fit(2, 1e-3); assert again.validate()[0] != before
    drops = lambda l: [(type(m).__name__, getattr(m, 'p', getattr(m, 'weight_p', getattr(m, 'embed_p', None)))) for m in l.model.modules() if 'Drop' in type(m).__name__]
    assert drops(again) == drops(learn)                    # it goes on with the same dropouts


def test_wrong_data_are_refused(tok, tmp_path):
    learn = hf_learner_for('classification', tok); learn.save_bundle(tmp_path/'m'); clf = load_bundle(tmp_path/'m')
    with expect_fail(DataError, 'vocabulary'): clf.learner(HFTextDataLoaders.from_lists(TEXTS, LABELS['classification'], train_tokenizer(TEXTS, 300), verbose=False))
    with expect_fail(DataError, 'classes'): clf.learner(HFTextDataLoaders.from_lists(TEXTS, ['xy'[i%2] for i in range(60)], tok, verbose=False))


@pytest.fixture
def bundle(tok, tmp_path):
    hf_learner_for('classification', tok).save_bundle(tmp_path/'model')
    return tmp_path/'model'


def forge(folder, **said):
    "Change what a bundle says of itself, and make its checksum right again, as a person who means harm can"
    m = json.loads((folder/'bundle.json').read_text()); m.pop('checksum')
    for k,v in said.items(): m[k] = {**m[k], **v} if isinstance(v, dict) and isinstance(m.get(k), dict) else v
    (folder/'bundle.json').write_text(json.dumps({**m, 'checksum': digest(m)}))


def facts(p): b = p.read_bytes(); return dict(size=len(b), checksum=hashlib.blake2b(b, digest_size=16).hexdigest())


class Evil:
    def __reduce__(self): return (Path.touch, (Path('pwned'),))


def test_damage_is_found(bundle):
    w = bundle/'model.safetensors'; b = bytearray(w.read_bytes()); b[-5] ^= 1; w.write_bytes(b)
    with expect_fail(RunError, 'model.safetensors: its checksum'): load_bundle(bundle)
    w.write_bytes(b[:-100])
    with expect_fail(RunError, 'bytes instead of'): load_bundle(bundle)
    w.unlink()
    with expect_fail(RunError, 'missing'): load_bundle(bundle)


def test_a_changed_setting_is_found(bundle):
    s = (bundle/'bundle.json').read_text(); (bundle/'bundle.json').write_text(s.replace('"temperature": 1.0', '"temperature": 9.0'))
    with expect_fail(RunError, 'bundle.json: its checksum'): load_bundle(bundle)
    (bundle/'bundle.json').write_text('{')
    with expect_fail(FastaiTLError, 'JSON'): load_bundle(bundle)
    with expect_fail(RunError, 'no folder'): load_bundle(bundle.parent/'nothing')


@pytest.mark.parametrize('name', ['../secret.json', '/etc/hostname', 'a/../../secret.json', '..\\secret.json'])
def test_no_path_leaves_the_folder(bundle, name):
    (bundle.parent/'secret.json').write_text('{}'); forge(bundle, files={name: facts(bundle.parent/'secret.json')})
    with expect_fail(RunError, 'inside its folder'): load_bundle(bundle)


def test_no_link_leaves_the_folder(bundle):
    w = bundle/'config.json'; shutil.copy(w, bundle.parent/'config.json'); w.unlink(); w.symlink_to(bundle.parent/'config.json')
    with expect_fail(RunError, 'a link'): load_bundle(bundle)


@pytest.mark.parametrize('name', ['pytorch_model.bin', 'model.pkl', 'training_args.pt', 'modeling.py', 'adapter_config.json'])
def test_no_pickle_and_no_code(bundle, name):
    (bundle/name).write_bytes(pickle.dumps(Evil()))
    with expect_fail(RunError, 'nothing else'): load_bundle(bundle)
    forge(bundle, files={name: facts(bundle/name)})
    with expect_fail(RunError, 'can hold code'): load_bundle(bundle)
    assert not Path('pwned').exists()


def test_a_pickle_under_another_name(bundle):
    (bundle/'model.safetensors').write_bytes(pickle.dumps(Evil())); forge(bundle, files={'model.safetensors': facts(bundle/'model.safetensors')})
    with expect_fail(Exception): load_bundle(bundle)
    assert not Path('pwned').exists()


def test_remote_code_is_refused(bundle):
    c = json.loads((bundle/'config.json').read_text()); c['auto_map'] = {'AutoModelForSequenceClassification': 'modeling.Evil'}; (bundle/'config.json').write_text(json.dumps(c))
    forge(bundle, files={'config.json': facts(bundle/'config.json')})
    with expect_fail(RunError, 'auto_map'): load_bundle(bundle)


def test_other_versions(bundle):
    forge(bundle, version=99)
    with expect_fail(RunError, 'Upgrade'): load_bundle(bundle)
    forge(bundle, version='1; import os')
    with expect_fail(RunError): load_bundle(bundle)


def test_weights_of_another_awd_model(tmp_path):
    a,b = awd_learner_for('classification'),awd_learner_for('multilabel'); a.save_bundle(tmp_path/'a'); b.save_bundle(tmp_path/'b')
    shutil.copy(tmp_path/'b'/'model.safetensors', tmp_path/'a'/'model.safetensors'); forge(tmp_path/'a', files={'model.safetensors': facts(tmp_path/'a'/'model.safetensors')})
    with expect_fail(RunError, 'weights'): load_bundle(tmp_path/'a')


def test_what_a_bundle_cannot_hold(tmp_path):
    learn = awd_learner_for('classification'); tfm = next(f for f in learn.dls.train_ds.tls[0].tfms.fs if isinstance(f, Tokenizer))
    tfm.rules = [*tfm.rules, lambda s: s.replace('a', 'b')]
    with expect_fail(FastaiTLError, "fastai's rules"): learn.save_bundle(tmp_path/'m')
    assert list(tmp_path.iterdir()) == []                  # nothing is left behind
    (tmp_path/'mine').mkdir(); (tmp_path/'mine'/'thesis.txt').write_text('x')
    with expect_fail(RunError, 'something else'): awd_learner_for('classification').save_bundle(tmp_path/'mine')
    assert (tmp_path/'mine'/'thesis.txt').read_text() == 'x'


def test_replacing_a_bundle_is_whole(bundle, tok, monkeypatch):
    before = load_bundle(bundle).predict_proba(TEXTS); other = hf_learner_for('classification', tok); other.model.hf.classifier.bias.data[0] += 1.
    monkeypatch.setattr('fastai_tl.deploy.manifest._seal', lambda *a: (_ for _ in ()).throw(OSError('disk full')))
    with pytest.raises(OSError): other.save_bundle(bundle)
    assert np.array_equal(load_bundle(bundle).predict_proba(TEXTS), before) and [p.name for p in bundle.parent.iterdir()] == ['model']
    monkeypatch.undo(); other.save_bundle(bundle)
    assert not np.allclose(load_bundle(bundle).predict_proba(TEXTS), before) and [p.name for p in bundle.parent.iterdir()] == ['model']


def test_int8_travels_with_what_it_changes(tok, tmp_path, capsys):
    learn = hf_learner_for('classification', tok); learn.save_bundle(tmp_path/'m', precision='int8')
    clf = load_bundle(tmp_path/'m'); assert clf.precision == 'int8' and 'validation rows' in capsys.readouterr().out
    np.testing.assert_allclose(load_bundle(tmp_path/'m', 'fp32').predict_proba(TEXTS), reference(learn, TEXTS), atol=EXACT)
    learn.save_bundle(tmp_path/'m')
    with expect_fail(RunError, 'a look'): load_bundle(tmp_path/'m', 'int8')


def test_transformers_reads_it_too(bundle):
    from transformers import AutoModelForSequenceClassification,AutoTokenizer
    model,t = AutoModelForSequenceClassification.from_pretrained(bundle).eval(),AutoTokenizer.from_pretrained(bundle); clf = load_bundle(bundle)
    with torch.no_grad(): z = model(**t(TEXTS, truncation=True, max_length=32, padding=True, return_tensors='pt')).logits.numpy()
    np.testing.assert_allclose(clf.scores(TEXTS), z, atol=EXACT); assert list(model.config.id2label.values()) == clf.classes


# --- bundles of other tasks ---

def test_awd_language_models(tmp_path):
    tokens = tokenize_texts_once(TEXTS, progress=False); vocab = texts_vocab(tokens, min_freq=1)
    for backwards in (False, True):
        learn = awd_lm_learner(language_model_dls(tokens, vocab, bs=4, seq_len=10, backwards=backwards), dict(emb_sz=16, n_hid=24, n_layers=2))
        learn.save_bundle(tmp_path/'lm')
        want = dict(ppl=learn.perplexity(TEXTS[:5]).corpus['perplexity'], text=learn.generate('alpha', max_new_tokens=6)[0].text)
        got = elsewhere('from fastai_tl.all import *\nl = load_bundle(sys.argv[1]); ts = json.loads(sys.argv[2])\nprint(json.dumps(dict(ppl=l.perplexity(ts).corpus["perplexity"], text=l.generate("alpha", max_new_tokens=6)[0].text)))', tmp_path/'lm', json.dumps(TEXTS[:5]))
        assert got['text'] == want['text'] and abs(got['ppl']/want['ppl']-1) < 1e-5


def test_tied_weights_are_written_once(tmp_path):
    from safetensors import safe_open
    tokens = tokenize_texts_once(TEXTS, progress=False); vocab = texts_vocab(tokens, min_freq=1)
    learn = awd_lm_learner(language_model_dls(tokens, vocab, bs=4, seq_len=10), dict(emb_sz=16, n_hid=24, n_layers=2)); learn.save_bundle(tmp_path/'lm')
    with safe_open(str(tmp_path/'lm'/'model.safetensors'), 'pt') as f: n = sum(f.get_tensor(k).numel() for k in f.keys())
    assert n == sum(p.numel() for p in learn.model.parameters())
    again = load_bundle(tmp_path/'lm').model; assert again[1].decoder.weight is again[0].encoder.weight


def test_tagger(tok, tmp_path):
    words = [t.lower().rstrip('.').split() for t in TEXTS]; tags = [['B-X' if w in ('good', 'bad') else 'O' for w in s] for s in words]
    learn = hf_tagger_learner(HFTagDataLoaders.from_lists(words, tags, tok, max_length=32, bs=8, verbose=False), bert(tok))
    learn.save_bundle(tmp_path/'m'); again = load_bundle(tmp_path/'m')
    with learn.no_bar(), again.no_bar(): a,b = learn.word_probs(words[:5]),again.word_probs(words[:5])
    for x,y in zip(a, b): np.testing.assert_allclose(x, y, atol=EXACT)
    assert [o.tags for o in learn.tag(TEXTS[:3])] == [o.tags for o in again.tag(TEXTS[:3])]


def test_question_answering(tok, tmp_path):
    q,c = ['who is it']*40,[t for t in TEXTS if len(t.split())>3][:40]; a = [t.split()[1] for t in c]
    dls = HFQADataLoaders.from_lists(q, c, a, tok, starts=[len(t.split()[0])+1 for t in c], max_length=40, stride=8, bs=8, verbose=False)
    learn = hf_qa_learner(dls, bert(tok)); learn.save_bundle(tmp_path/'m'); again = load_bundle(tmp_path/'m')
    with learn.no_bar(), again.no_bar(): x,y = learn.answers(list(zip(q, c))[:6]),again.answers(list(zip(q, c))[:6])
    assert [(o.text, o.start) for o in x] == [(o.text, o.start) for o in y]; np.testing.assert_allclose([o.score for o in x], [o.score for o in y], atol=EXACT)


def test_language_models_of_transformers(tok, tmp_path):
    gpt = hf_causal_lm_learner(HFCausalLMDataLoaders.from_texts(TEXTS, tok, max_length=16), GPT2Config(vocab_size=len(tok), n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0))
    gpt.save_bundle(tmp_path/'gpt'); again = load_bundle(tmp_path/'gpt')
    assert again.generate('alpha beta', max_new_tokens=5)[0].text == gpt.generate('alpha beta', max_new_tokens=5)[0].text
    assert abs(again.perplexity(TEXTS[:4]).corpus['perplexity']/gpt.perplexity(TEXTS[:4]).corpus['perplexity']-1) < 1e-5
    mlm = hf_masked_lm_learner(HFMaskedLMDataLoaders.from_texts(TEXTS, tok, max_length=16), bert(tok)); mlm.save_bundle(tmp_path/'mlm'); again = load_bundle(tmp_path/'mlm')
    np.testing.assert_allclose(again.predict('alpha [MASK]')[2], mlm.predict('alpha [MASK]')[2], atol=EXACT)


def test_seq2seq(tmp_path):
    t = train_tokenizer(TEXTS, 400, kind='seq2seq')
    learn = hf_seq2seq_learner(HFSeq2SeqDataLoaders.from_lists(TEXTS, TEXTS[::-1], t, max_length=24, max_target_length=12, bs=8, verbose=False), T5Config(vocab_size=len(t), d_model=16, d_ff=32, num_layers=1, num_heads=2, d_kv=8))
    learn.save_bundle(tmp_path/'m'); again = load_bundle(tmp_path/'m')
    assert again.generate_texts(TEXTS[:3]) == learn.generate_texts(TEXTS[:3]) and again.dls.max_target_length == 12


def test_peft_is_merged(tok, tmp_path):
    peft = pytest.importorskip('peft')
    dls = HFTextDataLoaders.from_lists(TEXTS, LABELS['classification'], tok, valid=VALID, max_length=32, bs=8, verbose=False)
    learn = hf_classifier_learner(dls, bert(tok), peft_config=peft.LoraConfig(r=2, target_modules=['query', 'value'], init_lora_weights=False))
    learn.save_bundle(tmp_path/'m'); assert not list((tmp_path/'m').glob('adapter*'))
    np.testing.assert_allclose(load_bundle(tmp_path/'m').predict_proba(TEXTS), reference(learn, TEXTS), atol=1e-4)
