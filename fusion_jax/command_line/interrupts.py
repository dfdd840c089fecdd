"""Ctrl-C in a command: one line and exit code 130, wherever the main thread is when it comes.

Python raises KeyboardInterrupt wherever that is. In the middle of an import it leaves compiled modules half made, which
crash later; in a callback of the garbage collector, or in `__del__`, it is printed and dropped, and the command goes
on. So here it waits for the end of an import, and is raised again where it was dropped. A second Ctrl-C ends at once.
"""

import atexit
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType

INTERRUPTED = 128 + signal.SIGINT
PATIENCE = 5.0  # seconds that an import, threads and pools may take to end after Ctrl-C
_AGAIN = 0.02  # seconds until KeyboardInterrupt is tried again
_IMPORT = "<frozen importlib._bootstrap>"


class _State:
    """Of this process: there is one SIGINT."""

    line: Callable[[], str] = staticmethod(lambda: "stopped")
    asked: float | None = None  # when Ctrl-C came that nothing has answered yet
    ending = False  # on the way out, which nothing interrupts any more
    saying = False  # a second Ctrl-C waits until the line is written, so that it stands there once
    again = False  # it came meanwhile
    said = False


def ended_early(*_) -> None:
    """Ctrl-C while a command still loads what it needs, which takes seconds: there is nothing yet to clean up."""
    try:
        os.write(2, b"stopped\n")
    finally:  # standard error may be closed, or a file on a full disk
        os._exit(INTERRUPTED)


def listen(line: Callable[[], str]) -> None:
    """From now on Ctrl-C raises KeyboardInterrupt once. Nothing changes where SIGINT is ignored or another's.

    Args:
      line: what is said when a second Ctrl-C ends the process before `say` was called.
    """
    if signal.getsignal(signal.SIGINT) not in (ended_early, signal.default_int_handler):
        return
    _State.line = staticmethod(line)
    signal.signal(signal.SIGALRM, lambda _, frame: _interrupt(frame))
    others = sys.unraisablehook

    def hook(what) -> None:
        if isinstance(what.exc_value, KeyboardInterrupt) and _State.asked is not None:
            signal.setitimer(signal.ITIMER_REAL, _AGAIN)  # what is raised in here would be dropped as well
        else:
            others(what)

    sys.unraisablehook = hook
    signal.signal(signal.SIGINT, _on_ctrl_c)


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """For imports at the beginning of a command's work, while there is nothing to clean up: Ctrl-C ends at once."""
    ours = listening()
    if ours:
        signal.signal(signal.SIGINT, ended_early)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, _on_ctrl_c)


def listening() -> bool:
    """Whether Ctrl-C is answered here, and not ignored or by a handler of the command's own."""
    return signal.getsignal(signal.SIGINT) is _on_ctrl_c


def asked() -> bool:
    """Whether Ctrl-C came, and nothing has answered it."""
    return _State.asked is not None


def answered() -> None:
    """For what catches KeyboardInterrupt and goes on: the next Ctrl-C is the first again."""
    _State.asked = None


def say(line: str, write: Callable[[str], None]) -> None:
    """Says why the command ends, once. Blocking the signal would not do: another thread may take it."""
    _State.saying = True
    try:
        write(line)
        _State.said = True
    finally:
        _State.saying = False
    if _State.again:
        end_now()


def begin_ending() -> None:
    """KeyboardInterrupt has arrived where the command began: Python may end in its order, which Ctrl-C cuts short."""
    _State.ending = True
    if _State.asked is None:
        _State.asked = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, 0)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _on_ctrl_c)


def end_now() -> None:
    """Ends the process and its children."""
    with contextlib.suppress(Exception):
        if not _State.said:
            os.write(2, f"{_State.line()}\n".encode())
    with contextlib.suppress(Exception):
        if "multiprocessing" in sys.modules:
            for child in sys.modules["multiprocessing"].active_children():
                child.terminate()
    os._exit(INTERRUPTED)


def _on_ctrl_c(_, frame: FrameType | None) -> None:
    if _State.saying:
        _State.again = True
        return
    if _State.asked is not None:
        end_now()
    _State.asked = time.monotonic()
    _interrupt(frame)


def _interrupt(frame: FrameType | None) -> None:
    if _State.asked is None or _State.ending:
        return
    while frame is not None and frame.f_code.co_filename != _IMPORT:
        frame = frame.f_back
    if frame is None:
        raise KeyboardInterrupt
    if time.monotonic() - _State.asked > PATIENCE:
        end_now()
    signal.setitimer(signal.ITIMER_REAL, _AGAIN)


@atexit.register  # before any library's: it runs last
def _after_all() -> None:
    if _State.ending:
        os._exit(INTERRUPTED)  # Python's own end gives SIGINT back to the system, which would change the exit code
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
