"""The server: answers are those of predict bit by bit, limits and malformed requests are problem details, metrics and
OpenAPI are valid, and SIGTERM loses no request."""

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import jsonschema
import numpy as np
import pytest
import torch
from small_learners import TEXTS, answerer, causal_lm, classifier, masked_lm, seq2seq, t5, tagger

from fastai_tl.all import *
from fastai_tl.cli import main
from fastai_tl.deploy.batching import BatchWorker
from repo import *

JSON = {'content-type': 'application/json'}


class Client:
    "Ask an ASGI application without a network"

    def __init__(self, app):
        self.app = app

    def many(self, requests):
        "Send all requests at the same time"

        async def ask():
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=True)
            async with httpx.AsyncClient(transport=transport, base_url='http://test') as client:
                return await asyncio.gather(*(client.request(m, path, **kw) for m, path, kw in requests))

        return asyncio.run(ask())

    def get(self, path):
        return self.many([('GET', path, {})])[0]

    def post(self, path, **kwargs):
        return self.many([('POST', path, kwargs)])[0]

    def predict(self, **content):
        return self.post('/predict', json=content)


@pytest.fixture(scope='module')
def predictor(small_tokenizers):
    return classifier(small_tokenizers).predictor(verbose=False)


@pytest.fixture
def app(predictor):
    app = serving_app(predictor, ServingLimits(texts=20, chars=500, body=20_000))
    yield app
    app.application.close()


def scores(answer):
    assert answer.status_code == 200, answer.text
    return np.array([o['scores'] for o in answer.json()['predictions']], dtype=np.float32)


def is_problem(answer, status):
    assert answer.status_code == status, (answer.status_code, answer.text)
    content = answer.json()
    assert answer.headers['content-type'] == 'application/problem+json'
    assert content['status'] == status and content['title'] and content['detail']
    assert 'Traceback' not in answer.text and '.py' not in answer.text
    return True


def test_same_bits_as_predict(app, predictor):
    "Many requests at once: those with one text, with several, and with repeated ones"
    rng = random.Random(0)
    asked = [rng.sample(TEXTS, rng.choice([1, 1, 1, 2, 5])) for _ in range(150)]
    answers = Client(app).many([('POST', '/predict', dict(json=dict(texts=texts))) for texts in asked[:60]])
    answers += Client(app).many([('POST', '/predict', dict(json=dict(texts=texts))) for texts in asked[60:120]])
    for texts, answer in zip(asked, answers):
        right = predictor.predict(texts)
        assert np.array_equal(scores(answer), right.scores)
        for found, expected in zip(answer.json()['predictions'], right):
            assert found['label'] == expected.label and found['probs'] == expected.probs
    one = Client(app).predict(text=TEXTS[0])
    assert np.array_equal(scores(one), predictor.predict(TEXTS[:1]).scores)


class Sums:
    "An engine whose scores of rows of 3 tokens depend on the number of rows"
    n_calls = 0

    def __call__(self, rows):
        self.n_calls += 1
        time.sleep(0.002)
        res = torch.tensor([[float(np.sum(row))] for row in rows])
        return res + len(rows) * (rows[0].shape[-1] == 3)


def in_threads(worker, rows, n=16):
    def run(row):
        with worker.request():
            return worker.run([row]).item()

    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(run, rows))


def test_batches_are_joined_only_where_bits_are_the_same():
    engine = Sums()
    worker = BatchWorker(engine, 64)
    rows = [np.full((1, 2 + i % 2), i) for i in range(400)]
    found = in_threads(worker, rows)
    assert found == [row.sum() + (row.shape[-1] == 3) for row in rows]
    assert engine.n_calls < 350  # half of the rows could be joined
    kinds = {shape[-1] for (_, shape), _ in worker.checks.different}
    assert kinds == {3} and any(worker.checks.equal.values())
    worker.close()


def test_any_batch(predictor):
    "With exact=False everything that waits is computed together, nearly the same"
    app = serving_app(predictor, exact=False)
    answers = Client(app).many([('POST', '/predict', dict(json=dict(text=text))) for text in TEXTS * 2])
    app.application.close()
    assert np.allclose(np.concatenate(list(map(scores, answers))), predictor.predict(TEXTS * 2).scores, atol=1e-5)
    counts = app.application.metrics.batches.counts
    assert sum(counts) < len(answers)


