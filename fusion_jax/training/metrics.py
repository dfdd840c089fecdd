"""Metrics: JSONL and TensorBoard writers, one readable line per interval, and the loss curve."""

import contextlib
import hashlib
import io
import json
import logging
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from fusion_jax.errors import UserError, first_line
from fusion_jax.files import write_whole

log = logging.getLogger("fusion_jax")


def _import_tensorboard():
    """tensorboardX, kept from loading PyTorch where that is installed: seconds at every start, for nothing."""
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # "not installed", until the import below is done
    try:
        import tensorboardX

        return tensorboardX
    finally:
        if hidden:
            del sys.modules["torch"]


class Writer:
    """Writes scalars to `metrics.jsonl`, and both scalars and texts to TensorBoard, in the folder of one stage.

    With a W&B project scalars go there too. A disk that is full costs lines, not the run; and so does a TensorBoard or
    W&B that fails, which are served by `publish` alone.

    Raises:
      UserError: `metrics.jsonl` is no file, or W&B cannot be started. OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, start_step: int, wandb_project: str = ""):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        # A restarted run repeats the steps after its checkpoint: drop what was written beyond it.
        truncate(self.path, start_step)
        self._before = read(self.path) if self.path.exists() else []
        self._file = self.path.open("a")
        self._board = _import_tensorboard().SummaryWriter(str(folder / "tensorboard"), purge_step=start_step or None)
        self._run = _start_wandb(wandb_project, folder) if wandb_project else None
        self._unpublished: list[tuple[int, dict[str, float]]] = []
        self._trouble: dict[str, str] = {}  # the last of each kind, which the log has

    def has(self, step: int, prefix: str) -> bool:
        """Whether an earlier start of the run has written a value whose name begins so at that step."""
        return any(row["step"] == step and name.startswith(prefix) for row in self._before for name in row)

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        values = {name: value for name, value in values.items() if value is not None}
        self._line(json.dumps({"step": step, **values}) + "\n")
        self._unpublished.append((step, values))

    def publish(self) -> None:
        """TensorBoard and W&B get what has been written since the last time."""
        rows, self._unpublished = self._unpublished, []
        with self._survived("TensorBoard"):
            for step, values in rows:
                for name, value in values.items():
                    if self._board_lives():
                        self._board.add_scalar(name, value, step)
        if self._run is not None:
            with self._survived("Weights & Biases"):
                for step, values in rows:
                    self._run.log(values, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        with self._survived("TensorBoard"):
            if self._board_lives():
                self._board.add_text(name, text, step)

    def close(self) -> None:
        self.publish()
        self._line("")
        with contextlib.suppress(OSError):
            self._file.close()
        with self._survived("TensorBoard"):
            if self._board_lives():
                self._board.close()
        if self._run is not None:
            with self._survived("Weights & Biases"):
                self._run.finish()

    def _line(self, text: str) -> None:
        try:
            self._file.write(text)
            self._file.flush()  # what could not be written stays in the buffer for the next time
        except OSError as error:
            log.warning("%s: %s; training goes on", self.path, error)

    @contextlib.contextmanager
    def _survived(self, what: str) -> Iterator[None]:
        """The log says, once for each kind, that it failed."""
        try:
            yield
        except Exception as error:
            trouble = f"{what} gets nothing: {type(error).__name__}: {error}"[:300]
            if trouble != self._trouble.get(what):
                log.warning("%s; training goes on", trouble)
            self._trouble[what] = trouble

    def _board_lives(self) -> bool:
        """Its thread dies of a full disk, and then the queue to it would block for ever."""
        return self._board.file_writer.event_writer._worker.is_alive()


def import_wandb():
    """The `wandb` module. UserError where it is not installed."""
    try:
        import wandb
    except ImportError as error:
        raise UserError(f"config.wandb_project needs Weights & Biases ({error}); pip install wandb.") from None
    return wandb


def _start_wandb(project: str, folder: Path):
    """A W&B run for one stage. The same name is the same run: a restart goes on in it."""
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


def truncate(path: Path, step: int) -> None:
    """Keeps the lines of a JSONL file whose `step` is at most `step`. Lines that are no such entry go, with a warning:
    torn ones, as a kill leaves them, and damaged ones.

    Raises:
      UserError: it is no file.
    """
    if not path.exists():
        return
    if not path.is_file():
        raise UserError(f"{path} must be a file; move away what is there.")
    content, kept, bad = path.read_bytes(), [], []
    for number, line in enumerate(content.split(b"\n"), 1):
        entry = _entry(line)
        if entry is None and line:
            bad.append(number)
        elif entry is not None and entry["step"] <= step:
            kept.append(line + b"\n")
    if bad:
        shown = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
        log.warning("%s: %d damaged line(s) cut off (%s)", path, len(bad), shown)
    if b"".join(kept) == content:
        return
    write_whole(path, b"".join(kept))


def read(path: Path) -> list[dict]:
    """The entries of a JSONL file of a run, which have a `step`; lines that are none are passed over."""
    return [entry for line in path.read_bytes().split(b"\n") if (entry := _entry(line)) is not None]


def _entry(line: bytes) -> dict | None:
    """The entry of a line; None where it is none."""
    try:
        entry = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    step = entry.get("step") if isinstance(entry, dict) else None
    return entry if type(step) is int and 0 <= step < 2**63 else None


def duration(seconds: float) -> str:
    """1h02m, 3m10s, 42s."""
    seconds = round(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 60}m{seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"


class Interval:
    """Gathers steps until the next report: means of losses and norms, rates, and where the loop's time went."""

    def __init__(self):
        self._steps: list[dict] = []
        self._samples = 0
        self._flops = 0.0
        self._seconds = {"input": 0.0, "compute": 0.0, "checkpoint": 0.0}
        self._start = time.perf_counter()

    def add(self, metrics: dict, samples: int, flops: float) -> None:
        """`metrics` may still be on the device: nothing is waited for here."""
        self._steps.append(metrics)
        self._samples += samples
        self._flops += flops

    def spend(self, on: str, seconds: float) -> None:
        """The loop waited for `input`, `compute` or `checkpoint`."""
        self._seconds[on] += seconds

    def fetched(self) -> list[dict[str, float]]:
        """The steps' metrics as numbers; waits for the last step."""
        self._steps = [{name: float(value) for name, value in step.items()} for step in jax.device_get(self._steps)]
        return self._steps

    def report(self, peak: float) -> dict[str, float]:
        """Values of the interval; waits for the last step."""
        steps = self.fetched()
        seconds = time.perf_counter() - self._start
        averaged = [name for name in steps[0] if name in _AVERAGED or name.startswith("grad_norm/")]
        means = {name: float(np.mean([s[name] for s in steps])) for name in averaged}
        last = {
            name: value for name, value in steps[-1].items() if name.startswith("learning_rate/") or name == "skipped"
        }
        sums = {name: sum(s[name] for s in steps) for name in ("text_tokens", "visual_tokens")}
        return {
            **means,
            **last,
            "samples_per_second": self._samples / seconds,
            "text_tokens_per_second": sums["text_tokens"] / seconds,
            "visual_tokens_per_second": sums["visual_tokens"] / seconds,
            "mfu": self._flops / seconds / peak,
            "input_wait_share": self._seconds["input"] / seconds,
            "compute_share": self._seconds["compute"] / seconds,
            "checkpoint_share": self._seconds["checkpoint"] / seconds,
            "seconds_per_step": seconds / len(steps),
        }


