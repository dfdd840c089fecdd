"""Defines the artists of things that carry writing, except the mug (see art.py)."""

import math
import random

from fusion_jax.synth.worlds.scenes.sculpt import METAL, WAX, WOOD, Sculpture


def sign(rng: random.Random) -> Sculpture:
    s = Sculpture(1.1)
    s.add(s.box(-0.05, 0.0, 0.05, 0.6), WOOD, bulge=0.04)
    s.add(s.box(-0.54, 0.42, 0.54, 0.98, 0.05), bulge=0.03)
    return s


def billboard(rng: random.Random) -> Sculpture:
    s = Sculpture(1.6)
    for x in (-0.45, 0.45):
        s.add(s.box(x - 0.04, 0.0, x + 0.04, 0.4), METAL, bulge=0.03)
    s.add(s.box(-0.8, 0.3, 0.8, 1.0), METAL, shade=0.7, bulge=0.02)
    s.add(s.box(-0.76, 0.335, 0.76, 0.965), bulge=0.0, rim=0.4)
    return s


def banner(rng: random.Random) -> Sculpture:
    s = Sculpture(2.4)
    for x in (-1.12, 1.12):
        s.add(s.line([(x, 0.7), (x, 1.0)], 0.03), WOOD, bulge=0.01)
    wave = rng.uniform(0.03, 0.07)
    top = [(x / 10, 0.84 + wave * math.sin(x / 4)) for x in range(-12, 13)]
    s.add(s.polygon(top + [(x, y - 0.76) for x, y in top[::-1]]), bulge=0.05)
    return s


def book(rng: random.Random) -> Sculpture:
    s = Sculpture(0.86)
    s.add(s.box(-0.32, 0.0, 0.42, 0.95, 0.02), WAX, bulge=0.03)
    s.add(s.box(-0.4, 0.02, 0.36, 1.0, 0.03), bulge=0.03)
    s.add(s.box(-0.4, 0.02, -0.3, 1.0, 0.03), shade=0.72, bulge=0.03, rim=0.5)
    return s


def box(rng: random.Random) -> Sculpture:
    s = Sculpture(1.15)
    s.add(s.polygon([(-0.5, 0.74), (0.3, 0.74), (0.55, 0.96), (-0.22, 0.96)]), shade=1.25, bulge=0.0)
    s.add(s.polygon([(0.3, 0.0), (0.3, 0.74), (0.55, 0.96), (0.55, 0.22)]), shade=0.66, bulge=0.0)
    s.add(s.box(-0.5, 0.0, 0.3, 0.74), bulge=0.03)
    return s


def chalkboard(rng: random.Random) -> Sculpture:
    s = Sculpture(1.15)
    for x in (-0.42, 0.42):
        s.add(s.line([(x * 0.9, 0.98), (x * 1.12, 0.02)], 0.05), WOOD, bulge=0.02)
    s.add(s.box(-0.55, 0.24, 0.55, 0.98, 0.02), WOOD, bulge=0.04)
    s.add(s.box(-0.49, 0.3, 0.49, 0.92), bulge=0.0, rim=0.6)
    return s
