"""All benchmarks by name."""

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

# A task and, where its published figures were made with another rule, `NAME_published`.
TASKS: dict[str, Task] = {
    way.name: way
    for task in (
        held_out.TASK,
        *mmbench.TASKS,
        pope.TASK,
        mmvet.TASK,
        seed.TASK,
        textvqa.TASK,
        ai2d.TASK,
        cv_bench.TASK,
        mmvp.TASK,
        mme.TASK,
        scienceqa.TASK,
        chartqa.TASK,
        *docvqa.TASKS,
        ocrbench.TASK,
        *mmmu.TASKS,
        mmstar.TASK,
        realworldqa.TASK,
        *vizwiz.TASKS,
        hallusion.TASK,
        mathvista.TASK,
        llava_wild.TASK,
        *mme_realworld.TASKS,
    )
    for way in (task, task.as_published())
}


def find_tasks(names: Sequence[str], rule: str = "official") -> list[Task]:
    """The tasks of these names, each once; UserError with the list of all for an unknown one.

    Args:
      rule: `published` for the rules that the published figures were made with.
    """
    for name in names:
        check_choice("task ", name, TASKS)
    chosen = [TASKS[name] for name in names]
    if rule == "published":
        chosen = [task.as_published() for task in chosen]
    return list({task.name: task for task in chosen}.values())
