"""Defines optimizers, learning rates and freezing by parameter path, and the published schedule.

`StageConfig.learn_rows` lets some rows of a frozen word embedding learn: new tokens of an otherwise frozen language
model. The embedding's gradient is zero in all other rows, and clipping, moments and decay apply to these rows alone.
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from fusion_jax.config import StageConfig
from fusion_jax.errors import UserError, check
from fusion_jax.training import rounding

DEFAULT, FROZEN, ROWS = "default", "frozen", "rows"
EMBEDDING = "llm/embedding"


def labels(stage: StageConfig, params) -> dict:
    """Labels each parameter: the pattern that sets its learning rate, `default`, `frozen`, or `rows` (some rows learn).

    Raises:
      UserError: a pattern is not a regular expression or matches no parameter; `learn_rows` are outside the vocabulary,
        or the embedding is not frozen.
    """
    flat = flatten_dict(params, sep="/")
    paths = list(flat)
    patterns = {}
    for pattern in (*stage.freeze, *stage.learning_rate_by_path):
        try:
            patterns[pattern] = re.compile(pattern)
        except re.error as error:
            raise UserError(f"stage {stage.name!r}: {pattern!r} is not a regular expression ({error}).") from None
        if not any(patterns[pattern].search(path) for path in paths):
            tops = ", ".join(sorted({path.split("/")[0] for path in paths}))
            raise UserError(
                f"stage {stage.name!r}: the pattern {pattern!r} matches no parameter; paths begin with {tops}."
            )

    def label(path: str) -> str:
        if any(patterns[pattern].search(path) for pattern in stage.freeze):
            return FROZEN
        return next((p for p in stage.learning_rate_by_path if patterns[p].search(path)), DEFAULT)

    chosen = {path: label(path) for path in paths}
    if stage.learn_rows:
        where, size = f"stage {stage.name!r}: learn_rows={list(stage.learn_rows)}", flat[EMBEDDING].shape[0]
        check(max(stage.learn_rows) < size, f"{where}: {EMBEDDING} has {size} rows, from 0 on.")
        check(chosen[EMBEDDING] == FROZEN, f"{where} needs a freeze that matches {EMBEDDING}; else all its rows learn.")
        chosen[EMBEDDING] = ROWS
    return unflatten_dict(chosen, sep="/")


def decays(params) -> dict:
    """Returns whether weight decay applies to each parameter: to all but norms and biases."""
    return jax.tree.map_with_path(lambda path, _: _decays(path), params)


def _decays(path) -> bool:
    return path[-1].key not in ("scale", "bias")


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def cosine(step: float, steps: int, warmup_ratio: float) -> float:
    """Returns the factor of the published schedule: linear from 0 over the warm-up, a half cosine to 0 at `steps`."""
    warmup = -(-int(steps * warmup_ratio * 1e9) // 10**9)  # ceil, without the rounding error of the product
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(steps - warmup, 1))))


def learning_rates(stage: StageConfig, step: float, steps: int) -> dict[str, np.float32]:
    """Returns the learning rate of each label for the step after `step` earlier ones (`loader.Fed.done`)."""
    factor = cosine(step, steps, stage.warmup_ratio)
    rates = {DEFAULT: stage.learning_rate, **stage.learning_rate_by_path}
    if stage.learn_rows:
        rates[ROWS] = stage.learning_rate
    return {label: np.float32(factor * rate) for label, rate in rates.items()}


def check_changes_parameters(stage: StageConfig, steps: int, params) -> None:
    """Raises UserError if a stage of this number of steps would not change any parameter.

    Args:
      params: arrays or shapes.
    """
    used = set(jax.tree.leaves(labels(stage, params))) - {FROZEN}
    nothing = f"stage {stage.name!r} would change no parameter:"
    check(bool(used), f"{nothing} freeze={list(stage.freeze)} matches all of them; freeze fewer, or leave it out.")
    unscaled = {DEFAULT: stage.learning_rate, ROWS: stage.learning_rate, **stage.learning_rate_by_path}
    check(
        any(np.float32(unscaled[label]) > 0 for label in used),
        f"{nothing} learning_rate is 0 for all that are not frozen; raise it, or leave the stage out.",
    )
    # Two steps are enough to see it: after the first the rate is above 0.
    rates = [learning_rates(stage, step, steps) for step in range(min(steps, 2))]
    check(
        any(rate[label] > 0 for rate in rates for label in used),
        f"{nothing} it has {steps} step, and the warm-up begins at a learning rate of 0; raise its epochs or steps, "
        f"lower batch_size={stage.batch_size}, or set warmup_ratio=0.",
    )


def optimizer(stage: StageConfig, params) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer of a stage, without the learning rate, which the train step applies by label.

    Frozen parameters have no moments; their gradients must already be zero. If only `learn_rows` of the embedding
    learn, its updates are (rows, D). `update` also takes the `squares` of the gradients and their global `norm`.
    """
    trained = jax.tree.map(lambda label: label != FROZEN, labels(stage, params))
    # The state has the structure of optax's chain of clipping, Adam and decay, as in older checkpoints.
    tx = optax.chain(
        optax.identity(), optax.masked(OPTIMIZERS[stage.optimizer](stage), trained, mask_compatible_extra_args=True)
    )
    return _on_rows(tx, stage.learn_rows) if stage.learn_rows else tx


def squares(grads) -> dict:
    """Returns the sum of squares of every parameter's gradient, as float32 scalars, from which norms are computed."""
    return jax.tree.map(lambda g: jnp.sum(jnp.square(g.astype(jnp.float32))), grads)


