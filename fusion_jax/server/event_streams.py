"""Limits the event streams of the page, which Gradio itself keeps open without any limit.

A session has one stream, the streams of a browser and of all browsers are limited, and a stream ends when no message is
pending for it. Where there are too many, a new stream replaces an old one.
"""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable

log = logging.getLogger("fusion_jax")

STREAMS_PER_BROWSER = 8
_POLL = 2.0  # seconds between two checks for pending messages


class EventStreams:
    """The open event streams, by session.

    Args:
      most: streams of all browsers. seconds: how long a stream may stay open after its session's last event.
      pending: whether a session has a message or an unfinished event.
    """

    def __init__(self, most: int, seconds: float, pending: Callable[[str], bool]):
        self.most, self.seconds, self.pending = most, seconds, pending
        self._open: dict[str, _Stream] = {}  # by session, the oldest first

    def extend(self, session: str) -> None:
        """Keeps a session's stream open for longer, because the session has posted an event."""
        if session in self._open:
            self._open[session].end = time.monotonic() + self.seconds

    async def run(self, stream, owner: str, session: str, scope, receive, send) -> bool:
        """Runs an application that streams to a session, until it ends or another stream takes its place.

        Returns whether an answer was begun.
        """
        begun = ended = False

        async def send_noting(message) -> None:
            nonlocal begun, ended
            begun, ended = True, message["type"] == "http.response.body" and not message.get("more_body")
            await send(message)

        one = self._place(owner, session)
        over = asyncio.create_task(self._watch(session, one))
        streaming = asyncio.create_task(stream(scope, receive, send_noting))
        try:
            await asyncio.wait({streaming, over}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            over.cancel()
            streaming.cancel()
            await asyncio.wait({streaming})
            if self._open.get(session) is one:
                del self._open[session]
        if not streaming.cancelled() and streaming.exception() is not None:
            log.debug("a stream of the page broke off", exc_info=streaming.exception())
        if begun and not ended:
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        return begun

    def _place(self, owner: str, session: str) -> "_Stream":
        """A place for a stream, taken from another stream where there are too many."""
        self._end(session)
        own = [name for name, one in self._open.items() if one.owner == owner]
        if len(own) >= STREAMS_PER_BROWSER:
            self._end(own[0])
        if len(self._open) >= self.most:
            ((fullest, _),) = Counter(one.owner for one in self._open.values()).most_common(1)
            self._end(next(name for name, one in self._open.items() if one.owner == fullest))
        one = self._open[session] = _Stream(owner, time.monotonic() + self.seconds)
        return one

    def _end(self, session: str) -> None:
        if session in self._open:
            self._open.pop(session).ended.set()

    async def _watch(self, session: str, one: "_Stream") -> None:
        silent = 0
        while (
            silent < 2 and time.monotonic() < one.end
        ):  # not at the first check: the last message may still be on its way
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_POLL):
                    await one.ended.wait()
                return
            silent = 0 if self.pending(session) else silent + 1


class _Stream:
    def __init__(self, owner: str, end: float):
        self.owner, self.end, self.ended = owner, end, asyncio.Event()
