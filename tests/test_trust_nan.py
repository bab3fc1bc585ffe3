"""NaN and infinity: trainings stop and name the rows, good states are kept, and no prediction is made of them."""


import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelStepException
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.test_utils import synth_learner
from small_learners import MAKERS, TEXTS, WORDS, causal_lm, classifier

from fastai_tl.all import *
from fastai_tl.core import DataError, FastaiTLError, TrainingError
from fastai_tl.files import load_tree
from fastai_tl.models.finite import not_finite

NAN = float('nan')


class Poison(Callback):
    "Make the predictions of some rows, a gradient or the weights NaN in an epoch; `seen` has the rows of the batch"

    def __init__(self, what, epoch=1, batch=1):
        self.what = what
        self.at = (epoch, batch)
        self.seen = None

    def is_now(self):
        return self.training and (self.epoch, self.iter) == self.at

    def after_pred(self):
        if self.is_now() and self.what == 'rows':
            self.learn.pred = self.pred * torch.tensor([1.0, NAN] * 9)[: len(self.pred), None]
        if self.is_now():
            order = getattr(self.dl, '_DataLoader__idxs', None)
            self.seen = order and [int(i) for i in order[self.iter * self.dl.bs :][: len(self.yb[0])]]

    def after_backward(self):
        if self.is_now() and self.what == 'gradient':
            next(p for p in self.model.parameters() if p.grad is not None and p.ndim == 1).grad[0] = NAN

    def after_step(self):
        if self.is_now() and self.what == 'weights':
            max(self.model.parameters(), key=torch.numel).data.fill_(NAN)


def silent(learn, fit):
    with learn.no_bar(), learn.no_logging():
        return fit()


def is_finite(learn):
    return not not_finite(learn.model.state_dict().items())


@pytest.mark.parametrize('what', ['rows', 'gradient', 'weights'])
@pytest.mark.parametrize('name', ['classifier', 'causal_lm', 't5', 'ulmfit_classifier', 'ulmfit_lm'])
def test_a_plain_fit_stops_and_keeps_the_last_epoch(small_tokenizers, name, what):
    learn = MAKERS[name](small_tokenizers)
    if what == 'rows' and name not in ('classifier', 'ulmfit_classifier'):
        pytest.skip('predictions of another shape')
    kept = []

    class Keep(Callback):
        def before_train(self):
            kept.append({k: v.clone() for k, v in self.model.state_dict().items()})

    poison = Poison(what)
    with pytest.raises(TrainingError) as error:
        silent(learn, lambda: learn.fit(3, 1e-3, cbs=[poison, Keep()]))
    message = error.value.message
    assert 'epoch 1' in message and 'the last epoch again' in message
    assert len(kept) == 2 and all(torch.equal(v, kept[1][k]) for k, v in learn.model.state_dict().items())
    if what == 'rows':
        assert f'predictions that are not numbers in row {poison.seen[1]}' in message
    if what == 'gradient' and poison.seen:
        assert f'row {", ".join(map(str, poison.seen))} of the training set' in message
    silent(learn, lambda: learn.fit(1, 1e-3))  # the moments are clean, too
    assert is_finite(learn)


@pytest.mark.parametrize(
    'fit',
    [
        lambda learn, cbs: learn.fit_transfer(3, recipe='full', cbs=cbs),
        lambda learn, cbs: learn.fit_gradual([1, 2, 1], groups=[1, 2, 3], cbs=cbs),
        lambda learn, cbs: learn.fit_stlr(3, 1e-3, cbs=cbs),
        lambda learn, cbs: learn.fit_one_cycle(3, 1e-3, cbs=[cbs, BestEpoch()]),
        lambda learn, cbs: learn.fit(3, 1e-3, cbs=[cbs, GradientAccumulation(8), GradientClip(0.1)]),
    ],
)
def test_every_recipe_stops(small_tokenizers, fit):
    learn = classifier(small_tokenizers)
    with pytest.raises(TrainingError, match='of the training set|at the end of epoch'):
        silent(learn, lambda: fit(learn, Poison('gradient')))
    assert is_finite(learn)


def test_recipes_stop_other_learners_too():
    "A Learner that this package did not make"
    learn = synth_learner()
    with pytest.raises(TrainingError, match='epoch 1'):
        silent(learn, lambda: learn.fit_stlr(3, 1e-3, cbs=Poison('gradient')))


