"""Decodes image files to pixels of 8 bits in RGB.

Every image that the package did not create itself is opened here, by `open_image`. The table lists what becomes of each
kind of file; the published loader calls `Image.convert("RGB")` for all of them:

| file | pixels |
|---|---|
| JPEG, MPO, PNG, WebP, GIF, BMP, TIFF, PPM, JPEG 2000 or AVIF, of any mode or palette | `convert("RGB")` |
| CMYK in a JPEG | taken as inverted, the way Adobe writes it; then `convert("RGB")` |
| transparency of any kind | dropped; the colours that the file holds below it stay |
| several pictures (GIF, WebP, PNG, TIFF, MPO, AVIF) | the first |
| grey of over 8 bits, signed, fractions | 8 bits by the rules of grey.py; `convert("RGB")` makes it black or white |
| 16 bits per channel | the upper 8; refused as unclear_range if all of these are below 16 |
| a rotation in the EXIF data | not applied, except to TIFF, which Pillow rotates itself |
| any other format | refused as corrupt_image: some of those that Pillow knows start Ghostscript, or hold any format |

Exported folders carry this file and those that it imports, so that they see what training saw.
"""

from PIL import Image

from fusion_jax.data.formats import Reader, TooLarge, check_decoder, format_of, prepare, scaled_ppm
from fusion_jax.data.grey import check_deep_colour, is_deep_colour, levels_of_grey

MAX_PIXELS = 80_000_000  # a decoded image of this size takes 320 MB of the host's memory
MAX_SIDE = 65_535  # resizing makes an image of the old height and the new width on its way
MAX_BYTES = 1 << 29  # bytes of a file
_ORIENTATION = 274  # a tag of TIFF


def open_image(data: bytes, max_pixels: int | None = None, length: int | None = None) -> Image.Image:
    """Opens an image file without decoding it: a small file can unpack to an enormous image, as its header shows.

    Args:
      data: the file, or its beginning; then `length` is that of the whole.
      max_pixels: MAX_PIXELS by default.

    Raises:
      Almost any exception, which `image.refusals` turns into BadRecord.
    """
    length, most = len(data) if length is None else length, MAX_PIXELS if max_pixels is None else max_pixels
    form = format_of(data[:16])
    if form is None:
        raise Image.UnidentifiedImageError
    if length > MAX_BYTES:
        raise TooLarge(f"has more than {MAX_BYTES} bytes")
    data, declared = prepare(form, data)
    if declared is not None:
        _check_size(declared, most)
    reader = Reader(data)
    try:
        image = Image.open(reader, formats=(form,))
    except Image.UnidentifiedImageError as e:  # its own text holds a memory address, which changes with every run
        raise ValueError(f"its header is damaged, or it is a {form} of a kind that Pillow does not read") from e
    reader.opened()
    _check_size(image.size, most)
    if declared not in (None, image.size):
        raise ValueError(f"its header says {_words(image.size)} pixels, and its pixels {_words(declared)}")
    check_decoder(image, length)
    if form == "TIFF":
        image.is_animated = True  # keeps Pillow from reading the directories after the first, of any size
    return image


def size_once_decoded(image: Image.Image) -> tuple[int, int]:
    """Returns the size that an opened image will have: Pillow rotates a TIFF by its tag, as its size shows, or XMP."""
    if image.format == "TIFF" and _ORIENTATION not in image.tag_v2 and image.getexif().get(_ORIENTATION, 1) > 4:
        return image.height, image.width
    return image.size


def _words(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    if size[0] * size[1] > max_pixels or max(size) > MAX_SIDE:
        raise TooLarge(f"has {_words(size)} pixels; allowed are {max_pixels}, and {MAX_SIDE} along a side")


def decode_opened(image: Image.Image) -> Image.Image:
    """Decodes an image of `open_image` to RGB. Raises almost any exception, as `open_image` does."""
    expected, deep_colour = size_once_decoded(image), is_deep_colour(image)
    if image.tile and image.tile[0][0] == "ppm":
        image = scaled_ppm(image)
    else:
        mode = image.mode
        image.load()
        _check_pixels(image, mode, expected)
    return in_eight_bits(image, deep_colour)


def in_eight_bits(image: Image.Image, deep_colour: bool = False) -> Image.Image:
    """Converts a decoded image of any mode to RGB; see the top of this file.

    Args:
      deep_colour: whether it had 16 bits per channel.

    Raises:
      UnclearRange (of grey.py): nothing says which value is white.
    """
    if deep_colour:
        check_deep_colour(image)
    if image.mode == "RGB":
        return image
    size = image.size
    image.info.pop("transparency", None)  # Pillow warns that it is lost
    levels = levels_of_grey(image)
    if levels is not None:
        image = Image.fromarray(levels)
    image = image.convert("RGB")
    _check_pixels(image, "RGB", size)
    return image


def _check_pixels(image: Image.Image, mode: str, size: tuple[int, int]) -> None:
    """Checks that the header, Pillow and the pixels in memory agree: C code reads the pixels by their size."""
    if (mode, size) != (image.mode, image.size) or (mode, size) != (image.im.mode, image.im.size):
        decoded = f"{image.im.mode} of {_words(image.im.size)}"
        raise ValueError(f"its header says {mode} of {_words(size)} pixels, and decoding it gave {decoded}")
