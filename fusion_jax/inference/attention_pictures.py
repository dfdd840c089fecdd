"""Draws the levels of a word's attention, as docs/pictures.md explains them (`attention_maps`)."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fusion_jax.errors import UserError
from fusion_jax.inference.attention_averages import averaged, chosen, early_llm_layers, exchange_maps, relative
from fusion_jax.inference.attention_maps import Levels, Maps

COLOURS = "viridis"  # perceptually uniform, and readable without colour vision
HEAT = 0.72  # opacity of the map over the image in grey
COLUMNS = 5
COSINE, EVEN = "cosine", "× even attention"
_SAVED = {"svg.hashsalt": "fusion_jax", "font.size": 9, "axes.titlesize": 9.5, "mathtext.default": "regular"}


# ---- One panel.


def _grey(picture: np.ndarray) -> np.ndarray:
    return picture @ np.array([0.299, 0.587, 0.114]) / 255


def _image(axes: Axes, picture: np.ndarray, title: str) -> None:
    axes.imshow(picture)
    axes.set_title(title)
    axes.set_axis_off()


def _heat(
    axes: Axes, picture: np.ndarray, grid: np.ndarray | None, title: str, unit: str, extent=(0, 1, 0, 1), limits=None
) -> None:
    """Draws a map over the image in grey, with its colour bar; without a map, only the image and the title."""
    height, width = picture.shape[:2]
    axes.imshow(_grey(picture), cmap="gray", vmin=-0.15, vmax=1.1)
    axes.set_title(title)
    axes.set_axis_off()
    if grid is None:
        return
    low, high = limits or colour_limits([grid], unit)
    left, right, top, bottom = np.array(extent) * (width, width, height, height) - 0.5
    drawn = axes.imshow(
        grid, COLOURS, vmin=low, vmax=high, alpha=HEAT, extent=(left, right, bottom, top), interpolation="nearest"
    )
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)
    over = "max" if grid.max() > high + 1e-9 else "neither"
    bar = axes.figure.colorbar(drawn, ax=axes, fraction=0.046, pad=0.03, extend=over)
    bar.solids.set_alpha(1)
    bar.ax.tick_params(labelsize=7)
    bar.set_label(unit, fontsize=7.5)


def colour_limits(grids: Sequence[np.ndarray | None], unit: str) -> tuple[float, float]:
    """The range of the colours: from 0 for attention, from the lowest value for cosines.

    In maps of more than 500 values, the highest half per cent share the last colour.
    """
    values = np.concatenate([grid.ravel() for grid in grids if grid is not None] or [np.zeros(1)])
    low = float(values.min()) if unit == COSINE else 0.0
    high = float(np.percentile(values, 99.5) if values.size > 500 else values.max())
    return low, max(high, low + 1e-6)


def _percent(grid: np.ndarray | None) -> str:
    return "" if grid is None else f" ({100 * grid.sum():.0f}%)"


def _windows(axes: Axes, levels: Levels) -> None:
    """Draws the borders of the l x l windows; they cross shared tokens where l does not divide the grid."""
    height, width = levels.picture.shape[:2]
    cells = math.isqrt(levels.latents)
    for share in np.arange(1, cells) / cells:
        axes.axvline(share * width - 0.5, color="white", linewidth=0.8)
        axes.axhline(share * height - 0.5, color="white", linewidth=0.8)


def _exchange(axes: Axes, levels: Levels, maps: np.ndarray, number: int, limits) -> None:
    title = f"Exchange {number + 1} of {len(maps)}\nafter LLM layer {levels.exchange_after[number]}"
    _heat(axes, levels.picture, maps[number], title, "× even in its window", limits=limits)
    _windows(axes, levels)


# ---- One figure.


def _figure(rows: int, columns: int, picture: np.ndarray, extra: float) -> tuple[Figure, np.ndarray]:
    """A figure of blank panels in the image's shape, with `extra` inches of height for text."""
    panel = 2.35
    shape = min(max(picture.shape[0] / picture.shape[1], 0.4), 1.8)
    figure = Figure(figsize=(panel * columns, rows * (panel * shape * 0.66 + 0.5) + extra), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06)
    axes = figure.subplots(rows, columns, squeeze=False)
    for one in axes.flat:
        one.set_axis_off()
    return figure, axes


def _title(figure: Figure, levels: Levels) -> None:
    question = textwrap.shorten(" ".join(levels.question.split()), 110, placeholder=" …")
    figure.suptitle(f"“{question}”   word: “{levels.word}”", fontsize=11.5, fontweight="bold")


def _caption(figure: Figure, text: str, columns: int) -> None:
    figure.supxlabel(textwrap.fill(text, 31 * columns), fontsize=8.5, x=0.012, ha="left")


