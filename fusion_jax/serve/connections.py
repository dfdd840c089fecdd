"""Connections that strangers hold: how many there may be, and how long each may take for what it is at.

uvicorn itself waits for ever for headers, for a body and for a reader. A connection is always at one of these:

    idle        no request: the first bytes, or the rest of the headers, are awaited     header_seconds, then 408
    body        the headers are here, the body is not                                    body_seconds, then 408
    writing     the caller does not read what is written                                 write_seconds, then cut
    closing     the last bytes are on their way to a caller who may not read them        write_seconds, then cut
    answering   the application works: its own deadline counts
"""

import asyncio
import functools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from fusion_jax.serve.error import ApiError

LOOK = 0.5  # seconds between two looks at a connection
_FAREWELL = 5  # seconds for the last answers of a server that has failed
_GRACE = 5.0  # seconds that the application has to say by itself that a body is late


@dataclass(frozen=True)
class Patience:
    """connections: open at once at most. The seconds are explained above."""

    connections: int = 512
    header_seconds: float = 10.0
    body_seconds: float = 60.0
    write_seconds: float = 30.0


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 with these limits.

    Beyond the limit the connection that has been idle for longest makes room, so that those who hold connections
    without asking anything do not shut out those who ask; where none is idle, the new one gets status 503.
    """

    def __init__(self, patience: Patience, **named):
        super().__init__(**named)
        self._patience = patience
        self._seen, self._since = "", time.monotonic()  # what it was at when last looked at, and since when
        self._next_look: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._next_look = self.loop.call_later(LOOK, self._look)
        if len(self.connections) > self._patience.connections:
            idle = [one for one in self.connections if one is not self and one.at() == "idle"]
            if idle:
                min(idle, key=lambda one: one._since).end()
            else:
                self.end(ApiError(503, "Too many connections are open; try again.", "too_many_connections"))

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
            self._seen = at
        waited = now - self._since
        if at == "idle" and waited > patience.header_seconds:
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
            if self.conn.our_state is h11.IDLE or self.scope["method"] != "HEAD":
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
