"""What fastai people do with a Learner works with the Learners of this package."""

import pandas as pd
import pytest
import torch
from fastai.callback.all import EarlyStoppingCallback, GradientAccumulation, SaveModelCallback
from fastai.callback.schedule import *
from fastai.interpret import ClassificationInterpretation
from fastai.learner import load_learner

from fastai_tl.all import *
from small_learners import classifier


@pytest.fixture
def learn(tmp_path):
    df = pd.DataFrame(
        [
            dict(text=f'row {i} of the table is {w}' + ' indeed' * (i % 4), label=w)
            for i in range(30)
            for w in ('good', 'bad')
        ]
    )
    ulm = ULMFiT(tmp_path / 'run', config=dict(emb_sz=16, n_hid=24, n_layers=2), progress=False, min_freq=1)
    learn = ulm.classifier(df, encoder=None, epochs=[1, 1, 1, 4], lr=5e-2, bs=8, drop_mult=0.1)
    learn.remove_cb(learn.progress)
    learn.logger = lambda *a: None
    return learn


def test_export_and_load(learn, tmp_path):
    text = 'row 7 of the table is good'
    before = learn.predict(text)
    learn.export(tmp_path / 'x.pkl')
    after = load_learner(tmp_path / 'x.pkl').predict(text)
    assert after[0] == before[0] and torch.allclose(after[2], before[2])
    learn.fit_one_cycle(1, 1e-3)  # and goes on training after the export


def test_save_and_load_with_optimizer(learn):
    learn.fit(1, 1e-3)
    p = next(learn.model.parameters())
    moments = learn.opt.opt.state[p]['exp_avg'].clone()
    learn.save('there')
    learn.fit(1, 1e-2)
    learn.load('there', with_opt=True)
    assert torch.equal(learn.opt.opt.state[p]['exp_avg'], moments)


def test_lr_find_leaves_the_model_alone(learn):
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    rate = learn.lr_find(show_plot=False, num_it=20).valley
    assert 1e-7 < rate < 10 and all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())


def test_predictions_are_in_the_order_of_the_rows(learn):
    p, y, loss = learn.get_preds(with_loss=True)
    rows = [
        (int(t), learn.predict(' '.join(x[0]))[2])
        for x, t in zip(learn.dls.valid_ds.items, [o[1] for o in learn.dls.valid_ds])
    ]
    assert [t for t, _ in rows] == y.tolist()
    assert torch.allclose(loss, -p[range(len(y)), y].log(), atol=1e-4)


def test_interpretation_agrees_with_evaluate(learn):
    interp = ClassificationInterpretation.from_learner(learn)
    assert (interp.confusion_matrix() == learn.evaluate().confusion().to_numpy()).all()


def test_other_callbacks_inside_a_gradual_fit(learn):
    learn.unfreeze()
    learn.fit_gradual(
        [1, 1, 1, 3], lr=1e-2, cbs=[SaveModelCallback(), GradientAccumulation(16), EarlyStoppingCallback(patience=5)]
    )
    assert len(learn.recorder.values) == 6


def test_freeze_and_unfreeze(learn):
    learn.freeze()
    assert learn.layer_table().trainable.tolist()[:-1] == [0, 0, 0]
    learn.freeze_to(-2)
    assert (learn.layer_table().trainable > 0).tolist() == [False, False, True, True]
    learn.unfreeze()
    assert (learn.layer_table().trainable == learn.layer_table().params).all()


def test_fastais_own_learner(learn):
    "`fit_gradual` and `layer_table` work on a Learner that fastai made, with its splitter and optimizer"
    from fastai.text.all import AWD_LSTM, text_classifier_learner

    theirs = text_classifier_learner(
        learn.dls, AWD_LSTM, pretrained=False, config=dict(emb_sz=16, n_hid=24, n_layers=3)
    )
    with theirs.no_bar(), theirs.no_logging():
        gu = theirs.fit_gradual([1, 1, 1, 4], lr=5e-2)
    assert theirs.layer_table().layers.tolist() == ['embeddings', 'rnns.0', 'rnns.1', 'rnns.2', 'head']
    assert gu.table().groups.tolist() == [1, 2, 3, 5] and gu.table().layers.iloc[1] == 'rnns.2 – head'
    assert gu.table().train_loss.iloc[-1] < gu.table().train_loss.iloc[0]


def test_a_learner_with_one_group_gets_layer_groups():
    from fastai.test_utils import synth_learner

    learn = synth_learner()
    learn.model = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
    with learn.no_bar(), learn.no_logging():
        gu = learn.fit_gradual(lr=1e-2)
    assert gu.table().groups.tolist() == [1, 2]


@pytest.mark.parametrize('make', [
    lambda: ResumableFit('checkpoint.pth'), BestEpoch, EMA, SWA, L2SP, EvaluationCallback, GradualUnfreezing])
def test_validate_is_no_fit(make, small_tokenizers, tmp_path, monkeypatch):
    "Validating a Learner that keeps a Callback of a fit changes neither weights nor files nor the record"
    monkeypatch.chdir(tmp_path)
    learn = classifier(small_tokenizers, path='.', cbs=make())
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 1e-3)
        with torch.no_grad():
            for p in learn.model.parameters():
                p.add_(.01)
        weights = {name: p.clone() for name, p in learn.model.state_dict().items()}
        needs = [p.requires_grad for p in learn.model.parameters()]
        files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob('*')}
        values = list(map(list, learn.recorder.values))
        first, second = learn.validate(), learn.validate()
    assert first == second and list(map(list, learn.recorder.values)) == values
    assert all(torch.equal(p, weights[name]) for name, p in learn.model.state_dict().items())
    assert [p.requires_grad for p in learn.model.parameters()] == needs
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob('*')} == files
