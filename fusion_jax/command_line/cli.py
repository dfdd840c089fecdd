"""What every command shares: user errors end in one sentence and exit code 2, not in a traceback.

Exit codes: 0 done, or help was asked for; 2 a user error; 75 stopped on request and saved, start again to go on; 130
stopped by Ctrl-C; 1 any other failure, with a traceback; 128 + N ended by signal N.
"""

import atexit
import contextlib
import errno
import logging
import os
import re
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from types import TracebackType
from typing import Any

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags import config_path
from ml_collections.config_flags.config_flags import ConfigFileFlagParser

from fusion_jax.command_line import interrupts
from fusion_jax.errors import AGAIN, RunAgain, UserError, check, check_choice, no_key
from fusion_jax.files import brief, open_file, printable, shown

# Faults of a folder or file that somebody named: none of them goes away by trying again.
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
_NOT_ALLOWED = re.compile(r"flag --(\w+)=(.*): value should be one of <(.*)>", re.DOTALL)
_READ_WHILE_PARSING = re.compile(r"--?(config|flagfile)(?:=(.*))?", re.DOTALL)


def run_main(main: Callable[[list[str]], None], goes_on: Callable[[], bool] = lambda: False) -> None:
    """`absl.app.run` for a command. Our own log goes to standard output; libraries say errors only.

    Args:
      main: gets the arguments that are no flags, the program's name first.
      goes_on: whether the same command, started again after Ctrl-C, takes up what this one has done.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # half an emoji in a file must not end a command that only mentions it
            stream.reconfigure(errors="backslashreplace")
    atexit.register(_flush)  # whatever ends the command: Python's own end would make a full disk the exit code 120
    absl_logging.set_verbosity(absl_logging.ERROR)
    handler = _Log()
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
            if not interrupts.asked():
                raise
        if interrupts.asked():  # a library made another error of KeyboardInterrupt, or none
            raise KeyboardInterrupt

    def guarded(argv: list[str]) -> int:
        code = _code(interruptible, argv)
        problem = _flush()
        if problem is not None and code == 0:
            say(f"error: standard output cannot be written: {problem}.")
            code = 2
        if interrupts.listening():  # all is said: Python's own end may take long
            signal.signal(signal.SIGINT, lambda *_: os._exit(code))
        return code

    try:
        interrupts.listen(line)
        app.run(guarded, flags_parser=_parse)
    except KeyboardInterrupt:
        interrupts.begin_ending()
        interrupts.say(line(), say)
        _end_soon()
        sys.exit(interrupts.INTERRUPTED)


def _code(main: Callable[[list[str]], None], argv: list[str]) -> int:
    """Runs a command and gives its exit code."""
    try:
        main(argv)
    except RunAgain as stopped:
        say(f"{stopped}")
        return AGAIN
    except BrokenPipeError:
        if not _reader_is_gone():
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
    """The exit code and the sentence for a mistake of the person at the terminal; None for any other error."""
    if isinstance(error, UserError):
        return 2, f"{error}"
    if isinstance(error, OSError) and error.errno in _MISTAKES:
        what = "A file" if error.filename is None else shown(error.filename)
        return 2, f"{what} cannot be used: {error.strerror}."
    return None


class _Log(logging.StreamHandler):
    """Standard output. Where it cannot be written, its reader being gone or a disk full, the work goes on without.

    It has a buffer of its own: what is left in it at the end is no fault of the command, as a lost result would be.
    """

    def __init__(self):
        out, own = sys.stdout, None
        if out is not None:
            own = os.fdopen(out.fileno(), "w", encoding=out.encoding, errors="backslashreplace", closefd=False)
        super().__init__(own)

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError, AttributeError):
            sys.stdout.flush()  # what was printed before stands before
        super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        return _harmless(super().format(record))

    def handleError(self, record: logging.LogRecord) -> None:  # logging's name
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def _harmless(text: str) -> str:
    """The text without what would move a terminal's cursor or change its colours: names in files may hold anything."""
    return "\n".join(line if line.replace("\t", "").isprintable() else printable(line) for line in text.split("\n"))


def say(text: str) -> None:
    """A line on standard error, harmless to a terminal."""
    with contextlib.suppress(OSError, AttributeError):  # nobody listens, or there is no standard error
        sys.stderr.write(_harmless(text if len(text) < 3000 else f"{text[:3000]}...") + "\n")
        sys.stderr.flush()


