"""Runs checks with one or with several processes: a process that imports everything and forks for each line it reads.

A line is a job as JSON: `check`, `n` (0 for a process that works alone) and `folder`. The answer is one line of JSON:
what each process returned, or the end of what it wrote. test_distributed.py uses it."""

import io
import json
import os
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path

from fastai.callback.all import *
from fastai.text.all import *
from fastai_tl.all import *
from fastai_tl.data.streaming import ResumableBatches
from fastai_tl.files import digest
from fastai_tl.processes import free_port
from small_learners import LABELS, MAKERS, TEXTS, sentences
from transformers import GPT2Config

warnings.filterwarnings('ignore')
KINDS = ('classifier', 'class_weights', 'multilabel', 'tagger', 'causal_lm', 't5', 'answerer', 'ulmfit_lm',
         'ulmfit_classifier', 'streamed_causal_lm', 'streamed_lm')


class Gradients(Callback):
    "Keeps the gradient of each step"
    order = 100

    def before_fit(self):
        self.steps = []

    def before_step(self):
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.model.parameters()]
        self.steps.append(torch.cat([g.flatten() for g in grads]).clone())


class RecordFloat(Callback):
    "fastai's Recorder adds up losses in float32"
    order = 1000

    def after_loss(self):
        self.learn.loss = self.loss.float()


def token_file(tok=None):
    "Texts tokenized to a folder of this process"
    folder = Path(tempfile.mkdtemp())
    pd.DataFrame(dict(text=sentences(60))).to_json(folder/'texts.jsonl', orient='records', lines=True)
    return tokenize_to_file(folder/'texts.jsonl', folder/'tokens', tok, n_workers=1)


def streamed_causal_lm(toks):
    tok = toks['decoder']
    dls = hf_streamed_lm_dls(token_file(tok), tok, max_length=24, bs=4)
    return hf_causal_lm_learner(dls, GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=len(tok), n_positions=64),
                                metrics=[])


def streamed_lm(toks):
    return awd_lm_learner(streamed_lm_dls(token_file(), bs=4, seq_len=17), dict(emb_sz=16, n_hid=16, n_layers=1),
                          metrics=[])


def without_dropout(model):
    for m in model.modules():
        for name, value in vars(m).items():
            is_rate = name in ('p', 'embed_p', 'dropout', 'activation_dropout', 'attention_dropout')
            if is_rate and isinstance(value, float):
                setattr(m, name, 0.)
            if name == 'weight_p':
                m.weight_p = 1e-9


def maker(toks, kind, n=1, exact=True):
    "A Learner whose steps have the rows that `n` processes would have; `exact` computes in float64"
    seed_everything(0)
    learn = dict(MAKERS, streamed_causal_lm=streamed_causal_lm, streamed_lm=streamed_lm)[kind](toks)
    without_dropout(learn.model)
    if exact:
        learn.model.double()
        learn.add_cb(RecordFloat())
    dl = learn.dls.train
    if n > 1 and isinstance(dl, LMDataLoader|ResumableBatches):
        learn.dls.loaders[0] = dl.new(bs=dl.bs*n)
    elif n > 1:
        dl.bs *= n
    return learn


def weights(learn):
    return digest(*[t.detach().cpu().numpy().tobytes() for t in learn.model.state_dict().values()])


def numbers(tree):
    "A nested list of floats"
    if isinstance(tree, (list, tuple, L)):
        return [numbers(o) for o in tree]
    return tree.float().tolist() if isinstance(tree, torch.Tensor) else tree


def first_of_rows(preds):
    "The first predictions of each row"
    return [row.flatten()[:20] for row in (preds[0] if isinstance(preds, tuple) else preds)]


def quiet(learn):
    stack = ExitStack()
    stack.enter_context(learn.no_bar())
    stack.enter_context(learn.no_logging())
    return stack


# --- the checks: each is one function for one process and for several ---

def gradients(toks, folder, scale):
    "The gradients of an epoch whose rate is 0; `scale` is the batch size for a process that works alone"
    res = {}
    for kind in KINDS:
        learn = maker(toks, kind, scale)
        with learn.distributed(), quiet(learn):
            seed_everything(1)
            grab = Gradients()
            learn.fit(1, 0., wd=0., cbs=grab)
        file = Path(folder)/f'{kind}_{scale}_{rank_distrib()}.npy'
        np.save(file, torch.stack(grab.steps).numpy())
        res[kind] = dict(steps=str(file), losses=numbers(list(learn.recorder.losses)))
    return res


