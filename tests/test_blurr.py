"""blurr 1.0.5 on today's stack, and the way from it to native Learners.

Needs blurr, installed as the package says: `pip install --no-deps ohmeow-blurr==1.0.5`. Without it the tests skip, unless FASTAI_TL_BLURR=1
says that it has to be there, as in continuous integration."""

import functools,importlib,importlib.util,json,os,re,sys

import numpy as np
import pandas as pd
import pytest
import torch
import transformers as tf
from fastai.text.all import (ColReader, ColSplitter, CrossEntropyLossFlat, DataBlock, Learner, OptimWrapper, RegressionBlock, accuracy, load_learner, minimum, rmse)
from sklearn.metrics import accuracy_score, mean_squared_error

from fastai_tl.all import FastaiTLError, GradualUnfreezing, LayerwiseOptimizer, calculate_perplexity, disable_blurr, enable_blurr, execution_order, from_blurr, from_blurr_export, layer_groups, layer_splitter, row_texts, train_tokenizer
from fastai_tl.data.hf_tokenizer import TensorTokens
from fastai_tl.learners.auto import task_of_class
from fastai_tl.models.third_party import foreign_parts, unwrap_model
from repo import NBS,ROOT,python

there = importlib.util.find_spec('blurr') is not None
if os.environ.get('FASTAI_TL_BLURR') == '1' and not there: raise RuntimeError('FASTAI_TL_BLURR=1, but blurr is not installed: pip install --no-deps ohmeow-blurr==1.0.5')
needs_blurr = pytest.mark.skipif(not there, reason='blurr is not installed: pip install --no-deps ohmeow-blurr==1.0.5')
pytestmark = pytest.mark.filterwarnings('ignore')

CLASSES,BERT,LM = ('single','multi','regression'),('single','multi','regression','tagging','qa','masked_lm'),('causal_lm','masked_lm','summarization','translation')
TASKS = (*CLASSES,'tagging','qa',*LM)
each_task = pytest.mark.parametrize('task', TASKS)

WORDS = 'good bad fine awful lovely poor great dull bright sad the film is was very quite a story and music Paris London Anna Ben lives in works at Acme'.split()
rng = np.random.default_rng(0)
TEXTS = [('good fine ' if i%2 else 'bad awful ')+' '.join(rng.choice(WORDS, n)) for i,n in enumerate(rng.integers(6, 13, 40))]
VALID = [i >= 28 for i in range(40)]


@pytest.fixture(scope='module')
def blurr():
    "blurr, alive, with its faults mended"
    changed = enable_blurr()
    assert len(changed)
    yield changed
    disable_blurr()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Folders of small models with their tokenizers"
    root = tmp_path_factory.mktemp('models')
    torch.manual_seed(0)
    from tokenizers import BertWordPieceTokenizer, processors
    wp = BertWordPieceTokenizer()
    wp.train_from_iterator(TEXTS, vocab_size=120, show_progress=False)
    wp._tokenizer.post_processor = processors.BertProcessing(*[(t, wp.token_to_id(t)) for t in ('[SEP]','[CLS]')])
    tok = tf.PreTrainedTokenizerFast(tokenizer_object=wp._tokenizer, model_max_length=64, pad_token='[PAD]', unk_token='[UNK]', cls_token='[CLS]', sep_token='[SEP]', mask_token='[MASK]', model_input_names=['input_ids','token_type_ids','attention_mask'])
    save(root/'bert', tok, tf.BertForMaskedLM(tf.BertConfig(vocab_size=len(tok), hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, max_position_embeddings=64, pad_token_id=tok.pad_token_id)))
    tok = train_tokenizer(TEXTS, 300, 'decoder', max_length=64)
    save(root/'tiny-gpt2', tok, tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=len(tok), n_embd=16, n_layer=3, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)))
    tok = train_tokenizer(TEXTS, 300, 'seq2seq', max_length=64)
    save(root/'t5', tok, tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=len(tok), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2)))
    return root


