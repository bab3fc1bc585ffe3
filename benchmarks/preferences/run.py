"""Steering what a small language model writes: control codes, DPO and REINFORCE, an AWD_LSTM and a GPT-2 from scratch.

    python benchmarks/preferences/run.py --data FOLDER --out FOLDER [--set shopping] [--models awd gpt2] [--seeds 3]
                                         [--json FILE]

`--set shopping`: the first 20 characters of reviews in Traditional Chinese (zh_tw/shopping_reviews.parquet in
`--data`); `--set imdb`: the last 40 words of English ones (en/imdb.parquet). For each model and seed there is one
language model from scratch, trained on `--texts` reviews with a code in front: `<pos>` or `<neg>` for two of three
reviews, `<any>` for the third (`<正面>`, `<負面>` and `<不限>` in Chinese).

- base: the language model, asked for `<any>`
- codes: the same weights, asked for `<pos>` or `<neg>`
- away: as codes, with `away_from` the other code and `guidance_scale=3`
- dpo: the base tuned on pairs of its own samples, the best and the worst of four by the reward
- reinforce: the base tuned with REINFORCE for the same reward

The reward is the probability of `pos` by a bag of words, trained on labelled reviews that the language model does not
read. The judge is another kind of classifier (a support vector machine on parts of words, or on up to four characters),
trained on other reviews; no training and no choice of a setting uses it. Each row: the share of the sampled texts that
the judge calls positive, the mean reward, the perplexity of reviews that no model has read (as `<any>` for base, dpo
and reinforce, with their own code for codes), that of the samples in the base model, and the share of different pairs
of words in the samples. Finished runs are kept in --out; the same command goes on. Prints a Markdown table."""

import copy
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common

common.offline()
import numpy as np
import pandas as pd

WAYS = ('base', 'codes <pos>', 'codes <neg>', 'away <pos>', 'away <neg>', 'dpo', 'reinforce')
SAMPLING = dict(temperature=1.0, top_k=0)
KINDS = dict(imdb=dict(pos='pos', neg='neg', any='any'), shopping=dict(pos='正面', neg='負面', any='不限'))
N_NEW = dict(imdb=40, shopping=20)  # tokens of a sample


def parse():
    ap = common.parser(__doc__, 'data', 'seeds', 'threads', 'json', threads=1)
    ap.add_argument('--out', default='preferences')
    ap.add_argument('--set', default='shopping', choices=list(KINDS))
    ap.add_argument('--models', nargs='+', default=['awd', 'gpt2'], choices=['awd', 'gpt2'])
    ap.add_argument('--first-seed', type=int, default=0)
    ap.add_argument('--texts', type=int, default=1500, help='reviews for the language model')
    ap.add_argument('--epochs', type=int, default=3)
    ap.add_argument('--samples', type=int, default=200, help='texts that are judged')
    ap.add_argument('--pairs', type=int, default=120, help='prompts for pairs')
    ap.add_argument('--steps', type=int, default=30, help='batches of REINFORCE')
    return ap.parse_args()


class Data:
    "The reviews of one seed: for the language model, the reward, the judge and the perplexity"

    def __init__(self, a, seed):
        train, test = getattr(self, a.set)(Path(a.data), seed)
        self.lm, self.reward = train[: a.texts], train[a.texts : a.texts + 4000]
        self.judge, self.held_out, self.check = test[:3000], test[6000:6150], test[7000:7500]
        self.is_chinese = a.set == 'shopping'

    def imdb(self, folder, seed):
        df = pd.read_parquet(folder / 'en' / 'imdb.parquet')
        df['text'] = [' '.join(text.replace('<br />', ' ').split()[-40:]) for text in df.text]
        return [df[df.split == part].sample(frac=1, random_state=seed) for part in ('train', 'test')]

    def shopping(self, folder, seed):
        df = pd.read_parquet(folder / 'zh_tw' / 'shopping_reviews.parquet')
        df['text'] = [text[:20] for text in df.text]
        df['label'] = df.label.map({name: kind for kind, name in KINDS['shopping'].items()})
        df = df[df.text.str.len() > 4].drop_duplicates('text').sample(frac=1, random_state=seed)
        return df[8000:], df[:8000]


