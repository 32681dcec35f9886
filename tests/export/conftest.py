"""The small segmentor that these tests export."""

import pytest
from helpers.exports import write_tiny


@pytest.fixture(scope='module', params=('conv', 'attn'))
def tiny(request, tmp_path_factory) -> tuple[str, str]:
    return write_tiny(tmp_path_factory.mktemp('tiny'), request.param)


@pytest.fixture(scope='module')
def tiny_m(tmp_path_factory) -> tuple[str, str]:
    """For what is the same for both token mixers."""
    return write_tiny(tmp_path_factory.mktemp('tiny'), 'conv')
