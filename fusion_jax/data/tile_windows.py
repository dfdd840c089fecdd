"""Computes the latents' windows over an image's whole view and its tiles; see tiles.py."""

import functools
from collections.abc import Sequence

import numpy as np

from fusion_jax.batch import adaptive_cells, windows
from fusion_jax.data.tiles import Tiling, tile_places


def widest_window(grids: Sequence[tuple[int, int]], side: int, tile_side: int, cells: int) -> int:
    """Returns the most tokens that one of cells x cells windows holds, over the whole view and tiles of any image."""
    widest = windows(side, cells)[0].shape[1]

    def most(size: int) -> int:  # a box may end anywhere
        return max(adaptive_cells(length, cells)[0].shape[1] for length in range(1, size + 1))

    return widest + max(
        (most(rows * tile_side) * most(columns * tile_side) for rows, columns in grids if rows * columns > 1), default=0
    )


@functools.lru_cache(4096)
def tile_windows(tiling: Tiling, tile: int, side: int, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the windows of the cells x cells latents over the box, like `batch.windows`: places (see `tile_places`)
    and which of them are real, both (cells^2, M)."""
    places = tile_places(tiling, tile, side)
    (row, row_real), (column, column_real) = (adaptive_cells(size, cells) for size in places.shape)
    index = places[row[:, None, :, None], column[None, :, None, :]]
    real = row_real[:, None, :, None] & column_real[None, :, None, :]
    return index.reshape(cells**2, -1), real.reshape(cells**2, -1)
