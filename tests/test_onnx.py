"""ONNX files compute what PyTorch computes, for texts of any number and length; without PyTorch, too; hostile files"""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from fastai_tl.all import *
from fastai_tl.core import DataError, FastaiTLError, RunError, seed_everything
from fastai_tl.deploy.manifest import _seal
from fastai_tl.deploy.onnx import onnx_content, onnx_engine
from fastai_tl.deploy.onnx_export import int8_content
from fastai_tl.deploy.onnx_file import check_onnx
from repo import ROOT, clean_env
from small_learners import LABELS, SEVERAL, TEXTS, VALID, VALUES, WORDS, answerer, sentences, tagger

for name in ('onnx', 'onnxscript', 'onnxruntime'):
    pytest.importorskip(name, reason=f'needs {name}: pip install -e ".[onnx]"')

EXACT = 1e-5
SMALL = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
             max_position_embeddings=128)
FAMILIES = {
    'bert': {}, 'roberta': {}, 'electra': dict(embedding_size=16), 'mpnet': {},
    'distilbert': dict(dim=16, n_layers=2, n_heads=2, hidden_dim=32),
    'albert': dict(embedding_size=16), 'camembert': {}, 'rembert': dict(input_embedding_size=16),
    'deberta-v2': dict(relative_attention=True, position_buckets=16, pos_att_type=['p2c', 'c2p'],
                       share_att_key=True, norm_rel_ebd='layer_norm', max_relative_positions=-1),
    'gpt2': dict(n_embd=16, n_layer=2, n_head=2, n_positions=128),
    'llama': dict(num_key_value_heads=1), # rotary positions, which ONNX Runtime computes with opset 22 only
    'convbert': dict(embedding_size=16, head_ratio=1, conv_kernel_size=3),
    'mixtral': dict(num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2), # a mixture of experts
    'gpt_oss': dict(num_key_value_heads=1, head_dim=8, num_local_experts=4, num_experts_per_tok=2), # with biases
}


def config_of(kind, tok):
    pad = tok.pad_token_id
    return AutoConfig.for_model(kind, vocab_size=len(tok), **{**SMALL, **FAMILIES[kind]}, pad_token_id=pad)


def family_learner(kind, tok):
    seed_everything(3)
    dls = HFTextDataLoaders.from_lists(TEXTS, LABELS, tok, valid=VALID, max_length=128, bs=4, verbose=False)
    learn = hf_classifier_learner(dls, config_of(kind, tok), metrics=[])
    wake(learn.model)
    return learn


def wake(model):
    "Make random weights large enough that each token changes the result"
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(10)


def batches(n=20, seed=1):
    "Batches of random numbers of texts of random lengths"
    rng = np.random.default_rng(seed)
    return [[' '.join(rng.choice(WORDS, rng.integers(1, 60))) for _ in range(rng.integers(1, 8))] for _ in range(n)]


def worst_difference(learn, engine):
    "The largest difference of a probability to `get_preds`, over 20 batches of different shapes"
    parts = batches()
    texts = [text for part in parts for text in part]
    with learn.no_bar():
        expected = learn.get_preds(dl=learn.dls.test_dl(texts))[0].numpy()
    found = []
    for part in parts:
        rows = engine.encode(part)
        order = sorted(range(len(rows)), key=lambda i: -rows[i].shape[-1])
        scores = engine([rows[i] for i in order])
        found.append(engine.spec.activate(scores[np.argsort(order)]).numpy())
    shapes = {(len(part), max(map(len, part))) for part in parts}
    assert len(shapes) == len(parts) and expected.std(0).max() > 1e-3 # the results are not all alike
    return np.abs(np.concatenate(found) - expected).max()


def ulmfit(backwards=False):
    seed_everything(4)
    tokenized = tokenize_texts_once(TEXTS)
    vocab = texts_vocab(tokenized, 1)
    dls = classifier_dls(tokenized, LABELS, 'classification', list(range(20)), [20, 21], vocab, bs=4,
                         backwards=backwards)
    learn = awd_classifier_learner(dls, 'classification', 3, dict(emb_sz=12, n_hid=20, n_layers=3), metrics=[])
    wake(learn.model[0].module.encoder) # larger recurrent weights would magnify rounding errors
    wake(learn.model[1])
    return learn


