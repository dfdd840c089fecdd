"""Opens the validation data of a stage: its first usable records, measured before anything is trained."""

import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fusion_jax.batch import Batch
from fusion_jax.config import RunConfig, StageConfig
from fusion_jax.data import sources
from fusion_jax.data.examples import ExampleLoader
from fusion_jax.data.layout import Measured
from fusion_jax.data.sources import RecordSource
from fusion_jax.data.stages import fixed_loader
from fusion_jax.data.tokenizer import Tokenizer
from fusion_jax.data.validation_batches import FixedBatch, first_records, fixed_batches, plan_all
from fusion_jax.devices import distributed
from fusion_jax.errors import BadRecord, UserError
from fusion_jax.training.jsonl import read_rows

log = logging.getLogger("fusion_jax")

_MARK = "validation"  # in bad_records.jsonl
# Fields of a stage that decide which records can be used, and how many.
SIZES = ("max_length", "max_question_length", "max_rounds", "max_images", "batch_size")


class NothingUsable(UserError):
    """No validation record can be used in a stage."""


@dataclass
class Validation:
    """The first usable records of the validation data, in the sizes of one stage.

    Attributes:
      records: measured records, in the order of the file; the same in every process.
      bad: records that cannot be used, judged by texts and headers of images; known to process 0 alone.
      broken: records that turned out to be bad in this process's rows, by number.
    """

    config: RunConfig
    stage: StageConfig
    loader: ExampleLoader
    records: list[Measured]
    bad: list[BadRecord]
    broken: dict[int, BadRecord] = field(default_factory=dict)

    def plan(self, shards: int) -> list[FixedBatch]:
        """Plans batches that hold all records; the last ones may not be full."""
        return plan_all(self.records, self.loader.spec, self.loader.longest_latents, self.stage, shards)

    def batches(self, planned: Sequence[FixedBatch], shards: int, held: Sequence[int]) -> Iterator[Batch]:
        """Yields this process's rows of the batches. Records that turn out to be bad are logged, each once."""
        for batch, bad in fixed_batches(self.loader, planned, self.config.loader_threads, shards, held):
            for number, error in bad.items():
                if number not in self.broken:
                    log.warning("%s: a validation record is left out (%s): %s", self.stage.name, error.reason, error)
            self.broken |= bad
            yield batch

    def list_bad(self, folder: Path, step: int) -> None:
        """Adds the bad records to `bad_records.jsonl`, unless it has them already."""
        path = folder / "bad_records.jsonl"
        rows = read_rows(path) if path.is_file() else []
        listed = {(row.get("where"), row.get("reason")) for row in rows if row.get("data") == _MARK}
        new = [bad for bad in (*self.bad, *self.broken.values()) if (bad.where, bad.reason) not in listed]
        rows = [{"step": step, "data": _MARK, "reason": b.reason, "where": b.where, "detail": b.detail} for b in new]
        try:
            if rows:
                with path.open("a") as file:
                    file.write("".join(json.dumps(row) + "\n" for row in rows))
        except OSError as error:
            log.warning("bad validation records are not listed: %s", error)


def open_data(config: RunConfig) -> RecordSource | None:
    """Opens the validation records; None if the config names none. Raises UserError as `sources.load_source` does."""
    if not config.validation_data:
        return None
    return sources.load_source(config.validation_data, config.validation_image_folder or None)


def measure(config: RunConfig, stage: StageConfig, source: RecordSource, tokenizer: Tokenizer) -> Validation:
    """Measures the first records for one stage, and logs how many cannot be used. A collective.

    Raises:
      NothingUsable: no record can be used.
    """
    loader = fixed_loader(config, stage, source, tokenizer)
    records: list[Measured] = []
    bad: list[BadRecord] = []
    if distributed.is_first():
        most = config.validation_batches
        records, bad = first_records(loader, stage.batch_size, most, config.loader_threads)
        # A header says little about its image: one image must be decoded now, the others when they are needed.
        while records and isinstance(loaded := loader.load_planned(records[0]), BadRecord):
            bad.append(loaded)
            del records[0]
    first = f"; the first: {bad[0]}" if bad else ""
    records, reasons, first = distributed.gather((records, Counter(error.reason for error in bad), first))[0]
    summary = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
    if not records:
        raise NothingUsable(
            f"None of the {sum(reasons.values())} records of validation_data {config.validation_data} can be used in "
            f"stage {stage.name!r} ({summary}{first}); repair them, or the stage's lengths, or set "
            "validation_image_folder."
        )
    if bad:
        log.warning(
            "%s: %d validation record(s) of the first %d cannot be used (%s%s); bad_records.jsonl in the workdir lists "
            "them",
            *(stage.name, sum(reasons.values()), sum(reasons.values()) + len(records), summary, first),
        )
    return Validation(config, stage, loader, [Measured(*record) for record in records], bad)
