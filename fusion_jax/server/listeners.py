"""Event streams of the page: by itself Gradio keeps each open for ever, and any number of them.

A session has one, a browser and all browsers together have few, and a stream ends when nothing is on its way to it. A
new one takes the place of an old one where there are too many.
"""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable

log = logging.getLogger("fusion_jax")

OWN = 8  # of one browser
_LOOK = 2.0  # seconds between two looks at whether anything is on its way


class Listeners:
    """Those that are open.

    Args:
      most: of all browsers. seconds: that one may be open after the last event of its session. pending: whether
        anything is on its way to a session.
    """

    def __init__(self, most: int, seconds: float, pending: Callable[[str], bool]):
        self.most, self.seconds, self.pending = most, seconds, pending
        self._open: dict[str, _Listener] = {}  # by session, the oldest first

    def extend(self, session: str) -> None:
        """Another event was posted."""
        if session in self._open:
            self._open[session].end = time.monotonic() + self.seconds

    async def run(self, stream, owner: str, session: str, scope, receive, send) -> bool:
        """Runs an application that streams to a session until either ends. Returns whether an answer was begun."""
        begun = ended = False

        async def tell(message) -> None:
            nonlocal begun, ended
            begun, ended = True, message["type"] == "http.response.body" and not message.get("more_body")
            await send(message)

        one = self._place(owner, session)
        over = asyncio.create_task(self._watch(session, one))
        streaming = asyncio.create_task(stream(scope, receive, tell))
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

    def _place(self, owner: str, session: str) -> "_Listener":
        """A place, taken from others where there are too many."""
        self._end(session)
        owns = [name for name, one in self._open.items() if one.owner == owner]
        if len(owns) >= OWN:
            self._end(owns[0])
        if len(self._open) >= self.most:
            ((fullest, _),) = Counter(one.owner for one in self._open.values()).most_common(1)
            self._end(next(name for name, one in self._open.items() if one.owner == fullest))
        one = self._open[session] = _Listener(owner, time.monotonic() + self.seconds)
        return one

    def _end(self, session: str) -> None:
        if session in self._open:
            self._open.pop(session).ended.set()

    async def _watch(self, session: str, one: "_Listener") -> None:
        silent = 0
        while silent < 2 and time.monotonic() < one.end:  # once is not enough: the last message may be on its way
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK):
                    await one.ended.wait()
                return
            silent = 0 if self.pending(session) else silent + 1


class _Listener:
    def __init__(self, owner: str, end: float):
        self.owner, self.end, self.ended = owner, end, asyncio.Event()
