"""Attention pictures: where the model looks for a word, level by level (`attention_maps`, docs/pictures.md)."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fusion_jax.errors import UserError, check
from fusion_jax.inference.attention_maps import Levels, Maps

COLOURS = "viridis"  # perceptually uniform, and readable without colour vision
HEAT = 0.72  # opacity of the map over the image in grey
COLUMNS = 5
_SAVED = {"svg.hashsalt": "fusion_jax", "font.size": 9, "axes.titlesize": 9.5, "mathtext.default": "regular"}


# What is averaged.


def chosen(choice: str | Sequence[int], count: int, early: int, what: str) -> np.ndarray:
    """Numbers of the chosen layers or heads.

    Args:
      choice: all, mean (the same), early, late, or numbers from 0. count: how many there are. early: how many of them
        are early. what: named in errors.

    Raises:
      UserError: a number that does not exist, or another word.
    """
    if isinstance(choice, str):
        ranges = {"all": (0, count), "mean": (0, count), "early": (0, early), "late": (early, count)}
        if choice in ranges:
            return np.arange(*ranges[choice])
        try:
            choice = [int(number) for number in choice.split(",")]
        except ValueError:
            raise UserError(f"{what}: {choice!r} is neither a known word nor numbers such as 0,3.") from None
    wrong = [number for number in choice if not 0 <= number < count]
    check(not wrong, f"{what}: there is no {', '.join(map(str, wrong))}; numbers go from 0 to {count - 1}.")
    return np.asarray(choice)


def averaged(maps: np.ndarray | None, layers, heads, early: int, what: str) -> np.ndarray | None:
    """(layers, heads, h, w) to (h, w): the mean over the chosen ones, see `chosen`. None where there are none."""
    if maps is None:
        return None
    taken = maps[chosen(layers, len(maps), early, f"layers of the {what}")]
    return taken[:, chosen(heads, maps.shape[1], 0, f"heads of the {what}")].mean((0, 1))


def exchange_maps(found: Levels, heads: str | Sequence[int] = "mean") -> np.ndarray:
    """(exchange layers, side, side): each token's weight in its window, 1 where the window is seen evenly; the mean
    over the windows where they overlap."""
    weights = found.exchange[:, chosen(heads, found.exchange.shape[1], 0, "heads of the exchange")].mean(1)
    real = found.windows >= 0
    total, times = np.zeros((len(weights), found.side**2)), np.zeros(found.side**2)
    relative = weights / np.maximum((weights * real).sum(-1, keepdims=True), 1e-12) * real.sum(-1, keepdims=True)
    np.add.at(times, found.windows[real], 1)
    for layer, values in zip(total, relative):
        np.add.at(layer, found.windows[real], values[real])
    return (total / np.maximum(times, 1)).reshape(len(weights), found.side, found.side)


# One panel.


def _grey(picture: np.ndarray) -> np.ndarray:
    return picture @ np.array([0.299, 0.587, 0.114]) / 255


def _image(axes: Axes, picture: np.ndarray, title: str) -> None:
    axes.imshow(picture)
    axes.set_title(title)
    axes.set_axis_off()


def _heat(
    axes: Axes, picture: np.ndarray, grid: np.ndarray | None, title: str, unit: str, extent=(0, 1, 0, 1), limits=None
) -> None:
    """A map over the image, with its colour bar; where there is none, the image in grey and what the title says."""
    height, width = picture.shape[:2]
    axes.imshow(_grey(picture), cmap="gray", vmin=-0.15, vmax=1.1)
    axes.set_title(title)
    axes.set_axis_off()
    if grid is None:
        return
    low, high = limits or _limits([grid], unit)
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


def _limits(grids: Sequence[np.ndarray | None], unit: str) -> tuple[float, float]:
    """Colours from 0 for attention, from the least for cosines; of many, the highest half per cent share the last."""
    values = np.concatenate([grid.ravel() for grid in grids if grid is not None] or [np.zeros(1)])
    low = float(values.min()) if unit == _COSINE else 0.0
    high = float(np.percentile(values, 99.5) if values.size > 500 else values.max())
    return low, max(high, low + 1e-6)


_COSINE, _EVEN = "cosine", "× even attention"


def _relative(grid: np.ndarray | None) -> np.ndarray | None:
    """Attention over the image, 1 where it is even; None where none of it is on the image."""
    if grid is None or grid.mean() < 1e-12:
        return None
    return grid / grid.mean()


def _percent(grid: np.ndarray | None) -> str:
    return "" if grid is None else f" ({100 * grid.sum():.0f}%)"


def _windows(axes: Axes, found: Levels) -> None:
    """Borders of the l x l windows over the image; through the shared tokens where l does not divide the grid."""
    height, width = found.picture.shape[:2]
    cells = math.isqrt(found.latents)
    for share in np.arange(1, cells) / cells:
        axes.axvline(share * width - 0.5, color="white", linewidth=0.8)
        axes.axhline(share * height - 0.5, color="white", linewidth=0.8)


def _exchange(axes: Axes, found: Levels, maps: np.ndarray, number: int, limits) -> None:
    title = f"Exchange {number + 1} of {len(maps)}\nafter LLM layer {found.exchange_after[number]}"
    _heat(axes, found.picture, maps[number], title, "× even in its window", limits=limits)
    _windows(axes, found)


# One figure.


def _figure(rows: int, columns: int, picture: np.ndarray, extra: float) -> tuple[Figure, np.ndarray]:
    """A figure of panels in the image's shape, all of them blank; `extra` inches of height for text."""
    panel = 2.35
    shape = min(max(picture.shape[0] / picture.shape[1], 0.4), 1.8)
    figure = Figure(figsize=(panel * columns, rows * (panel * shape * 0.66 + 0.5) + extra), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06)
    axes = figure.subplots(rows, columns, squeeze=False)
    for one in axes.flat:
        one.set_axis_off()
    return figure, axes


