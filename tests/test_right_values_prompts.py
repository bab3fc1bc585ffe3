"""PEFT's prompt learning gives the right values for every task and length, or is refused with the reason

The reference is PEFT's own model with one text at a time and no padding.
"""

import logging

import numpy as np
import pytest
import torch
import transformers as T

from fastai_tl.all import *
from fastai_tl.data.hf_tokenizer import pad_rows
from fastai_tl.models.hf import HFModel, load_hf
from test_architectures import IDS, MODELS

peft = pytest.importorskip('peft')
pytestmark = pytest.mark.filterwarnings('ignore')
N = 5
METHODS = dict(
    prompt=lambda: peft.PromptTuningConfig(num_virtual_tokens=N, task_type=None),
    prefix=lambda: peft.PrefixTuningConfig(num_virtual_tokens=N, task_type=None),
    p_tuning=lambda: peft.PromptEncoderConfig(num_virtual_tokens=N, task_type=None, encoder_hidden_size=16))
FAMILIES = ['bert', 'roberta', 'mpnet', 'distilbert', 'electra', 'xlnet', 'deberta-v3', 'modernbert', 'gpt2', 'llama',
            'opt', 'bloom', 't5', 'bart']
TASKS = ['classification', 'tagging', 'qa', 'causal_lm', 'masked_lm', 'seq2seq']
# the least that must work: the methods of each task
MUST_WORK = {('bert', task, method) for task in TASKS[:3] for method in ('prompt', 'p_tuning')}
MUST_WORK |= {('gpt2', task, method) for task in TASKS[:4] for method in ('prompt', 'p_tuning')}
MUST_WORK |= {('gpt2', 'causal_lm', 'prefix'), ('llama', 'causal_lm', 'prefix'), ('t5', 'seq2seq', 'prompt'),
              ('bart', 'seq2seq', 'prompt'), ('bert', 'masked_lm', 'prompt'), ('electra', 'classification', 'prompt'),
              ('opt', 'causal_lm', 'prompt'), ('llama', 'classification', 'prompt')}


def loaded(family, task, config=None):
    spec = MODELS[family]
    torch.manual_seed(0)
    n_out = 2 if task in ('classification', 'tagging') else None
    return load_hf(getattr(T, spec[0]).config_class(**{**IDS, **spec[1]}), task, n_out=n_out, peft_config=config)


def alone(hf, row, task):
    "What PEFT's model gives for one text, without the outputs of virtual tokens"
    kw = dict(input_ids=row[None], attention_mask=torch.ones_like(row[None]))
    if task == 'seq2seq':
        kw['decoder_input_ids'] = row[None]
    out = hf(**kw, return_dict=True)
    out = torch.stack([out.start_logits, out.end_logits], -1)[0] if 'start_logits' in out else out.logits[0]
    return out if task == 'classification' else out[-len(row):]


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('family', FAMILIES)
def test_alone_and_in_a_batch(family, method):
    "Every task: the same as PEFT alone, on both sides of the padding; or an error with the reason"
    logging.disable(logging.WARNING)
    for task in TASKS:
        try:
            loaded(family, task)
        except FastaiTLError:
            continue # transformers has no such head
        try:
            hf = loaded(family, task, METHODS[method]())
        except FastaiTLError as e:
            assert (family, task, method) not in MUST_WORK, str(e)
            assert 'virtual tokens' in str(e) or 'PEFT says' in str(e)
            continue
        with torch.no_grad():
            for p in hf.parameters():
                p.add_(torch.randn_like(p)*.1)
        model = HFModel(hf).eval()
        g = torch.Generator().manual_seed(0)
        rows = [torch.randint(3, 60, (n,), generator=g) for n in (20, 12, 12, 5)]
        for row in rows:
            row[-1] = 2
        with torch.no_grad():
            want = [alone(hf, row, task) for row in rows]
            for left in (False, True):
                x = TensorTokens(pad_rows([row[None] for row in rows], -1, left=left))
                out = model(x, x) if task == 'seq2seq' else model(x)
                out = torch.stack(out, -1) if isinstance(out, tuple) else out
                for got, ref, row, keep in zip(out, want, rows, x.ids >= 0):
                    got = got if task == 'classification' else got[keep]
                    assert got.shape == ref.shape
                    assert (got - ref).abs().max() <= 1e-5, (task, left)
    logging.disable(logging.NOTSET)


