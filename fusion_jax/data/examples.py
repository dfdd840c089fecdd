"""Turns records into examples: encodes text, cuts images into crops, drops rounds that do not fit.

Nothing here loads Grain.
"""

import bisect
import dataclasses
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from fusion_jax.data import chat_template, conversation, image, tiles
from fusion_jax.data.conversation import LATENTS
from fusion_jax.data.layout import Example, LayoutSpec, Measured, check_fits, measure
from fusion_jax.data.sources import Record, RecordSource
from fusion_jax.data.tokenizer import Tokenizer
from fusion_jax.errors import BadRecord
from fusion_jax.models.config import QUADRANTS, FusionConfig


def layout_spec(model: FusionConfig, length: int, question_length: int, rounds: int, images: int = 1) -> LayoutSpec:
    """Returns the fixed sizes of a model's batches. `rounds` are per row, `images` per conversation; there are as many
    crops as one conversation may have. Questions may be empty, so there is room for at least one token."""
    return LayoutSpec(
        length=length,
        question_length=max(question_length, 1) if model.text_guided else 0,
        rounds=rounds if model.semantic_exchange else 0,
        image_tokens=model.tokens_per_image,
        image_size=model.vision.image_size,
        quadrants=QUADRANTS if model.uses_quadrants else 0,
        zero_image_for_text=model.text_only == "zero_image",
        hide_question_id_zero=model.hide_question_id_zero,
        crops=images * model.most_crops,
        images=images,
        grids=model.tile_grids,
        tile_tokens=model.tokens_per_tile,
        image_first=model.image_place == "first",
    )


_LENGTHS = 1  # to be raised when the encoding changes, so that stored lengths of before are not used


