"""Reads files written as base64 text in records and requests; an exported folder carries this file."""

import base64

_STANDARD = str.maketrans("-_", "+/")  # from the URL alphabet to the standard one


def from_base64(text: str) -> bytes:
    """Decodes base64 in the standard or the URL alphabet, with white space anywhere, with or without padding. Raises
    ValueError if the text is not base64."""
    text = "".join(text.split()).translate(_STANDARD)
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
