"""Estimates how much more fits into a conversation on the page."""

from fusion_jax.data.sources import Record
from fusion_jax.inference.prompts import Prompts

# A typical question, to convert positions to words.
_TYPICAL = "Which of the two people in this picture is closer to the camera, and what is she holding in her hand?"
_NEW = "press New conversation to go on"


def space_left(prompts: Prompts, record: Record) -> str:
    """One sentence for the user of the page on how much more fits into the conversation.

    Args:
      record: the conversation, with the shortest next question at its end.
    """
    needs, question = prompts.measure(record)
    rounds, first = prompts.buckets.rounds[-1], len(record.turns) == 1
    left = prompts.buckets.lengths[-1] - needs.length
    if question and (first or prompts.config.guide == "all_rounds"):  # the vision encoder reads the next one as well
        left = min(left, prompts.buckets.questions[-1] - question)
    words = _rounded(left * len(_TYPICAL.split()) / len(prompts.tokenizer.encode(_TYPICAL)))
    if needs.rounds > rounds:
        used = f"All {rounds} rounds of this conversation are" if rounds > 1 else "The one round of a conversation is"
        return f"{used} used: {_NEW}."
    if words < 1:
        return f"No more words fit: {_NEW}." if not first else "No question fits beside this image."
    fit = f"about {words}{'' if first else ' more'} word{'s' if words > 1 else ''} fit{'' if words > 1 else 's'}"
    fit += "" if record.images or not first else ", fewer beside an image"
    if not needs.rounds:  # the model has no rounds to count
        return f"{fit[0].upper()}{fit[1:]}."
    last = ", the last one" if needs.rounds == rounds > 1 else ""
    return f"Round {needs.rounds} of {rounds}{last}; {fit}."


def _rounded(words: float) -> int:
    """The number rounded down to one that reads well after "about"."""
    step = next(step for most, step in ((20, 1), (100, 5), (1000, 10), (float("inf"), 100)) if words < most)
    return int(max(words, 0) // step) * step
