"""Measure and photograph a page that `recnext export --to web` wrote, in Chromium, from a plain file server.

    python tests/web/measure_static_page.py SITE IMAGE --rounds 7 --picture docs/browser.jpg

For each place to compute: the time from opening the page, with nothing kept, to the first result, again with everything
kept, then the median of an image. The same file in onnxruntime outside the browser is measured beside them.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median

import cv2
import numpy as np
from playwright.sync_api import Browser, Page, sync_playwright

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as pytest has it

from helpers.sites import SOFTWARE_GPU, find_browser, served

PATIENCE = 600
"""Seconds."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('site', type=Path)
    parser.add_argument('image', type=Path)
    parser.add_argument('--run', nargs='+', default=['single', 'threads'], help='single, threads, webgpu')
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--picture', type=Path, metavar='JPEG', help='of the page with the first result')
    args = parser.parse_args()
    about = json.loads((args.site / 'model.json').read_text())
    print(f'model {about["model"]["bytes"] / 1e6:.1f} MB, {about["precision"]}')
    with sync_playwright() as playwright, served(args.site) as address:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=list(SOFTWARE_GPU))
        visits = {run: Visit(browser, f'{address}?run={run}', args.image) for run in args.run}
        if args.picture:
            photograph(next(iter(visits.values())).page, args.picture)
        times: dict[str, list[float]] = {run: [] for run in visits}
        native = open_native(args.site / 'model.onnx', about['size'])
        times['onnxruntime, 1 thread'] = []
        for _ in range(args.rounds):  # alternating: all see the same machine
            for run, visit in visits.items():
                times[run].append(visit.predict())
            began = time.perf_counter()
            native()
            times['onnxruntime, 1 thread'].append(1e3 * (time.perf_counter() - began))
        for name, measured in times.items():
            said = ''
            if name in visits:
                visit = visits[name]
                said = f', first result after {visit.first:.1f} s, {visit.again:.1f} s when kept ({visit.where})'
            print(f'{name}: {median(measured):.0f} ms per image (least {min(measured):.0f}){said}')
        browser.close()


class Visit:
    """A browser on the page, with the first result of an image."""

    def __init__(self, browser: Browser, address: str, image: Path) -> None:
        self.image = image
        self.count = 0
        context = browser.new_context(viewport=dict(width=1280, height=860))
        context.set_default_timeout(1000 * PATIENCE)
        self.page: Page = context.new_page()
        self.first, self.again = self._open(address), self._open(address)
        self.where = self.page.locator('.made').inner_text().split(' · ')[0]

    def _open(self, address: str) -> float:
        """Seconds until a result is shown."""
        began = time.perf_counter()
        self.page.goto(address)
        self.page.locator('.camera').wait_for()
        self.predict()
        return time.perf_counter() - began

    def predict(self) -> float:
        """Milliseconds for an image, as the page tells them."""
        self.count += 1
        name = f'{self.image.stem}-{self.count}{self.image.suffix}' if self.count > 1 else self.image.name
        file = dict(name=name, mimeType='image/jpeg', buffer=self.image.read_bytes())
        self.page.locator('.file').first.set_input_files(file)
        self.page.locator('.facts').filter(has_text=f'{name} ·').wait_for()
        return float(self.page.locator('.timings td').last.inner_text().removesuffix(' ms'))


def photograph(page: Page, place: Path) -> None:
    """Write a JPEG of the page, as wide as a laptop."""
    page.screenshot(path=place, type='jpeg', quality=80)
    narrow = place.with_stem(f'{place.stem}_narrow')
    size = page.viewport_size
    page.set_viewport_size(dict(width=390, height=844))
    page.screenshot(path=narrow, type='jpeg', quality=80, full_page=True)
    page.set_viewport_size(size)
    wide, tall = cv2.imread(str(place)), cv2.imread(str(narrow))
    narrow.unlink()
    height = wide.shape[0]
    tall = cv2.resize(tall, (round(tall.shape[1] * height / tall.shape[0]), height), interpolation=cv2.INTER_AREA)
    gap = np.full((height, 24, 3), 128, np.uint8)
    cv2.imwrite(str(place), np.hstack([wide, gap, tall]), [cv2.IMWRITE_JPEG_QUALITY, 85])


def open_native(path: Path, size: tuple[int, int]) -> object:
    """The same file in onnxruntime outside the browser, on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    image = np.zeros((1, 3, *size), np.float32)
    return lambda: session.run(None, dict(image=image))


if __name__ == '__main__':
    main()
