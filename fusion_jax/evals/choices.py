"""Multiple choice: how options are written into a prompt, and the published prompts' last lines."""

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from fusion_jax.errors import UserError
from fusion_jax.files import brief

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# As in the evaluation of LLaVA-1.5 and in lmms-eval, which the published figures were measured with.
BY_LETTER = "Answer with the option's letter from the given choices directly."
SHORT = "Answer the question using a single word or phrase."


def lettered(options: Sequence[str]) -> str:
    """One option a line: `A. cat`."""
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options))


def is_blank(value: object) -> bool:
    """Whether a cell holds nothing: no value, not a number, or white space."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def is_missing(value: object) -> bool:
    """Whether a hint or a category is blank, or one of the words that tables write for nothing."""
    return is_blank(value) or _word(value) in ("nan", "none")


def _word(value: object) -> str:
    return str(value).strip().lower()


def read_options(
    rows: Sequence[Mapping[str, Any]],
    letters: str,
    where: Callable[[Mapping[str, Any]], str],
    group: Callable[[Mapping[str, Any]], Hashable] = id,
    needed: bool = True,
) -> list[dict[str, str]]:
    """The options of each row of a table by their letters, without those that the row does not have.

    Blank cells at a row's end are no options, and neither is `nan` there, which data frames write for nothing. `None`
    is an option like others, unless some row of the file ends with it twice: then this file writes it for nothing. A
    word that stands before an option, or is the answer, in one of a question's rotations is an option in all of them.

    Args:
      rows: with the columns `letters`, as far as they have them, and `answer`.
      where: names a row for messages. group: what the rotations of a question have in common.
      needed: there are at least two options, and a letter as the answer; otherwise a row may have none.

    Raises:
      UserError: an option that is blank before another one, an answer that is none of the options, or too few options.
    """
    table = [[row.get(letter) for letter in letters] for row in rows]
    nothing, options = {"nan"}, set()
    for row, cells in zip(rows, table):
        last = max((i for i, cell in enumerate(cells) if not is_missing(cell)), default=-1)
        answer = letters.find(str(row.get("answer")).strip() or "?")
        options |= {(group(row), _word(cell)) for i, cell in enumerate(cells) if i < last or i == answer}
        if [_word(cell) for cell in cells[last + 1 :] if not is_blank(cell)].count("none") > 1:
            nothing.add("none")
    every = []
    for row, cells in zip(rows, table):
        empty = [
            is_blank(cell) or (_word(cell) in nothing and (group(row), _word(cell)) not in options) for cell in cells
        ]
        count = max((i + 1 for i, one in enumerate(empty) if not one), default=0)
        if any(empty[:count]):
            gap, after = letters[empty.index(True)], letters[count - 1]
            raise UserError(f"{where(row)}: the option {gap} is empty, and {after} behind it is not.")
        if count < 2 and (needed or count):
            raise UserError(f"{where(row)} has {count} options; a question has at least two.")
        answer = row.get("answer")
        if count and not is_missing(answer) and (needed or str(answer).strip() in LETTERS):
            place(answer, count, where(row))
        every.append({letter: _text(cell) for letter, cell in zip(letters, cells[:count])})
    return every


def _text(cell: object) -> str:
    """A column of whole numbers with empty cells in it is one of floats."""
    return str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell)


def place(answer: object, count: int, where: str) -> int:
    """The number from 0 of the option that a letter names. UserError where there is no such option."""
    letter = str(answer).strip()
    if len(letter) != 1 or letter not in LETTERS[:count]:
        raise UserError(f"{where}: the answer {brief(answer)} is none of its {count} options.")
    return LETTERS.index(letter)


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
