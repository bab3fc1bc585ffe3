"README.md is made from nbs/index.ipynb, and what it shows runs."

import importlib.util, json, re

import pytest

from repo import *

INDEX = NBS / 'index.ipynb'
needs_index = pytest.mark.skipif(not INDEX.exists(), reason='there is no nbs/index.ipynb')


@pytest.fixture(scope='module')
def tool():
    "tools/readme.py as a module"
    spec = importlib.util.spec_from_file_location('readme_tool', ROOT / 'tools' / 'readme.py')
    mod = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mod)
    return mod


def cell(src, *outputs, kind='code'):
    return dict(cell_type=kind, source=src, metadata={}, outputs=list(outputs))


def printed(txt, name='stdout'):
    return dict(output_type='stream', name=name, text=txt)


def shown(**data):
    return dict(output_type='execute_result', data={k.replace('_', '/'): v for k, v in data.items()}, metadata={})


def body(tool, *cells):
    return tool.readme(dict(cells=list(cells))).split('-->\n\n', 1)[1]


def test_code_and_output(tool):
    assert (
        body(tool, cell('# Title', kind='markdown'), cell('1+1', shown(text_plain='2')))
        == '# Title\n\n```python\n1+1\n```\n\n```text\n2\n```\n'
    )


def test_directives(tool):
    "`hide` takes the cell, `echo: false` its code, `output: false` its output; other directives go without a trace"
    assert (
        body(
            tool,
            cell('#| hide\nx'),
            cell('#| echo: false\nx', printed('a\n')),
            cell('#| output: false\ny', printed('b')),
            cell('#|eval: false\n#| slow\n\nz'),
        )
        == '```text\na\n```\n\n```python\ny\n```\n\n```python\nz\n```\n'
    )


def test_output_without_text(tool):
    "No progress bar, figure, colour or warning; of an overwritten line its end; Markdown stays Markdown"
    assert (
        body(
            tool,
            cell(
                'f()',
                shown(text_html='<b>', text_plain='<IPython.core.display.HTML object>'),
                shown(image_png='…'),
                printed('no', 'stderr'),
                printed('\x1b[31m10%\r100%\x1b[0m\n'),
                shown(text_markdown=['| a |\n', '|---|']),
            ),
        )
        == '```python\nf()\n```\n\n```text\n100%\n```\n\n| a |\n|---|\n'
    )


def test_links(tool):
    "Relative links of the notebook lead from the project's root; others, and code, are left alone"
    assert (
        tool.markdown('[a](tutorials/x.ipynb) ![b](../img.png) [c](https://x.y/z) [d](#e)\n```\n[f](g)\n```')
        == '[a](nbs/tutorials/x.ipynb) ![b](img.png) [c](https://x.y/z) [d](#e)\n```\n[f](g)\n```'
    )


def test_fence_inside_output(tool):
    assert tool.block('```\nx\n```', 'text').startswith('````text\n')


def test_check(tool, tmp_path):
    "`--check` says no until README.md is the one that would be written"
    nb, out = tmp_path / 'index.ipynb', tmp_path / 'README.md'
    nb.write_text('{"cells": [{"cell_type": "markdown", "source": ["# T"], "metadata": {}}]}')
    args = [sys.executable, ROOT / 'tools' / 'readme.py', '--nb', nb, '--out', out]
    assert run(*args, '--check').returncode == 1 and not out.exists()
    assert run(*args).returncode == 0 and run(*args, '--check').returncode == 0
    out.write_text('# Other')
    assert run(*args, '--check').returncode == 1 and out.read_text() == '# Other'


@needs_index
def test_readme_is_made_from_the_notebook(tool):
    figures = dict(stem='index', alt='')
    text = tool.readme(tool.load(INDEX), figures=figures)
    assert (ROOT / 'README.md').read_text(encoding='utf-8') == text, 'run python tools/readme.py'
    images = {name: data for name, data in figures.items() if isinstance(data, bytes)}
    assert images and all((NBS / 'figures' / name).read_bytes() == data for name, data in images.items())


@pytest.mark.parametrize('script', ['tools/where_is.py', 'benchmarks/summary.py'])
def test_what_scripts_write_is_up_to_date(script):
    "The table of CONTRIBUTING.md and the summary of the benchmarks"
    res = run(sys.executable, ROOT / script, '--check')
    assert res.returncode == 0, res.stdout


def test_the_chinese_readme(tool):
    "Made from its notebook, and the two link to each other"
    nb = NBS / 'index.zh-TW.ipynb'
    zh, en = ((ROOT / n).read_text(encoding='utf-8') for n in ('README.zh-TW.md', 'README.md'))
    assert zh == tool.readme(tool.load(nb), nb.name), 'run python tools/readme.py'
    assert '](README.zh-TW.md)' in en and '](README.md)' in zh
    assert 'pip install . && fastai-tl quickstart --lang zh-tw' in zh


@needs_index
def test_commands():
    "The README has the two commands for a fresh machine, and .ci/run ends with the second"
    readme, ci = (ROOT / 'README.md').read_text(encoding='utf-8'), (ROOT / '.ci' / 'run').read_text(encoding='utf-8')
    assert 'pip install . && fastai-tl quickstart' in readme and 'pip install -e ".[dev]" && pytest' in readme
    assert '-e ".[dev]"' in ci and ci.rstrip().splitlines()[-1].startswith('python -m pytest')


