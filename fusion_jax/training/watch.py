"""Times the phases of a training loop, and logs all stacks when no phase begins for too long."""

import faulthandler
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger("fusion_jax")


class Watch:
    """Times phases, and logs the stacks of all threads after `minutes` in which no phase began. 0: no watchdog."""

    def __init__(self, minutes: float):
        self._limit = minutes * 60
        self._phase, self._beat = "starting", time.monotonic()
        self._done = threading.Event()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[Callable[[], float]]:
        """Enters a phase; yields a function that returns, afterwards, how many seconds it took."""
        begun = ended = time.monotonic()
        self._phase, self._beat = phase, begun
        yield lambda: ended - begun
        ended = time.monotonic()
        self._phase, self._beat = f"after {phase}", ended

    def __enter__(self) -> "Watch":
        self._beat = time.monotonic()
        if self._limit:
            threading.Thread(target=self._guard, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()

    def _guard(self) -> None:
        reported = self._beat
        while not self._done.wait(min(5.0, self._limit / 4)):
            silent = time.monotonic() - max(self._beat, reported)
            if silent > self._limit:
                reported = time.monotonic()
                minutes = (reported - self._beat) / 60
                log.error(
                    "no progress for %.1f minutes (%s); the stacks of all threads:\n%s", minutes, self._phase, stacks()
                )


def stacks() -> str:
    """Returns the stack of every thread, as text."""
    with tempfile.TemporaryFile("w+") as file:  # written by C code, which needs a file descriptor
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
