"""AdamW with learning rates by parameter path, freezing by path, and the published schedule."""

import math
import re
from collections.abc import Callable

import jax
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from fusion_jax.config import StageConfig
from fusion_jax.errors import UserError, check

DEFAULT, FROZEN = "default", "frozen"


def labels(stage: StageConfig, params) -> dict:
    """For every parameter the pattern that sets its learning rate, `default`, or `frozen`.

    Raises:
      UserError: a pattern is no regular expression or matches no parameter.
    """
    paths = list(flatten_dict(params, sep="/"))
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

    return unflatten_dict({path: label(path) for path in paths}, sep="/")


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
    return {label: np.float32(factor * rate) for label, rate in rates.items()}


def check_changes_parameters(stage: StageConfig, steps: int, params) -> None:
    """UserError where so many steps of the stage would leave all parameters as they are.

    Args:
      params: arrays or shapes.
    """
    used = set(jax.tree.leaves(labels(stage, params))) - {FROZEN}
    nothing = f"stage {stage.name!r} would change no parameter:"
    check(bool(used), f"{nothing} freeze={list(stage.freeze)} matches all of them; freeze fewer, or leave it out.")
    unscaled = {DEFAULT: stage.learning_rate, **stage.learning_rate_by_path}
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

    Frozen parameters have no moments; their gradients must already be zero.
    """
    trained = jax.tree.map(lambda label: label != FROZEN, labels(stage, params))
    clip = optax.clip_by_global_norm(stage.clip_norm) if stage.clip_norm > 0 else optax.identity()
    adam = optax.chain(
        optax.scale_by_adam(stage.b1, stage.b2, stage.eps, mu_dtype=stage.first_moment),
        optax.add_decayed_weights(stage.weight_decay, mask=decays),
    )
    return optax.chain(clip, optax.masked(adam, trained))


def freeze(params, label_tree):
    """Stops gradients at frozen parameters, so that none is computed for them."""
    return jax.tree.map(lambda p, label: jax.lax.stop_gradient(p) if label == FROZEN else p, params, label_tree)


def apply_updates(params, updates, rates: dict[str, jax.Array], label_tree):
    """params - rate * updates, the rate by label."""
    step: Callable = lambda p, u, label: p if label == FROZEN else p - rates[label] * u  # noqa: E731
    return jax.tree.map(step, params, updates, label_tree)


def group_norms(grads) -> dict[str, jax.Array]:
    """Global norm of the gradients of every top-level module, float32 scalars by name."""
    return {name: optax.global_norm(part) for name, part in grads.items()}
