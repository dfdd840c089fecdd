"""Converts grey values of other than 8 bits to the 8 bits that training sees.

The first of these rows that applies decides which value is white:

| the file | white |
|---|---|
| PGM: its greatest value | that one |
| TIFF of 12 bits per value | 4095 |
| TIFF with MaxSampleValue or SMaxSampleValue | that one; black is MinSampleValue or SMinSampleValue, else 0 |
| any other | the first of 1, 255, 1023, 4095, 16383, 65535 and the greatest number of its kind that no value exceeds |

The last row judges by the picture: instruments write 10, 12 or 14 bits into numbers of 16 or 32, or fractions from 0 to
1, without declaring it. The values must not be negative, and the largest must reach a sixteenth of white, since a
picture without such a value would be black in 8 bits. What fits no row is refused: -1, infinity, NaN, 5, 100,000.

Whole numbers of 8 bits and more are cut to their upper 8, as 16-bit colour is; others are rounded.

Exported folders carry this file, which therefore imports nothing else of the package.
"""

import numpy as np
from PIL import Image


class UnclearRange(ValueError):
    """Nothing says which value is white. The message continues "the image ..."."""


WHITES = (1, 255, 1023, 4095, 16383, 65535)
BITS, PHOTOMETRIC, PLANES, KIND, WHITE_IS_ZERO, SIGNED = 258, 262, 284, 339, 0, 2  # tags of TIFF, and two values
LEAST_TAGS, MOST_TAGS = (280, 340), (281, 341)  # MinSampleValue, SMinSampleValue; MaxSampleValue, SMaxSampleValue


def is_deep_colour(image: Image.Image) -> bool:
    """Returns whether an image, not decoded yet, has 16 bits per channel, of which decoding keeps the upper 8.

    Raises:
      ValueError: it is a TIFF of planes of 16 bits without compression, which Pillow reads as if they had 8.
    """
    tile, tags = getattr(image, "tile", None), getattr(image, "tag_v2", {})  # a file's
    if not tile or image.mode not in ("RGB", "RGBA", "CMYK"):
        return False
    if tags.get(PLANES) == 2 and max(np.ravel(tags.get(BITS, 1))) > 8 and tile[0][0] != "libtiff":
        raise ValueError("its channels are planes of 16 bits, which are not read without compression")
    return ";16" in str(tile[0][3])


def check_deep_colour(image: Image.Image) -> None:
    """Raises UnclearRange if no value of a decoded image of `is_deep_colour` reaches a sixteenth of white."""
    if max(most for _, most in image.getextrema()[: 4 if image.mode == "CMYK" else 3]) < 16:
        raise UnclearRange("has 16 bits a channel of which no value reaches a sixteenth: give it 8, white being 255")


def levels_of_grey(image: Image.Image) -> np.ndarray | None:
    """Returns a decoded image's grey in 8 bits, (height, width) uint8; None if it already has 8 bits, or has colours.

    Raises:
      UnclearRange: nothing says which value is white.
    """
    tags = getattr(image, "tag_v2", {})

    def tag(*names):
        return next((np.ravel(tags[name])[0] for name in names if name in tags), None)

    bits, signed = tag(BITS), tag(KIND) == SIGNED
    if image.mode == "F":
        values, longest = np.asarray(image), None
    elif image.mode.startswith("I;16"):
        values, longest = np.asarray(image), 65535
    elif image.mode == "I":
        values, longest = np.asarray(image), 32767 if bits == 16 else 2**31 - 1
        if bits == 32 and not signed:
            values, longest = values.view(np.uint32), 2**32 - 1
    elif image.mode == "L" and signed:
        values, longest = np.asarray(image).view(np.int8), 127
    else:
        return None
    white = 65535 if image.format == "PPM" else 4095 if bits == 12 else tag(*MOST_TAGS)
    black = tag(*LEAST_TAGS) or 0
    if white is None or white <= black or (black, white) == (0, longest):  # the numbers' own range says nothing
        black, white = None, longest
    return to_eight_bits(values, black, white, tag(PHOTOMETRIC) == WHITE_IS_ZERO)


def to_eight_bits(values: np.ndarray, black: float | None, white: float | None, inverted: bool) -> np.ndarray:
    """Maps values to 0 ... 255.

    Args:
      values: (height, width). black, white: as the header says; black None: white is what a number could hold, None for
        fractions. inverted: the header has black and white exchanged.

    Returns:
      (height, width) uint8.

    Raises:
      UnclearRange: nothing says which value is white.
    """
    least, most = values.min(), values.max()
    if not (np.isfinite(least) and np.isfinite(most)):
        raise UnclearRange("has values that are not finite numbers")
    if black is None:
        if least < 0:
            raise UnclearRange(f"has values below 0, and does not say which is black: the least is {least}")
        whites = [one for one in WHITES if white is None or one < white] + [white] * (white is not None)
        black, white = 0, next((one for one in whites if most <= one), 0)
        if most and not white / 16 <= most <= white:
            known = "0 to 1, or 8, 10, 12, 14 or 16 bits"
            raise UnclearRange(f"does not say which value is white: the largest, {most}, fits none of {known}")
    elif least < black or most > white:
        raise UnclearRange(f"says that its values go from {black} to {white}, and they go from {least} to {most}")
    levels = np.empty(values.shape, np.uint8)
    whole = values.dtype.kind != "f" and black == 0 and int(white) == white and int(white) & int(white) + 1 == 0
    shift = int(white).bit_length() - 8 if whole and white >= 255 else None
    rows = max(1, 2**20 // values.shape[1])  # a few rows at a time, so that copies stay small
    for row in range(0, len(values), rows):
        part = values[row : row + rows]
        if shift is None:
            part = np.rint((part.astype(np.float64) - float(black)) * (255 / (float(white) - float(black))))
        else:
            part = part >> shift
        levels[row : row + rows] = part
    return 255 - levels if inverted else levels
