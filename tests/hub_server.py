"""A stand-in for the Hugging Face hub: a local server with the part of its interface that huggingface_hub uses to
create a repository, to commit files (small ones in the commit, weights through Git LFS), and to list and download them.

    with HubServer() as hub:
        subprocess.run([sys.executable, '-c', program], env=hub.env(tmp_path))
"""

import base64
import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = 'hf_of_the_tests'
LARGE = ('.safetensors', '.onnx', '.bin')  # kept by Git LFS


class Repo:
    "A repository: its commits, which are dicts from path to content, and its branches"

    def __init__(self, private=False, gated=False):
        self.private, self.gated = private, gated
        self.commits, self.branches = {}, {}
        self.messages = []
        self.claimed = {}  # sizes that the listing claims instead of the true ones
        self.commit('main', {}, 'initial commit')

    def commit(self, branch, files, message='commit'):
        "Make `files` the content of a branch, and return the commit"
        parts = [branch, len(self.commits), message, *(f'{k}{hashlib.sha1(v).hexdigest()}' for k, v in files.items())]
        sha = hashlib.sha1(repr(parts).encode()).hexdigest()
        self.commits[sha], self.branches[branch] = dict(files), sha
        self.messages.append(message)
        return sha

    def find(self, revision):
        "The commit of a branch or a commit, or `None`"
        return self.branches.get(revision, revision if revision in self.commits else None)


