"""Requests that take far more work or time than they have bytes, over real HTTP, while others are answered."""

import contextlib
import http.client
import socket
import threading
import time

import pytest
from helpers.echo_server import serving
from helpers.raw_client import begin, rest

from fusion_jax.server import connections, running_request
from fusion_jax.server.connections import Patience

CHUNK = b"1\r\n \r\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("echo"), Patience(connections=30), api_key="a-key") as one:
        yield one


def head(line, more=b""):
    return line + b" HTTP/1.1\r\nHost: x\r\n" + more + b"\r\n"


CHUNKED = b"Transfer-Encoding: chunked\r\n"
KEY = b"Authorization: Bearer a-key\r\n"


def health(server):
    """(status, seconds)"""
    begun = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    with contextlib.closing(connection):
        connection.request("GET", "/health")
        return connection.getresponse().status, time.monotonic() - begun


FLOODS = {
    "chunks behind an answer": (head(b"GET /health", CHUNKED), CHUNK * 1000),
    "chunks behind a refusal": (head(b"POST /v1/chat/completions", CHUNKED), CHUNK * 1000),
    "chunks of a body": (head(b"POST /v1/chat/completions", CHUNKED + KEY), CHUNK * 1000),
    "chunks with extensions": (head(b"POST /v1/chat/completions", CHUNKED + KEY), b"1;a=b\r\n \r\n" * 1000),
    "headers": (b"GET /health HTTP/1.1\r\n", b"a:\r\n" * 1000),
    "folded headers": (b"GET /health HTTP/1.1\r\na: b\r\n", b" \r\n" * 1000),
    "trailers": (head(b"POST /v1/chat/completions", CHUNKED + KEY) + b"0\r\n", b"a:\r\n" * 1000),
    "a plain body behind a refusal": (
        head(b"POST /v1/chat/completions", b"Content-Length: 999999999\r\n"),
        b" " * 6000,
    ),
}


@pytest.mark.parametrize("what", FLOODS)
def test_no_flood_holds_up_the_others(server, what):
    first, again = FLOODS[what]
    over = threading.Event()

    def flood():
        while not over.is_set():
            with contextlib.suppress(OSError), begin(server, first) as one:
                for _ in range(2000):
                    one.sendall(again)

    thread = threading.Thread(target=flood, daemon=True)
    thread.start()
    try:
        time.sleep(0.3)
        healths = [health(server) for _ in range(5)]
    finally:
        over.set()
        thread.join()
    assert {status for status, _ in healths} == {200}
    assert max(seconds for _, seconds in healths) < 1.0, healths
    assert not server.errors


@pytest.mark.parametrize("line", [b"POST /v1/chat/completions", b"GET /health", b"POST /nothing"])
def test_a_burst_of_tiny_chunks_is_not_taken_apart(server, line):
    """3 MB of them once took seven seconds of everybody's time."""
    one = begin(server, head(line, CHUNKED + KEY))
    thread = threading.Thread(target=_send, args=(one,), daemon=True)
    thread.start()
    time.sleep(0.05)
    status, seconds = health(server)
    assert status == 200 and seconds < 1.0
    thread.join(5)
    assert not thread.is_alive()  # the connection was closed
    one.close()


def _send(one):
    with contextlib.suppress(OSError):
        for _ in range(500):
            one.sendall(CHUNK * 1000)


def test_small_chunks_of_a_small_body_are_read(server):
    """What programs send that write JSON piece by piece."""
    body = b'{"messages": [{"role": "user", "content": "What is in the picture?"}], "max_tokens": 4}'
    sent = b"".join(b"1\r\n%c\r\n" % byte for byte in body + b" " * 800) + b"0\r\n\r\n"
    large = b"".join(b"400\r\n%s\r\n" % (b" " * 1024) for _ in range(2000)) + b"0\r\n\r\n"
    for chunks, answer in ((sent, b"HTTP/1.1 200"), (large, b"context_length_exceeded")):
        more = CHUNKED + KEY + b"Connection: close\r\n"
        assert answer in rest(begin(server, head(b"POST /v1/chat/completions", more) + chunks))
    tiny = b"1\r\n \r\n" * 1500 + b"0\r\n\r\n"
    reply = rest(begin(server, head(b"POST /v1/chat/completions", CHUNKED + KEY) + tiny))
    assert reply.startswith(b"HTTP/1.1 400") and b"invalid_http" in reply