def judge_classifier(data):
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import LinearSVC

    parts = (
        dict(analyzer='char', ngram_range=(1, 4)) if data.is_chinese else dict(analyzer='char_wb', ngram_range=(2, 5))
    )
    letters = TfidfVectorizer(**parts, sublinear_tf=True, min_df=3)
    return make_pipeline(letters, LinearSVC(C=0.5)).fit(list(data.judge.text), list(data.judge.label))


def reward_classifier(data):
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    kind = 'char' if data.is_chinese else 'word'
    bag = TfidfVectorizer(analyzer=kind, ngram_range=(1, 2), sublinear_tf=True, min_df=2)
    return make_pipeline(bag, LogisticRegression(C=10)).fit(list(data.reward.text), list(data.reward.label))


def awd(texts, codes, kinds, a):
    from fastai_tl.all import ChineseTokenizer, awd_lm_learner, language_model_dls, texts_vocab, tokenize_texts_once

    tokenizer = [ChineseTokenizer()] if a.set == 'shopping' else []
    words = tokenize_texts_once(texts, *tokenizer, progress=False)
    words = codes.mark(words, kinds)
    dls = language_model_dls(words, texts_vocab(words, 2, 4000), bs=32, seq_len=40, valid_pct=0.02)
    learn = awd_lm_learner(dls, dict(emb_sz=64, n_hid=128, n_layers=1), drop_mult=0.1)
    common.quiet(learn).fit_one_cycle(a.epochs, 1e-2)
    return learn


def gpt2(texts, codes, kinds, a):
    from transformers import GPT2Config

    from fastai_tl.all import HFCausalLMDataLoaders, hf_causal_lm_learner, train_tokenizer

    tokenizer = train_tokenizer(texts, 2000, kind='decoder', max_length=128)
    codes.add_to(tokenizer)
    texts = codes.mark(texts, kinds)
    dls = HFCausalLMDataLoaders.from_texts(texts, tokenizer, max_length=64, bs=32, valid_pct=0.02)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=128, n_embd=64, n_layer=2, n_head=4)
    learn = hf_causal_lm_learner(dls, config)
    common.quiet(learn).fit_one_cycle(a.epochs, 3e-3)
    return learn


def distinct_pairs(texts, is_chinese):
    "Share of different ones among all pairs of neighbouring words, or characters"
    parts = [text.replace(' ', '') if is_chinese else text.split() for text in texts]
    pairs = [pair for words in parts for pair in zip(words, words[1:])]
    return len(set(pairs)) / max(len(pairs), 1)


class Meter:
    "The figures of a model"

    def __init__(self, judge, reward, data, a, seed):
        self.judge, self.reward, self.data = judge, reward, data
        self.n, self.n_new, self.seed = a.samples, N_NEW[a.set], seed

    def __call__(self, learn, held_out, prefix='', **options):
        options |= dict(num_return_sequences=self.n, seed=1000 + self.seed, max_new_tokens=self.n_new, **SAMPLING)
        out = learn.generate('', prefix=prefix, **options)
        texts = [o.completion for o in out if o.completion.strip()]
        return dict(
            positive=float(np.mean(self.judge.predict(texts) == 'pos')),
            reward=float(np.mean(self.reward(texts))),
            perplexity=float(learn.perplexity(held_out)),
            distinct=distinct_pairs(texts, self.data.is_chinese),
            n=len(texts),
            samples=texts,
        )


