"""Whole runs in real processes: train, kill, restart, evaluate, and what a wrong input says."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.shapes_data import make_shapes

from fusion_jax.training.jsonl import read_rows

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "tests" / "helpers" / "tiny_run.py"
pytestmark = pytest.mark.slow


def command(module, *arguments):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return {
        "args": [sys.executable, "-m", f"fusion_jax.{module}", *map(str, arguments)],
        "cwd": ROOT,
        "env": environment,
    }


def run(module, *arguments, timeout=300):
    return subprocess.run(**command(module, *arguments), capture_output=True, text=True, timeout=timeout)


def train(data, workdir, *overrides):
    return run("train", "--config", f"{CONFIG}:{data}", "--workdir", workdir, *overrides)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("scenes") / "data", "48,48,48,8,16")


@pytest.fixture(scope="session")
def finished(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "undisturbed"
    result = train(data, workdir)
    assert result.returncode == 0, result.stdout + result.stderr
    return workdir, result.stdout


def test_run_leaves_metrics_checkpoints_and_a_plot(finished):
    workdir, log = finished
    for stage in ("stage1", "stage2"):
        rows = read_rows(workdir / stage / "metrics.jsonl")
        steps = [row["step"] for row in rows if "ce" in row]
        assert steps == list(range(1, 9))
        for key in ("total", "v2t", "t2v", "grad_norm", "learning_rate/default", "samples_per_second", "mfu"):
            assert all(np.isfinite(row[key]) for row in rows if "ce" in row), key
        more = (
            "input_wait_share",
            "compute_share",
            "checkpoint_share",
            "grad_norm/llm",
            "grad_norm/vision",
            "host_gib",
        )
        for key in ("text_tokens_per_second", "visual_tokens_per_second", *more):
            assert all(key in row for row in rows if "ce" in row), key
        assert [row["step"] for row in rows if "validation/ce" in row] == [4, 8]
        assert list((workdir / stage / "tensorboard").glob("events*"))
        assert (workdir / stage / "checkpoints" / "8" / "params").is_dir()
    assert (workdir / "losses.png").stat().st_size > 5000
    assert "stage2 8/8  total" in log and "left" in log


def test_second_stage_starts_from_the_first_ones_parameters(finished):
    workdir, _ = finished
    first = read_rows(workdir / "stage1" / "metrics.jsonl")
    second = read_rows(workdir / "stage2" / "metrics.jsonl")
    losses = [[row["ce"] for row in rows if "ce" in row] for rows in (first, second)]
    assert losses[1][0] < losses[0][0] - 0.3, "stage 2 began with a loss like random parameters"


def test_finished_run_started_again_trains_nothing(data, finished, tmp_path):
    workdir, _ = finished
    before = (workdir / "stage2" / "metrics.jsonl").read_text()
    copy = tmp_path / "again"
    shutil.copytree(workdir, copy)
    result = train(data, copy)
    assert result.returncode == 0, result.stderr
    assert (copy / "stage2" / "metrics.jsonl").read_text() == before


def test_stage_alone_from_an_earlier_checkpoint(data, finished, tmp_path):
    """init_from gives the parameters; the optimizer and the step count are fresh."""
    workdir, _ = finished
    alone = ROOT / "tests" / "helpers" / "tiny_run.py"
    script = tmp_path / "alone.py"
    script.write_text(
        f"import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('tiny', {str(alone)!r})\n"
        f"tiny = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(tiny)\n\n\n"
        f"def get_config(data):\n    config = tiny.get_config(data)\n    config.stages = config.stages[1:]\n"
        f"    config.init_from = {str(workdir / 'stage1')!r}\n"
        # The checkpoint brings its tokenizer and the numbers that belong to its weights.
        f"    config.tokenizer = ''\n    config.model.llm.vocab_size = 1000\n    return config\n"
    )
    result = run("train", "--config", f"{script}:{data}", "--workdir", tmp_path / "alone")
    assert result.returncode == 0, result.stderr
    rows = [read_rows(folder / "stage2" / "metrics.jsonl") for folder in (workdir, tmp_path / "alone")]
    assert [row["ce"] for row in rows[0] if "ce" in row] == [row["ce"] for row in rows[1] if "ce" in row]


def test_evaluation_reads_the_checkpoint_alone(data, finished, tmp_path):
    workdir, _ = finished
    output = tmp_path / "evaluation.json"
    result = run("evaluate", "--checkpoint", workdir, "--data_dir", data, "--scores_file", output, "--show", 2)
    assert result.returncode == 0, result.stderr
    scores = json.loads(output.read_text())["held_out"]
    assert scores["questions"] == 16 == len(scores["examples"])
    for key in ("held_out_accuracy", "shuffled_image_accuracy", "majority_accuracy"):
        assert 0 <= scores[key] <= 1
    assert json.loads(result.stdout.splitlines()[-1])["held_out"]["held_out_accuracy"] == scores["held_out_accuracy"]
    assert result.stdout.count("    Q: ") == 2


def test_exported_run_answers_the_same_in_torch(data, finished, tmp_path):
    """Both formats out of a trained run; the transformers folder answers in a process that has no JAX."""
    pytest.importorskip("torch", reason="needs PyTorch: pip install -e '.[torch]'")
    pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[torch]'")
    workdir, _ = finished
    result = run("convert", "export", "--checkpoint", workdir, "--format", "published", "--out", tmp_path / "published")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "has the released preset only; this model differs in mask, taps" in result.stderr
    assert list(tmp_path.iterdir()) == []
    folder = tmp_path / "transformers"
    result = run("convert", "export", "--checkpoint", workdir, "--format", "transformers", "--out", folder)
    assert result.returncode == 0, result.stderr
    assert "| stage2 | stage2.yaml | 4 |" in (folder / "README.md").read_text()

    result = run("evaluate", "--checkpoint", workdir, "--data_dir", data, "--scores_file", tmp_path / "jax.json")
    assert result.returncode == 0, result.stderr
    script = ROOT / "tests" / "interop" / "answer_in_torch.py"
    done = subprocess.run(
        [sys.executable, script, folder, data, tmp_path / "torch.json"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    examples = json.loads((tmp_path / "jax.json").read_text())["held_out"]["examples"]
    assert json.loads((tmp_path / "torch.json").read_text()) == [example["answer"] for example in examples]


WRONG = {
    "--config.model.llm.layrs=3": "layrs",
    "--config.model.llm.heads=5": "llm.heads=5 does not divide llm.width=32",
    "--config.model.latent_counts=(5,)": "5 tokens are not a square grid",
    "--config.model.exchange.layers=9": "layers=9",
    "--config.tokenizer=/nowhere": "/nowhere",
    "--config.validation_data=/nowhere.json": "/nowhere.json",
    "--config.dtype=float8": "allowed: float32, bfloat16",
    "--config.log_every=many": "log_every",
}
# Imports the program once and runs it once for each override, as `python -m fusion_jax.train` would.
EACH = """
import os, sys
from fusion_jax.command_line import cli; from fusion_jax import train
train.define_flags()
folder, *arguments = sys.argv[1:]
arguments, overrides = arguments[:4], arguments[4:]
for number, override in enumerate(overrides):
    child = os.fork()
    if not child:
        os.dup2(os.open(f"{folder}/{number}.err", os.O_WRONLY | os.O_CREAT), 2)
        sys.argv = ["fusion_jax.train", *arguments, override]
        cli.run_main(train.main)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_wrong_config_says_one_sentence_before_any_work(data, tmp_path):
    never = tmp_path / "never"
    started = command("train", "--config", f"{CONFIG}:{data}", "--workdir", never)
    started["args"] = [sys.executable, "-c", EACH, str(tmp_path), *started["args"][3:], *WRONG]
    result = subprocess.run(**started, capture_output=True, text=True, timeout=300)
    assert result.stdout.split() == ["2"] * len(WRONG), result.stdout + result.stderr
    for number, (override, says) in enumerate(WRONG.items()):
        output = (tmp_path / f"{number}.err").read_text()
        errors = [line for line in output.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and says in errors[0], (override, output)
        assert "Traceback" not in output
    assert not never.exists()


def test_too_many_bad_records_stop_the_run(data, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(data, broken)
    for record in json.loads((broken / "stage1.json").read_text())[:30]:
        (broken / record["image"]).write_bytes(b"no image")
    result = train(broken, tmp_path / "run", "--config.max_bad_records=0.1")
    assert result.returncode == 2
    assert "corrupt_image" in result.stderr and "max_bad_records=0.1" in result.stderr
    listed = [json.loads(line) for line in (tmp_path / "run" / "stage1" / "bad_records.jsonl").read_text().splitlines()]
    assert listed and all(entry["reason"] == "corrupt_image" and "record" in entry["where"] for entry in listed)


def test_steps_that_are_never_finite_stop_the_run(data, tmp_path):
    script = tmp_path / "diverges.py"
    script.write_text(
        "import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('tiny', {str(CONFIG)!r})\n"
        "tiny = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(tiny)\n\n\n"
        "def get_config(data):\n    config = tiny.get_config(data)\n"
        "    config.stages[0]['learning_rate'] = 1e38\n    config.stages[0]['steps'] = 50\n    return config\n"
    )
    result = run("train", "--config", f"{script}:{data}", "--workdir", tmp_path / "run")
    assert result.returncode == 2
    assert "3 steps in a row" in result.stderr and "max_skipped_steps=3" in result.stderr
