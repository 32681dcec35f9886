"""Predictions over HTTP, for other programs: what waits is predicted together, and what is too much is sent away."""

import asyncio
import contextlib
import importlib.util
import json
import logging
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from ..predict.model import Model, PreparedImage, load_deployed
from ..predict.prediction import Prediction
from ..runtimes.deployment import DEFAULT, Deployment
from ..utils.devices import AUTO
from ..utils.errors import UserError
from ..utils.images import ImageError, silence_opencv
from .server import PATIENCE, RETRY_AFTER, Guard, TooLarge, address_of, check_size, ended_by_sigterm, listen, serve_app

if TYPE_CHECKING:
    import fastapi
    from starlette.requests import Request

MODULES = dict(
    fastapi='fastapi', uvicorn='uvicorn', python_multipart='python-multipart', prometheus_client='prometheus-client'
)
"""What it takes, and how that is installed."""

OUTPUTS = dict(labels='image/png', areas='application/json', overlay='image/jpeg')
"""What can be asked for, and its type."""

KNOWN = dict(POST=('/predict',), GET=('/health', '/metrics', '/openapi.json', '/docs'))
KNOWN['HEAD'] = KNOWN['GET']

HEADERS = {'x-content-type-options': 'nosniff', 'cache-control': 'no-store'}

MULTIPART = 10**4
"""Bytes of a body around the image in it."""

THREADS = 4
"""That decode images, and encode answers."""


class Batcher:
    """Predicts one batch at a time: whatever waits when the network is free, up to a number.

    Args:
        model: What predicts.
        most: Images of a batch.
    """

    def __init__(self, model: Model, most: int) -> None:
        self.model = model
        self.most = most
        self.waiting: asyncio.Queue[tuple[PreparedImage, asyncio.Future]] = asyncio.Queue()
        self.network = ThreadPoolExecutor(1)
        self.sizes: list[int] = []
        """Of the batches that nobody has counted yet."""

    async def predict(self, prepared: PreparedImage) -> Prediction:
        """Predict an image, when its turn comes.

        Raises:
            ImageError: it cannot be, alone either.
        """
        answer = asyncio.get_running_loop().create_future()
        self.waiting.put_nowait((prepared, answer))
        return await answer

    async def run(self) -> None:
        """Predict, until cancelled."""
        while True:
            batch = [await self.waiting.get()]
            while len(batch) < self.most and not self.waiting.empty():
                batch.append(self.waiting.get_nowait())
            self.sizes.append(len(batch))
            await self._predict(batch)

    async def _predict(self, batch: list[tuple[PreparedImage, asyncio.Future]]) -> None:
        images = [prepared for prepared, _ in batch]
        try:
            found = await asyncio.get_running_loop().run_in_executor(self.network, self.model.predict, images)
        except Exception as error:
            if len(batch) > 1:  # together they are too large, or one spoils it for the others
                for one in batch:
                    await self._predict([one])
            elif not batch[0][1].done():
                batch[0][1].set_exception(error)
        else:
            for (_, answer), prediction in zip(batch, found):
                if not answer.done():  # who has gone has cancelled it
                    answer.set_result(prediction)


