"""Language model text on the disk: the tokens, the order, the batches, fits that resume, and bulk prediction."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from transformers import GPT2Config

from fastai_tl.all import *
from fastai_tl.core import RunError
from fastai_tl.data.streaming import TokenStream, shuffle_blocks
from fastai_tl.data.token_files import piece_ends

WORDS = 'the a film was very good bad dull fine plot actor scene slow bright ending music long short story'.split()


def texts(n, seed=0, low=2, high=12):
    rng = random.Random(seed)
    return [' '.join(rng.choices(WORDS, k=rng.randint(low, high))) + f' {i}' for i in range(n)]


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp('corpus')
    pd.DataFrame(dict(text=texts(2500))).to_json(folder / 'a.jsonl', orient='records', lines=True)
    pd.DataFrame(dict(text=texts(1500, 1))).to_csv(folder / 'b.csv', index=False)
    (folder / 'c.txt').write_text('\n'.join(texts(300, 2)))
    return folder


@pytest.fixture(scope='module')
def decoder():
    return train_tokenizer(texts(300), 400, 'decoder', max_length=64)


@pytest.fixture(scope='module')
def every(corpus):
    "All texts, read by hand"
    rows = [json.loads(line)['text'] for line in (corpus / 'a.jsonl').read_text().splitlines()]
    lines = (corpus / 'b.csv').read_text().splitlines()[1:]
    return [*rows, *lines, (corpus / 'c.txt').read_text()]


@pytest.fixture(scope='module')
def tokens(corpus, decoder, tmp_path_factory):
    return tokenize_to_file(corpus, tmp_path_factory.mktemp('tokens') / 't', decoder, n_workers=1)


def test_tokens_are_those_of_a_loop(tokens, every, decoder):
    expected = []
    ends = []
    for text in every:
        expected += decoder(text)['input_ids'] + [decoder.eos_token_id]
        ends.append(len(expected))
    assert tokens.read(0, tokens.n_tokens).tolist() == expected
    assert tokens.ends.tolist() == ends and len(tokens) == len(every)


def test_processes_give_the_same_files(corpus, decoder, tokens, tmp_path):
    two = tokenize_to_file(corpus, tmp_path / 'two', decoder, n_workers=2)
    for name in ('tokens.bin', 'ends.bin', 'header.json'):
        assert (two.path / name).read_bytes() == (tokens.path / name).read_bytes()
    assert {p.name for p in two.path.iterdir()} == {'tokens.bin', 'ends.bin', 'header.json', '.lock'}


def test_a_dataset_and_a_stream(corpus, every, decoder, tokens, tmp_path):
    from datasets import Dataset

    dataset = Dataset.from_dict(dict(body=every))
    for name, source in dict(dataset=dataset, stream=dataset.to_iterable_dataset()).items():
        found = tokenize_to_file(source, tmp_path / name, decoder, text_col='body', n_workers=1)
        assert (found.path / 'tokens.bin').read_bytes() == (tokens.path / 'tokens.bin').read_bytes()
    with pytest.raises(RunError, match='others: texts'):
        tokenize_to_file(Dataset.from_dict(dict(body=every[:-1])), tmp_path / 'dataset', decoder, text_col='body')


def test_chinese_words_are_those_in_memory(tmp_path):
    chinese = [f'這部電影很好看{i}，但是結局不好。' for i in range(50)]
    pd.DataFrame(dict(text=chinese)).to_json(tmp_path / 'zh.jsonl', orient='records', lines=True, force_ascii=False)
    tok = ChineseTokenizer()
    once = tokenize_texts_once(chinese, tok, CHINESE_RULES, progress=False)
    file = tokenize_to_file(tmp_path / 'zh.jsonl', tmp_path / 'zh', tok, rules=CHINESE_RULES)
    assert file.words == once.words and (file.read(0, file.n_tokens) == once.ids).all()
    dls = streamed_lm_dls(file, tok=tok, bs=2, seq_len=10)
    assert dls.spec.lang == 'zh-tw' and dls.vocab == texts_vocab(once)


def test_special_tokens_around_texts(every, tmp_path, corpus):
    tok = train_tokenizer(texts(300), 400, 'encoder', max_length=64)
    file = tokenize_to_file(corpus, tmp_path / 'bert', tok, n_workers=1)
    expected = [i for text in every for i in tok(text)['input_ids']]
    assert file.read(0, file.n_tokens).tolist() == expected


def test_a_long_text_is_cut_in_the_files_and_not_in_the_stream():
    rng = np.random.default_rng(0)
    lens = rng.integers(1, 50, 40)
    ends = piece_ends(7, lens, 16)
    assert set(7 + np.cumsum(lens)) <= set(ends) and (np.diff(np.append(7, ends)) <= 16).all()
    assert ends[-1] == 7 + lens.sum() and (np.diff(ends) > 0).all()


@pytest.mark.parametrize('size', [1, 7, 300, 5000, 10**9])
def test_blocks_have_each_text_once(tokens, size):
    bounds = shuffle_blocks(tokens, size)
    assert bounds[0] == 0 and bounds[-1] == len(tokens) and (np.diff(bounds) > 0).all()
    starts = np.append(0, tokens.ends)
    if size == 5000: # the rest of a text that begins in a block belongs to it
        lens = np.diff(starts[bounds])
        assert lens.max() < size + np.diff(starts).max()


def test_any_part_of_a_turned_stream(tokens):
    bounds = shuffle_blocks(tokens, 3000)
    stream = TokenStream(tokens, bounds, np.arange(len(bounds) - 1)[::2], seed=3)
    rng = random.Random(0)
    docs = np.split(tokens.read(0, tokens.n_tokens), tokens.ends[:-1])
    for epoch in range(2):
        stream.arrange(epoch, turn=rng.randrange(len(stream)))
        ring = np.roll(np.concatenate([docs[i] for i in stream.text_order()]), stream.turn)
        for _ in range(200):
            a = rng.randrange(len(stream))
            b = min(len(stream), a + 1 + rng.randrange(4000))
            assert (stream.read(a, b) == ring[a:b]).all()
        assert len(stream.cache) <= stream.keep


def test_batches_in_several_processes(tokens, decoder):
    dls = hf_streamed_lm_dls(tokens, decoder, max_length=32, bs=8)
    alone = [x.ids for x, _ in dls.train]
    dls.train.start_epoch(0)
    other = dls.train.new(num_workers=2)
    assert all(torch.equal(a, x.ids) for a, (x, _) in zip(alone, other, strict=True))


@pytest.mark.parametrize('at', [0, 17, -1])
def test_a_state_continues_with_the_next_batch(tokens, decoder, at):
    def loader():
        return hf_streamed_lm_dls(tokens, decoder, max_length=32, bs=16).train

    whole = loader()
    expected = [y for _ in range(3) for _, y in whole]
    n = at % len(whole) + len(whole)
    first, got = loader(), []
    while len(got) < n:
        for _, y in first:
            got.append(y)
            if len(got) == n:
                break
    state = json.loads(json.dumps(first.state_dict()))
    second = loader()
    second.load_state_dict(state)
    while second.epoch < 3:
        got += [y for _, y in second]
    assert len(got) == len(expected) and all(torch.equal(a, b) for a, b in zip(got, expected))


def test_one_batch_leaves_the_epoch_as_it_is(tokens, decoder):
    dls = hf_streamed_lm_dls(tokens, decoder, max_length=32, bs=8)
    first = dls.one_batch()[1]
    assert torch.equal(next(iter(dls.train))[1], first) and dls.train.epoch == 0


def small_gpt(tok):
    return GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=len(tok), n_positions=64)


class Stop(Callback):
    def __init__(self, epoch, batch):
        self.at = epoch, batch

    def before_batch(self):
        if self.training and (self.epoch, self.iter) == self.at:
            raise KeyboardInterrupt


def weights(learn):
    return [p.detach().clone() for p in learn.model.parameters()]


@pytest.mark.parametrize('kind', ['gpt', 'awd'])
def test_a_fit_that_was_stopped_ends_with_the_same_weights(kind, tokens, corpus, decoder, tmp_path):
    if kind == 'awd':
        words = tokenize_to_file(corpus / 'a.jsonl', tmp_path / 'words', n_workers=1)

    def learner():
        seed_everything(0)
        if kind == 'gpt':
            dls = hf_streamed_lm_dls(tokens, decoder, max_length=32, bs=64)
            return hf_causal_lm_learner(dls, small_gpt(decoder))
        dls = streamed_lm_dls(words, bs=16, seq_len=80)
        return awd_lm_learner(dls, dict(emb_sz=16, n_hid=24, n_layers=2))

    def fit(name, *cbs):
        learn = learner()
        with learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(3, 1e-2, cbs=[ResumableFit(tmp_path / name), *cbs])
        return learn

    whole = fit('whole')
    with pytest.raises(KeyboardInterrupt):
        fit('stopped', Stop(1, 5))
    resumed = fit('stopped')
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed)))
    first, last = whole.recorder.values[0][1], whole.recorder.values[-1][1]
    assert last < first
    if kind == 'gpt':
        whole.save_bundle(tmp_path / 'bundle')
        assert load_bundle(tmp_path / 'bundle').dls.spec == whole.dls.spec
    whole.dls.test_dl(['the film was good', 'a dull plot'] * 20).one_batch()
    whole.export(tmp_path / 'export.pkl')


def test_hidden_state_of_one_batch_is_the_beginning_of_the_next(corpus, tmp_path):
    words = tokenize_to_file(corpus / 'a.jsonl', tmp_path / 'words', n_workers=1)
    dl = streamed_lm_dls(words, bs=8, seq_len=25).train
    rows = [torch.cat(parts) for parts in zip(*[list(x) for x, _ in dl])]
    dl.start_epoch(0)
    targets = [torch.cat(parts) for parts in zip(*[list(y) for _, y in dl])]
    dl.begin_epoch(0)
    stream = torch.from_numpy(dl.stream.read(0, len(dl.stream)).astype(np.int64))
    for k, (row, target) in enumerate(zip(rows, targets)):
        assert torch.equal(row, stream[k*dl.bl:(k+1)*dl.bl]) and torch.equal(target, stream[k*dl.bl+1:(k+1)*dl.bl+1])


KILLED = '''
import sys
from fastai_tl.data import token_files
from fastai_tl.data.hf_tokenizer import load_tokenizer
token_files._SECONDS = 0
commit, n = token_files.TokenWriter.commit, int(sys.argv[4])
def dies(self, *args):
    commit(self, *args)
    if self.state['parts'] >= n:
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)
if n: token_files.TokenWriter.commit = dies
token_files.tokenize_to_file(sys.argv[1], sys.argv[2], load_tokenizer(sys.argv[3]), n_workers=2)
'''


@pytest.mark.slow
def test_tokenizing_that_was_killed(corpus, decoder, tokens, tmp_path):
    decoder.save_pretrained(tmp_path / 'tok')
    for n in (2, 0):
        args = [sys.executable, '-c', KILLED, corpus, tmp_path / 't', tmp_path / 'tok', str(n)]
        code = subprocess.run(list(map(str, args))).returncode
        assert code == (-signal.SIGKILL if n else 0)
    for name in ('tokens.bin', 'ends.bin', 'header.json'):
        assert (tmp_path / 't' / name).read_bytes() == (tokens.path / name).read_bytes()
    assert not list((tmp_path / 't').glob('*.part'))


def test_other_texts_cannot_continue(tmp_path, decoder, monkeypatch):
    from fastai_tl.data import token_files

    file = tmp_path / 'a.jsonl'
    pd.DataFrame(dict(text=texts(2500))).to_json(file, orient='records', lines=True)
    monkeypatch.setattr(token_files, '_SECONDS', 0)
    monkeypatch.setattr(token_files.TokenWriter, 'finish', lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tokenize_to_file(file, tmp_path / 't', decoder, n_workers=1)
    monkeypatch.undo()
    state = json.loads((tmp_path / 't' / 'progress.json').read_text())
    (tmp_path / 't' / 'progress.json').write_text(json.dumps(dict(state, texts_digest='0')))
    with pytest.raises(RunError, match='continued with the same texts'):
        tokenize_to_file(file, tmp_path / 't', decoder)


def test_a_damaged_file_is_an_error(tokens, tmp_path):
    import shutil

    shutil.copytree(tokens.path, tmp_path / 't')
    with open(tmp_path / 't' / 'tokens.bin', 'r+b') as file:
        file.truncate(100)
    with pytest.raises(RunError, match='tokens.bin must have'):
        TokenFile(tmp_path / 't')


needs_proc = pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='needs /proc')


def mapped_mb():
    "Memory of the pages of files that this process sees"
    lines = Path('/proc/self/status').read_text().split('\n')
    return int(next(line for line in lines if line.startswith('RssFile')).split()[1]) / 1024


def file_of_zeros(folder, n_texts, length):
    "A `TokenFile` of texts of the same length"
    n = n_texts * length
    with open(folder / 'tokens.bin', 'wb') as file:
        file.truncate(2 * n)
    np.arange(length, n + 1, length, dtype='<i8').tofile(folder / 'ends.bin')
    header = dict(format='fastai_tl.tokens', dtype='<u2', n_tokens=n, n_texts=n_texts, n_pieces=n_texts, n_words=0,
                  n_unknown=0, n_skipped=0, settings={})
    (folder / 'header.json').write_text(json.dumps(header))
    return TokenFile(folder)


@needs_proc
def test_memory_of_reading_is_given_back(tmp_path):
    "The pages in memory grow by less than 100 MB while a file of 300 MB is read"
    file = file_of_zeros(tmp_path, 1, 150_000_000)
    before, most = mapped_mb(), 0
    for start in range(0, file.n_tokens, 1 << 20):
        file.read(start, start + (1 << 20))
        most = max(most, mapped_mb())
    assert most - before < 100


@needs_proc
def test_memory_of_many_short_texts_is_given_back(tmp_path):
    "Ends and tokens of 10 million texts are 160 MB; less than 60 MB of that is in memory, at the beginning and later"
    file = file_of_zeros(tmp_path, 10_000_000, 4)
    ends, before = file.ends, mapped_mb()
    found = []

    class Watched(np.ndarray):
        "Ends that say how much is in memory after each reading"
        def __getitem__(self, key):
            values = super().__getitem__(key)
            found.append(mapped_mb())
            return values

    file.ends = ends.view(Watched)
    bounds = shuffle_blocks(file, 20_000)
    stream = TokenStream(file, bounds, np.arange(len(bounds) - 1))
    assert len(bounds) == 2001 and (stream.lens == 20_000).all() and len(found) >= 8
    for place in range(0, 2000, 10):
        stream.arrange(0).block(place)
        found.append(mapped_mb())
    assert max(found) - before < 60


# --- bulk prediction ---


@pytest.fixture(scope='module')
def bundle(tmp_path_factory):
    from small_learners import bert

    folder = tmp_path_factory.mktemp('bundle')
    tok = train_tokenizer(texts(300), 400, lowercase=True, max_length=64)
    seed_everything(0)
    dls = HFTextDataLoaders.from_lists(texts(40), ['x', 'y', 'z', 'x'] * 10, tok, bs=4, verbose=False)
    hf_classifier_learner(dls, bert(tok), metrics=[]).save_bundle(folder / 'b')
    return folder / 'b'


@pytest.mark.parametrize('kind', ['csv', 'tsv', 'jsonl', 'parquet'])
def test_predictions_are_those_of_the_predictor(bundle, tmp_path, kind):
    df = pd.DataFrame(dict(text=texts(53, 9), note=['=1', '7', None, 'é'] * 13 + ['x']))
    if kind == 'parquet':
        df.to_parquet(tmp_path / 'in.parquet')
    elif kind == 'jsonl':
        df.to_json(tmp_path / 'in.jsonl', orient='records', lines=True)
    else:
        df.to_csv(tmp_path / f'in.{kind}', index=False, sep=',' if kind == 'csv' else '\t')
    out, = predict_files(bundle, tmp_path / f'in.{kind}', tmp_path / f'out.{kind}', size=10)
    found = pd.concat(table_parts(out))
    expected = load_bundle(bundle, verbose=False).predict(df.text.tolist())
    assert found.text.tolist() == df.text.tolist()
    assert found.predicted.tolist() == expected.labels
    for k, name in enumerate('xyz'):
        assert np.allclose(found[f'p({name})'].astype(float), expected.probs[:, k], atol=1e-6)
    assert not list(tmp_path.glob('.*'))


def test_a_folder_of_files(bundle, tmp_path):
    (tmp_path / 'in').mkdir()
    for i in range(3):
        pd.DataFrame(dict(text=texts(12, i))).to_csv(tmp_path / 'in' / f'{i}.csv', index=False)
    found = predict_files(bundle, tmp_path / 'in', tmp_path / 'out', size=5)
    assert [file.name for file in found] == ['0.csv', '1.csv', '2.csv']
    for i, file in enumerate(found):
        assert pd.read_csv(file).text.tolist() == texts(12, i)


@pytest.mark.slow
def test_a_killed_process_is_an_error_and_the_others_stop(bundle, tmp_path):
    pd.DataFrame(dict(text=texts(6000))).to_csv(tmp_path / 'in.csv', index=False)
    code = f'''
from fastai_tl.all import predict_files
predict_files(r'{bundle}', r'{tmp_path / "in.csv"}', r'{tmp_path / "out.csv"}', processes=2, size=30)
'''
    main = subprocess.Popen([sys.executable, '-c', code], stderr=subprocess.PIPE, text=True)
    shards = tmp_path / '.out.csv.shards'
    end = time.monotonic() + 60
    while len(list(shards.glob('0*'))) < 3 and time.monotonic() < end:
        time.sleep(.02)
    workers = [int(pid) for pid in subprocess.run(['pgrep', '-P', str(main.pid)], capture_output=True, text=True)
               .stdout.split()]
    os.kill(workers[0], signal.SIGKILL)
    assert 'one that was killed (signal 9)' in main.communicate(timeout=30)[1]
    n_kept = len(list(shards.glob('0*')))
    assert 3 <= n_kept < 200
    for pid in workers:
        assert not os.path.exists(f'/proc/{pid}') or 'Z' in open(f'/proc/{pid}/stat').read().split()[2]
    main = subprocess.Popen([sys.executable, '-c', code])
    while len(list(shards.glob('0*'))) < n_kept + 3 and time.monotonic() < end:
        time.sleep(.02)
    main.kill()
    main.wait()
    predict_files(bundle, tmp_path / 'in.csv', tmp_path / 'out.csv', size=30)
    predict_files(bundle, tmp_path / 'in.csv', tmp_path / 'quiet.csv', size=30)
    assert (tmp_path / 'out.csv').read_bytes() == (tmp_path / 'quiet.csv').read_bytes()


def test_an_error_in_another_process_names_the_row(bundle, tmp_path, monkeypatch):
    from fastai_tl.deploy import bulk_prediction as bulk

    file = tmp_path / 'in.jsonl'
    pd.DataFrame(dict(text=['good'] * 30 + [None])).to_json(file, orient='records', lines=True)

    def in_this_process(plan_file, n):
        plan = json.loads(plan_file.read_text())
        plan_file.write_text(json.dumps(dict(plan, pid=os.getppid())))
        for k in range(n):
            try:
                bulk.run_worker(plan_file, k)
            except SystemExit as error:
                bulk._raise_error_of(plan_file, k, error.code)

    monkeypatch.setattr(bulk, '_run_processes', in_this_process)
    with pytest.raises(DataError, match='a missing one in row 30'):
        predict_files(bundle, file, tmp_path / 'out.csv', processes=2, size=10)


def test_predictions_of_all_blocks_in_order(tokens, decoder):
    "As many rows as the validation set has blocks, each with its own predictions"
    dls = hf_streamed_lm_dls(tokens, decoder, max_length=64, bs=3)
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=len(decoder), n_positions=64)
    learn = hf_causal_lm_learner(dls, config)
    blocks = dls.valid.dataset
    with learn.no_bar():
        preds, targets = learn.get_preds()
    assert len(preds) == len(targets) == len(blocks) > 2 * len(dls.valid)
    for i in range(len(blocks)):
        x, y = dls.valid.do_batch([dls.valid.do_item(i)])
        assert torch.equal(torch.as_tensor(targets[i]), y[0])
        assert torch.allclose(learn.model(x)[0].softmax(-1), torch.as_tensor(preds[i]), atol=1e-5)
