"""The cache of tokens is for the same texts, tokenizer and rules; new texts are read as those that were tokenized."""

import pytest

from fastai_tl.all import *

TEXTS = ['Abc def. now']


def tokens(*args, **kwargs):
    return list(tokenize_texts_once(TEXTS, *args, progress=False, **kwargs)[0])


def letters(texts):
    return [list(text) for text in texts]


def words(texts):
    return [text.split() for text in texts]


class Without:
    "A tokenizer with a setting that is a list"

    def __init__(self, stop):
        self.stop = stop

    def __call__(self, texts):
        return [[word for word in text.split() if word not in self.stop] for text in texts]


def first(n):
    return lambda text: text[:n]


PAIRS = [
    (dict(rules=[lambda s: s.lower()]), dict(rules=[lambda s: s.upper()])),
    (dict(rules=[first(3)]), dict(rules=[first(5)])),
    (dict(rules=[str.lower]), dict(rules=[str.upper])),
    (dict(tok=letters, rules=[]), dict(tok=words, rules=[])),
    (dict(tok=Without(['now']), rules=[]), dict(tok=Without(['def.']), rules=[])),
    (dict(tok=Without(['now']), rules=[]), dict(tok=Without(['now']), rules=[str.upper])),
]


@pytest.mark.parametrize('one, other', PAIRS)
def test_other_rules_or_tokenizers_are_not_those_of_the_cache(tmp_path, one, other):
    expected = [tokens(**kw) for kw in (one, other)]
    for _ in range(2):
        assert [tokens(cache_dir=tmp_path, **kw) for kw in (one, other)] == expected
    assert len(list(tmp_path.iterdir())) == 2


def test_a_changed_method_is_another_tokenizer(tmp_path):
    def made(cut):
        class Tok:
            def __call__(self, texts):
                return cut(texts)
        return Tok()
    assert tokens(made(letters), rules=[], cache_dir=tmp_path) != tokens(made(words), rules=[], cache_dir=tmp_path)


def test_a_rule_that_calls_itself(tmp_path):
    def halved(text):
        return text if len(text) < 6 else halved(text[:len(text)//2])
    found = tokens(rules=[halved], cache_dir=tmp_path)
    assert found == tokens(rules=[halved]) == tokens(rules=[halved], cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


# --- new texts ---

CHINESE = ['房間很好，早餐也不錯。', '太差了，不會再來']*20
LABELS = ['正面', '負面']*20


def make_dls(kind, tokenized, **kwargs):
    vocab = texts_vocab(tokenized, min_freq=1)
    if kind == 'lm':
        return language_model_dls(tokenized, vocab, bs=2, seq_len=5, **kwargs)
    rows = list(range(40))
    return classifier_dls(tokenized, LABELS, 'classification', rows[:30], rows[30:], vocab, bs=4, seq_len=8, **kwargs)


@pytest.mark.parametrize('kind', ['lm', 'classifier'])
def test_new_texts_are_read_as_those_that_were_tokenized(kind):
    own = (ChineseTokenizer('chars', bos=False), CHINESE_RULES[:1])
    for tok, rules in ((ChineseTokenizer(), None), own, (None, None)):
        tokenized = tokenize_texts_once(CHINESE, tok, rules, progress=False)
        dls, given = make_dls(kind, tokenized), make_dls(kind, tokenized, tok=tok, rules=rules)
        assert dls.spec.tokenizer == given.spec.tokenizer and dls.spec.lang == given.spec.lang


@pytest.mark.parametrize('kind', ['lm', 'classifier'])
def test_a_tokenizer_of_your_own_is_asked_for(kind):
    tokenized = tokenize_texts_once(CHINESE, letters, [], progress=False)
    with pytest.raises(VocabError, match='`tok=`'):
        make_dls(kind, tokenized)
    assert make_dls(kind, tokenized, tok=letters, rules=[]).spec.tokenizer
