"""Limits the connections that callers hold open: their number, and their time in each state.

By itself uvicorn waits without limit for headers, for a body and for a reader. Here a connection is always in one of
these states, each with a limit:

    idle        no request: the first bytes, or the rest of the headers, are awaited     header_seconds, then 408
    body        the headers have arrived, the body has not                               body_seconds, then 408
    writing     the caller does not read what is written                                 write_seconds, then cut
    closing     the last bytes are on their way to a caller who may not read them        write_seconds, then cut
    answering   the application works on the answer; its own deadline applies

Nor does uvicorn limit how much it parses at a time: all bytes that have arrived are parsed before another connection
gets its turn. Here little is read at a time, and a request with very many headers or very small chunks is refused.
"""

import asyncio
import functools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass

import h11
import uvicorn
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol

from fusion_jax.server.error import ApiError

LOOK = 0.5  # seconds between two checks of a connection
_LAST_ANSWERS = 5  # seconds for the last answers of a server that is shutting down
_GRACE = 5.0  # seconds for the application itself to answer that a body is late
_READ = 1 << 14  # bytes that are read and parsed at a time
HEADER_BYTES = 1 << 15
HEADERS = 128
CHUNKS = 1000  # chunks of a body that may have any size
CHUNK_BYTES = 256  # least mean size in bytes of the chunks after these
REST_BYTES = 1 << 16  # bytes of a body that are still read after its request has been answered
REST_SECONDS = 2.0  # seconds for a caller to read the answer while it is still sending
# Where all connections are in use, one is closed for a new one if it has waited for its caller for HELD_SECONDS and
# the caller sends fewer than HELD_RATE bytes a second, or reads nothing.
HELD_SECONDS = 2.0
HELD_RATE = 1 << 14


@dataclass(frozen=True)
class Patience:
    """Limits of the connections. connections: most that are open at a time. The seconds are explained above."""

    connections: int = 512
    header_seconds: float = 10.0
    body_seconds: float = 60.0
    write_seconds: float = 30.0


class _Http(h11.Connection):
    """h11's parser, which also refuses requests that take far more work than their bytes suggest."""

    def __init__(self):
        super().__init__(h11.SERVER, HEADER_BYTES)
        self._chunks = self._bytes = 0

    def next_event(self):
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._chunks = self._bytes = 0
            if len(event.headers) > HEADERS:
                raise h11.RemoteProtocolError("too many headers")
        elif isinstance(event, h11.Data):
            self._chunks += event.chunk_start
            self._bytes += len(event.data)
            if self._chunks > CHUNKS and self._bytes < (self._chunks - CHUNKS) * CHUNK_BYTES:
                raise h11.RemoteProtocolError("too many small chunks")
        return event


class _Flow(FlowControl):
    """uvicorn's flow control, which also stops reading where pipelined requests wait for an earlier answer."""

    def __init__(self, transport: asyncio.Transport, http: h11.Connection):
        super().__init__(transport)
        self._http = http

    def resume_reading(self) -> None:
        if self._http.their_state is not h11.DONE or len(self._http.trailing_data[0]) < HEADER_BYTES:
            super().resume_reading()


