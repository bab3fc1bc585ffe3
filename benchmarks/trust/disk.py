"""Full disks and folders that can only be read, wherever the package writes.

Each place writes something good first. Then the disk is full, or is mounted read-only, and the same place writes again.
The error must be the package's own, must name a file, and what was there before must be whole. On Linux as root each
place has a small file system in memory of its own (tmpfs); the limits are real."""

import contextlib
import hashlib
import io
import os
import shutil
import subprocess
import tempfile
import time
import warnings
from pathlib import Path

import kill
from kill import TOKENIZER, quiet, texts

SIZE = 6 << 20


class Disk:
    "A small file system in memory"

    def __init__(self, path):
        self.path = path

    def __enter__(self):
        self.path.mkdir()
        self.mount('size=' + str(SIZE))
        return self

    def __exit__(self, *args):
        subprocess.run(['umount', '-l', str(self.path)], check=False)
        self.path.rmdir()

    def mount(self, options):
        subprocess.run(['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', str(self.path)], check=True)

    def fill(self, leave):
        "Fill the disk, apart from some bytes"
        with contextlib.suppress(OSError), open(self.path / 'filler', 'wb', 0) as f:
            free = shutil.disk_usage(self.path).free
            f.write(bytes(max(0, free - leave)))

    def empty(self):
        (self.path / 'filler').unlink(missing_ok=True)

    def read_only(self, on):
        option = 'remount,ro' if on else 'remount,rw'
        subprocess.run(['mount', '-o', option, str(self.path)], check=True)


def contents(folder):
    return {
        p.relative_to(folder).as_posix(): hashlib.blake2b(p.read_bytes()).hexdigest()
        for p in folder.rglob('*')
        if p.is_file() and p.name not in ('filler', 'settings.ini')
    }


# --- what writes: functions of a folder ---

_made = {}


def made(make, *args):
    "Make a Learner or the like once"
    key = make.__name__, *args
    if key not in _made:
        _made[key] = make(*args)
    return _made[key]


def hf():
    from fastai_tl.all import HFTextDataLoaders, hf_classifier_learner, seed_everything
    from transformers import BertConfig

    seed_everything(0)
    tok = TOKENIZER['encoder']
    dls = HFTextDataLoaders.from_lists(texts(), ['a', 'b'] * 20, tok, bs=8, verbose=False)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    return hf_classifier_learner(dls, BertConfig(vocab_size=len(tok), pad_token_id=tok.pad_token_id, **sizes))


def lm():
    from fastai_tl.all import awd_lm_learner, language_model_dls, texts_vocab, tokenize_texts_once

    tokens = tokenize_texts_once(texts(60), progress=False)
    dls = language_model_dls(tokens, texts_vocab(tokens, min_freq=1), bs=4, seq_len=10)
    return awd_lm_learner(dls, dict(emb_sz=16, n_hid=16, n_layers=1))


def awd():
    from fastai_tl.all import awd_classifier_learner, classifier_dls, texts_vocab, tokenize_texts_once

    tokens = tokenize_texts_once(texts(), progress=False)
    vocab = texts_vocab(tokens, min_freq=1)
    dls = classifier_dls(tokens, ['a', 'b'] * 20, 'classification', list(range(30)), list(range(30, 40)), vocab, bs=8)
    return awd_classifier_learner(dls, 'classification', 2, dict(emb_sz=16, n_hid=16, n_layers=1))


def evaluation(task='classification'):
    import numpy as np
    from fastai_tl.all import Evaluation

    rng = np.random.default_rng(0)
    probs = rng.random(40)
    if task == 'regression':
        return Evaluation.from_preds(probs, rng.random(40))
    return Evaluation.from_preds(np.stack([probs, 1 - probs], 1), rng.integers(0, 2, 40), ['a', 'b'])


def frame():
    import pandas as pd

    return pd.DataFrame(dict(text=texts(), label=['a', 'b'] * 20))


