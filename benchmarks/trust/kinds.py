"""Kinds of hostile bundle: each changes a good bundle, and then corrects its list of files, as an attacker can."""

import hashlib
import json
import os
import pickle
import shutil
import struct

from fastai_tl.files import digest

WORDS = 'alpha beta gamma delta epsilon zeta eta theta iota kappa good bad nice awful the of and is was it'.split()
NAN, INF = float('nan'), float('inf')
KINDS = {}  # name: (base, function of the folder of the bundle and the folder outside)


def kind(name, base='hf'):
    "Register a function that makes a bundle hostile"

    def register(f):
        same = sum(other == name or other.startswith(f'{name} #') for other in KINDS)
        KINDS[f'{name} #{same + 1}' if same else name] = (base, f)
        return f

    return register


# --- tools ---


class Payload:
    "What an unpickler runs: it leaves a mark in the folder outside"

    def __init__(self, outside):
        self.mark = str(outside / 'pwned')

    def __reduce__(self):
        return (os.mkdir, (self.mark,))


def facts(path):
    "Size and checksum of a file, as a bundle lists them"
    data = path.read_bytes()
    return dict(size=len(data), checksum=hashlib.blake2b(data, digest_size=16).hexdigest())


def reseal(folder, names=None, **changes):
    "List all files of a bundle (or those of `names`) with their checksums, and change other entries"
    manifest = json.loads((folder / 'bundle.json').read_text())
    manifest.pop('checksum', None)
    files = [p for p in sorted(folder.rglob('*')) if p.is_file() and p.name != 'bundle.json']
    listed = {p.relative_to(folder).as_posix(): facts(p) for p in files}
    manifest['files'] = {k: v for k, v in listed.items() if names is None or k in names}
    manifest.update(changes)
    write_manifest(folder, manifest)


def write_manifest(folder, manifest):
    "Write `bundle.json` with a correct checksum"
    (folder / 'bundle.json').write_text(json.dumps({**manifest, 'checksum': digest(manifest)}))


def edit(folder, name, change):
    "Change the contents of a JSON file in place, or replace them by what `change` returns"
    contents = json.loads((folder / name).read_text())
    new = change(contents)
    (folder / name).write_text(json.dumps(contents if new is None else new))


def set_at(contents, path, value):
    "Set the value at a path such as `model.vocab`"
    *parents, last = path.split('.')
    for key in parents:
        contents = contents[key]
    contents[last] = value


def short(value):
    "A value as part of a name"
    text = json.dumps(value)
    return text if len(text) <= 80 else f'{text[:80]}… ({len(text)})'


def values_of(name, base, path, values):
    "Register a kind for each value at a path of a JSON file"
    for value in values:

        def make(folder, outside, value=value):
            edit(folder, name, lambda contents: set_at(contents, path, value))
            reseal(folder)

        kind(f'{base} {name} {path} = {short(value)}', base)(make)


def contents_of(name, base, raw):
    "Register a kind for each content of a whole file"
    for label, data in raw.items():

        def make(folder, outside, data=data):
            (folder / name).write_bytes(data)
            if name != 'bundle.json':
                reseal(folder)

        kind(f'{base} {name} is {label}', base)(make)


def nested(n, leaf, wrap):
    "A value in `n` layers"
    for _ in range(n):
        leaf = wrap(leaf)
    return leaf


# --- bundle.json ---

OTHER_JSON = {
    'empty': b'',
    'cut': b'{"a": ',
    'a list': b'[]',
    'a string': b'"x"',
    'null': b'null',
    'a number': b'5',
    'deep': b'[' * 100_000 + b']' * 100_000,
    'deep dicts': b'{"a":' * 5000 + b'1' + b'}' * 5000,
    'latin-1': '{"é": 1}'.encode('latin-1'),
    'with a BOM': b'\xef\xbb\xbf{}',
    'zeros': bytes(1000),
    'a pickle': pickle.dumps({}),
    'many digits': b'{"a": ' + b'9' * 10_000 + b'}',
    'a surrogate': b'{"a": "\\ud800"}',
    'NaN': b'{"a": NaN}',
    'twice a key': b'{"a": 1, "a": 2}',
}
contents_of('bundle.json', 'hf', OTHER_JSON)
contents_of('spec.json', 'hf', OTHER_JSON)
contents_of('config.json', 'hf', OTHER_JSON)
contents_of('tokenizer.json', 'hf', OTHER_JSON)
contents_of('tokenizer_config.json', 'hf', OTHER_JSON)
contents_of('model.json', 'awd', OTHER_JSON)