def save(path, tok, model): tok.save_pretrained(path); model.save_pretrained(path)


def table():
    return pd.DataFrame(dict(text=TEXTS, label=[['neg','pos'][i%2] for i in range(40)], a=[i%2 for i in range(40)], b=[int(i%3==0) for i in range(40)],
                             value=[float(i%2) for i in range(40)], summary=[' '.join(t.split()[:3]) for t in TEXTS], is_valid=VALID))


def tag(w): return 'B-LOC' if w in ('Paris','London') else 'B-PER' if w in ('Anna','Ben') else 'B-ORG' if w == 'Acme' else 'O'


def make(task, folder, **kwargs):
    "A Learner as blurr's documentation makes it"
    from blurr.text.data.all import TextBlock, QAPreprocessor, BertMLMStrategy
    from blurr.text.modeling import all as bl
    from blurr.text.utils import get_hf_objects
    from blurr.utils import PreCalculatedMSELoss
    kw,df,path = dict(dl_kwargs=dict(bs=8)),table(),str(folder/('tiny-gpt2' if task == 'causal_lm' else 't5' if task in ('summarization','translation') else 'bert'))
    if kwargs: kw['learner_kwargs'] = kwargs
    if task == 'single': return bl.BlearnerForSequenceClassification.from_data(df, path, **kw)
    if task == 'multi': return bl.BlearnerForSequenceClassification.from_data(df, path, label_attr=['a','b'], **kw)
    if task == 'regression':
        *hf,model = get_hf_objects(path, model_cls=tf.AutoModelForSequenceClassification, config_kwargs=dict(num_labels=1))
        dls = DataBlock((TextBlock(*hf, model), RegressionBlock), get_x=ColReader('text'), get_y=ColReader('value'), splitter=ColSplitter()).dataloaders(df, bs=8)
        return bl.Blearner(dls, model, loss_func=PreCalculatedMSELoss(), metrics=rmse, **kwargs)
    if task == 'tagging':
        df['tokens'] = [t.split() for t in TEXTS]
        df['token_labels'] = [[tag(w) for w in ws] for ws in df.tokens]
        kw['learner_kwargs'] = dict(cbs=[bl.BlearnerForTokenClassification.get_metrics_cb()], **kwargs)
        return bl.BlearnerForTokenClassification.from_data(df, path, **kw)
    if task == 'qa':
        tok = get_hf_objects(path, model_cls=tf.AutoModelForQuestionAnswering)[2]
        rows = [dict(id=str(i), context=f'{t} Anna lives in {c}', question='where lives Anna', answer_text=c, is_valid=v) for i,(t,v) in enumerate(zip(TEXTS, VALID)) for c in [['Paris','London'][i%2]]]
        df = QAPreprocessor(tok, id_attr='id', tok_kwargs=dict(return_overflowing_tokens=True, max_length=64, stride=8)).process_df(pd.DataFrame(rows))
        assert df.is_answerable.all()
        return bl.BlearnerForQuestionAnswering.from_data(df, path, max_seq_len=64, id_attr='id', **kw)
    if task in ('causal_lm','masked_lm'):
        kw['learner_kwargs'] = dict(cbs=[bl.BlearnerForLM.get_metrics_cb()], **kwargs)
        return bl.BlearnerForLM.from_data(df, path, **({'lm_strategy_cls': BertMLMStrategy} if task == 'masked_lm' else {}), **kw)
    if task == 'summarization': return bl.BlearnerForSummarization.from_data(df, path, max_length=32, max_target_length=8, **kw)
    return bl.BlearnerForTranslation.from_data(df, path, src_lang_name='English', src_lang_attr='text', trg_lang_name='German', trg_lang_attr='summary', max_length=32, max_target_length=8, **kw)


