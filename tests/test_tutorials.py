"Tutorials and how-to pages run as the other notebooks do; in a file of their own, so that two processes can share them all."

import pytest

from repo import *
from test_notebooks import copy, runs


@pytest.mark.parametrize('path', [p for p in notebook_files() if p.parent != NBS], ids=ids)
def test_runs(path, copy): runs(path, copy)
