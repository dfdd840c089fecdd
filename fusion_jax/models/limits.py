"""Checks that the fields of a model config are within the ranges that make sense.

The largest values are far beyond any real model: a larger size is a mistake or an attack, and is refused before any
memory is allocated for it.
"""

from typing import Any

from fusion_jax.errors import check
from fusion_jax.files import brief

_POSITIONS = (1 << 31) - 1
_FACTORS = (1e-6, 1e6)
RANGES: dict[str, tuple[int | float, int | float]] = {
    "image_size": (1, 1 << 16),
    "patch_size": (1, 1 << 16),
    "width": (1, 1 << 17),
    "mlp_dim": (1, 1 << 20),
    "layers": (1, 10_000),
    "heads": (1, 1 << 14),
    "kv_heads": (1, 1 << 14),
    "head_dim": (0, 1 << 17),
    "vocab_size": (1, 1 << 24),
    "sliding_window": (0, _POSITIONS),
    "norm_eps": (1e-20, 1.0),  # smaller values vanish in float32
    "theta": (1e-6, 1e15),
    "factor": _FACTORS,
    "low_freq_factor": _FACTORS,
    "high_freq_factor": _FACTORS,
    "short_factors": _FACTORS,
    "long_factors": _FACTORS,
    "original_length": (2, _POSITIONS),  # its logarithm is a divisor
    "max_length": (1, _POSITIONS),
    "tile_tokens": (0, 1 << 20),
    "mapping_loss_weight": (0, 1e6),
}
REMATS = ("none", "dots", "attention", "full")  # names of the policies in `remat.py`
MOST_GRID = 1 << 12  # patches per side of an image
MOST_TOKENS = 1 << 20  # tokens of an image or a set of latents
MOST_TILES = 1024  # tiles of an image
MOST_CHOICES = 256  # sets of latents, or grids of tiles


def within(name: str, value: int | float, least: int | float, most: int | float) -> None:
    """Raises UserError unless least <= value <= most; NaN is refused."""
    check(not value < least, f"{name}={brief(value)} must be at least {least}.")
    check(least <= value <= most, f"{name}={brief(value)} must be between {least} and {most}.")


def check_fields(part: str, config: Any, *fields: str) -> None:
    """Calls `within` for the named fields of a config, and for every value of those that are tuples."""
    for field in fields:
        value = getattr(config, field)
        for place, one in enumerate(value) if isinstance(value, tuple) else [("", value)]:
            within(f"{part}.{field}" + (f"[{place}]" if isinstance(value, tuple) else ""), one, *RANGES[field])
