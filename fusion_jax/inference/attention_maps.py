"""Where a model looks for one word of a question: what `fusion_jax.visualize` draws, as plain arrays.

    pixel level      encoder: the word's tokens attend to the patches, and the patches to them
    space level      cosine of each projected image token and the word's embedding, both at the LLM's door
    question level   LLM: the word's tokens attend to the image's tokens
    exchange         each latent attends to the tokens of its window, in every exchange layer

The forward pass is the ordinary one; queries and keys of its layers are kept on the way, and the attention weights made
of them again (`models.attention.reference_weights`).
"""

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
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
from fusion_jax.models import attention, layers
from fusion_jax.models.config import FusionConfig
from fusion_jax.models.fusion import Fusion

BUCKET = 32  # lengths are rounded up to this, unless told otherwise: few programs for many questions
LARGEST_SIDE = 1024  # of the picture that is kept to be drawn


@dataclass(frozen=True)
class Maps:
    """Three levels on one grid of the image, row-major from the top left; float32.

    Attributes:
      extent: (left, right, top, bottom) of the grid as fractions of the image, 0 to 1; tiles may reach beyond it.
      pixel: (encoder layers, heads, h, w) attention from the word to each patch; None where the encoder does not read
        the question. Over all patches and question tokens a row sums to 1, so over the patches of a crop (the whole
        view, or one tile) to at most 1.
      pixel_back: the same shape, attention from each patch to the word. 0 where a layer hides the text from patches.
      space: (h', w') cosine, -1 to 1. (h', w') is smaller than (h, w) where tokens are resized behind the encoder.
      question: (LLM layers, heads, h', w') attention from the word to each image token; at most 1 in sum.
    """

    extent: tuple[float, float, float, float]
    pixel: np.ndarray | None
    pixel_back: np.ndarray | None
    space: np.ndarray
    question: np.ndarray