def _reader_is_gone() -> bool:
    """Whether whatever read standard output has ended, as `head` does."""
    if sys.stdout is None:
        return False
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _flush() -> str | None:
    """Writes out what is left, so that Python need not at its end. What kept standard output from it, if anybody should
    know."""
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


def _end_soon() -> None:
    """Lets threads and pools end after Ctrl-C, quietly and not for long."""
    sys.unraisablehook = threading.excepthook = lambda _: None
    timer = threading.Timer(interrupts.PATIENCE, interrupts.end_now)
    timer.daemon = True
    timer.start()


@contextlib.contextmanager
def out_of_ctrl_c() -> Iterator[None]:
    """Processes started in here do not hear Ctrl-C, which reaches the whole group: their parent answers, and ends them.

    They would, before their first own line has run, answer with a traceback.
    """
    resource_tracker.ensure_running()  # its start would let Ctrl-C through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def check_output(flag: str, path: str | Path) -> None:
    """UserError, before the work and not behind it, where no file of that name can be written."""
    there = path if os.path.lexists(path) else os.path.dirname(path) or "."
    good = os.access(there, os.W_OK) and os.path.isdir(there) == (there != path)
    check(good, f"--{flag}={path}: give the name of a file in a folder that exists and can be written to.")


# ---- Flags and config files.


class _ConfigFile(ConfigFileFlagParser):
    """Reads a config file, and looks whether what the command line sets is there to be set.

    The mappings in its lists, such as `stages`, become ConfigDicts: of these alone, keys that are not there can be set.
    """

    def parse(self, path: str) -> Any:
        config = super().parse(path)
        if isinstance(config, ConfigDict):
            for name, value in config.items():
                if isinstance(value, list | tuple):
                    with config.unlocked():
                        config[name] = type(value)(map(_as_config, value))
            wrong = _wrong_key(config, _overrides(sys.argv))
            check(wrong is None, f"{wrong}")
        return config


def _as_config(value: Any) -> Any:
    plain = isinstance(value, dict) and all(isinstance(key, str) and "." not in key for key in value)
    return ConfigDict(value, convert_dict=False) if plain else value


def define_config(text: str, default: str | None = None, new_keys: bool = True) -> flags.FlagHolder:
    """The flag --config of a command, a file with a function get_config. Defining it reads --flagfile already.

    Args:
      text: help. default: the file if none is given.
      new_keys: whether keys can be set that the file does not list; the command has to name those it does not know.
    """
    try:
        if any(word.startswith(("-flagfile", "--flagfile")) for word in sys.argv):
            _check_files(sys.argv)
        flag = config_flags.DEFINE_config_file(
            "config", None, text, lock_config=not new_keys, accept_new_attributes=new_keys
        )
        flags.FLAGS["config"].parser = _ConfigFile("config", lock_config=not new_keys)
        if default is not None:
            flags.FLAGS.set_default("config", default)
        return flag
    except Exception as error:  # of reading --flagfile, or of overrides where there is no config
        say(f"error: {_explain(error, [], [])}")
        sys.exit(2)


def _parse(argv: list[str]) -> list[str]:
    """Reads the flags, and with them the config file: whatever goes wrong here is the fault of one of them."""
    argv = [argv[0], *("--help" if word == "-h" else word for word in argv[1:])]
    configs: list[str] = []
    try:
        configs += _check_files(argv)
        rest = flags.FLAGS(argv)
        if "config" in flags.FLAGS and flags.FLAGS["config"].present:
            check_config(flags.FLAGS["config"].value)
        return rest
    except SystemExit:
        # absl ends with 1 after it has printed the help that was asked for.
        if any(re.fullmatch(r"--?(help(short|full|xml)?|\?)(=.*)?", word) for word in argv):
            _flush()
            sys.exit(0)
        say("error: the config file ended the program instead of returning a configuration.")
        sys.exit(2)
    except BrokenPipeError:
        _flush()
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        say(f"error: {_explain(error, configs, argv)}")
        sys.exit(2)


