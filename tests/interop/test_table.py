"""What the table's names mean: numpy that reads our parameters by the published names, without golden files or torch.

A row that points to another parameter of the same shape comes back bit for bit in every round trip.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.fixtures import example as make_example
from helpers.fixtures import flat, forward_fn, image_windows, lay, params, random_array, tiny

from fusion_jax.interop import table
from fusion_jax.models.exchange import ExchangePlan, SemanticExchange
from fusion_jax.models.fusion import Fusion
from fusion_jax.models.vision import VisionEncoder

CONFIG = tiny(**{"llm.layers": 3, "llm.qkv_bias": True, "exchange.stride": 2, "exchange.layers": 2})
C, V = CONFIG.llm, CONFIG.vision


@functools.cache
def published(fused=False):
    """Our parameters by published name, float64."""
    ours = flat(params(CONFIG))
    rows = table.published_rows(CONFIG, {path: x.shape for path, x in ours.items()}, fused)
    get = lambda path, index: ours[path] if index is None else ours[path][index]  # noqa: E731
    return {row.name: table.to_published(row, get, CONFIG).astype(np.float64) for row in rows}


def linear(x, name):
    weights = published()
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)


def rms_norm(x, name):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + C.norm_eps) * published()[f"{name}.weight"]


def layer_norm(x, name, eps):
    x = x - x.mean(-1, keepdims=True)
    weights = published()
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def gelu(x, tanh=False):
    if tanh:
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def attend(q, k, v, heads, groups, causal=False):
    """q (Q, heads d), k and v (K, groups d): each group of keys serves heads / groups heads."""
    q, k, v = (x.reshape(len(x), n, -1) for x, n in ((q, heads), (k, groups), (v, groups)))
    k, v = (x.repeat(heads // groups, 1) for x in (k, v))
    scores = np.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    weights = np.exp(scores) * (np.tri(*scores.shape[1:]) if causal else 1)
    return np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), v).reshape(len(q), -1)


def rotate(x, heads):
    """Positions 0, 1, ...; rotate-half form."""
    half = C.per_head // 2
    angles = np.arange(len(x))[:, None, None] * C.rope.theta ** -(np.arange(half) / half)
    first, second = np.split(x.reshape(len(x), heads, -1), 2, -1)
    turned = [first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)]
    return np.concatenate(turned, -1).reshape(len(x), -1)


def test_names_of_the_language_model():
    batch = lay(CONFIG, [make_example(CONFIG, 0, image=False, question=7)])
    hidden, _ = forward_fn(CONFIG)(params(CONFIG), batch)
    logits = Fusion(CONFIG).apply({"params": params(CONFIG)}, hidden, method="logits")[0]

    x = published()["model.embed_tokens.weight"][batch.tokens[0]]
    for i in range(C.layers):
        name = f"model.layers.{i}"
        y = rms_norm(x, f"{name}.input_layernorm")
        q, k, v = (linear(y, f"{name}.self_attn.{one}_proj") for one in "qkv")
        y = attend(rotate(q, C.heads), rotate(k, C.kv_heads), v, C.heads, C.kv_heads, causal=True)
        x = x + linear(y, f"{name}.self_attn.o_proj")
        y = rms_norm(x, f"{name}.post_attention_layernorm")
        gate = linear(y, f"{name}.mlp.gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(y, f"{name}.mlp.up_proj"), f"{name}.mlp.down_proj")
    np.testing.assert_allclose(logits, linear(rms_norm(x, "model.norm"), "lm_head"), atol=1e-4)


def test_fused_tensors_of_the_language_model():
    apart, fused = published(), published(fused=True)
    for i in range(C.layers):
        name = f"model.layers.{i}"
        for whole, parts in (
            ("self_attn.qkv_proj", "self_attn.{}_proj q k v"),
            ("mlp.gate_up_proj", "mlp.{}_proj gate up"),
        ):
            form, *names = parts.split()
            expected = np.concatenate([apart[f"{name}.{form.format(one)}.weight"] for one in names])
            np.testing.assert_array_equal(fused[f"{name}.{whole}.weight"], expected)


def test_names_of_the_tower():
    pixels = np.random.default_rng(0).integers(0, 256, (1, V.image_size, V.image_size, 3)).astype(np.uint8)
    encoder, weights = VisionEncoder(CONFIG), {"params": params(CONFIG)["vision"]}
    embedded = encoder.apply(weights, jnp.asarray(pixels), jnp.zeros(1, bool), method="embed")
    taps = encoder.apply(weights, {"guided": embedded}, None, None)["guided"][0]

    tower, side = "model.vision_tower.vision_tower.vision_model", V.grid
    kernel = published()[f"{tower}.embeddings.patch_embedding.weight"]  # (width, channels, rows, columns)
    patches = (pixels[0] / 127.5 - 1).reshape(side, V.patch_size, side, V.patch_size, 3)
    x = np.einsum("iajbc,wcab->ijw", patches, kernel).reshape(-1, V.width)
    x = x + published()[f"{tower}.embeddings.patch_embedding.bias"]
    states = [x + published()[f"{tower}.embeddings.position_embedding.weight"]]
    np.testing.assert_allclose(embedded[0], states[0], atol=1e-5)
    for i in range(CONFIG.encoder_layers):
        x, name = states[-1], f"{tower}.encoder.layers.{i}"
        y = layer_norm(x, f"{name}.layer_norm1", V.norm_eps)
        q, k, v = (linear(y, f"{name}.self_attn.{one}_proj") for one in "qkv")
        x = x + linear(attend(q, k, v, V.heads, V.heads), f"{name}.self_attn.out_proj")
        y = layer_norm(x, f"{name}.layer_norm2", V.norm_eps)
        states.append(x + linear(gelu(linear(y, f"{name}.mlp.fc1"), tanh=True), f"{name}.mlp.fc2"))
    half = V.early_layers
    means = [np.mean(states[:half], 0), np.mean(states[half : 2 * half], 0)]
    np.testing.assert_allclose(taps, np.concatenate(means, -1), atol=2e-5)


@pytest.mark.parametrize(("ours", "theirs"), [("vision_to_text", "mm_projector"), ("text_to_vision", "aux_projector")])
def test_names_of_the_projectors(ours, theirs):
    first, second = (jax.tree.map(np.float64, params(CONFIG)[ours][name]) for name in ("in", "out"))
    x = random_array(5, len(first["kernel"])).astype(np.float64)
    y = gelu(x @ first["kernel"] + first["bias"]) @ second["kernel"] + second["bias"]
    name = f"model.{theirs}"
    np.testing.assert_allclose(linear(gelu(linear(x, f"{name}.0")), f"{name}.2"), y, atol=1e-6)


@pytest.mark.parametrize(("number", "stack", "index"), [(0, "stack_0", 0), (1, "stack_1", 0)])
def test_names_of_the_exchange_layers(number, stack, index):
    """One round over one image of 3x3 tokens and 2x2 latents; H_P is at 6, the latents at 1 to 4."""
    assert [(s.blocks, s.layers, s.exchange) for s in CONFIG.stacks()] == [(1, 2, True), (1, 1, True)]
    x, context = random_array(1, 8, C.width), random_array(1, 9, C.width, seed=1)
    rounds = [np.array([[0]], np.int32), np.array([[6]], np.int32), np.array([[1]], np.int32)]
    windows = image_windows(rounds[0], 3, 2)
    plan = ExchangePlan(*map(jnp.asarray, (context, windows, *rounds)))
    layer = SemanticExchange(CONFIG.exchange.heads)
    weights = jax.tree.map(lambda a: a[index], params(CONFIG)["llm"][stack]["exchange"])
    out = layer.apply({"params": weights}, jnp.asarray(x), plan)[0]

    name, heads = f"model.vision_sampler_layers.{number}.layers.0", CONFIG.exchange.heads
    expected = x[0].astype(np.float64)
    c = linear(context[0].astype(np.float64), f"{name}.proj_context")

    def normed(x, one):
        inner = f"{name}.cross_attn.{one}_proj"
        return linear(layer_norm(x, f"{inner}.0", 1e-5), f"{inner}.1")

    for latent in range(4):
        p = linear(np.concatenate([x[0, 6], x[0, 1 + latent]]), f"{name}.proj_in")
        window = c[[place for place in windows[0, 0, latent] if place >= 0]]
        y = attend(normed(p, "q")[None], normed(window, "k"), normed(window, "v"), heads, heads)[0]
        y = layer_norm(linear(y, f"{name}.cross_attn.o_proj") + p, f"{name}.norm", 1e-5)
        expected[1 + latent] += linear(gelu(linear(y, f"{name}.proj_out.linear_1")), f"{name}.proj_out.linear_2")
    np.testing.assert_allclose(out, expected, atol=2e-5)


def test_learned_latents():
    np.testing.assert_array_equal(published()["model.latents.4"], params(CONFIG)["latents_4"])
