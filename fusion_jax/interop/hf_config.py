"""`config.json` of Hugging Face folders and our model configs: language models, vision towers, published models."""

import contextlib
import dataclasses
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fusion_jax.config import OWN_TEMPLATE
from fusion_jax.data import chat_template
from fusion_jax.data.conversation import TEMPLATES
from fusion_jax.data.tokenizer import Tokenizer
from fusion_jax.errors import UserError, check
from fusion_jax.files import brief, shown
from fusion_jax.interop.rope import rope_config, sliding_window
from fusion_jax.models.config import (
    RELEASED,
    ExchangeConfig,
    FusionConfig,
    LLMConfig,
    VisionConfig,
)
from fusion_jax.models.limits import RANGES
from fusion_jax.values.foreign import flag, mapping, number, read_object, text, whole

log = logging.getLogger("fusion_jax")

# Language models that differ in nothing but what `LLMConfig` can say.
LLM_TYPES = ("llama", "mistral", "phi3", "qwen2")
PUBLISHED_TYPES = {"fusion_llama": "llama", "fusion_phi": "phi3"}

# Published folders name their tower by hub id only.
TOWERS = {
    "google/siglip-so400m-patch14-384": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    },
    "google/siglip2-giant-opt-patch16-384": {
        "hidden_size": 1536,
        "intermediate_size": 6144,
        "num_hidden_layers": 40,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 16,
    },
}
# What a SigLIP config.json leaves out has these values (the defaults of its config class).
_TOWER_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
}
# Qwen2's attention has biases on q, k and v by construction; its config.json does not say so.
_BIASED = ("qwen2",)
# Keys of configs that name repositories whose code `trust_remote_code=True` would fetch and run.
POINTERS = ("auto_map", "custom_pipelines")
# Of the config.json a model came from, what the parameters do not tell.
_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")


def read_config(folder: str | Path) -> dict[str, Any]:
    """The config.json of a folder. UserError where it is missing or no JSON object."""
    folder = Path(folder)
    path = folder / "config.json"
    # `os.path` takes any text for a path, also one that no file can have.
    no_folder = os.path.lexists(folder) and not os.path.isdir(folder)
    check(not no_folder, f"{shown(folder, 1000)} is no folder and no GGUF file; give a Hugging Face folder.")
    check(os.path.lexists(path), f"{shown(folder, 1000)} has no config.json; a Hugging Face folder needs it.")
    config = read_object(path)
    text(config, "model_type", str(path), "")
    return config


@contextlib.contextmanager
def reading(where: str) -> Iterator[None]:
    """Values of a wrong kind inside a config become one sentence that names the file."""
    try:
        yield
    except UserError as error:
        says = str(error)
        if says.startswith(where):
            raise
        raise UserError(f"{where}: {shown(says, 1000)}") from error
    except (TypeError, ValueError, AttributeError, ArithmeticError, KeyError) as error:
        raise UserError(f"{where} has a value of the wrong kind: {shown(error)}.") from error


def _size(config: Mapping[str, Any], key: str, field: str, where: str, default: int | None = None) -> int:
    """A whole number in the range of our field of that name."""
    return whole(config, key, where, *RANGES[field], default)


def llm_config(config: Mapping[str, Any], where: str = "config.json") -> LLMConfig:
    """Decoder settings of a Llama-family config.json.

    Raises:
      UserError: another architecture, or an option of these that our decoder does not have.
    """
    kind = config.get("model_type")
    check(kind not in PUBLISHED_TYPES, f"{where} is a whole model in the published format: import it with --from.")
    check(
        kind in LLM_TYPES,
        f"{where}: model_type {brief(kind)} is unknown; allowed language models: {', '.join(LLM_TYPES)}.",
    )
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
        qkv_bias=kind in _BIASED,
        tied_head=flag(config, "tie_word_embeddings", where),
        sliding_window=sliding_window(config, where),
        rope=rope_config(config, where),
    )


def vision_config(config: Mapping[str, Any], where: str = "config.json") -> VisionConfig:
    """A fixed-resolution SigLIP or SigLIP2 tower, its last layer dropped as published. Whole models have it inside.

    Raises:
      UserError: another architecture.
    """
    tower = mapping(config, "vision_config", where) or config
    kind = tower.get("model_type", config.get("model_type"))
    check(
        kind in ("siglip_vision_model", "siglip"),
        f"{where}: vision tower of type {brief(kind)} is unknown; allowed: SigLIP and SigLIP2 of fixed resolution.",
    )
    return _tower(tower, where)


