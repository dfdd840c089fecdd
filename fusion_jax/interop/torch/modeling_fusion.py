"""FUSION/FLARE vision-language models for PyTorch and transformers.

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
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_fusion import NO_IMAGE, PIXELS, QUADRANTS, FusionConfig


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
