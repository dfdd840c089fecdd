"""Tests that commands under their former names say the new one and run it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("before", "now", "flag"), [("convert", "shards", "--json_path"), ("inspect", "inspect", "--stage")]
)
def test_a_former_name_says_the_new_one_and_runs_it(before, now, flag):
    def run(name, *arguments):
        command = [sys.executable, "-m", name, *arguments]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)

    notice = f"python -m fusion_jax.data.{before} is now python -m fusion_jax.{now}.\n"
    helped = run(f"fusion_jax.data.{before}", "--help")
    assert helped.stderr == notice and flag in helped.stdout
    new = run(f"fusion_jax.{now}", "--help")
    assert (helped.returncode, helped.stdout) == (new.returncode, new.stdout)
    refused = run(f"fusion_jax.data.{before}", "--no_such_flag")
    assert refused.returncode == 2 and refused.stderr.startswith(notice) and "no_such_flag" in refused.stderr
