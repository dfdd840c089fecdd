"""Attention in C: block edges, masks, heads of all sizes, vectors of all widths, threads, and machines without it."""

import functools
import logging
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.fixtures import random_array

from fusion_jax.models import attention, cpu_attention, cpu_kernels

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler: XLA computes attention"
)
# name: (rows, queries, keys, heads, key heads, size, causal, window). A block has 96 keys and 8, 16 or 32 queries.
SHAPES = {
    "one key": (1, 1, 1, 1, 1, 8, False, 0),
    "a whole block": (1, 32, 96, 2, 2, 32, False, 0),
    "one more than a block": (2, 33, 97, 2, 1, 32, False, 0),
    "odd head": (2, 20, 41, 3, 3, 7, False, 0),
    "wide head": (1, 40, 150, 2, 1, 72, False, 0),
    "causal": (2, 210, 210, 4, 2, 16, True, 0),
    "window": (1, 230, 230, 2, 2, 24, True, 50),
    "narrow window": (1, 230, 230, 2, 2, 8, True, 1),
}


@pytest.fixture(autouse=True)
def library():
    assert cpu_kernels.available()


def arrays(name):
    rows, queries, keys, heads, kv_heads, size = SHAPES[name][:6]
    q, cotangent = (random_array(rows, queries, heads, size, seed=s) for s in (0, 1))
    k, v = (random_array(rows, keys, kv_heads, size, seed=s) for s in (2, 3))
    rng = np.random.default_rng(4)
    # Runs of segments with padding at the end; most blocks of keys see one segment, some several, some none.
    kv_segments = np.sort(rng.integers(1, 4, (rows, keys)), 1)
    kv_segments[:, keys - keys // 7 :] = 0
    q_segments = kv_segments if queries == keys else rng.integers(0, 4, (rows, queries))
    return (q, k, v), cotangent, (q_segments.astype(np.int32), kv_segments.astype(np.int32))


def results(kernel, name, packed=True):
    inputs, cotangent, segments = arrays(name)
    causal, window = SHAPES[name][6:]
    given = segments if packed else [np.ones_like(s) for s in segments]

    @jax.jit
    def run(q, k, v):
        out, pull = jax.vjp(lambda *a: kernel(*a, *map(jnp.asarray, given), causal, window), q, k, v)
        return out, *pull(jnp.asarray(cotangent))

    return [np.asarray(x) for x in run(*inputs)]


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "one segment"])
@pytest.mark.parametrize("name", SHAPES)
def test_equals_plain_attention(name, packed):
    ours = results(cpu_attention.compiled_attention, name, packed)
    for one, plain in zip(ours, results(attention.reference_attention, name, packed), strict=True):
        np.testing.assert_allclose(one, plain, atol=1e-5)


def test_large_scores_neither_overflow_nor_vanish():
    (q, k, v), _, _ = arrays("one more than a block")
    for scale in (30.0, 1e4):
        out, pull = jax.vjp(cpu_attention.compiled_attention, jnp.asarray(q) * scale, jnp.asarray(k), jnp.asarray(v))
        plain = attention.reference_attention(jnp.asarray(q) * scale, jnp.asarray(k), jnp.asarray(v))
        np.testing.assert_allclose(out, plain, atol=1e-4)
        assert all(np.isfinite(g).all() for g in pull(jnp.ones_like(out)))


def test_not_a_number_comes_out_where_it_went_in():
    (q, k, v), _, _ = arrays("one more than a block")
    q[0, 3, 0, 0] = np.nan
    out = np.asarray(cpu_attention.compiled_attention(*map(jnp.asarray, (q, k, v))))
    assert np.isnan(out[0, 3, 0]).any() and np.isfinite(out[1]).all() and np.isfinite(out[0, 4:]).all()


def test_programs_that_run_at_once_give_the_same_bits():
    (q, k, v), _, segments = arrays("causal")
    run = jax.jit(functools.partial(cpu_attention.compiled_attention, causal=True))
    expected = np.asarray(run(q, k, v, *segments))
    with ThreadPoolExecutor(4) as pool:
        for out in pool.map(lambda _: np.asarray(run(q, k, v, *segments)), range(40)):
            np.testing.assert_array_equal(out, expected)


def test_is_what_the_processor_runs():
    assert attention.choose("cpu", 769, 769, jnp.float32, True, False, 0) is cpu_attention.compiled_attention


@pytest.mark.parametrize("flags", [["-mavx2", "-mfma"], ["-mno-avx"], ["-O0"]], ids=["AVX2", "SSE", "not optimised"])
def test_narrower_vectors_give_the_same(tmp_path, flags):
    """The file is compiled for other processors, in a process of its own, where it takes the place of the usual one."""
    code = (
        "from fusion_jax.models import cpu_kernels; import sys\n"
        "cpu_kernels.FLAGS = (*(f for f in cpu_kernels.FLAGS if 'native' not in f), *sys.argv[1:])\n"
        "assert cpu_kernels.available()\n"
        "from models.test_cpu_attention import test_equals_plain_attention as t\n"
        "[t(name, True) for name in ('one more than a block', 'causal')]\n"
        "from pathlib import Path; import os\n"
        "assert len(list(Path(os.environ['XDG_CACHE_HOME'], 'fusion_jax').glob('cpu_kernels-*.so'))) == 1\n"
    )
    paths = os.pathsep.join(map(str, (Path(__file__).parents[1], Path(__file__).parents[2])))
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, "-c", code, *flags], env=environment, capture_output=True, text=True, timeout=300
    )
    if "failed: " in done.stderr and "unrecognized" in done.stderr:
        pytest.skip("another kind of processor")
    assert done.returncode == 0, done.stderr[-2000:]


def test_without_a_compiler(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(cpu_kernels, "_register", functools.cache(cpu_kernels._register.__wrapped__))
    with caplog.at_level(logging.INFO):
        chosen = [attention.choose("cpu", n, n, jnp.float32, True, False, 0) for n in (769, 9)]
    assert chosen == [attention.blocked_attention, attention.reference_attention]
    (record,) = caplog.records
    assert "no C compiler" in record.getMessage()
