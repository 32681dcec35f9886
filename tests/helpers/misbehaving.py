"""A real HTTP server on localhost that does to a file what servers, proxies and networks do."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

CUTS_AFTER = 40_000
"""Bytes of a connection that is cut."""

LOGIN_PAGE = b'<!DOCTYPE html><title>Please log in</title>'


class Handler(BaseHTTPRequestHandler):
    """Answers as ``server.script`` says: a list of words, one a request; when it is used up, properly."""

    protocol_version = 'HTTP/1.1'

    def do_GET(self) -> None:
        server = self.server
        server.requests.append(self.path)
        self.close_connection = True
        fault = server.script.pop(0) if server.script else 'none'
        content = server.files.get(self.path.partition('?')[0])
        if fault.isdecimal():
            self.answer(int(fault), b'no')
        elif content is None and not fault.startswith('redirect'):
            self.answer(404, b'nothing here')
        else:
            getattr(self, fault)(content)

    def answer(self, code: int, body: bytes, **headers: object) -> None:
        self.send_response(code)
        for name, value in {'Content_Length': len(body), 'Connection': 'close', **headers}.items():
            if value is not None:
                self.send_header(name.replace('_', '-'), str(value))
        self.end_headers()
        self.wfile.write(body)

    def none(self, content: bytes) -> None:
        self.answer(200, content)

    def cut(self, content: bytes) -> None:
        self.answer(200, content[:CUTS_AFTER], Content_Length=len(content))

    def cut_before_anything(self, content: bytes) -> None:
        pass

    def trickle(self, content: bytes) -> None:
        self.answer(200, b'', Content_Length=len(content))
        for start in range(0, len(content), 20_000):
            self.wfile.write(content[start : start + 20_000])
            self.wfile.flush()
            time.sleep(self.server.seconds)

    def without_length(self, content: bytes) -> None:
        self.answer(200, content, Content_Length=None)

    def without_length_and_cut(self, content: bytes) -> None:
        self.answer(200, content[:CUTS_AFTER], Content_Length=None)

    def too_short_a_length(self, content: bytes) -> None:
        self.answer(200, content, Content_Length=len(content) - 1000)

    def chunked(self, content: bytes) -> None:
        body = b'%x\r\n%s\r\n0\r\n\r\n' % (len(content), content)
        self.answer(200, body, Content_Length=None, Transfer_Encoding='chunked')

    def chunked_and_cut(self, content: bytes) -> None:
        body = b'%x\r\n%s' % (len(content), content[:CUTS_AFTER])
        self.answer(200, body, Content_Length=None, Transfer_Encoding='chunked')

    def html(self, content: bytes) -> None:
        self.answer(200, LOGIN_PAGE, Content_Type='text/html; charset=utf-8')

    def html_called_a_file(self, content: bytes) -> None:
        self.answer(200, LOGIN_PAGE, Content_Type='application/octet-stream')

    def nonsense(self, content: bytes) -> None:
        self.wfile.write(b'\x00\x01 this is not HTTP\r\n\r\n')

    def redirect(self, content: bytes | None) -> None:
        # As most servers do, with a page for people.
        location = self.server.url + self.path.replace('old', 'new')
        self.answer(302, b'<html>', Location=location, Content_Type='text/html')

    def redirect_in_a_circle(self, content: bytes | None) -> None:
        self.server.script.insert(0, 'redirect_in_a_circle')
        self.answer(302, b'', Location=self.path)

    def redirect_to_a_local_file(self, content: bytes | None) -> None:
        self.answer(302, b'', Location='file:///etc/hostname')

    def log_message(self, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """``files``: content by path; ``script``: what happens to the next requests; ``requests``: what was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(('127.0.0.1', 0), Handler)
        self.files: dict[str, bytes] = {}
        self.script: list[str] = []
        self.requests: list[str] = []
        self.seconds = 0.1  # between the parts of a file that trickles
        self.url = f'http://127.0.0.1:{self.server_port}'


@contextmanager
def misbehaving_server() -> Iterator[Server]:
    with Server() as server:
        Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()
