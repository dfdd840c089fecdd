"""Loads batches with Grain: shuffles, measures and loads records in threads, and yields batches.

    order of records (seed, epochs) -> measure (threads) -> agree -> plan (data/planner.py)
                                    -> load and encode (threads) -> lay out -> prefetch

A stage that is counted in epochs reads every record once per epoch and ends when no record waits: one epoch flows into
the next, and the last step holds what is left. A stage that is counted in steps ends after the last of them.

Records are measured by their texts, and by the sizes in their images' headers where those matter, ahead of the images.
Process 0 alone measures, and the others use what it measured: a file that one machine cannot read, or reads
differently, must not change their plan. Each step draws l^2 from the seed and the step number and plans its rows from
the records that wait. That is the same in every process; each then reads the images of its own rows only. The state
that a checkpoint keeps is the reader's, the step and the waiting list, and is valid for any number of processes and
threads. A run that continues measures the waiting records again: their file may have been repaired meanwhile.

A bad record is passed on as the BadRecord it raised, so that it can be skipped and counted. The next record takes the
place of one that cannot be measured. A record leaves its place empty if its image turns out to be bad, which only its
own process notices, or if it takes more or less room than was planned.
"""

import dataclasses
import json
import logging
import math
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import grain

from fusion_jax.batch import Batch
from fusion_jax.config import RunConfig, StageConfig
from fusion_jax.data.examples import ExampleLoader, load_rows
from fusion_jax.data.layout import Measured, lay_out_rows
from fusion_jax.data.plan import Sizes, groups_of
from fusion_jax.data.planner import Counts, Element, Planner
from fusion_jax.data.sources import RecordSource
from fusion_jax.data.stages import stage_loader, stage_seed, stage_sizes
from fusion_jax.data.tokenizer import Tokenizer
from fusion_jax.errors import BadRecord

log = logging.getLogger("fusion_jax")

_MOST_SENT = 512  # measured records that process 0 sends in one message
_SENT_AHEAD = 8  # messages that process 0 sends before it waits for the others to have read the first of them
# Numbers of a waiting record in a checkpoint; earlier versions' lack `question`, and the oldest `arrived`, too.
_MEASURED = (4, 5, 6)


class Board(Protocol):
    """The board through which process 0 sends the others what it has measured: see `devices.board.Board`."""

    first: bool

    def send(self, name: str, text: str) -> None: ...

    def receive(self, name: str) -> str: ...

    def take_down(self, name: str) -> None: ...


