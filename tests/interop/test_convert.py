"""Conversion: round trips bit for bit, full published shapes, checkpoints that train, and every kind of bad input."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.fixtures import params, tiny
from helpers.goldens import CASES, GOLDENS, needs_goldens
from helpers.published_folder import PUBLISHED, equal_trees, write_published
from safetensors.numpy import load_file, save_file

from fusion_jax import convert
from fusion_jax.errors import UserError
from fusion_jax.interop import exporting, hf_config, importing, table
from fusion_jax.interop.new_folder import new_folder
from fusion_jax.interop.opening import UNUSED, open_published
from fusion_jax.interop.published_config import published_config
from fusion_jax.interop.shapes import parameter_shapes
from fusion_jax.interop.tensors import TensorFolder
from fusion_jax.models.config import VARIANTS, FusionConfig, RopeConfig
from fusion_jax.training import resume
from fusion_jax.training.about import load_about
from fusion_jax.training.loading import find_checkpoint, load_model, load_params

MODEL = tiny("released", **PUBLISHED)


@pytest.fixture
def published(tmp_path):
    return write_published(tmp_path / "published", MODEL, params(MODEL))


@needs_goldens
@pytest.mark.parametrize("case", CASES)
def test_published_folders_come_back_bit_for_bit(case, tmp_path):
    importing.write_checkpoint(open_published(GOLDENS / case / "hf"), tmp_path / "checkpoint", progress=False)
    exporting.export(tmp_path / "checkpoint", tmp_path / "out", "published", progress=False)
    before, after = (
        load_file(GOLDENS / case / "hf" / "model.safetensors"),
        load_file(tmp_path / "out/model.safetensors"),
    )
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name], err_msg=name)
    old, new = (hf_config.read_config(folder) for folder in (GOLDENS / case / "hf", tmp_path / "out"))
    assert {key: new[key] for key in old if old[key] is not None} == {k: v for k, v in old.items() if v is not None}


@pytest.mark.parametrize("template", ["llama3", "phi3"])
def test_sharded_folders_of_both_families(template, tmp_path):
    rope = RopeConfig("longrope", original_length=16, max_length=64, short_factors=(1.1,) * 2, long_factors=(3.0,) * 2)
    model = tiny(
        "released", **{"exchange.heads": 16, "llm.rope": rope} if template == "phi3" else {"exchange.heads": 16}
    )
    source = write_published(tmp_path / "in", model, params(model), template, shard_bytes=8000)
    assert len(list(source.glob("model-*.safetensors"))) > 2
    read_model, weights = importing.load(source)
    assert read_model == model
    padded = params(model)
    assert equal_trees(weights, jax.tree.map(np.asarray, padded) | {"llm": weights["llm"]})
    vocabulary = model.llm.vocab_size
    np.testing.assert_array_equal(weights["llm"]["embedding"][:vocabulary], padded["llm"]["embedding"][:vocabulary])


def expected_tensors(model: FusionConfig, phi: bool) -> dict[str, tuple[int, ...]]:
    """Published names and shapes, from transformers' own modules and the published connectors."""
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install -e '.[torch]'")
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[torch]'")
    c, v = model.llm, model.vision
    sizes = {
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "intermediate_size": c.mlp_dim,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "pad_token_id": 0,
    }
    tower = transformers.SiglipVisionConfig(
        hidden_size=v.width,
        intermediate_size=v.mlp_dim,
        num_hidden_layers=v.layers,
        num_attention_heads=v.heads,
        image_size=v.image_size,
        patch_size=v.patch_size,
        vision_use_head=False,
    )
    with torch.device("meta"):
        decoder = (transformers.Phi3ForCausalLM if phi else transformers.LlamaForCausalLM)(
            (transformers.Phi3Config if phi else transformers.LlamaConfig)(**sizes)
        )
        encoder = transformers.SiglipVisionModel(tower)
    found = {name: tuple(p.shape) for name, p in decoder.named_parameters()}
    for name, p in encoder.named_parameters():
        found[table.VISION + name.removeprefix("vision_model.")] = tuple(p.shape)
    d, dv = c.width, v.width
    for name, first, hidden in (("mm_projector", 3 * dv, d), ("aux_projector", d, dv)):
        found |= {f"model.{name}.0.weight": (hidden, first), f"model.{name}.0.bias": (hidden,)}
        found |= {f"model.{name}.2.weight": (hidden, hidden), f"model.{name}.2.bias": (hidden,)}
    for i in range(10):
        prefix = f"model.vision_sampler_layers.{i}.layers.0."
        square = ("proj_context", "cross_attn.o_proj", "proj_out.linear_1", "proj_out.linear_2")
        square += tuple(f"cross_attn.{x}_proj.1" for x in "qkv")
        norms = ("norm", *(f"cross_attn.{x}_proj.0" for x in "qkv"))
        found |= {f"{prefix}{name}.weight": (d, d) for name in square}
        found |= {f"{prefix}{name}.{part}": (d,) for name in norms for part in ("weight", "bias")}
        found[f"{prefix}proj_in.weight"] = (d, 2 * d)
    return found


