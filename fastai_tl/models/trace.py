
#| export
import copy, inspect, logging, random, re, warnings
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from operator import or_
from weakref import WeakKeyDictionary
import numpy as np, torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary
from fastai_tl.core import FastaiTLError



#| export
def hf_models(
    model:nn.Module # Any model
) -> list: # The outermost modules in it that read `input_ids` as a model of transformers does
    "The Hugging Face text models in `model`"
    if getattr(model, 'main_input_name', None)=='input_ids' and hasattr(model, 'config'): return [model]
    return [o for c in model.children() for o in hf_models(c)]



#| export
def _special_ids(cfg): return {k: v for k,v in vars(cfg).items() if k.endswith(('_id','_index')) and isinstance(v, (int,list))}

def _text_config(cfg):
    "The part of a configuration that speaks of text"
    try: return cfg.get_text_config()
    except (AttributeError, ValueError): return cfg # foreign, or with several

def _vocab_size(model):
    "How many tokens `model` knows, as far as it tells"
    try: return model.get_input_embeddings().num_embeddings
    except (AttributeError, NotImplementedError): return getattr(_text_config(model.config), 'vocab_size', 100) # characters, or an embedding of its own kind

def dummy_inputs(
    model:nn.Module, # One of `hf_models`
    n:int=8 # Length in tokens
) -> dict: # Arguments for `model`
    "One short text that ends as texts of this model end"
    cfg,params = model.config,inspect.signature(model.forward).parameters
    special = {**_special_ids(_text_config(cfg)), **_special_ids(cfg)}
    size = _vocab_size(model)
    taken = {i for v in special.values() for i in (v if isinstance(v, list) else [v])}
    plain = [i for i in range(min(size, 1000)) if i not in taken] or [0]
    eos = special.get('eos_token_id', plain[0])
    eos = eos[0] if isinstance(eos, list) else eos
    ids = [plain[i%len(plain)] for i in range(n-1)] + [eos if 0<=eos<size else plain[0]]
    x = dict(input_ids=torch.tensor([ids], device=next(model.parameters()).device))
    any_kw = any(p.kind==p.VAR_KEYWORD for p in params.values())
    if getattr(cfg, 'is_encoder_decoder', False) and (any_kw or 'decoder_input_ids' in params): x['decoder_input_ids'] = x['input_ids'].clone()
    return dict(x, use_cache=False) if 'use_cache' in params else x



#| export
def _shadow(model):
    "A copy of the modules of `model` with the same parameters and buffers, and without hooks"
    memo = {id(o): o for o in (*model.parameters(), *model.buffers())}
    memo.update({id(v): type(v)() for m in model.modules() for k,v in vars(m).items() if k.startswith('_') and '_hooks' in k and isinstance(v, dict)})
    return copy.deepcopy(model, memo).eval()



#| export
@contextmanager
def _undisturbed(device):
    "No gradients, no messages, and all random numbers as before"
    py,npy,level = random.getstate(),np.random.get_state(),logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with torch.no_grad(), warnings.catch_warnings(), torch.random.fork_rng([device.index] if device.type=='cuda' else []):
            warnings.simplefilter('ignore')
            yield
    finally: random.setstate(py); np.random.set_state(npy); logging.disable(level)



#| export
_writes = re.compile('.*[^_]_|__setitem__|__i(add|sub|mul|truediv|floordiv|mod|pow|and|or|xor|lshift|rshift)__') # names of operations in place

def _memory(t):
    try: return t.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError): return 0 # a tensor without memory of its own

def _tensors(o):
    if isinstance(o, torch.Tensor): yield o
    elif isinstance(o, (list,tuple)): yield from (t for x in o for t in _tensors(x))
    elif isinstance(o, dict): yield from _tensors(list(o.values()))



