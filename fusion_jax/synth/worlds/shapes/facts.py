"""Lists the facts that may be asked about a grid of plain shapes, each with its only true answer.

A fact is listed only where the grid allows one answer: "the star" needs a single star, "the thing on the left" a left
column with a single thing.
"""

import dataclasses
from collections.abc import Iterator, Sequence

from fusion_jax.synth.worlds.shapes.grid import CELLS, COLOURS, PAIRS, SEEN, SHAPES, SIZES, WORDS, Grid, Thing
from fusion_jax.synth.worlds.words import article, capital

KINDS = ("colour", "shape", "place", "count", "word", "choice", "exists", "size")
NUMBERS = ("zero", "one", "two", "three", "four")

ANSWERS = {
    "colour": COLOURS,
    "shape": SHAPES,
    "place": CELLS,
    "count": NUMBERS,
    "word": WORDS,
    "exists": ("yes", "no"),
    "size": SIZES,
}

PLACE_PHRASES = {
    "top left": "at the top left",
    "top": "at the top",
    "top right": "at the top right",
    "left": "on the left",
    "center": "in the center",
    "right": "on the right",
    "bottom left": "at the bottom left",
    "bottom": "at the bottom",
    "bottom right": "at the bottom right",
}
ROW_PHRASES = ("at the top", "in the middle", "at the bottom")


@dataclasses.dataclass(frozen=True)
class Fact:
    """A fact that can be asked about a grid.

    Attributes:
      kind: one of `KINDS` except "choice", or "describe" (sentences only).
      form: how the subject is named; facts of a kind are picked form by form, so that no form dominates.
      subject: the words for what the question is about ("the star", "squares", "a red ring"), empty for the word.
      answer: the short answer.
      statement: the answer as a sentence.
      plural: whether the subject needs "are".
    """

    kind: str
    form: str
    subject: str
    answer: str
    statement: str
    plural: bool = False


def noun_phrase(thing: Thing, attributes: Sequence[str]) -> str:
    """The noun phrase of a thing by some of its attributes: "small red star", "red thing", "star"."""
    words = [getattr(thing, attribute) for attribute in ("size", "colour") if attribute in attributes]
    return " ".join([*words, thing.shape if "shape" in attributes else "thing"])


def plural(noun: str) -> str:
    """The noun in the plural: "stars", "crosses"."""
    return noun + ("es" if noun.endswith("s") else "s")


# The ways in which a kind may name its subject. Size is used only where the shorter name fits several things.
_NAMED_BY = {
    "colour": (("shape",), ("shape", "size")),
    "shape": (("colour",), ("colour", "size")),
    "place": (("shape",), ("colour",), ("shape", "colour")),
    "size": (("shape",), ("colour",), ("shape", "colour")),
}


def _same(grid: Grid, thing: Thing, attributes: Sequence[str]) -> list[Thing]:
    return [other for other in grid.things if all(getattr(other, a) == getattr(thing, a) for a in attributes)]


def _alone_there(grid: Grid, thing: Thing) -> bool:
    """Whether "on the left" and the like can mean only this thing: no other thing is on that side of the grid."""
    row, column = divmod(thing.cell, 3)
    others = [divmod(other.cell, 3) for other in grid.things if other != thing]
    if (row == 1) == (column == 1):  # a corner or the center has a name of its own
        return True
    if column == 1:
        return all(other_row != row for other_row, _ in others)
    return all(other_column != column for _, other_column in others)


def _subjects(grid: Grid, kind: str) -> Iterator[tuple[str, str, Thing]]:
    """Yields (form, subject, thing) for each way to name exactly one thing without giving the answer away."""
    for thing in grid.things:
        for attributes in _NAMED_BY[kind]:
            if len(_same(grid, thing, attributes)) > 1:
                continue
            if "size" in attributes and len(_same(grid, thing, attributes[:1])) == 1:
                continue
            yield "+".join(attributes), f"the {noun_phrase(thing, attributes)}", thing
        if kind != "place" and _alone_there(grid, thing):
            yield "cell", f"the thing {PLACE_PHRASES[thing.place]}", thing
    if len(grid.things) == 1:
        yield "only", "the thing", grid.things[0]


