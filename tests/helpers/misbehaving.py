"""A real HTTP server on localhost that does to a file what servers, proxies and networks do."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

CUTS_AFTER = 40_000
"""Bytes of a connection that is cut."""


class Handler(BaseHTTPRequestHandler):
    """Answers as ``server.script`` says: a list of words, one a request; when it is used up, properly."""

    protocol_version = 'HTTP/1.1'

    def do_GET(self) -> None:
        server = self.server
        server.requests.append((self.path, self.headers.get('Range'), self.headers.get('If-Range')))
        self.close_connection = True
        fault = server.script.pop(0) if server.script else 'none'
        content = server.files.get(self.path)
        if content is None and not fault.startswith('redirect'):
            return self.answer(404, b'nothing here')
        if fault.isdecimal():
            return self.answer(int(fault), b'no', {'Retry-After': '0'})
        getattr(self, fault)(content)

    def answer(self, code: int, body: bytes, headers: dict | None = None) -> None:
        self.send_response(code)
        for name, value in {'Content-Length': len(body), **(headers or {})}.items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def asked_for(self, content: bytes) -> tuple[int, bytes, dict]:
        """Status, body and headers of a proper answer, of a part where one was asked for."""
        headers = {} if self.server.etag is None else {'ETag': self.server.etag}
        match = re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range', ''))
        if not match or self.headers.get('If-Range') not in (None, self.server.etag):
            return 200, content, headers
        start = int(match[1])
        if start >= len(content):
            return 416, b'', {'Content-Range': f'bytes */{len(content)}'}
        return 206, content[start:], {**headers, 'Content-Range': f'bytes {start}-{len(content) - 1}/{len(content)}'}

    def none(self, content: bytes) -> None:
        self.answer(*self.asked_for(content))

    def cut(self, content: bytes) -> None:
        code, body, headers = self.asked_for(content)
        self.answer(code, body[:CUTS_AFTER], {**headers, 'Content-Length': len(body)})

    def cut_before_anything(self, content: bytes) -> None:
        pass

    def stall(self, content: bytes) -> None:
        self.cut(content)
        self.wfile.flush()
        time.sleep(self.server.patience * 4)

    def trickle(self, content: bytes) -> None:
        code, body, headers = self.asked_for(content)
        self.answer(code, b'', {**headers, 'Content-Length': len(body)})
        for start in range(0, len(body), 20_000):
            self.wfile.write(body[start : start + 20_000])
            self.wfile.flush()
            time.sleep(self.server.patience / 4)

    def ignore_range(self, content: bytes) -> None:
        self.answer(200, content, {'ETag': self.server.etag})

    def ignore_range_and_cut(self, content: bytes) -> None:
        self.answer(200, content[:CUTS_AFTER], {'ETag': self.server.etag, 'Content-Length': len(content)})

    def another_range(self, content: bytes) -> None:
        self.answer(
            206, content, {'ETag': self.server.etag, 'Content-Range': f'bytes 0-{len(content) - 1}/{len(content)}'}
        )

    def other_file_ignoring_if_range(self, content: bytes) -> None:
        start = int(re.fullmatch(r'bytes=(\d+)-', self.headers['Range'])[1])
        size = {'Content-Range': f'bytes {start}-{len(content) - 1}/{len(content)}', 'ETag': '"another"'}
        self.answer(206, content[start:], size)

    def too_short_a_length(self, content: bytes) -> None:
        self.answer(200, content, {'Content-Length': len(content) - 1000})

    def too_long_a_length(self, content: bytes) -> None:
        self.answer(200, content, {'Content-Length': len(content) + 1000, 'ETag': self.server.etag})

    def no_length(self, content: bytes) -> None:
        self.answer(200, content, {'Content-Length': None})

    def chunked(self, content: bytes) -> None:
        body = b'%x\r\n%s\r\n0\r\n\r\n' % (len(content), content)
        self.answer(200, body, {'Content-Length': None, 'Transfer-Encoding': 'chunked'})

    def chunked_and_cut(self, content: bytes) -> None:
        body = b'%x\r\n%s' % (len(content), content[:CUTS_AFTER])
        self.answer(200, body, {'Content-Length': None, 'Transfer-Encoding': 'chunked'})

    def html(self, content: bytes) -> None:
        self.answer(200, b'<!DOCTYPE html><title>Please log in</title>', {'Content-Type': 'text/html; charset=utf-8'})

    def html_called_a_file(self, content: bytes) -> None:
        self.answer(200, b'<!DOCTYPE html><title>Please log in</title>', {'Content-Type': 'application/octet-stream'})

    def nonsense(self, content: bytes) -> None:
        self.wfile.write(b'\x00\x01 this is not HTTP\r\n\r\n')

    def redirect(self, content: bytes) -> None:
        self.answer(302, b'', {'Location': self.server.url + self.path.replace('old', 'new')})

    def redirect_in_a_circle(self, content: bytes) -> None:
        self.server.script.insert(0, 'redirect_in_a_circle')
        self.answer(302, b'', {'Location': self.path})

    def redirect_to_a_local_file(self, content: bytes) -> None:
        self.answer(302, b'', {'Location': 'file:///etc/hostname'})

    def log_message(self, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """``files``: content by path; ``script``: what happens to the next requests; ``requests``: what was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(('127.0.0.1', 0), Handler)
        self.files: dict[str, bytes] = {}
        self.script: list[str] = []
        self.requests: list[tuple[str, str | None, str | None]] = []
        self.etag: str | None = '"first"'
        self.patience = 1.0
        self.url = f'http://127.0.0.1:{self.server_port}'


@contextmanager
def misbehaving_server() -> Iterator[Server]:
    with Server() as server:
        Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()
