"""Kernels for TPU and GPU against the plain attention, forward and gradient: interpreted, and on a GPU for real.

Two packed examples with padding, the encoder's half mask (image queries do not see text; padded text is seen by
nobody), its text queries, and no mask at all.
"""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.fixtures import random_array

from fusion_jax.models import attention, cpu_kernels, flash, segment_flash, segment_flash_tpu
from fusion_jax.models.attention import reference_attention
from fusion_jax.models.remat import POLICIES

LONG = 150  # neither a whole block nor within one
PACKED = np.repeat([1, 2, 0], [61, 80, 9])[None].astype(np.int32)
IMAGE, TEXT = np.ones((1, 131), np.int32), np.repeat([1, 0], [14, 5])[None].astype(np.int32)
HIDDEN = np.zeros_like(TEXT)
# name: (query segments, key segments, causal, window, query heads, kv heads)
CASES = {
    "packed": (PACKED, PACKED, True, 0, 4, 2),
    "window": (PACKED, PACKED, True, 40, 2, 2),
    "early image": (IMAGE, np.concatenate([IMAGE, HIDDEN], 1), False, 0, 2, 2),
    "late text": (TEXT, np.concatenate([IMAGE, TEXT], 1), False, 0, 2, 2),
    "plain crop": (None, None, False, 0, 2, 1),
}
KERNELS = {
    "tpu": (functools.partial(flash.tpu_attention, interpret=True), tuple(CASES)),
    "splash": (functools.partial(flash.splash_attention, interpret=True), tuple(CASES)),
    "triton": (functools.partial(flash.triton_attention, interpret=True), ("packed",)),
    "cudnn": (functools.partial(flash.cudnn_attention, implementation="xla"), tuple(CASES)),
}
PAIRS = [(kernel, case) for kernel, (_, cases) in KERNELS.items() for case in cases]


@functools.cache
def inputs(case, size=8, dtype=jnp.float32):
    q_segments, kv_segments, *_, heads, groups = CASES[case]
    q_length = LONG if q_segments is None else q_segments.shape[1]
    k_length = LONG if kv_segments is None else kv_segments.shape[1]
    shapes = ((1, q_length, heads, size), (1, k_length, groups, size), (1, k_length, groups, size))
    arrays = [jnp.asarray(random_array(*shape, seed=i), dtype) for i, shape in enumerate((*shapes, shapes[0]))]
    return arrays, q_segments, kv_segments


def run(kernel, case, **kinds):
    (*qkv, cotangent), *segments = inputs(case, **kinds)
    causal, window = CASES[case][2:4]
    segments = [None if s is None else jnp.asarray(s) for s in segments]

    @jax.jit
    def both(*arrays):
        out, pull = jax.vjp(lambda q, k, v: kernel(q, k, v, *segments, causal, window), *arrays)
        return out, *pull(cotangent)

    return [np.asarray(x, np.float32) for x in both(*qkv)]


@functools.cache
def plain(case):
    return run(reference_attention, case)


@pytest.mark.parametrize(("kernel", "case"), PAIRS)
def test_kernel_equals_the_plain_one_forward_and_gradient(kernel, case):
    for ours, theirs in zip(run(KERNELS[kernel][0], case), plain(case), strict=True):
        assert np.abs(theirs).max() > 0.1
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_padding_gives_zeros(kernel):
    out, d_q, d_k, d_v = run(KERNELS[kernel][0], "packed")
    for x in (out, d_q, d_k, d_v):
        assert (x[:, PACKED[0] == 0] == 0).all() and np.isfinite(x).all()


# Longer than four blocks of keys: one segment after the other, segments in any order, padding between two, and one
# segment. Two query heads share a key/value head, and there are two of those.
ROWS = np.stack(
    [
        np.repeat([1, 2, 3, 0], [300, 150, 90, 100]),
        np.resize([3, 1, 2], 640),
        np.repeat([5, 0, 2, 1], [140, 120, 200, 180]),
        np.ones(640, np.int64),
    ]
).astype(np.int32)


