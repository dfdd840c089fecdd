"""Data sets that a source draws from: JSON files, shards, TensorFlow Datasets, sampled and weighted.

A data set knows which of its records an epoch draws and describes itself so that two starts, or two machines, can be
compared. A JSON file keeps two numbers per record in memory; shards and TensorFlow Datasets keep nothing but 4 bytes
for each record that `random` or the fraction of a weight chose.
"""

import contextlib
import hashlib
import math
import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fusion_jax.data import lengths
from fusion_jax.data.json_records import DataFile, read_record, scan_json
from fusion_jax.data.records import understand
from fusion_jax.data.shards import Shards
from fusion_jax.data.tfds import TfdsRecords
from fusion_jax.errors import BadRecord, UserError
from fusion_jax.files import brief, read_file, shown

_STRATEGIES = "all, first:N, end:N or random:N, where N is a number above 0 or a percentage such as 10%"
_STRATEGY = re.compile(r"(first|end|random):(?:(\d{1,18})|(\d{1,3}(?:\.\d{1,300})?)%)", re.ASCII)
_HASHED = 1 << 26  # bytes up to which a JSON file is hashed as a whole
_COMPARED = 64  # records of a larger file that are hashed


@dataclass(frozen=True)
class Record:
    """One training record as its file gives it.

    Attributes:
      id: the record's own id, or its number in the file.
      image_path: the first image's file, or its former name if the record holds the image; None without an image.
      turns: the conversation, `{"from": text, "value": text}` each; roles and their order are not checked here.
      where: file and record, for messages.
      images: all images to load, in order, each as a file or as a file's bytes. By default `image_path` alone.
      sizes: width and height of each image if the source knows them, which only shards do; else empty.
      literal: control tokens and image tags in the texts are only text; see
        `conversation.encode_prompt`.
      system: the record's own system text, in place of the template's; None for the template's.
      guide: the text that the vision encoder reads, empty for none; None for the questions themselves.
    """

    id: str
    image_path: Path | None
    turns: list[dict[str, str]]
    where: str
    images: tuple[Path | bytes, ...] | None = field(default=None, repr=False)
    sizes: tuple[tuple[int, int], ...] = ()
    literal: bool = False
    system: str | None = None
    guide: str | None = None

    def __post_init__(self):
        if self.images is None:
            object.__setattr__(self, "images", () if self.image_path is None else (self.image_path,))


class DataSet:
    """The records that a mixture draws from one data set: all chosen ones `copies` times, then `extra` of them."""

    def __init__(self, name: str, numbers: Sequence[int] | np.ndarray):
        self.name, self.numbers = name, numbers
        self.copies, self.extra = 1, np.zeros(0, np.uint32)

    def weigh(self, weight: float, seed: int) -> None:
        chosen = len(self.numbers)
        self.copies, rest = divmod(max(1, round(chosen * weight)), chosen)
        self.extra = _sample(chosen, rest, [seed, zlib.crc32(self.name.encode()), 1])

    def __len__(self) -> int:
        return self.copies * len(self.numbers) + len(self.extra)

    def describe(self) -> dict[str, Any]:
        """Describes the data set in JSON, so that two starts or two machines can be compared.

        Keys: name; drawn: records per epoch; chosen: checksum of their numbers; records, bytes and hash of the whole.
        """
        which = (self.copies, zlib.crc32(np.asarray(self.numbers, np.int64)), zlib.crc32(self.extra))
        drawn = {"name": self.name, "drawn": len(self), "chosen": zlib.crc32(repr(which).encode())}
        return drawn | self.content()

    def content(self) -> dict[str, Any]:
        """Returns records, bytes and hash of the whole data set."""
        raise NotImplementedError

    def lengths(self, k: int, key: str) -> np.void | None:
        """Returns the stored `lengths.ENTRY` of a chosen record for a key (`ExampleMaker.lengths_key`), if any."""
        return None

    def place(self, i: int) -> int:
        """Returns which of the chosen records is the i-th to draw."""
        all_of_them = self.copies * len(self.numbers)
        return i % len(self.numbers) if i < all_of_them else int(self.extra[i - all_of_them])


