"""Defines the losses of training: their sums over a batch, the counts that divide these, and weights.

`LOSSES` is the one place to add a loss to: the train step adds it to the total, and the metrics, the log, the curves,
validation and the tests read its parts from there. A new loss takes

1. a function of (config, outputs) that gives the sum of each part over this (micro)batch, float32 scalars;
2. a function of (config, batch) that gives the count that each sum is divided by, float32 scalars;
3. a function of the config that gives the loss's weight (a field of `FusionConfig`, 0 by default);
4. an entry of `LOSSES` that names its parts; what a loss needs of the model beyond `Outputs` becomes a field there.

Losses are sums so that the caller can divide by the count of the *global* batch: the mean is then the same however the
batch is packed, accumulated or sharded.
"""

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fusion_jax.batch import NO_CROP, Batch
from fusion_jax.models import partition
from fusion_jax.models.config import FusionConfig
from fusion_jax.models.fusion import Visual

# Number of positions whose logits exist at a time; (CHUNK, V) float32 is the working memory of the loss.
CHUNK = 512


def _chunk(index, order, hidden, targets, weights, size):
    rows = jax.lax.dynamic_slice_in_dim(order, index * size, size)
    return rows, hidden[rows], targets[rows], weights[rows]


def _chunk_loss(hidden, kernel, targets, weights, vocab_size, vocab_axes):
    """Computes the weighted CE of a chunk and d(CE)/d(logits); `kernel` may hold part of the vocabulary's columns."""
    logits = jnp.dot(hidden, kernel, preferred_element_type=jnp.float32)
    columns = jnp.arange(logits.shape[-1]) + (jax.lax.axis_index(vocab_axes) * logits.shape[-1] if vocab_axes else 0)
    logits = jnp.where(columns < vocab_size, logits, -jnp.inf)
    peak = jax.lax.pmax(logits.max(-1), vocab_axes)
    log_total = peak + jnp.log(jax.lax.psum(jnp.sum(jnp.exp(logits - peak[:, None]), -1), vocab_axes))
    # Compared, not gathered and scattered: these would be passes of their own over the chunk's logits.
    chosen_column = columns == targets[:, None]
    chosen = jax.lax.psum(jnp.sum(jnp.where(chosen_column, logits, 0.0), -1), vocab_axes)
    d_logits = (jnp.exp(logits - log_total[:, None]) - chosen_column) * weights[:, None]
    # Positions without weight may hold anything; where() keeps their values out of the sum.
    return jnp.sum(jnp.where(weights > 0, (log_total - chosen) * weights, 0.0)), d_logits


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cross_entropy(hidden, kernel, targets, weights, vocab_size):
    return _run(hidden, kernel, targets, weights, vocab_size, with_gradient=False)[0]


def _run(hidden, kernel, targets, weights, vocab_size, with_gradient):
    """Computes the loss and, on request, its gradients in hidden states and kernel; each device has its rows.

    The kernel's columns are sharded like the vocabulary; its rows are gathered, once.
    """
    row_axes, width_axes, vocab_axes = map(partition.devices_along, ("batch", "embed", "vocab"))

    def local(hidden, kernel, targets, weights):
        flat = (hidden.reshape(-1, hidden.shape[-1]), kernel, targets.reshape(-1), weights.reshape(-1))
        loss, d_hidden, d_kernel = _loop(*flat, vocab_size, with_gradient, row_axes, vocab_axes)
        d_hidden = None if d_hidden is None else d_hidden.reshape(hidden.shape)
        if with_gradient:
            d_hidden = jax.lax.psum(d_hidden, vocab_axes)
            if width_axes:
                d_kernel = jax.lax.psum_scatter(d_kernel, width_axes, scatter_dimension=0, tiled=True)
            d_kernel = jax.lax.psum(d_kernel, tuple(axis for axis in row_axes if axis not in width_axes))
        return jax.lax.psum(loss, row_axes), d_hidden, d_kernel

    rows = ("batch", None)
    arguments = ((*rows, None), (None, "vocab"), rows, rows)
    run = partition.split(local, arguments, ((), (*rows, None), ("embed", "vocab")))
    return run(hidden, kernel, targets, weights)


