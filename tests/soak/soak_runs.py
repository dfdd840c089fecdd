"""Proofs of survival with real runs in real processes; `launch/soak.sh` runs the long versions, tests the short ones.

Here: what all proofs use, and a run that is killed, refused, stopped and damaged, or goes on elsewhere. The other
`soak_*.py` hold one subject each. In the end parameters are compared, bit for bit, with those of an undisturbed run.
"""

import contextlib
import functools
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from helpers.shapes_data import make_shapes

from fusion_jax.errors import AGAIN
from fusion_jax.training import lock
from fusion_jax.training.checkpoint_folders import FOLDER, steps_in
from fusion_jax.training.jsonl import read_rows
from fusion_jax.training.loading import load_model

ROOT = Path(__file__).parents[2]
STAGES, STEPS = ("stage1", "stage2"), 24
PATIENCE = 600  # seconds for one run, on a slow machine


class Skipped(Exception):
    """This machine does not allow the proof; the text says why."""


class Lab:
    """Data, a compilation cache for all runs, and the undisturbed run."""

    def __init__(self, folder: Path, cache: Path):
        self.folder, self.cache = folder, cache

    @functools.cached_property
    def data(self) -> Path:
        return make_shapes(self.folder / "data", "48,48,48,8,16")

    @functools.cached_property
    def undisturbed(self) -> Path:
        return self.reference("undisturbed")

    def reference(self, name: str, **settings) -> Path:
        """The workdir of a run, `name`, that nothing disturbs."""
        code, output = self.run(self.folder / name, **settings)
        assert code == 0, output
        return self.folder / name

    def start(
        self,
        workdir: Path,
        *arguments,
        devices: int = 1,
        name: str = "",
        data: Path | None = None,
        changes: str = "",
        cache: bool = True,
    ) -> subprocess.Popen:
        """A training run. What it says goes to `WORKDIR<name>.log`, start after start.

        Args:
          data: another folder than `self.data`. changes: of the config, "key=value,key=value". cache: whether compiled
          programs are shared by all runs; otherwise they lie in the workdir.
        """
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_NUM_CPU_DEVICES": str(devices),
        }
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        if cache:
            environment["JAX_COMPILATION_CACHE_DIR"] = str(self.cache)
        config = f"{ROOT / 'tests' / 'helpers' / 'tiny_run.py'}:{data or self.data},survival,{changes}"
        command = [sys.executable, "-m", "fusion_jax.train", "--config", config, "--workdir", str(workdir), *arguments]
        with log_of(workdir, name).open("a") as log:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def run(self, workdir: Path, *arguments, **settings) -> tuple[int, str]:
        """Runs to the end; returns the exit code and the output of this start. Settings as for `start`."""
        with self.running(workdir, *arguments, **settings) as (process, output):
            return process.wait(PATIENCE), output()

    @contextlib.contextmanager
    def running(self, workdir: Path, *arguments, **settings) -> Iterator[tuple[subprocess.Popen, Callable[[], str]]]:
        """Yields the process and a function that reads its output so far; kills it in the end if it still runs."""
        log = log_of(workdir)
        before = log.stat().st_size if log.exists() else 0
        process = self.start(workdir, *arguments, **settings)

        def output() -> str:
            with log.open("rb") as file:
                file.seek(before)
                return file.read().decode(errors="replace")

        try:
            yield process, output
        finally:
            process.kill()
            process.wait()

    def pair(self, workdir: Path) -> list[subprocess.Popen]:
        """A run of two processes. The second's log is `WORKDIR_1.log`."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"--coordinator_address=127.0.0.1:{free.getsockname()[1]}"
        ours = [(f"--process_id={i}", name) for i, name in enumerate(("", "_1"))]
        return [self.start(workdir, address, "--num_processes=2", which, name=name) for which, name in ours]


def assert_same(workdir: Path, undisturbed: Path) -> int:
    """Number of parameter arrays, all of which, and all reported losses, are those of the undisturbed run.

    In the metrics no step is missing or there twice, too.
    """
    ours, theirs = (jax.tree.leaves(load_model(w).params) for w in (workdir, undisturbed))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    exact = ("step", "total", "ce", "v2t", "t2v", "grad_norm", "records_seen", "validation/ce", "validation/v2t")
    for stage in STAGES:
        rows = [read_rows(w / stage / "metrics.jsonl") for w in (workdir, undisturbed)]
        a, b = ([{key: row[key] for key in exact if key in row} for row in r] for r in rows)
        assert a == b, f"{workdir}: metrics of {stage} differ"
    return len(ours)


def log_of(workdir: Path, name: str = "") -> Path:
    return workdir.with_name(f"{workdir.name}{name}.log")


def wait_for_step(process: subprocess.Popen, workdir: Path, stage: str, step: int) -> None:
    """Returns when the run has reported that step of that stage, or has ended."""
    path, deadline = workdir / stage / "metrics.jsonl", time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        if path.exists() and any(row["step"] >= step for row in read_rows(path)):
            return
        time.sleep(0.005)


@contextlib.contextmanager
def stopped(process: subprocess.Popen) -> Iterator[None]:
    """The process does nothing meanwhile."""
    process.send_signal(signal.SIGSTOP)
    yield
    process.send_signal(signal.SIGCONT)


def unfinished(workdir: Path) -> list[Path]:
    """Checkpoints that are being written."""
    return [p for end in ("*.orbax-checkpoint-tmp*", "*.writing") for p in workdir.glob(f"*/{FOLDER}/{end}")]


def wait_for_save(process: subprocess.Popen, workdir: Path) -> None:
    """Returns while the run writes a checkpoint, or when it has ended."""
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline and not unfinished(workdir):
        time.sleep(0.0005)


def kill(lab: Lab, workdir: Path, count: int, seed: int = 0) -> str:
    """SIGKILL at random steps and, every third time, during a save, in the first stage and half of the second."""
    rng, hit, total = random.Random(seed), 0, STEPS + STEPS // 2
    for i in range(count):
        process = lab.start(workdir)
        # Further on with every kill, so that each finds the run alive.
        stage, step = divmod(int(total * (i + rng.random()) / count), STEPS)
        wait_for_step(process, workdir, STAGES[stage], step + 1)
        if i % 3 == 2:
            wait_for_save(process, workdir)
        else:
            time.sleep(0.05 * rng.random())
        assert process.poll() is None, f"run {i + 1} ended before its kill: see {log_of(workdir)}"
        process.kill()
        process.wait()
        hit += bool(unfinished(workdir))
    assert hit >= count // 3 - 1, f"only {hit} kills during a save"
    return f"{count} kills, {hit} of them during a save"


def refuse(lab: Lab, workdir: Path) -> str:
    """A second run in the workdir of a live one, which is stopped meanwhile and killed afterwards."""
    process = lab.start(workdir)
    deadline = time.monotonic() + PATIENCE
    while str(process.pid) not in (workdir / lock.FILE).read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)
    code, output = lab.run(workdir)
    process.kill()
    process.wait()
    message = f"error: {workdir} is in use by a live run (process {process.pid} on {socket.gethostname()}"
    assert code == 2 and message in output, output
    return "exit code 2, one sentence with process and host"


def terminate(lab: Lab, workdir: Path, number: signal.Signals = signal.SIGTERM) -> str:
    """A request to stop in the last stage: saved, exit code 75."""
    stage = STAGES[-1]
    process = lab.start(workdir)
    wait_for_step(process, workdir, stage, STEPS // 2 + 2)
    begun = time.monotonic()
    process.send_signal(number)
    code = process.wait(PATIENCE)
    seconds = time.monotonic() - begun
    assert code == AGAIN, f"exit code {code}: see {log_of(workdir)}"
    saved = max(steps_in(workdir / stage / FOLDER))
    reported = read_rows(workdir / stage / "metrics.jsonl")[-1]["step"]
    assert STEPS // 2 < saved == reported < STEPS, f"step {reported} was done, {saved} saved"
    assert seconds < 30, f"{seconds:.0f} s"
    return f"{number.name}: the step at hand saved, exit code {AGAIN} after {seconds:.1f} s"


def truncate_newest(lab: Lab, workdir: Path) -> str:
    """The largest file of the newest checkpoint loses its second half; the run ends like the undisturbed one."""
    folder = workdir / STAGES[-1] / FOLDER
    newest, before = steps_in(folder)[-1], steps_in(folder)[-2]
    path = max((p for p in (folder / str(newest)).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    os.truncate(path, path.stat().st_size // 2)
    code, output = lab.run(workdir)
    assert code == 0, output
    assert f"{path.name} has" in output and f"going back to step {before}" in output, output
    assert f"{STAGES[-1]} continues after step {before}" in output
    arrays = assert_same(workdir, lab.undisturbed)
    return f"named and set aside, the one before goes on; all {arrays} arrays and every loss as undisturbed"


def change_devices(lab: Lab) -> str:
    """Saved on eight devices (2 data x 2 fsdp x 2 tensor), continued on 1, 2 and 4."""
    workdir = lab.folder / "eight"
    meshes = {8: (2, 2, 2), 4: (1, 4, 1), 2: (1, 1, 2), 1: (1, 1, 1)}

    def flags(devices):
        return [f"--config.mesh.{axis}={size}" for axis, size in zip(("data", "fsdp", "tensor"), meshes[devices])]

    process = lab.start(workdir, *flags(8), devices=8)
    wait_for_step(process, workdir, STAGES[0], 10)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == AGAIN, log_of(workdir).read_text()
    saved = max(steps_in(workdir / STAGES[0] / FOLDER))
    wanted = {row["step"]: row["ce"] for row in read_rows(lab.undisturbed / STAGES[0] / "metrics.jsonl")}
    worst = 0.0
    for devices in (4, 2, 1):
        copy = lab.folder / f"eight_on_{devices}"
        shutil.copytree(workdir, copy)
        code, output = lab.run(copy, *flags(devices), devices=devices)
        assert code == 0 and f"{STAGES[0]} continues after step {saved}" in output, output
        rows = read_rows(copy / STAGES[0] / "metrics.jsonl")
        worst = max(worst, *(abs(row["ce"] - wanted[row["step"]]) for row in rows if row["step"] <= saved + 3))
    assert worst < 1e-3, worst
    return f"8 devices to 4, 2 and 1 at step {saved}: losses of the next steps within {worst:.1e} of one device's"


def kill_one_of_two(lab: Lab) -> str:
    """Of two processes each in turn is killed: the other ends by itself and says why, and both go on together."""
    undisturbed, workdir = lab.folder / "two", lab.folder / "two_killed"
    assert [process.wait(PATIENCE) for process in lab.pair(undisturbed)] == [0, 0], log_of(undisturbed).read_text()
    seconds = []
    for victim, step in ((1, 5), (0, 14)):
        processes = lab.pair(workdir)
        wait_for_step(processes[0], workdir, STAGES[0], step)
        processes[victim].kill()
        killed = time.monotonic()
        code = processes[1 - victim].wait(PATIENCE)
        seconds.append(time.monotonic() - killed)
        output = log_of(workdir, "_1" if victim == 0 else "").read_text()
        assert code not in (0, 2), output
        assert "start all of them again" in output or "another task died" in output, output
        processes[victim].wait()
    processes = lab.pair(workdir)
    wait_for_step(processes[0], workdir, STAGES[1], 5)
    processes[1].send_signal(signal.SIGTERM)  # to one of them only
    assert [process.wait(PATIENCE) for process in processes] == [AGAIN, AGAIN], log_of(workdir).read_text()
    assert [process.wait(PATIENCE) for process in lab.pair(workdir)] == [0, 0], log_of(workdir).read_text()
    arrays = assert_same(workdir, undisturbed)
    return (
        f"the other ends with a message after {' and '.join(f'{s:.0f} s' for s in seconds)}; SIGTERM to one saves and "
        f"ends both with {AGAIN}; all {arrays} arrays and every loss as two undisturbed processes"
    )
