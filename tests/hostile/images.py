"""Image files made to hang, to fill memory or to break the resizer: mutated, nested or lying.

Each goes through all that reads images: `read_size`, `load_image`, `read_crops` and `read_resized`.
It must be refused as a bad record, or give RGB of the size that `read_size` says, within seconds and limits of memory.
"""

import contextlib
import io
import os
import re
import resource
import signal
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from fusion_jax.data import decoding
from fusion_jax.data.image import load_image, read_crops, read_resized, read_size
from fusion_jax.errors import BadRecord

QUICK = 500
SECONDS, MEMORY = 5, 1 << 30  # of the processor, and bytes, for one file
REASONS = ("missing_image", "image_too_large", "unclear_range", "corrupt_image")
ALLOWED = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
FORBIDDEN = ("ICO", "ICNS", "DDS", "EPS", "PCX", "TGA", "SGI", "IM", "MSP", "XBM", "DIB", "PDF", "BLP", "SPIDER", "QOI")
EXTREMES = (0, 1, 7, 255, 256, 32767, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1)


def attempts(random: np.random.Generator, folder: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    seeds = _seeds(random)
    names = list(seeds)
    paths = _paths(folder)
    while True:
        kind = random.integers(10)
        if kind == 0:
            what, path = paths[random.integers(len(paths))]
            yield what, lambda path=path: _try(path)
        elif kind < 3:
            make = COMPOSED[random.integers(len(COMPOSED))]
            data = make(random, seeds)
            yield make.__name__.strip("_").replace("_", " "), lambda data=data: _try(data)
        else:
            name = names[random.integers(len(names))]
            data = _mutated(random, seeds, name)
            path = folder / "image"
            path.write_bytes(data)
            given = data if random.integers(4) else path
            yield f"{name}, mutated", lambda given=given: _try(given)


def _try(given: bytes | Path | str) -> str:
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(60)
    memory, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        return _read(given)
    finally:
        signal.alarm(0)
        seconds = time.process_time() - begun
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) << 10
        assert seconds < SECONDS, f"{seconds:.1f} s of the processor"
        assert grown < MEMORY, f"{grown >> 20} MB more memory"


def _too_long(*_) -> None:
    raise TimeoutError("it takes over a minute")


def _read(given: bytes | Path | str) -> str:
    size = _refused(lambda: read_size(given))
    loaded = _refused(lambda: load_image(given))
    crops = _refused(lambda: read_crops(given, 8, decode="fast"))
    resized = _refused(lambda: read_resized(given, [(9, 5), (3, 30)]))
    if loaded is None:
        assert crops is None and resized is None, "refused when loaded and not when cropped"
        return "refused"
    assert loaded.mode == "RGB" and loaded.size == size, f"{loaded.mode} of {loaded.size}, and {size} were said"
    assert np.asarray(loaded).shape == (size[1], size[0], 3)
    assert size[0] * size[1] <= decoding.MAX_PIXELS and max(size) <= decoding.MAX_SIDE
    assert crops.shape == (5, 8, 8, 3) and [one.shape for one in resized] == [(5, 9, 3), (30, 3, 3)]
    return "accepted"


def _refused(read: Callable):
    try:
        return read()
    except BadRecord as bad:
        assert bad.reason in REASONS
        return None


