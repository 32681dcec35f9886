"""The command lines as a user runs them."""

import subprocess
import sys

from helpers.reference import ROOT


def run_tool(name: str, *args: object, **kwargs: object) -> subprocess.CompletedProcess:
    """Run a command line of ``tools/`` in a process of its own."""
    command = [sys.executable, ROOT / 'tools' / f'{name}.py', *args]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600, **kwargs)


def assert_user_error(result: subprocess.CompletedProcess, *words: str) -> None:
    """A few lines that name the problem, no traceback, exit code 1."""
    assert result.returncode == 1, result.stderr
    assert 'Traceback' not in result.stderr
    message = result.stderr[result.stderr.index('error: ') :]
    assert len(message.splitlines()) <= 15, message
    for word in words:
        assert word in message, message


def descendants(ancestor: int) -> list[int]:
    """Processes under ``ancestor``, children before grandchildren."""
    listing = subprocess.run(['ps', '-eo', 'pid=,ppid=,stat='], capture_output=True, text=True).stdout.splitlines()
    rows = [(int(pid), int(parent)) for pid, parent, state in map(str.split, listing) if 'Z' not in state]
    found = [ancestor]
    for process in found:
        found += [pid for pid, parent in rows if parent == process]
    return found[1:]
