"""Finds checkpoints and loads models from them for generation and evaluation; skips damaged ones."""

import functools
import logging
import math
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

from fusion_jax.config import RunConfig
from fusion_jax.data.tokenizer import Tokenizer, load_tokenizer
from fusion_jax.errors import UserError, first_line
from fusion_jax.models import fusion, weights
from fusion_jax.training import integrity
from fusion_jax.training.about import check_size, config_of, load_about, save_tokenizer
from fusion_jax.training.checkpoint_arrays import Damaged, abstract, fits, read_params, stored_shapes
from fusion_jax.training.checkpoint_folders import FOLDER, latest_first, step_of, steps_in

log = logging.getLogger("fusion_jax")

_PART = 2 << 30  # bytes of float32 parameters that are read at a time

T = TypeVar("T")


@dataclass(frozen=True)
class Loaded:
    """A trained model, ready to answer.

    Attributes:
      config: that of its run. model: what `params` are for; it computes in the dtype that `load_model` was asked for.
      params: nested dict of arrays, stored as `models/weights.py` says. tokenizer: that of its training.
      folder: the step folder. step: its number.
    """

    config: RunConfig
    model: fusion.Fusion
    params: dict
    tokenizer: Tokenizer
    folder: Path
    step: int


def find_checkpoint(path: str | Path) -> Path:
    """Returns the step folder that `path` refers to (see `use`), judged by its files alone."""
    return use(path, lambda folder: folder)


def use(path: str | Path, load: Callable[[Path], T]) -> T:
    """Returns the result of `load` for the step folder that `path` refers to.

    `path` is a step folder, a stage's folder (its newest step), or a workdir (its newest stage and step). If the newest
    checkpoint is damaged, the previous one is used, and the log says so. A path to a step folder has no such fallback.

    Args:
      load: raises `Damaged` if the folder cannot be read.

    Raises:
      UserError: there is no checkpoint, or none that is intact. Errors of `load` other than `Damaged` are passed on.
    """
    path = Path(path).absolute()
    if (path / "params").is_dir():
        damage = _unusable(path)
        if damage:
            raise Damaged(f"{path} is not an intact checkpoint: {damage}.")
        return load(path)
    damaged = []
    for folders in ([path], [path / FOLDER], latest_first(path.glob(f"*/{FOLDER}"))):
        for newest in (folder / str(step) for folder in folders for step in reversed(steps_in(folder))):
            damage = _unusable(newest)
            if damage is None:
                if integrity.unlisted(newest):
                    log.warning("checkpoint %s has no list of its files: their bytes cannot be checked", newest)
                try:
                    result = load(newest)
                except Damaged as error:
                    damage = _why(newest, error)
                else:
                    for skipped in damaged:
                        log.warning("going back to %s; %s is not intact", newest, skipped.name)
                    return result
            log.warning("checkpoint %s is damaged: %s; trying the previous one", newest, damage)
            damaged.append(newest)
    if damaged:
        raise UserError(f"No checkpoint in {path} is intact; the log says what is wrong with each.")
    raise UserError(f"{path} holds no checkpoint; give a step folder, a stage's folder or a workdir.")


def _unusable(folder: Path) -> str | None:
    """Says why a model cannot be loaded from a step folder; returns None if its files look intact."""
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
            return _why(folder, error)
    return damage


def _why(folder: Path, error: UserError) -> str:
    """Returns the text of an error about a step folder, without the folder's name and the full stop."""
    return str(error).removeprefix(f"{folder} is not an intact checkpoint: ").removeprefix(f"{folder} ").rstrip(".")


@functools.lru_cache(maxsize=16)
def _problem(folder: Path, files: tuple[tuple[str, int, int], ...]) -> str | None:
    """Caches `integrity.problem` by the state of the files: it takes minutes, and a command may need it twice."""
    return integrity.problem(folder, parts=("params", "about"))


def load_params(folder: Path, like) -> dict:
    """Loads the parameters alone, in the shapes and dtypes of `like`, on whatever mesh they were written.

    Raises:
      Damaged: they cannot be read.
      UserError: the checkpoint holds other parameters than `like`.
    """
    check_size(folder, like)
    return unflatten_dict(read_params(folder, _checked_shapes(folder, like)), sep="/")


