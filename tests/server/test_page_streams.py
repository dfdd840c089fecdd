"""Event streams of the page, which Gradio by itself keeps open for ever: how many there may be, and when they end."""

import contextlib
import socket
import time

import pytest
from helpers.page_site import DATA, Browser, served

from fusion_jax.server import event_streams, gradio_proxy


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(event_streams, "_POLL", 0.1)


def listen(browser, session):
    """A connection on which a stream was asked for, where its head has come."""
    one = socket.create_connection((browser.http.base_url.host, browser.http.base_url.port), timeout=5)
    cookies = "; ".join(f"{name}={value}" for name, value in browser.http.cookies.items())
    one.sendall(f"GET {DATA}?session_hash={session} HTTP/1.1\r\nHost: x\r\nCookie: {cookies}\r\n\r\n".encode())
    time.sleep(0.05)
    return one


def ends(one, seconds=3.0):
    """What has come until the answer ended; None where it goes on."""
    reply, end = b"", time.monotonic() + seconds
    with contextlib.suppress(TimeoutError):
        while not reply.endswith(b"0\r\n\r\n") and b'{"detail"' not in reply:
            one.settimeout(max(end - time.monotonic(), 0.01))
            piece = one.recv(1 << 16)
            if not piece:
                break
            reply += piece
        return reply
    return None


def post(browser, session, question="What?"):
    number = browser.number("textbox", "image", "slider", "slider")
    assert browser.join(number, [question, None, 0, 8], session_hash=session).status_code == 200


def test_one_event_does_not_open_many_streams(site, visitor):
    """530 of them once held all connections for ever."""
    post(visitor, "abc")
    streams = [listen(visitor, "abc") for _ in range(20)]
    reply = [ends(one) for one in streams]
    assert None not in reply
    assert sum(b"HTTP/1.1 200" in one for one in reply) >= 1
    assert b"HTTP/1.1 404" in ends(listen(visitor, "abc"))  # nothing is on its way any more
    assert b"HTTP/1.1 404" in ends(listen(visitor, "never"))
    for one in streams:
        one.close()


def test_a_new_stream_of_a_session_ends_the_old_one(site, visitor):
    site[1].go.clear()
    post(visitor, "abc")
    first = listen(visitor, "abc")
    assert ends(first, 0.5) is None
    second = listen(visitor, "abc")
    assert ends(first).endswith(b"0\r\n\r\n")
    site[1].go.set()
    assert ends(second) is not None


def test_a_browser_has_few_streams_and_all_together_have_few(monkeypatch):
    monkeypatch.setattr(event_streams, "STREAMS_PER_BROWSER", 5)
    with served(streams=6) as (address, engine), Browser(address) as many, Browser(address) as one:
        engine.go.clear()
        post(one, "mine")
        mine, streams = listen(one, "mine"), []
        for k in range(7):
            post(many, f"page{k}")
            streams.append(listen(many, f"page{k}"))
        assert [ends(stream, 0.3) is not None for stream in streams] == [True] * 2 + [False] * 5
        with Browser(address) as third:
            post(third, "third")
            theirs = listen(third, "third")
            # Whoever holds most makes room.
            assert ends(theirs, 0.3) is None and ends(mine, 0.3) is None and ends(streams[2])
        engine.go.set()
        assert b"process_completed" in ends(mine)


def test_no_stream_is_endless(monkeypatch):
    real = event_streams.EventStreams
    monkeypatch.setattr(
        gradio_proxy, "EventStreams", lambda most, seconds, pending: real(most, 1.0, lambda session: True)
    )
    with served() as (address, engine), Browser(address) as one:
        engine.go.clear()
        post(one, "abc")
        stream, begun = listen(one, "abc"), time.monotonic()
        time.sleep(0.6)
        post(one, "abc")  # the time counts from the last event
        assert ends(stream, 5) is not None
        assert 1.5 < time.monotonic() - begun < 3
