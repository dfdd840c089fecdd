"""Which records the steps of a stage hold: every one once an epoch, none left waiting.

Planned as in training, without tokens or images.
"""

import dataclasses
import itertools
import json
import math
from collections import Counter

import grain
import numpy as np
import pytest
from helpers.board_fake import Store
from helpers.fixtures import tiny

from fusion_jax.config import StageConfig
from fusion_jax.data import loader
from fusion_jax.data.examples import layout_spec
from fusion_jax.data.layout import LayoutSpec, Measured
from fusion_jax.data.loader import _Batches, _Feeding, record_order
from fusion_jax.data.plan import PATIENCE, PATIENCE_PACKED, a_crop_each, size_batches
from fusion_jax.data.planner import stage_is_over, stage_steps
from fusion_jax.devices.board import Board
from fusion_jax.errors import BadRecord

COUNTS, LENGTH = (1, 4), 100


@dataclasses.dataclass
class Data:
    """Stands for an `ExampleLoader`: records by what they take, None for those that are bad."""

    source: list[Measured | None]
    spec: LayoutSpec

    def measure(self, number):
        measured = self.source[number] if number < len(self.source) else None
        return (measured, 0) if measured else BadRecord("too_long", f"record {number}", "")

    def load_planned(self, planned):
        return planned


def data(records, text=0.0, most_crops=1, bad=(), preset="paper", seed=0):
    """Records of which a share is text alone; crops of the others 1 to `most_crops`."""
    rng = np.random.default_rng(seed)
    spec = layout_spec(tiny(preset), LENGTH, 16, 8, most_crops)
    crops = np.where(rng.random(records) < text, 0, rng.integers(1, most_crops + 1, records)).tolist()
    lengths = rng.integers(10, 60, records).tolist()
    source = [Measured(i, lengths[i], crops[i], int(crops[i] > 0)) for i in range(records)]
    return Data([None if i in bad else measured for i, measured in enumerate(source)], spec)


def sizes_of(stage, of, shards, most_crops=1):
    if not stage.packing and most_crops == 1:
        return a_crop_each(stage.batch_size, COUNTS)
    usable = [measured for measured in of.source if measured]
    groups = shards * stage.accumulation
    return size_batches(usable[:512], of.spec, stage.batch_size, groups, COUNTS, most_crops, stage.packing)


def steps_of(stage, of, sizes, monkeypatch, state=None, board=None):
    """Yields for each step (rows, K, Fed, state behind it)."""
    monkeypatch.setattr(loader, "lay_out_rows", lambda rows, spec, latents, groups: (rows, spec.crops))
    order = record_order(len(of.source), 7)
    read = order.map(of.measure).to_iter_dataset(grain.ReadOptions(num_threads=0))
    feeding = _Feeding(of, stage, sizes, COUNTS, 7, 1, 0.9, tuple(range(sizes.groups)), board)
    iterator = iter(_Batches(read, feeding))
    if state is not None:
        iterator.set_state(json.loads(json.dumps(state)))
    for fed, _ in iterator:
        yield *fed.batch, fed, iterator.get_state()


CASES = [
    # records, batch, shards, packing, epochs, text, most crops, accumulation
    *((records, 4, 1, False, 1, 0.0, 1, 1) for records in (1, 2, 3, 4, 5, 8, 10, 97)),
    *((10, 4, 1, False, epochs, 0.3, 1, 1) for epochs in (2, 3, 5)),
    *((100, 8, 2, False, 1, text, 1, 1) for text in (0.04, 0.3, 0.5, 0.96, 1.0)),
    *((60, 8, 2, False, 2, text, 5, 2) for text in (0.0, 0.1, 0.9)),
    *((records, 8, 1, True, 1, 0.1, 3, 1) for records in (1, 9, 30, 200)),
    *((200, 8, shards, True, 2, text, 2, 2) for shards in (1, 4, 16) for text in (0.0, 0.5, 1.0)),
]


