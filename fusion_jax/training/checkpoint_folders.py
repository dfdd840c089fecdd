"""The folders of a run's checkpoints, and their order: steps of a stage, and stages of a run."""

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from fusion_jax.errors import UserError
from fusion_jax.training.about import config_of, load_about

FOLDER = "checkpoints"
_STEP = re.compile(r"0|[1-9][0-9]{0,9}", re.ASCII)


def steps_in(folder: Path) -> list[int]:
    """Returns the steps of complete checkpoints in a stage's checkpoint folder, oldest first; ignores other names."""
    return sorted(int(path.name) for path in folder.glob("[0-9]*") if _STEP.fullmatch(path.name) and path.is_dir())


def step_of(folder: Path) -> int:
    """Returns the training step of a step folder; 0 for an import, whose folder the user has named."""
    return int(folder.name) if _STEP.fullmatch(folder.name) else 0


def order_of(folder: Path) -> int | None:
    """Returns the position of a stage among those of its run, from the newest readable checkpoint in its folder.

    Checkpoints of earlier versions have the names of all stages in their order instead. None if no checkpoint has it.
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
    """Returns the position of a stage that is now trained in a workdir: its own, or one more than the largest there."""
    own = order_of(workdir / stage / FOLDER)
    if own is not None:
        return own
    orders = [order_of(folder) for folder in sorted(workdir.glob(f"*/{FOLDER}"))]
    return 1 + max((order for order in orders if order is not None), default=-1)


def latest_first(folders: Iterable[Path]) -> list[Path]:
    """Returns the checkpoint folders of a run's stages, the last one first.

    Modification times decide only if nothing else does, since a copy of the run has other times.
    """
    folders = [folder for folder in folders if steps_in(folder)]
    if len(folders) < 2:
        return folders
    orders = {folder: order_of(folder) for folder in folders}

    def key(folder: Path) -> tuple[int, float]:
        return -1 if orders[folder] is None else orders[folder], folder.stat().st_mtime

    return sorted(folders, key=key, reverse=True)


def remove(path: Path) -> None:
    """Removes a folder with its contents, a file or a link; what cannot be removed stays."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def discard(folder: Path) -> None:
    """Removes a checkpoint's folder. It is renamed first, so that a kill in between leaves none that looks intact."""
    if folder.is_symlink() or folder.exists():
        target = folder.with_name(f"{folder.name}.deleting")
        remove(target)
        remove(folder.rename(target))
