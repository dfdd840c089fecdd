"""The command in real processes: stopped, killed, shared by two, started again, changed, and with a run that fails."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.shapes_data import make_shapes

from fusion_jax.command_line.cli import interrupts
from fusion_jax.errors import AGAIN
from fusion_jax.studies.runs import LOCK
from fusion_jax.training import lock

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
PATIENCE = 240.0


def start(out, data, *flags):
    """The command on the tiny study, in a process group of its own, as a terminal starts it."""
    config = f"--config={ROOT}/tests/helpers/tiny_study.py:{data}"
    return run("fusion_jax.study", config, f"--out={out}", *flags)


def run(module, *flags):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",  # config files of the tests import their helpers
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [sys.executable, "-m", module, *flags],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process, code=0):
    output = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == code, output
    assert "Traceback" not in output
    return output


def wait_until(true, process):
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=60)[0]
        time.sleep(0.05)


def child_of(workdir):
    """The number of the process that trains in a workdir; None if none has begun."""
    file = workdir / "run.lock"
    text = file.read_text() if file.exists() else ""
    return json.loads(text)["pid"] if text else None


def starts(out):
    """How often each run was trained, by the log."""
    logs = sorted(out.glob("runs/*/*/train.log"))
    return {str(log.parent.relative_to(out / "runs")): log.read_text().count("$ python -m") for log in logs}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("data") / "shapes", "12,4,12,4,12")


def test_a_study_that_is_stopped_killed_and_shared_ends_whole(data, tmp_path):
    out = tmp_path / "out"
    first, second = out / "runs" / "with A" / "0", out / "runs" / "without A" / "0"

    # Ctrl-C, in the middle of the first training: the run saves.
    process = start(out, f"{data};guide")
    wait_until(lambda: list(first.glob("stage1/checkpoints/2")), process)
    os.kill(process.pid, signal.SIGINT)
    said = finish(process, interrupts.INTERRUPTED)
    assert said.splitlines()[-1] == "stopped; the same command goes on from here", said
    assert child_of(first) is None and not (first / "trained.json").exists()
    assert "saving" in (first / "train.log").read_text() or "nothing new to save" in (first / "train.log").read_text()

    # The same command, killed while it trains the second run. Its child lives on and keeps the run.
    process = start(out, f"{data};guide")
    wait_until(lambda: list(second.glob("stage1/checkpoints/2")), process)
    child = child_of(second)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    try:
        with pytest.raises(lock.InUse), lock.hold(second, LOCK):
            pass
    finally:
        os.kill(child, signal.SIGKILL)

    # Two processes at once, one of them with two jobs.
    time.sleep(0.5)
    pair = start(out, f"{data};guide", "--jobs=2"), start(out, f"{data};guide")
    said = [finish(process) for process in pair]
    assert starts(out) == {"with A/0": 2, "with A/1": 1, "without A/0": 2, "without A/1": 1}
    assert "seed 1: training" in "".join(said) and said[0].count(": training") + said[1].count(": training") == 3
    found = json.loads((out / "study.json").read_text())
    assert not found["missing"] and {len(runs) for runs in found["runs"].values()} == {2}
    assert found["tasks"]["held_out"]["questions"] == 12
    assert set(found["tasks"]["held_out"]["variants"]) == {"with A", "without A", "no question"}
    assert all(run["train_flops"] > 0 for runs in found["runs"].values() for run in runs.values())
    answers = [out / "evaluations" / name / "0" / "held_out" / "predictions.jsonl" for name in found["runs"]]
    rows = [json.loads(path.read_text().splitlines()[0]) for path in answers]
    assert [row.get("guide") for row in rows] == [None, None, ""]

    # Nothing is left to do, and a lost report is written again.
    before = (out / "study.json").read_text()
    (out / "report.md").unlink()
    assert "4 of 4 runs are done" in finish(start(out, f"{data};guide", "--seeds=2"))
    assert (out / "study.json").read_text() == before and (out / "report.md").exists()
    assert sum(starts(out).values()) == 6

    # An encoder that reads no text cannot be guided, and answers with another guide are not mixed.
    for name, guide, says in (
        ("without A", "none", "reads no text"),
        ("with A", "other", "or of another --weights or"),
    ):
        where = f"--checkpoint={out}/runs/{name}/0", f"--out={out}/evaluations/{name}/0", f"--data_dir={data}"
        assert says in finish(run("fusion_jax.evaluate", f"--guide={guide}", *where), 2).splitlines()[-1]

    # Another study in this folder.
    said = finish(start(out, f"{data};common={{'log_every':3}}"), 2)
    assert "holds a study with another value of variants.with A.run.log_every; give another --out." in said


def test_a_run_that_fails_does_not_stop_the_others(tmp_path):
    """Data are drawn for the seed; one variant has no tokenizer, and is trained in a second attempt."""
    drawn = tmp_path / "drawn.py"
    drawn.write_text(
        "from configs.quickstart_data import get_config as whole\n\n\n"
        "def get_config():\n    config = whole('12,4,12,4,12')\n    config.images.width = config.images.height = 48\n"
        "    return config\n"
    )
    tokenizer = tmp_path / "tokenizer"
    variants = {"without A": {"model.text_guided": False}, "bad": {"tokenizer": str(tokenizer)}}
    study = f"{{data}};seeds=1;data={str(drawn)!r};steps_share=0.5;published=None;variants={variants}"
    out = tmp_path / "out"
    said = finish(start(out, study), 1)
    assert "bad, seed 0: failed; the other runs go on: error: There is no tokenizer folder" in said
    assert "failed: bad, seed 0: error: There is no tokenizer" in said.splitlines()[-1] and "(exit code 2; see " in said
    assert "without A, seed 0: done; 1 of 2 runs" in said and "bad: 0." in (out / "report.md").read_text()
    assert (out / "data" / "0.log").exists()

    said = finish(start(out, study, "--report"))
    assert "not done, or being done by other processes: bad, seed 0" in said and "training" not in said
    (out / "data" / "0" / "tokenizer").rename(tokenizer)
    (out / "data" / "0" / "tokenizer").symlink_to(tokenizer)
    assert "bad, seed 0: done; 2 of 2 runs" in finish(start(out, study))
    assert starts(out) == {"bad/0": 2, "without A/0": 1}


def test_wrong_flags_end_in_one_sentence(data, tmp_path):
    flags = {
        "Give --config FILE and --out DIR.": ("--out=",),
        "config.seeds=0 must be from 1": ("--seeds=0",),
        "flag --jobs=0": ("--jobs=0",),
        "holds no study to report on": ("--report",),
        "baseline='none' is unknown; allowed: with A, without A": ("--config.baseline=none",),
        "config.baselin is not a key; did you mean baseline": ("--config.baselin=none",),
    }
    started = {says: start(tmp_path / "out", data, *some) for says, some in flags.items()}
    for says, process in started.items():
        assert says in finish(process, 2).splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_sigterm_stops_as_a_launcher_expects(data, tmp_path):
    process = start(tmp_path / "out", data, "--jobs=2")
    wait_until(lambda: len(starts(tmp_path / "out")) == 2, process)
    process.terminate()
    said = finish(process, AGAIN)
    assert said.splitlines()[-1] == "stopped; the same command goes on from here."
    assert not list((tmp_path / "out").glob("runs/*/*/trained.json"))
