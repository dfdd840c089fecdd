"""Defines the configuration of an exported model, and constants that model and processor share."""

import math

from transformers import PretrainedConfig

# Values of image_kind. A zero image is 0.0 after normalisation: mid-grey, in place of a missing image.
NO_IMAGE, PIXELS, ZERO_IMAGE = 0, 1, 2
QUADRANTS = 4
IGNORE = -100  # in labels: not supervised

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
    "sliding_window": 0,  # 0: none, else how many positions a query attends to, itself included
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
    """The configuration of the whole model.

    `vision`, `llm` (with `rope`) and `exchange` are dicts; keys that are missing have the defaults above.

    Args:
      text_guided: whether the question's tokens enter the encoder.
      mapping_loss_weight: lambda of the dual-semantic mapping loss.
      semantic_exchange: whether the model has latents and exchange layers.
      latent_counts: the l^2 that training drew from. latent_count: the default one.
      image_tokens: tokens of an image, 0 for one per patch.
      tile_grids: (rows, columns) of tiles into which an image may be cut, empty for fixed resolution.
      tile_tokens: tokens of a tile, 0 for one per patch.
      mask, taps, context, latent_init, text_only: `paper` or `released` arithmetic, or others, see where they are used.
      template: the text around turns.
    """

    model_type = "fusion_jax"
    # Parts of a FusionOutput that are not predictions; the cache has two names, an older and a newer one.
    keys_to_ignore_at_inference = ["past_key_values", "cache", "hidden_states", "ce", "v2t", "t2v"]  # noqa: RUF012

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
        tile_grids=(),
        tile_tokens=0,
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
        kwargs.pop("vocab_size", None)  # it is in `llm`
        tied = kwargs.pop("tie_word_embeddings", None)
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
        self.tile_grids = [list(grid) for grid in tile_grids]
        self.tile_tokens = tile_tokens
        self.mask = mask
        self.taps = taps
        self.context = context
        self.latent_init = latent_init
        self.text_only = text_only
        self.hide_question_id_zero = hide_question_id_zero
        self.latent_count = latent_count
        self.template = template
        # Names that transformers' generation and cache code reads.
        self.hidden_size = self.llm["width"]
        self.num_hidden_layers = self.llm["layers"]
        self.num_attention_heads = self.llm["heads"]
        self.num_key_value_heads = self.llm["kv_heads"]
        self.head_dim = self.llm["head_dim"]
        self.max_position_embeddings = self.llm["rope"]["max_length"]
        self.tie_word_embeddings = self.llm["tied_head"] if tied is None else tied

    @property
    def vocab_size(self) -> int:
        return self.llm["vocab_size"]

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:  # by `resize_token_embeddings`
        self.llm["vocab_size"] = value

    @property
    def patches(self) -> int:
        # The patch convolution has no padding: 384 / 14 makes 27 patches a side.
        return (self.vision["image_size"] // self.vision["patch_size"]) ** 2

    @property
    def encoder_layers(self) -> int:
        """Layers of the tower that run: unless its last state is a tap, states after 2h - 1 are not needed."""
        layers = self.vision["layers"]
        return layers if self.taps == "released" else 2 * (layers // 2) - 1

    @property
    def tokens_per_image(self) -> int:
        return self.image_tokens or self.patches

    @property
    def table_tokens(self) -> int:
        """Positions of an image in the table into which `visual_index` points.

        With dynamic resolution they include the most that the tiles of any image need, with a row end after each row of
        tokens.
        """
        side = math.isqrt(self.tile_tokens or self.patches)
        grids = [(rows * side, columns * side) for rows, columns in self.tile_grids if rows * columns > 1]
        return self.tokens_per_image + max((rows * (columns + 1) for rows, columns in grids), default=0)

    @property
    def uses_quadrants(self) -> bool:
        return self.context == "quadrants" and self.semantic_exchange

    @property
    def exchange_after(self) -> list[int]:
        """Decoder layers that an exchange layer follows."""
        e = self.exchange
        return [e["start"] + i * e["stride"] for i in range(e["layers"])] if self.semantic_exchange else []
