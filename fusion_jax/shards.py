"""Puts JSON or JSONL records and their image files into shards that carry the images, or checks such shards.

    python -m fusion_jax.shards --json_path F.json --image_folder D --out SHARDS [--shards N] [--workers N]
    python -m fusion_jax.shards --out SHARDS --check        # reads everything again: hashes, counts, records

Killed at any moment, the same command goes on and ends with the very bytes of an undisturbed run. Records that cannot
be used are left out and counted by reason in the manifest. See data/shard_writing.py.
"""

import logging
import os
import time

from absl import flags

from fusion_jax.command_line.cli import run_main
from fusion_jax.data import shard_writing
from fusion_jax.data.shard_checking import check_shards
from fusion_jax.errors import check

log = logging.getLogger("fusion_jax")


def _define_flags() -> None:
    flags.DEFINE_string("json_path", None, "LLaVA records: a .json list or .jsonl lines.")
    flags.DEFINE_string("image_folder", None, "Where image paths start; default: the JSON file's folder.")
    flags.DEFINE_string("out", None, "Folder for the shards: new, empty, or left by an unfinished run.", required=True)
    flags.DEFINE_integer("shards", None, "How many shards.")
    flags.DEFINE_integer(
        "records_per_shard", None, f"Or how many records each; default {shard_writing.RECORDS_PER_SHARD}."
    )
    flags.DEFINE_integer("workers", len(os.sched_getaffinity(0)), "Processes; they do not change the result.")
    flags.DEFINE_bool("allow_outside", False, 'Take images outside the image folder: "..", absolute paths, links.')
    flags.DEFINE_float(
        "max_bad_records", 0.5, "Stop once a larger share of the records cannot be used.", lower_bound=0, upper_bound=1
    )
    flags.DEFINE_bool("check", False, "Read the shards in --out again and compare them with their manifest.")


def main(argv: list[str]) -> None:
    check(len(argv) == 1, f"{' '.join(argv[1:])!r} is not understood; see --help.")
    given = flags.FLAGS
    check(given.workers > 0, f"--workers must be above 0, not {given.workers}.")
    if given.check:
        problems = check_shards(given.out, given.workers)
        for problem in problems:
            log.error("%s", problem)
        check(not problems, f"{given.out} is not as its manifest says, in {len(problems)} points.")
        log.info("%s is as its manifest says", given.out)
        return
    check(given.json_path is not None, "Give the records with --json_path, or --check to check what is there.")
    begun = time.perf_counter()
    manifest = shard_writing.convert(
        given.json_path,
        given.image_folder,
        given.out,
        shard_count=given.shards,
        records_per_shard=given.records_per_shard,
        workers=given.workers,
        allow_outside=given.allow_outside,
        max_bad_records=given.max_bad_records,
    )
    skipped = ", ".join(f"{count} {reason}" for reason, count in manifest["skipped"]["reasons"].items())
    log.info(
        "%s: %d records, %d images, %.1f MB in %d shards; %s skipped; %.0f s",
        given.out,
        manifest["records"],
        manifest["images"],
        manifest["image_bytes"] / 1e6,
        len(manifest["shards"]),
        skipped or "none",
        time.perf_counter() - begun,
    )


if __name__ == "__main__":
    _define_flags()
    run_main(main, goes_on=lambda: not flags.FLAGS.check)
