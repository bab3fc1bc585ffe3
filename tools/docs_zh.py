#!/usr/bin/env python
"""The pages in Traditional Chinese of Taiwan, under zh-tw/ on the site.

A Chinese notebook is a page as it is. For the others tools/zh-tw/ has the prose in Chinese, one Markdown file for each
notebook, in which `<!-- cell ID -->` begins the text of a cell; code and outputs are those of the notebook.

    python tools/docs_zh.py    list the cells whose translation is missing, or whose cell no longer exists"""

import os
import re
import sys
from pathlib import Path, PurePosixPath

from docs_page import ROOT, Page, Site, page_name
from readme import load, text_of

LANG = 'zh-Hant-TW'
FOLDER = 'zh-tw'
HOME = 'nbs/index.zh-TW.ipynb'
TEXTS = Path(__file__).with_name('zh-tw')
NAV = {
    '開始': [HOME, 'nbs/quickstart.ipynb', 'nbs/why.ipynb', 'nbs/concepts.ipynb', 'nbs/which_recipe.ipynb'],
    '教學': [
        'nbs/tutorials/chinese_ulmfit.ipynb',
        'nbs/tutorials/chinese_transformer.ipynb',
        'nbs/tutorials/ulmfit.ipynb',
        'nbs/tutorials/transformer.ipynb',
        'nbs/tutorials/choosing.ipynb',
        'nbs/tutorials/evaluation.ipynb',
        'nbs/tutorials/attributions.ipynb',
        'nbs/tutorials/shipping.ipynb',
        'nbs/tutorials/tagging.ipynb',
        'nbs/tutorials/language_models.ipynb',
        'nbs/tutorials/pytorch.ipynb',
        'nbs/tutorials/gallery.ipynb',
        'nbs/tutorials/gallery_spans.ipynb',
        'nbs/tutorials/gallery_reviews.ipynb',
        'nbs/tutorials/from_blurr.ipynb',
    ],
    '怎麼做': [
        'nbs/howto/csv.ipynb',
        'nbs/howto/existing_learner.ipynb',
        'nbs/howto/from_trainer.ipynb',
        'nbs/howto/several_labels.ipynb',
        'nbs/howto/rare_classes.ipynb',
        'nbs/howto/few_labels.ipynb',
        'nbs/howto/blend.ipynb',
        'nbs/howto/lora.ipynb',
        'nbs/howto/early_stopping.ipynb',
        'nbs/howto/plateau.ipynb',
        'nbs/howto/resume.ipynb',
        'nbs/howto/ulmfit_folder.ipynb',
        'nbs/howto/large_corpus.ipynb',
        'nbs/howto/threshold.ipynb',
        'nbs/howto/predict_file.ipynb',
        'nbs/howto/distill.ipynb',
        'nbs/howto/bundle.ipynb',
        'nbs/howto/update.ipynb',
        'nbs/howto/hub.ipynb',
        'nbs/howto/onnx.ipynb',
        'nbs/howto/serve.ipynb',
        'nbs/howto/generate.ipynb',
        'nbs/howto/chinese.ipynb',
        'nbs/howto/gpu.ipynb',
    ],
}
CHINESE = {o for o in NAV['開始'] + NAV['教學'] if 'chinese' in o or o == HOME}  # notebooks written in Chinese
DESCRIPTION = '以 fastai 的方式做文字遷移學習：Hugging Face 模型與 ULMFiT，逐層訓練，並知道結果有多可信'
BUTTONS = dict(edit='編輯', edit_title='在 GitHub 上編輯這一頁', notebook='筆記本', notebook_title='下載這一頁的筆記本')
TOGGLES = dict(Dark='深色', Light='淺色')
_languages = re.compile(r'^\[English\].*\n', re.M)  # the switch of the README
_cell = re.compile(r'^<!-- cell (\S+) -->$', re.M)


def text_file(src):
    "The file with the Chinese prose of a notebook"
    return TEXTS / PurePosixPath(src).relative_to('nbs').with_suffix('.md')


def translation(src):
    "{id of a cell: its text in Chinese}"
    _, *parts = _cell.split(text_file(src).read_text(encoding='utf-8'))
    return {name: text.strip() for name, text in zip(parts[::2], parts[1::2])}


