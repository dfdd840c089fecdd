"""Names the image formats that are read, and checks untrusted files before Pillow sees them.

If a decoder's work followed from the size in the header alone, a limit on pixels would be enough. Where it does not, it
is bounded here:

| format | what would take long, or much memory | what is done |
|---|---|---|
| JPEG, MPO (a JPEG with others after it) | metadata, whose parts may share their bytes | left out |
| | hundreds of scans of a progressive image, of a few bytes each | MAX_SCANS |
| PNG | compressed texts and colour profiles | left out |
| WebP | opening it makes two canvases of the size in the header | the size is read before |
| TIFF | tiles larger than the image | MAX_TILED_PIXELS |
| | two sizes in one directory, tags of any length | refused; MAX_TAG_VALUES |
| | decoders that few need: LZMA, WebP, old JPEG and others in a TIFF | TIFF_COMPRESSIONS |
| JPEG 2000 | another size in the header than in the pixels; many channels, tiles, tiny precincts or blocks | refused |
| AVIF | frames of another size than the header's, hidden ones, films | MAX_AV1_PIXELS, the first picture alone |
| JPEG 2000, BMP with run lengths | a slow decoder | MAX_SLOW_SAMPLES |
| PPM, as text | a slow decoder | MAX_TEXT |
| PPM, with another greatest value than 255 | a slow decoder | `scaled_ppm` does its work |
| any | long chains of short comments, segments or chunks | MAX_READS |
"""

import io
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from fusion_jax.data.avif import coded_pixels
from fusion_jax.data.jpeg2000 import measure
from fusion_jax.files import open_file

MAX_SLOW_SAMPLES = 30_000_000  # pixels times channels where each may take a third of a microsecond
MAX_TEXT = 4 << 20  # bytes of a PPM whose values are text
MAX_SCANS = 100  # scans of a JPEG; encoders write about ten
MAX_TILED_PIXELS = 120_000_000  # pixels of all tiles of a TIFF, which may extend beyond the image's edges
MAX_TAG_VALUES = 1_000_000  # numbers in a TIFF's directory; the places of tiles of 16 x 16 pixels are 300,000
MAX_AV1_PIXELS = 100_000_000  # pixels of all that is coded in an AVIF: the image, its transparency, its thumbnails
MAX_TILES = 16_384  # tiles of a JPEG 2000
MAX_READS = 1_000_000  # pieces in which Pillow may read a file, a tenth of them for its header; a second or two
TIFF_COMPRESSIONS = (
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    32773,
    32946,
    50000,
)  # none, CCITT, LZW, JPEG, deflate, run lengths, Zstandard
ALLOWED = "JPEG, MPO, PNG, WebP, GIF, BMP, TIFF, PPM, JPEG 2000 and AVIF"

_STARTS = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "WEBP": rb"RIFF....WEBPVP8[ LX]",
    "GIF": rb"GIF8[79]a",
    "BMP": rb"BM",
    "TIFF": rb"II[*+]\0|MM\0\*",  # Pillow and libtiff read big-endian BigTIFF differently
    "PPM": rb"P[1-6][ \t\n\v\f\r]",
    "JPEG2000": rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  \r\n\x87\n",
    "AVIF": rb"....ftyp(?:avif|avis|mif1|msf1)",
}
FORMATS = tuple(_STARTS)  # as Pillow names them

Image.preinit()
Image.init()  # now, because Pillow's own lazy loading is not safe with several threads


class TooLarge(ValueError):
    """The image, or the work of decoding it, is over a limit. The message continues "the image ..."."""


def read_file(path: str | Path, most: int, start: int | None = None) -> tuple[bytes, int]:
    """Reads a file or its beginning; returns that, and the length of the whole in bytes.

    Args:
      most: bytes that it may have. start: bytes of the beginning, if that is enough.

    Raises:
      OSError: it cannot be read, or is not a regular file (`files.open_file`).
      TooLarge: it has over `most` bytes.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise TooLarge(f"has more than {most} bytes")
        return file.read(most if start is None else start), size


def format_of(start: bytes) -> str | None:
    """Returns one of FORMATS by a file's first 16 bytes, or None."""
    return next((form for form in FORMATS if re.match(_STARTS[form], start, re.DOTALL)), None)


def prepare(form: str, data: bytes) -> tuple[bytes, tuple[int, int] | None]:
    """Returns what Pillow gets of a file of that format and, if known, the width and height that it must see in it.

    Raises:
      TooLarge, ValueError, struct.error, IndexError: the file is damaged, or made to be slow.
    """
    return _PREPARE[form](data) if form in _PREPARE else (data, None)


