"""blurr 1.0.5 with today's libraries, and the way from it to native Learners.

Needs blurr, installed as the package says: `pip install --no-deps ohmeow-blurr==1.0.5`. Without it the tests are
skipped, unless FASTAI_TL_BLURR=1 says that it must be installed, as in continuous integration."""

import functools
import importlib
import importlib.util
import json
import os
import re
import sys

import numpy as np
import pandas as pd
import pytest
import torch
import transformers as tf
from fastai.text.all import (ColReader, ColSplitter, CrossEntropyLossFlat, DataBlock, Learner, OptimWrapper,
                             RegressionBlock, accuracy, load_learner, minimum, rmse)
from sklearn.metrics import accuracy_score, mean_squared_error

from fastai_tl.all import (FastaiTLError, GradualUnfreezing, LayerwiseOptimizer, calculate_perplexity, disable_blurr,
                           enable_blurr, execution_order, from_blurr, from_blurr_export, layer_groups, layer_splitter,
                           row_texts, train_tokenizer)
from fastai_tl.data.hf_tokenizer import TensorTokens
from fastai_tl.learners.auto import task_of_class
from fastai_tl.models.third_party import foreign_parts, unwrap_model
from repo import NBS, ROOT, python

INSTALL = 'pip install --no-deps ohmeow-blurr==1.0.5'
is_installed = importlib.util.find_spec('blurr') is not None
if os.environ.get('FASTAI_TL_BLURR') == '1' and not is_installed:
    raise RuntimeError(f'FASTAI_TL_BLURR=1, but blurr is not installed: {INSTALL}')
needs_blurr = pytest.mark.skipif(not is_installed, reason=f'blurr is not installed: {INSTALL}')
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings('ignore')]

CLASSIFICATION = ('classification', 'multilabel', 'regression')
SEQ2SEQ = ('summarization', 'translation')
TASKS = (*CLASSIFICATION, 'tagging', 'qa', 'causal_lm', 'masked_lm', *SEQ2SEQ)
each_task = pytest.mark.parametrize('task', TASKS)

WORDS = ('good bad fine awful lovely poor great dull bright sad the film is was very quite a story and music Paris '
         'London Anna Ben lives in works at Acme').split()
rng = np.random.default_rng(0)
TEXTS = [('good fine ' if i%2 else 'bad awful ') + ' '.join(rng.choice(WORDS, n))
         for i, n in enumerate(rng.integers(6, 13, 40))]
VALID = [i >= 28 for i in range(40)]
PLACES = [('Paris', 'London')[i%2] for i in range(40)]


@pytest.fixture(scope='module')
def blurr():
    "blurr enabled, with its faults corrected"
    changed = enable_blurr()
    assert len(changed)
    yield changed
    disable_blurr()


def word_pieces():
    "A BERT tokenizer of the texts"
    from tokenizers import BertWordPieceTokenizer, processors
    pieces = BertWordPieceTokenizer()
    pieces.train_from_iterator(TEXTS, vocab_size=120, show_progress=False)
    special = [(t, pieces.token_to_id(t)) for t in ('[SEP]', '[CLS]')]
    pieces._tokenizer.post_processor = processors.BertProcessing(*special)
    names = dict(pad_token='[PAD]', unk_token='[UNK]', cls_token='[CLS]', sep_token='[SEP]', mask_token='[MASK]')
    inputs = ['input_ids', 'token_type_ids', 'attention_mask']
    return tf.PreTrainedTokenizerFast(tokenizer_object=pieces._tokenizer, model_max_length=64,
                                      model_input_names=inputs, **names)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Folders of small models with their tokenizers"
    root = tmp_path_factory.mktemp('models')
    torch.manual_seed(0)
    tok = word_pieces()
    config = tf.BertConfig(vocab_size=len(tok), hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
                           intermediate_size=32, max_position_embeddings=64, pad_token_id=tok.pad_token_id)
    save(root/'bert', tok, tf.BertForMaskedLM(config))
    tok = train_tokenizer(TEXTS, 300, 'decoder', max_length=64)
    config = tf.GPT2Config(vocab_size=len(tok), n_embd=16, n_layer=3, n_head=2, n_positions=64, bos_token_id=0,
                           eos_token_id=0)
    save(root/'tiny-gpt2', tok, tf.GPT2LMHeadModel(config))
    tok = train_tokenizer(TEXTS, 300, 'seq2seq', max_length=64)
    config = tf.T5Config(vocab_size=len(tok), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
                         decoder_start_token_id=0, pad_token_id=0, eos_token_id=2)
    save(root/'t5', tok, tf.T5ForConditionalGeneration(config))
    return root


