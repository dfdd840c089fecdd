"""Imports Hugging Face folders and GGUF files: reads our parameters and writes checkpoints.

folders --headers--> names, shapes, dtypes --table--> what goes where        (opening.py: all checks)
        --tensor by tensor, several at once--> memory-mapped parameters --Orbax--> checkpoint
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import tqdm
from flax.traverse_util import flatten_dict, unflatten_dict

from fusion_jax.config import RunConfig, StageConfig
from fusion_jax.errors import UserError, first_line
from fusion_jax.interop import table
from fusion_jax.interop.new_folder import check_room, new_folder
from fusion_jax.interop.opening import Opened, Source, open_published
from fusion_jax.interop.shapes import kept_shapes, parameter_shapes
from fusion_jax.interop.tensors import DTYPES, allocate, assign, size_of
from fusion_jax.models import fusion
from fusion_jax.models.config import FusionConfig
from fusion_jax.training.about import describe_run


def read(opened: Opened, make: Callable[[str, tuple[int, ...], np.dtype], np.ndarray], progress: bool = False) -> dict:
    """Reads all tensors into arrays that `make(path, shape, dtype)` returns; the result is a nested dict of them."""
    shapes = kept_shapes(opened.model)
    params = {path: make(path, shape, DTYPES[opened.dtypes[path]]) for path, shape in shapes.items()}
    jobs = [(source, row) for source in opened.sources for row in source.rows]
    total = sum(_row_bytes(source, row) for source, row in jobs)
    with (
        tqdm.tqdm(total=total, unit="B", unit_scale=True, desc="reading", disable=not progress) as bar,
        # Several files are read in parallel; each worker holds one tensor.
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as workers,
    ):

        def work(job: tuple[Source, table.Row]) -> int:
            source, row = job
            for path, index, part in table.to_ours(row, source.tensors.get(row.name), shapes):
                into = params[path] if index is None else params[path][index]
                if row.transform in ("vocab", "head"):
                    _fill_vocabulary(into, part, row.transform, source.vocabulary, opened.model.llm.vocab_size)
                else:
                    assign(into, part, row.name)
            return _row_bytes(source, row)

        for done in workers.map(work, jobs):
            bar.update(done)
    named = {path for _, row in jobs for path, _ in row.paths}
    _initialise(opened.model, {path: array for path, array in params.items() if path not in named})
    return unflatten_dict(params, sep="/")


def _row_bytes(source: Source, row: table.Row) -> int:
    entry = source.tensors.entries[row.name]
    return size_of([(entry.shape, entry.dtype)])


def _fill_vocabulary(into: np.ndarray, part: np.ndarray, transform: str, known: int, vocabulary: int) -> None:
    """Copies the first `known` rows (columns of a head), puts their mean up to `vocabulary`, and zeros after that."""
    if transform == "head":
        into, part = into.T, part.T
    assign(into[:known], part[:known], "the vocabulary")
    if known < vocabulary:
        into[known:vocabulary] = part[:known].mean(0, dtype=np.float32)
    into[vocabulary:] = 0


def _initialise(model: FusionConfig, new: dict[str, np.ndarray]) -> None:
    """Fills parameters that are in none of the sources with the model's initial values."""

    def draw(paths: tuple[str, ...]) -> None:
        # The whole initialiser is traced, but only these parameters are computed.
        init = jax.jit(lambda: [flatten_dict(fusion.init(model, jax.random.key(0)), sep="/")[path] for path in paths])
        for path, array in zip(paths, init()):
            new[path][...] = np.asarray(array)

    if sum(array.size for array in new.values()) < 10**8:
        draw(tuple(new))
    else:
        for path in new:
            draw((path,))


def load(folder: str | Path) -> tuple[FusionConfig, dict]:
    """Reads a published folder into memory.

    Returns:
      The model config and float32 parameters (numpy, nested dict).

    Raises:
      UserError: see `open_published`.
    """
    opened = open_published(folder, dtype="float32")
    return opened.model, read(opened, lambda _, shape, dtype: np.empty(shape, dtype))


def run_config(opened: Opened) -> RunConfig:
    """The run config of an imported checkpoint: model and template; its one stage is a placeholder without training."""
    longest = max(opened.model.latent_counts)
    stage = StageConfig("import", data="", max_length=max(4096, opened.model.tokens_per_image + longest + 1))
    return RunConfig(model=opened.model, tokenizer="", template=opened.template, stages=(stage,))


def write_checkpoint(opened: Opened, target: str | Path, progress: bool = True) -> None:
    """Reads all tensors and writes `target`, an Orbax checkpoint of parameters and `about`, whole or not at all.

    Only a few tensors are in memory: parameters are in memory-mapped files beside the target until Orbax has written
    them, so the model temporarily takes its disk space twice.

    Raises:
      UserError: the target is not empty, or the disk is full.
    """
    shapes = kept_shapes(opened.model)
    size = size_of((shape, opened.dtypes[path]) for path, shape in shapes.items())
    check_room(target, 2 * size)
    with new_folder(target) as building:
        maps = building.parent / "parameters"
        maps.mkdir()

        def make(path: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
            file = maps / path.replace("/", ".")
            return allocate(file, size_of([(shape, opened.dtypes[path])])).view(dtype).reshape(shape)

        params = read(opened, make, progress)
        about = describe_run(run_config(opened), opened.tokenizer, opened.origin)
        context = ocp.Context()
        # The arrays do not change while they are written, and a copy would take the memory of the whole model.
        context.memory.deepcopy_host_arrays = False
        context.memory.write_concurrent_bytes = 2 * 10**9
        try:
            with context:
                ocp.save_checkpointables(building, {"params": params, "about": about}, overwrite=True)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"{target} could not be written: {first_line(error)}") from error


def summary(opened: Opened) -> str:
    """Describes an import in one line for the terminal."""
    count = sum(int(np.prod(shape)) for shape in parameter_shapes(opened.model).values())
    dtypes = " and ".join(sorted(set(opened.dtypes.values())))
    return f"{count:,} parameters (vocabulary padded), {dtypes}, template {opened.template}"
