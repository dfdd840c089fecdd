"""Conversations in short answers, at most eight pairs."""

from fusion_jax.synth.kinds.base import Ask, Kind
from fusion_jax.synth.kinds.common import (
    DESCRIBE,
    GROUNDED,
    PAIRS_FORM,
    PAIRS_SCHEMA,
    check_pairs,
    only_pairs,
    short_turns,
)

MOST, ANSWER_WORDS = 8, (1, 12)

KIND = Kind(
    name="conv_short",
    stage="stage1_5",
    describe=DESCRIBE,
    descriptions=lambda answer: [answer["description"]],
    ask=Ask(
        instructions=(
            "You write a conversation about a picture that you know from its description: 4 to 8 questions with short "
            "answers, a word or a phrase of at most 12 words. Some answers are no or none. " + GROUNDED
        ),
        form=PAIRS_FORM,
        schema=PAIRS_SCHEMA,
        check=check_pairs(MOST, ANSWER_WORDS),
        prose=only_pairs,
        shows=("descriptions",),
    ),
    turns=short_turns,
)
