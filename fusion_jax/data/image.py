"""Images from files, and the fixed crops that the encoder reads."""

import io
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from fusion_jax.errors import BadRecord

MAX_PIXELS = 80_000_000  # a decoded image of this size takes 240 MB of the host's memory


def load_image(path: str | Path, where: str | None = None) -> Image.Image:
    """The image at `path`, fully decoded, in RGB. A rotation noted in its EXIF data is not applied.

    Args:
      path: an image file of any format Pillow reads.
      where: named in errors; by default the path alone.

    Raises:
      BadRecord: reason missing_image (cannot be opened), image_too_large (more than MAX_PIXELS) or corrupt_image.
    """
    where = str(path) if where is None else where
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as e:  # ValueError: a path that no file can have
        raise BadRecord("missing_image", where, f"cannot read the image {path}: {e}") from e
    try:
        image = Image.open(io.BytesIO(data))
        # The header alone gives the size: a small file can unpack to an enormous image.
        width, height = image.size
        if width * height <= MAX_PIXELS:
            return image.convert("RGB")
    except Image.DecompressionBombError as e:
        raise BadRecord("image_too_large", where, f"the image {path} exceeds {MAX_PIXELS} pixels") from e
    except Exception as e:  # decoders answer damaged bytes with almost any exception
        raise BadRecord("corrupt_image", where, f"cannot decode the image {path}: {e}") from e
    raise BadRecord("image_too_large", where, f"the image {path} has {width}x{height} pixels, over {MAX_PIXELS}")


def static_hd_crops(image: Image.Image, size: int, with_quadrants: bool = True) -> UInt8[np.ndarray, "N size size 3"]:
    """The whole image as one square, and the four quadrants of the same at twice the size.

        double size   +----+----+
                      | 0  | 1  |      whole   +----+
                      +----+----+              | 4  |
                      | 2  | 3  |              +----+
                      +----+----+

    Both sizes are resized from the original, bicubically and without keeping the aspect ratio.

    Args:
      image: RGB.
      size: side of a crop in pixels.
      with_quadrants: False for the whole image alone.

    Returns:
      (5, size, size, 3) or (1, size, size, 3) uint8, the whole image last.
    """
    whole = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))[None]
    if not with_quadrants:
        return whole.copy()  # Pillow's own buffer is read-only
    double = np.asarray(image.resize((2 * size, 2 * size), Image.Resampling.BICUBIC))
    quadrants = double.reshape(2, size, 2, size, 3).transpose(0, 2, 1, 3, 4).reshape(4, size, size, 3)
    return np.concatenate([quadrants, whole])