WORDS = 'the film was very good bad dull fine plot actor scene slow bright ending music long short story'.split()
TEXTS = [' '.join(WORDS[(i*7 + j*j) % len(WORDS)] for j in range(3 + i % 9)) for i in range(40)]
GPT2 = dict(n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0, resid_pdrop=0.,
            embd_pdrop=0., attn_pdrop=0.)


@pytest.mark.parametrize('method', ['prompt', 'p_tuning'])
def test_trained_classifier(method, tmp_path):
    "Batches, one text at a time and the Predictor agree; the virtual tokens learn; a bundle is refused"
    seed_everything(0)
    tok = train_tokenizer(TEXTS, 400, kind='decoder', max_length=50)
    dls = HFTextDataLoaders.from_lists(TEXTS, ['a', 'b']*20, tok, bs=8, verbose=False)
    learn = hf_classifier_learner(dls, T.GPT2Config(vocab_size=len(tok), **GPT2), peft_config=METHODS[method]())
    prompts = [p.detach().clone() for p in learn.model.hf.prompt_encoder.parameters() if p.requires_grad]
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 5e-2)
        after = [p for p in learn.model.hf.prompt_encoder.parameters() if p.requires_grad]
        assert any(not torch.equal(a, b) for a, b in zip(prompts, after))
        texts = [item[0] for item in dls.valid_ds.items]
        together = learn.get_preds()[0]
        one = torch.cat([learn.get_preds(dl=dls.test_dl([text]))[0] for text in texts])
        want = torch.stack([alone(learn.model.hf, torch.tensor(tok(t)['input_ids']), 'classification').softmax(-1)
                            for t in texts]).detach()
    assert (together - one).abs().max() <= 1e-5
    assert (together - want).abs().max() <= 1e-5
    assert abs(np.asarray(learn.predictor().predict(texts).probs) - want.numpy()).max() <= 1e-5
    with pytest.raises(FastaiTLError, match='cannot be merged'):
        learn.save_bundle(tmp_path / 'bundle')


def test_tagger_and_lengths():
    "One tag for each word; virtual tokens take positions from the text"
    seed_everything(0)
    tok = train_tokenizer(TEXTS, 400, max_length=60)
    words = [text.split() for text in TEXTS]
    tags = [['B-X' if j % 3 == 0 else 'O' for j in range(len(row))] for row in words]
    dls = HFTagDataLoaders.from_lists(words, tags, tok, bs=8, verbose=False, seed=0)
    config = T.BertConfig(vocab_size=len(tok), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                          intermediate_size=64, max_position_embeddings=64, pad_token_id=tok.pad_token_id)
    learn = hf_tagger_learner(dls, config, peft_config=METHODS['prompt']())
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-2)
        together = learn.word_probs(words)
        single = [learn.word_probs([row])[0] for row in words]
    assert all(abs(a - b).max() <= 1e-5 for a, b in zip(together, single))
    assert learn.model.limit == 64 - N
    with pytest.raises(DataError, match='reads 59 tokens at most'):
        learn.model(TensorTokens(torch.ones(1, 1, 60, dtype=torch.long)))


@pytest.mark.parametrize('method', METHODS)
def test_language_model(method):
    "The loss of a batch is that of its texts alone, and so is the perplexity"
    seed_everything(0)
    tok = train_tokenizer(TEXTS, 400, kind='decoder', max_length=40)
    dls = HFCausalLMDataLoaders.from_texts(TEXTS*3, tok, max_length=24, bs=4)
    learn = hf_causal_lm_learner(dls, T.GPT2Config(vocab_size=len(tok), **GPT2), peft_config=METHODS[method]())
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-2)
        hf = learn.model.hf.eval()
        res = learn.perplexity(TEXTS[:6])
    for scored in res.scores:
        ids = torch.tensor(scored.read)
        with torch.no_grad():
            logits = alone(hf, ids, 'causal_lm')
        want = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction='none')
        assert abs(np.asarray(scored.nll) - want.numpy()[-len(scored.nll):]).max() <= 1e-4


def test_what_has_no_effect_is_refused():
    "MPNet ignores a prefix; BERT has no way to read one in a classifier"
    for family, task in (('mpnet', 'masked_lm'), ('bert', 'classification')):
        with pytest.raises(FastaiTLError, match='virtual tokens of PREFIX_TUNING'):
            loaded(family, task, METHODS['prefix']())


def test_lora_works_as_before():
    config = peft.LoraConfig(r=2, target_modules=['query', 'value'])
    hf = loaded('bert', 'classification', config)
    assert HFModel(hf).limit == 40 and not HFModel(hf).by_length
