"""What a run that goes on compares with its checkpoint: data, tokenizer, template; and which stage is the last."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest
from helpers import tiny_run
from helpers.forged import forge, without
from helpers.shapes_data import make_shapes
from PIL import Image

from fusion_jax.config import RunConfig, from_dict
from fusion_jax.data import shard_writing
from fusion_jax.data.sources import load_source
from fusion_jax.data.templates import TEMPLATES
from fusion_jax.data.tokenizer import load_tokenizer
from fusion_jax.errors import UserError
from fusion_jax.training import about, checkpoint, integrity, resume
from fusion_jax.training.checkpoint_folders import order_in
from fusion_jax.training.input_check import differences
from fusion_jax.training.loading import find_checkpoint
from fusion_jax.training.state import TrainState

WHERE = Path("runs/a/stage1/checkpoints")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("scenes") / "data", "8,8,8,2,2")


@pytest.fixture
def data(made, tmp_path):
    shutil.copytree(made, tmp_path / "data")
    return tmp_path / "data"


def configured(data):
    return from_dict(RunConfig, tiny_run.get_config(f"{data},survival").to_dict())


def described(data):
    """The data and about of a run, as a checkpoint of its first stage has them."""
    config = configured(data)
    parts = load_source(config.stages[0].data).describe()
    return json.loads(about.describe_run(config, load_tokenizer(config.tokenizer), data={"stage1": parts})["json"])


def check(data, saved, accepted=(), finished=False, **changes):
    config = dataclasses.replace(configured(data), **changes)
    parts = None if finished else load_source(config.stages[0].data).describe()
    tokenizer = load_tokenizer(config.tokenizer)
    resume.check_inputs(config, config.stages[0], parts, tokenizer, saved, WHERE, accepted)


def rewrite(path, change):
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def another_word(records):
    records[3]["conversations"][1]["value"] = records[3]["conversations"][1]["value"].swapcase()
    return records


def swap_tokens(folder):
    """Two control tokens change places."""
    names = ("<|end|>", "<|assistant|>")
    ids = json.loads((folder / "added_tokens.json").read_text())
    rewrite(folder / "added_tokens.json", lambda a: {**a, names[0]: a[names[1]], names[1]: a[names[0]]})

    def swap(config):
        entries = config["added_tokens_decoder"]
        one, other = (str(ids[name]) for name in names)
        entries[one], entries[other] = entries[other], entries[one]
        return config

    rewrite(folder / "tokenizer_config.json", swap)


def test_a_run_whose_files_have_not_changed_goes_on(data, tmp_path, caplog):
    saved = described(data)
    check(data, saved)
    moved = tmp_path / "moved"
    shutil.copytree(data, moved)
    rewrite(moved / "tokenizer" / "tokenizer_config.json", lambda config: dict(reversed(config.items())))
    check(moved, saved)
    assert not caplog.text


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda records: [*records, records[0]], "stage1.json with 9 records (checkpoint: 8) and "),
        (lambda records: records[:-1], "stage1.json with 7 records (checkpoint: 8) and "),
        (another_word, "stage1.json with other content of the same size"),
        (lambda records: [records[1], records[0], *records[2:]], "stage1.json with other content of the same size"),
    ],
)
def test_other_data_are_named_and_may_be_accepted(data, change, expected, caplog):
    rewrite(data / "stage1.json", lambda records: records)  # as `rewrite` writes it
    saved = described(data)
    rewrite(data / "stage1.json", change)
    with pytest.raises(UserError, match="go on with what is there now by --accept_changed=data") as error:
        check(data, saved)
    assert expected in str(error.value) and f"{WHERE} was trained on something else" in str(error.value)
    with pytest.raises(UserError):
        check(data, saved, ("tokenizer", "template"))
    check(data, saved, finished=True)  # nothing of it is trained any more
    check(data, saved, ("data",))
    assert expected in caplog.text


def test_another_choice_of_the_same_file_is_other_data(data):
    mixture = data / "stage1.yaml"
    entry = "datasets: [{json_path: stage1.json, image_folder: ., sampling_strategy: '%s', weight: %s}%s]"
    mixture.write_text(entry % ("first:4", 1, ""))
    saved = described(data)
    for values, expected in (
        (("end:4", 1, ""), "another choice of the records of stage1.json"),
        (("first:4", 2, ""), "8 records of stage1.json an epoch (checkpoint: 4)"),
        (
            ("first:4", 1, ", {json_path: stage2.json}"),
            "the data sets stage1.json, stage2.json (checkpoint: stage1.json)",
        ),
    ):
        mixture.write_text(entry % values)
        with pytest.raises(UserError) as error:
            check(data, saved)
        assert expected in str(error.value)


def test_a_large_file_is_known_by_its_places_and_some_records(data, monkeypatch):
    monkeypatch.setattr("fusion_jax.data.data_sets._HASHED", 10)
    saved = described(data)
    check(data, saved)
    rewrite(data / "stage1.json", another_word)
    with pytest.raises(UserError, match=r"stage1.json with "):
        check(data, saved)


def test_another_tokenizer_is_named_and_may_be_accepted(data, caplog):
    saved = described(data)
    swap_tokens(data / "tokenizer")
    with pytest.raises(UserError, match=r"another tokenizer_config.json and added_tokens.json.*_changed=tokenizer\."):
        check(data, saved)
    check(data, saved, ("tokenizer",))
    assert "another tokenizer_config.json and added_tokens.json" in caplog.text


def test_another_template_is_named_and_may_be_accepted(data, monkeypatch):
    saved = described(data)
    with pytest.raises(UserError, match=r"template='llama3' \(checkpoint: 'phi3'\).*--accept_changed=template\."):
        check(data, saved, template="llama3")
    check(data, saved, ("template",), template="llama3")
    # The same name for other texts, as another version of the program may have it.
    other = dataclasses.replace(TEMPLATES["phi3"], default_system="Be brief.")
    monkeypatch.setitem(TEMPLATES, "phi3", other)
    with pytest.raises(UserError, match="the template 'phi3' makes other tokens of the same conversation"):
        check(data, saved)


def test_checkpoints_of_earlier_versions_are_compared_by_their_records(data, caplog):
    saved = without(without(described(data), "data"), "conversation") | {"records": {"stage1": 8}}
    caplog.set_level("INFO")
    rewrite(data / "stage1.json", another_word)
    check(data, saved)
    assert "is of an earlier version, whose data are known by their number of records alone" in caplog.text
    with pytest.raises(UserError, match=r"has 8 records \(checkpoint: 7\)"):
        check(data, saved | {"records": {"stage1": 7}})


def test_forged_numbers_of_files_are_refused(data):
    saved = described(data)
    about.check_form(saved)
    part = saved["data"]["stage1"][0]
    for forged in (part, None, [part, []], [{**part, "drawn": "8"}]):
        with pytest.raises(ValueError, match=r"'data' of its about has .* for 'stage1' instead of files' numbers"):
            about.check_form({**saved, "data": {"stage1": forged}})
    old = without(saved, "format")
    assert not about.always_bos(old | {"config": {**old["config"], "template": "own"}}, WHERE)


def test_shards_are_known_by_their_hashes(data, tmp_path):
    """Other pictures are other data, though the texts are the same."""
    shard_writing.convert(data / "stage1.json", data, tmp_path / "a" / "s", progress=False)
    shard_writing.convert(data / "stage1.json", data, tmp_path / "b" / "s", progress=False)
    name = json.loads((data / "stage1.json").read_text())[0]["image"]
    Image.open(data / name).convert("L").save(data / name)
    shard_writing.convert(data / "stage1.json", data, tmp_path / "c" / "s", progress=False)
    a, b, c = (load_source(tmp_path / x / "s").describe() for x in "abc")
    assert a == b and a[0]["records"] == 8
    assert differences(c, a, "checkpoint")[0].startswith("s with ")


# Which stage is the last.


@pytest.fixture(scope="module")
def stages(made, tmp_path_factory):
    """Two stages without arrays: what `find` looks at."""
    run = tmp_path_factory.mktemp("run") / "run"
    config = configured(made)
    text = about.describe_run(config, load_tokenizer(config.tokenizer))
    source = tmp_path_factory.mktemp("model")
    saved = checkpoint.Checkpoints(source / "c", text)
    zero = jnp.zeros((), jnp.int32)
    saved.finish(8, TrainState(zero, {"w": jnp.ones(3)}, {"m": jnp.ones(3)}, zero, zero), {"next": 8}, patience=0)
    for place, name in enumerate(("stage1", "stage2")):
        step = run / name / "checkpoints" / "8"
        shutil.copytree(source / "c" / "8", step)
        forge(step, "about", lambda a, name=name, place=place: {**a, "stage": {"name": name, "order": place}})
    return run


def at(path, seconds):
    os.utime(path, (seconds, seconds))


@pytest.mark.parametrize("old", [False, True])
def test_the_last_stage_is_found_whatever_the_times_say(stages, tmp_path, old):
    run = tmp_path / "run"
    shutil.copytree(stages, run)
    for k, name in enumerate(("stage2", "stage1")):
        if old:  # a checkpoint of an earlier version: the names of the stages alone
            forge(run / name / "checkpoints" / "8", "about", lambda a: without(a, "stage"))
        at(run / name / "checkpoints", 1000 + 1000 * k)
    assert find_checkpoint(run) == run / "stage2" / "checkpoints" / "8"
    # A damaged last stage: the one before.
    (run / "stage2" / "checkpoints" / "8" / "about" / "_strings.json").write_text("{")
    integrity.write(run / "stage2" / "checkpoints" / "8", 0)
    assert find_checkpoint(run) == run / "stage1" / "checkpoints" / "8"


def test_times_decide_where_nothing_else_does(stages, tmp_path):
    run = tmp_path / "run"
    for k, name in enumerate(("b", "a")):
        step = run / name / "checkpoints" / "8"
        shutil.copytree(stages / "stage1" / "checkpoints" / "8", step)
        forge(step, "about", lambda a: without(a, "stage"))
        at(step.parent, 1000 + 1000 * k)
    assert find_checkpoint(run) == run / "a" / "checkpoints" / "8"


def test_a_new_stage_comes_behind_all_that_are_there(stages, tmp_path):
    """Also where the config that adds it has no place for the earlier ones any more."""
    run = tmp_path / "run"
    assert order_in(run, "stage1") == 0
    shutil.copytree(stages, run)
    assert order_in(run, "stage1") == 0 and order_in(run, "stage2") == 1
    assert order_in(run, "more") == 2