def test_error_of_one_request_in_a_batch():
    "The others get their results"

    class Fails(Sums):
        def __call__(self, rows):
            if any(row[0, 0] == 13 for row in rows):
                raise ValueError('13')
            return super().__call__(rows)

    worker = BatchWorker(Fails(), 64)

    def run(i):
        try:
            return in_threads(worker, [np.full((1, 2), i)], 1)[0]
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(run, range(40))) == ['13' if i == 13 else 2 * i for i in range(40)]
    worker.close()
    assert not worker.thread.is_alive()


LIMITED = [
    (dict(content=b'{', headers=JSON), 400),
    (dict(content=b'\xff\xfe', headers=JSON), 400),
    (dict(content=b'{"text": NaN}', headers=JSON), 400),
    (dict(content=b'[' * 9000, headers=JSON), 400),
    (dict(content=b'{"text": 1' + b'0' * 6000 + b'}', headers=JSON), 400),
    (dict(content=b'{"text": "a"}'), 415),
    (dict(content=b'text=a', headers={'content-type': 'application/x-www-form-urlencoded'}), 415),
    (dict(content=b'{}', headers=JSON | {'content-encoding': 'gzip'}), 415),
    (dict(content=b' ' * 20_001, headers=JSON), 413),
    (dict(json=dict(texts=['a'] * 21)), 413),
    (dict(json=dict(text='a' * 501)), 413),
    (dict(json=dict(text='')), 422),
    (dict(json=dict(text=['a', 'b'])), 422),
    (dict(json=dict(text='a', texts=['a'])), 422),
    (dict(json=dict(txt='a')), 422),
    (dict(json=[]), 422),
]


@pytest.mark.parametrize('request_, status', LIMITED)
def test_limits(app, request_, status):
    assert is_problem(Client(app).post('/predict', **request_), status)


def test_body_in_pieces_without_a_length(app):
    async def pieces():
        for _ in range(30):
            yield b' ' * 1000

    assert is_problem(Client(app).post('/predict', content=pieces(), headers=JSON), 413)


def test_unknown_paths_and_methods(app):
    client = Client(app)
    assert is_problem(client.get('/nowhere'), 404) and is_problem(client.get('/predict'), 405)
    assert is_problem(client.post('/generate', json=dict(text='a')), 404)
    assert client.get('/').json()['classes'] == ['a', 'b', 'c'] and client.get('/ready').json() == dict(status='ready')
    app.application.is_stopping = True
    ready = client.get('/ready')
    assert is_problem(ready, 503) and ready.headers['connection'] == 'close'


def malformed(rng):
    "A valid request with some bytes changed, or a value of another type"
    values = [None, True, 0, -1, 1e308, 10**400, '', ' ', '\ud800', '\0', [], {}, [[]], [None], ['a', 1], {'a': 1}]
    body = json.dumps({rng.choice(['text', 'texts', 'x', '\ud800']): rng.choice(values)}).encode()
    for _ in range(rng.choice([0, 0, 1, 3])):
        at = rng.randrange(len(body))
        body = body[:at] + bytes([rng.randrange(256)]) * rng.choice([0, 1, 1, 2]) + body[at + 1 :]
    media = rng.choice(['application/json'] * 6 + ['', 'text/plain', 'application/json; charset=big5', 'é'])
    path = rng.choice(['/predict'] * 8 + ['/generate', '/%ff', '/predict/', '//'])
    return 'POST', path, dict(content=body, headers={'content-type': media.encode()})


def test_malformed_requests(app):
    rng = random.Random(0)
    for _ in range(5):
        for answer in Client(app).many([malformed(rng) for _ in range(100)]):
            assert answer.status_code == 200 or is_problem(answer, answer.status_code)
            assert answer.status_code < 500


def test_lone_surrogates_and_zero_bytes(app, predictor):
    answer = Client(app).post('/predict', content=b'{"text": "a \\ud800 film \\u0000"}', headers=JSON)
    assert np.array_equal(scores(answer), predictor.predict(['a \ud800 film \0']).scores)


def test_too_many_requests(predictor):
    app = serving_app(predictor, ServingLimits(requests=2))
    release = threading.Event()
    blocker = threading.Thread(target=app.application.served.worker.call, args=(release.wait,))
    blocker.start()
    threading.Timer(0.5, release.set).start()
    answers = Client(app).many([('POST', '/predict', dict(json=dict(text=text))) for text in TEXTS[:6]])
    blocker.join()
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(refused) == 4 and all(is_problem(o, 429) and int(o.headers['retry-after']) >= 1 for o in refused)
    done = [answer.status_code for answer in answers if answer.status_code != 429]
    assert done == [200, 200]
    assert Client(app).predict(text='a').status_code == 200  # the slots are free again
    app.application.close()


