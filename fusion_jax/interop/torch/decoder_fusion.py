"""Implements the layers of the decoder, and the exchange between its latents and the image."""

import inspect
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache

from .configuration_fusion import FusionConfig
from .vision_fusion import merge_heads, split_heads

# transformers before 5.1 does not count the positions of a cache of fixed length by itself.
_CACHE_NEEDS_POSITIONS = "cache_kwargs" in inspect.signature(Cache.update).parameters


class Exchange(NamedTuple):
    """Inputs of the exchange layers, and the positions of the latents that they update.

    Attributes:
      context: (M, C, D). image, row, end: (K,), for each round its image, row and the position of its question's last
        token. places: (K, L) positions of its latents. index, real: (1 or K, L, W) windows over the image's context.
    """

    context: Tensor
    image: Tensor
    row: Tensor
    end: Tensor
    places: Tensor
    index: Tensor
    real: Tensor


class ExchangeLayer(nn.Module):
    """Lets each latent query its own window of the image, guided by its question's last hidden state."""

    def __init__(self, config: FusionConfig):
        super().__init__()
        d = config.llm["width"]

        self.heads = config.exchange["heads"]
        self.proj_in = nn.Linear(2 * d, d, bias=False)
        self.proj_context = nn.Linear(d, d, bias=False)
        parts = {f"{name}_norm": nn.LayerNorm(d, 1e-5) for name in "qkv"}
        parts |= {f"{name}_proj": nn.Linear(d, d, bias=False) for name in "qkvo"}
        self.cross_attn = nn.ModuleDict(parts)
        self.norm = nn.LayerNorm(d, 1e-5)
        self.proj_out = nn.ModuleDict({f"linear_{i}": nn.Linear(d, d, bias=False) for i in (1, 2)})

    def project(self, name: str, x: Tensor) -> Tensor:
        return self.cross_attn[f"{name}_proj"](self.cross_attn[f"{name}_norm"](x))

    def forward(self, x: Tensor, *exchange: Tensor) -> Tensor:
        e = Exchange(*exchange)
        rounds, count = e.places.shape
        rows = e.row[:, None]
        # All rounds read the state from before the layer.
        latents = x[rows, e.places]
        question = x[e.row, e.end][:, None].expand_as(latents)
        p = self.proj_in(torch.cat([question, latents], -1))
        c = self.proj_context(e.context)
        q = self.project("q", p)
        # Keys and values are computed once per image; each latent then gathers those of its window.
        k, v = (self.project(name, c)[e.image[:, None, None], e.index] for name in "kv")
        q = split_heads(q.reshape(rounds * count, 1, -1), self.heads)
        k, v = (split_heads(a.flatten(0, 1), self.heads) for a in (k, v))
        mask = None
        if not e.real.all():
            mask = e.real.expand(rounds, -1, -1).flatten(0, 1)[:, None, None]
        y = merge_heads(F.scaled_dot_product_attention(q, k, v, mask)).reshape(p.shape)
        y = self.norm(self.cross_attn["o_proj"](y) + p)
        update = self.proj_out["linear_2"](F.gelu(self.proj_out["linear_1"](y)))
        return x.index_put((rows, e.places), latents + update.to(x))


class SamplerLayer(nn.Module):
    """Wraps a layer so that tensors are named `vision_sampler_layers.0.layers.0`."""

    def __init__(self, config: FusionConfig):
        super().__init__()
        self.layers = nn.ModuleList([ExchangeLayer(config)])

    def forward(self, x: Tensor, *exchange: Tensor) -> Tensor:
        return self.layers[0](x, *exchange)


class FusionRMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * self.weight.float()).to(x.dtype)


def inverse_frequencies(rope: dict, head_dim: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Inverse frequencies up to the original length and beyond it, and the factor on cos and sin."""
    base = rope["theta"] ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope["kind"] == "default":
        return base, base, 1.0
    length = rope["original_length"]
    if rope["kind"] == "longrope":
        ratio = rope["max_length"] / length
        scale = math.sqrt(1 + math.log(ratio) / math.log(length)) if ratio > 1 else 1.0
        return base / np.array(rope["short_factors"]), base / np.array(rope["long_factors"]), scale
    # Llama-3: low frequencies are divided, high ones are kept, and those between are a linear blend.
    turns = length * base / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    blend = np.clip((turns - low) / (high - low), 0, 1)
    scaled = (1 - blend) * base / rope["factor"] + blend * base
    return scaled, scaled, 1.0


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half form in float32. x: (B, H, S, d); cos, sin: (B, 1, S, d / 2)."""
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class DecoderLayer(nn.Module):
    def __init__(self, config: FusionConfig, index: int):
        super().__init__()
        c, d, bias = config.llm, config.llm["width"], config.llm["qkv_bias"]
        self.index, self.heads, self.kv_heads = index, c["heads"], c["kv_heads"]
        queries, keys = c["heads"] * c["head_dim"], c["kv_heads"] * c["head_dim"]
        self.input_layernorm = FusionRMSNorm(d, c["norm_eps"])
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(d, queries, bias=bias),
                "k_proj": nn.Linear(d, keys, bias=bias),
                "v_proj": nn.Linear(d, keys, bias=bias),
                "o_proj": nn.Linear(queries, d, bias=False),
            }
        )
        self.post_attention_layernorm = FusionRMSNorm(d, c["norm_eps"])
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(d, c["mlp_dim"], bias=False),
                "up_proj": nn.Linear(d, c["mlp_dim"], bias=False),
                "down_proj": nn.Linear(c["mlp_dim"], d, bias=False),
            }
        )

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, causal: bool, cache=None, past: int = 0
    ) -> Tensor:
        """x: (B, S, D); mask: see `decoder_mask`; past: positions in the cache."""
        y, attn, mlp = self.input_layernorm(x), self.self_attn, self.mlp
        q = rotate(split_heads(attn["q_proj"](y), self.heads), cos, sin)
        k = rotate(split_heads(attn["k_proj"](y), self.kv_heads), cos, sin)
        v = split_heads(attn["v_proj"](y), self.kv_heads)
        if cache is not None:
            places = ({"cache_position": torch.arange(past, past + x.shape[1], device=x.device)},)
            k, v = cache.update(k, v, self.index, *(places if _CACHE_NEEDS_POSITIONS else ()))
            if mask is not None:  # a cache of fixed length has positions that are still empty
                mask = F.pad(mask, (0, k.shape[2] - mask.shape[3]))
        if self.kv_heads < self.heads:
            k, v = (a.repeat_interleave(self.heads // self.kv_heads, 1) for a in (k, v))
        x = x + attn["o_proj"](merge_heads(F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)))
        y = self.post_attention_layernorm(x)
        return x + mlp["down_proj"](F.silu(mlp["gate_proj"](y)) * mlp["up_proj"](y))


def decoder_mask(attention_mask: Tensor, queries: int, window: int, dense: bool = False) -> tuple[Tensor | None, bool]:
    """Mask (B, 1, queries, S) for the last `queries` of the S positions.

    Unless `dense`, it may be None; the second value is then whether attention is causal.
    """
    length = attention_mask.shape[1]
    if not dense and (window == 0 or window >= length) and queries in (1, length) and attention_mask.all():
        return None, queries > 1
    key = torch.arange(length, device=attention_mask.device)
    query = key[-queries:, None]
    seen = key <= query
    if window:
        seen = seen & (key > query - window)
    # Padding attends to itself: attention over no keys would be NaN, and NaN spreads.
    return (seen & attention_mask.bool()[:, None] | (key == query))[:, None], False
