"""An HTTP server for a page or a service: nothing but what that needs, bounded, and whole shut down."""

import asyncio
import contextlib
import json
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING

from ..utils.errors import UserError
from ..utils.images import ImageError, pixels_in_header

if TYPE_CHECKING:
    import gradio


Receive, Send = Callable[[], Awaitable[dict]], Callable[[dict], Awaitable[None]]
"""As in ASGI."""

READ = ('/', '/theme.css', '/favicon.ico', '/gradio_api/queue/data')
READ_BELOW = ('/static/', '/assets/')
WRITE = ('/gradio_api/queue/join',)
"""What the page asks for. Gradio has more, such as uploads to its cache and files out of it."""

HEADERS = {
    'content-security-policy': "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:",
    'referrer-policy': 'no-referrer',
    'x-content-type-options': 'nosniff',
}
"""With every answer: the browser itself sees to it that the page talks to nobody else."""

WAITING = 16
"""Uploads of the largest size that are held in memory while they arrive, and predictions that wait their turn."""

RETRY_AFTER = 1
"""Seconds after which who was sent away may come again."""

PATIENCE = 120
"""Seconds that an upload may take."""

CONNECTIONS = 500
"""At once; a browser opens up to six."""


class Guard:
    """ASGI middleware: refuses paths that are not known, and bodies that are too large, too slow or too many.

    Args:
        app: What it guards.
        most: Bytes of one body.
        is_known: Whether there is such a path for a method.
        headers: Of every answer.
    """

    def __init__(self, app: Callable, most: int, is_known: Callable[[str, str], bool], headers: dict[str, str]) -> None:
        self.app = app
        self.most = most
        self.is_known = is_known
        self.headers = [(name.encode(), value.encode()) for name, value in headers.items()]
        self.held = 0

    async def __call__(self, scope: dict, receive: Receive, send: Send) -> None:
        if scope['type'] == 'lifespan':
            return await self.app(scope, receive, send)
        if scope['type'] != 'http':
            return await _refuse(send, 404, 'Not found')

        async def send_with_headers(message: dict) -> None:
            if message['type'] == 'http.response.start':
                message = {**message, 'headers': [*message['headers'], *self.headers]}
            await send(message)

        ours = self.is_known(scope['method'], scope['path'])
        if ours and scope['method'] != 'POST':
            return await self.app(scope, receive, send_with_headers)
        chunks: list[bytes] = []
        try:
            refusal = await asyncio.wait_for(self._read(receive, chunks), PATIENCE)
            if refusal or not ours:
                return await _refuse(send, *(refusal or (404, 'Not found')))
            whole = [dict(type='http.request', body=b''.join(chunks), more_body=False)]
            await self.app(scope, lambda: _next(whole, receive), send_with_headers)
        except asyncio.TimeoutError:
            await _refuse(send, 408, f'The upload took more than {PATIENCE} seconds')
        finally:
            self._forget(chunks)

    async def _read(self, receive: Receive, chunks: list[bytes]) -> tuple[int, str] | None:
        """Read a body into ``chunks``; the status and the reason if it is refused.

        One for which there is no room, or no such path, is heard to its end all the same: only then does a browser read
        what it is told.
        """
        size, more, room = 0, True, True
        while more:
            message = await receive()
            if message['type'] == 'http.disconnect':
                return 400, 'Broken off'
            chunk, more = message.get('body', b''), message.get('more_body', False)
            size += len(chunk)
            if size > self.most:
                return 413, f'More than {self.most / 1e6:.0f} MB'
            if room and self.held + len(chunk) <= WAITING * self.most:
                self.held += len(chunk)
                chunks.append(chunk)
            else:
                room = False
                self._forget(chunks)
        return None if room else (503, 'Too many uploads at once; try again in a moment')

    def _forget(self, chunks: list[bytes]) -> None:
        self.held -= sum(map(len, chunks))
        chunks.clear()


