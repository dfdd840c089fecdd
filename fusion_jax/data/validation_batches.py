"""Makes the batches of validation: the first records in file order, each once, at the fixed l^2."""

import dataclasses
import functools
import heapq
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from fusion_jax.batch import Batch
from fusion_jax.config import StageConfig
from fusion_jax.data import packing, step_sizes
from fusion_jax.data.examples import ExampleLoader, load_rows
from fusion_jax.data.layout import LayoutSpec, Measured, lay_out_rows
from fusion_jax.data.plan import groups_of
from fusion_jax.errors import BadRecord


@dataclass(frozen=True)
class FixedBatch:
    """One batch of validation: the records of every row, and its layout."""

    rows: list[list[Measured]]
    spec: LayoutSpec


def plan_all(
    records: Sequence[Measured], spec: LayoutSpec, latents: int, stage: StageConfig, shards: int
) -> list[FixedBatch]:
    """Plans batches that hold every record, of which there must be one, once, in rows as full as those of a stage.

    The longest rows come first. A batch is as long as its longest row, rounded up to one of four lengths, and those of
    one length have one K, T and R: four programs at most. A batch has one group of rows for every shard, with no more
    rows than a microbatch of the stage; rows stay empty if there are too few.

    Args:
      latents: l^2. shards: parts that rows are sharded into.
    """
    lengths = [m.length + m.rounds * latents for m in records]
    together = [[i] for i in range(len(records))]
    if stage.packing:
        together = packing.best_fit(lengths, spec.length, [([m.rounds for m in records], spec.rounds)])
    together.sort(key=lambda unit: -sum(lengths[i] for i in unit))
    most = max(1, len(together) * stage.batch_size // (len(records) * stage.accumulation * shards))  # rows of a group
    rows = math.ceil(len(together) / (math.ceil(len(together) / (most * shards)) * shards))
    by_length: dict[int, list[list[int]]] = {}
    for start in range(0, len(together), rows * shards):
        part = together[start : start + rows * shards]
        by_length.setdefault(_few_lengths(sum(lengths[i] for i in part[0]), spec.length), []).extend(part)
    planned = []
    for length, part in by_length.items():
        groups = math.ceil(len(part) / (rows * shards)) * shards
        units = [[records[i] for i in unit] for unit in part]
        by_group = _spread(units, groups, rows)
        crops = max(_crops(group) for group in by_group)
        most = max(sum(m.rounds for m in unit) for unit in units)
        fitted = step_sizes.fitted(spec, [m for unit in units for m in unit], most)
        fitted = dataclasses.replace(fitted, length=length, crops=crops)
        for first in range(0, groups, shards):
            filled = [group + [[]] * (rows - len(group)) for group in by_group[first : first + shards]]
            planned.append(FixedBatch([row for group in filled for row in group], fitted))
    return planned


def _few_lengths(length: int, longest: int) -> int:
    """Returns the shortest sufficient of `longest` and its half, quarter and eighth, rounded up to multiples of 128."""
    shorter = (math.ceil(longest / (128 * parts)) * 128 for parts in (8, 4, 2))
    return next((one for one in shorter if length <= one < longest), longest)


def _spread(units: Sequence[list[Measured]], groups: int, rows: int) -> list[list[list[Measured]]]:
    """Spreads units over groups of at most `rows` rows: most crops first, each to the group with fewest so far."""
    filled: list[list[list[Measured]]] = [[] for _ in range(groups)]
    open_ = [(0, group) for group in range(groups)]
    for unit in sorted(units, key=lambda unit: -_crops([unit])):
        crops, group = heapq.heappop(open_)
        filled[group].append(unit)
        if len(filled[group]) < rows:
            heapq.heappush(open_, (crops + _crops([unit]), group))
    return filled


def _crops(group: Sequence[Sequence[Measured]]) -> int:
    return sum(m.crops for unit in group for m in unit)


def first_records(
    loader: ExampleLoader, batch_size: int, batches: int, threads: int = 1
) -> tuple[list[Measured], list[BadRecord]]:
    """Measures the first records in file order that can be used, and lists the bad ones before the last of them.

    They fill `batches` batches, or are all that there are (`batches` 0, or a smaller file). Of images only the headers
    are read.
    """
    good: list[Measured] = []
    bad: list[BadRecord] = []
    records = len(loader.source)
    wanted = min(records, batches * batch_size or records)
    start = 0
    with ThreadPoolExecutor(threads) as pool:
        while len(good) < wanted and start < records:
            numbers = range(start, min(records, start + wanted - len(good)))
            start = numbers.stop
            for element in pool.map(functools.partial(loader.measure, headers=True), numbers):
                if isinstance(element, BadRecord):
                    bad.append(element)
                else:
                    good.append(element[0])
    return good, bad


def fixed_batches(
    loader: ExampleLoader, planned: Sequence[FixedBatch], threads: int, shards: int = 1, held: Sequence[int] = (0,)
) -> Iterator[tuple[Batch, dict[int, BadRecord]]]:
    """Yields the rows of some shards of validation's batches, and the records among them, by number, whose images
    cannot be read or that are not as they were measured: they leave their places empty.

    Args:
      planned: `plan_all` of `first_records`. shards, held: see `loader.training_batches`.
    """
    for batch in planned:
        own = [batch.rows[i] for i in groups_of(held, len(batch.rows) // shards)]
        rows, gaps = load_rows(loader, own, threads)
        # As in training: without a crop there are no latents.
        latents = loader.longest_latents if batch.spec.crops else 0
        yield lay_out_rows(rows, batch.spec, latents, len(held)), {measured.number: bad for measured, bad in gaps}
