"Tags in any spelling give the entities of conlleval, and the metrics of a fit are those of evaluate() on the same rows"

import random

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import BertConfig

from fastai_tl.all import EntityF1, HFTagDataLoaders, TagAccuracy, TagEvaluation, entity_scores, hf_tagger_learner
from fastai_tl.all import seed_everything, tag_scheme, tag_spans, train_tokenizer
from fastai_tl.core import DataError

# --- spellings ---

SPELLINGS = {
    'as in CoNLL': lambda tag: tag,
    'lower case': str.lower,
    'lower letters': lambda tag: tag[0].lower() + tag[1:],
    'underscore': lambda tag: tag.replace('-', '_', 1),
    'lower and underscore': lambda tag: tag.lower().replace('-', '_', 1),
    'type first': lambda tag: '-'.join(reversed(tag.split('-', 1))),
    'type first, underscore': lambda tag: '_'.join(reversed(tag.split('-', 1))),
    'type first, lower': lambda tag: '-'.join(reversed(tag.lower().split('-', 1))),
    'other outside tag': lambda tag: 'OTHER' if tag == 'O' else tag,
    'spaces': lambda tag: tag.replace('-', ' - ', 1),
    'colon': lambda tag: tag.replace('-', ':', 1),
}
LETTERS = dict(
    BIOES=dict(B='B', I='I', E='E', S='S'),
    BILOU=dict(B='B', I='I', E='L', S='U'),
    BMES=dict(B='B', I='M', E='E', S='S'),
    BMEWO=dict(B='B', I='M', E='E', S='W'),
    IOB2=dict(B='B', I='I', E='I', S='B'),
)


def sentence_of(rng, n=12):
    "Entities `(type, start, end)` drawn at random, and their tags in BIOES"
    tags = ['O']*n
    spans = []
    at = 0
    while at < n:
        size, kind = rng.randint(1, 4), rng.choice(['PER', 'LOC', 'ORG'])
        if rng.random() < 0.5 and at + size <= n:
            spans.append((kind, at, at + size))
            letters = 'S' if size == 1 else 'B' + 'I'*(size - 2) + 'E'
            tags[at : at + size] = [f'{letter}-{kind}' for letter in letters]
        at += size
    return tags, spans


def written(tags, scheme, spell):
    "The tags in another scheme and spelling"
    return [spell(LETTERS[scheme][tag[0]] + tag[1:] if tag != 'O' else tag) for tag in tags]


def f1_by_definition(found, true):
    "F1 of sets of entities, written down"
    right = sum(len(set(a) & set(b)) for a, b in zip(found, true))
    return 2*right/(sum(map(len, found)) + sum(map(len, true)))


@pytest.mark.parametrize('how', SPELLINGS)
@pytest.mark.parametrize('scheme', LETTERS)
def test_each_scheme_in_each_spelling(scheme, how):
    rng = random.Random(0)
    true, pred = [[sentence_of(rng) for _ in range(30)] for _ in range(2)]
    spell = SPELLINGS[how]
    tags, guesses = ([written(t, scheme, spell) for t, _ in part] for part in (true, pred))
    found = tag_scheme(tag for sentence in tags for tag in sentence)
    assert found.name == scheme and str(found)
    case = str.lower if how in ('lower case', 'lower and underscore', 'type first, lower') else str
    spans = [[(case(kind), a, b) for kind, a, b in s] for _, s in true]
    others = [[(case(kind), a, b) for kind, a, b in s] for _, s in pred]
    assert [tag_spans(t, found) for t in tags] == spans
    f1 = f1_by_definition(others, spans)
    assert entity_scores(guesses, tags)['f1'] == pytest.approx(f1)
    ev = TagEvaluation(guesses, tags)
    assert ev.report(level=None).loc['micro avg', 'f1'] == pytest.approx(f1)
    assert ev.types == sorted({case(kind) for kind in ('PER', 'LOC', 'ORG')})


OUTSIDES = ['OTHER', 'other', '_', '-', '0', 'OUT', 'Outside', 'NONE']
FORMS = {
    'letters': lambda tag: tag,
    'lower': str.lower,
    'type first': lambda tag: '-'.join(reversed(tag.split('-', 1))),
    'spaces': lambda tag: tag.replace('-', ' - ', 1),
    'words': lambda tag: tag.replace('B-', 'Begin-', 1).replace('I-', 'Inside-', 1),
    'words in capitals': lambda tag: tag.replace('B-', 'BEGIN_', 1).replace('I-', 'INSIDE_', 1),
    'words last': lambda tag: '-'.join(reversed(tag.split('-', 1))).replace('-B', '-Begin').replace('-I', '-Inside'),
}


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('outside', ['O', *OUTSIDES])
def test_other_outside_tags_and_words_for_letters(outside, form):
    "Precision, recall and F1 are those of conlleval for the same tags in IOB2"
    def spelled(tags):
        return [outside if tag == 'O' else FORMS[form](tag) for tag in tags.split()]
    true = spelled('B-PER I-PER O B-LOC I-LOC O B-ORG O')
    pred = spelled('B-PER I-PER O B-LOC O O B-ORG B-PER')
    right = dict(precision=2/4, recall=2/3, f1=4/7)
    assert entity_scores([pred], [true]) == pytest.approx(right)
    case = str.lower if form == 'lower' else str
    assert tag_spans(true) == [(case('PER'), 0, 2), (case('LOC'), 3, 5), (case('ORG'), 6, 7)]
    scheme = tag_scheme(true)
    assert (scheme.name, scheme.outside) == ('IOB2', outside)
    assert outside == 'O' or repr(outside) in str(scheme)
    ev = TagEvaluation([pred], [true])
    assert ev.types == sorted(map(case, ['PER', 'LOC', 'ORG']))
    assert ev.report(level=None).loc['micro avg', 'f1'] == pytest.approx(4/7)


