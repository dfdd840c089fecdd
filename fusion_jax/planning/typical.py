"""Builds the step to plan: the shapes of a typical batch of a stage, and its sizes without padding."""

from dataclasses import dataclass

import numpy as np

from fusion_jax.batch import Batch
from fusion_jax.config import RunConfig, StageConfig
from fusion_jax.data.typical import abstract_batch, typical_rows
from fusion_jax.devices import flops


@dataclass(frozen=True)
class TypicalStep:
    """A step of a stage at one l^2.

    Attributes:
      batch: shapes and dtypes of the whole global batch. shape: its sizes without padding, for `flops`. samples:
      conversations in this step.
    """

    batch: Batch
    shape: flops.BatchShape
    samples: int

    @property
    def tokens(self) -> int:
        """Positions in the LLM that are not padding."""
        return sum(self.shape.lengths)


def step(config: RunConfig, stage: StageConfig, shards: int, latent_count: int | None = None) -> TypicalStep:
    """Returns a typical step of a stage.

    Args:
      shards: parts that the rows are sharded into. latent_count: l^2; the largest by default, which takes most memory.

    Raises:
      UserError: the rows do not divide, or the model has no such l^2.
    """
    spec, sizes, rows, latent_count = typical_rows(config, stage, shards, latent_count)
    examples = [example for row in rows for example in row]
    return TypicalStep(
        batch=abstract_batch(spec, sizes, latent_count),
        shape=flops.shape_of_examples(examples, spec, latent_count),
        samples=len(examples),
    )


def mean_samples(config: RunConfig, stage: StageConfig, shards: int) -> float:
    """Returns the samples of a step on average over the l^2 that training draws from."""
    counts = config.model.drawn_latent_counts or (0,)
    return float(np.mean([sum(map(len, typical_rows(config, stage, shards, count)[2])) for count in counts]))
