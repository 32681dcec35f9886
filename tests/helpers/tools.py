"""The command lines as a user runs them."""

import atexit
import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from helpers.reference import ROOT

WARM_INTERPRETER = Path(__file__).with_name('warm_interpreter.py')
READ_AT_START = 'PYTHON', 'LD_', 'OPENBLAS_', 'MKL_', 'CUDA_'
"""Beginnings of the variables that mean nothing to a process once it runs."""


def run_tool(
    name: str, *args: object, fresh: bool = False, timeout: float = 600, **kwargs: object
) -> subprocess.CompletedProcess:
    """Run a command line of ``tools/`` in a process of its own.

    Args:
        name: Its name, without ``.py``.
        args: Its arguments.
        fresh: Start an interpreter for it instead of forking one that has imported everything, which saves seconds:
            where the start itself is tested, and for wrong use, before which nothing is imported.
        timeout: Seconds.
        kwargs: ``cwd``, ``env``, ``input`` as for :func:`subprocess.run`.

    Returns:
        With exit code, and stdout and stderr as text.
    """
    command = [str(ROOT / 'tools' / f'{name}.py'), *map(str, args)]
    if fresh or sys.platform != 'linux':
        return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=timeout, **kwargs)
    return warm_interpreter().run(command, timeout, **kwargs)


@functools.cache
def warm_interpreter() -> 'WarmInterpreter':
    """Of this process of pytest, started when first asked for."""
    interpreter = WarmInterpreter()
    atexit.register(interpreter.end)
    return interpreter


class WarmInterpreter:
    """The other end of warm_interpreter.py. Runs one command line at a time."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.said = tempfile.TemporaryFile()
        # Without these an import would start a thread, or ask the GPU for what no fork can use after it.
        variables = dict(OPENBLAS_NUM_THREADS='1', PYTORCH_NVML_BASED_CUDA_CHECK='1')
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, WARM_INTERPRETER, str(theirs.fileno())], pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL, stdout=self.said, stderr=self.said, env={**os.environ, **variables},
                start_new_session=True,
            )  # fmt: skip

    def run(
        self,
        command: list[str],
        timeout: float,
        cwd: object = '.',
        env: dict[str, str] | None = None,
        input: str = '',
    ) -> subprocess.CompletedProcess:
        """As :func:`subprocess.run` does."""
        env = dict(os.environ) if env is None else env
        changed = {name for name, _ in env.items() ^ os.environ.items() if name.startswith(READ_AT_START)}
        assert not changed, f'{", ".join(sorted(changed))}: read when an interpreter starts, hence fresh=True'
        request = dict(argv=command, cwd=os.path.abspath(cwd), env=env)
        with contextlib.ExitStack() as stack:
            stdin, stdout, stderr = (stack.enter_context(tempfile.TemporaryFile('w+')) for _ in range(3))
            stdin.write(input)
            stdin.seek(0)
            descriptors = [file.fileno() for file in (stdin, stdout, stderr)]
            with contextlib.suppress(ConnectionError):  # receive() says why
                socket.send_fds(self.socket, [json.dumps(request).encode()], descriptors)
            process = self.receive()
            try:
                self.socket.settimeout(timeout)
                code = self.receive()
            except BaseException as error:
                self.socket.settimeout(None)
                os.kill(process, signal.SIGKILL)
                self.receive()
                if isinstance(error, TimeoutError):
                    raise subprocess.TimeoutExpired(command, timeout) from None
                raise
            self.socket.settimeout(None)
            for file in (stdout, stderr):
                file.seek(0)
            return subprocess.CompletedProcess(command, code, stdout.read(), stderr.read())

    def receive(self) -> int:
        with contextlib.suppress(ConnectionError):
            if answer := self.socket.recv(64):
                return int(answer)
        self.said.seek(0)
        raise RuntimeError(f'the warm interpreter has ended: {self.said.read().decode()}')

    def end(self) -> None:
        self.socket.close()
        self.process.wait()


def assert_user_error(result: subprocess.CompletedProcess, *words: str) -> None:
    """A few lines that name the problem, no traceback, exit code 1."""
    assert result.returncode == 1, result.stderr
    assert 'Traceback' not in result.stderr
    message = result.stderr[result.stderr.index('error: ') :]
    assert len(message.splitlines()) <= 15, message
    for word in words:
        assert word in message, message


def is_running(process: int) -> bool:
    state = subprocess.run(['ps', '-o', 'stat=', '-p', str(process)], capture_output=True, text=True).stdout
    return bool(state.strip()) and not state.startswith('Z')


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for what has to happen, however slow the machine is; it has failed to after minutes."""
    end = time.monotonic() + 300
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
