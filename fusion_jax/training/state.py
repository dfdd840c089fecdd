"""Defines the training state, a pytree of arrays, and its shapes and shardings."""

import functools
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from fusion_jax.devices import sharding
from fusion_jax.models import fusion
from fusion_jax.models.config import FusionConfig

# The last path components of parameters that only matrix products read, in the compute dtype.
PRODUCTS = ("kernel", "in", "head")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that a step changes.

    Attributes:
      step: int32, number of steps taken, including skipped ones; it identifies the next batch.
      params: master weights, in the dtypes of `with_masters`. opt_state: the state of `optim.optimizer`.
      skipped: int32, number of steps skipped so far because loss, gradient or update were not finite.
      skipped_in_row: int32, number of steps skipped since the last good one.
    """

    step: jax.Array
    params: dict
    opt_state: optax.OptState
    skipped: jax.Array
    skipped_in_row: jax.Array


@functools.cache
def _boxed_parameters(config: FusionConfig):
    """Returns the shapes of the parameters with their logical axes; nothing is computed."""
    return jax.eval_shape(fusion.Fusion(config).init, jax.random.key(0), fusion.example_batch(config))["params"]


def abstract_parameters(config: FusionConfig, mesh: Mesh):
    """Returns shape, dtype and sharding of every parameter."""
    boxed = _boxed_parameters(config)
    return _with_shardings(nn.unbox(boxed), sharding.of_parameters(boxed, mesh))


def shapes(config: FusionConfig):
    """Returns shape and dtype of every parameter."""
    return nn.unbox(_boxed_parameters(config))


def with_masters(params, dtype: str):
    """Returns the parameters in the dtypes in which a stage keeps them: weights of products in `dtype`, others float32.

    Arrays are cast one at a time, and those in another dtype are deleted, so that memory never holds both.

    Args:
      params: arrays or shapes, with shardings. dtype: `StageConfig.master_weights`.
    """

    def cast(path, x):
        wanted = jnp.dtype(dtype if path[-1].key in PRODUCTS else jnp.float32)
        if x.dtype == wanted:
            return x
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, wanted, sharding=x.sharding)
        new = jax.block_until_ready(jax.jit(lambda x: x.astype(wanted), out_shardings=x.sharding)(x))
        x.delete()
        return new

    return jax.tree.map_with_path(cast, params)


def abstract(params, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Returns shape, dtype and sharding of every array of a state; `params` may be abstract."""
    shapes = jax.eval_shape(functools.partial(create, tx=tx), params)
    placed, everywhere = jax.tree.map(lambda p: p.sharding, params), sharding.replicated(mesh)
    places = TrainState(
        step=everywhere,
        params=placed,
        opt_state=sharding.of_optimizer(tx, shapes.params, placed, mesh),
        skipped=everywhere,
        skipped_in_row=everywhere,
    )
    return _with_shardings(shapes, places)


def initial_parameters(config: FusionConfig, seed: int, mesh: Mesh):
    """Draws random float32 parameters, the same values on every mesh; each device computes its own shard."""
    places = sharding.of_parameters(_boxed_parameters(config), mesh)
    return fusion.init(config, jax.random.key(seed), places)


def create(params, tx: optax.GradientTransformation) -> TrainState:
    """Creates a state at step 0 with a fresh optimizer."""
    # Three buffers, not the same one three times: the step donates them.
    step, skipped, in_row = (jnp.zeros((), jnp.int32) for _ in range(3))
    return TrainState(step, params, tx.init(params), skipped, in_row)


def begin(params, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Does what `create` does on a mesh: parameters stay where they are, the optimizer's state is created in shards.

    `params` become part of the state, whose buffers the step donates.
    """
    places = jax.tree.map(lambda x: x.sharding, abstract(params, tx, mesh))
    return jax.jit(functools.partial(create, tx=tx), out_shardings=places, donate_argnums=0)(params)


def _with_shardings(shapes, shardings):
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
