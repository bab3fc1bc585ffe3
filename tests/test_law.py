"""The law: a module imports only from modules whose notebooks have smaller numbers; and the rules for readable code."""

import ast
import json
from functools import lru_cache
from graphlib import TopologicalSorter

import pytest

import law
from repo import *

# 'module:attribute' -> why the attribute is not the Learner method of that name that a higher number patches on
NOT_THAT_METHOD = {
    'learners.language_modeling:generate': "transformers' own",
    'learners.seq2seq:generate': "transformers' own",
}

TOP_LEVEL = ('core', 'resources', 'arguments', 'locks', 'processes', 'callbacks', 'plot', 'atomic', 'files', 'terminal',
             'timing', 'cli')
# The first and the last number of each folder; `data` has the numbers on both sides of those of `datasets`
FOLDERS = dict(
    data=(100, 199), datasets=(150, 159), models=(200, 299), efficiency=(300, 399), tune=(400, 499),
    learners=(500, 599), generation=(600, 699), evaluation=(700, 749), interpretation=(750, 799),
    deploy=(800, 899), interop=(900, 949), quickstart=(950, 979), commands=(980, 989),
)
PAGES = {'index.ipynb', 'index.zh-TW.ipynb', 'home.ipynb', 'why.ipynb', 'concepts.ipynb', 'which_recipe.ipynb',
         'quickstart.ipynb'}

each_notebook = pytest.mark.parametrize('nb', notebooks(), ids=ids)


def numbers():
    return {n.module: n.number for n in notebooks()}


def source(nb):
    "The module of a notebook, as text"
    return nb.py.read_text(encoding='utf-8')


# --- Names and numbers ---

def test_names():
    "The other notebooks are those of the READMEs, the first pages of the site, and folders without modules"
    others = {p.name for p in notebook_files() if p.parent == NBS and not Notebook(p).match}
    assert others <= PAGES, f'not named NNN_module.ipynb or NNN_folder.module.ipynb: {others - PAGES}'


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
        top_level = nb.number < 100 or nb.number >= 990
        assert top_level, f'{nb.path.name}: top-level modules have numbers below 100 or from 990'
    else:
        assert nb.folder in FOLDERS, f'{nb.path.name}: the folders are {list(FOLDERS)}'
        low, high = FOLDERS[nb.folder]
        assert low <= nb.number <= high, f'{nb.path.name}: the numbers of {nb.folder}/ are {low} to {high}'


def test_numbers_are_used_once():
    used = [n.number for n in notebooks()]
    assert len(set(used)) == len(used), 'two notebooks with one number'


# --- Imports ---

def not_smaller(nb, imported):
    "The modules in `imported` that `nb` must not import"
    known = numbers()
    return [f'{o or PKG} ({known.get(o, "no notebook")})' for o in sorted(imported) if known.get(o, 1000) >= nb.number]


@each_notebook
def test_imports_only_from_smaller_numbers(nb):
    package = '.'.join(filter(None, (PKG, nb.folder)))
    imported = set().union(*(package_imports(c.tree, package, numbers()) for c in nb.exported))
    wrong = not_smaller(nb, imported)
    assert not wrong, f'{nb.path.name} imports {", ".join(wrong)}'


@each_notebook
def test_module_imports_only_from_smaller_numbers(nb):
    "The same of the generated file, where nbdev has made the imports relative"
    if not nb.py.exists():
        pytest.skip(f'{nb.module} is not exported')
    package = '.'.join(filter(None, (PKG, nb.folder)))
    wrong = not_smaller(nb, package_imports(ast.parse(source(nb)), package, numbers()))
    assert not wrong, f'{nb.py.name} imports {", ".join(wrong)}'


def test_no_circles():
    "The files of the package can be put into an order in which each imports only earlier ones"
    paths = [p for p in PACKAGE.rglob('*.py') if not p.name.startswith('_')]
    files = {'.'.join(p.relative_to(PACKAGE).with_suffix('').parts): p for p in paths}
    graph = {}
    for name, path in files.items():
        package = '.'.join((PKG, *name.split('.')[:-1]))
        graph[name] = package_imports(ast.parse(path.read_text(encoding='utf-8')), package, files) - {''}
    list(TopologicalSorter(graph).static_order())   # raises CycleError, which names the circle


@each_notebook
def test_no_private_name_of_another_module(nb):
    wrong = law.private_imports(source(nb), PKG)
    assert not wrong, f'{nb.module} imports private names: {wrong}'


@each_notebook
def test_no_import_for_its_side_effect(nb):
    wrong = law.unused_imports(source(nb), PKG)
    assert not wrong, f'{nb.module} imports and does not use: {wrong}'


# --- Code that reads at first sight ---

@each_notebook
def test_lines(nb):
    "Length of lines, statements and conditional expressions on a line, tuple assignments, parameters of a function"
    wrong = {c.title: found for c in nb.exported if (found := law.violations(c.code))}
    assert not wrong, f'{nb.path.name}: {wrong}'


