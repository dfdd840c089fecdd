"""Continues a prompt whose beginning was prefilled before, as in every later turn of a conversation.

A prompt begins with the prompt of the turn before, if the images are the same and no later question guides them:

    turn 1    image, latents, question 1                                            kept: `Prefix`
    turn 2    image, latents, question 1, answer 1, latents, question 2
              `----- in the cache -----'  `---- the rest -----------'

Nothing in the beginning depends on the rest: attention is causal, and the latents of a round read its own question. So
the rest alone is run, its queries over the cache and each other. The results are those of a prefill of the whole
prompt, up to rounding.
"""

import dataclasses
import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from fusion_jax.batch import Batch
from fusion_jax.devices import compiler
from fusion_jax.inference.decoding import Encoding
from fusion_jax.models import llm
from fusion_jax.models.fusion import Fusion, Visual


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prefix:
    """One prompt as its prefill has left it.

    Attributes:
      keys: (layers, 1, K, d, N), values: (layers, 1, K, N, d): those of `llm.Cache`, cut to N slots.
      length: int32 scalar, the prompt's positions; they have the first slots. encoding: None without latents.
    """

    keys: jax.Array
    values: jax.Array
    length: np.ndarray
    encoding: Encoding | None

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(x.nbytes for x in jax.tree.leaves(self))


def rest_of(batch: Batch, start: int, length: int) -> Batch:
    """Cuts the rest out of a prompt that is laid out whole, for `extend`.

    Args:
      batch: one row with one example, padded on the right, whose last round begins at `start` or later.
      start: position at which the rest begins. length: positions to pad the rest to.
    """
    rounds = int((batch.latent_start[0] >= 0).sum())
    last = slice(max(rounds - 1, 0), rounds)

    def cut(x, fill):
        x = x[:, start : start + length]
        return np.pad(x, ((0, 0), (0, length - x.shape[1])), constant_values=fill)

    visual_index, crops = cut(batch.visual_index, -1), batch.crop_kind.shape
    if rounds:  # the table has one entry that stands for all images' tokens, and then the round's latents
        first = batch.visual_index[0, batch.latent_start[0, rounds - 1]]
        visual_index = np.where(visual_index >= 0, visual_index - first + 1, -1)
    return dataclasses.replace(
        batch,
        tokens=cut(batch.tokens, 0),
        targets=cut(batch.targets, 0),
        loss_weights=cut(batch.loss_weights, 0),
        segment_ids=cut(batch.segment_ids, 0),
        positions=cut(batch.positions, 0),
        visual_index=visual_index,
        crops=np.zeros((*crops, 0, 0, 3), np.uint8),
        quadrants=np.zeros((*crops, 0, 0, 0, 3), np.uint8),
        crop_text=np.zeros((*crops, 0), np.int32),
        crop_text_mask=np.zeros((*crops, 0), bool),
        round_crop=batch.round_crop[:, last],
        round_end=batch.round_end[:, last] - start,
        latent_start=batch.latent_start[:, last] - start,
        windows=batch.windows[:, last],
    )


@functools.partial(compiler.ForPlatform, static_argnames=("model", "capacity"))
def extend(model: Fusion, params, rest: Batch, prefix: Prefix, capacity: int, limit):
    """Runs the rest of one prompt after its beginning, with the results of `decoding.prefill`.

    Args:
      rest: see `rest_of`. capacity: slots of the returned cache; the whole prompt must fit.
      limit: (1,) int32, as for `prefill`. With LongRoPE, both must have led to the same factors.
    """
    length = rest.tokens.shape[1]
    place = jnp.sum(rest.segment_ids > 0, axis=1) - 1
    positions = jnp.take_along_axis(rest.positions, place[:, None], axis=1)[:, 0] + 1
    # Padding of the rest may lie beyond the capacity: a write that does not fit would move to the front.
    room = capacity + length
    slots = jnp.arange(room, dtype=jnp.int32)[None]
    more = room - prefix.keys.shape[-1]
    cache = llm.Cache(
        keys=jnp.pad(prefix.keys, ((0, 0),) * 4 + ((0, more),)),
        values=jnp.pad(prefix.values, ((0, 0),) * 3 + ((0, more), (0, 0))),
        segments=(slots < prefix.length).astype(jnp.int32),
        positions=jnp.where(slots < prefix.length, slots, 0),
        reach=positions + jnp.maximum(limit, 1) - 1,
        length=prefix.length,
    )
    encoded = None
    if prefix.encoding is not None:
        context, latents = prefix.encoding.context, prefix.encoding.latents
        encoded = Visual(jnp.zeros_like(context[:, :1]), context, latents, None, None, None, None)
    hidden, cache = model.apply({"params": params}, rest, encoded, cache, method="extend")
    cache = dataclasses.replace(
        cache,
        keys=cache.keys[..., :capacity],
        values=cache.values[..., :capacity, :],
        segments=cache.segments[:, :capacity],
        positions=cache.positions[:, :capacity],
    )
    last = jnp.take_along_axis(hidden, place[:, None, None], axis=1)[:, 0]
    return model.apply({"params": params}, last, method="logits"), positions, cache
