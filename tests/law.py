"""The house rules, as functions from source text to a list of violations.

`tests/test_law.py` applies them to the project. `python tests/law.py FILE …` checks single notebooks and modules."""

import ast
import io
import json
import re
import sys
import tokenize

LINE_LENGTH = 120
CELL_LINES = 30
CLASS_LINES = 120
MODULE_LINES = 450
SHOWN_PARAMETERS = 10
# Words for which there are plainer ones. A smoke alarm, not the goal
_WORDS = ('anew', 'beside', 'bears', 'whoever', 'thaw', 'thawed', 'thaws', '(?:is|are) told', 'at the door',
          'of a kind', 'stands in', 'lies in')
HOUSE_WORDS = re.compile(rf'\b({"|".join(_WORDS)})\b', re.I)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def without_magics(code):
    "Code that Python can parse: lines of IPython's own become `pass`"
    return '\n'.join('pass' if line.startswith(('%', '!')) else line for line in code.split('\n'))


def long_lines(code):
    "Lines of more than `LINE_LENGTH` characters; a line that holds a long URL is let through"
    return [f'line {n} has {len(line)} characters' for n, line in enumerate(code.split('\n'), 1)
            if len(line) > LINE_LENGTH and not re.search(r'https?://\S{60,}', line)]


def blocks(node):
    "The lists of statements of a node"
    for field in ('body', 'orelse', 'finalbody'):
        block = getattr(node, field, None)
        if isinstance(block, list) and block and isinstance(block[0], ast.stmt):
            yield block


def several_statements(code):
    "Lines on which a second statement begins, after a semicolon or after the colon of an `if`, a loop or a `with`"
    wrong = []
    for node in ast.walk(ast.parse(code)):
        for block in blocks(node):
            lines = [b.lineno for a, b in zip(block, block[1:]) if a.end_lineno == b.lineno]
            if isinstance(node, (ast.If, ast.For, ast.While, ast.With, ast.Try)) and block[0].lineno == node.lineno:
                lines.append(node.lineno)
            wrong += [f'line {n} holds several statements' for n in lines]
    return wrong


def several_conditions(code):
    "Lines with more than one conditional expression"
    lines = [n.lineno for n in ast.walk(ast.parse(code)) if isinstance(n, ast.IfExp)]
    return [f'line {n} holds several conditional expressions' for n in sorted(set(lines)) if lines.count(n) > 1]


def unlike_tuples(code):
    "Assignments of three or more values at once: `a, b, c = 1, x, None`"
    found = [n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Tuple)]
    return [f'line {n.lineno} assigns {len(n.value.elts)} values at once' for n in found
            if isinstance(n.value, ast.Tuple) and len(n.value.elts) > 2]


def many_parameters(code):
    "Functions that show more than `SHOWN_PARAMETERS` parameters"
    wrong = []
    for f in ast.walk(ast.parse(code)):
        if isinstance(f, FUNCTIONS):
            args = f.args.posonlyargs + f.args.args + f.args.kwonlyargs
            shown = [a.arg for a in args if a.arg not in ('self', 'cls')]
            if len(shown) > SHOWN_PARAMETERS:
                wrong.append(f'`{f.name}` shows {len(shown)} parameters')
    return wrong


def long_cell(code):
    "A cell that is too long: with one class, a longer one is allowed if its methods are short"
    n_lines = len(code.strip('\n').split('\n'))
    tree = ast.parse(code)
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef)]
    limit = CLASS_LINES if len(classes) == 1 else CELL_LINES
    wrong = [f'a cell of {n_lines} lines'] if n_lines > limit else []
    for c in classes:
        lines = {f.name: f.end_lineno-f.lineno+1 for f in c.body if isinstance(f, FUNCTIONS)}
        wrong += [f'`{c.name}.{name}` has {n} lines' for name, n in lines.items() if n > CELL_LINES]
    return wrong


def long_module(code):
    "A module of more than `MODULE_LINES` lines"
    n_lines = len(code.splitlines())
    return [f'a module of {n_lines} lines'] if n_lines > MODULE_LINES else []


def house_words(text):
    "Words of prose that have a plainer one"
    return [f'“{m[0]}” in …{text[max(0, m.start()-30):m.end()+30]!r}' for m in HOUSE_WORDS.finditer(text)]


def house_words_in_code(code):
    "The same in docstrings, messages and comments"
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    return [w for t in tokens if t.type in (tokenize.COMMENT, tokenize.STRING) for w in house_words(t.string)]


def imports_of_package(tree, package):
    "(module, name, name in this module) of every name that is imported from `package`, relative imports included"
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or '').split('.')[0] == package):
            for a in node.names:
                yield node.module or '', a.name, a.asname or a.name


def private_imports(code, package):
    "Private names of other modules that a module imports"
    return [f'`{name}` of `{module}`' for module, name, _ in imports_of_package(ast.parse(code), package)
            if name.startswith('_') and not name.startswith('__')]


def unused_imports(code, package):
    "Names of the package that are imported and never used, and star imports, of which nobody can tell"
    tree = ast.parse(code)
    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    return [f'`{name}` of `{module}`' for module, name, local in imports_of_package(tree, package)
            if name == '*' or local not in used]


CODE_RULES = (long_lines, several_statements, several_conditions, unlike_tuples, many_parameters)


def violations(code):
    "What is wrong with a piece of exported code, a cell or a module"
    return [v for rule in CODE_RULES for v in rule(without_magics(code))]


def of_notebook(path):
    "What is wrong with a notebook, as lines"
    for i, cell in enumerate(json.loads(open(path, encoding='utf-8').read())['cells']):
        source = ''.join(cell['source'])
        exported = re.match(r'#\|\s*export', source)
        if cell['cell_type'] == 'markdown':
            found = house_words(source)
        elif exported:
            code = re.sub(r'\A(#\|.*\n)+', '', source)
            found = violations(code) + long_cell(code) + house_words_in_code(code)
        else:
            found = long_lines(source)
        yield from (f'{path} cell {i}: {v}' for v in found)


if __name__ == '__main__':
    wrong = []
    for path in sys.argv[1:]:
        if path.endswith('.ipynb'):
            wrong += of_notebook(path)
        else:
            wrong += [f'{path}: {v}' for v in violations(open(path, encoding='utf-8').read())]
    print('\n'.join(wrong) or 'no violations')
    sys.exit(bool(wrong))
