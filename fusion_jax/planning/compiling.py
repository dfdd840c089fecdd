"""Compiles in a thread, so that the command can report progress and be stopped by Ctrl-C meanwhile.

Compiling a large program takes minutes, in which Python handles no signals.
"""

import concurrent.futures
import contextlib
import sys
import threading
import time
from collections.abc import Iterator

_EVERY = 20.0  # seconds between two lines in a log file
_POLL = 0.2  # seconds between two checks whether the compiler has finished


def compiled(lowered, what: str, options: dict | None = None):
    """Returns `lowered.compile()`.

    Args:
      what: the name of the program, for the line on standard error. options: the compiler's options.

    Raises:
      KeyboardInterrupt: at once; the compiler then runs until the process ends. Otherwise whatever compiling raises.
    """
    result = concurrent.futures.Future()

    def work() -> None:
        try:
            result.set_result(lowered.compile(compiler_options=options))
        except BaseException as error:  # raised again in the caller's thread
            result.set_exception(error)

    threading.Thread(target=work, name="compiling", daemon=True).start()
    with _progress(what) as report:
        while not concurrent.futures.wait([result], timeout=_POLL).done:
            report()
    return result.result()


@contextlib.contextmanager
def _progress(what: str) -> Iterator:
    """Yields a function that from time to time writes how long compiling has taken, in a terminal on one line."""
    start = last = time.monotonic()
    terminal = sys.stderr is not None and sys.stderr.isatty()

    def write(text: str) -> None:
        with contextlib.suppress(OSError, AttributeError):  # standard error is closed, or there is none
            sys.stderr.write(text)
            sys.stderr.flush()

    def report() -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= (1.0 if terminal else _EVERY):
            last = now
            line = f"compiling {what}, {now - start:.0f} s so far"
            write(f"\r{line}\x1b[K" if terminal else f"{line}\n")

    try:
        yield report
    finally:
        if terminal and last > start:
            write("\r\x1b[K")