def save(path, tok, model):
    tok.save_pretrained(path)
    model.save_pretrained(path)


def table():
    return pd.DataFrame(dict(
        text=TEXTS, label=[('neg', 'pos')[i%2] for i in range(40)], a=[i%2 for i in range(40)],
        b=[int(i%3 == 0) for i in range(40)], value=[float(i%2) for i in range(40)],
        summary=[' '.join(t.split()[:3]) for t in TEXTS], is_valid=VALID))


TAGS = dict(Paris='B-LOC', London='B-LOC', Anna='B-PER', Ben='B-PER', Acme='B-ORG')


def model_folder(task, folder):
    name = 'tiny-gpt2' if task == 'causal_lm' else 'bert'
    return str(folder/('t5' if task in SEQ2SEQ else name))


def make(task, folder, **kwargs):
    "A Learner as blurr's documentation makes it"
    makers = dict(classification=make_classifier, multilabel=make_multilabel, regression=make_regression,
                  tagging=make_tagger, qa=make_qa, causal_lm=make_causal_lm, masked_lm=make_masked_lm,
                  summarization=make_summarizer, translation=make_translator)
    return makers[task](model_folder(task, folder), table(), kwargs)


def options(learner_kwargs):
    return dict(dl_kwargs=dict(bs=8), **(dict(learner_kwargs=learner_kwargs) if learner_kwargs else {}))


def make_classifier(path, df, kwargs):
    from blurr.text.modeling.all import BlearnerForSequenceClassification
    return BlearnerForSequenceClassification.from_data(df, path, **options(kwargs))


def make_multilabel(path, df, kwargs):
    from blurr.text.modeling.all import BlearnerForSequenceClassification
    return BlearnerForSequenceClassification.from_data(df, path, label_attr=['a', 'b'], **options(kwargs))


def make_regression(path, df, kwargs):
    from blurr.text.data.all import TextBlock
    from blurr.text.modeling.all import Blearner
    from blurr.text.utils import get_hf_objects
    from blurr.utils import PreCalculatedMSELoss
    *hf, model = get_hf_objects(path, model_cls=tf.AutoModelForSequenceClassification, config_kwargs=dict(num_labels=1))
    blocks = (TextBlock(*hf, model), RegressionBlock)
    data = DataBlock(blocks, get_x=ColReader('text'), get_y=ColReader('value'), splitter=ColSplitter())
    return Blearner(data.dataloaders(df, bs=8), model, loss_func=PreCalculatedMSELoss(), metrics=rmse, **kwargs)


def make_tagger(path, df, kwargs):
    from blurr.text.modeling.all import BlearnerForTokenClassification
    df['tokens'] = [t.split() for t in TEXTS]
    df['token_labels'] = [[TAGS.get(w, 'O') for w in words] for words in df.tokens]
    learner_kwargs = dict(cbs=[BlearnerForTokenClassification.get_metrics_cb()], **kwargs)
    return BlearnerForTokenClassification.from_data(df, path, **options(learner_kwargs))


def make_qa(path, df, kwargs):
    from blurr.text.data.all import QAPreprocessor
    from blurr.text.modeling.all import BlearnerForQuestionAnswering
    from blurr.text.utils import get_hf_objects
    tok = get_hf_objects(path, model_cls=tf.AutoModelForQuestionAnswering)[2]
    rows = pd.DataFrame(dict(
        id=[str(i) for i in range(40)], context=[f'{t} Anna lives in {place}' for t, place in zip(TEXTS, PLACES)],
        question='where lives Anna', answer_text=PLACES, is_valid=VALID))
    tok_kwargs = dict(return_overflowing_tokens=True, max_length=64, stride=8)
    df = QAPreprocessor(tok, id_attr='id', tok_kwargs=tok_kwargs).process_df(rows)
    assert df.is_answerable.all()
    return BlearnerForQuestionAnswering.from_data(df, path, max_seq_len=64, id_attr='id', **options(kwargs))


def make_causal_lm(path, df, kwargs, **more):
    from blurr.text.modeling.all import BlearnerForLM
    learner_kwargs = dict(cbs=[BlearnerForLM.get_metrics_cb()], **kwargs)
    return BlearnerForLM.from_data(df, path, **more, **options(learner_kwargs))


