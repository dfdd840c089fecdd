"""Connections that strangers hold: how many there may be, and how long each may take for what it is at.

uvicorn itself waits for ever for headers, for a body and for a reader. A connection is always at one of these:

    idle        no request: the first bytes, or the rest of the headers, are awaited     header_seconds, then 408
    body        the headers are here, the body is not                                    body_seconds, then 408
    writing     the caller does not read what is written                                 write_seconds, then cut
    closing     the last bytes are on their way to a caller who may not read them        write_seconds, then cut
    answering   the application works: its own deadline counts

Nor does it bound what it takes at once: whatever has arrived is taken apart before anybody else has a turn. Here little
is read at a time, and a request of very many headers or of very small chunks is refused.
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

LOOK = 0.5  # seconds between two looks at a connection
_FAREWELL = 5  # seconds for the last answers of a server that has failed
_GRACE = 5.0  # seconds that the application has to say by itself that a body is late
_READ = 1 << 14  # bytes that are read, and taken apart, at a time
HEADER_BYTES = 1 << 15
HEADERS = 128
CHUNKS = 1000  # of a body that may have any size; those of a body with more have
CHUNK_BYTES = 256  # bytes at least, on the average
REST_BYTES = 1 << 16  # of a body that are still read when its request has been answered
REST_SECONDS = 2.0  # that a caller has to take the answer while he still sends
# A connection makes room for a new one where all are taken, if for so many seconds it was waiting for its caller,
HELD_SECONDS = 2.0
HELD_RATE = 1 << 14  # and he has sent fewer bytes a second, and read nothing


@dataclass(frozen=True)
class Patience:
    """connections: open at once at most. The seconds are explained above."""

    connections: int = 512
    header_seconds: float = 10.0
    body_seconds: float = 60.0
    write_seconds: float = 30.0


class _Http(h11.Connection):
    """h11's, which refuses requests that take far more work than they have bytes."""

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
    """uvicorn's, which does not read on behind requests that wait for the answer to another."""

    def __init__(self, transport: asyncio.Transport, http: h11.Connection):
        super().__init__(transport)
        self._http = http

    def resume_reading(self) -> None:
        if self._http.their_state is not h11.DONE or len(self._http.trailing_data[0]) < HEADER_BYTES:
            super().resume_reading()


class Connection(H11Protocol, asyncio.BufferedProtocol):
    """uvicorn's HTTP/1.1 with these limits.

    Beyond the number of connections one makes room that has waited for its caller: the one that has been idle for
    longest, or else the one that has been held for longest. So those who ask nothing, send slowly or do not read shut
    nobody out. Where all are being answered the new one gets status 503.
    """

    def __init__(self, patience: Patience, **named):
        super().__init__(**named)
        self.conn = _Http()
        self._patience = patience
        self._buffer = bytearray(_READ)
        self._seen, self._since = "", time.monotonic()  # what it was at when last looked at, and since when
        self._sent = 0  # bytes of the caller since then
        self._answered = None  # the request whose answer came before its body, and the body's bytes since then
        self._rest = 0
        self._next_look: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.flow = _Flow(transport, self.conn)
        self._next_look = self.loop.call_later(LOOK, self._look)
        if len(self.connections) > self._patience.connections:
            others = [one for one in self.connections if one is not self]
            found = [one for one in others if one.at() == "idle"] or [one for one in others if one.held()]
            if not found:
                self.end(ApiError(503, "Too many connections are open; try again.", "too_many_connections"))
                return
            oldest = min(found, key=lambda one: one._since)
            if oldest.at() in ("writing", "closing"):
                oldest.transport.abort()
            else:
                slow = ApiError(408, "The request's body came too slowly for a busy server.", "timeout")
                oldest.end(slow if oldest.at() == "body" else None)

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._buffer

    def buffer_updated(self, count: int) -> None:
        self._sent += count
        # Another request may begin in the very bytes that the one before it ended in.
        if not self._answered_early() or self.cycle is not self._answered:
            self._answered, self._rest = self.cycle, 0
        if self._answered_early() and self._rest <= REST_BYTES:
            self._rest += count
            if self._rest > REST_BYTES and self.transport.can_write_eof():
                self.transport.write_eof()  # the answer is all; reading goes on, so that he gets it
        if self._rest <= REST_BYTES:
            self.data_received(bytes(self._buffer[:count]))

    def _answered_early(self) -> bool:
        """Whether the answer is out and the request's body is not here."""
        return self.cycle is not None and self.cycle.response_complete and self.conn.their_state is h11.SEND_BODY

    def held(self) -> bool:
        """Whether the caller has kept this connection waiting for long enough to lose it to another."""
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
        self.end(ApiError(400, "This is no valid HTTP request.", "invalid_http"))

    def at(self) -> str:
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
            # What an idle connection waits for began with its last answer, not with this look.
            self._since = self._since if not self._seen else now
            self._seen, self._sent = at, 0
        waited = now - self._since
        if at == "idle" and waited > min(patience.header_seconds, REST_SECONDS) and self._answered_early():
            self.end()
        elif at == "idle" and waited > patience.header_seconds:
            asked = bool(self.conn.trailing_data[0])  # half a request; without any byte there is nobody to tell
            self.end(ApiError(408, "The request's headers did not arrive in time.", "timeout") if asked else None)
        elif at == "body" and waited > patience.body_seconds + _GRACE:
            self.end(ApiError(408, "The request's body did not arrive in time.", "timeout"))
        elif at in ("writing", "closing") and waited > patience.write_seconds:
            self.transport.abort()

    def end(self, error: ApiError | None = None) -> None:
        """Closes the connection, and says why where no answer has begun."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # its application may say no more
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
    """uvicorn's, which says farewell when the time for open requests is up.

    By itself it cancels their tasks: streams break off without a word, and each leaves a traceback in the log.
    """

    def __init__(self, config: uvicorn.Config, drain_seconds: float, give_up: Callable[[], None]):
        super().__init__(config)
        self._drain, self._give_up = drain_seconds, give_up

    async def shutdown(self, sockets=None) -> None:
        timer = asyncio.get_running_loop().call_later(self._drain, self._farewell)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()

    def _farewell(self) -> None:
        self._give_up()  # ends every answer with an error
        for connection in list(self.server_state.connections):
            if connection.at() in ("body", "writing", "closing"):  # nothing can be said to these
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
    """The server of an application. drain_seconds: for open requests when it is to end; then give_up, which must end
    all answers. problem: why it cannot go on, "" while it can; after that it ends by itself, and waits only _FAREWELL
    seconds."""

    async def watch() -> None:
        if problem():
            server.config.timeout_graceful_shutdown = _FAREWELL
            server.should_exit = True

    server = Server(
        uvicorn.Config(
            app,
            host,
            port,
            loop="asyncio",  # uvloop reads as much at a time as it likes
            http=functools.partial(Connection, patience),
            ws="none",
            log_level="error",  # warnings tell what strangers send, as often as they like
            timeout_graceful_shutdown=drain_seconds + _FAREWELL,
            callback_notify=watch,
            timeout_notify=0,
        ),
        drain_seconds,
        give_up,
    )
    return server
