"""Messages name what the user called, what was meant, and what to do."""

import re

import pandas as pd
import pytest

from fastai_tl.all import *
from fastai_tl.core import DataError, FastaiTLError




def test_unknown_arguments_name_the_public_function(small_tokenizers):
    tok, decoder = small_tokenizers['encoder'], small_tokenizers['decoder']
    df = pd.DataFrame(dict(text=['a film', 'a plot'] * 4, label=['x', 'y'] * 4))
    wrong = {
        "`HFTextDataLoaders.from_df` has no argument 'maxlen'. Did you mean 'max_length'?":
            lambda: HFTextDataLoaders.from_df(df, tok, maxlen=8),
        "`HFTextDataLoaders.from_df` has no argument 'batch_size'. Did you mean 'bs'?":
            lambda: HFTextDataLoaders.from_lists(list(df.text), list(df.label), tok, batch_size=8),
        "`HFCausalLMDataLoaders.from_texts` has no argument 'block_size'. Did you mean 'max_length'?":
            lambda: HFCausalLMDataLoaders.from_texts(list(df.text), decoder, block_size=8),
        "`HFMaskedLMDataLoaders.from_texts` has no argument 'whole_word'. Did you mean 'whole_words'?":
            lambda: HFMaskedLMDataLoaders.from_texts(list(df.text), tok, whole_word=True),
    }
    for message, make in wrong.items():
        with pytest.raises(TypeError, match=re.escape(message)):
            make()
        with pytest.raises(FastaiTLError):
            make()


def test_messages_of_a_classifier(small_tokenizers):
    from fastai.text.data import TextDataLoaders
    from small_learners import bert, classifier

    learn = classifier(small_tokenizers)
    with pytest.raises(DataError, match='predict_batch'):
        learn.predict(['a film', 'a plot'])
    with learn.no_bar(), learn.no_logging(), pytest.raises(FastaiTLError, match="Did you mean 'accuracy'|train_loss"):
        learn.fit(1, cbs=GradualUnfreezing(when='plateau', monitor='acc'))
    assert learn.recorder.values == [] and len(learn.recorder.losses) == 0, 'nothing was trained'
    for text in map(repr, (learn, learn.dls, learn.transfer_plan())):
        assert '\n' not in text and len(text) < 400 and ' object at 0x' not in text
    assert '20 training rows and 2 validation rows' in repr(learn.dls) and 'lr=' in repr(learn.transfer_plan())
    df = pd.DataFrame(dict(text=['a film is here', 'a plot is there'] * 8, label=['x', 'y'] * 8))
    plain = TextDataLoaders.from_df(df, text_col='text', label_col='label', bs=4)
    with pytest.raises(DataError, match='HFTextDataLoaders.from_df'):
        hf_classifier_learner(plain, bert(small_tokenizers['encoder']))