@pytest.fixture(scope='module')
def tok(small_tokenizers):
    return small_tokenizers['encoder']


@pytest.fixture(scope='module')
def learn(tok):
    return family_learner('bert', tok)


@pytest.fixture(scope='module')
def engine(learn):
    return onnx_engine(learn)


@pytest.fixture(scope='module')
def bundle(learn, engine, tmp_path_factory):
    "A bundle with ONNX files in float32 and int8, of a model that is exported once"
    folder = tmp_path_factory.mktemp('onnx')/'model'
    with pytest.MonkeyPatch.context() as m:
        m.setattr('fastai_tl.deploy.onnx_bundle.onnx_engine', lambda learn: engine)
        learn.save_bundle(folder, temperature=1.7, thresholds=[.3, .5, .4], precision='int8', onnx=True)
    return folder


# --- the same results ---

def test_bert(learn, engine):
    assert engine.reader is not None and engine.graph.info['architecture'] == 'BertForSequenceClassification'
    assert worst_difference(learn, engine) < EXACT


@pytest.mark.parametrize('backwards', [False, True])
def test_awd_lstm(backwards):
    learn = ulmfit(backwards)
    engine = onnx_engine(learn)
    assert worst_difference(learn, engine) < EXACT
    int8 = engine.to_precision('int8')
    rows = engine.encode(TEXTS[:1])
    assert int8.precision == 'int8' and 0 < (int8(rows) - engine(rows)).abs().max() < .05


def test_long_texts_of_an_awd_lstm():
    "Only the last tokens of a text over `max_len` are pooled, in whole chunks"
    learn = ulmfit()
    learn.model[0].max_len, learn.model[0].bptt = 30, 7
    engine = onnx_engine(learn)
    texts = [' '.join(WORDS * n) for n in (1, 2, 3, 5, 9)]
    with learn.no_bar():
        expected = learn.get_preds(dl=learn.dls.test_dl(texts))[0].numpy()
    assert np.abs(Predictor(engine).predict_proba(texts) - expected).max() < EXACT


@pytest.mark.slow
@pytest.mark.parametrize('kind', [kind for kind in FAMILIES if kind != 'bert'])
def test_family(kind, tok):
    learn = family_learner(kind, tok)
    engine = onnx_engine(learn)
    assert not any('forward' in vars(m) for m in learn.model.modules()) # it is as before
    assert worst_difference(learn, engine) < EXACT


@pytest.mark.slow
def test_int8_of_a_mixture_of_experts(tok, tmp_path):
    "Its stacks of weights stay in float32, and the rest is quantized"
    learn = family_learner('mixtral', tok)
    file = learn.export_onnx(tmp_path / 'model.onnx', precision='int8')
    with learn.no_bar():
        expected = learn.get_preds(dl=learn.dls.test_dl(TEXTS))[0].numpy()
    engine = learn.predictor(engine='onnx', precision='int8')
    np.testing.assert_allclose(engine.predict_proba(TEXTS), expected, atol=0.05)
    assert b'MatMulInteger' in file.read_bytes() or b'DynamicQuantize' in file.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize('task', ['multilabel', 'regression', 'pairs', 'windows'])
def test_task(task, tok):
    options = dict(valid=VALID, bs=4, verbose=False, max_length=128)
    texts, labels = TEXTS, LABELS
    if task == 'pairs':
        texts = list(zip(TEXTS, TEXTS[::-1]))
    elif task == 'windows':
        options |= dict(max_length=12, windows=3)
    else:
        labels = dict(multilabel=SEVERAL, regression=VALUES)[task]
        options |= dict(task=task)
    dls = HFTextDataLoaders.from_lists(texts, labels, tok, **options)
    learn = hf_classifier_learner(dls, config_of('bert', tok), metrics=[])
    wake(learn.model)
    onnx, torch_ = learn.predictor(engine='onnx'), learn.predictor()
    assert np.abs(onnx.scores(texts) - torch_.scores(texts)).max() < EXACT * max(1, np.abs(onnx.scores(texts)).max())
    assert onnx.predict(texts).labels == torch_.predict(texts).labels or task == 'regression'


