"""FUSION/FLARE vision-language models for PyTorch and transformers, in one file.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    question = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    inputs = processor([{"role": "user", "content": question}], Image.open("image.jpg"))
    answer = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    print(processor.batch_decode(answer, skip_special_tokens=True))

The question's tokens join the image's patches in the encoder (text-guided encoding). In the decoder each round of the
conversation owns l x l latent tokens, which the exchange layers update from the image, led by that round's question:

    tokens        s s v i i i i v v L L L L v q q e a a e s v L L L L v q e    (i image, L latent, q question,
    visual_index -1-1-1 0 1 2 3-1-1 4 5 6 7-1-1-1-1-1-1-1-1-1 8 91011-1-1-1     a answer, s v e template)
    round_end                                     ^                       ^    the last token before an answer

Shapes: B conversations, S positions, N images, V views of an image, P patches, I tokens of an image in the sequence,
T question tokens, R rounds, L = l * l latents, D decoder width, M images that exist in the batch, K rounds that have
latents. Everything is batch-first, and rows may be padded on either side.
"""

import math
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import BatchFeature, DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.utils import ModelOutput, cached_file

try:  # only tokenizers that come as tokenizer.model need it
    import sentencepiece
except ImportError:
    sentencepiece = None

# Values of image_kind. A zero image is 0.0 after normalisation, the mid-grey that stands in where there is no image.
NO_IMAGE, PIXELS, ZERO_IMAGE = 0, 1, 2
QUADRANTS = 4
IGNORE = -100  # in labels: not supervised

# What image files may be, as in training. Pillow's other formats are left out: some start programs, or hold any format.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
MAX_PIXELS, MAX_SIDE, MAX_BYTES = 80_000_000, 65_535, 1 << 29
SLOW_DECODERS = {"jpeg2k": 10_000_000, "bmp_rle": 10_000_000, "ppm": 1_000_000, "ppm_plain": 1_000_000}  # pixels


# Defaults of a FusionConfig's parts.
VISION = {"image_size": 384, "patch_size": 16, "width": 1536, "mlp_dim": 6144, "layers": 39, "heads": 16}
VISION["norm_eps"] = 1e-6
LLM = {
    "vocab_size": 32064,
    "width": 3072,
    "mlp_dim": 8192,
    "layers": 32,
    "heads": 32,
    "kv_heads": 32,
    "head_dim": 0,  # 0: width / heads
    "norm_eps": 1e-5,
    "qkv_bias": False,
    "tied_head": False,
    "sliding_window": 0,  # 0: none, else how many positions a query sees, itself included
}
ROPE = {
    "kind": "default",  # or llama3, longrope
    "theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_length": 8192,
    "max_length": 131072,
    "short_factors": [],
    "long_factors": [],
}
EXCHANGE = {"start": 0, "stride": 3, "layers": 10, "heads": 16}  # after decoder layers start, start + stride, ...


