"""Defines the layers that encoder and decoder share: dense layers, norms, MLPs, rotary embedding.

Parameters are float32 and have logical axis names; products are computed in `dtype`, norms in float32. A model that
only answers may store them otherwise (`weights.py`).
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int

from fusion_jax.models import partition, weights
from fusion_jax.models.config import RopeConfig

Init = Callable[..., jax.Array]


def normal(stddev: float = 0.02) -> Init:
    """Returns a normal initialiser with mean 0."""
    return nn.initializers.normal(stddev)


def fan_in(branches: int = 1) -> Init:
    """Returns a truncated normal initialiser of variance 1 / fan-in / `branches`, the residual branches that add up."""
    return nn.initializers.variance_scaling(1.0 / branches, "fan_in", "truncated_normal")


def product(x: ArrayLike, kernel: ArrayLike) -> Array:
    """Computes `jnp.dot(x, kernel)` of (..., I) and (I, O)."""
    if partition.platform() != "cpu":
        return jnp.dot(x, kernel)
    # With one axis of rows XLA computes the kernel's gradient without copying operands, in two thirds of the time.
    rows = x.reshape(-1, x.shape[-1])
    y = jnp.dot(rows, kernel) if x.dtype == jnp.float32 else _narrow_product(rows, kernel)
    return y.reshape(*x.shape[:-1], -1)


def _float32_dot(a: ArrayLike, b: ArrayLike) -> Array:
    """On CPU only products with a float32 result use the matrix unit for 16 bits; result in the inputs' dtype."""
    return jnp.dot(a, b, preferred_element_type=jnp.float32).astype(a.dtype)


@jax.custom_vjp
def _narrow_product(x: ArrayLike, kernel: ArrayLike) -> Array:
    """Computes `x @ kernel`, (N, I) and (I, O), of 16 bits on CPU; its gradients are such products, too."""
    return _float32_dot(x, kernel)


_narrow_product.defvjp(
    lambda x, kernel: (_float32_dot(x, kernel), (x, kernel)),
    lambda arrays, d_y: (_float32_dot(d_y, arrays[1].T), _float32_dot(arrays[0].T, d_y)),
)


class Dense(nn.Module):
    """y = x W + b with W (inputs, features), the last axis contracted; axis 0 is sharded like the rows of the batch."""

    features: int
    axes: tuple[str, str]
    use_bias: bool = False
    dtype: DTypeLike = jnp.float32
    kernel_init: Init = fan_in()

    @nn.compact
    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(self.kernel_init, self.axes),
            (x.shape[-1], self.features),
            jnp.float32,
        )
        x, scales = x.astype(self.dtype), self.get_variable("params", weights.scale_name("kernel"))
        if scales is None:
            y = product(x, kernel.astype(self.dtype))
        else:
            y = weights.scaled_product(x, kernel, scales).astype(self.dtype)
        if self.use_bias:
            bias = self.param(
                "bias",
                nn.with_logical_partitioning(nn.initializers.zeros, self.axes[1:]),
                (self.features,),
                jnp.float32,
            )
            y = y + bias.astype(self.dtype)
        # The residual stream has its whole width on each device; heads and hidden units are sharded like their weights.
        split = None if self.axes[1] == "embed" else self.axes[1]
        return partition.constrain(y, "batch", *(None,) * (y.ndim - 2), split)


class LayerNorm(nn.Module):
    """LayerNorm with weight and bias; statistics and arithmetic in float32, result in the input's dtype."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = self.param(
            "scale", nn.with_logical_partitioning(nn.initializers.ones, ("norm",)), (x.shape[-1],), jnp.float32
        )
        bias = self.param(
            "bias", nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)), (x.shape[-1],), jnp.float32
        )
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + self.eps)
        return (y * scale + bias).astype(x.dtype)


class RMSNorm(nn.Module):
    """RMSNorm; arithmetic in float32, result in the input's dtype."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = self.param(
            "scale", nn.with_logical_partitioning(nn.initializers.ones, ("norm",)), (x.shape[-1],), jnp.float32
        )
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + self.eps)
        return (y * scale).astype(x.dtype)


def gelu_erf(x: Array) -> Array:
    """Computes GELU with the error function."""
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: Array) -> Array:
    """Computes the approximation of GELU with tanh."""
    return jax.nn.gelu(x, approximate=True)


class MLP(nn.Module):
    """Linear, activation, Linear."""

    hidden: int
    features: int
    activation: Callable[[Array], Array]
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32
    out_init: Init = fan_in()

    @nn.compact
    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        x = self.activation(Dense(self.hidden, ("embed", "mlp"), self.use_bias, self.dtype, name="in")(x))
        return Dense(self.features, ("mlp", "embed"), self.use_bias, self.dtype, self.out_init, name="out")(x)


def _inverse_frequencies(rope: RopeConfig, per_head: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Returns inverse frequencies (per_head / 2,) up to and beyond the original length, and the factor on cos, sin."""
    base = rope.theta ** -(np.arange(0, per_head, 2, dtype=np.float64) / per_head)
    if rope.kind == "default":
        return base, base, 1.0
    if rope.kind == "longrope":
        ratio = rope.max_length / rope.original_length
        scale = math.sqrt(1 + math.log(ratio) / math.log(rope.original_length)) if ratio > 1 else 1.0
        return base / np.array(rope.short_factors), base / np.array(rope.long_factors), scale
    # Llama-3 divides low frequencies by `factor`, keeps high ones, and blends linearly between the two wavelengths.
    wavelength = 2 * math.pi / base
    low, high = rope.low_freq_factor, rope.high_freq_factor
    blend = (rope.original_length / wavelength - low) / (high - low)
    mixed = (1 - blend) * base / rope.factor + blend * base
    scaled = np.where(
        wavelength > rope.original_length / low,
        base / rope.factor,
        np.where(wavelength < rope.original_length / high, base, mixed),
    )
    return scaled, scaled, 1.0


def example_lengths(segments: Int[Array, "B S"], positions: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """Counts the tokens in the example of each token; an example is a run of one segment at positions 0, 1, ..."""
    places = jnp.arange(segments.shape[1])
    ends = jnp.concatenate([segments[:, :-1] != segments[:, 1:], jnp.ones_like(segments[:, :1], bool)], 1)
    end = jax.lax.cummin(jnp.where(ends, places, segments.shape[1]), axis=1, reverse=True)
    return positions + 1 + end - places


def rotary(
    rope: RopeConfig, per_head: int, positions: Int[Array, "B S"], lengths: Int[Array, "B _S"]
) -> tuple[Float[Array, "B S half"], Float[Array, "B S half"]]:
    """Returns cos and sin of the rotary angles, float32, with LongRoPE's attention factor.

    Args:
      positions: position of each token within its own example.
      lengths: the number of tokens of each token's whole example (_S is S, or 1 if a row is one example). An example
        longer than `original_length` takes LongRoPE's long factors for all of its tokens, any other the short ones. The
        published code takes the longest row of the batch instead, so that a long row changes the others.
    """
    short, long, scale = _inverse_frequencies(rope, per_head)
    frequencies = jnp.asarray(short, jnp.float32)
    if rope.kind == "longrope":
        beyond = (lengths > rope.original_length)[..., None]
        frequencies = jnp.where(beyond, jnp.asarray(long, jnp.float32), frequencies)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def apply_rotary(
    x: Float[Array, "B S H d"], cos: Float[Array, "B S half"], sin: Float[Array, "B S half"]
) -> Float[Array, "B S H d"]:
    """Rotates queries or keys; each element of the head's first half is paired with one of its second half."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)
