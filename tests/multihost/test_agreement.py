"""Two real processes: what one alone meets changes no plan, or ends both with one sentence and one exit code."""

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers.killing import check_the_first_goes_on_later
from PIL import Image

from fusion_jax.synth.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[2]
WORKER = ROOT / "tests" / "multihost" / "worker.py"
RECORDS = 48
MISSING = {0: 5, 1: 11}  # the image that each process alone lacks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("agreement")
    rng = np.random.default_rng(0)
    for i in range(RECORDS):
        picture = Image.fromarray(np.zeros((48, int(rng.integers(30, 90)), 3), np.uint8))
        for process in (0, 1):
            (folder / str(process)).mkdir(exist_ok=True)
            if i != MISSING[process]:
                picture.save(folder / str(process) / f"{i}.png")
    records = [
        {
            "id": str(i),
            "image": f"{i}.png",
            "conversations": [
                {"from": "human", "value": "<image>\nwhat is it"},
                {"from": "gpt", "value": "a cat" + " and a dog" * (i % 5)},
            ],
        }
        for i in range(RECORDS)
    ]
    (folder / "data.json").write_text(json.dumps(records))
    for process, word in ((0, "cat"), (1, "cow")):
        (folder / str(process) / "data.json").write_text(json.dumps(records).replace("cat", word))
    train_tokenizer(["what is it", "a cat and a dog and a cow"] * 20, folder / "tokenizer", vocab_size=320)
    return folder


def start(what, folder, processes=2):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"
    command = [sys.executable, WORKER, what, folder, address, f"{processes}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return [subprocess.Popen([*command, f"{i}"], env=environment, **pipes) for i in range(processes)]


def run(what, folder):
    """Exit codes and outputs."""
    started = start(what, folder)
    try:
        outputs = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [process.returncode for process in started], outputs


def check_one_end(ran, code, sentence):
    codes, outputs = ran
    assert codes == [code, code], "\n----\n".join(outputs)
    sentences = {line for output in outputs for line in output.splitlines() if line.startswith("error: process ")}
    assert len(sentences) == 1 and sentence in sentences.pop(), outputs
    assert all("error: process " in output for output in outputs)


def test_a_file_that_one_process_lacks_changes_no_plan(folder):
    codes, outputs = run("plans", folder)
    assert codes == [0, 0], "\n----\n".join(outputs)
    one, two = (json.loads((folder / f"plans{process}.json").read_text()) for process in (0, 1))
    gaps = []
    for kind in ("packed", "one_a_row"):
        a, b = one[kind], two[kind]
        assert a["steps"] == b["steps"] and a["planned"] == b["planned"] and a["state"] == b["state"]
        assert len(a["planned"]) == 6 and sum(len(row) for step in a["planned"] for row in step) > 40
        fed = [step[: len(step) // 2] for step in a["planned"]], [step[len(step) // 2 :] for step in b["planned"]]
        for part, ran in zip(fed, (a, b)):
            numbers = [number for step in part for row in step for number in row]
            assert sorted(number for number, _ in ran["fed"][: len(numbers)]) == sorted(numbers)
        # What process 0 cannot measure is in no plan; what process 1 cannot read is a gap in its own rows.
        planned = Counter(number for step in a["planned"] for row in step for number in row)
        assert not planned[MISSING[0]]
        assert not any(bad for _, bad in a["fed"])
        gaps.append(sum(number == MISSING[1] for step in fed[1] for row in step for number in row))
        assert a["state"]["counts"]["bad"]["missing_image"] >= 1 + gaps[-1]
    assert sum(gaps), "no step held the image that process 1 lacks in its rows"


@pytest.mark.parametrize(
    ("what", "code", "sentence"),
    [
        (
            "other_plans",
            2,
            "The processes have planned different batches by step 6 of packed (process 1 and process 0)",
        ),
        ("bad_records", 2, "missing_image), more than max_bad_records=0.2 allows"),
        ("other_data", 2, "The data of stage 'one_a_row' are not the same for all processes: process 1 has"),
        ("alone_in_a_step", 2, "error: process 1 of this run: the sentence of process 1"),
        ("bug", 1, "error: process 0 of this run: ValueError: a mistake of ours"),
        ("report", 1, "error: process 1 of this run: OSError: not survived"),
        ("restore", 2, "cannot be read by every process (the disk of process 1)"),
    ],
)
def test_an_error_of_one_is_an_error_of_all(folder, tmp_path, what, code, sentence):
    if what == "bad_records":
        for i in range(0, RECORDS, 2):
            (folder / "1" / f"{i}.png").unlink()
    ran = run(what, tmp_path if what == "restore" else folder)
    check_one_end(ran, code, sentence)
    if what == "report":
        assert all("went on" in output for output in ran[1])
    if what == "restore":
        assert all("restored 1" in output for output in ran[1])
    if what == "bug":
        assert "Traceback" in ran[1][0] and "Traceback" not in ran[1][1]


def test_where_one_is_killed_in_a_collective_the_other_is_to_start_again(tmp_path):
    """The runtime's error is no JaxRuntimeError everywhere."""
    check_the_first_goes_on_later(*start("endless", tmp_path), (tmp_path / "lives0").exists, 200)
