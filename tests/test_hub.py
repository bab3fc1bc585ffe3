"""Bundles on the Hugging Face hub, against a local stand-in (`hub_server.py`): what is pushed is what is loaded, bit by
bit; repositories of strangers run no code; every error says what to do."""

import contextlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastai_tl.all import *
from fastai_tl.core import FastaiTLError
from fastai_tl.deploy.manifest import bundle_folder
from fastai_tl.deploy.model_card import CARD_TASKS, markdown_text
from hub_server import HubServer
from repo import ROOT, benchmark
from small_learners import LABELS, MAKERS, TEXTS

kinds = benchmark('trust', 'kinds')
hostile = benchmark('trust')


@pytest.fixture(scope='module')
def hub():
    with HubServer() as server:
        yield server


class Client:
    "A process that calls functions of `deploy.hub_files`"

    def __init__(self, env, cwd):
        path = os.pathsep.join([str(ROOT), str(ROOT/'tests')])
        self.process = subprocess.Popen([sys.executable, str(ROOT/'tests'/'hub_client.py')], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True, env={**env, 'PYTHONPATH': path}, cwd=cwd)

    def __call__(self, name, *args, **kwargs):
        self.process.stdin.write(json.dumps([name, list(map(str, args)), kwargs]) + '\n')
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait(60)


@contextlib.contextmanager
def client_of(hub, home, cwd, **env):
    client = Client(hub.env(home, **env), cwd)
    try:
        yield client
    finally:
        client.close()


@pytest.fixture(scope='module')
def client(hub, tmp_path_factory):
    home = tmp_path_factory.mktemp('home')
    with client_of(hub, home, tmp_path_factory.mktemp('cwd')) as made:
        yield made


def refused(answer, *words):
    "Check that an answer is an error of the package which has some words"
    assert answer.get('is_ours'), answer
    for word in words:
        assert word in answer['message'], (word, answer['message'])


@pytest.fixture(scope='module')
def learn(small_tokenizers):
    return MAKERS['classifier'](small_tokenizers)


@pytest.fixture(scope='module')
def bundle(tmp_path_factory):
    "The smallest folder with the form of a bundle"
    folder = tmp_path_factory.mktemp('small')/'bundle'
    with bundle_folder(folder, {}) as made:
        (made/'spec.json').write_text('{"task": "classification"}')
        (made/'model.safetensors').write_bytes(bytes(5000))
    return folder


# what is pushed is what is loaded


@pytest.fixture(scope='module')
def round_trip(hub, tmp_path_factory):
    path = os.pathsep.join([str(ROOT), str(ROOT/'tests')])
    folder = tmp_path_factory.mktemp('round_trip')
    env = {**hub.env(folder/'home'), 'PYTHONPATH': path}
    run = subprocess.run([sys.executable, '-W', 'ignore', str(ROOT/'tests'/'hub_round_trip.py'), str(folder)], env=env,
                         capture_output=True, text=True, cwd=folder)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_what_is_pushed_is_what_is_loaded(round_trip):
    same = {name: value for name, value in round_trip.items() if name.endswith(' same')}
    assert len(same) == 6 and all(same.values()), same


def test_a_branch_and_a_commit_keep_their_model(round_trip):
    assert round_trip['branch precision'] == 'int8' and round_trip['branch temperature'] == 2
    assert round_trip['main precision'] == 'fp32'


def test_a_bundle_replaces_one_of_other_files(round_trip, hub):
    names = round_trip['pair files']
    assert 'forward.safetensors' in names and 'model.safetensors' not in names
    repo = hub.repos['me/ulmfit_classifier']
    assert repo.commits[repo.branches['main']]['README.md'] == b'# Both directions'


def test_the_lines_of_a_card_run(round_trip):
    assert sum(name.endswith(' code') for name in round_trip) == 9


def test_the_command_line_takes_names_of_the_hub(round_trip):
    assert round_trip['cli'] == round_trip['cli expected']
    assert round_trip['cli report'] and round_trip['served']


def test_only_one_new_repository_is_private(round_trip, hub):
    assert [name for name, repo in hub.repos.items() if repo.private] == ['me/multilabel']


def test_the_pushed_card_has_the_scores(round_trip, hub):
    from huggingface_hub import ModelCard

    repo = hub.repos['me/classifier']
    card = ModelCard(repo.commits[round_trip['classifier commit']]['README.md'].decode())
    assert {'accuracy', 'f1'} <= {o.metric_type for o in card.data.eval_results}
    assert "load_bundle('hf://me/classifier')" in card.content
    assert not any(text in card.content for text in TEXTS if len(text) > 40)


