"""Connections that speak HTTP badly, slowly, too much or not at all; some are left open for those that follow."""

import contextlib
import json
import socket
import struct
import time

from helpers import echo_server

from fusion_jax.server.connections import Patience

QUICK = 400
_CHECK = 40  # attempts between two looks at the server
_KEPT = 60  # connections that are left open at most, more than there may be
_PATIENCE = Patience(connections=40, header_seconds=1.0, body_seconds=1.0, write_seconds=1.0)
_BODY = json.dumps({"messages": [{"role": "user", "content": "What is in the picture?"}], "max_tokens": 4}).encode()
_STREAM = json.dumps({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 64, "stream": True}).encode()
_LINES = [
    b"POST /v1/chat/completions HTTP/1.1",
    b"GET /health HTTP/1.1",
    b"GET /metrics HTTP/1.1",
    b"GET /v1/models/%2e%2e%00%ff HTTP/1.1",
    b"POST /v1/chat/completions/ HTTP/1.1",
    b"POST /v1/chat/completions HTTP/1.0",
    b"HEAD /health HTTP/1.1",
    b"HEAD /v1/chat/completions HTTP/1.1",
    b"OPTIONS * HTTP/1.1",
    b"CONNECT 127.0.0.1:80 HTTP/1.1",
    b"GET http://127.0.0.1/health HTTP/1.1",
    b"PRI * HTTP/2.0",
    b"POST /v1/chat/completions HTTP/9.9",
    b"post /v1/chat/completions HTTP/1.1",
    b"GET  /health HTTP/1.1",
    b"GET /health",
    b"GET /" + b"a" * 30_000 + b" HTTP/1.1",
    b"GET /\xff\xfe HTTP/1.1",
    b"\x16\x03\x01\x02\x00\x01\x00",
    b"",
]
_HEADERS = [
    b"Host: x",
    b"Host: [",
    b"Host: a\x00b",
    b"Host: evil.example",
    b"Host: evil.example@x",
    b"Host: [::1]:8000:8000",
    b"Host: \xff.example",
    b"Origin: http://evil.example",
    b"Origin: http://x",
    b"Origin: null",
    b"Origin: \xff",
    b"Sec-Fetch-Site: cross-site",
    b"Sec-Fetch-Site: same-origin",
    b"Content-Type: text/plain",
    b"Connection: close",
    b"Connection: keep-alive, Upgrade",
    b"Upgrade: websocket",
    b"Upgrade: h2c",
    b"Expect: 100-continue",
    b"Expect: 200-ok",
    b"Transfer-Encoding: chunked",
    b"Transfer-Encoding: gzip, chunked",
    b"Transfer-Encoding : chunked",
    b"Transfer-Encoding: \x0bchunked",
    b"Content-Length: 0",
    b"Content-Length: 5",
    b"Content-Length: -1",
    b"Content-Length: +5",
    b"Content-Length: 5, 5",
    b"Content-Length: 5, 6",
    b"Content-Length: 99999999999999999999",
    b"Content-Length: 40000000",
    b"Content-Length: 0x5",
    b"Content-Encoding: gzip",
    b"Content-Type: application/json; charset=utf-16",
    b"Authorization: bearer",
    b"Authorization: \xff\xfe",
    b"X: " + b"a" * 70_000,
    b"X:" + b" " * 500,
    b" folded: yes",
    b": empty",
    b"no colon",
    b"X: a\rb",
    b"\x00: a",
]
_ENDS = [b"\r\n", b"\r\n", b"\r\n", b"\n", b"\r", b"\r\r\n"]


def _chunked(body: bytes, random) -> bytes:
    pieces, at = b"", 0
    while at < len(body):
        size = int(random.integers(1, 40))
        named = size + int(random.choice([0, 0, 0, 0, 0, 0, 0, 0, 1, -1]))
        extra = [b"", b"", b"", b";a=b", b";" + b"x" * 3000, b" "][random.integers(6)]
        pieces += b"%x" % max(named, 0) + extra + b"\r\n" + body[at : at + size] + b"\r\n"
        at += size
    return (
        pieces
        + [b"0\r\n\r\n", b"0\r\n\r\n", b"", b"0\r\nTrailer: a\r\n\r\n", b"ffffffffffffffff\r\n", b"-1\r\n"][
            random.integers(6)
        ]
    )


