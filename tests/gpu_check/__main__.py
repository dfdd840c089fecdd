"""Checks this checkout on a machine with one NVIDIA GPU; `bash launch/gpu_check.sh` starts it and explains it.

Each part is a process of its own with a time limit. After each the report is written: a cut leaves what is there.
"""

import argparse
import ctypes
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gpu_check import report
from gpu_check.parts import DEVICE, GROUPS, Context, Part

ROOT = Path(__file__).resolve().parents[2]
LEAST = 25  # seconds in which a part can begin to say something
PATIENCE = 10  # times a part's limit in a dry run, whose processors may be slow and shared
KEPT = 4_000_000  # characters of a log
# Modules, and what installs them where the name differs; the second group is needed by training alone.
NEEDED = {
    "jax": "jax[cuda13]",
    "flax": "flax",
    "optax": "optax",
    "orbax.checkpoint": "orbax-checkpoint",
    "numpy": "numpy",
    "jaxtyping": "jaxtyping",
    "absl": "absl-py",
    "ml_collections": "ml_collections",
    "PIL": "pillow",
    "safetensors": "safetensors",
    "tokenizers": "tokenizers",
    "sentencepiece": "sentencepiece",
    "yaml": "pyyaml",
    "scipy": "scipy",
    "grain": "grain",
    "array_record": "array_record",
}
TRAINING = {
    "httpcore2": "httpcore2",
    "tensorboardX": "tensorboardX",
    "matplotlib": "matplotlib",
    "packaging": "packaging",
    "tqdm": "tqdm",
}


def missing(modules: dict[str, str]) -> list[str]:
    """What has to be installed."""

    def there(name: str) -> bool:
        try:
            return importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:  # of the parent
            return False

    return [package for name, package in modules.items() if not there(name)]


class Cut(Exception):
    """A signal asks for the end."""


def _cut(number, _):
    signal.signal(number, signal.SIG_IGN)
    raise Cut(signal.Signals(number).name)


def last_result(text: str) -> dict:
    """The last line that is a JSON object; {} where none is."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except ValueError:
                continue
    return {}


def _follow() -> None:
    """Makes this process end when the one that started it is killed, so that none is left on the card."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Running:
    """A part's process. Its standard error goes to its log at once, what it says on standard output in the end."""

    def __init__(self, part: Part, context: Context, folder: Path, environment: dict[str, str], seconds: float):
        self.part, self._log = part, folder / part.log
        self.begun = time.monotonic()
        self.deadline = self.begun + seconds
        self._limit = seconds
        self._out = tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [sys.executable, "-m", *part.command(context)]
        with self._log.open("a") as log:
            log.write(f"{part.name}: python {' '.join(command[1:])}\n")
            log.flush()
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=self._out, stderr=log, process_group=0, preexec_fn=_follow
            )

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None or time.monotonic() > self.deadline

    def result(self, cut: str = "") -> dict:
        """Ends the process where it still runs; what the report says of it."""
        over = self.process.poll() is None
        if over:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self._out.seek(0)
        output = self._out.read()
        self._out.close()
        errors = self._finish_log(output)
        figures = last_result(output)
        failures = figures.pop("failures", [])
        if cut:
            failures.append(f"cut by {cut}")
        elif over:
            failures.append(f"over its {self._limit:.0f} s")
        elif self.process.returncode:
            last = errors.strip().splitlines()[-1:] or ["no message"]
            failures.append(f"exit code {self.process.returncode}: {last[0][:300]}")
        elif not figures and not failures:
            failures.append("printed nothing")
        state = report.CUT if over else report.FAILED if failures else report.PASSED
        seconds = time.monotonic() - self.begun
        return {"state": state, "seconds": seconds, "failures": failures, "figures": figures}

    def _finish_log(self, output: str) -> str:
        """Adds the output to the log, which must not grow without bound; the log."""
        errors = self._log.read_text(errors="replace")
        text = f"{errors}\n{output}\n"
        if len(text) > KEPT:
            text = f"{text[: KEPT // 4]}\n... left out ...\n{text[-KEPT // 2 :]}"
        self._log.write_text(text)
        return errors


