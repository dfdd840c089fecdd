"""Defines colour captions, which state what has which colour, with at most three colours."""

import re

from fusion_jax.synth.kinds.base import TEXT, Ask, Kind, listed, obj
from fusion_jax.synth.kinds.common import caption, caption_turns, only_caption, stands_in
from fusion_jax.synth.replies import Invalid, one_line

MOST = 3
# Basic colour words and their common synonyms; two names of one colour count as one.
_BASIC = (
    "red",
    "orange",
    "yellow",
    "green",
    "blue",
    "purple",
    "pink",
    "brown",
    "black",
    "white",
    "gray",
    "gold",
    "silver",
)
NAMES = {name: name for name in _BASIC}
NAMES |= {"grey": "gray", "violet": "purple", "golden": "gold", "crimson": "red", "scarlet": "red", "navy": "blue"}
NAMES |= {"turquoise": "turquoise", "teal": "teal", "beige": "beige", "magenta": "magenta", "cyan": "cyan"}
NAMES |= {"maroon": "maroon", "lavender": "lavender", "tan": "tan", "cream": "cream", "olive": "olive"}


def colours(text: str) -> list[str]:
    """The colours a text names, each once, in order."""
    return list(dict.fromkeys(NAMES[word] for word in re.findall(r"[a-z]+", text.lower()) if word in NAMES))


def check(value: dict, data: dict) -> dict:
    del data
    text = caption(value)
    named = list(dict.fromkeys(one_line(colour).lower() for colour in value["colors"]))
    if missing := [colour for colour in named if not stands_in(colour, text)]:
        raise Invalid("colors_not_in_caption", f"{missing[0]!r} is not in the caption")
    # Colours that the model forgot to list count as well, and "light blue" is the blue that the caption names.
    known = colours(text)
    named += [colour for colour in known if not any(colour in colours(name) for name in named)]
    if not named:
        raise Invalid("no_color", "the caption names no colour")
    if len(named) > MOST:
        raise Invalid("too_many_colors", f"{len(named)} colours, the limit is {MOST}")
    return {"caption": text, "colors": named}


def prose(text: str) -> dict | None:
    answer = only_caption(text)
    if not answer:
        return None
    return answer | {"colors": [word for word in re.findall(r"[a-z]+", answer["caption"].lower()) if word in NAMES]}


KIND = Kind(
    name="caption_color",
    stage="stage1",
    describe=Ask(
        instructions=(
            "You rewrite a caption for a picture so that it is about colour. Keep its main things, give them colours "
            "that suit them or surprise, and leave the rest out. At most 12 words and at most 3 different colours. "
            "Each colour must belong to a thing. List the colours as they stand in your caption."
        ),
        form='{"caption": "...", "colors": ["...", ...]}',
        schema=obj(caption=TEXT, colors=listed(TEXT)),
        check=check,
        prose=prose,
    ),
    descriptions=lambda answer: [answer["caption"]],
    ask=None,
    turns=caption_turns,
)