def ask(task, learn):
    "What blurr predicts or writes"
    if task in ('single','multi','regression'): return learn.blurr_predict(TEXTS[:3])
    if task == 'tagging': return learn.blurr_predict_tokens(TEXTS[:2])
    if task == 'qa': return learn.blurr_predict_answers(dict(question='where lives Anna', context=f'{TEXTS[0]} Anna lives in Paris'))
    if task == 'masked_lm': return learn.blurr_fill_mask('the film is [MASK]', n_preds=2)
    if task == 'causal_lm': return learn.blurr_generate('the film is', max_new_tokens=6, do_sample=False)
    return getattr(learn, 'blurr_summarize' if task == 'summarization' else 'blurr_translate')(TEXTS[0], max_new_tokens=6, num_beams=2)


def quiet(learn, f):
    with learn.no_bar(), learn.no_logging(): return f()


def shown(monkeypatch, f):
    "The tables that `f` displays"
    tables = []
    for m in [m for n,m in sys.modules.items() if n.startswith('blurr.') and hasattr(m, 'display_df')]: monkeypatch.setattr(m, 'display_df', tables.append)
    f()
    return tables


@needs_blurr
@each_task
def test_lives(task, blurr, folder, tmp_path, monkeypatch):
    "Training, freezing, the finder of rates, the show methods, prediction, export and load"
    learn = make(task, folder)
    learn.path = tmp_path
    batch, = shown(monkeypatch, lambda: learn.dls.show_batch(dataloaders=learn.dls, max_n=2))
    assert len(batch) == 2 and any(w in str(batch.iloc[0, 0]) for w in WORDS)
    learn.freeze_to(-1)     # before any training: fastai's own optimizers decay what is frozen later
    top = {id(p) for p in learn.opt.param_lists[-1]}
    weights = {n: p.detach().clone() for n,p in learn.model.named_parameters()}
    quiet(learn, lambda: learn.fit_one_cycle(1, slice(1e-5, 1e-2)))
    moved = {n for n,p in learn.model.named_parameters() if not torch.equal(p, weights[n])}
    assert moved and all(id(p) in top or 'norm' in n.lower() or 'ln_' in n for n,p in learn.model.named_parameters() if n in moved)
    learn.unfreeze()
    before = float(quiet(learn, lambda: learn.validate(ds_idx=0))[0])
    quiet(learn, lambda: learn.fit(5, 1e-2))
    assert float(quiet(learn, lambda: learn.validate(ds_idx=0))[0]) < before
    rate, = quiet(learn, lambda: learn.lr_find(num_it=5, suggest_funcs=[minimum], show_plot=False))
    assert 1e-9 < rate < 10
    results = shown(monkeypatch, lambda: quiet(learn, lambda: learn.show_results(learner=learn, max_n=2)))[-1]
    assert len(results) == (1 if task in ('summarization','translation') else 2) and results.shape[1] > batch.shape[1] - (task == 'tagging')
    said = ask(task, learn)
    learn.export('old.pkl')
    assert ask(task, load_learner(tmp_path/'old.pkl')) == said


@needs_blurr
@each_task
def test_is_a_learner(task, blurr, folder):
    "Our splitter, optimizer, gradual unfreezing and evaluation on a blurr Learner"
    learn = make(task, folder, splitter=layer_splitter(), opt_func=LayerwiseOptimizer)
    hf = unwrap_model(learn.model)
    assert hf is learn.model.hf_model and foreign_parts(learn).tokenizer is first_tfm(learn).hf_tokenizer
    groups = layer_groups(learn.model)
    assert [g.name for g in groups] == [g.name for g in layer_groups(hf)] and len(groups) >= 4
    assert sorted(id(p) for g in groups for p in g.params) == sorted(map(id, learn.model.parameters()))     # each once
    assert len(execution_order(learn.model, strict=True)) == len(execution_order(hf))
    learn.opt.set_hyper('wd', .1)
    learn.opt.wd_mults,learn.opt.lr_mults = dict(norm=0, bias=0),dict(bias=2.)
    cb = GradualUnfreezing(every=1, groups=[1, 2, len(groups)])
    quiet(learn, lambda: learn.fit(3, 1e-2, cbs=cb))
    assert cb.table().groups.tolist() == [1, 2, len(groups)]
    by_kind = {k: g['lr'] for g,(i,k) in zip(learn.opt.param_groups, learn.opt.where) if i == len(groups)-1}
    if 'bias' in by_kind and len(by_kind) > 1: assert by_kind['bias'] == pytest.approx(2*min(by_kind.values()))
    done = quiet(learn, lambda: learn.fit_gradual(epochs=[1]*3, groups=[1, 2, len(groups)], lr=1e-3))
    assert done.table().params.is_monotonic_increasing
    if task in CLASSES: check_evaluation(task, learn)
    if task in ('causal_lm','summarization','translation'):
        assert len(learn.generate(['the film is'], max_new_tokens=5)) == 1
    if task in ('causal_lm','masked_lm'): check_perplexity(task, learn, hf)


