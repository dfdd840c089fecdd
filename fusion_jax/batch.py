"""Defines the batch, which data makes and models read, and the adaptive cells and windows of both.

`data/layout.py` shows a row as a diagram. Everything here is NumPy. Adaptive cells are the same everywhere in this
model: cell i of `cells` over `size` covers [floor(i size / cells), ceil((i + 1) size / cells)), so neighbours overlap
where `cells` does not divide `size`. All grids are row-major.
"""

from dataclasses import dataclass, field

import jax
import numpy as np

# Values of `Batch.crop_kind`.
NO_CROP, PIXELS, ZERO_IMAGE = 0, 1, 2


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """One batch of B rows in G groups.

    S positions, K crops per group, Q plain quadrants per crop, T question tokens, R rounds, M tokens in the widest
    window. B is a multiple of G; group g has the rows from g B/G on.

    Attributes:
      tokens: (B, S) int32 text ids in [0, vocabulary); visual positions and padding hold 0.
      targets: (B, S) int32 the token to predict at this position (already shifted by one); 0 where unsupervised.
      loss_weights: (B, S) float32, 1 where `targets` counts, else 0.
      segment_ids: (B, S) int32, number of the example in the row, from 1; 0 is padding.
      positions: (B, S) int32, from 0 within each example.
      visual_index: (B, S) int32, -1 text, else an index into the group's visual table
        [K I whole views | K J tiles | 1 row end | B/G R L latents], the second and third with dynamic resolution only.
      crops: (G, K, H, W, 3) uint8, whole images and tiles, which the question guides.
      crop_kind: (G, K) int32, NO_CROP, PIXELS or ZERO_IMAGE (0.0 after normalisation).
      quadrants: (G, K, Q, H, W, 3) uint8, plain views for the exchange context; Q is 4 or 0.
      crop_text: (G, K, T) int32 question tokens that the crop's encoding reads; crop_text_mask: (G, K, T) bool.
      round_crop: (B, R) int32 the crop, of the group's K, that is the whole view of the round's image.
      round_end: (B, R) int32 index in the row of the last token before the answer; for a text-only example only where
        the row holds nothing else. latent_start: (B, R) int32 index in the row of the round's first latent. All three
        are -1 where there is none.
      windows: (B, R, L, M) int32, the tokens of the group's exchange context in each latent's window; -1 is none. The
        context is the first two parts of the visual table, or with quadrants K grids of 3l x 3l.
      latent_count: L = l^2, static.
    """

    tokens: np.ndarray
    targets: np.ndarray
    loss_weights: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    visual_index: np.ndarray
    crops: np.ndarray
    crop_kind: np.ndarray
    quadrants: np.ndarray
    crop_text: np.ndarray
    crop_text_mask: np.ndarray
    round_crop: np.ndarray
    round_end: np.ndarray
    latent_start: np.ndarray
    windows: np.ndarray
    latent_count: int = field(metadata={"static": True})


def adaptive_cells(size: int, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """The indices that each cell covers, int (cells, widest), and which of them are valid, bool (cells, widest)."""
    start = np.arange(cells) * size // cells
    stop = -(-(np.arange(cells) + 1) * size // cells)
    index = start[:, None] + np.arange((stop - start).max())[None]
    return np.minimum(index, size - 1), index < stop[:, None]


def windows(size: int, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """The flat indices of each window's tokens in a size x size grid, int (cells^2, M), and which of them are valid."""
    index, valid = adaptive_cells(size, cells)
    flat = index[:, None, :, None] * size + index[None, :, None, :]
    both = valid[:, None, :, None] & valid[None, :, None, :]
    return flat.reshape(cells**2, -1), both.reshape(cells**2, -1)
