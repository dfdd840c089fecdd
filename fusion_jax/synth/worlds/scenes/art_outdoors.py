"""Defines the artists of outdoor things: plants, buildings, vehicles, animals, aircraft (see art.py)."""

import math
import random

from fusion_jax.synth.worlds.scenes.sculpt import (
    CREAM,
    DARK_WOOD,
    FLAME,
    GLASS,
    INK,
    LEAF,
    METAL,
    ROSE,
    WAX,
    WHITE,
    WOOD,
    Sculpture,
)


def umbrella(rng: random.Random) -> Sculpture:
    s = Sculpture(1.1)
    s.add(s.box(-0.17, 0.0, 0.17, 0.05, 0.02), METAL, bulge=0.02)  # a foot, without which nothing would hold it up
    s.add(s.box(-0.05, 0.03, 0.05, 0.12, 0.01), METAL, bulge=0.02)
    s.add(s.line([(0, 0.04), (0, 0.96)], 0.035), WOOD, bulge=0.02)
    edge = [(-0.52, 0.5), (-0.35, 0.56), (-0.18, 0.5), (0, 0.56), (0.18, 0.5), (0.35, 0.56), (0.52, 0.5)]
    dome = [(0.52 * math.cos(a), 0.5 + 0.46 * math.sin(a)) for a in (math.pi * k / 24 for k in range(25))]
    s.add(s.polygon([*edge, *dome]), bulge=0.16)
    for x in (-0.18, 0.18):
        ribs = s.line([(x, 0.5), (x * 0.9, 0.72), (0, 0.96)], 0.012)
        s.add(ribs, shade=0.5, bulge=0, rim=0)
    s.add(s.line([(0, 0.95), (0, 0.99)], 0.03), WOOD, bulge=0, rim=0.5)
    return s


def tent(rng: random.Random) -> Sculpture:
    s = Sculpture(1.5)
    s.add(s.polygon([(-0.4, 0.96), (0.25, 0.96), (0.72, 0.02), (-0.1, 0.02)]), shade=0.72, bulge=0.06)
    s.add(s.polygon([(-0.4, 0.96), (0.05, 0.02), (-0.73, 0.02)]), bulge=0.1)
    s.add(s.polygon([(-0.4, 0.72), (-0.2, 0.02), (-0.5, 0.02)]), INK, bulge=0.02, rim=0.5)
    s.add(s.polygon([(-0.4, 0.72), (-0.5, 0.02), (-0.58, 0.02)]), shade=1.3, bulge=0.02, rim=0.5)
    return s


def house(rng: random.Random) -> Sculpture:
    s = Sculpture(1.05)
    roof = (122, 62, 50) if rng.random() < 0.5 else (84, 88, 100)
    s.add(s.box(0.2, 0.7, 0.32, 0.98), (150, 90, 76), bulge=0.03)
    s.add(s.box(-0.42, 0.0, 0.42, 0.62), bulge=0.08)
    s.add(s.polygon([(-0.52, 0.6), (0.52, 0.6), (0.3, 0.9), (-0.3, 0.9)]), roof, bulge=0.06)
    for x in (-0.26, 0.26):
        s.add(s.box(x - 0.1, 0.3, x + 0.1, 0.5), WHITE, bulge=0.01)
        s.add(s.box(x - 0.075, 0.325, x + 0.075, 0.475), GLASS, bulge=0.03, rim=0.5)
        s.add(s.line([(x, 0.31), (x, 0.49)], 0.02), WHITE, bulge=0, rim=0)
    s.add(s.box(-0.09, 0.0, 0.09, 0.34, 0.02), DARK_WOOD, bulge=0.03)
    s.add(s.ellipse(0.055, 0.16, 0.016, 0.016), FLAME, bulge=0, rim=0.4)
    return s


def tree(rng: random.Random) -> Sculpture:
    s = Sculpture(0.86)
    s.add(s.polygon([(-0.08, 0.0), (0.08, 0.0), (0.05, 0.5), (-0.05, 0.5)]), WOOD, bulge=0.05)
    s.add(s.line([(0, 0.3), (0.14, 0.46)], 0.04), WOOD, bulge=0.03)
    for x, y, r in ((-0.22, 0.52, 0.19), (0.22, 0.52, 0.19), (0, 0.5, 0.2), (-0.16, 0.72, 0.2), (0.17, 0.7, 0.2)):
        s.add(s.ellipse(x + rng.uniform(-0.02, 0.02), y, r, r * 0.94), bulge=0.15, rim=0.7)
    s.add(s.ellipse(0, 0.79, 0.2, 0.2), bulge=0.15, rim=0.7)
    for _ in range(22):
        x, y = rng.uniform(-0.3, 0.3), rng.uniform(0.42, 0.92)
        s.add(s.ellipse(x, y, 0.03, 0.02, rng.uniform(0, 90)), shade=0.72, bulge=0, rim=0, inside=s.solid())
    return s