def _loop(hidden, kernel, targets, weights, vocab_size, with_gradient, row_axes, vocab_axes):
    """Computes loss and gradients in one loop over chunks of supervised positions: no logits are kept or recomputed."""
    count = hidden.shape[0]
    size = min(CHUNK, count)
    padding = -count % size
    # Supervised positions come first: the loop runs only over the chunks that they fill.
    order = jnp.argsort(weights <= 0, stable=True)
    order = jnp.pad(order, (0, padding), constant_values=count)  # beyond the end: reads are clamped, writes dropped
    hidden = hidden.astype(kernel.dtype)
    supervised = jnp.sum(weights > 0)
    chunks = (supervised + size - 1) // size
    if vocab_axes:
        # The loop contains collectives: all devices must run it equally often.
        chunks = jax.lax.pmax(chunks, row_axes)

    def body(i, carry):
        loss, d_hidden, d_kernel = carry
        rows, h, t, w = _chunk(i, order, hidden, targets, weights, size)
        w = jnp.where(i * size + jnp.arange(size) < supervised, w, 0.0)
        part, d_logits = _chunk_loss(h, kernel, t, w, vocab_size, vocab_axes)
        if with_gradient:
            d_logits = d_logits.astype(kernel.dtype)
            d_hidden = d_hidden.at[rows].set(jnp.dot(d_logits, kernel.T), mode="drop")
            d_kernel = d_kernel + jnp.dot(h.T, d_logits, preferred_element_type=jnp.float32)
        return loss + part, d_hidden, d_kernel

    zeros = (jnp.zeros_like(hidden), jnp.zeros(kernel.shape, jnp.float32)) if with_gradient else (None, None)
    return jax.lax.fori_loop(0, chunks, body, (jnp.float32(0), *zeros))


def _forward(hidden, kernel, targets, weights, vocab_size):
    loss, d_hidden, d_kernel = _run(hidden, kernel, targets, weights, vocab_size, with_gradient=True)
    return loss, (d_hidden, d_kernel.astype(kernel.dtype), jnp.zeros((), hidden.dtype))


def _backward(vocab_size, residuals, g):
    d_hidden, d_kernel, like = residuals
    return (d_hidden * g).astype(like.dtype), d_kernel * g.astype(d_kernel.dtype), None, None


_cross_entropy.defvjp(_forward, _backward)


def cross_entropy_sum(
    hidden: Float[Array, "B S D"],
    kernel: Float[Array, "D V"],
    targets: Int[Array, "B S"],
    weights: Float[Array, "B S"],
    vocab_size: int,
) -> Float[Array, ""]:
    """Computes the weighted sum of next-token cross-entropies, float32.

    Logits exist only for supervised positions (weight > 0), a chunk at a time. Differentiable in `hidden` and `kernel`.

    Args:
      hidden: after the final norm. kernel: output head in the compute dtype, padded columns masked here.
      targets: token to predict at each position. weights: 0 at positions that do not count.
      vocab_size: real columns of `kernel`.
    """
    return _cross_entropy(hidden, kernel, targets, weights, vocab_size)


def _cosine_distance(a: Float[Array, "*n D"], b: Float[Array, "*n D"]) -> Float[Array, "*n"]:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    norms = jnp.sum(a * a, -1) * jnp.sum(b * b, -1)
    # The floor is inside the root, so that a zero vector has a finite gradient.
    return 1.0 - jnp.sum(a * b, -1) * jax.lax.rsqrt(jnp.maximum(norms, 1e-16))