def make_masked_lm(path, df, kwargs):
    from blurr.text.data.all import BertMLMStrategy
    return make_causal_lm(path, df, kwargs, lm_strategy_cls=BertMLMStrategy)


def make_summarizer(path, df, kwargs):
    from blurr.text.modeling.all import BlearnerForSummarization
    return BlearnerForSummarization.from_data(df, path, max_length=32, max_target_length=8, **options(kwargs))


def make_translator(path, df, kwargs):
    from blurr.text.modeling.all import BlearnerForTranslation
    columns = dict(src_lang_name='English', src_lang_attr='text', trg_lang_name='German', trg_lang_attr='summary')
    return BlearnerForTranslation.from_data(df, path, **columns, max_length=32, max_target_length=8, **options(kwargs))


def ask(task, learn):
    "What blurr predicts or writes"
    if task in CLASSIFICATION:
        return learn.blurr_predict(TEXTS[:3])
    if task == 'tagging':
        return learn.blurr_predict_tokens(TEXTS[:2])
    if task == 'qa':
        return learn.blurr_predict_answers(dict(question='where lives Anna', context=f'{TEXTS[0]} Anna lives in Paris'))
    if task == 'masked_lm':
        return learn.blurr_fill_mask('the film is [MASK]', n_preds=2)
    if task == 'causal_lm':
        return learn.blurr_generate('the film is', max_new_tokens=6, do_sample=False)
    write = learn.blurr_summarize if task == 'summarization' else learn.blurr_translate
    return write(TEXTS[0], max_new_tokens=6, num_beams=2)


def quiet(learn, f):
    with learn.no_bar(), learn.no_logging():
        return f()


def loss(learn, **kwargs):
    return float(quiet(learn, lambda: learn.validate(**kwargs))[0])


def preds(learn, texts=None):
    "What `get_preds` gives, as plain tensors"
    dl = None if texts is None else learn.dls.test_dl(texts)
    return [o if o is None else o.as_subclass(torch.Tensor) for o in quiet(learn, lambda: learn.get_preds(dl=dl))]


def assert_same(a, b):
    torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def shown(monkeypatch, f):
    "The tables that `f` displays"
    tables = []
    modules = [m for name, m in sys.modules.items() if name.startswith('blurr.') and hasattr(m, 'display_df')]
    for module in modules:
        monkeypatch.setattr(module, 'display_df', tables.append)
    f()
    return tables


@needs_blurr
@each_task
def test_lives(task, blurr, folder, tmp_path, monkeypatch):
    "Training, freezing, the learning rate finder, the show methods, prediction, export and load"
    learn = make(task, folder)
    learn.path = tmp_path
    batch, = shown(monkeypatch, lambda: learn.dls.show_batch(dataloaders=learn.dls, max_n=2))
    assert len(batch) == 2
    assert any(w in str(batch.iloc[0, 0]) for w in WORDS)
    check_training(learn)
    results = shown(monkeypatch, lambda: quiet(learn, lambda: learn.show_results(learner=learn, max_n=2)))[-1]
    assert len(results) == (1 if task in SEQ2SEQ else 2)
    assert results.shape[1] > batch.shape[1] - (task == 'tagging')
    said = ask(task, learn)
    learn.export('old.pkl')
    assert ask(task, load_learner(tmp_path/'old.pkl')) == said


def check_training(learn):
    learn.freeze_to(-1) # before any training: fastai's own optimizers decay what is frozen later
    top = {id(p) for p in learn.opt.param_lists[-1]}
    weights = {n: p.detach().clone() for n, p in learn.model.named_parameters()}
    quiet(learn, lambda: learn.fit_one_cycle(1, slice(1e-5, 1e-2)))
    moved = {n: p for n, p in learn.model.named_parameters() if not torch.equal(p, weights[n])}
    assert moved
    assert all(id(p) in top or 'norm' in n.lower() or 'ln_' in n for n, p in moved.items())
    learn.unfreeze()
    before = loss(learn, ds_idx=0)
    quiet(learn, lambda: learn.fit(5, 1e-2))
    assert loss(learn, ds_idx=0) < before
    rate, = quiet(learn, lambda: learn.lr_find(num_it=5, suggest_funcs=[minimum], show_plot=False))
    assert 1e-9 < rate < 10


