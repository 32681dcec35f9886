"""Disks that fail: one that stops answering, so that a process is killed while it writes, and one that is full."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

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


@contextmanager
def small_disk_at(folder: Path, size: int) -> Iterator[None]:
    """A disk of so many bytes in the place of a folder; the test is skipped where none can be mounted."""
    folder.mkdir()
    command = ['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', folder]
    if shutil.which('mount') is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip('needs the right to mount a small disk (Linux, root)')
    try:
        yield
    finally:
        # Lazily: what failed may have left a file open.
        subprocess.run(['umount', '--lazy', folder], check=True)
