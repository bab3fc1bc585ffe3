#!/usr/bin/env python
"""Are the layer groups right for every text architecture of transformers?

    python benchmarks/architectures/run.py [--only NAME …] [--json FILE] [--md FILE]

Every class of transformers' mappings for sequence classification and for causal language modelling is built from a
small configuration (its own default, with sizes reduced by the names of the attributes) in a process of its own,
with a limit on time and memory. Its groups are then compared with what can be found out without `layer_groups`:

- *once*: each parameter that requires a gradient is in exactly one group, and no other parameter is in any;
- *blocks*: there are as many groups between embeddings and head as the configuration has layers, and a layer's
  parameters are in one group;
- *flow*: a group changes nothing that comes before it. The check disturbs each group between the ends, and each
  parameter outside the layers, and looks at the outputs of all layers: a group may only change its own layer's
  output and those above; what changes no layer but the model's output must be in the head; what is fed by no layer
  must be with the embeddings;
- *top*: after one step with `freeze_to(-1)` the parameters of the head have changed, and no others."""

import json
import logging
import os
import re
import resource
import signal
import sys
import time
import traceback
import warnings
from collections import Counter, defaultdict
from copy import deepcopy
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common

LIMIT_S = 90  # processor time for one class
LIMIT_BYTES = 4 << 30  # memory for one class
MAX_PARAMS = 4_000_000  # size of its model

# patterns for the attributes of a configuration, and their small value; the first match counts, None keeps the default
SMALL_VALUES = {
    r'.*(dropout|_token_id|_index|eps|theta|factor|scaling|_std|_range|period|offset|ratio|temperature).*': None,
    r'.*wavelength.*|.*layers_per.*|.*(skip|shared|nextn|dense|window)_.*layers|max_window_layers': None,
    r'(encoder|decoder|num_hidden|hidden|num|n|num_encoder|num_decoder)_layers?|num_blocks|depth': 3,
    r'num_layers_per_stack|num_self_attends_per_block': 3,
    r'.*vocab_size(_.*)?|.*group_vocab|num_hash_buckets': 120,
    r'.*(kv|key_value|key|value|query)_(heads|groups)': 2,
    r'rotary_dim': 4,
    r'.*heads?': 4,
    r'.*head_dim|.*head_size|dim_head|d_head|d_kv|kv_channels|mamba_(d_head|headdim)': 8,
    r'adapter_(in|out)_dim|.*hidden_size.*|.*(d_model|n_embd|d_latents|lru_width)': 32,
    r'(emb|embed|embedding|word_embed_proj)_dim|dim|.*embed(ding)?_(size|dim)|.*emb_size|dim_model_base': 32,
    r'.*(intermediate|ffn|inner|feed_forward|ff)_?(hidden_|inner_)?(size|dim)(_mlp)?': 48,
    r'd_ff|d_inner|dff|dim_ff|hidden_dim|n_inner|adapter_.*dim|prompt_mid_dim': 48,
    r'intra_bottleneck_size': 16,
    r'.*max_.*positions?.*|n_positions|n_ctx|max_seq_len|max_sequence_length': 64,
    r'context_length|model_max_length|.*max_length|max_.*embeddings': 64,
    r'.*experts?_per_tok(en)?|moe_topk|moe_k|moe_top_?k|top_k_experts|.*index_topk': 2,
    r'.*n(um)?_.*experts': 4,
    r'n_groups?|topk_group|num_expert_group|mamba_n_?groups': 1,
    r'.*_rank': 8,
}
SMALL = [(re.compile(f'(?:{p})$'), v) for p, v in SMALL_VALUES.items()]