@pytest.mark.parametrize('outside', OUTSIDES)
def test_outside_tags_that_are_not_clear_are_refused(outside):
    "Two outside tags, or types alone with another outside tag than `O`"
    with pytest.raises(DataError, match='written in one way'):
        tag_spans(['B-PER', 'I-PER', 'O', outside])
    with pytest.raises(DataError, match='must have the tag `O`'):
        tag_spans(['PER', 'LOC', outside])
    with pytest.raises(DataError, match='must have the tag `O`'):
        entity_scores([['PER', outside]], [['PER', outside]])
    with pytest.raises(DataError, match='Write `O`'):
        TagEvaluation([['PER', outside]], [['PER', outside]])
    assert tag_scheme(['NOUN', 'VERB', outside]) is None
    assert tag_spans(['B-PER', 'MISC', outside]) == [('PER', 0, 1), ('MISC', 1, 2)]


def test_types_that_begin_with_a_word_for_a_letter():
    "`End-User` is a type, and so are `LAST-NAME`, and `Begin-Date` next to `End-Date`"
    for tags in ('End-User Last-Name O', 'LAST-NAME FIRST-NAME O', 'Begin-Date End-Date O', 'END-DATE O'):
        assert [kind for kind, *_ in tag_spans(tags.split())] == tags.split()[:-1]


def test_types_alone_and_parts_of_speech():
    assert tag_spans('PER PER O LOC'.split()) == [('PER', 0, 2), ('LOC', 3, 4)]
    assert tag_spans('per per o loc'.split()) == [('per', 0, 2), ('loc', 3, 4)]
    assert tag_spans('I-PER I-PER O I-LOC'.split()) == [('PER', 0, 2), ('LOC', 3, 4)]
    assert tag_spans('vitamin_b O e-mail'.split()) == [('vitamin_b', 0, 1), ('e-mail', 2, 3)]
    for tags in ('NOUN VERB ADJ', 'n v o a', 'NN-S VB'):
        assert tag_scheme(tags.split()) is None
    for tags in ('O', 'o', ''):
        assert tag_spans(tags.split()*3) == []


@pytest.mark.parametrize(
    'tags',
    ['B-PER b-per O', 'B-PER I_PER O', 'B-PER PER-I O', 'b-per i-per misc o', 'B-PER I-PER o O', 'PER-B PER-I LOC O'],
)
def test_two_spellings_are_refused(tok, tags):
    with pytest.raises(DataError, match='written in one way'):
        tag_spans(tags.split())
    with pytest.raises(DataError, match='written in one way'):
        entity_scores([tags.split()], [tags.split()])
    with pytest.raises(DataError, match='written in one way'):
        words = [['word']*len(tags.split())]*6
        HFTagDataLoaders.from_lists(words, [tags.split()]*6, tok, bs=2)


def test_predictions_in_another_spelling_are_refused():
    with pytest.raises(DataError, match='written in one way'):
        entity_scores([['b-per', 'i-per']], [['B-PER', 'I-PER']])
    with pytest.raises(DataError, match='written in one way'):
        TagEvaluation([['PER-B', 'PER-I']], [['B-PER', 'I-PER']])


# --- a tagger in each spelling, with long sentences and words without a token ---

NAMES = ['actor', 'music', 'scene']
OTHERS = 'the film was long we'.split()


@pytest.fixture(scope='module')
def tok():
    return train_tokenizer([' '.join(NAMES + OTHERS)]*50, 320)


def tagged(n=48, seed=0):
    "Sentences of 5 to 50 words with entities of one or two words; an empty string gives no token"
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        words = [rng.choice(OTHERS) for _ in range(rng.choice([5, 12, 50]))]
        tags = ['O']*len(words)
        for i in range(1, len(words) - 2, 5):
            words[i] = rng.choice(NAMES)
            tags[i] = 'B-PER' if words[i] == 'actor' else 'B-LOC'
            if rng.random() < 0.4:
                words[i + 1] = rng.choice([words[i], ''])
                tags[i + 1] = 'I' + tags[i][1:]
        rows.append((words, tags))
    return [list(part) for part in zip(*rows)]


def config(tok, **kwargs):
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    return BertConfig(vocab_size=len(tok), max_position_embeddings=64, **sizes, **kwargs)