def test_an_error_in_the_model_is_no_traceback(app, caplog):
    app.application.served.predictor = None
    app.application.served.worker.call = lambda job: 1 / 0
    assert is_problem(Client(app).predict(text='a'), 500)
    assert 'ZeroDivisionError' in caplog.text


def test_metrics(app):
    client = Client(app)
    client.predict(texts=TEXTS[:3])
    client.predict(text='')
    client.get('/a%22b%0Ac')
    answer = client.get('/metrics')
    assert answer.headers['content-type'].startswith('text/plain; version=0.0.4')
    number = r'-?\d+(\.\d+)?(e[-+]?\d+)?'
    line = re.compile(rf'# (HELP|TYPE) \w+ .+|\w+(\{{\w+="[^"]*"(,\w+="[^"]*")*\}})? {number}')
    lines = answer.text.splitlines()
    assert all(line.fullmatch(o) for o in lines) and answer.text.endswith('\n')
    assert 'fastai_tl_requests_total{path="/predict",status="200"} 1' in lines
    assert 'fastai_tl_requests_total{path="/predict",status="422"} 1' in lines
    assert 'fastai_tl_requests_total{path="other",status="404"} 1' in lines
    assert {'fastai_tl_texts_total 3', 'fastai_tl_requests_active 0', 'fastai_tl_request_seconds_count 1'} <= set(lines)
    rows = [float(o.rpartition(' ')[2]) for o in lines if o.startswith('fastai_tl_batch_rows_bucket')]
    assert rows == sorted(rows) and rows[-1] >= 1


def schema_of(description, path, status=None):
    operation = description['paths'][path]['post']
    part = operation['requestBody'] if status is None else operation['responses'][str(status)]
    return part['content']['application/json']['schema']


def conforms(content, schema):
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema).is_valid(content)


@pytest.mark.parametrize('kind', ['multi', 'value'])
def test_several_labels_and_values(small_tokenizers, kind):
    labels = [['a', 'd']] * 22 if kind == 'multi' else [float(i) for i in range(22)]
    pred = classifier(small_tokenizers, labels, data=kind).predictor(verbose=False)
    app = serving_app(pred)
    answer, description = Client(app).predict(texts=TEXTS[:3]), Client(app).get('/openapi.json').json()
    app.application.close()
    assert np.array_equal(scores(answer), pred.predict(TEXTS[:3]).scores)
    assert conforms(answer.json(), schema_of(description, '/predict', 200))


def test_openapi(app):
    client = Client(app)
    description = client.get('/openapi.json').json()
    assert description['openapi'] == '3.1.0' and set(description['info']) == {'title', 'version'}
    for path, operations in description['paths'].items():
        assert path.startswith('/')
        for operation in operations.values():
            assert all(o['description'] for o in operation['responses'].values())
    wanted = schema_of(description, '/predict')
    for request in [o['json'] for o, _ in LIMITED if 'json' in o]:  # what is refused does not conform
        assert not conforms(request, wanted)
    good = dict(texts=TEXTS[:2])
    assert conforms(good, wanted) and conforms(client.predict(**good).json(), schema_of(description, '/predict', 200))


def test_tags_answers_and_texts(small_tokenizers):
    "Each task answers as the Learner does, and as its description says"
    made = {}
    for learn, texts in (
        (tagger(small_tokenizers), [TEXTS[0], TEXTS[1].split()]),
        (answerer(small_tokenizers), [['when', f'{TEXTS[0]} at noon']]),
        (seq2seq(small_tokenizers, t5), TEXTS[:2]),
    ):
        app = serving_app(learn)
        answer = Client(app).predict(texts=texts)
        description = Client(app).get('/openapi.json').json()
        assert answer.status_code == 200, answer.text
        assert conforms(answer.json(), schema_of(description, '/predict', 200))
        assert conforms(dict(texts=texts), schema_of(description, '/predict'))
        made[learn.dls.spec.task] = learn, answer.json()['predictions'], app
    learn, found, _ = made['tagging']
    assert [o['tags'] for o in found] == [list(o.tags) for o in learn.tag([TEXTS[0], TEXTS[1].split()])]
    learn, found, _ = made['qa']
    assert found[0]['answer'] == learn.answer('when', f'{TEXTS[0]} at noon').text
    learn, found, app = made['seq2seq']
    assert [o['text'] for o in found] == learn.generate_texts(TEXTS[:2])
    answer = Client(app).post('/generate', json=dict(text=TEXTS[0], max_new_tokens=5))
    assert [o['text'] for o in answer.json()['texts']] == learn.generate_texts(TEXTS[:1], max_new_tokens=5)