def cactus(rng: random.Random) -> Sculpture:
    s = Sculpture(0.8)
    left, right = rng.uniform(0.5, 0.62), rng.uniform(0.56, 0.7)
    s.add(s.line([(0, 0.44), (-0.27, 0.44), (-0.27, left + 0.14)], 0.13), bulge=0.06)
    s.add(s.line([(0, 0.36), (0.27, 0.36), (0.27, right)], 0.13), bulge=0.06)
    s.add(s.box(-0.13, 0.1, 0.13, 0.98, 0.13), bulge=0.12)
    for x in (-0.06, 0.0, 0.06):
        for k in range(9):
            s.add(s.ellipse(x, 0.28 + 0.075 * k, 0.008, 0.014), WAX, bulge=0, rim=0)
    s.add(s.polygon([(-0.22, 0.22), (0.22, 0.22), (0.16, 0.0), (-0.16, 0.0)]), (190, 110, 70), bulge=0.08)
    s.add(s.box(-0.25, 0.19, 0.25, 0.27, 0.02), (190, 110, 70), bulge=0.04)
    return s


def flower(rng: random.Random) -> Sculpture:
    s = Sculpture(0.7)
    s.add(s.line([(0, 0.16), (0.02, 0.4), (0, 0.66)], 0.035), LEAF, bulge=0.02)
    s.add(s.ellipse(0.13, 0.36, 0.14, 0.05, 35), LEAF, bulge=0.05)
    s.add(s.ellipse(-0.12, 0.3, 0.13, 0.05, 145), LEAF, bulge=0.05)
    turn, petals = rng.uniform(0, 60), rng.choice((6, 7, 8))
    for k in range(petals):
        a = math.radians(turn + 360 * k / petals)
        x, y = 0.19 * math.cos(a), 0.72 + 0.19 * math.sin(a)
        s.add(s.ellipse(x, y, 0.14, 0.09, math.degrees(a)), bulge=0.07, rim=0.8)
    s.add(s.ellipse(0, 0.72, 0.09, 0.09), (200, 142, 40), bulge=0.06)
    # It is in a pot, so that it can stand on a table or a road as well as in the grass.
    s.add(s.polygon([(-0.14, 0.16), (0.14, 0.16), (0.1, 0.0), (-0.1, 0.0)]), (190, 110, 70), bulge=0.06)
    return s


def mushroom(rng: random.Random) -> Sculpture:
    s = Sculpture(1.1)
    s.add(s.smooth([(-0.13, 0.5), (0.13, 0.5), (0.16, 0.2), (0.2, 0.02), (-0.2, 0.02), (-0.16, 0.2)]), WAX, bulge=0.1)
    cap = [(-0.54, 0.46), (-0.44, 0.72), (-0.2, 0.93), (0, 0.97), (0.2, 0.93), (0.44, 0.72), (0.54, 0.46), (0, 0.38)]
    s.add(s.smooth(cap), bulge=0.2)
    for x, y, r in ((-0.24, 0.66, 0.07), (0.04, 0.8, 0.075), (0.28, 0.62, 0.065), (0.0, 0.54, 0.05)):
        s.add(s.ellipse(x, y, r, r * 0.8), CREAM, bulge=0.02, rim=0.3)
    return s


def _wheel(s: Sculpture, x: float, r: float) -> None:
    s.add(s.ellipse(x, r, r, r), INK, bulge=0.04)
    s.add(s.ellipse(x, r, r * 0.5, r * 0.5), METAL, bulge=0.04)


def car(rng: random.Random) -> Sculpture:
    s = Sculpture(1.9)
    roof = rng.uniform(0.9, 0.97)
    s.add(s.smooth([(-0.52, 0.5), (-0.34, roof), (0.26, roof), (0.56, 0.52), (0, 0.45)]), bulge=0.08)
    s.add(s.polygon([(-0.43, 0.54), (-0.31, roof - 0.08), (-0.05, roof - 0.08), (-0.05, 0.54)]), GLASS, bulge=0.04)
    s.add(s.polygon([(0.03, 0.54), (0.03, roof - 0.08), (0.24, roof - 0.08), (0.44, 0.54)]), GLASS, bulge=0.04)
    body = [
        (-0.92, 0.3),
        (-0.86, 0.54),
        (-0.4, 0.58),
        (0.4, 0.58),
        (0.84, 0.5),
        (0.93, 0.32),
        (0.9, 0.16),
        (-0.9, 0.16),
    ]
    s.add(s.smooth(body), bulge=0.14)
    s.add(s.line([(-0.01, 0.52), (-0.01, 0.2)], 0.015), shade=0.5, bulge=0, rim=0)
    s.add(s.ellipse(0.86, 0.38, 0.05, 0.05), (255, 244, 190), bulge=0.03)
    s.add(s.ellipse(-0.89, 0.4, 0.035, 0.05), (150, 30, 30), bulge=0.03)
    _wheel(s, -0.52, 0.19)
    _wheel(s, 0.52, 0.19)
    return s


