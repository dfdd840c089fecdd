"""Keeps the replies that were paid for, so that no request is sent twice.

    JOURNAL/<process>.jsonl     KEY {"text": "...", "prompt_tokens": 812, ...}\\n

KEY is the hash of everything that decides the reply: model, settings, messages, schema and seed. A line is one write
to a file that only one process appends to, so a process that dies leaves at most one torn line, at its file's end; a
line is valid once its line break is written. Any number of processes read each other's files, which may be on a shared
disk. Only keys and places stay in memory. A damaged line is ignored, and its request is repeated.
"""

import hashlib
import json
import os
import re
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from fusion_jax.errors import UserError

_SYNC_EVERY = 1.0  # seconds; a killed process loses nothing, a failing machine loses as much
_KEY = 32
_WHOLE = re.compile(rb"[0-9a-f]{32} \{.*\}\n", re.DOTALL)

Place = tuple[Path, int, int]  # file, start and length of a value


def make_key(*parts: Any) -> str:
    """The key of a JSON value: 32 hexadecimal digits."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:_KEY]


class Journal:
    """Stores and returns replies by key, for all threads of a process."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"Cannot write the journal {folder}: {e.strerror}.") from e
        self._lock = threading.Lock()
        self._places: dict[bytes, Place] = {}
        # For keys that occur more than once: one of the values may be damaged.
        self._others: dict[bytes, list[Place]] = {}
        self._read: dict[Path, int] = {}  # bytes of each file that have been read
        self._file = -1
        self._path = self.folder / f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl"
        self._synced = 0.0
        self.refresh()

    def refresh(self) -> None:
        """Reads what other processes have written since."""
        with self._lock:
            for path in sorted(self.folder.glob("*.jsonl")):
                if path != self._path:
                    self._read_new(path)

    def _read_new(self, path: Path) -> None:
        start = self._read.get(path, 0)
        if path.stat().st_size == start:
            return
        with open(path, "rb") as f:
            f.seek(start)
            for line in f:
                if not line.endswith(b"\n"):  # the line is torn, or still being written
                    break
                if _WHOLE.match(line):
                    key, place = bytes.fromhex(line[:_KEY].decode()), (path, start + _KEY + 1, len(line) - _KEY - 2)
                    if self._places.setdefault(key, place) is not place:
                        self._others.setdefault(key, []).append(place)
                start += len(line)
        self._read[path] = start

    def __len__(self) -> int:
        return len(self._places)

    def get(self, key: str) -> dict | None:
        """The value stored under the key, or None."""
        name = bytes.fromhex(key)
        with self._lock:
            places = [self._places[name], *self._others.get(name, ())] if name in self._places else []
        return next(filter(None, map(_value, places)), None)

    def put(self, key: str, value: dict) -> None:
        """Stores a value. Raises UserError where it cannot be written."""
        content = json.dumps(value, separators=(",", ":")).encode()
        with self._lock:
            try:
                if self._file < 0:
                    self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
                start = os.lseek(self._file, 0, os.SEEK_END)
                line = key.encode() + b" " + content + b"\n"
                if os.write(self._file, line) != len(line):
                    os.ftruncate(self._file, start)
                    raise OSError("the disk is full")
                if time.monotonic() - self._synced > _SYNC_EVERY:
                    os.fsync(self._file)
                    self._synced = time.monotonic()
            except OSError as e:
                raise UserError(f"Cannot write the journal {self._path}: {e}.") from e
            self._places[bytes.fromhex(key)] = (self._path, start + _KEY + 1, len(content))

    def close(self) -> None:
        """Writes out and closes this process's file; a later `put` begins a new one."""
        with self._lock:
            if self._file >= 0:
                os.fsync(self._file)
                os.close(self._file)
                self._file = -1
                self._read[self._path] = self._path.stat().st_size
                self._path = self.folder / f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl"

    def values(self):
        """Yields every value once, in any order, to sum up the costs."""
        with self._lock:
            places = sorted((place, key) for key, place in self._places.items())
        for place, key in places:
            value = next(filter(None, map(_value, [place, *self._others.get(key, ())])), None)
            if value is not None:
                yield value


def _value(place: Place) -> dict | None:
    """The value at a place; None where it is damaged."""
    path, start, length = place
    try:
        with open(path, "rb") as f:
            f.seek(start)
            value = json.loads(f.read(length))
    except OSError as e:
        raise UserError(f"Cannot read the journal {path}: {e.strerror}.") from e
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
