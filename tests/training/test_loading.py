"""What the commands that use a trained model trust of a checkpoint, and what they fall back to."""

import base64
import dataclasses
import gc
import os
import shutil
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from helpers import tiny_checkpoint, tiny_run
from helpers.fixtures import shapes
from helpers.forged import forge, without
from helpers.shapes_data import make_shapes

from fusion_jax.errors import UserError
from fusion_jax.interop import exporting
from fusion_jax.models import fusion, weights
from fusion_jax.training import init_from, integrity, loading, resume
from fusion_jax.training.about import load_about, save_tokenizer
from fusion_jax.training.loading import find_checkpoint, load_model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A stage with a checkpoint of a real model and tokenizer at step 8."""
    folder = tmp_path_factory.mktemp("model")
    data = make_shapes(folder / "data", "4,4,4,4,4")
    tiny_checkpoint.save(folder / "run", data)
    step = folder / "run" / "stage2" / "checkpoints" / "8"
    integrity.write(step, 0)
    return folder / "run"


@pytest.fixture
def two(run, tmp_path):
    """The same twice: the folders of steps 8 and 9."""
    folder = tmp_path / "run" / "stage2" / "checkpoints"
    for step in ("8", "9"):
        shutil.copytree(run / "stage2" / "checkpoints" / "8", folder / step)
    return folder / "8", folder / "9"


TOKENIZER = {"a path": "../../planted", "an absolute path": "/tmp/planted", "a folder": "sub/tokenizer.model"}
TOKENIZER |= {"another file": "pytorch_model.bin", "nothing": "", "a folder above": ".."}


@pytest.mark.parametrize("name", TOKENIZER)
def test_checkpoint_writes_the_known_files_of_a_tokenizer_only(two, tmp_path, name):
    entry = base64.b64encode(b"planted").decode()
    about = {"config": {}, "tokenizer": {TOKENIZER[name]: entry}}
    with pytest.raises(UserError, match=r"known are tokenizer.model, tokenizer.json"):
        save_tokenizer(about, tmp_path / "a" / "b" / "c")
    forge(two[1], "about", lambda about: {**about, "tokenizer": {**about["tokenizer"], TOKENIZER[name]: entry}})
    with pytest.raises(UserError, match=rf"{two[1]} is not an intact checkpoint: .* known are tokenizer.model"):
        load_model(two[1])
    assert not list(tmp_path.rglob("*planted*")) and not Path("/tmp/planted").exists()


@pytest.mark.parametrize("content", ["no base64!", 5, None, ["x"], {}])
def test_content_of_a_tokenizer_file_must_be_base64(two, tmp_path, content):
    about = {"tokenizer": {"tokenizer.model": content}}
    with pytest.raises(UserError):
        save_tokenizer(about, tmp_path / "tokenizer")
    assert not (tmp_path / "tokenizer").exists()


ABOUTS = {
    "a list": lambda about: [],
    "null": lambda about: None,
    "no config": lambda about: without(about, "config"),
    "no tokenizer": lambda about: without(about, "tokenizer"),
    "a tokenizer that is a list": lambda about: {**about, "tokenizer": ["tokenizer.model"]},
    "records that are texts": lambda about: {**about, "records": {"stage2": "many"}},
    "an origin that is a text": lambda about: {**about, "origin": "/etc"},
    "a config with another key": lambda about: {**about, "config": {**about["config"], "other": 1}},
    "a config without a model": lambda about: {**about, "config": without(about["config"], "model")},
    "an endless learning rate": lambda about: {**about, "config": {**about["config"], "seed": 1e999}},
    "deeply nested": lambda about: "[" * 100_000,
}


@pytest.mark.parametrize("form", ABOUTS)
def test_commands_fall_back_from_an_about_of_another_form(two, caplog, form):
    before, newest = two
    forge(newest, "about", ABOUTS[form])
    assert find_checkpoint(newest.parents[2]) == before
    assert "trying the previous one" in caplog.text and str(newest) in caplog.text
    with pytest.raises(UserError, match=str(newest)) as error:
        load_about(newest)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    assert resume.newest_about(newest.parent) == load_about(before)


@pytest.mark.parametrize("damage", ["empty", "content", "no params", "list"])
def test_commands_fall_back_from_a_damaged_checkpoint_and_say_so(two, caplog, damage):
    before, newest = two
    if damage == "empty":
        shutil.rmtree(newest)
        newest.mkdir()
    elif damage == "no params":
        shutil.rmtree(newest / "params")
    elif damage == "list":
        (newest / "files.0.json").write_text("[]")
    else:
        path = max((newest / "params").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    for place in (newest.parent, newest.parents[1], newest.parents[2]):
        caplog.clear()
        assert find_checkpoint(place) == before
        assert f"going back to {before}; 9 is not intact" in caplog.text
    assert load_model(newest.parents[2]).step == 8
    shutil.rmtree(before)
    with pytest.raises(UserError, match=r"No checkpoint in .* is intact"):
        find_checkpoint(newest.parents[2])


@pytest.mark.parametrize(
    ("what", "listed"), [("manifest", "not"), ("arrays", "under another number"), ("shapes", "damaged")]
)
def test_params_that_cannot_be_read_are_passed_over_whatever_the_list_says(two, tmp_path, caplog, capfd, what, listed):
    before, newest = two
    if what == "shapes":
        (newest / "params" / "_METADATA").write_text("{}")
    for path in (newest / "params").rglob("manifest.ocdbt" if what == "manifest" else "d/*"):
        if what != "shapes" and path.is_file():
            os.truncate(path, 20)
    if listed == "damaged":
        (newest / "files.0.json").unlink()
        integrity.write(newest, 0)
    elif listed == "under another number":
        (newest / "files.0.json").rename(newest / "files.1.json")
    else:
        (newest / "files.0.json").unlink()
    workdir = newest.parents[2]
    assert load_model(workdir).folder == before
    assert exporting.export(workdir, tmp_path / "exported", "transformers", progress=False) == before
    config = load_model(before).config
    config = dataclasses.replace(config, init_from=str(workdir))
    like = jax.eval_shape(lambda: fusion.init(config.model, jax.random.key(0)))
    assert init_from.initial_parameters(config, like)[0] == before
    assert f"checkpoint {newest} is damaged: " in caplog.text and f"going back to {before}; 9" in caplog.text
    with pytest.raises(UserError, match=f"{newest} is not an intact checkpoint: .*") as error:
        load_model(newest)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600 and "bound method" not in str(error.value)
    gc.collect()
    time.sleep(0.2)
    output = "".join(capfd.readouterr()) + caplog.text
    assert "Traceback" not in output and "never retrieved" not in output


def test_commands_say_that_the_bytes_of_a_checkpoint_without_a_list_cannot_be_checked(two, caplog):
    (two[1] / "files.0.json").unlink()
    assert find_checkpoint(two[1].parents[2]) == two[1]
    assert f"checkpoint {two[1]} has no list of its files" in caplog.text


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [("llm", "width", 2**40), ("llm", "layers", 10**9), ("llm", "vocab_size", 10**12), ("vision", "image_size", 10**6)],
)
def test_config_of_absurd_size_takes_no_memory(two, part, name, value):
    def change(about):
        about["config"]["model"][part][name] = value
        for stage in about["config"]["stages"]:
            stage["max_length"] = 10**15
        return about

    forge(two[1], "about", change)
    with pytest.raises(UserError, match=str(two[1])):
        load_model(two[1])


def test_parameters_of_another_model_are_named(two):
    def change(about):
        about["config"]["model"]["llm"]["mlp_dim"] = 64
        return about

    forge(two[1], "about", change)
    with pytest.raises(UserError, match=r"parameters of another model: llm/.* has shape .*, the config asks for"):
        load_model(two[1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_model_that_answers_has_its_weights_as_its_layers_read_them(run, dtype):
    """Bit for bit: what is read in a dtype is what was saved, cast."""
    step = run / "stage2" / "checkpoints" / "8"
    saved = loading.load_params(step, shapes(tiny_run.MODEL))
    loaded = load_model(step, dtype)
    assert loaded.model.dtype == dtype
    assert_equal(loaded.params, weights.unstack(weights.as_read(saved, dtype)))


def test_matrices_become_int8_part_by_part(run, monkeypatch):
    """Files are read in parts, one array at a time here; only what a part holds is in float32."""
    step = run / "stage2" / "checkpoints" / "8"
    whole = load_model(step, "bfloat16", "int8").params
    sizes = []
    read = loading.read_params

    def read_part(folder, like):
        sizes.append(sum(x.size * 4 for x in like.values()))
        return read(folder, like)

    monkeypatch.setattr(loading, "read_params", read_part)
    monkeypatch.setattr(loading, "_PART", 1 << 15)
    assert_equal(load_model(step, "bfloat16", "int8").params, whole)
    assert len(sizes) > 4 and max(sizes) <= max(1 << 15, *(x.size * 4 for x in jax.tree.leaves(whole)))
    saved = loading.load_params(step, shapes(tiny_run.MODEL))
    integers, scales = weights.to_int8(saved["llm"]["head"])
    assert_equal(
        {"head": whole["llm"]["head"], "scale": whole["llm"]["head_scale"]}, {"head": integers, "scale": scales}
    )
    assert whole["llm"]["embedding"].dtype == "bfloat16" and whole["llm"]["norm"]["scale"].dtype == "float32"


def assert_equal(ours, theirs):
    flat = flatten_dict(theirs, sep="/")
    assert flatten_dict(ours, sep="/").keys() == flat.keys()
    for path, x in flatten_dict(ours, sep="/").items():
        assert x.dtype == flat[path].dtype, path
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(flat[path], np.float32), err_msg=path)
