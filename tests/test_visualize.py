"""Attention pictures: weights are those of the layers, the word's tokens are found, figures are files that open."""

import dataclasses
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest
from helpers import tiny_run
from helpers.fixtures import params, tiny
from PIL import Image

from fusion_jax.config import RunConfig, from_dict
from fusion_jax.data.tokenizer import load_tokenizer
from fusion_jax.errors import UserError
from fusion_jax.inference import attention_maps, attention_weights
from fusion_jax.inference.attention_averages import chosen, exchange_maps
from fusion_jax.inference.attention_maps import levels, without_part
from fusion_jax.inference.attention_pictures import (
    draw,
    draw_side_by_side,
    draw_small,
    pixels,
    save,
)
from fusion_jax.inference.attention_weights import encoder_weights, exchange_weights, llm_weights
from fusion_jax.inference.word_tokens import word_tokens
from fusion_jax.models.fusion import Fusion
from fusion_jax.synth.tokenizer import train_tokenizer
from fusion_jax.training.about import describe_run
from fusion_jax.training.checkpoint_folders import FOLDER

QUESTION = "Where is the extraordinary white star? A star is white."
SIZES = {"llm.vocab_size": 640, "llm.layers": 3, "exchange.layers": 2, "exchange.stride": 2}
MODELS = {
    "paper": tiny("paper", **SIZES),
    "released": tiny("released", **SIZES),
    "no mask": tiny("paper", mask="none", **SIZES),
    "tiles": tiny("paper", tile_grids=((1, 2),), tile_tokens=4, **SIZES),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("visualize")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (30, 60, 3)).astype(np.uint8)).save(folder / "wide.png")
    (folder / "broken.png").write_bytes(b"no image")
    train_tokenizer(["Where is the white star?", "A star is white."] * 20, folder / "tokenizer", vocab_size=300)
    return folder


@pytest.fixture(scope="module")
def config(folder):
    return from_dict(RunConfig, tiny_run.get_config(str(folder)).to_dict())


@pytest.fixture(scope="module")
def ask(folder, config):
    """levels of one of MODELS with random weights."""
    tokenizer = load_tokenizer(folder / "tokenizer")

    def ask(name, question=QUESTION, word="star", image="wide.png", **arguments):
        model = Fusion(dataclasses.replace(MODELS[name], **arguments.pop("changes", {})))
        weights = params(MODELS[name])
        return levels(model, weights, config, tokenizer, folder / image, question, word, **arguments)

    return ask


@pytest.fixture(scope="module")
def measured(ask):
    return {name: ask(name) for name in MODELS}


@pytest.fixture(scope="module")
def saved(folder, config):
    """A checkpoint of the paper model."""
    config = dataclasses.replace(config, model=MODELS["paper"])
    about = describe_run(config, load_tokenizer(folder / "tokenizer"))
    step = folder / "run" / "stage2" / FOLDER / "8"
    ocp.save_checkpointables(step, {"params": params(MODELS["paper"]), "about": about})
    return step


