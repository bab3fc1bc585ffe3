"""The main flows of blurr 1.0.5's documentation, cell by cell, with `enable_blurr()` on small local models.

    pip install -e ".[dev,blurr]" && pip install --no-deps ohmeow-blurr==1.0.5
    python benchmarks/blurr_flows/run.py

What each cell of blurr's notebooks does is written here anew, in the same order and with the same calls; data sets and models from the hub are
replaced by a table of 60 made-up sentences and models of a few thousand weights. Writes blurr_flows.json and blurr_flows.md beside this file."""

import contextlib, io, json, os, sys, tempfile, warnings
from importlib.metadata import version
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false', MPLBACKEND='Agg')
warnings.filterwarnings('ignore')
HERE = Path(__file__).resolve().parent

from fastai_tl.interop.blurr import enable_blurr

SETUP = '''
import numpy as np, pandas as pd, tempfile, transformers, torch
from pathlib import Path
from fastai_tl.data.hf_tokenizer import train_tokenizer
from tokenizers import BertWordPieceTokenizer, processors
transformers.utils.logging.disable_progress_bar()
words = 'good bad fine awful lovely poor great dull the film is was very quite a story and music Paris London Anna Ben lives in works at Acme'.split()
rng = np.random.default_rng(0)
texts = [' '.join(rng.choice(words, n)) for n in rng.integers(8, 15, 60)]
folder = Path(tempfile.mkdtemp())
torch.manual_seed(0)
wp = BertWordPieceTokenizer(); wp.train_from_iterator(texts, vocab_size=120, show_progress=False)
wp._tokenizer.post_processor = processors.BertProcessing(*[(t, wp.token_to_id(t)) for t in ('[SEP]','[CLS]')])
tok = transformers.PreTrainedTokenizerFast(tokenizer_object=wp._tokenizer, model_max_length=64, pad_token='[PAD]', unk_token='[UNK]', cls_token='[CLS]', sep_token='[SEP]', mask_token='[MASK]', model_input_names=['input_ids','token_type_ids','attention_mask'])
bert = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=len(tok), hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, max_position_embeddings=64, pad_token_id=tok.pad_token_id))
tok.save_pretrained(folder/'bert'); bert.save_pretrained(folder/'bert')
gtok = train_tokenizer(texts, 300, 'decoder', max_length=64)
gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=len(gtok), n_embd=16, n_layer=3, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0))
gtok.save_pretrained(folder/'gpt2'); gpt2.save_pretrained(folder/'gpt2')
'''

IMPORTS = '''
from datasets import Dataset, concatenate_datasets
from transformers import *
from transformers.utils import logging as hf_logging
from fastai.text.all import *
from blurr.text.data.all import *
from blurr.text.modeling.all import *
from blurr.text.utils import *
from blurr.utils import *
'''

