"""How the process gets its memory from the system."""

import ctypes
import sys

M_TOP_PAD = -2
"""glibc's name of the setting: free memory that is kept at the end of the heap."""

KEPT = 512 * 2**20
"""Bytes of it."""


def keep_freed_memory() -> None:
    """Let glibc keep memory that a network has freed, for its next image.

    By default glibc hands large freed blocks back to the system and gets them anew, zeroed page by page, for every
    feature map of every image. Requests are served from the end of the heap first, so memory that is kept there is
    used again. Other C libraries stay as they are, and so do the peaks of memory.
    """
    if sys.platform == 'linux':
        mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
        if mallopt is not None:
            mallopt(M_TOP_PAD, KEPT)
