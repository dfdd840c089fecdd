"""Draws a scene graph: backdrop, soft shadows, things from back to front, writing.

The three rows are bands of the picture, the columns divide their width:

    +-----------------------------+
    |  air                        |   things hang between 0.03 and 0.31 of the height
    |-----------------------------|
    |  back      horizon at ~0.52 |   feet at ~0.68
    |  front                      |   feet at ~0.94; covers at most the lower quarter of what is behind
    +-----------------------------+

Equal things of a group stand side by side and never overlap each other. The seed moves, flips and resizes things a
little and chooses the backdrop's details; it never changes what is true of the scene.
"""

import dataclasses
import functools
import importlib.util
import pathlib
import random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from fusion_jax.synth.scene import graph
from fusion_jax.synth.scene.art import PANELS, VARIANTS, master
from fusion_jax.synth.scene.backdrop import backdrop
from fusion_jax.synth.scene.graph import Group, Scene
from fusion_jax.synth.scene.lexicon import NOUNS, RGB
from fusion_jax.synth.scene.sculpt import Master

SIZE_FACTOR = {"small": 0.68, "": 0.86, "large": 1.04}
WRITTEN_FACTOR = {"small": 0.88, "": 0.96, "large": 1.04}  # what is written must be legible
MIRRORED = ("mug", "teapot", "car", "bus", "duck", "snail", "bird", "airplane", "cat", "tent", "chair", "house")
SWAYING = {"balloon": 8, "kite": 25, "bird": 12, "butterfly": 25, "airplane": 10, "ball": 180}  # degrees


@dataclasses.dataclass(frozen=True)
class Placed:
    """One thing in the picture: its group's number, and its box in pixels (left, top, right, bottom)."""

    group: int
    box: tuple[int, int, int, int]


def layout(scene: Scene, size: tuple[int, int], seed: int) -> list[Placed]:
    """Where every single thing is drawn, from back to front."""
    width, height = size
    bands = _bands(scene)
    placed = []
    for row in ("back", "air", "front"):
        numbered = [(i, g) for i, g in enumerate(scene.groups) if g.row == row]
        spans = _spans([g.column for _, g in numbered])
        for (number, group), (left, right) in zip(numbered, spans):
            rng = graph.generator(seed, "layout", number)
            left, right, top, bottom = left * width, right * width, bands[row][0] * height, bands[row][1] * height
            if row == "front":
                top = max([top, *(_reach(scene, p) for p in placed if p.box[0] < right and p.box[2] > left)])
            placed += _side_by_side(number, group, left, right, top, bottom, rng)
    return placed


def _reach(scene: Scene, behind: Placed) -> float:
    """How far up a thing in front may reach: over the lower quarter of what is behind, never over its writing."""
    group, (_, top, _, bottom) = scene.groups[behind.group], behind.box
    share = PANELS[group.noun][1] * 0.9 if group.text else 0.22
    return bottom - share * (bottom - top) if group.row == "back" else 0.0


def _bands(scene: Scene) -> dict[str, tuple[float, float]]:
    """Top and bottom of each row as shares of the height; where a row is empty the others may grow."""
    rows = {group.row for group in scene.groups}
    back_top = 0.33 if "air" in rows else 0.16
    front_top = 0.6 if "back" in rows else (0.4 if "air" in rows else 0.28)
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


def _side_by_side(number: int, group: Group, left, right, top, bottom, rng: random.Random) -> list[Placed]:
    noun = NOUNS[group.noun]
    variant = _variant(group, rng)
    aspect = master(group.noun, variant).aspect
    room, gap = right - left, 1.14
    high = (
        (bottom - top)
        * noun.height
        * (WRITTEN_FACTOR if group.text else SIZE_FACTOR)[group.size]
        * rng.uniform(0.93, 1.0)
    )
    high = min(high, room / (aspect * (group.count * gap - (gap - 1))))
    wide = high * aspect
    span = wide * (1 + gap * (group.count - 1))
    # Free to move within the span's column, less so where others are near.
    start = left + (room - span) * rng.uniform(0.3, 0.7)
    placed = []
    for k in range(group.count):
        x = start + k * wide * gap
        if group.row == "air":
            y = top + (bottom - top - high) * rng.uniform(0.15, 0.85)
        else:
            y = bottom - high * rng.uniform(0.97, 1.0)
        placed.append(Placed(number, (round(x), round(y), round(x + wide), round(y + high))))
    return placed


def _variant(group: Group, rng: random.Random) -> int:
    return rng.randrange(VARIANTS)


def draw(scene: Scene, size: tuple[int, int] = (384, 384), seed: int = 0) -> Image.Image:
    """The picture of a scene, RGB of `size` (width, height)."""
    rng = graph.generator(seed, "backdrop")
    horizon = rng.uniform(0.5, 0.56)
    image = backdrop(scene.setting, size, horizon, rng)
    canvas = np.stack(image.split())
    for index, placed in enumerate(layout(scene, size, seed)):
        group = scene.groups[placed.group]
        own = graph.generator(seed, "thing", placed.group)
        variant = _variant(group, graph.generator(seed, "layout", placed.group))
        each = graph.generator(seed, "each", index)
        if group.row != "air":
            _shadow(canvas, placed.box)
        _stamp(canvas, group, master(group.noun, variant), placed.box, own, each)
    return _as_image(canvas)


def _as_image(planes: np.ndarray) -> Image.Image:
    return Image.merge("RGB", [Image.fromarray(plane) for plane in planes])


