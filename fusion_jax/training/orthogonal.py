"""Makes gradients of matrices orthogonal for Muon: every singular value becomes about 1, the singular vectors stay.

Five Newton-Schulz steps (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon) take matrix products alone. On
several devices every matrix is moved to one of them, which computes it whole, and moved back:

    stack of 4 matrices, each cut in columns      moved to 2 devices        cut as before
        device 0: a b c d, left halves      ->        0: a b          ->      left halves
        device 1: a b c d, right halves               1: c d                  right halves

Cut as they are, each of the steps would send sums of products, and the devices would repeat some of the products.
"""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from fusion_jax.devices import sharding
from fusion_jax.models import partition

# The root mean square of an update's elements. With 0.2, about that of Adam's updates, one learning rate and one weight
# decay serve the matrices and all other parameters (Liu et al., 2025, https://arxiv.org/abs/2502.16982).
RMS = 0.2
ENOUGH = 4  # matrices on each device


def directions(gradients: Sequence[jax.Array]) -> list[jax.Array]:
    """Makes every matrix of every stack (..., I, O) orthogonal and scales it to a root mean square of at most `RMS`.

    A matrix without full rank gets less. Computed in float32, whose products are the fastest that a device has for it:
    16-bit multiplications on TPUs, TF32 on GPUs.
    """
    done = {}
    for members in groups([x.shape for x in gradients], partition.devices()):
        # I x O and O x I go together: the steps give a transposed matrix the transposed result.
        wide = [_wide(gradients[i]) for i in members]
        stacks = [x.reshape(-1, *x.shape[-2:]) for x in wide]
        ends = list(itertools.accumulate(map(len, stacks)))
        results = jnp.split(_orthogonal(jnp.concatenate(stacks)), ends[:-1])
        for i, x, result in zip(members, wide, results):
            result = RMS * math.sqrt(x.shape[-1]) * result.reshape(x.shape)
            done[i] = result if x.shape == gradients[i].shape else result.mT
    return [done[i] for i in range(len(gradients))]


def _wide(x: jax.Array) -> jax.Array:
    return x.mT if x.shape[-2] > x.shape[-1] else x


def groups(shapes: Sequence[tuple[int, ...]], devices: int) -> list[list[int]]:
    """Returns which stacks (..., I, O) to join, by their indices: those of one size, I x O or O x I.

    A group gets no more if the devices have equally many of its matrices, or `ENOUGH` each, so that few wait for the
    others; the memory grows with the group.
    """
    done, filling = [], {}
    for i, shape in enumerate(shapes):
        size = tuple(sorted(shape[-2:]))
        if size not in filling:
            filling[size] = []
            done.append(filling[size])
        filling[size].append(i)
        count = sum(math.prod(shapes[j][:-2]) for j in filling[size])
        if count % devices == 0 or count >= ENOUGH * devices:
            del filling[size]
    return done


def _orthogonal(stack: jax.Array) -> jax.Array:
    padded = jnp.pad(stack, ((0, -len(stack) % partition.devices()), (0, 0), (0, 0)))
    spread = _moved(padded, (1, 2, 3))
    # A running mean with decay 0 is its argument; optax has no public function for the steps alone.
    axes = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    tx = optax.contrib.scale_by_muon(beta=0.0, nesterov=False, weight_dimension_numbers=axes)
    return _moved(tx.update(spread, tx.init(spread))[0], (2, 1))[: len(stack)]


def _moved(stack: jax.Array, counts: Sequence[int]) -> jax.Array:
    """Shards axis 0 of a stack over so many mesh axes, one count after the other.

    Moving along one mesh axis at a time is an exchange of parts; for a move along several, XLA would first copy
    everything to every device.
    """
    if partition.devices() > 1:
        for count in counts:
            rest = PartitionSpec.UNCONSTRAINED if count == 1 else None  # of its rows and columns, cut along two axes
            spec = PartitionSpec((sharding.FSDP, sharding.TENSOR, sharding.DATA)[:count], rest, rest)
            stack = jax.lax.with_sharding_constraint(stack, spec)
    return stack
