"""Defines the artists of fruit, household things, toys and luggage (see art.py)."""

import math
import random

from fusion_jax.synth.worlds.scenes.sculpt import CREAM, DARK_WOOD, FLAME, INK, LEAF, METAL, STEM, WAX, WHITE, Sculpture


def apple(rng: random.Random) -> Sculpture:
    s = Sculpture(1.0)
    w = rng.uniform(0.42, 0.46)
    s.add(
        s.smooth(
            [
                (0, 0.78),
                (0.2, 0.84),
                (w, 0.62),
                (w - 0.06, 0.24),
                (0.16, 0.02),
                (0, 0.05),
                (-0.16, 0.02),
                (0.06 - w, 0.24),
                (-w, 0.62),
                (-0.2, 0.84),
            ]
        ),
        bulge=0.3,
    )
    s.add(s.ellipse(0, 0.78, 0.13, 0.035), shade=0.6, bulge=0, rim=0)
    s.add(s.line([(0, 0.76), (0.03, 0.88), (0.07, 0.96)], 0.05), DARK_WOOD, bulge=0.02)
    s.add(s.ellipse(0.2, 0.92, 0.14, 0.055, 20), LEAF, bulge=0.05)
    return s


def pear(rng: random.Random) -> Sculpture:
    s = Sculpture(0.8)
    w = rng.uniform(0.31, 0.35)
    points = [(0, 0.88), (0.13, 0.8), (0.17, 0.6), (w, 0.3), (0.2, 0.04), (0, 0.02)]
    s.add(s.smooth(points + [(-x, y) for x, y in points[-2:0:-1]]), bulge=0.26)
    s.add(s.line([(0, 0.86), (0.02, 0.93), (0.06, 0.98)], 0.04), DARK_WOOD, bulge=0.02)
    s.add(s.ellipse(0.14, 0.91, 0.1, 0.04, 25), LEAF, bulge=0.04)
    return s


def pumpkin(rng: random.Random) -> Sculpture:
    s = Sculpture(1.15)
    for x, w in ((-0.34, 0.2), (0.34, 0.2), (-0.19, 0.22), (0.19, 0.22), (0, 0.2)):
        s.add(s.ellipse(x, 0.4, w, 0.39), bulge=0.15)
    lean = rng.uniform(-0.08, 0.08)
    s.add(s.polygon([(-0.06, 0.76), (0.06, 0.76), (0.05 + lean, 0.97), (-0.03 + lean, 0.97)]), STEM, bulge=0.04)
    return s


def cake(rng: random.Random) -> Sculpture:
    s = Sculpture(1.15)
    s.add(s.ellipse(0, 0.06, 0.56, 0.06), WHITE, bulge=0.05)
    s.add(s.box(-0.46, 0.05, 0.46, 0.42, 0.06), bulge=0.1)
    s.add(s.box(-0.32, 0.36, 0.32, 0.68, 0.05), bulge=0.1)
    for i, x in enumerate((-0.38, -0.19, 0, 0.19, 0.38)):
        s.add(s.ellipse(x, 0.41, 0.1, 0.06 + 0.02 * (i % 2)), CREAM, bulge=0.06, rim=0.3)
    for x in (-0.24, -0.08, 0.08, 0.24):
        s.add(s.ellipse(x, 0.67, 0.09, 0.055), CREAM, bulge=0.06, rim=0.3)
    s.add(s.box(-0.025, 0.68, 0.025, 0.86), WAX, bulge=0.02)
    s.add(s.ellipse(0, 0.91, 0.035, 0.06), FLAME, bulge=0.02, rim=0.3)
    return s


def mug(rng: random.Random) -> Sculpture:
    s = Sculpture(1.2)
    top = rng.uniform(0.86, 0.9)
    s.add(s.arc(0.36, 0.46, 0.19, 0.24, -90, 90, 0.09), bulge=0.05)
    s.add(s.smooth([(-0.4, top), (0.4, top), (0.4, 0.3), (0.3, 0.03), (0, 0), (-0.3, 0.03), (-0.4, 0.3)]), bulge=0.2)
    s.add(s.ellipse(0, top, 0.41, 0.09), bulge=0.04)
    s.add(s.ellipse(0, top, 0.34, 0.06), DARK_WOOD, bulge=0, rim=0.6)
    return s


def teapot(rng: random.Random) -> Sculpture:
    s = Sculpture(1.5)
    s.add(s.arc(0.42, 0.42, 0.24, 0.22, -80, 100, 0.08), bulge=0.04)
    s.add(s.smooth([(-0.3, 0.2), (-0.5, 0.3), (-0.72, 0.66), (-0.6, 0.68), (-0.46, 0.5), (-0.3, 0.46)]), bulge=0.06)
    s.add(s.ellipse(0, 0.37, 0.46, 0.36), bulge=0.26)
    s.add(s.ellipse(0, 0.7, 0.26, 0.07), shade=0.9, bulge=0.05)
    s.add(s.ellipse(0, 0.8, 0.07, 0.07), bulge=0.05)
    s.add(s.box(-0.24, 0.0, 0.24, 0.05, 0.02), shade=0.8, bulge=0.02)
    return s