@needs_blurr
@each_task
def test_is_a_learner(task, blurr, folder):
    "Our splitter, optimizer, gradual unfreezing and evaluation on a blurr Learner"
    learn = make(task, folder, splitter=layer_splitter(), opt_func=LayerwiseOptimizer)
    hf = unwrap_model(learn.model)
    assert hf is learn.model.hf_model
    assert foreign_parts(learn).tokenizer is first_tfm(learn).hf_tokenizer
    groups = layer_groups(learn.model)
    assert [g.name for g in groups] == [g.name for g in layer_groups(hf)]
    assert len(groups) >= 4
    assert sorted(id(p) for g in groups for p in g.params) == sorted(map(id, learn.model.parameters())) # each once
    assert len(execution_order(learn.model, strict=True)) == len(execution_order(hf))
    check_unfreezing(learn, len(groups))
    if task in CLASSIFICATION:
        check_evaluation(task, learn)
    if task == 'causal_lm' or task in SEQ2SEQ:
        assert len(learn.generate(['the film is'], max_new_tokens=5)) == 1
    if task in ('causal_lm', 'masked_lm'):
        check_perplexity(task, learn, hf)


def check_unfreezing(learn, n_groups):
    learn.opt.set_hyper('wd', .1)
    learn.opt.wd_mults = dict(norm=0, bias=0)
    learn.opt.lr_mults = dict(bias=2.)
    steps = [1, 2, n_groups]
    cb = GradualUnfreezing(every=1, groups=steps)
    quiet(learn, lambda: learn.fit(3, 1e-2, cbs=cb))
    assert cb.table().groups.tolist() == steps
    pairs = zip(learn.opt.param_groups, learn.opt.where)
    by_kind = {kind: group['lr'] for group, (i, kind) in pairs if i == n_groups-1}
    if 'bias' in by_kind and len(by_kind) > 1:
        assert by_kind['bias'] == pytest.approx(2*min(by_kind.values()))
    done = quiet(learn, lambda: learn.fit_gradual(epochs=[1]*3, groups=steps, lr=1e-3))
    assert done.table().params.is_monotonic_increasing


def first_tfm(learn):
    return next(f for f in learn.dls.before_batch.fs if hasattr(f, 'hf_tokenizer'))


def check_evaluation(task, learn):
    "Against blurr's own predictions and scikit-learn"
    ev = quiet(learn, learn.evaluate)
    df = table()[VALID]
    said = learn.blurr_predict(df.text.tolist())
    if task == 'regression':
        np.testing.assert_allclose(ev.preds, [r['value'] for r in said], atol=1e-5)
        np.testing.assert_allclose(ev.losses.mean(), mean_squared_error(df.value, ev.preds), rtol=1e-4)
        return
    np.testing.assert_allclose(ev.probs, [r['probs'] for r in said], atol=1e-5)
    assert ev.texts == df.text.tolist() or ev.texts is None
    if task == 'multilabel':
        assert ev.targets.tolist() == df[['a', 'b']].values.tolist()
        assert ev.classes == ['a', 'b']
        return
    labels = [r['label'] for r in said]
    assert [ev.classes[i] for i in ev.preds] == labels
    report = ev.report(level=None)
    if 'accuracy' in report.index:
        assert report.loc['accuracy'].dropna().iloc[0] == pytest.approx(accuracy_score(df.label, labels))


def check_perplexity(task, learn, hf):
    "A causal model's against transformers' own loss"
    res = learn.perplexity(TEXTS[:2])
    assert len(res) == 2
    assert 1 < float(res) < 5000
    if task != 'causal_lm':
        return
    ids = torch.tensor([first_tfm(learn).hf_tokenizer(TEXTS[0])['input_ids']])
    with torch.no_grad():
        token_loss = hf.eval()(ids, labels=ids).loss
    assert calculate_perplexity(TEXTS[0], learn) == pytest.approx(float(token_loss.exp()), rel=1e-4)


def in_dataset_order(rows, dl):
    return [rows[i] for i in np.argsort(list(dl.get_idxs()))]


def blurr_logits(learn):
    "Logits of each validation row"
    dl, rows = learn.dls.valid.new(shuffle=False), []
    with torch.no_grad():
        for batch in dl:
            out = learn.model(dict(batch[0]))
            outputs = [out.start_logits, out.end_logits] if hasattr(out, 'start_logits') else [out.logits]
            rows += [list(row) for row in zip(*outputs)]
    return in_dataset_order(rows, dl)


