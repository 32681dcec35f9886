"""RecNeXt with Semantic FPN: train, test, predict and ship the released ADE20K segmentors."""

from importlib import import_module

__version__ = '2.0.0'

_PUBLIC = {
    'load': 'predict.model',
    'Model': 'predict.model',
    'Predictor': 'predict.predictor',
    'list_models': 'checkpoints.releases',
}
"""What is imported when it is asked for, and where it is."""

__all__ = ['Model', 'Predictor', '__version__', 'list_models', 'load']


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(f'.{_PUBLIC[name]}', __name__), name)


def __dir__() -> list[str]:
    return __all__
