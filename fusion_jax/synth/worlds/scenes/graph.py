"""Defines the scene graph: all that a picture shows, and all that may be stated about it.

A scene is a setting and up to six things in groups of equal things. Each group has its own slot in one of three rows of
three columns:

    air     | left | center | right |     hangs or flies, in the upper third
    back    | left | center | right |     stands on the ground, further away
    front   | left | center | right |     stands on the ground, near; may cover the feet of what is behind it

The slots alone decide what is left of, above or in front of what, so the jitter of the drawing does not affect it.
"""

import dataclasses
import itertools
import random
from typing import Any

from fusion_jax.synth.worlds.scenes.lexicon import COLOURS, COLUMNS, NOUNS, NUMBERS, ROWS, SIZES
from fusion_jax.synth.worlds.scenes.settings import SETTINGS, Setting
from fusion_jax.synth.worlds.words import article

MAX_THINGS = 6
MAX_OF_A_KIND = 3
MAX_TEXT_WORDS = 12
VERSION = 1


@dataclasses.dataclass(frozen=True)
class Group:
    """Equal things side by side: three small red apples, or one sign with its text.

    Attributes:
      noun: a key of `lexicon.NOUNS`. count: 1 to 3. colour: one of `COLOURS`. size: one of `SIZES`.
      row, column: the slot.
      text: what is written on it (one carrier alone), or "".
    """

    noun: str
    count: int
    colour: str
    size: str
    row: str
    column: str
    text: str = ""

    @property
    def slot(self) -> tuple[str, str]:
        return self.row, self.column

    @property
    def plural(self) -> bool:
        return self.count > 1

    @property
    def words(self) -> str:
        """The bare noun in its number: "apple" or "apples"."""
        return NOUNS[self.noun].plural if self.plural else NOUNS[self.noun].name

    @property
    def full(self) -> str:
        """ "three small red apples", "a red apple"."""
        words = " ".join(word for word in (self.size, self.colour, self.words) if word)
        return f"{NUMBERS[self.count]} {words}" if self.plural else article(words)


@dataclasses.dataclass(frozen=True)
class Scene:
    """A setting (a key of `lexicon.SETTINGS`) and its groups, row by row from the top, left to right."""

    setting: str
    groups: tuple[Group, ...]

    @property
    def place(self) -> Setting:
        return SETTINGS[self.setting]

    @property
    def texts(self) -> tuple[Group, ...]:
        return tuple(group for group in self.groups if group.text)

    @property
    def colours(self) -> tuple[str, ...]:
        """Each colour once, in the order of the groups."""
        return tuple(dict.fromkeys(group.colour for group in self.groups))

    def count(self, noun: str, colour: str | None = None) -> int:
        return sum(g.count for g in self.groups if g.noun == noun and colour in (None, g.colour))


def scene(setting: str, groups: list[Group] | tuple[Group, ...]) -> Scene:
    """Makes a scene with its groups in order; raises ValueError where it breaks a rule."""
    ordered = sorted(groups, key=lambda g: (ROWS.index(g.row), COLUMNS.index(g.column)))
    result = Scene(setting, tuple(ordered))
    if problem := fault(result):
        raise ValueError(problem)
    return result


def fault(scene: Scene) -> str:
    """The first rule that a scene breaks, or "" where it keeps all."""
    if scene.setting not in SETTINGS:
        return f"{scene.setting!r} is not a setting"
    if not scene.groups:
        return "a scene shows at least one thing"
    for g in scene.groups:
        if g.noun not in NOUNS or g.colour not in COLOURS or g.size not in SIZES:
            return f"a {g.size} {g.colour} {g.noun} cannot be drawn"
        if g.row not in ROWS or g.column not in COLUMNS or (g.row == "air") != NOUNS[g.noun].air:
            return f"{g.noun} cannot be in the {g.row} row"
        if g.count < 1 or (g.text and (g.count > 1 or not NOUNS[g.noun].carrier)):
            return f"{g.count} {g.noun} cannot carry the text {g.text!r}"
        if len(g.text.split()) > MAX_TEXT_WORDS:
            return f"a text of {len(g.text.split())} words, more than {MAX_TEXT_WORDS}"
        if scene.count(g.noun) > MAX_OF_A_KIND:
            return f"{scene.count(g.noun)} {NOUNS[g.noun].plural}, more than {MAX_OF_A_KIND}"
    if sum(g.count for g in scene.groups) > MAX_THINGS:
        return f"more than {MAX_THINGS} things"
    if len({g.slot for g in scene.groups}) < len(scene.groups):
        return "two groups in one slot"
    if len({(g.noun, g.colour) for g in scene.groups}) < len(scene.groups):
        return "two groups of the same noun and colour"
    return ""


def to_json(scene: Scene) -> dict[str, Any]:
    """The scene as JSON objects, which are the state of a sample."""
    return {"version": VERSION, "setting": scene.setting, "groups": [dataclasses.asdict(g) for g in scene.groups]}


def from_json(state: Any) -> Scene:
    """The inverse of `to_json`; raises ValueError for anything else."""
    try:
        if state["version"] != VERSION:
            raise ValueError(f"the scene graph has version {state['version']}, this program reads {VERSION}")
        return scene(state["setting"], [Group(**group) for group in state["groups"]])
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a scene graph: {error}") from None


# Relations between two groups by their words, each with its opposite.
OPPOSITES = {"left of": "right of", "above": "below", "in front of": "behind"}
OPPOSITES |= {second: first for first, second in OPPOSITES.items()}


def holds(relation: str, a: Group, b: Group) -> bool:
    """Whether a is left of, right of, above, below, in front of or behind b.

    Left and right need different columns. Above and below need the same column, with one in the air and one on the
    ground. In front of and behind apply to things on the ground.
    """
    across = COLUMNS.index(a.column) - COLUMNS.index(b.column)
    if relation == "left of":
        return across < 0
    if relation == "right of":
        return across > 0
    if relation == "above":
        return a.row == "air" and b.row != "air" and across == 0
    if relation == "in front of":
        return a.row == "front" and b.row == "back"
    if relation in ("below", "behind"):
        return holds(OPPOSITES[relation], b, a)
    raise ValueError(f"{relation!r} is not a relation")


def relations(scene: Scene) -> list[tuple[Group, str, Group]]:
    """All relations that hold between groups, for each pair in both directions."""
    pairs = itertools.permutations(scene.groups, 2)
    return [(a, relation, b) for a, b in pairs for relation in OPPOSITES if holds(relation, a, b)]


def names(scene: Scene, group: Group) -> tuple[str, ...]:
    """The definite names that fit this group alone: "the apple", "the red apples"."""
    fitting = []
    same = [g for g in scene.groups if g.noun == group.noun]
    if len(same) == 1:
        fitting.append(f"the {group.words}")
    fitting.append(f"the {group.colour} {group.words}")
    return tuple(fitting)


def absent_nouns(scene: Scene) -> list[str]:
    """Nouns that are nowhere in the picture, not even in the backdrop, in the lexicon's order."""
    there = {group.noun for group in scene.groups} | set(scene.place.shows)
    return [noun for noun in NOUNS if noun not in there]


def generator(*key: object) -> random.Random:
    """A random generator seeded by its arguments alone: the same in every process, on every machine."""
    return random.Random("/".join(map(str, key)))