def first_tfm(learn): return next(f for f in learn.dls.before_batch.fs if hasattr(f, 'hf_tokenizer'))


def check_evaluation(task, learn):
    "Against blurr's own predictions and scikit-learn"
    ev,df = quiet(learn, learn.evaluate),table()[VALID]
    said = learn.blurr_predict(df.text.tolist())
    if task == 'regression':
        np.testing.assert_allclose(ev.preds, [r['value'] for r in said], atol=1e-5)
        np.testing.assert_allclose(ev.losses.mean(), mean_squared_error(df.value, ev.preds), rtol=1e-4)
        return
    np.testing.assert_allclose(ev.probs, [r['probs'] for r in said], atol=1e-5)
    assert ev.texts == df.text.tolist() or ev.texts is None
    if task == 'single':
        assert [ev.classes[i] for i in ev.preds] == [r['label'] for r in said]
        assert ev.report(level=None).loc['accuracy'].dropna().iloc[0] == pytest.approx(accuracy_score(df.label, [r['label'] for r in said])) if 'accuracy' in ev.report(level=None).index else True
    else: assert ev.targets.tolist() == df[['a','b']].values.tolist() and ev.classes == ['a','b']


def check_perplexity(task, learn, hf):
    "A causal model's against transformers' own loss"
    res = learn.perplexity(TEXTS[:2])
    assert len(res) == 2 and 1 < float(res) < 5000
    if task != 'causal_lm': return
    tok = first_tfm(learn).hf_tokenizer
    ids = torch.tensor([tok(TEXTS[0])['input_ids']])
    with torch.no_grad(): loss = hf.eval()(ids, labels=ids).loss
    assert calculate_perplexity(TEXTS[0], learn) == pytest.approx(float(loss.exp()), rel=1e-4)


def raw(out): return [out.start_logits, out.end_logits] if hasattr(out, 'start_logits') else [out.logits]


def row_logits(learn, native):
    "Logits of each validation row, in the order of the dataset, without padding"
    dl,res = learn.dls.valid.new(shuffle=False),[]
    with torch.no_grad():
        for b in dl:
            if native:
                x = b[0].as_subclass(TensorTokens)
                out = learn.model(x)
                res += [[o[m.bool()] if o.ndim>1 and o.shape[1]==x.shape[-1] else o for o in row] for row,m in zip(zip(*(out if isinstance(out, tuple) else (out,))), x.mask)] if task_of(learn) in ('tagging','qa') else [[o] for o in out]
            else:
                mask,out = b[0]['attention_mask'].clone(),raw(learn.model(dict(b[0])))
                res += [[o for o in row] for row in zip(*out)]
    return [res[i] for i in np.argsort(list(dl.get_idxs()))]


def task_of(learn): return task_of_class(type(unwrap_model(learn.model)).__name__)


def same(a, b):
    "Equal over what both have: padding differs"
    n = min(len(a), len(b))
    a,b = a[:n].as_subclass(torch.Tensor),b[:n].as_subclass(torch.Tensor)
    seen = b > torch.finfo(b.dtype).min/8     # places outside the passage are masked in a native model
    assert seen.any()
    torch.testing.assert_close(a[seen], b[seen], atol=1e-6, rtol=0)


