"""A process that imports everything and then forks a run for each line that it reads: `FOLDER [N]`.

The N-th rename of a checkpoint kills the run just before it happens. The process prints the run's process id, and then
its exit status. test_killed.py uses it."""

import os
import signal
import sys
from pathlib import Path

from fastai.text.all import *
from fastai_tl.all import *
from fastai_tl.files import digest


def run(folder, kill_at=None):
    if kill_at is not None:
        kill_before_rename(kill_at)
    texts = [
        f'the {w} of {c} {v} the {o}'
        for w in ('number', 'name', 'size', 'shape', 'type')
        for c in ('rows', 'columns', 'arrays', 'labels', 'axes', 'samples')
        for v in ('gives', 'sets', 'takes', 'returns')
        for o in ('result', 'value', 'output', 'input')
    ]
    df = pd.DataFrame(dict(text=texts, label=['out' if ' returns ' in t or ' gives ' in t else 'in' for t in texts]))
    ulm = ULMFiT(folder, config=dict(emb_sz=32, n_hid=48, n_layers=2), progress=False, min_freq=1)
    ulm.pretrain(texts[::2], epochs=4, lr=1e-2, bs=8, drop_mult=0.2)
    ulm.finetune_lm(df, epochs=4, lr=1e-2, bs=8, drop_mult=0.2)
    learn = ulm.classifier(df, epochs=[1, 1, 1, 3], lr=5e-2, bs=16)
    with learn.no_bar():
        loss, acc = learn.validate()
    weights = digest(*[p.detach().numpy().tobytes() for p in learn.model.state_dict().values()])
    write_json(
        Path(folder) / 'result.json',
        dict(
            loss=loss,
            accuracy=acc,
            weights=weights,
            history=[ulm.history(s).to_dict('list') for s in ('general', 'domain', 'classifier')],
        ),
    )


def kill_before_rename(n):
    "Die between the write of the n-th checkpoint and its rename"
    replace, seen = os.replace, []

    def dies(src, dst):
        if Path(dst).name == 'checkpoint.safetensors':
            seen.append(dst)
            if len(seen) == n:
                os.kill(os.getpid(), signal.SIGKILL)
        return replace(src, dst)

    os.replace = dies


if __name__ == '__main__':
    torch.set_num_threads(1)
    print('ready', flush=True)
    for line in sys.stdin:
        folder, *kill_at = line.rstrip('\n').split('\t')
        pid = os.fork()
        if not pid:
            torch.set_num_threads(1)  # as in distributed_run.py
            run(folder, int(kill_at[0]) if kill_at else None)
            os._exit(0)
        print(pid, flush=True)
        print(os.waitpid(pid, 0)[1], flush=True)
