"""Opens the sources of an import, and checks them from headers and configs before anything is loaded.

They are a whole published model, or a vision tower and a language model. importing.py then reads the tensors.
"""

import base64
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fusion_jax.data.tokenizer import Tokenizer, load_tokenizer
from fusion_jax.data.tokenizer_base import VISION_END, VISION_START
from fusion_jax.errors import UserError, check, check_choice
from fusion_jax.files import brief, shown
from fusion_jax.interop import gguf_file, hf_config, table
from fusion_jax.interop.checking import check_sizes, check_tensors
from fusion_jax.interop.families import choose_template, family_of
from fusion_jax.interop.gguf_file import GgufFile
from fusion_jax.interop.published_config import is_published, published_model
from fusion_jax.interop.shapes import kept_shapes
from fusion_jax.interop.tensors import DTYPES, TensorFolder, size_of
from fusion_jax.models.config import PRESETS, FusionConfig, replace

# The published code has these in its files, but neither applies nor trains them.
UNUSED = ("post_layernorm.weight", "post_layernorm.bias", "rotary_emb.inv_freq", "embeddings.position_ids")
# Parts of a SigLIP folder that are not its vision encoder.
_NOT_VISION = ("text_model.", "logit_scale", "logit_bias")
ADDED_TOKENS = (VISION_START, VISION_END)
_MOST_UNUSED = 1 << 24  # bytes; they are a few vectors, and are kept in the checkpoint's description


@dataclass(frozen=True)
class Source:
    """One folder to read: its tensors, their rows in the table, and how many rows of the vocabulary are read."""

    tensors: TensorFolder | GgufFile
    rows: list[table.Row]
    vocabulary: int = 0


@dataclass(frozen=True)
class Opened:
    """An import that has been checked, with nothing loaded yet.

    Attributes:
      model: the model config. template: its chat template. tokenizer: None where the folder has none.
      sources: the folders to read. dtypes: the dtype of each of our parameters by path (keys of `DTYPES`).
      origin: kept in the checkpoint for a later export: config.json, and tensors that are never used (base64).
      kept: the folder with the tokenizer files of a GGUF file, which must exist until they are saved.
    """

    model: FusionConfig
    template: str
    tokenizer: Tokenizer | None
    sources: list[Source]
    dtypes: dict[str, str]
    origin: dict[str, Any] = field(default_factory=dict)
    kept: tempfile.TemporaryDirectory | None = None


def open_published(folder: str | Path, allow_pickle: bool = False, dtype: str | None = None) -> Opened:
    """Opens a folder in the published format: a whole model with the `released` preset.

    Raises:
      UserError: a file is missing, or a tensor is missing, left over or of the wrong shape.
    """
    folder = Path(folder)
    raw = hf_config.read_config(folder)
    where = str(folder / "config.json")
    check(
        is_published(raw),
        f"{where}: model_type {raw.get('model_type')!r} is not a published FUSION model (fusion_llama, fusion_phi); "
        "import backbones with --vision and --llm.",
    )
    with hf_config.reading(where):
        model = published_model(raw, where)
    tensors = TensorFolder(folder, allow_pickle)
    check_sizes(tensors, table.VISION, model.vision, model.llm)
    shapes = kept_shapes(model)
    rows = table.published_rows(model, shapes, family_of(raw["model_type"]).fused)
    check_tensors(rows, tensors, UNUSED, {})
    unused = [name for name, e in sorted(tensors.entries.items()) if name.endswith(UNUSED) and e.dtype in DTYPES]
    kept = size_of((tensors.entries[name].shape, tensors.entries[name].dtype) for name in unused)
    check(kept <= _MOST_UNUSED, f"{folder} has {kept:,} bytes of tensors that nothing uses ({brief(unused[:1])}, ...).")
    source = Source(tensors, rows, model.llm.vocab_size)
    tokenizer = _tokenizer(folder)
    _check_vocabulary(tokenizer, model.llm.vocab_size, folder)
    return Opened(
        model=model,
        template=choose_template(raw["model_type"], tokenizer),
        tokenizer=tokenizer,
        sources=[source],
        dtypes=_dtypes([source], shapes, dtype),
        origin={"config": raw, "unused": {name: pack(tensors.get(name)) for name in unused}},
    )


