"""Makes frozen dataclasses from the nested mappings of config files, and back. Nothing here loads JAX."""

import dataclasses
import re
import sys
import types
import typing
from typing import Any

from fusion_jax.errors import UserError, check, no_key
from fusion_jax.files import brief, shown


def _convert(kind: Any, value: Any, key: str) -> Any:
    """The value as the annotated type. Raises UserError, naming the key, where it is not one."""
    if dataclasses.is_dataclass(kind):
        if isinstance(value, kind):
            return value
        return from_dict(kind, value, key)
    origin = typing.get_origin(kind)
    if origin is tuple:
        check(isinstance(value, list | tuple), f"{key} must be a list, got {brief(value)}.")
        return tuple(_convert(typing.get_args(kind)[0], item, f"{key}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        check(isinstance(value, typing.Mapping), f"{key} must be a mapping, got {brief(value)}.")
        return {str(k): _convert(typing.get_args(kind)[1], v, f"{key}[{k!r}]") for k, v in value.items()}
    if origin is types.UnionType:  # X | None
        return None if value is None else _convert(typing.get_args(kind)[0], value, key)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        # No NaN, no infinity; whole numbers compare exactly, whatever their size.
        check(abs(value) <= sys.float_info.max, f"{key} must be a finite float, got {brief(value)}.")
        return float(value)
    check(
        isinstance(value, kind) and (kind is bool or not isinstance(value, bool)),
        f"{key} must be {kind.__name__}, got {brief(value)}.",
    )
    return value


def from_dict(cls: type, values: typing.Mapping, where: str = "config") -> Any:
    """Makes a validated dataclass from nested mappings.

    Raises:
      UserError: an unknown key (with the nearest known ones), a missing key, a wrong type or value.
    """
    check(hasattr(values, "items"), f"{where} must be a mapping of {cls.__name__} fields, got {brief(values)}.")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            raise no_key(where, shown(key), fields)
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        check(name in values or not required, f"{where}.{name} is missing.")
    converted = {key: _convert(hints[key], value, f"{where}.{key}") for key, value in values.items()}
    try:
        return cls(**converted)
    except UserError as error:  # from a part, which does not know its key
        if re.split(r"[=\[:]", str(error), maxsplit=1)[0] not in fields:
            raise
        raise UserError(f"{where}.{error}") from error


def to_dict(config: Any) -> Any:
    """Nested plain dicts and tuples of a dataclass, for JSON and ConfigDicts; `from_dict` reads them back."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, tuple | list):
        return tuple(to_dict(item) for item in config)
    return dict(config) if isinstance(config, dict) else config
