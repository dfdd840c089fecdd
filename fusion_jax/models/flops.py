"""Counts the FLOPs of the model's matrix products for a batch of given sizes.

Convention: a multiply-add is 2 FLOPs; only matrix products count (no norms, activations, rotary); causal attention
counts half.
"""

from dataclasses import dataclass

from fusion_jax.models.config import FusionConfig


@dataclass(frozen=True)
class BatchShape:
    """The sizes of a batch that decide its FLOPs, without padding.

    Attributes:
      lengths: tokens of each example in the LLM. crops: for each guided crop, the question tokens that guide it.
      plain: number of plain crops. supervised: positions with a target. rounds: rounds with latents. latent_count:
      l^2. windows: tokens in the windows of all latents together.
    """

    lengths: tuple[int, ...]
    crops: tuple[int, ...]
    plain: int
    supervised: int
    rounds: int
    latent_count: int
    windows: int


def forward_flops(config: FusionConfig, shape: BatchShape) -> float:
    """Returns the FLOPs of one forward pass over a batch."""
    v, m = config.vision, config.llm
    p, d, dv = v.patches, m.width, v.width

    early = v.early_layers
    late = config.encoder_layers - early

    def encoder(question: int) -> int:
        """See `vision.py` for what image and text see of each other in the early layers."""
        length = p + question
        products = config.encoder_layers * length * (4 * dv * dv + 2 * dv * v.mlp_dim)
        if config.mask == "paper":
            pairs = early * (p * p + question * length) + late * length * length
        elif config.mask == "none":
            pairs = config.encoder_layers * length * length
        else:  # early text has no queries
            products -= early * question * dv * dv
            pairs = early * p * length + late * length * length
        return 2 * (products + 2 * pairs * dv)

    def projector(tokens: int) -> int:
        return 2 * tokens * (config.tap_count * dv * d + d * d)

    def back(tokens: int) -> int:
        return 2 * tokens * (d * dv + dv * dv)

    total = 0.0
    for question in shape.crops:
        question = question if config.text_guided else 0
        total += 2 * p * 3 * v.patch_size**2 * dv + encoder(question) + projector(p + question) + back(question)
        if config.mapping_loss_weight > 0:
            total += back(p)
    total += shape.plain * (2 * p * 3 * v.patch_size**2 * dv + encoder(0) + projector(p))

    heads, groups, size = m.heads, m.kv_heads, m.per_head
    per_token = d * size * (2 * heads + 2 * groups) + 3 * d * m.mlp_dim
    for length in shape.lengths:
        total += m.layers * 2 * (length * per_token + length * length * heads * size)  # causal: half of 2 L^2
    total += 2 * shape.supervised * d * m.vocab_size

    if config.exchange_layers:
        context = 9 * shape.latent_count if config.uses_quadrants else config.tokens_per_image + config.tokens_per_tile
        latents = shape.rounds * shape.latent_count
        per_latent = 5 * d * d  # in (latent half), query, out, two of the MLP
        per_layer = len(shape.crops) * context * 3 * d * d + latents * per_latent + shape.rounds * d * d
        total += config.exchange_layers * 2 * (per_layer + shape.windows * 2 * d)
    return total
