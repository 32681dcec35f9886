"""A Hugging Face hub on localhost: as much of its protocol as huggingface_hub uses to create, push and pull."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

OWNER, READER = 'hf_owner', 'hf_reader'
"""Tokens: of who may write for ``user``, and of who may only read."""

USER = 'user'


@dataclass
class Hub:
    """What the server holds, and what it was asked."""

    url: str = ''
    commits: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    """Files by repository and commit; the last commit is ``main``."""
    large: dict[str, bytes] = field(default_factory=dict)
    """What was uploaded by LFS, by SHA-256."""
    private: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)
    swapped: dict[str, bytes] = field(default_factory=dict)
    """What is sent in the place of a file, by its name, with the headers of the right one."""

    def files(self, repository: str) -> dict[str, bytes]:
        """Those of ``main``."""
        return list(self.commits[repository].values())[-1]

    def commit(self, repository: str, changed: dict[str, bytes]) -> str:
        known = self.commits[repository]
        files = {**(self.files(repository) if known else {}), **changed}
        name = hashlib.sha1(f'{repository} {len(known)}'.encode()).hexdigest()
        known[name] = files
        return name


class Handler(http.server.BaseHTTPRequestHandler):
    """The routes; every answer closes the connection."""

    hub: Hub

    def log_message(self, *arguments: object) -> None:
        self.hub.requests.append(f'{self.command} {self.path}')

    def answer(self, content: object = None, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content if content is not None else {}).encode()
        self.send_response(status)
        for name, value in {'Content-Length': str(len(body)), **headers}.items():
            self.send_header(name.replace('_', '-'), value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def refuse(self, status: int, code: str = '') -> None:
        self.answer({'error': code or 'refused'}, status, **({'X-Error-Code': code} if code else {}))

    @property
    def token(self) -> str:
        return self.headers.get('Authorization', '').removeprefix('Bearer ')

    def body(self) -> bytes:
        if self.headers.get('Transfer-Encoding') != 'chunked':
            return self.rfile.read(int(self.headers.get('Content-Length', 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b''.join(parts)

    def do_POST(self) -> None:
        path, body = self.path.partition('?')[0], self.body()
        if path == '/api/validate-yaml':
            content = json.loads(body)['content']
            good = content.startswith('---\n') and 'license:' in content
            return self.answer({'errors': [] if good else [{'message': 'no license'}], 'warnings': []})
        if self.token not in (OWNER, READER):
            return self.refuse(401)
        if path == '/api/repos/create':
            return self.create(json.loads(body))
        if self.token != OWNER:
            return self.refuse(403)
        if found := re.fullmatch(r'/api/models/([^/]+/[^/]+)/preupload/main', path):
            files = [
                dict(path=file['path'], shouldIgnore=False, uploadMode='lfs' if _is_large(file['path']) else 'regular')
                for file in json.loads(body)['files']
            ]
            return self.answer({'files': files}) if found[1] in self.hub.commits else self.refuse(404, 'RepoNotFound')
        if path.endswith('.git/info/lfs/objects/batch'):
            objects = [
                {**wanted, 'actions': {'upload': {'href': f'{self.hub.url}/lfs/{wanted["oid"]}'}}}
                for wanted in json.loads(body)['objects']
            ]
            return self.answer({'transfer': 'basic', 'objects': objects})
        if found := re.fullmatch(r'/api/models/([^/]+/[^/]+)/commit/main', path):
            return self.commit(found[1], map(json.loads, body.splitlines()))
        self.refuse(404)

    def create(self, wanted: dict) -> None:
        repository = f'{wanted["organization"]}/{wanted["name"]}'
        if self.token != OWNER or wanted['organization'] != USER:
            return self.refuse(403)
        if repository in self.hub.commits:
            return self.answer({'error': 'exists', 'url': f'{self.hub.url}/{repository}'}, 409)
        self.hub.commits[repository] = {}
        self.hub.commit(repository, {'.gitattributes': b'*.safetensors filter=lfs diff=lfs merge=lfs -text\n'})
        if wanted.get('visibility') == 'private':
            self.hub.private.add(repository)
        self.answer({'url': f'{self.hub.url}/{repository}'})

    def commit(self, repository: str, lines: Iterator[dict]) -> None:
        changed = {}
        for line in lines:
            value = line['value']
            if line['key'] == 'file':
                changed[value['path']] = base64.b64decode(value['content'])
            elif line['key'] == 'lfsFile':
                changed[value['path']] = self.hub.large[value['oid']]
        name = self.hub.commit(repository, changed)
        url = f'{self.hub.url}/{repository}/commit/{name}'
        self.answer({'success': True, 'commitOid': name, 'commitUrl': url})

    def do_PUT(self) -> None:
        name, content = self.path.rpartition('/')[2], self.body()
        if hashlib.sha256(content).hexdigest() != name:
            return self.refuse(400)
        self.hub.large[name] = content
        self.answer()

    def do_GET(self) -> None:
        path = self.path.partition('?')[0]
        api = re.fullmatch(r'/api/models/([^/]+/[^/]+)(?:/revision/(.+))?', path)
        file = re.fullmatch(r'/([^/]+/[^/]+)/resolve/([^/]+)/(.+)', path)
        if not api and not file:
            return self.refuse(404)
        repository, revision = (api or file)[1], (api or file)[2] or 'main'
        known = self.hub.commits.get(repository)
        if known is None or (repository in self.hub.private and self.token != OWNER):
            return self.refuse(404 if self.token else 401, 'RepoNotFound')
        name = list(known)[-1] if revision == 'main' else revision
        if name not in known:
            return self.refuse(404, 'RevisionNotFound')
        if api:
            siblings = [{'rfilename': path} for path in known[name]]
            return self.answer({'id': repository, 'sha': name, 'siblings': siblings, 'private': False})
        content = known[name].get(file[3])
        if content is None:
            return self.answer({}, 404, X_Error_Code='EntryNotFound', X_Repo_Commit=name)
        digest = hashlib.sha256 if _is_large(file[3]) else hashlib.sha1
        headers = {'ETag': f'"{digest(content).hexdigest()}"', 'X-Repo-Commit': name}
        if _is_large(file[3]):
            headers |= {'X-Linked-ETag': headers['ETag'], 'X-Linked-Size': str(len(content))}
        self.answer(self.hub.swapped.get(file[3], content), **headers)

    do_HEAD = do_GET


def _is_large(path: str) -> bool:
    return path.endswith('.safetensors')


@contextlib.contextmanager
def hub_server() -> Iterator[Hub]:
    """Start one, on a port that is free."""
    hub = Hub()
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), type('Bound', (Handler,), dict(hub=hub)))
    hub.url = f'http://127.0.0.1:{server.server_port}'
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.05))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
