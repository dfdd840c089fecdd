"""Runs the proofs of survival and keeps their results in docs/soak.md; see `launch/soak.sh`.

A row of the table belongs to one proof and says when and at which commit it was made. Proofs that are not run keep
their rows; the row of one that fails says so, and the other sections still run.
"""

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from soak import (
    soak_data,
    soak_disk,
    soak_gpu_check,
    soak_kills,
    soak_numbers,
    soak_real_weights,
    soak_runs,
    soak_server,
    soak_targets,
    soak_transformers,
    soak_trl,
)

from fusion_jax.training.about import environment

sys.path.insert(0, str(Path(__file__).parents[1] / "hostile"))
import tally

HOSTILE = 3000  # inputs of each area
HEAD = f"""# Survival

Written by `bash launch/soak.sh`, each row on the day and at the commit that it names. What each proof does is in
`tests/soak/`: real processes on CPUs, of a tiny model in {len(soak_runs.STAGES)} stages that saves every 3 steps. The
first four rows disturb one and the same run. "As undisturbed" means bit for bit. Hostile inputs are made by
`tests/hostile`, one area a row: each must be refused with the promised error, or be accepted and harmless.

| proof | result | took | made |
|---|---|---|---|
"""
_ROW = re.compile(r"^\| (.+?) \| .* \|$")


def disturbed(lab: soak_runs.Lab, scale: float) -> Iterator[tuple[str, Callable[[], str]]]:
    workdir = lab.folder / "disturbed"
    yield "Kills", lambda: soak_runs.kill(lab, workdir, max(3, round(20 * scale)))
    yield "A second run in the same workdir", lambda: soak_runs.refuse(lab, workdir)
    yield "Request to stop", lambda: soak_runs.terminate(lab, workdir)
    yield "Truncated file in the newest checkpoint", lambda: soak_runs.truncate_newest(lab, workdir)


def hostile(lab: soak_runs.Lab, scale: float) -> Iterator[tuple[str, Callable[[], str]]]:
    for area in tally.AREAS:
        if area == "page" and importlib.util.find_spec("gradio") is None:
            print("hostile inputs of the page are left out: they need gradio (requirements-page.txt)")
            continue
        yield f"Hostile inputs: {area}", lambda area=area: _hostile(lab, area, max(1, round(HOSTILE * scale)))


def _hostile(lab: soak_runs.Lab, area: str, count: int) -> str:
    folder = lab.folder / area
    folder.mkdir()
    outcome = tally.run(area, folder, count, seed=time.time_ns() % 2**32)
    assert not outcome.failures, "\n".join([str(outcome), *outcome.failures[:20]])
    return str(outcome).removeprefix(f"{area}: ").rpartition(", ")[0]


def _script(name: str, flag: str, count: int, scale: float) -> str:
    """The last line of a script that does so much of something."""
    path = Path(__file__).with_name(name)
    command = [sys.executable, str(path), flag, str(max(1, round(count * scale)))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


def _transformers(lab: soak_runs.Lab, scale: float) -> str:
    folder = lab.folder / "transformers"
    folder.mkdir()
    return soak_transformers.all_versions(folder)


def _trl(lab: soak_runs.Lab, scale: float) -> str:
    folder = lab.folder / "trl"
    folder.mkdir()
    return soak_trl.train(folder)


def _one(name: str, proof: Callable[[soak_runs.Lab, float], str]):
    return lambda lab, scale: [(name, lambda: proof(lab, scale))]


SECTIONS = {
    "disturbed": disturbed,
    "devices": _one("Other devices", lambda lab, _: soak_runs.change_devices(lab)),
    "two_processes": _one("One of two processes killed", lambda lab, _: soak_runs.kill_one_of_two(lab)),
    "random_kills": _one("Kills at random moments", soak_kills.random_kills),
    "full_disk": _one("Full disk while training", soak_disk.full_while_training),
    "full_disk_at_start": _one("Full disk at the start", soak_disk.full_at_the_start),
    "changed_data": _one("Images and JSON changed in mid-run", soak_data.changed_data),
    "absurd_numbers": _one("Infinite losses, absurd learning rates", soak_numbers.absurd_numbers),
    "server": _one("SIGTERM with streams open", soak_server.stop_with_streams),
    "hostile": hostile,
    "real_weights": _one("A real language model, end to end", soak_real_weights.whole_way),
    "resizer": _one("Fuzzed resizer", lambda lab, scale: _script("soak_resample.py", "--count", 100_000, scale)),
    "input": _one("Memory of the input", lambda lab, scale: _script("soak_input.py", "--samples", 200_000, scale)),
    "gpu_check": _one("GPU check, dry run", lambda lab, _: soak_gpu_check.dry_run(lab.folder / "gpu_check")),
    "transformers": _one("Exports under versions of transformers", _transformers),
    "trl": _one("Exports trained with TRL", _trl),
    "targets": _one("Programs compiled for TPUs and GPUs", lambda lab, _: soak_targets.compile_all()),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="empty folder for the runs")
    parser.add_argument("--report", type=Path, required=True, help="Markdown file whose rows are replaced")
    parser.add_argument("scale", type=float, nargs="?", default=1.0, help="share of kills and hostile inputs")
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; default: all")
    options = parser.parse_args()
    if unknown := [name for name in options.sections if name not in SECTIONS]:
        parser.error(f"unknown section {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    options.folder.mkdir(parents=True, exist_ok=True)
    lab = soak_runs.Lab(options.folder, options.folder / "compiled")
    versions = environment()
    commit = re.sub(r"([0-9a-f]{12})[0-9a-f]{28}", r"\1", versions["commit"] or "no commit")
    made = f"{time.strftime('%F')}, {os.cpu_count()} cores, jax {versions['packages']['jax']}, {commit}"
    failed = []

    def put(name: str, result: str, since: float) -> None:
        put_row(options.report, name, f"{result} | {time.monotonic() - since:.0f} s | {made}")

    for section in options.sections or SECTIONS:
        try:
            for name, proof in SECTIONS[section](lab, options.scale):
                since = time.monotonic()
                put(name, proof(), since)
        except soak_runs.Skipped as reason:  # an older row is still true
            print(f"{name}: {reason}", flush=True)
        except Exception:
            traceback.print_exc()
            failed.append(section)
            put(name, "**failed**", since)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


def put_row(report: Path, name: str, rest: str) -> None:
    """Replaces the row of a proof, where the table has one; otherwise the new one comes last."""
    lines = report.read_text().splitlines() if report.exists() else []
    rows = {match[1]: line for line in lines if (match := _ROW.match(line)) and match[1] != "proof"}
    rows[name] = f"| {name} | {rest} |"
    print(rows[name], flush=True)
    report.write_text(HEAD + "".join(f"{row}\n" for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
