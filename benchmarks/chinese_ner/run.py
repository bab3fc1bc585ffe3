"""Entities in Traditional Chinese: MSRA (6,500 sentences to train, 1,500 to test, its own split), a small model that starts from nothing, and the same model after masked language modelling.

    python benchmarks/chinese_ner/run.py --data FOLDER --out FOLDER

`--data` holds zh_tw/msra_ner.parquet (tokens, tags, split) and zh_tw/shopping_reviews.parquet (text). No pre-trained model is used and nothing is downloaded: the masked language model reads the training sentences and shopping
reviews, on the spot, and `save_encoder` and `load_encoder` carry its body into the tagger. A tenth of the training sentences validate; no test sentence decides anything. Both train in bfloat16 where
the machine has it. A way that is finished in --out is not done again. Writes results.json."""

import argparse, json, os, time
from pathlib import Path

os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
import numpy as np, pandas as pd


def parse():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--data', default=os.environ.get('FASTAI_TL_DATA', '../shared/data'))
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
    ap.add_argument('--threads', type=int)
    return ap.parse_args()


def config(a, n):
    from transformers import BertConfig, ConvBertConfig, ModernBertConfig

    kw = dict(
        hidden_size=a.width,
        num_hidden_layers=a.layers,
        num_attention_heads=4,
        intermediate_size=2 * a.width,
        vocab_size=n,
        max_position_embeddings=128,
    )
    if a.arch == 'bert':
        return BertConfig(**kw)
    if a.arch == 'convbert':
        return ConvBertConfig(**kw, embedding_size=a.width, head_ratio=2, conv_kernel_size=5, pad_token_id=0)
    return ModernBertConfig(
        **kw,
        local_attention=16,
        global_attn_every_n_layers=2,
        pad_token_id=0,
        cls_token_id=2,
        sep_token_id=3,
        bos_token_id=2,
        eos_token_id=3,
    )


def main():
    a = parse()
    import torch

    if a.threads:
        torch.set_num_threads(a.threads)
    from fastai.callback.schedule import fit_one_cycle  # noqa: F401
    from fastai_tl.all import (
        HFMaskedLMDataLoaders,
        HFTagDataLoaders,
        hf_masked_lm_learner,
        hf_tagger_learner,
        entity_scores,
        normalize_chinese,
        seed_everything,
        train_chinese_tokenizer,
    )

    out = Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    df = pd.read_parquet(Path(a.data) / 'zh_tw' / 'msra_ner.parquet')
    if a.rows:
        df = df.groupby('split').head(a.rows).reset_index(drop=True)
    df['tokens'] = [[normalize_chinese(w) or w for w in t] for t in df.tokens]
    train = df.index[df.split == 'train']
    df.loc[np.random.default_rng(0).permutation(train)[: len(train) // 10], 'split'] = 'valid'
    shop = [
        normalize_chinese(t)[:120]
        for t in pd.read_parquet(Path(a.data) / 'zh_tw' / 'shopping_reviews.parquet').text.sample(
            a.reviews, random_state=0
        )
    ]
    texts = [''.join(t) for t in df.tokens[df.split == 'train']]
    tokz = train_chinese_tokenizer(texts + shop, 6000, max_length=128)
    file = out / 'results.json'
    res = json.loads(file.read_text(encoding='utf-8'))['runs'] if file.exists() else {}
    for way in a.ways:
        if way in res:
            continue
        t0 = time.perf_counter()
        seed_everything(a.seed)
        body = out / 'body.safetensors'
        if way != 'from scratch' and not body.exists():
            lm = hf_masked_lm_learner(
                HFMaskedLMDataLoaders.from_texts(texts + shop, tokz, valid_pct=0.02, bs=32, max_length=128),
                config(a, len(tokz)),
            )
            lm.to_mixed_precision().chunked_loss()
            with lm.no_bar():
                lm.fit_one_cycle(a.lm_epochs, 2e-3)
            lm.save_encoder(body)
        dls = HFTagDataLoaders.from_df(df, tokz, valid_col='split', max_length=128, bs=16, verbose=False)
        learn = hf_tagger_learner(dls, config(a, len(tokz)))
        if way != 'from scratch':
            learn.load_encoder(body)
        learn.to_mixed_precision()
        with learn.no_bar():
            learn.fit_one_cycle(a.epochs, a.lr)
        test = df[df.split == 'test']
        with learn.no_bar():
            pred = learn.tag([list(t) for t in test.tokens])
        s = entity_scores([list(p.tags) for p in pred], [list(t) for t in test.tags])
        res[way] = dict(
            **s, valid=[float(v) for v in learn.recorder.values[-1] if v is not None], seconds=time.perf_counter() - t0
        )
        print(way, s, flush=True)
        file.write_text(json.dumps(dict(settings=vars(a), runs=res), default=str, ensure_ascii=False), encoding='utf-8')


if __name__ == '__main__':
    main()