@pytest.mark.parametrize("size", ["3b", "8b"])
@pytest.mark.parametrize("name", ["fusion", "fusion_x"])
def test_table_covers_every_published_tensor_at_full_size(name, size):
    model = VARIANTS[name][size]
    rows = table.published_rows(model, parameter_shapes(model), fused=size == "3b")
    expected = expected_tensors(model, phi=size == "3b")
    table.check_complete(rows, expected, UNUSED, name)
    # And everything of ours is in the table.
    assert {path for row in rows for path, _ in row.paths} == set(parameter_shapes(model))


def test_checkpoint_exports_as_it_trains(published, tmp_path):
    """float32 export of a bfloat16 import, and the dtype asked for."""
    importing.write_checkpoint(open_published(published, dtype="bfloat16"), tmp_path / "half", progress=False)
    exporting.export(tmp_path / "half", tmp_path / "out", "published", "float32", progress=False)
    name = "model.layers.1.mlp.down_proj.weight"
    before, after = (
        load_file(published / "model.safetensors")[name],
        load_file(tmp_path / "out/model.safetensors")[name],
    )
    assert after.dtype == np.float32
    np.testing.assert_allclose(before, after, rtol=2**-8)


def test_parameters_are_restored_as_float32_masters(published, tmp_path):
    opened = open_published(published, dtype="bfloat16")
    importing.write_checkpoint(opened, tmp_path / "half", progress=False)
    like = jax.eval_shape(lambda: params(opened.model))
    restored = load_params(find_checkpoint(tmp_path / "half"), like)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(restored)} == {"float32"}


def test_continued_runs_take_sizes_from_the_checkpoint(published, tmp_path):
    importing.write_checkpoint(open_published(published), tmp_path / "checkpoint", progress=False)
    about = load_about(tmp_path / "checkpoint")
    # A config need not know what comes with the weights ...
    vague = dataclasses.replace(MODEL, llm=dataclasses.replace(MODEL.llm, vocab_size=1000))
    assert resume.continue_model(vague, about, "checkpoint").llm == MODEL.llm
    # ... but must mean the same model.
    other = dataclasses.replace(MODEL, llm=dataclasses.replace(MODEL.llm, layers=4))
    with pytest.raises(UserError, match=r"config.model does not fit DIR: llm.layers=4 \(checkpoint: 2\)\."):
        resume.continue_model(other, about, "DIR")


# ---- Bad input: one sentence that names file and tensor, nothing left behind, the source untouched.