@needs_blurr
@each_task
def test_from_blurr(task, blurr, folder):
    "Rows, labels and predictions of the native Learner are those of blurr's, to 1e-6"
    learn = make(task, folder)
    learn.unfreeze()
    quiet(learn, lambda: learn.fit(1, 1e-2))
    new = from_blurr(learn)
    assert type(new).__module__.startswith('fastai_tl.') and new.model.hf is learn.model.hf_model
    learn.model.eval(); new.model.eval()
    if task in CLASSES:
        assert len(new.dls.train_ds) == 28 and len(new.dls.valid_ds) == 12
        a,b = (quiet(l, l.get_preds) for l in (learn, new))
        torch.testing.assert_close(a[0].as_subclass(torch.Tensor), b[0].as_subclass(torch.Tensor), atol=1e-6, rtol=0)
        torch.testing.assert_close(a[1].as_subclass(torch.Tensor).float().flatten(), b[1].as_subclass(torch.Tensor).float().flatten())
        assert row_texts(new.dls.valid) == table()[VALID].text.tolist()
        if task == 'single': assert quiet(new, lambda: new.predict(TEXTS[0]))[0] == learn.blurr_predict(TEXTS[0])[0]['label']
    elif task in ('tagging','qa'):
        for a,b in zip(row_logits(learn, False), row_logits(new, True)):
            for x,y in zip(a, b): same(x, y)
        if task == 'tagging': assert list(new.dls.vocab) == list(learn.dls.vocab)
        else: assert {e.answers[0] for e in new.dls.tok.examples} == {'Paris','London'} or {e.answers[0].lower() for e in new.dls.tok.examples} == {'paris','london'}
    else:
        ids = torch.tensor([first_tfm(learn).hf_tokenizer(TEXTS[0])['input_ids']])
        x = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
        args = [TensorTokens(ids[:,None])]
        if task in ('summarization','translation'): x['decoder_input_ids'] = ids; args.append(TensorTokens(ids[:,None]))
        with torch.no_grad(): torch.testing.assert_close(learn.model(x).logits, new.model(*args), atol=1e-6, rtol=0)
        if task in ('summarization','translation'): assert new.predict(TEXTS[0], max_new_tokens=6, num_beams=2) == list(ask(task, learn)[0].values())[0]
        if task == 'causal_lm': assert new.predict('the film is', max_new_tokens=6, do_sample=False) == ask(task, learn)[0]['generated_texts']
    before = float(quiet(new, new.validate)[0])
    quiet(new, lambda: new.fit_gradual(epochs=[1, 1], groups=[1, len(layer_groups(new.model))], lr=1e-3))
    assert np.isfinite(float(quiet(new, new.validate)[0])) and float(quiet(new, new.validate)[0]) < before*1.5
    assert len(quiet(new, new.evaluate)) > 0 if task in (*CLASSES,'tagging','qa') else True


@needs_blurr
@each_task
def test_export_comes_over(task, blurr, folder, tmp_path):
    "A pickle of blurr's becomes a native Learner that predicts the same without its data"
    learn = make(task, folder)
    learn.path = tmp_path
    learn.export('old.pkl')
    with pytest.raises(FastaiTLError, match='runs code'): from_blurr_export(tmp_path/'old.pkl')
    new = from_blurr_export(tmp_path/'old.pkl', trust=True)
    assert new.model.hf is not learn.model.hf_model
    for (n,a),(m,b) in zip(learn.model.hf_model.state_dict().items(), new.model.hf.state_dict().items()): assert n == m and torch.equal(a, b)
    if task in ('single','multi','regression'):
        with learn.no_bar(): a = learn.get_preds(dl=learn.dls.test_dl(TEXTS[:5]))[0]
        with new.no_bar(): b = new.get_preds(dl=new.dls.test_dl(TEXTS[:5]))[0]
        torch.testing.assert_close(a.as_subclass(torch.Tensor), b.as_subclass(torch.Tensor), atol=1e-6, rtol=0)
    if task == 'causal_lm': assert new.predict('the film is', max_new_tokens=6, do_sample=False) == ask(task, learn)[0]['generated_texts']
    if task == 'tagging': assert set(new.tag(TEXTS[:1])[0].tags) <= set(learn.dls.vocab)
    if task == 'qa': assert new.answer('where lives Anna', TEXTS[0]) is not None


