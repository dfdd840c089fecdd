"""Draws the tree of the package into docs/design.md, one line a file: the first line of each module's docstring.

    python docs/generate_tree.py

tests/test_docs.py fails where the page does not hold what this draws.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "design.md"
BEGIN, END = "<!-- The tree is written by docs/generate_tree.py. -->\n", "<!-- The end of the tree. -->\n"


def tree() -> str:
    """A block of text with a line for each Python file, folders after the files beside them."""
    lines = ["```text", "fusion_jax/", *folder(ROOT / "fusion_jax", 1), "```"]
    return "\n" + "\n".join(lines) + "\n\n"


def folder(path: Path, depth: int) -> list[str]:
    """The lines of a folder, without its own."""
    indent = "  " * depth
    files = [file for file in sorted(path.glob("*.py")) if first_line(file)]
    lines = [f"{indent}{file.name:<{34 - len(indent)}}{first_line(file)}" for file in files]
    for inner in sorted(path.iterdir()):
        if inner.is_dir() and any(inner.glob("*.py")):
            lines += [f"{indent}{inner.name}/", *folder(inner, depth + 1)]
    return lines


def first_line(path: Path) -> str:
    """The first line of a module's docstring; nothing for a module without one."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]


def with_tree(page: str) -> str:
    """The page with the tree between its two marks."""
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    return pattern.sub(lambda _: BEGIN + tree() + END, page)


if __name__ == "__main__":
    PAGE.write_text(with_tree(PAGE.read_text()))
