# Causal language modelling (99e causal LM with GPT-2, 12_text-modeling-language-modeling)
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

# %% texts as files
for i, t in enumerate(texts):
    p = folder / 'wiki' / ('valid' if i >= 44 else 'train')
    p.mkdir(parents=True, exist_ok=True)
    (p / f'{i}.txt').write_text(t)

# %% `get_hf_objects`, a padding token
hf_arch, hf_config, hf_tokenizer, hf_model = get_hf_objects(str(folder / 'gpt2'), model_cls=AutoModelForCausalLM)
if hf_tokenizer.pad_token is None:
    hf_tokenizer.add_special_tokens({'pad_token': '<pad>'})
    hf_config.pad_token_id = hf_tokenizer.get_vocab()['<pad>']
    hf_model.resize_token_embeddings(len(hf_tokenizer))

# %% files and `FuncSplitter`
get_files = partial(get_text_files, folders=['train', 'valid'])
splitter = FuncSplitter(lambda p: Path(p).parent.name == 'valid')
assert len(splitter(get_files(folder / 'wiki'))[1]) == 16

# %% `LMBatchTokenizeTransform` and `DataBlock`
btt = LMBatchTokenizeTransform(hf_arch, hf_config, hf_tokenizer, hf_model, lm_strategy_cls=CausalLMStrategy)
dblock = DataBlock(
    blocks=(TextBlock(batch_tokenize_tfm=btt, input_return_type=CausalLMTextInput), noop),
    get_x=lambda p: p.read_text(),
    get_items=get_files,
    splitter=splitter,
)

# %% DataLoaders
dls = dblock.dataloaders(folder / 'wiki', bs=4, val_bs=4)
b = dls.one_batch()
assert b[0]['input_ids'].shape == b[1].shape

# %% `show_batch`
dls.show_batch(dataloaders=dls, max_n=2, trunc_at=500)

# %% `Learner` with `perplexity`, `freeze`
learn = Learner(
    dls,
    BaseModelWrapper(hf_model),
    opt_func=partial(Adam),
    loss_func=PreCalculatedCrossEntropyLoss(),
    cbs=[BaseModelCallback],
    metrics=[perplexity],
    splitter=blurr_splitter,
)
learn.freeze()

# %% `learn.summary`
learn.summary()

# %% `lr_find`
learn.lr_find(suggest_funcs=[minimum, steep, valley, slide], num_it=40, show_plot=False)

# %% `fit_one_cycle` with `LMMetricsCallback`
learn.fit_one_cycle(1, lr_max=3e-3, cbs=[LMMetricsCallback()])

# %% `unfreeze` and fit with a slice
learn.unfreeze()
learn.fit_one_cycle(1, lr_max=slice(1e-4, 1e-3))

# %% `show_results`
learn.show_results(learner=learn, max_n=2, trunc_at=500)

# %% `blurr_generate`
r = learn.blurr_generate('the film is', max_length=20, do_sample=True, top_k=5)
assert r[0]['generated_texts'].startswith('the film is')

# %% export, `load_learner`, generate
learn.path = folder
dls.train_ds
lm = Blearner(
    DataBlock(
        blocks=(TextBlock(batch_tokenize_tfm=btt, input_return_type=CausalLMTextInput), noop),
        get_x=ItemGetter(0),
        splitter=IndexSplitter([3]),
    ).dataloaders([(t,) for t in texts[:8]], bs=2),
    hf_model,
    loss_func=PreCalculatedCrossEntropyLoss(),
)
lm.path = folder
lm.export('lm.pkl')
load_learner(folder / 'lm.pkl').blurr_generate('the film is', max_length=20)

# %% export with a lambda in the `DataBlock`, as in the notebook
learn.export('lm2.pkl')

# %% `LMPreprocessor`
proc = LMPreprocessor(hf_tokenizer, chunk_size=24).process_df(pd.DataFrame(dict(text=texts)))
assert len(proc) > 5

# %% high level: `BlearnerForLM.from_data`
l = BlearnerForLM.from_data(
    pd.DataFrame(dict(text=texts, is_valid=[i >= 44 for i in range(60)])),
    str(folder / 'gpt2'),
    text_attr='text',
    dl_kwargs={'bs': 4},
)
l.fit_one_cycle(1, lr_max=3e-3, cbs=[BlearnerForLM.get_metrics_cb()])
l.show_results(learner=l, max_n=2)
l.blurr_generate('the film is', max_length=15)
