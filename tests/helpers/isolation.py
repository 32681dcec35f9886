"""Tests reach no further than this machine."""

import socket

LOCAL = ('127.0.0.1', 'localhost', '::1', '0.0.0.0', '::', '', None)


def stay_on_this_machine(event: str, arguments: tuple) -> None:
    """An audit hook that ends what would look up or reach another machine."""
    if event == 'socket.connect' and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    elif event in ('socket.getaddrinfo', 'socket.gethostbyname'):
        host = arguments[0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    # .invalid is nobody's, by RFC 2606.
    if host not in (*LOCAL, socket.gethostname()) and not host.endswith('.invalid'):
        raise PermissionError(f'tests connect to this machine alone, and not to {host}')
