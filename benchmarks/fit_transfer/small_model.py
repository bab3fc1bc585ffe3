"""MiniLM without the embeddings of tokens that no row of some sets has: the same results in less time and memory.

    python benchmarks/fit_transfer/small_model.py FOLDER --data FOLDER --sets 'first words 500; last words 500'

Weights of tokens that never occur get no gradient and change no prediction, but an optimizer goes through all of them.
WordPiece takes the longest piece that it knows, so a text whose pieces are all kept has the same pieces."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import parser
from sets import SetData

import torch
from task import minilm


def used_tokens(a):
    "The special tokens and those of all rows that runs with the seeds read"
    used = {0}
    for name in a.sets.split(';'):
        for seed in a.seed:
            d = SetData(name.strip(), seed, a)
            used |= {i for rows in d.rows for row in rows for i in row['input_ids']}
    return sorted(used | set(d.tok.all_special_ids))


def main(a):
    from transformers import AutoModel

    kept = used_tokens(a)
    model = AutoModel.from_pretrained(minilm())
    weight = model.get_input_embeddings().weight.data[torch.tensor(kept)]
    model.resize_token_embeddings(len(kept))
    model.get_input_embeddings().weight.data = weight.clone()
    model.save_pretrained(a.folder)
    for file in Path(minilm()).glob('*token*'):
        (a.folder / file.name).write_bytes(file.read_bytes())
    spec = json.loads((Path(minilm()) / 'tokenizer.json').read_text(encoding='utf-8'))
    at = {old: new for new, old in enumerate(kept)}
    vocab = {token: at[i] for token, i in spec['model']['vocab'].items() if i in at}
    spec['model']['vocab'] = vocab
    for token in spec['added_tokens']:
        token['id'] = vocab[token['content']]
    for special in spec['post_processor'].get('special_tokens', {}).values():
        special['ids'] = [at[i] for i in special['ids']]
    (a.folder / 'tokenizer.json').write_text(json.dumps(spec, ensure_ascii=False), encoding='utf-8')
    print(f'{len(kept):,} of {len(at):,} tokens')


if __name__ == '__main__':
    ap = parser(__doc__, 'data')
    ap.add_argument('folder', type=Path)
    ap.add_argument('--sets', required=True)
    ap.add_argument('--seed', type=int, nargs='*', default=[1, 2, 3])
    args = ap.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    main(args)
