"""Benchmark files: finding them in a data folder, and reading JSON, JSONL and Parquet.

A data folder holds one benchmark, or one folder for each, by the names that LLaVA's evaluation folder, the benchmarks'
own archives and the hub use; the hub's cache is such a folder, too. tables.py reads TSV and CSV, and hub.py says which
Parquet files of a snapshot are a task's.
"""

import base64
import binascii
import csv
import functools
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion_jax.errors import UserError
from fusion_jax.evals import hub
from fusion_jax.evals.choices import is_blank
from fusion_jax.evals.sources import note
from fusion_jax.evals.task import Picture
from fusion_jax.files import open_file, parse_json, read_text

_SUFFIXES = (".json", ".jsonl", ".tsv", ".csv", ".parquet")
# Columns and keys without which there is no question.
_QUESTIONS = ("question", "query", "text", "prompt", "label", "gt_answer")
_DEPTH = 4  # folders below the data folder in which files are looked for
_CHINESE = re.compile(r"[\u4e00-\u9fff]")
_MANY = 20  # questions without one Chinese character: of fewer nothing is said
_POINTER = b"version https://git-lfs.github.com/"


@dataclass(frozen=True)
class Folder:
    """One benchmark's data: the folder, and what should be in it, for errors."""

    path: Path
    task: str
    expects: str
    own: bool = False  # named after the benchmark, so that all in it is the benchmark's

    def all(self) -> list[Path]:
        """All data files, a few levels deep, sorted."""
        return _listing(self.path)

    def find(self, *patterns: str) -> list[Path]:
        """Files whose name or path below the folder fits the first pattern that fits any, sorted; case counts not.

        A pattern such as `val/*.json` must fit the end of a path. Empty where none fits.
        """
        paths = _listing(self.path)
        return next((found for pattern in patterns if (found := _matching(paths, pattern))), [])

    def need(self, *patterns: str) -> list[Path]:
        """The same, with UserError where no pattern fits."""
        found = self.find(*patterns)
        if not found:
            raise self.wrong(f"there is no file {' or '.join(patterns)}")
        return found

    def one(self, *patterns: str) -> Path:
        """The file nearest to the top that fits. UserError where there is none, or several lie equally near."""
        found = self.need(*patterns)
        depth = min(len(path.parts) for path in found)
        nearest = [path for path in found if len(path.parts) == depth]
        if len(nearest) > 1:
            names = ", ".join(str(path.relative_to(self.path)) for path in nearest)
            raise self.wrong(f"there are several such files: {names}; keep the one that is meant,")
        return nearest[0]

    def parquet(self, *wanted: hub.Wanted) -> list[Path]:
        """The Parquet files of the first of these configs of a hub snapshot; see `hub.choose`."""
        return self._of_snapshot(lambda: hub.choose(self.path, self.all(), self.own, wanted))

    def joined_parquet(self, configs: Sequence[str], split: str) -> list[Path]:
        """Those of a split of all these configs; see `hub.join`."""
        return self._of_snapshot(lambda: hub.join(self.path, self.all(), configs, split))

    def _of_snapshot(self, read: Callable[[], tuple[list[Path], str]]) -> list[Path]:
        try:
            paths, config = read()
        except UserError as error:
            raise self.wrong(str(error)) from error
        note(self.path, config, paths)
        return paths

    def images(self, *names: str) -> Path:
        """The first of these folders (paths below the data folder, "" for itself) that exists; UserError if none."""
        for name in names:
            path = self.path / name
            if path.is_dir():
                return path
        raise self.wrong(f"there is no image folder {' or '.join(repr(name) for name in names)}")

    def wrong(self, what: str) -> UserError:
        """An error about this folder, with what was expected and what is there."""
        entries = sorted(os.listdir(self.path))
        shown = ", ".join(entries[:8]) + (", ..." if len(entries) > 8 else "")
        return UserError(f"{self.task}: {what} in {self.path} (found: {shown or 'nothing'}); expected {self.expects}.")


def open_folder(data_dir: Path, names: Sequence[str], task: str, expects: str) -> Folder:
    """The benchmark's own folder below `data_dir` (the first of `names` that is there), or `data_dir` itself.

    Case, `-`, `_` and spaces in names do not count, nor what the hub's cache adds (`datasets--ORG--NAME`).

    Raises:
      UserError: there is no data folder, or there are two folders of one of the names.
    """
    if not data_dir.is_dir():
        raise UserError(f"{task}: there is no data folder {data_dir}; expected {expects}.")
    inside = [entry for entry in sorted(data_dir.iterdir()) if entry.is_dir()]
    for name in names:
        fit = [entry for entry in inside if _plain(entry.name) == _plain(name)]
        if len(fit) > 1:
            both = " and ".join(entry.name for entry in fit)
            raise UserError(f"{task}: {data_dir} holds {both}; give the one that is meant as --data_dir.")
        if fit:
            return _folder(fit[0], task, expects, own=True)
    return _folder(data_dir, task, expects, own=_plain(data_dir.resolve().name) in map(_plain, names))


