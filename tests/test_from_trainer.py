"The page `howto/from_trainer`: with equal settings and batches, Trainer and a Learner are the same training"

from functools import partial

import pytest
import torch
from fastai.text.all import (
    Callback,
    CSVLogger,
    EarlyStoppingCallback,
    F1Score,
    GradientAccumulation,
    GradientClip,
    LabelSmoothingCrossEntropyFlat,
    ParamScheduler,
    SchedLin,
    accuracy,
    combine_scheds,
)
from fastcore.test import test_close as close
from fastcore.test import test_eq as eq
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from fastai_tl.all import (
    BestEpoch,
    HFTextDataLoaders,
    LayerwiseOptimizer,
    ResumableFit,
    docstring_corpus,
    hf_classifier_learner,
    label_budget,
    load_bundle,
    seed_everything,
    train_tokenizer,
)

LR, EPOCHS = 2e-3, 2


@pytest.fixture(scope='module')
def start(tmp_path_factory):
    "A table of 80 training rows, and the folder of a model without dropout"
    folder = tmp_path_factory.mktemp('trainer') / 'start'
    df = label_budget(docstring_corpus(), n_per_class=20, n_eval=10)
    df = df[df.label.notna() & (df.split != 'test')].reset_index(drop=True)
    classes = sorted(df.label.unique())
    train_tokenizer(df.text, 800, max_length=32).save_pretrained(folder)
    config = BertConfig(
        vocab_size=800,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
        id2label=dict(enumerate(classes)),
        label2id={label: i for i, label in enumerate(classes)},
    )
    seed_everything(42)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return df, folder, classes


def make_dls(df, folder):
    "DataLoaders whose training batches have a fixed order"
    dls = HFTextDataLoaders.from_df(df, folder, valid_col='split', max_length=32, bs=16, verbose=False)
    dls.train.shuffle = False
    return dls


def encoded(rows, tokenizer, classes):
    "The rows as Trainer takes them"
    return [
        dict(tokenizer(text, truncation=True, max_length=32), labels=classes.index(label))
        for text, label in zip(rows.text, rows.label)
    ]


