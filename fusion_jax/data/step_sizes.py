"""Chooses smaller sizes of steps for the records with short questions and few rounds, so that less is computed.

    size        T     R   holds                             compiled
    smaller     128   8   most records                      with the first such step
    smaller     384   12  nearly all others                 with the first such step
    layout's    1024  16  all that the stage allows         with the first such step, if there ever is one

Each size has a program for each l^2, which takes minutes to compile for many devices, so it must save `WORTH` of the
FLOPs. Which records a size holds does not depend on l^2, because what is read must not depend on the draw.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusion_jax.config import StageConfig
from fusion_jax.data.layout import LayoutSpec, Measured
from fusion_jax.data.plan import (
    PATIENCE_LARGE,
    WAITING_LARGE,
    Sizes,
    StepSize,
    a_crop_each,
    crops_of_a_group,
    size_batches,
    units,
)
from fusion_jax.models.config import FusionConfig
from fusion_jax.models.flops import BatchShape, forward_flops

QUESTION_LENGTHS = (64, 128, 192, 256, 384, 512, 768, 1024)
ROUNDS = (4, 6, 8, 10, 12, 16, 24, 32)
MOST = 3  # sizes that the sample needs
WORTH = 0.01  # share of the FLOPs that a size must save
_PIECE = 1024  # positions of a row that attend to each other, about
LEAST_ROWS = 4  # of a group, for rows that are longer than the longest conversation
LONGER, BLOCK = (1.25, 1.5, 1.75, 2), 512  # such rows, in longest conversations, and in positions: whole blocks
MORE = 1.1  # how many times as many samples as asked for a step may hold, so that its rows are longer
LONG = 1024  # positions from which rows may be longer: shorter ones are those of small models, where others rule


def sizes_for(
    sample: Sequence[Measured], spec: LayoutSpec, model: FusionConfig, stage: StageConfig, shards: int
) -> Sizes:
    """Returns the sizes of a stage's batches, judged by a sample of its records: S, K, R and T.

    Args:
      shards: parts that the rows of a microbatch are sharded into.
    """
    most, counts = stage.max_images * model.most_crops, model.drawn_latent_counts
    groups = shards * stage.accumulation

    def sized(spec: LayoutSpec) -> Sizes:
        if not stage.packing and most == 1:
            return a_crop_each(stage.batch_size, counts)
        return size_batches(sample, spec, stage.batch_size, groups, counts, most, stage.packing)

    sizes = sized(spec)
    if not sample or (not can_be_smaller(spec) and spec.length < LONG):
        return sizes
    work = _Work(sizes, spec, model)
    lengths = _question_lengths(work, sample)
    if stage.packing and spec.length >= LONG:
        length = _row_length(work, sample, lengths, stage.batch_size / groups)
        if length > spec.length:
            spec = in_rows_of(spec, length)
            sizes = dataclasses.replace(sized(spec), length=length)
    return _with_smaller_steps(_Work(sizes, spec, model), sample, lengths, most)


def fitted(spec: LayoutSpec, records: Sequence[Measured], rounds: int) -> LayoutSpec:
    """Returns the layout with the fewest question tokens and rounds of those that steps may have that suffice.

    Args:
      records: those of all rows. rounds: the most that a row has.
    """
    longest = max((m.question for m in records), default=0)
    length = next((one for one in QUESTION_LENGTHS if longest <= one), spec.question_length)
    most = next((one for one in ROUNDS if rounds <= one), spec.rounds)
    return dataclasses.replace(spec, question_length=min(length, spec.question_length), rounds=min(most, spec.rounds))


def can_be_smaller(spec: LayoutSpec) -> bool:
    """Returns whether a step could have shorter questions, or fewer rounds, than the layout."""
    return spec.question_length > QUESTION_LENGTHS[0] or spec.rounds > ROUNDS[0]


def _with_smaller_steps(work: "_Work", sample: Sequence[Measured], lengths: Sequence[int], most_crops: int) -> Sizes:
    """Adds the smaller sizes of steps, if together they are worth their programs.

    Args:
      lengths: their question lengths, ascending. most_crops: crops that one record may have.
    """
    sizes, longest, most_rounds = work.sizes, work.layout.question_length, work.most_rounds
    everything = work.rows_and_crops(sample, longest, most_rounds)
    classes, left, cost = [], list(sample), 0.0
    for length, longer in zip(lengths, [*lengths[1:], longest]):
        rounds = _rounds(work, [m for m in left if m.question <= length], length, longer)
        if length == longest and rounds == most_rounds:  # the layout's own size
            break
        size = StepSize(length, rounds, {})
        held = [m for m in left if size.holds(m)]
        left = [m for m in left if not size.holds(m)]
        cost += work.rows_and_crops(held, length, rounds)
        classes.append((size, held))
    cost += work.rows_and_crops(left, longest, most_rounds)
    if everything - cost < WORTH * everything:
        return sizes
    steps = [work.step(held, size.rounds, len(sample), most_crops) for size, held in classes]
    crops, samples = work.step(left, most_rounds, len(sample), most_crops)
    counts = [*((len(held), one) for (_, held), (_, one) in zip(classes, steps)), (len(left), samples)]
    return dataclasses.replace(
        sizes,
        crops=crops,
        samples=len(sample) / sum(count / one for count, one in counts),
        smaller=tuple(dataclasses.replace(size, crops=crops) for (size, _), (crops, _) in zip(classes, steps)),
    )


@dataclass(frozen=True)
class _Work:
    """Counts the FLOPs of a forward pass over the rows and crops that records take, padding included, except that a
    row's conversations attend to themselves alone: kernels skip most of the rest."""

    sizes: Sizes
    layout: LayoutSpec
    model: FusionConfig

    @property
    def counts(self) -> list[int]:
        return list(self.sizes.crops)

    @property
    def most_rounds(self) -> dict[int, int]:
        return dict.fromkeys(self.counts, self.layout.rounds)

    def row(self, rounds: int, latents: int) -> float:
        """Counts the FLOPs of one row."""
        windows, pieces = rounds * latents * self.layout.window_size(latents), self.layout.length // _PIECE
        lengths = (_PIECE,) * pieces + (self.layout.length % _PIECE,)
        return forward_flops(self.model, BatchShape(lengths, (), 0, 0, rounds, latents, windows))

    def crop(self, question_length: int) -> float:
        """Counts the FLOPs of one crop, on average over l^2."""
        shapes = [BatchShape((), (question_length,), self.layout.quadrants, 0, 0, count, 0) for count in self.counts]
        return float(np.mean([forward_flops(self.model, shape) for shape in shapes]))

    def rows(self, records: Sequence[Measured], rounds: int, latents: int) -> int:
        """Counts the rows that the records need."""
        free = dataclasses.replace(self.layout, rounds=rounds, crops=max(1, sum(m.crops for m in records)))
        return len(units(records, free, self.sizes.packing, latents))

    def of_rows(self, records: Sequence[Measured], rounds: dict[int, int]) -> float:
        """Counts the FLOPs of the records' rows, on average over l^2."""
        return float(np.mean([self.rows(records, r, count) * self.row(r, count) for count, r in rounds.items()]))

    def rows_and_crops(self, records: Sequence[Measured], question_length: int, rounds: dict[int, int]) -> float:
        return self.of_rows(records, rounds) + sum(m.crops for m in records) * self.crop(question_length)

    def step(
        self, records: Sequence[Measured], rounds: dict[int, int], sampled: int, most_crops: int
    ) -> tuple[dict[int, int], float]:
        """Returns K at each l^2 and the samples of a step of these records of `sampled`, on average."""
        sizes = self.sizes
        # So few that a step of them is filled with others before there are enough.
        if len(records) / sampled * PATIENCE_LARGE < WAITING_LARGE:
            return dict(sizes.crops), sizes.samples
        needed = {count: self.rows(records, r, count) for count, r in rounds.items()}
        crops = crops_of_a_group(records, needed, sizes.rows_per_group, most_crops, sizes.packing)
        samples = np.mean([sizes.rows * len(records) / rows for rows in needed.values()])
        return crops, float(samples)


