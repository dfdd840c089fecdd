"""Implements the default backend without network or weights, from worlds that know what they show.

The first world that owns a request answers it: the plain shapes of the quickstart where its caption or state names one
of their pictures, drawn scenes for all others.
"""

import json
from collections.abc import Iterator
from types import ModuleType

from PIL import Image

from fusion_jax.synth.backends.base import Reply
from fusion_jax.synth.worlds.scenes import world as scenes
from fusion_jax.synth.worlds.shapes import world as shapes

VERSION = 2
SOURCE = "embedded scenes"
LICENCE = "Generated data, made by this program alone: free to use, change and share for any purpose."

WORLDS = (shapes, scenes)
STYLES = (*scenes.STYLES, *shapes.STYLES)


def captions(count: int, seed: int, style: str = "scenes") -> Iterator[str]:
    """Yields a pool of captions in one of `STYLES`, each a function of the seed and its number."""
    for world in WORLDS:
        if style in world.STYLES:
            yield from world.captions(count, seed, style)
            return
    raise ValueError(f"{style!r} is not a style; the styles are {', '.join(STYLES)}")


def _world(request: dict) -> ModuleType:
    return next(world for world in WORLDS if world.owns(request))


class LanguageModel:
    """Judges, describes, asks, states and verifies from what the worlds know."""

    name = "embedded"
    paid = False

    def __init__(self):
        self.settings = {"version": VERSION}

    def chat(self, messages: list[dict], schema: dict | None, seed: int, purpose: str, data: dict) -> Reply:
        """See `LanguageModel.chat` of `backends/base.py`."""
        del messages
        world, state = _world(data), None
        if purpose == "judge":
            parsed = {"drawable": world.drawable(data["caption"])}
        elif purpose == "describe":
            parsed, state = world.describe(data, schema, seed)
        elif purpose == "qa":
            pairs = world.ask(data, schema, seed)
            state = {"topics": {pair["question"]: pair.pop("topic") for pair in pairs if "topic" in pair}}
            parsed = {"pairs": pairs}
        elif purpose == "statement":
            parsed = {"statements": world.statements(data["pairs"], data)}
        elif purpose == "verify":
            parsed = {"correct": world.verify(data["question"], data["answer"], data)}
        else:
            raise ValueError(f"{purpose!r} is not a purpose of a request")
        return Reply(json.dumps(parsed, ensure_ascii=False), parsed, state=state)


class VisionModel:
    """An oracle that reads the state of the sample, never the pixels of its images."""

    name = "embedded-oracle"
    paid = False

    def __init__(self):
        self.settings = {"version": VERSION}

    def verify(
        self, images: list[Image.Image], messages: list[dict], question: str, answer: str, seed: int, data: dict
    ) -> Reply:
        """See `VisionModel.verify` of `backends/base.py`."""
        del images, messages, seed
        parsed = {"correct": _world(data).verify(question, answer, data)}
        return Reply(json.dumps(parsed), parsed)


class ImageGenerator:
    """Draws what the state or the description describes."""

    name = "embedded"
    paid = False

    def __init__(self):
        self.settings = {"version": VERSION}

    def draw(self, description: str, size: tuple[int, int], seed: int, data: dict) -> Image.Image:
        """See `ImageGenerator.draw` of `backends/base.py`."""
        return _world(data).draw(description, data, size, seed)