def serve(
    config: str,
    checkpoint: str,
    host: str = '127.0.0.1',
    port: int = 8000,
    max_upload: int = 32,
    max_pixels: int = 64,
    batch_size: int = 8,
    queue: int = 64,
    deployment: Deployment = DEFAULT,
    device: str = AUTO,
    cfg_options: dict | None = None,
) -> None:
    """Serve until Ctrl-C or SIGTERM, and answer what was taken by then; see ``recnext serve --help``.

    Args:
        config: Path of the config, or the name of a release.
        checkpoint: Path or address of the weights, of mmseg 1.x or 0.x.
        host: Address to listen on.
        port: 0 means any that is free.
        max_upload: Largest file that is taken, in MB.
        max_pixels: Largest image that is taken, in millions of pixels.
        batch_size: Images that are predicted together, at most.
        queue: Requests that are taken at once.
        deployment: The form in which the network is run.
        device: See :func:`device.find_device`.
        cfg_options: Merged into the config.

    Raises:
        UserError: a package is missing, the port is taken, or something does not fit.
    """
    missing = [package for module, package in MODULES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f'Serving needs packages that are not installed: pip install {" ".join(missing)}')
    silence_opencv()
    # It says of bodies that are wrong what the answer says already.
    logging.getLogger('python_multipart').addHandler(logging.NullHandler())
    with ended_by_sigterm(), listen(host, port) as listening:
        model = load_deployed(config, checkpoint, device, deployment, cfg_options)
        app = build_app(model, max_upload * 10**6, max_pixels * 10**6, batch_size, queue)
        serve_app(
            Guard(app, max_upload * 10**6 + MULTIPART, lambda method, path: path in KNOWN.get(method, ()), HEADERS),
            listening,
            lambda: print(f'Serving at {address_of(listening)}. SIGTERM or Ctrl-C stops.', flush=True),
            patience=PATIENCE,
        )


def build_app(model: Model, max_upload: int, max_pixels: int, batch_size: int, queue: int) -> 'fastapi.FastAPI':
    """The service, as an ASGI app; behind a :class:`server.Guard`, which bounds what arrives.

    Args:
        model: What predicts.
        max_upload: Bytes of the largest file that is taken.
        max_pixels: Of the largest image that is taken.
        batch_size: Images that are predicted together, at most.
        queue: Requests that are taken at once.
    """
    import fastapi
    import prometheus_client as prometheus
    from fastapi.responses import JSONResponse, Response

    batcher, helpers = Batcher(model, batch_size), ThreadPoolExecutor(THREADS)
    registry = prometheus.CollectorRegistry()
    requests = prometheus.Counter('recnext_requests', 'Requests that were answered', ['status'], registry=registry)
    seconds = prometheus.Histogram('recnext_request_seconds', 'From the whole request to its answer', registry=registry)
    batches = prometheus.Histogram(
        'recnext_batch_images', 'Images predicted together', buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry
    )
    taken = prometheus.Gauge('recnext_requests_taken', 'Requests that wait or are worked on', registry=registry)
    held = 0

    @contextlib.asynccontextmanager
    async def life(app: fastapi.FastAPI) -> AsyncIterator[None]:
        work = asyncio.create_task(batcher.run())
        yield
        work.cancel()
        helpers.shutdown()
        batcher.network.shutdown()

    app = fastapi.FastAPI(title='RecNeXt', description='Semantic segmentation.', lifespan=life, redoc_url=None)

    async def answer(request: 'Request', output: str | None) -> Response:
        wanted = choose_output(output, request.headers.get('accept', ''))
        name, content = await read_image_of(request, max_upload)
        check_size(name, content, max_upload, max_pixels)
        loop = asyncio.get_running_loop()
        prepared = await loop.run_in_executor(helpers, model.prepare, content, name)
        prediction = await batcher.predict(prepared)
        encoded = await loop.run_in_executor(helpers, encode, prediction, wanted)
        return Response(encoded, media_type=OUTPUTS[wanted])

    @app.post(
        '/predict',
        response_class=Response,
        summary='Predict an image',
        description='The image is the body, or the one file of a form. The answer is what `output` says, or `Accept`.',
        openapi_extra=dict(requestBody=_describe_body()),
        responses=_describe_answers(),
    )
    async def predict(request: fastapi.Request, output: str | None = None) -> Response:
        nonlocal held
        if held >= queue:
            requests.labels(503).inc()
            detail = f'{queue} requests are waiting already; try again in a moment.'
            return JSONResponse(dict(detail=detail), 503, headers={'Retry-After': str(RETRY_AFTER)})
        held += 1
        taken.set(held)
        began = time.perf_counter()
        try:
            response = await answer(request, output)
        except fastapi.HTTPException as error:
            response = JSONResponse(dict(detail=error.detail), error.status_code)
        except ImageError as error:
            response = JSONResponse(dict(detail=str(error)), 413 if isinstance(error, TooLarge) else 422)
        except MemoryError:
            response = JSONResponse(dict(detail='The server has too little memory for this image.'), 507)
        finally:
            held -= 1
            taken.set(held)
        requests.labels(response.status_code).inc()
        seconds.observe(time.perf_counter() - began)
        return response

    @app.get('/health', summary='Whether it answers')
    def health() -> dict:
        return dict(status='ok', model=model.provenance['model'], checkpoint=model.provenance['checkpoint'])

    @app.get('/metrics', response_class=Response, summary='For Prometheus')
    async def metrics() -> Response:
        sizes, batcher.sizes = batcher.sizes, []
        for size in sizes:
            batches.observe(size)
        return Response(prometheus.generate_latest(registry), media_type=prometheus.CONTENT_TYPE_LATEST)

    return app