def norm(squares) -> jax.Array:
    """Returns the global norm of a tree, from its sums of squares."""
    return jnp.sqrt(sum(jax.tree.leaves(squares)))


def _adamw(stage: StageConfig) -> optax.GradientTransformationExtraArgs:
    """Returns AdamW (Loshchilov & Hutter, 2019) that leaves alone parameters without a part in a step, as PyTorch's.

    If the squared gradient of a parameter is 0 (the latent table of an l^2 not drawn; the encoder in text-only steps),
    the parameter, its moments and its count of steps stay as they are. Every parameter has its own count, which
    corrects the bias of its moments: an int32 vector in the order of the leaves.
    """
    decay = optax.MaskedState(optax.EmptyState())

    def init(params):
        count = jnp.zeros(len(jax.tree.leaves(params)), jnp.int32)
        mu, nu = moments(params, stage.first_moment), moments(params, stage.second_moment, signed=False)
        return optax.ScaleByAdamState(count, mu, nu), decay

    def update(grads, state, params, *, norm, squares):
        old = state[0]
        leaves, tree = jax.tree.flatten(grads)
        names = [_name(path) for path, _ in jax.tree.leaves_with_path(grads)]
        used = [square > 0 for square in tree.flatten_up_to(squares)]
        count = old.count + jnp.stack(used)
        trees = (old.mu, old.nu, params, decays(params))
        parts = zip(names, leaves, used, count, *map(tree.flatten_up_to, trees))
        updates, mu, nu = (tree.unflatten(x) for x in zip(*(_of_parameter(stage, norm, *part) for part in parts)))
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


def _of_parameter(stage: StageConfig, norm, name: str, g, used, count, mu, nu, parameter, decays: bool):
    """Returns the update and the moments of one parameter."""
    g = g.astype(jnp.float32)
    if stage.clip_norm > 0:
        g = jnp.where(norm < stage.clip_norm, g, g / norm * stage.clip_norm)
    first = stage.b1 * rounding.read(mu) + (1 - stage.b1) * g
    second = stage.b2 * rounding.read(nu) + (1 - stage.b2) * g * g
    steps = jnp.maximum(count, 1)
    update = first / (1 - stage.b1**steps) / (jnp.sqrt(second / (1 - stage.b2**steps)) + stage.eps)
    if decays:
        update = update + stage.weight_decay * parameter

    def rounded(values, old, which):
        new = rounding.write(values, old, rounding.key_of(f"{which} moment of {name}", count))
        return jax.tree.map(lambda new, old: jnp.where(used, new, old), new, old)

    return jnp.where(used, update, 0), rounded(first, mu, "first"), rounded(second, nu, "second")


# An optimizer is one function of the stage. What it returns takes `update(grads, state, params, *, norm, squares)` and
# gives updates before the learning rate, decay included: it clips by the global `norm` of the gradients, and leaves
# alone a parameter whose entry of `squares` is 0. Freezing, rates by path, the schedule and the guard against updates
# that are not finite come around it, and checkpoints, shardings and the planned memory follow the state of its `init`.
OPTIMIZERS = {"adamw": _adamw}


def _on_rows(tx: optax.GradientTransformationExtraArgs, rows: tuple[int, ...]) -> optax.GradientTransformationExtraArgs:
    """Applies `tx` to trees in which the embedding is replaced by some of its rows."""

    def cut(tree):
        def one(path, leaf):
            return leaf[np.array(rows)] if _name(path) == EMBEDDING else leaf

        return jax.tree_util.tree_map_with_path(one, tree)

    def update(updates, state, params=None, **more):
        return tx.update(cut(updates), state, cut(params), **more)

    return optax.GradientTransformationExtraArgs(lambda params: tx.init(cut(params)), update)


def freeze(params, label_tree, rows: tuple[int, ...] = ()):
    """Stops gradients at frozen parameters, so that they are not computed, and at all but `rows` of a `ROWS` one."""

    def stop(p, label):
        if label == ROWS:
            return jnp.where(np.isin(np.arange(len(p)), rows)[:, None], p, jax.lax.stop_gradient(p))
        return jax.lax.stop_gradient(p) if label == FROZEN else p

    return jax.tree.map(stop, params, label_tree)


def changes(updates, rates: dict[str, jax.Array], label_tree):
    """Returns what a step subtracts from each parameter: rate * update, with the rate of its label; None if frozen."""
    return jax.tree.map(lambda u, label: None if label == FROZEN else rates[label] * u, updates, label_tree)


def apply_changes(params, changes, label_tree, rows: tuple[int, ...] = (), step: jax.Array | int = 0):
    """Returns params - changes, in the dtypes of the parameters; bfloat16 is rounded stochastically, by the step.

    The changes of a `ROWS` parameter are those of `rows`.
    """

    def subtract(path, change, p, label):
        if label == ROWS:
            # No scatter, which would move parts of a table that is sharded.
            for row, one in zip(rows, change, strict=True):
                p = jnp.where((np.arange(len(p)) == row)[:, None], p - one, p)
            return p
        if change is None:
            return p
        return rounding.write(p.astype(jnp.float32) - change, p, rounding.key_of(_name(path), step))

    return jax.tree.map_with_path(subtract, changes, params, label_tree, is_leaf=lambda change: change is None)


def group_norms(squares) -> dict[str, jax.Array]:
    """Returns the global norm of the gradients of each top-level module, as float32 scalars by name."""
    return {name: norm(part) for name, part in squares.items()}
