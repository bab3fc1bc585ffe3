"""What the reference says of a public name: signature, parameters with their meaning, where its source is.

Names come from the exported cells of the numbered notebooks, signatures and docments from the imported package."""

import ast, dataclasses, importlib, inspect, re, textwrap
from collections import namedtuple
from dataclasses import dataclass, field

from fastcore.docments import docments
from fasttransform import Transform

from readme import split_cell

PKG = 'fastai_tl'
_number = re.compile(r"^\d\d\d_(.+)$")
empty = inspect.Parameter.empty
Param = namedtuple('Param', 'name type default meaning')


@dataclass
class Entry:
    "A public function, class, method or constant"

    name: str  # as it is shown, such as `Learner.fit_gradual`
    obj: object  # what it is, unwrapped
    node: ast.AST  # its definition in the cell
    code: str  # the code of the cell
    module: str  # the module inside the package, such as `tune.gradual`
    owner: object = None  # the class of a method
    aliases: list = field(default_factory=list)  # the same method on other classes

    @property
    def id(self):
        return self.name.lower()

    @property
    def is_class(self):
        return isinstance(self.node, ast.ClassDef)

    @property
    def is_property(self):
        return bool(self.owner) and any(
            getattr(d, 'id', getattr(d, 'attr', '')) in ('property', 'cached_property', 'setter')
            for d in getattr(self.node, 'decorator_list', [])
        )


def module_name(path):
    "`tune.unfreezing` for nbs/415_tune.unfreezing.ipynb; nothing for a notebook without a number"
    m = _number.match(path.stem)
    return m[1] if m else None


def unwrapped(o):
    "The plain function behind a property, a class method, a patch"
    return inspect.unwrap(
        getattr(o, 'func', None)
        or getattr(o, 'fget', None)
        or getattr(o, '__func__', None)
        or getattr(o, 'f', None)
        or o
    )


def class_names(node):
    "The classes that an annotation `self:A` or `self:(A,B)` or `self:A|B` names"
    if isinstance(node, (ast.Tuple, ast.List)):
        return [o for e in node.elts for o in class_names(e)]
    if isinstance(node, ast.BinOp):
        return class_names(node.left) + class_names(node.right)
    if isinstance(node, ast.Attribute):
        return [node.attr]
    return [node.id] if isinstance(node, ast.Name) else []


def patched_classes(f):
    "The classes on which `f` is patched"
    for d in f.decorator_list:
        func = getattr(d, 'func', d)
        name, args = getattr(func, 'attr', getattr(func, 'id', '')), f.args.posonlyargs + f.args.args
        if name == 'patch' and args and args[0].annotation:
            return class_names(args[0].annotation)
        if name == 'patch_to' and isinstance(d, ast.Call) and d.args:
            return class_names(d.args[0])
    return []


def assigned(node):
    "The names that an assignment gives a value, `A,B = 1,2` included"
    targets = getattr(node, 'targets', None) or [getattr(node, 'target', None)]
    return [o.id for t in targets for o in getattr(t, 'elts', [t]) if isinstance(o, ast.Name)]


def inherited(cls, name):
    "A method that is documented where it comes from, such as an event of a Callback"
    return any(name in vars(b) for b in cls.__mro__[1:]) or (
        issubclass(cls, Transform) and name in ('encodes', 'decodes', 'setups')
    )