def resumable(folder, epochs=2, **kwargs):
    "One more epoch for each call, so that the later calls have something to write"
    from fastai_tl.all import ResumableFit

    learn = hf()
    file = folder / 'checkpoint.safetensors'
    kept = file.read_bytes() if file.exists() else None
    with quiet(learn):
        if kept is None:
            learn.fit(1, 1e-3, cbs=ResumableFit(folder / 'first.safetensors'))
            shutil.copyfile(folder / 'first.safetensors', file)
            return
        learn.fit(1, 1e-3, cbs=ResumableFit(folder / 'second.safetensors'))


def killed_fit(folder):
    "A fit of three epochs that was stopped after the first"
    from fastai.callback.core import Callback
    from fastai_tl.all import BestEpoch, ResumableFit

    class Stop(Callback):
        order = ResumableFit.order + 1

        def after_epoch(self):
            if self.epoch == 0 and not (folder / 'stopped').exists():
                (folder / 'stopped').touch()
                raise KeyboardInterrupt

    learn = hf()
    with quiet(learn), contextlib.suppress(KeyboardInterrupt):
        learn.fit(3, 1e-3, cbs=[ResumableFit(folder / 'checkpoint.safetensors'), BestEpoch(), Stop()])


def ulmfit(stage):
    def write(folder):
        from fastai_tl.all import ULMFiT

        sizes = dict(emb_sz=16, n_hid=16, n_layers=1)
        run = ULMFiT(folder / 'run', config=sizes, progress=False, min_freq=1, seq_len=10)
        run.pretrain(texts(), epochs=1, bs=8)
        if not (folder / 'run' / 'first').exists():
            (folder / 'run' / 'first').touch()
            return
        if stage == 'domain':
            run.finetune_lm(texts(50, seed=5), epochs=1, bs=8)
        else:
            run.classifier(frame(), epochs=[1, 1, 1], bs=8, encoder='general')

    return write


def tokens(folder):
    from fastai_tl.all import tokenize_texts_once

    n = len(list((folder / 'cache').glob('*'))) if (folder / 'cache').exists() else 0
    tokenize_texts_once(texts(20 + n), cache_dir=folder / 'cache', progress=False)


def corpus(folder):
    import pandas as pd
    from fastai_tl.datasets import corpora

    rows = pd.DataFrame(dict(text=[f'{i} {hashlib.sha256(str(i).encode()).hexdigest()}' for i in range(2000)]))
    corpora._cached('general', ['trial'], lambda: rows, folder, refresh=True)


def states(folder):
    from fastai_tl.all import StateStore

    StateStore([100] * 10, 64, where='disk', folder=folder).open().close()


def prefix(folder):
    from fastai_tl.all import CachedPrefix

    learn = hf()
    learn.freeze_to(-1)
    with quiet(learn):
        learn.fit(1, 1e-3, cbs=CachedPrefix(where='disk', folder=folder, verbose=False))


def folds(folder):
    import numpy as np
    from fastai_tl.all import Evaluation, cross_validate

    def make(train, valid, seed):
        return Evaluation.from_preds(np.full((len(valid), 2), 0.5), (valid.label == 'b').astype(int), ['a', 'b'])

    n = len(list(folder.glob('folds*')))
    cross_validate(make, frame(), n_folds=2, out=folder / f'folds{n}', progress=False)


def callback(every):
    def write(folder):
        from fastai_tl.all import EvaluationCallback

        learn = hf()
        with quiet(learn):
            figures = ['confusion_matrix']
            learn.fit(1, 1e-3, cbs=EvaluationCallback(folder / 'report', every=every, figures=figures, dpi=30))
        assert len(learn.recorder.values) == 1, 'the training ended'

    return write


