"""Answers, windows, tags and surprisals have the right characters, whatever a tokenizer counts as part of a token."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from tokenizers import pre_tokenizers as P
from transformers import GPT2Config, PreTrainedTokenizerFast, RobertaConfig

from fastai_tl.all import *
from fastai_tl.data.offsets import check_offsets, exact_offsets
from fastai_tl.generation.tokenizer_adapter import HFTokenizerAdapter

pytestmark = pytest.mark.filterwarnings('ignore')
CONTEXT = 'The city of Amsterdam (the capital) was founded in 1275 by Jan Smit, near the river.'
QUESTIONS = ['Where was it founded?', 'Who founded it?', 'When was it founded?', 'What is the first word?',
             'What is it?', 'Near what?']
ANSWERS = ['Amsterdam', 'Jan Smit', '1275', 'The', 'capital', 'the river']
SPECIAL = ['<s>', '<pad>', '</s>', '<unk>', '<mask>']


def bpe(pre, trim=True, prefix=True):
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre, decoders.ByteLevel()
    t.train_from_iterator([CONTEXT, *QUESTIONS]*20, trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=sorted(P.ByteLevel.alphabet()), show_progress=False))
    t.post_processor = processors.RobertaProcessing(('</s>', 2), ('<s>', 0), trim_offsets=trim, add_prefix_space=prefix)
    return t


def unigram():
    t = Tokenizer(models.Unigram())
    t.pre_tokenizer, t.decoder = P.Metaspace(), decoders.Metaspace()
    t.train_from_iterator([CONTEXT, *QUESTIONS]*20, trainers.UnigramTrainer(
        vocab_size=120, special_tokens=SPECIAL, unk_token='<unk>', show_progress=False))
    t.post_processor = processors.TemplateProcessing(
        single='<s> $A </s>', pair='<s> $A </s> $B </s>', special_tokens=[('<s>', 0), ('</s>', 2)])
    return t


def word_piece():
    t = Tokenizer(models.WordPiece(unk_token='<unk>'))
    t.normalizer, t.pre_tokenizer = normalizers.BertNormalizer(), P.BertPreTokenizer()
    t.train_from_iterator([CONTEXT, *QUESTIONS]*20, trainers.WordPieceTrainer(
        vocab_size=120, special_tokens=SPECIAL, show_progress=False))
    t.post_processor = processors.BertProcessing(('</s>', 2), ('<s>', 0))
    return t


FORMS = {
    'RoBERTa': lambda: bpe(P.ByteLevel(add_prefix_space=True)),
    'no prefix': lambda: bpe(P.ByteLevel(add_prefix_space=False), prefix=False),
    'spaces inside': lambda: bpe(P.ByteLevel(add_prefix_space=False, trim_offsets=False), trim=False, prefix=False),
    'RobBERT': lambda: bpe(P.Sequence([P.Whitespace(), P.ByteLevel(add_prefix_space=True), P.Punctuation()])),
    'split first': lambda: bpe(P.Sequence([P.WhitespaceSplit(), P.ByteLevel(add_prefix_space=True)])),
    'digits': lambda: bpe(P.Sequence([P.WhitespaceSplit(), P.ByteLevel(add_prefix_space=True),
                                      P.Digits(individual_digits=True)])),
    'Metaspace': unigram,
    'WordPiece': word_piece}


def made(name):
    return PreTrainedTokenizerFast(
        tokenizer_object=FORMS[name](), model_max_length=64, model_input_names=['input_ids', 'attention_mask'],
        bos_token='<s>', pad_token='<pad>', unk_token='<unk>', cls_token='<s>', sep_token='</s>', eos_token='</s>',
        mask_token='<mask>')


def roberta(tok):
    return RobertaConfig(vocab_size=len(tok), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                         intermediate_size=64, max_position_embeddings=80, pad_token_id=1, hidden_dropout_prob=0.,
                         attention_probs_dropout_prob=0.)


@pytest.mark.parametrize('max_length,stride', [(64, 8), (24, 4), (30, 0)])
@pytest.mark.parametrize('name', FORMS)
def test_labels_of_answers_cover_the_answer(name, max_length, stride):
    "In every window with the answer, the text of its tokens is the answer; each answer is in some window"
    tok = made(name)
    dls = HFQADataLoaders.from_lists(QUESTIONS, [CONTEXT]*6, ANSWERS, tokenizer=tok, valid=[False]*5+[True], bs=4,
                                     max_length=max_length, stride=stride)
    found = set()
    for window in [*dls.train_ds.items, *dls.valid_ds.items]:
        begin, end = window.data[2:]
        if begin[window.first] == 0:
            continue
        text = CONTEXT[begin[window.first]-1:end[window.last]].strip()
        assert text == window.example.answers[0]
        assert CONTEXT[:begin[window.first]-1].strip() == CONTEXT[:window.example.starts[0]].strip()
        found.add(text)
    # an answer can be longer than the part that two windows share
    assert found == set(ANSWERS) if stride == 8 else len(found) >= 4


SHORT = 'The team lost 5 men and won a (big) cup, “old café” 3,50 € — I say.'
SHORT_ANSWERS = ['5', '(big)', 'big', 'old café', '3,50 €', '€', 'I', 'men and']


@pytest.mark.parametrize('name', FORMS)
def test_words_of_one_character(name):
    "Each token covers the characters that it decodes to, and no others"
    tok = made(name)
    encoded = tok(SHORT, add_special_tokens=False, return_offsets_mapping=True)
    exact = exact_offsets(SHORT, encoded['offset_mapping'])
    covered = set()
    for i, (begin, end) in zip(encoded['input_ids'], encoded['offset_mapping']):
        begin, end = exact[begin, end]
        covered |= set(range(begin, end))
        token = tok.decode([i]).strip().removeprefix('##').lower()
        piece = SHORT[begin:end].strip().lower()
        if token and token.isascii() and token not in SPECIAL and 'é' not in piece: # an accent can be stripped
            assert piece == token
    assert {i for i, letter in enumerate(SHORT) if not letter.isspace()} <= covered


@pytest.mark.parametrize('max_length,stride', [(64, 8), (24, 8), (24, 1), (20, 0)])
@pytest.mark.parametrize('name', [name for name in FORMS if name != 'Metaspace']) # its unknown letters are one token
def test_short_answers_are_covered_exactly(name, max_length, stride):
    "With windows that share no token, an answer of one token is in some window, too"
    tok = made(name)
    n = len(SHORT_ANSWERS)
    dls = HFQADataLoaders.from_lists(['What?']*n, [SHORT]*n, SHORT_ANSWERS, tokenizer=tok, valid=[False]*(n-1)+[True],
                                     bs=4, max_length=max_length, stride=stride)
    found = set()
    for window in [*dls.train_ds.items, *dls.valid_ds.items]:
        begin, end = window.data[2:]
        if begin[window.first] == 0:
            continue
        text = SHORT[begin[window.first]-1:end[window.last]]
        answer = window.example.answers[0]
        assert text.strip() == answer
        assert SHORT[:begin[window.first]-1].strip() == SHORT[:window.example.starts[0]].strip()
        found.add(answer)
    assert found >= ({*SHORT_ANSWERS} if stride == 8 else {'5', 'I'})


@pytest.mark.parametrize('name', ['RoBERTa', 'RobBERT', 'digits', 'Metaspace'])
def test_answers_learnt_by_heart(name):
    "Text, start and end of each answer; metrics of the fit agree"
    tok = made(name)
    seed_everything(0)
    dls = HFQADataLoaders.from_lists(QUESTIONS[:4]*2, [CONTEXT]*8, ANSWERS[:4]*2, tokenizer=tok,
                                     valid=[False]*4+[True]*4, bs=4, max_length=64, stride=8)
    learn = hf_qa_learner(dls, roberta(tok))
    with learn.no_bar(), learn.no_logging():
        learn.fit(110, 3e-3)
        assert learn.validate()[1:] == [1., 1.]
        for question, answer in zip(QUESTIONS[:4], ANSWERS):
            got = learn.answer(question, CONTEXT)
            start = CONTEXT.index(answer)
            assert (got.text, got.start, got.end) == (answer, start, start + len(answer))


@pytest.mark.parametrize('name', FORMS)
def test_windows_lose_no_letter(name):
    "Without overlap, each window begins where the last one ends, at most a character before it"
    tok = made(name)
    text = ' '.join([CONTEXT]*4)
    windows, rows = text_windows([text, CONTEXT], tok, 20, 0)
    of_first = [window for window, row in zip(windows, rows) if row == 0]
    end = 0
    for window in of_first:
        begin = text.index(window, max(end-1, 0)) # two tokens of one character can be in two windows
        assert not text[end:begin].strip()
        end = begin + len(window)
    assert not text[end:].strip()
    for window in text_windows([text], tok, 20, 6)[0]:
        assert window in text


@pytest.mark.parametrize('name', FORMS)
def test_tags_of_words(name):
    "Each word has one first token, and its tokens are those of the word"
    tok = made(name)
    words = CONTEXT.split()
    tags = ['B-X' if word[0].isupper() else 'O' for word in words]
    dls = HFTagDataLoaders.from_lists([words]*6, [tags]*6, tok, valid=[False]*4+[True]*2, bs=2, max_length=200,
                                      verbose=False)
    for x, y in (dls.train_ds[0], dls.valid_ds[0]):
        ids, places = x.ids, x.places
        assert sorted(set(places[places >= 0].tolist())) == list(range(len(words)))
        assert (y >= 0).sum() == len(words)
        assert [dls.vocab[i] for i in y[y >= 0].tolist()] == tags
        for i, word in enumerate(words):
            text = dls.tokenizer.decode(ids[places == i].tolist()).replace(' ', '')
            assert text.lower() == word.lower()


@pytest.mark.parametrize('name', ['no prefix', 'spaces inside', 'RobBERT', 'digits', 'Metaspace'])
def test_positions_of_surprisals(name):
    "The tokens of a text cover all of its letters"
    tok = made(name)
    config = GPT2Config(vocab_size=len(tok), n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=0,
                        eos_token_id=2)
    for text in (CONTEXT, SHORT):
        ids, spans = HFTokenizerAdapter(tok, config).encode_spans(text)
        covered = {i for start, end in spans for i in range(start, end) if not text[i].isspace()}
        assert sorted(covered) == [i for i, c in enumerate(text) if not c.isspace()]


class Shifted:
    "A tokenizer whose offsets are `by` characters off"
    is_fast = True
    def __init__(self, tok, by):
        self.tok, self.by = tok, by
    def __getattr__(self, name):
        return getattr(self.tok, name)
    def __call__(self, *args, **kwargs):
        res = self.tok(*args, **kwargs)
        res['offset_mapping'] = [(max(a + self.by, 0), max(b + self.by, 0)) for a, b in res['offset_mapping']]
        return res


@pytest.mark.parametrize('by', [-2, 2, 5])
def test_offsets_that_cannot_be_right_are_refused(by):
    tok = made('RoBERTa')
    assert check_offsets(tok, [CONTEXT]) is None
    with pytest.raises(FastaiTLError, match='must say'):
        check_offsets(Shifted(tok, by), [CONTEXT])


def test_offsets_of_a_word_of_one_character():
    "Windows can report the same token in two ways; a token that is only the added space stays empty"
    text = 'lost 5 men'
    assert exact_offsets(text, [(0, 4), (6, 6), (8, 10)]) == {(0, 4): (0, 4), (6, 6): (5, 6), (8, 10): (7, 10)}
    assert exact_offsets(text, [(0, 4), (6, 6), (0, 0), (5, 6), (8, 10)])[6, 6] == (5, 6)
    assert exact_offsets(text, [(0, 4), (6, 6), (5, 6), (8, 10)])[6, 6] == (6, 6)
    assert exact_offsets(text, [(0, 4), (6, 6), (8, 8), (8, 10)])[8, 10] == (8, 10)


def test_accents_of_their_own_and_characters_that_are_dropped():
    "An accent belongs to the letter before it; a zero-width character belongs to no token"
    assert exact_offsets('cafe\u0301 x', [(0, 4), (6, 7)]) == {(0, 4): (0, 5), (6, 7): (6, 7)}
    assert exact_offsets('a \u200bword', [(0, 1), (3, 7)]) == {(0, 1): (0, 1), (3, 7): (3, 7)}
    tok = made('WordPiece')
    context = CONTEXT.replace('Smit', 'Smi\u0301t')
    dls = HFQADataLoaders.from_lists(QUESTIONS[:2], [context]*2, [ANSWERS[0], 'Jan Smi\u0301t'], tokenizer=tok,
                                     valid=[True, False], bs=2, max_length=64, stride=8)
    window = dls.train_ds.items[0]
    begin, end = window.data[2:]
    assert context[begin[window.first]-1:end[window.last]] == 'Jan Smi\u0301t'