# what the defaults leave open, or contradict when they are small: model type -> values
MEND = dict(
    bamba=dict(mamba_d_head=16),
    falcon_h1=dict(mamba_d_ssm=32, mamba_d_head=8),
    granitemoehybrid=dict(mamba_d_head=16, layer_types=['mamba', 'full_attention', 'mamba']),
    mamba2=dict(head_dim=16),
    zaya=dict(num_experts_per_tok=1),
    xlnet=dict(d_head=8),
    deepseek_v2=dict(num_experts_per_tok=2),
    longcat_flash=dict(head_dim=8, qk_head_dim=16),
    esm=dict(vocab_size=33, pad_token_id=1),
    esmc=dict(num_key_value_heads=4),
    gpt_neo=dict(attention_types=[[['global', 'local', 'global'], 1]]),
    layoutlmv3=dict(coordinate_size=6, shape_size=4),
    lilt=dict(hidden_size=48),
    markuplm=dict(max_xpath_tag_unit_embeddings=256, max_xpath_subs_unit_embeddings=1024),
    xmod=dict(default_language='en_XX'),
    zamba=dict(
        attention_hidden_size=64, attention_head_dim=16, layers_block_type=['hybrid', 'linear_attention', 'hybrid']
    ),
    zamba2=dict(layers_block_type=['hybrid', 'linear_attention', 'hybrid']),
    cohere_compass_text=dict(rope_parameters={'full_attention': dict(rope_type='default', rope_theta=1e4)}),
    lfm2_moe=dict(layer_types=['conv', 'full_attention', 'conv']),
    dbrx=dict(attn_config=dict(rope_theta=1e4, clip_qkv=8), ffn_config=dict(ffn_hidden_size=48)),
    dots1=dict(n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2),
    gemma3n_text=dict(num_kv_shared_layers=0, intermediate_size=48, activation_sparsity_pattern=[0.5, 0.0, 0.0]),
    qwen4_exp_text=dict(
        indexer_n_heads=4, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=8, indexer_compress_ratio=4
    ),
    gemma4_text=dict(global_head_dim=8, num_kv_shared_layers=0),
    gemma4_unified_text=dict(global_head_dim=8, num_kv_shared_layers=0),
    reformer=dict(axial_pos_embds_dim=(16, 16), axial_pos_shape=(8, 8), is_decoder=True),
)


def small_values(cls):
    "Keyword arguments of a small configuration of class `cls`"
    try:
        default = cls()
    except Exception:
        default = None
    n = getattr(default, 'num_hidden_layers', 0)
    subs = getattr(cls, 'sub_configs_defaults', None) or {}
    res = {}
    names = {f.name for f in fields(cls)}
    for f in fields(cls):
        try:
            now = getattr(default, f.name, None)
        except Exception:
            now = f.default  # it differs from layer to layer
        if f.name in subs:
            c = subs[f.name].config_class
            if not getattr(c, 'model_type', None):
                c = subs[f.name].get_config_class(subs[f.name].model_type)
            if default is None or now is not None:
                res[f.name] = {**subs[f.name].init_kwargs, **small_values(c), 'model_type': c.model_type}
        elif isinstance(now, (list, tuple)) and len(now) == n > 3:  # an entry a layer: one of each type
            res[f.name] = (list({repr(o): o for o in now}.values()) + list(now))[:3]
        elif f.name.endswith(('_token_id', '_token_index')):
            if isinstance(now, int) and now >= 100:
                res[f.name] = dict(pad=0, bos=1, eos=2).get(f.name.split('_')[0], 110 + len(res) % 9)
        elif f.name in ('head_dim', 'qk_head_dim') and 'qk_rope_head_dim' in names:
            pass  # follows from others
        elif f.name == 'num_key_value_heads' and 'kv_lora_rank' in names:
            res[f.name] = 4  # one for each head
        elif (
            'int' in str(f.type)
            and not isinstance(now, bool)
            and (isinstance(now, int) or f.name in ('head_dim', 'num_key_value_heads'))
        ):
            value = next((v for p, v in SMALL if p.match(f.name)), None)
            if value is not None:
                res[f.name] = value
    for k, v in MEND.get(getattr(cls, 'model_type', ''), {}).items():
        res[k] = {**res[k], **v} if isinstance(res.get(k), dict) and k in subs else v
    return res


