"""Defines the decoder, a Llama with exchange layers between its own, and its key/value cache.

Families of LLMs differ in fields of `LLMConfig` (biases of q, k and v, a tied head, a sliding window, the kind of
rotary embedding), and `interop/families.py` has a row for each. One whose layer computes something else adds a class
beside `DecoderLayer` and a field that chooses it.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Num

from fusion_jax.models import attention, layers, partition, weights
from fusion_jax.models.config import FusionConfig, LLMConfig, Stack
from fusion_jax.models.exchange import ExchangePlan, SemanticExchange
from fusion_jax.models.remat import remat


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens seen so far, one buffer for all layers.

    Attributes:
      keys: (layers, B, K, d, C), K heads and C slots, rotary embedding applied. values: (layers, B, K, C, d). These are
        the orders in which the products of a new token read them, so that neither is copied first.
      segments: (B, C) int32, 1 where a slot holds a real token. positions: (B, C) int32, its position.
      reach: (B,) int32, how many positions of the row are read at most, those of the coming answer included. With
        LongRoPE it decides at the prefill which factors rotate the row's keys, so that all are rotated by the same.
      length: int32 scalar, the next slot to write. All rows write the same slot, each its own position.
    """

    keys: Float[Array, "layers B K d C"]
    values: Float[Array, "layers B K C d"]
    segments: Int[Array, "B C"]
    positions: Int[Array, "B C"]
    reach: Int[Array, " B"]
    length: Int[Array, ""]


def empty_cache(config: LLMConfig, reach: Int[Array, " B"], capacity: int, dtype: DTypeLike) -> Cache:
    """Returns an empty cache with `capacity` slots. reach: see `Cache`."""
    rows, slots = (config.layers, len(reach), config.kv_heads), jnp.zeros((len(reach), capacity), jnp.int32)
    keys = jnp.zeros((*rows, config.per_head, capacity), dtype)
    return Cache(keys, jnp.zeros((*rows, capacity, config.per_head), dtype), slots, slots, reach, jnp.int32(0))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Shared:
    """What every layer of one forward pass reads.

    With a cache, one new token sees the slots of `cached_segments`, several that extend it those of `seen`.
    """

    cos: Float[Array, "B S half"]
    sin: Float[Array, "B S half"]
    segments: Int[Array, "B S"]
    cached_segments: Int[Array, "B C"] | None
    slot: Int[Array, ""] | None
    plan: ExchangePlan | None
    seen: Bool[Array, "B S C"] | None = None


class DecoderLayer(nn.Module):
    """RMSNorm, grouped-query attention with rotary embedding, RMSNorm, SwiGLU."""

    config: LLMConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x, buffers, index, shared: _Shared):
        c = self.config
        batch, length, _ = x.shape

        def heads(name: str, count: int):
            y = layers.Dense(count * c.per_head, ("embed", "heads"), c.qkv_bias, self.dtype, name=name)(y_in)
            return y.reshape(batch, length, count, c.per_head)

        y_in = layers.RMSNorm(c.norm_eps, name="attention_norm")(x)
        q = layers.apply_rotary(heads("query", c.heads), shared.cos, shared.sin)
        k = layers.apply_rotary(heads("key", c.kv_heads), shared.cos, shared.sin)
        v = heads("value", c.kv_heads)
        if buffers is not None:
            keys, values = buffers
            buffers = (
                jax.lax.dynamic_update_slice(keys, k.transpose(0, 2, 3, 1)[None], (index, 0, 0, 0, shared.slot)),
                jax.lax.dynamic_update_slice(values, v.swapaxes(1, 2)[None], (index, 0, 0, shared.slot, 0)),
            )
        if buffers is not None and length == 1:
            y = attention.cached_attention(q, *buffers, index, shared.cached_segments)
        elif shared.seen is not None:
            y = attention.extending_attention(q, *buffers, index, shared.seen)
        else:
            y = attention.attention(q, k, v, shared.segments, shared.segments, True, c.sliding_window)
        # There are two residual branches per layer; this keeps the sum of all at the scale of the embedding.
        residual = {"dtype": self.dtype, "kernel_init": layers.fan_in(2 * c.layers)}
        x = x + layers.Dense(c.width, ("heads", "embed"), name="out", **residual)(y.reshape(batch, length, -1))
        x = partition.constrain(x, "batch", None, None)

        y = layers.RMSNorm(c.norm_eps, name="mlp_norm")(x)
        gate = layers.Dense(c.mlp_dim, ("embed", "mlp"), dtype=self.dtype, name="gate")(y)
        up = layers.Dense(c.mlp_dim, ("embed", "mlp"), dtype=self.dtype, name="up")(y)
        x = x + layers.Dense(c.width, ("mlp", "embed"), name="down", **residual)(jax.nn.silu(gate) * up)
        return partition.constrain(x, "batch", None, None), buffers


class Superblock(nn.Module):
    """[layer, exchange, layer, ...]: `layers` decoder layers with an exchange after the first, or none."""

    config: FusionConfig
    layers: int
    exchange: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, carry, shared: _Shared):
        x, buffers, index = carry
        for i in range(self.layers):
            x, buffers = DecoderLayer(self.config.llm, self.dtype, name=f"layer_{i}")(x, buffers, index + i, shared)
            if i == 0 and self.exchange and shared.plan is not None:
                x = SemanticExchange(self.config.exchange.heads, self.dtype, name="exchange")(x, shared.plan)
        return (x, buffers, index + self.layers), None


