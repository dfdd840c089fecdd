"""Implements the vision encoder, which the question guides, and the grids of its tokens."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .configuration_fusion import FusionConfig


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def checkpointed(owner: nn.Module, call, *args):
    """Calls `call(*args)` with the gradient checkpointing that is set in transformers.

    With several processes the reentrant kind, the default before transformers 5, is never used: it allows each layer to
    run only once, and those of the encoder run on two kinds of views.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return checkpoint(call, *args, use_reentrant=False)
    return owner._gradient_checkpointing_func(call, *args)


class VisionLayer(nn.Module):
    """Pre-norm transformer layer on image tokens alone or on [image | text]."""

    def __init__(self, config: FusionConfig):
        super().__init__()
        v = config.vision
        width, hidden = v["width"], v["mlp_dim"]
        self.config = config
        self.layer_norm1 = nn.LayerNorm(width, v["norm_eps"])
        self.self_attn = nn.ModuleDict({f"{name}_proj": nn.Linear(width, width) for name in ("q", "k", "v", "out")})
        self.layer_norm2 = nn.LayerNorm(width, v["norm_eps"])
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})

    def attend(self, x: Tensor, patches: int, keys: Tensor | None, early: bool) -> Tensor:
        heads, attn = self.config.vision["heads"], self.self_attn
        q, k, v = (split_heads(attn[f"{name}_proj"](x), heads) for name in "qkv")
        if patches == x.shape[1] or not early or self.config.mask == "none":
            return F.scaled_dot_product_attention(q, k, v, keys)
        q_image, q_text = q[:, :, :patches], q[:, :, patches:]
        if self.config.mask == "paper":  # image queries do not attend to the text
            image = F.scaled_dot_product_attention(q_image, k[:, :, :patches], v[:, :, :patches])
        else:  # they do, and text queries attend uniformly: a query of zeros has equal scores for all keys
            image = F.scaled_dot_product_attention(q_image, k, v, keys)
            q_text = torch.zeros_like(q_text)
        return torch.cat([image, F.scaled_dot_product_attention(q_text, k, v, keys)], 2)

    def forward(self, x: Tensor, patches: int, keys: Tensor | None, early: bool) -> Tensor:
        """x: (M, P or P + T, Dv); keys: (M, 1, 1, P + T) bool, False for padding, None for no padding."""
        x = x + self.self_attn["out_proj"](merge_heads(self.attend(self.layer_norm1(x), patches, keys, early)))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.layer_norm2(x)), approximate="tanh"))


class VisionEncoder(nn.Module):
    """SigLIP tower guided by the question; its output is a concatenation of residual states (taps)."""

    gradient_checkpointing = False

    def __init__(self, config: FusionConfig):
        super().__init__()
        v = config.vision
        self.config = config
        self.embeddings = nn.ModuleDict(
            {
                "patch_embedding": nn.Conv2d(3, v["width"], v["patch_size"], v["patch_size"]),
                "position_embedding": nn.Embedding(config.patches, v["width"]),
            }
        )
        self.encoder = nn.ModuleDict(
            {"layers": nn.ModuleList(VisionLayer(config) for _ in range(config.encoder_layers))}
        )

    def embed(self, pixels: Tensor) -> Tensor:
        """(M, 3, H, W) to state 0, (M, P, Dv)."""
        x = self.embeddings["patch_embedding"](pixels).flatten(2).transpose(1, 2)
        places = torch.arange(x.shape[1], device=x.device)
        return x + self.embeddings["position_embedding"](places).to(x.device)

    def forward(self, x: Tensor, text: Tensor | None = None, text_mask: Tensor | None = None) -> Tensor:
        """Encodes state 0 of the image and the projected question (M, T, Dv) to taps (M, P + T, taps * Dv)."""
        patches, keys = x.shape[1], None
        if text is not None:
            x = torch.cat([x, text.to(x)], 1)  # text has no position embedding
            if not text_mask.all():
                keys = F.pad(text_mask.bool(), (patches, 0), value=True)[:, None, None]
        half = self.config.vision["layers"] // 2
        shallow, deep = torch.zeros_like(x, dtype=torch.float32), torch.zeros_like(x, dtype=torch.float32)
        for i, layer in enumerate(self.encoder["layers"]):
            if i < half:
                shallow = shallow.to(x.device) + x.float() / half  # layers may be on different devices
            elif i < 2 * half:
                deep = deep.to(x.device) + x.float() / half
            if self.gradient_checkpointing and self.training:
                x = checkpointed(self, layer.__call__, x, patches, keys, i < half)
            else:
                x = layer(x, patches, keys, i < half)
        shallow, deep = shallow.to(x.device), deep.to(x.device)
        if self.config.taps == "released":
            return torch.cat([x, shallow.to(x.dtype), deep.to(x.dtype)], -1)
        return torch.cat([shallow, deep + x.float() / half], -1).to(x.dtype)  # x is state 2h - 1


