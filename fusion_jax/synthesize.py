"""The data engine: `python -m fusion_jax.synthesize --config configs/synthesize.py --out runs/synthesis`.

Captions in; images, conversations and the mixtures that training reads out (docs/synthesis.md). Killed and started
again it goes on where it was and ends with what an undisturbed run gives; nothing that was paid for is asked again.
Stages can be run one at a time, `--stages filter,judge`: each takes up what the ones before it left.
"""

import json
import logging
import time
from pathlib import Path

from absl import flags

from fusion_jax.command_line.cli import define_config, run_main
from fusion_jax.errors import UserError, check
from fusion_jax.synth import blocks, engine, filters
from fusion_jax.synth.config import SynthConfig
from fusion_jax.synth.export import export
from fusion_jax.synth.journal import Journal
from fusion_jax.synth.report import costs, write_report
from fusion_jax.synth.select import select
from fusion_jax.synth.stages import STAGES
from fusion_jax.values.dicts import from_dict

log = logging.getLogger("fusion_jax")

LAST = ("select", "export")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"Unexpected argument {argv[1]!r}; give --config FILE and --out DIR.")
    if flags.FLAGS.out is None or flags.FLAGS.config is None:
        raise UserError("Give --config FILE and --out DIR.")
    config = from_dict(SynthConfig, flags.FLAGS.config.to_dict())
    manifest = synthesize(config, Path(flags.FLAGS.out), flags.FLAGS.stages, flags.FLAGS.retry_failed)
    print(json.dumps({key: manifest[key] for key in ("state", "captions", "records") if key in manifest}))


def synthesize(
    config: SynthConfig, out: Path, stages: list[str] | None = None, retry_failed: bool = False, progress: bool = True
) -> dict:
    """Runs, or goes on with, the wanted stages in `out` (default: all) and returns the run's manifest.

    Raises:
      UserError: unusable configuration, captions, folder or models; too little left to go on with.
    """
    every = ("pool", *STAGES, *LAST)
    wanted = list(stages or every)
    for stage in wanted:
        check(stage in every, f"Unknown stage {stage!r}; allowed: {', '.join(every)}.")
    filters.check_config(config.filters)
    out = out.absolute()
    check(not out.exists() or out.is_dir(), f"{out} is a file; --out names a folder.")
    if not blocks.is_new(out):  # looks before anything is written, the lock's file included
        blocks.find_run(config, out)
    created = [path for path in (out, *out.parents) if not path.exists()]
    with blocks.locked(out), blocks.leaving_nothing(out, created):
        started = time.perf_counter()
        manifest = blocks.open_run(config, out)
        pool = _pool(config, out, wanted)

        _announce(config)
        work = engine.plan(out, pool["blocks"], wanted, retry_failed)
        if config.engine == "ray" and work:
            check(not retry_failed, "--retry_failed runs with config.engine='local'; the journal serves both.")
            from fusion_jax.synth import cluster

            cluster.run(config, out, work, progress)
        else:
            engine.run(config, out, work, progress)

        if "select" in wanted:
            for number in range(pool["blocks"]):
                missing = [stage for stage in STAGES if stage not in blocks.read_done(out, number)]
                check(not missing, f"Stage select needs stage {missing[0] if missing else ''} to be through.")
            select(config, out, pool["blocks"])
        if "export" in wanted:
            counts = {"captions": pool["captions"]} | export(config, out, pool["blocks"])
            books = costs(config, Journal(config.journal or out / "journal"))
            write_report(out, counts, books)
            manifest |= {"state": "complete", "inputs": pool["inputs"]} | counts | {"costs": books}
            blocks.write_json(out / "manifest.json", manifest)
            _tell(out, counts, books, time.perf_counter() - started)
            if not counts["records"]:
                raise UserError(_why_nothing(out, counts))
    return manifest


def _why_nothing(out: Path, counts: dict) -> str:
    """The reasons in one sentence: the folder of a run of which nothing came is left empty."""
    reasons = sorted(counts["dropped"].items(), key=lambda one: -one[1])
    said = ", ".join(f"{reason} {lost}" for reason, lost in reasons[:5])
    with open(out / "dropped.jsonl", encoding="utf-8") as f:
        dropped = [json.loads(line) for line in f]
    first = next(one for one in dropped if f"{one['stage']}: {one['reason']}" == reasons[0][0])
    return (
        f"None of the {counts['captions']} captions became a record ({said}); the first of them: "
        f"{first['caption'][:80]!r}, {first['detail'] or first['reason']}."
    )


def _announce(config: SynthConfig) -> None:
    """Says beforehand what the embedded backend can and cannot make of other people's captions."""
    pools = [pool.path for pool in config.pools if not pool.path.startswith("embedded:")]
    if pools and config.llm.backend == "embedded":
        from fusion_jax.synth.worlds.scenes.lexicon import NOUNS, SETTINGS

        log.warning(
            "The embedded backend draws %d things in %d settings and invents what a caption leaves open. Of %s it "
            "keeps the captions of which its scenes show enough, and says in lineage.jsonl what they show and do not. "
            "For captions of all sorts, give llm, vision and images other backends.",
            len(NOUNS),
            len(SETTINGS),
            ", ".join(Path(path).name for path in pools),
        )


def _pool(config: SynthConfig, out: Path, wanted: list[str]) -> dict:
    if "pool" not in wanted:
        check((out / "work" / "pool.json").exists(), f"{out} holds no captions yet; run the stage `pool` first.")
    return blocks.make_pool(config, out)


def _tell(out: Path, counts: dict, books: dict, seconds: float) -> None:
    made = sum(counts["records"].values())
    log.info("%d of %d captions became records in %.0f s: %s", made, counts["captions"], seconds, counts["records"])
    for reason, lost in counts["dropped"].items():
        log.info("  lost %6d  %s", lost, reason)
    if found := counts.get("understood"):
        log.info(
            "the embedded backend read %d captions and kept %.0f%% of their words; %d more name nothing it can draw",
            found["captions"],
            100 * found["kept_share"],
            found["nothing_known"],
        )
        log.info("  %d captions dropped, of which it kept too little (filters.understood_min)", found["too_little"])
        log.info("  %d others have things in their scene that they do not name", found["with_inventions"])
        if found["missed"]:
            words = ", ".join(f"{word} ({count})" for word, count in list(found["missed"].items())[:8])
            log.info("  words it cannot draw: %s; of each record in lineage.jsonl", words)
    if books:
        cost = sum(line.get("cost", 0.0) for line in books.values())
        log.info("  %d paid replies, cost %.2f", sum(line["replies"] for line in books.values()), cost)
    log.info("look at %s", out / "report.html")


if __name__ == "__main__":
    define_config("synthesis configuration")
    flags.DEFINE_string("out", None, "folder of the run: new, empty, or one that this config began")
    flags.DEFINE_list("stages", [], f"which of {', '.join(('pool', *STAGES, *LAST))}; default: all")
    flags.DEFINE_bool("retry_failed", False, "try again what a failing endpoint dropped")
    run_main(main, goes_on=lambda: True)
