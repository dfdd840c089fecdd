"""Exports checkpoints as folders for PyTorch: for the published code, or for transformers.

Parameters are read group by group and written into memory-mapped safetensors files, so that only a few tensors are in
memory, however large the model.
"""

import json
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import tqdm
from flax.traverse_util import flatten_dict, unflatten_dict

from fusion_jax.config import RunConfig
from fusion_jax.data import chat_template
from fusion_jax.data.templates import find_template, stop_ids
from fusion_jax.data.tokenizer import load_tokenizer
from fusion_jax.errors import UserError, check, check_choice
from fusion_jax.files import shown
from fusion_jax.interop import FORMATS, hf_config, table
from fusion_jax.interop.families import family_of
from fusion_jax.interop.model_card import model_card
from fusion_jax.interop.new_folder import check_room, new_folder
from fusion_jax.interop.opening import UNUSED, unpack
from fusion_jax.interop.published import TowerFolder, check_opens, name_note, place_tower
from fusion_jax.interop.published_config import published_config
from fusion_jax.interop.shapes import parameter_shapes
from fusion_jax.interop.tensors import DTYPES, TensorWriter, assign, size_of
from fusion_jax.interop.torch import names
from fusion_jax.training import loading
from fusion_jax.training.about import config_of, load_about, save_tokenizer
from fusion_jax.training.checkpoint_arrays import Damaged, raise_if_no_damage, stored_shapes, unreadable
from fusion_jax.training.loading import find_checkpoint
from fusion_jax.values.foreign import mapping, read_object

log = logging.getLogger("fusion_jax")

_GROUP_BYTES = 10**9
_POSITIONS = "vision/position_embedding"