FLOWS = {
    'Classification (11_text-modeling-core, 99a high-level API)': [
        ('imports', IMPORTS),
        ('versions and seed', "print_versions('torch fastai transformers'); set_seed()"),
        (
            'raw data as a table',
            "df = pd.DataFrame(dict(text=texts, label=[i%2 for i in range(60)], is_valid=[i>=44 for i in range(60)])); labels = ['neg','pos']",
        ),
        (
            '`ClassificationPreprocessor.process_df`',
            "pre = ClassificationPreprocessor(tok, label_mapping=labels, tok_kwargs=dict(max_length=32)); proc = pre.process_df(df); assert {'proc_text','label_name'} <= set(proc.columns) and len(proc)==60",
        ),
        (
            '`ClassificationPreprocessor.process_hf_dataset`',
            "ds = ClassificationPreprocessor(tok).process_hf_dataset(Dataset.from_pandas(df[['text','label']][:40], preserve_index=False), Dataset.from_pandas(df[['text','label']][40:], preserve_index=False)); assert len(ds)==60",
        ),
        (
            '`get_hf_objects`',
            "hf_arch, hf_config, hf_tokenizer, hf_model = get_hf_objects(str(folder/'bert'), model_cls=AutoModelForSequenceClassification); assert hf_arch=='bert'",
        ),
        (
            '`TextBlock` and `DataBlock`',
            "dblock = DataBlock(blocks=(TextBlock(hf_arch, hf_config, hf_tokenizer, hf_model, batch_tokenize_kwargs={'labels': labels}), CategoryBlock), get_x=ColReader('text'), get_y=ColReader('label'), splitter=RandomSplitter(seed=42))",
        ),
        ('`dblock.summary`', "dblock.summary(df)"),
        (
            'DataLoaders',
            "dls = dblock.dataloaders(df, bs=4); b = dls.one_batch(); assert b[0]['input_ids'].shape[0]==4",
        ),
        ('`show_batch`', "dls.show_batch(dataloaders=dls, max_n=2, trunc_at=500)"),
        (
            '`Learner` with `BaseModelWrapper`, `freeze`',
            "learn = Learner(dls, BaseModelWrapper(hf_model), opt_func=partial(OptimWrapper, opt=torch.optim.Adam), loss_func=PreCalculatedCrossEntropyLoss(), metrics=[accuracy], cbs=[BaseModelCallback], splitter=blurr_splitter); learn.freeze()",
        ),
        ('`learn.summary`', "learn.summary()"),
        ('forward pass by hand', "preds = learn.model(dls.one_batch()[0]); assert preds.logits.shape==(4, 2)"),
        ('`lr_find`', "learn.lr_find(suggest_funcs=[minimum, steep, valley, slide], num_it=40, show_plot=False)"),
        ('`fit_one_cycle`', "learn.fit_one_cycle(1, lr_max=1e-3)"),
        ('`show_results`', "learn.show_results(learner=learn, max_n=2, trunc_at=500)"),
        (
            '`unfreeze`, `lr_find`, `fit_one_cycle` with a slice',
            "learn.unfreeze(); learn.lr_find(num_it=40, show_plot=False); learn.fit_one_cycle(2, lr_max=slice(1e-5, 1e-3))",
        ),
        ('`recorder.plot_loss`', "learn.recorder.plot_loss()"),
        (
            '`blurr_predict` of one text and of several',
            "r = learn.blurr_predict('a good film'); assert r[0]['label'] in labels; assert len(learn.blurr_predict(texts[:3]))==3",
        ),
        ('`learn.get_preds`', "p, t = learn.get_preds(); assert p.shape[1]==2"),
        (
            'export, `load_learner`, predict',
            "learn.path = folder; learn.export('clas.pkl'); inf = load_learner(folder/'clas.pkl'); assert inf.blurr_predict('a good film')==learn.blurr_predict('a good film')",
        ),
        (
            'loss by fastai, labels not in the inputs',
            "b2 = DataBlock(blocks=(TextBlock(hf_arch, hf_config, hf_tokenizer, hf_model, include_labels=False), CategoryBlock), get_x=ColReader('text'), get_y=ColReader('label'), splitter=RandomSplitter(seed=42)).dataloaders(df, bs=4); l2 = Blearner(b2, hf_model, metrics=accuracy); l2.fit(1)",
        ),
        (
            '`GradientCheckpointing`',
            "from blurr.callbacks import GradientCheckpointing; learn.fit(1, cbs=GradientCheckpointing())",
        ),
        (
            'high level: from a Dataset, with `IndexSplitter`',
            "l = BlearnerForSequenceClassification.from_data(Dataset.from_pandas(df[['text','label']]), str(folder/'bert'), text_attr='text', label_attr='label', dblock_splitter=IndexSplitter(L(range(44, 60))), dl_kwargs={'bs': 4, 'val_bs': 8}, learner_kwargs={'metrics': [accuracy]}); l.fit_one_cycle(1, lr_max=2e-3); l.show_results(learner=l, max_n=2)",
        ),
        (
            'high level: two texts',
            "df2 = df.assign(second=texts[::-1]); l = BlearnerForSequenceClassification.from_data(df2, str(folder/'bert'), text_attr=['text','second'], label_attr='label', dl_kwargs={'bs': 4}); l.dls.show_batch(dataloaders=l.dls, max_n=2); l.fit_one_cycle(1, lr_max=2e-3); l.show_results(learner=l, max_n=2)",
        ),
        ('high level: two texts, `predict`', "l.predict([('a good film', 'a bad film')])"),
        (
            'high level: several labels',
            "df3 = df.assign(toxic=[i%2 for i in range(60)], rude=[int(i%3==0) for i in range(60)]); l = BlearnerForSequenceClassification.from_data(df3, str(folder/'bert'), label_attr=['toxic','rude'], dl_kwargs={'bs': 4}); l.fit_one_cycle(1, lr_max=2e-3); l.show_results(learner=l, max_n=2); l.predict('a good film')",
        ),
        (
            'high level: a CSV file',
            "df.to_csv(folder/'d.csv', index=False); BlearnerForSequenceClassification.from_data(str(folder/'d.csv'), str(folder/'bert'))",
        ),
        (
            'low level: `preproc_hf_dataset` and `TextDataLoader`',
            "raw = Dataset.from_pandas(df[['text','label']]).map(lambda e: hf_tokenizer(e['text'], truncation=True), batched=True); tdl = TextDataLoader(raw.select(range(44)), hf_arch, hf_config, hf_tokenizer, hf_model, preproccesing_func=preproc_hf_dataset, bs=4, shuffle=True); vdl = TextDataLoader(raw.select(range(44, 60)), hf_arch, hf_config, hf_tokenizer, hf_model, preproccesing_func=preproc_hf_dataset, bs=8); ldls = DataLoaders(tdl, vdl); ll = Learner(ldls, BaseModelWrapper(hf_model), loss_func=PreCalculatedCrossEntropyLoss(), cbs=[BaseModelCallback], splitter=blurr_splitter); ll.fit(1)",
        ),
        ('`BlurrText`', "NLP = BlurrText(); assert 'bert' in NLP.get_architectures()"),
    ],
    'Tagging (13_text-data- and 13_text-modeling-token-classification)': [
        ('imports', IMPORTS),
        (
            'raw data as a table',
            "names = ['O','B-PER','B-LOC','B-ORG']; kind = dict(Paris='B-LOC', London='B-LOC', Anna='B-PER', Ben='B-PER', Acme='B-ORG'); tdf = pd.DataFrame(dict(tokens=[t.split() for t in texts], labels=[[kind.get(w, 'O') for w in t.split()] for t in texts], is_valid=[i>=44 for i in range(60)]))",
        ),
        (
            '`TokenClassPreprocessor`',
            "proc = TokenClassPreprocessor(tok, label_names=names, tok_kwargs=dict(max_length=32)).process_df(tdf); assert len(proc)==60 and 'proc_tokens' in proc",
        ),
        (
            '`get_hf_objects` with the labels',
            "config = AutoConfig.from_pretrained(str(folder/'bert')); config.num_labels = len(names); hf_arch, hf_config, hf_tokenizer, hf_model = get_hf_objects(str(folder/'bert'), model_cls=AutoModelForTokenClassification, config=config)",
        ),
        (
            '`TokenClassBatchTokenizeTransform`, `TokenCategoryBlock`',
            "btt = TokenClassBatchTokenizeTransform(hf_arch, hf_config, hf_tokenizer, hf_model); dblock = DataBlock(blocks=(TextBlock(batch_tokenize_tfm=btt, input_return_type=TokenClassTextInput), TokenCategoryBlock(vocab=names)), get_x=ColReader('tokens'), get_y=ColReader('labels'), splitter=ColSplitter())",
        ),
        ('`dblock.summary`', "dblock.summary(tdf)"),
        (
            'DataLoaders and `show_batch`',
            "dls = dblock.dataloaders(tdf, bs=4); dls.show_batch(dataloaders=dls, max_n=2)",
        ),
        (
            '`SameLabelLabelingStrategy`, `BILabelingStrategy`',
            "for s in (SameLabelLabelingStrategy, BILabelingStrategy): DataBlock(blocks=(TextBlock(batch_tokenize_tfm=TokenClassBatchTokenizeTransform(hf_arch, hf_config, hf_tokenizer, hf_model, labeling_strategy_cls=s, target_label_names=names), input_return_type=TokenClassTextInput), TokenCategoryBlock(vocab=names)), get_x=ColReader('tokens'), get_y=ColReader('labels'), splitter=ColSplitter()).dataloaders(tdf, bs=4).one_batch()",
        ),
        (
            '`Learner` with `BaseModelWrapper`, `freeze`',
            "learn = Learner(dls, BaseModelWrapper(hf_model), opt_func=partial(Adam), loss_func=PreCalculatedCrossEntropyLoss(), cbs=[BaseModelCallback], splitter=blurr_splitter); learn.freeze()",
        ),
        ('`learn.summary`', "learn.summary()"),
        ('`lr_find`', "learn.lr_find(suggest_funcs=[minimum, steep, valley, slide], num_it=40, show_plot=False)"),
        (
            '`fit_one_cycle` with `TokenClassMetricsCallback`',
            "learn.fit_one_cycle(1, lr_max=3e-3, moms=(.8, .7, .8), cbs=[TokenClassMetricsCallback()])",
        ),
        ('`token_classification_report`', "assert 'avg' in learn.token_classification_report"),
        (
            '`unfreeze` and fit',
            "learn.unfreeze(); learn.fit_one_cycle(1, lr_max=1e-3, cbs=[TokenClassMetricsCallback()])",
        ),
        ('`show_results`', "learn.show_results(learner=learn, max_n=2, trunc_at=10)"),
        (
            '`blurr_predict_tokens`, each strategy',
            "[learn.blurr_predict_tokens(texts[:2], aggregation_strategy=s) for s in ('token','simple','first','max','average')]",
        ),
        (
            'export, `load_learner`, predict',
            "learn.path = folder; learn.export('tag.pkl'); inf = load_learner(folder/'tag.pkl'); assert inf.blurr_predict_tokens(texts[0])==learn.blurr_predict_tokens(texts[0])",
        ),
        (
            'high level: `BlearnerForTokenClassification.from_data`',
            "l = BlearnerForTokenClassification.from_data(tdf, str(folder/'bert'), tokens_attr='tokens', token_labels_attr='labels', labels=names, dl_kwargs={'bs': 4}); l.fit_one_cycle(1, lr_max=3e-3, cbs=[BlearnerForTokenClassification.get_metrics_cb()]); l.show_results(learner=l, max_n=2); l.predict(texts[0]); print(l.token_classification_report)",
        ),
    ],
    'Causal language modelling (99e causal LM with GPT-2, 12_text-modeling-language-modeling)': [
        ('imports', IMPORTS),
        (
            'texts as files',
            "for i,t in enumerate(texts):\n    p = folder/'wiki'/('valid' if i>=44 else 'train'); p.mkdir(parents=True, exist_ok=True); (p/f'{i}.txt').write_text(t)",
        ),
        (
            '`get_hf_objects`, a padding token',
            "hf_arch, hf_config, hf_tokenizer, hf_model = get_hf_objects(str(folder/'gpt2'), model_cls=AutoModelForCausalLM)\nif hf_tokenizer.pad_token is None:\n    hf_tokenizer.add_special_tokens({'pad_token': '<pad>'}); hf_config.pad_token_id = hf_tokenizer.get_vocab()['<pad>']; hf_model.resize_token_embeddings(len(hf_tokenizer))",
        ),
        (
            'files and `FuncSplitter`',
            "get_files = partial(get_text_files, folders=['train','valid']); splitter = FuncSplitter(lambda p: Path(p).parent.name=='valid'); assert len(splitter(get_files(folder/'wiki'))[1])==16",
        ),
        (
            '`LMBatchTokenizeTransform` and `DataBlock`',
            "btt = LMBatchTokenizeTransform(hf_arch, hf_config, hf_tokenizer, hf_model, lm_strategy_cls=CausalLMStrategy); dblock = DataBlock(blocks=(TextBlock(batch_tokenize_tfm=btt, input_return_type=CausalLMTextInput), noop), get_x=lambda p: p.read_text(), get_items=get_files, splitter=splitter)",
        ),
        (
            'DataLoaders',
            "dls = dblock.dataloaders(folder/'wiki', bs=4, val_bs=4); b = dls.one_batch(); assert b[0]['input_ids'].shape==b[1].shape",
        ),
        ('`show_batch`', "dls.show_batch(dataloaders=dls, max_n=2, trunc_at=500)"),
        (
            '`Learner` with `perplexity`, `freeze`',
            "learn = Learner(dls, BaseModelWrapper(hf_model), opt_func=partial(Adam), loss_func=PreCalculatedCrossEntropyLoss(), cbs=[BaseModelCallback], metrics=[perplexity], splitter=blurr_splitter); learn.freeze()",
        ),
        ('`learn.summary`', "learn.summary()"),
        ('`lr_find`', "learn.lr_find(suggest_funcs=[minimum, steep, valley, slide], num_it=40, show_plot=False)"),
        ('`fit_one_cycle` with `LMMetricsCallback`', "learn.fit_one_cycle(1, lr_max=3e-3, cbs=[LMMetricsCallback()])"),
        ('`unfreeze` and fit with a slice', "learn.unfreeze(); learn.fit_one_cycle(1, lr_max=slice(1e-4, 1e-3))"),
        ('`show_results`', "learn.show_results(learner=learn, max_n=2, trunc_at=500)"),
        (
            '`blurr_generate`',
            "r = learn.blurr_generate('the film is', max_length=20, do_sample=True, top_k=5); assert r[0]['generated_texts'].startswith('the film is')",
        ),
        (
            'export, `load_learner`, generate',
            "learn.path = folder; dls.train_ds; lm = Blearner(DataBlock(blocks=(TextBlock(batch_tokenize_tfm=btt, input_return_type=CausalLMTextInput), noop), get_x=ItemGetter(0), splitter=IndexSplitter([3])).dataloaders([(t,) for t in texts[:8]], bs=2), hf_model, loss_func=PreCalculatedCrossEntropyLoss()); lm.path = folder; lm.export('lm.pkl'); load_learner(folder/'lm.pkl').blurr_generate('the film is', max_length=20)",
        ),
        ('export with a lambda in the `DataBlock`, as in the notebook', "learn.export('lm2.pkl')"),
        (
            '`LMPreprocessor`',
            "proc = LMPreprocessor(hf_tokenizer, chunk_size=24).process_df(pd.DataFrame(dict(text=texts))); assert len(proc)>5",
        ),
        (
            'high level: `BlearnerForLM.from_data`',
            "l = BlearnerForLM.from_data(pd.DataFrame(dict(text=texts, is_valid=[i>=44 for i in range(60)])), str(folder/'gpt2'), text_attr='text', dl_kwargs={'bs': 4}); l.fit_one_cycle(1, lr_max=3e-3, cbs=[BlearnerForLM.get_metrics_cb()]); l.show_results(learner=l, max_n=2); l.blurr_generate('the film is', max_length=15)",
        ),
    ],
}


