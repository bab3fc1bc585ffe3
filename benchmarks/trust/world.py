"""Small models and data for the valid calls of calls.txt, made once; each call runs in a fork of the process."""

import contextlib
import random
from functools import cached_property
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import torch
from datasets import Dataset, DatasetDict
from torch import nn
from torch.utils.data import DataLoader

matplotlib.use('Agg')
from fastai.text.all import *
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, T5Config

from fastai_tl.all import *

WORDS = 'the film was very good bad dull fine plot actor scene slow bright ending music long short story'.split()
N = 24


def sentences(n, seed=0):
    rng = random.Random(seed)
    return [' '.join(rng.choice(WORDS) for _ in range(rng.choice([3, 4, 9]))) for _ in range(n)]


class Pairs(torch.utils.data.Dataset):
    "Numbers and a class for a plain PyTorch model"

    def __len__(self):
        return 12

    def __getitem__(self, i):
        return torch.full((3,), float(i)), torch.tensor(i % 2)


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(3, 4), nn.Linear(4, 2))


class World:
    "What the valid calls are made with; every attribute is made when it is first used"

    def __init__(self, path):
        self.path = Path(path)

    def __getattr__(self, name):
        if name.startswith('_'):
            raise AttributeError(name)
        raise AttributeError(f'the world has no {name}')

    # --- texts and tables ---

    texts = cached_property(lambda w: sentences(N))
    made = cached_property(lambda w: generation_metrics('chrf')[0].made)
    labels = cached_property(lambda w: ['ab'[i % 2] for i in range(N)])
    train_rows = cached_property(lambda w: list(range(18)))
    valid_rows = cached_property(lambda w: list(range(18, N)))
    np_rows = cached_property(lambda w: np.arange(6))
    words = cached_property(lambda w: [text.split() for text in w.texts])
    tags = cached_property(lambda w: [['B-X' if o == 'film' else 'O' for o in ws] for ws in w.words])
    questions = cached_property(lambda w: ['when'] * N)
    contexts = cached_property(lambda w: [f'{text} at noon' for text in w.texts])
    answers = cached_property(lambda w: ['noon'] * N)
    pairs = cached_property(lambda w: list(zip(w.questions[:2], w.contexts[:2])))
    examples = cached_property(lambda w: check_answers(w.questions, w.contexts, w.answers))
    zh_texts = cached_property(lambda w: ['這部電影很好看，我喜歡。', '服務不好，再也不去了！'] * 6)
    long_texts = cached_property(lambda w: [' '.join(w.texts[:6]), 'short'])
    marked = cached_property(lambda w: [i % 2 == 0 for i in range(N)])

    @cached_property
    def df(w):
        return pd.DataFrame(
            dict(
                text=w.texts,
                label=w.labels,
                value=np.arange(N) / N,
                time=np.arange(N),
                group=[i % 4 for i in range(N)],
                valid=[i >= 18 for i in range(N)],
                tokens=w.words,
                tags=w.tags,
                question=w.questions,
                context=w.contexts,
                answer=w.answers,
            )
        )

    quick_df = cached_property(lambda w: w.df.assign(split=['train'] * 12 + ['valid'] * 6 + ['test'] * 6))
    dataset = cached_property(lambda w: Dataset.from_dict(dict(text=w.texts, label=w.labels)))
    dataset_dict = cached_property(
        lambda w: DatasetDict(train=w.dataset.select(range(18)), validation=w.dataset.select(range(18, N)))
    )

    # --- tokenizers ---

    tok = cached_property(lambda w: train_tokenizer(sentences(200), 400, max_length=32))
    dec_tok = cached_property(lambda w: train_tokenizer(sentences(200), 400, 'decoder', max_length=32))
    s2s_tok = cached_property(lambda w: train_tokenizer(sentences(200), 400, 'seq2seq', max_length=32))
    word_tok = cached_property(lambda w: WordLevelTokenizer())
    zh_tok = cached_property(lambda w: ChineseTokenizer())
    subwords = cached_property(lambda w: train_subwords(w.zh_texts, 300))
    hf_tok = cached_property(lambda w: HFTokenize(w.tok, 16, verbose=False))
    tag_tok = cached_property(lambda w: HFTokenizeWords(w.tok, max_length=16, verbose=False))
    window_tok = cached_property(lambda w: HFTokenizeWindows(w.tok, 3, 12, verbose=False))
    tokenized = cached_property(lambda w: tokenize_texts_once(w.texts, progress=False))
    vocab = cached_property(lambda w: texts_vocab(w.tokenized, min_freq=1))
    scheme = cached_property(lambda w: tag_scheme(['O', 'B-X', 'I-X']))

    # --- numbers ---

    rng = cached_property(lambda w: np.random.default_rng(0))
    logits = cached_property(lambda w: torch.randn(4, 2))
    matrix = cached_property(lambda w: np.array([[1.0, 2.0], [3.0, 4.0]]))
    matrix_t = cached_property(lambda w: torch.tensor(w.matrix))
    scores_np = cached_property(lambda w: np.array([[0.3, -0.2], [1.0, 2.0]], dtype=np.float32))
    probs = cached_property(lambda w: np.stack([np.linspace(0.05, 0.95, 20), np.linspace(0.95, 0.05, 20)], 1))
    probs_t = cached_property(lambda w: torch.tensor(w.probs))
    targets = cached_property(lambda w: np.arange(20) % 2)
    tokens = cached_property(lambda w: torch.tensor([[5, 6, 7], [0, 0, 0]]))
    sample = cached_property(lambda w: w.hf_tok('a good film'))
    q = cached_property(lambda w: torch.randn(1, 2, 3, 4))
    ce_x = cached_property(lambda w: torch.randn(6, 4))
    ce_w = cached_property(lambda w: torch.randn(9, 4))
    ce_y = cached_property(lambda w: torch.arange(6))
    few_labels = cached_property(lambda w: torch.tensor([0, 0, 1, 1, 0, 1]))
    lstm_x = cached_property(lambda w: torch.randn(2, 5, 3))
    lstm_h5 = cached_property(lambda w: torch.zeros(5, 4))
    lstm_h = cached_property(lambda w: torch.zeros(2, 4))
    lstm_wi = cached_property(lambda w: torch.randn(16, 3))
    lstm_wh = cached_property(lambda w: torch.randn(16, 4))
    lstm_b = cached_property(lambda w: torch.zeros(16))
    rollout_in = cached_property(lambda w: torch.full((2, 2, 3, 3), 1 / 3))
    features = cached_property(lambda w: {f'layer {i}': np.random.default_rng(i).normal(size=(N, 4)) for i in range(2)})

    # --- models ---

    @staticmethod
    def sizes():
        return dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)

    def new_config(w):
        return BertConfig(
            vocab_size=len(w.tok), **w.sizes(), max_position_embeddings=64, pad_token_id=w.tok.pad_token_id
        )

    bert_config = cached_property(lambda w: w.new_config())
    gpt_config = cached_property(
        lambda w: GPT2Config(vocab_size=len(w.dec_tok), n_embd=16, n_layer=1, n_head=2, n_positions=64)
    )
    awd_config = cached_property(lambda w: dict(emb_sz=12, n_hid=16, n_layers=2))
    few_shot = cached_property(lambda w: FewShotClassifier(w.new_config(), w.tok, n_steps=1, verbose=False))

    def new_student(w):
        return hf_classifier_learner(w.dls, w.new_config())

    net = cached_property(lambda w: Net())
    linear = cached_property(lambda w: nn.Linear(3, 2))
    loader = cached_property(lambda w: DataLoader(Pairs(), batch_size=4))
    sgd = cached_property(lambda w: torch.optim.SGD(w.net.parameters(), lr=1e-3))

    @cached_property
    def t5_config(w):
        return T5Config(
            vocab_size=len(w.s2s_tok),
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=1,
            num_decoder_layers=1,
            num_heads=2,
            pad_token_id=w.s2s_tok.pad_token_id,
            eos_token_id=w.s2s_tok.eos_token_id,
            decoder_start_token_id=w.s2s_tok.pad_token_id,
        )

    # --- DataLoaders and Learners ---

    dls = cached_property(
        lambda w: HFTextDataLoaders.from_df(w.df, w.tok, valid_col='valid', bs=6, verbose=False, max_length=16)
    )
    spec = cached_property(lambda w: w.dls.spec)
    learn = cached_property(lambda w: hf_classifier_learner(w.dls, w.new_config()))
    hf_model = cached_property(lambda w: hf_models(w.learn.model)[0])
    batch = cached_property(lambda w: w.dls.one_batch()[0])

    @cached_property
    def awd(w):
        dls = language_model_dls(w.tokenized, w.vocab, valid_pct=0.2, bs=2, seq_len=8)
        return awd_lm_learner(dls, w.awd_config)

    @cached_property
    def awd_clf(w):
        args = w.tokenized, w.labels, 'classification', w.train_rows, w.valid_rows, w.vocab
        return awd_classifier_learner(classifier_dls(*args, bs=6, seq_len=8), 'classification', 2, w.awd_config)

    @cached_property
    def bidi(w):
        args = w.tokenized, w.labels, 'classification', w.train_rows, w.valid_rows, w.vocab
        dls = classifier_dls(*args, bs=6, seq_len=8, backwards=True)
        return BidirectionalLearner(w.awd_clf, awd_classifier_learner(dls, 'classification', 2, w.awd_config))

    lm = cached_property(
        lambda w: hf_causal_lm_learner(
            HFCausalLMDataLoaders.from_texts(w.texts, w.dec_tok, max_length=12, bs=4), w.gpt_config
        )
    )
    mlm = cached_property(
        lambda w: hf_masked_lm_learner(
            HFMaskedLMDataLoaders.from_texts(w.texts, w.tok, max_length=16, bs=4), w.new_config()
        )
    )
    mlm_model = cached_property(lambda w: hf_models(w.mlm.model)[0])

    @cached_property
    def s2s(w):
        dls = HFSeq2SeqDataLoaders.from_lists(w.texts, w.texts, w.s2s_tok, bs=6, max_length=16, verbose=False)
        return hf_seq2seq_learner(dls, w.t5_config)

    @cached_property
    def tagger(w):
        dls = HFTagDataLoaders.from_lists(w.words, w.tags, w.tok, bs=6, verbose=False)
        return hf_tagger_learner(dls, w.new_config())

    @cached_property
    def qa(w):
        args = w.questions, w.contexts, w.answers, w.tok
        dls = HFQADataLoaders.from_lists(*args, bs=6, max_length=32, stride=4, verbose=False)
        return hf_qa_learner(dls, w.new_config())

    # --- parts of them ---

    encoder = cached_property(lambda w: Encoder.from_learner(w.awd))
    word_encoder = cached_property(lambda w: Encoder.from_learner(w.awd, tokenizer=tokenizer_settings(w.word_tok, [])))
    hf_encoder = cached_property(lambda w: HFEncoder.from_model(w.learn.model, w.tok))
    groups = cached_property(lambda w: layer_groups(w.learn.model))
    splitter = cached_property(lambda w: layer_splitter())
    freezer = cached_property(lambda w: LayerFreezer(w.net))
    causal_blocks = cached_property(lambda w: w.lm.dls.train_ds)
    masked_blocks = cached_property(lambda w: w.mlm.dls.train_ds)
    drop = cached_property(lambda w: DropWords())
    plateau = cached_property(lambda w: PlateauDetector())
    opt = cached_property(lambda w: LayerwiseOptimizer([list(w.linear.parameters())]))
    plan = cached_property(lambda w: w.learn.transfer_plan(1, min_steps=1))
    awd_reader = cached_property(lambda w: w.awd.dls.tokenizer)
    adapter = cached_property(lambda w: FastaiTokenizerAdapter.from_dls(w.awd.dls))
    hf_adapter = cached_property(lambda w: HFTokenizerAdapter(w.dec_tok))
    tm = cached_property(lambda w: text_model(w.lm))
    scored = cached_property(lambda w: score_texts(w.tm, w.texts[:2]))
    surprisal = cached_property(lambda w: w.lm.token_surprisal('the film was good'))

    # --- evaluations ---

    ev = cached_property(lambda w: Evaluation.from_preds(w.probs, w.targets, ['a', 'b'], texts=sentences(20, 3)))
    probs_n = cached_property(lambda w: w.probs[::-1].copy())
    multi_ev = cached_property(
        lambda w: Evaluation.from_preds(w.probs, np.stack([w.targets, 1 - w.targets], 1), ['a', 'b'])
    )
    value_ev = cached_property(lambda w: Evaluation.from_preds(w.probs[:, 0], w.probs[:, 1]))
    scaling = cached_property(lambda w: TemperatureScaling())
    calibrated = cached_property(lambda w: Calibrated(w.ev, 2))
    tag_ev = cached_property(lambda w: TagEvaluation([['B-X', 'O']], [['B-X', 'O']], [['a', 'b']]))
    qa_ev = cached_property(lambda w: AnswerEvaluation(['noon', 'b'], [['noon'], ['c']], ['when', 'who']))
    folds = cached_property(lambda w: cross_folds(w.df, n_folds=2))

    @cached_property
    def fold_ev(w):
        n = len(w.folds[0].valid)
        probs = np.stack([np.linspace(0.1, 0.9, n), np.linspace(0.9, 0.1, n)], 1)
        return Evaluation.from_preds(probs, np.arange(n) % 2, ['a', 'b'])

    @cached_property
    def fold_results(w):
        results = FoldResults(w.folds)
        for fold in w.folds:
            results.add(fold, w.fold_ev)
        return results

    def make_learner(w, train, valid, seed):
        "Return the evaluation of a fold, without any training"
        return w.learn.evaluate(valid)

    def figure(w):
        from matplotlib import pyplot as plt

        return plt.figure(figsize=(1, 1))

    # --- interpretation and deployment ---

    attribution = cached_property(
        lambda w: Attribution('a b', ['a', 'b'], ['', ' '], np.array([0.1, 0.2]), 'a', 1.0, 'occlusion', 'mask')
    )
    attributions = cached_property(lambda w: Attributions([w.attribution, w.attribution]))
    maps = cached_property(lambda w: w.learn.attention('the film was good'))
    layer_probe = cached_property(lambda w: probe_layers(w.features, w.labels, n_folds=2))
    effects = cached_property(lambda w: w.learn.ablate('the film was good', what='heads'))
    engine = cached_property(lambda w: engine_of(w.learn))
    predictor = cached_property(lambda w: Predictor(w.learn))
    change_table = cached_property(lambda w: w.learn.compare_precisions(('int8',)))
    loaded = cached_property(lambda w: load_bundle(w.path / 'bundle', verbose=False))
    graph = cached_property(lambda w: Graph(w.path / 'onnx' / 'model.onnx', threads=1))
    manifest = cached_property(lambda w: read_json(w.path / 'onnx' / 'bundle.json'))
    token_rows = cached_property(lambda w: w.engine.encode(w.texts[:3]))
    token_reader = cached_property(lambda w: TokenReader(w.tok.backend_tokenizer, 16))
    onnx = cached_property(lambda w: load_onnx(w.path / 'onnx', threads=1))
    loss = cached_property(lambda w: nn.CrossEntropyLoss())
    token_file = cached_property(lambda w: w.path / 'stored')
    stored = cached_property(lambda w: TokenFile(w.token_file))
    word_file = cached_property(lambda w: TokenFile(w.path / 'words'))
    table_file = cached_property(lambda w: w.path / 't.csv')
    vector_file = cached_property(lambda w: w.path / 'vectors.txt')
    bag = cached_property(lambda w: BagOfWords(min_df=1).fit(w.texts, w.labels))
    preferences = cached_property(
        lambda w: pd.DataFrame(dict(prompt=w.texts[:4], chosen=[' good'] * 4, rejected=[' bad'] * 4))
    )
    label_words = cached_property(lambda w: LabelWordClassifier(w.lm, dict(a='good', b='bad')))

    def features_of(w, part):
        "A function of a user, from a part of a batch to features"
        return w.linear(part if isinstance(part, torch.Tensor) and part.shape[-1:] == (3,) else torch.zeros(2, 3))

    def length_reward(w, texts):
        "A reward of a user"
        return [float(len(text)) for text in texts]

    @cached_property
    def blurr(w):
        "A Learner of blurr, made as its documentation says"
        w.tok.save_pretrained(w.path / 'hf')
        BertForSequenceClassification(w.new_config()).save_pretrained(w.path / 'hf')
        enable_blurr()
        from blurr.text.modeling.all import BlearnerForSequenceClassification

        df = w.df[['text', 'label']].assign(is_valid=w.df.valid)
        learn = BlearnerForSequenceClassification.from_data(df, str(w.path / 'hf'), dl_kwargs=dict(bs=6))
        disable_blurr()
        return learn

    quick = cached_property(lambda w: QuickData(w.quick_df, w.texts, name='a'))
    cache = cached_property(lambda w: PrefixCache(Prefix(w.learn.model, 1), w.dls.train, where='memory').fill())

    def score(w, preds, targets):
        return 1.0

    # --- files ---

    def write_files(w):
        "Write the files that calls read"
        path = w.path
        (path / 'good.json').write_text('{"a": 1}')
        save_tree(path / 'tree', dict(a=w.matrix_t, b=[1, 'x']))
        w.spec.save(path / 'spec.json')
        w.df[['text', 'label']].to_csv(path / 't.csv', index=False)
        for i, (text, label) in enumerate(zip(w.texts, w.labels)):
            (path / 'folder' / label).mkdir(parents=True, exist_ok=True)
            (path / 'folder' / label / f'{i}.txt').write_text(text)
        w.tok.save_pretrained(path / 'tok')
        w.encoder.save(path / 'encoder')
        w.hf_encoder.save(path / 'hf_encoder')
        w.learn.save_bundle(path / 'bundle')
        w.learn.path = path
        w.learn.save_encoder(path / 'saved_enc')
        with contextlib.redirect_stdout(None):
            w.ulmfit.finetune_lm(w.texts, encoder=None, epochs=1, bs=2, valid_pct=0.2)
            w.ulmfit.classifier(w.df, epochs=[1, 1], groups=[1, 2], bs=6)
        # after the first training: PyTorch's threads for devices of these libraries could not be forked
        w.learn.save_bundle(path / 'onnx', onnx=True)
        (path / 'lines.csv').write_text('text\n' + '\n'.join(w.texts))
        tokenize_to_file(path / 'lines.csv', path / 'stored', w.dec_tok, n_workers=1)
        tokenize_to_file(path / 'lines.csv', path / 'words', n_workers=1)
        (path / 'vectors.txt').write_text('good 1 2\nbad 3 4\n')
        w.blurr.export(path / 'blurr.pkl')

    ulmfit = cached_property(lambda w: ULMFiT(w.path / 'ulmfit', w.awd_config, seq_len=8, progress=False, min_freq=1))

    def new_ulmfit(w):
        return ULMFiT('run', w.awd_config, seq_len=8, progress=False, min_freq=1)

    # --- uses of results ---

    @staticmethod
    def enter(context):
        "Enter a context and leave it"
        with context:
            return None

    @staticmethod
    def write(context):
        with context as path:
            Path(path).write_text('a')

    def fit(w, cb):
        "Train two epochs with a Callback; the weights must be finite"
        with w.learn.no_bar(), w.learn.no_logging():
            w.learn.fit(2, 1e-3, cbs=cb)
        return [p.detach() for p in w.learn.model.parameters()]

    @staticmethod
    def fit_of(learn):
        "Train a Learner for two epochs; the weights must be finite"
        with learn.no_bar(), learn.no_logging():
            learn.fit(2, 1e-3)
        return [p.detach() for p in learn.model.parameters()]

    def new_opt(w):
        w.learn.create_opt()
        return w.learn.opt

    def fit_frozen(w, cb):
        w.learn.freeze_to(-1)
        return w.fit(cb)

    @staticmethod
    def step(opt):
        opt.step()

    @staticmethod
    def use_store(store):
        store.open()
        for i, n in enumerate((3, 4)):
            store.write(i, torch.ones(n, 5))
        states = store.read([0, 1])
        store.close()
        return states

    @staticmethod
    def use_stage(stage):
        with stage.lock():
            stage.begin(dict(a=1))
        return stage.saved_settings()

    @staticmethod
    def texts_of(generated):
        "Return generated texts, also those of a stream"
        return ''.join(generated) if not hasattr(generated, 'texts') else generated.texts

    @staticmethod
    def predicted(found):
        "Return a table of predictions and their probabilities"
        return [found.table(), found.probs]

    # --- conditions ---

    @staticmethod
    def has_nan(scores):
        "Whether scores have NaN or infinity"
        return not np.isfinite(np.asarray(scores, dtype=float)).all()

    @staticmethod
    def is_distribution(probs):
        probs = np.asarray(probs, dtype=float)
        return bool(np.isfinite(probs).all() and (probs >= 0).all() and (probs <= 1 + 1e-5).all())

    @staticmethod
    def is_split(split, n):
        "Whether a split has each row once, and both sides have rows; labels that occur once all go to training"
        train, valid = (np.asarray(o, dtype=int).tolist() for o in split)
        rows = train + valid
        has_both = (bool(train) or not n) and (bool(valid) or n < 4)
        return len(set(rows)) == len(rows) and has_both and set(rows) <= set(range(n))

    @staticmethod
    def is_spec(spec):
        return spec.max_length is None or spec.max_length > 0
