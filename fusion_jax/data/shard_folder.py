"""Guards the folder of a conversion into shards: checks who wrote its files, and which are finished.

SHARDS is new, empty, or left by such a run: any other folder is refused, and no file is removed that a conversion did
not write. Until all shards are there, SHARDS/partial holds a description of the conversion (plan.json) and a report of
each finished shard.
"""

import contextlib
import dataclasses
import json
import logging
import os
import re
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

from fusion_jax.data import shards
from fusion_jax.errors import UserError, check
from fusion_jax.files import brief, locked, parse_json, read_file, write_whole

log = logging.getLogger("fusion_jax")

_PARTIAL = "partial"
PLAN, _LOCK = "plan.json", "lock"
# The names of all files that a conversion writes into SHARDS/partial, and into SHARDS before the manifest.
_PROGRESS = re.compile(rf"{_LOCK}|({PLAN}|{shards.MANIFEST}|\d{{5,}}\.json)(\.\d+\.tmp)?|.+\.array_record\.\d+\.tmp")
_SHARD = re.compile(r"(shard|text)-\d{5,}-of-\d{5,}\.array_record")


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What is converted, where to, and everything that decides the result.

    Attributes:
      json_path, image_folder, out: absolute paths; they may change between a run and the one that continues it.
      source: name, bytes, sha256 and records of the JSON file.
      settings: what else must stay the same for the result to stay the same.
    """

    json_path: Path
    image_folder: Path
    out: Path
    source: dict[str, Any]
    settings: dict[str, Any]

    @property
    def shards(self) -> int:
        return -(-self.source["records"] // self.settings["records_per_shard"])

    def name(self, kind: str, k: int) -> str:
        return f"{kind}-{k:05d}-of-{self.shards:05d}.array_record"

    def partial(self, name: str) -> Path:
        """Returns where this process writes a file before it is complete."""
        return self.out / _PARTIAL / f"{name}.{os.getpid()}.tmp"

    def report_path(self, k: int) -> Path:
        return self.out / _PARTIAL / f"{k:05d}.json"

    @property
    def plan_path(self) -> Path:
        return self.out / _PARTIAL / PLAN

    def identity(self) -> dict[str, Any]:
        """Returns the content of plan.json: what must be unchanged for a run to continue."""
        return {"format": shards.FORMAT, "version": shards.VERSION, "source": self.source, "settings": self.settings}


@contextlib.contextmanager
def lock_folder(out: Path) -> Iterator[None]:
    """Keeps a second run out of the folder. The system releases the lock when the process ends, however that happens.

    Raises:
      UserError: another run is at work there, or the folder holds files that are not of a conversion.
    """
    partial = out / _PARTIAL
    check(not out.is_symlink() or out.exists(), f"{out} is a link to nothing; name a folder with --out.")
    _check_own(out)
    partial.mkdir(parents=True, exist_ok=True)
    with locked(partial / _LOCK) as mine:
        check(mine, f"Another process is converting into {out}.")
        yield


def _check_own(out: Path) -> None:
    """Raises UserError unless the folder is new, empty, or left by an unfinished conversion, as far as can be seen."""
    if not out.exists() or not (names := [path.name for path in out.iterdir()]):
        return
    partial = out / _PARTIAL
    if partial.is_dir() and not partial.is_symlink():
        if _read_plan(out) is not None:
            return
        # Without a plan, because a machine failed before it was on the disk, only the names can tell.
        inside = [path.name for path in partial.iterdir()]
        ours = all(map(_PROGRESS.fullmatch, inside)) and all(map(_SHARD.fullmatch, set(names) - {_PARTIAL}))
        reports = [partial / name for name in inside if re.fullmatch(r"\d+\.json", name)]
        begun = _torn(partial / PLAN, _LOCK in inside) if PLAN in inside else _LOCK in inside or not inside
        if ours and begun and all(map(_is_report, reports)):
            return
    raise UserError(f"{out} holds files that are not shards; name a new or empty folder with --out.")


def _read_plan(out: Path) -> dict[str, Any] | None:
    """Returns the plan of an unfinished conversion; None if none can be read."""
    try:
        plan = parse_json(read_file(out / _PARTIAL / PLAN, 1 << 20))
    except (OSError, ValueError):
        return None
    return plan if isinstance(plan, dict) and plan.get("format") == shards.FORMAT else None


def _torn(path: Path, locked: bool) -> bool:
    """Returns whether this may be a plan that a failing machine left half written: not JSON, and locked or begun."""
    try:
        data = read_file(path, 1 << 20).strip(b"\0 \n")
        parse_json(data)
    except OSError:
        return False
    except ValueError:
        return locked or data[:1] in (b"", b"{")
    return False


def _is_report(path: Path) -> bool:
    """Returns whether a file is a shard's report, perhaps half written."""
    try:
        report = parse_json(read_file(path))
    except (OSError, ValueError) as e:
        return isinstance(e, ValueError)
    return isinstance(report, dict) and {"number", "skipped", "listed"} <= report.keys()


