"""The pure training step: loss, accumulation, update, metrics."""

import jax
import jax.numpy as jnp

from fusion_jax import losses
from fusion_jax.data.layout import Batch
from fusion_jax.models.fusion import Fusion, head_kernel


def loss_and_parts(model: Fusion, params, batch: Batch, totals=None) -> tuple[jax.Array, dict[str, jax.Array]]:
    """CE + lambda (L_v2t + L_t2v), each a mean over `totals` (by default, this batch's own counts).

    Returns:
      The total loss (float32 scalar) and its parts: `ce`, `v2t`, `t2v`.
    """
    config = model.config
    hidden, visual, _ = model.apply({"params": params}, batch)
    totals = losses.counts(batch, config.vision.patches) if totals is None else totals
    kernel = head_kernel(config, params).astype(model.dtype)
    sums = {
        "ce": losses.cross_entropy_sum(hidden, kernel, batch.targets, batch.loss_weights, config.llm.vocab_size),
        "v2t": jnp.float32(0),
        "t2v": jnp.float32(0),
    }
    if visual is not None and config.mapping_loss_weight > 0:
        sums["v2t"], sums["t2v"] = losses.mapping_loss_sums(visual, batch.crop_kind, batch.crop_text_mask)
    parts = {name: value / jnp.maximum(totals[name], 1.0) for name, value in sums.items()}
    return parts["ce"] + config.mapping_loss_weight * (parts["v2t"] + parts["t2v"]), parts