@needs_blurr
def test_older_shape(blurr, folder):
    "Learner(dls, HF_BaseModelWrapper(model), cbs=[HF_BaseModelCallback]), as blurr 0.x had it"
    from blurr.text.modeling.core import BaseModelCallback, BaseModelWrapper, blurr_splitter
    class HF_BaseModelWrapper(BaseModelWrapper): pass
    class HF_BaseModelCallback(BaseModelCallback): pass
    first = make('single', folder)
    learn = Learner(first.dls, HF_BaseModelWrapper(first.model.hf_model), loss_func=CrossEntropyLossFlat(), cbs=[HF_BaseModelCallback], splitter=blurr_splitter, metrics=accuracy)
    quiet(learn, lambda: learn.fit_gradual(epochs=[1, 1], groups=[1, 2], lr=1e-3))
    assert 'layer.2' in ' '.join(learn.layer_table().layers)
    ev = quiet(learn, learn.evaluate)
    assert len(ev) == 12 and ev.classes == ['neg','pos']
    a,b = (quiet(l, l.get_preds)[0] for l in (learn, from_blurr(learn)))
    torch.testing.assert_close(a.as_subclass(torch.Tensor), b.as_subclass(torch.Tensor), atol=1e-6, rtol=0)


# --- blurr's faults: each as it is, and as it is mended ---

@pytest.fixture(params=[False, True], ids=['as it is', 'mended'])
def mended(request, blurr):
    if request.param: yield True; return
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
    cb.results = [(['B-X','O','O'], ['B-X','O','B-X'])]     # predicted, true
    cb.after_validate()
    got = cb.custom_metrics_dict['precision'],cb.custom_metrics_dict['recall']
    assert got == ((1., .5) if mended else (.5, 1.))
    assert cb.results == [(['B-X','O','O'], ['B-X','O','B-X'])]


@needs_blurr
def test_encoder_is_not_one_group(mended, folder):
    learn = make('single', folder)
    assert len(learn.opt.param_lists) == (5 if mended else 4)     # embeddings, encoder, pooler, classifier; or embeddings, three layers, head
    held = [sum('encoder' in n for n,p in learn.model.named_parameters() if any(p is q for q in g)) for g in learn.opt.param_lists]
    assert max(held) == (16 if mended else 48)
    quiet(learn, lambda: learn.fit_gradual(epochs=[1, 1, 1], groups=[1, 2, 5], lr=1e-3))     # in both cases the layers one by one
    assert len(learn.opt.param_lists) == 5


@needs_blurr
def test_tied_weight_is_stepped_once(mended, folder):
    learn = make('causal_lm', folder)
    tied = learn.model.hf_model.lm_head.weight
    assert sum(p is tied for g in learn.opt.param_lists for p in g) == (1 if mended else 2)
    from torch.optim import SGD
    learn.unfreeze()
    before = tied.detach().clone()
    learn.opt_func = functools.partial(OptimWrapper, opt=SGD) if mended else learn.opt_func
    if not mended: return
    learn.create_opt(); learn.unfreeze()
    tied.grad = torch.ones_like(tied)
    learn.opt.set_hyper('lr', .5); learn.opt.step()
    torch.testing.assert_close(tied.detach(), before-.5)


@needs_blurr
def test_defaults_do_not_leak(mended, folder):
    "The metrics of a single-label Learner do not turn up in a multi-label one"
    from blurr.text.modeling.core import BlearnerForSequenceClassification as B
    for _ in range(1): make('single', folder)
    names = [m.name for m in make('multi', folder).metrics]
    if mended: assert 'accuracy_multi' in names
    else:
        assert 'accuracy' in names and 'accuracy_multi' not in names
        next(d for d in B.from_data.__func__.__defaults__ if isinstance(d, dict) and d).clear()