def completed(conversion: Conversion) -> dict[str, Any]:
    """Returns the manifest of a conversion that is complete; raises UserError if the shards are of another one."""
    manifest = shards.read_manifest(conversion.out)
    _check_same({key: manifest.get(key) for key in conversion.identity()}, conversion)
    shards.check_files(conversion.out, manifest)
    if _read_plan(conversion.out) is not None:
        clear(conversion.out)
    with contextlib.suppress(OSError):
        (conversion.out / _PARTIAL).rmdir()
    log.info("%s is complete already", conversion.out)
    return manifest


def prepare(conversion: Conversion) -> None:
    """Checks that what an unfinished run left is of this conversion, and removes half-written files."""
    plan = _read_plan(conversion.out)
    if plan is not None:
        _check_same(plan, conversion)
    elif any(path.name != _LOCK for path in (conversion.out / _PARTIAL).iterdir()):
        log.warning("%s: the plan of an earlier run cannot be read; starting from scratch", conversion.plan_path)
        clear(conversion.out, with_shards=True, but={_LOCK})
    for left in (conversion.out / _PARTIAL).glob("*.tmp"):
        if _PROGRESS.fullmatch(left.name):
            left.unlink()
    write_json(conversion.out, conversion.plan_path, conversion.identity())


def results(out: Path) -> set[str]:
    """Returns the names of the shards and reports in the folder."""
    reports = {path.name for path in (out / _PARTIAL).iterdir() if re.fullmatch(r"\d{5,}\.json", path.name)}
    return reports | {path.name for path in out.iterdir() if _SHARD.fullmatch(path.name)}


def clear(out: Path, with_shards: bool = False, but: Set[str] = frozenset()) -> None:
    """Removes SHARDS/partial, or what conversions wrote there, the plan last; with `with_shards` the shards too.

    Files with the names in `but` stay.
    """
    partial = out / _PARTIAL
    if not partial.is_dir() or partial.is_symlink():
        return
    ours = [path for path in partial.iterdir() if _PROGRESS.fullmatch(path.name)]
    if with_shards:
        ours += [path for path in out.iterdir() if _SHARD.fullmatch(path.name)]
    ours = [path for path in ours if path.name not in but]
    for path in sorted(ours, key=lambda path: (path.name == PLAN, path.name == _LOCK)):
        with contextlib.suppress(IsADirectoryError):
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it holds files that no conversion wrote
        partial.rmdir()


def _check_same(plan: dict[str, Any], conversion: Conversion) -> None:
    """Raises UserError if an earlier plan is not that of this conversion."""
    for key, value in conversion.identity().items():
        if plan.get(key) != value:
            raise UserError(
                f"{conversion.out} holds shards of another conversion ({key} {brief(plan.get(key))}, now {value!r}); "
                "name another folder with --out, or delete this one."
            )


def finished(conversion: Conversion, k: int) -> dict[str, Any] | None:
    """Returns the report of a shard that an earlier run completed; None if it must be written (again)."""
    report = complete_report(conversion, k)
    # Images that were missing in another folder may be in this one.
    missed = report is not None and report["skipped"].keys() & {"missing_image", "image_outside_folder"}
    return None if missed and not _same_folder(report.get("image_folder"), conversion.image_folder) else report


def _same_folder(name: Any, folder: Path) -> bool:
    """Returns whether a report names this folder, by whatever path: links and mounts give one folder several."""
    try:
        return isinstance(name, str) and os.path.samefile(name, folder)
    except (OSError, ValueError):
        return False


def complete_report(conversion: Conversion, k: int) -> dict[str, Any] | None:
    """Returns the report of a shard whose files match it, from whatever image folder; None if there is none."""
    try:
        report = parse_json(read_file(conversion.report_path(k)))
        files = [report["shard"], report["text"]] if report["records"] else []
        whole = all((conversion.out / file["name"]).stat().st_size == file["bytes"] for file in files)
        sums = [report[key] for key in ("records", "images", "image_bytes")]
        counts = [*sums, *report["skipped"].values(), *(one["record"] for one in report["listed"])]
        if whole and report["number"] == k and all(type(count) is int for count in counts):
            return report
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return None


def write_json(out: Path, path: Path, value: Any) -> None:
    """Writes a file of the folder, all of it or nothing."""
    part = out / _PARTIAL / f"{path.name}.{os.getpid()}.tmp"
    write_whole(path, (json.dumps(value, indent=1) + "\n").encode(), part, sync=True)
