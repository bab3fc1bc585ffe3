"""A process that imports fastai and transformers once, and forks a run for each notebook that standard input names.

`python tests/notebook_run.py FOLDER` runs notebooks of the copy of the project in FOLDER. For each it prints one line
of JSON: whether it ran to its end, and what it printed to standard error. Each run imports the package itself, so that
a notebook that forgets an import fails. Used by test_notebooks.py and test_tutorials.py."""

import importlib
import json
import os
import sys
import tempfile
from pathlib import Path

# what a fork finds imported already
MODULES = ('matplotlib.pyplot', 'nbdev.test', 'seaborn', 'sklearn.linear_model', 'transformers', 'fastai.text.all')


def run(path, root, log):
    "Run a notebook from top to bottom, without the cells flagged `slow`; the exit status is 0 if it reached its end"
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.__stderr__ = sys.stderr = os.fdopen(2, 'w', buffering=1)
    import torch
    from nbdev.test import test_nb

    torch.set_num_threads(torch.get_num_threads())  # as in distributed_run.py
    finished, _ = test_nb(path, skip_flags=['slow', 'notest'], force_flags=[], basepath=root, showerr=True)
    sys.stderr.flush()
    os._exit(0 if finished else 1)


def serve(root):
    "Fork a run for each line"
    os.chdir(root/'nbs')
    print('ready', flush=True)
    for line in sys.stdin:
        with tempfile.TemporaryFile('w+') as log:
            pid = os.fork()
            if not pid:
                run(Path(line.rstrip('\n')), root, log)
            status = os.waitpid(pid, 0)[1]
            log.seek(0)
            print(json.dumps(dict(finished=status == 0, output=log.read())), flush=True)


if __name__ == '__main__':
    root = Path(sys.argv[1]).resolve()
    sys.path.insert(0, str(root))
    for name in MODULES:
        importlib.import_module(name)
    for name in ('AutoModel', 'AutoTokenizer', 'BertForMaskedLM', 'PreTrainedTokenizerFast'):
        getattr(importlib.import_module('transformers'), name)  # transformers imports its classes when they are used
    assert not [m for m in sys.modules if m.split('.')[0] == 'fastai_tl']
    serve(root)
