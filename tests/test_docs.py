"The documentation site: it builds, nothing in it is broken, every public name is in it, and the code it shows runs."

import importlib.util, json, re

import pytest

from repo import *

sys.path.append(str(ROOT / 'tools'))
zensical = pytest.mark.skipif(
    any(importlib.util.find_spec(o) is None for o in ('zensical', 'latex2mathml')), reason='pip install -e ".[docs]"'
)


@pytest.fixture(scope='module')
def docs():
    pytest.importorskip('latex2mathml', reason='pip install -e ".[docs]"')
    return importlib.import_module('docs')


@pytest.fixture(scope='module')
def made(docs):
    return docs.make_pages(docs.sources(), docs.project()['urls']['Repository'])


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The site as the command builds it, in a process of its own"
    pytest.importorskip('zensical', reason='pip install -e ".[docs]"')
    out = tmp_path_factory.mktemp('docs') / 'site'
    res = run(sys.executable, '-W', 'ignore', ROOT / 'tools' / 'docs.py', '--out', out)
    assert res.returncode == 0, res.stdout
    return out


# --- The tool ---


def page(docs, *cells, src='nbs/900_x.y.ipynb', by_name=None):
    "A page of made-up cells, on a site whose reference knows `by_name`"
    from docs_page import Page, Site

    class Names:
        modules, by_name = {'tune.unfreezing': None}, {}

        def find(self, name):
            return (by_name or {}).get(name)

        def entries(self, module, cell):
            return []

    return Page(
        src,
        Site(['nbs/415_tune.unfreezing.ipynb', 'nbs/tutorials/t.ipynb', src], Names(), 'https://x.y/z'),
        dict(cells=list(cells)),
    )


def md(s):
    return dict(cell_type='markdown', source=s, metadata={})


def code(s, *outputs):
    return dict(cell_type='code', source=s, metadata={}, outputs=list(outputs))


def shown(**data):
    return dict(output_type='execute_result', data={k.replace('_', '/'): v for k, v in data.items()}, metadata={})


def test_title_and_lead(docs):
    p = page(docs, md('# Title\n\n> The lead\n\nText.'))
    assert p.text() == '# Title\n\nThe lead\n{ .lead }\n\nText.\n' and (p.title, p.lead) == ('Title', 'The lead')


def test_links_lead_to_pages(docs):
    links = '[a](415_tune.unfreezing.ipynb#x) [b](tutorials/t.ipynb) [c](../setup.cfg)'
    same = '[d](#e) [f](https://g.h) `[a](b)`'
    p = page(docs, md(f'{links} {same}'))
    found = '[a](tune.unfreezing.md#x) [b](tutorials/t.md) [c](https://x.y/z/blob/main/setup.cfg)'
    assert p.text() == f'{found} {same}\n'
    assert (
        page(docs, md('[a](../415_tune.unfreezing.ipynb)'), src='nbs/tutorials/u.ipynb').text()
        == '[a](../tune.unfreezing.md)\n'
    )


def test_readmes_are_no_pages(docs):
    assert not [o for o in docs.sources() if o.startswith('nbs/index')] and 'nbs/home.ipynb' in docs.sources()
    assert page(docs, md('[a](index.ipynb)')).text() == '[a](https://x.y/z/blob/main/README.md)\n'


def test_link_to_nothing(docs):
    from docs_page import PageError

    with pytest.raises(PageError, match='no_such.ipynb'):
        page(docs, md('[a](no_such.ipynb)')).text()


def test_names_become_links(docs):
    "In prose, once; not in headings, code, or links that are there already"
    from types import SimpleNamespace as Entry

    names = {'f': Entry(module='tune.unfreezing', id='f')}
    txt = '## `f`\n\n`f` and [`f`](https://a.b) and `g` and `tune.unfreezing`\n\n```python\n`f`\n```'
    linked = '[`f`](tune.unfreezing.md#f) and [`f`](https://a.b) and `g` and [`tune.unfreezing`](tune.unfreezing.md)'
    assert page(docs, md(txt), by_name=names).text() == f'## `f`\n\n{linked}\n\n```python\n`f`\n```\n'


