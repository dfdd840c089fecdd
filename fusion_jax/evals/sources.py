"""Records where a task's questions come from: the folder, the config of a hub snapshot, and the files.

Functions that read files call `note`; the log and the result files show the `Source`.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Source:
    """Where questions come from.

    Attributes:
      folder: the folder of the files. config: the config of a hub snapshot with its splits, for people; "" for other
        layouts. files: all files that were read, in order.
    """

    folder: Path | None = None
    config: str = ""
    files: list[Path] = field(default_factory=list)

    def names(self) -> list[str]:
        """The files, relative to the folder where they are below it."""
        inside = self.folder is not None
        return [
            str(path.relative_to(self.folder) if inside and path.is_relative_to(self.folder) else path)
            for path in self.files
        ]

    def one_line(self) -> str:
        """One line for people, see `one_line`."""
        return one_line(self.row())

    def row(self) -> dict[str, Any]:
        """The source as JSON: folder, config and files."""
        return {"folder": str(self.folder), "config": self.config, "files": self.names()}


_noted: ContextVar[Source | None] = ContextVar("noted", default=None)


@contextlib.contextmanager
def noted() -> Iterator[Source]:
    """Yields a `Source` that collects all files read in the block."""
    source = Source()
    token = _noted.set(source)
    try:
        yield source
    finally:
        _noted.reset(token)


def note(folder: Path | None = None, config: str = "", files: Sequence[Path] = ()) -> None:
    """Adds to the `Source` of the surrounding `noted`; does nothing outside of one."""
    source = _noted.get()
    if source is None:
        return
    source.folder = folder or source.folder
    source.config = config or source.config
    source.files += [path for path in files if path not in source.files]


def one_line(row: Mapping[str, Any]) -> str:
    """A source's `row` for people: `config en, split dev: dev-00000-of-00001.parquet in /data/mmbench`."""
    names = row["files"]
    files = ", ".join(names[:3]) + (f" and {len(names) - 3} more files" if len(names) > 3 else "")
    config = f"{row['config']}: " if row["config"] else ""
    return f"{config}{files or 'files'} in {row['folder']}"
