"""The tokens of an answer on CPU in C (cpu_decoding.c): attention over the cache, and products with int8 weights.

They read the cache and the weights where they lie; XLA copies a layer's part of the cache, and restores int8 weights to
float32, for every token. They have no gradients.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Int8

from fusion_jax.models import partition
from fusion_jax.models.cpu_kernels import CACHED, INT8, available

_MOST_ROWS = 16  # of a product; with more, restoring the weights costs little


def attends(*arrays: ArrayLike) -> bool:
    """Returns whether `cached_attention` can take these arrays: float32, on a CPU, and not sharded."""
    alone = partition.platform() == "cpu" and not partition.active()
    return alone and all(x.dtype == jnp.float32 for x in arrays) and available()


def multiplies(x: ArrayLike) -> bool:
    """Returns whether `product` can take x (N, I), and is faster than XLA."""
    return len(x) <= _MOST_ROWS and attends(x)


def cached_attention(
    q: Float[Array, "B 1 H d"],
    keys: Float[Array, "layers B K d C"],
    values: Float[Array, "layers B K C d"],
    layer: Int[Array, ""],
    segments: Int[Array, "B C"],
) -> Float[Array, "B 1 H d"]:
    """Computes `attention.cached_attention` over one layer of the cache; zeros where no slot is seen."""
    call = jax.ffi.ffi_call(CACHED, jax.ShapeDtypeStruct(q[:, 0].shape, jnp.float32))
    return call(q[:, 0], keys, values, segments, jnp.asarray(layer, jnp.int32))[:, None]


def product(x: Float[Array, "N I"], weights: Int8[Array, "I O"], scales: Float[Array, " O"]) -> Float[Array, "N O"]:
    """Computes x (W scales), in float32."""
    return jax.ffi.ffi_call(INT8, jax.ShapeDtypeStruct((len(x), len(scales)), jnp.float32))(x, weights, scales)
