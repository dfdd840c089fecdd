"""Training records with random access, from JSON, shards and TensorFlow Datasets, and mixtures of them in YAML.

    JSON    [{"id": "7", "image": "a/b.jpg", "conversations": [{"from": "human", "value": "..."}, ...]}, ...],
            or another form that records.py understands
    JSONL   the same objects, one a line
    shards  a folder that `python -m fusion_jax.shards` wrote, here or at a URL; see shards.py
    tfds    tfds:name[/config][:version]:split, a data set that TensorFlow Datasets has prepared
    YAML    datasets:
              - json_path: captions.json          # relative to the YAML file, as all paths in it
                sampling_strategy: "random:10%"   # all, first:N, end:N or random:N; N a number or a percentage
                weight: 2.5                       # drawn twice an epoch, and half of them a third time
                image_folder: images              # default: the JSON file's folder
                allow_outside: true               # images may lie outside image_folder: absolute paths, "..", links
              - shards: stage1
              - tfds: coco_captions:train[:50%]
                data_dir: /data/tfds              # default: TFDS's own
                features: {image: image, text: captions/text}    # or conversations, and id; default: of these names
                prompt: Describe the image.       # the question that a text answers

A weight counts after the strategy: 1 is the default, 0.5 draws half of what was chosen. Which records make up the
fraction is decided by seed and name and stays the same from epoch to epoch. A percentage is rounded up, and takes one
record at least.

A JSON file is parsed once, when it is opened, to check it and to find where each record lies. Two numbers a record stay
in memory; the text is read again from the file. Of shards and TensorFlow Datasets nothing is kept for a record, but 4
bytes for each that `random` or the fraction of a weight chose.

What cannot be read whole is a bad record where the rest of the file can be used: nested too deeply, an integer of
thousands of digits, too long.
"""

import codecs
import contextlib
import hashlib
import json
import math
import operator
import os
import re
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import yaml

from fusion_jax.data import shards
from fusion_jax.data.records import understand
from fusion_jax.errors import BadRecord, UserError, nearest, no_key
from fusion_jax.files import brief, open_file, parse_json, read_file, read_text, shown

