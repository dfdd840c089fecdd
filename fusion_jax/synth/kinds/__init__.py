"""The kinds of samples, a file each: prompt, form of the answer, limits. All but caption_long are the papers'."""

from fusion_jax.synth.kinds import (
    caption_color,
    caption_count,
    caption_long,
    caption_scene,
    caption_spatial,
    caption_text,
    contrast_long,
    contrast_short,
    conv_long,
    conv_short,
    multi_choice,
    reasoning,
    text_qa,
)
from fusion_jax.synth.kinds.base import STAGES, Ask, Kind

_FILES = (
    caption_color,
    caption_count,
    caption_long,
    caption_scene,
    caption_spatial,
    caption_text,
    multi_choice,
    conv_short,
    conv_long,
    reasoning,
    contrast_short,
    contrast_long,
    text_qa,
)
KINDS: dict[str, Kind] = {file.KIND.name: file.KIND for file in _FILES}

__all__ = ["KINDS", "STAGES", "Ask", "Kind"]
