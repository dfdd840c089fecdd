"""Turns records into batches of prompts, padded to one of few shapes."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from fusion_jax.batch import Batch
from fusion_jax.config import RunConfig, StageConfig
from fusion_jax.data import chat_template
from fusion_jax.data.examples import ExampleMaker, layout_spec
from fusion_jax.data.layout import Example, LayoutSpec, Measured, check_fits, lay_out_rows, measure
from fusion_jax.data.planner import draw_latent_count
from fusion_jax.data.sources import Record
from fusion_jax.data.templates import stop_ids
from fusion_jax.data.tokenizer import Tokenizer
from fusion_jax.errors import BadRecord, check
from fusion_jax.models.config import FusionConfig

# Most questions are much shorter than the longest, and most conversations have few rounds.
_QUESTIONS, _ROUNDS = (64, 256), (1, 4)
BETWEEN = "\n\n"  # between texts that are joined into one turn


def first_question(record: Record) -> Record:
    """The record cut after its first question, as a prompt. Raises BadRecord where no answer follows it."""
    start = 1 if record.turns and record.turns[0].get("from") == "gpt" else 0
    if len(record.turns) < start + 2:
        raise BadRecord("no_answer", record.where, "there is no question with an answer")
    return dataclasses.replace(record, turns=record.turns[start : start + 1])


@dataclass(frozen=True)
class Buckets:
    """Shapes that prompts are padded to: each combination that occurs is one compiled prefill (`server/prefills.py`).

    Attributes:
      lengths: positions of a prompt. questions: question tokens that the encoder reads. rounds, images: how many a
        conversation has; 0 images means text alone. All ascend.
    """

    lengths: tuple[int, ...]
    questions: tuple[int, ...]
    rounds: tuple[int, ...] = (1,)
    images: tuple[int, ...] = (0, 1)

    def __post_init__(self):
        for name in ("lengths", "questions", "rounds", "images"):
            sizes = getattr(self, name)
            check(sizes and tuple(sorted(set(sizes))) == tuple(sizes), f"buckets.{name}={sizes} must ascend.")

    def spec(self, config: FusionConfig, most: Measured, images: int, question: int) -> LayoutSpec:
        """The smallest shape that holds the prompts; where none is large enough, the largest."""

        def up(size: int, sizes: tuple[int, ...]) -> int:
            return next((known for known in sizes if known >= size), sizes[-1])

        images = up(images, self.images)
        spec = layout_spec(
            config, up(most.length, self.lengths), up(question, self.questions), up(most.rounds, self.rounds), images
        )
        return dataclasses.replace(spec, crops=max(spec.crops, min(most.crops, 1)))


def buckets_of_training(
    stages: Sequence[StageConfig],
    lengths: tuple[int, ...] = (),
    questions: tuple[int, ...] = (),
    rounds: tuple[int, ...] = (),
    images: int = 0,
) -> Buckets:
    """Buckets of these sizes; those that are left out end with the largest that any stage trained with.

    Args:
      images: most images of a conversation, 0 for as many as in training.
    """
    longest = max(stage.max_length for stage in stages)
    images = images or max(stage.max_images for stage in stages)
    most_rounds, longest_question = (
        max(getattr(s, name) for s in stages) for name in ("max_rounds", "max_question_length")
    )
    return Buckets(
        # Half the length as well, so that a short prompt costs less than a long one.
        lengths or ((longest // 2, longest) if longest >= 128 else (longest,)),
        questions or (*(size for size in _QUESTIONS if size <= longest_question // 2), longest_question),
        rounds or (*(size for size in _ROUNDS if size <= most_rounds // 2), most_rounds),
        (0, 1) if images == 1 else (0, 1, images),
    )


@dataclass(frozen=True)
class Steps:
    """Shapes for batch jobs: lengths and question tokens are rounded up to multiples of `step`, the rest is exact."""

    step: int = 32

    def spec(self, config: FusionConfig, most: Measured, images: int, question: int) -> LayoutSpec:
        length, question = (round_up(size, self.step) for size in (most.length, question))
        spec = layout_spec(config, length, question, max(most.rounds, 1), max(images, 1))
        return dataclasses.replace(spec, crops=most.crops)


def fit(examples: Sequence[Example], config: FusionConfig, latents: int, buckets: Buckets | Steps) -> LayoutSpec:
    """The smallest shape that holds all of the prompts.

    Raises:
      BadRecord: `too_long`, `question_too_long`, `too_many_rounds`, `too_many_images`: a prompt fits no bucket.
    """
    rough = layout_spec(config, 1, 1, 1)
    most = Measured(*map(max, zip(*(measure(example, rough, latents) for example in examples))))
    images = max(example.images for example in examples)
    spec = buckets.spec(config, most, images, max(len(example.question_ids) for example in examples))
    for example in examples:
        check_fits(example, spec, latents)
    return spec


class Prompts:
    """Makes batches of prompts for one model out of records.

    Args:
      latents: l^2, one of the model's `latent_counts`; None for its fixed one. See `drawn_latents`.
    """

    def __init__(self, config: RunConfig, tokenizer: Tokenizer, buckets: Buckets | Steps, latents: int | None = None):
        self.config, self.tokenizer, self.buckets = config.model, tokenizer, buckets
        self.latents = self.config.fixed_latent_count if latents is None else latents
        allowed = self.config.drawn_latent_counts or (0,)
        check(
            self.latents in allowed,
            f"l^2 = {self.latents} is not one of the model's latent counts; allowed: {', '.join(map(str, allowed))}.",
        )
        self.template = chat_template.find(config.template, tokenizer)
        self.stop_ids = stop_ids(tokenizer, self.template)
        self._maker = ExampleMaker(config.model, tokenizer, config.template)

    @property
    def text_bytes(self) -> int | None:
        """An upper bound on the bytes of a prompt's texts: the longest token at every position."""
        return self.buckets.lengths[-1] * self.tokenizer.longest if isinstance(self.buckets, Buckets) else None

    def example(self, record: Record) -> Example:
        """The prompt of a record, with its images read. Raises BadRecord where it cannot be used or fits no bucket.

        Images are read only once the text is known to fit, and text that is far too long is not even tokenized. A
        caller's system text is put before the first question where the template has no place for it.
        """
        if self.text_bytes is not None:
            texts = [record.system or "", *(turn["value"] for turn in record.turns)]
            size = sum(len(text.encode(errors="replace")) for text in texts)
            detail = f"the texts have {size} bytes, and no prompt has over {self.text_bytes}"
            if size > self.text_bytes:
                raise BadRecord("too_long", record.where, detail)
        if record.literal and record.system and self.template.system_frame is None:
            record = _system_in_question(record)
        example = self._maker.text(record, prompt=True)
        fit([example], self.config, self.latents, self.buckets)
        return self._maker.with_crops(example, record)

    def measure(self, record: Record) -> tuple[Measured, int]:
        """The sizes that a prompt needs, whether or not they fit a bucket, and its number of question tokens.

        At most the sizes of images are read. Raises BadRecord where the record cannot be used.
        """
        example = self._maker.text(record, prompt=True)
        return measure(example, layout_spec(self.config, 1, 1, 1), self.latents), len(example.question_ids)

    def batch(self, examples: Sequence[Example], rows: int = 0) -> Batch:
        """Lays out one example a row in the smallest bucket that holds them all; empty rows fill up to `rows`."""
        spec = fit(examples, self.config, self.latents, self.buckets)
        filled = [[example] for example in examples] + [[]] * (rows - len(examples))
        # Without a crop there are no latents, so one program serves every l^2.
        return lay_out_rows(filled, spec, self.latents if spec.crops else 0)


def _system_in_question(record: Record) -> Record:
    """The record with its system text in front of its first question."""
    turns = list(record.turns)
    k = next(k for k, turn in enumerate(turns) if turn["from"] == "human")
    turns[k] = turns[k] | {"value": record.system + BETWEEN + turns[k]["value"]}
    return dataclasses.replace(record, turns=turns, system=None)


def drawn_latents(config: FusionConfig, seed: int) -> int:
    """l^2 drawn from the model's latent counts by the seed, as the published code does at inference."""
    return draw_latent_count(config.drawn_latent_counts, seed, 0)


def round_up(value: int, step: int) -> int:
    """The next multiple of `step`, at least one."""
    return -(-max(value, 1) // step) * step
