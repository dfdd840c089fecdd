"""Files that others wrote: read with bounds, and their values asked for by type, before anything rests on them.

Every fault is a `UserError` of one sentence that names file and key. Nothing here loads JAX.
"""

import json
import os
import re
import reprlib
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusion_jax.errors import UserError, check

MOST_JSON_BYTES = 1 << 24  # config files have kilobytes
_MOST_DEPTH = 64
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 80
_short.maxlevel = 3


def shown(value: Any) -> str:
    """A foreign value for a message: short, on one line, without control characters."""
    return _short.repr(value)


def named(name: str) -> str:
    """A foreign name for a message: as it is where that is short and printable, else as `shown`."""
    return name if name.isprintable() and len(name) <= 120 else shown(name)


def read_bytes(path: Path, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes. Links are followed; pipes and devices are not waited for.

    Raises:
      UserError: there is none, it is something else than a file, too large or unreadable.
    """
    try:
        opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            about = os.fstat(opened)
            check(stat.S_ISREG(about.st_mode), f"{path} is no regular file.")
            check(about.st_size <= most, f"{path} has {about.st_size:,} bytes; at most {most:,} are read.")
            with os.fdopen(opened, "rb", closefd=False) as file:
                return file.read(most)
        finally:
            os.close(opened)
    except FileNotFoundError as error:
        raise UserError(f"There is no file {path}.") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error


def read_object(path: Path, most: int = MOST_JSON_BYTES) -> dict[str, Any]:
    """The JSON object that a file holds. Its numbers may still be infinite: `number` refuses those.

    Raises:
      UserError: as `read_bytes`; it is no JSON object, is nested deeper than 64 levels, or has a text that is no
        Unicode (half of a surrogate pair).
    """
    try:
        text = read_bytes(path, most).decode("utf-8")
        content = json.loads(text)
        if _SURROGATE.search(text):
            json.dumps(content, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from error
    check(isinstance(content, dict), f"{path} is no JSON object.")
    level, depth = [content], 0
    while level:
        depth += 1
        check(depth <= _MOST_DEPTH, f"{path} is nested deeper than {_MOST_DEPTH} levels.")
        inner = (child for node in level for child in (node.values() if isinstance(node, dict) else node))
        level = [child for child in inner if isinstance(child, dict | list)]
    return content


def _given(config: Mapping[str, Any], key: str, where: str, default: Any) -> Any:
    value = config.get(key)
    check(value is not None or default is not None, f"{where} lacks {shown(key)}.")
    return value


def _refuse(where: str, key: str, expected: str, value: Any) -> None:
    raise UserError(f"{where} has a value of the wrong kind: {named(key)} must be {expected}, got {shown(value)}.")


def whole(config: Mapping[str, Any], key: str, where: str, least: int, most: int, default: int | None = None) -> int:
    """A whole number of a config; `default`, or an error without one, where the key is missing or null.

    Raises:
      UserError: another type (also 4.0, "4" and true), or a number that is not within least .. most.
    """
    value = _given(config, key, where, default)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        _refuse(where, key, f"a whole number from {least} to {most}", value)
    return value


def number(
    config: Mapping[str, Any], key: str, where: str, least: float, most: float, default: float | None = None
) -> float:
    """Like `whole` for any finite number."""
    value = _given(config, key, where, default)
    if value is None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
        _refuse(where, key, f"a number from {least:g} to {most:g}", value)
    return float(value)


def flag(config: Mapping[str, Any], key: str, where: str, default: bool = False) -> bool:
    """A true or false of a config."""
    value = _given(config, key, where, default)
    if value is None:
        return default
    if not isinstance(value, bool):
        _refuse(where, key, "true or false", value)
    return value


def text(config: Mapping[str, Any], key: str, where: str, default: str | None = None) -> str:
    """A string of a config."""
    value = _given(config, key, where, default)
    if value is None:
        return default
    if not isinstance(value, str):
        _refuse(where, key, "a text", value)
    return value


def mapping(config: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    """An object inside a config; empty where it is missing or null."""
    value = config.get(key)
    if value is not None and not isinstance(value, dict):
        _refuse(where, key, "an object", value)
    return value or {}


def sequence(config: Mapping[str, Any], key: str, where: str) -> list[Any]:
    """A list inside a config; empty where it is missing or null."""
    value = config.get(key)
    if value is not None and not isinstance(value, list):
        _refuse(where, key, "a list", value)
    return value or []
