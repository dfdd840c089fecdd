"""Lists all benchmarks by name."""

from collections.abc import Sequence

from fusion_jax.errors import check_choice
from fusion_jax.evals import (
    ai2d,
    chartqa,
    cv_bench,
    docvqa,
    hallusion,
    held_out,
    llava_wild,
    mathvista,
    mmbench,
    mme,
    mme_realworld,
    mmmu,
    mmstar,
    mmvet,
    mmvp,
    ocrbench,
    pope,
    realworldqa,
    scienceqa,
    seed,
    textvqa,
    vizwiz,
)
from fusion_jax.evals.task import Task

# A new benchmark is a file with `TASK`, or several `TASKS`, and its name here, in the order of tables.
_BENCHMARKS = (
    held_out, mmbench, pope, mmvet, seed, textvqa, ai2d, cv_bench, mmvp, mme, scienceqa, chartqa, docvqa, ocrbench,
    mmmu, mmstar, realworldqa, vizwiz, hallusion, mathvista, llava_wild, mme_realworld,
)  # fmt: skip
# Each task and, where its published figures were measured by another rule, `NAME_published`.
TASKS: dict[str, Task] = {
    variant.name: variant
    for module in _BENCHMARKS
    for task in getattr(module, "TASKS", None) or (module.TASK,)
    for variant in (task, task.as_published())
}


def find_tasks(names: Sequence[str], rule: str = "official") -> list[Task]:
    """Returns the tasks of these names, each once.

    Args:
      rule: `published` for the rules by which the published figures were measured.

    Raises:
      UserError: a name is unknown.
    """
    for name in names:
        check_choice("task ", name, TASKS)
    chosen = [TASKS[name] for name in names]
    if rule == "published":
        chosen = [task.as_published() for task in chosen]
    return list({task.name: task for task in chosen}.values())