def choose_output(output: str | None, accept: str) -> str:
    """One of :data:`OUTPUTS`: what is named, or the first that the header takes.

    Raises:
        fastapi.HTTPException: there is no such output.
    """
    import fastapi

    if output is not None:
        if output not in OUTPUTS:
            raise fastapi.HTTPException(400, f'output is {output[:50]!r}; expected one of {", ".join(OUTPUTS)}.')
        return output
    types = [part.partition(';')[0].strip() for part in accept.split(',')]
    for one in types:
        for name, kind in OUTPUTS.items():
            if one in (kind, kind.partition('/')[0] + '/*', '*/*', ''):
                return name
    raise fastapi.HTTPException(406, f'Accept names none of {", ".join(OUTPUTS.values())}.')


async def read_image_of(request: 'Request', most: int) -> tuple[str, bytes]:
    """Name and content of the image: the body, or the one file in a form. It stays in memory.

    Raises:
        fastapi.HTTPException: the form has no file, or several, or is none.
    """
    import fastapi
    from starlette.datastructures import UploadFile
    from starlette.formparsers import MultiPartException, MultiPartParser

    if not request.headers.get('content-type', '').lower().startswith('multipart/form-data'):
        return 'The image', await request.body()
    parser = MultiPartParser(request.headers, request.stream(), max_files=1, max_fields=8)
    parser.spool_max_size = most + MULTIPART  # beyond it, it would write to the disk
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError) as error:
        reason = getattr(error, 'message', 'no boundary')
        raise fastapi.HTTPException(400, f'The form cannot be read: {reason}') from None
    files = [value for value in form.values() if isinstance(value, UploadFile)]
    if not files:
        raise fastapi.HTTPException(400, 'The form has no file; expected one, as in curl -F image=@photo.jpg.')
    return (files[0].filename or 'The image')[:100], await files[0].read()


def encode(prediction: Prediction, output: str) -> bytes:
    """What :class:`.Outputs` would write, byte for byte; of the areas, without the name of the input."""
    if output == 'areas':
        return json.dumps(prediction.to_dict(), indent=1).encode()
    return prediction.labels_png() if output == 'labels' else prediction.overlay_jpeg()


def _describe_body() -> dict:
    binary = dict(type='string', format='binary')
    form = dict(schema=dict(type='object', properties=dict(image=binary), required=['image']))
    return dict(required=True, content={'image/*': dict(schema=binary), 'multipart/form-data': form})


def _describe_answers() -> dict:
    return {
        200: dict(description='What was asked for', content={kind: {} for kind in OUTPUTS.values()}),
        400: dict(description='The request is wrong'),
        406: dict(description='Accept names nothing that there is'),
        413: dict(description='The image is too large'),
        422: dict(description='It is no image that can be predicted'),
        503: dict(description='Too much to do; Retry-After says when to come again'),
    }
