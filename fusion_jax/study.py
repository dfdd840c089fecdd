"""Compares variants of a run: `python -m fusion_jax.study --config configs/study_components.py --out runs/study`.

Trains every variant with several seeds, evaluates all runs, and writes study.json, report.md, report.html and figures:
accuracies with intervals, paired differences to the baseline with p-values, accuracy by kind of question, learning
curves and cost. Started again, it resumes what was cut off. Several processes, also on other machines, share the work
if they have the same --out. Exit code 1: some runs have failed, and the others are done.
"""

import logging
import signal
import sys
from pathlib import Path

from absl import flags

from fusion_jax.command_line.cli import define_config, run_main
from fusion_jax.errors import RunAgain, UserError, check
from fusion_jax.studies import report
from fusion_jax.studies.config import read_study
from fusion_jax.studies.folder import Folder, claim
from fusion_jax.studies.runs import Work

log = logging.getLogger("fusion_jax")
FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of this command; not at import, since other commands have flags of the same names."""
    define_config("file of the study", new_keys=False)
    flags.DEFINE_string("out", None, "folder of the study: new, empty, or one that this study began")
    flags.DEFINE_integer("seeds", None, "runs of each variant; by default what the study says")
    flags.DEFINE_integer("jobs", 1, "runs at once in this process", lower_bound=1)
    flags.DEFINE_boolean("report", False, "train and evaluate nothing, but write the report of what is done")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"Unexpected argument {argv[1]!r}; give --config FILE and --out DIR.")
    if not FLAGS.out or FLAGS.config is None:
        raise UserError("Give --config FILE and --out DIR.")
    seeds = {} if FLAGS.seeds is None else {"seeds": FLAGS.seeds}
    study, variants = read_study(FLAGS.config.to_dict() | seeds)
    folder = Folder(Path(FLAGS.out))
    check(not FLAGS.report or (folder.path / "config.json").exists(), f"--out={FLAGS.out} holds no study to report on.")
    claim(folder, study, variants)

    work = Work(study, variants, folder)
    if not FLAGS.report:
        signal.signal(signal.SIGTERM, _stop)
        work.do(FLAGS.jobs)
    paths = report.write(study, variants, folder)
    log.info("written: %s", ", ".join(map(str, paths)))

    for name, reason in work.failed.items():
        log.error("failed: %s: %s", name, reason)
    if others := [run.name for run in work.left if run.name not in work.failed]:
        log.info("not done, or being done by other processes: %s", "; ".join(others))
    if work.failed:
        sys.exit(1)


def _stop(*_) -> None:
    raise RunAgain("stopped; the same command goes on from here.")


if __name__ == "__main__":
    define_flags()
    run_main(main, goes_on=lambda: True)
