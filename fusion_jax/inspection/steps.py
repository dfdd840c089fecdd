"""Plans the first steps of a run from a sample, as training does, and picks rows of them to show.

Step n here is step n of the run.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fusion_jax.batch import Batch
from fusion_jax.data import packing
from fusion_jax.data.layout import Example, LayoutSpec, Measured, lay_out_rows
from fusion_jax.data.plan import pool
from fusion_jax.data.planner import Element, Planner, Step
from fusion_jax.errors import BadRecord
from fusion_jax.inspection.sample import SIZES, Sample, StageData

MOST_STEPS = 200  # planned at most


def planned_steps(data: StageData, sample: Sample) -> Iterator[Step]:
    """Yields the steps of the run, from the first to the last, planned as in training. Records outside the sample are
    measured on the way.

    It ends early if nothing is usable.
    """
    known: dict[int, Element] = {}
    for r in sample.records:
        number, *sizes = (int(r[name]) for name in SIZES)
        bad = BadRecord("bad", f"record {number}", "counted already")
        known[number] = (Measured(number, *sizes, question=int(r["question"])), int(r["dropped"])) if r["good"] else bad
    numbers = (int(data.order[i]) for i in itertools.count())

    def read() -> Element:
        number = next(numbers)
        if number not in known:
            known[number] = data.loader.measure(number)
        return known[number]

    records = len(data.source)
    planner = Planner(data.stage, data.loader.spec, data.sizes, data.latent_counts, data.seed, records)
    while (step := planner.next_step(read)) is not None and any(step.rows):
        yield step


def step_statistics(data: StageData, sample: Sample) -> dict[str, Any] | None:
    """Sums up what planned steps hold, as many steps as the sample suffices for. None if nothing is usable."""
    usable = int(sample.records[: sample.count]["good"].sum())
    steps = list(itertools.islice(planned_steps(data, sample), min(MOST_STEPS, max(2, _affordable(data, usable)))))
    if not usable or not steps:
        return None
    sizes, length = data.sizes, data.sizes.length or data.stage.max_length
    every = [crops for one in (*sizes.smaller, sizes) for crops in one.crops.values()]
    by_step = [[m.length + m.rounds * step.latents for row in step.rows for m in row] for step in steps]
    in_crops = [(step.crops * sizes.groups, sum(m.crops for row in step.rows for m in row)) for step in steps]
    slots, crops = (sum(column) for column in zip(*in_crops))
    return {
        "steps_planned": len(steps),
        "packing": sizes.packing,
        "rows": sizes.rows,
        "groups": sizes.groups,
        "positions_of_a_row": length,
        "crops_per_group": [min(every), max(every)],
        "question_lengths": {
            str(length): count / len(steps)
            for length, count in sorted(Counter(step.spec.question_length for step in steps).items())
        },
        "samples": sum(map(len, by_step)) / len(steps),
        "empty_rows": sum(not row for step in steps for row in step.rows) / len(steps),
        "text_only_steps": sum(step.crops == 0 for step in steps) / len(steps),
        "positions": sizes.rows * length,
        "filled_positions": sum(map(sum, by_step)) / (len(steps) * sizes.rows * length),
        "filled_crops": crops / slots if slots else None,
        "padded_to_longest": packing.padding_efficiency(list(itertools.chain(*by_step)), data.stage.batch_size),
    }


def _affordable(data: StageData, usable: int) -> int:
    """Returns how many steps can be planned from that many usable records."""
    return int((usable - pool(data.sizes)) / data.sizes.samples)


@dataclass(frozen=True)
class Rows:
    """Some rows of one step, as training gets them: those of the first groups, or the first of the first group.

    Attributes:
      step: number from 0. batch: these rows alone. examples: the examples of each row, in order. missing: the records
        of these rows whose images are bad.
    """

    step: int
    batch: Batch
    spec: LayoutSpec
    examples: list[list[Example]]
    missing: list[BadRecord]


def sample_rows(data: StageData, sample: Sample, rows: int, steps: int = 3) -> list[Rows]:
    """Picks about `rows` rows from the first steps."""
    shown, per_group, share = [], data.sizes.rows_per_group, -(-rows // steps)
    groups = min(max(1, share // per_group), data.sizes.groups)
    for step in itertools.islice(planned_steps(data, sample), steps if rows else 0):
        chosen = step.rows[: groups * min(share, per_group)]
        loaded = [[data.loader.load(measured.number) for measured in row] for row in chosen]
        examples = [[one for one in row if isinstance(one, Example)] for row in loaded]
        missing = [one for row in loaded for one in row if isinstance(one, BadRecord)]
        shown.append(
            Rows(step.number, lay_out_rows(examples, step.spec, step.latents, groups), step.spec, examples, missing)
        )
    return shown