def _encode(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.copy().save(file, form, **options)  # an image remembers how it was saved
    return file.getvalue()


def _seeds(random: np.random.Generator) -> dict[str, bytes]:
    """A file of each format, and of each important variant, allowed or not."""
    y, x = np.mgrid[:37, :53]
    image = Image.fromarray(np.stack([4 * x, 5 * y, 255 - 2 * x - 2 * y], -1).astype(np.uint8))
    grey = Image.fromarray(random.integers(0, 65536, (9, 11)).astype(np.uint16))
    red = Image.new("RGB", image.size, (200, 0, 0))
    clear = image.convert("RGBA")
    clear.putalpha(90)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "x" * 200
    seeds = {form: _encode(image, form) for form in ALLOWED}
    for form in FORBIDDEN:
        for mode in ("RGB", "L", "1"):
            try:
                seeds[form] = _encode(image.resize((32, 32)).convert(mode), form)
                break
            except (OSError, KeyError, ValueError):  # this Pillow does not write it, or not in this mode
                continue
    variants = {
        "progressive": ("JPEG", image, {"progressive": True}),
        "CMYK": ("JPEG", image.convert("CMYK"), {"exif": exif}),
        "MPO of two": ("MPO", image, {"save_all": True, "append_images": [red.copy()]}),
        "palette": ("PNG", image.quantize(16), {}),
        "16 bits": ("PNG", grey, {}),
        "APNG": ("PNG", image, {"save_all": True, "append_images": [red.copy()], "exif": exif}),
        "film": ("WEBP", clear, {"save_all": True, "append_images": [red.copy()]}),
        "lossless": ("WEBP", clear, {"lossless": True, "exif": exif}),
        "of two": ("GIF", image, {"save_all": True, "append_images": [red.copy()]}),
        "with alpha": ("AVIF", clear, {}),
        "film of AV1": ("AVIF", image, {"save_all": True, "append_images": [red.copy()]}),
        "codestream": ("JPEG2000", image, {"no_jp2": True}),
        "tiled": ("JPEG2000", image, {"tile_size": (16, 16)}),
        "of 16 bits": ("TIFF", grey, {}),
        "turned": ("TIFF", image, {"exif": exif}),
        "of two pages": ("TIFF", image, {"save_all": True, "append_images": [red.copy()]}),
        "grey of 16 bits": ("PPM", grey, {}),
        "4 bits": ("BMP", image.quantize(16), {}),
    }
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits", "zstd", "lzma", "webp"):
        variants[compression] = "TIFF", image, {"compression": compression}
    variants["group4"] = "TIFF", image.convert("1"), {"compression": "group4"}
    for name, (form, one, options) in variants.items():
        with contextlib.suppress(OSError):  # a compression that this libtiff was built without
            seeds[f"{form} {name}"] = _encode(one, form, **options)
    seeds["PPM of text"] = b"P3 # text\n3 2 9\n" + b" 1 2 3" * 6
    seeds["PPM of bits"] = b"P1\n3 2\n101010"
    seeds["PPM of 12 bits"] = b"P6 2 2 4095\n" + bytes(range(24))
    seeds["PPM of floats"] = b"Pf 2 2\n-1.0\n" + struct.pack("<4f", 0, 1, 1e30, float("nan"))
    seeds["BMP of runs"] = _bmp_of_runs(9, 5, b"\x09\x01\0\0" * 5 + b"\0\1")
    return seeds


def _mutated(random: np.random.Generator, seeds: dict[str, bytes], name: str) -> bytes:
    data = bytearray(seeds[name])
    for _ in range(random.integers(1, 4)):
        at = int(random.integers(len(data))) if random.integers(2) else int(random.integers(min(len(data), 200)))
        kind = random.integers(7)
        if kind == 0:
            del data[at + 1 :]
        elif kind == 1:
            for place in random.integers(0, len(data), random.integers(1, 30)):
                data[place] ^= 1 << random.integers(8)
        elif kind == 2:  # a number in a header
            width, order = (2, 4)[random.integers(2)], ("little", "big")[random.integers(2)]
            value = EXTREMES[random.integers(len(EXTREMES))] % 256**width
            data[at : at + width] = value.to_bytes(width, order)
        elif kind == 3:  # a part twice, or often
            part = data[at : at + int(random.integers(1, 300))]
            data[at:at] = part * int(random.choice((1, 2, 500)))
        elif kind == 4:  # into another file, or another one's part
            other = list(seeds.values())[random.integers(len(seeds))]
            data[at : at + int(random.integers(60))] = other[int(random.integers(len(other))) :][:2000]
        elif kind == 5:
            del data[at : at + int(random.integers(1, 60))]
        else:
            data[at:at] = random.integers(0, 256, random.integers(1, 3000), np.uint8).tobytes()
        if not data:
            data = bytearray(b"\xff")
    return bytes(data)


# Known attacks, with random sizes.


def _blank(random: np.random.Generator, form: str = "PNG") -> bytes:
    side = int(random.choice((10, 900, 3000)))
    return _encode(Image.new("L", (side, side)), form)


def _nested_in_IPTC(random: np.random.Generator, seeds: dict[str, bytes]) -> bytes:
    """Of a size that its header does not say."""

    def field(*tag: int, data: bytes) -> bytes:
        return bytes((0x1C, *tag)) + struct.pack(">H", len(data)) + data

    inner = _blank(random) if random.integers(2) else list(seeds.values())[random.integers(len(seeds))]
    inner = inner[:32000]
    size = random.integers(1, 60, 2)
    head = [field(3, 60, data=b"\1\0"), field(3, 65, data=b"\1")]
    head += [field(3, tag, data=struct.pack(">H", value)) for tag, value in zip((20, 30), size)]
    return b"".join([*head, field(3, 120, data=b"\5"), field(8, 10, data=inner)])


def _nested_in_ICO(random: np.random.Generator, seeds: dict[str, bytes]) -> bytes:
    inner = _blank(random) if random.integers(2) else _png(30_000, 30_000)
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(inner), 22) + inner


def _nested_in_JPEG_of_TIFF(random: np.random.Generator, seeds: dict[str, bytes]) -> bytes:
    inner = _blank(random, "JPEG")
    return _tiff({256: 10, 257: 10, 258: 8, 259: 7, 262: 1, 277: 1, 278: 10, 279: len(inner)}, inner, 273)