class FusionConfig(PretrainedConfig):
    """The whole model. `vision`, `llm` (with `rope`) and `exchange` are dicts; what they leave out has these defaults.

    text_guided: the question's tokens enter the encoder. mapping_loss_weight: lambda of the dual-semantic mapping loss.
    semantic_exchange: latents and exchange layers. latent_counts: the l^2 that training drew from; latent_count: the
    one to use when nothing is asked. image_tokens: tokens per image, 0 for one per patch. mask, taps, context,
    latent_init, text_only: `paper` or `released` arithmetic, see where they are used. template: the text around turns.
    """

    model_type = "fusion_jax"

    def __init__(
        self,
        vision=None,
        llm=None,
        exchange=None,
        text_guided=True,
        mapping_loss_weight=0.1,
        semantic_exchange=True,
        latent_counts=(4, 16, 36, 64, 144),
        image_tokens=0,
        mask="paper",
        taps="paper",
        context="image",
        latent_init="learned",
        text_only="none",
        hide_question_id_zero=False,
        latent_count=0,
        template=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.vision = {**VISION, **(vision or {})}
        self.llm = {**LLM, **(llm or {})}
        self.llm["rope"] = {**ROPE, **(self.llm.get("rope") or {})}
        self.llm["head_dim"] = self.llm["head_dim"] or self.llm["width"] // self.llm["heads"]
        self.exchange = {**EXCHANGE, **(exchange or {})}
        self.text_guided = text_guided
        self.mapping_loss_weight = mapping_loss_weight
        self.semantic_exchange = semantic_exchange
        self.latent_counts = list(latent_counts)
        self.image_tokens = image_tokens
        self.mask = mask
        self.taps = taps
        self.context = context
        self.latent_init = latent_init
        self.text_only = text_only
        self.hide_question_id_zero = hide_question_id_zero
        self.latent_count = latent_count
        self.template = template
        # What transformers' generation and cache code asks for. A tied head is no second tensor here: nothing to tie.
        self.vocab_size = self.llm["vocab_size"]
        self.hidden_size = self.llm["width"]
        self.num_hidden_layers = self.llm["layers"]
        self.num_attention_heads = self.llm["heads"]
        self.num_key_value_heads = self.llm["kv_heads"]
        self.head_dim = self.llm["head_dim"]
        self.max_position_embeddings = self.llm["rope"]["max_length"]
        self.tie_word_embeddings = False

    @property
    def patches(self) -> int:
        # The patch convolution has no padding: 384 / 14 gives 27 a side.
        return (self.vision["image_size"] // self.vision["patch_size"]) ** 2

    @property
    def encoder_layers(self) -> int:
        """Layers of the tower that run: without its last state as a tap nothing reads what follows state 2h - 1."""
        layers = self.vision["layers"]
        return layers if self.taps == "released" else 2 * (layers // 2) - 1

    @property
    def tokens_per_image(self) -> int:
        return self.image_tokens or self.patches

    @property
    def uses_quadrants(self) -> bool:
        return self.context == "quadrants" and self.semantic_exchange

    @property
    def exchange_after(self) -> list[int]:
        """Decoder layers that an exchange layer follows."""
        e = self.exchange
        return [e["start"] + i * e["stride"] for i in range(e["layers"])] if self.semantic_exchange else []


@dataclass
class FusionOutput(ModelOutput):
    """loss = ce + mapping_loss_weight (v2t + t2v); the losses only with labels. logits: (B, S, vocabulary)."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    ce: Tensor | None = None
    v2t: Tensor | None = None
    t2v: Tensor | None = None


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


# ---------------------------------------------------------------------------------------------- vision


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
        if patches == x.shape[1] or not early:
            return F.scaled_dot_product_attention(q, k, v, keys)
        q_image, q_text = q[:, :, :patches], q[:, :, patches:]
        if self.config.mask == "paper":  # image queries do not see the text
            image = F.scaled_dot_product_attention(q_image, k[:, :, :patches], v[:, :, :patches])
        else:  # they do, and text queries attend uniformly: a query of zeros scores all keys alike
            image = F.scaled_dot_product_attention(q_image, k, v, keys)
            q_text = torch.zeros_like(q_text)
        return torch.cat([image, F.scaled_dot_product_attention(q_text, k, v, keys)], 2)

    def forward(self, x: Tensor, patches: int, keys: Tensor | None, early: bool) -> Tensor:
        """x: (M, P or P + T, Dv); keys: (M, 1, 1, P + T) bool, what is no padding, None for all."""
        x = x + self.self_attn["out_proj"](merge_heads(self.attend(self.layer_norm1(x), patches, keys, early)))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.layer_norm2(x)), approximate="tanh"))


class VisionEncoder(nn.Module):
    """SigLIP tower led by the question; its output is a concatenation of residual states (taps)."""

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
        convolution = self.embeddings["patch_embedding"]
        x = convolution(pixels.to(convolution.weight.dtype)).flatten(2).transpose(1, 2)
        return x + self.embeddings["position_embedding"].weight

    def forward(self, x: Tensor, text: Tensor | None = None, text_mask: Tensor | None = None) -> Tensor:
        """State 0 of the image and the projected question (M, T, Dv) to taps (M, P + T, taps * Dv)."""
        patches, keys = x.shape[1], None
        if text is not None:
            x = torch.cat([x, text.to(x.dtype)], 1)  # text gets no position embedding
            if not text_mask.all():
                keys = F.pad(text_mask.bool(), (patches, 0), value=True)[:, None, None]
        half = self.config.vision["layers"] // 2
        shallow, deep = torch.zeros_like(x, dtype=torch.float32), torch.zeros_like(x, dtype=torch.float32)
        for i, layer in enumerate(self.encoder["layers"]):
            if i < half:
                shallow = shallow + x.float() / half
            elif i < 2 * half:
                deep = deep + x.float() / half
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(layer.__call__, x, patches, keys, i < half)
            else:
                x = layer(x, patches, keys, i < half)
        if self.config.taps == "released":
            return torch.cat([x, shallow.to(x.dtype), deep.to(x.dtype)], -1)
        return torch.cat([shallow, deep + x.float() / half], -1).to(x.dtype)  # x is state 2h - 1


# ---------------------------------------------------------------------------------------------- exchange


def windows(size: int, cells: int, device) -> tuple[Tensor, Tensor]:
    """Adaptive windows of a size x size grid: token indices (cells^2, W) and which of them are real.

    Cell i covers [floor(i size / cells), ceil((i + 1) size / cells)): neighbours overlap where `cells` does not divide
    `size`.
    """
    i = torch.arange(cells, device=device)
    start, stop = i * size // cells, -(-(i + 1) * size // cells)
    index = start[:, None] + torch.arange(int((stop - start).max()), device=device)
    real, index = index < stop[:, None], index.clamp(max=size - 1)
    flat = index[:, None, :, None] * size + index[None, :, None, :]
    return flat.reshape(cells**2, -1), (real[:, None, :, None] & real[None, :, None, :]).reshape(cells**2, -1)


def pool(grid: Tensor, cells: int) -> Tensor:
    """(M, h, w, D) to (M, cells^2, D) by the same adaptive cells' maximum."""
    return F.adaptive_max_pool2d(grid.permute(0, 3, 1, 2), cells).flatten(2).transpose(1, 2)


def square(tokens: Tensor) -> Tensor:
    side = math.isqrt(tokens.shape[1])
    return tokens.unflatten(1, (side, side))


class Exchange(NamedTuple):
    """What the exchange layers read and where they write.

    context: (M, C, D). image, row, end: (K,) the round's image, its row and the place of its question's last token.
    places: (K, L) where its latents are. index, real: (L, W) the windows.
    """

    context: Tensor
    image: Tensor
    row: Tensor
    end: Tensor
    places: Tensor
    index: Tensor
    real: Tensor


class ExchangeLayer(nn.Module):
    """Each latent queries its own window of the image, led by the last hidden state of its round's question."""

    def __init__(self, config: FusionConfig):
        super().__init__()
        d = config.llm["width"]

        def normed():
            return nn.Sequential(nn.LayerNorm(d, 1e-5), nn.Linear(d, d, bias=False))

        self.heads = config.exchange["heads"]
        self.proj_in = nn.Linear(2 * d, d, bias=False)
        self.proj_context = nn.Linear(d, d, bias=False)
        self.cross_attn = nn.ModuleDict({f"{name}_proj": normed() for name in "qkv"})
        self.cross_attn["o_proj"] = nn.Linear(d, d, bias=False)
        self.norm = nn.LayerNorm(d, 1e-5)
        self.proj_out = nn.ModuleDict({f"linear_{i}": nn.Linear(d, d, bias=False) for i in (1, 2)})

    def forward(self, x: Tensor, *exchange: Tensor) -> Tensor:
        e = Exchange(*exchange)
        rounds, count = e.places.shape
        rows = e.row[:, None]
        # All rounds read the state before the layer.
        latents = x[rows, e.places]
        question = x[e.row, e.end][:, None].expand_as(latents)
        p = self.proj_in(torch.cat([question, latents], -1))
        c = self.proj_context(e.context)
        q = self.cross_attn["q_proj"](p)
        # Keys and values once per image; then each latent takes its window's.
        k, v = (self.cross_attn[name](c)[e.image[:, None, None], e.index] for name in ("k_proj", "v_proj"))
        q = split_heads(q.reshape(rounds * count, 1, -1), self.heads)
        k, v = (split_heads(a.flatten(0, 1), self.heads) for a in (k, v))
        mask = None if e.real.all() else e.real.repeat(rounds, 1)[:, None, None]
        y = merge_heads(F.scaled_dot_product_attention(q, k, v, mask)).reshape(p.shape)
        y = self.norm(self.cross_attn["o_proj"](y) + p)
        update = self.proj_out["linear_2"](F.gelu(self.proj_out["linear_1"](y)))
        return x.index_put((rows, e.places), latents + update.to(x.dtype))


class SamplerLayer(nn.Module):
    """Only there for the published names, `vision_sampler_layers.0.layers.0`."""

    def __init__(self, config: FusionConfig):
        super().__init__()
        self.layers = nn.ModuleList([ExchangeLayer(config)])

    def forward(self, x: Tensor, *exchange: Tensor) -> Tensor:
        return self.layers[0](x, *exchange)


# ---------------------------------------------------------------------------------------------- decoder


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
    """Inverse frequencies below and beyond the original length, and the factor on cos and sin."""
    base = rope["theta"] ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope["kind"] == "default":
        return base, base, 1.0
    length = rope["original_length"]
    if rope["kind"] == "longrope":
        ratio = rope["max_length"] / length
        scale = math.sqrt(1 + math.log(ratio) / math.log(length)) if ratio > 1 else 1.0
        return base / np.array(rope["short_factors"]), base / np.array(rope["long_factors"]), scale
    # Llama-3: low frequencies are divided, high ones kept, a linear blend in between.
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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, causal: bool, cache=None) -> Tensor:
        y, attn, mlp = self.input_layernorm(x), self.self_attn, self.mlp
        q = rotate(split_heads(attn["q_proj"](y), self.heads), cos, sin)
        k = rotate(split_heads(attn["k_proj"](y), self.kv_heads), cos, sin)
        v = split_heads(attn["v_proj"](y), self.kv_heads)
        if cache is not None:
            k, v = cache.update(k, v, self.index)
        if self.kv_heads < self.heads:
            k, v = (a.repeat_interleave(self.heads // self.kv_heads, 1) for a in (k, v))
        x = x + attn["o_proj"](merge_heads(F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)))
        y = self.post_attention_layernorm(x)
        return x + mlp["down_proj"](F.silu(mlp["gate_proj"](y)) * mlp["up_proj"](y))


def decoder_mask(attention_mask: Tensor, queries: int, window: int) -> tuple[Tensor | None, bool]:
    """Mask (B, 1, queries, S) for the last `queries` of the S positions, or None and whether to be causal instead."""
    length = attention_mask.shape[1]
    if (window == 0 or window >= length) and queries in (1, length) and attention_mask.all():
        return None, queries > 1
    key = torch.arange(length, device=attention_mask.device)
    query = key[-queries:, None]
    seen = key <= query
    if window:
        seen = seen & (key > query - window)
    # Padding sees itself: attention to nothing would be NaN, and NaN spreads.
    return (seen & attention_mask.bool()[:, None] | (key == query))[:, None], False


# ---------------------------------------------------------------------------------------------- model


class Visual(NamedTuple):
    """What the encoder side gives. table: (B, N I + R L, D) what visual_index points into; question, patches: pairs
    that the mapping loss compares, None without."""

    table: Tensor
    exchange: Exchange | None
    question: tuple[Tensor, Tensor] | None
    patches: tuple[Tensor, Tensor] | None


class FusionModel(nn.Module):
    """Encoder, projectors, latents, decoder with exchange; all but the head and the losses."""

    gradient_checkpointing = False

    def __init__(self, config: FusionConfig):
        super().__init__()
        c, d, dv = config.llm, config.llm["width"], config.vision["width"]
        self.config = config
        taps = 3 if config.taps == "released" else 2
        # Nested for the published names.
        tower = nn.ModuleDict({"vision_model": VisionEncoder(config)})
        self.vision_tower = nn.ModuleDict({"vision_tower": tower})
        self.mm_projector = nn.Sequential(nn.Linear(taps * dv, d), nn.GELU(), nn.Linear(d, d))
        if config.text_guided or config.mapping_loss_weight > 0:
            self.aux_projector = nn.Sequential(nn.Linear(d, dv), nn.GELU(), nn.Linear(dv, dv))
        if config.semantic_exchange and config.latent_init == "learned":
            self.latents = nn.ParameterDict({str(n): nn.Parameter(torch.zeros(n, d)) for n in config.latent_counts})
        self.vision_sampler_layers = nn.ModuleList(SamplerLayer(config) for _ in config.exchange_after)
        self.embed_tokens = nn.Embedding(c["vocab_size"], d)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(c["layers"]))
        self.norm = FusionRMSNorm(d, c["norm_eps"])
        self.frequencies = inverse_frequencies(c["rope"], c["head_dim"])  # numpy: no buffer to convert or to lose

    def encode(
        self, visual_index, pixel_values, image_kind, question_ids, question_mask, round_image, round_end, latent_start
    ) -> Visual:
        """Everything before the decoder. Only images that exist are encoded."""
        config, encoder = self.config, self.vision_tower["vision_tower"]["vision_model"]
        b, n = pixel_values.shape[:2]
        if image_kind is None:
            image_kind = torch.ones((b, n), dtype=torch.long, device=pixel_values.device)
        present = image_kind.flatten().nonzero()[:, 0]
        slot = torch.zeros(b * n, dtype=torch.long, device=present.device)
        slot[present] = torch.arange(len(present), device=present.device)
        pixels = pixel_values.flatten(0, 1)[present]

        state = encoder.embed(pixels[:, -1])
        question = text = mask = None
        if config.text_guided:
            question = self.embed_tokens(question_ids.flatten(0, 1)[present])
            mask = question_mask.flatten(0, 1)[present].bool()
            text = self.aux_projector(question)
        features = self.mm_projector(encoder(state, text, mask))
        whole, question_features = features[:, : config.patches], features[:, config.patches :]
        tokens = whole
        if config.image_tokens:
            grid = square(whole).permute(0, 3, 1, 2)
            grid = F.interpolate(grid, size=(math.isqrt(config.image_tokens),) * 2, mode="bilinear")
            tokens = grid.flatten(2).transpose(1, 2)

        table = (
            tokens.new_zeros((b * n, *tokens.shape[1:])).index_copy(0, present, tokens).view(b, -1, tokens.shape[-1])
        )
        exchange = None
        if config.semantic_exchange and latent_start is not None and (latent_start >= 0).any():
            row, r = (latent_start >= 0).nonzero(as_tuple=True)
            # The number of latents follows from how many places the rounds own.
            count = int((visual_index >= table.shape[1]).sum()) // len(row)
            side = math.isqrt(count)
            if side == 0 or side**2 != count:
                raise ValueError(f"visual_index gives each round {count} latents, which is no square.")
            context = tokens
            if config.uses_quadrants:
                plain = self.mm_projector(encoder(encoder.embed(pixels[:, :QUADRANTS].flatten(0, 1))))
                # Top left, top right, bottom left, bottom right to one grid of twice the side.
                grid = square(plain).unflatten(0, (-1, 2, 2)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
                context = pool(grid, 3 * side)
            image = slot[row * n + round_image[row, r].clamp(min=0)]
            if config.latent_init == "learned":
                if str(count) not in self.latents:
                    raise ValueError(f"There are no latents for l^2 = {count}; allowed are {config.latent_counts}.")
                latents = self.latents[str(count)].to(table.dtype).expand(len(row), -1, -1)
            else:
                # Cells of the l x l grid are unions of those of the context's grid: pooling it again is exact.
                real = (image_kind.flatten()[present] == PIXELS)[:, None, None]
                latents = torch.where(real, pool(square(context), side), 0.0).to(table.dtype)[image]
            both = table.new_zeros((*latent_start.shape, count, table.shape[-1])).index_put((row, r), latents)
            table = torch.cat([table, both.flatten(1, 2)], 1)
            places = latent_start[row, r, None] + torch.arange(count, device=row.device)
            index, real = windows(math.isqrt(context.shape[1]), side, row.device)
            exchange = Exchange(context, image, row, round_end[row, r].clamp(min=0), places, index, real)

        pairs = [None, None]
        if config.mapping_loss_weight > 0:
            if question is not None:
                pairs[0] = (question[mask], question_features[mask])
            pairs[1] = (state, whole)
        return Visual(table, exchange, *pairs)

    def rotary(self, attention_mask: Tensor, queries: int, reach: Tensor | None) -> tuple[Tensor, Tensor]:
        """cos and sin (B, 1, queries, d / 2) of the last places of each row, float32."""
        lengths = attention_mask.long().cumsum(1)
        positions = (lengths - 1).clamp(min=0)[:, -queries:]
        short, long, scale = self.frequencies
        rope, device = self.config.llm["rope"], attention_mask.device
        frequencies = torch.tensor(short, dtype=torch.float32, device=device)
        if rope["kind"] == "longrope":
            # Each row has the long factors for all of its tokens or for none: transformers' rule for a batch of one.
            beyond = (lengths[:, -1] if reach is None else reach.to(device)) > rope["original_length"]
            if reach is None and queries < lengths.shape[1]:
                cached = lengths[:, -queries - 1]
                if (beyond & (cached > 0) & (cached <= rope["original_length"])).any():
                    raise ValueError(
                        f"A row passes the {rope['original_length']} positions of LongRoPE's short factors, which its "
                        "cached keys were turned by: give every call `reach`, each row's tokens and longest answer."
                    )
            frequencies = torch.where(
                beyond[:, None], torch.tensor(long, dtype=torch.float32, device=device), frequencies
            )
            frequencies = frequencies[:, None, None]
        angles = positions[:, None, :, None].float() * frequencies
        return angles.cos() * scale, angles.sin() * scale

    def decode(self, x: Tensor, attention_mask: Tensor, exchange: Exchange | None, cache, reach=None) -> Tensor:
        queries = x.shape[1]
        mask, causal = decoder_mask(attention_mask, queries, self.config.llm["sliding_window"])
        shared = (*self.rotary(attention_mask, queries, reach), mask, causal)

        after = self.config.exchange_after
        remat = self.gradient_checkpointing and self.training
        for i, layer in enumerate(self.layers):
            if remat:
                x = self._gradient_checkpointing_func(layer.__call__, x, *shared)
            else:
                x = layer(x, *shared, cache)
            if exchange is not None and i in after:
                sampler = self.vision_sampler_layers[after.index(i)]
                # Tensor by tensor: reentrant checkpointing gives no gradient to what is inside a tuple.
                call = self._gradient_checkpointing_func if remat else lambda function, *args: function(*args)
                x = call(sampler.__call__, x, *exchange)
        return self.norm(x)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        visual_index: Tensor | None,
        cache,
        reach: Tensor | None = None,
        **images,
    ) -> tuple[Tensor, Visual | None]:
        b, s = input_ids.shape
        past = 0 if cache is None else cache.get_seq_length()
        if attention_mask is None:
            attention_mask = torch.ones((b, past + s), dtype=torch.long, device=input_ids.device)
        x, visual = self.embed_tokens(input_ids), None
        kind, pixels = images.get("image_kind"), images.get("pixel_values")
        if pixels is not None and pixels.shape[1] and (kind is None or (kind != NO_IMAGE).any()):
            visual = self.encode(visual_index, **images)
            index = F.pad(visual_index, (0, s - visual_index.shape[1]), value=-1)
            rows = torch.arange(b, device=x.device)[:, None]
            x = torch.where((index >= 0)[..., None], visual.table[rows, index.clamp(min=0)].to(x.dtype), x)
        hidden = self.decode(x, attention_mask, None if visual is None else visual.exchange, cache, reach)
        return hidden, visual


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.float(), b.float()
    norms = a.square().sum(-1) * b.square().sum(-1)
    # The floor stands under the root: a zero vector then has a finite gradient.
    return 1.0 - (a * b).sum(-1) * torch.rsqrt(norms.clamp(min=1e-16))


class FusionForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = FusionConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean over this batch; let the Trainer divide
    _no_split_modules = ["VisionLayer", "DecoderLayer", "SamplerLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_static_cache = False
    _can_compile_fullgraph = False
    # The tower's layers that the taps leave out: in the files where an imported tower had them.
    _keys_to_ignore_on_load_unexpected = [r"\.vision_model\.encoder\.layers\.\d+\."]  # noqa: RUF012

    def __init__(self, config: FusionConfig):
        super().__init__(config)
        self.model = FusionModel(config)
        self.lm_head = None
        if not config.llm["tied_head"]:
            self.lm_head = nn.Linear(config.llm["width"], config.llm["vocab_size"], bias=False)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm | FusionRMSNorm):
            nn.init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.ParameterDict):
            for latents in module.values():
                nn.init.normal_(latents, std=0.5)

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        visual_index: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_kind: Tensor | None = None,
        question_ids: Tensor | None = None,
        question_mask: Tensor | None = None,
        round_image: Tensor | None = None,
        round_end: Tensor | None = None,
        latent_start: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values=None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        reach: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> FusionOutput | tuple:
        """One forward pass; `FusionProcessor` makes its inputs. Without images leave out all that concerns them.

        Args:
          input_ids: (B, S), the pad token at visual places. attention_mask: (B, past + S), 0 for padding.
          visual_index: (B, S) -1 for text, else an index into the row's [N * I image tokens | R * L latents].
          pixel_values: (B, N, V, 3, H, W) in [-1, 1], the whole image last and, where the model uses them, its four
            quadrants (top left, top right, bottom left, bottom right) first. Zeros for a zero image.
          image_kind: (B, N) NO_IMAGE, PIXELS or ZERO_IMAGE; by default all are PIXELS.
          question_ids, question_mask: (B, N, T) question tokens that guide the image's encoding.
          round_image, round_end, latent_start: (B, R) the round's image, the place of the last token before its answer
            and of its first latent; -1 where there is none.
          labels: (B, S) token ids, not shifted; negative where unsupervised.
          logits_to_keep: only the last so many positions' logits; 0 for all.
          reach: (B,) tokens that each row may come to have, which chooses LongRoPE's factors; by default those that it
            has. `generate` gives those of the prompt and of the longest answer, but for the last, which is not read.
        """
        if use_cache is None:
            use_cache = past_key_values is not None
        if use_cache and self.training and self.model.gradient_checkpointing:
            use_cache = False
        if not use_cache:
            past_key_values = None
        elif past_key_values is None:
            past_key_values = DynamicCache()
        hidden, visual = self.model(
            input_ids,
            attention_mask,
            visual_index,
            past_key_values,
            reach,
            pixel_values=pixel_values,
            image_kind=image_kind,
            question_ids=question_ids,
            question_mask=question_mask,
            round_image=round_image,
            round_end=round_end,
            latent_start=latent_start,
        )
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        logits = F.linear(hidden[:, -logits_to_keep:], head.weight)
        losses = {} if labels is None else self.losses(logits, labels, visual)
        output = FusionOutput(logits=logits, past_key_values=past_key_values, **losses)
        return output if return_dict is not False else output.to_tuple()

    def losses(self, logits: Tensor, labels: Tensor, visual: Visual | None) -> dict[str, Tensor]:
        """Means over the batch's supervised tokens, question tokens and patches."""
        supervised = labels[:, 1:] >= 0
        chosen = logits[:, :-1][supervised].float()
        ce = F.cross_entropy(chosen, labels[:, 1:][supervised], reduction="sum") / supervised.sum().clamp(min=1)
        v2t = t2v = ce.new_zeros(())
        if visual is not None and visual.question is not None and len(visual.question[0]):
            v2t = cosine_distance(*visual.question).mean()
        if visual is not None and visual.patches is not None:
            state, whole = visual.patches
            t2v = cosine_distance(state, self.model.aux_projector(whole)).mean()
        return {"loss": ce + self.config.mapping_loss_weight * (v2t + t2v), "ce": ce, "v2t": v2t, "t2v": t2v}

    def generate(self, inputs=None, generation_config=None, *args, **kwargs):
        """As in transformers. With LongRoPE each row's factors are chosen once, by its prompt and its longest answer:
        keys that are cached cannot change theirs."""
        ids = kwargs.get("input_ids") if inputs is None else inputs
        if self.config.llm["rope"]["kind"] == "longrope" and kwargs.get("reach") is None and ids is not None:
            config = generation_config or self.generation_config
            new, length = (kwargs.get(n, getattr(config, n, None)) for n in ("max_new_tokens", "max_length"))
            if new is None:  # 20 more tokens where nothing is said, which transformers notes as a length of 20
                new = 20 if length in (None, 20) else length - ids.shape[1]
            mask = kwargs.get("attention_mask")
            kwargs["reach"] = (torch.ones_like(ids) if mask is None else mask).sum(1) + max(new, 1) - 1
        return super().generate(inputs, generation_config, *args, **kwargs)

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, attention_mask=None, use_cache=True, logits_to_keep=None, **kwargs
    ):
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if past and attention_mask is not None:
            input_ids = input_ids[:, -(attention_mask.shape[1] - past) :]
        elif past:
            input_ids = input_ids[:, past:]
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep or 1,
            "reach": kwargs.get("reach"),
        }
        # Images and latents are in the cache after the prefill.
        names = ("visual_index", "pixel_values", "image_kind", "question_ids", "question_mask")
        names += ("round_image", "round_end", "latent_start")
        return inputs if past else {**inputs, **{name: kwargs.get(name) for name in names}}


