"""Where a task's questions come from: the folder, the config of a hub snapshot, and the files, for the log and for the
result files. Reading notes them here."""

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Source:
    """Attributes:
    folder: that the files lie in. config: of a hub snapshot, with its splits, for people; "" for other layouts.
    files: all that were read, in order.
    """

    folder: Path | None = None
    config: str = ""
    files: list[Path] = field(default_factory=list)

    def names(self) -> list[str]:
        """The files, below the folder where they are."""
        inside = self.folder is not None
        return [
            str(path.relative_to(self.folder) if inside and path.is_relative_to(self.folder) else path)
            for path in self.files
        ]

    def words(self) -> str:
        """One line for people: `config en, split dev: dev-00000-of-00001.parquet in /data/mmbench`."""
        names = self.names()
        shown = ", ".join(names[:2]) + (f" and {len(names) - 2} more files" if len(names) > 2 else "")
        config = f"{self.config}: " if self.config else ""
        return f"{config}{shown or 'files'} in {self.folder}"

    def row(self) -> dict[str, Any]:
        """The same as JSON."""
        return {"folder": str(self.folder), "config": self.config, "files": self.names()}


_noted: ContextVar[Source | None] = ContextVar("noted", default=None)


@contextlib.contextmanager
def noted() -> Iterator[Source]:
    """Gives a `Source` that what is read inside is noted in."""
    source = Source()
    token = _noted.set(source)
    try:
        yield source
    finally:
        _noted.reset(token)


def note(folder: Path | None = None, config: str = "", files: Sequence[Path] = ()) -> None:
    """Adds to what is noted; nothing outside of `noted`."""
    source = _noted.get()
    if source is None:
        return
    source.folder = folder or source.folder
    source.config = config or source.config
    source.files += [path for path in files if path not in source.files]
