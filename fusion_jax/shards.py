"""Puts JSON or JSONL records and their images into shards, or checks such shards.

    python -m fusion_jax.shards --json_path F.json --image_folder D --out SHARDS [--shards N] [--workers N]
    python -m fusion_jax.shards --out SHARDS --config CONFIG    # stores how long the records are for this run
    python -m fusion_jax.shards --out SHARDS --check            # reads everything again: hashes, counts, records

With --config, a run with the same tokenizer, template and model plans its steps without tokenizing every record: see
data/lengths.py. This can be done at once or later, for shards that exist, and for several configs.

After a kill at any moment, the same command goes on and ends with the same bytes as an undisturbed run. Records that
cannot be used are left out and counted by reason in the manifest. See data/shard_writing.py.
"""

import logging
import os
import time

from absl import flags

from fusion_jax.command_line.cli import run_main
from fusion_jax.command_line.config_flag import define_config
from fusion_jax.config import RunConfig, from_dict
from fusion_jax.data import shard_writing
from fusion_jax.data.shard_checking import check_shards
from fusion_jax.errors import check

log = logging.getLogger("fusion_jax")


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_string("json_path", None, "file of records in LLaVA's format: a list in .json or lines in .jsonl")
    flags.DEFINE_string("image_folder", None, "folder where image paths start (default: that of the JSON file)")
    flags.DEFINE_string("out", None, "folder of the shards: new, empty, or left by an unfinished run", required=True)
    flags.DEFINE_integer("shards", None, "number of shards (default: by --records_per_shard)")
    flags.DEFINE_integer(
        "records_per_shard", None, f"records in each shard (default: {shard_writing.RECORDS_PER_SHARD})"
    )
    flags.DEFINE_integer("workers", len(os.sched_getaffinity(0)), "worker processes; they do not change the result")
    flags.DEFINE_bool("allow_outside", False, 'accept images outside the image folder: "..", absolute paths, links')
    flags.DEFINE_float(
        "max_bad_records", 0.5, "share of unusable records above which to stop, 0 to 1", lower_bound=0, upper_bound=1
    )
    define_config("run configuration for whose tokenizer, template and model the lengths of the records are stored")
    flags.DEFINE_bool("check", False, "read the shards in --out again and compare them with their manifest")


def main(argv: list[str]) -> None:
    check(len(argv) == 1, f"unexpected argument {' '.join(argv[1:])!r}; see --help.")
    values = flags.FLAGS
    check(values.workers > 0, f"--workers must be above 0, not {values.workers}.")
    if values.check:
        problems = check_shards(values.out, values.workers)
        for problem in problems:
            log.error("%s", problem)
        check(not problems, f"{values.out} differs from its manifest in {len(problems)} points.")
        log.info("%s is as its manifest says", values.out)
        return
    check(
        values.json_path is not None or values.config is not None,
        "Give the records with --json_path, --config to store lengths, or --check to check what is there.",
    )
    config = None if values.config is None else from_dict(RunConfig, values.config.to_dict())
    if values.json_path is not None:
        _convert(values)
    if config is not None:
        from fusion_jax.data import length_writing  # loads JAX, which conversions do without

        start = time.perf_counter()
        path = length_writing.write_lengths(values.out, config, values.workers)
        log.info("%s: %.1f MB, %.0f s", path, path.stat().st_size / 1e6, time.perf_counter() - start)


def _convert(values: flags.FlagValues) -> None:
    start = time.perf_counter()
    manifest = shard_writing.convert(
        values.json_path,
        values.image_folder,
        values.out,
        shard_count=values.shards,
        records_per_shard=values.records_per_shard,
        workers=values.workers,
        allow_outside=values.allow_outside,
        max_bad_records=values.max_bad_records,
    )
    skipped = ", ".join(f"{count} {reason}" for reason, count in manifest["skipped"]["reasons"].items())
    log.info(
        "%s: %d records, %d images, %.1f MB in %d shards; %s skipped; %.0f s",
        values.out,
        manifest["records"],
        manifest["images"],
        manifest["image_bytes"] / 1e6,
        len(manifest["shards"]),
        skipped or "none",
        time.perf_counter() - start,
    )


if __name__ == "__main__":
    define_flags()
    run_main(main, goes_on=lambda: not flags.FLAGS.check)
