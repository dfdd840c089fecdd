"""Writes the metrics of a stage to JSONL, TensorBoard and Weights & Biases."""

import contextlib
import hashlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from fusion_jax.errors import UserError, first_line
from fusion_jax.training import jsonl

log = logging.getLogger("fusion_jax")


class Writer:
    """Writes scalars to `metrics.jsonl`, and both scalars and texts to TensorBoard, in the folder of one stage.

    With a W&B project scalars go there, too. A full disk costs lines, not the run; so does a failure of TensorBoard or
    W&B, to which only `publish` writes.

    Raises:
      UserError: `metrics.jsonl` is not a file, or W&B cannot be started. OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, start_step: int, wandb_project: str = ""):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        # A restarted run repeats the steps after its checkpoint: drop their rows.
        jsonl.truncate_rows(self.path, start_step)
        self._before = jsonl.read_rows(self.path) if self.path.exists() else []
        self._file = self.path.open("a")
        self._board = _import_tensorboard().SummaryWriter(str(folder / "tensorboard"), purge_step=start_step or None)
        self._run = _start_wandb(wandb_project, folder) if wandb_project else None
        self._unpublished: list[tuple[int, dict[str, float]]] = []
        self._errors: dict[str, str] = {}  # the last one logged, by service

    def has(self, step: int, prefix: str) -> bool:
        """Returns whether an earlier start has written a value at that step whose name begins with `prefix`."""
        return any(row["step"] == step and name.startswith(prefix) for row in self._before for name in row)

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        values = {name: value for name, value in values.items() if value is not None}
        self._line(json.dumps({"step": step, **values}) + "\n")
        self._unpublished.append((step, values))

    def publish(self) -> None:
        """Sends what was written since the last call to TensorBoard and W&B."""
        rows, self._unpublished = self._unpublished, []
        with self._tolerate("TensorBoard"):
            for step, values in rows:
                for name, value in values.items():
                    if self._board_is_alive():
                        self._board.add_scalar(name, value, step)
        if self._run is not None:
            with self._tolerate("Weights & Biases"):
                for step, values in rows:
                    self._run.log(values, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        with self._tolerate("TensorBoard"):
            if self._board_is_alive():
                self._board.add_text(name, text, step)

    def close(self) -> None:
        self.publish()
        self._line("")
        with contextlib.suppress(OSError):
            self._file.close()
        with self._tolerate("TensorBoard"):
            if self._board_is_alive():
                self._board.close()
        if self._run is not None:
            with self._tolerate("Weights & Biases"):
                self._run.finish()

    def _line(self, text: str) -> None:
        try:
            self._file.write(text)
            self._file.flush()  # what cannot be written stays in the buffer for the next time
        except OSError as error:
            log.warning("%s: %s; training goes on", self.path, error)

    @contextlib.contextmanager
    def _tolerate(self, service: str) -> Iterator[None]:
        """Logs an error of a service, each kind once, and lets training continue."""
        try:
            yield
        except Exception as error:
            message = f"{service} gets nothing: {type(error).__name__}: {error}"[:300]
            if message != self._errors.get(service):
                log.warning("%s; training goes on", message)
            self._errors[service] = message

    def _board_is_alive(self) -> bool:
        """Returns whether TensorBoard's thread is alive. A full disk ends it; writing to its queue would then hang."""
        return self._board.file_writer.event_writer._worker.is_alive()


def _import_tensorboard():
    """Imports tensorboardX, but not PyTorch with it, which would cost seconds at every start and is not used."""
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # "not installed", until the import below is done
    try:
        import tensorboardX

        return tensorboardX
    finally:
        if hidden:
            del sys.modules["torch"]


def import_wandb():
    """Imports the `wandb` module. Raises UserError if it is not installed."""
    try:
        import wandb
    except ImportError as error:
        raise UserError(f"config.wandb_project needs Weights & Biases ({error}); pip install wandb.") from None
    return wandb


def _start_wandb(project: str, folder: Path):
    """Starts a W&B run for a stage. Its id depends on the folder alone, so that a restart continues the same run."""
    identity = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]
    arguments = {"project": project, "name": f"{folder.parent.name}/{folder.name}", "id": identity, "dir": str(folder)}
    wandb = import_wandb()
    try:
        return wandb.init(**arguments, resume="allow", reinit="finish_previous")
    except Exception as error:
        reason = first_line(error)
        raise UserError(
            f"Weights & Biases could not be started for config.wandb_project={project!r} ({reason}); repair that, set "
            "WANDB_MODE=offline, or leave wandb_project empty."
        ) from error
