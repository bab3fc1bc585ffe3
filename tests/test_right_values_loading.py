"""Weights that do not fit are an error in every place that loads a model; what is expected prints nothing."""

import re
import warnings

import pytest
import torch
import transformers as T
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from fastai_tl.all import *
from fastai_tl.models.hf import load_hf
from fastai_tl.models.loading import HF_TASKS
from fastai_tl.models.loading import load_pretrained

pytestmark = pytest.mark.filterwarnings('ignore')
SIZES = dict(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
             max_position_embeddings=40, pad_token_id=0)
T5 = dict(vocab_size=60, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
BART = dict(vocab_size=60, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=40,
            pad_token_id=0, eos_token_id=2, decoder_start_token_id=2)
GPT2 = dict(vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=40)

# what is saved: class, configuration, a weight of the second layer; and the tasks that it is loaded for
SAVED = {
    'BertForMaskedLM': (SIZES, 'bert.encoder.layer.1.output.dense.weight', 'classification tagging qa masked_lm'),
    'BertModel': (SIZES, 'encoder.layer.1.output.dense.weight', 'classification tagging qa masked_lm'),
    'RobertaForMaskedLM': (SIZES, 'roberta.encoder.layer.1.output.dense.weight',
                           'classification tagging qa masked_lm'),
    'MPNetForMaskedLM': (SIZES, 'mpnet.encoder.layer.1.output.dense.weight', 'classification tagging qa masked_lm'),
    'GPT2LMHeadModel': (GPT2, 'transformer.h.1.mlp.c_fc.weight', 'classification tagging qa causal_lm'),
    'LlamaForCausalLM': (SIZES, 'model.layers.1.mlp.up_proj.weight', 'classification tagging qa causal_lm'),
    'T5ForConditionalGeneration': (T5, 'encoder.block.1.layer.1.DenseReluDense.wi.weight',
                                   'classification tagging qa seq2seq'),
    'BartForConditionalGeneration': (BART, 'model.decoder.layers.1.fc1.weight', 'classification qa seq2seq')}
CASES = [(name, task) for name, (_, _, tasks) in SAVED.items() for task in tasks.split()]


def saved(folder, name, change=None):
    "Save a model, with its weights changed in place by `change(weights)`"
    cls = getattr(T, name)
    torch.manual_seed(0)
    cls(cls.config_class(**SAVED[name][0])).save_pretrained(folder)
    if change:
        weights = load_file(folder / 'model.safetensors')
        change(weights)
        save_file(weights, folder / 'model.safetensors', {'format': 'pt'})
    return str(folder)


def load(folder, task, **kw):
    return load_hf(folder, task, **(dict(classes=['a', 'b']) if task in ('classification', 'tagging') else {}), **kw)


@pytest.mark.parametrize('name,task', CASES)
def test_what_fits_is_loaded_in_silence_and_what_does_not_is_named(name, task, tmp_path, capfd):
    "The body is the one in the file; a missing, reshaped or surplus layer is an error that names it"
    weight = SAVED[name][1]
    tail = weight.split('.', 1)[1]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        folder = saved(tmp_path / 'good', name)
        capfd.readouterr()
        verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        model = load(folder, task)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (verbosity, bars)
    assert capfd.readouterr() == ('', '')
    is_new_lm = name == 'BertModel' and task == 'masked_lm'
    said = [str(w.message) for w in caught if 'fastai_tl' in w.filename]
    assert len(said) == is_new_lm, said
    file = load_file(tmp_path / 'good' / 'model.safetensors')
    own = {n: w for n, w in model.state_dict().items() if n.endswith(tail)}
    assert own and all(torch.equal(w, file[weight]) for w in own.values())

    def grow(weights):
        new = re.sub(r'\.1\.', '.2.', weight, count=1)
        weights[new] = weights[weight].clone()
    changes = dict(lacks=lambda ws: ws.pop(weight), reshaped=lambda ws: ws.update({weight: torch.zeros(3, 3)}),
                   surplus=grow)
    for what, change in changes.items():
        folder = saved(tmp_path / what, name, change)
        with pytest.raises(FastaiTLError, match='Check that the files are complete') as error:
            load(folder, task)
        named = tail.replace('.1.', '.2.', 1) if what == 'surplus' else tail
        assert named.split('.', 1)[1] in str(error.value), error.value
        load(folder, task, strict=False)


@pytest.mark.parametrize('task', ['classification', 'tagging', 'qa', 'masked_lm'])
def test_a_file_of_the_same_task_must_have_its_head(task, tmp_path):
    head = dict(classification='classifier', tagging='classifier', qa='qa_outputs', masked_lm='cls.predictions')[task]
    model = getattr(T, f'Bert{HF_TASKS[task]}'.replace('Bert', 'BertFor'))(T.BertConfig(**SIZES))
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / 'model.safetensors')
    left = {n: w for n, w in weights.items() if not n.startswith(head)}
    assert len(left) < len(weights)
    save_file(left, tmp_path / 'model.safetensors', {'format': 'pt'})
    with pytest.raises(FastaiTLError, match=f'none for {head}'):
        load(str(tmp_path), task)


def test_a_new_number_of_classes_excuses_the_head_only(tmp_path, capsys):
    model = T.BertForSequenceClassification(T.BertConfig(**SIZES))
    model.save_pretrained(tmp_path)
    new = load_hf(str(tmp_path), 'classification', classes=['a', 'b', 'c'])
    assert 'it gets a new one' in capsys.readouterr().out
    assert new.classifier.weight.shape == (3, 16)
    weights = load_file(tmp_path / 'model.safetensors')
    weights['bert.embeddings.position_embeddings.weight'] = torch.zeros(30, 16)
    save_file(weights, tmp_path / 'model.safetensors', {'format': 'pt'})
    with pytest.raises(FastaiTLError, match='position_embeddings'):
        load_hf(str(tmp_path), 'classification', classes=['a', 'b', 'c'])


def test_adapters_that_were_not_merged_are_an_error(tmp_path):
    "A file of `get_base_model().save_pretrained` has `base_layer` and `lora_A` where the model has a weight"
    peft = pytest.importorskip('peft')
    model = T.BertForSequenceClassification(T.BertConfig(**SIZES))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type='SEQ_CLS', r=2, target_modules=['query']))
    wrapped.get_base_model().save_pretrained(tmp_path)
    with pytest.raises(FastaiTLError, match='query'):
        load_hf(str(tmp_path), 'classification', classes=['a', 'b'])


def test_generation_needs_the_head_of_a_language_model(tmp_path):
    tokenizer = train_tokenizer(['a text', 'another one'], 300, kind='decoder')
    model = T.LlamaForCausalLM(T.LlamaConfig(**{**SIZES, 'vocab_size': len(tokenizer)}))
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert generate(str(tmp_path), ['a'], max_new_tokens=2)
    weights = load_file(tmp_path / 'model.safetensors')
    weights.pop('lm_head.weight')
    save_file(weights, tmp_path / 'model.safetensors', {'format': 'pt'})
    with pytest.raises(FastaiTLError, match='lm_head'):
        generate(str(tmp_path), ['a'], max_new_tokens=2)


def test_a_decoder_without_its_embeddings_is_an_error(tmp_path):
    "transformers loads the decoder of BART, and leaves its embeddings random"
    with pytest.raises(FastaiTLError, match='model.decoder.embed_tokens.weight'):
        load_hf(saved(tmp_path, 'BartForConditionalGeneration'), 'causal_lm')


def test_verbosity_is_restored_after_an_error(tmp_path):
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with pytest.raises((OSError, ValueError)):
        load_pretrained(T.AutoModel, str(tmp_path))
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
