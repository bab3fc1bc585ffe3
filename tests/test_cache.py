"""Frozen layers that are computed once, and a top layer that computes one position, give the same results as the
ordinary model in every family, and raise an error where they would not."""

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.rnn import RNNRegularizer
from fastai.vision.augment import RandTransform

from fastai_tl.all import *
from fastai_tl.efficiency import feature_store as states_module

WORDS = 'alpha beta gamma delta epsilon zeta eta theta iota kappa'.split()
CLASSES = ['bad', 'dull', 'good']
OWN = dict(bad='awful', dull='tedious', good='lovely')
FAMILIES = ['bert', 'roberta', 'xlm-roberta', 'distilbert', 'electra', 'gpt2', 'llama']


def frame(n=72, seed=0):
    "Texts of different lengths, each with a word of its class at a random place"
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        [
            dict(
                text=' '.join(
                    [*rng.choice(WORDS, rng.integers(1, 14)), OWN[l], *rng.choice(WORDS, rng.integers(0, 9))]
                ),
                label=l,
            )
            for l in (CLASSES[i % 3] for i in range(n))
        ]
    )


@pytest.fixture(scope='module')
def tokz():
    return {kind: train_tokenizer(frame().text, 400, kind=kind, max_length=64) for kind in ('encoder', 'decoder')}


def model_of(kind, n=3, drop=0.0):
    "A small model with random weights that are large enough for its logits to be of size one"
    import transformers as T

    small = dict(
        vocab_size=400,
        hidden_size=32,
        num_hidden_layers=n,
        num_attention_heads=4,
        intermediate_size=64,
        pad_token_id=0,
        num_labels=3,
        initializer_range=0.15,
    )
    drops = dict(hidden_dropout_prob=drop, attention_probs_dropout_prob=drop)
    cfg = {
        'bert': lambda: T.BertConfig(**small, **drops),
        'roberta': lambda: T.RobertaConfig(**small, **drops),
        'xlm-roberta': lambda: T.XLMRobertaConfig(**small, **drops),
        'electra': lambda: T.ElectraConfig(embedding_size=16, **small, **drops),
        'llama': lambda: T.LlamaConfig(num_key_value_heads=2, attention_dropout=drop, **small),
        'distilbert': lambda: T.DistilBertConfig(
            vocab_size=400,
            dim=32,
            n_layers=n,
            n_heads=4,
            hidden_dim=64,
            num_labels=3,
            dropout=drop,
            attention_dropout=drop,
            seq_classif_dropout=drop,
            initializer_range=0.15,
        ),
        'gpt2': lambda: T.GPT2Config(
            vocab_size=400,
            n_embd=32,
            n_layer=n,
            n_head=4,
            bos_token_id=0,
            eos_token_id=0,
            num_labels=3,
            resid_pdrop=drop,
            embd_pdrop=drop,
            attn_pdrop=drop,
            initializer_range=0.15,
        ),
    }[kind]()
    seed_everything(1)
    return T.AutoModelForSequenceClassification.from_config(cfg)


def quiet(learn):
    learn.remove_cb(learn.progress)
    learn.logger = lambda *a: None
    return learn


def learner(kind, tokz, path, df=None, drop=0.0, bs=8, **kw):
    tk = tokz['decoder' if kind in ('gpt2', 'llama') else 'encoder']
    dls = HFTextDataLoaders.from_df(frame() if df is None else df, tk, bs=bs, verbose=False, path=path)
    return quiet(hf_classifier_learner(dls, model_of(kind, drop=drop), lr=1e-3, **kw))


def awd_learner(path, drop_mult=0.3):
    df = frame()
    texts = tokenize_texts_once(df.text.tolist())
    vocab = texts_vocab(texts)
    dls = classifier_dls(
        texts, df.label.tolist(), 'classification', *split_rows(df.label.tolist(), 'classification'), vocab, bs=8
    )
    seed_everything(1)
    return quiet(
        awd_classifier_learner(
            dls, 'classification', 3, dict(emb_sz=12, n_hid=16, n_layers=2), seq_len=20, drop_mult=drop_mult, path=path
        )
    )


class FrozenEval(Callback):
    "What the cache is compared with: frozen layers in eval mode, computed every epoch"

    def before_train(self):
        for m in frozen_modules(self.model):
            m.eval()


