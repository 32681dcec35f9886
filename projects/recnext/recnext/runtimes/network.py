"""A network that runs in an engine: converted when the first images come, read from the cache from then on."""

import importlib.util
import logging
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..utils.errors import UserError, first_line
from ..utils.paths import ENGINES as FOLDER
from .cache import Entry
from .calibration import Calibration
from .capture import LEAST, STRIDE, any_size, capture
from .engine import Engine, Network
from .identity import digest, identify, identify_images, version_of
from .inductor import InductorEngine
from .onnx import OnnxRuntimeEngine
from .openvino import OpenVinoEngine

logger = logging.getLogger(__name__)

ENGINES: dict[str, Engine] = dict(compile=InductorEngine(), openvino=OpenVinoEngine(), onnxruntime=OnnxRuntimeEngine())
"""By the words that the tools use. PyTorch itself needs no conversion."""

LARGEST_ERROR = dict(fp32=1e-4, bf16=0.1, int8=0.5)
"""Of a logit against PyTorch's, relative to the largest one. A converted network that is further off is refused."""

LEAST_AGREEMENT = dict(int8=0.95)
"""Share of the places of a map of logits in which the largest must be that of the same class."""

MOST_SIZES = 8
"""Graphs of one size each that are made for a network that cannot be captured for all at once."""

ANY = ()
Shape = tuple[int, ...]
"""Of the images (N, 3, H, W) that a graph takes; :data:`ANY`: any number, of any size that is a multiple of 32."""

TINY = 1e-30


