"""What happens around the steps of a run when something fails: reports, plots, logs, the data; and at its start."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from helpers import tiny_run
from helpers.fixtures import params
from helpers.forged import forge
from helpers.shapes_data import make_shapes

from fusion_jax.config import RunConfig, from_dict
from fusion_jax.data.layout import lay_out
from fusion_jax.data.sources import load_source
from fusion_jax.data.tokenizer import load_tokenizer
from fusion_jax.devices import sharding
from fusion_jax.errors import UserError
from fusion_jax.inference import generate
from fusion_jax.models.config import PRESETS
from fusion_jax.models.fusion import Fusion
from fusion_jax.training import input_check, integrity
from fusion_jax.training.about import load_about
from fusion_jax.training.checkpoint_folders import FOLDER, steps_in
from fusion_jax.training.jsonl import read_rows
from fusion_jax.training.losses import PARTS
from fusion_jax.training.reports import Reports
from fusion_jax.training.run import train
from fusion_jax.training.step import evaluate
from fusion_jax.training.validation import measure, open_data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("scenes") / "data", "16,16,16,4,4")


def configured(data, **changes):
    """One stage of four steps, which are an epoch, and two saves, with one program."""
    config = tiny_run.get_config(f"{data},survival")
    config.stages = config.stages[:1]
    config.stages[0]["steps"] = 0
    config.update({"checkpoint_every": 2, "validation_data": "", "sample_answers": 0, **changes})
    return from_dict(RunConfig, config.to_dict())


def steps(workdir):
    return steps_in(workdir / "stage1" / FOLDER)


def losses(workdir):
    return [(row["step"], row["ce"]) for row in read_rows(workdir / "stage1" / "metrics.jsonl") if "ce" in row]


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "undisturbed"
    train(configured(data), workdir)
    assert steps(workdir) == [2, 4] and [step for step, _ in losses(workdir)] == [1, 2, 3, 4]
    return workdir


def test_reports_that_fail_cost_no_step(data, undisturbed, tmp_path, caplog, monkeypatch):
    """Validation and benchmarks fail, and the plot in the end, each behind the save of its step."""
    saved = []

    def no_validation(self, step, params):
        saved.append(max(steps_in(self.writer.path.parent / FOLDER), default=0))
        raise OSError(5, "Input/output error")

    benchmarks = tmp_path / "benchmarks"
    benchmarks.mkdir()  # there when the run starts, but nothing in it
    monkeypatch.setattr(Reports, "_validate", no_validation)
    (tmp_path / "run" / "losses.png").mkdir(parents=True)
    config = configured(
        data,
        validation_data=f"{data}/validation.json",
        validate_every=1,
        evaluate_every=2,
        evaluation_tasks=("held_out",),
        evaluation_data=str(benchmarks),
    )
    train(config, tmp_path / "run")
    assert losses(tmp_path / "run") == losses(undisturbed) and steps(tmp_path / "run") == [2, 4]
    assert saved[3] == 4, "the last step was not saved before its validation"
    rows = read_rows(tmp_path / "run" / "stage1" / "metrics.jsonl")
    assert [row.get("failed/validation") for row in rows] == [None, 1, 2, 3]
    assert [row.get("failed/evaluation") for row in rows] == [None, None, 1, 1]
    assert "validation failed (OSError: [Errno 5] Input/output error), 4 time(s) so far" in caplog.text
    assert "evaluation failed (UserError: " in caplog.text and "done; no loss curves: IsADirectoryError" in caplog.text


class Written:
    """A `metrics.Writer` that keeps the last of everything."""

    def __init__(self, folder):
        self.path = folder / "metrics.jsonl"

    def scalars(self, step, values):
        self.values = values

    def text(self, step, name, text):
        self.shown = text


def reports_of(data, preset, validation="validation.json", folder="", **stage):
    model = dataclasses.replace(tiny_run.MODEL, **PRESETS[preset])
    config = configured(data, validation_data=f"{data}/{validation}", validation_batches=2, sample_answers=3)
    stage = dataclasses.replace(config.stages[0], batch_size=6, **stage)
    config = dataclasses.replace(config, model=model, stages=(stage,), validation_image_folder=folder)
    tokenizer = load_tokenizer(f"{data}/tokenizer")
    measured = measure(config, stage, open_data(config), tokenizer)
    made = (sharding.make_mesh(), tokenizer, measured)
    return Reports(config, stage, *made, Fusion(model), Written(data), SimpleNamespace(requested=False))


@pytest.fixture(scope="module")
def mixed(data):
    """Some records of text alone among those with an image; one whose image is gone, one whose is cut."""
    records = json.loads((data / "validation.json").read_text())
    records = [dict(records[i % len(records)]) for i in range(13)]
    for i, answer in ((1, "yes"), (4, "no, there is none " * 3), (5, "one")):
        records[i] = {"id": f"text{i}", "conversations": [
            {"from": "human", "value": "Is it so?"}, {"from": "gpt", "value": answer}]}  # fmt: skip
    records[7]["image"] = "gone.png"
    cut = (data / records[9]["image"]).read_bytes()
    (data / "cut.png").write_bytes(cut[: len(cut) // 2])
    records[9]["image"] = "cut.png"
    (data / "mixed.json").write_text(json.dumps(records))
    return data


@pytest.mark.parametrize(("preset", "packing"), [("paper", False), ("paper", True), ("released", True)])
def test_validation_losses_are_those_of_one_record_a_row(mixed, preset, packing):
    (mixed / "bad_records.jsonl").unlink(missing_ok=True)
    reports = reports_of(mixed, preset, "mixed.json", packing=packing, accumulation=2, max_rounds=8, max_length=300)
    weights = params(reports.config.model)
    for _ in range(2):
        reports._validate(4, weights)
    loader = reports.validation.loader
    numbers = [measured.number for measured in reports.validation.records]
    assert numbers == [0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12]  # two whole batches without the image that is gone
    good = [example for number in numbers if number != 9 for example in [loader.load(number)]]
    batch = lay_out(good, loader.spec, loader.longest_latents)
    sums, counts = jax.jit(evaluate, static_argnums=0)(reports.model, weights, batch)
    values = reports.writer.values
    for name in PARTS:
        np.testing.assert_allclose(values[f"validation/{name}"], sums[name] / counts[name], rtol=1e-5)
    assert values["validation/samples"] == counts["samples"] == 11 and values["validation/left_out"] == 1
    rows = sum(len(batch.rows) for batch in reports._planned)
    positions = sum(len(batch.rows) * batch.spec.length for batch in reports._planned)
    assert (rows < 12) == packing and positions < 12 * 300
    assert reports.writer.shown.count("model:") == 3
    listed = [json.loads(line) for line in (mixed / "bad_records.jsonl").read_text().splitlines()]
    assert [(row["reason"], row["data"]) for row in listed] == [
        ("missing_image", "validation"),
        ("corrupt_image", "validation"),
    ]


def test_validation_of_which_nothing_can_be_used_ends_before_training(mixed):
    with pytest.raises(UserError, match=r"None of the 4 records of validation_data .*question_too_long.*the first: "):
        reports_of(mixed, "paper", max_question_length=1)
    gone = mixed / "gone"
    gone.mkdir()
    shutil.copy(mixed / "validation.json", gone / "validation.json")
    with pytest.raises(UserError, match=r"\(4 missing_image; the first: .*set validation_image_folder"):
        reports_of(mixed, "paper", "gone/validation.json")
    assert len(reports_of(mixed, "paper", "gone/validation.json", str(mixed)).validation.records) == 4
    # Headers that are whole, and nothing behind them.
    for record in json.loads((mixed / "validation.json").read_text()):
        (gone / record["image"]).parent.mkdir(parents=True, exist_ok=True)
        (gone / record["image"]).write_bytes((mixed / record["image"]).read_bytes()[:60])
    with pytest.raises(UserError, match=r"None of the 4 records .*\(4 corrupt_image"):
        reports_of(mixed, "paper", "gone/validation.json")


def test_validation_takes_a_mixture_and_says_what_it_leaves_out(mixed, caplog):
    (mixed / "validation.yaml").write_text("datasets: [{json_path: mixed.json}, {json_path: validation.json}]")
    reports = reports_of(mixed, "paper", "validation.yaml")
    assert len(reports.validation.records) == 12
    assert "1 validation record(s) of the first 13 cannot be used (1 missing_image; the first: " in caplog.text


def test_sample_answers_keep_to_the_limits_of_the_stage(mixed):
    """A question that is longer than any row of the stage is no prompt in mid-training either."""
    records = json.loads((mixed / "validation.json").read_text())
    long_ = dict(records[0], conversations=[{"from": "human", "value": "<image>\n" + "Is it so? " * 400},
                                            {"from": "gpt", "value": "yes"}])  # fmt: skip
    (mixed / "long.json").write_text(json.dumps([long_, *records]))
    reports = reports_of(mixed, "paper", "long.json")
    assert [bad.reason for bad in reports.validation.bad] == ["too_long"]
    spec = reports.validation.loader.spec
    lengths = []

    def answer(self, prompts, how=None):
        lengths.extend(self.prompts.batch([self.prompts.example(p)]).tokens.shape[1] for p in prompts)
        return ["-"] * len(prompts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate.Answerer, "answer", answer)
        assert len(reports._sample_answers({})) == 3
    assert max(lengths) <= spec.length + 32


def test_reports_can_be_lowered_for_two_chips():
    """Outside the mesh the kernels of a TPU cannot be."""
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, tests / "helpers" / "lower_on_two.py"],
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": f"{tests.parent}:{tests}"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = json.loads(done.stdout)
    assert kernels["validation"] and kernels["prefill"] and "decode" in kernels


def test_error_that_ends_training_finishes_the_checkpoint_being_written(data, tmp_path, monkeypatch):
    write, note = integrity.write, input_check.InputCheck.note

    def slowly(*arguments):
        time.sleep(1.5)
        write(*arguments)

    def too_many(self, step, *arguments):
        if step == 3:
            raise UserError("too many bad records")
        note(self, step, *arguments)

    monkeypatch.setattr(integrity, "write", slowly)
    monkeypatch.setattr(input_check.InputCheck, "note", too_many)
    with pytest.raises(UserError, match="too many bad records"):
        train(configured(data), tmp_path)
    assert steps(tmp_path) == [2] and integrity.problem(tmp_path / "stage1" / "checkpoints" / "2") is None
    assert (tmp_path / "run.lock").read_bytes() == b""


def test_restart_survives_its_logs_and_an_odd_lock(data, undisturbed, tmp_path, caplog):
    """From step 2, with damage to everything that the run keeps beside its checkpoints."""
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed, workdir)
    shutil.rmtree(workdir / "stage1" / "checkpoints" / "4")
    with (workdir / "stage1" / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\xfe\n5\n[]\n" + b"\0" * 4096 + b'\n{"step": 1, "c')
    (workdir / "stage1" / "bad_records.jsonl").write_bytes(b'"x"\n\x80')
    (workdir / "run.lock").write_text("[1, 2]")
    (workdir / "config.json").write_bytes(b"\0\0")
    for path in (workdir / "stage1" / "tensorboard").iterdir():
        path.write_bytes(b"\0" * 100)
    train(configured(data), workdir)
    assert losses(workdir) == losses(undisturbed) and steps(workdir) == [2, 4]
    assert "metrics.jsonl: 5 damaged line(s) cut off" in caplog.text and "bad_records.jsonl: 2 damaged" in caplog.text
    assert json.loads((workdir / "config.json").read_text())["checkpoint_every"] == 2


def test_checkpoints_whose_config_cannot_be_compared_are_not_gone_on_from(data, undisturbed, tmp_path):
    """Of another version, for instance: going on might mean other data, or another order of it."""
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed, workdir)
    for step in steps(workdir):
        folder = workdir / "stage1" / "checkpoints" / str(step)
        forge(folder, "about", lambda about: {**about, "config": {**about["config"], "unknown": 1}})
    with pytest.raises(UserError, match=r"No checkpoint in .* is intact .*config.unknown is not a key"):
        train(configured(data), workdir)


@pytest.mark.parametrize(
    ("rate", "kept", "aside", "skipped"),
    [(1e16, [4], ["5.diverged"], 6), (1e30, [2, 4], [], 5)],
    ids=["large", "infinite"],
)
def test_an_update_that_ruins_the_parameters_leaves_the_checkpoints_before_it(
    data, undisturbed, tmp_path, caplog, rate, kept, aside, skipped
):
    """A large one is made, and no loss is finite afterwards; one whose norm is infinite is not."""
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed, workdir)
    config = configured(data, checkpoint_every=1, max_skipped_steps=3)
    ruinous = dataclasses.replace(config.stages[0], steps=20, learning_rate=rate)
    with pytest.raises(UserError, match="3 steps in a row"):
        train(dataclasses.replace(config, stages=(ruinous,)), workdir)
    folder = workdir / "stage1" / FOLDER
    assert steps(workdir) == kept and [path.name for path in folder.glob("*.diverged")] == aside
    assert f"no checkpoint of step {skipped}, whose loss, gradient or update is not finite" in caplog.text


@pytest.mark.parametrize("what", ["texts", "images"])
def test_data_that_cannot_be_used_any_more_ends_a_run_that_allows_all_to_be_bad(data, tmp_path, what):
    broken = tmp_path / "broken"
    shutil.copytree(data, broken)
    config = configured(broken, max_bad_records=1.0)
    stage = dataclasses.replace(config.stages[0], steps=50)
    if what == "texts":
        stage = dataclasses.replace(stage, max_question_length=1)
    else:
        for record in json.loads((broken / "stage1.json").read_text()):
            (broken / record["image"]).write_bytes(b"no image")
    with pytest.raises(UserError, match=r"None of the 16 records of .*stage1.yaml can be used any more"):
        train(dataclasses.replace(config, stages=(stage,)), tmp_path / "run")
    assert len((tmp_path / "run" / "stage1" / "bad_records.jsonl").read_text().splitlines()) == 32


def test_other_data_end_a_restart_before_its_first_step_unless_they_are_accepted(data, undisturbed, tmp_path, caplog):
    workdir, other = tmp_path / "run", tmp_path / "data"
    shutil.copytree(undisturbed, workdir)
    shutil.copytree(data, other)
    records = json.loads((other / "stage1.json").read_text())
    records[0]["conversations"][1]["value"] += " Yes."
    (other / "stage1.json").write_text(json.dumps(records))
    train(configured(other), workdir)  # the stage is over
    # It is no longer, where its last checkpoint turns out to be damaged while it is restored; then with the others.
    for path in (workdir / "stage1" / "checkpoints" / "4" / "train").rglob("*"):
        if path.is_file():
            path.write_bytes(b"\0" * 100)
    for _ in range(2):
        with pytest.raises(UserError, match=r"stage1.yaml has stage1.json with .* bytes .*--accept_changed=data"):
            train(configured(other), workdir)
        assert steps(workdir) == [2]
    train(configured(other), workdir, accepted=("data",))
    assert steps(workdir) == [2, 4] and "goes on with a change (--accept_changed)" in caplog.text
    about = load_about(workdir / "stage1" / "checkpoints" / "4")
    assert about["stage"] == {"name": "stage1", "order": 0}
    assert about["data"]["stage1"] == load_source(other / "stage1.yaml").describe()


STATES = {
    "another key": lambda state: {**state, "more": 1},
    "no waiting list": lambda state: {key: value for key, value in state.items() if key != "waiting"},
    "another step": lambda state: {**state, "step": 3},
    "a step that is a text": lambda state: {**state, "step": "4"},
    "an index that is a text": lambda state: {**state, "parent": {"next_index": "16"}},
    "an index below 0": lambda state: {**state, "parent": {"next_index": -1}},
    "a count that is a list": lambda state: {**state, "counts": {**state["counts"], "seen": []}},
    "an unknown count": lambda state: {**state, "counts": {**state["counts"], "more": 1}},
    "reasons that are a list": lambda state: {**state, "counts": {**state["counts"], "bad": [1]}},
    "a record that is none": lambda state: {**state, "waiting": [[-1, 10, 1, 1]]},
    "a record longer than a row": lambda state: {**state, "waiting": [[3, 10**9, 1, 1]]},
    "waiting texts": lambda state: {**state, "waiting": ["x"]},
    "a list": lambda state: [state],
    "null": lambda state: None,
}


def test_input_state_of_another_form_falls_back_one(data, undisturbed, tmp_path, caplog):
    """All forms in one run: each checkpoint is newer than the one before it."""
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed, workdir)
    folder = workdir / "stage1" / "checkpoints"
    for step, form in enumerate(STATES.values(), 5):
        shutil.copytree(undisturbed / "stage1" / "checkpoints" / "4", folder / str(step))
        forge(folder / str(step), "data", lambda state, form=form, step=step: form({**state, "step": step}))
    shutil.rmtree(folder / "4")
    train(configured(data), workdir)
    assert losses(workdir) == losses(undisturbed) and steps(workdir) == [2, 4]
    for step in range(5, 5 + len(STATES)):
        assert f"going back to step 2; {folder / str(step)} is kept as {step}.damaged" in caplog.text


START = """
import os, sys
from fusion_jax.command_line import cli; from fusion_jax import train
train.define_flags()
errors, *workdirs = sys.argv[1:]
arguments = [f"--config={os.environ['CONFIG']}"]
for number, workdir in enumerate(workdirs):
    child = os.fork()
    if not child:
        os.dup2(os.open(f"{errors}/{number}.err", os.O_WRONLY | os.O_CREAT), 2)
        sys.argv = ["fusion_jax.train", *arguments, f"--workdir={workdir}"]
        cli.run_main(train.main)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.slow
def test_workdir_that_cannot_be_used_is_said_in_one_sentence(data, tmp_path):
    """Kinds that fail for everybody, the superuser too."""
    place = tmp_path / "places"
    place.mkdir()
    (place / "file").write_text("x")
    (place / "loop").symlink_to("loop")
    for folder in ("a/config.json", "b/run.lock", "c/stage1/metrics.jsonl"):
        (place / folder).mkdir(parents=True)
    (place / "d" / "stage1").mkdir(parents=True)
    (place / "d" / "stage1" / "checkpoints").write_text("x")
    names = ["file/below", "loop", *"abcd"]
    config = f"{tiny_run.__file__}:{data},survival"
    done = subprocess.run(
        [sys.executable, "-c", START, tmp_path, *(place / name for name in names)],
        env=os.environ | {"CONFIG": config},
        capture_output=True,
        text=True,
        timeout=300,
    )
    codes = [line for line in done.stdout.splitlines() if line.isdigit()]  # among lines of the log
    assert codes == ["2"] * len(names), done.stdout + done.stderr
    for number, name in enumerate(names):
        output = (tmp_path / f"{number}.err").read_text()
        assert output.startswith("error: ") and output.count("\n") == 1 and str(place / name) in output, (name, output)