def tagger(tok, words, tags, **kwargs):
    seed_everything(0)
    valid = [i >= 32 for i in range(len(words))]
    options = dict(max_length=20, bs=8, verbose=False) | kwargs
    dls = HFTagDataLoaders.from_lists(words, tags, tok, valid=valid, **options)
    return hf_tagger_learner(dls, config(tok), metrics=[TagAccuracy(), EntityF1(), EntityF1('macro')])


@pytest.mark.parametrize('how', ['as in CoNLL', 'lower and underscore', 'type first', 'other outside tag'])
@pytest.mark.parametrize('options', [{}, dict(label_all=True), dict(side='left')])
def test_the_table_of_a_fit_is_the_evaluation(tok, how, options):
    from copy import deepcopy

    words, tags = tagged()
    tags = [[SPELLINGS[how](tag) for tag in sentence] for sentence in tags]
    own = deepcopy(tok)
    options = dict(options)
    own.padding_side = options.pop('side', 'right')
    learn = tagger(own, words, tags, **options)
    with learn.no_bar(), learn.no_logging():
        learn.fit(3, 5e-3)
        last = list(learn.recorder.values[-1])
        loss, accuracy, f1, macro = learn.validate()
        by_hand = [o.tags for o in learn.tag(words[32:])]
        ev = learn.evaluate()
    assert last[-3:] == pytest.approx([accuracy, f1, macro])
    report = ev.report(level=None)
    right = [p == t for pred, true in zip(by_hand, tags[32:]) for p, t in zip(pred, true)]
    assert len(right) == sum(map(len, words[32:]))
    assert accuracy == pytest.approx(np.mean(right)) and ev.accuracy == pytest.approx(accuracy)
    spans = [[tag_spans(s, tag_scheme(learn.dls.vocab)) for s in part] for part in (by_hand, tags[32:])]
    assert f1 == pytest.approx(f1_by_definition(*spans)) and 0.3 < f1 < 1
    assert f1 == pytest.approx(report.loc['micro avg', 'f1'])
    assert macro == pytest.approx(report.loc['macro avg', 'f1'])
    assert report.loc['micro avg', 'support'] == sum(len(s) for s in spans[1])


def test_in_new_rows_and_in_training(tok):
    words, tags = tagged()
    learn = tagger(tok, words, tags)
    new_words, new_tags = tagged(20, seed=1)
    dl = learn.dls.test_dl(pd.DataFrame(dict(tokens=new_words, tags=new_tags)), with_labels=True)
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 5e-3)
        values = learn.validate(dl=dl)
        want = learn.evaluate(new_words, new_tags)
        of_training = learn.validate(ds_idx=0)
        own = learn.evaluate(ds_idx=0)
    assert values[1] == pytest.approx(want.accuracy)
    assert values[2] == pytest.approx(want.report(level=None).loc['micro avg', 'f1'])
    assert of_training[1] == pytest.approx(own.accuracy)


def test_the_model_sees_each_long_sentence_once_more(tok, monkeypatch):
    "Three metrics share one reading of the windows"
    words, tags = tagged()
    learn = tagger(tok, words, tags)
    calls = []
    import fastai_tl.learners.tagging as module

    read = module._model_probs
    monkeypatch.setattr(module, '_model_probs', lambda *args: calls.append(1) or read(*args))
    with learn.no_bar(), learn.no_logging():
        learn.validate()
    assert 1 <= len(calls) <= len(learn.dls.valid)


def test_types_alone_train_and_evaluate(tok, capsys):
    words, tags = tagged()
    tags = [[tag[2:] or 'O' for tag in sentence] for sentence in tags]
    learn = tagger(tok, words, tags, verbose=True)
    assert 'Tags are read as IO' in capsys.readouterr().out
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 5e-3)
        f1 = learn.validate()[2]
        ev = learn.evaluate()
        found = learn.tag([['we', 'film', 'actor']])
    assert f1 == pytest.approx(ev.report(level=None).loc['micro avg', 'f1'])
    assert [entity.type for entity in found[0].entities] == [tag for tag in found[0].tags if tag != 'O']


def test_the_spelling_is_said(tok, capsys):
    words, tags = tagged()
    tags = [[tag.lower().replace('-', '_') for tag in sentence] for sentence in tags]
    learn = tagger(tok, words, tags, verbose=True)
    assert "Tags are read as IOB2 ('b_loc')" in capsys.readouterr().out
    assert learn.dls.vocab[0] == 'o' and learn.tag([['', 'we']])[0].tags[0] == 'o'
    tagger(tok, *tagged(), verbose=True)
    assert 'Tags are read' not in capsys.readouterr().out


def test_mixed_precision(tok):
    words, tags = tagged()
    learn = tagger(tok, words, tags).to_bf16()
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 5e-3)
        f1 = learn.validate()[2]
        assert f1 == pytest.approx(learn.evaluate().report(level=None).loc['micro avg', 'f1'])
    assert torch.is_tensor(learn.model(learn.dls.one_batch()[0]))
