"""The device that a network runs on: found by its word, and what differs from one kind to another."""

import ctypes
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .errors import UserError

if TYPE_CHECKING:
    import torch

AUTO = 'auto'
"""The word for the accelerator that is here, or the CPU."""

SLOW_IN_16_BITS = 'This processor has no instructions for 16-bit numbers, and is hundreds of times slower with them.'


M_TOP_PAD = -2
"""glibc's name of the setting: free memory that is kept at the end of the heap."""

KEPT = 512 * 2**20
"""Bytes of it."""


def find_device(word: 'str | torch.device' = AUTO, process: int = 0) -> 'torch.device':
    """The device that a word means on this machine.

    Args:
        word: ``'auto'``, or what PyTorch calls a device, with or without an index: ``'cpu'``, ``'cuda'``, ``'cuda:1'``,
            ``'mps'``, ``'xpu'``.
        process: Which of the processes of this machine asks, from 0. Where the word names no index, they are dealt out
            among the accelerators.

    Returns:
        With an index where there are several.

    Raises:
        UserError: the word means nothing to PyTorch, or there is no such device here.
    """
    import torch

    # PyTorch knows one kind of accelerator in a process.
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    count = torch.accelerator.device_count() if here is not None else 0
    try:
        device = torch.device((here.type if here is not None else 'cpu') if word == AUTO else word)
    except RuntimeError:
        raise UserError(f'{word!r} is no device; expected auto, cpu, cuda, cuda:1, mps, xpu or the like.') from None
    if device.type == 'cpu':
        return torch.device('cpu')
    if here is None or device.type != here.type:
        raise UserError(f'{word}: torch {torch.__version__} finds no {device.type} here; {_say_what_is_here(here)}.')
    if device.index is None:
        return torch.device(device.type, process % count) if count > 1 else device
    if device.index >= count:
        raise UserError(f'{word}: there are {count} of this kind, and the first is {device.type}:0.')
    return device


def _say_what_is_here(accelerator: 'torch.device | None') -> str:
    return f'there is {accelerator.type}, and cpu' if accelerator is not None else 'there is cpu'


def describe_device(device: 'torch.device') -> str:
    """What a device is called by its maker, where PyTorch tells; else by its kind."""
    import torch

    name = getattr(torch.get_device_module(device), 'get_device_name', None)
    return name(device) if name else device.type.upper()


def synchronize(device: 'torch.device') -> None:
    """Wait until a device has done what it was asked; a CPU has."""
    import torch

    if device.type != 'cpu':
        torch.accelerator.synchronize(device)


def lacks_half_precision(device: 'torch.device') -> bool:
    """Whether a device computes in 16 bits without instructions for it: convolutions take hundreds of times longer.

    Known of x86 processors without AVX-512 alone.
    """
    import torch

    return (
        device.type == 'cpu'
        and platform.machine().lower() in ('x86_64', 'amd64')
        and torch.backends.cpu.get_cpu_capability() in ('DEFAULT', 'AVX2')
    )


def out_of_memory(error: RuntimeError) -> bool:
    """Whether it says that a device has too little memory: not every kind has PyTorch's own type of error."""
    import torch

    words = 'out of memory', "can't allocate memory", 'not enough memory'
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


@contextmanager
def single_precision(tf32: bool) -> Iterator[None]:
    """Let NVIDIA's GPUs round the factors of convolutions and products of float32 to TF32, or not.

    By default PyTorch lets convolutions, and not products. Other devices have no TF32.
    """
    import torch

    places = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [place.allow_tf32 for place in places]
    for place in places:
        place.allow_tf32 = tf32
    try:
        yield
    finally:
        for place, allowed in zip(places, before):
            place.allow_tf32 = allowed


def keep_freed_memory() -> None:
    """Let glibc keep memory that a network has freed, for its next image.

    By default glibc hands large freed blocks back to the system and gets them anew, zeroed page by page, for every
    feature map of every image. Requests are served from the end of the heap first, so memory that is kept there is
    used again. Other C libraries stay as they are, and so do the peaks of memory.

    It is for programs, such as the tools: a library leaves the allocator of its host alone.
    """
    if sys.platform == 'linux':
        mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
        if mallopt is not None:
            mallopt(M_TOP_PAD, KEPT)
