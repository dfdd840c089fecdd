"""A client of a server on the loopback interface that sends and reads raw bytes."""

import contextlib
import socket


def begin(server, data=b""):
    """A connection to `server.port` over which `data` has been sent."""
    one = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    one.sendall(data)
    return one


def rest(one):
    """The bytes that arrive until the other side closes."""
    data = b""
    with one, contextlib.suppress(ConnectionResetError):
        while piece := one.recv(1 << 16):
            data += piece
    return data
