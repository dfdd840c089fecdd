"""Checkpoints with Orbax: parameters, optimizer, input iterator, config and tokenizer in one atomic folder a step.

    WORKDIR/<stage>/checkpoints/<step>/{params, train, data, about, files.*.json}

`about` (JSON: the run's config with the model's in it, the tokenizer's files, the environment) makes a step folder
self-describing: `load_model` needs nothing else. `files` says what the others must look like (`integrity.py`).
"""

import base64
import importlib.metadata
import json
import logging
import platform
import shutil
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from jax.experimental import multihost_utils

from fusion_jax import integrity
from fusion_jax.config import RunConfig, from_dict, to_dict
from fusion_jax.data.tokenizer import Tokenizer, load_tokenizer
from fusion_jax.errors import UserError
from fusion_jax.models import fusion
from fusion_jax.state import TrainState

log = logging.getLogger("fusion_jax")

FOLDER = "checkpoints"


def _abstract(tree):
    """Shapes, dtypes and shardings; what has no sharding yet goes to the first device."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or here), tree)


def _split(state: TrainState) -> tuple[dict, dict]:
    """Parameters apart from the rest, so that they can be read alone."""
    rest = {
        "step": state.step,
        "opt_state": state.opt_state,
        "skipped": state.skipped,
        "skipped_in_row": state.skipped_in_row,
    }
    return state.params, rest


# What a folder that is full, gone or slow raises; anything else is a mistake of ours.
_TROUBLE = (OSError, ValueError, TimeoutError)
_DAMAGE = (OSError, ValueError, KeyError, ocp.errors.InvalidLayoutError)
_UNFINISHED = ("*.orbax-checkpoint-tmp*", "*.deleting")


class Checkpoints:
    """The checkpoints of one stage: one folder a step, written in the background.

    A save that fails costs that checkpoint, not the run: it is reported, and the next save tries again. With several
    processes all call every method at the same steps.
    """

    def __init__(self, folder: Path, about: dict[str, Any], keep: int = 3, keep_every: int = 0):
        self.folder = folder.absolute()
        self._about, self._keep, self._keep_every = about, keep, keep_every
        self._writer: threading.Thread | None = None
        self._written: int | None = None  # the newest checkpoint that is known to be whole
        self._problem = ""  # of the last save
        self._unexpected: BaseException | None = None
        self._options = ocp.Context()
        # Random mantissas compress by a tenth, at the price of all cores for seconds.
        self._options.array.saving.use_compression = False
        # In the background, a folder that cannot be made leaves threads that wait for it for minutes, at exit too.
        self._options.async_options.create_directories_asynchronously = False
        _silence_repetitions()
        self._sweep()

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        return steps_in(self.folder)

    def save(self, step: int, state: TrainState, data: dict[str, Any]) -> None:
        """Starts saving; waits for the save before this one.

        Args:
          data: state of the input iterator right behind the batch of this step. JSON, the same in all processes.
        """
        self._wait()
        if step == self._written:
            return
        params, train = _split(state)
        items = {"params": params, "train": train, "data": {"json": json.dumps(data)}, "about": self._about}
        try:
            with self._options:
                response = ocp.save_checkpointables_async(self.folder / str(step), items, overwrite=True)
        except _TROUBLE as error:
            self._report(step, error)
            return
        self._writer = threading.Thread(target=self._complete, args=(response, step), name="checkpoint", daemon=True)
        self._writer.start()

    def finish(self, step: int, state: TrainState, data: dict[str, Any], patience: float) -> None:
        """Like `save`, but returns only when the checkpoint is complete; tries again for `patience` seconds.

        Raises:
          UserError: it still fails.
        """
        deadline, pause = time.monotonic() + patience, 1.0
        self.save(step, state, data)
        self._wait()
        while not _all_agree(self._written == step):
            if not _all_agree(time.monotonic() + pause < deadline):
                raise UserError(
                    f"The checkpoint of step {step} could not be written to {self.folder} ({self._problem}); make room "
                    f"or repair the folder and start again: training goes on from step {max(self.steps(), default=0)}."
                )
            time.sleep(pause)
            pause = min(2 * pause, 30.0)
            self.save(step, state, data)
            self._wait()

    def restore(self, like: TrainState) -> tuple[int, TrainState, dict[str, Any]] | None:
        """The newest checkpoint that is whole; damaged ones before it are set aside, and the log says so.

        Args:
          like: arrays or `jax.ShapeDtypeStruct`s: shapes, dtypes and shardings to restore into, whatever wrote them.

        Returns:
          Step, state and the input iterator's state; None where there is no checkpoint.

        Raises:
          UserError: there are checkpoints, but none is whole.
        """
        params, train = _split(_abstract(like))
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            folder = self.folder / str(step)
            found = integrity.problem(folder, jax.process_index(), jax.process_count())
            if _all_agree(found is None):
                try:
                    items = ocp.load_checkpointables(folder, {"params": params, "train": train, "data": None})
                    data = json.loads(items["data"]["json"])
                except _DAMAGE as error:
                    found = _first_line(error)
                else:
                    self._set_aside(damaged, step)
                    self._written = step
                    return step, TrainState(params=items["params"], **items["train"]), data
            damaged[step] = found or "another process found it damaged"
            log.warning("checkpoint %s is damaged: %s", folder, damaged[step])
        if damaged:
            raise UserError(
                f"No checkpoint in {self.folder} is whole (step {max(damaged)}: {damaged[max(damaged)]}); move that "
                "folder away to begin the stage again."
            )
        return None

    @property
    def writing(self) -> bool:
        """Whether a save is still going on in the background."""
        return self._writer is not None and self._writer.is_alive()

    def close(self) -> None:
        """Waits for the last save."""
        self._wait()

    def _complete(self, response, step: int) -> None:
        """Waits for a save, lists its files, and deletes the checkpoints that are no longer kept."""
        try:
            response.result()
            integrity.write(self.folder / str(step), jax.process_index())
            self._written, self._problem = step, ""
            self._delete_old()
        except _TROUBLE as error:
            self._report(step, error)
        except BaseException as error:  # raised where the training loop waits
            self._unexpected = error

    def _wait(self) -> None:
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._unexpected is not None:
            raise self._unexpected

    def _report(self, step: int, error: BaseException) -> None:
        self._problem = _first_line(error)
        log.warning("no checkpoint of step %d: %s; training goes on, the next save tries again", step, self._problem)
        self._sweep()  # what was half written takes the room of the next attempt

    def _delete_old(self) -> None:
        if jax.process_index() == 0:
            for step in self.steps()[: -self._keep]:
                if not (self._keep_every and step % self._keep_every == 0):
                    # Renamed first: a kill in between leaves no checkpoint that looks whole and is not.
                    _remove((self.folder / str(step)).rename(self.folder / f"{step}.deleting"))

    def _sweep(self) -> None:
        if jax.process_index() == 0:
            for pattern in _UNFINISHED:
                for path in self.folder.glob(pattern):
                    _remove(path)

    def _set_aside(self, damaged: dict[int, str], used: int) -> None:
        for step in damaged:
            log.warning("going back to step %d; %s is kept as %d.damaged", used, self.folder / str(step), step)
            if jax.process_index() == 0:
                target = self.folder / f"{step}.damaged"
                _remove(target)
                (self.folder / str(step)).rename(target)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


def _all_agree(here: bool) -> bool:
    """Whether it holds in every process."""
    if jax.process_count() == 1:
        return here
    return bool(np.all(multihost_utils.process_allgather(np.array(here))))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


class _NotRepeated(logging.Filter):
    """Orbax logs a failed save once per thread that it passes through, each with its traceback; we say it once."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "_SignalingThread.run() raised" not in str(record.msg)


