"""Bad records and plans over several processes, whose statements are given here; real ones: tests/multihost."""

from collections import Counter
from types import SimpleNamespace

import pytest
from helpers.fixtures import tiny

from fusion_jax.config import RunConfig, StageConfig
from fusion_jax.data.loader import Fed
from fusion_jax.data.planner import Counts
from fusion_jax.devices import distributed
from fusion_jax.errors import BadRecord, UserError
from fusion_jax.training import input_check
from fusion_jax.training.input_check import InputCheck

STAGE = StageConfig("s", "d.json", batch_size=4)
CUT, GONE = BadRecord("bad_image", "d.json:3", "cut"), BadRecord("missing_image", "d.json:5", "gone")


class Said(Exception):
    """Ends a process's agreement once its statement is known."""


def processes(folder, monkeypatch, *held_and_gaps):
    """One check for each process, behind a step in which it met these gaps; the same plan in all."""
    monkeypatch.setattr("jax.process_count", lambda: len(held_and_gaps))
    checks, values = [], []

    def listen(value):
        values.append(value)
        raise Said

    monkeypatch.setattr(distributed, "gather", listen)
    for held, gaps in held_and_gaps:
        check = InputCheck(RunConfig(tiny(), (STAGE,), "", max_bad_records=0.5), STAGE, 10, folder, held)
        fed = Fed(None, 4 - len(gaps), tuple(gaps), len(gaps), 7)
        check.note(1, fed, Counts(seen=10, bad=Counter(gap.reason for gap in gaps)))
        with pytest.raises(Said):
            check.agree(1)
        checks.append(check)
    monkeypatch.setattr(distributed, "gather", lambda value: values)
    return checks


@pytest.mark.parametrize(("gaps", "left"), [((CUT, GONE), True), ((CUT, GONE, CUT, CUT), False)])
def test_a_stage_that_ends_without_a_usable_record_says_so(tmp_path, gaps, left):
    """Behind its last step, however many may be bad."""
    check = InputCheck(RunConfig(tiny(), (STAGE,), "", max_bad_records=1.0), STAGE, 4, tmp_path)
    counts = Counts(seen=4, bad=Counter(gap.reason for gap in gaps))
    check.note(1, Fed(None, 4 - len(gaps), gaps, len(gaps), 7), counts)
    last = Fed(None, 4 - len(gaps), gaps, len(gaps), 7, last=True)
    check = InputCheck(RunConfig(tiny(), (STAGE,), "", max_bad_records=1.0), STAGE, 4, tmp_path)
    if left:
        check.note(1, last, counts)
    else:
        with pytest.raises(UserError, match=r"None of the 4 records of d.json can be used any more \(the last: .*cut"):
            check.note(1, last, counts)


def test_gaps_of_all_rows_are_summed(tmp_path, monkeypatch):
    for check in processes(tmp_path, monkeypatch, ((0,), [CUT]), ((1,), [CUT, GONE])):
        assert check.agree(1).bad == {"bad_image": 2, "missing_image": 1}


def test_processes_that_feed_the_same_rows_count_their_gaps_once(tmp_path, monkeypatch):
    for check in processes(tmp_path, monkeypatch, ((0, 1), [CUT, GONE]), ((0, 1), [CUT, GONE])):
        assert check.agree(1).bad == {"bad_image": 1, "missing_image": 1}


def test_processes_that_feed_the_same_rows_must_read_the_same_images(tmp_path, monkeypatch):
    for check in processes(tmp_path, monkeypatch, ((0, 1), [CUT]), ((0, 1), [])):
        with pytest.raises(UserError, match="Processes 0 and 1 feed the same rows of s, and one of them cannot read"):
            check.agree(1)


def test_processes_must_have_the_same_tokenizer(monkeypatch):
    """Tokens of another one may be as many, which no plan tells."""
    tokenizer = SimpleNamespace(fingerprint="a", folder="tokenizer")
    monkeypatch.setattr(distributed, "gather", lambda value: [value, "a"])
    input_check.check_same_tokenizer(tokenizer)
    monkeypatch.setattr(distributed, "gather", lambda value: [value, "b"])
    with pytest.raises(UserError, match=r"tokenizer is not the same for all processes: the files in .* of process 1"):
        input_check.check_same_tokenizer(tokenizer)


def test_processes_must_have_the_same_data(monkeypatch):
    part = {"name": "d.json", "drawn": 4, "chosen": 1, "records": 4, "bytes": 10, "hash": "a"}
    monkeypatch.setattr(distributed, "gather", lambda value: [value, [{**part, "hash": "b", "records": 5}]])
    with pytest.raises(UserError, match=r"process 1 has d.json with 5 records \(process 0: 4\); give all machines"):
        input_check.check_same_data("stage 's'", [part])
