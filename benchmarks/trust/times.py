"""A megabyte of each kind of character through every function for texts: seconds of a processor core."""

import json
import os
import random
import tempfile
import time
import warnings
from pathlib import Path

from fuzz import in_fork

LENGTH, LIMIT = 1_000_000, 5

# kind of character -> what is repeated up to a megabyte of UTF-8
CHARACTERS = {
    'digits': '1',
    'digits and dots': '1.',
    'letters': 'a',
    'capitals': 'A',
    'letters and dots': 'a.',
    'words': 'word ',
    'accented letters': 'é',
    'spaces': ' ',
    'tabs': '\t',
    'newlines': '\n',
    'one combining mark': '\u0301',
    'two combining marks': '\u0301\u0323',
    'letters with marks': 'e\u0301\u0323',
    'Chinese': '中',
    'Chinese with commas': '中,',
    'Japanese': 'かナ',
    'Korean': '한',
    'Korean parts': '\u1112\u1161\u11ab',
    'Thai': 'กำ',
    'Arabic': 'ا',
    'Hebrew with points': 'שָׁ',
    'emoji': '😀',
    'emoji with joiners': '👩\u200d👩\u200d👧',
    'flags': '🇹🇼',
    'joiners': '\u200d',
    'zero-width spaces': '\u200b',
    'direction marks': '\u202e\u202c',
    'control characters': '\x01',
    'full stops': '.',
    'commas': ',',
    'hyphens': '-',
    'underscores': '_',
    'quotes': '"',
    'apostrophes': "a'",
    'brackets': '(',
    'square brackets': '[',
    'angle brackets': '<',
    'tags': '<a ',
    'colons': ':',
    'colons and letters': ':a',
    'backticks': '`',
    'backtick and spaces': '` ',
    'asterisks': '*',
    'dollars': '$=',
    'slashes': '/',
    'URLs': 'http://',
    'special tokens': 'xxrep ',
    'formulas of spreadsheets': '=1+',
    'ligatures': 'ﬁ',
    'private use': '\ue000',
    'mixed': '',
}