def _silence_repetitions() -> None:
    absl_log = logging.getLogger("absl")
    if not any(isinstance(known, _NotRepeated) for known in absl_log.filters):
        absl_log.addFilter(_NotRepeated())


def steps_in(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a stage's checkpoint folder, oldest first."""
    return sorted(int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit())


def describe(
    config: RunConfig,
    tokenizer: Tokenizer | None,
    origin: dict[str, Any] | None = None,
    records: dict[str, int] | None = None,
) -> dict[str, str]:
    """The `about` entry of a checkpoint: one JSON text, because Orbax writes a file entry per leaf.

    Args:
      origin: what an import keeps of the folder it read, for the way back (see `interop.importing.Plan`).
      records: number of them in each stage's data.
    """
    files = {}
    if tokenizer is not None:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save(folder)
            files = {path.name: base64.b64encode(path.read_bytes()).decode() for path in sorted(Path(folder).iterdir())}
    about = {
        "config": to_dict(config),
        "tokenizer": files,
        "origin": origin or {},
        "records": records or {},
        "environment": environment(),
    }
    return {"json": json.dumps(about)}


def environment() -> dict[str, Any]:
    """What a run depends on beside its config: versions, devices, the commit where it runs from a git checkout."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    here = Path(__file__).parents[1]
    commit = None
    if (here / ".git").exists() and shutil.which("git"):
        done = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=here, capture_output=True)
        commit = done.stdout.decode().strip() or None
    return {
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in names},
        "devices": {
            "kind": jax.devices()[0].device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
        },
        "commit": commit,
        "started": time.strftime("%F %T %z"),
    }


@dataclass(frozen=True)
class Loaded:
    """A trained model: its run config, parameters (float32, nested dict), tokenizer and step folder."""

    config: RunConfig
    params: dict
    tokenizer: Tokenizer
    folder: Path
    step: int


def find(path: str | Path) -> Path:
    """The step folder that `path` means: a step folder, a stage's folder, or a workdir (its newest stage and step).

    Raises:
      UserError: there is no checkpoint.
    """
    path = Path(path).absolute()
    if (path / "params").is_dir():
        return path
    for pattern in ("[0-9]*", f"{FOLDER}/[0-9]*", f"*/{FOLDER}/[0-9]*"):
        steps = [p for p in path.glob(pattern) if p.name.isdigit() and (p / "params").is_dir()]
        for newest in sorted(steps, key=lambda p: (p.parent.stat().st_mtime, int(p.name)), reverse=True):
            found = integrity.problem(newest, thorough=False)
            if found is None:
                return newest
            log.warning("checkpoint %s is damaged: %s; looking at the one before", newest, found)
    raise UserError(f"{path} holds no checkpoint; give a step folder, a stage's folder or a workdir.")


def load_about(folder: Path) -> dict[str, Any]:
    """The `about` entry of a step folder. UserError where it has none: something else, or damaged."""
    try:
        return json.loads(ocp.load_checkpointables(folder, {"about": None})["about"]["json"])
    except (ValueError, KeyError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder} is no whole checkpoint: {reason}") from error


def load_params(folder: Path, like) -> dict:
    """Parameters alone, in the shapes and dtypes of `like`, whatever mesh wrote them.

    Raises:
      UserError: the checkpoint holds other parameters than `like`.
    """
    try:
        return ocp.load_checkpointables(folder, {"params": _abstract(like)})["params"]
    except (ValueError, KeyError) as error:
        raise UserError(f"{folder} holds parameters of another model: {str(error).splitlines()[0]}") from error


def save_tokenizer(about: dict[str, Any], folder: Path) -> None:
    """Writes the tokenizer's files of an `about` entry. UserError where the checkpoint has none."""
    if not about["tokenizer"]:
        raise UserError(
            "The checkpoint holds no tokenizer: the folder it was imported from had none; put tokenizer files "
            "into that folder and import it again."
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in about["tokenizer"].items():
        (folder / name).write_bytes(base64.b64decode(content))


def load_model(path: str | Path) -> Loaded:
    """Everything that generation and evaluation need, from a checkpoint alone."""
    folder = find(path)
    about = load_about(folder)
    config = from_dict(RunConfig, about["config"])
    with tempfile.TemporaryDirectory() as files:
        save_tokenizer(about, Path(files))
        tokenizer = load_tokenizer(files)
    like = jax.eval_shape(lambda: fusion.init(config.model, jax.random.key(0)))
    return Loaded(config, load_params(folder, like), tokenizer, folder, step_of(folder))


def step_of(folder: Path) -> int:
    """The training step of a step folder; 0 for an import, whose folder has a name of the user's."""
    return int(folder.name) if folder.name.isdigit() else 0