def run(name, seed, data, judge, reward, a):
    "The figures of all ways for one model and one seed"
    from fastai_tl.all import ControlCodes, dpo_learner, ranked_pairs, reinforce_learner, seed_everything

    make = dict(awd=awd, gpt2=gpt2)[name]
    draw = np.random.default_rng(seed)
    names = KINDS[a.set]
    kinds = [names[kind if draw.random() < 2 / 3 else 'any'] for kind in data.lm.label]
    held_out, labels = data.held_out.text.tolist(), [names[kind] for kind in data.held_out.label]
    codes = ControlCodes(list(names.values()))
    meter = Meter(judge, reward, data, a, seed)
    res, clock = {}, {}

    def timed(way, f):
        start = time.process_time()
        out = f()
        clock[way] = time.process_time() - start
        return out

    seed_everything(seed)
    learn = timed('base', lambda: make(data.lm.text.tolist(), codes, kinds, a))
    codes.check(learn)
    prompt = codes[names['any']]

    def as_any(texts):
        return codes.mark(texts, [names['any']] * len(texts))

    res['base'] = meter(learn, as_any(held_out), prompt)
    for kind, other in (('pos', 'neg'), ('neg', 'pos')):
        marked, code = codes.mark(held_out, labels), codes[names[kind]]
        res[f'codes <{kind}>'] = meter(learn, marked, code)
        res[f'away <{kind}>'] = meter(learn, marked, code, away_from=codes[names[other]], guidance_scale=3)
    base = copy.deepcopy(learn.model.state_dict())
    lr = dict(awd=3e-3, gpt2=1e-3)[name]

    def without_code(texts):
        return reward([text.removeprefix(prompt) for text in texts])

    def dpo():
        options = dict(seed=seed, max_new_tokens=N_NEW[a.set])
        pairs = ranked_pairs(learn, [prompt] * a.pairs, without_code, **options)
        common.quiet(dpo_learner(learn, pairs, end=False, bs=16, seed=seed)).fit_one_cycle(3, lr)

    timed('dpo', dpo)
    res['dpo'] = meter(learn, as_any(held_out), prompt)
    learn.model.load_state_dict(base)

    def reinforce():
        options = dict(beta=0.01, n_samples=4, max_new_tokens=N_NEW[a.set], bs=8, seed=seed)
        tuned = reinforce_learner(learn, [prompt] * (8 * a.steps), without_code, **options)
        common.quiet(tuned).fit_one_cycle(1, lr)

    timed('reinforce', reinforce)
    res['reinforce'] = meter(learn, as_any(held_out), prompt)
    learn.model.load_state_dict(base)
    for figures in res.values():
        samples = figures.pop('samples')
        figures |= dict(of_samples=float(learn.perplexity(as_any(samples))), examples=samples[:3])
    return dict(model=name, seed=seed, ways=res, seconds=clock)


def table(runs):
    "The mean of the seeds, and their range for the share of positive texts"
    rows = []
    for name in dict.fromkeys(o['model'] for o in runs):
        for way in WAYS:
            figures = pd.DataFrame([o['ways'][way] for o in runs if o['model'] == name])
            p = figures.positive * 100
            rows.append(
                [
                    name,
                    way,
                    f'{p.mean():.0f} ({p.min():.0f} to {p.max():.0f})',
                    f'{figures.reward.mean():.2f}',
                    f'{figures.perplexity.mean():.0f}',
                    f'{figures.of_samples.mean():.0f}',
                    f'{figures.distinct.mean():.2f}',
                ]
            )
    columns = ['model', 'way', 'positive in %:', 'reward:', 'perplexity:', 'of the samples:', 'different pairs:']
    return common.table(columns, rows)


def main(a):
    common.set_threads(a.threads)
    out = Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    runs, accuracies = [], []
    for seed in range(a.first_seed, a.first_seed + a.seeds):
        files = {name: out / f'{a.set}_{name}_{seed}.json' for name in a.models}
        if any(not file.exists() for file in files.values()):
            data = Data(a, seed)
            judge, classifier = judge_classifier(data), reward_classifier(data)
            from fastai_tl.all import class_reward

            reward = class_reward(classifier, 'pos')
            right = data.check.label
            accuracy = dict(
                judge=float(np.mean(judge.predict(list(data.check.text)) == right)),
                reward=float(np.mean(classifier.predict(list(data.check.text)) == right)),
            )
        for name, file in files.items():
            if not file.exists():
                figures = dict(run(name, seed, data, judge, reward, a), accuracy=accuracy)
                file.write_text(json.dumps(figures))
            runs.append(json.loads(file.read_text()))
            accuracies.append(runs[-1]['accuracy'])
            print(name, seed, {way: round(o['positive'], 3) for way, o in runs[-1]['ways'].items()}, flush=True)
    print(table(runs))
    print('accuracy of judge and reward:', pd.DataFrame(accuracies).mean().round(3).to_dict())
    options = {k: v for k, v in vars(a).items() if k not in ('json', 'data', 'out')}
    common.write_json(a.json, dict(options=options, runs=runs))


if __name__ == '__main__':
    main(parse())
