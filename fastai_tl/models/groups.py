
#| export
from collections import defaultdict
from dataclasses import dataclass, field
from functools import reduce
from itertools import accumulate
from operator import or_
from os.path import commonprefix
import pandas as pd, torch
from torch import nn
from fastcore.all import patch
from fastai.learner import Learner
from fastai_tl.core import FastaiTLError
from fastai_tl.models.trace import execution_order, fixed_parameters



#| export
@dataclass
class LayerGroup:
    "Parameters that are frozen, thawed and given a rate together"
    name:str # `embeddings`, `layer.0`, …, `head`
    params:list = field(default_factory=list, repr=False) # The parameters, each in one group only
    names:list = field(default_factory=list) # Their names in `model.named_parameters()`
    kinds:list = field(default_factory=list, repr=False) # Their kinds: embedding, attention, ffn, recurrent, weight, norm, bias or head
    @property
    def numel(self): "Number of weights"; return sum(p.numel() for p in self.params)



#| export
def _own(m): return any(True for _ in m.parameters())
def _is_block(m): return isinstance(m, nn.RNNBase) or any(_own(c) for c in m.children())

def _is_stack(m, sequential):
    kids = [c for c in m.children() if _own(c)]
    if isinstance(m, nn.ModuleList): return bool(kids) and all(_is_block(c) for c in kids)
    if not (sequential and isinstance(m, nn.Sequential)): return False
    return len(kids)>=3 and all(_is_block(c) for c in kids) and len({type(c) for c in kids})==1



#| export
def _find_stacks(model, sequential=False):
    "Paths of the outermost stacks of `model`, mapped to their blocks"
    res = {}
    def walk(m, path):
        if _is_stack(m, sequential):
            blocks = [(f'{path}.{n}'.lstrip('.'), c) for n,c in m.named_children() if _own(c)]
            if all(isinstance(c, nn.ModuleList) for _,c in blocks): # a list of lists, as Funnel has
                blocks = [(f'{p}.{n}', b) for p,c in blocks for n,b in c.named_children()]
            res[path] = blocks
        else:
            for n,c in m.named_children(): walk(c, f'{path}.{n}' if path else n)
    walk(model, '')
    return res



#| export
_attention = ('attn', 'attention')
def param_kind(
    owner:nn.Module, # The module that holds the parameter
    name:str, # The parameter's full name
    p:torch.Tensor, # The parameter
    head:bool=False, # Is it in the model's head?
    block:bool=False # Is it in a block of a stack?
) -> str: # embedding, attention, ffn, recurrent, weight, norm, bias or head
    "The kind of a parameter, by the module that owns it"
    leaf = name.split('.')[-1]
    if 'norm' in type(owner).__name__.lower(): return 'norm'
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)) and 'bias' not in leaf: return 'embedding'
    if leaf.startswith('bias') or leaf.endswith('bias') or p.ndim<2: return 'bias'
    if head: return 'head'
    if isinstance(owner, nn.RNNBase) or leaf.endswith('_raw'): return 'recurrent'
    if any(o in name.lower() for o in _attention): return 'attention'
    return 'ffn' if block else 'weight'



#| export
def _inside(name, paths):
    "The one of `paths` that the parameter `name` lies in, or `None`"
    parts = name.split('.')
    return next((o for o in ('.'.join(parts[:i]) for i in range(1, len(parts))) if o in paths), None)

def _sequence(stacks, uses):
    "The blocks of all stacks by first use; an unused one follows its predecessor"
    first,res = {b: t for t,b in reversed(list(enumerate(uses)))},[]
    for blocks in stacks.values():
        t = -1
        for p,_ in blocks:
            t = first.get(p, t)
            res.append((t, p))
    return [p for _,p in sorted(res, key=lambda o: o[0])]



#| export
def _companions(model, stacks):
    "Lists of loose modules beside a stack, and as long as it"
    res = {}
    for path,m in model.named_modules():
        if not isinstance(m, nn.ModuleList) or path in stacks or len(m)<2 or not all(_own(c) for c in m): continue
        if any(s.rpartition('.')[0]==path.rpartition('.')[0] and len(bl)==len(m) for s,bl in stacks.items()): res[path] = [(f'{path}.{n}', c) for n,c in m.named_children()]
    return res

