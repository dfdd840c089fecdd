"""Decodes `data:` URLs of images (RFC 2397), piece by piece, in the ways that programs write them.

It accepts upper case in `data`, the media type and `base64`; a missing media type, or any number of parameters; white
space and line breaks; missing padding; the alphabet for URLs (`-_`); percent escapes, in base64 and in place of it.
"""

import binascii
import io
import re
import string
from urllib.parse import unquote_to_bytes

from fusion_jax.server.error import ApiError

_HEAD = re.compile(r"\s*data:([^,]{0,1024}),", re.IGNORECASE)
_START = re.compile(r"\s*data:", re.IGNORECASE)
_PIECE = 1 << 18  # characters that are decoded at a time
_SPACES = string.whitespace.encode()
_ALPHABET = bytes.maketrans(b"-_", b"+/")


def is_data_url(address: str) -> bool:
    """Whether the address begins like a data URL."""
    return _START.match(address) is not None


def decode(address: str, most: int, where: str) -> bytes:
    """The data of a data URL, whatever its media type.

    Args:
      most: the most bytes that are accepted. where: place in the request, for errors.

    Raises:
      ApiError: 400 `invalid_image_url` for an invalid URL or invalid base64, `image_too_large` for over `most` bytes.
    """
    head = _HEAD.match(address)
    if head is None:
        raise _invalid(where, "a data URL is data:image/png;base64,... with a comma before the data")
    encoded = any(part.strip().lower() == "base64" for part in head[1].split(";"))
    pieces = _unescaped(address, head.end())
    written = io.BytesIO()
    try:
        for piece in _from_base64(pieces) if encoded else pieces:
            written.write(piece)
            if written.tell() > most:
                raise ApiError(400, f"{where}: the image has over {most} bytes.", "image_too_large", where)
    except ValueError as error:
        raise _invalid(where, f"the data URL is not valid base64 ({error})") from error
    if not written.tell():
        raise _invalid(where, "the data URL holds no data")
    return written.getvalue()


def _invalid(where: str, text: str) -> ApiError:
    return ApiError(400, f"{where}: {text}.", "invalid_image_url", where)


def _unescaped(text: str, start: int):
    """Yields the bytes of `text[start:]` without percent escapes, in pieces."""
    kept = b""
    for at in range(start, len(text), _PIECE):
        piece = kept + text[at : at + _PIECE].encode()
        cut = piece.find(b"%", max(len(piece) - 2, 0)) if at + _PIECE < len(text) else -1
        cut = len(piece) if cut < 0 else cut  # an escape may continue in the next piece
        kept = piece[cut:]
        yield unquote_to_bytes(piece[:cut])


def _from_base64(pieces):
    """Yields the data of pieces of base64. Raises ValueError where they are invalid."""
    left, padding = b"", 0
    for piece in pieces:
        piece = piece.translate(_ALPHABET, _SPACES)
        letters = piece.rstrip(b"=")
        if padding and letters:
            raise ValueError("padding before the end")
        padding += len(piece) - len(letters)
        letters = left + letters
        whole = len(letters) // 4 * 4
        left = letters[whole:]
        yield binascii.a2b_base64(letters[:whole], strict_mode=True)
    if padding > 2 or len(left) == 1:
        raise ValueError("characters are missing or too many")
    yield binascii.a2b_base64(left + b"=" * (-len(left) % 4), strict_mode=True)