@pytest.mark.slow
@pytest.mark.parametrize('make', [tagger, answerer])
def test_outputs_of_tokens(make, small_tokenizers):
    "Tags and answers: the graph's outputs of the tokens are those of `get_preds`"
    learn = make(small_tokenizers)
    wake(learn.model)
    graph = Graph(onnx_content(learn))
    dl = learn.dls.valid
    xs = [x for x, *_ in (learn.dls.valid_ds[i] for i in range(len(learn.dls.valid_ds)))]
    with learn.no_bar():
        expected = learn.get_preds(dl=dl)[0]
    outs = graph([x.numpy() for x in xs])
    assert graph.outputs == (['logits'] if make is tagger else ['start_logits', 'end_logits'])
    for i, x in enumerate(xs):
        n = x.shape[-1]
        if make is tagger:
            probs = torch.from_numpy(outs[0][i][:n]).softmax(-1)
            assert (probs - expected[i][:n]).abs().max() < EXACT
        else:
            with torch.no_grad():
                hf = learn.model.eval()(x[None])
            allowed = (x[2] >= 0).numpy()
            for mine, theirs in zip(outs, hf):
                assert np.abs(mine[i][:n][allowed] - theirs[0].numpy()[allowed]).max() < EXACT


@pytest.mark.slow
def test_features_of_an_encoder(learn, tmp_path):
    file = learn.export_onnx(tmp_path/'encoder.onnx', part='encoder')
    learn.dls.tokenizer.save_pretrained(tmp_path)
    model = load_onnx(file)
    encoder = learn.model.inner[0].base_model.eval()
    texts = sentences(9, seed=8)
    for text, found in zip(texts, model.features(texts)):
        with torch.no_grad():
            states = encoder(**learn.dls.tokenizer(text, return_tensors='pt')).last_hidden_state[0].numpy()
        assert found.shape == states.shape and np.abs(found - states).max() < EXACT
    with pytest.raises(FastaiTLError, match='features'):
        model.predict(texts)


# --- bundles ---

def test_bundle(bundle, learn):
    "Temperature, thresholds and precision of a bundle are those of its Predictor with PyTorch"
    texts = sentences(40, seed=9)
    expected = load_bundle(bundle, precision='fp32', verbose=False).predict(texts)
    found = load_bundle(bundle, precision='fp32', engine='onnx').predict(texts)
    alone = load_onnx(bundle, precision='fp32').predict(texts)
    for other in (found, alone):
        assert np.abs(other.probs - expected.probs).max() < EXACT
        assert other.labels == expected.labels
    again = load_bundle(bundle, precision='fp32', engine='onnx').learner() # with the weights in safetensors
    assert again.predict(texts[0])[0] == learn.predict(texts[0])[0]


def test_int8_of_a_bundle(bundle, capsys):
    texts = sentences(40, seed=9)
    pred = load_bundle(bundle, engine='onnx')
    assert pred.precision == 'int8' and 'int8: accuracy' in capsys.readouterr().out
    scores, exact = pred.scores(texts), load_bundle(bundle, precision='fp32', engine='onnx').scores(texts)
    assert 0 < np.abs(scores - exact).max() < .1 * np.abs(exact).max()
    assert np.array_equal(load_onnx(bundle).scores(texts), scores)
    manifest = json.loads((bundle/'bundle.json').read_text())
    assert {'model.onnx', 'model.int8.onnx'} <= set(manifest['files'])
    assert manifest['onnx_change'][1]['precision'] == 'int8'


def test_a_bundle_without_onnx_says_so(learn, tmp_path):
    learn.save_bundle(tmp_path/'model')
    for load in (load_onnx, lambda folder: load_bundle(folder, engine='onnx')):
        with pytest.raises(RunError, match='onnx=True'):
            load(tmp_path/'model')
    with pytest.raises(FastaiTLError, match='torch, onnx'):
        load_bundle(tmp_path/'model', engine='tf')


def test_both_directions(tmp_path):
    pair = BidirectionalLearner(ulmfit(), ulmfit(True))
    pair.save_bundle(tmp_path/'model', onnx=True)
    texts = sentences(12, seed=3)
    expected = load_bundle(tmp_path/'model').predict_proba(texts)
    assert np.abs(load_bundle(tmp_path/'model', engine='onnx').predict_proba(texts) - expected).max() < EXACT
    with pytest.raises(FastaiTLError, match='one model'):
        pair.export_onnx(tmp_path/'x.onnx')