def native_logits(learn):
    "Logits of each validation row"
    dl, rows = learn.dls.valid.new(shuffle=False), []
    with torch.no_grad():
        for batch in dl:
            out = learn.model(batch[0].as_subclass(TensorTokens))
            outputs = out if isinstance(out, tuple) else (out,)
            rows += [list(row) for row in zip(*outputs)]
    return in_dataset_order(rows, dl)


def task_of(learn):
    return task_of_class(type(unwrap_model(learn.model)).__name__)


def check_same_logits(a, b):
    "Equal over what both have: padding differs"
    n = min(len(a), len(b))
    a, b = a[:n].as_subclass(torch.Tensor), b[:n].as_subclass(torch.Tensor)
    is_seen = b > torch.finfo(b.dtype).min/8 # places outside the passage are masked in a native model
    assert is_seen.any()
    assert_same(a[is_seen], b[is_seen])


@needs_blurr
@each_task
def test_from_blurr(task, blurr, folder):
    "Rows, labels and predictions of the native Learner are those of blurr's, to 1e-6"
    learn = make(task, folder)
    learn.unfreeze()
    quiet(learn, lambda: learn.fit(1, 1e-2))
    new = from_blurr(learn)
    assert type(new).__module__.startswith('fastai_tl.')
    assert new.model.hf is learn.model.hf_model
    assert new.dls.spec.task == (task if task in CLASSIFICATION else task_of(learn))
    learn.model.eval()
    new.model.eval()
    if task in CLASSIFICATION:
        check_same_rows(task, learn, new)
    elif task in ('tagging', 'qa'):
        check_same_tokens(task, learn, new)
    else:
        check_same_language_model(task, learn, new)
    before = loss(new)
    quiet(new, lambda: new.fit_gradual(epochs=[1, 1], groups=[1, len(layer_groups(new.model))], lr=1e-3))
    assert np.isfinite(loss(new))
    assert loss(new) < before*1.5
    if task in (*CLASSIFICATION, 'tagging', 'qa'):
        assert len(quiet(new, new.evaluate)) > 0


def check_same_rows(task, learn, new):
    assert len(new.dls.train_ds) == 28
    assert len(new.dls.valid_ds) == 12
    a, b = preds(learn), preds(new)
    assert_same(a[0], b[0])
    torch.testing.assert_close(a[1].float().flatten(), b[1].float().flatten())
    assert row_texts(new.dls.valid) == table()[VALID].text.tolist()
    if task == 'classification':
        assert quiet(new, lambda: new.predict(TEXTS[0]))[0] == learn.blurr_predict(TEXTS[0])[0]['label']


def check_same_tokens(task, learn, new):
    for a, b in zip(blurr_logits(learn), native_logits(new)):
        for x, y in zip(a, b):
            check_same_logits(x, y)
    if task == 'tagging':
        assert list(new.dls.vocab) == list(learn.dls.vocab)
        return
    answers = {e.answers[0] for e in new.dls.tok.examples}
    assert answers == {'Paris', 'London'} or {a.lower() for a in answers} == {'paris', 'london'}


def check_same_language_model(task, learn, new):
    ids = torch.tensor([first_tfm(learn).hf_tokenizer(TEXTS[0])['input_ids']])
    x = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    args = [TensorTokens(ids[:,None])]
    if task in SEQ2SEQ:
        x['decoder_input_ids'] = ids
        args.append(TensorTokens(ids[:,None]))
    with torch.no_grad():
        assert_same(learn.model(x).logits, new.model(*args))
    if task in SEQ2SEQ:
        assert new.predict(TEXTS[0], max_new_tokens=6, num_beams=2) == list(ask(task, learn)[0].values())[0]
    if task == 'causal_lm':
        assert continued(new) == ask(task, learn)[0]['generated_texts']


def continued(new):
    return new.predict('the film is', max_new_tokens=6, do_sample=False)


