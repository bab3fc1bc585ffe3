"""The recipe for Ray Data on the page "Predict a file", as it is written there: the same predictions as one process.

Workers of Ray have a processor each, so two workers, and the tasks that read and write, need four (Ray only counts)."""

import json
import re
import subprocess
import sys

import pandas as pd
import pytest

from fastai_tl.all import load_bundle, train_tokenizer
from repo import ROOT, clean_env
from small_learners import TEXTS, classifier, sentences


def recipe_of(page):
    "The code of a page that uses Ray Data"
    return re.search(r'```python\n([^`]*?ray\.data.*?)```', page, re.DOTALL).group(1)


def english():
    cells = json.loads((ROOT/'nbs'/'howto'/'predict_file.ipynb').read_text())['cells']
    return recipe_of(''.join(line for cell in cells for line in cell['source']))


def test_both_languages_have_the_same_recipe():
    assert recipe_of((ROOT/'tools'/'zh-tw'/'howto'/'predict_file.md').read_text()) == english()


def recipe(folder):
    "The code of the page, with the folders of this test and two workers"
    code = english()
    changed = code.replace('/shared/', f'{folder.as_posix()}/').replace('size=8', 'size=2')
    assert changed.count(folder.as_posix()) == 3 and changed.count('size=2') == 1
    return changed


@pytest.mark.slow
def test_recipe_of_the_page(tmp_path):
    pytest.importorskip('ray.data', reason='pip install "fastai_tl[ray]"')
    classifier(dict(encoder=train_tokenizer(sentences(200), 400, 'encoder'))).save_bundle(tmp_path/'model')
    df = pd.DataFrame(dict(id=range(500), text=[f'{i} {TEXTS[i % len(TEXTS)][:60]}' for i in range(500)]))
    (tmp_path/'new').mkdir()
    for i in range(4):
        df[i::4].to_parquet(tmp_path/'new'/f'{i}.parquet')
    (tmp_path/'script.py').write_text(f'import ray\nray.init(num_cpus=4)\n{recipe(tmp_path)}')
    env = clean_env(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', RAY_USAGE_STATS_ENABLED='0')
    done = subprocess.run([sys.executable, tmp_path/'script.py'], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    found = pd.read_parquet(tmp_path/'predicted').sort_values('id')
    expected = load_bundle(tmp_path/'model', verbose=False).predict(df.text.tolist())
    assert found.id.tolist() == df.id.tolist() and found.text.tolist() == df.text.tolist()
    assert found.label.tolist() == list(expected.labels)
    assert abs(found.confidence.to_numpy() - expected.probs.max(1)).max() < 1e-6
