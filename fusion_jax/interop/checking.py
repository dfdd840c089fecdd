"""Checks from the headers, before anything is loaded, that tensors agree with their config.json."""

import dataclasses
import os
from collections.abc import Mapping

from fusion_jax.errors import check
from fusion_jax.files import shown
from fusion_jax.interop import table
from fusion_jax.interop.gguf_file import GgufFile
from fusion_jax.interop.tensors import DTYPES, TensorFolder, size_of
from fusion_jax.models.config import LLMConfig, VisionConfig


def check_sizes(
    tensors: TensorFolder | GgufFile, prefix: str, tower: VisionConfig | None, decoder: LLMConfig | None
) -> None:
    """Raises UserError where the largest sizes of a config differ from the headers, or a tensor exceeds the memory.

    This check comes first, because everything else is allocated in these sizes.
    """
    expected: dict[str, tuple[int, ...]] = {}
    if tower is not None:
        expected[f"{prefix}embeddings.position_embedding.weight"] = (tower.patches, tower.width)
        expected[f"{prefix}encoder.layers.{tower.layers - 1}.mlp.fc1.bias"] = (tower.mlp_dim,)
    if decoder is not None:
        expected[table.EMBEDDING] = (decoder.vocab_size, decoder.width)
        last = f"model.layers.{decoder.layers - 1}."
        expected[f"{last}self_attn.o_proj.weight"] = (decoder.width, decoder.per_head * decoder.heads)
        expected[f"{last}mlp.down_proj.weight"] = (decoder.width, decoder.mlp_dim)
    for name, shape in expected.items():
        check(name in tensors.entries, f"{tensors.folder} lacks {name}, which its config.json needs.")
        actual = tensors.entries[name].shape
        check(actual == shape, f"{tensors.folder}: {name} has shape {actual}; the config asks for {shape}.")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name, entry in tensors.entries.items():
        size = size_of([(entry.shape, entry.dtype)]) if entry.dtype in DTYPES else 0
        check(
            size <= memory,
            f"{entry.file}: {shown(name)} has {size / 1e9:.1f} GB, more than this machine's {memory / 1e9:.1f} GB.",
        )


def check_tensors(
    rows: list[table.Row],
    tensors: TensorFolder | GgufFile,
    unused: tuple[str, ...],
    shapes: Mapping[str, tuple[int, ...]],
    others: tuple[str, ...] = (),
) -> None:
    """`table.check_complete` for a folder, and UserError for a type that cannot be read.

    Args:
      rows: the rows of the table. tensors: the folder's tensors. unused: suffixes of names that may be left over.
      shapes: shapes by name that replace those of the rows. others: prefixes of names that are not checked.
    """
    actual = {name: entry.shape for name, entry in tensors.entries.items() if not name.startswith(others)}
    rows = [dataclasses.replace(row, shape=shapes.get(row.name, row.shape)) for row in rows]
    table.check_complete(rows, actual, unused, str(tensors.folder))
    for row in rows:
        entry = tensors.entries[row.name]
        check(
            entry.dtype in DTYPES,
            f"{entry.file}: {row.name} has type {shown(entry.dtype)}; allowed: {', '.join(DTYPES)}.",
        )
