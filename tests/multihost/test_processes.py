"""Two and four real processes on this machine: they train as one, save, and go on from what they saved."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from helpers.killing import check_the_first_goes_on_later
from helpers.shapes_data import make_shapes

from fusion_jax.devices import distributed
from fusion_jax.errors import UserError
from fusion_jax.training.jsonl import read_rows
from fusion_jax.training.loading import load_model

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "tests" / "multihost" / "one_stage.py"
INTERLEAVED = [str(ROOT / "tests" / "multihost" / "interleaved.py")]
EXACT = ("step", "total", "ce", "v2t", "t2v", "grad_norm", "validation/ce")


def test_arguments_that_make_no_sense_are_refused():
    for arguments, words in (
        (("localhost:1", None, None), "--num_processes, --process_id as well"),
        (("localhost:1", 0, 0), "num_processes=0"),
        (("localhost:1", 2, 2), "process_id=2 must be from 0 to 1"),
    ):
        with pytest.raises(UserError, match=words):
            distributed.start(*arguments)


@pytest.mark.parametrize(
    ("environment", "scheduled", "devices"),
    [
        ({}, False, None),
        ({"SLURM_NTASKS": "4"}, False, None),  # a shell inside an allocation, not a task
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "a"}, False, None),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "a"}, True, None),
        (
            {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "a", "SLURM_STEP_NUM_NODES": "2",
             "SLURM_GPUS_ON_NODE": "8"},
            True, list(range(8)),
        ),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True, None),
    ],
)  # fmt: skip
def test_a_scheduler_is_noticed(monkeypatch, environment, scheduled, devices):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_")):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert distributed._scheduled() == scheduled
    assert distributed._slurm_devices() == devices


def start(data, workdir, processes, *overrides, devices=1, program=("-m", "fusion_jax.train")):
    """Starts that many processes of one run, each with so many devices."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
        # On CPU only process 0 would ever find its programs there, and then wait for the others for longer than it can.
        "JAX_ENABLE_COMPILATION_CACHE": str(processes == 1),
    }
    started = []
    for process in range(processes):
        arguments = [f"--config={CONFIG}:{data}", f"--workdir={workdir}", *overrides]
        if processes > 1:
            arguments += [f"--coordinator_address={address}", f"--num_processes={processes}", f"--process_id={process}"]
        command = [sys.executable, *program, *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment, **pipes))
    return started


def train(data, workdir, processes, *overrides, timeout=600, **how):
    """Runs that many processes to their end; their outputs."""
    started = start(data, workdir, processes, *overrides, **how)
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(process.returncode == 0 for process in started), "\n----\n".join(output[-3000:] for output in outputs)
    return outputs


def rows(folder):
    return [{key: row[key] for key in EXACT if key in row} for row in read_rows(folder / "metrics.jsonl")]


def parameters(workdir, step=4):
    loaded = load_model(workdir / "stage2" / "checkpoints" / str(step))
    return {path: np.asarray(leaf) for path, leaf in flatten_dict(loaded.params, sep="/").items()}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("scenes") / "data", "16,16,32,4,4")


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone")
    train(data, workdir, 1)
    return workdir


