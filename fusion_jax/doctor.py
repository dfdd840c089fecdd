"""Checks a machine and a run: `python -m fusion_jax.doctor [--workdir DIR] [--config FILE] [--json]`.

Lists devices, versions, memory, disk, limits and the variables of clusters, multiplies matrices on every device, and
ends with what would stop or slow down training, each in plain words with what to do. Exit code 1 if training would not
start.
"""

import dataclasses
import json
import sys

from absl import flags

from fusion_jax.command_line.cli import define_config, run_main
from fusion_jax.command_line.interrupts import loading
from fusion_jax.devices.device_check import Fact, Problem, ask_devices, check_devices
from fusion_jax.devices.machine_check import check_cluster, check_disk, check_machine
from fusion_jax.devices.software_check import check_compiler, check_versions
from fusion_jax.errors import UserError
from fusion_jax.training.config_check import check_config


def define_flags() -> None:
    """Defines the command's flags; called only when it runs, as other commands have flags of the same names."""
    define_config("run configuration to check against this machine; by default the machine alone is checked")
    flags.DEFINE_string("workdir", None, "folder that training would write to; by default no folder is checked")
    flags.DEFINE_bool("json", False, "print one JSON object instead of the report, for a bug report")
    flags.DEFINE_list(
        "accept_changed", [], "what may differ from the checkpoint's, as for training; by default nothing"
    )
    flags.DEFINE_integer("patience", 180, "seconds that the devices may take to answer", lower_bound=1)


def examine() -> tuple[list[Fact], list[Problem]]:
    """Runs all checks. Returns the facts in the order of the report, and the problems, those that stop training first.

    The devices are checked first, in another process, which could not get them once this one holds them.
    """
    findings: list[Fact | Problem] = []
    answer = ask_devices(flags.FLAGS.patience)
    findings += check_devices(answer)
    findings += check_versions()
    findings += check_compiler()
    findings += check_machine()
    if flags.FLAGS.config is None:
        findings += check_disk(flags.FLAGS.workdir)
    else:
        with loading():
            from fusion_jax.config import RunConfig, from_dict

        try:
            config = from_dict(RunConfig, flags.FLAGS.config.to_dict())
            findings.extend(check_config(config, answer, flags.FLAGS.workdir, flags.FLAGS.accept_changed))
        except UserError as error:
            findings.append(Problem(True, str(error), "See the config."))
    findings += check_cluster()
    facts = [finding for finding in findings if isinstance(finding, Fact)]
    problems = [finding for finding in findings if isinstance(finding, Problem)]
    return facts, sorted(problems, key=lambda problem: not problem.stops)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise UserError(
            f"Unexpected argument {argv[1]!r}; doctor takes --workdir, --config, --accept_changed, --patience, --json."
        )
    facts, problems = examine()
    stops = any(problem.stops for problem in problems)
    if flags.FLAGS.json:
        report = {"facts": facts, "problems": problems}
        report = {name: [dataclasses.asdict(item) for item in items] for name, items in report.items()}
        print(json.dumps({"ready": not stops, **report}, indent=1))
    else:
        for section in dict.fromkeys(fact.section for fact in facts):
            print(f"\n{section}")
            for fact in facts:
                if fact.section == section:
                    print(f"  {fact.name:<18} {fact.value}")
        print()
        for problem in problems:
            print(f"{'WOULD NOT START' if problem.stops else 'would hurt'}: {problem.what}\n    -> {problem.do}")
        print("Training would not start here." if stops else "Training would start here.")
    if stops:
        sys.exit(1)


if __name__ == "__main__":
    define_flags()
    run_main(main)
