"""The batch contract: how conversations and crops become the fixed-shape arrays that the model reads.

One row with an image, two rounds and l^2 = 4 latents (i image token, L latent, q question, a answer, . padding):

    tokens          s s v 0 0 0 0 v v 0 0 0 0 v q q e a a e v 0 0 0 0 v q e a e . .
    what            ...     i i i i     L L L L   q q   a a     L L L L   q   a
    visual_index   -1-1-1 0 1 2 3-1-1 4 5 6 7-1-1-1-1-1-1-1-1 8 91011-1-1-1-1-1-1-1
    round_end                               ^ (last token before the answer)  ^

`visual_index` points into the row's visual table: N images of P tokens each, then R rounds of L latents each.
Assembling the sequence is then one embedding lookup, one gather and one `where`. The first visual place of a round with
an image holds the image, the latents follow it (the published order).

Everything here is numpy on the host; `latent_count` is static, so that each l^2 is one compiled program.
"""

from dataclasses import dataclass, field

import jax
import numpy as np

from fusion_jax.data.conversation import ANSWER_START, IGNORE, IMAGE, LATENTS
from fusion_jax.errors import BadRecord

# Values of Batch.crop_kind.
NO_CROP, PIXELS, ZERO_IMAGE = 0, 1, 2


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """One batch; B rows, S positions, N images a row, Q plain quadrants an image, T question tokens, R rounds.

    Attributes:
      tokens: (B, S) int32 text ids in [0, vocabulary); a visual place and padding hold 0.
      targets: (B, S) int32 the token to predict at this position (already shifted by one); 0 where unsupervised.
      loss_weights: (B, S) float32, 1 where `targets` counts, else 0.
      segment_ids: (B, S) int32, number of the example in the row from 1; 0 padding.
      positions: (B, S) int32, from 0 within each example.
      visual_index: (B, S) int32, -1 text, else an index into the visual table [N * P image tokens | R * L latents].
      crops: (B, N, H, W, 3) uint8, the whole images, which the question guides.
      crop_kind: (B, N) int32, NO_CROP, PIXELS or ZERO_IMAGE (0.0 after normalisation).
      quadrants: (B, N, Q, H, W, 3) uint8, plain views for the exchange context; Q is 4 or 0.
      crop_text: (B, N, T) int32 question tokens that the crop's encoding reads; crop_text_mask: (B, N, T) bool.
      round_image: (B, R) int32 image of the round; round_end: (B, R) int32 position of the last token before the
        answer; latent_start: (B, R) int32 position of the round's first latent. -1 where there is none.
      latent_count: L = l^2, static.
    """

    tokens: np.ndarray
    targets: np.ndarray
    loss_weights: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    visual_index: np.ndarray
    crops: np.ndarray
    crop_kind: np.ndarray
    quadrants: np.ndarray
    crop_text: np.ndarray
    crop_text_mask: np.ndarray
    round_image: np.ndarray
    round_end: np.ndarray
    latent_start: np.ndarray
    latent_count: int = field(metadata={"static": True})


@dataclass(frozen=True)
class Example:
    """One conversation, ready to lay out.

    Attributes:
      input_ids: (length,) int32 with IMAGE and LATENTS placeholders. labels: (length,) int32 with IGNORE and
        ANSWER_START marks; None for a prompt, whose last token ends the last round's question.
      question_ids: question tokens of all rounds, int32; empty for text-only conversations.
      crops: (5 or 1, H, W, 3) uint8, quadrants first and the whole image last; None without an image.
      where: file and record, for messages.
    """

    input_ids: np.ndarray
    labels: np.ndarray | None
    question_ids: np.ndarray
    crops: np.ndarray | None
    where: str = "prompt"


@dataclass(frozen=True)
class LayoutSpec:
    """Fixed sizes of a batch: S `length`, T `question_length`, R `rounds`, P `image_tokens`; the rest as the model."""

    length: int
    question_length: int
    rounds: int
    image_tokens: int
    image_size: int
    quadrants: int
    zero_image_for_text: bool
    hide_question_id_zero: bool


def laid_out_length(example: Example, spec: LayoutSpec, latent_count: int) -> int:
    """Positions that the example takes once its placeholders are filled."""
    images = int((example.input_ids == IMAGE).sum())
    latents = int((example.input_ids == LATENTS).sum())
    text = len(example.input_ids) - images - latents
    return text + images * spec.image_tokens + latents * latent_count


