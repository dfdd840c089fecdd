"""Short versions of the proofs of survival: real processes that are killed, stopped, damaged and refused."""

import os
import signal
import subprocess
import sys

import pytest
from soak import soak_data, soak_numbers, soak_report, soak_runs
from soak.soak_runs import ROOT

pytestmark = pytest.mark.slow


def test_a_run_that_is_killed_refused_stopped_and_damaged_ends_as_if_nothing_had_been(tmp_path):
    """One run after all of it: its parameters and losses are bit for bit those of an undisturbed one."""
    lab = soak_runs.Lab(tmp_path, ROOT / ".jax_cache")
    workdir = tmp_path / "disturbed"
    assert soak_runs.kill(lab, workdir, 5).startswith("5 kills")
    assert "process and host" in soak_runs.refuse(lab, workdir)
    assert "exit code 75" in soak_runs.terminate(lab, workdir)
    assert "as undisturbed" in soak_runs.truncate_newest(lab, workdir)
    # Another config is refused before anything is compiled.
    code, output = lab.run(workdir, "--config.model.vision.mlp_dim=64", "--config.model.llm.mlp_dim=64")
    assert code == 2 and output.count("\n") == 1, output
    assert "model.vision.mlp_dim=64 (checkpoint: 32), model.llm.mlp_dim=64 (checkpoint: 48)" in output


def test_data_that_is_cut_in_mid_run_ends_it_in_a_sentence_at_worst(tmp_path):
    """Neither a crash (SIGBUS, where the file is mapped) nor a hang; with the data put back the run goes on."""
    lab = soak_runs.Lab(tmp_path, ROOT / ".jax_cache")
    assert soak_data.change(lab, "JSON cut", 0.9) in ("one sentence, code 2", "goes on, bad records counted")


def test_a_learning_rate_that_ruins_a_run_does_not_ruin_its_checkpoints(tmp_path):
    """Started again with a sane rate, the run learns as if nothing had been."""
    lab = soak_runs.Lab(tmp_path, ROOT / ".jax_cache")
    assert "skipped, code 2" in soak_numbers.diverge(lab, "learning rate 1e30", None)


def test_a_proof_that_is_made_alone_replaces_its_own_row(tmp_path):
    """Others keep theirs, with the day and the commit at which they were made, in the same order."""
    report = tmp_path / "soak.md"
    for name, rest in (
        ("Kills", "20 kills | 9 s | May"),
        ("Full disk", "went on | 5 s | May"),
        ("Kills", "3 | 1 s | June"),
    ):
        soak_report.put_row(report, name, rest)
    rows = [line for line in report.read_text().splitlines() if line.startswith("|")]
    assert rows[2:] == ["| Kills | 3 | 1 s | June |", "| Full disk | went on | 5 s | May |"]


def test_saved_on_eight_devices_restored_on_fewer(tmp_path):
    """In another process, into the shardings of other meshes, bit for bit."""
    script = tmp_path / "eight.py"
    script.write_text(EIGHT)
    for action, devices in (("save", 8), ("restore", 4)):
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, script, action, tmp_path / "checkpoints"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
    assert done.stdout == "4 2 1 "


EIGHT = """
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from fusion_jax.training import checkpoint
from fusion_jax.training.state import TrainState

action, folder = sys.argv[1:]


def state(*mesh):
    devices = np.array(jax.devices()[: int(np.prod(mesh))]).reshape(mesh)
    mesh = jax.sharding.Mesh(devices, ("fsdp", "tensor"))
    kernel = np.random.default_rng(0).standard_normal((64, 48)).astype(np.float32)
    everywhere = NamedSharding(mesh, PartitionSpec())
    dealt = jax.device_put(kernel, NamedSharding(mesh, PartitionSpec("fsdp", "tensor")))
    counts = [jax.device_put(jnp.int32(i), everywhere) for i in range(3)]
    return TrainState(counts[0], {"kernel": dealt}, {"mu": dealt * 2}, counts[1], counts[2])


checkpoints = checkpoint.Checkpoints(Path(folder), {"json": "{}"})
if action == "save":
    checkpoints.finish(3, state(4, 2), {"next": 3}, patience=0)
else:
    for mesh in ((2, 2), (1, 2), (1, 1)):
        wanted = state(*mesh)
        _, restored, _ = checkpoints.restore(jax.eval_shape(lambda: wanted) if mesh == (1, 1) else wanted)
        for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_array_equal(a, b)
            assert mesh == (1, 1) or a.sharding == b.sharding
        print(wanted.params["kernel"].sharding.num_devices, end=" ")
"""


@pytest.mark.parametrize("second", [True, False])
def test_signals_before_the_first_step_end_at_once(second):
    """Even while the main thread is in long native code, which no Python handler interrupts."""
    script = (
        "import sys, ctypes\nfrom fusion_jax.training import stopping\n"
        "with stopping.Stop() as stop:\n"
        f"    stop.nothing_to_lose = {not second}\n    print('ready', flush=True)\n"
        "    while True:\n        ctypes.CDLL(None).usleep(3_000_000)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        if second:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.5)
            process.send_signal(signal.SIGTERM)
        assert process.wait(10) == (128 + signal.SIGTERM if second else 75)
    finally:
        process.kill()
