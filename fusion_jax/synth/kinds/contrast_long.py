"""Asks about two pictures that differ: at most seven questions with answers in sentences."""

from fusion_jax.synth.kinds.base import Kind
from fusion_jax.synth.kinds.common import plain_turns, questions
from fusion_jax.synth.kinds.contrast_short import GROUNDED, SIDES

MOST, ANSWER_WORDS = 7, (5, 250)

KIND = Kind(
    name="contrast_long",
    stage="stage1_5",
    describe=SIDES,
    descriptions=lambda answer: [answer["left"], answer["right"]],
    ask=questions(
        "You write a conversation about two pictures that you know from their descriptions, the left one first: 3 "
        "to 7 questions, each with an answer of one to five whole sentences. " + GROUNDED,
        most=MOST,
        answer_words=ANSWER_WORDS,
    ),
    turns=plain_turns,
    images=2,
)
