"""The small segmentors that these tests export."""

import functools
from collections.abc import Callable

import pytest
from helpers.exports import write_tiny


@pytest.fixture(scope='module')
def tiny_of(tmp_path_factory) -> Callable[[str], tuple[str, str]]:
    """Config and checkpoint of the small segmentor with a token mixer, ``conv`` or ``attn``."""
    return functools.cache(lambda mixer: write_tiny(tmp_path_factory.mktemp(mixer), mixer))


@pytest.fixture(scope='module')
def tiny(tiny_of) -> tuple[str, str]:
    """For what is the same for both."""
    return tiny_of('conv')
