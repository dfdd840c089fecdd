"""Computes the shapes of our parameters for the table of tensors, without allocating any."""

import functools

import jax
from flax.traverse_util import flatten_dict

from fusion_jax.interop import table
from fusion_jax.models import fusion
from fusion_jax.models.config import FusionConfig


@functools.cache
def parameter_shapes(config: FusionConfig) -> dict[str, tuple[int, ...]]:
    """Our parameter shapes by path, such as `llm/norm/scale`."""
    tree = jax.eval_shape(lambda: fusion.init(config, jax.random.key(0)))
    return {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}


def kept_shapes(config: FusionConfig) -> dict[str, tuple[int, ...]]:
    """Shapes in an imported checkpoint, which keeps the whole tower; loading cuts it to the layers that run."""
    return table.all_shapes(config, parameter_shapes(config))
