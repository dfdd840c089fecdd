"""Exports for the published code: what it opens is written so that it does, everything else is refused before."""

import json

import jax
import numpy as np
import pytest
from helpers.fixtures import params, tiny
from helpers.goldens import GOLDENS
from helpers.published_folder import PUBLISHED, equal_trees, write_with_tokenizer
from safetensors.numpy import load_file

from fusion_jax.data.tokenizer import load_tokenizer
from fusion_jax.errors import UserError
from fusion_jax.interop import exporting, hf_config, importing, published
from fusion_jax.interop.opening import Opened, open_published
from fusion_jax.interop.published_config import published_config
from fusion_jax.interop.shapes import parameter_shapes
from fusion_jax.models.config import GIANT, SO400M, FusionConfig, replace
from fusion_jax.training.about import describe_run

SIGLIP = {"vision.patch_size": 14, "vision.layers": 26}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in the published format, with a tokenizer."""
    return write_with_tokenizer(tmp_path_factory.mktemp("published") / "in", tiny("released", **PUBLISHED))


def saved(folder, path, model: FusionConfig, template: str = "llama3"):
    """A checkpoint of random parameters, as training leaves it, with nothing of the folder but its tokenizer."""
    flat = params(model)
    about = describe_run(importing.run_config(Opened(model, template, None, [], {})), load_tokenizer(folder), {})
    importing.ocp.save_checkpointables(path, {"params": flat, "about": about})
    return jax.tree.map(np.asarray, flat)


@pytest.mark.parametrize("word", ["siglip2", "siglip"])
def test_another_tower_gets_a_folder_under_a_name_that_is_taken(folder, tmp_path, word):
    model = tiny("released", **PUBLISHED | (SIGLIP if word == "siglip" else {}) | {"vision.norm_eps": 1e-5})
    given = saved(folder, tmp_path / "checkpoint", model)
    exporting.export(tmp_path / "checkpoint", tmp_path / "out", "published", progress=False)
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    # The published code looks for these words, siglip2 first, and opens the path as transformers does.
    tower = tmp_path / "out" / f"vision_{word}"
    assert described["mm_vision_tower"] == str(tower)
    assert ("siglip2" in described["mm_vision_tower"]) == (word == "siglip2")
    assert described["pad_token_id"] is None
    stops = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    assert stops == [2, 3]  # </s> and <|eot_id|>

    read_model, weights = importing.load(tmp_path / "out")
    assert read_model == model
    vocabulary = model.llm.vocab_size
    for weight in (given["llm"], weights["llm"]):
        weight["embedding"], weight["head"] = weight["embedding"][:vocabulary], weight["head"][:, :vocabulary]
    assert equal_trees(weights, given)

    # The tower's folder holds the same numbers, and a last layer that adds nothing.
    alone, whole = load_file(tower / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    prefix = "model.vision_tower.vision_tower."
    assert {name for name in alone if prefix + name not in whole} == {
        name for name in alone if f"encoder.layers.{model.vision.layers}." in name
    }
    for name, tensor in alone.items():
        np.testing.assert_array_equal(tensor, whole.get(prefix + name, np.zeros_like(tensor)), err_msg=name)
    assert hf_config.vision_config(hf_config.read_config(tower)) == model.vision


def test_transformers_opens_the_folders_of_the_tower_and_of_the_model(folder, tmp_path):
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install -e '.[torch]'")
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -e '.[torch]'")
    model = tiny("released", **PUBLISHED)
    saved(folder, tmp_path / "checkpoint", model, "llama3")
    exporting.export(tmp_path / "checkpoint", tmp_path / "out", "published", progress=False)
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    tower, info = transformers.SiglipVisionModel.from_pretrained(
        described["mm_vision_tower"], output_loading_info=True, dtype=torch.float32
    )
    assert not any(info.values()), info
    pixels = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 3, 384, 384), np.float32))
    with torch.no_grad():
        states = tower(pixels, output_hidden_states=True).hidden_states
    assert len(states) == 41 and torch.equal(states[39], states[40])
    # A padding token beyond the vocabulary would keep the embedding from being made.
    for kind in ("LlamaConfig", "Phi3Config"):
        keys = {key: value for key, value in described.items() if key not in ("model_type", "vision_config")}
        with torch.device("meta"):
            transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**keys))


@pytest.mark.parametrize(
    "vision, template, message",
    [
        ({"vision.image_size": 224}, "llama3", "224 pixels, patches of 16 and 40 layers"),
        ({"vision.image_size": 378, **SIGLIP}, "llama3", "378 pixels, patches of 14 and 27 layers"),
        ({"vision.layers": 26}, "llama3", "384 pixels, patches of 16 and 27 layers"),
        ({"vision.layers": 40}, "llama3", "384 pixels, patches of 16 and 41 layers"),
        ({"vision.patch_size": 14}, "llama3", "384 pixels, patches of 14 and 40 layers"),
        ({}, "chatml", "writes conversations as llama3 or phi3, and this model's template is chatml"),
        ({}, "own", "this model's template is own"),
    ],
)
def test_what_the_published_code_cannot_open_is_refused(folder, tmp_path, vision, template, message):
    model = tiny("released", **PUBLISHED | vision)
    with pytest.raises(UserError, match=message):
        published.check_opens(model, template)


def test_a_refusal_writes_nothing(folder, tmp_path):
    saved(folder, tmp_path / "checkpoint", tiny("released", **{"exchange.heads": 16}))
    with pytest.raises(UserError, match=r"checkpoint: The published code runs towers of 384 pixels only"):
        exporting.export(tmp_path / "checkpoint", tmp_path / "out", "published", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def described(model: FusionConfig, **origin):
    return published_config(model, "llama3", origin, "float32")


def test_towers_known_by_hub_id_need_no_folder(tmp_path):
    for tower, name in ((SO400M, "google/siglip-so400m-patch14-384"), (GIANT, "google/siglip2-giant-opt-patch16-384")):
        model = replace(tiny("released", **{"exchange.heads": 16}), vision=tower)
        assert published.place_tower(model, described(model), tmp_path, {}) == (name, None)
        # With another epsilon it is another tower.
        model = replace(model, **{"vision.norm_eps": 1e-5})
        assert described(model)["mm_vision_tower"] == "vision_tower"


def test_names_that_would_choose_the_other_encoder(tmp_path):
    model = tiny("released", **PUBLISHED | SIGLIP)
    shapes = parameter_shapes(model)
    with pytest.raises(UserError, match=r"name a folder without that word instead of .*siglip2-runs/out"):
        published.place_tower(model, described(model), tmp_path / "siglip2-runs" / "out", shapes)
    # The words of the folder it came from stay where they choose the right one; a path of elsewhere does not.
    for given, name, own in (
        ("vision_siglip", "vision_siglip", "vision_siglip"),
        ("someone/SigLIP-tuned", "someone/SigLIP-tuned", None),
        ("/elsewhere/vision_siglip", str(tmp_path / "vision_siglip"), "vision_siglip"),
        ("someone/siglip2-tuned", str(tmp_path / "vision_siglip"), "vision_siglip"),
        ("openai/clip", str(tmp_path / "vision_siglip"), "vision_siglip"),
    ):
        found, tower = published.place_tower(model, {"mm_vision_tower": given}, tmp_path, shapes)
        assert (found, tower and tower.name) == (name, own)


@pytest.mark.skipif(not GOLDENS.is_dir(), reason=f"no golden cases under {GOLDENS} (set FUSION_GOLDENS)")
def test_the_words_of_a_golden_folder_stay_and_its_tower_lies_beside_them(tmp_path):
    case = GOLDENS / "llama_siglip"
    importing.write_checkpoint(open_published(case / "hf"), tmp_path / "checkpoint", progress=False)
    exporting.export(tmp_path / "checkpoint", tmp_path / "out", "published", progress=False)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["mm_vision_tower"] == "vision_siglip"
    given = load_file(case / "vision_siglip" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "out" / "vision_siglip" / "model.safetensors").items():
        if ".encoder.layers.26." not in name and "post_layernorm" not in name:
            np.testing.assert_array_equal(tensor, given[name], err_msg=name)


def test_folder_names_by_which_the_published_loader_chooses(tmp_path):
    for name, template in (("fusion-phi3.5", "phi3"), ("FUSION-llama3.1-8b", "llama3")):
        assert published.name_note(tmp_path / name, template) is None
    for name, template in (("out", "phi3"), ("fusion-8b", "llama3"), ("fusion-llama3-mistral", "llama3")):
        assert "call it fusion-" in published.name_note(tmp_path / name, template)