def test_bad_targets_are_named(small_tokenizers):
    learn = classifier(small_tokenizers, [float(i) for i in range(len(TEXTS))], data='value')

    class BadTarget(Callback):
        def before_batch(self):
            if self.training:
                self.learn.yb[0][2] = NAN

    with pytest.raises(TrainingError, match='targets that are not numbers in row .*Correct the targets'):
        silent(learn, lambda: learn.fit(1, 1e-3, cbs=BadTarget()))


def test_the_learning_rate_finder_may_diverge(small_tokenizers):
    learn = classifier(small_tokenizers)
    silent(learn, lambda: learn.lr_find(start_lr=1, end_lr=1e20, num_it=8, show_plot=False, stop_div=False))
    assert is_finite(learn)


class Scaler:
    "What `GradScaler` shows of itself"

    def is_enabled(self):
        return True


@pytest.mark.parametrize('n', [3, 30])
def test_overflows_of_mixed_precision_are_no_failure(small_tokenizers, n):
    "A scaler skips such steps; without an end of them the fit stops"

    class Overflow(Callback):
        def before_fit(self):
            self.learn.scaler, self.n = Scaler(), 0

        def after_backward(self):
            self.n += 1
            if self.n <= n:
                next(p for p in self.model.parameters() if p.grad is not None and p.ndim == 1).grad[0] = NAN

        def before_step(self):
            if self.n <= n:
                raise CancelStepException

        def after_fit(self):
            self.learn.scaler = None

    learn = classifier(small_tokenizers)
    run = lambda: silent(learn, lambda: learn.fit(8, 1e-3, cbs=Overflow()))
    if n == 3:
        run()
    else:
        with pytest.raises(TrainingError, match='gradients'):
            run()
    assert is_finite(learn)


@pytest.mark.parametrize('what', ['gradient', 'weights'])
@pytest.mark.parametrize('make', ['ours', 'other'])
def test_a_finite_checkpoint_is_never_overwritten(small_tokenizers, tmp_path, make, what):
    learn = classifier(small_tokenizers) if make == 'ours' else synth_learner()
    file = tmp_path / 'checkpoint.safetensors'
    with pytest.raises(TrainingError):
        silent(learn, lambda: learn.fit(4, 1e-3, cbs=[ResumableFit(file), Poison(what, epoch=2)]))
    saved = load_tree(file)
    assert saved['epoch'] == 2 and not not_finite(saved['model'].items())
    again = classifier(small_tokenizers) if make == 'ours' else synth_learner()
    silent(again, lambda: again.fit(4, 1e-3, cbs=ResumableFit(file)))
    assert is_finite(again)


def test_the_best_epoch_is_finite(small_tokenizers):
    learn = synth_learner()
    best = BestEpoch()

    class Good(Callback):
        "A loss that looks good, with weights that are not"

        order = 55

        def after_epoch(self):
            self.recorder.log[2] = -float(self.epoch)

    silent(learn, lambda: learn.fit(3, 1e-3, cbs=[best, Good(), Poison('weights', epoch=1)]))
    assert best.best_at == 0 and is_finite(learn)


def test_ulmfit_keeps_its_good_stage(tmp_path):
    rng = np.random.default_rng(0)
    texts = [' '.join(rng.choice(WORDS, 12)) for _ in range(60)]
    options = dict(config=dict(emb_sz=16, n_hid=24, n_layers=2), progress=False, min_freq=1, seq_len=10)
    ulm = ULMFiT(tmp_path, **options)
    with pytest.raises(TrainingError, match='epoch 1'):
        ulm.pretrain(texts, epochs=3, bs=4, cbs=Poison('weights'))
    checkpoint = load_tree(tmp_path / 'forward/general/checkpoint.safetensors')
    assert checkpoint['epoch'] == 1 and not not_finite(checkpoint['model'].items())
    assert not (tmp_path / 'forward/general/encoder.safetensors').exists()
    ulm.pretrain(texts, epochs=3, bs=4)
    assert not not_finite(Encoder.load(tmp_path / 'forward/general/encoder.safetensors').weights.items())


def test_a_validation_loss_that_is_not_a_number_is_said(small_tokenizers):
    class BadValid(Callback):
        def after_pred(self):
            if not self.training:
                self.learn.pred = self.pred * NAN

    learn = classifier(small_tokenizers)
    with pytest.warns(UserWarning, match='The validation loss of epoch 0 is nan'):
        silent(learn, lambda: learn.fit(1, 1e-3, cbs=BadValid()))


# --- predictions ---


