"""Puts JSON or JSONL records and their image files into shards that carry the images; data/shards.py draws them.

Shard k holds what is usable of the records k*M to (k+1)*M of the file, so shards are made in any order by any number of
processes, and always the same way. Until all are there, SHARDS/partial holds the plan and a report of each finished
shard: killed at any moment, the same command goes on and ends with the very bytes of an undisturbed run. The manifest
comes last. Records that cannot be used are left out and counted by reason in the manifest, which lists the first 1000.

SHARDS is new, empty, or left by such a run: any other folder is refused, and no file is removed that a conversion did
not write. A run that ends over a mistake (too many records that cannot be used, for example) takes away what it has
made itself, and leaves what an earlier run has finished.
"""

import contextlib
import dataclasses
import errno
import json
import logging
import multiprocessing
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Set
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np
import tqdm

from fusion_jax.command_line.cli import out_of_ctrl_c
from fusion_jax.data import formats, image, records, shards, sources
from fusion_jax.data.decoding import MAX_BYTES, MAX_PIXELS
from fusion_jax.errors import BadRecord, UserError, check
from fusion_jax.files import brief, locked, parse_json, read_file, shown, write_whole

log = logging.getLogger("fusion_jax")

RECORDS_PER_SHARD = 16384
LISTED = 1000  # skipped records that the manifest names; the rest is counted
_PARTIAL = "partial"
_PLAN, _LOCK = "plan.json", "lock"
# The names of all files that a conversion writes into SHARDS/partial, and into SHARDS before the manifest.
_PROGRESS = re.compile(rf"{_LOCK}|({_PLAN}|{shards.MANIFEST}|\d{{5,}}\.json)(\.\d+\.tmp)?|.+\.array_record\.\d+\.tmp")
_SHARD = re.compile(r"(shard|text)-\d{5,}-of-\d{5,}\.array_record")
_NO_IMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG)
_ENOUGH = 1000  # records to have seen before too many bad ones stop a conversion early


