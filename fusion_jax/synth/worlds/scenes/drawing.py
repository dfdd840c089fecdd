"""Draws a scene graph: backdrop, supports, soft shadows, things from back to front, writing.

`layout.py` decides where things are and how large. The seed moves, flips and resizes things a little and chooses the
details of the backdrop; it never changes what is true of the scene.
"""

import functools
import importlib.util
import pathlib
import random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from fusion_jax.synth.worlds.scenes import graph
from fusion_jax.synth.worlds.scenes.art import PANELS, master
from fusion_jax.synth.worlds.scenes.backdrop import backdrop
from fusion_jax.synth.worlds.scenes.graph import Group, Scene
from fusion_jax.synth.worlds.scenes.layout import Box, layout
from fusion_jax.synth.worlds.scenes.lexicon import RGB
from fusion_jax.synth.worlds.scenes.sculpt import DARK_WOOD, Master

MIRRORED = ("mug", "teapot", "car", "bus", "duck", "snail", "bird", "airplane", "cat", "tent", "chair", "house")
HANGING = ("banner", "lantern")
CORD, STRING = (70, 62, 56), (236, 236, 230)
SWAYING = {"balloon": 8, "kite": 25, "bird": 12, "butterfly": 25, "airplane": 10, "ball": 180}  # degrees


def draw(scene: Scene, size: tuple[int, int] = (384, 384), seed: int = 0) -> Image.Image:
    """Draws the picture of a scene, RGB of `size` (width, height)."""
    canvas = np.stack(stage(scene, size, seed).split())
    for index, placed in enumerate(layout(scene, size, seed)):
        group = scene.groups[placed.group]
        own = graph.generator(seed, "thing", placed.group)
        each = graph.generator(seed, "each", index)
        if group.row != "air":
            _shadow(canvas, placed.box)
        _stamp(canvas, group, master(group.noun, placed.variant), placed.box, own, each)
    return _as_image(canvas)


def stage(scene: Scene, size: tuple[int, int], seed: int) -> Image.Image:
    """Draws the picture without its things: the backdrop, and the ropes and poles of things that hang or are held."""
    rng = graph.generator(seed, "backdrop")
    horizon = rng.uniform(0.5, 0.56)
    image = backdrop(scene.setting, size, horizon, rng)
    boxes: dict[int, list[Box]] = {}
    for placed in layout(scene, size, seed):
        boxes.setdefault(placed.group, []).append(placed.box)
    pen, wide = ImageDraw.Draw(image), max(1, round(size[1] / 190))
    for number, held in boxes.items():
        noun = scene.groups[number].noun
        if noun in HANGING and scene.place.sky:
            _between_poles(pen, held, size, round(size[1] * (horizon + 0.06)), wide)
        elif noun in HANGING:  # from a ceiling or a branch above the picture
            for x, y in (hook for box in held for hook in _hooks(noun, box)):
                pen.line((x, 0, x, y), fill=CORD, width=wide)
        elif noun == "kite":  # someone outside the picture holds it
            for left, top, right, bottom in held:
                side = 0 if (left + right) / 2 < size[0] / 2 else size[0]
                pen.line(((left + right) // 2, (top + bottom) // 2, side, round(0.62 * size[1])), fill=STRING, width=1)
    return image


def _hooks(noun: str, box: Box) -> list[tuple[int, int]]:
    """The points where a hanging thing is fastened: a banner at both ends, a lantern in the middle."""
    left, top, right, _ = box
    ends = (left + round(0.03 * (right - left)), right - round(0.03 * (right - left)))
    return [(x, top + 2) for x in (ends if noun == "banner" else ((left + right) // 2,))]


def _between_poles(pen: ImageDraw.ImageDraw, boxes: list[Box], size: tuple[int, int], foot: int, wide: int) -> None:
    """Draws a rope between two poles in the background, on which things hang under the open sky."""
    tops = min(box[1] for box in boxes)
    rope = max(1, tops - round(0.02 * size[1]))
    ends = (max(wide, boxes[0][0] - 2 * wide), min(size[0] - wide, boxes[-1][2] + 2 * wide))
    for x in ends:
        pen.line((x, max(0, rope - 2 * wide), x, foot), fill=DARK_WOOD, width=2 * wide)
    pen.line((ends[0], rope, ends[1], rope), fill=CORD, width=wide)
    for box in boxes:
        for x, y in _hooks("banner" if box[2] - box[0] > 1.5 * (box[3] - box[1]) else "lantern", box):
            pen.line((x, rope, x, y), fill=CORD, width=wide)


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
    """Draws a soft shadow on the ground, to the lower right, as the light comes from the upper left."""
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
    # Matplotlib contains DejaVu (a free licence); importing it would be slow.
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
    """Widths of the words and of a space, as multiples of the font size."""
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
