"""Models a thing from parts with soft shading and a dark rim, to be painted in any colour.

An artist (art.py) places parts on a `Sculpture`; each part is a mask that bulges towards the light in the upper left.
The result, a `Master`, is cached, so that drawing a thing is one resize and one multiplication. Colour is applied last,
because shading is linear in it:

    pixel = fixed + tint * colour          (premultiplied by the coverage)
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage

MASTER = 256  # longer side of a master's canvas, pixels; things are drawn at 40 to 220
SUPERSAMPLE = 2
RIM = 4  # width of the dark rim on the supersampled canvas

WOOD, DARK_WOOD = (150, 100, 58), (96, 62, 36)
LEAF, STEM = (66, 140, 58), (92, 104, 48)
METAL, INK, GLASS = (168, 172, 178), (40, 36, 38), (176, 214, 234)
CREAM, FLAME, WAX = (246, 234, 206), (255, 176, 40), (250, 244, 226)
WHITE, ROSE = (250, 250, 248), (240, 160, 160)

Point = tuple[float, float]
Colour = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Master:
    """A finished model.

    Attributes:
      paint: "CMYK" image whose four channels are fixed red, green, blue and tint (that mode is resized channel by
        channel; "RGBA" would be weighted by its last one).
      coverage: "L" image of the same size.
      aspect: width / height.
    """

    paint: Image.Image
    coverage: Image.Image
    aspect: float


class Sculpture:
    """A canvas of `width` x 1 units: x from -width / 2 to width / 2, y from 0 (the ground) up to 1."""

    def __init__(self, width: float):
        self.width = width
        self.scale = MASTER * SUPERSAMPLE / max(width, 1.0)
        self.shape = (round(self.scale), round(self.scale * width))
        self.fixed = np.zeros((*self.shape, 3), np.float32)
        self.tint = np.zeros(self.shape, np.float32)
        self.coverage = np.zeros(self.shape, np.float32)

    def _pixels(self, points: Sequence[Point]) -> list[Point]:
        return [((x + self.width / 2) * self.scale, (1 - y) * self.scale) for x, y in points]

    def polygon(self, points: Sequence[Point]) -> Image.Image:
        mask = Image.new("L", self.shape[::-1])
        ImageDraw.Draw(mask).polygon(self._pixels(points), fill=255)
        return mask

    def smooth(self, points: Sequence[Point]) -> Image.Image:
        """A closed curve through the points (Catmull-Rom)."""
        p = np.array(points)
        t = np.linspace(0, 1, 12, endpoint=False)[:, None]
        curve = []
        for i in range(len(p)):
            a, b, c, d = p[i - 1], p[i], p[(i + 1) % len(p)], p[(i + 2) % len(p)]
            step = 2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3
            curve.append(step / 2)
        return self.polygon(np.concatenate(curve).tolist())

    def ellipse(self, x: float, y: float, rx: float, ry: float, tilt: float = 0.0) -> Image.Image:
        """An ellipse by centre, radii and counter-clockwise tilt in degrees."""
        cos, sin = math.cos(math.radians(tilt)), math.sin(math.radians(tilt))
        angles = np.linspace(0, 2 * math.pi, 72, endpoint=False)
        u, v = rx * np.cos(angles), ry * np.sin(angles)
        return self.polygon(np.stack([x + u * cos - v * sin, y + u * sin + v * cos], -1).tolist())

    def box(self, x0: float, y0: float, x1: float, y1: float, corner: float = 0.0) -> Image.Image:
        mask = Image.new("L", self.shape[::-1])
        (left, top), (right, bottom) = self._pixels([(x0, y1), (x1, y0)])
        ImageDraw.Draw(mask).rounded_rectangle((left, top, right, bottom), corner * self.scale, fill=255)
        return mask

    def line(self, points: Sequence[Point], width: float) -> Image.Image:
        mask = Image.new("L", self.shape[::-1])
        pen, path, wide = ImageDraw.Draw(mask), self._pixels(points), max(1, round(width * self.scale))
        pen.line(path, fill=255, width=wide, joint="curve")
        for x, y in (path[0], path[-1]):
            pen.ellipse((x - wide / 2, y - wide / 2, x + wide / 2, y + wide / 2), fill=255)
        return mask

    def arc(self, x: float, y: float, rx: float, ry: float, start: float, end: float, width: float) -> Image.Image:
        """Part of an ellipse as a line, angles in degrees counter-clockwise from the right."""
        angles = np.radians(np.linspace(start, end, 40))
        return self.line(np.stack([x + rx * np.cos(angles), y + ry * np.sin(angles)], -1).tolist(), width)

    def add(
        self,
        mask: Image.Image,
        colour: Colour | None = None,
        shade: float = 1.0,
        bulge: float = 0.06,
        rim: float = 1.0,
        inside: Image.Image | None = None,
    ) -> None:
        """Puts a part over those so far.

        Args:
          colour: None is the thing's own colour. shade: below 1 is darker, above 1 lighter.
          bulge: how far the rounding extends inwards from the edge, in units; 0 is flat.
          rim: darkness of the edge; 0 is none. inside: another mask that bounds the part.
        """
        if inside is not None:
            mask = Image.composite(mask, Image.new("L", mask.size), inside)
        bounds = mask.getbbox()
        if bounds is None:
            return
        margin = round(bulge * self.scale) + RIM
        left, top = max(0, bounds[0] - margin), max(0, bounds[1] - margin)
        right, bottom = min(mask.width, bounds[2] + margin), min(mask.height, bounds[3] + margin)
        mask = mask.crop((left, top, right, bottom))
        cover = np.asarray(mask, np.float32) / 255
        dim = np.full(cover.shape, min(shade, 1.0), np.float32)
        gleam = np.full(cover.shape, max(shade - 1.0, 0.0), np.float32)
        if bulge:
            slope = _towards_light(mask, bulge * self.scale)
            dim *= 1 - 0.62 * np.clip(-slope, 0, 1)
            gleam = np.maximum(gleam, 0.55 * np.clip(slope, 0, 1) ** 1.5)
        if rim:
            # A box blur rises from a half at the edge to 1 at RIM pixels inside.
            inner = np.clip(np.asarray(mask.filter(ImageFilter.BoxBlur(RIM)), np.float32) / 255 * 2 - 1, 0, 1)
            edge = 1 - rim * 0.66 * (1 - inner)
            dim, gleam = dim * edge, gleam * inner
        region = np.s_[top:bottom, left:right]
        own = dim * (1 - gleam)
        tint = own if colour is None else np.zeros_like(own)
        fixed = (255 * gleam * dim)[..., None]
        if colour is not None:
            fixed = fixed + own[..., None] * np.array(colour, np.float32)
        keep = 1 - cover
        self.fixed[region] = self.fixed[region] * keep[..., None] + fixed * cover[..., None]
        self.tint[region] = self.tint[region] * keep + tint * cover
        self.coverage[region] = self.coverage[region] * keep + cover

    def solid(self) -> Image.Image:
        """A mask of all parts so far."""
        return Image.fromarray((self.coverage * 255).astype(np.uint8))

    def finish(self) -> Master:
        channels = [*np.moveaxis(self.fixed, -1, 0), self.tint * 255]
        images = [Image.fromarray(np.clip(channel, 0, 255).astype(np.uint8)) for channel in channels]
        coverage = Image.fromarray((np.clip(self.coverage, 0, 1) * 255).astype(np.uint8))
        paint = Image.merge("CMYK", images)
        # The canvas is cut to the drawing, so that a thing stands on its lowest pixel and fills its box.
        bounds = coverage.getbbox()
        paint, coverage = paint.crop(bounds), coverage.crop(bounds)
        return Master(paint.reduce(SUPERSAMPLE), coverage.reduce(SUPERSAMPLE), paint.width / paint.height)


def _towards_light(mask: Image.Image, reach: float) -> np.ndarray:
    """(height, width) in about -1..1: how much the surface of a bulging mask turns to the upper left."""
    step = max(1, int(reach / 10))  # the slope is smooth, so a smaller image suffices where the reach is large
    small = mask.reduce(step) if step > 1 else mask
    height = ndimage.gaussian_filter(np.asarray(small, np.float32) / 255, reach / step / 2, truncate=2.5)
    down, right = np.gradient(height)
    slope = (down + right) * (reach / step) * 1.1
    if step > 1:
        slope = np.asarray(Image.fromarray(slope).resize(mask.size, Image.Resampling.BICUBIC))
    return slope
