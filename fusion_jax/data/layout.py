"""The batch contract: how conversations and crops become the fixed-shape arrays that the model reads.

One row with an image, two rounds and l^2 = 4 latents (i image token, L latent, q question, a answer, . padding):

    tokens          s s v 0 0 0 0 v v 0 0 0 0 v q q e a a e v 0 0 0 0 v q e a e . .
    what            ...     i i i i     L L L L   q q   a a     L L L L   q   a
    visual_index   -1-1-1 0 1 2 3-1-1 4 5 6 7-1-1-1-1-1-1-1-1 8 91011-1-1-1-1-1-1-1
    round_end                               ^ (last token before the answer)  ^

Rows belong to groups (by default each to its own), and the rows of a group share one table of crops, so that a slot is
wasted only if the whole group has too few images. `visual_index` points into the group's visual table:

    K whole views of I tokens | K tiles of J tokens | row end | R rounds of L latents of its first row | ...
                              `-- dynamic resolution only --'

Every crop has a place of each kind; which of them is used says what the crop is. Assembling the sequence is then one
embedding lookup, one gather and one `where`. An image of dynamic resolution (data/tiles.py) is in the sequence as its
whole view and then, row by row, the tokens of its tiles, each row closed by the row end.

In a conversation with one image the first visual place of its round holds the image and the latents follow it (the
published order), or with `image_first` that of the whole conversation, and all later places hold latents (the published
code when a later turn says `<image>`); with several images every place holds its own image or latents.

A row may pack several examples. Each has its own segment and its own positions from 0; images and rounds of all of them
follow each other in the tables. Here the row is alone in its group, K = 3 and I = L = 2; the second example is text
only:

    segment_ids     1 1 1 1 1 1 1 1 1 1 2 2 2 2 3 3 3 3 3 3 3 3 3 3 3 3 3 3 0 0
    positions       0 1 2 3 4 5 6 7 8 9 0 1 2 3 0 1 2 3 4 5 6 7 8 910111213 . .
    what            s i i L L q q e a e s q e a s i i n i i L L q e a e ...
    visual_index      0 1 6 7                     2 3   4 5 8 9
    round_crop            0                                 2     (the latest so far; n is the text between them)
    latent_start          3                                 20    (places of the row, not positions)

Everything here is numpy on the host; `latent_count` is static, so that each l^2 is one compiled program.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fusion_jax.batch import NO_CROP, PIXELS, ZERO_IMAGE, Batch, windows
from fusion_jax.data import tiles
from fusion_jax.data.conversation import ANSWER_START, IGNORE, IMAGE, LATENTS
from fusion_jax.data.tile_windows import tile_windows, widest_window
from fusion_jax.data.tiles import Tiling
from fusion_jax.errors import BadRecord


@dataclass(frozen=True)
class Example:
    """One conversation, ready to lay out.

    Attributes:
      input_ids: (length,) int32 with IMAGE and LATENTS placeholders. labels: (length,) int32 with IGNORE and
        ANSWER_START marks; None for a prompt, whose last token ends the last round's question.
      question_ids: question tokens that guide the images, int32; empty for text-only conversations.
      crops: (crops, 5 or 1, H, W, 3) uint8 in the order of the IMAGE placeholders, an image's tiles after its whole
        view; of each crop first the quadrants, then the crop itself. The first axis may be missing if there is one
        crop. None without an image, and until the images are read.
      where: file and record, for messages.
      tilings: the tiling of each image with dynamic resolution; else empty.
      dropped_rounds: last rounds of the record that are left out because the row would be too short.
    """

    input_ids: np.ndarray
    labels: np.ndarray | None
    question_ids: np.ndarray
    crops: np.ndarray | None
    where: str = "prompt"
    tilings: tuple[Tiling, ...] = ()
    dropped_rounds: int = 0

    @property
    def images(self) -> int:
        """The number of its images."""
        return int((self.input_ids == IMAGE).sum())


@dataclass(frozen=True)
class LayoutSpec:
    """Fixed sizes of a batch: S `length`, T `question_length`, R `rounds` of a row, I `image_tokens`, K `crops` of a
    group (0: rows of text alone, which cost no encoder), `images` that one conversation may have; J `tile_tokens` and
    the `grids` of dynamic resolution; `image_first` if the model's `image_place` is; the rest as in the model."""

    length: int
    question_length: int
    rounds: int
    image_tokens: int
    image_size: int
    quadrants: int
    zero_image_for_text: bool
    hide_question_id_zero: bool
    crops: int = 1
    images: int = 1
    grids: tuple[tuple[int, int], ...] = ()
    tile_tokens: int = 0
    image_first: bool = False

    def tokens_of(self, tiling: Tiling) -> int:
        """Returns the positions that an image takes in the sequence."""
        return self.image_tokens + tiling.tokens(self.image_size, math.isqrt(self.tile_tokens))

    def window_size(self, latent_count: int) -> int:
        """Returns M, the number of tokens in the widest window."""
        if not latent_count or not self.rounds:
            return 0
        if self.quadrants:
            return 9
        sides = math.isqrt(self.image_tokens), math.isqrt(self.tile_tokens)
        return widest_window(self.grids, *sides, math.isqrt(latent_count))


