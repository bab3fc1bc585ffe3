"Scores of generated texts compare with the whole target, not with its truncated tokens"

import pytest
from transformers import T5Config

from fastai_tl.all import HFSeq2SeqDataLoaders, hf_seq2seq_learner, train_tokenizer
from fastai_tl.learners.seq2seq import GeneratedMetric, SharedGeneration

TARGETS = [f'the year is {1900 + i} and the month {i % 12} of them' if i % 2 else f'in {1900 + i}' for i in range(40)]
SOURCES = [f'number {i}' for i in range(40)]


@pytest.mark.parametrize('n', [3, 100])
def test_references_are_whole(n):
    tok = train_tokenizer(SOURCES + TARGETS, 300, 'seq2seq', max_length=64)
    config = T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_decoder_layers=1, num_heads=2, vocab_size=len(tok),
                      pad_token_id=0, eos_token_id=2, decoder_start_token_id=0)  # fmt: skip
    valid = [i >= 30 for i in range(40)]
    dls = HFSeq2SeqDataLoaders.from_lists(SOURCES, TARGETS, tok, valid=valid, max_target_length=8, bs=4, verbose=False)
    made = SharedGeneration(n, 0, {})
    words = GeneratedMetric('words', lambda preds, refs: float(sum(len(ref.split()) for ref in refs)), made)
    learn = hf_seq2seq_learner(dls, config, metrics=[words])
    with learn.no_bar(), learn.no_logging():
        value = learn.validate()[1]
    assert max(len(tok(text)['input_ids']) for text in TARGETS[30:]) > 8
    assert set(made.refs) <= set(TARGETS[30:]) and len(made.refs) == min(n, 10)
    if n == 100:
        assert sorted(made.refs) == sorted(TARGETS[30:])
        assert value == sum(len(text.split()) for text in TARGETS[30:])