def manifest_values(key, values):
    "Register a kind for each value of an entry of `bundle.json`"
    for value in values:

        def make(folder, outside, value=value):
            manifest = json.loads((folder / 'bundle.json').read_text())
            manifest.pop('checksum')
            write_manifest(folder, {**manifest, key: value})

        kind(f'bundle.json {key} = {short(value)}')(make)


manifest_values('version', [0, -1, 1, 3, 10**30, '2', True, None, [], {}])
manifest_values('format', ['x', None, [], 5])
manifest_values('files', [None, [], 'x', 5, {}, {'config.json': None}, {'config.json': {}}, {'config.json': []}])
manifest_values('versions', [None, [], 'x'])
manifest_values('temperature', [0, -1, '1', None, NAN, INF, 1e-300, 10**400, [], {}, True])
manifest_values('thresholds', ['a', [], {}, [NAN, NAN], [1], [1, 2, 3], ['a', 'b'], [None, None], [[1, 2]], [INF, -1]])
manifest_values('precision', ['fp64', None, [], {}, 'int4', 'int8', 5, '../x'])
manifest_values('change', ['x', [], [1, 2], [{}, {}], {'a': 1}, [{'precision': 'fp32'}, {'precision': 'int8'}], 5])

for _key in ('version', 'format', 'files', 'temperature', 'thresholds', 'precision', 'change', 'versions'):

    def _without(folder, outside, key=_key):
        manifest = json.loads((folder / 'bundle.json').read_text())
        manifest.pop('checksum')
        manifest.pop(key)
        write_manifest(folder, manifest)

    kind(f'bundle.json without {_key}')(_without)

NAMES = [
    '../secret.json',
    '/etc/hostname',
    '..\\secret.json',
    'a/../../secret.json',
    './config.json',
    'c:x.json',
    '',
    '.',
    '..',
    'x' * 300 + '.json',
    'a\0b.json',
    '.hidden.json',
    'a//b.json',
    'CON',
    'config.json/x',
    '\ud800.json',
    '\x1b[31m.json',
    'sub/../config.json',
]
for _name in NAMES:

    def _list_name(folder, outside, name=_name):
        manifest = json.loads((folder / 'bundle.json').read_text())
        manifest.pop('checksum')
        manifest['files'][name] = facts(outside / 'secret.json')
        write_manifest(folder, manifest)

    kind(f'bundle.json lists {ascii(_name)[:40]}')(_list_name)


@kind('bundle.json lists 200,000 files')
def _many_files(folder, outside):
    reseal(folder, files={f'f{i}.json': dict(size=2, checksum='x') for i in range(200_000)})


# --- links and special files ---


def _replaced(name, make):
    def change(folder, outside):
        good = outside / name
        shutil.copy(folder / name, good)
        reseal(folder)
        (folder / name).unlink()
        make(folder / name, good)

    return change


for _name in ('config.json', 'model.safetensors', 'tokenizer.json', 'spec.json', 'bundle.json'):
    kind(f'{_name} is a link to a file outside')(_replaced(_name, lambda path, good: path.symlink_to(good)))
    kind(f'{_name} is a dangling link')(_replaced(_name, lambda path, good: path.symlink_to('/nowhere')))
    kind(f'{_name} is a folder')(_replaced(_name, lambda path, good: path.mkdir()))
    kind(f'{_name} is a pipe')(_replaced(_name, lambda path, good: os.mkfifo(path)))
    kind(f'{_name} is a link to itself')(_replaced(_name, lambda path, good: path.symlink_to(path)))


@kind('a folder in the bundle is a link outside')
def _linked_folder(folder, outside):
    reseal(folder)
    (folder / 'sub').symlink_to(outside)
    manifest = json.loads((folder / 'bundle.json').read_text())
    manifest.pop('checksum')
    manifest['files']['sub/secret.json'] = facts(outside / 'secret.json')
    write_manifest(folder, manifest)


# --- files with code ---

