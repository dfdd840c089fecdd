"""Opens training records with random access: JSON, shards, TensorFlow Datasets and mixtures of them.

    JSON    [{"id": "7", "image": "a/b.jpg", "conversations": [{"from": "human", "value": "..."}, ...]}, ...],
            or another form that records.py understands
    JSONL   the same objects, one per line
    shards  a folder that `python -m fusion_jax.shards` wrote, here or at a URL; see shards.py
    tfds    tfds:name[/config][:version]:split, a data set that TensorFlow Datasets has prepared
    YAML    datasets:
              - json_path: captions.json          # relative to the YAML file, as all paths in it
                sampling_strategy: "random:10%"   # all, first:N, end:N or random:N; N a number or a percentage
                weight: 2.5                       # drawn twice per epoch, and half of them a third time
                image_folder: images              # default: the JSON file's folder
                allow_outside: true               # images may be outside image_folder: absolute paths, "..", links
              - shards: stage1
              - tfds: coco_captions:train[:50%]
                data_dir: /data/tfds              # default: TFDS's own
                features: {image: image, text: captions/text}    # or conversations, and id; default: of these names
                prompt: Describe the image.       # the question that a text answers

See data/mixture.py for strategies and weights, data/json_records.py for how JSON files are read, data/data_sets.py for
what stays in memory.
"""

import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fusion_jax.data import shards
from fusion_jax.data.data_sets import DataSet, Record, is_folder, open_json, open_stored
from fusion_jax.data.mixture import open_mixture
from fusion_jax.data.tfds import TfdsRecords
from fusion_jax.errors import UserError


class RecordSource:
    """Records of one or several data sets, one after the other: `len(source)`, `source[i]`. Can be pickled.

    `source[i]` raises BadRecord for a record that is not a conversation (the reasons of `records.understand`, or
    duplicate_key, image_outside_folder, corrupt_record, unreadable_json or too_large), naming file, record and key.

    Attributes:
      parts: name and number of records, weighted, of each data set, in order.
    """

    def __init__(self, parts: Sequence[DataSet]):
        self._parts = tuple(parts)
        self._ends = np.cumsum([len(part) for part in parts])
        self.parts = [(part.name, len(part)) for part in parts]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> Record:
        part, k = self._find(i)
        return part.read(k)

    def text(self, i: int) -> Record:
        """Returns the same record for its text, without reading images if that saves anything: images of shards are
        then empty, one for each image."""
        part, k = self._find(i)
        return part.text(k)

    def lengths(self, i: int, key: str) -> np.void | None:
        """Returns what is stored of the record's lengths for a key (`ExampleMaker.lengths_key`), if anything is: see
        lengths.py."""
        part, k = self._find(i)
        return part.lengths(k, key)

    def describe(self) -> list[dict[str, Any]]:
        """Describes each data set: see `DataSet.describe`. Raises UserError if a file can no longer be read."""
        return [part.describe() for part in self._parts]

    def part(self, i: int) -> int:
        """Returns which of `parts` record i belongs to."""
        return int(np.searchsorted(self._ends, i, side="right"))

    def _find(self, i: int) -> tuple[DataSet, int]:
        i = operator.index(i)
        i = i + len(self) if i < 0 else i
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        part = self._parts[k := self.part(i)]
        return part, part.place(i - int(self._ends[k]) + len(part))


def load_source(
    path: str | Path,
    image_folder: str | Path | None = None,
    seed: int = 0,
    *,
    allow_outside: bool = False,
) -> RecordSource:
    """Opens the records that the path names: a .json or .jsonl file, a .yaml or .yml mixture, a folder of shards (here
    or at a URL), or `tfds:name:split`.

    Args:
      path: see the top of this file.
      image_folder: where relative image paths start; by default the folder of the file that names them.
      seed: for what a mixture draws at random.
      allow_outside: images of JSON files may be outside their folder. An entry of a mixture can say otherwise.

    Raises:
      UserError: as for `load_records`, `load_mixture` and shards.py, or the path names something else.
    """
    text = str(path)
    if text.startswith("tfds:"):
        return RecordSource([open_stored(text, TfdsRecords(text), "all", seed, text)])
    if shards.is_url(text) and not text.endswith((".json", ".jsonl", ".yaml", ".yml")):
        return RecordSource([open_stored(text, shards.Shards(text), "all", seed, text)])
    if shards.is_url(text):
        raise UserError(f"{text} must be copied to a local disk first: only folders of shards are read from URLs.")
    path = Path(path)
    if path.suffix in (".yaml", ".yml"):
        return load_mixture(path, seed, image_folder, allow_outside=allow_outside)
    if path.suffix in (".json", ".jsonl"):
        return RecordSource([open_json(path, image_folder, "all", seed, text, allow_outside)])
    if is_folder(path):
        return RecordSource([open_stored(text, shards.Shards(text), "all", seed, text)])
    raise UserError(
        f"Cannot tell what {path} is: it is not a folder of shards; data files end in .json, .jsonl, .yaml or .yml."
    )


def load_records(
    json_path: str | Path, image_folder: str | Path | None = None, strategy: str = "all", seed: int = 0
) -> RecordSource:
    """Opens the records of one JSON list or JSONL file.

    Args:
      json_path: ends in .jsonl for one record per line; anything else is read as one JSON list.
      image_folder: where relative image paths start; by default the file's own folder.
      strategy: all, first:N, end:N or random:N, N a number (all if there are fewer) or a percentage, rounded up.
      seed: decides, together with the file's name, what `random` takes; the file's order is kept.

    Raises:
      UserError: missing file or folder, invalid JSON, not a list, no records, unknown strategy.
    """
    return RecordSource([open_json(Path(json_path), image_folder, strategy, seed, f"{json_path}")])


def load_mixture(
    yaml_path: str | Path,
    seed: int = 0,
    image_folder: str | Path | None = None,
    *,
    allow_outside: bool = False,
) -> RecordSource:
    """Opens the records of all data sets that a YAML mixture lists, in its order.

    Args:
      yaml_path: see the top of this file.
      seed: for the `random` strategies and the fractions of weights.
      image_folder: for the entries that name none; by default the folder of each JSON file.
      allow_outside: as for `load_source`.

    Raises:
      UserError: as for `mixture.open_mixture`.
    """
    return RecordSource(open_mixture(Path(yaml_path), seed, image_folder, allow_outside))
