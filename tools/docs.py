#!/usr/bin/env python
"""Build the documentation: README.md from nbs/index.ipynb, and the site from the other notebooks.

    python tools/docs.py               README.md, then the site in site/, with every link checked
    python tools/docs.py --out FOLDER  the site elsewhere; README.md is left alone

Needs `pip install -e ".[dev,docs]"`, no network and no Quarto. A missing page, anchor or figure is an error. To look at
the site: `python -m http.server -d site`."""

import argparse, shutil, subprocess, sys, tempfile, tomllib
from pathlib import Path, PurePosixPath

sys.path[:0] = [
    str(Path(__file__).parent),
    str(Path(__file__).resolve().parents[1]),
]  # the tools, and this checkout's package

import yaml

import docs_head
import docs_search
import docs_zh
import readme
import where_is
from docs_api import Reference
from docs_crawl import crawl
from docs_page import ROOT, MarkdownPage, Page, PageError, Site

FOLDERS = dict(
    data='Data',
    datasets='Datasets',
    models='Models',
    efficiency='Efficiency',
    tune='Training',
    learners='Learners',
    generation='Generation',
    evaluation='Evaluation',
    interpretation='Interpretation',
    deploy='Deployment',
    interop='Other libraries',
    quickstart='Quickstart and command line',
    commands='Quickstart and command line',
    cli='Quickstart and command line',
)
# Modules whose page is not named by their own words
TITLES = {
    'awd_lstm': 'AWD_LSTM',
    'blurr': 'blurr',
    'blurr_compat': 'blurr: compatibility',
    'cli': 'Command line',
    'hf': 'Hugging Face models',
    'hf_tokenizer': 'Hugging Face tokenizers',
    'html_report': 'HTML report',
    'lstm_bf16': 'LSTM in bfloat16',
    'openapi': 'OpenAPI',
    'pytorch_loop': 'PyTorch loop',
    'qa': 'Question answering',
    'seq2seq': 'Sequence to sequence',
    'ulmfit': 'ULMFiT',
    'chinese': 'Traditional Chinese',
    'auto': 'Any task',
    'spec': 'Data spec',
    'learners.base': 'All Hugging Face Learners',
    'quickstart.base': 'Steps of a run',
    'quickstart.transformer': 'A Transformer',
    'evaluation.qa': 'Answers',
    'evaluation.tagging': 'Tags',
    'ulmfit_run': 'ULMFiT: run folder',
    'ulmfit_stages': 'ULMFiT: stages',
}


WHERE_LEAD = 'The function or class for each thing, and the module that it is in'


def project():
    "Name, description and addresses, from pyproject.toml"
    return tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))['project']


def config():
    return yaml.safe_load((ROOT / 'mkdocs.yml').read_text(encoding='utf-8'))


def sources():
    "Every file of the project that is a page: notebooks in the order of their names, then the Markdown files"
    nbs = [
        p for p in sorted((ROOT / 'nbs').rglob('*.ipynb')) if not any(o[0] in '._' for o in p.relative_to(ROOT).parts)
    ]
    nbs = [
        p.relative_to(ROOT).as_posix() for p in nbs if p.parent != ROOT / 'nbs' or p.name.split('.')[0] != 'index'
    ]  # those are the READMEs
    return nbs + [
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / 'CHANGELOG.md', ROOT / 'CONTRIBUTING.md', *benchmark_pages())
        if p.exists()
    ]


def benchmark_pages():
    "The summary of the benchmarks, then the page of each and the tables that it links to"
    folder = ROOT / 'benchmarks'
    return [folder / 'README.md', *sorted(folder.glob('*/README.md')), *sorted(folder.glob('*/results/*.md'))]


def make_pages(files, git_url):
    "The pages by the file that each is made from, and their Markdown"
    nbs = {o: readme.load(ROOT / o) for o in files if o.endswith('.ipynb')}
    ref = Reference([(PurePosixPath(o), nb) for o, nb in nbs.items()])
    site = Site(files, ref, git_url)
    pages = {o: Page(o, site, nbs[o]) if o in nbs else MarkdownPage(o, site) for o in files}
    pages['reference'] = WherePage('reference', site)
    return pages, {o: p.text() for o, p in pages.items()}


class WherePage(Page):
    "The first page of the reference: what people look for, the name that does it, and its module"

    def text(self):
        return self.markdown(f'# What is where\n\n> {WHERE_LEAD}\n\n{where_is.table()}') + '\n'


def module_title(page):
    "`Unfreezing` for the page of tune.unfreezing"
    name = page.module.split('.')[-1]
    return TITLES.get(page.module) or TITLES.get(name, name.replace('_', ' ').capitalize())


def reference_nav(pages):
    "What is where, then the modules by folder, in the order of their numbers"
    res = {}
    for p in pages.values():
        if p.module:
            folder = FOLDERS.get(p.module.split('.')[0], 'Core')
            res.setdefault(folder, []).append({module_title(p): p.out})
    return [{pages['reference'].title: pages['reference'].out}, *({k: v} for k, v in res.items())]