# ---------------------------------------------------------------------------------------------- processor

IMAGE_TAG = "<image>"  # how a turn's text says that it carries the image
VISION_START, VISION_END = "<vision_start>", "<vision_end>"  # frame every visual place
# Stand-ins in a row of ids until the layout fills the places.
IMAGE, LATENTS = -200, -300
SPACE = "▁"  # SentencePiece's visible stand-in for a space


class SentencePieceText:
    """Text to ids exactly as the model was trained: SentencePiece, added tokens cut out first, longest match first.

    One "▁" goes before each text and is dropped where a special token opens it. transformers' fast conversion of the
    same tokenizer.model differs where white space comes in runs or next to added tokens.
    """

    def __init__(self, model: bytes, tokenizer):
        if sentencepiece is None:
            raise ImportError("This model's tokenizer.model needs the package: pip install sentencepiece")
        # A protobuf message may be continued: normalizer_spec { add_dummy_prefix: false }; the last value wins.
        self.model = sentencepiece.SentencePieceProcessor(model_proto=model + b"\x1a\x02\x18\x00")
        self.added = {token.content: (i, token) for i, token in tokenizer.added_tokens_decoder.items()}
        names = sorted(map(re.escape, self.added), key=len, reverse=True)
        self.splitter = re.compile("(" + "|".join(names) + ")")
        self.guard = tokenizer.unk_token or self.model.id_to_piece(self.model.unk_id())
        self.guard_length = len(self.model.encode(self.guard))

    def __call__(self, text: str) -> list[int]:
        if not text:
            return []
        # Odd places hold added tokens, even places the text between them.
        parts = self.splitter.split(SPACE + text.replace(SPACE, " "))
        for k in range(1, len(parts), 2):
            token = self.added[parts[k]][1]
            if token.lstrip:
                parts[k - 1] = parts[k - 1].rstrip()
            if token.rstrip:
                parts[k + 1] = parts[k + 1].lstrip()
        if len(parts) > 1 and parts[0] == SPACE and self.added[parts[1]][1].special:
            parts[0] = ""
        ids = []
        for k, part in enumerate(parts):
            if k % 2:
                ids.append(self.added[part][0])
            elif part.startswith((SPACE, " ")):
                # Some models trim white space in front of what they are given: give them something else in front.
                ids += self.model.encode(self.guard + part)[self.guard_length :]
            elif part:
                ids += self.model.encode(part)
        return ids