def resize(tokens: Tensor, count: int) -> Tensor:
    """Resizes a square grid of tokens (M, P, D) bilinearly to `count` tokens; 0 leaves them as they are."""
    if count in (0, tokens.shape[1]):
        return tokens
    side = math.isqrt(count)
    grid = F.interpolate(square(tokens).permute(0, 3, 1, 2), size=(side, side), mode="bilinear")
    return grid.flatten(2).transpose(1, 2)


def square(tokens: Tensor) -> Tensor:
    side = math.isqrt(tokens.shape[1])
    return tokens.unflatten(1, (side, side))


def pool(grid: Tensor, cells: int) -> Tensor:
    """Pools (M, h, w, D) to (M, cells^2, D) by the maximum of each adaptive cell (see `windows`)."""
    return F.adaptive_max_pool2d(grid.permute(0, 3, 1, 2), cells).flatten(2).transpose(1, 2)


def stitch(parts: Tensor, rows: int, columns: int) -> Tensor:
    """Joins grids that are listed row by row, (M rows columns, P, D), to (M, rows side, columns side, D)."""
    grid = square(parts).unflatten(0, (-1, rows, columns)).transpose(2, 3)
    return grid.flatten(3, 4).flatten(1, 2)


def windows(height: int, width: int, cells: int, device, line: int = 0) -> tuple[Tensor, Tensor]:
    """Adaptive windows of a height x width grid: token indices (cells^2, W) and which of them are real.

    Cell i of a side covers [floor(i size / cells), ceil((i + 1) size / cells)): neighbours overlap where `cells` does
    not divide `size`. Rows of the grid are `line` tokens apart, by default its width.
    """
    i = torch.arange(cells, device=device)
    index, real = [], []
    for size in (height, width):
        start, stop = i * size // cells, -(-(i + 1) * size // cells)
        widest = max(-(-(k + 1) * size // cells) - k * size // cells for k in range(cells))
        covered = start[:, None] + torch.arange(widest, device=device)
        real.append(covered < stop[:, None])
        index.append(covered.clamp(max=size - 1))
    flat = index[0][:, None, :, None] * (line or width) + index[1][None, :, None, :]
    both = real[0][:, None, :, None] & real[1][None, :, None, :]
    return flat.reshape(cells**2, -1), both.reshape(cells**2, -1)


def tiled_windows(boxes: list[list[int]], side: int, cells: int, device) -> tuple[Tensor, Tensor]:
    """Windows over the whole view and the tiles of each image.

    Returns indices into the image's visual tokens (see `FusionModel.with_tiles`) and which of them are real, both (M,
    cells^2, W).

    Args:
      boxes: (top, bottom, left, right) of each image's tokens in the merged grid; all zero without tiles. side: the
        side of the whole view's grid.
    """
    whole, whole_real = windows(side, side, cells, device)
    index, real = [], []
    for top, bottom, left, right in boxes:
        parts = [whole], [whole_real]
        if bottom > top:
            height, width = bottom - top, right - left
            tiles, tiles_real = windows(height, width, cells, device, width + 1)  # each row has a row end
            parts[0].append(side * side + tiles)
            parts[1].append(tiles_real)
        index.append(torch.cat(parts[0], 1))
        real.append(torch.cat(parts[1], 1))
    widest = max((one.shape[1] for one in index), default=0)

    def stacked(listed):
        return torch.stack([F.pad(one, (0, widest - one.shape[1])) for one in listed])

    return stacked(index), stacked(real)