def test_formulas(docs):
    "MathML, that needs no script; dollars in code and prices are left alone"
    s = page(docs, md('$x^2$ costs $5 or `$y$`; $$\\sum_i i$$')).text()
    assert s.count('<math') == 2 and 'display="block"' in s and 'costs $5 or `$y$`' in s


def test_directives_and_outputs(docs):
    s = page(
        docs,
        code('#| hide\nh'),
        code('#| echo: false\ne', shown(text_plain='1')),
        code('#| output: false\no', shown(text_plain='2')),
        code('t', shown(text_html='<style>x</style>\n<table>\n\n</table>', text_plain='3')),
        code('#| export\nimport os'),
    ).text()
    blocks = ['```text { .out }\n1\n```', '```python\no\n```', '```python\nt\n```']
    assert s == '\n\n'.join([*blocks, '<div class="output">\n<table>\n</table>\n</div>\n'])


def test_figures_become_files(docs):
    p = page(docs, md('## Why "so"'), code('f', shown(image_png='aGk=', text_plain='<Figure>')))
    assert '![Why &quot;so&quot;](x.y_files/1_0.png)' in p.text() and p.figures == {'x.y_files/1_0.png': b'hi'}


def test_pictures_of_the_prose_become_files(docs):
    "A picture in a notebook's folder goes with the page, one that does not exist is an error"
    picture = 'figures/gallery_topics.svg'
    p = page(docs, md('# T'), md(f'[![six topics]({picture})](#topics)'), src='nbs/tutorials/x.ipynb')
    assert '[![six topics](x_files/gallery_topics.svg)](#topics)' in p.text()
    assert p.figures == {} and list(p.pictures) == ['tutorials/x_files/gallery_topics.svg']
    with pytest.raises(docs.PageError, match='does not exist'):
        page(docs, md('![a](figures/none.svg)'), src='nbs/tutorials/x.ipynb').text()


def test_anchor_of_a_heading_is_no_part_of_its_name(docs):
    p = page(docs, md('## 主題 { #topics }'), code('f', shown(image_png='aGk=', text_plain='<Figure>')))
    assert '## 主題 { #topics }' in p.text() and '![主題](' in p.text()


def test_crawler_finds_what_is_broken(docs, tmp_path):
    from docs_crawl import crawl

    (tmp_path / 'a.html').write_text(
        '<p id="x"><a href="b.html#y">1</a><a href="#x">2</a><a href="c.html">3</a><img src="d.png">'
        '<script src="https://e.f/g.js"></script>'
        '<a href="https://h.i/base/b.html">4</a><a href="/base/b.html#z">5</a><a href="https://else.where/x">6</a>'
    )
    (tmp_path / 'b.html').write_text('<h2 id="y">')
    assert crawl(tmp_path, 'https://h.i/base') == [
        'a.html: c.html leads nowhere',
        'a.html: /base/b.html#z names no anchor',
        'a.html: d.png leads nowhere',
        'a.html loads https://e.f/g.js from elsewhere',
    ]


# --- The reference ---


def test_every_public_name_has_an_entry(made):
    "With an anchor where nbdev's index says it is"
    pages, texts = made
    ids = {p.out.removesuffix('.md'): set(re.findall(r'\{ #(\S+) \.api', texts[o])) for o, p in pages.items()}
    from test_api import exported, module

    lacking = [
        f'{nb.module}.{n}'
        for nb in exported
        for n in module(nb).__all__
        if n.lower() not in ids[nb.module]
        and (getattr(getattr(module(nb), n), '__module__', None) or f'{PKG}.{nb.module}') == f'{PKG}.{nb.module}'
    ]
    assert not lacking, lacking


