"""Traces some steps of a stage, for XProf."""

import logging
from pathlib import Path

import jax

from fusion_jax.errors import UserError

log = logging.getLogger("fusion_jax")


class Profile:
    """A trace of the steps `first` to `last` for XProf, under `folder`. Steps are those of the stage.

    If the trace cannot be started or written, the log says so and training continues.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path):
        self._first, self._last = steps or (0, -1)
        self._folder, self._running = folder, False

    def before(self, step: int) -> None:
        if self._first <= step <= self._last and not self._running:
            try:
                jax.profiler.start_trace(str(self._folder))
                self._running = True
            except (RuntimeError, OSError) as error:
                self._give_up(error)

    def after(self, step: int, results) -> None:
        """Ends the trace after its last step, once the `results` of the step are computed."""
        if self._running and step >= self._last:
            jax.block_until_ready(results)
            if self.close():
                log.info("trace of steps %d to %d in %s", self._first, self._last, self._folder)

    def close(self) -> bool:
        """Ends a trace that is running; returns whether it was written."""
        if not self._running:
            return False
        self._running = False
        try:
            jax.profiler.stop_trace()
        except (RuntimeError, OSError) as error:
            self._give_up(error)
            return False
        return True

    def _give_up(self, error: Exception) -> None:
        self._first, self._last = 0, -1
        log.warning("no trace in %s: %s; training goes on", self._folder, error)


def parse_steps(text: str) -> tuple[int, int] | None:
    """Reads `5:7` as (5, 7), and an empty text as None. Raises UserError for any other text."""
    if not text:
        return None
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise UserError(f"--profile_steps={text!r} must be FIRST:LAST, two step numbers such as 20:25.")
    return int(first), int(last)
