"""Names of the tensors in the `transformers` format."""

import dataclasses
import re

from fusion_jax.interop import table
from fusion_jax.models.config import FusionConfig


def rows(config: FusionConfig, shapes: table.Shapes) -> list[table.Row]:
    """The table of a model of the `transformers` format: the published names with nothing fused, but for the exchange's
    projections. There `q_proj` is a norm and a linear layer in one; here each has its name, so that whoever asks for
    `q_proj` (LoRA, quantisation) means a linear layer."""
    names = table.published_rows(config, shapes, fused=False)
    return [dataclasses.replace(row, name=_own(row.name)) for row in names]


def _own(name: str) -> str:
    name = re.sub(r"(cross_attn\.[qkv])_proj\.0\.", r"\1_norm.", name)
    return re.sub(r"(cross_attn\.[qkv]_proj)\.1\.", r"\1.", name)
