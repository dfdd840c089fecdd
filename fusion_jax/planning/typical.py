"""Builds the step to plan: the shapes of a typical batch of a stage, and its sizes without padding."""

from collections import defaultdict
from dataclasses import dataclass

from fusion_jax.batch import Batch
from fusion_jax.config import RunConfig, StageConfig
from fusion_jax.data.typical import abstract_batch, typical_rows, typical_steps
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


def step(
    config: RunConfig, stage: StageConfig, shards: int, latent_count: int | None = None, largest: bool = False
) -> TypicalStep:
    """Returns a typical step of a stage.

    Args:
      shards: parts that the rows are sharded into. latent_count: l^2; the largest by default, which takes most memory.
      largest: a step of the largest size, which takes most memory of all; by default one of the smallest, of which
        there are most.

    Raises:
      UserError: the rows do not divide, or the model has no such l^2.
    """
    spec, sizes, rows, latent_count = typical_rows(config, stage, shards, latent_count, largest)
    examples = [example for row in rows for example in row]
    return TypicalStep(
        batch=abstract_batch(spec, sizes, latent_count),
        shape=flops.shape_of_examples(examples, spec, latent_count),
        samples=len(examples),
    )


@dataclass(frozen=True)
class Average:
    """What steps of a stage have on average, planned one after the other as training would.

    Attributes:
      samples: conversations of a step. padded: FLOPs with padding over those without. sizes: for each size of steps,
      (T, smallest R, largest R, share of the steps).
    """

    samples: float
    padded: float
    sizes: tuple[tuple[int, int, int, float], ...]


def average(config: RunConfig, stage: StageConfig, shards: int, steps: int = 40) -> Average:
    """Plans typical steps and averages over them, and so over the l^2 that training draws from."""
    samples, padded, needed, rounds = 0, 0.0, 0.0, defaultdict(list)
    for spec, sizes, examples, latent_count in typical_steps(config, stage, shards, steps):
        shape = flops.shape_of_examples(examples, spec, latent_count)
        batch = abstract_batch(spec, sizes, latent_count)
        samples += len(examples)
        needed += flops.step_flops(config.model, shape)
        padded += flops.step_flops(config.model, flops.padded_shape(batch, shape))
        rounds[spec.question_length].append(spec.rounds)
    sizes = tuple((length, min(r), max(r), len(r) / steps) for length, r in sorted(rounds.items()))
    return Average(samples / steps, padded / needed, sizes)
