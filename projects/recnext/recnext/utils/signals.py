"""Signals that ask a long piece of work to stop in good order."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

STOPPING = [getattr(signal, name) for name in ('SIGTERM', 'SIGUSR1') if hasattr(signal, name)]
"""The end of a job, and the warning before it: a batch system's, a spot machine's."""


class StopRequest:
    """Whether the work has been asked to stop."""

    received: signal.Signals | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Note a signal."""
        self.received = signal.Signals(number)


@contextlib.contextmanager
def noted_stop_signals() -> Iterator[StopRequest]:
    """While the block runs, the signals of :data:`STOPPING` are noted and do nothing else.

    In the main thread only; in another, where Python cannot, they do what they did before.
    """
    request = StopRequest()
    numbers = STOPPING if threading.current_thread() is threading.main_thread() else []
    before = {number: signal.signal(number, request) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def outlive_stop_signals() -> None:
    """In a child process: leave it to the parent what a signal to the whole group means.

    A SIGTERM of the parent's own still ends the child: that is how PyTorch and multiprocessing end theirs.
    """
    if not hasattr(signal, 'sigwaitinfo'):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    threading.Thread(target=_end_for_parent, args=[os.getppid()], daemon=True).start()


def _end_for_parent(parent: int) -> None:
    while True:
        heard = signal.sigwaitinfo(STOPPING)
        if heard.si_signo == signal.SIGTERM and heard.si_pid == parent:
            os._exit(0)
