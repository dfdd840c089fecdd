"""Defines the text-guided SigLIP encoder: every layer updates the patches and the question's tokens.

Which keys (columns) each query (rows) sees; padding of the text is never seen:

                 early half, `paper`   early half, `released`   late half
                 image  text           image  text              image  text
         image     x     .               x     x                  x     x
         text      x     x            uniform over both           x     x
"""

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt8

from fusion_jax.models import attention, layers, partition
from fusion_jax.models.config import FusionConfig, VisionConfig
from fusion_jax.models.remat import remat


def normalise(crops: UInt8[Array, "N H W 3"], blank: Bool[Array, "N"]) -> Float[Array, "N H W 3"]:
    """Maps uint8 pixels to [-1, 1]; a blank crop becomes 0.0, a mid-grey that no uint8 has."""
    pixels = crops.astype(jnp.float32) / 127.5 - 1.0
    return jnp.where(blank[:, None, None, None], 0.0, pixels)


def patchify(pixels: Float[Array, "N H W 3"], patch: int) -> Float[Array, "N P pixels"]:
    """Cuts into row-major patches, each flattened as (row, column, channel); pixels that fill no patch are dropped."""
    n, height, width, channels = pixels.shape
    rows, columns = height // patch, width // patch
    x = pixels[:, : rows * patch, : columns * patch]
    x = x.reshape(n, rows, patch, columns, patch, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, rows * columns, patch * patch * channels)