def _request(random) -> bytes:
    """One request, right or wrong."""
    body = [_BODY, _BODY, _STREAM, b"", b"{", random.bytes(int(random.integers(5000)))][random.integers(6)]
    if random.random() < 0.6:
        how = random.integers(3)
        head = (b"HEAD" if random.random() < 0.1 else b"POST") + b" /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
        if how == 0:
            return head + b"Transfer-Encoding: chunked\r\n\r\n" + _chunked(body, random)
        length = len(body) + (0 if how == 1 else int(random.integers(-9, 10)))
        return head + b"Content-Length: %d\r\n\r\n" % max(length, 0) + body
    end = _ENDS[random.integers(len(_ENDS))]
    headers = [_HEADERS[random.integers(len(_HEADERS))] for _ in range(random.choice([0, 1, 2, 3, 5, 150]))]
    if random.random() < 0.5:
        headers.append(b"Host: x")
    if random.random() < 0.4:
        headers.append(b"Content-Length: %d" % len(body))
    return end.join([_LINES[random.integers(len(_LINES))], *headers, b"", b""]) + body


def _sent(random) -> bytes:
    data = b"".join(_request(random) for _ in range(random.choice([1, 1, 1, 2, 3, 30])))
    kind = random.integers(6)
    if kind == 0:
        return data[: random.integers(len(data) + 1)]
    if kind == 1:
        data = bytearray(data)
        for _ in range(random.integers(1, 8)):
            data[random.integers(len(data))] = random.integers(256)
    return bytes(data)


def attempts(random, folder):
    kept: list[socket.socket] = []
    options = {"patience": _PATIENCE, "timeout": 5.0, "body_seconds": 1.0, "bodies_bytes": 1 << 20}
    with echo_server.serving(folder, rows=2, queue=4, **options) as server:
        try:
            number = 0
            while True:
                data, leaves = (
                    _sent(random),
                    ("reads", "reads", "stays", "resets", "closes", "drips")[random.integers(6)],
                )
                number += 1

                def attempt(data=data, leaves=leaves, look=number % _CHECK == 0):
                    return _try(server, data, leaves, look, kept)

                yield f"{leaves}: {data[:150]!r}", attempt
        finally:
            for one in kept:
                one.close()


def _try(server, data: bytes, leaves: str, look: bool, kept: list[socket.socket]) -> str:
    reply = b""
    one = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        pieces = [data[at : at + 7] for at in range(0, min(len(data), 140), 7)] if leaves == "drips" else [data]
        for piece in pieces:
            one.sendall(piece)
        if leaves == "reads":
            begun = time.monotonic()
            one.settimeout(0.1)
            with contextlib.suppress(TimeoutError):
                reply = one.recv(1 << 16)
            one.settimeout(10)
            with contextlib.suppress(OSError):  # closed by the server
                one.shutdown(socket.SHUT_WR)
            while piece := one.recv(1 << 16):
                reply += piece
            assert time.monotonic() - begun < 8, "the connection stayed open"
    if leaves in ("stays", "drips"):
        kept.append(one)
        if len(kept) > _KEPT:
            kept.pop(0).close()
    else:
        if leaves == "resets":
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        one.close()
    for answer in reply.split(b"HTTP/1.1 ")[1:]:
        assert not answer.startswith(b"500"), answer[:200]
    if look:
        _look(server)
    return "accepted" if b"HTTP/1.1 200" in reply else "refused"


def _look(server) -> None:
    """The server answers a good request, and nothing is held for those that came before."""
    assert not server.errors, server.errors
    end = time.monotonic() + 8
    while True:  # the connections that were left open may fill it for the time that they have
        reply = b""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", server.port), timeout=10) as one:
            one.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n")
            one.sendall(b"Content-Length: %d\r\n\r\n" % len(_BODY) + _BODY)
            while piece := one.recv(1 << 16):
                reply += piece
        if reply.startswith(b"HTTP/1.1 200") and server.engine.reserved == 0:
            return
        assert time.monotonic() < end, (server.engine.reserved, reply[:200])
        time.sleep(0.1)