class Measured(NamedTuple):
    """What a record takes: its number, positions of its row, crops of its group, rounds with latents of its row; the
    step, from 0, before which it was read; and the tokens of the question that guides its crops, -1 if a checkpoint of
    an earlier version lacks them. While its l^2 is not drawn yet, `length` is without latents."""

    number: int
    length: int
    crops: int
    rounds: int
    arrived: int = 0
    question: int = 0


def measure(example: Example, spec: LayoutSpec, latent_count: int, number: int = 0) -> Measured:
    """Measures what the example takes once its placeholders are filled; `number` is its record's."""
    rounds = int((example.input_ids == LATENTS).sum())
    tilings = example.tilings or (tiles.WHOLE,) * example.images
    visual = sum(spec.tokens_of(tiling) for tiling in tilings)
    length = len(example.input_ids) + visual - example.images + rounds * (latent_count - 1)
    crops = sum(tiling.crops for tiling in tilings) or int(spec.zero_image_for_text and rounds > 0)
    question = len(example.question_ids) if spec.question_length else 0
    return Measured(number, length, crops, rounds, question=question)


def check_fits(example: Example, spec: LayoutSpec, latent_count: int) -> None:
    """Raises BadRecord (`too_long`, `question_too_long`, `too_many_rounds`, `too_many_images`): nothing is ever cut
    silently."""
    takes = measure(example, spec, latent_count)
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
        ("too_many_images", example.images, "images", spec.images, "max_images"),
    ):
        if count > limit:
            raise BadRecord(reason, example.where, f"has {count} {what}; {name} is {limit}")


@dataclass(frozen=True)
class _Cursor:
    """Where the next example goes: first position, round and number in its row, first crop of the group."""

    length: int = 0
    rounds: int = 0
    examples: int = 0
    crops: int = 0


@dataclass(frozen=True)
class _Slots:
    """The placeholders of one example and where they go.

    Attributes:
      ids: the example's ids, its one image moved to where the published code puts it. starts: first position of each
        id in the row. images: places of the IMAGE placeholders in `ids`. tilings: one per image. whole: slot of each
        image's whole view in the group's table of crops.
    """

    ids: np.ndarray
    starts: np.ndarray
    images: np.ndarray
    tilings: tuple[Tiling, ...]
    whole: np.ndarray


def _fill(
    row: dict[str, np.ndarray],
    table: dict[str, np.ndarray],
    example: Example,
    at: _Cursor,
    spec: LayoutSpec,
    latent_count: int,
    first_latent: int,
    alone: bool,
) -> _Cursor:
    """Writes one example into the (zeroed) row and its group's table of crops. Returns where the next one goes.

    Args:
      first_latent: index of the row's first latent in the visual table. alone: no other example shares the row.
    """
    takes = measure(example, spec, latent_count)
    end = _Cursor(at.length + takes.length, at.rounds + takes.rounds, at.examples + 1, at.crops + takes.crops)
    if end.length > spec.length or end.rounds > spec.rounds or end.crops > spec.crops:
        raise ValueError(f"{example.where}: the row has no room for it ({end} of {spec}).")
    slots, labels = _find_slots(example, at, spec, latent_count), example.labels
    if labels is None:
        labels = np.full(len(slots.ids), IGNORE, np.int32)
        labels[-1] = ANSWER_START
    row["segment_ids"][at.length : end.length] = end.examples
    row["positions"][at.length : end.length] = np.arange(takes.length)
    _fill_text(row, slots, labels)
    for slot, start, tiling in zip(slots.whole, slots.starts[slots.images], slots.tilings):
        index = _image_index(int(slot), tiling, spec)
        row["visual_index"][start : start + len(index)] = index
    marks = np.flatnonzero(labels == ANSWER_START)[: spec.rounds if alone else takes.rounds]
    row["round_end"][at.rounds : at.rounds + len(marks)] = slots.starts[marks]
    _fill_rounds(row, slots, marks, at, spec, latent_count, first_latent)
    _fill_crops(table, example, slice(at.crops, end.crops), spec)
    return end


