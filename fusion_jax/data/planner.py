"""Plans the steps of a stage: which waiting records go into the next step, and when the stage is over.

    record -> measured -> waits -> Planner.next_step -> l^2, rows of records, K crops

Nothing here knows Grain, threads or images: training (data/loader.py) and the inspection plan their steps with it, and
so get the same ones. The caller passes a function that measures the next record in the stage's order.
"""

import dataclasses
import json
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from fusion_jax.config import StageConfig
from fusion_jax.data import plan
from fusion_jax.data.layout import LayoutSpec, Measured
from fusion_jax.data.plan import Sizes
from fusion_jax.errors import BadRecord, UserError

# A record as `ExampleLoader.measure` gives it: what it takes and how many last rounds it loses, or why it is bad.
Element = tuple[Measured, int] | BadRecord


@dataclass
class Counts:
    """Records read so far; how many were skipped, by reason; conversations that lost their last rounds, and those
    rounds. Gaps in rows are counted by the process that had to leave them."""

    seen: int = 0
    bad: dict[str, int] = field(default_factory=dict)
    shortened: int = 0
    dropped_rounds: int = 0

    def add(self, bad: BadRecord) -> None:
        self.bad[bad.reason] = self.bad.get(bad.reason, 0) + 1

    def plus(self, bad: dict[str, int]) -> "Counts":
        """Returns a copy with that many more bad records, or fewer, by reason."""
        both = {reason: self.bad.get(reason, 0) + bad.get(reason, 0) for reason in {**self.bad, **bad}}
        return dataclasses.replace(self, bad={reason: count for reason, count in both.items() if count})

    def scalars(self) -> dict[str, int]:
        """Returns the counts for the metrics."""
        named = {"records_seen": self.seen, "shortened": self.shortened, "dropped_rounds": self.dropped_rounds}
        return named | {f"bad/{reason}": count for reason, count in self.bad.items()}

    def too_many(self, allowed: float, records: int) -> bool:
        """Returns whether more than the allowed share is bad, of the records seen and of the whole data set."""
        return sum(self.bad.values()) > allowed * max(self.seen, records)

    def check(self, allowed: float, records: int) -> None:
        """Raises UserError if there are too many bad records."""
        if self.too_many(allowed, records):
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.bad.items()))
            raise UserError(
                f"{sum(self.bad.values())} of {self.seen} records are bad ({reasons}), more than "
                f"max_bad_records={allowed:g} allows; bad_records.jsonl in the workdir lists them."
            )


@dataclass(frozen=True)
class Step:
    """One planned step.

    Attributes:
      number: from 0. latents: l^2, 0 if all rows are text alone. rows: the records of each row. spec: the layout of
        its batch.
      bad: the bad records met since the step before.
      done: how much of the stage came before, in steps; if the stage counts epochs, in steps with the average number
        of samples. last: whether the stage ends with this step.
    """

    number: int
    latents: int
    rows: list[list[Measured]]
    spec: LayoutSpec
    bad: tuple[BadRecord, ...] = ()
    done: float = 0.0
    last: bool = False

    @property
    def crops(self) -> int:
        """K of a group, 0 if all rows are text alone."""
        return self.spec.crops