# Values of other than 8 bits, as the 8 that training saw: word for word the functions of training.


class UnclearRange(ValueError):
    """Nothing says which value is white. The message continues "the image ..."."""


WHITES = (1, 255, 1023, 4095, 16383, 65535)
BITS, PHOTOMETRIC, PLANES, KIND, WHITE_IS_ZERO, SIGNED = 258, 262, 284, 339, 0, 2  # tags of TIFF, and two values
LEAST_TAGS, MOST_TAGS = (280, 340), (281, 341)  # MinSampleValue, SMinSampleValue; MaxSampleValue, SMaxSampleValue


def is_deep_colour(image: Image.Image) -> bool:
    """Whether an image, not decoded yet, has 16 bits a channel of which decoding keeps the upper 8.

    Raises:
      ValueError: it is a TIFF of planes of 16 bits without compression, which Pillow reads as if they had 8.
    """
    tile, tags = getattr(image, "tile", None), getattr(image, "tag_v2", {})  # a file's
    if not tile or image.mode not in ("RGB", "RGBA", "CMYK"):
        return False
    if tags.get(PLANES) == 2 and max(np.ravel(tags.get(BITS, 1))) > 8 and tile[0][0] != "libtiff":
        raise ValueError("its channels are planes of 16 bits, which are not read without compression")
    return ";16" in str(tile[0][3])


