"""Reads and writes config.json of models in the published format."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from fusion_jax.errors import check
from fusion_jax.files import brief
from fusion_jax.interop.families import FAMILIES, PUBLISHED
from fusion_jax.interop.hf_config import POINTERS, llm_config, tower_config, tower_from
from fusion_jax.models.config import RELEASED, ExchangeConfig, FusionConfig
from fusion_jax.models.limits import RANGES
from fusion_jax.values.foreign import mapping, text, whole

# Published folders name their tower only by its hub id.
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
# Keys of a model's original config.json that do not follow from the parameters.
_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")


def is_published(config: Mapping[str, Any]) -> bool:
    """Whether a config.json describes a model in the published FUSION format."""
    return text(config, "model_type", "config.json", "") in PUBLISHED


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
        vision=tower_from(tower, where),
        llm=llm_config({**config, "model_type": PUBLISHED[config["model_type"]]}, where),
        exchange=ExchangeConfig(
            whole(config, "start_of_vision_sampler_layers", where, 0, RANGES["layers"][1]),
            whole(config, "stride_of_vision_sampler_layers", where, 0, RANGES["layers"][1]),
            whole(config, "num_of_vision_sampler_layers", where, 0, RANGES["layers"][1]),
        ),
        latent_counts=_latent_counts(config, where),
        **RELEASED,
    )


def _latent_counts(config: Mapping[str, Any], where: str) -> tuple[int, ...]:
    """Latent counts of `query_len`, which is "16", "4,16,36" or 16."""
    value = config.get("query_len")
    check(value is not None, f"{where} lacks 'query_len'.")
    check(
        isinstance(value, int | str) and re.fullmatch(r"\s*\d{1,9}\s*(,\s*\d{1,9}\s*)*", str(value)) is not None,
        f"{where} has a value of the wrong kind: query_len must be numbers with commas between them, got "
        f"{brief(value)}.",
    )
    return tuple(map(int, str(value).split(",")))


def _beyond(key: str, value: Any, vocabulary: int) -> bool:
    """Whether the padding token is outside the vocabulary, for which PyTorch cannot make an embedding."""
    return key == "pad_token_id" and isinstance(value, int) and not 0 <= value < vocabulary


def published_config(model: FusionConfig, template: str, origin: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Writes the config.json of the published code for a model of ours.

    Args:
      model: a model with the published code's arithmetic.
      template: its chat template; "phi3" makes it a fusion_phi, any other a fusion_llama.
      origin: the config.json from which the parameters were once imported, or empty; its other keys are kept.
      dtype: the dtype of the tensors.

    Raises:
      UserError: the published code does not have this model.
    """
    # The position of the image belongs to the data, not to the arithmetic.
    wrong = [key for key, value in RELEASED.items() if key != "image_place" and getattr(model, key) != value]
    if not (model.text_guided and model.semantic_exchange and model.needs_back_projection):
        wrong.append("text_guided" if not model.text_guided else "semantic_exchange")
    wrong += ["llm.qkv_bias"] * model.llm.qkv_bias + ["exchange.heads"] * (model.exchange.heads != 16)
    wrong += ["image_tokens"] * bool(model.image_tokens) + ["guide"] * (model.guide != "all_rounds")
    family = FAMILIES["phi3" if template == "phi3" else "llama"]
    phi, llm, tower, rope = family is FAMILIES["phi3"], model.llm, model.vision, model.llm.rope
    # Its Llama has neither windows nor LongRoPE; its Phi has neither Llama-3 scaling nor a head size of its own.
    wrong += ["llm.sliding_window"] * (llm.sliding_window > 0 and not phi)
    wrong += ["llm.rope.kind"] * (rope.kind == ("llama3" if phi else "longrope"))
    wrong += ["llm.head_dim"] * (phi and llm.per_head * llm.heads != llm.width)
    check(
        not wrong,
        f"The published code has the released preset only; this model differs in {', '.join(wrong)}. "
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
        "pad_token_id": None,  # otherwise Phi's default is 32000, which may be outside the vocabulary
        **{key: origin[key] for key in _KEPT if key in origin and not _beyond(key, origin[key], llm.vocab_size)},
        "model_type": family.published,
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
        # The arithmetic has not changed, so the folder's own keys are kept, except for pointers to code.
        published |= {key: value for key, value in origin.items() if key not in POINTERS}
    return published | {"torch_dtype": dtype}
