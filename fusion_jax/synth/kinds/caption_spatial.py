"""Defines spatial captions, which state how things are placed relative to each other, in unusual ways."""

import re

from fusion_jax.synth.kinds.base import TEXT, Ask, Kind, listed, obj
from fusion_jax.synth.kinds.common import caption, caption_turns, drop_article, only_caption, stands_in
from fusion_jax.synth.replies import Invalid, one_line

RELATIONS = (
    r"(?:to|on|at|in) the (?:far )?(?:left|right|top|bottom|front|back|center|centre|middle)(?: side)?(?: of)?",
    r"(?:left|right) of",
    r"(?:in|on) (?:front|top) of",
    r"next to|close to|far from|on|in|inside|outside|above|over|below|under|underneath|beneath|behind|beside|between",
    r"among|around|near|against|across(?: from)?|opposite|along|atop|by|surrounding|surrounded by",
)
_RELATION = re.compile(r"\b(" + "|".join(RELATIONS) + r")\b", re.IGNORECASE)


def check(value: dict, data: dict) -> dict:
    del data
    text, relation = caption(value), one_line(value["relation"])
    if not stands_in(relation, text):
        raise Invalid("relation_not_in_caption", f"{relation!r} is not in the caption")
    if not _RELATION.search(relation):
        raise Invalid("no_relation", f"{relation!r} does not name a position")
    objects = list(dict.fromkeys(drop_article(one_line(name)) for name in value["objects"]))
    if len(objects) < 2:
        raise Invalid("too_few_objects", "a position relates two things: name at least two")
    for name in objects:
        if not stands_in(name, text):
            raise Invalid("object_not_in_caption", f"{name!r} is not in the caption")
    return {"caption": text, "objects": objects, "relation": relation}


def prose(text: str) -> dict | None:
    """The words before and after the first word of position."""
    answer = only_caption(text)
    place = _RELATION.search(answer["caption"]) if answer else None
    if not place:
        return None
    before = re.split(
        r"\b(?:is|are|sits?|sitting|stands?|standing|lies|lying|placed)\b", answer["caption"][: place.start()]
    )
    after = re.split(r"[,.;]", answer["caption"][place.end() :])
    return answer | {"objects": [before[0].strip(" ,"), after[0].strip()], "relation": place[0]}


KIND = Kind(
    name="caption_spatial",
    stage="stage1",
    describe=Ask(
        instructions=(
            "You rewrite a caption for a picture so that it is about position. Keep two or three of its things, or "
            "give a single thing a partner, and place them anew, otherwise than one would expect: left of, right of, "
            "above, below, behind, in front of, between, on, under. It must be possible to see. At most 12 words. Give "
            "the things and the words of position as they stand in your caption."
        ),
        form='{"caption": "...", "objects": ["...", "..."], "relation": "..."}',
        schema=obj(caption=TEXT, objects=listed(TEXT), relation=TEXT),
        check=check,
        prose=prose,
    ),
    descriptions=lambda answer: [answer["caption"]],
    ask=None,
    turns=caption_turns,
)
