"""Implements the world of drawn scenes, where every word and every pixel follows from a scene graph.

    caption --parse--> draft --settle--> scene graph --write--> description, caption
                                             |--------draw----> image
                                             |--------ask-----> questions and answers, true by construction
                                             `-------claims---> is this answer right?

The graph is the sample's state. Where there is none, because another model wrote the description, the description is
parsed, and refused where it cannot be drawn as it is. The functions are those listed in `synth/worlds`.
"""

from collections.abc import Iterator
from typing import Any

from PIL import Image

from fusion_jax.synth.backends.base import Unusable
from fusion_jax.synth.worlds.scenes import (
    claims,
    compose,
    conversations,
    descriptions,
    drawing,
    graph,
    reading,
    write,
)
from fusion_jax.synth.worlds.scenes.forms import likeness
from fusion_jax.synth.worlds.scenes.graph import Scene
from fusion_jax.synth.worlds.scenes.parse import parse

STYLES = ("scenes",)
_SHORT = 20  # most words of a caption; a longer description is a paragraph


def captions(count: int, seed: int, style: str = "scenes") -> Iterator[str]:
    """Yields captions of random scenes, each a function of the seed and its number."""
    del style
    for number in range(count):
        rng = graph.generator(seed, "pool", number)
        texts = rng.choices((0, 1, 2), (8, 3, 1))[0]
        scene = compose.settle(compose.random_draft(rng, rng.choices((1, 2, 3), (2, 5, 4))[0], texts), rng)
        yield write.pool_caption(scene, rng)


def owns(request: dict[str, Any]) -> bool:
    """Always true: requests that no other world owns are about a scene."""
    del request
    return True


def drawable(caption: str) -> bool:
    """Whether the caption names anything that can be drawn."""
    return bool(parse(caption).groups)


def describe(request: dict[str, Any], schema: dict | None, seed: int) -> tuple[dict, dict]:
    """The answer, and as the state its scenes and what they keep of the caption."""
    rng = graph.generator(seed, "describe", request["kind"])
    kind = likeness(request["kind"], "describe", schema)
    draft = parse(request["caption"])
    if not draft.groups:
        raise Unusable("not_drawable", "the caption names nothing that the embedded backend can draw")
    answer, scenes = descriptions.describe(kind, draft, rng)
    # One of two scenes differs from the caption's on purpose.
    readings = [reading.read(request["caption"], scene) for scene in scenes]
    best = max(readings, key=lambda each: each.kept_share)
    return answer, {"scenes": [graph.to_json(scene) for scene in scenes], "reading": best.to_json()}


def ask(request: dict[str, Any], schema: dict | None, seed: int) -> list[dict]:
    """Questions about the request's scenes with true answers."""
    rng = graph.generator(seed, "qa", request["kind"])
    return conversations.ask(request["kind"], schema, scenes_of(request), rng)


def statements(pairs: list[dict], request: dict[str, Any]) -> list[str]:
    """Each question with its answer as one statement, whether the answer is right or not."""
    scenes = scenes_of(request)
    return [conversations.statement(pair, scenes) for pair in pairs]


def verify(question: str, answer: str, request: dict[str, Any]) -> bool:
    """Whether the answer is right by the scene graph."""
    return claims.correct(question, answer, scenes_of(request))


def draw(description: str, request: dict[str, Any], size: tuple[int, int], seed: int) -> Image.Image:
    """Draws the request's scene number `index`, or the description where the request has no state."""
    index = request.get("index", 0)
    scenes = scenes_of({"descriptions": [description] * (index + 1), "state": request.get("state")})
    return drawing.draw(scenes[index], size, seed)


def scenes_of(request: dict[str, Any]) -> list[Scene]:
    """The scenes of a request, from its state or else parsed from its descriptions.

    Raises:
      Unusable: the state is broken, or a description cannot be drawn.
    """
    state = request.get("state")
    try:
        if isinstance(state, dict) and "scenes" in state:
            return [graph.from_json(each) for each in state["scenes"]]
        return [_read_exactly(description) for description in request["descriptions"]]
    except compose.Impossible as error:
        raise Unusable("not_drawable", str(error)) from None
    except ValueError as error:
        raise Unusable("foreign_state", str(error)) from None


def _read_exactly(description: str) -> Scene:
    """The scene of a description; a hash of the text decides what it leaves open. Raises `compose.Impossible` where it
    cannot be drawn, or where the scene keeps too little of it."""
    scene = compose.settle(parse(description), graph.generator(description), exact=True)
    result = reading.read(description, scene)
    # A paragraph also describes light and style, and only a fraction of its words are things.
    short = write.count_words(description) <= _SHORT
    if result.kept_share < (reading.KEPT_MIN if short else reading.PARAGRAPH_MIN):
        raise compose.Impossible(reading.complaint(result.to_json()))
    return scene
