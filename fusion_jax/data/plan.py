"""Decides which waiting records go into which rows of a step, before any image is read.

    waiting   records in their shuffled order, each measured by its text (and its images' sizes)
    units     what becomes a row: one record, or with packing the records of a best fit
    groups    rows of one device and microbatch; they share a table of K crops, so units are assigned by crops too

Everything is a function of the waiting records, the step's number and l^2, so that every process draws the same plan
and reads only the images of its own groups.

Without packing, rows of text alone and rows with images go into separate steps while there are enough of one kind. A
record that has waited for `PATIENCE` steps waits no longer, nor does any once all are read. Here a step has two rows,
t is text alone, i has an image:

    step    waiting, oldest first       goes
    0       i i                         i i
    1       t i i                       i i         the text waits for another text
    ...
    5       t i i                       t i         it has waited long enough: a step of both kinds

With packing, rows that are nearly full go first, but rows with a record that has waited for `PATIENCE_PACKED` steps go
before them.

Most questions are short, and most rows hold few rounds. A stage may have smaller sizes of steps, each with its own
question length, rounds and crops (data/step_sizes.py). A record belongs to the smallest that it fits. Those of a larger
size wait until they fill a step, or one of them has waited for `PATIENCE_LARGE` steps and takes others along.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fusion_jax.data import packing
from fusion_jax.data.layout import LayoutSpec, Measured

# How many steps' records a step chooses from if rows are packed, and if only the crops must fit.
WAITING_PACKED, WAITING = 4, 2
# How many steps a record waits for others of its kind, and with packing for others that fill its row.
PATIENCE, PATIENCE_PACKED = 4, 8
# How many steps a record of a larger size waits for others of its size, and how many steps' records then wait.
PATIENCE_LARGE, WAITING_LARGE = 64, 1.25


@dataclass(frozen=True)
class StepSize:
    """A size of steps smaller than the layout's own.

    Attributes:
      question_length: T. rounds: R of a row at each l^2. crops: K of a group at each l^2.
    """

    question_length: int
    rounds: Mapping[int, int]
    crops: Mapping[int, int]

    def holds(self, measured: Measured) -> bool:
        """Returns whether a record fits at any l^2."""
        return measured.question <= self.question_length and measured.rounds <= min(self.rounds.values())


@dataclass(frozen=True)
class Sizes:
    """The sizes of a stage's batches.

    Attributes:
      rows: rows per step. groups: groups per step, a divisor of the rows. crops: K of a group at each l^2: with fewer
        latents more records share a row. packing: whether records share rows. samples: records per step on average.
      smaller: smaller sizes of steps, ascending; a record that none of them holds goes into steps of the layout's own
        question length and rounds, with `crops`. length: S, positions of a row; 0: the layout's own.
    """

    rows: int
    groups: int
    crops: Mapping[int, int]
    packing: bool
    samples: float
    smaller: tuple[StepSize, ...] = ()
    length: int = 0

    def of(self, measured: Measured) -> int:
        """Returns the place of the smallest size that holds a record: `len(smaller)` is the layout's own."""
        return next((i for i, size in enumerate(self.smaller) if size.holds(measured)), len(self.smaller))

    def spec(self, spec: LayoutSpec, size: int, latents: int) -> LayoutSpec:
        """Returns the layout of a step of a size (see `of`) at an l^2, with its S, K, R and T."""
        length = self.length or spec.length
        if size == len(self.smaller):
            rounds = math.ceil(spec.rounds * length / spec.length)
            return dataclasses.replace(spec, length=length, crops=self.crops[latents], rounds=rounds)
        one = self.smaller[size]
        return dataclasses.replace(
            spec,
            length=length,
            crops=one.crops[latents],
            rounds=one.rounds[latents],
            question_length=one.question_length,
        )

    @property
    def rows_per_group(self) -> int:
        return self.rows // self.groups


@dataclass(frozen=True)
class Plan:
    """The rows of one step: for each the indices of its records in the waiting list; K, 0 for rows of text alone; and
    the place of its size in `Sizes.smaller`, or the number of these for the layout's own."""

    rows: list[list[int]]
    crops: int
    size: int = 0


def units(waiting: Sequence[Measured], spec: LayoutSpec, packing_: bool, latents: int) -> list[list[int]]:
    """Returns indices of waiting records that share a row, rows in the order in which they should go.

    Args:
      spec: the layout of the step, whose rounds and crops a row must not exceed.
    """
    if not packing_:
        return [[i] for i in range(len(waiting))]
    lengths = [m.length + m.rounds * latents for m in waiting]
    others = [([m.crops for m in waiting], spec.crops), ([m.rounds for m in waiting], spec.rounds)]
    return packing.preferred(packing.best_fit(lengths, spec.length, others), lengths, spec.length)


