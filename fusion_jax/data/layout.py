"""The batch contract: how conversations and crops become the fixed-shape arrays that the model reads.

One row with an image, two rounds and l^2 = 4 latents (i image token, L latent, q question, a answer, . padding):

    tokens          s s v 0 0 0 0 v v 0 0 0 0 v q q e a a e v 0 0 0 0 v q e a e . .
    what            ...     i i i i     L L L L   q q   a a     L L L L   q   a
    visual_index   -1-1-1 0 1 2 3-1-1 4 5 6 7-1-1-1-1-1-1-1-1 8 91011-1-1-1-1-1-1-1
    round_end                               ^ (last token before the answer)  ^

`visual_index` points into the row's visual table: N images of P tokens each, then R rounds of L latents each.
Assembling the sequence is then one embedding lookup, one gather and one `where`. In a conversation with one image the
first visual place of its round holds the image and the latents follow it (the published order); with several images
every place holds what stands there.

A row may pack several examples. Each has its own segment and its own positions from 0; images and rounds of all of them
lie one after the other in the row's tables. Here N = 3 and P = L = 2; the second example is text only:

    segment_ids     1 1 1 1 1 1 1 1 1 1 2 2 2 2 3 3 3 3 3 3 3 3 3 3 3 3 3 3 0 0
    positions       0 1 2 3 4 5 6 7 8 9 0 1 2 3 0 1 2 3 4 5 6 7 8 910111213 . .
    what            s i i L L q q e a e s q e a s i i n i i L L q e a e ...
    visual_index      0 1 6 7                     2 3   4 5 8 9
    round_image           0                                 2     (the latest so far; n is the text between them)
    latent_start          3                                 20    (places of the row, not positions)

Everything here is numpy on the host; `latent_count` is static, so that each l^2 is one compiled program.
"""

