"""Runs the data engine from captions to records, or continues a run, and logs the result."""

import json
import logging
import time
from pathlib import Path
from typing import Any

from fusion_jax.errors import UserError, check
from fusion_jax.synth import blocks, engine, filters, folder
from fusion_jax.synth.config import SynthConfig
from fusion_jax.synth.export import export
from fusion_jax.synth.journal import Journal
from fusion_jax.synth.pool import make_pool
from fusion_jax.synth.report import costs, write_report
from fusion_jax.synth.select import select
from fusion_jax.synth.stages import STAGES

log = logging.getLogger("fusion_jax")

EVERY_STAGE = ("pool", *STAGES, "select", "export")


def synthesize(
    config: SynthConfig, out: Path, stages: list[str] | None = None, retry_failed: bool = False, progress: bool = True
) -> dict[str, Any]:
    """Runs or continues stages in `out`, and returns the run's manifest.

    Args:
      out: folder of the run. stages: of `EVERY_STAGE`; empty or None for all.
      retry_failed: whether to retry samples that a failing endpoint dropped. progress: whether to show a progress bar.

    Raises:
      UserError: configuration, captions, folder or models cannot be used, or no caption became a record.
    """
    stages = list(stages or EVERY_STAGE)
    for stage in stages:
        check(stage in EVERY_STAGE, f"Unknown stage {stage!r}; allowed: {', '.join(EVERY_STAGE)}.")
    filters.check_config(config.filters)
    out = out.absolute()
    check(not out.exists() or out.is_dir(), f"{out} is a file; --out names a folder.")
    if not folder.is_new(out):  # checked before anything is written, even the lock file
        folder.find_run(config, out)
    created = [path for path in (out, *out.parents) if not path.exists()]
    with folder.locked(out), folder.leaving_nothing(out, created):
        started = time.perf_counter()
        manifest = folder.open_run(config, out)
        if "pool" not in stages:
            check((out / "work" / "pool.json").exists(), f"{out} holds no captions yet; run the stage `pool` first.")
        pool = make_pool(config, out)
        _announce(config)
        _work_through(config, out, engine.remaining(out, pool["blocks"], stages, retry_failed), retry_failed, progress)
        if "select" in stages:
            for number in range(pool["blocks"]):
                missing = [stage for stage in STAGES if stage not in blocks.read_done(out, number)]
                check(not missing, f"Stage select needs stage {missing[0] if missing else ''} to be through.")
            select(config, out, pool["blocks"])
        if "export" in stages:
            counts = {"captions": pool["captions"]} | export(config, out, pool["blocks"])
            books = costs(config, Journal(config.journal or out / "journal"))
            write_report(out, counts, books)
            manifest |= {"state": "complete", "inputs": pool["inputs"]} | counts | {"costs": books}
            folder.write_json(out / "manifest.json", manifest)
            _log_counts(out, counts, books, time.perf_counter() - started)
            if not counts["records"]:
                raise UserError(_why_nothing(out, counts))
    return manifest


def _work_through(config: SynthConfig, out: Path, work: list[engine.Work], retry_failed: bool, progress: bool) -> None:
    if config.engine == "ray" and work:
        check(not retry_failed, "--retry_failed runs with config.engine='local'; the journal serves both.")
        from fusion_jax.synth import cluster

        cluster.run(config, out, work, progress)
    else:
        engine.run(config, out, work, progress)


def _announce(config: SynthConfig) -> None:
    """Logs in advance what the embedded backend can and cannot draw of captions from files."""
    pools = [pool.path for pool in config.pools if not pool.path.startswith("embedded:")]
    if pools and config.llm.backend == "embedded":
        from fusion_jax.synth.worlds.scenes.lexicon import NOUNS
        from fusion_jax.synth.worlds.scenes.settings import SETTINGS

        log.warning(
            "The embedded backend draws %d things in %d settings and invents what a caption leaves open. Of %s it "
            "keeps the captions of which its scenes show enough, and says in lineage.jsonl what they show and do not. "
            "For captions of all sorts, give llm, vision and images other backends.",
            len(NOUNS),
            len(SETTINGS),
            ", ".join(Path(path).name for path in pools),
        )


def _log_counts(out: Path, counts: dict, books: dict, seconds: float) -> None:
    records = sum(counts["records"].values())
    log.info("%d of %d captions became records in %.0f s: %s", records, counts["captions"], seconds, counts["records"])
    for reason, lost in counts["dropped"].items():
        log.info("  lost %6d  %s", lost, reason)
    if readings := counts.get("understood"):
        log.info(
            "the embedded backend read %d captions and kept %.0f%% of their words; %d more name nothing it can draw",
            readings["captions"],
            100 * readings["kept_share"],
            readings["nothing_known"],
        )
        log.info("  %d captions dropped, of which it kept too little (filters.understood_min)", readings["too_little"])
        log.info("  %d others have things in their scene that they do not name", readings["with_inventions"])
        if readings["missed"]:
            words = ", ".join(f"{word} ({count})" for word, count in list(readings["missed"].items())[:8])
            log.info("  words it cannot draw: %s; of each record in lineage.jsonl", words)
    if books:
        cost = sum(line.get("cost", 0.0) for line in books.values())
        log.info("  %d paid replies, cost %.2f", sum(line["replies"] for line in books.values()), cost)
    log.info("open %s to see samples and scores", out / "report.html")


def _why_nothing(out: Path, counts: dict) -> str:
    """The reasons in one sentence, because the folder of a run without records is emptied."""
    reasons = sorted(counts["dropped"].items(), key=lambda one: -one[1])
    summary = ", ".join(f"{reason} {lost}" for reason, lost in reasons[:5])
    with open(out / "dropped.jsonl", encoding="utf-8") as f:
        dropped = [json.loads(line) for line in f]
    first = next(one for one in dropped if f"{one['stage']}: {one['reason']}" == reasons[0][0])
    return (
        f"None of the {counts['captions']} captions became a record ({summary}); the first of them: "
        f"{first['caption'][:80]!r}, {first['detail'] or first['reason']}."
    )
