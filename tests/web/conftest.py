"""Visitors of the pages, who must not be sent to anybody else."""

from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import pytest
from helpers.visitor import Visitor


@pytest.fixture(scope='module')
def ready() -> str:
    """Selector of an element of the page that is seen once it takes files."""
    return '.model'


@pytest.fixture
def visit(browser, ready) -> Iterator[Callable[..., Visitor]]:
    visitors = []

    def open_page(address: str, **options: object) -> Visitor:
        visitors.append(Visitor(browser, address, ready, **options))
        return visitors[-1]

    yield open_page
    for visitor in visitors:
        asked = {urlsplit(request.url).hostname for request in visitor.requests if request.url[:4] == 'http'}
        visitor.context.close()
        assert visitor.complaints == []
        assert asked == {'127.0.0.1'}, 'it talked to others'
