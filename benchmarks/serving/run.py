"""A server for one model (`fastai-tl serve`) under load: equality, latency, throughput, malformed requests, SIGTERM.

    python benchmarks/serving/run.py [--only onnx torch] [--seconds 60] [--rounds 3] [--clients 32]
                                     [--malformed 10000] [--data trec6.csv] [--json FILE]

The model is MiniLM (the extra `minilm`) with a head with random weights, the texts are the questions of a table with
a column `text`, or docstrings. The server is a process of its own with one thread for the model; the clients are
threads of this process with one open connection each, and every client sends its next request when it has its answer.

- single: one client, in turn with `predict` in this process; the overhead is the difference of the best of all
  rounds for each text.
- load: in each round one client and then `--clients` clients, each for `--seconds`/`--rounds` seconds.
- paced: `--clients` clients that together send 80 % of the requests a second that one client gets.
- Every answer is compared with that of `predict` for its text alone, bit by bit.
- malformed: `--malformed` requests with changed bytes, other types and wrong headers.
- sigterm: `--clients` clients send requests while the server gets SIGTERM. A request is lost if a connection was made
  and no answer came.

Variants: `onnx` and `torch`; `torch_strict` with MKL_CBWR=AVX2,STRICT in the server and for `predict`, which makes
sums of MKL independent of the shape; `onnx_any` and `torch_any` with `--any-batch`."""

import http.client
import json
import os
import random
import re
import signal
import statistics as st
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import offline, parser, ranged, ratio, table, write_json

STRICT = {'MKL_CBWR': 'AVX2,STRICT'}
VARIANTS = {
    'onnx': (['--engine', 'onnx'], {}),
    'torch': ([], {}),
    'torch_strict': ([], STRICT),
    'onnx_any': (['--engine', 'onnx', '--any-batch'], {}),
    'torch_any': (['--any-batch'], {}),
}
JSON = {'Content-Type': 'application/json'}
START = 'import sys; from fastai_tl.cli import main; sys.exit(main(sys.argv[1:]))'


def make_bundle(folder, texts):
    "MiniLM with a head with random weights, as a bundle with an ONNX file"
    from fastai_tl.all import HFTextDataLoaders, hf_classifier_learner, minilm_folder, seed_everything

    seed_everything(42)
    few = texts[:64]
    labels = ['a', 'b'] * (len(few) // 2)
    dls = HFTextDataLoaders.from_lists(few, labels, minilm_folder(), max_length=128, bs=8, verbose=False)
    hf_classifier_learner(dls, minilm_folder()).save_bundle(folder, onnx=True)


class Server:
    "The command `fastai-tl serve` in a process"

    def __init__(self, folder, options, environment):
        command = [sys.executable, '-W', 'ignore', '-c', START, 'serve', str(folder), '--port', '0', *options]
        env = os.environ | {'OMP_NUM_THREADS': '1'} | environment
        self.log = tempfile.TemporaryFile('w+')
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log, text=True, env=env)
        self.port = int(re.search(r'http://[\d.]+:(\d+)', self.process.stdout.readline())[1])

    def metric(self, name):
        return [line for line in Client(self.port).text('/metrics').splitlines() if line.startswith(name)]

    def tracebacks(self):
        self.log.seek(0)
        return self.log.read().count('Traceback')


class Client:
    "One connection that stays open"

    def __init__(self, port):
        self.connection = http.client.HTTPConnection('127.0.0.1', port, timeout=60)

    def predict(self, text):
        "Status and scores of a text"
        self.connection.request('POST', '/predict', json.dumps(dict(text=text)), JSON)
        answer = self.connection.getresponse()
        content = json.loads(answer.read())
        return answer.status, content['predictions'][0]['scores'] if answer.status == 200 else None

    def text(self, path):
        self.connection.request('GET', path)
        return self.connection.getresponse().read().decode()


