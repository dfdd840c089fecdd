"""The training state: a pytree of arrays."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a step changes.

    Attributes:
      step: int32, steps taken, skipped ones included: it names the next batch.
      params: float32 masters. opt_state: of `optim.optimizer`.
      skipped: int32, steps skipped for non-finite gradients so far; skipped_in_row: without one good step between.
    """

    step: jax.Array
    params: dict
    opt_state: optax.OptState
    skipped: jax.Array
    skipped_in_row: jax.Array


def create(params, tx: optax.GradientTransformation) -> TrainState:
    """A state at step 0 with a fresh optimizer."""
    # Three buffers, not one thrice: the step donates them.
    step, skipped, in_row = (jnp.zeros((), jnp.int32) for _ in range(3))
    return TrainState(step, params, tx.init(params), skipped, in_row)