def _joined_stacks(stacks, seq):
    "Lists of stacks: several if they lie side by side and take turns in `seq`, else one"
    index,res = {p: (s,i) for s,bl in stacks.items() for i,(p,_) in enumerate(bl)},[]
    def together(a, b):
        if a.rpartition('.')[0]!=b.rpartition('.')[0] or len(stacks[a])!=len(stacks[b]) or len(stacks[a])<2: return False
        turns = [i for s,i in map(index.get, seq) if s in (a,b)]
        return turns==sorted(turns)
    for s in stacks:
        found = next((ss for ss in res if together(ss[0], s)), None)
        if found: found.append(s)
        else: res.append([s])
    return res



#| export
def _layers(stacks, uses, companions=()):
    "`(name, paths)` of the layer groups' blocks, bottom to top"
    seq = _sequence(stacks, uses)
    joined = [ss for ss in _joined_stacks(stacks, seq) if ss[0] not in companions]
    for k in range(1 if len(joined)==1 else 2, 9): # as much of the path as tells the stacks apart
        tails = ['.'.join(ss[0].split('.')[-k:]) for ss in joined]
        if len(set(tails))==len(tails): break
    res = [(f'{t}.{i}'.lstrip('.'), [stacks[s][i][0] for s in ss]) for t,ss in zip(tails, joined) for i in range(len(stacks[ss[0]]))]
    return sorted(res, key=lambda o: seq.index(o[1][0]))



#| export
def _nearest(names, stacks):
    "The stacks whose paths share most with one of `names`"
    near = {s: max(len(commonprefix([n.split('.'), s.split('.')])) for n in names) for s in stacks}
    return [s for s in near if near[s]==max(near.values())]

class _Work:
    "What the blocks do in a forward pass: `uses` of parameters, and for each the position of the block in which it happens, or `None`"
    def __init__(self, uses, at):
        self.uses,self.at = uses,at
        self.busy,self.masks = [t for t,i in enumerate(at) if i],defaultdict(int)
        for u,i in zip(uses, at): self.masks[i] |= u.bit
        self.last = list(accumulate((i or 0 for i in at), lambda a,b: b or a)) # the block that worked last
        self.fed = reduce(or_, (u.fed_by for u,i in zip(uses, at) if i), 0) # all that feeds a block
        self.sound = all(self.masks[i] & self.fed for i in set(self.last) - {0, max(self.last, default=0)}) # no block's trail is lost



#| export
def _used_at(name, work, n, near):
    "Positions of the loose parameter `name` by its uses, among `n` blocks, of which those in `near` are its own stack's"
    start = next((t for t in work.busy if work.at[t] in near), work.busy[0])
    def one(t, u):
        feeders = [i for i,m in work.masks.items() if i and m & u.fed_by]
        if t<work.busy[0]: return 0
        if t>work.busy[-1] or (work.sound and not u.bit & work.fed): return n+1
        return max(feeders) if feeders else 0 if t<start else work.last[t]
    return {one(t, u) for t,u in enumerate(work.uses) if u.name==name}



#| export
def _registered_at(model, number, n):
    "Positions of all loose parameters by registration: `{name: position}`"
    res,i = {},0
    for path,m in model.named_modules(remove_duplicate=False):
        for k in m._parameters:
            name = f'{path}.{k}'.lstrip('.')
            block = _inside(name, number)
            if block: i = number[block]
            elif isinstance(m, (nn.Embedding, nn.EmbeddingBag)): res[name] = 0
            elif i==0: res[name] = n+1 if path.split('.')[-1].startswith('final') else 0
            else: res[name] = n+1 if i==n else i
    return res



#| export
def _stack_layout(model, stacks):
    "Names of the groups, the positions of each parameter by its name, and the paths of the blocks"
    names,uses = _all_names(model),execution_order(model)
    beside = _companions(model, stacks) if uses else {}
    inside = _inside_of(names, {**stacks, **beside})
    layers = _layers({**stacks, **beside}, [_only(inside[u.name]) for u in uses], beside)
    number = {p: i for i,(_,ps) in enumerate(layers, 1) for p in ps}
    inside = {k: {b if b in number else None for b in bs} for k,bs in inside.items()}
    work = _Work(uses, [number.get(_only(inside[u.name])) for u in uses])
    reg,pos = _registered_at(model, number, len(layers)),{}
    for k,ns in names.items():
        near = {number[p] for s in _nearest(ns, stacks) for p,_ in stacks[s]}
        loose = _used_at(k, work, len(layers), near) if None in inside[k] and work.busy else set()
        pos[k] = {number[b] for b in inside[k] if b} | (loose or {reg[n] for n in ns if n in reg})
    return ['embeddings', *(n for n,_ in layers), 'head'],pos,set(number)



#| export
def _only(blocks): return next(iter(blocks)) if len(blocks)==1 else None # a parameter that several blocks share tells nothing about their order

