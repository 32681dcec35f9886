"""A folder of static files on a plain file server, and a browser that visits it."""

import contextlib
import functools
import http.server
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

CAMERA = ('--use-fake-device-for-media-stream', '--use-fake-ui-for-media-stream')
"""Chromium's own moving picture, in the place of a camera."""

SOFTWARE_GPU = ('--enable-unsafe-webgpu', '--use-webgpu-adapter=swiftshader')
"""WebGPU computed by the processor: slow, but there everywhere."""


def find_browser() -> str | None:
    """The program, if there is one."""
    return shutil.which('chromium') or shutil.which('google-chrome')


class _Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder as ``python -m http.server`` does; the address."""
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(_Handler, directory=str(folder)))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f'http://127.0.0.1:{server.server_port}/'
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
