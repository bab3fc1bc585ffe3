"""Calls functions of `deploy.hub_files` that come as lines of JSON, [name, arguments, keyword arguments], on standard
input, and answers with lines of JSON. A process of its own, because huggingface_hub reads its environment once."""

import json
import sys
import warnings

from fastai_tl.core import FastaiTLError
from fastai_tl.deploy import hub_files

for line in sys.stdin:
    name, args, kwargs = json.loads(line)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        try:
            answer = dict(value=str(getattr(hub_files, name)(*args, **kwargs)))
        except Exception as error:
            kind = type(error).__name__
            answer = dict(error=kind, message=str(error), is_ours=isinstance(error, FastaiTLError))
    answer['warnings'] = [str(w.message) for w in said if 'fastai_tl' in w.filename]
    answer['torch'] = 'torch' in sys.modules
    print(json.dumps(answer), flush=True)
