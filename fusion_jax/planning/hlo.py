"""Reads the text of a compiled program, its optimized HLO, into computations and instructions."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4}
_BYTES |= {"u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16, "token": 0, "opaque": 0}

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\([^\n]*\) -> [^\n]*)?\{\s*$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")


@dataclass(frozen=True)
class Shape:
    """An array: its dtype, its dimensions, and whether it is in HBM rather than in a memory on the chip."""

    dtype: str
    dims: tuple[int, ...]
    in_hbm: bool = True

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        return self.size * _BYTES.get(self.dtype, 1)


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      op: what it does, such as fusion or dot. shapes: those of its result, several if that is a tuple. operands: names
      of the instructions that it reads; for a parameter its number, for a constant its value. rest: the line after the
      operands. root: whether its result is that of the computation.
    """

    name: str
    op: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    rest: str
    root: bool


@dataclass(frozen=True)
class Module:
    """Computations by name, each a dict of instructions by name."""

    computations: dict[str, dict[str, Instruction]]
    entry: str


def _shapes(text: str) -> tuple[Shape, ...]:
    return tuple(
        Shape(dtype, tuple(map(int, dims.split(","))) if dims else (), not re.search(r"S\([1-9]", layout or ""))
        for dtype, dims, layout in _SHAPE.findall(text)
        if dtype in _BYTES
    )


def _closing(text: str, start: int) -> int:
    """Returns the position of the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth == 0:
            return i
    raise ValueError(f"unbalanced brackets in HLO: {text[:200]}")


def _instruction(line: str) -> Instruction | None:
    name = _NAME.match(line)
    if not name:
        return None
    text = line[name.end() :]
    if text.startswith("("):
        end = _closing(text, 0) + 1
    else:
        end = text.index(" ")
    kind, text = text[:end], text[end:].lstrip()
    op = re.match(r"([\w\-]+)\(", text)
    if not op:
        return None
    close = _closing(text, op.end() - 1)
    inside = text[op.end() : close]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    if op[1] in ("parameter", "constant"):
        operands = (inside.strip(),)
    return Instruction(name[2], op[1], _shapes(kind), operands, text[close + 1 :], bool(name[1]))


def _lines(text: str) -> Iterator[str]:
    """Yields headers, instructions and ends, joining the lines of an instruction whose attributes hold line breaks."""
    whole = ""
    for line in text.splitlines():
        if _NAME.match(line) or _HEADER.match(line) or line == "}":
            yield whole
            whole = line
        else:
            whole += " " + line
    yield whole


def parse(text: str) -> Module:
    """Reads `compiled.as_text()`.

    Raises:
      ValueError: the text is not optimized HLO.
    """
    computations, entry, current = {}, "", None
    for line in _lines(text):
        header = _HEADER.match(line)
        if header:
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif line == "}":
            current = None
        elif current is not None:
            instruction = _instruction(line)
            if instruction:
                current[instruction.name] = instruction
    if not entry:
        raise ValueError("the text has no ENTRY computation; is it optimized HLO?")
    return Module(computations, entry)
