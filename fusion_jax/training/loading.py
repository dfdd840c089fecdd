"""Finding checkpoints, and loading what generation and evaluation need of one. Damaged ones are passed over."""

import functools
import logging
import sys
import tempfile
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint.experimental.v1 as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from fusion_jax.config import RunConfig
from fusion_jax.data.tokenizer import Tokenizer, load_tokenizer
from fusion_jax.errors import UserError, first_line
from fusion_jax.models import fusion
from fusion_jax.training import integrity
from fusion_jax.training.about import check_size, config_of, load_about, save_tokenizer
from fusion_jax.training.order import FOLDER, latest_first, step_of, steps_in

log = logging.getLogger("fusion_jax")

T = TypeVar("T")


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


# The tower's stacks of layers in a tree of parameters, or of anything that has a leaf for each, as moments have.
_TOWER = ("vision", "layers")
_LEFT_OUT = (1, 2)  # layers behind the last tap of the `paper` preset: `FusionConfig.encoder_layers`


def load_parts(folder: Path, like: dict) -> dict:
    """Parts of a step folder by name, in the shapes, dtypes and shardings of `like`, whose `params` decide.

    A file may have the tower's layers that the taps leave out: an import keeps them, and so did runs before they were
    left out of the program. They are cut off here. Adam's steps were once counted for all parameters together: each
    then has that count.
    """
    shared = _shared_count(folder, like.get("train", {}))
    if shared is None:
        return _load_tower(folder, like)
    path, count = shared
    scalar = jax.ShapeDtypeStruct((), count.dtype, sharding=count.sharding)
    loaded = _load_tower(folder, like | {"train": _replaced(like["train"], path, lambda _: scalar)})
    spread = jax.jit(lambda x: jnp.broadcast_to(x, count.shape), out_shardings=count.sharding)
    return loaded | {"train": _replaced(loaded["train"], path, spread)}


def _shared_count(folder: Path, train: dict):
    """Path and shape of Adam's counts in a tree of training state, if the file has one for all; else None."""
    for path, x in jax.tree.leaves_with_path(train):
        if getattr(path[-1], "name", "") == "count" and x.shape:
            stored = jax.tree.leaves_with_path(stored_shapes(folder, "train"))
            # Orbax gives named fields as keys.
            if any(_names(theirs) == _names(path) and not leaf.shape for theirs, leaf in stored):
                return path, x
    return None


