"A notebook or a Markdown file of the project as a page of the site"

import base64, html, os, re
from pathlib import Path, PurePosixPath

from latex2mathml.converter import convert

from docs_api import docstring, module_name, parameters, patched_classes, signature_text, source_line
from readme import block, is_off, plain, split_cell, text_of

ROOT = Path(__file__).resolve().parents[1]
_fence = re.compile(r'^\s*(```|~~~)')
_link = re.compile(r'(?<=\]\()(?![a-z][a-z+.-]*:|#|/)([^)\s#]+)(#[^)\s]*)?')
_code = re.compile(r'(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)')
_math = re.compile(r'\$\$(.+?)\$\$|(?<![\\$\w])\$(?![\s$])([^$\n]+?)(?<![\s\\])\$(?![\w$])', re.S)
_attributes = re.compile(r' *\{[^}]*\}$')
_heading = re.compile(r'^#{1,6} ')


class PageError(Exception):
    "Something in a notebook that would be broken on the site"


def page_name(path, home='nbs/home.ipynb'):
    "The page of a file of the project: `tune.unfreezing.md` for nbs/415_tune.unfreezing.ipynb; `None` if it has none"
    path = PurePosixPath(path)
    if str(path) == home:
        return 'index.md'
    if str(path) == 'reference':
        return 'reference.md'
    if path.suffix == '.ipynb' and path.parts[0] == 'nbs':
        return str(PurePosixPath(*path.parts[1:-1], (module_name(path) or path.stem) + '.md'))
    if path.suffix == '.md' and path.parts[0] in ('benchmarks', 'CHANGELOG.md', 'CONTRIBUTING.md'):
        if path.parts[0] != 'benchmarks':
            return f'{path.stem.lower()}.md'
        if len(path.parts) == 2:
            return 'benchmarks.md'
        return (
            f'benchmarks/{path.parts[1]}.md'
            if path.name == 'README.md'
            else f'benchmarks/{path.parts[1]}_{path.stem}.md'
        )


def outside_fences(txt, f):
    "`txt` with `f` applied to the text between fenced blocks"
    parts, buf = [], []
    fence = None

    def flush():
        if buf:
            parts.append('\n'.join(buf) if fence else f('\n'.join(buf)))
        buf.clear()

    for line in txt.split('\n'):
        if m := _fence.match(line):
            if fence is None:
                flush()
                fence = m[1]
                buf.append(line)
                continue
            if m[1] == fence:
                buf.append(line)
                parts.append('\n'.join(buf))
                buf.clear()
                fence = None
                continue
        buf.append(line)
    flush()
    return '\n'.join(parts)


def outside_code(s, f):
    "`s` with `f` applied to it while its pieces of code are hidden"
    held = []

    def hold(m):
        held.append(m[0])
        return f'\x00{len(held) - 1}\x00'

    return re.sub('\x00(\\d+)\x00', lambda m: held[int(m[1])], f(_code.sub(hold, s)))


def mathml(s, display):
    "LaTeX as MathML, which browsers draw without a script"
    return convert(' '.join(s.split()), display='block' if display else 'inline').replace('\n', '')


def is_wide(png):
    "Whether a picture is more than twice as wide as high; sizes are at a fixed place in a PNG file"
    width, height = (int.from_bytes(png[i : i + 4], 'big') for i in (16, 20))
    return png[:4] == b'\x89PNG' and width > 2 * height


_cells = re.compile(r'<(t[dh])([^>]*)>(.*?)</\1>', re.S)
_figure = re.compile(r'[-+−]?[\d.,:]+( ?%|e[-+]\d+)?|nan|NaN|inf|-|—|')


def aligned(body):
    "The tables in a piece of HTML with columns of numbers marked, which are aligned to the right"
    return re.sub(r'<table.*?</table>', lambda m: _aligned_table(m[0]), body, flags=re.S)


def _aligned_table(table):
    rows = re.findall(r'<tr.*?</tr>', table, re.S)
    cells = [[html.unescape(re.sub('<.*?>', '', c[2])).strip() for c in _cells.findall(r)] for r in rows]
    data = [texts for row, texts in zip(rows, cells) if '<td' in row]
    n = min((len(texts) for texts in data), default=0)
    numbers = {k for k in range(1, n + 1) if all(_figure.fullmatch(t[-k]) for t in data) and any(t[-k] for t in data)}

    def mark(row):
        count = len(_cells.findall(row))
        places = iter(range(count, 0, -1))

        def cell(m):
            return f'<{m[1]}{m[2]} class="num">{m[3]}</{m[1]}>' if next(places) in numbers else m[0]

        return _cells.sub(cell, row) if 'class=' not in row and 'colspan' not in row else row

    return re.sub(r'<tr.*?</tr>', lambda m: mark(m[0]), table, flags=re.S)