@dataclass(frozen=True)
class Checkpoint:
    """A step folder, its run config, its `about` entry, and the dtype and shape of every parameter by path.

    The tower's stacks may have layers that the model's taps do not read; these are exported as well.
    """

    folder: Path
    config: RunConfig
    about: dict[str, Any]
    parameters: dict[str, tuple[tuple[int, ...], str]]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a checkpoint without reading its parameters.

    Raises:
      UserError: there is no checkpoint, or its parameters are not those of its config.
    """
    folder = find_checkpoint(path)
    about = load_about(folder)
    config = config_of(about, folder)
    stored = flatten_dict(stored_shapes(folder), sep="/")
    parameters = {path: (tuple(leaf.shape), np.dtype(leaf.dtype).name) for path, leaf in stored.items()}
    shapes = parameter_shapes(config.model)
    every = table.all_shapes(config.model, shapes)
    first = next(path for path in shapes if path.startswith(table.TOWER))
    if first in parameters and parameters[first][0] == every[first]:
        shapes = every
    for name, shape in shapes.items():
        check(name in parameters, f"{folder} lacks the parameter {name}.")
        actual, dtype = parameters[name]
        check(actual == shape, f"{folder}: {name} has shape {actual}; its config asks for {shape}.")
        check(dtype in DTYPES, f"{folder}: {name} has type {dtype}; allowed: {', '.join(DTYPES)}.")
    return Checkpoint(folder, config, about, parameters)


def export(path: str | Path, target: str | Path, format: str, dtype: str | None = None, progress: bool = True) -> Path:
    """Writes the folder `target`, whole or not at all.

    Args:
      path: step folder, stage or workdir. format: one of `FORMATS`.
      dtype: key of `DTYPES`; None keeps the checkpoint's.

    Returns:
      The step folder that was exported.

    Raises:
      UserError: the format or dtype is unknown, the format cannot hold the model (`published` has no dynamic
        resolution), the target is not empty, or the disk is full.
    """
    check_choice("format ", format, FORMATS)
    if dtype is not None:
        check_choice("dtype ", dtype, DTYPES)

    def from_folder(folder: Path) -> Path:
        try:
            source = open_checkpoint(folder)
        except UserError as error:
            raise Damaged(str(error)) from error
        return _export(source, target, format == "published", dtype, progress)

    return loading.use(path, from_folder)


def _export(source: Checkpoint, target: str | Path, published: bool, dtype: str | None, progress: bool) -> Path:
    config, model = source.config, source.config.model
    main = dtype or source.parameters["llm/embedding"][1]
    check(
        not (published and model.tile_grids),
        f"{source.folder}: the published code has no dynamic resolution (tile_grids); use --format transformers.",
    )
    described, unused, tower = {}, {}, None
    if published:
        origin = mapping(source.about, "origin", f"{source.folder} (its description)")
        came_from = mapping(origin, "config", f"{source.folder} (what it came from)")
        with hf_config.reading(f"{source.folder}"):
            described = published_config(model, config.template, came_from, main)
            check_opens(model, config.template)
    shapes = {path: shape for path, (shape, _) in source.parameters.items()}
    rows = names.rows(model, shapes)
    if published:
        rows = table.published_rows(model, shapes, family_of(described["model_type"]).fused)
        unused = _unused(origin, model.vision.width, main, f"{source.folder} (what it came from)")
        unused = {name: array for name, array in unused.items() if name not in {row.name for row in rows}}
        described["mm_vision_tower"], tower = place_tower(model, described, Path(target), shapes)
    tensors = {row.name: (row.shape, dtype or source.parameters[row.paths[0][0]][1]) for row in rows}
    tensors |= {name: (array.shape, dtype or array.dtype.name) for name, array in unused.items()}
    of_tower = dtype or source.parameters[_POSITIONS][1]
    alone = {name: (shape, of_tower) for name, shape in tower.shapes.items()} if tower else {}
    check_room(target, size_of([*tensors.values(), *alone.values()]))
    with new_folder(target) as building:
        # Small files come before the tensors: they may raise errors, and tensors take long.
        with hf_config.reading(f"{source.folder} (its tokenizer)"):
            tokenizer = None
            if source.about["tokenizer"] or not published:
                save_tokenizer(source.about, building)
                tokenizer = load_tokenizer(building)
            if published:
                _drop_pointers(building / "tokenizer_config.json")
            else:
                from fusion_jax.interop.torch.folder import write_side_files

                assert tokenizer is not None
                write_side_files(building, model, tokenizer, chat_template.find(config.template, tokenizer), main)
        if published:
            (building / "config.json").write_text(json.dumps(described, indent=2) + "\n")
            if tokenizer is not None:
                stops = list(stop_ids(tokenizer, find_template(config.template)))
                (building / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}, indent=2) + "\n")
        else:
            needed = names.rows(model, parameter_shapes(model))
            count = sum(int(np.prod(row.shape)) for row in needed)
            (building / "README.md").write_text(model_card(source.folder, config, main, count))
        writer = TensorWriter(building, tensors)
        for name, array in unused.items():
            assign(writer[name], array, name)
        _copy(source, rows, writer, progress)
        if tower is not None:
            _write_tower(source, tower, building, alone, progress)
    note = name_note(Path(target), config.template) if published else None
    if note:
        log.warning("%s: %s", target, note)
    return source.folder


def _write_tower(
    source: Checkpoint,
    tower: TowerFolder,
    building: Path,
    tensors: dict[str, tuple[tuple[int, ...], str]],
    progress: bool,
) -> None:
    """Writes only the tower. Its last layer is all zeros, because the published code drops it without reading it."""
    folder = building / tower.name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tower.config, indent=2) + "\n")
    writer = TensorWriter(folder, tensors)
    writer["vision_model.post_layernorm.weight"][...] = 1
    _copy(source, tower.rows, writer, progress)


def _drop_pointers(path: Path) -> None:
    """Removes pointers to code from a config: trusting the exported code must not run the code of another folder."""
    config = read_object(path) if path.is_file() else {}
    if not config.keys().isdisjoint(hf_config.POINTERS):
        kept = {key: value for key, value in config.items() if key not in hf_config.POINTERS}
        path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _unused(origin: dict[str, Any], width: int, dtype: str, where: str) -> dict[str, np.ndarray]:
    """Tensors of the published files that are never used: those that were imported, or else the identity."""
    if origin.get("unused") is not None:
        kept = mapping(origin, "unused", where)
        check(all(name.endswith(UNUSED) for name in kept), f"{where} holds tensors that are not among the unused ones.")
        return {name: unpack(packed, f"{where}, {shown(name)}") for name, packed in kept.items()}
    return {
        f"{table.VISION}post_layernorm.weight": np.ones(width, DTYPES[dtype]),
        f"{table.VISION}post_layernorm.bias": np.zeros(width, DTYPES[dtype]),
    }


def _copy(source: Checkpoint, rows: list[table.Row], writer: TensorWriter, progress: bool) -> None:
    """Fills the writer, one group of parameters after the other."""
    places: dict[str, list[tuple[table.Row, int, int | None]]] = {}
    for row in rows:
        for nth, (path, index) in enumerate(row.paths):
            places.setdefault(path, []).append((row, nth, index))
    total = size_of(source.parameters[path] for path in places)

    def write(job: tuple[np.ndarray, table.Row, int, int | None]) -> int:
        array, row, nth, index = job
        part = table.part_to_published(row, array if index is None else array[index], source.config.model)
        # The parts of a fused tensor are consecutive; its rows are the last axis of our arrays.
        start = sum(source.parameters[before][0][-1] for before, _ in row.paths[:nth])
        assign(writer[row.name][start : start + len(part)], part, row.name)
        return part.nbytes

    with (
        tqdm.tqdm(total=total, unit="B", unit_scale=True, desc="writing", disable=not progress) as bar,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as workers,
    ):
        for group in _groups(source, list(places)):
            loaded = _load(source, group)
            for done in workers.map(write, [(loaded[path], *place) for path in group for place in places[path]]):
                bar.update(done)


def _groups(source: Checkpoint, paths: list[str]) -> Iterator[list[str]]:
    group: list[str] = []
    for path in paths:
        if group and size_of(source.parameters[p] for p in [*group, path]) > _GROUP_BYTES:
            yield group
            group = []
        group.append(path)
    yield group


def _load(source: Checkpoint, paths: list[str]) -> dict[str, np.ndarray]:
    """Reads some parameters in their own dtype."""
    here = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    like = {
        path: jax.ShapeDtypeStruct(shape, DTYPES[dtype], sharding=here) if path in paths else ocp.PLACEHOLDER
        for path, (shape, dtype) in source.parameters.items()
    }
    try:
        loaded = ocp.load_checkpointables(source.folder, {"params": unflatten_dict(like, sep="/")})["params"]
    except Exception as error:
        raise_if_no_damage(error)
        raise unreadable(source.folder, error) from error
    flat = flatten_dict(loaded, sep="/")
    return {path: np.asarray(flat[path]) for path in paths}