def _tower(tower: Mapping[str, Any], where: str) -> VisionConfig:
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


def is_published(config: Mapping[str, Any]) -> bool:
    """Whether a config.json describes a model in the published FUSION format."""
    return text(config, "model_type", "config.json", "") in PUBLISHED_TYPES


def published_model(config: Mapping[str, Any], where: str = "config.json") -> FusionConfig:
    """The `released` preset with the sizes of a published config.json.

    Raises:
      UserError: a value is missing, or the tower is unknown and not described by `vision_config`.
    """
    name = text(config, "mm_vision_tower", where, "")
    tower = mapping(config, "vision_config", where) or TOWERS.get(name)
    check(
        tower is not None,
        f"{where}: mm_vision_tower {brief(name)} is unknown and there is no vision_config; known: {', '.join(TOWERS)}.",
    )
    return FusionConfig(
        vision=_tower(tower, where),
        llm=llm_config({**config, "model_type": PUBLISHED_TYPES[config["model_type"]]}, where),
        exchange=ExchangeConfig(
            whole(config, "start_of_vision_sampler_layers", where, 0, RANGES["layers"][1]),
            whole(config, "stride_of_vision_sampler_layers", where, 0, RANGES["layers"][1]),
            whole(config, "num_of_vision_sampler_layers", where, 0, RANGES["layers"][1]),
        ),
        latent_counts=_latent_counts(config, where),
        **RELEASED,
    )


def _latent_counts(config: Mapping[str, Any], where: str) -> tuple[int, ...]:
    """`query_len`: "16", "4,16,36" or 16."""
    given = config.get("query_len")
    check(given is not None, f"{where} lacks 'query_len'.")
    check(
        isinstance(given, int | str) and re.fullmatch(r"\s*\d{1,9}\s*(,\s*\d{1,9}\s*)*", str(given)) is not None,
        f"{where} has a value of the wrong kind: query_len must be numbers with commas between them, got "
        f"{brief(given)}.",
    )
    return tuple(map(int, str(given).split(",")))


