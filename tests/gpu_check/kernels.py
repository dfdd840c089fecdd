"""The attention kernels that this device gets against the plain one in float32: values, gradients and speed.

The shapes are those of FLARE-L 3B and 8B (heads of 96 in the encoder, 96 and 128 in the decoder), of the so400m tower
(heads of 72) and of a decoder with a window.
"""

import dataclasses
import functools
import math
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from gpu_check.parts import arguments, note, say

from fusion_jax.models import attention

LIMIT = 1e-2  # ||x - y|| / ||y||, bfloat16
TEXT = 128  # question tokens in the encoder


@dataclass(frozen=True)
class Case:
    """q_segments: of the queries, `packed`, `image`, `text` (padded questions) or none; k_segments: of the keys,
    `packed`, `image+text`, `image+hidden` (the half mask: no image query sees text) or none. uniform: queries of
    zeros, the released code's early text queries."""

    queries: int
    keys: int
    heads: int
    kv_heads: int
    size: int
    rows: int
    q_segments: str = ""
    k_segments: str = ""
    causal: bool = False
    window: int = 0
    uniform: bool = False


CASES = {
    "decoder packed, 96": Case(2048, 2048, 32, 32, 96, 4, "packed", "packed", True),
    "encoder image to all, 96": Case(576, 576 + TEXT, 16, 16, 96, 16, "image", "image+text"),
    "encoder image, half mask, 96": Case(576, 576 + TEXT, 16, 16, 96, 16, "image", "image+hidden"),
    "encoder text to all, 96": Case(TEXT, 576 + TEXT, 16, 16, 96, 16, "text", "image+text"),
    "encoder plain, 96": Case(576, 576, 16, 16, 96, 32),
    "decoder packed, 128, shared": Case(2048, 2048, 32, 8, 128, 4, "packed", "packed", True),
    "encoder plain, 72": Case(729, 729, 16, 16, 72, 32),
    "encoder image to all, 72": Case(729, 729 + TEXT, 16, 16, 72, 16, "image", "image+text"),
    "encoder text, uniform, 72": Case(TEXT, 729 + TEXT, 16, 16, 72, 16, "text", "image+text", uniform=True),
    "decoder window, 128, shared": Case(2048, 2048, 32, 8, 128, 4, "packed", "packed", True, 512),
}

BESIDE_PLAIN = ("encoder plain, 96", "encoder image to all, 96", "encoder text to all, 96")