def _title(figure: Figure, found: Levels) -> None:
    question = textwrap.shorten(" ".join(found.question.split()), 110, placeholder=" …")
    figure.suptitle(f"“{question}”   word: “{found.word}”", fontsize=11.5, fontweight="bold")


def _caption(figure: Figure, text: str, columns: int) -> None:
    figure.supxlabel(textwrap.fill(text, 31 * columns), fontsize=8.5, x=0.012, ha="left")


def _about(found: Levels, layers, heads) -> str:
    def named(choice, all_of_them: str) -> str:
        if choice in ("all", "mean"):
            return all_of_them
        return choice if isinstance(choice, str) else ", ".join(map(str, choice))

    encoder = "" if found.whole.pixel is None else f"{len(found.whole.pixel)} encoder layers ({found.early} early), "
    parts = " + ".join(f"“{token}”" for token in found.tokens)
    latents = f"l² = {found.latents} latents" if found.latents else "no latents"
    return (
        f"Layers: {named(layers, 'mean of all')}; heads: {named(heads, 'mean of all')}. {encoder}"
        f"{len(found.whole.question)} LLM layers ({_early(found)} early), {latents}. Tokens of the word: {parts}."
    )


def _early(found: Levels) -> int:
    """Early layers of the LLM: its first half."""
    return len(found.whole.question) // 2


def _three(found: Levels, maps: Maps, layers, heads) -> list[tuple[np.ndarray | None, str, str]]:
    """(map, title, unit) of the levels: pixel from and to the word, space, question."""
    pixel = averaged(maps.pixel, layers, heads, found.early, "encoder")
    back = averaged(maps.pixel_back, layers, heads, found.early, "encoder")
    question = averaged(maps.question, layers, heads, _early(found), "LLM")
    none = "\nquestion not read" if pixel is None else ""
    # Each tile is encoded by itself, with attention of its own: a share of all of them means nothing.
    share = "\nword to patches" + ("" if maps is found.tiles else _percent(pixel))
    hidden = none or ("\nno patch sees the word" if _relative(back) is None else "\npatches to word")
    return [
        (_relative(pixel), f"Pixel level:{none or share}", _EVEN),
        (_relative(back), f"Pixel level:{hidden}", _EVEN),
        (maps.space, "Space level:\nimage tokens like the word", _COSINE),
        (_relative(question), "Question level:\nword to image" + _percent(question), _EVEN),
    ]


