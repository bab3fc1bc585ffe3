"""Bad input: a clear error or a documented behaviour, nothing dropped silently, nothing half-written."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.all import Callback
from small_learners import LABELS, TEXTS, causal_lm, classifier

from fastai_tl.all import *
from fastai_tl.cli import main

SIZE = dict(config=dict(emb_sz=12, n_hid=16, n_layers=1), progress=False, min_freq=1)
FIT = dict(epochs=[1, 1, 1], bs=8)


@pytest.fixture
def df():
    rows = [(f'row {i} of the table is {word}', word) for i in range(12) for word in ('good', 'bad')]
    return pd.DataFrame(rows, columns=['text', 'label'])


@pytest.fixture
def ulm(tmp_path): return ULMFiT(tmp_path/'run', **SIZE)


def left_clean(path):
    "Whether there is no half-written file, and no stage that claims to be done"
    assert not list(path.rglob('*.part'))
    return not any(read_json(file)['done'] for file in path.rglob('stage.json'))


# --- texts ---

@pytest.mark.parametrize('bad, what', [('', 'blank'), (' \n\t', 'blank'), (None, 'missing'), (float('nan'), 'missing'),
                                       (pd.NA, 'missing'), (3, 'a int')])
def test_bad_texts(df, ulm, bad, what):
    df = df.astype(object)
    df.loc[7, 'text'] = bad
    calls = (lambda: ulm.pretrain(df), lambda: ulm.finetune_lm(df), lambda: ulm.classifier(df, encoder=None),
             lambda: ulm.finetune_lm(iter(df.text)))
    for call in calls:
        with pytest.raises(DataError, match=f'{what}.* row 7'):
            call()
    assert left_clean(ulm.path)


def test_very_long_text(df, ulm):
    "A text of 200,000 words trains and predicts; the classifier pools its last 1,440 tokens, as fastai's does"
    df.loc[0, 'text'] = ' '.join(f'word{i%50}' for i in range(200_000))
    assert ulm.tokenize(list(df.text)).lens[0] >= 200_000
    learn = ulm.classifier(df.iloc[:8], encoder=None, epochs=[1, 1, 1], bs=4, valid_pct=.25)
    label, _, probabilities = learn.predict('a bad row ' * 3000)
    assert label in ('good', 'bad') and torch.isfinite(probabilities).all()


def test_too_little_text(ulm):
    with pytest.raises(DataError, match='needs some tokens'):
        ulm.pretrain(['hi'])


# --- labels and splits ---

@pytest.mark.parametrize('bad', [None, float('nan'), pd.NA])
def test_missing_labels(df, ulm, bad):
    df = df.astype(object)
    df.loc[5, 'label'] = bad
    with pytest.raises(DataError, match='Each text needs a label. Got none in row 5'):
        ulm.classifier(df, encoder=None)
    assert left_clean(ulm.path)


def test_label_seen_once(df, ulm):
    df.loc[len(df)] = dict(text='a row by itself', label='rare')
    with pytest.warns(UserWarning, match='single text go to training.*rare'):
        learn = ulm.classifier(df, encoder=None, **FIT)
    classes = learn.dls.vocab[1]
    assert list(classes) == ['bad', 'good', 'rare']
    assert 'rare' not in {classes[int(y)] for _, y in learn.dls.valid_ds}


def test_label_in_validation_alone(df, ulm):
    df['valid'] = [i < 4 for i in range(len(df))]
    df.loc[0, 'label'] = 'new'
    with pytest.raises(DataError, match='new in validation alone'):
        ulm.classifier(df, valid_col='valid', encoder=None)
    assert left_clean(ulm.path)


def test_one_class(df, ulm):
    with pytest.raises(DataError, match='At least two classes.*only good'):
        ulm.classifier(df[df.label == 'good'], encoder=None)


def test_no_rows_to_validate(df, ulm):
    df['split'] = 'train'
    with pytest.raises(DataError, match='needed for validation'):
        ulm.classifier(df, valid_col='split', encoder=None)


# --- tables and folders ---

def test_missing_column(df, ulm, tmp_path, capsys):
    with pytest.raises(DataError, match="column 'review'. Got columns text, label"):
        ulm.classifier(df, text_col='review', encoder=None)
    with pytest.raises(DataError, match="Did you mean 'label'"):
        ulm.classifier(df, label_col='labels', encoder=None)
    df.to_csv(tmp_path/'t.csv', index=False)
    assert main(['quickstart', '--data', str(tmp_path/'t.csv'), '--text', 'review', '--out', str(tmp_path/'q')]) == 1
    assert 'Traceback' not in capsys.readouterr().err and not (tmp_path/'q').exists()


def test_folder_without_files(ulm, tmp_path):
    (tmp_path/'empty').mkdir()
    for call in (ulm.pretrain, ulm.finetune_lm, ulm.classifier):
        with pytest.raises(DataError, match='must hold .txt files'):
            call(tmp_path/'empty')


def test_not_a_table(ulm, tmp_path):
    (tmp_path/'t.xlsx').write_text('x')
    (tmp_path/'t.parquet').write_text('not parquet')
    with pytest.raises(DataError, match='must end in'):
        ulm.pretrain(tmp_path/'t.xlsx')
    with pytest.raises(DataError, match='readable parquet'):
        ulm.pretrain(tmp_path/'t.parquet')


# --- encoders and weights ---

def test_unreadable_encoder(ulm, tmp_path, df):
    weights = tmp_path/'e.safetensors'
    for content in (b'', b'garbage'*100):
        weights.write_bytes(content)
        with pytest.raises(FastaiTLError, match='damaged or foreign'):
            ulm.pretrain(weights=weights)
    with pytest.raises(FastaiTLError, match='nothing there'):
        ulm.pretrain(weights=tmp_path/'none.safetensors')
    ulm.finetune_lm(df, epochs=1, bs=4)
    encoder = ulm.path/'forward'/'domain'/'encoder.safetensors'
    encoder.write_bytes(encoder.read_bytes()[:-100])
    with pytest.raises(FastaiTLError, match='damaged or foreign'):
        ulm.classifier(df, **FIT)


def test_vocabulary_without_overlap(ulm, df, tmp_path):
    ulm.pretrain(['日 本 語 の 文 章 で す']*20, epochs=1, bs=2)
    english = pd.Series([f'only english words {i%3}' for i in range(30)])
    with pytest.raises(VocabError, match='must share some tokens'):
        ulm.finetune_lm(english, epochs=1, bs=2)


def test_published_weights_without_network(ulm, monkeypatch):
    import fastai.data.external as external
    def fails(*args, **kwargs): raise OSError('Network is unreachable')
    monkeypatch.setattr(external, 'untar_data', fails)
    message = 'must be downloaded once.*Network is unreachable.*pretrain on your own texts'
    with pytest.raises(FastaiTLError, match=message):
        ulm.pretrain(weights='wikitext103')
    with pytest.raises(FastaiTLError, match='leave `data` out to work offline'):
        imdb_data()


# --- training ---

class Poison(Callback):
    "Weights that become NaN at the start of an epoch"
    def __init__(self, epoch): self.at = epoch

    def before_train(self):
        if self.epoch == self.at:
            next(self.model.parameters()).data.fill_(float('nan'))


def test_nan_loss(ulm, df):
    "Training stops and names the batch; the checkpoint of the epoch before is complete, and the run continues from it"
    with pytest.raises(TrainingError, match='nan at epoch 2, batch 0'):
        ulm.finetune_lm(df, epochs=4, bs=4, cbs=Poison(2))
    status = ulm.status()
    assert status.done.tolist() == [False] and status.epochs.tolist() == [2] and left_clean(ulm.path)
    assert len(ulm.finetune_lm(df, epochs=4, bs=4).recorder.values) == 4


def test_diverging_rate(ulm, df):
    with pytest.raises(TrainingError, match='Lower the learning rate'):
        ulm.finetune_lm(df, epochs=8, lr=1e30, bs=4)


def test_other_settings_in_the_same_folder(ulm, df):
    ulm.finetune_lm(df, epochs=1, bs=4)
    with pytest.raises(RunError, match='epochs: 1 → 2'):
        ulm.finetune_lm(df, epochs=2, bs=4)
    with pytest.raises(RunError, match='data: '):
        ulm.finetune_lm(df.iloc[:20], epochs=1, bs=4)


def test_two_directions_need_texts(df, tmp_path, ulm):
    dls = ulm.finetune_lm(df, epochs=1, bs=4).dls
    with pytest.raises(DataError, match='Two directions need texts'):
        ULMFiT(tmp_path/'b', bidirectional=True, **SIZE).pretrain(dls, epochs=1)
    learn = ULMFiT(tmp_path/'own', **SIZE).pretrain(dls, epochs=1)
    assert learn.recorder.values, 'DataLoaders of the user are used in one direction'


# --- arguments ---

NAN, TINY = float('nan'), 1e-320


@pytest.fixture(scope='module')
def made(small_tokenizers):
    "A tokenizer, DataLoaders, a Learner and an evaluation, as a namespace"
    toks = small_tokenizers
    learn = classifier(toks)
    lm = causal_lm(toks)
    return SimpleNamespace(toks=toks, tok=toks['encoder'], dls=learn.dls, learn=learn, lm=lm, ev=learn.evaluate())


def from_lists(m, **kwargs): return HFTextDataLoaders.from_lists(TEXTS, LABELS, m.tok, verbose=False, **kwargs)
def words_of(m, **kwargs): return HFTagDataLoaders.from_lists([['a', 'b']]*9, [['O', 'X']]*9, m.tok, **kwargs)
def blocks_of(m, **kwargs): return HFCausalLMDataLoaders.from_texts(TEXTS, m.toks['decoder'], **kwargs)
def scored(m, **kwargs): return text_perplexity(m.lm, TEXTS[:2], **kwargs)
def generated(m, **kwargs): return m.lm.generate('the film', max_new_tokens=2, **kwargs)


# an argument, a wrong value, and the calls that must refuse it
WRONG = [
    ('valid_pct', -1, [from_lists, words_of, blocks_of]),
    ('valid_pct', 20, [from_lists, words_of]),
    ('valid_pct', NAN, [from_lists, blocks_of]),
    ('valid_pct', True, [from_lists]),
    ('bs', 0, [from_lists, words_of, blocks_of, scored]),
    ('bs', -1, [scored]),
    ('bs', 2.5, [from_lists, blocks_of]),
    ('bs', '8', [from_lists, scored]),
    ('max_length', 0, [from_lists, words_of, blocks_of]),
    ('seed', 'x', [from_lists, blocks_of, lambda m, seed: split_rows(LABELS, 'classification', seed=seed)]),
    ('factor', NAN, [lambda m, factor: GradualUnfreezing(factor=factor)]),
    ('groups', 3, [lambda m, groups: GradualUnfreezing(groups=groups)]),
    ('decay', 1, [lambda m, decay: EMA(decay)]),
    ('alpha', NAN, [lambda m, alpha: L2SP(alpha)]),
    ('temperature', TINY, [generated, lambda m, temperature: activate([[1., 2.]], 'classification', temperature)]),
    ('top_p', 1.5, [generated]),
    ('num_beams', 0, [generated]),
    ('n', 0, [lambda m, n: near_duplicates(TEXTS, n=n)]),
    ('threshold', 80, [lambda m, threshold: near_duplicates(TEXTS, threshold=threshold)]),
    ('n_folds', 1, [lambda m, n_folds: cross_folds(pd.DataFrame(dict(label=LABELS)), n_folds=n_folds)]),
    ('p', 1.5, [lambda m, p: DropWords(p), lambda m, p: SwapWords(p), lambda m, p: MaskSpans(p=p)]),
    ('p', NAN, [lambda m, p: DropWords(p)]),
    # another type than the annotation
    ('model', 3, [lambda m, model: layer_groups(model), lambda m, model: mark_fixed(model),
                  lambda m, model: Evaluation.from_model(model, [])]),
    ('spec', 'x', [lambda m, spec: HFTextDataLoaders.from_spec(spec, m.tok)]),
    ('dls', [], [lambda m, dls: augment_texts(dls, DropWords()), lambda m, dls: start_epoch_from_seed(dls, 1)]),
    ('learn', None, [lambda m, learn: Evaluation.from_learner(learn), lambda m, learn: Encoder.from_learner(learn)]),
    ('df', 'x', [lambda m, df: show_table(df)]),
    ('lang', 3, [lambda m, lang: TextSpec('classification', classes=('a', 'b'), lang=lang)]),
    ('example', None, [lambda m, example: QAWindow(example, np.zeros((4, 3)))]),
    # Callbacks, metrics, batches, figures, paths
    ('cbs', 'x', [lambda m, cbs: m.learn.validate(cbs=cbs), lambda m, cbs: m.learn.fit_stlr(1, cbs=cbs)]),
    ('metrics', ['a'], [lambda m, metrics: hf_classifier_learner(m.dls, m.learn.model.hf.config, metrics=metrics)]),
    ('loader', {'a': 1}, [lambda m, loader: Evaluation.from_model(torch.nn.Linear(1, 1), loader)]),
    ('dl', 3, [lambda m, dl: m.learn.evaluate(dl=dl)]),
    ('bs', 1j, [lambda m, bs: m.dls.test_dl(TEXTS[:2], bs=bs)]),
    ('figsize', 'ab', [lambda m, figsize: m.ev.plot_confidence(figsize=figsize)]),
    ('fig', 3, [lambda m, fig: save_png(fig, 'a.png')]),
    ('path', 'a\ud83d', [lambda m, path: read_json(path), lambda m, path: load_bundle(path)]),
    ('how', 3, [lambda m, how: AugmentText(how)]),
]
CALLS = [(name, value, call) for name, value, calls in WRONG for call in calls]
# numbers of NumPy, edges of ranges, and values that look unusual
GOOD = [
    lambda m: from_lists(m, valid_pct=np.float32(.25), bs=np.int64(4), max_length=np.int32(16), seed=np.int64(1)),
    lambda m: from_lists(m, valid_pct=.5, seed=0, bs=1),
    lambda m: scored(m, bs=torch.tensor(4)),
    lambda m: GradualUnfreezing(groups=(1, 2), factor=[1, .5]),
    lambda m: EMA(0), lambda m: L2SP(0), lambda m: DropWords(0), lambda m: near_duplicates(TEXTS, threshold=1),
    lambda m: class_values(.3, ['a', 'b']),
    lambda m: generated(m, temperature=np.float32(.7), top_p=1),
]


@pytest.mark.parametrize('name, value, call', CALLS, ids=[f'{name}={value}' for name, value, _ in CALLS])
def test_wrong_arguments(made, name, value, call):
    "An error of the package says which argument is wrong, and what came"
    with pytest.raises(FastaiTLError, match=f'`{name}`.*Got '):
        call(made, **{name: value})


@pytest.mark.parametrize('call', GOOD)
def test_right_arguments(made, call): call(made)