@pytest.mark.parametrize("name", MODELS)
def test_the_weights_reproduce_every_layers_output(name, folder, config):
    c, weights = MODELS[name], params(MODELS[name])
    tokenizer = load_tokenizer(folder / "tokenizer")
    example = attention_maps.make_prompt(c, config.template, tokenizer, folder / "wide.png", QUESTION, True)
    batch = attention_maps.lay_out_prompt(c, example, 4)

    def wanted(module, method):
        return method == "__call__" and module.name in ("query", "key", "value", "out", "norm")

    model = Fusion(c)
    (hidden, _, _), kept = jax.jit(lambda p, b: attention_weights.captured(model, p, b, wanted))(weights, batch)
    plain, _, _ = jax.jit(lambda p, b: model.apply({"params": p}, b))(weights, batch)
    # Looking changes nothing; keeping more results, XLA fuses otherwise, so the last bit may differ.
    np.testing.assert_allclose(hidden, plain, rtol=0, atol=2e-6)
    kept = kept["intermediates"]

    tree, half = weights["vision"]["layers"]["layer"], c.vision.early_layers
    batch = jax.tree.map(jnp.asarray, batch)
    text = batch.crop_text_mask[0].astype(jnp.int32)
    real = np.concatenate([np.ones((len(text), c.vision.patches)), text], 1)[0] > 0
    for i in range(c.encoder_layers):
        layer, j = (kept["vision"]["layers"]["early"], i) if i < half else (kept["vision"]["layers"]["late"], i - half)
        q, k, v = (layer[part]["__call__"][0][j] for part in ("query", "key", "value"))
        w = encoder_weights(c, q, k, text, i < half)
        np.testing.assert_allclose(w.sum(-1)[:, :, real], 1, atol=1e-5)
        attended = jnp.einsum("nhqk,nkhd->nqhd", w, v.reshape(*v.shape[:2], c.vision.heads, -1)).reshape(v.shape)
        out = attended @ tree["out"]["kernel"][i] + tree["out"]["bias"][i]
        np.testing.assert_allclose(out[:, real], layer["out"]["__call__"][0][j][:, real], atol=2e-5)

    decoder = kept["llm"]
    q, k, v, outs = (attention_weights.of_layers(c, decoder, part) for part in ("query", "key", "value", "out"))
    kernels = [
        weights["llm"][f"stack_{i}"][f"layer_{j}"]["out"]["kernel"][block]
        for i, stack in enumerate(c.stacks())
        for block in range(stack.blocks)
        for j in range(stack.layers)
    ]
    here = batch.segment_ids[0] > 0
    for i, kernel in enumerate(kernels):
        w = llm_weights(c, q[i], k[i], batch.segment_ids, batch.positions)
        np.testing.assert_allclose(w.sum(-1)[:, :, here], 1, atol=1e-5)
        values = jnp.repeat(v[i].reshape(*v[i].shape[:2], c.llm.kv_heads, -1), c.llm.heads // c.llm.kv_heads, 2)
        out = jnp.einsum("bhqk,bkhd->bqhd", w, values).reshape(*v[i].shape[:2], -1) @ kernel
        np.testing.assert_allclose(out[:, here], outs[i][:, here], atol=2e-5)

    q, k, v, outs = (attention_weights.of_exchanges(c, decoder, part) for part in ("query", "key", "value", "out"))
    windows = batch.windows[0, 0]
    stacks = [i for i, stack in enumerate(c.stacks()) if stack.exchange]
    kernels = jnp.concatenate([weights["llm"][f"stack_{i}"]["exchange"]["out"]["kernel"] for i in stacks])
    for i in range(c.exchange_layers):
        w = exchange_weights(c, q[i][0, 0], k[i][0], windows)
        np.testing.assert_allclose(w.sum(-1), 1, atol=1e-5)
        values = v[i][0][np.maximum(windows, 0)].reshape(*windows.shape, c.exchange.heads, -1)
        out = jnp.einsum("hlm,lmhd->lhd", w, values).reshape(len(windows), -1) @ kernels[i]
        np.testing.assert_allclose(out, outs[i][0, 0], atol=2e-5)


def test_levels_have_the_documented_shapes(measured):
    for name, one in measured.items():
        c = MODELS[name]
        assert one.whole.pixel.shape == one.whole.pixel_back.shape == (c.encoder_layers, c.vision.heads, 3, 3)
        assert one.whole.question.shape == (3, c.llm.heads, 3, 3)
        assert one.whole.space.shape == (3, 3) and np.abs(one.whole.space).max() <= 1 + 1e-6
        assert (one.whole.pixel.sum((2, 3)) <= 1 + 1e-5).all() and (one.whole.question.sum((2, 3)) < 1).all()
        assert one.exchange.shape[:3] == (2, c.exchange.heads, 4) and one.windows.shape == one.exchange.shape[2:]
        assert one.exchange_after == (0, 2) and one.early == 2 and one.latents == 4
        assert one.side == (6 if name == "released" else 3)
        assert exchange_maps(one).shape == (2, one.side, one.side)
    # The early half hides the text from patches in `paper`, not in `released`, where text attends evenly.
    assert not measured["paper"].whole.pixel_back[:2].any() and measured["paper"].whole.pixel_back[2:].all()
    assert measured["released"].whole.pixel_back.all()
    np.testing.assert_allclose(np.ptp(measured["released"].whole.pixel[:2], axis=(2, 3)), 0, atol=1e-6)
    tiles = measured["tiles"].tiles
    assert measured["paper"].tiles is None and tiles.space.shape == (2, 4) and tiles.question.shape[2:] == (2, 4)
    assert tiles.pixel.shape[2:] == (3, 6)
    assert tiles.extent == (0, 1, 0, 1)  # a 2:1 image fills 1 x 2 tiles


def test_the_words_tokens_are_found(folder, measured):
    tokenizer = load_tokenizer(folder / "tokenizer")
    ids = tokenizer.encode(QUESTION)

    def spelled(word):
        return [tokenizer.decode([ids[i]]).strip() for i in word_tokens(tokenizer, ids, QUESTION, word)]

    assert (
        spelled("star") == spelled("STAR") and "".join(spelled("star")) == "starstar"
    )  # both of them, nothing of others
    pieces = spelled("extraordinary")
    assert len(pieces) > 1 and "".join(pieces) == "extraordinary"
    assert "".join(spelled("white  star")) == "whitestar"
    assert "".join(measured["paper"].tokens) == "starstar"
    unspaced = "这是猫吗"
    ids = tokenizer.encode(unspaced)  # bytes: one character is several tokens
    in_unspaced = word_tokens(tokenizer, ids, unspaced, "猫")
    assert tokenizer.decode([ids[i] for i in in_unspaced]).strip() == "猫"


def test_a_longer_word_is_the_mean_of_its_tokens(ask):
    both = ask("paper", "Is the star white?", "star white").whole
    one, other = (ask("paper", "Is the star white?", word) for word in ("star", "white"))
    n, m = len(one.tokens), len(other.tokens)
    mean = (n * one.whole.question + m * other.whole.question) / (n + m)
    np.testing.assert_allclose(both.question, mean, atol=1e-6)
    np.testing.assert_allclose(both.pixel, (n * one.whole.pixel + m * other.whole.pixel) / (n + m), atol=1e-6)
    np.testing.assert_allclose(both.pixel_back, one.whole.pixel_back + other.whole.pixel_back, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_parts_switch_off_on_the_same_weights(name, ask, measured):
    without_a = ask(name, changes={"text_guided": False})
    assert without_a.whole.pixel is None and without_a.exchange is not None
    assert np.abs(without_a.whole.space - measured[name].whole.space).max() > 1e-4
    without_c = ask(name, exchange=False)
    assert without_c.exchange is None and without_c.latents == 0
    np.testing.assert_allclose(without_c.whole.pixel, measured[name].whole.pixel, atol=1e-6)
    # Other tokens in the row, so other attention in the LLM from the first layer on.
    assert np.abs(without_c.whole.question[0] - measured[name].whole.question[0]).max() > 1e-5


def test_figures_are_files_that_open(measured, ask, tmp_path):
    beside = {"A off": ask("paper", changes={"text_guided": False}), "C off": ask("paper", exchange=False)}
    figures = {"tiles": draw(measured["tiles"], "late", [0])}
    for name, figure in {**figures, "beside": draw_side_by_side(beside)}.items():
        png, svg = save(figure, tmp_path / "new" / f"{name}.png")
        with Image.open(png) as image:
            image.load()
            assert image.format == "PNG" and min(image.size) > 400
        assert ElementTree.parse(svg).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    titles = [axes.get_title() for axes in figures["tiles"].axes]
    pixel = [title.partition("word to patches")[2] for title in titles if "word to patches" in title]
    # Tiles are encoded one by one, so their attention has no common share.
    assert len(pixel) == 2 and re.fullmatch(r" \(\d+%\)", pixel[0]) and pixel[1] == ""
    assert "Exchange 2 of 2\nafter LLM layer 2" in titles
    assert (
        "l² = 4" in figures["tiles"].get_supxlabel() and "Layers: late; heads: 0." in figures["tiles"].get_supxlabel()
    )


def test_the_small_figure_has_all_levels_in_two_columns(measured, ask):
    for one, last in (
        (measured["released"], "Exchange: latents to image\nmean of 2 layer(s)"),
        (ask("paper", exchange=False), "Image\n(no exchange)"),
        (ask("paper", changes={"text_guided": False}), "Exchange: latents to image\nmean of 2 layer(s)"),
    ):
        figure = draw_small(one)
        picture = pixels(figure, 170)
        assert picture.dtype == np.uint8 and picture.shape[1] == round(2 * 2.35 * 170) and picture.shape[2] == 3
        assert picture.std() > 20
        panels = [axes for axes in figure.axes if axes.get_title()]
        titles = [axes.get_title().partition(":")[0] for axes in panels]
        assert titles[:3] == ["Pixel level", "Space level", "Question level"] and panels[3].get_title() == last
        assert [len(axes.images) for axes in panels[1:3]] == [2, 2]  # the image and the map over it
        assert len(panels[0].images) == (1 if one.whole.pixel is None else 2)


def test_layers_and_heads_are_chosen():
    assert chosen("all", 5, 2, "x").tolist() == chosen("mean", 5, 2, "x").tolist() == [0, 1, 2, 3, 4]
    assert chosen("early", 5, 2, "x").tolist() == [0, 1] and chosen("late", 5, 2, "x").tolist() == [2, 3, 4]
    assert chosen("1,4", 5, 2, "x").tolist() == [1, 4]
    with pytest.raises(UserError, match="layers of the LLM: there is no 5; numbers go from 0 to 4"):
        chosen("1,5", 5, 2, "layers of the LLM")
    with pytest.raises(UserError, match="neither a known word nor numbers"):
        chosen("middle", 5, 2, "layers")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"word": "dog"},
            "'dog' is not in the question; its words are: Where, is, the, extraordinary, white, star, A.",
        ),
        ({"word": "sta"}, "'sta' is not in the question"),
        ({"word": "assistant"}, "'assistant' is not in the question"),
        ({"word": " "}, "is not in the question"),
        ({"question": " "}, "The question is empty."),
        ({"image": "broken.png"}, "cannot be asked about this image: .*broken.png"),
        ({"image": "none.png"}, "cannot be asked about this image: .*none.png"),
        ({"latents": 9}, "9 latents: the model has tables for 4."),
    ],
)
def test_bad_input_is_one_sentence(ask, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        ask("paper", **arguments)
    assert "\n" not in str(error.value)


def test_the_command(saved, folder, tmp_path):
    command = [
        sys.executable,
        "-m",
        "fusion_jax.visualize",
        f"--checkpoint={saved}",
        f"--image={folder / 'wide.png'}",
    ]
    command += [f"--question={QUESTION}", f"--out={tmp_path / 'figure'}"]
    root = Path(__file__).parents[1]
    done = subprocess.run([*command, "--word=star", "--compare=C"], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "figure.png").stat().st_size > 10_000 and (tmp_path / "figure.svg").is_file()
    with pytest.raises(UserError, match=re.escape("--compare B: the mapping loss acts in training alone")):
        without_part(MODELS["paper"], "B")
