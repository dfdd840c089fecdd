"""Measures the records of shards and stores their lengths beside them; see data/lengths.py."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fusion_jax.config import RunConfig
from fusion_jax.data import lengths, shards
from fusion_jax.data.data_sets import StoredData
from fusion_jax.data.examples import ExampleMaker, layout_spec
from fusion_jax.data.layout import measure
from fusion_jax.data.tokenizer import load_tokenizer
from fusion_jax.data.workers import progress_bar, run_in_processes
from fusion_jax.errors import BadRecord, UserError, check
from fusion_jax.files import whole_file

log = logging.getLogger("fusion_jax")

_TOGETHER = 4096  # records that a worker process measures at a time

# A worker's task: the folder of shards, its maker of examples, the first record and the one after the last.
_Task = tuple[str, ExampleMaker, int, int]


def write_lengths(folder: str | Path, config: RunConfig, workers: int = 1, progress: bool = True) -> Path:
    """Stores the lengths of the records of shards for a run's tokenizer, template and model, unless they are there.

    Returns:
      The file.

    Raises:
      UserError: there are no shards in `folder`, it is not on a local disk, or it cannot be written.
    """
    check(not shards.is_url(folder), f"{folder}: lengths are written on a local disk; copy the file there afterwards.")
    records = shards.Shards(folder)
    maker = ExampleMaker(config.model, load_tokenizer(config.tokenizer), config.template, config.decode)
    path = Path(folder) / lengths.file_name(records, maker.lengths_key)
    if path.exists():
        log.info("%s is there already", path)
        return path
    entries = np.zeros(len(records), lengths.ENTRY)
    starts = range(0, len(records), _TOGETHER)
    tasks = ((str(folder), maker, start, min(start + _TOGETHER, len(records))) for start in starts)
    with progress_bar(len(records), 0, "measuring", progress) as bar:
        for start, part in run_in_processes(measure_part, tasks, workers, bar.update):
            entries[start : start + len(part)] = part
    try:
        with whole_file(path, part=path.with_suffix(f".{os.getpid()}.part")) as file:
            np.save(file, entries)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror or error}.") from error
    return path


def measure_part(task: _Task, advance: Callable[[int], None]) -> tuple[int, np.ndarray]:
    """Measures the records of a task. Returns its first record and the entries."""
    folder, maker, start, end = task
    data = StoredData("", shards.Shards(folder), range(start, end))
    spec = layout_spec(maker.model, 1, 1, 1)  # its limits do not matter: nothing has to fit
    entries = np.zeros(end - start, lengths.ENTRY)
    most = {name: np.iinfo(lengths.ENTRY[name]).max for name in lengths.ENTRY.names}
    for k in range(end - start):
        advance(1)
        try:
            example = maker.text(data.text(k))
        except BadRecord:
            continue
        takes = measure(example, spec, 0)._asdict() | {"images": example.images}
        if all(takes[name] <= largest for name, largest in most.items()):
            entries[k] = tuple(takes[name] for name in lengths.ENTRY.names)
    return start, entries
