"""Images from files, and the fixed crops that the encoder reads.

What becomes of each kind of file, `Image.convert("RGB")` being what the published loader does with all of them:

| file | pixels |
|---|---|
| JPEG, PNG, WebP, GIF, BMP, TIFF and the like, in grey, colour, CMYK or with a palette | `convert("RGB")` |
| CMYK in a JPEG | taken as inverted, the way Adobe writes it; then `convert("RGB")` |
| transparency of any kind | left out: the colours that the file holds below it |
| several pictures (GIF, WebP, PNG, TIFF) | the first |
| 16 bits of grey | the upper 8, as of 16-bit colour; `convert("RGB")` would turn all but the darkest white |
| a rotation in the EXIF data | not applied |
| PostScript | refused as corrupt_image: Pillow would start Ghostscript on it |
"""

import io
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from fusion_jax.errors import BadRecord, check

MAX_PIXELS = 80_000_000  # a decoded image of this size takes 320 MB of the host's memory
MAX_SIDE = 65_535  # resizing makes an image of the old height and the new width on its way
MAX_BYTES = 1 << 29  # of a file
DECODES = ("exact", "fast")
Box = tuple[float, float, float, float]

Image.preinit()
Image.init()  # now, because Pillow's own lazy loading is not safe with several threads
FORMATS = tuple(name for name in Image.ID if name != "EPS")


def load_image(path: str | Path, where: str | None = None) -> Image.Image:
    """The image at `path`, fully decoded, in RGB; see the top of this file.

    Args:
      path: an image file of any format Pillow reads.
      where: named in errors; by default the path alone.

    Raises:
      BadRecord: reason missing_image (cannot be opened), or as for `decode_image`.
    """
    where = str(path) if where is None else where
    return decode_image(_read(path, where), where, f"the image {path}")


def decode_image(data: bytes, where: str, name: str = "the image") -> Image.Image:
    """The image in the bytes of a file, fully decoded, in RGB; see the top of this file.

    Args:
      data: a whole file of any format Pillow reads.
      where: named in errors.
      name: what messages call it.

    Raises:
      BadRecord: reason image_too_large (over MAX_PIXELS or MAX_SIDE) or corrupt_image.
    """
    return _decode(data, where, name, None)[0]


def _read(path: str | Path, where: str) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as e:  # ValueError: a path that no file can have
        raise BadRecord("missing_image", where, f"cannot read the image {path}: {e}") from e
    if len(data) > MAX_BYTES:
        raise BadRecord("image_too_large", where, f"the image {path} has more than {MAX_BYTES} bytes")
    return data


def _decode(data: bytes, where: str, name: str, at_least: int | None) -> tuple[Image.Image, Box]:
    """RGB, and the part of it that the file's pixels cover: all, but for the last pixels of a reduced JPEG.

    With `at_least` JPEGs are decoded at 1/2, 1/4 or 1/8 of their size where neither side falls below that.
    """
    try:
        # The header alone gives the size: a small file can unpack to an enormous image.
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height <= MAX_PIXELS and max(width, height) <= MAX_SIDE:
            box = (0, 0, width, height)
            if at_least is not None and min(width, height) >= at_least and image.format in ("JPEG", "MPO"):
                # Sizes are rounded up: half of 5 pixels are 3, of which the file covers 2.5.
                drafted = image.draft(None, (at_least, at_least))
                box = drafted[1] if drafted else box
            return _to_rgb(image), box
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise BadRecord("image_too_large", where, f"{name} has over {MAX_PIXELS} pixels") from e
    except Image.UnidentifiedImageError as e:
        raise BadRecord("corrupt_image", where, f"{name} is no image of a known format") from e
    except Exception as e:  # decoders answer damaged bytes with almost any exception
        raise BadRecord("corrupt_image", where, f"cannot decode {name}: {e}") from e
    detail = f"{name} has {width}x{height} pixels; allowed are {MAX_PIXELS}, and {MAX_SIDE} along a side"
    raise BadRecord("image_too_large", where, detail)


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
    return _cut(_bicubic(image, size), _bicubic(image, 2 * size) if with_quadrants else None)


def read_crops(
    image: str | Path | bytes, size: int, with_quadrants: bool = True, decode: str = "exact", where: str | None = None
) -> UInt8[np.ndarray, "N size size 3"]:
    """The crops of a file, or of a file's bytes; see `static_hd_crops`.

    `fast` decodes large JPEGs at 1/2, 1/4 or 1/8 of their size, shrinks with a filter of half the width (Hamming
    instead of bicubic) and takes the whole image from the double one. An image that has to grow stays exact.
    docs/performance.md has times and differences.

    Args:
      image: the path of a file, or what such a file contains.
      size, with_quadrants: see `static_hd_crops`.
      decode: exact or fast.
      where: named in errors; by default the path alone.

    Raises:
      BadRecord: as for `load_image`.
    """
    check(decode in DECODES, f"decode={decode!r} is unknown; allowed: {', '.join(DECODES)}.")
    if isinstance(image, bytes):
        where, name, data = where or "image", "the image", image
    else:
        where, name = str(image) if where is None else where, f"the image {image}"
        data = _read(image, where)
    largest = 2 * size if with_quadrants else size
    pixels, box = _decode(data, where, name, largest if decode == "fast" else None)
    if decode == "exact" or min(pixels.size) < largest:
        return static_hd_crops(pixels, size, with_quadrants)
    shrunk = pixels.resize((largest, largest), Image.Resampling.HAMMING, box)
    return _cut(shrunk.reduce(2), shrunk) if with_quadrants else _cut(shrunk, None)


def _bicubic(image: Image.Image, size: int) -> Image.Image:
    # Columns first, then rows, as Pillow did it up to version 12 and so for the published system. Pillow 13 begins with
    # the rows where that is cheaper, in most upright images, and rounds to other values on its way.
    across = image.resize((size, image.height), Image.Resampling.BICUBIC)
    return across.resize((size, size), Image.Resampling.BICUBIC)


def _cut(whole: Image.Image, double: Image.Image | None) -> UInt8[np.ndarray, "N size size 3"]:
    size = whole.width
    if double is None:
        return np.array(whole)[None]  # a copy: Pillow's own buffer is read-only
    quadrants = np.asarray(double).reshape(2, size, 2, size, 3).transpose(0, 2, 1, 3, 4).reshape(4, size, size, 3)
    return np.concatenate([quadrants, np.asarray(whole)[None]])
