# Classification (11_text-modeling-core, 99a high-level API)
# ruff: noqa: F401

# %% imports
from datasets import Dataset, concatenate_datasets
from transformers import *
from transformers.utils import logging as hf_logging
from fastai.text.all import *
from blurr.text.data.all import *
from blurr.text.modeling.all import *
from blurr.text.utils import *
from blurr.utils import *

# %% versions and seed
print_versions('torch fastai transformers')
set_seed()

# %% raw data as a table
df = pd.DataFrame(dict(text=texts, label=[i % 2 for i in range(60)], is_valid=[i >= 44 for i in range(60)]))
labels = ['neg', 'pos']

# %% `ClassificationPreprocessor.process_df`
pre = ClassificationPreprocessor(tok, label_mapping=labels, tok_kwargs=dict(max_length=32))
proc = pre.process_df(df)
assert {'proc_text', 'label_name'} <= set(proc.columns) and len(proc) == 60

# %% `ClassificationPreprocessor.process_hf_dataset`
ds = ClassificationPreprocessor(tok).process_hf_dataset(
    Dataset.from_pandas(df[['text', 'label']][:40], preserve_index=False),
    Dataset.from_pandas(df[['text', 'label']][40:], preserve_index=False),
)
assert len(ds) == 60

# %% `get_hf_objects`
hf_arch, hf_config, hf_tokenizer, hf_model = get_hf_objects(
    str(folder / 'bert'), model_cls=AutoModelForSequenceClassification
)
assert hf_arch == 'bert'

# %% `TextBlock` and `DataBlock`
dblock = DataBlock(
    blocks=(
        TextBlock(hf_arch, hf_config, hf_tokenizer, hf_model, batch_tokenize_kwargs={'labels': labels}),
        CategoryBlock,
    ),
    get_x=ColReader('text'),
    get_y=ColReader('label'),
    splitter=RandomSplitter(seed=42),
)

# %% `dblock.summary`
dblock.summary(df)

# %% DataLoaders
dls = dblock.dataloaders(df, bs=4)
b = dls.one_batch()
assert b[0]['input_ids'].shape[0] == 4

# %% `show_batch`
dls.show_batch(dataloaders=dls, max_n=2, trunc_at=500)

# %% `Learner` with `BaseModelWrapper`, `freeze`
learn = Learner(
    dls,
    BaseModelWrapper(hf_model),
    opt_func=partial(OptimWrapper, opt=torch.optim.Adam),
    loss_func=PreCalculatedCrossEntropyLoss(),
    metrics=[accuracy],
    cbs=[BaseModelCallback],
    splitter=blurr_splitter,
)
learn.freeze()

# %% `learn.summary`
learn.summary()

# %% forward pass by hand
preds = learn.model(dls.one_batch()[0])
assert preds.logits.shape == (4, 2)

# %% `lr_find`
learn.lr_find(suggest_funcs=[minimum, steep, valley, slide], num_it=40, show_plot=False)

# %% `fit_one_cycle`
learn.fit_one_cycle(1, lr_max=1e-3)

# %% `show_results`
learn.show_results(learner=learn, max_n=2, trunc_at=500)

# %% `unfreeze`, `lr_find`, `fit_one_cycle` with a slice
learn.unfreeze()
learn.lr_find(num_it=40, show_plot=False)
learn.fit_one_cycle(2, lr_max=slice(1e-5, 1e-3))

# %% `recorder.plot_loss`
learn.recorder.plot_loss()

# %% `blurr_predict` of one text and of several
r = learn.blurr_predict('a good film')
assert r[0]['label'] in labels
assert len(learn.blurr_predict(texts[:3])) == 3

# %% `learn.get_preds`
p, t = learn.get_preds()
assert p.shape[1] == 2

# %% export, `load_learner`, predict
learn.path = folder
learn.export('clas.pkl')
inf = load_learner(folder / 'clas.pkl')
assert inf.blurr_predict('a good film') == learn.blurr_predict('a good film')

# %% loss by fastai, labels not in the inputs
b2 = DataBlock(
    blocks=(TextBlock(hf_arch, hf_config, hf_tokenizer, hf_model, include_labels=False), CategoryBlock),
    get_x=ColReader('text'),
    get_y=ColReader('label'),
    splitter=RandomSplitter(seed=42),
).dataloaders(df, bs=4)
l2 = Blearner(b2, hf_model, metrics=accuracy)
l2.fit(1)

# %% `GradientCheckpointing`
from blurr.callbacks import GradientCheckpointing

learn.fit(1, cbs=GradientCheckpointing())

# %% high level: from a Dataset, with `IndexSplitter`
l = BlearnerForSequenceClassification.from_data(
    Dataset.from_pandas(df[['text', 'label']]),
    str(folder / 'bert'),
    text_attr='text',
    label_attr='label',
    dblock_splitter=IndexSplitter(L(range(44, 60))),
    dl_kwargs={'bs': 4, 'val_bs': 8},
    learner_kwargs={'metrics': [accuracy]},
)
l.fit_one_cycle(1, lr_max=2e-3)
l.show_results(learner=l, max_n=2)

# %% high level: two texts
df2 = df.assign(second=texts[::-1])
l = BlearnerForSequenceClassification.from_data(
    df2, str(folder / 'bert'), text_attr=['text', 'second'], label_attr='label', dl_kwargs={'bs': 4}
)
l.dls.show_batch(dataloaders=l.dls, max_n=2)
l.fit_one_cycle(1, lr_max=2e-3)
l.show_results(learner=l, max_n=2)

# %% high level: two texts, `predict`
l.predict([('a good film', 'a bad film')])

# %% high level: several labels
df3 = df.assign(toxic=[i % 2 for i in range(60)], rude=[int(i % 3 == 0) for i in range(60)])
l = BlearnerForSequenceClassification.from_data(
    df3, str(folder / 'bert'), label_attr=['toxic', 'rude'], dl_kwargs={'bs': 4}
)
l.fit_one_cycle(1, lr_max=2e-3)
l.show_results(learner=l, max_n=2)
l.predict('a good film')

# %% high level: a CSV file
df.to_csv(folder / 'd.csv', index=False)
BlearnerForSequenceClassification.from_data(str(folder / 'd.csv'), str(folder / 'bert'))

# %% low level: `preproc_hf_dataset` and `TextDataLoader`
raw = Dataset.from_pandas(df[['text', 'label']]).map(lambda e: hf_tokenizer(e['text'], truncation=True), batched=True)
tdl = TextDataLoader(
    raw.select(range(44)),
    hf_arch,
    hf_config,
    hf_tokenizer,
    hf_model,
    preproccesing_func=preproc_hf_dataset,
    bs=4,
    shuffle=True,
)
vdl = TextDataLoader(
    raw.select(range(44, 60)), hf_arch, hf_config, hf_tokenizer, hf_model, preproccesing_func=preproc_hf_dataset, bs=8
)
ldls = DataLoaders(tdl, vdl)
ll = Learner(
    ldls,
    BaseModelWrapper(hf_model),
    loss_func=PreCalculatedCrossEntropyLoss(),
    cbs=[BaseModelCallback],
    splitter=blurr_splitter,
)
ll.fit(1)

# %% `BlurrText`
NLP = BlurrText()
assert 'bert' in NLP.get_architectures()