CODE = [
    'pytorch_model.bin',
    'training_args.bin',
    'model.pkl',
    'x.py',
    'modeling.py',
    'adapter_config.json',
    'adapter_model.safetensors',
    'optimizer.pt',
    'tf_model.h5',
    'flax_model.msgpack',
    'custom_generate/generate.py',
    'configuration.py',
    'tokenization.py',
    'x.so',
    'sitecustomize.py',
    'model.gguf',
    'x',
    'tokenizer.model.py',
    'adapter_x.json',
]
for _name in CODE:
    for _listed in (False, True):

        def _add(folder, outside, name=_name, listed=_listed):
            before = json.loads((folder / 'bundle.json').read_text())['files']
            (folder / name).parent.mkdir(exist_ok=True)
            data = f'import os; os.mkdir({str(outside / "pwned")!r})'.encode()
            if name.endswith('.json'):
                data = json.dumps(dict(base_model_name_or_path=str(outside), peft_type='LORA')).encode()
            (folder / name).write_bytes(data if name.endswith(('.py', '.json')) else pickle.dumps(Payload(outside)))
            reseal(folder, None if listed else before)

        kind(f'{_name}, {"listed" if _listed else "not listed"}')(_add)


# --- index of split weights ---


def weights_of(folder):
    "The weights of a bundle"
    from safetensors.torch import load_file

    return load_file(str(folder / 'model.safetensors'))


def save_weights(folder, weights, name='model.safetensors'):
    "Write weights and correct the list of files"
    from safetensors.torch import save_file

    save_file(weights, str(folder / name), metadata=dict(format='pt'))
    reseal(folder)


TARGETS = [
    '../weights.safetensors',
    '{outside}/weights.safetensors',
    '.w.bin',
    '../w.bin',
    'config.json',
    'w.bin',
    '',
    'missing.safetensors',
    '.',
    '.hidden.safetensors',
    'a\0.safetensors',
    'sub/../../weights.safetensors',
    None,
    5,
    ['a'],
    'x' * 300 + '.safetensors',
    '~/weights.safetensors',
]
for _target in TARGETS:
    for _whole in (True, False):

        def _index(folder, outside, target=_target, whole=_whole):
            import torch

            weights = weights_of(folder)
            (folder / 'model.safetensors').rename(outside / 'weights.safetensors')
            shutil.copy(outside / 'weights.safetensors', folder / '.hidden.safetensors')
            for path in (folder / '.w.bin', outside / 'w.bin'):
                torch.save(weights, path)
            names = list(weights) if whole else list(weights)[:1]
            if not whole:
                rest = {k: v for k, v in weights.items() if k not in names}
                save_weights(folder, rest, 'rest.safetensors')
            file = target.format(outside=outside) if isinstance(target, str) else target
            index = {**dict.fromkeys(weights, 'rest.safetensors'), **dict.fromkeys(names, file)}
            (folder / 'model.safetensors.index.json').write_text(json.dumps(dict(metadata={}, weight_map=index)))
            visible = [p.name for p in folder.iterdir() if not p.name.startswith('.')]
            reseal(folder, visible)

        kind(f'index names {ascii(_target)[:40]} for {"all weights" if _whole else "one weight"}')(_index)

for _label, _contents in dict(
    a_list=[],
    none=None,
    empty={},
    no_map=dict(metadata={}),
    list_map=dict(weight_map=[]),
    empty_map=dict(weight_map={}),
).items():

    def _other_index(folder, outside, contents=_contents):
        (folder / 'model.safetensors').rename(outside / 'weights.safetensors')
        (folder / 'model.safetensors.index.json').write_text(json.dumps(contents))
        reseal(folder)

    kind(f'index is {_label}')(_other_index)


# --- weights ---


def raw_weights(header, data=b''):
    "A safetensors file with any header"
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack('<Q', len(text)) + text + data


def tensor(shape, start, end, dtype='F32'):
    "An entry of the header"
    return dict(dtype=dtype, shape=shape, data_offsets=[start, end])


BROKEN_WEIGHTS = {
    'empty': b'',
    'short': b'abc',
    'a long header': struct.pack('<Q', 2**63) + b'{}',
    'zeros': bytes(5000),
    'a header of 100 GB': struct.pack('<Q', 10**11) + b'{}' * 100,
    'no JSON': raw_weights(b'{"a'),
    'no tensors': raw_weights({}),
    'a list': raw_weights([]),
    'overlapping tensors': raw_weights(dict(a=tensor([2], 0, 8), b=tensor([2], 4, 12)), bytes(12)),
    'offsets beyond': raw_weights(dict(a=tensor([2**40], 0, 2**42)), bytes(8)),
    'negative offsets': raw_weights(dict(a=tensor([2], -8, 0))),
    'a shape that overflows': raw_weights(dict(a=tensor([2**63, 2**63], 0, 8)), bytes(8)),
    'a negative shape': raw_weights(dict(a=tensor([-2], 0, 8)), bytes(8)),
    'an unknown type': raw_weights(dict(a=tensor([2], 0, 8, 'X9')), bytes(8)),
    'a deep header': raw_weights(b'[' * 10**5 + b']' * 10**5),
    'a million tensors': raw_weights({f't{i}': tensor([0], 0, 0) for i in range(10**6)}),
    'not closed': raw_weights(b'{}' + b' ' * 100)[:50],
    'shape of floats': raw_weights(dict(a=tensor([1.5], 0, 6)), bytes(6)),
    'trailing data': raw_weights({}, bytes(100)),
    'a zip file': b'PK\x03\x04' + bytes(100),
    'a torch file': b'\x80\x02' + bytes(100),
}
contents_of('model.safetensors', 'hf', BROKEN_WEIGHTS)
contents_of(
    'model.safetensors', 'awd', {k: v for k, v in BROKEN_WEIGHTS.items() if k in ('empty', 'a list', 'no tensors')}
)