def test_tpu_kernel_reads_every_segment_of_packed_rows():
    shapes = ((4, 640, 4, 8), (4, 640, 2, 8), (4, 640, 2, 8), (4, 640, 4, 8))
    q, k, v, cotangent = (jnp.asarray(random_array(*shape, seed=i)) for i, shape in enumerate(shapes))

    def both(kernel):
        out, pull = jax.vjp(lambda *arrays: kernel(*arrays, jnp.asarray(ROWS), jnp.asarray(ROWS), True), q, k, v)
        return out, *pull(cotangent)

    ours = jax.jit(lambda: both(functools.partial(flash.tpu_attention, interpret=True)))()
    for a, b in zip(ours, both(reference_attention), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    assert (np.asarray(ours[0])[ROWS == 0] == 0).all()


def test_tpu_kernel_skips_blocks_that_no_query_sees():
    def bounds(causal, window, queries, ours, theirs):
        how = segment_flash_tpu.Attention(causal, window, queries, queries)
        first, last = segment_flash_tpu.seen_blocks(how, jnp.asarray(ours), jnp.asarray(theirs))
        return [[(f, n) for f, n in zip(*row) if n > f] for row in zip(first.tolist(), last.tolist())]

    whole = [(0, i + 1) for i in range(5)]
    assert bounds(True, 0, 128, ROWS, ROWS) == [
        [(0, 1), (0, 2), (0, 3), (2, 4), (3, 5)],  # the third block begins in segment 1, the fourth in segment 2
        whole,
        [(0, 1), (0, 2), (2, 3), (2, 4), (3, 5)],  # keys of padding are not read
        whole,
    ]
    assert bounds(True, 130, 128, ROWS, ROWS)[3] == [(0, 1), (0, 2), (0, 3), (1, 4), (2, 5)]
    padding = np.where(np.arange(640) < 200, ROWS[:1], 0)
    assert bounds(True, 0, 128, padding, padding) == [[(0, 1), (0, 2)]]
    # Of a question after 512 positions of an image only the block with its words is read.
    text = np.where(np.arange(768) < 530, 1, 0)[None]
    assert bounds(False, 0, 640, np.ones((1, 640), int), text) == [[(0, 5)]]


def test_long_rows_of_a_tpu_get_splash(monkeypatch):
    monkeypatch.setattr(segment_flash_tpu, "_KEY_BYTES", 1024)
    (q, k, v, _), *segments = inputs("packed")
    run = functools.partial(flash.tpu_attention, interpret=True)
    text = str(jax.make_jaxpr(lambda *x: run(*x, *map(jnp.asarray, segments), True))(q, k, v))
    assert "splash_mha_fwd" in text and "segment_flash_tpu" not in text


def test_triton_skips_blocks_of_other_segments():
    """Rows of segments one after the other, and one whose segments come in any order: nobody may be left out."""
    in_order, mixed = np.repeat([1, 2, 3, 0], [70, 60, 62, 64]), np.resize([3, 1, 2], 256)
    first, last = segment_flash.ranges(jnp.asarray(np.stack([np.where(in_order, in_order, 9), mixed])), 64, 32)
    np.testing.assert_array_equal(first, [[0, 0, 2, 6], [0] * 4])  # the second and third begin in segments 1 and 2
    np.testing.assert_array_equal(last, [[2, 2, 3, 3, 3, 3, 4, 4], [4] * 8])


@pytest.mark.parametrize("case", CASES)
def test_cudnn_is_asked_for_what_it_can_do(case, monkeypatch):
    """Its gradient is NaN where a query sees no key, and it refuses to train on odd lengths."""
    calls, real = [], jax.nn.dot_product_attention

    def record(q, k, v, **arguments):
        calls.append((q, k, arguments.get("mask")))
        return real(q, k, v, **arguments)

    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    (q, k, v, _), *segments = inputs(case)
    segments = [None if s is None else jnp.asarray(s) for s in segments]
    if segments[0] is None:
        q, k, v = q[:, 1:], k[:, 1:], v[:, 1:]
    ours = flash.cudnn_attention(q, k, v, *segments, *CASES[case][2:4], implementation="xla")
    theirs = reference_attention(q, k, v, *segments, *CASES[case][2:4])
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    [(q, k, mask)] = calls
    assert q.shape[1] % 2 == 0 and k.shape[1] % 2 == 0
    assert mask is None or np.asarray(mask).any(-1).all()


@pytest.mark.parametrize("case", CASES)
def test_each_device_gets_its_kernel(case):
    q_segments, _, causal, window, *_ = CASES[case]
    arguments = (400, 400, jnp.bfloat16, q_segments is not None, causal, window)
    assert attention.choose("tpu", *arguments) is flash.tpu_attention
    expected = flash.triton_attention if case == "packed" else flash.cudnn_attention
    assert attention.choose("gpu", *arguments) is expected
    assert attention.choose("gpu", 400, 400, jnp.float32, *arguments[3:]) is reference_attention
    for platform in ("tpu", "gpu"):
        assert attention.choose(platform, 1, 4000, *arguments[2:]) is reference_attention


def test_a_cpu_without_a_compiler_gets_the_kernels_of_xla(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "available", lambda: False)
    rest = (jnp.bfloat16, True, True, 0)
    assert attention.choose("cpu", 400, 400, *rest) is attention.blocked_attention
    assert attention.choose("cpu", 1, 4000, *rest) is reference_attention


@pytest.mark.parametrize(
    ("platform", "kernel", "case", "call"),
    [
        ("tpu", flash.tpu_attention, "packed", ("tpu_custom_call", 2)),
        ("tpu", flash.tpu_attention, "window", ("tpu_custom_call", 2)),
        ("tpu", flash.tpu_attention, "late text", ("tpu_custom_call", 2)),
        ("tpu", flash.splash_attention, "packed", ("tpu_custom_call", 3)),
        ("cuda", flash.triton_attention, "packed", ("__gpu", 3)),
    ],
)
def test_kernels_lower_for_their_device_without_one(platform, kernel, case, call):
    (*qkv, _), *segments = inputs(case, 96, jnp.bfloat16)

    def loss(*arrays):
        return kernel(*arrays, *map(jnp.asarray, segments), *CASES[case][2:4]).astype(jnp.float32).sum()

    with naming_the_gpu() if platform == "cuda" else contextlib.nullcontext():
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*qkv)
        assert traced.lower(lowering_platforms=(platform,)).as_text().count(call[0]) >= call[1]


