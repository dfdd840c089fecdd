"""Asks about two pictures that differ: at most seven questions with short answers.

The prompt for the pictures is shared with contrast_long.
"""

import re

from fusion_jax.synth import replies
from fusion_jax.synth.kinds.base import TEXT, Ask, Kind, obj
from fusion_jax.synth.kinds.common import limit_words, questions, short_turns
from fusion_jax.synth.replies import Invalid, clean_text

MOST, ANSWER_WORDS = 7, (1, 12)
DESCRIPTION_WORDS = (120, 180)
_LEFT, _RIGHT = (
    re.compile(rf"^[^\w\n]{{0,20}}{side}\b[^\n:]{{0,200}}:", re.IGNORECASE | re.MULTILINE) for side in ("left", "right")
)


def check_sides(value: dict, data: dict) -> dict:
    del data
    sides = {side: clean_text(value[side]) for side in ("left", "right")}
    for side, text in sides.items():
        limit_words(text, *DESCRIPTION_WORDS, f"the {side} description")
    if sides["left"].lower() == sides["right"].lower():
        raise Invalid("no_contrast", "both descriptions are the same")
    return sides


def sides_from_prose(text: str) -> dict | None:
    answer = replies.prose(text)
    left = _LEFT.search(answer)
    right = _RIGHT.search(answer, left.end()) if left else None
    if not (left and right):
        return None
    marks = ' *#\n\t"“”-_'
    return {"left": answer[left.end() : right.start()].strip(marks), "right": answer[right.end() :].strip(marks)}


SIDES = Ask(
    instructions=(
        "You turn a short caption into the descriptions of two pictures for an image generator, a left and a right "
        "one. They are about the same subject but differ in three to five things that can clearly be seen: objects, "
        "numbers, colours, positions, actions or surroundings. Each description is one paragraph of 120 to 180 words "
        "that stands on its own: it does not mention the other picture, left, right or the difference. Only describe "
        "what the eye can see; no names of living people, no written text."
    ),
    form='{"left": "...", "right": "..."}',
    schema=obj(left=TEXT, right=TEXT),
    check=check_sides,
    prose=sides_from_prose,
)

GROUNDED = (
    'The person who answers sees only the two pictures, never the descriptions: call them "the left image" and "the '
    'right image" and do not mention descriptions. Most questions compare both. Ask only about what is clearly there, '
    "or clearly not there, in each."
)

KIND = Kind(
    name="contrast_short",
    stage="stage1_5",
    describe=SIDES,
    descriptions=lambda answer: [answer["left"], answer["right"]],
    ask=questions(
        "You write a conversation about two pictures that you know from their descriptions, the left one first: 3 "
        "to 7 questions with short answers, a word or a phrase of at most 12 words. " + GROUNDED,
        most=MOST,
        answer_words=ANSWER_WORDS,
    ),
    turns=short_turns,
    images=2,
)
