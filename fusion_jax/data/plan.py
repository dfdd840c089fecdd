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
"""

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


@dataclass(frozen=True)
class Sizes:
    """The sizes of a stage's batches.

    Attributes:
      rows: rows per step. groups: groups per step, a divisor of the rows. crops: K of a group at each l^2: with fewer
        latents more records share a row. packing: whether records share rows. samples: records per step on average.
    """

    rows: int
    groups: int
    crops: Mapping[int, int]
    packing: bool
    samples: float

    @property
    def rows_per_group(self) -> int:
        return self.rows // self.groups


@dataclass(frozen=True)
class Plan:
    """The rows of one step: for each the indices of its records in the waiting list; K, 0 for rows of text alone."""

    rows: list[list[int]]
    crops: int


def units(waiting: Sequence[Measured], spec: LayoutSpec, sizes: Sizes, latents: int) -> list[list[int]]:
    """Returns indices of waiting records that share a row, rows in the order in which they should go."""
    if not sizes.packing:
        return [[i] for i in range(len(waiting))]
    lengths = [m.length + m.rounds * latents for m in waiting]
    others = [([m.crops for m in waiting], sizes.crops[latents]), ([m.rounds for m in waiting], spec.rounds)]
    return packing.preferred(packing.best_fit(lengths, spec.length, others), lengths, spec.length)


def pool(sizes: Sizes) -> float:
    """Returns how many records a step chooses from, if it matters which of them share a row or its crops."""
    if sizes.packing:
        return WAITING_PACKED * sizes.samples
    return WAITING * sizes.rows


def enough(waiting: Sequence[Measured], sizes: Sizes, split: bool, step: int = 0) -> bool:
    """Returns whether a step can be planned without reading on.

    Args:
      split: rows of text alone are kept apart from rows with images. step: its number, from 0.
    """
    if sizes.packing:
        return len(waiting) >= pool(sizes)
    with_images = sum(m.crops > 0 for m in waiting)
    most = sizes.rows_per_group * max((m.crops for m in waiting), default=0)
    wanted = sizes.rows if min(sizes.crops.values()) >= most else pool(sizes)
    if split and not _late(waiting, step):
        return max(with_images, len(waiting) - with_images) >= wanted
    return len(waiting) >= wanted


def _late(waiting: Sequence[Measured], step: int) -> bool:
    return bool(waiting) and step - waiting[0].arrived >= PATIENCE


def plan(waiting: Sequence[Measured], spec: LayoutSpec, sizes: Sizes, latents: int, split: bool, step: int = 0) -> Plan:
    """Plans the rows of one step, with the record that has waited longest unless a step of the other kind is full.
    Rows may stay empty if nothing fits, or too few records wait.

    Args:
      latents: l^2. split, step: see `enough`; a step of text alone costs no encoder.
    """
    ready, crops = units(waiting, spec, sizes, latents), sizes.crops[latents]
    if sizes.packing:
        ready.sort(key=lambda unit: all(step - waiting[i].arrived < PATIENCE_PACKED for i in unit))
    if split and not sizes.packing:
        text = [unit for unit in ready if waiting[unit[0]].crops == 0]
        with_images = [unit for unit in ready if waiting[unit[0]].crops > 0]
        oldest, other = (text, with_images) if text and text[0] == ready[0] else (with_images, text)
        if len(oldest) >= sizes.rows:
            ready = oldest
        elif len(other) >= sizes.rows and not _late(waiting, step):
            ready = other
        else:
            ready = oldest + other
        if all(waiting[unit[0]].crops == 0 for unit in ready):
            crops = 0
    return Plan(assign_to_groups(ready, [sum(waiting[i].crops for i in unit) for unit in ready], sizes, crops), crops)


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
        costs = [m.crops for m in sample if m.crops] or [0]
        per_group = batch_size // groups
        crops = math.ceil(per_group * np.mean(costs) + math.sqrt(per_group) * np.std(costs) - 1e-9)
        crops = dict.fromkeys(latent_counts, max(crops, most_crops))
        return Sizes(batch_size, groups, crops, False, batch_size)
    in_all = sum(m.crops for m in sample)
    free = Sizes(1, 1, dict.fromkeys(latent_counts, max(most_crops, in_all)), True, len(sample))
    needed = {latents: len(units(sample, spec, free, latents)) for latents in latent_counts}  # rows for the sample
    wanted = np.mean(list(needed.values())) / max(len(sample), 1) * batch_size
    rows = max(math.ceil(wanted / groups), 1)
    means = {latents: rows * in_all / max(count, 1) for latents, count in needed.items()}
    crops = {latents: max(math.ceil(1.06 * mean), most_crops) for latents, mean in means.items()}
    samples = np.mean([rows * groups * len(sample) / max(count, 1) for count in needed.values()])
    return Sizes(rows * groups, groups, crops, True, float(samples) or batch_size)


def groups_of(held: Sequence[int], per_shard: int) -> tuple[int, ...]:
    """Returns the numbers of the groups, or rows, on the shards `held`."""
    return tuple(shard * per_shard + i for shard in held for i in range(per_shard))
