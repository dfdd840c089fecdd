"""Draws the backdrop of each setting: the ground, and the sky or wall in the background.

A backdrop never resembles a noun that its setting does not list in `Setting.shows`.
"""

import math
import random
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from fusion_jax.synth.worlds.scenes.textures import Colour, gradient, piece, textured


def _vary(colour: Colour, rng: random.Random, by: int = 10) -> Colour:
    light = rng.uniform(-by, by)
    return tuple(round(min(255, max(0, channel + light + rng.uniform(-by / 2, by / 2)))) for channel in colour)


def _fill(image: Image.Image, points: Sequence[tuple[float, float]], colour: Colour) -> None:
    """Draws a polygon with smooth edges; points are shares of the image."""
    w, h = image.size
    xs, ys = zip(*points)
    left, right = max(0, math.floor(min(xs) * w) - 1), min(w, math.ceil(max(xs) * w) + 2)
    top, bottom = max(0, math.floor(min(ys) * h) - 1), min(h, math.ceil(max(ys) * h) + 2)
    if left >= right or top >= bottom:
        return
    mask = Image.new("L", ((right - left) * 2, (bottom - top) * 2))
    ImageDraw.Draw(mask).polygon([((x * w - left) * 2, (y * h - top) * 2) for x, y in points], fill=255)
    image.paste(colour, (left, top), mask.reduce(2))


def _ridge(image: Image.Image, base: float, height: float, bumps: float, colour: Colour, rng: random.Random) -> None:
    """Draws a wavy line of hills, dunes or mountains, filled down to the bottom."""
    a, b, c = (rng.uniform(0, 6.28) for _ in range(3))
    xs = [k / 48 for k in range(49)]
    ys = [
        base
        - height
        * (0.5 + 0.3 * math.sin(bumps * x * 3 + a) + 0.2 * math.sin(bumps * x * 7 + b) + 0.08 * math.sin(19 * x + c))
        for x in xs
    ]
    _fill(image, [(0, 1), *zip(xs, ys), (1, 1)], colour)


def _sky(size, rng, top: Colour, bottom: Colour, clouds: float, zoom: float) -> Image.Image:
    """Draws a sky with soft clouds; `clouds` is how white they are."""
    sky = gradient(size, _vary(top, rng), _vary(bottom, rng))
    if clouds:
        tile = piece("clouds", size, rng, zoom)
        cut = rng.randint(116, 150)
        sky.paste(
            (255, 255, 255), (0, 0), tile.point([round(clouds * min(220, max(0, 2.4 * (k - cut)))) for k in range(256)])
        )
    return sky


def _fade(ground: Image.Image, top: float, bottom: float) -> Image.Image:
    """Adds depth: lighter at the horizon, darker near the viewer."""
    pixels = np.asarray(ground) * np.linspace(top, bottom, ground.height, dtype=np.float32)[:, None, None]
    return Image.fromarray(np.minimum(pixels, 255, out=pixels).astype(np.uint8))


def _pebbles(image: Image.Image, rng: random.Random, shades: Sequence[Colour], count: int) -> None:
    """Draws clutter that no question is about: pebbles, crumbs, petals."""
    w, h = image.size
    pen = ImageDraw.Draw(image, "RGBA")
    for _ in range(count):
        x, y = rng.uniform(0, w), rng.uniform(0.1, 1) * h
        r = (0.4 + y / h) * w * rng.uniform(0.004, 0.009)
        pen.ellipse((x - r, y - r * 0.4, x + r * 1.3, y + r * 0.8), fill=(0, 0, 0, 50))
        pen.ellipse((x - r, y - r * 0.6, x + r, y + r * 0.6), fill=(*rng.choice(shades), 255))


def _tufts(image: Image.Image, rng: random.Random, colour: Colour, count: int) -> None:
    w, h = image.size
    pen = ImageDraw.Draw(image, "RGBA")
    for _ in range(count):
        x, y = rng.uniform(0, w), rng.uniform(0.15, 1) * h
        for _ in range(5):
            reach = w * rng.uniform(0.012, 0.03) * (0.5 + y / h)
            pen.line(
                (x, y, x + rng.uniform(-0.6, 0.6) * reach, y - reach), fill=(*_vary(colour, rng, 24), 255), width=1
            )