def draw(found: Levels, layers: str | Sequence[int] = "all", heads: str | Sequence[int] = "mean") -> Figure:
    """One word's figure: the three levels, early against late layers, every exchange layer, tiles if there are any.

    Args:
      found: of `levels.levels`. layers: all, early, late, or numbers, for the top row. heads: mean or numbers.

    Returns:
      A matplotlib figure that belongs to no window; see `save`.

    Raises:
      UserError: layers or heads that do not exist.
    """
    top = _three(found, found.whole, layers, heads)
    exchanges = 0 if found.exchange is None else -(-len(found.exchange) // COLUMNS)
    rows = 2 + (found.tiles is not None) + exchanges
    with matplotlib.rc_context(_SAVED):
        figure, axes = _figure(rows, COLUMNS, found.picture, 1.2)
        _title(figure, found)
        _image(axes[0, 0], found.picture, "Image")
        for panel, (grid, title, unit) in zip(axes[0, 1:], top):
            _heat(panel, found.picture, grid, title, unit, found.whole.extent)
        _early_and_late(axes[1], found, heads)
        row = 2
        if found.tiles is not None:
            _image(axes[row, 0], found.picture, "The same on the tiles")
            for panel, (grid, title, unit) in zip(axes[row, 1:], _three(found, found.tiles, layers, heads)):
                _heat(panel, found.picture, grid, title, unit, found.tiles.extent)
            row += 1
        if exchanges:
            maps = exchange_maps(found, heads)
            limits = _limits(list(maps), _EVEN)
            for i in range(len(maps)):
                _exchange(axes[row + i // COLUMNS, i % COLUMNS], found, maps, i, limits)
        text = "Top row: " + _about(found, layers, heads) + " Attention is relative to its mean over the image; "
        text += "in brackets, the share of it that is on the image."
        if exchanges:
            text += " Exchange: what each latent reads in its window (white borders), relative to reading it evenly."
            if found.side % math.isqrt(found.latents):
                text += " Windows overlap here, and tokens of several show their mean."
            if (found.windows >= 0).sum(1).max() == 1:
                text += " Each window holds one token here, so there is nothing to choose."
        _caption(figure, text, COLUMNS)
    return figure


def _early_and_late(axes: np.ndarray, found: Levels, heads) -> None:
    """Encoder and LLM, early and late, on one scale each; and how much of the attention is on the image, by layer."""
    for first, (maps, early, what, extent) in enumerate(
        (
            (found.whole.pixel, found.early, "Encoder", found.whole.extent),
            (found.whole.question, _early(found), "LLM", found.whole.extent),
        )
    ):
        halves = [averaged(maps, half, heads, early, what) if early else None for half in ("early", "late")]
        limits = _limits([_relative(half) for half in halves], _EVEN)
        for i, (half, name) in enumerate(zip(halves, ("early", "late"))):
            title = f"{what}, {name} layers:\nword to image{_percent(half)}"
            _heat(axes[2 * first + i], found.picture, _relative(half), title, _EVEN, extent, limits)
    chart = axes[4]
    chart.set_axis_on()
    chart.set_box_aspect(min(found.picture.shape[0] / found.picture.shape[1], 1))
    for maps, what, mark in ((found.whole.pixel, "encoder", "o"), (found.whole.question, "LLM", "s")):
        if maps is not None:
            taken = maps[:, chosen(heads, maps.shape[1], 0, f"heads of the {what}")].sum((2, 3)).mean(1)
            depth = (np.arange(len(taken)) + 0.5) / len(taken)
            chart.plot(depth, 100 * taken, mark + "-", markersize=3.5, linewidth=1.4, label=what)
    chart.axvline(0.5, color="0.8", linewidth=0.8, zorder=0)
    chart.set(xlim=(0, 1), xlabel="depth, first to last layer", ylabel="%")
    chart.set_ylim(0, 1.08 * chart.dataLim.ymax)
    chart.set_title("Share of the word's attention\nthat is on the image")
    chart.spines[["top", "right"]].set_visible(False)
    chart.legend(frameon=False, fontsize=8)


def draw_side_by_side(
    found: Mapping[str, Levels], layers: str | Sequence[int] = "all", heads: str | Sequence[int] = "mean"
) -> Figure:
    """Several models on one word, a row each, every column on one scale; arguments and errors as for `draw`.

    Args:
      found: levels by the name to be printed, the same image, question and word.
    """
    table = []
    for one in found.values():
        top = _three(one, one.whole, layers, heads)
        maps = None if one.exchange is None else exchange_maps(one, heads)
        table.append(([top[0], top[2], top[3]], maps))
    limits = [_limits([row[0][i][0] for row in table], table[0][0][i][2]) for i in range(3)]
    everything = [grid for _, maps in table if maps is not None for grid in (maps[0], maps[-1])]
    first = next(iter(found.values()))
    with matplotlib.rc_context(_SAVED):
        figure, axes = _figure(len(found), 6, first.picture, 1.1)
        _title(figure, first)
        for row, (name, one), (top, maps) in zip(axes, found.items(), table):
            _image(row[0], one.picture, textwrap.fill(name, 26))
            for panel, (grid, title, unit), scale in zip(row[1:], top, limits):
                _heat(panel, one.picture, grid, title, unit, one.whole.extent, scale)
            for panel, which in zip(row[4:], (0, -1)):
                if maps is None:
                    _heat(panel, one.picture, None, "no exchange", _EVEN)
                elif which == 0 or len(maps) > 1:
                    _exchange(panel, one, maps, which % len(maps), _limits(everything, _EVEN))
        text = _about(first, layers, heads) + " Each column has one scale. Attention is relative to its mean over the "
        text += "image, exchange to reading a window evenly. What is off is off at inference alone: the weights were "
        text += "trained with it; another checkpoint is named as such."
        _caption(figure, text, 6)
    return figure


def draw_small(found: Levels) -> Figure:
    """The three levels and the mean of the exchange layers in two columns, legible on a phone; layers and heads are
    averaged. Without exchange the image has its place."""
    pixel, _, space, question = _three(found, found.whole, "all", "mean")
    with matplotlib.rc_context(_SAVED):
        figure, axes = _figure(2, 2, found.picture, 0.9)
        asked = textwrap.shorten(" ".join(found.question.split()), 100, placeholder=" …")
        figure.suptitle(textwrap.fill(f"“{asked}”", 52) + f"\nword: “{found.word}”", fontsize=10, fontweight="bold")
        for panel, (grid, title, unit) in zip(axes.flat, (pixel, space, question)):
            _heat(panel, found.picture, grid, title, unit, found.whole.extent)
        if found.exchange is None:
            _image(axes[1, 1], found.picture, "Image\n(no exchange)")
        else:
            title = f"Exchange: latents to image\nmean of {len(found.exchange)} layer(s)"
            _heat(axes[1, 1], found.picture, exchange_maps(found).mean(0), title, "× even in its window")
            _windows(axes[1, 1], found)
        for panel in axes.flat:
            panel.title.set_fontsize(8.5)
    return figure


def pixels(figure: Figure, dpi: int) -> np.ndarray:
    """The figure as (height, width, 3) uint8."""
    with matplotlib.rc_context(_SAVED):
        figure.set_dpi(dpi)
        figure.canvas.draw()
        return np.array(figure.canvas.buffer_rgba())[..., :3]


def save(figure: Figure, out: str | Path) -> list[Path]:
    """Writes `out`.png and `out`.svg, folders being made; an ending .png or .svg of `out` is dropped."""
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
