"""Reads values from JSON files that others wrote, and checks their types and ranges.

Every error is a `UserError` of one sentence that names file and key. Nothing here loads JAX.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusion_jax.errors import UserError, check
from fusion_jax.files import brief, parse_json, read_file, shown

MOST_JSON_BYTES = 1 << 24  # config files have kilobytes
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_bytes(path: Path, most: int) -> bytes:
    """Reads a regular file of at most `most` bytes. Raises UserError where it is anything else, or unreadable."""
    try:
        return read_file(path, most)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error


def read_object(path: Path, most: int = MOST_JSON_BYTES) -> dict[str, Any]:
    """Reads a file that holds a JSON object. Its numbers may still be infinite: `number` refuses those.

    Raises:
      UserError: as `read_bytes`; it is not a JSON object, is nested too deep, or has a text that is not Unicode (half
        of a surrogate pair).
    """
    data = read_bytes(path, most)
    try:
        content = parse_json(data)
        if _SURROGATE.search(data):
            json.dumps(content, ensure_ascii=False).encode("utf-8")
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {shown(error)}.") from error
    check(isinstance(content, dict), f"{path} is not a JSON object.")
    return content


def _value(config: Mapping[str, Any], key: str, where: str, default: Any) -> Any:
    value = config.get(key)
    check(value is not None or default is not None, f"{where} lacks {shown(key)!r}.")
    return value


def _refuse(where: str, key: str, expected: str, value: Any) -> None:
    raise UserError(f"{where} has a value of the wrong kind: {shown(key)} must be {expected}, got {brief(value)}.")


def whole(config: Mapping[str, Any], key: str, where: str, least: int, most: int, default: int | None = None) -> int:
    """A whole number of a config; `default`, or an error without one, where the key is missing or null.

    Raises:
      UserError: it has another type (also 4.0, "4" and true), or is not within least .. most.
    """
    value = _value(config, key, where, default)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        _refuse(where, key, f"a whole number from {least} to {most}", value)
    return value


def number(
    config: Mapping[str, Any], key: str, where: str, least: float, most: float, default: float | None = None
) -> float:
    """Reads any finite number; arguments and errors are those of `whole`."""
    value = _value(config, key, where, default)
    if value is None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
        _refuse(where, key, f"a number from {least:g} to {most:g}", value)
    return float(value)


def _of_kind(config: Mapping[str, Any], key: str, where: str, default: Any, kind: type, expected: str) -> Any:
    value = _value(config, key, where, default)
    if value is None:
        return default
    if not isinstance(value, kind):
        _refuse(where, key, expected, value)
    return value


def flag(config: Mapping[str, Any], key: str, where: str, default: bool = False) -> bool:
    """A true or false of a config."""
    return _of_kind(config, key, where, default, bool, "true or false")


def text(config: Mapping[str, Any], key: str, where: str, default: str | None = None) -> str:
    """A string of a config."""
    return _of_kind(config, key, where, default, str, "a text")


def mapping(config: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    """An object inside a config; empty where it is missing or null."""
    return _of_kind(config, key, where, {}, dict, "an object")


def sequence(config: Mapping[str, Any], key: str, where: str) -> list[Any]:
    """A list inside a config; empty where it is missing or null."""
    return _of_kind(config, key, where, [], list, "a list")