class HubServer:
    "Repositories, and a server for them in a thread"

    def __init__(self):
        self.repos, self.lfs = {}, {}
        self.requests = []
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.server.hub = self
        self.server.daemon_threads = True
        self.url = f'http://127.0.0.1:{self.server.server_port}'
        self.is_down = False

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def add(self, name, folder_or_files, **kwargs):
        "Add a repository with the files of a folder, or with a dict from path to content; return its commit"
        files = folder_or_files
        if not isinstance(files, dict):
            paths = [p for p in Path(folder_or_files).rglob('*') if p.is_file()]
            files = {p.relative_to(folder_or_files).as_posix(): p.read_bytes() for p in paths}
        self.repos[name] = Repo(**kwargs)
        return self.repos[name].commit('main', files)

    def env(self, home, token=TOKEN, **others):
        "Environment of a client: this server, and a cache of its own"
        keep = {k: v for k, v in os.environ.items() if not k.startswith(('HF_', 'HUGGING', 'TRANSFORMERS_'))}
        own = dict(HF_ENDPOINT=self.url, HF_HOME=str(home), HF_HUB_DISABLE_XET='1', HF_HUB_DISABLE_TELEMETRY='1',
                   HF_HUB_DISABLE_PROGRESS_BARS='1', NO_PROXY='127.0.0.1', OMP_NUM_THREADS='1')
        return {**keep, **own, **({'HF_TOKEN': token} if token else {}), **others}


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *args):
        pass

    @property
    def hub(self):
        return self.server.hub

    def answer(self, content=b'', status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        headers.setdefault('Content_Type', 'application/json')
        for name, value in {**headers, 'Content-Length': str(len(body))}.items():
            self.send_header(name.replace('_', '-'), value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def refuse(self, status, code='', message='refused'):
        self.answer(dict(error=message), status, X_Error_Code=code, X_Error_Message=message)

    def body(self):
        return self.rfile.read(int(self.headers.get('Content-Length') or 0))

    def handle_request(self):
        self.hub.requests.append(f'{self.command} {self.path}')
        body = self.body()
        if self.hub.is_down:
            return self.refuse(503)
        parts = urlsplit(self.path)
        for pattern, function in ROUTES.items():
            method, _, regex = pattern.partition(' ')
            if self.command in method.split('|') and (found := re.fullmatch(regex, parts.path)):
                return function(self, body, parse_qs(parts.query), *map(unquote, found.groups()))
        self.refuse(404, 'EntryNotFound', f'no such address: {self.path}')

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    # who asks

    @property
    def may_write(self):
        return self.headers.get('Authorization') == f'Bearer {TOKEN}'

    def repo(self, name):
        "The repository if this client may see it; otherwise it gets the answer of the hub, and this returns `None`"
        repo = self.hub.repos.get(name)
        if repo is None or repo.private and not self.may_write:
            self.refuse(404 if self.may_write else 401, 'RepoNotFound', 'Repository not found')
            return None
        return repo

    def commit_of(self, repo, revision):
        sha = repo.find(revision)
        if sha is None:
            self.refuse(404, 'RevisionNotFound', 'Invalid rev id')
        return sha

    # reading

    def info(self, body, query, name, revision='main'):
        if (repo := self.repo(name)) and (sha := self.commit_of(repo, revision)):
            files = repo.commits[sha].items()
            siblings = [dict(rfilename=path, **self.facts(repo, path, data)) for path, data in files]
            self.answer(dict(id=name, modelId=name, sha=sha, private=repo.private, tags=[], siblings=siblings))

    def facts(self, repo, path, data):
        size = repo.claimed.get(path, len(data))
        facts = dict(size=size, blobId=hashlib.sha1(data).hexdigest())
        if path.endswith(LARGE):
            facts['lfs'] = dict(sha256=hashlib.sha256(data).hexdigest(), size=size, pointerSize=130)
        return facts

    def tree(self, body, query, name, revision, folder=''):
        if (repo := self.repo(name)) and (sha := self.commit_of(repo, revision)):
            rows = []
            for path, data in repo.commits[sha].items():
                facts = self.facts(repo, path, data)
                row = dict(type='file', path=path, size=facts['size'], oid=facts['blobId'])
                if 'lfs' in facts:
                    row['lfs'] = dict(oid=facts['lfs']['sha256'], size=facts['size'], pointerSize=130)
                rows.append(row)
            self.answer(rows)

    def resolve(self, body, query, name, revision, path):
        if not (repo := self.repo(name)) or not (sha := self.commit_of(repo, revision)):
            return
        if repo.gated and not self.may_write:
            return self.refuse(403, 'GatedRepo', 'Access to this model is restricted')
        data = repo.commits[sha].get(path)
        if data is None:
            return self.refuse(404, 'EntryNotFound', 'Entry not found')
        hashed = hashlib.sha256(data) if path.endswith(LARGE) else hashlib.sha1(data)
        self.answer(data, ETag=f'"{hashed.hexdigest()}"', X_Repo_Commit=sha, Content_Type='application/octet-stream')

    # writing

    def create(self, body, query):
        if not self.may_write:
            return self.refuse(401, '', 'Invalid credentials in Authorization header')
        asked = json.loads(body)
        name = f'{asked.get("organization") or "me"}/{asked["name"]}'
        if not name.startswith('me/'):
            return self.refuse(403, '', "You don't have the rights to create a model under this namespace")
        if name in self.hub.repos:
            return self.answer(dict(error='You already created this model repo', url=f'{self.hub.url}/{name}'), 409)
        self.hub.repos[name] = Repo('private' in (asked.get('visibility'), asked.get('private') and 'private'))
        self.answer(dict(url=f'{self.hub.url}/{name}', name=name))

    def branch(self, body, query, name, branch):
        if repo := self.repo(name):
            if branch in repo.branches:
                return self.refuse(409, '', 'Reference already exists')
            repo.branches[branch] = repo.branches['main']
            self.answer({})

    def preupload(self, body, query, name, revision):
        files = json.loads(body)['files']
        modes = [dict(path=f['path'], uploadMode='lfs' if f['path'].endswith(LARGE) else 'regular', shouldIgnore=False)
                 for f in files]
        self.answer(dict(files=modes))

    def lfs_batch(self, body, query, name):
        rows = [dict(oid=o['oid'], size=o['size'], actions=dict(upload=dict(href=f'{self.hub.url}/lfs/{o["oid"]}')))
                for o in json.loads(body)['objects']]
        self.answer(dict(transfer='basic', objects=rows))

    def lfs_put(self, body, query, oid):
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.lfs[oid] = body
        self.answer(b'')

    def commit(self, body, query, name, branch):
        if not (repo := self.repo(name)) or not (sha := self.commit_of(repo, branch)):
            return
        files = dict(repo.commits[sha])
        for row in map(json.loads, body.decode().splitlines()):
            kind, value = row['key'], row['value']
            if kind == 'header':
                header = value
            elif kind == 'file':
                files[value['path']] = base64.b64decode(value['content'])
            elif kind == 'lfsFile':
                files[value['path']] = self.hub.lfs[value['oid']]
            elif kind == 'deletedFile':
                del files[value['path']]
        if header.get('parentCommit') not in (None, sha):
            return self.refuse(412, '', 'A commit has happened since')
        sha = repo.commit(branch, files, header['summary'])
        self.answer(dict(success=True, commitOid=sha, commitUrl=f'{self.hub.url}/{name}/commit/{sha}', hookOutput=''))

    def valid_yaml(self, body, query):
        self.answer(dict(errors=[], warnings=[]))


NAME = '([^/]+/[^/]+)'
ROUTES = {
    f'GET /api/models/{NAME}': Handler.info,
    f'GET /api/models/{NAME}/revision/([^/]+)': Handler.info,
    f'GET /api/models/{NAME}/tree/([^/]+)': Handler.tree,
    f'GET|HEAD /{NAME}/resolve/([^/]+)/(.+)': Handler.resolve,
    'POST /api/repos/create': Handler.create,
    f'POST /api/models/{NAME}/branch/([^/]+)': Handler.branch,
    f'POST /api/models/{NAME}/preupload/([^/]+)': Handler.preupload,
    f'POST /api/models/{NAME}/commit/([^/]+)': Handler.commit,
    f'POST /{NAME}\\.git/info/lfs/objects/batch': Handler.lfs_batch,
    'PUT /lfs/([0-9a-f]+)': Handler.lfs_put,
    'POST /api/validate-yaml': Handler.valid_yaml,
}
