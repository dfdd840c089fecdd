"""Counts the FLOPs of products in a compiled program: 2 x outputs x inputs that each output sums over."""

import math
import re

import numpy as np

from fusion_jax.planning.hlo import Instruction, Shape


def _positions(out: int, size: int, stride: int, low: int, length: int, base: int, dilation: int) -> int:
    """Counts the pairs (output position, window position) that fall on a real input, along one spatial dimension."""
    places = np.arange(out)[:, None] * stride - low + np.arange(size)[None] * dilation
    reach = (length - 1) * base + 1
    return int(((places >= 0) & (places < reach) & (places % base == 0)).sum())


def convolution_flops(instruction: Instruction, left: Shape, right: Shape) -> float:
    """Counts the FLOPs of a convolution, but only for pairs of output and window that fall on a real input.

    Programs for TPUs write every product as a convolution, and batched ones with windows over the batch.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    lhs, rhs, out = labels.groups()
    spatial = sorted(set(out) - {"b", "f"})
    window = re.search(r"window=\{([^}]*)\}", instruction.rest)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}

    def each(name: str, default: str) -> list[str]:
        return fields[name].split("x") if name in fields else [default] * len(spatial)

    sizes, strides, pads = each("size", "1"), each("stride", "1"), each("pad", "0_0")
    bases, dilations = each("lhs_dilate", "1"), each("rhs_dilate", "1")
    result = instruction.shapes[0].dims
    pairs = 1
    for k, label in enumerate(spatial):
        pairs *= _positions(
            result[out.index(label)],
            int(sizes[k]),
            int(strides[k]),
            int(pads[k].split("_")[0]),
            left.dims[lhs.index(label)],
            int(bases[k]),
            int(dilations[k]),
        )
    batch, features = result[out.index("b")], result[out.index("f")]
    # With groups of features the kernel has the inputs of one group; with groups of batches the result is smaller.
    return 2.0 * batch * features * pairs * right.dims[rhs.index("i")]


def dot_flops(instruction: Instruction, left: Shape) -> float:
    """Counts the FLOPs of a matrix product: for each result, one multiply-add per contracted element on the left."""
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
    dims = [int(d) for d in contracted[1].split(",") if d]
    return 2.0 * instruction.shapes[0].size * math.prod(left.dims[d] for d in dims)