GREENS = ((52, 96, 34), (150, 196, 92))


def backdrop(setting: str, size: tuple[int, int], horizon: float, rng: random.Random) -> Image.Image:
    """Draws the empty scene of a setting, RGB; the ground begins at `horizon`, a share of the height."""
    w, h = size
    level = round(h * horizon)
    zoom = h / 384
    back, ground = _PAINTERS[setting](rng, (w, level), (w, h - level), zoom * rng.uniform(0.9, 1.3))
    whole = Image.new("RGB", size)
    whole.paste(back, (0, 0))
    whole.paste(ground, (0, level))
    return whole


def _beach(rng, back, ground, zoom):
    sky = _sky(back, rng, (84, 160, 226), (206, 232, 246), 0.9, zoom)
    depth = round(back[1] * rng.uniform(0.24, 0.36))
    dark, light = _vary((28, 104, 150), rng), _vary((92, 178, 206), rng)
    sky.paste(textured("waves", (back[0], depth), dark, light, rng, zoom), (0, back[1] - depth))
    sand = _fade(
        textured("sand", ground, _vary((186, 156, 104), rng), _vary((246, 226, 178), rng), rng, zoom), 1.04, 0.94
    )
    foam = max(2, ground[1] // 28)
    sand.paste(_vary((250, 250, 246), rng, 3), (0, 0, ground[0], foam // 2))
    _pebbles(sand, rng, ((250, 240, 226), (196, 164, 130), (226, 190, 170)), rng.randint(8, 22))
    return sky, sand


def _meadow(rng, back, ground, zoom):
    sky = _sky(back, rng, (94, 168, 232), (214, 234, 246), 0.9, zoom)
    _ridge(sky, 1.0, rng.uniform(0.25, 0.5), rng.uniform(0.6, 1.4), _vary((128, 176, 120), rng), rng)
    _ridge(sky, 1.04, rng.uniform(0.12, 0.3), rng.uniform(0.8, 1.8), _vary((104, 158, 84), rng), rng)
    grass = _fade(textured("grass", ground, _vary(GREENS[0], rng), _vary(GREENS[1], rng), rng, zoom), 1.08, 0.9)
    _tufts(grass, rng, (84, 140, 52), rng.randint(15, 40))
    return sky, grass


def _snow(rng, back, ground, zoom):
    sky = _sky(back, rng, (150, 186, 220), (226, 236, 244), 0.5, zoom)
    _ridge(sky, 1.0, rng.uniform(0.4, 0.7), rng.uniform(1.2, 2.4), _vary((146, 164, 190), rng), rng)
    _ridge(sky, 1.05, rng.uniform(0.2, 0.35), rng.uniform(0.7, 1.5), _vary((190, 204, 222), rng), rng)
    snow = _fade(textured("snow", ground, _vary((196, 208, 226), rng, 5), (255, 255, 255), rng, zoom), 0.97, 1.0)
    _tufts(snow, rng, (150, 146, 120), rng.randint(2, 8))
    return sky, snow


def _desert(rng, back, ground, zoom):
    sky = _sky(back, rng, (112, 172, 222), (248, 226, 190), 0.25, zoom)
    _ridge(sky, 1.0, rng.uniform(0.3, 0.5), rng.uniform(0.6, 1.2), _vary((214, 158, 98), rng), rng)
    _ridge(sky, 1.06, rng.uniform(0.15, 0.3), rng.uniform(0.8, 1.6), _vary((226, 176, 112), rng), rng)
    sand = _fade(
        textured("sand", ground, _vary((188, 128, 70), rng), _vary((242, 200, 138), rng), rng, zoom), 1.04, 0.92
    )
    _pebbles(sand, rng, ((150, 110, 80), (176, 132, 92)), rng.randint(5, 16))
    return sky, sand


def _forest(rng, back, ground, zoom):
    sky = _sky(back, rng, (150, 190, 170), (214, 230, 200), 0.0, zoom)
    for shade, count, width in (((112, 146, 112), 14, 0.018), ((74, 104, 72), 10, 0.03)):
        for _ in range(count):
            x, lean = rng.uniform(-0.05, 1.05), rng.uniform(-0.02, 0.02)
            _fill(
                sky,
                [(x, 1), (x + width, 1), (x + width * 0.6 + lean, 0), (x + width * 0.2 + lean, 0)],
                _vary(shade, rng),
            )
    _crowns(sky, rng)
    moss = _fade(textured("moss", ground, _vary((50, 66, 30), rng), _vary((128, 142, 76), rng), rng, zoom), 1.06, 0.9)
    _pebbles(moss, rng, ((150, 98, 46), (176, 124, 58), (120, 84, 50)), rng.randint(12, 30))
    _tufts(moss, rng, (84, 112, 48), rng.randint(10, 25))
    return sky, moss


def _crowns(image: Image.Image, rng: random.Random) -> None:
    w, h = image.size
    pen = ImageDraw.Draw(image, "RGBA")
    for _ in range(70):
        x, y, r = rng.uniform(0, w), rng.uniform(-0.1, 0.24) * h, w * rng.uniform(0.03, 0.08)
        pen.ellipse((x - r, y - r * 0.7, x + r, y + r * 0.7), fill=(*_vary((66, 108, 58), rng, 22), 235))


def _street(rng, back, ground, zoom):
    sky = _sky(back, rng, (126, 178, 224), (222, 232, 238), 0.7, zoom)
    w, h = sky.size
    pen, x = ImageDraw.Draw(sky), -10.0
    while x < w:
        width, top = w * rng.uniform(0.09, 0.17), h * rng.uniform(0.12, 0.6)
        wall = _vary(rng.choice(((150, 140, 136), (168, 150, 132), (130, 140, 156), (176, 164, 150))), rng)
        pen.rectangle((x, top, x + width - 1, h), fill=wall)
        pane = tuple(round(c * 0.72 + 30) for c in wall)
        step = w * 0.028
        for i in range(int(width / step) - 1):
            for j in range(int((h - top) / step / 1.2) - 1):
                px, py = x + step * (i + 0.75), top + step * 1.2 * (j + 0.6)
                pen.rectangle(
                    (px, py, px + step * 0.5, py + step * 0.65), fill=pane if rng.random() < 0.85 else (250, 232, 170)
                )
        x += width
    road = _fade(
        textured("asphalt", ground, _vary((84, 86, 92), rng), _vary((146, 148, 152), rng), rng, zoom), 1.05, 0.88
    )
    walk = ground[1] // 9
    paving = textured("paving", (ground[0], walk), (150, 148, 144), (206, 204, 198), rng, zoom)
    road.paste(paving, (0, 0))
    pen, middle = ImageDraw.Draw(road), round(ground[1] * rng.uniform(0.52, 0.6))
    start = rng.uniform(-0.1, 0)
    for k in range(7):
        left = (start + k * 0.18) * w
        pen.rectangle((left, middle, left + 0.1 * w, middle + ground[1] * 0.035), fill=(226, 224, 214))
    return sky, road


def _courtyard(rng, back, ground, zoom):
    # The tile's lightest grey is the mortar.
    wall = textured("bricks", back, _vary((128, 62, 44), rng), _vary((206, 150, 122), rng), rng, zoom)
    floor = textured("paving", ground, _vary((128, 124, 116), rng), _vary((206, 202, 190), rng), rng, zoom)
    _pebbles(floor, rng, ((150, 120, 60), (130, 140, 70)), rng.randint(3, 10))
    return _fade(wall, 0.94, 1.02), _fade(floor, 0.86, 1.02)


def _night(rng, back, ground, zoom):
    sky = _sky(back, rng, (14, 18, 48), (58, 66, 112), 0.0, zoom)
    w, h = sky.size
    pen = ImageDraw.Draw(sky, "RGBA")
    for _ in range(110):
        x, y, r = rng.uniform(0, w), rng.uniform(0, 0.9) * h, w * rng.uniform(0.0006, 0.0028)
        pen.ellipse((x - r, y - r, x + r, y + r), fill=(255, 252, 230, rng.randrange(110, 256)))
    _ridge(sky, 1.03, rng.uniform(0.12, 0.3), rng.uniform(0.7, 1.6), _vary((30, 38, 66), rng, 5), rng)
    grass = textured("grass", ground, _vary((16, 30, 36), rng, 5), _vary((66, 96, 88), rng, 6), rng, zoom)
    return sky, _fade(grass, 1.1, 0.95)


def _table(rng, back, ground, zoom):
    base = rng.choice(((206, 214, 204), (222, 210, 190), (196, 208, 218), (224, 204, 202)))
    wall = textured(
        "plaster", back, _vary(tuple(c - 22 for c in base), rng), _vary(tuple(c + 20 for c in base), rng), rng, zoom
    )
    top = textured("planks", ground, _vary((104, 66, 36), rng), _vary((206, 152, 98), rng), rng, zoom)
    ImageDraw.Draw(top).line((0, 0, ground[0], 0), fill=(84, 54, 30), width=max(1, round(3 * zoom)))
    _pebbles(top, rng, ((226, 190, 130), (240, 214, 166)), rng.randint(0, 10))
    return _fade(wall, 0.92, 1.04), _fade(top, 0.95, 1.05)


def _kitchen(rng, back, ground, zoom):
    tint = rng.choice(((150, 190, 196), (176, 196, 166), (200, 190, 160), (186, 178, 204)))
    tiles = textured("tiles", back, _vary(tint, rng), _vary((244, 244, 238), rng, 4), rng, zoom)
    counter = textured("counter", ground, _vary((168, 160, 150), rng), _vary((226, 220, 210), rng), rng, zoom)
    ImageDraw.Draw(counter).line((0, 0, ground[0], 0), fill=(120, 112, 102), width=max(1, round(4 * zoom)))
    _pebbles(counter, rng, ((206, 180, 140), (190, 150, 110)), rng.randint(0, 8))
    return _fade(tiles, 0.95, 1.03), _fade(counter, 0.94, 1.06)


def _living_room(rng, back, ground, zoom):
    tint = rng.choice(((196, 178, 150), (170, 186, 178), (190, 170, 176), (168, 176, 196)))
    lighter = tuple(min(255, c + 44) for c in tint)
    wall = textured("stripes", back, _vary(tint, rng), _vary(lighter, rng), rng, zoom)
    floor = textured("planks", ground, _vary((122, 84, 52), rng), _vary((206, 160, 112), rng), rng, zoom)
    board = max(3, ground[1] // 14)
    ImageDraw.Draw(floor).rectangle((0, 0, ground[0], board), fill=(236, 230, 220))
    ImageDraw.Draw(floor).line((0, board, ground[0], board), fill=(120, 96, 74), width=max(1, round(2 * zoom)))
    return _fade(wall, 0.94, 1.02), _fade(floor, 0.92, 1.04)


def _library(rng, back, ground, zoom):
    shelves = textured("books", back, _vary((44, 28, 20), rng), _vary((196, 150, 108), rng), rng, zoom)
    tint = rng.choice(((96, 60, 62), (60, 78, 96), (70, 88, 72), (104, 90, 72)))
    lighter = tuple(c + 64 for c in tint)
    carpet = textured("carpet", ground, _vary(tint, rng), _vary(lighter, rng), rng, zoom)
    return _fade(shelves, 0.8, 0.95), _fade(carpet, 0.95, 1.02)


_PAINTERS = {
    "beach": _beach,
    "meadow": _meadow,
    "snow": _snow,
    "desert": _desert,
    "forest": _forest,
    "street": _street,
    "courtyard": _courtyard,
    "night": _night,
    "table": _table,
    "kitchen": _kitchen,
    "living room": _living_room,
    "library": _library,
}
