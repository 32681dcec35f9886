"""An interpreter that has imported what the command lines need, and forks for each of them. Started by tools.py.

Its arguments are the path of a socket, at which warm_python.py asks for runs, and the descriptor of another, which is
closed when pytest has ended: it then ends as well, and all that it has started.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import pkgutil
import runpy
import selectors
import signal
import socket
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IMPORTED = (
    *('cv2', 'matplotlib.pyplot', 'mmengine.runner', 'mmseg.apis', 'mmpretrain.models', 'timm'),
    *('torch.distributed.launcher.api', 'torch.distributed.elastic.rendezvous.c10d_rendezvous_backend'),  # torchrun's
)
PACKAGE = 'projects.recnext.recnext'
AT_START = 'PYTHON', 'LD_', 'OPENBLAS_', 'MKL_', 'CUDA_'
"""Beginnings of the variables that mean nothing to a process once it runs."""
LATER = 'PYTHON', 'PYTHON_EXEC'
"""What begins so and is read by our scripts and by torchrun."""
LONGEST = 1 << 20
"""Bytes of a request."""


def import_what_tools_need() -> None:
    """Import and no more: nothing is built, run, logged or asked for that a command line would find done already."""
    package = importlib.import_module(PACKAGE)
    parts = [module.name for module in pkgutil.walk_packages(package.__path__, f'{PACKAGE}.')]
    # Configs import the classifier, and it is for the tests to see that they do.
    parts.remove(f'{PACKAGE}.openmmlab.classifier')
    for name in [*IMPORTED, *parts]:
        with contextlib.suppress(ImportError):  # what is not installed, a command line will say itself
            importlib.import_module(name)
    assert len(os.listdir('/proc/self/task')) == 1, 'a fork would lack the threads that an import has started'
    tempfile.tempdir = None  # each command line has its own TMPDIR
    gc.collect()
    gc.freeze()


def next_request(listener: socket.socket, lifeline: socket.socket) -> dict:
    """Fork for every request. Returns in the forked processes alone."""
    selector = selectors.DefaultSelector()
    for known in (listener, lifeline):
        selector.register(known, selectors.EVENT_READ)
    while True:
        key, _ = selector.select()[0]  # one at a time: it may take away what would come next
        if key.fileobj is lifeline:
            for other in selector.get_map().values():
                if isinstance(other.fileobj, int):
                    end(other.data[0])
            os._exit(0)
        elif key.fileobj is listener:
            client, _ = listener.accept()
            if request := answer_to(client, selector):
                return request
        elif isinstance(key.fileobj, int):  # a process has ended
            process, client = key.data
            selector.unregister(key.fileobj)
            os.close(key.fileobj)
            if client in selector.get_map():
                selector.unregister(client)
            code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            with client:
                tell(client, code)
        else:  # a client is gone, but not its process
            selector.unregister(key.fileobj)
            end(key.data)


def answer_to(client: socket.socket, selector: selectors.BaseSelector) -> dict | None:
    """Fork. The request in the forked process, and nothing here."""
    message, descriptors, _, _ = socket.recv_fds(client, LONGEST, 3)
    if not message:
        client.close()
        return None
    process = os.fork()
    if process == 0:
        os.setsid()
        for key in list(selector.get_map().values()):
            os.close(key.fileobj) if isinstance(key.fileobj, int) else key.fileobj.close()
        selector.close()
        client.close()
        for standard, descriptor in enumerate(descriptors):
            os.dup2(descriptor, standard)
            os.close(descriptor)
        return json.loads(message)
    for descriptor in descriptors:
        os.close(descriptor)
    tell(client, process)
    selector.register(client, selectors.EVENT_READ, process)
    selector.register(os.pidfd_open(process), selectors.EVENT_READ, (process, client))
    return None


def tell(client: socket.socket, number: int) -> None:
    with contextlib.suppress(ConnectionError):  # it may have been killed
        client.send(str(number).encode())


def end(process: int) -> None:
    """And what it has started, unless it is too young to lead a session."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError):
            kill(process, signal.SIGKILL)


def become(request: dict) -> None:
    """Make this process what an interpreter is that was started with the request's arguments."""
    import numpy as np
    import torch

    different = {name for name, _ in request['env'].items() ^ ENVIRONMENT.items()}
    if refused := sorted(name for name in different if name.startswith(AT_START) and name not in LATER):
        sys.exit(f'{", ".join(refused)}: read when an interpreter starts, hence fresh=True')
    os.chdir(request['cwd'])
    os.environ.clear()
    os.environ.update(request['env'])
    if 'OMP_NUM_THREADS' in os.environ:
        torch.set_num_threads(int(os.environ['OMP_NUM_THREADS']))
    # Python's own random numbers begin anew in every fork.
    np.random.seed()
    torch.random.default_generator.seed()
    for number in request['ignored']:
        signal.signal(number, signal.SIG_IGN)


def run(argv: list[str]) -> None:
    """``[-u] (-m MODULE | SCRIPT) ...``"""
    if argv[0] == '-u':
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(write_through=True)
        argv = argv[1:]
    kind, rest = argv[0], argv[1:]
    del sys.path[0]
    if kind == '-m':
        sys.path.insert(0, os.getcwd())
        sys.argv = rest
        runpy.run_module(rest[0], run_name='__main__', alter_sys=True)
    else:
        sys.path.insert(0, str(Path(kind).absolute().parent))
        sys.argv = argv
        runpy.run_path(kind, run_name='__main__')


def run_to_the_end(argv: list[str]) -> None:
    """End as an interpreter does, but without taking everything apart that is imported: that takes half a second."""
    code, signalled = 0, 0
    try:
        run(argv)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if code and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException as error:
        code, signalled = 1, signal.SIGINT if isinstance(error, KeyboardInterrupt) else 0
        sys.excepthook(type(error), error, error.__traceback__)
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if signalled:
        signal.signal(signalled, signal.SIG_DFL)
        os.kill(os.getpid(), signalled)
    os._exit(code & 0xFF)


if __name__ == '__main__':
    ENVIRONMENT = dict(os.environ)
    # Without these an import would start a thread, or ask the GPU for what no fork can use after it.
    os.environ.update(OPENBLAS_NUM_THREADS='1', PYTORCH_NVML_BASED_CUDA_CHECK='1')
    sys.path.insert(1, str(ROOT))
    # Before the imports: who asks in the meantime has to wait, and is answered.
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(sys.argv[1])
    listener.listen(64)
    import_what_tools_need()
    request = next_request(listener, socket.socket(fileno=int(sys.argv[2])))
    sys.path.remove(str(ROOT))
    become(request)
    run_to_the_end(request['argv'])
