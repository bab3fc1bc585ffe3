"""Layer groups of common architectures, each built from a small configuration

All classes that transformers has are in `benchmarks/architectures/run.py`.
"""

import logging
from functools import partial

import pytest
import torch
import transformers
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from torch import nn
from torch.nn.functional import cross_entropy

from fastai_tl.all import *
from fastai_tl.models.execution_order import hf_models

pytestmark = pytest.mark.filterwarnings('ignore')
IDS = dict(vocab_size=60, pad_token_id=0, bos_token_id=1, eos_token_id=2)
ENC = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, max_position_embeddings=40)
DEC = dict(ENC, num_key_value_heads=1, head_dim=8)
S2S = dict(d_model=16, encoder_layers=2, decoder_layers=3, encoder_attention_heads=2, decoder_attention_heads=2,
           encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=40, decoder_start_token_id=2)
T5 = dict(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=3, num_heads=2, decoder_start_token_id=0)
GPT2 = dict(n_embd=16, n_layer=3, n_head=2, n_positions=40)

RELATIVE = dict(relative_attention=True, pos_att_type=['c2p', 'p2c'])
OPT = dict(hidden_size=16, num_hidden_layers=3, ffn_dim=32, num_attention_heads=2, word_embed_proj_dim=8,
           max_position_embeddings=40)
T5_NORM = {'encoder.block.1': 'encoder.final_layer_norm.'}
BART_NORM = {'encoder.layers.1': 'encoder.layer_norm.'}

# name -> class of the model, its configuration, and the parameters outside the blocks that are in a block's group
MODELS = {
    'bert': ('BertForSequenceClassification', ENC),
    'roberta': ('RobertaForSequenceClassification', ENC),
    'xlm-roberta': ('XLMRobertaForSequenceClassification', ENC),
    'camembert': ('CamembertForSequenceClassification', ENC),
    'ernie': ('ErnieForSequenceClassification', ENC),
    'electra': ('ElectraForSequenceClassification', dict(ENC, embedding_size=8)),
    'albert': ('AlbertForSequenceClassification', dict(ENC, embedding_size=8)),
    'mpnet': ('MPNetForSequenceClassification', ENC),
    'distilbert': ('DistilBertForSequenceClassification',
                   dict(dim=16, n_layers=3, n_heads=2, hidden_dim=32, max_position_embeddings=40)),
    'deberta': ('DebertaForSequenceClassification', dict(ENC, **RELATIVE)),
    'deberta-v2': ('DebertaV2ForSequenceClassification',
                   dict(ENC, **RELATIVE, position_biased_input=False, conv_kernel_size=3),
                   {'layer.0': 'encoder.conv.'}),
    'deberta-v3': ('DebertaV2ForSequenceClassification',
                   dict(ENC, **RELATIVE, position_biased_input=False, position_buckets=8, norm_rel_ebd='layer_norm',
                        share_att_key=True)),
    'modernbert': ('ModernBertForSequenceClassification',
                   dict(ENC, global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2)),
    'roformer': ('RoFormerForSequenceClassification', dict(ENC, embedding_size=8)),
    'longformer': ('LongformerForSequenceClassification', dict(ENC, attention_window=4)),
    'big_bird': ('BigBirdForSequenceClassification', dict(ENC, block_size=4)),
    'xlnet': ('XLNetForSequenceClassification', dict(d_model=16, n_layer=3, n_head=2, d_head=8, d_inner=32)),
    'funnel': ('FunnelForSequenceClassification',
               dict(d_model=16, block_sizes=[2, 1, 2], n_head=2, d_head=8, d_inner=32)),
    'xlm': ('XLMForSequenceClassification', dict(emb_dim=16, n_layers=3, n_heads=2)),
    'canine': ('CanineForSequenceClassification', dict(ENC, num_hash_buckets=20, local_transformer_stride=4),
               {'initial_char_encoder.layer.0': 'chars_to_molecules.', 'encoder.layer.2': 'projection.'}),
    'gpt2-classifier': ('GPT2ForSequenceClassification', GPT2),
    'llama-classifier': ('LlamaForSequenceClassification', DEC),
    'bart-classifier': ('BartForSequenceClassification', S2S),
    't5-classifier': ('T5ForSequenceClassification', T5, T5_NORM),
    'gpt2': ('GPT2LMHeadModel', GPT2),
    'gpt_neo': ('GPTNeoForCausalLM',
                dict(hidden_size=16, num_layers=3, attention_types=[[['global', 'local', 'global'], 1]], num_heads=2,
                     intermediate_size=32, max_position_embeddings=40)),
    'opt': ('OPTForCausalLM', OPT),
    'bloom': ('BloomForCausalLM', dict(hidden_size=16, n_layer=3, n_head=2)),
    'llama': ('LlamaForCausalLM', DEC),
    'mistral': ('MistralForCausalLM', DEC),
    'qwen2': ('Qwen2ForCausalLM', DEC),
    'qwen3': ('Qwen3ForCausalLM', DEC),
    'gemma': ('GemmaForCausalLM', DEC),
    'phi': ('PhiForCausalLM', ENC),
    'falcon': ('FalconForCausalLM', dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2)),
    'mixtral': ('MixtralForCausalLM', dict(DEC, num_local_experts=3)),
    'mamba': ('MambaForCausalLM', dict(hidden_size=16, num_hidden_layers=3, state_size=4)),
    't5': ('T5ForConditionalGeneration', T5, T5_NORM),
    'mt5': ('MT5ForConditionalGeneration', T5, T5_NORM),
    'bart': ('BartForConditionalGeneration', S2S),
    'mbart': ('MBartForConditionalGeneration', S2S, BART_NORM),
    'pegasus': ('PegasusForConditionalGeneration', S2S, BART_NORM),
    'marian': ('MarianMTModel', S2S)}
