"""A model that compiles in seconds, weights and batches for it, and its compiled functions, shared by the tests."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from fusion_jax.batch import Batch, windows
from fusion_jax.data.conversation import ANSWER_START, IGNORE, IMAGE, LATENTS
from fusion_jax.data.examples import layout_spec
from fusion_jax.data.layout import Example, lay_out, measure
from fusion_jax.models import fusion
from fusion_jax.models.config import (
    PRESETS,
    QUADRANTS,
    ExchangeConfig,
    FusionConfig,
    LLMConfig,
    VisionConfig,
)
from fusion_jax.training.step import loss_and_parts

QUESTION_LENGTH = 6


def tiny(preset: str = "paper", **changes) -> FusionConfig:
    """3x3 patches, 4 encoder layers, 2 decoder layers, each with an exchange; changes such as `llm.layers`."""
    config = FusionConfig(
        vision=VisionConfig(image_size=24, patch_size=8, width=16, mlp_dim=24, layers=4, heads=2),
        llm=LLMConfig(vocab_size=61, width=16, mlp_dim=24, layers=2, heads=4, kv_heads=2),
        exchange=ExchangeConfig(start=0, stride=1, layers=2, heads=4),
        latent_counts=(4,),
        **PRESETS[preset],
    )
    top = {key: value for key, value in changes.items() if "." not in key}
    for part in ("vision", "llm", "exchange"):
        inner = {key.removeprefix(f"{part}."): v for key, v in changes.items() if key.startswith(f"{part}.")}
        top[part] = dataclasses.replace(getattr(config, part), **inner)
    return dataclasses.replace(config, **top)


def random_array(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def randomise(shapes, seed: int = 0):
    """Weights of these shapes with nothing left at 0 or 1, so that no part of a layer can hide."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        x = rng.standard_normal(leaf.shape).astype(np.float32)
        if path.endswith("scale"):
            return 1 + 0.1 * x
        if path.endswith("bias"):
            return 0.1 * x
        return 0.5 * x if path.endswith(("embedding", "row_end")) else x / np.sqrt(leaf.shape[-2])

    flat = flatten_dict(shapes, sep="/")
    return unflatten_dict({path: jnp.asarray(draw(path, leaf)) for path, leaf in flat.items()}, sep="/")


@functools.cache
def shapes(config: FusionConfig):
    """Parameter shapes; nothing is allocated or compiled."""
    return jax.eval_shape(functools.partial(fusion.init, config), jax.random.key(0))


@functools.cache
def params(config: FusionConfig, seed: int = 0):
    return randomise(shapes(config), seed)


def example(
    config: FusionConfig, seed: int = 0, *, image: bool = True, rounds: int = 1, question: int = 4, answer: int = 3
) -> Example:
    """A conversation of random ids: LATENTS before IMAGE in the first round, as the template writes them."""
    rng = np.random.default_rng(seed)
    ids, labels = [1], [IGNORE]
    latents = config.semantic_exchange and (image or config.text_only == "zero_image")

    def text(count):
        return rng.integers(3, config.llm.vocab_size, count).tolist()

    for r in range(rounds):
        ids += [*text(1), *([LATENTS] if latents else []), *([IMAGE] if image and r == 0 else []), *text(question)]
        labels += [IGNORE] * (len(ids) - len(labels))
        labels[-1] = ANSWER_START
        reply = text(answer)
        ids, labels = ids + reply, labels + reply
    side = config.vision.image_size
    crops = rng.integers(0, 256, (QUADRANTS + 1 if config.uses_quadrants else 1, side, side, 3)).astype(np.uint8)
    asked = rng.integers(3, config.llm.vocab_size, QUESTION_LENGTH - seed % 3).astype(np.int32)
    return Example(
        np.array(ids, np.int32),
        np.array(labels, np.int32),
        asked if image and config.text_guided else asked[:0],
        crops if image else None,
        f"example {seed}",
    )


def lay(config: FusionConfig, examples: Sequence[Example], length: int = 0, rounds: int = 2) -> Batch:
    """The examples as a batch, one a row, of the shortest length by default."""
    count = config.latent_counts[0] if config.semantic_exchange else 0
    spec = layout_spec(config, 1, QUESTION_LENGTH, rounds)
    length = length or max(measure(e, spec, count).length for e in examples)
    return lay_out(list(examples), layout_spec(config, length, QUESTION_LENGTH, rounds), count)


def mixed_batch(config: FusionConfig) -> Batch:
    """Four rows: one round, two rounds, text only, another image; lengths and supervised counts differ."""
    return lay(
        config,
        [
            example(config, 0, answer=5),
            example(config, 1, rounds=2, question=3),
            example(config, 2, image=False, answer=2),
            example(config, 3, question=2, answer=1),
        ],
        length=34,
    )


@functools.cache
def forward_fn(config: FusionConfig):
    """Compiled (params, batch) -> (hidden, Visual or None)."""
    model = fusion.Fusion(config)
    return jax.jit(lambda p, batch: model.apply({"params": p}, batch)[:2])


@functools.cache
def grad_fn(config: FusionConfig, dtype=jnp.float32, remat: str = "none"):
    """Compiled (params, batch) -> ((loss, parts), gradients)."""
    model = fusion.Fusion(config, dtype, remat)
    return jax.jit(jax.value_and_grad(lambda p, batch: loss_and_parts(model, p, batch), has_aux=True))


def flat(tree) -> dict[str, np.ndarray]:
    """Leaves by path."""
    return {path: np.asarray(leaf) for path, leaf in flatten_dict(tree, sep="/").items()}


def assert_trees_close(actual, expected, **tolerance) -> None:
    actual, expected = flat(actual), flat(expected)
    assert actual.keys() == expected.keys()
    for path in expected:
        np.testing.assert_allclose(actual[path], expected[path], err_msg=path, **tolerance)


def image_windows(round_image, side, cells):
    """`Batch.windows` where each row has a table of side x side images: (B, R, cells^2, M), -1 for absent rounds."""
    index, real = windows(side, cells)
    first = np.maximum(round_image, 0)[..., None, None] * side**2
    return np.where(real & (round_image >= 0)[..., None, None], first + index, -1).astype(np.int32)
