"""Dynamic resolution in the exported PyTorch model: equal to the JAX model, whatever the images' shapes."""

import dataclasses
import functools
import tempfile
from pathlib import Path

import numpy as np
import pytest
from helpers import exported_model as exported
from helpers import fixtures
from helpers.exported_model import torch

from fusion_jax.batch import PIXELS
from fusion_jax.data import tiles
from fusion_jax.data.tiles import choose_tiling
from fusion_jax.interop.shapes import parameter_shapes
from fusion_jax.interop.torch import names
from fusion_jax.models.config import VARIANTS
from fusion_jax.models.fusion import Fusion

GRIDS = ((1, 1), (1, 2), (2, 1), (2, 2), (1, 3))
# Tiles of 2 x 2 tokens whose latents' cells overlap; of all 3 x 3 patches, with the image's tokens resized.
MODELS = {
    "resized tiles": fixtures.tiny(tile_grids=GRIDS, tile_tokens=4, latent_counts=(9,)),
    "whole tiles": fixtures.tiny(tile_grids=GRIDS, image_tokens=4, latent_init="pooled", taps="released"),
}
SIZES = ((640, 480), (100, 200), (20, 20), (900, 250), (900, 100))  # 2 x 2, 2 x 1, none, and twice 1 x 3, padded


@functools.cache
def tiny_model(name):
    with tempfile.TemporaryDirectory() as folder:
        return exported.export(Path(folder), MODELS[name], fixtures.params(MODELS[name]))


def examples(config, sizes=SIZES):
    """An image of each size in one or two rounds, and a text alone."""
    size, made = config.vision.image_size, []
    for seed, shape in enumerate(sizes):
        tiling = choose_tiling(shape, GRIDS, size)
        crops = np.random.default_rng(seed).integers(0, 256, (tiling.crops, 1, size, size, 3)).astype(np.uint8)
        example = fixtures.example(config, seed, rounds=1 + seed % 2)
        made.append(dataclasses.replace(example, crops=crops, tilings=(tiling,)))
    return [*made, fixtures.example(config, 9, image=False)]


def torch_inputs(config, made, batch, side="right", labels=True):
    """As the exported processor gives them: one image a row, its tiles first and zeros behind them, the whole last."""
    given = exported.torch_inputs(batch, side, labels)
    per_image, per_tile = config.tokens_per_image, config.tokens_per_tile
    k, size = batch.crop_kind.shape[1], config.vision.image_size
    for name in ("image_kind", "question_ids", "question_mask"):
        given[name] = given[name][:, :1]
    given["round_image"] = torch.where(given["round_image"] >= 0, 0, -1)
    most = 1 + max(e.tilings[0].rows * e.tilings[0].columns for e in made if e.tilings)
    pixels, tilings = np.zeros((len(made), 1, most, 3, size, size), np.float32), np.zeros((len(made), 1, 6), np.int64)
    for row, example in enumerate(made):
        if example.tilings:
            crops = example.crops[:, 0].transpose(0, 3, 1, 2) / 127.5 - 1
            pixels[row, 0, : len(crops) - 1], pixels[row, 0, -1] = crops[1:], crops[0]
            [tiling] = example.tilings
            if tiling.rows:
                tilings[row, 0] = tiling.rows, tiling.columns, *tiling.box(size, int(per_tile**0.5))
        index = given["visual_index"][row]
        latents = index >= k * (per_image + per_tile) + 1
        image = (index >= 0) & ~latents
        table = per_image + tiles.most_tokens(GRIDS, per_tile)
        index[latents] += table - (k * (per_image + per_tile) + 1)
        index[image] = torch.arange(int(image.sum()))
    given["pixel_values"], given["tilings"] = torch.tensor(pixels), torch.tensor(tilings)
    assert given["image_kind"][:-1].eq(PIXELS).all()
    return given


@pytest.mark.parametrize("name", MODELS)
def test_equals_jax(name):
    config, model = MODELS[name], tiny_model(name)
    params, made = fixtures.params(config), examples(config)
    batch = fixtures.lay(config, made)
    hidden, _ = fixtures.forward_fn(config)(params, batch)
    logits = np.asarray(Fusion(config).apply({"params": params}, hidden, method="logits"))
    for side in ("left", "right"):
        inputs = torch_inputs(config, made, batch, side)
        model.zero_grad()
        out = model(**inputs)
        exported.assert_close(out.logits[inputs["attention_mask"].bool()], logits[batch.segment_ids > 0], 2e-4)
    if name != "resized tiles":
        return
    (loss, parts), grads = fixtures.grad_fn(config)(params, batch)
    for key, expected in {"loss": loss, **parts}.items():
        assert abs(float(out[key].detach()) - float(expected)) <= 1e-5, key
    out.loss.backward()
    ours = {key: p.grad.numpy() for key, p in model.named_parameters() if p.grad is not None}
    for key, expected in exported.named_tensors(config, grads).items():
        np.testing.assert_allclose(ours.get(key, 0.0), expected, rtol=1e-3, atol=2e-5, err_msg=key)
    assert np.abs(ours["model.row_end.weight"]).max() > 0


def test_parts_of_a_batch_and_generation_are_as_the_whole():
    """What an index means does not hang on the images beside it, nor on how many views there is room for."""
    config, model = MODELS["resized tiles"], tiny_model("resized tiles")
    made = [
        dataclasses.replace(e, input_ids=e.input_ids[:-3], labels=e.labels[:-3]) for e in examples(config)
    ]  # without the answer of three tokens
    batch = fixtures.lay(config, made)
    inputs = torch_inputs(config, made, batch, "left", labels=False)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    length = inputs["input_ids"].shape[1]
    with torch.no_grad():
        together = model(**inputs).logits
        for row in range(len(made)):
            alone = model(**{key: value[row : row + 1] for key, value in inputs.items()}).logits[0]
            real = inputs["attention_mask"][row].bool()
            torch.testing.assert_close(alone[real], together[row][real], rtol=0, atol=1e-5)
    answers = model.generate(**inputs, **options)[:, length:]
    np.testing.assert_array_equal(model.generate(**inputs, **options, use_cache=False)[:, length:], answers)
    with pytest.raises(ValueError, match="image without tilings"):
        model(**{key: value for key, value in inputs.items() if key != "tilings"})


def test_every_tensor_of_flare_x_has_a_place():
    config = VARIANTS["flare_x"]["3b"]
    shapes = parameter_shapes(config)
    listed = names.rows(config, shapes)
    assert {path for row in listed for path, _ in row.paths} == set(shapes)
    assert [row.shape for row in listed if row.name == "model.row_end.weight"] == [(config.llm.width,)]
    assert len({row.name for row in listed}) == len(listed) and not any("_proj.0." in row.name for row in listed)