class Reference:
    "The entries of every module of the package, by cell and by name"

    def __init__(self, nbs):
        self.fastai = vars(importlib.import_module('fastai.text.all'))
        self.by_name, self.modules = {}, {}
        self.public = {}
        for path, nb in nbs:
            name = module_name(path)
            if not name:
                continue
            mod = importlib.import_module(f'{PKG}.{name}')
            self.modules[name], self.public[name] = mod, set(getattr(mod, '__all__', ()))
            for c in nb['cells']:
                for e in self.entries(name, c):
                    self.by_name.setdefault(e.name, e)
        self.short = self.shorthands()

    def entries(self, module, cell):
        "The entries of one cell, in its order"
        dirs, code = split_cell(cell)
        if cell['cell_type'] != 'code' or not {'export', 'exports'} & set(dirs):
            return []
        return [e for node in ast.parse(code).body for e in self._of(node, module, code)]

    def _of(self, node, module, code):
        mod, public = self.modules[module], self.public[module]
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            return [Entry(n, getattr(mod, n), node, code, module) for n in assigned(node) if n in public]
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            return []
        if isinstance(node, ast.FunctionDef) and (classes := patched_classes(node)):
            if node.name.startswith('_'):
                return []
            cls = {**self.fastai, **vars(mod)}[classes[0]]
            return [
                Entry(
                    f'{classes[0]}.{node.name}',
                    unwrapped(inspect.getattr_static(cls, node.name)),
                    node,
                    code,
                    module,
                    cls,
                    classes[1:],
                )
            ]
        if node.name not in public:
            return []
        obj = getattr(mod, node.name)
        res = [Entry(node.name, obj if isinstance(obj, type) else unwrapped(obj), node, code, module)]
        return res + self.methods(res[0]) if isinstance(obj, type) else res

    def methods(self, e):
        "The public methods that the class of an entry defines itself"
        own = [n for n in e.node.body if isinstance(n, ast.FunctionDef) and not n.name.startswith('_')]
        fs = {n.name: n for n in own if not inherited(e.obj, n.name) and not is_event(e.obj, n.name)}
        defined = [Entry(f'{e.name}.{k}', unwrapped(vars(e.obj)[k]), n, e.code, e.module, e.obj) for k, n in fs.items()]
        return defined + self.assigned_methods(e)

    def assigned_methods(self, e):
        "The public methods that are functions from elsewhere: `report = score_report`, `aurc = property(area)`"
        names = [name for n in e.node.body if isinstance(n, ast.Assign) for name in assigned(n)]
        res = []
        for name in names:
            method = vars(e.obj)[name]
            f = unwrapped(method)
            if name.startswith('_') or not inspect.isfunction(f):
                continue
            code = ('@property\n' if isinstance(method, property) else '') + inspect.getsource(f)
            res.append(Entry(f'{e.name}.{name}', f, ast.parse(code).body[0], code, e.module, e.obj))
        return res

    def shorthands(self):
        "Names that prose uses: `learn.evaluate` for `Learner.evaluate`, `ev.report` for `Evaluation.report`"
        res = {}
        for e in self.by_name.values():
            if not e.owner:
                continue
            cls, method = e.name.split('.')
            names = [cls, *e.aliases]
            if any(o.endswith('Learner') for o in names):
                res.setdefault(f'learn.{method}', e)
                if '_' in method:
                    res.setdefault(method, e)
            for o in names:
                res.setdefault(f'{o}.{method}', e)
                if short := {'Evaluation': 'ev', 'ULMFiT': 'ulm'}.get(o):
                    res.setdefault(f'{short}.{method}', e)
        return res

    def find(self, name):
        "The entry that a piece of code in prose names, if any: `f`, `f(...)`, `A.b`, `learn.f(x)`, `f(x=1)`"
        if not (m := re.fullmatch(r'([A-Za-z_][\w.]*)(\(.*\))?', name.strip(), re.S)):
            return None
        return self.by_name.get(m[1]) or self.short.get(m[1]) or self.of_base(m[1])

    def of_base(self, name):
        "The entry of an inherited method: that of `ScoredRows.from_preds` for `Evaluation.from_preds`"
        cls, _, method = name.partition('.')
        bases = self.by_name[cls].obj.__mro__[1:] if cls in self.by_name and self.by_name[cls].is_class else ()
        found = [f'{b.__name__}.{method}' for b in bases if method and f'{b.__name__}.{method}' in self.by_name]
        return self.by_name[found[0]] if found else None


