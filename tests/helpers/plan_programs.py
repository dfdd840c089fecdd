"""Compiles small programs for 8 CPU devices and prints their optimized HLO as JSON; run by test_planning.py."""

import json
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

jax.config.update("jax_num_cpu_devices", 8)
MESH = jax.make_mesh((2, 4, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
ROWS = ("data", "fsdp")


def abstract(shape, *spec):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(MESH, PartitionSpec(*spec)))


def layers(w, x):
    """A scan over layers whose weights are gathered."""

    def layer(x, w):
        w = jax.lax.with_sharding_constraint(w, NamedSharding(MESH, PartitionSpec()))
        return jnp.tanh(x @ w), None

    return jax.lax.scan(layer, x, w)[0].sum()


def loop(n, x):
    """As many rounds as its argument says."""
    return jax.lax.fori_loop(0, n, lambda _, x: jnp.tanh(x @ x), x)


def nested(x):
    """3 batched products, 4 times."""

    def outer(x, _):
        return jax.lax.scan(lambda y, _: (jnp.einsum("bij,bjk->bik", y, y) * 0.1, None), x, length=3)[0], None

    return jax.lax.scan(outer, x, length=4)[0]


def summed(axes):
    rest = tuple(axis for axis in ROWS if axis not in axes)
    spec = PartitionSpec(rest or None)
    return jax.shard_map(lambda x: jax.lax.psum(x, axes), mesh=MESH, in_specs=PartitionSpec(ROWS), out_specs=spec)


PROGRAMS = {
    "layers": (jax.grad(layers), abstract((5, 64, 64), None, "fsdp"), abstract((16, 64), ROWS)),
    "loop": (loop, jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((32, 32), jnp.float32)),
    "nested": (nested, jax.ShapeDtypeStruct((6, 40, 40), jnp.float32)),
    **{"+".join(axes): (summed(axes), abstract((8, 128), ROWS)) for axes in (("data",), ("fsdp",), ROWS)},
}

texts = {
    name: jax.jit(function).lower(*arguments).compile().as_text() for name, (function, *arguments) in PROGRAMS.items()
}
json.dump(texts, sys.stdout)
