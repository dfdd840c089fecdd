"""Configurations of models: frozen dataclasses, the two presets, the published variants.

Every difference between the published weights' arithmetic (`released`) and the paper's text (`paper`) is one
named field of `FusionConfig`, so that an ablation is a line. The line under a field becomes its entry in
docs/config.md. Nothing here loads JAX.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from fusion_jax.errors import check, check_choice
from fusion_jax.models.limits import MOST_CHOICES, MOST_GRID, MOST_TILES, MOST_TOKENS, check_fields, within

# Grid of image crops per image: the whole image is guided by the question; `quadrants` adds four plain views.
QUADRANTS = 4
ROPE_KINDS = ("default", "llama3", "longrope")
CHOICES = {  # the values of fields of FusionConfig
    "mask": ("paper", "released", "none"),
    "taps": ("paper", "released"),
    "context": ("image", "quadrants"),
    "latent_init": ("learned", "pooled"),
    "text_only": ("none", "zero_image"),
    "image_place": ("turn", "first"),
    "guide": ("all_rounds", "first_round"),
}


@dataclass(frozen=True)
class VisionConfig:
    """A SigLIP or SigLIP 2 vision tower."""

    image_size: int = 384
    """Pixels of a crop's side."""
    patch_size: int = 16
    """Pixels of a patch's side; a rest of the crop that fills no patch is cut off."""
    width: int = 1536
    """Width of the residual stream."""
    mlp_dim: int = 6144
    """Hidden units of each MLP."""
    layers: int = 39
    """Layers that are kept, one less than published; `taps` decides how many of them run."""
    heads: int = 16
    """Attention heads; must divide `width`."""
    norm_eps: float = 1e-6
    """Epsilon of the layer norms."""

    def __post_init__(self):
        check_fields("vision", self, "image_size", "patch_size", "width", "mlp_dim", "heads", "norm_eps")
        check(self.width % self.heads == 0, f"vision.heads={self.heads} does not divide vision.width={self.width}.")
        check(
            self.layers >= 2,
            f"vision.layers={self.layers} must be at least 2: the taps need a shallow and a deep half.",
        )
        check_fields("vision", self, "layers")
        check(
            0 < self.patch_size <= self.image_size,
            f"vision.patch_size={self.patch_size} must be between 1 and vision.image_size={self.image_size}.",
        )
        within("vision.image_size / vision.patch_size", self.grid, 1, MOST_GRID)

    @property
    def grid(self) -> int:
        """Patches per side. The patch convolution has no padding, so 384/14 gives 27."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        return self.grid**2

    @property
    def early_layers(self) -> int:
        """Layers of the shallow half, in which attention between text and image is restricted."""
        return self.layers // 2


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding."""

    kind: str = "default"
    """How frequencies are scaled: not at all, as in Llama 3.1, or as in LongRoPE."""
    theta: float = 10000.0
    """Base of the frequencies."""
    factor: float = 8.0
    """llama3: divisor of the low frequencies."""
    low_freq_factor: float = 1.0
    """llama3: rotations over `original_length` below which a frequency counts as low."""
    high_freq_factor: float = 4.0
    """llama3: rotations over `original_length` above which a frequency stays as it is."""
    original_length: int = 8192
    """llama3 and longrope: positions that the language model was first trained with."""
    max_length: int = 131072
    """longrope: positions that it was extended to."""
    short_factors: tuple[float, ...] = ()
    """longrope: divisors of the frequencies up to `original_length` positions, half a head size of them."""
    long_factors: tuple[float, ...] = ()
    """longrope: the same beyond `original_length` positions."""

    def __post_init__(self):
        check_choice("llm.rope.kind=", self.kind, ROPE_KINDS)
        check_fields("llm.rope", self, "theta", "factor", "low_freq_factor", "high_freq_factor")
        check_fields("llm.rope", self, "original_length", "max_length", "short_factors", "long_factors")
        check(
            self.low_freq_factor < self.high_freq_factor,
            f"llm.rope.low_freq_factor={self.low_freq_factor} must be below "
            f"llm.rope.high_freq_factor={self.high_freq_factor}.",
        )