@dataclass(frozen=True)
class ExampleMaker:
    """Turns records into examples for one model, tokenizer and template; picklable.

    decode: exact or fast, see `data.image`.
    """

    model: FusionConfig
    tokenizer: Tokenizer
    template: str
    decode: str = "exact"

    @functools.cached_property
    def lengths_key(self) -> str:
        """All that the lengths of a record depend on, except the record: see lengths.py."""
        spec = layout_spec(self.model, 1, 1, 1)
        template = chat_template.find(self.template, self.tokenizer)
        model = self.model.semantic_exchange, self.model.guide
        return repr((_LENGTHS, self.tokenizer.fingerprint, template, *model, spec))

    def __call__(self, record: Record, prompt: bool = False) -> Example:
        """Encodes a record and its images. With `prompt` the conversation ends before its last answer.

        Raises:
          BadRecord: the conversation or an image cannot be used.
        """
        return self.with_crops(self.text(record, prompt), record)

    def text(self, record: Record, prompt: bool = False) -> Example:
        """Encodes a record without crops: at most the sizes of images are read. Raises BadRecord as `__call__` does."""
        model = self.model
        encode, more = conversation.encode_conversation, {}
        if prompt:
            encode, more = conversation.encode_prompt, {"literal": record.literal}
        encoded = encode(
            record.turns,
            self.tokenizer,
            chat_template.find(self.template, self.tokenizer),
            len(record.images),
            latents=model.semantic_exchange,
            latents_without_image=model.text_only == "zero_image",
            first_guides=model.guide == "first_round",
            system=record.system,
            where=record.where,
            **more,
        )
        question = encoded.instructs if record.images and model.text_guided else encoded.instructs[:0]
        if record.guide is not None and record.images and model.text_guided:
            template = chat_template.find(self.template, self.tokenizer)
            question = conversation.encode_guide(record.guide, self.tokenizer, template)
        tilings = ()
        if model.tile_grids:
            sizes = record.sizes or [image.read_size(one, record.where) for one in record.images]
            tilings = tuple(tiles.choose_tiling(size, model.tile_grids, model.vision.image_size) for size in sizes)
        return Example(encoded.input_ids, encoded.labels, question, None, record.where, tilings)

    def fitting(self, record: Record, spec: LayoutSpec, latents: int) -> Example:
        """Encodes as `text` does, without the last rounds if the conversation is too long for a row. Whole rounds are
        dropped, never an image and never part of an answer.

        Raises:
          BadRecord: as `text`, or nothing fits: `too_long`, `question_too_long`, `too_many_rounds`, `too_many_images`.
        """
        example = self.text(record)
        try:
            check_fits(example, spec, latents)
            return example
        except BadRecord:
            dropped = self._rounds_too_many(example, record, spec, latents)
            if not dropped:
                raise
        example = dataclasses.replace(self._without_last(record, dropped), dropped_rounds=dropped)
        check_fits(example, spec, latents)
        return example

    def _rounds_too_many(self, example: Example, record: Record, spec: LayoutSpec, latents: int) -> int:
        """Returns how many last rounds must go for the conversation to fit; if it never does, how many may go.

        Rounds are tokenized one after the other, so the length of fewer rounds follows from the whole conversation.
        Only their questions are tokenized as one text, whose tokens are counted again for a few numbers of rounds.

        Args:
          example: `text` of the whole record.
        """
        ids, answer = example.input_ids, np.append(example.labels >= 0, False)
        ends = np.flatnonzero(answer[:-1] & ~answer[1:]) + 1  # the end of each round
        # A round with an image never goes. A round is a question and its answer; a greeting may come first.
        turns = record.turns[len(record.turns) - 2 * len(ends) :]
        with_image = [i // 2 + 1 for i, turn in enumerate(turns) if conversation.IMAGE_TAG in turn["value"]]
        least = max([1, *with_image])
        rounds = np.cumsum(ids == LATENTS)[ends - 1]
        lengths = measure(example, spec, latents).length - (len(ids) - ends) - (rounds[-1] - rounds) * (latents - 1)
        kept = int(np.sum((lengths <= spec.length) & (rounds <= spec.rounds)))

        def question_tokens(kept: int) -> int:
            return len(self._without_last(record, len(ends) - kept).question_ids)

        if kept > least and question_tokens(kept) > spec.question_length:
            kept = least + bisect.bisect_right(range(least, kept), spec.question_length, key=question_tokens) - 1
        return len(ends) - max(kept, least)

    def _without_last(self, record: Record, rounds: int) -> Example:
        """Encodes as `text` does, without the last `rounds` rounds."""
        return self.text(dataclasses.replace(record, turns=record.turns[: len(record.turns) - 2 * rounds]))

    def with_crops(self, example: Example, record: Record) -> Example:
        """Adds the crops of the record's images to the example of `text`. Raises BadRecord as `__call__` does."""
        if not record.images:
            return example
        size = self.model.vision.image_size
        if example.tilings:
            crops = [
                image.read_tiles(one, tiling, size, self.decode, record.where)[:, None]
                for one, tiling in zip(record.images, example.tilings)
            ]
            return dataclasses.replace(example, crops=np.concatenate(crops))
        quadrants = self.model.uses_quadrants
        crops = [image.read_crops(one, size, quadrants, self.decode, record.where) for one in record.images]
        return dataclasses.replace(example, crops=np.stack(crops))


@dataclass(frozen=True)
class ExampleLoader:
    """Loads records by number: measured, or as examples that fit a row even at the largest l^2."""

    source: RecordSource
    maker: ExampleMaker
    spec: LayoutSpec
    longest_latents: int

    def load(self, number: int) -> Example | BadRecord:
        """Loads the example with its crops."""
        try:
            record = self.source[number]
            return self.maker.with_crops(self.maker.fitting(record, self.spec, self.longest_latents), record)
        except BadRecord as bad:
            return bad

    def text(self, number: int) -> Example | BadRecord:
        """Loads the example without its crops."""
        try:
            return self.maker.fitting(self.source.text(number), self.spec, self.longest_latents)
        except BadRecord as bad:
            return bad

    def load_planned(self, planned: Measured) -> Example | BadRecord:
        """Loads the example with its crops, if it takes as much room as was planned for it."""
        example = self.load(planned.number)
        if isinstance(example, BadRecord):
            return example
        if planned._replace(arrived=0) != measure(example, self.spec, 0, planned.number):
            detail = "its text or an image has changed since it was measured, or differs from process 0's"
            return BadRecord("changed", example.where, detail)
        return example

    def measure(self, number: int, headers: bool = False) -> tuple[Measured, int] | BadRecord:
        """Measures what the record takes, and how many last rounds it loses.

        Args:
          headers: also read the headers of its images; a record with an unreadable one is bad.
        """
        if number >= len(self.source):
            return BadRecord("changed", f"record {number}", f"the data now has {len(self.source)} records")
        if (stored := self._stored(int(number))) is not None:
            return stored, 0
        try:
            record = self.source.text(number)
            example = self.maker.fitting(record, self.spec, self.longest_latents)
            for one in record.images if headers else ():
                if one != b"":  # shards and their sizes were checked when they were written
                    image.read_size(one, record.where)
        except BadRecord as bad:
            return bad
        return measure(example, self.spec, 0, int(number)), example.dropped_rounds

    def _stored(self, number: int) -> Measured | None:
        """Returns what the record takes, if its lengths are stored and it fits as a whole."""
        spec, stored = self.spec, self.source.lengths(number, self.maker.lengths_key)
        if stored is None:
            return None
        length, question, crops, rounds, images = stored.tolist()
        if (
            length + rounds * self.longest_latents > spec.length
            or question > spec.question_length
            or rounds > spec.rounds
            or images > spec.images
        ):
            return None
        return Measured(number, length, crops, rounds, question=question)


def load_rows(
    loader: ExampleLoader, rows: Sequence[Sequence[Measured]], threads: int
) -> tuple[list[list[Example]], list[tuple[Measured, BadRecord]]]:
    """Loads the examples of planned rows, and lists the records that leave a gap in them: their images turned out to be
    bad, or they have changed since they were measured."""
    with ThreadPoolExecutor(threads) as pool:
        loaded = [list(row) for row in [pool.map(loader.load_planned, row) for row in rows]]
    good = [[example for example in row if not isinstance(example, BadRecord)] for row in loaded]
    gaps = [
        (measured, example)
        for row, examples in zip(rows, loaded)
        for measured, example in zip(row, examples)
        if isinstance(example, BadRecord)
    ]
    return good, gaps