def bus(rng: random.Random) -> Sculpture:
    s = Sculpture(1.75)
    s.add(s.box(-0.86, 0.14, 0.86, 0.97, 0.1), bulge=0.1)
    for k in range(4):
        x = -0.76 + 0.34 * k
        s.add(s.box(x, 0.54, x + 0.27, 0.84, 0.03), GLASS, bulge=0.05)
    s.add(s.box(0.62, 0.2, 0.79, 0.84, 0.03), GLASS, shade=0.85, bulge=0.04)
    s.add(s.box(-0.84, 0.38, 0.58, 0.44), WHITE, bulge=0, rim=0)
    for x in (-0.5, 0.42):
        _wheel(s, x, 0.17)
    return s


def _eyes(s: Sculpture, x: float, y: float, gap: float, r: float, colour=INK) -> None:
    for side in (-1, 1):
        s.add(s.ellipse(x + side * gap, y, r * 1.35, r * 1.5), WHITE, bulge=0, rim=0.5)
        s.add(s.ellipse(x + side * gap, y, r * 0.8, r), colour, bulge=0, rim=0)


def cat(rng: random.Random) -> Sculpture:
    s = Sculpture(0.84)
    curl = rng.uniform(0.36, 0.46)
    s.add(s.line([(0.2, 0.06), (0.34, 0.1), (0.37, 0.26), (0.33, curl)], 0.08), bulge=0.04)
    s.add(s.smooth([(-0.14, 0.62), (0.14, 0.62), (0.26, 0.3), (0.25, 0.03), (-0.25, 0.03), (-0.26, 0.3)]), bulge=0.16)
    for x in (-0.11, 0.11):
        s.add(s.ellipse(x, 0.05, 0.1, 0.05), shade=1.04, bulge=0.04)
        s.add(s.line([(x, 0.08), (x, 0.24)], 0.014), shade=0.55, bulge=0, rim=0)
    for side in (-1, 1):
        s.add(s.polygon([(side * 0.25, 0.98), (side * 0.05, 0.86), (side * 0.27, 0.74)]), bulge=0.05)
        s.add(s.polygon([(side * 0.22, 0.92), (side * 0.11, 0.86), (side * 0.23, 0.79)]), ROSE, bulge=0, rim=0.2)
    s.add(s.ellipse(0, 0.72, 0.28, 0.21), bulge=0.14)
    _eyes(s, 0, 0.75, 0.11, 0.035)
    s.add(s.polygon([(-0.03, 0.67), (0.03, 0.67), (0, 0.635)]), ROSE, bulge=0, rim=0.4)
    for side in (-1, 1):
        for dy in (0.0, -0.04):
            s.add(
                s.line([(side * 0.1, 0.65 + dy), (side * 0.3, 0.67 + 2 * dy)], 0.008), (120, 116, 114), bulge=0, rim=0
            )
    return s


def rabbit(rng: random.Random) -> Sculpture:
    s = Sculpture(0.7)
    lean = rng.uniform(6, 16)
    for side in (-1, 1):
        s.add(s.ellipse(side * 0.11, 0.83, 0.065, 0.17, -side * lean), bulge=0.05)
        s.add(s.ellipse(side * 0.11, 0.83, 0.03, 0.12, -side * lean), ROSE, bulge=0, rim=0.2)
    s.add(s.ellipse(0.25, 0.16, 0.08, 0.08), WHITE, bulge=0.05)
    s.add(s.ellipse(0, 0.24, 0.26, 0.24), bulge=0.18)
    s.add(s.ellipse(0, 0.2, 0.15, 0.16), WHITE, bulge=0.04, rim=0.1)
    for side in (-1, 1):
        s.add(s.ellipse(side * 0.14, 0.05, 0.13, 0.05), bulge=0.04)
    s.add(s.ellipse(0, 0.56, 0.2, 0.17), bulge=0.13)
    _eyes(s, 0, 0.59, 0.085, 0.026)
    s.add(s.ellipse(0, 0.52, 0.028, 0.02), ROSE, bulge=0, rim=0.4)
    return s