def run(cells):
    "Each cell in turn in one namespace; a failure does not stop the rest"
    ns, res = {'__name__': 'flow'}, []
    exec(SETUP, ns)
    for name, code in cells:
        out = io.StringIO()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                exec(code, ns)
            error = None
        except Exception as e:
            error = f'{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else ""}'[:160]
        res.append(dict(cell=name, passes=error is None, error=error))
        print('  ', 'ok  ' if error is None else 'FAIL', name, error or '', flush=True)
    return res


def markdown(flows, versions):
    lines = [
        f'blurr {versions["ohmeow-blurr"]} with `enable_blurr()` on '
        + ', '.join(f'{k} {v}' for k, v in versions.items() if k != 'ohmeow-blurr')
        + '.',
        '',
    ]
    for name, cells in flows.items():
        lines += [
            f'**{name}**: {sum(c["passes"] for c in cells)} of {len(cells)} cells pass',
            '',
            '| cell | passes |',
            '|---|---|',
        ]
        lines += [
            f'| {c["cell"]} | {"yes" if c["passes"] else "no: " + c["error"].replace("|", "/")} |' for c in cells
        ] + ['']
    return '\n'.join(lines)


if __name__ == '__main__':
    enable_blurr()
    flows = {}
    for name, cells in FLOWS.items():
        print(name)
        flows[name] = run(cells)
    versions = {k: version(k) for k in ('ohmeow-blurr', 'fastai', 'transformers', 'datasets', 'torch', 'pandas')}
    (HERE / 'results' / 'flows.json').write_text(json.dumps(dict(versions=versions, flows=flows), indent=1) + '\n')
    (HERE / 'results' / 'flows.md').write_text(markdown(flows, versions))