def _inside_of(names, stacks):
    paths = {p for bl in stacks.values() for p,_ in bl}
    return {k: {_inside(n, paths) for n in ns} for k,ns in names.items()}

def _all_names(model):
    "All names of each parameter, by the name that `named_parameters` gives it"
    res = defaultdict(list)
    for n,p in model.named_parameters(remove_duplicate=False): res[id(p)].append(n)
    return {n: res[id(p)] for n,p in model.named_parameters()}



#| export
def _children_layout(model):
    "The same for a model without a stack: groups are the children of the first module that has several"
    m,path = model,''
    while True:
        kids = [(n,c) for n,c in m.named_children() if _own(c)]
        if len(kids)!=1 or m._parameters: break
        path,m = f'{path}.{kids[0][0]}'.lstrip('.'),kids[0][1]
    paths = [path] + [f'{path}.{n}'.lstrip('.') for n,_ in kids]
    pos = {k: {paths.index(_inside(n, paths[1:]) or path) for n in ns} for k,ns in _all_names(model).items()}
    return [p or 'model' for p in paths],pos,()



#| export
def layer_groups(
    model:nn.Module, # Any PyTorch model, or a fastai Learner's `model`
    tied:str='head' # Where an output layer that shares the input embedding goes: `head`, or `embeddings`
) -> list: # `LayerGroup`s, bottom to top; each parameter that is not fixed is in exactly one
    "The layer groups of `model`, by its structure and the order in which it works"
    if tied not in ('head','embeddings'): raise FastaiTLError("`tied` must be 'head' or 'embeddings'", repr(tied))
    stacks = _find_stacks(model) or _find_stacks(model, sequential=True)
    names,pos,blocks = _stack_layout(model, stacks) if stacks else _children_layout(model)
    groups = [LayerGroup(n) for n in names]
    _fill(groups, model, pos, blocks, tied)
    if blocks: _drop_norm_head(groups, pos)
    return [g for g in groups if g.params]



#| export
def _fill(groups, model, pos, blocks, tied):
    "Put the parameters of `model` into `groups`, shared ones once, fixed ones nowhere"
    last,fixed,names = len(groups)-1,set(fixed_parameters(model)),_all_names(model)
    for name,p in model.named_parameters():
        if name in fixed: continue
        owners = [model.get_submodule(n.rpartition('.')[0]) for n in names[name]]
        owner = next((o for o in owners if isinstance(o, nn.Embedding)), owners[0])
        g = groups[last if tied=='head' and isinstance(owner, nn.Embedding) and last in pos[name] else min(pos[name])]
        g.params.append(p); g.names.append(name)
        g.kinds.append(param_kind(owner, name, p, head=g.name=='head', block=_inside(name, blocks) is not None))

def _drop_norm_head(groups, pos):
    "Let norms that are all there is after the last block go with it"
    *_,block,head = groups
    if set(head.kinds)!={'norm'} or any(len(groups)-1 in at and n not in head.names for n,at in pos.items()): return
    for a in ('params','names','kinds'): getattr(block, a).extend(getattr(head, a)); getattr(head, a).clear()



#| export
def merge_groups(
    groups:list, # From `layer_groups`
    n_groups:int # How many to make of them, the head included
) -> list: # `n_groups` new `LayerGroup`s
    "Join neighbouring groups; the top group stays as it is"
    if not 1<=n_groups<=len(groups): raise FastaiTLError(f'`n_groups` must be between 1 and {len(groups)}, the number of layer groups', str(n_groups))
    if n_groups==len(groups): return groups
    if n_groups==1: return [_joined(groups)]
    low = 1 if groups[0].name=='embeddings' and len(groups)-2>=n_groups-1 else 0
    body,k = groups[low:-1],n_groups-1
    cuts = [round(i*len(body)/k) for i in range(k+1)]
    parts = [body[a:b] for a,b in zip(cuts, cuts[1:])]
    parts[0] = groups[:low] + parts[0]
    return [_joined(p) for p in parts] + groups[-1:]

def _joined(gs):
    if len(gs)==1: return gs[0]
    return LayerGroup(f'{gs[0].name} – {gs[-1].name}', *[sum((getattr(g,a) for g in gs), []) for a in ('params','names','kinds')])



