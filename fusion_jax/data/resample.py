"""Pillow's bicubic resizing, byte for byte, several times as fast: resample.c, compiled on first use.

No package that could be installed instead gives Pillow's bytes: cykooz.resizer is as fast and up to 15 levels off,
libvips and OpenCV filter in other ways. docs/performance.md has the figures.

If there is no C compiler, or its library does not reproduce Pillow on a small image, Pillow itself does the work, and
the log says so once.
"""

import ctypes
import functools
import logging
import math
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from fusion_jax import c_compiler

log = logging.getLogger("fusion_jax")

SOURCE = Path(__file__).with_name("resample.c")
FLAGS = ("-O3", "-ffp-contract=off", "-shared", "-fPIC")  # a fused multiply-add would round the weights differently
STRIP = 2 << 20  # bytes of an image that are copied at a time if it cannot be read in place: these stay in the cache
_lock = threading.Lock()
Pixels = UInt8[np.ndarray, "tiles height width 3"]


def resample(image: Image.Image, outputs: list[Pixels], covered: tuple[float, float] | None = None) -> None:
    """Resizes one image to several sizes, bicubically and without keeping the aspect ratio.

    Columns first, then rows, as Pillow did it up to version 12 and so for the published system. Pillow 13 begins with
    the rows if that is cheaper, as for most upright images, and so rounds to other values in between.

    Args:
      image: RGB.
      outputs: contiguous uint8 arrays that are filled, each (T * T, height, width, 3): the image at T times that height
        and width, cut into T x T tiles, row by row.
      covered: the part of the image, from its upper left corner, to resize; (width, height) in pixels, all by default.

    Raises:
      ValueError: the image is not RGB, or not of the size it says; or the outputs or `covered` do not fit.
      MemoryError.
    """
    if image.mode != "RGB" or (image.im.mode, image.im.size) != (image.mode, image.size):
        of = f"{image.mode} of {image.width}x{image.height}"
        raise ValueError(f"an image that calls itself {of} has pixels of {image.im.mode}, {image.im.size}")
    for output in outputs:
        _check_output(output)
    library = _library()
    if library is None:
        _with_pillow(image, outputs, covered or image.size)
    else:
        _with_library(library, image, outputs, covered or image.size)


def _check_output(output: Pixels) -> None:
    if output.dtype != np.uint8 or output.ndim != 4 or output.shape[3] != 3 or not output.flags.c_contiguous:
        raise ValueError(f"pixels cannot be written to an array of {output.dtype}{list(output.shape)}")
    if not output.size or math.isqrt(len(output)) ** 2 != len(output):
        raise ValueError(f"an image cannot be cut into {len(output)} tiles of {output.shape[2]}x{output.shape[1]}")


def _target(output: Pixels) -> tuple[int, int, int]:
    tiles = math.isqrt(len(output))
    return output.shape[2] * tiles, output.shape[1] * tiles, tiles