def change(folder: Path, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


NAME = "model.norm.weight"


def drop(tensors):
    del tensors[NAME]


def add(tensors):
    tensors["model.extra.weight"] = np.zeros(3, np.float32)


def reshape(tensors):
    tensors[NAME] = np.zeros(5, np.float32)


def integers(tensors):
    tensors[NAME] = np.zeros(16, np.int32)


@pytest.mark.parametrize(
    "edit, message",
    [
        (drop, r"lacks model.norm.weight\."),
        (add, r"has the unknown tensor model.extra.weight\."),
        (reshape, r"model.norm.weight has shape \(5,\); the config asks for \(16,\)\."),
        (integers, r"model.norm.weight has type I32; allowed: float32"),
    ],
)
def test_tensors_that_do_not_fit(published, tmp_path, edit, message):
    change(published, edit)
    with pytest.raises(UserError, match=message):
        open_published(published)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_hidden_layers": 3}, r"lacks model.layers.2"),
        ({"hidden_size": 32}, r"the config asks for"),
        ({"model_type": "gpt2"}, r"'gpt2' is not a published FUSION model"),
        ({"vision_config": None, "mm_vision_tower": "someone/tower"}, r"mm_vision_tower 'someone/tower' is unknown"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, r"rope scaling of type 'yarn' is unknown"),
        ({"rope_scaling": {"rope_type": "llama3"}}, r"rope scaling of type 'llama3' lacks 'factor'"),
        ({"attention_bias": True}, r"attention_bias=true is not supported"),
        ({"hidden_act": "gelu"}, r"hidden_act 'gelu' is not supported"),
        ({"query_len": None}, r"lacks 'query_len'"),
        ({"query_len": "4,x"}, r"config.json has a value of the wrong kind"),
        ({"num_hidden_layers": "2"}, r"config.json has a value of the wrong kind"),
        ({"num_attention_heads": 0}, r"config.json"),
        ({"rope_scaling": [1]}, r"config.json has a value of the wrong kind"),
        ({"num_attention_heads": 3}, r"llm.heads=3"),
    ],
)
def test_configs_that_contradict_the_weights_or_are_unknown(published, changes, message):
    edit_config(published, **changes)
    with pytest.raises(UserError, match=message):
        open_published(published)


def test_truncated_file(published):
    file = published / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model.safetensors is damaged or cut short"):
        open_published(published)


