"""ExecuTorch: files for Android and whatever else its runtime is built for; it also runs them here to verify them."""

import contextlib
import importlib.util
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.export import ExportedProgram

from ..models.folding import FoldedLevel
from ..runtimes.calibration import Calibration
from ..runtimes.capture import capture, modules_of
from ..utils.errors import UserError
from .backend import ExportOptions, OfOneSize, SavedModel
from .capture import ArgmaxOverLast, Wrapper
from .latency import compare_latency
from .sizes import ImageSizes
from .source import Source
from .verification import Model

if TYPE_CHECKING:
    from executorch.exir import ExecutorchProgramManager
    from executorch.exir.schema import ExecutionPlan
    from executorch.runtime import Program

DELEGATE = 'XNNPACK'

STORED = dict(fp32='fp32', int8='int8 where XNNPACK has it, weights a scale a channel')

KERNEL = 'native_call_'
"""How the runtime's own profiler calls what it computes itself."""

FOLDED = (
    'ExecuTorch runs no folded Semantic FPN in 8 bits: it turns the lines of the border, cut out of quantised maps, '
    'the wrong way round. Add --fuse norms.'
)
"""Its pass ``ChannelsLastTaggedReshapePass`` gives a map that leaves a piece of XNNPACK in the order of rows to the
slices inside the piece as well, which expect channels last. The runtime stops with error 0x10, of a shape.
"""


class ExecutorchModel(NamedTuple):
    """A program in memory."""

    program: 'ExecutorchProgramManager'

    def save(self, path: str) -> None:
        with open(path, 'wb') as file:
            self.program.write_to_file(file)


@dataclass(frozen=True)
class ExecutorchBackend(OfOneSize):
    """One ``.pte`` file for single images of one size, computed by XNNPACK on the processor.

    What it says of itself is the string that its method ``metadata`` gives: JSON.

    Args:
        precision: ``'fp32'``, or ``'int8'``, which is calibrated. In 16 bits XNNPACK takes no GELU, which is in every
            block.
    """

    precision: str = 'fp32'

    suffix = '.pte'

    @property
    def stored(self) -> str:
        return STORED[self.precision]

    def check(self, options: ExportOptions) -> None:
        if importlib.util.find_spec('executorch') is None:
            raise UserError('ExecuTorch is not installed: pip install "executorch>=1.5.1"')
        super().check(options)

    def convert(
        self, wrapper: Wrapper, sizes: ImageSizes, source: Source, calibration: Calibration | None = None
    ) -> ExecutorchModel:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

        if calibration is not None and any(isinstance(module, FoldedLevel) for module in wrapper.modules()):
            raise UserError(FOLDED)
        with ArgmaxOverLast():
            program = capture(wrapper, sizes.sizes[0])
        if calibration is not None:
            program = quantize(program, calibration)
        said = json.dumps(source.describe(wrapper, sizes.sizes[0]), ensure_ascii=False)
        with _shared_histories():
            lowered = to_edge_transform_and_lower(
                program,
                partitioner=[XnnpackPartitioner()],
                constant_methods=dict(metadata=said),
                # Checked after every pass, it takes longer than all the passes.
                compile_config=EdgeCompileConfig(_check_ir_validity=False),
            )
            return ExecutorchModel(lowered.to_executorch())

    def read(self, path: Path) -> SavedModel:
        import executorch.version

        return SavedModel(open_program(path), count_operations(path), f'ExecuTorch {executorch.version.__version__}')

    def measure(self, path: Path, saved: SavedModel, wrapper: Wrapper, size: tuple[int, int]) -> str:
        shares = ', '.join(f'{100 * share:.1f} % {kind}' for kind, share in time_outside(path, size).most_common())
        latency = compare_latency('ExecuTorch', saved.predict, wrapper, size)
        return f'{latency}; outside {DELEGATE}: {shares or "nothing"}'

    def next_step(self, path: Path) -> str:
        return 'examples/android shows it on a phone; docs/android.md'


