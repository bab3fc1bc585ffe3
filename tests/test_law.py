"The one law: a module imports only from modules whose notebooks have smaller numbers; and what keeps it readable."

import ast,json
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from graphlib import TopologicalSorter

import pytest

from repo import *

MODULE_LINES,CELL_LINES = 350,20

# 'module:first name defined' -> why the cell is longer than CELL_LINES
LONG_CELLS = {   # each parameter has a line of its own; the body is short
    'plot:plot_heatmap': 'eight parameters', 'plot:plot_stages': 'five parameters', 'data.awd_lstm:language_model_dls': 'ten parameters', 'data.awd_lstm:split_rows': 'five parameters',
    'data.awd_lstm:classifier_dls': 'eleven parameters', 'tune.optimizer:LayerwiseOptimizer': 'eleven parameters', 'tune.unfreezing:GradualUnfreezing': 'thirteen parameters',
    'tune.gradual:fit_gradual': 'eleven parameters', 'tune.gradual:gradual_unfreezing_training': 'ten parameters',
    'learners.ulmfit:finetune_lm': 'twelve parameters', 'learners.ulmfit:classifier': 'twenty-one parameters', 'quickstart:Quickstart': 'six parameters',
    'quickstart:quickstart': 'nine parameters', 'data.classification:from_df': 'eleven parameters', 'data.classification:hf_classifier_dls': 'twelve parameters', 'data.splits:cross_folds': 'eight parameters',
    'evaluation.cross_validation:run_folds': 'ten parameters', 'generation.generate:generate': 'twenty-eight parameters', 'data.tagging:hf_tagger_dls': 'twelve parameters',
    'data.qa:hf_qa_dls': 'eleven parameters', 'data.seq2seq:from_lists': 'twelve parameters',
    'tune.recipes:transfer_plan': 'ten parameters', 'tune.recipes:fit_transfer': 'nine parameters',}
# 'module:attribute' -> why the attribute is not the Learner method of that name, which a higher number patches on
NOT_THAT_METHOD = {'learners.language_modeling:generate': "transformers' own", 'learners.seq2seq:generate': "transformers' own"}

TOP_LEVEL = ('core', 'resources', 'callbacks', 'plot', 'files', 'quickstart', 'cli')
# The first and the last number of each folder; `data` has the numbers around those of `datasets`
FOLDERS = dict(data=(100, 149), datasets=(150, 159), models=(200, 299), efficiency=(300, 399), tune=(400, 499), learners=(500, 599),
               generation=(600, 699), evaluation=(700, 749), interpretation=(750, 799), deploy=(800, 899), interop=(900, 949),
               quickstart=(950, 989))

each_notebook = pytest.mark.parametrize('nb', notebooks(), ids=ids)


def numbers(): return {n.module: n.number for n in notebooks()}


def test_names():
    "Notebooks beside the numbered ones: those of the READMEs, the pages of the site's start, and folders without modules"
    others = [p.name for p in notebook_files() if p.parent == NBS and not Notebook(p).match]
    assert set(others) <= {'index.ipynb', 'index.zh-TW.ipynb', 'home.ipynb', 'why.ipynb', 'concepts.ipynb', 'which_recipe.ipynb'}, f'not named NNN_module.ipynb or NNN_folder.module.ipynb: {others}'


@each_notebook
def test_name_agrees_with_default_exp(nb):
    assert nb.default_exp == nb.module, f'{nb.path.name} exports to {nb.default_exp!r}, its name says {nb.module!r}'


@each_notebook
def test_exports_to_its_own_module(nb):
    away = {c.title: c.to for c in nb.exported if c.to not in (None, nb.module)}
    assert not away, f'{nb.path.name} exports cells to other modules: {away}'


