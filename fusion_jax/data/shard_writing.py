"""Converts JSON or JSONL records and their image files into shards that carry the images.

data/shards.py draws the format. Shard k holds what is usable of the records k*M to (k+1)*M of the file, so shards are
written in any order by any number of processes, and always the same way. Until all are there, SHARDS/partial holds the
plan and a report of each finished shard: after a kill at any moment, the same command continues and ends with the same
bytes as an undisturbed run. The manifest comes last. Records that cannot be used are left out and counted by reason in
the manifest, which lists the first 1000.

A run that ends with an error (too many records that cannot be used, for example) removes what it has written itself and
leaves what an earlier run has finished. Which folders are accepted is decided in data/shard_folder.py.
"""

import contextlib
import errno
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fusion_jax.data import formats, image, records, shard_folder, shards
from fusion_jax.data.data_sets import locate
from fusion_jax.data.decoding import MAX_BYTES, MAX_PIXELS
from fusion_jax.data.json_records import DataFile, read_record, scan_json
from fusion_jax.data.shard_folder import Conversion
from fusion_jax.data.workers import progress_bar, run_in_processes
from fusion_jax.errors import BadRecord, UserError, check
from fusion_jax.files import shown

log = logging.getLogger("fusion_jax")

RECORDS_PER_SHARD = 16384
LISTED = 1000  # skipped records that the manifest lists; the others are only counted
_NO_IMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG)
_ENOUGH = 1000  # records to have seen before too many bad ones stop a conversion early