def test_a_body_behind_its_answer_is_read_where_it_is_short(server):
    """The connection goes on; where the body is long it ends, and the caller gets the answer all the same."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    with contextlib.closing(connection):
        for _ in range(3):
            connection.request("POST", "/v1/chat/completions", b" " * 60_000)
            answer = connection.getresponse()
            assert answer.status == 401 and answer.read()
            kept = connection.sock
            assert kept is not None
    for framing, piece in (
        (b"Content-Length: 99999999\r\n", b" " * 10_000),
        (CHUNKED, b"2710\r\n%s\r\n" % (b" " * 10_000)),
    ):
        one, begun = begin(server, head(b"POST /v1/chat/completions", framing)), time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() - begun < 10:
                one.sendall(piece)
                time.sleep(0.01)
        assert connections.REST_SECONDS - 1 < time.monotonic() - begun < connections.REST_SECONDS + 2
        assert one.recv(100).startswith(b"HTTP/1.1 401")
        one.close()


def test_very_many_headers_are_refused(server):
    for count, status in ((connections.HEADERS - 1, b"200"), (connections.HEADERS, b"400")):
        sent = head(b"GET /health", b"".join(b"x-%d: y\r\n" % k for k in range(count - 1)) + b"Connection: close\r\n")
        assert rest(begin(server, sent))[9:12] == status


def test_requests_behind_others_are_answered_in_turn(server):
    reply = rest(begin(server, head(b"GET /health") * 3000 + head(b"GET /health", b"Connection: close\r\n")))
    assert reply.count(b"HTTP/1.1 200") == 3001


@pytest.mark.parametrize("line", [b"POST /v1/chat/completions", b"POST /nothing"])
def test_callers_who_send_slowly_do_not_shut_out_others(tmp_path, monkeypatch, line):
    """Without a key, as many as there may be; each has sent one byte of its body."""
    monkeypatch.setattr(connections, "HELD_SECONDS", 0.6)
    with serving(tmp_path, Patience(connections=20)) as server:
        slow = [begin(server, head(line, b"Content-Length: 9000\r\n") + b"p") for _ in range(20)]
        time.sleep(1.5)
        for _ in range(25):
            assert health(server)[0] == 200
        assert not server.errors
        for one in slow:
            one.close()


def test_callers_who_do_not_read_do_not_shut_out_others(tmp_path, monkeypatch):
    monkeypatch.setattr(connections, "HELD_SECONDS", 0.6)
    monkeypatch.setattr(
        running_request, "_sse", lambda data, real=running_request._sse: real(data) + b": padding\n" * 1_000_000
    )
    body = b'{"messages": [{"role": "user", "content": "What?"}], "stream": true, "max_tokens": 4}'
    with serving(tmp_path, Patience(connections=10)) as server:
        deaf = []
        for _ in range(10):
            one = socket.socket()
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.connect(("127.0.0.1", server.port))
            one.sendall(head(b"POST /v1/chat/completions", b"Content-Length: %d\r\n" % len(body)) + body)
            deaf.append(one)
        time.sleep(2)
        assert [health(server)[0] for _ in range(5)] == [200] * 5
        for one in deaf:
            one.close()


def test_a_quick_body_keeps_its_connection(tmp_path, monkeypatch):
    """Where all others send slowly, it is not the quick one that goes."""
    monkeypatch.setattr(connections, "HELD_SECONDS", 0.6)
    with serving(tmp_path, Patience(connections=10)) as server:
        body = b'{"messages": [{"role": "user", "content": "What is in the picture?"}], "max_tokens": 4}'
        size = 40 * 8192 + len(body)
        quick = begin(server, head(b"POST /v1/chat/completions", b"Content-Length: %d\r\nConnection: close\r\n" % size))
        slow = [begin(server, head(b"POST /v1/chat/completions", b"Content-Length: 9\r\n")) for _ in range(9)]
        for k in range(40):
            quick.sendall(b" " * 8192)
            time.sleep(0.05)
            if k > 30:
                slow.append(begin(server, b""))
        quick.sendall(body)
        assert b"context_length_exceeded" in rest(quick)  # it was read
        for one in slow:
            one.close()
