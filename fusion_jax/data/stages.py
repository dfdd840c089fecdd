"""Opens what a stage reads: its seed, records, loader of examples and the sizes of its batches."""

import zlib

import numpy as np

from fusion_jax.config import RunConfig, StageConfig
from fusion_jax.data import sources
from fusion_jax.data.examples import ExampleLoader, ExampleMaker, layout_spec
from fusion_jax.data.layout import LayoutSpec, Measured
from fusion_jax.data.plan import Sizes, a_crop_each
from fusion_jax.data.sources import RecordSource
from fusion_jax.data.step_sizes import can_be_smaller, sizes_for
from fusion_jax.data.tokenizer import Tokenizer
from fusion_jax.errors import BadRecord, UserError
from fusion_jax.models.config import FusionConfig

_SAMPLE = 512  # records by which rows and crops of a batch are sized


def stage_seed(config: RunConfig, stage: StageConfig) -> int:
    """Returns the seed of a stage's data: two stages over the same data read them in different orders."""
    return (config.seed * 1_000_003 + zlib.crc32(stage.name.encode())) % 2**31


def open_source(config: RunConfig, stage: StageConfig) -> RecordSource:
    """Opens the stage's records. Raises UserError if the file is missing or holds nothing."""
    source = sources.load_source(stage.data, stage.image_folder or None, stage_seed(config, stage))
    if len(source) == 0:
        raise UserError(f"stage {stage.name!r}: {stage.data} has no records.")
    return source


def stage_spec(model: FusionConfig, stage: StageConfig) -> LayoutSpec:
    """Returns the fixed sizes of a stage's batches."""
    return layout_spec(model, stage.max_length, stage.max_question_length, stage.max_rounds, stage.max_images)


def stage_loader(config: RunConfig, stage: StageConfig, source: RecordSource, tokenizer: Tokenizer) -> ExampleLoader:
    """Returns the loader of the stage's examples, which must fit at the largest l^2: none depends on the draw."""
    maker = ExampleMaker(config.model, tokenizer, config.template, config.decode)
    longest = max(config.model.drawn_latent_counts, default=0)
    return ExampleLoader(source, maker, stage_spec(config.model, stage), longest)


def fixed_loader(config: RunConfig, stage: StageConfig, source: RecordSource, tokenizer: Tokenizer) -> ExampleLoader:
    """Returns the loader of validation's examples, at the model's fixed l^2 and with the stage's sizes."""
    maker = ExampleMaker(config.model, tokenizer, config.template, config.decode)
    return ExampleLoader(source, maker, stage_spec(config.model, stage), config.model.fixed_latent_count)


def stage_sizes(config: RunConfig, stage: StageConfig, loader: ExampleLoader, shards: int = 1) -> Sizes:
    """Returns the sizes of the stage's batches, by a sample of its records if those differ in crops or share rows.

    Args:
      shards: parts that the rows of a microbatch are sharded into.
    """
    model = config.model
    if stage.packing or stage.max_images > 1 or model.most_crops > 1 or can_be_smaller(loader.spec):
        sample = _measured_sample(loader, stage_seed(config, stage))
        return sizes_for(sample, loader.spec, model, stage, shards)
    return a_crop_each(stage.batch_size, model.drawn_latent_counts)


def _measured_sample(loader: ExampleLoader, seed: int) -> list[Measured]:
    """Measures some of the usable records."""
    records = len(loader.source)
    numbers = np.random.default_rng(seed).choice(records, min(records, _SAMPLE), replace=False)
    elements = [loader.measure(number) for number in numbers.tolist()]
    return [element[0] for element in elements if not isinstance(element, BadRecord)]