class Unusable(UserError):
    """Too few records can be used. What was made of them is taken away, so that the corrected command starts anew."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that decides the result.

    Attributes:
      json_path, image_folder, out: absolute paths; they may change between a run and the one that goes on with it.
      source: name, bytes, sha256 and records of the JSON file.
      settings: what else must stay the same for the result to.
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

    def report(self, k: int) -> Path:
        return self.out / _PARTIAL / f"{k:05d}.json"

    @property
    def file(self) -> Path:
        return self.out / _PARTIAL / _PLAN

    def said(self) -> dict[str, Any]:
        """What a run that goes on must find unchanged."""
        return {"format": shards.FORMAT, "version": shards.VERSION, "source": self.source, "settings": self.settings}


def convert(
    json_path: str | Path,
    image_folder: str | Path | None,
    out: str | Path,
    *,
    shard_count: int | None = None,
    records_per_shard: int | None = None,
    workers: int = 1,
    allow_outside: bool = False,
    max_bad_records: float = 0.5,
    progress: bool = True,
) -> dict[str, Any]:
    """Writes the shards, or what is left to write, and returns their manifest.

    Args:
      json_path: .json or .jsonl.
      image_folder: where relative image paths start; by default the JSON file's folder.
      out: a new or empty folder, or one that an unfinished run of the same conversion left.
      shard_count, records_per_shard: one of them, or neither for RECORDS_PER_SHARD.
      workers: processes. They do not change the result.
      allow_outside: take images outside `image_folder` too.
      max_bad_records: stop once a larger share cannot be used.

    Raises:
      UserError: unusable arguments or files, a folder with something else, a full disk.
      Unusable: too many bad records.
    """
    json_path, out = Path(json_path).absolute(), Path(out).absolute()
    folder = json_path.parent if image_folder is None else Path(image_folder).absolute()
    check(json_path.suffix in (".json", ".jsonl"), f"{json_path} must end in .json or .jsonl.")
    check(folder.is_dir(), f"There is no image folder {folder}.")
    check(shard_count is None or records_per_shard is None, "Give --shards or --records_per_shard, not both.")
    for name, value in (("shards", shard_count), ("records_per_shard", records_per_shard), ("workers", workers)):
        check(value is None or value > 0, f"--{name} must be above 0, not {value}.")
    check(not out.exists() or out.is_dir(), f"{out} is a file; --out names a folder.")

    spans = sources.scan_json(json_path)
    source = {
        "file": json_path.name,
        "bytes": json_path.stat().st_size,
        "sha256": shards.hash_file(json_path),
        "records": len(spans),
    }
    per_shard = -(-len(spans) // shard_count) if shard_count else records_per_shard or RECORDS_PER_SHARD
    settings = {"records_per_shard": per_shard, "allow_outside": allow_outside, "max_pixels": MAX_PIXELS}
    plan = Plan(json_path, folder, out, source, settings)
    new = [folder for folder in (out, *out.parents) if not folder.exists()]  # innermost first
    try:
        if (out / shards.MANIFEST).exists():
            return _complete(plan)
        with _lock(out):
            if (out / shards.MANIFEST).exists():  # another process was faster
                return _complete(plan)
            _prepare(plan)
            stood = _results(out)
            try:
                return _write(plan, spans, workers, max_bad_records, progress)
            except BaseException as e:
                nothing = not stood and all(_whole(plan, k) is None for k in range(plan.shards))
                if isinstance(e, Unusable) or nothing:  # what an earlier run has made is not this one's to take away
                    _clear(out, with_shards=True, but={*stood, _PLAN} if stood else set())
                if isinstance(e, Unusable) and stood:
                    raise Unusable(f"{e} What earlier runs finished stays in {out}; delete it to start anew.") from e
                raise
    except (OSError, RuntimeError) as e:  # RuntimeError: ArrayRecord's, of a full disk for example
        raise UserError(f"Cannot go on in {out}: {e}; the same command continues from here.") from e
    finally:
        with contextlib.suppress(OSError):  # not empty, as a rule
            for folder in new:
                folder.rmdir()


@contextlib.contextmanager
def _lock(out: Path) -> Iterator[None]:
    """Keeps a second run out of the folder. The system lifts it when the process ends, however that happens.

    Raises:
      UserError: another run is at work there, or the folder holds what no conversion has left.
    """
    partial = out / _PARTIAL
    check(not out.is_symlink() or out.exists(), f"{out} is a link to nothing; name a folder with --out.")
    _check_own(out)
    partial.mkdir(parents=True, exist_ok=True)
    with locked(partial / _LOCK) as mine:
        check(mine, f"Another process is converting into {out}.")
        yield


def _check_own(out: Path) -> None:
    """UserError unless the folder is new, empty, or left by an unfinished conversion, as far as can be seen."""
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
        begun = _torn(partial / _PLAN, _LOCK in inside) if _PLAN in inside else _LOCK in inside or not inside
        if ours and begun and all(map(_is_report, reports)):
            return
    raise UserError(f"{out} holds files that are no shards; name a new or empty folder with --out.")


def _read_plan(out: Path) -> dict[str, Any] | None:
    """What an unfinished conversion said about itself; None where no such thing can be read."""
    try:
        said = parse_json(read_file(out / _PARTIAL / _PLAN, 1 << 20))
    except (OSError, ValueError):
        return None
    return said if isinstance(said, dict) and said.get("format") == shards.FORMAT else None


def _torn(path: Path, locked: bool) -> bool:
    """Whether this may be what a machine that failed left of a plan: no JSON, and beside our lock, empty, or begun."""
    try:
        data = read_file(path, 1 << 20).strip(b"\0 \n")
        parse_json(data)
    except OSError:
        return False
    except ValueError:
        return locked or data[:1] in (b"", b"{")
    return False


def _is_report(path: Path) -> bool:
    """Whether a file is a shard's report, or torn."""
    try:
        said = parse_json(read_file(path))
    except (OSError, ValueError) as e:
        return isinstance(e, ValueError)
    return isinstance(said, dict) and {"number", "skipped", "listed"} <= said.keys()