def outputs(toks, folder, scale):
    "Predictions, losses and metrics of rows whose number does not divide"
    res = {}
    for kind in KINDS:
        learn = maker(toks, kind)
        seed_everything(2)
        with learn.distributed(), quiet(learn):
            out = dict(loss=learn.validate()[0])
            if kind != 'streamed_lm': # fastai cannot put batches of streams of text together
                out['train'] = numbers(first_of_rows(learn.get_preds(0)[0]))
            if kind in ('classifier', 'multilabel', 'ulmfit_classifier'):
                out['new'] = numbers(learn.get_preds(dl=learn.dls.test_dl(TEXTS[:7]))[0])
                ev = learn.evaluate(ds_idx=0)
                out['probs'], out['targets'] = ev.probs.tolist(), ev.targets.tolist()
            if kind == 'tagger':
                out['scores'] = learn.evaluate(ds_idx=0).report().to_dict('list')
            if kind in ('causal_lm', 'ulmfit_lm', 'streamed_causal_lm', 'streamed_lm'):
                out['perplexity'] = learn.perplexity(TEXTS[:5]).texts.perplexity.tolist()
        res[kind] = out
    return res


def stages(toks, folder, scale):
    "Fits that freeze and unfreeze: what trained, and the weights"
    res = {}
    for kind, when in (('classifier', 'plateau'), ('tagger', 'epoch'), ('ulmfit_classifier', 'epoch'),
                       ('ulmfit_lm', 'plateau')):
        learn = maker(toks, kind, scale)
        with learn.distributed(), quiet(learn):
            seed_everything(3)
            cb = GradualUnfreezing(when=when, patience=1, min_delta=1e-2)
            learn.fit(4, 1e-2, cbs=cb)
        rows = cb.table()
        res[kind] = dict(groups=rows.groups.tolist(), epochs=rows.epochs.tolist(),
                         values=numbers(list(learn.recorder.values)), weights=weights(learn))
    return res


def fits(toks, folder, scale):
    "Other fits: recipes with stored states, accumulation, averages, R-Drop, one position, the head in pieces"
    res = {}

    def run(name, kind, fit, exact=True):
        learn = maker(toks, kind, scale, exact)
        with learn.distributed(), quiet(learn):
            seed_everything(4)
            fit(learn)
        res[name] = dict(weights=weights(learn), values=numbers(list(learn.recorder.values)))

    cached = CachedPrefix(verbose=False)
    run('transfer', 'classifier', lambda learn: learn.fit_transfer(recipe='gradual', epochs=[1, 1, 1], lr=1e-3), False)
    run('pooled cache', 'ulmfit_classifier', lambda learn: (learn.freeze_to(-1), learn.fit(2, 1e-3, cbs=cached)), False)
    run('tagger cache', 'tagger', lambda learn: (learn.freeze_to(-2), learn.fit(1, 1e-3, cbs=cached)), False)
    run('bf16', 'classifier', lambda learn: learn.to_mixed_precision('bf16', force=True).fit(1, 1e-3), False)
    run('several', 'classifier', lambda learn: learn.fit(2, 1e-2, cbs=[RDrop(), EMA(.5), BestEpoch()]))
    cbs = [GradientAccumulation(10*scale), GradientClip(.1)]
    run('accumulate', 'tagger', lambda learn: learn.fit(1, 1e-2, cbs=cbs))
    run('chunked', 'chunked_causal_lm', lambda learn: learn.fit(1, 1e-2), False)
    summed = CrossEntropyLossFlat(reduction='sum')
    run('sum', 'classifier', lambda learn: (setattr(learn, 'loss_func', summed), learn.fit(1, 1e-3)))
    return res


def files(toks, folder, scale):
    "What is written, and by how many"
    folder = Path(folder)
    learn = maker(toks, 'classifier', scale)
    learn.path = folder
    report = EvaluationCallback(folder/'report', figures=())
    with learn.distributed(), quiet(learn):
        seed_everything(5)
        cbs = [CSVLogger(folder/'log.csv'), SaveModelCallback(), report, ResumableFit(folder/'fit.safetensors')]
        with redirect_stdout(io.StringIO()):
            learn.fit(2, 1e-2, cbs=cbs)
        first = weights(learn)
        with redirect_stdout(io.StringIO()):
            learn.fit(2, 1e-2, cbs=ResumableFit(folder/'fit.safetensors'))
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob('*') if p.is_file() and p.suffix != '.json')
    return dict(weights=weights(learn), first=first, log=(folder/'log.csv').read_text(), files=names,
                report=report.history().to_dict('list'))


def errors(toks, folder, scale):
    "What is not supported says so, and the rows of the processes have the same lengths"
    learn = maker(toks, 'classifier')
    res = {}
    with learn.distributed(), quiet(learn):
        try:
            learn.lr_find(show_plot=False)
        except RunError as error:
            res['lr_find'] = str(error)
    return res


