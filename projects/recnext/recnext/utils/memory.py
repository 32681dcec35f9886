"""The memory of a process and of an accelerator: how much was used at most."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PROCESS = Path('/proc/self')
"""Where Linux tells of a process."""


def can_tell_peak(device: 'torch.device') -> bool:
    """Whether :func:`reset_peak` and :func:`peak_memory` work here.

    They do for accelerators whose allocator counts (NVIDIA's, AMD's, Intel's; not Apple's), and for the CPU on Linux.
    """
    if device.type == 'cpu':
        return PROCESS.exists()
    import torch

    return hasattr(torch.get_device_module(device), 'reset_peak_memory_stats')


def reset_peak(device: 'torch.device') -> float:
    """Measure peak memory anew from here; MB in use now."""
    if device.type == 'cpu':
        (PROCESS / 'clear_refs').write_text('5')
    else:
        import torch

        torch.get_device_module(device).reset_peak_memory_stats(device)
    return peak_memory(device)


def peak_memory(device: 'torch.device') -> float:
    """Peak memory in MB: of the accelerator's allocator, or of the process (Linux)."""
    if device.type == 'cpu':
        status = (PROCESS / 'status').read_text()
        return int(status.split('VmHWM:')[1].split()[0]) / 2**10
    import torch

    return torch.get_device_module(device).max_memory_allocated(device) / 2**20


def peak_of_process() -> float | None:
    """The most memory that this process has had, in MB; None on Windows."""
    try:
        import resource
    except ModuleNotFoundError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == 'darwin' else peak / 2**10