def bottle(rng: random.Random) -> Sculpture:
    s = Sculpture(0.48)
    shoulder = rng.uniform(0.52, 0.6)
    points = [(0.07, 0.9), (0.08, shoulder + 0.14), (0.2, shoulder), (0.21, 0.3), (0.2, 0.02), (0, 0.005)]
    s.add(s.smooth([(0, 0.91), *points, *[(-x, y) for x, y in points[-2::-1]]]), bulge=0.11)
    s.add(s.box(-0.18, 0.18, 0.18, 0.42, 0.01), CREAM, bulge=0.03, rim=0.4)
    s.add(s.box(-0.075, 0.88, 0.075, 0.99, 0.02), DARK_WOOD, bulge=0.04)
    return s


def vase(rng: random.Random) -> Sculpture:
    s = Sculpture(0.7)
    belly, neck = rng.uniform(0.28, 0.33), rng.uniform(0.1, 0.14)
    points = [(0.19, 0.97), (neck, 0.76), (belly, 0.42), (0.2, 0.08), (0.17, 0.0)]
    s.add(s.smooth([*points, *[(-x, y) for x, y in points[::-1]]]), bulge=0.18)
    s.add(s.ellipse(0, 0.95, 0.19, 0.04), shade=0.5, bulge=0.02)
    s.add(s.box(-0.5, 0.4, 0.5, 0.46), shade=1.45, bulge=0, rim=0, inside=s.solid())
    return s


def candle(rng: random.Random) -> Sculpture:
    s = Sculpture(0.56)
    s.add(s.ellipse(0, 0.06, 0.27, 0.06), METAL, bulge=0.05)
    s.add(s.box(-0.14, 0.06, 0.14, 0.74, 0.03), bulge=0.12)
    s.add(s.smooth([(-0.14, 0.72), (0.14, 0.72), (0.12, 0.6), (0.04, 0.68), (-0.06, 0.56), (-0.1, 0.66)]), shade=1.3)
    s.add(s.line([(0, 0.73), (0.01, 0.8)], 0.02), INK, bulge=0, rim=0)
    s.add(s.smooth([(0, 1.0), (0.06, 0.86), (0, 0.77), (-0.06, 0.86)]), FLAME, bulge=0.04, rim=0.2)
    s.add(s.ellipse(0, 0.84, 0.025, 0.05), (255, 240, 170), bulge=0, rim=0)
    return s


def lamp(rng: random.Random) -> Sculpture:
    s = Sculpture(0.7)
    s.add(s.box(-0.03, 0.06, 0.03, 0.6), METAL, bulge=0.02)
    s.add(s.ellipse(0, 0.05, 0.2, 0.05), METAL, bulge=0.04)
    top = rng.uniform(0.14, 0.2)
    s.add(s.polygon([(-0.34, 0.48), (0.34, 0.48), (top, 0.98), (-top, 0.98)]), bulge=0.16)
    s.add(s.polygon([(-0.34, 0.48), (0.34, 0.48), (0.32, 0.53), (-0.32, 0.53)]), shade=0.75, bulge=0, rim=0)
    return s


def clock(rng: random.Random) -> Sculpture:
    s = Sculpture(0.94)
    for side in (-1, 1):
        s.add(s.line([(side * 0.2, 0.2), (side * 0.3, 0.03)], 0.07), bulge=0.03)
        s.add(s.ellipse(side * 0.22, 0.88, 0.15, 0.09, -side * 35), bulge=0.06)
    s.add(s.ellipse(0, 0.48, 0.43, 0.43), bulge=0.12)
    s.add(s.ellipse(0, 0.48, 0.3, 0.3), WHITE, bulge=0.02, rim=0.7)
    for hour in range(12):
        a = math.pi * hour / 6
        s.add(s.ellipse(0.25 * math.sin(a), 0.48 + 0.25 * math.cos(a), 0.017, 0.017), INK, bulge=0, rim=0)
    hour, minute = rng.uniform(0, 6.28), rng.uniform(0, 6.28)
    for angle, reach, width in ((hour, 0.14, 0.035), (minute, 0.21, 0.022)):
        s.add(
            s.line([(0, 0.48), (reach * math.sin(angle), 0.48 + reach * math.cos(angle))], width), INK, bulge=0, rim=0
        )
    return s


def chair(rng: random.Random) -> Sculpture:
    s = Sculpture(0.66)
    for x in (-0.2, 0.28):
        s.add(s.box(x - 0.035, 0.1, x + 0.035, 0.46), shade=0.7, bulge=0.03)
    s.add(s.box(-0.3, 0.42, -0.23, 0.98, 0.03), bulge=0.04)
    s.add(s.box(0.21, 0.42, 0.28, 0.98, 0.03), bulge=0.04)
    for y in (0.6, 0.74, 0.88):
        s.add(s.box(-0.26, y, 0.24, y + 0.08, 0.02), bulge=0.04)
    s.add(s.polygon([(-0.32, 0.36), (0.26, 0.36), (0.32, 0.48), (-0.22, 0.48)]), bulge=0.05)
    for x in (-0.29, 0.22):
        s.add(s.box(x - 0.035, 0.0, x + 0.035, 0.38), bulge=0.03)
    return s


