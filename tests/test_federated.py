"Federated training: the core on each kind of model, and Flower's apps if it is installed"

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from fastai.optimizer import SGD
from repo import ROOT, clean_env
from small_learners import LABELS, N_ROWS, TEXTS, classifier, ulmfit_classifier
from transformers import BertConfig

from fastai_tl.all import *
from fastai_tl.data.hf_tokenizer import train_tokenizer


def quiet_fit(learn, n=1, lr=1e-3):
    with learn.no_bar(), learn.no_logging():
        learn.fit(n, lr)


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def by_factory(kind, toks):
    seed_everything(3)
    return (ulmfit_classifier if kind == 'awd' else classifier)(toks)


@pytest.mark.parametrize('kind', ['hf', 'awd'])
def test_one_client_is_an_ordinary_fit_to_the_bit(kind, small_tokenizers):
    alone, client = by_factory(kind, small_tokenizers), by_factory(kind, small_tokenizers)
    for learn in (alone, client):
        seed_everything(5)
        quiet_fit(learn, 2) if learn is alone else federated_fit([learn], 1, partial(quiet_fit, n=2))
    assert same(get_update(alone), get_update(client))


def test_an_update_moves_a_model_completely(small_tokenizers):
    source, target = by_factory('awd', small_tokenizers), by_factory('awd', small_tokenizers)
    quiet_fit(source)
    with source.no_bar(), target.no_bar():
        before = target.get_preds()[0]
        set_update(target, get_update(source))
        wanted, got = source.get_preds()[0], target.get_preds()[0]
    assert torch.equal(got, wanted) and not torch.equal(before, wanted)


def test_a_client_with_one_class_trains(small_tokenizers):
    rows = [i for i in range(N_ROWS) if LABELS[i] == LABELS[0]]
    with pytest.warns(UserWarning, match='No training text has the label'):
        dls = HFTextDataLoaders.from_lists([TEXTS[i] for i in rows], [LABELS[i] for i in rows],
                                           small_tokenizers['encoder'], bs=4, vocab=sorted(set(LABELS)), verbose=False)
    assert list(dls.vocab) == sorted(set(LABELS)) and len(dls.train_ds) + len(dls.valid_ds) == len(rows)


# --- Flower ---


@pytest.fixture
def flower(monkeypatch):
    app = pytest.importorskip('flwr.app')
    identity = pytest.importorskip('flwr.supercore.task_identity').TaskIdentity
    for name in ('_task_id', '_run_id', '_node_id'): # messages carry them
        monkeypatch.setattr(identity, name, 1)
    return app


def make_client(part):
    "The Learner of a client: a quarter of the rows"
    texts = [f'{word} film {i}' for i in range(24) for word in ('good', 'bad')]
    labels = ['pos', 'neg'] * 24
    tok = train_tokenizer(texts, 200)
    rows = dirichlet_split(labels, 4, alpha=0.5, min_rows=4, seed=1)[part]
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    config = BertConfig(vocab_size=len(tok), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes)
    seed_everything(0)
    dls = HFTextDataLoaders.from_lists([texts[i] for i in rows], [labels[i] for i in rows], tok, bs=64,
                                       vocab=['neg', 'pos'], verbose=False)
    return hf_classifier_learner(dls, config, metrics=[], opt_func=partial(SGD, mom=0.0), wd=0.0)


def of_context(context):
    return make_client(int(context.node_config['partition-id']))


def context_of(flower, part):
    options = dict(run_id=1, node_id=part, state=flower.RecordDict(), run_config={})
    return flower.Context(node_config={'partition-id': part}, **options)


def test_messages_of_a_client(flower):
    learn = make_client(0)
    update = get_update(learn)
    app = flower_client_app(of_context, partial(quiet_fit, lr=0.1), mu=0.1)
    content = flower.RecordDict(dict(arrays=flower.ArrayRecord(update)))
    answer = app(flower.Message(content, dst_node_id=2, message_type='train'), context_of(flower, 0))
    expected, n_rows = client_round(make_client(0), update, partial(quiet_fit, lr=0.1), 0.1)
    assert answer.content['metrics']['num-examples'] == n_rows == len(learn.dls.train_ds)
    assert same(answer.content['arrays'].to_torch_state_dict(), expected)
    answer = app(flower.Message(content, dst_node_id=2, message_type='evaluate'), context_of(flower, 0))
    assert answer.content['metrics']['loss'] == pytest.approx(float(learn.validate()[0]))


class ClientsHere:
    "What the server's strategy needs of Flower's grid, with the clients in this process"

    def __init__(self, flower, app, n):
        self.flower = flower
        self.app = app
        self.n = n

    def get_node_ids(self):
        return range(self.n)

    def send_and_receive(self, messages, **kwargs):
        return [self.app(o, context_of(self.flower, o.metadata.dst_node_id)) for o in messages]


def test_two_rounds_of_four_clients_are_federated_fit(flower):
    kept = []
    server = flower_server_app(lambda context: make_client(0), 2, done=lambda learn: kept.append(get_update(learn)))
    client = flower_client_app(of_context, partial(quiet_fit, lr=5.0))
    server(ClientsHere(flower, client, 4), context_of(flower, 0))
    expected = federated_fit([make_client(part) for part in range(4)], 2, partial(quiet_fit, lr=5.0))
    far = {name: (kept[0][name] - expected[name]).abs().max().item() for name in expected}
    moved = {name: (kept[0][name] - w).abs().max().item() for name, w in get_update(make_client(0)).items()}
    assert max(far.values()) < 1e-6 and max(moved.values()) > 1e-4, (max(far.values()), max(moved.values()))


SIMULATION = """
from functools import partial
from flwr.simulation import run_simulation
from fastai_tl.all import *
from test_federated import make_client, of_context, quiet_fit

kept = []
fit = partial(quiet_fit, lr=5.0)
server = flower_server_app(lambda context: make_client(0), 2, done=lambda learn: kept.append(get_update(learn)))
resources = dict(client_resources=dict(num_cpus=1, num_gpus=0.0))
run_simulation(server, flower_client_app(of_context, fit), num_supernodes=4, backend_config=resources)
expected = federated_fit([make_client(part) for part in range(4)], 2, fit)
print('farthest', max((kept[0][name] - expected[name]).abs().max().item() for name in expected))
"""


@pytest.mark.slow
def test_simulation_of_flower_is_federated_fit(tmp_path):
    "Four clients with different classes in processes of Ray"
    pytest.importorskip('flwr.simulation')
    pytest.importorskip('ray', reason='pip install "flwr[simulation]"')
    (tmp_path / 'script.py').write_text(SIMULATION)
    env = clean_env(PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / 'tests')]), OMP_NUM_THREADS='1',
                    HF_HUB_OFFLINE='1', FLWR_TELEMETRY_ENABLED='0')
    command = [sys.executable, tmp_path / 'script.py']
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    assert float(done.stdout.split('farthest')[1]) < 1e-6
