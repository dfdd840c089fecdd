"""What happens around the loop: requests to stop, time by phase, a watchdog for hangs, traces, memory."""

import faulthandler
import logging
import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from fusion_jax.errors import AGAIN, UserError
from fusion_jax.training import lock

log = logging.getLogger("fusion_jax")


class Stop:
    """SIGTERM, SIGINT or a preemption notice, as something the loop asks for after each step.

    A second signal ends the process at once (exit code 128 + signal), and so does the first, with the exit code
    AGAIN, while `nothing_to_lose`: before the first step after a checkpoint.

    Signals are noticed by a thread of their own: the main one may be in the compiler for minutes. With several
    processes SIGTERM belongs to JAX's preemption service, which stops all of them after the same step.
    """

    def __init__(self):
        self.requested = False
        self.nothing_to_lose = True
        self._several = jax.process_count() > 1
        self._steps = 0  # over all stages: JAX agrees on a number that must never fall back

    def after_step(self) -> None:
        """With several processes `requested` changes here only, in all of them after the same step."""
        self._steps += 1
        if self._several and multihost_utils.reached_preemption_sync_point(self._steps):
            self.requested = True

    def __enter__(self) -> "Stop":
        self._before, self._wakeup = {}, -1
        if threading.current_thread() is threading.main_thread():
            reader, writer = os.pipe()
            os.set_blocking(writer, False)
            self._wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
            for number in (signal.SIGINT,) if self._several else (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, lambda *_: None)
            threading.Thread(target=self._listen, args=(reader,), name="signals", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        if self._before:
            os.close(signal.set_wakeup_fd(self._wakeup))
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _listen(self, reader: int) -> None:
        seen = 0
        while data := os.read(reader, 1):
            if data[0] not in self._before:
                continue
            name, seen = signal.Signals(data[0]).name, seen + 1
            if seen > 1:
                log.warning("%s again: ending at once", name)
                self._end(128 + data[0])
            if self._several:
                log.warning("%s: all processes save and end after the same step", name)
                os.kill(os.getpid(), signal.SIGTERM)  # now it is a preemption notice
                continue
            if self.nothing_to_lose:
                log.warning("%s: nothing new to save; exit code %d: run me again", name, AGAIN)
                self._end(AGAIN)
            log.warning("%s: finishing the step, then saving (once more ends at once)", name)
            self.requested = True
        os.close(reader)

    def _end(self, code: int) -> NoReturn:
        """Ends the process from this thread, while the main one may be anywhere."""
        lock.sign_off()
        os._exit(code)


class Watch:
    """Time by phase, and a log of every thread's stack after `minutes` in which no phase began. 0: no watchdog."""

    def __init__(self, minutes: float):
        self._limit = minutes * 60
        self._phase, self._beat = "starting", time.monotonic()
        self._done = threading.Event()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[Callable[[], float]]:
        """The loop is in this phase; gives a function that says afterwards how many seconds it took."""
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
    """The stack of every thread, as text."""
    with tempfile.TemporaryFile("w+") as file:  # written by C code, which needs a file descriptor
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


class Every:
    """A time that comes every `minutes`; 0: never. With several processes the first one's clock decides for all."""

    def __init__(self, minutes: float):
        self._seconds = minutes * 60
        self.restart()

    def restart(self) -> None:
        self._begun = time.monotonic()

    def due(self, together: bool) -> bool:
        """`together`: a step at which all processes may wait for each other, which they do every few steps only."""
        if not self._seconds:
            return False
        due = time.monotonic() - self._begun > self._seconds
        if jax.process_count() == 1:
            return due
        return together and bool(multihost_utils.broadcast_one_to_all(np.array(due)))


class Profile:
    """A trace of the steps `first` to `last` for XProf, under `folder`. Steps are those of the stage.

    One that cannot be taken or written costs itself alone: the log says so.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path):
        self._first, self._last = steps or (0, -1)
        self._folder, self._running = folder, False

    def before(self, step: int) -> None:
        if self._first <= step <= self._last and not self._running:
            try:
                jax.profiler.start_trace(str(self._folder))
                self._running = True
            except (RuntimeError, OSError) as error:
                self._give_up(error)

    def after(self, step: int, results) -> None:
        """`results`: what the step gives, waited for where the trace ends."""
        if self._running and step >= self._last:
            jax.block_until_ready(results)
            if self.close():
                log.info("trace of steps %d to %d in %s", self._first, self._last, self._folder)

    def close(self) -> bool:
        """Ends a trace that is running; whether it was written."""
        if not self._running:
            return False
        self._running = False
        try:
            jax.profiler.stop_trace()
        except (RuntimeError, OSError) as error:
            self._give_up(error)
            return False
        return True

    def _give_up(self, error: Exception) -> None:
        self._first, self._last = 0, -1
        log.warning("no trace in %s: %s; training goes on", self._folder, error)


def parse_steps(text: str) -> tuple[int, int] | None:
    """`5:7` as (5, 7); None for nothing. UserError otherwise."""
    if not text:
        return None
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise UserError(f"--profile_steps={text!r} must be FIRST:LAST, two step numbers such as 20:25.")
    return int(first), int(last)


def memory() -> dict[str, float]:
    """GiB in use: the fullest local device, where it says so, now and at most so far; and this process on the host."""
    values = {}
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    for name, key in (("hbm_gib", "bytes_in_use"), ("hbm_peak_gib", "peak_bytes_in_use")):
        used = [stat[key] for stat in stats if key in stat]
        if used:
            values[name] = max(used) / 2**30
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        values["host_gib"] = pages * os.sysconf("SC_PAGE_SIZE") / 2**30
    except OSError:  # no Linux
        pass
    return values


@contextmanager
def says_when_memory_is_short(remat: str) -> Iterator[None]:
    """UserError, with what helps, instead of the runtime's report that something does not fit into a device."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        found = re.search(r"RESOURCE_EXHAUSTED:?\s*([^\n]*)", str(error))
        if not found:
            raise
        raise UserError(
            f"The run does not fit into a device's memory ({found[1][:200].strip()}); what helps, the cheapest first: "
            f"a higher accumulation of the stage, remat=full (now {remat}), a shorter max_length, more devices to "
            "share the parameters (mesh.fsdp). python -m fusion_jax.plan says beforehand what fits."
        ) from error