def nav(outline, pages):
    "The sidebar: mkdocs.yml's outline with files as pages; `folder/` is the rest of a folder, `reference` the modules"
    named = {o for sec in outline for v in sec.values() for o in v}

    def items(o):
        if o == 'reference':
            return reference_nav(pages)
        if o.endswith('/'):
            return [{p.title: p.out} for k, p in pages.items() if k.startswith(o) and k not in named]
        if o not in pages:
            raise PageError(f'mkdocs.yml names {o}, which is no page')
        return [{pages[o].title: pages[o].out}]

    res = [{k: side} for sec in outline for k, v in sec.items() if (side := [x for o in v for x in items(o)])]
    left = set(o.out for o in pages.values()) - set(flat(res))
    if left:
        raise PageError(f'pages without a place in the sidebar (see `nav` in mkdocs.yml): {sorted(left)}')
    return res


def flat(o):
    "The pages of a sidebar, in order"
    if isinstance(o, str):
        return [o]
    return [x for v in (o.values() if isinstance(o, dict) else o) for x in flat(v)]


def llms(cfg, side, pages, url):
    "llms.txt: what there is, with a link to the Markdown of each page (llmstxt.org)"
    by_out = {p.out: p for p in pages.values()}
    lines = [f'# {cfg["site_name"]}', '', f'> {cfg["site_description"]}', '']
    for sec in side:
        for k, v in sec.items():
            lines += [
                f'## {k}',
                '',
                *(
                    f'- [{by_out[o].title}]({url}/{o})' + (f': {by_out[o].lead}' if by_out[o].lead else '')
                    for o in flat(v)
                ),
                '',
            ]
    return '\n'.join(lines)


def build(out):
    "Write the pages, let zensical make both sites of them, check their links; what is wrong, as lines"
    pages, texts = make_pages(sources(), project()['urls']['Repository'])
    chinese, chinese_texts = docs_zh.make_pages(next(iter(pages.values())).site)
    side = nav(config()['nav'], pages)
    cfg = settings(side)
    url = cfg['site_url'].rstrip('/')
    with tempfile.TemporaryDirectory() as tmp:
        site, zh_site = Path(tmp) / 'site', Path(tmp) / 'zh' / 'site'
        if wrong := make_site(site, cfg, pages, texts) + make_site(
            zh_site, docs_zh.config(cfg, chinese), chinese, chinese_texts, docs_zh.BUTTONS
        ):
            return wrong
        docs_search.rewrite(site, {p.module for p in pages.values() if p.module} | {'reference'})
        docs_search.rewrite_chinese(zh_site)
        docs_head.add_social_tags(site, pages.values(), url)
        docs_head.add_social_tags(zh_site, chinese.values(), f'{url}/{docs_zh.FOLDER}')
        docs_zh.set_lang(zh_site)
        docs_head.stop_requests(site)
        docs_head.stop_requests(zh_site)
        (site / 'llms.txt').write_text(llms(cfg, side, pages, url), encoding='utf-8')
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(site, out)
        shutil.copytree(zh_site, out / docs_zh.FOLDER)
    return crawl(out, url)


def settings(side):
    "The settings of the site for zensical; `side` is its sidebar"
    proj = project()
    repo = proj['urls']['Repository']
    return config() | dict(
        site_name=proj['name'],
        site_description=proj['description'],
        site_url=proj['urls']['Documentation'].rstrip('/') + '/',
        docs_dir='pages',
        site_dir='site',
        nav=side,
        copyright=f'{proj["name"]} {docs_head.version()}',
        repo_url=repo,
        repo_name=f'{proj["name"]} {docs_head.version()}',
        extra=dict(
            generator=False,
            social=[dict(icon='fontawesome/brands/github', link=repo, name='Source on GitHub')],
            alternate=docs_zh.switch(''),
        ),
    )


def make_site(site, cfg, pages, texts, buttons=docs_head.BUTTONS):
    "Let zensical build a site from its pages; what it printed, if that failed"
    work = site.parent
    shutil.copytree(ROOT / 'tools' / 'assets', work / 'pages' / 'assets')
    for o, p in pages.items():
        page = docs_head.front_matter(p) + docs_head.with_buttons(p, texts[o], buttons)
        write(work / 'pages' / p.out, page.encode())
        for name, data in (p.figures | p.pictures).items():
            write(work / 'pages' / name, data)
    (work / 'mkdocs.yml').write_text(yaml.safe_dump(cfg, sort_keys=False, allow_unicode=True), encoding='utf-8')
    command = [sys.executable, '-m', 'zensical', 'build', '--strict', '-f', 'mkdocs.yml']
    res = subprocess.run(command, cwd=work, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if res.returncode:
        return [res.stdout]
    for o, p in pages.items():
        write(site / p.out, texts[o].encode())
    return []


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def main(argv=None):
    p = argparse.ArgumentParser(description='Build README.md and the documentation site.')
    p.add_argument('--out', type=Path, help='the folder of the site; without it site/, and README.md is written too')
    args = p.parse_args(argv)
    if not args.out:
        readme.main([])
    out = args.out or ROOT / 'site'
    try:
        wrong = build(out)
    except PageError as e:
        wrong = [str(e)]
    if wrong:
        sys.exit('\n'.join(wrong))
    print(f'{out}: {len(list(out.rglob("*.html")))} pages, every link, anchor and image found')


if __name__ == '__main__':
    main()
