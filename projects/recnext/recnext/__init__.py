"""RecNeXt with Semantic FPN for MMSegmentation 1.x.

Importing this package makes its parts known to MMEngine and to timm, and repairs the stack. Nothing is imported in
advance for that: the parts are when a registry of MMEngine is first asked for something, those for timm when timm is,
and a repair is made when the module with its defect is imported.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from .compat import register_post_import_hook, repair_stack

if TYPE_CHECKING:
    from mmengine.registry import Registry

REGISTERED = {
    'AdaptiveClipHook': 'engine.hooks.adaptive_clip',
    'Bfloat16OptimWrapper': 'engine.optim',
    'ChannelsLastHook': 'engine.hooks.channels_last',
    'CompileHook': 'engine.hooks.compile',
    'DeployHook': 'engine.hooks.deploy',
    'EvaluationRecord': 'evaluation.record',
    'EvaluationRecordHook': 'engine.hooks.evaluation_record',
    'FastEncoderDecoder': 'models.segmentor',
    'FiniteLossHook': 'engine.hooks.finite_loss',
    'GatherInWorkDirHook': 'engine.hooks.gather',
    'NoAlgorithmSearchHook': 'engine.hooks.algorithm_search',
    'OverlappedTestLoop': 'engine.overlapped_testing',
    'RecNeXt': 'models.recnext',
    'RecNeXtEncoderDecoder': 'models.segmentor',
    'ResumableSampler': 'datasets.seeded',
    'ResumableTrainLoop': 'engine.loops',
    'SeededDataset': 'datasets.seeded',
    'SegPanelVisualizer': 'visualization.panel_visualizer',
    'StoreHook': 'engine.hooks.store',
    'ThroughputHook': 'engine.hooks.throughput',
}
"""What configs may name, and where it is. ``models.classifier``, which needs mmpretrain, is imported by the configs."""

__all__ = list(REGISTERED)


def __getattr__(name: str) -> type:
    if name not in REGISTERED:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(f'.{REGISTERED[name]}', __name__), name)


def _register_when_asked(registry: ModuleType) -> None:
    """Import the parts before any of MMEngine's registries is asked for something, whatever its scope."""
    import_from_location = registry.Registry.import_from_location

    def import_parts_first(self: 'Registry') -> None:
        registry.Registry.import_from_location = import_from_location
        for module in dict.fromkeys(REGISTERED.values()):
            import_module(f'.{module}', __name__)
        import_from_location(self)

    registry.Registry.import_from_location = import_parts_first


def _register_with_timm(timm: ModuleType) -> None:
    import_module('.models.timm_models', __name__)


repair_stack()
register_post_import_hook(_register_when_asked, 'mmengine.registry')
register_post_import_hook(_register_with_timm, 'timm')
