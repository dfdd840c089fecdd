"""Places the things of a scene in the picture and chooses their sizes.

The three rows are bands of the picture, and the columns divide their width:

    +-----------------------------+
    |  air                        |   things hang or fly between 0.03 and 0.31 of the height
    |-----------------------------|
    |  back      horizon at ~0.52 |   feet at ~0.68
    |  front                      |   feet at ~0.94; covers at most the lower quarter of what is behind
    +-----------------------------+

Sizes follow the heights in `lexicon.py`, those of near things enlarged:

    pixels of a thing  =  scale * (metres * size * nearness) ** power

The scale is as large as the narrowest slot allows, and smaller for a picture of only small things, which would
otherwise look like giants before their backdrop. At power 1 a mug beside a bus would be a dot, so the power is the
largest of `POWERS` at which everything can be seen. At any power, higher things are drawn higher. Equal things of a
group are drawn side by side and never overlap each other.
"""

import dataclasses
import functools
import random

from fusion_jax.synth.worlds.scenes import graph
from fusion_jax.synth.worlds.scenes.art import PANELS, VARIANTS, master
from fusion_jax.synth.worlds.scenes.graph import Group, Scene
from fusion_jax.synth.worlds.scenes.lexicon import NOUNS

SIZES = {"small": 0.75, "": 1.0, "large": 1.35}  # times the ordinary height
NEARNESS = {"back": 1.0, "front": 1.3, "air": 1.0}
POWERS = (0.6, 0.5, 0.42, 0.35, 0.28, 0.2, 0.12)
SEEN, LEGIBLE = 0.075, 0.13  # least height of a thing, and of one with a text on it, as shares of the picture
CLEARLY = 1.5  # ratio of heights from which on the difference is visible in every picture
GAP = 1.14  # from one thing of a group to the next, in widths

Box = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class Placed:
    """One thing in the picture: its group's number, its box in pixels (left, top, right, bottom), and the number of
    the noun's model."""

    group: int
    box: Box
    variant: int


@dataclasses.dataclass(frozen=True)
class _Slot:
    """The space for one group in pixels. `most`: height at which the group fills it; `least`: visible height."""

    group: Group
    variant: int
    aspect: float
    left: float
    top: float
    right: float
    bottom: float
    most: float
    least: float


def metres(group: Group) -> float:
    """The height of a thing of the group in metres: an ordinary, small or large one of its kind."""
    return NOUNS[group.noun].metres * SIZES[group.size]


@functools.lru_cache(maxsize=4)  # used for the stage and for the things on it
def layout(scene: Scene, size: tuple[int, int], seed: int) -> tuple[Placed, ...]:
    """The place of every single thing, from back to front."""
    slots = _slots(scene, size, seed)
    high = _heights(scene, slots)
    placed = []
    for row in ("back", "air", "front"):
        for number, slot in enumerate(slots):
            if slot.group.row == row:
                placed += _side_by_side(number, slot, high[number], graph.generator(seed, "layout", number))
    return tuple(placed)


def _apparent(group: Group) -> float:
    return metres(group) * NEARNESS[group.row]


def _heights(scene: Scene, slots: list[_Slot]) -> list[float]:
    """The height of each group's things in pixels."""
    low, high = scene.place.metres
    typical = (low * high) ** 0.5 * 2
    largest = max(metres(slot.group) for slot in slots)
    fill = min(1.0, max(0.5, (largest / typical) ** 0.3))
    heights: list[float] = []
    for power in POWERS:
        scale = min(slot.most / _apparent(slot.group) ** power for slot in slots) * fill
        heights = [scale * _apparent(slot.group) ** power for slot in slots]
        if all(high >= min(slot.least, 0.9 * slot.most * fill) for high, slot in zip(heights, slots)):
            return heights
    # Something would still be too small to see, so it is enlarged, but stays lower than clearly higher things.
    order = sorted(range(len(slots)), key=lambda i: -_apparent(slots[i].group))
    for k, i in enumerate(order):
        above = [heights[j] for j in order[:k] if _apparent(slots[j].group) > CLEARLY * _apparent(slots[i].group)]
        heights[i] = min(max(heights[i], slots[i].least), slots[i].most, *(high * 0.93 for high in above))
    return heights


def _slots(scene: Scene, size: tuple[int, int], seed: int) -> list[_Slot]:
    """The space for each group, in the scene's order."""
    width, height = size
    bands = _bands(scene)
    spans: dict[int, tuple[float, float]] = {}
    for row in bands:
        numbered = [(i, g) for i, g in enumerate(scene.groups) if g.row == row]
        spans |= dict(zip((i for i, _ in numbered), _spans([g.column for _, g in numbered])))
    behind = [(spans[i], g) for i, g in enumerate(scene.groups) if g.row == "back"]
    slots = []
    for number, group in enumerate(scene.groups):
        variant = graph.generator(seed, "variant", number).randrange(VARIANTS)
        aspect = master(group.noun, variant).aspect
        left, right = spans[number]
        top, bottom = bands[group.row]
        if group.row == "front" and any(a < right and b > left for (a, b), _ in behind):
            # It may cover the feet of what is behind it, never its writing.
            covers = 0.03 if not any(g.text and PANELS[g.noun][1] < 0.2 for (_, _), g in behind) else 0.01
            top = bands["back"][1] - covers
        room = (right - left) * width
        most = min((bottom - top) * height, room / (aspect * (group.count * GAP - (GAP - 1))))
        least = max((LEGIBLE if group.text else SEEN) * height, 0.045 * width / aspect)
        slots.append(
            _Slot(
                group, variant, aspect, left * width, top * height, right * width, bottom * height, most * 0.97, least
            )
        )
    return slots


def _bands(scene: Scene) -> dict[str, tuple[float, float]]:
    """Top and bottom of each row as shares of the height; where a row is empty, the others may grow."""
    rows = {group.row for group in scene.groups}
    back_top = 0.33 if "air" in rows else 0.16
    front_top = 0.4 if "air" in rows else 0.28
    air_bottom = 0.31 if "back" in rows else 0.38
    return {"air": (0.03, air_bottom), "back": (back_top, 0.68), "front": (front_top, 0.94)}


def _spans(columns: list[str]) -> list[tuple[float, float]]:
    """The share of the width that each group of a row may fill, symmetrical about its column's middle."""
    if columns == ["center"]:
        return [(0.08, 0.92)]
    middle = "center" in columns
    reach = {"left": (0.015, 0.33 if middle else 0.46), "right": (0.67 if middle else 0.54, 0.985)}
    reach["center"] = (0.345, 0.655)
    return [reach[column] for column in columns]


def _side_by_side(number: int, slot: _Slot, high: float, rng: random.Random) -> list[Placed]:
    high *= rng.uniform(0.985, 1.0)
    wide = high * slot.aspect
    span = wide * (1 + GAP * (slot.group.count - 1))
    # The group may move a little about the column's middle, less where others are near.
    room = slot.right - slot.left - span
    start = slot.left + room / 2 + min(room, 0.35 * (slot.right - slot.left)) * rng.uniform(-0.2, 0.2)
    placed = []
    for k in range(slot.group.count):
        x = start + k * wide * GAP
        if slot.group.row == "air":
            y = slot.top + (slot.bottom - slot.top - high) * rng.uniform(0.15, 0.85)
        else:
            y = slot.bottom - high * rng.uniform(0.99, 1.0)
        placed.append(Placed(number, (round(x), round(y), round(x + wide), round(y + high)), slot.variant))
    return placed