def open_backbones(
    vision: str | Path, llm: str | Path, preset: str = "paper", allow_pickle: bool = False, dtype: str | None = None
) -> Opened:
    """Opens a vision tower and a language model, which is a folder or a GGUF file.

    Projectors, exchange layers and learned latents start from random values. The vocabulary is cut to the tokenizer's,
    and the rows of `<vision_start>` and `<vision_end>` are the mean of the others.

    Raises:
      UserError: an architecture is unknown, or tensors do not fit the folder's config.
    """
    check_choice("preset ", preset, PRESETS)
    vision, llm = Path(vision), Path(llm)
    packed = gguf_file.find(llm)
    text = None if packed is None else GgufFile(packed)
    raw = hf_config.read_config(llm) if text is None else text.config
    with hf_config.reading(where := str(vision / "config.json")):
        tower = hf_config.vision_config(hf_config.read_config(vision), where)
    with hf_config.reading(where := str(packed or llm / "config.json")):
        decoder = hf_config.llm_config(raw, where)
    # The two added tokens follow the tokenizer's own, which are often fewer than the embedding's rows.
    tokenizer, kept = (load_tokenizer(llm), None) if text is None else text.tokenizer(llm)
    known = len_of(tokenizer)
    check(
        known <= decoder.vocab_size,
        f"{llm}: the tokenizer has {known} tokens, but {'config.json gives' if packed is None else 'its tensors give'} "
        f"the model a vocabulary of {decoder.vocab_size}.",
    )
    check(
        known > 0 and tokenizer.vocab_size == known + len(ADDED_TOKENS),
        f"{llm}: the tokenizer has other tokens after {' or '.join(ADDED_TOKENS)}; these must be its last, or absent.",
    )
    model = FusionConfig(
        vision=tower,
        llm=replace(decoder, vocab_size=known + len(ADDED_TOKENS)),
        exchange=hf_config.default_exchange(decoder),
        **PRESETS[preset],
    )
    # The folder's own number of rows, which may be larger or smaller than ours.
    seen, text = TensorFolder(vision, allow_pickle), text or TensorFolder(llm, allow_pickle)
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in seen.entries) else ""
    check_sizes(seen, prefix, tower, None)
    check_sizes(text, "", None, decoder)
    shapes = kept_shapes(model)
    vision_rows = table.vision_rows(model, shapes, prefix)
    dropped = f"{prefix}encoder.layers.{tower.layers}."
    check(
        any(name.startswith(dropped) for name in seen.entries),
        f"{vision} lacks {dropped[:-1]}, the last of the {tower.layers + 1} layers in its config.json.",
    )
    check_tensors(vision_rows, seen, UNUSED, {}, (*_NOT_VISION, f"{prefix}head.", dropped))
    llm_rows = table.llm_rows(model, shapes, family_of(raw["model_type"]).fused)
    vocabulary = (decoder.vocab_size, decoder.width)
    tied = (table.HEAD,) if decoder.tied_head else ()
    check_tensors(llm_rows, text, UNUSED, {table.EMBEDDING: vocabulary, table.HEAD: vocabulary}, tied)
    sources = [Source(seen, vision_rows), Source(text, llm_rows, known)]
    return Opened(
        model=model,
        template=choose_template(raw["model_type"], tokenizer),
        tokenizer=tokenizer,
        sources=sources,
        dtypes=_dtypes(sources, shapes, dtype),
        origin={"config": raw},
        kept=kept,
    )


def _tokenizer(folder: Path) -> Tokenizer | None:
    if any(os.path.lexists(folder / name) for name in ("tokenizer.model", "tokenizer.json")):
        return load_tokenizer(folder)
    return None


def len_of(tokenizer: Tokenizer) -> int:
    """Number of a tokenizer's ids without the two tokens that we append."""
    return min(tokenizer.vision_start_id, tokenizer.vision_end_id, tokenizer.vocab_size)


def _check_vocabulary(tokenizer: Tokenizer | None, rows: int, folder: Path) -> None:
    check(
        tokenizer is None or tokenizer.vocab_size <= rows,
        f"{folder}: the tokenizer has {tokenizer and tokenizer.vocab_size} tokens, but the embedding has {rows} rows.",
    )


def _dtypes(sources: list[Source], shapes: Mapping[str, tuple[int, ...]], dtype: str | None) -> dict[str, str]:
    """Dtypes by path: a parameter has that of its source, and a new one has that of the embedding."""
    if dtype is not None:
        check_choice("dtype ", dtype, DTYPES)
    if dtype is not None:
        return dict.fromkeys(shapes, dtype)
    named = {
        path: source.tensors.entries[row.name].dtype
        for source in sources
        for row in source.rows
        for path, _ in row.paths
    }
    return {path: named.get(path, named["llm/embedding"]) for path in shapes}


def pack(array: np.ndarray) -> dict[str, Any]:
    return {"dtype": array.dtype.name, "shape": list(array.shape), "data": base64.b64encode(array.tobytes()).decode()}


def unpack(packed: Any, where: str) -> np.ndarray:
    """Reads a small tensor of a checkpoint's `about`. Raises UserError, which begins with `where`, if it is damaged."""
    try:
        data = np.frombuffer(base64.b64decode(packed["data"]), DTYPES[packed["dtype"]])
        return data.reshape(packed["shape"])
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"{where}, is not a tensor: {shown(error)}.") from error
