"""A visitor of a page, in a browser that nobody else shares."""

import base64
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Request

SECONDS = 300
"""That a machine at work on other things may take; nothing is waited for so long otherwise."""


class Visitor:
    """Notes whom the page asks, and what it complains of.

    Args:
        browser: Of playwright.
        address: Of the page.
        ready: Selector of an element that is seen once the page takes files.
        options: Of the window, as playwright has them.
    """

    def __init__(self, browser: 'Browser', address: str, ready: str, **options: object) -> None:
        self.ready = ready
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(1000 * SECONDS)
        self.requests: list[Request] = []
        self.complaints: list[str] = []
        self.context.on('request', lambda request: self.requests.append(request))
        self.page: Page = self.context.new_page()
        self.page.on('pageerror', lambda error: self.complaints.append(str(error)))
        self.page.on('console', lambda said: self.complaints.append(said.text) if said.type == 'error' else None)
        self.page.goto(address)

    def upload(self, content: bytes | Path, name: str = 'photo.jpg', kind: str = 'image/jpeg') -> None:
        if isinstance(content, bytes):
            content = dict(name=name, mimeType=kind, buffer=content)
        self.page.locator(self.ready).wait_for()
        self.page.locator('.file').first.set_input_files(content)

    def wait_for_result(self, name: str) -> str:
        facts = self.page.locator('.facts').filter(has_text=f'{name} ·')
        facts.wait_for()
        return facts.inner_text()

    def message(self) -> str:
        self.page.locator('.message').wait_for()
        return self.page.locator('.message').inner_text()

    def mask(self) -> tuple[str, bytes]:
        """Name and content of the mask that is downloaded."""
        with self.page.expect_download() as download:
            self.page.get_by_text('Download the mask').click()
        return download.value.suggested_filename, Path(download.value.path()).read_bytes()

    def layer(self) -> np.ndarray:
        """(H, W, 4): what is painted over the image."""
        script = """canvas => {
            const {width, height} = canvas;
            const data = canvas.getContext('2d').getImageData(0, 0, width, height).data;
            return [height, width, btoa(Array.from(data, (byte) => String.fromCharCode(byte)).join(''))];
        }"""
        height, width, data = self.page.locator('.overlay').evaluate(script)
        return np.frombuffer(base64.b64decode(data), np.uint8).reshape(height, width, 4)