class Kill(Callback):
    "Ends a process in the middle of an epoch, without any good-bye"

    def __init__(self, number, at):
        self.number, self.at = number, at

    def after_batch(self):
        if self.training and self.train_iter == self.at and rank_distrib() == self.number:
            os.kill(os.getpid(), 9)


def killed(toks, folder, scale, number=None, at=0):
    "A fit that can be resumed, of which one process is killed"
    learn = maker(toks, 'classifier', scale)
    with learn.distributed(), quiet(learn):
        cbs = [GradualUnfreezing(groups=[1, 2, 4]), ResumableFit(Path(folder)/'fit.safetensors')]
        learn.fit(4, 1e-2, cbs=cbs + ([] if number is None else [Kill(number, at)]))
    return dict(weights=weights(learn), values=numbers(list(learn.recorder.values)))


def stopped(toks, folder, scale):
    "One process has an error of its own, and goes on living"
    learn = maker(toks, 'classifier')
    with learn.distributed(), quiet(learn):
        if rank_distrib() == 1:
            try:
                raise DataError('An error in one process')
            finally:
                pass
        learn.fit(1, 1e-2)


def ulmfit(toks, folder, scale):
    "The three stages of ULMFiT, without dropout"
    texts = sentences(60)
    df = pd.DataFrame(dict(text=texts[:24], label=LABELS[:20] + ['a', 'b', 'c', 'b'], valid=[False]*20 + [True]*4))
    run = ULMFiT(Path(folder)/f'ulmfit_{scale}_{os.environ.get("WORLD_SIZE", 1)}', progress=False, min_freq=1,
                 config=dict(emb_sz=16, n_hid=16, n_layers=1))
    run.pretrain(texts, epochs=1, lr=1e-2, bs=2*scale, drop_mult=0.)
    run.finetune_lm(df, epochs=1, lr=1e-2, bs=2*scale, drop_mult=0.)
    learn = run.classifier(df, valid_col='valid', epochs=[1, 1, 1], lr=1e-2, bs=4*scale, drop_mult=0.)
    first = weights(learn)
    learn = run.classifier(df, valid_col='valid', epochs=[1, 1, 1], lr=1e-2, bs=4*scale, drop_mult=0.) # it is done
    files = sorted(str(p.relative_to(run.path)) for p in run.path.rglob('*') if p.is_file())
    history = [run.history(name).values.tolist() for name in ('general', 'domain', 'classifier')]
    return dict(files=files, history=history, weights=weights(learn), first=first)


# --- weights that are divided among the processes ---

def flat_weights(learn, file):
    "Save all weights as one array; the path of the file"
    np.save(file, torch.cat([p.detach().double().flatten() for p in learn.model.parameters()]).numpy())
    return str(file)


def share_of_weights(learn):
    "The share of the weights that this process has in memory"
    own = sum(getattr(p, 'to_local', lambda p=p: p)().numel() for p in learn.model.parameters())
    return own/sum(p.numel() for p in learn.model.parameters())


def divided(toks, folder, scale, strategy):
    "Fits with unfreezing of several kinds of model, and what the first process saves"
    folder, res = Path(folder), {}
    for kind in ('classifier', 'causal_lm', 't5'):
        learn = maker(toks, kind)
        with learn.distributed(strategy=strategy), quiet(learn):
            seed_everything(3)
            share = share_of_weights(learn)
            cb = GradualUnfreezing()
            learn.fit(4, 1e-2, cbs=cb)
            preds = numbers(first_of_rows(learn.get_preds()[0]))
        file = flat_weights(learn, folder/f'{kind}_{strategy}_{rank_distrib()}.npy')
        res[kind] = dict(file=file, share=share, preds=preds, values=numbers(list(learn.recorder.values)),
                         stages=cb.table().layers.tolist(), share_after=share_of_weights(learn))
        if kind == 'classifier' and not rank_distrib():
            learn.save_bundle(folder/strategy)
            res['bundle'] = {p.name: digest(p.read_bytes()) for p in sorted((folder/strategy).iterdir())
                             if p.name != 'bundle.json'}
    return res