def open_program(path: Path) -> Model:
    """A saved file in ExecuTorch's runtime, with as many threads as PyTorch has."""
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    portable_lib._unsafe_reset_threadpool(torch.get_num_threads())
    program = Runtime.get().load_program(path)
    names = read_metadata(program)['outputs']
    size = tuple(program.metadata('forward').input_tensor_meta(0).sizes())

    def predict(image: np.ndarray) -> dict[str, np.ndarray]:
        if image.shape != size:
            raise UserError(f'The file takes images {size}; found {tuple(image.shape)}.')
        # The runtime reads the memory as it lies, whatever the strides say: channels-last values in a wrong order.
        tensor = torch.from_numpy(np.array(image, np.float32, order='C'))
        try:
            outputs = program.load_method('forward').execute((tensor,))
        except RuntimeError as error:
            raise UserError(f"ExecuTorch's own runtime does not execute the file: {error}.") from error
        return {name: out.numpy() for name, out in zip(names, outputs)}

    return predict


def read_metadata(program: 'Program') -> dict:
    """What a program says of itself: see :meth:`.Source.describe`."""
    return json.loads(program.load_method('metadata').execute(())[0])


def read_plan(path: Path) -> 'ExecutionPlan':
    """What the method ``forward`` of a file does, step by step."""
    from executorch.exir._serialize._program import deserialize_pte_binary

    plans = deserialize_pte_binary(path.read_bytes()).program.execution_plan
    return next(plan for plan in plans if plan.name == 'forward')


def count_operations(path: Path) -> Counter[str]:
    """The calls of XNNPACK in a file, and the operations that are left to ExecuTorch's portable ones, by kind."""
    from executorch.exir.schema import DelegateCall, KernelCall

    plan = read_plan(path)
    found: Counter[str] = Counter()
    for chain in plan.chains:
        for instruction in chain.instructions:
            call = instruction.instr_args
            if isinstance(call, DelegateCall):
                found[DELEGATE] += 1
            elif isinstance(call, KernelCall):
                found[plan.operators[call.op_index].name] += 1
    return found


def time_outside(path: Path, size: tuple[int, int]) -> Counter[str]:
    """Shares of the time for an image (height, width) that operations take which XNNPACK does not, by kind."""
    from executorch.devtools import Inspector
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(path, enable_etdump=True)
    program.load_method('forward').execute((torch.zeros(1, 3, *size),))
    with tempfile.TemporaryDirectory() as folder:
        dump = Path(folder) / 'etdump'
        program.write_etdump_result_to_file(str(dump), str(dump.with_suffix('.buffer')))
        blocks = Inspector(etdump_path=str(dump)).event_blocks
    times: Counter[str] = Counter()
    for event in (event for block in blocks if block.name == 'Execute' for event in block.events):
        times[event.name] += event.perf_data.avg
    total = times['Method::execute']
    kernels = {name: time for name, time in times.items() if name.startswith(KERNEL)}
    return Counter({name.removeprefix(KERNEL): time / total for name, time in kernels.items()})


def quantize(program: ExportedProgram, calibration: Calibration) -> ExportedProgram:
    """Weights and maps in 8 bits, weights a scale a channel, maps in the ranges that they have on images."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    quantizer.set_filter_function(lambda node: not any(map(calibration.keeps, modules_of(node))))
    prepared = prepare_pt2e(program.module(), quantizer)
    for image in calibration:
        prepared(torch.from_numpy(image))
    return torch.export.export(convert_pt2e(prepared), program.example_inputs[0])


@contextlib.contextmanager
def _shared_histories() -> Iterator[None]:
    """Operations that are copied share what says where they come from.

    Every pass adds to it and copies all of it for every operation: with the hundreds of passes of ExecuTorch that takes
    minutes.
    """
    from torch.fx.traceback import NodeSource

    NodeSource.__deepcopy__ = lambda self, memo: self
    try:
        yield
    finally:
        del NodeSource.__deepcopy__
