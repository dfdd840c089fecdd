"""The benchmark of a run's step, as its command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = {
    "vision": {"image_size": 56, "patch_size": 14, "width": 32, "mlp_dim": 64, "layers": 2, "heads": 2},
    "llm": {"vocab_size": 500, "width": 64, "mlp_dim": 128, "layers": 2, "heads": 2, "kv_heads": 2},
    "exchange": {"layers": 1, "heads": 2},
}
pytestmark = pytest.mark.slow


def benchmark(kind, *arguments):
    """The last line of `benchmark KIND` for FLARE-L 8B at a tiny size."""
    model = [f"--config.model.{part}.{key}={value}" for part, keys in TINY.items() for key, value in keys.items()]
    command = [sys.executable, "-m", "fusion_jax.benchmark", kind, "--config", "configs/flare.py:l_8b,stage1", *model]
    done = subprocess.run(
        [*command, "--config.model.latent_counts=(4,)", *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_step_of_a_run_is_timed_at_its_shapes():
    line = benchmark("step", "--trace", "--config.stages[0].batch_size=8", "--config.stages[0].max_length=512")
    assert line["latents"] == 4 and line["accumulation"] == 1 and line["rows"] >= 2
    assert line["samples_per_second"] * line["seconds_per_step"] >= 8 * 0.9
    rate = line["model_tflop_per_step"] * 1e3 / line["seconds_per_step"]
    shares = [row["share"] for row in line["operations"]["dearest"]]
    assert len(shares) == 15 and shares == sorted(shares, reverse=True) and sum(shares) > 0
    assert any("llm/stack_0/layer" in row["source"] for row in line["operations"]["dearest"])
    assert line["model_gflop_per_second"] == pytest.approx(rate) and 0 < line["mfu"] < 1


def test_decode_of_a_run():
    line = benchmark("decode", "--rows", "2")
    assert line["rows"] == 2 and line["tokens_per_second"] * line["seconds"] == pytest.approx(2 * 63)
