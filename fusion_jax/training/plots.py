"""Draws the loss curves of a run."""

import io
from collections.abc import Mapping
from pathlib import Path

from fusion_jax.files import write_whole
from fusion_jax.training import jsonl
from fusion_jax.training.losses import PARTS


def plot_losses(files: Mapping[str, Path], target: Path) -> None:
    """Draws the loss curves of all stages side by side, training and validation, into a PNG."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(files), figsize=(5 * len(files), 4), squeeze=False, layout="constrained")
    for axis, (stage, path) in zip(axes[0], files.items()):
        rows = jsonl.read_rows(path)
        for name, style in (*((part, "-") for part in PARTS), ("validation/ce", "o--")):
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
    """Returns whether a value can be drawn: a damaged file may hold anything."""
    return type(value) is float or (type(value) is int and abs(value) < 2**63)
