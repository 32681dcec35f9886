"""A page that predicts in the visitor's browser: a folder of static files, for any web server."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..drawing.overlay import OPACITY
from ..export.backend import ExportOptions, OfPrecision, SavedModel
from ..export.capture import Wrapper
from ..export.onnx import OnnxBackend, OnnxModel
from ..export.sizes import ImageSizes
from ..export.source import Source
from ..openmmlab.config import named_classes
from ..runtimes.calibration import Calibration
from ..utils.errors import UserError
from ..utils.files import sha256_of
from . import runtime

HERE = Path(__file__).parent

SHARED = HERE / 'page'
"""What this page and that of the web demo have in common."""

OWN = HERE / 'static'

COPIED = (SHARED / 'page.css', SHARED / 'viewer.js', *(OWN / name for name in ('static.css', 'site.js', 'png.js')))

MODEL, ABOUT, WORKER, SERVICE_WORKER, INDEX = 'model.onnx', 'model.json', 'worker.js', 'service_worker.js', 'index.html'

RUNTIME = 'onnxruntime-web'
"""Folder of its files."""

MOST_PIXELS = 64 * 10**6
"""Of a picture that the page takes, as in the web demo."""

POLICY = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self'; connect-src 'self'; "
    "worker-src 'self'; img-src 'self' blob: data:; media-src blob:; base-uri 'none'; form-action 'none'"
)
"""The browser itself sees to it that the page talks to nobody but the server it is from."""


@dataclass(frozen=True)
class WebBackend(OfPrecision):
    """A folder with a page, an ONNX file for images of one size, and onnxruntime-web.

    Args:
        precision: As of :class:`OnnxBackend`.
        runtime: onnxruntime-web's npm package, if it was fetched otherwise.
    """

    precision: str = 'fp32'
    runtime: str | None = None

    suffix = ''
    single = False

    @property
    def onnx(self) -> OnnxBackend:
        """What makes and runs the model in the folder."""
        return OnnxBackend(self.precision)

    @property
    def stored(self) -> str:
        return self.onnx.stored

    def check(self, options: ExportOptions) -> None:
        self.onnx.check(options)
        if options.part != 'segmentor' or options.output != 'labels':
            raise UserError('The page shows labels: it takes --part segmentor and --output labels, as without them.')
        self._find_runtime()

    def choose_sizes(self, asked: Sequence[tuple[int, int]], source: Source) -> ImageSizes:
        return self.onnx.choose_sizes(asked or [source.crop_size], source)

    def convert(
        self, wrapper: Wrapper, sizes: ImageSizes, source: Source, calibration: Calibration | None = None
    ) -> 'Site':
        converted = self.onnx.convert(wrapper, sizes, source, calibration)
        return Site(converted, sizes.sizes[0], source, self.precision, self._find_runtime())

    def read(self, path: Path) -> SavedModel:
        saved = self.onnx.read(path / MODEL)
        return saved._replace(format=f'{saved.format} with {runtime.PACKAGE} {runtime.VERSION}')

    def measure(self, path: Path, saved: SavedModel, wrapper: Wrapper, size: tuple[int, int]) -> str:
        return self.onnx.measure(path / MODEL, saved, wrapper, size)

    def next_step(self, path: Path) -> str:
        return f'python -m http.server --bind 127.0.0.1 --directory {path}'

    def _find_runtime(self) -> Path:
        return runtime.find_package(Path(self.runtime) if self.runtime else None)


class Site(NamedTuple):
    """The page with a network, in memory."""

    model: OnnxModel
    size: tuple[int, int]  # (H, W) of its images
    source: Source
    precision: str
    package: Path  # of onnxruntime-web

    def save(self, path: str) -> None:
        """Write the folder."""
        folder = Path(path)
        folder.mkdir()
        self.model.save(str(folder / MODEL))
        runtime.extract(self.package, folder / RUNTIME)
        for file in COPIED:
            shutil.copyfile(file, folder / file.name)
        shutil.copyfile(OWN / WORKER, folder / WORKER)
        page = (SHARED / 'page.html').read_text(encoding='utf-8')
        _fill(OWN / INDEX, folder / INDEX, page=page, policy=POLICY)
        about = self._describe(folder)
        files = sorted(file for file in folder.rglob('*') if file.is_file())
        version = _version_of(about, files)
        (folder / ABOUT).write_text(json.dumps(dict(about, version=version), ensure_ascii=False), encoding='utf-8')
        # What is large the page loads itself, with a progress bar.
        large = {MODEL, *(f'{RUNTIME}/{flavour["binary"]}' for flavour in runtime.FLAVOURS.values())}
        shell = sorted({file.relative_to(folder).as_posix() for file in files} - large)
        _fill(
            OWN / SERVICE_WORKER,
            folder / SERVICE_WORKER,
            version=version,
            shell=json.dumps(['./', ABOUT, *shell]),
            policy=json.dumps(POLICY),
        )

    def _describe(self, folder: Path) -> dict:
        """What the page has to know of its model and its runtime."""
        classes, palette = named_classes(self.source.cfg)
        flavours = {
            name: {**flavour, 'binary': _describe_file(folder, f'{RUNTIME}/{flavour["binary"]}')}
            for name, flavour in runtime.FLAVOURS.items()
        }
        return dict(
            model=_describe_file(folder, MODEL),
            size=self.size,
            precision=self.precision,
            classes=classes,
            palette=palette,
            origin=self.source.origin(),
            opacity=OPACITY,
            most_pixels=MOST_PIXELS,
            runtime=dict(name=f'{runtime.PACKAGE} {runtime.VERSION}', folder=RUNTIME, flavours=flavours),
        )


def _describe_file(folder: Path, name: str) -> dict:
    return dict(file=name, bytes=(folder / name).stat().st_size, sha256=sha256_of(folder / name))


def _fill(template: Path, place: Path, **values: str) -> None:
    """Write a template with values in the place of their names in double braces."""
    text = template.read_text(encoding='utf-8')
    for name, value in values.items():
        text = text.replace('{{' + name + '}}', value)
    place.write_text(text, encoding='utf-8')


def _version_of(about: dict, files: Sequence[Path]) -> str:
    """Another for every other content."""
    content = json.dumps([about, *(sha256_of(file) for file in files)])
    return hashlib.sha256(content.encode()).hexdigest()[:16]
