"""Counts the programs that this process compiles, except in threads that opt out, and compiles others in a thread."""

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Hashable, Iterator

import jax

log = logging.getLogger("fusion_jax")

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


class Compiler:
    """Compiles programs in a thread beside the answers, one after the other. Only `pending` and `close` may be used
    from any thread."""

    def __init__(self):
        self._wanted: set[Hashable] = set()
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._closed = False

    def want(self, program: Hashable, compile: Callable[[], None]) -> None:
        """Has `compile` called later, where nobody has asked for this program before."""
        if program in self._wanted or self._closed:
            return
        self._wanted.add(program)
        self._queue.put(compile)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="compile", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        with uncounted():
            while (compile := self._queue.get()) is not None:
                if self._closed:
                    return
                try:
                    compile()
                except Exception as error:  # prompts are then prefilled by another program, as before
                    log.warning("a prefill could not be compiled: %s", " ".join(str(error).split())[:300])
                self._queue.task_done()

    @property
    def pending(self) -> int:
        """The number of programs that were asked for and are not compiled yet."""
        return self._queue.unfinished_tasks

    @property
    def ended(self) -> bool:
        """Whether no thread compiles."""
        return self._thread is None or not self._thread.is_alive()

    def close(self, patience: float = 60.0) -> None:
        """Compiles nothing more; waits for the program that is being compiled, which cannot be interrupted."""
        self._closed = True
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join(patience)


def has_room(compiled: jax.stages.Compiled, reserved: int) -> bool:
    """Whether the device has room for what a program needs, beside what it holds now and `reserved` bytes."""
    plan, used = compiled.memory_analysis(), jax.local_devices()[0].memory_stats()
    if plan is None or not used or "bytes_limit" not in used:
        return True
    needed = plan.temp_size_in_bytes + plan.output_size_in_bytes + reserved
    return needed < used["bytes_limit"] - used["bytes_in_use"]