class Unusable(UserError):
    """Too few records can be used. What was written is removed, so that the corrected command starts from scratch."""


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
      UserError: unusable arguments or files, a folder with other contents, a full disk.
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

    spans = scan_json(json_path)
    source = {
        "file": json_path.name,
        "bytes": json_path.stat().st_size,
        "sha256": shards.hash_file(json_path),
        "records": len(spans),
    }
    per_shard = -(-len(spans) // shard_count) if shard_count else records_per_shard or RECORDS_PER_SHARD
    settings = {"records_per_shard": per_shard, "allow_outside": allow_outside, "max_pixels": MAX_PIXELS}
    conversion = Conversion(json_path, folder, out, source, settings)
    new = [folder for folder in (out, *out.parents) if not folder.exists()]  # innermost first
    try:
        if (out / shards.MANIFEST).exists():
            return shard_folder.completed(conversion)
        with shard_folder.lock_folder(out):
            if (out / shards.MANIFEST).exists():  # another process was faster
                return shard_folder.completed(conversion)
            shard_folder.prepare(conversion)
            earlier = shard_folder.results(out)
            try:
                return _write(conversion, spans, workers, max_bad_records, progress)
            except BaseException as e:
                nothing_done = not earlier and all(
                    shard_folder.complete_report(conversion, k) is None for k in range(conversion.shards)
                )
                if isinstance(e, Unusable) or nothing_done:  # what an earlier run has written is not removed
                    shard_folder.clear(out, with_shards=True, but={*earlier, shard_folder.PLAN} if earlier else set())
                if isinstance(e, Unusable) and earlier:
                    raise Unusable(
                        f"{e} What earlier runs finished stays in {out}; delete it to start from scratch."
                    ) from e
                raise
    except (OSError, RuntimeError) as e:  # RuntimeError: ArrayRecord's, of a full disk for example
        raise UserError(f"Cannot go on in {out}: {e}; the same command continues from here.") from e
    finally:
        with contextlib.suppress(OSError):  # not empty, as a rule
            for folder in new:
                folder.rmdir()


def _write(conversion: Conversion, spans: np.ndarray, workers: int, max_bad: float, progress: bool) -> dict[str, Any]:
    reports = {
        k: report for k in range(conversion.shards) if (report := shard_folder.finished(conversion, k)) is not None
    }
    if reports:
        log.info("%d of %d shards are there already", len(reports), conversion.shards)
    size = conversion.settings["records_per_shard"]
    tasks = ((conversion, k, spans[k * size : (k + 1) * size]) for k in range(conversion.shards) if k not in reports)
    seen = sum(min(size, len(spans) - k * size) for k in reports)
    with (
        progress_bar(len(spans), seen, "converting", progress) as bar,
        contextlib.closing(run_in_processes(write_shard, tasks, workers, bar.update)) as done,
    ):
        for report in done:
            reports[report["number"]] = report
            _check_bad(reports.values(), max_bad, _ENOUGH)
    _check_bad(reports.values(), max_bad, 1)
    ordered = [reports[k] for k in range(conversion.shards)]
    reasons = sum((Counter(report["skipped"]) for report in ordered), Counter())
    listed = [one for report in ordered for one in report["listed"]]
    manifest = conversion.identity() | {
        "records": sum(report["records"] for report in ordered),
        "images": sum(report["images"] for report in ordered),
        "image_bytes": sum(report["image_bytes"] for report in ordered),
        "skipped": {
            "records": sum(reasons.values()),
            "reasons": dict(sorted(reasons.items())),
            "listed": listed[:LISTED],
        },
        "shards": [
            {key: report[key] for key in ("records", "images", "image_bytes", "shard", "text")}
            for report in ordered
            if report["records"]
        ],
    }
    if not manifest["records"]:
        raise Unusable(f"None of the {len(spans)} records can be used: {listed[0]['detail']}.")
    shard_folder.write_json(conversion.out, conversion.out / shards.MANIFEST, manifest)
    shard_folder.clear(conversion.out)
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


def write_shard(task: tuple[Conversion, int, np.ndarray], advance: Callable[[int], None]) -> dict[str, Any]:
    """Writes one shard and its texts, and returns its report.

    Args:
      task: the conversion, the shard's number, and where its records are in the JSON file: (records, 2).
      advance: called with how many more records have been read.
    """
    conversion, k, spans = task
    data = DataFile(conversion.json_path)
    root = None if conversion.settings["allow_outside"] else os.path.realpath(conversion.image_folder)
    names = {kind: conversion.name(kind, k) for kind in ("shard", "text")}
    parts = {kind: conversion.partial(name) for kind, name in names.items()}
    records = images = image_bytes = 0
    skipped: Counter[str] = Counter()
    listed: list[dict[str, Any]] = []
    writers = {kind: shards.open_writer(part) for kind, part in parts.items()}
    first = k * conversion.settings["records_per_shard"]
    for i in range(len(spans)):
        try:
            header, files = _read_record(conversion, data, spans[i], first + i, root)
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
    report["image_folder"] = os.path.realpath(conversion.image_folder)
    for kind, writer in writers.items():
        writer.close()
        if not records:
            parts[kind].unlink()
            continue
        if (written := shards.open_reader(parts[kind]).num_records()) != records:
            raise OSError(f"{parts[kind]} holds {written} of {records} records")
        with open(parts[kind], "rb") as f:
            os.fsync(f.fileno())
        size, sha256 = parts[kind].stat().st_size, shards.hash_file(parts[kind])
        report[kind] = {"name": names[kind], "bytes": size, "sha256": sha256}
    before = shard_folder.complete_report(conversion, k)
    if before is not None and before["records"] > records:  # the image folder of an earlier run had more of its images
        for part in parts.values():
            part.unlink(missing_ok=True)
        return before
    conversion.report_path(k).unlink(missing_ok=True)  # it must never be beside shards that it does not describe
    for kind, part in parts.items():
        if records:
            os.replace(part, conversion.out / names[kind])
        else:
            (conversion.out / names[kind]).unlink(missing_ok=True)
    shard_folder.write_json(conversion.out, conversion.report_path(k), report)
    return report


def _read_record(
    conversion: Conversion, data: DataFile, span: np.ndarray, number: int, root: str | None
) -> tuple[dict[str, Any], list[bytes]]:
    """Reads a record's JSON as shards keep it, and its image files. Raises BadRecord if it cannot be used."""
    where = f"{conversion.json_path}, record {number}"
    record = records.understand(read_record(data, span, where), number, where)
    files, about = [], []
    for i, (name, inline) in enumerate(record.images):
        if inline is None:
            inline = _read_image(locate(conversion.image_folder, name, root, record.where), record.where)
        files.append(inline)
        name = name or f"{number}-{i}"
        about.append({"name": name} | _look_at(inline, name, conversion.settings["max_pixels"], record.where))
    header = {"id": record.id} if record.id != str(number) else {}
    header |= {"number": number, "conversations": record.turns, "images": about}
    return header | ({} if record.system is None else {"system": record.system}), files


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
    """Reads format and size from the file's header. Raises BadRecord if training would refuse the image."""
    form, (width, height) = image.look_at(data, max_pixels, where, f"the image {shown(name)}")
    return {"format": form, "width": width, "height": height, "bytes": len(data)}
