"""The command on a real checkpoint in real processes: two tasks at once, killed, shared, refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import tiny_checkpoint
from helpers.bench_files import cell, pope_folder, write_parquet
from helpers.shapes_data import make_shapes

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
LABELS = {"random": ["yes", "no", "yes"], "popular": ["no", "no"], "adversarial": ["yes"]}


def start(*arguments, module="fusion_jax.evaluate", **environment):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **environment,
    }
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    make_shapes(folder / "scenes", "4,4,4,2,6")
    tiny_checkpoint.save(folder / "run", folder / "scenes")
    data = folder / "data"
    pope_folder(data / "pope", LABELS)
    (folder / "scenes").rename(data / "held_out")
    return folder


def common(folder, *more):
    return (f"--checkpoint={folder / 'run'}", f"--data_dir={folder / 'data'}", "--batch_size=4", *more)


def test_two_processes_and_one_alone_say_the_same(prepared, tmp_path):
    """Also: the output file, the questions shown, what is left in the folder, and a task without data."""
    shared = ("--tasks=held_out,pope", f"--out={tmp_path / 'two'}", "--num_processes=2")
    first = start(*common(prepared, *shared, "--process_id=0", f"--scores_file={tmp_path / 'all.json'}", "--show=2"))
    second = start(*common(prepared, *shared, "--process_id=1"))
    code, out, err = finish(first)
    assert code == 0, err
    assert finish(second)[0] == 0
    scores = json.loads(out.splitlines()[-1])
    assert scores["pope"]["questions"] == 6 == scores["held_out"]["questions"]
    assert {"held_out_accuracy", "shuffled_image_accuracy", "majority_accuracy"} <= scores["held_out"].keys()
    assert out.count("    Q: ") == 4
    everything = json.loads((tmp_path / "all.json").read_text())
    assert len(everything["held_out"]["examples"]) == 6 == len(everything["pope"]["examples"])
    assert sorted(p.name for p in (tmp_path / "two" / "pope" / "parts").iterdir()) == [
        "00000-of-00002.jsonl",
        "00001-of-00002.jsonl",
    ]
    for name in ("summary.json", "summary.md", "report.html"):
        assert (tmp_path / "two" / name).stat().st_size > 100

    # Alone, and with a task that has no data: the others are as before, and the exit code says it.
    code, out, err = finish(start(*common(prepared, "--tasks=mmvp,held_out,pope", f"--out={tmp_path / 'one'}")))
    assert code == 2 and err.splitlines()[-1].startswith("error: 1 of 3 tasks failed: mmvp: there is no file"), err
    alone = json.loads(out.splitlines()[-1])
    assert alone["held_out"] == scores["held_out"] and list(alone["failed"]) == ["mmvp"]
    assert out.index("mmvp failed") < out.index("held_out: 12 questions from held_out.json in")
    assert "Failed" in (tmp_path / "one" / "summary.md").read_text()
    rows = [(tmp_path / way / "held_out" / "predictions.jsonl").read_text() for way in ("one", "two")]
    assert rows[0] == rows[1]


def test_wrong_input_ends_in_one_sentence(prepared, tmp_path):
    output = f"--out={tmp_path / 'out'}"
    part = tmp_path / "out" / "pope" / "parts" / "00000-of-00001.jsonl"
    part.parent.mkdir(parents=True)
    part.write_text(json.dumps({"task": "pope", "checkpoint": "another", "folder": "runs/other/3"}) + "\n")
    broken = prepared / "data" / "pope" / "val2014" / "random_0.jpg"
    before = broken.read_bytes()
    broken.write_bytes(b"half an image")
    try:
        started = {
            "task 'pop' is unknown; allowed: held_out": start(*common(prepared, "--tasks=pop")),
            "holds answers of another checkpoint (runs/other/3)": start(*common(prepared, "--tasks=pope", output)),
            "pope, question random/1: the image": start(*common(prepared, "--tasks=pope")),
        }
        for says, process in started.items():
            code, _, err = finish(process)
            assert code == 2 and says in err.splitlines()[-1], (says, err)
            assert sum(line.startswith("error: ") for line in err.splitlines()) == 1 and "Traceback" not in err
    finally:
        broken.write_bytes(before)


def test_other_weights_have_another_fingerprint(prepared, tmp_path):
    from fusion_jax.evals.predictions import fingerprint

    first = prepared / "run" / "stage2" / "checkpoints" / "8"
    again = tiny_checkpoint.save(tmp_path / "other", prepared / "data" / "held_out", seed=1)
    assert fingerprint(first) == fingerprint(first) != fingerprint(again)


def test_lmms_eval_runs_a_local_task_on_a_checkpoint(prepared, tmp_path):
    """A task of one YAML file with data on disk, through lmms-eval's own command."""
    pytest.importorskip("lmms_eval", reason="needs lmms-eval: pip install 'fusion_jax[lmms_eval]'")
    rows = [{"question": f"What is {n}?", "answer": "red", "image": cell()} for n in range(5)]
    write_parquet(tmp_path / "rows.parquet", rows)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "utils.py").write_text(
        "import io\nfrom PIL import Image\n\n\ndef visual(doc):\n"
        "    return [Image.open(io.BytesIO(doc['image']['bytes']))]\n\n\n"
        "def text(doc, lmms_eval_specific_kwargs=None):\n    return doc['question']\n\n\n"
        "def results(doc, answers):\n    return {'answered': float(isinstance(answers[0], str))}\n"
    )
    (tmp_path / "tiny" / "tiny_local.yaml").write_text(
        f"task: tiny_local\ndataset_path: parquet\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/rows.parquet\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_visual: !function utils.visual\n"
        "doc_to_text: !function utils.text\ndoc_to_target: answer\nprocess_results: !function utils.results\n"
        "generation_kwargs:\n  max_new_tokens: 8\nmetric_list:\n  - metric: answered\n    aggregation: mean\n"
        "    higher_is_better: true\n"
    )
    arguments = ("--model", "fusion_jax", "--model_args", f"checkpoint={prepared / 'run'}", "--tasks", "tiny_local")
    more = ("--include_path", tmp_path / "tiny", "--batch_size", "2", "--output_path", tmp_path / "out")
    process = start(*arguments, *more, "--log_samples", module="lmms_eval", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    code, out, err = finish(process)
    assert code == 0, out + err
    results = json.loads(next((tmp_path / "out").rglob("*_results.json")).read_text())
    assert results["results"]["tiny_local"]["answered,none"] == 1.0
