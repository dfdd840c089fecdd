"""Defines learning rates and freezing by parameter path, the published schedule, and how updates are applied.

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
from fusion_jax.training.optimizers import OPTIMIZERS, name_of

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


def _on_rows(tx: optax.GradientTransformationExtraArgs, rows: tuple[int, ...]) -> optax.GradientTransformationExtraArgs:
    """Applies `tx` to trees in which the embedding is replaced by some of its rows."""

    def cut(tree):
        def one(path, leaf):
            return leaf[np.array(rows)] if name_of(path) == EMBEDDING else leaf

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
        return rounding.write(p.astype(jnp.float32) - change, p, rounding.key_of(name_of(path), step))

    return jax.tree.map_with_path(subtract, changes, params, label_tree, is_leaf=lambda change: change is None)


def group_norms(squares) -> dict[str, jax.Array]:
    """Returns the global norm of the gradients of each top-level module, as float32 scalars by name."""
    return {name: norm(part) for name, part in squares.items()}
