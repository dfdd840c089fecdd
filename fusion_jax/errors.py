"""Errors meant for the person at the terminal: one sentence that names what is wrong and what is allowed."""

from fusion_jax.files import shown

_LONGEST = 1000  # characters of where a bad record lies, and of what is wrong with it


class UserError(Exception):
    """Wrong configuration or input files. Commands print the message without a traceback and exit with 2."""


def check(condition: bool, message: str) -> None:
    """UserError with that message unless the condition holds."""
    if not condition:
        raise UserError(message)


def first_line(error: BaseException) -> str:
    """What an error says, short enough for a sentence. Orbax hides the reason in the cause of what it raises."""
    while isinstance(error, KeyError) and error.__cause__ is not None:
        error = error.__cause__
    return (str(error).splitlines() or [""])[0][:300] or type(error).__name__


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