def _check_files(argv: list[str]) -> list[str]:
    """The files that reading the flags will open. UserError for one that cannot be read."""
    paths = []
    for i, word in enumerate(argv):
        if word == "--":
            break
        if match := _READ_WHILE_PARSING.fullmatch(word):
            path = match[2] if match[2] is not None else "".join(argv[i + 1 : i + 2])
            path = path.partition(":")[0] if match[1] == "config" else path
            try:
                open_file(path).close()
            except OSError as error:
                what = "load the config file:" if match[1] == "config" else "read the --flagfile"
                raise UserError(f"Cannot {what} {shown(path)}: {error.strerror}.") from error
            paths.append(path)
    return paths


def check_config(config: Any) -> None:
    """UserError where the config file could not be read, which is put off until now, or gave something else."""
    try:
        good = callable(getattr(config, "to_dict", None))
    except OSError as error:
        raise UserError(shown(_plain(f"{error.__cause__ or error}"), 500)) from error
    if not good:
        raise UserError(f"get_config of the config file must return a ConfigDict, not {type(config).__name__}.")


def _explain(error: Exception, configs: list[str], argv: list[str]) -> str:
    """One sentence, with the line of the config file that the error came from."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    for one in reversed(chain):  # the first that was raised stands last
        if isinstance(one, SyntaxError) and one.filename in configs:
            return f"{one.filename}, line {one.lineno}: {one.msg}."
        if (line := _line_in(one.__traceback__, configs)) is not None:
            said = str(one) if isinstance(one, UserError) else f"{type(one).__name__}: {one}"
            return said if isinstance(one, UserError) else f"{line}: {shown(' '.join(said.split()), 500)}"
    said = str(error)
    if "Traceback" in said:  # ml_collections puts one into the text
        said = f"{type(chain[-1]).__name__}: {chain[-1]}"
    said = shown(_plain(said), 1000)
    if match := _NOT_ALLOWED.fullmatch(said):  # of a flag with a list of values: say it as for keys of a config
        try:
            check_choice(f"--{match[1]}=", match[2], match[3].split("|"))
        except UserError as better:
            return str(better)
    if isinstance(error, UserError | flags.Error):
        return said
    overrides = ", ".join(_overrides(argv))
    return f"{said} (in {shown(overrides)})" if overrides else said


def _overrides(argv: list[str]) -> list[str]:
    return [word for word in argv if word.startswith(("--config.", "-config."))]


def _wrong_key(config: Any, overrides: list[str]) -> str | None:
    """A sentence on the first of these words that sets what cannot be set in the config."""
    for word in overrides:
        name = word.lstrip("-").partition("=")[0]
        try:
            fields, name = config_path.split(name.partition(".")[2]), shown(name)
        except (ValueError, RecursionError, MemoryError):
            return f"--{shown(name)} is no name of a key; write --config.model.llm.layers or --config.stages[0].steps."
        at, where = config, "config"
        for place, field in enumerate(fields, 1):
            if isinstance(at, list | tuple):
                known, good = [], isinstance(field, int) and -len(at) <= field < len(at)
                has = f"{len(at)} entries, the first of which is [0]"
            else:
                known = [str(key) for key in at] if isinstance(at, ConfigDict | dict) else []
                new = place == len(fields) and isinstance(at, ConfigDict) and not at.is_locked
                good = isinstance(field, str) and (field in known or new)
                has = f"the keys {', '.join(known)}" if known else "no keys"
            if not good and isinstance(field, str) and known:
                return f"--{name} cannot be set: {no_key(where, shown(field), known)}"
            if not good:
                return f"--{name} cannot be set: {where} of the config file has no {brief(field)}, but has {has}."
            if not isinstance(at, ConfigDict) or field in at:
                at, where = at[field], f"{where}[{field}]" if isinstance(field, int) else f"{where}.{field}"
        if isinstance(at, list | dict):
            return f"--{name} cannot be set as a whole; set its parts, such as --{name}[0].KEY=VALUE."
    return None


def _line_in(trace: TracebackType | None, files: list[str]) -> str | None:
    """The innermost line of these files that a traceback passes."""
    lines = [f"{f.filename}, line {f.lineno}" for f in traceback.extract_tb(trace) if f.filename in files]
    return lines[-1] if lines else None


def _plain(text: str) -> str:
    """Texts of errors are representations of strings, some over several lines: one line for the terminal."""
    text = text.replace("\\n", " ").replace("\\'", "'")
    if text[:1] in ("'", '"') and text[-1:] == text[:1]:
        text = text[1:-1]
    return " ".join(text.split())