def test_patched_methods_have_entries(made):
    pages, texts = made
    from test_law import all_patches

    whole = '\n'.join(texts.values())
    lacking = {f'{c}.{m}' for _, c, m in all_patches() if not m.startswith('_')} - set(
        re.findall(r'^#+ (\S+) \{ #', whole, re.M)
    )
    lacking = {
        o
        for o in lacking
        if not re.search(rf'^#+ \w+\.{o.split(".")[1]} \{{ #.*?Also on [^\n]*`{o.split(".")[0]}`', whole, re.M | re.S)
    }
    assert not lacking, lacking


def test_names_of_an_assignment(docs):
    import ast
    from docs_api import assigned

    assert [assigned(ast.parse(o).body[0]) for o in ('a = 1', 'a,b = 1,2', 'a = b = 1', 'a:int = 1', 'f()')] == [
        ['a'],
        ['a', 'b'],
        ['a', 'b'],
        ['a'],
        [],
    ]


def test_signature_and_table(made):
    "As the code has them, without `self`, with meaning and default"
    _, texts = made
    text = next(t for o, t in texts.items() if o.endswith('_tune.gradual.ipynb'))
    s = text.split('### Learner.fit_gradual { #learner.fit_gradual .api }', 1)[1].split('\n### ')[0]
    meaning = 'Learning rate of the top group divided by that of the bottom group'
    assert 'spread=2.6**4' in s and f'| `spread` | `float` | `2.6**4` | {meaning} |' in s
    assert '`self`' not in s.split('<details')[0] and '| *returns* |' in s
    assert re.search(r'\[source\]\(https://\S+/fastai_tl/tune/gradual\.py#L(\d+)\)', s)
    line = int(re.search(r'#L(\d+)\)', s)[1])
    assert 'def fit_gradual(' in '\n'.join(
        (PACKAGE / 'tune' / 'gradual.py').read_text().splitlines()[line - 1 : line + 1]
    )


# --- The site ---


@zensical
def test_site_is_whole(site):
    "The command has followed every link; the figures, the search and llms.txt are there"
    assert (site / 'index.html').exists() and (site / 'llms.txt').read_text().startswith('# fastai_tl\n\n> ')
    assert len(list(site.rglob('*.html'))) >= len(notebooks()) + 5 and list(site.rglob('*_files/*.png'))
    assert 'GradualUnfreezing' in (site / 'search.json').read_text()


@zensical
def test_needs_no_network(site):
    "No font, script or style from elsewhere"
    from docs_crawl import read

    urls = {u for p in site.rglob('*.html') for u in read(p).loads if u.startswith(('http', '//'))}
    assert not urls
    assert not [p.name for p in site.rglob('*.css') if re.search(r'url\(["\']?(https?:)?//', p.read_text())]


@zensical
def test_a_broken_anchor_fails(docs, site, tmp_path):
    "The crawler of the command, on a copy in which one anchor is gone"
    from docs_crawl import crawl

    shutil.copytree(site, tmp_path / 'site')
    p = tmp_path / 'site' / 'tune.unfreezing.html'
    p.write_text(p.read_text().replace('id="gradualunfreezing"', 'id="gone"'))
    assert any(
        '#gradualunfreezing names no anchor' in o
        for o in crawl(tmp_path / 'site', docs.project()['urls']['Documentation'])
    )


@zensical
@pytest.mark.skipif(shutil.which('node') is None, reason='node')
def test_searches_find_the_page(site):
    "Words that people use, in the search of the site itself: a page that answers them is among the first three"
    wanted = json.loads((ROOT / 'tests' / 'data' / 'searches.json').read_text(encoding='utf-8'))
    res = subprocess.run(['node', ROOT / 'tools' / 'search.js', site], input='\n'.join(wanted), text=True,
                         capture_output=True, timeout=120)
    assert res.returncode == 0, res.stderr
    found = dict(zip(wanted, map(json.loads, res.stdout.splitlines()), strict=True))
    first = {query: [o.removesuffix('.html') for o in pages[:3]] for query, pages in found.items()}
    assert not {query: first[query] for query, pages in wanted.items() if not set(pages) & set(first[query])}
    for query in ('onnx', 'onnx export', 'quickstart', 'serve a model', 'migrate from Trainer'):
        assert first[query][0] in wanted[query], (query, first[query])


