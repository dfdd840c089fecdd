"""Defines the whole model: question-guided encoder, projectors, latents, decoder with exchange layers.

`init(config, key)` gives the parameters, `Fusion(config).apply(...)` runs one of the methods; nothing else of Flax is
needed outside this folder.
"""

import math
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from fusion_jax.batch import NO_CROP, PIXELS, ZERO_IMAGE, Batch
from fusion_jax.models import connector, layers, llm, partition
from fusion_jax.models.config import QUADRANTS, FusionConfig
from fusion_jax.models.exchange import ExchangePlan
from fusion_jax.models.vision import VisionEncoder


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Visual:
    """What the decoder and the mapping loss get from the encoder. G groups of rows with K crops each, P patches, T
    question tokens, D the width of the LLM and Dv that of the encoder.

    Attributes:
      image_tokens: (G, V, D) the part of the visual table that comes from images (see `data.layout`): K I tokens of
        whole views and, with dynamic resolution, K J of tiles and the row end.
      context: (G, C, D) keys/values of the exchange, None without exchange.
      latents: (B, R, L, D) initial latents, None without latents.
      question: (G, K, T, D) LLM embeddings of the question; question_features: (G, K, T, D) the same tokens out of
        the encoder, projected to text. None without text guidance.
      patches: (G, K, P, Dv) state 0 of the crop; patch_features: (G, K, P, Dv) the crop out of the encoder,
        projected to text and back. None without mapping loss.
    """

    image_tokens: Float[Array, "G V D"]
    context: Float[Array, "G C D"] | None
    latents: Float[Array, "B R L D"] | None
    question: Float[Array, "G K T D"] | None
    question_features: Float[Array, "G K T D"] | None
    patches: Float[Array, "G K P Dv"] | None
    patch_features: Float[Array, "G K P Dv"] | None


