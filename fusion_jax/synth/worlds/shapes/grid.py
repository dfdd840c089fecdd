"""Chooses plain shapes on a grid at random as the content of a picture, and draws them.

A grid has nine cells. Each cell holds at most one thing; a written word takes a whole row to itself:

    +-----------+--------+--------------+
    | top left  | top    | top right    |      (0) (1) (2)
    +-----------+--------+--------------+
    | left      | center | right        |      (3) (4) (5)
    +-----------+--------+--------------+
    | bottom left | bottom | bottom right |    (6) (7) (8)
    +-------------+--------+--------------+

For each colour one of the six shapes is held out: those pairs (`HELD_OUT`) never occur in a training grid, and every
held-out grid has at least one of them. A model that does well there has learned colours and shapes, not a list of the
things that it saw.
"""

import dataclasses
import functools
import math
import random

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = ("small", "large")
CELLS = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
ROWS = ("top", "middle", "bottom")
WORDS = ("UP", "CAT", "SUN", "BOX", "FISH", "TREE")
SPLITS = ("train", "held_out")

# Colours are distinct at 48 pixels on any of the grey backgrounds, so there is orange without brown, and blue without
# cyan.
RGB = {
    "red": (214, 24, 30),
    "orange": (255, 138, 0),
    "yellow": (250, 224, 20),
    "green": (22, 150, 52),
    "blue": (24, 74, 222),
    "purple": (124, 30, 168),
    "pink": (255, 128, 200),
    "white": (250, 250, 250),
}
COLOURS = tuple(RGB)

# Backgrounds are neutral or faintly tinted, and darker than white so that yellow stands out. They are around 127, which
# is 0 after normalisation: a model that starts from random weights then sees the things first.
BACKGROUNDS = ((126, 126, 126), (118, 120, 128), (132, 126, 118), (118, 128, 130), (128, 120, 130), (120, 130, 118))

# Outlines and writing are black; no question asks about black, so the writing is never a "black thing". The outline has
# one colour for things of all colours, so that a shape is the same pattern in all eight: without it a small encoder
# learns colours long before shapes and sizes.
INK = (16, 16, 18)
OUTLINE = 0.2  # width as a share of the radius

PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
# One shape per colour, cycling through the shapes: each colour loses one shape, and each shape one or two colours.
HELD_OUT = frozenset((colour, SHAPES[c % len(SHAPES)]) for c, colour in enumerate(COLOURS))
SEEN = tuple(pair for pair in PAIRS if pair not in HELD_OUT)
UNSEEN = tuple(pair for pair in PAIRS if pair in HELD_OUT)

WORD_SHARE = 0.35
COUNT_WEIGHTS = (0.60, 0.25, 0.10, 0.05)  # grids with one, two, three and four things

# Radius of a thing as a share of its cell's side.
RADIUS = {"small": 0.32, "large": 0.48}
SUPERSAMPLE = 3


@dataclasses.dataclass(frozen=True)
class Thing:
    """One object. `cell` counts the grid row by row from the top left, 0 to 8."""

    shape: str
    colour: str
    size: str
    cell: int

    @property
    def place(self) -> str:
        return CELLS[self.cell]

    @property
    def pair(self) -> tuple[str, str]:
        return self.colour, self.shape


@dataclasses.dataclass(frozen=True)
class Word:
    """A written word and the grid row (0 top, 2 bottom) that it fills."""

    text: str
    row: int


@dataclasses.dataclass(frozen=True)
class Grid:
    """What a picture shows: its things in reading order, the written word or None, an index into `BACKGROUNDS`."""

    things: tuple[Thing, ...]
    word: Word | None
    background: int