def _about(levels: Levels, layers, heads) -> str:
    def named(choice, all_of_them: str) -> str:
        if choice in ("all", "mean"):
            return all_of_them
        return choice if isinstance(choice, str) else ", ".join(map(str, choice))

    encoder = "" if levels.whole.pixel is None else f"{len(levels.whole.pixel)} encoder layers ({levels.early} early), "
    parts = " + ".join(f"“{token}”" for token in levels.tokens)
    latents = f"l² = {levels.latents} latents" if levels.latents else "no latents"
    return (
        f"Layers: {named(layers, 'mean of all')}; heads: {named(heads, 'mean of all')}. {encoder}"
        f"{len(levels.whole.question)} LLM layers ({early_llm_layers(levels)} early), {latents}. "
        f"Tokens of the word: {parts}."
    )


def _three(levels: Levels, maps: Maps, layers, heads) -> list[tuple[np.ndarray | None, str, str]]:
    """(map, title, unit) of the levels: pixel from the word, pixel to the word, space, question."""
    pixel = averaged(maps.pixel, layers, heads, levels.early, "encoder")
    back = averaged(maps.pixel_back, layers, heads, levels.early, "encoder")
    question = averaged(maps.question, layers, heads, early_llm_layers(levels), "LLM")
    none = "\nquestion not read" if pixel is None else ""
    # Each tile is encoded separately, with its own attention, so a share over all tiles would be meaningless.
    share = "\nword to patches" + ("" if maps is levels.tiles else _percent(pixel))
    hidden = none or ("\nno patch sees the word" if relative(back) is None else "\npatches to word")
    return [
        (relative(pixel), f"Pixel level:{none or share}", EVEN),
        (relative(back), f"Pixel level:{hidden}", EVEN),
        (maps.space, "Space level:\nimage tokens like the word", COSINE),
        (relative(question), "Question level:\nword to image" + _percent(question), EVEN),
    ]