@dataclass(frozen=True)
class Levels:
    """Everything about one word, one question and one image.

    Attributes:
      picture: (height, width, 3) uint8, the image in RGB, at most LARGEST_SIDE pixels a side.
      question, word: as asked. tokens: the sub-words that the word is in the LLM's row.
      whole: maps of the whole view. tiles: of the tiles, None at fixed resolution and where the image has none.
      exchange: (exchange layers, heads, L, M) float32, attention of latent i of the l x l grid to the tokens of its
        window; each row sums to 1. None without latents.
      windows: (L, M) int32, which token of the side x side grid over the whole view that is, -1 for none of it (no
        token at all, or one of a tile). side: of that grid; 0 without latents.
      exchange_after: LLM layers after which the exchanges stand.
      early: how many encoder layers are the shallow half.
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

    A word of several tokens: attention from it is the mean over them, attention to it their sum, its embedding their
    mean. A word that the question says several times counts all of them. Upper and lower case are the same.

    Args:
      model: of the checkpoint, or with `text_guided` off in its config, on the same parameters.
      config: of the run, for its template. image: a file, or a file's bytes.
      word: a word of the question, or several in a row.
      latents: l^2, one of the trained; 0 for the middle one.
      exchange: False leaves latents and exchange out, on the same parameters.
      step: lengths are rounded up to multiples of it, each of which is one compiled program.

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
        example = _prompt(c, config.template, tokenizer, image, question, exchange)
        picture = images.load_image(image)
    except BadRecord as error:
        raise UserError(f"The question cannot be asked about this image: {error.detail}.") from error
    batch = _lay_out(c, example, latents, step)
    asked = question.replace(IMAGE_TAG, "").strip()
    places, pieces = _row_tokens(tokenizer, batch, asked, word)
    read = word_tokens(tokenizer, example.question_ids.tolist(), asked, word) if c.text_guided else []
    in_row = _indicator(places, batch.tokens.shape[1])
    found = jax.device_get(_measure(model, params, batch, in_row, _indicator(read, batch.crop_text.shape[2])))
    picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE))

    tiling = example.tilings[0] if example.tilings else tiles.WHOLE
    grid = math.isqrt(c.tokens_per_image)
    has_latents = found.get("exchange") is not None and bool((batch.latent_start >= 0).any())
    windows = batch.windows[0, 0] if has_latents else None
    side = 0
    if has_latents:
        side = 3 * math.isqrt(latents) if c.uses_quadrants else grid
    return Levels(
        picture=np.asarray(picture),
        question=asked,
        word=word.strip(),
        tokens=pieces,
        whole=_maps(c, batch, found, np.arange(grid * grid).reshape(grid, grid)),
        tiles=_tile_maps(c, batch, found, tiling) if tiling.rows else None,
        exchange=found["exchange"] if has_latents else None,
        windows=None if windows is None else np.where(windows < side * side, windows, -1),
        side=side,
        exchange_after=tuple(c.exchange.start + i * c.exchange.stride for i in range(c.exchange_layers)),
        early=c.vision.early_layers,
    )


# The prompt and the word's place in it.


def _prompt(
    c: FusionConfig, template: str, tokenizer: Tokenizer, image: str | Path | bytes, question: str, exchange: bool
) -> Example:
    path = None if isinstance(image, bytes) else Path(image)
    turn = {"from": "human", "value": question.replace(IMAGE_TAG, "", 1)}
    record = Record("image", path, [turn], "the question", (path or image,), literal=True)
    maker = ExampleMaker(c, tokenizer, template)
    text = maker if exchange else ExampleMaker(dataclasses.replace(c, semantic_exchange=False), tokenizer, template)
    return maker.with_crops(text.text(record, prompt=True), record)


def _lay_out(c: FusionConfig, example: Example, latents: int, step: int = BUCKET) -> Batch:
    # Without latents the round stays, absent: every exchange layer then leaves the row as it is.
    asked = _round_up(len(example.question_ids), step)
    spec = layout_spec(c, 1, asked, 1)
    length = _round_up(measure(example, spec, latents).length, step)
    crops = max(1, sum(tiling.crops for tiling in example.tilings))
    return lay_out([example], dataclasses.replace(spec, length=length, crops=crops), latents)


def _round_up(value: int, step: int) -> int:
    return -(-max(value, 1) // step) * step


def _indicator(places: Sequence[int], length: int) -> np.ndarray:
    there = np.zeros(length, np.float32)
    there[list(places)] = 1
    return there


def _row_tokens(tokenizer: Tokenizer, batch: Batch, asked: str, word: str) -> tuple[list[int], tuple[str, ...]]:
    """Places of the word in the LLM's row, and the text of each."""
    start = int(np.flatnonzero(batch.visual_index[0] >= 0)[-1]) + 1  # the question stands behind all visual places
    ids = batch.tokens[0, start : int((batch.segment_ids[0] > 0).sum())].tolist()
    found = word_tokens(tokenizer, ids, asked, word)
    return [start + i for i in found], tuple(tokenizer.decode([ids[i]]).strip() for i in found)


def word_tokens(tokenizer: Tokenizer, ids: Sequence[int], question: str, word: str) -> list[int]:
    """Which of `ids`, tokens of a text that holds the question, say any part of the word.

    Raises:
      UserError: the word is not in the question.
    """
    text, spans = _spans(tokenizer, ids)
    first = max(text.find(question), 0)
    last = first + len(question) if question in text else len(text)
    said = [(first + a, first + b) for a, b in _occurrences(text[first:last], word)]
    found = [i for i, (a, b) in enumerate(spans) if any(a < end and b > start for start, end in said)]
    if not found:
        said = ", ".join(words(question))
        raise UserError(f"The word {word.strip()!r} is not in the question; its words are: {said}.")
    return found


def words(text: str) -> list[str]:
    """The words of a text in their order, each once."""
    return list(dict.fromkeys(re.findall(r"\w+(?:['’-]\w+)*", text)))


