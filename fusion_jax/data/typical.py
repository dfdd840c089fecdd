"""Creates conversations of fixed sizes and typical batches of a stage, for plans and benchmarks.

No data is read. The sizes are those of `packing.Mix`; which conversations share a row, and how many rows and crops a
batch has, is decided by the code that trains (`data.plan`). Plans need the arrays' shapes alone.
"""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from fusion_jax.batch import Batch
from fusion_jax.config import RunConfig, StageConfig
from fusion_jax.data import layout, tiles
from fusion_jax.data.conversation import ANSWER_START, IGNORE, IMAGE, LATENTS
from fusion_jax.data.examples import layout_spec
from fusion_jax.data.layout import Example, LayoutSpec, Measured
from fusion_jax.data.packing import Mix
from fusion_jax.data.plan import PATIENCE_LARGE, WAITING_PACKED, Sizes, plan, pool
from fusion_jax.data.planner import Planner
from fusion_jax.data.step_sizes import sizes_for
from fusion_jax.errors import BadRecord, check
from fusion_jax.models.config import FusionConfig

# (width, height) of images by share, for dynamic resolution: mostly camera formats.
IMAGE_SIZES = (((640, 480), 0.6), ((480, 640), 0.2), ((500, 500), 0.1), ((1280, 720), 0.1))
_DRAWN = 8192  # conversations of which many steps consist, again and again
_FIRST_WORD = 3  # token ids below it are special


def conversation(
    prompts: Sequence[int], answers: Sequence[int], guiding: int, tiling: tiles.Tiling | None, latents: bool
) -> Example:
    """Creates a conversation of these sizes, without pixels, whose words are all the same.

    Args:
      prompts: text tokens of each round before its answer. answers: supervised tokens of each round; empty for a
        prompt that waits for its answer.
      guiding: question tokens that guide the encoder.
      tiling: how its image, which is in the first round, is cut; None without an image.
      latents: whether each round has latents.
    """
    ids, labels = [], []
    for r, prompt in enumerate(prompts):
        visual = [LATENTS] * latents + [IMAGE] * (tiling is not None and r == 0)
        answer = answers[r] if answers else 0
        ids += [np.array(visual, np.int32), np.full(prompt + answer, _FIRST_WORD, np.int32)]
        labels += [np.full(len(visual) + prompt - 1, IGNORE, np.int32), np.array([ANSWER_START], np.int32)]
        labels += [np.full(answer, _FIRST_WORD, np.int32)]
    return Example(
        input_ids=np.concatenate(ids),
        labels=np.concatenate(labels) if answers else None,
        question_ids=np.full(guiding, _FIRST_WORD, np.int32),
        crops=None,
        where="a made-up conversation",
        tilings=(tiling,) if tiling and tiling.rows else (),
    )


def with_random_contents(
    example: Example, model: FusionConfig, rng: np.random.Generator, pixels: np.ndarray
) -> Example:
    """Returns the example with random words, and with `pixels`, (1 or 5, H, W, 3) uint8, as each of its crops."""

    def words(like: np.ndarray) -> np.ndarray:
        return rng.integers(_FIRST_WORD, model.llm.vocab_size, len(like), np.int32)

    ids, labels = example.input_ids, example.labels
    ids = np.where(ids >= 0, words(ids), ids)
    images = int((ids == IMAGE).sum())
    crops = sum(tiling.crops for tiling in example.tilings) or images
    return dataclasses.replace(
        example,
        input_ids=ids,
        labels=None if labels is None else np.where(labels >= 0, ids, labels),
        question_ids=words(example.question_ids),
        crops=np.broadcast_to(pixels, (crops, *pixels.shape)) if images else None,
    )


def random_pixels(model: FusionConfig, quadrants: int, rng: np.random.Generator) -> np.ndarray:
    """Draws the views of one crop: (quadrants + 1, H, W, 3) uint8."""
    size = model.vision.image_size
    return rng.integers(0, 256, (quadrants + 1, size, size, 3), np.uint8)


def draw(model: FusionConfig, stage: StageConfig, spec: LayoutSpec, count: int, seed: int = 0) -> list[Example]:
    """Draws typical conversations within the stage's limits; too long ones lose their last rounds, as in training.

    Raises:
      UserError: none fits.
    """
    rng = np.random.default_rng(seed)
    mix = Mix.draw(rng, count)
    shapes = rng.choice(len(IMAGE_SIZES), count, p=[share for _, share in IMAGE_SIZES])
    longest = max(model.drawn_latent_counts, default=0)
    drawn = []
    for i in range(count):
        tiling = None
        if mix.has_image[i]:
            tiling = tiles.WHOLE
            if model.tile_grids:
                tiling = tiles.choose_tiling(IMAGE_SIZES[shapes[i]][0], model.tile_grids, model.vision.image_size)
        latents = model.semantic_exchange and (tiling is not None or spec.zero_image_for_text)
        for rounds in range(int(mix.rounds[i]), 0, -1):
            questions, answers = mix.questions[i, :rounds].tolist(), mix.answers[i, :rounds].tolist()
            guiding = sum(questions) if tiling and model.text_guided else 0
            example = conversation(questions, answers, guiding, tiling, latents)
            with contextlib.suppress(BadRecord):
                layout.check_fits(example, spec, longest)
                drawn.append(example)
                break
    check(bool(drawn), f"stage {stage.name!r}: no typical conversation fits max_length={stage.max_length}.")
    return drawn


