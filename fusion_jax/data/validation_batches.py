"""Batches of validation: the first records in file order, at the model's fixed l^2."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from fusion_jax.batch import Batch
from fusion_jax.data.examples import Loader
from fusion_jax.data.layout import lay_out_rows
from fusion_jax.data.plan import FixedBatch, Measured
from fusion_jax.data.planner import groups_of
from fusion_jax.errors import BadRecord


def first_records(
    loader: Loader, batch_size: int, batches: int, threads: int = 1
) -> tuple[list[Measured], list[BadRecord]]:
    """The first records in file order that can be used, and the bad ones on the way.

    So many batches of them, or all (`batches` 0, or where there are no more). Of an image the header alone is read.
    """
    good: list[Measured] = []
    bad: list[BadRecord] = []
    records = len(loader.source)
    wanted = min(records, batches * batch_size or records)
    next_ = 0
    with ThreadPoolExecutor(threads) as pool:
        while len(good) < wanted and next_ < records:
            numbers = range(next_, min(records, next_ + wanted - len(good)))
            next_ = numbers.stop
            for element in pool.map(functools.partial(loader.measure, headers=True), numbers):
                if isinstance(element, BadRecord):
                    bad.append(element)
                else:
                    good.append(element[0])
    return good, bad


def fixed_batches(
    loader: Loader, planned: Sequence[FixedBatch], threads: int, shards: int = 1, held: Sequence[int] = (0,)
) -> Iterator[tuple[Batch, dict[int, BadRecord]]]:
    """The rows of some shards of validation's batches, and the records among them, by number, whose images cannot be
    read or that are not as they were measured: they leave their places empty.

    Args:
      planned: `plan.plan_all` of `first_records`. shards, held: see `training_batches`.
    """

    for batch in planned:
        own = [batch.rows[i] for i in groups_of(held, len(batch.rows) // shards)]
        with ThreadPoolExecutor(threads) as pool:
            loaded = [list(row) for row in [pool.map(loader.load_planned, row) for row in own]]
        spec = dataclasses.replace(loader.spec, length=batch.length, crops=batch.crops)
        rows = [[example for example in row if not isinstance(example, BadRecord)] for row in loaded]
        bad = {
            measured.number: example
            for measured, example in zip(itertools.chain(*own), itertools.chain(*loaded))
            if isinstance(example, BadRecord)
        }
        # As in training: without a crop there are no latents.
        yield lay_out_rows(rows, spec, loader.longest_latents if batch.crops else 0, len(held)), bad
