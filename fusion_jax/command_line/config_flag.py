"""Reads the flags of a command, finds and loads its config file, and explains what is wrong with them."""

import difflib
import importlib
import re
import signal
import sys
import traceback
import zlib
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags import config_path
from ml_collections.config_flags.config_flags import ConfigFileFlagParser

from fusion_jax.command_line.output import flush, say
from fusion_jax.errors import UserError, check, check_choice, no_key
from fusion_jax.files import brief, open_file, shown

_PACKAGE = Path(__file__).parents[1]
# The configs of this project: inside of the installed package, or beside it in a checkout.
SHIPPED = next((path for path in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if path.is_dir()), None)
_NOT_ALLOWED = re.compile(r"flag --(\w+)=(.*): value should be one of <(.*)>", re.DOTALL)
_READ_WHILE_PARSING = re.compile(r"--?(config|flagfile)(?:=(.*))?", re.DOTALL)


def define_config(text: str, default: str | None = None, new_keys: bool = True) -> flags.FlagHolder:
    """Defines the flag --config of a command: a file with a function get_config. This already reads --flagfile.

    Args:
      text: the help text of the flag.
      default: the file that is loaded without --config.
      new_keys: whether keys can be set that the file does not list; the command must then refuse unknown ones.
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
    except Exception as error:  # an error in --flagfile, or overrides without a config
        say(f"error: {_explain(error, [], [])}")
        sys.exit(2)


def load_config(path: str) -> ConfigDict:
    """Loads a config file, `FILE` or `FILE:ARGUMENT`, as the flag --config does.

    Raises:
      UserError: there is no such file, it raised an error, or its get_config returned something else.
    """
    name = find_config(path.partition(":")[0])
    try:
        # The name becomes that of a module, whose variables another file of the same name would overwrite.
        config = _ConfigFile(f"config_{zlib.crc32(name.encode())}", lock_config=False).load(path)
        check_config(config)
    except UserError:
        raise
    except Exception as error:
        raise UserError(_explain(error, [name], [])) from error
    return config


def set_key(config: ConfigDict, key: str, value: Any) -> None:
    """Sets a key such as `model.llm.layers` or `stages[0].steps` to a value, as `--config.KEY=VALUE` does.

    A key that is missing from its mapping is added, and types are not compared: the command checks both.

    Raises:
      UserError: the config has no place for such a key.
    """
    wrong = _wrong_key(config, [f"--config.{key}={value}"])
    check(wrong is None, f"{wrong}")
    try:
        with config.ignore_type():
            config_path.set_value(key, config, value, accept_new_attributes=True)
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"config.{key} cannot be set to {brief(value)}: {shown(_plain(str(error)))}.") from error


def parse(argv: list[str]) -> list[str]:
    """Reads the flags and the config file; on any error it prints one sentence and exits with 2.

    Returns:
      The arguments that are not flags, the program's name first.
    """
    argv = [argv[0], *("--help" if word == "-h" else word for word in argv[1:])]
    configs: list[str] = []
    try:
        configs += _check_files(argv)
        rest = flags.FLAGS(argv)
        if "config" in flags.FLAGS and flags.FLAGS["config"].present:
            check_config(flags.FLAGS["config"].value)
        return rest
    except SystemExit:
        # absl exits with 1 after it has printed the help.
        if any(re.fullmatch(r"--?(help(short|full|xml)?|\?)(=.*)?", word) for word in argv):
            flush()
            sys.exit(0)
        say("error: the config file ended the program instead of returning a configuration.")
        sys.exit(2)
    except BrokenPipeError:
        flush()
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        say(f"error: {_explain(error, configs, argv)}")
        sys.exit(2)


def check_config(config: Any) -> None:
    """Raises UserError where the config file could not be read, or where get_config returned anything else.

    ml_collections keeps the error of reading the file until the config is used.
    """
    try:
        good = callable(getattr(config, "to_dict", None))
    except OSError as error:
        raise UserError(shown(_plain(f"{error.__cause__ or error}"), 500)) from error
    if not good:
        raise UserError(f"get_config of the config file must return a ConfigDict, not {type(config).__name__}.")


# ---- The file.


class _ConfigFile(ConfigFileFlagParser):
    """Loads a config file, and checks that the keys that the command line sets can be set.

    The mappings in its lists, such as `stages`, become ConfigDicts: missing keys can be set in these alone.
    """

    def parse(self, path: str) -> Any:
        config = self.load(path)
        if isinstance(config, ConfigDict):
            wrong = _wrong_key(config, _overrides(sys.argv))
            check(wrong is None, f"{wrong}")
        return config

    def load(self, path: str) -> Any:
        name, colon, argument = path.partition(":")
        name = find_config(name)
        _make_siblings_importable(name)
        config = super().parse(f"{name}{colon}{argument}")
        if isinstance(config, ConfigDict):
            for name, value in config.items():
                if isinstance(value, list | tuple):
                    with config.unlocked():
                        config[name] = type(value)(map(_as_config, value))
        return config


def find_config(path: str) -> str:
    """The path of a config file: the given one or, if that begins with configs/ and does not exist, the shipped one.

    Raises:
      UserError: neither exists. The message names both folders and the files in them that have a similar name.
    """
    file, folders = Path(path), [Path(path).parent]
    try:
        if file.exists():
            return path
        if SHIPPED is not None and file.parts[:1] == ("configs",):
            ours = SHIPPED.joinpath(*file.parts[1:])
            if ours.exists():
                return str(ours)
            folders.append(ours.parent)
        known = {p.stem: str(file.parent / p.name) for folder in folders for p in folder.glob("*.py")}
        near = [known[stem] for stem in difflib.get_close_matches(file.stem, known, cutoff=0.7)]
    except (OSError, ValueError):  # no file can have this name; opening it raises an error with the reason
        return path
    places = " and ".join(f"{folder.absolute()}" for folder in folders)
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    raise UserError(f"There is no config file {shown(path)} (looked in {shown(places, 500)}){hint}")


def _make_siblings_importable(path: str) -> None:
    """Makes `configs.NAME` importable for a config file: from its folder, from sys.path, and from the shipped ones."""
    try:
        configs = importlib.import_module("configs")  # such as the one in the working directory
    except ModuleNotFoundError:
        configs = sys.modules["configs"] = ModuleType("configs")
    beside = Path(path).absolute().parent
    folders = [str(beside)] if beside.name == "configs" else []
    folders += [*getattr(configs, "__path__", ()), *([str(SHIPPED)] if SHIPPED is not None else [])]
    configs.__path__ = list(dict.fromkeys(folders))


def _as_config(value: Any) -> Any:
    plain = isinstance(value, dict) and all(isinstance(key, str) and "." not in key for key in value)
    return ConfigDict(value, convert_dict=False) if plain else value


def _check_files(argv: list[str]) -> list[str]:
    """The files that reading the flags will open. Raises UserError for one that cannot be read."""
    paths = []
    for i, word in enumerate(argv):
        if word == "--":
            break
        if match := _READ_WHILE_PARSING.fullmatch(word):
            path = match[2] if match[2] is not None else "".join(argv[i + 1 : i + 2])
            path = find_config(path.partition(":")[0]) if match[1] == "config" else path
            try:
                open_file(path).close()
            except OSError as error:
                what = "load the config file:" if match[1] == "config" else "read the --flagfile"
                raise UserError(f"Cannot {what} {shown(path)}: {error.strerror}.") from error
            paths.append(path)
    return paths


# ---- Explaining what is wrong with them.


def _explain(error: Exception, configs: list[str], argv: list[str]) -> str:
    """One sentence about an error, with the line of the config file that raised it."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    for one in reversed(chain):  # the error that was raised first comes last
        if isinstance(one, SyntaxError) and one.filename in configs:
            return f"{one.filename}, line {one.lineno}: {one.msg}."
        if (line := _line_in(one.__traceback__, configs)) is not None:
            if isinstance(one, UserError):
                return str(one)
            return f"{line}: {shown(' '.join(f'{type(one).__name__}: {one}'.split()), 500)}"
    text = str(error)
    if "Traceback" in text:  # ml_collections puts one into the text
        text = f"{type(chain[-1]).__name__}: {chain[-1]}"
    text = shown(_plain(text), 1000)
    if match := _NOT_ALLOWED.fullmatch(text):  # the error of an enum flag, worded as for the keys of a config
        try:
            check_choice(f"--{match[1]}=", match[2], match[3].split("|"))
        except UserError as better:
            return str(better)
    if isinstance(error, UserError | flags.Error):
        return text
    overrides = ", ".join(_overrides(argv))
    return f"{text} (in {shown(overrides)})" if overrides else text


def _overrides(argv: list[str]) -> list[str]:
    return [word for word in argv if word.startswith(("--config.", "-config."))]


def _wrong_key(config: Any, overrides: list[str]) -> str | None:
    """A sentence about the first of these overrides that sets what cannot be set; None where there is none."""
    for word in overrides:
        name = word.lstrip("-").partition("=")[0]
        try:
            fields, name = config_path.split(name.partition(".")[2]), shown(name)
        except (ValueError, RecursionError, MemoryError):
            return f"--{shown(name)} is not a key; write --config.model.llm.layers or --config.stages[0].steps."
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
    """The innermost line of these files in a traceback."""
    lines = [f"{f.filename}, line {f.lineno}" for f in traceback.extract_tb(trace) if f.filename in files]
    return lines[-1] if lines else None


def _plain(text: str) -> str:
    """One line of an error's text, which may be the representation of a string, or have several lines."""
    text = text.replace("\\n", " ").replace("\\'", "'")
    if text[:1] in ("'", '"') and text[-1:] == text[:1]:
        text = text[1:-1]
    return " ".join(text.split())