def draw(levels: Levels, layers: str | Sequence[int] = "all", heads: str | Sequence[int] = "mean") -> Figure:
    """Draws one word: the three levels, early against late layers, every exchange layer, and tiles if there are any.

    Args:
      levels: see `attention_maps.levels`. layers: all, early, late, or numbers, for the top row.
      heads: mean or numbers.

    Returns:
      A matplotlib figure without a window; see `save`.

    Raises:
      UserError: layers or heads that do not exist.
    """
    top = _three(levels, levels.whole, layers, heads)
    exchanges = 0 if levels.exchange is None else -(-len(levels.exchange) // COLUMNS)
    rows = 2 + (levels.tiles is not None) + exchanges
    with matplotlib.rc_context(_SAVED):
        figure, axes = _figure(rows, COLUMNS, levels.picture, 1.2)
        _title(figure, levels)
        _image(axes[0, 0], levels.picture, "Image")
        for panel, (grid, title, unit) in zip(axes[0, 1:], top):
            _heat(panel, levels.picture, grid, title, unit, levels.whole.extent)
        _early_and_late(axes[1], levels, heads)
        row = 2
        if levels.tiles is not None:
            _image(axes[row, 0], levels.picture, "The same on the tiles")
            for panel, (grid, title, unit) in zip(axes[row, 1:], _three(levels, levels.tiles, layers, heads)):
                _heat(panel, levels.picture, grid, title, unit, levels.tiles.extent)
            row += 1
        if exchanges:
            maps = exchange_maps(levels, heads)
            limits = colour_limits(list(maps), EVEN)
            for i in range(len(maps)):
                _exchange(axes[row + i // COLUMNS, i % COLUMNS], levels, maps, i, limits)
        text = "Top row: " + _about(levels, layers, heads) + " Attention is relative to its mean over the image; "
        text += "in brackets, the share of it that is on the image."
        if exchanges:
            text += " Exchange: what each latent reads in its window (white borders), relative to reading it evenly."
            if levels.side % math.isqrt(levels.latents):
                text += " Windows overlap here, and tokens of several show their mean."
            if (levels.windows >= 0).sum(1).max() == 1:
                text += " Each window holds one token here, so there is nothing to choose."
        _caption(figure, text, COLUMNS)
    return figure


def _early_and_late(axes: np.ndarray, levels: Levels, heads) -> None:
    """Draws the encoder and the LLM, early and late on one scale, and the share of attention on the image by layer."""
    for first, (maps, early, part, extent) in enumerate(
        (
            (levels.whole.pixel, levels.early, "Encoder", levels.whole.extent),
            (levels.whole.question, early_llm_layers(levels), "LLM", levels.whole.extent),
        )
    ):
        halves = [averaged(maps, half, heads, early, part) if early else None for half in ("early", "late")]
        limits = colour_limits([relative(half) for half in halves], EVEN)
        for i, (half, name) in enumerate(zip(halves, ("early", "late"))):
            title = f"{part}, {name} layers:\nword to image{_percent(half)}"
            _heat(axes[2 * first + i], levels.picture, relative(half), title, EVEN, extent, limits)
    chart = axes[4]
    chart.set_axis_on()
    chart.set_box_aspect(min(levels.picture.shape[0] / levels.picture.shape[1], 1))
    for maps, part, mark in ((levels.whole.pixel, "encoder", "o"), (levels.whole.question, "LLM", "s")):
        if maps is not None:
            shares = maps[:, chosen(heads, maps.shape[1], 0, f"heads of the {part}")].sum((2, 3)).mean(1)
            depth = (np.arange(len(shares)) + 0.5) / len(shares)
            chart.plot(depth, 100 * shares, mark + "-", markersize=3.5, linewidth=1.4, label=part)
    chart.axvline(0.5, color="0.8", linewidth=0.8, zorder=0)
    chart.set(xlim=(0, 1), xlabel="depth, first to last layer", ylabel="%")
    chart.set_ylim(0, 1.08 * chart.dataLim.ymax)
    chart.set_title("Share of the word's attention\nthat is on the image")
    chart.spines[["top", "right"]].set_visible(False)
    chart.legend(frameon=False, fontsize=8)


def draw_side_by_side(
    models: Mapping[str, Levels], layers: str | Sequence[int] = "all", heads: str | Sequence[int] = "mean"
) -> Figure:
    """Draws several models on one word, one in each row, with one scale per column; arguments and errors as for `draw`.

    Args:
      models: levels of the same image, question and word, by the name to print.
    """
    table = []
    for one in models.values():
        top = _three(one, one.whole, layers, heads)
        maps = None if one.exchange is None else exchange_maps(one, heads)
        table.append(([top[0], top[2], top[3]], maps))
    limits = [colour_limits([row[0][i][0] for row in table], table[0][0][i][2]) for i in range(3)]
    everything = [grid for _, maps in table if maps is not None for grid in (maps[0], maps[-1])]
    first = next(iter(models.values()))
    with matplotlib.rc_context(_SAVED):
        figure, axes = _figure(len(models), 6, first.picture, 1.1)
        _title(figure, first)
        for row, (name, one), (top, maps) in zip(axes, models.items(), table):
            _image(row[0], one.picture, textwrap.fill(name, 26))
            for panel, (grid, title, unit), scale in zip(row[1:], top, limits):
                _heat(panel, one.picture, grid, title, unit, one.whole.extent, scale)
            for panel, which in zip(row[4:], (0, -1)):
                if maps is None:
                    _heat(panel, one.picture, None, "no exchange", EVEN)
                elif which == 0 or len(maps) > 1:
                    _exchange(panel, one, maps, which % len(maps), colour_limits(everything, EVEN))
        text = _about(first, layers, heads) + " Each column has one scale. Attention is relative to its mean over the "
        text += "image, exchange to reading a window evenly. What is off is off at inference alone: the weights were "
        text += "trained with it; another checkpoint is named as such."
        _caption(figure, text, 6)
    return figure


def draw_small(levels: Levels) -> Figure:
    """Draws the three levels and the mean of the exchange layers in two columns, legible on a phone.

    Layers and heads are averaged. Without exchange, the image is shown in its place.
    """
    pixel, _, space, question = _three(levels, levels.whole, "all", "mean")
    with matplotlib.rc_context(_SAVED):
        figure, axes = _figure(2, 2, levels.picture, 0.9)
        question_text = textwrap.shorten(" ".join(levels.question.split()), 100, placeholder=" …")
        figure.suptitle(
            textwrap.fill(f"“{question_text}”", 52) + f"\nword: “{levels.word}”", fontsize=10, fontweight="bold"
        )
        for panel, (grid, title, unit) in zip(axes.flat, (pixel, space, question)):
            _heat(panel, levels.picture, grid, title, unit, levels.whole.extent)
        if levels.exchange is None:
            _image(axes[1, 1], levels.picture, "Image\n(no exchange)")
        else:
            title = f"Exchange: latents to image\nmean of {len(levels.exchange)} layer(s)"
            _heat(axes[1, 1], levels.picture, exchange_maps(levels).mean(0), title, "× even in its window")
            _windows(axes[1, 1], levels)
        for panel in axes.flat:
            panel.title.set_fontsize(8.5)
    return figure


def pixels(figure: Figure, dpi: int) -> np.ndarray:
    """The figure's pixels, (height, width, 3) uint8."""
    with matplotlib.rc_context(_SAVED):
        figure.set_dpi(dpi)
        figure.canvas.draw()
        return np.array(figure.canvas.buffer_rgba())[..., :3]


def save(figure: Figure, out: str | Path) -> list[Path]:
    """Writes `out`.png and `out`.svg, and creates their folder. A suffix .png or .svg of `out` is dropped."""
    out = Path(out)
    stem = out.with_suffix("") if out.suffix in (".png", ".svg") else out
    paths = [stem.with_name(stem.name + suffix) for suffix in (".png", ".svg")]
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(_SAVED):
            figure.savefig(paths[0], dpi=170)
            figure.savefig(paths[1], metadata={"Date": None})
    except OSError as error:
        raise UserError(f"The figure cannot be written to {stem.parent}: {error.strerror}.") from error
    return paths
