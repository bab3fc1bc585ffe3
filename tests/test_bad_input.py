"""Bad input: a clear error or a documented behaviour, nothing dropped silently, nothing half-written."""

import pandas as pd
import pytest
import torch
from fastai.callback.all import Callback

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