def check_deep_colour(image: Image.Image) -> None:
    """UnclearRange if no value of a decoded image of `is_deep_colour` reaches a sixteenth of white."""
    if max(most for _, most in image.getextrema()[: 4 if image.mode == "CMYK" else 3]) < 16:
        raise UnclearRange("has 16 bits a channel of which no value reaches a sixteenth: give it 8, white being 255")


def levels_of_grey(image: Image.Image) -> np.ndarray | None:
    """A decoded image's values in 8 bits, (height, width) uint8; None where it has 8, or colours, as it is.

    Raises:
      UnclearRange: nothing says which value is white.
    """
    tags = getattr(image, "tag_v2", {})

    def tag(*names):
        return next((np.ravel(tags[name])[0] for name in names if name in tags), None)

    bits, signed = tag(BITS), tag(KIND) == SIGNED
    if image.mode == "F":
        values, longest = np.asarray(image), None
    elif image.mode.startswith("I;16"):
        values, longest = np.asarray(image), 65535
    elif image.mode == "I":
        values, longest = np.asarray(image), 32767 if bits == 16 else 2**31 - 1
        if bits == 32 and not signed:
            values, longest = values.view(np.uint32), 2**32 - 1
    elif image.mode == "L" and signed:
        values, longest = np.asarray(image).view(np.int8), 127
    else:
        return None
    white = 65535 if image.format == "PPM" else 4095 if bits == 12 else tag(*MOST_TAGS)
    black = tag(*LEAST_TAGS) or 0
    if white is None or white <= black or (black, white) == (0, longest):  # what the numbers could hold says nothing
        black, white = None, longest
    return to_eight_bits(values, black, white, tag(PHOTOMETRIC) == WHITE_IS_ZERO)