def text_of(kind, length=LENGTH):
    "Return a text of a kind of character, of about `length` bytes"
    part = CHARACTERS[kind]
    if not part:
        rng = random.Random(0)
        parts = [p for p in CHARACTERS.values() if p]
        return ''.join(rng.choice(parts) * rng.choice([1, 1, 3, 50]) for _ in range(length // 30))
    return part * (length // len(part.encode()))


def functions(folder):
    "Return the functions for texts, by name; each takes one text"
    import numpy as np
    import pandas as pd
    from fastai_tl import all as f
    from fastai_tl.data.display import TextTable, show_rows
    from fastai_tl.data.tagging import cut_words
    from fastai_tl.files import safe_cell, write_csv
    from fastai_tl.terminal import printable

    rng = np.random.default_rng(0)
    words = 'a small tokenizer reads the words of some texts'.split()
    texts = [' '.join(rng.choice(words, 9)) for _ in range(50)]
    tok = f.train_tokenizer(texts, 400)
    zh = f.train_chinese_tokenizer(['這部電影很好看'] * 3, 300)
    word_tok = f.WordLevelTokenizer()
    chinese = {cut: f.ChineseTokenizer(cut) for cut in f.CUTS}
    cleaned = lambda text: f.normalize_chinese(text) or '-'
    windows = f.HFTokenizeQA(tok, 64, 8)
    hf_words = f.HFTokenizeWords(tok, verbose=False)
    file = Path(folder) / 't.csv'
    several = lambda text: [text, 'a short text of some words', 'another short text']

    def read_back(text):
        write_csv(pd.DataFrame(dict(text=[text], label=['a'])), file)
        return f.read_table(file)

    def augmented(way):
        return lambda text: way(text, np.random.default_rng(0))

    return {
        'strip_invisible': f.strip_invisible,
        'narrow_letters': f.narrow_letters,
        'unify_variants': f.unify_variants,
        'squeeze_spaces': f.squeeze_spaces,
        'normalize_chinese': f.normalize_chinese,
        'widen_punctuation': f.widen_punctuation,
        'ToTraditional': f.ToTraditional(),
        'has_cjk': f.has_cjk,
        'check_texts': lambda text: f.check_texts([text + 'a']),
        'check_labels': lambda text: f.check_labels([text + 'a', 'b', '[' + text]),
        'check_labels, separator': lambda text: f.check_labels([text + 'a', 'b'], label_delim=','),
        'read_table': read_back,
        'safe_cell': safe_cell,
        'printable': printable,
        'TextTable, HTML': lambda text: TextTable(dict(text=[text]))._repr_html_(),
        'show_rows': lambda text: show_rows(dict(text=[text]), 1),
        **{f'ChineseTokenizer, {cut}': lambda text, t=t: t.tokenize([cleaned(text)]) for cut, t in chinese.items()},
        'ChineseTokenizer.decode': lambda text: chinese['chars'].decode(chinese['chars'].tokenize([cleaned(text)])[0]),
        'chinese_report': f.chinese_report,
        'train_subwords': lambda text: f.train_subwords([text, '中文字'], 300),
        'train_chinese_tokenizer': lambda text: f.train_chinese_tokenizer([text, '中文字'], 300),
        'BERT tokenizer': lambda text: zh(text),
        'WordLevelTokenizer': lambda text: list(word_tok([text])),
        'tokenize_texts_once': lambda text: f.tokenize_texts_once([text + 'a'], progress=False),
        'join_words': lambda text: f.join_words(text.split(' ')),
        'undo_rules': lambda text: f.undo_rules(text.split(' ')),
        'train_tokenizer': lambda text: f.train_tokenizer([text], 300),
        'HFTokenize': lambda text: f.HFTokenize(tok, 64, verbose=False)(text + 'a'),
        'HFTokenizeWords': lambda text: hf_words([word for word, *_ in cut_words(text + 'a', ' ')]),
        'text_windows': lambda text: f.text_windows([text], tok, 64, 8),
        'HFTokenizeQA': lambda text: list(windows.windows([f.QAExample('a b', text + 'a', ('a',), (len(text),))])),
        'CausalBlocks': lambda text: f.HFCausalLMDataLoaders.from_texts([text + 'a'] * 2, tok, max_length=64),
        'near_duplicates': lambda text: f.near_duplicates([text + 'a', text + 'b', 'c d e f']),
        'shingles': f.shingles,
        'drop_near_duplicates': lambda text: f.drop_near_duplicates([text, text + ' b', 'c d e f']),
        'text_words': f.text_words,
        'overused_words': lambda text: f.overused_words(several(text + ' a'), [True, False, False], min_texts=1),
        'normalize_answer': f.normalize_answer,
        'answer_scores': lambda text: f.answer_scores(text, [text + 'a']),
        'clean_markup': f.clean_markup,
        'mask_names': f.mask_names,
        'is_prose': f.is_prose,
        'DropWords': augmented(f.DropWords(0.1)),
        'SwapWords': augmented(f.SwapWords(0.1)),
        'MaskSpans, 0.15': augmented(f.MaskSpans(p=0.15)),
        'MaskSpans, 0.999': augmented(f.MaskSpans(p=0.999)),
        'split_tag': lambda text: f.split_tag('B-' + text[:1000]),
        'StopStrings': lambda text: f.StopStrings(None, ['ab']).found(text),
        'plot_heatmap': lambda text: f.plot_heatmap([[1.0]], [text], ['a']),
        'bag_of_words_accuracy': lambda text: f.bag_of_words_accuracy(
            pd.DataFrame(dict(text=several(text) * 4, label=list('aba') * 4, split=['train'] * 9 + ['test'] * 3))
        ),
        'Evaluation.error_words': lambda text: f.Evaluation.from_preds(
            [[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]], [1, 1, 0], ['a', 'b'], texts=several(text + ' a')
        ).error_words(min_texts=1),
        'Evaluation.to_html': lambda text: f.Evaluation.from_preds(
            [[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]], [1, 1, 0], ['a', 'b'], texts=several(text + ' a')
        ).to_html(figures={}),
        'Attribution, HTML': lambda text: f.Attribution(
            text, text.split(' '), [''] * len(text.split(' ')), np.zeros(len(text.split(' '))), 'a', 1.0, 'x', 'y'
        )._repr_html_(),
    }


def seconds_of(function, kind, length=LENGTH):
    "Return the seconds that a function takes for a text, and the error that it raises"
    text = text_of(kind, length)
    start = time.process_time()
    try:
        function(text)
        error = ''
    except Exception as e:
        error = f'{type(e).__name__}: {e}'[:120]
    return [round(time.process_time() - start, 3), error]


def trial(args):
    "Time each function with each kind of character, each in a process of its own"
    import re

    import torch
    from fastai_tl.core import FastaiTLError  # noqa: F401, loads what the forks share

    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'
    end = time.time() + 60 * args.minutes
    rows = []
    with tempfile.TemporaryDirectory() as d:
        chosen = {name: f for name, f in functions(d).items() if re.search(args.only, name)}
        null = open(os.devnull, 'w')
        for name, function in chosen.items():
            for kind in [*CHARACTERS][:: args.every]:
                if time.time() > end:
                    break
                found = in_fork(lambda function=function, kind=kind: _quiet(null, seconds_of, function, kind), 60)
                if found[0] in ('hang', 'died'):
                    found = [60.0, found[1]]
                rows.append([name, kind, *found])
                if found[0] > LIMIT or args.verbose:
                    print(*rows[-1], sep=' | ', flush=True)
            print(name, max((r[2] for r in rows if r[0] == name), default=0), flush=True)
    slow = [r for r in rows if r[2] > LIMIT]
    foreign = [r for r in rows if r[3] and not re.match('FastaiTLError|DataError|VocabError|RunError', r[3])]
    worst = {name: max((r[2:3] + r[1:2] for r in rows if r[0] == name), default=None) for name in chosen}
    summary = dict(
        functions=len(chosen),
        kinds_of_character=len({kind for _, kind, *_ in rows}),
        pairs=len(rows),
        longer_than_5_seconds=len(slow),
        errors_of_other_libraries=len(foreign),
        longest=max((r[2] for r in rows), default=0),
    )
    for r in foreign:
        print('foreign:', *r, sep=' | ')
    return dict(summary=summary, slow=slow, foreign=foreign, worst=worst)


def _quiet(null, f, *args):
    os.dup2(null.fileno(), 1)
    os.dup2(null.fileno(), 2)
    return f(*args)


if __name__ == '__main__':
    print(json.dumps(list(CHARACTERS)))
