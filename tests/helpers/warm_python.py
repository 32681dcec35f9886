"""What ``python`` is, for command lines that warm_interpreter.py runs: its exit code, its streams, its signals.

Imports nothing that takes long: this is what is started in the place of an interpreter.
"""

import contextlib
import json
import os
import resource
import signal
import socket
import sys

FORWARDED = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2


def main(folder: str, argv: list[str]) -> None:
    """Have ``python ARGV`` run by the interpreter whose socket is in ``folder``, and end as it does."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with contextlib.suppress(ConnectionError, FileNotFoundError):  # receive() says why
        server.connect(f'{folder}/socket')
    server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    ignored = [number for number in FORWARDED if signal.getsignal(number) == signal.SIG_IGN]
    request = dict(argv=argv, cwd=os.getcwd(), env=dict(os.environ), ignored=ignored)
    # What arrives before there is a process to forward it to waits.
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    with contextlib.suppress(OSError):
        socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
    process = receive(server, folder)
    for number in set(FORWARDED) - set(ignored):
        signal.signal(number, lambda number, frame: os.kill(process, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    code = receive(server, folder)
    if code < 0:  # a signal has ended it
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def receive(server: socket.socket, folder: str) -> int:
    with contextlib.suppress(OSError):
        if answer := server.recv(64):
            return int(answer)
    with open(f'{folder}/said') as said:
        sys.exit(f'the warm interpreter has ended: {said.read()}')