_STRATEGIES = "all, first:N, end:N or random:N, where N is a number above 0 or a percentage such as 10%"
_STRATEGY = re.compile(r"(first|end|random):(?:(\d{1,18})|(\d{1,3}(?:\.\d{1,300})?)%)", re.ASCII)
_MAX_WEIGHT = 1_000_000
_HASHED = 1 << 26  # bytes of a JSON file that is hashed as a whole; of larger ones these many records are:
_COMPARED = 64
_CHUNK = 1 << 22
_MAX_RECORD = 1 << 26  # bytes of one record; in a list, one that has not ended by then is taken for a syntax error
_MAX_YAML = 1 << 20  # bytes of a mixture
_MAX_KEYS = 1000  # of one of its mappings, with all that is merged into it
_BOM = codecs.BOM_UTF8
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# Integers as floats: those of thousands of digits are a bad record's, and reading it will say so.
_DECODER = json.JSONDecoder(parse_int=float)
# What tells where a list or object ends; a quote alone begins a text that does not end here.
_MARKS = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|["\[\]{}]', re.DOTALL)
# What an entry of a mixture may name, and what else it may then say.
_ENTRIES = {
    "json_path": ("image_folder", "allow_outside"),
    "shards": (),
    "tfds": ("data_dir", "features", "prompt"),
}
_COMMON = ("sampling_strategy", "weight")


@dataclass(frozen=True)
class Record:
    """One training record as its file gives it.

    Attributes:
      id: the record's own id, or its number in the file.
      image_path: the first image's file, or the name it had where the image itself came along; None without an image.
      turns: the conversation, `{"from": text, "value": text}` each; roles and their order are not checked here.
      where: file and record, for messages.
      images: all images in order, each as a file or as a file's bytes: what to load. By default `image_path` alone.
      sizes: width and height of each image where the source knows them, which only shards do; else empty.
      literal: the texts are somebody's own words, in which control tokens and image tags are text; see
        `conversation.encode_prompt`.
      system: the record's own system text, in place of the template's; None for that one.
    """

    id: str
    image_path: Path | None
    turns: list[dict[str, str]]
    where: str
    images: tuple[Path | bytes, ...] | None = field(default=None, repr=False)
    sizes: tuple[tuple[int, int], ...] = ()
    literal: bool = False
    system: str | None = None

    def __post_init__(self):
        if self.images is None:
            object.__setattr__(self, "images", () if self.image_path is None else (self.image_path,))


class _Part:
    """The records that a mixture draws from one data set. `copies` times all that were chosen, then `extra` of them."""

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
        """What the data set is, by which two starts or two machines are compared. JSON.

        name; drawn: records of an epoch; chosen: checksum of which they are; records, bytes and hash of the whole.
        """
        which = (self.copies, zlib.crc32(np.asarray(self.numbers, np.int64)), zlib.crc32(self.extra))
        drawn = {"name": self.name, "drawn": len(self), "chosen": zlib.crc32(repr(which).encode())}
        return drawn | self.content()

    def content(self) -> dict[str, Any]:
        """records, bytes and hash of the whole data set."""
        raise NotImplementedError

    def place(self, i: int) -> int:
        """Which of the chosen records is the i-th to draw."""
        all_of_them = self.copies * len(self.numbers)
        return i % len(self.numbers) if i < all_of_them else int(self.extra[i - all_of_them])


class _Json(_Part):
    """One JSON or JSONL file."""

    def __init__(self, path: Path, folder: Path, allow_outside: bool, spans: np.ndarray, numbers: Sequence[int]):
        """Args: spans (all records, 2) int64, first byte and the one past the last; numbers of the chosen ones."""
        super().__init__(path.name, numbers)
        self.path, self.image_folder = path, folder
        self.root = None if allow_outside else os.path.realpath(folder)
        self.total = len(spans)
        self.spans = spans if len(numbers) == len(spans) else spans[np.asarray(numbers)]
        self._file = None

    def content(self) -> dict[str, Any]:
        """Of a large file the hash is one of where each chosen record lies, and of the bytes of a few."""
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
        said = understand(read_record(self._file, self.spans[k], where), number, where)
        paths = [
            Path(image.name or f"{number}-{i}") if image.data is not None else self._locate(image.name, said.where)
            for i, image in enumerate(said.images)
        ]
        images = tuple(path if image.data is None else image.data for image, path in zip(said.images, paths))
        return Record(said.id, paths[0] if paths else None, said.turns, said.where, images, system=said.system)

    def _locate(self, name: str, where: str) -> Path:
        return locate(self.image_folder, name, self.root, where)

    text = read

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_file": None}  # an open file stays in its process; another one opens it again


class _Stored(_Part):
    """Records that carry their images."""

    def __init__(self, name: str, records: shards.Shards | shards.TfdsRecords, numbers: Sequence[int]):
        super().__init__(name, numbers)
        self.records = records

    def content(self) -> dict[str, Any]:
        """By the hashes in the manifest of shards; by the texts of a few records of a TensorFlow Dataset."""
        digest = hashlib.sha256(self.records.identity.encode())
        if isinstance(self.records, shards.TfdsRecords):
            for i in range(0, len(self.records), -(-len(self.records) // _COMPARED)):
                with contextlib.suppress(BadRecord):
                    digest.update(repr(self.records.text(i)[0]).encode())
        return {"records": len(self.records), "bytes": self.records.bytes, "hash": digest.hexdigest()}

    def read(self, k: int) -> Record:
        return self._record(self.records.read(int(self.numbers[k])))

    def text(self, k: int) -> Record:
        return self._record(self.records.text(int(self.numbers[k])))

    def _record(self, found: tuple[dict[str, Any], list[bytes], str]) -> Record:
        header, images, where = found
        said = understand(header, header.get("number", 0), where, stored=True)
        sizes = tuple((image["width"], image["height"]) for image in header["images"] if "width" in image)
        path = Path(str(header["images"][0].get("name"))) if images else None
        return Record(said.id, path, said.turns, said.where, tuple(images), sizes, system=said.system)


class RecordSource:
    """Records of one or several data sets, one after the other: `len(source)`, `source[i]`. Can be pickled.

    `source[i]` raises BadRecord for a record that is no conversation (the reasons of `records.understand`, or
    duplicate_key, image_outside_folder, corrupt_record, unreadable_json or too_large), naming file, record and key.

    Attributes:
      parts: name and number of records, weighted, of each data set, in order.
    """

    def __init__(self, parts: Sequence[_Part]):
        self._parts = tuple(parts)
        self._ends = np.cumsum([len(part) for part in parts])
        self.parts = [(part.name, len(part)) for part in parts]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> Record:
        part, k = self._find(i)
        return part.read(k)

    def text(self, i: int) -> Record:
        """The same record for its text, without reading images where that saves anything: images of shards are empty
        then, and as many as there are."""
        part, k = self._find(i)
        return part.text(k)

    def describe(self) -> list[dict[str, Any]]:
        """What each data set is: see `_Part.describe`. UserError where a file cannot be read any more."""
        return [part.describe() for part in self._parts]

    def part(self, i: int) -> int:
        """Which of `parts` record i belongs to."""
        return int(np.searchsorted(self._ends, i, side="right"))

    def _find(self, i: int) -> tuple[_Part, int]:
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
    """Records of whatever the path names: a .json or .jsonl file, a .yaml or .yml mixture, a folder of shards (here or
    at a URL), or `tfds:name:split`.

    Args:
      path: see the top of this file.
      image_folder: where relative image paths start; by default the folder of the file that names them.
      seed: for what a mixture draws at random.
      allow_outside: images of JSON files may lie outside their folder. An entry of a mixture can say otherwise.

    Raises:
      UserError: as for `load_records`, `load_mixture` and shards.py, or something else.
    """
    text = str(path)
    if text.startswith("tfds:"):
        return RecordSource([_open_stored(text, shards.TfdsRecords(text), "all", seed, text)])
    if shards.is_url(text) and not text.endswith((".json", ".jsonl", ".yaml", ".yml")):
        return RecordSource([_open_stored(text, shards.Shards(text), "all", seed, text)])
    if shards.is_url(text):
        raise UserError(f"{text} must be copied to a local disk first: only folders of shards are read from URLs.")
    path = Path(path)
    if path.suffix in (".yaml", ".yml"):
        return load_mixture(path, seed, image_folder, allow_outside=allow_outside)
    if path.suffix in (".json", ".jsonl"):
        return RecordSource([_open_json(path, image_folder, "all", seed, text, allow_outside)])
    if _is_folder(path):
        return RecordSource([_open_stored(text, shards.Shards(text), "all", seed, text)])
    raise UserError(
        f"Cannot tell what {path} is: it is no folder of shards, and data files end in .json, .jsonl, .yaml or .yml."
    )


def load_records(
    json_path: str | Path, image_folder: str | Path | None = None, strategy: str = "all", seed: int = 0
) -> RecordSource:
    """Records of one JSON list or JSONL file.

    Args:
      json_path: ends in .jsonl for one record a line; anything else is read as one JSON list.
      image_folder: where relative image paths start; by default the file's own folder.
      strategy: all, first:N, end:N or random:N, N a number (all if there are fewer) or a percentage, rounded up.
      seed: decides, together with the file's name, what `random` takes; the file's order is kept.

    Raises:
      UserError: missing file or folder, invalid JSON, not a list, no records, unknown strategy.
    """
    return RecordSource([_open_json(Path(json_path), image_folder, strategy, seed, f"{json_path}")])


def load_mixture(
    yaml_path: str | Path,
    seed: int = 0,
    image_folder: str | Path | None = None,
    *,
    allow_outside: bool = False,
) -> RecordSource:
    """Records of all data sets that a YAML mixture lists, in its order.

    Args:
      yaml_path: see the top of this file.
      seed: for the `random` strategies and the fractions of weights.
      image_folder: for the entries that name none; by default the folder of each JSON file.
      allow_outside: as for `load_source`.

    Raises:
      UserError: missing or invalid YAML, no `datasets`, unknown or doubled keys, and whatever opening an entry raises.
    """
    path = Path(yaml_path)
    try:
        config = yaml.load(read_text(path, limit=_MAX_YAML), Loader=_Loader)
    except OSError as e:
        raise UserError(f"Cannot read the data mixture {path}: {e.strerror}.") from e
    except RecursionError as e:
        raise UserError(f"{path} is no data mixture: it is nested too deeply.") from e
    except Exception as e:  # besides YAMLError: values that are none of their tag raise almost anything
        raise UserError(f"{path} is not valid YAML: {shown(' '.join(str(e).split()), 500)}.") from e
    if not isinstance(config, dict) or not isinstance(datasets := config.get("datasets"), list) or not datasets:
        found = (
            "; datasets is " + _said(config["datasets"]) if isinstance(config, dict) and "datasets" in config else ""
        )
        raise UserError(f"{path} must have a list `datasets` with at least one entry, each with a json_path{found}.")
    entry_keys = {*_ENTRIES, *_COMMON, *(key for keys in _ENTRIES.values() for key in keys)}
    if misplaced := [key for key in config if key in entry_keys]:
        raise UserError(f"{path}: {misplaced[0]} stands beside `datasets`; it belongs into an entry of that list.")
    parts = []
    for k, entry in enumerate(datasets):
        where = f"{path}, datasets entry {k}"
        if not isinstance(entry, dict):
            raise UserError(f"{where} must be a mapping with one of {', '.join(_ENTRIES)}, not {_said(entry)}.")
        kinds = [kind for kind in _ENTRIES if kind in entry]
        if len(kinds) != 1:
            has = ", ".join(kinds) or ", ".join(brief(key) for key in entry) or "nothing"
            near = "".join(f"; {one}" for one in (nearest(key, _ENTRIES) for key in entry) if one and not kinds) or "."
            raise UserError(f"{where} must be a mapping with one of {', '.join(_ENTRIES)}; it has {has}{near}")
        if not isinstance(entry[kinds[0]], str) or not entry[kinds[0]]:
            raise UserError(f"{where}: {kinds[0]} must be a text, not {_said(entry[kinds[0]])}.")
        keys = (kinds[0], *_COMMON, *_ENTRIES[kinds[0]])
        for key in sorted(map(shown, entry.keys() - set(keys))):
            raise no_key(f"{path}: datasets[{k}]", key, keys)
        weight = entry.get("weight", 1.0)
        if type(weight) not in (int, float) or not 0 < weight <= _MAX_WEIGHT:
            said = _said(weight)
            raise UserError(f"{where}: weight must be a number above 0, not {said}, and at most {_MAX_WEIGHT:,}.")
        folder = image_folder
        if "image_folder" in entry:
            named = entry["image_folder"]
            if not isinstance(named, str | None):
                raise UserError(f"{where}: image_folder must be a text, not {_said(named)}.")
            folder = None if named is None else path.parent / named
        part = _open_entry(entry, path.parent, folder, seed, where, allow_outside)
        part.weigh(weight, seed)
        parts.append(part)
    for key in sorted(map(shown, config.keys() - {"datasets"})):
        raise no_key(f"{path}: the mixture", key, ["datasets"])
    return RecordSource(parts)


def _open_entry(
    entry: dict, here: Path, image_folder: str | Path | None, seed: int, where: str, outside: bool
) -> _Part:
    strategy = entry.get("sampling_strategy", "all")
    parse_strategy(strategy, where)  # a typing mistake should not wait for a long file
    if "json_path" in entry:
        outside = entry.get("allow_outside", outside)
        if not isinstance(outside, bool):
            raise UserError(f"{where}: allow_outside must be true or false, not {_said(outside)}.")
        return _open_json(here / entry["json_path"], image_folder, strategy, seed, where, outside)
    if "shards" in entry:
        folder = entry["shards"] if shards.is_url(entry["shards"]) else str(here / entry["shards"])
        return _open_stored(folder, shards.Shards(folder), strategy, seed, where)
    data_dir, features, prompt = (entry.get(key) for key in _ENTRIES["tfds"])
    if not isinstance(data_dir, str | None) or not isinstance(prompt, str | None):
        raise UserError(f"{where}: data_dir and prompt must be texts.")
    if not isinstance(features, dict | None):
        raise UserError(f"{where}: features must be a mapping such as {{image: image, text: caption}}.")
    if data_dir is not None and not shards.is_url(data_dir):
        data_dir = str(here / Path(data_dir).expanduser())
    spec = f"tfds:{entry['tfds'].removeprefix('tfds:')}"
    try:
        records = shards.TfdsRecords(spec, data_dir, features, prompt)
    except UserError as e:
        raise UserError(f"{where}: {e}") from e
    return _open_stored(spec, records, strategy, seed, where)


def _said(value: Any) -> str:
    """A value of a mixture as YAML writes it."""
    return "null" if value is None else "an empty text" if value == "" else brief(value)


class _Loader(yaml.SafeLoader):
    """YAML in which no mapping names a key twice, or grows beyond all measure by what is merged into it."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > _MAX_KEYS:
            raise yaml.constructor.ConstructorError(
                None, None, f"a mapping has more than {_MAX_KEYS} keys", node.start_mark
            )

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name in seen and name != "<<":
                problem = f"the key {name!r} stands there twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def _open_json(
    path: Path,
    image_folder: str | Path | None,
    strategy: str,
    seed: int,
    where: str,
    allow_outside: bool = False,
) -> _Json:
    if image_folder is not None and not _is_folder(image_folder):
        raise UserError(f"{where}: there is no image folder {shown(image_folder, 1000)}.")
    parse_strategy(strategy, where)  # a typing mistake should not wait for a long file
    spans = scan_json(path)
    numbers = _choose(len(spans), strategy, seed, path.name, where)
    folder = path.parent if image_folder is None else Path(image_folder)
    return _Json(path, folder, allow_outside, spans, numbers)


def _is_folder(path: str | Path) -> bool:
    try:
        return os.path.isdir(path)
    except ValueError:  # a name that no file can have
        return False


def _open_stored(
    name: str, records: shards.Shards | shards.TfdsRecords, strategy: str, seed: int, where: str
) -> _Stored:
    name = name if name.startswith("tfds:") else os.path.basename(name.rstrip("/"))
    if not len(records):
        raise UserError(f"{where}: {name} holds no records.")
    return _Stored(name, records, _choose(len(records), strategy, seed, name, where))


def scan_json(path: Path) -> np.ndarray:
    """Where each record of a JSON list or JSONL file lies: (records, 2) int64. UserError if invalid or empty."""
    try:
        with open_file(path) as file:
            if file.read(2) in _UTF16:
                raise UserError(f"{path} is in UTF-16; data files are read in UTF-8: save it in that encoding.")
            file.seek(0)
            spans = _scan_lines(file, path) if path.suffix == ".jsonl" else _scan_list(file, path)
    except OSError as e:
        raise UserError(f"Cannot read the data file {shown(path, 1000)}: {e.strerror}.") from e
    if not len(spans):
        raise UserError(f"{path} holds no records.")
    return spans


def parse_strategy(strategy: str, where: str) -> tuple[str, int | None, float | None]:
    """How, how many (or None), what percentage (or None)."""
    match = _STRATEGY.fullmatch(strategy) if isinstance(strategy, str) else None
    if strategy == "all":
        return "first", None, 100.0
    if match is None or float(match[2] or match[3]) == 0 or float(match[3] or 0) > 100:
        raise UserError(f"{where}: unknown sampling strategy {_said(strategy)}; allowed are {_STRATEGIES}.")
    return match[1], int(match[2]) if match[2] else None, float(match[3]) if match[3] else None


def _choose(total: int, strategy: str, seed: int, name: str, where: str) -> range | np.ndarray:
    """Numbers of the records that the strategy takes, ascending."""
    how, count, percent = parse_strategy(strategy, where)
    # Rounding first keeps 7% of 100 at 7 although 0.07 is no binary number.
    count = max(1, math.ceil(round(total * percent / 100, 6))) if count is None else min(count, total)
    if how == "first":
        return range(count)
    if how == "end":
        return range(total - count, total)
    # By name, not path: every machine must take the same records wherever the data lies.
    return _sample(total, count, [seed, zlib.crc32(name.encode())])


def _sample(total: int, count: int, seed: list[int]) -> np.ndarray:
    """That many different numbers below `total`, ascending: (count,) uint32, or uint64 where it takes that."""
    chosen = np.random.default_rng(seed).choice(total, count, replace=False)
    return np.sort(chosen).astype(np.uint32 if total <= 1 << 32 else np.uint64)


class DataFile:
    """A file that is read piece by piece for as long as a run takes, by any number of threads.

    Not mapped: where the file is cut or written anew meanwhile, a mapping ends the process (SIGBUS) without a word.
    """

    def __init__(self, path: Path):
        """Raises UserError where the file cannot be opened."""
        try:
            self._file = open_file(path)
        except OSError as e:
            raise UserError(f"Cannot read the data file {shown(path, 1000)}: {e.strerror}.") from e

    def read(self, span: np.ndarray) -> bytes:
        """The bytes from `span[0]` up to `span[1]`; fewer where the file has become shorter."""
        return os.pread(self._file.fileno(), int(span[1] - span[0]), int(span[0]))


def _scan_lines(file: BinaryIO, path: Path) -> np.ndarray:
    """Where each record of a JSONL file lies; blank lines are none: (records, 2) int64."""
    spans, start, number = array("q"), 0, 0
    while line := file.readline(_MAX_RECORD + 1):
        number += 1
        stop = start + len(line)
        if line.endswith(b"\n") or len(line) <= _MAX_RECORD:
            if number == 1 and line.startswith(_BOM):
                start, line = start + len(_BOM), line[len(_BOM) :]
            if line.strip():
                try:
                    _DECODER.decode(line.decode("utf-8-sig"))  # files put together have more than one mark
                except RecursionError:
                    pass  # a bad record, as reading it will say
                except ValueError as e:
                    raise UserError(f"{path}, line {number} is not valid JSON: {e}.") from e
                spans.extend((start, stop - line.endswith(b"\n")))
        else:  # as is this one, of which nothing more is kept
            while (rest := file.readline(_CHUNK)) and not rest.endswith(b"\n"):
                stop += len(rest)
            stop += len(rest)
            spans.extend((start, stop - rest.endswith(b"\n")))
        start = stop
    return np.array(spans, np.int64).reshape(-1, 2)


def _scan_list(file: BinaryIO, path: Path) -> np.ndarray:
    """Where each element of a JSON list lies: (records, 2) int64. Only a few megabytes are decoded at a time."""
    reader = _Reader(file, path)
    if reader.peek() != "[":
        raise UserError(f"{path} must hold a JSON list of records; one record a line is read from files named .jsonl.")
    reader.skip(1)
    spans = array("q")
    closed = reader.peek() == "]"
    while not closed:
        spans.extend(reader.value())
        mark = reader.peek()
        if mark not in (",", "]"):
            reader.fail("expected ',' or ']' after a record")
        closed = mark == "]"
        if not closed:
            reader.skip(1)
    reader.skip(1)
    if reader.peek():
        reader.fail("text after the list's end")
    return np.array(spans, np.int64).reshape(-1, 2)


class _Reader:
    """A moving window of decoded text over the bytes of a JSON file."""

    def __init__(self, file: BinaryIO, path: Path):
        self._file, self._path = file, path
        # Next byte to decode; byte of text[at]; whether the file has ended.
        self._read = self._byte = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
        self._text, self._at, self._ended = "", 0, False
        self._utf8 = codecs.getincrementaldecoder("utf-8")()

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self.skip(1)
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def skip(self, count: int) -> None:
        self._byte += len(self._text[self._at : self._at + count].encode())
        self._at += count

    def value(self) -> tuple[int, int]:
        """Passes one JSON value; its first byte and the one past its last."""
        self.peek()
        while True:
            try:
                _, stop = _DECODER.raw_decode(self._text, self._at)
                # What ends with the window may go on behind it, as a number does.
                if stop < len(self._text) or not self._more():
                    break
            except RecursionError:  # a bad record, as reading it will say: only its end is looked for
                if (stop := _end(self._text, self._at)) is not None:
                    break
                if len(self._text) - self._at > _MAX_RECORD or not self._more():
                    self.fail("a list or object does not end", self._at)
            except json.JSONDecodeError as e:
                if len(self._text) - self._at > _MAX_RECORD or not self._more():
                    self.fail(e.msg, e.pos)
        start = self._byte
        self.skip(stop - self._at)
        return start, self._byte

    def fail(self, what: str, at: int | None = None) -> None:
        byte = self._byte + len(self._text[self._at : at].encode()) if at is not None else self._byte
        self._file.seek(0)
        line, left = 1, byte
        while left > 0 and (piece := self._file.read(min(left, _CHUNK))):
            line, left = line + piece.count(b"\n"), left - len(piece)
        raise UserError(f"{self._path} is not valid JSON at line {line}, byte {byte}: {what}.")

    def _more(self) -> bool:
        """Drops what has been passed and decodes on, twice as much as is left over; False at the file's end."""
        if self._ended:
            return False
        self._text, self._at = self._text[self._at :], 0
        self._file.seek(self._read)
        data = self._file.read(max(_CHUNK, len(self._text)))
        self._ended = not data
        try:
            self._text += self._utf8.decode(data, final=self._ended)
        except UnicodeDecodeError as e:
            raise UserError(f"{self._path} is not valid UTF-8 near byte {self._read + e.start}.") from e
        self._read += len(data)
        return True


def _end(text: str, at: int) -> int | None:
    """Where the list or object that begins at `at` ends; None where it does not in this text."""
    depth = 0
    for mark in _MARKS.finditer(text, at):
        first = mark[0]
        if first == '"':
            return None
        depth += (first in ("[", "{")) - (first in ("]", "}"))
        if depth == 0:
            return mark.end()
    return None


def read_record(file: DataFile, span: np.ndarray, where: str) -> Any:
    """One record's JSON.

    Raises:
      BadRecord: an object names a key twice (duplicate_key), too many bytes (too_large), or what `files.parse_json`
        refuses (unreadable_json).
      UserError: the file has changed since it was opened.
    """
    if span[1] - span[0] > _MAX_RECORD:
        raise BadRecord("too_large", where, f"the record has {span[1] - span[0]} bytes, over {_MAX_RECORD}")
    data = file.read(span)
    try:
        return parse_json(data, shards.unique)
    except shards.DuplicateKey as e:
        raise BadRecord("duplicate_key", where, f"{e}") from e
    except json.JSONDecodeError as e:  # it was valid then: where others lie is not known any more either
        raise UserError(f"{where} is no longer valid JSON: the file changed after it was opened.") from e
    except (ValueError, RecursionError) as e:
        raise BadRecord("unreadable_json", where, f"{e}") from e


def locate(folder: Path, name: str, root: str | None, where: str) -> Path:
    """The image's file. With `root`, the folder's real path, BadRecord (image_outside_folder) for a file outside it."""
    path = folder / name
    if root is None:
        return path
    try:
        real = os.path.realpath(path)
    except (OSError, ValueError):
        return path  # no file can have this name, which reading it will say
    if not real.startswith(os.path.join(root, "")):
        raise BadRecord(
            "image_outside_folder",
            where,
            f"the image {shown(name)} lies outside {folder}; "
            "`allow_outside: true` in a mixture would read it all the same",
        )
    return path
