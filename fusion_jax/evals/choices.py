"""Reads and writes the options of multiple choice questions, and finds the letter in an answer."""

import ast
import contextlib
import itertools
import re
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any

from fusion_jax.errors import UserError
from fusion_jax.files import brief

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# As in the evaluation of LLaVA-1.5 and in lmms-eval, which the published figures were measured with.
BY_LETTER = "Answer with the option's letter from the given choices directly."
SHORT = "Answer the question using a single word or phrase."


# The code that the tasks follow.
LMMS_EVAL = "lmms-eval 0.7.3"
LMMS_EVAL_OLD = "lmms-eval 0.3.0"  # the version at the time of the published figures
SCRIPTS = "FUSION-Code's evaluation scripts, April 2025"


def lettered(options: Sequence[str] | Mapping[str, str]) -> str:
    """Writes one option a line, such as `A. cat`. A mapping brings its own letters."""
    pairs = options.items() if isinstance(options, Mapping) else zip(LETTERS, options)
    return "\n".join(f"{letter}. {option}" for letter, option in pairs)


def is_blank(value: object) -> bool:
    """Whether a cell is empty: no value, NaN, or white space."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def is_missing(value: object) -> bool:
    """Whether a hint or a category is blank, or is a word that tables write for an empty cell."""
    return is_blank(value) or str(value).strip().lower() in ("nan", "none")


def as_text(cell: object) -> str:
    """The cell as text, with 3.0 as `3`, because a column of whole numbers with empty cells is read as floats."""
    return str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell)


def listed(cell: object, name: str) -> list[Any]:
    """The list in a cell, which may be the text of a Python list.

    Raises:
      UserError: it is neither; the characters of any other text would become its items.
    """
    value = cell
    if isinstance(cell, str):
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            value = ast.literal_eval(cell)
    if not isinstance(value, list | tuple):
        raise UserError(f"{name}: {brief(cell)} is not a list.")
    return list(value)


def read_options(
    rows: Sequence[Mapping[str, Any]],
    letters: str,
    where: Callable[[Mapping[str, Any]], str],
    group: Callable[[Mapping[str, Any]], Hashable] = id,
    needed: bool = True,
) -> list[dict[str, str]]:
    """The options of each row of a table by letter: those of the columns `letters` whose cells are not blank.

    Any text can be an option, also `None` and `nan`. But no question has the same option twice. So where some row of
    the file ends with one of these two words twice, the file uses the word for empty cells, and it is dropped from the
    ends of all rows. There is one exception: where one of a question's rotations has the word before another option,
    or as the answer, it is an option in all of them.

    Args:
      rows: mappings with `answer` and the columns of the options that they have.
      letters: columns that may hold options.
      where: names a row for messages. group: a key that the rotations of a question share.
      needed: whether a row must have at least two options and a letter as its answer; otherwise it may have no options,
        and its answer is not checked.

    Raises:
      UserError: an answer is not one of the options, or there are too few options.
    """
    every = [{x: as_text(row[x]) for x in letters if not is_blank(row.get(x))} for row in rows]
    nothing = {word for options in every if (word := _written_twice(options))}
    real = set()
    for row, options in zip(rows, every) if nothing else ():
        tail = _tail(options, nothing)
        answer = str(row.get("answer")).strip()
        real |= {(group(row), text) for letter, text in options.items() if letter not in tail or letter == answer}
    for row, options in zip(rows, every):
        for letter in _tail(options, {word for word in nothing if (group(row), word) not in real}):
            del options[letter]
        if len(options) < 2 and (needed or options):
            raise UserError(f"{where(row)} has {len(options)} options; a question has at least two.")
        if needed and not is_missing(row.get("answer")):
            place(row["answer"], list(options), where(row))
    return every


def _written_twice(options: Mapping[str, str]) -> str:
    """The word for an empty cell that a row has twice at its end; "" where there is none."""
    *_, before, last = ("", "", *options.values())
    return last if before == last and is_missing(last) else ""


def _tail(options: Mapping[str, str], nothing: Collection[str]) -> list[str]:
    """The letters of the options at the end that are one of these words."""
    return list(itertools.takewhile(lambda letter: options[letter] in nothing, reversed(options)))


def place(answer: object, letters: Sequence[str], where: str) -> int:
    """The index of the option that a letter names. Raises UserError where there is no such option."""
    letter = str(answer).strip()
    if letter not in list(letters):
        raise UserError(f"{where}: the answer {brief(answer)} is not one of its {len(letters)} options.")
    return list(letters).index(letter)


def yes_or_no(answer: object, where: str) -> str:
    """A reference, `yes` or `no` in any case, with or without a period. Raises UserError for any other text."""
    word = str(answer).strip().rstrip(".").lower()
    if word not in ("yes", "no"):
        raise UserError(f"{where}: the answer {brief(answer)} is neither yes nor no.")
    return word


def numbered(answer: object, where: str) -> str:
    """The letter of the option with an index. Raises UserError where there is no such option."""
    if not re.fullmatch(r"\d\d?(\.0*)?", number := str(answer).strip()) or float(number) >= len(LETTERS):
        raise UserError(f"{where}: the answer {brief(answer)} is not the number of an option; the first is 0.")
    return LETTERS[int(float(number))]


def find_letter(answer: str, options: dict[str, str]) -> str:
    """Finds the option that an answer names, by VLMEvalKit's rule of 2026, which MMBench's own evaluation uses.

    1. Some marks become spaces. If exactly one option's letter stands as a word of its own, and first does so among
       the last four words, that is it.
    2. Otherwise, if exactly one option's text is in the answer, which must not be over twice as long as all options
       together, that is it.

    A refusal, in one of four wordings, is Z. "" where neither holds.
    """
    if any(refusal in answer for refusal in _REFUSALS):
        return "Z"
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", answer).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and words.index(named[0]) >= len(words) - _LAST_WORDS:
        return named[0]
    if not named and "Z" in words:
        return "Z"
    lowered = answer.lower()
    if len(lowered) > 2 * sum(len(text) for text in options.values()):
        return ""
    in_words = [letter for letter, text in options.items() if text.lower() in lowered]
    return in_words[0] if len(in_words) == 1 else ""


_LAST_WORDS = 4
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


def scripted_letter(answer: str) -> str:
    """Finds the letter by the published models' own scripts for CV-Bench, MMVP and ScienceQA.

    It is a letter from A to F alone, or else the first one before a period, a comma or a line's end, or in brackets; ""
    where there is none.
    """
    if answer in tuple("ABCDEF"):
        return answer
    match = re.search(r"([A-F])\.|([A-F]),|([A-F])\n|\(([A-F])\)", answer)
    return match[match.lastindex] if match else ""


def ranked_letter(answer: str, letters: Sequence[str]) -> str:
    """Finds the letter by lmms-eval's general rule (its extract_mcq_answer): of all occurrences of a letter, the last
    one in the most trusted form; "" where there is none.

    The forms are, from the most trusted: at the start, at the end, somewhere after a phrase such as `answer is`, and
    `(A)`, `A.`, `A:`, `A)`, `A `. A letter inside a word counts only where none of these occurs.
    """
    text = answer.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    text = f" {text} "
    places = []  # rank, place, letter
    for rank, form in enumerate(_FORMS, 1):
        places += [(rank, text.rfind(form.format(x)), x) for x in letters if form.format(x) in text]
    lowered = text.lower()
    for phrase in _PHRASES:
        after = lowered.find(phrase) + len(phrase)
        if phrase in lowered:
            places += [(6, text.find(x, after), x) for x in letters if text.find(x, after) >= 0]
    core = text.strip()
    for x in letters:
        if core.endswith(x) and not core[-2:-1].isalpha():
            places.append((7, len(text), x))
        if core.startswith(x) and not core[1:2].isalpha():
            places.append((8, 0, x))
    places = places or [(0, text.rfind(x), x) for x in letters if x in text]
    return max(places, key=lambda one: one[:2])[2] if places else ""


_FORMS = ("{} ", "{})", "{}:", "{}.", "({})")
# All are needed: the first `the answer is` may come after the first `answer is`.
_PHRASES = (
    *(f"{which}answer is" for which in ("", "the ", "correct ", "the correct ", "best ", "the best ", "my ")),
    *(f"{which}option is" for which in ("correct ", "the correct ", "best ", "the best ")),
    *(f"{which}choice is" for which in ("", "the ", "correct ", "the correct ", "my ")),
    *("i choose", "i select", "i pick", "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)
