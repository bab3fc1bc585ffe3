"""ONNX files of this package: are they right for every architecture, and how fast is the Predictor with them?

    python benchmarks/onnx/run.py families [--part model|encoder] [--only NAME …] [--json FILE] [--resume]
    python benchmarks/onnx/run.py speed --data FOLDER [--texts 1000] [--threads 1] [--cpu-time] [--json FILE]
    python benchmarks/onnx/run.py int8 --data FOLDER [--texts 1000] [--json FILE]

- families: each class of transformers that classifies texts, from a small configuration (see
  `benchmarks/architectures/run.py`), is exported. The graph computes batches of 20 random shapes, none of them the
  shape of the example that the export saw, and is compared with transformers' model, one text at a time, without
  padding. Language models have no head for a graph; of these the features of the last layer are exported.
- speed: MiniLM with a head for two classes; questions of TREC-6, one at a time, and a mixture of TREC-6 and IMDb, all
  at once. The peers: transformers' `pipeline` with the best of four batch sizes, and ONNX Runtime as its
  documentation shows it (a graph from `torch.onnx.export`, `quantize_dynamic`, a tokenizer that pads each batch), one
  text at a time and in batches of 32, sorted by length or not.
- int8: MiniLM tuned on TREC-6 and on IMDb; size of the file, accuracy and decisions against float32."""

import json
import logging
import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
from common import interleave, offline, parser, set_threads

offline()
EXACT = 1e-5
N_SHAPES = 20
BATCH = 32  # texts in a batch of bare ONNX Runtime


# --- families ---


def letters(model):
    "A tokenizer of transformers with a token for each letter; a text ends in the token that the model's head looks for"
    from string import ascii_lowercase

    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    eos = getattr(model.hf.config, 'eos_token_id', None)
    special = {model.pad_id: '[PAD]'} | ({eos: '[EOS]'} if isinstance(eos, int) and 0 <= eos < model.vocab_sz else {})
    names = iter(['[UNK]', *ascii_lowercase])
    size = min(model.vocab_sz, len(special) + 27)
    vocab = {special[i] if i in special else next(names): i for i in [*range(size), *special] if i < model.vocab_sz}
    tok = Tokenizer(models.WordLevel(vocab, unk_token='[UNK]'))
    tok.pre_tokenizer = pre_tokenizers.Split(Regex('.'), 'isolated')
    if eos in special and eos != model.pad_id:
        tok.post_processor = processors.TemplateProcessing(single='$A [EOS]', special_tokens=[('[EOS]', eos)])
    return PreTrainedTokenizerFast(tokenizer_object=tok, pad_token='[PAD]', unk_token='[UNK]')


def random_shapes(rng, longest):
    "Batches of lengths of texts, each of another shape"
    shapes = {}
    while len(shapes) < N_SHAPES:
        lens = rng.integers(2, longest + 1, rng.integers(1, 6)).tolist()
        shapes[len(lens), max(lens)] = lens
    return list(shapes.values())


def texts_of(model, lens, rng):
    "Random texts of token ids that no part of the model takes for special ones"
    import torch

    special = {v for k, v in model.hf.config.to_dict().items() if k.endswith('_token_id') and isinstance(v, int)}
    words = [i for i in range(min(model.vocab_sz, 10_000)) if i not in special]
    rows = [torch.tensor(rng.choice(words, n)) for n in lens]
    eos = getattr(model.hf.config, 'eos_token_id', None)
    if isinstance(eos, int) and 0 <= eos < model.vocab_sz:
        for row in rows:
            row[-1] = eos  # some heads read this position
    return rows


def reference(model, row, part):
    "What transformers gives for one text: logits, or features of the last layer"
    import inspect

    import torch

    hf = model.hf
    if part == 'encoder':
        hf = hf.base_model.get_encoder() if hf.config.is_encoder_decoder else hf.base_model
    options = dict(use_cache=False) if 'use_cache' in inspect.signature(hf.forward).parameters else {}
    mask = torch.ones_like(row[None])
    out = hf(input_ids=row[None], attention_mask=mask, return_dict=True, **options)
    return (out.logits if part == 'model' else out.last_hidden_state)[0].detach().numpy()