@needs_blurr
def test_files_can_be_read(mended, folder, tmp_path):
    from blurr.text.modeling.core import BlearnerForSequenceClassification as B
    table().to_csv(tmp_path/'data.csv', index=False)
    if mended: assert len(B.from_data(tmp_path/'data.csv', str(folder/'bert')).dls.valid_ds) == sum(VALID)
    else:
        with pytest.raises(ValueError): B.from_data(str(tmp_path/'data.csv'), str(folder/'bert'))


@needs_blurr
def test_labels_are_whole(mended, folder):
    labels = {r['label'] for r in make('single', folder).blurr_predict(TEXTS)}
    assert labels <= ({'neg','pos'} if mended else {'n','p'}) and labels


# --- what is put back, and taken away ---

@needs_blurr
def test_changes_are_listed_and_undone():
    "In a fresh process: nothing is changed before, each change is listed, and none is left after"
    res = python('''
import fastcore.all, pandas as pd, transformers as tf, datasets, nltk, nltk.tokenize, sys
from fasttransform import Pipeline
from fastai.learner import Learner
from fastai_tl.interop.blurr import enable_blurr, disable_blurr
import fastai.text.all
from fastai_tl.interop import blurr_compat
blurr_compat.is_available = lambda name: False     # as if seqeval were not installed
owners = [fastcore.all, pd.DataFrame, tf.PreTrainedConfig, tf.PreTrainedTokenizerBase, datasets, nltk, nltk.tokenize, Pipeline, Learner]
def state(): return [{k: id(v) for k,v in vars(o).items() if not k.startswith('__')} for o in owners]
before = state()
made = enable_blurr(mend=False)
assert not any(m.startswith('blurr.text.modeling.') for m in sys.modules)
for name in ('fastcore.all.typedispatch', 'DataFrame.append', 'PreTrainedConfig.get', 'datasets.load_metric', 'Pipeline.add'): assert name in set(made.what), made
assert len(enable_blurr(mend=False)) == len(made)
with_mends = enable_blurr()
assert len(with_mends) > len(made)
import blurr.text.modeling.all as bl
assert bl.blurr_splitter.by_layers
import blurr.text.modeling.token_classification as tc
true,pred = [['B-X','O','B-X']],[['B-X','O','O']]
assert [tc.calculate_token_class_metrics(pred, true, k) for k in ('accuracy','precision','recall')] == [2/3, 1, 1/2]
assert tc.seq_metrics.__spec__ is None and 'X' in tc.calculate_token_class_metrics(pred, true, 'classification_report')
disable_blurr()
assert 'seqeval' not in sys.modules
assert not hasattr(bl.blurr_splitter, 'by_layers')
after = state()
for o,a,b in zip(owners, before, after):
    new = {k for k in b if a.get(k) != b[k]} - {k for k in vars(o) if k.startswith('blurr_')}
    assert not new, (o, new)
print('undone')
''')
    assert res.returncode == 0 and 'undone' in res.stdout, res.stdout


def test_all_leaves_blurr_alone():
    "Importing everything neither imports blurr nor changes what it would need"
    res = python('''
import sys, fastcore.all, pandas as pd
from fasttransform import Pipeline
add = Pipeline.add
from fastai_tl.all import (FastaiTLError, GradualUnfreezing, LayerwiseOptimizer, calculate_perplexity, disable_blurr, enable_blurr, execution_order, from_blurr, from_blurr_export,
                           layer_groups, layer_splitter, row_texts, train_tokenizer)
assert callable(enable_blurr) and callable(from_blurr)
assert not [m for m in sys.modules if m.split('.')[0] in ('blurr','datasets','nltk','seqeval')], sorted(sys.modules)
assert Pipeline.add is add and not hasattr(fastcore.all, 'typedispatch') and not hasattr(pd.DataFrame, 'append')
print('alone')
''')
    assert res.returncode == 0 and 'alone' in res.stdout, res.stdout