def _checked_shapes(folder: Path, like) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of parameters by path. Raises UserError if the checkpoint holds others."""
    stored, wanted = (flatten_dict(tree, sep="/") for tree in (stored_shapes(folder), abstract(like)))
    check_names(folder, stored, wanted)
    for name, leaf in wanted.items():
        check_fits(folder, name, tuple(stored[name].shape), leaf.shape)
    return wanted


def load_for_answers(folder: Path, like, dtype: DTypeLike, kind: str = "full") -> dict:
    """Loads the parameters as `weights` stores them: in the dtypes that the layers read, or matrices as int8, by block.

    They are read a few at a time and converted at once, so that memory never holds all of them twice.

    Args:
      like: shapes of the parameters in float32. kind: one of `weights.KINDS`.

    Raises as `load_params` does.
    """
    check_size(folder, like)
    wanted = _checked_shapes(folder, like)
    read = weights.dtypes(wanted, dtype)
    params: dict[str, jax.Array] = {}
    for part in _parts(wanted):
        whole = {path for path in part if kind == "int8" and weights.becomes_int8(path)}
        shapes = {path: x if path in whole else x.update(dtype=read[path]) for path, x in part.items()}
        for path, x in read_params(folder, shapes).items():
            if path in whole:
                integers, scales = jax.block_until_ready(weights.to_int8(x))
                x.delete()
                params |= _by_block(path, integers) | _by_block(weights.scale_name(path), scales)
            else:
                params |= _by_block(path, x)
    return unflatten_dict(params, sep="/")


def _by_block(path: str, x: jax.Array) -> dict[str, jax.Array]:
    """Splits a parameter as `weights.of_blocks` does, and frees it."""
    blocks = weights.of_blocks(path, x)
    if path not in blocks:
        jax.block_until_ready(blocks)
        x.delete()
    return blocks


def _parts(shapes: dict[str, jax.ShapeDtypeStruct]) -> Iterator[dict[str, jax.ShapeDtypeStruct]]:
    """Divides arrays into parts of at most `_PART` bytes, or of one larger array."""
    part: dict[str, jax.ShapeDtypeStruct] = {}
    total = 0
    for path, x in shapes.items():
        size = math.prod(x.shape) * x.dtype.itemsize
        if part and total + size > _PART:
            yield part
            part, total = {}, 0
        part[path] = x
        total += size
    yield part


def check_names(folder: Path, stored: Collection[str], wanted: Collection[str]) -> None:
    """Raises UserError if a checkpoint has parameters of other names than a model.

    This is checked before anything is read, because the error of Orbax prints both trees.
    """
    for verb, a, b in (("lacks", wanted, stored), ("has", stored, wanted)):
        names = [name for name in a if name not in b]
        if names:
            more = f" and {len(names) - 1} more" if names[1:] else ""
            whose = "which its config asks for" if verb == "lacks" else "which its config does not know"
            raise UserError(f"{folder} holds parameters of another model: it {verb} {names[0]}{more}, {whose}.")


def check_fits(folder: Path, name: str, stored: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """Raises UserError if a parameter has another shape than the one in a model.

    This is checked before anything is read, because Orbax reports each such array with its own traceback.
    """
    if not fits(name, stored, wanted):
        why = ""
        if fits(name, wanted, stored):
            why = (
                " It was trained with taps='paper', which needs fewer layers of the tower: keep taps='paper', or "
                "start from a checkpoint that has them all, such as an import."
            )
        raise UserError(
            f"{folder} holds parameters of another model: {name} has shape {stored}, the config asks for {wanted}.{why}"
        )


def load_model(path: str | Path, dtype: DTypeLike | None = None, kind: str = "full") -> Loaded:
    """Loads all that generation and evaluation need, from a checkpoint alone. Raises as `use` does.

    Args:
      dtype: what to compute in, by default that of training. kind: how to store the weights, one of `weights.KINDS`.
    """

    def load(folder: Path) -> Loaded:
        try:
            return _load_model(folder, dtype, kind)
        except Damaged:
            raise
        except UserError as error:  # parts of the checkpoint contradict each other
            raise Damaged(str(error)) from error

    return use(path, load)


def _load_model(folder: Path, dtype: DTypeLike | None, kind: str) -> Loaded:
    about = load_about(folder)
    config = config_of(about, folder)
    with tempfile.TemporaryDirectory() as files:
        save_tokenizer(about, Path(files))
        tokenizer = load_tokenizer(files)
    try:
        like = jax.eval_shape(lambda: fusion.init(config.model, jax.random.key(0)))
    except (ArithmeticError, MemoryError, TypeError, ValueError) as error:
        raise UserError(f"{folder} has a config from which no model can be built: {first_line(error)}") from error
    model = fusion.Fusion(config.model, jnp.dtype(dtype or config.dtype))
    params = load_for_answers(folder, like, model.dtype, kind)
    log.info("weights: %.2f GiB (%s)", weights.size(params) / 2**30, kind if kind == "int8" else model.dtype.name)
    return Loaded(config, model, params, tokenizer, folder, step_of(folder))