def worst_difference(graph, model, part):
    "The largest difference over batches of random shapes, relative to the largest output above 1"
    import numpy as np
    import torch

    rng = np.random.default_rng(5)
    longest = min(40, graph.info['limit'] or 40)
    worst = 0.0
    for lens in random_shapes(rng, longest):
        rows = texts_of(model, lens, rng)
        with_types = [np.stack([r.numpy(), np.zeros(len(r), int)][: 1 + graph.info['has_types']]) for r in rows]
        found = graph(with_types)[0]
        for i, row in enumerate(rows):
            with torch.no_grad():
                want = reference(model, row, part)
            has = found[i]
            if part == 'encoder':
                has = has[-len(row) :] if graph.info['left'] else has[: len(row)]
            worst = max(worst, float(np.abs(has - want).max() / max(1, np.abs(want).max())))
    return worst


def noisy(hf):
    "Larger weights, so that every token and its position counts"
    import torch

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in hf.parameters():
            if p.is_floating_point():
                p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    return hf.eval()


def try_family(run, config, cls, part):
    "Export one class, and compare"
    from copy import deepcopy

    import numpy as np
    import torch

    from fastai_tl.core import FastaiTLError
    from fastai_tl.data.spec import TextSpec
    from fastai_tl.deploy.onnx_export import exported_transformer
    from fastai_tl.deploy.onnx_graph import Graph
    from fastai_tl.models.hf import HFModel

    try:
        torch.manual_seed(0)
        model = HFModel(noisy(run.build(config, cls))).eval()
        if model.hf.config.is_encoder_decoder and not hasattr(model.hf.config, 'decoder_start_token_id'):
            model.hf.config.decoder_start_token_id = model.pad_id  # as the files of T5 say
        if model.hf.config.is_encoder_decoder and part == 'encoder':
            return dict(built=False, why='an encoder-decoder among the language models: for translation')
        with torch.no_grad():
            reference(model, texts_of(model, [12], np.random.default_rng(0))[0], part)
    except BaseException as error:
        return dict(built=False, why=f'{type(error).__name__}: {error}'[:200])
    spec = TextSpec('classification', classes=['a', 'b'], max_length=40)
    try:
        content = exported_transformer(HFModel(deepcopy(model.hf)), spec, letters(model), part=part)
    except FastaiTLError as error:
        return dict(built=True, exported=False, why=str(error.got)[:200])
    difference = worst_difference(Graph(content), model, part)
    return dict(built=True, exported=True, right=difference <= EXACT, difference=difference)


def summary(rows):
    "One line on the rows of a part"
    built = [r for r in rows if r['built']]
    exported = [r for r in built if r.get('exported')]
    right = [r for r in exported if r['right']]
    worst = max((r['difference'] for r in right), default=0)
    return (
        f'{len(built)} of {len(rows)} classes could be built; {len(exported)} of these are exported '
        f'({len(exported) / max(1, len(built)):.0%}), {len(right)} of these are right (largest difference '
        f'{worst:.0e}), {len(built) - len(exported)} are refused'
    )


def families(a):
    run = common.load_benchmark('architectures')
    run.LIMIT_S = 120
    logging.disable(logging.WARNING)
    warnings.simplefilter('ignore')
    import fastai_tl.deploy.onnx_export  # noqa: F401 (once, before the child processes start)

    rows = json.loads(a.json.read_text()) if a.json and a.json.exists() and a.resume else []
    rows = [row for row in rows if 'stopped by signal' not in row.get('why', '')]
    done = {row['cls'] for row in rows}
    for task, config, cls in run.classes():
        if cls.__name__ in done:
            continue
        if a.only and not {config.model_type, cls.__name__} & set(a.only):
            continue
        part = 'model' if task == 'classification' else 'encoder'
        if a.part not in (None, part):
            continue
        res = run.in_child(try_family, run, config, cls, part)
        res.pop('traced', None)
        if 'problems' in res:  # the child ended with an error of its own
            res = dict(built=True, exported=False, why=res['problems'][0], foreign=True)
        rows.append(dict(part=part, model=config.model_type, cls=cls.__name__, **res))
        print(json.dumps(rows[-1]), flush=True)
        common.write_json(a.json, rows)
    for part in ('model', 'encoder') if a.part is None else (a.part,):
        print(part, summary([r for r in rows if r['part'] == part]), sep=': ')
    return rows


# --- speed ---


def load_table(folder, name):
    import pandas as pd

    if name == 'imdb':
        df = pd.read_parquet(Path(folder) / 'en/imdb.parquet').query('split != "unsup"')
        return df.assign(text=df.text.str.replace('<br />', ' '))
    return pd.read_csv(Path(folder) / 'en/trec6.csv')