def _plain(name: str) -> str:
    return re.sub(r"[-_ ]", "", name.split("--")[-1]).lower()


def _folder(path: Path, task: str, expects: str, own: bool) -> Folder:
    path = _snapshot(path, task)
    note(path)
    return Folder(path, task, expects, own)


def _snapshot(path: Path, task: str) -> Path:
    """A folder of the hub's cache as the snapshot inside it; any other as it is. UserError where several are there and
    none is said to be the newest."""
    snapshots = path / "snapshots"
    if not snapshots.is_dir():
        return path
    there = sorted(entry.name for entry in snapshots.iterdir() if entry.is_dir())
    try:
        main = read_text(path / "refs" / "main", limit=1000).strip()
    except (OSError, UnicodeDecodeError):
        main = ""
    if main not in there and len(there) != 1:
        names = ", ".join(there) or "none"
        raise UserError(f"{task}: {path} holds the snapshots {names}; give the folder of one as --data_dir.")
    return snapshots / (main if main in there else there[0])


def _listing(folder: Path) -> list[Path]:
    """All data files a few levels deep."""
    found = []
    for here, folders, names in os.walk(folder, followlinks=True):
        if len(Path(here).relative_to(folder).parts) >= _DEPTH:
            folders.clear()
        # Hidden ones are a download's own notes, and what macOS adds to an archive.
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        names = [name for name in names if not name.startswith(".")]
        found += [Path(here) / name for name in sorted(names) if name.lower().endswith(_SUFFIXES)]
    return found


def _matching(paths: Sequence[Path], pattern: str) -> list[Path]:
    return [path for path in paths if Path(str(path).lower()).match(pattern.lower())]


def check_language(folder: Folder, language: str, texts: Sequence[str]) -> None:
    """UserError where the questions are in the other one of `en` and `cn`: files of both may have one name."""
    chinese = sum(bool(_CHINESE.search(text)) for text in texts)
    if language == "en" and 2 * chinese > len(texts):
        raise folder.wrong("the questions are in Chinese, not in English,")
    if language == "cn" and not chinese and len(texts) >= _MANY:
        raise folder.wrong("the questions are in English, not in Chinese,")


def read_json(path: Path) -> Any:
    """A JSON file, or one object a line, as some benchmarks call JSON too; half a surrogate pair, which no other file
    takes, is `?`. UserError where it is neither."""
    try:
        text = read_text(path, "utf-8-sig")
        note(files=[path])
    except OSError as e:
        raise UserError(f"Cannot read {path}: {e.strerror}.") from e
    except UnicodeDecodeError as e:
        raise UserError(f"Cannot read {path}: {e}.") from e
    try:
        return _in_unicode(parse_json(text), text)
    except ValueError as whole:
        try:
            return [_in_unicode(parse_json(line), line) for line in text.splitlines() if line.strip()]
        except ValueError:
            raise UserError(f"{path} is not valid JSON: {whole}.") from whole


def _in_unicode(value: Any, said: str) -> Any:
    """What JSON says without halves of surrogate pairs; `said` is its text."""
    if "\\ud" not in said.lower():
        return value
    return parse_json(json.dumps(value, ensure_ascii=False).encode(errors="replace"))


def read_records(path: Path) -> list[Any]:
    """The records of a JSON list, or of a file with one a line. UserError as for `read_json`."""
    value = read_json(path)
    return value if isinstance(value, list) else [value]


def need_columns(path: Path, columns: Sequence[str], needed: Sequence[str]) -> None:
    """UserError naming the first column that is missing, or there twice."""
    if twice := [name for name in columns if list(columns).count(name) > 1]:
        raise UserError(f"{path} has two columns {twice[0]!r}.")
    if missing := [name for name in needed if name not in columns]:
        raise UserError(f"{path} has no column {missing[0]!r}; it has {', '.join(columns) or 'none'}.")


def check_filled(row: Mapping[str, Any], needed: Sequence[str], where: str) -> None:
    """UserError where there is no question: "None" or "nan" would be asked."""
    for name in needed:
        if name.lower() in _QUESTIONS and is_blank(row.get(name)):
            raise UserError(f"{where}: {name} is empty.")


def need_keys(record: Any, keys: Sequence[str], where: str) -> dict:
    """The record, if it is an object with these keys; UserError naming the first that is missing, or the question that
    is empty."""
    if not isinstance(record, dict):
        raise UserError(f"{where} must be an object with the keys {', '.join(keys)}.")
    if missing := [key for key in keys if key not in record]:
        raise UserError(f"{where} has no key {missing[0]!r}; it has {', '.join(map(str, record))}.")
    check_filled(record, keys, where)
    return record


