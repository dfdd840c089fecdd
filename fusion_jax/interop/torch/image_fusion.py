"""Turns images of any kind into the pixels that training would see.

Files are read as in training. Images are resized as by Pillow up to version 12, whichever version is installed.
"""

import time
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, unquote_to_bytes, urlsplit
from urllib.request import Request, url2pathname, urlopen

import numpy as np
import torch
from PIL import Image

from fusion_jax.data.base64_text import from_base64
from fusion_jax.data.decoding import MAX_BYTES, decode_opened, in_eight_bits, open_image
from fusion_jax.data.formats import ALLOWED, TooLarge, format_of, read_file
from fusion_jax.data.grey import UnclearRange, is_deep_colour, to_eight_bits
from fusion_jax.data.tiles import WHOLE, Tiling, choose_tiling, on_canvas

URL_SECONDS = 30  # limit for the body of an answer, and for each pause before it
# Keys of a message's part that may hold its image.
KEYS = ("image", "image_url", "url", "path", "base64")


def to_rgb(image: Any) -> Image.Image:
    """Converts an image of any kind to RGB with 8 bits.

    Args:
      image: one of
        - a PIL image of any mode;
        - a numpy array or torch tensor of one image, (height, width), (height, width, channels) or (channels, height,
          width) with 1, 3 or 4 channels. Values have 8 bits, or follow the rule for files that do not define white: 0
          to 1, or the least of 8, 10, 12, 14 and 16 bits that holds them;
        - the contents of an image file as bytes, or as text in base64;
        - a path;
        - a URL of http, https, file or data.

    Raises:
      ValueError: it cannot be read, with the reason.
      OSError: there is no such file, or the URL does not answer.
    """
    if isinstance(image, Image.Image):
        return _of_pillow(image)
    if isinstance(image, np.ndarray | torch.Tensor):
        return _of_array(image)
    if isinstance(image, dict):  # an undecoded image of the library `datasets`, or a part of a message
        held = [image[key] for key in ("bytes", *KEYS) if image.get(key) is not None]
        if held:
            return to_rgb(held[0])
    data, name = _read(image)
    try:
        return decode_opened(open_image(data))
    except Image.UnidentifiedImageError as e:
        raise ValueError(f"Cannot read {name}: it is not one of {ALLOWED}.") from e
    except Exception as e:  # decoders raise almost any exception for damaged bytes
        raise ValueError(f"Cannot read {name}: {_reason(e)}") from e


def _of_pillow(image: Image.Image) -> Image.Image:
    """Converts a PIL image. As in training, rotations in EXIF data are not applied."""
    if not min(image.size):
        raise ValueError(f"An image of {image.width} x {image.height} pixels is empty.")
    try:
        deep_colour, info = is_deep_colour(image), dict(image.info)
        image.load()
        try:
            return in_eight_bits(image, deep_colour)
        finally:
            image.info = info  # only the result loses its transparency
    except Exception as e:
        raise ValueError(f"Cannot use the image of mode {image.mode}: {_reason(e)}") from e


def _reason(error: Exception) -> str:
    return f"it {error}" if isinstance(error, TooLarge | UnclearRange) else str(error)


def _of_array(values: np.ndarray | torch.Tensor) -> Image.Image:
    channels_first = isinstance(values, torch.Tensor)
    if channels_first:
        values = values.detach().cpu()
        values = values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
        values = values.numpy()
    shape = values.shape
    if values.ndim == 4 and len(values) == 1:
        values = values[0]
    if values.ndim == 2:
        values = values[..., None]
    channels = (1, 3, 4)
    if values.ndim != 3 or not values.size or not (values.shape[0] in channels or values.shape[2] in channels):
        raise ValueError(
            f"An array of shape {list(shape)} is not an image: give (height, width), (height, width, channels) or "
            "(channels, height, width) with 1, 3 or 4 channels."
        )
    first = values.shape[0] in channels and (channels_first or values.shape[2] not in channels)
    values = values.transpose(1, 2, 0) if first else values
    values = values[..., :3]  # transparency is dropped
    if values.dtype == bool:
        values = values.astype(np.uint8) * 255
    if values.dtype != np.uint8:
        white = None if values.dtype.kind == "f" else np.iinfo(values.dtype).max
        try:
            flat = to_eight_bits(values.reshape(len(values), -1), None, white, False)
        except ValueError as e:
            raise ValueError(f"An array of {values.dtype} {e}.") from e
        values = flat.reshape(values.shape)
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(values, (*values.shape[:2], 3))))


