"""What the launch scripts start is ended with the test that asked for it."""

from collections.abc import Iterator

import pytest
from helpers.scripts import STARTED


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    """Whatever a failed test started is ended: torchrun takes its processes along."""
    yield
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            process.terminate()
            process.wait(timeout=120)