def is_of_the_page(method: str, path: str) -> bool:
    """Whether the page asks for this."""
    if method == 'POST':
        return path in WRITE
    if method not in ('GET', 'HEAD') or '..' in path or '\\' in path:
        return False
    return path in READ or path.startswith(READ_BELOW)


async def _next(first: list[dict], receive: Receive) -> dict:
    return first.pop() if first else await receive()


async def _refuse(send: Send, status: int, reason: str) -> None:
    # JSON with a detail is what gradio's page shows; closing tells a sender who is still at it to stop.
    headers = [(b'content-type', b'application/json'), (b'connection', b'close')]
    if status == 503:
        headers.append((b'retry-after', str(RETRY_AFTER).encode()))
    await send(dict(type='http.response.start', status=status, headers=headers))
    await send(dict(type='http.response.body', body=json.dumps(dict(detail=f'{reason}.')).encode()))


def listen(host: str, port: int) -> socket.socket:
    """Listen, before anything takes long.

    Args:
        host: Address or name of this machine.
        port: 0 means any that is free.

    Raises:
        UserError: the port is taken, or the host not this machine.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2 * CONNECTIONS)
    except OSError as error:
        raise UserError(
            f'{host}, port {port}, cannot be listened on: {error.strerror or error}.\n'
            '  --port N takes another port (0: any that is free), --host another address of this machine.'
        ) from None


def address_of(listening: socket.socket) -> str:
    """What to open in a browser."""
    host, port = listening.getsockname()[:2]
    return f'http://{f"[{host}]" if ":" in host else host}:{port}'


def serve_page(
    page: 'gradio.Blocks', listening: socket.socket, most: int, on_start: Callable[[], None], **options: object
) -> None:
    """Serve a page until Ctrl-C or SIGTERM.

    Args:
        page: It may use its queue, and no other part of gradio's API.
        listening: From :func:`listen`.
        most: Bytes of one request.
        on_start: Called when it can be opened.
        options: For ``gradio.mount_gradio_app``.
    """
    import fastapi
    import gradio

    page.queue(max_size=WAITING, api_open=False)
    app = gradio.mount_gradio_app(
        fastapi.FastAPI(openapi_url=None),
        page,
        '/',
        footer_links=[],
        run_history=False,  # it would keep the images in the browser
        show_error=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        **options,
    )
    serve_app(Guard(app, most, is_of_the_page, HEADERS), listening, on_start, patience=1)


def serve_app(app: Callable, listening: socket.socket, on_start: Callable[[], None], patience: int) -> None:
    """Serve an ASGI app until Ctrl-C or SIGTERM.

    Args:
        app: A :class:`Guard`.
        listening: From :func:`listen`.
        on_start: Called when it can be reached.
        patience: Seconds that requests have to be answered in the end.
    """
    import uvicorn

    config = uvicorn.Config(
        app,
        ws='none',
        log_level='error',
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=patience,
    )
    on_start()
    uvicorn.Server(config).run([listening])


class TooLarge(ImageError):
    """An image beyond what the server takes."""


def check_size(name: str, content: bytes, max_upload: int, max_pixels: int) -> None:
    """Make sure that an image is none of those that take too much memory, before it is decoded.

    Args:
        name: What messages call it.
        content: Of the file.
        max_upload: Bytes.
        max_pixels: In its header.

    Raises:
        TooLarge: it is.
        ImageError: it is empty.
    """
    if not content:
        raise ImageError(f'{name} is empty: 0 bytes.')
    if len(content) > max_upload:
        raise TooLarge(f'{name} has {len(content) / 1e6:.1f} MB; expected at most {max_upload / 1e6:.0f}.')
    pixels = pixels_in_header(content)
    if pixels > max_pixels:
        raise TooLarge(f'{name} has {pixels / 1e6:.1f} million pixels; expected at most {max_pixels / 1e6:.0f}.')


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the program as its last line does: what is to be removed at the end is."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