def naming_the_gpu():
    """From 0.11 on JAX lowers Triton kernels for a GPU that is there or described."""
    if jax.__version_info__ < (0, 11):
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU: run with JAX_PLATFORMS=cuda")
@pytest.mark.parametrize("size", [72, 96, 128])
@pytest.mark.parametrize("case", CASES)
def test_the_chosen_kernel_on_this_gpu(case, size):
    theirs = run(reference_attention, case, size=size)
    ours = run(attention.attention, case, size=size, dtype=jnp.bfloat16)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=0.03 * np.abs(b).max())


@pytest.mark.parametrize(("policy", "times"), [("full", 2), ("attention", 1), ("dots", 1)])
@pytest.mark.parametrize(
    ("kernel", "name"),
    [("tpu", "segment_flash_tpu_forward"), ("splash", "splash_mha_fwd"), ("triton", "segment_flash_forward")],
)
def test_forward_kernels_run_again_only_where_their_results_are_not_kept(kernel, name, policy, times):
    kernels = {"tpu": flash.tpu_attention, "splash": flash.splash_attention, "triton": flash.triton_attention}
    run = kernels[kernel]
    segments = jnp.ones((1, 128), jnp.int32)

    def layer(x, _):
        return run(2 * x, x, x, segments, segments, True), None

    def total(x):
        kept = jax.checkpoint(layer, policy=POLICIES[policy], prevent_cse=False)
        return jax.lax.scan(kept, x, length=2)[0].astype(jnp.float32).sum()

    text = str(jax.make_jaxpr(jax.grad(total))(jnp.ones((1, 128, 2, 64), jnp.bfloat16)))
    assert len(re.findall(rf"name=\S*{name}", text)) == times