@kind('model.safetensors is a pickle with a payload')
def _pickle_weights(folder, outside):
    (folder / 'model.safetensors').write_bytes(pickle.dumps(Payload(outside)))
    reseal(folder)


@kind('model.safetensors is a torch file with a payload')
def _torch_weights(folder, outside):
    import torch

    torch.save(dict(a=Payload(outside)), folder / 'model.safetensors')
    reseal(folder)


@kind('model.safetensors is sparse, 1 TB')
def _sparse(folder, outside):
    with open(folder / 'model.safetensors', 'r+b') as file:
        file.truncate(10**12)
    manifest = json.loads((folder / 'bundle.json').read_text())
    manifest.pop('checksum')
    manifest['files']['model.safetensors']['size'] = 10**12
    write_manifest(folder, manifest)


def changed_weights(name, base, change):
    "Register a kind whose weights are changed by a function of all of them, which changes or returns them"

    def make(folder, outside):
        weights = weights_of(folder)
        new = change(weights)
        save_weights(folder, weights if new is None else new)

    kind(f'{base} {name}', base)(make)


def first(weights, part):
    "The name of the first weight with a part in its name"
    return next(k for k, v in weights.items() if part in k and v.ndim)


def set_weight(part, f):
    "A change of one weight"
    return lambda weights: weights.update({first(weights, part): f(weights[first(weights, part)])})


for _part in ('word_embeddings.weight', 'classifier.weight', 'query.weight', 'LayerNorm.bias', 'pooler.dense.weight'):
    changed_weights(f'without {_part}', 'hf', lambda w, part=_part: {k: v for k, v in w.items() if k != first(w, part)})
    changed_weights(f'{_part} one row more', 'hf', set_weight(_part, lambda v: __import__('torch').cat([v, v[:1]])))
    changed_weights(f'{_part} is flat', 'hf', set_weight(_part, lambda v: v.reshape(-1)[:-1].clone()))
    for _value in (NAN, INF, -INF, 1e38):
        changed_weights(f'{_part} is {_value}', 'hf', set_weight(_part, lambda v, value=_value: v * 0 + value))
    changed_weights(f'{_part} is int64', 'hf', set_weight(_part, lambda v: v.long()))
    changed_weights(f'{_part} is empty', 'hf', set_weight(_part, lambda v: v[:0].clone()))
changed_weights('without layer 1', 'hf', lambda w: {k: v for k, v in w.items() if 'layer.1.' not in k})
changed_weights(
    'with another layer', 'hf', lambda w: {**w, **{k.replace('layer.1.', 'layer.2.'): v.clone() for k, v in w.items()}}
)
changed_weights('no weights', 'hf', lambda w: {})
changed_weights('other names', 'hf', lambda w: {f'x.{k}': v for k, v in w.items()})
for _part in ('encoder.weight', '1.layers', 'weight_hh'):
    changed_weights(f'without {_part}', 'awd', lambda w, part=_part: {k: v for k, v in w.items() if part not in k})
    changed_weights(f'{_part} is NaN', 'awd', set_weight(_part, lambda v: v * NAN))
    changed_weights(f'{_part} one row more', 'awd', set_weight(_part, lambda v: __import__('torch').cat([v, v[:1]])))


# --- config.json ---

SIZES = [
    'hidden_size',
    'num_hidden_layers',
    'num_attention_heads',
    'intermediate_size',
    'vocab_size',
    'max_position_embeddings',
    'type_vocab_size',
    'num_labels',
    'chunk_size_feed_forward',
]
for _size in SIZES:
    values_of('config.json', 'hf', _size, [-1, 0, 3, 50_000, 10**10, 10**30, 'x', None, 1.5, [2], {}])
