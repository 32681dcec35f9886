"""ONNX: files for onnxruntime, which also runs them to verify them."""

import importlib.util
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..openmmlab.config import named_classes
from ..runtimes.calibration import Calibration
from ..runtimes.capture import STRIDE, any_size, capture
from ..runtimes.onnx import open_session, to_onnx
from ..utils.errors import UserError
from .backend import ExportOptions, OfPrecision, SavedModel
from .capture import ExportedSegmentor, Wrapper
from .latency import compare_latency
from .onnx_rounding import halve_weights, quantize
from .sizes import ImageSizes, check_sizes
from .source import Source

if TYPE_CHECKING:
    from onnx import ModelProto

PACKAGES = ('onnx', 'onnxscript', 'onnxruntime')

STORED = dict(fp32='fp32', fp16='weights fp16, computed in fp32', int8='int8 (QDQ), weights a scale a channel')


class OnnxModel(NamedTuple):
    """A model in memory."""

    proto: 'ModelProto'

    def save(self, path: str) -> None:
        import onnx

        onnx.save(self.proto, path)


@dataclass(frozen=True)
class OnnxBackend(OfPrecision):
    """One ``.onnx`` file: batches of images of any size, or single images of one.

    Args:
        precision: ``'fp32'``; ``'fp16'``, of the weights alone; or ``'int8'``, calibrated.
    """

    precision: str = 'fp32'

    suffix = '.onnx'
    single = False

    @property
    def stored(self) -> str:
        return STORED[self.precision]

    def check(self, options: ExportOptions) -> None:
        missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            raise UserError(f'ONNX needs packages that are not installed: pip install {" ".join(missing)}')
        if options.size and len(options.size) > 1:
            raise UserError('A file has one fixed size, or any if none is given; found several.')

    def choose_sizes(self, asked: Sequence[tuple[int, int]], source: Source) -> ImageSizes:
        height, width = size = asked[0] if asked else source.crop_size
        check_sizes([size])
        if asked:
            return ImageSizes([size])
        # The second shows whether something of the first stayed in a graph that should take any.
        return ImageSizes([size, (height - STRIDE, width + STRIDE)], free=True)

    def convert(
        self, wrapper: Wrapper, sizes: ImageSizes, source: Source, calibration: Calibration | None = None
    ) -> OnnxModel:
        program = capture(wrapper, sizes.sizes[0], any_size() if sizes.free else None)
        converted = to_onnx(program, wrapper.names)
        said = converted.model.metadata_props
        said.update(source.origin())
        if isinstance(wrapper, ExportedSegmentor):
            classes, palette = named_classes(source.cfg)
            said.update(classes=json.dumps(classes), palette=json.dumps(palette))
        proto = converted.model_proto
        if self.precision == 'fp16':
            halve_weights(proto)
        if calibration is not None:
            proto = quantize(proto, calibration)
        return OnnxModel(proto)

    def read(self, path: Path) -> SavedModel:
        import onnx

        onnx.checker.check_model(str(path), full_check=True)
        model = onnx.load(str(path))
        kinds = Counter(node.op_type for node in model.graph.node)
        return SavedModel(open_session(path), kinds, f'ONNX opset {model.opset_import[0].version}')

    def measure(self, path: Path, saved: SavedModel, wrapper: Wrapper, size: tuple[int, int]) -> str:
        return compare_latency('onnxruntime', saved.predict, wrapper, size)

    def next_step(self, path: Path) -> str:
        return f"onnxruntime.InferenceSession('{path}').run(None, {{'image': pixels}})"
