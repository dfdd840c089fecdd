"""What training looks at before it begins, and the doctor with it: each fault alone gives one sentence."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
from helpers import tiny_run
from helpers.shapes_data import make_shapes

from fusion_jax.config import MeshConfig, RunConfig, from_dict
from fusion_jax.devices.device_check import Problem
from fusion_jax.errors import UserError
from fusion_jax.models.config import replace
from fusion_jax.training import checks, config_check
from fusion_jax.training.run import train


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("scenes") / "data", "4,4,4,2,2")


@pytest.fixture
def config(data):
    return from_dict(RunConfig, tiny_run.get_config(str(data)).to_dict())


def stage(config, i=0, **changes):
    stages = list(config.stages)
    stages[i] = dataclasses.replace(stages[i], **changes)
    return dataclasses.replace(config, stages=tuple(stages))


def unusable_validation(config, folder):
    (folder / "validation.json").write_text(
        json.dumps([{"image": "none.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"},
                                                            {"from": "gpt", "value": "A cat."}]}])
    )  # fmt: skip
    return dataclasses.replace(config, validation_data=str(folder / "validation.json"))


def without_template_token(config, folder):
    shutil.copytree(config.tokenizer, folder / "tokenizer")
    for name in ("added_tokens.json", "tokenizer_config.json", "special_tokens_map.json"):
        path = folder / "tokenizer" / name
        path.write_text(path.read_text().replace("<|end|>", "<|other|>"))
    return dataclasses.replace(config, tokenizer=str(folder / "tokenizer"))


FAULTS = {
    "no validation file": (
        lambda config, _: dataclasses.replace(config, validation_data="none.json"),
        "Cannot read the data file none.json",
    ),
    "validation unusable": (unusable_validation, r"None of the 1 records of validation_data .*1 missing_image"),
    "no validation images": (
        lambda config, _: dataclasses.replace(config, validation_image_folder="none"),
        "there is no image folder none",
    ),
    "template": (without_template_token, "has no token '<|end|>'"),
    "vocabulary": (
        lambda config, _: dataclasses.replace(config, model=replace(config.model, **{"llm.vocab_size": 100})),
        "config.model.llm.vocab_size=100 is smaller than the",
    ),
    "tasks": (
        lambda config, folder: dataclasses.replace(
            config, evaluate_every=2, evaluation_tasks=("mmbnch",), evaluation_data=str(folder)
        ),
        "task 'mmbnch' is unknown",
    ),
    "no folder of benchmarks": (
        lambda config, _: dataclasses.replace(
            config, evaluate_every=2, evaluation_tasks=("pope",), evaluation_data="none"
        ),
        "config.evaluate_every=2 needs evaluation_tasks",
    ),
    "wandb": (lambda config, _: dataclasses.replace(config, wandb_project="p"), "needs Weights & Biases"),
    "mesh": (
        lambda config, _: dataclasses.replace(config, mesh=MeshConfig(data=2, fsdp=2)),
        "needs 4 device(s), but there are 1",
    ),
    "freeze": (
        lambda config, _: stage(config, 1, freeze=("^lm/",)),
        "stage 'stage2': the pattern '^lm/' matches no parameter",
    ),
    "a rate's pattern": (
        lambda config, _: stage(config, 1, learning_rate_by_path={"(": 1e-3}),
        "stage 'stage2': '(' is not a regular expression",
    ),
    "data of a later stage": (lambda config, _: stage(config, 1, data="none.json"), "the data file none.json"),
    "lengths of all stages": (
        lambda config, _: stage(stage(config, 0, max_question_length=1), 1, max_question_length=1),
        r"validation_data .* can be used in stage 'stage1' (2 question_too_long",
    ),
    "init_from": (lambda config, folder: dataclasses.replace(config, init_from=str(folder)), "holds no checkpoint"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_ends_training_before_it_begins_and_the_doctor_says_the_same(config, tmp_path, fault, monkeypatch):
    change, expected = FAULTS[fault]
    if fault == "wandb":
        monkeypatch.setitem(sys.modules, "wandb", None)
    config = change(config, tmp_path)
    with pytest.raises(UserError) as error:
        train(config, tmp_path / "run")
    assert all(part in str(error.value) for part in expected.split(".*")), str(error.value)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
    found = config_check.check_inputs(config, str(tmp_path / "run"), (), 1)
    assert [problem.what for problem in found if problem.stops] == [str(error.value)]


def test_a_stage_too_short_for_validation_goes_without_and_says_so(config, tmp_path):
    config = stage(config, 0, max_question_length=1)
    problems = []
    inputs = checks.open_inputs(config, tmp_path / "run", (), problems)
    assert not problems and list(inputs.validation) == ["stage2"]
    found = list(config_check.check_inputs(config, str(tmp_path / "run"), (), 1))
    assert [(problem.stops, problem.what.partition(":")[0]) for problem in found] == [
        (False, "stage1 has no validation")
    ]


def test_the_doctor_names_all_faults_at_once(config, tmp_path):
    config = dataclasses.replace(
        stage(stage(config, 1, freeze=("^lm/",)), 0, data="none.json"),
        mesh=MeshConfig(data=3),
        evaluate_every=1,
        validation_data="gone.json",
    )
    found = list(config_check.check_inputs(config, str(tmp_path), (), 6))
    assert len(found) == 5 and all(problem.stops for problem in found), found
    # A mesh of devices that are not here: their number decides.
    config = dataclasses.replace(config, mesh=MeshConfig(data=-1))
    found = [problem.what for problem in config_check.check_inputs(config, str(tmp_path), (), 8)]
    assert any("2 row(s) a microbatch do not divide over 8 devices" in what for what in found), found


def test_the_doctor_passes_warnings_on(config, tmp_path):
    records = json.loads(Path(config.validation_data).read_text())
    (tmp_path / "validation.json").write_text(json.dumps([{**records[0], "image": "gone.png"}, *records]))
    config = dataclasses.replace(
        config,
        validation_data=str(tmp_path / "validation.json"),
        validation_image_folder=str(Path(config.validation_data).parent),
    )
    found = list(config_check.check_inputs(config, str(tmp_path), (), 1))
    assert found and all(isinstance(problem, Problem) and not problem.stops for problem in found)
    assert "1 validation record(s) of the first 3 cannot be used" in found[0].what


def test_a_stage_of_which_no_checkpoint_can_be_read_is_said_by_both(config, tmp_path):
    step = tmp_path / "run" / "stage1" / "checkpoints" / "4"
    (step / "about").mkdir(parents=True)
    (step / "about" / "_strings.json").write_text("{")
    with pytest.raises(UserError, match=r"No checkpoint in .* is intact \(step 4: .*; move that folder away") as error:
        train(config, tmp_path / "run")
    found = config_check.check_inputs(config, str(tmp_path / "run"), (), 1)
    assert [problem.what for problem in found if problem.stops] == [str(error.value)]
