"""Training records with random access: LLaVA-style JSON and JSONL files, and mixtures of them in YAML.

    JSON    [{"id": "7", "image": "a/b.jpg", "conversations": [{"from": "human", "value": "..."}, ...]}, ...]
    JSONL   the same objects, one a line
    YAML    datasets:
              - json_path: captions.json          # relative to the YAML file
                sampling_strategy: "random:10%"   # all, first:N, end:N or random:N; N a number or a percentage
                image_folder: images              # optional, relative to the YAML file

A file is parsed once, when it is opened, to check it and to find where each record lies. Two numbers a record stay in
memory; the text is read again from the mapped file, whose pages all processes of a host share.
"""

import codecs
import json
import math
import mmap
import operator
import re
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from fusion_jax.errors import BadRecord, UserError

_STRATEGIES = "all, first:N, end:N or random:N, where N is a number above 0 or a percentage such as 10%"
_STRATEGY = re.compile(r"(first|end|random):(?:(\d+)|(\d+(?:\.\d+)?)%)")
_CHUNK = 1 << 22
_MAX_RECORD = 1 << 26  # characters; past this a record that does not end is taken for a syntax error
_BOM = codecs.BOM_UTF8


@dataclass(frozen=True)
class Record:
    """One training record as its file gives it.

    Attributes:
      id: the record's own id, or its number in the file.
      image_path: the image file; None in a record without one.
      turns: the conversation, `{"from": text, "value": text}` each; roles and their order are not checked here.
      where: file and record, for messages.
    """

    id: str
    image_path: Path | None
    turns: list[dict[str, str]]
    where: str


class _File:
    """The chosen records of one JSON or JSONL file."""

    def __init__(self, path: Path, image_folder: Path, spans: np.ndarray, numbers: np.ndarray):
        """Args: spans (all records, 2) int64, first byte and the one past the last; numbers (chosen,) int64."""
        self.path, self.image_folder = path, image_folder
        self.spans, self.numbers = spans[numbers], numbers
        self._data = None

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> Record:
        if self._data is None:
            self._data = _map(self.path)
        start, stop = self.spans[i]
        return _record(self._data[start:stop], self.path, int(self.numbers[i]), self.image_folder)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_data": None}  # a mapping stays in its process; another one maps the file again


class RecordSource:
    """Records of one or several files, one after the other: `len(source)`, `source[i]`. Can be pickled.

    `source[i]` raises BadRecord for a record that is no conversation (reason missing_key, bad_turns, bad_image,
    several_images or bad_record), naming file, record and key.
    """

    def __init__(self, files: Sequence[_File]):
        self._files = tuple(files)
        self._ends = np.cumsum([len(f) for f in files])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> Record:
        i = operator.index(i)
        i = i + len(self) if i < 0 else i
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        k = int(np.searchsorted(self._ends, i, side="right"))
        return self._files[k][i - int(self._ends[k]) + len(self._files[k])]


def load_source(path: str | Path, image_folder: str | Path | None = None, seed: int = 0) -> RecordSource:
    """Records of a .json or .jsonl file, or of a .yaml or .yml mixture, told apart by the file's ending.

    Args:
      path: the file.
      image_folder: where relative image paths start; by default the folder of the file that names them.
      seed: for the `random` strategies of a mixture.

    Raises:
      UserError: as for `load_records` and `load_mixture`, or another ending.
    """
    path = Path(path)
    if path.suffix in (".yaml", ".yml"):
        return load_mixture(path, seed, image_folder)
    if path.suffix in (".json", ".jsonl"):
        return load_records(path, image_folder, seed=seed)
    raise UserError(f"Cannot tell what {path} is; data files end in .json, .jsonl, .yaml or .yml.")


def load_records(
    json_path: str | Path, image_folder: str | Path | None = None, strategy: str = "all", seed: int = 0
) -> RecordSource:
    """Records of one JSON list or JSONL file.

    Args:
      json_path: ends in .jsonl for one record a line; anything else is read as one JSON list.
      image_folder: where relative image paths start; by default the file's own folder.
      strategy: all, first:N, end:N or random:N, N a number (all if there are fewer) or a percentage (rounded up).
      seed: decides, together with the file's name, what `random` takes; the file's order is kept.

    Raises:
      UserError: missing file or folder, invalid JSON, not a list, no records, unknown strategy.
    """
    return RecordSource([_open(Path(json_path), image_folder, strategy, seed, f"{json_path}")])