BERT = {
    'hidden_act': ['nope', 'os.system', None, 5, ['relu'], {'gelu': {}}],
    'layer_norm_eps': [NAN, -1, 'x', None],
    'hidden_dropout_prob': [2, -1, 'x', NAN],
    'initializer_range': ['x', NAN],
    'classifier_dropout': ['x', 7],
    'id2label': [{}, {'a': 'b'}, [], 'x', None, {'0': 'a'}, {str(i): 'a' for i in range(10**5)}, {'0': 5, '1': None}],
    'label2id': [[], 'x', {'a': 'b'}],
    'problem_type': ['x', 5],
    'pad_token_id': [10**6, -5, 'x', 10**30, None, 1.5],
    'model_type': [
        'nope',
        None,
        [],
        5,
        'gpt2',
        't5',
        'encoder-decoder',
        'rag',
        '../x',
        'timm_wrapper',
        'bart',
        'esm',
        'vision-text-dual-encoder',
        'clip',
        'albert',
        'distilbert',
        'mamba',
        'roberta',
        'longformer',
    ],
    'architectures': ['x', [], None, ['Nope'], ['os.system'], [5], ['BertForMaskedLM'], ['BertModel']],
    'auto_map': [
        {'AutoModelForSequenceClassification': 'evil.Model'},
        {'AutoConfig': 'x--evil.Config'},
        'evil.Model',
        ['evil.M'],
        {},
    ],
    'text_config': [{'auto_map': {'AutoConfig': 'evil.Config'}}, 'x', {'model_type': 'bert'}],
    'attn_implementation': [
        'evil/kernel',
        'evil/kernel:f',
        'kernels-community/flash-attn',
        {'': 'evil/kernel'},
        'flash_attention_2',
        'nope',
        5,
    ],
    '_attn_implementation': ['evil/kernel', 'paged|evil/kernel'],
    'experts_implementation': ['evil/kernel'],
    'quantization_config': [
        {'quant_method': 'gptq', 'bits': 4},
        {'quant_method': 'bitsandbytes', 'load_in_4bit': True},
        'x',
        {},
    ],
    'transformers_weights': ['../weights.safetensors', 'w.bin'],
    'torch_dtype': ['load', 'nope', 5, 'int8', 'float16'],
    'dtype': ['load', 'float64', 'os'],
    'tokenizer_class': ['BertJapaneseTokenizer', 'nope', 5],
    '_name_or_path': ['../outside', 5],
    'is_decoder': [True],
    'add_cross_attention': [True],
    'pruned_heads': [{'0': [0]}, {'9': [99]}, 'x'],
    'return_dict': [False],
    'is_encoder_decoder': [True, 'x'],
    'output_attentions': [True],
    'output_hidden_states': [True],
    'tie_word_embeddings': ['x'],
    '__class__': ['x', {}],
    '__dict__': [{}, 'x'],
    'to_dict': ['x'],
    'get_text_config': [5],
    'num_key_value_heads': [10**10],
    'per_layer_config': [{'0': {'hidden_size': 10**9}}, 'x'],
    'position_embedding_type': ['nope', 'relative_key'],
    'custom_pipelines': [{'x': {'impl': 'evil.Pipe'}}],
    'base_model_prefix': ['x', 5],
    'base_model_tp_plan': [{'x': 'y'}],
    'deep': [nested(28, 1, lambda o: [o]), nested(200, 1, lambda o: {'a': o})],
}
for _key, _values in BERT.items():
    values_of('config.json', 'hf', _key, _values)


# --- the tokenizer ---

DOUBLE = dict(type='Replace', pattern=dict(String='a'), content='aa')
LOWER = dict(type='Lowercase')


def sequence(items):
    return dict(type='Sequence', normalizers=items)


def replace(regex, content='b'):
    return dict(type='Replace', pattern=dict(Regex=regex), content=content)