def _stamp(canvas: np.ndarray, group: Group, model: Master, box, own: random.Random, each: random.Random) -> None:
    """Puts one thing onto the canvas (3, height, width) uint8, in place."""
    left, top, right, bottom = box
    size = (max(2, right - left), max(2, bottom - top))
    paint, coverage = _resized(model.paint, size), _resized(model.coverage, size)
    light = own.uniform(0.94, 1.05)
    colour = [min(255.0, max(0.0, channel * light + own.uniform(-5, 5))) for channel in RGB[group.colour]]
    flip = group.noun in MIRRORED and own.random() < 0.5 and not group.text
    if flip:
        paint, coverage = (i.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for i in (paint, coverage))
    if group.noun in SWAYING:
        tilt = each.uniform(-1, 1) * SWAYING[group.noun] * 0.6
        paint, coverage = (i.rotate(tilt, Image.Resampling.BICUBIC) for i in (paint, coverage))
    *fixed, tint = paint.split()
    rgb = np.stack(fixed) + np.asarray(tint) * (np.array(colour, np.float32) / 255)[:, None, None]
    keep = 1 - np.asarray(coverage, np.float32) / 255
    if group.text:
        face = _as_image(_bytes(rgb))
        _write(face, group)
        rgb = np.stack(face.split()).astype(np.float32)
    height, width = canvas.shape[1:]
    y0, x0, y1, x1 = max(0, top), max(0, left), min(height, top + size[1]), min(width, left + size[0])
    part = np.s_[..., y0 - top : y1 - top, x0 - left : x1 - left]
    region = canvas[:, y0:y1, x0:x1]
    region[:] = _bytes(region * keep[part] + rgb[part])


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.minimum(values + 0.5, 255).astype(np.uint8)


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)


@functools.lru_cache(maxsize=1)
def _soft_disc() -> Image.Image:
    disc = Image.new("L", (128, 64))
    ImageDraw.Draw(disc).ellipse((14, 10, 114, 54), fill=150)
    return disc.filter(ImageFilter.GaussianBlur(7))


def _shadow(canvas: np.ndarray, box: tuple[int, int, int, int]) -> None:
    """A soft shadow on the ground, to the lower right as the light comes from the upper left."""
    left, _top, right, bottom = box
    wide = right - left
    disc = _soft_disc().resize((max(4, round(wide * 1.25)), max(3, round(wide * 0.3))), Image.Resampling.BILINEAR)
    x, y = left - round(wide * 0.06), bottom - round(disc.height * 0.56)
    height, width = canvas.shape[1:]
    y0, x0, y1, x1 = max(0, y), max(0, x), min(height, y + disc.height), min(width, x + disc.width)
    if y1 <= y0 or x1 <= x0:
        return
    dark = np.asarray(disc, np.float32)[y0 - y : y1 - y, x0 - x : x1 - x] / 255
    region = canvas[:, y0:y1, x0:x1]
    region[:] = (region * (1 - dark)).astype(np.uint8)


FONTS = ("DejaVuSans-Bold.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSans.ttf", "DejaVuSansMono-Bold.ttf")


@functools.lru_cache(maxsize=1)
def _font_folder() -> pathlib.Path:
    # Matplotlib brings DejaVu (a free licence); found without importing it, which takes long.
    (folder,) = importlib.util.find_spec("matplotlib").submodule_search_locations
    return pathlib.Path(folder) / "mpl-data" / "fonts" / "ttf"


@functools.lru_cache(maxsize=128)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(_font_folder() / name), size)


def _write(face: Image.Image, group: Group) -> None:
    """Writes the group's text as large as its panel allows, dark on light or light on dark."""
    x0, low, x1, top = PANELS[group.noun]
    wide, high = (x1 - x0) * face.width, (top - low) * face.height
    font_name = FONTS[graph.generator(group.text, group.noun).randrange(len(FONTS))]
    lines, font = _fitted(group.text, font_name, wide * 0.94, high * 0.94)
    r, g, b = RGB[group.colour]
    ink = (24, 22, 26) if 0.3 * r + 0.59 * g + 0.11 * b > 120 else (252, 250, 244)
    pen = ImageDraw.Draw(face)
    step = font.size * 1.14
    y = (1 - top) * face.height + (high - step * len(lines)) / 2 + step / 2
    for line in lines:
        pen.text((x0 * face.width + wide / 2, y), line, fill=ink, font=font, anchor="mm")
        y += step


@functools.lru_cache(maxsize=512)
def _widths(text: str, font_name: str) -> tuple[float, ...]:
    """Widths of the words and of a space, in font sizes."""
    font = _font(font_name, 64)
    return tuple(font.getlength(word) / 64 for word in (*text.split(), " "))


def _fitted(text: str, font_name: str, wide: float, high: float) -> tuple[list[str], ImageFont.FreeTypeFont]:
    """The lines and the font with which a text fills a panel."""
    words, (*widths, space) = text.split(), _widths(text, font_name)
    best, best_lines = 0.0, words
    for count in range(1, len(words) + 1):
        lines, lengths = _broken(words, widths, space, count)
        size = min(wide / max(lengths), high / (1.14 * len(lines)), 0.62 * high)
        if size > best:
            best, best_lines = size, lines
    return best_lines, _font(font_name, max(5, int(best)))


def _broken(words: list[str], widths: list[float], space: float, count: int) -> tuple[list[str], list[float]]:
    """Breaks words into at most `count` lines of about equal length."""
    goal = (sum(widths) + space * (len(words) - 1)) / count
    lines, lengths = [words[0]], [widths[0]]
    for word, width in zip(words[1:], widths[1:]):
        longer = lengths[-1] + space + width
        if len(lines) < count and longer - goal > goal - lengths[-1]:
            lines.append(word)
            lengths.append(width)
        else:
            lines[-1] += f" {word}"
            lengths[-1] = longer
    return lines, lengths
