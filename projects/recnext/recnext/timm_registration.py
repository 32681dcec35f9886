"""RecNeXt becomes known to timm when timm is imported, before or after this project, and not earlier."""

import importlib
from types import ModuleType

from wrapt import register_post_import_hook


def register_with_timm() -> None:
    """Import :mod:`timm_models` as soon as timm is imported."""
    register_post_import_hook(_import_models, 'timm')


def _import_models(timm: ModuleType) -> None:
    importlib.import_module('.timm_models', __package__)