def test_index_and_shards_must_agree(tmp_path):
    source = write_published(tmp_path / "in", MODEL, params(MODEL), shard_bytes=8000)
    shard = sorted(source.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(UserError, match=rf"{shard.name} is missing, though the index"):
        TensorFolder(source)
    shard.write_bytes(content)
    index = source / "model.safetensors.index.json"
    edited = json.loads(index.read_text())
    edited["weight_map"]["model.norm.weight"] = shard.name
    index.write_text(json.dumps(edited))
    with pytest.raises(UserError, match=r"places \['model.norm.weight'\] in"):
        TensorFolder(source)
    index.write_text("{")
    with pytest.raises(UserError, match=r"is not a valid index"):
        TensorFolder(source)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_missing_files(published, missing):
    (published / missing).unlink()
    with pytest.raises(UserError, match=missing.replace(".", r"\.")):
        open_published(published)


def test_missing_folder(tmp_path):
    with pytest.raises(UserError, match=r"has no config.json"):
        open_published(tmp_path / "nowhere")


def test_pickled_weights_need_a_flag(published, tmp_path):
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install -e '.[torch]'")
    tensors = load_file(published / "model.safetensors")
    (published / "model.safetensors").unlink()
    torch.save({name: torch.from_numpy(tensor) for name, tensor in tensors.items()}, published / "pytorch_model.bin")
    with pytest.raises(UserError, match="--allow_pickle"):
        open_published(published)
    opened = open_published(published, allow_pickle=True)
    weights = importing.read(opened, lambda _, shape, dtype: np.empty(shape, dtype))
    np.testing.assert_array_equal(weights["llm"]["norm"]["scale"], tensors["model.norm.weight"])
    # What would run code is refused by the reader itself.
    torch.save({"model.norm.weight": print}, published / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be read as tensors without running code"):
        open_published(published, allow_pickle=True)


def test_targets_must_be_new_or_empty(published, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "precious").write_text("mine")
    opened = open_published(published)
    with pytest.raises(UserError, match="target is not empty"):
        importing.write_checkpoint(opened, target, progress=False)
    assert [path.name for path in target.iterdir()] == ["precious"]
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        importing.write_checkpoint(opened, file, progress=False)


def test_failures_leave_nothing_behind(published, tmp_path, monkeypatch):
    opened = open_published(published)
    before = sorted(path.name for path in tmp_path.iterdir())

    def full(fd, offset, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"GB cannot be reserved in .*: No space left on device"):
        importing.write_checkpoint(opened, tmp_path / "target", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_failure_of_the_checkpoint_writer_leaves_nothing_behind(published, tmp_path, monkeypatch):
    opened = open_published(published)
    before = sorted(path.name for path in tmp_path.iterdir())

    def fail(path, items, overwrite):
        path.rmdir()  # Orbax builds in a folder of its own beside it
        (path.parent / f"{path.name}.orbax-checkpoint-tmp").mkdir()
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

    monkeypatch.setattr(importing.ocp, "save_checkpointables", fail)
    with pytest.raises(UserError, match="target could not be written: RESOURCE_EXHAUSTED"):
        importing.write_checkpoint(opened, tmp_path / "target", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_disk_room_is_looked_at_first(published, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match=r"target needs 0.00 GB of disk room, but 0.00 GB are free"):
        importing.write_checkpoint(open_published(published), tmp_path / "target", progress=False)
    assert not (tmp_path / "target").exists()


def test_numbers_beyond_float16_are_refused(published, tmp_path):
    def enlarge(tensors):
        tensors["model.norm.weight"] = np.full(16, 1e5, np.float32)

    change(published, enlarge)
    opened = open_published(published, dtype="float16")
    with pytest.raises(UserError, match=r"model.norm.weight has numbers beyond the range of float16"):
        importing.write_checkpoint(opened, tmp_path / "target", progress=False)


def test_a_folder_that_is_no_checkpoint(tmp_path):
    (tmp_path / "params").mkdir()
    with pytest.raises(UserError, match="is not an intact checkpoint"):
        exporting.open_checkpoint(tmp_path)


def test_interrupted_folders_never_take_the_name(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "target") as building:
        (building / "half").write_text("written")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_models_that_the_published_code_cannot_hold(published, tmp_path):
    importing.write_checkpoint(open_published(published), tmp_path / "checkpoint", progress=False)
    source = exporting.open_checkpoint(tmp_path / "checkpoint")
    for changes in (
        {"taps": "paper"},
        {"latent_init": "learned"},
        {"text_guided": False},
        {"image_tokens": 4},
        {"guide": "first_round"},
    ):
        with pytest.raises(UserError, match=next(iter(changes))):
            published_config(dataclasses.replace(source.config.model, **changes), "llama3", {}, "float32")
    with pytest.raises(UserError, match="format 'gguf' is unknown; allowed: published, transformers"):
        exporting.export(tmp_path / "checkpoint", tmp_path / "out", "gguf")
    with pytest.raises(UserError, match="dtype 'int8' is unknown"):
        exporting.export(tmp_path / "checkpoint", tmp_path / "out", "published", "int8")
    with pytest.raises(UserError, match="holds no checkpoint"):
        exporting.export(tmp_path / "nowhere", tmp_path / "out", "published")


def test_where_an_image_stands_is_no_matter_of_the_published_format():
    """Older checkpoints keep a late image in its turn; they are exported all the same, with their folder's words."""
    origin = published_config(MODEL, "llama3", {}, "float32") | {
        "extra": "word",
        "max_position_embeddings": 99,
    }
    before = dataclasses.replace(MODEL, image_place="turn")
    assert published_config(before, "llama3", {}, "float32") == published_config(MODEL, "llama3", {}, "float32")
    exported = published_config(before, "llama3", origin, "float32")
    assert exported == published_config(MODEL, "llama3", origin, "float32")
    assert exported["extra"] == "word"


def test_a_checkpoint_without_tokenizer_says_so(published, tmp_path):
    importing.write_checkpoint(open_published(published), tmp_path / "checkpoint", progress=False)
    with pytest.raises(UserError, match="holds no tokenizer"):
        exporting.export(tmp_path / "checkpoint", tmp_path / "out", "transformers", progress=False)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_model(tmp_path / "checkpoint")


def test_command_line(published, tmp_path):

    def run(*arguments):
        command = [sys.executable, "-m", "fusion_jax.convert", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(convert.__file__).parents[1])

    done = run("import", "--from", published, "--out", tmp_path / "checkpoint")
    assert done.returncode == 0, done.stderr
    assert "parameters" in done.stdout
    done = run("export", "--checkpoint", tmp_path / "checkpoint", "--format", "published", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert load_file(tmp_path / "out/model.safetensors").keys() >= load_file(published / "model.safetensors").keys()
    done = run("import", "--from", published, "--vision", published, "--out", tmp_path / "x")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "Give --from DIR for a whole model, or both --vision DIR and --llm DIR" in done.stderr
    done = run("transmogrify")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert not (tmp_path / "x").exists()