def model_evaluator(folder):
    from fastai_tl.all import ModelEvaluator

    learn = hf()
    with contextlib.redirect_stdout(io.StringIO()):
        model = learn.model.hf.eval()
        batch = dict(TOKENIZER['encoder'](texts(8), return_tensors='pt', padding=True))
        import torch

        ModelEvaluator(model, [dict(batch, labels=torch.tensor([0, 1] * 4))], ['a', 'b'], folder=folder).evaluate()


def command(*arguments):
    "A command of the command line: its exit status must be 1 and its error one line, without a traceback"

    def write(folder):
        from fastai_tl.cli import main
        from fastai_tl.core import RunError

        err = io.StringIO()
        if not (folder / 'data.csv').exists():
            frame().to_csv(folder / 'data.csv', index=False)
            sizes = 'emb_sz = 16\nn_hid = 16\nn_layers = 1\nlm_epochs = 1\nepochs = 1 1 1\nrates = 0.05\nlm_bs = 8\n'
            (folder / 'settings.ini').write_text(f'[fastai_tl]\n{sizes}lang = zh-tw\n')
            return
        filled = [o.format(folder=folder) for o in arguments]
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
            status = main(filled)
        if status:
            raise RunError(err.getvalue().removeprefix('fastai-tl: '), '', '')

    return write


def figure(folder):
    from fastai_tl.all import save_png

    save_png(evaluation().plot_confusion(), folder / 'figure.png', dpi=100)


def stage_only(folder):
    from fastai_tl.all import RunStage

    n = len(list(folder.glob('stage*')))
    stage = RunStage(folder / f'stage{n}')
    stage.begin(dict(a=1))
    stage.close()


QUICK = ['quickstart', '--data', '{folder}/data.csv', '--cfg', '{folder}/settings.ini', '--quiet']


def places():
    "What writes, by name"
    import numpy as np
    import pandas as pd
    import torch
    from fastai_tl.all import Encoder, HFEncoder, TextSpec, save_tree, write_json
    from fastai_tl.files import write_csv

    rows = pd.DataFrame(dict(text=texts(200), p=np.arange(200) / 7))
    big = dict(a=torch.randn(20_000))
    spec = made(hf).dls.spec
    assert isinstance(spec, TextSpec)
    return dict(
        write_json=lambda f: write_json(f / 'a.json', list(range(5000))),
        write_json_new_folder=lambda f: write_json(f / f'{len(list(f.iterdir()))}' / 'a.json', list(range(5000))),
        write_csv=lambda f: write_csv(rows, f / 'predictions.csv'),
        save_tree=lambda f: save_tree(f / 'a.safetensors', big),
        spec=lambda f: spec.save(f / 'spec.json'),
        figure=figure,
        encoder=lambda f: Encoder.from_learner(made(lm)).save(f / 'encoder.safetensors'),
        hf_encoder=lambda f: HFEncoder.from_model(made(hf).model, made(hf).dls.tokenizer).save(f / 'hf.safetensors'),
        bundle_transformer=lambda f: made(hf).save_bundle(f / 'bundle'),
        bundle_transformer_int8=lambda f: made(hf).save_bundle(f / 'bundle', precision='int8'),
        bundle_awd_lstm=lambda f: made(awd).save_bundle(f / 'bundle'),
        bundle_language_model=lambda f: made(lm).save_bundle(f / 'bundle'),
        checkpoint_new=resumable,
        checkpoint_next_epoch=killed_fit,
        stage=stage_only,
        ulmfit_language_model=ulmfit('domain'),
        ulmfit_classifier=ulmfit('classifier'),
        report=lambda f: evaluation().save(f / 'report', figures=['confusion_matrix'], dpi=40),
        report_without_figures=lambda f: evaluation().save(f / 'report', figures=[]),
        report_regression=lambda f: evaluation('regression').save(f / 'report', figures=[]),
        evaluation_callback_fit=callback('fit'),
        evaluation_callback_epoch=callback('epoch'),
        model_evaluator=model_evaluator,
        token_cache=tokens,
        corpus_cache=corpus,
        states_on_disk=states,
        cached_prefix=prefix,
        folds=folds,
        command_quickstart=command(*QUICK, '--out', '{folder}/out'),
        command_quickstart_table=command(*QUICK, '--out', '{folder}/out', '--table', '{folder}/table.json'),
    )


