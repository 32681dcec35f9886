"""The command lines as a user runs them."""

import atexit
import functools
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from helpers.reference import ROOT

FOLDER = Path(__file__).parent


def run_tool(
    name: str, *args: object, fresh: bool = False, timeout: float = 600, **kwargs: object
) -> subprocess.CompletedProcess:
    """Run a command line of ``tools/`` in a process of its own.

    Args:
        name: Its name, without ``.py``.
        args: Its arguments.
        fresh: In a new interpreter: where the start itself is tested, and for wrong use, before which nothing is
            imported.
        timeout: Seconds.
        kwargs: ``cwd``, ``env``, ``input`` as for :func:`subprocess.run`.

    Returns:
        With exit code, and stdout and stderr as text.
    """
    return run_python(ROOT / 'tools' / f'{name}.py', *args, fresh=fresh, timeout=timeout, **kwargs)


def run_python(
    *args: object, fresh: bool = False, timeout: float = 600, **kwargs: object
) -> subprocess.CompletedProcess:
    """Run ``python ARGS``; otherwise as :func:`run_tool`."""
    command = [sys.executable if fresh else warm_python(), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, **kwargs)


@functools.cache
def warm_python() -> str:
    """A program that is to the caller what ``python`` is, and saves seconds.

    It does not start an interpreter: it has one forked that has imported everything (warm_interpreter.py). That one
    starts when first asked for and ends with this process of pytest. Not for what is to show that imports work.
    """
    return start_warm_python(FOLDER / 'warm_interpreter.py') if sys.platform == 'linux' else sys.executable


def start_warm_python(interpreter: Path) -> str:
    folder = Path(tempfile.mkdtemp(prefix='warm-'))
    ours, theirs = socket.socketpair()
    with theirs, open(folder / 'said', 'wb') as said:
        process = subprocess.Popen(
            [sys.executable, interpreter, str(folder / 'socket'), str(theirs.fileno())], pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True,
        )  # fmt: skip
    atexit.register(lambda: (ours.close(), process.wait(), shutil.rmtree(folder, ignore_errors=True)))
    wait_until(lambda: (folder / 'socket').exists() or process.poll() is not None)
    program = folder / 'python'
    program.write_text(
        f'#!/usr/bin/env -S "{sys.executable}" -IS\n'
        f'import sys; sys.path.insert(0, {str(FOLDER)!r}); import warm_python\n'
        f'warm_python.main({str(folder)!r}, sys.argv[1:])\n'
    )
    program.chmod(0o755)
    return str(program)


def assert_user_error(result: subprocess.CompletedProcess, *words: str) -> None:
    """A few lines that name the problem, no traceback, exit code 1."""
    assert result.returncode == 1, result.stderr
    assert 'Traceback' not in result.stderr
    message = result.stderr[result.stderr.index('error: ') :]
    assert len(message.splitlines()) <= 15, message
    for word in words:
        assert word in message, message


def free_port() -> str:
    """Of this machine, for an address that is asked for soon."""
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return str(listener.getsockname()[1])


def is_running(process: int) -> bool:
    state = subprocess.run(['ps', '-o', 'stat=', '-p', str(process)], capture_output=True, text=True).stdout
    return bool(state.strip()) and not state.startswith('Z')


def wait_until(condition: Callable[[], bool], minutes: float = 5) -> None:
    """Wait for what has to happen, however slow the machine is; it has failed to after minutes."""
    end = time.monotonic() + 60 * minutes
    while not condition():
        assert time.monotonic() < end, 'this has not happened'
        time.sleep(0.05)


def descendants(ancestor: int) -> list[int]:
    """Processes under ``ancestor``, children before grandchildren."""
    listing = subprocess.run(['ps', '-eo', 'pid=,ppid=,stat='], capture_output=True, text=True).stdout.splitlines()
    rows = [(int(pid), int(parent)) for pid, parent, state in map(str.split, listing) if 'Z' not in state]
    found = [ancestor]
    for process in found:
        found += [pid for pid, parent in rows if parent == process]
    return found[1:]