def _names(path) -> tuple[str, ...]:
    return tuple(str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", "")))) for key in path)


def _replaced(tree, path, by):
    return jax.tree.map_with_path(lambda here, x: by(x) if here == path else x, tree)


def _load_tower(folder: Path, like: dict) -> dict:
    """`load_parts` but for counts."""
    stored, wanted = _depth(stored_shapes(folder)), _depth(like["params"])
    if stored - wanted not in _LEFT_OUT:
        return _load(folder, like)

    def longer(path, x):
        if not _is_tower(path):
            return x
        return jax.ShapeDtypeStruct((stored, *x.shape[1:]), x.dtype, sharding=x.sharding)

    def cut(path, x):
        if not _is_tower(path):
            return x
        kept = jax.block_until_ready(jax.jit(lambda x: x[:wanted], out_shardings=x.sharding)(x))
        x.delete()  # one array after the other, so that no second tower lies in memory
        return kept

    return jax.tree.map_with_path(cut, _load(folder, jax.tree.map_with_path(longer, like)))


def _load(folder: Path, like: dict) -> dict:
    """`ocp.load_checkpointables`. ValueError with a name where the folder has other arrays: Orbax prints both trees."""
    try:
        return ocp.load_checkpointables(folder, like)
    except Exception as error:
        if "tree structures do not match" not in str(_bottom(error)):
            raise
        raise ValueError(_other_arrays(folder, like)) from None


def _other_arrays(folder: Path, like: dict) -> str:
    """In words, which arrays a folder has and lacks."""
    said = []
    for part, tree in like.items():
        stored, wanted = (
            dict.fromkeys("/".join(_names(path)) for path, _ in jax.tree.leaves_with_path(one))
            for one in (ocp.metadata(folder, part).metadata, tree)
        )
        for what, a, b in (("lacks", wanted, stored), ("has", stored, wanted)):
            names = [name for name in a if name not in b]
            if names:
                said.append(f"its {part} {what} {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else ""))
    return f"it holds other arrays than this run asks for: {', '.join(said) or 'in another order'}"


def _bottom(error: BaseException) -> BaseException:
    """What lies at the bottom of Orbax's errors: those above it print all that was asked for."""
    while (behind := error.__cause__ or error.__context__) is not None:
        error = behind
    return error


def _is_tower(path) -> bool:
    names = _names(path)
    return any(names[i : i + len(_TOWER)] == _TOWER for i in range(len(names)))


def _depth(params: dict) -> int:
    """Layers of the tower in a tree of parameters; 0 where there is none."""
    leaves = jax.tree.leaves(params.get(_TOWER[0], {}).get(_TOWER[1], {}))
    return leaves[0].shape[0] if leaves and len(leaves[0].shape) else 0


@dataclass(frozen=True)
class Loaded:
    """A trained model: its run config, parameters (float32, nested dict), tokenizer and step folder."""

    config: RunConfig
    params: dict
    tokenizer: Tokenizer
    folder: Path
    step: int


class Damaged(UserError):
    """The files of a step folder cannot be used, whatever their list says."""


def find(path: str | Path) -> Path:
    """The step folder that `path` means, as far as its files tell; see `use`."""
    return use(path, lambda folder: folder)


def use(path: str | Path, load: Callable[[Path], T]) -> T:
    """What `load` makes of the step folder that `path` means: a step folder, a stage's folder, or a workdir (its newest
    stage and step).

    A damaged one is passed over for the one before, and the log says so. A step folder that is named itself has none.

    Args:
      load: raises `Damaged` where the folder cannot be read.

    Raises:
      UserError: there is no checkpoint, or none that is whole; whatever else `load` raises.
    """
    path = Path(path).absolute()
    if (path / "params").is_dir():
        damage = _unusable(path)
        if damage:
            raise Damaged(f"{path} is no whole checkpoint: {damage}.")
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
                    for passed in damaged:
                        log.warning("going back to %s; %s is not whole", newest, passed.name)
                    return result
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
            return _why(folder, error)
    return damage


def _why(folder: Path, error: UserError) -> str:
    """An error about a step folder without its name, and without a full stop."""
    return str(error).removeprefix(f"{folder} is no whole checkpoint: ").removeprefix(f"{folder} ").rstrip(".")


@functools.lru_cache(maxsize=16)
def _problem(folder: Path, files: tuple[tuple[str, int, int], ...]) -> str | None:
    """`integrity.problem`, once for each state of the files: a command looks more than once at what takes minutes."""
    return integrity.problem(folder, parts=("params", "about"))


def load_params(folder: Path, like) -> dict:
    """Parameters alone, in the shapes and dtypes of `like`, whatever mesh wrote them.

    Raises:
      Damaged: they cannot be read.
      UserError: the checkpoint holds other parameters than `like`.
    """
    check_size(folder, like)
    stored, wanted = (flatten_dict(tree, sep="/") for tree in (stored_shapes(folder), abstract(like)))
    check_names(folder, stored, wanted)
    for name, leaf in wanted.items():
        check_fits(folder, name, tuple(stored[name].shape), leaf.shape)
    return unflatten_dict(read_params(folder, wanted), sep="/")


def check_names(folder: Path, stored: Collection[str], wanted: Collection[str]) -> None:
    """UserError where a checkpoint has other parameters than a model asks for, by their names. Asked before anything is
    read: Orbax prints both trees whole."""
    for what, a, b in (("lacks", wanted, stored), ("has", stored, wanted)):
        names = [name for name in a if name not in b]
        if names:
            more = f" and {len(names) - 1} more" if names[1:] else ""
            whose = "which its config asks for" if what == "lacks" else "which its config does not know"
            raise UserError(f"{folder} holds parameters of another model: it {what} {names[0]}{more}, {whose}.")


def check_fits(folder: Path, name: str, stored: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """UserError where a parameter has another shape than a model asks for. Asked before anything is read: Orbax reports
    each such array with a traceback of its own."""
    if not _fits(name, stored, wanted):
        why = ""
        if _fits(name, wanted, stored):
            why = (
                " It was trained with taps='paper', which needs fewer layers of the tower: keep taps='paper', or "
                "start from a checkpoint that has them all, such as an import."
            )
        raise UserError(
            f"{folder} holds parameters of another model: {name} has shape {stored}, the config asks for {wanted}.{why}"
        )


def read_params(folder: Path, like: dict) -> dict:
    """Parameters by path, in the shapes, dtypes and shardings of `like`, which may leave some of the folder's out.

    Raises:
      Damaged: they cannot be read. UserError: they have other shapes or dtypes.
    """
    options = ocp.Context()
    options.pytree.loading.partial_load = True
    try:
        with options:
            params = flatten_dict(load_parts(folder, {"params": unflatten_dict(like, sep="/")})["params"], sep="/")
    except Exception as error:
        raise_if_no_damage(error)
        raise unreadable(folder, error) from error
    params = {path: params[path] for path in like}
    try:
        check_shapes(params, like)
    except ValueError as error:
        raise UserError(f"{folder} holds parameters of another model: {error}.") from error
    return params


def _fits(name: str, stored: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a parameter of the shape `stored` gives one of the shape `wanted`."""
    if stored == wanted:
        return True
    tower = name.startswith("/".join(_TOWER)) and bool(stored) and bool(wanted)
    return tower and stored[1:] == wanted[1:] and stored[0] - wanted[0] in _LEFT_OUT


def stored_shapes(folder: Path, part: str = "params") -> dict:
    """Shapes and dtypes of a part of a step folder, a nested dict. `Damaged` where they cannot be read."""
    _silence_loops()
    try:
        stored = ocp.metadata(folder, part).metadata
    except Exception as error:
        raise_if_no_damage(error)
        raise unreadable(folder, error) from error
    if not isinstance(stored, dict):  # Orbax gives None where it cannot read them
        raise unreadable(folder, "their names and shapes are lost")
    return stored


def unreadable(folder: Path, why: BaseException | str) -> Damaged:
    """The error of a step folder whose parameters cannot be read."""
    said = why if isinstance(why, str) else _short(first_line(_bottom(why)))
    return Damaged(f"{folder} is no whole checkpoint: its params cannot be read ({said}).")


def _short(said: str) -> str:
    """TensorStore's errors name the file and end in all options that it was opened with."""
    return " ".join(said.partition(" [tensorstore_spec=")[0].partition(" [source locations=")[0].split())[:300]


class _NoTasks(logging.Filter):
    """Orbax reads many arrays at once. Where one fails, the errors of the others are logged whenever their tasks go."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if error is None or "exception was never retrieved" not in record.getMessage():
            return True
        passed = " ".join(frame.filename for frame in traceback.extract_tb(error.__traceback__))
        return not any(name in f"{error} {passed}".lower() for name in ("orbax", "tensorstore", "ocdbt"))


def _silence_loops() -> None:
    """Without what is printed about reads that were under way when one failed: that one's error says it."""
    asyncio_log = logging.getLogger("asyncio")
    if any(isinstance(known, _NoTasks) for known in asyncio_log.filters):
        return
    asyncio_log.addFilter(_NoTasks())
    # Some of TensorStore's reads end after their loop has, in threads: printed by the first, then by the second.
    print_it, print_ignored = sys.excepthook, sys.unraisablehook
    sys.excepthook = lambda *what: None if _is_late(*what) else print_it(*what)
    sys.unraisablehook = lambda what: (
        None if _is_late(what.exc_type, what.exc_value, what.exc_traceback) else print_ignored(what)
    )


def _is_late(kind, error, trace) -> bool:
    closed = kind is RuntimeError and f"{error}" == "Event loop is closed"
    return closed and all("uvloop" in frame.filename for frame in traceback.extract_tb(trace))


def load_model(path: str | Path) -> Loaded:
    """Everything that generation and evaluation need, from a checkpoint alone. Raises as `use` does."""

    def load(folder: Path) -> Loaded:
        try:
            return _load_model(folder)
        except Damaged:
            raise
        except UserError as error:  # its parts contradict each other
            raise Damaged(str(error)) from error

    return use(path, load)


def _load_model(folder: Path) -> Loaded:
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
