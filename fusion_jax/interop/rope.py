"""Reads rotary settings and attention windows of a Hugging Face config.json."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from fusion_jax.errors import UserError, check
from fusion_jax.files import brief
from fusion_jax.models.config import RopeConfig
from fusion_jax.models.limits import RANGES
from fusion_jax.values.foreign import flag, mapping, number, sequence, text, whole

_WINDOWS = ("full_attention", "sliding_attention")


def rope_config(config: Mapping[str, Any], where: str = "config.json") -> RopeConfig:
    """Reads rotary settings in the older form (`rope_theta`, `rope_scaling`) or the newer one (`rope_parameters`).

    Raises:
      UserError: a scaling is not implemented, or lacks its values.
    """
    scaling = mapping(config, "rope_parameters", where) or mapping(config, "rope_scaling", where)
    both = {**config, **{key: value for key, value in scaling.items() if value is not None}}
    kind = text(scaling, "rope_type", where, text(scaling, "type", where, "default"))
    scaled = f"{where}: rope scaling of type {brief(kind)}"

    def value(key: str, field: str, default: float | None = None) -> float:
        return number(both, key, scaled, *RANGES[field], default)

    def length(key: str, field: str) -> int:
        return whole(both, key, scaled, *RANGES[field])

    def factors(key: str, field: str) -> tuple[float, ...]:
        values = sequence(both, key, where)
        check(len(values) <= RANGES["head_dim"][1], f"{where}: {key} has {len(values)} values.")
        return tuple(number({key: one}, key, where, *RANGES[field]) for one in values)

    # The config's own value takes precedence.
    theta = value("rope_theta", "theta", 10000.0)
    if config.get("rope_theta") is not None:
        theta = number(config, "rope_theta", where, *RANGES["theta"])
    partial = value("partial_rotary_factor", "factor", 1.0)
    check(partial == 1.0, f"{where}: partial_rotary_factor={partial} is not supported; only whole heads are rotated.")
    if kind == "default":
        check(
            not any(isinstance(one, dict) for one in scaling.values()),
            f"{where}: rotary settings for each kind of layer are not supported.",
        )
        return RopeConfig("default", theta)
    if kind == "llama3":
        return RopeConfig(
            kind,
            theta,
            factor=value("factor", "factor"),
            low_freq_factor=value("low_freq_factor", "low_freq_factor"),
            high_freq_factor=value("high_freq_factor", "high_freq_factor"),
            original_length=length("original_max_position_embeddings", "original_length"),
        )
    if kind in ("longrope", "su"):
        rope = RopeConfig(
            "longrope",
            theta,
            original_length=length("original_max_position_embeddings", "original_length"),
            max_length=length("max_position_embeddings", "max_length"),
            short_factors=factors("short_factor", "short_factors"),
            long_factors=factors("long_factor", "long_factors"),
        )
        ratio = rope.max_length / rope.original_length
        usual = math.sqrt(1 + math.log(ratio) / math.log(rope.original_length)) if ratio > 1 else 1.0
        factor = value("attention_factor", "factor", usual)
        check(
            math.isclose(factor, usual, rel_tol=1e-4),
            f"{where}: attention_factor={factor} is not supported; {usual:.6f} follows from the lengths.",
        )
        return rope
    raise UserError(f"{where}: rope scaling of type {brief(kind)} is unknown; allowed: default, llama3, longrope.")


def listed_windows(config: Mapping[str, Any], layers: int, where: str) -> set[str] | None:
    """Kinds of attention, of `_WINDOWS`, that `layer_types` of a config.json lists; empty where it lists none.

    Families list the layers with a window in this way or by `windows_from_a_layer_on`; None means that none has one.
    """
    kinds = sequence(config, "layer_types", where)
    for kind in kinds:
        check(kind in _WINDOWS, f"{where}: layer_types names {brief(kind)}; allowed: {', '.join(_WINDOWS)}.")
    return set(kinds)


def windows_from_a_layer_on(config: Mapping[str, Any], layers: int, where: str) -> set[str] | None:
    """Kinds of attention by `use_sliding_window` and `max_window_layers`: layers below that number have no window."""
    listed_windows(config, layers, where)
    if not flag(config, "use_sliding_window", where):
        return None
    full = min(whole(config, "max_window_layers", where, 0, RANGES["layers"][1], 28), layers)
    return {"full_attention" if layer < full else "sliding_attention" for layer in range(layers)}


def sliding_window(config: Mapping[str, Any], where: str, windows: Callable = listed_windows) -> int:
    """The number of positions that a query attends to, itself included; 0 for all.

    Args:
      windows: reads from the family's config.json which layers have a window.

    Raises:
      UserError: some layers have a window and some have none.
    """
    if config.get("sliding_window") is False:  # some configs write it instead of null
        config = {**config, "sliding_window": None}
    window = whole(config, "sliding_window", where, *RANGES["sliding_window"], 0)
    layers = whole(config, "num_hidden_layers", where, *RANGES["layers"])
    kinds = windows(config, layers, where)
    if kinds is None:
        return 0
    check(len(kinds) <= 1, f"{where}: layers with and without sliding window in one model are not supported.")
    longest = config.get("max_position_embeddings")
    longest = math.inf if longest is None else whole(config, "max_position_embeddings", where, *RANGES["max_length"])
    return 0 if not window or kinds == {"full_attention"} or window >= longest else window
