"""A fit that can be resumed, of a small BERT: run.py starts it in several processes, and kills one of them.

    torchrun --nproc-per-node 2 benchmarks/distributed/train.py FOLDER
"""

import argparse
import json
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
torch.set_num_threads(1)


class Started(Callback):
    "Leaves a file when the processes have met and the first batch is trained"

    def __init__(self, file):
        self.file = file

    def after_batch(self):
        self.file.touch()


def data():
    "DataLoaders of short texts of very different lengths"
    df = label_budget(docstring_corpus(), n_per_class=24, n_eval=15)
    df = df[df.label.notna() & (df.split != 'test')]
    return HFTextDataLoaders.from_df(df, minilm_folder(), valid_col='split', max_length=64, bs=8, verbose=False)


def learner(dls):
    "A small BERT with random weights"
    seed_everything(0)
    config = AutoConfig.from_pretrained(minilm_folder(), hidden_size=32, num_hidden_layers=2, intermediate_size=64,
                                        num_attention_heads=2)
    return hf_classifier_learner(dls, config)


def train(dls, folder):
    "Train in all processes, go on from a checkpoint if there is one, and write what the fit ended with"
    learn = learner(dls)
    cbs = [GradualUnfreezing(groups=[1, 2, 4]), ResumableFit(folder/'fit.safetensors')]
    with learn.distributed(), learn.no_bar(), learn.no_logging():
        learn.fit(4, 1e-3, cbs=[*cbs, Started(folder/f'started_{rank_distrib()}')])
        scores = learn.validate()
    weights = digest(*[t.detach().numpy().tobytes() for t in learn.model.state_dict().values()])
    result = dict(weights=weights, scores=list(map(float, scores)))
    (folder/f'result_{rank_distrib()}.json').write_text(json.dumps(result))


if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('folder', type=Path)
    train(data(), ap.parse_args().folder)
