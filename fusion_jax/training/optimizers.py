"""Defines the optimizers by the names that a stage gives them: AdamW, and Muon for the matrices inside of layers.

An optimizer is one function of the stage. What it returns takes `update(grads, state, params, *, norm, squares)` and
gives updates before the learning rate, decay included: it clips by the global `norm` of the gradients, and leaves
alone a parameter whose entry of `squares` is 0. Freezing, rates by path, the schedule and the guard against updates
that are not finite come around it (`optim.py`), and checkpoints, shardings and the planned memory follow the state of
its `init`.
"""

import jax
import jax.numpy as jnp
import optax

from fusion_jax.config import StageConfig
from fusion_jax.training import orthogonal, rounding

MOMENTUM = 0.95  # decay of Muon's running mean of the gradient, as published


def adamw(stage: StageConfig) -> optax.GradientTransformationExtraArgs:
    """Returns AdamW (Loshchilov & Hutter, 2019), see `_by_parameter`."""
    return _by_parameter(stage, lambda path: False)


def muon(stage: StageConfig) -> optax.GradientTransformationExtraArgs:
    """Returns Muon (Jordan et al., 2024) for the matrices of layers, AdamW for all other parameters.

    Muon's update of a matrix is the running mean of its gradient made orthogonal (`orthogonal.py`).
    """
    return _by_parameter(stage, is_layer_matrix)


OPTIMIZERS = {"adamw": adamw, "muon": muon}
# Those whose updates take no matrix products: a step computes these twice rather than keep them.
ELEMENTWISE = ("adamw",)


def is_layer_matrix(path) -> bool:
    """Returns whether a parameter is a matrix, or a stack of them, between hidden states.

    Word, position and patch embeddings, latents and the head are none: they translate from or to something else.
    """
    return path[-1].key in ("kernel", "in") and all(key.key != "patch_embedding" for key in path)


def decays(params) -> dict:
    """Returns whether weight decay applies to each parameter: to all but norms and biases."""
    return jax.tree.map_with_path(lambda path, _: _decays(path), params)


def _decays(path) -> bool:
    return path[-1].key not in ("scale", "bias")


def name_of(path) -> str:
    """Returns the path of a parameter with slashes."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _by_parameter(stage: StageConfig, of_muon) -> optax.GradientTransformationExtraArgs:
    """Returns AdamW or Muon that leave alone parameters without a part in a step, as PyTorch's optimizers do.

    If the squared gradient of a parameter is 0 (the latent table of an l^2 not drawn; the encoder in text-only steps),
    the parameter, its moments and its count of steps stay as they are. Every parameter has its own count, which
    corrects the bias of its moments: an int32 vector in the order of the leaves.

    Args:
      of_muon: path -> whether Muon applies to this parameter, which then has no second moment.
    """
    decay = optax.MaskedState(optax.EmptyState())

    def init(params):
        count = jnp.zeros(len(jax.tree.leaves(params)), jnp.int32)
        mu, nu = moments(params, stage.first_moment), moments(params, stage.second_moment, signed=False)
        nu = jax.tree.map_with_path(lambda path, _, nu: optax.MaskedNode() if of_muon(path) else nu, params, nu)
        return optax.ScaleByAdamState(count, mu, nu), decay

    def update(grads, state, params, *, norm, squares):
        old = state[0]
        leaves, tree = jax.tree.flatten(grads)
        paths = [path for path, _ in jax.tree.leaves_with_path(grads)]
        used = [square > 0 for square in tree.flatten_up_to(squares)]
        count = old.count + jnp.stack(used)
        old_mu, old_nu, weights = map(tree.flatten_up_to, (old.mu, old.nu, params))

        updated = []
        for path, g, mu, nu, steps in zip(paths, leaves, old_mu, old_nu, jnp.maximum(count, 1)):
            g, mu = _clipped(stage, g, norm), rounding.read(mu)
            updated.append(_muon(g, mu, steps) if of_muon(path) else _adam(stage, g, mu, rounding.read(nu), steps))
        directions, mu, nu = map(list, zip(*updated))
        matrices = [i for i, path in enumerate(paths) if of_muon(path)]
        for i, direction in zip(matrices, orthogonal.directions([directions[i] for i in matrices])):
            directions[i] = direction

        def finished(path, used, count, direction, parameter, *moments):
            """Returns update and moments of one parameter, with decay, in the forms that the state has."""
            update = direction + stage.weight_decay * parameter if _decays(path) else direction
            stored = [
                _stored(new, old, used, rounding.key_of(f"{which} moment of {name_of(path)}", count))
                for which, new, old in zip(("first", "second"), moments[:2], moments[2:])
            ]
            return jnp.where(used, update, 0), *stored

        parts = map(finished, paths, used, count, directions, weights, mu, nu, old_mu, old_nu)
        updates, mu, nu = map(tree.unflatten, zip(*parts))
        return updates, (optax.ScaleByAdamState(count, mu, nu), decay)

    return optax.GradientTransformationExtraArgs(init, update)


def moments(params, dtype: str, signed: bool = True) -> dict:
    """Returns a moment of 0 for each parameter, in the form that `rounding.write` keeps.

    Args:
      dtype: `float32`, `bfloat16` or `int8`, in which moments of norms and biases, which are few, stay float32.
      signed: whether the moment may be negative.
    """

    def of(path, parameter):
        spared = dtype == rounding.INT8 and not _decays(path)
        return rounding.zeros(parameter, "float32" if spared else dtype, signed)

    return jax.tree.map_with_path(of, params)


def _stored(new, old, used, key):
    """Returns a moment in the form of the old one, which stays if the parameter was not used."""
    if isinstance(old, optax.MaskedNode):
        return old
    return jax.tree.map(lambda new, old: jnp.where(used, new, old), rounding.write(new, old, key), old)


def _clipped(stage: StageConfig, g, norm):
    g = g.astype(jnp.float32)
    return jnp.where(norm < stage.clip_norm, g, g / norm * stage.clip_norm) if stage.clip_norm > 0 else g


def _adam(stage: StageConfig, g, mu, nu, steps):
    """Returns Adam's update and both moments; `steps` counts this one."""
    first = stage.b1 * mu + (1 - stage.b1) * g
    second = stage.b2 * nu + (1 - stage.b2) * g * g
    update = first / (1 - stage.b1**steps) / (jnp.sqrt(second / (1 - stage.b2**steps)) + stage.eps)
    return update, first, second


def _muon(g, mu, steps):
    """Returns what Muon makes orthogonal (Nesterov's look-ahead, as in optax), its moment, and no second moment."""
    first = MOMENTUM * mu + (1 - MOMENTUM) * g
    ahead = MOMENTUM * first / (1 - MOMENTUM ** (steps + 1)) + (1 - MOMENTUM) * g / (1 - MOMENTUM**steps)
    return ahead, first, None