def load_mixture(yaml_path: str | Path, seed: int = 0, image_folder: str | Path | None = None) -> RecordSource:
    """Records of all files that a YAML mixture lists, in its order.

    Args:
      yaml_path: see the top of this file.
      seed: for the `random` strategies.
      image_folder: for the entries that name none; by default the folder of each JSON file.

    Raises:
      UserError: missing or invalid YAML, no `datasets`, unknown keys, and whatever `load_records` raises.
    """
    path = Path(yaml_path)
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"Cannot read the data mixture {path}: {e.strerror}.") from e
    except (yaml.YAMLError, ValueError) as e:
        raise UserError(f"{path} is not valid YAML: {e}.") from e
    datasets = config.get("datasets") if isinstance(config, dict) else None
    if not isinstance(datasets, list) or not datasets:
        raise UserError(f"{path} must have a list `datasets` with at least one entry, each with a json_path.")
    files = []
    for k, entry in enumerate(datasets):
        where = f"{path}, datasets entry {k}"
        keys = ("json_path", "sampling_strategy", "image_folder")
        if not isinstance(entry, dict) or not isinstance(entry.get("json_path"), str):
            raise UserError(f"{where} must be a mapping with a json_path.")
        if unknown := sorted(map(str, entry.keys() - set(keys))):
            raise UserError(f"{where} has the unknown key {unknown[0]!r}; allowed are {', '.join(keys)}.")
        folder = entry.get("image_folder", image_folder)
        if entry.get("image_folder") is not None:
            folder = path.parent / str(folder)
        strategy = entry.get("sampling_strategy", "all")
        files.append(_open(path.parent / entry["json_path"], folder, strategy, seed, where))
    return RecordSource(files)


def _open(path: Path, image_folder: str | Path | None, strategy: str, seed: int, where: str) -> _File:
    if image_folder is not None and not Path(image_folder).is_dir():
        raise UserError(f"{where}: there is no image folder {image_folder}.")
    _parse_strategy(strategy, where)  # a typing mistake should not wait for a long file
    data = _map(path)
    spans = _scan_lines(data, path) if path.suffix == ".jsonl" else _scan_list(data, path)
    if not len(spans):
        raise UserError(f"{path} holds no records.")
    numbers = _choose(len(spans), strategy, seed, path.name, where)
    return _File(path, path.parent if image_folder is None else Path(image_folder), spans, numbers)


def _parse_strategy(strategy: str, where: str) -> tuple[str, int | None, float | None]:
    """How, how many (or None), what percentage (or None)."""
    match = _STRATEGY.fullmatch(strategy) if isinstance(strategy, str) else None
    if strategy == "all":
        return "first", None, 100.0
    if match is None or float(match[2] or match[3]) == 0 or float(match[3] or 0) > 100:
        raise UserError(f"{where}: unknown sampling strategy {strategy!r}; allowed are {_STRATEGIES}.")
    return match[1], int(match[2]) if match[2] else None, float(match[3]) if match[3] else None


def _choose(total: int, strategy: str, seed: int, name: str, where: str) -> np.ndarray:
    """Numbers of the records that the strategy takes, ascending: (chosen,) int64."""
    how, count, percent = _parse_strategy(strategy, where)
    # Rounding first keeps 7% of 100 at 7 although 0.07 is no binary number.
    count = math.ceil(round(total * percent / 100, 6)) if count is None else min(count, total)
    if how == "first":
        return np.arange(count)
    if how == "end":
        return np.arange(total - count, total)
    # By name, not path: every machine must take the same records wherever the data lies.
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return np.sort(generator.choice(total, count, replace=False))


def _map(path: Path) -> mmap.mmap | bytes:
    try:
        with open(path, "rb") as f:
            # An empty file cannot be mapped.
            return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
    except OSError as e:
        raise UserError(f"Cannot read the data file {path}: {e.strerror}.") from e