def classes():
    "`(task, configuration class, model class)` of both mappings, each model class once"
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    )

    seen = set()
    for task, mapping in (
        ('classification', MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
        ('causal LM', MODEL_FOR_CAUSAL_LM_MAPPING),
    ):
        for cfg in mapping.keys():
            for cls in mapping[cfg] if isinstance(mapping[cfg], tuple) else (mapping[cfg],):
                if cls not in seen:
                    yield task, cfg, cls
                seen.add(cls)


def build(cfg_class, cls):
    "A small model of `cls`, on the CPU"
    cfg = cfg_class(**small_values(cfg_class))
    if cls.config_class is not cfg_class:
        cfg = next(
            (c for c in map(partial(getattr, cfg), cfg.sub_configs) if type(c) is cls.config_class), cfg
        )  # as the Auto classes do
    with torch.device('meta'):
        n = sum(p.numel() for p in cls(deepcopy(cfg)).parameters())
    if n > MAX_PARAMS:
        raise MemoryError(f'{n:,} parameters after shrinking')
    return cls(cfg)


# --- what can be known about a model without `layer_groups` ---


def expected_layers(cfg):
    "How many layers the configuration `cfg` of a model promises, those of its parts included"
    if cfg.model_type in LAYERS:
        return LAYERS[cfg.model_type](cfg)
    parts = [c for c in (getattr(cfg, k, None) for k in cfg.sub_configs) if c is not None]
    both = [
        getattr(cfg, a, getattr(cfg, b, None))
        for a, b in (('encoder_layers', 'num_layers'), ('decoder_layers', 'num_decoder_layers'))
    ]
    own = (
        sum(both)
        if getattr(cfg, 'is_encoder_decoder', False) and all(both)
        else both[1] or getattr(cfg, 'num_hidden_layers', None) or getattr(cfg, 'depth', 0)
    )
    return (own if isinstance(own, int) and not getattr(cfg, 'encoder', None) else 0) + sum(map(expected_layers, parts))


LAYERS = dict(  # where the number of blocks has another name
    blt=lambda c: (
        c.encoder_config.num_hidden_layers + 1 + c.global_config.num_hidden_layers + c.decoder_config.num_hidden_layers
    ),  # its patcher is fixed
    moshi=lambda c: c.num_hidden_layers,
    phi4_multimodal_audio=lambda c: c.num_blocks,
    albert=lambda c: c.num_hidden_groups,
    canine=lambda c: c.num_hidden_layers + 2,
    funnel=lambda c: sum(c.block_sizes),
    hrm_text=lambda c: 2 * c.num_layers_per_stack,
    longcat_flash=lambda c: c.num_layers,
    perceiver=lambda c: c.num_self_attends_per_block,
)


def in_list(model, name):
    "The path of the outermost list item that contains parameter `name`, lists of lists as one; `None` if there is none"
    m = model
    path = []
    found = None
    for part in name.split('.')[:-1]:
        is_list = isinstance(m, nn.ModuleList)
        if found and not is_list:
            return found
        m = getattr(m, part)
        path.append(part)
        if is_list:
            found = '.'.join(path)
    return found


class Recorder:
    "Run `model` on one text, and keep inputs and outputs of the first call of the modules at `paths`"

    def __init__(self, model, paths, inputs):
        self.model, self.inputs = model, inputs
        self.mods = {p: model.get_submodule(p) for p in paths}

    def __call__(self):
        self.got = {}
        for p, m in self.mods.items():
            m.forward = partial(self.call, p, m.forward)  # a hook would miss `m.forward(x)`
        torch.manual_seed(0)
        try:
            with torch.no_grad():
                out = self.model(**self.inputs)
        finally:
            for m in self.mods.values():
                del m.forward
        self.got['', 'out'] = floats(out[0] if isinstance(out, tuple) else out.logits)
        return self.got

    def call(self, path, forward, *args, **kwargs):
        first = (path, 'in') not in self.got
        if first:
            self.got[path, 'in'] = [o.clone() for o in floats((args, kwargs))]
        out = forward(*args, **kwargs)
        if first:
            self.got[path, 'out'] = [o.clone() for o in floats(out)]
        return out


def floats(o):
    if isinstance(o, torch.Tensor):
        return [o] if o.is_floating_point() else []
    if isinstance(o, dict):
        o = list(o.values())
    return [t for x in o for t in floats(x)] if isinstance(o, (list, tuple)) else []


def changed(a, b):
    "The keys under which two records differ"
    return {
        k
        for k in a
        if len(a[k]) != len(b.get(k, ()))
        or any(x.shape != y.shape or not torch.equal(x, y) for x, y in zip(a[k], b[k]))
    }


def disturbed(rec, params):
    "What `rec` records while `params` are other than they are"
    before = [p.detach().clone() for p in params]
    with torch.no_grad():
        for p in params:
            p.add_(torch.randn_like(p) * 0.5)
    res = rec()
    with torch.no_grad():
        for p, b in zip(params, before):
            p.copy_(b)
    return res


def check_once(model, groups, fixed):
    ids = [id(p) for g in groups for p in g.params]
    want = {id(p) for n, p in model.named_parameters() if n not in fixed}
    if len(ids) != len(set(ids)):
        yield 'a parameter is in two groups'
    if set(ids) - want:
        yield 'a fixed parameter is in a group'
    if want - set(ids):
        yield 'a parameter is in no group'


def check_blocks(model, groups):
    inner = [g for g in groups if g.name not in ('embeddings', 'head')]
    n = expected_layers(model.config)
    if len(inner) != n:
        yield f'{len(inner)} groups for {n} layers'
    where = {n: g.name for g in groups for n in g.names}
    count = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    items = defaultdict(set)
    for n, p in model.named_parameters():
        item = in_list(model, n)
        if item and n in where and count[id(p)] == 1:
            items[item].add(where[n])
    for item, gs in items.items():
        if len(gs) > 1:
            yield f'{item} is split among {sorted(gs)}'


def check_flow(model, groups, inputs, fixed):
    "`groups` are those with tied embeddings at the bottom"
    torch.manual_seed(1)
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.add_(torch.randn_like(p) * 0.05)
    where = {n: i for i, g in enumerate(groups) for n in g.names}
    item = {n: in_list(model, n) for n in where}
    inner = [i for i, g in enumerate(groups) if g.name not in ('embeddings', 'head')]
    blocks = {item[n]: i for n, i in where.items() if item[n] and i in inner}
    owners = {n: n.rpartition('.')[0] for n in where}
    loose = [n for n in where if item[n] not in blocks]
    count = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    rec = Recorder(model, set(blocks) | {owners[n] for n in loose}, inputs)
    base, by_id = rec(), dict(model.named_parameters())
    up = defaultdict(set)  # owner of a loose parameter -> the groups that feed it
    for i in inner:
        own = [p for n, p in by_id.items() if where.get(n) == i and item[n] in blocks]
        diff = changed(base, disturbed(rec, own))
        for o in {owners[n] for n in loose}:
            if (o, 'in') in diff:
                up[o].add(i)
        low = [blocks[p] for p, _ in diff if p in blocks and blocks[p] < i]
        if low:
            yield f'{groups[i].name} changes {groups[min(low)].name}'
    for n in loose:
        diff = changed(base, disturbed(rec, [by_id[n]]))
        hit, i = {blocks[p] for p, k in diff if p in blocks and k == 'out'}, where[n]
        last = groups[i].name == 'head' or i == len(groups) - 1
        if hit and min(hit) < i:
            yield f'{n} in {groups[i].name} changes {groups[min(hit)].name}'
        if not hit and ('', 'out') in diff and not last:
            yield f'{n} in {groups[i].name} changes no layer: head?'
        if (owners[n], 'out') in base and count[id(by_id[n])] == 1:
            feeds = up[owners[n]]
            if feeds and i < max(feeds):
                yield f'{n} in {groups[i].name} is fed by {groups[max(feeds)].name}'
            if not feeds and hit and groups[i].name != 'embeddings':
                yield f'{n} in {groups[i].name} is fed by no layer: embeddings?'
        elif isinstance(model.get_submodule(owners[n]), nn.Embedding) and hit and groups[i].name != 'embeddings':
            yield f'{n} in {groups[i].name} is an embedding'


def check_top(model, inputs):
    from fastai_tl.models.layer_groups import LayerFreezer

    freezer = LayerFreezer(model)
    freezer.freeze_to(-1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    out = model.eval()(**inputs)
    loss = floats(out[0] if isinstance(out, tuple) else out.logits)[0].float().pow(2).mean()
    loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p.sub_(p.grad)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    head = set(freezer.layers[-1].names)
    if not moved:
        yield 'the head does not learn'
    if moved - head:
        yield f'freeze_to(-1) trains {sorted(moved - head)[0]}'


def check(cfg_class, cls):
    "A row of the table"
    from fastai_tl.models.layer_groups import layer_groups
    from fastai_tl.models.execution_order import dummy_inputs, execution_order, hf_models

    try:
        model = build(cfg_class, cls).eval()
    except Exception as e:
        return dict(built=False, why=f'{type(e).__name__}: {e}'[:300])
    fixed = {n for n, p in model.named_parameters() if not p.requires_grad}
    res = dict(built=True, problems=[], traced=bool(hf_models(model)))
    try:
        execution_order(model, strict=True)
    except Exception as e:
        res.update(traced=False, note=f'{e}'[:200])
    gs, low = layer_groups(model), layer_groups(model, tied='embeddings')
    res.update(groups=len(gs), layers=[g.name for g in low])
    if gs[-1].name != 'head':
        res['problems'].append(f'the last group is {gs[-1].name}')
    if low[0].name != 'embeddings':
        res['problems'].append(f'the first group is {low[0].name}')
    for groups in (gs, low):
        res['problems'] += [*check_once(model, groups, fixed), *check_blocks(model, groups)]
    if res['traced']:
        x = dummy_inputs(model)
        for f in (partial(check_flow, model, low, x, fixed), partial(check_top, model, x)):
            try:
                res['problems'] += list(f())
            except Exception as e:
                res['problems'].append(f'check failed: {type(e).__name__}: {e}'[:200])
                traceback.print_exc()
    res['problems'] = list(dict.fromkeys(res['problems']))
    return res


def in_child(f, *args):
    "`f(*args)` in a process of its own, with a limit on time and on the memory that it adds"
    r, w = os.pipe()
    pid = os.fork()
    if not pid:
        held = int(Path('/proc/self/statm').read_text().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (held + LIMIT_BYTES, held + LIMIT_BYTES))
        signal.setitimer(signal.ITIMER_PROF, LIMIT_S)  # of the processor, so that other programs do not matter
        signal.alarm(10 * LIMIT_S)
        t = time.perf_counter()
        try:
            res = f(*args)
        except BaseException as e:
            res = dict(built=True, traced=False, problems=[f'{type(e).__name__}: {e}'[:300]])
            traceback.print_exc()
        os.write(w, json.dumps(dict(res, seconds=round(time.perf_counter() - t, 2))).encode())
        os._exit(0)
    os.close(w)
    with os.fdopen(r, 'rb') as fh:
        out = fh.read()
    _, status = os.waitpid(pid, 0)
    return json.loads(out) if out else dict(built=False, why=f'stopped by signal {status & 127} (time or memory)')


def verdict(row):
    "One word or more on a row"
    if not row['built']:
        return 'not built: ' + ' '.join(row['why'].split())[:150]
    return '; '.join(row['problems']) or ('ok' if row['traced'] else 'ok (not run)')


def summary(rows):
    built = [r for r in rows if r['built']]
    right, run = [r for r in built if not r['problems']], [r for r in built if r.get('traced')]
    share = f'{len(right) / max(1, len(built)):.1%}'
    return (
        f'{len(rows)} classes, {len(built)} could be built, {len(right)} of these have correct groups ({share}); '
        f'{len(run)} could be run on a text and had all checks, the others those that need no run'
    )


def markdown(rows):
    "The page of the documentation"
    from importlib.metadata import version

    table = ['| class | groups | layers | result |', '|---|---|---|---|']
    for r in sorted(rows, key=lambda r: (r['task'], r['cls'].lower())):
        names = [o for o in r.get('layers', []) if o not in ('embeddings', 'head')]
        table.append(f"| `{r['cls']}` | {r.get('groups', '')} | {len(names) or ''} | {verdict(r)} |")
    checks = __doc__.split('\n\n')
    versions = f"transformers {version('transformers')}, torch {version('torch').split('+')[0]}"
    title = '# Layer groups of every architecture'
    parts = [title, f'{versions}. **{summary(rows)}.**', *checks[2:4], '\n'.join(table)]
    return '\n\n'.join(parts).replace('\n\n\n', '\n\n').rstrip() + '\n'


def main():
    ap = common.parser(__doc__, 'json')
    ap.add_argument('--only', nargs='*', default=[], help='model types or classes')
    ap.add_argument('--md', type=Path, help='also write the table to this file')
    a = ap.parse_args()
    warnings.simplefilter('ignore')
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    import fastai_tl.models.layer_groups  # noqa: F401 (once, before the child processes start)

    rows = []
    for task, cfg, cls in classes():
        if a.only and not {cfg.model_type, cls.__name__} & set(a.only):
            continue
        rows.append(dict(task=task, model=cfg.model_type, cls=cls.__name__, **in_child(check, cfg, cls)))
        print(f"{cls.__name__:45} {rows[-1].get('groups', ''):>3} {verdict(rows[-1])}", flush=True)
    print(summary(rows))
    common.write_json(a.json, rows)
    if a.md:
        a.md.write_text(markdown(rows), encoding='utf-8')


if __name__ == '__main__':
    main()
