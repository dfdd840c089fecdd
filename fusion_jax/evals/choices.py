"""Multiple choice: how options are written into a prompt, and the published prompts' last lines."""

import re
from collections.abc import Sequence

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# As in the evaluation of LLaVA-1.5 and in lmms-eval, which the published figures were measured with.
BY_LETTER = "Answer with the option's letter from the given choices directly."
SHORT = "Answer the question using a single word or phrase."


def lettered(options: Sequence[str]) -> str:
    """One option a line: `A. cat`."""
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options))


def is_missing(value: object) -> bool:
    """How tables say that there is no such option or hint."""
    return value is None or value != value or str(value).strip().lower() in ("", "nan", "none")


def find_letter(answer: str, options: dict[str, str]) -> str:
    """The option that an answer names, by VLMEvalKit's rule, which MMBench's own evaluation uses.

    1. Some marks become spaces. If exactly one option's letter stands as a word of its own, that is it.
    2. Otherwise, if exactly one option's text is in the answer, which must not be over twice as long as all options
       together, that is it.

    A refusal, in one of four wordings, is Z. "" where neither holds.
    """
    if any(refusal in answer for refusal in _REFUSALS):
        return "Z"
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", answer).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1:
        return named[0]
    if not named and "Z" in words:
        return "Z"
    said = answer.lower()
    if len(said) > 2 * sum(len(text) for text in options.values()):
        return ""
    told = [letter for letter, text in options.items() if text.lower() in said]
    return told[0] if len(told) == 1 else ""


_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