UNUSED = {'big_bird': {'bert.pooler.weight', 'bert.pooler.bias'}}   # its classifier has another way to pool
each = pytest.mark.parametrize('name', MODELS)


def build(name):
    "A small model of random weights; noise takes the zeros out of biases and new heads"
    cls = getattr(transformers, MODELS[name][0])
    logging.getLogger('transformers').setLevel(logging.ERROR)
    torch.manual_seed(0)
    model = cls(cls.config_class(**{**IDS, **MODELS[name][1]}))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p)*.02)
    return model


def n_layers(cfg):
    "What the configuration says"
    if cfg.model_type == 'albert':
        return cfg.num_hidden_groups
    if cfg.model_type == 'funnel':
        return sum(cfg.block_sizes)
    if cfg.model_type == 'canine':
        return 1 + cfg.num_hidden_layers + 1
    if cfg.model_type in ('t5', 'mt5'):
        return cfg.num_layers + cfg.num_decoder_layers
    return cfg.encoder_layers + cfg.decoder_layers if cfg.is_encoder_decoder else cfg.num_hidden_layers


def block_of(name):
    "The path of a parameter's layer, by its numbers: `…layer.3`, in Funnel's lists of lists `…blocks.0.1`"
    parts = name.split('.')[:-1]
    i = next((i for i,p in enumerate(parts) if p.isdigit()), None)
    if i is None:
        return None
    if parts[i+1:i+2] and parts[i+1].isdigit():
        i += 1
    return '.'.join(parts[:i+1])


class Logits(nn.Module):
    "A Hugging Face model as fastai wants it: a tensor in, a tensor out"
    def __init__(self, hf):
        super().__init__()
        self.hf = hf
    def forward(self, x):
        kw = dict(decoder_input_ids=x) if self.hf.config.is_encoder_decoder else {}
        return self.hf(input_ids=x, **kw).logits


def batch(hf):
    g = torch.Generator().manual_seed(0)
    x = torch.randint(3, 60, (4, 16), generator=g)
    x[:,-1] = 2
    return x, (torch.tensor([0,1,1,0]) if 'Classification' in type(hf).__name__ else x)


def learner(hf, **kw):
    x,y = batch(hf)
    data = [(x,y)]
    dl = DataLoader(data, bs=None, num_workers=0)
    loss = lambda out, y: cross_entropy(out.float().flatten(0, -2), y.flatten())
    return Learner(DataLoaders(dl, dl), Logits(hf), loss_func=loss, splitter=layer_splitter(), train_bn=False, **kw)


def values(m):
    return {n: p.detach().clone() for n,p in m.named_parameters()}
def moved(m, before):
    return {n for n,p in m.named_parameters() if not torch.equal(p, before[n])}


@each
def test_each_parameter_is_in_one_group(name):
    m = build(name)
    trainable = {n for n,p in m.named_parameters() if p.requires_grad}
    for tied in ('head', 'embeddings'):
        names = [n for g in layer_groups(m, tied) for n in g.names]
        assert len(names) == len(set(names)) and set(names) == trainable
        for g in layer_groups(m, tied):
            assert len(g.names) == len(g.params) == len(g.kinds)
            assert all(m.get_parameter(n) is p for n,p in zip(g.names, g.params))


@each
def test_layers_between_embeddings_and_head(name):
    m = build(name)
    execution_order(m, strict=True)   # the model says itself in which order it works
    groups,low = layer_groups(m),layer_groups(m, tied='embeddings')
    assert groups[-1].name == 'head' and low[0].name == 'embeddings'
    for gs in (groups, low):
        assert sum(g.name not in ('embeddings', 'head') for g in gs) == n_layers(m.config)
    out = m.get_output_embeddings()
    if name == 'canine':
        wte = next(p for n,p in m.named_parameters() if isinstance(m.get_submodule(n.rpartition('.')[0]), nn.Embedding))
    else:
        wte = m.get_input_embeddings().weight
    assert any(wte is p for p in low[0].params)
    tied = out is not None and out.weight is wte
    assert any(wte is p for p in groups[-1].params) == tied
    if tied:
        # the tied matrix may be all there is below
        assert (groups[0].name == 'embeddings') == (len(low[0].params) > 1)