class Load:
    "Seconds of each request of some clients, and what went wrong"

    def __init__(self, port, texts, right, n, seconds, per_second=None):
        self.seconds, self.errors, self.other = [], Counter(), 0
        self.end = time.perf_counter() + seconds
        pause = n / per_second if per_second else 0
        threads = [threading.Thread(target=self.ask, args=(port, texts, right, i, pause)) for i in range(n)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.rate = len(self.seconds) / seconds

    def ask(self, port, texts, right, number, pause):
        rng, client = random.Random(number), Client(port)
        if pause:
            time.sleep(rng.random() * pause)
        while time.perf_counter() < self.end:
            text = rng.choice(texts)
            begin = time.perf_counter()
            try:
                status, scores = client.predict(text)
            except Exception as error:
                self.errors[type(error).__name__] += 1
                client = Client(port)
                continue
            took = time.perf_counter() - begin
            self.seconds.append(took)
            if status != 200:
                self.errors[status] += 1
            elif scores != right[text]:
                self.other += 1
            if pause:
                time.sleep(max(0, rng.expovariate(1 / pause) - took))

    def quantile(self, q):
        by = sorted(self.seconds)
        return by[min(len(by) - 1, int(q * len(by)))]


def expected(folder, texts, options, environment):
    "Scores of `predict` for each text alone, and the seconds of each call, in a process with the server's settings"
    code = (
        'import json, sys, time\nfrom fastai_tl.all import load_bundle\n'
        'folder, engine, texts = sys.argv[1], sys.argv[2], json.load(sys.stdin)\n'
        'pred = load_bundle(folder, engine=engine, verbose=False)\n'
        'pred.predict(texts[:1])\nscores, seconds = [], []\n'
        'for text in texts:\n'
        '    begin = time.perf_counter()\n    scores.append(pred.predict([text]).scores[0].tolist())\n'
        '    seconds.append(time.perf_counter()-begin)\n'
        'print(json.dumps([scores, seconds]))'
    )
    engine = 'onnx' if 'onnx' in options else 'torch'
    command = [sys.executable, '-W', 'ignore', '-c', code, str(folder), engine]
    env = os.environ | {'OMP_NUM_THREADS': '1'} | environment
    out = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True, env=env, check=True).stdout
    return json.loads(out.splitlines()[-1])


def overhead(server, folder, texts, options, rounds):
    "Milliseconds of a request and of `predict`: for each text the best of the rounds, in turn; median and quartiles"
    import torch

    from fastai_tl.all import load_bundle

    torch.set_num_threads(1)
    pred = load_bundle(folder, engine='onnx' if 'onnx' in options else 'torch', verbose=False)
    client, direct, asked = Client(server.port), [], []
    for i in range(rounds + 1):
        for times in (direct, asked):
            times.append([])
        for text in texts[:100]:
            begin = time.perf_counter()
            pred.predict([text])
            middle = time.perf_counter()
            client.predict(text)
            direct[i].append(middle - begin)
            asked[i].append(time.perf_counter() - middle)
    direct, asked = ([1000 * min(times) for times in zip(*rounds[1:])] for rounds in (direct, asked))
    low, median, high = st.quantiles([b - a for a, b in zip(direct, asked)], n=4)
    return dict(overhead_ms=median, low=low, high=high, request_ms=st.median(asked), predict_ms=st.median(direct))


def malformed(port, n):
    "Statuses of requests with changed bytes, other types and wrong headers"
    rng, statuses, client = random.Random(0), Counter(), Client(port)
    values = [None, True, 0, -1, 1e308, 10**400, '', ' ', '\ud800', '\0', [], {}, [[]], [None], ['a', 1], {'a': 1}]
    for _ in range(n):
        body = json.dumps({rng.choice(['text', 'texts', 'x', '\ud800']): rng.choice(values)}).encode()
        for _ in range(rng.choice([0, 0, 1, 3])):
            at = rng.randrange(len(body))
            body = body[:at] + bytes([rng.randrange(256)]) * rng.choice([0, 1, 1, 2]) + body[at + 1 :]
        media = rng.choice(['application/json'] * 6 + ['', 'text/plain', 'application/json; charset=big5'])
        path = rng.choice(['/predict'] * 8 + ['/generate', '/%ff', '/predict/', '//'])
        try:
            client.connection.request('POST', path, body, {'Content-Type': media})
            answer = client.connection.getresponse()
            answer.read()
            statuses[answer.status] += 1
        except Exception as error:
            statuses[type(error).__name__] += 1
            client = Client(port)
    return {str(k): v for k, v in sorted(statuses.items(), key=str)}