def _read(image: Any) -> tuple[bytes, str]:
    """The contents of an image file, and its name in errors."""
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image), "the image"
    if isinstance(image, Path):
        return read_file(image, MAX_BYTES)[0], f"the image {image}"
    if not isinstance(image, str):
        if callable(getattr(image, "read", None)):  # an open file
            image.seek(0)
            return image.read(), "the image"
        raise ValueError(
            f"A {type(image).__name__} is not an image: give a PIL image, array, tensor, bytes, path, URL or base64."
        )
    scheme = image.lstrip()[:8].lower()
    if scheme.startswith("data:"):
        return _of_data_url(image), "the image in a data URL"
    if scheme.startswith(("http:", "https:")):
        return _fetched(image.strip()), f"the image {image.strip()}"
    if scheme.startswith("file:"):
        url = urlsplit(image.strip())
        if url.netloc.lower() not in ("", "localhost"):
            raise ValueError(f"Cannot read the image {image.strip()}: it is on another machine, {url.netloc}.")
        path = url2pathname(url.path)
        return read_file(path, MAX_BYTES)[0], f"the image {path}"
    if len(image) > 255 or not Path(image).exists():
        data = _of_base64(image)
        if data is not None and format_of(data[:16]) is not None:
            return data, "the image in base64"
        if len(image) > 4096:
            raise ValueError(
                f"A text of {len(image)} characters is not an image: neither a path, nor a URL, nor base64."
            )
    return read_file(image, MAX_BYTES)[0], f"the image {image}"


def _fetched(url: str) -> bytes:
    """Fetches a URL of http or https; of a file that is too large, only the beginning.

    Raises:
      OSError: the server does not answer with a file, or takes longer than URL_SECONDS.
    """
    end, data = time.monotonic() + URL_SECONDS, bytearray()
    escaped = quote(url, safe="%/:=&?~#+!$,;'@()*[]")  # URLs may be written with spaces and letters of any script
    try:
        with urlopen(Request(escaped, headers={"User-Agent": "transformers"}), timeout=URL_SECONDS) as answer:
            while len(data) <= MAX_BYTES and (part := answer.read1(1 << 20)):
                data += part
                if time.monotonic() > end:
                    raise TimeoutError(f"it takes longer than {URL_SECONDS} s")
    except (OSError, HTTPException) as e:
        raise OSError(f"Cannot fetch the image {url}: {e}") from e
    return bytes(data)


def _of_data_url(url: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma:
        raise ValueError("A data URL has no comma, after which its image would begin.")
    if head.strip().lower().endswith("base64"):
        data = _of_base64(unquote(body))
        if data is None:
            raise ValueError("A data URL does not hold base64.")
        return data
    return unquote_to_bytes(body)


def _of_base64(text: str) -> bytes | None:
    """Decodes base64 as in training; None for any other text."""
    try:
        return from_base64(text) or None
    except ValueError:
        return None


def resized(image: Image.Image, width: int, height: int) -> np.ndarray:
    """Resizes bicubically to (height, width, 3) uint8: first the columns, then the rows.

    In a single call Pillow 13 would begin with the rows of most upright images, which is rounded differently.
    """
    across = image.resize((width, image.height), Image.Resampling.BICUBIC)
    return np.array(across.resize((width, height), Image.Resampling.BICUBIC))


def static_views(image: Any, size: int, quadrants: bool) -> np.ndarray:
    """Views of fixed resolution, (5 or 1, size, size, 3) uint8: the four quadrants if wanted, and the whole image last.

    Quadrants are cut from the image at twice the size. Both sizes are resized from the original, and the aspect ratio
    is not kept.
    """
    image = to_rgb(image)
    whole = resized(image, size, size)[None]
    if not quadrants:
        return whole
    double = resized(image, 2 * size, 2 * size)
    cut = double.reshape(2, size, 2, size, 3).transpose(0, 2, 1, 3, 4).reshape(4, size, size, 3)
    return np.concatenate([cut, whole])


def tiled_views(image: Any, size: int, grids: list[tuple[int, int]]) -> tuple[np.ndarray, Tiling]:
    """Views of dynamic resolution, (N, size, size, 3) uint8: tiles row by row, the whole image last; and the tiling."""
    image = to_rgb(image)
    tiling, whole = choose_tiling(image.size, grids, size), resized(image, size, size)[None]
    if tiling == WHOLE:
        return whole, tiling
    tiles = on_canvas(resized(image, tiling.width, tiling.height), tiling, size)
    return np.concatenate([tiles, whole]), tiling