def duck(rng: random.Random) -> Sculpture:
    s = Sculpture(1.15)
    for x in (-0.06, 0.12):
        s.add(s.line([(x, 0.14), (x, 0.03), (x + 0.09, 0.02)], 0.035), (232, 128, 30), bulge=0.02)
    s.add(
        s.smooth([(0.3, 0.62), (0.4, 0.36), (0.2, 0.1), (-0.2, 0.1), (-0.42, 0.3), (-0.55, 0.5), (-0.2, 0.46)]),
        bulge=0.2,
    )
    s.add(s.smooth([(-0.28, 0.4), (0.1, 0.42), (0.12, 0.24), (-0.1, 0.18)]), shade=0.88, bulge=0.06)
    s.add(s.polygon([(0.4, 0.74), (0.57, 0.68), (0.4, 0.63)]), (240, 140, 30), bulge=0.04)
    s.add(s.ellipse(0.27, 0.74, 0.19, 0.2), bulge=0.14)
    s.add(s.ellipse(0.33, 0.8, 0.03, 0.036), INK, bulge=0, rim=0)
    s.add(s.ellipse(0.34, 0.815, 0.01, 0.012), WHITE, bulge=0, rim=0)
    return s


def snail(rng: random.Random) -> Sculpture:
    s = Sculpture(1.3)
    skin = (214, 190, 140)
    for x in (0.46, 0.55):
        s.add(s.line([(x, 0.34), (x + 0.04, 0.62)], 0.03), skin, bulge=0.02)
        s.add(s.ellipse(x + 0.04, 0.64, 0.035, 0.04), INK, bulge=0.01, rim=0)
    s.add(
        s.smooth([(-0.62, 0.02), (0.55, 0.02), (0.63, 0.28), (0.52, 0.42), (0.38, 0.22), (-0.3, 0.16)]), skin, bulge=0.1
    )
    s.add(s.ellipse(-0.08, 0.52, 0.42, 0.42), bulge=0.2)
    turns = [a / 10 for a in range(0, 150)]
    k = rng.uniform(0.022, 0.025)
    s.add(
        s.line([(-0.08 + k * a * math.cos(a), 0.52 + k * a * math.sin(a)) for a in turns], 0.03),
        shade=0.5,
        bulge=0,
        rim=0,
    )
    return s


def balloon(rng: random.Random) -> Sculpture:
    s = Sculpture(0.6)
    bend = rng.uniform(-0.08, 0.08)
    s.add(s.line([(0, 0.4), (bend, 0.26), (-bend, 0.12), (bend / 2, 0.01)], 0.014), (90, 90, 96), bulge=0, rim=0)
    s.add(s.polygon([(0, 0.42), (0.05, 0.35), (-0.05, 0.35)]), shade=0.8, bulge=0.02)
    s.add(s.smooth([(0, 0.99), (0.27, 0.8), (0.2, 0.52), (0, 0.39), (-0.2, 0.52), (-0.27, 0.8)]), bulge=0.24)
    s.add(s.ellipse(-0.11, 0.82, 0.045, 0.08, -25), WHITE, bulge=0, rim=0)
    return s


def kite(rng: random.Random) -> Sculpture:
    s = Sculpture(0.8)
    sway = rng.uniform(0.06, 0.14)
    s.add(s.line([(0, 0.32), (sway, 0.22), (-sway, 0.12), (sway / 2, 0.02)], 0.016), (90, 90, 96), bulge=0, rim=0)
    for x, y in ((sway, 0.22), (-sway, 0.12)):
        s.add(
            s.polygon([(x - 0.06, y + 0.035), (x - 0.06, y - 0.035), (x + 0.06, y + 0.035), (x + 0.06, y - 0.035)]),
            WHITE,
        )
    s.add(s.polygon([(0, 0.99), (0.36, 0.68), (0, 0.32), (-0.36, 0.68)]), bulge=0.1)
    s.add(s.polygon([(0, 0.99), (0.36, 0.68), (0, 0.68)]), shade=0.8, bulge=0, rim=0)
    s.add(s.polygon([(0, 0.32), (-0.36, 0.68), (0, 0.68)]), shade=0.8, bulge=0, rim=0)
    s.add(s.line([(0, 0.97), (0, 0.34)], 0.014), shade=0.45, bulge=0, rim=0)
    s.add(s.line([(-0.34, 0.68), (0.34, 0.68)], 0.014), shade=0.45, bulge=0, rim=0)
    return s