def test_generate(small_tokenizers):
    learn = causal_lm(small_tokenizers)
    app = serving_app(learn, ServingLimits(new_tokens=10))
    client = Client(app)
    options = dict(max_new_tokens=4, top_p=0.9, seed=3)
    found = client.post('/generate', json=dict(texts=TEXTS[:2], **options)).json()['texts']
    assert [o['completion'] for o in found] == [o.completion for o in learn.generate(TEXTS[:2], **options)]
    for wrong in (dict(max_new_tokens=11), dict(temperature=-1), dict(beams=2), dict(seed='a'), dict(num_beams=99)):
        assert is_problem(client.post('/generate', json=dict(text='the', **wrong)), 422)
    assert is_problem(client.predict(text='the'), 404)
    app.application.close()


def test_models_that_cannot_be_served(small_tokenizers):
    for model in (masked_lm(small_tokenizers), 3):
        with pytest.raises(FastaiTLError, match='A model to serve must be'):
            serving_app(model)
    with pytest.raises(FastaiTLError, match='learn.predictor'):
        serving_app(classifier(small_tokenizers))


def test_other_hosts_give_a_warning(predictor):
    with pytest.warns(UserWarning, match='no authentication'):
        serve(predictor, host='0.0.0.0', port=0, drain=0, wait=False).stop()


def asked_until_the_end(url, right, stop_server):
    "Numbers of answers, and what was lost, when 8 clients ask while a server is stopped"
    lost, n_done = [], []

    def ask(number):
        rng = random.Random(number)
        with httpx.Client(base_url=url, timeout=30) as client:
            while True:
                texts = rng.sample(TEXTS, rng.choice([1, 3]))
                try:
                    answer = client.post('/predict', json=dict(texts=texts))
                except httpx.ConnectError:  # not accepted: the server has gone
                    return
                except httpx.HTTPError as error:
                    lost.append(repr(error))
                    return
                if not np.array_equal(scores(answer), right.predict(texts).scores):
                    lost.append('other scores')
                n_done.append(1)

    with ThreadPoolExecutor(8) as pool:
        for number in range(8):
            pool.submit(ask, number)
        time.sleep(0.5)
        stop_server()
    return len(n_done), lost


def test_stop_loses_nothing(predictor):
    server = serve(predictor, port=0, drain=0.3, wait=False)
    n_done, lost = asked_until_the_end(server.url, predictor, server.stop)
    assert lost == [] and n_done > 8
    with pytest.raises(FastaiTLError, match='stopped'):
        server.server.config.app.application.served.predict(TEXTS[:1])


@pytest.mark.slow
def test_command_until_sigterm(small_tokenizers, tmp_path):
    "Requests that the server has accepted are answered after SIGTERM"
    classifier(small_tokenizers).save_bundle(tmp_path / 'model')
    right = load_bundle(tmp_path / 'model', verbose=False)
    code = 'import sys; from fastai_tl.cli import main; sys.exit(main(sys.argv[1:]))'
    command = [sys.executable, '-W', 'ignore', '-c', code, 'serve', str(tmp_path / 'model'), '--port', '0']
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {'HF_HUB_OFFLINE': '1'})
    url = re.search(r'http://\S+', server.stdout.readline())[0]
    n_done, lost = asked_until_the_end(url, right, lambda: server.send_signal(signal.SIGTERM))
    assert server.wait(30) == 0 and lost == [] and n_done > 8


def test_command_with_a_wrong_model(tmp_path, capsys):
    assert main(['serve', str(tmp_path)]) == 1
    assert 'must be the folder of a finished quickstart, or a bundle' in capsys.readouterr().err


def test_a_port_in_use_and_an_unknown_host_are_errors_of_the_package(predictor):
    server = serve(predictor, port=0, wait=False, drain=0.0)
    try:
        port = int(server.url.rsplit(':', 1)[1])
        with pytest.raises(RunError, match=f'port {port}.*choose another port'):
            serve(predictor, port=port, wait=False)
    finally:
        server.stop()
    with pytest.raises(RunError, match='no-such-host'):
        ModelServer(serving_app(predictor), host='no-such-host.invalid', port=0)
    with pytest.raises(FastaiTLError, match='`wait`'):
        serve(predictor, port=0, wait='no')
