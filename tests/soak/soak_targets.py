"""Compiles every program for GPUs as well as TPUs, in an environment of its own: CUDA's libraries take 4 GB."""

import re
import subprocess
from pathlib import Path

from helpers import side_environment

_ROOT = Path(__file__).parents[2]


def compile_all() -> str:
    """Runs tests/targets there; how many programs were as they are meant to be."""
    # The extra's name as packages carry it: older versions of pip know no other spelling.
    pins = [_ROOT / name for name in ("requirements.txt", "setup.py")]
    python = side_environment.interpreter("gpu", ["-e", f"{_ROOT}[plan-gpu]"], pins=pins)
    done = subprocess.run([python, "-m", "pytest", "tests/targets"], cwd=_ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    last = done.stdout.splitlines()[-1]
    assert "skipped" not in last, last
    [passed] = re.findall(r"(\d+) passed", last)
    return f"{passed} tests of tests/targets passed"