def translated(src, nb):
    "A notebook with its prose in Chinese; a cell without a translation stays as it is"
    if src == HOME:
        return dict(nb, cells=[dict(c, source=_languages.sub('', text_of(c['source']))) for c in nb['cells']])
    if src in CHINESE:
        return nb
    texts = translation(src)
    cells = [
        dict(c, source=texts.get(c['id'], c['source'])) if c['cell_type'] == 'markdown' else c for c in nb['cells']
    ]
    return dict(nb, cells=cells)


def faults(src):
    "Cells of a notebook without a translation, and translations without a cell"
    if src in CHINESE:
        return []
    prose = {c['id']: text_of(c['source']) for c in load(ROOT / src)['cells'] if c['cell_type'] == 'markdown'}
    texts = translation(src)
    missing = [f'{src}: cell {name} has no translation: {prose[name][:60]!r}' for name in prose if name not in texts]
    lost = [f'{text_file(src).relative_to(ROOT)}: {src} has no cell {name}' for name in texts if name not in prose]
    return missing + lost


def chinese_name(src):
    "The page of a notebook, inside zh-tw/"
    return 'index.md' if src == HOME else page_name(src)


class ChineseSite(Site):
    "What the Chinese pages link to: each other, and for the rest the English pages one folder up"

    def __init__(self, files, site):
        self.own = {chinese_name(o) for o in files}
        self.pages = site.pages | {o: chinese_name(o) for o in files}
        self.ref, self.git_url = site.ref, site.git_url

    def href(self, page, target, anchor=''):
        if target in self.own:
            return super().href(page, target, anchor)
        up = '../' * len(PurePosixPath(page).parts)
        return f'{up}{PurePosixPath(target).with_suffix(".html")}{anchor}'

    def file_href(self, page, src, link, anchor):
        name = PurePosixPath(link).name
        if name == PurePosixPath(HOME).name:
            return self.href(page, 'index.md', anchor)
        if os.path.normpath(PurePosixPath(src).parent / link) in ('README.md', 'nbs/index.ipynb'):
            return '../' * len(PurePosixPath(page).parts) + 'index.html'
        return super().file_href(page, src, link, anchor)


class ChinesePage(Page):
    "A page in Chinese"

    def __init__(self, src, site):
        super().__init__(src, site, translated(src, load(ROOT / src)))
        self.out = chinese_name(src)
        self.edit = src if src in CHINESE else text_file(src).relative_to(ROOT).as_posix()


def make_pages(site):
    "The Chinese pages by the file that each is made from, and their Markdown"
    files = [o for names in NAV.values() for o in names]
    mine = ChineseSite(files, site)
    pages = {o: ChinesePage(o, mine) for o in files}
    return pages, {o: p.text() for o, p in pages.items()}


def config(cfg, pages):
    "The settings of the Chinese site, from those of the English one"
    theme = dict(cfg['theme'], language='zh-TW')
    theme['palette'] = [
        dict(o, toggle=dict(o['toggle'], name=TOGGLES[o['toggle']['name']])) for o in cfg['theme']['palette']
    ]
    nav = [{head: [{pages[o].title: pages[o].out} for o in files]} for head, files in NAV.items()]
    extra = dict(cfg['extra'], alternate=switch('../'))
    return cfg | dict(
        theme=theme, nav=nav, extra=extra, site_description=DESCRIPTION, site_url=f'{cfg["site_url"]}{FOLDER}/'
    )


def switch(root):
    "The languages in the header; `root` leads to the English site"
    return [
        dict(name='English', link=f'{root}index.html', lang='en'),
        dict(name='正體中文', link=f'{root}{FOLDER}/index.html', lang=LANG),
    ]


def set_lang(folder):
    "Say in each built page which Chinese it is in"
    for path in folder.rglob('*.html'):
        text = path.read_text(encoding='utf-8')
        path.write_text(re.sub(r'<html lang="[^"]*"', f'<html lang="{LANG}"', text, count=1), encoding='utf-8')


if __name__ == '__main__':
    sys.exit('\n'.join(line for names in NAV.values() for o in names for line in faults(o)) or 0)
