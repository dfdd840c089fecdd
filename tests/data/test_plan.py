"""Planning rows from measured records: crops over groups, rows of text alone, sizes of batches."""

import numpy as np
import pytest
from helpers.fixtures import tiny

from fusion_jax.config import StageConfig
from fusion_jax.data import packing
from fusion_jax.data.examples import layout_spec
from fusion_jax.data.layout import Measured
from fusion_jax.data.plan import Plan, Sizes, assign_to_groups, missing, plan, size_batches
from fusion_jax.data.validation_batches import plan_all

SPEC = layout_spec(tiny(), 100, 16, 8)


def enough(waiting, sizes, split, step=0):
    return not missing(waiting, SPEC, sizes, split, step)


def records(*crops, length=30, rounds=1):
    return [Measured(number, length, count, rounds) for number, count in enumerate(crops)]


def test_units_go_where_the_crops_left_are_like_theirs():
    sizes = Sizes(rows=4, groups=2, crops={4: 5}, packing=False, samples=4)
    assert assign_to_groups([[0], [1], [2], [3]], [4, 1, 1, 3], sizes, 5) == [[0], [1], [2], [3]]
    # The third is too heavy for what is left and waits; a row may stay empty.
    assert assign_to_groups([[0], [1], [2], [3]], [4, 4, 2, 1], sizes, 5) == [[0], [3], [1], []]
    assert assign_to_groups([], [], sizes, 5) == [[], [], [], []]


def test_rows_of_text_alone_go_together():
    sizes, waiting = Sizes(2, 2, {4: 1}, False, 2), records(1, 0, 1, 0, 0)
    assert enough(waiting[:3], sizes, split=True) and not enough(waiting[:2], sizes, split=True)
    assert enough(waiting[:2], sizes, split=False)
    first = plan(waiting[:3], SPEC, sizes, 4, split=True)
    assert (first.rows, first.crops) == ([[0], [2]], 1)
    # Both kinds fill a step: the oldest record goes.
    both = plan(waiting[1:], SPEC, sizes, 4, split=True)
    assert (both.rows, both.crops) == ([[0], [2]], 0)
    assert plan(waiting[:2], SPEC, sizes, 4, split=False).rows == [[0], [1]]


def test_units_go_where_the_crops_suit_and_not_where_there_is_room_first():
    sizes = Sizes(rows=4, groups=2, crops={4: 5}, packing=False, samples=4)
    # First fit would put both light ones together, and no group would have room for the second heavy one.
    assert assign_to_groups([[0], [1], [2], [3]], [1, 1, 4, 4], sizes, 5) == [[0], [2], [1], [3]]
    sizes = Sizes(rows=6, groups=3, crops={4: 6}, packing=True, samples=6)
    units_ = [[0, 1], [2], [3], [4, 5], [6], [7]]
    assert assign_to_groups(units_, [1, 2, 3, 3, 4, 5], sizes, 6) == [[0, 1], [7], [2], [6], [3], [4, 5]]


@pytest.mark.parametrize(
    ("sizes", "crops", "wanted"),
    [
        (Sizes(3, 1, {4: 10, 16: 8}, True, 10.0), 1, 40),  # packed rows: of four steps' records the best are chosen
        (Sizes(8, 1, {4: 10}, True, 21.3), 0, 86),  # as many as a step holds, whatever batch_size says
        (Sizes(4, 2, {4: 5}, False, 4), 3, 8),  # crops have to work out: of two
        (Sizes(4, 2, {4: 6}, False, 4), 3, 4),  # whatever comes fits
        (Sizes(4, 4, {4: 1}, False, 4), 1, 4),
        (Sizes(4, 4, {4: 1}, False, 4), 0, 4),
    ],
)
@pytest.mark.parametrize("split", [False, True])
def test_a_step_is_chosen_from_as_many_records_as_it_needs_and_no_more(sizes, crops, wanted, split):
    waiting = records(*[crops] * wanted)
    assert enough(waiting, sizes, split) and not enough(waiting[:-1], sizes, split)


