"""Computes the metrics of an interval of steps: means, rates, shares of time, spikes, a readable line."""

import time
from collections import deque
from collections.abc import Iterable, Mapping

import jax
import numpy as np

from fusion_jax.training.losses import PARTS


def duration(seconds: float) -> str:
    """Writes seconds as 1h02m, 3m10s or 42s."""
    seconds = round(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 60}m{seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"


class Interval:
    """Collects steps until the next report: means of losses and norms, rates, and how the loop spent its time."""

    def __init__(self):
        self._steps: list[dict] = []
        self._samples = 0
        self._flops = 0.0
        self._seconds = {"input": 0.0, "compute": 0.0, "checkpoint": 0.0}
        self._start = time.perf_counter()

    def add(self, metrics: dict, samples: int, flops: float) -> None:
        """Adds a step, whose `metrics` may still be on the device: this does not wait for them."""
        self._steps.append(metrics)
        self._samples += samples
        self._flops += flops

    def spend(self, on: str, seconds: float) -> None:
        """Counts seconds in which the loop waited for `input`, `compute` or `checkpoint`."""
        self._seconds[on] += seconds

    def fetched(self) -> list[dict[str, float]]:
        """Returns the metrics of the steps as numbers; waits for the last step."""
        self._steps = [{name: float(value) for name, value in step.items()} for step in jax.device_get(self._steps)]
        return self._steps

    def report(self, peak: float) -> dict[str, float]:
        """Returns the values of the interval; waits for the last step. `peak`: FLOP/s of all devices, for the MFU."""
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
            "model_flops": self._flops,
            "input_wait_share": self._seconds["input"] / seconds,
            "compute_share": self._seconds["compute"] / seconds,
            "checkpoint_share": self._seconds["checkpoint"] / seconds,
            "seconds_per_step": seconds / len(steps),
        }


_AVERAGED = ("total", *PARTS, "grad_norm", "update_norm")


class Spikes:
    """Finds steps that stand out from those before them, by a measure that earlier spikes do not shift.

    A value is a spike if it exceeds the median of the last `window` by more than `far` times their spread (the
    median distance from the median, scaled to a standard deviation) and by a tenth of the median.
    """

    def __init__(self, window: int = 50, far: float = 8.0, enough: int = 20):
        self._far, self._enough = far, enough
        self._known = {name: deque(maxlen=window) for name in ("total", "grad_norm")}

    def find(self, first: int, steps: Iterable[Mapping[str, float]]) -> list[str]:
        """Returns a sentence for each spike in the metrics of consecutive steps; `first` is the number of the first."""
        sentences = []
        for step, values in enumerate(steps, first):
            if not np.isfinite(values["update_norm"]) and all(np.isfinite(values[name]) for name in self._known):
                sentences.append(
                    f"step {step}: update_norm is {values['update_norm']}, though loss and gradient are finite"
                )
            for name, known in self._known.items():
                value = values[name]
                if not np.isfinite(value):
                    sentences.append(f"step {step}: {name} is {value}")
                    continue
                if len(known) >= self._enough:
                    middle = float(np.median(known))
                    spread = 1.4826 * float(np.median(np.abs(np.asarray(known) - middle)))
                    if value - middle > max(self._far * spread, 0.1 * abs(middle)):
                        sentences.append(
                            f"step {step}: {name} {value:.4g} is a spike; the median before it is {middle:.4g}"
                        )
                known.append(value)
        return sentences


def line(stage: str, step: int, steps: int, values: Mapping[str, float], seconds_left: float) -> str:
    """Formats the values of an interval as one readable line."""
    rates = [value for name, value in values.items() if name.startswith("learning_rate/")]
    parts = "  ".join(f"{name} {values[name]:.{4 if name == 'ce' else 3}f}" for name in PARTS)
    memory = f"  hbm {values['hbm_gib']:.1f} GiB" if "hbm_gib" in values else ""
    skipped = f"  skipped {int(values['skipped'])}" if values["skipped"] else ""
    return (
        f"{stage} {step}/{steps}  total {values['total']:.4f}  {parts}  "
        f"lr {'/'.join(f'{rate:.1e}' for rate in rates)}  grad {values['grad_norm']:.2f}  "
        f"{values['samples_per_second']:.1f} samples/s  {values['text_tokens_per_second']:.0f} text tok/s  "
        f"{values['visual_tokens_per_second']:.0f} visual tok/s  mfu {values['mfu']:.0%}  "
        f"input {values['input_wait_share']:.0%}  save {values['checkpoint_share']:.0%}{memory}  "
        f"left {duration(seconds_left)}{skipped}"
    )