def _complete(plan: Plan) -> dict[str, Any]:
    """The manifest of a conversion that has nothing left to do; UserError if it is another one."""
    manifest = shards.read_manifest(plan.out)
    _check_same({key: manifest.get(key) for key in plan.said()}, plan)
    shards.check_files(plan.out, manifest)
    if _read_plan(plan.out) is not None:
        _clear(plan.out)
    with contextlib.suppress(OSError):
        (plan.out / _PARTIAL).rmdir()
    log.info("%s is complete already", plan.out)
    return manifest


def _prepare(plan: Plan) -> None:
    """Checks that what an unfinished run left is of this plan, and takes away what it had half written."""
    said = _read_plan(plan.out)
    if said is not None:
        _check_same(said, plan)
    elif any(path.name != _LOCK for path in (plan.out / _PARTIAL).iterdir()):
        log.warning("%s: the plan of an earlier run cannot be read; starting anew", plan.file)
        _clear(plan.out, with_shards=True, but={_LOCK})
    for left in (plan.out / _PARTIAL).glob("*.tmp"):
        if _PROGRESS.fullmatch(left.name):
            left.unlink()
    _write_json(plan.out, plan.file, plan.said())


def _results(out: Path) -> set[str]:
    """The names of the shards and of their reports that lie there."""
    reports = {path.name for path in (out / _PARTIAL).iterdir() if re.fullmatch(r"\d{5,}\.json", path.name)}
    return reports | {path.name for path in out.iterdir() if _SHARD.fullmatch(path.name)}


def _clear(out: Path, with_shards: bool = False, but: Set[str] = frozenset()) -> None:
    """Takes away SHARDS/partial, or what conversions wrote there, the plan last; with `with_shards` the shards too.

    Files with the names in `but` stay.
    """
    partial = out / _PARTIAL
    if not partial.is_dir() or partial.is_symlink():
        return
    ours = [path for path in partial.iterdir() if _PROGRESS.fullmatch(path.name)]
    if with_shards:
        ours += [path for path in out.iterdir() if _SHARD.fullmatch(path.name)]
    ours = [path for path in ours if path.name not in but]
    for path in sorted(ours, key=lambda path: (path.name == _PLAN, path.name == _LOCK)):
        with contextlib.suppress(IsADirectoryError):
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # files of somebody else lie there
        partial.rmdir()


def _check_same(found: dict[str, Any], plan: Plan) -> None:
    for key, value in plan.said().items():
        if found.get(key) != value:
            raise UserError(
                f"{plan.out} holds shards made otherwise ({key} {brief(found.get(key))}, now {value!r}); "
                "name another folder with --out, or delete this one."
            )


def _write(plan: Plan, spans: np.ndarray, workers: int, max_bad: float, progress: bool) -> dict[str, Any]:
    reports = {k: report for k in range(plan.shards) if (report := _finished(plan, k)) is not None}
    if reports:
        log.info("%d of %d shards are there already", len(reports), plan.shards)
    size = plan.settings["records_per_shard"]
    tasks = ((plan, k, spans[k * size : (k + 1) * size]) for k in range(plan.shards) if k not in reports)
    seen = sum(min(size, len(spans) - k * size) for k in reports)
    with (
        _bar(len(spans), seen, "converting", progress) as bar,
        contextlib.closing(_parallel(write_shard, tasks, workers, bar.update)) as done,
    ):
        for report in done:
            reports[report["number"]] = report
            _check_bad(reports.values(), max_bad, _ENOUGH)
    _check_bad(reports.values(), max_bad, 1)
    made = [reports[k] for k in range(plan.shards)]
    reasons = sum((Counter(report["skipped"]) for report in made), Counter())
    listed = [one for report in made for one in report["listed"]]
    manifest = plan.said() | {
        "records": sum(report["records"] for report in made),
        "images": sum(report["images"] for report in made),
        "image_bytes": sum(report["image_bytes"] for report in made),
        "skipped": {
            "records": sum(reasons.values()),
            "reasons": dict(sorted(reasons.items())),
            "listed": listed[:LISTED],
        },
        "shards": [
            {key: report[key] for key in ("records", "images", "image_bytes", "shard", "text")}
            for report in made
            if report["records"]
        ],
    }
    if not manifest["records"]:
        raise Unusable(f"None of the {len(spans)} records can be used: {listed[0]['detail']}.")
    _write_json(plan.out, plan.out / shards.MANIFEST, manifest)
    _clear(plan.out)
    return manifest


