"""Defines conversations in whole sentences, with at most eight pairs."""

from fusion_jax.synth.kinds.base import Kind
from fusion_jax.synth.kinds.common import DESCRIBE, GROUNDED, plain_turns, questions

MOST, ANSWER_WORDS = 8, (5, 250)

KIND = Kind(
    name="conv_long",
    stage="stage1_5",
    describe=DESCRIBE,
    ask=questions(
        "You write a conversation about a picture that you know from its description: 3 to 8 questions, each with "
        "an answer of one to five whole sentences that gives the details that can be seen. " + GROUNDED,
        most=MOST,
        answer_words=ANSWER_WORDS,
    ),
    turns=plain_turns,
)
