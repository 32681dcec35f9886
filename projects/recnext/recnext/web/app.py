"""A page to try a segmentor on: what is uploaded stays in memory, and is forgotten with the answer."""

import base64
import binascii
import importlib.util
import io
import os
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ..drawing.overlay import OPACITY, format_share, shrink
from ..predict.model import Model, load_deployed
from ..runtimes.deployment import DEFAULT, Deployment
from ..serving.server import address_of, check_size, ended_by_sigterm, listen, serve_page
from ..utils.devices import AUTO
from ..utils.errors import UserError
from ..utils.images import ImageError, read_image, silence_opencv
from ..utils.timing import Stopwatch

if TYPE_CHECKING:
    import gradio


PAGE_CSS = 'footer { display: none } main.contain { padding: 0 }'
"""Of gradio's page around ours."""

SHOWN_SIDE = 1600
"""The most pixels of a side of what the page shows; the mask has all."""

THUMBNAIL_SIDE = 160

BASE64 = 4 / 3
"""Bytes for a byte of an image on its way."""

SOURCE = Path(__file__).with_name('page')
"""What the browser gets."""


def serve(
    config: str,
    checkpoint: str,
    images: Sequence[str | Path] = (),
    host: str = '127.0.0.1',
    port: int = 7860,
    max_upload: int = 32,
    max_pixels: int = 64,
    deployment: Deployment = DEFAULT,
    device: str = AUTO,
    cfg_options: dict | None = None,
) -> None:
    """Serve the page until Ctrl-C or SIGTERM; see ``recnext web --help``.

    Args:
        config: Path of the config, or the name of a release.
        checkpoint: Path or address of the weights, of mmseg 1.x or 0.x.
        images: To choose from on the page.
        host: Address to listen on.
        port: 0 means any that is free.
        max_upload: Largest file that is taken, in MB.
        max_pixels: Largest image that is taken, in millions of pixels.
        deployment: The form in which the network is run.
        device: See :func:`.find_device`.
        cfg_options: Merged into the config.

    Raises:
        UserError: gradio is missing, the port is taken, or something does not fit.
    """
    if importlib.util.find_spec('gradio') is None:
        raise UserError('The page needs a package that is not installed: pip install gradio')
    silence_opencv()
    os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'
    with (
        ended_by_sigterm(),
        listen(host, port) as listening,
        tempfile.TemporaryDirectory(prefix='recnext-web-demo-') as folder,
    ):
        os.environ['GRADIO_TEMP_DIR'] = folder  # it makes folders in it and writes nothing
        model = load_deployed(config, checkpoint, device, deployment, cfg_options)
        demo = Demo(model, images, max_upload * 10**6, max_pixels * 10**6)
        serve_page(
            build_page(demo),
            listening,
            int(demo.max_upload * BASE64) + 10**4,
            lambda: print(f'Open {address_of(listening)} in a browser. Ctrl-C stops.', flush=True),
            theme=_theme(),
            css=PAGE_CSS,
        )


