"""A fit that can be resumed, for torchrun: run.py starts it, and kills one of its processes.

    torchrun --nproc-per-node 2 benchmarks/distributed/train.py FOLDER [--kill PROCESS STEP]
"""

import argparse
import json
import os
import signal
import sys
import warnings
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
from common import offline

offline()
from fastai.text.all import *
from fastai_tl.all import *
from fastai_tl.files import digest
from transformers import AutoConfig

warnings.filterwarnings('ignore')


class Kill(Callback):
    "Ends one of the processes in the middle of an epoch"

    def __init__(self, number, step):
        self.number = number
        self.step = step

    def after_batch(self):
        if self.training and self.train_iter == self.step and rank_distrib() == self.number:
            os.kill(os.getpid(), signal.SIGKILL)


def learner():
    "A small BERT with random weights, and short texts of very different lengths"
    seed_everything(0)
    df = label_budget(docstring_corpus(), n_per_class=24, n_eval=15)
    df = df[df.label.notna() & (df.split != 'test')]
    dls = HFTextDataLoaders.from_df(df, minilm_folder(), valid_col='split', max_length=64, bs=8, verbose=False)
    config = AutoConfig.from_pretrained(minilm_folder(), hidden_size=32, num_hidden_layers=2, intermediate_size=64,
                                        num_attention_heads=2)
    return hf_classifier_learner(dls, config)


if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('folder', type=Path)
    ap.add_argument('--kill', type=int, nargs=2, default=None, metavar=('PROCESS', 'STEP'))
    args = ap.parse_args()
    torch.set_num_threads(1)
    learn = learner()
    cbs = [GradualUnfreezing(groups=[1, 2, 4]), ResumableFit(args.folder/'fit.safetensors')]
    with learn.distributed(), learn.no_bar():
        learn.fit(4, 1e-3, cbs=cbs + ([] if args.kill is None else [Kill(*args.kill)]))
        steps = int(learn.train_iter)
        scores = learn.validate()
    weights = digest(*[t.detach().numpy().tobytes() for t in learn.model.state_dict().values()])
    result = dict(weights=weights, scores=list(map(float, scores)), steps=steps)
    (args.folder/f'result_{rank_distrib()}.json').write_text(json.dumps(result))
