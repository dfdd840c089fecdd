"""Runs the slow work of requests in threads, with a bounded queue."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from fusion_jax.server.error import ApiError


class ThreadPool:
    """Threads for one kind of work. Callers wait in the event loop for a free thread, each until its own deadline.

    Args:
      queue: most callers that may wait at the same time; None: any number.
    """

    def __init__(self, name: str, threads: int, queue: int | None = None):
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._free = asyncio.Semaphore(threads)
        self._queue, self._waiting = queue, 0

    async def run(self, function: Callable, *arguments):
        """Runs a function and returns its result. Raises ApiError 429 where the queue is full.

        Where the caller is cancelled, its thread stays busy until the function returns.
        """
        if self._queue is not None and self._free.locked() and self._waiting >= self._queue:
            raise ApiError(429, "Too many requests wait for slow work; try again.", "server_busy")
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
        """Lets the threads end when they are free, without waiting for them."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _later(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(function)
