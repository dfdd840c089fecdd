"""Defines the semantic exchange: each latent, guided by the question, queries its window of the image.

    p = W_in [H_P ; T_L]                 query: the question's last hidden state and the latent
    c = W_context(window)                keys and values
    y = LN(W_o attention(W_q LN p, W_k LN c, W_v LN c) + p)
    T_L <- T_L + W_2 gelu(W_1 y)

Latents of all rounds read the state before the layer, so none sees the update of another.
"""

import dataclasses
import math
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
    """What every exchange layer of one forward pass needs besides the hidden states; see `batch.Batch`.

    Attributes:
      context: (G, C, D) tokens of each group's images that serve as keys and values.
      windows: (B, R, L, M) which of the group's C tokens each latent's window holds, -1 for none.
      round_crop: (B, R) which of the group's crops the round's latents query.
      round_end: (B, R) position of H_P. latent_start: (B, R) position of the round's first latent. Each is -1 where
        there is no such round.
      side: side of each crop's square grid of context tokens, if these are all of the context; else None.
    """

    context: Float[Array, "G C D"]
    windows: Int[Array, "B R L M"]
    round_crop: Int[Array, "B R"]
    round_end: Int[Array, "B R"]
    latent_start: Int[Array, "B R"]
    side: int | None = dataclasses.field(default=None, metadata={"static": True})


class SemanticExchange(nn.Module):
    """One exchange layer. LayerNorms have eps 1e-5, Linears have no bias, the width is the LLM's."""

    heads: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"], plan: ExchangePlan) -> Float[Array, "B S D"]:
        _, length, width = x.shape
        rounds, count = plan.windows.shape[1:3]
        square = {"axes": ("embed", "heads"), "dtype": self.dtype}

        # Gather: the position of every latent in its row, (B, R, L). Those of absent rounds are beyond the row, all of
        # them different: they read zeros and are not written back, and no two writes collide.
        position = plan.latent_start[..., None] + jnp.arange(count)
        beyond = length + jnp.arange(rounds * count).reshape(rounds, count)
        position = jnp.where(plan.latent_start[..., None] >= 0, position, beyond)
        latents = partition.take_once(x, position)
        question = partition.take_once(x, jnp.where(plan.round_end >= 0, plan.round_end, beyond[:, 0]))

        # W_in of the concatenation, half by half: the question's half is applied once per round, not per latent.
        w_in = self.param(
            "in", nn.with_logical_partitioning(layers.fan_in(), ("embed", "heads")), (2 * width, width), jnp.float32
        )
        w_in = partition.constrain(w_in.astype(self.dtype), None, "heads")
        p = jnp.dot(question, w_in[:width])[:, :, None] + jnp.dot(latents, w_in[width:])

        # Keys and values are computed once per image; each latent then reads those of its window.
        c = layers.Dense(width, name="context", **square)(plan.context)
        k = layers.Dense(width, name="key", **square)(layers.LayerNorm(1e-5, name="key_norm")(c))
        v = layers.Dense(width, name="value", **square)(layers.LayerNorm(1e-5, name="value_norm")(c))
        q = layers.Dense(width, name="query", **square)(layers.LayerNorm(1e-5, name="query_norm")(p))

        attend = _attend_cells if plan.side and plan.side % math.isqrt(count) == 0 else _attend_windows
        y = attend(q, k, v, plan, self.heads)

        y = layers.Dense(width, ("heads", "embed"), dtype=self.dtype, name="out")(y)
        y = layers.LayerNorm(1e-5, name="norm")(y + p)
        update = layers.MLP(width, width, layers.gelu_erf, False, self.dtype, layers.fan_in(8), name="mlp")(y)

        return partition.add_once(x, position, update.astype(x.dtype))


def _attend_windows(q, k, v, plan: ExchangePlan, heads: int):
    """Computes attention of each latent to its window of M gathered tokens: q (B, R, L, D); k, v (G, C, D)."""
    batch, rounds, count, window = plan.windows.shape
    groups, _, width = k.shape
    per_head = width // heads
    flat = jnp.maximum(plan.windows, 0).reshape(groups, -1)  # a group's rows read the group's tokens
    k, v = (partition.take(a, flat, "heads").reshape(batch, rounds, count, window, heads, per_head) for a in (k, v))
    q = q.reshape(batch, rounds, count, heads, per_head)
    scores = attention.score_product("BRLHd,BRLMHd->BRLHM", q, k) * per_head**-0.5
    scores = jnp.where((plan.windows >= 0)[:, :, :, None], scores, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("BRLHM,BRLMHd->BRLHd", weights, v).reshape(batch, rounds, count, width)


def _attend_cells(q, k, v, plan: ExchangePlan, heads: int):
    """Does what `_attend_windows` does if l divides the grid's side, so that the windows are the cells of the grid.

    Each crop is cut into cells once. The latents of a cell, of all rounds, attend to that cell of all crops of their
    group, of which each round sees its own crop alone: a few products more, but no tokens are fetched for every round,
    which moved two to three times the bytes, and no gradient is a scatter.

        i, j: cell of the l x l grid; u, w: token within the cell; N: crops of a group; R: rounds of a group
    """
    batch, rounds, count = q.shape[:3]
    groups, _, width = k.shape
    cells, per_head = math.isqrt(count), width // heads
    cell = plan.side // cells
    q = q.reshape(groups, -1, cells, cells, heads, per_head)
    k, v = (a.reshape(groups, -1, cells, cell, cells, cell, heads, per_head) for a in (k, v))
    scores = attention.score_product("GRijHd,GNiujwHd->GijHRNuw", q, k) * per_head**-0.5
    own = plan.round_crop.reshape(groups, -1, 1) == jnp.arange(k.shape[1])  # (G, R, N), nowhere for absent rounds
    own = own[:, None, None, None, :, :, None, None]
    weights = jax.nn.softmax(jnp.where(own, scores, attention.MASKED), axis=(-3, -2, -1))
    weights = jnp.where(own, weights, 0).astype(v.dtype)
    return jnp.einsum("GijHRNuw,GNiujwHd->GRijHd", weights, v).reshape(batch, rounds, count, width)