#| export
class _Uses(TorchFunctionMode):
    "Write down each use of a parameter and what has fed it, and let nothing be written into the model"
    def __init__(self, model):
        super().__init__()
        self.bits,self.marks,self.uses = {id(p): 1<<i for i,p in enumerate(model.parameters())},WeakIdKeyDictionary(),[]
        self.own = {_memory(o) for o in (*model.parameters(), *model.buffers())} - {0}
    def __torch_function__(self, func, types, args=(), kwargs=None):
        ins,writes = list(_tensors((args, kwargs))),_writes.fullmatch(getattr(func, '__name__', ''))
        if writes and ins and _memory(ins[0]) in self.own: return ins[0]
        res = func(*args, **(kwargs or {}))
        outs = [*_tensors(res), *(ins[:1] if writes else [])]
        if outs: self.note([self.bits[id(t)] for t in ins if id(t) in self.bits], [self.marks.get(t, 0) for t in ins], outs)
        return res
    def note(self, used, marks, outs):
        fed = reduce(or_, marks, 0)
        self.uses += [(b, fed) for b in used if self.uses[-1:]!=[(b, fed)]]
        for t in outs:
            if id(t) not in self.bits: self.marks[t] = reduce(or_, used, fed)



#| export
_known = WeakKeyDictionary() # model -> its parameters' ids, and what was found

def _once(kind, model, find):
    "`find(model)`, remembered until the model gets other parameters"
    key = tuple((n, id(p)) for n,p in model.named_parameters())
    got = _known.setdefault(model, {}).get(kind)
    if got is None or got[0]!=key: got = _known[model][kind] = (key, find(model))
    return got[1]

def _trace(model):
    "`(bit, bits that fed it)` for each use in order and `None`, or nothing and the error"
    try:
        uses,x = _Uses(model),dummy_inputs(model)
        with _undisturbed(x['input_ids'].device):
            shadow = _shadow(model)
            with uses: shadow(**x)
    except Exception as e: return [],e.with_traceback(None) # whatever a foreign model may raise
    return uses.uses,None



#| export
@dataclass
class Use:
    "One use of a parameter in a forward pass"
    name:str # Its name in `model.named_parameters()`
    bit:int # Its bit in the `fed_by` of others
    fed_by:int # Bits of all parameters that what it works on depends on
    def feeds(self,
        other # Another `Use`
    ) -> bool:
        "Does what `other` works on depend on this parameter?"
        return bool(self.bit & other.fed_by)



#| export
def execution_order(
    model:nn.Module, # Any model
    strict:bool=False # Raise an error if a Hugging Face model in it cannot be run
) -> list: # One `Use` for each use; empty if there is nothing to run
    "The uses of the parameters in the order of a forward pass"
    names,res,offset = {id(p): n for n,p in model.named_parameters()},[],0
    for m in hf_models(model):
        uses,error = _once('order', m, _trace)
        if strict and error: raise FastaiTLError(f'`{type(m).__name__}` must run on one short text', f'{type(error).__name__}: {error}') from error
        own = [names[id(p)] for p in m.parameters()]
        res += [Use(own[b.bit_length()-1], b<<offset, fed<<offset) for b,fed in uses]
        offset += len(own)
    return res



#| export
def mark_fixed(
    model:nn.Module # A model just created: what does not require a gradient now never will
) -> nn.Module: # The same model
    "Remember which parameters of `model` are fixed by design"
    model._fixed_parameters = tuple(n for n,p in model.named_parameters() if not p.requires_grad)
    return model



#| export
def _fixed_anew(model):
    "Names of the parameters that the class of `model` fixes when it builds one"
    try:
        with _undisturbed(torch.device('cpu')), torch.device('meta'), torch.enable_grad(): fresh = type(model)(copy.deepcopy(model.config))
    except Exception: return () # a class that is built in another way
    return tuple(n for n,p in fresh.named_parameters() if not p.requires_grad)

def fixed_parameters(
    model:nn.Module # Any model
) -> tuple: # Names as in `model.named_parameters()`
    "Names of the parameters of `model` that are fixed by design"
    marked = [(m, m._fixed_parameters) for m in model.modules() if '_fixed_parameters' in vars(m)]
    if not marked: marked = [(m, _once('fixed', m, _fixed_anew)) for m in hf_models(model) if not all(p.requires_grad for p in m.parameters())]
    ids = {id(m.get_parameter(n)) for m,ns in marked for n in ns if n in dict(m.named_parameters())}
    return tuple(n for n,p in model.named_parameters() if id(p) in ids)

