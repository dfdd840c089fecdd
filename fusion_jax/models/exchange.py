"""Semantic exchange: each latent token queries its own window of the image, led by the question.

    p = W_in [H_P ; T_L]                 query: the question's last hidden state and the latent
    c = W_context(window)                keys and values
    y = LN(W_o attention(W_q LN p, W_k LN c, W_v LN c) + p)
    T_L <- T_L + W_2 gelu(W_1 y)

Latents of all rounds read the state before the layer; none sees another's update within it.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from fusion_jax.models import attention, layers, partition


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExchangePlan:
    """What every exchange layer of one forward pass needs besides the hidden states; see `data.layout.Batch`.

    Attributes:
      context: (G, C, D) tokens of each group's images that serve as keys and values.
      windows: (B, R, L, M) which of the group's C tokens each latent's window holds, -1 none.
      round_end: (B, R) position of H_P. latent_start: (B, R) position of the round's first latent. Each is -1 where
        there is no such round.
    """

    context: Float[Array, "G C D"]
    windows: Int[Array, "B R L M"]
    round_end: Int[Array, "B R"]
    latent_start: Int[Array, "B R"]


class SemanticExchange(nn.Module):
    """One exchange layer. LayerNorm eps 1e-5, Linears without bias, width that of the LLM."""

    heads: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"], plan: ExchangePlan) -> Float[Array, "B S D"]:
        batch, length, width = x.shape
        rounds, count, window = plan.windows.shape[1:]
        groups = plan.context.shape[0]
        square = {"axes": ("embed", "heads"), "dtype": self.dtype}

        # Gather: the row index of every latent, (B, R, L); absent rounds read position 0 and are not written back.
        position = plan.latent_start[..., None] + jnp.arange(count)
        present = plan.latent_start >= 0
        latents = partition.take(x, jnp.maximum(position, 0))
        question = partition.take(x, jnp.maximum(plan.round_end, 0))

        # W_in on the concatenation, its halves applied apart: the question's half once per round, not per latent.
        w_in = self.param(
            "in", nn.with_logical_partitioning(layers.fan_in(), ("embed", "heads")), (2 * width, width), jnp.float32
        )
        w_in = partition.constrain(w_in.astype(self.dtype), None, "heads")
        p = jnp.dot(question, w_in[:width])[:, :, None] + jnp.dot(latents, w_in[width:])

        # Keys and values once per image, then each latent takes its window's.
        c = layers.Dense(width, name="context", **square)(plan.context)
        k = layers.Dense(width, name="key", **square)(layers.LayerNorm(1e-5, name="key_norm")(c))
        v = layers.Dense(width, name="value", **square)(layers.LayerNorm(1e-5, name="value_norm")(c))
        q = layers.Dense(width, name="query", **square)(layers.LayerNorm(1e-5, name="query_norm")(p))

        per_head = width // self.heads
        flat = jnp.maximum(plan.windows, 0).reshape(groups, -1)  # a group's rows read the group's tokens
        k, v = (
            partition.take(a, flat, "heads").reshape(batch, rounds, count, window, self.heads, per_head) for a in (k, v)
        )
        q = q.reshape(batch, rounds, count, self.heads, per_head)
        scores = attention.score_product("brlhd,brlmhd->brlhm", q, k) * per_head**-0.5
        scores = jnp.where((plan.windows >= 0)[:, :, :, None], scores, -1e30)
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        y = jnp.einsum("brlhm,brlmhd->brlhd", weights, v).reshape(batch, rounds, count, width)

        y = layers.Dense(width, ("heads", "embed"), dtype=self.dtype, name="out")(y)
        y = layers.LayerNorm(1e-5, name="norm")(y + p)
        update = layers.MLP(width, width, layers.gelu_erf, False, self.dtype, layers.fan_in(8), name="mlp")(y)

        # Scatter back; out-of-range rows are dropped, which is how absent rounds are left out.
        target = jnp.where(present[..., None], position, length)
        return partition.add(x, target, update.astype(x.dtype))
