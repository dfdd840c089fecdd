"""Answers Ctrl-C in a command with one line and exit code 130, wherever the main thread is.

Python raises KeyboardInterrupt wherever the main thread is. In the middle of an import this leaves compiled modules
half initialised, which crash later; in a callback of the garbage collector, or in `__del__`, it is printed and dropped,
and the command continues. So this module delays it to the end of an import, and raises it again where it was dropped.
A second Ctrl-C ends the process immediately.
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
    """The state of this process, which has one SIGINT."""

    line: Callable[[], str] = staticmethod(lambda: "stopped")
    pressed: float | None = None  # when Ctrl-C came, until something answers it
    ending = False  # the process is on its way out, which nothing interrupts any more
    writing = False  # a second Ctrl-C waits until the line is written, so that it is written once
    again = False  # a second Ctrl-C came during that
    written = False


def ended_early(*_) -> None:
    """Answers Ctrl-C while a command still loads what it needs, which takes seconds: nothing needs cleaning up."""
    try:
        os.write(2, b"stopped\n")
    finally:  # standard error may be closed, or a file on a full disk
        os._exit(INTERRUPTED)


def listen(line: Callable[[], str]) -> None:
    """Makes Ctrl-C raise KeyboardInterrupt once. A SIGINT that is ignored or has another handler is left alone.

    Args:
      line: returns the line to write where a second Ctrl-C ends the process before `say` was called.
    """
    if signal.getsignal(signal.SIGINT) not in (ended_early, signal.default_int_handler):
        return
    _State.line = staticmethod(line)
    signal.signal(signal.SIGALRM, lambda _, frame: _interrupt(frame))
    previous = sys.unraisablehook

    def hook(unraisable) -> None:
        if isinstance(unraisable.exc_value, KeyboardInterrupt) and _State.pressed is not None:
            signal.setitimer(signal.ITIMER_REAL, _AGAIN)  # an exception raised in here would be dropped as well
        else:
            previous(unraisable)

    sys.unraisablehook = hook
    signal.signal(signal.SIGINT, _on_ctrl_c)


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Lets Ctrl-C end the process immediately during imports at the start of a command, with nothing to clean up."""
    was_listening = listening()
    if was_listening:
        signal.signal(signal.SIGINT, ended_early)
    try:
        yield
    finally:
        if was_listening:
            signal.signal(signal.SIGINT, _on_ctrl_c)


def listening() -> bool:
    """Whether this module answers Ctrl-C, which is neither ignored nor handled by the command itself."""
    return signal.getsignal(signal.SIGINT) is _on_ctrl_c


def pressed() -> bool:
    """Whether Ctrl-C came and nothing has answered it."""
    return _State.pressed is not None


def answered() -> None:
    """Makes the next Ctrl-C count as the first, for code that catches KeyboardInterrupt and continues."""
    _State.pressed = None


def say(line: str, write: Callable[[str], None]) -> None:
    """Writes once why the command ends. Blocking the signal would not help: another thread may receive it."""
    _State.writing = True
    try:
        write(line)
        _State.written = True
    finally:
        _State.writing = False
    if _State.again:
        end_now()


def begin_ending() -> None:
    """Lets Python end in order once KeyboardInterrupt has left the command's `main`; another Ctrl-C cuts that short."""
    _State.ending = True
    if _State.pressed is None:
        _State.pressed = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, 0)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _on_ctrl_c)


def end_now() -> None:
    """Ends the process and its children."""
    with contextlib.suppress(Exception):
        if not _State.written:
            os.write(2, f"{_State.line()}\n".encode())
    with contextlib.suppress(Exception):
        if "multiprocessing" in sys.modules:
            for child in sys.modules["multiprocessing"].active_children():
                child.terminate()
    os._exit(INTERRUPTED)


def _on_ctrl_c(_, frame: FrameType | None) -> None:
    if _State.writing:
        _State.again = True
        return
    if _State.pressed is not None:
        end_now()
    _State.pressed = time.monotonic()
    _interrupt(frame)


def _interrupt(frame: FrameType | None) -> None:
    if _State.pressed is None or _State.ending:
        return
    while frame is not None and frame.f_code.co_filename != _IMPORT:
        frame = frame.f_back
    if frame is None:
        raise KeyboardInterrupt
    if time.monotonic() - _State.pressed > PATIENCE:
        end_now()
    signal.setitimer(signal.ITIMER_REAL, _AGAIN)


@atexit.register  # before any library registers its own, so this runs last
def _after_all() -> None:
    if _State.ending:
        os._exit(INTERRUPTED)  # Python's own end restores SIGINT's default, which would change the exit code
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
