"""Defines scene captions, which show things in exactly one setting."""

import re

from fusion_jax.synth.kinds.base import TEXT, Ask, Kind, obj
from fusion_jax.synth.kinds.common import caption, caption_turns, drop_article, only_caption, stands_in
from fusion_jax.synth.replies import Invalid, one_line, words

# Settings that a caption may name besides the one that it declares.
_PLACES = """
    airport bathroom beach bedroom bridge cafe canyon cave church city classroom desert farm field forest
    garage garden harbor harbour island jungle kitchen lake library market meadow mountain mountains museum
    ocean office park restaurant river rooftop sea sky snow stadium station street studio swamp valley
    village waterfall
"""
PLACES = frozenset(_PLACES.split())
_PLACE = re.compile(
    r"\b(?:in|on|at|inside|by|near|under|before|against)\s++((?:an?|the)\s++)?([\w' -]{1,200}+)$", re.IGNORECASE
)


def check(value: dict, data: dict) -> dict:
    del data
    text, scene = caption(value), drop_article(one_line(value["scene"]))
    if not stands_in(scene, text):
        raise Invalid("scene_not_in_caption", f"{scene!r} is not in the caption")
    if re.search(r",|;|\band\b|\bor\b", scene):
        raise Invalid("several_scenes", "exactly one scene element is allowed")
    inside = {word.lower() for word in words(scene)}
    others = {word.lower() for word in words(text)} & PLACES - inside
    if others:
        raise Invalid("several_scenes", f"{sorted(others)[0]!r} is a second scene element")
    return {"caption": text, "scene": scene}


def prose(text: str) -> dict | None:
    answer = only_caption(text)
    place = _PLACE.search(answer["caption"].rstrip(".")) if answer else None
    return answer | {"scene": place[2]} if place else None


KIND = Kind(
    name="caption_scene",
    stage="stage1",
    describe=Ask(
        instructions=(
            "You rewrite a caption for a picture so that it sets its main things into one surrounding, indoors or "
            "outdoors: a kind of place, not a named one. Exactly one such scene element, at most 12 words. Give the "
            "scene element as it stands in your caption."
        ),
        form='{"caption": "...", "scene": "..."}',
        schema=obj(caption=TEXT, scene=TEXT),
        check=check,
        prose=prose,
    ),
    descriptions=lambda answer: [answer["caption"]],
    ask=None,
    turns=caption_turns,
)