def random_grid(rng: random.Random, split: str = "train") -> Grid:
    """Makes a grid of one to four things; colours, shapes or both are often repeated, so counts up to four occur.

    Args:
      rng: the source of every choice.
      split: "train" keeps to the pairs of `SEEN`; "held_out" has at least one thing from `UNSEEN`.
    """
    if split not in SPLITS:
        raise ValueError(f"{split!r} is not a split; the splits are {', '.join(SPLITS)}")
    word = Word(rng.choice(WORDS), rng.randrange(3)) if rng.random() < WORD_SHARE else None
    free = [cell for cell in range(9) if word is None or cell // 3 != word.row]
    count = rng.choices((1, 2, 3, 4), COUNT_WEIGHTS)[0]
    cells = sorted(rng.sample(free, count))

    allowed = SEEN if split == "train" else PAIRS
    first = rng.choice(SEEN if split == "train" else UNSEEN)
    repeat = rng.choices(("pair", "shape", "colour", "none"), (0.2, 0.25, 0.2, 0.35))[0]
    if repeat == "pair":
        pool = (first,)
    elif repeat == "shape":
        pool = tuple(pair for pair in allowed if pair[1] == first[1])
    elif repeat == "colour":
        pool = tuple(pair for pair in allowed if pair[0] == first[0])
    else:
        pool = allowed
    pairs = [first] + [rng.choice(pool) for _ in range(count - 1)]
    rng.shuffle(pairs)
    things = tuple(Thing(shape, colour, rng.choice(SIZES), cell) for (colour, shape), cell in zip(pairs, cells))
    return Grid(things, word, rng.randrange(len(BACKGROUNDS)))


def draw(grid: Grid, pixels: int, rng: random.Random) -> Image.Image:
    """Draws the grid as a square RGB picture; place, size, tilt and shade of each thing vary a little.

    The jitter never moves a thing out of its cell, and never makes a small thing almost as large as a large one.
    """
    side = pixels * SUPERSAMPLE
    cell = side / 3
    image = _background(BACKGROUNDS[grid.background], side, rng)
    pen = ImageDraw.Draw(image)
    for thing in grid.things:
        radius = cell * RADIUS[thing.size] * rng.uniform(0.92, 1.04)
        slack = min(0.07 * cell, max(0.0, cell / 2 - radius))
        row, column = divmod(thing.cell, 3)
        x = (column + 0.5) * cell + rng.uniform(-slack, slack)
        y = (row + 0.5) * cell + rng.uniform(-slack, slack)
        shade = rng.uniform(0.9, 1.08)
        colour = tuple(min(255, round(channel * shade)) for channel in RGB[thing.colour])
        _draw_shape(pen, thing.shape, x, y, radius, rng.uniform(-0.1, 0.1), colour)
    if grid.word is not None:
        _draw_word(pen, grid.word, side, rng)
    return image.reduce(SUPERSAMPLE)


def _background(colour: tuple[int, int, int], side: int, rng: random.Random) -> Image.Image:
    """Draws a greyish colour with soft lighter and darker patches: 3 x 3 random shades, enlarged smoothly."""
    light = rng.uniform(-6, 6)
    patches = np.array([[light + rng.uniform(-7, 7) for _ in range(3)] for _ in range(3)])
    shades = np.clip(np.array(colour) + patches[..., None], 0, 255).astype(np.uint8)
    return Image.fromarray(shades).resize((side, side), Image.Resampling.BILINEAR)


def _outline(shape: str) -> list[tuple[float, float]]:
    """Corners of a shape inside the unit circle, y pointing down."""
    if shape == "square":
        return [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]
    if shape == "triangle":
        return [(0.0, -0.92), (0.98, 0.8), (-0.98, 0.8)]
    if shape == "star":
        reach = [1.04 if point % 2 == 0 else 0.42 for point in range(10)]
        return [(r * math.sin(k * math.pi / 5), -r * math.cos(k * math.pi / 5)) for k, r in enumerate(reach)]
    if shape == "cross":
        a, b = 0.29, 0.96
        return [
            (-a, -b),
            (a, -b),
            (a, -a),
            (b, -a),
            (b, a),
            (a, a),
            (a, b),
            (-a, b),
            (-a, a),
            (-b, a),
            (-b, -a),
            (-a, -a),
        ]
    raise ValueError(f"{shape} has no corners")


def _draw_shape(pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, tilt: float, colour) -> None:
    line = round(radius * OUTLINE)
    if shape in ("circle", "ring"):
        r = radius * 0.92
        pen.ellipse((x - r, y - r, x + r, y + r), fill=colour, outline=INK, width=line)
        if shape == "ring":
            r *= 0.42
            pen.ellipse((x - r, y - r, x + r, y + r), fill=INK)
        return
    cos, sin = math.cos(tilt) * radius, math.sin(tilt) * radius
    corners = [(x + u * cos - v * sin, y + u * sin + v * cos) for u, v in _outline(shape)]
    pen.polygon(corners, fill=colour)
    pen.line([*corners, *corners[:2]], fill=INK, width=line, joint="curve")


@functools.lru_cache(maxsize=32)
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font, cached because reading it takes longer than drawing a grid."""
    return ImageFont.load_default(size=size)


def _draw_word(pen: ImageDraw.ImageDraw, word: Word, side: int, rng: random.Random) -> None:
    size = round(side * rng.choice((0.30, 0.32, 0.34)))
    stroke = max(1, round(size * 0.03))
    x0, y0, x1, y1 = pen.textbbox((0, 0), word.text, font=_font(size), stroke_width=stroke)
    room_x, room_y = max(0.0, 0.96 * side - (x1 - x0)), max(0.0, 0.96 * side / 3 - (y1 - y0))
    x = (side - (x1 - x0)) / 2 + rng.uniform(-0.3, 0.3) * room_x
    y = word.row * side / 3 + (side / 3 - (y1 - y0)) / 2 + rng.uniform(-0.3, 0.3) * room_y
    pen.text((x - x0, y - y0), word.text, fill=INK, font=_font(size), stroke_width=stroke)