class Demo:
    """Answers to the page, one at a time.

    Args:
        model: What predicts.
        images: To choose from.
        max_upload: Bytes of the largest file that is taken.
        max_pixels: Of the largest image that is taken.

    Raises:
        ImageError: one of the images cannot be read.
    """

    def __init__(self, model: Model, images: Sequence[str | Path], max_upload: int, max_pixels: int) -> None:
        self.model = model
        self.images = [Path(image) for image in images]
        self.max_upload = max_upload
        self.max_pixels = max_pixels
        self.thumbnails = [_thumbnail(read_image(path)) for path in self.images]
        network = model.network
        self.device = next(network.parameters()).device
        self.stopwatch = Stopwatch(self.device)
        network.forward_logits = self.stopwatch.timed('network', network.forward_logits)

    def answer(self, question: object) -> dict:
        """Predict what the page, or whoever claims to be it, asks for.

        Args:
            question: ``number``, which comes back, and ``choice``, the place of one of the images, or ``name`` and
                ``content`` of a file, in base64.

        Returns:
            What the page shows; with an ``error`` instead if it cannot be predicted.
        """
        question = question if isinstance(question, dict) else {}
        answer = dict(number=question.get('number'))
        try:
            return answer | self._predict(*self._find(question))
        except ImageError as error:
            return answer | dict(error=str(error))
        except MemoryError:
            return answer | dict(error='The server has too little memory for this image.')

    def _find(self, question: dict) -> tuple[str, Path | bytes]:
        """Name of the image in question, and where or what it is."""
        choice, name, content = (question.get(key) for key in ('choice', 'name', 'content'))
        if isinstance(choice, int) and 0 <= choice < len(self.images):
            return self.images[choice].name, self.images[choice]
        if not isinstance(name, str) or not isinstance(content, str):
            raise ImageError('No image arrived.')
        name = Path(name).name[:100] or 'image'
        try:
            content = base64.b64decode(content, validate=True)
        except binascii.Error:
            raise ImageError(f'{name} did not arrive whole.') from None
        check_size(name, content, self.max_upload, self.max_pixels)
        return name, content

    def _predict(self, name: str, source: Path | bytes) -> dict:
        moments = [perf_counter()]
        pixels = read_image(source, name)
        moments.append(perf_counter())
        prepared = self.model.prepare(pixels)
        moments.append(perf_counter())
        self.stopwatch.read()
        (prediction,) = self.model.predict([prepared])
        moments.append(perf_counter())
        read, prepare, predict = np.diff(moments)
        network = self.stopwatch.read().get('network', 0)
        seconds = dict(read=read, prepare=prepare, network=network, labels=predict - network)
        image, labels = shrink(prediction.image, prediction.labels, SHOWN_SIDE)
        height, width = prediction.labels.shape
        return dict(
            name=name,
            width=width,
            height=height,
            shown=[labels.shape[1], labels.shape[0]],
            image=_jpeg(image),
            labels=_base64(zlib.compress(labels.astype('<u2').tobytes())),
            mask=_base64(prediction.labels_png()),
            areas=[
                dict(
                    label=area.label,
                    name=area.name,
                    colour=prediction.palette[area.label].tolist(),
                    share=area.share,
                    percent=format_share(area.share),
                )
                for area in prediction.areas
            ],
            milliseconds={stage: round(1e3 * float(second), 1) for stage, second in seconds.items()},
        )


def build_page(demo: Demo) -> 'gradio.Blocks':
    """The page: one component, which the browser runs, and one function behind it."""
    import gradio

    provenance = demo.model.provenance
    limits = f'at most {demo.max_upload / 1e6:.0f} MB and {demo.max_pixels / 1e6:.0f} million pixels; nothing is kept'
    with gradio.Blocks(analytics_enabled=False, title='RecNeXt', fill_width=True) as page:
        viewer = gradio.HTML(
            html_template=(SOURCE / 'page.html').read_text(encoding='utf-8'),
            css_template=(SOURCE / 'page.css').read_text(encoding='utf-8'),
            js_on_load='\n'.join((SOURCE / name).read_text(encoding='utf-8') for name in ('viewer.js', 'demo.js')),
            apply_default_css=False,
            max_upload=demo.max_upload,
            model=f'{provenance["model"]} · {provenance["checkpoint"]} · {demo.device}',
            limits=limits,
            opacity=OPACITY,
            choices=[dict(name=path.name, image=image) for path, image in zip(demo.images, demo.thumbnails)],
        )

        def predict(event: gradio.EventData) -> dict:
            return demo.answer(event._data)

        viewer.ask(predict, outputs=viewer, trigger_mode='always_last', concurrency_limit=1, api_visibility='private')
    return page


def _theme() -> 'gradio.themes.Base':
    """Without a font from the internet."""
    import gradio

    return gradio.themes.Default(font=('system-ui', 'sans-serif'), font_mono=('monospace',))


def _jpeg(image: np.ndarray) -> str:
    """Return a picture, (H, W, 3), RGB, as an address for the browser."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(file, 'JPEG', quality=90)
    return f'data:image/jpeg;base64,{_base64(file.getvalue())}'


def _thumbnail(image: np.ndarray) -> str:
    return _jpeg(shrink(image, image[..., 0], THUMBNAIL_SIDE)[0])


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
