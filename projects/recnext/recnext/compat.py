"""Repairs of the stack: one function each, which does nothing where the defect is absent.

A repair is made when the module that has its defect is imported, so that this project imports nothing in advance. Each
says whether it found its defect; :data:`ACTIVE` has the names of those that did so far. ``tests/stack/defects.py``
looks for the defects themselves, and ``tests/stack/stacks.py`` does so with other versions of everything.
"""

import contextlib
import importlib
import importlib.util
import json
import logging
import pkgutil
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from importlib import metadata
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import NoReturn

try:
    from wrapt import register_post_import_hook
except ModuleNotFoundError:  # on a machine that takes no packages but those it has: nothing waits for the import

    def register_post_import_hook(hook: Callable[[ModuleType], None], name: str) -> None:
        """As wrapt's, but at once."""
        hook(importlib.import_module(name))


MMCV_OPS = 'mmcv.ops'

SHARDED = {
    'ZeroRedundancyOptimizer': 'mmengine.optim.optimizer.zero_optimizer',
    'MMFullyShardedDataParallel': 'mmengine.model.wrappers.fully_sharded_distributed',
    'FSDPStrategy': 'mmengine._strategy.fsdp',
}
"""What mmengine makes of PyTorch's ways to shard a model, and where."""

ACTIVE: list[str] = []
"""Names of the repairs that were needed so far."""


def repair_stack() -> None:
    """Make every repair as soon as its module is imported; at once where it is already."""
    for repair, module in REPAIRS.items():
        register_post_import_hook(partial(_make, repair), module)


def _make(repair: Callable[[], bool], module: ModuleType) -> None:
    if repair.__name__ not in ACTIVE and repair():
        ACTIVE.append(repair.__name__)


def stand_in_for_mmcv_ops() -> bool:
    """Let mmseg be imported without a compiled mmcv.

    Defect: mmsegmentation 1.0 to 1.2 imports ``mmcv.ops`` unguarded in some modules, and mmcv-lite has no compiled
    extension to back it. RecNeXt uses none of these operations.

    Repair: an ``mmcv.ops`` whose names can be imported, and raise a clear error when they are used. It stands in for
    ``mmcv.ops`` and not for ``mmcv._ext``, which mmengine looks for to tell whether mmcv is compiled.
    """
    if importlib.util.find_spec('mmcv._ext') is not None or MMCV_OPS in sys.modules or not _mmseg_insists_on_mmcv_ops():
        return False
    sys.meta_path.insert(0, _MmcvOpsFinder())
    return True


def _mmseg_insists_on_mmcv_ops() -> bool:
    """Whether a module of mmseg imports ``mmcv.ops`` at its outermost level; the maintained fork's do so in a try."""
    folder = Path(importlib.util.find_spec('mmseg').origin).parent
    outermost = re.compile(rb'^from mmcv\.ops ', re.MULTILINE)
    files = [path for part in ('models', 'utils') for path in (folder / part).rglob('*.py')]
    return any(outermost.search(path.read_bytes()) for path in files)


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


def shard_when_asked() -> bool:
    """Let mmengine be imported without waiting for PyTorch's ways to shard a model.

    Defect: mmengine derives three classes from FSDP and ZeRO while it is imported, which bring sympy along, a second of
    work, though a run needs them only where its config names them.

    Repair: their modules are imported when a registry or one of mmengine's packages is asked for one of the three.
    """
    from mmengine.registry import Registry

    folder = Path(sys.modules['mmengine'].__file__).parent
    there = {
        name: module
        for name, module in SHARDED.items()
        if module not in sys.modules and folder.joinpath(*module.split('.')[1:]).with_suffix('.py').exists()
    }
    if not there:
        return False
    for name, module in there.items():
        sys.modules[module] = _WhenUsed(module)
        # The outermost package below mmengine: when it is complete, so are those inside.
        register_post_import_hook(partial(_import_when_asked, name), '.'.join(module.split('.')[:2]))
    get = Registry.get

    def get_sharded_too(self: Registry, key: str) -> type | None:
        name = key.rpartition('.')[2] if isinstance(key, str) else None
        if name in there:
            importlib.import_module(there[name])
        return get(self, key)

    Registry.get = get_sharded_too
    return True


def _import_when_asked(name: str, outermost: ModuleType) -> None:
    """Have a package, and those inside, import one of :data:`SHARDED` when they are asked for it."""
    module = SHARDED[name]
    del sys.modules[module]

    def import_asked(asked: str) -> type:
        if asked != name:
            raise AttributeError(f'module {outermost.__name__!r} has no attribute {asked!r}')
        return getattr(importlib.import_module(module), name)

    package = module.rpartition('.')[0]
    while package.startswith(outermost.__name__):
        vars(sys.modules[package]).pop(name, None)
        sys.modules[package].__getattr__ = import_asked
        package = package.rpartition('.')[0]


