"""Entities in Traditional Chinese (MSRA): a small model from scratch, and the same model after masked language
modelling.

    python benchmarks/chinese_ner/run.py --data FOLDER --out FOLDER

`--data` holds zh_tw/msra_ner.parquet (tokens, tags, split; 6,500 sentences to train, 1,500 to test, its own split)
and zh_tw/shopping_reviews.parquet (text). No pre-trained model is used and nothing is downloaded: the masked
language model reads the training sentences and shopping reviews, and `save_encoder` and `load_encoder` carry its
encoder into the tagger. A tenth of the training sentences validate; no decision uses the test sentences. Both
train in bfloat16 if the machine has it. Ways that are finished in --out are skipped. Writes results.json."""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import offline, parser, set_threads

offline(silent=False)
import numpy as np
import pandas as pd


def parse():
    ap = parser(__doc__, 'data', 'threads')
    ap.add_argument('--out', default='chinese_ner')
    ap.add_argument('--arch', default='modernbert', choices=['bert', 'convbert', 'modernbert'])
    ap.add_argument('--width', type=int, default=128)
    ap.add_argument('--layers', type=int, default=2)
    ap.add_argument('--reviews', type=int, default=4000, help='shopping reviews that the masked language model reads')
    ap.add_argument('--lm-epochs', type=int, default=4)
    ap.add_argument('--epochs', type=int, default=8)
    ap.add_argument('--lr', type=float, default=2e-3)
    ap.add_argument('--rows', type=int, help='only so many sentences of each split, to try the script')
    ap.add_argument('--ways', nargs='+', default=['from scratch', 'after masked language modelling'])
    ap.add_argument('--seed', type=int, default=0)
    return ap.parse_args()


def config(a, n):
    from transformers import BertConfig, ConvBertConfig, ModernBertConfig

    sizes = dict(hidden_size=a.width, num_hidden_layers=a.layers, num_attention_heads=4, intermediate_size=2 * a.width)
    sizes |= dict(vocab_size=n, max_position_embeddings=128)
    if a.arch == 'bert':
        return BertConfig(**sizes)
    if a.arch == 'convbert':
        return ConvBertConfig(**sizes, embedding_size=a.width, head_ratio=2, conv_kernel_size=5, pad_token_id=0)
    ids = dict(pad_token_id=0, cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3)
    return ModernBertConfig(**sizes, local_attention=16, global_attn_every_n_layers=2, **ids)


def load(a):
    "Sentences with tags and split (a tenth of the training sentences validate), and shopping reviews"
    from fastai_tl.all import normalize_chinese

    folder = Path(a.data) / 'zh_tw'
    df = pd.read_parquet(folder / 'msra_ner.parquet')
    if a.rows:
        df = df.groupby('split').head(a.rows).reset_index(drop=True)
    df['tokens'] = [[normalize_chinese(w) or w for w in t] for t in df.tokens]
    train = df.index[df.split == 'train']
    df.loc[np.random.default_rng(0).permutation(train)[: len(train) // 10], 'split'] = 'valid'
    reviews = pd.read_parquet(folder / 'shopping_reviews.parquet').text.sample(a.reviews, random_state=0)
    return df, [normalize_chinese(t)[:120] for t in reviews]


def pretrain(a, texts, tok, body):
    "Train a masked language model and save its encoder"
    from fastai_tl.all import HFMaskedLMDataLoaders, hf_masked_lm_learner

    dls = HFMaskedLMDataLoaders.from_texts(texts, tok, valid_pct=0.02, bs=32, max_length=128)
    lm = hf_masked_lm_learner(dls, config(a, len(tok)))
    lm.to_mixed_precision().chunked_loss()
    with lm.no_bar():
        lm.fit_one_cycle(a.lm_epochs, 2e-3)
    lm.save_encoder(body)


def train_tagger(a, df, tok, body=None):
    "A tagger, with the encoder of `body` if there is one"
    from fastai_tl.all import HFTagDataLoaders, hf_tagger_learner

    dls = HFTagDataLoaders.from_df(df, tok, valid_col='split', max_length=128, bs=16, verbose=False)
    learn = hf_tagger_learner(dls, config(a, len(tok)))
    if body:
        learn.load_encoder(body)
    learn.to_mixed_precision()
    with learn.no_bar():
        learn.fit_one_cycle(a.epochs, a.lr)
    return learn


def main():
    a = parse()
    set_threads(a.threads)
    from fastai.callback.schedule import fit_one_cycle  # noqa: F401
    from fastai_tl.all import entity_scores, seed_everything, train_chinese_tokenizer

    out = Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    df, reviews = load(a)
    texts = [''.join(t) for t in df.tokens[df.split == 'train']] + reviews
    tok = train_chinese_tokenizer(texts, 6000, max_length=128)
    test = df[df.split == 'test']
    file = out / 'results.json'
    body = out / 'body.safetensors'
    res = json.loads(file.read_text(encoding='utf-8'))['runs'] if file.exists() else {}
    for way in a.ways:
        if way in res:
            continue
        begin = time.perf_counter()
        seed_everything(a.seed)
        from_scratch = way == 'from scratch'
        if not from_scratch and not body.exists():
            pretrain(a, texts, tok, body)
        learn = train_tagger(a, df, tok, None if from_scratch else body)
        with learn.no_bar():
            pred = learn.tag([list(t) for t in test.tokens])
        scores = entity_scores([list(p.tags) for p in pred], [list(t) for t in test.tags])
        valid = [float(v) for v in learn.recorder.values[-1] if v is not None]
        res[way] = dict(**scores, valid=valid, seconds=time.perf_counter() - begin)
        print(way, scores, flush=True)
        file.write_text(json.dumps(dict(settings=vars(a), runs=res), default=str, ensure_ascii=False), encoding='utf-8')


if __name__ == '__main__':
    main()