def default_exchange(llm: LLMConfig) -> ExchangeConfig:
    """The published places (after layers 0, 3, ..., ten of them) as far as the decoder has the layers."""
    published = ExchangeConfig()
    layers = min(published.layers, -(-llm.layers // published.stride))
    return dataclasses.replace(published, layers=layers, heads=math.gcd(published.heads, llm.width))


def is_fused(config: Mapping[str, Any]) -> bool:
    """Whether this architecture's files fuse q, k, v and gate, up."""
    return config.get("model_type") in ("phi3", "fusion_phi")


def find_template(kind: str, tokenizer: Tokenizer | None) -> str:
    """The template for an architecture: the published one of Phi-3 and Llama-3, else the tokenizer's own chat template,
    else the one whose special tokens the tokenizer has.

    Raises:
      UserError: the tokenizer has the tokens of no template.
    """
    usual = {"phi3": "phi3", "fusion_phi": "phi3", "qwen2": "chatml", "mistral": "mistral"}.get(kind, "llama3")
    if tokenizer is None:
        return usual
    fits = [name for name in (usual, *TEMPLATES) if tokenizer.has_token(TEMPLATES[name].stops[0])]
    if tokenizer.chat_template is not None and not (usual in ("phi3", "llama3") and usual in fits):
        try:
            return chat_template.find(OWN_TEMPLATE, tokenizer).name
        except UserError as error:
            if not fits:
                raise
            log.warning("%s It is imported with %s.", error, fits[0])
    check(bool(fits), f"{tokenizer.folder} fits no chat template; allowed: {', '.join(TEMPLATES)}.")
    return fits[0]


def tower_config(tower: VisionConfig) -> dict[str, Any]:
    """What a SigLIP config.json says of a tower's numbers, the dropped last layer counted."""
    return {
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp_dim,
        "num_hidden_layers": tower.layers + 1,
        "num_attention_heads": tower.heads,
        "image_size": tower.image_size,
        "patch_size": tower.patch_size,
        "layer_norm_eps": tower.norm_eps,
    }


def _beyond(key: str, value: Any, vocabulary: int) -> bool:
    """Whether the padding token has no row: an embedding with such a padding row cannot be made."""
    return key == "pad_token_id" and isinstance(value, int) and not 0 <= value < vocabulary


def published_config(model: FusionConfig, template: str, origin: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The config.json of the published code for a model of ours.

    Args:
      model: any model whose arithmetic the published code has.
      template: its chat template; "phi3" makes it a fusion_phi, any other a fusion_llama.
      origin: the config.json the parameters once came from, or empty; its further keys are kept.
      dtype: of the tensors.

    Raises:
      UserError: the published code has no such model.
    """
    # Where the image stands is a matter of its data, not of its arithmetic.
    wrong = [key for key, value in RELEASED.items() if key != "image_place" and getattr(model, key) != value]
    if not (model.text_guided and model.semantic_exchange and model.needs_back_projection):
        wrong.append("text_guided" if not model.text_guided else "semantic_exchange")
    wrong += ["llm.qkv_bias"] * model.llm.qkv_bias + ["exchange.heads"] * (model.exchange.heads != 16)
    wrong += ["image_tokens"] * bool(model.image_tokens)
    phi, llm, tower, rope = template == "phi3", model.llm, model.vision, model.llm.rope
    # Its Llama knows neither windows nor LongRoPE, its Phi no Llama-3 scaling and no head size of its own.
    wrong += ["llm.sliding_window"] * (llm.sliding_window > 0 and not phi)
    wrong += ["llm.rope.kind"] * (rope.kind == ("llama3" if phi else "longrope"))
    wrong += ["llm.head_dim"] * (phi and llm.per_head * llm.heads != llm.width)
    check(
        not wrong,
        f"The published code knows the released preset only; this model differs in {', '.join(wrong)}. "
        "Use --format transformers.",
    )
    scaling: dict[str, Any] | None = None
    lengths: dict[str, Any] = {}
    if rope.kind == "llama3":
        scaling = {
            "rope_type": "llama3",
            "factor": rope.factor,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_length,
        }
    elif rope.kind == "longrope":
        scaling = {
            "type": "longrope",
            "short_factor": list(rope.short_factors),
            "long_factor": list(rope.long_factors),
        }
        lengths = {
            "original_max_position_embeddings": rope.original_length,
            "max_position_embeddings": rope.max_length,
        }
    described = tower_config(tower)
    hub = next((name for name, known in TOWERS.items() if {**known, "layer_norm_eps": 1e-6} == described), "")
    published = {
        "pad_token_id": None,  # else Phi's is 32000, which may lie beyond the vocabulary
        **{key: origin[key] for key in _KEPT if key in origin and not _beyond(key, origin[key], llm.vocab_size)},
        "model_type": "fusion_phi" if phi else "fusion_llama",
        "vocab_size": llm.vocab_size,
        "hidden_size": llm.width,
        "intermediate_size": llm.mlp_dim,
        "num_hidden_layers": llm.layers,
        "num_attention_heads": llm.heads,
        "num_key_value_heads": llm.kv_heads,
        **({"head_dim": llm.per_head} if not phi else {}),
        "hidden_act": "silu",
        "rms_norm_eps": llm.norm_eps,
        "rope_theta": rope.theta,
        "rope_scaling": scaling,
        "max_position_embeddings": origin.get("max_position_embeddings", 131072),
        **lengths,
        "sliding_window": llm.sliding_window or None,
        "attention_bias": False,
        "tie_word_embeddings": llm.tied_head,
        "query_len": ",".join(map(str, model.latent_counts)),
        "window_size": 3,
        "num_of_vision_sampler_layers": model.exchange.layers,
        "start_of_vision_sampler_layers": model.exchange.start,
        "stride_of_vision_sampler_layers": model.exchange.stride,
        "mm_vision_tower": hub or "vision_tower",
        "mm_hidden_size": tower.width,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "flat",
        "use_mm_proj": True,
        "unfreeze_mm_vision_tower": True,
        "mm_use_im_start_end": True,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "static_hd",
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": 4096,
        **({} if hub else {"vision_config": described}),
    }
    if is_published(origin) and dataclasses.replace(published_model(origin), image_place=model.image_place) == model:
        # Nothing that decides the arithmetic has changed: the folder's own words stay, but no pointer to code.
        published |= {key: value for key, value in origin.items() if key not in POINTERS}
    return published | {"torch_dtype": dtype}
