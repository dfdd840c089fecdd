"""How much more fits into a conversation on the page, in words for whoever writes there."""

from fusion_jax.data.sources import Record
from fusion_jax.inference.generate import Prompts

# A question like those that are asked, to say positions in words.
_LIKE = "Which of the two people in this picture is closer to the camera, and what is she holding in her hand?"
_ANEW = "press New conversation to go on"


def room(prompts: Prompts, record: Record) -> str:
    """One sentence. record: the conversation, with the shortest next question at its end."""
    takes, question = prompts.takes(record)
    rounds, first = prompts.buckets.rounds[-1], len(record.turns) == 1
    left = prompts.buckets.lengths[-1] - takes.length
    if question:  # the vision encoder reads the questions of all rounds
        left = min(left, prompts.buckets.questions[-1] - question)
    words = _about(left * len(_LIKE.split()) / len(prompts.tokenizer.encode(_LIKE)))
    if takes.rounds > rounds:
        used = f"All {rounds} rounds of this conversation are" if rounds > 1 else "The one round of a conversation is"
        return f"{used} used: {_ANEW}."
    if words < 1:
        return f"No more words fit: {_ANEW}." if not first else "No question fits beside this image."
    fit = f"about {words}{'' if first else ' more'} word{'s' if words > 1 else ''} fit{'' if words > 1 else 's'}"
    fit += "" if record.images or not first else ", fewer beside an image"
    if not takes.rounds:  # the model has no rounds to count
        return f"{fit[0].upper()}{fit[1:]}."
    last = ", the last one" if takes.rounds == rounds > 1 else ""
    return f"Round {takes.rounds} of {rounds}{last}; {fit}."


def _about(words: float) -> int:
    """Rounded down to what may be said with "about"."""
    step = next(step for most, step in ((20, 1), (100, 5), (1000, 10), (float("inf"), 100)) if words < most)
    return int(max(words, 0) // step) * step
