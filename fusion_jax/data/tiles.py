"""Dynamic resolution: an image as one view of the whole and a grid of tiles that keep its aspect ratio.

A 1000 x 600 image on the grid of 2 x 2 tiles, each `size` pixels wide and s x s tokens after pooling (here s = 3):

    +-----------+-----------+        tokens of the merged grid, 6 x 6; rows that hold padding alone (:) are cut away:
    | : : : : : | : : : : : |
    | content   |           |        whole view   I tokens
    +-----------+-----------+        row 1        t t t t t t E
    |           |           |        ...                           E: the row-end token
    | : : : : : | : : : : : |        row 4        t t t t t t E
    +-----------+-----------+

The grid is the one of the configured list that keeps most of the image's pixels and then wastes least (the rule of
LLaVA-NeXT, on which FLARE-X builds); 1 x 1 stands for the whole view alone. Everything here follows from the image's
width and height, so that rows can be planned without decoding it.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

from fusion_jax.data.image import read_resized
from fusion_jax.models.connector import adaptive_cells, windows

PADDING = 127  # mid-grey: about 0.0 after normalisation


@dataclass(frozen=True)
class Tiling:
    """How one image is cut. Without tiles (`rows` 0) it is its whole view.

    Attributes:
      rows, columns: of tiles. width, height: of the resized image in pixels, on a canvas of columns x rows tiles.
      left, top: where it lies on that canvas.
    """

    rows: int = 0
    columns: int = 0
    width: int = 0
    height: int = 0
    left: int = 0
    top: int = 0

    @property
    def crops(self) -> int:
        """Passes of the encoder: the whole view and the tiles."""
        return 1 + self.rows * self.columns

    def box(self, size: int, side: int) -> tuple[int, int, int, int]:
        """(first row, end row, first column, end column) of the merged grid's tokens that hold any of the image.

        Args:
          size: of a tile in pixels. side: tokens of a tile's side.
        """
        ends = []
        for start, extent in ((self.top, self.height), (self.left, self.width)):
            ends += [start * side // size, -(-(start + extent) * side // size)]
        return tuple(ends)

    def tokens(self, size: int, side: int) -> int:
        """Positions that the tiles take in the sequence, row ends included."""
        top, bottom, left, right = self.box(size, side)
        return (bottom - top) * (right - left + 1) if self.rows else 0


WHOLE = Tiling()


def choose_tiling(size: tuple[int, int], grids: Sequence[tuple[int, int]], tile: int) -> Tiling:
    """The tiling of an image.

    Args:
      size: (width, height) of the upright image in pixels. grids: allowed (rows, columns). tile: pixels of a tile.
    """
    width, height = size
    best, chosen = (-1.0, 0.0), WHOLE
    for rows, columns in grids:
        scale = min(columns * tile / width, rows * tile / height)
        kept = min(width * height * scale * scale, width * height)
        rank = (kept, kept - rows * columns * tile * tile)
        if rank > best:
            best = rank
            if rows * columns == 1:
                chosen = WHOLE
                continue
            w = min(max(1, round(width * scale)), columns * tile)
            h = min(max(1, round(height * scale)), rows * tile)
            chosen = Tiling(rows, columns, w, h, (columns * tile - w) // 2, (rows * tile - h) // 2)
    return chosen


def read_tiles(
    image: str | Path | bytes, tiling: Tiling, tile: int, decode: str = "exact", where: str | None = None
) -> UInt8[np.ndarray, "N tile tile 3"]:
    """The crops of an image file, or of a file's bytes: the whole view, its aspect ratio given up, then the tiles row
    by row. `decode` and errors as for `image.read_crops`."""
    rows, columns = tiling.rows, tiling.columns
    crops = np.empty((tiling.crops, tile, tile, 3), np.uint8)
    if not rows:
        [crops[0]] = read_resized(image, [(tile, tile)], decode, where)
        return crops
    crops[0], content = read_resized(image, [(tile, tile), (tiling.width, tiling.height)], decode, where)
    canvas = np.full((rows * tile, columns * tile, 3), PADDING, np.uint8)
    canvas[tiling.top : tiling.top + tiling.height, tiling.left : tiling.left + tiling.width] = content
    crops[1:] = canvas.reshape(rows, tile, columns, tile, 3).swapaxes(1, 2).reshape(-1, tile, tile, 3)
    return crops


@functools.lru_cache(4096)
def tile_places(tiling: Tiling, tile: int, side: int) -> Int[np.ndarray, "h w"]:
    """For the tokens inside the box, in their rows: number of the tile times side^2, plus the token within it."""
    top, bottom, left, right = tiling.box(tile, side)
    y, x = np.arange(top, bottom)[:, None], np.arange(left, right)[None]
    return (y // side * tiling.columns + x // side) * side * side + y % side * side + x % side


def widest_window(grids: Sequence[tuple[int, int]], side: int, tile_side: int, cells: int) -> int:
    """Most tokens that one of cells x cells windows holds, over the whole view and the tiles of any image."""
    widest = windows(side, cells)[0].shape[1]

    def most(size: int) -> int:  # a box may end anywhere
        return max(adaptive_cells(length, cells)[0].shape[1] for length in range(1, size + 1))

    return widest + max(
        (most(rows * tile_side) * most(columns * tile_side) for rows, columns in grids if rows * columns > 1), default=0
    )


@functools.lru_cache(4096)
def tile_windows(tiling: Tiling, tile: int, side: int, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows of the cells x cells latents over the box, like `connector.windows`: places (see `tile_places`), both
    (cells^2, M), and which of them are real."""
    places = tile_places(tiling, tile, side)
    (row, row_real), (column, column_real) = (adaptive_cells(size, cells) for size in places.shape)
    taken = places[row[:, None, :, None], column[None, :, None, :]]
    real = row_real[:, None, :, None] & column_real[None, :, None, :]
    return taken.reshape(cells**2, -1), real.reshape(cells**2, -1)


def most_tokens(grids: Sequence[tuple[int, int]], tile_tokens: int) -> int:
    """Most positions that the tiles of one image take: no padding cut away."""
    side = math.isqrt(tile_tokens)
    return max((r * side * (c * side + 1) for r, c in grids if r * c > 1), default=0)
