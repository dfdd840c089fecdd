"""Metrics: JSONL and TensorBoard writers, one readable line per interval, and the loss curve."""

import json
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tensorboardX import SummaryWriter


class Writer:
    """Writes scalars to `metrics.jsonl` and both scalars and texts to TensorBoard, in the folder of one stage."""

    def __init__(self, folder: Path, start_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        # A restarted run repeats the steps after its checkpoint: drop what was written beyond it.
        truncate(self.path, start_step)
        self._file = self.path.open("a")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step or None)

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        values = {name: value for name, value in values.items() if value is not None}
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        self._board.add_text(name, text, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


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
    """Gathers steps until the next report: means of losses, rates of tokens and samples, time spent waiting."""

    def __init__(self):
        self._steps: list[dict] = []
        self._samples = 0
        self._flops = self._waited = 0.0
        self._start = time.perf_counter()

    def add(self, metrics: dict, samples: int, flops: float, waited: float) -> None:
        """`metrics` may still be on the device: nothing is waited for here."""
        self._steps.append(metrics)
        self._samples += samples
        self._flops += flops
        self._waited += waited

    def report(self, peak: float) -> dict[str, float]:
        """Values of the interval; fetches the steps' metrics, which waits for the last step."""
        steps = [{name: float(value) for name, value in step.items()} for step in self._steps]
        seconds = time.perf_counter() - self._start
        means = {name: float(np.mean([s[name] for s in steps])) for name in ("total", "ce", "v2t", "t2v", "grad_norm")}
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
            "input_wait_share": self._waited / seconds,
            "seconds_per_step": seconds / len(steps),
        }


def line(stage: str, step: int, steps: int, values: Mapping[str, float], seconds_left: float) -> str:
    """The readable line of an interval."""
    rates = [value for name, value in values.items() if name.startswith("learning_rate/")]
    skipped = f"  skipped {int(values['skipped'])}" if values["skipped"] else ""
    return (
        f"{stage} {step}/{steps}  total {values['total']:.4f}  ce {values['ce']:.4f}  v2t {values['v2t']:.3f}  "
        f"t2v {values['t2v']:.3f}  lr {'/'.join(f'{rate:.1e}' for rate in rates)}  grad {values['grad_norm']:.2f}  "
        f"{values['samples_per_second']:.1f} samples/s  {values['text_tokens_per_second']:.0f} text tok/s  "
        f"{values['visual_tokens_per_second']:.0f} visual tok/s  mfu {values['mfu']:.0%}  "
        f"wait {values['input_wait_share']:.0%}  left {duration(seconds_left)}{skipped}"
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
