"""Names the logical axes of activations, by which they are sharded over the devices of a mesh.

`fusion_jax.devices.sharding` maps the names to mesh axes, and programs are traced under its mesh. Without a mesh, as on
a single device, nothing here does anything.

Names in use: `batch` (rows of a batch, or anything sharded like them), `heads`, `mlp`, `vocab`, `embed` and `rows` (see
`llm.Decoder.embed`). None: not sharded.
"""

import contextlib
import contextvars
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

Names = tuple[str | None, ...]


_platform: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


@contextlib.contextmanager
def compiled_for(platform: str):
    """Makes programs traced inside be for that kind of device, whatever this machine has."""
    token = _platform.set(platform)
    try:
        yield
    finally:
        _platform.reset(token)


def platform() -> str:
    """Returns the kind of device for which a program is traced now: cpu, gpu or tpu."""
    return _platform.get() or jax.default_backend()


def active() -> bool:
    """Returns whether a program traced now is sharded over devices by logical names."""
    mesh = jax.sharding.get_abstract_mesh()
    # Inside `split` every axis is manual: there the arrays are one device's own.
    automatic = set(mesh.axis_names) - set(mesh.manual_axes)
    return any(mesh.shape[axis] > 1 for axis in automatic) and bool(nn.get_logical_axis_rules())


def constrain(x: ArrayLike, *names: str | None) -> ArrayLike:
    """Shards the axes of `x` over the devices by their logical names."""
    return nn.with_logical_constraint(x, names) if active() else x


def devices() -> int:
    """Returns the number of devices over which a program traced now is sharded."""
    return jax.sharding.get_abstract_mesh().size if active() else 1


def split(function: Callable, arguments: Sequence[Names], results: Names | tuple[Names, ...]) -> Callable:
    """Makes `function` run on each device's own shard of its arguments; returns it as it is if nothing is sharded.

    Args:
      arguments: logical names of every argument's axes; an argument may be None.
      results: logical names of the result's axes, or a tuple of such names if there are several results.
    """
    if not active():
        return function
    spec = nn.logical_to_mesh_axes
    several = bool(results) and isinstance(results[0], tuple)
    out = tuple(map(spec, results)) if several else spec(results)
    # Pallas kernels and custom VJPs carry no annotations that the replication check could read.
    return jax.shard_map(function, in_specs=tuple(map(spec, arguments)), out_specs=out, check_vma=False)


def take(x: jax.Array, index: jax.Array, split_last: str | None = None) -> jax.Array:
    """Takes x[a, index[a]] for all a of axis 0: (A, n, ...), (A, ...) -> (A, ..., ...); devices read their own rows.

    `split_last`: logical name of the last axis of `x`, if it is sharded.
    """
    names = ("batch", *(None,) * (x.ndim - 2), split_last)
    indices = ("batch", *(None,) * (index.ndim - 1))
    return split(lambda x, i: x[_rows(i), i], (names, indices), (*indices, *names[2:]))(x, index)


def take_once(x: jax.Array, index: jax.Array) -> jax.Array:
    """Does what `take` does if no a repeats an index; zeros beyond the end. Its gradient needs no atomic sums."""
    names, indices = (("batch", *(None,) * (a.ndim - 1)) for a in (x, index))

    def run(x, i):
        return x.at[_rows(i), i].get(mode="fill", fill_value=0, unique_indices=True)

    return split(run, (names, indices), (*indices, *names[2:]))(x, index)


def add_once(x: jax.Array, index: jax.Array, update: jax.Array) -> jax.Array:
    """Adds update[a] to x[a, index[a]] for every a along axis 0, if no a repeats an index.

    Indices beyond the end are ignored.
    """
    names, indices, updates = (("batch", *(None,) * (a.ndim - 1)) for a in (x, index, update))

    def run(x, i, u):
        return x.at[_rows(i), i].add(u, mode="drop", unique_indices=True)

    return split(run, (names, indices, updates), names)(x, index, update)


def _rows(index: jax.Array) -> jax.Array:
    """Returns 0, 1, ... along axis 0, in a shape that broadcasts with `index`."""
    return jnp.arange(index.shape[0]).reshape(-1, *(1,) * (index.ndim - 1))


def devices_along(name: str) -> tuple[str, ...]:
    """Returns the mesh axes of a logical name, without those of size 1; for collectives inside `split`."""
    if not active():
        return ()
    axes = nn.logical_to_mesh_axes((name,))[0] or ()
    sizes = jax.sharding.get_abstract_mesh().shape
    return tuple(axis for axis in ((axes,) if isinstance(axes, str) else axes) if sizes[axis] > 1)
