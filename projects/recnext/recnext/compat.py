"""Repairs of the stack: one function each, which does nothing where the defect is absent."""

import importlib
import importlib.util
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import NoReturn

MMCV_OPS = 'mmcv.ops'


def repair_stack() -> None:
    """All repairs, in the order in which the project needs them."""
    stand_in_for_mmcv_ops()
    import_timm_when_used()
    read_checkpoints_safely()
    write_files_atomically()
    resume_from_newest_complete()
    silence_unavoidable_warnings()


def stand_in_for_mmcv_ops() -> None:
    """Let mmseg be imported without a compiled mmcv.

    Defect: mmsegmentation 1.x imports ``mmcv.ops`` unguarded in three modules, and mmcv-lite has no compiled
    extension to back it. RecNeXt uses none of these operations.

    Repair: an ``mmcv.ops`` whose names can be imported, and raise a clear error when they are used. It stands in for
    ``mmcv.ops`` and not for ``mmcv._ext``, which mmengine looks for to tell whether mmcv is compiled.
    """
    if importlib.util.find_spec('mmcv._ext') is None and MMCV_OPS not in sys.modules:
        sys.meta_path.insert(0, _MmcvOpsFinder())


class _MmcvOpsFinder(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        inside = name == MMCV_OPS or name.startswith(MMCV_OPS + '.')
        return ModuleSpec(name, self, is_package=True) if inside else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _MmcvOps(spec.name, 'Stand-in for the operations of a compiled mmcv.')

    def exec_module(self, module: ModuleType) -> None:
        pass


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


def import_timm_when_used() -> None:
    """Let mmseg be imported without waiting for timm.

    Defect: mmseg imports timm together with its models, seconds of work, though only its TIMMBackbone needs it.

    Repair: while mmseg's models are imported, a ``timm`` that is imported when something of it is used.
    """
    if 'timm' in sys.modules:
        return
    sys.modules['timm'] = _Timm('timm')
    try:
        importlib.import_module('mmseg.models')
    finally:
        del sys.modules['timm']


class _Timm(ModuleType):
    def __getattr__(self, name: str) -> object:
        if name.startswith('__'):
            raise AttributeError(name)
        return getattr(importlib.import_module('timm'), name)


def read_checkpoints_safely() -> None:
    """Let mmengine read the checkpoints that it writes, run nothing in any, and name what is wrong with the rest.

    Defects: mmengine saves its log of scalars with the weights, and torch >= 2.6 refuses to read those types back, so
    that testing or resuming fails with "Unsupported global: HistoryBuffer". And what it downloads it unpickles without
    ``weights_only``, which runs whatever the file says.

    Repair: local files and downloads go through :func:`checkpoint.read_checkpoint`; what mmengine would read from other
    storages by itself is refused.
    """
    from mmengine.runner import checkpoint

    from .checkpoint import CheckpointError, download, read_checkpoint

    def load_from_local(filename: str, map_location: object = None) -> dict:
        return read_checkpoint(filename, map_location)

    def load_from_http(filename: str, map_location: object = None, *_: object, **__: object) -> dict:
        return read_checkpoint(download(filename), map_location)

    def refuse(filename: str, *_: object, **__: object) -> NoReturn:
        raise CheckpointError(f'{filename} cannot be read where it is. Download it, and name the file.')

    register = checkpoint.CheckpointLoader.register_scheme
    register('', load_from_local, force=True)
    register(('http://', 'https://'), load_from_http, force=True)
    register(('pavi://', r'(\S+\:)?s3://', r'(\S+\:)?petrel://'), refuse, force=True)
    # mmengine's other schemes, torchvision:// and so on, look up an address and call this.
    checkpoint.load_from_http = load_from_http


def write_files_atomically() -> None:
    """Let a run that is killed, or a disk that is full, leave no half of a checkpoint and keep what was there.

    Defect: mmengine writes local files in place.

    Repair: its local backend writes beside the place, through to the disk, and renames.
    """
    from mmengine.fileio import LocalBackend

    from .checkpoint import write_atomically

    def put(self: LocalBackend, obj: bytes, filepath: str | Path) -> None:
        Path(filepath).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(filepath), lambda file: file.write(obj))

    LocalBackend.put = put


def resume_from_newest_complete() -> None:
    """Let ``--resume`` find the newest checkpoint whatever the moment at which the run was killed.

    Defect: mmengine notes the newest checkpoint in a file ``last_checkpoint`` that it writes in place and afterwards;
    killed in between, it resumes from an older one, or from a name of which half is missing.

    Repair: look at the checkpoints themselves; they are complete, because they were renamed into place.
    """
    from mmengine.runner import checkpoint, runner

    from .checkpoint import find_newest_checkpoint

    for module in (checkpoint, runner):
        module.find_latest_checkpoint = find_newest_checkpoint


def silence_unavoidable_warnings() -> None:
    """Keep quiet what a user of these configs can do nothing about.

    Defect: mmseg warns of its own use of its own deprecated function, of a default that is the released recipe's, and
    that no pictures will be drawn when none were asked for.
    """
    for message in (
        '``build_loss`` would be deprecated soon',
        'Default ``avg_non_ignore`` is False',
        'The draw is False',
    ):
        warnings.filterwarnings('ignore', message=message)