def _spans(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    """The text of `ids` and the characters of it that each token has a part in."""
    spans = []
    for i in range(len(ids)):
        # A character may be spread over tokens: what is no UTF-8 yet decodes to U+FFFD, and starts where that stands.
        start = len(tokenizer.decode(ids[:i]).rstrip("\ufffd"))
        spans.append((start, len(tokenizer.decode(ids[: i + 1]))))
    return tokenizer.decode(ids), spans


def _occurrences(text: str, word: str) -> list[tuple[int, int]]:
    parts = [re.escape(part) for part in word.split()]
    if not parts:
        return []
    pattern = r"\s+".join(parts)
    found = [match.span() for match in re.finditer(rf"(?<!\w){pattern}(?!\w)", text, re.IGNORECASE)]
    # Scripts that write no spaces have no ends of words to look for.
    if not found and not word.isascii():
        found = [match.span() for match in re.finditer(pattern, text, re.IGNORECASE)]
    return found


# The forward pass and the weights.


def _wanted(module, method: str) -> bool:
    return method == "__call__" and module.name in ("query", "key")


def captured(model: Fusion, params, batch: Batch, wanted=_wanted):
    """The ordinary forward pass: its result, and what the submodules that `wanted` chooses gave in every layer."""
    return model.apply({"params": params}, batch, capture_intermediates=wanted, mutable=["intermediates"])


def of_layers(c: FusionConfig, decoder: dict, name: str):
    """What a submodule of the LLM's layers gave, (layers, ...), out of the stacks in which they are kept."""
    parts = []
    for i, stack in enumerate(c.stacks()):
        each = [decoder[f"stack_{i}"][f"layer_{j}"][name]["__call__"][0] for j in range(stack.layers)]
        parts.append(jnp.stack(each, 1).reshape(-1, *each[0].shape[1:]))
    return jnp.concatenate(parts)


def of_exchanges(c: FusionConfig, decoder: dict, name: str):
    """The same for the exchange layers."""
    stacks = [f"stack_{i}" for i, stack in enumerate(c.stacks()) if stack.exchange]
    return jnp.concatenate([decoder[stack]["exchange"][name]["__call__"][0] for stack in stacks])


def encoder_weights(c: FusionConfig, q, k, text, early):
    """Attention of one encoder layer over [image | text], as `vision.EncoderLayer` has it: (N, H, P + T, P + T).

    Args:
      q, k: (N, P + T, D) of the layer. text: (N, T) int, 1 real and 0 padding. early: whether it is of the early half.
    """
    patches = c.vision.patches
    q, k = (x.reshape(*x.shape[:2], c.vision.heads, -1) for x in (q, k))
    image = jnp.ones((len(q), patches), jnp.int32)
    everything = jnp.concatenate([image, text], 1)
    q_text, seen = q[:, patches:], everything
    if c.mask == "paper":
        seen = jnp.concatenate([image, jnp.where(early, 0, text)], 1)
    else:
        q_text = jnp.where(early, 0, q_text)
    rows = (
        attention.reference_weights(q[:, :patches], k, image, seen),
        attention.reference_weights(q_text, k, text, everything),
    )
    weights = jnp.concatenate(rows, 3)
    return weights.reshape(len(q), c.vision.heads, *weights.shape[3:])


def llm_weights(c: FusionConfig, q, k, segments, positions):
    """Attention of one LLM layer, as `llm.DecoderLayer` has it: (B, H, S, S). q, k: (B, S, ...) before the rotation."""
    m = c.llm
    cos, sin = layers.rotary(m.rope, m.per_head, positions, layers.example_lengths(segments, positions))
    q, k = (layers.apply_rotary(x.reshape(*x.shape[:2], -1, m.per_head), cos, sin) for x in (q, k))
    weights = attention.reference_weights(q, k, segments, segments, True, m.sliding_window)
    return weights.reshape(len(q), m.heads, *weights.shape[3:])


def exchange_weights(c: FusionConfig, q, k, windows):
    """Attention of one exchange layer for one row with one round, as `exchange.SemanticExchange` has it: (H, L, M).

    Args:
      q: (L, D) of the latents. k: (C, D) of the context. windows: (L, M) indices into it, -1 none.
    """
    heads = c.exchange.heads
    q, k = (x.reshape(len(x), heads, -1) for x in (q, k))
    scores = jnp.einsum("lhd,lmhd->hlm", q, k[jnp.maximum(windows, 0)], preferred_element_type=jnp.float32)
    scores = jnp.where(windows >= 0, scores * q.shape[-1] ** -0.5, attention.MASKED)
    return jnp.where(windows >= 0, jax.nn.softmax(scores, -1), 0.0)


@functools.partial(jax.jit, static_argnames=("model",))
def _measure(model: Fusion, params, batch: Batch, in_row, in_question) -> dict:
    """`in_row` (S,), `in_question` (T,): 1 at the word's tokens. A layer at a time, so that one layer's weights exist.

    Returns:
      pixel, pixel_back: (layers, H, K, P) or None; question: (layers, H, S); space: (V,) cosines with the visual table;
      exchange: (exchange layers, H, L, M) or None.
    """
    c = model.config
    (_, encoded, _), kept = captured(model, params, batch)
    kept = kept["intermediates"]
    out = {"pixel": None, "pixel_back": None, "exchange": None}
    if c.text_guided:
        layer, text = kept["vision"]["layers"]["layer"], batch.crop_text_mask[0].astype(jnp.int32)

        def of_encoder(inputs):
            weights = encoder_weights(c, inputs[0], inputs[1], text, inputs[2])
            p = c.vision.patches
            there = jnp.einsum("khtp,t->hkp", weights[:, :, p:, :p], in_question) / in_question.sum()
            return there, jnp.einsum("khpt,t->hkp", weights[:, :, :p, p:], in_question)

        early = jnp.arange(c.encoder_layers) < c.vision.early_layers
        # Guided crops come first where there are plain ones too.
        q, k = (layer[name]["__call__"][0] for name in ("query", "key"))
        out["pixel"], out["pixel_back"] = jax.lax.map(of_encoder, (q, k, early))

    decoder = kept["llm"]

    def of_llm(inputs):
        weights = llm_weights(c, *inputs, batch.segment_ids, batch.positions)
        return jnp.einsum("hqk,q->hk", weights[0], in_row) / in_row.sum()

    out["question"] = jax.lax.map(of_llm, tuple(of_layers(c, decoder, name) for name in ("query", "key")))
    if c.exchange_layers:
        q, k = (of_exchanges(c, decoder, name) for name in ("query", "key"))
        exchange = jax.vmap(lambda q, k: exchange_weights(c, q, k, batch.windows[0, 0]))
        out["exchange"] = exchange(q[:, 0, 0], k[:, 0])
    embedding = params["llm"]["embedding"][batch.tokens[0]].astype(jnp.float32)
    mean = jnp.einsum("sd,s->d", embedding, in_row) / in_row.sum()
    tokens = encoded.image_tokens[0].astype(jnp.float32)
    norms = jnp.linalg.norm(tokens, axis=-1) * jnp.linalg.norm(mean)
    out["space"] = tokens @ mean / jnp.maximum(norms, 1e-12)
    return out


# From the row to grids over the image.


def _maps(c: FusionConfig, batch: Batch, found: dict, index: np.ndarray) -> Maps:
    """The whole view; `index` (h', w'): its tokens in the visual table."""
    grid = c.vision.grid
    covered = grid * c.vision.patch_size / c.vision.image_size  # pixels beyond the last whole patch are cut off
    pixel = {}
    for name in ("pixel", "pixel_back"):
        kept = found[name]
        pixel[name] = None if kept is None else kept[:, :, 0].reshape(*kept.shape[:2], grid, grid)
    return Maps((0.0, covered, 0.0, covered), **pixel, **_in_row(batch, found, index))


def _tile_maps(c: FusionConfig, batch: Batch, found: dict, tiling: tiles.Tiling) -> Maps:
    """The tiles, merged into one grid; what lies over padding alone is left out."""
    size, side = c.vision.image_size, math.isqrt(c.tokens_per_tile)
    crops = batch.crop_kind.shape[1]
    index = crops * c.tokens_per_image + c.tokens_per_tile + tiles.tile_places(tiling, size, side)
    patch_places = tiles.tile_places(tiling, size, c.vision.grid)
    pixel = {}
    for name in ("pixel", "pixel_back"):
        kept = found[name]
        if kept is not None:
            kept = kept[:, :, 1:].reshape(*kept.shape[:2], -1)[:, :, patch_places]
        pixel[name] = kept
    top, bottom, left, right = (edge * size / side for edge in tiling.box(size, side))
    extent = (
        (left - tiling.left) / tiling.width,
        (right - tiling.left) / tiling.width,
        (top - tiling.top) / tiling.height,
        (bottom - tiling.top) / tiling.height,
    )
    return Maps(extent, **pixel, **_in_row(batch, found, index))


def _in_row(batch: Batch, found: dict, index: np.ndarray) -> dict[str, np.ndarray]:
    """Space and question level of the tokens that are `index` in the visual table."""
    place = np.zeros(int(batch.visual_index.max()) + 1, int)
    visual = np.flatnonzero(batch.visual_index[0] >= 0)
    place[batch.visual_index[0, visual]] = visual
    return {"space": found["space"][index], "question": found["question"][:, :, place[index]]}
