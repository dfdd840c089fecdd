"""Finding checkpoints, and loading what generation and evaluation need of one. Damaged ones are passed over."""

import functools
import logging
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import jax
import orbax.checkpoint.experimental.v1 as ocp
from flax.traverse_util import flatten_dict

from fusion_jax import integrity
from fusion_jax.about import check_size, config_of, load_about, save_tokenizer
from fusion_jax.config import RunConfig
from fusion_jax.data.tokenizer import Tokenizer, load_tokenizer
from fusion_jax.errors import UserError, first_line
from fusion_jax.models import fusion

log = logging.getLogger("fusion_jax")

FOLDER = "checkpoints"
_STEP = re.compile(r"0|[1-9][0-9]{0,9}", re.ASCII)


def abstract(tree):
    """Shapes, dtypes and shardings; what has no sharding yet goes to the first device."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or here), tree)


def raise_if_no_damage(error: BaseException) -> None:
    """Raises what lies behind an error of reading where memory was short or the runtime failed: no file's fault."""
    behind: BaseException | None = error
    while behind is not None:
        if isinstance(behind, MemoryError | jax.errors.JaxRuntimeError):
            raise behind
        behind = behind.__cause__ or behind.__context__


def check_shapes(tree, like) -> None:
    """ValueError where an array has another shape or dtype than asked for; names it."""
    for (path, array), wanted in zip(jax.tree.leaves_with_path(tree), jax.tree.leaves(like), strict=True):
        if array.shape != wanted.shape or array.dtype != wanted.dtype:
            raise ValueError(
                f"{jax.tree_util.keystr(path)} has {array.dtype}{list(array.shape)}, "
                f"not {wanted.dtype}{list(wanted.shape)}"
            )


def steps_in(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a stage's checkpoint folder, oldest first. Other names are left alone."""
    return sorted(int(path.name) for path in folder.glob("[0-9]*") if _STEP.fullmatch(path.name) and path.is_dir())


@dataclass(frozen=True)
class Loaded:
    """A trained model: its run config, parameters (float32, nested dict), tokenizer and step folder."""

    config: RunConfig
    params: dict
    tokenizer: Tokenizer
    folder: Path
    step: int


def find(path: str | Path) -> Path:
    """The step folder that `path` means: a step folder, a stage's folder, or a workdir (its newest stage and step).

    A damaged one is passed over for the one before, and the log says so. A step folder that is named itself has none.

    Raises:
      UserError: there is no checkpoint, or none that is whole.
    """
    path = Path(path).absolute()
    if (path / "params").is_dir():
        damage = _unusable(path)
        if damage:
            raise UserError(f"{path} is no whole checkpoint: {damage}.")
        return path
    damaged = []
    for folders in ([path], [path / FOLDER], path.glob(f"*/{FOLDER}")):
        steps = [folder / str(step) for folder in folders for step in steps_in(folder)]
        for newest in sorted(steps, key=lambda p: (p.parent.stat().st_mtime, int(p.name)), reverse=True):
            damage = _unusable(newest)
            if damage is None:
                for passed in damaged:
                    log.warning("going back to %s; %s is not whole", newest, passed.name)
                if integrity.unlisted(newest):
                    log.warning("checkpoint %s has no list of its files: their bytes cannot be checked", newest)
                return newest
            log.warning("checkpoint %s is damaged: %s; looking at the one before", newest, damage)
            damaged.append(newest)
    if damaged:
        raise UserError(f"No checkpoint in {path} is whole; the log says what is wrong with each.")
    raise UserError(f"{path} holds no checkpoint; give a step folder, a stage's folder or a workdir.")


def _unusable(folder: Path) -> str | None:
    """Why a model cannot be loaded from a step folder, in words; None where it can, as far as its files tell."""
    if not (folder / "params").is_dir():
        return "it has no params"
    try:
        files = [(name, (folder / name).stat()) for name in integrity.files(folder)]
    except (ValueError, OSError) as error:
        return str(error)
    damage = _problem(folder, tuple((name, at.st_size, at.st_mtime_ns) for name, at in files))
    if damage is None:
        try:
            load_about(folder)
        except UserError as error:
            return str(error).removeprefix(f"{folder} is no whole checkpoint: ").removeprefix(f"{folder} ").rstrip(".")
    return damage


@functools.lru_cache(maxsize=16)
def _problem(folder: Path, files: tuple[tuple[str, int, int], ...]) -> str | None:
    """`integrity.problem`, once for each state of the files: a command looks more than once at what takes minutes."""
    return integrity.problem(folder, parts=("params", "about"))


def load_params(folder: Path, like) -> dict:
    """Parameters alone, in the shapes and dtypes of `like`, whatever mesh wrote them.

    Raises:
      UserError: the checkpoint holds other parameters than `like`, or they cannot be read.
    """
    check_size(folder, like)
    try:
        stored = flatten_dict(ocp.metadata(folder, "params").metadata, sep="/")
    except Exception as error:
        raise_if_no_damage(error)
        raise UserError(f"{folder} is no whole checkpoint: its params cannot be read ({first_line(error)}).") from error
    # Asked before anything is read: Orbax reports each array of another shape with a traceback of its own.
    for name, leaf in flatten_dict(like, sep="/").items():
        shape = getattr(stored.get(name), "shape", None)
        if shape is None or tuple(shape) != leaf.shape:
            has = f"has shape {tuple(shape)}" if shape is not None else "is missing"
            raise UserError(
                f"{folder} holds parameters of another model: {name} {has}, the config asks for {leaf.shape}."
            )
    try:
        params = ocp.load_checkpointables(folder, {"params": abstract(like)})["params"]
        check_shapes(params, like)
        return params
    except Exception as error:
        raise_if_no_damage(error)
        raise UserError(f"{folder} holds parameters of another model: {first_line(error)}") from error


def load_model(path: str | Path) -> Loaded:
    """Everything that generation and evaluation need, from a checkpoint alone."""
    folder = find(path)
    about = load_about(folder)
    config = config_of(about, folder)
    with tempfile.TemporaryDirectory() as files:
        save_tokenizer(about, Path(files))
        tokenizer = load_tokenizer(files)
    try:
        like = jax.eval_shape(lambda: fusion.init(config.model, jax.random.key(0)))
    except (ArithmeticError, MemoryError, TypeError, ValueError) as error:
        raise UserError(f"{folder} has a config that no model can be made of: {first_line(error)}") from error
    return Loaded(config, load_params(folder, like), tokenizer, folder, step_of(folder))


def step_of(folder: Path) -> int:
    """The training step of a step folder; 0 for an import, whose folder has a name of the user's."""
    return int(folder.name) if _STEP.fullmatch(folder.name) else 0