def stage(learn, i, cb, epochs=2, lr=3e-3, seed=7):
    "One fit with the groups below `i` frozen; losses of the steps, and losses and metrics of the epochs"
    if learn.opt is None:
        learn.create_opt()
    learn.opt.freeze_to(i)
    start_epoch_from_seed(learn.dls, seed)
    learn.fit(epochs, lr, cbs=cb)
    return np.array([float(o) for o in learn.recorder.losses]), np.array(
        [list(v) for v in learn.recorder.values], dtype=float
    )


def whole(a, b, tol=1e-4):
    assert np.abs(a - b).max() < tol, np.abs(a - b).max()


# --- the two parts of a model ---


def batches(kind, tokz):
    "Texts of different lengths padded on the right, on the left, and not at all"
    pad = HFTextDataLoaders.from_df(
        frame(24), tokz['decoder' if kind in ('gpt2', 'llama') else 'encoder'], bs=8, verbose=False
    )
    xs = [pad.train.dataset[i][0] for i in range(6)]
    n = max(x.shape[1] for x in xs)
    for left in (False, True):
        x = torch.full((6, xs[0].shape[0], n), -1)
        for r, o in zip(x, xs):
            r[:, slice(n - o.shape[1], n) if left else slice(o.shape[1])] = o
        yield TensorTokens(x)
    yield TensorTokens(torch.stack([o[:, :3] for o in xs]))


@pytest.mark.parametrize('kind', FAMILIES)
def test_logits_from_recorded_states(kind, tokz):
    "Every place of the cut, with and without the single-position top layer: the whole model's logits"
    model = HFModel(model_of(kind)).eval()
    for x in batches(kind, tokz):
        with torch.no_grad():
            ref = model(x)
        assert ref.abs().max() > 0.1  # not a comparison of zeros
        for k in range(4):
            cut, one = Prefix(model, k), SinglePosition(model)
            with torch.no_grad():
                states = cut.record(x)
                with cut.replay(states):
                    a = model(x)
                if k < 3:
                    with one, cut.replay(states):
                        b = model(x)
                    assert (b - ref).abs().max() < 2e-6
            assert (a - ref).abs().max() < 2e-6


@pytest.mark.parametrize('kind', FAMILIES)
def test_single_position_gradients(kind, tokz):
    "Every parameter has the same gradient"
    model = HFModel(model_of(kind)).eval()
    for x in batches(kind, tokz):
        grads = []
        for one in (None, SinglePosition(model)):
            model.zero_grad()
            if one is None:
                model(x).square().sum().backward()
            else:
                with one:
                    model(x).square().sum().backward()
            grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        assert grads[0].keys() == grads[1].keys()
        for n, g in grads[0].items():
            assert (g - grads[1][n]).abs().max() < 1e-5 * max(1, g.abs().max().item()), n