@needs_blurr
@each_task
def test_export_comes_over(task, blurr, folder, tmp_path):
    "A pickle of blurr's becomes a native Learner that predicts the same without its data"
    learn = make(task, folder)
    learn.path = tmp_path
    learn.export('old.pkl')
    with pytest.raises(FastaiTLError, match='runs code'):
        from_blurr_export(tmp_path/'old.pkl')
    new = from_blurr_export(tmp_path/'old.pkl', trust=True)
    assert new.model.hf is not learn.model.hf_model
    assert len(new.dls.train_ds) == 0
    ours, theirs = new.model.hf.state_dict(), learn.model.hf_model.state_dict()
    for (name, a), (other, b) in zip(theirs.items(), ours.items()):
        assert name == other
        assert torch.equal(a, b)
    if task in CLASSIFICATION:
        assert_same(preds(learn, TEXTS[:5])[0], preds(new, TEXTS[:5])[0])
    if task == 'causal_lm':
        assert continued(new) == ask(task, learn)[0]['generated_texts']
    if task == 'tagging':
        assert set(new.tag(TEXTS[:1])[0].tags) <= set(learn.dls.vocab)
    if task == 'qa':
        assert new.answer('where lives Anna', TEXTS[0]) is not None


@needs_blurr
def test_older_shape(blurr, folder):
    "Learner(dls, HF_BaseModelWrapper(model), cbs=[HF_BaseModelCallback]), as in blurr 0.x"
    from blurr.text.modeling.core import BaseModelCallback, BaseModelWrapper, blurr_splitter

    class HF_BaseModelWrapper(BaseModelWrapper):
        pass

    class HF_BaseModelCallback(BaseModelCallback):
        pass

    first = make('classification', folder)
    learn = Learner(first.dls, HF_BaseModelWrapper(first.model.hf_model), loss_func=CrossEntropyLossFlat(),
                    cbs=[HF_BaseModelCallback], splitter=blurr_splitter, metrics=accuracy)
    quiet(learn, lambda: learn.fit_gradual(epochs=[1, 1], groups=[1, 2], lr=1e-3))
    assert 'layer.2' in ' '.join(learn.layer_table().layers)
    ev = quiet(learn, learn.evaluate)
    assert len(ev) == 12
    assert ev.classes == ['neg', 'pos']
    assert_same(preds(learn)[0], preds(from_blurr(learn))[0])


# --- blurr's faults: each as it is, and corrected ---

@pytest.fixture(params=[False, True], ids=['as it is', 'mended'])
def mended(request, blurr):
    if request.param:
        yield True
        return
    disable_blurr()
    enable_blurr(mend=False)
    yield False
    disable_blurr()
    enable_blurr()


@needs_blurr
def test_precision_and_recall(mended):
    "A tagger that finds half of the entities and nothing wrong: precision 1, recall 1/2"
    from blurr.text.modeling.token_classification import TokenClassMetricsCallback
    cb = TokenClassMetricsCallback()
    cb.learn = type('L', (), dict(token_classification_report=None))()
    cb.results = [(['B-X', 'O', 'O'], ['B-X', 'O', 'B-X'])] # predicted, true
    cb.after_validate()
    precision, recall = cb.custom_metrics_dict['precision'], cb.custom_metrics_dict['recall']
    assert (precision, recall) == ((1., .5) if mended else (.5, 1.))
    assert cb.results == [(['B-X', 'O', 'O'], ['B-X', 'O', 'B-X'])]


@needs_blurr
def test_encoder_is_not_one_group(mended, folder):
    learn = make('classification', folder)
    # embeddings, encoder, pooler, classifier; or embeddings, three layers, head
    assert len(learn.opt.param_lists) == (5 if mended else 4)
    encoder = {id(p) for n, p in learn.model.named_parameters() if 'encoder' in n}
    assert max(sum(id(p) in encoder for p in group) for group in learn.opt.param_lists) == (16 if mended else 48)
    quiet(learn, lambda: learn.fit_gradual(epochs=[1, 1, 1], groups=[1, 2, 5], lr=1e-3))
    assert len(learn.opt.param_lists) == 5 # in both cases the layers one by one


@needs_blurr
def test_tied_weight_is_stepped_once(mended, folder):
    learn = make('causal_lm', folder)
    tied = learn.model.hf_model.lm_head.weight
    assert sum(p is tied for g in learn.opt.param_lists for p in g) == (1 if mended else 2)
    from torch.optim import SGD
    learn.unfreeze()
    before = tied.detach().clone()
    learn.opt_func = functools.partial(OptimWrapper, opt=SGD) if mended else learn.opt_func
    if not mended:
        return
    learn.create_opt()
    learn.unfreeze()
    tied.grad = torch.ones_like(tied)
    learn.opt.set_hyper('lr', .5)
    learn.opt.step()
    torch.testing.assert_close(tied.detach(), before-.5)


