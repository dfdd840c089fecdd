"""Images of any kind to the pixels that training saw: files as training reads them, resized as Pillow up to version 12
did it, whichever version is installed."""

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

URL_SECONDS = 30  # for the body of an answer, and for each silence before it
# Keys of a message's part that may hold its image.
KEYS = ("image", "image_url", "url", "path", "base64")


def to_rgb(image: Any) -> Image.Image:
    """An image of any kind as RGB of 8 bits.

    Args:
      image: a PIL image of any mode; a numpy array or torch tensor of one image, (height, width), (height, width,
        channels) or (channels, height, width) with 1, 3 or 4 channels, values of 8 bits, or others by the rule for
        files without a word about white: 0 to 1, or the least of 8, 10, 12, 14 and 16 bits that holds them; what an
        image file contains, as bytes or as text in base64; a path; a URL of http, https, file or data.

    Raises:
      ValueError: it cannot be read, with the reason. OSError: there is no such file, or no answer from the URL.
    """
    if isinstance(image, Image.Image):
        return _of_pillow(image)
    if isinstance(image, np.ndarray | torch.Tensor):
        return _of_array(image)
    if isinstance(image, dict):  # as datasets keeps images that are not decoded; or a part of a message
        held = [image[key] for key in ("bytes", *KEYS) if image.get(key) is not None]
        if held:
            return to_rgb(held[0])
    data, name = _read(image)
    try:
        return decode_opened(open_image(data))
    except Image.UnidentifiedImageError as e:
        raise ValueError(f"Cannot read {name}: it is none of {ALLOWED}.") from e
    except Exception as e:  # decoders answer damaged bytes with almost any exception
        raise ValueError(f"Cannot read {name}: {_reason(e)}") from e


def _of_pillow(image: Image.Image) -> Image.Image:
    """Rotations noted in EXIF data are not applied, as in training."""
    if not min(image.size):
        raise ValueError(f"An image of {image.width} x {image.height} pixels has none.")
    try:
        deep_colour, info = is_deep_colour(image), dict(image.info)
        image.load()
        try:
            return in_eight_bits(image, deep_colour)
        finally:
            image.info = info  # its transparency is left out of the result alone
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
            f"An array of shape {list(shape)} is no image: give (height, width), (height, width, channels) or "
            "(channels, height, width) with 1, 3 or 4 channels."
        )
    first = values.shape[0] in channels and (channels_first or values.shape[2] not in channels)
    values = values.transpose(1, 2, 0) if first else values
    values = values[..., :3]  # transparency is left out
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
    """What an image file contains, and what errors call it."""
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image), "the image"
    if isinstance(image, Path):
        return read_file(image, MAX_BYTES)[0], f"the image {image}"
    if not isinstance(image, str):
        if callable(getattr(image, "read", None)):  # an open file
            image.seek(0)
            return image.read(), "the image"
        raise ValueError(
            f"A {type(image).__name__} is no image: PIL images, arrays, tensors, bytes, paths, URLs and base64 are."
        )
    scheme = image.lstrip()[:8].lower()
    if scheme.startswith("data:"):
        return _of_data_url(image), "the image in a data URL"
    if scheme.startswith(("http:", "https:")):
        return _fetched(image.strip()), f"the image {image.strip()}"
    if scheme.startswith("file:"):
        url = urlsplit(image.strip())
        if url.netloc.lower() not in ("", "localhost"):
            raise ValueError(f"Cannot read the image {image.strip()}: it lies on another machine, {url.netloc}.")
        path = url2pathname(url.path)
        return read_file(path, MAX_BYTES)[0], f"the image {path}"
    if len(image) > 255 or not Path(image).exists():
        data = _of_base64(image)
        if data is not None and format_of(data[:16]) is not None:
            return data, "the image in base64"
        if len(image) > 4096:
            raise ValueError(f"A text of {len(image)} characters is no image: neither a path, nor a URL, nor base64.")
    return read_file(image, MAX_BYTES)[0], f"the image {image}"


def _fetched(url: str) -> bytes:
    """What is at a URL of http or https, or its beginning where that is too large already.

    Raises:
      OSError: nothing is there, or it takes longer than URL_SECONDS.
    """
    end, data = time.monotonic() + URL_SECONDS, bytearray()
    escaped = quote(url, safe="%/:=&?~#+!$,;'@()*[]")  # people write spaces and letters of every script
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
        raise ValueError("A data URL has no comma, behind which its image would begin.")
    if head.strip().lower().endswith("base64"):
        data = _of_base64(unquote(body))
        if data is None:
            raise ValueError("A data URL does not hold base64.")
        return data
    return unquote_to_bytes(body)


def _of_base64(text: str) -> bytes | None:
    """As training reads it; None for another text."""
    try:
        return from_base64(text) or None
    except ValueError:
        return None


def resized(image: Image.Image, width: int, height: int) -> np.ndarray:
    """(height, width, 3) uint8, bicubically: columns first, then rows, each by itself. Pillow 13 begins with the rows
    in most upright images when it is asked for both at once, and rounds to other values on its way."""
    across = image.resize((width, image.height), Image.Resampling.BICUBIC)
    return np.array(across.resize((width, height), Image.Resampling.BICUBIC))


def static_views(image: Any, size: int, quadrants: bool) -> np.ndarray:
    """(5 or 1, size, size, 3) uint8: the quadrants of the image at twice the size, if wanted, and the whole image last.
    Both sizes are resized from the original, without keeping the aspect ratio."""
    image = to_rgb(image)
    whole = resized(image, size, size)[None]
    if not quadrants:
        return whole
    double = resized(image, 2 * size, 2 * size)
    cut = double.reshape(2, size, 2, size, 3).transpose(0, 2, 1, 3, 4).reshape(4, size, size, 3)
    return np.concatenate([cut, whole])


def tiled_views(image: Any, size: int, grids: list[tuple[int, int]]) -> tuple[np.ndarray, Tiling]:
    """Dynamic resolution: (N, size, size, 3) uint8, tiles row by row and the whole image last; how it is cut."""
    image = to_rgb(image)
    tiling, whole = choose_tiling(image.size, grids, size), resized(image, size, size)[None]
    if tiling == WHOLE:
        return whole, tiling
    tiles = on_canvas(resized(image, tiling.width, tiling.height), tiling, size)
    return np.concatenate([tiles, whole]), tiling
