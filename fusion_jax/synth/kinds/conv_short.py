"""Defines conversations with short answers, with at most eight pairs."""

from fusion_jax.synth.kinds.base import Kind
from fusion_jax.synth.kinds.common import DESCRIBE, GROUNDED, questions, short_turns

MOST, ANSWER_WORDS = 8, (1, 12)

KIND = Kind(
    name="conv_short",
    stage="stage1_5",
    describe=DESCRIBE,
    ask=questions(
        "You write a conversation about a picture that you know from its description: 4 to 8 questions with short "
        "answers, a word or a phrase of at most 12 words. Some answers are no or none. " + GROUNDED,
        most=MOST,
        answer_words=ANSWER_WORDS,
    ),
    turns=short_turns,
)
