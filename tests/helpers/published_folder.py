"""Folders in the published format, written by the table of tensors alone."""

import json
from pathlib import Path

import numpy as np
import tokenizers
from flax.traverse_util import flatten_dict
from helpers.fixtures import params

from fusion_jax.interop import table
from fusion_jax.interop.families import family_of
from fusion_jax.interop.published_config import published_config
from fusion_jax.interop.shapes import parameter_shapes
from fusion_jax.interop.tensors import TensorWriter
from fusion_jax.models.config import FusionConfig

# The published code always has 16 heads in its exchange layers, and its encoders these patches and layers.
PUBLISHED = {"exchange.heads": 16, "vision.image_size": 384, "vision.patch_size": 16, "vision.layers": 39}
WORDS = ["<unk>", "<s>", "</s>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "two", "cubes"]


def write_published(folder: Path, model: FusionConfig, weights: dict, template: str = "llama3", shard_bytes=10**9):
    """A folder in the published format, by the table alone."""
    folder.mkdir(parents=True)
    described = published_config(model, template, {}, "float32")
    (folder / "config.json").write_text(json.dumps(described))
    flat = flatten_dict(weights, sep="/")
    rows = table.published_rows(model, parameter_shapes(model), family_of(described["model_type"]).fused)
    writer = TensorWriter(folder, {row.name: (row.shape, "float32") for row in rows}, shard_bytes)
    for row in rows:
        writer[row.name][...] = table.to_published(
            row, lambda path, index: np.asarray(flat[path] if index is None else flat[path][index]), model
        )
    return folder


def write_with_tokenizer(folder: Path, model: FusionConfig, shard_bytes: int = 10**9) -> Path:
    """A folder of random parameters, with a tokenizer of eight words."""
    write_published(folder, model, params(model), shard_bytes=shard_bytes)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(WORDS[:6])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


def equal_trees(a, b):
    a, b = flatten_dict(a, sep="/"), flatten_dict(b, sep="/")
    return a.keys() == b.keys() and all(np.array_equal(np.asarray(a[k]), np.asarray(b[k])) for k in a)
