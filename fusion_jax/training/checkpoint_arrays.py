"""Reads the arrays of a step folder with Orbax, and distinguishes damage from other errors."""

import logging
import sys
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint.experimental.v1 as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from fusion_jax.errors import UserError, first_line


class Damaged(UserError):
    """The files of a step folder cannot be read, even if they match their list."""


def abstract(tree):
    """Returns the shapes, dtypes and shardings of a tree; a leaf without a sharding goes to the first device."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or here), tree)


def raise_if_no_damage(error: BaseException) -> None:
    """Raises the cause of a read error if memory ran out or the runtime failed: the file may be intact."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError | jax.errors.JaxRuntimeError):
            raise cause
        cause = cause.__cause__ or cause.__context__


def check_shapes(tree, like) -> None:
    """Raises ValueError if an array has another shape or dtype than the one in `like`; names it."""
    for (path, array), wanted in zip(jax.tree.leaves_with_path(tree), jax.tree.leaves(like), strict=True):
        if array.shape != wanted.shape or array.dtype != wanted.dtype:
            raise ValueError(
                f"{jax.tree_util.keystr(path)} has {array.dtype}{list(array.shape)}, "
                f"not {wanted.dtype}{list(wanted.shape)}"
            )


# The path of the tower's stacked layers in a tree of parameters, or in one with a leaf per parameter, such as moments.
_TOWER = ("vision", "layers")


_LEFT_OUT = (1, 2)  # layers after the last tap of the `paper` preset: `FusionConfig.encoder_layers`


def load_parts(folder: Path, like: dict) -> dict:
    """Reads parts of a step folder by name, in the shapes, dtypes and shardings of `like`, which must have `params`.

    Two older forms are converted. The files may hold layers of the vision tower after the last tap, which imports keep
    and earlier versions trained: they are cut off. Earlier versions counted Adam's steps once for all parameters: each
    parameter gets that count.
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
    """Returns path and shape of Adam's counts in a tree of training state if the file has a single count; else None."""
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
    """Reads as `load_parts` does, without the conversion of counts."""
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
        x.delete()  # one array at a time, so that memory does not hold a second tower
        return kept

    return jax.tree.map_with_path(cut, _load(folder, jax.tree.map_with_path(longer, like)))


def _load(folder: Path, like: dict) -> dict:
    """Calls `ocp.load_checkpointables`; a ValueError names the difference if the folder has other arrays."""
    try:
        return ocp.load_checkpointables(folder, like)
    except Exception as error:
        if "tree structures do not match" not in str(_first_cause(error)):
            raise
        raise ValueError(_other_arrays(folder, like)) from None


def _other_arrays(folder: Path, like: dict) -> str:
    """Returns a description of the arrays that a folder has or lacks, compared with `like`."""
    differences = []
    for part, tree in like.items():
        stored, wanted = (
            dict.fromkeys("/".join(_names(path)) for path, _ in jax.tree.leaves_with_path(one))
            for one in (ocp.metadata(folder, part).metadata, tree)
        )
        for verb, a, b in (("lacks", wanted, stored), ("has", stored, wanted)):
            names = [name for name in a if name not in b]
            if names:
                differences.append(
                    f"its {part} {verb} {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else "")
                )
    return f"it holds other arrays than this run asks for: {', '.join(differences) or 'in another order'}"


def _first_cause(error: BaseException) -> BaseException:
    """Returns the first cause of an error: the later ones of Orbax print the whole tree."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


def _is_tower(path) -> bool:
    names = _names(path)
    return any(names[i : i + len(_TOWER)] == _TOWER for i in range(len(names)))


def _depth(params: dict) -> int:
    """Returns the number of the tower's layers in a tree of parameters; 0 if there is no tower."""
    leaves = jax.tree.leaves(params.get(_TOWER[0], {}).get(_TOWER[1], {}))
    return leaves[0].shape[0] if leaves and len(leaves[0].shape) else 0


def read_params(folder: Path, like: dict) -> dict:
    """Reads parameters by path, in the shapes, dtypes and shardings of `like`, which may omit some of the folder's.

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


def fits(name: str, stored: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Returns whether a parameter of the shape `stored` can be read as one of the shape `wanted`."""
    if stored == wanted:
        return True
    tower = name.startswith("/".join(_TOWER)) and bool(stored) and bool(wanted)
    return tower and stored[1:] == wanted[1:] and stored[0] - wanted[0] in _LEFT_OUT


def stored_shapes(folder: Path, part: str = "params") -> dict:
    """Reads shapes and dtypes of a part of a step folder as a nested dict. Raises `Damaged` if that fails."""
    _silence_loops()
    try:
        stored = ocp.metadata(folder, part).metadata
    except Exception as error:
        raise_if_no_damage(error)
        raise unreadable(folder, error) from error
    if not isinstance(stored, dict):  # Orbax returns None if it cannot read them
        raise unreadable(folder, "their names and shapes are lost")
    return stored


def unreadable(folder: Path, why: BaseException | str) -> Damaged:
    """Returns the error of a step folder whose parameters cannot be read."""
    reason = why if isinstance(why, str) else _shortened(first_line(_first_cause(why)))
    return Damaged(f"{folder} is not an intact checkpoint: its params cannot be read ({reason}).")


def _shortened(message: str) -> str:
    """Returns an error of TensorStore without the list of options that follows the name of the file."""
    return " ".join(message.partition(" [tensorstore_spec=")[0].partition(" [source locations=")[0].split())[:300]


class _DropLostReads(logging.Filter):
    """Drops log records of reads that were running when another one failed: Orbax reads many arrays at once."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if error is None or "exception was never retrieved" not in record.getMessage():
            return True
        files = " ".join(frame.filename for frame in traceback.extract_tb(error.__traceback__))
        return not any(name in f"{error} {files}".lower() for name in ("orbax", "tensorstore", "ocdbt"))


def _silence_loops() -> None:
    """Hides the errors of reads that were running when another one failed, which has its own error."""
    asyncio_log = logging.getLogger("asyncio")
    if any(isinstance(known, _DropLostReads) for known in asyncio_log.filters):
        return
    asyncio_log.addFilter(_DropLostReads())
    # Some of TensorStore's reads end in threads after their event loop: one hook or the other would print that.
    print_error, print_ignored = sys.excepthook, sys.unraisablehook
    sys.excepthook = lambda *error: None if _is_late(*error) else print_error(*error)
    sys.unraisablehook = lambda error: (
        None if _is_late(error.exc_type, error.exc_value, error.exc_traceback) else print_ignored(error)
    )


def _is_late(kind, error, trace) -> bool:
    closed = kind is RuntimeError and f"{error}" == "Event loop is closed"
    return closed and all("uvloop" in frame.filename for frame in traceback.extract_tb(trace))
