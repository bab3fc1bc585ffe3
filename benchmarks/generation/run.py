"""What generation and perplexity cost, side by side, in ratios.

    python benchmarks/generation/run.py [--words 100] [--rounds 3] [--threads N] [--only awd gpt2 perplexity] [--json FILE]

- awd: tokens a second of an AWD_LSTM (vocabulary 30,000, 400/1152/3) against fastai's `LMLearner.predict`, for one prompt and for eight. `predict` writes
  one text at a time, so eight texts cost it eight times one. Wanted: at least 15 times, and at least 80.
- gpt2: `generate` against a bare `model.generate` on tensors that are ready, for a small GPT-2 (4 layers of 256) and one of base size. Wanted: at most 1.03 times.
- perplexity: 500 texts of mixed length, short and long, with the small GPT-2 in batches of up to 64, in float32 and with `dtype='bf16'`, against one text at a time in float32: by transformers' own loss, as its
  tutorials do it, and by `text_perplexity`. Wanted: at least 3 times faster.

What is compared runs in turn, in changing order, so that a busy machine slows all alike; the ratio is the median of the rounds' ratios. Weights are random: they cost the same."""

import argparse, json, os, random, statistics as st, time
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false')


def interleave(variants, rounds):
    "Seconds of each variant in each round; a first round is not counted"
    names, res = list(variants), {n: [] for n in variants}
    for r in range(rounds + 1):
        for n in names[:: 1 if r % 2 else -1]:
            t = time.perf_counter()
            variants[n]()
            t = time.perf_counter() - t
            if r:
                res[n].append(t)
    return res


def ratio(base, other, scale=1.0):
    "Median, lowest and highest ratio of the rounds"
    rs = [scale * b / o for b, o in zip(base, other)]
    return dict(ratio=st.median(rs), low=min(rs), high=max(rs), best=scale * min(base) / min(other))


def texts(n, words=(5, 120), seed=0):
    from fastai_tl.datasets.corpora import docstring_corpus

    rng, all_ = random.Random(seed), ' '.join(docstring_corpus().text).split()
    starts = [rng.randrange(len(all_) - 200) for _ in range(n)]
    return [' '.join(all_[s : s + rng.randint(*words)]) for s in starts]


def awd(a):
    import torch
    from fastai.text.all import AWD_LSTM, language_model_learner
    from fastai_tl.all import generate, language_model_dls, texts_vocab, tokenize_texts_once

    ts = texts(400)
    tok = tokenize_texts_once(ts, progress=False)
    vocab = texts_vocab(tok, min_freq=1)
    dls = language_model_dls(tok, vocab + [f'word{i}' for i in range(30_000 - len(vocab))], bs=8)
    learn = language_model_learner(dls, AWD_LSTM, pretrained=False)
    prompts = [' '.join(t.split()[:20]) for t in ts if len(t.split()) >= 20][:8]
    kw = dict(max_new_tokens=a.words, min_new_tokens=a.words, do_sample=True, top_k=0)

    def check(out):
        assert all(len(o.ids) == a.words for o in out)

    secs = interleave(
        {
            'predict': lambda: learn.predict(prompts[0], a.words, no_bar=True),
            'one': lambda: check(generate(learn, prompts[0], **kw)),
            'eight': lambda: check(generate(learn, prompts, **kw)),
        },
        a.rounds,
    )
    per = {k: 1000 * min(v) / a.words / (8 if k == 'eight' else 1) for k, v in secs.items()}
    return dict(
        one_prompt=ratio(secs['predict'], secs['one']),
        eight_prompts=ratio(secs['predict'], secs['eight'], 8),
        ms_per_token=per,
    )


def gpt2_model(small=True, vocab=8000, seed=0):
    import torch
    from tokenizers import Tokenizer as Tok, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    bpe = Tok(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts(2000),
        trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=['<|endoftext|>'],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tok = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token='<|endoftext|>', eos_token='<|endoftext|>')
    torch.manual_seed(seed)
    size = dict(n_embd=256, n_layer=4, n_head=4) if small else {}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=8000 if small else 50257, n_positions=512, **size, bos_token_id=0, eos_token_id=0)
    ).eval(), tok


