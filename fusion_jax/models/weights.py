"""Stores the weights of a model that only answers: in the dtype that its layers read, or as int8 with scales.

Training keeps float32 parameters and casts them at each use. A model that answers reads the same weights for every
token, so they are cast once, when they are loaded, to the same values.

With int8 a matrix (inputs, outputs) becomes integers, `kernel`, and a scale for each output, `kernel_scale`; it stands
for their product. `layers.Dense` and the decoder's head multiply by the integers and scale the result, so the matrix is
never restored.

Training stacks the parameters of the decoder's blocks, so that one block is compiled for all. On CPU and GPU a program
that reads one block out of a stack copies it first, which for one new token is three times the bytes of the weights:
there a model that answers holds each block by itself.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8

from fusion_jax.models import cpu_decoding, partition

KINDS = ("full", "int8")  # how weights may be stored
_SCALE = "_scale"  # what the name of a matrix's scales ends in
_LARGEST = 127


def scaled_product(
    x: Float[Array, "... I"], weights: Int8[Array, "I O"], scales: Float[Array, " O"]
) -> Float[Array, "... O"]:
    """Computes x (W scales) in float32; the sums of the product with the integers are scaled."""
    rows = x.reshape(-1, x.shape[-1])
    if cpu_decoding.multiplies(rows):
        return cpu_decoding.product(rows, weights, scales).reshape(*x.shape[:-1], -1)
    return jnp.dot(x, weights.astype(x.dtype), preferred_element_type=jnp.float32) * scales


def scale_name(name: str) -> str:
    """Returns the name under which the scales of a matrix stand beside it."""
    return name + _SCALE


def dtypes(paths: Mapping[str, object], dtype: DTypeLike) -> dict[str, jnp.dtype]:
    """Returns the dtype in which the layers read each parameter, by its path: float32 in norms, else `dtype`.

    Args:
      paths: parameters by path, names joined by "/". Norms are the modules that have a `scale`.
    """
    norms = {path.rpartition("/")[0] for path in paths if path.rpartition("/")[2] == "scale"}
    return {path: jnp.dtype(jnp.float32 if path.rpartition("/")[0] in norms else dtype) for path in paths}


def as_read(params: dict, dtype: DTypeLike) -> dict:
    """Casts the parameters to the dtypes that the layers read; each stays on its devices, and cast ones as they are."""
    flat = flatten_dict(params, sep="/")
    wanted = dtypes(flat, dtype)
    changed = {
        path: x
        for path, x in flat.items()
        if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype != wanted[path] and not path.endswith(_SCALE)
    }
    if not changed:
        return params

    def cast(tree):
        return {path: x.astype(wanted[path]) for path, x in tree.items()}

    if not any(isinstance(x, jax.core.Tracer) for x in changed.values()):
        cast = jax.jit(cast, out_shardings={path: x.sharding for path, x in changed.items()})
    return unflatten_dict(flat | cast(changed), sep="/")


def is_unstacked(stack: Mapping[str, object]) -> bool:
    """Returns whether the parameters of a stack of the decoder are those of each block, by number."""
    return "0" in stack


def of_blocks(path: str, x: Array) -> dict[str, Array]:
    """Splits one parameter of a stack of the decoder into those of its blocks, by path; returns others as they are.

    Block `i` of `llm/stack_0/layer_1/query/kernel` is `llm/stack_0/i/layer_1/query/kernel`. For a TPU nothing is split:
    it reads a block where it lies in the stack, and compiles all blocks several times as long as one.
    """
    if not path.startswith("llm/stack_") or partition.platform() == "tpu":
        return {path: x}
    llm, stack, rest = path.split("/", 2)
    return {f"{llm}/{stack}/{i}/{rest}": x[i] for i in range(len(x))}


def unstack(params: dict) -> dict:
    """Returns the parameters with each of the decoder's blocks by itself, see `of_blocks`."""
    flat = flatten_dict(params, sep="/")
    return unflatten_dict({k: v for path, x in flat.items() for k, v in of_blocks(path, x).items()}, sep="/")


def becomes_int8(path: str) -> bool:
    """Returns whether int8 storage applies to a parameter: kernels of dense layers, and the decoder's head."""
    return path.endswith("/kernel") or path == "llm/head"


@jax.jit
def to_int8(w: Float[Array, "... I O"]) -> tuple[Int8[Array, "... I O"], Float[Array, "... O"]]:
    """Rounds matrices to multiples of each output channel's largest weight / 127.

    Returns:
      the integers, -127 to 127, and the scales, float32; a channel of zeros has scale 0.
    """
    w = w.astype(jnp.float32)
    scales = jnp.abs(w).max(-2) / _LARGEST
    steps = w / jnp.where(scales > 0, scales, 1.0)[..., None, :]
    return jnp.clip(jnp.round(steps), -_LARGEST, _LARGEST).astype(jnp.int8), scales


def size(params: dict) -> int:
    """Counts the bytes of all parameters."""
    return sum(x.nbytes for x in jax.tree.leaves(params))