# --- without PyTorch ---

ALONE = '''
import json, sys
from fastai_tl.deploy.runtime import load_onnx
model = load_onnx(sys.argv[1])
found = model.predict(json.loads(sys.argv[2]))
big = [name for name in ('torch', 'fastai', 'transformers', 'fastcore', 'pandas', 'onnx') if name in sys.modules]
print(json.dumps(dict(labels=found.labels, probs=found.probs.tolist(), imported=big)))
'''


def test_prediction_imports_no_torch(bundle):
    texts = sentences(9, seed=6)
    run = subprocess.run([sys.executable, '-c', ALONE, str(bundle), json.dumps(texts)], capture_output=True, text=True,
                         env=clean_env(PYTHONPATH=str(ROOT)))
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    expected = load_bundle(bundle, engine='onnx', verbose=False).predict(texts)
    assert found['imported'] == []
    assert found['labels'] == expected.labels
    assert np.abs(np.array(found['probs']) - expected.probs).max() < 1e-6


def test_texts_that_cannot_be_read(bundle):
    model = load_onnx(bundle)
    for texts in ('one text', ['a', ''], ['a', None], [('a', 'b', 'c')], ['a', ('b', 'c')]):
        with pytest.raises(DataError):
            model.predict(texts)
    assert model.scores([]).shape == (0, 3)
    again = model.scores(['good film', 'bad plot', 'good film'])
    assert np.array_equal(again[0], again[2])


def test_a_long_text_is_cut_as_in_training(bundle):
    text = ' '.join(WORDS * 30)
    expected = load_bundle(bundle, precision='fp32', verbose=False).scores([text])
    assert np.abs(load_onnx(bundle, 'fp32').scores([text]) - expected).max() < EXACT


# --- refusals ---

def test_a_model_that_cannot_be_exported(tok, tmp_path, monkeypatch):
    "The reason is said, and no file is written"
    learn = family_learner('bert', tok)

    def fail(*args, **kwargs):
        raise RuntimeError('this operator has no equivalent')

    monkeypatch.setattr(torch.onnx, 'export', fail)
    with pytest.raises(FastaiTLError, match='BertForSequenceClassification.*no equivalent'):
        learn.export_onnx(tmp_path/'model.onnx')
    assert not list(tmp_path.iterdir())


def test_a_graph_with_other_results_is_refused(engine, learn):
    "A graph that is right for one shape only, or that computes something else"
    from fastai_tl.deploy.onnx_export import check_graph

    rows = engine.encode(['good', 'bad film', 'a very long plot ' * 9])
    expected = [[engine([row])[0].numpy()] for row in rows]
    check_graph(engine.graph.content, rows, expected)
    with pytest.raises(FastaiTLError, match='what PyTorch computes'):
        check_graph(engine.graph.content, rows, [[o + .01] for [o] in expected])


@pytest.mark.parametrize('options, reason', [(dict(part='head'), 'part'), (dict(precision='bf16'), 'precision')])
def test_unknown_options(options, reason, learn, tmp_path):
    with pytest.raises(FastaiTLError, match=reason):
        learn.export_onnx(tmp_path/'model.onnx', **options)


def test_other_precisions_are_refused(engine):
    with pytest.raises(FastaiTLError, match='bf16'):
        Predictor(engine, 'bf16')


# --- hostile files ---

def changed(content, change):
    "The bytes of an ONNX file after a change of its model"
    import onnx

    proto = onnx.load_from_string(content)
    change(proto)
    return proto.SerializeToString()


def external(proto):
    import onnx

    weight = max(proto.graph.initializer, key=lambda o: len(o.raw_data))
    weight.ClearField('raw_data')
    weight.data_location = onnx.TensorProto.EXTERNAL
    for key, value in dict(location='../secret.bin', offset='0', length='4').items():
        weight.external_data.add(key=key, value=value)


def huge(proto):
    weight = proto.graph.initializer[0]
    del weight.dims[:]
    weight.dims.extend([1 << 20, 1 << 20])