def import_when_used() -> bool:
    """Let mmseg be imported without waiting for what few of its models and transforms need.

    Defect: mmseg imports timm, much of scipy and the vocabulary of CLIP's tokenizer together with its models, seconds
    of work, though only TIMMBackbone, BEiT's table of positions, the Hausdorff loss, MaskFormer's matching, blurred
    edges and models with texts need them.

    Repair: while mmseg is imported, stand-ins whose functions import the real ones when they are called.
    """
    # What mmseg builds on comes first, and so meets no stand-in: mmengine imports transformers where it is installed.
    importlib.import_module('mmcv.cnn')
    importlib.import_module('mmengine.runner')
    # Where mmdet is installed mmseg imports it as well, and that uses more of scipy than functions.
    scipy = () if importlib.util.find_spec('mmdet') else ('scipy.interpolate', 'scipy.ndimage', 'scipy.optimize')
    with _imported_without(*map(_WhenUsed, ('timm', 'mmseg.utils.tokenizer', *scipy))):
        importlib.import_module('mmseg.models')
        importlib.import_module('mmseg.datasets')
    return isinstance(getattr(sys.modules['mmseg.models.backbones.timm_backbone'], 'timm', None), _WhenUsed)


@contextlib.contextmanager
def _imported_without(*modules: ModuleType) -> Iterator[None]:
    """Whoever imports modules of these names meanwhile gets these, except for those that are imported already."""
    stand_ins = {module.__name__: module for module in modules if module.__name__ not in sys.modules}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins:
            del sys.modules[name]


