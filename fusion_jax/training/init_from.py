"""Starts a model from the checkpoint of a similar one, which may have other parts, or other stacks.

The decoder's layers are stored in stacks (`FusionConfig.stacks`) that depend on the positions of the exchange layers:
a model without exchange layers has other stacks. Here each layer is identified by its number in the decoder:

    llm/stack_0/layer_1/down/kernel [2]    ->  llm/layers/7/down/kernel
    llm/stack_0/exchange/in [2]            ->  llm/exchange/6/in         (the one after decoder layer 6)
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from fusion_jax.config import RunConfig
from fusion_jax.errors import UserError, check
from fusion_jax.models import fusion
from fusion_jax.models.config import FusionConfig
from fusion_jax.training import checkpoint_arrays, loading
from fusion_jax.training.about import check_size, config_of, load_about
from fusion_jax.training.checkpoint import all_agree, read_by_all
from fusion_jax.training.checkpoint_arrays import read_params, stored_shapes
from fusion_jax.training.resume import continue_model

_STACKED = re.compile(r"llm/stack_(\d+)/(?:layer_(\d+)|exchange)/(.*)", re.ASCII)
# Parts that models may lack, by the beginning of their name: for errors, and as a pattern for `config.init_without`.
_PARTS = {
    "llm/exchange/": ("exchange layers", "/exchange/"),
    "latents_": ("latent tables", "^latents_"),
    "text_to_vision/": ("the text-to-vision projector", "^text_to_vision/"),
    "row_end": ("the row-end token", "^row_end"),
}

Place = tuple[str, int | None]  # a path, and the index in its stack


@dataclass(frozen=True)
class Transfer:
    """Which parameters of a checkpoint become which of a model.

    Attributes:
      sources: for every path of the model that is taken over, its places in the checkpoint: one, or one per layer.
      new: the other paths of the model, which begin at random values.
    """

    sources: dict[str, list[Place]]
    new: list[str]


def initial_parameters(config: RunConfig, like: dict) -> tuple[Path, dict]:
    """Returns the step folder of `config.init_from`, and its parameters in shapes, dtypes and shardings of `like`.

    Parameters that `config.init_without` matches are not taken over, but begin at random values if the model has them.
    With several processes all use the same folder. Raises UserError as `loading.use` and `load_params` do.
    """

    def load(folder: Path) -> tuple[Path, dict]:
        about, params, problem = load_about(folder), None, None
        if continue_model(config.model, about, str(folder)) != config.model:
            raise UserError(
                f"{folder} holds another model than the newest checkpoint of {config.init_from}; give a step folder."
            )
        try:
            saved = config_of(about, folder).model
            params = take_parameters(folder, saved, config.model, like, config.init_without, config.seed)
        except checkpoint_arrays.Damaged as error:
            problem = error
        read_by_all(folder, problem)
        if not all_agree(params is not None):
            raise problem or checkpoint_arrays.unreadable(folder, "another process logs why")
        assert params is not None
        return folder, params

    return loading.use(config.init_from, load)


def check_initial(config: RunConfig, shapes: dict) -> None:
    """Raises UserError if a model with parameters of these shapes cannot start from those of `config.init_from`."""

    def look(folder: Path) -> None:
        saved = config_of(load_about(folder), folder).model
        match_parameters(folder, saved, config.model, flatten_dict(shapes, sep="/"), config.init_without)

    loading.use(config.init_from, look)


def match_parameters(
    folder: Path, saved: FusionConfig, model: FusionConfig, wanted: Mapping[str, jax.ShapeDtypeStruct], without
) -> Transfer:
    """Matches the parameters of a step folder with those of `model`.

    Args:
      saved: the model of the checkpoint. wanted: shapes of the model's parameters by path.
      without: regular expressions; a parameter whose path matches, in the model or the checkpoint, is not taken over.

    Raises:
      UserError: the remaining parameters differ, or a pattern matches nothing.
    """
    stored = {path: tuple(leaf.shape) for path, leaf in flatten_dict(stored_shapes(folder), sep="/").items()}
    matches = _matcher(without, [*stored, *wanted])
    theirs = _places(saved, [path for path in stored if not matches(path)])
    kept_paths = [path for path in wanted if not matches(path)]
    ours = _places(model, kept_paths)
    extra, missing = ([name for name in a if name not in b] for a, b in ((theirs, ours), (ours, theirs)))
    if extra or missing:
        differences = [f"it has {_described(extra)}, which the config's model lacks"] if extra else []
        differences += [f"it lacks {_described(missing)} of the config's model"] if missing else []
        patterns = _patterns([*extra, *missing])
        raise UserError(
            f"{folder} holds parameters of another model: {'; '.join(differences)}. config.init_without={patterns} "
            "takes none of these over: what the model has of them begins at random values."
        )
    for name, (path, index) in ours.items():
        there, place = theirs[name]
        shapes = stored[there][place is not None :], tuple(wanted[path].shape)[index is not None :]
        loading.check_fits(folder, path, *shapes)
    sources: dict[str, list[Place]] = {path: [] for path in kept_paths}
    for name, (path, _) in ours.items():
        sources[path].append(theirs[name])
    return Transfer(sources, [path for path in wanted if matches(path)])


def take_parameters(
    folder: Path, saved: FusionConfig, model: FusionConfig, like: dict, without: Sequence[str] = (), seed: int = 0
) -> dict:
    """Reads the parameters of `match_parameters`, in shapes, dtypes and shardings of `like`.

    What the checkpoint does not provide is drawn at random from the seed.

    Raises:
      checkpoint_arrays.Damaged: they cannot be read. UserError: as `match_parameters`.
    """
    wanted = flatten_dict(checkpoint_arrays.abstract(like), sep="/")
    check_size(folder, wanted)
    transfer = match_parameters(folder, saved, model, wanted, without)
    if saved.stacks() == model.stacks():
        params = read_params(folder, {path: wanted[path] for path in transfer.sources})
    else:
        params = _restacked(folder, transfer, wanted)
    if transfer.new:
        params |= _new_parameters(model, seed, {path: wanted[path] for path in transfer.new})
    return unflatten_dict(params, sep="/")


def _restacked(folder: Path, transfer: Transfer, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict:
    """Reads the arrays of the checkpoint's stacks and rearranges their layers into the model's stacks."""
    stored = flatten_dict(stored_shapes(folder), sep="/")
    like = {}
    for path, places in transfer.sources.items():
        leaf = wanted[path]
        for there, index in places:  # arrays of a stack differ only in their number of layers
            shape = leaf.shape if index is None else tuple(stored[there].shape)
            like[there] = jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=leaf.sharding)
    check_size(folder, like)
    arrays = read_params(folder, like)
    uses = [there for places in transfer.sources.values() for there in {there for there, _ in places}]
    params = {}
    for path, places in transfer.sources.items():
        if places[0][1] is None:
            params[path] = arrays[places[0][0]]
            continue
        needed = {there: arrays[there] for there, _ in places}

        def join(needed, places=places):
            return jnp.stack([needed[there][index] for there, index in places])

        params[path] = jax.block_until_ready(jax.jit(join, out_shardings=wanted[path].sharding)(needed))
        for there in needed:  # one array at a time, so that memory does not hold a second decoder
            uses.remove(there)
            if there not in uses:
                arrays.pop(there).delete()
    return params


def _new_parameters(model: FusionConfig, seed: int, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict:
    """Draws random parameters, equal to those of a model that starts without a checkpoint."""

    def make(key):
        drawn = flatten_dict(fusion.init(model, key), sep="/")
        return {path: drawn[path] for path in wanted}

    places = {path: leaf.sharding for path, leaf in wanted.items()}
    return jax.jit(make, out_shardings=places)(jax.random.key(seed))


def _places(model: FusionConfig, paths: Iterable[str]) -> dict[str, Place]:
    """Returns the place of each parameter, one per layer for stacks, in the order of the paths and layers."""
    stacks = model.stacks()
    first = [sum(stack.blocks * stack.layers for stack in stacks[:s]) for s in range(len(stacks))]
    places: dict[str, Place] = {}
    for path in paths:
        match = _STACKED.fullmatch(path)
        s = int(match[1]) if match else len(stacks)
        if s >= len(stacks):
            places[path] = path, None
            continue
        for block in range(stacks[s].blocks):
            layer = first[s] + block * stacks[s].layers + int(match[2] or 0)
            kind = "exchange" if match[2] is None else "layers"
            places[f"llm/{kind}/{layer}/{match[3]}"] = path, block
    return places


def _matcher(patterns: Sequence[str], paths: Sequence[str]):
    """Returns a function that says whether a path matches a pattern. UserError if a pattern is invalid or unused."""
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise UserError(f"config.init_without: {pattern!r} is not a regular expression ({error}).") from None
        check(
            any(compiled[-1].search(path) for path in paths),
            f"config.init_without: {pattern!r} matches no parameter of the model or the checkpoint; paths are such as "
            "llm/stack_0/exchange/in.",
        )
    return lambda path: any(pattern.search(path) for pattern in compiled)


def _described(names: Sequence[str]) -> str:
    """Returns a short description of parameters: known parts by their names, and the first of the others."""
    parts_numbers: dict[str, list[str]] = {}
    others = []
    for name in names:
        beginning = next((part for part in _PARTS if name.startswith(part)), None)
        if beginning is None:
            others.append(name)
            continue
        number = re.match(r"llm/exchange/(\d+)|latents_(\d+)", name)
        numbers = parts_numbers.setdefault(_PARTS[beginning][0], [])
        if number and (which := number[1] or number[2]) not in numbers:
            numbers.append(which)
    parts = []
    for part, numbers in parts_numbers.items():
        relation = {"exchange layers": " after decoder layers ", "latent tables": " of "}.get(part, "")
        parts.append(part + relation + ", ".join(sorted(numbers, key=int)))
    if others:
        parts.append(others[0] + (f" and {len(others) - 1} more" if others[1:] else ""))
    return " and ".join(parts)


def _patterns(names: Sequence[str]) -> list[str]:
    """Returns patterns for `config.init_without` that match these names."""
    patterns = []
    for name in names:
        known = next((pattern for part, (_, pattern) in _PARTS.items() if name.startswith(part)), None)
        patterns.append(known or f"^{name.split('/')[0]}")
    return list(dict.fromkeys(patterns))