def divided_fits(toks, folder, scale, strategy):
    "Fits in float32 with dropout: callbacks that keep, average, clip, accumulate and save; moments that are kept"
    folder, res = Path(folder), {}

    def run(name, kind, *fits):
        seed_everything(0)
        learn = MAKERS[kind](toks)
        learn.path = folder
        for fit in fits:
            with learn.distributed(strategy=strategy), quiet(learn):
                seed_everything(4)
                fit(learn)
        res[name] = dict(file=flat_weights(learn, folder/f'{name}_{strategy}_{rank_distrib()}.npy'),
                         values=numbers(list(learn.recorder.values)))
        return learn

    cbs = [EMA(.5), BestEpoch(), GradientClip(.1), SaveModelCallback(fname=strategy)]
    run('kept', 'classifier', lambda learn: learn.fit(3, 1e-2, cbs=cbs))
    run('transfer', 'classifier', lambda learn: learn.fit_transfer(recipe='gradual', epochs=[1, 1, 1], lr=1e-3,
                                                                   cache=False if strategy == 'ddp' else 'auto'))
    run('bf16', 'classifier', lambda learn: learn.to_mixed_precision('bf16', force=True).fit(1, 1e-3))
    run('accumulated', 'tagger', lambda learn: learn.fit(1, 1e-2, cbs=GradientAccumulation(10)))
    run('two passes', 'classifier', lambda learn: learn.fit(1, 1e-2, cbs=RDrop()))
    again = run('moments', 'classifier', lambda learn: (learn.freeze_to(-2), learn.fit(1, 1e-2)),
                lambda learn: (learn.save('state'), learn.fit(1, 1e-2), learn.load('state'), learn.fit(1, 1e-2)))
    res['frozen_idx'] = again.opt.frozen_idx
    return res


class Stop(Callback):
    "Ends the process in the middle of an epoch"

    def after_batch(self):
        if self.training and (self.epoch, self.iter) == (2, 1):
            os._exit(3)


def divided_resumed(toks, folder, scale, strategy, stop=False):
    "A fit that can be resumed, by processes that keep their weights in another way"
    learn = maker(toks, 'classifier')
    with learn.distributed(strategy=strategy), quiet(learn):
        cbs = [GradualUnfreezing(), EMA(.5), BestEpoch(), ResumableFit(Path(folder)/'fit.safetensors')]
        learn.fit(4, 1e-2, cbs=cbs + [Stop()]*stop)
    return dict(file=flat_weights(learn, f'{folder}/{strategy}_{rank_distrib()}.npy'))


def divided_errors(toks, folder, scale):
    "What cannot be done with divided weights"
    res = {}
    for name, fit in dict(cache=lambda learn: learn.fit(1, cbs=CachedPrefix()),
                          save_bundle=lambda learn: learn.save_bundle(folder)).items():
        learn = maker(toks, 'classifier')
        with learn.distributed(strategy='fsdp'), quiet(learn):
            try:
                fit(learn)
            except FastaiTLError as error:
                res[name] = str(error)
    learn = maker(toks, 'ulmfit_classifier')
    try:
        with learn.distributed(strategy='fsdp'):
            pass
    except FastaiTLError as error:
        res['awd_lstm'] = str(error)
    return res


# --- processes ---

def in_child(toks, job, rank, port, out):
    "Run the check of a job in this process, write its result, and end"
    torch.set_num_threads(1) # PyTorch renews its threads after a fork, and two threads must not begin with that at once
    if job['n']:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job['n']), MASTER_ADDR='127.0.0.1',
                          MASTER_PORT=str(port))
    log, code = io.StringIO(), 1
    try:
        with redirect_stdout(log), redirect_stderr(log):
            result = globals()[job['check']](toks, job['folder'], job.get('scale', 1), **job.get('options', {}))
        code = 0
    except BaseException:
        result = (log.getvalue() + traceback.format_exc())[-6000:]
    out.write_text(json.dumps(result))
    os._exit(code)


def run(toks, job):
    "Run a job in new processes; return codes, results and how long after the first end the last one ended"
    n, folder = max(job['n'], 1), Path(job['folder'])
    port = free_port()
    outs = [folder/f'out_{time.time_ns()}_{rank}.json' for rank in range(n)]
    pids = {}
    for rank, out in enumerate(outs):
        pid = os.fork()
        if not pid:
            in_child(toks, job, rank, port, out)
        pids[pid] = rank
    codes, ends = [None]*n, []
    cpu = 0.
    while pids:
        pid, status, used = os.wait3(0)
        cpu += used.ru_utime + used.ru_stime
        codes[pids.pop(pid)] = os.waitstatus_to_exitcode(status)
        ends.append(time.time())
    results = [json.loads(out.read_text()) if out.exists() else None for out in outs]
    for out in outs:
        out.unlink(missing_ok=True)
    return dict(codes=codes, results=results, seconds=ends[-1]-ends[0], cpu=cpu)


if __name__ == '__main__':
    torch.set_num_threads(1)
    toks = {kind: train_tokenizer(sentences(200), 400, kind) for kind in ('encoder', 'decoder', 'seq2seq')}
    for kind in ('classifier', 'tagger', 'causal_lm', 't5', 'answerer'): # imports what each process would import
        MAKERS[kind](toks)
    import torch._dynamo, sklearn.metrics # noqa: E401, F401
    answers, sys.stdout = sys.stdout, sys.stderr # what the checks print must not come between the answers
    print('ready', file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(toks, json.loads(line))), file=answers, flush=True)
