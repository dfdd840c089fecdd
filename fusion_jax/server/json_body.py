"""Parses untrusted JSON in at most twice the memory of its bytes.

A parser turns every `{}` into an object of 60 bytes, and may store a text in four bytes a character. Bodies for which
this costs too much are refused before they are parsed: a scan from one string to the next counts values and text.
Images do not count: they are data URLs in ASCII, of one byte a character, and are decoded in pieces.
"""

import io
import re
from typing import Any

from pydantic_core import from_json

from fusion_jax.server.error import ApiError

MOST_VALUES = 20_000  # values and keys; a conversation has a few for each message
_SETTINGS = 64 << 10  # bytes besides the texts: keys, settings, spaces
_ESCAPED = 6  # bytes of JSON for one byte of text at most: a backslash, u and four digits
_MARKS = (b",", b":", b"[", b"{")
_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+"', re.DOTALL)  # after its opening quote
# The beginning of a data URL, up to its comma; below the rest, in base64 or with percent escapes.
_BEGINS = re.compile(rb'"(?: |\\[nrt])*+data:((?:[ !#-+\--\[\]-~]|\\/|\\u00[23][0-9a-f]){0,1024}+),', re.IGNORECASE)
# Some programs escape slashes, or all characters with a meaning in web pages; line breaks have none in base64.
_ESCAPES = [(b"\\/", b"/"), (b"\\n", b""), (b"\\r", b""), (b"\\t", b"")]
_ESCAPES += [
    (digits.encode(), character.strip().encode())
    for character in "+/=%-' \t\r\n"
    for digits in {f"\\u{ord(character):04x}", f"\\u{ord(character):04X}"}
]
_BASE64 = re.compile(rb"(?:[A-Za-z0-9+/=_% -]++|" + b"|".join(re.escape(before) for before, _ in _ESCAPES) + rb')*+"')
_PERCENT = re.compile(rb'[ !#-\[\]-~]*+"')
_SMALL = 64 << 10  # bytes of a data URL whose escapes are left to the parser
_PIECE = 1 << 20  # bytes that are rewritten at a time


def read_json(body: io.BytesIO, text_bytes: int) -> dict[str, Any]:
    """The JSON object of a body. Closes the body.

    Args:
      text_bytes: most bytes of all texts together in UTF-8. A small body with more may be accepted: the readers of the
        texts check them again.

    Raises:
      ApiError: 400 for anything but a JSON object in UTF-8, for too many values or for too much text.
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
    """The data without the escapes in these places: a text with escapes takes the parser twice the memory."""
    written, done, view = io.BytesIO(), 0, memoryview(data)
    for start, end in places:
        written.write(view[done:start])
        done = start
        while done < end:
            stop = min(done + _PIECE, end)
            cut = data.rfind(b"\\", stop - 5, stop)  # an escape may continue after the piece
            stop = cut if done < cut and stop < end else stop
            piece = data[done:stop]
            for before, after in _ESCAPES:
                piece = piece.replace(before, after)
            written.write(piece)
            done = stop
    written.write(view[done:])
    return written


def _check_size(data: bytes, text_bytes: int) -> list[tuple[int, int]]:
    """The places of images with escapes. Raises ApiError for too many values or too much text.

    Invalid JSON may pass.
    """
    most, escaped = _ESCAPED * text_bytes + _SETTINGS, []
    values = size = at = 0
    while at < len(data):
        quote = data.find(b'"', at)
        outside = len(data) if quote < 0 else quote
        values += 1 + sum(data.count(mark, at, outside) for mark in _MARKS)
        size += outside - at
        at = outside
        if quote >= 0:
            image = _data_url(data, quote)
            string = image or _STRING.match(data, quote + 1, quote + 1 + max(most - size, 0))
            at = string.end() if string else len(data)
            size += 0 if image else at - quote
            if image and at - quote > _SMALL and data.find(b"\\", quote, at) >= 0:
                escaped.append((quote, at))
        if values > MOST_VALUES:
            raise ApiError(400, f"The body has over {MOST_VALUES} JSON values.", "too_many_values")
        if size > most and quote >= 0 and _BEGINS.match(data, quote):
            raise ApiError(400, "A data URL must be base64, or ASCII.", "invalid_image_url", "messages")
        if size > most:
            raise text_too_long(text_bytes)
    return escaped


def _data_url(data: bytes, quote: int) -> re.Match | None:
    """The string that begins at the quote, up to its end, where it is a data URL."""
    head = _BEGINS.match(data, quote)
    rest = _BASE64 if head and b"base64" in head[1].lower() else _PERCENT
    return rest.match(data, head.end()) if head else None