def train_with_trainer(start, dls, out, **kwargs):
    "Train on the batches of `dls`, and return the Trainer and the loss of each step"
    df, folder, classes = start
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = df[df.split == 'train'].iloc[list(dls.train.get_idxs())]
    args = TrainingArguments(
        out,
        learning_rate=LR,
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=16,
        weight_decay=0.01,
        warmup_steps=2,
        train_sampling_strategy='sequential',
        logging_steps=1,
        report_to='none',
        disable_tqdm=True,
        use_cpu=True,
        save_strategy='no',
        **kwargs,
    )
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    trainer = Trainer(
        model,
        args,
        train_dataset=encoded(rows, tokenizer, classes),
        eval_dataset=encoded(df[df.split == 'valid'], tokenizer, classes),
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.train()
    return trainer, [log['loss'] for log in trainer.state.log_history if 'loss' in log]


class StepLosses(Callback):
    "Keep the training loss of each step"

    def before_fit(self):
        self.values = []

    def after_batch(self):
        if self.training:
            self.values.append(float(self.loss))


def train_here(start, dls, cbs=(), **kwargs):
    "Train with the settings that the table of the page gives for those of `train_with_trainer`"
    learn = hf_classifier_learner(
        dls,
        start[1],
        opt_func=partial(LayerwiseOptimizer, sqr_mom=0.999, eps=1e-8),
        cbs=[GradientClip(1.0), *cbs],
        **kwargs,
    )
    rises = 2 / (EPOCHS * len(dls.train))
    rate = combine_scheds([rises, 1 - rises], [SchedLin(0, LR), SchedLin(LR, 0)])
    with learn.no_bar(), learn.no_logging():
        learn.fit(EPOCHS, LR, wd=0.01, cbs=ParamScheduler({'lr': rate}))
    return learn


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_each_step_has_the_same_loss(start, tmp_path, smoothing):
    "Rates, weight decay, clipping and label smoothing: equal losses at each step, and equal predictions at the end"
    dls = make_dls(*start[:2])
    eq(len(dls.train), 5)
    trainer, theirs = train_with_trainer(start, dls, tmp_path / 'out', label_smoothing_factor=smoothing)
    loss_func = LabelSmoothingCrossEntropyFlat(eps=smoothing) if smoothing else None
    learn = train_here(start, dls, cbs=[StepLosses()], loss_func=loss_func)
    close(learn.step_losses.values, theirs, 1e-4)
    assert max(theirs) - min(theirs) > 0.01  # it has learned something
    predicted = torch.tensor(trainer.predict(trainer.eval_dataset).predictions).softmax(1)
    with learn.no_bar():
        close(learn.get_preds()[0], predicted, 1e-4)


def test_accumulated_gradients(start, tmp_path):
    "`gradient_accumulation_steps=5` of 16 texts is `GradientAccumulation(80)`: the same predictions after two steps"
    dls = make_dls(*start[:2])
    options = dict(gradient_accumulation_steps=5, lr_scheduler_type='constant')
    trainer, _ = train_with_trainer(start, dls, tmp_path / 'out', **options)
    eq(trainer.state.global_step, EPOCHS)
    learn = hf_classifier_learner(
        dls,
        start[1],
        opt_func=partial(LayerwiseOptimizer, sqr_mom=0.999, eps=1e-8),
        cbs=[GradientClip(1.0), GradientAccumulation(80)],
    )
    with learn.no_bar(), learn.no_logging():
        learn.fit(EPOCHS, LR, wd=0.01)
    theirs = torch.tensor(trainer.predict(trainer.eval_dataset).predictions).softmax(1)
    with learn.no_bar():
        close(learn.get_preds()[0], theirs, 1e-3)
        untrained = hf_classifier_learner(dls, start[1])
        assert (untrained.get_preds()[0] - theirs).abs().max() > 5e-3


def test_there_and_back(start, tmp_path):
    "A folder of Trainer as a Learner, and a bundle as a model of transformers: equal predictions and class names"
    df, folder, classes = start
    dls = make_dls(df, folder)
    trainer, _ = train_with_trainer(start, dls, tmp_path / 'out')
    trainer.save_model(tmp_path / 'trained')
    theirs = torch.tensor(trainer.predict(trainer.eval_dataset).predictions).softmax(1)
    learn = hf_classifier_learner(dls, tmp_path / 'trained')
    with learn.no_bar():
        close(learn.get_preds()[0], theirs, 1e-6)
    learn.save_bundle(tmp_path / 'model')
    texts = list(df[df.split == 'valid'].text)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / 'model').eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / 'model')
    with torch.no_grad():
        inputs = tokenizer(texts, truncation=True, max_length=32, padding=True, return_tensors='pt')
        probs = model(**inputs).logits.softmax(1)
    close(probs, theirs, 1e-5)
    close(torch.as_tensor(load_bundle(tmp_path / 'model', verbose=False).predict_proba(texts)), theirs, 1e-5)
    eq(model.config.id2label, dict(enumerate(classes)))


def test_the_other_arguments_of_the_table_run_together(start, tmp_path):
    "Best epoch, early stopping, resuming, metrics, a log and gradient checkpointing in one fit, then evaluation"
    dls = make_dls(*start[:2])
    learn = hf_classifier_learner(
        dls, start[1], metrics=[accuracy, F1Score(average='macro')], gradient_checkpointing=True, path=tmp_path
    )
    early = EarlyStoppingCallback(monitor='valid_loss', patience=2)
    cbs = [BestEpoch(), early, ResumableFit(tmp_path / 'checkpoint.pth'), CSVLogger(), GradientClip(1.0)]
    with learn.no_bar(), learn.no_logging():
        learn.fit_stlr(3, LR, cut_frac=0.1, wd=0.01, cbs=cbs)
        loss = learn.validate()[0]
    lowest = min(values[1] for values in learn.recorder.values)
    close(loss, lowest, 1e-5)
    eq((tmp_path / 'history.csv').read_text().splitlines()[0], 'epoch,train_loss,valid_loss,accuracy,f1_score,time')
    eq(len(learn.evaluate()), 40)
    assert (tmp_path / 'checkpoint.pth').exists()