class JsonData(DataSet):
    """One JSON or JSONL file."""

    def __init__(self, path: Path, folder: Path, allow_outside: bool, spans: np.ndarray, numbers: Sequence[int]):
        """Args: spans: first byte and end of all records, (records, 2) int64; numbers: those of the chosen records."""
        super().__init__(path.name, numbers)
        self.path, self.image_folder = path, folder
        self.root = None if allow_outside else os.path.realpath(folder)
        self.total = len(spans)
        self.spans = spans if len(numbers) == len(spans) else spans[np.asarray(numbers)]
        self._file = None

    def content(self) -> dict[str, Any]:
        """Returns a hash that covers, in a large file, the place of each chosen record and the bytes of a few."""
        try:
            size, digest = self.path.stat().st_size, hashlib.sha256()
            if size <= _HASHED:
                digest.update(read_file(self.path))
            else:
                file = DataFile(self.path)
                digest.update(np.ascontiguousarray(self.spans).data)
                for span in self.spans[:: -(-len(self.spans) // _COMPARED)]:
                    digest.update(file.read(span))
        except OSError as e:
            raise UserError(f"Cannot read the data file {self.path}: {e.strerror}.") from e
        return {"records": self.total, "bytes": size, "hash": digest.hexdigest()}

    def read(self, k: int) -> Record:
        if self._file is None:
            self._file = DataFile(self.path)
        number = int(self.numbers[k])
        where = f"{self.path}, record {number}"
        record = understand(read_record(self._file, self.spans[k], where), number, where)
        paths = [
            Path(image.name or f"{number}-{i}") if image.data is not None else self._locate(image.name, record.where)
            for i, image in enumerate(record.images)
        ]
        images = tuple(path if image.data is None else image.data for image, path in zip(record.images, paths))
        return Record(record.id, paths[0] if paths else None, record.turns, record.where, images, system=record.system)

    def _locate(self, name: str, where: str) -> Path:
        return locate(self.image_folder, name, self.root, where)

    text = read

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_file": None}  # an open file cannot be pickled; another process opens it again


class StoredData(DataSet):
    """Records that carry their images."""

    def __init__(self, name: str, records: Shards | TfdsRecords, numbers: Sequence[int]):
        super().__init__(name, numbers)
        self.records = records

    def content(self) -> dict[str, Any]:
        """Uses the hashes in the manifest of shards, or the texts of a few records of a TensorFlow Dataset."""
        digest = hashlib.sha256(self.records.identity.encode())
        if isinstance(self.records, TfdsRecords):
            for i in range(0, len(self.records), -(-len(self.records) // _COMPARED)):
                with contextlib.suppress(BadRecord):
                    digest.update(repr(self.records.text(i)[0]).encode())
        return {"records": len(self.records), "bytes": self.records.bytes, "hash": digest.hexdigest()}

    def read(self, k: int) -> Record:
        return self._record(self.records.read(int(self.numbers[k])))

    def text(self, k: int) -> Record:
        return self._record(self.records.text(int(self.numbers[k])))

    def lengths(self, k: int, key: str) -> np.void | None:
        return lengths.entry(self.records, int(self.numbers[k]), key) if isinstance(self.records, Shards) else None

    def _record(self, found: tuple[dict[str, Any], list[bytes], str]) -> Record:
        header, images, where = found
        record = understand(header, header.get("number", 0), where, stored=True)
        sizes = tuple((image["width"], image["height"]) for image in header["images"] if "width" in image)
        path = Path(str(header["images"][0].get("name"))) if images else None
        return Record(record.id, path, record.turns, record.where, tuple(images), sizes, system=record.system)


def open_json(
    path: Path,
    image_folder: str | Path | None,
    strategy: str,
    seed: int,
    where: str,
    allow_outside: bool = False,
) -> JsonData:
    if image_folder is not None and not is_folder(image_folder):
        raise UserError(f"{where}: there is no image folder {shown(image_folder, 1000)}.")
    parse_strategy(strategy, where)  # a typing error should be reported before a long file is read
    spans = scan_json(path)
    numbers = _choose(len(spans), strategy, seed, path.name, where)
    folder = path.parent if image_folder is None else Path(image_folder)
    return JsonData(path, folder, allow_outside, spans, numbers)


def open_stored(name: str, records: Shards | TfdsRecords, strategy: str, seed: int, where: str) -> StoredData:
    name = name if name.startswith("tfds:") else os.path.basename(name.rstrip("/"))
    if not len(records):
        raise UserError(f"{where}: {name} holds no records.")
    return StoredData(name, records, _choose(len(records), strategy, seed, name, where))


def is_folder(path: str | Path) -> bool:
    try:
        return os.path.isdir(path)
    except ValueError:  # a name that no file can have
        return False


def locate(folder: Path, name: str, root: str | None, where: str) -> Path:
    """Returns the image's file; BadRecord (image_outside_folder) if it is not inside `root`, a real path, if any."""
    path = folder / name
    if root is None:
        return path
    try:
        real = os.path.realpath(path)
    except (OSError, ValueError):
        return path  # no file can have this name; reading it will fail with that message
    if not real.startswith(os.path.join(root, "")):
        raise BadRecord(
            "image_outside_folder",
            where,
            f"the image {shown(name)} lies outside {folder}; `allow_outside: true` in a mixture allows it",
        )
    return path


def parse_strategy(strategy: str, where: str) -> tuple[str, int | None, float | None]:
    """Returns the kind, the number of records (or None) and the percentage (or None)."""
    match = _STRATEGY.fullmatch(strategy) if isinstance(strategy, str) else None
    if strategy == "all":
        return "first", None, 100.0
    if match is None or float(match[2] or match[3]) == 0 or float(match[3] or 0) > 100:
        raise UserError(f"{where}: unknown sampling strategy {as_yaml(strategy)}; allowed are {_STRATEGIES}.")
    return match[1], int(match[2]) if match[2] else None, float(match[3]) if match[3] else None


def _choose(total: int, strategy: str, seed: int, name: str, where: str) -> range | np.ndarray:
    """Returns the numbers of the records that the strategy takes, ascending."""
    how, count, percent = parse_strategy(strategy, where)
    # Rounding first keeps 7% of 100 at 7 although 0.07 is not exact in binary.
    count = max(1, math.ceil(round(total * percent / 100, 6))) if count is None else min(count, total)
    if how == "first":
        return range(count)
    if how == "end":
        return range(total - count, total)
    # By name, not path: every machine must choose the same records wherever its data is.
    return _sample(total, count, [seed, zlib.crc32(name.encode())])


def _sample(total: int, count: int, seed: list[int]) -> np.ndarray:
    """Draws `count` different numbers below `total`, ascending: (count,) uint32, or uint64 if they need it."""
    chosen = np.random.default_rng(seed).choice(total, count, replace=False)
    return np.sort(chosen).astype(np.uint32 if total <= 1 << 32 else np.uint64)


def as_yaml(value: Any) -> str:
    """Writes a value of a mixture as YAML does, for messages."""
    return "null" if value is None else "an empty text" if value == "" else brief(value)
