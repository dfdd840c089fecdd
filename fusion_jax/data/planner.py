"""Of a stage as a whole: its seed, its steps, the sizes of its batches, what was read and what was bad."""

import dataclasses
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fusion_jax.config import RunConfig, StageConfig
from fusion_jax.data import sources
from fusion_jax.data.examples import Loader
from fusion_jax.data.plan import Measured, Sizes, a_crop_each, size_batches
from fusion_jax.data.sources import RecordSource
from fusion_jax.errors import BadRecord, UserError

_SAMPLE = 512  # records by which rows and crops of a batch are sized


@dataclass
class Counts:
    """Records looked at so far; how many were skipped, by reason; conversations that lost their last rounds, and those
    rounds. Gaps in rows are counted by the process that had to leave them."""

    seen: int = 0
    bad: dict[str, int] = field(default_factory=dict)
    shortened: int = 0
    dropped_rounds: int = 0

    def add(self, bad: BadRecord) -> None:
        self.bad[bad.reason] = self.bad.get(bad.reason, 0) + 1

    def plus(self, bad: dict[str, int]) -> "Counts":
        """A copy with so many more bad records, or fewer, by reason."""
        both = {reason: self.bad.get(reason, 0) + bad.get(reason, 0) for reason in {**self.bad, **bad}}
        return dataclasses.replace(self, bad={reason: count for reason, count in both.items() if count})

    def scalars(self) -> dict[str, int]:
        """For the metrics."""
        named = {"records_seen": self.seen, "shortened": self.shortened, "dropped_rounds": self.dropped_rounds}
        return named | {f"bad/{reason}": count for reason, count in self.bad.items()}

    def too_many(self, allowed: float, records: int) -> bool:
        """Whether more than the allowed share is bad, of the records seen and of the whole data set."""
        return sum(self.bad.values()) > allowed * max(self.seen, records)

    def check(self, allowed: float, records: int) -> None:
        """UserError where there are too many bad records."""
        if self.too_many(allowed, records):
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.bad.items()))
            raise UserError(
                f"{sum(self.bad.values())} of {self.seen} records are bad ({reasons}), more than "
                f"max_bad_records={allowed:g} allows; bad_records.jsonl in the workdir lists them."
            )


def sample_records(loader: Loader, seed: int, count: int = _SAMPLE) -> list[Measured]:
    """Some of the usable records, measured."""
    records = len(loader.source)
    numbers = np.random.default_rng(seed).choice(records, min(records, count), replace=False)
    measured = [loader.measure(number) for number in numbers.tolist()]
    return [element[0] for element in measured if not isinstance(element, BadRecord)]


def stage_sizes(config: RunConfig, stage: StageConfig, loader: Loader, shards: int = 1) -> Sizes:
    """The sizes of the stage's batches; `shards`: parts that the rows of a microbatch are sharded into."""
    model = config.model
    if not stage.packing and stage.max_images == 1 and model.most_crops == 1:
        return a_crop_each(stage.batch_size, model.drawn_latent_counts)
    return size_batches(
        sample_records(loader, stage_seed(config, stage)),
        loader.spec,
        stage.batch_size,
        shards * stage.accumulation,
        model.drawn_latent_counts,
        stage.max_images * model.most_crops,
        stage.packing,
    )


def draw_latent_count(counts: tuple[int, ...], seed: int, step: int) -> int:
    """l^2 of a step: uniform over the set, a function of seed and step alone. 0 without latents."""
    return int(np.random.default_rng((seed, step)).choice(counts)) if counts else 0


def stage_seed(config: RunConfig, stage: StageConfig) -> int:
    """Stages differ in their order of data even where they share it."""
    return (config.seed * 1_000_003 + zlib.crc32(stage.name.encode())) % 2**31


def stage_steps(stage: StageConfig, records: int, samples: float) -> int:
    """Optimizer steps of a stage over so many records: `steps`, or as many as hold every record once an epoch, the last
    of which may hold fewer than the others. An estimate where steps hold so many `samples` on average (`Sizes`)."""
    return stage.steps or math.ceil(records * stage.epochs / samples)


def records_to_read(stage: StageConfig, records: int) -> int | float:
    """Records that a stage reads, a record counting once an epoch; without end where steps are counted."""
    return math.inf if stage.steps else records * stage.epochs


def stage_is_over(stage: StageConfig, records: int, state: dict) -> bool:
    """Whether a state of `training_batches`, over so many records, is that behind the stage's last step."""
    in_all = records_to_read(stage, records)
    return is_over(stage, in_all, state["step"], state["counts"]["seen"], len(state["waiting"]))


def is_over(stage: StageConfig, in_all: int | float, step: int, seen: int, waiting: int) -> bool:
    # Behind the last epoch nothing waits, but where an earlier version has read beyond it.
    return step >= stage.steps if stage.steps else seen - waiting >= in_all


def groups_of(held: Sequence[int], per_shard: int) -> tuple[int, ...]:
    """Numbers of the groups, or rows, that lie on some shards."""
    return tuple(shard * per_shard + i for shard in held for i in range(per_shard))


def open_source(config: RunConfig, stage: StageConfig) -> RecordSource:
    """The stage's records. UserError where the file is missing or holds nothing."""
    source = sources.load_source(stage.data, stage.image_folder or None, stage_seed(config, stage))
    if len(source) == 0:
        raise UserError(f"stage {stage.name!r}: {stage.data} has no records.")
    return source
