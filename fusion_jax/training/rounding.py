"""Stores arrays of the training state in fewer bits than float32, rounded so that sums over many steps stay unbiased.

A small change, added step after step to a number of 16 or 8 bits, would vanish if the sum were rounded to the nearest
value. Stochastic rounding takes the lower or the upper neighbour with probabilities that make the expected value the
exact one. The random bits are a hash of the step, the name of the array and the position of the element, so that a
step gives the same numbers on every mesh, with any number of processes, and after a restart.

Eight-bit numbers are stored with one scale for each row (all but the last axis), the largest magnitude in it:

    signed (int8)       sign, then 127 magnitudes from 1.25 * 2^-16 to 1 times the scale
    unsigned (uint8)    255 magnitudes from 1.25 * 2^-32 to 1 times the scale
                        in both, 0 and eight levels for each power of two: a float with three bits of mantissa

so that a small number beside a large one keeps its relative precision, as in bitsandbytes' dynamic quantization
(Dettmers et al., 2022, https://arxiv.org/abs/2110.02861), whose rounding is to the nearest value.
"""

import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

INT8 = "int8"  # the dtype by name of what is stored as `Coded`
_DROPPED = 20  # bits of a float32's mantissa of 23 that eight-bit numbers do not keep
_ONE = 127 << 3  # float32 1.0 without them: exponent and three bits of mantissa


class Coded(NamedTuple):
    """Numbers in eight bits.

    Attributes:
      codes: int8 (signed) or uint8 (not negative), in the shape of the numbers.
      scale: float32 (..., 1), the largest magnitude in each row.
    """

    codes: jax.Array
    scale: jax.Array


def zeros(like, dtype: str, signed: bool = True) -> jax.Array | Coded:
    """Returns zeros in the shape of `like`. `dtype`: a float type, or `INT8`, for which `like` needs an axis."""
    if dtype != INT8:
        return jnp.zeros(like.shape, dtype)
    return Coded(jnp.zeros(like.shape, jnp.int8 if signed else jnp.uint8), jnp.zeros((*like.shape[:-1], 1)))


def read(stored: jax.Array | Coded) -> jax.Array:
    """Returns stored numbers in float32."""
    if not isinstance(stored, Coded):
        return stored.astype(jnp.float32)
    code = stored.codes.astype(jnp.int32)
    magnitude = jnp.abs(code)
    level = jax.lax.bitcast_convert_type(magnitude + _base(stored.codes) << _DROPPED, jnp.float32)
    return jnp.where(magnitude > 0, jnp.sign(code) * level * stored.scale, 0)


def write(values: jax.Array, like: jax.Array | Coded, key: jax.Array) -> jax.Array | Coded:
    """Rounds float32 numbers stochastically to the form in which `like` is stored; float32 stays as it is.

    Unsigned eight-bit numbers above 0 are never rounded to 0: a second moment of 0 would make the update infinite.

    Args:
      key: of this array in this step, from `key_of`.
    """
    if isinstance(like, Coded):
        return _encode(values, like.codes, random_bits(values.shape, key))
    if like.dtype == jnp.float32:
        return values
    assert like.dtype == jnp.bfloat16, like.dtype
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32) + (random_bits(values.shape, key) >> 16)
    return jax.lax.bitcast_convert_type(bits & np.uint32(0xFFFF0000), jnp.float32).astype(jnp.bfloat16)


def key_of(name: str, *counts: jax.Array | int) -> jax.Array:
    """Returns the key of an array's random bits, a uint32 scalar.

    Args:
      name: what is rounded. counts: numbers that differ whenever it is rounded, such as the step.
    """
    key = jnp.uint32(zlib.crc32(name.encode()))
    for count in counts:
        key = _mix(key ^ _mix(jnp.asarray(count).astype(jnp.uint32) + np.uint32(0x9E3779B9)))
    return key


def random_bits(shape: tuple[int, ...], key: jax.Array) -> jax.Array:
    """Returns uint32 random bits, a hash of the key and of each element's position.

    `jax.random` is no choice here: on a GPU its generator is a kernel of its own, which writes 16 bytes for each
    number, where these bits are computed inside the fusion that rounds.
    """
    position, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        position = position + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(stride % 2**32)
        stride *= shape[axis]
    return _mix(position ^ key)


def _mix(x: jax.Array) -> jax.Array:
    """Hashes uint32 numbers one to one; every bit depends on all (`lowbias32` of Wellons' hash-prospector)."""
    x = (x ^ x >> 16) * np.uint32(0x7FEB352D)
    x = (x ^ x >> 15) * np.uint32(0x846CA68B)
    return x ^ x >> 16


def _base(codes) -> int:
    """Returns what is added to a code to give exponent and mantissa of its level; the largest code is 1.0."""
    return _ONE - jnp.iinfo(codes.dtype).max


def _encode(values: jax.Array, codes: jax.Array, random: jax.Array) -> Coded:
    signed, base = codes.dtype == jnp.int8, _base(codes)
    scale = jnp.max(jnp.abs(values), axis=-1, keepdims=True)
    ratio = jnp.abs(values) / jnp.where(scale > 0, scale, 1)
    bits = jax.lax.bitcast_convert_type(ratio, jnp.uint32)
    random = random & (1 << _DROPPED) - 1
    magnitude = (bits + random >> _DROPPED).astype(jnp.int32) - base
    least = np.uint32(base + 1 << _DROPPED).view(np.float32)
    above_zero = ratio > (random.astype(jnp.float32) * (least / (1 << _DROPPED)) if signed else 0)
    magnitude = jnp.where(ratio < least, above_zero.astype(jnp.int32), magnitude)
    code = jnp.where(values < 0, -magnitude, magnitude) if signed else magnitude
    return Coded(code.astype(codes.dtype), scale)