def test_single_position_keeps_dropout(tokz):
    "In training mode the mean over many draws is that of the ordinary layer, and draws differ"
    model = HFModel(model_of('bert', drop=0.3)).train()
    x = next(batches('bert', tokz))[:2]
    for b in find_blocks(model)[:-1]:
        b.eval()
    model.inner[0].bert.embeddings.eval()
    with torch.no_grad():
        seed_everything(0)
        draws = lambda: torch.stack([model(x) for _ in range(1500)])
        a = draws()
        with SinglePosition(model):
            b = draws()
    assert b.std(0).min() > 0.01 and (a.std(0) / b.std(0) - 1).abs().max() < 0.15
    err = (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()
    assert ((a.mean(0) - b.mean(0)) / err).abs().max() < 4.5


def test_learner_with_single_position(tokz, tmp_path):
    "Training and predictions are the same as without, and the model is left unchanged"
    plain, one = learner('bert', tokz, tmp_path), learner('bert', tokz, tmp_path).single_position()
    a, b = stage(plain, 0, None), stage(one, 0, None)
    whole(a[0], b[0])
    whole(a[1], b[1], 1e-3)
    whole(plain.get_preds()[0].numpy(), one.get_preds()[0].numpy())
    whole(plain.predict('alpha awful')[2].numpy(), one.predict('alpha awful')[2].numpy())
    assert not [n for n, m in one.model.named_modules() if 'forward' in vars(m)]
    one.export(tmp_path / 'one.pkl')
    from fastai.learner import load_learner

    whole(load_learner(tmp_path / 'one.pkl').predict('alpha awful')[2].numpy(), one.predict('alpha awful')[2].numpy())


# --- a stage with the cache, and without ---


@pytest.mark.parametrize('kind', ['bert', 'roberta', 'distilbert', 'electra', 'gpt2', 'llama'])
def test_stage_is_the_same(kind, tokz, tmp_path):
    "Losses of every step, validation, and predictions afterwards, for one frozen layer, two, and all"
    for i in (2, 3, 4):
        if kind == 'llama' and i == 4:
            continue
        plain, cached = (learner(kind, tokz, tmp_path) for _ in range(2))
        a, b = stage(plain, i, FrozenEval()), stage(cached, i, CachedPrefix())
        whole(a[0], b[0])
        whole(a[1], b[1], 1e-3)
        assert a[0].std() > 1e-3
        (p, y), (q, z) = plain.get_preds(), cached.get_preds()
        whole(p.numpy(), q.numpy())
        assert y.tolist() == z.tolist()
        for s, t in zip(plain.model.state_dict().values(), cached.model.state_dict().values()):
            assert torch.allclose(s.float(), t.float(), atol=1e-4)
        assert not [n for n, m in cached.model.named_modules() if 'forward' in vars(m)]


def test_nothing_is_computed_below_the_cut(tokz, tmp_path):
    "Frozen layers do not run after their states have been computed"
    learn, calls = learner('bert', tokz, tmp_path), []
    layers = find_blocks(learn.model)
    for i, b in enumerate(layers):
        own = b.attention.forward
        b.attention.forward = lambda *a, own=own, i=i, **k: (calls.append(i), own(*a, **k))[1]
    stage(learn, 3, CachedPrefix(), epochs=3)
    n = len(learn.dls.train) * 3 + len(learn.dls.valid) * 3
    built = 2  # one batch of 64 for training, one for validation; and the cut is tried out
    assert calls.count(2) >= n and calls.count(0) == calls.count(1) <= built + 8 < n


def test_awd_lstm_stage_is_the_same(tmp_path):
    plain, cached = awd_learner(tmp_path), awd_learner(tmp_path)
    a, b = stage(plain, -1, FrozenEval(), 3), stage(cached, -1, CachedPrefix(), 3)
    whole(a[0], b[0])
    whole(a[1], b[1], 1e-3)
    assert a[0].std() > 1e-3
    whole(plain.get_preds()[0].numpy(), cached.get_preds()[0].numpy())
    with pytest.raises(FastaiTLError, match='the whole encoder of an AWD_LSTM'):
        stage(awd_learner(tmp_path), -2, CachedPrefix())


def test_awd_lstm_regularisation_does_not_fail(tmp_path):
    "AR and TAR of a frozen encoder add nothing to a gradient; with the cache they are zero"
    learn = awd_learner(tmp_path)
    assert learn.cbs.map(type).count(RNNRegularizer) == 1
    losses, _ = stage(learn, -1, CachedPrefix(), 1)
    assert np.isfinite(losses).all() and np.isfinite(float(learn.recorder.losses[-1]))


def test_training_and_validation_order(tokz, tmp_path):
    "Targets come in the order of the plain run, and predictions in the order of the data"

    class Seen(Callback):
        def before_fit(self):
            self.ys = []

        def before_batch(self):
            self.ys.append((self.training, self.yb[0].tolist(), type(self.yb[0]).__name__))

    ys = []
    for cb in (FrozenEval(), CachedPrefix()):
        learn, seen = learner('bert', tokz, tmp_path), Seen()
        stage(learn, 3, [cb, seen])
        ys.append(seen.ys)
    assert ys[0] == ys[1] and any(not t for t, *_ in ys[0])


def test_dropout_above_the_cut_is_kept(tokz, tmp_path):
    "Two runs with different seeds differ by the dropout above, which the cache leaves on"

    class Modes(Callback):
        def after_pred(self):
            if self.training:
                self.modes = [b.training for b in find_blocks(self.model)]

    learn, modes = learner('bert', tokz, tmp_path, drop=0.3), Modes()
    a = stage(learn, 3, [CachedPrefix(), modes])[0]
    assert modes.modes == [False, False, True]
    b = stage(learner('bert', tokz, tmp_path), 3, CachedPrefix())[0]
    assert np.abs(a - b).max() > 0.01


@pytest.mark.parametrize('dtype,tol', [(torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
def test_kept_in_16_bits(dtype, tol, tokz, tmp_path):
    a = stage(learner('bert', tokz, tmp_path), 3, FrozenEval())[0]
    cb = CachedPrefix(dtype=dtype)
    learn = learner('bert', tokz, tmp_path)
    learn.add_cb(cb)
    b = stage(learn, 3, None)[0]
    assert cb.caches['training'].store.data.dtype == dtype and 0 < np.abs(a - b).max() < tol


def test_bf16_autocast(tokz, tmp_path):
    "States are stored in the dtype that the Learner computes in"
    a = stage(learner('bert', tokz, tmp_path), 3, FrozenEval())[0]
    learn, cb = learner('bert', tokz, tmp_path).to_bf16(force=True), CachedPrefix()
    learn.add_cb(cb)
    b = stage(learn, 3, None)[0]
    assert cb.caches['training'].store.dtype == torch.bfloat16 and np.abs(a - b).max() < 5e-2


# --- where the states are, and when they go ---


def test_disk(tokz, tmp_path, monkeypatch, capsys):
    "Short memory: the states go to a file, which is announced and removed after the fit, and the losses are the same"
    a = stage(learner('bert', tokz, tmp_path), 2, CachedPrefix())[0]
    monkeypatch.setattr(states_module, 'free_memory', lambda: 1000)
    files = []

    class Look(Callback):
        def before_batch(self):
            files.append(sorted(p.name for p in (tmp_path / 'cache').glob('.prefix.states.*')))

    learn = learner('bert', tokz, tmp_path)
    capsys.readouterr()
    b = stage(learn, 2, [CachedPrefix(), Look()])[0]
    out = capsys.readouterr().out
    assert 'on disk' in out and '1 of 3 layers' in out and 'MB' in out
    assert len(files[0]) == 1 and len(files[-1]) == 2 and not list((tmp_path / 'cache').glob('.prefix.states.*'))
    assert np.array_equal(a, b)
    monkeypatch.setattr(states_module.shutil, 'disk_usage', lambda p: type('U', (), dict(free=10)))
    with pytest.raises(FastaiTLError, match='need .* MB.*Got 0.0 kB'):
        stage(learner('bert', tokz, tmp_path), 2, CachedPrefix())


class Builds(Callback):
    "Counts how many sets of states were computed"

    order = CachedPrefix.order + 1

    def before_fit(self):
        self.n, self.last = 0, None

    def before_train(self):
        now = self.learn.cached_prefix.caches.get('training')
        if now is not None and now is not self.last:
            self.n, self.last = self.n + 1, now


def test_given_up_when_something_changes(tokz, tmp_path):
    "States are computed once per stage, again after unfreezing, new weights or new data, and never if all layers train"
    learn, cb = learner('bert', tokz, tmp_path), CachedPrefix(optional=True)
    learn.add_cb(cb)
    stage(learn, 3, None)
    first = cb.caches['training']
    stage(learn, 3, None)
    assert cb.caches['training'] is first
    stage(learn, 2, None)
    second = cb.caches['training']
    assert second is not first and first.store.data is None and second.prefix.k == 1
    with torch.no_grad():
        find_blocks(learn.model)[0].attention.output.dense.weight.mul_(1.1)
    stage(learn, 2, None)
    third = cb.caches['training']
    assert third is not second
    find_blocks(learn.model)[0].attention.output.dense.weight.data += 0.1  # which raises no version
    stage(learn, 2, None)
    assert cb.caches['training'] is not third
    learn.dls = HFTextDataLoaders.from_df(frame(48, seed=5), tokz['encoder'], bs=8, verbose=False, path=tmp_path)
    stage(learn, 2, None)
    assert len(cb.caches['training'].store) == len(learn.dls.train_ds)
    fresh = learner('bert', tokz, tmp_path, df=frame(48, seed=5))
    fresh.model.load_state_dict(learn.model.state_dict())
    learn.opt = None
    whole(stage(learn, 2, None)[0], stage(fresh, 2, FrozenEval())[0])
    stage(learn, 0, None)
    assert not cb.caches and cb.prefix is None


def test_gradual_unfreezing(tokz, tmp_path):
    "A whole recipe with the cache and with frozen_eval alone"
    runs = []
    for kw in (dict(frozen_eval=True), dict(cache=True)):
        learn, builds = learner('bert', tokz, tmp_path), Builds()
        start_epoch_from_seed(learn.dls, 3)
        gu = learn.fit_gradual(epochs=[2, 2, 2], groups=[1, 3, 5], lr=3e-3, cbs=builds if 'cache' in kw else None, **kw)
        runs.append((np.array([float(o) for o in learn.recorder.losses]), gu.table(), learn.get_preds()[0].numpy()))
        if 'cache' in kw:
            assert builds.n == 2
    whole(runs[0][0], runs[1][0], 5e-4)
    whole(runs[0][2], runs[1][2], 5e-4)
    assert runs[0][1].layers.tolist() == runs[1][1].layers.tolist() and not hasattr(learn, 'cached_prefix')


def test_gradual_unfreezing_awd(tmp_path):
    runs = []
    for kw in (dict(frozen_eval=True), dict(cache=True)):
        learn = awd_learner(tmp_path)
        start_epoch_from_seed(learn.dls, 3)
        learn.fit_gradual(epochs=[2, 1, 1], groups=[1, 2, 4], lr=3e-3, **kw)
        runs.append(np.array([float(o) for o in learn.recorder.losses]))
    whole(*runs, 5e-4)


def test_resumed_run(tokz, tmp_path):
    "A run that was interrupted in a cached stage and resumed ends with the same weights"

    class Stop(Callback):
        order = 90

        def __init__(self, at):
            self.at = at

        def after_epoch(self):
            if self.epoch == self.at:
                raise KeyboardInterrupt

    def fit(path, *cbs):
        learn = learner('bert', tokz, tmp_path, drop=0.1)
        learn.fit_gradual(
            epochs=[2, 2, 1],
            groups=[1, 3, 5],
            lr=3e-3,
            cache=True,
            cbs=[ResumableFit(path / 'c.safetensors', seed=4), *cbs],
        )
        return learn

    (tmp_path / 'a').mkdir()
    (tmp_path / 'b').mkdir()
    straight = fit(tmp_path / 'a')
    for at in (0, 2):
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path / 'b', Stop(at))
    resumed = fit(tmp_path / 'b')
    for s, t in zip(straight.model.state_dict().values(), resumed.model.state_dict().values()):
        assert torch.equal(s, t)


def test_an_interrupted_fit_leaves_the_model_whole(tokz, tmp_path):
    class Break(Callback):
        order = 90

        def after_pred(self):
            if self.iter == 2:
                raise KeyboardInterrupt

    learn = learner('bert', tokz, tmp_path)
    before = learn.get_preds()[0]
    cb = CachedPrefix()
    with pytest.raises(KeyboardInterrupt):
        stage(learn, 4, [cb, Break()], lr=0.0)
    assert not [n for n, m in learn.model.named_modules() if 'forward' in vars(m)] and not cb.caches
    whole(before.numpy(), learn.get_preds()[0].numpy(), 1e-6)


def test_predictions_inside_a_cached_epoch(tokz, tmp_path):
    "Predictions that another Callback makes during the fit are computed in full"
    res = []

    class Ask(Callback):
        def before_batch(self):
            if self.training and self.iter == 1:
                was = self.model.training
                self.model.eval()
                with torch.no_grad():
                    res.append(self.model(x))
                self.model.train(was)

    learn = learner('bert', tokz, tmp_path)
    x = next(batches('bert', tokz))
    with torch.no_grad():
        ref = learn.model.eval()(x)
    stage(learn, 4, [CachedPrefix(), Ask()], lr=0.0, epochs=1)
    whole(res[0].numpy(), ref.numpy(), 1e-6)


# --- refused ---


def test_refused(tokz, tmp_path):
    with pytest.raises(FastaiTLError, match='needs frozen layers'):
        stage(learner('bert', tokz, tmp_path), 0, CachedPrefix())

    class Swap(RandTransform):
        def encodes(self, x: TensorTokens):
            return x

    learn = learner('bert', tokz, tmp_path)
    learn.dls.train.after_batch.add(Swap())
    with pytest.raises(DataError, match='random transforms .Swap.'):
        stage(learn, 3, CachedPrefix())
    from fasttransform import Transform

    class Jitter(Transform):
        def encodes(self, x: TensorTokens):
            return x.where(torch.rand(x.shape) < 0.5, x.clamp(max=7))

    learn = learner('bert', tokz, tmp_path)
    learn.dls.train.after_batch.add(Jitter())
    with pytest.raises(DataError, match='differ when they are drawn again'):
        stage(learn, 3, CachedPrefix())
    learn = learner('bert', tokz, tmp_path)
    find_blocks(learn.model)[0].register_forward_hook(lambda *a: None)
    with pytest.raises(FastaiTLError, match='no hooks'):
        stage(learn, 3, CachedPrefix())


def test_masked_language_model_refused(tokz, tmp_path):
    import transformers as T

    dls = HFMaskedLMDataLoaders.from_texts(frame().text.tolist(), tokz['encoder'], bs=8, path=tmp_path)
    seed_everything(0)
    learn = quiet(
        hf_masked_lm_learner(
            dls,
            T.BertConfig(
                vocab_size=400,
                hidden_size=32,
                num_hidden_layers=3,
                num_attention_heads=4,
                intermediate_size=64,
                tie_word_embeddings=False,
            ),
        )
    )
    with pytest.raises(DataError, match='cut or masked differently'):
        stage(learn, 3, CachedPrefix())


def test_models_refused(tokz):
    import transformers as T

    small = dict(
        vocab_size=400, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, pad_token_id=0
    )
    with pytest.raises(FastaiTLError, match='share their weights'):
        find_blocks(HFModel(T.AlbertForSequenceClassification(T.AlbertConfig(embedding_size=16, **small))))
    with pytest.raises(FastaiTLError, match='whose head reads more'):
        SinglePosition(HFModel(T.BertForTokenClassification(T.BertConfig(**small))))
    with pytest.raises(FastaiTLError, match='known form'):
        SinglePosition(HFModel(T.DebertaV2ForSequenceClassification(T.DebertaV2Config(**small))))
    with pytest.raises(FastaiTLError, match='an encoder and a decoder'):
        find_blocks(
            HFModel(
                T.BartForSequenceClassification(
                    T.BartConfig(
                        vocab_size=99,
                        d_model=16,
                        encoder_layers=2,
                        decoder_layers=2,
                        encoder_attention_heads=2,
                        decoder_attention_heads=2,
                        encoder_ffn_dim=32,
                        decoder_ffn_dim=32,
                    )
                )
            )
        )


def test_adapters(tokz, tmp_path):
    "Adapters in every layer train, so nothing is frozen; SinglePosition works with them"
    peft = pytest.importorskip('peft')
    learn = learner('bert', tokz, tmp_path, peft_config=peft.LoraConfig(r=4, target_modules=['query', 'value']))
    with pytest.raises(FastaiTLError, match='needs frozen layers.*lora'):
        learn.fit(1, cbs=CachedPrefix())
    x = next(batches('bert', tokz))
    learn.model.eval()
    with torch.no_grad():
        for n, p in learn.model.named_parameters():
            if 'lora_B' in n:
                p.normal_()
        ref = learn.model(x)
        with SinglePosition(learn.model):
            assert (learn.model(x) - ref).abs().max() < 2e-6


def test_tagger_with_the_cache(tokz, tmp_path):
    "Tagging: a target for each token, and a head that reads all positions"
    rng = np.random.default_rng(0)
    sents = [list(rng.choice(WORDS, rng.integers(2, 9))) for _ in range(48)]
    tags = [['B-X' if w in ('alpha', 'beta') else 'O' for w in s] for s in sents]
    runs = []
    for cb in (FrozenEval(), CachedPrefix()):
        dls = HFTagDataLoaders.from_df(
            pd.DataFrame(dict(tokens=sents, tags=tags)), tokz['encoder'], bs=8, path=tmp_path
        )
        import transformers as T

        seed_everything(1)
        learn = quiet(
            hf_tagger_learner(
                dls,
                T.BertConfig(
                    vocab_size=400,
                    hidden_size=32,
                    num_hidden_layers=3,
                    num_attention_heads=4,
                    intermediate_size=64,
                    hidden_dropout_prob=0.0,
                    attention_probs_dropout_prob=0.0,
                    initializer_range=0.15,
                ),
            )
        )
        runs.append(stage(learn, 3, cb)[0])
    whole(*runs)
    assert runs[0].std() > 1e-3


# --- an interrupted fit ---

PLACES = ['forward', 'loss', 'backward', 'optimizer', 'before_batch', 'after_batch', 'before_epoch']


class BreakAt(Callback):
    "Raise `error` in the third batch, at `where`"

    order = 95

    def __init__(self, where, error):
        self.where = where
        self.error = error
        self.seen = 0

    def _at(self, where):
        if self.where == where and self.seen == 3:
            raise self.error('here')

    def before_batch(self):
        self.seen += self.training
        self._at('before_batch')

    def after_batch(self):
        self._at('after_batch')

    def before_epoch(self):
        if self.where == 'before_epoch' and self.epoch == 1:
            raise self.error('here')


def fit_broken_off(learn, where, error, fit):
    "Call `fit` and interrupt it in the model, the loss, the gradient, the optimizer or an event"
    cb = BreakAt(where, error)
    opt_step = learn.opt.step
    loss = learn.loss_func
    head = [m for m in learn.model.modules() if isinstance(m, torch.nn.Linear)][-1]
    hooks = [
        head.register_forward_hook(lambda *a: cb._at('forward'), always_call=False),
        head.register_full_backward_hook(lambda *a: cb._at('backward')),
    ]
    learn.loss_func = lambda *a: [cb._at('loss'), loss(*a)][1]
    learn.opt.step = lambda: [cb._at('optimizer'), opt_step()][1]
    try:
        with pytest.raises(error, match='here'):
            fit(learn, cb)
    finally:
        for h in hooks:
            h.remove()
        learn.loss_func, learn.opt.step = loss, opt_step


def as_ever(learn, ref, path, tol=1e-5):
    """Check that nothing is left behind, and that predictor, export and another fit work; `ref` is an untouched model
    with the same weights"""
    import copy
    from fastai.learner import load_learner
    from torch.overrides import _get_current_function_mode_stack

    left = [n for n, m in learn.model.named_modules() if 'forward' in vars(m)]
    assert not left and not torch.is_autocast_enabled('cpu') and not _get_current_function_mode_stack()
    ref.load_state_dict(learn.model.state_dict())
    x = learn.dls.valid.one_batch()[0]
    with torch.no_grad():
        y, z = learn.model.eval()(x), ref.eval()(x)
    y, z = (o[0] if isinstance(o, tuple) else o for o in (y, z))
    whole(y.numpy(), z.numpy(), 1e-6)
    copy.deepcopy(learn.model)
    texts = ['alpha awful beta', 'lovely']
    one = np.stack([learn.predict(t)[2].numpy() for t in texts])
    whole(learn.predictor().predict_proba(texts), one, tol)
    n = len(learn.dls.train_ds)
    learn.export(path / 'broken.pkl')
    assert len(learn.dls.train_ds) == n
    whole(np.stack([load_learner(path / 'broken.pkl').predict(t)[2].numpy() for t in texts]), one, tol)
    learn.fit(1, 1e-3)
    assert np.isfinite(learn.recorder.values[-1]).all() and '_do_one_batch' not in vars(learn)


@pytest.mark.parametrize('where', PLACES)
@pytest.mark.parametrize('error', [KeyboardInterrupt, MemoryError])
def test_broken_off_with_single_position_and_fast_dropout(where, error, tokz, tmp_path):
    learn = learner('bert', tokz, tmp_path, drop=0.1).single_position().fast_dropout()
    learn.create_opt()
    fit_broken_off(learn, where, error, lambda l, cb: l.fit(2, 1e-3, cbs=cb))
    as_ever(learn, HFModel(model_of('bert')), tmp_path)
    learn.fast_dropout(False)
    assert '_do_one_batch' not in vars(learn)


@pytest.mark.parametrize('where', PLACES)
def test_fit_transfer_broken_off(where, tokz, tmp_path):
    "Callbacks, mixed precision and stored states are removed after an interrupt, with and without the cache"
    for kw in (dict(recipe='top_layers', epochs=2), dict(recipe='full', epochs=2)):
        learn = learner('bert', tokz, tmp_path)
        learn.create_opt()
        names = learn.cbs.map(type)
        fit_broken_off(
            learn,
            where,
            KeyboardInterrupt,
            lambda l, cb: l.fit_transfer(lr=1e-3, best=True, mixed_precision=True, cbs=cb, **kw),
        )
        assert learn.cbs.map(type) == names
        as_ever(learn, HFModel(model_of('bert')), tmp_path)


@pytest.mark.parametrize('where', ['forward', 'loss', 'backward', 'optimizer'])
def test_awd_lstm_broken_off(where, tmp_path):
    "The same in a cached stage of an AWD_LSTM in bfloat16"
    learn = awd_learner(tmp_path).to_mixed_precision('bf16', force=True)
    learn.create_opt()
    learn.freeze_to(-1)
    fit_broken_off(learn, where, KeyboardInterrupt, lambda l, cb: l.fit(2, 1e-3, cbs=[CachedPrefix(), cb]))
    assert {type(m) for m in learn.model.modules() if isinstance(m, torch.nn.LSTM)} == {torch.nn.LSTM}
    learn.to_fp32()
    as_ever(learn, awd_learner(tmp_path).model, tmp_path)


def test_copies_of_single_position(tokz):
    "A copy and a pickled one compute the same, also if they were taken inside the block"
    import copy, pickle

    model = HFModel(model_of('bert')).eval()
    x = next(batches('bert', tokz))
    with torch.no_grad():
        ref, one = model(x), SinglePosition(model)
        for dup in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
            with dup:
                whole(dup.model(x).numpy(), ref.numpy(), 2e-6)
        with one:
            inside = copy.deepcopy(model)
        whole(inside(x).numpy(), ref.numpy(), 2e-6)


# --- an AWD_LSTM classifier's pooling ---

LENGTHS = [97, 75, 61, 60, 59, 45, 41, 40, 39, 30, 23, 21, 20, 19, 12, 7, 3, 1]


def padded(rows, bptt):
    from fastai.text.data import pad_chunk

    return torch.stack([pad_chunk(r, seq_len=bptt, pad_len=len(rows[0])) for r in rows])


def awd_model(bptt=20, max_len=1440):
    from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_clas_config
    from fastai.text.models.core import get_text_classifier

    seed_everything(2)
    return get_text_classifier(
        AWD_LSTM,
        60,
        3,
        seq_len=bptt,
        config=dict(awd_lstm_clas_config, emb_sz=12, n_hid=16, n_layers=2),
        max_len=max_len,
    ).eval()


@pytest.mark.parametrize('max_len', [1440, 40, None])
def test_pooling_does_not_depend_on_the_batch(max_len):
    """Texts shorter than a chunk, of several chunks, and longer than what is pooled: the same result in any batch as
    alone, and alone the same as fastai's; without padding exactly fastai's numbers"""
    fastai, ours = awd_model(max_len=max_len), pool_real_tokens(awd_model(max_len=max_len))
    assert list(fastai.state_dict()) == list(ours.state_dict())
    g = torch.Generator().manual_seed(0)
    rows = [torch.randint(2, 60, (n,), generator=g) for n in LENGTHS]
    with torch.no_grad():
        alone = torch.cat([fastai(r[None])[0] for r in rows])
        assert torch.equal(alone, torch.cat([ours(r[None])[0] for r in rows]))
        for at in range(len(rows)):
            for step in (1, 3):
                whole(ours(padded(rows[at::step], 20))[0].numpy(), alone[at::step].numpy(), 1e-5)
        assert (fastai(padded(rows, 20))[0] - alone).abs().max() > 1e-3  # what is mended
        for n in (7, 20, 61, 97):
            x = torch.randint(2, 60, (5, n), generator=g)
            assert torch.equal(fastai(x)[0], ours(x)[0])
        assert torch.equal(pool_real_tokens(ours, back=True)(padded(rows, 20))[0], fastai(padded(rows, 20))[0])


def test_awd_classifier_in_a_batch_and_alone(tmp_path):
    "The prediction for a text is the same with or without cache, by get_preds, predict, Predictor, bundle and export"
    from fastai.learner import load_learner

    rng = np.random.default_rng(0)
    texts = [' '.join([*rng.choice(WORDS, rng.choice([1, 4, 15, 30, 70])), OWN[CLASSES[i % 3]]]) for i in range(60)]
    tokens = tokenize_texts_once(texts, progress=False)
    labels = [CLASSES[i % 3] for i in range(60)]
    dls = classifier_dls(
        tokens,
        labels,
        'classification',
        list(range(30)),
        list(range(30, 60)),
        texts_vocab(tokens, min_freq=1),
        bs=16,
        seq_len=20,
    )

    def make():
        seed_everything(1)
        return quiet(
            awd_classifier_learner(
                dls, 'classification', 3, dict(emb_sz=12, n_hid=16, n_layers=2), seq_len=20, path=tmp_path
            )
        )

    plain, learn = make(), make()
    a, b = stage(plain, -1, FrozenEval(), 3, 3e-2), stage(learn, -1, CachedPrefix(), 3, 3e-2)
    whole(a[0], b[0])
    whole(a[1], b[1], 1e-3)
    held = texts[30:]
    with learn.no_bar():
        ref = learn.get_preds()[0].numpy()
        assert np.ptp(ref, 0).max() > 1e-3
        whole(np.stack([learn.predict(t)[2].numpy() for t in held]), ref, 1e-5)
        whole(learn.get_preds(dl=learn.dls.test_dl(held, bs=3))[0].numpy(), ref, 1e-5)
    whole(learn.predictor().predict_proba(held), ref, 1e-5)
    learn.export(tmp_path / 'a.pkl')
    learn.save_bundle(tmp_path / 'bundle')
    learn.save('weights')
    loaded = load_learner(tmp_path / 'a.pkl')
    whole(loaded.get_preds(dl=loaded.dls.test_dl(held))[0].numpy(), ref, 1e-5)
    pred = load_bundle(tmp_path / 'bundle')
    whole(pred.predict_proba(held), ref, 1e-5)
    again = quiet(pred.learner(dls))
    whole(again.get_preds()[0].numpy(), ref, 1e-5)
    other = make()
    other.load('weights')
    whole(other.get_preds()[0].numpy(), ref, 1e-5)
