"""What is measured: each task is a function of its sizes that prepares everything and returns the step to measure."""

from functools import cache

import numpy as np


@cache
def words():
    "The words of the package's offline English texts"
    from fastai_tl.all import general_corpus

    return np.array(' '.join(general_corpus().text).split(), dtype=object)


def texts_of(n, length, seed=0):
    "Return `n` different texts of `length` words, drawn from those of the corpus; each begins with its number"
    rng, source = np.random.default_rng(seed), words()
    drawn = (source[rng.integers(len(source), size=length - 1)].tolist() for _ in range(n))
    return [f'{i} {" ".join(of_text)}' for i, of_text in enumerate(drawn)]


@cache
def tokenizer():
    from fastai_tl.all import train_tokenizer

    return train_tokenizer(texts_of(3000, 20), 2000, lowercase=True, max_length=512)


def labels_of(n, classes, n_train=None):
    "Return `n` labels; each class has about as many rows, and none is in validation alone"
    n_train = n_train or n
    return [f'class {(i if i < n_train else i % n_train) % classes}' for i in range(n)]


def bert(texts, length, classes, vocab=2000, layers=1, width=32, n_valid=None):
    "Return a Learner with a BERT of random weights, and texts of which the first are for training"
    from fastai_tl.all import HFTextDataLoaders, hf_classifier_learner
    from transformers import BertConfig

    tok = tokenizer()
    names = [f'class {i}' for i in range(classes)]
    n_valid = n_valid or max(2, texts // 10)
    rows, n = texts_of(texts + n_valid, length), texts + n_valid
    valid = [i >= texts for i in range(n)]
    dls = HFTextDataLoaders.from_lists(rows, labels_of(n, classes, texts), tok, valid=valid, max_length=length,
                                       vocab=names, bs=32, verbose=False)
    config = BertConfig(vocab_size=max(vocab, len(tok)), hidden_size=width, num_hidden_layers=layers,
                        num_attention_heads=2, intermediate_size=4 * width, max_position_embeddings=max(64, length))
    learn = hf_classifier_learner(dls, config)
    learn.remove_cb(learn.progress)
    learn.logger = lambda *o: None
    return learn


# --- texts ---


def hf_tokens(texts=1000, length=12):
    from fastai_tl.all import HFTokenize

    rows, tok = texts_of(texts, length), tokenizer()
    return lambda: HFTokenize(tok, max_length=512).remember(rows)


def dataloaders(texts=1000, length=12, classes=2):
    import pandas as pd
    from fastai_tl.all import HFTextDataLoaders

    df = pd.DataFrame(dict(text=texts_of(texts, length), label=labels_of(texts, classes)))
    tok = tokenizer()
    return lambda: HFTextDataLoaders.from_df(df, tok, max_length=512, verbose=False)


def fastai_tokens(texts=1000, length=12):
    from fastai_tl.all import tokenize_texts_once

    rows = texts_of(texts, length)
    return lambda: tokenize_texts_once(rows, progress=False, n_workers=1)


def near(texts=1000, length=12, copies=1):
    "Near-duplicates: each text comes `copies` times, each time with another last word"
    from fastai_tl.all import near_duplicates

    rows = [f'{text} {i}' for text in texts_of(max(1, texts // copies), length - 1) for i in range(copies)]
    return lambda: near_duplicates(rows)


def drop_near(texts=1000, length=12, copies=1):
    from fastai_tl.all import drop_near_duplicates

    rows = [f'{text} {"abcdefghij"[i % 10]}' for text in texts_of(max(1, texts // copies), length - 1)
            for i in range(copies)]
    return lambda: drop_near_duplicates(rows)


def batches(texts=1000):
    "Batches of at most 2,048 tokens, as the cache of frozen layers makes them"
    from fastai_tl.all import packs

    lens = np.random.default_rng(0).integers(8, 200, texts).tolist()
    return lambda: packs(lens, 2048)


# --- models ---


def train_bert(texts=320, length=32, classes=2, vocab=2000, layers=1):
    learn = bert(texts, length, classes, vocab, layers)
    return lambda: learn.fit(1, 1e-3)


def train_awd(texts=320, length=32, classes=2, vocab=2000, layers=2):
    "One epoch of an AWD_LSTM; the words of the texts are drawn from the whole vocabulary"
    from fastai_tl.all import TokenizedTexts, awd_classifier_learner, classifier_dls
    from fastai.text.core import defaults

    n = texts + max(2, texts // 10)
    special = list(defaults.text_spec_tok)
    vocab_words = [*special, *(f'w{i}' for i in range(vocab - len(special)))]
    ids = np.random.default_rng(0).integers(len(special), vocab, n * length).astype(np.int32)
    tokens = TokenizedTexts(vocab_words, ids, np.full(n, length))
    names = [f'class {i}' for i in range(classes)]
    dls = classifier_dls(tokens, labels_of(n, classes, texts), 'classification', list(range(texts)),
                         list(range(texts, n)), vocab_words, bs=32, classes=names)
    learn = awd_classifier_learner(dls, 'classification', classes, dict(emb_sz=32, n_hid=64, n_layers=layers))
    learn.remove_cb(learn.progress)
    learn.logger = lambda *o: None
    return lambda: learn.fit(1, 1e-3)


def evaluate(texts=1000, length=12, classes=2):
    "One pass over the texts with the report and the calibration, as most people call it"
    learn = bert(64, length, classes, width=16, n_valid=texts)

    def step():
        with learn.no_bar():
            ev = learn.evaluate()
        ev.report()
        ev.calibration()

    return step


def predict(texts=1000, length=12, classes=2):
    predictor = bert(64, length, classes, width=16).predictor()
    rows = texts_of(texts, length, seed=1)
    return lambda: predictor.predict(rows)


# --- scores alone ---


def rows_with_scores(texts, classes):
    "Return an evaluation of random probabilities, which are right for about half of the rows"
    from fastai_tl.all import Evaluation

    rng = np.random.default_rng(0)
    targets = rng.integers(0, classes, texts)
    logits = rng.standard_normal((texts, classes), dtype=np.float32)
    logits[np.arange(texts), targets] += np.log(classes) + 1
    names = [f'class {i}' for i in range(classes)]
    return Evaluation.from_preds(logits, targets, names, logits=True)


def report(texts=10_000, classes=10):
    "The report with its intervals: 1,000 bootstrap resamples of the kinds of rows"
    ev = rows_with_scores(texts, classes)
    return lambda: ev.report()


def report_ranking(texts=1000, classes=4):
    "The same with intervals of log loss, ROC-AUC and average precision: 200 resamples of the rows"
    ev = rows_with_scores(texts, classes)
    return lambda: ev.report(ranking=True)


def calibration(texts=10_000, classes=10):
    "Calibration errors, the temperature and its cross-validated estimate"
    from fastai_tl.all import Calibrated

    ev = rows_with_scores(texts, classes)
    return lambda: (ev.calibration(), ev.reliability(), Calibrated(ev))


def errors(texts=10_000, classes=10):
    "Confusion matrix, most confused pairs, worst rows, thresholds, risk and coverage"
    ev = rows_with_scores(texts, classes)
    return lambda: (ev.confusion(), ev.most_confused(), ev.top_losses(), ev.thresholds(), ev.risk_coverage())


# --- the plan: group → (title, function, sizes by axis) ---

K = 1000
DECADES = (100, 316, K, 3162, 10 * K, 31_623, 100 * K, 316_228, K * K)
PLAN = dict(
    hf_tokens=('Tokenizing (Hugging Face)', hf_tokens, dict(texts=DECADES, length=(10, 32, 100, 316, K, 3162, 10 * K))),
    dataloaders=('DataLoaders from a table', dataloaders, dict(texts=DECADES, classes=(2, 10, 100, K, 10 * K))),
    fastai_tokens=('Tokenizing (fastai)', fastai_tokens,
                   dict(texts=DECADES, length=(10, 32, 100, 316, K, 3162, 10 * K))),
    near=('near_duplicates', near, dict(texts=DECADES, length=(10, 32, 100, 316, K, 3162), copies=(1, 10, 100, K))),
    drop_near=('drop_near_duplicates', drop_near, dict(texts=DECADES, length=(10, 32, 100, 316, K, 3162))),
    batches=('Batches by length', batches, dict(texts=DECADES)),
    train_bert=('Training (BERT)', train_bert, dict(
        texts=DECADES, length=(16, 32, 64, 128, 256, 512, 1024), classes=(2, 10, 100, K, 10 * K),
        vocab=(2 * K, 5 * K, 10 * K, 30 * K, 100 * K), layers=(1, 2, 4, 8, 16, 24))),
    train_awd=('Training (AWD_LSTM)', train_awd, dict(
        texts=DECADES, length=(16, 32, 64, 128, 256, 512, 1024), classes=(2, 10, 100, K, 10 * K),
        vocab=(2 * K, 5 * K, 10 * K, 30 * K, 100 * K), layers=(1, 2, 4, 8, 16, 24))),
    evaluate=('Evaluation', evaluate, dict(texts=DECADES, length=(8, 16, 32, 64, 128, 256, 512),
                                           classes=(2, 10, 100, K))),
    report=('Report', report, dict(texts=DECADES, classes=(2, 10, 32, 100, 316, K, 3162))),
    report_ranking=('Report with ranking', report_ranking, dict(texts=DECADES, classes=(2, 4, 10, 32, 100))),
    calibration=('Calibration', calibration, dict(texts=DECADES, classes=(2, 10, 32, 100, 316, K))),
    errors=('Errors and thresholds', errors, dict(texts=DECADES, classes=(2, 10, 32, 100, 316, K, 3162))),
    predict=('Prediction', predict, dict(texts=DECADES, length=(8, 16, 32, 64, 128, 256, 512),
                                         classes=(2, 10, 100, K, 10 * K))),
)
BASE = dict(train_bert=dict(classes=dict(texts=320), length=dict(texts=64)), train_awd=dict(length=dict(texts=64)),
            predict=dict(length=dict(texts=300)), evaluate=dict(length=dict(texts=300)),
            hf_tokens=dict(length=dict(texts=200)), fastai_tokens=dict(length=dict(texts=50)),
            near=dict(length=dict(texts=300), copies=dict(texts=3000)), drop_near=dict(length=dict(texts=300)),
            dataloaders=dict(classes=dict(texts=10_000)))
