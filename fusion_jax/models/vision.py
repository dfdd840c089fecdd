"""Defines the text-guided SigLIP encoder: every layer updates the patches and the question's tokens.

Which keys (columns) each query (rows) sees; padding of the text is never seen:

                 early half, `paper`   early half, `released`   late half
                 image  text           image  text              image  text
         image     x     .               x     x                  x     x
         text      x     x            uniform over both           x     x

With the mask `none` the early half is as the late one.
"""

import flax.linen as nn
import jax
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
    """Pre-norm transformer layer on image tokens alone or on [image | text].

    early: whether it belongs to the shallow half, in which `mask` restricts what image and text see of each other.
    """

    config: VisionConfig
    mask: str
    early: bool
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

    def _attend(self, x, text_segments):
        n, length, _ = x.shape
        patches = length if text_segments is None else length - text_segments.shape[1]
        # Early text queries have no scores in `released`, see `_uniform`.
        scored = x[:, :patches] if self.early and self.mask == "released" else x
        q, k, v = (
            f(y).reshape(*y.shape[:2], self.config.heads, -1)
            for f, y in ((self.query, scored), (self.key, x), (self.value, x))
        )
        if text_segments is None:
            return attention.attention(q, k, v)
        segments = jnp.concatenate([jnp.ones((n, patches), jnp.int32), text_segments], 1)
        if not self.early or self.mask == "none":
            return attention.attention(q, k, v, segments, segments)
        if self.mask == "paper":
            image = attention.attention(q[:, :patches], k[:, :patches], v[:, :patches])
            text = attention.attention(q[:, patches:], k, v, text_segments, segments)
        else:
            image = attention.attention(q, k, v, segments[:, :patches], segments)
            text = jnp.broadcast_to(_uniform(v, segments), (n, length - patches, *v.shape[2:]))
        return jnp.concatenate([image, text], 1)

    def __call__(self, x, text_segments):
        """Args: x: (N, P or P+T, D); text_segments: (N, T), 1 real and 0 padding, or None."""
        y = self._attend(self.norm1(x), text_segments)
        x = _along_rows(x + self.out(y.reshape(x.shape)))
        return _along_rows(x + self.mlp(self.norm2(x)))


def _uniform(v: Float[Array, "N L H d"], segments: Int[Array, "N L"]) -> Float[Array, "N 1 H d"]:
    """Returns what a query gets whose scores are all equal, as those of early text in the published code: the mean."""
    total = jnp.sum(jnp.where(segments[..., None, None] > 0, v, 0), 1, dtype=jnp.float32, keepdims=True)
    return (total / segments.sum(1)[:, None, None, None]).astype(v.dtype)


class _Layers(nn.Module):
    """All layers as two scans, one for each half; their parameters are one stack, `layer`.

    A step of a scan is one layer for the plain and the guided crops, so that its weights are gathered once for both.
    """

    config: FusionConfig
    dtype: DTypeLike
    remat: str

    def setup(self):
        c = self.config
        self.layer, self.late = (EncoderLayer(c.vision, c.mask, False, self.dtype) for _ in range(2))
        self.early = EncoderLayer(c.vision, c.mask, True, self.dtype)

    def __call__(self, views, segments):
        """Returns (last state, shallow mean, deep mean) per view, the means in float32."""
        if self.is_initializing():
            # Draws the parameters of all layers.
            last, mean = self._run(self.layer, self.config.encoder_layers, views, segments)
            return last, mean, mean
        return nn.map_variables(_Layers._halves, "params", self._cut)(self, views, segments)

    def _cut(self, variables):
        """Cuts the stack of parameters into those of the two halves."""
        half = self.config.vision.early_layers
        stack, tree = jax.tree.flatten(variables["params"]["layer"])
        # The gradient of a split is one concatenation, that of two slices a sum of two padded arrays.
        early, late = zip(*(jax.lax.split(x, (half, self.config.encoder_layers - half)) for x in stack))
        return {"params": {"early": tree.unflatten(early), "late": tree.unflatten(late)}}

    def _halves(self, views, segments):
        # With K layers and h = K // 2: shallow is the mean of states 0..h-1, deep of h..2h-1; state k enters layer k,
        # so that, unless the last state K is a tap, nothing reads layer 2h-1 or any after it.
        half, run = self.config.vision.early_layers, self.config.encoder_layers
        views, shallow = self._run(self.early, half, views, segments)
        views, deep = self._run(self.late, run - half, views, segments)
        if run < 2 * half:  # the last layer's output is the last state of the deep mean
            deep = {view: mean + jnp.float32(1 / half) * views[view] for view, mean in deep.items()}
        return views, shallow, deep

    def _run(self, layer, count, views, segments):
        """Runs `count` layers; returns the last state and the mean of the first h states that enter one, per view."""

        def step(layer, carry, weight, segments):
            new = {}
            for view, (x, mean) in carry.items():
                new[view] = (layer(x, segments if view == "guided" else None), mean + weight * x)
            return new, None

        scan = nn.scan(
            remat(step, self.remat),
            variable_axes={"params": 0, "intermediates": 0},  # the latter for attention maps alone
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        half = self.config.vision.early_layers
        weights = (np.arange(count) < half) / half
        # Float32: the means are rounded once, as torch rounds those of a list of states.
        carry = {view: (x, jnp.zeros(x.shape, jnp.float32)) for view, x in views.items()}
        carry, _ = scan(layer, carry, jnp.asarray(weights, jnp.float32), segments)
        return tuple({view: pair[i] for view, pair in carry.items()} for i in range(2))


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
        self.layers = _Layers(self.config, self.dtype, self.remat)

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
        segments: Int[Array, "G T"] | None = None
        if text is not None:
            views = {**views, "guided": jnp.concatenate([views["guided"], text.astype(self.dtype)], 1)}
            segments = text_mask.astype(jnp.int32)
        last, shallow, deep = self.layers(views, segments)
        taps = (last, shallow, deep) if self.config.taps == "released" else (shallow, deep)
        return {view: jnp.concatenate([tap[view].astype(self.dtype) for tap in taps], -1) for view in views}
