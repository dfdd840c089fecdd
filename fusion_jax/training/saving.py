"""Decides when a stage saves its checkpoints, and sets aside those that skipped steps may have ruined."""

import logging
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from fusion_jax.config import RunConfig
from fusion_jax.errors import UserError
from fusion_jax.training.checkpoint import Checkpoints
from fusion_jax.training.state import TrainState
from fusion_jax.training.watch import Watch

log = logging.getLogger("fusion_jax")

FINAL_PATIENCE = 600.0  # seconds for which saving the last checkpoint of a stage is tried again
STOP_PATIENCE = 20.0  # the same for the checkpoint before the run ends on request


class Every:
    """A timer that is due every `minutes`; 0: never. With several processes the clock of process 0 decides for all."""

    def __init__(self, minutes: float):
        self._seconds = minutes * 60
        self.restart()

    def restart(self) -> None:
        self._begun = time.monotonic()

    def due(self, together: bool) -> bool:
        """Returns whether a save is due. `together`: processes may wait for each other here, as every few steps."""
        if not self._seconds:
            return False
        due = time.monotonic() - self._begun > self._seconds
        if jax.process_count() == 1:
            return due
        return together and bool(multihost_utils.broadcast_one_to_all(np.array(due)))


class Saver:
    """Saves the checkpoints of one stage.

    A checkpoint of a step holds the state of the input right after the batch of this step: save before the iterator
    moves on. With several processes all call every method at the same steps.
    """

    def __init__(self, config: RunConfig, checkpoints: Checkpoints, position: Callable[[int], dict], phase: Watch):
        """`position` returns the state of the input after a step."""
        self._config, self._checkpoints, self._position, self._phase = config, checkpoints, position, phase
        self._every = Every(config.checkpoint_minutes)

    def is_due(self, step: int) -> bool:
        return step % self._config.checkpoint_every == 0 or self._every.due(step % self._config.log_every == 0)

    def save(self, step: int, current: TrainState) -> float:
        """Starts a save in the background; returns the seconds that this took."""
        with self._phase("saving") as saved:
            if int(current.skipped_in_row):  # the parameters may be worthless
                log.warning("no checkpoint of step %d, whose loss, gradient or update is not finite", step)
            else:
                self._checkpoints.save(step, current, self._position(step))
        self._every.restart()
        return saved()

    def finish(self, step: int, current: TrainState, patience: float) -> None:
        """Saves and waits until the checkpoint is complete. Raises UserError if that fails for `patience` seconds."""
        with self._phase("saving"):
            self._checkpoints.finish(step, current, self._position(step), patience)

    def check_skipped(self, step: int, current: TrainState, values: dict[str, Any]) -> None:
        """Sets aside checkpoints that may be ruined, and raises UserError, if too many steps in a row were skipped."""
        in_row = int(current.skipped_in_row)
        if in_row < self._config.max_skipped_steps:
            return
        # The last update may have ruined the parameters, and a checkpoint of it would ruin the next start, too; but not
        # if they gave a finite loss and the next update alone is at fault.
        if not all(math.isfinite(float(values[name])) for name in ("total", "grad_norm")):
            self._checkpoints.distrust(step - in_row)
        raise UserError(
            f"{in_row} steps in a row had a loss, gradient or update that is not finite (max_skipped_steps="
            f"{self._config.max_skipped_steps}); lower the learning rate or look at the data of the last steps"
            + (", or at the parameters that the stage began with." if in_row == step else ".")
        )