CHINESE_SEARCHES = {
    '校準': 'howto/threshold',
    '門檻': 'howto/threshold',
    '漸進式解凍': 'tutorials/transformer',
    '斷詞': 'tutorials/chinese_transformer',
    '混淆矩陣': 'tutorials/evaluation',
    '語言模型': 'tutorials/ulmfit',
    '多個標註': 'howto/csv',
    '停電': 'howto/resume',
    '歸因': 'tutorials/attributions',
    '稀少': 'howto/rare_classes',
    '上線': 'tutorials/shipping',
}


@zensical
def test_chinese_pages(site):
    "Their language, their interface, a way to English and back, and links that lead to the reference one folder up"
    pages = [p for p in (site / 'zh-tw').rglob('*.html') if p.name != '404.html']
    assert len(pages) >= 30
    for path in pages:
        text = path.read_text(encoding='utf-8')
        assert '<html lang="zh-Hant-TW"' in text and '搜尋' in text and '目錄' in text, path
        assert len(re.findall('[\u4e00-\u9fff]', text)) > 300, path
        assert 'hreflang="en"' in text and 'hreflang="zh-Hant-TW"' in text
    assert re.search(r'href="(\./)?zh-tw/index.html"', (site / 'index.html').read_text(encoding='utf-8'))
    evaluation = (site / 'zh-tw' / 'tutorials' / 'evaluation.html').read_text(encoding='utf-8')
    assert '../benchmarks.html' in (site / 'zh-tw' / 'index.html').read_text(encoding='utf-8')
    assert '../../evaluation.report.html' in evaluation or '../../evaluation.evaluation.html' in evaluation


def test_translations(docs):
    "Every prose cell of a translated page has Chinese text, and Chinese sentences have full-width punctuation"
    import docs_zh

    files = [o for names in docs_zh.NAV.values() for o in names]
    assert not [line for o in files for line in docs_zh.faults(o)]
    for src in set(files) - docs_zh.CHINESE:
        for name, text in docs_zh.translation(src).items():
            prose = re.sub('```.*?```|`[^`]*`|https?://\\S+', '', text, flags=re.S)
            assert not re.findall('[\u4e00-\u9fff][,;:!?()]', prose), (src, name)


@zensical
@pytest.mark.skipif(shutil.which('node') is None, reason='node')
def test_searches_in_chinese(site):
    query = '\n'.join(CHINESE_SEARCHES)
    res = subprocess.run(['node', ROOT / 'tools' / 'search.js', site / 'zh-tw'], input=query, text=True,
                         capture_output=True, timeout=120)
    found = [json.loads(line)[:3] for line in res.stdout.splitlines()]
    assert all(f'{page}.html' in first for page, first in zip(CHINESE_SEARCHES.values(), found, strict=True)), found


def test_head_of_a_page(docs):
    "Description, and buttons that lead to the notebook"
    import docs_head

    p = page(docs, md('# Title\n\n> The `lead` with a [link](https://a.b)\n\nText.'))
    text = docs_head.with_buttons(p, p.text())
    assert docs_head.description(p) == 'The lead with a link'
    assert docs_head.front_matter(p) == '---\ndescription: The lead with a link\n---\n\n'
    assert '(https://x.y/z/edit/main/nbs/900_x.y.ipynb)' in text and 'colab' not in text
    assert text.startswith('# Title\n')


def test_numbers_of_a_table_are_aligned():
    "Columns of numbers are marked, columns of text are not"
    from docs_page import aligned

    table = '<table><tr><th></th><th>a</th><th>b</th></tr><tr><th>x</th><td>1.5</td><td>two</td></tr></table>'
    assert aligned(table).replace(' class="num"', '*') == table.replace('<th>a', '<th*>a').replace('<td>1', '<td*>1')


# --- The code of README and home page ---