class _Blocks(nn.Module):
    """The superblocks of one stack one after the other, each with parameters of its own, `weights.unstack`'s."""

    config: FusionConfig
    stack: Stack
    dtype: DTypeLike

    @nn.compact
    def __call__(self, carry, shared: _Shared):
        for i in range(self.stack.blocks):
            block = Superblock(self.config, self.stack.layers, self.stack.exchange, self.dtype, name=str(i))
            carry, _ = block(carry, shared)
        return carry, None


class Decoder(nn.Module):
    """Embedding, superblocks, final norm, head."""

    config: FusionConfig
    dtype: DTypeLike = jnp.float32
    remat: str = "none"

    def setup(self):
        c = self.config.llm
        self.embedding = self.param(
            "embedding",
            # At the scale of image tokens and of what the layers add, so that the first layer does not drown a word.
            nn.with_logical_partitioning(layers.normal(0.5), ("vocab", "embed")),
            (c.padded_vocab, c.width),
            jnp.float32,
        )
        if not c.tied_head:
            self.head = self.param(
                "head",
                nn.with_logical_partitioning(layers.normal(), ("embed", "vocab")),
                (c.width, c.padded_vocab),
                jnp.float32,
            )
        block = remat(Superblock, self.remat)
        self.stacks = [
            _Blocks(self.config, stack, self.dtype, name=f"stack_{i}")
            if weights.is_unstacked(self.get_variable("params", f"stack_{i}", {}))
            else nn.scan(
                block,
                variable_axes={"params": 0, "intermediates": 0},  # the latter for attention maps alone
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=stack.blocks,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(self.config, stack.layers, stack.exchange, self.dtype, name=f"stack_{i}")
            for i, stack in enumerate(self.config.stacks())
        ]
        self.norm = layers.RMSNorm(c.norm_eps)

    def embed(self, tokens: Int[Array, "*batch"]) -> Float[Array, "*batch D"]:
        embedded = jnp.take(self.embedding, tokens, axis=0).astype(self.dtype)
        # Each device looks up its columns for the rows of its whole fsdp group, and the columns are then exchanged for
        # rows: the embeddings of a batch are sent, not the table.
        rest = (None,) * (tokens.ndim - 1)
        return partition.constrain(partition.constrain(embedded, "rows", *rest, "embed"), "batch", *rest, None)

    def head_kernel(self) -> Num[Array, "D V"]:
        """Returns the head's weights (D, padded vocabulary) as they are stored.

        Logits beyond `vocab_size` must be masked.
        """
        return self.embedding.T if self.config.llm.tied_head else self.head

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Computes float32 logits over the vocabulary without its padding."""
        kernel, hidden = self.head_kernel(), hidden.astype(self.dtype)
        scales = self.get_variable("params", weights.scale_name("head"))
        if scales is not None:
            logits = weights.scaled_product(hidden, kernel, scales)
        else:
            logits = jnp.dot(hidden, kernel.astype(self.dtype), preferred_element_type=jnp.float32)
        # The padding is cut off the logits: cutting it off the weights would copy all others.
        return logits[..., : self.config.llm.vocab_size]

    def __call__(
        self,
        x: Float[Array, "B S D"],
        segments: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        plan: ExchangePlan | None = None,
        cache: Cache | None = None,
        extends: bool = False,
    ) -> tuple[Float[Array, "B S D"], Cache | None]:
        """Returns the hidden states after the final norm, and the cache if there is one.

        With a cache, several tokens are a prefill, which needs an empty cache, or, if it `extends` the cache, see what
        that holds; they need a free slot each. One token is a decode step.
        """
        c = self.config.llm
        lengths = layers.example_lengths(segments, positions) if cache is None else cache.reach[:, None]
        cos, sin = layers.rotary(c.rope, c.per_head, positions, lengths)
        buffers = cached = cached_segments = seen = slot = None
        if cache is not None:
            slot = cache.length
            cached, cached_positions = (
                jax.lax.dynamic_update_slice(old, new, (0, slot))
                for old, new in ((cache.segments, segments), (cache.positions, positions))
            )
            buffers = (cache.keys, cache.values)
            # The window counts positions, not slots: there is padding between a prompt and its answer.
            cached_segments = cached
            if c.sliding_window:
                cached_segments = jnp.where(positions[:, -1:] - cached_positions < c.sliding_window, cached, 0)
            if extends:
                distance = positions[:, :, None] - cached_positions[:, None]
                seen = (cached[:, None] > 0) & (distance >= 0)
                if c.sliding_window:
                    seen &= distance < c.sliding_window
        shared = _Shared(cos, sin, segments, cached_segments, slot, plan, seen)
        carry = (partition.constrain(x.astype(self.dtype), "batch", None, None), buffers, jnp.int32(0))
        for stack in self.stacks:
            carry, _ = stack(carry, shared)
        x, buffers, _ = carry
        if cache is not None:
            cache = Cache(*buffers, cached, cached_positions, cache.reach, slot + segments.shape[1])
        return self.norm(x), cache
