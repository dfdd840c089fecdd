"""Saves and restores the checkpoints of a stage with Orbax: one atomic folder for each saved step.

    WORKDIR/<stage>/checkpoints/<step>/{params, train, data, about, files.*.json}

`params` holds the parameters, `train` the rest of the training state, `data` the state of the input. `about` (JSON: the
config of the run and its model, the tokenizer's files, the environment) makes a step folder self-describing:
`load_model` needs nothing else. `files` lists the sizes and checksums of all other files (`integrity.py`).
"""

import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.multihost import get_barrier_sync_fn

from fusion_jax.devices import distributed
from fusion_jax.errors import UserError, first_line
from fusion_jax.training import integrity
from fusion_jax.training.about import check_form, config_of, load_text
from fusion_jax.training.checkpoint_arrays import abstract, check_shapes, load_parts, raise_if_no_damage
from fusion_jax.training.checkpoint_folders import discard, remove, steps_in
from fusion_jax.training.state import TrainState

log = logging.getLogger("fusion_jax")


def _split(state: TrainState) -> tuple[dict, dict]:
    """Splits the parameters from the rest, so that they can be read alone."""
    rest = {
        "step": state.step,
        "opt_state": state.opt_state,
        "skipped": state.skipped,
        "skipped_in_row": state.skipped_in_row,
    }
    return state.params, rest


# Errors of a folder that is full, missing or slow; anything else is a bug.
_FOLDER_ERRORS = (OSError, ValueError, TimeoutError)
_WRITING = ".writing"  # suffix of a folder whose files are not all written and listed
_UNFINISHED = ("*.orbax-checkpoint-tmp*", f"*{_WRITING}", "*.deleting")
_PATIENCE_MS = 600_000  # milliseconds that a process waits for the others when a checkpoint is written or read
_READ_PATIENCE = 30.0  # seconds that a process which could not read it waits for the others


