"""Loads images from files and cuts the fixed crops that the encoder reads.

decoding.py opens the files and lists what becomes of each kind; formats.py guards against files that are made to be
slow.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from fusion_jax.config import DECODES
from fusion_jax.data import decoding, formats, grey
from fusion_jax.data.decoding import decode_opened, open_image, size_once_decoded
from fusion_jax.data.resample import resample
from fusion_jax.data.tiles import Tiling, on_canvas
from fusion_jax.errors import BadRecord, check_choice
from fusion_jax.files import shown

_BEGINNING = 1 << 16  # bytes that are read first if only the width and height are needed
_BY_BEGINNING = ("JPEG", "PNG", "GIF", "BMP", "PPM", "JPEG2000")  # formats that mostly need no more


def load_image(image: str | Path | bytes, where: str | None = None) -> Image.Image:
    """Loads an image file, or what such a file contains, fully decoded, in RGB; see the top of decoding.py.

    Args:
      image: the path of a file of one of the formats there, or its bytes.
      where: named in errors; by default the path alone.

    Raises:
      BadRecord: reason missing_image (cannot be opened, or is not a file), image_too_large (over MAX_BYTES, MAX_PIXELS,
        MAX_SIDE of decoding.py, or a limit of formats.py), unclear_range (grey.py) or corrupt_image.
    """
    return _decode(image, where, None)[0]


def read_size(image: str | Path | bytes, where: str | None = None) -> tuple[int, int]:
    """Returns the width and height in pixels that `load_image` will give, by the file's header alone.

    Args, Raises: as for `load_image`; damage after the header stays unnoticed.
    """
    where, name = _names(image, where)
    if isinstance(image, bytes):
        data = image
    else:
        start, length = _read(image, where, name, _BEGINNING)
        if length > len(start) and formats.format_of(start[:16]) in _BY_BEGINNING:
            with contextlib.suppress(Exception):  # whatever the error is, reading the whole file raises it again
                return size_once_decoded(open_image(start, length=length))
        data = start if length <= len(start) else _read(image, where, name)[0]
    return look_at(data, decoding.MAX_PIXELS, where, name)[1]


def look_at(data: bytes, max_pixels: int, where: str, name: str) -> tuple[str, tuple[int, int]]:
    """Returns the format and the size that `load_image` will give, by the header alone.

    Args:
      data: the file. where, name: the image's place, for errors, and its name in them.

    Raises:
      BadRecord: image_too_large or corrupt_image.
    """
    with refusals(where, name):
        image = open_image(data, max_pixels)
        return image.format, size_once_decoded(image)


def _names(image: str | Path | bytes, where: str | None) -> tuple[str, str]:
    """Returns the image's place, for errors, and its name in them."""
    if isinstance(image, bytes):
        return "image" if where is None else where, "the image"
    return str(image) if where is None else where, f"the image {shown(image)}"


def _read(path: str | Path, where: str, name: str, start: int | None = None) -> tuple[bytes, int]:
    """Reads a file or its beginning, and its length, before decoding: a failing disk must not pass for damage."""
    try:
        return formats.read_file(path, decoding.MAX_BYTES, start)
    except formats.TooLarge as e:
        raise BadRecord("image_too_large", where, f"{name} {e}") from e
    except OSError as e:
        raise BadRecord("missing_image", where, f"cannot read {name}: {e.strerror}") from e


@contextlib.contextmanager
def refusals(where: str, name: str) -> Iterator[None]:
    """Turns what `open_image` and decoding raise into BadRecord."""
    try:
        yield
    except BadRecord:
        raise
    except formats.TooLarge as e:
        raise BadRecord("image_too_large", where, f"{name} {e}") from e
    except grey.UnclearRange as e:
        raise BadRecord("unclear_range", where, f"{name} {e}") from e
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise BadRecord("image_too_large", where, f"{name} has over {decoding.MAX_PIXELS} pixels") from e
    except Image.UnidentifiedImageError as e:
        known = f"{name} is not an image of a known format, which are {formats.ALLOWED}"
        raise BadRecord("corrupt_image", where, known) from e
    except Exception as e:  # decoders answer damaged bytes with almost any exception
        raise BadRecord("corrupt_image", where, f"cannot decode {name}: {e}") from e


