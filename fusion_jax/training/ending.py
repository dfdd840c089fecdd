"""One end for all processes of a run: whatever ends one of them ends all, with the same sentence and exit code.

A process that fails leaves a notice with JAX's coordination service. In every other one a thread looks for it each
second and ends its process, wherever the main thread waits. A process that is killed leaves none: the others then end
with AGAIN.
"""

import contextlib
import json
import logging
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import NoReturn

import jax

from fusion_jax.command_line import cli, interrupts
from fusion_jax.devices import board
from fusion_jax.errors import AGAIN, RunAgain, UserError, first_line
from fusion_jax.training import lock

_NOTICE = "fusion_jax/ends"
_SEEN = "fusion_jax/ends_seen"
_LOOK = 1.0  # seconds between two looks for a notice
_ending = threading.Lock()
_PATIENCE = 10.0  # that process 0, with which the notice goes, waits until the others have seen it
# In the error texts of collectives (gloo, NCCL, TPU) and of JAX's coordination service when a process is gone.
_LOST = ("Gloo", "gloo", "onnection", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "barrier", "heartbeat", "ABORTED")
_STATUS = re.compile(r"[A-Z_]+: ")  # begins the runtime's errors, some of which JAX raises as a ValueError


@dataclass(frozen=True)
class Notice:
    """Why a run ends: which process failed, the exit code of all, what is said."""

    process: int
    code: int
    text: str

    @property
    def sentence(self) -> str:
        return f"error: process {self.process} of this run: {self.text}"


@contextlib.contextmanager
def with_the_others() -> Iterator[None]:
    """Any error in here ends all processes of the run; the processes may be joined inside it. In a run of one process
    it is raised as ever.

    The process is ended at once: Python's way out waits for the others.
    """
    done = threading.Event()
    threading.Thread(target=_look, args=(done,), name="ending", daemon=True).start()
    try:
        yield
    except RunAgain:  # agreed upon by all
        raise
    except Exception as error:
        done.set()
        if board.client() is None or interrupts.pressed():
            raise
        if not isinstance(error, UserError) and is_lost(error):
            _end(_read(2 * _LOOK), f"({first_line(error)[:200]})")
        _end(_leave(error))
    finally:
        done.set()


def _look(done: threading.Event) -> None:
    """Ends this process where another one has left a notice."""
    while not done.wait(_LOOK):
        if board.client() is not None and (notice := _read()) is not None and not done.is_set():
            _end(notice)


def _leave(error: Exception) -> Notice:
    """The notice by which the run ends: that of this error, or an earlier one."""
    code, text = cli.explain(error) or (1, f"{type(error).__name__}: {first_line(error)}")
    notice = Notice(board.process(), code, text[:3000])
    if code == 1:
        with contextlib.suppress(OSError):
            traceback.print_exception(error)
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # there is one already, or process 0 is gone
        board.client().key_value_set(_NOTICE, json.dumps(asdict(notice)))
    return _read() or notice


def _read(patience: float = 0.0) -> Notice | None:
    """The notice that is there, or comes within as many seconds."""
    deadline = time.monotonic() + patience
    while True:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            return Notice(**json.loads(board.client().key_value_try_get(_NOTICE)))
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.1)


def is_lost(error: BaseException | None) -> bool:
    """Whether it came of another process that is gone."""
    while error is not None:
        ours = isinstance(error, jax.errors.JaxRuntimeError) or _STATUS.match(str(error))
        if ours and any(word in str(error) for word in _LOST):
            return True
        error = error.__cause__ or error.__context__
    return False


def _end(notice: Notice | None, reason: str = "") -> NoReturn:
    """Says why, and ends the process. Without a notice another one has died, which `reason` tells of."""
    _ending.acquire()  # for good: both threads may come here
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