def test_a_record_waits_for_four_steps_and_no_longer():
    sizes = Sizes(4, 4, {4: 1}, False, 4)
    for text, image in ((0, 1), (1, 0)):
        waiting = [Measured(9, 30, text, 1, arrived=2), *(m._replace(arrived=5) for m in records(*[image] * 5))]
        assert not enough(waiting[:4], sizes, True, 5) and enough(waiting[:4], sizes, True, 6)
        assert not enough(waiting[:3], sizes, True, 6)
        assert plan(waiting, SPEC, sizes, 4, True, 5).rows == [[1], [2], [3], [4]]
        assert plan(waiting, SPEC, sizes, 4, True, 6) == Plan([[0], [1], [2], [3]], 1)
    # Without more to read a step is what is there.
    assert plan(records(0, 1), SPEC, sizes, 4, True) == Plan([[0], [1], [], []], 1)
    assert plan(records(0, 0), SPEC, sizes, 4, True) == Plan([[0], [1], [], []], 0)


def test_a_row_that_stays_poor_waits_for_eight_steps_and_no_longer():
    sizes = Sizes(2, 1, {4: 9}, True, 2)
    waiting = [Measured(i, length, 1, 1, min(3 + i // 2, 5)) for i, length in enumerate((92, 60, 92, 92))]
    assert plan(waiting, SPEC, sizes, 4, True, 10).rows == [[0], [2]]  # nearly full ones behind the oldest
    assert plan(waiting, SPEC, sizes, 4, True, 11).rows == [[0], [1]]


def test_no_record_waits_for_ever():
    rng = np.random.default_rng(0)
    for packed, split in ((False, True), (False, False), (True, True)):
        sizes = Sizes(rows=4, groups=2, crops={4: 6}, packing=packed, samples=8)
        waiting, number, waited, taken = [], 0, {}, set()
        for _ in range(200):
            while not enough(waiting, sizes, split):
                waiting.append(Measured(number, int(rng.integers(5, 90)), int(rng.choice([0, 1, 1, 2, 5])), 1))
                number += 1
            step = plan(waiting, SPEC, sizes, 4, split)
            places = [i for row in step.rows for i in row]
            assert places and len(set(places)) == len(places)
            for g in range(2):
                group = [i for row in step.rows[2 * g : 2 * g + 2] for i in row]
                assert sum(waiting[i].crops for i in group) <= step.crops
            for row in step.rows:
                assert sum(waiting[i].length + 4 for i in row) <= 100
            assert not taken & {waiting[i].number for i in places}
            taken |= {waiting[i].number for i in places}
            waiting = [m for i, m in enumerate(waiting) if i not in places]
            for m in waiting:
                waited[m.number] = waited.get(m.number, 0) + 1
        assert max(waited.values()) <= 40 and number - len(taken) == len(waiting)


@pytest.mark.parametrize(
    ("groups", "slots_at_least", "crops_at_least"), [(1, 0.96, 0.92), (4, 0.96, 0.9), (16, 0.95, 0.77)]
)
def test_published_mix_fills_rows_and_crops(groups, slots_at_least, crops_at_least):
    """16 packed rows of 4096 as one, four or sixteen devices share them; l^2 changes at every step."""
    rng = np.random.default_rng(0)
    spec = layout_spec(tiny(), 4096, 16, 16)

    def record(number):  # the mix of `packing.length_mix`, its parts apart
        kind, image = rng.choice(3, p=(0.6, 0.25, 0.15)), rng.random() < 0.9
        rounds = int((1, rng.integers(2, 4), rng.integers(4, 9))[kind])
        text = rng.integers(10, 61, rounds).sum()
        for length in rng.choice(3, rounds, p=(0.4, 0.4, 0.2)):
            text += rng.integers(*((5, 21), (60, 201), (200, 501))[length])
        return Measured(number, min(int(text), 2300) + 576 * image, int(image), rounds * image)

    sample = [record(number) for number in range(512)]
    sizes = size_batches(sample, spec, 64, groups, packing.LATENT_COUNTS, 1, True)
    assert sizes.rows % groups == 0 and 16 <= sizes.rows <= 32
    waiting, number, slots, crops, samples = [], 512, [], [], []
    for latents in packing.LATENT_COUNTS * 8:
        while not enough(waiting, sizes, True):
            waiting.append(record(number))
            number += 1
        step = plan(waiting, spec, sizes, latents, True)
        places = [i for row in step.rows for i in row]
        slots.append(sum(waiting[i].length + waiting[i].rounds * latents for i in places) / (sizes.rows * 4096))
        crops.append(sum(waiting[i].crops for i in places) / (sizes.crops[latents] * groups))
        samples.append(len(places))
        waiting = [m for i, m in enumerate(waiting) if i not in places]
    assert np.mean(slots) >= slots_at_least and np.mean(crops) >= crops_at_least
    assert abs(np.mean(samples) / sizes.samples - 1) < 0.15
    assert sizes.crops[144] < sizes.crops[4]  # each l^2 its own: with many latents fewer images share a row


@pytest.mark.parametrize(("packed", "shards", "accumulation"), [(True, 4, 1), (False, 4, 2), (False, 1, 1)])
def test_validation_holds_every_record_once_in_few_shapes(packed, shards, accumulation):
    lengths = np.minimum(np.random.default_rng(0).geometric(0.004, 200), 2000).tolist()
    all_ = [Measured(7 * i, length, i % 3, 1) for i, length in enumerate(lengths)]
    stage = StageConfig("s", "d", batch_size=16, accumulation=accumulation, packing=packed)
    planned = plan_all(all_, layout_spec(tiny(), 2048, 16, 64), 4, stage, shards)
    assert sorted(m for batch in planned for row in batch.rows for m in row) == all_
    shapes = {batch.spec.length: batch.spec.crops for batch in planned}
    assert set(shapes) <= {256, 512, 1024, 2048} and {(b.spec.length, b.spec.crops) for b in planned} == set(
        shapes.items()
    )
    (per_shard,) = {len(batch.rows) // shards for batch in planned}
    allowed = 16 // shards // accumulation
    assert per_shard < allowed if packed else per_shard == allowed
    slots = 0
    for batch in planned:
        slots += len(batch.rows) * batch.spec.length
        for row in batch.rows:
            assert sum(m.length + 4 for m in row) <= batch.spec.length and (len(row) <= 1 or packed)
        for shard in range(shards):
            group = batch.rows[shard * per_shard : (shard + 1) * per_shard]
            assert sum(m.crops for row in group for m in row) <= batch.spec.crops
    assert sum(m.length + 4 for m in all_) / slots > (0.9 if packed else 0.4)


def test_validation_of_little_is_short():
    one, spec = [Measured(3, 300, 1, 1)], layout_spec(tiny(), 4096, 16, 8)
    for packed in (True, False):
        (batch,) = plan_all(one, spec, 4, StageConfig("s", "d", batch_size=128, packing=packed), 256)
        assert (len(batch.rows), batch.spec.length, batch.spec.crops) == (256, 512, 1) and batch.rows.count([]) == 255
    (batch,) = plan_all(records(0, length=90), SPEC, 4, StageConfig("s", "d"), 1)
    assert (batch.rows, batch.spec.length, batch.spec.crops) == ([records(0, length=90)], 100, 0)


def test_sizes_of_unpacked_batches():
    assert size_batches(records(1, 1, 0), SPEC, 8, 2, (4,), 1, False) == Sizes(8, 2, {4: 4}, False, 8)
    # Most have one image, some four: room for the mean and one deviation of a group's rows.
    mixed = size_batches(records(*[1] * 30, *[4] * 10), SPEC, 8, 1, (4,), 4, False)
    assert mixed.rows == 8 and 14 < mixed.crops[4] < 19
    assert size_batches(records(1, 2, 4), SPEC, 8, 8, (4,), 6, False).crops == {4: 6}  # the largest must have room
    assert size_batches([], SPEC, 8, 2, (), 1, True) == Sizes(2, 2, {0: 1}, True, 8)


def test_sizes_of_packed_batches_say_what_a_step_holds():
    sample = records(*[1] * 120, length=20)
    few = size_batches(sample, SPEC, 8, 1, (4, 13), 1, True)  # of 100 positions, 24 or 33 a record: four or three
    assert (few.rows, few.samples) == (3, 3 * (4 + 3) / 2)
    many = size_batches(sample, SPEC, 8, 16, (4, 13), 1, True)  # a row each at least
    assert (many.rows, many.samples) == (16, 16 * (4 + 3) / 2)
