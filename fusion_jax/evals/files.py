"""Reads JSON, JSONL and Parquet files of benchmarks, and writes files for a benchmark's server.

folders.py finds the files, and tables.py reads TSV and CSV.
"""

import csv
import functools
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion_jax.errors import UserError
from fusion_jax.evals.folders import Folder as Folder
from fusion_jax.evals.folders import check_language as check_language
from fusion_jax.evals.folders import open_folder as open_folder
from fusion_jax.evals.sources import note
from fusion_jax.evals.tables import check_filled, decode_base64, need_columns
from fusion_jax.evals.tables import read_images as read_images
from fusion_jax.evals.tables import read_table as read_table
from fusion_jax.evals.task import Picture
from fusion_jax.files import open_file, parse_json, read_text

_POINTER = b"version https://git-lfs.github.com/"


def read_json(path: Path) -> Any:
    """Reads a JSON file, or a file with an object on each line, which some benchmarks also call JSON.

    Half a surrogate pair, which no text file can hold, becomes `?`.

    Raises:
      UserError: the file cannot be read, or is neither.
    """
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


def _in_unicode(value: Any, text: str) -> Any:
    """The value without halves of surrogate pairs; `text` is the JSON that it was read from."""
    if "\\ud" not in text.lower():
        return value
    return parse_json(json.dumps(value, ensure_ascii=False).encode(errors="replace"))


def read_records(path: Path) -> list[Any]:
    """The records of a JSON list, or of a file with one on each line. Raises as `read_json`."""
    value = read_json(path)
    return value if isinstance(value, list) else [value]


def need_keys(record: Any, keys: Sequence[str], where: str) -> dict:
    """Returns the record if it is an object with these keys.

    Raises:
      UserError: it is not; the first key that is missing, or the question that is empty, is named.
    """
    if not isinstance(record, dict):
        raise UserError(f"{where} must be an object with the keys {', '.join(keys)}.")
    if missing := [key for key in keys if key not in record]:
        raise UserError(f"{where} has no key {missing[0]!r}; it has {', '.join(map(str, record))}.")
    check_filled(record, keys, where)
    return record


@dataclass(frozen=True)
class ParquetRow:
    """One row: its values without images, and its images by column, which are read when they are needed."""

    path: Path
    number: int
    group: int  # the row group, and the row's index in it
    place: int
    values: dict[str, Any]

    def has(self, column: str) -> bool:
        """Whether a column holds an image in this row."""
        columns = _open_parquet(self.path).schema_arrow.names
        return column in columns and _filled(self.path, _version(self.path), self.group, column)[self.place]

    @property
    def where(self) -> str:
        """The row's name in messages."""
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
    """Reads all rows of Parquet files, with every column but those of `images`, which need not exist.

    Raises:
      UserError: a needed column is missing, a row has no question, a file is not Parquet, or pyarrow is not installed.
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
    """Changes when a file is rewritten: a training run reads its benchmarks again and again for days."""
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
        raise UserError(f"Reading {path} needs pyarrow: pip install -e '.[eval]'.") from e
    try:
        file = open_file(path)
        if file.read(len(_POINTER)) == _POINTER:
            raise UserError(f"{path} is a pointer of Git LFS, not the file itself; fetch that with `git lfs pull`.")
        return pyarrow.parquet.ParquetFile(file)
    except (OSError, pyarrow.ArrowException) as e:
        raise UserError(f"{path} is not a Parquet file: {e}.") from e


@functools.lru_cache(maxsize=2)
def _cells(path: Path, version: tuple[int, ...], group: int, column: str) -> list:
    """Reads an image column of one row group. Questions are asked roughly in order, so a group is read about once."""
    return _opened(path, version).read_row_group(group, columns=[column]).column(0).to_pylist()


@functools.lru_cache(maxsize=16)
def _filled(path: Path, version: tuple[int, ...], group: int, column: str) -> list[bool]:
    return _opened(path, version).read_row_group(group, columns=[column]).column(0).is_valid().to_pylist()


def write_table(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[Path]:
    """Writes a submission as `path`.tsv, and as .xlsx where openpyxl is installed."""
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
        # A text must stay a text, even where it begins like a formula.
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
    """Writes a submission as JSON."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8", errors="replace")
    return [path]