@pytest.mark.slow
@needs_index
def test_code_runs(tool, tmp_path):
    "The visible code alone, with one epoch, in one process, without what the notebook's hidden cells prepare"
    blocks = tool.code_blocks(tool.load(INDEX))
    assert blocks, 'the README shows no code that runs'
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    assert all(b in readme for b in blocks)
    code = '\n'.join(blocks)
    assert 'learn.fit_transfer()' in code, 'this test shortens the training to one epoch'
    code = code.replace('learn.fit_transfer()', 'learn.fit_transfer(1)')
    res = python('import matplotlib; matplotlib.use("Agg")\n' + code, cwd=tmp_path, timeout=600)
    assert res.returncode == 0, res.stdout


# --- Code outside cells runs too: the Chinese blocks (the English ones are in test_docs.py) and the commands ---

PAGES = {'README.md': INDEX, 'README.zh-TW.md': NBS / 'index.zh-TW.ipynb', 'home': NBS / 'home.ipynb'}
fence = re.compile(r'^```(\w*)\n(.*?)^```$', re.M | re.S)


def prose(path):
    return '\n\n'.join(
        ''.join(c['source'])
        for c in json.loads(path.read_text(encoding='utf-8'))['cells']
        if c['cell_type'] == 'markdown'
    )


def fenced(path, kind):
    return [o[2] for o in fence.finditer(prose(path)) if o[1] == kind]


@pytest.mark.parametrize('name', PAGES)
def test_kinds_of_blocks(name):
    "Each block is a language that a test below runs"
    assert {o[1] for o in fence.finditer(prose(PAGES[name]))} <= {'python', 'sh'}
    assert name != 'home' or not fenced(PAGES[name], 'python'), (
        'the home page shows code as cells, which its own notebook runs'
    )


@pytest.mark.parametrize('name', ['README.md', 'README.zh-TW.md'])
def test_links_lead_somewhere(name):
    links = re.findall(r'\]\(([^)#]+)(?:#[^)]*)?\)', (ROOT / name).read_text(encoding='utf-8'))
    gone = [o for o in links if '://' not in o and not (ROOT / o).exists()]
    assert links and not gone, gone


small_bert = '''
from transformers import BertConfig, BertForMaskedLM
tok = train_chinese_tokenizer(df.text, 500, min_freq=1)
tok.save_pretrained('bert-base-chinese')          # a folder of that name replaces the model of the hub
sizes = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32)
config = BertConfig(vocab_size=len(tok), max_position_embeddings=64, **sizes)
BertForMaskedLM(config).save_pretrained('bert-base-chinese')
'''


@pytest.mark.slow
def test_blocks_of_the_chinese_readme_run(tmp_path):
    blocks = fenced(PAGES['README.zh-TW.md'], 'python')
    assert len(blocks) == 3 and 'ULMFiT' in blocks[0] and 'save_bundle' in blocks[2]
    before = (
        'from fastai.text.all import *\n'
        'from fastai_tl.all import *\n'
        'import matplotlib\n'
        "matplotlib.use('Agg')\n"
        "sample_reviews(240).to_csv('我的評論.csv', index=False)\n"
    )
    smaller = blocks[0].replace("lang='zh-tw')", "lang='zh-tw', config=dict(emb_sz=16, n_hid=16, n_layers=1))", 1)
    after = "\nassert Path('report/index.html').exists()\n"
    res = python(
        before + smaller + after + small_bert + '\n'.join(blocks[1:]) + "\nassert clf.classes == ['正面', '負面']",
        cwd=tmp_path,
        timeout=600,
    )
    assert res.returncode == 0, res.stdout


def commands(name):
    "Every command of a page"
    return [c.strip() for b in fenced(PAGES[name], 'sh') for line in b.strip().splitlines() for c in line.split('&&')]


def test_commands_of_the_home_page():
    assert commands('home') and set(commands('home')) <= set(commands('README.md'))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['README.md', 'README.zh-TW.md'])
def test_commands_run(name, tmp_path):
    "`fastai-tl` as it stands, with small sizes in settings.ini; what pip installs exists; pytest is what runs here"
    import shlex
    from fastai_tl.datasets.reviews import sample_reviews

    mine = sample_reviews(240)
    mine.to_csv(tmp_path / 'mine.csv', index=False)
    mine.rename(columns=dict(text='內容', label='標籤')).to_csv(tmp_path / '我的評論.csv', index=False)
    mine.drop(columns='label').to_csv(tmp_path / 'new.csv', index=False)
    mine.to_csv(tmp_path / 'labelled.csv', index=False)
    sizes = 'emb_sz = 16\nn_hid = 16\nn_layers = 1\nlm_epochs = 1\nepochs = 1,1,1\nrates = 3e-2\nmax_vocab = 500\n'
    (tmp_path / 'settings.ini').write_text(f'[fastai_tl]\nlang = zh-tw\ndata = mine.csv\n{sizes}')
    extras = (ROOT / 'setup.cfg').read_text().split('[options.extras_require]')[1]
    known, ran = commands(name), 0
    assert known
    for c in known:
        words = shlex.split(c)
        if words[0] == 'pip':
            assert words[:2] == ['pip', 'install'] and all(
                re.search(rf'^{e} *=', extras, re.M) for e in re.findall(r'\[(\w+)\]', c)
            ), c
        elif words[0] == 'fastai-tl':
            res = python(
                f'import sys; from fastai_tl.cli import main; sys.exit(main({words[1:]!r}))', cwd=tmp_path, timeout=600
            )
            assert res.returncode == 0, f'{c}\n{res.stdout}'
            ran += 1
        else:
            assert c == 'pytest', c
    assert (
        ran
        and {f.parent.name for f in tmp_path.glob('*/summary.json')}
        == {'README.md': {'quickstart-mine', 'trained-mine'},
            'README.zh-TW.md': {'quickstart-mine', 'quickstart-我的評論'}}[name]
    )