@dataclass(frozen=True)
class Fed:
    """What the trainer gets for one step.

    Attributes:
      batch: the rows of this process. samples: conversations in the step, over all processes, as planned, less those
        whose images this process could not read.
      bad: the bad records met since the step before. broken: how many of them, the last, left a gap in a row: this
        process alone knows of those.
      plan: checksum of this step's plan and all before it since the start; the same in every process.
      done, last: see `planner.Step`.
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
    loader: ExampleLoader

    def map(self, number):
        return self.loader.measure(number)


class _Agreed(grain.IterDataset):
    """Measured records, as process 0 has measured them, in all processes."""

    def __init__(self, parent, board: Board, together: int):
        """Args: together: records in one message."""
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
        elements = [next(self._parent) for _ in range(self._together)]
        self._board.send(name, _to_json(elements))
        self._sent.append(name)
        if len(self._sent) > _SENT_AHEAD:
            self._board.take_down(self._sent.popleft())
        return elements

    def _receive(self, name: str) -> list:
        return _from_json(self._board.receive(name))

    def get_state(self):
        return {"next_index": self._position}

    def set_state(self, state):
        self._parent.set_state(state)
        self._position = state["next_index"]
        self._measured.clear()


def _to_json(elements: Sequence[Element]) -> str:
    return json.dumps(
        [
            [element.reason, element.where[:500], element.detail[:500]]
            if isinstance(element, BadRecord)
            else [*element[0], element[1]]
            for element in elements
        ]
    )


def _from_json(text: str) -> list[Element]:
    return [BadRecord(*one) if isinstance(one[0], str) else (Measured(*one[:-1]), one[-1]) for one in json.loads(text)]


@dataclass(frozen=True)
class _Feeding:
    """What an iterator of batches needs to know.

    Attributes:
      max_bad: share of bad records above which no more are read. groups: numbers of this process's groups. board:
        the board through which process 0 sends the others what it has measured; None if each measures by itself.
    """

    loader: ExampleLoader
    stage: StageConfig
    sizes: Sizes
    latent_counts: tuple[int, ...]
    seed: int
    threads: int
    max_bad: float
    groups: tuple[int, ...]
    board: Board | None = None

    def planner(self) -> Planner:
        records = len(self.loader.source)
        return Planner(self.stage, self.loader.spec, self.sizes, self.latent_counts, self.seed, records, self.max_bad)


class _Batches(grain.IterDataset):
    """Turns measured records into batches."""

    def __init__(self, parent, feeding: _Feeding):
        super().__init__(parent)
        self.feeding = feeding

    def __iter__(self):
        return _BatchIterator(iter(self._parent), self.feeding)


class _BatchIterator(grain.DatasetIterator):
    def __init__(self, parent, feeding: _Feeding):
        super().__init__(parent)
        self._feeding, self._planner = feeding, feeding.planner()
        self._broken: dict[str, int] = {}  # by reason, the gaps that this process has left since it started
        self._restored = False  # the waiting records are to be measured again

    def __next__(self) -> tuple[Fed, Counts]:
        f, planner = self._feeding, self._planner
        if self._restored and not planner.is_over():
            self._measure_again()
        step = planner.next_step(lambda: next(self._parent))
        if step is None:
            raise StopIteration
        per_group = f.sizes.rows_per_group
        own = [row for g in f.groups for row in step.rows[g * per_group : (g + 1) * per_group]]
        rows, gaps = load_rows(f.loader, own, f.threads)
        broken = [element for _, element in gaps]
        for element in broken:
            self._broken[element.reason] = self._broken.get(element.reason, 0) + 1
        batch = lay_out_rows(rows, step.spec, step.latents, len(f.groups))
        samples = sum(map(len, step.rows)) - len(broken)
        bad = (*step.bad, *broken)
        fed = Fed(batch, samples, bad, len(broken), planner.checksum, step.done, step.last)
        return fed, planner.counts.plus(self._broken)

    def _measure_again(self) -> None:
        """Measures the waiting records of a restored state, the same in every process."""
        self._restored = False
        planner, before = self._planner, self._planner.waiting
        elements = []
        for first in range(0, len(before), _MOST_SENT):
            numbers = [one.number for one in before[first : first + _MOST_SENT]]
            elements += self._agreed(f"waiting/{planner.step}/{first}", numbers)
        bad = planner.replace_waiting(elements)
        now = {one.number: one.question for one in planner.waiting}
        before = [m._replace(question=now.get(m.number, -1)) if m.question < 0 else m for m in before]
        if changed := len(set(before) - set(planner.waiting)):
            what = f"{changed} of the {len(before)} records that were read and waited for their step have changed since"
            log.warning(
                "%s: %s, %d of them beyond use; they are taken as they are now", self._feeding.stage.name, what, bad
            )

    def _agreed(self, name: str, numbers: Sequence[int]) -> list[Element]:
        """Returns the records as process 0 measures them."""
        f = self._feeding
        if f.board is not None and not f.board.first:
            return _from_json(f.board.receive(name))
        with ThreadPoolExecutor(f.threads) as pool:
            elements = list(pool.map(f.loader.measure, numbers))
        if f.board is not None:
            f.board.send(name, _to_json(elements))
        return elements

    def get_state(self):
        planner = self._planner
        counts = dataclasses.asdict(planner.counts.plus(self._broken))
        waiting = [list(measured) for measured in planner.waiting]
        return {"parent": self._parent.get_state(), "step": planner.step, "counts": counts, "waiting": waiting}

    def set_state(self, state):
        """Continues from where `get_state` was called. Raises ValueError if `state` is not of such an iterator."""
        _check_state(state, self._feeding.loader.spec.length)
        self._parent.set_state(state["parent"])
        planner = self._planner = self._feeding.planner()
        planner.step, planner.counts = state["step"], Counts(**state["counts"])
        planner.waiting = [_measured(one) for one in state["waiting"]]
        self._broken, self._restored = {}, True


def _measured(numbers: Sequence[int]) -> Measured:
    """Returns a waiting record of a checkpoint; its question's length is unknown if an earlier version wrote it."""
    return Measured(*numbers) if len(numbers) == max(_MEASURED) else Measured(*numbers, question=-1)


def _check_state(state, length: int) -> None:
    """Raises ValueError if `state` is not one of an iterator whose rows have `length` positions."""

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
        raise ValueError("the state of the input has a count that is not a whole number")
    for measured in state["waiting"]:
        fits = isinstance(measured, list) and len(measured) in _MEASURED and whole(*measured)
        if not fits or not measured[1] <= length:
            raise ValueError(f"the state of the input lists {measured!r:.80} as waiting, which is not a record")


def record_order(records: int, seed: int) -> grain.MapDataset:
    """Returns record numbers in the order in which a run reads them: epoch after epoch, each shuffled differently."""
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
    """Returns an iterator of the stage's (Fed, Counts); its state says exactly which batch comes next.

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
    every = [crops for one in (*sizes.smaller, sizes) for crops in one.crops.values()]
    fewest, most = (sizes.groups * pick(every) for pick in (min, max))
    if sizes.packing or fewest != sizes.rows:
        crops = f"{fewest} to {most}" if fewest < most else str(most)
        what = f"{sizes.rows} rows of {sizes.length or stage.max_length} and {crops} crops"
        log.info("%s: %s hold %.0f samples on average", stage.name, what, sizes.samples)
    for size in sizes.smaller:
        what = f"records with up to {size.question_length} question tokens and {min(size.rounds.values())} rounds"
        log.info("%s: %s go into smaller steps of their own", stage.name, what)
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