@each_notebook
def test_number_is_in_the_range_of_its_folder(nb):
    if nb.folder is None:
        assert nb.module in TOP_LEVEL, f'{nb.path.name}: a top-level module is one of {TOP_LEVEL}'
        assert nb.number < 100 or nb.number >= 980, f'{nb.path.name}: top-level modules have numbers below 100 or from 980'
    else:
        assert nb.folder in FOLDERS, f'{nb.path.name}: the folders are {list(FOLDERS)}'
        low, high = FOLDERS[nb.folder]
        assert low <= nb.number <= high, f'{nb.path.name}: the numbers of {nb.folder}/ are {low} to {high}'


def not_smaller(nb, imported):
    "What is wrong with `nb`'s imports"
    nums = numbers()
    return [f'{o or PKG} ({nums.get(o, "no notebook")})' for o in sorted(imported) if nums.get(o, 1000) >= nb.number]


@each_notebook
def test_imports_only_from_smaller_numbers(nb):
    package = '.'.join(filter(None, (PKG, nb.folder)))
    imported = set().union(*(package_imports(c.tree, package, numbers()) for c in nb.exported))
    wrong = not_smaller(nb, imported)
    assert not wrong, f'{nb.path.name} imports {", ".join(wrong)}'


@each_notebook
def test_module_imports_only_from_smaller_numbers(nb):
    "The same of the generated file, where nbdev has made the imports relative"
    if not nb.py.exists(): pytest.skip(f'{nb.module} is not exported')
    package = '.'.join(filter(None, (PKG, nb.folder)))
    wrong = not_smaller(nb, package_imports(ast.parse(nb.py.read_text(encoding='utf-8')), package, numbers()))
    assert not wrong, f'{nb.py.name} imports {", ".join(wrong)}'


def test_no_circles():
    "The files of the package, whoever wrote them, can be put into an order in which each imports only earlier ones"
    files = {'.'.join(p.relative_to(PACKAGE).with_suffix('').parts): p for p in PACKAGE.rglob('*.py') if not p.name.startswith('_')}
    graph = {}
    for mod,p in files.items():
        package = '.'.join((PKG, *mod.split('.')[:-1]))
        graph[mod] = package_imports(ast.parse(p.read_text(encoding='utf-8')), package, files) - {''}
    list(TopologicalSorter(graph).static_order())   # raises CycleError, which names the circle


@each_notebook
def test_module_is_short(nb):
    if not nb.py.exists(): pytest.skip(f'{nb.module} is not exported')
    n = len(nb.py.read_text(encoding='utf-8').splitlines())
    assert n <= MODULE_LINES, f'{nb.module} has {n} lines; {MODULE_LINES} is the limit'


@each_notebook
def test_exported_cells_are_short(nb):
    long = {f'{nb.module}:{c.title}': c.lines for c in nb.exported if c.lines > CELL_LINES}
    assert not set(long) - set(LONG_CELLS), f'exported cells of more than {CELL_LINES} lines: {long}'


def test_exceptions_are_needed():
    "An exception whose reason is gone is taken out of its list"
    long = {f'{n.module}:{c.title}' for n in notebooks() for c in n.exported if c.lines > CELL_LINES}
    used = {f'{n.module}:{a}' for n in notebooks() for c in n.exported for a in attributes(c.tree)}
    assert not set(LONG_CELLS) - long and not set(NOT_THAT_METHOD) - used


def public_names(tree):
    "The names in `__all__` of a module"
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(getattr(t, 'id', '') == '__all__' for t in node.targets): return ast.literal_eval(node.value)
    return []


@each_notebook
def test_no_public_name_is_a_folder(nb):
    if not nb.py.exists(): pytest.skip(f'{nb.module} is not exported')
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir()} | set(FOLDERS)
    clash = folders & set(public_names(ast.parse(nb.py.read_text(encoding='utf-8'))))
    assert not clash, f'{nb.module} exports {clash}, the name of a folder of the package'


