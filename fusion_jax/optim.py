"""AdamW with learning rates by parameter path, freezing by path, and the published schedule.

Of a frozen word embedding some rows may learn (`StageConfig.learn_rows`): new tokens of a language model that stays as
it is. Its gradient is zero elsewhere, and clipping, moments and decay see these rows alone.
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

DEFAULT, FROZEN, ROWS = "default", "frozen", "rows"
EMBEDDING = "llm/embedding"


def labels(stage: StageConfig, params) -> dict:
    """For every parameter the pattern that sets its learning rate, `default`, `frozen`, or `rows`: some of it learn.

    Raises:
      UserError: a pattern is no regular expression or matches no parameter; `learn_rows` of what is not frozen, or
        beyond the vocabulary.
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

    found = {path: label(path) for path in paths}
    if stage.learn_rows:
        where, size = f"stage {stage.name!r}: learn_rows={list(stage.learn_rows)}", flat[EMBEDDING].shape[0]
        check(max(stage.learn_rows) < size, f"{where}: {EMBEDDING} has {size} rows, from 0 on.")
        check(found[EMBEDDING] == FROZEN, f"{where} needs a freeze that matches {EMBEDDING}; else all its rows learn.")
        found[EMBEDDING] = ROWS
    return unflatten_dict(found, sep="/")


def decays(params) -> dict:
    """True where weight decay applies: everything but norms and biases."""
    flat = flatten_dict(params, sep="/")
    return unflatten_dict({path: path.split("/")[-1] not in ("scale", "bias") for path in flat}, sep="/")


def cosine(step: float, steps: int, warmup_ratio: float) -> float:
    """The published schedule, as a factor: linear from 0 over the warm-up, then a half cosine to 0 at `steps`."""
    warmup = -(-int(steps * warmup_ratio * 1e9) // 10**9)  # ceil, with the float's own rounding cut off
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(steps - warmup, 1))))


def learning_rates(stage: StageConfig, step: float, steps: int) -> dict[str, np.float32]:
    """Learning rate per label for the step that follows `step` earlier ones (`pipeline.Fed.done`)."""
    factor = cosine(step, steps, stage.warmup_ratio)
    rates = {DEFAULT: stage.learning_rate, **stage.learning_rate_by_path}
    if stage.learn_rows:
        rates[ROWS] = stage.learning_rate
    return {label: np.float32(factor * rate) for label, rate in rates.items()}


def check_changes_parameters(stage: StageConfig, steps: int, params) -> None:
    """UserError where so many steps of the stage would leave all parameters as they are.

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
    # Two steps are enough to see it: behind the first the rate is above 0.
    rates = [learning_rates(stage, step, steps) for step in range(min(steps, 2))]
    check(
        any(rate[label] > 0 for rate in rates for label in used),
        f"{nothing} it has {steps} step, and the warm-up begins at a learning rate of 0; raise its epochs or steps, "
        f"lower batch_size={stage.batch_size}, or set warmup_ratio=0.",
    )


def optimizer(stage: StageConfig, params) -> optax.GradientTransformation:
    """Clipping and Adam without the learning rate, which the train step applies by label.

    Frozen parameters have no moments; their gradients must already be zero. Updates of the embedding are (rows, D)
    where only `learn_rows` of it learn.
    """
    trained = jax.tree.map(lambda label: label != FROZEN, labels(stage, params))
    clip = optax.clip_by_global_norm(stage.clip_norm) if stage.clip_norm > 0 else optax.identity()
    adam = optax.chain(
        optax.scale_by_adam(stage.b1, stage.b2, stage.eps, mu_dtype=stage.first_moment),
        optax.add_decayed_weights(stage.weight_decay, mask=decays),
    )
    tx = optax.chain(clip, optax.masked(adam, trained))
    return _on_rows(tx, stage.learn_rows) if stage.learn_rows else tx


def _on_rows(tx: optax.GradientTransformation, rows: tuple[int, ...]) -> optax.GradientTransformation:
    """`tx` for trees in which the embedding is these rows of it."""

    def cut(tree):
        def one(path, leaf):
            return leaf[np.array(rows)] if jax.tree_util.keystr(path, simple=True, separator="/") == EMBEDDING else leaf

        return jax.tree_util.tree_map_with_path(one, tree)

    def update(updates, state, params=None):
        return tx.update(cut(updates), state, cut(params))

    return optax.GradientTransformation(lambda params: tx.init(cut(params)), update)


def freeze(params, label_tree, rows: tuple[int, ...] = ()):
    """Stops gradients at frozen parameters, so that none is computed for them, and at all rows but `rows` of `ROWS`."""

    def stop(p, label):
        if label == ROWS:
            return jnp.where(np.isin(np.arange(len(p)), rows)[:, None], p, jax.lax.stop_gradient(p))
        return jax.lax.stop_gradient(p) if label == FROZEN else p

    return jax.tree.map(stop, params, label_tree)


def apply_updates(params, updates, rates: dict[str, jax.Array], label_tree, rows: tuple[int, ...] = ()):
    """params - rate * updates, the rate by label; of `ROWS` the updates are those of `rows`."""

    def step(p, u, label):
        if label == ROWS:
            for row, one in zip(rows, u, strict=True):  # no scatter, which would move parts of a table that is dealt
                p = jnp.where((np.arange(len(p)) == row)[:, None], p - rates[label] * one, p)
            return p
        return p if label == FROZEN else p - rates[label] * u

    return jax.tree.map(step, params, updates, label_tree)


def group_norms(grads) -> dict[str, jax.Array]:
    """Global norm of the gradients of every top-level module, float32 scalars by name."""
    return {name: optax.global_norm(part) for name, part in grads.items()}
