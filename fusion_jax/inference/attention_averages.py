"""Averages attention maps over layers and heads, and divides them by uniform attention."""

from collections.abc import Sequence

import numpy as np

from fusion_jax.errors import UserError, check
from fusion_jax.inference.attention_maps import Levels


def chosen(choice: str | Sequence[int], count: int, early: int, name: str) -> np.ndarray:
    """The indices of the chosen layers or heads.

    Args:
      choice: all, mean (the same), early, late, or numbers from 0. count: how many there are. early: how many of them
        are early. name: the name of the layers or heads in errors.

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
            raise UserError(f"{name}: {choice!r} is neither a known word nor numbers such as 0,3.") from None
    wrong = [number for number in choice if not 0 <= number < count]
    check(not wrong, f"{name}: there is no {', '.join(map(str, wrong))}; numbers go from 0 to {count - 1}.")
    return np.asarray(choice)


def averaged(maps: np.ndarray | None, layers, heads, early: int, part: str) -> np.ndarray | None:
    """The mean of maps (layers, heads, h, w) over the chosen layers and heads, (h, w); None where there are no maps.

    Args:
      layers, heads, early: see `chosen`. part: the part of the model, for errors.
    """
    if maps is None:
        return None
    some = maps[chosen(layers, len(maps), early, f"layers of the {part}")]
    return some[:, chosen(heads, maps.shape[1], 0, f"heads of the {part}")].mean((0, 1))


def exchange_maps(levels: Levels, heads: str | Sequence[int] = "mean") -> np.ndarray:
    """Each token's weight in its window, (exchange layers, side, side); 1 where a latent reads its window evenly.

    Where windows overlap, a token has the mean over its windows.
    """
    weights = levels.exchange[:, chosen(heads, levels.exchange.shape[1], 0, "heads of the exchange")].mean(1)
    real = levels.windows >= 0
    total, times = np.zeros((len(weights), levels.side**2)), np.zeros(levels.side**2)
    relative = weights / np.maximum((weights * real).sum(-1, keepdims=True), 1e-12) * real.sum(-1, keepdims=True)
    np.add.at(times, levels.windows[real], 1)
    for layer, values in zip(total, relative):
        np.add.at(layer, levels.windows[real], values[real])
    return (total / np.maximum(times, 1)).reshape(len(weights), levels.side, levels.side)


def relative(grid: np.ndarray | None) -> np.ndarray | None:
    """Attention relative to its mean over the image, (h, w); None where no attention is on the image."""
    if grid is None or grid.mean() < 1e-12:
        return None
    return grid / grid.mean()


def early_llm_layers(levels: Levels) -> int:
    """The number of early layers of the LLM: its first half."""
    return len(levels.whole.question) // 2