def test_says_how_to_install():
    res = python('''
import sys, importlib.abc
class Without(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'blurr': raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Without())
from fastai_tl.interop.blurr import enable_blurr
try: enable_blurr()
except ImportError as e: print(e)
''')
    assert 'pip install --no-deps ohmeow-blurr==1.0.5' in res.stdout, res.stdout


def test_native_learners_are_refused():
    from fastai.test_utils import synth_learner
    with pytest.raises(FastaiTLError, match='made with blurr'): from_blurr(synth_learner())


# --- the page that shows the way ---

def page():
    cells = json.loads((NBS/'tutorials'/'from_blurr.ipynb').read_text(encoding='utf-8'))['cells']
    return [''.join(c['source']) for c in cells if c['cell_type'] == 'markdown']


def test_page_shows_the_flows():
    "The tables are those that benchmarks/blurr_flows/run.py has written"
    found = json.loads((ROOT/'benchmarks'/'blurr_flows'/'results'/'flows.json').read_text())
    text = '\n'.join(page())
    for name,cells in found['flows'].items():
        assert f'**{name}**: {sum(c["passes"] for c in cells)} of {len(cells)} cells pass' in text
        for c in cells: assert f'| {c["cell"]} | {"yes" if c["passes"] else "no: "}' in text
    assert all(v in text for v in found['versions'].values())


def test_page_names_what_exists():
    "Each name on the right of the table is there"
    import fastai.text.all as ft, fastai_tl.all as all_
    rows = [l.split('|')[2] for t in page() if t.startswith('## Write it natively') for l in t.splitlines() if l.startswith('| ') and '---' not in l]
    names = {n for r in rows for code in re.findall('`([^`]*)`', r) for n in re.findall(r'(?<![\w.\'"])([A-Za-z]\w+)(?=\(|\.from|$)', code) if n != 'True' and (not n.islower() or '_' in n)}
    assert len(names) > 20
    missing = {n for n in names if not hasattr(all_, n) and not hasattr(ft, n)}
    assert not missing, missing
    methods = {m for r in rows for m in re.findall(r'learn\.([a-z_]+)\(', r)}
    from fastai_tl.learners.tagging import HFTagger; from fastai_tl.learners.qa import HFAnswerer; from fastai_tl.learners.seq2seq import HFSeq2SeqLearner
    assert not {m for m in methods if not any(hasattr(c, m) for c in (HFTagger, HFAnswerer, HFSeq2SeqLearner))}


# --- together with modules that may be there or not ---

@needs_blurr
@pytest.mark.skipif(importlib.util.find_spec('fastai_tl.deploy') is None or importlib.util.find_spec('fastai_tl.deploy.bundle') is None, reason='fastai_tl.deploy.bundle is not there')
def test_bundle(blurr, folder, tmp_path):
    "Saved without a pickle, by way of the native Learner"
    from fastai_tl.deploy.bundle import load_bundle
    learn = make('single', folder)
    from_blurr(learn).save_bundle(tmp_path/'bundle')
    want = [r['probs'] for r in learn.blurr_predict(TEXTS[:4])]
    np.testing.assert_allclose(load_bundle(tmp_path/'bundle').predict_proba(TEXTS[:4]), want, atol=1e-5)


@needs_blurr
@pytest.mark.skipif(importlib.util.find_spec('fastai_tl.efficiency.feature_cache') is None, reason='fastai_tl.efficiency.feature_cache is not there')
def test_cache(blurr, folder):
    "Gradual unfreezing with the frozen layers' outputs kept"
    importlib.import_module('fastai_tl.efficiency.feature_cache')
    learn = from_blurr(make('single', folder))
    quiet(learn, lambda: learn.fit_gradual(epochs=[2, 1], groups=[1, 5], lr=1e-3, cache=True))
    assert np.isfinite(float(quiet(learn, learn.validate)[0]))
