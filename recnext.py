"""The short import: ``import recnext`` is :mod:`projects.recnext.recnext`, with its public names alone."""

import projects.recnext.recnext as _package

__all__ = list(_package.__all__)
__version__ = _package.__version__


def __getattr__(name: str) -> object:
    return getattr(_package, name)


def __dir__() -> list[str]:
    return __all__
