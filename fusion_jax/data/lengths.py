"""Lengths of the records of shards, stored beside them, so that a run plans its steps without tokenizing them.

    SHARDS/lengths-0f3a...9c.npy    one ENTRY for each record, in their order

The file's name is a hash of all that the lengths depend on: the shards' contents, the tokenizer, the template and what
the model adds (`ExampleMaker.lengths_key`). So a file is either that of a run or is not looked at, and those of several
tokenizers lie side by side. Where there is none, records are tokenized as they are read, as ever. A damaged file is
noticed when a record is loaded: it then takes more or less room than was planned.
"""

import functools
import hashlib
import logging

import numpy as np

from fusion_jax.data import shards
from fusion_jax.errors import UserError

log = logging.getLogger("fusion_jax")

# What `layout.Measured` says at any limits of a stage, and the images of a conversation. `length` 0 stands for a record
# that cannot be used, or is too large to be written down: it is measured when it is read.
ENTRY = np.dtype([("length", "<u4"), ("question", "<u4"), ("crops", "<u2"), ("rounds", "<u2"), ("images", "<u2")])


@functools.lru_cache(64)
def file_name(records: shards.Shards, key: str) -> str:
    """Returns the name of the file with the lengths of these shards for a key (`ExampleMaker.lengths_key`)."""
    return f"lengths-{hashlib.sha256(f'{records.identity} {key}'.encode()).hexdigest()[:32]}.npy"


def entry(records: shards.Shards, i: int, key: str) -> np.void | None:
    """Returns the stored ENTRY of a record; None if there is no file for the key, or the record has no lengths."""
    stored = _open(records.folder, file_name(records, key), len(records))
    return None if stored is None or not stored[i]["length"] else stored[i]


@functools.lru_cache(64)
def _open(folder: str, name: str, count: int) -> np.ndarray | None:
    """Opens a file of lengths, and says once if there is none."""
    try:
        stored = np.load(shards.local_copy(f"{folder}/{name}"), mmap_mode="r")
        if stored.dtype != ENTRY or stored.shape != (count,):
            raise ValueError(f"it holds {stored.shape} entries of {stored.dtype}, not {count} of lengths")
        return stored
    except FileNotFoundError:
        log.info(
            "%s has no lengths for this tokenizer, template and model, so every record is tokenized to plan its step; "
            "`python -m fusion_jax.shards --out %s --config CONFIG` stores them",
            *(folder, folder),
        )
    except (OSError, ValueError, UserError) as error:
        log.warning("%s/%s cannot be read (%s); every record is tokenized to plan its step", folder, name, error)
    return None
