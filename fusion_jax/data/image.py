"""Images from files, and the fixed crops that the encoder reads.

Every image that the package did not make itself is opened here, by `open_image`. What becomes of each kind of file,
`Image.convert("RGB")` being what the published loader does with all of them:

| file | pixels |
|---|---|
| JPEG, MPO, PNG, WebP, GIF, BMP, TIFF, PPM, JPEG 2000 or AVIF, of any mode or palette | `convert("RGB")` |
| CMYK in a JPEG | taken as inverted, the way Adobe writes it; then `convert("RGB")` |
| transparency of any kind | left out: the colours that the file holds below it |
| several pictures (GIF, WebP, PNG, TIFF, MPO, AVIF) | the first |
| grey of over 8 bits, signed, fractions | 8 bits by the rule of grey.py; `convert("RGB")` makes it black or white |
| 16 bits a channel | the upper 8; refused as unclear_range where all of these are below 16 |
| a rotation in the EXIF data | not applied, but for TIFF, which Pillow turns itself |
| any other format | refused as corrupt_image: among Pillow's many are some that start Ghostscript, or hold any other |

formats.py says what is done about files that are made to be slow.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from fusion_jax.data import formats, grey
from fusion_jax.data.resample import resample
from fusion_jax.errors import BadRecord, check_choice
from fusion_jax.files import shown

MAX_PIXELS = 80_000_000  # a decoded image of this size takes 320 MB of the host's memory
MAX_SIDE = 65_535  # resizing makes an image of the old height and the new width on its way
MAX_BYTES = 1 << 29  # of a file
DECODES = ("exact", "fast")
_BEGINNING = 1 << 16  # bytes of a file whose size alone is asked for
_BY_BEGINNING = ("JPEG", "PNG", "GIF", "BMP", "PPM", "JPEG2000")  # formats that need no more in most files
_ORIENTATION = 274  # a tag of TIFF


def load_image(image: str | Path | bytes, where: str | None = None) -> Image.Image:
    """An image file, or what such a file contains, fully decoded, in RGB; see the top of this file.

    Args:
      image: the path of a file of one of the formats there, or its bytes.
      where: named in errors; by default the path alone.

    Raises:
      BadRecord: reason missing_image (cannot be opened, or is no file), image_too_large (over MAX_BYTES, MAX_PIXELS,
        MAX_SIDE or a limit of formats.py), unclear_range (grey.py) or corrupt_image.
    """
    return _decode(image, where, None)[0]


def read_size(image: str | Path | bytes, where: str | None = None) -> tuple[int, int]:
    """Width and height in pixels that `load_image` will give, by the file's header alone.

    Args, Raises: as for `load_image`; damage behind the header stays unseen.
    """
    where, name = _names(image, where)
    if isinstance(image, bytes):
        data = image
    else:
        start, length = _read(image, where, name, _BEGINNING)
        if length > len(start) and formats.format_of(start[:16]) in _BY_BEGINNING:
            with contextlib.suppress(Exception):  # whatever it is, the whole file says it again
                return _size(open_image(start, length=length))
        data = start if length <= len(start) else _read(image, where, name)[0]
    return look_at(data, MAX_PIXELS, where, name)[1]


def look_at(data: bytes, max_pixels: int, where: str, name: str) -> tuple[str, tuple[int, int]]:
    """The format and the size that `load_image` will give, by the header alone.

    Args:
      data: the file. where, name: where errors lie, and what they call the image.

    Raises:
      BadRecord: image_too_large or corrupt_image.
    """
    with refusals(where, name):
        image = open_image(data, max_pixels)
        return image.format, _size(image)


def open_image(data: bytes, max_pixels: int | None = None, length: int | None = None) -> Image.Image:
    """What an image file contains, not decoded yet: a small file can unpack to an enormous one, and its header tells.

    Args:
      data: the file, or its beginning; then `length` is that of the whole.
      max_pixels: MAX_PIXELS by default.

    Raises:
      Almost any exception, which `refusals` turns into BadRecord.
    """
    length, most = len(data) if length is None else length, MAX_PIXELS if max_pixels is None else max_pixels
    form = formats.format_of(data[:16])
    if form is None:
        raise Image.UnidentifiedImageError
    if length > MAX_BYTES:
        raise formats.TooLarge(f"has more than {MAX_BYTES} bytes")
    data, declared = formats.prepare(form, data)
    if declared is not None:
        _check_size(declared, most)
    reader = formats.Reader(data)
    try:
        image = Image.open(reader, formats=(form,))
    except Image.UnidentifiedImageError as e:  # its own text holds an address, another one in every run
        raise ValueError(f"its header is damaged, or it is a {form} of a kind that Pillow does not read") from e
    reader.opened()
    _check_size(image.size, most)
    if declared not in (None, image.size):
        raise ValueError(f"its header says {_words(image.size)} pixels, and its pixels {_words(declared)}")
    formats.check_decoder(image, length)
    if form == "TIFF":
        image.is_animated = True  # keeps Pillow from reading the directories behind the first, of any size
    return image


def _size(image: Image.Image) -> tuple[int, int]:
    """Of an opened image, once it is decoded. Pillow turns a TIFF by its tag, which its size shows, or by its XMP."""
    if image.format == "TIFF" and _ORIENTATION not in image.tag_v2 and image.getexif().get(_ORIENTATION, 1) > 4:
        return image.height, image.width
    return image.size


def _words(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    if size[0] * size[1] > max_pixels or max(size) > MAX_SIDE:
        raise formats.TooLarge(f"has {_words(size)} pixels; allowed are {max_pixels}, and {MAX_SIDE} along a side")


def _names(image: str | Path | bytes, where: str | None) -> tuple[str, str]:
    """Where errors lie, and what they call the image."""
    if isinstance(image, bytes):
        return "image" if where is None else where, "the image"
    return str(image) if where is None else where, f"the image {shown(image)}"


def _read(path: str | Path, where: str, name: str, start: int | None = None) -> tuple[bytes, int]:
    """A file, or its beginning, and its length: all of it first, so that a disk that fails does not pass for damage."""
    try:
        return formats.read_file(path, MAX_BYTES, start)
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
        raise BadRecord("image_too_large", where, f"{name} has over {MAX_PIXELS} pixels") from e
    except Image.UnidentifiedImageError as e:
        known = f"{name} is no image of a known format, which are {formats.ALLOWED}"
        raise BadRecord("corrupt_image", where, known) from e
    except Exception as e:  # decoders answer damaged bytes with almost any exception
        raise BadRecord("corrupt_image", where, f"cannot decode {name}: {e}") from e


def _decode(
    source: str | Path | bytes, where: str | None, at_least: int | None
) -> tuple[Image.Image, tuple[float, float]]:
    """RGB, and the width and height that the file's pixels cover of it: all, but for a reduced JPEG's last pixels.

    With `at_least` JPEGs are decoded at 1/2, 1/4 or 1/8 of their size where neither side falls below that.
    """
    where, name = _names(source, where)
    if not isinstance(source, bytes):
        source, _ = _read(source, where, name)
    with refusals(where, name):
        image = open_image(source)
        covered: tuple[float, float] = _size(image)
        if at_least is not None and min(image.size) >= at_least and image.format == "JPEG":
            # Sizes are rounded up: half of 5 pixels are 3, of which the file covers 2.5.
            drafted = image.draft(None, (at_least, at_least))
            covered = drafted[1][2:] if drafted else covered
        return _to_rgb(image), covered


def _to_rgb(image: Image.Image) -> Image.Image:
    expected, deep_colour = _size(image), grey.is_deep_colour(image)
    if image.tile and image.tile[0][0] == "ppm":
        image = formats.scaled_ppm(image)
    else:
        mode = image.mode
        image.load()
        _check_pixels(image, mode, expected)
    return in_eight_bits(image, deep_colour)


def in_eight_bits(image: Image.Image, deep_colour: bool = False) -> Image.Image:
    """A decoded image, of any mode, as RGB; see the top of this file.

    Args:
      deep_colour: whether it had 16 bits a channel.

    Raises:
      grey.UnclearRange: nothing says which value is white.
    """
    if deep_colour:
        grey.check_deep_colour(image)
    if image.mode == "RGB":
        return image
    size = image.size
    image.info.pop("transparency", None)  # Pillow warns that it is lost
    levels = grey.levels_of_grey(image)
    if levels is not None:
        image = Image.fromarray(levels)
    image = image.convert("RGB")
    _check_pixels(image, "RGB", size)
    return image


def _check_pixels(image: Image.Image, mode: str, size: tuple[int, int]) -> None:
    """What the header said, what Pillow says and what lies in memory must be the same: C code reads it by its size."""
    if (mode, size) != (image.mode, image.size) or (mode, size) != (image.im.mode, image.im.size):
        found = f"{image.im.mode} of {_words(image.im.size)}"
        raise ValueError(f"its header says {mode} of {_words(size)} pixels, and decoding it gave {found}")


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
    """A file at several sizes at once, bicubically, aspect ratios as asked: the bytes of Pillow up to version 12.

    Args:
      sizes: (width, height) in pixels each, at least 1. decode: as for `read_crops`; the smaller sides count. The rest
        as there.

    Raises:
      BadRecord: as for `load_image`.
    """
    check_choice("decode=", decode, DECODES)
    needed = max(min(size) for size in sizes) * 3 // 2
    pixels, covered = _decode(image, where, needed if decode == "fast" else None)
    outputs = [np.empty((1, height, width, 3), np.uint8) for width, height in sizes]
    resample(pixels, outputs, covered)
    return [output[0] for output in outputs]
