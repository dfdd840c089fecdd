"""Finds where the records of a JSON or JSONL file are, and reads them one at a time.

A file is parsed once, when it is opened, to check it and to find where each record is. Two numbers per record stay in
memory; the text is read again from the file.

A record that cannot be read, because it is nested too deeply, too long or has an integer of thousands of digits, is a
bad record if the rest of the file can be used.
"""

import codecs
import json
import os
import re
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fusion_jax.errors import BadRecord, UserError
from fusion_jax.files import brief, open_file, parse_json, shown

_CHUNK = 1 << 22
_MAX_RECORD = 1 << 26  # bytes of one record; in a list, one that has not ended by then is taken for a syntax error
_BOM = codecs.BOM_UTF8
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# Integers are read as floats: one of thousands of digits makes a bad record, which reading it will report.
_DECODER = json.JSONDecoder(parse_int=float)
# Marks by which the end of a list or object is found; a quote alone begins a text that does not end here.
_MARKS = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|["\[\]{}]', re.DOTALL)


def scan_json(path: Path) -> np.ndarray:
    """Finds first byte and end of each record of a JSON list or JSONL file: (records, 2) int64.

    Raises:
      UserError: the file cannot be read, is invalid or has no records.
    """
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


class DuplicateKey(ValueError):
    """A JSON object names a key twice; without this error the last one would win silently."""


def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Returns an object as a dict, for json's `object_pairs_hook`. Raises DuplicateKey."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise DuplicateKey(f"the key {brief(key)} occurs twice")
        result[key] = value
    return result


class DataFile:
    """A file that is read piece by piece for as long as a run takes, by any number of threads.

    It is not mapped: if the file is truncated or rewritten meanwhile, a mapping ends the process (SIGBUS) without a
    message.
    """

    def __init__(self, path: Path):
        """Raises UserError if the file cannot be opened."""
        try:
            self._file = open_file(path)
        except OSError as e:
            raise UserError(f"Cannot read the data file {shown(path, 1000)}: {e.strerror}.") from e

    def read(self, span: np.ndarray) -> bytes:
        """Reads the bytes from `span[0]` up to `span[1]`; fewer if the file has become shorter."""
        return os.pread(self._file.fileno(), int(span[1] - span[0]), int(span[0]))


def read_record(file: DataFile, span: np.ndarray, where: str) -> Any:
    """Reads one record's JSON.

    Raises:
      BadRecord: an object names a key twice (duplicate_key), too many bytes (too_large), or what `files.parse_json`
        refuses (unreadable_json).
      UserError: the file has changed since it was opened.
    """
    if span[1] - span[0] > _MAX_RECORD:
        raise BadRecord("too_large", where, f"the record has {span[1] - span[0]} bytes, over {_MAX_RECORD}")
    data = file.read(span)
    try:
        return parse_json(data, unique)
    except DuplicateKey as e:
        raise BadRecord("duplicate_key", where, f"{e}") from e
    except json.JSONDecodeError as e:  # it was valid when opened: the places of the other records are unknown, too
        raise UserError(f"{where} is no longer valid JSON: the file changed after it was opened.") from e
    except (ValueError, RecursionError) as e:
        raise BadRecord("unreadable_json", where, f"{e}") from e


def _scan_lines(file: BinaryIO, path: Path) -> np.ndarray:
    """Finds first byte and end of each record of a JSONL file; blank lines do not count: (records, 2) int64."""
    spans, start, number = array("q"), 0, 0
    while line := file.readline(_MAX_RECORD + 1):
        number += 1
        stop = start + len(line)
        if line.endswith(b"\n") or len(line) <= _MAX_RECORD:
            if number == 1 and line.startswith(_BOM):
                start, line = start + len(_BOM), line[len(_BOM) :]
            if line.strip():
                try:
                    _DECODER.decode(line.decode("utf-8-sig"))  # concatenated files have more than one byte-order mark
                except RecursionError:
                    pass  # a bad record, which reading it will report
                except ValueError as e:
                    raise UserError(f"{path}, line {number} is not valid JSON: {e}.") from e
                spans.extend((start, stop - line.endswith(b"\n")))
        else:  # a bad record too, of which nothing more is kept
            while (rest := file.readline(_CHUNK)) and not rest.endswith(b"\n"):
                stop += len(rest)
            stop += len(rest)
            spans.extend((start, stop - rest.endswith(b"\n")))
        start = stop
    return np.array(spans, np.int64).reshape(-1, 2)


def _scan_list(file: BinaryIO, path: Path) -> np.ndarray:
    """Finds first byte and end of each element of a JSON list: (records, 2) int64. Decodes some megabytes at a time."""
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
        """Returns the next character that is not white space; empty at the end."""
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
        """Passes one JSON value; returns its first byte and the one past its last."""
        self.peek()
        while True:
            try:
                _, stop = _DECODER.raw_decode(self._text, self._at)
                # A value that ends with the window, such as a number, may continue after it.
                if stop < len(self._text) or not self._more():
                    break
            except RecursionError:  # a bad record, which reading it will report: only its end is needed
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
        """Drops what has been passed and decodes twice as much as is left; returns False at the file's end."""
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
    """Returns where the list or object that begins at `at` ends; None if it does not end in this text."""
    depth = 0
    for mark in _MARKS.finditer(text, at):
        first = mark[0]
        if first == '"':
            return None
        depth += (first in ("[", "{")) - (first in ("]", "}"))
        if depth == 0:
            return mark.end()
    return None