from collections.abc import Sequence
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
      round_image: (B, R) int32 image of the round, of the row's N; round_end: (B, R) int32 place of the last token
        before the answer; latent_start: (B, R) int32 place of the round's first latent. -1 where there is none.
        Places count from the row's start. A text-only example has a round_end only where the row is its own.
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
      crops: (images, 5 or 1, H, W, 3) uint8 in the order of the IMAGE placeholders, quadrants first and the whole image
        last; the first axis may be missing where there is one image. None without an image.
      where: file and record, for messages.
    """

    input_ids: np.ndarray
    labels: np.ndarray | None
    question_ids: np.ndarray
    crops: np.ndarray | None
    where: str = "prompt"


@dataclass(frozen=True)
class LayoutSpec:
    """Fixed sizes of a batch: S `length`, T `question_length`, R `rounds`, P `image_tokens`, N `images`; the rest as
    the model. Rounds and images are those of a whole row; rows of text alone may have N = 0, which costs no encoder."""

    length: int
    question_length: int
    rounds: int
    image_tokens: int
    image_size: int
    quadrants: int
    zero_image_for_text: bool
    hide_question_id_zero: bool
    images: int = 1


@dataclass(frozen=True)
class Needs:
    """What an example takes of its row: positions, image slots, rounds with latents."""

    length: int
    images: int
    rounds: int


def needs(example: Example, spec: LayoutSpec, latent_count: int) -> Needs:
    """What the example takes of its row once its placeholders are filled."""
    images = int((example.input_ids == IMAGE).sum())
    rounds = int((example.input_ids == LATENTS).sum())
    length = len(example.input_ids) + images * (spec.image_tokens - 1) + rounds * (latent_count - 1)
    return Needs(length, images or int(spec.zero_image_for_text and rounds > 0), rounds)


def laid_out_length(example: Example, spec: LayoutSpec, latent_count: int) -> int:
    """Positions that the example takes once its placeholders are filled."""
    return needs(example, spec, latent_count).length


def check_fits(example: Example, spec: LayoutSpec, latent_count: int) -> None:
    """Raises BadRecord (`too_long`, `question_too_long`, `too_many_rounds`, `too_many_images`): nothing is ever cut
    silently."""
    takes = needs(example, spec, latent_count)
    for reason, count, what, limit, name in (
        ("too_long", takes.length, "positions with its visual tokens", spec.length, "max_length"),
        (
            "question_too_long",
            len(example.question_ids),
            "question tokens",
            spec.question_length,
            "max_question_length",
        ),
        ("too_many_rounds", takes.rounds, "rounds", spec.rounds, "max_rounds"),
        ("too_many_images", takes.images, "images", spec.images, "max_images"),
    ):
        if count > limit:
            raise BadRecord(reason, example.where, f"has {count} {what}; {name} is {limit}")


@dataclass(frozen=True)
class _Cursor:
    """Where the next example of a row goes: first position, image slot and round; examples before it."""

    length: int = 0
    images: int = 0
    rounds: int = 0
    examples: int = 0


def _fill(
    row: dict[str, np.ndarray], example: Example, at: _Cursor, spec: LayoutSpec, latent_count: int, alone: bool
) -> _Cursor:
    """Writes one example into the (zeroed) row; `alone`: no other shares it. Returns where the next one goes."""
    takes = needs(example, spec, latent_count)
    end = _Cursor(at.length + takes.length, at.images + takes.images, at.rounds + takes.rounds, at.examples + 1)
    if end.length > spec.length or end.images > spec.images or end.rounds > spec.rounds:
        raise ValueError(f"{example.where}: the row has no room for it ({end} of {spec}).")
    ids, labels = example.input_ids.copy(), example.labels
    if labels is None:
        labels = np.full(len(ids), IGNORE, np.int32)
        labels[-1] = ANSWER_START
    crops = np.zeros((0,)) if example.crops is None else example.crops
    crops = crops[None] if crops.ndim == 4 else crops
    pictures = np.flatnonzero(ids == IMAGE)
    if len(crops) != len(pictures) or (takes.rounds and not takes.images):
        raise ValueError(f"{example.where}: {len(crops)} images for {len(pictures)} places and {takes.rounds} latents.")
    if len(pictures) == 1:
        # The published code fills the first visual place of a round with the image and the next with the latents.
        before = np.flatnonzero(ids[: pictures[0]] < 0)
        if len(before) and ids[before[-1]] == LATENTS:
            ids[[before[-1], pictures[0]]] = IMAGE, LATENTS
            pictures = before[-1:]

    sizes = np.where(ids == IMAGE, spec.image_tokens, np.where(ids == LATENTS, latent_count, 1))
    starts = at.length + np.cumsum(sizes) - sizes
    text = (ids != IMAGE) & (ids != LATENTS)
    row["tokens"][starts[text]] = ids[text]
    supervised = text & (labels >= 0)
    supervised[0] = False  # nothing predicts an example's first token
    row["targets"][starts[supervised] - 1] = labels[supervised]
    row["loss_weights"][starts[supervised] - 1] = 1.0
    row["segment_ids"][at.length : end.length] = end.examples
    row["positions"][at.length : end.length] = np.arange(takes.length)

    for slot, start in enumerate(starts[pictures], at.images):
        row["visual_index"][start : start + spec.image_tokens] = slot * spec.image_tokens + np.arange(spec.image_tokens)
    for r, start in enumerate(starts[ids == LATENTS], at.rounds):
        first = spec.images * spec.image_tokens + r * latent_count
        row["visual_index"][start : start + latent_count] = first + np.arange(latent_count)
    row["latent_start"][at.rounds : end.rounds] = starts[ids == LATENTS]
    marks = np.flatnonzero(labels == ANSWER_START)[: spec.rounds if alone else takes.rounds]
    row["round_end"][at.rounds : at.rounds + len(marks)] = starts[marks]
    # The latest image that the round or one before it shows; rounds before any image look at the first.
    shown = np.searchsorted(pictures, np.append(marks, [len(ids)] * takes.rounds)[: takes.rounds])
    row["round_image"][at.rounds : end.rounds] = at.images + np.maximum(shown - 1, 0)

    slots = slice(at.images, end.images)
    row["crop_kind"][slots] = PIXELS if len(crops) else ZERO_IMAGE
    if len(crops):
        row["crops"][slots] = crops[:, -1]
        row["quadrants"][slots] = crops[:, : spec.quadrants]
        question = example.question_ids[: len(example.question_ids) if spec.question_length else 0]
        row["crop_text"][slots, : len(question)] = question
        row["crop_text_mask"][slots, : len(question)] = (question != 0) if spec.hide_question_id_zero else True
    return end


def lay_out(examples: Sequence[Example], spec: LayoutSpec, latent_count: int) -> Batch:
    """Lays out one example a row. Every example must fit (`check_fits`).

    Returns:
      A Batch of numpy arrays with B = len(examples).
    """
    return lay_out_rows([[example] for example in examples], spec, latent_count)


def lay_out_rows(rows: Sequence[Sequence[Example]], spec: LayoutSpec, latent_count: int) -> Batch:
    """Lays out rows of several examples each, or of none.

    Args:
      rows: the examples of each row; together they must fit it: see `needs` and `data.packing`.

    Returns:
      A Batch of numpy arrays with B = len(rows).

    Raises:
      ValueError: a row is too small for its examples, or an example's crops are not those of its placeholders.
    """
    b, s, t, r, n, size = len(rows), spec.length, spec.question_length, spec.rounds, spec.images, spec.image_size
    arrays = {
        "tokens": np.zeros((b, s), np.int32),
        "targets": np.zeros((b, s), np.int32),
        "loss_weights": np.zeros((b, s), np.float32),
        "segment_ids": np.zeros((b, s), np.int32),
        "positions": np.zeros((b, s), np.int32),
        "visual_index": np.full((b, s), -1, np.int32),
        "crops": np.zeros((b, n, size, size, 3), np.uint8),
        "crop_kind": np.full((b, n), NO_CROP, np.int32),
        "quadrants": np.zeros((b, n, spec.quadrants, size, size, 3), np.uint8),
        "crop_text": np.zeros((b, n, t), np.int32),
        "crop_text_mask": np.zeros((b, n, t), bool),
        "round_image": np.full((b, r), -1, np.int32),
        "round_end": np.full((b, r), -1, np.int32),
        "latent_start": np.full((b, r), -1, np.int32),
    }
    for i, examples in enumerate(rows):
        row, cursor = {name: array[i] for name, array in arrays.items()}, _Cursor()
        for example in examples:
            cursor = _fill(row, example, cursor, spec, latent_count, len(examples) == 1)
    return Batch(**arrays, latent_count=latent_count)
