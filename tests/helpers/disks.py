"""A disk that stops answering at a chosen moment: a process that is killed then is killed while it writes."""

import os
from pathlib import Path

STALLED = 'the disk has stalled'

SITE_CUSTOMIZE = f"""
import os, time
fsync, left = os.fsync, int(os.environ['WRITES'])
def fsync_or_stall(descriptor):
    global left
    left -= 1
    if left < 0:
        print({STALLED!r}, flush=True)
        time.sleep(3600)
    fsync(descriptor)
os.fsync = fsync_or_stall
"""


def stalling_disk(folder: Path, writes: int) -> dict[str, str]:
    """The environment of a Python process that writes so many files and hangs in the next, which it has announced."""
    (folder / 'sitecustomize.py').write_text(SITE_CUSTOMIZE)
    return {**os.environ, 'PYTHONPATH': str(folder), 'WRITES': str(writes)}