def _with_pillow(image: Image.Image, outputs: list[Pixels], covered: tuple[float, float]) -> None:
    for output in outputs:
        width, height, tiles = _target(output)
        box = (0, 0, covered[0], image.height)
        across = image.resize((width, image.height), Image.Resampling.BICUBIC, box)
        pixels = np.asarray(across.resize((width, height), Image.Resampling.BICUBIC, (0, 0, width, covered[1])))
        cut = pixels.reshape(tiles, height // tiles, tiles, width // tiles, 3)
        output[:] = cut.transpose(0, 2, 1, 3, 4).reshape(output.shape)


def _with_library(
    library: ctypes.CDLL,
    image: Image.Image,
    outputs: list[Pixels],
    covered: tuple[float, float],
    plain: bool = False,
) -> None:
    """Resizes with the library; `plain`: without the processor's special instructions."""
    width, height = image.size
    targets = [_target(output) for output in outputs]
    # fusion_across needs one spare byte after each row.
    between = [np.empty((height, target[0] * 3 + 1), np.uint8) for target in targets]
    for top, rows, pixels, size in _pixels(image):
        for target, middle in zip(targets, between):
            to, stride = middle[top:], middle.strides[0]
            _check(
                library.fusion_across(
                    pixels, size, width, covered[0], rows, to.ctypes.data, to.nbytes, stride, target[0], plain
                ),
                image,
            )
    for output, target, middle in zip(outputs, targets, between):
        source, to = (middle.ctypes.data, middle.nbytes, middle.strides[0]), (output.ctypes.data, output.nbytes)
        _check(library.fusion_down(*source, height, covered[1], *to, *target, plain), image)


def _check(code: int, image: Image.Image) -> None:
    """Raises the error that the library's return code means; see the top of resample.c."""
    of = f"an image of {image.width}x{image.height} pixels"
    if code == 1:
        raise MemoryError(f"no memory to resize {of}")
    if code:
        raise ValueError(
            f"{of} cannot be resized: " + ("its sizes are not possible", "a buffer is too small")[code - 2]
        )


class _ArrowArray(ctypes.Structure):
    """The beginning of a struct of Arrow's C data interface, through which Pillow (from 11.2) shows its memory."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("length", "null_count", "offset", "n_buffers", "n_children")),
        ("buffers", ctypes.POINTER(ctypes.c_void_p)),
        ("children", ctypes.POINTER(ctypes.c_void_p)),
    )


_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def _pixels(image: Image.Image) -> Iterator[tuple[int, int, int | bytes, int]]:
    """Yields strips of rows, 4 bytes per pixel: first row, number of rows, address or copy of them, and their bytes.

    They are read in place if Pillow shows them, up to 16 MB: in threads new memory is slow, and copies double the time.
    """
    width, height = image.size
    try:
        shown = image.__arrow_c_array__()[1]  # keeps the memory while it lives
        lists = _ArrowArray.from_address(_capsule_pointer(shown, b"arrow_array"))
        if (lists.length, lists.offset, lists.n_children) == (width * height, 0, 1):
            values = _ArrowArray.from_address(lists.children[0])
            if (values.length, values.offset, values.n_buffers) == (4 * width * height, 0, 2):
                yield 0, height, values.buffers[1], values.length
                return
    except (AttributeError, ValueError):  # an older Pillow; an image in several pieces
        pass
    rows = max(1, STRIP // (4 * width))
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height)))
        pixels = strip.tobytes("raw", "RGBX")
        yield top, strip.height, pixels, len(pixels)


def _library() -> ctypes.CDLL | None:
    with _lock:  # threads that come in the meantime wait for the one compilation
        return _load()


@functools.cache
def _load() -> ctypes.CDLL | None:
    try:
        library = _open(_build())
        if _reproduces_pillow(library):
            return library
        problem: object = "the compiled code does not give Pillow's pixels on this machine"
    except (OSError, RuntimeError, subprocess.SubprocessError) as e:  # RuntimeError: there is no home folder
        problem = e
    log.warning("Images are resized by Pillow, at a fifth of the speed: %s", problem)
    return None


def _build() -> Path:
    return c_compiler.build(SOURCE.stem, (SOURCE,), FLAGS)


def _open(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    pointer, length, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_double
    source, target = [pointer, length], [pointer, length]  # where a buffer is, and its bytes
    library.fusion_across.argtypes = [*source, number, real, number, *target, length, number, number]
    library.fusion_down.argtypes = [*source, length, number, real, *target, number, number, number, number]
    return library


def _reproduces_pillow(library: ctypes.CDLL) -> bool:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (61, 83, 3), np.uint8))
    for height, width in ((20, 17), (90, 31)):
        ours, expected = np.empty((2, 1, height, width, 3), np.uint8)
        _with_library(library, image, [ours], image.size)
        _with_pillow(image, [expected], image.size)
        if not np.array_equal(ours, expected):
            return False
    return True