def pool(sizes: Sizes) -> float:
    """Returns how many records a step chooses from, if it matters which of them share a row or its crops."""
    if sizes.packing:
        return WAITING_PACKED * sizes.samples
    return WAITING * sizes.rows


def missing(waiting: Sequence[Measured], spec: LayoutSpec, sizes: Sizes, split: bool, step: int = 0) -> int:
    """Returns how many more records must be read at least before a step can be planned; 0 if one can be planned.

    Args:
      split: rows of text alone are kept apart from rows with images. step: its number, from 0.
    """
    by_size = _by_size(waiting, sizes)
    if any(_fill(larger, spec, sizes, min(sizes.crops)) >= WAITING_LARGE for larger in by_size[1:]):
        return 0
    common = by_size[0]
    if sizes.packing:
        return max(0, math.ceil(pool(sizes) - len(common)))
    with_images = sum(m.crops > 0 for m in common)
    crops = sizes.smaller[0].crops if sizes.smaller else sizes.crops
    most = sizes.rows_per_group * max((m.crops for m in common), default=0)
    wanted = sizes.rows if min(crops.values()) >= most else pool(sizes)
    if split and not _late(common, step):
        return max(0, wanted - max(with_images, len(common) - with_images))
    return max(0, wanted - len(common))


def _by_size(waiting: Sequence[Measured], sizes: Sizes) -> list[list[Measured]]:
    """Returns the records of each size, the smallest first, in their order."""
    by_size: list[list[Measured]] = [[] for _ in range(len(sizes.smaller) + 1)]
    for measured in waiting:
        by_size[sizes.of(measured)].append(measured)
    return by_size


def _fill(records: Sequence[Measured], spec: LayoutSpec, sizes: Sizes, latents: int) -> float:
    """Returns how many steps the records would fill, if their rows had no gaps."""
    if not sizes.packing:
        return len(records) / sizes.rows
    return sum(m.length + m.rounds * latents for m in records) / (sizes.rows * (sizes.length or spec.length))


def _late(waiting: Sequence[Measured], step: int, patience: int = PATIENCE) -> bool:
    return bool(waiting) and step - waiting[0].arrived >= patience


def _next_size(waiting: Sequence[Measured], spec: LayoutSpec, sizes: Sizes, latents: int, step: int) -> int:
    """Returns the size of the next step: the largest of which enough records wait, or one for too long; the smallest
    if its records fill a step; else, at the end of the data, the largest that a record needs."""
    by_size = _by_size(waiting, sizes)
    for size in range(len(sizes.smaller), 0, -1):
        enough = _fill(by_size[size], spec, sizes, min(sizes.crops)) >= WAITING_LARGE
        if enough or _late(by_size[size], step, PATIENCE_LARGE):
            return size
    if _fill(by_size[0], spec, sizes, latents) >= 1:
        return 0
    return max((size for size, records in enumerate(by_size) if records), default=0)


def plan(waiting: Sequence[Measured], spec: LayoutSpec, sizes: Sizes, latents: int, split: bool, step: int = 0) -> Plan:
    """Plans the rows of one step, with the record that has waited longest unless a step of the other kind is full, or
    of another size. Rows may stay empty if nothing fits, or too few records wait.

    Args:
      latents: l^2. split, step: see `missing`; a step of text alone costs no encoder.
    """
    size = _next_size(waiting, spec, sizes, latents, step)
    fitted = sizes.spec(spec, size, latents)
    crops = fitted.crops
    of = [sizes.of(measured) for measured in waiting]
    # Text alone suits every size, and fills the gaps in rows.
    suitable = [i for i, one in enumerate(of) if one == size or (one < size and not waiting[i].crops)]
    ready = _units_of(suitable, waiting, fitted, sizes, latents, step)
    if sum(any(of[i] == size for i in unit) for unit in ready) < sizes.rows and size:  # smaller ones fill the step
        ready = _units_of([i for i, one in enumerate(of) if one <= size], waiting, fitted, sizes, latents, step)
    if size:
        ready.sort(key=lambda unit: all(of[i] < size for i in unit))
    elif split and not sizes.packing:
        text = [unit for unit in ready if waiting[unit[0]].crops == 0]
        with_images = [unit for unit in ready if waiting[unit[0]].crops > 0]
        oldest, other = (text, with_images) if text and text[0] == ready[0] else (with_images, text)
        if len(oldest) >= sizes.rows:
            ready = oldest
        elif len(other) >= sizes.rows and not _late([waiting[oldest[0][0]]] if oldest else [], step):
            ready = other
        else:
            ready = oldest + other
        if all(waiting[unit[0]].crops == 0 for unit in ready):
            crops, size = 0, len(sizes.smaller)
    costs = [sum(waiting[i].crops for i in unit) for unit in ready]
    return Plan(assign_to_groups(ready, costs, sizes, crops), crops, size)