class BreakRow(torch.nn.Module):
    "The head of a model, which gives NaN for a text that begins like another"

    def __init__(self, head, when):
        super().__init__()
        self.head, self.when = head, when

    def forward(self, *args, **kwargs):
        out = self.head(*args, **kwargs)
        return torch.where(self.when(out), torch.full_like(out, NAN), out)


def broken(learn):
    for p in learn.model.parameters():
        p.data.fill_(NAN)
    return learn


@pytest.mark.parametrize('name', ['classifier', 'multilabel', 'regression', 'ulmfit_classifier'])
def test_predictions_of_broken_weights_are_refused(small_tokenizers, name):
    learn = broken(MAKERS[name](small_tokenizers))
    for use in (
        lambda: learn.predict_batch(TEXTS),
        lambda: learn.predictor().predict(TEXTS),
        lambda: list(learn.predictor().predict_iter(TEXTS)),
        lambda: learn.evaluate(),
        lambda: learn.evaluate(ds_idx=0),
    ):
        with pytest.raises(DataError, match='must be numbers.*row 0, 1'):
            use()
    if name in ('classifier', 'multilabel'):
        with pytest.raises(DataError, match='must be numbers'):
            learn.calibrate()


def test_the_row_of_a_text_is_named(small_tokenizers):
    learn = classifier(small_tokenizers)
    predictor = learn.predictor(cache=100)
    predictor.predict(TEXTS)
    own = predictor.engine
    worst = 'a long text of its own'
    bad_ids = own.encode([worst])[0]

    class Engine:
        def __getattr__(self, name):
            return getattr(own, name)

        def __call__(self, rows):
            scores = own(rows).clone()
            for i, row in enumerate(rows):
                if np.array_equal(row, bad_ids):
                    scores[i] = NAN
            return scores

    predictor.engine = Engine()
    with pytest.raises(DataError, match='in row 3'):
        predictor.predict(TEXTS[:3] + [worst] + TEXTS[3:])
    with pytest.raises(DataError, match='in row 5'):
        list(predictor.predict_iter(TEXTS[:5] + [worst], size=4))
    assert worst not in predictor.known


def test_other_tasks_refuse_too(small_tokenizers):
    uses = dict(
        tagger=lambda learn: learn.tag(['the film was good']),
        answerer=lambda learn: learn.answer('when', 'the film at noon'),
        masked_lm=lambda learn: learn.predict('the [MASK] was good'),
        t5=lambda learn: learn.generate_texts(['the film']),
        causal_lm=lambda learn: learn.predict('the film', max_new_tokens=2),
    )
    for name, use in uses.items():
        learn = broken(MAKERS[name](small_tokenizers))
        with pytest.raises(FastaiTLError, match='must be numbers'), learn.no_bar():
            use(learn)


@pytest.mark.parametrize('name', ['causal_lm', 't5', 'ulmfit_lm'])
@pytest.mark.parametrize('options', [{}, dict(do_sample=True, seed=1), dict(num_beams=2), dict(stream=True)])
def test_generation_refuses(small_tokenizers, name, options):
    learn = broken(MAKERS[name](small_tokenizers))
    with pytest.raises(FastaiTLError, match='next token must be numbers'):
        list(learn.generate(['the film'], max_new_tokens=3, **options))


def test_the_prompt_is_named(small_tokenizers):
    learn = causal_lm(small_tokenizers)

    head = learn.model.hf.lm_head
    learn.model.hf.lm_head = BreakRow(head, lambda out: torch.arange(len(out))[:, None, None] == 1)
    with pytest.raises(FastaiTLError, match='for prompt 1'):
        learn.generate(['the film', 'the film was very good', 'the plot was'], max_new_tokens=2)


@pytest.mark.parametrize('name', ['causal_lm', 'masked_lm', 'ulmfit_lm'])
def test_perplexity_refuses(small_tokenizers, name):
    learn = broken(MAKERS[name](small_tokenizers))
    for use in (learn.perplexity, lambda texts: learn.token_surprisal(texts[0])):
        with pytest.raises(DataError, match='must be numbers.*row 0'):
            use(['the film was good', 'dull'])


def test_minus_infinity_is_an_ordinary_score():
    "A class that a model excludes has the probability 0"
    preds = Predictions(np.array([[0.0, -np.inf]]), 'classification', ['a', 'b'])
    assert preds.probs.tolist() == [[1.0, 0.0]]
    with pytest.raises(DataError, match='row 0'):
        Predictions(np.array([[NAN, 1.0]]), 'classification', ['a', 'b'])
