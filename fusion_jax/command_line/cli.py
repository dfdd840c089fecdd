"""Runs a command with its log and exit code, and prints one sentence for a user's mistake.

Exit codes: 0 done, or help was printed; 2 a user's mistake; 75 stopped on request and saved, to be continued by the
same command; 130 stopped by Ctrl-C; 1 any other failure, with a traceback; 128 + N ended by signal N.
"""

import atexit
import contextlib
import errno
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path

from absl import app
from absl import logging as absl_logging

from fusion_jax.command_line import interrupts
from fusion_jax.command_line.config_flag import check_config as check_config
from fusion_jax.command_line.config_flag import define_config as define_config
from fusion_jax.command_line.config_flag import parse
from fusion_jax.command_line.output import Log, flush, has_lost_its_reader, say
from fusion_jax.errors import AGAIN, RunAgain, UserError, check
from fusion_jax.files import shown

# Errors of a folder or file that the user has named: trying again does not help.
_MISTAKES = (
    errno.ENAMETOOLONG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENOSPC,
    errno.EDQUOT,
)


def run_main(main: Callable[[list[str]], None], goes_on: Callable[[], bool] = lambda: False) -> None:
    """`absl.app.run` for a command. Our own log goes to standard output; libraries log errors only.

    Args:
      main: gets the arguments that are not flags, the program's name first.
      goes_on: whether the same command, started again after Ctrl-C, continues where this one has stopped.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # half an emoji in a file must not end a command that only mentions it
            stream.reconfigure(errors="backslashreplace")
    atexit.register(flush)  # on a full disk Python's own flush at exit would make the exit code 120
    absl_logging.set_verbosity(absl_logging.ERROR)
    handler = Log()
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
    log = logging.getLogger("fusion_jax")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False

    def line() -> str:
        return "stopped; the same command goes on from here" if goes_on() else "stopped"

    def interruptible(argv: list[str]) -> None:
        try:
            main(argv)
        except Exception:
            if not interrupts.pressed():
                raise
        if interrupts.pressed():  # a library has caught KeyboardInterrupt, or raised another error from it
            raise KeyboardInterrupt

    def guarded(argv: list[str]) -> int:
        code = _code(interruptible, argv)
        problem = flush()
        if problem is not None and code == 0:
            say(f"error: standard output cannot be written: {problem}.")
            code = 2
        if interrupts.listening():  # everything is written, and Python's own end may take long
            signal.signal(signal.SIGINT, lambda *_: os._exit(code))
        return code

    try:
        interrupts.listen(line)
        app.run(guarded, flags_parser=parse)
    except KeyboardInterrupt:
        interrupts.begin_ending()
        interrupts.say(line(), say)
        _end_soon()
        sys.exit(interrupts.INTERRUPTED)


def _code(main: Callable[[list[str]], None], argv: list[str]) -> int:
    """Runs a command and returns its exit code."""
    try:
        main(argv)
    except RunAgain as stopped:
        say(f"{stopped}")
        return AGAIN
    except BrokenPipeError:
        if not has_lost_its_reader():
            raise
        return 128 + signal.SIGPIPE
    except Exception as error:
        known = explain(error)
        if known is None:
            raise
        code, sentence = known
        say(f"error: {sentence}")
        return code
    return 0


def explain(error: Exception) -> tuple[int, str] | None:
    """The exit code and the sentence for a mistake of the user; None for any other error."""
    if isinstance(error, UserError):
        return 2, f"{error}"
    if isinstance(error, OSError) and error.errno in _MISTAKES:
        what = "A file" if error.filename is None else shown(error.filename)
        return 2, f"{what} cannot be used: {error.strerror}."
    return None


def _end_soon() -> None:
    """Gives threads and pools a few seconds to end after Ctrl-C, and silences their errors."""
    sys.unraisablehook = threading.excepthook = lambda _: None
    timer = threading.Timer(interrupts.PATIENCE, interrupts.end_now)
    timer.daemon = True
    timer.start()


@contextlib.contextmanager
def out_of_ctrl_c() -> Iterator[None]:
    """Processes that are started in this block ignore Ctrl-C, which reaches the whole group: their parent ends them.

    Otherwise each would print a traceback if the signal came before its first own line has run.
    """
    resource_tracker.ensure_running()  # starting it later would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def check_output(flag: str, path: str | Path) -> None:
    """Raises UserError, before the work is done, where no file of that name can be written."""
    present = path if os.path.lexists(path) else os.path.dirname(path) or "."
    good = os.access(present, os.W_OK) and os.path.isdir(present) == (present != path)
    check(good, f"--{flag}={path}: give the name of a file in a folder that exists and can be written to.")