class Checkpoints:
    """The checkpoints of one stage, one folder for each saved step, written in the background.

    A save that fails costs that checkpoint, not the run: the log says so, and the next save tries again. With several
    processes all call every method at the same steps.
    """

    def __init__(self, folder: Path, about: dict[str, Any], keep: int = 3, keep_every: int = 0):
        """Creates the folder; raises OSError if that fails."""
        self.folder = folder.absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._about, self._keep, self._keep_every = about, keep, keep_every
        self._writer: threading.Thread | None = None
        self._written: int | None = None  # the newest checkpoint that is known to be intact
        self._problem = ""  # why the last save failed
        self._unexpected: BaseException | None = None
        ours = json.loads(about["json"])
        self._needed = [name for name in ("config", "tokenizer") if name in ours]
        self._compares = bool(ours.get("config"))  # the entry of a benchmark is empty
        self._replaces = True  # whether older checkpoints are deleted after the current save
        self._saves = 0
        self._meet = get_barrier_sync_fn()
        self._options = ocp.Context()
        # Random mantissas compress only by a tenth, which takes all cores for seconds.
        self._options.array.saving.use_compression = False
        # Otherwise a folder that cannot be created leaves threads that wait for it for minutes, even at exit.
        self._options.async_options.create_directories_asynchronously = False
        _silence_repetitions()
        self._sweep()

    def steps(self) -> list[int]:
        """Returns the steps of the complete checkpoints, oldest first."""
        return steps_in(self.folder)

    def save(self, step: int, state: TrainState, data: dict[str, Any]) -> None:
        """Starts saving, after waiting for the previous save.

        Args:
          state: if its last step was skipped, the parameters may be worthless, and no older checkpoint is deleted.
          data: state of the input iterator right after the batch of this step. JSON, the same in all processes.
        """
        self._wait()
        if all_agree(step == self._written):
            return
        self._replaces = not int(state.skipped_in_row)
        params, train = _split(state)
        items = {"params": params, "train": train, "data": {"json": json.dumps(data)}, "about": self._about}
        self._saves += 1
        try:
            with self._options:
                response = ocp.save_checkpointables_async(self.folder / f"{step}{_WRITING}", items, overwrite=True)
        except _FOLDER_ERRORS as error:
            self._report(step, error)
            return
        self._writer = threading.Thread(target=self._complete, args=(response, step), name="checkpoint", daemon=True)
        self._writer.start()

    def finish(self, step: int, state: TrainState, data: dict[str, Any], patience: float) -> None:
        """Saves as `save` does, but waits until the checkpoint is complete, and tries again for `patience` seconds.

        Raises:
          UserError: the checkpoint still cannot be written.
        """
        deadline, pause = time.monotonic() + patience, 1.0
        self.save(step, state, data)
        self._wait()
        while not all_agree(self._written == step):
            if not all_agree(time.monotonic() + pause < deadline):
                raise UserError(
                    f"The checkpoint of step {step} could not be written to {self.folder} ({self._problem}); make room "
                    f"or repair the folder and start again: training goes on from step {max(self.steps(), default=0)}."
                )
            time.sleep(pause)
            pause = min(2 * pause, 30.0)
            self.save(step, state, data)
            self._wait()

    def restore(
        self, like: TrainState, accept: Callable[[int, Any], None] | None = None
    ) -> tuple[int, TrainState, dict[str, Any]] | None:
        """Restores the newest intact checkpoint; newer ones that are damaged are set aside, and the log says so.

        Args:
          like: arrays or `jax.ShapeDtypeStruct`s: shapes, dtypes and shardings to restore into, on whatever mesh the
            checkpoint was written.
          accept: called with a step and the state of the input; raises if that is invalid, as in a damaged checkpoint.

        Returns:
          Step, training state and the state of the input; None if there is no checkpoint.

        Raises:
          UserError: there are checkpoints, but none is intact, or one process alone cannot read it.
        """
        like = abstract(like)
        damaged: dict[int, str] = {}
        # The steps that process 0 sees: on a shared disk others may not see a new name yet, or still see an old one.
        for step in reversed(distributed.gather(self.steps())[0]):
            folder = self.folder / str(step)
            damage = integrity.problem(folder, jax.process_index(), jax.process_count())
            data = state = None
            if all_agree(damage is None):
                if integrity.unlisted(folder):
                    log.warning("checkpoint %s has no list of its files: their bytes cannot be checked", folder)
                # Small parts that may be wrong are read before the arrays, which take long and need all processes.
                data, damage = _try_to_load(self._load_data, folder, step, accept)
                if all_agree(damage is None):
                    state, damage = _try_to_load(self._load_state, folder, like)
                    read_by_all(folder, damage)
                if all_agree(state is not None):
                    self._set_aside(damaged, step)
                    self._written = step
                    return step, state, data
            damaged[step] = damage or "another process found it damaged"
            log.warning("checkpoint %s is damaged: %s", folder, damaged[step])
        if damaged:
            raise UserError(
                f"No checkpoint in {self.folder} is intact (step {max(damaged)}: {damaged[max(damaged)]}); move that "
                "folder away to begin the stage again."
            )
        return None

    def _load_data(self, folder: Path, step: int, accept) -> dict[str, Any]:
        """Reads the state of the input from a step folder, and checks all of its JSON parts."""
        data = load_text(folder, "data")
        about = check_form(load_text(folder, "about"), self._needed)
        if self._compares:
            config_of(about, "its about")
        if accept is not None:
            accept(step, data)
        return data

    def _load_state(self, folder: Path, like: TrainState) -> TrainState:
        params, train = _split(like)
        items = load_parts(folder, {"params": params, "train": train})
        state = TrainState(params=items["params"], **items["train"])
        check_shapes(state, like)
        return state

    @property
    def writing(self) -> bool:
        """Whether a save is still running in the background."""
        return self._writer is not None and self._writer.is_alive()

    def distrust(self, first: int) -> None:
        """Sets aside the checkpoints from step `first` on, whose parameters have not given a finite loss.

        If there is no older one, they stay, with a warning: a person must decide whether to begin the stage again.
        """
        self._wait()
        steps = self.steps()
        doubtful = [step for step in steps if step >= first]
        if doubtful and doubtful == steps:
            log.warning(
                "no step after those saved in %s was finite, and there is no older checkpoint; "
                "move that folder away to begin the stage again",
                self.folder,
            )
            return
        self._written = None
        for step in doubtful:
            log.warning("%s is kept as %d.diverged: no step after it was finite", self.folder / str(step), step)
            try:
                self._rename(step, "diverged")
            except OSError as error:
                log.warning("it could not be renamed: %s", first_line(error))

    def close(self) -> None:
        """Waits for the last save."""
        self._wait()

    def _complete(self, response, step: int) -> None:
        """Waits for a save, gives its folder its final name, and deletes the checkpoints that are no longer kept."""
        try:
            response.result()
            self._list_and_name(step)
            self._written, self._problem = step, ""
        except _FOLDER_ERRORS as error:
            self._report(step, error)
            return
        except BaseException as error:  # raised again when the training loop waits
            self._unexpected = error
            return
        try:
            self._delete_old()
        except OSError as error:
            log.warning("an old checkpoint stays in %s: %s", self.folder, first_line(error))

    def _list_and_name(self, step: int) -> None:
        """Lists the files of a complete folder, and gives it the name of a checkpoint when each process has done so.

        Raises:
          OSError: a list could not be written or the folder not be renamed, here or by another process.
        """
        writing, final = self.folder / f"{step}{_WRITING}", self.folder / str(step)

        def name():
            if jax.process_index() == 0:
                for process in range(jax.process_count()):
                    if not (writing / f"files.{process}.json").is_file():
                        raise OSError(f"process {process} could not list its files")
                discard(final)
                writing.rename(final)

        problem = None
        # Whatever fails here, the other processes wait at both barriers.
        for number, action in enumerate((lambda: integrity.write(writing, jax.process_index()), name)):
            try:
                if problem is None:
                    action()
            except OSError as error:
                problem = error
            self._meet(key=f"{final}.{self._saves}.{number}", timeout_ms=_PATIENCE_MS)
        if problem is None and not final.is_dir():
            problem = OSError("another process could not list its files, or name the folder")
        if problem is not None:
            raise problem

    def _wait(self) -> None:
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._unexpected is not None:
            raise self._unexpected

    def _report(self, step: int, error: BaseException) -> None:
        self._problem = first_line(error)
        log.warning("no checkpoint of step %d: %s; training goes on, the next save tries again", step, self._problem)
        self._sweep()  # unfinished files take the space of the next attempt

    def _delete_old(self) -> None:
        if jax.process_index() == 0 and self._replaces:
            for step in self.steps()[: -self._keep]:
                if not (self._keep_every and step % self._keep_every == 0):
                    discard(self.folder / str(step))

    def _sweep(self) -> None:
        if jax.process_index() == 0:
            for pattern in _UNFINISHED:
                for path in self.folder.glob(pattern):
                    remove(path)

    def _set_aside(self, damaged: dict[int, str], used: int) -> None:
        for step in damaged:
            log.warning("going back to step %d; %s is kept as %d.damaged", used, self.folder / str(step), step)
            self._rename(step, "damaged")

    def _rename(self, step: int, reason: str) -> None:
        """Renames a checkpoint so that it is no longer used."""
        if jax.process_index() == 0:
            target = self.folder / f"{step}.{reason}"
            remove(target)
            (self.folder / str(step)).rename(target)