def to_eight_bits(values: np.ndarray, black: float | None, white: float | None, inverted: bool) -> np.ndarray:
    """Values to 0 ... 255.

    Args:
      values: (height, width). black, white: as the header says; black None: white is what a number could hold, None for
        fractions. inverted: the header has black and white exchanged.

    Returns:
      (height, width) uint8.

    Raises:
      UnclearRange: nothing says which value is white.
    """
    least, most = values.min(), values.max()
    if not (np.isfinite(least) and np.isfinite(most)):
        raise UnclearRange("has values that are no finite numbers")
    if black is None:
        if least < 0:
            raise UnclearRange(f"has values below 0, and does not say which is black: the least is {least}")
        whites = [one for one in WHITES if white is None or one < white] + [white] * (white is not None)
        black, white = 0, next((one for one in whites if most <= one), 0)
        if most and not white / 16 <= most <= white:
            known = "0 to 1, or 8, 10, 12, 14 or 16 bits"
            raise UnclearRange(f"does not say which value is white: the largest, {most}, fits none of {known}")
    elif least < black or most > white:
        raise UnclearRange(f"says that its values go from {black} to {white}, and they go from {least} to {most}")
    levels = np.empty(values.shape, np.uint8)
    whole = values.dtype.kind != "f" and black == 0 and int(white) == white and int(white) & int(white) + 1 == 0
    shift = int(white).bit_length() - 8 if whole and white >= 255 else None
    rows = max(1, 2**20 // values.shape[1])  # little memory on the way
    for row in range(0, len(values), rows):
        part = values[row : row + rows]
        if shift is None:
            part = np.rint((part.astype(np.float64) - float(black)) * (255 / (float(white) - float(black))))
        else:
            part = part >> shift
        levels[row : row + rows] = part
    return 255 - levels if inverted else levels


def to_rgb(image: Image.Image, deep_colour: bool = False) -> Image.Image:
    """A decoded image in 8 bits a channel, as training saw it. UnclearRange where nothing says which value is white."""
    if deep_colour:
        check_deep_colour(image)
    levels = levels_of_grey(image)
    return (image if levels is None else Image.fromarray(levels)).convert("RGB")


def open_image(path: str | Path) -> Image.Image:
    """An image file as RGB. ValueError if it is none of FORMATS, damaged, or over a limit; OSError if no file."""
    Image.init()
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(f"The image {path} is no file, but a folder, a pipe or a device.")
        if found.st_size > MAX_BYTES:
            raise ValueError(f"The image {path} has {found.st_size} bytes; allowed are {MAX_BYTES}.")
        try:
            image = Image.open(file, formats=[form for form in FORMATS if form in Image.OPEN])
            size, mode = image.size, image.mode
            most = SLOW_DECODERS.get(image.tile[0][0] if image.tile else "", MAX_PIXELS)
            if size[0] * size[1] > most or max(size) > MAX_SIDE:
                raise ValueError(f"it has {size[0]}x{size[1]} pixels; allowed are {most}, and {MAX_SIDE} along a side")
            deep_colour = is_deep_colour(image)
            image.load()
            if (size, mode) not in ((image.size, image.mode), (image.size[::-1], image.mode)):  # a TIFF may be turned
                raise ValueError(f"its pixels are not those that its header says, {mode} of {size[0]}x{size[1]}")
            if (image.size, image.mode) != (image.im.size, image.im.mode):
                raise ValueError("its pixels are of another size than it says")
            return to_rgb(image, deep_colour)
        except Exception as e:  # decoders answer damaged bytes with almost any exception
            raise ValueError(f"Cannot read the image {path}, one of {', '.join(FORMATS)}: {e}") from e


class FusionProcessor(ProcessorMixin):
    """Conversations and images to the model's inputs.

    A conversation is a list of {"role": "user" | "assistant", "content": text or list of parts}, a part being
    {"type": "text", "text": ...} or {"type": "image"}, which may carry its picture as "image" (PIL) or "path". At most
    one image a conversation. A first message of role "system" takes the place of the template's own system text, where
    the template can hold one. A conversation that ends with the user waits for an answer; one that ends with the
    assistant is a training row and gets labels.
    """

    attributes = ["tokenizer"]  # noqa: RUF012
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        tokenizer=None,
        template=None,
        bos_token_id=None,
        image_size=384,
        image_tokens=576,
        latent_count=0,
        text_guided=True,
        quadrants=False,
        zero_image_for_text=False,
        hide_question_id_zero=False,
        image_first=False,
        chat_template=None,
    ):
        """latent_count 0: the model has no latents. bos_token_id: stands in front of every conversation, None: nothing
        does. template: dict of system, question, answer, end, between; system_frame (before and after a conversation's
        own system text), or None; trims (which of system, question and answer lose the white space around them)."""
        super().__init__(tokenizer, chat_template=chat_template)
        self.template = template
        self.bos_token_id = bos_token_id
        self.image_size = image_size
        self.image_tokens = image_tokens
        self.latent_count = latent_count
        self.text_guided = text_guided
        self.quadrants = quadrants
        self.zero_image_for_text = zero_image_for_text
        self.hide_question_id_zero = hide_question_id_zero
        self.image_first = image_first
        self.sentencepiece_model: bytes | None = None
        self._added = dict(tokenizer.added_tokens_decoder)
        self._encode: Any = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        where = {
            k: kwargs[k] for k in ("cache_dir", "revision", "token", "local_files_only", "subfolder") if k in kwargs
        }
        path = cached_file(
            pretrained_model_name_or_path, "tokenizer.model", _raise_exceptions_for_missing_entries=False, **where
        )
        if path is not None:
            processor._use_sentencepiece(Path(path).read_bytes())
        return processor

    def _use_sentencepiece(self, model: bytes) -> None:
        try:
            self._encode = SentencePieceText(model, self.tokenizer)
            self.sentencepiece_model = model
        except RuntimeError:
            pass  # some folders hold a file of this name that is no SentencePiece model, beside tokenizer.json

    def save_pretrained(self, save_directory, **kwargs):
        saved = super().save_pretrained(save_directory, **kwargs)
        if self.sentencepiece_model is not None:
            (Path(save_directory) / "tokenizer.model").write_bytes(self.sentencepiece_model)
        return saved

    def to_dict(self):
        names = ("template", "bos_token_id", "image_size", "image_tokens", "latent_count", "text_guided", "quadrants")
        names += ("zero_image_for_text", "hide_question_id_zero", "image_first", "auto_map")
        values = {name: getattr(self, name) for name in names if hasattr(self, name)}
        return {**values, "processor_class": type(self).__name__}

    @property
    def model_input_names(self):
        names = ["input_ids", "attention_mask", "visual_index", "pixel_values", "image_kind"]
        return [*names, "question_ids", "question_mask", "round_image", "round_end", "latent_start"]

    def decode(self, *args, **kwargs):
        return self.tokenizer.decode(*args, **kwargs)

    def batch_decode(self, *args, **kwargs):
        return self.tokenizer.batch_decode(*args, **kwargs)

    def encode(self, text: str, after: int | None = None) -> list[int]:
        """Ids of `text`; behind an added token (id `after`) there is no word prefix, and it may swallow white space."""
        token = self._added.get(after)
        if token is None:
            return self._encode(text)
        return self._encode(token.content + text)[len(self._encode(token.content)) :]

    def __call__(
        self, conversations=None, images=None, latent_count=None, padding_side="left", return_tensors="pt", text=None
    ) -> BatchFeature:
        """The model's inputs.

        Args:
          conversations: one conversation or a list of them; `text` is another name for it.
          images: one image (PIL or path), list of one, or None per conversation, where they do not carry it themselves.
          latent_count: l^2, by default the model's own.
          padding_side: generation needs "left".
        """
        conversations = text if conversations is None else conversations
        if return_tensors != "pt":
            raise ValueError(f"return_tensors={return_tensors!r} is not supported; only 'pt' is.")
        if conversations and not isinstance(conversations[0], list | tuple):
            conversations = [conversations]
            images = [images]
        images = list(images) if images is not None else [None] * len(conversations)
        if len(images) != len(conversations):
            raise ValueError(f"{len(images)} images for {len(conversations)} conversations: give one or None for each.")
        count = self.latent_count if latent_count is None or not self.latent_count else latent_count
        return self._collate([self._row(c, i, count) for c, i in zip(conversations, images)], count, padding_side)

    def apply_chat_template(self, conversation, chat_template=None, tokenize=False, images=None, **kwargs):
        """The readable prompt, or with `tokenize` the model's inputs. Options that other processors need to get there
        (add_generation_prompt, return_dict, padding, ...) may be given and change nothing."""
        options = {k: kwargs[k] for k in ("latent_count", "padding_side", "return_tensors") if kwargs.get(k)}
        if tokenize:
            return self(conversation, images, **options)
        many = bool(conversation) and isinstance(conversation[0], list | tuple)
        conversations = conversation if many else [conversation]
        images = images if many and images is not None else [images] * len(conversations)
        prompts = [self._row_text(c, i)[0]["prompt"] for c, i in zip(conversations, images)]
        return prompts if many else prompts[0]

    def _system(self, messages) -> str:
        """What stands before the first round."""
        first = messages[0] if messages else {}
        content = first.get("content") if first.get("role") == "system" else None
        said = content if isinstance(content, str) else "".join(part["text"] for part in content or [])
        if not said:
            return self.template["system"]
        if not self.template.get("system_frame"):
            raise ValueError("The model's chat template cannot hold a system message.")
        before, behind = self.template["system_frame"]
        return before + self._trimmed("system", said) + behind

    def _trimmed(self, part: str, text: str) -> str:
        return text.strip() if part in self.template.get("trims", ()) else text

    def _rounds(self, messages, image) -> tuple[list[tuple[str, str | None]], bool, Any]:
        """(question, answer or None) pairs, whether there is an image, and the image. The question that carries it
        starts with the tag and a newline."""
        turns, images = [], list(image) if isinstance(image, list | tuple) else [image] * (image is not None)
        for k, message in enumerate(messages):
            role, content, said = message.get("role"), message.get("content"), ""
            if role == "system" and k == 0:
                continue
            if role not in ("user", "assistant"):
                raise ValueError(f"A turn's role is {role!r}; allowed are user and assistant, and system at the start.")
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                if part.get("type") == "text":
                    said += part["text"]
                elif part.get("type") == "image":
                    said += IMAGE_TAG
                    images += [part[key] for key in ("image", "path") if part.get(key) is not None]
                else:
                    raise ValueError(f"A part's type is {part.get('type')!r}; allowed are text and image.")
            turns.append((role, said))
        turns = turns[1:] if turns and turns[0][0] == "assistant" else turns
        if not turns or any(role != ("user", "assistant")[k % 2] for k, (role, _) in enumerate(turns)):
            raise ValueError("A conversation must alternate between user and assistant and hold a user's turn.")
        questions, answers = [text for _, text in turns[::2]], [text for _, text in turns[1::2]]
        tags = [question.count(IMAGE_TAG) for question in questions]
        if sum(tags) > 1 or len(images) > 1:
            raise ValueError(f"{max(sum(tags), len(images))} images; one image per conversation is supported.")
        if sum(tags) and not images:
            raise ValueError("The conversation says where its image goes, but there is no image.")
        if images:
            owner = tags.index(1) if sum(tags) else 0
            questions[owner] = f"{IMAGE_TAG}\n{questions[owner].replace(IMAGE_TAG, '').strip()}"
        rounds = [(question, answers[k] if k < len(answers) else None) for k, question in enumerate(questions)]
        return rounds, bool(images), images[0] if images else None

    def _row_text(self, messages, image) -> tuple[dict, list, bool, Any]:
        rounds, has_image, image = self._rounds(messages, image)
        return self._tokenize(rounds, has_image, self._system(messages)), rounds, has_image, image

    def _tokenize(self, rounds, has_image: bool, system: str | None = None) -> dict:
        """Cuts the text at placeholders and at answers and tokenizes each piece by itself, BOS in front where the model
        has one. `system`: what stands before the first round, by default the template's own."""
        template, front = self.template, [] if self.bos_token_id is None else [self.bos_token_id]
        ids, labels, ends, prompt = [*front], [IGNORE] * len(front), [], []
        pending, after = "", None  # text that waits, and the id it follows; None where a piece starts

        def say(text: str) -> None:
            nonlocal pending
            pending += text
            prompt.append(text)

        def flush() -> None:
            nonlocal pending, after
            new = self.encode(pending, after)
            ids.extend(new)
            labels.extend([IGNORE] * len(new))
            pending, after = "", ids[-1]

        def placeholder(marker: int, tag: str) -> None:
            nonlocal after
            say(VISION_START)
            flush()
            ids.append(marker)
            labels.append(IGNORE)
            prompt.append(tag)
            after = None
            say(VISION_END)

        say(template["system"] if system is None else system)
        for k, (question, answer) in enumerate(rounds):
            question = self._trimmed("question", question)
            say((template["between"] if k else "") + template["question"])
            if self.latent_count and (has_image or self.zero_image_for_text):
                placeholder(LATENTS, "<latent_image>")
            if question.startswith(IMAGE_TAG) and has_image:
                placeholder(IMAGE, IMAGE_TAG)
                question = question.removeprefix(IMAGE_TAG)
            say(question + template["answer"])
            flush()
            ends.append(len(ids) - 1)
            if answer is not None:
                answer = self._trimmed("answer", answer)
                prompt.append(answer + template["end"])
                new = self.encode(answer + template["end"], after)
                ids.extend(new)
                labels.extend(new)
                after = new[-1]
        question_ids = []
        if has_image and self.text_guided:
            texts = [question.removeprefix(IMAGE_TAG).strip() for question, _ in rounds]
            question_ids = [*front, *self.encode("".join(texts))]
        return {"ids": ids, "labels": labels, "ends": ends, "question_ids": question_ids, "prompt": "".join(prompt)}

    def crops(self, image) -> np.ndarray:
        """(V, size, size, 3) uint8: the quadrants of the image at twice the size, if the model uses them, and the whole
        image last. Both sizes are resized from the original, bicubically and without keeping the aspect ratio."""
        size = self.image_size
        # A rotation noted in EXIF data is not applied, as in training.
        image = to_rgb(image, is_deep_colour(image)) if isinstance(image, Image.Image) else open_image(image)
        whole = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))[None]
        if not self.quadrants:
            return whole.copy()
        double = np.asarray(image.resize((2 * size, 2 * size), Image.Resampling.BICUBIC))
        quadrants = double.reshape(2, size, 2, size, 3).transpose(0, 2, 1, 3, 4).reshape(4, size, size, 3)
        return np.concatenate([quadrants, whole])

    def _row(self, messages, image, count: int) -> dict:
        """One conversation laid out from position 0."""
        text, rounds, has_image, image = self._row_text(messages, image)
        # The first visual place of the image's round holds the image, the latents follow: the published order. With
        # `image_first` it is that of the conversation.
        markers = [token for token in text["ids"] if token < 0]
        if IMAGE in markers:
            place = markers.index(IMAGE)
            markers.insert(0 if self.image_first else max(place - 1, 0), markers.pop(place))
        row = {"ids": [], "labels": [], "visual": [], "end": [], "start": [], "question": text["question_ids"]}
        for i, (token, label) in enumerate(zip(text["ids"], text["labels"])):
            if i in text["ends"]:
                row["end"].append(len(row["ids"]))
            places = [-1]
            if token < 0:
                if markers.pop(0) == IMAGE:
                    places = range(self.image_tokens)
                else:
                    first = self.image_tokens + len(row["start"]) * count
                    row["start"].append(len(row["ids"]))
                    places = range(first, first + count)
                token = self.tokenizer.pad_token_id
            row["visual"] += places
            row["ids"] += [token] * len(places)
            row["labels"] += [label] * len(places)
        row["finished"] = rounds[-1][1] is not None
        row["crops"] = self.crops(image) if has_image else None
        row["kind"] = PIXELS if has_image else ZERO_IMAGE if self.zero_image_for_text and row["start"] else NO_IMAGE
        return row

    def _collate(self, rows: list[dict], count: int, side: str) -> BatchFeature:
        length, size = max(len(row["ids"]) for row in rows), self.image_size
        shifts = [length - len(row["ids"]) if side == "left" else 0 for row in rows]

        def padded(key: str, value: int, width: int = length, shift: bool = False) -> Tensor:
            """The rows' lists as one tensor; `shift`: they hold positions, else they are moved to their place."""
            out = torch.full((len(rows), width), value)
            for line, row, start in zip(out, rows, shifts):
                values = torch.tensor(row[key][:width], dtype=torch.long)
                if shift:
                    line[: len(values)] = values + start
                else:
                    line[(start if width == length else 0) :][: len(values)] = values
            return out

        data = {"input_ids": padded("ids", self.tokenizer.pad_token_id)}
        data["attention_mask"] = torch.zeros_like(data["input_ids"])
        for line, row, start in zip(data["attention_mask"], rows, shifts):
            line[start : start + len(row["ids"])] = 1
        if any(row["finished"] for row in rows):
            data["labels"] = padded("labels", IGNORE)
        if all(row["kind"] == NO_IMAGE for row in rows):
            return BatchFeature(data)

        data["visual_index"] = padded("visual", -1)
        pixels = torch.zeros((len(rows), 1, QUADRANTS * self.quadrants + 1, 3, size, size))
        for view, row in zip(pixels[:, 0], rows):
            if row["crops"] is not None:
                view.copy_(torch.from_numpy(row["crops"]).permute(0, 3, 1, 2).float() / 127.5 - 1.0)
        data["pixel_values"] = pixels
        data["image_kind"] = torch.tensor([[row["kind"]] for row in rows])
        if self.text_guided:
            width = max(1, *(len(row["question"]) for row in rows))
            question = torch.zeros((len(rows), 1, width), dtype=torch.long)
            mask = torch.zeros_like(question, dtype=torch.bool)
            for ids, real, row in zip(question[:, 0], mask[:, 0], rows):
                ids[: len(row["question"])] = torch.tensor(row["question"], dtype=torch.long)
                real[: len(row["question"])] = True
            # The published code pads with 0 and takes every id 0 for padding.
            data["question_ids"] = question
            data["question_mask"] = mask & (question != 0) if self.hide_question_id_zero else mask
        if self.latent_count:
            rounds = max(len(row["start"]) for row in rows)
            data["latent_start"] = padded("start", -1, rounds, shift=True)
            data["round_end"] = padded("end", -1, rounds, shift=True)
            data["round_image"] = torch.where(data["latent_start"] >= 0, 0, -1)
        return BatchFeature(data)