class Connection(H11Protocol, asyncio.BufferedProtocol):
    """uvicorn's HTTP/1.1 with these limits.

    Where there are too many connections, one that waits for its caller is closed: the one that has been idle for
    longest, or else the one that has been held for longest. So callers who send nothing, send slowly or do not read
    cannot lock others out. Where all are being answered, the new one gets status 503.
    """

    def __init__(self, patience: Patience, **named):
        super().__init__(**named)
        self.conn = _Http()
        self._patience = patience
        self._buffer = bytearray(_READ)
        self._seen, self._since = "", time.monotonic()  # its state at the last check, and since when
        self._sent = 0  # bytes that the caller has sent since then
        self._answered = None  # the request whose answer came before its body, and the body's bytes since then
        self._rest = 0
        self._next_look: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.flow = _Flow(transport, self.conn)
        self._next_look = self.loop.call_later(LOOK, self._look)
        if len(self.connections) > self._patience.connections:
            others = [one for one in self.connections if one is not self]
            candidates = [one for one in others if one.at() == "idle"] or [one for one in others if one.held()]
            if not candidates:
                self.end(ApiError(503, "Too many connections are open; try again.", "too_many_connections"))
                return
            oldest = min(candidates, key=lambda one: one._since)
            if oldest.at() in ("writing", "closing"):
                oldest.transport.abort()
            else:
                slow = ApiError(408, "The request's body came too slowly for a busy server.", "timeout")
                oldest.end(slow if oldest.at() == "body" else None)

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._buffer

    def buffer_updated(self, count: int) -> None:
        self._sent += count
        # The bytes in which one request ends may also begin the next.
        if not self._answered_early() or self.cycle is not self._answered:
            self._answered, self._rest = self.cycle, 0
        if self._answered_early() and self._rest <= REST_BYTES:
            self._rest += count
            if self._rest > REST_BYTES and self.transport.can_write_eof():
                self.transport.write_eof()  # the answer is complete; reading continues, so that the caller receives it
        if self._rest <= REST_BYTES:
            self.data_received(bytes(self._buffer[:count]))

    def _answered_early(self) -> bool:
        """Whether the answer has been sent before the request's body has arrived."""
        return self.cycle is not None and self.cycle.response_complete and self.conn.their_state is h11.SEND_BODY

    def held(self) -> bool:
        """Whether the connection has waited for its caller for long enough to be closed in favour of another."""
        waited = time.monotonic() - self._since
        at = self.at()
        if at != self._seen or waited < HELD_SECONDS:
            return False
        return at in ("writing", "closing") or (at == "body" and self._sent < waited * HELD_RATE)

    def connection_lost(self, exc: Exception | None) -> None:
        self._next_look.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._seen, self._since = "", time.monotonic()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        self.end(ApiError(400, "This is not a valid HTTP request.", "invalid_http"))

    def at(self) -> str:
        """The state of the connection, as in the module's table."""
        if self.transport.is_closing():
            return "closing"
        if self.cycle is None or self.cycle.response_complete:
            return "idle"
        if self.conn.their_state is h11.SEND_BODY:
            return "body"
        return "writing" if self.flow.write_paused else "answering"

    def _look(self) -> None:
        self._next_look = self.loop.call_later(LOOK, self._look)
        at, now, patience = self.at(), time.monotonic(), self._patience
        if at != self._seen:
            # An idle connection has been waiting since its last answer, not since this check.
            self._since = self._since if not self._seen else now
            self._seen, self._sent = at, 0
        waited = now - self._since
        if at == "idle" and waited > min(patience.header_seconds, REST_SECONDS) and self._answered_early():
            self.end()
        elif at == "idle" and waited > patience.header_seconds:
            begun = bool(self.conn.trailing_data[0])  # before the first byte of a request no answer is due
            self.end(ApiError(408, "The request's headers did not arrive in time.", "timeout") if begun else None)
        elif at == "body" and waited > patience.body_seconds + _GRACE:
            self.end(ApiError(408, "The request's body did not arrive in time.", "timeout"))
        elif at in ("writing", "closing") and waited > patience.write_seconds:
            self.transport.abort()

    def end(self, error: ApiError | None = None) -> None:
        """Closes the connection, after an answer with the error where none has begun."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # the application cannot send anything more
            self.cycle.message_event.set()
        if error is not None and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(error.body()).encode()
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
            ]
            events = [h11.Response(status_code=error.status, headers=headers), h11.EndOfMessage()]
            if self.conn.our_state is h11.IDLE or self.scope is None or self.scope["method"] != "HEAD":
                events.insert(1, h11.Data(data=body))
            self.transport.write(b"".join(self.conn.send(event) for event in events))
        self.transport.close()


class Server(uvicorn.Server):
    """Extends uvicorn's server to end open requests with an error when their time is up.

    By itself uvicorn cancels their tasks: streams break off without an error, each with a traceback in the log.
    """

    def __init__(self, config: uvicorn.Config, drain_seconds: float, give_up: Callable[[], None]):
        super().__init__(config)
        self._drain, self._give_up = drain_seconds, give_up

    async def shutdown(self, sockets=None) -> None:
        timer = asyncio.get_running_loop().call_later(self._drain, self._end_requests)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()

    def _end_requests(self) -> None:
        """Ends every open request."""
        self._give_up()  # ends every answer with an error
        for connection in list(self.server_state.connections):
            if connection.at() in ("body", "writing", "closing"):  # no answer can be sent to these
                connection.transport.abort()


def make_server(
    app,
    host: str,
    port: int,
    patience: Patience,
    drain_seconds: float,
    problem: Callable[[], str] = str,
    give_up: Callable[[], None] = lambda: None,
) -> Server:
    """The server of an application.

    Args:
      drain_seconds: seconds for open requests when the server is shutting down.
      give_up: called after these; must end all answers.
      problem: why the server cannot continue, "" while it can. With a problem it ends, within _LAST_ANSWERS seconds.
    """

    async def watch() -> None:
        if problem():
            server.config.timeout_graceful_shutdown = _LAST_ANSWERS
            server.should_exit = True

    server = Server(
        uvicorn.Config(
            app,
            host,
            port,
            loop="asyncio",  # uvloop would read any amount at a time
            http=functools.partial(Connection, patience),
            ws="none",
            log_level="error",  # anybody could cause any number of warnings
            timeout_graceful_shutdown=drain_seconds + _LAST_ANSWERS,
            callback_notify=watch,
            timeout_notify=0,
        ),
        drain_seconds,
        give_up,
    )
    return server
