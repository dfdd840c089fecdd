"""Reads config.json of Hugging Face folders into our configs of language models and vision towers."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fusion_jax.errors import UserError, check
from fusion_jax.files import brief, shown
from fusion_jax.interop.families import FAMILIES, PUBLISHED
from fusion_jax.interop.rope import sliding_window
from fusion_jax.models.config import (
    ExchangeConfig,
    LLMConfig,
    VisionConfig,
)
from fusion_jax.models.limits import RANGES
from fusion_jax.values.foreign import flag, mapping, number, read_object, text, whole

# Keys that a SigLIP config.json leaves out have these values (the defaults of its config class).
_TOWER_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
}
# Keys of configs that name repositories whose code `trust_remote_code=True` would fetch and run.
POINTERS = ("auto_map", "custom_pipelines")


def read_config(folder: str | Path) -> dict[str, Any]:
    """Reads the config.json of a folder. Raises UserError where it is missing or not a JSON object."""
    folder = Path(folder)
    path = folder / "config.json"
    # `os.path` accepts any text as a path, even one that no file can have.
    no_folder = os.path.lexists(folder) and not os.path.isdir(folder)
    check(not no_folder, f"{shown(folder, 1000)} is neither a folder nor a GGUF file; give a Hugging Face folder.")
    check(os.path.lexists(path), f"{shown(folder, 1000)} has no config.json; a Hugging Face folder needs it.")
    config = read_object(path)
    text(config, "model_type", str(path), "")
    return config


@contextlib.contextmanager
def reading(where: str) -> Iterator[None]:
    """Turns errors about values of a wrong type in a config into one that names the file."""
    try:
        yield
    except UserError as error:
        message = str(error)
        if message.startswith(where):
            raise
        raise UserError(f"{where}: {shown(message, 1000)}") from error
    except (TypeError, ValueError, AttributeError, ArithmeticError, KeyError) as error:
        raise UserError(f"{where} has a value of the wrong kind: {shown(error)}.") from error


def _size(config: Mapping[str, Any], key: str, field: str, where: str, default: int | None = None) -> int:
    """A whole number within the limits of our field."""
    return whole(config, key, where, *RANGES[field], default)


def llm_config(config: Mapping[str, Any], where: str = "config.json") -> LLMConfig:
    """Reads the decoder settings of a config.json of one of `FAMILIES`.

    Raises:
      UserError: the architecture is not supported, or has an option that our decoder lacks.
    """
    kind = config.get("model_type")
    check(kind not in PUBLISHED, f"{where} is a whole model in the published format: import it with --from.")
    check(
        kind in FAMILIES,
        f"{where}: model_type {brief(kind)} is unknown; allowed language models: {', '.join(FAMILIES)}.",
    )
    family = FAMILIES[kind]
    act = text(config, "hidden_act", where, "silu")
    check(act == "silu", f"{where}: hidden_act {brief(act)} is not supported; allowed: silu.")
    for key in ("attention_bias", "mlp_bias"):
        refused = flag(config, key, where)
        check(not refused, f"{where}: {key}=true is not supported (biases beyond those on q, k and v).")
    heads = _size(config, "num_attention_heads", "heads", where)
    width = _size(config, "hidden_size", "width", where)
    head_dim = _size(config, "head_dim", "head_dim", where, 0)
    return LLMConfig(
        vocab_size=_size(config, "vocab_size", "vocab_size", where),
        width=width,
        mlp_dim=_size(config, "intermediate_size", "mlp_dim", where),
        layers=_size(config, "num_hidden_layers", "layers", where),
        heads=heads,
        kv_heads=_size(config, "num_key_value_heads", "kv_heads", where, heads),
        head_dim=0 if head_dim * heads == width else head_dim,
        norm_eps=number(config, "rms_norm_eps", where, *RANGES["norm_eps"]),
        tied_head=flag(config, "tie_word_embeddings", where),
        sliding_window=sliding_window(config, where, family.windows),
        rope=family.rope(config, where),
        **family.implies,
    )


def vision_config(config: Mapping[str, Any], where: str = "config.json") -> VisionConfig:
    """Reads a SigLIP or SigLIP2 tower of fixed resolution, without its last layer, which the published code drops.

    In a whole SigLIP model the tower's keys are in `vision_config`.

    Raises:
      UserError: the architecture is not supported.
    """
    tower = mapping(config, "vision_config", where) or config
    kind = tower.get("model_type", config.get("model_type"))
    check(
        kind in ("siglip_vision_model", "siglip"),
        f"{where}: vision tower of type {brief(kind)} is unknown; allowed: SigLIP and SigLIP2 of fixed resolution.",
    )
    return tower_from(tower, where)


def tower_from(tower: Mapping[str, Any], where: str) -> VisionConfig:
    """The tower that these keys of a config.json describe. Raises the errors of `vision_config`."""
    act = text(tower, "hidden_act", where, "gelu_pytorch_tanh")
    check(act == "gelu_pytorch_tanh", f"{where}: hidden_act {brief(act)} of the tower is not supported.")

    def size(key: str, field: str) -> int:
        return _size(tower, key, field, f"{where} (vision tower)", _TOWER_DEFAULTS[key])

    return VisionConfig(
        image_size=size("image_size", "image_size"),
        patch_size=size("patch_size", "patch_size"),
        width=size("hidden_size", "width"),
        mlp_dim=size("intermediate_size", "mlp_dim"),
        layers=size("num_hidden_layers", "layers") - 1,
        heads=size("num_attention_heads", "heads"),
        norm_eps=number(tower, "layer_norm_eps", f"{where} (vision tower)", *RANGES["norm_eps"], 1e-6),
    )


def default_exchange(llm: LLMConfig) -> ExchangeConfig:
    """Exchange layers after decoder layers 0, 3, ...: ten as published, or as many as the decoder allows."""
    published = ExchangeConfig()
    layers = min(published.layers, -(-llm.layers // published.stride))
    return dataclasses.replace(published, layers=layers, heads=math.gcd(published.heads, llm.width))


def tower_config(tower: VisionConfig) -> dict[str, Any]:
    """A tower's sizes as in a SigLIP config.json, which counts the dropped last layer."""
    return {
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp_dim,
        "num_hidden_layers": tower.layers + 1,
        "num_attention_heads": tower.heads,
        "image_size": tower.image_size,
        "patch_size": tower.patch_size,
        "layer_norm_eps": tower.norm_eps,
    }