@each_notebook
def test_lines_of_shown_code(nb):
    "Examples and tests in notebooks keep the length of lines too"
    cells = json.loads(nb.path.read_text(encoding='utf-8'))['cells']
    code = [''.join(c['source']) for c in cells if c['cell_type'] == 'code']
    wrong = [found for c in code if (found := law.long_lines(c))]
    assert not wrong, f'{nb.path.name}: {wrong}'


@each_notebook
def test_module_is_short(nb):
    if not nb.py.exists():
        pytest.skip(f'{nb.module} is not exported')
    lines = len(source(nb).splitlines())
    assert not law.long_module(source(nb)), f'{nb.module} has {lines} lines; {law.MODULE_LINES} is the limit'


@each_notebook
def test_exported_cells_are_short(nb):
    wrong = {c.title: found for c in nb.exported if (found := law.long_cell(c.code))}
    assert not wrong, f'{nb.path.name}: {wrong}'


@pytest.mark.parametrize('path', notebook_files(), ids=ids)
def test_plain_words(path):
    "Prose, docstrings, messages and comments use none of the words of the old house style"
    wrong = []
    for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
        text = ''.join(cell['source'])
        if cell['cell_type'] == 'markdown':
            wrong += law.house_words(text)
        else:
            wrong += law.house_words_in_code(law.without_magics(text))
    assert not wrong, f'{path.name}: {wrong}'


@pytest.mark.parametrize('name', ['README.md', 'CONTRIBUTING.md', 'SECURITY.md'])
def test_plain_words_of_documents(name):
    path = ROOT/name
    if not path.exists():
        pytest.skip(f'no {name}')
    assert not law.house_words(path.read_text(encoding='utf-8'))


# --- Public names ---

def public_names(tree):
    "The names in `__all__` of a module"
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(getattr(t, 'id', '') == '__all__' for t in node.targets):
            return ast.literal_eval(node.value)
    return []


def exported_names():
    "(name, module) of every public name"
    return [(name, nb.module) for nb in notebooks() for name in public_names(ast.parse(source(nb)))]


def repeated(names):
    "Names that more than one module exports"
    by_name = {}
    for name, module in names:
        by_name.setdefault(name, []).append(module)
    return {name: modules for name, modules in by_name.items() if len(modules) > 1}


def test_public_names_are_unique():
    assert not repeated(exported_names())


def test_no_public_name_is_a_folder():
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir()} | set(FOLDERS)
    assert not [(name, module) for name, module in exported_names() if name in folders]


def test_all_lists_every_module_in_order():
    "`all.py` is star imports of every module but those of the command line, in the order of the numbers"
    tree = ast.parse((PACKAGE/'all.py').read_text(encoding='utf-8'))
    imports = [n for n in tree.body if isinstance(n, ast.ImportFrom) and n.level == 1]
    stars = [n.module for n in imports if [a.name for a in n.names] == ['*']]
    docstrings = [n for n in tree.body if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
    others = len(tree.body) - len(stars) - len(docstrings)
    assert not others, 'all.py holds something else than a docstring and star imports'
    assert stars == [n.module for n in notebooks() if n.module != 'cli' and n.folder != 'commands']


def test_init_holds_the_version_alone():
    body = ast.parse((PACKAGE/'__init__.py').read_text(encoding='utf-8')).body
    names = [t.id for n in body if isinstance(n, ast.Assign) for t in n.targets]
    assert names == ['__version__'] and all(isinstance(n, (ast.Assign, ast.Expr)) for n in body)


# --- Each module by itself ---

@pytest.fixture(scope='module')
def imported_alone():
    "What importing each module in a process of its own gave, by module"
    names = [f'{PKG}.{nb.module}' for nb in notebooks()]
    res = run(sys.executable, '-W', 'ignore', Path(__file__).with_name('import_alone.py'), *names, timeout=1800)
    lines = [line for line in res.stdout.splitlines() if line.startswith('{')]
    assert len(lines) == len(names), res.stdout
    return {found['name']: found for found in map(json.loads, lines)}


@each_notebook
def test_imports_alone(nb, imported_alone):
    found = imported_alone[f'{PKG}.{nb.module}']
    assert found['status'] == 0, found['output']


# --- Methods that are patched on ---

def attributes(tree):
    return {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}


def class_names(annotation):
    "The classes in the annotation of a patched function's first parameter: `A`, `a.A`, `A|B`, `(A, B)`, `'A'`"
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode='eval').body
    if isinstance(annotation, ast.BinOp):
        return class_names(annotation.left) | class_names(annotation.right)
    if isinstance(annotation, (ast.Tuple, ast.List)):
        return set().union(*map(class_names, annotation.elts))
    return {getattr(annotation, 'attr', getattr(annotation, 'id', None))} - {None}


def patched_classes(f, decorator):
    "The classes that one decorator of a function patches"
    func = getattr(decorator, 'func', decorator)
    name = getattr(func, 'attr', getattr(func, 'id', ''))
    args = f.args.posonlyargs + f.args.args
    if name == 'patch' and args and args[0].annotation:
        return class_names(args[0].annotation)
    if name == 'patch_to' and isinstance(decorator, ast.Call) and decorator.args:
        return class_names(decorator.args[0])
    return set()


