"""Reads TSV and CSV files of benchmarks, and checks all rows.

Images inside a table are read when they are needed, so that a table of 30 GB takes the memory of its words.
"""

import base64
import binascii
import csv
import itertools
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fusion_jax.errors import UserError
from fusion_jax.evals.choices import is_blank
from fusion_jax.evals.sources import note
from fusion_jax.evals.task import Picture
from fusion_jax.files import brief, open_file

csv.field_size_limit(sys.maxsize)  # a field may be a whole image
_MARK = "\N{ZERO WIDTH NO-BREAK SPACE}".encode()  # some programs write it at the beginning of a file
_IMAGE = "image"
# Columns and keys that must not be blank where a task needs them.
_QUESTIONS = ("question", "query", "text", "prompt", "label", "gt_answer")
_Place = tuple[int, int, str | None]  # where a row begins and ends in its file, and the index that stands for its image


def read_table(path: Path, needed: Sequence[str]) -> list[dict[str, str]]:
    """Reads the rows of a TSV or CSV file by column; cells that a row lacks are None.

    Raises:
      UserError: a needed column or a row's question is missing, a row has too many cells, or quotation marks do not
        match.
    """
    return [values for values, _, _ in _rows(path, needed)]


@dataclass(frozen=True)
class ImageRow:
    """One row: its values without the image, and the image."""

    where: str  # for messages
    values: dict[str, str]
    picture: Picture


def read_images(path: Path, needed: Sequence[str]) -> list[ImageRow]:
    """Reads the rows of a TSV with the columns `index` and `image`, in the layout of VLMEvalKit.

    An image is base64, or the index of the row that holds it.

    Raises:
      UserError: as for `read_table`; an index is not a whole number or occurs twice; a row has no image, or the index
        of a row that does not exist or has no image of its own.
    """
    rows: list[tuple[str, dict[str, str], str]] = []
    places: dict[str, _Place] = {}
    numbers: dict[str, int] = {}
    column = 0
    for number, (values, start, end) in enumerate(_rows(path, ("index", *needed, _IMAGE))):
        column = list(values).index(_IMAGE)
        index, image = _index(values["index"], f"{path}, row {number}"), values.pop(_IMAGE)
        where = f"{path}, row {number}, index {index}"
        if index in numbers:
            raise UserError(f"{path}: the rows {numbers[index]} and {number} have the same index {index}.")
        if is_blank(image):
            raise UserError(f"{where}: the image is empty.")
        named = image.strip() if len(image) <= 20 and re.fullmatch(r"\s*[-+]?\d+(\.\d*)?\s*", image) else None
        numbers[index], places[index] = number, (start, end, named)
        rows.append((where, values | {"index": index}, index))
    return [ImageRow(where, values, _picture(path, column, places, index, where)) for where, values, index in rows]


def _index(cell: str | None, where: str) -> str:
    """The number as other rows write it. Raises UserError for 1.0, which data frames write if an index is missing."""
    if cell is None or not cell.strip().isdecimal():
        raise UserError(f"{where}: the index {brief(cell)} is not a whole number; write it as one, such as 12.")
    return str(int(cell))


def _picture(path: Path, column: int, places: Mapping[str, _Place], index: str, where: str) -> Picture:
    start, end, named = places[index]
    if named is not None:
        own = f"{where}: its image is the index {named}"
        if not named.isdecimal() or str(int(named)) not in places:
            raise UserError(f"{own}, and no row has that; an image is base64, or the index of the row that holds it.")
        if str(int(named)) == index:
            raise UserError(f"{own}, which is its own; an image is base64, or the index of the row that holds it.")
        start, end, further = places[str(int(named))]
        if further is not None:
            raise UserError(f"{own}, and that row's image is the index {further}; name the row that holds the image.")
    return Picture(where, lambda: decode_base64(_cell(path, column, start, end), where))


def _cell(path: Path, column: int, start: int, end: int) -> str:
    """A cell of the row between two places in the file."""
    with open_file(path) as file:
        file.seek(start)
        row = file.read(end - start).decode()
    return next(_records(iter([row]), "\t"))[column]


def _rows(path: Path, needed: Sequence[str]) -> Iterator[tuple[dict[str, Any], int, int]]:
    """Yields rows by column, and where each begins and ends in the file."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    number = 0
    try:
        with open_file(path) as file:
            records = _records(_decoded(file), delimiter)
            names = next(records, [])
            need_columns(path, names, needed)
            while True:
                start = file.tell()
                if (cells := next(records, None)) is None:
                    break
                if not cells:
                    continue  # an empty line
                where = f"{path}, row {number}"
                if len(cells) > len(names):
                    raise UserError(f"{where} has more cells than the first line has columns.")
                if any("\n" in cell and cell.count(delimiter) >= len(names) - 1 > 0 for cell in cells):
                    raise UserError(f"{where}: a quotation mark opens a cell and closes it in another row.{_HINT}")
                values = dict.fromkeys(names) | dict(zip(names, cells))
                check_filled(values, needed, where)
                yield values, start, file.tell()
                number += 1
    except OSError as e:
        raise UserError(f"Cannot read {path}: {e.strerror}.") from e
    except UnicodeDecodeError as e:
        raise UserError(f"Cannot read {path}: row {number}: {e}.") from e
    except csv.Error as e:
        hint = _HINT if "expected after" in str(e) or "end of data" in str(e) else ""
        raise UserError(f"{path}, row {number} cannot be read: {e}.{hint}") from e
    note(files=[path])


_HINT = ' A cell that begins with a quotation mark ends with one, and doubles those in it: """Stop"", it says".'


def _records(lines: Iterator[str], delimiter: str) -> Iterator[list[str]]:
    """Yields the cells of each row. Only rows with quotation marks go through csv, which reads every character."""
    for line in lines:
        if '"' in line:
            yield next(csv.reader(itertools.chain([line], lines), delimiter=delimiter, strict=True))
        else:
            text = line.rstrip("\r\n")
            yield text.split(delimiter) if text else []


def _decoded(file: BinaryIO) -> Iterator[str]:
    """Yields the lines of a file one by one, so that its position is always after the last line."""
    first = file.readline()
    yield first.removeprefix(_MARK).decode()
    while line := file.readline():
        yield line.decode()


def need_columns(path: Path, columns: Sequence[str], needed: Sequence[str]) -> None:
    """Raises UserError that names the first column that is missing or exists twice."""
    if twice := [name for name in columns if list(columns).count(name) > 1]:
        raise UserError(f"{path} has two columns {twice[0]!r}.")
    if missing := [name for name in needed if name not in columns]:
        raise UserError(f"{path} has no column {missing[0]!r}; it has {', '.join(columns) or 'none'}.")


def check_filled(row: Mapping[str, Any], needed: Sequence[str], where: str) -> None:
    """Raises UserError where a question is empty: otherwise "None" or "nan" would be asked."""
    for name in needed:
        if name.lower() in _QUESTIONS and is_blank(row.get(name)):
            raise UserError(f"{where}: {name} is empty.")


def decode_base64(text: str, name: str) -> bytes:
    """Decodes an image in base64 or a data URL; white space does not count. Raises UserError for another text."""
    head, comma, rest = text.partition(",")
    if comma and re.fullmatch(r"\s*data:.*;base64", head, re.IGNORECASE):
        text = rest
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as e:
        raise UserError(f"{name}: the image is not valid base64.") from e
