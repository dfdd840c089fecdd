"""Analytic model FLOPs: what the arithmetic needs, whatever a program does beyond it.

Convention: a multiply-add is 2 FLOPs; only matrix products count (no norms, activations, rotary); causal attention
counts half; the backward pass is twice the forward; recomputation does not count; padding does not count.
"""

import functools
import math
import re
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.typing import DTypeLike

from fusion_jax.batch import NO_CROP, Batch
from fusion_jax.models.config import FusionConfig

# Dense bfloat16 peak of one JAX device by its kind, FLOP/s. NVIDIA: each one's datasheet, for B200 and GB200 those of
# the DGX B200 and the GB200 NVL72 divided by their GPUs; most print it with sparsity, which is twice as much. TPUs:
# docs.cloud.google.com/tpu/docs; a chip of TPU7x has 2,307 TFLOP/s and is two devices.
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,
    "TPU v7x": 1153.5e12,
    "NVIDIA A10": 125e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA A30": 165e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
}


@dataclass(frozen=True)
class BatchShape:
    """What of a batch decides its FLOPs, padding left out.

    Attributes:
      lengths: tokens of each example in the LLM. crops: (question tokens) of each guided crop; plain: plain crops.
      supervised: positions with a target. rounds: rounds with latents. latent_count: l^2. windows: tokens that all
      latents' windows hold together.
    """

    lengths: tuple[int, ...]
    crops: tuple[int, ...]
    plain: int
    supervised: int
    rounds: int
    latent_count: int
    windows: int


def shape_of(batch: Batch) -> BatchShape:
    """The shape of a host batch."""
    segments = np.asarray(batch.segment_ids)
    lengths = [int((row == s).sum()) for row in segments for s in np.unique(row[row > 0])]
    exists = np.asarray(batch.crop_kind) != NO_CROP
    questions = np.asarray(batch.crop_text_mask).sum(-1)
    return BatchShape(
        lengths=tuple(lengths),
        crops=tuple(int(q) for q in questions[exists]),
        plain=int(exists.sum()) * batch.quadrants.shape[2],
        supervised=int((np.asarray(batch.loss_weights) > 0).sum()),
        rounds=int((np.asarray(batch.latent_start) >= 0).sum()),
        latent_count=batch.latent_count,
        windows=int((np.asarray(batch.windows) >= 0).sum()),
    )


def forward_flops(config: FusionConfig, shape: BatchShape) -> float:
    """FLOPs of one forward pass over a batch."""
    v, m = config.vision, config.llm
    p, d, dv = v.patches, m.width, v.width

    def encoder(length: int) -> float:
        per_token = 4 * dv * dv + 2 * dv * v.mlp_dim
        return config.encoder_layers * 2 * (length * per_token + 2 * length * length * dv)

    def projector(tokens: int) -> float:
        return 2 * tokens * (config.tap_count * dv * d + d * d)

    def back(tokens: int) -> float:
        return 2 * tokens * (d * dv + dv * dv)

    total = 0.0
    for question in shape.crops:
        question = question if config.text_guided else 0
        total += 2 * p * 3 * v.patch_size**2 * dv + encoder(p + question) + projector(p + question) + back(question)
        if config.mapping_loss_weight > 0:
            total += back(p)
    total += shape.plain * (2 * p * 3 * v.patch_size**2 * dv + encoder(p) + projector(p))

    heads, groups, size = m.heads, m.kv_heads, m.per_head
    per_token = d * size * (2 * heads + 2 * groups) + 3 * d * m.mlp_dim
    for length in shape.lengths:
        total += m.layers * 2 * (length * per_token + length * length * heads * size)  # causal: half of 2 L^2
    total += 2 * shape.supervised * d * m.vocab_size

    if config.exchange_layers:
        context = 9 * shape.latent_count if config.uses_quadrants else config.tokens_per_image + config.tokens_per_tile
        latents = shape.rounds * shape.latent_count
        per_latent = 5 * d * d  # in (latent half), query, out, two of the MLP
        per_layer = len(shape.crops) * context * 3 * d * d + latents * per_latent + shape.rounds * d * d
        total += config.exchange_layers * 2 * (per_layer + shape.windows * 2 * d)
    return total


def step_flops(config: FusionConfig, shape: BatchShape) -> float:
    """FLOPs of a training step: forward and backward."""
    return 3 * forward_flops(config, shape)


def datasheet_peak(kind: str) -> float | None:
    """Of one device of a kind as JAX names it, FLOP/s in bfloat16; None for kinds that the table lacks.

    The longest name counts that the kind begins with, up to the end of a word: an L40S is no L4.
    """
    if " MIG " in kind:  # a part of a GPU
        return None
    matches = [name for name in PEAKS if re.match(rf"{re.escape(name)}(?!\w)", kind)]
    return PEAKS[max(matches, key=len)] if matches else None


def measured_rate(device: jax.Device, dtype: DTypeLike) -> float:
    """FLOP/s of square matrix products on one device: of the size from which larger ones are no faster.

    It takes a second or so at most. The values are random: with zeros or ones hardware needs less power, and is faster.
    """
    memory = device.memory_stats() or {}
    room = memory["bytes_limit"] - memory.get("bytes_in_use", 0) if "bytes_limit" in memory else math.inf
    product = jax.jit(lambda a: a @ a)
    block = np.random.default_rng(0).standard_normal((256, 256), np.float32)
    size, best = 512, 0.0
    with jax.default_device(device):
        block = jnp.asarray(block, dtype)
        while True:
            a = jnp.tile(block, (size // len(block),) * 2)
            product(a).block_until_ready()
            seconds = min(_seconds(product, a) for _ in range(3))
            rate, before = 2 * size**3 / seconds, best
            best = max(best, rate)
            # Short ones measure how fast work is begun.
            if seconds > 1e-3 and rate < 1.05 * before:
                return best
            size *= 2
            if 8 * seconds > _LONGEST or 4 * size * size * a.dtype.itemsize > room:
                return best


_LONGEST = 0.1  # seconds of a product that `measured_rate` still tries


def _seconds(function, argument) -> float:
    start = time.perf_counter()
    function(argument).block_until_ready()
    return time.perf_counter() - start


@functools.cache
def peak(dtype: DTypeLike = jnp.bfloat16) -> float:
    """Peak FLOP/s of all devices of all processes: the datasheets', for kinds that have none here (CPUs) measured.

    One device is measured, by the first process, so that all have the same number. All must call.
    """
    one = datasheet_peak(jax.devices()[0].device_kind)
    if one is None:
        one = measured_rate(jax.local_devices()[0], dtype)
        if jax.process_count() > 1:
            one = float(multihost_utils.broadcast_one_to_all(np.float32(one)))
    return one * jax.device_count()
