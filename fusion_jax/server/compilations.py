"""Counts the programs that this process compiles, except in threads that opt out."""

import contextlib
import threading
from collections.abc import Iterator

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"
_count = 0
_thread = threading.local()


def _listen(event: str, duration: float, **more) -> None:
    global _count
    _count += event == _EVENT and not getattr(_thread, "uncounted", False)


jax.monitoring.register_event_duration_secs_listener(_listen)


def count() -> int:
    """The number of programs compiled so far."""
    return _count


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """Does not count what this thread compiles in the block: work other than answers, such as attention pictures."""
    _thread.uncounted = True
    try:
        yield
    finally:
        _thread.uncounted = False
