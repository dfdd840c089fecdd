"""Chooses the tiles of dynamic resolution: one view of the whole image and a grid of tiles.

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
width and height, so that rows can be planned without decoding it. Exported folders carry this file.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PADDING = 127  # mid-grey: about 0.0 after normalisation


@dataclass(frozen=True)
class Tiling:
    """How one image is cut. Without tiles (`rows` 0) it is its whole view.

    Attributes:
      rows, columns: numbers of tiles. width, height: pixels of the resized image, on a canvas of columns x rows tiles.
      left, top: its place on that canvas.
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
        """Returns (first row, end row, first column, end column) of the merged grid's tokens that hold any image.

        Args:
          size: pixels of a tile's side. side: tokens of a tile's side.
        """
        ends = []
        for start, extent in ((self.top, self.height), (self.left, self.width)):
            ends += [start * side // size, -(-(start + extent) * side // size)]
        return tuple(ends)

    def tokens(self, size: int, side: int) -> int:
        """Returns the positions that the tiles take in the sequence, row ends included."""
        top, bottom, left, right = self.box(size, side)
        return (bottom - top) * (right - left + 1) if self.rows else 0


WHOLE = Tiling()


def choose_tiling(size: tuple[int, int], grids: Sequence[tuple[int, int]], tile: int) -> Tiling:
    """Chooses the tiling of an image.

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


def on_canvas(content: np.ndarray, tiling: Tiling, tile: int) -> np.ndarray:
    """Cuts the resized image (height, width, 3) uint8 into its tiles, row by row: (N, tile, tile, 3) uint8."""
    rows, columns = tiling.rows, tiling.columns
    canvas = np.full((rows * tile, columns * tile, 3), PADDING, np.uint8)
    canvas[tiling.top : tiling.top + tiling.height, tiling.left : tiling.left + tiling.width] = content
    return canvas.reshape(rows, tile, columns, tile, 3).swapaxes(1, 2).reshape(-1, tile, tile, 3)


@functools.lru_cache(4096)
def tile_places(tiling: Tiling, tile: int, side: int) -> np.ndarray:
    """Returns (h, w) int, for the tokens inside the box, in their rows: number of the tile times side^2, plus the token
    within it."""
    top, bottom, left, right = tiling.box(tile, side)
    y, x = np.arange(top, bottom)[:, None], np.arange(left, right)[None]
    return (y // side * tiling.columns + x // side) * side * side + y % side * side + x % side


def most_tokens(grids: Sequence[tuple[int, int]], tile_tokens: int) -> int:
    """Returns the most positions that the tiles of one image take, if no padding is cut away."""
    side = math.isqrt(tile_tokens)
    return max((r * side * (c * side + 1) for r, c in grids if r * c > 1), default=0)
