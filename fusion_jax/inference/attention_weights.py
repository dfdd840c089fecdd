"""Recomputes the attention weights of one word from the queries and keys of an ordinary forward pass.

The forward pass is the model's own; queries and keys of its layers are captured, and the attention weights are computed
from them again (`models.attention.reference_weights`).
"""

import functools

import jax
import jax.numpy as jnp

from fusion_jax.batch import Batch
from fusion_jax.models import attention, layers
from fusion_jax.models.config import FusionConfig
from fusion_jax.models.fusion import Fusion
from fusion_jax.models.weights import is_unstacked


def _queries_and_keys(module, method: str) -> bool:
    return method == "__call__" and module.name in ("query", "key")


def captured(model: Fusion, params, batch: Batch, wanted=_queries_and_keys):
    """Runs the forward pass; returns its result and, in every layer, the outputs of the submodules `wanted` selects."""
    return model.apply({"params": params}, batch, capture_intermediates=wanted, mutable=["intermediates"])


def of_layers(c: FusionConfig, decoder: dict, name: str):
    """The outputs of a submodule of the LLM's layers, (layers, ...), from the stacks that hold them."""
    parts = []
    for i, stack in enumerate(c.stacks()):
        blocks = _stacked(decoder[f"stack_{i}"])
        each = [blocks[f"layer_{j}"][name]["__call__"][0] for j in range(stack.layers)]
        parts.append(jnp.stack(each, 1).reshape(-1, *each[0].shape[1:]))
    return jnp.concatenate(parts)


def _stacked(blocks: dict):
    """Returns what was captured in the blocks of a stack, along the first axis, however their weights are stored."""
    if not is_unstacked(blocks):
        return blocks
    return jax.tree.map(lambda *x: jnp.stack(x), *(blocks[str(i)] for i in range(len(blocks))))


def of_exchanges(c: FusionConfig, decoder: dict, name: str):
    """The outputs of a submodule of the exchange layers, (layers, ...)."""
    stacks = [f"stack_{i}" for i, stack in enumerate(c.stacks()) if stack.exchange]
    return jnp.concatenate([_stacked(decoder[stack])["exchange"][name]["__call__"][0] for stack in stacks])


def encoder_weights(c: FusionConfig, q, k, text, early):
    """Attention weights of one layer of `vision.EncoderLayer` over [image | text]: (N, H, P + T, P + T).

    Args:
      q, k: (N, P + T, D) of the layer; an early one of `released` has queries of the image alone, (N, P, D).
      text: (N, T) int, 1 real and 0 padding. early: whether the layer belongs to the early half.
    """
    patches = c.vision.patches
    q, k = (x.reshape(*x.shape[:2], c.vision.heads, -1) for x in (q, k))
    image = jnp.ones((len(q), patches), jnp.int32)
    everything = jnp.concatenate([image, text], 1)
    q_text, seen = q[:, patches:], everything
    if early and c.mask == "paper":
        seen = jnp.concatenate([image, jnp.zeros_like(text)], 1)
    elif early and c.mask == "released":
        q_text = jnp.zeros_like(k[:, patches:])  # the text attends uniformly, as a query of zeros does
    rows = (
        attention.reference_weights(q[:, :patches], k, image, seen),
        attention.reference_weights(q_text, k, text, everything),
    )
    weights = jnp.concatenate(rows, 3)
    return weights.reshape(len(q), c.vision.heads, *weights.shape[3:])


def llm_weights(c: FusionConfig, q, k, segments, positions):
    """Attention weights of one layer of `llm.DecoderLayer`: (B, H, S, S). q, k: (B, S, ...) before the rotation."""
    m = c.llm
    cos, sin = layers.rotary(m.rope, m.per_head, positions, layers.example_lengths(segments, positions))
    q, k = (layers.apply_rotary(x.reshape(*x.shape[:2], -1, m.per_head), cos, sin) for x in (q, k))
    weights = attention.reference_weights(q, k, segments, segments, True, m.sliding_window)
    return weights.reshape(len(q), m.heads, *weights.shape[3:])


def exchange_weights(c: FusionConfig, q, k, windows):
    """Attention weights of one layer of `exchange.SemanticExchange` for one row with one round: (H, L, M).

    Args:
      q: (L, D) of the latents. k: (C, D) of the context. windows: (L, M) indices into the context, -1 for none.
    """
    heads = c.exchange.heads
    q, k = (x.reshape(len(x), heads, -1) for x in (q, k))
    scores = jnp.einsum("lhd,lmhd->hlm", q, k[jnp.maximum(windows, 0)], preferred_element_type=jnp.float32)
    scores = jnp.where(windows >= 0, scores * q.shape[-1] ** -0.5, attention.MASKED)
    return jnp.where(windows >= 0, jax.nn.softmax(scores, -1), 0.0)


@functools.partial(jax.jit, static_argnames=("model",))
def measure_word(model: Fusion, params, batch: Batch, in_row, in_question) -> dict:
    """Measures the attention of one word, one layer at a time, so that only one layer's weights are in memory.

    Args:
      batch: one row with one round. in_row: (S,) float32, 1 at the word's tokens in the row, else 0.
      in_question: (T,) float32, the same in the encoder's question.

    Returns:
      pixel, pixel_back: (layers, H, K, P) or None; question: (layers, H, S); space: (V,) cosines with the visual table;
      exchange: (exchange layers, H, L, M) or None.
    """
    c = model.config
    (_, encoded, _), kept = captured(model, params, batch)
    kept = kept["intermediates"]
    out = {"pixel": None, "pixel_back": None, "exchange": None}
    if c.text_guided:
        text = batch.crop_text_mask[0].astype(jnp.int32)

        def of_encoder(early, inputs):
            weights = encoder_weights(c, *inputs, text, early)
            p = c.vision.patches
            from_word = jnp.einsum("khtp,t->hkp", weights[:, :, p:, :p], in_question) / in_question.sum()
            return from_word, jnp.einsum("khpt,t->hkp", weights[:, :, :p, p:], in_question)

        halves = []
        for half in ("early", "late"):
            layer = kept["vision"]["layers"][half]
            # Guided crops come before plain ones.
            q, k = (layer[name]["__call__"][0] for name in ("query", "key"))
            halves.append(jax.lax.map(functools.partial(of_encoder, half == "early"), (q, k)))
        out["pixel"], out["pixel_back"] = (jnp.concatenate(parts) for parts in zip(*halves))

    decoder = kept["llm"]

    def of_llm(inputs):
        weights = llm_weights(c, *inputs, batch.segment_ids, batch.positions)
        return jnp.einsum("hqk,q->hk", weights[0], in_row) / in_row.sum()

    out["question"] = jax.lax.map(of_llm, tuple(of_layers(c, decoder, name) for name in ("query", "key")))
    if c.exchange_layers:
        q, k = (of_exchanges(c, decoder, name) for name in ("query", "key"))
        exchange = jax.vmap(lambda q, k: exchange_weights(c, q, k, batch.windows[0, 0]))
        out["exchange"] = exchange(q[:, 0, 0], k[:, 0])
    embedding = params["llm"]["embedding"][batch.tokens[0]].astype(jnp.float32)
    mean = jnp.einsum("sd,s->d", embedding, in_row) / in_row.sum()
    tokens = encoded.image_tokens[0].astype(jnp.float32)
    norms = jnp.linalg.norm(tokens, axis=-1) * jnp.linalg.norm(mean)
    out["space"] = tokens @ mean / jnp.maximum(norms, 1e-12)
    return out
