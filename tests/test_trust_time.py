"A megabyte of any character goes through the functions for texts in seconds: their time does not grow with the square."

import time

import pytest

from fastai_tl.all import *
from fastai_tl.files import safe_cell

CHARACTERS = ['1', '1.', ',', '.', ' ', 'a', '中', '中,', '<', '<a', '(', '"', '\n', '\u0301', '😀', '\u200b', '-1e']
LENGTH = 1_000_000
FUNCTIONS = {
    'widen_punctuation': widen_punctuation,
    'safe_cell': safe_cell,
    'ChineseTokenizer': lambda text: ChineseTokenizer('chars').tokenize([text]),
}


def in_time(function, text):
    start = time.process_time()
    function(text)
    assert time.process_time() - start < 20 # quadratic time would be hours


@pytest.mark.slow
@pytest.mark.parametrize('character', CHARACTERS)
@pytest.mark.parametrize('name', FUNCTIONS)
def test_time_of_a_megabyte(name, character):
    in_time(FUNCTIONS[name], character * (LENGTH // len(character.encode())))
