"""Folders in the published FUSION format: config.json and safetensors with the published names."""

import json
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import safe_open

from fusion_jax.errors import UserError
from fusion_jax.interop import table
from fusion_jax.models import fusion
from fusion_jax.models.config import (
    RELEASED,
    ExchangeConfig,
    FusionConfig,
    LLMConfig,
    RopeConfig,
    VisionConfig,
)

# In the file, but neither applied nor trained by the published code.
UNUSED = ("post_layernorm.weight", "post_layernorm.bias")


def rope_config(config: dict) -> RopeConfig:
    """Rotary settings of a Hugging Face config.json. UserError for a scaling that is not implemented."""
    theta, scaling = float(config.get("rope_theta", 10000.0)), config.get("rope_scaling")
    if not scaling:
        return RopeConfig("default", theta)
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind == "llama3":
        return RopeConfig(
            kind,
            theta,
            factor=scaling["factor"],
            low_freq_factor=scaling["low_freq_factor"],
            high_freq_factor=scaling["high_freq_factor"],
            original_length=scaling["original_max_position_embeddings"],
        )
    if kind == "longrope":
        return RopeConfig(
            kind,
            theta,
            original_length=config["original_max_position_embeddings"],
            max_length=config["max_position_embeddings"],
            short_factors=tuple(scaling["short_factor"]),
            long_factors=tuple(scaling["long_factor"]),
        )
    raise UserError(f"config.json: rope_scaling of type {kind!r} is unknown; allowed: llama3, longrope or none.")


def llm_config(config: dict) -> LLMConfig:
    """Decoder settings of a Hugging Face config.json (Llama family)."""
    return LLMConfig(
        vocab_size=config["vocab_size"],
        width=config["hidden_size"],
        mlp_dim=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config.get("num_key_value_heads", config["num_attention_heads"]),
        head_dim=config.get("head_dim") or 0,
        norm_eps=config["rms_norm_eps"],
        qkv_bias=config.get("attention_bias", False),
        tied_head=config.get("tie_word_embeddings", False),
        rope=rope_config(config),
    )


def model_config(config: dict) -> FusionConfig:
    """The `released` preset with the sizes of a published config.json, whose `vision_config` describes the tower."""
    if "vision_config" not in config:
        raise UserError(f"config.json has no vision_config for the tower {config.get('mm_vision_tower')!r}.")
    tower = config["vision_config"]
    return FusionConfig(
        vision=VisionConfig(
            image_size=tower["image_size"],
            patch_size=tower["patch_size"],
            width=tower["hidden_size"],
            mlp_dim=tower["intermediate_size"],
            layers=tower["num_hidden_layers"] - 1,  # the published code drops the last layer
            heads=tower["num_attention_heads"],
        ),
        llm=llm_config(config),
        exchange=ExchangeConfig(
            config["start_of_vision_sampler_layers"],
            config["stride_of_vision_sampler_layers"],
            config["num_of_vision_sampler_layers"],
        ),
        latent_counts=tuple(int(count) for count in str(config["query_len"]).split(",")),
        **RELEASED,
    )


def parameter_shapes(config: FusionConfig) -> dict[str, tuple[int, ...]]:
    """Our parameter shapes by path, without allocating anything."""
    tree = jax.eval_shape(lambda: fusion.init(config, jax.random.key(0)))
    return {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}


def is_fused(config: dict) -> bool:
    """Whether this architecture's files fuse q, k, v and gate, up."""
    return "phi" in config["model_type"]


def load(folder: str | Path) -> tuple[FusionConfig, dict]:
    """Reads a published folder.

    Returns:
      The model config and float32 parameters (numpy, nested dict).

    Raises:
      UserError: a missing file, or a tensor that is missing, left over or of the wrong shape.
    """
    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}; a folder in the published format needs it.")
    raw = json.loads((folder / "config.json").read_text())
    config = model_config(raw)
    shapes = parameter_shapes(config)
    rows = table.published_rows(config, shapes, is_fused(raw))
    params = {path: np.empty(shape, np.float32) for path, shape in shapes.items()}
    with safe_open(folder / "model.safetensors", "numpy") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        table.check_complete(rows, found, UNUSED, str(folder / "model.safetensors"))
        for row in rows:
            for path, index, part in table.to_ours(row, file.get_tensor(row.name), shapes):
                params[path][() if index is None else index] = part
    return config, unflatten_dict(params, sep="/")
