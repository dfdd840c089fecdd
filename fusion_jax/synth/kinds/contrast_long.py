"""Two pictures that differ, asked about with answers in sentences: at most seven pairs."""

from fusion_jax.synth.kinds.base import Ask, Kind
from fusion_jax.synth.kinds.common import PAIRS_FORM, PAIRS_SCHEMA, check_pairs, only_pairs, plain_turns
from fusion_jax.synth.kinds.contrast_short import GROUNDED, SIDES

MOST, ANSWER_WORDS = 7, (5, 250)

KIND = Kind(
    name="contrast_long",
    stage="stage1_5",
    describe=SIDES,
    descriptions=lambda answer: [answer["left"], answer["right"]],
    ask=Ask(
        instructions=(
            "You write a conversation about two pictures that you know from their descriptions, the left one first: 3 "
            "to 7 questions, each with an answer of one to five whole sentences. " + GROUNDED
        ),
        form=PAIRS_FORM,
        schema=PAIRS_SCHEMA,
        check=check_pairs(MOST, ANSWER_WORDS),
        prose=only_pairs,
        shows=("descriptions",),
    ),
    turns=plain_turns,
    images=2,
)
