"""Chooses the Parquet files of a hub snapshot that a task reads, by their config and split.

    README.md                              decides where it has `configs` with `data_files` at its top; otherwise
    test-00000-of-00001.parquet            default, test: the same in data/
    ScienceQA-IMG/test-00000-of-00001.parquet        ScienceQA-IMG, test
    ScienceQA-IMG/test/0000.parquet                  the same, as the hub's own conversion lays it out

A benchmark's configs hold the same questions again (in another language, or a part of them), so they are never joined:
a task names the one that it reads. A split comes whole: a shard that is missing or exists twice is an error.
"""

import fnmatch
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fusion_jax.errors import UserError
from fusion_jax.files import read_text

DEFAULT = "default"
Layout = dict[str, dict[str, list[Path]]]  # files by config and split
Wanted = tuple[str, tuple[str, ...]]  # a config, and its splits that make the benchmark
# A file of another name, such as mmstar.parquet, holds its benchmark's only split.
_SPLITS = {"train", "validation", "valid", "val", "dev", "test", "testmini", "lite", "minival", "testdev"}
_SHARD = re.compile(r"(.+?)-(\d{5})-of-(\d{5})(?:-[0-9a-f]{6,})?")
_README_BYTES = 1 << 20


def choose(folder: Path, files: Sequence[Path], own: bool, wanted: Sequence[Wanted]) -> tuple[list[Path], str]:
    """The Parquet files of the first of these configs that the snapshot has with all its splits, and a description.

    Where there is none, the list is empty if the folder holds no Parquet files, or also files of another kind, which
    the task may read.

    Args:
      files: all data files in the folder. own: whether the folder is the benchmark's own.
      wanted: configs in order of preference. `default` is also the only config of an own folder, whatever its name.

    Raises:
      UserError: there are configs, but none of those; one lacks a split; a split lacks shards or has some twice.
    """
    there = _layout(folder, files)
    for config, splits in wanted:
        name = _named(there, config, own, splits)
        if name is None:
            continue
        parts = there[name]
        if len(splits) == 1 and splits[0] not in parts:
            other = [split for split in parts if split.lower() not in _SPLITS]
            parts = {splits[0]: parts[other[0]]} if len(other) == 1 else parts
        if all(split in parts for split in splits):
            paths = [path for split in splits for path in _whole(parts[split])]
            return paths, f"config {name}, split {' and '.join(splits)}"
    if not there or any(path.suffix.lower() != ".parquet" for path in files):
        return [], ""
    reads = " or ".join(_words(config, splits) for config, splits in wanted)
    has = ", ".join(_words(config, sorted(splits)) for config, splits in sorted(there.items()))
    example = next((c for c in sorted(there) if (folder / c).is_dir()), None)
    how = f", such as --data_dir={folder / example}" if example else ""
    raise UserError(
        f"the Parquet files are of {has}, and this task reads {reads}; to choose one, give its own folder{how}:"
    )


def join(folder: Path, files: Sequence[Path], configs: Sequence[str], split: str) -> tuple[list[Path], str]:
    """The Parquet files of one split of all these configs that exist, and a description with their number.

    This is for a benchmark that is divided into its configs.
    """
    there = _layout(folder, files)
    chosen = [name for name in sorted(there) if name in configs and split in there[name]]
    paths = [path for name in chosen for path in _whole(there[name][split])]
    return paths, f"{len(chosen)} configs of {len(configs)}, split {split}" if chosen else ""


def _named(there: Layout, config: str, own: bool, splits: Sequence[str]) -> str | None:
    """The config as this snapshot spells it."""
    for name in there:
        if name.lower() == config.lower():
            return name
    if config == DEFAULT and own:
        holds = [name for name, parts in there.items() if any(split in parts for split in splits)]
        return holds[0] if len(holds) == 1 == len(there) else None
    return None


def _words(config: str, splits: Sequence[str]) -> str:
    return f"the config {config} ({', '.join(splits)})"


def _layout(folder: Path, files: Sequence[Path]) -> Layout:
    paths = [path for path in files if path.suffix.lower() == ".parquet"]
    return _from_readme(folder, paths) or _from_names(folder, paths)


def _from_names(folder: Path, paths: Sequence[Path]) -> Layout:
    there: Layout = defaultdict(lambda: defaultdict(list))
    for path in paths:
        parents = [part for part in path.relative_to(folder).parts[:-1] if part != "data"]
        split = _split(path)
        if path.stem.isdigit() and parents:
            split = parents.pop()
        there["/".join(parents) or DEFAULT][split].append(path)
    return {config: dict(splits) for config, splits in there.items()}


def _split(path: Path) -> str:
    """`test` of test-00000-of-00002-0123abcd.parquet, test-0.parquet and test.parquet."""
    shard = _SHARD.fullmatch(path.stem)
    return shard[1] if shard else re.sub(r"-\d+$", "", path.stem)


def _from_readme(folder: Path, paths: Sequence[Path]) -> Layout:
    """The layout by the YAML at the top of README.md; empty where that names none of these files."""
    there: Layout = defaultdict(lambda: defaultdict(list))
    for entry in _configs(folder / "README.md"):
        config, files = str(entry.get("config_name", DEFAULT)), entry.get("data_files")
        for item in files if isinstance(files, list) else [files]:
            split, patterns = (item.get("split"), item.get("path")) if isinstance(item, Mapping) else (None, item)
            for pattern in patterns if isinstance(patterns, list) else [patterns]:
                pattern = f"{entry['data_dir']}/{pattern}" if entry.get("data_dir") else pattern
                for path in paths:
                    if fnmatch.fnmatchcase(path.relative_to(folder).as_posix(), str(pattern)):
                        chosen = there[config][str(split or _split(path))]
                        chosen += [] if path in chosen else [path]
    return {config: dict(splits) for config, splits in there.items()}


def _configs(readme: Path) -> list[Mapping[str, Any]]:
    try:
        first, *lines = read_text(readme, limit=_README_BYTES).split("\n")
        ends = [number for number, line in enumerate(lines) if line.rstrip() == "---"]
        front_matter = yaml.safe_load("\n".join(lines[: ends[0]])) if first.rstrip() == "---" and ends else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError):
        return []  # file names will do
    configs = front_matter.get("configs") if isinstance(front_matter, Mapping) else None
    return [one for one in configs if isinstance(one, Mapping)] if isinstance(configs, list) else []


def _whole(paths: Sequence[Path]) -> list[Path]:
    """The files of one split in order. Raises UserError where shards are missing or exist twice."""
    numbers: dict[int, Path] = {}
    counts = set()
    for path in paths:
        shard = _SHARD.fullmatch(path.stem)
        if shard is None:
            continue
        number, count = int(shard[2]), int(shard[3])
        counts.add(count)
        if number in numbers or len(counts) > 1:
            raise UserError(f"{numbers.get(number, paths[0])} and {path} are two versions of one split")
        numbers[number] = path
    if counts and (missing := [n for n in range(*counts) if n not in numbers]):
        raise UserError(
            f"{len(missing)} of the {max(counts)} files of the split {_split(paths[0])} are missing, the first is "
            f"number {missing[0]:05d}; download the snapshot again,"
        )
    return sorted(paths)
