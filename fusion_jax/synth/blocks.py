"""Keeps unfinished samples in blocks, each in a file that appears whole or not at all.

    OUT/work/blocks/00012.jsonl    {"block": 12, "done": ["filter", "judge"]}, then a sample a line

A block's file is replaced when its samples have passed the stages of the run. If the run is killed before that, they
pass them again, and replies that were paid for are read from the journal.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from fusion_jax.errors import UserError, check
from fusion_jax.synth.images import write_once
from fusion_jax.synth.stages import STAGES, Sample


def _block_path(out: Path, number: int) -> Path:
    return out / "work" / "blocks" / f"{number:05d}.jsonl"


def write_block(out: Path, number: int, done: list[str], samples: list[Sample]) -> None:
    """Writes a block whose samples have passed the stages `done`."""
    lines = [{"block": number, "done": done}, *samples]
    write_once(
        _block_path(out, number),
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode(errors="replace"),
    )


@contextlib.contextmanager
def readable(out: Path, path: Path) -> Iterator[IO[str]]:
    """Opens a JSON file of the run for reading. Raises UserError where the data read in the block are damaged."""
    try:
        with open(path, encoding="utf-8") as f:
            yield f
    except (ValueError, RecursionError, KeyError, TypeError) as e:
        raise UserError(
            f"{path} is damaged; delete {out / 'work'} and start the same command again: paid replies stay in the "
            "journal."
        ) from e


def read_done(out: Path, number: int) -> list[str]:
    """The stages that a block's samples have passed. Raises UserError where its file is damaged."""
    with readable(out, _block_path(out, number)) as f:
        return json.loads(f.readline())["done"]


def read_block(out: Path, number: int) -> tuple[list[str], list[Sample]]:
    """The stages that a block's samples have passed, and the samples. Raises UserError where its file is damaged."""
    with readable(out, _block_path(out, number)) as f:
        head, *samples = map(json.loads, f)
    return head["done"], samples


def size(out: Path, number: int) -> int:
    """How many samples a block has. Raises UserError where its file is damaged."""
    with readable(out, _block_path(out, number)) as f:
        return sum(1 for _ in f) - 1


def all_samples(out: Path, blocks: int) -> Iterator[Sample]:
    """Yields all samples in their order, with one block in memory at a time."""
    for number in range(blocks):
        yield from read_block(out, number)[1]


def missing(done: list[str], wanted: list[str], number: int) -> list[str]:
    """Which of the wanted stages a block still has to pass. Raises UserError where an earlier stage is missing."""
    todo = [stage for stage in STAGES if stage in wanted and stage not in done]
    if todo:
        before = list(STAGES)[: list(STAGES).index(todo[0])]
        gap = [stage for stage in before if stage not in done]
        check(
            not gap, f"Stage {todo[0]} needs stage {gap[0] if gap else ''}, which block {number} has not been through."
        )
        order = list(STAGES)[len(before) : len(before) + len(todo)]
        check(order == todo, f"Stage {todo[-1]} needs all stages before it: {', '.join(order)}.")
    return todo
