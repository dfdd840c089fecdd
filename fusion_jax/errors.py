"""Errors meant for the person at the terminal: one sentence that names what is wrong and what is allowed."""

import difflib
from collections.abc import Iterable

from fusion_jax.files import shown

_LONGEST = 1000  # characters of where a bad record lies, and of what is wrong with it


class UserError(Exception):
    """Wrong configuration or input files. Commands print the message without a traceback and exit with 2."""


def check(condition: bool, message: str) -> None:
    """UserError with that message unless the condition holds."""
    if not condition:
        raise UserError(message)


def nearest(name: object, known: Iterable[object]) -> str:
    """`did you mean a or b?` with the known names that are most like this one, else an empty text."""
    name, known = str(name)[:100], [str(one) for one in known]
    near = difflib.get_close_matches(name, known, n=3)
    near = near or [one for one in known if difflib.get_close_matches(name, one.split("_"), cutoff=0.8)][:3]
    return f"did you mean {' or '.join(near)}?" if near else ""


def no_key(place: str, key: str, known: Iterable[object]) -> UserError:
    """The error for a key that means nothing, `config.stages[0].weight_decy is no key; did you mean weight_decay?`.

    Args:
      place: of the mapping that has it. key: as printed. known: all that it may have.
    """
    known = [str(one) for one in known]
    return UserError(f"{place}.{key} is no key; {nearest(key, known) or 'known keys: ' + ', '.join(known) + '.'}")


def check_choice(name: str, value: object, allowed: Iterable[object]) -> None:
    """UserError unless the value is one of those allowed, naming them and those that are most like it.

    Args:
      name: what stands before the value, `config.dtype=` or `task `.
    """
    allowed = list(allowed)
    if value not in allowed:
        said = value if isinstance(value, int | float) else repr(str(value)[:100])
        near = nearest(value, allowed)
        raise UserError(
            f"{name}{said} is unknown; allowed: {', '.join(map(str, allowed))}{f'; {near}' if near else '.'}"
        )


def first_line(error: BaseException) -> str:
    """The first line of an error's text, printable and short enough for a sentence; its type where it has no text.

    Orbax hides the reason in the cause of the KeyError that it raises.
    """
    while isinstance(error, KeyError) and error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return shown(lines[0], 300)


AGAIN = 75  # exit code of what is to be started again by launchers (EX_TEMPFAIL), such as a run that stopped and saved


class RunAgain(Exception):
    """The run was asked to stop and has saved, or its device has failed, and it should be started again. Commands print
    the message and exit with AGAIN."""


class BadRecord(Exception):
    """One unusable training record. It is skipped and counted under `reason`; the run goes on.

    Attributes:
      reason: short machine-readable name, a metrics key (for example `missing_image`).
      where: file and record the message is about. detail: what is wrong. Both as `files.shown`: what a file says of
        itself may be half a character, a line's end or a whole image.
    """

    def __init__(self, reason: str, where: str, detail: str):
        where, detail = shown(where, _LONGEST), shown(detail, _LONGEST)
        super().__init__(f"{where}: {detail}")
        self.reason = reason
        self.where = where
        self.detail = detail

    def __reduce__(self):
        return BadRecord, (self.reason, self.where, self.detail)
