"""The stack on which handlers of signals run."""

import ctypes
import sys

import pytest

from projects.recnext.recnext.utils.signals import _SignalStack, kept_signal_stack


def current() -> tuple[int | None, int, int]:
    """Address, flags and size."""
    stack = _SignalStack()
    assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack)) == 0
    return stack.ss_sp, stack.ss_flags, stack.ss_size


@pytest.mark.skipif(sys.platform != 'linux', reason='there is no such stack, or no need to keep it')
def test_another_stack_is_gone_after_the_block():
    before, memory = current(), ctypes.create_string_buffer(1 << 17)
    other = _SignalStack(ctypes.addressof(memory), 0, len(memory))
    with pytest.raises(ZeroDivisionError), kept_signal_stack():
        assert ctypes.CDLL(None).sigaltstack(ctypes.byref(other), None) == 0
        assert current()[0] == ctypes.addressof(memory) != before[0]
        raise ZeroDivisionError
    assert current() == before
