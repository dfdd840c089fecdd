"""From records to batches: measure, plan, load, encode, lay out. Grain does the reading, shuffling and prefetching.

    RecordSource -> shuffle (seed) -> repeat -> measure (threads) -> agree -> wait -> plan rows
                 -> load + encode (threads) -> lay out -> prefetch

A stage that is counted in epochs reads every record once an epoch and ends once none waits: one epoch flows into the
next, and the last step holds what is left. One that is counted in steps ends behind the last of them.

Records are measured by their texts, and by the sizes in their images' headers where those matter, ahead of the images.
Process 0 alone measures, and the others take what it measured: a file that one machine cannot read, or reads
otherwise, must not change their plan. Each step draws l^2 from the seed and the step number and plans its rows from the
records that wait (data/plan.py). That is the same in every process; each then reads the images of its own rows only.
The state that a checkpoint keeps is the reader's, the step and the waiting list, and holds for any number of processes
and threads. A run that goes on measures the waiting records anew: their file may have been repaired meanwhile.

A bad record is passed on as the BadRecord it raised, so that it can be skipped and counted. One that cannot be measured
is made up for by the next; one whose image turns out to be bad, which only its own process learns, or which takes other
room than was planned, leaves its place empty.
"""

import dataclasses
import json
import logging
import math
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grain

from fusion_jax.batch import Batch
from fusion_jax.config import RunConfig, StageConfig
from fusion_jax.data.examples import Loader, stage_loader
from fusion_jax.data.layout import lay_out_rows
from fusion_jax.data.plan import Measured, Queue, Sizes
from fusion_jax.data.planner import (
    Counts,
    draw_latent_count,
    groups_of,
    is_over,
    records_to_read,
    stage_seed,
    stage_sizes,
)
from fusion_jax.data.sources import RecordSource
from fusion_jax.data.tokenizer import Tokenizer
from fusion_jax.devices.board import Board
from fusion_jax.errors import BadRecord

log = logging.getLogger("fusion_jax")

_MOST_SENT = 512  # measured records that process 0 sends at once
_SENT_AHEAD = 8  # so many times before it waits for the others to have read them
_MEASURED = (4, 5)  # numbers of a waiting record in a checkpoint; the oldest lack when it came


@dataclass(frozen=True)
class Fed:
    """What the trainer gets for one step.

    Attributes:
      batch: the rows of this process. samples: conversations in the step, over all processes, as planned, less those
        whose images this process could not read.
      bad: the bad records met since the step before. broken: how many of them, the last, left a gap in a row: this
        process alone knows of those.
      plan: checksum of this step's plan and all before it since the start; the same in every process.
      done: how much of the stage came before, in steps: of those with as many samples as steps have on average, where
        epochs are counted. last: the stage ends with this step.
    """

    batch: Batch
    samples: int
    bad: tuple[BadRecord, ...]
    broken: int
    plan: int
    done: float = 0.0
    last: bool = False


@dataclass(frozen=True)
class _Measure(grain.transforms.Map):
    loader: Loader

    def map(self, number):
        return self.loader.measure(number)


class _Agreed(grain.IterDataset):
    """Measured records, as process 0 has measured them, in all processes."""

    def __init__(self, parent, board: Board, together: int):
        """Args: together: records that are sent at once."""
        super().__init__(parent)
        self._board, self._together = board, together

    def __iter__(self):
        return _AgreedIterator(iter(self._parent), self._board, self._together)


class _AgreedIterator(grain.DatasetIterator):
    """Process 0 reads its parent; the others read the board, and their parent stays where it is."""

    def __init__(self, parent, board: Board, together: int):
        super().__init__(parent)
        self._board, self._together = board, together
        self._position, self._measured, self._sent = 0, deque(), deque()

    def __next__(self):
        if not self._measured:
            name = f"measured/{self._position}"
            self._measured.extend(self._send(name) if self._board.first else self._receive(name))
        self._position += 1
        return self._measured.popleft()

    def _send(self, name: str) -> list:
        measured = [next(self._parent) for _ in range(self._together)]
        self._board.send(name, json.dumps([_to_json(element) for element in measured]))
        self._sent.append(name)
        if len(self._sent) > _SENT_AHEAD:
            self._board.take_down(self._sent.popleft())
        return measured

    def _receive(self, name: str) -> list:
        return [_from_json(element) for element in json.loads(self._board.receive(name))]

    def get_state(self):
        return {"next_index": self._position}

    def set_state(self, state):
        self._parent.set_state(state)
        self._position = state["next_index"]
        self._measured.clear()


def _to_json(element: tuple[Measured, int] | BadRecord) -> list:
    if isinstance(element, BadRecord):
        return [element.reason, element.where[:500], element.detail[:500]]
    measured, dropped = element
    return [*measured, dropped]


def _from_json(element: list) -> tuple[Measured, int] | BadRecord:
    if isinstance(element[0], str):
        return BadRecord(*element)
    return Measured(*element[:-1]), element[-1]


