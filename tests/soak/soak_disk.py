"""A disk that is full: while a run trains, when it starts, and while it compiles."""

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from soak.soak_runs import PATIENCE, STAGES, Lab, Skipped, assert_same, stopped, wait_for_step

CHANGES = "steps=60"
MEGABYTES = 32
FILLER = "filler"


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A folder that is a file system in memory, which a run just fits into. Skipped without the right to mount it."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={MEGABYTES}m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        raise Skipped("not run: mounting a small file system needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def full_while_training(lab: Lab, scale: float = 1.0) -> str:
    """Full for several saves and many lines of metrics; then there is room again."""
    undisturbed = lab.reference("full_undisturbed", changes=CHANGES)
    with small_disk(lab.folder / "full") as workdir:
        with lab.running(workdir, changes=CHANGES) as (process, output):
            wait_for_step(process, workdir, STAGES[0], 8)
            with stopped(process):
                _fill(workdir / FILLER)
            failed = _until(process, output, r"no checkpoint of step (\d+)", 3)
            with stopped(process):
                (workdir / FILLER).unlink()
            code = process.wait(PATIENCE)
            assert code == 0, output()
        arrays = assert_same(workdir, undisturbed)
    return (
        f"{len(failed)} saves failed (steps {', '.join(failed)}) and were reported, training went on; with room again "
        f"it saved; all {arrays} arrays and every line of the metrics as undisturbed"
    )


def full_at_the_start(lab: Lab, scale: float = 1.0) -> str:
    """Nothing can be written at all; and then just enough for a config, but neither programs nor checkpoints."""
    with small_disk(lab.folder / "full_at_start") as workdir:
        _fill(workdir / FILLER)
        code, output = lab.run(workdir, cache=False)
        errors = re.findall(r"^error: .*", output, re.MULTILINE)
        assert code == 2 and len(errors) == 1 and "Traceback" not in output, f"exit code {code}: {output}"
        (workdir / FILLER).unlink()
        _fill(workdir / FILLER, leave=100_000)
        with lab.running(workdir, cache=False) as (process, output):
            failed = _until(process, output, r"no checkpoint of step (\d+)", 1)
            process.kill()
        (workdir / FILLER).unlink()
        code, output = lab.run(workdir, cache=False)
        assert code == 0 and "Traceback" not in output, f"exit code {code}: {output}"
        arrays = assert_same(workdir, lab.undisturbed)
    return (
        f"without any room: exit code 2, one sentence; with 100 kB: trains without compiled programs and checkpoints "
        f"(step {failed[0]} reported); killed and with room again, all {arrays} arrays and every loss as undisturbed"
    )


def _fill(path: Path, leave: int = 0) -> None:
    """Takes all room of the file system but `leave` bytes."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            continue
    os.truncate(path, max(0, path.stat().st_size - leave))


def _until(process: subprocess.Popen, output, pattern: str, count: int) -> list[str]:
    """The matches in what a run says, as soon as there are `count`; fails where the run ends before."""
    deadline = time.monotonic() + PATIENCE
    while len(matches := re.findall(pattern, output())) < count:
        assert process.poll() is None and time.monotonic() < deadline, output()
        time.sleep(0.002)
    return matches