def check_fits(example: Example, spec: LayoutSpec, latent_count: int) -> None:
    """Raises BadRecord (`too_long`, `question_too_long`, `too_many_rounds`): nothing is ever cut silently."""
    length = laid_out_length(example, spec, latent_count)
    if length > spec.length:
        raise BadRecord(
            "too_long", example.where, f"needs {length} positions with its visual tokens; max_length is {spec.length}"
        )
    if len(example.question_ids) > spec.question_length:
        raise BadRecord(
            "question_too_long",
            example.where,
            f"has {len(example.question_ids)} question tokens; max_question_length is {spec.question_length}",
        )
    rounds = int((example.input_ids == LATENTS).sum())
    if rounds > spec.rounds:
        raise BadRecord("too_many_rounds", example.where, f"has {rounds} rounds; max_rounds is {spec.rounds}")


def _fill(row: dict[str, np.ndarray], example: Example, spec: LayoutSpec, latent_count: int) -> None:
    """Writes one example into the (zeroed) row, from position 0 as segment 1."""
    ids = example.input_ids
    labels = example.labels
    if labels is None:
        labels = np.full(len(ids), IGNORE, np.int32)
        labels[-1] = ANSWER_START
    # The published code fills the first visual place of a round with the image and the next with the latents.
    places = np.flatnonzero((ids == IMAGE) | (ids == LATENTS))
    kinds = ids[places].copy()
    for i in np.flatnonzero(kinds == IMAGE):
        if i > 0 and kinds[i - 1] == LATENTS:
            kinds[[i - 1, i]] = kinds[[i, i - 1]]
    kind_at = dict(zip(places.tolist(), kinds.tolist()))

    image_places = spec.image_tokens * row["crop_kind"].shape[0]
    position = rounds = ends = 0
    for i, token in enumerate(ids.tolist()):
        kind = kind_at.get(i)
        if kind == IMAGE:
            row["visual_index"][position : position + spec.image_tokens] = np.arange(spec.image_tokens)
            position += spec.image_tokens
            continue
        if kind == LATENTS:
            first = image_places + rounds * latent_count
            row["visual_index"][position : position + latent_count] = first + np.arange(latent_count)
            row["latent_start"][rounds] = position
            row["round_image"][rounds] = 0
            rounds += 1
            position += latent_count
            continue
        row["tokens"][position] = token
        label = labels[i]
        if label >= 0:
            row["targets"][position - 1] = label
            row["loss_weights"][position - 1] = 1.0
        elif label == ANSWER_START and ends < len(row["round_end"]):
            row["round_end"][ends] = position
            ends += 1
        position += 1
    row["segment_ids"][:position] = 1
    row["positions"][:position] = np.arange(position)

    if example.crops is not None:
        row["crop_kind"][0] = PIXELS
        row["crops"][0] = example.crops[-1]
        if spec.quadrants:
            row["quadrants"][0] = example.crops[: spec.quadrants]
        count = len(example.question_ids) if spec.question_length else 0
        question = example.question_ids[:count]
        row["crop_text"][0, :count] = question
        row["crop_text_mask"][0, :count] = (question != 0) if spec.hide_question_id_zero else True
    elif spec.zero_image_for_text and rounds:
        row["crop_kind"][0] = ZERO_IMAGE


def lay_out(examples: list[Example], spec: LayoutSpec, latent_count: int) -> Batch:
    """Lays out one example a row. Every example must fit (`check_fits`).

    Returns:
      A Batch of numpy arrays with B = len(examples).
    """
    b, s, t, r, size = len(examples), spec.length, spec.question_length, spec.rounds, spec.image_size
    images = 1
    arrays = {
        "tokens": np.zeros((b, s), np.int32),
        "targets": np.zeros((b, s), np.int32),
        "loss_weights": np.zeros((b, s), np.float32),
        "segment_ids": np.zeros((b, s), np.int32),
        "positions": np.zeros((b, s), np.int32),
        "visual_index": np.full((b, s), -1, np.int32),
        "crops": np.zeros((b, images, size, size, 3), np.uint8),
        "crop_kind": np.zeros((b, images), np.int32),
        "quadrants": np.zeros((b, images, spec.quadrants, size, size, 3), np.uint8),
        "crop_text": np.zeros((b, images, t), np.int32),
        "crop_text_mask": np.zeros((b, images, t), bool),
        "round_image": np.full((b, r), -1, np.int32),
        "round_end": np.full((b, r), -1, np.int32),
        "latent_start": np.full((b, r), -1, np.int32),
    }
    for i, example in enumerate(examples):
        _fill({name: array[i] for name, array in arrays.items()}, example, spec, latent_count)
    return Batch(**arrays, latent_count=latent_count)
