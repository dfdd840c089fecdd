"""Draws the figures of a study."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fusion_jax.files import write_whole
from fusion_jax.studies.config import Variant
from fusion_jax.studies.folder import Folder
from fusion_jax.studies.results import curves, is_finite

_COLORS = matplotlib.colormaps["tab10"].colors
_POINTS = 60  # most points of a learning curve: each is the mean of its share of the rows


def draw_accuracy(target: Path, task: str, figures: dict[str, Any], baseline: str) -> None:
    """Draws the accuracy of every variant and its difference to the baseline, each with its interval."""
    names = list(figures)
    figure = Figure(figsize=(11, 1.4 + 0.42 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for row, name in enumerate(names):
        of, color = figures[name], _color(row)
        left.plot(list(of["accuracy"].values()), [row + 0.22] * len(of["accuracy"]), ".", color=color, alpha=0.5)
        _interval(left, row, of["mean"], of["interval"], color)
        if "difference" in of:
            _interval(right, row, of["difference"]["mean"], of["difference"]["interval"], color)
    left.set_yticks(range(len(names)), names)
    left.set_ylim(len(names) - 0.4, -0.6)
    left.set(title=f"{task}, 95% intervals; small dots are runs", xlabel="accuracy (%)")
    right.axvline(0, color="0.5", linewidth=1)
    right.set(title=f"difference to {baseline}", xlabel="percentage points")
    for axis in (left, right):
        axis.grid(axis="x", alpha=0.3)
        low, high = axis.get_xlim()
        if high - low < 2:  # where all are nearly equal, not to make a mountain of it
            axis.set_xlim((low + high) / 2 - 1, (low + high) / 2 + 1)
    _save(figure, target)


def _interval(axis: Axes, row: int, mean: float, interval: Sequence[float], color) -> None:
    axis.plot(interval, [row, row], color=color, linewidth=2, solid_capstyle="butt")
    axis.plot(mean, row, "o", color=color)


def draw_kinds(target: Path, task: str, kinds: dict[str, int], figures: dict[str, Any]) -> None:
    """Draws a map of the mean accuracy of every variant by kind of question."""
    names = list(figures)
    values = np.array([[figures[name]["kinds"][kind]["mean"] for kind in kinds] for name in names])
    figure = Figure(figsize=(2.5 + 0.85 * len(kinds), 1.6 + 0.42 * len(names)), layout="constrained")
    axis = figure.subplots()
    picture = axis.imshow(values, cmap="viridis", vmin=0, vmax=100, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        axis.text(column, row, f"{value:.0f}", ha="center", va="center", color="white" if value < 60 else "black")
    axis.set_yticks(range(len(names)), names)
    axis.set_xticks(range(len(kinds)), [f"{kind}\n({count})" for kind, count in kinds.items()], rotation=30, ha="right")
    axis.set_title(f"{task}: accuracy by kind of question (number of questions)")
    figure.colorbar(picture, label="accuracy (%)")
    _save(figure, target)


def draw_curves(target: Path, variants: Sequence[Variant], seeds: int, folder: Folder) -> bool:
    """Draws the learning curves of all variants that were trained; returns whether there was anything to draw."""
    panels = {}
    for key, title in (("ce", "training"), ("validation/ce", "validation")):
        if lines := {number: line for number, line in _lines(key, variants, seeds, folder) if line}:
            panels[title] = lines
    if not panels:
        return False
    figure = Figure(figsize=(1 + 5.5 * len(panels), 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, lines) in zip(axes, panels.items()):
        for number, of_runs in lines.items():
            # Runs of a variant report at the same steps; those that all have are drawn.
            steps = sorted(set.intersection(*map(set, of_runs)))
            steps, values = _smooth(np.array(steps), np.array([[line[step] for step in steps] for line in of_runs]))
            axis.plot(steps, values.mean(0), color=_color(number), label=variants[number].name, linewidth=1.4)
            axis.fill_between(steps, values.min(0), values.max(0), color=_color(number), alpha=0.12, linewidth=0)
        axis.set(title=f"{title}: cross-entropy, mean and range of the runs", xlabel="step, all stages")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    _save(figure, target)
    return True


def _lines(key: str, variants: Sequence[Variant], seeds: int, folder: Folder):
    """Yields the number of each variant that is trained, and the values of a metric in its runs by step."""
    for number, variant in enumerate(variants):
        if variant.trained_as == variant.name:
            done = [seed for seed in range(seeds) if folder.trained(variant.name, seed).exists()]
            lines = (_line(variant, folder.workdir(variant.name, seed), key) for seed in done)
            yield number, [line for line in lines if line]


def _line(variant: Variant, workdir: Path, key: str) -> dict[int, float]:
    """The values of a metric by the step, counted over all stages."""
    points, begin = {}, 0
    for rows in curves(variant, workdir):
        points |= {begin + row["step"]: row[key] for row in rows if is_finite(row.get(key))}
        begin += max((row["step"] for row in rows), default=0)
    return points


def _smooth(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of neighbouring points, so that several curves can be told apart."""
    parts = np.array_split(np.arange(len(steps)), min(_POINTS, len(steps)))
    return np.array([steps[part].mean() for part in parts]), np.stack([values[:, part].mean(1) for part in parts], 1)


def draw_cost(target: Path, task: str, figures: dict[str, Any], cost: dict[str, Any]) -> None:
    """Draws the accuracy of every variant over the FLOPs of its training."""
    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axis = figure.subplots()
    for number, (name, of) in enumerate(figures.items()):
        flops, (low, high) = cost[name]["train_flops"] / 1e12, of["interval"]
        axis.plot([flops, flops], [low, high], color=_color(number), alpha=0.5)
        axis.plot(flops, of["mean"], "o", color=_color(number))
        axis.annotate(name, (flops, of["mean"]), xytext=(6, 4), textcoords="offset points", fontsize=8)
    axis.set(title=f"{task}: accuracy over cost", xlabel="TFLOP of a training run", ylabel="accuracy (%)")
    axis.margins(x=0.15)
    axis.grid(alpha=0.3)
    _save(figure, target)


def _color(number: int):
    return _COLORS[number % len(_COLORS)]


def _save(figure: Figure, target: Path) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    write_whole(target, picture.getvalue())