ASCENDING = {f't{i}': i for i in range(400)}
TOKENIZER = {
    'normalizer': [nested(n, LOWER, lambda o: sequence([o])) for n in (10, 14, 50, 200)]
    + [
        sequence([LOWER] * 1000),
        sequence([DOUBLE] * 30),
        sequence([DOUBLE] * 9),
        replace('(a+)+$'),
        replace('(.+)+x'),
        replace('('),
        replace('', 'a' * 100),
        replace('.', 'a' * 10**6),
        dict(type='Prepend', prepend='a' * 10**6),
        dict(type='Nope'),
        'x',
        5,
        [],
        dict(type='Precompiled', precompiled_charsmap='AAAA'),
        dict(type='Precompiled', precompiled_charsmap='!!'),
        nested(12, DOUBLE, lambda o: sequence([o, o])),
    ],
    'pre_tokenizer': [
        nested(50, dict(type='Whitespace'), lambda o: dict(type='Sequence', pretokenizers=[o])),
        dict(type='Nope'),
        None,
        'x',
        dict(type='Split', pattern=dict(Regex='(a+)+$'), behavior='Isolated', invert=False),
        dict(type='Split', pattern=dict(Regex='('), behavior='Isolated', invert=False),
        dict(type='Split', pattern=dict(Regex=''), behavior='Isolated', invert=False),
        dict(type='Metaspace', replacement='ab', prepend_scheme='always', split=True),
        dict(type='CharDelimiterSplit', delimiter='ab'),
        dict(type='FixedLength', length=0),
    ],
    'post_processor': [
        dict(type='BertProcessing', sep=['[SEP]', 10**6], cls=['[CLS]', 10**6]),
        dict(type='Nope'),
        None,
        'x',
        dict(type='BertProcessing', sep=['[SEP]', 2**32], cls=['[CLS]', 1]),
        dict(
            type='TemplateProcessing',
            single=[dict(Sequence=dict(id='A', type_id=0))] * 1000,
            pair=[],
            special_tokens={},
        ),
        dict(
            type='TemplateProcessing', single=[dict(Sequence=dict(id='A', type_id=10**9))], pair=[], special_tokens={}
        ),
        dict(
            type='TemplateProcessing', single=[dict(SpecialToken=dict(id='[X]', type_id=0))], pair=[], special_tokens={}
        ),
        dict(type='TemplateProcessing', single=[], pair=[], special_tokens={}),
    ],
    'decoder': [
        nested(50, dict(type='ByteLevel'), lambda o: dict(type='Sequence', decoders=[o])),
        dict(type='Nope'),
        'x',
    ],
    'truncation': [
        dict(direction='Right', max_length=n, strategy='LongestFirst', stride=s)
        for n, s in ((0, 0), (10**12, 0), (4, 100))
    ]
    + ['x'],
    'padding': [
        dict(strategy=s, direction='Right', pad_to_multiple_of=m, pad_id=p, pad_type_id=0, pad_token='x')
        for s, m, p in (
            ({'Fixed': 10**9}, None, 0),
            ('BatchLongest', 10**9, 0),
            ('BatchLongest', 0, 0),
            ({'Fixed': 5}, None, 10**9),
        )
    ],
    'added_tokens': [
        [],
        'x',
        [5],
        [dict(id=-1)],
        [dict(id=10**9, content='[X]', special=True, single_word=False, lstrip=False, rstrip=False, normalized=False)],
        [dict(id=2**32, content='[X]', special=True, single_word=False, lstrip=False, rstrip=False, normalized=False)],
        [
            dict(
                id=400 + i,
                content=f'[{i}]',
                special=True,
                single_word=False,
                lstrip=False,
                rstrip=False,
                normalized=False,
            )
            for i in range(20_000)
        ],
    ],
    'version': ['9.0', 5, None],
    'model': [
        {},
        'x',
        None,
        dict(type='Nope'),
        dict(type='WordLevel', vocab={}, unk_token='[UNK]'),
        dict(type='BPE', vocab={}, merges=[]),
        dict(type='Unigram', vocab=[], unk_id=0),
        dict(type='Unigram', vocab=[['a', NAN]], unk_id=5),
        dict(type='BPE', vocab=ASCENDING, merges=[['x', 'y']]),
        dict(type='WordLevel', vocab={'a': 10**9, '[UNK]': 0}, unk_token='[UNK]'),
        dict(type='WordLevel', vocab={'a': -1}, unk_token='a'),
        dict(
            type='WordPiece',
            vocab={'a': 0},
            unk_token='[UNK]',
            continuing_subword_prefix='##',
            max_input_chars_per_word=100,
        ),
        dict(
            type='WordPiece',
            vocab={'[UNK]': 0},
            unk_token='[UNK]',
            continuing_subword_prefix='',
            max_input_chars_per_word=10**12,
        ),
    ],
}
for _key, _values in TOKENIZER.items():
    values_of('tokenizer.json', 'hf', _key, _values)