_AVERAGED = ("total", "ce", "v2t", "t2v", "grad_norm", "update_norm")


class Spikes:
    """Tells which steps stand out from those before them, by a measure that earlier spikes do not move.

    A value is a spike where it exceeds the median of the last `window` by more than `far` times their spread (the
    median distance from the median, scaled to a standard deviation) and by a tenth of the median.
    """

    def __init__(self, window: int = 50, far: float = 8.0, enough: int = 20):
        self._far, self._enough = far, enough
        self._known = {name: deque(maxlen=window) for name in ("total", "grad_norm")}

    def look(self, first: int, steps: Iterable[Mapping[str, float]]) -> list[str]:
        """One sentence for each spike in the metrics of the steps from `first` on."""
        found = []
        for step, values in enumerate(steps, first):
            if not np.isfinite(values["update_norm"]) and all(np.isfinite(values[name]) for name in self._known):
                found.append(
                    f"step {step}: update_norm is {values['update_norm']}, though loss and gradient are finite"
                )
            for name, known in self._known.items():
                value = values[name]
                if not np.isfinite(value):
                    found.append(f"step {step}: {name} is {value}")
                    continue
                if len(known) >= self._enough:
                    middle = float(np.median(known))
                    spread = 1.4826 * float(np.median(np.abs(np.asarray(known) - middle)))
                    if value - middle > max(self._far * spread, 0.1 * abs(middle)):
                        found.append(
                            f"step {step}: {name} {value:.4g} is a spike; the median before it is {middle:.4g}"
                        )
                known.append(value)
        return found


def line(stage: str, step: int, steps: int, values: Mapping[str, float], seconds_left: float) -> str:
    """The readable line of an interval."""
    rates = [value for name, value in values.items() if name.startswith("learning_rate/")]
    memory = f"  hbm {values['hbm_gib']:.1f} GiB" if "hbm_gib" in values else ""
    skipped = f"  skipped {int(values['skipped'])}" if values["skipped"] else ""
    return (
        f"{stage} {step}/{steps}  total {values['total']:.4f}  ce {values['ce']:.4f}  v2t {values['v2t']:.3f}  "
        f"t2v {values['t2v']:.3f}  lr {'/'.join(f'{rate:.1e}' for rate in rates)}  grad {values['grad_norm']:.2f}  "
        f"{values['samples_per_second']:.1f} samples/s  {values['text_tokens_per_second']:.0f} text tok/s  "
        f"{values['visual_tokens_per_second']:.0f} visual tok/s  mfu {values['mfu']:.0%}  "
        f"input {values['input_wait_share']:.0%}  save {values['checkpoint_share']:.0%}{memory}  "
        f"left {duration(seconds_left)}{skipped}"
    )


def plot_losses(files: Mapping[str, Path], target: Path) -> None:
    """Draws the loss curves of all stages side by side, training and validation, into a PNG."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(files), figsize=(5 * len(files), 4), squeeze=False, layout="constrained")
    for axis, (stage, path) in zip(axes[0], files.items()):
        rows = read(path)
        for name, style in (("ce", "-"), ("v2t", "-"), ("t2v", "-"), ("validation/ce", "o--")):
            points = [(row["step"], float(row[name])) for row in rows if _is_number(row.get(name))]
            if points and any(value for _, value in points):
                axis.plot(*zip(*points), style, label=name, linewidth=1.2, markersize=4)
        axis.set(title=stage, xlabel="step", ylabel="loss" if axis is axes[0][0] else "")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    plt.close(figure)
    write_whole(target, picture.getvalue())


def _is_number(value: object) -> bool:
    """Whether it can be drawn: a damaged file may hold anything."""
    return type(value) is float or (type(value) is int and abs(value) < 2**63)
