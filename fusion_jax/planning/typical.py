"""The step to plan or to time: a typical batch of a stage, without any data.

Samples are those of `data.packing.Mix`; which of them share a row, and how many rows and crops a batch has, is decided
by the code that trains (`data.plan`). Planning needs the arrays' shapes alone.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass

import jax
import numpy as np

from fusion_jax.batch import Batch
from fusion_jax.config import RunConfig, StageConfig
from fusion_jax.data import layout, tiles
from fusion_jax.data.conversation import ANSWER_START, IGNORE, IMAGE, LATENTS
from fusion_jax.data.examples import layout_spec
from fusion_jax.data.layout import Example, LayoutSpec, Measured
from fusion_jax.data.packing import Mix
from fusion_jax.data.plan import WAITING_PACKED, Sizes, a_crop_each, plan, pool, size_batches
from fusion_jax.devices import flops
from fusion_jax.errors import check
from fusion_jax.models.config import FusionConfig

# (width, height) of images by share, for dynamic resolution: mostly camera formats.
IMAGE_SIZES = (((640, 480), 0.6), ((480, 640), 0.2), ((500, 500), 0.1), ((1280, 720), 0.1))


@dataclass(frozen=True)
class Sample:
    """What a typical conversation takes besides its `Measured`: question and supervised tokens; its image's tiling."""

    measured: Measured
    questions: int
    supervised: int
    tiling: tiles.Tiling | None


@dataclass(frozen=True)
class TypicalStep:
    """A step of a stage at one l^2.

    Attributes:
      batch: shapes and dtypes of the whole global batch. shape: what of it is real, for `flops`. samples: conversations
      in this step.
    """

    batch: Batch
    shape: flops.BatchShape
    samples: int

    @property
    def tokens(self) -> int:
        """Real positions in the LLM."""
        return sum(self.shape.lengths)


def draw(model: FusionConfig, stage: StageConfig, spec: LayoutSpec, count: int, seed: int = 0) -> list[Sample]:
    """Typical samples that fit the stage's limits; what is too long loses its last rounds, as in training."""
    rng = np.random.default_rng(seed)
    mix = Mix.draw(rng, count)
    shapes = rng.choice(len(IMAGE_SIZES), count, p=[share for _, share in IMAGE_SIZES])
    longest = max(model.drawn_latent_counts, default=0)
    found = []
    for i in range(count):
        pictured = bool(mix.has_image[i])
        tiling = None
        if pictured:
            tiling = tiles.WHOLE
            if model.tile_grids:
                tiling = tiles.choose_tiling(IMAGE_SIZES[shapes[i]][0], model.tile_grids, model.vision.image_size)
        latents = model.semantic_exchange and (pictured or spec.zero_image_for_text)
        visual = spec.tokens_of(tiling) if tiling else 0
        for rounds in range(int(mix.rounds[i]), 0, -1):
            asked, answered = int(mix.questions[i, :rounds].sum()), int(mix.answers[i, :rounds].sum())
            length = visual + asked + answered
            slots = rounds * latents
            guiding = asked if tiling and model.text_guided else 0
            if length + slots * longest <= spec.length and guiding <= spec.question_length and slots <= spec.rounds:
                crops = tiling.crops if tiling else int(spec.zero_image_for_text)
                found.append(Sample(Measured(i, length, crops, slots), guiding, answered, tiling))
                break
    check(bool(found), f"stage {stage.name!r}: no typical sample fits max_length={stage.max_length}.")
    return found


def step(config: RunConfig, stage: StageConfig, shards: int, latent_count: int | None = None) -> TypicalStep:
    """A typical step of a stage.

    Args:
      shards: parts that the rows are dealt over. latent_count: l^2; the largest by default, which takes most memory.

    Raises:
      UserError: the rows do not divide.
    """
    spec, sizes, rows, latent_count = _rows(config, stage, shards, latent_count)
    return TypicalStep(
        batch=abstract_batch(spec, sizes, latent_count),
        shape=_shape(config.model, spec, rows, latent_count),
        samples=sum(map(len, rows)),
    )


def random_batch(
    config: RunConfig, stage: StageConfig, shards: int, latent_count: int | None = None, seed: int = 0
) -> tuple[Batch, int]:
    """The batch of `step` with random tokens and pixels, to be timed, and its samples."""
    spec, sizes, rows, latent_count = _rows(config, stage, shards, latent_count)
    rng, size = np.random.default_rng(seed), config.model.vision.image_size
    pixels = rng.integers(0, 256, (spec.quadrants + 1, size, size, 3), np.uint8)
    examples = [[_random_example(rng, config.model, spec, sample, pixels) for sample in row] for row in rows]
    return layout.lay_out_rows(examples, spec, latent_count, sizes.groups), sum(map(len, rows))


