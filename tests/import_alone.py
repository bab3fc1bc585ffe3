"""Import each module named on the command line in a process of its own, and print one line of JSON for each.

The processes are forked from one that has imported fastai and transformers, but nothing of the package. For test_law.
"""

import importlib
import json
import os
import sys
import tempfile
import traceback

import fastai.text.all  # noqa: F401
import transformers.trainer  # noqa: F401

for name in sys.argv[1:]:
    with tempfile.TemporaryFile('w+') as log:
        pid = os.fork()
        if not pid:
            try:
                assert not [m for m in sys.modules if m.startswith('fastai_tl.')]
                importlib.import_module(name)
                os._exit(0)
            except BaseException:
                log.write(traceback.format_exc())
                log.flush()
                os._exit(1)
        status = os.waitpid(pid, 0)[1]
        log.seek(0)
        print(json.dumps(dict(name=name, status=status, output=log.read())), flush=True)
