"""What the tests of the law read: the notebooks, their exported cells, and the modules made from them."""

import ast, importlib.util, os, re, shutil, subprocess, sys
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from fastcore.nbio import read_nb

ROOT = Path(__file__).resolve().parents[1]
NBS, PACKAGE = ROOT / 'nbs', ROOT / 'fastai_tl'
PKG = PACKAGE.name
HAND_WRITTEN = {'__init__.py', 'all.py'}
NOT_PROJECT = (
    '.git',
    '.venv',
    'venv',
    'build',
    'dist',
    '*.egg-info',
    '__pycache__',
    '.ipynb_checkpoints',
    '.pytest_cache',
    '.hypothesis',
    '_docs',
    '_proc',
    'site',
    'runs',
)
_name = re.compile(r'^(?P<number>\d\d\d)_(?:(?P<folder>[a-z0-9]+)\.)?(?P<module>[a-z0-9_]+)\.ipynb$')


@dataclass(frozen=True)
class Cell:
    "An exported cell: its id, its code without directives, and the module it goes to (None: the notebook's own)"

    id: str
    code: str
    to: str | None

    @cached_property
    def tree(self):
        return ast.parse(self.code)

    @property
    def lines(self):
        return len(self.code.strip('\n').splitlines())

    @property
    def title(self):
        "The first name that the cell defines, else its id"
        defs = [n.name for n in self.tree.body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))]
        return defs[0] if defs else self.id


@dataclass(frozen=True)
class Notebook:
    "A numbered notebook, from which one module is made"

    path: Path

    @cached_property
    def match(self):
        return _name.match(self.path.name)

    @property
    def number(self):
        return int(self.match['number'])

    @property
    def folder(self):
        return self.match['folder']

    @property
    def module(self):
        "The module's name inside the package that the file's name stands for, such as `datasets.corpora`"
        return '.'.join(filter(None, (self.folder, self.match['module'])))

    @property
    def py(self):
        return PACKAGE / (self.module.replace('.', '/') + '.py')

    @cached_property
    def _cells(self):
        return read_nb(self.path).cells

    @cached_property
    def default_exp(self):
        "The value of `#| default_exp`"
        nb = read_nb(self.path)
        meta = (nb.get('metadata', {}).get('nbdev') or {}).get('default_exp')
        return meta or next((d['default_exp'] for c in nb.cells if 'default_exp' in (d := c.directives)), None)

    @cached_property
    def exported(self):
        "The cells that go into a module, in order"
        res = []
        for c in self._cells:
            if c.cell_type != 'code':
                continue
            kinds = [k for k in ('export', 'exports', 'exporti') if k in c.directives]
            if kinds:
                res.append(Cell(c.get('id', '?'), ''.join(c._partition()[1]), c.directives[kinds[0]] or None))
        return res


def notebook_files(nbs=NBS):
    "Every notebook of the project, tutorials and the README's included"
    files = nbs.rglob('*.ipynb') if nbs.is_dir() else ()
    return sorted(p for p in files if not any(o[0] in '._' for o in p.relative_to(nbs).parts))


@lru_cache
def notebooks():
    "The numbered notebooks, in the order of their numbers"
    return sorted(
        (n for n in map(Notebook, notebook_files()) if n.path.parent == NBS and n.match),
        key=lambda n: (n.number, n.module),
    )


def ids(o):
    return o.path.name if isinstance(o, Notebook) else o.name


def calls_import(node):
    "The module that `import_module('…')` or `__import__('…')` names, else None"
    if not (isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant)):
        return
    name = getattr(node.func, 'attr', getattr(node.func, 'id', None))
    return node.args[0].value if name in ('import_module', '__import__') else None


def package_imports(tree, package, modules):
    """The modules of fastai_tl that `tree` imports anywhere, as names inside the package; '' is the package itself.
    `package` is the importing module's own package, such as `fastai_tl.data`, from which relative imports count."""
    res = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [(a.name, None) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split('.')
            base = base[: len(base) - node.level + 1] if node.level else []
            targets = [('.'.join(filter(None, base + [node.module])), a.name) for a in node.names]
        elif (name := calls_import(node)) and isinstance(name, str):
            targets = [(name, None)]
        else:
            continue
        for name, attr in targets:
            if name != PKG and not name.startswith(PKG + '.'):
                continue
            name = name[len(PKG) + 1 :]
            whole = '.'.join(filter(None, (name, attr)))
            if whole in modules:
                res.add(whole)  # from fastai_tl.data import corpus
            elif not (name == '' and attr == '__version__'):
                res.add(name)  # a name out of a module
    return res


def copy_project(dest):
    "A copy of the project without what git, builds and runs keep in it"
    shutil.copytree(ROOT, dest, ignore=shutil.ignore_patterns(*NOT_PROJECT))
    return dest


def clean_env(**kwargs):
    "The environment for a fresh process that must find this project's package, or the copy named by PYTHONPATH"
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}
    return {**env, 'PYTHONPATH': str(ROOT), 'PYTHONDONTWRITEBYTECODE': '1', **kwargs}


def run(*args, cwd=ROOT, timeout=300, env=None):
    "Run a program to its end; its output and its exit status"
    return subprocess.run(
        [str(o) for o in args],
        cwd=cwd,
        env=clean_env(**(env or {})),
        timeout=timeout,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def python(code, **kwargs):
    return run(sys.executable, '-W', 'ignore', '-c', code, **kwargs)


def script(name):
    "The path of a console script of the running environment"
    return (
        shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get('PATH', '')])) or name
    )


def benchmark(name, file='run'):
    "A module of `benchmarks/NAME/`, imported under a name of its own: each benchmark has a `run.py`"
    path = ROOT / 'benchmarks' / name / f'{file}.py'
    spec = importlib.util.spec_from_file_location(f'{name}_benchmark_{file}', path)
    mod = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mod)
    return mod