def _find_slots(example: Example, at: _Cursor, spec: LayoutSpec, latent_count: int) -> _Slots:
    """Finds where the example's placeholders go. Raises ValueError if its crops do not match its placeholders."""
    ids = example.input_ids.copy()
    images, latents = np.flatnonzero(ids == IMAGE), np.flatnonzero(ids == LATENTS)
    tilings = example.tilings or (tiles.WHOLE,) * len(images)
    counts = [tiling.crops for tiling in tilings]
    crops = len(_crops(example))
    if crops != sum(counts) or (len(latents) and not crops and not spec.zero_image_for_text):
        raise ValueError(f"{example.where}: {crops} crops for {len(images)} places and {len(latents)} latents.")
    if len(images) == 1:
        # The published code fills the first visual place of a round with the image and the next with the latents.
        before = latents[latents < images[0]]
        if len(before):
            place = before[0 if spec.image_first else -1]
            ids[[place, images[0]]] = IMAGE, LATENTS
            images = np.array([place])
    sizes = np.where(ids == LATENTS, latent_count, 1)
    sizes[images] = [spec.tokens_of(tiling) for tiling in tilings]
    starts = at.length + np.cumsum(sizes) - sizes
    return _Slots(ids, starts, images, tilings, at.crops + np.cumsum([0, *counts])[:-1])


def _fill_text(row: dict[str, np.ndarray], slots: _Slots, labels: np.ndarray) -> None:
    """Writes the tokens, and the targets one position before theirs."""
    text = (slots.ids != IMAGE) & (slots.ids != LATENTS)
    row["tokens"][slots.starts[text]] = slots.ids[text]
    supervised = text & (labels >= 0)
    supervised[0] = False  # nothing predicts an example's first token
    row["targets"][slots.starts[supervised] - 1] = labels[supervised]
    row["loss_weights"][slots.starts[supervised] - 1] = 1.0


def _fill_rounds(
    row: dict[str, np.ndarray],
    slots: _Slots,
    marks: np.ndarray,
    at: _Cursor,
    spec: LayoutSpec,
    latent_count: int,
    first_latent: int,
) -> None:
    """Writes for each round with latents where they are, which crop they query and through which windows.

    Args:
      marks: places in `ids` of the last token before each answer.
    """
    latents = slots.starts[slots.ids == LATENTS]
    rounds = len(latents)
    for r, start in enumerate(latents, at.rounds):
        first = first_latent + r * latent_count
        row["visual_index"][start : start + latent_count] = first + np.arange(latent_count)
    row["latent_start"][at.rounds : at.rounds + rounds] = latents
    # The latest image that the round or one before it shows; rounds before any image use the first.
    images_before = np.searchsorted(slots.images, np.append(marks, [len(slots.ids)] * rounds)[:rounds])
    for r, image in enumerate(np.maximum(images_before - 1, 0), at.rounds):
        slot, tiling = (int(slots.whole[image]), slots.tilings[image]) if len(slots.images) else (at.crops, tiles.WHOLE)
        row["round_crop"][r] = slot
        seen = round_windows(slot, tiling, spec, latent_count)
        row["windows"][r, :, : seen.shape[1]] = seen


def _fill_crops(table: dict[str, np.ndarray], example: Example, slots: slice, spec: LayoutSpec) -> None:
    """Writes the example's crops, or its zero image, and the question tokens that guide them."""
    crops = _crops(example)
    table["crop_kind"][slots] = PIXELS if len(crops) else ZERO_IMAGE
    if len(crops):
        table["crops"][slots] = crops[:, -1]
        table["quadrants"][slots] = crops[:, : spec.quadrants]
        question = example.question_ids[: len(example.question_ids) if spec.question_length else 0]
        table["crop_text"][slots, : len(question)] = question
        table["crop_text_mask"][slots, : len(question)] = (question != 0) if spec.hide_question_id_zero else True


def _crops(example: Example) -> np.ndarray:
    """Returns the example's crops with their first axis, of length 0 if there are none."""
    crops = np.zeros((0,)) if example.crops is None else example.crops
    return crops[None] if crops.ndim == 4 else crops