def mapping_loss_sums(
    visual: Visual, crop_kind: Int[Array, "B N"], text_mask: Bool[Array, "B N T"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Computes the dual-semantic mapping loss: sums of 1 - cos, both sides with gradient.

    Returns:
      v2t: over real question tokens, embedding against the encoder's output projected to text;
      t2v: over patches of all crops that exist, patch embedding against the image projected to text and back.
    """
    v2t = t2v = jnp.float32(0)
    if visual.question is not None:
        distance = _cosine_distance(visual.question, visual.question_features)
        v2t = jnp.sum(jnp.where(text_mask & (crop_kind != NO_CROP)[..., None], distance, 0.0))
    if visual.patches is not None:
        distance = _cosine_distance(visual.patches, visual.patch_features)
        t2v = jnp.sum(jnp.where((crop_kind != NO_CROP)[..., None], distance, 0.0))
    return v2t, t2v


@dataclass(frozen=True)
class Outputs:
    """What losses are computed from: a batch, and the results of the model's forward pass over it.

    Attributes:
      hidden: after the final norm. visual: states of the vision encoder; None for a batch of text alone.
      kernel: the output head in the compute dtype.
    """

    batch: Batch
    hidden: Float[Array, "B S D"]
    visual: Visual | None
    kernel: Float[Array, "D V"]


@dataclass(frozen=True)
class Loss:
    """A loss, whose share of the total is weight * (mean of its first part + mean of its second + ...).

    Attributes:
      parts: names in the metrics. sums, counts: one float32 scalar per part; the mean of a part is sum / count.
      weight: if it is 0, the sums are not computed and the parts are 0.
    """

    parts: tuple[str, ...]
    sums: Callable[[FusionConfig, Outputs], tuple[jax.Array, ...]]
    counts: Callable[[FusionConfig, Batch], tuple[jax.Array, ...]]
    weight: Callable[[FusionConfig], float]


def _ce_sums(config: FusionConfig, outputs: Outputs) -> tuple[jax.Array]:
    batch = outputs.batch
    sizes = batch.targets, batch.loss_weights, config.llm.vocab_size
    return (cross_entropy_sum(outputs.hidden, outputs.kernel, *sizes),)


def _ce_counts(config: FusionConfig, batch: Batch) -> tuple[jax.Array]:
    """Counts the supervised tokens."""
    return (jnp.sum(batch.loss_weights),)


def _mapping_sums(config: FusionConfig, outputs: Outputs) -> tuple[jax.Array, jax.Array]:
    if outputs.visual is None:
        return jnp.float32(0), jnp.float32(0)
    return mapping_loss_sums(outputs.visual, outputs.batch.crop_kind, outputs.batch.crop_text_mask)


def _mapping_counts(config: FusionConfig, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Counts the question tokens, and the patches, of the crops that exist."""
    exists = batch.crop_kind != NO_CROP
    tokens = jnp.sum(batch.crop_text_mask & exists[..., None]).astype(jnp.float32)
    return tokens, jnp.sum(exists).astype(jnp.float32) * config.vision.patches


LOSSES = {
    "ce": Loss(("ce",), _ce_sums, _ce_counts, lambda config: 1.0),
    "mapping": Loss(("v2t", "t2v"), _mapping_sums, _mapping_counts, lambda config: config.mapping_loss_weight),
}
PARTS = tuple(part for loss in LOSSES.values() for part in loss.parts)


def counts(config: FusionConfig, batch: Batch) -> dict[str, Float[Array, ""]]:
    """Returns what the sum of each part is divided by, by the part's name."""
    return {name: x for loss in LOSSES.values() for name, x in zip(loss.parts, loss.counts(config, batch), strict=True)}


def total_and_parts(
    config: FusionConfig, outputs: Outputs, totals: dict[str, jax.Array]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns total loss and parts, each the sum over this batch divided by its count in `totals`; float32 scalars."""
    shares, parts = [], {}
    for loss in LOSSES.values():
        weight = loss.weight(config)
        sums = loss.sums(config, outputs) if weight > 0 else (jnp.float32(0),) * len(loss.parts)
        means = [value / jnp.maximum(totals[name], 1.0) for name, value in zip(loss.parts, sums, strict=True)]
        parts |= dict(zip(loss.parts, means))
        shares.append(weight * functools.reduce(operator.add, means))
    return functools.reduce(operator.add, shares), parts