def _check_bad(reports: Iterable[dict[str, Any]], allowed: float, enough: int) -> None:
    reports = list(reports)
    bad = sum(sum(report["skipped"].values()) for report in reports)
    seen = bad + sum(report["records"] for report in reports)
    if seen >= enough and bad > allowed * seen:
        first = next(report["listed"][0] for report in reports if report["listed"])
        raise Unusable(
            f"{bad} of {seen} records cannot be used, more than --max_bad_records={allowed:g} allows; "
            f"one is record {first['record']}: {first['detail']}."
        )


def _finished(plan: Plan, k: int) -> dict[str, Any] | None:
    """The report of a shard that an earlier run completed; None if it must be made (again)."""
    report = _whole(plan, k)
    # Images that were missed in another folder may be in this one.
    missed = report is not None and report["skipped"].keys() & {"missing_image", "image_outside_folder"}
    return None if missed and not _same_folder(report.get("image_folder"), plan.image_folder) else report


def _same_folder(name: Any, folder: Path) -> bool:
    """Whether a report names this folder, by whatever path: links and mounts give one folder several."""
    try:
        return isinstance(name, str) and os.path.samefile(name, folder)
    except (OSError, ValueError):
        return False


def _whole(plan: Plan, k: int) -> dict[str, Any] | None:
    """The report of a shard that is there as it says, from whatever image folder; None where there is none."""
    try:
        report = parse_json(read_file(plan.report(k)))
        files = [report["shard"], report["text"]] if report["records"] else []
        whole = all((plan.out / file["name"]).stat().st_size == file["bytes"] for file in files)
        sums = [report[key] for key in ("records", "images", "image_bytes")]
        counts = [*sums, *report["skipped"].values(), *(one["record"] for one in report["listed"])]
        if whole and report["number"] == k and all(type(count) is int for count in counts):
            return report
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return None


def _write_json(out: Path, path: Path, value: Any) -> None:
    """Whole or not at all."""
    part = out / _PARTIAL / f"{path.name}.{os.getpid()}.tmp"
    write_whole(path, (json.dumps(value, indent=1) + "\n").encode(), part, sync=True)


def write_shard(task: tuple[Plan, int, np.ndarray], advance: Callable[[int], None]) -> dict[str, Any]:
    """Makes one shard and its texts and reports what is in them.

    Args:
      task: plan, the shard's number, and where its records lie in the JSON file: (records, 2).
      advance: told how many more records have been looked at.
    """
    plan, k, spans = task
    data = sources.DataFile(plan.json_path)
    root = None if plan.settings["allow_outside"] else os.path.realpath(plan.image_folder)
    names = {kind: plan.name(kind, k) for kind in ("shard", "text")}
    parts = {kind: plan.out / _PARTIAL / f"{name}.{os.getpid()}.tmp" for kind, name in names.items()}
    records = images = image_bytes = 0
    skipped: Counter[str] = Counter()
    listed: list[dict[str, Any]] = []
    writers = {kind: shards.open_writer(part) for kind, part in parts.items()}
    first = k * plan.settings["records_per_shard"]
    for i in range(len(spans)):
        try:
            header, files = _read_record(plan, data, spans[i], first + i, root)
        except BadRecord as bad:
            skipped[bad.reason] += 1
            if len(listed) < LISTED:
                listed.append({"record": first + i, "reason": bad.reason, "detail": bad.detail})
        else:
            text, whole = shards.pack(header, files)
            writers["text"].write(text)
            writers["shard"].write(whole)
            records += 1
            images += len(files)
            image_bytes += sum(map(len, files))
        advance(1)
    report = {"number": k, "records": records, "images": images, "image_bytes": image_bytes}
    report |= {"skipped": dict(sorted(skipped.items())), "listed": listed}
    report["image_folder"] = os.path.realpath(plan.image_folder)
    for kind, writer in writers.items():
        writer.close()
        if not records:
            parts[kind].unlink()
            continue
        if (found := shards.open_reader(parts[kind]).num_records()) != records:
            raise OSError(f"{parts[kind]} holds {found} of {records} records")
        with open(parts[kind], "rb") as f:
            os.fsync(f.fileno())
        size, sha256 = parts[kind].stat().st_size, shards.hash_file(parts[kind])
        report[kind] = {"name": names[kind], "bytes": size, "sha256": sha256}
    earlier = _whole(plan, k)
    if earlier is not None and earlier["records"] > records:  # this image folder has fewer of its images
        for part in parts.values():
            part.unlink(missing_ok=True)
        return earlier
    plan.report(k).unlink(missing_ok=True)  # it must never stand beside shards that it does not describe
    for kind, part in parts.items():
        if records:
            os.replace(part, plan.out / names[kind])
        else:
            (plan.out / names[kind]).unlink(missing_ok=True)
    _write_json(plan.out, plan.report(k), report)
    return report


