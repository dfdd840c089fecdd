"""A server on the loopback interface that sends exactly the bytes that a test wants."""

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator

Talk = Callable[[socket.socket, bytes], None]  # takes the connection and the head of the request, and answers


def answer(body: bytes = b"", status: str = "200 OK", *headers: str) -> bytes:
    """A complete answer, after which the connection is closed."""
    lines = (f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers, "", "")
    return "\r\n".join(lines).encode("latin-1") + body


def says(*pieces: bytes, every: float = 0.0) -> Talk:
    """Sends the pieces, one every `every` seconds, and closes the connection."""

    def talk(connection: socket.socket, _head: bytes) -> None:
        for piece in pieces:
            connection.sendall(piece)
            threading.Event().wait(every)

    return talk


@contextlib.contextmanager
def serving(talk: Talk, tls: ssl.SSLContext | None = None) -> Iterator[tuple[int, list[bytes]]]:
    """The port of a server that answers each connection by `talk`, and the heads of the requests so far."""
    heads: list[bytes] = []
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)

    def one(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection.settimeout(20)
            if tls is not None:
                connection = tls.wrap_socket(connection, server_side=True)
            with connection:
                received = b""
                while b"\r\n\r\n" not in received:
                    piece = connection.recv(1 << 16)
                    if not piece:
                        return
                    received += piece
                head, _, body = received.partition(b"\r\n\r\n")
                for line in head.lower().split(b"\r\n"):
                    if line.startswith(b"content-length:"):
                        while len(body) < int(line.partition(b":")[2]):
                            body += connection.recv(1 << 16)
                heads.append(head)
                talk(connection, head)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=one, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listener.getsockname()[1], heads
    finally:
        # Closing alone would leave the thread in `accept` with a port that is taken.
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