def _postscript(random: np.random.Generator, seeds: dict[str, bytes]) -> bytes:
    text = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(/etc/passwd) run\n"
    return text if random.integers(2) else b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 30, len(text)) + bytes(18) + text


def _png(width: int, height: int, before: bytes = b"", rows: bytes = b"", kind: int = 2, bits: int = 8) -> bytes:
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + before + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _tiff(tags: dict[int, int], data: bytes = b"", places: int | None = None, order: str = "<", more=()) -> bytes:
    """Of one directory, whose tags are numbers; `places` is the tag that says where the data begin."""
    entries = [*tags.items(), *more]
    entries += [(places, 8 + 2 + 12 * (len(entries) + 1) + 4)] if places else []
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    listed = [
        struct.pack(order + "HHI", tag, 4, 1) + struct.pack(order + "I", value % 2**32)
        for tag, value in sorted(entries)
    ]
    return head + struct.pack(order + "H", len(listed)) + b"".join(listed) + bytes(4) + data


def _sizes_that_lie(random: np.random.Generator, seeds: dict[str, bytes]) -> bytes:
    """The header's width and height replaced, in the format's own way."""
    width, height = (int(random.choice((1, 9, 4000, 8900, 30_000, 65_535, 65_536))) for _ in range(2))
    kind = random.integers(8)
    if kind == 0:
        return _png(width, height, kind=int(random.choice((0, 2, 6))), bits=int(random.choice((8, 16))))
    if kind == 1:
        return seeds["GIF"][:6] + struct.pack("<HH", width % 65536, height % 65536) + seeds["GIF"][10:]
    if kind == 2:
        data = bytearray(seeds["JPEG"])
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", height % 65536, width % 65536)
        return bytes(data)
    if kind == 3:
        data = bytearray(seeds["WEBP lossless"])
        data[24:30] = width.to_bytes(3, "little") + height.to_bytes(3, "little")
        return bytes(data)
    if kind == 4:
        data = bytearray(_encode(Image.new("L", (1500, 1500)), "AVIF", speed=10))
        at = data.index(b"ispe") + 8
        data[at : at + 8] = struct.pack(">II", width, height)
        return bytes(data)
    if kind == 5:
        name = "JPEG2000 codestream" if random.integers(2) else "JPEG2000"
        data = bytearray(seeds[name])
        at = data.index(b"\xff\x4f\xff\x51") + 8 if random.integers(2) else data.find(b"ihdr") + 4
        data[at : at + 8] = struct.pack(">II", width, height)
        return bytes(data)
    if kind == 6:
        return _bmp_of_runs(width, height, bytes(random.integers(0, 4, 3000, np.uint8)))
    return b"P%d %d %d " % (random.integers(1, 7), width, height) + b"200\n" + bytes(1000)


def _bmp_of_runs(width: int, height: int, data: bytes) -> bytes:
    sizes = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(data), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 54 + 1024) + sizes + bytes(1024) + data


def _scans(random: np.random.Generator, seeds: dict[str, bytes]) -> bytes:
    data = _encode(Image.new("L", (2000, 2000)), "JPEG", progressive=True)
    starts = [found.start() for found in re.finditer(b"\xff\xda", data)]
    part = data[starts[1] : starts[2]]
    return data[: starts[2]] + part * int(random.choice((5, 80, 3000, 30_000))) + data[starts[2] :]


def _metadata(random: np.random.Generator, seeds: dict[str, bytes]) -> bytes:
    """Much of it, in many small parts, or unpacking to megabytes, or directories that share their data."""
    count, kind = int(random.choice((3, 300, 20_000))), random.integers(7)
    if kind == 0:
        profile = _chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1_000_000)))
        text = _chunk(b"zTXt", b"\0\0" + zlib.compress(bytes(1_000_000)))
        return _png(9, 7, (profile + text) * min(count, 2000), bytes(7 * 28))
    if kind == 1:
        return _png(9, 7, _chunk(b"tEXt", b"a\0b") * count, bytes(7 * 28))
    segment = b"\xff\xe1\0\x0aExif\0\0a" * count
    if kind == 2:
        return seeds["JPEG"][:2] + segment + seeds["JPEG"][2:]
    if kind == 3:  # a directory of fractions that all lie in the same place
        entries = b"".join(struct.pack("<HHII", 1000 + i, 5, 7000, 8) for i in range(600))
        inner = b"II*\0\x08\0\0\0" + struct.pack("<H", 600) + entries
        inner = (inner + bytes(60_000))[:60_000]
        both = [(b"\xff\xe1", b"Exif\0\0"), (b"\xff\xe2", b"MPF\0")]
        marks = b"".join(mark + struct.pack(">H", 2 + len(name + inner)) + name + inner for mark, name in both)
        return seeds["JPEG"][:2] + marks + seeds["JPEG"][2:]
    if kind == 6:
        return (
            seeds["JPEG"][:2]
            + (b"\xff\xd8", b"\xff\xd0", b"\xff\x01", b"\0")[random.integers(4)] * count * 100
            + seeds["JPEG"][2:]
        )
    if kind == 4:
        gif = seeds["GIF"]
        at = gif.index(b",", 13)
        return gif[:at] + b"!\xfe" + b"\1a" * count * 40 + b"\0" + gif[at:]
    return b"P5 " + b"#" + b"a" * count * 40 + b"\n3 3 255\n" + bytes(9)