@needs_blurr
def test_defaults_do_not_leak(mended, folder):
    "The metrics of a single-label Learner do not appear in a multi-label one"
    from blurr.text.modeling.core import BlearnerForSequenceClassification
    make('classification', folder)
    names = [m.name for m in make('multilabel', folder).metrics]
    if mended:
        assert 'accuracy_multi' in names
        return
    assert 'accuracy' in names
    assert 'accuracy_multi' not in names
    defaults = BlearnerForSequenceClassification.from_data.__func__.__defaults__
    next(d for d in defaults if isinstance(d, dict) and d).clear()


@needs_blurr
def test_files_can_be_read(mended, folder, tmp_path):
    from blurr.text.modeling.core import BlearnerForSequenceClassification
    table().to_csv(tmp_path/'data.csv', index=False)
    if mended:
        learn = BlearnerForSequenceClassification.from_data(tmp_path/'data.csv', str(folder/'bert'))
        assert len(learn.dls.valid_ds) == sum(VALID)
        return
    with pytest.raises(ValueError):
        BlearnerForSequenceClassification.from_data(str(tmp_path/'data.csv'), str(folder/'bert'))


@needs_blurr
def test_labels_are_whole(mended, folder):
    labels = {r['label'] for r in make('classification', folder).blurr_predict(TEXTS)}
    assert labels
    assert labels <= ({'neg', 'pos'} if mended else {'n', 'p'})


# --- what is restored, and undone ---

CHANGES = '''
import fastcore.all, pandas as pd, transformers as tf, datasets, nltk, nltk.tokenize, sys
from fasttransform import Pipeline
from fastai.learner import Learner
from fastai_tl.interop.blurr import enable_blurr, disable_blurr
import fastai.text.all
from fastai_tl.interop import blurr_compat

blurr_compat.is_available = lambda name: False # as if seqeval were not installed
owners = [fastcore.all, pd.DataFrame, tf.PreTrainedConfig, tf.PreTrainedTokenizerBase, datasets, nltk, nltk.tokenize,
          Pipeline, Learner]

def state():
    return [{k: id(v) for k, v in vars(o).items() if not k.startswith('__')} for o in owners]

before = state()
made = enable_blurr(mend=False)
assert not any(m.startswith('blurr.text.modeling.') for m in sys.modules)
names = ('fastcore.all.typedispatch', 'DataFrame.append', 'PreTrainedConfig.get', 'datasets.load_metric',
         'Pipeline.add')
for name in names:
    assert name in set(made.what), made
assert len(enable_blurr(mend=False)) == len(made)
with_mends = enable_blurr()
assert len(with_mends) > len(made)

import blurr.text.modeling.all as bl
assert bl.blurr_splitter.by_layers
import blurr.text.modeling.token_classification as tc
true, pred = [['B-X', 'O', 'B-X']], [['B-X', 'O', 'O']]
scores = [tc.calculate_token_class_metrics(pred, true, k) for k in ('accuracy', 'precision', 'recall')]
assert scores == [2/3, 1, 1/2]
assert tc.seq_metrics.__spec__ is None
assert 'X' in tc.calculate_token_class_metrics(pred, true, 'classification_report')

disable_blurr()
assert 'seqeval' not in sys.modules
assert not hasattr(bl.blurr_splitter, 'by_layers')
after = state()
for o, a, b in zip(owners, before, after):
    new = {k for k in b if a.get(k) != b[k]} - {k for k in vars(o) if k.startswith('blurr_')}
    assert not new, (o, new)
print('undone')
'''


@needs_blurr
def test_changes_are_listed_and_undone():
    "In a fresh process: nothing is changed before, each change is listed, and none is left after"
    res = python(CHANGES)
    assert res.returncode == 0 and 'undone' in res.stdout, res.stdout


IMPORTS = '''
import sys, fastcore.all, pandas as pd
from fasttransform import Pipeline
add = Pipeline.add
from fastai_tl.all import (FastaiTLError, GradualUnfreezing, LayerwiseOptimizer, calculate_perplexity, disable_blurr,
                           enable_blurr, execution_order, from_blurr, from_blurr_export, layer_groups, layer_splitter,
                           row_texts, train_tokenizer)
assert callable(enable_blurr) and callable(from_blurr)
foreign = ('blurr', 'datasets', 'nltk', 'seqeval')
assert not [m for m in sys.modules if m.split('.')[0] in foreign], sorted(sys.modules)
assert Pipeline.add is add
assert not hasattr(fastcore.all, 'typedispatch')
assert not hasattr(pd.DataFrame, 'append')
print('alone')
'''


