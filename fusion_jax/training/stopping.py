"""Ends a run early: on a signal or a preemption notice, or because one of its processes failed.

`Stop` turns a request into something that the loop checks after each step. `end_together` ends all processes of a run
with the same sentence and exit code, whichever of them fails: that one leaves a notice with JAX's coordination service;
in every other process a thread looks for it each second and ends the process, wherever the main thread waits. A process
that is killed leaves no notice: the others then end with AGAIN.
"""

import contextlib
import json
import logging
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import NoReturn

import jax
from jax.experimental import multihost_utils

from fusion_jax.command_line import cli, interrupts
from fusion_jax.devices import board
from fusion_jax.errors import AGAIN, RunAgain, UserError, first_line
from fusion_jax.training import lock

log = logging.getLogger("fusion_jax")

_NOTICE = "fusion_jax/ends"
_SEEN = "fusion_jax/ends_seen"
_POLL = 1.0  # seconds between two checks for a notice
_ending = threading.Lock()
_PATIENCE = 10.0  # seconds that process 0, whose end removes the notice, waits for the others to see it
# In the error texts of collectives (gloo, NCCL, TPU) and of JAX's coordination service when a process has ended.
_LOST = ("Gloo", "gloo", "onnection", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "barrier", "heartbeat", "ABORTED")
_STATUS = re.compile(r"[A-Z_]+: ")  # begins the runtime's errors, some of which JAX raises as a ValueError


class Stop:
    """SIGTERM, SIGINT or a preemption notice, as a flag that the loop checks after each step.

    A second signal ends the process at once (exit code 128 + signal), and so does the first, with the exit code
    AGAIN, while `nothing_to_lose`: before the first step after a checkpoint.

    A separate thread handles the signals, because the main one may be in the compiler for minutes. With several
    processes JAX's preemption service handles SIGTERM, and stops all of them after the same step.
    """

    def __init__(self):
        self.requested = False
        self.nothing_to_lose = True
        self._several = jax.process_count() > 1
        self._steps = 0  # over all stages: the number that JAX's processes agree on must never decrease

    def after_step(self) -> None:
        """With several processes, sets `requested` in all of them after the same step; nothing else sets it then."""
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
                log.warning("%s: nothing new to save; exit code %d: start again to go on", name, AGAIN)
                self._end(AGAIN)
            log.warning("%s: finishing the step, then saving (once more ends at once)", name)
            self.requested = True
        os.close(reader)

    def _end(self, code: int) -> NoReturn:
        """Ends the process from this thread, while the main one may be anywhere."""
        lock.sign_off()
        os._exit(code)


@dataclass(frozen=True)
class Notice:
    """Why a run ends: the process that failed, the exit code of all, the error's text."""

    process: int
    code: int
    text: str

    @property
    def sentence(self) -> str:
        return f"error: process {self.process} of this run: {self.text}"


@contextlib.contextmanager
def end_together() -> Iterator[None]:
    """Ends all processes of a run on any error inside the block, in which the processes may be joined.

    The process ends at once, because Python's own exit waits for the others. With one process the error is raised.
    """
    done = threading.Event()
    threading.Thread(target=_watch_for_notice, args=(done,), name="ending", daemon=True).start()
    try:
        yield
    except RunAgain:  # all processes stop after the same step
        raise
    except Exception as error:
        done.set()
        if board.client() is None or interrupts.pressed():
            raise
        if not isinstance(error, UserError) and is_process_lost(error):
            _end(_read_notice(2 * _POLL), f"({first_line(error)[:200]})")
        _end(_leave_notice(error))
    finally:
        done.set()


def _watch_for_notice(done: threading.Event) -> None:
    """Ends this process when another one has left a notice."""
    while not done.wait(_POLL):
        if board.client() is not None and (notice := _read_notice()) is not None and not done.is_set():
            _end(notice)


def _leave_notice(error: Exception) -> Notice:
    """Leaves a notice of this error, and returns the one that ends the run: this or an earlier one."""
    code, text = cli.explain(error) or (1, f"{type(error).__name__}: {first_line(error)}")
    notice = Notice(board.process(), code, text[:3000])
    if code == 1:
        with contextlib.suppress(OSError):
            traceback.print_exception(error)
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # there is one already, or process 0 is gone
        board.client().key_value_set(_NOTICE, json.dumps(asdict(notice)))
    return _read_notice() or notice


def _read_notice(patience: float = 0.0) -> Notice | None:
    """Waits up to `patience` seconds for a notice and returns it; None if there is none."""
    deadline = time.monotonic() + patience
    while True:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            return Notice(**json.loads(board.client().key_value_try_get(_NOTICE)))
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.1)


def is_process_lost(error: BaseException | None) -> bool:
    """Returns whether an error was caused by the loss of another process."""
    while error is not None:
        ours = isinstance(error, jax.errors.JaxRuntimeError) or _STATUS.match(str(error))
        if ours and any(word in str(error) for word in _LOST):
            return True
        error = error.__cause__ or error.__context__
    return False


def _end(notice: Notice | None, reason: str = "") -> NoReturn:
    """Prints why, and ends the process. Without a notice another process has died, and `reason` describes how."""
    _ending.acquire()  # never released: both threads may get here
    lost = f"Another process of this run has ended or cannot be reached {reason}; start all of them again: training "
    cli.say(notice.sentence if notice else lost + "goes on from the newest checkpoint.")
    logging.shutdown()
    with contextlib.suppress(OSError, AttributeError):
        sys.stdout.flush()
    lock.sign_off()
    if notice is not None:
        with contextlib.suppress(jax.errors.JaxRuntimeError, ValueError):
            seen = board.client().key_value_increment(_SEEN, 1)
            deadline = time.monotonic() + _PATIENCE
            while board.process() == 0 and seen < board.processes() and time.monotonic() < deadline:
                time.sleep(0.1)
                seen = int(board.client().key_value_try_get(_SEEN))
    os._exit(notice.code if notice else AGAIN)