@each
def test_a_block_is_its_path(name):
    "A block's group holds what is under the block's path, and nothing else but what MODELS says"
    m = build(name)
    extra = dict(MODELS[name][2]) if len(MODELS[name]) > 2 else {}
    for g in layer_groups(m):
        if g.name in ('embeddings', 'head'):
            continue
        inside = [n for n in g.names if not (g.name in extra and extra[g.name] in n)]
        paths = {block_of(n) for n in inside}
        assert None not in paths and len({p.rpartition('.')[2] for p in paths}) == 1, g.name
        if name != 'xlm':
            assert len(paths) == 1   # XLM's layers lie in four lists
        under = {n for n,p in m.named_parameters() if block_of(n) in paths and p.requires_grad}
        assert under == set(inside), g.name
        if g.name in extra:
            assert len(inside) < len(g.names), f'nothing of {extra[g.name]} in {g.name}'


@each
def test_every_parameter_is_stepped_once(name):
    m = build(name)
    fixed = {n for n,p in m.named_parameters() if not p.requires_grad}
    before = values(m)
    opt = LayerwiseOptimizer(layer_splitter()(m), opt=torch.optim.SGD, lr=1., wd=0.)
    for p in m.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    wrong = [n for n,p in m.named_parameters() if not torch.equal(p, before[n] if n in fixed else before[n]-1)]
    assert not wrong


@each
def test_freeze_to_trains_the_head_alone(name):
    hf = build(name)
    learn = learner(hf, opt_func=partial(LayerwiseOptimizer, opt=torch.optim.SGD, wd=.1, wd_mults={}), lr=.1)
    learn.freeze_to(-1)
    before = values(hf)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    head = set(layer_groups(hf)[-1].names)
    changed = moved(hf, before)
    assert changed <= head, sorted(changed-head)
    assert changed | UNUSED.get(name, set()) == head, f'part of the head did not learn: {sorted(head-changed)}'


@each
def test_three_steps_lower_the_loss(name):
    hf = build(name)
    learn = learner(hf, opt_func=LayerwiseOptimizer, lr=3e-3)
    def loss():
        return float(learn.validate()[0])
    with learn.no_bar(), learn.no_logging():
        first = loss()
        learn.fit(3)
        assert loss() < first


def test_adapters_stay_adapters():
    peft = pytest.importorskip('peft')
    m = peft.get_peft_model(build('bert'), peft.LoraConfig(task_type='SEQ_CLS', r=2, target_modules=['query', 'value']))
    trainable = {n for n,p in m.named_parameters() if p.requires_grad}
    groups = layer_groups(mark_fixed(m))
    assert {n for g in groups for n in g.names} == trainable
    assert [g.name for g in groups] == ['layer.0', 'layer.1', 'layer.2', 'head']
    assert all('lora' in n for g in groups[:-1] for n in g.names)
    freezer = LayerFreezer(m)
    freezer.freeze_all()
    freezer.unfreeze_all()
    assert {n for n,p in m.named_parameters() if p.requires_grad} == trainable


def test_a_model_on_meta_or_with_checkpointing_has_the_same_groups():
    want = [(g.name, g.names) for g in layer_groups(build('opt'))]
    ckpt = build('opt').train()
    ckpt.gradient_checkpointing_enable()
    assert [(g.name, g.names) for g in layer_groups(ckpt)] == want
    cls = transformers.OPTForCausalLM
    with torch.device('meta'):
        meta = cls(cls.config_class(**IDS, **MODELS['opt'][1]))
    assert [(g.name, g.names) for g in layer_groups(meta)] == want


def test_what_is_asked_for_groups_keeps_its_state():
    "Mode, hooks, gradients, random numbers and weights are as before"
    m = build('big_bird').train()
    m.get_submodule('bert.encoder').eval()
    calls = []
    m.register_forward_hook(lambda *_: calls.append(1))
    before = values(m)
    modes = [o.training for o in m.modules()]
    state = torch.get_rng_state()
    layer_groups(m)
    assert not moved(m, before)
    assert modes == [o.training for o in m.modules()] and torch.equal(state, torch.get_rng_state())
    assert not calls and all(p.grad is None for p in m.parameters()) and hf_models(m) == [m]
    assert m.bert.attention_type == 'block_sparse'   # after a short text BigBird gives that up


def test_groups_of_a_frozen_or_moved_model_are_the_same():
    m = build('marian')
    want = [g.names for g in layer_groups(m)]
    m.requires_grad_(False)
    assert [g.names for g in layer_groups(m)] == want
    wrapped = nn.ModuleDict(dict(hf=m.bfloat16()))
    assert [g.names for g in layer_groups(wrapped)] == [[f'hf.{n}' for n in ns] for ns in want]


def test_a_new_vocabulary_is_traced_again():
    m = build('gpt2')
    layer_groups(m)
    m.resize_token_embeddings(70, mean_resizing=False)
    g = layer_groups(m)[-1]
    assert any(p is m.get_output_embeddings().weight for p in g.params) and g.params[0].shape[0] == 70
