"""Makes the textures of backdrops from grey tiles of grass, bricks, clouds and the like.

A tile has 512 x 512 pixels, and is made once per process and cached (0.25 MB).
"""

import functools
import math
import random
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage

TILE = 512
Colour = tuple[int, int, int]


def _noise(seed: int, *scales: float) -> np.ndarray:
    """(TILE, TILE) float32 around 0, standard deviation 1: smooth noise of several scales (pixels), seamless."""
    source = np.random.default_rng(seed)
    total = np.zeros((TILE, TILE), np.float32)
    for scale in scales:
        layer = ndimage.gaussian_filter(source.standard_normal((TILE, TILE)).astype(np.float32), scale, mode="wrap")
        total += layer / layer.std()
    return total / total.std()


def _strokes(seed: int, count: int, length: tuple[int, int], lean: float, flat: bool = False) -> np.ndarray:
    """Short strokes in all shades, vertical or, if `flat`, horizontal."""
    rng = random.Random(seed)
    image = Image.new("L", (TILE * 2, TILE * 2), 110)
    pen = ImageDraw.Draw(image)
    for _ in range(count):
        x, y, reach = rng.randrange(TILE * 2), rng.randrange(TILE * 2), rng.uniform(*length)
        side = rng.uniform(-lean, lean) * reach
        end = (x + reach, y + side) if flat else (x + side, y - reach)
        pen.line([(x, y), end], fill=rng.randrange(60, 200), width=rng.choice((1, 2, 3)))
    grey = np.asarray(image.reduce(2), np.float32)
    return (grey - grey.mean()) / grey.std()


def _planks(seed: int) -> np.ndarray:
    grain = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal((TILE, TILE)), (0.8, 24), mode="wrap")
    grain = grain / grain.std()
    height = 64
    shades = np.repeat(np.random.default_rng(seed + 1).normal(0, 0.8, TILE // height), height)[:, None]
    joints = np.where(np.arange(TILE)[:, None] % height < 2, -4.0, 0.0)
    return grain * 0.7 + shades + joints


def _bricks(width: int, height: int, joint: int, stagger: bool) -> np.ndarray:
    source = np.random.default_rng(width)
    y, x = np.mgrid[:TILE, :TILE]
    row = y // height
    shifted = x + np.where(row % 2 == 1, width // 2, 0) * stagger
    shades = source.normal(0, 0.7, (TILE // height + 1, TILE // width + 2))[row, shifted // width % (TILE // width)]
    gap = (y % height < joint) | (shifted % width < joint)
    return np.where(gap, 2.6, shades) + _noise(height, 1.0) * 0.35


def _shelves() -> np.ndarray:
    """Rows of books seen from their backs, in greys."""
    rng = random.Random(5)
    image = Image.new("L", (TILE, TILE), 40)
    pen = ImageDraw.Draw(image)
    for top in range(0, TILE, 64):
        x = 0
        while x < TILE:
            width, drop = rng.randrange(8, 20), rng.randrange(0, 14)
            shade = rng.randrange(70, 200)
            pen.rectangle((x, top + 8 + drop, x + width - 2, top + 57), fill=shade)
            pen.line((x + 1, top + 14 + drop, x + width - 3, top + 14 + drop), fill=min(255, shade + 40))
            x += width
        pen.rectangle((0, top + 58, TILE, top + 64), fill=110)
    grey = np.asarray(image.filter(ImageFilter.GaussianBlur(0.8)), np.float32)
    return (grey - grey.mean()) / grey.std()


def _stripes() -> np.ndarray:
    x = np.arange(TILE)[None, :] // 32 % 2
    return np.repeat(np.where(x, 0.8, -0.8), TILE, 0) + _noise(8, 1.2) * 0.3


_TILES: dict[str, Callable[[], np.ndarray]] = {
    "clouds": lambda: _noise(1, 44.0, 20.0, 20.0, 8.0),
    "sand": lambda: _noise(2, 0.7, 2.0, 12.0),
    "grass": lambda: _strokes(3, 26000, (8, 22), 0.4) + 0.5 * _noise(3, 30.0),
    "snow": lambda: _noise(4, 16.0, 30.0, 1.0),
    "asphalt": lambda: _noise(6, 0.7, 0.7, 20.0),
    "moss": lambda: _noise(7, 1.2, 4.0, 16.0),
    "waves": lambda: _strokes(9, 4200, (16, 60), 0.04, flat=True),
    "planks": lambda: _planks(11),
    "bricks": lambda: _bricks(48, 20, 2, True),
    "paving": lambda: _bricks(72, 36, 2, True),
    "tiles": lambda: _bricks(40, 40, 2, False),
    "plaster": lambda: _noise(14, 2.0, 10.0, 50.0),
    "carpet": lambda: _strokes(15, 30000, (3, 7), 1.0),
    "books": _shelves,
    "stripes": _stripes,
    "counter": lambda: _noise(16, 0.8, 3.0, 30.0) * 0.5,
}


@functools.cache
def _tile(name: str) -> Image.Image:
    grey = _TILES[name]()
    grey = (grey - grey.mean()) / grey.std()
    return Image.fromarray(np.clip(128 + 40 * grey, 0, 255).astype(np.uint8))


def piece(name: str, size: tuple[int, int], rng: random.Random, zoom: float) -> Image.Image:
    """A random grey piece of a tile, of `size`; `zoom`: pixels of the picture for each pixel of the tile."""
    tile = _tile(name)
    wide, high = min(TILE, math.ceil(size[0] / zoom)), min(TILE, math.ceil(size[1] / zoom))
    left, top = rng.randint(0, TILE - wide), rng.randint(0, TILE - high)
    cut = tile.crop((left, top, left + wide, top + high))
    if rng.random() < 0.5:
        cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return cut if cut.size == size else cut.resize(size, Image.Resampling.BICUBIC)


def textured(
    name: str, size: tuple[int, int], dark: Colour, light: Colour, rng: random.Random, zoom: float
) -> Image.Image:
    """A piece of a tile, with its greys mapped to the range between two colours."""
    grey = piece(name, size, rng, zoom)
    grey.putpalette([round(a + (b - a) * k / 255) for k in range(256) for a, b in zip(dark, light)])
    return grey.convert("RGB")


def gradient(size: tuple[int, int], top: Colour, bottom: Colour) -> Image.Image:
    """An image whose colour changes gradually from `top` to `bottom`."""
    ramp = np.linspace(0, 1, size[1])[:, None, None]
    column = np.array(top) * (1 - ramp) + np.array(bottom) * ramp
    return Image.fromarray(np.clip(column, 0, 255).astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
