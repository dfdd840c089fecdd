"""Metrics: JSONL and TensorBoard writers, one readable line per interval, and the loss curve."""

import contextlib
import hashlib
import json
import logging
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
import numpy as np

from fusion_jax.errors import UserError

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
    """Writes scalars to `metrics.jsonl` and both scalars and texts to TensorBoard, in the folder of one stage.

    With a W&B project scalars go there too. A disk that is full costs lines, not the run.
    """

    def __init__(self, folder: Path, start_step: int, wandb_project: str = ""):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        # A restarted run repeats the steps after its checkpoint: drop what was written beyond it.
        truncate(self.path, start_step)
        self._before = read(self.path) if self.path.exists() else []
        self._file = self.path.open("a")
        self._board = _import_tensorboard().SummaryWriter(str(folder / "tensorboard"), purge_step=start_step or None)
        self._run = None
        if wandb_project:
            name = f"{folder.parent.name}/{folder.name}"
            # The same name is the same run: a restart goes on in it.
            identity = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]
            self._run = import_wandb().init(
                project=wandb_project, name=name, id=identity, resume="allow", dir=str(folder), reinit="finish_previous"
            )

    def has(self, step: int, name: str) -> bool:
        """Whether an earlier start of the run has written that value at that step."""
        return any(row["step"] == step and name in row for row in self._before)

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        values = {name: value for name, value in values.items() if value is not None}
        self._line(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            if self._board_lives():
                self._board.add_scalar(name, value, step)
        if self._run is not None:
            self._run.log(values, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        if self._board_lives():
            self._board.add_text(name, text, step)

    def close(self) -> None:
        self._line("")
        with contextlib.suppress(OSError):
            self._file.close()
        if self._board_lives():
            with contextlib.suppress(OSError):
                self._board.close()
        if self._run is not None:
            self._run.finish()

    def _line(self, text: str) -> None:
        try:
            self._file.write(text)
            self._file.flush()  # what could not be written stays in the buffer for the next time
        except OSError as error:
            log.warning("%s: %s; training goes on", self.path, error)

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


def truncate(path: Path, step: int) -> None:
    """Keeps the lines of a JSONL file whose `step` is at most `step`; a torn last line goes too."""
    if not path.exists():
        return
    kept = [json.dumps(entry) + "\n" for entry in read(path) if entry["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    temporary.replace(path)


def read(path: Path) -> list[dict]:
    """All lines of a JSONL file of a run but a torn one, which a kill may leave at the end."""
    entries = []
    for line in path.read_text().splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [entry for entry in entries if "step" in entry]


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


_AVERAGED = ("total", "ce", "v2t", "t2v", "grad_norm")


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
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points and any(value for _, value in points):
                axis.plot(*zip(*points), style, label=name, linewidth=1.2, markersize=4)
        axis.set(title=stage, xlabel="step", ylabel="loss" if axis is axes[0][0] else "")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(target, dpi=120)
    plt.close(figure)