def decode_base64(text: str, name: str) -> bytes:
    """The image that a table holds as base64. UserError where it is none; line breaks in it do not count."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as e:
        raise UserError(f"{name}: the image is not valid base64.") from e


@dataclass(frozen=True)
class ParquetRow:
    """One row: its values without images, and its images by column, read when they are asked for."""

    path: Path
    number: int
    group: int  # row group, and the row's place in it
    place: int
    values: dict[str, Any]

    def has(self, column: str) -> bool:
        """Whether there is an image in a column."""
        columns = _open_parquet(self.path).schema_arrow.names
        return column in columns and _filled(self.path, _version(self.path), self.group, column)[self.place]

    @property
    def where(self) -> str:
        """Names the row for messages."""
        return f"{self.path}, row {self.number}"

    def picture(self, column: str, item: int | None = None) -> Picture:
        """The image in a column, or the item-th of a list of them."""

        def load() -> bytes:
            need_columns(self.path, _open_parquet(self.path).schema_arrow.names, (column,))
            cell = _cells(self.path, _version(self.path), self.group, column)[self.place]
            if item is not None:
                cell = cell[item] if isinstance(cell, list) and item < len(cell) else None
            data = cell.get("bytes") if isinstance(cell, dict) else cell
            if isinstance(data, str):
                return decode_base64(data, self.where)
            if not isinstance(data, bytes):
                raise UserError(f"{self.where}: the column {column} holds no image.")
            return data

        return Picture(f"{self.where}, {column}", load)


def read_parquet(paths: Sequence[Path], needed: Sequence[str], images: Sequence[str] = ("image",)) -> list[ParquetRow]:
    """All rows of Parquet files, with every column but those of images (which need not be there).

    Raises:
      UserError: no such column, a row without a question, no Parquet, or pyarrow is not installed.
    """
    note(files=paths)
    return [row for path in paths for row in _parquet_rows(path, needed, images)]


def _parquet_rows(path: Path, needed: Sequence[str], images: Sequence[str]) -> Iterator[ParquetRow]:
    file = _open_parquet(path)
    columns = file.schema_arrow.names
    need_columns(path, columns, needed)
    plain = [name for name in columns if name not in images]
    number = 0
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        rows = file.read_row_group(group, columns=plain).to_pylist() if plain else [{}] * count
        for place, values in enumerate(rows):
            check_filled(values, needed, f"{path}, row {number}")
            yield ParquetRow(path, number, group, place, values)
            number += 1


def _open_parquet(path: Path):
    return _opened(path, _version(path))


def _version(path: Path) -> tuple[int, ...]:
    """Another one for a file that has been written anew: a training run looks at its benchmarks for days."""
    try:
        status = os.stat(path)
    except OSError as e:
        raise UserError(f"Cannot read {path}: {e.strerror}.") from e
    return status.st_ino, status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=8)
def _opened(path: Path, version: tuple[int, ...]):
    try:
        import pyarrow.parquet
    except ImportError as e:
        raise UserError(f"Reading {path} needs pyarrow: pip install 'fusion_jax[eval]'.") from e
    try:
        file = open_file(path)
        if file.read(len(_POINTER)) == _POINTER:
            raise UserError(f"{path} is a pointer of Git LFS, not the file itself; fetch that with `git lfs pull`.")
        return pyarrow.parquet.ParquetFile(file)
    except (OSError, pyarrow.ArrowException) as e:
        raise UserError(f"{path} is not a Parquet file: {e}.") from e


@functools.lru_cache(maxsize=2)
def _cells(path: Path, version: tuple[int, ...], group: int, column: str) -> list:
    """An image column of one row group. Questions are asked roughly in order, so a group is read about once."""
    return _opened(path, version).read_row_group(group, columns=[column]).column(0).to_pylist()


@functools.lru_cache(maxsize=16)
def _filled(path: Path, version: tuple[int, ...], group: int, column: str) -> list[bool]:
    return _opened(path, version).read_row_group(group, columns=[column]).column(0).is_valid().to_pylist()


def write_table(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[Path]:
    """A submission as `path`.tsv, and as .xlsx where openpyxl is installed."""
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    tsv = path.with_suffix(".tsv")
    tsv.write_text(text.getvalue(), encoding="utf-8", errors="replace")
    try:
        import openpyxl
    except ImportError:
        return [tsv]
    book = openpyxl.Workbook(write_only=True)
    sheet = book.create_sheet()
    clean = openpyxl.cell.cell.ILLEGAL_CHARACTERS_RE
    for row in [columns, *rows]:
        # A text stays a text, even one that begins like a formula.
        row = [clean.sub("", v).encode(errors="replace").decode() if isinstance(v, str) else v for v in row]
        cells = [openpyxl.cell.WriteOnlyCell(sheet, v) for v in row]
        for cell, value in zip(cells, row):
            if isinstance(value, str):
                cell.data_type = "s"
        sheet.append(cells)
    xlsx = path.with_suffix(".xlsx")
    book.save(xlsx)
    return [tsv, xlsx]


def write_json(path: Path, value: Any) -> list[Path]:
    """A submission as JSON."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8", errors="replace")
    return [path]
