"""Computes the quality score and perceptual hash of images, and writes image files."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image

from fusion_jax.data.image import load_image
from fusion_jax.errors import BadRecord
from fusion_jax.files import write_whole

_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2  # of SSIM (Wang et al. 2004), for 8-bit images


def ssim(a: Float[np.ndarray, "*C H W"], b: Float[np.ndarray, "*C H W"]) -> float:
    """Structural similarity of two grey images with values 0 to 255, at least 8 x 8: 1 for equal ones. For stacks of
    images it is the mean.

    Its windows are 8 x 8 pixels, one at every fourth pixel, as in video encoders: that takes a small part of the time
    of a window around every pixel.
    """
    mean_a, mean_b = _window_means(a), _window_means(b)
    var_a, var_b = _window_means(a * a) - mean_a**2, _window_means(b * b) - mean_b**2
    both = _window_means(a * b) - mean_a * mean_b
    top = (2 * mean_a * mean_b + _C1) * (2 * both + _C2)
    return float(np.mean(top / ((mean_a**2 + mean_b**2 + _C1) * (var_a + var_b + _C2))))


def _window_means(x: Float[np.ndarray, "*C H W"]) -> np.ndarray:
    """Means of the windows, (*C, H // 4 - 1, W // 4 - 1) float64; pixels beyond the last whole window do not count."""
    *stack, height, width = x.shape
    height, width = height // 4 * 4, width // 4 * 4
    rows = x[..., :height, :width].reshape(*stack, height // 4, 4, width).sum(-2)
    cells = (rows[..., 0::4] + rows[..., 1::4] + rows[..., 2::4] + rows[..., 3::4]).astype(np.float64)
    pairs = cells[..., :-1, :] + cells[..., 1:, :]
    return (pairs[..., :-1] + pairs[..., 1:]) / 64


def ssim_a(image: Image.Image, scale: float = 0.5) -> float:
    """The papers' measure of an image's quality, at most 2, and high where structures are larger than noise.

    It is the SSIM of the image with itself reduced by `scale` and enlarged again, plus the mean of the same over its
    four quadrants.
    """
    grey = image.convert("L")
    width, height = grey.size
    w, h = width // 2, height // 2
    quadrants = [grey.crop((x, y, x + w, y + h)) for y in (0, height - h) for x in (0, width - w)]
    # As the channels of one image, which are resized independently, they take half the time.
    return _there_and_back(grey, scale) + _there_and_back(Image.merge("CMYK", quadrants), scale)


def _there_and_back(image: Image.Image, scale: float) -> float:
    small = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    back = image.resize(small, Image.Resampling.BICUBIC).resize(image.size, Image.Resampling.BICUBIC)
    return ssim(*(np.array([np.asarray(c) for c in one.split()], np.float32) for one in (image, back)))


def perceptual_hash(image: Image.Image) -> int:
    """A hash of 64 bits, most of which are equal for images that look alike."""
    import imagehash

    return int(str(imagehash.phash(image)), 16)


def write_once(path: Path, data: bytes, sync: bool = True) -> None:
    """Writes a file with these bytes, whole or not at all; with `sync` also if the machine loses its power."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, data, path.with_name(f".{path.name}.{os.getpid()}.tmp"), sync)


def png(image: Image.Image) -> bytes:
    """Encodes the image as a PNG file: RGB, without metadata.

    Every row is stored as its difference from the one above. Pillow tries all five filters on each row, which takes as
    long as the compression and saves 3%.
    """
    pixels = np.asarray(image.convert("RGB"))
    height, width, _ = pixels.shape
    flat = pixels.reshape(height, width * 3)
    rows = np.empty((height, 1 + width * 3), np.uint8)
    rows[:, 0] = 2  # the filter's number
    rows[0, 1:] = flat[0]
    np.subtract(flat[1:], flat[:-1], out=rows[1:, 1:])
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits a channel, RGB, not interlaced
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows, 1)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def open_file(path: str | os.PathLike) -> Image.Image:
    """Opens an image file of the pool. Raises OSError where it cannot be used."""
    try:
        return load_image(Path(path))
    except BadRecord as e:
        raise OSError(str(e)) from e
