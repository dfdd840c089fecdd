"""Conversations in whole sentences, at most eight pairs."""

from fusion_jax.synth.kinds.base import Ask, Kind
from fusion_jax.synth.kinds.common import (
    DESCRIBE,
    GROUNDED,
    PAIRS_FORM,
    PAIRS_SCHEMA,
    check_pairs,
    only_pairs,
    plain_turns,
)

MOST, ANSWER_WORDS = 8, (5, 250)

KIND = Kind(
    name="conv_long",
    stage="stage1_5",
    describe=DESCRIBE,
    descriptions=lambda answer: [answer["description"]],
    ask=Ask(
        instructions=(
            "You write a conversation about a picture that you know from its description: 3 to 8 questions, each with "
            "an answer of one to five whole sentences that gives the details that can be seen. " + GROUNDED
        ),
        form=PAIRS_FORM,
        schema=PAIRS_SCHEMA,
        check=check_pairs(MOST, ANSWER_WORDS),
        prose=only_pairs,
        shows=("descriptions",),
    ),
    turns=plain_turns,
)