STAND_INS = '''
import matplotlib
matplotlib.use('Agg')
from fastai.text.all import *
from fastai_tl.all import *
from transformers import BertConfig, BertForMaskedLM
seed_everything(0)
words = dict(pos=('good', 'great', 'fine'), neg=('bad', 'dull', 'poor'))
rows = [(f'the {a} was {b}', l) for a in ('film', 'plot', 'cast', 'music') for l, bs in words.items() for b in bs]
df = pd.DataFrame(rows*4, columns=['text', 'label'])
df['split'] = np.where(df.index % 4, 'train', 'valid')
df.loc[5, 'label'] = None
tok = train_tokenizer(list(df.text), 100, kind='encoder', max_length=32)
tok.save_pretrained('distilbert-base-uncased')
sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
config = BertConfig(vocab_size=len(tok), pad_token_id=tok.pad_token_id, **sizes)
BertForMaskedLM(config).save_pretrained('distilbert-base-uncased')
defaults.callbacks = [TrainEvalCallback, Recorder, CastToTensor]
'''


def fenced(path):
    "The Python blocks in the Markdown cells of a notebook"
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    return [
        b
        for c in cells
        if c['cell_type'] == 'markdown'
        for b in re.findall(r'^```python\n(.*?)^```', ''.join(c['source']), re.M | re.S)
    ]


@pytest.mark.slow
@pytest.mark.parametrize('name', ['index', 'home'])
def test_blocks_in_prose_run(name, tmp_path):
    "A small model with random weights is in a folder with the pre-trained one's name; cells run in test_notebooks.py"
    blocks = fenced(NBS / f'{name}.ipynb')
    if not blocks:
        pytest.skip('no code but its cells')
    res = python(
        STAND_INS + '\n'.join(blocks).replace('Learner(dls, model,', 'model = learn.model\nLearner(dls, model,'),
        cwd=tmp_path,
        timeout=300,
    )
    assert res.returncode == 0, res.stdout


# --- Who types off what a page shows ---

pages_that_teach = sorted(
    [
        *(NBS / 'howto').glob('*.ipynb'),
        *(NBS / 'tutorials').glob('*.ipynb'),
        *(NBS / f'{o}.ipynb' for o in ('home', 'concepts')),
    ]
)


def names_in(tree):
    "Names that code binds, and names that it reads"
    import ast

    nodes = list(ast.walk(tree))
    bound = {n.id for n in nodes if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)} | {
        n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef))
    }
    bound |= {
        (a.asname or a.name).split('.')[0]
        for n in nodes
        if isinstance(n, (ast.Import, ast.ImportFrom))
        for a in n.names
    } | {n.arg for n in nodes if isinstance(n, ast.arg)}
    bound |= {n.name for n in nodes if isinstance(n, ast.ExceptHandler) and n.name}
    return bound, {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


@pytest.fixture(scope='module')
def stars():
    "What the two star imports give"
    import builtins

    res = set(dir(builtins)) | {'get_ipython', 'display'}
    for name in ('fastai.text.all', 'fastai_tl.all'):
        mod = importlib.import_module(name)
        res |= set(getattr(mod, '__all__', None) or [o for o in vars(mod) if o[0] != '_'])
    return res


@pytest.mark.parametrize('path', pages_that_teach, ids=lambda p: p.stem)
def test_shown_code_needs_nothing_hidden(path, stars):
    "No visible cell reads a name that only a hidden one, or none, has bound"
    import ast, readme

    known, lost = set(stars), {}
    for c in readme.load(path)['cells']:
        if c['cell_type'] != 'code':
            continue
        dirs, code = readme.split_cell(c)
        if not code or 'hide' in dirs or readme.is_off(dirs, 'echo') or 'hide_input' in dirs:
            continue
        bound, read = names_in(ast.parse(re.sub(r'^([!%].*)$', 'pass', code, flags=re.M)))
        known |= bound
        lost |= {n: code.splitlines()[0] for n in read - known}
    assert not lost, lost