def _colour_facts(grid: Grid) -> list[Fact]:
    facts = [
        Fact("colour", form, s, thing.colour, f"{capital(s)} is {thing.colour} in colour.")
        for form, s, thing in _subjects(grid, "colour")
    ]
    for shape in SHAPES:
        group = [thing for thing in grid.things if thing.shape == shape]
        if len(group) > 1 and len({thing.colour for thing in group}) == 1:
            s, colour = f"the {plural(shape)}", group[0].colour
            facts.append(Fact("colour", "plural", s, colour, f"{capital(s)} are {colour} in colour.", plural=True))
    return facts


def _shape_facts(grid: Grid) -> list[Fact]:
    facts = [
        Fact("shape", form, s, thing.shape, f"{capital(s)} is a {thing.shape}.")
        for form, s, thing in _subjects(grid, "shape")
    ]
    for colour in COLOURS:
        group = [thing for thing in grid.things if thing.colour == colour]
        if len(group) > 1 and len({thing.shape for thing in group}) == 1:
            s, shape = f"the {colour} things", group[0].shape
            facts.append(Fact("shape", "plural", s, shape, f"{capital(s)} are {plural(shape)}.", plural=True))
    return facts


def _place_facts(grid: Grid) -> list[Fact]:
    return [
        Fact("place", form, s, thing.place, f"{capital(s)} is {PLACE_PHRASES[thing.place]}.")
        for form, s, thing in _subjects(grid, "place")
    ]


def _size_facts(grid: Grid) -> list[Fact]:
    return [
        Fact("size", form, s, thing.size, f"{capital(s)} is {thing.size} in size.")
        for form, s, thing in _subjects(grid, "size")
    ]


def _count_facts(grid: Grid) -> list[Fact]:
    def fact(form: str, noun: str, number: int) -> Fact:
        if number == 0:
            statement = f"There are no {plural(noun)} in the image."
        elif number == 1:
            statement = f"There is one {noun} in the image."
        else:
            statement = f"There are {NUMBERS[number]} {plural(noun)} in the image."
        return Fact("count", form, plural(noun), NUMBERS[number], statement)

    facts = [fact("shape", shape, sum(thing.shape == shape for thing in grid.things)) for shape in SHAPES]
    facts += [fact("colour", f"{c} thing", sum(thing.colour == c for thing in grid.things)) for c in COLOURS]
    # It asks for "shapes", not "things", because the written word is not counted among them.
    return [*facts, fact("all", "shape", len(grid.things))]


def _exists_facts(grid: Grid, split: str) -> list[Fact]:
    pairs = {thing.pair for thing in grid.things}
    colours, shapes = {colour for colour, _ in pairs}, {shape for _, shape in pairs}
    facts = []
    for shape in SHAPES:
        there = shape in shapes
        statement = f"Yes, there is a {shape}." if there else f"No, there is no {shape}."
        facts.append(Fact("exists", "shape", f"a {shape}", "yes" if there else "no", statement))
    # Training text never names the held-out pairs: questions about them would always be answered "no".
    for colour, shape in SEEN if split == "train" else PAIRS:
        noun = f"{colour} {shape}"
        if (colour, shape) in pairs:
            facts.append(Fact("exists", "pair", article(noun), "yes", f"Yes, there is {article(noun)}."))
        elif colour in colours or shape in shapes:  # half right: seeing only the colour or the shape is not enough
            facts.append(Fact("exists", "pair", article(noun), "no", f"No, there is no {noun}."))
    return facts


def _word_facts(grid: Grid) -> list[Fact]:
    if grid.word is None:
        return []
    return [Fact("word", "word", "", grid.word.text, f"The written word is {grid.word.text}.")]


def _describe_facts(grid: Grid) -> list[Fact]:
    facts = []
    for thing in grid.things:
        if _alone_there(grid, thing):
            noun, place = noun_phrase(thing, ("size", "colour", "shape")), PLACE_PHRASES[thing.place]
            facts.append(Fact("describe", "cell", place, noun, f"{capital(article(noun))} is {place}."))
    return facts


def facts(grid: Grid, kind: str, split: str = "train") -> list[Fact]:
    """All facts of a kind about the grid, each with one true answer.

    Args:
      kind: one of `KINDS` except "choice", or "describe".
      split: "train" leaves out the pairs of colour and shape that are held out.
    """
    if kind == "exists":
        return _exists_facts(grid, split)
    return {
        "colour": _colour_facts,
        "shape": _shape_facts,
        "place": _place_facts,
        "count": _count_facts,
        "size": _size_facts,
        "word": _word_facts,
        "describe": _describe_facts,
    }[kind](grid)
