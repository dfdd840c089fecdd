"""Counts the FLOPs that the model's arithmetic needs, whatever a program computes beyond that.

Convention: a multiply-add is 2 FLOPs; only matrix products count (no norms, activations, rotary); causal attention
counts half; the backward pass is twice the forward; recomputation does not count; padding does not count.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np

from fusion_jax.batch import NO_CROP, Batch, windows
from fusion_jax.data import tiles
from fusion_jax.data.conversation import ANSWER_START, IMAGE
from fusion_jax.data.layout import Example, LayoutSpec, measure
from fusion_jax.data.tile_windows import tile_windows
from fusion_jax.models.config import FusionConfig
from fusion_jax.models.flops import BatchShape, forward_flops


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


def padded_shape(batch: Batch, real: BatchShape) -> BatchShape:
    """Returns the shape with everything that a program computes: whole rows, all crops and rounds, padding too.

    Attention alone is that of the examples, since kernels skip most of what is between them.

    Args:
      batch: a batch, or its shapes alone. real: its sizes without padding; a program computes no logits without target.
    """
    (rows, length), (groups, crops, questions) = batch.tokens.shape, batch.crop_text.shape
    _, rounds, latents, window = batch.windows.shape
    return BatchShape(
        lengths=(*real.lengths, *(1,) * (rows * length - sum(real.lengths))),
        crops=(questions,) * (groups * crops),
        plain=groups * crops * batch.quadrants.shape[2],
        supervised=real.supervised,
        rounds=rows * rounds,
        latent_count=batch.latent_count,
        windows=rows * rounds * latents * window,
    )


def step_flops(config: FusionConfig, shape: BatchShape) -> float:
    """Returns the FLOPs of a training step, forward and backward."""
    return 3 * forward_flops(config, shape)
