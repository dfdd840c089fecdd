"""Measures where a model looks for one word of a question, as plain arrays on grids of the image.

    pixel level      encoder: the word's tokens attend to the patches, and the patches to them
    space level      cosine of each projected image token and the word's embedding, both at the LLM's input
    question level   LLM: the word's tokens attend to the image's tokens
    exchange         each latent attends to the tokens of its window, in every exchange layer

`attention_pictures` draws them; docs/pictures.md shows the figures.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from fusion_jax.batch import Batch
from fusion_jax.config import RunConfig
from fusion_jax.data import image as images
from fusion_jax.data import tiles
from fusion_jax.data.conversation import IMAGE_TAG
from fusion_jax.data.examples import ExampleMaker, layout_spec
from fusion_jax.data.layout import Example, lay_out, measure
from fusion_jax.data.sources import Record
from fusion_jax.data.tokenizer import Tokenizer
from fusion_jax.errors import BadRecord, UserError, check
from fusion_jax.inference.attention_weights import measure_word
from fusion_jax.inference.prompts import round_up
from fusion_jax.inference.word_tokens import word_tokens
from fusion_jax.models.config import FusionConfig
from fusion_jax.models.fusion import Fusion

BUCKET = 32  # lengths are rounded up to multiples of it by default, so that few programs serve many questions
LARGEST_SIDE = 1024  # pixels of the picture that is kept for drawing
# The model as trained, and what `without_part` switches off of it: the titles of the figures.
PARTS = {
    "": "as trained",
    "A": "A off: the encoder does not read the question",
    "B": "B off: trained without the mapping loss",
    "C": "C off: no latents, no exchange",
}


@dataclass(frozen=True)
class Maps:
    """Three levels on one grid over the image, row-major from the top left; float32.

    Attributes:
      extent: (left, right, top, bottom) of the grid as fractions of the image, 0 to 1; tiles may reach beyond it.
      pixel: (encoder layers, heads, h, w) attention from the word to each patch; None where the encoder does not read
        the question. Over all patches and question tokens a row sums to 1, so over the patches of a crop (the whole
        view, or one tile) to at most 1.
      pixel_back: the same shape, attention from each patch to the word. 0 where a layer hides the text from patches.
      space: (h', w') cosine, -1 to 1. (h', w') is smaller than (h, w) where tokens are resized after the encoder.
      question: (LLM layers, heads, h', w') attention from the word to each image token; at most 1 in sum.
    """

    extent: tuple[float, float, float, float]
    pixel: np.ndarray | None
    pixel_back: np.ndarray | None
    space: np.ndarray
    question: np.ndarray


@dataclass(frozen=True)
class Levels:
    """All maps of one word, one question and one image.

    Attributes:
      picture: (height, width, 3) uint8, the image in RGB, at most LARGEST_SIDE pixels a side.
      question, word: as given. tokens: the sub-words of the word in the LLM's row.
      whole: maps of the whole view. tiles: maps of the tiles; None at fixed resolution and where the image has none.
      exchange: (exchange layers, heads, L, M) float32, attention of latent i of the l x l grid to the tokens of its
        window; each row sums to 1. None without latents.
      windows: (L, M) int32, for each place in a window the token of the side x side grid over the whole view; -1 where
        it is not one of these (a tile's token, or no token at all). side: the side of that grid; 0 without latents.
      exchange_after: LLM layers that an exchange follows.
      early: number of encoder layers in the early half.
    """

    picture: np.ndarray
    question: str
    word: str
    tokens: tuple[str, ...]
    whole: Maps
    tiles: Maps | None
    exchange: np.ndarray | None
    windows: np.ndarray | None
    side: int
    exchange_after: tuple[int, ...]
    early: int

    @property
    def latents(self) -> int:
        """l^2; 0 without latents."""
        return 0 if self.exchange is None else self.exchange.shape[2]


def levels(
    model: Fusion,
    params,
    config: RunConfig,
    tokenizer: Tokenizer,
    image: str | Path | bytes,
    question: str,
    word: str,
    latents: int = 0,
    exchange: bool = True,
    step: int = BUCKET,
) -> Levels:
    """Runs the question once and reads the attention of one word.

    Where a word has several tokens, attention from it is the mean over them, attention to it is their sum, and its
    embedding is their mean. All occurrences of the word in the question count. Case is ignored.

    Args:
      model: the checkpoint's model, or one by a config of `without_part` on the same parameters.
      config: the run's config, for its template. image: a file, or a file's bytes.
      word: a word of the question, or several in a row.
      latents: l^2, one of the model's latent counts; 0 for its fixed one.
      exchange: False leaves out latents and exchange, on the same parameters.
      step: lengths are rounded up to multiples of it; each length takes one compiled program.

    Raises:
      UserError: the word is not in the question (the message lists its words), the image cannot be read, or the model
        has no such l^2.
    """
    c = model.config
    check(bool(question.strip()), "The question is empty.")
    check(
        latents in (0, *c.latent_counts) or not c.semantic_exchange,
        f"{latents} latents: the model has tables for {', '.join(map(str, c.latent_counts))}.",
    )
    latents = (latents or c.fixed_latent_count) if c.semantic_exchange else 0
    try:
        example = make_prompt(c, config.template, tokenizer, image, question, exchange)
        picture = images.load_image(image)
    except BadRecord as error:
        raise UserError(f"The question cannot be asked about this image: {error.detail}.") from error
    batch = lay_out_prompt(c, example, latents, step)
    text = question.replace(IMAGE_TAG, "").strip()
    places, pieces = _row_tokens(tokenizer, batch, text, word)
    in_question = word_tokens(tokenizer, example.question_ids.tolist(), text, word) if c.text_guided else []
    in_row = indicator(places, batch.tokens.shape[1])
    in_question = indicator(in_question, batch.crop_text.shape[2])
    measured = jax.device_get(measure_word(model, params, batch, in_row, in_question))
    picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE))

    tiling = example.tilings[0] if example.tilings else tiles.WHOLE
    grid = math.isqrt(c.tokens_per_image)
    has_latents = measured.get("exchange") is not None and bool((batch.latent_start >= 0).any())
    windows = batch.windows[0, 0] if has_latents else None
    side = 0
    if has_latents:
        side = 3 * math.isqrt(latents) if c.uses_quadrants else grid
    return Levels(
        picture=np.asarray(picture),
        question=text,
        word=word.strip(),
        tokens=pieces,
        whole=_maps(c, batch, measured, np.arange(grid * grid).reshape(grid, grid)),
        tiles=_tile_maps(c, batch, measured, tiling) if tiling.rows else None,
        exchange=measured["exchange"] if has_latents else None,
        windows=None if windows is None else np.where(windows < side * side, windows, -1),
        side=side,
        exchange_after=tuple(c.exchange.start + i * c.exchange.stride for i in range(c.exchange_layers)),
        early=c.vision.early_layers,
    )


def without_part(config: FusionConfig, part: str) -> tuple[FusionConfig, bool]:
    """The model's config with a part of the method switched off on the same parameters, and `exchange` for `levels`.

    Args:
      part: one of PARTS; "" switches nothing off.

    Raises:
      UserError: the model was trained without this part, or the part acts in training alone.
    """
    check(
        part != "B",
        "--compare B: the mapping loss acts in training alone; give a checkpoint that was trained without it.",
    )
    if part == "A":
        check(config.text_guided, "--compare A: this model was trained without text guidance.")
        return dataclasses.replace(config, text_guided=False), True
    if part == "C":
        check(config.exchange_layers > 0, "--compare C: this model was trained without exchange.")
    return config, part != "C"


# ---- The prompt, and the word's place in it.


def make_prompt(
    c: FusionConfig, template: str, tokenizer: Tokenizer, image: str | Path | bytes, question: str, exchange: bool
) -> Example:
    """The question about the image as a prompt, with its crops; `exchange` as for `levels`."""
    path = None if isinstance(image, bytes) else Path(image)
    turn = {"from": "human", "value": question.replace(IMAGE_TAG, "", 1)}
    record = Record("image", path, [turn], "the question", (path or image,), literal=True)
    maker = ExampleMaker(c, tokenizer, template)
    text = maker if exchange else ExampleMaker(dataclasses.replace(c, semantic_exchange=False), tokenizer, template)
    return maker.with_crops(text.text(record, prompt=True), record)


def lay_out_prompt(c: FusionConfig, example: Example, latents: int, step: int = BUCKET) -> Batch:
    """A batch of one prompt, its lengths rounded up to multiples of `step`."""
    # Without latents the round stays, empty: every exchange layer then leaves the row as it is.
    spec = layout_spec(c, 1, round_up(len(example.question_ids), step), 1)
    length = round_up(measure(example, spec, latents).length, step)
    crops = max(1, sum(tiling.crops for tiling in example.tilings))
    return lay_out([example], dataclasses.replace(spec, length=length, crops=crops), latents)


def indicator(places: Sequence[int], length: int) -> np.ndarray:
    """(length,) float32, 1 at these places and 0 elsewhere."""
    ones = np.zeros(length, np.float32)
    ones[list(places)] = 1
    return ones


def _row_tokens(tokenizer: Tokenizer, batch: Batch, question: str, word: str) -> tuple[list[int], tuple[str, ...]]:
    """The positions of the word's tokens in the LLM's row, and the text of each token."""
    start = int(np.flatnonzero(batch.visual_index[0] >= 0)[-1]) + 1  # the question follows all visual places
    ids = batch.tokens[0, start : int((batch.segment_ids[0] > 0).sum())].tolist()
    tokens = word_tokens(tokenizer, ids, question, word)
    return [start + i for i in tokens], tuple(tokenizer.decode([ids[i]]).strip() for i in tokens)


# ---- From the row to grids over the image.


def _maps(c: FusionConfig, batch: Batch, measured: dict, index: np.ndarray) -> Maps:
    """Maps of the whole view. index: (h', w'), its tokens in the visual table."""
    grid = c.vision.grid
    covered = grid * c.vision.patch_size / c.vision.image_size  # pixels beyond the last full patch are cut off
    pixel = {}
    for name in ("pixel", "pixel_back"):
        values = measured[name]
        pixel[name] = None if values is None else values[:, :, 0].reshape(*values.shape[:2], grid, grid)
    return Maps((0.0, covered, 0.0, covered), **pixel, **_in_row(batch, measured, index))


def _tile_maps(c: FusionConfig, batch: Batch, measured: dict, tiling: tiles.Tiling) -> Maps:
    """Maps of the tiles, merged into one grid without what covers only padding."""
    size, side = c.vision.image_size, math.isqrt(c.tokens_per_tile)
    crops = batch.crop_kind.shape[1]
    index = crops * c.tokens_per_image + c.tokens_per_tile + tiles.tile_places(tiling, size, side)
    patch_places = tiles.tile_places(tiling, size, c.vision.grid)
    pixel = {}
    for name in ("pixel", "pixel_back"):
        values = measured[name]
        if values is not None:
            values = values[:, :, 1:].reshape(*values.shape[:2], -1)[:, :, patch_places]
        pixel[name] = values
    top, bottom, left, right = (edge * size / side for edge in tiling.box(size, side))
    extent = (
        (left - tiling.left) / tiling.width,
        (right - tiling.left) / tiling.width,
        (top - tiling.top) / tiling.height,
        (bottom - tiling.top) / tiling.height,
    )
    return Maps(extent, **pixel, **_in_row(batch, measured, index))


def _in_row(batch: Batch, measured: dict, index: np.ndarray) -> dict[str, np.ndarray]:
    """The space and question levels of tokens, by their indices in the visual table."""
    place = np.zeros(int(batch.visual_index.max()) + 1, int)
    visual = np.flatnonzero(batch.visual_index[0] >= 0)
    place[batch.visual_index[0, visual]] = visual
    return {"space": measured["space"][index], "question": measured["question"][:, :, place[index]]}
