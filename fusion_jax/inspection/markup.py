"""Escapes text from data files for HTML."""

import html


def escape(value: str) -> str:
    """Returns the text with HTML's special characters replaced, for use in attributes, too."""
    return html.escape(value, quote=True)
