"""Dense products on CPU: equal to `jnp.dot`, gradients included, and in forms that XLA computes fast."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.fixtures import random_array

from fusion_jax.models import layers, partition


def arrays(dtype):
    return [jnp.asarray(random_array(*shape, seed=s), dtype) for s, shape in enumerate([(2, 5, 6), (6, 4), (2, 5, 4)])]


def values_and_gradients(product, dtype):
    x, kernel, cotangent = arrays(dtype)
    y, pull = jax.vjp(product, x, kernel)
    return [np.asarray(a, np.float32) for a in (y, *pull(cotangent))]


@pytest.mark.parametrize("dtype, atol", [(jnp.float32, 1e-6), (jnp.bfloat16, 0.05)])
def test_product_is_the_dot_product(dtype, atol):
    ours = values_and_gradients(layers.product, dtype)
    for one, plain in zip(ours, values_and_gradients(jnp.dot, jnp.float32), strict=True):
        np.testing.assert_allclose(one, plain, atol=atol)


def products(dtype, platform):
    """Types of the operands and result of each product in the program of values and gradients."""
    with partition.compiled_for(platform):
        text = jax.jit(lambda *a: jax.vjp(layers.product, *a[:2])[1](a[2]), keep_unused=True).lower(*arrays(dtype))
    found = re.findall(r"dot_general .* : \(tensor<(\S+)>, tensor<(\S+)>\) -> tensor<(\S+)>", text.as_text())
    return {tuple(shape.split("x")[-1] for shape in one) for one in found}, [
        len(one[0].split("x")) - 1 for one in found
    ]


def test_products_of_16_bits_have_a_float32_result_on_cpu_alone():
    assert products(jnp.bfloat16, "cpu")[0] == {("bf16", "bf16", "f32")}
    assert products(jnp.bfloat16, "tpu")[0] == {("bf16", "bf16", "bf16")}


def test_products_have_one_axis_of_rows_on_cpu_alone():
    assert set(products(jnp.float32, "cpu")[1]) == {2}
    assert 3 in products(jnp.float32, "tpu")[1]