def is_event(cls, name):
    "Is it a method that fastai calls during a fit, such as `before_epoch`?"
    from fastai.callback.core import Callback, event

    return issubclass(cls, Callback) and hasattr(event, name)


# --- Signatures and parameters ---


def own_function(e):
    "The definition that the parameters of an entry are written in"
    if not e.is_class:
        return e.node if isinstance(e.node, ast.FunctionDef) else None
    return next((n for n in e.node.body if isinstance(n, ast.FunctionDef) and n.name == '__init__'), None)


def written(node, code):
    return ' '.join(ast.get_source_segment(code, node).split()) if node is not None else ''


def as_written(e):
    "{parameter: (annotation, default)} as the code has them: `2.6**4`, not its value"
    if (f := own_function(e)) is None:
        if not e.is_class:
            return {}
        return {
            n.target.id: (written(n.annotation, e.code), written(n.value, e.code))
            for n in e.node.body
            if isinstance(n, ast.AnnAssign)
        }
    a = f.args
    pos = a.posonlyargs + a.args
    defaults = [None] * (len(pos) - len(a.defaults)) + a.defaults
    res = {
        o.arg: (written(o.annotation, e.code), written(d, e.code))
        for o, d in zip(pos + a.kwonlyargs, defaults + a.kw_defaults)
    }
    return res | {o.arg: (written(o.annotation, e.code), '') for o in (a.vararg, a.kwarg) if o}


def named(o, kind):
    "A type or a default that was not written in the cell, as short text"
    if o is empty:
        return ''
    if isinstance(o, str) and kind == 'type':
        return o
    if isinstance(o, float):
        return f'{o:.8g}' + ('.' if o.is_integer() and abs(o) < 1e8 else '')
    name = getattr(o, '__qualname__', None) or getattr(o, '__name__', None)
    if name and (isinstance(o, type) or callable(o)):
        return name
    s = re.sub(r'\btyping\.|\bfastai\.[\w.]+\.', '', repr(o))
    return '…' if ' at 0x' in s or len(s) > 60 else s


def signature(e):
    "The parameters of an entry without `self`, or `None` for what is not called"
    if e.is_property or not (e.is_class or isinstance(e.node, ast.FunctionDef)):
        return None
    if e.is_class and not any('__init__' in vars(c) for c in e.obj.__mro__ if c.__module__.split('.')[0] == PKG):
        return None
    try:
        ps = list(inspect.signature(e.obj.__init__ if e.is_class else e.obj).parameters.values())
    except (ValueError, TypeError):
        return None
    static = any(getattr(d, 'id', '') == 'staticmethod' for d in getattr(e.node, 'decorator_list', []))
    return ps[1:] if (e.is_class or e.owner) and not static else ps


def field_comments(e):
    "What the fields of a dataclass are, from the comments behind them"
    lines = e.code.splitlines()
    return (
        {
            n.target.id: lines[n.end_lineno - 1].partition('#')[2].strip()
            for n in e.node.body
            if isinstance(n, ast.AnnAssign)
        }
        if e.is_class
        else {}
    )


def dataclass_docs(cls):
    "The comments behind the fields of a dataclass, whose `__init__` has no source that docments could read"
    res = {}
    for c in reversed(cls.__mro__):
        if dataclasses.is_dataclass(c):
            source = textwrap.dedent(inspect.getsource(c))
            lines = source.splitlines()
            body = ast.parse(source).body[0].body
            fields = [n for n in body if isinstance(n, ast.AnnAssign)]
            res |= {n.target.id: lines[n.end_lineno - 1].partition('#')[2].strip() for n in fields}
    return {name: dict(docment=comment) for name, comment in res.items()}


def its_class(f):
    "The dataclass whose `__init__` is `f`, which may check its arguments first; `f` itself if it is no dataclass's"
    init = inspect.unwrap(f)
    cls = getattr(init, '__globals__', {}).get(init.__qualname__.split('.')[0])
    return cls if dataclasses.is_dataclass(cls) and inspect.unwrap(cls.__init__) is init else f