# download and upload


def test_a_commit_is_downloaded_once(hub, client, bundle):
    commit = hub.add('me/once', bundle)
    folder = Path(client('download_bundle', 'hf://me/once')['value'])
    names = sorted(p.name for p in folder.iterdir() if p.name[0] != '.')
    assert names == ['bundle.json', 'model.safetensors', 'spec.json']
    for name in ('spec.json', 'model.safetensors'):
        assert (folder/name).read_bytes() == (bundle/name).read_bytes()
    n = len(hub.requests)
    assert Path(client('download_bundle', f'hf://me/once@{commit}')['value']) == folder
    assert len(hub.requests) == n  # a commit never changes
    client('download_bundle', 'hf://me/once')
    assert len(hub.requests) == n + 1  # where the branch is now
    (folder/'model.safetensors').unlink()
    assert Path(client('download_bundle', f'hf://me/once@{commit}')['value']) == folder
    assert (folder/'model.safetensors').read_bytes() == (bundle/'model.safetensors').read_bytes()


def test_documents_are_not_downloaded_and_torch_is_not_needed(hub, client, bundle):
    files = {p.name: p.read_bytes() for p in bundle.iterdir()}
    hub.add('me/documents', {**files, 'README.md': b'# Hi', 'notes/a.pdf': b'%PDF', '.gitattributes': b'x'})
    answer = client('download_bundle', 'me/documents')
    assert not (Path(answer['value'])/'README.md').exists() and not answer['torch']


def test_nothing_is_written_outside_the_cache(hub, bundle, tmp_path):
    hub.add('me/outside', bundle)
    for name in ('cwd', 'user'):
        (tmp_path/name).mkdir()
    with client_of(hub, tmp_path/'cache', tmp_path/'cwd', HOME=str(tmp_path/'user'), USERPROFILE=str(tmp_path/'user'),
                   PYTHONDONTWRITEBYTECODE='1', XDG_CACHE_HOME=str(tmp_path/'user')) as client:
        assert 'value' in client('download_bundle', 'hf://me/outside')
    assert not [*(tmp_path/'cwd').rglob('*'), *(tmp_path/'user').rglob('*')]


def test_the_branch_is_used_from_the_cache_without_a_network(hub, bundle, tmp_path):
    commit = hub.add('me/offline', bundle)
    with client_of(hub, tmp_path/'cache', tmp_path) as client:
        folder = client('download_bundle', 'hf://me/offline')['value']
        hub.is_down = True
        try:
            answer = client('download_bundle', 'hf://me/offline')
            assert answer['value'] == folder and commit in answer['warnings'][0]
            refused(client('download_bundle', 'hf://me/offline@other'), 'must be reached')
        finally:
            hub.is_down = False
    with client_of(hub, tmp_path/'cache', tmp_path, HF_HUB_OFFLINE='1') as client:
        answer = client('download_bundle', 'hf://me/offline')
        assert answer['value'] == folder and not answer['warnings']
        refused(client('download_bundle', 'hf://me/once'), 'HF_HUB_OFFLINE')
        refused(client('upload_bundle', bundle, 'me/offline'), 'HF_HUB_OFFLINE')
    with client_of(hub, tmp_path/'cache', tmp_path, HF_ENDPOINT='http://127.0.0.1:9') as client:
        answer = client('download_bundle', 'hf://me/offline')
        assert answer['value'] == folder and len(answer['warnings']) == 1
        refused(client('download_bundle', 'hf://me/once'), 'must be reached', 'connection')


def test_errors_say_what_to_do(hub, client, bundle):
    hub.add('me/gated', bundle, gated=True)
    hub.add('me/private', bundle, private=True)
    hub.add('me/bert', {'config.json': b'{}', 'model.safetensors': b'x'})
    refused(client('download_bundle', 'hf://me/nothing'), 'me/nothing must be a repository', 'private')
    refused(client('download_bundle', 'hf://me/gated@no'), "'no'", 'branch, a tag or a commit')
    refused(client('download_bundle', 'hf://me/bert'), 'must be a bundle', "from_pretrained('me/bert')")
    refused(client('download_bundle', 'hf://a b/c'), 'hf://user/model')
    refused(client('upload_bundle', bundle, 'you/model'), 'allowed to write', 'token')
    refused(client('upload_bundle', bundle.parent, 'me/model'), 'must be a bundle')
    assert 'value' in client('download_bundle', 'hf://me/private')


