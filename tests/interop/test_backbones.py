"""Backbones that `transformers` itself builds and saves, imported, compared in their logits, and exported again."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest
from flax.traverse_util import flatten_dict
from helpers.backbones import (
    KINDS,
    KNOWN,
    cheap_connectors,  # noqa: F401
    language_model,
    torch,
    tower,
    transformers,
    write_tokenizer,
)
from safetensors.numpy import load_file

from fusion_jax.data.examples import layout_spec
from fusion_jax.data.layout import Example, lay_out
from fusion_jax.errors import UserError
from fusion_jax.inference import generate
from fusion_jax.interop import exporting, importing, table
from fusion_jax.interop.opening import open_backbones
from fusion_jax.models import fusion, vision
from fusion_jax.models.fusion import Fusion, example_batch
from fusion_jax.training.loading import load_model, load_params

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
TEMPLATE = {"llama": "llama3", "phi3": "phi3", "qwen2": "chatml", "mistral": "mistral"}
safetensors_torch = pytest.importorskip("safetensors.torch")

INITIALISE = importing._initialise


def test_connectors_start_as_in_a_run_from_nothing(folders):
    opened, _ = imported(folders, "llama")
    expected = flatten_dict(fusion.init(opened.model, jax.random.key(0)), sep="/")
    new = {path: np.empty(expected[path].shape, np.float32) for path in ("vision_to_text/in/kernel", "latents_16")}
    new |= {path: np.empty(expected[path].shape, np.float32) for path in expected if "exchange/" in path}
    assert len(new) > 10
    INITIALISE(opened.model, new)
    for path, array in new.items():
        np.testing.assert_allclose(array, expected[path], atol=1e-6, err_msg=path)


@functools.cache
def imported(root, kind, preset="paper", **changes):
    opened = open_backbones(root / "vision", root / kind, preset, **changes)
    return opened, importing.read(opened, lambda _, shape, dtype: np.empty(shape, dtype))


def text_logits(opened, params, ids):
    model = Fusion(opened.model)
    batch, (rows, length) = example_batch(opened.model, len(ids)), ids.shape
    none = {
        name: getattr(batch, name)[:, :0]
        for name in (
            "crops",
            "crop_kind",
            "quadrants",
            "crop_text",
            "crop_text_mask",
            "round_crop",
            "round_end",
            "windows",
        )
    }
    batch = dataclasses.replace(
        batch,
        tokens=ids.astype(np.int32),
        segment_ids=np.ones((rows, length), np.int32),
        positions=np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)),
        latent_start=batch.latent_start[:, :0],
        **none,
    )
    variables = {"params": jax.tree.map(jnp.asarray, params)}
    hidden, _, _ = jax.jit(model.apply)(variables, batch)
    return np.asarray(model.apply(variables, hidden, method="logits"))


@pytest.mark.parametrize("kind", KINDS)
def test_language_model_gives_the_logits_of_transformers(folders, kind):
    opened, params = imported(folders, kind)
    ids = np.random.default_rng(0).integers(3, KNOWN, (2, 40))  # beyond LongRoPE's original length and each window
    with torch.no_grad():
        expected = language_model(kind)(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(text_logits(opened, params, ids)[..., :KNOWN], expected[..., :KNOWN], atol=1e-4)
    if kind == "phi3":  # and below it, where the short factors hold
        short = ids[:, :12]
        with torch.no_grad():
            expected = language_model(kind)(torch.from_numpy(short)).logits.numpy()
        np.testing.assert_allclose(text_logits(opened, params, short)[..., :KNOWN], expected[..., :KNOWN], atol=1e-4)


def test_cached_answers_across_longropes_original_length_are_those_of_transformers(folders):
    """Two prompts of one batch: the first passes the length (16) with its answer, the second one does not."""
    opened, params = imported(folders, "phi3")
    ids = np.random.default_rng(0).integers(3, KNOWN, 12).astype(np.int32)
    asked = [Example(ids[:length], None, ids[:0], None) for length in (12, 7)]
    spec = dataclasses.replace(layout_spec(opened.model, 12, 1, 1), crops=0)
    params = jax.tree.map(jnp.asarray, params)
    got = generate.greedy(Fusion(opened.model), params, lay_out(asked, spec, 0), 10, (), keep_logits=True)
    for row, prompt in enumerate(asked):
        whole = torch.from_numpy(np.concatenate([prompt.input_ids, got.tokens[row, :-1]])).long()[None]
        assert whole.shape[1] == (21, 16)[row]
        with torch.no_grad():
            expected = language_model("phi3")(whole).logits[0, len(prompt.input_ids) - 1 :].numpy()
        np.testing.assert_allclose(got.logits[row][:, :KNOWN], expected[:, :KNOWN], atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_added_tokens_have_the_mean_of_the_vocabulary(folders, kind):
    opened, params = imported(folders, kind)
    embedding = params["llm"]["embedding"]
    # The rows beyond the tokenizer's tokens are cut off; behind those that stay come the two that are added.
    assert opened.model.llm.vocab_size == KNOWN + 2 == opened.tokenizer.vocab_size
    assert (opened.tokenizer.vision_start_id, opened.tokenizer.vision_end_id) == (KNOWN, KNOWN + 1)
    assert opened.template == TEMPLATE[kind.split("_")[0]]
    np.testing.assert_allclose(embedding[KNOWN : KNOWN + 2], np.tile(embedding[:KNOWN].mean(0), (2, 1)), atol=1e-6)
    assert not embedding[KNOWN + 2 :].any()
    if not opened.model.llm.tied_head:
        head = params["llm"]["head"]
        np.testing.assert_allclose(head[:, KNOWN + 1], head[:, :KNOWN].mean(1), atol=1e-6)


@pytest.mark.parametrize("whole", [False, True])
def test_vision_tower_gives_the_states_of_transformers(folders, tmp_path, whole):
    tower(whole).save_pretrained(tmp_path / "tower")
    opened = open_backbones(tmp_path / "tower", folders / "llama")
    params = importing.read(opened, lambda _, shape, dtype: np.empty(shape, dtype))
    assert opened.model.vision.layers == 3
    pixels = np.random.default_rng(1).integers(0, 256, (1, 32, 32, 3), np.uint8)
    inner = tower(whole).vision_model if whole else tower()
    with torch.no_grad():
        given = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        states = inner(given, output_hidden_states=True).hidden_states
    # Without text the taps are means of states: shallow of 0, deep of 1 (three layers are kept).
    config = dataclasses.replace(opened.model, text_guided=False, taps="released")
    encoder = vision.VisionEncoder(config, jnp.float32)
    variables = {"params": jax.tree.map(jnp.asarray, params["vision"])}
    embedded = encoder.apply(variables, jnp.asarray(pixels), jnp.zeros(1, bool), method="embed")
    taps = encoder.apply(variables, {"guided": embedded}, None, None)["guided"]
    expected = np.concatenate([states[3].numpy(), states[0].numpy(), states[1].numpy()], -1)
    np.testing.assert_allclose(taps, expected, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_export_gives_the_tensors_back_bit_for_bit(folders, tmp_path, kind):
    opened = open_backbones(folders / "vision", folders / kind, "released")
    importing.write_checkpoint(opened, tmp_path / "checkpoint", progress=False)
    exporting.export(tmp_path / "checkpoint", tmp_path / "out", "transformers", progress=False)
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in language_model(kind).state_dict().items():
        if name == "lm_head.weight" and opened.model.llm.tied_head:
            assert name not in written
            continue
        fused = next((key for key in FUSED if key in name), None)  # one tensor each in Phi's files, parts in ours
        found = (
            np.concatenate([written[name.replace(fused, part)] for part in FUSED[fused]]) if fused else written[name]
        )
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            found, tensor = found[:KNOWN], tensor[:KNOWN]
        np.testing.assert_array_equal(found, tensor.numpy(), err_msg=name)
    prefix = "model.vision_tower.vision_tower.vision_model."
    for name, tensor in tower().state_dict().items():
        bare = name.removeprefix("vision_model.")
        if bare.startswith(("head.", "encoder.layers.3.", "post_layernorm.")):
            continue
        np.testing.assert_array_equal(written[prefix + bare], tensor.numpy(), err_msg=name)


def test_layers_behind_the_last_tap_stay_in_the_files_alone(folders, tmp_path):
    opened = open_backbones(folders / "vision", folders / "qwen2")
    importing.write_checkpoint(opened, tmp_path / "checkpoint", progress=False)
    exporting.export(tmp_path / "checkpoint", tmp_path / "out", "transformers", progress=False)
    assert (opened.model.vision.layers, opened.model.encoder_layers) == (3, 1)
    written = load_file(tmp_path / "out" / "model.safetensors")
    given = {name.removeprefix("vision_model."): tensor for name, tensor in tower().state_dict().items()}
    kept = {name for name in given if name.startswith(("encoder.layers.1.", "encoder.layers.2."))}
    assert len(kept) == 2 * 16
    for name in kept:
        np.testing.assert_array_equal(written[table.VISION + name], given[name].numpy(), err_msg=name)
    # Neither model has them.
    loaded = load_model(tmp_path / "checkpoint", dtype="float32").params
    stacks = flatten_dict(loaded["vision"]["layers"], sep="/")
    assert {leaf.shape[0] for leaf in stacks.values()} == {1}
    np.testing.assert_array_equal(
        stacks["layer/query/kernel"][0], given["encoder.layers.0.self_attn.q_proj.weight"].numpy().T
    )
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=True, output_loading_info=True
    )
    assert not any(info.values()), info
    assert len(model.model.vision_tower["vision_tower"]["vision_model"].encoder["layers"]) == 1
    count = sum(parameter.numel() for parameter in model.parameters())
    assert f"{count:,} parameters in float32" in (tmp_path / "out" / "README.md").read_text()


def test_a_model_that_needs_all_layers_is_not_loaded_from_fewer(folders, tmp_path):
    opened = open_backbones(folders / "vision", folders / "llama", "released")
    model = dataclasses.replace(opened.model, taps="paper")
    params = jax.tree.map(jnp.asarray, fusion.init(model, jax.random.key(0)))
    ocp.save_checkpointables(tmp_path / "0", {"params": params})
    like = jax.eval_shape(lambda: fusion.init(dataclasses.replace(model, taps="released"), jax.random.key(0)))
    with pytest.raises(UserError, match=r"layers.*shape \(1, .*asks for \(3, .*taps='paper'.*import"):
        load_params(tmp_path / "0", like)


def test_half_precision_sources_keep_their_dtype(folders, tmp_path):
    half = language_model("llama").to(torch.bfloat16)
    half.save_pretrained(tmp_path / "llm")
    write_tokenizer(tmp_path / "llm", "llama")
    language_model("llama").to(torch.float32)
    language_model.cache_clear()
    opened = open_backbones(folders / "vision", tmp_path / "llm", "released")
    importing.write_checkpoint(opened, tmp_path / "checkpoint", progress=False)
    exporting.export(tmp_path / "checkpoint", tmp_path / "out", "transformers", progress=False)
    written, source = (
        safetensors_torch.load_file(tmp_path / "out" / "model.safetensors"),
        safetensors_torch.load_file(tmp_path / "llm" / "model.safetensors"),
    )
    name = "model.layers.1.mlp.down_proj.weight"
    assert written[name].dtype == torch.bfloat16
    assert torch.equal(written[name], source[name])
    tower_name = "model.vision_tower.vision_tower.vision_model.encoder.layers.0.self_attn.k_proj.weight"
    assert written[tower_name].dtype == torch.float32


def test_unsupported_architectures_are_named(folders, tmp_path):
    transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2).save_pretrained(tmp_path)
    write_tokenizer(tmp_path, "llama")
    with pytest.raises(UserError, match=r"model_type 'gpt2' is unknown; allowed language models: llama"):
        open_backbones(folders / "vision", tmp_path)
    with pytest.raises(UserError, match=r"vision tower of type 'llama' is unknown"):
        open_backbones(folders / "llama", folders / "llama")


def test_a_tokenizer_is_needed_and_must_fit(folders, tmp_path):
    language_model("llama").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"holds neither tokenizer.model nor tokenizer.json"):
        open_backbones(folders / "vision", tmp_path)
    write_tokenizer(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 50}))
    with pytest.raises(UserError, match=r"the tokenizer has 80 tokens, but config.json gives the model .* 50\."):
        open_backbones(folders / "vision", tmp_path)


def test_vision_tokens_amid_others_are_refused(folders, tmp_path):
    """The vocabulary is cut behind them: other tokens would have no row, and with none before them there is no mean."""
    shutil.copytree(folders / "llama", tmp_path / "llama")
    path = tmp_path / "llama" / "tokenizer.json"
    path.write_text(path.read_text().replace('"<unk>"', '"<vision_start>"'))
    with pytest.raises(UserError, match=r"llama: the tokenizer has other tokens after <vision_start>"):
        open_backbones(folders / "vision", tmp_path / "llama")


def test_a_tower_must_have_the_layers_of_its_config(folders, tmp_path):
    tower().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    with pytest.raises(UserError, match=r"encoder.layers.4, the last of the 5 layers"):
        open_backbones(tmp_path, folders / "llama")


def test_published_export_refuses_windows_that_its_llama_ignores(folders, tmp_path):
    opened = open_backbones(folders / "vision", folders / "mistral", "released")
    importing.write_checkpoint(opened, tmp_path / "checkpoint", progress=False)
    with pytest.raises(UserError, match=r"differs in llm.sliding_window"):
        exporting.export(tmp_path / "checkpoint", tmp_path / "out", "published", progress=False)


def test_exports_load_with_their_processor(folders, tmp_path):
    """A Qwen folder: no BOS of its own, a tokenizer.json, chatml."""
    opened = open_backbones(folders / "vision", folders / "qwen2")
    importing.write_checkpoint(opened, tmp_path / "checkpoint", progress=False)
    exporting.export(tmp_path / "checkpoint", tmp_path / "out", "transformers", progress=False)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    ids = processor([[{"role": "user", "content": "w1 w2"}]])["input_ids"][0].tolist()
    from fusion_jax.data import conversation
    from fusion_jax.data.templates import find_template

    expected = conversation.encode_prompt(
        [{"from": "human", "value": "w1 w2"}],
        opened.tokenizer,
        find_template("chatml"),
        False,
        latents_without_image=False,
    )
    assert ids == expected.input_ids.tolist()


def test_every_family_is_one_row(monkeypatch):
    """A further family like Llama is known everywhere by its row: its config.json, template and attention windows."""
    from fusion_jax.interop import families, hf_config

    config = {"model_type": "new", "vocab_size": 8, "hidden_size": 4, "intermediate_size": 8, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "sliding_window": 3}
    with pytest.raises(UserError, match="model_type 'new' is unknown"):
        hf_config.llm_config(config)
    row = families.Family("chatml", implies={"qkv_bias": True}, windows=families.FAMILIES["qwen2"].windows)
    monkeypatch.setitem(families.FAMILIES, "new", row)
    assert families.choose_template("new", None) == "chatml"
    assert hf_config.llm_config(config).qkv_bias and hf_config.llm_config(config).sliding_window == 0
    windowed = config | {"use_sliding_window": True, "max_window_layers": 0}
    assert hf_config.llm_config(windowed).sliding_window == 3