# --- the trial ---


def conditions(disk):
    "Ways to make a disk unwritable, with how to undo them"
    return dict(
        full=(lambda: disk.fill(0), disk.empty),
        almost_full=(lambda: disk.fill(12 << 10), disk.empty),
        read_only=(lambda: disk.read_only(True), lambda: disk.read_only(False)),
    )


def try_place(write, disk, condition):
    "Write something good, then under a condition, then again; return what happened"
    from fastai_tl.core import FastaiTLError

    folder = disk.path / 'place'
    folder.mkdir()
    write(folder)
    before = contents(folder)
    begin, end = conditions(disk)[condition]
    begin()
    res = dict(outcome='wrote', said='')
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        try:
            write(folder)
        except FastaiTLError as error:
            res = dict(outcome='own error', said=error.message[:300])
        except Exception as error:
            res = dict(outcome='foreign error', said=f'{type(error).__module__}.{type(error).__name__}: {error}'[:300])
    own = [str(w.message) for w in said if 'not written' in str(w.message) or 'not cached' in str(w.message)]
    if res['outcome'] == 'wrote' and own:
        res = dict(outcome='said and went on', said=own[0][:300])
    after = contents(folder)
    end()
    res['names_file'] = str(disk.path) in res['said'] or res['outcome'] == 'wrote'
    changed = [name for name, value in before.items() if after.get(name) != value]
    res['lost'] = [] if res['outcome'] == 'wrote' else changed
    res['stale'] = [name for name in after if name.endswith(('.part', '.old'))]
    try:
        write(folder)
        res['works_again'] = True
    except Exception as error:
        res['works_again'] = False
        res['said'] += f' | again: {type(error).__name__}: {error}'[:200]
    return res


# Files that change for good reasons while a place goes on: losses of time, and a checkpoint that is one epoch newer
MAY_CHANGE = ('progress.json', 'stopped', 'checkpoint.safetensors')


def trial(args):
    "Try all places under all conditions; returns the figures"
    kill.prepare()
    import matplotlib.pyplot as plt

    import re

    found = {}
    begin = time.time()
    with tempfile.TemporaryDirectory() as d:
        for name, write in places().items():
            if not re.search(args.only, name):
                continue
            for condition in ('full', 'almost_full', 'read_only'):
                disk = Disk(Path(d) / f'{name}-{condition}')
                with disk:
                    res = try_place(write, disk, condition)
                plt.close('all')
                res['said'] = res['said'].replace(str(disk.path), 'DISK')
                res['lost'] = [o for o in res['lost'] if Path(o).name not in MAY_CHANGE]
                found[f'{name}, {condition}'] = res
                is_bad = res['outcome'] == 'foreign error' or res['lost'] or res['stale'] or not res['works_again']
                mark = 'BAD ' if is_bad or not res['names_file'] else ''
                shown = [res[o] for o in ('outcome', 'said', 'lost', 'stale')]
                print(f'{mark}{name}, {condition}:', *shown, flush=True)
    outcomes = [o['outcome'] for o in found.values()]
    summary = dict(
        places=len({name.split(',')[0] for name in found}),
        trials=len(found),
        own_errors=outcomes.count('own error'),
        said_and_went_on=outcomes.count('said and went on'),
        enough_space=outcomes.count('wrote'),
        foreign_errors=outcomes.count('foreign error'),
        without_a_file_name=sum(not o['names_file'] for o in found.values()),
        lost=sum(bool(o['lost']) for o in found.values()),
        with_stale_files=sum(bool(o['stale']) for o in found.values()),
        works_again=sum(o['works_again'] for o in found.values()),
        seconds=round(time.time() - begin),
    )
    os.sync()
    return dict(summary=summary, trials=found)