def _along_rows(x: Float[Array, "N L D"]) -> Float[Array, "N L D"]:
    """Shards crops like the rows that they belong to."""
    return partition.constrain(x, "batch", None, None)


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer on image tokens alone or on [image | text]."""

    config: VisionConfig
    mask: str
    dtype: DTypeLike

    def setup(self):
        c = self.config
        project = {"use_bias": True, "dtype": self.dtype}
        self.norm1 = layers.LayerNorm(c.norm_eps)
        self.query = layers.Dense(c.width, ("embed", "heads"), **project)
        self.key = layers.Dense(c.width, ("embed", "heads"), **project)
        self.value = layers.Dense(c.width, ("embed", "heads"), **project)
        residual = layers.fan_in(2 * c.layers)
        self.out = layers.Dense(c.width, ("heads", "embed"), kernel_init=residual, **project)
        self.norm2 = layers.LayerNorm(c.norm_eps)
        self.mlp = layers.MLP(c.mlp_dim, c.width, layers.gelu_tanh, True, self.dtype, residual)

    def _attend(self, x, text_segments, early):
        n, length, _ = x.shape
        q, k, v = (f(x).reshape(n, length, self.config.heads, -1) for f in (self.query, self.key, self.value))
        if text_segments is None:
            return attention.attention(q, k, v)
        patches = length - text_segments.shape[1]
        image_segments = jnp.ones((n, patches), jnp.int32)
        visible_to_text = jnp.concatenate([image_segments, text_segments], 1)
        visible_to_image = visible_to_text
        q_text = q[:, patches:]
        if self.mask == "paper":
            hidden = jnp.where(early, 0, text_segments)
            visible_to_image = jnp.concatenate([image_segments, hidden], 1)
        else:
            # The published code gives early text queries equal scores for all keys, which a query of zeros does, too.
            q_text = jnp.where(early, 0, q_text).astype(q.dtype)
        image = attention.attention(q[:, :patches], k, v, image_segments, visible_to_image)
        text = attention.attention(q_text, k, v, text_segments, visible_to_text)
        return jnp.concatenate([image, text], 1)

    def __call__(self, x, text_segments, early):
        """Args: x: (N, P or P+T, D); text_segments: (N, T), 1 real and 0 padding, or None; early: bool scalar."""
        y = self._attend(self.norm1(x), text_segments, early)
        x = _along_rows(x + self.out(y.reshape(x.shape)))
        return _along_rows(x + self.mlp(self.norm2(x)))


@dataclass(frozen=True)
class _TapWeights:
    """The weights of states 0..K-1 in the shallow and in the deep mean."""

    shallow: np.ndarray
    deep: np.ndarray

    @classmethod
    def of(cls, config: VisionConfig) -> "_TapWeights":
        # With K layers and h = K // 2: shallow is the mean of states 0..h-1, deep of h..2h-1; state k enters layer k,
        # so that, unless the last state K is a tap, nothing reads layer 2h-1 or any after it.
        half, state = config.early_layers, np.arange(config.layers)
        shallow = (state < half) / half
        deep = ((state >= half) & (state < 2 * half)) / half
        return cls(shallow.astype(np.float32), deep.astype(np.float32))


def _add(sums, shallow, deep, x):
    """Adds the weighted state `x` to the sums of both means, float32."""
    return sums[0] + shallow * x, sums[1] + deep * x


class _EncoderStep(nn.Module):
    """Scan body: one layer for the plain and the guided crops, so that its weights are gathered once for both."""

    config: VisionConfig
    mask: str
    dtype: DTypeLike

    @nn.compact
    def __call__(self, carry, per_layer, text_segments):
        early, shallow, deep = per_layer
        layer = EncoderLayer(self.config, self.mask, self.dtype, name="layer")
        new = {}
        for view, (x, *sums) in carry.items():
            segments = text_segments if view == "guided" else None
            new[view] = (layer(x, segments, early), *_add(sums, shallow, deep, x))
        return new, None


class VisionEncoder(nn.Module):
    """The tower: patches in, tapped states out."""

    config: FusionConfig
    dtype: DTypeLike = jnp.float32
    remat: str = "none"

    def setup(self):
        c = self.config.vision
        self.patch_embedding = layers.Dense(c.width, ("pixels", "embed"), True, self.dtype)
        self.position_embedding = self.param(
            "position_embedding",
            nn.with_logical_partitioning(layers.normal(c.width**-0.5), ("patches", "embed")),
            (c.patches, c.width),
            jnp.float32,
        )
        scan = nn.scan(
            remat(_EncoderStep, self.remat),
            variable_axes={"params": 0, "intermediates": 0},  # the latter for attention maps alone
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=self.config.encoder_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        self.layers = scan(c, self.config.mask, self.dtype)

    def embed(self, crops: UInt8[Array, "N H W 3"], blank: Bool[Array, "N"]) -> Float[Array, "N P D"]:
        """Returns state 0 of the image: patch + position embedding."""
        patches = patchify(normalise(crops, blank), self.config.vision.patch_size)
        return _along_rows(self.patch_embedding(_along_rows(patches)) + self.position_embedding.astype(self.dtype))

    def __call__(
        self,
        views: dict[str, Float[Array, "_N _P D"]],
        text: Float[Array, "G T D"] | None,
        text_mask: Bool[Array, "G T"] | None,
    ) -> dict[str, Float[Array, "_N _L taps"]]:
        """Runs the layers over every view at once.

        Args:
          views: state 0 of the `guided` crops and, if any, of the `plain` ones.
          text: projected question tokens that join the guided crops after the position embedding, without positions.
          text_mask: which of them are real.

        Returns:
          Per view the concatenated taps; guided: (G, P + T, taps D), plain: (N, P, taps D).
        """
        c, run = self.config.vision, self.config.encoder_layers
        segments: Int[Array, "G T"] | None = None
        if text is not None:
            views = {**views, "guided": jnp.concatenate([views["guided"], text.astype(self.dtype)], 1)}
            segments = text_mask.astype(jnp.int32)
        weights = _TapWeights.of(c)
        early = np.arange(c.layers) < c.early_layers
        # Float32: the means are rounded once, as torch rounds those of a list of states.
        zeros = {view: jnp.zeros(x.shape, jnp.float32) for view, x in views.items()}
        carry = {view: (x, zeros[view], zeros[view]) for view, x in views.items()}
        per_layer = tuple(jnp.asarray(x[:run]) for x in (early, weights.shallow, weights.deep))
        carry, _ = self.layers(carry, per_layer, segments)
        if self.config.taps == "released":
            return {view: self._joined(states) for view, states in carry.items()}
        # The last layer's output is the last state of the deep mean.
        last = (jnp.asarray(weights.shallow[run]), jnp.asarray(weights.deep[run]))
        return {view: self._joined(_add(sums, *last, x)) for view, (x, *sums) in carry.items()}

    def _joined(self, taps) -> Float[Array, "N L taps"]:
        return jnp.concatenate([tap.astype(self.dtype) for tap in taps], -1)