class Reader(io.BytesIO):
    """A file in memory that may be read in MAX_READS / 10 pieces at first, with eight times its bytes in all."""

    def __init__(self, data: bytes):
        super().__init__(data)
        self.pieces, self.bytes = MAX_READS // 10, 8 * len(data) + (1 << 20)

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.pieces -= 1
        self.bytes -= len(data)
        if self.pieces < 0 or self.bytes < 0:
            raise TooLarge("is made of too many small parts")
        return data

    def opened(self) -> None:
        """Allows MAX_READS pieces from now on: the header was read in few, and the pixels may take more."""
        self.pieces = MAX_READS


def check_decoder(image: Image.Image, length: int) -> None:
    """Raises TooLarge if an image of `length` bytes, not decoded yet, has too many pixels for its decoder."""
    decoder = image.tile[0][0] if image.tile else ""
    samples = image.width * image.height * len(image.getbands())
    if decoder in ("bmp_rle", "jpeg2k") and samples > MAX_SLOW_SAMPLES:
        raise TooLarge(f"has {samples} values; allowed are {MAX_SLOW_SAMPLES} in a {image.format} of its kind")
    if decoder == "ppm_plain" and length > MAX_TEXT:
        raise TooLarge(f"has {length} bytes; allowed are {MAX_TEXT} in a PPM that is written as text")


def scaled_ppm(image: Image.Image) -> Image.Image:
    """Returns the pixels, 8 bits each, of a PPM that Pillow's `ppm` decoder would read value by value in Python.

    They equal that decoder's: scaled to 255 or, for grey beyond 8 bits, to 65535, of which the upper 8 bits are kept.
    """
    (_, _, offset, (_, largest)), channels = image.tile[0], len(image.getbands())
    ends = 65535 if image.mode == "I" else 255
    table = np.array([min(ends, round(value / largest * ends)) for value in range(largest + 1)])
    table = (table >> 8 if image.mode == "I" else table).astype(np.uint8)
    shape = (image.height, image.width, channels)[: 3 if channels > 1 else 2]
    kind = np.dtype(np.uint8 if largest < 256 else ">u2")
    values = np.frombuffer(image.fp.getvalue(), kind, int(np.prod(shape)), offset)
    return Image.fromarray(table[np.minimum(values, largest)].reshape(shape))


_MARKER = re.compile(rb"\xff+([^\x00\xff])", re.DOTALL)
_MARKER_AFTER_PIXELS = re.compile(rb"\xff+([^\x00\xd0-\xd7\xff])", re.DOTALL)  # not the byte FF itself, nor restarts
_ALONE = (0x01, *range(0xD0, 0xD9))  # markers without contents
_SCAN, _END, _COMMENT = 0xDA, 0xD9, 0xFE
_PASSED_OVER = (*range(0xE0, 0xF0), _COMMENT)  # libjpeg treats a length below 2 of these as 2
_COLOURS = {0xE0: b"JFIF", 0xEE: b"Adobe"}


