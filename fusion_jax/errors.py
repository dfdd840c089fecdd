"""Defines errors that tell the user in one sentence what is wrong and what is allowed."""

import difflib
from collections.abc import Iterable

from fusion_jax.files import shown

_LONGEST = 1000  # characters of `BadRecord.where` and of `BadRecord.detail`


class UserError(Exception):
    """The configuration or an input file is wrong. Commands print the message without a traceback and exit with 2."""


def check(condition: bool, message: str) -> None:
    """Raises UserError with this message unless the condition holds."""
    if not condition:
        raise UserError(message)


def nearest(name: object, known: Iterable[object]) -> str:
    """Returns `did you mean a or b?` with the known names most like this one; empty where there are none."""
    name, known = str(name)[:100], [str(one) for one in known]
    # One that is very like it, else those that contain it as a word, else any that is a little like it.
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.7)
    near = near or [one for one in known if difflib.get_close_matches(name, one.split("_"), cutoff=0.8)][:3]
    near = near or difflib.get_close_matches(name, known, n=3)
    return f"did you mean {' or '.join(near)}?" if near else ""


def no_key(place: str, key: str, known: Iterable[object]) -> UserError:
    """The error for an unknown key: `config.stages[0].weight_decy is not a key; did you mean weight_decay?`.

    Args:
      place: the mapping that has the key, such as `config.stages[0]`. key: as printed. known: the keys it may have.
    """
    known = [str(one) for one in known]
    return UserError(f"{place}.{key} is not a key; {nearest(key, known) or 'known keys: ' + ', '.join(known) + '.'}")


def check_choice(name: str, value: object, allowed: Iterable[object]) -> None:
    """Raises UserError unless the value is one of those allowed; it names them, and those that are most like the value.

    Args:
      name: what precedes the value in the message, `config.dtype=` or `task `.
    """
    allowed = list(allowed)
    if value not in allowed:
        printed = value if isinstance(value, int | float) else repr(str(value)[:100])
        near = nearest(value, allowed)
        raise UserError(
            f"{name}{printed} is unknown; allowed: {', '.join(map(str, allowed))}{f'; {near}' if near else '.'}"
        )


def first_line(error: BaseException) -> str:
    """The first line of an error's text, printable and short enough for a sentence; its type where it has no text.

    Orbax hides the reason in the cause of the KeyError that it raises.
    """
    while isinstance(error, KeyError) and error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return shown(lines[0], 300)


AGAIN = 75  # exit code (EX_TEMPFAIL) after which launchers restart a command, such as a run that saved and stopped


class RunAgain(Exception):
    """A run that should be started again: it was stopped and has saved, or its device has failed.

    Commands print the message and exit with AGAIN.
    """


class BadRecord(Exception):
    """A training record that cannot be used. It is skipped and counted under `reason`; the run continues.

    Attributes:
      reason: short machine-readable name, a metrics key, such as `missing_image`.
      where: the file and the record. detail: what is wrong. Both as `files.shown` prints them: text from a file may
        hold half a character, line breaks or a whole image.
    """

    def __init__(self, reason: str, where: str, detail: str):
        where, detail = shown(where, _LONGEST), shown(detail, _LONGEST)
        super().__init__(f"{where}: {detail}")
        self.reason = reason
        self.where = where
        self.detail = detail

    def __reduce__(self):
        return BadRecord, (self.reason, self.where, self.detail)