def segments(kind: str, rows: int, length: int, rng: np.random.Generator) -> np.ndarray | None:
    """Segment ids (rows, length)."""
    if not kind:
        return None
    ids = np.ones((rows, length), np.int32)
    if kind == "packed":  # three conversations and padding
        cuts = np.sort(rng.integers(1, length * 15 // 16, (rows, 2)), 1)
        ids += (np.arange(length) >= cuts[:, :1]).astype(np.int32) + (np.arange(length) >= cuts[:, 1:])
        ids[:, length * 15 // 16 :] = 0
    elif kind == "image+text":
        ids[:, length - TEXT :] = np.arange(TEXT) < rng.integers(1, TEXT + 1, (rows, 1))
    elif kind == "image+hidden":
        ids[:, length - TEXT :] = 0
    return ids


def arrays(case: Case) -> tuple:
    """q, k, v and the gradient of the output, bfloat16 values as float32; the segment ids of queries and keys."""
    rng = np.random.default_rng(0)

    def draw(length: int, heads: int):
        return rng.standard_normal((case.rows, length, heads, case.size), np.float32)

    q, k, v, g = (
        draw(case.queries, case.heads),
        draw(case.keys, case.kv_heads),
        draw(case.keys, case.kv_heads),
        draw(case.queries, case.heads),
    )
    if case.uniform:
        q[:] = 0
    theirs = segments(case.k_segments, case.rows, case.keys, rng)
    if case.q_segments == "packed":
        ours = theirs
    elif case.q_segments == "text":
        ours = theirs[:, -TEXT:]
    else:
        ours = segments(case.q_segments, case.rows, case.queries, rng)
    return *(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v, g)), ours, theirs


def pairs(case: Case, ours, theirs) -> float:
    """Of a query and a key that it sees, in all rows."""
    if ours is None:
        return case.rows * case.queries * case.keys
    mask = attention._mask(ours, theirs, case.causal, case.window)
    return float(np.asarray(mask).sum())


def compiled(kernel, case: Case):
    """(q, k, v, g, segments of queries and keys) -> (output, gradients)."""

    def run(q, k, v, g, ours, theirs):
        out, back = jax.vjp(lambda *x: kernel(*x, ours, theirs, case.causal, case.window), q, k, v)
        return out, back(g.astype(out.dtype))

    return jax.jit(run)


def error(got, wanted) -> float:
    """||got - wanted|| / ||wanted||, or ||got|| where nothing is wanted."""
    got, wanted = (jnp.asarray(x, jnp.float32) for x in (got, wanted))
    norm = float(jnp.linalg.norm(wanted))
    return float(jnp.linalg.norm(got - wanted)) / (norm or 1.0)


def milliseconds(run, repeats: int) -> float:
    jax.block_until_ready(run())
    start = time.perf_counter()
    for _ in range(repeats):
        result = run()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / repeats * 1e3


def measure(case: Case, kernels: dict, repeats: int) -> list[dict]:
    """One row for each kernel; the first is the one that is used."""
    *inputs, ours, theirs = arrays(case)
    flops = 3 * 4 * case.heads * case.size * pairs(case, ours, theirs)
    ours, theirs = (None if s is None else jnp.asarray(s) for s in (ours, theirs))
    with jax.default_matmul_precision("highest"):
        wide = [x.astype(jnp.float32) for x in inputs]
        out, grads = compiled(attention.reference_attention, case)(*wide, ours, theirs)
    rows = []
    for name, kernel in kernels.items():
        run = functools.partial(compiled(kernel, case), *inputs, ours, theirs)
        got, got_grads = run()
        ms = milliseconds(run, repeats)
        rows.append(
            {
                "kernel": name,
                "out": error(got, out),
                **{f"d{x}": error(*both) for x, both in zip("qkv", zip(got_grads, grads))},
                "ms": ms,
                "tflops": flops / ms / 1e9,
            }
        )
    return rows


def others(name: str, case: Case) -> dict:
    """Kernels to time beside the chosen one, where they might be faster."""
    if jax.default_backend() != "gpu":
        return {}
    from fusion_jax.models import flash

    if case.causal and not case.window:
        return {"cuDNN with a mask": flash.cudnn_attention}
    return {"plain": attention.reference_attention} if name in BESIDE_PLAIN else {}


def main() -> None:
    context = arguments()
    rows, failures = [], []
    for name, case in CASES.items():
        if context.dry_run:
            case = dataclasses.replace(case, heads=2 * case.heads // case.kv_heads, kv_heads=2, rows=1)
            if case.causal:
                case = dataclasses.replace(case, queries=256, keys=256, window=min(case.window, 64))
        chosen = attention.choose(
            jax.default_backend(),
            case.queries,
            case.keys,
            jnp.bfloat16,
            bool(case.q_segments),
            case.causal,
            case.window,
        )
        for kernels in ({chosen.__name__: chosen}, others(name, case)):
            try:
                measured = measure(case, kernels, 2 if context.dry_run else 10) if kernels else []
            except Exception as problem:  # one kernel that fails must not hide the others
                note(f"{name}: {problem!r}")
                measured = [{"kernel": ", ".join(kernels), "error": f"{type(problem).__name__}: {problem}"[:200]}]
            if kernels and chosen in kernels.values():
                judged = measured[0]
                values = [judged.get(key, math.nan) for key in ("out", "dq", "dk", "dv")]
                good = all(value <= LIMIT for value in values)  # NaN is not
                judged["passed"] = good
                if not good:
                    failures.append(f"{name}: {judged.get('error', f'error {max(values, key=_worst):.2g}')}")
            rows += [{"case": name, **row} for row in measured]
            note(*rows[-len(measured) :] if measured else [])
        say({"limit": LIMIT, "cases": rows}, failures)


def _worst(value: float) -> float:
    return math.inf if math.isnan(value) else value


if __name__ == "__main__":
    main()
