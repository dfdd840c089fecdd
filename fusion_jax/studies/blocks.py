"""Writes a report, a list of headings, texts, tables and figures, as Markdown and as one HTML file."""

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif }
body { max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; display: block; overflow-x: auto; font-variant-numeric: tabular-nums }
td, th { padding: .25rem .75rem; border-bottom: 1px solid #8885; text-align: right; white-space: nowrap }
td:first-child, th:first-child { text-align: left }
img { max-width: 100%; background: #fff } pre { overflow-x: auto }
"""
_CODE = re.compile("`([^`]+)`")


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph; `code` keeps its line breaks."""

    text: str
    code: bool = False


@dataclass(frozen=True)
class Table:
    """A table; the first column holds names, the others figures."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    """A picture beside the report. text: what it shows, for those who do not see it."""

    path: Path
    text: str


Block = Heading | Text | Table | Figure


def paragraphs(text: str) -> list[Block]:
    """The paragraphs of a plain text; indented ones, and commands, are code."""
    parts = [part for part in text.strip().split("\n\n") if part.strip()]
    return [
        Text(part, code=True) if part.startswith((" ", "python ")) else Text(" ".join(part.split())) for part in parts
    ]


def markdown(blocks: Sequence[Block]) -> str:
    """The report in Markdown; figures are links."""
    return "\n\n".join(map(_markdown, blocks)) + "\n"


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {_plain(block.text)}"
    if isinstance(block, Text):
        return f"```text\n{block.text}\n```" if block.code else _plain(block.text)
    if isinstance(block, Figure):
        return f"![{_plain(block.text)}]({block.path.name})"
    rule = ["---", *["---:"] * (len(block.head) - 1)]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in row) + " |" for row in (block.head, rule, *block.rows))


def _plain(text: str) -> str:
    """A text whose characters mean nothing in Markdown, but for backticks around code."""
    parts = text.split("`")
    if len(parts) % 2 == 0:  # one that has no partner
        parts = [text]
    parts[::2] = ["".join(f"\\{c}" if c in "\\`*_[]<>#|" else c for c in part) for part in parts[::2]]
    return "`".join(parts)


def _cell(text: str) -> str:
    return text if set(text) <= set("-:") else _plain(text)


def page(title: str, blocks: Sequence[Block]) -> str:
    """The report as one HTML file, figures included."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(map(_element, blocks))}</body></html>\n"
    )


def _element(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{html.escape(block.text)}</h{block.level}>\n"
    if isinstance(block, Text):
        tag = "pre" if block.code else "p"
        text = html.escape(block.text)
        text = text if block.code else _CODE.sub(r"<code>\1</code>", text)
        return f"<{tag}>{text}</{tag}>\n"
    if isinstance(block, Figure):
        data = base64.b64encode(block.path.read_bytes()).decode()
        return f'<p><img alt="{html.escape(block.text)}" src="data:image/png;base64,{data}"></p>\n'
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in block.head)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n" for row in block.rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>\n"
