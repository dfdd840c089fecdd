"""Proofs of survival with real runs in real processes; `launch/soak.sh` runs the long versions, tests the short ones.

Every proof compares the final parameters, bit for bit, with those of one undisturbed run.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

from fusion_jax import checkpoint, metrics
from fusion_jax.errors import AGAIN
from fusion_jax.synth.make_scenes import ScenesConfig, make_scenes

ROOT = Path(__file__).parents[1]
STAGES, STEPS = ("stage1", "stage2"), 24
PATIENCE = 600  # seconds for one run, on a slow machine


class Lab:
    """Data, a compilation cache for all runs, and the undisturbed run."""

    def __init__(self, folder: Path, cache: Path):
        self.folder, self.cache = folder, cache
        sizes = ScenesConfig(stage1=48, stage1_5=48, stage2=48, validation=8, held_out=16, pixels=48)
        self.data = make_scenes(folder / "data", sizes, workers=1, progress=False)
        self.undisturbed = folder / "undisturbed"
        code, said = self.run(self.undisturbed)
        assert code == 0, said

    def start(self, workdir: Path, *arguments, devices: int = 1) -> subprocess.Popen:
        """A training run. What it says goes to `WORKDIR.log`, start after start."""
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self.cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        }
        config = f"{ROOT / 'tests' / 'tiny_run.py'}:{self.data},survival"
        command = [sys.executable, "-m", "fusion_jax.train", "--config", config, "--workdir", str(workdir), *arguments]
        with workdir.with_suffix(".log").open("a") as log:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def run(self, workdir: Path, *arguments, devices: int = 1) -> tuple[int, str]:
        """A run to its end: exit code, and what this start said."""
        log = workdir.with_suffix(".log")
        before = log.stat().st_size if log.exists() else 0
        process = self.start(workdir, *arguments, devices=devices)
        try:
            code = process.wait(PATIENCE)
        finally:
            process.kill()
        return code, log.read_text()[before:]

    def assert_undisturbed(self, workdir: Path) -> int:
        """Number of parameter arrays, all of which are those of the undisturbed run."""
        ours, theirs = (jax.tree.leaves(checkpoint.load_model(w).params) for w in (workdir, self.undisturbed))
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        exact = ("step", "total", "ce", "v2t", "t2v", "grad_norm", "records_seen")
        for stage in STAGES:
            rows = [metrics.read(w / stage / "metrics.jsonl") for w in (workdir, self.undisturbed)]
            a, b = ([{key: row[key] for key in exact} for row in r] for r in rows)
            assert a == b, f"{workdir}: metrics of {stage} differ"
        return len(ours)


def wait_for_step(process: subprocess.Popen, workdir: Path, stage: str, step: int) -> None:
    """Returns when the run has reported that step of that stage, or has ended."""
    path, deadline = workdir / stage / "metrics.jsonl", time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        if path.exists() and any(row["step"] >= step for row in metrics.read(path)):
            return
        time.sleep(0.005)


def unfinished(workdir: Path) -> list[Path]:
    """Checkpoints that are being written."""
    return list(workdir.glob(f"*/{checkpoint.FOLDER}/*.orbax-checkpoint-tmp*"))


def wait_for_save(process: subprocess.Popen, workdir: Path) -> None:
    """Returns while the run writes a checkpoint, or when it has ended."""
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline and not unfinished(workdir):
        time.sleep(0.0005)


def kills(lab: Lab, count: int, seed: int = 0) -> str:
    """SIGKILL at random steps and, every third time, during a save, spread over both stages."""
    rng = random.Random(seed)
    workdir, hit = lab.folder / f"killed_{count}", 0
    total = STEPS * len(STAGES)
    for i in range(count):
        process = lab.start(workdir)
        # Further on with every kill, so that each finds the run alive.
        position = min(total - 2, int(total * (i + rng.random()) / count))
        stage, step = STAGES[position // STEPS], position % STEPS + 1
        wait_for_step(process, workdir, stage, step)
        if i % 3 == 2:
            wait_for_save(process, workdir)
        else:
            time.sleep(0.05 * rng.random())
        assert process.poll() is None, f"run {i + 1} ended before its kill: see {workdir.with_suffix('.log')}"
        process.kill()
        process.wait()
        hit += bool(unfinished(workdir))
    code, said = lab.run(workdir)
    assert code == 0, said
    arrays = lab.assert_undisturbed(workdir)
    assert hit >= count // 3 - 1, f"only {hit} kills during a save"
    return f"{count} kills, {hit} of them during a save; all {arrays} parameter arrays and every loss equal"


def terminate(lab: Lab, at: tuple[str, int], number: signal.Signals = signal.SIGTERM) -> str:
    """A request to stop: saved, exit code 75, and the next start goes on at that very step."""
    stage, step = at
    workdir = lab.folder / f"stopped_{stage}_{step}"
    process = lab.start(workdir)
    wait_for_step(process, workdir, stage, step)
    asked = time.monotonic()
    process.send_signal(number)
    code = process.wait(PATIENCE)
    seconds = time.monotonic() - asked
    assert code == AGAIN, f"exit code {code}: see {workdir.with_suffix('.log')}"
    saved = max(checkpoint.steps_in(workdir / stage / checkpoint.FOLDER))
    reported = metrics.read(workdir / stage / "metrics.jsonl")[-1]["step"]
    assert saved == reported >= step, "steps were done but not saved"
    assert seconds < 30, f"{seconds:.0f} s"
    code, said = lab.run(workdir)
    assert code == 0 and f"{stage} continues after step {saved}" in said, said
    lab.assert_undisturbed(workdir)
    return (
        f"{number.name} after step {step}: step {saved} saved, exit code {AGAIN} after {seconds:.1f} s; goes on exactly"
    )


def truncate_newest(lab: Lab) -> str:
    """The largest file of the newest checkpoint loses its second half."""
    workdir = lab.folder / "truncated"
    shutil.copytree(lab.undisturbed, workdir)
    folder = workdir / STAGES[-1] / checkpoint.FOLDER
    newest, before = checkpoint.steps_in(folder)[-1], checkpoint.steps_in(folder)[-2]
    path = max((p for p in (folder / str(newest)).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    os.truncate(path, path.stat().st_size // 2)
    code, said = lab.run(workdir)
    assert code == 0, said
    assert f"{path.name} has" in said and f"going back to step {before}" in said, said
    assert f"{STAGES[-1]} continues after step {before}" in said
    lab.assert_undisturbed(workdir)
    return f"checkpoint {newest} with a truncated file is named and set aside, {before} continues; the end is the same"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="empty folder for the runs")
    parser.add_argument("--report", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the twenty kills")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    lab = Lab(options.folder, options.folder / "compiled")
    proofs = {
        "Kills": lambda: kills(lab, max(3, round(20 * options.scale))),
        "Request to stop": lambda: terminate(lab, (STAGES[0], 10)),
        "Damage": lambda: truncate_newest(lab),
    }
    lines = []
    for name, proof in proofs.items():
        since = time.monotonic()
        result = proof()
        lines.append(f"| {name} | {result} | {time.monotonic() - since:.0f} s |")
        print(lines[-1], flush=True)
    versions = checkpoint.environment()
    devices, packages = versions["devices"], versions["packages"]
    options.report.write_text(
        "# Soak\n\n"
        f"Written by `bash launch/soak.sh` on {time.strftime('%F')}: {os.cpu_count()} cores, {devices['kind']}, "
        f"jax {packages['jax']}, orbax-checkpoint {packages['orbax-checkpoint']}, commit {versions['commit']}, "
        f"{time.monotonic() - begun:.0f} s in all. What each proof does is in `tests/soak.py`; each ends by comparing "
        f"final parameters bit for bit, and every reported loss, with those of one undisturbed run of "
        f"{len(STAGES)} stages of {STEPS} steps that saves every 3 steps.\n\n"
        "| proof | result | took |\n|---|---|---|\n" + "\n".join(lines) + "\n"
    )


if __name__ == "__main__":
    main()