def parameter_docs(obj):
    "The docments of a function or a class, in full, with those of what it delegates to"
    f = obj.__init__ if isinstance(obj, type) else obj
    to = getattr(f, '__delwrap__', None)
    if to is None:
        if dataclasses.is_dataclass(obj):
            return dataclass_docs(obj)
        return docments(obj, full=True, returns=True, args_kwargs=True)
    del f.__delwrap__
    try:
        own = docments(obj, full=True, returns=True, args_kwargs=True)
    finally:
        f.__delwrap__ = to
    inherited = {name: d for name, d in parameter_docs(its_class(to)).items() if name != 'return'}
    return {**inherited, **{name: d for name, d in own.items() if name not in inherited or (d or {}).get('docment')}}


def parameters(e):
    "The parameters of an entry, and what it returns, each with type, default and meaning"
    ps, own = signature(e), as_written(e)
    docs = parameter_docs(e.obj) if callable(e.obj) else {}
    fields, res = field_comments(e), []
    for p in ps or ():
        d, (anno, default) = docs.get(p.name) or {}, own.get(p.name, (None, None))
        star = {p.VAR_POSITIONAL: '*', p.VAR_KEYWORD: '**'}.get(p.kind, '')
        meaning = (d.get('docment') if d else '') or fields.get(p.name, '')
        res.append(
            Param(
                star + p.name,
                named(p.annotation, 'type') if anno is None else anno,
                named(p.default, 'default') if default is None else default,
                meaning,
            )
        )
    f = own_function(e)
    returns = written(getattr(f, 'returns', None), e.code) if not e.is_class else ''
    meaning = (docs.get('return') or {}).get('docment') if not e.is_class else ''
    return res, Param('', returns, '', meaning or '') if (returns and returns != 'None') or meaning else None


def signature_text(e):
    "`name(a, b=1)`, wrapped where it is long"
    if e.node.__class__ in (ast.Assign, ast.AnnAssign):
        return textwrap.shorten(written(e.node, e.code), 160, placeholder=' …')
    if (ps := signature(e)) is None:
        return e.name
    params, _ = parameters(e)
    shown, bare = [], False
    for p, o in zip(ps, params):
        if p.kind is p.KEYWORD_ONLY and not bare and not any(q.kind is q.VAR_POSITIONAL for q in ps):
            shown.append('*')
        bare = bare or p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
        shown.append(o.name + (f'={o.default}' if o.default != '' else ''))
    line = f'{e.name}({", ".join(shown)})'
    if len(line) <= 84:
        return line
    return (
        f'{e.name}(\n'
        + textwrap.fill(
            ', '.join(shown),
            84,
            initial_indent='    ',
            subsequent_indent='    ',
            break_long_words=False,
            break_on_hyphens=False,
        )
        + '\n)'
    )


def docstring(e):
    "The docstring of a function or class, the comment behind a constant"
    if isinstance(e.node, (ast.Assign, ast.AnnAssign)):
        return e.code.splitlines()[e.node.end_lineno - 1].partition(' # ')[2].strip()
    return inspect.cleandoc(ast.get_docstring(e.node) or (e.obj.__doc__ if callable(e.obj) else '') or '')


def source_line(e, py):
    "The line of the module's file where an entry begins"
    names = e.name.split('.')
    tree = ast.parse(py)
    for part in names if not e.owner or any(getattr(n, 'name', '') == names[0] for n in tree.body) else names[-1:]:
        hits = [n for n in tree.body if getattr(n, 'name', None) == part or part in assigned(n)]
        if not hits:
            return next((n.lineno for n in ast.walk(ast.parse(py)) if getattr(n, 'name', None) == names[-1]), 1)
        tree = hits[-1]
    return tree.lineno
