"""What generation and perplexity cost, as ratios to other libraries.

    python benchmarks/generation/run.py [--words 100] [--rounds 3] [--threads N] [--only awd gpt2 perplexity]
                                        [--json FILE]

- awd: tokens a second of an AWD_LSTM (vocabulary 30,000, 400/1152/3) against fastai's `LMLearner.predict`, for one
  prompt and for eight. `predict` writes one text at a time, so eight texts take it eight times as long as one.
  Wanted: at least 15 times as fast with one prompt, 80 times with eight.
- gpt2: `generate` against a bare `model.generate` on prepared tensors, for a small GPT-2 (4 layers of 256) and one
  of base size. Wanted: at most 1.03 times the time.
- perplexity: 500 texts of mixed length, short and long, with the small GPT-2 in batches of up to 64, in float32
  and with `dtype='bf16'`, against one text at a time in float32: by transformers' own loss, as its tutorials do
  it, and by `text_perplexity`. Wanted: at least 3 times as fast.

The variants run in turn, in an order that changes from round to round, so that a busy machine slows all alike. The
ratio is the median of the rounds' ratios. Weights are random: they cost the same."""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import interleave, offline, parser, ratio, set_threads, show, write_json

offline(silent=False)


def texts(n, words=(5, 120), seed=0):
    from fastai_tl.datasets.corpora import docstring_corpus

    rng = random.Random(seed)
    corpus = ' '.join(docstring_corpus().text).split()
    starts = [rng.randrange(len(corpus) - 200) for _ in range(n)]
    return [' '.join(corpus[s : s + rng.randint(*words)]) for s in starts]


def awd(a):
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

    variants = {
        'predict': lambda: learn.predict(prompts[0], a.words, no_bar=True),
        'one': lambda: check(generate(learn, prompts[0], **kw)),
        'eight': lambda: check(generate(learn, prompts, **kw)),
    }
    secs = interleave(variants, a.rounds)
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
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=['<|endoftext|>'],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts(2000), trainer)
    tok = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token='<|endoftext|>', eos_token='<|endoftext|>')
    torch.manual_seed(seed)
    size = dict(n_embd=256, n_layer=4, n_head=4) if small else {}
    vocab_size = 8000 if small else 50257
    config = GPT2Config(vocab_size=vocab_size, n_positions=512, **size, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval(), tok


def gpt2(a):
    import torch
    from fastai_tl.all import generate

    res = {}
    for name, n in (('small', a.words), ('base', max(a.words // 4, 10))):
        model, tok = gpt2_model(name == 'small')
        prompts = [' '.join(t.split()[:20]) for t in texts(40, (25, 60))][:8]
        ids = tok(prompts)['input_ids']
        width = max(map(len, ids))
        x = torch.tensor([[0] * (width - len(i)) + i for i in ids])
        mask = torch.tensor([[0] * (width - len(i)) + [1] * len(i) for i in ids])
        one = torch.tensor([ids[0]])
        inputs = {1: (one, torch.ones_like(one)), 8: (x, mask)}
        kw = dict(max_new_tokens=n, min_new_tokens=n, do_sample=True, top_k=50)
        for k, (tokens, attention) in inputs.items():
            variants = {
                'bare': lambda: model.generate(tokens, attention_mask=attention, pad_token_id=0, **kw),
                'ours': lambda: generate(model, prompts[:k], tok, **kw),
            }
            secs = interleave(variants, max(a.rounds, 5))
            res[f'{name}, {k} prompts'] = ratio(secs['ours'], secs['bare'])
    return res


def perplexity(a):
    import torch
    from fastai_tl.all import has_bf16, text_perplexity

    model, tok = gpt2_model()
    res = {}
    for name, words in (('3 to 20 words', (3, 20)), ('5 to 120 words', (5, 120))):
        ts = texts(500, words)
        figures = {}

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

        variants = {'plain': plain, 'one': one, 'batched': batched}
        if has_bf16():
            variants['half'] = half
        secs = interleave(variants, a.rounds)
        assert abs(figures['plain'] / figures['all'] - 1) < 1e-4
        assert abs(figures['one'] / figures['all'] - 1) < 1e-4
        res[name] = ratio(secs['plain'], secs['batched'])
        res[f'{name}, itself'] = ratio(secs['one'], secs['batched'])
        if has_bf16():
            assert abs(figures['half'] / figures['one'] - 1) < 1e-3
            res[f'{name}, bf16'] = ratio(secs['plain'], secs['half'])
            res[f'{name}, bf16, itself'] = ratio(secs['one'], secs['half'])
    return res


EXPERIMENTS = dict(awd=awd, gpt2=gpt2, perplexity=perplexity)


def main():
    p = parser(__doc__, 'rounds', 'threads', 'json', rounds=3)
    p.add_argument('--words', type=int, default=100)
    p.add_argument('--only', nargs='*', default=list(EXPERIMENTS), choices=list(EXPERIMENTS))
    a = p.parse_args()
    import torch

    set_threads(a.threads)
    results = {}
    for name in a.only:
        results[name] = EXPERIMENTS[name](a)
        show(name, results[name])
    write_json(a.json, dict(threads=torch.get_num_threads(), **results), indent=2)


if __name__ == '__main__':
    main()