def _image_index(slot: int, tiling: Tiling, spec: LayoutSpec) -> np.ndarray:
    """Returns where in the visual table the tokens of an image are, in the order of the sequence."""
    whole = slot * spec.image_tokens + np.arange(spec.image_tokens)
    if not tiling.rows:
        return whole
    places = tiles.tile_places(tiling, spec.image_size, math.isqrt(spec.tile_tokens))
    first = spec.crops * spec.image_tokens + (slot + 1) * spec.tile_tokens
    row_end = spec.crops * (spec.image_tokens + spec.tile_tokens)
    lines = np.concatenate([first + places, np.full((len(places), 1), row_end)], axis=1)
    return np.concatenate([whole, lines.ravel()])


@functools.cache
def _grid_windows(side: int, cells: int) -> tuple[np.ndarray, np.ndarray]:
    return windows(side, cells)


def round_windows(slot: int, tiling: Tiling, spec: LayoutSpec, latent_count: int) -> np.ndarray:
    """Returns the windows of a round's latents over its image: (L, up to M) indices into the group's context, or -1.

    A latent sees its cell of the whole view and its cell of the tiles.
    """
    cells = math.isqrt(latent_count)
    side = 3 * cells if spec.quadrants else math.isqrt(spec.image_tokens)
    index, real = _grid_windows(side, cells)
    parts = [np.where(real, slot * side * side + index, -1)]
    if tiling.rows:
        index, real = tile_windows(tiling, spec.image_size, math.isqrt(spec.tile_tokens), cells)
        first = spec.crops * spec.image_tokens + (slot + 1) * spec.tile_tokens
        parts.append(np.where(real, first + index, -1))
    return np.concatenate(parts, axis=1)


def lay_out(examples: Sequence[Example], spec: LayoutSpec, latent_count: int) -> Batch:
    """Lays out one example per row, each with crops of its own. Every example must fit (`check_fits`).

    Returns:
      A Batch of numpy arrays with B = G = len(examples).
    """
    return lay_out_rows([[example] for example in examples], spec, latent_count)


def lay_out_rows(
    rows: Sequence[Sequence[Example]], spec: LayoutSpec, latent_count: int, groups: int | None = None
) -> Batch:
    """Lays out rows of several examples each, or of none.

    Args:
      rows: the examples of each row; together they must fit it: see `measure` and `data.packing`.
      groups: how many tables of `spec.crops` crops the rows share, the first with the first rows and so on; it divides
        the rows. By default each row has its own.

    Returns:
      A Batch of numpy arrays with B = len(rows).

    Raises:
      ValueError: a row or table is too small for its examples, or an example's crops are not those of its placeholders.
    """
    b, s, t, r, k, size = len(rows), spec.length, spec.question_length, spec.rounds, spec.crops, spec.image_size
    g = b if groups is None else groups
    if b % g:
        raise ValueError(f"{g} groups do not divide {b} rows.")
    of_rows = {
        "tokens": np.zeros((b, s), np.int32),
        "targets": np.zeros((b, s), np.int32),
        "loss_weights": np.zeros((b, s), np.float32),
        "segment_ids": np.zeros((b, s), np.int32),
        "positions": np.zeros((b, s), np.int32),
        "visual_index": np.full((b, s), -1, np.int32),
        "round_crop": np.full((b, r), -1, np.int32),
        "round_end": np.full((b, r), -1, np.int32),
        "latent_start": np.full((b, r), -1, np.int32),
        "windows": np.full((b, r, latent_count, spec.window_size(latent_count)), -1, np.int32),
    }
    of_groups = {
        "crops": np.zeros((g, k, size, size, 3), np.uint8),
        "crop_kind": np.full((g, k), NO_CROP, np.int32),
        "quadrants": np.zeros((g, k, spec.quadrants, size, size, 3), np.uint8),
        "crop_text": np.zeros((g, k, t), np.int32),
        "crop_text_mask": np.zeros((g, k, t), bool),
    }
    latents = k * (spec.image_tokens + spec.tile_tokens) + (1 if spec.grids else 0)  # where they start in the table
    for group in range(g):
        table, crops = {name: array[group] for name, array in of_groups.items()}, 0
        for i, examples in enumerate(rows[group * b // g : (group + 1) * b // g]):
            row = {name: array[group * b // g + i] for name, array in of_rows.items()}
            cursor = _Cursor(crops=crops)
            for example in examples:
                first = latents + i * r * latent_count
                cursor = _fill(row, table, example, cursor, spec, latent_count, first, len(examples) == 1)
            crops = cursor.crops
    return Batch(**of_rows, **of_groups, latent_count=latent_count)