class Site:
    "What the pages link to: the files that are pages, and the entries of the reference"

    def __init__(self, pages, ref, git_url):
        self.pages = {o: page_name(o) for o in pages}
        self.ref = ref
        self.git_url = git_url.rstrip('/')

    def href(self, page, target, anchor=''):
        "The link from `page` to another page"
        return os.path.relpath(target, PurePosixPath(page).parent) + anchor if target != page or not anchor else anchor

    def entry_href(self, page, e):
        return self.href(page, f'{e.module}.md', f'#{e.id}')

    def file_href(self, page, src, link, anchor):
        "The link from `page`, made from the file `src`, to what the relative link `link` names"
        target = os.path.normpath(PurePosixPath(src).parent / link)
        target = re.sub(r'^nbs/index(\.[\w-]+)?\.ipynb$', lambda m: f'README{m[1] or ""}.md', target)
        if target in self.pages:
            return self.href(page, self.pages[target], anchor)
        if not (ROOT / target).exists():
            raise PageError(f'{src}: a link to {link}, which does not exist')
        return f'{self.git_url}/blob/main/{target}{anchor}'


class Page:
    "One page: its Markdown, and the figures that belong to it"

    def __init__(self, src, site, nb=None):
        self.src = self.edit = src
        self.site = site
        self.nb = nb
        self.out, self.module = page_name(src), module_name(PurePosixPath(src))
        self.title = self.lead = self.heading = ''
        self.figures, self.pictures = {}, {}  # drawn by the cells, and files that the prose shows
        self.has_h2 = False

    def prose(self, txt):
        "Markdown with links that lead to pages, names that link to their entries, and formulas as MathML"

        def text(s):
            s = outside_code(s, self.links_and_maths)
            return '\n'.join(o if _heading.match(o) else self.names(o) for o in s.split('\n'))

        return outside_fences(txt, text)

    def links_and_maths(self, s):
        s = _link.sub(lambda m: self.link(m[1], m[2] or ''), s)
        return _math.sub(lambda m: mathml(m[1] or m[2], bool(m[1])), s)

    def link(self, link, anchor):
        "A link for the site; a picture that the prose shows is copied to the files of the page"
        path = ROOT / os.path.normpath(PurePosixPath(self.src).parent / link)
        if path.suffix not in ('.png', '.svg') or not path.exists():
            return self.site.file_href(self.out, self.src, link, anchor)
        name = f'{PurePosixPath(self.out).stem}_files/{path.name}'
        self.pictures[str(PurePosixPath(self.out).parent / name)] = path.read_bytes()
        return name

    def names(self, line):
        "One line with its backticked names linked, unless they are links already"

        def link(m):
            before = line[: m.start()]
            if before.count('[') - before.count(']') > 0:
                return m[0]
            name = m[2].strip()
            if e := self.site.ref.find(name):
                return f'[{m[0]}]({self.site.entry_href(self.out, e)})'
            if name in self.site.ref.modules:
                return f'[{m[0]}]({self.site.href(self.out, name + ".md")})'
            return m[0]

        return _code.sub(link, line)

    def opening(self, txt):
        "The title, and below it the line after `>` as the lead; the rest of the cell"
        lines = txt.strip().split('\n')
        self.title = lines.pop(0).lstrip('# ').strip()
        while lines and not lines[0].strip():
            lines.pop(0)
        lead = []
        while lines and lines[0].startswith('>'):
            lead.append(lines.pop(0).lstrip('> '))
        self.lead = ' '.join(lead)
        res = f'# {self.title}'
        if lead:
            res += f'\n\n{self.prose(self.lead)}\n{{ .lead }}'
        return res + '\n\n' + self.prose('\n'.join(lines).strip('\n'))

    def markdown(self, txt):
        if not self.title and txt.lstrip().startswith('# '):
            return self.opening(txt)
        for line in txt.split('\n'):
            if _heading.match(line):
                self.heading = _attributes.sub('', line.lstrip('# '))
                self.has_h2 = True
        return self.prose(txt)

    def figure(self, data, key):
        name = f'{PurePosixPath(self.out).stem}_files/{key}.png'
        self.figures[str(PurePosixPath(self.out).parent / name)] = base64.b64decode(data)
        wide = ' .wide' if is_wide(base64.b64decode(data)) else ''
        return f'![{html.escape(self.heading or self.title)}]({name}){{ .figure{wide} loading=lazy }}'

    def output(self, o, key):
        if o['output_type'] == 'stream':
            return block(plain(text_of(o['text'])), 'text { .out }') if o.get('name') != 'stderr' else ''
        data = {k: text_of(v) for k, v in o.get('data', {}).items()}
        if 'image/png' in data:
            return self.figure(data['image/png'], key)
        if 'text/markdown' in data:
            return self.prose(data['text/markdown'])
        if 'text/html' in data:
            body = re.sub(r'<style.*?</style>', '', data['text/html'], flags=re.S)
            body = '\n'.join(l for l in body.split('\n') if l.strip())
            return f'<div class="output">\n{aligned(body)}\n</div>' if body else ''
        txt = plain(data.get('text/plain', ''))
        return '' if re.match(r'<(IPython|Figure|matplotlib)', txt) else block(txt, 'text { .out }')

    def code(self, cell, i):
        "A cell of code: shown with what it gives, or, where it makes the package, as the entries of what it defines"
        dirs, code = split_cell(cell)
        if not code or {'hide', 'default_exp'} & set(dirs):
            return []
        if {'export', 'exporti', 'exports'} & set(dirs):
            return self.exported(cell, code)
        res = [] if is_off(dirs, 'echo') or 'hide_input' in dirs else [block(code, 'python')]
        if is_off(dirs, 'output'):
            return res
        return res + [self.output(o, f'{i}_{j}') for j, o in enumerate(cell.get('outputs', []))]

    def exported(self, cell, code):
        if all(re.match(r'(import|from|#|\s|\)|$)', l) for l in code.split('\n')):
            return []
        entries = self.site.ref.entries(self.module, cell)
        names = re.findall(r'^(?:def|class) (\w+)', code, re.M) or re.findall(r'^(\w+) *=', code, re.M)
        label = 'Source'
        if names and not entries:
            label += ' of ' + ', '.join(f'<code>{o}</code>' for o in names)
        head = f'<details class="source" markdown data-search-exclude>\n<summary>{label}</summary>'
        source = f'{head}\n\n{block(code, "python")}\n\n</details>'
        return [self.entry(e) for e in entries] + [source]

    def entry(self, e):
        "Heading, signature, docstring, parameters and source of a public name"
        level = 4 if e.owner and not patched_classes(e.node) else 3
        py = f'fastai_tl/{e.module.replace(".", "/")}.py'
        line = source_line(e, (ROOT / py).read_text(encoding='utf-8'))
        params, returns = parameters(e)
        doc = self.prose(docstring(e))
        if e.aliases:
            doc += '\n\nAlso on ' + ', '.join(f'`{o}`' for o in e.aliases) + '.'
        head = f'{"#" * (level if self.has_h2 else level - 1)} {e.name} {{ #{e.id} .api }}'
        link = f'[source]({self.site.git_url}/blob/main/{py}#L{line}){{ .api-source data-search-exclude }}'
        return '\n\n'.join(
            o for o in (head, link, block(signature_text(e), 'python'), doc, self.table(params, returns)) if o
        )

    def table(self, params, returns):
        "Parameters and result as a table, without the columns that are empty"
        if not params and not returns:
            return ''
        rows = [*params, *([returns] if returns else [])]

        def meaning(p):
            text = p.meaning.replace('\n', ' ') + (self.hidden_names(p.meaning) if p.name.startswith('**') else '')
            return self.prose(outside_code(text, lambda s: s.replace('|', '&#124;')))

        cols = [
            ('Parameter', lambda p: f'`{p.name}`' if p.name else '*returns*'),
            ('Type', lambda p: quoted(p.type)),
            ('Default', lambda p: quoted(p.default)),
            ('Meaning', meaning),
        ]
        cols = [(h, f) for h, f in cols if any(f(p) for p in rows)]
        return '\n'.join(
            ['| ' + ' | '.join(h for h, _ in cols) + ' |', '|' + '---|' * len(cols)]
            + ['| ' + ' | '.join(f(p) for _, f in cols) + ' |' for p in rows]
        )

    def hidden_names(self, meaning):
        "The parameters of what `**kwargs` are passed to, if its description names it and none of them"
        if ':' in meaning:
            return ''
        found = [e for m in _code.finditer(meaning) if (e := self.site.ref.find(m[2].strip()))]
        names = list(dict.fromkeys(p.name for e in found for p in parameters(e)[0] if p.name[0] != '*' and p.default))
        return ': ' + ', '.join(f'`{name}`' for name in names) if names else ''

    def text(self):
        "The whole page"
        parts = []
        for i, c in enumerate(self.nb['cells']):
            if c['cell_type'] == 'markdown':
                parts.append(self.markdown(text_of(c['source'])))
            elif c['cell_type'] == 'code':
                parts += self.code(c, i)
        return '\n\n'.join(o.strip('\n') for o in parts if o.strip()) + '\n'


class MarkdownPage(Page):
    "A Markdown file of the project as a page"

    def text(self):
        return self.markdown((ROOT / self.src).read_text(encoding='utf-8')) + '\n'


def quoted(s):
    return f'`{s}`' if s else ''