def _measured(examples: Sequence[Example], spec: LayoutSpec) -> list[Measured]:
    return [layout.measure(example, spec, 0, i) for i, example in enumerate(examples)]


def typical_rows(
    config: RunConfig, stage: StageConfig, shards: int, latent_count: int | None = None, largest: bool = False
) -> tuple[LayoutSpec, Sizes, list[list[Example]], int]:
    """Plans a typical step of a stage, before it is laid out.

    Args:
      shards: parts that the rows are sharded into. latent_count: l^2; by default the largest. largest: a step of the
        largest size, which may be rare, filled with usual conversations; by default one of the smallest.

    Returns:
      (the layout with its number of crops, the sizes of batches, the conversations of each row, l^2).

    Raises:
      UserError: the rows do not divide, or the model has no such l^2.
    """
    model = config.model
    spec = layout_spec(model, stage.max_length, stage.max_question_length, stage.max_rounds, stage.max_images)
    counts = model.drawn_latent_counts
    latent_count = (max(counts) if counts else 0) if latent_count is None else latent_count
    check(
        not latent_count or latent_count in counts,
        f"l^2={latent_count} is not one of the model's {', '.join(map(str, counts))}.",
    )
    waiting = draw(model, stage, spec, max(WAITING_PACKED * stage.batch_size, 512))
    measured = _measured(waiting, spec)
    sizes = sizes_for(measured[:512], spec, model, stage, shards)
    check(
        sizes.rows % (shards * stage.accumulation) == 0,
        f"stage {stage.name!r}: {sizes.rows} rows in {stage.accumulation} microbatch(es) do not divide over the "
        f"{shards} devices that share rows; change batch_size, accumulation or the mesh.",
    )
    if sizes.samples > 1.1 * stage.batch_size:  # with so many devices a step holds more, and is chosen from more
        waiting = draw(model, stage, spec, math.ceil(pool(sizes)))
        measured = _measured(waiting, spec)
    if largest:
        sizes = dataclasses.replace(sizes, smaller=())
    of_size = [one for one in measured if sizes.of(one) == 0]  # those that wait for steps of other sizes are left out
    planned = plan(of_size, spec, sizes, latent_count, not spec.zero_image_for_text)
    rows = [[waiting[of_size[i].number] for i in row] for row in planned.rows]
    fitted = dataclasses.replace(sizes.spec(spec, planned.size, latent_count), crops=planned.crops)
    return fitted, sizes, rows, latent_count


def typical_steps(
    config: RunConfig, stage: StageConfig, shards: int, steps: int
) -> Iterator[tuple[LayoutSpec, Sizes, list[Example], int]]:
    """Plans many typical steps one after the other, as training would, after as many as records may wait for.

    Args:
      shards: parts that the rows are sharded into.

    Yields:
      (the step's layout with its number of crops, the sizes of batches, its conversations, l^2).
    """
    model = config.model
    spec = layout_spec(model, stage.max_length, stage.max_question_length, stage.max_rounds, stage.max_images)
    examples = draw(model, stage, spec, _DRAWN)
    measured = _measured(examples, spec)
    sizes = sizes_for(measured[:512], spec, model, stage, shards)
    endless = dataclasses.replace(stage, steps=PATIENCE_LARGE + steps)
    planner = Planner(endless, spec, sizes, model.drawn_latent_counts, config.seed, len(examples))
    records = itertools.cycle(measured)
    while step := planner.next_step(lambda: (next(records), 0)):
        if step.number >= PATIENCE_LARGE:
            chosen = [examples[measured.number] for row in step.rows for measured in row]
            yield step.spec, sizes, chosen, step.latents


def random_batch(
    config: RunConfig, stage: StageConfig, shards: int, latent_count: int | None = None, seed: int = 0
) -> tuple[Batch, int]:
    """Draws a typical batch of a stage with random tokens and pixels; also returns the number of its conversations."""
    spec, sizes, rows, latent_count = typical_rows(config, stage, shards, latent_count)
    rng = np.random.default_rng(seed)
    pixels = random_pixels(config.model, spec.quadrants, rng)
    examples = [[with_random_contents(example, config.model, rng, pixels) for example in row] for row in rows]
    return layout.lay_out_rows(examples, spec, latent_count, sizes.groups), sum(map(len, rows))


def abstract_batch(spec: LayoutSpec, sizes: Sizes, latent_count: int) -> Batch:
    """Returns the shapes and dtypes of a batch of these rows and groups, as `layout.lay_out_rows` would create it."""
    one = layout.lay_out_rows([[]], spec, latent_count)
    shared = ("crops", "crop_kind", "quadrants", "crop_text", "crop_text_mask")

    def wide(name: str, x: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((sizes.groups if name in shared else sizes.rows, *x.shape[1:]), x.dtype)

    arrays = {f.name: getattr(one, f.name) for f in dataclasses.fields(Batch) if f.name != "latent_count"}
    return Batch(**{name: wide(name, x) for name, x in arrays.items()}, latent_count=latent_count)
