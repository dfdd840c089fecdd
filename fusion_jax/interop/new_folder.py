"""Makes the folder that a conversion writes: it appears whole or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fusion_jax.errors import UserError, check
from fusion_jax.files import brief


@contextlib.contextmanager
def new_folder(target: str | Path) -> Iterator[Path]:
    """Makes a folder that is renamed to `target` at the end; until then it is in a hidden folder beside it.

    Yields:
      The folder to fill. Whatever else is in the hidden folder is removed in any case.

    Raises:
      UserError: the target is a file or a folder that is not empty, cannot be made, or the disk is full.
    """
    target = _resolved(target)
    try:
        if target.exists():
            check(target.is_dir(), f"{target} is a file; name a new or an empty folder.")
            check(not any(target.iterdir()), f"{target} is not empty; name a new or an empty folder.")
            check(not target.is_mount(), f"{target} is a mounted disk; name a folder on it.")
        above = [parent for parent in target.parents if not parent.exists()]  # these are removed as well when it fails
        target.parent.mkdir(parents=True, exist_ok=True)
        room = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise UserError(f"{target} cannot be made: {error.strerror}.") from error
    building = room / target.name
    try:
        building.mkdir()
        yield building
        os.replace(building, target)
    except OSError as error:
        raise UserError(f"{target} could not be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(room, ignore_errors=True)
        if not target.exists():
            with contextlib.suppress(OSError):  # another process may have written something there
                for parent in above:
                    parent.rmdir()


def _resolved(target: str | Path) -> Path:
    """The path without links. Raises UserError where the system refuses it: it is too long or its links form a loop."""
    try:
        resolved = Path(target).resolve()
        resolved.exists()
        return resolved
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "its links form a circle, or it is not a path"
        raise UserError(f"{brief(str(target))} cannot be made: {reason}.") from error


def check_room(target: str | Path, size: int) -> None:
    """Raises UserError unless the disk of `target` has room for `size` bytes."""
    resolved = _resolved(target)
    folder = next(parent for parent in (resolved, *resolved.parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    check(free >= size, f"{target} needs {size / 1e9:.2f} GB of disk room, but {free / 1e9:.2f} GB are free.")