def ball(rng: random.Random) -> Sculpture:
    s = Sculpture(1.0)
    body = s.ellipse(0, 0.5, 0.48, 0.48)
    s.add(body, bulge=0.42)
    tilt = rng.uniform(-40, 40)
    s.add(s.ellipse(0, 0.5, 0.49, 0.13, tilt), WHITE, bulge=0, rim=0.15, inside=s.ellipse(0, 0.5, 0.47, 0.47))
    s.add(s.ellipse(0, 0.5, 0.49, 0.06, tilt), shade=0.92, bulge=0, rim=0, inside=s.ellipse(0, 0.5, 0.47, 0.47))
    s.add(s.ellipse(-0.17, 0.72, 0.1, 0.06, 35), WHITE, bulge=0, rim=0)
    return s


def gift(rng: random.Random) -> Sculpture:
    s = Sculpture(1.05)
    ribbon = CREAM if rng.random() < 0.5 else (252, 214, 90)
    s.add(s.box(-0.42, 0.0, 0.42, 0.6, 0.02), bulge=0.08)
    s.add(s.box(-0.08, 0.0, 0.08, 0.6), ribbon, bulge=0.02, rim=0.4)
    s.add(s.box(-0.47, 0.56, 0.47, 0.74, 0.02), shade=1.06, bulge=0.06)
    s.add(s.box(-0.08, 0.56, 0.08, 0.74), ribbon, bulge=0.02, rim=0.4)
    for side in (-1, 1):
        s.add(s.ellipse(side * 0.17, 0.85, 0.18, 0.09, side * 28), ribbon, bulge=0.06)
    s.add(s.ellipse(0, 0.77, 0.07, 0.06), ribbon, shade=0.9, bulge=0.04)
    return s


def hat(rng: random.Random) -> Sculpture:
    s = Sculpture(1.5)
    s.add(s.ellipse(0, 0.17, 0.73, 0.17), bulge=0.08)
    top = rng.uniform(0.88, 0.98)
    s.add(s.smooth([(-0.38, 0.2), (-0.36, 0.7), (-0.2, top), (0, top - 0.06), (0.2, top), (0.36, 0.7), (0.38, 0.2)]))
    s.add(s.polygon([(-0.385, 0.2), (0.385, 0.2), (0.375, 0.38), (-0.375, 0.38)]), CREAM, bulge=0.05, rim=0.6)
    return s


def suitcase(rng: random.Random) -> Sculpture:
    s = Sculpture(1.25)
    s.add(s.arc(0, 0.78, 0.17, 0.17, 0, 180, 0.06), INK, bulge=0.03)
    s.add(s.box(-0.58, 0.0, 0.58, 0.8, 0.1), bulge=0.12)
    for x in (-0.36, 0.36):
        s.add(s.box(x - 0.05, 0.0, x + 0.05, 0.8), shade=0.66, bulge=0.02, rim=0.5)
        s.add(s.box(x - 0.045, 0.46, x + 0.045, 0.58, 0.02), METAL, bulge=0.03)
    return s


def bucket(rng: random.Random) -> Sculpture:
    s = Sculpture(0.94)
    s.add(s.arc(0, 0.66, 0.41, 0.3, 0, 180, 0.035), METAL, bulge=0.02)
    s.add(s.polygon([(-0.42, 0.68), (0.42, 0.68), (0.3, 0.02), (-0.3, 0.02)]), bulge=0.2)
    s.add(s.ellipse(0, 0.68, 0.43, 0.09), bulge=0.04)
    s.add(s.ellipse(0, 0.68, 0.36, 0.06), shade=0.4, bulge=0, rim=0)
    return s


def barrel(rng: random.Random) -> Sculpture:
    s = Sculpture(0.8)
    s.add(s.smooth([(-0.29, 0.98), (0.29, 0.98), (0.39, 0.5), (0.29, 0.02), (-0.29, 0.02), (-0.39, 0.5)]), bulge=0.2)
    whole = s.solid()
    for y in (0.14, 0.36, 0.62, 0.84):
        s.add(s.box(-0.5, y, 0.5, y + 0.05), INK, shade=0.9, bulge=0.02, rim=0.3, inside=whole)
    for x in (-0.2, 0, 0.2):
        s.add(s.line([(x * 0.8, 0.96), (x * 1.1, 0.5), (x * 0.8, 0.04)], 0.012), shade=0.5, bulge=0, rim=0)
    s.add(s.ellipse(0, 0.94, 0.27, 0.05), shade=0.75, bulge=0.02)
    return s