def _question_lengths(work: _Work, sample: Sequence[Measured]) -> tuple[int, ...]:
    """Returns the question lengths of the smaller steps, ascending; at least one."""
    longest = work.layout.question_length
    lengths = np.array([*(length for length in QUESTION_LENGTHS if length < longest), longest])
    costs_of = np.array([work.crop(int(length)) for length in lengths])
    questions, crops = np.array([m.question for m in sample]), np.array([m.crops for m in sample])
    sufficient = [place for place, length in enumerate(lengths) if length >= questions.max()]

    def cost(chosen: tuple[int, ...]) -> float:
        return float(crops @ costs_of[list(chosen)][np.searchsorted(lengths[list(chosen)], questions)])

    best, least = (len(lengths) - 1,), cost((len(lengths) - 1,))
    everything = least + work.of_rows(sample, work.most_rounds)
    for count in range(1, MOST + 1):
        costs = {
            (*shorter, last): cost((*shorter, last))
            for last in sufficient
            for shorter in itertools.combinations(range(last), count - 1)
        }
        if not costs:
            break
        chosen = min(costs, key=costs.get)
        if least - costs[chosen] >= WORTH * everything:
            best, least = chosen, costs[chosen]
    return tuple(int(lengths[place]) for place in best)


def _row_length(work: _Work, sample: Sequence[Measured], lengths: Sequence[int], per_group: float) -> int:
    """Returns the positions of a row with which the steps of all question lengths waste least.

    Args:
      per_group: records that a group should hold. With few long rows it may have to hold many more.
    """
    longest = work.layout.length
    classes = [
        [m for m in sample if shorter < m.question <= length] for shorter, length in zip([-1, *lengths], lengths)
    ]
    costs = {}
    for length in (longest, *(int(longest * times) // BLOCK * BLOCK for times in LONGER)):
        one = dataclasses.replace(work, layout=in_rows_of(work.layout, length))
        rows = np.mean([sum(one.rows(held, one.layout.rounds, count) for held in classes) for count in work.counts])
        in_group = rows / len(sample) * per_group
        if length == longest or (
            length > longest and in_group >= LEAST_ROWS and math.ceil(in_group) <= MORE * in_group
        ):
            costs[length] = sum(one.of_rows(held, one.most_rounds) for held in classes)
    best = min(costs, key=costs.get)
    return best if costs[best] <= (1 - WORTH) * costs[longest] else longest


def in_rows_of(spec: LayoutSpec, length: int) -> LayoutSpec:
    """Returns the layout with rows of `length` positions and as many more rounds."""
    return dataclasses.replace(spec, length=length, rounds=math.ceil(spec.rounds * length / spec.length))


def _rounds(work: _Work, members: Sequence[Measured], length: int, longer: int) -> dict[int, int]:
    """Returns R at each l^2 for records with questions of up to `length` tokens: those with more rounds than the least
    of these have to go into steps with questions of up to `longer` tokens."""
    most = work.layout.rounds
    choices = [rounds for rounds in ROUNDS if rounds < most] + [most]
    best, least = work.most_rounds, np.inf
    for fewest in choices:
        held = [m for m in members if m.rounds <= fewest]
        others = [m for m in members if m.rounds > fewest]
        if len(others) > 0.1 * len(members):
            continue
        allowed = [rounds for rounds in choices if rounds >= fewest]
        rounds, cost = {}, work.of_rows(others, work.most_rounds)
        for count in work.counts:
            costs = {r: work.rows(held, r, count) * work.row(r, count) for r in allowed}
            rounds[count] = min(costs, key=costs.get)
            cost += costs[rounds[count]] / len(work.counts)
        cost += sum(m.crops for m in others) * (work.crop(longer) - work.crop(length))
        if cost < least:
            best, least = rounds, cost
    return best
