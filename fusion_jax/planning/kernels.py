"""Counts the FLOPs of kernels that a program calls by name, from the shapes of their operands.

The program's text does not show their products:

| kernel | products of an attention, each 2 Sq Sk d FLOPs a head |
|---|---|
| segment flash (TPU) | scores and output; scores, d(weights), d(query), d(key), d(value) |
| cuDNN (GPU) | the same two |
| splash (TPU, long rows) | scores and output; scores, d(weights), d(query); scores, d(weights), d(key), d(value) |
| Triton (GPU) | the same three |

Blocks that a causal mask or a window hides are never computed; segment flash and Triton also skip those between
segments.
"""

import math
import re
from collections.abc import Callable, Sequence

from fusion_jax.models import flash, segment_flash, segment_flash_tpu
from fusion_jax.planning.work import Kernel

_SEGMENT_TPU = (("segment_flash_tpu_forward", 2), ("segment_flash_tpu_backward", 5))
_SPLASH = (("_dkv", 4), ("_dq", 3), ("_fwd", 2))
_TRITON = (("segment_flash_forward", 2), ("segment_flash_keys", 4), ("segment_flash_queries", 3))
_TRITON_BLOCKS = {2: segment_flash.FORWARD, 4: segment_flash.KEYS, 3: segment_flash.QUERIES}
_CUDNN_BLOCK = 128


def kind(kernel: Kernel) -> str:
    """Returns the kernel's name in reports."""
    if kernel.target == "tpu_custom_call":
        return "flash attention" if "segment_flash_tpu" in kernel.name else "splash attention"
    if "triton" in kernel.target:
        return "Triton attention"
    return "cuDNN attention" if "fmha" in kernel.target else "cuBLAS products"


def flops(kernel: Kernel, packed: Callable[[int], float] = lambda block: 1.0) -> float:
    """Returns the FLOPs of one call.

    Args:
      packed: gives for the size of a block the share of a causal row's blocks that are within segments; see
        `packed_share`.

    Raises:
      ValueError: the kernel is unknown.
    """
    if kernel.target == "tpu_custom_call":
        return _segment_tpu(kernel, packed) if "segment_flash_tpu" in kernel.name else _splash(kernel)
    if "triton" in kernel.target:
        return _triton(kernel, packed)
    return _cudnn(kernel) if "fmha" in kernel.target else _gemm(kernel)


def computed(q_length: int, k_length: int, blocks: tuple[int, int], window: int = 0) -> float:
    """Returns the share of an attention's blocks that a causal mask, and a window if there is one, leave to compute.

    Args:
      blocks: (queries, keys) of a block. window: keys that a query sees, 0 for all before it.
    """
    q_block, k_block = blocks
    rows, columns = math.ceil(q_length / q_block), math.ceil(k_length / k_block)
    count = 0
    for row in range(rows):
        first = max(0, row * q_block - window + 1) // k_block if window else 0
        count += min(math.ceil((row + 1) * q_block / k_block), columns) - first
    return count / (rows * columns)


def packed_share(lengths: Sequence[int], rows: int, row_length: int, block: int) -> float:
    """Returns in what share of the blocks on and below the diagonals of rows queries meet keys of their segment.

    Args:
      lengths: lengths of the segments in these rows, in their order; a row is taken to be full where the next segment
        does not fit. block: queries and keys of a block.
    """
    within, start = 0, 0
    for length in lengths:
        start = 0 if start + length > row_length else start
        blocks = (start + length - 1) // block - start // block + 1
        # Where the segment before ends in this block, its queries have been counted with these keys.
        within += blocks * (blocks + 1) // 2 - (start % block > 0)
        start += length
    whole = math.ceil(row_length / block)
    return min(1.0, within / (rows * whole * (whole + 1) / 2))


def _arrays(kernel: Kernel) -> list[tuple[int, ...]]:
    """Returns the shapes of the kernel's arrays; query, key and value come first."""
    arrays = [s.dims for s in kernel.operands if len(s.dims) >= 3 and s.dtype in ("bf16", "f16", "f32")]
    if len(arrays) < 3:
        raise _unknown(kernel)
    return arrays


def _unknown(kernel: Kernel) -> ValueError:
    return ValueError(f"unknown kernel {kernel.target} {kernel.name}: its FLOPs cannot be counted.")


def _products(kernel: Kernel, table: tuple[tuple[str, int], ...]) -> int:
    count = next((count for part, count in table if part in kernel.name), None)
    if count is None:
        raise _unknown(kernel)
    return count


def _segment_tpu(kernel: Kernel, packed: Callable[[int], float]) -> float:
    """Counts the FLOPs of our TPU kernels; their arrays are (rows, heads, length, head size)."""
    products = _products(kernel, _SEGMENT_TPU)
    query, key = _arrays(kernel)[:2]
    block, share = segment_flash_tpu.BLOCK, 1.0
    if "/llm/" in kernel.name:  # the decoder is causal, the encoder is not
        share = computed(query[-2], key[-2], (block, block)) * packed(block)
    return products * 2.0 * math.prod(query) * key[-2] * share


def _splash(kernel: Kernel) -> float:
    """Counts the FLOPs of splash attention; its arrays are (..., heads, length, head size)."""
    products = _products(kernel, _SPLASH)
    query, key = _arrays(kernel)[:2]
    block = flash._blocks(query[-2])[1]
    # The decoder is causal, the encoder is not.
    share = computed(query[-2], query[-2], (block, block)) if "/llm/" in kernel.name else 1.0
    return products * 2.0 * math.prod(query) * key[-2] * share


def _triton(kernel: Kernel, packed: Callable[[int], float]) -> float:
    """Counts the FLOPs of our Triton kernels, which are causal; their arrays are (rows, length, heads, head size)."""
    products = _products(kernel, _TRITON)
    query, key = _arrays(kernel)[:2]
    blocks = _TRITON_BLOCKS[products]
    share = computed(query[1], key[1], (blocks.queries, blocks.keys)) * packed(blocks.queries)
    return products * 2.0 * math.prod(query) * key[1] * share


def _cudnn(kernel: Kernel) -> float:
    """Counts the FLOPs of cuDNN's attention; its configuration holds the shape of the scores and the mask."""
    scores = re.search(r'"intermediate_tensor_shape": ?\{.*?"dimensions": ?\[([^\]]*)\]', kernel.rest)
    if scores is None:
        raise _unknown(kernel)
    shape = [int(size) for size in re.findall(r"\d+", scores[1])]
    size = _arrays(kernel)[0][-1]
    share = 1.0
    if re.search(r'"mask_type": ?"\w*CAUSAL', kernel.rest):
        window = re.search(r'"sliding_window_length": ?"?(\d+)', kernel.rest)
        share = computed(shape[-2], shape[-1], (_CUDNN_BLOCK, _CUDNN_BLOCK), int(window[1]) if window else 0)
    return (5 if "Backward" in kernel.target else 2) * 2.0 * math.prod(shape) * size * share


def _gemm(kernel: Kernel) -> float:
    """Counts the FLOPs of a matrix product by cuBLAS."""
    contracted = re.search(r'"lhs_contracting_dimensions": ?\[([^\]]*)\]', kernel.rest)
    if contracted is None:
        raise _unknown(kernel)
    left = kernel.operands[0].dims
    return 2.0 * kernel.results[0].size * math.prod(left[int(d)] for d in re.findall(r"\d+", contracted[1]))