def _segments(data: bytes, at: int, marker: re.Pattern[bytes]) -> Iterator[tuple[int, int, int]]:
    """Yields marker, start and end of a JPEG's segments as libjpeg sees them; anything may be between them."""
    for _ in range(MAX_READS // 10):
        match = marker.search(data, at)
        if match is None or match[1][0] == _END:
            return
        at = match.end()
        if match[1][0] in _ALONE:
            continue
        start, length = at - 2, int.from_bytes(data[at : at + 2], "big")
        if length < 2 and match[1][0] not in _PASSED_OVER:
            raise ValueError("a segment of the file has no length")
        at += max(length, 2)
        yield match[1][0], start, at
    raise TooLarge("is made of too many small parts")


def _jpeg(data: bytes) -> tuple[bytes, None]:
    """Removes metadata, except what decides the colours: the markers of JFIF and Adobe."""
    kept, pixels = [data[:2]], len(data)
    for marker, start, end in _segments(data, 2, _MARKER):
        if marker == _SCAN:
            pixels = start
            break
        about = marker in _PASSED_OVER
        colours = marker in _COLOURS and data[start + 4 : end].startswith(_COLOURS[marker])
        if colours or not about:
            kept.append(data[start:end])
        if len(kept) > MAX_SCANS:
            raise TooLarge(f"has more than {MAX_SCANS} segments before its pixels")
    # Counting bytes is quick but includes what only looks like a scan, so a large count is checked by segments.
    if data.count(bytes((0xFF, _SCAN)), pixels) > MAX_SCANS:
        scans = (marker == _SCAN for marker, _, _ in _segments(data, pixels, _MARKER_AFTER_PIXELS))
        if sum(scans) > MAX_SCANS:
            raise TooLarge(f"has more than {MAX_SCANS} scans")
    return b"".join([*kept, data[pixels:]]), None


def _png(data: bytes) -> tuple[bytes, None]:
    """Removes all that is not pixels: texts, profiles, transparency, further pictures."""
    kept, at = [data[:8]], 8
    for _ in range(MAX_READS // 10):
        if at + 8 > len(data):
            break
        length, name = struct.unpack_from(">I4s", data, at)
        start, at = at, at + 12 + length
        if name in (b"IHDR", b"PLTE", b"IDAT", b"IEND"):
            kept.append(data[start:at])
        if name == b"IEND":
            break
    else:
        raise TooLarge("is made of too many small parts")
    return b"".join(kept), None


def _webp(data: bytes) -> tuple[bytes, tuple[int, int]]:
    if data[12:16] == b"VP8X":
        return data, tuple(int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
    if data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return data, ((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    return data, tuple(int.from_bytes(data[at : at + 2], "little") & 0x3FFF for at in (26, 28))


_BYTES = (1, 2, 7)  # types that Pillow keeps as they are
_UNIT = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_WHOLE = {1: "B", 3: "H", 4: "I", 16: "Q"}
_WIDTH, _LENGTH, _COMPRESSION, _TILE_WIDTH, _TILE_LENGTH = 256, 257, 259, 322, 323
_TEXTS = (269, 270, 271, 272, 285, 305, 306, 315, 316)  # names, descriptions, dates: writers put several of one kind
_PRIVATE = 33432  # the copyright, and all tags after it: no pixel that is read depends on them


def _tiff(data: bytes) -> tuple[bytes, None]:
    """Returns the file as it is, after checking that its first directory is unambiguous and holds nothing enormous."""
    order, big = "<" if data[:1] == b"I" else ">", data[2] == 43
    (at,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
    (entries,) = struct.unpack_from(order + ("Q" if big else "H"), data, at)
    at, step = at + (8 if big else 2), 20 if big else 12
    if entries > 65_535:
        raise TooLarge("has a directory of too many entries")
    tags, values, outside = {}, 0, 0
    for entry in range(at, at + step * entries, step):
        tag, kind, count = struct.unpack_from(order + ("HHQ" if big else "HHI"), data, entry)
        if tag in tags and tag not in _TEXTS and tag < _PRIVATE:
            raise ValueError(f"its directory has the tag {tag} twice")  # Pillow takes the last, libtiff the first
        tags[tag] = None
        size, room = count * _UNIT.get(kind, 8), 8 if big else 4
        outside += size if size > room else 0
        values += (
            0 if kind in _BYTES else count * 10 if kind in (5, 10) else count
        )  # a fraction takes ten times as much
        if tag in (_WIDTH, _LENGTH, _COMPRESSION, _TILE_WIDTH, _TILE_LENGTH):
            if count != 1 or kind not in _WHOLE:
                raise ValueError(f"its tag {tag} is not a number")
            (tags[tag],) = struct.unpack_from(order + _WHOLE[kind], data, entry + step - room)
    if outside > len(data):
        raise ValueError("the parts of its directory are longer than the file")
    if values > MAX_TAG_VALUES:
        raise TooLarge(f"has over {MAX_TAG_VALUES} numbers in its directory")
    if tags.get(_COMPRESSION, 1) not in TIFF_COMPRESSIONS:
        raise ValueError(f"its compression, number {tags[_COMPRESSION]}, is not one that is read")
    if _TILE_WIDTH in tags or _TILE_LENGTH in tags:
        across, down = (-(-tags[size] // tags[tile]) * tags[tile] for size, tile in _SIDES)
        if across * down > MAX_TILED_PIXELS:
            raise TooLarge(f"has tiles of {across}x{down} pixels together; allowed are {MAX_TILED_PIXELS}")
    return data, None


_SIDES = ((_WIDTH, _TILE_WIDTH), (_LENGTH, _TILE_LENGTH))


def _jpeg2000(data: bytes) -> tuple[bytes, tuple[int, int]]:
    size, channels, tiles = measure(data)
    if size[0] * size[1] * channels > MAX_SLOW_SAMPLES:
        values = f"{size[0]}x{size[1]} pixels of {channels} values"
        raise TooLarge(f"has {values}; allowed are {MAX_SLOW_SAMPLES} values in a JPEG 2000")
    if tiles > MAX_TILES:
        raise TooLarge(f"has more than {MAX_TILES} tiles")
    return data, size


_REMARK = re.compile(rb"#[^\n\r]*(?:[\n\r]|$)")


def _ppm(data: bytes) -> tuple[bytes, None]:
    """Removes its comments, if it is text: for each Pillow copies all that follows."""
    return _REMARK.sub(b"", data) if data[1] in b"123" and len(data) <= MAX_TEXT else data, None


def _avif(data: bytes) -> tuple[bytes, None]:
    coded = coded_pixels(data)
    if coded > MAX_AV1_PIXELS:
        raise TooLarge(f"has {coded} pixels in all its parts; allowed are {MAX_AV1_PIXELS} in an AVIF")
    return data[:8] + b"avif" + data[12:], None  # the brand of files that are one picture, not a film


_PREPARE = {"JPEG": _jpeg, "PNG": _png, "WEBP": _webp, "TIFF": _tiff, "JPEG2000": _jpeg2000, "AVIF": _avif, "PPM": _ppm}
