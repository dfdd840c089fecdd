"""Lists the kinds of samples; each has a file with its prompt, the form of its answer, and limits.

All but caption_long are from the papers.
"""

import importlib

from fusion_jax.synth.kinds.base import STAGES, Ask, Kind

# The files of this folder, each with a `KIND` of the same name. Reports and manifests list the kinds in this order.
NAMES = (
    "caption_color",
    "caption_count",
    "caption_long",
    "caption_scene",
    "caption_spatial",
    "caption_text",
    "multi_choice",
    "conv_short",
    "conv_long",
    "reasoning",
    "contrast_short",
    "contrast_long",
    "text_qa",
)
KINDS: dict[str, Kind] = {name: importlib.import_module(f"{__name__}.{name}").KIND for name in NAMES}

__all__ = ["KINDS", "NAMES", "STAGES", "Ask", "Kind"]