@dataclass(frozen=True)
class _Feeding:
    """What an iterator of batches needs to know.

    Attributes:
      allowed: share of bad records. groups: numbers of this process's groups. board: through which process 0 sends the
        others what it has measured; None where each measures by itself.
    """

    loader: Loader
    stage: StageConfig
    sizes: Sizes
    latent_counts: tuple[int, ...]
    seed: int
    threads: int
    allowed: float
    groups: tuple[int, ...]
    board: Board | None = None

    @property
    def records(self) -> int:
        """How many the stage reads, a record counting once an epoch."""
        return records_to_read(self.stage, len(self.loader.source))

    def queue(self) -> Queue:
        return Queue.of(self.loader.spec, self.sizes)


class _Batches(grain.IterDataset):
    """Measured records to batches."""

    def __init__(self, parent, feeding: _Feeding):
        super().__init__(parent)
        self.feeding = feeding

    def __iter__(self):
        return _BatchIterator(iter(self._parent), self.feeding)


class _BatchIterator(grain.DatasetIterator):
    def __init__(self, parent, feeding: _Feeding):
        super().__init__(parent)
        self._feeding, self._plan = feeding, 0
        self._counts = Counts()  # the same in every process
        self._broken: dict[str, int] = {}  # by reason, the gaps that this process has left since it started
        self._queue = feeding.queue()
        self._restored = False  # the waiting records are to be measured anew

    def __next__(self) -> tuple[Fed, Counts]:
        f, queue = self._feeding, self._queue
        if self._is_over():
            raise StopIteration
        bad = self._measure_again() + self._read(queue.enough)
        if not queue.waiting and not bad:
            raise StopIteration
        latents, done = draw_latent_count(f.latent_counts, f.seed, queue.step), self._done()
        rows, crops = queue.take(latents)
        latents = latents if crops else 0  # text alone: the same program whatever was drawn
        self._plan = zlib.crc32(json.dumps([latents, crops, rows]).encode(), self._plan)
        if not f.stage.steps:
            bad += self._read(lambda: bool(queue.waiting))  # whether this is the last step depends on the next record
        last = self._is_over()

        per_group = f.sizes.rows_per_group
        own = [row for g in f.groups for row in rows[g * per_group : (g + 1) * per_group]]
        with ThreadPoolExecutor(f.threads) as pool:
            loaded = [list(row) for row in [pool.map(f.loader.load_planned, row) for row in own]]
        broken = [element for row in loaded for element in row if isinstance(element, BadRecord)]
        for element in broken:
            self._broken[element.reason] = self._broken.get(element.reason, 0) + 1
        # A record whose image turns out to be bad leaves a gap in its row.
        good = [[element for element in row if not isinstance(element, BadRecord)] for row in loaded]
        batch = lay_out_rows(good, dataclasses.replace(f.loader.spec, crops=crops), latents, len(f.groups))
        samples = sum(map(len, rows)) - len(broken)
        fed = Fed(batch, samples, tuple(bad + broken), len(broken), self._plan, done, last)
        return fed, self._counts.plus(self._broken)

    def _is_over(self) -> bool:
        queue = self._queue
        return is_over(self._feeding.stage, self._feeding.records, queue.step, self._counts.seen, len(queue.waiting))

    def _done(self) -> float:
        if self._feeding.stage.steps:
            return self._queue.step
        return (self._counts.seen - len(self._queue.waiting)) / self._feeding.sizes.samples

    def _read(self, enough: Callable[[], bool]) -> list[BadRecord]:
        """Reads until there is enough, all is read, or too many records have been bad. The bad ones. Nothing that
        differs between processes may decide when it ends."""
        f, bad, in_row = self._feeding, [], 0
        records = len(f.loader.source)
        while self._counts.seen < f.records and not enough():
            element = next(self._parent)
            self._counts.seen += 1
            if isinstance(element, BadRecord):
                bad.append(element)
                in_row += 1
                self._counts.add(element)
                if in_row >= 2 * records or self._counts.too_many(f.allowed, records):
                    break  # none in a whole pass, or too few: hand over what was met, and let the trainer say so
            else:
                in_row = 0
                measured, dropped = element
                self._queue.add(measured)
                self._counts.shortened += dropped > 0
                self._counts.dropped_rounds += dropped
        return bad

    def _measure_again(self) -> list[BadRecord]:
        """The waiting records of a restored state as they are now, the same in every process; those that cannot be used
        any more are taken out and returned."""
        if not self._restored:
            return []
        self._restored = False
        f, old, bad = self._feeding, self._queue.waiting, []
        self._queue.waiting = []
        for first in range(0, len(old), _MOST_SENT):
            part = old[first : first + _MOST_SENT]
            for before, element in zip(part, self._agreed(f"waiting/{self._queue.step}/{first}", part)):
                if isinstance(element, BadRecord):
                    bad.append(element)
                    self._counts.add(element)
                else:
                    self._queue.waiting.append(element[0]._replace(arrived=before.arrived))
        changed = len(set(old) - set(self._queue.waiting))
        if changed:
            what = f"{changed} of the {len(old)} records that were read and waited for their step have changed since"
            log.warning("%s: %s, %d of them beyond use; they are taken as they are now", f.stage.name, what, len(bad))
        return bad

    def _agreed(self, name: str, waiting: Sequence[Measured]) -> list[tuple[Measured, int] | BadRecord]:
        """What process 0 measures."""
        f = self._feeding
        if f.board is not None and not f.board.first:
            return [_from_json(element) for element in json.loads(f.board.receive(name))]
        with ThreadPoolExecutor(f.threads) as pool:
            measured = list(pool.map(f.loader.measure, [one.number for one in waiting]))
        if f.board is not None:
            f.board.send(name, json.dumps([_to_json(element) for element in measured]))
        return measured

    def get_state(self):
        waiting = [list(measured) for measured in self._queue.waiting]
        counts = dataclasses.asdict(self._counts.plus(self._broken))
        return {"parent": self._parent.get_state(), "step": self._queue.step, "counts": counts, "waiting": waiting}

    def set_state(self, state):
        """Goes on where `get_state` was called. ValueError where it is no state of such an iterator."""
        _check_state(state, self._feeding.loader.spec.length)
        self._parent.set_state(state["parent"])
        self._counts, self._broken = Counts(**state["counts"]), {}
        self._queue = self._feeding.queue()
        self._queue.step, self._queue.waiting = state["step"], [Measured(*measured) for measured in state["waiting"]]
        self._restored = True