def sigterm(server, texts, right, n):
    "Answers and lost requests of clients while the server gets SIGTERM"
    counts = Counter()

    def ask(number):
        rng = random.Random(number)
        client = Client(server.port)
        while True:
            try:
                client.connection.connect()
            except OSError:
                return  # the server has gone: nothing was accepted
            while client.connection.sock:
                text = rng.choice(texts)
                try:
                    status, scores = client.predict(text)
                    counts['answered' if status == 200 and scores == right[text] else status] += 1
                except Exception as error:
                    counts[f'lost: {type(error).__name__}'] += 1
                    client = Client(server.port)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    time.sleep(2)
    server.process.send_signal(signal.SIGTERM)
    counts['exit status'] = server.process.wait(60)
    for thread in threads:
        thread.join()
    return dict(counts)


def measure(name, folder, texts, a):
    options, environment = VARIANTS[name]
    scores, _ = expected(folder, texts, options, environment)
    right = dict(zip(texts, scores))
    server = Server(folder, options, environment)
    res = dict(single=overhead(server, folder, texts, options, a.rounds))
    Load(server.port, texts, right, a.clients, a.seconds / a.rounds)  # the shapes are compared
    rounds = [
        [Load(server.port, texts, right, n, a.seconds / a.rounds) for n in (1, a.clients)] for _ in range(a.rounds)
    ]
    one, many = zip(*rounds)
    res['throughput'] = ratio([o.rate for o in many], [o.rate for o in one])
    res['rates'] = dict(one=st.median(o.rate for o in one), many=st.median(o.rate for o in many))
    res['p99'] = ratio([o.quantile(0.99) for o in many], [o.quantile(0.5) for o in one])
    pace = 0.8 * res['rates']['one']
    paced = [Load(server.port, texts, right, a.clients, a.seconds / a.rounds, pace) for _ in range(a.rounds)]
    res['p99_paced'] = ratio([o.quantile(0.99) for o in paced], [o.quantile(0.5) for o in one])
    loads = [*one, *many, *paced]
    res['requests'] = sum(len(o.seconds) for o in loads)
    res['errors'] = dict(sum((o.errors for o in loads), Counter()))
    res['other_bits'] = sum(o.other for o in loads)
    res['checks'] = server.metric('fastai_tl_batch_checks_total{')
    res['batches'] = server.metric('fastai_tl_batch_rows')
    res['malformed'] = malformed(server.port, a.malformed)
    res['sigterm'] = sigterm(server, texts, right, a.clients)
    res['tracebacks'] = server.tracebacks()
    return res


def show(results):
    "Print the tables of the README"
    rows = []
    for name, r in results.items():
        single = r['single']
        ms = f"{single['overhead_ms']:.1f} ({single['low']:.1f} to {single['high']:.1f})"
        cells = [ranged(r['throughput'], 1), ranged(r['p99'], 1), ranged(r['p99_paced'], 1)]
        rows.append([name, f"{single['request_ms']:.1f}", ms, *cells, r['requests'], r['other_bits'], r['errors']])
    columns = ['', 'ms a request:', 'overhead, ms:', 'throughput:', 'p99:', 'p99, paced:', 'requests:', 'other bits:']
    print(table([*columns, 'errors'], rows))
    for name, r in results.items():
        print(name, r['malformed'], r['sigterm'], 'tracebacks:', r['tracebacks'], r['checks'], flush=True)


def main():
    ap = parser(__doc__, 'rounds', 'json', rounds=3)
    ap.add_argument('--only', nargs='*', default=list(VARIANTS), choices=VARIANTS)
    ap.add_argument('--seconds', type=float, default=60, help='seconds of each load, in all rounds together')
    ap.add_argument('--clients', type=int, default=32)
    ap.add_argument('--malformed', type=int, default=10_000, help='malformed requests')
    ap.add_argument('--texts', type=int, default=400, help='different texts')
    ap.add_argument('--data', help='a table with a column `text`; without it, docstrings')
    a = ap.parse_args()
    offline()
    from fastai_tl.all import docstring_corpus, read_table

    df = read_table(a.data) if a.data else docstring_corpus()
    texts = sorted({' '.join(text.split()[:40]) for text in df.text if text.strip()})
    texts = random.Random(0).sample(texts, a.texts)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        make_bundle(Path(folder) / 'model', texts)
        for name in a.only:
            results[name] = measure(name, Path(folder) / 'model', texts, a)
            show({name: results[name]})
            write_json(a.json, results)
    show(results)


if __name__ == '__main__':
    main()
