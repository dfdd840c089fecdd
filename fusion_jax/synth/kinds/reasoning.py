"""Defines questions that need reasoning: at most six pairs, with answers of at least 100 words."""

from fusion_jax.synth.kinds.base import Kind
from fusion_jax.synth.kinds.common import DESCRIBE, plain_turns, questions

MOST, ANSWER_WORDS = 6, (100, 500)

KIND = Kind(
    name="reasoning",
    stage="stage1_5",
    describe=DESCRIBE,
    ask=questions(
        "You write questions that take several steps of thought about a picture that you know from its "
        "description: 1 to 6 of them, about causes, purposes, what may happen next, what follows from positions "
        "and numbers, how things belong together. Each answer has at least 100 words: it first names what can be "
        "seen, then reasons from it step by step to a conclusion. The person who answers sees only the picture, "
        "never the description: do not mention a description. Every step must rest on what is clearly there, "
        "or clearly not there.",
        most=MOST,
        answer_words=ANSWER_WORDS,
    ),
    turns=plain_turns,
)