def _try_to_load(load: Callable, *arguments) -> tuple[Any, str | None]:
    """Returns the result of loading and None, or None and a description of the damage."""
    try:
        return load(*arguments), None
    except Exception as error:  # damage raises other errors in each part and library
        raise_if_no_damage(error)
        return None, first_line(error)


def all_agree(here: bool) -> bool:
    """Returns whether a condition holds in every process. A collective."""
    if jax.process_count() == 1:
        return here
    return bool(np.all(multihost_utils.process_allgather(np.array(here))))


def read_by_all(folder: Path, damage: object) -> None:
    """Raises UserError if only this process could not read a checkpoint (`damage`): in Orbax the others wait for it."""
    patience = _PATIENCE_MS / 1000 if damage is None else _READ_PATIENCE
    if not distributed.meet(f"read/{folder.absolute()}", patience):
        raise UserError(
            f"The checkpoint {folder} cannot be read by every process ({damage or 'another process does not answer'})."
        )


class _NotRepeated(logging.Filter):
    """Orbax logs a failed save once per thread that it passes through, each with its traceback; we log it once."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "_SignalingThread.run() raised" not in str(record.msg)


def _silence_repetitions() -> None:
    absl_log = logging.getLogger("absl")
    if not any(isinstance(known, _NotRepeated) for known in absl_log.filters):
        absl_log.addFilter(_NotRepeated())