def gpt2(a):
    import torch
    from fastai_tl.all import generate

    res = {}
    for name, n in (('small', a.words), ('base', max(a.words // 4, 10))):
        model, tok = gpt2_model(name == 'small')
        prompts = [' '.join(t.split()[:20]) for t in texts(40, (25, 60))][:8]
        ids = tok(prompts)['input_ids']
        w = max(map(len, ids))
        x, m = (
            torch.tensor([[0] * (w - len(i)) + i for i in ids]),
            torch.tensor([[0] * (w - len(i)) + [1] * len(i) for i in ids]),
        )
        kw = dict(max_new_tokens=n, min_new_tokens=n, do_sample=True, top_k=50)
        for k in (1, 8):
            xs = torch.tensor([ids[0]]), torch.ones(1, len(ids[0]), dtype=torch.long)
            bare = (
                (lambda: model.generate(xs[0], attention_mask=xs[1], pad_token_id=0, **kw))
                if k == 1
                else (lambda: model.generate(x, attention_mask=m, pad_token_id=0, **kw))
            )
            secs = interleave({'bare': bare, 'ours': lambda: generate(model, prompts[:k], tok, **kw)}, max(a.rounds, 5))
            res[f'{name}, {k} prompts'] = ratio(secs['ours'], secs['bare'])
    return res


def perplexity(a):
    import torch
    from fastai_tl.all import has_bf16, text_perplexity

    model, tok = gpt2_model()
    res = {}
    for name, words in (('3 to 20 words', (3, 20)), ('5 to 120 words', (5, 120))):
        ts, figures = texts(500, words), {}

        def plain():
            figures['plain'] = 0.0
            for t in ts:
                x = torch.tensor([[tok.bos_token_id, *tok(t)['input_ids']]])
                with torch.no_grad():
                    figures['plain'] += model(x, labels=x).loss.item() * (x.shape[1] - 1)

        def one():
            figures['one'] = sum(text_perplexity(model, t, tok).corpus.nll for t in ts)

        def batched():
            figures['all'] = text_perplexity(model, ts, tok, bs=64).corpus.nll

        def half():
            figures['half'] = text_perplexity(model, ts, tok, bs=64, dtype='bf16').corpus.nll

        secs = interleave(
            {'plain': plain, 'one': one, 'batched': batched} | ({'half': half} if has_bf16() else {}), a.rounds
        )
        assert abs(figures['plain'] / figures['all'] - 1) < 1e-4 and abs(figures['one'] / figures['all'] - 1) < 1e-4
        res[name], res[name + ', itself'] = ratio(secs['plain'], secs['batched']), ratio(secs['one'], secs['batched'])
        if has_bf16():
            assert abs(figures['half'] / figures['one'] - 1) < 1e-3
            res[name + ', bf16'], res[name + ', bf16, itself'] = (
                ratio(secs['plain'], secs['half']),
                ratio(secs['one'], secs['half']),
            )
    return res


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--words', type=int, default=100)
    p.add_argument('--rounds', type=int, default=3)
    p.add_argument('--threads', type=int)
    p.add_argument('--only', nargs='*', default=['awd', 'gpt2', 'perplexity'])
    p.add_argument('--json', type=Path)
    a = p.parse_args()
    import torch

    if a.threads:
        torch.set_num_threads(a.threads)
    res = {}
    for name in a.only:
        res[name] = dict(awd=awd, gpt2=gpt2, perplexity=perplexity)[name](a)
        for k, v in res[name].items():
            print(
                f'{name:10} {k:16}',
                f"{v['ratio']:.2f} ({v['low']:.2f} to {v['high']:.2f}; best against best {v['best']:.2f})"
                if 'ratio' in v
                else {i: round(o, 2) for i, o in v.items()},
                flush=True,
            )
    if a.json:
        a.json.write_text(json.dumps(dict(threads=torch.get_num_threads(), **res), indent=2) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
