"""Makes captions and descriptions of every kind: draft -> scenes -> the answer to `describe`."""

import dataclasses
import random

from fusion_jax.synth.backends.base import Unusable
from fusion_jax.synth.worlds.scenes import compose, graph, write
from fusion_jax.synth.worlds.scenes.forms import CAPTION_KINDS, CONTRAST_KINDS
from fusion_jax.synth.worlds.scenes.graph import Scene
from fusion_jax.synth.worlds.scenes.parse import Draft

_TRIES = 20  # for captions of at most twelve words
_WRITERS = {
    "caption_color": write.color_caption,
    "caption_count": write.count_caption,
    "caption_scene": write.scene_caption,
    "caption_spatial": write.spatial_caption,
    "caption_text": write.text_caption,
}


def describe(kind: str, draft: Draft, rng: random.Random) -> tuple[dict, list[Scene]]:
    """The answer of a known kind (`forms.KINDS`) and its scenes: one, or a left and a right one.

    Raises:
      Unusable: no caption is short enough.
    """
    if kind in CAPTION_KINDS:
        return _caption(kind, draft, rng)
    if kind in CONTRAST_KINDS:
        left = compose.settle(compose.extend(draft, rng, rng.randint(3, 5)), rng)
        scenes = [left, compose.vary(left, rng)]
        rng.shuffle(scenes)  # a variation loses things more often than it gains some
        texts = [write.description(scene, rng, 120, 180) for scene in scenes]
        return dict(zip(("left", "right"), texts)), scenes
    if kind == "text_qa":
        scene = compose.settle(compose.extend(_with_room(draft), rng, rng.randint(3, 5), rng.randint(1, 3)), rng)
        texts = [group.text for group in scene.texts]
        return {"description": write.description(scene, rng, 110, 150), "texts": texts}, [scene]
    scene = compose.settle(compose.extend(draft, rng, rng.randint(3, 5)), rng)
    return {"description": write.description(scene, rng, 60, 180)}, [scene]


def _with_room(draft: Draft) -> Draft:
    """A draft that has room for a thing with a text, and has at most three texts itself."""
    part = _subset(draft, sorted(range(len(draft.groups)), key=lambda i: not draft.groups[i].text)[:3])
    for group in part.groups:
        group.count = min(group.count or 1, graph.MAX_OF_A_KIND)
    while sum(group.count for group in part.groups) >= graph.MAX_THINGS:
        max(part.groups, key=lambda group: group.count).count -= 1
    return part


def _subset(draft: Draft, numbers: list[int]) -> Draft:
    """The groups of these numbers, in that order, and the relations among them."""
    place = {number: k for k, number in enumerate(numbers)}
    relations = [(place[a], r, place[b]) for a, r, b in draft.relations if a in place and b in place]
    return Draft(draft.setting, [dataclasses.replace(draft.groups[i]) for i in numbers], relations)


def _caption(kind: str, draft: Draft, rng: random.Random) -> tuple[dict, list[Scene]]:
    """Writes a caption of at most twelve words about a scene with what the draft names, as far as twelve words allow.
    `caption_spatial` needs two things, `caption_text` one with a text."""
    order = list(range(len(draft.groups)))
    if kind == "caption_text":  # first the groups that carry a text already
        order.sort(key=lambda i: (not draft.groups[i].text, draft.groups[i].noun not in compose.CARRIERS))
    least, texts = (2 if kind == "caption_spatial" else 1), (1 if kind == "caption_text" else 0)
    for attempt in range(_TRIES):
        part = _subset(draft, order[: max(least, 3 - attempt // 6)])
        part = compose.extend(part, rng, least, texts, longest=4)
        scene = compose.settle(part, rng, colours=3 if kind == "caption_color" else None)
        answer = _WRITERS[kind](scene, rng)
        if answer:
            return answer, [scene]
    raise Unusable("too_long", f"no caption of {write.CAPTION_WORDS} words could be made of it")
