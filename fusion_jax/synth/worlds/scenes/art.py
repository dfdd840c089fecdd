"""Draws each noun by an artist, a function that makes a `Sculpture` with random variations.

Coordinates are those of `Sculpture`: the ground is at y = 0, the top at y = 1. Parts without a colour have that of the
thing; they make up most of it, so that its colour dominates.
"""

import functools
import random
from collections.abc import Callable

from fusion_jax.synth.worlds.scenes import art_carriers, art_household, art_outdoors
from fusion_jax.synth.worlds.scenes.lexicon import NOUNS
from fusion_jax.synth.worlds.scenes.sculpt import Master, Sculpture

VARIANTS = 2

_ROOMS = (art_household, art_outdoors, art_carriers)
# An artist is a function of the noun's name.
ARTISTS: dict[str, Callable[[random.Random], Sculpture]] = {
    name: getattr(room, name) for name in NOUNS for room in _ROOMS if hasattr(room, name)
}

# The place of the text on a carrier: left, bottom, right and top as shares of its drawing.
PANELS = {
    "sign": (0.05, 0.46, 0.95, 0.96),
    "billboard": (0.04, 0.35, 0.96, 0.96),
    "banner": (0.05, 0.2, 0.95, 0.8),
    "book": (0.16, 0.12, 0.9, 0.92),
    "box": (0.03, 0.05, 0.74, 0.72),
    "chalkboard": (0.09, 0.32, 0.91, 0.92),
    "mug": (0.08, 0.14, 0.66, 0.76),
}


@functools.cache  # at most nouns x variants, 0.3 MB each
def master(noun: str, variant: int) -> Master:
    """Makes the model of a noun; `variant` is 0 to VARIANTS - 1."""
    return ARTISTS[noun](random.Random(f"{noun}/{variant}")).finish()
