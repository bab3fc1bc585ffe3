"""A user's script that uses the public API of our own classes passes pyright, and the package has types."""

import json
import shutil

import pytest

from repo import *

SCRIPT = '''
from pathlib import Path

import pandas as pd
from fastai_tl.all import (
    Evaluation, GradualUnfreezing, HFTextDataLoaders, TextSpec, ULMFiT, discriminative_lrs, docstring_corpus,
    hf_classifier_learner, label_budget, layer_groups, load_bundle, minilm_folder, near_duplicates, text_perplexity,
)

df: pd.DataFrame = label_budget(docstring_corpus(), n_per_class=10, n_eval=10)
dls = HFTextDataLoaders.from_df(df, minilm_folder(), valid_col='split', max_length=64, bs=16)
spec: TextSpec = dls.spec
classes = spec.classes
learn = hf_classifier_learner(dls, minilm_folder(), class_weights='balanced')
learn.to_bf16()
learn.fit_one_cycle(1, 1e-3, cbs=GradualUnfreezing(every=1))
rates = discriminative_lrs(1e-3, len(layer_groups(learn.model)))
ev = Evaluation.from_preds([[.2, .8]], [1], classes=['a', 'b'])
report: pd.DataFrame = ev.report()
accuracy: float = ev.accuracy
ece = ev.calibration()['ece']
ev.save(Path('report'))
ulm = ULMFiT('run', lang='zh-tw')
ulm.pretrain(['a text'], epochs=1)
ulm.finetune_lm(df)
classifier = ulm.classifier(df, epochs=3)
clf = load_bundle('model')
pairs: pd.DataFrame = near_duplicates(['a', 'b'])
'''


@pytest.mark.slow
def test_a_users_script_passes_pyright(tmp_path):
    program = shutil.which('pyright', path=str(Path(sys.executable).parent)) or shutil.which('pyright')
    if program is None:
        pytest.skip('needs pyright: pip install -e ".[dev]"')
    version = run(program, '--version', cwd=tmp_path)
    if version.returncode:
        pytest.skip(f'pyright does not start here: {version.stdout[-200:]}')
    (tmp_path/'script.py').write_text(SCRIPT, encoding='utf-8')
    (tmp_path/'pyrightconfig.json').write_text(json.dumps(dict(extraPaths=[str(ROOT)], typeCheckingMode='basic')))
    res = run(program, '--pythonpath', sys.executable, '--outputjson', tmp_path/'script.py', cwd=tmp_path)
    found = json.loads(res.stdout[res.stdout.index('{'):])['generalDiagnostics']
    errors = [f'line {d["range"]["start"]["line"] + 1}: {d["message"]}' for d in found if d['severity'] == 'error']
    assert not errors, '\n'.join(errors)


def test_the_package_is_typed():
    assert (PACKAGE/'py.typed').exists()


def test_public_parameters_have_types():
    "Parameters whose default is a plain value say their type"
    import ast
    from test_law import public_names, source

    lacking = []
    for nb in notebooks():
        tree = ast.parse(source(nb))
        public = set(public_names(tree))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name in public:
                lacking += [f'{nb.module}.{node.name}({name})' for name in untyped(node)]
    assert not lacking, lacking


def untyped(f):
    "The parameters of a function whose default is a number, a string or a boolean and that have no type"
    import ast

    args = f.args.posonlyargs + f.args.args
    defaults = [None]*(len(args)-len(f.args.defaults)) + f.args.defaults
    both = [*zip(args, defaults), *zip(f.args.kwonlyargs, f.args.kw_defaults)]
    plain = (bool, int, float)
    untyped = [(a.arg, d) for a, d in both if a.annotation is None]
    return [name for name, d in untyped if isinstance(d, ast.Constant) and isinstance(d.value, plain)]