class Planner:
    """Plans the steps of a stage one after the other; the same in every process that reads the same elements.

    Attributes:
      step: number of the next step, from 0. waiting: measured records that wait for their step, oldest first.
      counts: counts of all records read. checksum: checksum of all steps planned since the start.
    """

    def __init__(
        self,
        stage: StageConfig,
        spec: LayoutSpec,
        sizes: Sizes,
        latent_counts: tuple[int, ...],
        seed: int,
        records: int,
        max_bad: float = 1.0,
    ):
        """Args: latent_counts: the l^2 that steps draw from; seed: the stage's; records: how many the stage's data
        have; max_bad: the share of bad records above which no more are read."""
        self.step, self.checksum = 0, 0
        self.waiting: list[Measured] = []
        self.counts = Counts()
        self._stage, self._spec, self._sizes = stage, spec, sizes
        self._latent_counts, self._seed = latent_counts, seed
        self._records, self._max_bad = records, max_bad
        self._to_read = records_to_read(stage, records)
        self._split = not spec.zero_image_for_text  # rows of text alone need no crop, and so steps of their own
        self._bad: list[BadRecord] = []  # met since the last step

    def is_over(self) -> bool:
        """Returns whether the last step has been planned."""
        return _is_over(self._stage, self._to_read, self.step, self.counts.seen, len(self.waiting))

    def next_step(self, read: Callable[[], Element]) -> Step | None:
        """Plans the next step; returns None if the stage is over, or nothing is left to read.

        Args:
          read: measures the next record. It is called as often as the step needs records to choose from, and once more
            if the next record decides whether this step is the last.
        """
        if self.is_over():
            return None
        self._read(read, self._missing)
        if not self.waiting and not self._bad:
            return None
        number, done = self.step, self._done()
        latents = draw_latent_count(self._latent_counts, self._seed, number)
        rows, spec = self._take(latents)
        latents = latents if spec.crops else 0  # rows of text alone use one program, whatever was drawn
        sizes = [latents, spec.length, spec.crops, spec.rounds, spec.question_length]
        self.checksum = zlib.crc32(json.dumps([sizes, rows]).encode(), self.checksum)
        if not self._stage.steps:
            self._read(read, lambda: 0 if self.waiting else 1)
        bad, self._bad = tuple(self._bad), []
        return Step(number, latents, rows, spec, bad, done, self.is_over())

    def replace_waiting(self, elements: Sequence[Element]) -> int:
        """Puts newly measured elements in place of the waiting records, in their order: their file may have been
        repaired since. Records that are bad by now are handed over with the next step. Returns how many are bad."""
        bad = [element for element in elements if isinstance(element, BadRecord)]
        self.waiting = [
            element[0]._replace(arrived=before.arrived)
            for before, element in zip(self.waiting, elements, strict=True)
            if not isinstance(element, BadRecord)
        ]
        for one in bad:
            self.counts.add(one)
        self._bad += bad
        return len(bad)

    def _read(self, read: Callable[[], Element], missing: Callable[[], int]) -> None:
        """Reads until nothing is missing, all is read, or too many records were bad. Nothing that differs between
        processes may decide when it ends.

        Args:
          missing: how many more records are needed at least.
        """
        bad_in_a_row = needed = 0
        while self.counts.seen < self._to_read and (needed := needed or missing()):
            element = read()
            self.counts.seen += 1
            if isinstance(element, BadRecord):
                self._bad.append(element)
                self.counts.add(element)
                bad_in_a_row += 1
                # A whole pass, wherever it began, had no good record, or too few: the caller decides what to do.
                if bad_in_a_row >= 2 * self._records or self.counts.too_many(self._max_bad, self._records):
                    break
            else:
                bad_in_a_row = 0
                needed -= 1
                measured, dropped = element
                self.waiting.append(measured._replace(arrived=self.step))
                self.counts.shortened += dropped > 0
                self.counts.dropped_rounds += dropped

    def _missing(self) -> int:
        return plan.missing(self.waiting, self._spec, self._sizes, self._split, self.step)

    def _take(self, latents: int) -> tuple[list[list[Measured]], LayoutSpec]:
        """Returns the records of every row of the next step, which wait no longer, and its layout."""
        planned = plan.plan(self.waiting, self._spec, self._sizes, latents, self._split, self.step)
        rows = [[self.waiting[i] for i in row] for row in planned.rows]
        chosen = {i for row in planned.rows for i in row}
        self.waiting = [measured for i, measured in enumerate(self.waiting) if i not in chosen]
        self.step += 1
        return rows, dataclasses.replace(self._sizes.spec(self._spec, planned.size, latents), crops=planned.crops)

    def _done(self) -> float:
        if self._stage.steps:
            return self.step
        return (self.counts.seen - len(self.waiting)) / self._sizes.samples


def draw_latent_count(counts: tuple[int, ...], seed: int, step: int) -> int:
    """Draws l^2 of a step: uniform over the set, a function of seed and step alone. 0 without latents."""
    return int(np.random.default_rng((seed, step)).choice(counts)) if counts else 0


def stage_steps(stage: StageConfig, records: int, samples: float) -> int:
    """Returns a stage's optimizer steps over that many records: `steps`, or as many as hold every record once per
    epoch, the last perhaps with fewer. It is an estimate if steps hold `samples` only on average (`Sizes`)."""
    return stage.steps or math.ceil(records * stage.epochs / samples)


def records_to_read(stage: StageConfig, records: int) -> int | float:
    """Returns how many records a stage reads, each counted once per epoch; infinite if the stage counts steps."""
    return math.inf if stage.steps else records * stage.epochs


def stage_is_over(stage: StageConfig, records: int, state: dict) -> bool:
    """Returns whether a state of `loader.training_batches`, over that many records, is after the stage's last step."""
    to_read = records_to_read(stage, records)
    return _is_over(stage, to_read, state["step"], state["counts"]["seen"], len(state["waiting"]))


def _is_over(stage: StageConfig, to_read: int | float, step: int, seen: int, waiting: int) -> bool:
    # After the last epoch nothing waits, unless an earlier version read beyond it.
    return step >= stage.steps if stage.steps else seen - waiting >= to_read