def mixed_texts(folder, n):
    "Questions of TREC-6 and reviews of IMDb in turn: many short texts and some long ones"
    import pandas as pd

    parts = [load_table(folder, name).text.sample(n // 2, random_state=0) for name in ('trec6', 'imdb')]
    return pd.concat(parts).sample(frac=1, random_state=0).tolist()


class BareORT:
    "ONNX Runtime without this package, as in its documentation"

    def __init__(self, learn, folder, int8, threads):
        import onnxruntime as ort
        import torch
        from onnxruntime.quantization import QuantType, quantize_dynamic

        self.tokenizer = learn.tokenizer
        file = Path(folder) / 'bare.onnx'
        if not file.exists():
            hf = learn.model.hf.float().cpu().eval()
            example = dict(self.tokenizer(['a text', 'another, longer text'], padding=True, return_tensors='pt'))
            dims = {k: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for k in example}
            torch.onnx.export(
                hf, kwargs=example, f=str(file), dynamo=True, dynamic_shapes=dims, external_data=False, verbose=False
            )
        if int8:
            fp32, file = file, Path(folder) / 'bare.int8.onnx'
            if not file.exists():
                quantize_dynamic(fp32, file, per_channel=True, reduce_range=True, weight_type=QuantType.QInt8)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = ort.InferenceSession(str(file), options, ['CPUExecutionProvider'])
        self.names = {i.name for i in self.session.get_inputs()}

    def __call__(self, texts):
        import numpy as np

        x = self.tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors='np')
        logits = self.session.run(None, {k: v.astype(np.int64) for k, v in x.items() if k in self.names})[0]
        powers = np.exp(logits - logits.max(1, keepdims=True))
        return powers / powers.sum(1, keepdims=True)

    def all(self, texts, is_sorted):
        import numpy as np

        order = np.argsort([-len(t) for t in texts]) if is_sorted else np.arange(len(texts))
        parts = [self([texts[i] for i in order[k : k + BATCH]]) for k in range(0, len(texts), BATCH)]
        res = np.empty((len(texts), parts[0].shape[1]), dtype=np.float32)
        res[order] = np.concatenate(parts)
        return res


def pipelines(learn, texts, clock):
    "A `pipeline`, and its best batch size for many texts"
    import copy

    from transformers import pipeline

    model = copy.deepcopy(learn.model.hf).eval()
    pipe = pipeline('text-classification', model=model, tokenizer=learn.tokenizer, device='cpu', top_k=None)

    def many(size, texts=texts):
        return lambda: pipe(texts, batch_size=size, truncation=True, max_length=128)

    sizes = (1, 8, 16, 32)
    tries = interleave({n: many(n, texts[:200]) for n in sizes}, 1, warm_up=0, clock=clock)
    best = min(sizes, key=lambda n: tries[n][0])
    return pipe, many(best), best


def report(name, times, n, bases):
    "Print and return the times of the variants of an experiment, as ratios to the bases"
    import statistics as st

    rows = {}
    for variant, t in times.items():
        rows[variant] = dict(seconds=t, rate=n / st.median(t))
        for base in bases:
            rows[variant][f'against {base}'] = common.ratio(times[base], t)
    heads = ['', 'texts a second:', 'milliseconds a text:', *(f'times {base} (range)' for base in bases)]
    cells = [
        [v, f'{r["rate"]:.1f}', f'{1e3 / r["rate"]:.2f}', *(common.ranged(r[f'against {b}']) for b in bases)]
        for v, r in rows.items()
    ]
    print(f'\n## {name}\n\n{common.table(heads, cells)}', flush=True)
    return rows


def speed(a):
    import numpy as np
    import torch

    from fastai_tl.all import HFTextDataLoaders, Predictor, hf_classifier_learner, minilm_folder

    set_threads(a.threads)
    threads, clock = torch.get_num_threads(), common.chosen_clock(a.cpu_time)
    texts = mixed_texts(a.data, a.texts)
    questions = load_table(a.data, 'trec6').text.sample(100, random_state=1).tolist()
    options = dict(max_length=128, bs=16, verbose=False)
    dls = HFTextDataLoaders.from_lists(texts[:64], ['a', 'b'] * 32, minilm_folder(), **options)
    learn = hf_classifier_learner(dls, minilm_folder())
    with tempfile.TemporaryDirectory() as folder:
        bare = {p: BareORT(learn, folder, p == 'int8', threads) for p in ('fp32', 'int8')}
    onnx = {p: learn.predictor(p, engine='onnx') for p in ('fp32', 'int8')}
    ours = {p: Predictor(learn, p) for p in ('fp32', 'int8')}
    pipe, pipe_many, size = pipelines(learn, texts, clock)
    expected = ours['fp32'].predict_proba(texts)
    assert np.abs(onnx['fp32'].predict_proba(texts) - expected).max() < EXACT
    assert np.abs(bare['fp32'].all(texts, True) - expected).max() < EXACT
    theirs = [{o['label']: o['score'] for o in row}['a'] for row in pipe(questions, truncation=True)]
    assert np.abs(np.array(theirs) - ours['fp32'].predict_proba(questions)[:, 0]).max() < EXACT

    def one_by_one(f):
        return lambda: [f([text]) for text in questions]

    names = dict(fp32='float32', int8='int8')
    one = {'pipeline': lambda: [pipe(text) for text in questions]}
    one |= {f'ONNX Runtime, {names[p]}': one_by_one(f) for p, f in bare.items()}
    one |= {f'Predictor, ONNX, {names[p]}': one_by_one(f.predict) for p, f in onnx.items()}
    one |= {f'Predictor, PyTorch, {names[p]}': one_by_one(f.predict) for p, f in ours.items()}
    many = {'pipeline': pipe_many}
    many |= {f'ONNX Runtime, {names[p]}': lambda f=f: f.all(texts, False) for p, f in bare.items()}
    many |= {f'ONNX Runtime, {names[p]}, sorted': lambda f=f: f.all(texts, True) for p, f in bare.items()}
    many |= {f'Predictor, ONNX, {names[p]}': lambda f=f: f.predict(texts) for p, f in onnx.items()}
    many |= {f'Predictor, PyTorch, {names[p]}': lambda f=f: f.predict(texts) for p, f in ours.items()}
    bases = ['pipeline', *(f'ONNX Runtime, {names[p]}' for p in bare)]
    sorted_bases = ['pipeline', *(f'ONNX Runtime, {names[p]}, sorted' for p in bare)]
    times = interleave(one, a.rounds, clock=clock), interleave(many, a.rounds, clock=clock)
    return dict(
        threads=threads, texts=len(texts), pipeline_batch=size, clock='processor' if a.cpu_time else 'wall',
        one=report('One question at a time', times[0], len(questions), bases),
        many=report(f'{len(texts)} texts', times[1], len(texts), sorted_bases),
    )


# --- int8 ---


def int8(a):
    from fastai_tl.all import HFTextDataLoaders, hf_classifier_learner, minilm_folder, seed_everything
    from fastai_tl.deploy.onnx import onnx_engine
    from fastai_tl.deploy.predictor import Predictor

    set_threads(a.threads)
    res = {}
    for name in ('trec6', 'imdb'):
        df = load_table(a.data, name)
        train = df.query('split == "train"').sample(a.texts, random_state=0)
        test = df.query('split == "test"').sample(500, random_state=0)
        seed_everything(0)
        dls = HFTextDataLoaders.from_df(train, minilm_folder(), max_length=128, bs=16, verbose=False)
        learn = hf_classifier_learner(dls, minilm_folder(), metrics=[])
        with learn.no_bar(), learn.no_logging():
            learn.fit_transfer(3)
        engine = onnx_engine(learn)
        both = {p: Predictor(engine, p) for p in ('fp32', 'int8')}
        found = {p: f.predict(test.text.tolist()) for p, f in both.items()}
        right = {p: float((test.label.values == found[p].labels).mean()) for p in both}
        same = float((found['fp32'].preds == found['int8'].preds).mean())
        sizes = {p: f.engine.n_bytes for p, f in both.items()}
        res[name] = dict(
            accuracy=right, same_decisions=same, size=sizes['int8'] / sizes['fp32'], megabytes=sizes['int8'] / 2**20
        )
        print(name, json.dumps(res[name]), flush=True)
    return res


EXPERIMENTS = dict(families=families, speed=speed, int8=int8)


def main():
    ap = parser(__doc__, 'rounds', 'threads', 'cpu-time', 'data', 'json')
    ap.add_argument('experiment', choices=list(EXPERIMENTS))
    ap.add_argument('--only', nargs='*', default=[], help='families: model types or classes')
    ap.add_argument('--part', choices=['model', 'encoder'], help='families: one kind of graph only')
    ap.add_argument('--resume', action='store_true', help='families: go on with the rows that --json has')
    ap.add_argument('--texts', type=int, default=1000)
    a = ap.parse_args()
    common.write_json(a.json, EXPERIMENTS[a.experiment](a))


if __name__ == '__main__':
    main()
