"""Counts the FLOPs that the model's arithmetic needs, whatever a program computes beyond that.

Convention: a multiply-add is 2 FLOPs; only matrix products count (no norms, activations, rotary); causal attention
counts half; the backward pass is twice the forward; recomputation does not count; padding does not count.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusion_jax.batch import NO_CROP, Batch, windows
from fusion_jax.data import tiles
from fusion_jax.data.conversation import ANSWER_START, IMAGE
from fusion_jax.data.layout import Example, LayoutSpec, measure
from fusion_jax.data.tile_windows import tile_windows
from fusion_jax.models.config import FusionConfig


@dataclass(frozen=True)
class BatchShape:
    """The sizes of a batch that decide its FLOPs, without padding.

    Attributes:
      lengths: tokens of each example in the LLM. crops: for each guided crop, the question tokens that guide it.
      plain: number of plain crops. supervised: positions with a target. rounds: rounds with latents. latent_count:
      l^2. windows: tokens in the windows of all latents together.
    """

    lengths: tuple[int, ...]
    crops: tuple[int, ...]
    plain: int
    supervised: int
    rounds: int
    latent_count: int
    windows: int


def shape_of(batch: Batch) -> BatchShape:
    """Returns the shape of a host batch."""
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


def shape_of_examples(examples: Sequence[Example], spec: LayoutSpec, latent_count: int) -> BatchShape:
    """Returns the shape of a batch that would hold these examples; their images need not have been read.

    A text without an image that has latents counts with its zero image, which no question guides.
    """
    lengths, crops, supervised, rounds, window_tokens = [], [], 0, 0, 0
    for example in examples:
        size = measure(example, spec, latent_count)
        question = example.question_ids[: len(example.question_ids) if spec.question_length else 0]
        question = question[question != 0] if spec.hide_question_id_zero else question
        lengths.append(size.length)
        crops += [len(question) if example.images else 0] * size.crops
        supervised += int((example.labels[1:] >= 0).sum())
        rounds += size.rounds
        if size.rounds and latent_count:
            tilings = example.tilings or (tiles.WHOLE,) * max(example.images, 1)
            images = np.flatnonzero(example.input_ids == IMAGE)
            answers = np.flatnonzero(example.labels == ANSWER_START)[: size.rounds]
            latest = np.maximum(np.searchsorted(images, answers) - 1, 0)  # the image that each round's latents query
            window_tokens += sum(_window_tokens(tilings[image], spec, latent_count) for image in latest)
    return BatchShape(
        lengths=tuple(lengths),
        crops=tuple(crops),
        plain=len(crops) * spec.quadrants,
        supervised=supervised,
        rounds=rounds,
        latent_count=latent_count,
        windows=window_tokens,
    )


@functools.lru_cache(1 << 14)
def _window_tokens(tiling: tiles.Tiling, spec: LayoutSpec, latent_count: int) -> int:
    """Counts the tokens that the windows of one round's latents hold together."""
    cells = math.isqrt(latent_count)
    side = 3 * cells if spec.quadrants else math.isqrt(spec.image_tokens)
    tokens = windows(side, cells)[1].sum()
    if tiling.rows:
        tokens += tile_windows(tiling, spec.image_size, math.isqrt(spec.tile_tokens), cells)[1].sum()
    return int(tokens)


def forward_flops(config: FusionConfig, shape: BatchShape) -> float:
    """Returns the FLOPs of one forward pass over a batch."""
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
    """Returns the FLOPs of a training step, forward and backward."""
    return 3 * forward_flops(config, shape)