def test_all_lists_every_module_in_order():
    "`all.py` is star imports of every module but `cli`, in the order of the numbers"
    tree = ast.parse((PACKAGE/'all.py').read_text(encoding='utf-8'))
    stars = [n.module for n in tree.body if isinstance(n, ast.ImportFrom) and n.level == 1 and [a.name for a in n.names] == ['*']]
    doc = [n for n in tree.body if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
    assert len(stars) + len(doc) == len(tree.body), 'all.py holds something else than a docstring and star imports'
    assert stars == [n.module for n in notebooks() if n.module != 'cli']


def test_init_holds_the_version_alone():
    body = ast.parse((PACKAGE/'__init__.py').read_text(encoding='utf-8')).body
    names = [t.id for n in body if isinstance(n, ast.Assign) for t in n.targets]
    assert names == ['__version__'] and all(isinstance(n, (ast.Assign, ast.Expr)) for n in body)


# --- each module by itself ---

@pytest.fixture(scope='module')
def imported_alone():
    "What importing each module in a process of its own printed and returned; two processes at a time"
    def _import(nb): return nb.module, python(f'import {PKG}.{nb.module}')
    with ThreadPoolExecutor(2) as ex: return dict(ex.map(_import, notebooks()))


@each_notebook
def test_imports_alone(nb, imported_alone):
    res = imported_alone[nb.module]
    assert res.returncode == 0, f'import {PKG}.{nb.module}\n{res.stdout}'


# --- methods that are patched on ---

def attributes(tree): return {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}


def class_names(annotation):
    "The classes in the annotation of a patched function's first parameter: `A`, `a.A`, `A|B`, `(A,B)`, `'A'`"
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str): annotation = ast.parse(annotation.value, mode='eval').body
    if isinstance(annotation, ast.BinOp): return class_names(annotation.left) | class_names(annotation.right)
    if isinstance(annotation, (ast.Tuple, ast.List)): return set().union(*map(class_names, annotation.elts))
    return {getattr(annotation, 'attr', getattr(annotation, 'id', None))} - {None}


def patched(tree):
    "(class, method) for every `@patch`, `@patch(…)` and `@patch_to(…)` of a cell"
    for f in ast.walk(tree):
        if not isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef)): continue
        for d in f.decorator_list:
            call,func = isinstance(d, ast.Call),getattr(d, 'func', d)
            name = getattr(func, 'attr', getattr(func, 'id', ''))
            args = f.args.posonlyargs + f.args.args
            if name == 'patch' and args and args[0].annotation: classes = class_names(args[0].annotation)
            elif name == 'patch_to' and call and d.args: classes = class_names(d.args[0])
            else: continue
            yield from ((c, f.name) for c in classes)


def all_patches():
    "[(number, class, method)] of the classes that fastai_tl patches and does not define"
    own = {n.name for nb in notebooks() for c in nb.exported for n in ast.walk(c.tree) if isinstance(n, ast.ClassDef)}
    return [(nb.number, c, m) for nb in notebooks() for cell in nb.exported for c,m in patched(cell.tree) if c not in own]


@lru_cache
def their_own():
    "The attributes that fastai's classes have without fastai_tl, by class"
    code = ('import json; from fastai.text.all import *; ns = dict(globals())\n'
            'print(json.dumps({k: dir(v) for k,v in ns.items() if isinstance(v, type)}))')
    res = python(code)
    assert res.returncode == 0, res.stdout
    return json.loads(res.stdout.strip().splitlines()[-1])


@each_notebook
def test_uses_no_method_that_a_higher_number_patches_on(nb):
    later = {}
    for number,cls,method in all_patches():
        if method not in their_own().get(cls, ()): later.setdefault(method, []).append(number)
    higher = {m for m,nums in later.items() if min(nums) > nb.number}
    used = set().union(*(attributes(c.tree) for c in nb.exported)) & higher
    wrong = {m: min(later[m]) for m in used if f'{nb.module}:{m}' not in NOT_THAT_METHOD}
    assert not wrong, f'{nb.path.name} uses methods that later notebooks patch on: {wrong}'
