"""What a request goes through before it has a place in the queue: its body's way into memory, and threads of its own.

Whoever sends slowly holds a connection and the bytes that have arrived, and no place. The bytes of all requests whose
prompts are not ready yet are counted together, so that many large bodies cannot exhaust the memory.
"""

import asyncio
import contextlib
import ctypes
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from fastapi import Request
from starlette.requests import ClientDisconnect

from fusion_jax.server.error import ApiError

_M_MMAP_THRESHOLD = -3  # of malloc.h
FREE = 64 << 10  # bytes of every request that are not counted: a short question is read however many large ones come


def return_large_buffers() -> None:
    """Lets glibc give every buffer of 128 KiB or more back to the system when it is freed, and grow it without a copy.
    By itself it raises that threshold when the first large one is freed; buffers that grow towards a higher one leave
    holes of megabytes in the heap. Elsewhere nothing happens."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 17)


class Budget:
    """Bytes that requests may hold together. Used from the event loop alone."""

    def __init__(self, most: int):
        self.most, self.used = most, 0

    def share(self) -> "Share":
        return Share(self)


class Share:
    """What one request holds of a budget; `free` gives it back and may be called twice."""

    def __init__(self, budget: Budget):
        self._budget, self._size, self._counted = budget, 0, 0

    def grow(self, size: int) -> None:
        """Takes so many bytes more. ApiError 429 where there is no room for them."""
        more = max(self._size + size - FREE, 0) - self._counted
        if self._budget.used + more > self._budget.most:
            raise ApiError(429, "Too many large requests are being read; try again.", "server_busy")
        self._size += size
        self._counted += more
        self._budget.used += more

    def free(self) -> None:
        self._budget.used -= self._counted
        self._size = self._counted = 0


def check_plain(request: Request) -> None:
    """ApiError 415 where the body is compressed."""
    if any(one.strip().lower() not in ("", "identity") for one in request.headers.getlist("content-encoding")):
        raise ApiError(415, "The body must not be compressed.", "unsupported_encoding")


async def read_body(request: Request, most: int, seconds: float, share: Share | None = None) -> io.BytesIO:
    """The body of a request: its bytes once, in a buffer that may be closed when they have been read. share: counts
    them; bodies that are always small need none.

    Raises:
      ApiError: 408 not here in time, 413 more bytes than allowed, 415 compressed, 429 see `Share.grow`, 499 the caller
        has left.
    """
    check_plain(request)
    too_large = ApiError(413, f"The request has over {most} bytes.", "request_too_large")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > most:
        raise too_large
    body = io.BytesIO()
    try:
        async with asyncio.timeout(seconds):
            async for piece in request.stream():
                if body.tell() + len(piece) > most:
                    raise too_large
                if share is not None:
                    share.grow(len(piece))
                body.write(piece)
    except TimeoutError as error:
        raise ApiError(408, "The request's body did not arrive in time.", "timeout") from error
    except ClientDisconnect as error:
        raise ApiError(499, "The caller has left.", "cancelled") from error
    return body


class Pool:
    """Threads for one kind of work. Whoever finds none free waits in the event loop, within his own deadline, where no
    more than `queue` others wait; None: however many do."""

    def __init__(self, name: str, threads: int, queue: int | None = None):
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._free = asyncio.Semaphore(threads)
        self._queue, self._waiting = queue, 0

    async def run(self, function: Callable, *arguments):
        """The function's result. A caller that is cancelled leaves its thread to the end of what it does. ApiError 429
        where the queue is full."""
        if self._queue is not None and self._free.locked() and self._waiting >= self._queue:
            raise ApiError(429, "Too many requests wait for what takes long; try again.", "server_busy")
        self._waiting += 1
        try:
            await self._free.acquire()
        finally:
            self._waiting -= 1
        loop = asyncio.get_running_loop()
        try:
            work = self._threads.submit(function, *arguments)
        except BaseException:
            self._free.release()
            raise
        work.add_done_callback(lambda _: _later(loop, self._free.release))
        return await asyncio.wrap_future(work)

    def close(self) -> None:
        """Waits for nothing."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _later(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(function)