def _random_example(
    rng: np.random.Generator, model: FusionConfig, spec: LayoutSpec, sample: Sample, pixels: np.ndarray
) -> Example:
    takes, tiling = sample.measured, sample.tiling
    rounds = max(takes.rounds, 1)
    asked = takes.length - sample.supervised - (spec.tokens_of(tiling) if tiling else 0)

    def words(count: int) -> np.ndarray:
        return rng.integers(3, model.llm.vocab_size, count)

    def share(count: int, r: int) -> int:
        return count // rounds + (r < count % rounds)

    ids, labels = [], []
    for r in range(rounds):
        places = [LATENTS] * (takes.rounds > 0) + [IMAGE] * (tiling is not None and r == 0)
        answer = words(share(sample.supervised, r))
        prompt = np.append(places, words(share(asked, r)))
        ids += [prompt, answer]
        labels += [np.full(len(prompt) - 1, IGNORE), [ANSWER_START], answer]
    return Example(
        input_ids=np.concatenate(ids).astype(np.int32),
        labels=np.concatenate(labels).astype(np.int32),
        question_ids=words(sample.questions).astype(np.int32),
        crops=np.broadcast_to(pixels, (tiling.crops, *pixels.shape)) if tiling else None,
        tilings=(tiling,) if tiling and tiling.rows else (),
    )


def _rows(
    config: RunConfig, stage: StageConfig, shards: int, latent_count: int | None
) -> tuple[LayoutSpec, Sizes, list[list[Sample]], int]:
    """The layout with its crops, the sizes, the samples of each row, and l^2."""
    model = config.model
    spec = layout_spec(model, stage.max_length, stage.max_question_length, stage.max_rounds, stage.max_images)
    counts = model.drawn_latent_counts
    latent_count = (max(counts) if counts else 0) if latent_count is None else latent_count
    check(
        not latent_count or latent_count in counts,
        f"l^2={latent_count} is none of the model's {', '.join(map(str, counts))}.",
    )
    waiting = draw(model, stage, spec, max(WAITING_PACKED * stage.batch_size, 512))
    measured = [sample.measured for sample in waiting]
    if not stage.packing and stage.max_images == 1 and model.most_crops == 1:
        sizes = a_crop_each(stage.batch_size, counts)
    else:
        groups = shards * stage.accumulation
        sizes = size_batches(
            measured[:512], spec, stage.batch_size, groups, counts, stage.max_images * model.most_crops, stage.packing
        )
    check(
        sizes.rows % (shards * stage.accumulation) == 0,
        f"stage {stage.name!r}: {sizes.rows} rows in {stage.accumulation} microbatch(es) do not divide over the "
        f"{shards} devices that share rows; change batch_size, accumulation or the mesh.",
    )
    if sizes.samples > 1.1 * stage.batch_size:  # so many devices that a step holds more: it is chosen from more
        waiting = draw(model, stage, spec, math.ceil(pool(sizes)))
        measured = [sample.measured for sample in waiting]
    planned = plan(measured, spec, sizes, latent_count, not spec.zero_image_for_text)
    chosen = [[waiting[i] for i in row] for row in planned.rows]
    spec = dataclasses.replace(spec, crops=planned.crops)
    return spec, sizes, chosen, latent_count


def mean_samples(config: RunConfig, stage: StageConfig, shards: int) -> float:
    """Samples of a step on average over the l^2 that training draws from."""
    counts = config.model.drawn_latent_counts or (0,)
    return float(np.mean([step(config, stage, shards, count).samples for count in counts]))


def abstract_batch(spec: LayoutSpec, sizes: Sizes, latent_count: int) -> Batch:
    """Shapes and dtypes of a batch of these rows and groups, as `layout.lay_out_rows` would make it."""
    one = layout.lay_out_rows([[]], spec, latent_count)
    shared = ("crops", "crop_kind", "quadrants", "crop_text", "crop_text_mask")

    def wide(name: str, x: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((sizes.groups if name in shared else sizes.rows, *x.shape[1:]), x.dtype)

    arrays = {f.name: getattr(one, f.name) for f in dataclasses.fields(Batch) if f.name != "latent_count"}
    return Batch(**{name: wide(name, x) for name, x in arrays.items()}, latent_count=latent_count)


@functools.cache
def _window_tokens(spec: LayoutSpec, tiling: tiles.Tiling, latent_count: int) -> int:
    """Tokens that the windows of one round's latents hold together."""
    return int((layout.round_windows(0, tiling, spec, latent_count) >= 0).sum())


def _shape(model: FusionConfig, spec: LayoutSpec, rows: list[list[Sample]], latent_count: int) -> flops.BatchShape:
    samples = [sample for row in rows for sample in row]
    return flops.BatchShape(
        lengths=tuple(s.measured.length + s.measured.rounds * latent_count for s in samples),
        crops=tuple(s.questions for s in samples for _ in range(s.measured.crops)),
        plain=sum(s.measured.crops for s in samples) * spec.quadrants,
        supervised=sum(s.supervised for s in samples),
        rounds=sum(s.measured.rounds for s in samples),
        latent_count=latent_count,
        windows=sum(
            s.measured.rounds * _window_tokens(spec, s.tiling or tiles.WHOLE, latent_count)
            for s in samples
            if latent_count and s.measured.rounds
        ),
    )