def test_all_leaves_blurr_alone():
    "Importing everything neither imports blurr nor changes what it would need"
    res = python(IMPORTS)
    assert res.returncode == 0 and 'alone' in res.stdout, res.stdout


WITHOUT_BLURR = '''
import sys, importlib.abc

class Without(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'blurr':
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Without())
from fastai_tl.interop.blurr import enable_blurr
try:
    enable_blurr()
except ImportError as e:
    print(e)
'''


def test_says_how_to_install():
    res = python(WITHOUT_BLURR)
    assert INSTALL in res.stdout, res.stdout


def test_native_learners_are_refused():
    from fastai.test_utils import synth_learner
    with pytest.raises(FastaiTLError, match='made with blurr'):
        from_blurr(synth_learner())


# --- the page that shows the way ---

def page():
    cells = json.loads((NBS/'tutorials'/'from_blurr.ipynb').read_text(encoding='utf-8'))['cells']
    return [''.join(c['source']) for c in cells if c['cell_type'] == 'markdown']


def test_page_shows_the_flows():
    "The tables are those that benchmarks/blurr_flows/run.py has written"
    found = json.loads((ROOT/'benchmarks'/'blurr_flows'/'results'/'flows.json').read_text())
    text = '\n'.join(page())
    for name, cells in found['flows'].items():
        n_passed = sum(c['passes'] for c in cells)
        assert f'**{name}**: {n_passed} of {len(cells)} cells pass' in text
        for cell in cells:
            result = 'yes' if cell['passes'] else 'no: '
            assert f'| {cell["cell"]} | {result}' in text
    assert all(v in text for v in found['versions'].values())


def native_names():
    "The code on the right of the table of the page"
    tables = [t for t in page() if t.startswith('## Write it natively')]
    rows = [line for t in tables for line in t.splitlines() if line.startswith('| ') and '---' not in line]
    return [row.split('|')[2] for row in rows]


NAME = re.compile(r'(?<![\w.\'"])([A-Za-z]\w+)(?=\(|\.from|$)')


def is_name(name):
    return name != 'True' and (not name.islower() or '_' in name)


def test_page_names_what_exists():
    "Each name on the right of the table exists"
    import fastai.text.all as ft
    import fastai_tl.all as all_
    from fastai_tl.learners.qa import HFAnswerer
    from fastai_tl.learners.seq2seq import HFSeq2SeqLearner
    from fastai_tl.learners.tagging import HFTagger
    rows = native_names()
    codes = [code for row in rows for code in re.findall('`([^`]*)`', row)]
    names = {name for code in codes for name in NAME.findall(code) if is_name(name)}
    assert len(names) > 20
    missing = {n for n in names if not hasattr(all_, n) and not hasattr(ft, n)}
    assert not missing, missing
    methods = {m for row in rows for m in re.findall(r'learn\.([a-z_]+)\(', row)}
    classes = (HFTagger, HFAnswerer, HFSeq2SeqLearner)
    assert not {m for m in methods if not any(hasattr(c, m) for c in classes)}


# --- with other parts of the package ---

@needs_blurr
def test_bundle(blurr, folder, tmp_path):
    "Saved without a pickle, by way of the native Learner"
    from fastai_tl.deploy.bundle import load_bundle
    learn = make('classification', folder)
    from_blurr(learn).save_bundle(tmp_path/'bundle')
    want = [r['probs'] for r in learn.blurr_predict(TEXTS[:4])]
    np.testing.assert_allclose(load_bundle(tmp_path/'bundle').predict_proba(TEXTS[:4]), want, atol=1e-5)


@needs_blurr
def test_cache(blurr, folder):
    "Gradual unfreezing with the frozen layers' outputs kept"
    importlib.import_module('fastai_tl.efficiency.feature_cache')
    learn = from_blurr(make('classification', folder))
    quiet(learn, lambda: learn.fit_gradual(epochs=[2, 1], groups=[1, 5], lr=1e-3, cache=True))
    assert np.isfinite(loss(learn))