def test_errors_without_a_login(hub, bundle, tmp_path):
    with client_of(hub, tmp_path/'cache', tmp_path, token=None) as client:
        n = len(hub.requests)
        refused(client('upload_bundle', bundle, 'me/new'), 'hf auth login')
        assert len(hub.requests) == n
        refused(client('download_bundle', 'hf://me/gated'), 'gated', 'conditions')
        refused(client('download_bundle', 'hf://me/private'), 'private', 'hf auth login')
    with client_of(hub, tmp_path/'cache', tmp_path, token='hf_wrong') as client:
        refused(client('upload_bundle', bundle, 'me/new'), 'hf auth login')


def test_an_upload_replaces_only_its_own(hub, client, bundle):
    other = {**{p.name: p.read_bytes() for p in bundle.iterdir()}, 'README.md': b'# Mine'}
    hub.add('me/mine', other)
    assert 'value' in client('upload_bundle', bundle, 'me/mine')
    repo = hub.repos['me/mine']
    assert repo.commits[repo.branches['main']]['README.md'] == b'# Mine'
    hub.add('me/other', {'data.csv': b'a', 'train.py': b'pass'})
    refused(client('upload_bundle', bundle, 'me/other'), 'something else', 'train.py')
    assert len(hub.repos['me/other'].commits) == 2
    hub.add('me/more', {**other, 'train.py': b'pass'})
    refused(client('upload_bundle', bundle, 'me/more'), 'train.py')
    assert 'value' in client('upload_bundle', bundle, 'me/mine', branch='v2', card='# Two', message='The second')
    assert repo.commits[repo.branches['v2']]['README.md'] == b'# Two' and repo.messages[-1] == 'The second'
    assert repo.commits[repo.branches['main']]['README.md'] == b'# Mine'


# repositories of strangers


def with_files(bundle, **changes):
    files = {p.relative_to(bundle).as_posix(): p.read_bytes() for p in bundle.rglob('*') if p.is_file()}
    return {**files, **changes}


def sealed(contents, **changes):
    "Files with a manifest that lists all of them, as an attacker can write it"
    import hashlib

    from fastai_tl.files import digest

    listed = {name: dict(size=len(data), checksum=hashlib.blake2b(data, digest_size=16).hexdigest())
              for name, data in contents.items() if name != 'bundle.json'}
    manifest = {**json.loads(contents['bundle.json']), 'files': listed, **changes}
    manifest.pop('checksum', None)
    return {**contents, 'bundle.json': json.dumps({**manifest, 'checksum': digest(manifest)}).encode()}


BAD_NAMES = ['../evil.json', '/tmp/evil.json', 'a/../../evil.json', '.hidden.json', 'model.py', 'weights.bin',
             'a\\b.json', 'adapter_model.safetensors', 'C:evil.json', 'a//b.json', './a.json', 'weights.pt', 'a.pkl']


@pytest.mark.parametrize('name', BAD_NAMES)
def test_names_that_leave_the_folder_or_can_hold_code(name, hub, client, bundle, tmp_path):
    payload = pickle.dumps(kinds.Payload(tmp_path))
    hub.add('evil/name', sealed({**with_files(bundle), name: payload}))
    n = len(hub.requests)
    refused(client('download_bundle', 'hf://evil/name'))
    fetched = [r for r in hub.requests[n:] if 'resolve' in r]
    assert all(r.endswith('/bundle.json') for r in fetched)  # nothing else was asked for
    assert not (tmp_path/'pwned').exists()


def test_files_that_are_not_listed(hub, client, bundle, tmp_path):
    for name in ('pytorch_model.bin', 'modeling_evil.py', 'extra.safetensors', 'data.pkl'):
        hub.add('evil/extra', with_files(bundle, **{name: pickle.dumps(kinds.Payload(tmp_path))}))
        refused(client('download_bundle', 'hf://evil/extra'), 'nothing else', name)


