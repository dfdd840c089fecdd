"""Images from files, and the fixed crops that the encoder reads.

What becomes of each kind of file, `Image.convert("RGB")` being what the published loader does with all of them:

| file | pixels |
|---|---|
| JPEG, PNG, WebP, GIF, BMP, TIFF and the like, in grey, colour, CMYK or with a palette | `convert("RGB")` |
| CMYK in a JPEG | taken as inverted, the way Adobe writes it; then `convert("RGB")` |
| transparency of any kind | left out: the colours that the file holds below it |
| several pictures (GIF, WebP, PNG, TIFF) | the first |
| 16 bits of grey | the upper 8, as of 16-bit colour; `convert("RGB")` would turn all but the darkest white |
| a rotation in the EXIF data | not applied, but for TIFF, which Pillow turns itself |
| PostScript | refused as corrupt_image: Pillow would start Ghostscript on it |
"""

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from fusion_jax.data.resample import resample
from fusion_jax.errors import BadRecord, check

MAX_PIXELS = 80_000_000  # a decoded image of this size takes 320 MB of the host's memory
MAX_SIDE = 65_535  # resizing makes an image of the old height and the new width on its way
MAX_BYTES = 1 << 29  # of a file
DECODES = ("exact", "fast")

Image.preinit()
Image.init()  # now, because Pillow's own lazy loading is not safe with several threads
FORMATS = tuple(name for name in Image.ID if name != "EPS")


def load_image(image: str | Path | bytes, where: str | None = None) -> Image.Image:
    """An image file, or what such a file contains, fully decoded, in RGB; see the top of this file.

    Args:
      image: the path of a file of any format Pillow reads, or its bytes.
      where: named in errors; by default the path alone.

    Raises:
      BadRecord: reason missing_image (cannot be opened), image_too_large (over MAX_BYTES, MAX_PIXELS or MAX_SIDE) or
        corrupt_image.
    """
    return _decode(image, where, None)[0]


def read_size(image: str | Path | bytes, where: str | None = None) -> tuple[int, int]:
    """Width and height in pixels that `load_image` will give, by the file's header alone.

    Args, Raises: as for `load_image`; damage behind the header stays unseen.
    """
    where, name = _names(image, where)
    with contextlib.ExitStack() as stack:
        if isinstance(image, bytes):
            file: BinaryIO = io.BytesIO(image)
        else:
            with _missing(where, name):
                file = stack.enter_context(open(image, "rb"))
        with _refusals(where, name):
            return _header(file, where, name).size


def _names(image: str | Path | bytes, where: str | None) -> tuple[str, str]:
    """Where errors lie, and what they call the image."""
    if isinstance(image, bytes):
        return "image" if where is None else where, "the image"
    return str(image) if where is None else where, f"the image {image}"


@contextlib.contextmanager
def _missing(where: str, name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as e:  # ValueError: a path that no file can have
        raise BadRecord("missing_image", where, f"cannot read {name}: {e}") from e


@contextlib.contextmanager
def _refusals(where: str, name: str) -> Iterator[None]:
    """Turns what Pillow raises into BadRecord."""
    try:
        yield
    except BadRecord:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise BadRecord("image_too_large", where, f"{name} has over {MAX_PIXELS} pixels") from e
    except Image.UnidentifiedImageError as e:
        raise BadRecord("corrupt_image", where, f"{name} is no image of a known format") from e
    except Exception as e:  # decoders answer damaged bytes with almost any exception
        raise BadRecord("corrupt_image", where, f"cannot decode {name}: {e}") from e


def _header(file: BinaryIO, where: str, name: str) -> Image.Image:
    """The image, not decoded yet: a small file can unpack to an enormous one, and its header alone tells."""
    if file.seek(0, os.SEEK_END) > MAX_BYTES:
        raise BadRecord("image_too_large", where, f"{name} has more than {MAX_BYTES} bytes")
    file.seek(0)
    image = Image.open(file, formats=FORMATS)
    width, height = image.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        detail = f"{name} has {width}x{height} pixels; allowed are {MAX_PIXELS}, and {MAX_SIDE} along a side"
        raise BadRecord("image_too_large", where, detail)
    return image


def _decode(
    source: str | Path | bytes, where: str | None, at_least: int | None
) -> tuple[Image.Image, tuple[float, float]]:
    """RGB, and the width and height that the file's pixels cover of it: all, but for a reduced JPEG's last pixels.

    With `at_least` JPEGs are decoded at 1/2, 1/4 or 1/8 of their size where neither side falls below that.
    """
    where, name = _names(source, where)
    if not isinstance(source, bytes):
        # All of it first, so that a disk that fails does not pass for a damaged image.
        with _missing(where, name), open(source, "rb") as file:
            source = file.read(MAX_BYTES + 1)
    with _refusals(where, name):
        image = _header(io.BytesIO(source), where, name)
        covered: tuple[float, float] = image.size
        if at_least is not None and min(image.size) >= at_least and image.format in ("JPEG", "MPO"):
            # Sizes are rounded up: half of 5 pixels are 3, of which the file covers 2.5.
            drafted = image.draft(None, (at_least, at_least))
            covered = drafted[1][2:] if drafted else covered
        return _to_rgb(image), covered


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode == "RGB":
        return image
    image.info.pop("transparency", None)  # Pillow warns that it is lost
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def static_hd_crops(image: Image.Image, size: int, with_quadrants: bool = True) -> UInt8[np.ndarray, "N size size 3"]:
    """The whole image as one square, and the four quadrants of the same at twice the size.

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
    """The crops of a file, or of a file's bytes; see `static_hd_crops`.

    `fast` decodes JPEGs at 1/2, 1/4 or 1/8 of their size where that leaves each side 3/2 of the pixels that the crops
    need (less would show in small print), and stays exact otherwise. docs/performance.md has times and differences.

    Args:
      image: the path of a file, or what such a file contains.
      size, with_quadrants: see `static_hd_crops`.
      decode: exact or fast.
      where: named in errors; by default the path alone.

    Raises:
      BadRecord: as for `load_image`.
    """
    check(decode in DECODES, f"decode={decode!r} is unknown; allowed: {', '.join(DECODES)}.")
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
    """A file at several sizes at once, bicubically, aspect ratios as asked: the bytes of Pillow up to version 12.

    Args:
      sizes: (width, height) in pixels each, at least 1. decode: as for `read_crops`; the smaller sides count. The rest
        as there.

    Raises:
      BadRecord: as for `load_image`.
    """
    check(decode in DECODES, f"decode={decode!r} is unknown; allowed: {', '.join(DECODES)}.")
    needed = max(min(size) for size in sizes) * 3 // 2
    pixels, covered = _decode(image, where, needed if decode == "fast" else None)
    outputs = [np.empty((1, height, width, 3), np.uint8) for width, height in sizes]
    resample(pixels, outputs, covered)
    return [output[0] for output in outputs]
