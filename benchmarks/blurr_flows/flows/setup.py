# Made-up sentences, two tokenizers and two models of a few thousand weights replace data sets and models from the hub
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd  # noqa: F401 (for the cells)
import torch
import transformers
from fastai_tl.data.hf_tokenizer import train_tokenizer
from tokenizers import BertWordPieceTokenizer, processors

transformers.utils.logging.disable_progress_bar()
words = 'good bad fine awful lovely poor great dull the film is was very quite a story and music'.split()
words += 'Paris London Anna Ben lives in works at Acme'.split()
rng = np.random.default_rng(0)
texts = [' '.join(rng.choice(words, n)) for n in rng.integers(8, 15, 60)]
folder = Path(tempfile.mkdtemp())
torch.manual_seed(0)
wp = BertWordPieceTokenizer()
wp.train_from_iterator(texts, vocab_size=120, show_progress=False)
wp._tokenizer.post_processor = processors.BertProcessing(*[(t, wp.token_to_id(t)) for t in ('[SEP]', '[CLS]')])
tok = transformers.PreTrainedTokenizerFast(
    tokenizer_object=wp._tokenizer,
    model_max_length=64,
    pad_token='[PAD]',
    unk_token='[UNK]',
    cls_token='[CLS]',
    sep_token='[SEP]',
    mask_token='[MASK]',
    model_input_names=['input_ids', 'token_type_ids', 'attention_mask'],
)
bert = transformers.BertForMaskedLM(
    transformers.BertConfig(
        vocab_size=len(tok),
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        pad_token_id=tok.pad_token_id,
    )
)
tok.save_pretrained(folder / 'bert')
bert.save_pretrained(folder / 'bert')
gtok = train_tokenizer(texts, 300, 'decoder', max_length=64)
gpt2 = transformers.GPT2LMHeadModel(
    transformers.GPT2Config(
        vocab_size=len(gtok), n_embd=16, n_layer=3, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0
    )
)
gtok.save_pretrained(folder / 'gpt2')
gpt2.save_pretrained(folder / 'gpt2')