def test_sizes_are_compared_before_anything_is_downloaded(hub, client, bundle):
    hub.add('evil/sizes', bundle)
    repo = hub.repos['evil/sizes']
    claims = [('model.safetensors', 10**13), ('model.safetensors', 0), ('bundle.json', 10**9), ('bundle.json', None)]
    for name, size in claims:
        repo.claimed = {name: size}
        n = len(hub.requests)
        refused(client('download_bundle', 'hf://evil/sizes'), name)
        assert not any('model.safetensors' in r for r in hub.requests[n:])
    hub.add('evil/missing', {k: v for k, v in with_files(bundle).items() if k != 'model.safetensors'})
    refused(client('download_bundle', 'hf://evil/missing'), 'model.safetensors', 'missing')
    files = sealed(with_files(bundle))
    manifest = json.loads(files['bundle.json'])['files']
    manifest['model.safetensors']['size'] = 10**15
    hub.add('evil/space', sealed(files, files=manifest))
    hub.repos['evil/space'].claimed = {'model.safetensors': 10**15}
    refused(client('download_bundle', 'hf://evil/space'), 'space')


def test_manifests_that_are_none(hub, client, bundle):
    for content in (b'', b'[]', b'{"format": "fastai_tl.bundle"}', b'\xff\xfe', b'[' * 10**6, b'{"a": 1, "a": 2}'):
        hub.add('evil/manifest', with_files(bundle, **{'bundle.json': content}))
        refused(client('download_bundle', 'hf://evil/manifest'))
    files = with_files(bundle)
    hub.add('evil/manifest', {**files, 'bundle.json': files['bundle.json'].replace(b'"size"', b'"sise"')})
    refused(client('download_bundle', 'hf://evil/manifest'), 'checksum')


def test_a_hub_that_names_no_commit(hub, client, bundle):
    hub.add('evil/sha', bundle)
    repo = hub.repos['evil/sha']
    for sha in ('../../../../evil', 'main', 'A'*40):
        repo.commits[sha] = with_files(bundle)
        repo.branches['main'] = sha
        refused(client('download_bundle', 'hf://evil/sha'))


@pytest.fixture(scope='module')
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp('bases')
    hostile.make_bases(folder)
    return folder


# a sample of the kinds of hostile bundle: every 25th
KINDS = [name for i, name in enumerate(sorted(kinds.KINDS)) if i % 25 == 3]


@pytest.mark.slow
@pytest.mark.parametrize('name', KINDS)
def test_hostile_bundles_from_the_hub_are_treated_as_local_ones(name, bases, hub, client, tmp_path):
    base, change = kinds.KINDS[name]
    folder, outside = tmp_path/'bundle', tmp_path/'outside'
    shutil.copytree(bases/base, folder)
    outside.mkdir()
    for file in ('secret.json', 'vocab.txt', 'weights.safetensors', 'w.bin'):
        (outside/file).write_text('{}')
    change(folder, outside)

    def result(path):
        try:
            return 'used' if hostile.use(path) else 'used'
        except FastaiTLError:
            return 'refused'

    local = result(folder)
    try:
        hub.add('evil/bundle', folder)
    except OSError:  # such as a file of 1 TB
        pytest.skip('cannot be in a repository')
    answer = client('download_bundle', 'hf://evil/bundle')
    assert 'value' in answer or answer['is_ours'], answer
    from_hub = result(answer['value']) if 'value' in answer else 'refused'
    has_link = any(p.is_symlink() for p in folder.rglob('*'))
    assert from_hub == local or has_link  # a link becomes a file on the hub
    assert not (outside/'pwned').exists()


def test_changed_weights_differ_from_their_checksum(hub, client, learn, tmp_path):
    files = with_files(learn.save_bundle(tmp_path/'bundle'))
    data = bytearray(files['model.safetensors'])
    data[-1] ^= 1
    hub.add('evil/weights', {**files, 'model.safetensors': bytes(data)})
    folder = client('download_bundle', 'hf://evil/weights')['value']
    with pytest.raises(RunError, match='checksum'):
        load_bundle(folder)


# model cards


@pytest.fixture(scope='module')
def named(small_tokenizers):
    "A classifier whose classes have names that are Markdown and HTML"
    names = {'a': 'x|y\n# title', 'b': '<script>alert(1)</script>', 'c': '`c` [l](http://x) $m$ é\x1b[31m \ud800'}
    return MAKERS['classifier'](small_tokenizers, [names[o] for o in LABELS])


def test_names_of_classes_are_shown_as_they_are(named):
    MarkdownIt = pytest.importorskip('markdown_it').MarkdownIt
    card = model_card(named, named.evaluate(), 'me/model')
    page = MarkdownIt('commonmark', dict(html=True)).enable('table').render(card.text)
    assert '<script' not in page and '<a ' not in page and '\x1b' not in page
    assert page.count('<h1>') == 1 and page.count('<h2>') == 6
    assert '<td>x|y\\n# title</td>' in page.replace(' style="text-align:left"', '')
    assert len(re.findall('<tr>', page)) == 4 + len(card_rows(card))
    str(card).encode('utf-8')


