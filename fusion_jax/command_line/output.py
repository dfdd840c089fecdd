"""Writes on standard output and standard error, even where their reader has ended or the disk is full."""

import contextlib
import logging
import os
import select
import sys

from fusion_jax.files import printable


def say(text: str) -> None:
    """Writes a line on standard error, without what could move a terminal's cursor."""
    with contextlib.suppress(OSError, AttributeError):  # nobody reads it, or there is no standard error
        sys.stderr.write(_harmless(text if len(text) < 3000 else f"{text[:3000]}...") + "\n")
        sys.stderr.flush()


class Log(logging.StreamHandler):
    """The log, on standard output. Where it cannot be written, for lack of a reader or of space, work continues.

    It has a buffer of its own: losing the end of the log is not a failure, as losing a result would be.
    """

    def __init__(self):
        out, own = sys.stdout, None
        if out is not None:
            own = os.fdopen(out.fileno(), "w", encoding=out.encoding, errors="backslashreplace", closefd=False)
        super().__init__(own)

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError, AttributeError):
            sys.stdout.flush()  # keeps earlier output before this line
        super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        return _harmless(super().format(record))

    def handleError(self, record: logging.LogRecord) -> None:  # logging's name
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def _harmless(text: str) -> str:
    """The text without what would move a terminal's cursor or change its colours: names in files may hold anything."""
    return "\n".join(line if line.replace("\t", "").isprintable() else printable(line) for line in text.split("\n"))


def has_lost_its_reader() -> bool:
    """Whether the process that read standard output has ended, as `head` does."""
    if sys.stdout is None:
        return False
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def flush() -> str | None:
    """Writes out what is buffered, so that Python does not try to at its exit.

    Returns:
      Why standard output cannot be written, where the user should know; None if it can, or if its reader has ended.
    """
    problem = None
    for stream in (sys.stderr, sys.stdout):
        try:
            if stream is not None:
                stream.flush()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            if stream is sys.stdout and not isinstance(error, BrokenPipeError):
                problem = error.strerror
    return problem