def patched(tree):
    "(class, method) for every `@patch`, `@patch(…)` and `@patch_to(…)` of a cell"
    for f in ast.walk(tree):
        if isinstance(f, law.FUNCTIONS):
            yield from ((c, f.name) for d in f.decorator_list for c in patched_classes(f, d))


def own_classes():
    "The names of the classes that the package defines"
    return {n.name for nb in notebooks() for c in nb.exported for n in ast.walk(c.tree) if isinstance(n, ast.ClassDef)}


@lru_cache
def all_patches():
    "[(number, class, method)] of the classes that fastai_tl patches and does not define"
    own = own_classes()
    found = [(nb.number, c, m) for nb in notebooks() for cell in nb.exported for c, m in patched(cell.tree)]
    return [(number, c, m) for number, c, m in found if c not in own]


@each_notebook
def test_methods_of_own_classes_are_in_the_class(nb):
    "`@patch` is for classes of other libraries; our own Learners are patched only where a higher folder adds to them"
    defined = {n.name for c in nb.exported for n in c.tree.body if isinstance(n, ast.ClassDef)}
    wrong = [f'{c}.{m}' for cell in nb.exported for c, m in patched(cell.tree) if c in defined]
    assert not wrong, f'{nb.path.name} patches its own classes: {wrong}'


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
    for number, cls, method in all_patches():
        if method not in their_own().get(cls, ()):
            later.setdefault(method, []).append(number)
    # `update` is also a method of dictionaries, sets and checksums
    higher = {m for m, nums in later.items() if min(nums) > nb.number and not hasattr(dict, m)}
    used = set().union(*(attributes(c.tree) for c in nb.exported)) & higher
    wrong = {m: min(later[m]) for m in used if f'{nb.module}:{m}' not in NOT_THAT_METHOD}
    assert not wrong, f'{nb.path.name} uses methods that later notebooks patch on: {wrong}'


def test_exceptions_are_needed():
    "An exception whose reason is gone is taken out of its list"
    used = {f'{n.module}:{a}' for n in notebooks() for c in n.exported for a in attributes(c.tree)}
    assert not set(NOT_THAT_METHOD) - used


# --- Each rule finds what it is for ---

MANY = ', '.join(f'p{i}' for i in range(11))
BODY = '\n'.join(f'    x{i} = {i}' for i in range(31))
PLANTED = [
    (law.long_lines, f'x = "{"a"*120}"'),
    (law.several_statements, 'a = 1; b = 2'),
    (law.several_statements, 'if a: b = 2'),
    (law.several_statements, 'for a in b: print(a)'),
    (law.several_conditions, 'x = a if b else c if d else e'),
    (law.unlike_tuples, 'a, b, c = 1, None, []'),
    (law.many_parameters, f'def f({MANY}): pass'),
    (law.many_parameters, f'def f(*, {MANY}): pass'),
    (law.long_cell, f'def f():\n{BODY}'),
    (law.long_cell, f'class A:\n    def f(self):\n{BODY}'.replace('    x', '        x')),
    (law.long_cell, 'class A:\n' + f'{BODY}\n'*5),
    (law.long_module, 'x = 1\n'*451),
    (law.house_words, 'What cannot be is refused at the door.'),
    (law.house_words_in_code, 'def f():\n    "Build it anew"'),
    (law.house_words_in_code, 'x = 1 # stands in the module'),
    (lambda code: law.private_imports(code, PKG), 'from ..core import _hidden'),
    (lambda code: law.private_imports(code, PKG), f'from {PKG}.core import a, _hidden'),
    (lambda code: law.unused_imports(code, PKG), 'from .schedules import fit_stlr'),
    (lambda code: law.unused_imports(code, PKG), 'from .schedules import *'),
]


@pytest.mark.parametrize('rule,code', PLANTED, ids=lambda o: getattr(o, '__name__', None) if callable(o) else o[:20])
def test_a_planted_violation_is_found(rule, code):
    assert rule(code)


CLEAN = '''def f(a, b=None, **kwargs):
    "Return the larger of two numbers"
    first, second = a, b
    if first > second:
        return first
    return second if second else first
'''


@pytest.mark.parametrize('rule', dict.fromkeys(rule for rule, _ in PLANTED), ids=lambda o: o.__name__)
def test_clean_code_passes(rule):
    assert not rule(CLEAN)


def test_a_repeated_public_name_is_found():
    assert repeated([('KINDS', 'a'), ('x', 'a'), ('KINDS', 'b')]) == {'KINDS': ['a', 'b']}


def test_an_import_from_a_larger_number_is_found():
    nb = notebooks()[0]
    later = notebooks()[-1].module
    assert not_smaller(nb, package_imports(ast.parse(f'from {PKG}.{later} import x'), PKG, numbers()))
    assert not_smaller(nb, package_imports(ast.parse(f'def f():\n    from .{later} import x'), PKG, numbers()))


def test_a_patch_of_an_own_class_is_found():
    tree = ast.parse('@patch\ndef f(self:A): pass\n@patch_to(B)\ndef g(self): pass')
    assert list(patched(tree)) == [('A', 'f'), ('B', 'g')]
