"""Escapes text from data files for HTML."""

import html


def escape(value: str) -> str:
    """The text as it may stand in HTML, in attributes too."""
    return html.escape(value, quote=True)
