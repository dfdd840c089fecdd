"""The check of a GPU machine as a dry run: all of its parts, on the CPU at tiny shapes."""

import json
import os
import subprocess
import sys
from pathlib import Path

from gpu_check import kernels
from gpu_check.parts import GROUPS

_ROOT = Path(__file__).parents[2]


def dry_run(folder: Path) -> str:
    """How many parts passed, which must be all."""
    command = ["bash", str(_ROOT / "launch" / "gpu_check.sh"), "--dry_run", "--minutes", "20", "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable})
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads((folder / "report.json").read_text())["parts"]
    assert list(parts) == [part.name for group in GROUPS for part in group]
    assert len(list(folder.iterdir())) <= 8 and all(part["state"] == "passed" for part in parts.values())
    assert len(parts["kernels"]["figures"]["cases"]) == len(kernels.CASES)
    assert parts["step_large"]["figures"]["latents"] > parts["step_small"]["figures"]["latents"]
    assert parts["step_large"]["figures"]["operations"]["dearest"]
    assert [row["rows"] for row in parts["generation"]["figures"]["decode"]] == [1, 2]
    return f"{len(parts)} parts passed"