class _WhenUsed(ModuleType):
    """A module, or a function in it, that is imported when it is called."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)  # or ``find_spec``, by which packages look for each other, raises

    def __getattr__(self, name: str) -> '_WhenUsed':
        if name.startswith('__'):
            raise AttributeError(name)
        return _WhenUsed(f'{self.__name__}.{name}')

    def __call__(self, *args: object, **kwargs: object) -> object:
        return pkgutil.resolve_name(self.__name__)(*args, **kwargs)


def find_packages_without_pkg_resources() -> bool:
    """Let ``mmseg::`` in a config find mmseg.

    Defect: mmengine looks installed packages up with pkg_resources, which setuptools dropped in release 82.

    Repair: the same two functions with the standard library.
    """
    from mmengine.utils import package_utils

    asks = 'pkg_resources' in package_utils.get_installed_path.__code__.co_names
    if not asks or importlib.util.find_spec('pkg_resources') is not None:
        return False
    ours = (_is_installed, _installed_path)
    theirs = (package_utils.is_installed, package_utils.get_installed_path)
    # mmengine imports them by name, so every module of it that has them gets the others.
    for name in [name for name in sys.modules if name.partition('.')[0] == 'mmengine']:
        for function, repaired in zip(theirs, ours):
            if vars(sys.modules[name]).get(function.__name__) is function:
                setattr(sys.modules[name], function.__name__, repaired)
    return True


def _is_installed(package: str) -> bool:
    return _spec_of_package(package) is not None


def _installed_path(package: str) -> str:
    """The folder of a package, by the name that pip knows (mmsegmentation) or that Python knows (mmseg)."""
    spec = _spec_of_package(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f'{package} is not installed: pip install {package}')
    return str(Path(spec.origin).parent)


def _spec_of_package(package: str) -> ModuleSpec | None:
    try:
        modules = metadata.distribution(package).read_text('top_level.txt')
    except metadata.PackageNotFoundError:
        modules = None
    return importlib.util.find_spec(modules.split()[0] if modules else package)


def draw_with_any_visualizer() -> bool:
    """Let a config have a visualizer of its own.

    Defect: the hook of mmsegmentation 1.0 asks for the one SegLocalVisualizer, and stops a run that has another.

    Repair: it asks for the one visualizer, as later releases do.
    """
    from mmengine.visualization import Visualizer
    from mmseg.engine.hooks import visualization_hook

    if not hasattr(visualization_hook, 'SegLocalVisualizer'):
        return False
    visualization_hook.SegLocalVisualizer = Visualizer
    return True


def format_configs_once() -> bool:
    """Let runs start, and save checkpoints, without waiting for the formatting of what is formatted already.

    Defect: mmengine formats the whole config with yapf, a quarter of a second, four times while a run starts and again
    for every checkpoint.

    Repair: yapf remembers the texts that it has formatted last.
    """
    from yapf.yapflib import yapf_api

    format_code = yapf_api.FormatCode

    @lru_cache(maxsize=4)
    def format_text(text: str, options: str) -> tuple[str, bool]:
        return format_code(text, **json.loads(options))

    yapf_api.FormatCode = lambda text, **options: format_text(text, json.dumps(options))
    return True


def read_checkpoints_safely() -> bool:
    """Let mmengine read the checkpoints that it writes, run nothing in any, and name what is wrong with the rest.

    Defects: mmengine saves its log of scalars with the weights, and torch >= 2.6 refuses to read those types back, so
    that testing or resuming fails with "Unsupported global: HistoryBuffer". And what it downloads it unpickles without
    ``weights_only``, which runs whatever the file says; the maintained fork does so with any file that is refused.

    Repair: local files and downloads go through :func:`checkpoint.read_checkpoint`; what mmengine would read from other
    storages by itself is refused.
    """
    from mmengine.runner import checkpoint

    from .weights.checkpoint import CheckpointError, read_checkpoint
    from .weights.fetch import fetch_checkpoint

    def load_from_local(filename: str, map_location: object = None) -> dict:
        return read_checkpoint(filename, map_location)

    def load_from_http(filename: str, map_location: object = None, *_: object, **__: object) -> dict:
        return read_checkpoint(fetch_checkpoint(filename), map_location)

    def refuse(filename: str, *_: object, **__: object) -> NoReturn:
        raise CheckpointError(f'{filename} cannot be read where it is. Download it, and name the file.')

    register = checkpoint.CheckpointLoader.register_scheme
    register('', load_from_local, force=True)
    register(('http://', 'https://'), load_from_http, force=True)
    register(('pavi://', r'(\S+\:)?s3://', r'(\S+\:)?petrel://'), refuse, force=True)
    # mmengine's other schemes, torchvision:// and so on, look up an address and call this.
    checkpoint.load_from_http = load_from_http
    return True


def write_files_atomically() -> bool:
    """Let a run that is killed, or a disk that is full, leave no half of a checkpoint and keep what was there.

    Defect: mmengine writes local files in place.

    Repair: its local backend writes beside the place, through to the disk, and renames.
    """
    from mmengine.fileio import LocalBackend, register_backend

    from .utils.files import written_beside

    class AtomicLocalBackend(LocalBackend):
        def put(self, obj: bytes, filepath: str | Path) -> None:
            with written_beside(filepath) as beside:
                beside.write_bytes(obj)

    register_backend('local', AtomicLocalBackend, prefixes='', force=True)
    return True


def resume_from_newest_complete() -> bool:
    """Let ``--resume`` find the newest checkpoint whatever the moment at which the run was killed.

    Defect: mmengine notes the newest checkpoint in a file ``last_checkpoint`` that it writes in place and afterwards;
    killed in between, it resumes from an older one, or from a name of which half is missing.

    Repair: look at the checkpoints themselves; they are complete, because they were renamed into place. One that was
    damaged later is named, and left where it is.
    """
    from mmengine.logging import print_log
    from mmengine.runner import checkpoint, runner

    from .weights.checkpoint import read_newest_checkpoint

    def find_latest_checkpoint(path: str) -> str | None:
        newest = read_newest_checkpoint(path)
        if newest and newest.damaged:
            said = ' '.join(map(str, newest.damaged))
            print_log(f'{said} Training goes on from {newest.path}.', 'current', logging.WARNING)
        return newest and str(newest.path)

    for module in (checkpoint, runner):
        module.find_latest_checkpoint = find_latest_checkpoint
    return True


def log_versions_without_importing() -> bool:
    """Let a run start without waiting for a package of which it logs the version.

    Defect: mmengine imports torchvision to log its version, and with it PyTorch's compiler, one to two seconds of work.

    Repair: mmengine is given the version that the package declares.
    """
    from mmengine.runner import runner

    collect_env = runner.collect_env
    if 'torchvision' not in collect_env.__code__.co_names:
        return False

    def collect_env_without_importing() -> dict:
        stand_in = ModuleType('torchvision')
        try:
            stand_in.__version__ = metadata.version('torchvision')
        except metadata.PackageNotFoundError:
            return collect_env()
        with _imported_without(stand_in):
            return collect_env()

    runner.collect_env = collect_env_without_importing
    return True


def silence_unavoidable_warnings() -> bool:
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
    return True


REPAIRS: dict[Callable[[], bool], str] = {
    format_configs_once: 'yapf.yapflib.yapf_api',
    stand_in_for_mmcv_ops: 'mmcv',
    shard_when_asked: 'mmengine',
    import_when_used: 'mmseg',
    find_packages_without_pkg_resources: 'mmengine.utils',
    draw_with_any_visualizer: 'mmseg.engine.hooks.visualization_hook',
    read_checkpoints_safely: 'mmengine.runner.checkpoint',
    write_files_atomically: 'mmengine.fileio',
    resume_from_newest_complete: 'mmengine.runner.runner',
    log_versions_without_importing: 'mmengine.runner.runner',
    silence_unavoidable_warnings: 'mmseg',
}
"""Each repair, and the module whose import it follows."""
