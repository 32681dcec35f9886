"""What OpenMMLab needs to run on a current stack; every change to a foreign library is in :data:`PATCHES`.

``tests/stack/test_compat.py`` tests each, and that importing this package changes nothing else.
"""

import contextlib
import importlib
import importlib.util
import logging
import sys
import warnings
from collections.abc import Iterator
from importlib import metadata
from types import ModuleType
from typing import NoReturn

import torch

PATCHES = {
    'stub of mmcv.ops': 'mmsegmentation 1.0 to 1.2 cannot be imported with mmcv-lite: some of its modules import '
    '``mmcv.ops`` unguarded. The stub is there while mmseg is imported, and gone afterwards.',
    'safe globals': 'torch >= 2.6 refuses to read back the log of scalars that mmengine writes into its checkpoints: '
    'its few harmless types are allowed for the whole process, so that mmseg and its inferencer read them as well.',
    'any visualizer': "mmsegmentation 1.0's hook asks for the one SegLocalVisualizer and stops a run with another.",
    'device of a run': 'mmengine chooses a device at import; while a Runner is built and runs it is told ours.',
}
"""Each change, and why it is made."""

MMCV_OPS = 'mmcv.ops'
MMSEG = ('apis', 'datasets', 'engine', 'evaluation', 'models', 'visualization')
"""Packages of mmseg that register what configs name."""


def import_mmseg() -> None:
    """Import what of mmseg registers, with a stub of ``mmcv.ops`` where it needs one, and make the other patches."""
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Fail to import ``MultiScaleDeformableAttention``')
        importlib.import_module('mmcv.cnn.bricks.transformer')
    with _stub_of_mmcv_ops():
        for name in MMSEG:
            importlib.import_module(f'mmseg.{name}')
    _allow_logged_scalars()
    _draw_with_any_visualizer()


@contextlib.contextmanager
def _stub_of_mmcv_ops() -> Iterator[None]:
    """Let mmsegmentation 1.0 to 1.2 be imported with mmcv-lite.

    What they import from the stub raises a clear error when it is used; RecNeXt uses none of it. The maintained fork
    guards its imports and needs no stub.
    """
    if importlib.util.find_spec('mmcv._ext') or MMCV_OPS in sys.modules or not _is_installed('mmsegmentation'):
        yield
        return
    sys.modules[MMCV_OPS] = _MmcvOps(MMCV_OPS, 'Stub of the operations of a compiled mmcv.')
    try:
        yield
    finally:
        del sys.modules[MMCV_OPS]


def _is_installed(distribution: str) -> bool:
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


class _MmcvOps(ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith('__'):
            raise AttributeError(name)
        return type(name, (), {'__init__': _not_compiled, '__doc__': 'Needs a compiled mmcv.'})


def _not_compiled(self: object, *_: object, **__: object) -> NoReturn:
    raise RuntimeError(
        f'mmcv.ops.{type(self).__name__} needs a compiled mmcv, and mmcv-lite is installed. '
        'Install mmcv 2.1 in its place; RecNeXt itself needs no compiled operation.'
    )


def _allow_logged_scalars() -> None:
    from mmengine.logging import HistoryBuffer

    from ..checkpoints.files import logged_scalars

    torch.serialization.add_safe_globals(logged_scalars(HistoryBuffer))


def _draw_with_any_visualizer() -> None:
    from mmengine.visualization import Visualizer
    from mmseg.engine.hooks import visualization_hook

    if hasattr(visualization_hook, 'SegLocalVisualizer'):
        visualization_hook.SegLocalVisualizer = Visualizer


class _ForwardToRun(logging.Handler):
    """Hands what the rest of the package logs to the log of mmengine's current run."""

    def emit(self, record: logging.LogRecord) -> None:
        from mmengine.logging import print_log

        print_log(record.getMessage(), 'current', record.levelno)


def forward_log() -> None:
    """Send what the package logs to the log of the run from now on, so that no line of it is lost."""
    logger = logging.getLogger(__package__.rpartition('.')[0])
    if not any(isinstance(handler, _ForwardToRun) for handler in logger.handlers):
        logger.handlers = [_ForwardToRun()]
        logger.setLevel(logging.INFO)
        logger.propagate = False