TOKENIZER_CONFIG = {
    'auto_map': [{'AutoTokenizer': ['evil.Tok', None]}, ['evil.Tok', None], 'x'],
    'tokenizer_class': [
        'MistralCommonBackend',
        'BertJapaneseTokenizer',
        'RagTokenizer',
        'nope',
        'PreTrainedTokenizer',
        'os',
        5,
        None,
        [],
        'LlamaTokenizer',
        'BertTokenizer',
        'T5Tokenizer',
        'XLMTokenizer',
        'CTRLTokenizer',
        'Wav2Vec2PhonemeCTCTokenizer',
    ],
    'vocab_file': ['{outside}/vocab.txt', '../vocab.txt'],
    'tokenizer_file': ['{outside}/secret.json'],
    'merges_file': ['/etc/hostname'],
    'special_tokens_map_file': ['{outside}/secret.json'],
    'added_tokens_file': ['{outside}/secret.json'],
    'fast_tokenizer_files': [['../tokenizer.4.0.0.json'], ['tokenizer.0.0.1.json']],
    'chat_template_file': ['{outside}/secret.json'],
    'sp_model_kwargs': [{'model_file': '{outside}/secret.json'}],
    'mecab_kwargs': [{'mecab_option': '-r {outside}/secret.json'}],
    'init_inputs': [['{outside}/vocab.txt'], 'x', [5]],
    'vocab': ['{outside}/vocab.txt'],
    'merges': ['/etc/hostname'],
    'model_max_length': [0, -1, 'x', None, 10**30, 1.5, []],
    'padding_side': ['x', 5, None],
    'truncation_side': ['x'],
    'extra_special_tokens': [[5], 'x', {'a': 5}, [{'content': 'x', 'evil': 1}]],
    'additional_special_tokens': ['x', [5], {'a': 'b'}],
    'added_tokens_decoder': [
        [],
        'x',
        {'x': {}},
        {'0': 'x'},
        {'10000000': {'content': '[X]', 'special': True}},
        {'0': {'content': 5}},
    ],
    'chat_template': ["{{ ''.__class__.__mro__[1].__subclasses__() }}", 5, '{% for i in range(10**10) %}{% endfor %}'],
    'model_input_names': [[], 'x', ['input_ids', 'evil'], [5], None],
    'unk_token': [5, None, {'content': 'x'}, {'a': 1}, []],
    'pad_token': [5, None, 'not in the vocabulary', {'__type': 'AddedToken'}],
    'cls_token': [None, [], 'ü' * 1000],
    'backend': ['x', 'sentencepiece'],
    'clean_up_tokenization_spaces': ['x'],
    '__class__': ['x'],
    'tokenizer_object': ['x'],
    'is_local': [False],
    'config': ['x'],
    'local_files_only': [False],
    'trust_remote_code': [True],
    'proxies': [{'http': 'http://evil'}],
}
for _key, _values in TOKENIZER_CONFIG.items():
    for _value in _values:

        def _tokenizer_config(folder, outside, key=_key, value=_value):
            value = json.loads(json.dumps(value).replace('{outside}', str(outside)))
            edit(folder, 'tokenizer_config.json', lambda contents: set_at(contents, key, value))
            if key in ('vocab_file', 'vocab', 'init_inputs', 'tokenizer_file'):
                (folder / 'tokenizer.json').unlink()
            reseal(folder)

        kind(f'tokenizer_config.json {_key} = {short(_value)}')(_tokenizer_config)


@kind('no tokenizer at all')
def _no_tokenizer(folder, outside):
    for path in folder.glob('tokenizer*'):
        path.unlink()
    reseal(folder)


# --- spec.json ---

WRONG = ['x', -1, 0, 10**12, 1.5, True, None, [], {}, [None]]
SPEC = {
    'task': ['nope', 'regression', 'multilabel', 'tagging', 'qa', 'causal_lm', 'masked_lm', 'seq2seq', None, 5, []],
    'family': ['fastai', 'nope', None],
    'classes': [None, [], ['a'], ['a', 'a'], ['a', 'b', 'c'], 'ab', [1, 2], [None, 'a'], {}, 5],
    'threshold': [2, NAN, *WRONG],
    'lang': ['zh-tw', 'zh-cn', 'nope', 5, None],
    'rules': [['os.system'], ['__import__'], 'x', [5], None, {}],
    'tokenizer': [[], 'x', {'tokenizer': 'os'}, None],
    'max_length': [1, 2, *WRONG],
    'truncation': [False, 'x', None],
    'windows': [1, 2, 30, 31, 32, *WRONG],
    'backwards': [True, 'x'],
    'pairs': [True, 'x'],
    'columns': [[], 'x', {'text': []}, {}],
    'version': [0, 2, '1', None],
    'word_sep': [5, []],
    'max_target_length': [-1, 'x'],
    'may_be_none': ['x'],
    'label_delim': [5],
    'seq_len': [-1, 'x'],
    'evil': [1],
}
for _key, _values in SPEC.items():
    values_of('spec.json', 'hf', _key, _values)


