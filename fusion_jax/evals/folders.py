"""Finds a benchmark's folder, and files in it.

A data folder holds one benchmark, or one folder for each, named as in LLaVA's evaluation folder, in the benchmarks' own
archives or on the hub; the hub's cache is such a folder, too. hub.py chooses the Parquet files of a snapshot.
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fusion_jax.errors import UserError
from fusion_jax.evals import hub
from fusion_jax.evals.sources import note
from fusion_jax.files import read_text

_SUFFIXES = (".json", ".jsonl", ".tsv", ".csv", ".parquet")
_DEPTH = 4  # levels of folders below the data folder that are searched
_CHINESE = re.compile(r"[\u4e00-\u9fff]")
_MANY = 20  # questions without a Chinese character that decide the language; fewer prove nothing


@dataclass(frozen=True)
class Folder:
    """The folder with one benchmark's data, and its expected contents, for errors."""

    path: Path
    task: str
    expects: str
    own: bool = False  # whether it is named after the benchmark, so that it holds nothing else

    def all(self) -> list[Path]:
        """All data files down to a few levels, sorted."""
        return _listing(self.path)

    def find(self, *patterns: str) -> list[Path]:
        """Files that match the first pattern that any file matches, sorted; empty where no pattern matches.

        A pattern is a file name or the end of a path, such as `val/*.json`. Case does not count.
        """
        paths = _listing(self.path)
        return next((matches for pattern in patterns if (matches := _matching(paths, pattern))), [])

    def need(self, *patterns: str) -> list[Path]:
        """Like `find`, with UserError where no pattern matches."""
        paths = self.find(*patterns)
        if not paths:
            raise self.wrong(f"there is no file {' or '.join(patterns)}")
        return paths

    def one(self, *patterns: str) -> Path:
        """The match nearest to the top. Raises UserError where there is none or several are equally near."""
        paths = self.need(*patterns)
        depth = min(len(path.parts) for path in paths)
        nearest = [path for path in paths if len(path.parts) == depth]
        if len(nearest) > 1:
            names = ", ".join(str(path.relative_to(self.path)) for path in nearest)
            raise self.wrong(f"there are several such files: {names}; keep the one that is meant,")
        return nearest[0]

    def parquet(self, *wanted: hub.Wanted) -> list[Path]:
        """The Parquet files of the first of these configs in a hub snapshot, see `hub.choose`."""
        return self._of_snapshot(lambda: hub.choose(self.path, self.all(), self.own, wanted))

    def joined_parquet(self, configs: Sequence[str], split: str) -> list[Path]:
        """The Parquet files of one split of all these configs, see `hub.join`."""
        return self._of_snapshot(lambda: hub.join(self.path, self.all(), configs, split))

    def _of_snapshot(self, read: Callable[[], tuple[list[Path], str]]) -> list[Path]:
        try:
            paths, config = read()
        except UserError as error:
            raise self.wrong(str(error)) from error
        note(self.path, config, paths)
        return paths

    def images(self, *names: str) -> Path:
        """The first of these paths below the data folder that exists ("" is itself). Raises UserError without one."""
        for name in names:
            path = self.path / name
            if path.is_dir():
                return path
        raise self.wrong(f"there is no image folder {' or '.join(repr(name) for name in names)}")

    def wrong(self, problem: str) -> UserError:
        """Makes an error about this folder, with what was expected and what it holds."""
        entries = sorted(os.listdir(self.path))
        shown = ", ".join(entries[:8]) + (", ..." if len(entries) > 8 else "")
        return UserError(
            f"{self.task}: {problem} in {self.path} (found: {shown or 'nothing'}); expected {self.expects}."
        )


def open_folder(data_dir: Path, names: Sequence[str], task: str, expects: str) -> Folder:
    """Opens the benchmark's own folder below `data_dir` (the first of `names` that exists), or `data_dir` itself.

    Case, `-`, `_` and spaces in names do not count, nor the prefix of the hub's cache (`datasets--ORG--NAME`).

    Raises:
      UserError: there is no data folder, or two folders have one of the names.
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
    """The snapshot inside a folder of the hub's cache; any other folder is returned as it is.

    Raises:
      UserError: there are several snapshots, and no file names the newest.
    """
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
    """All data files down to a few levels."""
    paths = []
    for here, folders, names in os.walk(folder, followlinks=True):
        if len(Path(here).relative_to(folder).parts) >= _DEPTH:
            folders.clear()
        # Hidden files are notes of a download, or were added to an archive by macOS.
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        names = [name for name in names if not name.startswith(".")]
        paths += [Path(here) / name for name in sorted(names) if name.lower().endswith(_SUFFIXES)]
    return paths


def _matching(paths: Sequence[Path], pattern: str) -> list[Path]:
    return [path for path in paths if Path(str(path).lower()).match(pattern.lower())]


def check_language(folder: Folder, language: str, texts: Sequence[str]) -> None:
    """Raises UserError where the questions are not in this language, `en` or `cn`: files of both may share a name."""
    chinese = sum(bool(_CHINESE.search(text)) for text in texts)
    if language == "en" and 2 * chinese > len(texts):
        raise folder.wrong("the questions are in Chinese, not in English,")
    if language == "cn" and not chinese and len(texts) >= _MANY:
        raise folder.wrong("the questions are in English, not in Chinese,")
