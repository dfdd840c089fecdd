"""Finds the true size of a JPEG 2000 file and the small parts that each cost a decoder memory.

A file of 2 kB and 10 million pixels, cut into precincts of one pixel, would take 16 GB.
"""

import struct
from collections.abc import Iterator

START = b"\xff\x4f\xff\x51"  # the two markers that begin the pixels
MAX_BLOCKS = 470_000  # blocks of all channels, about 1 kB each: 30 million values in blocks of 8 x 8
MAX_PRECINCTS = 100_000  # precincts of all channels, about 1.6 kB each
MAX_PARTS = 100_000
_STYLE, _STYLE_OF_CHANNEL, _TILE, _TILE_DATA, _END = 0xFF52, 0xFF53, 0xFF90, 0xFF93, 0xFFD9
_KNOWN = (0xFF50, 0xFF51, _STYLE, _STYLE_OF_CHANNEL, 0xFF55, *range(0xFF57, 0xFF5A), *range(0xFF5C, 0xFF62), 0xFF63)
_KNOWN += (0xFF64, 0xFF74, 0xFF75, 0xFF77, 0xFF78)


def measure(data: bytes) -> tuple[tuple[int, int], int, int]:
    """Returns width and height in pixels, channels, and tiles, as the pixels' own header says.

    Raises:
      ValueError, struct.error: the file is damaged, or its parts are smaller than any encoder of pictures writes them.
    """
    at = _pixels(data)
    right, bottom, left, top, width, height, x, y, channels = struct.unpack_from(">8x8IH", data, at)
    if data[at : at + 4] != START or not width or not height or channels > 4:
        raise ValueError("its pixels begin in an unknown way")
    for marker, start in _markers(data, at + 2):
        if marker in (_STYLE, _STYLE_OF_CHANNEL):
            own, levels = (start + 4, start + 9) if marker == _STYLE else (start + 5, start + 6)
            _check_parts(data, own, levels, (right, bottom), channels)
    return (right - left, bottom - top), channels, -(-(right - x) // width) * -(-(bottom - y) // height)


def _pixels(data: bytes) -> int:
    """Returns where the pixels begin: at once, or in a box."""
    at = 0
    if data[:2] == START[:2]:
        return at
    for _ in range(10_000):
        length, name = struct.unpack_from(">I4s", data, at)
        head = 8
        if length == 1:
            (length,), head = struct.unpack_from(">Q", data, at + 8), 16
        if name == b"jp2c":
            return at + head
        if length < head:
            break
        at += length
    raise ValueError("it has no pixels")


def _markers(data: bytes, at: int) -> Iterator[tuple[int, int]]:
    """Yields the markers of all headers, the image's and its tiles', and where they are."""
    tile = end = 0
    for _ in range(MAX_PARTS):
        if at + 12 > len(data):
            return
        marker, length = struct.unpack_from(">HH", data, at)
        if marker == _END:
            return
        if marker == _TILE:
            tile, (size,) = at, struct.unpack_from(">I", data, at + 6)
            end = tile + size if size else len(data)
            if size and size < 12:
                raise ValueError("a tile has no length")
        elif marker == _TILE_DATA and end:
            at = end
            continue
        elif marker not in _KNOWN or length < 2:
            raise ValueError(f"it has the unknown marker {marker:x}")
        yield marker, at
        at += 2 + length
    raise ValueError("it has too many markers")


def _check_parts(data: bytes, own: int, levels: int, size: tuple[int, int], channels: int) -> None:
    """Raises ValueError if precincts or blocks are too many; the byte at `own` says whether precinct sizes follow."""
    across, down = data[levels + 1] & 15, data[levels + 2] & 15
    blocks = channels * -(-size[0] >> across + 2) * -(-size[1] >> down + 2)
    if blocks > MAX_BLOCKS:
        raise ValueError(f"it has {blocks} blocks; allowed are {MAX_BLOCKS}")
    sides = data[levels + 5 : levels + 6 + data[levels]] if data[own] & 1 else b""
    precincts = 0
    for level, side in enumerate(sides):  # each has twice the width and height of the one before
        halved = data[levels] - level
        width, height = (-(-one >> halved) for one in size)
        precincts += -(-width >> (side & 15)) * -(-height >> (side >> 4))
    if precincts * channels > MAX_PRECINCTS:
        raise ValueError(f"it has {precincts * channels} precincts; allowed are {MAX_PRECINCTS}")