def _units_of(
    places: Sequence[int], waiting: Sequence[Measured], spec: LayoutSpec, sizes: Sizes, latents: int, step: int
) -> list[list[int]]:
    """Returns the `units` of some of the waiting records; with packing those that have waited for long go first."""
    ready = units([waiting[i] for i in places], spec, sizes.packing, latents)
    ready = [[places[i] for i in unit] for unit in ready]
    if sizes.packing:
        ready.sort(key=lambda unit: all(step - waiting[i].arrived < PATIENCE_PACKED for i in unit))
    return ready


def assign_to_groups(ready: Sequence[list[int]], costs: Sequence[int], sizes: Sizes, crops: int) -> list[list[int]]:
    """Returns rows by group: each unit goes to the group whose free crops per free row are closest to its own crops.

    Args:
      ready: units in the order in which they should go. costs: crops of each. crops: K.
    """
    groups: list[list[list[int]]] = [[] for _ in range(sizes.groups)]
    left = [crops] * sizes.groups
    for unit, cost in zip(ready, costs):
        open_ = [g for g in range(sizes.groups) if len(groups[g]) < sizes.rows_per_group and left[g] >= cost]
        if not open_:
            if all(len(group) == sizes.rows_per_group for group in groups):
                break
            continue
        best = min(open_, key=lambda g: abs(left[g] / (sizes.rows_per_group - len(groups[g])) - cost))
        groups[best].append(unit)
        left[best] -= cost
    return [row for group in groups for row in group + [[]] * (sizes.rows_per_group - len(group))]


def a_crop_each(batch_size: int, latent_counts: Sequence[int]) -> Sizes:
    """Returns the sizes for one record per row, each with one crop at most: nothing is shared or need be measured."""
    return Sizes(batch_size, batch_size, dict.fromkeys(latent_counts or (0,), 1), False, batch_size)


def size_batches(
    sample: Sequence[Measured],
    spec: LayoutSpec,
    batch_size: int,
    groups: int,
    latent_counts: Sequence[int],
    most_crops: int,
    packed: bool,
) -> Sizes:
    """Returns the rows and crops that hold `batch_size` samples on average, judged by a sample of the records. They
    hold more if one row for each group is more than is needed.

    K is the mean of a group's crops and a little more: 6% if best fit can choose among many, else one standard
    deviation. Units beyond it wait for others with fewer crops.

    Args:
      groups: a divisor of the rows. latent_counts: the l^2 that are drawn from. most_crops: those of one record.
    """
    latent_counts = latent_counts or (0,)
    if not packed:
        needed = dict.fromkeys(latent_counts, len(sample))
        crops = crops_of_a_group(sample, needed, batch_size // groups, most_crops, False)
        return Sizes(batch_size, groups, crops, False, batch_size)
    free = dataclasses.replace(spec, crops=max(most_crops, sum(m.crops for m in sample)))
    needed = {latents: len(units(sample, free, True, latents)) for latents in latent_counts}  # rows for the sample
    wanted = np.mean(list(needed.values())) / max(len(sample), 1) * batch_size
    rows = max(math.ceil(wanted / groups), 1)
    crops = crops_of_a_group(sample, needed, rows, most_crops, True)
    samples = np.mean([rows * groups * len(sample) / max(count, 1) for count in needed.values()])
    return Sizes(rows * groups, groups, crops, True, float(samples) or batch_size)


def crops_of_a_group(
    sample: Sequence[Measured], needed: Mapping[int, int], rows: int, most_crops: int, packed: bool
) -> dict[int, int]:
    """Returns K at each l^2: see `size_batches`.

    Args:
      needed: rows that the sample takes at each l^2. rows: those of a group.
    """
    if not packed:
        costs = [m.crops for m in sample if m.crops] or [0]
        crops = math.ceil(rows * np.mean(costs) + math.sqrt(rows) * np.std(costs) - 1e-9)
        return dict.fromkeys(needed, max(crops, most_crops))
    in_all = sum(m.crops for m in sample)
    means = {latents: rows * in_all / max(count, 1) for latents, count in needed.items()}
    return {latents: max(math.ceil(1.06 * mean), most_crops) for latents, mean in means.items()}


def groups_of(held: Sequence[int], per_shard: int) -> tuple[int, ...]:
    """Returns the numbers of the groups, or rows, on the shards `held`."""
    return tuple(shard * per_shard + i for shard in held for i in range(per_shard))