# --- AWD_LSTM ---

for _path in (
    'config.emb_sz',
    'config.n_hid',
    'config.n_layers',
    'config.pad_token',
    'config.bidir',
    'head.n_out',
    'head.seq_len',
    'head.max_len',
    'head.lin_ftrs',
    'head.ps',
    'head.y_range',
):
    values_of('model.json', 'awd', _path, [-1, 0, 50_000, 10**10, 'x', None, 1.5, [10**10], {}])
values_of('model.json', 'awd', 'vocab', [[], 'x', None, {}, [5], ['a'] * 10, [f't{i}' for i in range(10**5)], [['a']]])
values_of('model.json', 'awd', 'config', [{}, [], 'x', {'evil': 1}])
values_of('model.json', 'awd', 'head', [{}, [], 'x', {'tie_weights': True}])
values_of('model.json', 'awd', 'config.evil', [1])
values_of(
    'spec.json',
    'awd',
    'tokenizer',
    [
        {},
        [],
        {'tokenizer': 'os'},
        {'tokenizer': 'word'},
        {'tokenizer': 'word', 'lang': '../x'},
        {'tokenizer': 'BaseTokenizer', 'split_char': 5},
        {'tokenizer': ['word']},
    ],
)
values_of('spec.json', 'awd', 'rules', [['os.system'], ['spec_add_spaces'] * 10_000, 'x', [5], ['lowercase']])
values_of('spec.json', 'awd', 'task', ['tagging', 'causal_lm', 'regression', 'multilabel', 'qa', 'nope'])
values_of('spec.json', 'awd', 'classes', [[], ['a'], ['a', 'b', 'c'], None])
values_of('spec.json', 'awd', 'family', ['huggingface'])


# --- a language model and a tagger ---

GENERATION = {
    'cache_implementation': ['nope', 'static', 5],
    'compile_config': [{'x': 1}, 'x'],
    'max_length': [-1, 10**12, 'x'],
    'num_beams': [10**9, 0, 'x'],
    'eos_token_id': ['x', [10**9], None, -1],
    'pad_token_id': ['x', 10**9],
    'temperature': [0, NAN, 'x'],
    'top_k': [-1, 'x'],
    'do_sample': ['x'],
    'custom_generate': ['evil/repo'],
    'assistant_model': ['evil'],
    'prompt_lookup_num_tokens': [10**9],
    'watermarking_config': [{'x': 1}],
    'forced_bos_token_id': [10**9],
    'suppress_tokens': [[10**9], 'x'],
    'bad_words_ids': [[[10**9]], 'x'],
    'transformers_version': ['99', 5],
}
for _key, _values in GENERATION.items():
    values_of('generation_config.json', 'lm', _key, _values)
values_of('config.json', 'lm', 'n_layer', [50_000, 10**10, 0, -1])
values_of('config.json', 'lm', 'n_positions', [1, 10**9, 10**12, 0])
values_of('config.json', 'lm', 'n_embd', [10**9, 3])
values_of('config.json', 'lm', 'architectures', [['GPT2Model'], ['GPT2ForSequenceClassification'], ['Nope']])
values_of('config.json', 'lm', 'model_type', ['bert', 't5', 'gptj', 'bloom', 'codegen'])
changed_weights('without wte', 'lm', lambda w: {k: v for k, v in w.items() if 'wte' not in k})
changed_weights('without h.0', 'lm', lambda w: {k: v for k, v in w.items() if 'h.0.' not in k})
values_of('spec.json', 'lm', 'task', ['classification', 'masked_lm', 'seq2seq', 'tagging'])
values_of('spec.json', 'tags', 'classes', [[], ['O'], None, ['O', 'O'], ['O', 'B-A', 'x'], [5, 6]])
values_of('spec.json', 'tags', 'word_sep', [5, '', 'xx'])
changed_weights('without classifier', 'tags', lambda w: {k: v for k, v in w.items() if 'classifier' not in k})