class Fusion(nn.Module):
    """See the module docstring. Methods take a `Batch`; all are pure functions of (parameters, batch)."""

    config: FusionConfig
    dtype: DTypeLike = jnp.float32
    remat: str = "none"

    def setup(self):
        c = self.config
        d, dv = c.llm.width, c.vision.width
        self.vision = VisionEncoder(c, self.dtype, self.remat)
        self.vision_to_text = layers.MLP(d, d, layers.gelu_erf, True, self.dtype)
        if c.needs_back_projection:
            self.text_to_vision = layers.MLP(dv, dv, layers.gelu_erf, True, self.dtype)
        if c.semantic_exchange and c.latent_init == "learned":
            self.latent_tables = {
                str(count): self.param(
                    f"latents_{count}",
                    nn.with_logical_partitioning(layers.normal(0.5), ("patches", "embed")),
                    (count, d),
                    jnp.float32,
                )
                for count in c.latent_counts
            }
        if c.tile_grids:
            self.row_end = self.param(
                "row_end", nn.with_logical_partitioning(layers.normal(0.5), ("embed",)), (d,), jnp.float32
            )
        self.llm = llm.Decoder(c, self.dtype, self.remat)

    def encode(self, batch: Batch) -> Visual:
        """Runs everything before the decoder. The batch must have at least one crop (K >= 1)."""
        c = self.config
        g, k = batch.crop_kind.shape
        blank = batch.crop_kind == ZERO_IMAGE
        views = {"guided": self.vision.embed(_merge(batch.crops), _merge(blank))}
        if c.uses_quadrants:
            views["plain"] = self.vision.embed(
                _merge(_merge(batch.quadrants)), jnp.repeat(blank.reshape(-1), QUADRANTS)
            )
        patches = views["guided"]
        question = text = mask = None
        if c.text_guided:
            question = self.llm.embed(batch.crop_text)
            text, mask = _merge(self.text_to_vision(question)), _merge(batch.crop_text_mask)
        taps = self.vision(views, text, mask)

        features = self.vision_to_text(taps["guided"])
        whole, question_features = features[:, : c.vision.patches], features[:, c.vision.patches :]
        resized = [connector.resize_tokens(whole, c.image_tokens) if c.image_tokens else whole]
        if c.tile_grids:
            resized.append(connector.resize_tokens(whole, c.tokens_per_tile))
        # (G K, I, D) to (G, K I, D): the crops of a group one after the other, first as whole views, then as tiles.
        tokens = [part.reshape(g, -1, part.shape[-1]) for part in resized]
        context = latents = None
        if c.semantic_exchange:
            if c.uses_quadrants:
                plain = self.vision_to_text(taps["plain"])
                grid = connector.stitch_quadrants(plain.reshape(g * k, QUADRANTS, *plain.shape[1:]))
                grid = connector.adaptive_max_pool(grid, 3 * math.isqrt(batch.latent_count))
                context = grid.reshape(g, -1, grid.shape[-1])
            else:
                side = math.isqrt(c.tokens_per_image)
                grid = resized[0].reshape(g * k, side, side, -1)
                context = jnp.concatenate(tokens, axis=1)
            latents = self._initial_latents(batch, grid)
        if c.tile_grids:
            row_end = jnp.broadcast_to(self.row_end.astype(tokens[0].dtype), (g, 1, tokens[0].shape[-1]))
            tokens.append(row_end)
        back = self.text_to_vision(whole) if c.mapping_loss_weight > 0 else None
        return Visual(
            image_tokens=jnp.concatenate(tokens, axis=1),
            context=context,
            latents=latents,
            question=question,
            question_features=None if question is None else question_features.reshape(question.shape),
            patches=None if back is None else patches.reshape(g, k, *patches.shape[1:]),
            patch_features=None if back is None else back.reshape(g, k, *back.shape[1:]),
        )

    def _initial_latents(self, batch: Batch, grid: Float[Array, "GK h w D"]) -> Float[Array, "B R L D"]:
        """Returns the learned latents, or the pooled grid of each round's whole view."""
        c = self.config
        b, rounds = batch.round_end.shape
        count = batch.latent_count
        if c.latent_init == "learned":
            table = self.latent_tables[str(count)].astype(self.dtype)
            return jnp.broadcast_to(table, (b, rounds, *table.shape))
        # Cells of the l x l grid are unions of those of the context's grid, so pooling it again is exact.
        g, k = batch.crop_kind.shape
        pooled = connector.adaptive_max_pool(grid, math.isqrt(count)).reshape(g, k, count, -1)
        pooled = jnp.where((batch.crop_kind == PIXELS)[..., None, None], pooled, 0)
        crop = jnp.maximum(batch.round_crop, 0).reshape(g, -1)
        return partition.take(pooled, crop).reshape(b, rounds, count, -1)

    def exchange_plan(self, batch: Batch, encoded: Visual) -> ExchangePlan | None:
        if self.config.exchange_layers == 0 or batch.round_end.shape[1] == 0:
            return None
        side = None
        if not self.config.tile_grids:
            side = math.isqrt(encoded.context.shape[1] // batch.crop_kind.shape[1])
        rounds = batch.round_crop, batch.round_end, batch.latent_start
        return ExchangePlan(encoded.context, batch.windows, *rounds, side)

    def assemble(self, batch: Batch, encoded: Visual) -> Float[Array, "B S D"]:
        """Returns the decoder's input: text embeddings, and entries of the visual table at visual positions."""
        text = self.llm.embed(batch.tokens)
        table, g = encoded.image_tokens, batch.crop_kind.shape[0]
        if encoded.latents is not None:
            table = jnp.concatenate([table, encoded.latents.reshape(g, -1, table.shape[-1])], axis=1)
        index, visual_index = batch.visual_index.reshape(g, -1), batch.visual_index[..., None]
        once = index >= 0  # every entry of the table stands in one place of the rows, but for the row end
        if self.config.tile_grids:
            last = encoded.image_tokens.shape[1] - 1
            text = jnp.where(visual_index == last, self.row_end.astype(text.dtype), text)
            once &= index != last
        # Other places read beyond the table, each its own place of it, so that the gradient adds nothing up.
        index = jnp.where(once, index, table.shape[1] + jnp.arange(index.shape[1]))
        visual = partition.take_once(table, index).reshape(text.shape)
        return jnp.where(once.reshape(visual_index.shape), visual, text)

    def __call__(self, batch: Batch, cache: llm.Cache | None = None):
        """Runs one forward pass, which is the prefill if there is a cache.

        Returns:
          hidden: (B, S, D) after the final norm; encoded: Visual or None; cache: filled, or None.
        """
        encoded = plan = None
        if batch.crop_kind.shape[1]:
            encoded = self.encode(batch)
            plan = self.exchange_plan(batch, encoded)
            x = self.assemble(batch, encoded)
        else:
            x = self.llm.embed(batch.tokens)
        hidden, cache = self.llm(x, batch.segment_ids, batch.positions, plan, cache)
        return hidden, encoded, cache

    def extend(self, batch: Batch, encoded: Visual | None, cache: llm.Cache):
        """Runs the rest of rows that begin in the cache, without encoding anything.

        Args:
          batch: the rest; only what the decoder reads of it. Positions go on where the cache ends, places in the row
            (`round_end`, `latent_start`) begin at 0, and `visual_index` points into the table of `encoded`.
          encoded: what the rest reads of the images, None without latents.

        Returns:
          hidden: (B, S, D) after the final norm, and the cache.
        """
        if encoded is None:
            x, plan = self.llm.embed(batch.tokens), None
        else:
            x, plan = self.assemble(batch, encoded), self.exchange_plan(batch, encoded)
        return self.llm(x, batch.segment_ids, batch.positions, plan, cache, extends=True)

    def decode(self, tokens: Int[Array, "B"], positions: Int[Array, "B"], cache: llm.Cache):
        """Decodes one more token per row. Returns float32 logits (B, V) and the cache."""
        x = self.llm.embed(tokens[:, None])
        hidden, cache = self.llm(x, jnp.ones_like(tokens)[:, None], positions[:, None], None, cache)
        return self.llm.logits(hidden[:, 0]), cache

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        return self.llm.logits(hidden)


def _merge(x):
    """Reshapes (A, B, ...) to (A B, ...)."""
    return x.reshape(-1, *x.shape[2:])


def head_kernel(config: FusionConfig, params) -> Float[Array, "D V"]:
    """Takes the output head (D, padded vocabulary) from the parameters."""
    decoder = params["llm"]
    return decoder["embedding"].T if config.llm.tied_head else decoder["head"]


def example_batch(config: FusionConfig, rows: int = 1) -> Batch:
    """Returns a batch of the smallest legal shape, all zeros, for initialisation and shape inference."""
    latents = config.latent_counts[0] if config.semantic_exchange else 0
    length = config.tokens_per_image + latents + 2
    size, rounds = config.vision.image_size, int(config.semantic_exchange)
    quadrants = QUADRANTS if config.uses_quadrants else 0
    integers = {name: np.zeros((rows, length), np.int32) for name in ("tokens", "targets", "segment_ids", "positions")}
    return Batch(
        **integers,
        loss_weights=np.zeros((rows, length), np.float32),
        visual_index=np.full((rows, length), -1, np.int32),
        crops=np.zeros((rows, 1, size, size, 3), np.uint8),
        crop_kind=np.full((rows, 1), NO_CROP, np.int32),
        quadrants=np.zeros((rows, 1, quadrants, size, size, 3), np.uint8),
        crop_text=np.zeros((rows, 1, int(config.text_guided)), np.int32),
        crop_text_mask=np.zeros((rows, 1, int(config.text_guided)), bool),
        round_crop=np.zeros((rows, rounds), np.int32),
        round_end=np.zeros((rows, rounds), np.int32),
        latent_start=np.zeros((rows, rounds), np.int32),
        windows=np.zeros((rows, rounds, latents, 1), np.int32),
        latent_count=latents,
    )


def init(config: FusionConfig, key: jax.Array, shardings=None):
    """Draws float32 parameters as a nested dict of arrays; block parameters are stacked along their first axis.

    With `shardings` (a tree like the result) each device computes its own shard of each.
    """

    def make(key, batch):
        return nn.unbox(Fusion(config).init(key, batch)["params"])

    return jax.jit(make, out_shardings=shardings)(key, example_batch(config))