def other_operator(proto):
    proto.graph.node[0].domain = 'com.evil'


def endless(proto):
    import onnx

    body = onnx.helper.make_graph([], 'body', [], [])
    proto.graph.node.append(onnx.helper.make_node('Loop', [''], [], body=body))


def sparse(proto):
    values = proto.graph.sparse_initializer.add()
    values.dims.extend([1 << 40])


def function(proto):
    proto.functions.add(name='f', domain='com.evil')


def no_metadata(proto):
    del proto.metadata_props[:]


def false_metadata(proto):
    proto.metadata_props[0].value = proto.metadata_props[0].value.replace('"pad_id": ', '"pad_id": 99999999')


def other_spec(proto):
    proto.metadata_props[0].value = proto.metadata_props[0].value.replace('"a", "b", "c"', '"c", "b", "a"')


HOSTILE = {external: 'another file', huge: 'bytes', other_operator: 'com.evil', endless: 'graph within',
           sparse: 'sparse', function: 'functions', no_metadata: 'export_onnx', false_metadata: 'pad_id'}


@pytest.mark.parametrize('change', [*HOSTILE, other_spec])
def test_hostile_onnx_files(change, bundle, tmp_path, monkeypatch):
    folder = tmp_path/'model'
    shutil.copytree(bundle, folder)
    (tmp_path/'secret.bin').write_bytes(b'1234')
    manifest = json.loads((folder/'bundle.json').read_text())
    (folder/'bundle.json').unlink()
    file = folder/'model.onnx'
    file.write_bytes(changed(file.read_bytes(), change))
    own = ('files', 'format', 'version', 'versions', 'checksum')
    _seal(folder, {k: v for k, v in manifest.items() if k not in own})
    loads = [lambda: load_bundle(folder, 'fp32', engine='onnx')]
    if change is not other_spec:
        loads.append(lambda: load_onnx(folder, 'fp32'))
    for load in loads:
        with pytest.raises(RunError) as error:
            load()
        assert 'model.onnx' in error.value.message and HOSTILE.get(change, 'belong') in error.value.message


def test_onnx_files_are_listed_and_unchanged(bundle, tmp_path):
    folder = tmp_path/'model'
    shutil.copytree(bundle, folder)
    shutil.copy(folder/'model.onnx', folder/'other.onnx')
    with pytest.raises(RunError, match='other.onnx'):
        load_onnx(folder)
    (folder/'other.onnx').unlink()
    content = (folder/'model.onnx').read_bytes()
    (folder/'model.onnx').write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(RunError, match='checksum'):
        load_onnx(folder)


def test_loading_computes_nothing(engine):
    "A graph that would fill the memory if its constants were computed is loaded in little memory"
    import onnx
    from onnx import helper

    def fill(proto):
        size = helper.make_tensor('size', onnx.TensorProto.INT64, [1], [1 << 36])
        proto.graph.initializer.append(size)
        proto.graph.node.insert(0, helper.make_node('ConstantOfShape', ['size'], ['filled'], name='fill'))
        proto.graph.node.insert(1, helper.make_node('ReduceSum', ['filled'], ['total'], name='sum', keepdims=0))
        last = proto.graph.node[-1]
        out = last.output[0]
        last.output[0] = 'before'
        proto.graph.node.append(helper.make_node('Add', ['before', 'total'], [out], name='added'))

    graph = Graph(changed(engine.graph.content, fill))
    assert graph.n_out == 3


@pytest.mark.parametrize('cut', [1, 100, 5000])
def test_a_file_that_ends_early(engine, cut):
    with pytest.raises(RunError):
        Graph(engine.graph.content[:-cut])


def test_int8_keeps_the_head(engine):
    "The head is in float32, the embeddings have a scale for each row"
    import onnx

    proto = onnx.load_from_string(int8_content(engine.graph))
    scales = [o for o in proto.graph.initializer if o.name.endswith('_scales')]
    assert [list(o.dims) for o in scales] == [[400, 1]] or len(scales) == 1
    floats = {node.name for node in proto.graph.node if node.op_type in ('MatMul', 'Gemm')}
    assert set(engine.graph.info['head']) & {name.removesuffix('_MatMul') for name in floats}
    assert check_onnx('model.onnx', proto.SerializeToString())
