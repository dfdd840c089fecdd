"""Texts that make a careless regular expression slow, built from the expression itself.

A backtracking matcher takes quadratic time or more where something that repeats can be begun at many places, or split
in many ways, and what must follow never comes. So each text is a beginning of what the pattern matches, then one of its
pieces again and again, then something that fits nowhere.
"""

import ast
import itertools
import re
import re._constants as kinds
import re._parser as parser
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

_LETTERS = "a1 \n\"'-_.,:;!?*#`<>[](){}|&/\\=x0é\u0301“"
_METHODS = ("match", "fullmatch", "search")  # others go through the whole text


@dataclass(frozen=True)
class Used:
    """A pattern where it stands, and how it is applied: match, fullmatch, search or finditer."""

    where: str
    pattern: re.Pattern
    how: str

    def seconds(self, text: str) -> float:
        begun = time.thread_time()
        if self.how == "finditer":
            for _ in self.pattern.finditer(text):
                pass
        else:
            getattr(self.pattern, self.how)(text)
        return time.thread_time() - begun


def used(package: ModuleType) -> list[Used]:
    """The patterns in a package's source: those of its modules' names, and those written where they are applied. Of one
    that is put together where it is applied nothing is known here. Bytes are left out: they are files of our own."""
    folder = Path(package.__path__[0])
    found = []
    for path in sorted(folder.rglob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        place = ".".join((package.__name__, *path.relative_to(folder).with_suffix("").parts))
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
        for call in calls:
            method, written = call.func.attr, call.args and isinstance(call.args[0], ast.Constant)
            if ast.unparse(call.func.value) == "re" and method not in ("compile", "escape") and written:
                given = [*(k.value for k in call.keywords if k.arg == "flags"), *call.args[1:]]
                flags = [getattr(re, f.attr) for f in given if ast.unparse(f).startswith("re.")]
                pattern = re.compile(call.args[0].value, flags[0] if flags else 0)
                found.append(Used(f"{place}:{call.lineno}", pattern, method if method in _METHODS else "finditer"))
        if "import re\n" not in path.read_text("utf-8"):
            continue
        for name, pattern in _patterns(vars(import_module(place.removesuffix(".__init__")))):
            methods = {call.func.attr for call in calls if ast.unparse(call.func.value) == name}
            how = methods & {*_METHODS} if methods and methods <= {*_METHODS} else {"finditer"}
            found += [Used(f"{place}.{name}", pattern, one) for one in sorted(how)]
    return found


def _patterns(names: dict) -> Iterator[tuple[str, re.Pattern]]:
    for name, value in names.items():
        if isinstance(value, re.Pattern) and isinstance(value.pattern, str):
            yield name, value
        elif isinstance(value, tuple) and name == "_NUMBERS":  # patterns as texts
            yield from ((name, re.compile(one)) for one in value if isinstance(one, str))


def texts(pattern: re.Pattern, size: int) -> Iterator[str]:
    """Texts of about `size` characters; nothing of one pattern is said twice."""
    beginnings, pieces = {""}, set()
    _walk(parser.parse(pattern.pattern, pattern.flags), "", beginnings, pieces)
    beginnings = _some(beginnings)
    pieces = _some(pieces | {begun + " " for begun in beginnings} | {*beginnings})
    for begun, piece in itertools.product(beginnings, pieces):
        if piece:
            yield begun + piece * (size // len(piece)) + "\x00"


def _some(said: set[str], most: int = 16) -> list[str]:
    """At most so many of them, short and long ones."""
    ordered = sorted(said, key=lambda one: (len(one), one))
    return [ordered[i * len(ordered) // most] for i in range(most)] if len(ordered) > most else ordered


def _walk(tree, before: str, beginnings: set[str], pieces: set[str]) -> str:
    """An example of what a part of a pattern matches; adds its beginnings behind `before`, and its pieces."""
    said = ""
    for node, following in itertools.zip_longest(tree, tree[1:]):
        said += _example(node, before + said, beginnings, pieces)
        if node[0] is not kinds.LITERAL or following is None or following[0] is not kinds.LITERAL:
            beginnings.add(before + said)
    pieces.add(said)
    return said


def _example(node, before: str, beginnings: set[str], pieces: set[str]) -> str:
    kind, value = node
    if kind is kinds.LITERAL:
        return chr(value)
    if kind in (kinds.IN, kinds.ANY, kinds.NOT_LITERAL):
        fits = re.compile(_class(node), re.DOTALL)
        these = [letter for letter in _LETTERS if fits.fullmatch(letter)]
        pieces.update(these[:6])
        return these[0] if these else ""
    if kind in (kinds.MAX_REPEAT, kinds.MIN_REPEAT, kinds.POSSESSIVE_REPEAT):
        least, most, inner = value
        return _walk(inner, before, beginnings, pieces) * max(least, min(most, 1))
    if kind is kinds.SUBPATTERN:
        return _walk(value[3], before, beginnings, pieces)
    if kind is kinds.ATOMIC_GROUP:
        return _walk(value, before, beginnings, pieces)
    if kind is kinds.BRANCH:
        first, *_ = [_walk(branch, before, beginnings, pieces) for branch in value[1]]
        return first
    if kind in (kinds.ASSERT, kinds.ASSERT_NOT):
        _walk(value[1], before, beginnings, pieces)
    return ""  # places, and groups that are said again


def _class(node) -> str:
    """A pattern for one letter out of its parsed form."""
    kind, value = node
    if kind is kinds.ANY:
        return "."
    if kind is kinds.NOT_LITERAL:
        return f"[^{re.escape(chr(value))}]"
    names = {
        kinds.CATEGORY_DIGIT: r"\d",
        kinds.CATEGORY_NOT_DIGIT: r"\D",
        kinds.CATEGORY_SPACE: r"\s",
        kinds.CATEGORY_NOT_SPACE: r"\S",
        kinds.CATEGORY_WORD: r"\w",
        kinds.CATEGORY_NOT_WORD: r"\W",
    }
    inside = ""
    for what, given in value:
        if what is kinds.NEGATE:
            inside = "^" + inside
        elif what is kinds.LITERAL:
            inside += re.escape(chr(given))
        elif what is kinds.RANGE:
            inside += f"{re.escape(chr(given[0]))}-{re.escape(chr(given[1]))}"
        else:
            inside += names[given]
    return f"[{inside}]"


def grows(one: Used, short: int = 6000, quick: float = 0.004) -> str | None:
    """The start of a text for which four times the length takes over eight times as long; None if there is none."""
    for text, longer in zip(texts(one.pattern, short), texts(one.pattern, 4 * short)):
        if (first := one.seconds(text)) < quick:
            continue
        if first > 50 * quick:  # no pattern takes so long for each character
            return text[:60]
        # Once more: a busy machine makes anything slow once.
        small, large = (min(one.seconds(said) for _ in range(2)) for said in (text, longer))
        if large > max(8 * small, 8 * quick):
            return text[:60]
    return None
