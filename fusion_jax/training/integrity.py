"""Checks the files of a checkpoint against a list of their sizes and checksums.

    <step>/files.<process>.json     {"params/manifest.ocdbt": [116, 2774283010], ...}

Every process lists the files that it wrote itself, before the folder gets the name of a checkpoint. A folder without a
list comes from elsewhere, or from a writer of an earlier version that died during a save: only reading it shows whether
it is intact, and `unlisted` says that the bytes of its arrays cannot be checked.
"""

import json
import os
import re
import stat
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from fusion_jax.files import write_whole

_OWNER = re.compile(r"ocdbt\.process_(\d+)")  # Orbax's folder of what one process wrote
_LIST = re.compile(r"files\.(\d{1,9})\.(json|tmp)", re.ASCII)
_PARTS = ("params/", "train/", "data/", "about/")
_BLOCK = 1 << 22
_LONGEST_LIST = 1 << 28  # bytes; a file takes about a hundred


def write(folder: Path, process: int) -> None:
    """Lists the files of a complete step folder that `process` wrote; process 0 lists those without an owner, too."""
    entries = {}
    for name in files(folder):
        if _owner(name) == process and not _LIST.fullmatch(name):
            path = folder / name
            entries[name] = [path.stat().st_size, checksum(path)]
    write_whole(folder / f"files.{process}.json", json.dumps(entries))


def problem(
    folder: Path, process: int = 0, processes: int = 1, thorough: bool = True, parts: tuple[str, ...] = ()
) -> str | None:
    """Describes what is wrong with the files of a step folder; returns None if all are intact or unlisted.

    Args:
      processes: the number of processes, each of which checks its share of the files.
      thorough: compare checksums too, not only sizes.
      parts: the subfolders whose checksums are compared; by default all.
    """
    try:
        present = set(files(folder))
        listed = _read_lists(folder)
    except (ValueError, OSError) as error:
        return str(error)
    if not present:
        return "it is empty"
    lists = _owners_of_lists(folder)
    for name in sorted(present - listed.keys()):
        # Files of another process may have been invisible to the one that lists them.
        if _owner(name) in lists and name.startswith(_PARTS) and "/array_metadatas/" not in name:
            return f"{name} is in no list of its files"
    jobs = sorted(listed.items())[process::processes]
    for name, (size, _) in jobs:
        if name not in present:
            return f"{name} is missing"
        actual = (folder / name).stat().st_size
        if actual != size:
            return f"{name} has {actual:,} bytes instead of {size:,}"
    if thorough:
        jobs = [job for job in jobs if not parts or job[0].partition("/")[0] in parts]
        with ThreadPoolExecutor(4) as pool:
            for (name, (_, expected)), actual in zip(jobs, pool.map(lambda job: _checksum(folder / job[0]), jobs)):
                if isinstance(actual, OSError):
                    return f"{name} cannot be read ({actual.strerror})"
                if actual != expected:
                    return f"the content of {name} has changed"
    return None


def unlisted(folder: Path) -> bool:
    """Returns whether files of a step folder are not listed because their process left no list."""
    try:
        lists = _owners_of_lists(folder)
        return any(_owner(name) not in lists for name in files(folder))
    except (ValueError, OSError):
        return True


def checksum(path: Path) -> int:
    """Returns the CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            value = zlib.crc32(block, value)
    return value


def _checksum(path: Path) -> int | OSError:
    try:
        return checksum(path)
    except OSError as error:
        return error


def _owner(name: str) -> int:
    """Returns the process that lists the file."""
    owner = _OWNER.search(name)
    return int(owner[1]) if owner else 0


def files(folder: Path) -> Iterator[str]:
    """Yields the names of the files in a step folder, relative to it, without hidden ones.

    Raises:
      ValueError: something in it is neither a file nor a folder, or a link that leads out of it.
    """
    inside = Path(os.path.realpath(folder))
    # Without a function that raises, `walk` skips what it cannot read.
    for place, folders, others in os.walk(folder, onerror=_raise):
        for name in sorted(folders + others):
            path = Path(place, name)
            relative = path.relative_to(folder).as_posix()
            if name.startswith("."):
                continue
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(inside):
                raise ValueError(f"{relative} is a link that leads out of the folder")
            if name in folders:
                continue
            if not stat.S_ISREG(path.stat().st_mode):
                raise ValueError(f"{relative} is not a file")
            yield relative


def _raise(error: OSError) -> None:
    raise error


def _owners_of_lists(folder: Path) -> set[int]:
    matches = (_LIST.fullmatch(path.name) for path in folder.iterdir())
    return {int(match[1]) for match in matches if match and match[2] == "json"}


def _read_lists(folder: Path) -> dict[str, tuple[int, int]]:
    """Reads size and checksum by name of file, from all lists.

    Raises:
      ValueError: a list cannot be read, or is not a list of files inside the folder; names it.
    """
    entries = {}
    for process in sorted(_owners_of_lists(folder)):
        path = folder / f"files.{process}.json"
        try:
            if not path.is_file() or path.stat().st_size > _LONGEST_LIST:
                raise ValueError("it is not a file of a sensible size")
            listed = json.loads(path.read_bytes())
            if not isinstance(listed, dict):
                raise ValueError(f"it holds {type(listed).__name__} instead of a list of files")
            if not listed and process == 0:
                raise ValueError("it names no file")
            for name, value in listed.items():
                _check_entry(name, value)
        except (ValueError, OSError, RecursionError) as error:
            raise ValueError(f"{path.name} cannot be read ({error})") from error
        entries |= {name: tuple(value) for name, value in listed.items()}
    return entries


def _check_entry(name: str, value: object) -> None:
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\0" in name or "\\" in name:
        raise ValueError(f"{name[:80]!r} is not a file inside the folder")
    whole = isinstance(value, list) and len(value) == 2 and all(type(number) is int for number in value)
    if not whole or not 0 <= value[0] < 2**63 or not 0 <= value[1] < 2**32:
        raise ValueError(f"{name[:80]!r} needs a size and a checksum")