def bird(rng: random.Random) -> Sculpture:
    s = Sculpture(1.5)
    s.add(s.smooth([(0.0, 0.5), (-0.1, 0.94), (-0.3, 0.98), (-0.34, 0.6), (-0.2, 0.42)]), shade=0.78, bulge=0.08)
    s.add(s.polygon([(-0.4, 0.42), (-0.72, 0.56), (-0.7, 0.32), (-0.45, 0.3)]), shade=0.85, bulge=0.05)
    s.add(s.smooth([(0.5, 0.52), (0.3, 0.6), (-0.2, 0.5), (-0.5, 0.4), (-0.2, 0.18), (0.25, 0.2)]), bulge=0.14)
    s.add(s.polygon([(0.6, 0.52), (0.75, 0.45), (0.6, 0.4)]), FLAME, bulge=0.03)
    s.add(s.ellipse(0.47, 0.48, 0.16, 0.15), bulge=0.1)
    tip = rng.uniform(0.82, 0.96)
    s.add(s.smooth([(0.14, 0.42), (0.12, tip), (-0.08, tip), (-0.16, 0.6), (-0.12, 0.36)]), shade=0.9, bulge=0.08)
    s.add(s.ellipse(0.52, 0.53, 0.03, 0.035), INK, bulge=0, rim=0)
    return s


def butterfly(rng: random.Random) -> Sculpture:
    s = Sculpture(1.2)
    lift = rng.uniform(20, 35)
    for side in (-1, 1):
        s.add(s.ellipse(side * 0.28, 0.64, 0.3, 0.24, side * lift), bulge=0.1)
        s.add(s.ellipse(side * 0.24, 0.27, 0.21, 0.19, -side * 35), shade=0.92, bulge=0.1)
        s.add(s.ellipse(side * 0.34, 0.68, 0.1, 0.08, side * lift), shade=1.5, bulge=0, rim=0.3)
        s.add(s.ellipse(side * 0.27, 0.26, 0.07, 0.06), shade=1.5, bulge=0, rim=0.3)
        s.add(s.line([(0, 0.74), (side * 0.07, 0.9), (side * 0.14, 0.95)], 0.016), INK, bulge=0, rim=0)
    s.add(s.ellipse(0, 0.48, 0.05, 0.29), INK, bulge=0.04)
    return s


def airplane(rng: random.Random) -> Sculpture:
    s = Sculpture(2.1)
    s.add(s.polygon([(-0.92, 0.5), (-1.02, 0.96), (-0.84, 0.96), (-0.6, 0.52)]), shade=0.85, bulge=0.06)
    s.add(s.polygon([(0.12, 0.55), (-0.2, 0.92), (-0.34, 0.92), (-0.2, 0.55)]), shade=0.7, bulge=0.05)
    s.add(
        s.smooth([(1.0, 0.42), (0.8, 0.58), (0.3, 0.64), (-0.5, 0.62), (-1.0, 0.54), (-0.6, 0.34), (0.4, 0.27)]),
        bulge=0.16,
    )
    s.add(s.smooth([(0.74, 0.56), (0.9, 0.48), (0.72, 0.46)]), GLASS, bulge=0.03)
    for k in range(6):
        s.add(s.ellipse(0.5 - 0.2 * k, 0.5, 0.045, 0.05), GLASS, bulge=0.02)
    drop = rng.uniform(0.03, 0.1)
    s.add(s.polygon([(0.24, 0.4), (-0.28, drop), (-0.44, drop), (-0.2, 0.4)]), shade=0.9, bulge=0.06)
    return s


def lantern(rng: random.Random) -> Sculpture:
    s = Sculpture(0.66)
    s.add(s.line([(0, 0.99), (0, 0.86)], 0.02), INK, bulge=0, rim=0)
    s.add(s.ellipse(0, 0.52, 0.31, 0.3), bulge=0.2)
    for x in (0.1, 0.2):
        s.add(s.arc(0, 0.52, x, 0.3, 0, 360, 0.012), shade=0.6, bulge=0, rim=0)
    s.add(s.box(-0.13, 0.79, 0.13, 0.87, 0.02), INK, bulge=0.03)
    s.add(s.box(-0.13, 0.17, 0.13, 0.25, 0.02), INK, bulge=0.03)
    sway = rng.uniform(-0.02, 0.02)
    for x in (-0.06, 0, 0.06):
        s.add(s.line([(x, 0.17), (x + sway, 0.02)], 0.02), FLAME, bulge=0, rim=0.3)
    return s