def _tiles(random: np.random.Generator, seeds: dict[str, bytes]) -> bytes:
    """A small image in enormous tiles, whose data is little, all in the same place."""
    width, height = int(random.choice((1, 10, 65_535))), int(random.choice((1, 10, 1000)))
    tile = [int(random.choice((16, 4096, 30_000, 2**20, 2**27, 2**31))) for _ in range(2)]
    data = zlib.compress(bytes(int(random.choice((100, 10_000_000)))))
    compression = int(random.choice((1, 5, 7, 8, 32773)))
    tags = {
        256: width,
        257: height,
        258: 8,
        259: compression,
        262: 1,
        277: 1,
        322: tile[0],
        323: tile[1],
        325: len(data),
    }
    return _tiff(tags, data, 324, "<>"[random.integers(2)])


def _tags_twice(random: np.random.Generator, seeds: dict[str, bytes]) -> bytes:
    data = zlib.compress(bytes(4_000_000))
    tags = {256: 10, 257: 10, 258: 8, 259: 8, 262: 1, 277: 1, 278: 10, 279: len(data)}
    again = [
        (int(tag), int(random.choice((1, 2000, 60_000)))) for tag in random.choice((256, 257, 278, 259, 322, 323), 2)
    ]
    return _tiff(tags, data, 273, more=again)


def _plain_text(random: np.random.Generator, seeds: dict[str, bytes]) -> bytes:
    side = int(random.choice((40, 400, 3000)))
    word = (b"1 ", b"1", b"255 ", b"# \n1 ", b"99999999999 ", b"-1 ")[random.integers(6)]
    return b"P%d %d %d %s" % (random.integers(1, 4), side, side, b"255 ") + word * min(side * side * 3, 3_000_000)


def _frames_within_AVIF(random: np.random.Generator, seeds: dict[str, bytes]) -> bytes:
    """Hidden frames: the data of the picture again and again, with the file's numbers left as they are, or not."""
    data = seeds["AVIF"]
    at = data.index(b"mdat") + 4
    body = data[at:] * int(random.choice((1, 3, 400)))
    changed = bytearray(data[:at] + body)
    changed[at - 8 : at - 4] = struct.pack(">I", len(body) + 8)
    place = data.find(struct.pack(">I", len(data) - at))
    if place > 0 and random.integers(2):
        changed[place : place + 4] = struct.pack(">I", len(body))
    return bytes(changed)


def _bomb(random: np.random.Generator, seeds: dict[str, bytes]) -> bytes:
    side = int(random.choice((100, 2000, 4000)))
    image = Image.new("RGB", (side, side))
    form = ("PNG", "WEBP", "GIF", "TIFF", "JPEG2000", "AVIF")[random.integers(6)]
    if form == "JPEG2000":
        image = image.resize((min(side, 1500),) * 2)
    return _encode(image, form, **({"compression": "tiff_deflate"} if form == "TIFF" else {}))


COMPOSED = (
    _nested_in_IPTC,
    _nested_in_ICO,
    _nested_in_JPEG_of_TIFF,
    _postscript,
    _sizes_that_lie,
    _sizes_that_lie,
    _scans,
    _metadata,
    _metadata,
    _tiles,
    _tags_twice,
    _plain_text,
    _frames_within_AVIF,
    _bomb,
)


def _paths(folder: Path) -> list[tuple[str, Path | str]]:
    """What is no image file, though it can be named."""
    os.mkfifo(folder / "pipe.jpg")
    (folder / "link.jpg").symlink_to(folder / "pipe.jpg")
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")
    (folder / "empty.jpg").touch()
    with (folder / "sparse.png").open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        file.truncate(1 << 40)
    devices = [(name, f"/dev/{name}") for name in ("zero", "null", "random", "stdin", "tty", "full")]
    others = [("a folder", folder), ("nothing", folder / "none.png"), ("a name with NUL", "a\0b.png")]
    others += [("a long name", folder / ("a" * 5000)), ("memory", "/proc/self/mem"), ("a surrogate", "\udcff\ud800")]
    found = ("pipe.jpg", "link.jpg", "loop.jpg", "empty.jpg", "sparse.png")
    return [(name, folder / name) for name in found] + devices + others
