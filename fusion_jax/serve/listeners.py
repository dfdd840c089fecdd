"""Event streams of the page: by itself Gradio keeps each open for ever, and any number of them.

A session has one, a browser and all browsers together have few, and a stream ends when nothing is on its way to it. A
new one takes the place of an old one where there are too many.
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable

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

    @contextlib.asynccontextmanager
    async def place(self, owner: str, session: str) -> AsyncIterator[asyncio.Task]:
        """A place for a stream; the task ends when the stream must."""
        self._end(session)
        owns = [name for name, one in self._open.items() if one.owner == owner]
        if len(owns) >= OWN:
            self._end(owns[0])
        if len(self._open) >= self.most:
            ((fullest, _),) = Counter(one.owner for one in self._open.values()).most_common(1)
            self._end(next(name for name, one in self._open.items() if one.owner == fullest))
        one = self._open[session] = _Listener(owner, time.monotonic() + self.seconds)
        over = asyncio.create_task(self._watch(session, one))
        try:
            yield over
        finally:
            over.cancel()
            if self._open.get(session) is one:
                del self._open[session]

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
