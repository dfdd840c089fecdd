"""Pools grids of visual tokens by adaptive maxima (`batch.adaptive_cells`) or resizes them bilinearly.

All grids are row-major.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fusion_jax.batch import adaptive_cells


def adaptive_max_pool(grid: Float[Array, "N h w D"], cells: int) -> Float[Array, "N c c D"]:
    """Pools maxima adaptively to cells x cells, one axis at a time (a maximum over a rectangle is separable)."""
    for axis in (1, 2):
        size = grid.shape[axis]
        if size % cells == 0:  # equal cells: no gather
            shape = (*grid.shape[:axis], cells, size // cells, *grid.shape[axis + 1 :])
            grid = grid.reshape(shape).max(axis + 1)
        else:
            index, valid = adaptive_cells(size, cells)
            values = jnp.take(grid, jnp.asarray(index.ravel()), axis=axis)
            values = values.reshape(*grid.shape[:axis], *index.shape, *grid.shape[axis + 1 :])
            valid = valid.reshape((1,) * axis + index.shape + (1,) * (grid.ndim - axis - 1))
            grid = jnp.where(valid, values, -jnp.inf).max(axis + 1)
    return grid


def stitch_quadrants(quadrants: Float[Array, "N 4 P D"]) -> Float[Array, "N twice_h twice_w D"]:
    """Joins top left, top right, bottom left and bottom right, each h x h, to one 2h x 2h grid."""
    n, _, patches, width = quadrants.shape
    side = int(patches**0.5)
    x = quadrants.reshape(n, 2, 2, side, side, width).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, 2 * side, 2 * side, width)


def _bilinear(size: int, out: int) -> np.ndarray:
    """Returns an interpolation matrix (out, size): half-pixel centres, edges clamped, no antialiasing."""
    centre = np.clip((np.arange(out) + 0.5) * size / out - 0.5, 0, size - 1)
    low = np.floor(centre).astype(int)
    high = np.minimum(low + 1, size - 1)
    matrix = np.zeros((out, size), np.float32)
    np.add.at(matrix, (np.arange(out), low), 1 - (centre - low))
    np.add.at(matrix, (np.arange(out), high), centre - low)
    return matrix


def resize_tokens(tokens: Float[Array, "N P D"], count: int) -> Float[Array, "N count D"]:
    """Resizes a square grid of tokens bilinearly to a square of `count` tokens (FUSION-L, tiles)."""
    n, patches, width = tokens.shape
    if patches == count:
        return tokens
    side, out = int(patches**0.5), int(count**0.5)
    matrix = jnp.asarray(_bilinear(side, out), tokens.dtype)
    grid = tokens.reshape(n, side, side, width)
    return jnp.einsum("oh,pw,nhwd->nopd", matrix, matrix, grid).reshape(n, count, width)