@pytest.mark.parametrize(
    ("records", "batch", "shards", "packing", "epochs", "text", "most_crops", "accumulation"), CASES
)
def test_every_record_goes_once_an_epoch(
    records, batch, shards, packing, epochs, text, most_crops, accumulation, monkeypatch
):
    stage = StageConfig(
        "s", "d", batch_size=batch, packing=packing, epochs=epochs, accumulation=accumulation, max_length=LENGTH
    )
    of = data(records, text, most_crops)
    sizes = sizes_of(stage, of, shards, most_crops)
    expected = stage_steps(stage, records, sizes.samples)
    steps = list(steps_of(stage, of, sizes, monkeypatch))
    met = Counter(m.number for rows, *_ in steps for row in rows for m in row)
    assert met == dict.fromkeys(range(records), epochs)
    assert [fed.last for _, _, fed, _ in steps] == [False] * (len(steps) - 1) + [True]
    assert [stage_is_over(stage, records, state) for *_, state in steps] == [fed.last for _, _, fed, _ in steps]
    done = [fed.done for _, _, fed, _ in steps]
    assert done[0] == 0 and done == sorted(set(done)) and done[-1] < expected
    for number, (rows, crops, fed, _) in enumerate(steps):
        assert 0 < fed.samples == sum(map(len, rows)) and len(rows) == sizes.rows
        assert not any(fed.bad) and crops in (0, *sizes.crops.values())
        if not packing and most_crops == 1:
            assert fed.samples == min(batch, records * epochs - number * batch) and done[number] == number
    if not packing and most_crops == 1:
        assert len(steps) == math.ceil(records * epochs / batch) == expected
    else:  # what a step holds varies, and the last ones take what is left
        assert abs(len(steps) - expected) <= 2 + 0.1 * expected


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("text", [0.04, 0.2, 0.5, 0.96])
@pytest.mark.parametrize("most_crops", [1, 5])
def test_the_rarer_kind_waits_for_few_steps(packing, text, most_crops, monkeypatch):
    """Of 600 records read in a stage that is counted in steps; nor does a record with many crops wait for long."""
    stage = StageConfig("s", "d", batch_size=8, packing=packing, steps=60, max_length=LENGTH)
    of = data(600, text, most_crops)
    waited, kinds, left = [], Counter(), 0
    for number, (rows, crops, _, state) in enumerate(
        steps_of(stage, of, sizes_of(stage, of, 1, most_crops), monkeypatch)
    ):
        waited += [number - m.arrived for row in rows for m in row]
        kinds["text" if not crops else "mixed" if any(m.crops == 0 for row in rows for m in row) else "images"] += 1
        left = len(state["waiting"])
    assert max(waited) <= (PATIENCE_PACKED + 1 if packing else PATIENCE + 2)
    assert number == 59 and left <= (4 * 8 if packing else PATIENCE * 8)
    if not packing and text == 0.5:  # enough of both: steps of text alone pay for no encoder
        assert kinds["text"] >= 20 and kinds["mixed"] <= 6
    if not packing and text == 0.04:
        assert kinds["mixed"] >= 3 and kinds["images"] >= 50


@pytest.mark.parametrize("packing", [False, True])
def test_bad_records_are_no_steps(packing, monkeypatch):
    """Those at the end of an epoch among them."""
    stage = StageConfig("s", "d", batch_size=4, packing=packing, max_length=LENGTH)
    order = [int(number) for number in itertools.islice(record_order(20, 7), 20)]
    bad = {*order[:2], order[9], *order[16:]}
    of = data(20, bad=bad)
    steps = list(steps_of(stage, of, sizes_of(stage, of, 1), monkeypatch))
    assert sorted(m.number for rows, *_ in steps for row in rows for m in row) == sorted(set(order) - bad)
    assert all(fed.samples for _, _, fed, _ in steps) and steps[-1][2].last
    assert len({one.where for _, _, fed, _ in steps for one in fed.bad}) == len(bad)
    assert packing or len(steps) == 4  # of 13 usable ones


def test_a_stage_whose_records_all_turn_bad_is_not_taken_for_finished(monkeypatch):
    """Reading stops after two passes without one that is good. The trainer is to hear of it, not that all is done."""
    stage = StageConfig("s", "d", batch_size=4, max_length=LENGTH, epochs=8)
    of, order = data(10), iter(range(1000))
    monkeypatch.setattr(of, "measure", lambda number: Data.measure(of, number if next(order) < 10 else 10))
    steps = list(steps_of(stage, of, sizes_of(stage, of, 1), monkeypatch))
    assert [fed.samples for _, _, fed, _ in steps[:3]] == [4, 4, 2] and len(steps[2][2].bad) == 40
    assert [fed.last for _, _, fed, _ in steps] == [False] * (len(steps) - 1) + [True]
    assert len(steps) > 3 and not any(fed.samples for _, _, fed, _ in steps[3:])


@pytest.mark.parametrize("packing", [False, True])
def test_an_epoch_goes_on_from_any_of_its_steps(packing, monkeypatch):
    stage = StageConfig("s", "d", batch_size=4, packing=packing, max_length=LENGTH, epochs=2)
    of = data(30, 0.2, 2, bad={5, 11})
    sizes = sizes_of(stage, of, 1, 2)
    steps = list(steps_of(stage, of, sizes, monkeypatch))
    for place, (*_, state) in enumerate(steps):
        again = list(steps_of(stage, of, sizes, monkeypatch, state))
        assert [rows for rows, *_ in again] == [rows for rows, *_ in steps[place + 1 :]]
        assert [(f.samples, f.done, f.last) for *_, f, _ in again] == [
            (f.samples, f.done, f.last) for *_, f, _ in steps[place + 1 :]
        ]
        # Other sizes of a step, as on more devices; and the states of before, which did not know when a record came.
        more = dataclasses.replace(sizes, rows=2 * sizes.rows, groups=2 * sizes.groups)
        older = {**state, "waiting": [one[:4] for one in state["waiting"]]}
        for now, known in ((more, state), (sizes, older)):
            rest = [m.number for rows, *_ in steps_of(stage, of, now, monkeypatch, known) for row in rows for m in row]
            assert Counter(rest) == Counter(m.number for rows, *_ in again for row in rows for m in row)