def _decode(
    source: str | Path | bytes, where: str | None, at_least: int | None
) -> tuple[Image.Image, tuple[float, float]]:
    """Returns RGB, and the width and height of it that the file's pixels cover: all but a reduced JPEG's last pixels.

    With `at_least` JPEGs are decoded at 1/2, 1/4 or 1/8 of their size if neither side falls below that.
    """
    where, name = _names(source, where)
    if not isinstance(source, bytes):
        source, _ = _read(source, where, name)
    with refusals(where, name):
        image = open_image(source)
        covered: tuple[float, float] = size_once_decoded(image)
        if at_least is not None and min(image.size) >= at_least and image.format == "JPEG":
            # Sizes are rounded up: half of 5 pixels are 3, of which the file covers 2.5.
            drafted = image.draft(None, (at_least, at_least))
            covered = drafted[1][2:] if drafted else covered
        return decode_opened(image), covered


def static_hd_crops(image: Image.Image, size: int, with_quadrants: bool = True) -> UInt8[np.ndarray, "N size size 3"]:
    """Cuts the whole image as one square, and the four quadrants of the same at twice the size.

        double size   +----+----+
                      | 0  | 1  |      whole   +----+
                      +----+----+              | 4  |
                      | 2  | 3  |              +----+
                      +----+----+

    Both sizes are resized from the original, bicubically and without keeping the aspect ratio: the published crops,
    byte for byte.

    Args:
      image: RGB.
      size: side of a crop in pixels.
      with_quadrants: False for the whole image alone.

    Returns:
      (5, size, size, 3) or (1, size, size, 3) uint8, the whole image last.
    """
    return _crops(image, image.size, size, with_quadrants)


def read_crops(
    image: str | Path | bytes, size: int, with_quadrants: bool = True, decode: str = "exact", where: str | None = None
) -> UInt8[np.ndarray, "N size size 3"]:
    """Reads the crops of a file, or of a file's bytes; see `static_hd_crops`.

    `fast` decodes JPEGs at 1/2, 1/4 or 1/8 of their size if that leaves each side 3/2 of the pixels that the crops
    need (less would show in small print), and stays exact otherwise. docs/performance.md has times and differences.

    Args:
      image: the path of a file, or what such a file contains.
      size, with_quadrants: see `static_hd_crops`.
      decode: exact or fast.
      where: named in errors; by default the path alone.

    Raises:
      BadRecord: as for `load_image`.
    """
    check_choice("decode=", decode, DECODES)
    largest = 2 * size if with_quadrants else size
    pixels, covered = _decode(image, where, largest * 3 // 2 if decode == "fast" else None)
    return _crops(pixels, covered, size, with_quadrants)


def _crops(
    image: Image.Image, covered: tuple[float, float], size: int, with_quadrants: bool
) -> UInt8[np.ndarray, "N size size 3"]:
    crops = np.empty((5 if with_quadrants else 1, size, size, 3), np.uint8)
    resample(image, [crops[:4], crops[4:]] if with_quadrants else [crops], covered)
    return crops


def read_resized(
    image: str | Path | bytes, sizes: Sequence[tuple[int, int]], decode: str = "exact", where: str | None = None
) -> list[UInt8[np.ndarray, "height width 3"]]:
    """Resizes a file to several sizes at once, bicubically, whatever their aspect ratios: the bytes of Pillow up to 12.

    Args:
      sizes: (width, height) in pixels each, at least 1. decode: as for `read_crops`; the smaller sides count. The other
        arguments are as for `read_crops`.

    Raises:
      BadRecord: as for `load_image`.
    """
    check_choice("decode=", decode, DECODES)
    needed = max(min(size) for size in sizes) * 3 // 2
    pixels, covered = _decode(image, where, needed if decode == "fast" else None)
    outputs = [np.empty((1, height, width, 3), np.uint8) for width, height in sizes]
    resample(pixels, outputs, covered)
    return [output[0] for output in outputs]


def read_tiles(
    image: str | Path | bytes, tiling: Tiling, tile: int, decode: str = "exact", where: str | None = None
) -> UInt8[np.ndarray, "N tile tile 3"]:
    """Reads the crops of an image file, or of a file's bytes: the whole view as a square, then the tiles row by row.
    `decode` and errors are as for `read_crops`."""
    crops = np.empty((tiling.crops, tile, tile, 3), np.uint8)
    if not tiling.rows:
        [crops[0]] = read_resized(image, [(tile, tile)], decode, where)
        return crops
    crops[0], content = read_resized(image, [(tile, tile), (tiling.width, tiling.height)], decode, where)
    crops[1:] = on_canvas(content, tiling, tile)
    return crops
