"""Compiling a large program takes minutes in which Python hears nothing: it happens in a thread of its own, so that the
command says meanwhile that it lives, and ends when Ctrl-C comes."""

import concurrent.futures
import contextlib
import sys
import threading
import time
from collections.abc import Iterator

_EVERY = 20.0  # seconds between two lines in a log file
_LOOK = 0.2


def compiled(lowered, what: str, options: dict | None = None):
    """`lowered.compile()`.

    Args:
      what: is compiled, for the line on standard error. options: for the compiler.

    Raises:
      what compiling raises. KeyboardInterrupt: at once; the compiler then goes on until the process ends.
    """
    result = concurrent.futures.Future()

    def work() -> None:
        try:
            result.set_result(lowered.compile(compiler_options=options))
        except BaseException as error:  # whatever it is, it belongs to the caller
            result.set_exception(error)

    threading.Thread(target=work, name="compiling", daemon=True).start()
    with _lines(what) as tick:
        while not concurrent.futures.wait([result], timeout=_LOOK).done:
            tick()
    return result.result()


@contextlib.contextmanager
def _lines(what: str) -> Iterator:
    """Gives a function that says now and then how long it takes: in a terminal in one line that goes again."""
    start = said = time.monotonic()
    terminal = sys.stderr is not None and sys.stderr.isatty()

    def write(text: str) -> None:
        with contextlib.suppress(OSError, AttributeError):  # nobody listens, or there is no standard error
            sys.stderr.write(text)
            sys.stderr.flush()

    def tick() -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= (1.0 if terminal else _EVERY):
            said = now
            line = f"compiling {what}, {now - start:.0f} s so far"
            write(f"\r{line}\x1b[K" if terminal else f"{line}\n")

    try:
        yield tick
    finally:
        if terminal and said > start:
            write("\r\x1b[K")
