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

from fusion_jax.models import attention, cpu_attention, flash, segment_flash
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


def test_blocks_of_other_segments_are_skipped():
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
    assert attention.choose("tpu", *arguments) is flash.splash_attention
    expected = flash.triton_attention if case == "packed" else flash.cudnn_attention
    assert attention.choose("gpu", *arguments) is expected
    assert attention.choose("gpu", 400, 400, jnp.float32, *arguments[3:]) is reference_attention
    for platform in ("tpu", "gpu"):
        assert attention.choose(platform, 1, 4000, *arguments[2:]) is reference_attention


def test_a_cpu_without_a_compiler_gets_the_kernels_of_xla(monkeypatch):
    monkeypatch.setattr(cpu_attention, "available", lambda: False)
    rest = (jnp.bfloat16, True, True, 0)
    assert attention.choose("cpu", 400, 400, *rest) is attention.blocked_attention
    assert attention.choose("cpu", 1, 4000, *rest) is reference_attention


@pytest.mark.parametrize(
    ("platform", "kernel", "case", "call"),
    [
        ("tpu", flash.splash_attention, "packed", "tpu_custom_call"),
        ("tpu", flash.splash_attention, "late text", "tpu_custom_call"),
        ("cuda", flash.triton_attention, "packed", "__gpu"),
    ],
)
def test_kernels_lower_for_their_device_without_one(platform, kernel, case, call):
    (*qkv, _), *segments = inputs(case, 96, jnp.bfloat16)

    def loss(*arrays):
        return kernel(*arrays, *map(jnp.asarray, segments), *CASES[case][2:4]).astype(jnp.float32).sum()

    with naming_the_gpu() if platform == "cuda" else contextlib.nullcontext():
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*qkv)
        assert traced.lower(lowering_platforms=(platform,)).as_text().count(call) >= 3


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
@pytest.mark.parametrize(("kernel", "name"), [("splash", "splash_mha_fwd"), ("triton", "segment_flash_forward")])
def test_forward_kernels_run_again_only_where_their_results_are_not_kept(kernel, name, policy, times):
    run = {"splash": flash.splash_attention, "triton": flash.triton_attention}[kernel]
    segments = jnp.ones((1, 128), jnp.int32)

    def layer(x, _):
        return run(2 * x, x, x, segments, segments, True), None

    def total(x):
        kept = jax.checkpoint(layer, policy=POLICIES[policy], prevent_cse=False)
        return jax.lax.scan(kept, x, length=2)[0].astype(jnp.float32).sum()

    text = str(jax.make_jaxpr(jax.grad(total))(jnp.ones((1, 128, 2, 64), jnp.bfloat16)))
    assert len(re.findall(rf"name=\S*{name}", text)) == times
