"""Replies that were paid for survive whatever happens."""

import multiprocessing
import os
import signal
import threading

import pytest

from fusion_jax.errors import UserError
from fusion_jax.synth.journal import Journal, make_key


def test_what_goes_in_comes_out(tmp_path):
    journal = Journal(tmp_path / "j")
    value = {"text": 'two\nlines "quoted" naïve 🐱 \ud83d', "tokens": [1, 2], "state": None}
    journal.put(make_key("a"), value)
    assert journal.get(make_key("a")) == value
    assert journal.get(make_key("b")) is None
    again = Journal(tmp_path / "j")
    assert again.get(make_key("a")) == value
    assert list(again.values()) == [value]


def test_keys_tell_apart():
    keys = {make_key("a", {"b": 1}), make_key("a", {"b": 2}), make_key("a", {"b": "1"}), make_key(["a", {"b": 1}])}
    assert len(keys) == 4
    assert make_key({"a": 1, "b": 2}) == make_key({"b": 2, "a": 1})


@pytest.mark.parametrize("cut", [1, 10, 40])
def test_torn_last_line(tmp_path, cut):
    journal = Journal(tmp_path)
    for i in range(3):
        journal.put(make_key(i), {"text": f"number {i}", "more": "x" * 50})
    (file,) = tmp_path.glob("*.jsonl")
    data = file.read_bytes()
    file.write_bytes(data[:-cut])
    again = Journal(tmp_path)
    assert [again.get(make_key(i)) is not None for i in range(3)] == [True, True, False]
    again.put(make_key(2), {"text": "once more"})
    assert Journal(tmp_path).get(make_key(2)) == {"text": "once more"}


def test_processes_see_each_other(tmp_path):
    ours, theirs = Journal(tmp_path), Journal(tmp_path)
    theirs.put(make_key("x"), {"text": "x"})
    assert ours.get(make_key("x")) is None
    ours.refresh()
    assert ours.get(make_key("x")) == {"text": "x"}
    theirs.put(make_key("y"), {"text": "y"})
    ours.refresh()
    assert ours.get(make_key("y")) == {"text": "y"}


def test_threads(tmp_path):
    journal = Journal(tmp_path)

    def work(k):
        for i in range(200):
            journal.put(make_key(k, i), {"text": f"{k} {i} " + "x" * (i % 7)})
            assert journal.get(make_key(k, i))["text"].startswith(f"{k} {i} ")

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Journal(tmp_path)) == len(list(Journal(tmp_path).values())) == 1600


def _write_for_ever(folder, told):
    journal = Journal(folder)
    for i in range(10**9):
        journal.put(make_key(i), {"text": "x" * 5000})
        told.value = i


def test_killed_writer_loses_nothing(tmp_path):
    context = multiprocessing.get_context("spawn")
    told = context.Value("q", -1)
    writer = context.Process(target=_write_for_ever, args=(tmp_path, told))
    writer.start()
    while told.value < 20:
        pass
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    journal = Journal(tmp_path)
    assert all(journal.get(make_key(i)) == {"text": "x" * 5000} for i in range(told.value + 1))
    assert told.value + 1 <= len(journal) <= told.value + 2


def test_unwritable(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="journal"):
        Journal(tmp_path / "file" / "j")


def test_damaged_lines_of_a_journal_are_passed_over(tmp_path):
    journal = Journal(tmp_path)
    for i in range(4):
        journal.put(make_key(i), {"text": f"number {i}"})
    journal.close()
    (file,) = tmp_path.glob("*.jsonl")
    lines = file.read_bytes().splitlines(True)
    lines[1] = lines[1].replace(b'"text"', b'"te\xff"')
    lines[2] = b"zz" + lines[2][2:]
    garbage = [
        b"\n",
        b"x\n",
        b"\0" * 100 + b"\n",
        b"g" * 32 + b" {}\n",
        b"a" * 32 + b" " + b"[" * 100_000 + b"\n",
        b"0" * 32 + b" {[}\n",
    ]
    file.write_bytes(b"".join([*lines, *garbage]))
    again = Journal(tmp_path)
    assert [again.get(make_key(i)) is not None for i in range(4)] == [True, False, False, True]
    assert again.get("a" * 32) is None and again.get("0" * 32) is None
    assert len(list(again.values())) == 2
    # Asked for once more, they are there for good, whichever file is read first.
    for i in (1, 2):
        again.put(make_key(i), {"text": f"number {i}"})
    again.close()
    third = Journal(tmp_path)
    assert [third.get(make_key(i)) for i in range(4)] == [{"text": f"number {i}"} for i in range(4)]
    assert len(list(third.values())) == 4