def check_engine(name: str, precision: str) -> None:
    """Make sure that an engine is here and computes in a precision.

    Raises:
        UserError: it does not, or its packages are not installed.
    """
    engine = ENGINES[name]
    if precision not in engine.precisions:
        raise UserError(f'The engine {name} computes in {" or ".join(engine.precisions)}; found precision {precision}.')
    missing = [package for package in engine.packages_for(precision) if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(
            f'The engine {name} needs packages that are not installed: pip install {" ".join(missing)}\n'
            f"  They are this project's extra [{engine.extra}]. --engine torch needs nothing more."
        )
    engine.check(precision)


class ConvertedNetwork:
    """Images (N, 3, H, W) to logits, as ``module`` computes them, in another engine on the processor.

    One graph takes images of any size that is a multiple of 32, as the released configs make them. Where a network
    cannot be captured like that, or the images are others, each size has a graph of its own, up to
    :data:`MOST_SIZES`; the sizes after those run in PyTorch.

    What is converted is compared with PyTorch on the images that are at hand, and then kept on disk: see
    :mod:`.cache`. The first images of every shape are compared again, as a graph may hold a number of those that it
    was captured with. Several threads may call it, and wait for each other.

    Args:
        module: In eval mode, on the CPU, in the form that is to be converted.
        name: Of the engine, one of :data:`ENGINES`.
        precision: Of weights and activations.
        calibration: For ``'int8'``.
        folder: Of the cache; by default :data:`.paths.ENGINES`.

    Raises:
        UserError: see :func:`check_engine`; when it is called, that the engine fails to convert the network, or that
            the result is not what PyTorch computes.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        precision: str,
        calibration: Calibration | None = None,
        folder: Path | None = None,
    ) -> None:
        check_engine(name, precision)
        self.calibration = calibration
        self.module, self.name, self.precision, self.folder = module, name, precision, folder or FOLDER
        self.engine = ENGINES[name]
        packages = version_of(*self.engine.packages_for(precision))
        more = {} if calibration is None else dict(calibration=identify_images(calibration))
        self.made_of = identify(module, engine=name, precision=precision, packages=packages, **more)
        self._graphs: dict[Shape, Network] = {}
        self._chosen: dict[Shape, Network] = {}
        self._takes_any = True
        self._lock = threading.Lock()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        if self.calibration and len(images) > 1:
            # On several at once NNCF measures worse ranges: a graph of one size is for a single image.
            return torch.cat([self(image) for image in images.split(1)])
        shape = tuple(images.shape)
        with self._lock:
            if shape not in self._chosen:
                self._chosen[shape] = self._choose(images)
            return self._chosen[shape](images)

    def _choose(self, images: Tensor) -> Network:
        """What runs images of this shape: a graph that gives PyTorch's logits for them."""
        for kind in self._kinds(images):
            if kind != ANY and len(self._graphs) - (ANY in self._graphs) >= MOST_SIZES:
                if self.module not in self._chosen.values():
                    logger.info(f'{self.name} has graphs for {MOST_SIZES} sizes; others run in PyTorch.')
                return self.module
            try:
                self._graphs[kind] = self._get(kind, images)
                return self._graphs[kind]
            except Exception as error:  # whatever torch.export or an engine raises
                if kind == ANY and not (isinstance(error, UserError) and self.calibration):
                    self._takes_any = False
                    logger.info(f'No graph for all sizes of images: {first_line(error)}')
                elif isinstance(error, UserError):
                    raise
                else:
                    raise UserError(
                        f'The engine {self.name} cannot convert this network: {type(error).__name__}: '
                        f'{first_line(error)}\n  --engine torch runs it as it is.'
                    ) from error
        raise AssertionError('the last kind returns or raises')

    def _kinds(self, images: Tensor) -> list[Shape]:
        """The graphs that could take these images: what is there before what would have to be made."""
        fits_any = self._takes_any and all(side % STRIDE == 0 and side >= LEAST for side in images.shape[2:])
        kinds = [*([ANY] if fits_any else []), tuple(images.shape)]
        return sorted(kinds, key=lambda kind: kind not in self._graphs and not self._entry(kind).is_whole())

    def _get(self, kind: Shape, images: Tensor) -> Network:
        """A graph, from memory or from disk or made, that was compared with PyTorch on these images."""
        if kind in self._graphs:
            self._verify(self._graphs[kind], images)
            return self._graphs[kind]
        entry = self._entry(kind)
        with entry.alone():
            if entry.is_whole():
                try:
                    network = self.engine.open(entry.folder, self.precision)
                    self._verify(network, images)
                    entry.note_use()
                    return network
                except Exception as error:  # as above
                    logger.info(f'What was kept for {self.name} is of no use: {first_line(error)}')
            return self._make(kind, entry, images)

    def _entry(self, shape: Shape) -> Entry:
        made_of = dict(self.made_of, images=str(shape))
        return Entry(self.folder / digest(made_of), made_of)

    def _make(self, shape: Shape, entry: Entry, images: Tensor) -> Network:
        logger.info(f'Converting the network for {self.name}, which is done once.')
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
            folder = Path(name)
            size = tuple(images.shape[2:])
            program = capture(self.module, size, any_size() if shape == ANY else None, len(images))
            calibration = self.calibration
            if calibration is not None and shape != ANY:
                calibration = replace(calibration, load=lambda image: _fit(self.calibration.load(image), shape))
            self.engine.convert(program, folder, calibration)
            network = self.engine.open(folder, self.precision)
            self._verify(network, images)
            entry.keep(folder)
        return network

    def _verify(self, network: Network, images: Tensor) -> None:
        """Make sure that logits are PyTorch's, as closely as the precision allows.

        Raises:
            UserError: they are not.
        """
        expected, found = self.module(images), network(images)
        error = float('inf')
        if found.shape == expected.shape and found.isfinite().all():
            error = float((found - expected).abs().max() / expected.abs().max().clamp(min=TINY))
        if not error <= LARGEST_ERROR[self.precision]:
            raise UserError(
                f'{self.name} gives other logits than PyTorch: they differ by {error:.1e} of the largest, on images of '
                f'{images.shape[2]} × {images.shape[3]}; expected at most {LARGEST_ERROR[self.precision]:g} in '
                f'{self.precision}. Nothing was kept. Use --engine torch.'
            )
        least, equal = LEAST_AGREEMENT.get(self.precision, 0), 1.0
        if found.dim() == 4:
            equal = float((found.argmax(1) == expected.argmax(1)).double().mean())
        if equal < least:
            raise UserError(
                f'{self.name} in {self.precision} has the same class as PyTorch in {equal:.1%} of the places of the '
                f'logits; expected at least {least:.0%}. Nothing was kept.\n'
                '  Calibrate with more images of your own, or leave some modules in floating point: --keep-float'
            )


def _fit(images: np.ndarray, shape: Shape) -> np.ndarray:
    """An image (1, 3, H, W) in the one shape that a graph takes."""
    resized = F.interpolate(torch.from_numpy(images), size=shape[2:], mode='bilinear')
    return resized.numpy()