def _read_record(
    plan: Plan, data: sources.DataFile, span: np.ndarray, number: int, root: str | None
) -> tuple[dict[str, Any], list[bytes]]:
    """A record's JSON as shards keep it, and its image files. BadRecord where it cannot be used."""
    where = f"{plan.json_path}, record {number}"
    said = records.understand(sources.read_record(data, span, where), number, where)
    files, about = [], []
    for i, (name, inline) in enumerate(said.images):
        if inline is None:
            inline = _read_image(sources.locate(plan.image_folder, name, root, said.where), said.where)
        files.append(inline)
        name = name or f"{number}-{i}"
        about.append({"name": name} | _look_at(inline, name, plan.settings["max_pixels"], said.where))
    header = {"id": said.id} if said.id != str(number) else {}
    header |= {"number": number, "conversations": said.turns, "images": about}
    return header | ({} if said.system is None else {"system": said.system}), files


def _read_image(path: Path, where: str) -> bytes:
    try:
        return formats.read_file(path, MAX_BYTES)[0]
    except formats.TooLarge as e:
        raise BadRecord("image_too_large", where, f"the image {shown(path)} {e}") from e
    except OSError as e:
        if e.errno not in _NO_IMAGE:
            raise  # a disk or a network that fails must not pass for missing images
        raise BadRecord("missing_image", where, f"cannot read the image {shown(path)}: {e.strerror}") from e


def _look_at(data: bytes, name: str, max_pixels: int, where: str) -> dict[str, Any]:
    """Format and size by the file's header; nothing is decoded. BadRecord where training would refuse the image."""
    form, (width, height) = image.look_at(data, max_pixels, where, f"the image {shown(name)}")
    return {"format": form, "width": width, "height": height, "bytes": len(data)}


def check_shards(out: str | Path, workers: int = 1, progress: bool = True) -> list[str]:
    """Reads all shards again; one sentence for everything that is not as the manifest says. UserError without one."""
    out = Path(out)
    manifest = shards.read_manifest(out)
    known = {shard[kind]["name"] for shard in manifest["shards"] for kind in ("shard", "text")}
    left = sorted(path.name for path in out.glob("*.array_record") if path.name not in known)
    problems = [f"{out / name} is not in the manifest" for name in left]
    with _bar(manifest["records"], 0, "checking", progress) as bar:
        for found in _parallel(check_shard, ((out, shard) for shard in manifest["shards"]), workers, bar.update):
            problems += found
    return sorted(problems)