def test_a_stage_that_an_earlier_version_has_finished_is_over(monkeypatch):
    """It took as many steps as batches, whatever they held, and had read on for the next epoch."""
    stage = StageConfig("s", "d", batch_size=8, packing=True, steps=12, max_length=LENGTH)
    of = data(100, 0.1)
    sizes = sizes_of(stage, of, 1)
    states = [state for *_, state in steps_of(stage, of, sizes, monkeypatch)]
    epoch = dataclasses.replace(stage, steps=0)
    assert states[-1]["counts"]["seen"] > 100 and len(states[-1]["waiting"]) > 16
    over = [stage_is_over(epoch, 100, state) for state in states]
    assert over[-1] and not over[8]
    # One that was not ends behind as many records as an epoch has.
    rest = list(steps_of(epoch, of, sizes, monkeypatch, states[over.index(True) - 1]))
    assert [fed.last for _, _, fed, _ in rest] == [True]


def test_what_waited_is_measured_anew_when_a_run_goes_on(monkeypatch, caplog):
    """Its file was changed between two starts: longer, shorter, with more crops, beyond use, or gone."""
    stage = StageConfig("s", "d", batch_size=4, packing=True, max_length=LENGTH)
    of = data(40)
    sizes = sizes_of(stage, of, 1, 4)
    state = next(steps_of(stage, of, sizes, monkeypatch))[-1]
    waiting = [Measured(*one) for one in state["waiting"]]
    assert len(waiting) >= 12 and not caplog.text
    longer, shorter, wider, useless, *same = [one.number for one in waiting]
    changed = Data(list(of.source), of.spec)
    changed.source[longer] = of.source[longer]._replace(length=95)
    changed.source[shorter] = of.source[shorter]._replace(length=3)
    changed.source[wider] = of.source[wider]._replace(crops=3)
    changed.source[useless] = None
    steps = list(steps_of(stage, changed, sizes, monkeypatch, state))
    assert f"4 of the {len(waiting)} records that were read and waited for their step have changed since" in caplog.text
    assert "1 of them beyond use" in caplog.text
    assert [bad.where for bad in steps[0][2].bad] == [f"record {useless}"]
    met = {m.number: m for rows, *_ in steps for row in rows for m in row}
    for number in (longer, shorter, wider, *same):
        assert met[number]._replace(arrived=0) == changed.source[number]
    for rows, crops, *_ in steps:
        assert sum(m.crops for row in rows for m in row) <= crops
        assert all(sum(m.length + m.rounds for m in row) <= LENGTH for row in rows)
    # With fewer records than before, those that went are bad ones.
    fewer = Data(of.source[: max(same)], of.spec)
    steps = list(steps_of(stage, fewer, sizes, monkeypatch, state))
    assert max(same) not in {m.number for rows, *_ in steps for row in rows for m in row}


def test_lists_of_earlier_versions_are_completed_and_have_not_changed(monkeypatch, caplog):
    stage = StageConfig("s", "d", batch_size=4, packing=True, max_length=LENGTH)
    of = data(40)
    of.source[:] = [one._replace(question=one.number % 7) for one in of.source]
    sizes = sizes_of(stage, of, 1, 4)
    state = next(steps_of(stage, of, sizes, monkeypatch))[-1]
    older = {**state, "waiting": [one[:5] for one in state["waiting"]]}
    now, before = (list(steps_of(stage, of, sizes, monkeypatch, one)) for one in (state, older))
    assert [rows for rows, *_ in now] == [rows for rows, *_ in before]
    assert {m.question for rows, *_ in before for row in rows for m in row} == set(range(7))
    assert "changed since" not in caplog.text


def test_all_processes_take_what_the_first_measures_anew(monkeypatch):
    """Whatever their own files say by then; and it takes more than one message."""
    monkeypatch.setattr(loader, "_MOST_SENT", 5)
    stage = StageConfig("s", "d", batch_size=4, packing=True, max_length=LENGTH)
    of, store = data(40), Store()
    sizes = sizes_of(stage, of, 1, 4)
    state = next(steps_of(stage, of, sizes, monkeypatch))[-1]
    repaired = Data([one._replace(length=one.length + 7) for one in of.source], of.spec)
    repaired.source[state["waiting"][3][0]] = None
    numbers, taken = [one[0] for one in state["waiting"]], []
    for process, own in enumerate((repaired, of)):
        board = Board("run", store, process, 2)
        steps = list(steps_of(stage, own, sizes, monkeypatch, state, board))
        assert [bad.where for bad in steps[0][2].bad] == [f"record {numbers[3]}"]
        met = {m.number: m.length for rows, *_ in steps for row in rows for m in row}
        taken.append([met.get(number) for number in numbers])
    assert taken[0] == taken[1] == [(n != numbers[3] or None) and of.source[n].length + 7 for n in numbers]
    assert len([name for name in store.texts if name.endswith("/read")]) >= 3