def _scan_lines(data: mmap.mmap | bytes, path: Path) -> np.ndarray:
    """Where each record of a JSONL file lies; blank lines are none: (records, 2) int64."""
    spans, start, number = array("q"), len(_BOM) if data[:3] == _BOM else 0, 0
    while start < len(data):
        number += 1
        stop = data.find(b"\n", start)
        stop = len(data) if stop < 0 else stop
        line = data[start:stop]
        if line.strip():
            try:
                json.loads(line)
            except (ValueError, RecursionError) as e:
                raise UserError(f"{path}, line {number} is not valid JSON: {e}.") from e
            spans.extend((start, stop))
        start = stop + 1
    return np.array(spans, np.int64).reshape(-1, 2)


def _scan_list(data: mmap.mmap | bytes, path: Path) -> np.ndarray:
    """Where each element of a JSON list lies: (records, 2) int64. Only a few megabytes are decoded at a time."""
    reader = _Reader(data, path)
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

    def __init__(self, data: mmap.mmap | bytes, path: Path):
        self._data, self._path = data, path
        self._read = self._byte = len(_BOM) if data[:3] == _BOM else 0  # next byte to decode; byte of text[at]
        self._text, self._at = "", 0
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._json = json.JSONDecoder()

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
                _, stop = self._json.raw_decode(self._text, self._at)
                # What ends with the window may go on behind it, as a number does.
                if stop < len(self._text) or not self._more():
                    break
            except (json.JSONDecodeError, RecursionError) as e:
                if len(self._text) - self._at > _MAX_RECORD or not self._more():
                    self.fail(str(getattr(e, "msg", e)), getattr(e, "pos", self._at))
        start = self._byte
        self.skip(stop - self._at)
        return start, self._byte

    def fail(self, what: str, at: int | None = None) -> None:
        byte = self._byte + len(self._text[self._at : at].encode()) if at is not None else self._byte
        line = self._data[:byte].count(b"\n") + 1
        raise UserError(f"{self._path} is not valid JSON at line {line}, byte {byte}: {what}.")

    def _more(self) -> bool:
        """Drops what has been passed and decodes on, twice as much as is left over; False at the file's end."""
        if self._read >= len(self._data):
            return False
        self._text, self._at = self._text[self._at :], 0
        stop = min(self._read + max(_CHUNK, len(self._text)), len(self._data))
        try:
            self._text += self._utf8.decode(self._data[self._read : stop], final=stop == len(self._data))
        except UnicodeDecodeError as e:
            raise UserError(f"{self._path} is not valid UTF-8 near byte {self._read + e.start}.") from e
        self._read = stop
        return True


def _record(data: bytes, path: Path, number: int, image_folder: Path) -> Record:
    """The checked record number `number` of `path`."""
    where = f"{path}, record {number}"
    try:
        record = json.loads(data)
    except ValueError as e:
        raise UserError(f"{where} is no longer valid JSON: the file changed after it was opened.") from e
    if not isinstance(record, dict):
        raise BadRecord("bad_record", where, f"a record must be an object, not {type(record).__name__}")
    name = str(number)
    if record.get("id") is not None:
        name = str(record["id"])
        where = f"{where} (id {name})"
    if "conversations" not in record:
        raise BadRecord("missing_key", where, "the key 'conversations' is missing")
    turns = record["conversations"]
    if not isinstance(turns, list):
        raise BadRecord("bad_turns", where, f"'conversations' must be a list, not {type(turns).__name__}")
    for k, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise BadRecord("bad_turns", where, f"'conversations' entry {k} must be an object with 'from' and 'value'")
        for key in ("from", "value"):
            if key not in turn:
                raise BadRecord("missing_key", where, f"the key '{key}' is missing in 'conversations' entry {k}")
            if not isinstance(turn[key], str):
                raise BadRecord("bad_turns", where, f"'{key}' must be a text in 'conversations' entry {k}")
    image = record.get("image")
    if isinstance(image, list):
        if len(image) > 1:
            raise BadRecord("several_images", where, f"'image' names {len(image)} files; one is supported")
        image = image[0] if image else None
    if image is not None and not isinstance(image, str):
        raise BadRecord("bad_image", where, f"'image' must be a file name, not {type(image).__name__}")
    return Record(name, image_folder / image if image else None, turns, where)