#| export
class layer_splitter:
    "A fastai `splitter` of layer groups that also tells the optimizer what each parameter is"
    def __init__(self,
        n_groups:int|None=None, # Merge neighbours into so many groups; all if `None`
        tied:str='head' # See `layer_groups`
    ): self.n_groups,self.tied = n_groups,tied
    def groups(self,
        model:nn.Module # The model to split
    ) -> list: # `LayerGroup`s
        "The layer groups behind the split of `model`"
        gs = layer_groups(model, self.tied)
        return gs if self.n_groups is None else merge_groups(gs, self.n_groups)
    def __call__(self, model): return ParamLists(self.groups(model))
    def __repr__(self): return f'layer_splitter(n_groups={self.n_groups}, tied={self.tied!r})'



#| export
class ParamLists(list):
    "Lists of parameters, one a group, with `names` of the groups and `kinds` of the parameters"
    def __init__(self,
        groups:list # `LayerGroup`s
    ):
        super().__init__(list(g.params) for g in groups)
        self.names,self.kinds = [g.name for g in groups],[list(g.kinds) for g in groups]



#| export
def freeze_params(
    params, # Parameters
    frozen:bool=True # Freeze them, or thaw them
):
    "Set `requires_grad`, and drop the gradient of what is frozen so that no optimizer moves it"
    for p in params:
        p.requires_grad_(not frozen)
        if frozen: p.grad = None



#| export
class LayerFreezer:
    "Freeze and thaw the layer groups of `model`"
    def __init__(self,
        model:nn.Module, # Any model
        n_groups:int|None=None # Merge neighbouring layers into so many groups
    ):
        self.model,self.layers = model,layer_splitter(n_groups).groups(model)
        self.num_layers = len(self.layers)
    def freeze_all(self): "Freeze every layer"; self.freeze_to(self.num_layers)
    def unfreeze_all(self): "Thaw every layer"; self.freeze_to(0)
    def freeze_to(self,
        layer_idx:int # The lowest layer that trains; negative numbers count from the top, so -1 is the head alone
    ):
        "Freeze the layers below `layer_idx` and thaw the rest"
        i = layer_idx if layer_idx>=0 else self.num_layers+layer_idx
        if not 0<=i<=self.num_layers:
            raise FastaiTLError(f'A layer index of this model lies between {-self.num_layers} and {self.num_layers}', str(layer_idx))
        for j,g in enumerate(self.layers): freeze_params(g.params, frozen=j<i)



#| export
@patch
def trainable_params(self:LayerFreezer) -> list: # Parameters, for an optimizer
    "The parameters that train now"
    return [p for p in self.model.parameters() if p.requires_grad]

@patch
def print_trainable_params(self:LayerFreezer):
    "Print how many parameters there are and how many train"
    total,train = (sum(p.numel() for p in ps) for ps in (self.model.parameters(), self.trainable_params()))
    print(f'total parameters: {total:,}\ntrainable parameters: {train:,}\ntrainable share: {100*train/total:.2f}%')



#| export
def _frozen(m): return _own(m) and not any(p.requires_grad for p in m.parameters())

def _beside(m, stack):
    "Modules without parameters beside a stack in `m` that are frozen along with its lower blocks"
    blocks = [_frozen(b) for b in stack.children()]
    for c in m.children():
        if _own(c) or c is stack: continue
        if isinstance(c, nn.ModuleList) and len(c)==len(blocks): yield from (d for d,f in zip(c, blocks) if f)
        elif not len(list(c.children())) and blocks[0]: yield c

def frozen_modules(
    model:nn.Module # Any model, part of it frozen
) -> list: # The largest modules of which no parameter trains
    "What to put into eval mode so that frozen layers compute as in prediction"
    if _frozen(model): return [model]
    res = []
    for c in model.children():
        res += frozen_modules(c)
        if _is_stack(c, sequential=False): res += _beside(model, c)
    return res



#| export
def _group_of(ps, named):
    "Names of the layer groups that the parameters `ps` come from, lowest first"
    return list(dict.fromkeys(named[id(p)] for p in ps if id(p) in named))

@patch
def layer_table(self:Learner) -> pd.DataFrame: # group | layers | params | trainable | lr | wd
    "One row a parameter group: its layers, size, what trains, rate and weight decay"
    if self.opt is None: self.create_opt()
    named = {id(p): g.name for g in layer_groups(self.model) for p in g.params}
    rows = []
    for i,(ps,h) in enumerate(zip(self.opt.param_lists, self.opt.hypers)):
        layers = _group_of(ps, named)
        rows.append(dict(group=i, layers=layers[0] if len(layers)==1 else f'{layers[0]} – {layers[-1]}' if layers else '',
                         params=sum(p.numel() for p in ps), trainable=sum(p.numel() for p in ps if p.requires_grad), lr=h.get('lr'), wd=h.get('wd')))
    return pd.DataFrame(rows).set_index('group')

