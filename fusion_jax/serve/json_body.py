"""JSON that strangers send, read in at most twice the memory that its bytes take.

A parser makes an object of 60 bytes of every `{}` and may keep a text in four bytes a character. What would do so is
refused before: a walk over the bytes, from one string to the next, counts values and text. Images are neither, they are
base64 in data URLs: one byte a character, and decoded piece by piece.
"""

import binascii
import io
import re
from typing import Any

from pydantic_core import from_json

from fusion_jax.serve.error import ApiError

MOST_VALUES = 20_000  # values, keys included: a conversation has a few of them for every message
_SETTINGS = 64 << 10  # bytes besides the texts: keys, settings, spaces
_ESCAPED = 6  # bytes that JSON may write for one byte of text: a backslash, u and four digits
_MARKS = (b",", b":", b"[", b"{")
_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+"', re.DOTALL)  # behind its opening quote
_DATA_URL = re.compile(rb'"data:[A-Za-z0-9.+/;=\\-]{0,128};base64,(?:[A-Za-z0-9+/=]++|\\/)*+"')
_PIECE = 4 << 18  # characters of base64 that are decoded at once; a multiple of 4


def read_json(body: io.BytesIO, text_bytes: int) -> dict[str, Any]:
    """The object that a body says; the body is closed.

    Args:
      text_bytes: how many bytes all texts together may have in UTF-8. Where they have more the body may be accepted,
        if it is small: whoever reads the texts looks again.

    Raises:
      ApiError: 400, no JSON object in UTF-8, too many values in it, or more text than can be of use.
    """
    data = body.getvalue()
    try:
        if escaped := _check_size(data, text_bytes):
            body.close()
            data = _unescaped(data, escaped).getvalue()
        parsed = from_json(data, allow_inf_nan=False, cache_strings="none")
    except ValueError as error:
        raise ApiError(400, f"The body is not valid JSON: {error}.", "invalid_json") from error
    finally:
        body.close()
    if not isinstance(parsed, dict):
        raise ApiError(400, "The body must be a JSON object.", "invalid_json")
    return parsed


def text_too_long(text_bytes: int) -> ApiError:
    """The error for more text than `text_bytes`."""
    return ApiError(
        400, f"The texts have over {text_bytes} bytes, more than any prompt.", "context_length_exceeded", "messages"
    )


def _unescaped(data: bytes, places: list[tuple[int, int]]) -> io.BytesIO:
    """The data with the backslashes of these places left out: some programs write one before every slash of an image,
    and the parser would need room for a text with and without them."""
    written, done, view = io.BytesIO(), 0, memoryview(data)
    for start, end in places:
        written.write(view[done:start])
        for at in range(start, end, _PIECE):
            written.write(data[at : min(at + _PIECE, end)].replace(b"\\", b""))
        done = end
    written.write(view[done:])
    return written


def _check_size(data: bytes, text_bytes: int) -> list[tuple[int, int]]:
    """Where there are images with escapes. ApiError for too many values or too much text. What is no JSON may pass."""
    most, escaped = _ESCAPED * text_bytes + _SETTINGS, []
    values = size = at = 0
    while at < len(data):
        quote = data.find(b'"', at)
        outside = len(data) if quote < 0 else quote
        values += 1 + sum(data.count(mark, at, outside) for mark in _MARKS)
        size += outside - at
        at = outside
        if quote >= 0:
            image = _DATA_URL.match(data, quote)
            string = image or _STRING.match(data, quote + 1, quote + 1 + max(most - size, 0))
            at = string.end() if string else len(data)
            size += 0 if image else at - quote
            if image and data.find(b"\\", quote, at) >= 0:
                escaped.append((quote, at))
        if values > MOST_VALUES:
            raise ApiError(400, f"The body has over {MOST_VALUES} JSON values.", "too_many_values")
        if size > most and quote >= 0 and data.startswith(b'"data:', quote):
            raise ApiError(400, "A data URL must be base64, without spaces or line breaks.", "invalid_image_url")
        if size > most:
            raise text_too_long(text_bytes)
    return escaped


def decode_base64(text: str, start: int) -> bytes:
    """The bytes that `text[start:]` says. ValueError where it is no base64."""
    written = io.BytesIO()
    for at in range(start, len(text), _PIECE):
        piece = text[at : at + _PIECE]
        if "=" in piece and at + _PIECE < len(text):
            raise binascii.Error("padding before the end")
        written.write(binascii.a2b_base64(piece, strict_mode=True))
    return written.getvalue()
