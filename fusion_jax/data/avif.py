"""Estimates how much work and memory an AVIF file costs a decoder, by the AV1 data in it.

The size in an AVIF's header is what the decoded picture is scaled to. The decoder first makes frames of the sizes in
the AV1 data, any number of them, shown or not: a file of 1 kB that claims to be 10 x 10 may take gigabytes and minutes.
"""

import struct
from collections.abc import Iterator

MAX_PARTS = 10_000  # boxes, items or units


def coded_pixels(data: bytes) -> int:
    """Counts the pixels of all frames in an AVIF file's still pictures: the image, its transparency, its thumbnails.

    Raises:
      ValueError, struct.error, IndexError: the file is damaged, or holds what no encoder of pictures writes.
    """
    top = _by_name(data, 0, len(data), ("meta",))
    start, end = top["meta"]
    inner = _by_name(data, start + 4, end, ("iinf", "iloc", "idat"))
    coded = _coded_items(data, *inner["iinf"])
    used = total = 0
    for item, extents in _locations(data, inner["iloc"][0], inner.get("idat", (0, 0))[0]):
        if item in coded:
            used += sum(length for _, length in extents)
            if used > len(data):
                raise ValueError("its pictures share their data")
            total += _frame_pixels(b"".join(data[first : first + length] for first, length in extents))
    return total


def _boxes(data: bytes, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yields name, start and end of the contents of each box."""
    for _ in range(MAX_PARTS):
        if at >= end:
            return
        length, name = struct.unpack_from(">I4s", data, at)
        start = at + 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, start)
            start += 8
        at = end if length == 0 else at + length
        if not start <= at <= end:
            raise ValueError("a box ends beyond its surroundings")
        yield name, start, at
    raise ValueError("it has too many boxes")


def _by_name(data: bytes, start: int, end: int, names: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    boxes: dict[str, tuple[int, int]] = {}
    for box, first, last in _boxes(data, start, end):
        name = box.decode("latin-1")
        if name not in names:
            continue
        if name in boxes:
            raise ValueError(f"it has two boxes {name}")
        boxes[name] = first, last
    return boxes


def _coded_items(data: bytes, start: int, end: int) -> set[int]:
    """Returns the numbers of the items that are AV1."""
    items = set()
    for name, first, _ in _boxes(data, start + (6 if data[start] == 0 else 8), end):
        if name == b"infe":
            number, _, kind = struct.unpack_from(">HH4s" if data[first] == 2 else ">IH4s", data, first + 4)
            if kind == b"av01":
                items.add(number)
    return items


def _locations(data: bytes, at: int, idat: int) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Yields each item's number, and where its pieces begin and how long they are."""

    def number(size: int) -> int:
        nonlocal at
        at += size
        if at > len(data):
            raise ValueError("its list of places is cut off")
        return int.from_bytes(data[at - size : at], "big")

    version = data[at]
    at += 4
    sizes = number(2)
    offset_size, length_size, base_size, index_size = (sizes >> shift & 15 for shift in (12, 8, 4, 0))
    items = number(2 if version < 2 else 4)
    parts = 0
    for _ in range(items):
        item = number(2 if version < 2 else 4)
        method = number(2) & 15 if version else 0
        number(2)  # the number of the file that holds the data, which is always this one
        base = number(base_size) + (idat if method == 1 else 0)
        extents = []
        for _ in range(number(2)):
            if version:
                number(index_size)
            first, length = base + number(offset_size), number(length_size)
            parts += 1
            if method > 1 or not length or first + length > len(data) or parts > MAX_PARTS:
                raise ValueError("its list of places is damaged")
            extents.append((first, length))
        yield item, extents


def _frame_pixels(units: bytes) -> int:
    """Counts the pixels of all frames of an AV1 stream."""
    at, frames, largest = 0, 0, 0
    for _ in range(MAX_PARTS):
        if at >= len(units):
            return frames * largest
        head = units[at]
        at += 1 + (head >> 2 & 1)  # an extension
        length = len(units) - at
        if head & 2:
            length = 0
            for shift in range(0, 56, 7):
                length |= (units[at] & 127) << shift
                at += 1
                if units[at - 1] < 128:
                    break
        kind = head >> 3 & 15
        if kind == 1:
            largest = max(largest, _sequence_pixels(units[at : at + length]))
        frames += kind in (3, 6, 7)  # a header, a frame, a repeated header
        at += length
    raise ValueError("it has too many units")


def _sequence_pixels(header: bytes) -> int:
    """Returns the pixels of the largest frame that a sequence header allows."""
    bits, left = int.from_bytes(header[:64], "big"), 8 * len(header[:64])

    def read(count: int) -> int:
        nonlocal left
        left -= count
        if left < 0:
            raise ValueError("a header is cut off")
        return bits >> left & (1 << count) - 1

    read(4)  # the profile, and whether it is a still picture
    if read(1):  # a short header
        read(5)
    else:
        if read(1):
            raise ValueError("it is timed like a film")
        delays = read(1)
        for _ in range(read(5) + 1):
            read(12)
            if read(5) > 7:
                read(1)
            if delays and read(1):
                read(4)
    width, height = read(4) + 1, read(4) + 1
    return (read(width) + 1) * (read(height) + 1)