def check_shard(task: tuple[Path, dict[str, Any]], advance: Callable[[int], None]) -> list[str]:
    """What is wrong with one shard: sizes, hashes, counts and every record of both files."""
    out, shard = task
    problems = []
    for kind in ("shard", "text"):
        path, file = out / shard[kind]["name"], shard[kind]
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif path.stat().st_size != file["bytes"]:
            problems.append(f"{path} has {path.stat().st_size} bytes, the manifest says {file['bytes']}")
        elif (found := shards.hash_file(path)) != file["sha256"]:
            problems.append(f"{path} has the hash {found}, the manifest says {file['sha256']}")
    path = out / shard["shard"]["name"]
    if not all((out / shard[kind]["name"]).is_file() for kind in ("shard", "text")):
        return problems
    try:
        whole, text = (shards.open_reader(out / shard[kind]["name"]) for kind in ("shard", "text"))
        counts = whole.num_records(), text.num_records()
        if counts != (shard["records"],) * 2:
            problems.append(f"{path} and its texts hold {counts} records, the manifest says {shard['records']}")
        images = size = 0
        for i in range(min(counts)):
            header, files = shards.unpack(whole.read([i])[0])
            if shards.parse_header(text.read([i])[0]) != header:
                problems.append(f"{path}, record {i} differs from {shard['text']['name']}")
            images, size = images + len(files), size + sum(map(len, files))
            advance(1)
        if (images, size) != (shard["images"], shard["image_bytes"]):
            problems.append(f"{path} holds {images} images of {size} bytes, the manifest says otherwise")
    except (RuntimeError, ValueError, OSError, IndexError, KeyError) as e:
        problems.append(f"{path} cannot be read to its end: {e}")
    return problems


def _bar(total: int, done: int, what: str, progress: bool) -> tqdm.tqdm:
    # A terminal gets a live bar; a log file a line now and then.
    slow = {} if sys.stderr.isatty() else {"mininterval": 10.0}
    return tqdm.tqdm(total=total, initial=done, unit="record", desc=what, disable=not progress, **slow)


def _parallel(
    function: Callable[[Any, Callable[[int], None]], Any],
    tasks: Iterable[Any],
    workers: int,
    advance: Callable[[int], None],
) -> Iterator[Any]:
    """What `function` makes of each task, in the order in which they finish. No process outlives this one by more than
    a record, even if this one is killed.

    Raises:
      UserError: a process died, or as `function` does.
      OSError: as `function` does, also for its ValueError and RuntimeError.
    """
    tasks = iter(tasks)
    if workers == 1:
        yield from (function(task, advance) for task in tasks)
        return
    context = multiprocessing.get_context("spawn")
    running: dict[connection.Connection, multiprocessing.process.BaseProcess] = {}
    try:
        for _, task in zip(range(workers), tasks):  # in this order: zip takes no task too many
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(function, theirs, os.getpid()), daemon=True)
            with out_of_ctrl_c():
                process.start()
            theirs.close()
            mine.send(task)
            running[mine] = process
        while running:
            for pipe in connection.wait(list(running)):
                try:
                    kind, value = pipe.recv()
                except (EOFError, ConnectionError) as e:
                    raise UserError("A worker process was killed; the same command goes on from here.") from e
                if kind == "advance":
                    advance(value)
                    continue
                if kind == "error":
                    raise value
                if (task := next(tasks, None)) is None:
                    pipe.close()
                    running.pop(pipe).join()
                else:
                    pipe.send(task)
                yield value
    finally:
        for process in running.values():
            process.terminate()
            process.join()


def _serve(function: Callable[[Any, Callable[[int], None]], Any], pipe: connection.Connection, parent: int) -> None:
    waiting, sent = 0, time.monotonic()

    def advance(count: int) -> None:
        nonlocal waiting, sent
        waiting += count
        if time.monotonic() - sent > 0.25:
            pipe.send(("advance", waiting))  # fails, and so ends the process, once the parent is gone
            waiting, sent = 0, time.monotonic()

    with contextlib.suppress(EOFError, ConnectionError):
        while os.getppid() == parent:
            task = pipe.recv()
            try:
                result = function(task, advance)
            except UserError as e:
                pipe.send(("error", UserError(f"{e}")))
            except (OSError, RuntimeError, ValueError) as e:
                if isinstance(e, ConnectionError):
                    raise
                pipe.send(("error", OSError(f"{e}")))  # the others' classes may not be known there
            else:
                pipe.send(("advance", waiting))
                pipe.send(("done", result))
                waiting = 0
