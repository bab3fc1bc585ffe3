"""Tutorials and how-to pages run as the other notebooks do."""

import pytest

from repo import *
from test_notebooks import runs


@pytest.mark.slow
@pytest.mark.parametrize('path', [p for p in notebook_files() if p.parent != NBS], ids=ids)
def test_runs(path, notebook_runner):
    runs(path, notebook_runner)
