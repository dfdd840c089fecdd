"""The checkpoints of a run in their order: steps of a stage, and the stages."""

import re
from collections.abc import Iterable
from pathlib import Path

from fusion_jax.errors import UserError
from fusion_jax.training.about import config_of, load_about

FOLDER = "checkpoints"
_STEP = re.compile(r"0|[1-9][0-9]{0,9}", re.ASCII)


def steps_in(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a stage's checkpoint folder, oldest first. Other names are left alone."""
    return sorted(int(path.name) for path in folder.glob("[0-9]*") if _STEP.fullmatch(path.name) and path.is_dir())


def step_of(folder: Path) -> int:
    """The training step of a step folder; 0 for an import, whose folder has a name of the user's."""
    return int(folder.name) if _STEP.fullmatch(folder.name) else 0


def order_of(folder: Path) -> int | None:
    """Place of a stage's checkpoint folder among those of its run, as its newest readable checkpoint says it.

    Checkpoints of earlier versions have no number of their own, but the names of all stages in their order. None where
    nothing in the folder says it.
    """
    for step in reversed(steps_in(folder)):
        try:
            about = load_about(folder / str(step))
        except UserError:
            continue
        if "stage" in about:
            return about["stage"]["order"]
        names = [stage.name for stage in config_of(about, folder).stages]
        if folder.parent.name in names:
            return names.index(folder.parent.name)
    return None


def order_in(workdir: Path, stage: str) -> int:
    """The order of a stage that is trained in a workdir now: its own, or one more than any that is there."""
    own = order_of(workdir / stage / FOLDER)
    if own is not None:
        return own
    known = [order_of(folder) for folder in sorted(workdir.glob(f"*/{FOLDER}"))]
    return 1 + max((order for order in known if order is not None), default=-1)


def latest_first(folders: Iterable[Path]) -> list[Path]:
    """Checkpoint folders of a run's stages, the last one first. Times decide only where nothing else does: a copy of
    the run has others."""
    folders = [folder for folder in folders if steps_in(folder)]
    if len(folders) < 2:
        return folders
    orders = {folder: order_of(folder) for folder in folders}

    def key(folder: Path) -> tuple[int, float]:
        return -1 if orders[folder] is None else orders[folder], folder.stat().st_mtime

    return sorted(folders, key=key, reverse=True)
