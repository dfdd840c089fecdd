"""Reads the header of a GGUF file: its keys and values, and the positions of its tensors.

    "GGUF", version, number of tensors, number of keys | keys with values | name, shape, type, offset | padding | data

It is read here and not by the package `gguf`, because every count and length comes from the file itself: a damaged file
could require any amount of time or memory. The layout is described in github.com/ggml-org/ggml, docs/gguf.md.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fusion_jax.errors import UserError, check
from fusion_jax.files import open_file, shown

MAGIC = b"GGUF"
_MOST_BYTES = 1 << 26  # of a header; a vocabulary with its merges has some 10 MB
_MOST_VALUES = 1 << 22  # in all its arrays
_MOST_KEYS = 1 << 16
_MOST_TENSORS = 1 << 18
_MOST_NAME = 1 << 12
_TEXT, _ARRAY = 8, 9
_NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?"}
_NUMBERS |= {10: "<u8", 11: "<i8", 12: "<f8"}


@dataclass(frozen=True)
class Place:
    """A tensor of a GGUF file: its shape (the fastest axis last), the number of its type, and its offset in bytes."""

    shape: tuple[int, ...]
    kind: int
    start: int


@dataclass(frozen=True)
class Header:
    """`values` by key (numbers, texts, lists of them), `places` by tensor name, and the file as a memory map."""

    path: Path
    values: dict[str, Any]
    places: dict[str, Place]
    data: mmap.mmap


def read_header(path: Path) -> Header:
    """Reads the header without the tensors.

    Raises:
      UserError: it is not a GGUF file of version 2 or 3, is damaged, or ends within the header. Whether the tensors are
        within the file depends on their types and is checked by `GgufFile`.
    """
    try:
        with open_file(path) as file:
            check(file.read(4) == MAGIC, f"{path} is not a GGUF file.")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    reader = _Reader(data, path)
    (version,) = reader.take("<I")
    check(
        version in (2, 3),
        f"{path} is GGUF of version {version}; versions 2 and 3 in little-endian order are supported.",
    )
    tensors, keys = reader.take("<QQ")
    check(tensors <= _MOST_TENSORS, f"{path} is damaged: it claims {tensors:,} tensors.")
    check(keys <= _MOST_KEYS, f"{path} is damaged: it claims {keys:,} keys.")
    values: dict[str, Any] = {}
    for _ in range(keys):
        key = reader.text(_MOST_NAME)
        check(key not in values, f"{path} is damaged: it holds the key {shown(key)} twice.")
        values[key] = reader.value(reader.take("<I")[0], key)
    offsets: dict[str, Place] = {}
    for _ in range(tensors):
        name = reader.text(_MOST_NAME)
        (axes,) = reader.take("<I")
        check(1 <= axes <= 4, f"{path} is damaged: {shown(name)} has {axes} axes.")
        shape = reader.take(f"<{axes}Q")[::-1]
        kind, offset = reader.take("<IQ")
        check(0 < math.prod(shape) < 1 << 48, f"{path} is damaged: {shown(name)} has the shape {shape}.")
        check(name not in offsets, f"{path} is damaged: it holds {shown(name)} twice.")
        offsets[name] = Place(shape, kind, offset)
    step = values.get("general.alignment", 32)
    good = isinstance(step, int) and 0 < step <= 1 << 16 and not step & (step - 1)
    check(good, f"{path} is damaged: general.alignment must be a power of two, got {shown(step)}.")
    first = -(-reader.at // step) * step
    places = {name: Place(place.shape, place.kind, first + place.start) for name, place in offsets.items()}
    return Header(path, values, places, data)


class _Reader:
    def __init__(self, data: mmap.mmap, path: Path):
        self.data, self.path, self.at = data, path, 4
        self.left = _MOST_VALUES

    def _advance(self, size: int) -> int:
        """Moves past the next `size` bytes and returns where they begin. Raises UserError where the file is shorter."""
        begin, self.at = self.at, self.at + size
        check(self.at <= len(self.data), f"{self.path} is damaged or cut short: its header ends at {len(self.data):,}.")
        check(self.at <= _MOST_BYTES, f"{self.path} is damaged: its header has over {_MOST_BYTES >> 20} MB.")
        return begin

    def take(self, form: str) -> tuple:
        return struct.unpack_from(form, self.data, self._advance(struct.calcsize(form)))

    def text(self, most: int = _MOST_BYTES) -> str:
        (size,) = self.take("<Q")
        check(size <= most, f"{self.path} is damaged: it claims a text of {size:,} bytes.")
        begin = self._advance(size)
        try:
            return self.data[begin : self.at].decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path} is damaged: a text at byte {begin:,} is not UTF-8.") from error

    def value(self, kind: int, key: str) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            return self._numbers(kind, 1, key)[0]
        inner, count = self.take("<IQ")
        self.left -= min(count, _MOST_VALUES + 1)
        check(self.left >= 0, f"{self.path} is damaged: {shown(key)} claims {count:,} values.")
        if inner == _TEXT:
            return [self.text() for _ in range(count)]
        return self._numbers(inner, count, key)

    def _numbers(self, kind: int, count: int, key: str) -> list:
        check(kind in _NUMBERS, f"{self.path} is damaged: {shown(key)} has values of the unknown type {kind}.")
        dtype = np.dtype(_NUMBERS[kind])
        return np.frombuffer(self.data, dtype, count, self._advance(count * dtype.itemsize)).tolist()
