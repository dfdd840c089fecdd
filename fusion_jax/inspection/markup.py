"""Text in HTML: what comes from data files is escaped here, and nowhere else."""

import html


def escape(value: str) -> str:
    """The text as it may stand in HTML, in attributes too."""
    return html.escape(value, quote=True)