def card_rows(card):
    "The rows of the first table"
    lines = card.text.split('## Evaluation')[1].split('By class')[0].splitlines()
    return [line for line in lines if line.startswith('|')][2:] + ['header']


def test_a_card_has_the_scores_and_intervals_of_the_report(learn):
    ev = learn.evaluate()
    text = str(model_card(learn, ev))
    report = ev.report()
    for name in ('accuracy', 'MCC'):
        row = report.loc[name]
        assert f'| {name} | {row.score:.3f} | {row.low:.3f} | {row.high:.3f} |' in text
    row = report.iloc[0]
    assert f'| {row.precision:.3f} | {row.recall:.3f} | {row.f1:.3f} | {row.low:.3f} | {row.high:.3f} | ' in text
    assert f"expected calibration error {ev.calibration()['ece']:.3f}" in text


def test_the_metadata_are_those_of_huggingface_hub(learn):
    from huggingface_hub import metadata_eval_result

    ev = learn.evaluate()
    card = model_card(learn, ev, 'me/model', evaluated_on='test rows', license='mit', language='de')
    index = card.data.to_dict()['model-index']
    accuracy = next(o for o in index[0]['results'][0]['metrics'] if o['type'] == 'accuracy')
    expected = metadata_eval_result(
        model_pretty_name='model', task_pretty_name='Text classifier', task_id='text-classification',
        metrics_pretty_name='accuracy', metrics_id='accuracy', metrics_value=round(ev.accuracy, 6),
        dataset_pretty_name='test rows', dataset_id='unknown')['model-index']
    del expected[0]['results'][0]['metrics'][0]['verified']
    assert [{**index[0], 'results': [{**index[0]['results'][0], 'metrics': [accuracy]}]}] == expected
    assert (card.data.license, card.data.language, card.data.library_name) == ('mit', 'de', 'fastai_tl')
    assert 'which may have been used' not in str(card)


TASKS = 'multilabel regression tagger answerer causal_lm masked_lm t5 ulmfit_classifier ulmfit_lm'.split()


@pytest.mark.parametrize('name', TASKS)
def test_every_task_has_a_card(name, small_tokenizers):
    learn = MAKERS[name](small_tokenizers)
    has_scores = name in ('multilabel', 'regression', 'tagger', 'answerer', 'ulmfit_classifier')
    ev = learn.evaluate() if has_scores else None
    card = model_card(learn, ev)
    assert card.data.pipeline_tag == CARD_TASKS[learn.dls.spec.task].tag
    assert ('This card has no scores' in str(card)) == (not has_scores)
    assert bool(card.data.eval_results) == has_scores
    n = len(learn.dls.train.dataset)
    assert f'- Size: {n:,} ' in str(card)


def test_a_card_of_a_bundle_has_its_versions(learn, tmp_path):
    plan = learn.transfer_plan(2)
    folder = learn.save_bundle(tmp_path/'bundle')
    text = str(model_card(folder, plan=plan, data='Films.', limits='Not for medicine.'))
    versions = json.loads((folder/'bundle.json').read_text())['versions']
    assert f"torch {versions['torch']}" in text and 'Films.' in text and 'Not for medicine.' in text
    assert plan.explain().splitlines()[0] in text
    assert str(model_card(load_bundle(folder), plan=plan, data='Films.', limits='Not for medicine.')) == text


def test_energy_is_in_the_card(learn):
    learn.energy = Energy(10., 5., 1e-3, 5e-4, 'estimated from constants', 'Taiwan', 1)
    try:
        card = model_card(learn)
    finally:
        del learn.energy
    assert card.data.to_dict()['co2_eq_emissions'] == dict(emissions=.5, source='estimated from constants',
                                                           training_type='fine-tuning')
    assert 'estimated from constants' in card.text and '0.001 kWh' in card.text


def test_wrong_arguments_of_a_card(learn):
    for kwargs in (dict(evaluation=.9), dict(plan=3), dict(evaluation='good')):
        with pytest.raises(FastaiTLError):
            model_card(learn, **kwargs)
    with pytest.raises(FastaiTLError, match='a Learner'):
        model_card(3)


def test_markdown_text_is_one_line():
    for text in ('a\nb', 'a\r\n|b', '# a', '\u2028x', 'é\ud800'):
        line = markdown_text(text)
        assert len(line.splitlines()) == 1 and line.encode('utf-8')
