"""An interpreter that has imported what the command lines need, and forks for each of them. Started by tools.py.

Reads requests from the socket whose descriptor is its argument; each comes with the stdin, stdout and stderr of a
command line. Answers with the process's id, and with its exit code when it has ended.
"""

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
IMPORTED = 'cv2', 'matplotlib.pyplot', 'mmengine.runner', 'mmseg.apis', 'mmpretrain.models', 'timm'
PACKAGE = 'projects.recnext.recnext'
LONGEST = 1 << 20
"""Bytes of a request."""


def import_what_tools_need() -> None:
    """Import and no more: nothing is built, run, logged or asked for that a command line would find done already."""
    package = importlib.import_module(PACKAGE)
    parts = [module.name for module in pkgutil.walk_packages(package.__path__, f'{PACKAGE}.')]
    # Configs import the classifier, and it is for the tests to see that they do.
    parts.remove(f'{PACKAGE}.models.classifier')
    for name in [*IMPORTED, *parts]:
        with contextlib.suppress(ImportError):  # what is not installed, a command line will say itself
            importlib.import_module(name)
    assert len(os.listdir('/proc/self/task')) == 1, 'a fork would lack the threads that an import has started'
    tempfile.tempdir = None  # each command line has its own TMPDIR
    gc.collect()
    gc.freeze()


def next_request(client: socket.socket) -> dict:
    """Fork for every request. Returns in the forked processes alone: the server itself ends when its client has."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(client, LONGEST, 3)
        if not message:
            end_all()
        process = os.fork()
        if process == 0:
            client.close()
            for standard, descriptor in enumerate(descriptors):
                os.dup2(descriptor, standard)
                os.close(descriptor)
            return json.loads(message)
        for descriptor in descriptors:
            os.close(descriptor)
        client.send(str(process).encode())
        client.send(str(exit_code(process, client)).encode())


def exit_code(process: int, client: socket.socket) -> int:
    """Wait for ``process``, negative if a signal ended it, but no longer than there is a client."""
    ended = os.pidfd_open(process)
    readable, _, _ = select.select([ended, client], [], [])
    if client in readable:
        end_all()
    os.close(ended)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def end_all() -> None:
    """End this process and all that were started from it: it leads a session of its own."""
    os.killpg(0, signal.SIGKILL)


def become(request: dict) -> None:
    """Make this process what an interpreter is that was started as ``python tools/NAME.py ...``."""
    os.chdir(request['cwd'])
    os.environ.clear()
    os.environ.update(request['env'])
    if 'OMP_NUM_THREADS' in os.environ:
        torch.set_num_threads(int(os.environ['OMP_NUM_THREADS']))
    # Python's own random numbers begin anew in every fork.
    np.random.seed()
    torch.random.default_generator.seed()
    sys.argv = request['argv']
    sys.path[:2] = [str(Path(sys.argv[0]).parent)]


if __name__ == '__main__':
    sys.path.insert(0, str(ROOT))
    import_what_tools_need()
    become(next_request(socket.socket(fileno=int(sys.argv[1]))))
    # An exception or sys.exit() ends this interpreter as it would any other.
    runpy.run_path(sys.argv[0], run_name='__main__')
