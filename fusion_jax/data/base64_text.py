"""Reads files written as base64 text in records and requests; an exported folder carries this file."""

import base64

_STANDARD = str.maketrans("-_", "+/")  # the alphabet for addresses


def from_base64(text: str) -> bytes:
    """What base64 says: standard or the alphabet for addresses, white space anywhere, padding or none. ValueError where
    it is none."""
    text = "".join(text.split()).translate(_STANDARD)
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