@dataclass(frozen=True)
class LLMConfig:
    """A decoder of the Llama family."""

    vocab_size: int = 32064
    """Tokens of the vocabulary, those of an extended tokenizer included."""
    width: int = 3072
    """Width of the residual stream."""
    mlp_dim: int = 8192
    """Hidden units of each gated MLP."""
    layers: int = 32
    """Decoder layers."""
    heads: int = 32
    """Query heads."""
    kv_heads: int = 32
    """Key and value heads; must divide `heads`."""
    head_dim: int = 0
    """Size of a head; 0: `width` / `heads`."""
    norm_eps: float = 1e-5
    """Epsilon of the RMS norms."""
    qkv_bias: bool = False
    """Whether the query, key and value projections have biases."""
    tied_head: bool = False
    """Whether the output head is the word embedding."""
    sliding_window: int = 0
    """Positions that a query attends to, its own included; 0: all before it."""
    rope: RopeConfig = RopeConfig()
    """Rotary position embedding, see below."""

    def __post_init__(self):
        check_fields("llm", self, "vocab_size", "width", "mlp_dim", "layers", "heads", "kv_heads")
        check_fields("llm", self, "head_dim", "norm_eps", "sliding_window")
        check(
            self.head_dim > 0 or self.width % self.heads == 0,
            f"llm.heads={self.heads} does not divide llm.width={self.width} (or set llm.head_dim).",
        )
        check(self.heads % self.kv_heads == 0, f"llm.kv_heads={self.kv_heads} does not divide llm.heads={self.heads}.")
        check(self.per_head % 2 == 0, f"llm head size {self.per_head} is odd; rotary embedding needs an even one.")
        for name in ("short_factors", "long_factors"):
            factors = getattr(self.rope, name)
            if self.rope.kind == "longrope":
                check(
                    len(factors) == self.per_head // 2,
                    f"llm.rope.{name} has {len(factors)} values; head size {self.per_head} needs {self.per_head // 2}.",
                )

    @property
    def per_head(self) -> int:
        return self.head_dim or self.width // self.heads

    @property
    def padded_vocab(self) -> int:
        """Rows of the model's embedding: a multiple of 128, so that it shards; padded logits are masked."""
        return -(-self.vocab_size // 128) * 128


@dataclass(frozen=True)
class ExchangeConfig:
    """Semantic exchange layers, after decoder layers `start`, `start + stride`, ..."""

    start: int = 0
    """Decoder layer, counted from 0, after which the first exchange layer stands."""
    stride: int = 3
    """Decoder layers from one exchange layer to the next."""
    layers: int = 10
    """Exchange layers; 0: none."""
    heads: int = 16
    """Attention heads; must divide `llm.width`."""


@dataclass(frozen=True)
class Stack:
    """A run of `blocks` equal superblocks of `layers` decoder layers, with or without an exchange after the first."""

    blocks: int
    layers: int
    exchange: bool


@dataclass(frozen=True)
class FusionConfig:
    """The whole model."""

    vision: VisionConfig = VisionConfig()
    """Vision tower, see below."""
    llm: LLMConfig = LLMConfig()
    """Language model, see below."""
    exchange: ExchangeConfig = ExchangeConfig()
    """Semantic exchange layers, see below."""
    text_guided: bool = True
    """Component A of the paper: whether the question's tokens enter the vision encoder."""
    mapping_loss_weight: float = 0.1
    """Component B: weight of the dual-semantic mapping loss; 0 also drops its projection."""
    semantic_exchange: bool = True
    """Component C: whether there are latent tokens and exchange layers."""
    latent_counts: tuple[int, ...] = (4, 16, 36, 64, 144)
    """Square numbers of latents per round, one of which is drawn for each training step."""
    image_tokens: int = 0
    """Tokens of an image in the LLM, a square number, resized after the projector; 0: one per patch."""
    tile_grids: tuple[tuple[int, int], ...] = ()
    """Grids of (rows, columns) that an image may be tiled by; (1, 1): no tiles; empty: fixed resolution."""
    tile_tokens: int = 0
    """Tokens of a tile in the LLM, a square number, resized after the projector; 0: one per patch."""
    mask: str = "paper"
    """Early encoder layers: `paper`: images do not see text; `released`: they do, text attends uniformly; `none`: no
    mask, as in the late layers."""
    taps: str = "paper"
    """`paper`: means of the shallow and the deep layers; `released`: the last state and both means."""
    context: str = "image"
    """Keys and values of the exchange: the image tokens, or four unguided `quadrants` of the image."""
    latent_init: str = "learned"
    """First values of latents: pooled image features, or a learned table for each number of latents."""
    text_only: str = "none"
    """Without an image: `none`: no visual tokens; `zero_image`: a zero image and zero latents."""
    hide_question_id_zero: bool = False
    """Whether question tokens with id 0 count as padding (published code; `!` in Llama 3)."""
    image_place: str = "turn"
    """A single image stands in the `turn` that names it, or in the `first` visual place (published code)."""
    guide: str = "all_rounds"
    """Whose questions the vision encoder reads: with `first_round`, later turns need no new encoding."""

    def __post_init__(self):
        for name, allowed in CHOICES.items():
            check_choice(f"model.{name}=", getattr(self, name), allowed)
        for count in (*self.latent_counts, *([self.image_tokens] if self.image_tokens else [])):
            check(count > 0 and math.isqrt(count) ** 2 == count, f"model: {count} tokens are not a square grid l x l.")
            check(count <= MOST_TOKENS, f"model: a grid of {count} tokens is too large; at most {MOST_TOKENS}.")
        for grid in self.tile_grids:
            check(
                len(grid) == 2 and min(grid) >= 1,
                f"model.tile_grids: {grid} must be two numbers of tiles, (rows, columns), each at least 1.",
            )
            check(math.prod(grid) <= MOST_TILES, f"model.tile_grids: {grid} has more than {MOST_TILES} tiles.")
        for name in ("latent_counts", "tile_grids"):
            values = getattr(self, name)
            within(f"len(model.{name})", len(values), 0, MOST_CHOICES)
            check(len(set(values)) == len(values), f"model.{name} has an entry twice: {', '.join(map(str, values))}.")
        check_fields("model", self, "tile_tokens", "mapping_loss_weight")
        check(
            math.isqrt(self.tile_tokens) ** 2 == self.tile_tokens,
            f"model.tile_tokens={self.tile_tokens} is not a square.",
        )
        check(
            not self.tile_grids or (self.context == "image" and self.text_only == "none"),
            "model.tile_grids (dynamic resolution) needs context='image' and text_only='none', as in the paper preset.",
        )
        check(
            not self.semantic_exchange or len(self.latent_counts) > 0,
            "model.latent_counts is empty; give at least one l^2, or set model.semantic_exchange=False.",
        )
        e, depth = self.exchange, self.llm.layers
        if e.layers and self.semantic_exchange:
            check(e.layers > 0, f"model.exchange: layers={e.layers} must not be negative.")
            last = e.start + (e.layers - 1) * e.stride
            check(
                e.stride >= 1 and e.start >= 0 and last < depth,
                f"model.exchange: layers={e.layers} from start={e.start} with stride={e.stride} ends after decoder "
                f"layer {last}, but llm.layers={depth} has layers 0 to {depth - 1}.",
            )
            check_fields("model.exchange", e, "heads")
            check(
                self.llm.width % e.heads == 0,
                f"model.exchange.heads={e.heads} does not divide llm.width={self.llm.width}.",
            )

    @property
    def encoder_layers(self) -> int:
        """The number of the tower's layers that run.

        `paper` reads no state after 2h - 1, with h early layers, so layer 2h - 1 and those after it are not in the
        program: the last two if there are 39 layers, the last one if their number is even.
        """
        return self.vision.layers if self.taps == "released" else 2 * self.vision.early_layers - 1

    @property
    def exchange_layers(self) -> int:
        """The number of exchange layers, 0 without semantic exchange."""
        return self.exchange.layers if self.semantic_exchange else 0

    @property
    def drawn_latent_counts(self) -> tuple[int, ...]:
        """The set from which training draws the l^2 of each step; empty without latents."""
        return self.latent_counts if self.semantic_exchange else ()

    @property
    def fixed_latent_count(self) -> int:
        """The l^2 of validation and inference: the middle of the set, 0 without latents."""
        return sorted(self.latent_counts)[len(self.latent_counts) // 2] if self.semantic_exchange else 0

    @property
    def uses_quadrants(self) -> bool:
        """Whether the exchange's context comes from four plain views of the image."""
        return self.context == "quadrants" and self.semantic_exchange

    @property
    def tokens_per_image(self) -> int:
        return self.image_tokens or self.vision.patches

    @property
    def tokens_per_tile(self) -> int:
        """0 at fixed resolution."""
        return (self.tile_tokens or self.vision.patches) if self.tile_grids else 0

    @property
    def most_tile_tokens(self) -> int:
        """Most positions that the tiles of one image take, row ends included, if no padding is cut away."""
        side = math.isqrt(self.tokens_per_tile)
        return max((r * side * (c * side + 1) for r, c in self.tile_grids if r * c > 1), default=0)

    @property
    def most_crops(self) -> int:
        """Guided passes of the encoder that one image may take."""
        return 1 + max((rows * columns for rows, columns in self.tile_grids if rows * columns > 1), default=0)

    @property
    def tap_count(self) -> int:
        """How many states of the tower the projector concatenates."""
        return 3 if self.taps == "released" else 2

    @property
    def needs_back_projection(self) -> bool:
        """Whether the text-to-vision MLP exists: it guides the encoder (A) and serves the mapping loss (B)."""
        return self.text_guided or self.mapping_loss_weight > 0

    def stacks(self) -> tuple[Stack, ...]:
        """Returns the scans of the decoder, in order.

        The published 32 layers with exchanges after 0, 3, ..., 27:

            10 x [layer exchange layer layer]   then   2 x [layer]

        A start above 0 adds plain layers before these; a shorter last group is a scan of one block.
        """
        e, depth, count = self.exchange, self.llm.layers, self.exchange_layers
        if count == 0:
            return (Stack(depth, 1, False),)
        whole = min(count, (depth - e.start) // e.stride)
        rest = depth - e.start - whole * e.stride
        plan = [Stack(e.start, 1, False), Stack(whole, e.stride, True)]
        plan.append(Stack(1, rest, True) if count > whole else Stack(rest, 1, False))
        return tuple(s for s in plan if s.blocks and s.layers)


RELEASED = {
    "mask": "released",
    "taps": "released",
    "context": "quadrants",
    "latent_init": "pooled",
    "text_only": "zero_image",
    "hide_question_id_zero": True,
    "image_place": "first",
}
PAPER = {
    "mask": "paper",
    "taps": "paper",
    "context": "image",
    "latent_init": "learned",
    "text_only": "none",
    "hide_question_id_zero": False,
    "image_place": "turn",
}
PRESETS = {"released": RELEASED, "paper": PAPER}

SO400M = VisionConfig(384, 14, 1152, 4304, 26, 16)
GIANT = VisionConfig(384, 16, 1536, 6144, 39, 16)

# LongRoPE factors are read from the LLM's own config.json; without weights these replace them, for shapes alone.
PHI35_MINI = LLMConfig(
    vocab_size=32013,
    width=3072,
    mlp_dim=8192,
    layers=32,
    heads=32,
    kv_heads=32,
    rope=RopeConfig("longrope", 10000.0, original_length=4096, short_factors=(1.0,) * 48, long_factors=(1.0,) * 48),
)
LLAMA31_8B = LLMConfig(
    vocab_size=128258,
    width=4096,
    mlp_dim=14336,
    layers=32,
    heads=32,
    kv_heads=8,
    rope=RopeConfig("llama3", 500000.0),
)
LLMS = {"3b": PHI35_MINI, "8b": LLAMA31_8B}


def _variant(vision: VisionConfig, preset: dict, **changes) -> dict[str, FusionConfig]:
    return {size: FusionConfig(vision=vision, llm=llm, **preset, **changes) for size, llm in LLMS.items()}


# name -> size -> config. FLARE follows the paper's text; the FUSION family reproduces the published weights.
VARIANTS: dict[str, dict[str, FusionConfig]] = {
    "flare_l": _variant(GIANT, PAPER),
    # The grids of LLaVA-NeXT; 16x16 tokens a tile bring an image of usual shape to about 1400 tokens (docs/data.md).
    "flare_x": _variant(GIANT, PAPER, tile_grids=((1, 2), (2, 1), (2, 2), (1, 3), (3, 1)), tile_tokens=256),
    "fusion": _variant(SO400M, RELEASED),
    "fusion_x": _variant(GIANT, RELEASED),
    # 16x16 tokens agree with the published count of ~308 visual tokens; a comment in the published code says 12x12.
    "fusion_l": _variant(GIANT, RELEASED, image_tokens=256),
}


def replace(config: Any, **changes) -> Any:
    """Does what `dataclasses.replace` does, in parts, too: `replace(c, **{"llm.layers": 4, "mask": "paper"})`."""
    nested: dict[str, dict] = {}
    flat = {}
    for key, value in changes.items():
        head, _, tail = key.partition(".")
        if tail:
            nested.setdefault(head, {})[tail] = value
        else:
            flat[head] = value
    for head, inner in nested.items():
        flat[head] = replace(flat.get(head, getattr(config, head)), **inner)
    return dataclasses.replace(config, **flat)
