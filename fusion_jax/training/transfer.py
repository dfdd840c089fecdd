"""Parameters of a checkpoint for a model that is not quite its own: with parts more or less, or in other stacks.

The decoder's layers lie in stacks (`FusionConfig.stacks`) that depend on where the exchange layers are, so that a model
without those has its layers in other places. Here each goes by its number in the decoder:

    llm/stack_0/layer_1/down/kernel [2]    ->  llm/layers/7/down/kernel
    llm/stack_0/exchange/in [2]            ->  llm/exchange/6/in         (the one behind decoder layer 6)
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from fusion_jax.errors import UserError, check
from fusion_jax.models import fusion
from fusion_jax.models.config import FusionConfig
from fusion_jax.training import loading
from fusion_jax.training.about import check_size

_STACKED = re.compile(r"llm/stack_(\d+)/(?:layer_(\d+)|exchange)/(.*)", re.ASCII)
# What a person leaves out, by the beginning of its name: in words, and as a pattern for `config.init_without`.
_PARTS = {
    "llm/exchange/": ("exchange layers", "/exchange/"),
    "latents_": ("latent tables", "^latents_"),
    "text_to_vision/": ("the text-to-vision projector", "^text_to_vision/"),
    "row_end": ("the row-end token", "^row_end"),
}

Place = tuple[str, int | None]  # a path, and the index in its stack


@dataclass(frozen=True)
class Transfer:
    """What goes where.

    Attributes:
      taken: for every path of the model that is taken over, its places in the checkpoint: one, or one a layer.
      anew: the other paths of the model.
    """

    taken: dict[str, list[Place]]
    anew: list[str]


def plan(
    folder: Path, saved: FusionConfig, model: FusionConfig, wanted: Mapping[str, jax.ShapeDtypeStruct], without
) -> Transfer:
    """How the parameters of a step folder become those of `model`.

    Args:
      saved: the checkpoint's own model. wanted: shapes of the model's parameters by path.
      without: regular expressions; a parameter whose path matches, here or there, is not taken over.

    Raises:
      UserError: beside these the two have other parameters, in one sentence; a pattern matches nothing.
    """
    stored = {path: tuple(leaf.shape) for path, leaf in flatten_dict(loading.stored_shapes(folder), sep="/").items()}
    matches = _matcher(without, [*stored, *wanted])
    theirs = _places(saved, [path for path in stored if not matches(path)])
    taken_paths = [path for path in wanted if not matches(path)]
    ours = _places(model, taken_paths)
    extra, missing = ([name for name in a if name not in b] for a, b in ((theirs, ours), (ours, theirs)))
    if extra or missing:
        said = [f"it has {_in_words(extra)}, which the config's model lacks"] if extra else []
        said += [f"it lacks {_in_words(missing)} of the config's model"] if missing else []
        patterns = _patterns([*extra, *missing])
        raise UserError(
            f"{folder} holds parameters of another model: {'; '.join(said)}. config.init_without={patterns} takes "
            "none of these over: what the model has of them begins anew."
        )
    for name, (path, index) in ours.items():
        there, place = theirs[name]
        shapes = stored[there][place is not None :], tuple(wanted[path].shape)[index is not None :]
        loading.check_fits(folder, path, *shapes)
    taken: dict[str, list[Place]] = {path: [] for path in taken_paths}
    for name, (path, _) in ours.items():
        taken[path].append(theirs[name])
    return Transfer(taken, [path for path in wanted if matches(path)])


def take(
    folder: Path, saved: FusionConfig, model: FusionConfig, like: dict, without: Sequence[str] = (), seed: int = 0
) -> dict:
    """The parameters of `plan`, in shapes, dtypes and shardings of `like`; what begins anew is drawn from the seed.

    Raises:
      loading.Damaged: they cannot be read. UserError: as `plan`.
    """
    wanted = flatten_dict(loading.abstract(like), sep="/")
    check_size(folder, wanted)
    transfer = plan(folder, saved, model, wanted, without)
    if saved.stacks() == model.stacks():
        params = loading.read_params(folder, {path: wanted[path] for path in transfer.taken})
    else:
        params = _restacked(folder, transfer, wanted)
    if transfer.anew:
        params |= _begun_anew(model, seed, {path: wanted[path] for path in transfer.anew})
    return unflatten_dict(params, sep="/")


def _restacked(folder: Path, transfer: Transfer, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict:
    """Arrays of the checkpoint's stacks, cut and joined into the model's."""
    stored = flatten_dict(loading.stored_shapes(folder), sep="/")
    like = {}
    for path, places in transfer.taken.items():
        leaf = wanted[path]
        for there, index in places:  # arrays of a stack differ in the number of their layers alone
            shape = leaf.shape if index is None else tuple(stored[there].shape)
            like[there] = jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=leaf.sharding)
    check_size(folder, like)
    arrays = loading.read_params(folder, like)
    uses = [there for places in transfer.taken.values() for there in {there for there, _ in places}]
    params = {}
    for path, places in transfer.taken.items():
        if places[0][1] is None:
            params[path] = arrays[places[0][0]]
            continue
        needed = {there: arrays[there] for there, _ in places}

        def join(needed, places=places):
            return jnp.stack([needed[there][index] for there, index in places])

        params[path] = jax.block_until_ready(jax.jit(join, out_shardings=wanted[path].sharding)(needed))
        for there in needed:  # one array after the other, so that no second decoder lies in memory
            uses.remove(there)
            if there not in uses:
                arrays.pop(there).delete()
    return params


def _begun_anew(model: FusionConfig, seed: int, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict:
    """Random parameters, the same as those of a model that begins anew as a whole."""

    def make(key):
        drawn = flatten_dict(fusion.init(model, key), sep="/")
        return {path: drawn[path] for path in wanted}

    places = {path: leaf.sharding for path, leaf in wanted.items()}
    return jax.jit(make, out_shardings=places)(jax.random.key(seed))


def _places(model: FusionConfig, paths: Iterable[str]) -> dict[str, Place]:
    """Where each parameter lies, those of stacks layer by layer; in the order of the paths and layers."""
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
    """Whether a path matches one of the patterns. UserError where one is none, or matches no path."""
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


def _in_words(names: Sequence[str]) -> str:
    """Names of parameters in a few words: known parts as such, of the others the first."""
    said: dict[str, list[str]] = {}
    others = []
    for name in names:
        beginning = next((part for part in _PARTS if name.startswith(part)), None)
        if beginning is None:
            others.append(name)
            continue
        number = re.match(r"llm/exchange/(\d+)|latents_(\d+)", name)
        numbers = said.setdefault(_PARTS[beginning][0], [])
        if number and (which := number[1] or number[2]) not in numbers:
            numbers.append(which)
    parts = []
    for what, numbers in said.items():
        behind = {"exchange layers": " behind decoder layers ", "latent tables": " of "}.get(what, "")
        parts.append(what + behind + ", ".join(sorted(numbers, key=int)))
    if others:
        parts.append(others[0] + (f" and {len(others) - 1} more" if others[1:] else ""))
    return " and ".join(parts)


def _patterns(names: Sequence[str]) -> list[str]:
    """Values of `config.init_without` for these names."""
    patterns = []
    for name in names:
        known = next((pattern for part, (_, pattern) in _PARTS.items() if name.startswith(part)), None)
        patterns.append(known or f"^{name.split('/')[0]}")
    return list(dict.fromkeys(patterns))
