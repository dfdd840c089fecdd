"""Names the tensors of the `transformers` format."""

import dataclasses
import re

from fusion_jax.interop import table
from fusion_jax.models.config import FusionConfig


def rows(config: FusionConfig, shapes: table.Shapes) -> list[table.Row]:
    """The table of a model in the `transformers` format.

    Names are the published ones with nothing fused, except in the exchange: there the published `q_proj` is a norm and
    a linear layer in one. Here each has its own name, so that `q_proj` is a linear layer, as LoRA and quantisation
    expect.
    """
    names = table.published_rows(config, shapes, fused=False)
    return [dataclasses.replace(row, name=_own(row.name)) for row in names]


def _own(name: str) -> str:
    name = re.sub(r"(cross_attn\.[qkv])_proj\.0\.", r"\1_norm.", name)
    return re.sub(r"(cross_attn\.[qkv]_proj)\.1\.", r"\1.", name)