def environment(dry_run: bool, scratch: str, share: int) -> dict[str, str]:
    """Of a part that shares the card with `share` - 1 others."""
    values = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
        "PYTHONUNBUFFERED": "1",
        "JAX_PLATFORMS": "cpu" if dry_run else "cuda,cpu",
    }
    values.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(scratch, "cache"))
    if dry_run:
        values["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"
    fraction = float(values.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94"))
    values["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{fraction / share:.2f}"
    return values


def run(groups, written: report.Report, folder: Path, dry_run: bool, end: float) -> None:
    """All groups of parts, one group after the other. Raises Cut."""
    context = Context(dry_run)
    running: list[Running] = []
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
            for group in groups:
                left = end - time.monotonic()
                if left < LEAST:
                    for part in group:
                        written.set(part.name, state=report.NOT_RUN, failures=["no time left"])
                    continue
                for part in group:
                    written.set(part.name, state=report.RUNNING, note=part.note(context))
                    surroundings = environment(dry_run, scratch, len(group))
                    limit = min(part.seconds * (PATIENCE if dry_run else 1), left)
                    running.append(Running(part, context, folder, surroundings, limit))
                while running:
                    time.sleep(0.2)
                    for one in [one for one in running if one.ended]:
                        running.remove(one)
                        result = one.result()
                        written.set(one.part.name, **result)
                        say(one.part.name, result)
                        if one.part is DEVICE:
                            context = Context(dry_run, result["figures"])
                            if result["state"] != report.PASSED:
                                return
    except Cut as cut:
        for one in running:
            written.set(one.part.name, **one.result(str(cut)))
        raise


def say(name: str, result: dict) -> None:
    why = f": {'; '.join(result['failures'])}" if result["failures"] else ""
    print(f"{name:12} {result['state']:8} {result['seconds']:6.1f} s{why}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument(
        "--parts", default="", help="run these parts only, separated by commas; the device is always checked"
    )
    parser.add_argument("--dry_run", action="store_true")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    names = {part.name: part.title for group in GROUPS for part in group}
    chosen = [name for name in options.parts.split(",") if name] or list(names)
    unknown = [name for name in chosen if name not in names]
    if unknown:
        print(f"error: --parts: {unknown[0]!r} is unknown; allowed: {', '.join(names)}.", file=sys.stderr)
        return 2
    needed, training = missing(NEEDED), missing(TRAINING)
    if needed or training:
        quoted = " ".join(f"'{name}'" if "[" in name else name for name in needed + training)
        print(f"missing: {quoted}\n  pip install {quoted}", file=sys.stderr)
        if needed:
            return 2
        print("  without them the part `training` fails; the others run.", file=sys.stderr)
    options.out.mkdir(parents=True, exist_ok=True)
    groups = [[part for part in group if part is DEVICE or part.name in chosen] for group in GROUPS]
    groups = [group for group in groups if group]
    for part in (part for group in groups for part in group):
        (options.out / part.log).unlink(missing_ok=True)
    parts = {part.name: part.title for group in groups for part in group}
    written = report.Report(options.out, parts, options.minutes, options.dry_run)
    signal.signal(signal.SIGTERM, _cut)
    signal.signal(signal.SIGINT, _cut)
    try:
        run(groups, written, options.out, options.dry_run, end)
        written.end("done")
    except Cut as cut:
        written.end(f"cut by {cut}")
        print(f"cut by {cut}", file=sys.stderr)
    print(f"{'all parts passed' if written.passed else 'not all parts passed'}: {options.out / 'report.md'}")
    return 0 if written.passed else 1


if __name__ == "__main__":
    sys.exit(main())
