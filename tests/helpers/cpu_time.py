"""Limits on the CPU time of one call, whatever else the process of the tests does and holds."""

import contextlib
import gc
import time
from collections.abc import Iterator


@contextlib.contextmanager
def takes_less_than(seconds: float, what: object = None) -> Iterator[None]:
    """Asserts that the body takes less CPU time than `seconds` on this thread.

    Threads of earlier tests do not count, nor does collecting garbage among their objects.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        begun = time.thread_time()
        yield
        taken = time.thread_time() - begun
    finally:
        if collects:
            gc.enable()
    assert taken < seconds, what
