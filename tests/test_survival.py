"""Short versions of the proofs of survival: real processes that are killed, stopped, damaged and refused."""

import signal
import subprocess
import sys

import pytest
import soak
from soak import ROOT

from fusion_jax import metrics

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return soak.Lab(tmp_path_factory.mktemp("survival"), ROOT / ".jax_cache")


def test_five_kills_change_nothing(lab):
    assert soak.kills(lab, 5).startswith("5 kills")


def test_request_to_stop_saves_and_goes_on_exactly(lab):
    assert "exit code 75" in soak.terminate(lab, ("stage2", 4), signal.SIGINT)


def test_truncated_file_in_the_newest_checkpoint_falls_back_one(lab):
    assert "set aside" in soak.truncate_newest(lab)


def test_live_workdir_and_another_config_are_refused(lab):
    """While one run is alive a second is refused; a finished one is not continued with another config."""
    workdir = lab.folder / "live"
    process = lab.start(workdir)
    try:
        soak.wait_for_step(process, workdir, "stage1", 1)
        code, said = lab.run(workdir)
        assert code == 2 and f"{workdir} is in use by a live run (process {process.pid} on " in said, said
    finally:
        process.kill()
        process.wait()
    code, said = lab.run(lab.undisturbed, "--config.seed=7", "--config.model.llm.mlp_dim=64")
    assert code == 2 and said.count("\n") == 1, said
    assert "model.llm.mlp_dim=64 (checkpoint: 48), seed=7 (checkpoint: 42)" in said
    # What is traced lies in the workdir; a learning rate may change on the way.
    code, said = lab.run(workdir, "--profile_steps=3:4", "--config.stages[0].learning_rate=0.001")
    assert code == 0, said
    for stage in ("stage1", "stage2"):
        assert list((workdir / stage / "profile").rglob("*.xplane.pb"))
        shares = [
            row["input_wait_share"] + row["compute_share"] + row["checkpoint_share"]
            for row in metrics.read(workdir / stage / "metrics.jsonl")
        ]
        assert all(0 < share < 1.01 for share in shares), shares


@pytest.mark.parametrize("second", [True, False])
def test_signals_before_the_first_step_end_at_once(second):
    """Even while the main thread is in long native code, which no Python handler interrupts."""
    script = (
        "import sys, ctypes\nfrom fusion_jax import watch\n"
        "with watch.Stop() as stop:\n"
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