def _check_state(state, length: int) -> None:
    """ValueError where that is no state of an iterator whose rows are so long."""

    def whole(*numbers) -> bool:
        return all(type(number) is int and 0 <= number < 2**63 for number in numbers)

    def named(part, names) -> bool:
        return isinstance(part, dict) and part.keys() == set(names)

    counts = [field.name for field in dataclasses.fields(Counts)]
    known = named(state, ("parent", "step", "counts", "waiting")) and named(state["parent"], ("next_index",))
    known = known and named(state["counts"], counts) and isinstance(state["counts"]["bad"], dict)
    if not known or not isinstance(state["waiting"], list):
        raise ValueError("the state of the input has other entries than this version's")
    numbers = [value for name, value in state["counts"].items() if name != "bad"] + [*state["counts"]["bad"].values()]
    if not whole(state["step"], state["parent"]["next_index"], *numbers):
        raise ValueError("the state of the input has a count that is no whole number")
    for measured in state["waiting"]:
        fits = isinstance(measured, list) and len(measured) in _MEASURED and whole(*measured)
        if not fits or not measured[1] <= length:
            raise ValueError(f"the state of the input lets {measured!r:.80} wait, which is no record's")


def record_order(records: int, seed: int) -> grain.MapDataset:
    """Record numbers as a run reads them, epoch after epoch, each shuffled in its own way."""
    return grain.MapDataset.range(records).seed(seed).shuffle().repeat()


def training_batches(
    config: RunConfig,
    stage: StageConfig,
    source: RecordSource,
    tokenizer: Tokenizer,
    shards: int = 1,
    held: Sequence[int] | None = None,
    board: Board | None = None,
    sizes: Sizes | None = None,
) -> grain.DatasetIterator:
    """Iterator of the stage's (Fed, Counts); its state says exactly which batch comes next.

    Args:
      shards: parts that the rows of a microbatch are sharded into: those of the mesh.
      held: numbers of the shards whose rows the batches hold, ascending; by default all.
      board: a new one, through which process 0 sends the others what it has measured; without one each measures by
        itself.
      sizes: the same in every process; by default `stage_sizes`, measured here.
    """
    seed = stage_seed(config, stage)
    loader = stage_loader(config, stage, source, tokenizer)
    sizes = sizes or stage_sizes(config, stage, loader, shards)
    fewest, most = (sizes.groups * pick(sizes.crops.values()) for pick in (min, max))
    if sizes.packing or fewest != sizes.rows:
        crops = f"{fewest} to {most}" if fewest < most else str(most)
        what = f"{sizes.rows} rows of {stage.max_length} and {crops} crops"
        log.info("%s: %s hold %.0f samples on average", stage.name, what, sizes.samples)
    if sizes.samples > 1.1 * stage.batch_size:
        log.warning(
            "%s: steps hold %.0f samples, not batch_size=%d, because each of %d devices and microbatches has as many "
            "rows, so that an epoch has fewer steps; let fewer share the rows (mesh, accumulation) for smaller batches",
            *(stage.name, sizes.samples, stage.batch_size, sizes.groups),
        )
    feeding = _Feeding(
        loader,
        stage,
        sizes,
        config.model.drawn_latent_counts,
        seed,
        config.loader_threads,
        config.max_bad_records,
        groups_of(range(shards) if held is None else held, sizes.groups // shards),
        board,
    )
    order = record_order(len(source), seed)
    # Ahead of the step: enough measured records for two batches, then two finished batches.
    samples = math.ceil(sizes.samples)
    reading = grain.ReadOptions(num_threads=config.loader_threads, prefetch_buffer_size=2 * samples)
    measured = order.map(_Measure(loader)).to_iter_dataset(reading)
    if board is not None:
        measured = _Agreed(measured, board, min(samples, _MOST_SENT))
    return iter(grain.experimental.ThreadPrefetchIterDataset(_Batches(measured, feeding), prefetch_buffer_size=2))
