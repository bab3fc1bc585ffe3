# Tagging (13_text-data- and 13_text-modeling-token-classification)
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

# %% raw data as a table
names = ['O', 'B-PER', 'B-LOC', 'B-ORG']
kind = dict(Paris='B-LOC', London='B-LOC', Anna='B-PER', Ben='B-PER', Acme='B-ORG')
tdf = pd.DataFrame(
    dict(
        tokens=[t.split() for t in texts],
        labels=[[kind.get(w, 'O') for w in t.split()] for t in texts],
        is_valid=[i >= 44 for i in range(60)],
    )
)

# %% `TokenClassPreprocessor`
proc = TokenClassPreprocessor(tok, label_names=names, tok_kwargs=dict(max_length=32)).process_df(tdf)
assert len(proc) == 60 and 'proc_tokens' in proc

# %% `get_hf_objects` with the labels
config = AutoConfig.from_pretrained(str(folder / 'bert'))
config.num_labels = len(names)
hf_arch, hf_config, hf_tokenizer, hf_model = get_hf_objects(
    str(folder / 'bert'), model_cls=AutoModelForTokenClassification, config=config
)

# %% `TokenClassBatchTokenizeTransform`, `TokenCategoryBlock`
btt = TokenClassBatchTokenizeTransform(hf_arch, hf_config, hf_tokenizer, hf_model)
dblock = DataBlock(
    blocks=(TextBlock(batch_tokenize_tfm=btt, input_return_type=TokenClassTextInput), TokenCategoryBlock(vocab=names)),
    get_x=ColReader('tokens'),
    get_y=ColReader('labels'),
    splitter=ColSplitter(),
)

# %% `dblock.summary`
dblock.summary(tdf)

# %% DataLoaders and `show_batch`
dls = dblock.dataloaders(tdf, bs=4)
dls.show_batch(dataloaders=dls, max_n=2)

# %% `SameLabelLabelingStrategy`, `BILabelingStrategy`
for s in (SameLabelLabelingStrategy, BILabelingStrategy):
    DataBlock(
        blocks=(
            TextBlock(
                batch_tokenize_tfm=TokenClassBatchTokenizeTransform(
                    hf_arch, hf_config, hf_tokenizer, hf_model, labeling_strategy_cls=s, target_label_names=names
                ),
                input_return_type=TokenClassTextInput,
            ),
            TokenCategoryBlock(vocab=names),
        ),
        get_x=ColReader('tokens'),
        get_y=ColReader('labels'),
        splitter=ColSplitter(),
    ).dataloaders(tdf, bs=4).one_batch()

# %% `Learner` with `BaseModelWrapper`, `freeze`
learn = Learner(
    dls,
    BaseModelWrapper(hf_model),
    opt_func=partial(Adam),
    loss_func=PreCalculatedCrossEntropyLoss(),
    cbs=[BaseModelCallback],
    splitter=blurr_splitter,
)
learn.freeze()

# %% `learn.summary`
learn.summary()

# %% `lr_find`
learn.lr_find(suggest_funcs=[minimum, steep, valley, slide], num_it=40, show_plot=False)

# %% `fit_one_cycle` with `TokenClassMetricsCallback`
learn.fit_one_cycle(1, lr_max=3e-3, moms=(0.8, 0.7, 0.8), cbs=[TokenClassMetricsCallback()])

# %% `token_classification_report`
assert 'avg' in learn.token_classification_report

# %% `unfreeze` and fit
learn.unfreeze()
learn.fit_one_cycle(1, lr_max=1e-3, cbs=[TokenClassMetricsCallback()])

# %% `show_results`
learn.show_results(learner=learn, max_n=2, trunc_at=10)

# %% `blurr_predict_tokens`, each strategy
[learn.blurr_predict_tokens(texts[:2], aggregation_strategy=s) for s in ('token', 'simple', 'first', 'max', 'average')]

# %% export, `load_learner`, predict
learn.path = folder
learn.export('tag.pkl')
inf = load_learner(folder / 'tag.pkl')
assert inf.blurr_predict_tokens(texts[0]) == learn.blurr_predict_tokens(texts[0])

# %% high level: `BlearnerForTokenClassification.from_data`
l = BlearnerForTokenClassification.from_data(
    tdf, str(folder / 'bert'), tokens_attr='tokens', token_labels_attr='labels', labels=names, dl_kwargs={'bs': 4}
)
l.fit_one_cycle(1, lr_max=3e-3, cbs=[BlearnerForTokenClassification.get_metrics_cb()])
l.show_results(learner=l, max_n=2)
l.predict(texts[0])
print(l.token_classification_report)