@pytest.fixture(scope="module")
def pair(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("pair")
    outputs = train(data, workdir, 2, "--config.mesh.data=1", "--config.mesh.fsdp=2")
    return workdir, outputs


def check_agreement(workdir, processes):
    first = rows(workdir / "stage2")
    assert [row["step"] for row in first if "total" in row] == [1, 2, 3, 4] and "validation/ce" in first[-1]
    for process in range(1, processes):
        assert rows(workdir / "stage2" / "processes" / str(process)) == first
    return first


def check_closeness(ours, theirs, ours_at, theirs_at):
    for a, b in zip(ours, theirs, strict=True):
        for key in b:
            np.testing.assert_allclose(a[key], b[key], rtol=1e-4, err_msg=key)
    a, b = parameters(ours_at, 2), parameters(theirs_at, 2)
    assert a.keys() == b.keys()
    differences = {path: np.abs(a[path] - b[path]).max() for path in b if not path.endswith("key/bias")}
    assert max(differences.values()) < 2e-3, max(differences, key=differences.get)


@pytest.mark.slow
def test_two_processes_train_as_one(alone, pair):
    workdir, outputs = pair
    check_closeness(check_agreement(workdir, 2), rows(alone / "stage2"), workdir, alone)
    assert "in 2 process(es)" in outputs[0] and "fsdp 2" in outputs[0]
    assert "step" not in outputs[1], "only the first process speaks"


@pytest.mark.slow
def test_two_processes_go_on_bit_for_bit(data, pair, tmp_path):
    workdir, _ = pair
    again = tmp_path / "again"
    shutil.copytree(workdir, again)
    shutil.rmtree(again / "stage2" / "checkpoints" / "4")
    outputs = train(data, again, 2, "--config.mesh.data=1", "--config.mesh.fsdp=2")
    assert "continues after step 2" in outputs[0]
    assert check_agreement(again, 2) == check_agreement(workdir, 2)
    ours, theirs = parameters(again), parameters(workdir)
    for path in theirs:
        np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)


@pytest.mark.slow
def test_four_processes_go_on_where_two_were(data, pair, alone, tmp_path):
    workdir, _ = pair
    more = tmp_path / "more"
    shutil.copytree(workdir, more)
    shutil.rmtree(more / "stage2" / "checkpoints" / "4")
    shutil.rmtree(more / "stage2" / "processes")
    train(data, more, 4, "--config.mesh.data=2", "--config.mesh.fsdp=-1")
    first = rows(more / "stage2")
    for process in (1, 2, 3):  # they saw the last two steps only
        assert rows(more / "stage2" / "processes" / str(process)) == first[2:]
    check_closeness(first, rows(alone / "stage2"), more, alone)


def printed(output, what):
    """Lists that `interleaved.py` has printed."""
    return [json.loads(line.removeprefix(what)) for line in output.splitlines() if line.startswith(f"{what} [")]


@pytest.mark.slow
def test_processes_with_interleaved_devices_give_the_figures_of_one(data, tmp_path):
    """Training, validation, sample answers, a benchmark; and going on from what one process has saved."""
    alone, two = tmp_path / "alone", tmp_path / "two"
    how = ("--config.mesh.data=1", "--config.mesh.fsdp=4")
    (expected,) = train(f"{data},4,packed", alone, 1, *how, devices=4, program=INTERLEAVED)
    answers, logits = (printed(expected, what) for what in ("answers", "logits"))
    assert [len(batch) for batch in answers] == [1, 8] and [len(batch) for batch in logits] == [4, 16]
    assert np.diff(np.sort(logits[1][:8])).min() > 4e-3  # so that one row is told from another
    restored = tmp_path / "restored"
    shutil.copytree(alone, restored)
    shutil.rmtree(restored / "stage2" / "checkpoints" / "4")
    for workdir in (two, restored):
        outputs = train(f"{data},4,packed", workdir, 2, *how, devices=2, program=INTERLEAVED)
        for output in outputs:
            assert printed(output, "answers") == answers
            for ours, theirs in zip(printed(output, "logits"), logits, strict=True):
                np.testing.assert_allclose(ours, theirs, atol=1e-3)
        first = rows(workdir / "stage2")
        assert rows(workdir / "stage2" / "processes" / "1") == (first if workdir == two else first[2:])
        check_closeness(first, rows(alone / "stage2"), workdir, alone)
    assert "continues after step 2" in outputs[0]


@pytest.mark.slow
def test_where_one_process_dies_the_other_says_so_and_ends(data, tmp_path):
    both = start(f"{data},100000", tmp_path, 2, "--config.validate_every=0")
    check_the_first_goes_on_later(*both, lambda: rows_written(tmp_path / "stage2"), 300)


def rows_written(folder):
    path = folder / "metrics.jsonl"
    return path.exists() and path.read_text().count("\n")
