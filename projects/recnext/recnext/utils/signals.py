"""Signals that ask a long piece of work to stop in good order, and the stack that handlers of signals run on."""

import contextlib
import ctypes
import os
import signal
import sys
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


class _SignalStack(ctypes.Structure):
    """``stack_t`` of ``signal.h``."""

    _fields_ = (('ss_sp', ctypes.c_void_p), ('ss_flags', ctypes.c_int), ('ss_size', ctypes.c_size_t))


@contextlib.contextmanager
def kept_signal_stack() -> Iterator[None]:
    """After the block this thread handles signals on the stack that it handled them on before.

    For OpenVINO (2026.4). On Linux each plugin of its gives the thread a stack of its own, and takes it away again by
    putting back the one that was there before, which may be that of another plugin, freed by then. The next signal,
    such as Ctrl-C or the end of a child process, would be a segmentation fault.
    """
    if sys.platform != 'linux':
        yield
        return
    libc, before = ctypes.CDLL(None), _SignalStack()
    libc.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        libc.sigaltstack(ctypes.byref(before), None)
